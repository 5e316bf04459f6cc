//! Table frames that tell when one is used after it was freed, and that run out.
//!
//! A freed frame is filled with poison at once: half of it entries that look empty, so that whoever installs into a freed table
//! changes it, half large leaves that lead to a trap, so that a processor that walks there arrives at a frame of nobody's. Before a
//! frame is handed out again its poison must be whole.
#![allow(unsafe_code)]
// UNSAFETY: a frame source promises what its pages are; this one hands the promise of the pool on.

use super::chaos;
use crate::sync::{AtomicU64, Ordering};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use tdp::{
    Format, FrameSource, LeafAttrs, Level, MmapPool, OutOfFrames, Perms, Pfn, TableMemory,
    TablePage,
};
use tdp_arch::walker::PhysicalMemory;

/// First host frame of the trap, which is nobody's.
const TRAP: Pfn = Pfn(1 << 33);

const NEVER_USED: u64 = 0;
const OUT: u64 = 1;
const FREED: u64 = 2;

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct SoakFrames {
    pool: Arc<MmapPool>,
    states: Arc<[AtomicU64]>,
    poison: [u64; 2],
    /// Frames written after they were freed, and frames handed out or freed twice.
    wrong: Arc<AtomicU64>,
}

impl SoakFrames {
    pub(super) fn new<F: Format>(pool: MmapPool) -> Self {
        let trap = LeafAttrs {
            accessed: true,
            dirty: true,
            ..LeafAttrs::memory(Perms::RWX)
        };
        Self {
            states: (0..pool.limit())
                .map(|_| AtomicU64::new(NEVER_USED))
                .collect(),
            pool: Arc::new(pool),
            poison: [F::EMPTY.0, F::leaf(TRAP, Level::L2, trap).0],
            wrong: Arc::default(),
        }
    }

    pub(super) fn allocated(&self) -> usize {
        self.pool.allocated()
    }

    /// Looks at every free frame, and returns what was wrong with any so far.
    pub(super) fn check(&self) -> u64 {
        let base = self.pool.window().start.0;
        for (index, state) in self.states.iter().enumerate() {
            if state.load(Ordering::Acquire) == FREED {
                self.check_poison(Pfn(base + index as u64));
            }
        }
        self.wrong.load(Ordering::Relaxed)
    }

    fn note(&self, wrong: bool) {
        self.wrong.fetch_add(u64::from(wrong), Ordering::Relaxed);
    }

    fn swap(&self, pfn: Pfn, state: u64) -> u64 {
        let index = (pfn.0 - self.pool.window().start.0) as usize;
        self.states[index].swap(state, Ordering::AcqRel)
    }

    fn poison(&self, pfn: Pfn) {
        let memory = TableMemory::new(&*self.pool);
        for (hpa, poison) in self.words(pfn) {
            let mut current = memory.load(hpa).unwrap_or_default();
            while let Err(found) = memory.compare_exchange(hpa, current, poison) {
                current = found;
            }
        }
    }

    fn check_poison(&self, pfn: Pfn) {
        let memory = TableMemory::new(&*self.pool);
        let whole = self
            .words(pfn)
            .all(|(hpa, poison)| memory.load(hpa) == Some(poison));
        self.note(!whole);
    }

    fn words(&self, pfn: Pfn) -> impl Iterator<Item = (tdp::Hpa, u64)> + use<'_> {
        (0..512).map(move |n| {
            (
                tdp::Hpa(pfn.address().0 + 8 * n),
                self.poison[n as usize % 2],
            )
        })
    }
}

// SAFETY: every promise is the pool's own; refusing is always allowed.
unsafe impl FrameSource for SoakFrames {
    fn window(&self) -> Range<Pfn> {
        self.pool.window()
    }

    fn allocate(&self, out: &mut [Pfn]) -> Result<usize, OutOfFrames> {
        if chaos::is_starved() {
            let limit = self.pool.limit();
            return Err(OutOfFrames { limit });
        }
        let count = self.pool.allocate(out)?;
        for &pfn in &out[..count] {
            match self.swap(pfn, OUT) {
                FREED => self.check_poison(pfn),
                state => self.note(state == OUT),
            }
        }
        Ok(count)
    }

    fn free(&self, frames: &[Pfn]) {
        for &pfn in frames {
            self.poison(pfn);
            self.note(self.swap(pfn, FREED) != OUT);
        }
        self.pool.free(frames);
    }

    fn page(&self, pfn: Pfn) -> NonNull<TablePage> {
        // Whoever walks comes by here with a table in hand: the place to be slow.
        chaos::pause();
        self.pool.page(pfn)
    }
}
