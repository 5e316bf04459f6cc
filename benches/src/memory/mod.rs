//! Memory: what the library takes for a guest, at rest and at the worst moment of a full zap.
//!
//! Two guests: a *dense* one, all of whose memory is mapped by small pages, and a *sparse* one, of which few pages are mapped, each
//! below a table of its own. Nothing is behind a guest's memory; its entries are there in full. Each is zapped whole in three ways, a
//! new guest for each:
//!
//! * `alone`: nobody else is there;
//! * `beside_faults`: a vCPU maps the memory again meanwhile, so that new tables come while old ones wait for a grace period;
//! * `held_back`: a vCPU stays in a critical section for as long as the zap takes, so that nothing comes free before it is over.
//!
//! Counted are table frames (linked, held ready by vCPUs, waiting as garbage) and the heap: metadata, slots, the epoch's own
//! books. The frames' most is exact, the heap's is of samples.

mod findings;
mod guests;

use crate::formats::FormatChoice;
use crate::report::{Error, Output};
use crate::size;
use crate::sweeps::memory;
use guests::{Pages, Way};
use tdp_arch::{Ept, Level, Npt, PAGE_SIZE};

const ABOUT: &str = "\
Measures the memory that the library takes: table frames, metadata and what waits for a grace period, for each GiB of guest memory.
A dense guest is mapped whole by pages of 4K, a sparse one by few pages far apart; nothing is behind their memory. Then all is
zapped: alone, beside a vCPU that maps it again, and beside a vCPU that stays in its critical section, which holds everything back.";

const EXAMPLES: &str = "\
Examples:
  tdp-bench memory
  tdp-bench memory -b 1G --sparse 1T -f npt --json -";

/// Memory taken for each GiB of a guest, at rest and at the worst moment of a full zap
#[derive(Debug, clap::Args)]
#[command(long_about = ABOUT, after_help = EXAMPLES)]
pub struct Args {
    /// Memory of the dense guest, a multiple of 2M: bytes, or with K, M, G or T
    #[arg(short = 'b', long, value_name = "SIZE", default_value = "64G", value_parser = size::parse)]
    bytes: u64,

    /// Guest-physical size of the sparse guest
    #[arg(long, value_name = "SIZE", default_value = "4T", value_parser = size::parse)]
    sparse: u64,

    /// Pages that are mapped of the sparse guest
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pages: u64,

    /// Entry format
    #[arg(short = 'f', long, value_enum, default_value_t = FormatChoice::Ept)]
    format: FormatChoice,
}

/// Runs the scenario.
///
/// # Errors
///
/// [`Error::Usage`] for memory that there is not, the library's own errors if a run fails, and [`Error::Check`] if a frame
/// was lost or something still waited at the end.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    let table = Level::L2.pages();
    if !args.bytes.is_multiple_of(table * PAGE_SIZE) {
        return Err(Error::Usage(format!(
            "-b {}: is not a multiple of 2M",
            size::show(args.bytes)
        )));
    }
    let sparse = memory(args.sparse)?;
    let stride = sparse.gfns.pages() / args.pages;
    if stride < table {
        return Err(Error::Usage(format!(
            "--sparse {}: has no table for each of {} pages (--pages)",
            size::show(args.sparse),
            args.pages
        )));
    }
    let guests = [
        Pages {
            name: "dense",
            backing: memory(args.bytes)?,
            count: args.bytes / PAGE_SIZE,
            stride: 1,
        },
        Pages {
            name: "sparse",
            backing: sparse,
            count: args.pages,
            stride,
        },
    ];
    let formats =
        u64::from(args.format.includes::<Ept>()) + u64::from(args.format.includes::<Npt>());
    let progress = output.progress(formats * (guests.len() * Way::ALL.len()) as u64);
    let mut rows = Vec::new();
    for pages in &guests {
        for way in Way::ALL {
            progress.step(format!("{}, {}", pages.name, way.name()));
            if args.format.includes::<Ept>() {
                rows.push(guests::run::<Ept>(pages, way)?);
            }
            if args.format.includes::<Npt>() {
                rows.push(guests::run::<Npt>(pages, way)?);
            }
        }
    }
    drop(progress);
    let body = findings::Body::new(args, rows);
    body.tell(output);
    output.finish("memory", &body)?;
    body.verdict()
}
