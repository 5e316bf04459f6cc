//! The dirty log of a slot as the bitmap of a `vm-memory` region, so that the writes of devices and of the VMM itself are
//! logged beside the guest's.
//!
//! A region keeps its bitmap for as long as it lives, a slot's log comes and goes: the slot is looked up at each mark, and
//! marks while it is not logged go nowhere, as the guest's do.

use crate::dirty::DirtyBitmap;
use crate::host::{AddressSpaceId, Host};
use crate::mmu::Mmu;
use crate::slots::SlotId;
use alloc::sync::Arc;
use core::fmt;
use tdp_arch::{Format, PAGE_SIZE};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

/// Marks of one slot, by bytes from its start.
pub struct SlotBitmap<F: Format, H: Host> {
    mmu: Mmu<F, H>,
    as_id: AddressSpaceId,
    slot: SlotId,
    /// Bytes from the slot's start to where this begins.
    start: usize,
}

impl<F: Format, H: Host> SlotBitmap<F, H> {
    /// For the region that backs slot `slot` from its first byte on.
    pub fn new(mmu: &Mmu<F, H>, as_id: AddressSpaceId, slot: SlotId) -> Self {
        Self {
            mmu: mmu.clone(),
            as_id,
            slot,
            start: 0,
        }
    }

    fn bitmap(&self) -> Option<Arc<DirtyBitmap>> {
        self.mmu
            .slots()
            .by_id(self.as_id, self.slot)?
            .bitmap()
            .cloned()
    }
}

impl<F: Format, H: Host> Clone for SlotBitmap<F, H> {
    fn clone(&self) -> Self {
        Self {
            mmu: self.mmu.clone(),
            ..*self
        }
    }
}

impl<F: Format, H: Host> fmt::Debug for SlotBitmap<F, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlotBitmap")
            .field("slot", &self.slot)
            .field("start", &self.start)
            .finish()
    }
}

impl<F: Format, H: Host> WithBitmapSlice<'_> for SlotBitmap<F, H> {
    type S = Self;
}

impl<F: Format, H: Host> BitmapSlice for SlotBitmap<F, H> {}

impl<F: Format, H: Host> Bitmap for SlotBitmap<F, H> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        if let Some(bitmap) = self.bitmap() {
            let first = self.start.saturating_add(offset) as u64;
            let last = first.saturating_add(len as u64 - 1);
            let frame = first / PAGE_SIZE;
            bitmap.mark(frame, last / PAGE_SIZE - frame + 1);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let frame = self.start.saturating_add(offset) as u64 / PAGE_SIZE;
        let word = usize::try_from(frame / 64).unwrap_or(usize::MAX);
        self.bitmap()
            .is_some_and(|bitmap| bitmap.get(word) >> (frame % 64) & 1 != 0)
    }

    fn slice_at(&self, offset: usize) -> Self {
        let mut slice = self.clone();
        slice.start = self.start.saturating_add(offset);
        slice
    }
}
