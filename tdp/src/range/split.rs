//! Splitting large leaves of the shared half outside any fault.
//!
//! Protocol. A table that translates like the leaf is made and filled first, then exchanged for it (INV: publish-complete).
//! The whole old value is compared, so that a bit which the processor set since the children were made makes the exchange
//! fail and the children be made anew (INV: volatile-atomic). Both translate alike, so there is nothing to flush.
//!
//! Frames for the tables are got in batches while the walk holds nothing: where a batch runs out the visit ends, the next
//! batch is got, and the walk goes on at the same leaf. It is in pre-order and reads an entry again before it goes below it,
//! so one pass takes a leaf of 1 GiB down to 4 KiB. What is left of a batch goes back at the end.

use crate::entry::{self, EntryRef, TABLE_ENTRIES};
use crate::event;
use crate::host::{AddressSpaceId, FrameSource, Host, OutOfFrames};
use crate::iter::{Step, TdpIter};
use crate::mmu::{Mmu, Shared};
use crate::nx;
use crate::root::Root;
use crate::stats::{Deferred, Stat, Tally};
use crate::table::{self, Place, TableState};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use tdp_arch::{Format, Gfn, GfnRange, Level, Pfn, Spte};
use tdp_rcu::sync::prefetch;

/// Frames got at a time: enough that beginning a visit costs little beside them, few enough that it ends soon.
const BATCH: u64 = 128;
/// Tables filled before the first of them is linked. An exchange waits until the stores before it have left the processor:
/// one wait for many tables.
const AHEAD: usize = 8;
/// Cache lines of the next table that are fetched while one is filled. What reads ahead in the processor by itself stops at the end
/// of a page.
const LINES_AHEAD: usize = 16;
/// Rounds of driving reclamation before an allocation gives up.
const RECLAIM_ROUNDS: usize = 128;

/// What a split did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SplitReport {
    /// Large leaves replaced by tables.
    pub splits: u64,
    /// First frame that was not reached: the end of the range if all was.
    pub next: Gfn,
}

/// No frame was left for a table, not even after waiting for grace periods. What was split before stays so; what is large
/// from [`next`](SplitReport::next) on is large still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("split {} leaves and stopped at {}: {error}", done.splits, done.next)]
pub struct SplitStopped {
    /// How far it came.
    pub done: SplitReport,
    /// Why it stopped.
    pub error: OutOfFrames,
}

/// A table that is ready to take the place of a leaf.
struct Filled {
    /// First frame of the leaf.
    gfn: Gfn,
    /// Its level.
    level: Level,
    /// The leaf that it was made of.
    old: Spte,
    pfn: Pfn,
}

/// Frames on their way to become tables. Dropped, they go back.
struct Batch<'a, F: Format, H: Host> {
    shared: &'a Shared<F, H>,
    frames: Vec<Pfn>,
}

impl<'a, F: Format, H: Host> Batch<'a, F, H> {
    fn new(shared: &'a Shared<F, H>) -> Self {
        Self {
            shared,
            frames: Vec::new(),
        }
    }

    /// Gets up to `want` frames, at least one. The caller holds no visit, which would hold up what may be freed.
    fn fill(&mut self, want: u64) -> Result<(), OutOfFrames> {
        let shared = self.shared;
        if shared.domain.is_over_bound() {
            shared.domain.reclaim(RECLAIM_ROUNDS);
        }
        let mut drained = false;
        let mut room = [Pfn(0); BATCH as usize];
        let want = want.clamp(1, BATCH) as usize;
        while self.frames.len() < want {
            match shared
                .host
                .frames()
                .allocate(&mut room[self.frames.len()..want])
            {
                Ok(count) => {
                    let got = &room[self.frames.len()..][..count];
                    for &pfn in got {
                        shared.meta.set_state(pfn, TableState::Spare);
                    }
                    self.frames.extend_from_slice(got);
                    // Taken from the end: in the order of their addresses, which the processor sees and reads ahead.
                    self.frames.sort_unstable_by(|a, b| b.cmp(a));
                }
                Err(_) if !self.frames.is_empty() => break,
                Err(error) if drained => return Err(error),
                Err(_) => {
                    shared.domain.drain(RECLAIM_ROUNDS);
                    drained = true;
                }
            }
        }
        Ok(())
    }
}

impl<F: Format, H: Host> Drop for Batch<'_, F, H> {
    fn drop(&mut self) {
        for &pfn in &self.frames {
            self.shared.meta.set_state(pfn, TableState::Free);
        }
        self.shared.host.frames().free(&self.frames);
    }
}

impl<F: Format, H: Host> Shared<F, H> {
    /// Splits the leaves of a range, in the current root of an address space, until none above `to` meets it.
    pub(crate) fn split(
        &self,
        as_id: AddressSpaceId,
        range: GfnRange,
        to: Level,
    ) -> Result<SplitReport, SplitStopped> {
        event::sweep("split", as_id, range);
        let mut batch = Batch::new(self);
        let mut done = SplitReport {
            splits: 0,
            next: range.start,
        };
        for root in self.roots.of(as_id) {
            // A vCPU on an obsolete root takes the next one before it can be granted anything.
            if !root.is_obsolete() {
                self.split_in(&root, range, &mut batch, &mut done, |level, _| level > to)?;
            }
        }
        done.next = range.end;
        Ok(done)
    }

    /// Splits what maps `gfn` in the shared half until no leaf of which `range` covers only a part does. Without a frame
    /// for a table the leaf stays.
    pub(crate) fn split_partly_covered(&self, as_id: AddressSpaceId, range: GfnRange, gfn: Gfn) {
        let one = GfnRange {
            start: gfn,
            end: Gfn(gfn.0 + 1),
        };
        let mut batch = Batch::new(self);
        for root in self.roots.of(as_id) {
            let mut done = SplitReport::default();
            let partly = |level, covered| level > Level::L1 && !range.covers(covered);
            if self
                .split_in(&root, one, &mut batch, &mut done, partly)
                .is_err()
            {
                return;
            }
        }
    }

    /// Splits the leaves of a root that meet `range` and that `wants` says, by their level and frames.
    fn split_in(
        &self,
        root: &Root<H>,
        range: GfnRange,
        batch: &mut Batch<'_, F, H>,
        done: &mut SplitReport,
        wants: impl Fn(Level, GfnRange) -> bool,
    ) -> Result<(), SplitStopped> {
        let mut rest = range;
        while let Some(stopped_at) = self.split_while_frames_last(root, rest, batch, done, &wants) {
            rest.start = stopped_at.max(range.start);
            done.next = rest.start;
            // One for each leaf of 2 MiB that may be there, and those above.
            let want = rest.pages() / Level::L2.pages() + 2;
            batch
                .fill(want)
                .map_err(|error| SplitStopped { done: *done, error })?;
        }
        Ok(())
    }

    /// One visit. Returns the place of the first leaf for which no frame was left.
    fn split_while_frames_last(
        &self,
        root: &Root<H>,
        range: GfnRange,
        batch: &mut Batch<'_, F, H>,
        done: &mut SplitReport,
        wants: &impl Fn(Level, GfnRange) -> bool,
    ) -> Option<Gfn> {
        let tally = Deferred::new(&self.shards.sweeps);
        let mut visit = self.domain.visit();
        let mut iter = TdpIter::<F, H>::new(&mut visit, &self.host, root, range, Level::L2);
        let mut ready: VecDeque<Filled> = VecDeque::with_capacity(AHEAD);
        let mut stopped_at = None;
        while let Some(step) = iter.next() {
            let covered = step.range();
            if !F::is_leaf(step.spte, step.level) || !wants(step.level, covered) {
                continue;
            }
            // What was filled for entries that are no large leaves any more.
            while let Some(filled) =
                ready.pop_front_if(|filled| (filled.level, filled.gfn) != (step.level, step.gfn))
            {
                batch.frames.push(filled.pfn);
            }
            if ready.is_empty() {
                self.fill_ahead(root, range, step, batch, &mut ready, wants);
            }
            let Some(filled) = ready.pop_front() else {
                stopped_at = Some(covered.start);
                break;
            };
            let pfn = filled.pfn;
            if self.split_shared_leaf(root.as_id, step, filled, &tally) {
                done.splits += 1;
            } else {
                self.meta.set_state(pfn, TableState::Spare);
                batch.frames.push(pfn);
            }
        }
        let left = ready.into_iter().map(|filled| filled.pfn);
        batch.frames.extend(left);
        stopped_at
    }

    /// Fills tables for the leaf of `step` and for its neighbours in the same table that are to be split.
    fn fill_ahead(
        &self,
        root: &Root<H>,
        range: GfnRange,
        step: Step<'_>,
        batch: &mut Batch<'_, F, H>,
        ready: &mut VecDeque<Filled>,
        wants: &impl Fn(Level, GfnRange) -> bool,
    ) {
        let level = step.level;
        // A leaf of 1 GiB is split further before its neighbour has its turn.
        let most = if level == Level::L2 { AHEAD } else { 1 };
        let table = table::page(self.host.frames(), step.table);
        let first = root.index(level, step.gfn);
        for ahead in 0..most {
            let gfn = Gfn(step.gfn.0 + ahead as u64 * level.pages());
            let old = if ahead == 0 {
                step.spte
            } else {
                match table.get(first + ahead).map(EntryRef::load) {
                    Some(old) if gfn < range.end => old,
                    _ => break,
                }
            };
            if !F::is_leaf(old, level) || !wants(level, level.range(gfn)) {
                continue;
            }
            let Some(pfn) = batch.frames.pop() else {
                break;
            };
            if let Some(&next) = batch.frames.last() {
                prefetch(table::page(self.host.frames(), next), LINES_AHEAD);
            }
            let (first, step) = nx::children::<F>(old, level);
            table::page(self.host.frames(), pfn).fill(first, step);
            ready.push_back(Filled {
                gfn,
                level,
                old,
                pfn,
            });
        }
    }

    /// Replaces a large leaf by the table that was filled for it. `false` if the entry is no leaf any more; the frame is then
    /// linked nowhere.
    fn split_shared_leaf(
        &self,
        as_id: AddressSpaceId,
        step: Step<'_>,
        filled: Filled,
        tally: &impl Tally,
    ) -> bool {
        let pfn = filled.pfn;
        let mut made_of = Some(filled.old);
        let (entry, level, mut old) = (step.entry, step.level, step.spte);
        let Some(below) = level.below() else {
            return false;
        };
        let place = Place {
            as_id,
            private: false,
            level: below,
            gfn: step.gfn,
        };
        self.meta.link(pfn, place);
        let page = table::page(self.host.frames(), pfn);
        while F::is_leaf(old, level) {
            if made_of.take() != Some(old) {
                let (first, step) = nx::children::<F>(old, level);
                page.fill(first, step);
            }
            match entry::exchange::<F>(entry, level, old, F::table(pfn), tally) {
                Ok(()) => {
                    tally.add(Stat::pages(below), TABLE_ENTRIES as i64);
                    tally.add(Stat::Splits, 1);
                    return true;
                }
                Err(actual) => old = actual,
            }
        }
        false
    }
}

impl<F: Format, H: Host> Mmu<F, H> {
    /// Splits every leaf above `to` that meets a range, in one pass, into tables of leaves that translate alike. Nothing
    /// needs to be flushed. Faults go on meanwhile; one may install a large leaf again unless its slot forbids it.
    ///
    /// # Errors
    ///
    /// [`SplitStopped`] if no frame is left for a table: the rest of the range stays as it is, and whoever needs it small
    /// may take it from the guest or let the guest's faults split it.
    pub fn split(
        &self,
        as_id: AddressSpaceId,
        range: impl Into<GfnRange>,
        to: Level,
    ) -> Result<SplitReport, SplitStopped> {
        self.shared().split(as_id, range.into(), to)
    }
}
