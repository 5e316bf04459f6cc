//! Instructions of the hot functions, counted and not timed: the same on a busy machine as on an idle one.
//!
//! The program runs itself under valgrind's callgrind, which counts what one function of it executes, everything that it calls
//! included (`callgrind`). A count is divided by the operations of the work. Counts are compared with those of a file, the *baseline*,
//! which names the compiler and the build that it is of: another compiler makes other code of the same source.
//!
//! What the count does not see: waiting for memory, for another processor, and the kernel.

mod baseline;
mod callgrind;

use crate::hot::{self, Hot};
use crate::report::{Error, Output};
use baseline::{Baseline, Change};
use serde::Serialize;
use std::path::PathBuf;

const ABOUT: &str = "\
Counts the instructions of hot functions, one operation each, by valgrind's callgrind, which must be installed. With --baseline they
are compared with those of a file, and what takes more by more than --limit per cent fails the run. Counts differ between compilers
and builds; of another compiler than the baseline's only a change of more than 15 per cent fails.";

const EXAMPLES: &str = "\
Examples:
  tdp-bench instructions
  tdp-bench instructions --baseline benches/instructions.json
  tdp-bench instructions --baseline benches/instructions.json --renew       after a change that is worth it

The baseline in the repository is of a build without whole-program optimisation, which takes a third of the time:
  export CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16
  cargo run --release -- instructions --baseline benches/instructions.json";

/// Instructions of hot functions, and what became more
#[derive(Debug, clap::Args)]
#[command(long_about = ABOUT, after_help = EXAMPLES)]
pub struct Args {
    /// Counts to compare with
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,

    /// Per cent that a count may be above the baseline's
    #[arg(long, value_name = "PERCENT", default_value_t = 3.0, value_parser = percent)]
    limit: f64,

    /// Write what was counted to the baseline instead
    #[arg(long, requires = "baseline")]
    renew: bool,

    /// Only do the work: callgrind is there already
    #[arg(long, hide = true, exclusive = true)]
    counted: bool,
}

/// Parses a share in per cent.
fn percent(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(percent) if (0.0..=1000.0).contains(&percent) => Ok(percent),
        _ => Err("not a share: write per cent, 0 to 1000".to_owned()),
    }
}

/// One function.
#[derive(Debug, Serialize)]
struct Count {
    group: &'static str,
    name: &'static str,
    operations: u64,
    instructions: u64,
    per_operation: f64,
    /// The baseline's, if it has one.
    before: Option<f64>,
}

/// The JSON body.
#[derive(Serialize)]
struct Body {
    toolchain: &'static str,
    target: &'static str,
    profile: &'static str,
    /// The baseline's compiler, if it is another one.
    other_toolchain: Option<String>,
    limit_percent: f64,
    results: Vec<Count>,
    changes: Vec<Change>,
}

/// Counts, and compares.
///
/// # Errors
///
/// [`Error::Run`] if valgrind is not there or fails, [`Error::Io`] and [`Error::Run`] for a baseline that cannot be read, and
/// [`Error::Check`] if a function takes more instructions than it may.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    let mut hot = hot::all()?;
    if args.counted {
        return callgrind::work(&mut hot);
    }
    // Said before the run, not after it.
    let before = match &args.baseline {
        Some(path) if !args.renew => Some(Baseline::read(path)?),
        _ => None,
    };
    let counts = callgrind::count(hot.len())?;
    let results = hot.iter().zip(counts);
    let results: Vec<Count> = results
        .map(|(hot, instructions)| Count::new(hot, instructions, before.as_ref()))
        .collect();
    let other = before.as_ref().and_then(Baseline::other_toolchain);
    let limit = match other {
        Some(_) => args.limit.max(baseline::OTHER_TOOLCHAIN_LIMIT),
        None => args.limit,
    };
    let changes = before.map_or_else(Vec::new, |before| before.changes(&results, limit));
    let body = Body {
        toolchain: baseline::TOOLCHAIN,
        target: baseline::TARGET,
        profile: baseline::PROFILE,
        other_toolchain: other,
        limit_percent: limit,
        results,
        changes,
    };
    body.tell(output);
    output.finish("instructions", &body)?;
    if let Some(path) = args.baseline.as_ref().filter(|_| args.renew) {
        Baseline::of(&body.results).write(path)?;
    }
    body.verdict()
}

impl Count {
    fn new(hot: &Hot, instructions: u64, before: Option<&Baseline>) -> Self {
        Self {
            group: hot.group,
            name: hot.name,
            operations: hot.operations,
            instructions,
            per_operation: instructions as f64 / hot.operations as f64,
            before: before.and_then(|before| before.of_function(hot.group, hot.name)),
        }
    }
}

impl Body {
    fn tell(&self, output: &Output) {
        output.say(format_args!(
            "Instructions an operation; {}, {}, {}",
            self.toolchain, self.target, self.profile
        ));
        output.table(
            &["", "", "instructions", "before", "change"],
            self.results.iter().map(|count| {
                let change = |before: f64| (count.per_operation / before - 1.0) * 100.0;
                [
                    count.group.to_owned(),
                    count.name.to_owned(),
                    format!("{:.2}", count.per_operation),
                    count.before.map_or_else(String::new, |n| format!("{n:.2}")),
                    count
                        .before
                        .map_or_else(String::new, |n| format!("{:+.1} %", change(n))),
                ]
            }),
        );
        if let Some(other) = &self.other_toolchain {
            output.say(format_args!(
                "The baseline is of another compiler, {other}: only changes of more than {} % count",
                self.limit_percent
            ));
        }
        for change in self.changes.iter().filter(|change| !change.fails()) {
            output.say(change);
        }
    }

    /// # Errors
    ///
    /// [`Error::Check`] with everything that takes too much.
    fn verdict(&self) -> Result<(), Error> {
        let failed = self.changes.iter().filter(|change| change.fails());
        let failed: Vec<_> = failed.map(ToString::to_string).collect();
        if failed.is_empty() {
            Ok(())
        } else {
            Err(Error::Check(failed.join("; ")))
        }
    }
}
