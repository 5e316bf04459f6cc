//! Zap: take translations away.
//!
//! Protocol. A leaf is exchanged for the empty pattern. A table that lies wholly in the range is unlinked by exchanging
//! its parent entry for the empty pattern: whoever wins that exchange owns the table and all below it. The owner then
//! swaps every entry below to *sealed* (INV: unlink-seals), which harvests what walkers still inside installed and makes
//! them start again from the root; then the range is flushed, then the tables are retired (INV: flush-before-reuse). A
//! fault may fill the hole again while all that goes on.

use crate::entry::{self, EntryRef, TablePage};
use crate::event::{self, Site, Unlinked};
use crate::host::{AddressSpaceId, FrameSource, Host};
use crate::iter::TdpIter;
use crate::mmu::Shared;
use crate::nx;
use crate::root::Root;
use crate::stats::{Stat, Tally};
use crate::table::{self, Place, TableState};
use crate::tlb::PendingFlush;
use alloc::vec::Vec;
use tdp_arch::{Format, Gfn, GfnRange, Level, Pfn, Spte};

/// What a zap takes away.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum ZapScope {
    /// Leaves only; tables stay, and so do MMIO entries.
    Leaves,
    /// Leaves, and tables that lie wholly in the range with all they hold.
    Tables,
}

impl<F: Format, H: Host> Shared<F, H> {
    /// Zaps a range in every root of an address space, roots that are being torn down included.
    pub(crate) fn zap(
        &self,
        as_id: AddressSpaceId,
        range: GfnRange,
        scope: ZapScope,
    ) -> PendingFlush<'_, F, H> {
        event::sweep(
            match scope {
                ZapScope::Leaves => "zap_leaves",
                ZapScope::Tables => "zap",
            },
            as_id,
            range,
        );
        let mut pending = PendingFlush::new(self);
        for root in self.roots.of(as_id) {
            self.zap_in_root(&root, range, scope, &mut pending);
        }
        pending.settle(as_id, range);
        pending
    }

    pub(crate) fn zap_in_root(
        &self,
        root: &Root<H>,
        range: GfnRange,
        scope: ZapScope,
        pending: &mut PendingFlush<'_, F, H>,
    ) {
        let tally = &self.shards.sweeps;
        let mut visit = self.domain.visit();
        // The leaves of a table of level 1 are gone through in a loop of their own.
        let mut iter = TdpIter::<F, H>::new(&mut visit, &self.host, root, range, Level::L2);
        while let Some(step) = iter.next() {
            let (entry, level, covered) = (step.entry, step.level, step.range());
            let mut old = step.spte;
            let unlinked = loop {
                let is_leaf = F::is_leaf(old, level);
                let is_table = !is_leaf && F::is_mmu_present(old);
                let whole_table = is_table && scope == ZapScope::Tables && range.covers(covered);
                let mmio = scope == ZapScope::Tables && F::mmio_entry(old).is_some();
                if !is_leaf && !whole_table && !mmio {
                    break None;
                }
                match entry::exchange::<F>(entry, level, old, F::EMPTY, tally) {
                    Ok(()) => {
                        if is_leaf {
                            self.keep_dirty(root.as_id, covered.start, level, old);
                            pending.count_leaf();
                            pending.note(root.as_id, covered, false);
                        }
                        break whole_table.then(|| F::pfn(old));
                    }
                    Err(actual) => old = actual,
                }
            };
            if let (Some(pfn), Some(below)) = (unlinked, level.below()) {
                pending.note(root.as_id, covered, true);
                seal_subtree::<F, H>(self, pfn, below, tally, pending);
                iter.skip_below();
            } else if level == Level::L2 && F::is_table(old) {
                let part = GfnRange {
                    start: covered.start.max(range.start),
                    end: covered.end.min(range.end),
                };
                self.zap_small(root.as_id, F::pfn(old), part, scope, pending);
                iter.spend(part.pages() as u32);
            }
        }
    }

    /// Zaps the entries of `part` in the table of level 1 at `pfn`, which was linked when its entry was read. If it is not
    /// any more, they are sealed, and what stands in their place came after the zap began.
    #[inline]
    fn zap_small(
        &self,
        as_id: AddressSpaceId,
        pfn: Pfn,
        part: GfnRange,
        scope: ZapScope,
        pending: &mut PendingFlush<'_, F, H>,
    ) {
        let page = table::page(self.host.frames(), pfn);
        let level = Level::L1;
        // Booked once for the table: the counters of sweeps are shared.
        let mut leaves = 0;
        let mut zapped: Option<GfnRange> = None;
        for number in part.start.0..part.end.0 {
            let gfn = Gfn(number);
            // The bit that makes a frame shared lies above this level.
            let Some(entry) = page.get(level.index(gfn)) else {
                break;
            };
            let entry = entry.at(Site::new(as_id, gfn, pfn));
            let mut old = entry.load();
            loop {
                let is_leaf = F::is_leaf(old, level);
                if !is_leaf && (scope == ZapScope::Leaves || F::mmio_entry(old).is_none()) {
                    break;
                }
                match entry::take_small::<F>(entry, old) {
                    Ok(()) if is_leaf => {
                        self.keep_dirty(as_id, gfn, level, old);
                        leaves += 1;
                        let end = Gfn(number + 1);
                        zapped.get_or_insert(GfnRange { start: gfn, end }).end = end;
                        break;
                    }
                    Ok(()) => break,
                    Err(actual) => old = actual,
                }
            }
        }
        if let Some(zapped) = zapped {
            self.shards.sweeps.add(Stat::pages(level), -leaves);
            pending.count_leaves(leaves as u64);
            pending.note(as_id, zapped, false);
        }
    }

    /// Seals everything below a root and the root itself, without flushing.
    pub(crate) fn seal_root(&self, root: &Root<H>, pending: &mut PendingFlush<'_, F, H>) {
        let tally = &self.shards.sweeps;
        // Whoever collects a dirty log waits for what this takes away to be marked.
        let _visit = self.domain.visit();
        Unlinked::of(&self.meta, root.pfn, root.limit()).was_root();
        seal_entries::<F, H>(self, root.pfn, root.level, tally, pending);
        self.meta.set_state(root.pfn, TableState::Sealed);
        pending.note(
            root.as_id,
            GfnRange {
                start: Gfn(0),
                end: root.limit(),
            },
            true,
        );
    }
}

/// What the leaves of a table that was sealed said of their use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Harvest {
    /// One of them had been used since it was last made old.
    pub(crate) young: bool,
    /// One of them had been written.
    pub(crate) dirty: bool,
}

impl Harvest {
    /// Takes in what a leaf says.
    #[inline(always)]
    pub(crate) fn gather<F: Format>(&mut self, leaf: Spte) {
        if leaf.0 & F::AD_SOFTWARE == 0 {
            self.young |= leaf.0 & F::ACCESSED != 0;
            self.dirty |= leaf.0 & F::DIRTY != 0;
        } else {
            self.young |= !F::is_access_tracked(leaf);
        }
    }

    /// A leaf that says as much for itself.
    pub(crate) fn given_to<F: Format>(self, leaf: Spte) -> Spte {
        if leaf.0 & F::AD_SOFTWARE == 0 {
            let accessed = if self.young { F::ACCESSED } else { 0 };
            let dirty = if self.dirty { F::DIRTY } else { 0 };
            Spte(leaf.0 | accessed | dirty)
        } else if self.young && F::is_access_tracked(leaf) {
            F::restore_access_tracked(leaf)
        } else {
            leaf
        }
    }
}

/// Seals an unlinked table and all below it and puts the tables on `pending`. The caller owns the table: it won the
/// exchange that unlinked it.
pub(crate) fn seal_subtree<F: Format, H: Host>(
    shared: &Shared<F, H>,
    pfn: Pfn,
    level: Level,
    tally: &impl Tally,
    pending: &mut PendingFlush<'_, F, H>,
) -> Harvest {
    tally.add(Stat::Unlinked, 1);
    let harvest = seal_entries::<F, H>(shared, pfn, level, tally, pending);
    shared.meta.set_state(pfn, TableState::Sealed);
    pending.tables.push(pfn);
    harvest
}

/// At most five deep: one call a level.
fn seal_entries<F: Format, H: Host>(
    shared: &Shared<F, H>,
    pfn: Pfn,
    level: Level,
    tally: &impl Tally,
    pending: &mut PendingFlush<'_, F, H>,
) -> Harvest {
    let place = shared.meta.place(pfn);
    let was = Unlinked::of(&shared.meta, pfn, shared.roots.limit());
    let mut harvest = Harvest::default();
    let page = table::page(shared.host.frames(), pfn);
    // Booked once for the table: the counters of sweeps are shared.
    let leaves = if level == Level::L1 {
        seal_small_leaves::<F, H>(shared, page, place, was, &mut harvest)
    } else {
        let mut leaves = 0;
        let mut index = 0;
        while let Some(entry) = page.get(index) {
            let old = entry.at(was.entry(index)).seal::<F>(level);
            if F::is_leaf(old, level) {
                if let Some(place) = place {
                    let gfn = Gfn(place.gfn.0 + index as u64 * level.pages());
                    shared.keep_dirty(place.as_id, gfn, level, old);
                }
                leaves += 1;
                harvest.gather::<F>(old);
            } else if let (true, Some(below)) = (F::is_mmu_present(old), level.below()) {
                entry::account::<F>(level, old, F::SEALED, tally);
                nx::account::<F>(level, old, F::SEALED, tally);
                let part = seal_subtree::<F, H>(shared, F::pfn(old), below, tally, pending);
                harvest.young |= part.young;
                harvest.dirty |= part.dirty;
            }
            index += 1;
        }
        leaves
    };
    if leaves > 0 {
        tally.add(Stat::pages(level), -leaves);
        pending.count_leaves(leaves as u64);
    }
    harvest
}

/// Seals a table of level 1 and returns how many of its entries were leaves. A loop of its own, so that what it counts stays
/// in registers: each exchange waits for every store before it.
#[inline(never)]
fn seal_small_leaves<F: Format, H: Host>(
    shared: &Shared<F, H>,
    page: &TablePage,
    place: Option<Place>,
    was: Unlinked,
    harvest: &mut Harvest,
) -> i64 {
    let (mut used, mut young, mut leaves) = (0, false, 0);
    let mut index = 0;
    while let Some(entry) = page.get(index) {
        let old = entry.at(was.entry(index)).seal::<F>(Level::L1);
        if F::is_leaf(old, Level::L1) {
            if let Some(place) = place {
                let gfn = Gfn(place.gfn.0 + index as u64);
                shared.keep_dirty(place.as_id, gfn, Level::L1, old);
            }
            leaves += 1;
            if old.0 & F::AD_SOFTWARE == 0 {
                used |= old.0;
            } else {
                young |= !F::is_access_tracked(old);
            }
        }
        index += 1;
    }
    harvest.gather::<F>(Spte(used));
    harvest.young |= young;
    leaves
}

/// Frees a tree that no vCPU, sweep or processor uses any more.
pub(crate) fn free_tree<F: Format, H: Host>(host: &H, root: &Root<H>, meta: &table::TableMeta) {
    let mut frames: Vec<Pfn> = Vec::new();
    let mut levels = alloc::vec![(root.pfn, root.level)];
    while let Some((pfn, level)) = levels.pop() {
        let page = table::page(host.frames(), pfn);
        let mut index = 0;
        while let Some(spte) = page.get(index).map(EntryRef::load) {
            let is_table = |spte: Spte| F::is_mmu_present(spte) && !F::is_leaf(spte, level);
            if let (true, Some(below)) = (is_table(spte), level.below()) {
                levels.push((F::pfn(spte), below));
                frames.push(F::pfn(spte));
                meta.set_state(F::pfn(spte), TableState::Free);
            }
            index += 1;
        }
    }
    host.frames().free(&frames);
}
