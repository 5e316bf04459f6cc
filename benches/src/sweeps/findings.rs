//! What the rounds say: nanoseconds a leaf, and ratios.

use super::Args;
use super::lanes::{FLOOR, FormatResult, OURS, Row};
use crate::race::{median, minimum, paired_ratio};
use crate::report::{Error, Output};
use crate::size::show;
use crate::sweeping::Sweep;
use serde::Serialize;
use std::collections::BTreeMap;
use tdp_arch::AdBits;

/// The JSON body.
#[derive(Serialize)]
pub(super) struct Body {
    parameters: Parameters,
    results: Vec<Figures>,
    ratios: Ratios,
    checks: Checks,
}

#[derive(Serialize)]
struct Parameters {
    bytes: u64,
    rounds: u16,
}

/// One contender swept in one way.
#[derive(Serialize)]
struct Figures {
    name: &'static str,
    format: &'static str,
    ad_bits: &'static str,
    sweep: &'static str,
    leaves: u64,
    ns_per_leaf_median: f64,
    ns_per_leaf_min: f64,
    /// For the library: its time over the floor's; for others theirs over the library's.
    ratio: Option<f64>,
    cpu_ns: Vec<u64>,
    preemptions: Vec<u64>,
}

#[derive(Serialize)]
struct Ratios {
    /// By sweep: the library's time over the floor's, the larger of the formats' figures.
    over_floor: BTreeMap<&'static str, f64>,
    /// By baseline, by sweep: its time over the library's, the smaller of the formats' figures.
    baselines: BTreeMap<&'static str, BTreeMap<&'static str, f64>>,
}

#[derive(Serialize)]
struct Checks {
    /// Leaves that a sweep left out, or that were not mapped for it.
    missed: u64,
    /// Table frames that did not come back.
    leaked_frames: u64,
}

/// Name of a sweep where the processor keeps the accessed and dirty bits, or not.
fn name(row: &Row) -> &'static str {
    match (row.sweep, row.ad_bits) {
        (Sweep::WriteProtect, AdBits::Processor) => "write_protect",
        (Sweep::WriteProtect, AdBits::Software) => "write_protect_software_ad",
        (Sweep::ClearDirty, _) => "clear_dirty",
        (Sweep::ProtectMasks, _) => "clear_masks",
        (Sweep::ClearMasks, _) => "clear_masks_dirty_bit",
        (Sweep::Age, _) => "age",
        (Sweep::Track, _) => "age_software_ad",
        (Sweep::Split, _) => "split",
        (Sweep::Collapse, _) => "collapse",
        (Sweep::Zap, AdBits::Processor) => "zap",
        (Sweep::Zap, AdBits::Software) => "zap_software_ad",
    }
}

fn per_leaf(row: &Row) -> Vec<f64> {
    row.cpu_ns
        .iter()
        .map(|ns| *ns as f64 / row.leaves as f64)
        .collect()
}

/// The row of `contender` that `row` is to be compared with.
fn counterpart<'a>(rows: &'a [Row], row: &Row, contender: &str) -> Option<&'a Row> {
    // The floor has no mode of its own.
    let fits = |other: &&Row| {
        other.contender == contender
            && other.sweep == row.sweep
            && (contender == FLOOR || other.ad_bits == row.ad_bits)
    };
    rows.iter().find(fits)
}

fn ratio(rows: &[Row], row: &Row) -> Option<f64> {
    let against = if row.contender == OURS { FLOOR } else { OURS };
    let other = counterpart(rows, row, against)?;
    (row.contender != FLOOR).then(|| paired_ratio(&per_leaf(row), &per_leaf(other)))
}

impl Body {
    pub(super) fn new(args: &Args, results: &[FormatResult]) -> Self {
        let mut ratios = Ratios {
            over_floor: BTreeMap::new(),
            baselines: BTreeMap::new(),
        };
        let mut figures = Vec::new();
        for result in results {
            for row in &result.rows {
                let ratio = ratio(&result.rows, row);
                if let (Some(ratio), OURS) = (ratio, row.contender) {
                    let worst = ratios.over_floor.entry(name(row)).or_insert(ratio);
                    *worst = worst.max(ratio);
                } else if let Some(ratio) = ratio {
                    let baseline = ratios.baselines.entry(row.contender).or_default();
                    let least = baseline.entry(name(row)).or_insert(ratio);
                    *least = least.min(ratio);
                }
                let ns = per_leaf(row);
                figures.push(Figures {
                    name: row.contender,
                    format: result.format,
                    ad_bits: match row.ad_bits {
                        AdBits::Processor => "processor",
                        AdBits::Software => "software",
                    },
                    sweep: name(row),
                    leaves: row.leaves,
                    ns_per_leaf_median: median(&ns),
                    ns_per_leaf_min: minimum(&ns),
                    ratio,
                    cpu_ns: row.cpu_ns.clone(),
                    preemptions: row.preemptions.clone(),
                });
            }
        }
        Self {
            parameters: Parameters {
                bytes: args.bytes,
                rounds: args.rounds,
            },
            results: figures,
            ratios,
            checks: Checks {
                missed: results.iter().map(|result| result.missed).sum(),
                leaked_frames: results.iter().map(|result| result.leaked).sum(),
            },
        }
    }

    /// Prints the readable part.
    pub(super) fn tell(&self, output: &Output, args: &Args) {
        output.say(format_args!(
            "{} of guest memory by pages of 4K, swept by one thread; processor nanoseconds a leaf, median of {} rounds \
             (fastest). tdp: its time over the floor's; baselines: theirs over tdp's",
            show(args.bytes),
            args.rounds
        ));
        output.table(
            &["", "", "contender", "ns a leaf", "ratio"],
            self.results.iter().map(|row| {
                [
                    row.format.to_owned(),
                    row.sweep.to_owned(),
                    row.name.to_owned(),
                    format!("{:.2} ({:.2})", row.ns_per_leaf_median, row.ns_per_leaf_min),
                    row.ratio
                        .map_or_else(String::new, |ratio| format!("{ratio:.2}")),
                ]
            }),
        );
        output.say(format_args!(
            "{} leaves missed, {} table frames leaked",
            self.checks.missed, self.checks.leaked_frames
        ));
    }

    /// # Errors
    ///
    /// [`Error::Check`] if anything is not as it should be.
    pub(super) fn verdict(&self) -> Result<(), Error> {
        match (self.checks.missed, self.checks.leaked_frames) {
            (0, 0) => Ok(()),
            (missed, leaked) => Err(Error::Check(format!(
                "sweeps missed {missed} leaves, {leaked} table frames leaked"
            ))),
        }
    }
}
