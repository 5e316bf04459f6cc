//! Random numbers, pauses in bad places, and the verdict of a run.

use std::cell::Cell;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Most violations that are kept.
const KEPT: usize = 8;

/// A small generator (xorshift64*): a run's threads are seeded, so that it can be set to the same course again.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        // Neighbouring seeds go different ways (the increment of splitmix64), and none is zero.
        Self((seed.wrapping_add(1)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    /// Once in `n` times.
    pub(crate) fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

thread_local! {
    static PAUSES: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Lets this thread pause at random from now on.
pub(crate) fn allow_pauses(seed: u64) {
    PAUSES.set(Some(seed));
}

/// Once in `n` times, lets the others go first: sometimes for a moment, sometimes for long.
pub(crate) fn pause(n: u64) {
    let Some(seed) = PAUSES.get() else {
        return;
    };
    let mut random = Random(seed);
    if random.once_in(n) {
        match random.below(8) {
            0 => std::thread::sleep(Duration::from_micros(50)),
            1..4 => std::thread::yield_now(),
            _ => (0..random.below(200)).for_each(|_| std::hint::spin_loop()),
        }
    }
    PAUSES.set(Some(random.0));
}

/// What a run found.
#[derive(Clone)]
pub(crate) struct Verdict {
    inner: Arc<Inner>,
}

struct Inner {
    violations: Mutex<Vec<String>>,
    stop: AtomicBool,
    deadline: Instant,
}

impl Verdict {
    /// Of a run that ends after `length`, or at the first violation.
    pub(crate) fn new(length: Duration) -> Self {
        Self {
            inner: Arc::new(Inner {
                violations: Mutex::default(),
                stop: AtomicBool::new(false),
                deadline: Instant::now() + length,
            }),
        }
    }

    #[cold]
    pub(crate) fn violation(&self, what: fmt::Arguments<'_>) {
        self.inner.stop.store(true, Ordering::Relaxed);
        let mut violations = self.inner.violations.lock().expect("nobody panics inside");
        if violations.len() < KEPT {
            violations.push(what.to_string());
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.inner.stop.load(Ordering::Relaxed) || Instant::now() >= self.inner.deadline
    }

    pub(crate) fn violations(&self) -> Vec<String> {
        let violations = self.inner.violations.lock();
        violations.expect("nobody panics inside").clone()
    }
}
