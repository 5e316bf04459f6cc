//! Taking private memory away: freeze, block, one ticket for all, remove; leaves before their tables.
//!
//! Protocol. A sweep freezes entries, many at a time, and hands them to [`Shared::remove_all`] as a batch, on its own or
//! through the combiner. For each leaf: block; then one ticket for the whole batch; then remove, publish *empty*. Tables
//! that lie wholly in the range follow, lowest level first, so that children are gone before their table is blocked
//! (INV: parent-before-child): freeze the table's entry, seal every entry of it, which proves that it is empty and keeps it
//! so (INV: unlink-seals), then block, ticket, unlink as for leaves; the table is retired, its twin free at once.
//!
//! A sweep that holds frozen entries and meets another that is frozen finishes its batch before it waits (`frozen.rs`).
//! The one wait that it does with an entry in hand is for the entries of a table whose own entry it owns.
//!
//! What fails before the ticket is put back as it was. After the ticket nothing is put back: calls are made until they are
//! done. A panic of the hook leaves what was blocked *blocked*, in both tables, to be taken back by who needs it
//! (`blocked.rs`).
//!
//! Once the guest is dead there is no block and no ticket: each page is reclaimed by one call, and one that the module
//! does not give back is leaked on purpose, counted and reported.

use crate::confidential::Confidential;
use crate::entry::EntryRef;
use crate::event;
use crate::frozen::{EntryPlace, FrozenEntry};
use crate::handoff::{blocked, is_blocked};
use crate::host::{AddressSpaceId, Host};
use crate::iter::TdpIter;
use crate::mmu::Shared;
use crate::protected::{
    Caller, Drained, HandOffCause, HandOffError, HandOffStep, Patience, ProtectedTable, Removal,
    drain_alone,
};
use crate::reclaim::Retired;
use crate::root::Root;
use crate::stats::{ProtectedStats, SharedShard, Stat, Stats, Tally};
use crate::table::{self, TableState};
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
    pub(crate) fn sweep_caller(&self, patience: Patience) -> Caller<'_, H::Protected, SharedShard> {
        let confidential = self.confidential.as_deref();
        Caller {
            table: self.host.protected(),
            tally: &self.shards.sweeps,
            patience,
            resumable: confidential.is_some_and(|it| it.capabilities.resumable),
        }
    }

    /// The entry at an index of a table that the caller keeps from going away.
    pub(crate) fn entry(&self, table: Pfn, index: usize) -> Option<EntryRef<'_>> {
        table::page(self.host.frames(), table).get(index)
    }

    fn is_dead(&self) -> bool {
        self.confidential
            .as_deref()
            .is_some_and(Confidential::is_dead)
    }

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

    /// Waits for a flush that begins now.
    pub(crate) fn drain(&self, patience: Patience) -> Result<Drained, HandOffCause> {
        let Some(confidential) = self.confidential.as_deref() else {
            return Err(HandOffCause::Fatal);
        };
        if !confidential.capabilities.needs_block {
            return Ok(Drained::internal());
        }
        let caller = self.sweep_caller(patience);
        if confidential.capabilities.parallel_tickets {
            return drain_alone(self.host.protected(), |begin| caller.begin(begin));
        }
        confidential
            .desk
            .drain(self.host.protected(), |begin| caller.begin(begin))
    }

    /// Blocks an entry, waits for the ticket, and says what comes after. The entry falls back to *blocked* meanwhile.
    pub(crate) fn block_and_drain(
        &self,
        frozen: &mut FrozenEntry<'_>,
    ) -> Result<Drained, (HandOffStep, HandOffCause)> {
        let needs_block = self
            .confidential
            .as_deref()
            .is_some_and(|it| it.capabilities.needs_block);
        if needs_block {
            self.block(frozen)
                .map_err(|cause| (HandOffStep::Block, cause))?;
        }
        self.drain(Patience::Sweep)
            .map_err(|cause| (HandOffStep::Flush, cause))
    }

    fn block(&self, frozen: &mut FrozenEntry<'_>) -> Result<(), HandOffCause> {
        if is_blocked::<F>(frozen.old()) {
            // By a removal that was not finished.
            return Ok(());
        }
        let table = self.host.protected();
        self.sweep_caller(Patience::Sweep)
            .call(HandOffStep::Block, frozen, || table.block(frozen))?;
        frozen.falls_back_to(blocked::<F>(frozen.old()));
        Ok(())
    }

    /// Removes what is frozen at the places of `work`, leaves and sealed tables, and notes how each ended.
    fn remove_all(&self, work: &mut [Removal]) {
        let Some(confidential) = self.confidential.as_deref() else {
            return;
        };
        let needs_block = confidential.capabilities.needs_block;
        // From here on a panic puts every entry back.
        let mut frozen: Vec<Handed<'_, F, H>> = work
            .iter()
            .map(|removal| Handed::adopt(self, removal))
            .collect();
        if confidential.is_dead() {
            for (removal, handed) in work.iter_mut().zip(&mut frozen) {
                if let Some(frozen) = &handed.frozen {
                    let result = self.reclaim(frozen);
                    handed.publish_empty();
                    removal.result = Some(result);
                }
            }
            return;
        }
        if needs_block {
            for (removal, handed) in work.iter_mut().zip(&mut frozen) {
                let Some(entry) = handed.frozen.as_mut().filter(|it| self.is_known(it)) else {
                    continue;
                };
                if let Err(cause) = self.block(entry) {
                    removal.fail(HandOffStep::Block, cause);
                    handed.put_back();
                }
            }
        }
        let drained = if needs_block && frozen.iter().all(|it| it.frozen.is_none()) {
            return;
        } else {
            self.drain(Patience::Sweep)
        };
        let drained = match drained {
            Ok(drained) => drained,
            Err(cause) => {
                for (removal, handed) in work.iter_mut().zip(&frozen) {
                    if handed.frozen.is_some() {
                        removal.fail(HandOffStep::Flush, cause);
                    }
                }
                return;
            }
        };
        for (removal, handed) in work.iter_mut().zip(&mut frozen) {
            let Some(entry) = &handed.frozen else {
                continue;
            };
            match self.take_out(entry, &drained) {
                Ok(()) => {
                    handed.publish_empty();
                    removal.result = Some(Ok(()));
                }
                Err((step, cause)) => removal.fail(step, cause),
            }
        }
    }

    fn take_out(
        &self,
        frozen: &FrozenEntry<'_>,
        drained: &Drained,
    ) -> Result<(), (HandOffStep, HandOffCause)> {
        let table = self.host.protected();
        let caller = self.sweep_caller(Patience::Endless);
        if !self.is_known(frozen) {
            return Ok(());
        }
        let (step, done) = if F::is_leaf(frozen.old(), frozen.place().level) {
            let step = HandOffStep::Remove;
            (
                step,
                caller.call(step, frozen, || table.remove(frozen, drained)),
            )
        } else {
            let step = HandOffStep::Unlink;
            (
                step,
                caller.call(step, frozen, || table.unlink(frozen, drained)),
            )
        };
        done.map_err(|cause| (step, cause))
    }

    /// Whether the module has what an entry stands for: a page always, a table if it was linked with a twin.
    fn is_known(&self, frozen: &FrozenEntry<'_>) -> bool {
        F::is_leaf(frozen.old(), frozen.place().level)
            || self.meta.twin(F::pfn(frozen.old())).is_some()
    }

    /// Takes the page behind an entry of a dead guest back, or leaks it. The entry is to be empty in any case.
    fn reclaim(&self, frozen: &FrozenEntry<'_>) -> Result<(), HandOffError> {
        let place = frozen.place();
        let level = place.level;
        let (page, size) = if F::is_leaf(frozen.old(), level) {
            (Some(F::leaf_pfn(frozen.old(), level)), level)
        } else {
            (self.meta.twin(F::pfn(frozen.old())), Level::L1)
        };
        let mut result = Ok(());
        if let Some(page) = page {
            let table = self.host.protected();
            let step = HandOffStep::Reclaim;
            let done = self
                .sweep_caller(Patience::Sweep)
                .call(step, frozen, || table.reclaim(page, size));
            if let Err(cause) = done {
                self.leak(page, size);
                result = Err(HandOffError { place, step, cause });
            }
        }
        result
    }

    /// Gives a page up that the module has and does not give back.
    fn leak(&self, page: Pfn, level: Level) {
        let frames = i64::try_from(level.pages()).unwrap_or(i64::MAX);
        self.shards.sweeps.add(Stat::Leaked, frames);
        self.host.protected().leaked(page, level);
    }

    /// Leaks what the module still has of a tree whose MMU is going away.
    pub(crate) fn abandon_private(&self, root: &Root<H>) {
        let mut levels = alloc::vec![(root.pfn, root.level)];
        while let Some((pfn, level)) = levels.pop() {
            let mut index = 0;
            while let Some(spte) = self.entry(pfn, index).map(EntryRef::load) {
                index += 1;
                if F::is_leaf(spte, level) {
                    self.leak(F::leaf_pfn(spte, level), level);
                } else if let (true, Some(below)) = (F::is_mmu_present(spte), level.below()) {
                    if is_blocked::<F>(spte) {
                        self.open(F::pfn(spte));
                    }
                    if let Some(twin) = self.meta.twin(F::pfn(spte)) {
                        self.leak(twin, Level::L1);
                        self.meta.set_twin(F::pfn(spte), None);
                    }
                    levels.push((F::pfn(spte), below));
                }
            }
        }
    }

    /// Counters that are not kept with the others.
    pub(crate) fn protected_stats(&self, stats: &Stats) -> ProtectedStats {
        let confidential = self.confidential.as_deref();
        ProtectedStats {
            carried: confidential.map_or(0, |it| it.combiner.carried()),
            carrier_waits: confidential.map_or(0, |it| it.combiner.waits()),
            ticket_waits: confidential.map_or(0, |it| it.desk.waits()),
            ..stats.protected
        }
    }

    /// Seals every entry of a table whose own entry the caller has frozen, if all are empty. `false` leaves it as it was.
    fn seal_empty(&self, table: Pfn) -> bool {
        let page = table::page(self.host.frames(), table);
        let mut pause = Pause::new();
        let mut index = 0;
        while let Some(entry) = page.get(index) {
            match entry.load() {
                empty if empty == F::EMPTY => {
                    if entry.seal_if::<F>(empty).is_ok() {
                        index += 1;
                    }
                }
                frozen if frozen == F::FROZEN => pause.wait(),
                _ => {
                    self.unseal(table, index);
                    return false;
                }
            }
        }
        true
    }

    /// Makes the first `count` entries of a sealed table empty again; the caller owns the table's entry.
    fn unseal(&self, table: Pfn, count: usize) {
        let page = table::page(self.host.frames(), table);
        for entry in (0..count).map_while(|index| page.get(index)) {
            // INV: frozen-owns: nobody changes a sealed entry, and the table's own entry is frozen or its thread's.
            entry.thaw(F::EMPTY);
        }
    }
}

/// An entry that was handed on with a request. Dropped, on failure or by a panic, it is put back, and what is below it
/// first.
struct Handed<'a, F: Format, H: Host> {
    shared: &'a Shared<F, H>,
    frozen: Option<FrozenEntry<'a>>,
}

impl<'a, F: Format, H: Host> Handed<'a, F, H> {
    fn adopt(shared: &'a Shared<F, H>, removal: &Removal) -> Self {
        let frozen = shared
            .entry(removal.table, removal.index)
            .map(|entry| FrozenEntry::adopt(entry, removal.place, removal.old));
        Self { shared, frozen }
    }

    fn publish_empty(&mut self) {
        if let Some(frozen) = self.frozen.take() {
            frozen.publish::<F>(F::EMPTY, &self.shared.shards.sweeps);
        }
    }

    fn put_back(&mut self) {
        let Some(frozen) = self.frozen.take() else {
            return;
        };
        let (old, level) = (frozen.old(), frozen.place().level);
        if F::is_leaf(old, level) {
            return;
        }
        let (shared, table) = (self.shared, F::pfn(old));
        match shared.confidential.as_deref() {
            // What is below a table that stays blocked stays sealed.
            Some(confidential) if is_blocked::<F>(frozen.fallback()) => {
                confidential.withheld.keep(table, None);
            }
            _ => shared.unseal(table, crate::entry::TABLE_ENTRIES),
        }
    }
}

impl<F: Format, H: Host> Drop for Handed<'_, F, H> {
    fn drop(&mut self) {
        self.put_back();
    }
}

impl Removal {
    fn fail(&mut self, step: HandOffStep, cause: HandOffCause) {
        let place = self.place;
        self.result = Some(Err(HandOffError { place, step, cause }));
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

impl<F: Format, H: Host> Shared<F, H> {
    /// Gives the twin of an unlinked private table back, unless it is leaked. The table itself is to be retired.
    pub(crate) fn bury_private(&self, table: Pfn, leaked: bool) {
        self.shards.sweeps.add(Stat::Unlinked, 1);
        if let Some(twin) = self.meta.twin(table).filter(|_| !leaked) {
            self.host.protected().free_twins(&[twin]);
        }
        self.meta.set_twin(table, None);
        self.meta.set_state(table, TableState::Sealed);
    }
}
