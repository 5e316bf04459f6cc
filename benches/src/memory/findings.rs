//! What the guests took, for each GiB of them.

use super::Args;
use super::guests::{Row, Taken};
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
    sparse_bytes: u64,
    sparse_pages: u64,
}

/// By guest and format, and of the zap by its way: everything that is taken.
#[derive(Serialize)]
struct Ratios {
    bytes_per_gib_at_rest: BTreeMap<String, f64>,
    /// At rest over 8 bytes for each page.
    at_rest_over_entries: BTreeMap<String, f64>,
    bytes_per_gib_at_worst: BTreeMap<String, f64>,
    worst_over_rest: BTreeMap<String, f64>,
}

#[derive(Serialize)]
struct Checks {
    leaked_frames: u64,
    /// Frames that still waited after a grace period.
    waiting: u64,
}

impl Row {
    fn per_gib(&self, taken: &Taken) -> f64 {
        taken.total() as f64 * (1_u64 << 30) as f64 / self.guest_bytes as f64
    }
}

impl Body {
    pub(super) fn new(args: &Args, results: Vec<Row>) -> Self {
        let mut ratios = Ratios {
            bytes_per_gib_at_rest: BTreeMap::new(),
            at_rest_over_entries: BTreeMap::new(),
            bytes_per_gib_at_worst: BTreeMap::new(),
            worst_over_rest: BTreeMap::new(),
        };
        for row in &results {
            let guest = format!("{} {}", row.name, row.format);
            let zapped = format!("{guest} {}", row.zap);
            let (rest, worst) = (row.rest.total() as f64, row.worst.total() as f64);
            // The first way's pool is as large as it has to be.
            ratios
                .bytes_per_gib_at_rest
                .entry(guest.clone())
                .or_insert_with(|| row.per_gib(&row.rest));
            ratios
                .at_rest_over_entries
                .entry(guest)
                .or_insert(rest / (8 * row.pages) as f64);
            ratios
                .bytes_per_gib_at_worst
                .insert(zapped.clone(), row.per_gib(&row.worst));
            ratios.worst_over_rest.insert(zapped, worst / rest);
        }
        Self {
            parameters: Parameters {
                bytes: args.bytes,
                sparse_bytes: args.sparse,
                sparse_pages: args.pages,
            },
            ratios,
            checks: Checks {
                leaked_frames: results
                    .iter()
                    .fold(0, |sum, row| sum.saturating_add(row.leaked_frames)),
                waiting: results.iter().map(|row| row.waiting).sum(),
            },
            results,
        }
    }

    pub(super) fn tell(&self, output: &Output) {
        output.say(
            "Bytes for each GiB of guest memory, everything that is taken: at rest, and at the worst moment of a full zap",
        );
        let kib = |bytes: u64| format!("{:.0}K", bytes as f64 / 1024.0);
        let heap = |taken: &Taken| taken.heap_bytes.map_or_else(|| "?".to_owned(), kib);
        output.table(
            &[
                "",
                "",
                "zapped",
                "tables",
                "frames",
                "heap",
                "a GiB",
                "worst: frames",
                "garbage",
                "heap",
                "a GiB",
                "x rest",
            ],
            self.results.iter().map(|row| {
                [
                    format!("{}, {}", row.name, show(row.guest_bytes)),
                    row.format.to_owned(),
                    row.zap.replace('_', " "),
                    row.tables.to_string(),
                    kib(row.rest.frame_bytes),
                    heap(&row.rest),
                    format!("{:.0}", row.per_gib(&row.rest)),
                    kib(row.worst.frame_bytes),
                    kib(row.worst.garbage_bytes),
                    heap(&row.worst),
                    format!("{:.0}", row.per_gib(&row.worst)),
                    format!("{:.3}", row.worst.total() as f64 / row.rest.total() as f64),
                ]
            }),
        );
        for (guest, ratio) in &self.ratios.at_rest_over_entries {
            output.say(format_args!(
                "{guest}: {ratio:.4} times 8 bytes for each page that is mapped"
            ));
        }
        output.say(format_args!(
            "{} table frames leaked, {} still waited at the end",
            self.checks.leaked_frames, self.checks.waiting
        ));
    }

    /// # Errors
    ///
    /// [`Error::Check`] if anything did not come back.
    pub(super) fn verdict(&self) -> Result<(), Error> {
        match (self.checks.leaked_frames, self.checks.waiting) {
            (0, 0) => Ok(()),
            (leaked, waiting) => Err(Error::Check(format!(
                "{leaked} table frames leaked, {waiting} still waited at the end"
            ))),
        }
    }
}
