//! The traced process: two threads that take turns, and store to a marked word where a turn begins and ends.
//!
//! It says where the marks are, waits until that was read, and then runs. Between two marks nothing is done but the
//! operation: what is to be prepared for it, and the handing over of turns, is outside.

use super::pairs::{self, Pair, Part};
use crate::report::Error;
use crate::sync::{AtomicU64, Ordering};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

/// Turns of each side that are not traced: afterwards everything that is made once is there.
const PREPARED: u64 = 4;
/// Turns of each side that are traced.
const TRACED: u64 = 16;
/// Turns of each side that there are at most.
pub(super) const TURNS: u64 = PREPARED + TRACED;
/// After so long all other threads wait for something.
const SETTLED: Duration = Duration::from_millis(2);
/// Bytes of a thread's stack on either side of one of its first variables.
const STACK: (u64, u64) = (1 << 20, 1 << 16);

/// What the traced process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Traced {
    /// Pairs of operations.
    Pairs,
    /// Single faults of the library and of the baselines.
    Faults,
}

impl Traced {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Pairs => "pairs",
            Self::Faults => "faults",
        }
    }
}

/// What the process says of itself before it is traced.
#[derive(Debug, Default, Deserialize, Serialize)]
pub(super) struct Manifest {
    /// Address of the marks.
    pub(super) marks: u64,
    /// Address at which the program was loaded, less that in its file.
    pub(super) bias: u64,
    pub(super) pairs: Vec<String>,
    /// Memory of tables: first and last byte.
    pub(super) tables: Vec<(u64, u64)>,
    /// Stacks of the two threads.
    pub(super) stacks: Vec<(u64, u64)>,
}

impl Manifest {
    /// The number of the mark at an address: 0 and 1 begin a turn of that side, 2 ends it, 3 ends a pair.
    pub(super) fn mark(&self, address: u64) -> Option<u64> {
        let offset = address.checked_sub(self.marks)?;
        (offset < size_of::<Marks>() as u64).then_some(offset / 8)
    }
}

/// Words on a cache line of their own.
#[repr(align(128))]
struct Marks([AtomicU64; 4]);

static MARKS: Marks = Marks([const { AtomicU64::new(0) }; 4]);

#[inline(always)]
fn mark(number: usize) {
    // Relaxed: one thread is at work at a time. What is told by it is its address.
    MARKS.0[number].store(1, Ordering::Relaxed);
}

/// What a thread is to do next.
#[derive(Clone, Copy)]
struct Turn {
    pair: usize,
    number: u64,
}

/// Runs everything, with a trace to be taken of it.
///
/// # Errors
///
/// What setting up a guest or an operation comes to.
pub(super) fn run(what: Traced) -> Result<(), Error> {
    let pairs = match what {
        Traced::Pairs => pairs::all()?,
        Traced::Faults => pairs::faults_of_all()?,
    };
    let names: Vec<String> = pairs.iter().map(|pair| pair.name.clone()).collect();
    let tables = pairs.iter().filter_map(|pair| pair.tables).collect();
    let mut sides: [Vec<Option<Box<dyn Part>>>; 2] = [Vec::new(), Vec::new()];
    for Pair { first, second, .. } in pairs {
        sides[0].push(Some(first));
        sides[1].push(second);
    }
    let present: Vec<[bool; 2]> = (0..names.len())
        .map(|pair| [sides[0][pair].is_some(), sides[1][pair].is_some()])
        .collect();
    thread::scope(|scope| {
        let mut turns: Vec<Sender<Turn>> = Vec::new();
        let mut done: Vec<Receiver<Result<u64, Error>>> = Vec::new();
        for (side, parts) in sides.into_iter().enumerate() {
            let (turn, to_take) = channel();
            let (tell, told) = channel();
            scope.spawn(move || take_turns(side, parts, &to_take, &tell));
            turns.push(turn);
            done.push(told);
        }
        let gone = || Error::run("a thread", "ended too early");
        let mut stacks = Vec::new();
        for told in &done {
            let here = told.recv().map_err(|_| gone())??;
            stacks.push((here.saturating_sub(STACK.0), here + STACK.1));
        }
        announce(&Manifest {
            marks: (&raw const MARKS).addr() as u64,
            bias: bias()?,
            pairs: names,
            tables,
            stacks,
        })?;
        for (pair, present) in present.into_iter().enumerate() {
            for number in 0..TURNS {
                for side in (0..2).filter(|&side| present[side]) {
                    turns[side]
                        .send(Turn { pair, number })
                        .map_err(|_| gone())?;
                    done[side].recv().map_err(|_| gone())??;
                }
            }
            mark(3);
        }
        Ok(())
    })
}

fn take_turns(
    side: usize,
    mut parts: Vec<Option<Box<dyn Part>>>,
    turns: &Receiver<Turn>,
    tell: &Sender<Result<u64, Error>>,
) {
    let here = 0_u8;
    // Who listens is gone only if it has failed itself.
    let _ = tell.send(Ok((&raw const here).addr() as u64));
    for Turn { pair, number } in turns {
        let Some(Some(part)) = parts.get_mut(pair) else {
            continue;
        };
        let outcome = part.prepare(number).and_then(|()| {
            if number < PREPARED {
                return part.act(number);
            }
            // Whoever handed the turn over is still on its way to sleep, and would be seen.
            thread::sleep(SETTLED);
            mark(side);
            let outcome = part.act(number);
            mark(2);
            outcome
        });
        if tell.send(outcome.map(|()| 0)).is_err() {
            return;
        }
    }
}

/// Says where to look, and waits until that was heard.
fn announce(manifest: &Manifest) -> Result<(), Error> {
    let failed = |e: std::io::Error| Error::io("standard output", e);
    let mut text = serde_json::to_string(manifest).map_err(|e| Error::run("manifest", e))?;
    text.push('\n');
    let mut out = std::io::stdout();
    out.write_all(text.as_bytes()).map_err(failed)?;
    out.flush().map_err(failed)?;
    let mut answer = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(failed)?;
    match answer.trim() {
        "go" => Ok(()),
        _ => Err(Error::Usage(
            "this command is run by 'conflicts' and 'scaling', under valgrind".to_owned(),
        )),
    }
}

/// Where the program was loaded, from what the system told it at its start.
fn bias() -> Result<u64, Error> {
    let io = |path: &'static str| move |e| Error::io(path, e);
    let vector = std::fs::read("/proc/self/auxv").map_err(io("/proc/self/auxv"))?;
    let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_ne_bytes);
    let entry = vector
        .chunks_exact(16)
        .find(|pair| word(&pair[..8]) == libc::AT_ENTRY)
        .map(|pair| word(&pair[8..]));
    let program = std::env::current_exe().map_err(|e| Error::run("this program", e))?;
    let mut header = [0; 32];
    let mut file = std::fs::File::open(&program).map_err(|e| Error::io(&program, e))?;
    std::io::Read::read_exact(&mut file, &mut header).map_err(|e| Error::io(&program, e))?;
    // `e_entry` of a 64-bit ELF file.
    let in_file = word(&header[24..32]);
    entry
        .and_then(|entry| entry.checked_sub(in_file))
        .ok_or_else(|| Error::run("this program", "where it was loaded is not told"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_told_by_their_address() {
        let manifest = Manifest {
            marks: 0x1000,
            ..Manifest::default()
        };
        let marks = [0xfff, 0x1000, 0x1008, 0x1010, 0x1018].map(|at| manifest.mark(at));
        assert_eq!(marks, [None, Some(0), Some(1), Some(2), Some(3)]);
        assert_eq!(manifest.mark(0x1080), None);
    }

    #[test]
    fn a_program_that_is_not_relocated_is_where_its_file_says() {
        let here = bias().expect("Linux tells");
        assert_eq!(here & 0xfff, 0, "{here:#x}");
    }
}
