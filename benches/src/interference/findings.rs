//! What the laps say.

use super::Args;
use super::course::{Mix, Row};
use crate::race::{median, paired_ratio};
use crate::report::{Error, Output};
use crate::size::show;
use serde::Serialize;
use std::collections::BTreeMap;

/// The JSON body.
#[derive(Serialize)]
pub(super) struct Body {
    parameters: Parameters,
    results: Vec<Row>,
    ratios: Ratios,
    checks: Checks,
}

#[derive(Serialize)]
struct Parameters {
    bytes: u64,
    rounds: u16,
}

/// By contender (`tdp`, and `tdp_all` with splitting and collapsing), the worse of the formats' figures.
#[derive(Default, Serialize)]
struct Ratios {
    /// Rate while swept over rate alone.
    rate_kept: BTreeMap<&'static str, f64>,
    /// What one fault in a thousand exceeds while swept, over the same alone.
    worst_fault: BTreeMap<&'static str, f64>,
    /// The longest fault of a lap, the same way.
    longest_fault: BTreeMap<&'static str, f64>,
}

#[derive(Serialize)]
struct Checks {
    leaked_frames: u64,
    /// Contenders that no pass was over while their laps ran.
    never_swept: u64,
}

fn floats(ns: &[u64]) -> Vec<f64> {
    ns.iter().map(|ns| *ns as f64).collect()
}

fn name(row: &Row) -> &'static str {
    match (row.name, row.mix) {
        ("tdp", Some(Mix::All)) => "tdp_all",
        (name, _) => name,
    }
}

impl Row {
    pub(crate) fn rate_kept(&self) -> f64 {
        paired_ratio(&self.idle_ns, &self.swept_ns)
    }

    pub(crate) fn worst(&self) -> f64 {
        paired_ratio(&floats(&self.swept_p999_ns), &floats(&self.idle_p999_ns))
    }

    fn longest(&self) -> f64 {
        paired_ratio(&floats(&self.swept_max_ns), &floats(&self.idle_max_ns))
    }
}

impl Body {
    pub(super) fn new(args: &Args, results: Vec<Row>) -> Self {
        let mut ratios = Ratios::default();
        for row in &results {
            let name = name(row);
            let least = ratios.rate_kept.entry(name).or_insert(f64::INFINITY);
            *least = least.min(row.rate_kept());
            let most = ratios.worst_fault.entry(name).or_default();
            *most = most.max(row.worst());
            let most = ratios.longest_fault.entry(name).or_default();
            *most = most.max(row.longest());
        }
        let checks = Checks {
            leaked_frames: results
                .iter()
                .fold(0, |sum, row| sum.saturating_add(row.leaked)),
            never_swept: results.iter().filter(|row| row.passes == 0).count() as u64,
        };
        Self {
            parameters: Parameters {
                bytes: args.bytes,
                rounds: args.rounds,
            },
            results,
            ratios,
            checks,
        }
    }

    /// Prints the readable part.
    pub(super) fn tell(&self, output: &Output, args: &Args) {
        output.say(format_args!(
            "A vCPU maps {} by pages of 4K, alone and while another thread sweeps it; medians of {} rounds",
            show(args.bytes),
            args.rounds
        ));
        let header = [
            "",
            "",
            "swept by",
            "ns a fault",
            "swept",
            "rate kept",
            "p99.9 ns",
            "swept",
            "worst fault",
            "longest",
        ];
        output.table(
            &header,
            self.results.iter().map(|row| {
                let each = |ns: &[f64]| format!("{:.1}", median(ns));
                let whole = |ns: &[u64]| format!("{:.0}", median(&floats(ns)));
                [
                    row.name.to_owned(),
                    row.format.to_owned(),
                    match row.mix {
                        Some(Mix::All) => "all",
                        _ => "protect, age",
                    }
                    .to_owned(),
                    each(&row.idle_ns),
                    each(&row.swept_ns),
                    format!("{:.2}", row.rate_kept()),
                    whole(&row.idle_p999_ns),
                    whole(&row.swept_p999_ns),
                    format!("{:.2}", row.worst()),
                    format!("{:.2}", row.longest()),
                ]
            }),
        );
    }

    /// # Errors
    ///
    /// [`Error::Check`] if a frame was lost, or if a contender was not swept at all.
    pub(super) fn verdict(&self) -> Result<(), Error> {
        match (self.checks.leaked_frames, self.checks.never_swept) {
            (0, 0) => Ok(()),
            (leaked, unswept) => Err(Error::Check(format!(
                "{leaked} table frames leaked, {unswept} contenders were never swept (-b, -i)"
            ))),
        }
    }
}
