//! The one choke point where an SPTE changes.
//!
//! Protocol. A table page is 512 atomic entries. Other modules hold an [`EntryRef`] and can only
//!
//! * load it (Acquire: pairs with the Release half of the exchange that published a child table, so that whoever sees
//!   the pointer sees every entry of the child initialised; INV: publish-complete);
//! * exchange one value for another ([`exchange`], [`install_leaf`]): compare-exchange, then bookkeeping with the value
//!   that was really replaced (INV: volatile-atomic, one-choke-point);
//! * change bits of a leaf in place ([`amend`]): the same compare-exchange, without the books;
//! * seal it ([`EntryRef::seal`]): only for entries of a table that is no longer linked (INV: unlink-seals);
//! * in a private table, freeze it ([`EntryRef::freeze`]), which makes the caller its owner, and end that by a store
//!   ([`EntryRef::thaw`]). A frozen entry is not live: no processor and no other thread changes it (INV: frozen-owns).
//!
//! Single bits, too, are changed by compare-exchange and not by an atomic *and*: that would hit whatever the entry has
//! become since it was read, a frozen or sealed pattern, a table or an MMIO generation, in all of which the same bits mean
//! something else.
//!
//! Each change is told of (`event.rs`): a reference to an entry says where it is, which costs nothing where nobody listens.
//!
//! Nothing here ever stores to a live entry without comparing: the processor may set accessed and dirty bits between
//! any two instructions.

use crate::event::{self, Site};
use crate::nx;
use crate::stats::{Stat, Tally};
use tdp_arch::{Format, Level, Spte};
use tdp_rcu::sync::{Atomic, Backoff, Ordering, fill_unshared, prefetch_for_exchange};

/// Entries of a table page. A model checker gets a handful, so that it can explore sealing.
pub(crate) const TABLE_ENTRIES: usize = if cfg!(loom) {
    2
} else {
    tdp_arch::ENTRIES_PER_TABLE
};

/// One page of entries, as the processor walks it: 512 words of 8 bytes, 4 KiB in all, aligned to 4 KiB.
///
/// Its content can be changed by this library only, and only one entry at a time.
#[repr(C, align(4096))]
pub struct TablePage {
    entries: [Atomic<Spte>; TABLE_ENTRIES],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<TablePage>() == 4096 && align_of::<TablePage>() == 4096);

impl TablePage {
    /// A page whose entries are all zero, for frame sources that make pages instead of mapping them.
    pub fn zeroed() -> Self {
        Self {
            entries: core::array::from_fn(|_| Atomic::new(Spte(0))),
        }
    }

    /// The entry at `index`, or `None` if there is none.
    #[inline(always)]
    pub(crate) fn get(&self, index: usize) -> Option<EntryRef<'_>> {
        let entry = self.entries.get(index)?;
        Some(EntryRef(entry, Site::UNKNOWN))
    }

    /// Empties a page that no one else can reach yet: the caller owns its frame.
    #[inline(always)]
    pub(crate) fn empty<F: Format>(&self) {
        self.fill_with(|_| F::EMPTY);
    }

    /// Fills such a page with `first`, and what comes of it by adding `step` once for each entry before.
    #[inline(always)]
    pub(crate) fn fill(&self, first: Spte, step: u64) {
        // A running sum and no multiple: the compiler makes wide stores of it.
        let mut sum = first.0;
        self.fill_with(|_| {
            let value = Spte(sum);
            sum = sum.wrapping_add(step);
            value
        });
    }

    #[allow(unsafe_code)]
    #[inline(always)]
    fn fill_with(&self, value: impl FnMut(usize) -> Spte) {
        // UNSAFETY: plain stores to atomics, half as long as atomic ones.
        // SAFETY: nobody else has the frame: no entry leads to it before the exchange that links it, which publishes all of it
        // (INV: publish-complete), and who was led to it before is past a grace period (INV: flush-before-reuse).
        unsafe { fill_unshared(&self.entries, value) };
    }

    /// What the processor's page walker does to an entry: one atomic exchange of the whole word. For software that
    /// plays the processor; `Err` holds the present value.
    #[cfg(feature = "std")]
    pub(crate) fn exchange_as_processor(
        &self,
        index: usize,
        current: u64,
        new: u64,
    ) -> Result<(), u64> {
        let entry = self.entries.get(index).ok_or(0u64)?;
        entry
            .compare_exchange(
                Spte(current),
                Spte(new),
                Ordering::AcqRel,
                Ordering::Acquire,
            )
            .map(drop)
            .map_err(|actual| actual.0)
    }
}

/// One entry of a table page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EntryRef<'a>(&'a Atomic<Spte>, Site);

impl EntryRef<'_> {
    /// The same entry, with word of where it is.
    #[inline(always)]
    pub(crate) fn at(self, site: Site) -> Self {
        Self(self.0, site)
    }

    /// Where it is.
    #[inline(always)]
    pub(crate) fn site(self) -> Site {
        self.1
    }

    /// Has the processor fetch the entry, which is to be exchanged.
    #[inline(always)]
    pub(crate) fn fetch(self) {
        prefetch_for_exchange(self.0);
    }

    /// The entry now.
    #[inline(always)]
    pub(crate) fn load(self) -> Spte {
        self.0.load(Ordering::Acquire)
    }

    /// Exchanges `old` for the *frozen* pattern, which makes the caller the entry's owner. `Err` holds the value found.
    #[inline(always)]
    pub(crate) fn freeze<F: Format>(self, old: Spte) -> Result<(), Spte> {
        debug_assert!(
            old != F::SEALED && old != F::FROZEN,
            "never taken from another owner"
        );
        // Acquire: pairs with the Release of `thaw`, so that what the last owner did to the protected table came before.
        self.0
            .compare_exchange(old, F::FROZEN, Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
    }

    /// Ends the ownership of a frozen entry: stores what it is to hold from now on.
    #[inline(always)]
    pub(crate) fn thaw(self, new: Spte) {
        // INV: frozen-owns: nobody else writes a frozen entry, so a store loses nothing. Release: pairs with the Acquire
        // load of whoever finds `new` and goes on below it, or freezes it next (INV: publish-complete).
        self.0.store(new, Ordering::Release);
    }

    /// Exchanges `old` for the *sealed* pattern, in a table whose own entry is frozen by the caller.
    #[inline(always)]
    pub(crate) fn seal_if<F: Format>(self, old: Spte) -> Result<(), Spte> {
        self.0
            .compare_exchange(old, F::SEALED, Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
    }

    /// The entry, once no one owns it: waits while it is frozen.
    #[inline(always)]
    pub(crate) fn load_thawed<F: Format>(self) -> Spte {
        let spte = self.load();
        if spte == F::FROZEN {
            return self.thawed::<F>();
        }
        spte
    }

    #[cold]
    fn thawed<F: Format>(self) -> Spte {
        let backoff = Backoff::new();
        loop {
            let spte = self.load();
            if spte != F::FROZEN {
                return spte;
            }
            backoff.snooze();
        }
    }

    /// Puts the *sealed* pattern into an entry of an unlinked table of `level` and returns what it replaced, hardware's last
    /// accessed and dirty bits included; the caller keeps the books. Waits while the entry is frozen: its owner is about to
    /// store to it.
    #[inline(always)]
    pub(crate) fn seal<F: Format>(self, level: Level) -> Spte {
        // INV: unlink-seals, volatile-atomic.
        let mut old = self.load_thawed::<F>();
        loop {
            if old == F::FROZEN {
                old = self.thawed::<F>();
                continue;
            }
            // AcqRel: Acquire pairs with the Release of a link, so that the children of a table found here can be
            // sealed; Release orders the unlink before the seal for a walker that meets the seal and starts again.
            match self
                .0
                .compare_exchange(old, F::SEALED, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(replaced) => {
                    event::spte_changed::<F>(self.site(), level, replaced, F::SEALED);
                    return replaced;
                }
                Err(actual) => old = actual,
            }
        }
    }
}

/// Exchanges `old` for `new` in an entry of `level` and keeps the books. `Err` holds the value found instead.
#[inline]
pub(crate) fn exchange<F: Format>(
    entry: EntryRef<'_>,
    level: Level,
    old: Spte,
    new: Spte,
    tally: &impl Tally,
) -> Result<(), Spte> {
    debug_assert!(
        old != F::SEALED && old != F::FROZEN,
        "never exchanged by someone who does not own it"
    );
    debug_assert!(is_writable_rightly::<F>(new, level), "{new:?}");
    // AcqRel: Release publishes a child table that `new` may point to; Acquire pairs with it where `old` pointed to one.
    entry
        .0
        .compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)?;
    account::<F>(level, old, new, tally);
    nx::account::<F>(level, old, new, tally);
    event::spte_changed::<F>(entry.site(), level, old, new);
    Ok(())
}

/// [`exchange`] of the empty pattern for a leaf: the fast path of a fault.
#[inline(always)]
pub(crate) fn install_leaf<F: Format>(
    entry: EntryRef<'_>,
    level: Level,
    new: Spte,
    tally: &impl Tally,
) -> Result<(), Spte> {
    debug_assert!(is_writable_rightly::<F>(new, level), "{new:?}");
    entry
        .0
        .compare_exchange(F::EMPTY, new, Ordering::AcqRel, Ordering::Acquire)?;
    tally.add(Stat::pages(level), 1);
    event::spte_changed::<F>(entry.site(), level, F::EMPTY, new);
    Ok(())
}

/// Exchanges `old`, a leaf of level 1 or an MMIO entry, for the empty pattern. The caller books the leaf. `Err` holds the
/// value found instead.
#[inline(always)]
pub(crate) fn take_small<F: Format>(entry: EntryRef<'_>, old: Spte) -> Result<(), Spte> {
    debug_assert!(
        F::is_leaf(old, Level::L1) || F::mmio_entry(old).is_some(),
        "{old:?} is nothing to take away"
    );
    // INV: volatile-atomic. Ordered as in `exchange`.
    entry
        .0
        .compare_exchange(old, F::EMPTY, Ordering::AcqRel, Ordering::Acquire)?;
    event::spte_changed::<F>(entry.site(), Level::L1, old, F::EMPTY);
    Ok(())
}

/// Exchanges `old`, a leaf of `level`, for `new`, the same leaf with other permissions, accessed or dirty bits. `Err`
/// holds the value found instead.
#[inline(always)]
pub(crate) fn amend<F: Format>(
    entry: EntryRef<'_>,
    level: Level,
    old: Spte,
    new: Spte,
) -> Result<(), Spte> {
    debug_assert!(
        F::is_leaf(old, level) && F::is_leaf(new, level) && F::pfn(old) == F::pfn(new),
        "{old:?} is not the leaf {new:?}"
    );
    debug_assert!(is_writable_rightly::<F>(new, level), "{new:?}");
    // INV: volatile-atomic. AcqRel: what follows from the change (a mark in a log, a flush) comes after it, and what the
    // last one to change the entry did before is seen by this one.
    entry
        .0
        .compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)?;
    event::spte_changed::<F>(entry.site(), level, old, new);
    Ok(())
}

/// Whether a leaf is one of the four that may be: not writable for the host; writable for the host only; for the MMU
/// as well; for the guest as well.
fn is_writable_rightly<F: Format>(spte: Spte, level: Level) -> bool {
    let bits = F::HOST_WRITABLE | F::MMU_WRITABLE | F::WRITABLE;
    !F::is_leaf(spte, level)
        || [
            0,
            F::HOST_WRITABLE,
            F::HOST_WRITABLE | F::MMU_WRITABLE,
            bits,
        ]
        .contains(&(spte.0 & bits))
}

/// Books a change that has happened.
pub(crate) fn account<F: Format>(level: Level, old: Spte, new: Spte, tally: &impl Tally) {
    let kind = |spte: Spte| {
        if !F::is_mmu_present(spte) {
            None
        } else if F::is_leaf(spte, level) {
            Some(Stat::pages(level))
        } else {
            Some(Stat::Tables)
        }
    };
    let (before, after) = (kind(old), kind(new));
    if before != after {
        if let Some(stat) = before {
            tally.add(stat, -1);
        }
        if let Some(stat) = after {
            tally.add(stat, 1);
        }
    }
}
