//! Address newtypes: guest and host, bytes and frames.
//!
//! Every kind of address is its own type, so that a guest frame number is never taken for a host one. Frames are
//! 4 KiB ([`PAGE_SIZE`]). Arithmetic is checked, or its name says that it is not.

use core::fmt;
use core::ops::Range;

/// Bits of an address below the frame number.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a frame.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// Widest physical address that x86-64 defines, in bits (SDM 4.1.4; APM 5.3).
pub const MAX_PHYSICAL_BITS: u32 = 52;

macro_rules! newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// Adds `n`, or `None` on overflow.
            #[inline]
            pub const fn checked_add(self, n: u64) -> Option<Self> {
                match self.0.checked_add(n) {
                    Some(v) => Some(Self(v)),
                    None => None,
                }
            }

            /// Distance from `base` up to `self`, or `None` if `base` is larger.
            #[inline]
            pub const fn checked_offset_from(self, base: Self) -> Option<u64> {
                self.0.checked_sub(base.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

newtype!(
    /// Guest physical address, in bytes.
    Gpa
);
newtype!(
    /// Guest frame number: a [`Gpa`] without its low 12 bits.
    Gfn
);
newtype!(
    /// Host physical address, in bytes.
    Hpa
);
newtype!(
    /// Host frame number: an [`Hpa`] without its low 12 bits.
    Pfn
);

macro_rules! address_and_frame {
    ($address:ident, $frame:ident, $to_frame:ident) => {
        impl $address {
            /// Frame that holds this address.
            #[inline]
            pub const fn $to_frame(self) -> $frame {
                $frame(self.0 >> PAGE_SHIFT)
            }

            /// Bytes from the start of the frame.
            #[inline]
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }
        }

        impl $frame {
            /// First address of this frame, or `None` if it does not fit 64 bits.
            #[inline]
            pub const fn checked_address(self) -> Option<$address> {
                if self.0 >> (64 - PAGE_SHIFT) == 0 {
                    Some($address(self.0 << PAGE_SHIFT))
                } else {
                    None
                }
            }

            /// First address of this frame. The number must have at most 52 bits; higher bits are lost.
            #[inline]
            pub const fn address(self) -> $address {
                $address(self.0 << PAGE_SHIFT)
            }
        }
    };
}

address_and_frame!(Gpa, Gfn, gfn);
address_and_frame!(Hpa, Pfn, pfn);

/// Half-open range of guest frames: `start` is in it, `end` is not.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct GfnRange {
    /// First frame.
    pub start: Gfn,
    /// One past the last frame.
    pub end: Gfn,
}

impl GfnRange {
    /// Range of `pages` frames from `start`, or `None` if it would overflow.
    pub const fn new(start: Gfn, pages: u64) -> Option<Self> {
        match start.checked_add(pages) {
            Some(end) => Some(Self { start, end }),
            None => None,
        }
    }

    /// Frames in the range; 0 if it is empty or reversed.
    #[inline]
    pub const fn pages(&self) -> u64 {
        self.end.0.saturating_sub(self.start.0)
    }

    /// Whether no frame lies in it.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.end.0 <= self.start.0
    }

    /// Whether `gfn` lies in it.
    #[inline]
    pub const fn contains(&self, gfn: Gfn) -> bool {
        gfn.0.wrapping_sub(self.start.0) < self.pages()
    }

    /// Whether all of `other` lies in it.
    #[inline]
    pub const fn covers(&self, other: GfnRange) -> bool {
        self.start.0 <= other.start.0 && other.end.0 <= self.end.0
    }

    /// Whether the two have a frame in common.
    #[inline]
    pub const fn overlaps(&self, other: GfnRange) -> bool {
        !self.is_empty()
            && !other.is_empty()
            && self.start.0 < other.end.0
            && other.start.0 < self.end.0
    }
}

impl From<Range<Gfn>> for GfnRange {
    fn from(range: Range<Gfn>) -> Self {
        Self {
            start: range.start,
            end: range.end,
        }
    }
}

impl fmt::Debug for GfnRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.start.0, self.end.0)
    }
}

impl fmt::Display for GfnRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
