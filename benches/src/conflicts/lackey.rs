//! valgrind's `lackey`, and its trace cut into turns.
//!
//! The traced process stores to one of a few marked words where a turn begins or ends; the trace has the address of each
//! store, so the marks are in the trace itself, in their order among all else. Where the words are the process says first, and
//! waits for an answer, so that no mark is missed.

use super::child::{Manifest, Traced};
use crate::report::Error;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// Bytes of a cache line, as a shift.
pub(crate) const LINE: u32 = 6;

/// What a line of a table is called.
pub(super) const TABLES: &str = "tables";
/// What a line of a thread's stack is called.
pub(super) const STACK: &str = "stack";

/// Who has a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    First,
    Second,
}

/// One access to memory, to one line.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    pub(crate) line: u64,
    pub(crate) writes: bool,
    /// Address of the instruction.
    pub(crate) instruction: u64,
}

/// What one thread did between two marks.
#[derive(Clone, Debug)]
pub(crate) struct Turn {
    pub(crate) side: Side,
    pub(crate) accesses: Vec<Access>,
    pub(crate) instructions: u64,
}

/// What was traced.
#[derive(Debug)]
pub(crate) struct Trace {
    /// The turns of each pair, in order.
    pub(crate) pairs: Vec<(String, Vec<Turn>)>,
    /// What to take from an instruction's address for its place in the file.
    pub(crate) bias: u64,
    manifest: Manifest,
}

impl Trace {
    /// What a line is part of.
    pub(super) fn place(&self, line: u64) -> &'static str {
        let within = |ranges: &[(u64, u64)]| {
            ranges
                .iter()
                .any(|&(start, end)| (start >> LINE..=end >> LINE).contains(&line))
        };
        if within(&self.manifest.tables) {
            TABLES
        } else if within(&self.manifest.stacks) {
            STACK
        } else {
            "memory"
        }
    }
}

/// Runs this program's `what` under lackey.
///
/// # Errors
///
/// [`Error::Run`] if valgrind is not there, or the process did not come to its end.
pub(crate) fn trace(what: Traced) -> Result<Trace, Error> {
    let failed = |e: std::io::Error| Error::run("valgrind, which has to be installed", e);
    let program = std::env::current_exe().map_err(failed)?;
    let mut child = Command::new("valgrind")
        .args([
            "--tool=lackey",
            "--trace-mem=yes",
            "--basic-counts=no",
            "--log-fd=2",
        ])
        .arg(program)
        .args(["traced", "--what", what.name()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let (Some(mut stdin), Some(stdout), Some(stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(failed(std::io::ErrorKind::BrokenPipe.into()));
    };
    let manifest: OnceLock<Manifest> = OnceLock::new();
    let (turns, said) = std::thread::scope(|scope| {
        let manifest = &manifest;
        scope.spawn(move || {
            let mut line = String::new();
            if BufReader::new(stdout).read_line(&mut line).is_ok()
                && let Ok(told) = serde_json::from_str(&line)
            {
                // Read once: it is not there yet.
                let _ = manifest.set(told);
            }
            // Without an answer the process ends, which is seen below.
            let _ = stdin.write_all(if manifest.get().is_some() {
                b"go\n"
            } else {
                b""
            });
        });
        cut(BufReader::with_capacity(1 << 20, stderr), manifest)
    });
    let status = child.wait().map_err(failed)?;
    let Some(manifest) = manifest.into_inner().filter(|_| status.success()) else {
        return Err(Error::run(
            "the traced process",
            format!("{status}; {said}"),
        ));
    };
    let mut pairs: Vec<(String, Vec<Turn>)> = manifest
        .pairs
        .iter()
        .map(|name| (name.clone(), Vec::new()))
        .collect();
    for (pair, turn) in turns {
        if let Some((_, turns)) = pairs.get_mut(pair) {
            turns.push(turn);
        }
    }
    Ok(Trace {
        pairs,
        bias: manifest.bias,
        manifest,
    })
}

/// Reads a trace. Returns the turns, each with the number of its pair, and the last of what is no part of a trace.
fn cut(trace: impl BufRead, manifest: &OnceLock<Manifest>) -> (Vec<(usize, Turn)>, String) {
    let mut turns = Vec::new();
    let mut said = String::new();
    let (mut pair, mut instruction) = (0, 0);
    let mut current: Option<Turn> = None;
    for line in trace.split(b'\n').map_while(Result::ok) {
        let Some((kind, address, size)) = event(&line) else {
            said = String::from_utf8_lossy(&line).into_owned();
            continue;
        };
        if kind == b'I' {
            instruction = address;
            if let Some(turn) = &mut current {
                turn.instructions += 1;
            }
            continue;
        }
        let mark = manifest.get().and_then(|told| told.mark(address));
        if let Some(mark) = mark.filter(|_| kind != b'L') {
            let done = current.take();
            turns.extend(done.map(|turn| (pair, turn)));
            let side = match mark {
                0 => Side::First,
                1 => Side::Second,
                2 => continue,
                _ => {
                    pair += 1;
                    continue;
                }
            };
            current = Some(Turn {
                side,
                accesses: Vec::new(),
                instructions: 0,
            });
        } else if let Some(turn) = &mut current {
            let lines = address >> LINE..=(address + size.max(1) - 1) >> LINE;
            turn.accesses.extend(lines.map(|line| Access {
                line,
                writes: kind != b'L',
                instruction,
            }));
        }
    }
    (turns, said)
}

/// One line of a trace: kind (`I`, `L`, `S` or `M`), address, size.
fn event(line: &[u8]) -> Option<(u8, u64, u64)> {
    let text = std::str::from_utf8(line).ok()?.trim();
    let (kind, rest) = text.split_once(' ')?;
    let (address, size) = rest.trim().split_once(',')?;
    let &[kind] = kind.as_bytes() else {
        return None;
    };
    if !b"ILSM".contains(&kind) {
        return None;
    }
    let address = u64::from_str_radix(address, 16).ok()?;
    Some((kind, address, size.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told() -> OnceLock<Manifest> {
        OnceLock::from(Manifest {
            marks: 0x1000,
            ..Manifest::default()
        })
    }

    #[test]
    fn a_trace_is_cut_at_its_marks() {
        let trace = "==1== Lackey\n L 2000,8\nI  10,3\n S 1000,8\nI  13,4\n L 203c,8\nI 17,2\n M 3000,4\n S 1010,8\n S 4000,8\n \
                     S 1018,8\n S 1008,8\n S 5000,8\n S 1010,8\n";
        let (turns, said) = cut(trace.as_bytes(), &told());
        assert_eq!(said, "==1== Lackey");
        let [(0, first), (1, second)] = &turns[..] else {
            panic!("{turns:?}");
        };
        assert_eq!((first.side, second.side), (Side::First, Side::Second));
        let seen = |turn: &Turn| -> Vec<_> {
            let accesses = turn.accesses.iter();
            accesses
                .map(|it| (it.line, it.writes, it.instruction))
                .collect()
        };
        // The load lies in two lines.
        assert_eq!(
            seen(first),
            [(0x80, false, 0x13), (0x81, false, 0x13), (0xc0, true, 0x17)]
        );
        assert_eq!(seen(second), [(0x140, true, 0x17)]);
        assert_eq!(first.instructions, 2);
    }

    #[test]
    fn what_is_no_event_is_none() {
        for line in ["", "==12== text", " L 12", " X 12,4", " L zz,4", "I 1 2,4"] {
            assert_eq!(event(line.as_bytes()), None, "{line}");
        }
    }
}
