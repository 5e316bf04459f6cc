//! Sweeps: what changing every leaf of a range costs, over the least that it can.
//!
//! Each contender has all of its memory mapped by pages of 4 KiB that were just written, is swept once by one thread, and
//! is asked whether a leaf was left out. The contenders take turns, round after round. The floor is one pass over the
//! same entries with the compare-exchange that each needs, and nothing else.
//!
//! * `lanes` seats the contenders and runs the rounds;
//! * `findings` makes ratios, tables and JSON of them.

mod findings;
mod lanes;

use crate::baseline::host::Backing;
use crate::formats::FormatChoice;
use crate::report::{Error, Output};
use crate::size;
use tdp_arch::{Ept, Gfn, GfnRange, Level, Npt, PAGE_SIZE, Pfn};

const ABOUT: &str = "\
Measures sweeps of the library over memory that is mapped by pages of 4 KiB and was just written: write protection, aging
(by the processor's accessed bits, and by access tracking where it keeps none), zapping, clearing dirty bits, and clearing
a dirty log by masks of 64 frames; splitting pages of 2 MiB, and collapsing them again. One thread, its processor time.

'over the floor' is the library's time over that of one pass over the same entries with the compare-exchange that each
needs, and nothing else: it cannot be below 1 by much. The floor of splitting is filling as many tables by plain stores;
neither's are in a cache beforehand. The other ratios are a baseline's time over the library's: above 1 the library is
faster. A sweep that leaves out a leaf fails the run.";

const EXAMPLES: &str = "\
Examples:
  tdp-bench sweeps
  tdp-bench sweeps -b 4G -f ept --json -";

/// What changing every leaf of a range costs, over the least that it can
#[derive(Debug, clap::Args)]
#[command(long_about = ABOUT, after_help = EXAMPLES)]
pub struct Args {
    /// Memory that is swept, a multiple of 2M: bytes, or with K, M, G or T
    #[arg(short = 'b', long, value_name = "SIZE", default_value = "1G", value_parser = size::parse)]
    bytes: u64,

    /// Entry format
    #[arg(short = 'f', long, value_enum, default_value_t = FormatChoice::Both)]
    format: FormatChoice,

    /// Rounds; in each, every contender is swept once in every way
    #[arg(short = 'i', long, default_value_t = 9, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
}

pub(crate) use lanes::our_setup;

/// Guest memory of one vCPU after the other, by pages of 4 KiB: what scenarios of sweeps run on.
///
/// # Errors
///
/// [`Error::Usage`] if it does not fit the addresses.
pub(crate) fn memory(bytes: u64) -> Result<Backing, Error> {
    // Not at zero, where mistakes look right; host frames a multiple of 1 GiB away.
    const START: Gfn = Gfn(1 << 18);
    const OFFSET: u64 = 1 << 27;
    let gfns = GfnRange::new(START, bytes / PAGE_SIZE)
        .filter(|gfns| gfns.end.0 + OFFSET <= Level::L4.gfn_limit().0)
        .ok_or_else(|| {
            Error::Usage(format!(
                "-b {}: does not fit the addresses of 4 levels",
                size::show(bytes)
            ))
        })?;
    Ok(Backing {
        gfns,
        pfn: Pfn(START.0 + OFFSET),
        level: Level::L1,
    })
}

/// Runs the scenario.
///
/// # Errors
///
/// [`Error::Usage`] for memory that there is not, the library's own errors if a run fails, and [`Error::Check`] if a sweep
/// left out a leaf or a frame was lost.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    if !args.bytes.is_multiple_of(Level::L2.bytes()) {
        return Err(Error::Usage(format!(
            "-b {}: is not a multiple of 2M",
            size::show(args.bytes)
        )));
    }
    let backing = memory(args.bytes)?;
    let formats =
        u64::from(args.format.includes::<Ept>()) + u64::from(args.format.includes::<Npt>());
    let progress = output.progress(formats * u64::from(args.rounds));
    let mut results = Vec::new();
    if args.format.includes::<Ept>() {
        results.push(lanes::run::<Ept>(args, backing, &progress)?);
    }
    if args.format.includes::<Npt>() {
        results.push(lanes::run::<Npt>(args, backing, &progress)?);
    }
    drop(progress);
    let body = findings::Body::new(args, &results);
    body.tell(output, args);
    output.finish("sweeps", &body)?;
    body.verdict()
}
