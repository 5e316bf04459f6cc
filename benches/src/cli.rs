//! The command line: one subcommand a scenario.
//!
//! Exit codes: 0 the run went well, 1 it failed (a check, memory, a file), 2 wrong usage. An error is one line on
//! standard error that names the thing.

use crate::report::{Error, Output};
use crate::{
    access_tracking_perf, compare, conflicts, constant, demand_paging, dirty_log_perf,
    instructions, interference, memory, memslot_modification_stress, memslot_perf, mmu_stress,
    nx_huge_pages_perf, pre_fault_memory, private_faults, private_mem_conversions, replay, scaling,
    soak, suite, sweeps, vm_teardown,
};
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

const AFTER_HELP: &str = "\
Figures are nanoseconds per operation unless they say otherwise. They differ between machines; the ratios of
contenders measured in one run carry over.

Examples:
  tdp-bench demand-paging                                   a first look, a few seconds, and a Linux boot replayed
  tdp-bench demand-paging -v 2 -b 1G -f both --json out.json
  tdp-bench replay benches/testdata
  tdp-bench suite --quick --out report                      all scenarios, a report to look at
  tdp-bench private-faults -v 64 --backend-cost 1ms --backend-wait sleep     calls of a trusted module overlap";

#[derive(Debug, Parser)]
#[command(name = "tdp-bench", version, about = "Benchmarks of the tdp lock-free two-dimensional-paging MMU", after_help = AFTER_HELP)]
struct Cli {
    /// Write the results, raw nanoseconds included, as JSON to FILE, or to standard output with '-' (the readable
    /// table then goes to standard error)
    #[arg(long, global = true, value_name = "FILE|-", help_heading = "Output")]
    json: Option<PathBuf>,
    #[command(subcommand)]
    scenario: Scenario,
}

#[derive(Debug, Subcommand)]
enum Scenario {
    DemandPaging(demand_paging::Args),
    PreFaultMemory(pre_fault_memory::Args),
    PrivateFaults(private_faults::Args),
    PrivateMemConversions(private_mem_conversions::Args),
    VmTeardown(vm_teardown::Args),
    AccessTrackingPerf(access_tracking_perf::Args),
    MemslotPerf(memslot_perf::Args),
    MemslotModificationStress(memslot_modification_stress::Args),
    NxHugePagesPerf(nx_huge_pages_perf::Args),
    DirtyLogPerf(dirty_log_perf::Args),
    MmuStress(mmu_stress::Args),
    Soak(soak::Args),
    Sweeps(sweeps::Args),
    Interference(interference::Args),
    Constant(constant::Args),
    Replay(replay::Args),
    Conflicts(conflicts::Args),
    Scaling(scaling::Args),
    #[command(hide = true)]
    Traced(conflicts::TracedArgs),
    Memory(memory::Args),
    Suite(suite::Args),
    Compare(compare::Args),
    Instructions(instructions::Args),
}

impl Scenario {
    fn run(&self, output: &Output) -> Result<(), Error> {
        match self {
            Self::DemandPaging(args) => demand_paging::run(args, output),
            Self::PreFaultMemory(args) => pre_fault_memory::run(args, output),
            Self::PrivateFaults(args) => private_faults::run(args, output),
            Self::PrivateMemConversions(args) => private_mem_conversions::run(args, output),
            Self::VmTeardown(args) => vm_teardown::run(args, output),
            Self::AccessTrackingPerf(args) => access_tracking_perf::run(args, output),
            Self::MemslotPerf(args) => memslot_perf::run(args, output),
            Self::MemslotModificationStress(args) => memslot_modification_stress::run(args, output),
            Self::NxHugePagesPerf(args) => nx_huge_pages_perf::run(args, output),
            Self::DirtyLogPerf(args) => dirty_log_perf::run(args, output),
            Self::MmuStress(args) => mmu_stress::run(args, output),
            Self::Soak(args) => soak::run(args, output),
            Self::Sweeps(args) => sweeps::run(args, output),
            Self::Interference(args) => interference::run(args, output),
            Self::Constant(args) => constant::run(args, output),
            Self::Replay(args) => replay::run(args, output),
            Self::Scaling(args) => scaling::run(args, output),
            Self::Conflicts(args) => conflicts::run(args, output),
            Self::Traced(args) => conflicts::run_traced(args),
            Self::Memory(args) => memory::run(args, output),
            Self::Suite(args) => suite::run(args, output),
            Self::Compare(args) => compare::run(args, output),
            Self::Instructions(args) => instructions::run(args, output),
        }
    }
}

/// Runs the scenario of `line`, a command line without the program's name.
///
/// # Errors
///
/// As the scenario, and [`Error::Usage`] if `line` is wrong.
pub(crate) fn run_line(line: &str, output: &Output) -> Result<(), Error> {
    let words = std::iter::once("tdp-bench").chain(line.split_whitespace());
    let cli = Cli::try_parse_from(words).map_err(|e| Error::Usage(one_line(&e)))?;
    cli.scenario.run(output)
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    run(std::env::args_os())
}

/// Runs the command line `args`, the program's name included.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let (cli, demo) = match parse(args) {
        Ok(parsed) => parsed,
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
            ) =>
        {
            // A reader that went away is not an error.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(&Error::Usage(one_line(&error))),
    };
    let outcome = Output::new(cli.json.as_deref()).and_then(|output| {
        cli.scenario.run(&output)?;
        if demo { replay::demo(&output) } else { Ok(()) }
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

/// What `args` ask for, and whether it is the demonstration.
fn parse(args: impl IntoIterator<Item = OsString>) -> clap::error::Result<(Cli, bool)> {
    let matches = Cli::command().try_get_matches_from(args)?;
    Ok((Cli::from_arg_matches(&matches)?, is_demo(&matches)))
}

/// Reads the command line `args`, the program's name included, and runs nothing.
///
/// # Errors
///
/// What is wrong with it; also where all that it asks for is help.
pub fn check(args: impl IntoIterator<Item = OsString>) -> Result<(), Error> {
    parse(args)
        .map(|_| ())
        .map_err(|error| Error::Usage(one_line(&error)))
}

/// Whether the command line is `demand-paging` and nothing else: a first look, which shows a real guest as well.
fn is_demo(matches: &ArgMatches) -> bool {
    matches.subcommand().is_some_and(|(name, scenario)| {
        name == "demand-paging"
            && scenario
                .ids()
                .all(|id| scenario.value_source(id.as_str()) != Some(ValueSource::CommandLine))
    })
}

fn fail(error: &Error) -> ExitCode {
    // Nowhere left to complain to if standard error is gone.
    let _ = writeln!(
        io::stderr(),
        "error: {}",
        error.to_string().replace('\n', " ")
    );
    error.exit_code()
}

/// Clap's message on one line: what is wrong and, if it has one, its tip; not the usage.
fn one_line(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "no scenario given; try --help".to_owned();
    }
    let text = error.render().to_string();
    let told: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty())
        .collect();
    let told = told.join(" ");
    told.strip_prefix("error: ").unwrap_or(&told).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_suite_leaves_no_scenario_out() {
        let command = Cli::command();
        let mut left: Vec<_> = command.get_subcommands().map(|c| c.get_name()).collect();
        for scenario in suite::PLAN {
            for args in [scenario.quick, scenario.full] {
                let line = format!("tdp-bench {} {args}", scenario.command);
                let parsed = Cli::try_parse_from(line.split_whitespace());
                assert!(parsed.is_ok(), "{line}: {parsed:?}");
            }
            left.retain(|name| *name != scenario.command);
        }
        // What takes no time that could be compared.
        let timeless = [
            "soak",
            "replay",
            "conflicts",
            "traced",
            "suite",
            "compare",
            "instructions",
        ];
        assert_eq!(left, timeless);
    }
}
