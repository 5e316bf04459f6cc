//! Obsolete roots: making all vCPUs leave them, and taking down what they map.
//!
//! Protocol. *Begin* makes every root obsolete: a few stores, whatever they map. From then on no new fault installs below
//! them; a fault that began before may, and a vCPU that is in the guest goes on there.
//!
//! *Reload* asks the host to make every vCPU leave and to let none in again under an obsolete root
//! ([`Host::reload_roots`]). Where it promises that, nothing that an obsolete root maps can be reached any more, long
//! before it is taken down: translations cached under the root are flushed by each vCPU when it loads another, so that the
//! teardown need not flush. Where it does not, whoever relies on it zaps what matters, in every root, and flushes.
//!
//! *Teardown* may take as long as it likes: faults run below the new roots, and whoever still walks an old one meets
//! sealed entries (INV: unlink-seals). It goes by pieces of what one entry of level 3 covers, so that no table waits
//! longer than it must (INV: bounded-garbage); at last the root itself is sealed, which also harvests what late faults
//! put there. The root stays on the list of dying roots until then: a sweep of the host finds what is left.

use crate::event;
use crate::host::Host;
use crate::iter::TdpIter;
use crate::mmu::Shared;
use crate::range_zap::ZapScope;
use crate::root::{AllRoots, Root};
use crate::stats::{Stat, Tally};
use crate::tlb::PendingFlush;
use alloc::sync::Arc;
use tdp_arch::{Format, Gfn, GfnRange, Level};

/// How removing or moving a memory slot takes away what it maps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SlotRemoval {
    /// Zaps the slot's leaves, in every root, and flushes: time by what the slot maps; other slots keep what they map.
    #[default]
    Zap,
    /// Makes all roots obsolete and all vCPUs load new ones ([`Host::reload_roots`]): constant time but for the wait for
    /// vCPUs to leave the guest; every slot is mapped anew by faults. If the host cannot promise the reload the slot is
    /// zapped as well. What is private is removed by range in any case.
    InvalidateRoots,
}

/// Obsolete roots to be taken down. Dropping it does that.
#[must_use = "obsolete roots keep their tables until they are taken down"]
pub struct RootTeardown<F: Format, H: Host> {
    shared: Arc<Shared<F, H>>,
    /// The one being taken down is the last that is there.
    roots: AllRoots<H>,
    /// Where the last one's first piece that may map something begins.
    next: Gfn,
    /// No vCPU runs on any of them, or ever will.
    left_by_all: bool,
}

impl<F: Format, H: Host> RootTeardown<F, H> {
    /// Makes all roots obsolete.
    pub(crate) fn begin(shared: &Arc<Shared<F, H>>) -> Self {
        let mut begun = Self::nothing(shared);
        begun.roots = shared.roots.invalidate();
        shared.domain.move_stamps();
        event::zap_all_fast(begun.count());
        let count = begun.count() as i64;
        shared.shards.sweeps.add(Stat::RootsInvalidated, count);
        begun
    }

    /// Nothing to be taken down.
    pub(crate) fn nothing(shared: &Arc<Shared<F, H>>) -> Self {
        Self {
            shared: shared.clone(),
            roots: [const { None }; _],
            next: Gfn(0),
            left_by_all: false,
        }
    }

    fn count(&self) -> usize {
        self.roots.iter().flatten().count()
    }

    /// Has the host make every vCPU leave them.
    pub(crate) fn and_reload(mut self) -> Self {
        self.left_by_all = self.shared.host.reload_roots();
        self
    }

    /// Whether no vCPU can reach what any obsolete root maps.
    pub(crate) fn is_left_by_all(&self) -> bool {
        self.left_by_all
    }

    /// Makes every vCPU leave the obsolete roots ([`Host::reload_roots`]) and returns whether the host promised that. If so,
    /// no vCPU can reach anything that they map, and taking them down flushes nothing.
    pub fn reload(&mut self) -> bool {
        self.left_by_all = self.shared.host.reload_roots();
        self.left_by_all
    }

    /// Takes one piece down, of what one entry of level 3 covers at most, and returns whether there is more.
    pub fn step(&mut self) -> bool {
        let shared = self.shared.clone();
        let pending = PendingFlush::new(&shared);
        self.take_piece(&shared, pending, |pending| {
            pending.flush();
        });
        self.count() > 0
    }

    /// Takes the trees down: seals every entry, flushes unless no vCPU can be affected, retires the tables.
    pub fn finish(self) {}

    /// Takes the next piece down. What is to be flushed goes to `or_else`, unless it is flushed here: with the root itself,
    /// or because that means to do nothing.
    fn take_piece<'s>(
        &mut self,
        shared: &'s Shared<F, H>,
        mut pending: PendingFlush<'s, F, H>,
        or_else: impl FnOnce(PendingFlush<'s, F, H>),
    ) {
        let Some(place) = self.roots.iter_mut().rfind(|it| it.is_some()) else {
            return;
        };
        let Some(root) = place else {
            return;
        };
        let piece = next_piece(shared, root, self.next);
        match piece {
            Some(piece) => shared.zap_in_root(root, piece, ZapScope::Tables, &mut pending),
            None => shared.seal_root(root, &mut pending),
        }
        if self.left_by_all {
            pending.is_below_no_vcpu();
        }
        match piece {
            Some(piece) => {
                self.next = piece.end;
                if self.left_by_all {
                    pending.flush();
                } else {
                    or_else(pending);
                }
            }
            None => {
                pending.flush();
                shared.roots.buried(root);
                self.next = Gfn(0);
                *place = None;
            }
        }
    }
}

/// What the next entry of level 3 covers that has something below it.
fn next_piece<F: Format, H: Host>(
    shared: &Shared<F, H>,
    root: &Root<H>,
    from: Gfn,
) -> Option<GfnRange> {
    let least = Level::L3;
    if root.level <= least {
        // All of it is no more than a piece.
        return None;
    }
    let rest = GfnRange {
        start: from,
        end: root.limit(),
    };
    let mut visit = shared.domain.visit();
    let mut iter = TdpIter::<F, H>::new(&mut visit, &shared.host, root, rest, least);
    while let Some(step) = iter.next() {
        if step.level == least && F::is_mmu_present(step.spte) {
            return Some(step.range());
        }
    }
    None
}

impl<F: Format, H: Host> Drop for RootTeardown<F, H> {
    fn drop(&mut self) {
        let shared = self.shared.clone();
        // One flush for each root.
        let mut held = None;
        while self.count() > 0 {
            let pending = held.take().unwrap_or_else(|| PendingFlush::new(&shared));
            self.take_piece(&shared, pending, |pending| held = Some(pending));
        }
    }
}

impl<F: Format, H: Host> core::fmt::Debug for RootTeardown<F, H> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("RootTeardown")
            .field("roots", &self.count())
            .field("left_by_all", &self.left_by_all)
            .finish()
    }
}
