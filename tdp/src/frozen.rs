//! The type-state of a hand-off.
//!
//! Protocol. A [`FrozenEntry`] is made by exchanging an entry of a private table for the *frozen* pattern; while it lives,
//! the thread that holds it owns the entry and, through it, that entry of the protected table (INV: frozen-owns). It is
//! ended by publishing a value. If it is dropped instead, on failure or by a panic of the hook, it puts back what
//! undoes it: at first the old value; later, once the protected table has changed, what that holds now
//! ([`FrozenEntry::falls_back_to`]).
//!
//! **Who holds a frozen entry waits for no other frozen entry**, with one exception: the owner of a table's entry may wait
//! for entries of that table. Waits go downwards only, so they end.

use crate::entry::{self, EntryRef};
use crate::event::{self, Site};
use crate::host::AddressSpaceId;
use crate::stats::{Stat, Tally};
use tdp_arch::{Format, Gfn, GfnRange, Level, Spte};

/// Place of an entry in a private tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EntryPlace {
    /// Address space.
    pub as_id: AddressSpaceId,
    /// First guest frame below the entry.
    pub gfn: Gfn,
    /// Level of the entry: 1 maps 4 KiB; the entry of a table whose entries have level 1 has level 2.
    pub level: Level,
}

impl EntryPlace {
    /// The guest frames below the entry.
    pub const fn range(&self) -> GfnRange {
        self.level.range(self.gfn)
    }
}

/// An entry of a private table that the calling thread owns: the proof that a call of
/// [`ProtectedTable`](crate::ProtectedTable) on its place is exclusive. Made by the MMU only.
#[derive(Debug)]
#[must_use = "an entry that is dropped is put back as it was"]
pub struct FrozenEntry<'a> {
    entry: EntryRef<'a>,
    place: EntryPlace,
    old: Spte,
    fallback: Spte,
}

impl<'a> FrozenEntry<'a> {
    /// Freezes the entry at `place` if it holds `old`. `Err` holds the value found instead.
    #[inline(always)]
    pub(crate) fn freeze<F: Format>(
        entry: EntryRef<'a>,
        place: EntryPlace,
        old: Spte,
    ) -> Result<Self, Spte> {
        entry.freeze::<F>(old)?;
        Ok(Self {
            entry,
            place,
            old,
            fallback: old,
        })
    }

    /// Takes over an entry that is frozen already, from whoever froze it. It held `old`.
    pub(crate) const fn adopt(entry: EntryRef<'a>, place: EntryPlace, old: Spte) -> Self {
        Self {
            entry,
            place,
            old,
            fallback: old,
        }
    }

    /// Where it is.
    pub const fn place(&self) -> EntryPlace {
        self.place
    }

    /// What it held before it was frozen.
    pub const fn old(&self) -> Spte {
        self.old
    }

    /// Sets what the entry is to hold if this is dropped: what the protected table holds now.
    pub(crate) fn falls_back_to(&mut self, spte: Spte) {
        self.fallback = spte;
    }

    /// What the entry is to hold if this is dropped.
    pub(crate) const fn fallback(&self) -> Spte {
        self.fallback
    }

    /// Ends the hand-off: the entry holds `new` from now on, and the books say so.
    #[inline(always)]
    pub(crate) fn publish<F: Format>(self, new: Spte, tally: &impl Tally) {
        entry::account::<F>(self.place.level, self.old, new, tally);
        self.entry.thaw(new);
        event::spte_changed::<F>(Site::private(self.place), self.place.level, self.old, new);
        core::mem::forget(self);
    }
}

impl FrozenEntry<'_> {
    /// [`publish`](FrozenEntry::publish) of a leaf where nothing was.
    #[inline(always)]
    pub(crate) fn publish_new<F: Format>(self, leaf: Spte, tally: &impl Tally) {
        tally.add(Stat::pages(self.place.level), 1);
        self.entry.thaw(leaf);
        event::spte_changed::<F>(Site::private(self.place), self.place.level, self.old, leaf);
        core::mem::forget(self);
    }
}

impl Drop for FrozenEntry<'_> {
    fn drop(&mut self) {
        // Old and fallback differ in no more than a software bit, so that the books need no change.
        self.entry.thaw(self.fallback);
    }
}
