//! What the laps say: ratios, the readable tables, the JSON body.

use super::lanes::{FormatResult, LaneResult, OURS, Work};
use super::plan::Plan;
use super::{Args, Overlap};
use crate::race::{Footprint, Laps, median, minimum, paired_ratio};
use crate::report::{Error, Output};
use clap::ValueEnum;
use serde::Serialize;
use std::collections::BTreeMap;
use tdp_arch::{ENTRIES_PER_TABLE, PAGE_SIZE};

/// The JSON body.
#[derive(Serialize)]
pub(super) struct Body<'a> {
    parameters: Parameters<'a>,
    /// The library's lanes.
    results: Vec<Row<'a>>,
    /// The others' lanes.
    baselines: Vec<Row<'a>>,
    ratios: Ratios,
    /// By format and by contender: throughput of all vCPUs over that of one.
    scaling: BTreeMap<&'a str, BTreeMap<String, f64>>,
    memory: BTreeMap<&'a str, Memory>,
    pub(super) checks: Checks,
}

#[derive(Serialize)]
struct Parameters<'a> {
    vcpus: u16,
    bytes_per_vcpu: u64,
    page_bytes: u64,
    overlap: Option<String>,
    random: bool,
    seed: u64,
    formats: Vec<&'a str>,
    cpus: &'a [usize],
    rounds: u16,
    levels: u8,
    pool_frames: usize,
    huge_pool: bool,
}

/// One lane on one course.
#[derive(Serialize)]
struct Row<'a> {
    name: &'a str,
    format: &'a str,
    operation: Work,
    tables: &'a str,
    ns_per_operation: Figures,
    operations_per_second: f64,
    #[serde(flatten)]
    laps: &'a Laps,
}

#[derive(Serialize)]
struct Figures {
    median: f64,
    min: f64,
}

/// Theirs over ours, by contender.
type ByName = BTreeMap<String, f64>;

/// Theirs over ours for the same work on warm tables: above 1 the library is faster. At the top, the smaller of the
/// formats' figures: the floor's by one vCPU (what a fault costs), the others' by all vCPUs (what a lock costs).
#[derive(Serialize)]
struct Ratios {
    #[serde(flatten)]
    headline: ByName,
    /// Medians of the rounds' ratios, by format, then by number of vCPUs.
    by_format: BTreeMap<String, BTreeMap<usize, ByName>>,
    /// The same of each contender's fastest lap.
    of_minima: BTreeMap<String, BTreeMap<usize, ByName>>,
}

#[derive(Serialize)]
struct Memory {
    #[serde(flatten)]
    footprint: Footprint,
    /// 8 bytes for each page mapped, rounded up to whole tables.
    entry_bytes: u64,
    /// Tables and metadata over that.
    ratio: f64,
}

/// Counts of what was verified.
#[derive(Serialize)]
pub(super) struct Checks {
    /// Pages of the library translated by the reference walker, over all laps.
    translated: u64,
    /// Those that were not as they should be, unmapped pages that were mapped, and leaves that the library's
    /// statistics count wrong.
    mismatched: u64,
    /// Table frames that did not come back.
    leaked_frames: u64,
    /// Pages that a baseline mapped wrong.
    baselines_mismatched: u64,
}

impl Checks {
    /// # Errors
    ///
    /// [`Error::Check`] if anything is not as it should be.
    pub(super) fn verdict(&self) -> Result<(), Error> {
        let mut wrong = Vec::new();
        if self.mismatched != 0 {
            wrong.push(format!(
                "{} of {} translations are wrong",
                self.mismatched, self.translated
            ));
        }
        if self.leaked_frames != 0 {
            wrong.push(format!("{} table frames leaked", self.leaked_frames));
        }
        if self.baselines_mismatched != 0 {
            wrong.push(format!(
                "{} translations of baselines are wrong",
                self.baselines_mismatched
            ));
        }
        if wrong.is_empty() {
            Ok(())
        } else {
            Err(Error::Check(wrong.join(", ")))
        }
    }
}

/// The library's lane for `work`, tables warm.
fn ours(result: &FormatResult, work: Work) -> Option<&LaneResult> {
    result.lanes.iter().find(|lane| {
        lane.label.name == OURS && lane.label.work == work && lane.label.tables == "warm"
    })
}

/// The contenders' lanes, each with the name of its ratio and the library's lane that does the same work. The floor is
/// compared with both.
fn pairs(result: &FormatResult) -> Vec<(String, &LaneResult, &LaneResult)> {
    let theirs = result.lanes.iter().filter(|lane| lane.label.name != OURS);
    theirs
        .flat_map(|lane| match lane.label.name {
            "floor" => vec![
                ("floor".to_owned(), lane, Work::Fault),
                ("floor_map".to_owned(), lane, Work::Map),
            ],
            name => vec![(name.to_owned(), lane, lane.label.work)],
        })
        .filter_map(|(name, lane, work)| ours(result, work).map(|ours| (name, lane, ours)))
        .collect()
}

impl Ratios {
    fn new(results: &[FormatResult]) -> Self {
        let mut ratios = Self {
            headline: ByName::new(),
            by_format: BTreeMap::new(),
            of_minima: BTreeMap::new(),
        };
        for result in results {
            let format = result.format.to_owned();
            for (name, theirs, ours) in pairs(result) {
                for (theirs, ours) in theirs.laps.iter().zip(&ours.laps) {
                    let (vcpus, theirs, ours) =
                        (ours.vcpus, theirs.per_operation(), ours.per_operation());
                    let ratio = paired_ratio(&theirs, &ours);
                    let of_minima = minimum(&theirs) / minimum(&ours);
                    let put = |into: &mut BTreeMap<String, BTreeMap<usize, ByName>>, ratio| {
                        into.entry(format.clone())
                            .or_default()
                            .entry(vcpus)
                            .or_default()
                            .insert(name.clone(), ratio);
                    };
                    put(&mut ratios.by_format, ratio);
                    put(&mut ratios.of_minima, of_minima);
                }
            }
        }
        for courses in ratios.by_format.values() {
            for (name, ratio) in headline(courses) {
                ratios
                    .headline
                    .entry(name)
                    .and_modify(|least| *least = least.min(ratio))
                    .or_insert(ratio);
            }
        }
        ratios
    }
}

/// One format's part of the headline.
fn headline(courses: &BTreeMap<usize, ByName>) -> ByName {
    let (Some((_, one)), Some((_, all))) = (courses.first_key_value(), courses.last_key_value())
    else {
        return ByName::new();
    };
    all.iter()
        .map(|(name, ratio)| {
            (
                name.clone(),
                if name.starts_with("floor") {
                    one[name]
                } else {
                    *ratio
                },
            )
        })
        .collect()
}

/// Throughput of all vCPUs over that of one, both by the wall clock.
fn scaling(lane: &LaneResult) -> Option<f64> {
    match lane.laps.as_slice() {
        [one, .., all] => Some(paired_ratio(
            &one.wall_per_operation(),
            &all.wall_per_operation(),
        )),
        _ => None,
    }
}

impl<'a> Body<'a> {
    pub(super) fn new(args: &'a Args, plan: &'a Plan, results: &'a [FormatResult]) -> Self {
        let rows = |ours: bool| {
            results
                .iter()
                .flat_map(|result| result.lanes.iter().map(move |lane| (result.format, lane)))
                .filter(|(_, lane)| (lane.label.name == OURS) == ours)
                .flat_map(|(format, lane)| {
                    lane.laps.iter().map(move |laps| row(format, lane, laps))
                })
                .collect()
        };
        let scaling = results
            .iter()
            .map(|result| {
                let lanes = result.lanes.iter();
                (
                    result.format,
                    lanes
                        .filter_map(|lane| Some((title(lane), scaling(lane)?)))
                        .collect(),
                )
            })
            .collect();
        Self {
            parameters: Parameters {
                vcpus: args.vcpus,
                bytes_per_vcpu: args.bytes,
                page_bytes: plan.backing.level.bytes(),
                overlap: args
                    .overlap
                    .and_then(|o: Overlap| o.to_possible_value())
                    .map(|v| v.get_name().to_owned()),
                random: args.random,
                seed: args.seed,
                formats: results.iter().map(|result| result.format).collect(),
                cpus: plan
                    .courses
                    .last()
                    .map_or(&[], |circuit| &circuit.course.cpus),
                rounds: args.rounds,
                levels: args.levels,
                pool_frames: plan.frames,
                huge_pool: args.huge_pool,
            },
            results: rows(true),
            baselines: rows(false),
            ratios: Ratios::new(results),
            scaling,
            memory: results
                .iter()
                .filter_map(|result| Some((result.format, memory(plan, result)?)))
                .collect(),
            checks: Checks {
                translated: results.iter().map(|result| result.checked.translated).sum(),
                mismatched: results.iter().map(|result| result.checked.mismatched).sum(),
                leaked_frames: results
                    .iter()
                    .fold(0, |sum, result| sum.saturating_add(result.leaked)),
                baselines_mismatched: results
                    .iter()
                    .map(|result| result.baselines_mismatched)
                    .sum(),
            },
        }
    }
}

fn row<'a>(format: &'a str, lane: &'a LaneResult, laps: &'a Laps) -> Row<'a> {
    let ns = laps.per_operation();
    Row {
        name: lane.label.name,
        format,
        operation: lane.label.work,
        tables: lane.label.tables,
        ns_per_operation: Figures {
            median: median(&ns),
            min: minimum(&ns),
        },
        operations_per_second: 1e9 / median(&ns),
        laps,
    }
}

fn memory(plan: &Plan, result: &FormatResult) -> Option<Memory> {
    let footprint = result.footprint?;
    let entries = plan.backing.gfns.pages() / plan.backing.level.pages();
    let entry_bytes = entries.div_ceil(ENTRIES_PER_TABLE as u64) * PAGE_SIZE;
    let ratio = (footprint.table_bytes + footprint.metadata_bytes) as f64 / entry_bytes as f64;
    Some(Memory {
        footprint,
        entry_bytes,
        ratio,
    })
}

/// A lane's name where several of the library's stand side by side.
fn title(lane: &LaneResult) -> String {
    match (lane.label.name, lane.label.work, lane.label.tables) {
        (OURS, Work::Fault, tables) => format!("{OURS} fault, {tables}"),
        (OURS, Work::Map, tables) => format!("{OURS} map, {tables}"),
        (name, ..) => name.to_owned(),
    }
}

/// Prints the readable part.
pub(super) fn tell(output: &Output, plan: &Plan, results: &[FormatResult]) {
    let vcpus = plan
        .courses
        .last()
        .map_or(1, |circuit| circuit.course.orders.len());
    for result in results {
        output.say(format_args!(
            "\n{}: {} MiB in pages of {}, {vcpus} vCPUs; nanoseconds a page, median of rounds (fastest)",
            result.format,
            (plan.backing.gfns.pages() * PAGE_SIZE) >> 20,
            crate::size::show(plan.backing.level.bytes()),
        ));
        table(output, result, vcpus);
        selftest_lines(output, result);
        if let Some(memory) = memory(plan, result) {
            output.say(format_args!(
                "Tables and metadata: {} KiB, {:.3} times the bare entries",
                (memory.footprint.table_bytes + memory.footprint.metadata_bytes) >> 10,
                memory.ratio
            ));
        }
    }
    let sum = |f: fn(&FormatResult) -> u64| results.iter().map(f).fold(0, u64::saturating_add);
    output.say(format_args!(
        "\nChecked by the reference walker: {} translations, {} wrong; {} table frames leaked",
        sum(|result| result.checked.translated),
        sum(|result| result.checked.mismatched),
        sum(|result| result.leaked),
    ));
}

fn table(output: &Output, result: &FormatResult, vcpus: usize) {
    let all = format!("{vcpus} vCPUs");
    let pairs = pairs(result);
    let mut header = vec!["", "does", "1 vCPU", "x tdp"];
    if vcpus > 1 {
        header.extend([all.as_str(), "M pages/s", "x tdp", "scaling"]);
    }
    let rows = result.lanes.iter().map(|lane| {
        let ratio = |course: usize| {
            // The floor's own line compares it with the library's map, which does as much of the work.
            let pair = pairs
                .iter()
                .rfind(|(_, theirs, _)| std::ptr::eq(*theirs, lane));
            pair.map_or_else(String::new, |(_, theirs, ours)| {
                let (theirs, ours) = (
                    theirs.laps[course].per_operation(),
                    ours.laps[course].per_operation(),
                );
                format!("{:.2}", paired_ratio(&theirs, &ours))
            })
        };
        let mut cells = vec![
            title(lane),
            if lane.label.work == Work::Fault {
                "fault"
            } else {
                "map"
            }
            .to_owned(),
            figures(&lane.laps[0]),
            ratio(0),
        ];
        if vcpus > 1 {
            let laps = &lane.laps[1];
            cells.extend([
                figures(laps),
                format!("{:.1}", 1e3 / median(&laps.per_operation())),
                ratio(1),
                scaling(lane).map_or_else(String::new, |scaling| format!("{scaling:.2}")),
            ]);
        }
        cells
    });
    output.table(&header, rows);
}

fn figures(laps: &Laps) -> String {
    let ns = laps.per_operation();
    format!("{:.1} ({:.1})", median(&ns), minimum(&ns))
}

/// The lines that KVM's demand_paging_test prints, for what is nearest to it: the whole fault, no tables at the start,
/// all vCPUs.
fn selftest_lines(output: &Output, result: &FormatResult) {
    let lane = result.lanes.iter().find(|lane| {
        lane.label.name == OURS && lane.label.work == Work::Fault && lane.label.tables == "fresh"
    });
    let Some(laps) = lane.and_then(|lane| lane.laps.last()) else {
        return;
    };
    let seconds = median(
        &laps
            .wall_ns
            .iter()
            .map(|ns| *ns as f64 / 1e9)
            .collect::<Vec<_>>(),
    );
    let overall = laps.operations as f64 / seconds;
    output.say(format_args!("Total guest execution time:\t{seconds:.9}s"));
    output.say(format_args!(
        "Per-vcpu demand paging rate:\t{:.6} pgs/sec/vcpu",
        overall / laps.vcpus as f64
    ));
    output.say(format_args!(
        "Overall demand paging rate:\t{overall:.6} pgs/sec"
    ));
}

#[cfg(test)]
mod tests;
