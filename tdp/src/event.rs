//! Trace events, with the fields of KVM's tracepoints.
//!
//! Every change of an entry is told of at the choke point (`entry.rs`, and `frozen.rs` for the private half), with the
//! value that was really replaced, and with what follows from it: a table that came or went, a large leaf that was split.
//! The heads of faults and sweeps tell what was asked for. Nothing else emits anything.
//!
//! Without the feature `tracing` nothing of this exists in the program: [`Site`] has no size and every function no body.
//!
//! | name | fields | when |
//! |---|---|---|
//! | `page_fault` | `as_id`, `gpa`, `access`, `prefetch` | a vCPU asks for a fault to be resolved |
//! | `spte_requested` | `as_id`, `gfn`, `level`, `pfn` | the host said what backs a page: the goal |
//! | `spte_changed` | `as_id`, `gfn`, `level`, `old_spte`, `new_spte`, `private` | an entry was changed |
//! | `set_spte` | `as_id`, `gfn`, `level`, `spte`, `table`, `index` | a fault installed or widened a shared leaf |
//! | `get_page` | `as_id`, `gfn`, `level`, `private` | a table was linked, or a root made |
//! | `prepare_zap_page` | `as_id`, `gfn`, `level`, `private`, `invalid` | a table was unlinked, or an obsolete root sealed |
//! | `split_huge_page` | `as_id`, `gfn`, `level`, `huge_spte`, `errno`, `private` | a large leaf was split; `errno` is 0 |
//! | `fast_page_fault` | `as_id`, `gfn`, `level`, `access`, `old_spte`, `new_spte`, `fixed` | a fault gave back what a sweep took |
//! | `mark_mmio` | `as_id`, `gfn`, `access`, `generation` | there is no memory, and it is remembered |
//! | `zap_all_fast` | `roots` | all roots were made obsolete |
//! | `sweep` | `what`, `as_id`, `start`, `end` | a sweep begins |
//!
//! All have the target `tdp` and the level *trace*; addresses, frames and entries are numbers, `gfn` is the first frame
//! below the entry, `level` that of the entry, and of a table that of its entries. The exchange comes first and the event
//! after: events of two threads about one entry may be told in another order than the one in which they happened. Not told:
//! the leaves of a table that a large leaf was split into, or that a private one was folded from, which follow from the
//! large leaf; accessed and dirty bits that the processor sets; and what a hand-off that failed has put back.

#![cfg_attr(
    not(feature = "tracing"),
    allow(unused_variables, reason = "nobody looks at them")
)]

use crate::frozen::EntryPlace;
use crate::host::AddressSpaceId;
use crate::table::TableMeta;
use tdp_arch::{Access, Format, Gfn, GfnRange, Gpa, Level, Pfn, Spte};

/// Tells of an event.
macro_rules! emit {
    ($name:literal, $($fields:tt)+) => {
        #[cfg(feature = "tracing")]
        tracing::event!(name: $name, target: "tdp", tracing::Level::TRACE, $($fields)+)
    };
}

/// Where an entry is: part of every reference to one. Without the feature it has no size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Site {
    #[cfg(feature = "tracing")]
    as_id: AddressSpaceId,
    /// A frame below the entry.
    #[cfg(feature = "tracing")]
    gfn: Gfn,
    /// The table that holds it.
    #[cfg(feature = "tracing")]
    table: Pfn,
    #[cfg(feature = "tracing")]
    private: bool,
}

#[cfg(not(feature = "tracing"))]
const _: () = assert!(size_of::<Site>() == 0);

#[cfg_attr(
    not(feature = "tracing"),
    allow(
        clippy::needless_update,
        reason = "without the feature there are no fields"
    )
)]
impl Site {
    /// Of an entry that nobody has said of where it is.
    pub(crate) const UNKNOWN: Self = Self::new(AddressSpaceId(u8::MAX), Gfn(u64::MAX), Pfn(0));

    /// Of the entry of `gfn` in a table of the shared half.
    #[inline(always)]
    pub(crate) const fn new(as_id: AddressSpaceId, gfn: Gfn, table: Pfn) -> Self {
        Self {
            #[cfg(feature = "tracing")]
            as_id,
            #[cfg(feature = "tracing")]
            gfn,
            #[cfg(feature = "tracing")]
            table,
            #[cfg(feature = "tracing")]
            private: false,
        }
    }

    /// Of the entry of `gfn` in the same table.
    #[inline(always)]
    pub(crate) const fn of(self, gfn: Gfn) -> Self {
        Self {
            #[cfg(feature = "tracing")]
            gfn,
            ..self
        }
    }

    /// Of an entry of the table that this entry, one of `level`, leads to.
    #[inline(always)]
    pub(crate) fn below(self, level: Level, table: Pfn, index: usize) -> Self {
        #[cfg(feature = "tracing")]
        return Self {
            gfn: Gfn(level.align_down(self.gfn).0 + index as u64 * level.below_or_leaf().pages()),
            table,
            ..self
        };
        #[cfg(not(feature = "tracing"))]
        self
    }

    /// Of an entry of the private half.
    #[inline(always)]
    pub(crate) const fn private(place: EntryPlace) -> Self {
        Self {
            #[cfg(feature = "tracing")]
            private: true,
            ..Self::new(place.as_id, place.gfn, Pfn(0))
        }
    }
}

/// Where the entries of an unlinked table were.
#[derive(Clone, Copy)]
pub(crate) struct Unlinked {
    #[cfg(feature = "tracing")]
    table: Pfn,
    #[cfg(feature = "tracing")]
    place: Option<crate::table::Place>,
    /// First frame past all that slots can have, a power of two: no bit above it is part of a frame's number.
    #[cfg(feature = "tracing")]
    limit: Gfn,
}

impl Unlinked {
    /// Asked before the metadata forget where the table stood.
    #[inline(always)]
    pub(crate) fn of(meta: &TableMeta, table: Pfn, limit: Gfn) -> Self {
        Self {
            #[cfg(feature = "tracing")]
            table,
            #[cfg(feature = "tracing")]
            place: meta.place(table),
            #[cfg(feature = "tracing")]
            limit,
        }
    }

    /// Of one of its entries.
    #[inline(always)]
    pub(crate) fn entry(self, index: usize) -> Site {
        #[cfg(feature = "tracing")]
        return self.place.map_or(Site::UNKNOWN, |place| Site {
            private: place.private,
            ..Site::new(
                place.as_id,
                Gfn((place.gfn.0 + index as u64 * place.level.pages()) & (self.limit.0 - 1)),
                self.table,
            )
        });
        #[cfg(not(feature = "tracing"))]
        Site::UNKNOWN
    }

    /// Tells that it was a root.
    #[inline(always)]
    pub(crate) fn was_root(self) {
        #[cfg(feature = "tracing")]
        if let Some(place) = self.place {
            emit!(
                "prepare_zap_page",
                as_id = place.as_id.0,
                gfn = place.gfn.0,
                level = place.level.number(),
                private = place.private,
                invalid = true
            );
        }
    }
}

/// The entry at `site` held `old` and holds `new`.
#[inline(always)]
pub(crate) fn spte_changed<F: Format>(site: Site, level: Level, old: Spte, new: Spte) {
    #[cfg(feature = "tracing")]
    if tracing::enabled!(target: "tdp", tracing::Level::TRACE) {
        changed::<F>(site, level, old, new);
    }
}

#[cfg(feature = "tracing")]
#[cold]
fn changed<F: Format>(site: Site, level: Level, old: Spte, new: Spte) {
    let Site {
        as_id: AddressSpaceId(as_id),
        private,
        ..
    } = site;
    let gfn = level.align_down(site.gfn).0;
    let table = |spte: Spte| {
        let is_table = F::is_mmu_present(spte) && !F::is_leaf(spte, level);
        level
            .below()
            .filter(|_| is_table)
            .map(|below| (F::pfn(spte), below.number()))
    };
    let (before, after) = (table(old), table(new));
    if let (Some((_, level)), true) = (after, before != after) {
        emit!("get_page", as_id, gfn, level, private);
    }
    emit!(
        "spte_changed",
        as_id,
        gfn,
        level = level.number(),
        old_spte = old.0,
        new_spte = new.0,
        private
    );
    if let (Some((_, level)), true) = (before, before != after) {
        emit!(
            "prepare_zap_page",
            as_id,
            gfn,
            level,
            private,
            invalid = false
        );
    }
    if after.is_some() && F::is_leaf(old, level) {
        emit!(
            "split_huge_page",
            as_id,
            gfn,
            level = level.number(),
            huge_spte = old.0,
            errno = 0,
            private
        );
    }
}

/// A root was made.
#[inline(always)]
pub(crate) fn root_made(as_id: AddressSpaceId, level: Level, private: bool) {
    emit!(
        "get_page",
        as_id = as_id.0,
        gfn = 0u64,
        level = level.number(),
        private
    );
}

/// A vCPU asks for a fault to be resolved.
#[inline(always)]
pub(crate) fn page_fault(as_id: AddressSpaceId, gpa: Gpa, access: Access, prefetch: bool) {
    emit!(
        "page_fault",
        as_id = as_id.0,
        gpa = gpa.0,
        access = name(access),
        prefetch
    );
}

/// The host said what backs a page; a leaf of `level` is what is wanted.
#[inline(always)]
pub(crate) fn spte_requested(as_id: AddressSpaceId, gfn: Gfn, level: Level, pfn: Pfn) {
    emit!(
        "spte_requested",
        as_id = as_id.0,
        gfn = gfn.0,
        level = level.number(),
        pfn = pfn.0
    );
}

/// A fault made the entry at `site` what it is.
#[inline(always)]
pub(crate) fn set_spte(site: Site, level: Level, spte: Spte) {
    emit!(
        "set_spte",
        as_id = site.as_id.0,
        gfn = level.align_down(site.gfn).0,
        level = level.number(),
        spte = spte.0,
        table = site.table.0,
        index = level.index(site.gfn)
    );
}

/// A fault tried to give back what a sweep took from a leaf.
#[inline(always)]
pub(crate) fn fast_page_fault(
    site: Site,
    level: Level,
    access: Access,
    old: Spte,
    new: Spte,
    fixed: bool,
) {
    emit!(
        "fast_page_fault",
        as_id = site.as_id.0,
        gfn = site.gfn.0,
        level = level.number(),
        access = name(access),
        old_spte = old.0,
        new_spte = new.0,
        fixed
    );
}

/// There is no memory at `gfn`, and an entry of `generation` remembers it.
#[inline(always)]
pub(crate) fn mark_mmio(as_id: AddressSpaceId, gfn: Gfn, access: Access, generation: u64) {
    emit!(
        "mark_mmio",
        as_id = as_id.0,
        gfn = gfn.0,
        access = name(access),
        generation
    );
}

/// All roots were made obsolete.
#[inline(always)]
pub(crate) fn zap_all_fast(roots: usize) {
    emit!("zap_all_fast", roots);
}

/// A sweep begins.
#[inline(always)]
pub(crate) fn sweep(what: &'static str, as_id: AddressSpaceId, range: GfnRange) {
    emit!(
        "sweep",
        what,
        as_id = as_id.0,
        start = range.start.0,
        end = range.end.0
    );
}

#[cfg(feature = "tracing")]
const fn name(access: Access) -> &'static str {
    match access {
        Access::Read => "read",
        Access::Write => "write",
        Access::Execute => "execute",
        Access::UserExecute => "user_execute",
    }
}
