//! Pre-fault memory: a range is mapped ahead of its use, without a vCPU that waits for it.
//!
//! One thread maps the whole range by one call of the library, in each half and by pages of each size, round after round.
//! Nothing is mapped at the start of a lap, and the tables are in place. A lap that leaves something out, or had anything to
//! tell the embedder on the way (an *exit*), fails the run.

use crate::confidential::args::BackendArgs;
use crate::confidential::backend::{Backend, BackendChoice, Null, NullOptions, Tdx, TdxOptions};
use crate::confidential::conditions::Conditions;
use crate::confidential::faulting::{Faulting, Touched};
use crate::confidential::guest::{Checks, GuestVcpu, verdict};
use crate::confidential::layout::Layout;
use crate::race::{Contender, median, minimum};
use crate::report::{Error, Output, Progress};
use crate::size::{self, PrivatePage};
use crate::sys;
use serde::Serialize;
use std::time::Instant;
use tdp::Visibility;
use tdp_arch::PAGE_SIZE;

const ABOUT: &str = "\
Measures how fast a range of guest memory is mapped ahead of its use, in each half of a confidential guest and by pages of
each size: pages a second, one thread, tables in place, no exits to the embedder on the way. Private pages cost a call of
the trusted module each.";

const EXAMPLES: &str = "\
Examples:
  tdp-bench pre-fault-memory
  tdp-bench pre-fault-memory -b 1G --backend null --backend-cost 0     the library's own time
  tdp-bench pre-fault-memory -b 16M -s 4k --json -";

/// How fast a range is mapped ahead of its use
#[derive(Debug, clap::Args)]
#[command(long_about = ABOUT, after_help = EXAMPLES)]
pub struct Args {
    /// The range: bytes, or with K, M, G or T
    #[arg(short = 'b', long, value_name = "SIZE", default_value = "64M", value_parser = size::parse)]
    bytes: u64,

    /// Pages that back it
    #[arg(
        short = 's',
        long,
        value_enum,
        value_name = "SIZE,…",
        value_delimiter = ',',
        default_value = "4k,2m"
    )]
    backing: Vec<PrivatePage>,

    /// Rounds
    #[arg(short = 'i', long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,

    #[command(flatten)]
    backend: BackendArgs,
}

/// One half by pages of one size.
#[derive(Debug, Serialize)]
struct Row {
    half: &'static str,
    page_bytes: u64,
    pages: u64,
    wall_ns: Vec<u64>,
    ns_per_page: Figures,
    pages_per_second: f64,
}

#[derive(Debug, Serialize)]
struct Figures {
    median: f64,
    min: f64,
}

#[derive(Serialize)]
struct Body<'a> {
    parameters: Parameters,
    results: &'a [Row],
    checks: Verified<'a>,
}

#[derive(Serialize)]
struct Parameters {
    bytes: u64,
    rounds: u16,
    #[serde(flatten)]
    backend: crate::confidential::args::BackendParameters,
}

#[derive(Serialize)]
struct Verified<'a> {
    #[serde(flatten)]
    checks: &'a Checks,
    /// Frames of the ranges that a lap left out.
    left_out: u64,
    /// Times that the embedder was told something.
    exits: u64,
}

/// What went wrong in laps.
#[derive(Debug, Default)]
struct Wrong {
    left_out: u64,
    exits: u64,
}

/// Runs the scenario.
///
/// # Errors
///
/// [`Error::Usage`] for arguments that do not go together, the library's own errors if a run fails, and [`Error::Check`] if
/// something was left out or is not as it should be.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    let layouts = args
        .backing
        .iter()
        .map(|page| args.layout(*page))
        .collect::<Result<Vec<_>, _>>()?;
    sys::wake_precisely().map_err(|e| Error::run("timer slack", e))?;
    let progress = output.progress(2 * layouts.len() as u64 * u64::from(args.rounds));
    let (mut rows, mut checks, mut wrong) = (Vec::new(), Checks::default(), Wrong::default());
    for layout in layouts {
        for half in [Visibility::Shared, Visibility::Private] {
            rows.push(match args.backend.backend {
                BackendChoice::Tdx => {
                    let options = TdxOptions::default();
                    measure::<Tdx>(
                        args,
                        layout,
                        half,
                        options,
                        &progress,
                        &mut checks,
                        &mut wrong,
                    )
                }
                BackendChoice::Null => {
                    let options = NullOptions::default();
                    measure::<Null>(
                        args,
                        layout,
                        half,
                        options,
                        &progress,
                        &mut checks,
                        &mut wrong,
                    )
                }
            }?);
        }
    }
    drop(progress);
    tell(output, args, &rows, &checks, &wrong);
    let body = Body {
        parameters: Parameters {
            bytes: args.bytes,
            rounds: args.rounds,
            backend: args.backend.parameters(),
        },
        results: &rows,
        checks: Verified {
            checks: &checks,
            left_out: wrong.left_out,
            exits: wrong.exits,
        },
    };
    output.finish("pre-fault-memory", &body)?;
    let mut words = checks.wrong();
    if wrong.left_out + wrong.exits != 0 {
        words.push(format!(
            "{} frames were left out, {} exits",
            wrong.left_out, wrong.exits
        ));
    }
    verdict(words)
}

impl Args {
    fn layout(&self, page: PrivatePage) -> Result<Layout, Error> {
        let level = page.level();
        if !self.bytes.is_multiple_of(level.bytes()) {
            return Err(Error::Usage(format!(
                "-b {}: is not a multiple of the page size, {} (-s)",
                size::show(self.bytes),
                size::show(level.bytes())
            )));
        }
        Layout::new(self.bytes / PAGE_SIZE, level, 1).ok_or_else(|| {
            Error::Usage(format!(
                "-b {}: is more than {}",
                size::show(self.bytes),
                size::show(Layout::LIMIT * PAGE_SIZE)
            ))
        })
    }
}

fn measure<B: Backend>(
    args: &Args,
    layout: Layout,
    half: Visibility,
    options: B::Options,
    progress: &Progress,
    checks: &mut Checks,
    wrong: &mut Wrong,
) -> Result<Row, Error> {
    let conditions = Conditions::new(args.backend.module.weather());
    let mut guest = Faulting::<B>::new(layout, Touched::Half(half), options, conditions)?;
    let mut vcpu = guest.worker()?;
    // The first lap links the tables; it counts for nothing.
    lap(&guest, &mut vcpu, half, wrong)?;
    let mut wall_ns = Vec::new();
    for round in 1..=args.rounds {
        progress.step(format!("{half:?}, round {round}"));
        guest.reset()?;
        guest.guest().conditions().raise();
        wall_ns.push(lap(&guest, &mut vcpu, half, wrong)?);
        guest.guest().conditions().calm();
        guest.guest().audit(checks);
    }
    drop(vcpu);
    guest.finish(checks)?;
    let pages = layout.gfns.pages() / layout.level.pages();
    let ns: Vec<f64> = wall_ns.iter().map(|ns| *ns as f64 / pages as f64).collect();
    Ok(Row {
        half: match half {
            Visibility::Shared => "shared",
            Visibility::Private => "private",
        },
        page_bytes: layout.level.bytes(),
        pages,
        wall_ns,
        pages_per_second: 1e9 / median(&ns),
        ns_per_page: Figures {
            median: median(&ns),
            min: minimum(&ns),
        },
    })
}

/// Maps all of the range and returns the nanoseconds that it took. What the module refused on purpose is gone on with.
fn lap<B: Backend>(
    guest: &Faulting<B>,
    vcpu: &mut GuestVcpu<B>,
    half: Visibility,
    wrong: &mut Wrong,
) -> Result<u64, Error> {
    let guest = guest.guest();
    let mut left = guest.layout().gfns;
    let begin = Instant::now();
    loop {
        let done = vcpu
            .prefault(left, half)
            .map_err(|e| Error::run("tdp", e))?;
        left.start = done.next;
        if done.stopped.is_none() || !guest.conditions().injects() {
            wrong.exits += u64::from(done.stopped.is_some());
            break;
        }
    }
    let ns = begin.elapsed().as_nanos() as u64;
    let mapped = guest.mmu().stats().pages;
    let frames: u64 = [1, 512, 512 * 512]
        .iter()
        .zip(mapped)
        .map(|(frames, pages)| frames * pages)
        .sum();
    wrong.left_out += guest.layout().gfns.pages().abs_diff(frames);
    Ok(ns)
}

fn tell(output: &Output, args: &Args, rows: &[Row], checks: &Checks, wrong: &Wrong) {
    output.say(format_args!(
        "{} MiB mapped ahead of their use, one thread, {}; nanoseconds a page, median of rounds (fastest)",
        args.bytes >> 20,
        args.backend.name(),
    ));
    output.table(
        &["", "ns a page", "pages/s"],
        rows.iter().map(|row| {
            vec![
                format!("{}, pages of {}", row.half, size::show(row.page_bytes)),
                format!("{:.1} ({:.1})", row.ns_per_page.median, row.ns_per_page.min),
                format!("{:.0}", row.pages_per_second),
            ]
        }),
    );
    output.say(format_args!(
        "{} frames left out, {} exits",
        wrong.left_out, wrong.exits
    ));
    checks.tell(output);
}
