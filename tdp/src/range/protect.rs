//! Write protection of a range, and of a single frame for good.
//!
//! Protocol. Protecting a *range* clears the writable bit of its leaves and leaves them MMU-writable: the next write
//! faults, and [`repair`](crate::repair) sets the bit again without asking anyone. Protecting a *frame* clears the
//! MMU-writable bit as well, so that the next write goes all the way to the host's look-up, whose word then holds.
//!
//! A leaf whose writable bit is clear may still be cached as writable: another sweep has cleared it and not flushed, or
//! aging took it away, which never flushes. Hence a frame is flushed if it was MMU-writable at all, a range if a leaf was
//! writable or is an access-tracked one that may have been, and both if another sweep has yet to flush.

use crate::entry;
use crate::event;
use crate::host::{AddressSpaceId, Host};
use crate::mmu::{Mmu, Shared};
use crate::range::leaves::Verdict;
use crate::tlb::PendingFlush;
use tdp_arch::{Format, Gfn, GfnRange, Level, Spte};

/// Whether a processor may have this leaf cached as writable.
#[inline(always)]
pub(crate) fn may_be_cached_writable<F: Format>(spte: Spte) -> bool {
    spte.0 & F::WRITABLE != 0 || (spte.0 & F::MMU_WRITABLE != 0 && F::is_access_tracked(spte))
}

impl<F: Format, H: Host> Shared<F, H> {
    /// Clears `bits`, which include the writable bit, in leaves of at least `min_level`; `stale` says which leaves need
    /// a flush.
    fn protect(
        &self,
        as_id: AddressSpaceId,
        range: GfnRange,
        min_level: Level,
        bits: u64,
        stale: impl Fn(Spte) -> bool,
    ) -> PendingFlush<'_, F, H> {
        event::sweep("write_protect", as_id, range);
        let mut pending = PendingFlush::new(self);
        for root in self.roots.of(as_id) {
            let mut visit = self.domain.visit();
            self.sweep_leaves(&mut visit, &root, range, |leaf| {
                if leaf.level < min_level || !stale(leaf.spte) {
                    return Verdict::Next;
                }
                let protected = Spte(leaf.spte.0 & !bits);
                if protected != leaf.spte
                    && let Err(actual) =
                        entry::amend::<F>(leaf.entry, leaf.level, leaf.spte, protected)
                {
                    return Verdict::Again(actual);
                }
                pending.count_leaf();
                pending.note(as_id, leaf.range(), false);
                Verdict::Next
            });
        }
        pending.settle(as_id, range);
        pending
    }
}

impl<F: Format, H: Host> Mmu<F, H> {
    /// Takes write permission from every leaf of a range, of at least `min_level`, until the guest writes again. Writes
    /// that pass through cached translations end with the flush.
    pub fn write_protect(
        &self,
        as_id: AddressSpaceId,
        range: impl Into<GfnRange>,
        min_level: Level,
    ) -> PendingFlush<'_, F, H> {
        self.shared.protect(
            as_id,
            range.into(),
            min_level,
            F::WRITABLE,
            may_be_cached_writable::<F>,
        )
    }

    /// Takes write permission from the leaf of one frame until the host's look-up gives it again. A large leaf loses it
    /// as a whole.
    pub fn write_protect_gfn(&self, as_id: AddressSpaceId, gfn: Gfn) -> PendingFlush<'_, F, H> {
        let end = gfn.checked_add(1).unwrap_or(gfn);
        self.shared.protect(
            as_id,
            GfnRange { start: gfn, end },
            Level::L1,
            F::WRITABLE | F::MMU_WRITABLE,
            |spte| spte.0 & F::MMU_WRITABLE != 0,
        )
    }
}
