//! A fault and how it ended: the types that pass between an embedder and the MMU.

use crate::host::OutOfFrames;
use crate::stats::Stat;
use tdp_arch::{Access, FaultCode, Gpa, Level};

/// A guest access that could not be translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where.
    pub gpa: Gpa,
    /// What the guest tried.
    pub access: Access,
    /// Nobody waits for it: a present leaf of any permission will do, and the new one is not marked accessed.
    pub prefetch: bool,
    /// Largest leaf to install.
    pub max_level: Level,
    /// The access was to private memory. Says nothing where a bit of the address does
    /// ([`MmuBuilder::shared_bit`](crate::MmuBuilder::shared_bit)).
    pub private: bool,
}

impl Fault {
    /// A fault of `access` at `gpa`.
    pub const fn new(gpa: Gpa, access: Access) -> Self {
        Self {
            gpa,
            access,
            prefetch: false,
            max_level: Level::L3,
            private: false,
        }
    }

    /// A data read.
    pub const fn read(gpa: Gpa) -> Self {
        Self::new(gpa, Access::Read)
    }

    /// A data write.
    pub const fn write(gpa: Gpa) -> Self {
        Self::new(gpa, Access::Write)
    }

    /// An instruction fetch.
    pub const fn execute(gpa: Gpa) -> Self {
        Self::new(gpa, Access::Execute)
    }

    /// What the processor reported, decoded by [`Format::fault_code`](crate::Format::fault_code).
    pub const fn from_code(code: FaultCode, gpa: Gpa) -> Self {
        Self::new(gpa, code.access)
    }

    /// Marks it as an access to private memory.
    #[must_use]
    pub const fn private(mut self) -> Self {
        self.private = true;
        self
    }

    /// Limits the leaf to `level`. On private memory a larger leaf is split: the guest accepts memory by leaves of this
    /// size.
    #[must_use]
    pub const fn max_level(mut self, level: Level) -> Self {
        self.max_level = level;
        self
    }
}

/// Why the guest is to try again. Entering it is right in every case; the access faults anew if it still must.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RetryReason {
    /// Other threads kept changing the same entries.
    Raced,
    /// An entry on the way is frozen for longer than it is worth waiting.
    Frozen,
    /// The host is invalidating the frame.
    Invalidation,
    /// The slot is being removed, moved or changed.
    SlotChanging,
    /// The vCPU's root is obsolete: load the root again before entering.
    RootObsolete,
    /// The backing asked for it.
    Backing,
}

impl RetryReason {
    /// All reasons, in the order in which they are counted.
    pub const ALL: [RetryReason; 6] = [
        RetryReason::Raced,
        RetryReason::Frozen,
        RetryReason::Invalidation,
        RetryReason::SlotChanging,
        RetryReason::RootObsolete,
        RetryReason::Backing,
    ];

    /// A short name, for tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            RetryReason::Raced => "raced",
            RetryReason::Frozen => "frozen",
            RetryReason::Invalidation => "invalidation",
            RetryReason::SlotChanging => "slot_changing",
            RetryReason::RootObsolete => "root_obsolete",
            RetryReason::Backing => "backing",
        }
    }

    pub(crate) const fn stat(self) -> Stat {
        match self {
            RetryReason::Raced => Stat::RetryRaced,
            RetryReason::Frozen => Stat::RetryFrozen,
            RetryReason::Invalidation => Stat::RetryInvalidation,
            RetryReason::SlotChanging => Stat::RetrySlotChanging,
            RetryReason::RootObsolete => Stat::RetryRootObsolete,
            RetryReason::Backing => Stat::RetryBacking,
        }
    }
}

/// Why a fault is the embedder's to deal with; where it happened and what the guest tried is in the [`Fault`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u8)]
pub enum MemoryFault {
    /// The address is wider than the tables can map.
    BeyondWidth,
    /// The backing has no page there, or one that no table can name.
    NotBacked,
    /// The backing does not permit the access.
    NotPermitted,
    /// The access was to shared memory and the frame is private: the embedder decides whether to
    /// [convert](crate::Mmu::convert) it.
    IsPrivate,
    /// The access was to private memory and the frame is shared.
    IsShared,
    /// The guest is being built: its private memory cannot fault yet.
    NotFinalised,
    /// The trusted module refused the page, or gave the VM up.
    Refused,
}

/// How a fault ended.
// Each variant holds at most one byte and the error none, so that the result is returned and matched in registers: one
// that goes through memory, written as bytes and read as a whole, costs as much as a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "says whether to enter the guest, to emulate or to report"]
pub enum Outcome {
    /// The access is possible now, through a leaf of this level. Enter the guest.
    Fixed {
        /// Level of the leaf.
        level: Level,
    },
    /// The access was possible already. Enter the guest.
    Spurious,
    /// Enter the guest and let it fault again.
    Retry(RetryReason),
    /// No memory there, or a write to a read-only slot: emulate the access.
    Mmio {
        /// A slot is there, and read-only.
        read_only: bool,
    },
    /// Tell the guest's owner.
    MemoryFault(MemoryFault),
    /// The vCPU's dirty ring is full: [harvest](crate::DirtyRing::harvest) and
    /// [reset](crate::Mmu::reset_dirty_rings) it, then enter the guest and let it fault again.
    DirtyRingFull,
}

const _: () = assert!(size_of::<Result<Outcome, FaultError>>() == 2);

/// A fault could not be worked on; the tables are as they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultError {
    /// No frame for a table, not even after waiting for grace periods.
    #[error("no table frame is left, not even after waiting for grace periods")]
    OutOfFrames,
}

impl From<OutOfFrames> for FaultError {
    fn from(_: OutOfFrames) -> Self {
        FaultError::OutOfFrames
    }
}
