//! Levels of a table tree: which bits of a GFN choose an entry, and how much an entry maps.

use crate::addr::{Gfn, GfnRange, PAGE_SHIFT};
use core::fmt;

/// Entries in one table page of every format here: 4 KiB of 8-byte entries.
pub const ENTRIES_PER_TABLE: usize = 512;
/// Bits of a GFN that choose an entry at one level.
const INDEX_BITS: u32 = ENTRIES_PER_TABLE.trailing_zeros();

/// Level of an entry, counted from the leaf: an entry of level 1 maps 4 KiB, of level 2 2 MiB, of level 3 1 GiB.
///
/// A *table* has the level of its entries, so the root of a four-level tree is a table of level 4.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Level {
    /// 4 KiB an entry.
    L1 = 1,
    /// 2 MiB an entry.
    L2 = 2,
    /// 1 GiB an entry.
    L3 = 3,
    /// 512 GiB an entry; always a table.
    L4 = 4,
    /// 256 TiB an entry; always a table.
    L5 = 5,
}

impl Level {
    /// All levels, leaf first.
    pub const ALL: [Level; 5] = [Level::L1, Level::L2, Level::L3, Level::L4, Level::L5];

    /// The level with number `n` (1 to 5).
    pub const fn from_number(n: u8) -> Option<Self> {
        match n {
            1 => Some(Level::L1),
            2 => Some(Level::L2),
            3 => Some(Level::L3),
            4 => Some(Level::L4),
            5 => Some(Level::L5),
            _ => None,
        }
    }

    /// Its number, 1 to 5.
    #[inline]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// One level nearer to the leaf, or `None` at level 1.
    #[inline]
    pub const fn below(self) -> Option<Self> {
        match self {
            Level::L1 => None,
            Level::L2 => Some(Level::L1),
            Level::L3 => Some(Level::L2),
            Level::L4 => Some(Level::L3),
            Level::L5 => Some(Level::L4),
        }
    }

    /// One level nearer to the leaf; level 1 stays. For walks that stop at a level of their own.
    #[inline(always)]
    pub const fn below_or_leaf(self) -> Self {
        // Compiles to a subtraction, which the form with an `Option` does not.
        match self {
            Level::L1 | Level::L2 => Level::L1,
            Level::L3 => Level::L2,
            Level::L4 => Level::L3,
            Level::L5 => Level::L4,
        }
    }

    /// One level nearer to the root, or `None` at level 5.
    #[inline]
    pub const fn above(self) -> Option<Self> {
        Self::from_number(self as u8 + 1)
    }

    /// Bits of a GFN below the ones that choose an entry at this level.
    #[inline]
    pub const fn gfn_shift(self) -> u32 {
        (self as u32 - 1) * INDEX_BITS
    }

    /// Frames that one entry of this level maps.
    #[inline]
    pub const fn pages(self) -> u64 {
        1 << self.gfn_shift()
    }

    /// Bytes that one entry of this level maps.
    #[inline]
    pub const fn bytes(self) -> u64 {
        1 << (self.gfn_shift() + PAGE_SHIFT)
    }

    /// Index of `gfn`'s entry in a table of this level, 0 to 511.
    #[inline]
    pub const fn index(self, gfn: Gfn) -> usize {
        (gfn.0 >> self.gfn_shift()) as usize & (ENTRIES_PER_TABLE - 1)
    }

    /// `gfn` rounded down to the first frame of its entry at this level.
    #[inline]
    pub const fn align_down(self, gfn: Gfn) -> Gfn {
        Gfn(gfn.0 & !(self.pages() - 1))
    }

    /// Whether `gfn` is the first frame of an entry of this level.
    #[inline]
    pub const fn is_aligned(self, gfn: Gfn) -> bool {
        gfn.0 & (self.pages() - 1) == 0
    }

    /// The frames that `gfn`'s entry of this level maps. `gfn` must have at most 52 bits.
    #[inline]
    pub const fn range(self, gfn: Gfn) -> GfnRange {
        let start = self.align_down(gfn);
        GfnRange {
            start,
            end: Gfn(start.0 + self.pages()),
        }
    }

    /// First frame past what a tree with a root table of this level can map.
    #[inline]
    pub const fn gfn_limit(self) -> Gfn {
        Gfn(1 << (self.gfn_shift() + INDEX_BITS))
    }
}

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "L{}", *self as u8)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
