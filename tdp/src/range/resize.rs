//! Splitting and folding private memory: a large leaf into a table, a table of leaves into a large one.
//!
//! Protocol of a split. The table is filled before the leaf is frozen, so that whatever may fail without the module fails
//! first. Then: freeze the leaf, block, ticket, split, publish the table (INV: publish-complete). What fails is undone: the
//! block taken back, the leaf put back.
//!
//! Protocol of a fold. Freeze the table's entry, then seal its entries one by one, which waits for hand-offs below and keeps
//! new ones away (INV: unlink-seals). If they are 512 leaves of consecutive frames: block, ticket, merge, publish the leaf,
//! retire the table. Otherwise, or if the module says no, the entries are put back and the table too; unless it is blocked
//! and stays so, for want of a ticket or by a panic of the hook (`blocked.rs`).

use crate::entry::{EntryRef, TABLE_ENTRIES};
use crate::frozen::{EntryPlace, FrozenEntry};
use crate::handoff::{is_blocked, private_leaf};
use crate::host::{AddressSpaceId, FrameSource, Host};
use crate::iter::TdpIter;
use crate::mmu::Shared;
use crate::protected::{HandOffCause, HandOffError, HandOffStep, Patience, ProtectedTable};
use crate::reclaim::Retired;
use crate::stats::{Stat, Tally};
use crate::table::{self, Place, TableState};
use alloc::vec::Vec;
use tdp_arch::{Format, Gfn, GfnRange, Level, Pfn, Spte};
use tdp_rcu::sync::Pause;

/// What folding a range of private memory came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Folded {
    /// Tables replaced by a large leaf.
    pub folded: u64,
    /// Tables that were not uniform, or that the module did not merge.
    pub left: u64,
}

impl<F: Format, H: Host> Shared<F, H> {
    /// Splits what maps `gfn` in the private half until no leaf above `at_most` does.
    pub(crate) fn split_private(
        &self,
        as_id: AddressSpaceId,
        gfn: Gfn,
        at_most: Level,
    ) -> Result<(), HandOffError> {
        let Some(root) = self.roots.private(as_id) else {
            return Ok(());
        };
        let range = GfnRange {
            start: gfn,
            end: Gfn(gfn.0 + 1),
        };
        let mut visit = self.domain.visit();
        let mut iter = TdpIter::<F, H>::new(&mut visit, &self.host, &root, range, Level::L1);
        while let Some(step) = iter.next() {
            let place = EntryPlace {
                as_id,
                gfn: step.gfn,
                level: step.level,
            };
            let mut pause = Pause::new();
            let mut old = step.spte;
            // A bounded wait: whoever asked looks again.
            while old == F::FROZEN && !pause.is_over() {
                self.shards.sweeps.add(Stat::FrozenWaits, 1);
                pause.wait();
                old = step.entry.load();
            }
            if F::is_leaf(old, step.level) && step.level > at_most && !is_blocked::<F>(old) {
                self.split_leaf(step.entry, place, old)?;
            }
        }
        Ok(())
    }

    fn split_leaf(
        &self,
        entry: EntryRef<'_>,
        place: EntryPlace,
        old: Spte,
    ) -> Result<(), HandOffError> {
        let fail = |step, cause| HandOffError { place, step, cause };
        let table = self.host.protected();
        let capabilities = table.capabilities();
        let Some(below) = place.level.below().filter(|_| capabilities.split_live) else {
            return Err(fail(HandOffStep::Split, HandOffCause::Refused(0)));
        };
        let new = NewTable::make(self, place, below, capabilities.needs_link)
            .ok_or(fail(HandOffStep::Split, HandOffCause::OutOfFrames))?;
        let first = F::leaf_pfn(old, place.level);
        table::page(self.host.frames(), new.table)
            .fill(private_leaf::<F>(first, below), below.bytes());
        let Ok(mut frozen) = FrozenEntry::freeze::<F>(entry, place, old) else {
            // Changed meanwhile: whoever asked looks again.
            return Ok(());
        };
        let drained = self
            .block_and_drain(&mut frozen)
            .map_err(|(step, cause)| fail(step, cause))?;
        // Without twins the module finds a page of its own.
        let twin = new.twin.unwrap_or(Pfn(0));
        let done = self
            .sweep_caller(Patience::Sweep)
            .call(HandOffStep::Split, &frozen, || {
                table.split(&frozen, twin, &drained)
            });
        if let Err(cause) = done {
            self.undo_block(&mut frozen, &drained);
            return Err(fail(HandOffStep::Split, cause));
        }
        let pfn = new.keep();
        let tally = &self.shards.sweeps;
        frozen.publish::<F>(F::table(pfn), tally);
        tally.add(Stat::pages(below), TABLE_ENTRIES as i64);
        tally.add(Stat::Splits, 1);
        Ok(())
    }

    /// Takes a block back after a drained ticket; if that is not to be had the entry stays blocked in both tables.
    fn undo_block(&self, frozen: &mut FrozenEntry<'_>, drained: &crate::protected::Drained) {
        let table = self.host.protected();
        if table.capabilities().needs_block {
            let done =
                self.sweep_caller(Patience::Sweep)
                    .call(HandOffStep::Unblock, frozen, || {
                        table.unblock(frozen, drained)
                    });
            if done.is_ok() {
                frozen.falls_back_to(frozen.old());
            }
        }
    }

    /// Folds private tables of leaves that lie wholly in a range into large leaves, where the module and attributes allow.
    pub(crate) fn fold_private(
        &self,
        as_id: AddressSpaceId,
        range: GfnRange,
    ) -> Result<Folded, HandOffError> {
        let mut folded = Folded::default();
        let (Some(root), Some(confidential)) =
            (self.roots.private(as_id), self.confidential.as_deref())
        else {
            return Ok(folded);
        };
        let limit = confidential.leaf_limit().min(self.max_leaf);
        if !confidential.capabilities.merge || limit < Level::L2 {
            return Ok(folded);
        }
        let mut visit = self.domain.visit();
        let mut iter = TdpIter::<F, H>::new(&mut visit, &self.host, &root, range, Level::L2);
        while let Some(step) = iter.next() {
            if step.level != Level::L2 || !range.covers(step.range()) {
                continue;
            }
            let old = step.spte;
            // One that somebody owns is being worked on: left, not waited for.
            if !F::is_mmu_present(old) || F::is_leaf(old, step.level) || is_blocked::<F>(old) {
                continue;
            }
            let allowed = confidential.attributes.largest_level(step.gfn, step.level);
            let place = EntryPlace {
                as_id,
                gfn: step.gfn,
                level: step.level,
            };
            let done = allowed == step.level
                && self
                    .fold_table(step.entry, place, old)
                    .inspect_err(|error| self.lose_if(error.cause))?;
            folded.folded += u64::from(done);
            folded.left += u64::from(!done);
        }
        Ok(folded)
    }

    /// Folds one table. `false` if it is not uniform or the module did not merge it.
    fn fold_table(
        &self,
        entry: EntryRef<'_>,
        place: EntryPlace,
        old: Spte,
    ) -> Result<bool, HandOffError> {
        let Ok(frozen) = FrozenEntry::freeze::<F>(entry, place, old) else {
            return Ok(false);
        };
        let child = F::pfn(old);
        let mut folding = Folding::take(self, frozen, child);
        let Some(first) = folding.first_of_uniform(place.level) else {
            return Ok(false);
        };
        let Some(frozen) = folding.frozen.as_mut() else {
            return Ok(false);
        };
        let fail = |step, cause| HandOffError { place, step, cause };
        let table = self.host.protected();
        let drained = self
            .block_and_drain(frozen)
            .map_err(|(step, cause)| fail(step, cause))?;
        let done = self
            .sweep_caller(Patience::Sweep)
            .call(HandOffStep::Merge, frozen, || table.merge(frozen, &drained));
        if let Err(cause) = done {
            self.undo_block(frozen, &drained);
            return match cause {
                HandOffCause::Refused(_) => Ok(false),
                cause => Err(fail(HandOffStep::Merge, cause)),
            };
        }
        let tally = &self.shards.sweeps;
        let below = place.level.below_or_leaf();
        folding.publish(private_leaf::<F>(first, place.level));
        tally.add(Stat::pages(below), -(TABLE_ENTRIES as i64));
        tally.add(Stat::Collapses, 1);
        self.bury_private(child, false);
        let tables = Retired::tables(self.host.clone(), alloc::vec![child]);
        self.domain.retire(tables, 1);
        Ok(true)
    }
}

/// A table on its way out of the tree: its entry frozen, its entries sealed. Dropped, on failure or by a panic of the hook,
/// it is put back.
struct Folding<'a, F: Format, H: Host> {
    shared: &'a Shared<F, H>,
    table: Pfn,
    /// What the entries held, from the first on.
    leaves: Vec<Spte>,
    /// Dropped after what is below was put back.
    frozen: Option<FrozenEntry<'a>>,
}

impl<'a, F: Format, H: Host> Folding<'a, F, H> {
    /// Seals entries up to the first that is no leaf.
    fn take(shared: &'a Shared<F, H>, frozen: FrozenEntry<'a>, table: Pfn) -> Self {
        let mut taken = Self {
            shared,
            table,
            leaves: Vec::with_capacity(TABLE_ENTRIES),
            frozen: Some(frozen),
        };
        let page = table::page(shared.host.frames(), table);
        let mut pause = Pause::new();
        while let Some(entry) = page.get(taken.leaves.len()) {
            let old = entry.load();
            if old == F::FROZEN {
                pause.wait();
            } else if !F::is_leaf(old, Level::L1) || is_blocked::<F>(old) {
                break;
            } else if entry.seal_if::<F>(old).is_ok() {
                taken.leaves.push(old);
            }
        }
        taken
    }

    /// Ends the fold: `leaf` stands for the table, whose entries stay sealed.
    fn publish(mut self, leaf: Spte) {
        self.leaves.clear();
        if let Some(frozen) = self.frozen.take() {
            frozen.publish::<F>(leaf, &self.shared.shards.sweeps);
        }
    }

    /// First frame of the 512 consecutive ones that the leaves map, if they do.
    fn first_of_uniform(&self, level: Level) -> Option<Pfn> {
        let first = F::leaf_pfn(*self.leaves.first()?, Level::L1);
        let follows =
            |(n, &spte): (usize, &Spte)| F::leaf_pfn(spte, Level::L1).0 == first.0 + n as u64;
        let whole = self.leaves.len() == TABLE_ENTRIES
            && first.0 & (level.pages() - 1) == 0
            && self.leaves.iter().enumerate().all(follows);
        whole.then_some(first)
    }
}

impl<F: Format, H: Host> Drop for Folding<'_, F, H> {
    fn drop(&mut self) {
        let stays_blocked = self
            .frozen
            .as_ref()
            .is_some_and(|it| is_blocked::<F>(it.fallback()));
        if let (true, Some(first), Some(confidential)) = (
            stays_blocked,
            self.leaves.first(),
            self.shared.confidential.as_deref(),
        ) {
            // All of them are sealed, and follow each other: nothing else is ever blocked.
            let first = F::leaf_pfn(*first, Level::L1);
            confidential.withheld.keep(self.table, Some(first));
            return;
        }
        let page = table::page(self.shared.host.frames(), self.table);
        for (index, &spte) in self.leaves.iter().enumerate() {
            if let Some(entry) = page.get(index) {
                entry.thaw(spte);
            }
        }
    }
}

/// A table on its way into the tree, with its twin. Dropped, both go back to their owners.
struct NewTable<'a, F: Format, H: Host> {
    shared: &'a Shared<F, H>,
    table: Pfn,
    twin: Option<Pfn>,
    kept: bool,
}

impl<'a, F: Format, H: Host> NewTable<'a, F, H> {
    fn make(
        shared: &'a Shared<F, H>,
        place: EntryPlace,
        level: Level,
        needs_twin: bool,
    ) -> Option<Self> {
        let mut frame = [Pfn(0)];
        let count = shared.host.frames().allocate(&mut frame).ok()?;
        if count == 0 {
            return None;
        }
        let mut new = Self {
            shared,
            table: frame[0],
            twin: None,
            kept: false,
        };
        shared.meta.set_state(new.table, TableState::Spare);
        if needs_twin {
            let mut twin = [Pfn(0)];
            let count = shared.host.protected().allocate_twins(&mut twin).ok()?;
            if count == 0 {
                return None;
            }
            new.twin = Some(twin[0]);
        }
        shared.meta.link(
            new.table,
            Place {
                as_id: place.as_id,
                private: true,
                level,
                gfn: place.gfn,
            },
        );
        shared.meta.set_twin(new.table, new.twin);
        Some(new)
    }

    fn keep(mut self) -> Pfn {
        self.kept = true;
        self.table
    }
}

impl<F: Format, H: Host> Drop for NewTable<'_, F, H> {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Some(twin) = self.twin {
            self.shared.host.protected().free_twins(&[twin]);
        }
        self.shared.meta.set_twin(self.table, None);
        self.shared.meta.set_state(self.table, TableState::Free);
        self.shared.host.frames().free(&[self.table]);
    }
}
