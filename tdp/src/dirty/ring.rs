//! Dirty rings: the pages that a vCPU has marked, in order, for a collector that does not want to look at bitmaps.
//!
//! Protocol. One producer, the vCPU's thread; one collector at a time. Three counters only go up: *pushed* (written by the
//! producer), *harvested* and *freed* (written by the collector under a lock). An entry is written before *pushed* passes it
//! (Release, paired with the collector's Acquire), and not written again before *freed* has passed it (Release, paired with
//! the producer's Acquire). Freeing comes after the page has been restricted again: a page that is in the ring is writable, one
//! that left it is not.
//!
//! A ring never overflows: a fault that might push finds it full at the soft limit and answers
//! [`DirtyRingFull`](crate::Outcome::DirtyRingFull) before it changes anything. What the reserve cannot take either goes to
//! the bitmap.

use crate::host::AddressSpaceId;
use crate::slots::SlotId;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use tdp_rcu::sync::{AtomicU64, CachePadded, Mutex, Ordering};

/// Entries kept back for what one exit may push: the processor's own log of 512 pages, and some. A model checker's rings are
/// as small as its tables.
const RESERVE: u64 = if cfg!(loom) { 1 } else { 512 + 64 };

/// A page in a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DirtyPage {
    /// Address space of its slot.
    pub as_id: AddressSpaceId,
    /// Its slot.
    pub slot: SlotId,
    /// Frames from the slot's start.
    pub offset: u64,
}

#[derive(Debug)]
struct Entry {
    /// Address space and slot.
    slot: AtomicU64,
    offset: AtomicU64,
}

/// Ring of one vCPU, 16 bytes an entry.
#[derive(Debug)]
pub struct DirtyRing {
    entries: Box<[Entry]>,
    /// Written by the producer.
    pushed: CachePadded<AtomicU64>,
    /// Written by the collector.
    freed: CachePadded<AtomicU64>,
    harvested: CachePadded<Mutex<u64>>,
}

impl DirtyRing {
    /// Least number of entries.
    pub(crate) const LEAST: u32 = if cfg!(loom) { 4 } else { 1024 };

    pub(crate) fn new(entries: u32) -> Self {
        let entry = |_| Entry {
            slot: AtomicU64::new(0),
            offset: AtomicU64::new(0),
        };
        Self {
            entries: (0..entries).map(entry).collect(),
            pushed: CachePadded::new(AtomicU64::new(0)),
            freed: CachePadded::new(AtomicU64::new(0)),
            harvested: CachePadded::new(Mutex::new(0)),
        }
    }

    /// Entries in all.
    pub fn capacity(&self) -> usize {
        self.entries.len()
    }

    /// Entries in use: pushed, and not freed by [`Mmu::reset_dirty_rings`](crate::Mmu::reset_dirty_rings).
    pub fn len(&self) -> u64 {
        let freed = self.freed.load(Ordering::Acquire);
        self.pushed.load(Ordering::Acquire).saturating_sub(freed)
    }

    /// Whether nothing was pushed that has not been freed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the soft limit is reached: the vCPU's next write to a logged page ends in
    /// [`DirtyRingFull`](crate::Outcome::DirtyRingFull).
    pub fn is_full(&self) -> bool {
        self.len() + RESERVE > self.entries.len() as u64
    }

    /// Pushes a page. Called by the vCPU's thread only. `false` if not even the reserve has room.
    pub(crate) fn push(&self, page: DirtyPage) -> bool {
        let at = self.pushed.load(Ordering::Relaxed);
        let size = self.entries.len() as u64;
        // Acquire: pairs with the Release of `free`; the collector has read what the entry held.
        if at - self.freed.load(Ordering::Acquire) >= size {
            return false;
        }
        if let Some(entry) = self.entries.get((at % size) as usize) {
            // Relaxed: published by the store of `pushed`.
            let slot = u64::from(page.as_id.0) << 32 | u64::from(page.slot.0);
            entry.slot.store(slot, Ordering::Relaxed);
            entry.offset.store(page.offset, Ordering::Relaxed);
        }
        // Release: the entry, and the leaf made writable before it.
        self.pushed.store(at + 1, Ordering::Release);
        true
    }

    fn get(&self, at: u64) -> DirtyPage {
        let entry = &self.entries[(at % self.entries.len() as u64) as usize];
        let slot = entry.slot.load(Ordering::Relaxed);
        DirtyPage {
            as_id: AddressSpaceId((slot >> 32) as u8),
            slot: SlotId(slot as u32),
            offset: entry.offset.load(Ordering::Relaxed),
        }
    }

    /// Calls `see` for every page pushed since the last harvest, in order, and returns how many there were. They stay in
    /// the ring, and writable, until they are [reset](crate::Mmu::reset_dirty_rings). `see` must not harvest or reset rings
    /// itself: one collector is let in at a time.
    pub fn harvest(&self, mut see: impl FnMut(DirtyPage)) -> u64 {
        let mut harvested = self.harvested.lock();
        let from = *harvested;
        let pushed = self.pushed.load(Ordering::Acquire);
        for at in from..pushed {
            see(self.get(at));
            *harvested = at + 1;
        }
        pushed - from
    }

    /// Hands the harvested pages to `restrict`, then frees their entries.
    fn free(&self, restrict: impl FnOnce(&mut dyn Iterator<Item = DirtyPage>)) {
        let harvested = self.harvested.lock();
        let freed = self.freed.load(Ordering::Relaxed);
        if freed < *harvested {
            restrict(&mut (freed..*harvested).map(|at| self.get(at)));
            self.freed.store(*harvested, Ordering::Release);
        }
    }
}

/// The rings of an MMU.
#[derive(Debug)]
pub(crate) struct DirtyRings {
    entries: u32,
    rings: Mutex<Vec<Arc<DirtyRing>>>,
}

impl DirtyRings {
    /// Rings of that many entries each; of none, no rings.
    pub(crate) fn new(entries: u32) -> Self {
        Self {
            entries,
            rings: Mutex::new(Vec::new()),
        }
    }

    /// A ring for a new vCPU.
    pub(crate) fn vcpu(&self) -> Option<Arc<DirtyRing>> {
        (self.entries > 0).then(|| {
            let ring = Arc::new(DirtyRing::new(self.entries));
            self.rings.lock().push(ring.clone());
            ring
        })
    }

    /// All rings; those of vCPUs that went away as long as something is in them.
    pub(crate) fn all(&self) -> Vec<Arc<DirtyRing>> {
        let mut rings = self.rings.lock();
        rings.retain(|ring| Arc::strong_count(ring) > 1 || !ring.is_empty());
        rings.clone()
    }

    /// Takes the harvested pages of all rings: hands them to `restrict`, ring by ring, then frees their entries.
    pub(crate) fn free(&self, mut restrict: impl FnMut(&mut dyn Iterator<Item = DirtyPage>)) {
        for ring in self.all() {
            ring.free(&mut restrict);
        }
    }
}
