//! Dirty logging: which pages has the guest written since the last time?
//!
//! Protocol. Each logged slot has a bitmap, one bit a frame. A page is *marked* by whoever lets it be written, and *taken* by
//! whoever collects the log:
//!
//! * marking comes **after** the exchange that makes the leaf writable, in the same critical section;
//! * collecting takes the marks first, then takes the write permission (or the dirty bit) of what was marked, then flushes;
//!   only then does the collector read the pages.
//!
//! Both marking and taking are read-modify-writes of the same word, so they have an order. If the mark comes first, the
//! collector sees the leaf writable and restricts it; if the taking comes first, the mark stays for the next time. A page
//! that was written through a translation cached from before the flush is read after it. So between two flushes no write
//! goes unseen (INV: volatile-atomic). A mark that skipped the write because the bit is set already would break this: it
//! might have seen a bit that is being taken.
//!
//! Where the processor keeps dirty bits they can be used instead ([`DirtyTracking`]): leaves stay writable, and a write
//! leaves its trace in the leaf, or in the processor's own log. Leaves above level 1 are write-protected in any case, because
//! their dirty bit says nothing of which page; the first write splits them. So are trees whose accessed and dirty bits
//! the processor does not keep. Whoever takes a leaf away marks what its dirty bit told, after the exchange and in the same
//! critical section or visit. Who collects looks at the leaves first, then waits for a grace period, then takes the marks: a
//! leaf that the look missed was taken away before it, and has been marked by then.
//!
//! While a slot is logged, faults install leaves of level 1 only, and large ones are split: at once when the log is switched
//! on ([`MmuBuilder::eager_split`](crate::MmuBuilder::eager_split)), or by the first write. When it is switched off, tables
//! are folded back into large leaves.
//!
//! With rings ([`MmuBuilder::dirty_ring`](crate::MmuBuilder::dirty_ring)) a vCPU pushes what it marks into a ring of its own
//! instead, and the bitmap takes what no vCPU marks and what a full ring could not.

mod bitmap;
mod log;
mod mark;
mod ring;
#[cfg(feature = "vm-memory")]
mod vm_memory;

pub(crate) use bitmap::DirtyBitmap;
pub use log::{DirtyLog, DirtyLogError};
pub(crate) use ring::DirtyRings;
pub use ring::{DirtyPage, DirtyRing};
#[cfg(feature = "vm-memory")]
pub use vm_memory::SlotBitmap;

/// How writes are noticed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DirtyTracking {
    /// Leaves are write-protected; the first write to each page faults.
    #[default]
    WriteProtect,
    /// The processor's dirty bits are looked at when the log is collected: no faults, and a look at every leaf of the slot.
    DirtyBit,
    /// The processor logs the address of each page whose dirty bit it sets (Intel's page-modification logging, SDM volume 3,
    /// 29.3.6), and the embedder hands that log over: [`Vcpu::log_modified`](crate::Vcpu::log_modified).
    ModificationLog,
}
