//! A host made of software: what tests, benches and examples share.
//!
//! Tables come from an [`MmapPool`] and are walked by software vCPUs; guest memory is nothing but frame numbers, unless
//! a test gives them a meaning. A flush waits, through a [`TlbTracker`], until every software vCPU has left the guest; it
//! flushes what it cached before it enters again.

use crate::entry::TablePage;
use crate::host::{FlushRequest, FrameSource, Host, Lookup, Mapping};
use crate::pool::MmapPool;
use crate::protected::{ProtectedTable, Unprotected};
use crate::slots::Slot;
use crate::table;
use crate::tlb::TlbTracker;
use tdp_arch::walker::PhysicalMemory;
use tdp_arch::{Access, ENTRIES_PER_TABLE, Gfn, Hpa, Level, Perms, Pfn};

/// Backing of a slot by consecutive host frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearBacking {
    /// Host frame of the slot's first guest frame.
    pub pfn: Pfn,
    /// Largest leaf that the host's own mapping allows.
    pub level: Level,
    /// What the host permits.
    pub perms: Perms,
    /// Host frame of the slot's first guest frame where that is private; none of its frames can be without.
    pub private: Option<Pfn>,
}

impl LinearBacking {
    /// Memory that may be read, written and executed, by leaves up to `level`.
    pub const fn new(pfn: Pfn, level: Level) -> Self {
        Self {
            pfn,
            level,
            perms: Perms::RWX,
            private: None,
        }
    }

    /// With other frames, from `pfn` on, for what is private.
    #[must_use]
    pub const fn with_private(mut self, pfn: Pfn) -> Self {
        self.private = Some(pfn);
        self
    }
}

/// A host made of software.
#[derive(Debug)]
pub struct SoftwareHost<P = Unprotected> {
    frames: MmapPool,
    tlb: TlbTracker,
    protected: P,
}

impl SoftwareHost {
    /// A host whose tables come from `frames`, for a guest without a private half.
    pub fn new(frames: MmapPool) -> Self {
        Self::confidential(frames, TlbTracker::new(), Unprotected)
    }
}

impl<P: ProtectedTable> SoftwareHost<P> {
    /// A host whose tables come from `frames`, for a confidential guest whose vCPUs are tracked by `tlb`.
    pub fn confidential(frames: MmapPool, tlb: TlbTracker, protected: P) -> Self {
        Self {
            frames,
            tlb,
            protected,
        }
    }

    /// The hook to the trusted module.
    pub fn protected_table(&self) -> &P {
        &self.protected
    }

    /// Which software vCPUs are in the guest, and since when.
    pub fn tlb(&self) -> &TlbTracker {
        &self.tlb
    }
}

impl<P: ProtectedTable> Host for SoftwareHost<P> {
    type Frames = MmapPool;
    type Backing = LinearBacking;
    type Protected = P;

    #[inline(always)]
    fn frames(&self) -> &MmapPool {
        &self.frames
    }

    #[inline(always)]
    fn lookup(&self, slot: &Slot<LinearBacking>, gfn: Gfn, _access: Access) -> Lookup {
        let backing = slot.backing();
        Lookup::Mapped(Mapping::memory(
            Pfn(backing.pfn.0.wrapping_add(slot.offset(gfn))),
            backing.level,
            backing.perms,
        ))
    }

    #[inline(always)]
    fn protected(&self) -> &P {
        &self.protected
    }

    #[inline(always)]
    fn lookup_private(&self, slot: &Slot<LinearBacking>, gfn: Gfn) -> Lookup {
        let backing = slot.backing();
        match backing.private {
            Some(first) => Lookup::Mapped(Mapping::memory(
                Pfn(first.0.wrapping_add(slot.offset(gfn))),
                backing.level,
                Perms::RWX,
            )),
            None => Lookup::Failed,
        }
    }

    fn flush(&self, _request: &FlushRequest) {
        self.tlb.track(|_| {});
    }
}

/// The tables of a frame source as the processor sees them: physical memory for a page walker.
#[derive(Debug)]
pub struct TableMemory<'a, S>(&'a S);

impl<'a, S: FrameSource> TableMemory<'a, S> {
    /// A view of `frames`.
    pub fn new(frames: &'a S) -> Self {
        Self(frames)
    }

    fn place(&self, hpa: Hpa) -> Option<(&'a TablePage, usize)> {
        let index = (hpa.page_offset() / 8) as usize % ENTRIES_PER_TABLE;
        (self.0.window().contains(&hpa.pfn())).then(|| (table::page(self.0, hpa.pfn()), index))
    }
}

impl<S: FrameSource> PhysicalMemory for TableMemory<'_, S> {
    fn load(&self, hpa: Hpa) -> Option<u64> {
        let (page, index) = self.place(hpa)?;
        page.get(index).map(|entry| entry.load().0)
    }

    fn compare_exchange(&self, hpa: Hpa, current: u64, new: u64) -> Result<(), u64> {
        let (page, index) = self.place(hpa).ok_or(0u64)?;
        page.exchange_as_processor(index, current, new)
    }
}
