//! Placeholder that only keeps the crate compiling until the replay scenario is written.

use crate::report::{Error, Output};

/// Replays recorded guest page faults.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the scenario.
///
/// # Errors
///
/// Always: not written yet.
pub fn run(_args: &Args, _output: &Output) -> Result<(), Error> {
    Err(Error::Usage("replay: not written yet".to_owned()))
}
