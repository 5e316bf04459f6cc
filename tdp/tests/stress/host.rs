//! The host: answers look-ups slowly, flushes, and keeps changing what backs the guest.

use crate::chaos::{Random, Verdict, allow_pauses, pause};
use crate::frames::PoisonPool;
use crate::memory::{
    AREAS, BLOCK_PAGES, BLOCKS, Memory, PAGES, Standing, all_areas, area_range, area_start,
};
use crate::plan::{Flaw, Plan};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tdp::protected::Unprotected;
use tdp::{
    Access, AddressSpaceId, FlushRequest, Format, Gfn, GfnRange, Host, Level, Lookup, Mapping, Mmu,
    Perms, Slot, SlotFlags, SlotId, TlbTracker,
};

pub(crate) const SPACE: AddressSpaceId = AddressSpaceId(0);

/// The host as the MMU sees it.
pub(crate) struct StressHost {
    pub(crate) frames: PoisonPool,
    pub(crate) tlb: TlbTracker,
    pub(crate) memory: Arc<Memory>,
    pub(crate) flaw: Option<Flaw>,
    /// Look-ups, of which some say that they would sleep.
    lookups: AtomicU64,
}

impl StressHost {
    pub(crate) fn new(frames: PoisonPool, memory: Arc<Memory>, flaw: Option<Flaw>) -> Self {
        Self {
            frames,
            tlb: TlbTracker::new(),
            memory,
            flaw,
            lookups: AtomicU64::new(0),
        }
    }

    fn find(&self, slot: &Slot<usize>, gfn: Gfn) -> Lookup {
        let page = slot.backing() * PAGES + slot.offset(gfn) as usize;
        let (pfn, level) = self.memory.backing(page);
        // Between finding the page and saying so: the place to be slow.
        pause(16);
        Lookup::Mapped(Mapping::memory(pfn, level, Perms::RWX))
    }
}

impl Host for StressHost {
    type Frames = PoisonPool;
    type Protected = Unprotected;

    fn protected(&self) -> &Unprotected {
        &Unprotected
    }
    /// The area.
    type Backing = usize;

    fn frames(&self) -> &PoisonPool {
        &self.frames
    }

    fn lookup(&self, slot: &Slot<usize>, gfn: Gfn, _access: Access) -> Lookup {
        if self
            .lookups
            .fetch_add(1, Ordering::Relaxed)
            .is_multiple_of(8)
        {
            pause(4);
            return Lookup::Blocking;
        }
        self.find(slot, gfn)
    }

    fn lookup_blocking(&self, slot: &Slot<usize>, gfn: Gfn, _access: Access) -> Lookup {
        let found = self.find(slot, gfn);
        pause(2);
        found
    }

    fn flush(&self, _request: &FlushRequest) {
        pause(4);
        let neglected = match self.flaw {
            Some(Flaw::NoFlush) => true,
            Some(Flaw::NoFlushOfSizes) => CHANGES_SIZES.get(),
            _ => false,
        };
        if !neglected {
            self.tlb.track(|_| {});
        }
    }
}

thread_local! {
    /// This thread is about to flush what a change of sizes left.
    static CHANGES_SIZES: Cell<bool> = const { Cell::new(false) };
}

/// How often each thing was done.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct HostCounts {
    pub(crate) invalidations: u64,
    pub(crate) zaps: u64,
    pub(crate) teardowns: u64,
    pub(crate) slots: u64,
    pub(crate) splits: u64,
    pub(crate) collapsed: u64,
    pub(crate) recovered: u64,
}

/// One of the host's threads.
pub(crate) struct Hand<F: Format> {
    pub(crate) mmu: Mmu<F, StressHost>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) plan: Plan,
    pub(crate) random: Random,
    pub(crate) counts: HostCounts,
}

pub(crate) fn insert_area<F: Format>(mmu: &Mmu<F, StressHost>, area: usize, moved: bool) {
    let slot = Slot::new(area_range(area, moved), area).with_id(SlotId(area as u32));
    mmu.slots().insert(slot).expect("its place is free");
}

impl<F: Format> Hand<F> {
    /// Works until the run is over.
    pub(crate) fn run(mut self, verdict: &Verdict) -> HostCounts {
        allow_pauses(self.random.next());
        let weights = [
            self.plan.invalidations,
            self.plan.zaps,
            self.plan.teardowns,
            self.plan.slots,
            self.plan.sizes,
        ];
        let sum: u64 = weights.iter().sum();
        while !verdict.is_over() {
            let mut choice = self.random.below(sum);
            let mut number = 0;
            while choice >= weights[number] {
                choice -= weights[number];
                number += 1;
            }
            match number {
                0 => self.invalidate(),
                1 => self.zap(),
                2 => self.tear_down(),
                3 => self.change_slot(),
                _ => self.change_sizes(),
            }
            // Lets the guest come in between.
            for _ in 0..self.random.below(4) {
                std::thread::yield_now();
            }
        }
        self.counts
    }

    /// Some pages from somewhere in an area on: few, or whole blocks.
    fn some_pages(&mut self) -> (usize, usize) {
        if self.random.once_in(3) {
            let block = self.random.below(BLOCKS as u64) as usize;
            let blocks = 1 + self.random.below((BLOCKS - block) as u64) as usize;
            (block * BLOCK_PAGES, blocks * BLOCK_PAGES)
        } else {
            let first = self.random.below(PAGES as u64) as usize;
            let count = 1 + self.random.below(8) as usize;
            (first, count.min(PAGES - first))
        }
    }

    /// Invalidates some pages of an area, moves them to other homes, and ends the invalidation.
    fn invalidate(&mut self) {
        let area = self.random.below(AREAS as u64) as usize;
        let (first, count) = self.some_pages();
        let memory = self.memory.clone();
        let _lock = memory.locks[area].lock().expect("nobody panics inside");
        let start = Gfn(area_start(area, memory.standing(area).moved).0 + first as u64);
        let mut range = GfnRange::new(start, count as u64).expect("far from the end");
        if self.random.once_in(4) {
            // More than what moves: meets other invalidations.
            range.end = Gfn(range.end.0 + self.random.below(2 * PAGES as u64));
        }
        let invalidation = self.mmu.invalidate_begin(SPACE, range);
        pause(2);
        if self.plan.flaw == Some(Flaw::GivesAwayFirst) {
            self.move_pages(area, first, count);
            pause(2);
        }
        let flushed = invalidation.zap().flush();
        if self.plan.flaw != Some(Flaw::GivesAwayFirst) {
            self.move_pages(area, first, count);
        }
        pause(2);
        invalidation.end(flushed);
        self.counts.invalidations += 1;
    }

    fn move_pages(&self, area: usize, first: usize, count: usize) {
        let first = area * PAGES + first;
        if count.is_multiple_of(BLOCK_PAGES) && first.is_multiple_of(BLOCK_PAGES) {
            let block = first / BLOCK_PAGES;
            for block in block..block + count / BLOCK_PAGES {
                self.memory.move_block(block);
            }
        } else {
            for page in first..first + count {
                self.memory.move_page(page);
            }
        }
    }

    /// Zaps a range, for no reason.
    fn zap(&mut self) {
        let moved = self.random.once_in(2);
        let area = self.random.below(AREAS as u64) as usize;
        let range = match self.random.below(4) {
            0 => all_areas(moved),
            1 => area_range(area, moved),
            _ => {
                let (first, count) = self.some_pages();
                let start = Gfn(area_start(area, moved).0 + first as u64);
                GfnRange::new(start, count as u64).expect("far from the end")
            }
        };
        let pending = if self.random.once_in(3) {
            self.mmu.zap_leaves(SPACE, range)
        } else {
            self.mmu.zap(SPACE, range)
        };
        // Taken away, and not flushed: others sweep the same range meanwhile.
        pause(2);
        pending.flush();
        self.counts.zaps += 1;
        if self.random.once_in(16) {
            self.mmu.synchronize();
        }
    }

    /// Splits or collapses a range, or takes a step of recovery.
    fn change_sizes(&mut self) {
        let area = self.random.below(AREAS as u64) as usize;
        let range = match self.random.below(4) {
            0 => all_areas(self.random.once_in(2)),
            1 => area_range(area, self.memory.standing(area).moved),
            _ => {
                let (first, count) = self.some_pages();
                let start = area_start(area, self.memory.standing(area).moved);
                GfnRange::new(Gfn(start.0 + first as u64), count as u64).expect("far from the end")
            }
        };
        let pending = match self.random.below(8) {
            0..3 => {
                let done = match self.mmu.split(SPACE, range, Level::L1) {
                    Ok(done) => done,
                    Err(stopped) => stopped.done,
                };
                self.counts.splits += done.splits;
                return;
            }
            3..7 => {
                let pending = self.mmu.collapse(SPACE, range);
                self.counts.collapsed += pending.tables() as u64;
                pending
            }
            _ => {
                let pending = self.mmu.recover_nx(1);
                self.counts.recovered += pending.tables() as u64;
                pending
            }
        };
        // Unlinked, and not flushed: the guest still walks there.
        pause(2);
        CHANGES_SIZES.set(true);
        pending.flush();
        CHANGES_SIZES.set(false);
    }

    /// Makes the roots obsolete and takes them down.
    fn tear_down(&mut self) {
        let teardown = self.mmu.invalidate_roots();
        pause(2);
        teardown.finish();
        self.counts.teardowns += 1;
    }

    /// Moves a slot, removes and inserts it, or changes its flags.
    fn change_slot(&mut self) {
        let area = self.random.below(AREAS as u64) as usize;
        let memory = self.memory.clone();
        let _lock = memory.locks[area].lock().expect("nobody panics inside");
        let now = memory.standing(area);
        let id = SlotId(area as u32);
        let slots = self.mmu.slots();
        let mut next = now;
        memory.stand(
            area,
            Standing {
                changing: true,
                ..now
            },
        );
        match self.random.below(3) {
            0 => {
                next.moved = !now.moved;
                let start = area_start(area, next.moved);
                slots
                    .move_to(SPACE, id, start)
                    .expect("its other place is free");
            }
            1 => {
                next.read_only = !now.read_only;
                let flags = if next.read_only {
                    SlotFlags::READ_ONLY
                } else {
                    SlotFlags::empty()
                };
                slots
                    .set_flags(SPACE, id, flags)
                    .expect("the slot is there");
            }
            _ => {
                slots.remove(SPACE, id).expect("the slot is there");
                let gone = Standing {
                    changing: false,
                    present: false,
                    ..now
                };
                memory.stand(area, gone);
                // All of it belongs to others for a while, and comes back elsewhere.
                for block in 0..BLOCKS {
                    memory.move_block(area * BLOCKS + block);
                }
                pause(2);
                memory.stand(
                    area,
                    Standing {
                        changing: true,
                        ..now
                    },
                );
                insert_area(&self.mmu, area, now.moved);
                next.read_only = false;
            }
        }
        pause(2);
        next.present = true;
        memory.stand(area, next);
        self.counts.slots += 1;
    }
}
