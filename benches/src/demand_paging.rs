//! stub
use crate::report::{Error, Output};
/// x
#[derive(Debug, clap::Args)]
pub struct Args {}
/// x
pub fn run(_: &Args, _: &Output) -> Result<(), Error> { Ok(()) }
