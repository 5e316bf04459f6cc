//! Dirty logging: vCPUs write, the host asks which pages were written, clears what it was told, and asks again.
//!
//! The phases are those of KVM's dirty_log_perf_test: populate, switch the log on, then in each iteration dirty memory, get the
//! log and clear it, and at last switch the log off. vCPUs are software processors: a write is a walk, and a fault where the walk
//! ends in one. Every log is compared with what was written.
//!
//! * `lanes` seats the contenders and runs the phases;
//! * `findings` makes lines, ratios and JSON of them.

mod findings;
mod lanes;

use crate::formats::FormatChoice;
use crate::report::{Error, Output};
use crate::size;
use crate::sweeps::memory;
use clap::ValueEnum;
use tdp_arch::{Ept, Level, Npt};

const ABOUT: &str = "\
Measures dirty logging. Flags and lines follow KVM's dirty_log_perf_test: memory is populated, the log switched on; in each
iteration vCPUs dirty memory, the log is got and cleared; the log is switched off. 'tdp' logs by write protection,
'tdp_dirty_bit' by the processor's dirty bits. A baseline logs by write protection under its lock, by pages of 4 KiB.

vCPUs are made of software: a write is a walk by the reference page walker, which costs far more than a processor's, and a fault
where that ends in one. A page that was written and not reported fails the run.";

const EXAMPLES: &str = "\
Examples:
  tdp-bench dirty-log-perf
  tdp-bench dirty-log-perf -v 2 -b 1G -w 5 -s 4k
  tdp-bench dirty-log-perf -s 2m -x 4 -e --json -";

/// Which pages were written? What the question costs, and what it costs vCPUs
#[derive(Debug, clap::Args)]
#[command(long_about = ABOUT, after_help = EXAMPLES)]
pub struct Args {
    /// vCPUs, a thread each
    #[arg(short = 'v', long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1024))]
    vcpus: u16,

    /// Memory of each vCPU: bytes, or with K, M, G or T
    #[arg(short = 'b', long, value_name = "SIZE", default_value = "256M", value_parser = size::parse)]
    bytes: u64,

    /// Pages that back guest memory
    #[arg(short = 's', long, value_enum, default_value_t = Page::TwoM)]
    backing: Page,

    /// Iterations
    #[arg(short = 'i', long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    iterations: u16,

    /// Slots that memory is cut into
    #[arg(short = 'x', long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=4096))]
    slots: u16,

    /// Share of pages that are written, the others being read
    #[arg(short = 'w', long, value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u16).range(0..=100))]
    writes: u16,

    /// Getting the log takes its marks, so that nothing has to be cleared
    #[arg(short = 'g', long)]
    no_manual_protect: bool,

    /// Switch the log off while vCPUs run
    #[arg(short = 'e', long)]
    run_while_disabling: bool,

    /// Entry format
    #[arg(short = 'f', long, value_enum, default_value_t = FormatChoice::Ept)]
    format: FormatChoice,

    /// Rounds; in each, every contender goes through all phases once
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
}

/// A page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Page {
    /// 4 KiB
    #[value(name = "4k")]
    FourK,
    /// 2 MiB
    #[value(name = "2m")]
    TwoM,
    /// 1 GiB
    #[value(name = "1g")]
    OneG,
}

impl Page {
    const fn level(self) -> Level {
        match self {
            Self::FourK => Level::L1,
            Self::TwoM => Level::L2,
            Self::OneG => Level::L3,
        }
    }
}

/// Runs the scenario.
///
/// # Errors
///
/// [`Error::Usage`] for arguments that do not go together, the library's own errors if a run fails, and [`Error::Check`] if a
/// written page was not reported, or a frame was lost.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    let total = args.bytes.checked_mul(u64::from(args.vcpus));
    let backing = memory(total.unwrap_or(u64::MAX))?;
    if backing.gfns.pages() > u64::from(u32::MAX) {
        return Err(Error::Usage("-b: is more than 16T in all".to_owned()));
    }
    if backing.gfns.pages() / u64::from(args.slots) < args.backing.level().pages() {
        return Err(Error::Usage(format!(
            "-x {}: a slot is smaller than a page (-b, -s)",
            args.slots
        )));
    }
    let formats =
        u64::from(args.format.includes::<Ept>()) + u64::from(args.format.includes::<Npt>());
    let progress = output.progress(formats * u64::from(args.rounds));
    let mut rows = Vec::new();
    if args.format.includes::<Ept>() {
        rows.extend(lanes::run::<Ept>(args, backing, &progress)?);
    }
    if args.format.includes::<Npt>() {
        rows.extend(lanes::run::<Npt>(args, backing, &progress)?);
    }
    drop(progress);
    let body = findings::Body::new(args, rows);
    body.tell(output);
    output.finish("dirty-log-perf", &body)?;
    body.verdict()
}
