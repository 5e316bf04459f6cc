//! The vCPU's laps, and the thread that sweeps meanwhile.
//!
//! The vCPU says what the other thread is to do, and waits until that has said that it does; a lap begins no earlier. A pass
//! that was begun is finished, so that "nothing" is answered only when nothing goes on.

use crate::race::{self, join};
use crate::report::Error;
use crate::sweeping::{Age, Sweeping, WriteProtect, Zap};
use crate::sync::{AtomicU64, Ordering, Padded};
use crate::sys;
use serde::Serialize;
use std::hint::black_box;
use std::time::{Duration, Instant};
use tdp_arch::{Gfn, GfnRange};

/// What the other thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Mix {
    /// Write protection and aging.
    ProtectAge,
    /// These, splitting and collapsing.
    All,
    /// A slot elsewhere is added and removed.
    Slots,
    /// Large pages are recovered, one in so many at a time.
    Recover(u16),
}

/// A lap ends after this time, how far it may have come: under some locks it would take minutes.
const LONGEST: Duration = Duration::from_millis(200);
/// Faults between two looks at the clock in a lap that is timed as a whole.
const BETWEEN_LOOKS: u64 = 64;

/// Guest frames that no vCPU uses, below those that they do.
const UNUSED: GfnRange = GfnRange {
    start: Gfn(0x1000),
    end: Gfn(0x1200),
};

/// What the vCPU tells the other thread.
const NOTHING: u64 = 0;
const PROTECT_AGE: u64 = 1;
const ALL: u64 = 2;
const SLOTS: u64 = 3;
const END: u64 = 4;
/// From here on: recover, one in so many.
const RECOVER: u64 = 5;

/// What is said, what was heard, and passes that are over.
#[derive(Default)]
struct Baton {
    said: Padded<AtomicU64>,
    heard: Padded<AtomicU64>,
    passes: Padded<AtomicU64>,
}

impl Baton {
    fn say(&self, what: u64) {
        // Release: what the vCPU did before is seen by a sweep that this begins.
        self.said.0.store(what, Ordering::Release);
    }

    /// Says what to do, and waits until it is done.
    fn agree(&self, what: u64) {
        self.say(what);
        // Acquire: a pass that is over is over before the next lap.
        while self.heard.0.load(Ordering::Acquire) != what {
            std::thread::yield_now();
        }
    }
}

/// The other thread goes, whatever the reason for which the vCPU does.
struct Dismissal<'a>(&'a Baton);

impl Drop for Dismissal<'_> {
    fn drop(&mut self) {
        self.0.say(END);
    }
}

/// One contender under one mix, round by round.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) format: &'static str,
    pub(crate) mix: Option<Mix>,
    /// Faults of a whole lap.
    pub(crate) faults: u64,
    /// Wall nanoseconds a fault, lap by lap.
    pub(crate) idle_ns: Vec<f64>,
    pub(crate) swept_ns: Vec<f64>,
    /// Passes over all of the memory, in all swept laps.
    pub(crate) passes: u64,
    /// Nanoseconds that one fault in a thousand exceeds, and the longest.
    pub(crate) idle_p999_ns: Vec<u64>,
    pub(crate) swept_p999_ns: Vec<u64>,
    pub(crate) idle_max_ns: Vec<u64>,
    pub(crate) swept_max_ns: Vec<u64>,
    /// Times that the vCPU was taken off its processor in laps that count.
    pub(crate) preemptions: u64,
    /// Table frames that did not come back.
    #[serde(skip)]
    pub(crate) leaked: u64,
}

/// Runs a contender under each of `mixes`; the other thread sleeps for `between` after each pass.
///
/// # Errors
///
/// A fault or a sweep that failed, or a processor that a thread cannot be tied to.
pub(crate) fn run<C: Sweeping>(
    contender: C,
    name: &'static str,
    mixes: &[Mix],
    gfns: GfnRange,
    rounds: u16,
    cpus: &[usize],
    between: Duration,
) -> Result<Vec<Row>, Error> {
    let baton = Baton::default();
    let worker = contender.worker()?;
    let rows = std::thread::scope(|scope| {
        let (contender, baton) = (&contender, &baton);
        let vcpu = scope.spawn(move || {
            let _dismissal = Dismissal(baton);
            pin(cpus, 0)?;
            let mut vcpu = Runner {
                contender,
                worker,
                gfns,
                baton,
                laps: Vec::new(),
                done: 0,
            };
            vcpu.lap(NOTHING, false)?;
            let rows = mixes
                .iter()
                .map(|&mix| vcpu.rounds(name, mix, rounds))
                .collect::<Result<Vec<_>, _>>();
            baton.agree(NOTHING);
            rows
        });
        let sweeper = scope.spawn(move || sweep(contender, gfns, baton, cpus, between));
        let rows = join(vcpu);
        join(sweeper)?;
        rows
    });
    let mut rows = rows?;
    let leaked = contender.leaked();
    if let Some(row) = rows.first_mut() {
        row.leaked = leaked;
    }
    Ok(rows)
}

fn pin(cpus: &[usize], thread: usize) -> Result<(), Error> {
    match cpus.get(thread) {
        Some(&cpu) => {
            sys::pin(cpu).map_err(|e| Error::Usage(format!("-c {cpu}: cannot run there: {e}")))
        }
        None => Ok(()),
    }
}

/// The other thread.
fn sweep<C: Sweeping>(
    contender: &C,
    gfns: GfnRange,
    baton: &Baton,
    cpus: &[usize],
    between: Duration,
) -> Result<(), Error> {
    let mut outcome = pin(cpus, 1);
    loop {
        // Acquire: pairs with `say`.
        let said = baton.said.0.load(Ordering::Acquire);
        // Release: pairs with `agree`.
        baton.heard.0.store(said, Ordering::Release);
        if said == END {
            return outcome;
        }
        if said == NOTHING || outcome.is_err() {
            std::thread::sleep(Duration::from_micros(50));
            continue;
        }
        outcome = if said == SLOTS {
            contender.modify_slots(UNUSED)
        } else if said >= RECOVER {
            contender.recover(gfns, said - RECOVER)
        } else {
            contender
                .sweep::<WriteProtect>(gfns)
                .and_then(|()| contender.sweep::<Age>(gfns))
        };
        if said == ALL && outcome.is_ok() {
            outcome = contender.resize(gfns);
        }
        if !between.is_zero() {
            std::thread::sleep(between);
        }
        baton.passes.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct Runner<'c, C: Sweeping> {
    contender: &'c C,
    worker: C::Worker,
    gfns: GfnRange,
    baton: &'c Baton,
    /// Nanoseconds of each fault of the last lap in which they were looked at.
    laps: Vec<u32>,
    /// Faults of the last lap.
    done: u64,
}

impl<C: Sweeping> Runner<'_, C> {
    fn rounds(&mut self, name: &'static str, mix: Mix, rounds: u16) -> Result<Row, Error> {
        let swept = match mix {
            Mix::ProtectAge => PROTECT_AGE,
            Mix::All => ALL,
            Mix::Slots => SLOTS,
            Mix::Recover(ratio) => RECOVER + u64::from(ratio),
        };
        let mut row = Row {
            name,
            mix: Some(mix),
            faults: self.gfns.pages(),
            ..Row::default()
        };
        let before = self.baton.passes.0.load(Ordering::Relaxed);
        for _ in 0..rounds {
            row.idle_ns
                .push(self.counted(NOTHING, false, &mut row.preemptions)?);
            row.swept_ns
                .push(self.counted(swept, false, &mut row.preemptions)?);
            self.counted(NOTHING, true, &mut row.preemptions)?;
            let (p999, max) = self.tail();
            row.idle_p999_ns.push(p999);
            row.idle_max_ns.push(max);
            self.counted(swept, true, &mut row.preemptions)?;
            let (p999, max) = self.tail();
            row.swept_p999_ns.push(p999);
            row.swept_max_ns.push(max);
        }
        self.baton.agree(NOTHING);
        row.passes = self.baton.passes.0.load(Ordering::Relaxed) - before;
        Ok(row)
    }

    /// A lap that counts: its wall nanoseconds a fault.
    fn counted(&mut self, other: u64, each: bool, preemptions: &mut u64) -> Result<f64, Error> {
        let lap = race::undisturbed(1, |_| self.lap(other, each))?;
        *preemptions += lap.preemptions;
        Ok(lap.wall.as_nanos() as f64 / self.done.max(1) as f64)
    }

    /// Maps everything, or as much as there is time for, while the other thread does `other`.
    fn lap(&mut self, other: u64, each: bool) -> Result<race::Lap, Error> {
        self.baton.agree(NOTHING);
        self.contender.sweep::<Zap>(self.gfns)?;
        self.baton.agree(other);
        let preemptions = sys::preemptions();
        let (cpu, start) = (sys::thread_time(), Instant::now());
        let outcome = if each {
            self.map_each()
        } else {
            self.map_all()
        };
        let wall = start.elapsed();
        let lap = race::Lap {
            wall,
            cpu: sys::thread_time() - cpu,
            preemptions: sys::preemptions() - preemptions,
        };
        outcome.map_err(Into::into)?;
        Ok(lap)
    }

    #[inline(never)]
    fn map_all(&mut self) -> Result<(), C::Failure> {
        let end = Instant::now() + LONGEST;
        self.done = 0;
        let mut next = self.gfns.start.0;
        while next < self.gfns.end.0 && Instant::now() < end {
            let stop = (next + BETWEEN_LOOKS).min(self.gfns.end.0);
            for number in next..stop {
                self.contender
                    .resolve(&mut self.worker, black_box(Gfn(number)))?;
            }
            self.done += stop - next;
            next = stop;
        }
        Ok(())
    }

    #[inline(never)]
    fn map_each(&mut self) -> Result<(), C::Failure> {
        self.laps.clear();
        let mut last = Instant::now();
        let end = last + LONGEST;
        for number in self.gfns.start.0..self.gfns.end.0 {
            self.contender
                .resolve(&mut self.worker, black_box(Gfn(number)))?;
            let now = Instant::now();
            let ns = (now - last).as_nanos();
            self.laps.push(u32::try_from(ns).unwrap_or(u32::MAX));
            last = now;
            if now >= end {
                break;
            }
        }
        self.done = self.laps.len() as u64;
        Ok(())
    }

    /// Of the last lap in which each fault was looked at: what one in a thousand exceeds, and the longest.
    fn tail(&mut self) -> (u64, u64) {
        self.laps.sort_unstable();
        let at = self.laps.len().saturating_sub(1 + self.laps.len() / 1000);
        let of = |ns: Option<&u32>| ns.copied().map_or(0, u64::from);
        (of(self.laps.get(at)), of(self.laps.last()))
    }
}
