//! Memory slots from the guest memory of the rust-vmm crates: one slot for each region.

use crate::host::{AddressSpaceId, Host};
use crate::slot_map::Slots;
use crate::slots::{Slot, SlotError, SlotId};
use alloc::vec::Vec;
use tdp_arch::{Format, Gfn, GfnRange, Gpa, PAGE_SIZE};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

/// Guest memory could not be made into slots; there are no more of them than before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GuestMemoryError {
    /// A region does not consist of whole frames.
    #[error("the region of {bytes:#x} bytes at {start} does not consist of frames of 4 KiB")]
    Unaligned {
        /// Its first address.
        start: Gpa,
        /// Its size.
        bytes: u64,
    },
    /// A slot was refused.
    #[error(transparent)]
    Slot(#[from] SlotError),
}

impl<F: Format, H: Host> Slots<'_, F, H> {
    /// Adds a slot for each region of `memory`, with the backing that `backing` names for it, and returns their ids in the order
    /// of the regions. All of them are added or none.
    ///
    /// If one is refused those added before are [removed](Slots::remove) again, which waits for faults that began before;
    /// must not be called from inside a [`Batch`](crate::Batch) or a host callback.
    ///
    /// # Errors
    ///
    /// [`GuestMemoryError`] if a region has no whole frames or its slot is refused.
    pub fn insert_memory<M: GuestMemoryBackend>(
        &self,
        as_id: AddressSpaceId,
        memory: &M,
        mut backing: impl FnMut(&M::R) -> H::Backing,
    ) -> Result<Vec<SlotId>, GuestMemoryError> {
        let slots: Vec<Slot<H::Backing>> = memory
            .iter()
            .map(|region| Ok(Slot::new(frames_of(region)?, backing(region)).in_space(as_id)))
            .collect::<Result<_, GuestMemoryError>>()?;
        let mut ids = Vec::with_capacity(slots.len());
        for slot in slots {
            match self.insert(slot) {
                Ok(id) => ids.push(id),
                Err(error) => {
                    for id in ids {
                        self.remove(as_id, id)?;
                    }
                    return Err(error.into());
                }
            }
        }
        Ok(ids)
    }
}

fn frames_of(region: &impl GuestMemoryRegion) -> Result<GfnRange, GuestMemoryError> {
    let (start, bytes) = (Gpa(region.start_addr().raw_value()), region.len());
    let whole = start.0.is_multiple_of(PAGE_SIZE) && bytes.is_multiple_of(PAGE_SIZE);
    let end = start.0.checked_add(bytes).filter(|_| whole);
    let end = end.ok_or(GuestMemoryError::Unaligned { start, bytes })?;
    Ok(GfnRange {
        start: start.gfn(),
        end: Gfn(end / PAGE_SIZE),
    })
}
