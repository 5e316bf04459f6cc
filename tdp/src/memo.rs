//! What a vCPU remembers from fault to fault, so that the common one neither searches nor walks.
//!
//! Protocol. A memo holds what was found in earlier critical sections of its vCPU, all under one *stamp* of the epoch domain:
//! the slot used last, the tables of levels 1 and 2 used last, and the bits of the leaf made last. A section whose stamp is the same
//! may go by it ([`Memo::current`]); with any other stamp the memo is emptied first ([`Memo::renew`]). The stamp moves
//!
//! * with each grace period of what is retired, so what a memo points to is memory, and still what it was: a table may have
//!   been unlinked meanwhile. Its entries are sealed then, or about to be (INV: unlink-seals): who comes by this way once is no
//!   other than one who walked down before and was slow. Who is told so that there is nothing to do makes sure of the way
//!   from the root, or they would come for as long as the sealing takes;
//! * after each publication of slots, after each beginning of an invalidation, after roots are made obsolete. Whoever
//!   publishes these waits, if it has to, for the sections that began before; so a section that goes by the old stamp
//!   is waited for, exactly as one that looked before the publication (`section.rs` of the epoch domain tells both orders).
//!
//! Which half a frame belongs to changes under an invalidation only. So with a private table is remembered that all frames of its
//! region are private.
//!
//! A memo is renewed only while nothing is under invalidation and the root is not obsolete, both looked at after the stamp:
//! who goes by the memo need not look at either.
//!
//! Whatever is remembered was found after a stamp was read, and is remembered under a stamp that is no newer.

use crate::entry::TablePage;
use crate::host::Mapping;
use crate::slots::Slot;
use core::cell::Cell;
use core::ptr::NonNull;
use tdp_arch::{Format, Gfn, LeafAttrs, Level, Pfn, Spte};
use tdp_rcu::{Section, Stamp};

/// Tables of level 1 that are remembered: 1 GiB of guest memory. A model checker gets as many as it can tell apart.
const SMALL: usize = if cfg!(loom) { 2 } else { 512 };
/// Tables of level 2 that are remembered: 32 GiB.
const LARGE: usize = if cfg!(loom) { 2 } else { 32 };

/// See the module. What a fault reads of it in any case comes first.
#[repr(C)]
pub(crate) struct Memo<B> {
    stamp: Stamp,
    /// Null for none.
    slot: *const Slot<B>,
    /// How a leaf of level 1 is made of a frame, but for the frame itself: the answer to the wish that came last.
    leaf: Spte,
    /// First host frame that cannot be in it.
    pfn_limit: Pfn,
    wish: Wish,
    /// Whether the guest has a private half. Here, because it is the first thing that a fault asks.
    confidential: bool,
}

const _: () = assert!(size_of::<Memo<()>>() <= 40);

/// The tables that are part of the memo, apart from it because of their size. The more of a guest one leads to, the fewer are
/// needed, and the longer the way from there.
pub(crate) struct Tables {
    /// Of level 1, of both halves.
    small: [Cell<Table>; SMALL],
    /// Which of these are in use, a bit each: to empty all takes longer than the fault that has to.
    used: [Cell<u64>; SMALL.div_ceil(64)],
    /// Of level 2.
    large: [Table; LARGE],
}

/// A table.
#[derive(Clone, Copy)]
#[cfg_attr(not(feature = "tracing"), repr(align(16)))]
#[cfg_attr(feature = "tracing", repr(align(32)))]
struct Table {
    /// Guest frames without the bits that choose an entry here or below; [`Table::NONE`]'s is that of no frame.
    region: u64,
    page: NonNull<TablePage>,
    /// The same page, for whom events are told.
    #[cfg(feature = "tracing")]
    pfn: Pfn,
}

impl Table {
    const NONE: Self = Self {
        region: u64::MAX,
        page: NonNull::dangling(),
        #[cfg(feature = "tracing")]
        pfn: Pfn(0),
    };

    #[inline(always)]
    fn new(region: u64, _pfn: Pfn, page: &TablePage) -> Self {
        Self {
            region,
            page: NonNull::from(page),
            #[cfg(feature = "tracing")]
            pfn: _pfn,
        }
    }

    /// Its frame, where events are told.
    #[inline(always)]
    fn pfn(&self) -> Pfn {
        #[cfg(feature = "tracing")]
        return self.pfn;
        #[cfg(not(feature = "tracing"))]
        Pfn(0)
    }
}

/// All that decides whether a leaf of level 1 is made, and what it looks like, but for its frame and the kind of access.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wish(u32);

impl Wish {
    /// No wish.
    const NONE: Self = Self(u32::MAX);

    #[inline(always)]
    pub(crate) fn new(mapping: &Mapping, max_level: Level, prefetch: bool) -> Self {
        Self(
            u32::from(mapping.perms.bits())
                | u32::from(mapping.level.number()) << 8
                | u32::from(max_level.number()) << 12
                | (mapping.memory_type as u32) << 16
                | u32::from(mapping.ignore_guest_pat) << 20
                | u32::from(prefetch) << 21,
        )
    }

    #[inline(always)]
    pub(crate) const fn is_prefetch(self) -> bool {
        self.0 >> 21 & 1 != 0
    }

    /// Whether it can be answered by a leaf of level 1 only, whatever the slot and the guest frame.
    #[inline(always)]
    pub(crate) const fn is_for_small(self) -> bool {
        self.0 >> 8 & 0xf == 1 || self.0 >> 12 & 0xf == 1
    }
}

#[allow(unsafe_code)]
// UNSAFETY: the slot is a raw pointer, which the compiler takes for thread-bound.
// SAFETY: it is dereferenced in `Current::last_slot` only, under the rule of the stamp, whichever thread runs it; a slot may be used from
// any thread because `B` is `Send` and `Sync`.
unsafe impl<B: Send + Sync> Send for Memo<B> {}

#[allow(unsafe_code)]
// UNSAFETY: as above, for pages of tables.
// SAFETY: they are dereferenced in `Current::page` only, under the same rule, and hold atomics.
unsafe impl Send for Tables {}

impl<B> Memo<B> {
    pub(crate) const fn new(confidential: bool) -> Self {
        Self {
            stamp: Stamp::NONE,
            slot: core::ptr::null(),
            leaf: Spte(0),
            wish: Wish::NONE,
            pfn_limit: Pfn(0),
            confidential,
        }
    }

    /// Whether the guest has a private half.
    #[inline(always)]
    pub(crate) const fn is_confidential(&self) -> bool {
        self.confidential
    }

    /// What is remembered, if `section` may go by it.
    #[inline(always)]
    pub(crate) fn current<'s>(&self, section: &'s Section<'_>) -> Option<Current<'_, 's, B>> {
        (self.stamp == section.stamp()).then_some(Current {
            memo: self,
            section,
        })
    }

    /// Empties the memo, for what is found in a section that has read `stamp`.
    #[cold]
    pub(crate) fn renew(&mut self, tables: &mut Tables, stamp: Stamp) {
        *self = Self::new(self.confidential);
        tables.clear();
        self.stamp = stamp;
    }

    /// Forgets everything: another tree from now on.
    pub(crate) fn forget(&mut self) {
        *self = Self::new(self.confidential);
    }

    /// Remembers the slot used last.
    #[inline(always)]
    pub(crate) fn note_slot(&mut self, slot: &Slot<B>) {
        self.slot = slot;
    }

    /// Remembers how the leaf was made that answers a wish.
    #[inline(always)]
    pub(crate) fn note_leaf<F: Format>(&mut self, wish: Wish, attrs: LeafAttrs, pfn_limit: Pfn) {
        self.pfn_limit = pfn_limit;
        self.leaf = F::leaf(Pfn(0), Level::L1, attrs);
        self.wish = wish;
    }
}

/// What is remembered, in a section that may go by it.
pub(crate) struct Current<'m, 's, B> {
    memo: &'m Memo<B>,
    section: &'s Section<'s>,
}

impl<'s, B> Current<'_, 's, B> {
    /// The section.
    #[inline(always)]
    pub(crate) fn section(&self) -> &'s Section<'s> {
        self.section
    }

    /// The slot that was used last, if it holds `gfn`.
    #[inline(always)]
    pub(crate) fn slot(&self, gfn: Gfn) -> Option<&'s Slot<B>> {
        self.last_slot().filter(|slot| slot.contains(gfn))
    }

    /// The same, if faults on it need no thought.
    #[inline(always)]
    pub(crate) fn plain_slot(&self, gfn: Gfn) -> Option<&'s Slot<B>> {
        self.last_slot().filter(|slot| slot.contains_plain(gfn))
    }

    /// The slot that was used last.
    #[inline(always)]
    #[allow(unsafe_code)]
    fn last_slot(&self) -> Option<&'s Slot<B>> {
        // UNSAFETY: a pointer kept from an earlier critical section.
        // SAFETY: null, or found in a published snapshot in an earlier section, whose stamp is this one's: a snapshot that
        // owned it is not freed before this section ends (INV: flush-before-reuse, its grace-period half).
        unsafe { self.memo.slot.as_ref() }
    }

    /// The table of level 1 of `gfn`, with its frame where events are told, if it is remembered. It may have been unlinked
    /// since.
    #[inline(always)]
    pub(crate) fn small(&self, tables: &Tables, gfn: Gfn) -> Option<(Pfn, &'s TablePage)> {
        let region = Tables::small_region(gfn);
        let table = tables.small[region as usize % SMALL].get();
        (table.region == region).then(|| (table.pfn(), self.page(table.page)))
    }

    /// The private table of level 1 of `gfn`, if it is remembered, and with it that all frames of the table are private. It may
    /// have been unlinked since.
    #[inline(always)]
    pub(crate) fn private(&self, tables: &Tables, gfn: Gfn) -> Option<&'s TablePage> {
        let region = Tables::private_region(gfn);
        let private = tables.small[region as usize % SMALL].get();
        (private.region == region).then(|| self.page(private.page))
    }

    /// The table of level 2 above `gfn`, if it is remembered. It may have been unlinked since.
    #[inline(always)]
    pub(crate) fn large(&self, tables: &Tables, gfn: Gfn) -> Option<&'s TablePage> {
        let region = Tables::large_region(gfn);
        let Table {
            region: of, page, ..
        } = tables.large[region as usize % LARGE];
        (of == region).then(|| self.page(page))
    }

    /// A table that is remembered.
    #[inline(always)]
    #[allow(unsafe_code)]
    fn page(&self, page: NonNull<TablePage>) -> &'s TablePage {
        // UNSAFETY: a pointer kept from an earlier critical section.
        // SAFETY: it came from a frame source, which promises a valid page for as long as it lives; that it is still the same
        // table is what the stamp says (INV: flush-before-reuse). What is in the page is atomic.
        unsafe { page.as_ref() }
    }

    /// The leaf of level 1 at `pfn` that answers a wish, if one like it was made last.
    #[inline(always)]
    pub(crate) fn leaf<F: Format>(&self, wish: Wish, pfn: Pfn) -> Option<Spte> {
        let memo = self.memo;
        let known = memo.wish == wish && pfn < memo.pfn_limit;
        known.then(|| F::with_pfn(memo.leaf, pfn))
    }
}

impl Tables {
    pub(crate) const fn new() -> Self {
        Self {
            small: [const { Cell::new(Table::NONE) }; SMALL],
            used: [const { Cell::new(0) }; SMALL.div_ceil(64)],
            large: [Table::NONE; LARGE],
        }
    }

    /// Forgets all tables.
    fn clear(&mut self) {
        for (used, small) in self.used.iter().zip(self.small.chunks(64)) {
            let mut used = used.take();
            while used != 0 {
                if let Some(table) = small.get(used.trailing_zeros() as usize) {
                    table.set(Table::NONE);
                }
                used &= used - 1;
            }
        }
        self.large = [Table::NONE; LARGE];
    }

    /// Puts a table of level 1 where its region has its place.
    #[inline(always)]
    fn put(&self, table: Table) {
        let place = table.region as usize % SMALL;
        if self.small[place].replace(table).region == Table::NONE.region {
            self.use_place(place);
        }
    }

    #[cold]
    fn use_place(&self, place: usize) {
        let used = &self.used[place / 64];
        used.set(used.get() | 1 << (place % 64));
    }

    #[inline(always)]
    const fn small_region(gfn: Gfn) -> u64 {
        gfn.0 >> Level::L2.gfn_shift()
    }

    #[inline(always)]
    const fn large_region(gfn: Gfn) -> u64 {
        gfn.0 >> Level::L3.gfn_shift()
    }

    /// As a small one, but that of no small region.
    #[inline(always)]
    const fn private_region(gfn: Gfn) -> u64 {
        Self::small_region(gfn) | 1 << 63
    }

    /// Remembers the private table of level 1 of `gfn`, of a region that is all private.
    #[inline(always)]
    pub(crate) fn note_private(&self, gfn: Gfn, (pfn, page): (Pfn, &TablePage)) {
        let region = Self::private_region(gfn);
        self.put(Table::new(region, pfn, page));
    }

    /// Remembers the table of level 1 of `gfn`.
    #[inline(always)]
    pub(crate) fn note_small(&self, gfn: Gfn, (pfn, page): (Pfn, &TablePage)) {
        let region = Self::small_region(gfn);
        self.put(Table::new(region, pfn, page));
    }

    /// Remembers the table of level 2 above `gfn`.
    #[inline(always)]
    pub(crate) fn note_large(&mut self, gfn: Gfn, (pfn, page): (Pfn, &TablePage)) {
        let region = Self::large_region(gfn);
        self.large[region as usize % LARGE] = Table::new(region, pfn, page);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn an_emptied_memo_has_no_table() {
        let mut tables = Tables::new();
        for round in 1..4 {
            for n in 0..SMALL as u64 {
                let gfn = Gfn((n * round) << Level::L2.gfn_shift());
                let region = match n % 2 {
                    0 => Tables::small_region(gfn),
                    _ => Tables::private_region(gfn),
                };
                let table = Table {
                    region,
                    ..Table::NONE
                };
                tables.put(table);
                tables.large[n as usize % LARGE] = table;
            }
            tables.clear();
            let small = tables.small.iter().map(Cell::get);
            let left = small
                .chain(tables.large)
                .filter(|table| table.region != u64::MAX);
            assert_eq!(left.count(), 0, "round {round}");
        }
    }
}
