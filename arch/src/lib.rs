//! Entry formats of second-level page tables, a reference page walker and a software vCPU.
//!
//! This crate knows bits, not policy. It has three independent rooms:
//!
//! * **encoders** ([`Format`], [`Ept`], [`Npt`]): what the MMU writes into a table, hardware bits and software bits;
//! * **walkers** ([`walker`]): what the processor does with those bits, written from the manuals and sharing no
//!   constant with the encoders, so that one can be tested against the other;
//! * **software vCPU** ([`cpu`]): a walker behind a TLB and a paging-structure cache that keep stale entries until
//!   they are flushed.
//!
//! It builds without `std` and without `alloc`, and names no atomics: whoever owns the memory supplies the loads
//! and the compare-exchange that the walker needs.
//!
//! Manuals: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 3 ("SDM"); AMD64 Architecture
//! Programmer's Manual, volume 2 ("APM").
#![no_std]
#![warn(missing_docs)]

pub mod addr;
pub mod cpu;
mod ept;
mod format;
mod level;
mod npt;
pub mod walker;

pub use addr::{Gfn, GfnRange, Gpa, Hpa, PAGE_SHIFT, PAGE_SIZE, Pfn};
pub use ept::Ept;
pub use format::{
    Access, AdBits, Decoded, FaultCode, Format, LeafAttrs, MMIO_GENERATION_BITS, MemoryType,
    MmioEntry, Perms, Spte,
};
pub use level::{ENTRIES_PER_TABLE, Level};
pub use npt::Npt;
