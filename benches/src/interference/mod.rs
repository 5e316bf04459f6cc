//! Interference: what a vCPU that faults at full rate feels of a thread that sweeps its memory without pause.
//!
//! One vCPU maps all of its memory by pages of 4 KiB, again and again, everything being taken away before each lap. In every
//! other lap another thread goes over the same memory without pause: write protection and aging, or these and splitting
//! and collapsing as well. Some laps are timed as a whole, which gives the rate; in others every single fault is, which costs
//! a look at the clock and so is not in the rate.
//!
//! * `course` has the threads and the laps;
//! * `findings` makes ratios, tables and JSON of them.

pub(crate) mod course;
mod findings;

use crate::baseline::Setup;
use crate::baseline::host::Backing;
use crate::baseline::mutex::OneMutex;
use crate::baseline::rwlock::ReaderWriter;
use crate::baseline::table_lock::TableLock;
use crate::formats::FormatChoice;
use crate::ours::{BenchHost, Operation, OurSetup, Ours, Tables, Walked};
use crate::report::{Error, Output, Progress};
use crate::size;
use crate::sweeps::{memory, our_setup};
use course::{Mix, Row};
use std::time::Duration;
use tdp::{Fault, FaultError, Level, Outcome, Vcpu};
use tdp_arch::{Ept, Format, Gfn, Npt};

const ABOUT: &str = "\
Measures a vCPU that faults at full rate, alone and while another thread sweeps the same memory without pause: write
protection and aging ('protect, age'), and with splitting and collapsing ('all').

'rate kept' is the vCPU's rate while it is swept over its rate alone. 'worst fault' is the duration that one fault in a
thousand exceeds while it is swept, over the same alone. Medians of rounds. Both threads want a processor that nobody else
uses: a lap from which the system took the vCPU's away is repeated, up to five times.";

const EXAMPLES: &str = "\
Examples:
  tdp-bench interference
  tdp-bench interference -b 256M -i 21 -f npt --json -";

/// What a vCPU that faults feels of sweeps of its memory
#[derive(Debug, clap::Args)]
#[command(long_about = ABOUT, after_help = EXAMPLES)]
pub struct Args {
    /// The vCPU's memory: bytes, or with K, M, G or T
    #[arg(short = 'b', long, value_name = "SIZE", default_value = "1G", value_parser = size::parse)]
    bytes: u64,

    /// Entry format
    #[arg(short = 'f', long, value_enum, default_value_t = FormatChoice::Ept)]
    format: FormatChoice,

    /// Rounds; in each, every contender runs a lap of every kind
    #[arg(short = 'i', long, default_value_t = 9, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,

    /// Processors to tie the vCPU and the sweeping thread to, as in 0,1 [default: the first two, if there are]
    #[arg(short = 'c', long, value_name = "CPU,CPU", value_delimiter = ',')]
    cpus: Vec<usize>,
}

impl Args {
    fn processors(&self) -> Result<Vec<usize>, Error> {
        let mut cpus = self.cpus.clone();
        if cpus.is_empty() {
            cpus = crate::sys::allowed();
            cpus.truncate(2);
            return Ok(if cpus.len() < 2 { Vec::new() } else { cpus });
        }
        if cpus.len() != 2 {
            return Err(Error::Usage(format!(
                "-c names {} processors for 2 threads",
                cpus.len()
            )));
        }
        Ok(cpus)
    }
}

/// A whole fault that maps a page of 4 KiB, whatever the host's memory allows.
#[derive(Debug)]
struct SmallFault;

impl Operation for SmallFault {
    #[inline(always)]
    fn perform<F: Format>(
        vcpu: &mut Vcpu<F, BenchHost>,
        gfn: Gfn,
        _setup: &OurSetup,
    ) -> Result<Outcome, FaultError> {
        vcpu.fault(Fault::write(gfn.address()).max_level(Level::L1))
    }
}

/// Runs the scenario.
///
/// # Errors
///
/// [`Error::Usage`] for arguments that do not go together, and the library's own errors if a run fails.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    let cpus = args.processors()?;
    let backing = memory(args.bytes)?;
    let formats =
        u64::from(args.format.includes::<Ept>()) + u64::from(args.format.includes::<Npt>());
    let progress = output.progress(formats * 4);
    let mut results = Vec::new();
    if args.format.includes::<Ept>() {
        results.extend(measure::<Ept>(args, backing, &cpus, &progress)?);
    }
    if args.format.includes::<Npt>() {
        results.extend(measure::<Npt>(args, backing, &cpus, &progress)?);
    }
    drop(progress);
    let body = findings::Body::new(args, results);
    body.tell(output, args);
    output.finish("interference", &body)?;
    body.verdict()
}

fn measure<F: Walked>(
    args: &Args,
    backing: Backing,
    cpus: &[usize],
    progress: &Progress,
) -> Result<Vec<Row>, Error> {
    let theirs = Setup {
        backing,
        huge: false,
    };
    // Large pages of the host, or there is nothing to collapse into; and frames for as many tables as collapse and are
    // not free yet.
    let mut ours = our_setup(backing, 2)?;
    ours.backing.level = Level::L2;
    ours.frames *= 4;
    let rounds = args.rounds;
    let mut rows = Vec::new();
    progress.step(format!("{} tdp", F::NAME));
    rows.extend(course::run(
        Ours::<F, SmallFault>::new(ours, Tables::Warm)?,
        "tdp",
        &[Mix::ProtectAge, Mix::All],
        backing.gfns,
        rounds,
        cpus,
        Duration::ZERO,
    )?);
    progress.step(format!("{} rwlock", F::NAME));
    rows.extend(course::run(
        ReaderWriter::<F, 4>::new(&theirs)?,
        "rwlock",
        &[Mix::ProtectAge],
        backing.gfns,
        rounds,
        cpus,
        Duration::ZERO,
    )?);
    progress.step(format!("{} mutex", F::NAME));
    rows.extend(course::run(
        OneMutex::<F, 4>::new(&theirs)?,
        "mutex",
        &[Mix::ProtectAge],
        backing.gfns,
        rounds,
        cpus,
        Duration::ZERO,
    )?);
    progress.step(format!("{} table_lock", F::NAME));
    rows.extend(course::run(
        TableLock::<F, 4>::new(&theirs)?,
        "table_lock",
        &[Mix::ProtectAge],
        backing.gfns,
        rounds,
        cpus,
        Duration::ZERO,
    )?);
    rows.iter_mut().for_each(|row| row.format = F::NAME);
    Ok(rows)
}
