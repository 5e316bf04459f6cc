//! Collapse: puts one large leaf in the place of a table, where nothing stands against it any more.
//!
//! Protocol. One table at a time, inside one *section*, as a fault: are its frames under invalidation? all of one
//! visibility? in one slot, which is neither changing nor logged, and allows the level? Then the host is asked for the block.
//! If it answers with one frame of this level, and every leaf below the table is what that frame would be split into, the
//! large leaf is exchanged for the table. The winner seals the table (INV: unlink-seals); the flush is one for the whole
//! range, and the tables are retired after it (INV: flush-before-reuse).
//!
//! A collapse is to everyone else like a fault that maps the block. What has to hold against it waits for sections or shows
//! itself before, as against faults: an invalidation and a conversion by their window (INV: no-stale-install), a slot that goes
//! by its mark, the log of a slot by its flag. So nobody sweeps a slot's log while a collapse in that slot is half done. The
//! entries below may change between the look and the exchange, by faults, which put there what the host says, or by sweeps,
//! to which the leaf is one that was installed after them.
//!
//! Permissions. The leaf permits what the *first* leaf below the table permits now, the writable bit included, and no more
//! than the host does. It is made only if all leaves below agree in what they are made of: frame, memory type, whether the host
//! and the MMU let them be written, reading and fetching. They may differ in the writable bit, which a write restores by itself,
//! in being aged, and in accessed and dirty bits; a frame that was protected for good (not MMU-writable) keeps the table.
//!
//! Accessed and dirty. The leaf has those that any leaf below had when it was looked at, and gets those that the seal finds
//! beyond (INV: volatile-atomic). A processor that has a small translation cached cannot set a bit afterwards: it would set it
//! in an entry that is sealed, and faults instead.

use crate::attributes::Visibility;
use crate::entry::{self, EntryRef};
use crate::event;
use crate::host::{AddressSpaceId, Host, Lookup, Mapping};
use crate::iter::{Step, TdpIter};
use crate::mmu::{Mmu, Shared};
use crate::nx;
use crate::range_zap::{Harvest, seal_subtree};
use crate::root::Root;
use crate::slots::SlotFlags;
use crate::stats::{Deferred, Stat, Tally};
use crate::table;
use crate::tlb::PendingFlush;
use tdp_arch::{Access, ENTRIES_PER_TABLE, Format, GfnRange, LeafAttrs, Level, Perms, Pfn, Spte};
use tdp_rcu::Section;
use tdp_rcu::sync::prefetch;

/// Cache lines of the next table that are fetched while one is collapsed.
const LINES_AHEAD: usize = 16;

/// What is left of a leaf when what may differ between two leaves that can become one is left out.
#[inline(always)]
fn shape<F: Format>(leaf: Spte) -> Spte {
    Spte(leaf.0 & !(F::ACCESSED | F::DIRTY | F::WRITABLE))
}

impl<F: Format, H: Host> Shared<F, H> {
    /// Collapses what can be in the current root of an address space.
    pub(crate) fn collapse(
        &self,
        as_id: AddressSpaceId,
        range: GfnRange,
    ) -> PendingFlush<'_, F, H> {
        event::sweep("collapse", as_id, range);
        let mut pending = PendingFlush::new(self);
        let mut reader = self.domain.reader();
        for root in self.roots.of(as_id) {
            if root.is_obsolete() {
                continue;
            }
            let tally = Deferred::new(&self.shards.sweeps);
            let mut visit = self.domain.visit();
            let mut iter = TdpIter::<F, H>::new(&mut visit, &self.host, &root, range, Level::L2);
            while let Some(step) = iter.next() {
                let (entry, level, covered) = (step.entry, step.level, step.range());
                if level > self.max_leaf || !F::is_table(step.spte) || !range.covers(covered) {
                    continue;
                }
                self.fetch_next(&root, step);
                let section = reader.enter();
                let here = (entry, covered, level);
                let done = self.collapse_table(&section, &root, here, &mut pending, &tally);
                drop(section);
                if done {
                    iter.skip_below();
                }
                iter.spend(ENTRIES_PER_TABLE as u32);
            }
        }
        pending
    }

    /// Has the processor fetch the table beside the one that a step's entry points to, while that one is worked on.
    fn fetch_next(&self, root: &Root<H>, step: Step<'_>) {
        let beside = root.index(step.level, step.gfn) + 1;
        let beside = table::page(self.host.frames(), step.table).get(beside);
        if let Some(spte) = beside.map(EntryRef::load).filter(|&spte| F::is_table(spte)) {
            prefetch(table::page(self.host.frames(), F::pfn(spte)), LINES_AHEAD);
        }
    }

    /// Collapses the table that an entry of some level points to, the frames of which are `block`. `false` if it stays.
    fn collapse_table(
        &self,
        section: &Section<'_>,
        root: &Root<H>,
        (entry, block, level): (EntryRef<'_>, GfnRange, Level),
        pending: &mut PendingFlush<'_, F, H>,
        tally: &impl Tally,
    ) -> bool {
        // Read once, before the look-up; see `invalidate.rs`.
        let invalidated = self.invalidations.now(section);
        if root.is_obsolete() || invalidated.is_some_and(|them| them.overlap(root.as_id, block)) {
            return false;
        }
        let gfn = block.start;
        if let Some(confidential) = self.confidential.as_deref() {
            let attributes = &confidential.attributes;
            if attributes.get(gfn) == Visibility::Private
                || attributes.largest_level(gfn, level) != level
            {
                return false;
            }
        }
        let Some(slot) = self.slots.find(section, root.as_id, gfn) else {
            return false;
        };
        if slot.changing || slot.level_at(gfn, level) != level {
            return false;
        }
        let (old, Some(below)) = (entry.load(), level.below()) else {
            return false;
        };
        let Some(first) = F::is_table(old)
            .then(|| self.first_leaf(F::pfn(old), below))
            .flatten()
        else {
            return false;
        };
        let Lookup::Mapped(mapping) = self.host.lookup(slot, gfn, access_to_ask_for::<F>(first))
        else {
            return false;
        };
        let mut given = mapping.perms;
        if slot.flags().contains(SlotFlags::READ_ONLY) {
            given = given.difference(Perms::WRITE);
        }
        let Some((reference, mut leaf)) = self.leaf_like(root, first, mapping, given, level) else {
            return false;
        };
        let mut seen = Harvest::default();
        if !self.agree(F::pfn(old), below, reference, &mut seen) {
            return false;
        }
        if !seen.young && leaf.0 & F::AD_SOFTWARE != 0 {
            leaf = F::access_track(leaf);
        }
        leaf = seen.given_to::<F>(leaf);
        if entry::exchange::<F>(entry, level, old, leaf, tally).is_err() {
            return false;
        }
        pending.note(root.as_id, block, true);
        let harvest = seal_subtree::<F, H>(self, F::pfn(old), below, tally, pending);
        self.inherit(entry, level, F::leaf_pfn(leaf, level), harvest);
        tally.add(Stat::Collapses, 1);
        true
    }

    /// The first leaf below a table.
    fn first_leaf(&self, table: Pfn, level: Level) -> Option<Spte> {
        let page = table::page(self.host.frames(), table);
        let mut index = 0;
        while let Some(spte) = page.get(index).map(EntryRef::load) {
            if F::is_leaf(spte, level) {
                return Some(spte);
            }
            if let (true, Some(below)) = (F::is_mmu_present(spte), level.below())
                && let Some(first) = self.first_leaf(F::pfn(spte), below)
            {
                return Some(first);
            }
            index += 1;
        }
        None
    }

    /// The large leaf that permits what `first` does, if the host's mapping allows it: as it would be without the policy on
    /// fetches, and as it is to be; neither accessed nor dirty.
    fn leaf_like(
        &self,
        root: &Root<H>,
        first: Spte,
        mapping: Mapping,
        given: Perms,
        level: Level,
    ) -> Option<(Spte, Spte)> {
        let shown = nx::unrestricted::<F>(first);
        let attrs = LeafAttrs {
            perms: F::perms(shown),
            memory_type: mapping.memory_type,
            ignore_guest_pat: mapping.ignore_guest_pat,
            ad_bits: root.ad_bits,
            accessed: false,
            dirty: false,
            host_writable: shown.0 & F::HOST_WRITABLE != 0,
            mmu_writable: shown.0 & F::MMU_WRITABLE != 0,
        };
        // In the format's own terms: it may permit more than it was asked to.
        let permitted = F::perms(F::leaf(Pfn(0), Level::L1, LeafAttrs::memory(given)));
        let mut granted = attrs.perms;
        if attrs.host_writable {
            granted |= Perms::WRITE;
        }
        let fits = mapping.level >= level
            && mapping.pfn.0 & (level.pages() - 1) == 0
            && mapping.pfn < self.pfn_limit
            && permitted.contains(granted);
        let withholds = self.nx.is_on();
        (fits && (!withholds || nx::leaves_something(attrs.perms))).then(|| {
            (
                F::leaf(mapping.pfn, level, attrs),
                nx::leaf::<F>(mapping.pfn, level, attrs, withholds),
            )
        })
    }

    /// Whether every leaf below a table, the entries of which are of `level`, is one that `reference`, a leaf in the place of
    /// the table, could be split into. Takes in what they say of their use.
    fn agree(&self, table: Pfn, level: Level, reference: Spte, seen: &mut Harvest) -> bool {
        let Some(above) = level.above() else {
            return false;
        };
        let page = table::page(self.host.frames(), table);
        if level == Level::L1 {
            // Nearly always all are there and none is aged: one loop without a branch says so.
            let (mut differs, mut any) = (0, 0);
            let mut expected = shape::<F>(F::split_child(reference, above, 0));
            let mut index = 0;
            while let Some(spte) = page.get(index).map(EntryRef::load) {
                differs |= shape::<F>(spte).0 ^ expected.0;
                any |= spte.0;
                expected.0 += level.bytes();
                index += 1;
            }
            if differs == 0 {
                // Not tracked, as the reference is not.
                seen.gather::<F>(Spte(any));
                return true;
            }
        }
        let mut index = 0;
        while let Some(spte) = page.get(index).map(EntryRef::load) {
            let expected = F::split_child(reference, above, index);
            if F::is_leaf(spte, level) {
                let same = shape::<F>(spte) == shape::<F>(expected)
                    || shape::<F>(nx::unrestricted::<F>(spte)) == shape::<F>(expected);
                if !same {
                    return false;
                }
                seen.gather::<F>(spte);
            } else if F::is_mmu_present(spte) {
                let Some(below) = level.below() else {
                    return false;
                };
                if !self.agree(F::pfn(spte), below, expected, seen) {
                    return false;
                }
            } else if spte == F::SEALED {
                // Another one has unlinked it.
                return false;
            }
            index += 1;
        }
        true
    }

    /// Gives what was harvested below a table to the leaf of `pfn` that stands in its place, or to what that has been split
    /// into since. If another page is there by now, it had been taken away with all that was known of it.
    pub(crate) fn inherit(&self, entry: EntryRef<'_>, level: Level, pfn: Pfn, harvest: Harvest) {
        let mut now = entry.load();
        while F::is_leaf(now, level) {
            let heir = harvest.given_to::<F>(now);
            if heir == now || F::leaf_pfn(now, level) != pfn {
                return;
            }
            match entry::amend::<F>(entry, level, now, heir) {
                Ok(()) => return,
                Err(actual) => now = actual,
            }
        }
        let (true, Some(below)) = (F::is_mmu_present(now), level.below()) else {
            return;
        };
        let site = entry.site();
        let page = table::page(self.host.frames(), F::pfn(now));
        let mut index = 0;
        while let Some(entry) = page.get(index) {
            let part = Pfn(pfn.0 + index as u64 * below.pages());
            let site = site.below(level, F::pfn(now), index);
            self.inherit(entry.at(site), below, part, harvest);
            index += 1;
        }
    }
}

/// The access that needs what a leaf permits most of.
fn access_to_ask_for<F: Format>(leaf: Spte) -> Access {
    let perms = F::perms(nx::unrestricted::<F>(leaf));
    if leaf.0 & F::HOST_WRITABLE != 0 {
        Access::Write
    } else if perms.contains(Perms::READ) {
        Access::Read
    } else {
        Access::Execute
    }
}

impl<F: Format, H: Host> Mmu<F, H> {
    /// Puts large leaves in the place of tables that lie wholly in a range, where the host backs the whole block by one frame
    /// and everything below the table agrees with it: the undoing of [`split`](Mmu::split), for when a slot's writes are no
    /// longer logged. In place: the guest never misses a translation. Slots that are logged or forbid the level stay as they
    /// are, and so does a block for which the host would have to sleep to answer.
    ///
    /// Faults and other sweeps go on meanwhile. To a sweep a collapsed block is one that was mapped anew: a block that is
    /// write-protected at this moment, by [`write_protect`](Mmu::write_protect) and not by a log, may be writable
    /// afterwards.
    pub fn collapse(
        &self,
        as_id: AddressSpaceId,
        range: impl Into<GfnRange>,
    ) -> PendingFlush<'_, F, H> {
        self.shared().collapse(as_id, range.into())
    }
}
