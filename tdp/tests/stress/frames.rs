//! Table frames that tell when one is used after it was freed.
//!
//! A freed frame is filled with poison at once and handed out again as early as possible. Half of the poison is entries
//! that look empty, so that whoever installs into a freed table changes it; half is large leaves that lead to a trap,
//! so that a processor that walks a freed table arrives there. Before a frame is handed out again its poison must be
//! whole.
#![allow(unsafe_code)]
// UNSAFETY: writes poison through the addresses of pages, and hands the pool's promises on.

use crate::chaos::{Verdict, pause};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use tdp::{Format, FrameSource, LeafAttrs, Level, MmapPool, OutOfFrames, Perms, Pfn, TablePage};

/// First of the host frames to which poison leads: 1 GiB of them.
pub(crate) const TRAP: Pfn = Pfn(1 << 33);

const NEVER_USED: u8 = 0;
const OUT: u8 = 1;
const FREED: u8 = 2;

/// The frames.
#[derive(Clone)]
pub(crate) struct PoisonPool {
    pool: Arc<MmapPool>,
    states: Arc<[AtomicU8]>,
    poison: [u64; 2],
    verdict: Verdict,
}

impl PoisonPool {
    pub(crate) fn new<F: Format>(pool: MmapPool, verdict: Verdict) -> Self {
        let trap = LeafAttrs {
            accessed: false,
            dirty: false,
            ..LeafAttrs::memory(Perms::RWX)
        };
        Self {
            states: (0..pool.limit())
                .map(|_| AtomicU8::new(NEVER_USED))
                .collect(),
            pool: Arc::new(pool),
            poison: [F::EMPTY.0, F::leaf(TRAP, Level::L2, trap).0],
            verdict,
        }
    }

    pub(crate) fn allocated(&self) -> usize {
        self.pool.allocated()
    }

    fn state(&self, pfn: Pfn) -> &AtomicU8 {
        &self.states[(pfn.0 - self.pool.window().start.0) as usize]
    }

    fn words(&self, pfn: Pfn) -> &[AtomicU64; 512] {
        // SAFETY: a page of the pool stays valid for as long as the pool lives, and is 512 atomic words.
        unsafe { self.pool.page(pfn).cast().as_ref() }
    }

    fn poison(&self, pfn: Pfn) {
        for (word, poison) in self.words(pfn).iter().zip(self.poison.iter().cycle()) {
            word.store(*poison, Ordering::Relaxed);
        }
    }

    fn check_poison(&self, pfn: Pfn) {
        let words = self.words(pfn).iter().zip(self.poison.iter().cycle());
        for (index, (word, poison)) in words.enumerate() {
            let found = word.load(Ordering::Relaxed);
            if found != *poison {
                self.verdict.violation(format_args!(
                    "entry {index} of table frame {pfn} was written after the frame was freed: {found:#x}"
                ));
            }
        }
    }

    /// Asserts that nobody wrote to a frame that is free now.
    pub(crate) fn check_free_frames(&self) {
        let base = self.pool.window().start.0;
        for (index, state) in self.states.iter().enumerate() {
            if state.load(Ordering::Acquire) == FREED {
                self.check_poison(Pfn(base + index as u64));
            }
        }
    }
}

// SAFETY: every promise is the pool's own.
unsafe impl FrameSource for PoisonPool {
    fn window(&self) -> Range<Pfn> {
        self.pool.window()
    }

    fn allocate(&self, out: &mut [Pfn]) -> Result<usize, OutOfFrames> {
        let count = self.pool.allocate(out)?;
        for &pfn in &out[..count] {
            match self.state(pfn).swap(OUT, Ordering::AcqRel) {
                FREED => self.check_poison(pfn),
                OUT => self
                    .verdict
                    .violation(format_args!("table frame {pfn} was handed out twice")),
                _ => {}
            }
        }
        Ok(count)
    }

    fn free(&self, frames: &[Pfn]) {
        for &pfn in frames {
            self.poison(pfn);
            if self.state(pfn).swap(FREED, Ordering::AcqRel) != OUT {
                self.verdict
                    .violation(format_args!("table frame {pfn} was freed twice"));
            }
        }
        self.pool.free(frames);
    }

    fn page(&self, pfn: Pfn) -> NonNull<TablePage> {
        // Whoever walks comes by here with a pointer to a table in hand: the place to be slow.
        pause(64);
        self.pool.page(pfn)
    }
}
