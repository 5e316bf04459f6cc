//! Walk of Intel's extended page tables.
//!
//! Written from the SDM, volume 3, chapter "VMX Support for Address Translation" (29.3 in editions since 2023, 28.3
//! before): the translation mechanism and the entry formats (29.3.2, tables 29-1 to 29-7), misconfigurations
//! (29.3.3.1), violations (29.3.3.2), their priority (29.3.3.3), accessed and dirty flags (29.3.5); exit
//! qualification from table 28-7 ("Exit Qualification for EPT Violations"); #VE from 26.5.7.1.
//!
//! Not modelled, and so ignored or zero as on a processor without them: page-modification logging, sub-page
//! permissions, shadow-stack and guest-paging-verification bits (57, 58, 60, 61), and the advanced information in
//! bits 9 to 11 of the exit qualification.

use super::{
    Cause, ConfigError, Cursor, Entry, GuestAccess, LeafMemoryType, Permissions, PhysicalMemory,
    Rules, Translation, WalkError, Walker, beyond_width, check, walk_on,
};
use crate::addr::{Gpa, Hpa};
use crate::level::Level;
use core::fmt;

// Table 29-1 and following. Every name is a bit of an entry.
const READ: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const EXEC: u64 = 1 << 2;
const MEMORY_TYPE_SHIFT: u32 = 3;
const MEMORY_TYPE: u64 = 0b111 << MEMORY_TYPE_SHIFT;
const IGNORE_PAT: u64 = 1 << 6;
const MAPS_PAGE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
const USER_EXEC: u64 = 1 << 10;
const SUPPRESS_VE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What the processor supports and how the VM is set up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EptConfig {
    /// [`Level::L4`] or [`Level::L5`]: EPTP bits 5:3 plus one.
    pub root_level: Level,
    /// Physical-address width (MAXPHYADDR), 32 to 52.
    pub physical_bits: u32,
    /// Whether execute without read is allowed (IA32_VMX_EPT_VPID_CAP bit 0).
    pub execute_only: bool,
    /// Whether 2 MiB pages exist (IA32_VMX_EPT_VPID_CAP bit 16).
    pub pages_2m: bool,
    /// Whether 1 GiB pages exist (IA32_VMX_EPT_VPID_CAP bit 17).
    pub pages_1g: bool,
    /// Whether accessed and dirty flags are kept (EPTP bit 6).
    pub accessed_dirty: bool,
    /// Mode-based execute control: bit 2 is for supervisor-mode and bit 10 for user-mode linear addresses.
    pub mode_based_execute: bool,
}

impl Default for EptConfig {
    /// A recent processor with four levels, 52 bits, accessed and dirty flags; without mode-based execute control.
    fn default() -> Self {
        Self {
            root_level: Level::L4,
            physical_bits: 52,
            execute_only: true,
            pages_2m: true,
            pages_1g: true,
            accessed_dirty: true,
            mode_based_execute: false,
        }
    }
}

/// Processor that walks extended page tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EptWalker {
    config: EptConfig,
    /// Bits of which one must be set for an entry to be present.
    present: u64,
    /// Bits 51:N.
    beyond_width: u64,
}

impl EptWalker {
    /// Processor with this configuration.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if there is no such tree or address width.
    pub const fn new(config: EptConfig) -> Result<Self, ConfigError> {
        match check(config.root_level, config.physical_bits) {
            Ok(()) => Ok(Self {
                config,
                present: READ
                    | WRITE
                    | EXEC
                    | if config.mode_based_execute {
                        USER_EXEC
                    } else {
                        0
                    },
                beyond_width: beyond_width(config.physical_bits),
            }),
            Err(error) => Err(error),
        }
    }

    /// Its configuration.
    pub const fn config(&self) -> &EptConfig {
        &self.config
    }

    /// Bits that table 29-1 and following reserve in a present entry, bits 51:N included.
    const fn reserved(&self, level: Level, entry: u64) -> u64 {
        let maps_page = entry & MAPS_PAGE != 0;
        let in_format = match level {
            // PML5E and PML4E: 7:3.
            Level::L5 | Level::L4 => 0b1_1111 << 3,
            // A large page of a size that the processor lacks: bit 7 itself.
            Level::L3 if maps_page && !self.config.pages_1g => MAPS_PAGE,
            Level::L2 if maps_page && !self.config.pages_2m => MAPS_PAGE,
            // Large pages: the address bits below their size, 29:12 and 20:12.
            Level::L3 | Level::L2 if maps_page => (level.bytes() - 1) & ADDRESS,
            // PDPTE and PDE that reference a table: 6:3.
            Level::L3 | Level::L2 => 0b1111 << 3,
            Level::L1 => 0,
        };
        in_format | self.beyond_width
    }

    const fn permissions(&self, entry: u64) -> Permissions {
        let mut permissions = Permissions::empty();
        if entry & READ != 0 {
            permissions = permissions.union(Permissions::READ);
        }
        if entry & WRITE != 0 {
            permissions = permissions.union(Permissions::WRITE);
        }
        if entry & EXEC != 0 {
            permissions = permissions.union(Permissions::EXEC);
        }
        let user_exec = if self.config.mode_based_execute {
            USER_EXEC
        } else {
            EXEC
        };
        if entry & user_exec != 0 {
            permissions = permissions.union(Permissions::USER_EXEC);
        }
        permissions
    }

    /// Table 28-7 for an access whose translation allows `permissions`.
    const fn qualification(&self, access: GuestAccess, permissions: Permissions) -> u64 {
        let mut qualification = match access {
            GuestAccess::Read | GuestAccess::PdpteLoad => 1 << 0,
            GuestAccess::Write => 1 << 1,
            GuestAccess::Fetch | GuestAccess::UserFetch => 1 << 2,
            // With flags enabled the processor sets both (note to bit 0). Without them an update is a
            // read-modify-write, which sets bit 1 and may or may not set bit 0; here it does not.
            GuestAccess::TableRead | GuestAccess::TableWrite if self.config.accessed_dirty => 0b11,
            GuestAccess::TableRead => 1 << 0,
            GuestAccess::TableWrite => 1 << 1,
        };
        // Bits 3, 4, 5: AND of bits 0, 1, 2 of the entries used. Bit 6: AND of bit 10, undefined (here 0) without
        // mode-based execute control.
        if permissions.contains(Permissions::READ) {
            qualification |= 1 << 3;
        }
        if permissions.contains(Permissions::WRITE) {
            qualification |= 1 << 4;
        }
        if permissions.contains(Permissions::EXEC) {
            qualification |= 1 << 5;
        }
        if self.config.mode_based_execute && permissions.contains(Permissions::USER_EXEC) {
            qualification |= 1 << 6;
        }
        // Bit 7: there is a guest-linear address. Bit 8: the access is to what that address translates to.
        if !matches!(access, GuestAccess::PdpteLoad) {
            qualification |= 1 << 7;
            if !access.is_to_paging_structure() {
                qualification |= 1 << 8;
            }
        }
        qualification
    }
}

impl Walker for EptWalker {
    type Fault = EptFault;

    #[inline]
    fn root_level(&self) -> Level {
        self.config.root_level
    }

    /// With EPTP bit 6 set, accesses to guest paging structures are treated as writes (29.3.3.2); loads of PDPTEs are
    /// reads all the same.
    #[inline]
    fn needs(&self, access: GuestAccess) -> Permissions {
        match access {
            GuestAccess::Read | GuestAccess::PdpteLoad => Permissions::READ,
            GuestAccess::Write | GuestAccess::TableWrite => Permissions::WRITE,
            GuestAccess::TableRead if self.config.accessed_dirty => Permissions::WRITE,
            GuestAccess::TableRead => Permissions::READ,
            GuestAccess::Fetch => Permissions::EXEC,
            GuestAccess::UserFetch => Permissions::USER_EXEC,
        }
    }

    #[inline]
    fn keeps_flags(&self) -> bool {
        self.config.accessed_dirty
    }

    /// Never: a violation that rests on cached information is delivered, and drops that information (29.4.3.1).
    #[inline]
    fn repeats_before(&self, _fault: &EptFault) -> bool {
        false
    }

    #[inline]
    fn walk_on<M: PhysicalMemory + ?Sized>(
        &self,
        memory: &M,
        from: Cursor,
        gpa: Gpa,
        access: GuestAccess,
        passed: impl FnMut(Cursor),
    ) -> Result<Translation, WalkError<EptFault>> {
        walk_on(self, memory, from, gpa, access, passed)
    }
}

impl Rules for EptWalker {
    const ACCESSED: u64 = ACCESSED;
    const DIRTY: u64 = DIRTY;

    #[inline]
    fn decode(&self, level: Level, entry: u64) -> Result<Entry, Cause> {
        if entry & self.present == 0 {
            return Err(Cause::NotPresent { entry });
        }
        // 29.3.3.1: writable but not readable; executable (a present entry that is neither readable nor writable must
        // be, in one mode or the other) but not readable where that is not supported; reserved bits.
        if entry & READ == 0 && (entry & WRITE != 0 || !self.config.execute_only) {
            return Err(Cause::Malformed);
        }
        if entry & self.reserved(level, entry) != 0 {
            return Err(Cause::Malformed);
        }
        let permissions = self.permissions(entry);
        match level.below() {
            Some(below) if entry & MAPS_PAGE == 0 => Ok(Entry::Table {
                table: Hpa(entry & ADDRESS),
                level: below,
                permissions,
            }),
            // Bit 7 of a PTE is ignored.
            _ => {
                let memory_type = ((entry & MEMORY_TYPE) >> MEMORY_TYPE_SHIFT) as u8;
                if matches!(memory_type, 2 | 3 | 7) {
                    return Err(Cause::Malformed);
                }
                Ok(Entry::Page {
                    base: Hpa(entry & ADDRESS),
                    permissions,
                    memory_type: LeafMemoryType::Ept {
                        memory_type,
                        ignore_pat: entry & IGNORE_PAT != 0,
                    },
                })
            }
        }
    }

    #[cold]
    fn fault(&self, cause: Cause, gpa: Gpa, access: GuestAccess) -> EptFault {
        let (entry, permissions) = match cause {
            Cause::Malformed => return EptFault::Misconfiguration { gpa },
            // No entry was read, so that none can ask for a #VE.
            Cause::OutOfReach => (SUPPRESS_VE, Permissions::empty()),
            // Bits 2:0 (and 10) of that entry are zero, and so is the AND.
            Cause::NotPresent { entry } => (entry, Permissions::empty()),
            Cause::Denied { entry, permissions } => (entry, permissions),
        };
        EptFault::Violation(EptViolation {
            gpa,
            qualification: self.qualification(access, permissions),
            convertible: entry & SUPPRESS_VE == 0,
        })
    }
}

/// EPT violation, as the VM exit (basic reason 48) reports it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EptViolation {
    /// Guest-physical address field.
    pub gpa: Gpa,
    /// Exit qualification; bits 6:0 say what was wanted and allowed, bits 7 and 8 on whose behalf (table 28-7).
    pub qualification: u64,
    /// Whether it may become a virtualization exception: bit 63 (suppress #VE) of the entry that was not present or
    /// that maps the page is clear (26.5.7.1).
    pub convertible: bool,
}

/// What the processor reports when a guest-physical address does not translate.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum EptFault {
    /// An entry is not present or the access is not allowed.
    ///
    /// An address with bits that no level of the tree looks at is reported as if an entry were missing.
    Violation(EptViolation),
    /// An entry has a value that is reserved (basic exit reason 49, no exit qualification).
    Misconfiguration {
        /// Guest-physical address field.
        gpa: Gpa,
    },
}

impl EptFault {
    /// Guest-physical address that did not translate.
    pub const fn gpa(&self) -> Gpa {
        match self {
            EptFault::Violation(violation) => violation.gpa,
            EptFault::Misconfiguration { gpa } => *gpa,
        }
    }
}

impl fmt::Display for EptFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EptFault::Violation(EptViolation {
                gpa, qualification, ..
            }) => {
                write!(
                    f,
                    "EPT violation at {gpa}, exit qualification {qualification:#x}"
                )
            }
            EptFault::Misconfiguration { gpa } => write!(f, "EPT misconfiguration at {gpa}"),
        }
    }
}

impl core::error::Error for EptFault {}
