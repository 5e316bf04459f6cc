//! Callgrind, told to count what one function executes and to write a file each time that it is over.

use crate::hot::{Hot, Work};
use crate::report::Error;
use std::ffi::OsString;
use std::fs;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Does all of the work once for practice and once for the count.
pub(super) fn work(hot: &mut [Hot]) -> Result<(), Error> {
    for hot in hot {
        hot.work.prepare()?;
        hot.work.work()?;
        hot.work.prepare()?;
        reported_by_callgrind(&mut *hot.work)?;
    }
    Ok(())
}

/// The function whose end makes callgrind write a file. It cannot be the one that is counted as well: of two options that name one
/// function callgrind heeds one. It knows functions by their names, which no others have.
#[inline(never)]
fn reported_by_callgrind(work: &mut dyn Work) -> Result<(), Error> {
    // So that it ends after the other and not with it.
    black_box(counted_by_callgrind(work))
}

/// The function that is counted.
#[inline(never)]
fn counted_by_callgrind(work: &mut dyn Work) -> Result<(), Error> {
    // No jump, but a call that comes back here.
    black_box(work.work())
}

/// Runs this program under callgrind and returns the count of each of `pieces` pieces of work.
pub(super) fn count(pieces: usize) -> Result<Vec<u64>, Error> {
    let folder = Folder::new()?;
    let program = std::env::current_exe().map_err(|e| Error::run("this program", e))?;
    let mut file = OsString::from("--callgrind-out-file=");
    file.push(folder.0.join(PARTS));
    let ran = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no"])
        .arg("--toggle-collect=*counted_by_callgrind*")
        .arg("--dump-after=*reported_by_callgrind*")
        .arg(file)
        .arg(program)
        .args(["instructions", "--counted"])
        .output()
        .map_err(|e| Error::run("valgrind, which must be installed", e))?;
    if !ran.status.success() {
        let told = String::from_utf8_lossy(&ran.stderr);
        let last = told.lines().last().unwrap_or_default();
        return Err(Error::run("valgrind", format!("{}: {last}", ran.status)));
    }
    counts(&folder.0, pieces)
}

/// Name of the files of parts, of which each has its number at its end.
const PARTS: &str = "part";

/// The counts of all parts in `folder`, in their order.
fn counts(folder: &Path, pieces: usize) -> Result<Vec<u64>, Error> {
    let count = |number: usize| {
        let path = folder.join(format!("{PARTS}.{number}"));
        let text = fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        total(&text).ok_or_else(|| Error::run(path.display().to_string(), "has no count"))
    };
    let beyond = folder.join(format!("{PARTS}.{}", pieces + 1));
    // At the end there is a part with nothing in it, or none.
    match fs::read_to_string(&beyond)
        .ok()
        .and_then(|text| total(&text))
    {
        None | Some(0) => (1..=pieces).map(count).collect(),
        Some(_) => Err(Error::run(
            "valgrind",
            format!("counted more than {pieces} pieces of work"),
        )),
    }
}

/// The number of instructions in a file of callgrind.
fn total(text: &str) -> Option<u64> {
    let line = |key| {
        text.lines()
            .find_map(move |line: &str| line.strip_prefix(key))
    };
    let total: u64 = line("summary: ")?.trim().parse().ok()?;
    // Instructions, and nothing else beside them.
    (line("events: ")?.trim() == "Ir").then_some(total)
}

/// A folder that goes away.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self, Error> {
        let path = std::env::temp_dir().join(format!("tdp-bench-callgrind-{}", std::process::id()));
        fs::create_dir_all(&path).map_err(|e| Error::io(&path, e))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left is the system's to clean.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_is_the_summary_of_instructions() {
        assert_eq!(total("version: 1\nevents: Ir\nsummary: 41\n"), Some(41));
        assert_eq!(total("events: Ir Dr\nsummary: 41 7\n"), None);
        assert_eq!(total("events: Ir\n"), None);
        assert_eq!(total("summary: 41\n"), None);
    }
}
