//! What the phases say.

use super::Args;
use super::lanes::Row;
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
    /// By baseline, by phase: its time over the library's by write protection, the smaller of the formats' figures.
    ratios: BTreeMap<&'static str, BTreeMap<String, f64>>,
    checks: Checks,
    #[serde(skip)]
    iterations: u16,
}

#[derive(Serialize)]
struct Parameters {
    vcpus: u16,
    bytes_per_vcpu: u64,
    page_bytes: u64,
    iterations: u16,
    slots: u16,
    write_percent: u16,
    manual_protect: bool,
    run_while_disabling: bool,
    rounds: u16,
}

#[derive(Serialize)]
struct Checks {
    /// Pages that were written and not reported.
    lost_dirty: u64,
    /// Pages that were reported and not written.
    extra_dirty: u64,
    /// Table frames that did not come back.
    leaked_frames: u64,
}

impl Row {
    fn ns(&self, phase: &str) -> Vec<f64> {
        let ns = self.ns.get(phase).map_or(&[][..], Vec::as_slice);
        ns.iter().map(|ns| *ns as f64).collect()
    }

    fn has(&self, phase: &str) -> bool {
        self.ns.contains_key(phase)
    }
}

fn phases(iterations: u16) -> Vec<(String, String)> {
    let mut phases = vec![
        ("Populate memory time".to_owned(), "populate".to_owned()),
        (
            "Enabling dirty logging time".to_owned(),
            "enable".to_owned(),
        ),
    ];
    for n in 1..=iterations {
        for (line, phase) in [
            ("dirty memory", "dirty"),
            ("get dirty log", "get"),
            ("clear dirty log", "clear"),
        ] {
            phases.push((format!("Iteration {n} {line} time"), format!("{phase} {n}")));
        }
    }
    phases.push((
        "Disabling dirty logging time".to_owned(),
        "disable".to_owned(),
    ));
    phases
}

impl Body {
    pub(super) fn new(args: &Args, rows: Vec<Row>) -> Self {
        let mut ratios = BTreeMap::<_, BTreeMap<String, f64>>::new();
        for row in rows.iter().filter(|row| !row.name.starts_with("tdp")) {
            let ours = rows
                .iter()
                .find(|ours| ours.name == "tdp" && ours.format == row.format);
            let Some(ours) = ours else { continue };
            for phase in row.ns.keys() {
                let ratio = paired_ratio(&row.ns(phase), &ours.ns(phase));
                let by_phase = ratios.entry(row.name).or_default();
                let least = by_phase.entry(phase.clone()).or_insert(f64::INFINITY);
                *least = least.min(ratio);
            }
        }
        let checks = Checks {
            lost_dirty: rows.iter().map(|row| row.lost).sum(),
            extra_dirty: rows.iter().map(|row| row.extra).sum(),
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
                page_bytes: args.backing.level().bytes(),
                iterations: args.iterations,
                slots: args.slots,
                write_percent: args.writes,
                manual_protect: !args.no_manual_protect,
                run_while_disabling: args.run_while_disabling,
                rounds: args.rounds,
            },
            results,
            baselines,
            ratios,
            checks,
            iterations: args.iterations,
        }
    }

    /// Prints the readable part.
    pub(super) fn tell(&self, output: &Output) {
        let phases = phases(self.iterations);
        for row in &self.results {
            output.say(format_args!("{} {}", row.format, row.name));
            for (line, phase) in phases.iter().filter(|(_, phase)| row.has(phase)) {
                output.say(format_args!("{line}: {:.9}s", median(&row.ns(phase)) / 1e9));
            }
        }
        let told: Vec<_> = phases
            .iter()
            .filter(|(_, phase)| self.results.iter().any(|row| row.has(phase)))
            .collect();
        let mut header = vec!["", ""];
        header.extend(told.iter().map(|(_, phase)| phase.as_str()));
        output.say("Nanoseconds a page:");
        let rows = self.results.iter().chain(&self.baselines);
        output.table(
            &header,
            rows.map(|row| {
                let mut cells = vec![row.format.to_owned(), row.name.to_owned()];
                cells.extend(
                    told.iter().map(|(_, phase)| {
                        format!("{:.2}", median(&row.ns(phase)) / row.pages as f64)
                    }),
                );
                cells
            }),
        );
        output.say(format_args!(
            "{} written pages not reported, {} reported and not written, {} table frames leaked",
            self.checks.lost_dirty, self.checks.extra_dirty, self.checks.leaked_frames
        ));
    }

    /// # Errors
    ///
    /// [`Error::Check`] if anything is not as it should be.
    pub(super) fn verdict(&self) -> Result<(), Error> {
        match (self.checks.lost_dirty, self.checks.leaked_frames) {
            (0, 0) => Ok(()),
            (lost, leaked) => Err(Error::Check(format!(
                "{lost} written pages were not reported, {leaked} table frames leaked"
            ))),
        }
    }
}
