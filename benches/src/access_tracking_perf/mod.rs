//! Access tracking: which pages has the guest used, asked of all of its memory at once.
//!
//! vCPUs write to memory that is not there, write to it and read it once more, and then to and from memory that was marked
//! idle before. What they do is what their processors do: a walk that sets accessed bits, and a fault where that ends in one.
//! Marking memory idle is one aging pass by one thread. Where the processor keeps accessed bits (`tdp`) an access to idle
//! memory costs a bit; where it does not (`tdp_software_ad`) it costs a fault that gives the permissions back.
//!
//! * `lanes` seats the contenders and runs the phases;
//! * `findings` makes ratios, lines and JSON of them.

mod findings;
mod lanes;

use crate::formats::FormatChoice;
use crate::report::{Error, Output};
use crate::size;
use crate::sweeps::memory;
use tdp_arch::{Ept, Npt};

const ABOUT: &str = "\
Measures aging, and what it costs vCPUs. Flags and lines follow KVM's access_tracking_perf_test: memory is populated, written
and read; then it is marked idle and written, marked idle and read. 'tdp' runs on a processor that keeps accessed bits,
'tdp_software_ad' on one that does not, where aging takes permissions away and the next access faults.

vCPUs are made of software: their accesses are walks by the reference page walker, which cost far more than a processor's.
Only an aging pass is the library's own work throughout. A page that stays young after a pass, or old after an access,
fails the run.";

const EXAMPLES: &str = "\
Examples:
  tdp-bench access-tracking-perf
  tdp-bench access-tracking-perf -v 2 -b 1G -p        and aging without pause while vCPUs write
  tdp-bench access-tracking-perf -f npt --json -";

/// Which pages has the guest used? What the question costs, and what it costs vCPUs
#[derive(Debug, clap::Args)]
#[command(long_about = ABOUT, after_help = EXAMPLES)]
pub struct Args {
    /// vCPUs, a thread each
    #[arg(short = 'v', long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1024))]
    vcpus: u16,

    /// Memory of each vCPU: bytes, or with K, M, G or T
    #[arg(short = 'b', long, value_name = "SIZE", default_value = "256M", value_parser = size::parse)]
    bytes: u64,

    /// Also age without pause while vCPUs write
    #[arg(short = 'p', long)]
    parallel: bool,

    /// Entry format
    #[arg(short = 'f', long, value_enum, default_value_t = FormatChoice::Ept)]
    format: FormatChoice,

    /// Rounds; in each, every contender goes through all phases once
    #[arg(short = 'i', long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
}

/// Runs the scenario.
///
/// # Errors
///
/// [`Error::Usage`] for memory that there is not, the library's own errors if a run fails, and [`Error::Check`] if a page
/// was not as young or as old as it should be, or a frame was lost.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    let total = args.bytes.checked_mul(u64::from(args.vcpus));
    let backing = memory(total.unwrap_or(u64::MAX))?;
    let formats =
        u64::from(args.format.includes::<Ept>()) + u64::from(args.format.includes::<Npt>());
    let progress = output.progress(formats * u64::from(args.rounds));
    let mut results = Vec::new();
    if args.format.includes::<Ept>() {
        results.extend(lanes::run::<Ept>(args, backing, &progress)?);
    }
    if args.format.includes::<Npt>() {
        results.extend(lanes::run::<Npt>(args, backing, &progress)?);
    }
    drop(progress);
    let body = findings::Body::new(args, results);
    body.tell(output);
    output.finish("access-tracking-perf", &body)?;
    body.verdict()
}
