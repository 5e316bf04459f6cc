//! Resolving a fault: check, look up, choose a level, install.
//!
//! Protocol. Inside one critical section: is the frame under invalidation? which slot? how is it backed, at what level?
//! Then the mapping is installed. There are three ways through:
//!
//! * the **straight path** has all that in the vCPU's memo (`memo.rs`), is part of its caller's code, and makes a leaf of an
//!   empty entry or leaves everything to the next. The entry is on its way from memory while the host is asked;
//! * the **fast path** walks where the memo has no table, and knows large leaves and spurious faults. It gives up, having
//!   changed nothing, at the first thing out of the ordinary: a missing table, a look-up that has to sleep, an entry that is
//!   neither empty nor a leaf that permits the access or may be made to;
//! * the **slow path** does all of it from the start, and everything else: waiting, splitting, look-ups that sleep,
//!   answers other than *fixed*.
//!
//! None changes anything before its last step, so a fault that took one of them half way is no special case.

use crate::attributes::Visibility;
use crate::entry::{self, EntryRef, TablePage};
use crate::event::{self, Site};
use crate::fault::{Fault, MemoryFault, Outcome, RetryReason};
use crate::host::{Host, Lookup, Mapping};
use crate::install::Request;
use crate::invalidate::Ranges;
use crate::memo::{Current, Wish};
use crate::nx;
use crate::root::Root;
use crate::slots::{Slot, SlotFlags};
use crate::stats::{Stat, Straight, Tally};
use crate::table;
use crate::vcpu::{Context, VcpuCore};
use alloc::sync::Arc;
use tdp_arch::{Access, Format, Gfn, LeafAttrs, Level, Perms, Pfn};
use tdp_rcu::Section;

/// What the fast path came to.
pub(crate) enum Fast {
    /// A leaf of this level was installed.
    Fixed(Level),
    /// A leaf permits the access.
    Spurious,
    /// Nothing was changed; take the slow path.
    GaveUp,
}

/// What the first critical section of a fault came to.
pub(crate) enum Resolution<B> {
    Done(Outcome),
    /// The look-up has to sleep, outside. Holds the slot and the invalidation sequence before it.
    Sleep(Arc<Slot<B>>, u64),
}

impl<F: Format, H: Host> VcpuCore<F, H> {
    /// A fault on an empty entry of level 1, with all that it needs in the memo. `None` if there is more to it; nothing was
    /// changed then.
    #[inline(always)]
    pub(crate) fn fault_straight(
        &mut self,
        section: &Section<'_>,
        fault: &Fault,
    ) -> Option<Outcome> {
        let gfn = fault.gpa.gfn();
        let memo = self.memo.current(section)?;
        let entry = self.small_entry(&memo, gfn)?;
        // The recipe may be another slot's.
        let slot = memo.plain_slot(gfn)?;
        let Lookup::Mapped(mapping) = self.ctx.host.lookup(slot, gfn, fault.access) else {
            return None;
        };
        let wish = Wish::new(&mapping, fault.max_level, fault.prefetch);
        self.put(&memo, entry, gfn, &mapping, fault.access, wish)
    }

    /// The same of a bare map.
    #[inline(always)]
    pub(crate) fn map_straight(
        &mut self,
        section: &Section<'_>,
        gfn: Gfn,
        mapping: &Mapping,
        access: Access,
    ) -> Option<Outcome> {
        let memo = self.memo.current(section)?;
        let entry = self.small_entry(&memo, gfn)?;
        let wish = Wish::new(mapping, Level::L3, false);
        self.put(&memo, entry, gfn, mapping, access, wish)
    }

    /// The entry of level 1 of `gfn` by what the memo has, on its way from memory while its caller does other things.
    #[inline(always)]
    fn small_entry<'a>(
        &'a self,
        memo: &Current<'_, 'a, H::Backing>,
        gfn: Gfn,
    ) -> Option<EntryRef<'a>> {
        let table = match memo.small(&self.tables, gfn) {
            Some(table) => table,
            None => {
                let table = self.ctx.below(memo.large(&self.tables, gfn)?, gfn)?;
                self.tables.note_small(gfn, table);
                table
            }
        };
        let entry = self.ctx.small_entry_in(table, gfn)?;
        entry.fetch();
        Some(entry)
    }

    #[inline(always)]
    fn put(
        &self,
        memo: &Current<'_, '_, H::Backing>,
        entry: EntryRef<'_>,
        gfn: Gfn,
        mapping: &Mapping,
        access: Access,
        wish: Wish,
    ) -> Option<Outcome> {
        let leaf = memo.leaf::<F>(wish, mapping.pfn)?;
        if !mapping.perms.contains(access.needs()) {
            return None;
        }
        event::spte_requested(self.ctx.as_id, gfn, Level::L1, mapping.pfn);
        entry::install_leaf::<F>(entry, Level::L1, leaf, &Straight(memo.section())).ok()?;
        event::set_spte(entry.site(), Level::L1, leaf);
        Some(Outcome::Fixed { level: Level::L1 })
    }

    /// The fast path of a fault.
    #[inline(always)]
    pub(crate) fn fault_fast(
        &mut self,
        section: &Section<'_>,
        gfn: Gfn,
        access: Access,
        max_level: Level,
        prefetch: bool,
    ) -> Fast {
        if !self.remembers(section) {
            return Fast::GaveUp;
        }
        let Some(slot) = self.slot(section, gfn) else {
            return Fast::GaveUp;
        };
        if !slot.is_plain() {
            return Fast::GaveUp;
        }
        let Lookup::Mapped(mapping) = self.ctx.host.lookup(slot, gfn, access) else {
            return Fast::GaveUp;
        };
        let goal = max_level.min(mapping.level);
        let wish = Wish::new(&mapping, max_level, prefetch);
        if goal == Level::L1 {
            self.map_fast(section, gfn, mapping, goal, access, wish)
        } else {
            self.fault_large(section, slot, gfn, mapping, goal, access, wish)
        }
    }

    /// The rest of the fast path where a large leaf may be possible. On its own, so that the other way has no call in it and
    /// saves no registers for one.
    #[inline(never)]
    #[allow(clippy::too_many_arguments, reason = "registers, all but two")]
    fn fault_large(
        &mut self,
        section: &Section<'_>,
        slot: &Slot<H::Backing>,
        gfn: Gfn,
        mapping: Mapping,
        goal: Level,
        access: Access,
        wish: Wish,
    ) -> Fast {
        let goal = self.ctx.uniform_level(gfn, slot.level_at(gfn, goal));
        self.map_fast(section, gfn, mapping, goal, access, wish)
    }

    /// The fast path below a fault: level, walk, install. The caller has made sure that the memo holds and that the root can map
    /// `gfn`; a slot does, because none reaches further.
    #[inline(always)]
    pub(crate) fn map_fast(
        &mut self,
        section: &Section<'_>,
        gfn: Gfn,
        mapping: Mapping,
        goal: Level,
        access: Access,
        wish: Wish,
    ) -> Fast {
        // Any format can express what may at least be read.
        let usable = mapping.perms.contains(access.needs().union(Perms::READ));
        if !usable | (mapping.pfn >= self.ctx.shared.pfn_limit) {
            return Fast::GaveUp;
        }
        let prefetch = wish.is_prefetch();
        // The common case is compiled on its own, with every shift a constant.
        if goal == Level::L1 {
            let memo = self.memo.current(section);
            let above = memo.and_then(|memo| memo.large(&self.tables, gfn));
            let remembered = above.and_then(|above| self.ctx.below(above, gfn));
            // A table that was unlinked since is sealed: the way from the root is tried too.
            let table = match remembered {
                Some(table) => table,
                None => {
                    let Some(above) = self.ctx.table_of(&self.ctx.root, gfn, Level::L2) else {
                        return Fast::GaveUp;
                    };
                    let Some(table) = self.ctx.below(above.1, gfn) else {
                        return Fast::GaveUp;
                    };
                    self.tables.note_large(gfn, above);
                    table
                }
            };
            self.tables.note_small(gfn, table);
            let Some(entry) = self.ctx.small_entry_in(table, gfn) else {
                return Fast::GaveUp;
            };
            // A confidential guest's frames may belong to the other half: a bare map never goes by a recipe there.
            if wish.is_for_small() && self.ctx.private_root.is_none() {
                let attrs = self.ctx.leaf_attrs(mapping, mapping.perms, prefetch);
                self.memo
                    .note_leaf::<F>(wish, attrs, self.ctx.shared.pfn_limit);
            }
            let fast = self
                .ctx
                .map_in(entry, gfn, mapping, Level::L1, access, prefetch);
            // INV: progress. Unlinked and not sealed yet, the table has leaves that the processor does not see: it would come
            // again and again, and be told each time that all is well.
            if matches!(fast, Fast::Spurious)
                && remembered.is_some()
                && !self.ctx.leads_to(gfn, table.1)
            {
                return Fast::GaveUp;
            }
            fast
        } else if self.ctx.shared.nx.is_on() {
            Fast::GaveUp
        } else {
            let goal = self.ctx.aligned(gfn, mapping.pfn, goal);
            let table = self.ctx.table_of(&self.ctx.root, gfn, goal);
            match table.and_then(|table| self.ctx.entry_in(table, gfn, goal)) {
                Some(entry) => self.ctx.map_in(entry, gfn, mapping, goal, access, prefetch),
                None => Fast::GaveUp,
            }
        }
    }

    /// The slow path of a fault.
    #[cold]
    pub(crate) fn resolve(
        &mut self,
        section: &Section<'_>,
        fault: Fault,
    ) -> Resolution<H::Backing> {
        let gfn = fault.gpa.gfn();
        if gfn >= self.ctx.root.limit() {
            return Resolution::Done(self.ctx.memory_fault(MemoryFault::BeyondWidth));
        }
        if self.ctx.root.is_obsolete() {
            return Resolution::Done(self.ctx.retry(RetryReason::RootObsolete));
        }
        let invalidated = self.ctx.shared.invalidations.now(section);
        if self.ctx.is_among(invalidated, gfn, Level::L1) {
            return Resolution::Done(self.ctx.retry(RetryReason::Invalidation));
        }
        if self.ctx.is_private(gfn) {
            return Resolution::Done(self.ctx.memory_fault(MemoryFault::IsPrivate));
        }
        let snapshot = self.ctx.shared.slots.snapshot(section);
        let Some(slot) = self.find_slot(snapshot, gfn) else {
            let outcome = self.ctx.mmio(&mut self.cache, fault, snapshot.generation);
            return Resolution::Done(outcome);
        };
        if slot.changing {
            return Resolution::Done(self.ctx.retry(RetryReason::SlotChanging));
        }
        if self.ctx.ring_is_full(slot) {
            return Resolution::Done(Outcome::DirtyRingFull);
        }
        if fault.access.is_write() && slot.flags().contains(SlotFlags::READ_ONLY) {
            // Whatever the backing would say.
            self.ctx.add(Stat::Mmio, 1);
            return Resolution::Done(Outcome::Mmio { read_only: true });
        }
        if !fault.prefetch
            && let Some(outcome) = self.ctx.repair(slot, gfn, fault.access)
        {
            return Resolution::Done(outcome);
        }
        let lookup = self.ctx.host.lookup(slot, gfn, fault.access);
        if let Lookup::Mapped(mapping) = lookup {
            let limit = slot.level_at(gfn, fault.max_level.min(mapping.level));
            let goal = self.ctx.uniform_level(gfn, limit);
            return Resolution::Done(self.install_backed(fault, slot, goal, mapping, invalidated));
        }
        Resolution::Done(match lookup {
            Lookup::Blocking => {
                let sequence = self.ctx.shared.invalidations.sequence();
                return Resolution::Sleep(slot.clone(), sequence);
            }
            Lookup::Failed => self.ctx.memory_fault(MemoryFault::NotBacked),
            _ => self.ctx.retry(RetryReason::Backing),
        })
    }

    /// Goes on inside a new critical section with what a sleeping look-up found.
    pub(crate) fn resolve_slept(
        &mut self,
        section: &Section<'_>,
        fault: Fault,
        slept_on: &Arc<Slot<H::Backing>>,
        sequence: u64,
        lookup: Lookup,
    ) -> Outcome {
        let gfn = fault.gpa.gfn();
        if self.ctx.root.is_obsolete() {
            return self.ctx.retry(RetryReason::RootObsolete);
        }
        // INV: no-stale-install: an invalidation that is under way is seen by its range, one that has passed by the
        // sequence; a slot that was replaced is another one.
        let invalidations = &self.ctx.shared.invalidations;
        let invalidated = invalidations.now(section);
        if self.ctx.is_among(invalidated, gfn, Level::L1) || invalidations.sequence() != sequence {
            return self.ctx.retry(RetryReason::Invalidation);
        }
        if self.ctx.is_private(gfn) {
            return self.ctx.memory_fault(MemoryFault::IsPrivate);
        }
        match self.ctx.shared.slots.find(section, self.ctx.as_id, gfn) {
            Some(slot) if Arc::ptr_eq(slot, slept_on) && !slot.changing => {}
            _ => return self.ctx.retry(RetryReason::SlotChanging),
        }
        match lookup {
            Lookup::Mapped(mapping) => {
                let goal = slept_on.level_at(gfn, fault.max_level.min(mapping.level));
                let goal = self.ctx.uniform_level(gfn, goal);
                self.install_backed(fault, slept_on, goal, mapping, invalidated)
            }
            Lookup::Failed => self.ctx.memory_fault(MemoryFault::NotBacked),
            Lookup::Blocking | Lookup::Retry => self.ctx.retry(RetryReason::Backing),
        }
    }

    fn install_backed(
        &mut self,
        fault: Fault,
        slot: &Slot<H::Backing>,
        goal: Level,
        mapping: Mapping,
        invalidated: Option<&Ranges>,
    ) -> Outcome {
        let mut perms = mapping.perms;
        if slot.flags().contains(SlotFlags::READ_ONLY) {
            perms = perms.difference(Perms::WRITE);
        }
        let clean = self.ctx.installs_clean(slot, fault.access);
        let outcome = self.install_mapping(fault, goal, mapping, perms, clean, invalidated);
        if let Outcome::Fixed { .. } = outcome
            && perms.contains(Perms::WRITE)
            && !clean
        {
            self.ctx.log_write(slot, fault.gpa.gfn());
        }
        outcome
    }

    /// Checks a mapping and installs it, with the dirty bit clear if `clean`.
    pub(crate) fn install_mapping(
        &mut self,
        fault: Fault,
        goal: Level,
        mapping: Mapping,
        perms: Perms,
        clean: bool,
        invalidated: Option<&Ranges>,
    ) -> Outcome {
        if !perms.contains(fault.access.needs()) || !F::can_express(perms) {
            return self.ctx.memory_fault(MemoryFault::NotPermitted);
        }
        if mapping.pfn >= self.ctx.shared.pfn_limit {
            return self.ctx.memory_fault(MemoryFault::NotBacked);
        }
        let gfn = fault.gpa.gfn();
        let mut goal = self.ctx.aligned(gfn, mapping.pfn, goal);
        // INV: no-stale-install: a large leaf brings back no neighbour that is being invalidated.
        while goal > Level::L1 && self.ctx.is_among(invalidated, gfn, goal) {
            goal = goal.below_or_leaf();
        }
        let withholds = self.ctx.shared.nx.is_on();
        let wanted = goal;
        if withholds && (fault.access.is_execute() || !nx::leaves_something(perms)) {
            goal = Level::L1;
        }
        let mut attrs = self.ctx.leaf_attrs(mapping, perms, fault.prefetch);
        attrs.dirty &= !clean;
        let first = Pfn(mapping.pfn.0 & !(goal.pages() - 1));
        event::spte_requested(self.ctx.as_id, gfn, goal, first);
        let request = Request {
            gfn,
            goal,
            wanted,
            withholds,
            frame: mapping.pfn,
            attrs,
            access: fault.access,
            prefetch: fault.prefetch,
        };
        self.ctx.install(&mut self.cache, request)
    }
}

impl<F: Format, H: Host> Context<F, H> {
    /// The table under `root` that holds the entry of `gfn` at level `goal`, with its page, if all tables above it are there.
    #[inline(always)]
    pub(crate) fn table_of(
        &self,
        root: &Root<H>,
        gfn: Gfn,
        goal: Level,
    ) -> Option<(Pfn, &TablePage)> {
        let frames = self.host.frames();
        // From page to page, not from frame to frame: each level waits for the one above it, and two shifts less.
        let (mut page, mut table) = (table::page(frames, root.pfn), root.pfn);
        // A loop over constants is unrolled, and each level's shift is one.
        for level in [Level::L5, Level::L4, Level::L3, Level::L2] {
            if root.level >= level && goal < level {
                let spte = page.get(root.index(level, gfn))?.load();
                if !F::is_table(spte) {
                    return None;
                }
                table = F::pfn(spte);
                page = table::page(frames, table);
            }
        }
        Some((table, page))
    }

    /// The table of level 1 of `gfn`, with its page, by the table of level 2 above it, if that has one.
    #[inline(always)]
    fn below(&self, above: &TablePage, gfn: Gfn) -> Option<(Pfn, &TablePage)> {
        let spte = above.get(Level::L2.index(gfn))?.load();
        if !F::is_table(spte) {
            return None;
        }
        let table = F::pfn(spte);
        Some((table, table::page(self.host.frames(), table)))
    }

    /// Whether the way from the root leads to a table of level 1.
    #[inline(never)]
    fn leads_to(&self, gfn: Gfn, page: &TablePage) -> bool {
        self.table_of(&self.root, gfn, Level::L1)
            .is_some_and(|(_, found)| core::ptr::eq(found, page))
    }

    /// The entry of `gfn` in a table of level 1. No root is one, so that none needs to be asked.
    #[inline(always)]
    fn small_entry_in<'t>(
        &self,
        (table, page): (Pfn, &'t TablePage),
        gfn: Gfn,
    ) -> Option<EntryRef<'t>> {
        let entry = page.get(Level::L1.index(gfn))?;
        Some(entry.at(Site::new(self.as_id, gfn, table)))
    }

    /// The entry of `gfn` in a table of level `goal`.
    #[inline(always)]
    fn entry_in<'t>(
        &self,
        (table, page): (Pfn, &'t TablePage),
        gfn: Gfn,
        goal: Level,
    ) -> Option<EntryRef<'t>> {
        let entry = page.get(self.root.index(goal, gfn))?;
        Some(entry.at(Site::new(self.as_id, gfn, table)))
    }

    /// Installs a leaf of level `goal` in its entry, if that is all it takes.
    #[inline(always)]
    fn map_in(
        &self,
        entry: EntryRef<'_>,
        gfn: Gfn,
        mapping: Mapping,
        goal: Level,
        access: Access,
        prefetch: bool,
    ) -> Fast {
        let old = entry.load();
        if old == F::EMPTY {
            let pfn = Pfn(mapping.pfn.0 & !(goal.pages() - 1));
            let leaf = F::leaf(pfn, goal, self.leaf_attrs(mapping, mapping.perms, prefetch));
            event::spte_requested(self.as_id, gfn, goal, pfn);
            if entry::install_leaf::<F>(entry, goal, leaf, self).is_ok() {
                self.add(Stat::Fixed, 1);
                event::set_spte(entry.site(), goal, leaf);
                return Fast::Fixed(goal);
            }
        } else if F::is_leaf(old, goal) && F::allows(old, access) {
            self.add(Stat::Spurious, 1);
            return Fast::Spurious;
        } else if F::is_leaf(old, goal)
            && !prefetch
            && F::leaf_pfn(old, goal).0 == mapping.pfn.0 & !(goal.pages() - 1)
            && self.repair_plain(entry, goal, old, access)
        {
            return Fast::Fixed(goal);
        }
        Fast::GaveUp
    }

    #[inline(always)]
    fn leaf_attrs(&self, mapping: Mapping, perms: Perms, prefetch: bool) -> LeafAttrs {
        LeafAttrs {
            memory_type: mapping.memory_type,
            ignore_guest_pat: mapping.ignore_guest_pat,
            ad_bits: self.root.ad_bits,
            accessed: !prefetch,
            ..LeafAttrs::memory(perms)
        }
    }

    /// Largest level up to `goal` at which guest and host frame agree below the size, and that the MMU allows.
    #[inline]
    pub(crate) fn aligned(&self, gfn: Gfn, pfn: Pfn, goal: Level) -> Level {
        let mut goal = goal.min(self.shared.max_leaf);
        while goal > Level::L1 && (gfn.0 ^ pfn.0) & (goal.pages() - 1) != 0 {
            goal = goal.below_or_leaf();
        }
        goal
    }

    /// Whether a frame of `gfn`'s block of `level` is among those under invalidation.
    pub(crate) fn is_among(&self, invalidated: Option<&Ranges>, gfn: Gfn, level: Level) -> bool {
        invalidated.is_some_and(|ranges| ranges.overlap(self.as_id, level.range(gfn)))
    }

    /// Whether a frame is private memory of a confidential guest.
    #[inline]
    pub(crate) fn is_private(&self, gfn: Gfn) -> bool {
        let confidential = self.shared.confidential.as_deref();
        confidential.is_some_and(|it| it.attributes.get(gfn) == Visibility::Private)
    }

    /// Largest level up to `goal` whose block around `gfn` is all private or all shared.
    #[inline]
    pub(crate) fn uniform_level(&self, gfn: Gfn, goal: Level) -> Level {
        match self.shared.confidential.as_deref() {
            Some(confidential) => confidential.attributes.largest_level(gfn, goal),
            None => goal,
        }
    }

    /// Counts how a fault ended that installed or found a leaf.
    #[inline(always)]
    pub(crate) fn count(&self, outcome: Outcome) {
        match outcome {
            Outcome::Fixed { .. } => self.add(Stat::Fixed, 1),
            Outcome::Spurious => self.add(Stat::Spurious, 1),
            _ => {}
        }
    }

    #[cold]
    pub(crate) fn retry(&self, reason: RetryReason) -> Outcome {
        self.add(reason.stat(), 1);
        Outcome::Retry(reason)
    }

    #[cold]
    pub(crate) fn memory_fault(&self, reason: MemoryFault) -> Outcome {
        self.add(Stat::MemoryFault, 1);
        Outcome::MemoryFault(reason)
    }
}
