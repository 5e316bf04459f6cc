//! What the rounds say: calls and time for each page.

use super::Args;
use super::rounds::{Removal, Results};
use crate::confidential::args::ModuleParameters;
use crate::confidential::guest::Checks;
use crate::race::{median, minimum};
use crate::report::Output;
use serde::Serialize;
use std::collections::BTreeMap;
use tdp::protected::HandOffStep;
use tdp_arch::{ENTRIES_PER_TABLE, PAGE_SIZE};

#[derive(Serialize)]
pub(super) struct Body<'a> {
    parameters: Parameters,
    results: BTreeMap<&'static str, Row>,
    ratios: Ratios,
    checks: Verified<'a>,
}

#[derive(Serialize)]
struct Parameters {
    vcpus: u16,
    bytes: u64,
    page_bytes: u64,
    threads: u16,
    chunk_bytes: u64,
    rounds: u16,
    #[serde(flatten)]
    module: ModuleParameters,
}

/// One way, over all rounds.
#[derive(Serialize)]
struct Row {
    pages: u64,
    tables: u64,
    ns_per_page: Figures,
    wall_ns: Vec<u64>,
    /// By kind, of the last round: made, and answered "again".
    calls: BTreeMap<&'static str, (u64, u64)>,
    calls_per_page: f64,
    tracks_per_512_pages: f64,
    busy_per_block: f64,
    /// Removals that another thread carried, in the last round.
    carried: u64,
    /// Accesses that vCPUs made meanwhile, in the last round.
    guest_accesses: u64,
}

#[derive(Serialize)]
struct Figures {
    median: f64,
    min: f64,
}

#[derive(Serialize)]
struct Ratios {
    /// Of the way that the library takes.
    calls_per_page: f64,
    tracks_per_512_pages: f64,
    busy_per_block: f64,
    released_calls_per_page: f64,
    /// Page by page over whole, in time.
    released_speedup: f64,
    /// The same without a combiner.
    uncombined_busy_per_block: f64,
    uncombined_tracks_per_512_pages: f64,
    /// Time without a combiner over that with one.
    uncombined_time: f64,
}

#[derive(Serialize)]
struct Verified<'a> {
    #[serde(flatten)]
    checks: &'a Checks,
    tables_not_reused: u64,
}

impl Row {
    fn new(args: &Args, removals: &[Removal]) -> Self {
        let page = args.backing.level().pages();
        let over =
            |f: &dyn Fn(&Removal) -> f64| median(&removals.iter().map(f).collect::<Vec<_>>());
        let pages = |removal: &Removal| (removal.frames / page).max(1) as f64;
        let ns: Vec<f64> = removals
            .iter()
            .map(|removal| removal.wall_ns as f64 / pages(removal))
            .collect();
        let last = removals.last();
        Self {
            pages: last.map_or(0, |removal| removal.frames / page),
            tables: last.map_or(0, |removal| removal.tables),
            ns_per_page: Figures {
                median: median(&ns),
                min: minimum(&ns),
            },
            wall_ns: removals.iter().map(|removal| removal.wall_ns).collect(),
            calls: last.map_or_else(BTreeMap::new, |removal| removal.calls.named()),
            calls_per_page: over(&|removal| removal.calls.all() as f64 / pages(removal)),
            tracks_per_512_pages: over(&|removal| {
                let tracks = removal.calls.of(HandOffStep::Flush) as f64;
                tracks * ENTRIES_PER_TABLE as f64 / pages(removal)
            }),
            busy_per_block: over(&|removal| {
                let (made, busy) = (
                    removal.calls.of(HandOffStep::Block),
                    removal.calls.busy_of(HandOffStep::Block),
                );
                busy as f64 / (made - busy).max(1) as f64
            }),
            carried: last.map_or(0, |removal| removal.carried),
            guest_accesses: last.map_or(0, |removal| removal.accesses),
        }
    }
}

fn rows(args: &Args, results: &Results) -> [(&'static str, Row); 3] {
    [
        ("combined", Row::new(args, &results.combined)),
        ("uncombined", Row::new(args, &results.uncombined)),
        ("released", Row::new(args, &results.released)),
    ]
}

impl<'a> Body<'a> {
    pub(super) fn new(args: &Args, chunk: u64, results: &'a Results) -> Self {
        let [(_, combined), (_, uncombined), (_, released)] = &rows(args, results);
        let ratios = Ratios {
            calls_per_page: combined.calls_per_page,
            tracks_per_512_pages: combined.tracks_per_512_pages,
            busy_per_block: combined.busy_per_block,
            released_calls_per_page: released.calls_per_page,
            released_speedup: combined.ns_per_page.median / released.ns_per_page.median,
            uncombined_busy_per_block: uncombined.busy_per_block,
            uncombined_tracks_per_512_pages: uncombined.tracks_per_512_pages,
            uncombined_time: uncombined.ns_per_page.median / combined.ns_per_page.median,
        };
        Self {
            parameters: Parameters {
                vcpus: args.vcpus,
                bytes: args.bytes,
                page_bytes: args.backing.level().bytes(),
                threads: args.threads,
                chunk_bytes: chunk * PAGE_SIZE,
                rounds: args.rounds,
                module: args.module.parameters(),
            },
            results: rows(args, results).into_iter().collect(),
            ratios,
            checks: Verified {
                checks: &results.checks,
                tables_not_reused: results.not_reused,
            },
        }
    }
}

/// Prints the readable part.
pub(super) fn tell(output: &Output, args: &Args, results: &Results) {
    output.say(format_args!(
        "{} MiB of private memory in pages of {}; {} threads remove it while {} vCPUs run; medians of rounds",
        args.bytes >> 20,
        crate::size::show(args.backing.level().bytes()),
        args.threads,
        args.vcpus,
    ));
    output.table(
        &[
            "",
            "ns a page",
            "calls a page",
            "tracks a 512 pages",
            "busy a block",
            "tables",
            "carried",
        ],
        rows(args, results).map(|(name, row)| {
            vec![
                name.to_owned(),
                format!("{:.1}", row.ns_per_page.median),
                format!("{:.4}", row.calls_per_page),
                format!("{:.3}", row.tracks_per_512_pages),
                format!("{:.3}", row.busy_per_block),
                row.tables.to_string(),
                row.carried.to_string(),
            ]
        }),
    );
    let calls = |(name, row): (&str, Row)| {
        let calls: Vec<_> = row
            .calls
            .iter()
            .map(|(step, (made, busy))| format!("{made} {step} ({busy} busy)"))
            .collect();
        format!("Calls, {name}: {}", calls.join(", "))
    };
    for row in rows(args, results) {
        output.say(calls(row));
    }
    output.say(format_args!(
        "Filled again: {} tables made anew instead of used again",
        results.not_reused
    ));
    results.checks.tell(output);
}
