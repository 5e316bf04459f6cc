//! VM teardown: private memory of a confidential guest is taken back, in both ways that there are.
//!
//! * *page by page* while vCPUs run in the guest: each page is blocked, the blocks are tracked, each page is removed; so are
//!   empty tables. With several threads removing, once with the library carrying their requests in one (*combined*), once
//!   without (*uncombined*), which is what threads that each call the module come to. Then the memory is filled again,
//!   from the same tables;
//! * *whole* after the guest's key is released: one call a page.

mod findings;
mod rounds;

use crate::confidential::args::ModuleArgs;
use crate::confidential::guest::verdict;
use crate::confidential::layout::Layout;
use crate::report::{Error, Output};
use crate::size::{self, PrivatePage};
use crate::sys;
use tdp_arch::{ENTRIES_PER_TABLE, PAGE_SIZE};

const ABOUT: &str = "\
Measures what it takes to get private memory of a confidential guest back from the model of the TDX module: calls for each
page, by kind, calls that the module answered with 'busy', and time.

'combined' and 'uncombined' remove page by page while vCPUs run in the guest on memory of their own: block, track, remove.
The module blocks under one lock of its whole table, so that threads which block at the same time refuse each other.
Combined, one thread carries the removals of all; uncombined, each makes its own calls. Afterwards the memory is filled
again, and must need no more tables than before. 'released' reclaims everything after the guest's key was released: one
call a page, in any order, no block and no track.";

const EXAMPLES: &str = "\
Examples:
  tdp-bench vm-teardown                                       64 MiB, 4 vCPUs, 4 removing threads, 5 us a call
  tdp-bench vm-teardown -b 1G --backend-cost 0 --json -
  tdp-bench vm-teardown --chunk 2M                            a removal for each table instead of one for a thread's share";

/// What it takes to get private memory back, while the guest runs and after its end
#[derive(Debug, clap::Args)]
#[command(long_about = ABOUT, after_help = EXAMPLES)]
pub struct Args {
    /// vCPUs that run meanwhile, a thread each
    #[arg(short = 'v', long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    vcpus: u16,

    /// Private memory that is taken back: bytes, or with K, M, G or T
    #[arg(short = 'b', long, value_name = "SIZE", default_value = "64M", value_parser = size::parse)]
    bytes: u64,

    /// Pages that it is mapped by
    #[arg(short = 's', long, value_enum, default_value_t = PrivatePage::FourK)]
    backing: PrivatePage,

    /// Threads that remove, each an equal part
    #[arg(short = 't', long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,

    /// What one removal takes [default: a thread's whole part]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    chunk: Option<u64>,

    /// Rounds
    #[arg(short = 'i', long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,

    #[command(flatten)]
    module: ModuleArgs,
}

impl Args {
    /// Frames that each thread removes, and in how large parts.
    fn parts(&self) -> Result<(u64, u64), Error> {
        let table = self.backing.level().bytes() * ENTRIES_PER_TABLE as u64;
        let whole = |flag: &str, bytes: u64, unit: u64, what: &str| {
            if bytes.is_multiple_of(unit) {
                Ok(bytes / PAGE_SIZE)
            } else {
                Err(Error::Usage(format!(
                    "{flag} {}: is not a multiple of {} ({what})",
                    size::show(bytes),
                    size::show(unit)
                )))
            }
        };
        // A table that two threads share would be nobody's to unlink.
        let frames = whole(
            "-b",
            self.bytes,
            table.saturating_mul(u64::from(self.threads)),
            "a table of pages for each thread, -t",
        )?;
        let share = frames / u64::from(self.threads);
        let chunk = match self.chunk {
            Some(bytes) => whole(
                "--chunk",
                bytes,
                self.backing.level().bytes(),
                "the page size, -s",
            )?,
            None => share,
        };
        Ok((share, chunk))
    }

    /// What is removed, and after it for each vCPU a table's worth that stays.
    fn layout(&self) -> Result<Layout, Error> {
        let level = self.backing.level();
        let own = level.pages() * ENTRIES_PER_TABLE as u64;
        let frames = self.bytes / PAGE_SIZE + own * u64::from(self.vcpus);
        Layout::new(frames, level, self.vcpus.max(self.threads)).ok_or_else(|| {
            Error::Usage(format!(
                "-b {}: is more than {} with what vCPUs run on",
                size::show(self.bytes),
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
/// the protected table is not as it should be, a frame was lost or tables were not used again.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    let parts = args.parts()?;
    let layout = args.layout()?;
    sys::wake_precisely().map_err(|e| Error::run("timer slack", e))?;
    let progress = output.progress(u64::from(args.rounds) * 2);
    let results = rounds::run(args, layout, parts, &progress)?;
    drop(progress);
    findings::tell(output, args, &results);
    let body = findings::Body::new(args, parts.1, &results);
    output.finish("vm-teardown", &body)?;
    let mut wrong = results.checks.wrong();
    if results.not_reused != 0 {
        wrong.push(format!(
            "{} tables were made anew instead of used again",
            results.not_reused
        ));
    }
    verdict(wrong)
}
