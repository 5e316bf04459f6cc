//! Taking frozen entries of private memory away, many at a time: block, one ticket for all, remove.
//!
//! Protocol. A sweep freezes entries (`private_sweep.rs`) and hands them to [`Shared::remove_all`] as a batch, on its own or
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
use crate::frozen::FrozenEntry;
use crate::handoff::{blocked, is_blocked};
use crate::host::Host;
use crate::mmu::Shared;
use crate::protected::{
    Caller, Drained, HandOffCause, HandOffError, HandOffStep, Patience, ProtectedTable, Removal,
    drain_alone,
};
use crate::root::Root;
use crate::stats::{ProtectedStats, SharedShard, Stat, Stats, Tally};
use crate::table::{self, TableState};
use alloc::vec::Vec;
use tdp_arch::{Format, Level, Pfn};
use tdp_rcu::sync::Pause;

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

    pub(super) fn is_dead(&self) -> bool {
        self.confidential
            .as_deref()
            .is_some_and(Confidential::is_dead)
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
    pub(super) fn remove_all(&self, work: &mut [Removal]) {
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
    pub(super) fn seal_empty(&self, table: Pfn) -> bool {
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
    pub(super) fn unseal(&self, table: Pfn, count: usize) {
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
