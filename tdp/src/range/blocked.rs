//! Tables that stay blocked, and how a block is taken back.
//!
//! Protocol. A table is blocked to be unlinked or folded, with every entry sealed. If what follows fails for good, for want
//! of a ticket or by a panic of the hook, and the block cannot be taken back, its entry says *blocked* from then on **and
//! its entries stay sealed**: no call of the module comes below a table that is blocked, and whoever stands in the table
//! already would make one if it found an entry there (INV: parent-before-child). What they held is known: nothing, in a
//! table that was to be unlinked; consecutive pages, in one that was to be folded, the first of which is noted here.
//!
//! Whoever needs what is below takes the block back: it freezes the table's entry, waits for a ticket, unblocks, puts back
//! what the entries held, and only then publishes the table. A ticket is waited for outside every critical section.

use crate::entry::EntryRef;
use crate::frozen::{EntryPlace, FrozenEntry};
use crate::handoff::{is_blocked, private_leaf, unblocked};
use crate::host::{AddressSpaceId, Host};
use crate::iter::{Step, TdpIter};
use crate::mmu::Shared;
use crate::protected::{HandOffCause, HandOffError, HandOffStep, Patience, ProtectedTable};
use crate::root::Root;
use crate::stats::Tally;
use crate::table;
use alloc::collections::BTreeMap;
use tdp_arch::{Format, Gfn, GfnRange, Level, Pfn, Spte};
use tdp_rcu::sync::Mutex;

/// Tables that stay blocked and sealed, each with the first of the consecutive pages that it maps, if it maps any. Touched
/// when a removal or a fold fails, and when a block is taken back.
#[derive(Debug, Default)]
pub(crate) struct Withheld(Mutex<BTreeMap<Pfn, Option<Pfn>>>);

impl Withheld {
    /// Notes what a table maps whose own entry the caller has frozen and is about to publish as blocked.
    pub(crate) fn keep(&self, table: Pfn, first: Option<Pfn>) {
        self.0.lock().insert(table, first);
    }
}

/// What the sealed entry at `index` of a table that stays blocked stands for.
fn withheld<F: Format>(first: Option<Pfn>, index: usize) -> Spte {
    first.map_or(F::EMPTY, |first| {
        private_leaf::<F>(Pfn(first.0 + index as u64), Level::L1)
    })
}

impl<F: Format, H: Host> Shared<F, H> {
    /// Takes the block of an entry back, puts back what is below, and ends the hand-off. The entry was blocked.
    pub(crate) fn unblock(
        &self,
        frozen: FrozenEntry<'_>,
        tally: &impl Tally,
    ) -> Result<(), HandOffCause> {
        let drained = self.drain(Patience::Sweep)?;
        let table = self.host.protected();
        self.sweep_caller(Patience::Sweep)
            .call(HandOffStep::Unblock, &frozen, || {
                table.unblock(&frozen, &drained)
            })?;
        self.publish_unblocked(frozen, tally);
        Ok(())
    }

    /// The same without a call: for the entries of a dead guest, which has nothing left to unblock.
    pub(crate) fn publish_unblocked(&self, frozen: FrozenEntry<'_>, tally: &impl Tally) {
        let old = frozen.old();
        if !F::is_leaf(old, frozen.place().level) {
            self.open(F::pfn(old));
        }
        frozen.publish::<F>(unblocked::<F>(old), tally);
    }

    /// Puts back what the entries of a table that stayed blocked held. The caller owns the table's entry.
    pub(crate) fn open(&self, table: Pfn) {
        let kept = self
            .confidential
            .as_deref()
            .and_then(|it| it.withheld.0.lock().remove(&table));
        let Some(first) = kept else { return };
        let page = table::page(self.host.frames(), table);
        let mut index = 0;
        while let Some(entry) = page.get(index) {
            // INV: frozen-owns: nobody changes a sealed entry but the owner of the table's own.
            entry.thaw(withheld::<F>(first, index));
            index += 1;
        }
    }

    /// What an entry of a tree stands for: a sealed one below a table that stays blocked for what is put back with that.
    pub(crate) fn stands_for(&self, step: &Step<'_>, root: &Root<H>) -> Spte {
        let (Some(confidential), true, true) = (
            self.confidential.as_deref(),
            step.spte == F::SEALED,
            root.private,
        ) else {
            return step.spte;
        };
        let kept = confidential.withheld.0.lock().get(&step.table).copied();
        kept.map_or(step.spte, |first| {
            withheld::<F>(first, root.index(step.level, step.gfn))
        })
    }

    /// Takes the blocks back that are in the way to `gfn`. Waits for tickets: not to be called inside a critical section.
    pub(crate) fn unblock_private(
        &self,
        as_id: AddressSpaceId,
        gfn: Gfn,
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
            if F::is_mmu_present(step.spte) && is_blocked::<F>(step.spte) {
                self.unblock_entry(step.entry, place, step.spte)?;
            }
        }
        Ok(())
    }

    fn unblock_entry(
        &self,
        entry: EntryRef<'_>,
        place: EntryPlace,
        old: Spte,
    ) -> Result<(), HandOffError> {
        let Ok(frozen) = FrozenEntry::freeze::<F>(entry, place, old) else {
            // Changed meanwhile: whoever asked looks again.
            return Ok(());
        };
        let step = HandOffStep::Unblock;
        self.unblock(frozen, &self.shards.sweeps)
            .map_err(|cause| HandOffError { place, step, cause })
    }
}
