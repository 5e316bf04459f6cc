//! Private faults: vCPUs of a confidential guest touch private memory that is not mapped, each its own.
//!
//! Five lanes take turns, round after round ([`race`](crate::race) says how the clock is read):
//!
//! * `shared`: a guest without a private half, one vCPU: what a private fault is compared with;
//! * `private`: the same pages, on a module that does nothing;
//! * `overhead`: the same on a module that takes 5 us, spinning: what the library adds to that;
//! * `one` and `all`: the module that was asked for, by one vCPU and by all of them.
//!
//! The tables are all in place before a lap begins: linking an upper table is one call for everybody who needs it. While
//! tables are linked and pages are taken away between laps, the module's calls are free.

mod findings;
mod lanes;

use crate::confidential::args::BackendArgs;
use crate::confidential::backend::{BackendChoice, Null, NullOptions, Tdx, TdxOptions};
use crate::confidential::layout::Layout;
use crate::report::{Error, Output};
use crate::size::{self, PrivatePage};
use crate::sys;
use tdp_arch::PAGE_SIZE;

const ABOUT: &str = "\
Measures how fast private memory of a confidential guest becomes mapped when vCPUs touch it. Each page costs a call of a
trusted module, which the library makes while it owns the entry and nothing else, so that calls overlap.

'overlap' is the rate of all vCPUs over that of one. The vCPUs are below the same table at about the same time, side by side in it: a lock
around the module's call, or one for each table, would give 1. With --backend-wait sleep calls overlap on any number of
processors. 'vs_shared' is a private fault on a module that does nothing over a fault of a guest without a private half,
'overhead' what the library adds to a call that takes 5 us, as a share of it.

All tables are linked before the clock starts, while the module's calls are free: linking a table is one call that
everybody below it waits for. Sleeping calls take longer than they are asked to; 'achieved' says how long.";

const EXAMPLES: &str = "\
Examples:
  tdp-bench private-faults                                                   4 vCPUs, TDX model, 5 us a call
  tdp-bench private-faults -v 64 -b 4M --backend-cost 1ms --backend-wait sleep --json -
  tdp-bench private-faults --busy-rate 0.05 --fail-rate 0.01                 with faults injected into the module
  tdp-bench private-faults -s 2m -b 1G                                       large pages";

/// How fast private memory becomes mapped when vCPUs touch it
#[derive(Debug, clap::Args)]
#[command(long_about = ABOUT, after_help = EXAMPLES)]
pub struct Args {
    /// vCPUs, a thread each
    #[arg(short = 'v', long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    vcpus: u16,

    /// Private memory of each vCPU: bytes, or with K, M, G or T
    #[arg(short = 'b', long, value_name = "SIZE", default_value = "4M", value_parser = size::parse)]
    bytes: u64,

    /// Pages that back guest memory
    #[arg(short = 's', long, value_enum, default_value_t = PrivatePage::FourK)]
    backing: PrivatePage,

    /// Rounds; in each, every lane runs once
    #[arg(short = 'i', long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,

    #[command(flatten)]
    backend: BackendArgs,
}

impl Args {
    fn layout(&self) -> Result<Layout, Error> {
        let (bytes, level) = (self.bytes, self.backing.level());
        if !bytes.is_multiple_of(level.bytes()) {
            return Err(Error::Usage(format!(
                "-b {}: is not a multiple of the page size, {} (-s)",
                size::show(bytes),
                size::show(level.bytes())
            )));
        }
        let frames = (bytes / PAGE_SIZE).saturating_mul(u64::from(self.vcpus));
        Layout::new(frames, level, self.vcpus).ok_or_else(|| {
            Error::Usage(format!(
                "-v {} -b {}: is more than {} in all",
                self.vcpus,
                size::show(bytes),
                size::show(Layout::LIMIT * PAGE_SIZE)
            ))
        })
    }
}

/// Runs the scenario.
///
/// # Errors
///
/// [`Error::Usage`] for arguments that do not go together, the library's own errors if a run fails, and [`Error::Check`] if
/// the protected table is not as it should be or a frame was lost.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    let layout = args.layout()?;
    sys::wake_precisely().map_err(|e| Error::run("timer slack", e))?;
    let progress = output.progress(u64::from(args.rounds) * lanes::LANES);
    let results = match args.backend.backend {
        BackendChoice::Tdx => lanes::run::<Tdx>(args, layout, TdxOptions::default(), &progress)?,
        BackendChoice::Null => lanes::run::<Null>(args, layout, NullOptions::default(), &progress)?,
    };
    drop(progress);
    findings::tell(output, args, &results);
    let body = findings::Body::new(args, &results);
    output.finish("private-faults", &body)?;
    results.checks.verdict()
}
