//! What the phases say.

use super::Args;
use super::lanes::{Phase, Row};
use crate::race::{median, paired_ratio};
use crate::report::{Error, Output};
use serde::Serialize;
use std::collections::BTreeMap;

/// The JSON body.
#[derive(Serialize)]
pub(super) struct Body {
    parameters: Parameters,
    /// The library's rows.
    results: Vec<Row>,
    /// The others' rows.
    baselines: Vec<Row>,
    ratios: Ratios,
    checks: Checks,
}

#[derive(Serialize)]
struct Parameters {
    vcpus: u16,
    bytes_per_vcpu: u64,
    rounds: u16,
    parallel: bool,
}

#[derive(Default, Serialize)]
struct Ratios {
    /// A pass over all pages, all of them young: the library's time over the floor's, the larger of the formats' figures.
    aging_over_floor: f64,
    /// The same of a baseline over the library, the smaller of the formats' figures.
    aging: BTreeMap<&'static str, f64>,
    /// Writing while another thread ages, over writing: the larger of the formats' figures.
    slowdown_by_aging: BTreeMap<&'static str, f64>,
    /// Nanoseconds a page of the library's pass, by row.
    aging_ns_per_page: BTreeMap<&'static str, f64>,
}

#[derive(Serialize)]
struct Checks {
    /// Pages that were young after a pass, or old after an access.
    wrongly_aged: u64,
    /// Table frames that did not come back.
    leaked_frames: u64,
}

impl Row {
    fn ns(&self, phase: Phase) -> Vec<f64> {
        let ns = self.ns.get(&phase).map_or(&[][..], Vec::as_slice);
        ns.iter().map(|ns| *ns as f64).collect()
    }

    fn aging(&self) -> Vec<f64> {
        let mut ns = self.ns(Phase::MarkIdleBeforeWriting);
        ns.extend(self.ns(Phase::MarkIdleBeforeReading));
        ns
    }
}

impl Body {
    pub(super) fn new(args: &Args, rows: Vec<Row>) -> Self {
        let mut ratios = Ratios::default();
        for row in &rows {
            if args.parallel {
                let slowdown = paired_ratio(
                    &row.ns(Phase::WriteWhileAging),
                    &row.ns(Phase::WritePopulated),
                );
                let most = ratios.slowdown_by_aging.entry(row.name).or_default();
                *most = most.max(slowdown);
            }
            if row.name.starts_with("tdp") {
                let ns = median(&row.aging()) / row.pages as f64;
                ratios.aging_ns_per_page.insert(row.name, ns);
                continue;
            }
            let ours = rows
                .iter()
                .find(|other| other.name == "tdp" && other.format == row.format);
            let Some(ours) = ours else { continue };
            if row.name == "floor" {
                let over = paired_ratio(&ours.aging(), &row.aging());
                ratios.aging_over_floor = ratios.aging_over_floor.max(over);
            } else {
                let over = paired_ratio(&row.aging(), &ours.aging());
                let least = ratios.aging.entry(row.name).or_insert(over);
                *least = least.min(over);
            }
        }
        let checks = Checks {
            wrongly_aged: rows.iter().map(|row| row.wrong).sum(),
            leaked_frames: rows
                .iter()
                .fold(0, |sum, row| sum.saturating_add(row.leaked)),
        };
        let (results, baselines) = rows
            .into_iter()
            .partition(|row| row.name.starts_with("tdp"));
        Self {
            parameters: Parameters {
                vcpus: args.vcpus,
                bytes_per_vcpu: args.bytes,
                rounds: args.rounds,
                parallel: args.parallel,
            },
            results,
            baselines,
            ratios,
            checks,
        }
    }

    /// Prints the readable part: the selftest's lines for the library, and everybody's figures.
    pub(super) fn tell(&self, output: &Output) {
        let seconds = |row: &Row, phase| median(&row.ns(phase)) / 1e9;
        for row in &self.results {
            output.say(format_args!("{} {}", row.format, row.name));
            for (line, phase) in [
                ("Populating memory", Phase::Populate),
                ("Writing to populated memory", Phase::WritePopulated),
                ("Reading from populated memory", Phase::ReadPopulated),
                ("Mark memory idle", Phase::MarkIdleBeforeWriting),
                ("Writing to idle memory", Phase::WriteIdle),
                ("Mark memory idle", Phase::MarkIdleBeforeReading),
                ("Reading from idle memory", Phase::ReadIdle),
            ] {
                output.say(format_args!("{line:<30}: {:.9}s", seconds(row, phase)));
            }
        }
        let rows = self.results.iter().chain(&self.baselines);
        output.table(
            &[
                "",
                "",
                "aging, ns a page",
                "write idle",
                "read idle",
                "write populated",
                "while aging",
                "pass meanwhile",
            ],
            rows.map(|row| {
                let each = |ns: &[f64]| {
                    if ns.is_empty() {
                        String::new()
                    } else {
                        format!("{:.1}", median(ns) / row.pages as f64)
                    }
                };
                [
                    row.format.to_owned(),
                    row.name.to_owned(),
                    each(&row.aging()),
                    each(&row.ns(Phase::WriteIdle)),
                    each(&row.ns(Phase::ReadIdle)),
                    each(&row.ns(Phase::WritePopulated)),
                    each(&row.ns(Phase::WriteWhileAging)),
                    each(&row.ns(Phase::AgeWhileWriting)),
                ]
            }),
        );
        output.say(format_args!(
            "{} pages wrongly young or old, {} table frames leaked",
            self.checks.wrongly_aged, self.checks.leaked_frames
        ));
    }

    /// # Errors
    ///
    /// [`Error::Check`] if anything is not as it should be.
    pub(super) fn verdict(&self) -> Result<(), Error> {
        match (self.checks.wrongly_aged, self.checks.leaked_frames) {
            (0, 0) => Ok(()),
            (wrong, leaked) => Err(Error::Check(format!(
                "{wrong} pages were young after a pass or old after an access, {leaked} table frames leaked"
            ))),
        }
    }
}
