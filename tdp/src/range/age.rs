//! Aging: which pages has the guest used since the last time?
//!
//! Protocol. Where the processor keeps the accessed bit, a leaf is *young* if it is set, and aging clears it, and nothing
//! else (INV: volatile-atomic). Where it does not, a leaf is young unless it is *access-tracked*: aging saves its
//! permissions in software bits and takes them away; the next access faults, and [`repair`](crate::repair) gives them back
//! by one exchange. Young is what this sweep made old, not what it found young: of two sweeps at once one is told of a use,
//! or none if the leaf was taken away or folded meanwhile, so that the histories of all who ask add up. Nothing is flushed:
//! a translation that is still cached hides an access or two, and whoever takes away a permission for good flushes whether
//! or not it found the leaf tracked.

use crate::entry;
use crate::event;
use crate::host::{AddressSpaceId, Host};
use crate::mmu::{Mmu, Shared};
use crate::range::leaves::{LeafStep, Verdict};
use tdp_arch::{Format, GfnRange, Spte};

/// The leaf as it is when nobody has used it; the same if nobody has.
#[inline(always)]
fn aged<F: Format>(spte: Spte) -> Spte {
    if spte.0 & F::AD_SOFTWARE == 0 {
        Spte(spte.0 & !F::ACCESSED)
    } else if F::is_access_tracked(spte) {
        spte
    } else {
        F::access_track(spte)
    }
}

impl<F: Format, H: Host> Shared<F, H> {
    fn sweep_ages(
        &self,
        as_id: AddressSpaceId,
        range: GfnRange,
        mut see: impl FnMut(LeafStep<'_>, Spte) -> Verdict,
    ) {
        event::sweep("age", as_id, range);
        for root in self.roots.of(as_id) {
            let mut visit = self.domain.visit();
            self.sweep_leaves(&mut visit, &root, range, |leaf| {
                let aged = aged::<F>(leaf.spte);
                if aged == leaf.spte {
                    return Verdict::Next;
                }
                see(leaf, aged)
            });
        }
    }
}

impl<F: Format, H: Host> Mmu<F, H> {
    /// Makes every page of a range old and returns whether the guest has used one since it was last made old. A large
    /// leaf is one page. Of two calls at once, one at most is told of a use. Takes no lock and flushes nothing: accesses
    /// through cached translations may go unseen.
    pub fn age(&self, as_id: AddressSpaceId, range: impl Into<GfnRange>) -> bool {
        let mut young = false;
        self.shared.sweep_ages(as_id, range.into(), |leaf, aged| {
            let made_old = entry::amend::<F>(leaf.entry, leaf.level, leaf.spte, aged);
            young |= made_old.is_ok();
            made_old.into()
        });
        young
    }

    /// Whether the guest has used a page of a range since it was last made old. Changes nothing.
    pub fn test_age(&self, as_id: AddressSpaceId, range: impl Into<GfnRange>) -> bool {
        let mut young = false;
        self.shared.sweep_ages(as_id, range.into(), |_, _| {
            young = true;
            Verdict::Stop
        });
        young
    }
}
