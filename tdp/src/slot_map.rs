//! The published state of the memory slots, and the operations that change it.
//!
//! The protocol is told in [`slots`](crate::slots).

use crate::host::{AddressSpaceId, Host};
use crate::mmu::Shared;
use crate::range_zap::ZapScope;
use crate::reclaim::Retired;
use crate::slots::{Slot, SlotError, SlotFlags, SlotId, Snapshot};
use crate::teardown::{RootTeardown, SlotRemoval};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use tdp_arch::{Format, Gfn, GfnRange};
use tdp_rcu::sync::{AtomicPtr, AtomicU64, CachePadded, Mutex, MutexGuard, Ordering};
use tdp_rcu::{Section, Visit};

/// The map as readers find it.
pub(crate) struct SlotMap<B> {
    /// Generation of the published snapshot, stored after the pointer.
    version: AtomicU64,
    /// A boxed snapshot, never null.
    current: AtomicPtr<Snapshot<B>>,
    /// Held by the one writer.
    pub(crate) writer: CachePadded<Mutex<()>>,
}

#[allow(unsafe_code)]
// UNSAFETY: snapshots are read by RCU through a raw pointer.
impl<B: Clone> SlotMap<B> {
    /// An empty map, with the generation that the first change follows.
    pub(crate) fn new(generation: u64) -> Self {
        let mut empty = Snapshot::empty();
        empty.generation = generation;
        Self {
            version: AtomicU64::new(generation),
            current: AtomicPtr::new(Box::into_raw(Box::new(empty))),
            writer: CachePadded::new(Mutex::new(())),
        }
    }

    /// Generation of the published snapshot.
    #[inline]
    pub(crate) fn version(&self) -> u64 {
        // Acquire: pairs with the Release in `publish`. Whoever sees a version sees the snapshot of that version or a
        // later one, never an earlier one.
        self.version.load(Ordering::Acquire)
    }

    /// The published snapshot, for a vCPU inside its critical section.
    pub(crate) fn snapshot<'s>(&self, _section: &'s Section<'_>) -> &'s Snapshot<B> {
        // SAFETY: never null; a replaced snapshot is retired to the domain of the section (INV: flush-before-reuse,
        // its grace-period half), which began before this load.
        unsafe { &*self.current.load(Ordering::Acquire) }
    }

    /// The published snapshot, for anyone else.
    pub(crate) fn visited<'v>(&self, _visit: &'v Visit<'_>) -> &'v Snapshot<B> {
        // SAFETY: as for a section; a retired snapshot outlives every visit that began before.
        unsafe { &*self.current.load(Ordering::Acquire) }
    }

    /// The published snapshot, for code that cannot name the section or visit that it runs in.
    ///
    /// # Safety
    ///
    /// The caller is inside a section or a visit of the domain that snapshots are retired to, and stays there for as long as
    /// it uses the snapshot.
    pub(crate) unsafe fn protected(&self) -> &Snapshot<B> {
        // SAFETY: as for a section and a visit; the caller is in one.
        unsafe { &*self.current.load(Ordering::Acquire) }
    }

    /// The slot that holds `gfn`.
    pub(crate) fn find<'s>(
        &self,
        section: &'s Section<'_>,
        as_id: AddressSpaceId,
        gfn: Gfn,
    ) -> Option<&'s Arc<Slot<B>>> {
        self.snapshot(section).find(as_id, gfn)
    }

    /// Publishes the next snapshot and returns the one that it replaces. The caller holds the writer's lock.
    fn publish(&self, next: Box<Snapshot<B>>) -> Box<Snapshot<B>> {
        let version = next.generation;
        // Release: the snapshot is complete before it can be found; its version follows it (see `version`).
        let old = self.current.swap(Box::into_raw(next), Ordering::AcqRel);
        self.version.store(version, Ordering::Release);
        // SAFETY: every pointer stored came from a box, and the swap gives each to one caller only.
        unsafe { Box::from_raw(old) }
    }
}

#[allow(unsafe_code)]
impl<B> Drop for SlotMap<B> {
    fn drop(&mut self) {
        // UNSAFETY: the other end of `Box::into_raw`.
        // SAFETY: no reader is left when the map is dropped, and the pointer came from a box.
        drop(unsafe { Box::from_raw(self.current.load(Ordering::Acquire)) });
    }
}

/// The memory slots of an MMU.
pub struct Slots<'a, F: Format, H: Host> {
    shared: &'a Arc<Shared<F, H>>,
}

/// A slot whose faults are told to wait. Dropped, on failure or by a panic of the host or of the hook, it is as it was: the
/// guest has some of its private memory still, so it stays.
struct Changing<'s, 'a, F: Format, H: Host> {
    slots: &'s Slots<'a, F, H>,
    as_id: AddressSpaceId,
    id: SlotId,
}

impl<F: Format, H: Host> Drop for Changing<'_, '_, F, H> {
    fn drop(&mut self) {
        // The writer's lock is held since the slot was found: it is there.
        let _ = self
            .slots
            .change(self.as_id, self.id, |slot| Some(slot.changing(false)));
    }
}

impl<'a, F: Format, H: Host> Slots<'a, F, H> {
    pub(crate) fn new(shared: &'a Arc<Shared<F, H>>) -> Self {
        Self { shared }
    }

    fn limit(&self) -> Gfn {
        self.shared.roots.limit()
    }

    fn check_space(&self, as_id: AddressSpaceId) -> Result<(), SlotError> {
        if as_id.0 < self.shared.address_spaces {
            Ok(())
        } else {
            Err(SlotError::NoSuchSpace { as_id })
        }
    }

    /// Publishes what `next` makes of the present state. The caller holds the writer's lock.
    fn update<R>(
        &self,
        next: impl FnOnce(&Snapshot<H::Backing>) -> Result<(Box<Snapshot<H::Backing>>, R), SlotError>,
    ) -> Result<R, SlotError> {
        let (snapshot, result) = {
            let visit = self.shared.domain.visit();
            next(self.shared.slots.visited(&visit))?
        };
        let generation = snapshot.generation;
        let replaced = self.shared.slots.publish(snapshot);
        self.shared.domain.move_stamps();
        self.shared.age_mmio_entries(generation);
        self.shared.domain.retire(
            Retired::Slots {
                _snapshot: replaced,
            },
            1,
        );
        Ok(result)
    }

    fn change(
        &self,
        as_id: AddressSpaceId,
        id: SlotId,
        change: impl FnOnce(Slot<H::Backing>) -> Option<Slot<H::Backing>>,
    ) -> Result<(), SlotError> {
        let limit = self.limit();
        self.update(|now| Ok((now.changed(as_id, id, limit, change)?, ())))
    }

    /// Adds a slot. Faults see it from now on.
    ///
    /// # Errors
    ///
    /// [`SlotError`] if it is empty, reaches too far, overlaps another, its id is taken or it is too large for its log; nothing
    /// changed.
    pub fn insert(&self, slot: Slot<H::Backing>) -> Result<SlotId, SlotError> {
        self.check_space(slot.as_id())?;
        let _writer = self.shared.slots.writer.lock();
        let limit = self.limit();
        self.update(|now| now.with(slot, limit))
    }

    /// Removes a slot. When this returns no vCPU can reach its backing.
    ///
    /// Waits for faults that began before; must not be called from inside a [`Batch`](crate::Batch) or a host callback.
    ///
    /// # Errors
    ///
    /// [`SlotError::NoSuchSlot`], [`SlotError::Private`].
    pub fn remove(&self, as_id: AddressSpaceId, id: SlotId) -> Result<(), SlotError> {
        self.remove_lazily(as_id, id).map(RootTeardown::finish)
    }

    /// Removes a slot and leaves the obsolete roots, if that is how slots are removed
    /// ([`MmuBuilder::slot_removal`](crate::MmuBuilder::slot_removal)), to be taken down later. When this returns no vCPU
    /// can reach the slot's backing, taken down or not.
    ///
    /// Waits as [`remove`](Slots::remove) does.
    ///
    /// # Errors
    ///
    /// [`SlotError::NoSuchSlot`], [`SlotError::Private`].
    pub fn remove_lazily(
        &self,
        as_id: AddressSpaceId,
        id: SlotId,
    ) -> Result<RootTeardown<F, H>, SlotError> {
        let writer = self.shared.slots.writer.lock();
        self.replace(&writer, as_id, id, self.shared.slot_removal, |_| None)
    }

    /// Moves a slot to other guest frames. What it mapped is taken away; faults map it anew.
    ///
    /// Waits as [`remove`](Slots::remove) does.
    ///
    /// # Errors
    ///
    /// [`SlotError`]; nothing changed, but for [`SlotError::Private`], which says what did.
    pub fn move_to(&self, as_id: AddressSpaceId, id: SlotId, start: Gfn) -> Result<(), SlotError> {
        let moved = {
            let writer = self.shared.slots.writer.lock();
            let how = self.shared.slot_removal;
            self.replace(&writer, as_id, id, how, |slot| Some(slot.moved_to(start)))
        };
        moved.map(RootTeardown::finish)
    }

    /// Changes a slot's flags. A change of [`SlotFlags::READ_ONLY`] takes away what the slot mapped. With
    /// [`SlotFlags::LOG_DIRTY`] the log begins: when this returns, every write is noticed. Without it the log ends, and what
    /// was split for it becomes large again ([`Mmu::collapse`](crate::Mmu::collapse)).
    ///
    /// Waits as [`remove`](Slots::remove) does.
    ///
    /// # Errors
    ///
    /// [`SlotError::NoSuchSlot`], [`SlotError::TooLargeToLog`], [`SlotError::Private`].
    pub fn set_flags(
        &self,
        as_id: AddressSpaceId,
        id: SlotId,
        flags: SlotFlags,
    ) -> Result<(), SlotError> {
        let remaps =
            |slot: &Slot<H::Backing>| (slot.flags() ^ flags).contains(SlotFlags::READ_ONLY);
        // Held from here on: another change of the flags must not come between the question and its answer.
        let writer = self.shared.slots.writer.lock();
        let before = self.by_id(as_id, id);
        if before.as_deref().is_some_and(remaps) {
            let change = |slot: Slot<H::Backing>| Some(slot.with_flags(flags));
            return self
                .replace(&writer, as_id, id, SlotRemoval::Zap, change)
                .map(RootTeardown::finish);
        }
        self.change(as_id, id, |slot| Some(slot.with_flags(flags)))?;
        let logged = |slot: &Slot<H::Backing>| slot.bitmap().is_some();
        let (Some(before), Some(now)) = (before, self.by_id(as_id, id)) else {
            return Ok(());
        };
        if logged(&now) && !logged(&before) {
            // A fault that knew the slot without its log may still make a leaf writable, or a large one. The fence inside
            // pairs with the one at the start of every critical section: a fault that is not waited for sees the log.
            self.shared.domain.synchronize_sections();
            self.shared.start_log(&now).flush();
        } else if logged(&before) && !logged(&now) {
            self.shared.collapse(as_id, now.gfns()).flush();
        }
        Ok(())
    }

    /// Takes away what a slot maps and puts what `change` makes of it in its place.
    fn replace(
        &self,
        _writer: &MutexGuard<'_, ()>,
        as_id: AddressSpaceId,
        id: SlotId,
        how: SlotRemoval,
        change: impl Fn(Slot<H::Backing>) -> Option<Slot<H::Backing>>,
    ) -> Result<RootTeardown<F, H>, SlotError> {
        let limit = self.limit();
        // Refused before anything is published, so that the tables stay as they are. The log that a change asks for is made
        // here: later there is no way back.
        let (gfns, log) = {
            let visit = self.shared.domain.visit();
            let now = self.shared.slots.visited(&visit);
            let then = now.changed(as_id, id, limit, &change)?;
            let log = then.by_id(as_id, id).ok();
            let log = log.and_then(|slot| slot.bitmap().cloned());
            (now.by_id(as_id, id)?.gfns(), log)
        };
        self.change(as_id, id, |slot| Some(slot.changing(true)))?;
        let changing = Changing {
            slots: self,
            as_id,
            id,
        };
        // INV: no-stale-install: the fence inside pairs with the one at the start of every critical section. A fault
        // that is not waited for began later and sees the slot changing.
        self.shared.domain.synchronize_sections();
        let teardown = match how {
            SlotRemoval::Zap => RootTeardown::nothing(self.shared),
            SlotRemoval::InvalidateRoots => RootTeardown::begin(self.shared).and_reload(),
        };
        if !teardown.is_left_by_all() {
            self.shared.zap(as_id, gfns, ZapScope::Leaves).flush();
        }
        self.shared
            .remove_private(as_id, gfns)
            .map_err(SlotError::Private)?;
        self.change(as_id, id, |slot| {
            change(slot.changing(false)).map(|slot| slot.with_log(log))
        })?;
        core::mem::forget(changing);
        Ok(teardown)
    }

    /// The slot that holds `gfn`.
    pub fn find(&self, as_id: AddressSpaceId, gfn: Gfn) -> Option<Arc<Slot<H::Backing>>> {
        let visit = self.shared.domain.visit();
        self.shared.slots.visited(&visit).find(as_id, gfn).cloned()
    }

    /// The slot with an id.
    pub fn by_id(&self, as_id: AddressSpaceId, id: SlotId) -> Option<Arc<Slot<H::Backing>>> {
        let visit = self.shared.domain.visit();
        self.shared
            .slots
            .visited(&visit)
            .by_id(as_id, id)
            .ok()
            .cloned()
    }

    /// All slots of an address space, by first frame.
    pub fn list(&self, as_id: AddressSpaceId) -> Vec<Arc<Slot<H::Backing>>> {
        let visit = self.shared.domain.visit();
        self.shared.slots.visited(&visit).list(as_id).to_vec()
    }

    /// Moves with every change of the slots.
    pub fn generation(&self) -> u64 {
        self.shared.slots.version()
    }

    /// Frames that a slot may have.
    pub fn addressable(&self) -> GfnRange {
        GfnRange {
            start: Gfn(0),
            end: self.limit(),
        }
    }
}
