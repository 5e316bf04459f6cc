//! Nested page tables: AMD APM volume 2, 15.25 (nested paging) over 5.3 and 5.4 (long-mode entries).
//!
//! Hardware bits: 0 present, 1 writable, 2 user, 3 write-through, 4 cache-disable, 5 accessed, 6 dirty, 7 large
//! page (levels 2 and 3) or PAT (level 1), 8 global, 12 PAT of a large page, 63 no-execute. Every guest access is a
//! *user* access for the nested walk (APM 15.25.5), so bit 2 is set in every entry.
//!
//! Software bits are taken from those that the APM leaves to software: 11:9 and 58:52.

use crate::addr::{Gfn, Pfn};
use crate::format::{
    Access, AdBits, FaultCode, Format, LeafAttrs, MMIO_GENERATION_BITS, MemoryType, MmioEntry,
    Perms, Spte,
};
use crate::level::Level;

/// Nested page tables (AMD), 4 or 5 levels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Npt;

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const WRITE_THROUGH: u64 = 1 << 3;
const CACHE_DISABLE: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const PAT_4K: u64 = 1 << 7;
const PAT_LARGE: u64 = 1 << 12;
const NO_EXECUTE: u64 = 1 << 63;

const HOST_WRITABLE: u64 = 1 << 9;
const MMU_WRITABLE: u64 = 1 << 10;
const MMU_PRESENT: u64 = 1 << 11;
const AD_SOFTWARE: u64 = 1 << 52;
const SAVED_PRESENT: u64 = 1 << 53;
const NX_SPLIT: u64 = 1 << 54;
const SOFTWARE: u64 =
    HOST_WRITABLE | MMU_WRITABLE | MMU_PRESENT | AD_SOFTWARE | SAVED_PRESENT | NX_SPLIT;

/// Physical-address bit that is reserved on every processor with fewer than 52 bits.
const MMIO_RESERVED: u64 = 1 << 51;
const MMIO_VALUE: u64 = MMIO_RESERVED | PRESENT | WRITE | USER;
const MMIO_MASK: u64 = MMIO_VALUE | MMU_PRESENT;
const MMIO_GFN: u64 = Npt::PFN_MASK & !MMIO_RESERVED;
const GENERATION_LOW_SHIFT: u32 = 3;
const GENERATION_LOW_BITS: u32 = 8;
const GENERATION_HIGH_SHIFT: u32 = 52;
const GENERATION_LOW: u64 = ((1 << GENERATION_LOW_BITS) - 1) << GENERATION_LOW_SHIFT;
const GENERATION_HIGH: u64 =
    ((1 << (MMIO_GENERATION_BITS - GENERATION_LOW_BITS)) - 1) << GENERATION_HIGH_SHIFT;

/// Page-attribute index of `memory_type` under the host's PAT as it is after reset (APM 7.8.2): 0 write back, 1 write
/// through, 3 uncacheable. Write combining and write protected are not in that table and become uncacheable, which
/// is stricter than either.
const fn pat_index(memory_type: MemoryType) -> u64 {
    match memory_type {
        MemoryType::WriteBack => 0,
        MemoryType::WriteThrough => 1,
        MemoryType::Uncacheable | MemoryType::WriteCombining | MemoryType::WriteProtected => 3,
    }
}

impl Format for Npt {
    const NAME: &'static str = "npt";
    const EMPTY: Spte = Spte(0);
    const FROZEN: Spte = Spte(0x1a0);
    const SEALED: Spte = Spte(0x2a0);
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
        // Accessed is set from the start, so that the processor never has to write a table entry.
        Spte(PRESENT | WRITE | USER | ACCESSED | MMU_PRESENT | ((pfn.0 << 12) & Self::PFN_MASK))
    }

    #[inline(always)]
    fn leaf(pfn: Pfn, level: Level, attrs: LeafAttrs) -> Spte {
        let mut bits = MMU_PRESENT | USER | ((pfn.0 << 12) & Self::PFN_MASK);
        // There is no execute-only or write-only page in this format: anything permitted makes it readable.
        bits |= if attrs.perms.is_empty() { 0 } else { PRESENT };
        bits |= if attrs.perms.contains(Perms::WRITE) {
            WRITE
        } else {
            0
        };
        bits |= if attrs.perms.intersects(Perms::EXEC.union(Perms::USER_EXEC)) {
            0
        } else {
            NO_EXECUTE
        };
        let pat = pat_index(attrs.memory_type);
        bits |= if pat & 1 != 0 { WRITE_THROUGH } else { 0 };
        bits |= if pat & 2 != 0 { CACHE_DISABLE } else { 0 };
        bits |= if matches!(level, Level::L1) { 0 } else { LARGE };
        // The processor sets both bits whatever the host wants (APM 15.25.4): where software keeps them they are set
        // from the start, so that the processor never writes the entry.
        bits |= match attrs.ad_bits {
            AdBits::Processor => {
                (if attrs.accessed { ACCESSED } else { 0 }) | (if attrs.dirty { DIRTY } else { 0 })
            }
            AdBits::Software => AD_SOFTWARE | ACCESSED | DIRTY,
        };
        bits |= if attrs.host_writable {
            HOST_WRITABLE
        } else {
            0
        };
        bits |= if attrs.mmu_writable { MMU_WRITABLE } else { 0 };
        Spte(bits)
    }

    fn mmio(gfn: Gfn, generation: u64, physical_bits: u32) -> Option<Spte> {
        if physical_bits > 51 || gfn.0 > MMIO_GFN >> 12 {
            return None;
        }
        let low = (generation << GENERATION_LOW_SHIFT) & GENERATION_LOW;
        let high = ((generation >> GENERATION_LOW_BITS) << GENERATION_HIGH_SHIFT) & GENERATION_HIGH;
        Some(Spte(MMIO_VALUE | low | high | (gfn.0 << 12)))
    }

    fn mmio_entry(spte: Spte) -> Option<MmioEntry> {
        if spte.0 & MMIO_MASK != MMIO_VALUE {
            return None;
        }
        let low = (spte.0 & GENERATION_LOW) >> GENERATION_LOW_SHIFT;
        let high = (spte.0 & GENERATION_HIGH) >> GENERATION_HIGH_SHIFT;
        Some(MmioEntry {
            gfn: Gfn((spte.0 & MMIO_GFN) >> 12),
            generation: (high << GENERATION_LOW_BITS | low) as u32,
        })
    }

    #[inline(always)]
    fn perms(spte: Spte) -> Perms {
        if spte.0 & PRESENT == 0 {
            return Perms::empty();
        }
        let mut perms = Perms::READ;
        if spte.0 & WRITE != 0 {
            perms = perms.union(Perms::WRITE);
        }
        if spte.0 & NO_EXECUTE == 0 {
            perms = perms.union(Perms::EXEC).union(Perms::USER_EXEC);
        }
        perms
    }

    fn can_express(_perms: Perms) -> bool {
        // Whatever is present can be read (APM 5.4.1), and one bit forbids fetches of both kinds: a page that is meant to
        // be fetched or written only is readable as well, as with every MMU of this format.
        true
    }

    fn access_track(spte: Spte) -> Spte {
        let saved = if spte.0 & PRESENT != 0 {
            SAVED_PRESENT
        } else {
            0
        };
        Spte(spte.0 & !(PRESENT | WRITE) | saved)
    }

    fn restore_access_tracked(spte: Spte) -> Spte {
        let present = if spte.0 & SAVED_PRESENT != 0 {
            PRESENT
        } else {
            0
        };
        Spte(spte.0 & !SAVED_PRESENT | present)
    }

    fn permit_fetch(spte: Spte) -> Spte {
        Spte(spte.0 & !NO_EXECUTE)
    }

    #[inline]
    fn split_child(spte: Spte, level: Level, index: usize) -> Spte {
        let child = match level {
            Level::L3 => Level::L2,
            _ => Level::L1,
        };
        let bits = if matches!(child, Level::L1) {
            let pat = if spte.0 & PAT_LARGE != 0 { PAT_4K } else { 0 };
            spte.0 & !(LARGE | PAT_LARGE) | pat
        } else {
            spte.0
        };
        Spte(bits + index as u64 * child.bytes())
    }

    fn root_pointer(pfn: Pfn, _level: Level, _ad_bits: AdBits) -> u64 {
        // APM 15.25.3: nCR3 has the form of CR3; the number of levels follows the host's CR4.LA57.
        pfn.0 << 12
    }

    fn fault_code(raw: u64) -> FaultCode {
        // APM 15.25.6, EXITINFO1: bit 0 present, 1 write, 2 user, 3 reserved, 4 fetch, 32 final address, 33 guest
        // table walk.
        let access = if raw & 1 << 1 != 0 {
            Access::Write
        } else if raw & 1 << 4 != 0 {
            Access::Execute
        } else {
            Access::Read
        };
        FaultCode {
            access,
            present: raw & 1 != 0,
            reserved: raw & 1 << 3 != 0,
            guest_table_walk: raw & 1 << 33 != 0,
        }
    }
}

// No two kinds of word can be taken for one another.
const _: () = {
    let patterns = [Npt::EMPTY.0, Npt::FROZEN.0, Npt::SEALED.0];
    let mut i = 0;
    while i < patterns.len() {
        assert!(patterns[i] & PRESENT == 0, "not present to the processor");
        assert!(
            patterns[i] & MMU_PRESENT == 0,
            "neither table nor leaf, access-tracked ones included"
        );
        assert!(patterns[i] & MMIO_MASK != MMIO_VALUE, "not MMIO");
        assert!(patterns[i] & Npt::PFN_MASK == 0, "names no frame");
        let mut j = i + 1;
        while j < patterns.len() {
            assert!(patterns[i] != patterns[j]);
            j += 1;
        }
        i += 1;
    }
    let hardware = 0x1ff | PAT_LARGE | NO_EXECUTE;
    assert!(
        SOFTWARE & hardware == 0,
        "software bits lie outside hardware bits"
    );
    assert!(
        SOFTWARE & Npt::PFN_MASK == 0,
        "software bits lie outside the frame number"
    );
    assert!(
        SOFTWARE & (0b1111 << 59) == 0,
        "bits 62:59 can be a protection key"
    );
    assert!(SOFTWARE.count_ones() == 6, "software bits are distinct");
    let generation = GENERATION_LOW | GENERATION_HIGH;
    assert!(generation.count_ones() == MMIO_GENERATION_BITS);
    assert!(generation & (MMIO_MASK | Npt::PFN_MASK | NO_EXECUTE) == 0);
};
