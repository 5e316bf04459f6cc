//! A lock-free two-dimensional-paging MMU: the part of a hypervisor or VMM that turns guest-physical faults into
//! second-level page-table entries, from all vCPUs at once.
//!
//! The embedder owns guest memory and supplies frames, backing and TLB flushes ([`Host`]); the library owns the tables.
//! An RCU-protected walk finds the entry, or the vCPU's memory of an earlier one does; a compare-exchange changes it; and a
//! table page that was unlinked is freed only after a flush and a grace period.
//!
//! ```
//! use tdp::{Ept, Fault, Gfn, Gpa, Level, Mmu, Outcome, Pfn, Slot};
//! use tdp::{AddressSpaceId, LinearBacking, MmapPool, PoolConfig, SoftwareHost};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Frames for tables; guest memory itself is only numbers here.
//! let frames = MmapPool::new(PoolConfig { frames: 64, base: Pfn(0x1000), huge_pages: false })?;
//! let mmu = Mmu::<Ept, _>::builder(SoftwareHost::new(frames)).build()?;
//!
//! // 4 GiB of guest memory, backed by host frames from 0x10_0000 on, by leaves of up to 2 MiB.
//! let backing = LinearBacking::new(Pfn(0x10_0000), Level::L2);
//! mmu.slots().insert(Slot::new(Gfn(0)..Gfn(1 << 20), backing))?;
//!
//! // One handle per vCPU thread.
//! let mut vcpu = mmu.vcpu()?;
//! assert_eq!(vcpu.fault(Fault::write(Gpa(0x20_1000)))?, Outcome::Fixed { level: Level::L2 });
//! assert_eq!(vcpu.fault(Fault::read(Gpa(0x20_2000)))?, Outcome::Spurious);
//!
//! // Sweeps run beside faults, and say what must be flushed.
//! let pending = mmu.zap(AddressSpaceId(0), Gfn(0)..Gfn(1 << 20));
//! assert_eq!(pending.leaves(), 1);
//! pending.flush();
//! # Ok(())
//! # }
//! ```
#![no_std]

extern crate alloc;
#[cfg(feature = "std")]
extern crate std;

mod attributes;
mod confidential;
mod dirty;
mod dump;
mod entry;
mod event;
mod fault;
mod frozen;
#[cfg(feature = "vm-memory")]
mod guest_memory;
mod handoff;
mod host;
mod install;
mod invalidate;
mod iter;
#[cfg(all(test, feature = "std", not(loom)))]
mod layout;
mod life;
mod memo;
mod mmio;
mod mmu;
mod nx;
#[cfg(feature = "std")]
mod pool;
mod prefault;
mod private_fault;
pub mod protected;
mod range;
mod reclaim;
mod repair;
mod resolve;
mod root;
mod slot_map;
mod slots;
#[cfg(feature = "std")]
mod software;
mod stats;
mod table;
mod teardown;
mod tlb;
mod vcpu;

use range::zap as range_zap;

/// The guide for embedders, whose examples are tests of this crate.
#[cfg(all(doctest, feature = "std"))]
#[doc = include_str!("../../docs/embedding.md")]
mod embedding_guide {}

pub use attributes::Visibility;
pub use confidential::Phase;
#[cfg(feature = "vm-memory")]
pub use dirty::SlotBitmap;
pub use dirty::{DirtyLog, DirtyLogError, DirtyPage, DirtyRing, DirtyTracking};
pub use dump::{Dump, DumpKind, DumpLine, DumpTree};
pub use entry::TablePage;
pub use fault::{Fault, FaultError, MemoryFault, Outcome, RetryReason};
pub use frozen::{EntryPlace, FrozenEntry};
#[cfg(feature = "vm-memory")]
pub use guest_memory::GuestMemoryError;
pub use host::{
    AddressSpaceId, FlushRequest, FrameSource, Host, Lookup, MAX_ADDRESS_SPACES, Mapping,
    OutOfFrames,
};
pub use invalidate::Invalidation;
pub use life::{AccessInfo, FoldError, ImageError, PrivateImage, ProtectedAudit};
pub use mmu::{BuildError, Mmu, MmuBuilder, MmuError};
#[cfg(feature = "std")]
pub use pool::{MmapPool, PoolConfig, PoolError};
pub use prefault::Prefaulted;
pub use protected::ProtectedTable;
pub use range::{
    Absorb, Audit, ConvertError, Entry, Folded, Leaf, Progress, RemovalError, Removed, SplitReport,
    SplitStopped, Steps,
};
pub use root::LoadedRoot;
pub use slot_map::Slots;
pub use slots::{Slot, SlotError, SlotFlags, SlotId};
#[cfg(feature = "std")]
pub use software::{LinearBacking, SoftwareHost, TableMemory};
pub use stats::{ProtectedStats, Stats};
pub use tdp_arch::{
    Access, AdBits, Decoded, Ept, FaultCode, Format, Gfn, GfnRange, Gpa, Hpa, LeafAttrs, Level,
    MemoryType, Npt, PAGE_SIZE, Perms, Pfn, Spte,
};
pub use teardown::{RootTeardown, SlotRemoval};
pub use tlb::{Flushed, PendingFlush, TlbTracker, TlbVcpu};
pub use vcpu::{Batch, Vcpu};
