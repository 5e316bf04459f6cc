//! The walk of a sweep that takes private memory away: which entries it freezes, and when it hands them on.
//!
//! Protocol. Leaves first, then tables, lowest level first. An entry that must go is frozen and joins the batch, which
//! `private.rs` removes once it is full. Whoever meets an entry that another has frozen hands its own batch on before it waits
//! (`frozen.rs`): no two sweeps wait for each other with entries in hand. A panic of the hook puts back what was frozen and not
//! handed on.

use crate::entry::EntryRef;
use crate::event;
use crate::frozen::{EntryPlace, FrozenEntry};
use crate::handoff::is_blocked;
use crate::host::{AddressSpaceId, Host};
use crate::iter::TdpIter;
use crate::mmu::Shared;
use crate::protected::{HandOffError, HandOffStep, Removal};
use crate::reclaim::Retired;
use crate::root::Root;
use crate::stats::{Stat, Tally};
use alloc::vec::Vec;
use tdp_arch::{Format, GfnRange, Level, Pfn, Spte};
use tdp_rcu::sync::Pause;

/// Entries that a sweep holds frozen at a time. Their ticket is one, and so is the wait of a fault that meets one of them.
const BATCH: usize = if cfg!(loom) { 2 } else { 4096 };

/// Private memory that was taken away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Removed {
    /// Frames of 4 KiB, the host's again.
    pub frames: u64,
    /// Tables, with their twins.
    pub tables: u64,
    /// Frames of 4 KiB, pages and twins, that the module of a dead guest did not give back. Never to be used again.
    pub leaked: u64,
}

/// Some private memory could not be taken away; the rest was. What failed is as it was, and the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{failed} entries were not removed; the first: {first}")]
pub struct RemovalError {
    /// Entries that failed.
    pub failed: u64,
    /// The first of them, and why.
    pub first: HandOffError,
    /// What was taken away.
    pub removed: Removed,
}

impl<F: Format, H: Host> Shared<F, H> {
    /// Takes private memory of a range away, and tables that lie wholly in it.
    pub(crate) fn remove_private(
        &self,
        as_id: AddressSpaceId,
        range: GfnRange,
    ) -> Result<Removed, RemovalError> {
        event::sweep("remove_private", as_id, range);
        let mut sweep = Sweep {
            shared: self,
            batch: Vec::new(),
            done: Vec::new(),
            removed: Removed::default(),
            failed: None,
        };
        if let Some(root) = self.roots.private(as_id) {
            sweep.leaves(&root, range);
            for level in [Level::L2, Level::L3, Level::L4, Level::L5] {
                if level <= root.level {
                    sweep.tables(&root, range, level);
                }
            }
        }
        match sweep.failed.take() {
            None => Ok(sweep.removed),
            Some((failed, first)) => Err(RemovalError {
                failed,
                first,
                removed: sweep.removed,
            }),
        }
    }
}

/// Where a sweep goes from an entry.
enum Next {
    Below,
    Past,
    /// Down from the root again.
    WalkAgain,
}

/// A sweep that removes.
struct Sweep<'a, F: Format, H: Host> {
    shared: &'a Shared<F, H>,
    /// Frozen by this sweep.
    batch: Vec<Removal>,
    /// Handed on, with how each ended.
    done: Vec<Removal>,
    removed: Removed,
    failed: Option<(u64, HandOffError)>,
}

impl<F: Format, H: Host> Sweep<'_, F, H> {
    fn leaves(&mut self, root: &Root<H>, range: GfnRange) {
        let shared = self.shared;
        let mut visit = shared.domain.visit();
        let mut iter =
            TdpIter::<F, H>::new(&mut visit, &shared.host, root, range, Level::L1).lingering();
        let mut pause = Pause::new();
        while let Some(step) = iter.next() {
            let place = EntryPlace {
                as_id: root.as_id,
                gfn: step.gfn,
                level: step.level,
            };
            let mut old = step.spte;
            let next = loop {
                if old == F::SEALED {
                    // The table is gone, or its owner folds it or looks whether it is empty: what becomes of its entries is
                    // to be seen from the root.
                    self.wait(&mut pause);
                    break Next::WalkAgain;
                }
                if old == F::FROZEN {
                    self.wait(&mut pause);
                    old = step.entry.load();
                    continue;
                }
                pause = Pause::new();
                let is_leaf = F::is_leaf(old, step.level);
                let stays = is_leaf && !range.covers(step.range());
                if !F::is_mmu_present(old) {
                    break Next::Past;
                } else if is_blocked::<F>(old) && (stays || !is_leaf) {
                    if self.take_block_back(step.entry, place, old) {
                        break Next::Past;
                    }
                    old = step.entry.load();
                } else if !is_leaf {
                    break Next::Below;
                } else if stays {
                    // A part of it is to stay.
                    self.run();
                    if let Err(error) =
                        shared.split_private(root.as_id, step.gfn, step.level.below_or_leaf())
                    {
                        self.note(error);
                        break Next::Past;
                    }
                    old = step.entry.load();
                } else {
                    let index = root.index(step.level, step.gfn);
                    match self.freeze(step.entry, step.table, index, place, old) {
                        Ok(()) => break Next::Past,
                        Err(actual) => old = actual,
                    }
                }
            };
            match next {
                Next::WalkAgain => iter.walk_again(),
                Next::Past => iter.skip_below(),
                Next::Below => {}
            }
            if self.batch.len() >= BATCH {
                self.run();
            }
        }
        self.run();
    }

    /// Unlinks tables that entries of `level` lead to.
    fn tables(&mut self, root: &Root<H>, range: GfnRange, level: Level) {
        if range.pages() < level.pages() {
            return;
        }
        let shared = self.shared;
        let mut visit = shared.domain.visit();
        let mut iter = TdpIter::<F, H>::new(&mut visit, &shared.host, root, range, level);
        while let Some(step) = iter.next() {
            if step.level != level || !range.covers(step.range()) {
                continue;
            }
            let place = EntryPlace {
                as_id: root.as_id,
                gfn: step.gfn,
                level,
            };
            let mut old = step.spte;
            let mut pause = Pause::new();
            loop {
                if old == F::FROZEN {
                    self.wait(&mut pause);
                    old = step.entry.load();
                    continue;
                }
                // One that was left blocked since its leaves were looked at is another's to finish.
                if !F::is_mmu_present(old) || F::is_leaf(old, level) || is_blocked::<F>(old) {
                    break;
                }
                let index = root.index(level, step.gfn);
                match self.freeze(step.entry, step.table, index, place, old) {
                    Ok(()) => {
                        // Not empty: somebody has mapped something below since, and the table stays.
                        if !shared.seal_empty(F::pfn(old)) && self.batch.pop().is_some() {
                            step.entry.thaw(old);
                        }
                        break;
                    }
                    Err(actual) => old = actual,
                }
            }
            if self.batch.len() >= BATCH {
                self.run();
            }
        }
        self.run();
    }

    /// Waits for an entry that another has frozen, holding none.
    fn wait(&mut self, pause: &mut Pause) {
        if !self.batch.is_empty() {
            self.run();
            return;
        }
        self.shared.shards.sweeps.add(Stat::FrozenWaits, 1);
        pause.wait();
    }

    fn freeze(
        &mut self,
        entry: EntryRef<'_>,
        table: Pfn,
        index: usize,
        place: EntryPlace,
        old: Spte,
    ) -> Result<(), Spte> {
        // Room first: nothing may fail once the entry is frozen.
        self.batch.reserve(1);
        entry.freeze::<F>(old)?;
        self.batch.push(Removal {
            table,
            index,
            place,
            old,
            result: None,
        });
        Ok(())
    }

    /// Takes back a block that an earlier removal has left. `true` if that failed for good.
    fn take_block_back(&mut self, entry: EntryRef<'_>, place: EntryPlace, old: Spte) -> bool {
        self.run();
        let Ok(frozen) = FrozenEntry::freeze::<F>(entry, place, old) else {
            return false;
        };
        if self.shared.is_dead() {
            self.shared
                .publish_unblocked(frozen, &self.shared.shards.sweeps);
            return false;
        }
        match self.shared.unblock(frozen, &self.shared.shards.sweeps) {
            Ok(()) => false,
            Err(cause) => {
                let step = HandOffStep::Unblock;
                self.note(HandOffError { place, step, cause });
                true
            }
        }
    }

    fn note(&mut self, error: HandOffError) {
        self.shared.lose_if(error.cause);
        let (failed, _) = self.failed.get_or_insert((0, error));
        *failed += 1;
    }

    /// Removes the batch.
    fn run(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let shared = self.shared;
        let Some(confidential) = shared.confidential.as_deref() else {
            return;
        };
        self.done = core::mem::take(&mut self.batch);
        let carry = |work: &mut [Removal]| shared.remove_all(work);
        if confidential.capabilities.serialises_block && !confidential.is_dead() {
            confidential.combiner.submit(&mut self.done, carry);
        } else {
            carry(&mut self.done);
        }
        self.settle();
    }

    /// Books what became of the entries that were handed on, and buries tables that are gone.
    fn settle(&mut self) {
        let shared = self.shared;
        let mut retired = Vec::new();
        for removal in core::mem::take(&mut self.done) {
            let is_leaf = F::is_leaf(removal.old, removal.place.level);
            let frames = if is_leaf {
                removal.place.level.pages()
            } else {
                1
            };
            let failure = removal.result.and_then(Result::err);
            // The entry of a dead guest is empty whatever the module said, and its page leaked.
            let leaked = failure.is_some_and(|error| error.step == HandOffStep::Reclaim);
            if let Some(error) = failure {
                self.note(error);
                self.removed.leaked += if leaked { frames } else { 0 };
            }
            let gone = removal.result == Some(Ok(()));
            let table = F::pfn(removal.old);
            match (is_leaf, gone || leaked) {
                (true, _) => self.removed.frames += if gone { frames } else { 0 },
                (false, true) => {
                    self.removed.tables += 1;
                    shared.bury_private(table, leaked);
                    retired.push(table);
                }
                (false, false) => {}
            }
        }
        if !retired.is_empty() {
            let weight = retired.len();
            let tables = Retired::tables(shared.host.clone(), retired);
            shared.domain.retire(tables, weight);
        }
    }
}

impl<F: Format, H: Host> Drop for Sweep<'_, F, H> {
    fn drop(&mut self) {
        // By a panic only: what was frozen and not handed on is put back, what was is booked.
        for removal in core::mem::take(&mut self.batch) {
            if !F::is_leaf(removal.old, removal.place.level) {
                self.shared
                    .unseal(F::pfn(removal.old), crate::entry::TABLE_ENTRIES);
            }
            if let Some(entry) = self.shared.entry(removal.table, removal.index) {
                entry.thaw(removal.old);
            }
        }
        self.settle();
    }
}
