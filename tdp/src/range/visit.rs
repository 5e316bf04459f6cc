//! Looking at what is mapped, on a live MMU.

use crate::host::{AddressSpaceId, Host};
use crate::iter::TdpIter;
use crate::mmu::Shared;
use crate::root::Half;
use tdp_arch::{Decoded, Format, Gfn, GfnRange, Level, Perms, Pfn, Spte};

/// A mapped block of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// First guest frame.
    pub gfn: Gfn,
    /// Level: how many frames.
    pub level: Level,
    /// First host frame.
    pub pfn: Pfn,
    /// What the guest may do; for an access-tracked leaf nothing.
    pub perms: Perms,
    /// The entry.
    pub spte: Spte,
}

/// An entry of a tree that vCPUs use: a table, a leaf or what stands for device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First guest frame below it.
    pub gfn: Gfn,
    /// Its level.
    pub level: Level,
    /// The entry.
    pub spte: Spte,
    /// The entry, told apart.
    pub decoded: Decoded,
}

impl<F: Format, H: Host> Shared<F, H> {
    /// Calls `see` for every entry of the current shared root of an address space that says something and covers a
    /// frame of `range`, in order, tables before what they hold.
    pub(crate) fn visit_entries(
        &self,
        as_id: AddressSpaceId,
        range: GfnRange,
        mut see: impl FnMut(Entry),
    ) {
        let Some(root) = self.roots.current(as_id) else {
            return;
        };
        let mut visit = self.domain.visit();
        let mut iter = TdpIter::<F, H>::new(&mut visit, &self.host, &root, range, Level::L1);
        while let Some(step) = iter.next() {
            let decoded = F::decode(step.spte, step.level);
            if !matches!(decoded, Decoded::Empty | Decoded::Sealed) {
                see(Entry {
                    gfn: step.gfn,
                    level: step.level,
                    spte: step.spte,
                    decoded,
                });
            }
        }
    }

    /// Calls `see` for every leaf of a half of an address space, in its current root, whose frames meet `range`, in order.
    pub(crate) fn visit_leaves(
        &self,
        as_id: AddressSpaceId,
        half: Half,
        range: GfnRange,
        mut see: impl FnMut(Leaf),
    ) {
        let root = match half {
            Half::Shared => self.roots.current(as_id),
            Half::Private => self.roots.private(as_id),
        };
        let Some(root) = root else {
            return;
        };
        let mut visit = self.domain.visit();
        let mut iter = TdpIter::<F, H>::new(&mut visit, &self.host, &root, range, Level::L1);
        while let Some(step) = iter.next() {
            let spte = self.stands_for(&step, &root);
            if F::is_leaf(spte, step.level) {
                see(Leaf {
                    gfn: step.gfn,
                    level: step.level,
                    pfn: F::leaf_pfn(spte, step.level),
                    perms: F::perms(spte),
                    spte,
                });
            }
        }
    }
}
