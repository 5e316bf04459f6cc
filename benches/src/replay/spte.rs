//! The entries that KVM wrote into nested page tables, as the recordings show them.
//!
//! Written from the recordings' README and sharing nothing with `tdp_arch`'s encoder of the same hardware format, so
//! that a mistake in one does not hide in the other.

/// Accessed and dirty: the processor sets them behind KVM's back, so they are left out of every comparison.
pub const ACCESSED_DIRTY: u64 = ACCESSED | DIRTY;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
/// Accessed.
pub const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const HOST_WRITABLE: u64 = 1 << 9;
const MMU_WRITABLE: u64 = 1 << 10;
const MMU_PRESENT: u64 = 1 << 11;
/// A physical-address bit that is reserved on the recorded processors.
const MMIO: u64 = 1 << 51;
const NO_EXECUTE: u64 = 1 << 63;
const FRAME: u64 = 0x000f_ffff_ffff_f000;
/// What a frozen entry is besides the kernel's own "nothing here" (bit 63 or no bit at all).
const FROZEN: u64 = 0x5a0;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    None,
    /// Owned by whoever is taking it down.
    Frozen,
    /// Known to be device memory.
    Mmio,
    /// Points to a table.
    Table,
    /// Maps memory.
    Leaf,
    /// Nothing that KVM writes.
    Unknown,
}

/// What the entry `spte` of `level` is.
pub fn kind(spte: u64, level: u8) -> Kind {
    match spte & !NO_EXECUTE {
        0 => Kind::None,
        FROZEN => Kind::Frozen,
        bits if bits & MMU_PRESENT == 0 && bits & (MMIO | PRESENT) == MMIO | PRESENT => Kind::Mmio,
        bits if bits & (MMU_PRESENT | PRESENT) != MMU_PRESENT | PRESENT => Kind::Unknown,
        bits if level == 1 || bits & LARGE != 0 => Kind::Leaf,
        _ => Kind::Table,
    }
}

/// Frames that an entry of `level` (1 to 5) covers.
pub fn pages(level: u8) -> u64 {
    1 << (9 * (u32::from(level.clamp(1, 5)) - 1))
}

/// The first frame of the entry of `level` that covers `gfn`.
pub fn align(gfn: u64, level: u8) -> u64 {
    gfn & !(pages(level) - 1)
}

/// A recorded leaf and where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// First guest frame.
    pub gfn: u64,
    /// 1 to 3.
    pub level: u8,
    /// The entry.
    pub spte: u64,
}

impl Leaf {
    /// First host frame.
    pub fn pfn(&self) -> u64 {
        align((self.spte & FRAME) >> 12, self.level)
    }

    /// Host frame of a guest frame that it maps.
    pub fn pfn_of(&self, gfn: u64) -> u64 {
        self.pfn() + gfn.saturating_sub(self.gfn)
    }

    /// One past the last guest frame.
    pub fn end(&self) -> u64 {
        self.gfn + pages(self.level)
    }

    /// Whether the guest may write.
    pub fn is_writable(&self) -> bool {
        self.spte & WRITABLE != 0
    }

    /// Whether the guest may fetch instructions.
    pub fn is_executable(&self) -> bool {
        self.spte & NO_EXECUTE == 0
    }

    /// Whether the page has been accessed, as the processor tells it.
    pub fn is_accessed(&self) -> bool {
        self.spte & ACCESSED != 0
    }

    /// Whether the page has been written, as the processor tells it.
    pub fn is_dirty(&self) -> bool {
        self.spte & DIRTY != 0
    }

    /// Whether the host lets the page be written.
    pub fn is_host_writable(&self) -> bool {
        self.spte & HOST_WRITABLE != 0
    }

    /// Whether KVM may let the guest write again without asking: write-protected only to see the next write.
    pub fn is_mmu_writable(&self) -> bool {
        self.spte & MMU_WRITABLE != 0
    }

    /// Whether no write may pass without asking the host, although it would let the page be written.
    pub fn is_tracked(&self) -> bool {
        self.is_host_writable() && !self.is_mmu_writable() && !self.is_writable()
    }

    /// The `index`-th (0 to 511) of the leaves that a split of this one makes. KVM makes the leaves of level 1
    /// executable again if it is `nx_huge_pages` that forbade it.
    pub fn child(&self, index: u64, nx_huge_pages: bool) -> Self {
        let level = self.level.saturating_sub(1).max(1);
        let mut spte = self.spte | (index * pages(level)) << 12;
        if level == 1 {
            spte &= !LARGE;
            if nx_huge_pages {
                spte &= !NO_EXECUTE;
            }
        }
        Self {
            gfn: self.gfn + index * pages(level),
            level,
            spte,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_entries_apart() {
        assert_eq!(kind(1 << 63, 1), Kind::None);
        assert_eq!(kind(0, 3), Kind::None);
        assert_eq!(kind(1 << 63 | 0x5a0, 2), Kind::Frozen);
        assert_eq!(kind(0x5a0, 2), Kind::Frozen);
        assert_eq!(kind(0x8_0000_4000_4027, 1), Kind::Mmio);
        assert_eq!(kind(1 << 63 | 0x80, 1), Kind::Unknown);
        assert_eq!(kind(0x1_84a7_f667, 1), Kind::Unknown);
        assert_eq!(kind(0x1_8905_1827, 4), Kind::Table);
        assert_eq!(kind(0x1_8980_0ee7, 2), Kind::Leaf);
        assert_eq!(kind(0x1_84a7_fe67, 1), Kind::Leaf);
        // Bit 7 of a leaf of level 1 is not the large bit.
        assert_eq!(kind(0x1_84a7_f8e7, 1), Kind::Leaf);
    }

    #[test]
    fn splits_as_recorded() {
        // dirty_2m_lazy: 0x18ae00ee5 is split, and its second child is then 0x18ae01e65.
        let huge = Leaf {
            gfn: 0x4_0000,
            level: 2,
            spte: 0x1_8ae0_0ee5,
        };
        assert_eq!(
            huge.child(1, false),
            Leaf {
                gfn: 0x4_0001,
                level: 1,
                spte: 0x1_8ae0_1e65
            }
        );
        assert!(huge.is_host_writable() && huge.is_mmu_writable() && !huge.is_writable());
        let gigantic = Leaf {
            gfn: 0x4_0000,
            level: 3,
            spte: 0x1_4000_0ee7,
        };
        assert_eq!(
            gigantic.child(2, false),
            Leaf {
                gfn: 0x4_0400,
                level: 2,
                spte: 0x1_4040_0ee7
            }
        );
        // nx_huge_pages: 0x8000000189e00ee7 becomes 0x189e00e67.
        let nx = Leaf {
            gfn: 0,
            level: 2,
            spte: 0x8000_0001_89e0_0ee7,
        };
        assert!(!nx.is_executable() && nx.child(0, true).is_executable());
        assert_eq!(nx.child(0, true).spte, 0x1_89e0_0e67);
    }
}
