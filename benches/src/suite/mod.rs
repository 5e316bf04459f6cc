//! All scenarios in one run, and one report of them.
//!
//! A round runs every scenario once, so that a slow spell of the machine meets all of them, and so that what drifts shows as
//! spread and not as somebody's figure. Of each scenario's report the numbers that [`PLAN`] names are its figures; each
//! has one value a round.
//!
//! * `plan` says what is run and what is taken from it;
//! * `figures` takes it;
//! * `page` makes a file of HTML of it, and `plot` the drawings therein.

mod figures;
mod page;
mod plan;
mod plot;

pub use figures::{Figure, Spread};
pub use plan::{PLAN, Pick, Scenario};
pub(crate) use plot::short;

use crate::cli;
use crate::report::{Error, Machine, Output};
use figures::Collected;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

const ABOUT: &str = "\
Runs every scenario against all of its baselines, round after round, and writes DIR/report.html, one file with tables and
plots that opens without a network, and DIR/report.json with every figure of every round, for 'tdp-bench compare'.

A scenario whose checks fail is told at the end and in the report, and the others go on.";

const EXAMPLES: &str = "\
Examples:
  tdp-bench suite --quick --out report             about three minutes
  tdp-bench suite --out report                     half an hour
  tdp-bench suite --quick --only sweeps,memslot-perf -i 3 --out report
  tdp-bench compare before/report.json after/report.json";

/// All scenarios against all baselines, and a report of them
#[derive(Debug, clap::Args)]
#[command(long_about = ABOUT, after_help = EXAMPLES)]
pub struct Args {
    /// Less memory, fewer rounds
    #[arg(long)]
    quick: bool,

    /// Folder of the report, made if it is not there
    #[arg(short = 'o', long, value_name = "DIR")]
    out: PathBuf,

    /// Rounds; in each, every scenario runs once [default: 9, with --quick 15]
    #[arg(short = 'i', long, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: Option<u16>,

    /// Scenarios to run [default: all]
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = named())]
    only: Vec<String>,
}

/// The names of the plan, each subcommand standing for all of its lines.
fn named() -> clap::builder::PossibleValuesParser {
    let mut names: Vec<&str> = PLAN.iter().map(|scenario| scenario.command).collect();
    names.dedup();
    names.into()
}

/// The report. Read again by `compare`.
#[derive(Debug, Deserialize, Serialize)]
pub struct Body {
    /// Of the source tree that the program was built in, as it is when the suite runs.
    pub commit: Option<String>,
    /// Seconds since 1970 at the start.
    pub started: u64,
    /// How long it took.
    pub seconds: f64,
    /// Whether with less memory.
    pub quick: bool,
    /// Rounds.
    pub rounds: u16,
    /// In the order of a round.
    pub scenarios: Vec<Told>,
}

/// What one scenario came to.
#[derive(Debug, Deserialize, Serialize)]
pub struct Told {
    /// Its heading.
    pub name: String,
    /// What it tells.
    pub about: String,
    /// Its command line.
    pub command: String,
    /// Its parameters, by its own report.
    #[serde(default)]
    pub parameters: Value,
    /// What it verified in the last round.
    #[serde(default)]
    pub checks: Value,
    /// Errors, each with its round.
    #[serde(default)]
    pub errors: Vec<String>,
    /// Its figures.
    pub figures: Vec<Figure>,
}

/// A scenario between rounds.
struct Running {
    scenario: &'static Scenario,
    line: String,
    collected: Collected,
    last: Value,
    errors: Vec<String>,
}

/// Runs the suite.
///
/// # Errors
///
/// [`Error::Usage`] for a folder that cannot be, [`Error::Io`] if it cannot be written to, and [`Error::Check`] if a
/// scenario failed.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    // Said before the run, not after it.
    fs::create_dir_all(&args.out).map_err(|e| Error::io(&args.out, e))?;
    let json = Output::new(Some(&args.out.join("report.json")))?;
    let html = args.out.join("report.html");
    write(&html, "")?;
    let rounds = args.rounds.unwrap_or(if args.quick { 15 } else { 9 });
    let mut running: Vec<_> = PLAN
        .iter()
        .filter(|it| args.only.is_empty() || args.only.iter().any(|name| name == it.command))
        .map(|scenario| Running::new(scenario, args.quick))
        .collect();

    let (started, begin) = (SystemTime::now(), Instant::now());
    let progress = output.progress(u64::from(rounds) * running.len() as u64);
    for round in 1..=rounds {
        for it in &mut running {
            progress.step(format!("round {round}: {}", it.scenario.name));
            it.round(round);
        }
    }
    drop(progress);

    let body = Body {
        commit: commit(),
        started: started
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
        seconds: begin.elapsed().as_secs_f64(),
        quick: args.quick,
        rounds,
        scenarios: running.iter().map(Running::told).collect(),
    };
    json.finish("suite", &body)?;
    write(&html, &page::render(&body, &Machine::detect())?)?;
    output.finish("suite", &body)?;
    tell(output, &body, &html);
    verdict(&body)
}

impl Running {
    fn new(scenario: &'static Scenario, quick: bool) -> Self {
        let args = if quick { scenario.quick } else { scenario.full };
        Self {
            scenario,
            line: format!("{} {args}", scenario.command),
            collected: Collected::default(),
            last: Value::Null,
            errors: Vec::new(),
        }
    }

    fn round(&mut self, round: u16) {
        let output = Output::keeping();
        if let Err(error) = cli::run_line(&self.line, &output) {
            self.errors.push(format!("round {round}: {error}"));
        }
        // Scenarios report before they fail by a check.
        if let Some(report) = output.kept() {
            self.collected.add(self.scenario, &report);
            self.last = report;
        }
    }

    fn told(&self) -> Told {
        let part = |key| self.last.get(key).cloned().unwrap_or(Value::Null);
        Told {
            name: self.scenario.name.to_owned(),
            about: self.scenario.about.to_owned(),
            command: format!("tdp-bench {}", self.line),
            parameters: part("parameters"),
            checks: part("checks"),
            errors: self.errors.clone(),
            figures: self.collected.figures(),
        }
    }
}

/// Prints what there is and where.
fn tell(output: &Output, body: &Body, html: &Path) {
    let figures: usize = body.scenarios.iter().map(|told| told.figures.len()).sum();
    output.say(format_args!(
        "{} scenarios, {figures} figures, {} rounds in {:.0} s: {}",
        body.scenarios.len(),
        body.rounds,
        body.seconds,
        html.display()
    ));
}

/// # Errors
///
/// [`Error::Check`] with the first failure of each scenario that failed.
fn verdict(body: &Body) -> Result<(), Error> {
    let failed: Vec<_> = body
        .scenarios
        .iter()
        .filter_map(|told| Some(format!("{}: {}", told.name, told.errors.first()?)))
        .collect();
    if failed.is_empty() {
        Ok(())
    } else {
        Err(Error::Check(failed.join("; ")))
    }
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    fs::write(path, text).map_err(|e| Error::io(path, e))
}

/// The commit of the source tree, if it is there and git is.
fn commit() -> Option<String> {
    let git = Command::new("git")
        .args(["-C", env!("CARGO_MANIFEST_DIR")])
        .args(["describe", "--always", "--dirty", "--abbrev=12"])
        .output()
        .ok()?;
    let text = String::from_utf8(git.stdout).ok()?;
    let text = text.trim();
    (git.status.success() && !text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_told_with_its_round_and_the_others_go_on() {
        let mut running: Vec<_> = PLAN[..2].iter().map(|it| Running::new(it, true)).collect();
        running[0].line = "demand-paging -b 4M -i 1 --against none --pool 4K".to_owned();
        running[1].line = "demand-paging -b 4M -i 1 --against none".to_owned();
        for it in &mut running {
            it.round(3);
        }
        let body = Body {
            commit: None,
            started: 0,
            seconds: 0.0,
            quick: true,
            rounds: 3,
            scenarios: running.iter().map(Running::told).collect(),
        };
        let told = verdict(&body).unwrap_err().to_string();
        assert!(
            told.starts_with("demand-paging: round 3: ") && told.contains("exhausted"),
            "{told}"
        );
        assert!(body.scenarios[0].figures.is_empty());
        assert!(!body.scenarios[1].figures.is_empty() && body.scenarios[1].errors.is_empty());
    }
}
