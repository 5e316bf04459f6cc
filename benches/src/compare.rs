//! Two reports of the suite, figure by figure.
//!
//! A figure of one report over that of the other, by their medians. The spread of that ratio goes from the lower quartile of the one over
//! the upper of the other to the upper over the lower; two figures *differ* if 1 is outside of it.

use crate::report::{Error, Output};
use crate::suite::{self, Figure, Spread};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

const ABOUT: &str = "\
Compares two reports of 'tdp-bench suite', figure by figure: the second's median over the first's, and how far that ratio is spread
by the quartiles of both. What differs by more than its spread is marked 'better' or 'worse'. With many figures some do so by
chance; a change that is real shows again.";

const EXAMPLES: &str = "\
Examples:
  tdp-bench compare before/report.json after/report.json
  tdp-bench compare before/report.json after/report.json --different --json -";

/// Two reports of the suite, figure by figure
#[derive(Debug, clap::Args)]
#[command(long_about = ABOUT, after_help = EXAMPLES)]
pub struct Args {
    /// The report to compare with
    #[arg(value_name = "A.json")]
    before: PathBuf,

    /// The report that is compared
    #[arg(value_name = "B.json")]
    after: PathBuf,

    /// Show only what differs by more than its spread
    #[arg(long)]
    different: bool,
}

/// A report of the suite, as far as it is read.
#[derive(Deserialize)]
struct Report {
    scenario: String,
    #[serde(flatten)]
    body: Option<suite::Body>,
}

/// The JSON body.
#[derive(Serialize)]
struct Body {
    rows: Vec<Row>,
    /// How many differ for the better, and for the worse.
    better: usize,
    worse: usize,
    /// Figures that only one of them has.
    unmatched: usize,
}

/// One figure.
#[derive(Serialize)]
struct Row {
    scenario: String,
    name: String,
    unit: String,
    before: f64,
    after: f64,
    ratio: f64,
    lower: f64,
    upper: f64,
    verdict: Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Same,
    Better,
    Worse,
}

/// Compares the two.
///
/// # Errors
///
/// [`Error::Io`] for a file that cannot be read, [`Error::Run`] for one that is no report of the suite, and [`Error::Check`] if
/// no figure is in both.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    let (before, after) = (read(&args.before)?, read(&args.after)?);
    let body = Body::new(&before, &after);
    if body.rows.is_empty() {
        return Err(Error::Check(format!(
            "{} and {} have no figure in common",
            args.before.display(),
            args.after.display()
        )));
    }
    body.tell(output, args, [&before, &after]);
    output.finish("compare", &body)
}

fn read(path: &Path) -> Result<suite::Body, Error> {
    let text = fs::read(path).map_err(|e| Error::io(path, e))?;
    let failed = |why: String| Error::run(path.display().to_string(), why);
    let report: Report = serde_json::from_slice(&text)
        .map_err(|e| failed(format!("no report of the suite: {e}")))?;
    match (report.scenario.as_str(), report.body) {
        ("suite", Some(body)) => Ok(body),
        ("suite", None) => Err(failed(
            "no report of the suite: it has no figures".to_owned(),
        )),
        (other, _) => Err(failed(format!("no report of the suite, but of {other}"))),
    }
}

impl Body {
    fn new(before: &suite::Body, after: &suite::Body) -> Self {
        let mut rows = Vec::new();
        let mut unmatched = 0;
        for told in &before.scenarios {
            let other = after.scenarios.iter().find(|it| it.name == told.name);
            let mut common = 0;
            for figure in &told.figures {
                let counterpart = other.and_then(|other| {
                    let fits = |it: &&Figure| it.name == figure.name && it.unit == figure.unit;
                    other.figures.iter().find(fits)
                });
                match counterpart.and_then(|after| Row::new(&told.name, figure, after)) {
                    Some(row) => {
                        rows.push(row);
                        common += 1;
                    }
                    None => unmatched += 1,
                }
            }
            unmatched += other.map_or(0, |other| other.figures.len().saturating_sub(common));
        }
        let of = |verdict| rows.iter().filter(|row| row.verdict == verdict).count();
        Self {
            better: of(Verdict::Better),
            worse: of(Verdict::Worse),
            unmatched,
            rows,
        }
    }

    fn tell(&self, output: &Output, args: &Args, reports: [&suite::Body; 2]) {
        for (path, report) in [&args.before, &args.after].into_iter().zip(reports) {
            output.say(format_args!(
                "{}: {}, {} rounds{}",
                path.display(),
                report.commit.as_deref().unwrap_or("source not known"),
                report.rounds,
                if report.quick { ", quick" } else { "" }
            ));
        }
        let shown = |row: &&Row| !args.different || row.verdict != Verdict::Same;
        output.table(
            &[
                "", "figure", "unit", "before", "after", "ratio", "spread", "",
            ],
            self.rows.iter().filter(shown).map(|row| {
                [
                    row.scenario.clone(),
                    row.name.clone(),
                    row.unit.clone(),
                    suite::short(row.before),
                    suite::short(row.after),
                    format!("{:.3}", row.ratio),
                    format!("{:.3} - {:.3}", row.lower, row.upper),
                    match row.verdict {
                        Verdict::Same => "",
                        Verdict::Better => "better",
                        Verdict::Worse => "worse",
                    }
                    .to_owned(),
                ]
            }),
        );
        output.say(format_args!(
            "{} figures; {} differ by more than their spread: {} for the better, {} for the worse; {} are in one report only",
            self.rows.len(),
            self.better + self.worse,
            self.better,
            self.worse,
            self.unmatched
        ));
    }
}

impl Row {
    /// `None` if there is nothing to divide.
    fn new(scenario: &str, before: &Figure, after: &Figure) -> Option<Self> {
        // By the values: what a file says about itself need not be so.
        let (a, b) = (Spread::of(&before.values)?, Spread::of(&after.values)?);
        let ratio = over(b.median, a.median)?;
        let (lower, upper) = (over(b.lower, a.upper)?, over(b.upper, a.lower)?);
        let verdict = if (lower..=upper).contains(&1.0) {
            Verdict::Same
        } else if (ratio > 1.0) == before.more_is_better {
            Verdict::Better
        } else {
            Verdict::Worse
        };
        Some(Self {
            scenario: scenario.to_owned(),
            name: before.name.clone(),
            unit: before.unit.clone(),
            before: a.median,
            after: b.median,
            ratio,
            lower,
            upper,
            verdict,
        })
    }
}

/// Nothing over nothing is the same.
fn over(above: f64, below: f64) -> Option<f64> {
    if above == below {
        return Some(1.0);
    }
    Some(above / below).filter(|ratio| ratio.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(more_is_better: bool, before: &[f64], after: &[f64]) -> Option<Verdict> {
        let figure = |values: &[f64]| Figure {
            name: "x".to_owned(),
            unit: "ns".to_owned(),
            more_is_better,
            values: values.to_vec(),
            // Not to be trusted.
            spread: Spread::of(&[7.0]).unwrap(),
        };
        Row::new("x", &figure(before), &figure(after)).map(|row| row.verdict)
    }

    #[test]
    fn what_is_outside_of_the_spread_differs() {
        let before = [10.0, 10.0, 11.0, 12.0, 30.0];
        for (after, less_is_better) in [
            ([11.0, 10.0, 12.0, 10.5, 11.5], Verdict::Same),
            ([13.0, 13.0, 14.0, 14.0, 1.0], Verdict::Worse),
            ([5.0, 5.0, 6.0, 6.0, 90.0], Verdict::Better),
        ] {
            let more_is_better = match less_is_better {
                Verdict::Same => Verdict::Same,
                Verdict::Better => Verdict::Worse,
                Verdict::Worse => Verdict::Better,
            };
            assert_eq!(verdict(false, &before, &after), Some(less_is_better));
            assert_eq!(verdict(true, &before, &after), Some(more_is_better));
        }
    }

    #[test]
    fn there_is_no_ratio_to_nothing() {
        assert_eq!(verdict(false, &[0.0, 0.0], &[1.0, 1.0]), None);
        assert_eq!(
            verdict(false, &[0.0, 0.0], &[0.0, 0.0]),
            Some(Verdict::Same)
        );
        assert_eq!(verdict(false, &[], &[1.0]), None);
    }
}
