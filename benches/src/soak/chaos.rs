//! What goes wrong on purpose: callbacks that fail, stall and panic, frames that run out.
//!
//! Each thread has a stream of its own, seeded from the run's seed, so that what its callbacks meet does not depend on what
//! other threads do, and does not disturb what the thread does next. A thread without a stream meets nothing: checks at quiet
//! moments run undisturbed.

use super::Random;
use serde::Serialize;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

/// What a panic on purpose carries.
struct Injected;

/// How often things go wrong: once in so many times, 0 for never.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Rates {
    /// A call of the trusted module is answered "busy".
    pub(super) busy: u64,
    /// One that a roll-back can undo is refused.
    pub(super) refused: u64,
    /// There is no frame for a table.
    pub(super) starved: u64,
    /// A look-up of backing fails, is to be repeated, or would sleep.
    pub(super) lookup: u64,
    /// A callback panics.
    pub(super) panic: u64,
    /// A callback lets the others go first.
    pub(super) pause: u64,
}

/// What went wrong so far.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Met {
    pub(super) busy: u64,
    pub(super) refused: u64,
    pub(super) starved: u64,
    pub(super) lookups: u64,
    pub(super) panics: u64,
    pub(super) pauses: u64,
    pub(super) stalls_in_critical_sections: u64,
    pub(super) stalls_of_frozen_entries: u64,
}

impl Met {
    pub(super) fn add(&mut self, other: &Self) {
        self.busy += other.busy;
        self.refused += other.refused;
        self.starved += other.starved;
        self.lookups += other.lookups;
        self.panics += other.panics;
        self.pauses += other.pauses;
        self.stalls_in_critical_sections += other.stalls_in_critical_sections;
        self.stalls_of_frozen_entries += other.stalls_of_frozen_entries;
    }
}

struct Stream {
    random: Random,
    rates: Rates,
    met: Met,
}

thread_local! {
    static STREAM: RefCell<Option<Stream>> = const { RefCell::new(None) };
    /// How long the next callback stalls.
    static STALL: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// From now on this thread's callbacks go wrong.
pub(super) fn begin(seed: u64, rates: Rates) {
    let stream = Stream {
        random: Random(seed),
        rates,
        met: Met::default(),
    };
    STREAM.set(Some(stream));
}

/// This thread's callbacks go right again. Returns what they met.
pub(super) fn end() -> Met {
    STALL.set(Duration::ZERO);
    STREAM.take().map(|stream| stream.met).unwrap_or_default()
}

/// The next callback of this thread takes so long.
pub(super) fn stall_next(length: Duration) {
    STALL.set(length);
}

/// Runs `work`, in which callbacks may panic: `None` if one did.
pub(super) fn survive<R>(work: impl FnOnce() -> R) -> Option<R> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => Some(done),
        Err(payload) if payload.is::<Injected>() => None,
        Err(payload) => resume_unwind(payload),
    }
}

/// Panics without a word.
pub(super) fn die() -> ! {
    resume_unwind(Box::new(Injected))
}

fn chance(of: fn(&Rates) -> u64, note: fn(&mut Met) -> &mut u64) -> bool {
    STREAM.with_borrow_mut(|stream| {
        let Some(stream) = stream else { return false };
        let rate = of(&stream.rates);
        let met = rate != 0 && stream.random.once_in(rate);
        if met {
            *note(&mut stream.met) += 1;
        }
        met
    })
}

/// A callback that walks by: may let others go first.
pub(super) fn pause() {
    if chance(|rates| rates.pause, |met| &mut met.pauses) {
        let length =
            STREAM.with_borrow_mut(|stream| stream.as_mut().map_or(0, |s| s.random.below(64)));
        match length {
            0 => std::thread::sleep(Duration::from_millis(2)),
            1..8 => std::thread::sleep(Duration::from_micros(50)),
            8..32 => std::thread::yield_now(),
            spins => (0..spins).for_each(|_| std::hint::spin_loop()),
        }
    }
}

fn stall(note: fn(&mut Met) -> &mut u64) {
    let length = STALL.take();
    if !length.is_zero() {
        STREAM.with_borrow_mut(|stream| {
            if let Some(stream) = stream {
                *note(&mut stream.met) += 1;
            }
        });
        std::thread::sleep(length);
    }
}

/// A callback inside a critical section.
pub(super) fn in_critical_section() {
    stall(|met| &mut met.stalls_in_critical_sections);
    panic_now();
}

/// A callback while an entry is frozen.
pub(super) fn in_hand_off() {
    stall(|met| &mut met.stalls_of_frozen_entries);
    pause();
    panic_now();
}

fn panic_now() {
    // A second panic while one unwinds ends the process.
    if !std::thread::panicking() && chance(|rates| rates.panic, |met| &mut met.panics) {
        die();
    }
}

/// Whether a call of the module is answered "busy".
pub(super) fn is_busy() -> bool {
    chance(|rates| rates.busy, |met| &mut met.busy)
}

/// Whether it is refused.
pub(super) fn is_refused() -> bool {
    chance(|rates| rates.refused, |met| &mut met.refused)
}

/// Whether there is no frame.
pub(super) fn is_starved() -> bool {
    panic_now();
    chance(|rates| rates.starved, |met| &mut met.starved)
}

/// What a look-up is to answer instead of what it found, by number: below 3, or what it found.
pub(super) fn other_answer() -> Option<u64> {
    chance(|rates| rates.lookup, |met| &mut met.lookups)
        .then(|| STREAM.with_borrow_mut(|stream| stream.as_mut().map_or(0, |s| s.random.below(8))))
}
