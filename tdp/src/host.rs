//! What the embedder supplies: frames for tables, the backing of guest memory, TLB flushes.
//!
//! Protocol. The MMU calls [`Host::lookup`] inside a critical section, where nothing may sleep: a lookup that would
//! have to answers [`Lookup::Blocking`] and is asked again, outside, through [`Host::lookup_blocking`]; an invalidation
//! that overtakes it makes the fault start anew (INV: no-stale-install). [`Host::flush`] returns only when no vCPU can
//! use what was cached before the call. Frames are freed only after that and after a grace period
//! (INV: flush-before-reuse).

use crate::entry::TablePage;
use crate::protected::ProtectedTable;
use crate::slots::Slot;
use alloc::sync::Arc;
use core::ops::Range;
use core::ptr::NonNull;
use tdp_arch::{Access, Gfn, GfnRange, Level, MemoryType, Perms, Pfn};
use tdp_rcu::sync::CachePadded;

/// Most address spaces of one MMU: the normal one and system-management mode.
pub const MAX_ADDRESS_SPACES: usize = 2;

/// Which of a VM's address spaces is meant. The default, 0, is the normal one; 1 is system-management mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressSpaceId(pub u8);

/// A frame source has no frame left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("frame pool exhausted: all {limit} frames are in use")]
pub struct OutOfFrames {
    /// Frames that the source may hand out in all.
    pub limit: usize,
}

/// Where table frames come from.
///
/// # Safety
///
/// An implementation promises that
/// * a frame handed out by [`allocate`](FrameSource::allocate) lies in [`window`](FrameSource::window) and is not handed
///   out again before it was given back by [`free`](FrameSource::free);
/// * [`page`](FrameSource::page) of a frame of the window is the address of a [`TablePage`] that stays valid, readable
///   and writable for as long as the source lives, the same at every call, whether the frame is handed out or not.
#[allow(
    unsafe_code,
    reason = "UNSAFETY: the MMU dereferences what an implementation returns"
)]
pub unsafe trait FrameSource: Send + Sync + 'static {
    /// All frames that can ever be handed out.
    fn window(&self) -> Range<Pfn>;

    /// Fills the front of `out` with frames whose content does not matter and returns how many: at least one, at most
    /// `out.len()`.
    ///
    /// # Errors
    ///
    /// [`OutOfFrames`] if there is none, or `out` is empty.
    fn allocate(&self, out: &mut [Pfn]) -> Result<usize, OutOfFrames>;

    /// Takes frames back.
    fn free(&self, frames: &[Pfn]);

    /// Address of a frame of the window.
    fn page(&self, pfn: Pfn) -> NonNull<TablePage>;
}

/// How the host backs one guest frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Host frame of the guest frame that was asked for.
    pub pfn: Pfn,
    /// Largest level at which the backing is contiguous around that frame. The MMU checks alignment and slot bounds
    /// itself.
    pub level: Level,
    /// What the host permits. [`Perms::WRITE`] is there if the host lets the page be written, whatever the guest tried.
    pub perms: Perms,
    /// Memory type.
    pub memory_type: MemoryType,
    /// Ignore the guest's PAT (EPT only).
    pub ignore_guest_pat: bool,
}

impl Mapping {
    /// Ordinary write-back memory.
    pub const fn memory(pfn: Pfn, level: Level, perms: Perms) -> Self {
        Self {
            pfn,
            level,
            perms,
            memory_type: MemoryType::WriteBack,
            ignore_guest_pat: false,
        }
    }
}

/// Answer to a backing look-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Backed so.
    Mapped(Mapping),
    /// Cannot be said without sleeping; ask [`Host::lookup_blocking`].
    Blocking,
    /// Cannot be said now; the guest is to try again.
    Retry,
    /// There is no page; the embedder is told by [`MemoryFault`](crate::MemoryFault).
    Failed,
}

/// What must no longer be cached by any vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlushRequest {
    /// Address space.
    pub as_id: AddressSpaceId,
    /// Guest frames whose translations changed.
    pub range: GfnRange,
    /// Whether tables went away: paging-structure caches must be flushed, not only translations.
    pub tables: bool,
}

/// The host, counted. The count lies on lines of its own, because every fault reads what follows it.
pub(crate) type SharedHost<H> = Arc<CachePadded<H>>;

/// What the embedder supplies.
pub trait Host: Send + Sync + 'static {
    /// Where table frames come from.
    type Frames: FrameSource;
    /// What a memory slot knows of its backing.
    type Backing: Clone + Send + Sync + 'static;
    /// The hook to the trusted module of a confidential guest; [`Unprotected`](crate::protected::Unprotected) for others.
    type Protected: ProtectedTable;

    /// The frame source.
    fn frames(&self) -> &Self::Frames;

    /// The hook to the trusted module.
    fn protected(&self) -> &Self::Protected;

    /// Which host frame backs `gfn`, a frame of `slot`, for `access`. Called inside a critical section: must neither
    /// sleep nor call back into the MMU. May be asked up to three times for one fault, whose ways each ask for themselves.
    fn lookup(&self, slot: &Slot<Self::Backing>, gfn: Gfn, access: Access) -> Lookup;

    /// The same outside any critical section: may sleep. Called after [`lookup`](Host::lookup) answered
    /// [`Lookup::Blocking`]; if it answers that too, the fault is to be retried.
    fn lookup_blocking(&self, slot: &Slot<Self::Backing>, gfn: Gfn, access: Access) -> Lookup {
        let _ = (slot, gfn, access);
        Lookup::Failed
    }

    /// Which host frame is to be given to the guest as private memory at `gfn`, a frame of `slot`: as
    /// [`lookup`](Host::lookup). A page is given once; it comes back when what it is mapped by has been removed.
    fn lookup_private(&self, slot: &Slot<Self::Backing>, gfn: Gfn) -> Lookup {
        let _ = (slot, gfn);
        Lookup::Failed
    }

    /// The same outside any critical section: as [`lookup_blocking`](Host::lookup_blocking).
    fn lookup_private_blocking(&self, slot: &Slot<Self::Backing>, gfn: Gfn) -> Lookup {
        let _ = (slot, gfn);
        Lookup::Failed
    }

    /// Returns when no vCPU holds a translation, or with `tables` a paging-structure entry, of `request` that was
    /// cached before the call. May be called from a vCPU thread inside [`Vcpu::fault`](crate::Vcpu::fault): such a vCPU
    /// is not in the guest and flushes before it enters again.
    fn flush(&self, request: &FlushRequest);

    /// Roots have become obsolete. Makes every vCPU leave the guest, returns `true` once each has, and sees to it that none
    /// enters again under an obsolete root: a vCPU loads its root ([`Vcpu::load_root`](crate::Vcpu::load_root)), flushes all that it
    /// has cached if that is another one, says that it is inside, looks at
    /// [`Vcpu::is_root_obsolete`](crate::Vcpu::is_root_obsolete), and turns back if so. With a
    /// [`TlbTracker`](crate::TlbTracker): `tracker.track(kick); true` here, and the look right after
    /// [`TlbVcpu::enter`](crate::TlbVcpu::enter).
    ///
    /// `false`, the default, promises nothing: what obsolete roots map is then zapped and flushed where it matters.
    fn reload_roots(&self) -> bool {
        false
    }
}
