//! Memory slots: which guest frames exist, and what backs them. Read by RCU, written copy-on-write.
//!
//! Protocol. Readers see one immutable [`Snapshot`] through an atomic pointer. Writers, one at a time, build the next
//! snapshot, publish it by Release (pairs with the reader's Acquire load of the pointer), then its version, have all vCPUs
//! forget the slot that they used last (`memo.rs`), and retire the old snapshot.
//!
//! Removing a slot: publish it as *changing* (faults on it answer `Retry`), wait until every fault that began before
//! has left its critical section, zap its leaves and flush, publish a snapshot without it. So no leaf of a removed slot
//! outlives the call, and none is installed after (INV: no-stale-install). In place of the zap all roots can be made
//! obsolete and all vCPUs told to load their root anew (`teardown.rs`): then no leaf of a removed slot outlives the call
//! in a tree that a vCPU may still run on. Each published change of the map moves the
//! generation, which makes MMIO entries made under an older one stale.

use crate::dirty::DirtyBitmap;
use crate::host::{AddressSpaceId, MAX_ADDRESS_SPACES};
use crate::range::RemovalError;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use tdp_arch::{Gfn, GfnRange, Level};

bitflags::bitflags! {
    /// Properties of a slot.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct SlotFlags: u32 {
        /// The guest may read and fetch; its writes are the embedder's to emulate.
        const READ_ONLY = 1 << 0;
        /// Writes are being logged ([`Mmu::dirty_log`](crate::Mmu::dirty_log)): no large leaves.
        const LOG_DIRTY = 1 << 1;
        /// Collecting the log only reads it; pages are cleared explicitly, when they are about to be copied. Means
        /// nothing without [`LOG_DIRTY`](SlotFlags::LOG_DIRTY).
        const LOG_MANUAL = 1 << 2;
        /// The log begins with every page marked, and leaves are restricted as they are cleared and not all at once. Means
        /// nothing without [`LOG_DIRTY`](SlotFlags::LOG_DIRTY).
        const LOG_INITIALLY_SET = 1 << 3;
    }
}

/// Number of a slot, unique within its address space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u32);

/// A range of guest frames with one backing.
// Aligned, because every fault reads it and whoever copies the map writes the count that lies before it. In this order, so
// that what a fault reads in any case is in one line, with a backing of up to 32 bytes.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct Slot<B> {
    start: Gfn,
    /// Frames from there to `end`.
    pages: u64,
    /// The same if faults on them need no thought: no flags, not changing. Else none, so that a fault that asks whether one of
    /// these frames is meant asks both at once.
    plain_pages: u64,
    /// Being removed, moved or changed: faults are to be retried.
    pub(crate) changing: bool,
    max_level: Level,
    flags: SlotFlags,
    backing: B,
    end: Gfn,
    /// Marks of written frames, while it is logged.
    bitmap: Option<Arc<DirtyBitmap>>,
    id: SlotId,
    explicit_id: bool,
    as_id: AddressSpaceId,
}

impl<B> Slot<B> {
    /// A slot for `gfns` in the normal address space, with an id chosen at insertion.
    pub fn new(gfns: impl Into<GfnRange>, backing: B) -> Self {
        let gfns = gfns.into();
        Self {
            start: gfns.start,
            end: gfns.end,
            pages: gfns.pages(),
            plain_pages: gfns.pages(),
            flags: SlotFlags::empty(),
            changing: false,
            max_level: Level::L3,
            id: SlotId(0),
            explicit_id: false,
            as_id: AddressSpaceId(0),
            bitmap: None,
            backing,
        }
    }

    /// Puts it into another address space.
    #[must_use]
    pub fn in_space(mut self, as_id: AddressSpaceId) -> Self {
        self.as_id = as_id;
        self
    }

    /// Gives it an id of the caller's choice.
    #[must_use]
    pub fn with_id(mut self, id: SlotId) -> Self {
        self.id = id;
        self.explicit_id = true;
        self
    }

    /// Sets its flags.
    #[must_use]
    pub fn with_flags(mut self, flags: SlotFlags) -> Self {
        self.flags = flags;
        self.settled()
    }

    /// Forbids leaves above `level`.
    #[must_use]
    pub fn max_level(mut self, level: Level) -> Self {
        self.max_level = level;
        self
    }

    /// Its id.
    pub fn id(&self) -> SlotId {
        self.id
    }

    /// Its address space.
    pub fn as_id(&self) -> AddressSpaceId {
        self.as_id
    }

    /// Its guest frames.
    #[inline(always)]
    pub fn gfns(&self) -> GfnRange {
        GfnRange {
            start: self.start,
            end: self.end,
        }
    }

    /// Its flags.
    #[inline(always)]
    pub fn flags(&self) -> SlotFlags {
        self.flags
    }

    /// What backs it.
    #[inline(always)]
    pub fn backing(&self) -> &B {
        &self.backing
    }

    /// Whether faults on it need no thought: no flags, not changing.
    #[inline(always)]
    pub(crate) fn is_plain(&self) -> bool {
        self.plain_pages != 0
    }

    /// Whether `gfn` lies in the slot and faults on it need no thought.
    #[inline(always)]
    pub(crate) fn contains_plain(&self, gfn: Gfn) -> bool {
        self.offset(gfn) < self.plain_pages
    }

    /// Marks of written frames, while it is logged.
    #[inline(always)]
    pub(crate) fn bitmap(&self) -> Option<&Arc<DirtyBitmap>> {
        self.bitmap.as_ref()
    }

    /// Whether `gfn` lies in the slot.
    #[inline(always)]
    pub fn contains(&self, gfn: Gfn) -> bool {
        self.offset(gfn) < self.pages
    }

    /// Frames from the slot's start to `gfn`, which must lie in it; for any other frame a number past its end.
    #[inline(always)]
    pub fn offset(&self, gfn: Gfn) -> u64 {
        gfn.0.wrapping_sub(self.start.0)
    }

    /// Largest level, at most `limit`, whose block around `gfn` lies in the slot and is not forbidden.
    #[inline]
    pub(crate) fn level_at(&self, gfn: Gfn, limit: Level) -> Level {
        let mut level = limit.min(self.max_level);
        if self.flags.contains(SlotFlags::LOG_DIRTY) {
            return Level::L1;
        }
        while level > Level::L1 && !self.gfns().covers(level.range(gfn)) {
            level = level.below_or_leaf();
        }
        level
    }
}

/// A change of the slot map was refused; nothing changed, but for what [`Private`](SlotError::Private) tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SlotError {
    /// No frames.
    #[error("slot {gfns} is empty")]
    Empty {
        /// What was asked for.
        gfns: GfnRange,
    },
    /// Frames past what the tables can map.
    #[error(
        "slot {gfns} reaches beyond frame {limit:#x}, the end of the guest's physical addresses"
    )]
    BeyondWidth {
        /// What was asked for.
        gfns: GfnRange,
        /// First frame that cannot be mapped.
        limit: Gfn,
    },
    /// Another slot has some of the frames.
    #[error("slot {gfns} overlaps slot {}, {other_gfns}", other.0)]
    Overlap {
        /// What was asked for.
        gfns: GfnRange,
        /// The slot in the way.
        other: SlotId,
        /// Its frames.
        other_gfns: GfnRange,
    },
    /// More frames than a log has room for, 2^31 - 1, or no memory for the log.
    #[error("slot {gfns} is too large to be logged")]
    TooLargeToLog {
        /// What was asked for.
        gfns: GfnRange,
    },
    /// The id is taken.
    #[error("slot id {} is in use", id.0)]
    IdInUse {
        /// What was asked for.
        id: SlotId,
    },
    /// No such slot.
    #[error("there is no slot {} in address space {}", id.0, as_id.0)]
    NoSuchSlot {
        /// Address space.
        as_id: AddressSpaceId,
        /// What was asked for.
        id: SlotId,
    },
    /// Private memory of the slot could not be taken away. The slot is as it was; what was taken away is empty.
    #[error("private memory of the slot stays: {0}")]
    Private(RemovalError),
    /// No such address space.
    #[error("there is no address space {}", as_id.0)]
    NoSuchSpace {
        /// What was asked for.
        as_id: AddressSpaceId,
    },
}

/// One state of all slots.
#[derive(Debug)]
pub(crate) struct Snapshot<B> {
    /// Moves with every published change.
    pub(crate) generation: u64,
    /// Per address space, by first frame.
    spaces: [Vec<Arc<Slot<B>>>; MAX_ADDRESS_SPACES],
}

impl<B: Clone> Snapshot<B> {
    pub(crate) fn empty() -> Self {
        Self {
            generation: 0,
            spaces: [const { Vec::new() }; MAX_ADDRESS_SPACES],
        }
    }

    fn space(&self, as_id: AddressSpaceId) -> &[Arc<Slot<B>>] {
        self.spaces
            .get(usize::from(as_id.0))
            .map_or(&[], Vec::as_slice)
    }

    pub(crate) fn list(&self, as_id: AddressSpaceId) -> &[Arc<Slot<B>>] {
        self.space(as_id)
    }

    /// The slot that holds `gfn`.
    pub(crate) fn find(&self, as_id: AddressSpaceId, gfn: Gfn) -> Option<&Arc<Slot<B>>> {
        let space = self.space(as_id);
        let after = space.partition_point(|slot| slot.start <= gfn);
        space
            .get(after.checked_sub(1)?)
            .filter(|slot| slot.contains(gfn))
    }

    pub(crate) fn by_id(
        &self,
        as_id: AddressSpaceId,
        id: SlotId,
    ) -> Result<&Arc<Slot<B>>, SlotError> {
        self.space(as_id)
            .iter()
            .find(|slot| slot.id == id)
            .ok_or(SlotError::NoSuchSlot { as_id, id })
    }

    fn check(&self, slot: &Slot<B>, except: Option<SlotId>, limit: Gfn) -> Result<(), SlotError> {
        let gfns = slot.gfns();
        if gfns.is_empty() {
            return Err(SlotError::Empty { gfns });
        }
        if gfns.end > limit {
            return Err(SlotError::BeyondWidth { gfns, limit });
        }
        let space = self.space(slot.as_id);
        let after = space.partition_point(|other| other.end <= gfns.start);
        let in_the_way = space[after..]
            .iter()
            .take_while(|other| other.start < gfns.end)
            .find(|other| Some(other.id) != except);
        match in_the_way {
            Some(other) => Err(SlotError::Overlap {
                gfns,
                other: other.id,
                other_gfns: other.gfns(),
            }),
            None => Ok(()),
        }
    }

    /// This state with `slot` added, and the id it got.
    pub(crate) fn with(
        &self,
        mut slot: Slot<B>,
        limit: Gfn,
    ) -> Result<(Box<Self>, SlotId), SlotError> {
        self.check(&slot, None, limit)?;
        let space = self.space(slot.as_id);
        if slot.explicit_id {
            if space.iter().any(|other| other.id == slot.id) {
                return Err(SlotError::IdInUse { id: slot.id });
            }
        } else {
            slot.id = SlotId(
                space
                    .iter()
                    .map(|other| other.id.0.wrapping_add(1))
                    .max()
                    .unwrap_or(0),
            );
            while space.iter().any(|other| other.id == slot.id) {
                slot.id.0 = slot.id.0.wrapping_add(1);
            }
        }
        let id = slot.id;
        slot.bitmap = None;
        let mut next = self.next();
        // It may be a copy of one that was going away.
        next.put(slot.changing(false))?;
        Ok((next, id))
    }

    /// This state with the slot `id` replaced by what `change` makes of it, or removed.
    pub(crate) fn changed(
        &self,
        as_id: AddressSpaceId,
        id: SlotId,
        limit: Gfn,
        change: impl FnOnce(Slot<B>) -> Option<Slot<B>>,
    ) -> Result<Box<Self>, SlotError> {
        let changed = change(Slot::clone(self.by_id(as_id, id)?));
        if let Some(slot) = &changed {
            self.check(slot, Some(id), limit)?;
        }
        let mut next = self.next();
        next.spaces[usize::from(as_id.0)].retain(|slot| slot.id != id);
        if let Some(slot) = changed {
            next.put(slot)?;
        }
        Ok(next)
    }

    fn next(&self) -> Box<Self> {
        Box::new(Self {
            generation: self.generation.wrapping_add(1),
            spaces: self.spaces.clone(),
        })
    }

    fn put(&mut self, mut slot: Slot<B>) -> Result<(), SlotError> {
        if !slot.flags.contains(SlotFlags::LOG_DIRTY) {
            slot.bitmap = None;
        } else if slot.bitmap.is_none() {
            let marked = slot.flags.contains(SlotFlags::LOG_INITIALLY_SET);
            let bitmap = DirtyBitmap::new(slot.pages, marked);
            let bitmap = bitmap.ok_or(SlotError::TooLargeToLog { gfns: slot.gfns() })?;
            slot.bitmap = Some(Arc::new(bitmap));
        }
        let space = &mut self.spaces[usize::from(slot.as_id.0)];
        let at = space.partition_point(|other| other.start < slot.start);
        space.insert(at, Arc::new(slot));
        Ok(())
    }
}

impl<B> Slot<B> {
    /// The same slot at another place. Frames past the end of the number space make it empty, which is refused.
    pub(crate) fn moved_to(mut self, start: Gfn) -> Self {
        self.end = start.checked_add(self.pages).unwrap_or(start);
        self.start = start;
        self.pages = self.gfns().pages();
        self.settled()
    }

    /// The same slot with a log that was made for it.
    pub(crate) fn with_log(mut self, log: Option<Arc<DirtyBitmap>>) -> Self {
        self.bitmap = log;
        self
    }

    pub(crate) fn changing(mut self, changing: bool) -> Self {
        self.changing = changing;
        self.settled()
    }

    /// The same slot with what follows from the rest of it.
    fn settled(mut self) -> Self {
        let plain = self.flags.is_empty() && !self.changing;
        self.plain_pages = if plain { self.pages } else { 0 };
        self
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn a_copy_of_a_slot_that_goes_away_can_be_used() {
        let leaving = Slot::new(Gfn(0)..Gfn(8), ()).changing(true);
        assert!(!leaving.contains_plain(Gfn(0)));
        let (slots, _) = Snapshot::empty().with(leaving, Gfn(64)).expect("room");
        let slot = slots.find(AddressSpaceId(0), Gfn(7)).expect("a slot");
        assert!(!slot.changing && slot.contains_plain(Gfn(7)) && !slot.contains_plain(Gfn(8)));
    }
}
