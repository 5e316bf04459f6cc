//! One fault with every line cold: between two of them the processor's caches are filled with other memory.
//!
//! What a fault reads and writes, and its code, comes from memory then, or from a cache that is no longer its processor's own.
//! The vCPU has faulted on the neighbouring page, so that all it remembers is there, out of reach. One fault is timed at a time;
//! what reading the clock costs is taken off.

use crate::race::{Contender, minimum};
use crate::report::Error;
use crate::sys;
use serde::Serialize;
use std::hint::black_box;
use std::time::Instant;
use tdp_arch::Gfn;

/// Bytes of a cache line.
const LINE: usize = 64;
/// Memory that is read to fill the caches if the system does not say how large they are.
const USUAL: u64 = 128 << 20;
/// The most that is read. A cache that is larger is shared by so many processors that none of them has it to itself.
const MOST: u64 = 512 << 20;

/// What was found, round by round, in nanoseconds.
#[derive(Debug, Default, Serialize)]
pub(super) struct Found {
    pub(super) floor_ns: Vec<f64>,
    pub(super) fault_ns: Vec<f64>,
    /// Memory that was read before each.
    pub(super) evicted_by_bytes: u64,
}

/// Other memory, enough to fill the caches.
pub(super) struct Evictor {
    memory: Vec<u8>,
    clock_ns: f64,
}

impl Evictor {
    pub(super) fn new() -> Self {
        let wanted = sys::largest_cache().map_or(USUAL, |bytes| bytes.saturating_mul(2));
        let there = sys::available_memory().map_or(MOST, |bytes| bytes / 4);
        let bytes = wanted.min(MOST).min(there);
        let clock: Vec<f64> = (0..1000)
            .map(|_| Instant::now().elapsed().as_nanos() as f64)
            .collect();
        Self {
            // Not zero, so that each page is memory of its own.
            memory: vec![1; bytes as usize],
            clock_ns: minimum(&clock),
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.memory.len() as u64
    }

    fn evict(&self) {
        let sum: u64 = self
            .memory
            .iter()
            .step_by(LINE)
            .map(|&it| u64::from(it))
            .sum();
        black_box(sum);
    }

    /// Nanoseconds of one fault on `gfn`, everything cold, the page after it being mapped just before.
    pub(super) fn time<C: Contender>(
        &self,
        contender: &C,
        worker: &mut C::Worker,
        gfn: Gfn,
    ) -> Result<f64, Error> {
        contender
            .resolve(worker, Gfn(gfn.0 + 1))
            .map_err(Into::into)?;
        self.evict();
        let start = Instant::now();
        let resolved = contender.resolve(worker, gfn);
        let took = start.elapsed();
        resolved.map_err(Into::into)?;
        Ok((took.as_nanos() as f64 - self.clock_ns).max(0.0))
    }
}
