//! Memslot modification stress: a slot that nobody uses is added and removed again and again while a vCPU faults elsewhere.
//!
//! It is one more kind of [`interference`](crate::interference), with its threads and laps: what does the vCPU feel of it?

use crate::baseline::Setup;
use crate::baseline::mutex::OneMutex;
use crate::baseline::rwlock::ReaderWriter;
use crate::baseline::table_lock::TableLock;
use crate::formats::FormatChoice;
use crate::interference::course::{self, Mix, Row};
use crate::ours::{Ours, Tables, Walked, WholeFault};
use crate::race::median;
use crate::report::{Error, Output, Progress};
use crate::size;
use crate::sweeps::{memory, our_setup};
use crate::{sys, time};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;
use tdp_arch::{Ept, Npt};

const ABOUT: &str = "\
Adds and removes a slot that nobody uses, without pause, while a vCPU faults at full rate on another one. Flags follow KVM's
memslot_modification_stress_test. 'rate kept' is the vCPU's rate meanwhile over its rate alone.

A baseline has one slot that never changes. In place of a removal it does what that does under its lock: it looks for what the
slot maps, which is nothing.";

const EXAMPLES: &str = "\
Examples:
  tdp-bench memslot-modification-stress
  tdp-bench memslot-modification-stress -b 1G -d 100us --json -";

/// A slot added and removed repeatedly while a vCPU faults elsewhere
#[derive(Debug, clap::Args)]
#[command(long_about = ABOUT, after_help = EXAMPLES)]
pub struct Args {
    /// The vCPU's memory: bytes, or with K, M, G or T
    #[arg(short = 'b', long, value_name = "SIZE", default_value = "256M", value_parser = size::parse)]
    bytes: u64,

    /// Pause between two modifications
    #[arg(short = 'd', long, value_name = "TIME", default_value = "0", value_parser = time::parse)]
    delay: Duration,

    /// Entry format
    #[arg(short = 'f', long, value_enum, default_value_t = FormatChoice::Ept)]
    format: FormatChoice,

    /// Rounds; in each, every contender runs a lap of every kind
    #[arg(short = 'i', long, default_value_t = 9, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
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
    delay_ns: u64,
    rounds: u16,
}

/// By contender, the worse of the formats' figures.
#[derive(Default, Serialize)]
struct Ratios {
    rate_kept: BTreeMap<&'static str, f64>,
    worst_fault: BTreeMap<&'static str, f64>,
}

#[derive(Serialize)]
struct Checks {
    /// Modifications of the library's slots.
    modifications: u64,
    leaked_frames: u64,
}

/// Runs the scenario.
///
/// # Errors
///
/// [`Error::Usage`] for memory that there is not, the library's own errors if a run fails, and [`Error::Check`] if a frame
/// was lost or nothing was modified.
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
    }
    let ours = rows.iter().filter(|row| row.name == "tdp");
    let checks = Checks {
        modifications: ours.map(|row| row.passes).sum(),
        leaked_frames: rows
            .iter()
            .fold(0, |sum, row| sum.saturating_add(row.leaked)),
    };
    output.say(format_args!(
        "A vCPU maps {} by pages of 4K, alone and while a slot elsewhere is added and removed; medians of {} rounds",
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
            "modifications",
        ],
        rows.iter().map(|row| {
            [
                row.name.to_owned(),
                row.format.to_owned(),
                format!("{:.1}", median(&row.idle_ns)),
                format!("{:.1}", median(&row.swept_ns)),
                format!("{:.2}", row.rate_kept()),
                format!("{:.2}", row.worst()),
                row.passes.to_string(),
            ]
        }),
    );
    let (modifications, leaked) = (checks.modifications, checks.leaked_frames);
    let body = Body {
        parameters: Parameters {
            bytes: args.bytes,
            delay_ns: u64::try_from(args.delay.as_nanos()).unwrap_or(u64::MAX),
            rounds: args.rounds,
        },
        results: &rows,
        ratios,
        checks,
    };
    output.finish("memslot-modification-stress", &body)?;
    if leaked != 0 || modifications == 0 {
        return Err(Error::Check(format!(
            "{modifications} modifications, {leaked} table frames leaked"
        )));
    }
    Ok(())
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
    let (gfns, rounds, delay) = (backing.gfns, args.rounds, args.delay);
    let mixes = [Mix::Slots];
    let mut rows = Vec::new();
    progress.step(format!("{} tdp", F::NAME));
    let ours = Ours::<F, WholeFault>::new(our_setup(backing, 2)?, Tables::Warm)?;
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
