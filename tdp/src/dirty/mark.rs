//! Marking: the vCPU's side of the dirty log.
//!
//! The protocol is told in [`dirty`](crate::dirty).

use crate::dirty::{DirtyPage, DirtyRing};
use crate::host::Host;
use crate::slots::Slot;
use crate::vcpu::{Context, Vcpu, VcpuCore};
use alloc::sync::Arc;
use tdp_arch::{Access, Format, Gfn, Gpa};
use tdp_rcu::Section;

impl<F: Format, H: Host> Context<F, H> {
    /// Whether a fault on a logged slot has to wait for room in the ring.
    #[inline]
    pub(crate) fn ring_is_full(&self, slot: &Slot<H::Backing>) -> bool {
        slot.bitmap().is_some() && self.ring.as_ref().is_some_and(|ring| ring.is_full())
    }

    /// Whether a leaf that `access` installs into a slot waits for the processor to say that it was written.
    pub(crate) fn installs_clean(&self, slot: &Slot<H::Backing>, access: Access) -> bool {
        slot.bitmap().is_some() && !access.is_write() && self.shared.tracks_by_bit(&self.root)
    }

    /// Marks a frame of `slot` whose leaf has become writable.
    #[inline]
    pub(crate) fn log_write(&self, slot: &Slot<H::Backing>, gfn: Gfn) {
        let Some(bitmap) = slot.bitmap() else {
            return;
        };
        let page = DirtyPage {
            as_id: slot.as_id(),
            slot: slot.id(),
            offset: slot.offset(gfn),
        };
        let pushed = self.ring.as_ref().is_some_and(|ring| ring.push(page));
        if !pushed {
            bitmap.mark(page.offset, 1);
        }
    }
}

impl<F: Format, H: Host> VcpuCore<F, H> {
    fn log_modified(&mut self, section: &Section<'_>, pages: &[Gpa]) {
        let snapshot = self.ctx.shared.slots.snapshot(section);
        let bits = self.ctx.root.gfn_bits;
        for page in pages {
            let gfn = Gfn(page.gfn().0 & !bits);
            if let Some(slot) = self.find_slot(snapshot, gfn) {
                self.ctx.log_write(slot, gfn);
            }
        }
    }
}

impl<F: Format, H: Host> Vcpu<F, H> {
    /// Marks the pages that the processor has logged for this vCPU
    /// ([`DirtyTracking::ModificationLog`](crate::DirtyTracking::ModificationLog)). To be called at every exit, and for every
    /// vCPU before a log is collected. Pages of slots that are not logged are passed over.
    pub fn log_modified(&mut self, pages: &[Gpa]) {
        let section = self.reader.enter();
        self.core.log_modified(&section, pages);
    }

    /// Its dirty ring, if the MMU has rings.
    pub fn dirty_ring(&self) -> Option<&Arc<DirtyRing>> {
        self.core.ctx.ring.as_ref()
    }
}
