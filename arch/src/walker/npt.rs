//! Walk of AMD's nested page tables.
//!
//! Written from the APM, volume 2: long-mode translation and entry formats (5.3.3, 5.3.4 and their figures), table
//! entry fields (5.4), page protection (5.6), nested paging (15.25: table walks 15.25.5, faults 15.25.6).
//!
//! Facts of 15.25 that differ from ordinary paging:
//!
//! * Every access is a *user* access at the nested level, so that U/S must be set in the entries of all levels; the
//!   host's CR0.WP is ignored, so that R/W always protects.
//! * Walks of the guest's own page tables are user *writes* at the nested level, whatever the access that caused
//!   them: the page that holds a guest table must be writable, and becomes dirty.
//! * EXITINFO1 says in bit 32 or 33 whether the final page or a guest table was the aim.
//!
//! Not modelled, and so ignored as on a processor without them: guest mode execute trap, shadow stacks, encrypted
//! and secure nested paging. The C-bit of memory encryption narrows [`NptConfig::physical_bits`].

use super::{
    Cause, ConfigError, Cursor, Entry, GuestAccess, LeafMemoryType, Permissions, PhysicalMemory,
    Rules, Translation, WalkError, Walker, beyond_width, check, walk_on,
};
use crate::addr::{Gpa, Hpa};
use crate::level::Level;
use core::fmt;

// APM 5.4.1. Every name is a bit of an entry.
const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const WRITE_THROUGH: u64 = 1 << 3;
const CACHE_DISABLE: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
/// Page size in a PDPE or PDE.
const PAGE_SIZE: u64 = 1 << 7;
/// PAT in a PTE, at the place of the page-size bit.
const PAT: u64 = 1 << 7;
/// PAT in an entry that maps a large page.
const LARGE_PAT: u64 = 1 << 12;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

// APM 15.25.6. Every name is a bit of EXITINFO1.
const FAULT_PRESENT: u64 = 1 << 0;
const FAULT_WRITE: u64 = 1 << 1;
const FAULT_USER: u64 = 1 << 2;
const FAULT_RESERVED: u64 = 1 << 3;
const FAULT_FETCH: u64 = 1 << 4;
const FAULT_FINAL: u64 = 1 << 32;
const FAULT_TABLE: u64 = 1 << 33;

/// What the processor supports and how the host is set up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NptConfig {
    /// [`Level::L4`], or [`Level::L5`] if the host runs with CR4.LA57.
    pub root_level: Level,
    /// Physical-address width, 32 to 52.
    pub physical_bits: u32,
    /// Whether the host runs with EFER.NXE. Without it bit 63 is reserved.
    pub no_execute: bool,
    /// Whether 1 GiB pages exist (CPUID 8000_0001h EDX bit 26).
    pub pages_1g: bool,
}

impl Default for NptConfig {
    /// A recent processor: four levels, 52 bits, no-execute and 1 GiB pages.
    fn default() -> Self {
        Self {
            root_level: Level::L4,
            physical_bits: 52,
            no_execute: true,
            pages_1g: true,
        }
    }
}

/// Processor that walks nested page tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NptWalker {
    config: NptConfig,
    /// Bits 51:N, and 63 without EFER.NXE.
    always_reserved: u64,
}

impl NptWalker {
    /// Processor with this configuration.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if there is no such tree or address width.
    pub const fn new(config: NptConfig) -> Result<Self, ConfigError> {
        match check(config.root_level, config.physical_bits) {
            Ok(()) => Ok(Self {
                config,
                always_reserved: beyond_width(config.physical_bits)
                    | if config.no_execute { 0 } else { NO_EXECUTE },
            }),
            Err(error) => Err(error),
        }
    }

    /// Its configuration.
    pub const fn config(&self) -> &NptConfig {
        &self.config
    }

    /// Bits that must be zero in a present entry.
    const fn reserved(&self, level: Level, entry: u64) -> u64 {
        let large = entry & PAGE_SIZE != 0;
        let in_format = match level {
            // Figures 5-18 and following, PML5E and PML4E: 8:7.
            Level::L5 | Level::L4 => 0b11 << 7,
            Level::L3 if large && !self.config.pages_1g => PAGE_SIZE,
            // Large pages: the address bits below their size except PAT, 29:13 and 20:13.
            Level::L3 | Level::L2 if large => (level.bytes() - 1) & ADDRESS & !LARGE_PAT,
            Level::L3 | Level::L2 | Level::L1 => 0,
        };
        in_format | self.always_reserved
    }
}

impl Walker for NptWalker {
    type Fault = NptFault;

    #[inline]
    fn root_level(&self) -> Level {
        self.config.root_level
    }

    /// Walks of guest page tables are always treated as user writes (15.25.5), loads of PDPTEs included: they are
    /// part of the walk here.
    #[inline]
    fn needs(&self, access: GuestAccess) -> Permissions {
        match access {
            GuestAccess::Read => Permissions::READ,
            GuestAccess::Write
            | GuestAccess::TableRead
            | GuestAccess::TableWrite
            | GuestAccess::PdpteLoad => Permissions::WRITE,
            GuestAccess::Fetch => Permissions::EXEC,
            GuestAccess::UserFetch => Permissions::USER_EXEC,
        }
    }

    /// Always: there is no control that turns them off.
    #[inline]
    fn keeps_flags(&self) -> bool {
        true
    }

    /// For a denied permission: software that only removes a restriction need not invalidate anything, the processor
    /// looks at the tables again before it faults (5.5.2).
    #[inline]
    fn repeats_before(&self, fault: &NptFault) -> bool {
        fault.exit_info_1 & (FAULT_PRESENT | FAULT_RESERVED) == FAULT_PRESENT
    }

    #[inline]
    fn walk_on<M: PhysicalMemory + ?Sized>(
        &self,
        memory: &M,
        from: Cursor,
        gpa: Gpa,
        access: GuestAccess,
        passed: impl FnMut(Cursor),
    ) -> Result<Translation, WalkError<NptFault>> {
        walk_on(self, memory, from, gpa, access, passed)
    }
}

impl Rules for NptWalker {
    const ACCESSED: u64 = ACCESSED;
    const DIRTY: u64 = DIRTY;

    #[inline]
    fn decode(&self, level: Level, entry: u64) -> Result<Entry, Cause> {
        if entry & PRESENT == 0 {
            return Err(Cause::NotPresent { entry });
        }
        if entry & self.reserved(level, entry) != 0 {
            return Err(Cause::Malformed);
        }
        // A user access: without U/S nothing is allowed.
        let mut permissions = Permissions::empty();
        if entry & USER != 0 {
            permissions |= Permissions::READ;
            if entry & WRITE != 0 {
                permissions |= Permissions::WRITE;
            }
            if entry & NO_EXECUTE == 0 {
                permissions |= Permissions::EXEC | Permissions::USER_EXEC;
            }
        }
        let (base, pat) = match level.below() {
            Some(below) if entry & PAGE_SIZE == 0 => {
                return Ok(Entry::Table {
                    table: Hpa(entry & ADDRESS),
                    level: below,
                    permissions,
                });
            }
            Some(_) => (entry & ADDRESS & !LARGE_PAT, entry & LARGE_PAT),
            None => (entry & ADDRESS, entry & PAT),
        };
        let index = |bit: u64, weight: u8| if bit != 0 { weight } else { 0 };
        let pat_index =
            index(pat, 4) + index(entry & CACHE_DISABLE, 2) + index(entry & WRITE_THROUGH, 1);
        Ok(Entry::Page {
            base: Hpa(base),
            permissions,
            memory_type: LeafMemoryType::Npt { pat_index },
        })
    }

    #[cold]
    fn fault(&self, cause: Cause, gpa: Gpa, access: GuestAccess) -> NptFault {
        let mut exit_info_1 = FAULT_USER;
        exit_info_1 |= match cause {
            Cause::OutOfReach | Cause::NotPresent { .. } => 0,
            Cause::Malformed => FAULT_PRESENT | FAULT_RESERVED,
            Cause::Denied { .. } => FAULT_PRESENT,
        };
        exit_info_1 |= if access.is_to_paging_structure() {
            FAULT_TABLE
        } else {
            FAULT_FINAL
        };
        if self.needs(access).contains(Permissions::WRITE) {
            exit_info_1 |= FAULT_WRITE;
        }
        // The bit is defined only with EFER.NXE (8.4.2).
        if access.is_fetch() && self.config.no_execute {
            exit_info_1 |= FAULT_FETCH;
        }
        NptFault {
            exit_info_1,
            exit_info_2: gpa,
        }
    }
}

/// Nested page fault, as #VMEXIT(NPF) reports it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct NptFault {
    /// Error code: bit 0 present, 1 write, 2 user (always set), 3 reserved bit, 4 instruction fetch, 32 final page,
    /// 33 guest page table (APM 15.25.6).
    ///
    /// An address with bits that no level of the tree looks at is reported as if an entry were missing.
    pub exit_info_1: u64,
    /// Guest physical address that did not translate.
    pub exit_info_2: Gpa,
}

impl NptFault {
    /// Guest physical address that did not translate.
    pub const fn gpa(&self) -> Gpa {
        self.exit_info_2
    }
}

impl fmt::Display for NptFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "nested page fault at {}, error code {:#x}",
            self.exit_info_2, self.exit_info_1
        )
    }
}

impl core::error::Error for NptFault {}
