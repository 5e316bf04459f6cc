//! NX huge pages: no large page is executable while the policy is on, and what that splits is recovered from time to time.
//!
//! It is one more kind of [`interference`](crate::interference), with its threads and laps: a vCPU fetches from every page of
//! memory that the host has in large pages, so that each fault maps 4 KiB; another thread recovers meanwhile. What does the
//! vCPU's longest fault become?

use crate::baseline::Setup;
use crate::baseline::mutex::OneMutex;
use crate::baseline::rwlock::ReaderWriter;
use crate::baseline::table_lock::TableLock;
use crate::formats::FormatChoice;
use crate::interference::course::{self, Mix, Row};
use crate::ours::{BenchHost, Operation, OurSetup, Ours, Tables, Walked};
use crate::race::median;
use crate::report::{Error, Output, Progress};
use crate::size;
use crate::sweeps::{memory, our_setup};
use crate::{sys, time};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;
use tdp::{AdBits, Fault, FaultError, Outcome, Vcpu};
use tdp_arch::{Access, Ept, Format, Gfn, Level, Npt};

const ABOUT: &str = "\
Measures the longest fault of a vCPU that fetches from all of its memory, alone and while another thread recovers large pages.
Flags and the line follow KVM's nx_huge_pages_perf_test: every -p, one in -r of the tables that stand for a fetch only is taken
away. A baseline knows no such tables and zaps as much of the memory, under its lock.";

const EXAMPLES: &str = "\
Examples:
  tdp-bench nx-huge-pages-perf
  tdp-bench nx-huge-pages-perf -b 4G -p 1ms -r 1 --json -";

/// The longest fault of a vCPU that fetches, while large pages are recovered
#[derive(Debug, clap::Args)]
#[command(long_about = ABOUT, after_help = EXAMPLES)]
pub struct Args {
    /// The vCPU's memory: bytes, or with K, M, G or T
    #[arg(short = 'b', long, value_name = "SIZE", default_value = "1G", value_parser = size::parse)]
    bytes: u64,

    /// Pause between two steps of recovery
    #[arg(short = 'p', long, value_name = "TIME", default_value = "1ms", value_parser = time::parse)]
    period: Duration,

    /// A step recovers one in so many
    #[arg(short = 'r', long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    ratio: u16,

    /// Entry format
    #[arg(short = 'f', long, value_enum, default_value_t = FormatChoice::Ept)]
    format: FormatChoice,

    /// Rounds; in each, every contender runs a lap of every kind
    #[arg(short = 'i', long, default_value_t = 9, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
}

/// A whole fault of a fetch.
#[derive(Debug)]
struct Fetch;

impl Operation for Fetch {
    #[inline(always)]
    fn perform<F: Format>(
        vcpu: &mut Vcpu<F, BenchHost>,
        gfn: Gfn,
        _setup: &OurSetup,
    ) -> Result<Outcome, FaultError> {
        vcpu.fault(Fault::new(gfn.address(), Access::Execute))
    }
}

#[derive(Serialize)]
struct Body<'a> {
    parameters: Parameters,
    results: &'a [Row],
    ratios: Ratios,
    checks: Checks,
}

#[derive(Serialize)]
struct Parameters {
    bytes: u64,
    period_ns: u64,
    ratio: u16,
    rounds: u16,
}

/// By contender, the worse of the formats' figures.
#[derive(Default, Serialize)]
struct Ratios {
    rate_kept: BTreeMap<&'static str, f64>,
    worst_fault: BTreeMap<&'static str, f64>,
    /// Median of the longest fault of a lap while pages are recovered: a baseline's over the library's.
    longest_fault: BTreeMap<&'static str, f64>,
}

#[derive(Serialize)]
struct Checks {
    /// Steps of the library's recovery.
    steps: u64,
    leaked_frames: u64,
}

/// Runs the scenario.
///
/// # Errors
///
/// [`Error::Usage`] for memory that there is not, the library's own errors if a run fails, and [`Error::Check`] if a frame
/// was lost or nothing was recovered.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    let formats =
        u64::from(args.format.includes::<Ept>()) + u64::from(args.format.includes::<Npt>());
    let progress = output.progress(formats * 4);
    let mut rows = Vec::new();
    if args.format.includes::<Ept>() {
        rows.extend(measure::<Ept>(args, &progress)?);
    }
    if args.format.includes::<Npt>() {
        rows.extend(measure::<Npt>(args, &progress)?);
    }
    drop(progress);
    let mut ratios = Ratios::default();
    for row in &rows {
        let least = ratios.rate_kept.entry(row.name).or_insert(f64::INFINITY);
        *least = least.min(row.rate_kept());
        let most = ratios.worst_fault.entry(row.name).or_default();
        *most = most.max(row.worst());
        let ours = rows
            .iter()
            .find(|ours| ours.name == "tdp" && ours.format == row.format);
        if let Some(ours) = ours.filter(|_| row.name != "tdp") {
            let over = longest(row) / longest(ours);
            let least = ratios
                .longest_fault
                .entry(row.name)
                .or_insert(f64::INFINITY);
            *least = least.min(over);
        }
    }
    let ours = rows.iter().filter(|row| row.name == "tdp");
    let checks = Checks {
        steps: ours.map(|row| row.passes).sum(),
        leaked_frames: rows
            .iter()
            .fold(0, |sum, row| sum.saturating_add(row.leaked)),
    };
    for row in rows.iter().filter(|row| row.name == "tdp") {
        output.say(format_args!("Max fault latency: {:.0} ns", longest(row)));
    }
    output.say(format_args!(
        "A vCPU fetches from {} by pages of 4K, alone and while large pages are recovered; medians of {} rounds",
        size::show(args.bytes),
        args.rounds
    ));
    output.table(
        &[
            "",
            "",
            "ns a fault",
            "meanwhile",
            "rate kept",
            "worst fault",
            "longest, ns",
            "steps",
        ],
        rows.iter().map(|row| {
            [
                row.name.to_owned(),
                row.format.to_owned(),
                format!("{:.1}", median(&row.idle_ns)),
                format!("{:.1}", median(&row.swept_ns)),
                format!("{:.2}", row.rate_kept()),
                format!("{:.2}", row.worst()),
                format!("{:.0}", longest(row)),
                row.passes.to_string(),
            ]
        }),
    );
    let (steps, leaked) = (checks.steps, checks.leaked_frames);
    let body = Body {
        parameters: Parameters {
            bytes: args.bytes,
            period_ns: u64::try_from(args.period.as_nanos()).unwrap_or(u64::MAX),
            ratio: args.ratio,
            rounds: args.rounds,
        },
        results: &rows,
        ratios,
        checks,
    };
    output.finish("nx-huge-pages-perf", &body)?;
    if leaked != 0 || steps == 0 {
        return Err(Error::Check(format!(
            "{steps} steps of recovery, {leaked} table frames leaked"
        )));
    }
    Ok(())
}

/// Median of the longest faults while pages are recovered.
fn longest(row: &Row) -> f64 {
    let ns: Vec<f64> = row.swept_max_ns.iter().map(|ns| *ns as f64).collect();
    median(&ns)
}

fn measure<F: Walked>(args: &Args, progress: &Progress) -> Result<Vec<Row>, Error> {
    let backing = memory(args.bytes)?;
    let theirs = Setup {
        backing,
        huge: false,
    };
    let mut cpus = sys::allowed();
    cpus.truncate(2);
    if cpus.len() < 2 {
        cpus.clear();
    }
    let (gfns, rounds, delay) = (backing.gfns, args.rounds, args.period);
    let mixes = [Mix::Recover(args.ratio)];
    let mut rows = Vec::new();
    progress.step(format!("{} tdp", F::NAME));
    // Large pages of the host, or there is nothing to recover; and frames for tables that are not free yet.
    let mut setup = our_setup(backing, 2)?;
    setup.backing.level = Level::L2;
    setup.frames *= 4;
    let ours = Ours::<F, Fetch>::with(setup, Tables::Fresh, AdBits::Processor, |builder| {
        builder.nx_huge_pages(true)
    })?;
    rows.extend(course::run(
        ours, "tdp", &mixes, gfns, rounds, &cpus, delay,
    )?);
    progress.step(format!("{} rwlock", F::NAME));
    let rwlock = ReaderWriter::<F, 4>::new(&theirs)?;
    rows.extend(course::run(
        rwlock, "rwlock", &mixes, gfns, rounds, &cpus, delay,
    )?);
    progress.step(format!("{} mutex", F::NAME));
    let mutex = OneMutex::<F, 4>::new(&theirs)?;
    rows.extend(course::run(
        mutex, "mutex", &mixes, gfns, rounds, &cpus, delay,
    )?);
    progress.step(format!("{} table_lock", F::NAME));
    let table_lock = TableLock::<F, 4>::new(&theirs)?;
    rows.extend(course::run(
        table_lock,
        "table_lock",
        &mixes,
        gfns,
        rounds,
        &cpus,
        delay,
    )?);
    rows.iter_mut().for_each(|row| row.format = F::NAME);
    Ok(rows)
}
