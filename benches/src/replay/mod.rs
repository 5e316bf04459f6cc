//! `replay`: recorded page faults of real KVM guests, fed to software vCPUs and to the library.
//!
//! What a recording is: `NAME.trace.jsonl` holds, in the order of the kernel's global trace counter, the events of
//! KVM's two-dimensional MMU while a guest ran (faults, the host's answers, every changed entry, what the host took
//! back), and `NAME.scenario.json` what user space asked for meanwhile (memory slots and the like). The way of a line:
//!
//! ```text
//! source   the file, plain or compressed, as lines
//! trace    a line as an event, checked                       scenario   the operations that it refers to
//! story    events as steps: what to do, when                 expect     the tables as they must have stood
//! driver   steps executed on the library, each one checked   ledger     changes of entries, theirs against ours
//! rules    differences that are meant                        findings   what differs, counted
//! ```
//!
//! The library is given the host's recorded answers and must then do by itself what KVM did: which frames are mapped,
//! at which level, to which host frame, after every fault and every operation; and the history of each entry within each
//! operation: every change that KVM made must be one that the library made, and the other way round. Where the library
//! does otherwise on purpose there is a rule, with its reason; whatever else differs is unexplained.

use crate::formats::FormatChoice;
use crate::report::{Error, Output};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tdp::{Ept, Npt};

pub mod driver;
pub mod entry;
pub mod expect;
pub mod findings;
pub mod host;
pub mod ledger;
mod pending;
pub mod processor;
pub mod rules;
pub mod scenario;
pub mod source;
pub mod spte;
mod stamps;
pub mod step;
pub mod story;
pub mod trace;

use driver::Driver;
use findings::{Findings, Summary};
use processor::Processor;
use story::Story;
use trace::{Event, Line};

/// Differences that are printed.
const PRINTED: usize = 20;

/// Feed recorded page faults of real KVM guests to software vCPUs and compare what gets mapped
///
/// Each guest access of a recording is made on a software vCPU, its fault is resolved by the library with the host's
/// recorded answer, and the access is made again; calls of user space and of the host are made where they began. After
/// each, the library must map what KVM mapped, and must have changed the same entries in the same way. Where it differs on
/// purpose there is a rule; whatever else differs is listed and fails the run.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Columns: 'transitions' are changes of single entries; 'matched' ones the library made as well, in the same operation; those
'by rule' differ on purpose, for the reasons that are printed; 'unexplained' counts everything else that differs.

Examples:
  tdp-bench replay benches/testdata                       everything below a folder
  tdp-bench replay boot_4k.trace.jsonl.zst -f both        a Linux boot on both formats
  tdp-bench replay traces --limit-faults 10000 --json -   the first faults of each trace")]
pub struct Args {
    /// Traces (NAME.trace.jsonl or NAME.trace.jsonl.zst, with NAME.scenario.json beside it) or folders of them
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Stop each trace after its first N faults
    #[arg(long, value_name = "N")]
    limit_faults: Option<NonZeroU64>,
    /// Entry format of the library's tables; recordings are of NPT
    #[arg(short, long, value_enum, default_value = "npt")]
    format: FormatChoice,
}

/// Runs the scenario.
///
/// # Errors
///
/// If a file cannot be read or is not a trace, or if anything differs from the record.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    let traces = source::find(&args.paths)?;
    let limit = args.limit_faults.map(NonZeroU64::get);
    let progress = output.progress(traces.len() as u64);
    let mut summary = Summary::default();
    for path in &traces {
        progress.step(path.display().to_string());
        if args.format.includes::<Npt>() {
            summary.add(replay::<Npt>(path, limit)?);
        }
        if args.format.includes::<Ept>() {
            summary.add(replay::<Ept>(path, limit)?);
        }
    }
    drop(progress);
    show(output, &summary);
    output.finish("replay", &summary)?;
    verdict(&summary)
}

/// Faults of a boot that the demonstration replays.
const DEMO_FAULTS: NonZeroU64 = NonZeroU64::new(10_000).unwrap();

/// Replays the Linux boots that come with the sources, if these are still where the program was built.
///
/// # Errors
///
/// As [`run`].
pub fn demo(output: &Output) -> Result<(), Error> {
    let boots = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/kvm-boot"));
    if !boots.is_dir() {
        output.say("Replay of a Linux boot: skipped, the recordings that come with the sources are not here");
        return Ok(());
    }
    output.say("\nThe page faults of Linux guests that boot under KVM, replayed:");
    let args = Args {
        paths: vec![boots.to_owned()],
        limit_faults: Some(DEMO_FAULTS),
        format: FormatChoice::Npt,
    };
    run(&args, output)
}

/// Replays one trace on one format, up to `limit` faults.
///
/// # Errors
///
/// If the trace or its scenario cannot be read or makes no sense, or the library runs out of table frames. The text
/// names the file and the line.
pub fn replay<F: Processor>(path: &Path, limit: Option<u64>) -> Result<Findings, Error> {
    let scenario = source::scenario(path)?;
    replay_lines::<F>(path, scenario, source::Lines::open(path)?, limit)
}

/// Replays the `lines` of a trace, which belong to `scenario`, up to `limit` faults. `path` is for messages.
///
/// # Errors
///
/// As [`replay`].
pub fn replay_lines<F: Processor>(
    path: &Path,
    scenario: scenario::Scenario,
    mut lines: source::Lines,
    limit: Option<u64>,
) -> Result<Findings, Error> {
    let findings = Findings {
        name: scenario.name.clone(),
        path: path.display().to_string(),
        format: F::NAME.to_owned(),
        ..Findings::default()
    };
    let mut driver = Driver::<F>::new(&scenario, findings);
    let mut story = Story::new(scenario);
    let start = Instant::now();
    let (mut events, mut faults, mut cut) = (0, 0, false);
    loop {
        let number = lines.number() + 1;
        let at = |error: driver::Stop| Error::run(format!("{}:{number}", path.display()), error);
        let Some(text) = lines.next_line().map_err(|e| at(e.into()))? else {
            break;
        };
        let line = Line::parse(text).map_err(|e| at(e.into()))?;
        faults += u64::from(matches!(line.event, Event::PageFault { .. }));
        cut = limit.is_some_and(|limit| faults > limit);
        if cut {
            break;
        }
        events += 1;
        story.feed(&line).map_err(|e| at(e.into()))?;
        for step in story.take_steps() {
            driver.execute(&step, story.expected()).map_err(at)?;
        }
    }
    let at = |error| Error::run(format!("{}: at its end", path.display()), error);
    if events == 0 {
        return Err(at("the trace is empty".into()));
    }
    if !cut {
        story.check_whole().map_err(|e| at(e.into()))?;
    }
    story.finish(cut);
    for step in story.take_steps() {
        driver.execute(&step, story.expected()).map_err(at)?;
    }
    let mut findings = driver.finish();
    findings.events = events;
    findings.nanoseconds = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    Ok(findings)
}

fn show(output: &Output, summary: &Summary) {
    let header = [
        "scenario",
        "transitions",
        "matched",
        "by rule",
        "unexplained",
        "faults",
        "operations",
        "leaked",
        "ms",
    ];
    let rows = summary.scenarios.iter().map(|found| {
        let name = found.label();
        let changes = &found.transitions;
        let figures = [
            changes.total,
            changes.matched,
            changes.by_rule.values().sum(),
            found.unexplained,
            found.faults,
            found.operations.total,
            found.leaked_frames,
            found.nanoseconds / 1_000_000,
        ];
        std::iter::once(name).chain(figures.map(|figure| figure.to_string()))
    });
    output.table(&header, rows);
    let Summary {
        transitions,
        matched,
        by_rule,
        unexplained,
        ..
    } = summary;
    output.say(format_args!(
        "{transitions} transitions: {matched} matched, {} by rule; {unexplained} unexplained",
        by_rule.values().sum::<u64>()
    ));
    for (rule, count) in by_rule {
        output.say(format_args!("rule {rule:?} ({count}): {}", rule.reason()));
    }
    let differences = summary
        .scenarios
        .iter()
        .flat_map(|found| found.differences.iter().map(move |d| (found, d)));
    for (found, difference) in differences.take(PRINTED) {
        output.say(format_args!("{}: {difference}", found.label()));
    }
}

fn verdict(summary: &Summary) -> Result<(), Error> {
    if summary.unexplained > 0 {
        return Err(Error::Check(format!(
            "{} unexplained differences from the record",
            summary.unexplained
        )));
    }
    if summary.leaked_frames > 0 {
        return Err(Error::Check(format!(
            "{} table frames leaked",
            summary.leaked_frames
        )));
    }
    Ok(())
}
