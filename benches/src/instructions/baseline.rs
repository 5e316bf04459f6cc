//! Counts in a file, and what has changed against them.

use super::Count;
use crate::report::Error;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

/// The compiler that made this program.
pub(super) const TOOLCHAIN: &str = env!("TDP_BENCH_RUSTC");
/// What it made it for.
pub(super) const TARGET: &str = env!("TDP_BENCH_TARGET");
/// Per cent that another compiler may make of the same source.
pub(super) const OTHER_TOOLCHAIN_LIMIT: f64 = 15.0;

/// How.
pub(super) const PROFILE: &str = env!("TDP_BENCH_PROFILE");

/// The file.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Baseline {
    toolchain: String,
    target: String,
    profile: String,
    /// By group, by name: instructions an operation.
    instructions: BTreeMap<String, BTreeMap<String, f64>>,
}

/// Something that is not as in the baseline.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Change {
    /// Takes more than it may.
    More { function: String, percent: f64 },
    /// Takes less: the baseline could be renewed.
    Less { function: String, percent: f64 },
    /// Not in the baseline.
    New { function: String },
    /// Only in the baseline.
    Gone { function: String },
}

impl Change {
    /// Whether it must not be. A baseline that does not have what is counted guards nothing.
    pub(super) fn fails(&self) -> bool {
        !matches!(self, Self::Less { .. })
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::More { function, percent } => {
                write!(f, "{function} takes {percent:.1} % more instructions")
            }
            Self::Less { function, percent } => write!(
                f,
                "{function} takes {percent:.1} % less instructions: renew the baseline (--renew)"
            ),
            Self::New { function } => write!(f, "{function} is not in the baseline (--renew)"),
            Self::Gone { function } => write!(f, "{function} is only in the baseline (--renew)"),
        }
    }
}

impl Baseline {
    /// Reads `path`.
    ///
    /// # Errors
    ///
    /// If it cannot be read, is no baseline, or is one of another kind of build.
    pub(super) fn read(path: &Path) -> Result<Self, Error> {
        let text = fs::read(path).map_err(|e| Error::io(path, e))?;
        let failed = |why: String| Error::run(path.display().to_string(), why);
        let read: Self =
            serde_json::from_slice(&text).map_err(|e| failed(format!("no baseline: {e}")))?;
        if (read.target.as_str(), read.profile.as_str()) != (TARGET, PROFILE) {
            return Err(failed(format!(
                "is of a build for {}, {}, and this is one for {TARGET}, {PROFILE}",
                read.target, read.profile
            )));
        }
        Ok(read)
    }

    /// What was counted now.
    pub(super) fn of(counts: &[Count]) -> Self {
        let mut instructions: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
        for count in counts {
            // A hundredth of an instruction is enough to see three per cent of one.
            let rounded = (count.per_operation * 100.0).round() / 100.0;
            let group = instructions.entry(count.group.to_owned()).or_default();
            group.insert(count.name.to_owned(), rounded);
        }
        Self {
            toolchain: TOOLCHAIN.to_owned(),
            target: TARGET.to_owned(),
            profile: PROFILE.to_owned(),
            instructions,
        }
    }

    /// Writes it to `path`.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub(super) fn write(&self, path: &Path) -> Result<(), Error> {
        let text = serde_json::to_string_pretty(self).map_err(|e| Error::run("baseline", e))?;
        fs::write(path, text + "\n").map_err(|e| Error::io(path, e))
    }

    /// Its compiler, if that is not this program's.
    pub(super) fn other_toolchain(&self) -> Option<String> {
        (self.toolchain != TOOLCHAIN).then(|| self.toolchain.clone())
    }

    /// Instructions an operation of one function.
    pub(super) fn of_function(&self, group: &str, name: &str) -> Option<f64> {
        self.instructions.get(group)?.get(name).copied()
    }

    /// What is not as it was, by more than `limit` per cent.
    pub(super) fn changes(&self, counts: &[Count], limit: f64) -> Vec<Change> {
        let function = |group: &str, name: &str| format!("{group}, {name}");
        let mut changes = Vec::new();
        for count in counts {
            let function = function(count.group, count.name);
            match self.of_function(count.group, count.name) {
                None => changes.push(Change::New { function }),
                Some(before) => {
                    let percent = (count.per_operation / before - 1.0) * 100.0;
                    // Written so that a baseline of nothing, or of no number, fails.
                    if percent.is_nan() || percent > limit {
                        changes.push(Change::More { function, percent });
                    } else if percent < -limit {
                        let percent = -percent;
                        changes.push(Change::Less { function, percent });
                    }
                }
            }
        }
        for (group, names) in &self.instructions {
            for name in names.keys() {
                let counted = counts
                    .iter()
                    .any(|count| count.group == group && count.name == name);
                if !counted {
                    let function = function(group, name);
                    changes.push(Change::Gone { function });
                }
            }
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(name: &'static str, per_operation: f64) -> Count {
        Count {
            group: "ept",
            name,
            operations: 100,
            instructions: 0,
            per_operation,
            before: None,
        }
    }

    #[test]
    fn more_fails_and_less_is_told() {
        let before = Baseline::of(&[count("a", 100.0), count("b", 10.0), count("c", 0.0)]);
        let changes = |counts: &[Count]| before.changes(counts, 3.0);
        let same = [count("a", 102.9), count("b", 9.8), count("c", 0.0)];
        let nothing = changes(&same);
        assert_eq!(
            nothing.len(),
            1,
            "nothing over nothing says nothing: {nothing:?}"
        );
        let told = changes(&[count("a", 103.2), count("b", 9.5), count("d", 1.0)]);
        assert!(
            matches!(
                told.as_slice(),
                [
                    Change::More { .. },
                    Change::Less { .. },
                    Change::New { .. },
                    Change::Gone { .. }
                ]
            ),
            "{told:?}"
        );
        let fails: Vec<_> = told.iter().map(Change::fails).collect();
        assert_eq!(fails, [true, false, true, true]);
        assert!(told[0].to_string().starts_with("ept, a takes 3.2 % more"));
    }

    #[test]
    fn a_file_is_read_back_and_one_of_another_build_is_refused() {
        let path = std::env::temp_dir().join(format!("tdp-baseline-{}.json", std::process::id()));
        let mut baseline = Baseline::of(&[count("a", 12.345)]);
        baseline.write(&path).unwrap();
        let read = Baseline::read(&path).unwrap();
        assert_eq!(read.of_function("ept", "a"), Some(12.35));
        assert_eq!(read.other_toolchain(), None);
        baseline.toolchain = "rustc 1.0.0".to_owned();
        baseline.write(&path).unwrap();
        let read = Baseline::read(&path).unwrap();
        assert_eq!(read.other_toolchain().as_deref(), Some("rustc 1.0.0"));
        baseline.profile = "tiny".to_owned();
        baseline.write(&path).unwrap();
        let error = Baseline::read(&path).unwrap_err().to_string();
        assert!(error.contains(", tiny,"), "{error}");
        fs::write(&path, "{").unwrap();
        let error = Baseline::read(&path).unwrap_err().to_string();
        assert!(error.contains("no baseline"), "{error}");
        fs::remove_file(&path).unwrap();
    }
}
