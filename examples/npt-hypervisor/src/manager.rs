//! The host's work on a running guest: take memory away, move pages, log writes and copy them, all beside the vCPUs.
//!
//! Protocol of a move: begin the invalidation, zap, flush, copy the page, name the new frame as its backing, end the
//! invalidation, give the old frame back. A vCPU that still wrote to the old frame after the flush leaves a trace in a free
//! frame, and misses its write when it next reads the page.
//!
//! Protocol of a copy: switch the log on, copy every page, then again and again what was written meanwhile; pause the vCPUs,
//! copy what is left, compare. A page that differs was written without being logged.

use crate::guest::GuestProgram;
use crate::host::{Backing, BareHost, Way};
use crate::memory::{self, GuestFrames, REST};
use crate::vcpu::{self, GuestMmu, Shared, Tally};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use machine::processors::{apic_id, cycles, run_on};
use serde::Serialize;
use spin::Mutex;
use tdp::{AddressSpaceId, DirtyTracking, Gfn, GfnRange, Level, Pfn, Slot, SlotFlags, SlotId};

/// Guest frames of the paged slot, from 0 on.
const PAGED: u64 = 8192;
/// Guest frames of the slot that is one block, after them.
const BLOCK: u64 = 4096;
/// Guest memory, its end.
pub const GUEST_END: Gfn = Gfn(PAGED + BLOCK);
const ALL: GfnRange = GfnRange {
    start: Gfn(0),
    end: GUEST_END,
};
/// Frames of the paged slot that are free at any time.
const SPARE: u64 = 512;

const BLOCK_FRAMES: Pfn = REST;
const COPY_FRAMES: Pfn = Pfn(BLOCK_FRAMES.0 + BLOCK);
const PAGED_FRAMES: Range<Pfn> =
    Pfn(COPY_FRAMES.0 + GUEST_END.0)..Pfn(COPY_FRAMES.0 + GUEST_END.0 + PAGED + SPARE);

const SPACE: AddressSpaceId = AddressSpaceId(0);
const PAGED_SLOT: SlotId = SlotId(0);
const BLOCK_SLOT: SlotId = SlotId(1);

/// Longest wait for the guest to fault in part of what was taken away, in cycles.
const PATIENCE: u64 = 20_000_000;

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// vCPUs, each on a processor of its own.
    pub vcpus: usize,
    /// Nested faults that install or repair an entry, after which it ends.
    pub faults: u64,
    /// Whether processors are interrupted for a flush.
    pub kick: bool,
    /// Random number from which all others follow.
    pub seed: u64,
}

/// What became of one guest.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// How its writes were logged.
    pub dirty_tracking: &'static str,
    pub vcpus: Vec<Tally>,
    /// Nested faults in all; those that were told to retry; those that found the access possible already; the others, each
    /// of which installed or repaired an entry.
    pub faults: u64,
    pub retries: u64,
    pub spurious: u64,
    pub resolved: u64,
    /// Words that the guest read and did not expect.
    pub wrong_words: u64,
    /// Words of free frames that were written after the flush that should have made it impossible.
    pub late_writes: u64,
    /// Pages that were written and not logged.
    pub unlogged_pages: u64,
    /// Leaves that were taken away or restricted.
    pub zapped: u64,
    /// Pages that were moved to other frames.
    pub moved: u64,
    /// Times that the log was collected, and pages copied because of it.
    pub collections: u64,
    pub dirty_pages: u64,
    /// Comparisons of the whole of the guest's memory with its copy.
    pub comparisons: u64,
    /// Interrupts sent to other processors, and flushes asked for.
    pub kicks: u64,
    pub flushes: u64,
    /// Leaves that were split and tables that were folded.
    pub splits: u64,
    pub collapses: u64,
    /// What the tables hold that they should not.
    pub misplaced: u64,
    /// Table frames that were not given back, the root aside.
    pub leaked_tables: u64,
}

impl Report {
    /// Whether a translation was used that should have been gone.
    pub fn is_stale(&self) -> bool {
        self.wrong_words + self.late_writes + self.unlogged_pages > 0
    }
}

/// A generator of random numbers that are good enough to choose pages by.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % limit
    }
}

/// Runs one guest from its beginning to its end.
pub fn run_guest(plan: Plan, tracking: DirtyTracking) -> Report {
    let frames = GuestFrames::new(PAGED_FRAMES);
    for frame in BLOCK_FRAMES.0..PAGED_FRAMES.start.0 {
        memory::clear(Pfn(frame));
    }
    let host = BareHost::new(frames, PAGED, (1..=plan.vcpus).map(apic_id), plan.kick);
    let mmu = GuestMmu::builder(host)
        .physical_bits(40)
        .dirty_tracking(tracking)
        .build()
        .expect("these settings are possible");
    let slots = [
        Slot::new(Gfn(0)..Gfn(PAGED), Backing::Pages).with_id(PAGED_SLOT),
        Slot::new(Gfn(PAGED)..GUEST_END, Backing::Block(BLOCK_FRAMES)).with_id(BLOCK_SLOT),
    ];
    for slot in slots {
        mmu.slots().insert(slot).expect("the slots are apart");
    }
    let program = GuestProgram::new(GUEST_END, plan.vcpus);
    program.load(mmu.host());
    let shared = Arc::new(Shared {
        mmu,
        resolved: AtomicU64::new(0),
        wrong_words: AtomicU64::new(0),
        parked: AtomicUsize::new(0),
        stop: AtomicBool::new(false),
        done: Mutex::new(Vec::new()),
    });
    for number in 0..plan.vcpus {
        let presence = shared.mmu.host().tracker.vcpu();
        let shared = shared.clone();
        run_on(
            number + 1,
            Box::new(move || vcpu::run(&shared, number, presence, program)),
        );
    }
    let mut manager = Manager {
        random: Random(plan.seed),
        often_used: program.often_used(),
        plan,
        shared: &shared,
        zapped: 0,
        moved: 0,
        collections: 0,
        dirty_pages: 0,
        comparisons: 0,
        unlogged_pages: 0,
    };
    manager.run();
    manager.report(tracking)
}

struct Manager<'a> {
    shared: &'a Arc<Shared>,
    plan: Plan,
    random: Random,
    often_used: GfnRange,
    zapped: u64,
    moved: u64,
    collections: u64,
    dirty_pages: u64,
    comparisons: u64,
    unlogged_pages: u64,
}

impl Manager<'_> {
    fn mmu(&self) -> &GuestMmu {
        &self.shared.mmu
    }

    fn host(&self) -> &BareHost {
        self.mmu().host()
    }

    fn resolved(&self) -> u64 {
        self.shared.resolved.load(Ordering::Relaxed)
    }

    fn run(&mut self) {
        const QUIET: u64 = 24;
        const LOGGED: u64 = 24;
        const BETWEEN_COLLECTIONS: u64 = 4;
        let mut step = 0;
        while !self.has_ended() {
            if self.is_enough() {
                self.shared.stop.store(true, Ordering::Release);
            }
            self.host().set_way(Way::ALL[(step % 3) as usize]);
            self.disturb();
            let stopping = self.shared.stop.load(Ordering::Relaxed);
            match step % (QUIET + LOGGED) {
                QUIET if !stopping => self.begin_log(),
                phase if stopping || phase < QUIET => {}
                phase if phase == QUIET + LOGGED - 1 => self.end_log(),
                phase if phase % BETWEEN_COLLECTIONS == 0 => self.collect(),
                _ => {}
            }
            step += 1;
        }
    }

    /// Whether the guest may end: enough of its faults were resolved and its copy has been compared, or it has shown what it was
    /// to show.
    fn is_enough(&self) -> bool {
        let enough = self.resolved() >= self.plan.faults && self.comparisons > 0;
        let shown = !self.plan.kick && self.shared.wrong_words.load(Ordering::Relaxed) > 0;
        enough || shown
    }

    fn has_ended(&self) -> bool {
        self.shared.done.lock().len() == self.plan.vcpus
    }

    /// Takes memory away in one of several manners, and waits until the guest has wanted part of it back.
    fn disturb(&mut self) {
        let before = self.resolved();
        // Without interrupts all that is wanted is a translation that is used too late.
        let manner = if self.plan.kick {
            self.random.below(8)
        } else {
            7
        };
        let taken = match manner {
            0 => self.zap(2048),
            1 | 2 => self.zap(512),
            3 => self.protect(),
            4 => self.move_pages(64, (Gfn(0)..Gfn(PAGED)).into()),
            // Where a translation that was not flushed is used soonest.
            _ => self.move_pages(8, self.often_used),
        };
        let start = cycles();
        while self.resolved() - before < taken / 2
            && cycles() - start < PATIENCE
            && !self.has_ended()
        {
            core::hint::spin_loop();
        }
    }

    fn range(&mut self, pages: u64, within: GfnRange) -> GfnRange {
        let start = Gfn(within.start.0 + self.random.below(within.pages() - pages + 1));
        (start..Gfn(start.0 + pages)).into()
    }

    fn zap(&mut self, pages: u64) -> u64 {
        let range = self.range(pages, ALL);
        let pending = self.mmu().zap(SPACE, range);
        let taken = pending.leaves();
        pending.flush();
        self.zapped += taken;
        taken
    }

    fn protect(&mut self) -> u64 {
        let range = self.range(256, ALL);
        self.mmu().age(SPACE, range);
        let pending = self.mmu().write_protect(SPACE, range, Level::L1);
        let taken = pending.leaves();
        pending.flush();
        self.zapped += taken;
        taken
    }

    fn move_pages(&mut self, pages: u64, within: GfnRange) -> u64 {
        let range = self.range(pages, within);
        let (mmu, host) = (self.mmu(), self.host());
        let invalidation = mmu.invalidate_begin(SPACE, range);
        let pending = invalidation.zap();
        let taken = pending.leaves();
        let flushed = pending.flush();
        let mut old = Vec::new();
        for gfn in (range.start.0..range.end.0).map(Gfn) {
            if let Some(from) = host.page(gfn) {
                let to = host.frames.take();
                memory::copy(from, to);
                host.set_page(gfn, to);
                old.push(from);
            }
        }
        invalidation.end(flushed);
        // Only now: a vCPU may have been supplied with a frame meanwhile, but none could be left with one of these.
        old.iter().for_each(|&pfn| host.frames.give_back(pfn));
        self.zapped += taken;
        self.moved += old.len() as u64;
        taken
    }

    fn slots() -> [(SlotId, GfnRange); 2] {
        [
            (PAGED_SLOT, (Gfn(0)..Gfn(PAGED)).into()),
            (BLOCK_SLOT, (Gfn(PAGED)..GUEST_END).into()),
        ]
    }

    fn set_flags(&self, flags: SlotFlags) {
        for (slot, _) in Self::slots() {
            self.mmu()
                .slots()
                .set_flags(SPACE, slot, flags)
                .expect("the slot is there");
        }
    }

    /// The frame that backs `gfn`, if it has been used.
    fn frame(&self, gfn: Gfn) -> Option<Pfn> {
        if gfn.0 < PAGED {
            return self.host().page(gfn);
        }
        Some(Pfn(BLOCK_FRAMES.0 + gfn.0 - PAGED))
    }

    fn copy(&self, gfn: Gfn) {
        if let Some(from) = self.frame(gfn) {
            memory::copy(from, Pfn(COPY_FRAMES.0 + gfn.0));
        }
    }

    fn begin_log(&mut self) {
        self.set_flags(SlotFlags::LOG_DIRTY);
        (0..GUEST_END.0).for_each(|gfn| self.copy(Gfn(gfn)));
    }

    /// Copies what was written since the last time.
    fn collect(&mut self) {
        for (slot, gfns) in Self::slots() {
            let log = self
                .mmu()
                .dirty_log(SPACE, slot)
                .expect("the slot is logged");
            let mut marks = vec![0; log.words()];
            log.collect(&mut marks)
                .expect("as many words as it has")
                .flush();
            for (word, bits) in marks.into_iter().enumerate() {
                for bit in (0..64).filter(|bit| bits >> bit & 1 != 0) {
                    self.copy(Gfn(gfns.start.0 + word as u64 * 64 + bit));
                    self.dirty_pages += 1;
                }
            }
        }
        self.collections += 1;
    }

    /// Pauses the guest, copies the rest and compares.
    fn end_log(&mut self) {
        self.host().pause.store(true, Ordering::Release);
        self.host().expel();
        while self.shared.parked.load(Ordering::Acquire) < self.plan.vcpus {
            core::hint::spin_loop();
        }
        self.collect();
        let differs = |gfn: &u64| {
            self.frame(Gfn(*gfn))
                .is_some_and(|frame| !memory::equal(frame, Pfn(COPY_FRAMES.0 + gfn)))
        };
        self.unlogged_pages += (0..GUEST_END.0).filter(differs).count() as u64;
        self.comparisons += 1;
        self.host().pause.store(false, Ordering::Release);
        self.set_flags(SlotFlags::empty());
    }

    fn report(self, tracking: DirtyTracking) -> Report {
        let vcpus = core::mem::take(&mut *self.shared.done.lock());
        let audit = self.mmu().audit();
        // Upper tables too, which cover more than the guest has.
        self.mmu()
            .zap(SPACE, self.mmu().slots().addressable())
            .flush();
        // Twice: what was retired by the first is freed by the second.
        (0..2).for_each(|_| self.mmu().synchronize());
        let stats = self.mmu().stats();
        let sum = |of: fn(&Tally) -> u64| vcpus.iter().map(of).sum::<u64>();
        let (faults, retries, spurious) = (
            sum(|tally| tally.faults),
            sum(|tally| tally.retries),
            sum(|tally| tally.spurious),
        );
        Report {
            dirty_tracking: match tracking {
                DirtyTracking::WriteProtect => "write protection",
                DirtyTracking::DirtyBit => "dirty bits",
                DirtyTracking::ModificationLog => "modification log",
            },
            faults,
            retries,
            spurious,
            resolved: faults - retries - spurious,
            wrong_words: sum(|tally| tally.wrong_words),
            vcpus,
            late_writes: self.host().frames.late_writes(),
            unlogged_pages: self.unlogged_pages,
            zapped: self.zapped,
            moved: self.moved,
            collections: self.collections,
            dirty_pages: self.dirty_pages,
            comparisons: self.comparisons,
            kicks: self.host().kicks.load(Ordering::Relaxed),
            flushes: stats.flushes,
            splits: stats.splits,
            collapses: stats.collapses,
            misplaced: audit.misplaced + audit.unknown + audit.frozen,
            leaked_tables: self.host().table_frames().saturating_sub(1) as u64,
        }
    }
}
