//! Extended page tables: Intel SDM volume 3, "VMX support for address translation", 29.3.2 (tables 29-1 to 29-7).
//!
//! Hardware bits: 0 read, 1 write, 2 execute (supervisor-mode linear addresses if mode-based execute control is
//! on), 5:3 memory type, 6 ignore PAT, 7 large page, 8 accessed, 9 dirty, 10 execute for user-mode linear
//! addresses, 57 to 61 features that this library leaves off, 63 suppress #VE.
//!
//! Software bits are taken only from those that table 29-7 calls ignored whatever features are on: 11, 56:52, 59
//! and 62. An entry is not present to the processor if bits 2:0 and bit 10 are clear, so the non-present patterns
//! stay out of bit 10 as well.

use crate::addr::{Gfn, Pfn};
use crate::format::{
    Access, AdBits, FaultCode, Format, LeafAttrs, MMIO_GENERATION_BITS, MmioEntry, Perms, Spte,
};
use crate::level::Level;

/// Extended page tables (Intel), 4 or 5 levels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ept;

const READ: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const EXEC: u64 = 1 << 2;
const MEMORY_TYPE_SHIFT: u32 = 3;
const IGNORE_PAT: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
const USER_EXEC: u64 = 1 << 10;
const SUPPRESS_VE: u64 = 1 << 63;
/// Any of these makes an entry present to the processor.
const PRESENT_ANY: u64 = READ | WRITE | EXEC | USER_EXEC;

const MMU_PRESENT: u64 = 1 << 11;
const HOST_WRITABLE: u64 = 1 << 52;
const MMU_WRITABLE: u64 = 1 << 53;
const AD_SOFTWARE: u64 = 1 << 54;
const SAVED_READ: u64 = 1 << 55;
const SAVED_EXEC: u64 = 1 << 56;
const SAVED_USER_EXEC: u64 = 1 << 59;
const NX_SPLIT: u64 = 1 << 62;
const SOFTWARE: u64 = MMU_PRESENT
    | HOST_WRITABLE
    | MMU_WRITABLE
    | AD_SOFTWARE
    | SAVED_READ
    | SAVED_EXEC
    | SAVED_USER_EXEC
    | NX_SPLIT;

/// Write and execute without read: a misconfiguration on every processor (SDM 29.3.3.1).
const MMIO_VALUE: u64 = WRITE | EXEC;
const MMIO_MASK: u64 = READ | WRITE | EXEC | MMU_PRESENT;
const GENERATION_LOW_SHIFT: u32 = 3;
const GENERATION_LOW_BITS: u32 = 8;
const GENERATION_HIGH_SHIFT: u32 = 52;
const GENERATION_LOW: u64 = ((1 << GENERATION_LOW_BITS) - 1) << GENERATION_LOW_SHIFT;
const GENERATION_HIGH: u64 =
    ((1 << (MMIO_GENERATION_BITS - GENERATION_LOW_BITS)) - 1) << GENERATION_HIGH_SHIFT;

impl Format for Ept {
    const NAME: &'static str = "ept";
    const EMPTY: Spte = Spte(SUPPRESS_VE);
    const FROZEN: Spte = Spte(SUPPRESS_VE | 0x1a0);
    const SEALED: Spte = Spte(SUPPRESS_VE | 0x2a0);
    const MMU_PRESENT: u64 = MMU_PRESENT;
    const LARGE: u64 = LARGE;
    const WRITABLE: u64 = WRITE;
    const ACCESSED: u64 = ACCESSED;
    const DIRTY: u64 = DIRTY;
    const HOST_WRITABLE: u64 = HOST_WRITABLE;
    const MMU_WRITABLE: u64 = MMU_WRITABLE;
    const AD_SOFTWARE: u64 = AD_SOFTWARE;
    const NX_SPLIT: u64 = NX_SPLIT;

    #[inline(always)]
    fn table(pfn: Pfn) -> Spte {
        // Accessed is set from the start: the processor then never has to write a table entry (SDM 29.3.5), so that
        // a walk of warm tables writes nothing.
        Spte(
            READ | WRITE
                | EXEC
                | USER_EXEC
                | ACCESSED
                | MMU_PRESENT
                | ((pfn.0 << 12) & Self::PFN_MASK),
        )
    }

    #[inline(always)]
    fn leaf(pfn: Pfn, level: Level, attrs: LeafAttrs) -> Spte {
        let mut bits = MMU_PRESENT | SUPPRESS_VE | ((pfn.0 << 12) & Self::PFN_MASK);
        bits |= u64::from(attrs.perms.bits() & 0b111);
        bits |= if attrs.perms.contains(Perms::USER_EXEC) {
            USER_EXEC
        } else {
            0
        };
        bits |= (attrs.memory_type as u64) << MEMORY_TYPE_SHIFT;
        bits |= if attrs.ignore_guest_pat {
            IGNORE_PAT
        } else {
            0
        };
        bits |= if matches!(level, Level::L1) { 0 } else { LARGE };
        bits |= match attrs.ad_bits {
            AdBits::Processor => {
                (if attrs.accessed { ACCESSED } else { 0 }) | (if attrs.dirty { DIRTY } else { 0 })
            }
            AdBits::Software => AD_SOFTWARE,
        };
        bits |= if attrs.host_writable {
            HOST_WRITABLE
        } else {
            0
        };
        bits |= if attrs.mmu_writable { MMU_WRITABLE } else { 0 };
        Spte(bits)
    }

    fn mmio(gfn: Gfn, generation: u64, _physical_bits: u32) -> Option<Spte> {
        if gfn.0 > Self::PFN_MASK >> 12 {
            return None;
        }
        let low = (generation << GENERATION_LOW_SHIFT) & GENERATION_LOW;
        let high = ((generation >> GENERATION_LOW_BITS) << GENERATION_HIGH_SHIFT) & GENERATION_HIGH;
        Some(Spte(SUPPRESS_VE | MMIO_VALUE | low | high | (gfn.0 << 12)))
    }

    fn mmio_entry(spte: Spte) -> Option<MmioEntry> {
        if spte.0 & MMIO_MASK != MMIO_VALUE {
            return None;
        }
        let low = (spte.0 & GENERATION_LOW) >> GENERATION_LOW_SHIFT;
        let high = (spte.0 & GENERATION_HIGH) >> GENERATION_HIGH_SHIFT;
        Some(MmioEntry {
            gfn: Gfn((spte.0 & Self::PFN_MASK) >> 12),
            generation: (high << GENERATION_LOW_BITS | low) as u32,
        })
    }

    #[inline(always)]
    fn perms(spte: Spte) -> Perms {
        let user = if spte.0 & USER_EXEC != 0 {
            Perms::USER_EXEC
        } else {
            Perms::empty()
        };
        Perms::from_bits_truncate((spte.0 & 0b111) as u8).union(user)
    }

    fn can_express(perms: Perms) -> bool {
        // Write without read is a misconfiguration; execute alone is an option that every processor of the last decade
        // has (SDM 29.3.3.1, IA32_VMX_EPT_VPID_CAP bit 0).
        perms.contains(Perms::READ) || !perms.contains(Perms::WRITE)
    }

    fn access_track(spte: Spte) -> Spte {
        let mut bits = spte.0 & !PRESENT_ANY;
        bits |= if spte.0 & READ != 0 { SAVED_READ } else { 0 };
        bits |= if spte.0 & EXEC != 0 { SAVED_EXEC } else { 0 };
        bits |= if spte.0 & USER_EXEC != 0 {
            SAVED_USER_EXEC
        } else {
            0
        };
        Spte(bits)
    }

    fn restore_access_tracked(spte: Spte) -> Spte {
        let mut bits = spte.0 & !(SAVED_READ | SAVED_EXEC | SAVED_USER_EXEC);
        bits |= if spte.0 & SAVED_READ != 0 { READ } else { 0 };
        bits |= if spte.0 & SAVED_EXEC != 0 { EXEC } else { 0 };
        bits |= if spte.0 & SAVED_USER_EXEC != 0 {
            USER_EXEC
        } else {
            0
        };
        Spte(bits)
    }

    fn permit_fetch(spte: Spte) -> Spte {
        Spte(spte.0 | EXEC | USER_EXEC)
    }

    #[inline]
    fn split_child(spte: Spte, level: Level, index: usize) -> Spte {
        let child = match level {
            Level::L3 => Level::L2,
            _ => Level::L1,
        };
        let bits = if matches!(child, Level::L1) {
            spte.0 & !LARGE
        } else {
            spte.0
        };
        Spte(bits + index as u64 * child.bytes())
    }

    fn root_pointer(pfn: Pfn, level: Level, ad_bits: AdBits) -> u64 {
        // SDM 25.6.11: bits 2:0 memory type of the tables (6, write back), 5:3 levels less one, 6 accessed/dirty.
        let ad = match ad_bits {
            AdBits::Processor => 1 << 6,
            AdBits::Software => 0,
        };
        6 | u64::from(level.number() - 1) << 3 | ad | (pfn.0 << 12)
    }

    fn fault_code(raw: u64) -> FaultCode {
        // SDM 28.2.1, exit qualification for EPT violations. A read-modify-write sets bits 0 and 1; a walk of guest
        // tables with accessed/dirty flags on does too. Bits 5:3 and 6 are the permissions of the entries walked;
        // bit 8 is clear, with bit 7 set, if the access was to a guest paging structure. Whether a fetch was in user mode
        // is told (bit 9) only by processors with advanced information, and undefined on others; but a fetch that was
        // refused although bit 5 permits supervisor mode's cannot have been supervisor mode's.
        let access = if raw & 1 << 1 != 0 {
            Access::Write
        } else if raw & (1 << 2 | 1 << 5) == 1 << 2 | 1 << 5 {
            Access::UserExecute
        } else if raw & 1 << 2 != 0 {
            Access::Execute
        } else {
            Access::Read
        };
        FaultCode {
            access,
            present: raw & (0b1111 << 3) != 0,
            reserved: false,
            guest_table_walk: raw & (1 << 7) != 0 && raw & (1 << 8) == 0,
        }
    }
}

// No two kinds of word can be taken for one another.
const _: () = {
    let patterns = [Ept::EMPTY.0, Ept::FROZEN.0, Ept::SEALED.0];
    let mut i = 0;
    while i < patterns.len() {
        assert!(
            patterns[i] & PRESENT_ANY == 0,
            "not present to the processor, mode-based execute on or off"
        );
        assert!(
            patterns[i] & MMU_PRESENT == 0,
            "neither table nor leaf, access-tracked ones included"
        );
        assert!(patterns[i] & MMIO_MASK != MMIO_VALUE, "not MMIO");
        assert!(patterns[i] & Ept::PFN_MASK == 0, "names no frame");
        assert!(
            patterns[i] & SUPPRESS_VE != 0,
            "an access exits to the host"
        );
        let mut j = i + 1;
        while j < patterns.len() {
            assert!(patterns[i] != patterns[j]);
            j += 1;
        }
        i += 1;
    }
    let hardware = PRESENT_ANY
        | 0b111 << MEMORY_TYPE_SHIFT
        | IGNORE_PAT
        | LARGE
        | ACCESSED
        | DIRTY
        | SUPPRESS_VE;
    assert!(
        SOFTWARE & hardware == 0,
        "software bits lie outside hardware bits"
    );
    assert!(
        SOFTWARE & Ept::PFN_MASK == 0,
        "software bits lie outside the frame number"
    );
    assert!(
        SOFTWARE & (0b11 << 57 | 0b11 << 60) == 0,
        "bits 57, 58, 60 and 61 belong to processor features"
    );
    assert!(SOFTWARE.count_ones() == 8, "software bits are distinct");
    let generation = GENERATION_LOW | GENERATION_HIGH;
    assert!(generation.count_ones() == MMIO_GENERATION_BITS);
    assert!(generation & (MMIO_MASK | Ept::PFN_MASK | SUPPRESS_VE) == 0);
};
