//! The vocabulary of an entry format: what an MMU must be able to say about one 64-bit entry.
//!
//! A format lays out three kinds of 64-bit words and proves at compile time that none can be taken for another:
//!
//! * **MMU-present** entries carry the software bit [`Format::MMU_PRESENT`]: tables, leaves, and leaves that are
//!   *access-tracked* (not present to the processor, their permissions saved in software bits).
//! * **MMIO** entries make the processor report a misconfiguration (EPT) or a reserved bit (NPT) at once and carry
//!   a generation.
//! * **Non-present patterns**: [`Format::EMPTY`], [`Format::FROZEN`] (one thread owns the entry while a hook runs)
//!   and [`Format::SEALED`] (the table is unlinked: walk again from the root).
//!
//! Everything here is a pure function of bits. Who may write which word, and when, is the MMU's business.

use crate::addr::{Gfn, Pfn};
use crate::level::Level;
use core::fmt;

/// Bits of memory-slot generation that an MMIO entry holds.
pub const MMIO_GENERATION_BITS: u32 = 19;

/// One entry of a second-level page table, as the processor reads it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct Spte(pub u64);

impl fmt::Debug for Spte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Spte({:#018x})", self.0)
    }
}

impl fmt::LowerHex for Spte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

bitflags::bitflags! {
    /// What a guest may do with a mapped page.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Perms: u8 {
        /// Read data.
        const READ = 1 << 0;
        /// Write data.
        const WRITE = 1 << 1;
        /// Fetch instructions (with mode-based execute control: from supervisor-mode linear addresses).
        const EXEC = 1 << 2;
        /// Fetch instructions from user-mode linear addresses; the same as [`Perms::EXEC`] without mode-based
        /// execute control.
        const USER_EXEC = 1 << 3;
    }
}

impl Perms {
    /// Everything.
    pub const RWX: Perms = Perms::all();
    /// Read and fetch, no write.
    pub const RX: Perms = Perms::READ.union(Perms::EXEC).union(Perms::USER_EXEC);
    /// Read and write, no fetch.
    pub const RW: Perms = Perms::READ.union(Perms::WRITE);
}

/// Kind of guest access that faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write.
    Write,
    /// Instruction fetch from a supervisor-mode linear address (or without mode-based execute control: any fetch).
    Execute,
    /// Instruction fetch from a user-mode linear address.
    UserExecute,
}

impl Access {
    /// The permission that this access needs.
    #[inline]
    pub const fn needs(self) -> Perms {
        match self {
            Access::Read => Perms::READ,
            Access::Write => Perms::WRITE,
            Access::Execute => Perms::EXEC,
            Access::UserExecute => Perms::USER_EXEC,
        }
    }

    /// Whether this is [`Access::Write`].
    #[inline]
    pub const fn is_write(self) -> bool {
        matches!(self, Access::Write)
    }

    /// Whether this is a fetch of either kind.
    #[inline]
    pub const fn is_execute(self) -> bool {
        matches!(self, Access::Execute | Access::UserExecute)
    }
}

/// Effective memory type of a leaf, with the encoding of EPT (SDM 29.3.7.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum MemoryType {
    /// Uncacheable.
    Uncacheable = 0,
    /// Write combining.
    WriteCombining = 1,
    /// Write through.
    WriteThrough = 4,
    /// Write protected.
    WriteProtected = 5,
    /// Write back.
    #[default]
    WriteBack = 6,
}

/// Who keeps the accessed and dirty bits of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum AdBits {
    /// The processor sets them on access.
    #[default]
    Processor,
    /// The processor does not; aging takes the permissions away instead (access tracking).
    Software,
}

/// Everything about a leaf except where it points.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeafAttrs {
    /// What the guest may do. Without [`Perms::READ`] only an execute-only EPT leaf is meaningful.
    pub perms: Perms,
    /// Memory type.
    pub memory_type: MemoryType,
    /// Ignore the guest's PAT (EPT only).
    pub ignore_guest_pat: bool,
    /// Who keeps the accessed and dirty bits.
    pub ad_bits: AdBits,
    /// Initial accessed bit.
    pub accessed: bool,
    /// Initial dirty bit.
    pub dirty: bool,
    /// The host lets this page be written at all.
    pub host_writable: bool,
    /// The MMU may turn the write permission on again without asking (never set without `host_writable`).
    pub mmu_writable: bool,
}

impl LeafAttrs {
    /// A leaf for guest memory: write back, accessed, and if `perms` has [`Perms::WRITE`] dirty and writable for
    /// host and MMU.
    pub const fn memory(perms: Perms) -> Self {
        let write = perms.contains(Perms::WRITE);
        Self {
            perms,
            memory_type: MemoryType::WriteBack,
            ignore_guest_pat: false,
            ad_bits: AdBits::Processor,
            accessed: true,
            dirty: write,
            host_writable: write,
            mmu_writable: write,
        }
    }
}

/// What an MMIO entry remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MmioEntry {
    /// Frame that the guest addressed.
    pub gfn: Gfn,
    /// Low [`MMIO_GENERATION_BITS`] bits of the memory-slot generation when the entry was made.
    pub generation: u32,
}

/// An entry, told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decoded {
    /// Nothing here.
    Empty,
    /// Owned by a thread whose hook is running.
    Frozen,
    /// The table that holds this entry is unlinked.
    Sealed,
    /// Known to be device memory.
    Mmio(MmioEntry),
    /// Points to a table of the next lower level.
    Table(Pfn),
    /// Maps memory.
    Leaf {
        /// First host frame.
        pfn: Pfn,
        /// What the guest may do now; for an access-tracked leaf, what it may do again once restored.
        perms: Perms,
        /// Not present to the processor, permissions saved.
        access_tracked: bool,
    },
    /// A word that this library never writes.
    Unknown,
}

/// A second-level fault as the processor reported it, told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FaultCode {
    /// What the guest tried. A read-modify-write counts as a write.
    pub access: Access,
    /// The translation existed and did not permit the access.
    pub present: bool,
    /// A reserved bit was set (NPT). EPT reports misconfigurations by another exit.
    pub reserved: bool,
    /// The access was one of the processor's own to a guest page table.
    pub guest_table_walk: bool,
}

/// An entry format. Implemented by zero-sized types; chosen at compile time.
pub trait Format: Copy + Default + fmt::Debug + Send + Sync + 'static {
    /// Its name, for messages.
    const NAME: &'static str;
    /// Nothing here. A fresh table is filled with it.
    const EMPTY: Spte;
    /// See [`Decoded::Frozen`].
    const FROZEN: Spte;
    /// See [`Decoded::Sealed`].
    const SEALED: Spte;
    /// Software bit of every table and leaf.
    const MMU_PRESENT: u64;
    /// Hardware bit that tells a large leaf from a table at levels 2 and 3.
    const LARGE: u64;
    /// Hardware bit: the guest may write.
    const WRITABLE: u64;
    /// Hardware bit: accessed.
    const ACCESSED: u64;
    /// Hardware bit: dirty.
    const DIRTY: u64;
    /// Software bit: the host lets this page be written.
    const HOST_WRITABLE: u64;
    /// Software bit: the MMU may set [`Format::WRITABLE`] again by itself.
    const MMU_WRITABLE: u64;
    /// Software bit of a leaf: the processor does not keep its accessed and dirty bits.
    const AD_SOFTWARE: u64;
    /// Software bit of a table entry: the table stands where a large leaf was forbidden only because of an
    /// instruction fetch. Of a large leaf: fetches that the host permits are withheld.
    const NX_SPLIT: u64;
    /// Bits 12 to 51.
    const PFN_MASK: u64 = 0x000f_ffff_ffff_f000;

    /// An entry that points to the table at `pfn`, with every permission.
    fn table(pfn: Pfn) -> Spte;

    /// A leaf of `level` (1 to 3) at `pfn`, which must be aligned to the level.
    fn leaf(pfn: Pfn, level: Level, attrs: LeafAttrs) -> Spte;

    /// An MMIO entry of level 1, or `None` if this format cannot express it for this `gfn` and a processor with
    /// `physical_bits` bits of physical address.
    fn mmio(gfn: Gfn, generation: u64, physical_bits: u32) -> Option<Spte>;

    /// Decodes an MMIO entry; `None` for anything else.
    fn mmio_entry(spte: Spte) -> Option<MmioEntry>;

    /// What the processor lets a guest do through this leaf, ignoring the levels above it.
    fn perms(spte: Spte) -> Perms;

    /// Whether a leaf that permits `perms` is one that the processor accepts.
    fn can_express(perms: Perms) -> bool;

    /// Takes the permissions of a leaf away and saves them (all but write).
    fn access_track(spte: Spte) -> Spte;

    /// Gives an access-tracked leaf its saved permissions back.
    fn restore_access_tracked(spte: Spte) -> Spte;

    /// A leaf that is not access-tracked, with fetches of either kind permitted.
    fn permit_fetch(spte: Spte) -> Spte;

    /// The `index`-th leaf (0 to 511) of level `level - 1` that maps the same memory as the large leaf `spte` of
    /// `level` (2 or 3) with the same permissions and software bits.
    fn split_child(spte: Spte, level: Level, index: usize) -> Spte;

    /// The register value that makes the processor walk the root table of `level` (4 or 5) at `pfn`.
    fn root_pointer(pfn: Pfn, level: Level, ad_bits: AdBits) -> u64;

    /// Reads the processor's fault report (EPT: the exit qualification; NPT: EXITINFO1).
    fn fault_code(raw: u64) -> FaultCode;

    /// Whether `spte` is a table or a leaf (access-tracked leaves included).
    #[inline(always)]
    fn is_mmu_present(spte: Spte) -> bool {
        spte.0 & Self::MMU_PRESENT != 0
    }

    /// Whether `spte`, an entry of level 2 or higher, points to a table.
    #[inline(always)]
    fn is_table(spte: Spte) -> bool {
        spte.0 & (Self::MMU_PRESENT | Self::LARGE) == Self::MMU_PRESENT
    }

    /// Whether `spte`, an entry of `level`, maps memory.
    #[inline(always)]
    fn is_leaf(spte: Spte, level: Level) -> bool {
        Self::is_mmu_present(spte) && (matches!(level, Level::L1) || spte.0 & Self::LARGE != 0)
    }

    /// Host frame of a table entry or of a leaf of level 1.
    #[inline(always)]
    fn pfn(spte: Spte) -> Pfn {
        Pfn((spte.0 & Self::PFN_MASK) >> 12)
    }

    /// The leaf `spte`, which is at frame 0, at frame `pfn` instead, which must be one that an entry can name, and aligned to
    /// its level.
    #[inline(always)]
    fn with_pfn(spte: Spte, pfn: Pfn) -> Spte {
        debug_assert!(pfn.0 <= Self::PFN_MASK >> 12, "{pfn:?} is no host frame");
        Spte(spte.0 | pfn.0 << 12)
    }

    /// First host frame of a leaf of `level`.
    #[inline(always)]
    fn leaf_pfn(spte: Spte, level: Level) -> Pfn {
        Pfn(((spte.0 & Self::PFN_MASK) >> 12) & !(level.pages() - 1))
    }

    /// Whether the guest's `access` would pass this leaf.
    #[inline(always)]
    fn allows(spte: Spte, access: Access) -> bool {
        Self::perms(spte).contains(access.needs())
    }

    /// Whether `spte`, a leaf, is access-tracked.
    #[inline(always)]
    fn is_access_tracked(spte: Spte) -> bool {
        Self::is_mmu_present(spte) && Self::perms(spte).is_empty()
    }

    /// Tells an entry of `level` apart.
    fn decode(spte: Spte, level: Level) -> Decoded {
        if spte == Self::EMPTY {
            Decoded::Empty
        } else if spte == Self::FROZEN {
            Decoded::Frozen
        } else if spte == Self::SEALED {
            Decoded::Sealed
        } else if let Some(mmio) = Self::mmio_entry(spte) {
            Decoded::Mmio(mmio)
        } else if !Self::is_mmu_present(spte) {
            Decoded::Unknown
        } else if Self::is_leaf(spte, level) {
            let access_tracked = Self::is_access_tracked(spte);
            let shown = if access_tracked {
                Self::restore_access_tracked(spte)
            } else {
                spte
            };
            Decoded::Leaf {
                pfn: Self::leaf_pfn(spte, level),
                perms: Self::perms(shown),
                access_tracked,
            }
        } else {
            Decoded::Table(Self::pfn(spte))
        }
    }
}
