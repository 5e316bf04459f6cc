//! Demand paging: vCPUs touch memory that is not mapped, page by page, until all of it is.
//!
//! Each contender starts with nothing mapped, is timed while every vCPU resolves a write to each of its pages, has
//! every translation checked, and is brought back to nothing mapped. The contenders take turns, round after round
//! ([`race`](crate::race) says how the clock is read). Every contender is run by one vCPU and by all of them.
//!
//! * `plan` turns the arguments into guest memory and orders of pages;
//! * `lanes` seats the contenders and runs the rounds;
//! * `findings` makes ratios, tables and JSON of the laps.

mod findings;
mod lanes;
pub(crate) mod plan;

use crate::confidential::backend::BackendChoice;
use crate::confidential::faulting::Touched;
use crate::formats::FormatChoice;
use crate::ours::Walked;
use crate::report::{Error, Output};
use crate::size;
use clap::ValueEnum;
use plan::Plan;
use tdp_arch::{Ept, Level, Npt};

const ABOUT: &str = "\
Measures how fast unmapped guest memory becomes mapped when vCPUs touch it, page by page.

Flags follow KVM's demand_paging_test. What is measured is the MMU alone: no VM exit, no host page fault, no zeroing.
Two operations of the library are timed: 'fault' is the whole fault (slot look-up, staleness check, choice of a level,
install, statistics), 'map' the bare install of a known frame. 'warm' starts with all tables in place, 'fresh' with
none. Every contender is run by one vCPU and by all of them; contenders take turns in one process. One vCPU is charged
its processor time, several are charged wall time, so they want processors that nobody else uses: a lap from which the
system took one away is repeated, up to five times ('preemptions' in the JSON tells what is left).

A ratio is a contender's time over the library's for the same work: above 1 the library is faster. 'floor' is a raw walk
and one compare-exchange, tables preallocated, and cannot be beaten: its ratio is below 1.";

const EXAMPLES: &str = "\
Examples:
  tdp-bench demand-paging
  tdp-bench demand-paging -v 2 -b 1G --against all --json out.json
  tdp-bench demand-paging -v 2 -b 512M -o             both vCPUs in the same 2 MiB regions
  tdp-bench demand-paging -f ept --visibility private --against none
  tdp-bench demand-paging -f ept -s 2m -b 64G -a      large pages in random order";

/// How fast unmapped guest memory becomes mapped when vCPUs touch it
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
    #[arg(short = 's', long, value_enum, default_value_t = PageSize::FourK)]
    backing: PageSize,

    /// All vCPUs fault in the same memory. 'regions': in the same 2 MiB region (the pages of one table) at the same
    /// time, each on pages of its own; 'pages': each vCPU on every page of all, as in KVM's test
    #[arg(
        short = 'o', long, value_enum, value_name = "HOW",
        num_args = 0..=1, require_equals = true, default_missing_value = "regions"
    )]
    overlap: Option<Overlap>,

    /// Touch pages in random order, each once
    #[arg(short = 'a', long)]
    random: bool,

    /// Seed of the random order
    #[arg(short = 'r', long, default_value_t = 1)]
    seed: u64,

    /// Entry format
    #[arg(short = 'f', long, value_enum, default_value_t = FormatChoice::Both)]
    format: FormatChoice,

    /// Processors to tie vCPUs to, one for each, as in 0,1 [default: several vCPUs to the first, if there are enough]
    #[arg(short = 'c', long, value_name = "CPU,…", value_delimiter = ',')]
    cpus: Vec<usize>,

    /// Rounds; in each, every contender runs once by one vCPU and once by all
    #[arg(short = 'i', long, default_value_t = 9, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,

    /// Levels of the tables
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(4..=5))]
    levels: u8,

    /// Table memory that the library may use [default: what the run needs]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pool: Option<u64>,

    /// Advise huge pages for the table memory of the library and of the baselines
    #[arg(long)]
    huge_pool: bool,

    /// Run a confidential guest too, with memory of this kind: a fault on it is compared with one of a guest that has
    /// none (EPT only)
    #[arg(long, value_enum, default_value_t = Memory::Shared)]
    visibility: Memory,

    /// The confidential guest's trusted module, whose calls cost nothing
    #[arg(long, value_enum, default_value_t = BackendChoice::Null)]
    backend: BackendChoice,

    /// Contenders to run beside the library
    #[arg(
        long,
        value_enum,
        value_name = "WHICH,…",
        value_delimiter = ',',
        default_value = "all"
    )]
    against: Vec<Against>,
}

/// A page size on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PageSize {
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

impl PageSize {
    fn level(self) -> Level {
        match self {
            Self::FourK => Level::L1,
            Self::TwoM => Level::L2,
            Self::OneG => Level::L3,
        }
    }
}

/// How vCPUs share memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Overlap {
    /// All vCPUs are in the same region at the same time, each on its own pages
    Regions,
    /// Every vCPU touches every page
    Pages,
}

/// What memory of a guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Memory {
    /// Shared with the host: a guest without a private half
    Shared,
    /// Private throughout
    Private,
    /// Private and shared by turns, 2 MiB each
    Mixed,
}

impl Memory {
    /// What a confidential guest's vCPUs touch, and the name of its lane.
    fn touched(self) -> Option<(Touched, &'static str)> {
        match self {
            Self::Shared => None,
            Self::Private => Some((Touched::Half(tdp::Visibility::Private), "tdp_private")),
            Self::Mixed => Some((Touched::Alternating, "tdp_mixed")),
        }
    }
}

/// What the library is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Against {
    /// All of them
    All,
    /// Nothing
    None,
    /// A raw walk and one compare-exchange, tables preallocated, nothing else
    Floor,
    /// Plain tables under one mutex
    Mutex,
    /// KVM's shape: compare-exchange under a reader-writer lock taken for reading
    Rwlock,
    /// CortenMM's shape: a lock for each table page
    TableLock,
    /// The crate page_table_multiarch under a mutex
    #[value(name = "page_table_multiarch")]
    PageTableMultiarch,
    /// The crate x86_64 under a mutex
    #[value(name = "x86_64")]
    X86,
}

impl Args {
    fn runs(&self, baseline: Against) -> bool {
        self.against.contains(&Against::All) || self.against.contains(&baseline)
    }
}

/// Runs the scenario.
///
/// # Errors
///
/// [`Error::Usage`] for arguments that do not go together, the library's own errors if a run fails, and
/// [`Error::Check`] if a translation was wrong or a frame was lost.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    let plan = Plan::new(args)?;
    let formats =
        u64::from(args.format.includes::<Ept>()) + u64::from(args.format.includes::<Npt>());
    let progress = output.progress(formats * lanes::steps(args, &plan));
    let mut results = Vec::new();
    if args.format.includes::<Ept>() {
        results.push(measure::<Ept>(args, &plan, &progress)?);
    }
    if args.format.includes::<Npt>() {
        results.push(measure::<Npt>(args, &plan, &progress)?);
    }
    drop(progress);
    findings::tell(output, &plan, &results);
    let body = findings::Body::new(args, &plan, &results);
    output.finish("demand-paging", &body)?;
    body.checks.verdict()
}

/// The rounds of one format.
fn measure<F: Walked>(
    args: &Args,
    plan: &Plan,
    progress: &crate::report::Progress,
) -> Result<lanes::FormatResult, Error> {
    match plan.root {
        Level::L5 => lanes::run::<F, 5>(args, plan, progress),
        _ => lanes::run::<F, 4>(args, plan, progress),
    }
}
