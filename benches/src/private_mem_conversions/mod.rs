//! Private memory conversions: threads make guest memory private and shared, to and fro, while vCPUs of the guest use it.
//!
//! The guest runs on the model of the TDX module: its vCPUs enter it, touch memory of both halves through software
//! processors that cache translations until they are flushed, accept what is pending, leave for what is not there. Another
//! thread looks all the time whether any frame is mapped by both halves. The run is cut into slices; between them nobody is
//! at work, and everything is compared.
//!
//! * `storm` is that;
//! * `disjoint` has two threads convert and remove private ranges of their own while two others fault in theirs, and counts
//!   how often one had to wait for another;
//! * `findings` makes tables and JSON of both.

mod disjoint;
mod findings;
mod storm;

use crate::confidential::args::ModuleArgs;
use crate::confidential::guest::verdict;
use crate::confidential::layout::Layout;
use crate::report::{Error, Output};
use crate::size::{self, PrivatePage};
use crate::sys;
use std::time::Duration;
use tdp_arch::PAGE_SIZE;

const ABOUT: &str = "\
Converts memory of a confidential guest between private and shared while its vCPUs use it, on the model of the TDX module,
and checks that every frame is mapped by one half at most, that the protected table equals the library's, and that the
module saw no call out of order. With --busy-rate and --fail-rate the module refuses calls at random; whatever is refused
must leave everything as it was.

A conversion that the module refused is counted under 'failed' and left; the memory stays private. 'waits' are times that a
thread met an entry that another owned ('frozen'), found another carrying removals ('carrier'; 'carried'
if that one did its own too), waited for a ticket that another tended ('tickets'), or was told to try again.

A last phase has two threads convert and remove private ranges of their own while two others fault in theirs: on a module
that does not serialise its calls nobody may wait for anybody. The TDX module blocks under one lock of its table; what that
makes others wait for is reported beside it.";

const EXAMPLES: &str = "\
Examples:
  tdp-bench private-mem-conversions
  tdp-bench private-mem-conversions -v 4 -b 64M --busy-rate 0.05 --fail-rate 0.01 --seconds 5 --json -
  tdp-bench private-mem-conversions -s 2m --backend-cost 0      whole large pages, calls for nothing";

/// Memory made private and shared, to and fro, while vCPUs use it
#[derive(Debug, clap::Args)]
#[command(long_about = ABOUT, after_help = EXAMPLES)]
pub struct Args {
    /// vCPUs that use the memory, a thread each
    #[arg(short = 'v', long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    vcpus: u16,

    /// Guest memory for each vCPU: bytes, or with K, M, G or T. All of them use all of it
    #[arg(short = 'b', long, value_name = "SIZE", default_value = "64M", value_parser = size::parse)]
    bytes: u64,

    /// What one conversion takes
    #[arg(short = 's', long, value_enum, default_value_t = PrivatePage::FourK)]
    chunk: PrivatePage,

    /// Pages that back guest memory. Larger ones than the chunk are split
    #[arg(long, value_enum, default_value_t = PrivatePage::TwoM)]
    backing: PrivatePage,

    /// Threads that convert
    #[arg(short = 't', long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,

    /// How long
    #[arg(long, value_name = "N", default_value_t = 5.0, value_parser = seconds)]
    seconds: f64,

    /// Also zap, write-protect, age, split, collapse and invalidate shared memory meanwhile
    #[arg(long)]
    sweeps: bool,

    #[command(flatten)]
    module: ModuleArgs,
}

/// Parses a time in seconds.
pub(crate) fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.01..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err("not a time: write seconds, 0.01 to 86400".to_owned()),
    }
}

impl Args {
    fn duration(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    fn layout(&self) -> Result<Layout, Error> {
        let large = self.chunk.level().max(self.backing.level());
        if !self.bytes.is_multiple_of(large.bytes()) {
            return Err(Error::Usage(format!(
                "-b {}: is not a multiple of {} (-s, --backing)",
                size::show(self.bytes),
                size::show(large.bytes())
            )));
        }
        let frames = (self.bytes / PAGE_SIZE).saturating_mul(u64::from(self.vcpus));
        // Threads that convert ask for tables too.
        let threads = self.vcpus + self.threads;
        Layout::new(frames, self.backing.level(), threads).ok_or_else(|| {
            Error::Usage(format!(
                "-v {} -b {}: is more than {} in all",
                self.vcpus,
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
/// a frame was mapped by both halves, the protected table is not as it should be, or a frame was lost.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    let layout = args.layout()?;
    sys::wake_precisely().map_err(|e| Error::run("timer slack", e))?;
    let progress = output.progress(storm::slices(args) + 2);
    let mut storm = storm::run(args, layout, &progress)?;
    let disjoint = disjoint::run(args, &mut storm.checks, &progress)?;
    drop(progress);
    findings::tell(output, args, &storm, &disjoint);
    let body = findings::Body::new(args, &storm, &disjoint);
    output.finish("private-mem-conversions", &body)?;
    let mut wrong = storm.checks.wrong();
    let mut note = |count: u64, what: &str| {
        if count != 0 {
            wrong.push(format!("{count} {what}"));
        }
    };
    note(storm.double_mapped, "frames were mapped by both halves");
    note(
        storm.misplaced,
        "frames were mapped by the half that they are not of",
    );
    note(
        disjoint.null.waits.sum(),
        "waits for each other on a module that does not serialise",
    );
    verdict(wrong)
}

/// A line that names nothing, for the defaults.
#[derive(clap::Parser)]
struct Defaults {
    #[command(flatten)]
    args: Args,
}

/// Conversions under sweeps of the shared half, as another scenario wants them.
#[derive(Debug, serde::Serialize)]
pub(crate) struct UnderSweeps {
    accesses: u64,
    conversions: u64,
    sweeps: u64,
    misplaced: u64,
    double_mapped: u64,
    checks: crate::confidential::guest::Checks,
}

impl UnderSweeps {
    pub(crate) fn mismatches(&self) -> u64 {
        self.misplaced + self.checks.different + self.checks.books_wrong
    }

    pub(crate) fn double_mapped(&self) -> u64 {
        self.double_mapped
    }

    pub(crate) fn leaked_frames(&self) -> u64 {
        self.checks.leaked_frames
    }

    pub(crate) fn audit_violations(&self) -> u64 {
        self.checks.audit_violations.unwrap_or(0)
    }
}

impl std::fmt::Display for UnderSweeps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "confidential: {} accesses, {} conversions, {} sweeps of the shared half, {} entries compared with the protected \
             table",
            self.accesses, self.conversions, self.sweeps, self.checks.compared
        )
    }
}

/// Runs conversions and accesses of `vcpus` vCPUs for `time`, while the shared half is swept.
///
/// # Errors
///
/// As [`run`], but what was found to be wrong is only told.
pub(crate) fn under_sweeps(vcpus: u16, time: Duration, seed: u64) -> Result<UnderSweeps, Error> {
    use clap::Parser;
    let Defaults { mut args } =
        Defaults::try_parse_from(["private-mem-conversions", "-b", "4M", "--backend-cost", "0"])
            .map_err(|e| Error::Usage(e.to_string()))?;
    (args.vcpus, args.seconds, args.sweeps) = (vcpus, time.as_secs_f64(), true);
    args.module.seed = seed;
    let layout = args.layout()?;
    let progress = Output::new(None)?.progress(storm::slices(&args));
    let storm = storm::run(&args, layout, &progress)?;
    Ok(UnderSweeps {
        accesses: storm.accesses.made,
        conversions: storm.conversions.done(),
        sweeps: storm.sweeps,
        misplaced: storm.misplaced,
        double_mapped: storm.double_mapped,
        checks: storm.checks,
    })
}
