//! The policy that no large leaf is executable, and the recovery of the tables that it costs.
//!
//! On some processors a guest that changes the size of a page while it fetches from it stops the machine (erratum
//! ITLB_MULTIHIT). While the policy is on
//!
//! * a *large leaf* never permits a fetch. If the host permits both kinds of fetch, the leaf says in a software bit that
//!   they are withheld ([`Format::NX_SPLIT`]), so that the small leaves it is split into get them back;
//! * a *fetch* is mapped by 4 KiB. Every table that stands where a larger leaf would, for no other reason, carries
//!   the same bit in the entry that points to it. The mark and the link are one exchange: nobody finds the table without it;
//! * a fault that would have a large leaf and finds a *marked* table goes one level down instead of replacing it. An unmarked
//!   table stands there for another reason and is replaced as ever.
//!
//! [`recover_nx`](crate::Mmu::recover_nx) takes marked tables away, so that large leaves can come back where the guest
//! fetches no more.
//!
//! Turning the policy on or off replaces all roots. A fault reads the policy after its root is fixed, and a root is made under
//! the lock that made the old ones obsolete, after the policy was stored: so whatever a fault puts into a new root is by the
//! new policy, and what one that is late puts into an old one goes with it.

use crate::entry::{self, TABLE_ENTRIES};
use crate::event;
use crate::host::{AddressSpaceId, Host};
use crate::iter::TdpIter;
use crate::mmu::{Mmu, Shared};
use crate::range_zap::seal_subtree;
use crate::root::Root;
use crate::slots::SlotFlags;
use crate::stats::{Stat, Tally};
use crate::teardown::RootTeardown;
use crate::tlb::PendingFlush;
use tdp_arch::{Format, Gfn, GfnRange, LeafAttrs, Level, Perms, Pfn, Spte};
use tdp_rcu::sync::{AtomicBool, Ordering};

/// Both kinds of fetch.
pub(crate) const FETCH: Perms = Perms::EXEC.union(Perms::USER_EXEC);

/// The policy.
pub(crate) struct NxHugePages(AtomicBool);

impl NxHugePages {
    pub(crate) fn new(on: bool) -> Self {
        Self(AtomicBool::new(on))
    }

    /// Whether large leaves are to withhold fetches. Read by faults after their root is fixed.
    #[inline(always)]
    pub(crate) fn is_on(&self) -> bool {
        // Relaxed: the lock under which a root is made orders this after the store that preceded the root.
        self.0.load(Ordering::Relaxed)
    }
}

/// Whether `spte`, an entry of `level`, points to a table that stands for a fetch only.
#[inline(always)]
pub(crate) fn is_marked<F: Format>(spte: Spte, level: Level) -> bool {
    level > Level::L1 && F::is_table(spte) && spte.0 & F::NX_SPLIT != 0
}

/// The entry that points to a table that stands for a fetch only.
#[inline(always)]
pub(crate) fn marked<F: Format>(table: Spte) -> Spte {
    Spte(table.0 | F::NX_SPLIT)
}

/// Whether a large leaf could permit anything of `perms` while fetches are withheld.
#[inline(always)]
pub(crate) fn leaves_something(perms: Perms) -> bool {
    !perms.difference(FETCH).is_empty()
}

/// A leaf, which withholds fetches if it is large and `withholds`.
#[inline(always)]
pub(crate) fn leaf<F: Format>(pfn: Pfn, level: Level, attrs: LeafAttrs, withholds: bool) -> Spte {
    if !withholds || level == Level::L1 {
        return F::leaf(pfn, level, attrs);
    }
    let mark = if attrs.perms.contains(FETCH) {
        F::NX_SPLIT
    } else {
        0
    };
    let perms = attrs.perms.difference(FETCH);
    Spte(F::leaf(pfn, level, LeafAttrs { perms, ..attrs }).0 | mark)
}

/// A leaf with the permissions that the policy and aging took from it.
pub(crate) fn unrestricted<F: Format>(spte: Spte) -> Spte {
    let shown = if F::is_access_tracked(spte) {
        F::restore_access_tracked(spte)
    } else {
        spte
    };
    if shown.0 & F::NX_SPLIT == 0 {
        return shown;
    }
    F::permit_fetch(Spte(shown.0 & !F::NX_SPLIT))
}

/// The leaves that a large leaf is split into: the first, and what each has more than the one before, because they differ in
/// their frames only. Those of 4 KiB get back what the policy withheld.
#[inline]
pub(crate) fn children<F: Format>(old: Spte, level: Level) -> (Spte, u64) {
    let withheld = level == Level::L2 && old.0 & F::NX_SPLIT != 0;
    let parent = if !withheld {
        old
    } else if F::is_access_tracked(old) {
        F::access_track(unrestricted::<F>(old))
    } else {
        unrestricted::<F>(old)
    };
    let first = F::split_child(parent, level, 0);
    let step = level.below_or_leaf().bytes();
    debug_assert!(
        (0..TABLE_ENTRIES).all(|index| {
            F::split_child(parent, level, index).0 == first.0 + index as u64 * step
        })
    );
    (first, step)
}

/// Books a change of the shared half as far as marked tables go.
#[inline(always)]
pub(crate) fn account<F: Format>(level: Level, old: Spte, new: Spte, tally: &impl Tally) {
    if (old.0 | new.0) & F::NX_SPLIT == 0 {
        return;
    }
    let change = i64::from(is_marked::<F>(new, level)) - i64::from(is_marked::<F>(old, level));
    if change != 0 {
        tally.add(Stat::NxTables, change);
    }
}

impl<F: Format, H: Host> Shared<F, H> {
    fn recover_nx(&self, limit: usize) -> PendingFlush<'_, F, H> {
        let mut pending = PendingFlush::new(self);
        let mut left = limit;
        let from = Gfn(self.nx_cursor.get()).min(self.roots.limit());
        let (before, after) = (Gfn(0)..from, from..self.roots.limit());
        for part in [after, before] {
            for as_id in (0..self.address_spaces).map(AddressSpaceId) {
                for root in self.roots.of(as_id) {
                    let range = part.clone().into();
                    if left > 0 && !root.is_obsolete() {
                        event::sweep("recover_nx", as_id, range);
                        self.recover_nx_in(&root, range, &mut left, &mut pending);
                    }
                }
            }
        }
        pending
    }

    fn recover_nx_in(
        &self,
        root: &Root<H>,
        range: GfnRange,
        left: &mut usize,
        pending: &mut PendingFlush<'_, F, H>,
    ) {
        let tally = &self.shards.sweeps;
        let mut reader = self.domain.reader();
        let mut visit = self.domain.visit();
        let mut iter = TdpIter::<F, H>::new(&mut visit, &self.host, root, range, Level::L2);
        while let Some(step) = iter.next() {
            let (entry, level, old) = (step.entry, step.level, step.spte);
            if !is_marked::<F>(old, level) {
                continue;
            }
            if *left == 0 {
                break;
            }
            let covered = step.range();
            // Whoever switches a slot's log on waits for sections: a table that is taken away here was there before.
            let section = reader.enter();
            // The table's own address space: the same frame of another has another slot.
            let slot = self.slots.find(&section, root.as_id, covered.start);
            let is_logged = slot.is_some_and(|slot| slot.flags().contains(SlotFlags::LOG_DIRTY));
            let new = if is_logged {
                // No large leaf could come in its place.
                Spte(old.0 & !F::NX_SPLIT)
            } else {
                F::EMPTY
            };
            if entry::exchange::<F>(entry, level, old, new, tally).is_err() {
                continue;
            }
            *left -= 1;
            self.nx_cursor.set(covered.end.0);
            if let (false, Some(below)) = (is_logged, level.below()) {
                pending.note(root.as_id, covered, true);
                seal_subtree::<F, H>(self, F::pfn(old), below, tally, pending);
                tally.add(Stat::NxRecovered, 1);
            }
            drop(section);
            if !is_logged {
                iter.skip_below();
            }
        }
    }
}

impl<F: Format, H: Host> Mmu<F, H> {
    /// Turns the policy that no large leaf is executable on or off. Everything that is mapped goes: each vCPU takes a new root
    /// before its next guest entry, so whoever turns the policy on against an untrusted guest makes all vCPUs leave the guest
    /// now. `None` if the policy was so already, and nothing happened.
    pub fn set_nx_huge_pages(&self, on: bool) -> Option<RootTeardown<F, H>> {
        // Before the roots are replaced; see the head of this file. Release, for who reads it without a root.
        let was = self.shared().nx.0.swap(on, Ordering::AcqRel);
        (was != on).then(|| self.invalidate_roots())
    }

    /// Whether large leaves are kept from being executable.
    pub fn nx_huge_pages(&self) -> bool {
        self.shared().nx.is_on()
    }

    /// One step of recovery: takes away at most `limit` of the tables that stand only because the guest once fetched there,
    /// so that the next access may have a large leaf again. Each step goes on where the last one stopped, from the end to the
    /// beginning again, so that every such table has its turn. Tables of a slot whose writes are logged stay and are no
    /// longer counted, because no large leaf could come in their place.
    pub fn recover_nx(&self, limit: usize) -> PendingFlush<'_, F, H> {
        self.shared().recover_nx(limit)
    }
}
