//! What every scenario shares: typed errors with exit codes, the human-readable output, progress and the JSON file.
//!
//! A scenario is a module with `Args` (a [`clap::Args`]) and `run(&Args, &Output) -> Result<(), Error>`. It says what
//! it finds through [`Output`], hands its JSON body to [`Output::finish`] once, and only then returns an error for
//! checks that failed, so that the JSON of a failed run is there to look at.
//!
//! Human-readable text goes to standard output, and to standard error if the JSON goes to standard output.

use crate::sys;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::Value;
use std::fmt::Display;
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Why a scenario did not succeed. Its text is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The arguments make no sense, alone or together. Exit code 2.
    #[error("{0}")]
    Usage(String),
    /// A check of the run's outcome failed. Exit code 1.
    #[error("{0}")]
    Check(String),
    /// Something below failed. Exit code 1.
    #[error("{context}: {source}")]
    Run {
        /// What was being done.
        context: String,
        /// What stood in the way.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A file could not be read or written. Exit code 1.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

impl Error {
    /// An error of something below, with what was being done.
    pub fn run(
        context: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Run {
            context: context.into(),
            source: source.into(),
        }
    }

    /// An error about a file.
    pub fn io(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io {
            path: path.into(),
            source,
        }
    }

    /// 2 for wrong usage, 1 for a failed run.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Usage(_) => ExitCode::from(2),
            Self::Check(_) | Self::Run { .. } | Self::Io { .. } => ExitCode::from(1),
        }
    }
}

/// Where the JSON goes.
#[derive(Debug)]
enum Json {
    None,
    Stdout,
    File(PathBuf),
    /// For another scenario, which runs this one and says what there is to say.
    Kept(Mutex<Option<Value>>),
}

/// Where a scenario's findings go.
#[derive(Debug)]
pub struct Output {
    json: Json,
}

/// The envelope of every JSON report.
#[derive(Serialize)]
struct Report<'a, B> {
    scenario: &'a str,
    version: &'static str,
    machine: Machine,
    #[serde(flatten)]
    body: &'a B,
}

/// What the figures were measured on.
#[derive(Serialize)]
pub(crate) struct Machine {
    pub(crate) cpus: usize,
    pub(crate) model: Option<String>,
    pub(crate) kernel: Option<String>,
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) build: &'static str,
}

impl Machine {
    pub(crate) fn detect() -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = info
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(key, _)| key.trim() == "model name")
            .map(|(_, value)| value.trim().to_owned());
        Self {
            cpus: std::thread::available_parallelism().map_or(1, Into::into),
            model,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
                .ok()
                .map(|release| release.trim().to_owned()),
            memory_bytes: sys::total_memory(),
            build: if cfg!(debug_assertions) {
                "debug"
            } else {
                "release"
            },
        }
    }
}

impl Output {
    /// Output with its JSON to `json`: a file, or `-` for standard output.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] if `json` cannot be a file to write: a folder, or in a folder that does not exist. It is said
    /// before the run, not after it.
    pub fn new(json: Option<&Path>) -> Result<Self, Error> {
        let json = match json {
            None => Json::None,
            Some(path) if path == Path::new("-") => Json::Stdout,
            Some(path) => {
                let parent = path
                    .parent()
                    .filter(|p| !p.as_os_str().is_empty())
                    .unwrap_or(Path::new("."));
                if path.is_dir() {
                    return Err(Error::Usage(format!(
                        "--json {}: is a folder",
                        path.display()
                    )));
                }
                if !parent.is_dir() {
                    return Err(Error::Usage(format!(
                        "--json {}: no such folder",
                        path.display()
                    )));
                }
                Json::File(path.to_owned())
            }
        };
        Ok(Self { json })
    }

    /// Output that shows nothing and keeps its JSON for [`kept`](Self::kept).
    pub fn keeping() -> Self {
        Self {
            json: Json::Kept(Mutex::new(None)),
        }
    }

    /// The report that was kept, if it came to one.
    pub fn kept(self) -> Option<Value> {
        match self.json {
            Json::Kept(report) => report.into_inner(),
            _ => None,
        }
    }

    /// Prints a line. A reader that went away is not an error.
    pub fn say(&self, line: impl Display) {
        // The JSON or the exit code still tells how the run went.
        let _ = match self.json {
            Json::Kept(_) => Ok(()),
            Json::Stdout => writeln!(io::stderr(), "{line}"),
            _ => writeln!(io::stdout(), "{line}"),
        };
    }

    /// Prints a table: the first column to the left, figures to the right.
    pub fn table<R>(&self, header: &[&str], rows: impl IntoIterator<Item = R>)
    where
        R: IntoIterator<Item = String>,
    {
        let mut table = Table::new();
        table
            .load_style(presets::UTF8_HORIZONTAL_ONLY)
            .set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(header.iter().copied());
        for row in rows {
            table.add_row(row);
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        self.say(table);
    }

    /// A progress bar over `steps`, on standard error if that is a terminal; hidden otherwise. It clears itself when
    /// dropped.
    pub fn progress(&self, steps: u64) -> Progress {
        let shown = !matches!(self.json, Json::Kept(_));
        let target = if shown && io::stderr().is_terminal() {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(steps), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}") {
            bar.set_style(style);
        }
        Progress(bar)
    }

    /// Writes the JSON report of `scenario`: `body`'s fields after `scenario`, `version` and `machine`. Does nothing
    /// without `--json`.
    ///
    /// # Errors
    ///
    /// If `body` cannot be expressed in JSON or cannot be written.
    pub fn finish(&self, scenario: &str, body: &impl Serialize) -> Result<(), Error> {
        if matches!(self.json, Json::None) {
            return Ok(());
        }
        let report = Report {
            scenario,
            version: env!("CARGO_PKG_VERSION"),
            machine: Machine::detect(),
            body,
        };
        let failed = |e| Error::run("JSON report", e);
        if let Json::Kept(kept) = &self.json {
            *kept.lock() = Some(serde_json::to_value(&report).map_err(failed)?);
            return Ok(());
        }
        let mut text = serde_json::to_string_pretty(&report).map_err(failed)?;
        text.push('\n');
        match &self.json {
            Json::None | Json::Kept(_) => Ok(()),
            Json::Stdout => io::stdout()
                .write_all(text.as_bytes())
                .map_err(|e| Error::io("standard output", e)),
            Json::File(path) => fs::write(path, text).map_err(|e| Error::io(path, e)),
        }
    }
}

/// See [`Output::progress`].
#[derive(Debug)]
#[must_use = "the bar disappears when this is dropped"]
pub struct Progress(ProgressBar);

impl Progress {
    /// One step done; `next` is what is going on now.
    pub fn step(&self, next: impl Into<String>) {
        self.0.inc(1);
        self.0.set_message(next.into());
    }

    /// `steps` steps done.
    pub fn advance(&self, steps: u64) {
        self.0.inc(steps);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
