//! Operations on an MMU as data: small numbers, so that random ones meet each other.

use tdp::{Access, Gfn, GfnRange, Level, Perms, SlotFlags};

/// A guest frame out of the places where something can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) region: u8,
    pub(crate) index: u16,
}

impl Place {
    /// The frame, for a root of `root_level`.
    pub(crate) fn gfn(self, root_level: Level) -> Gfn {
        let index = u64::from(self.index) % 2048;
        let limit = root_level.gfn_limit().0;
        Gfn(match self.region % 4 {
            // Four blocks of 2 MiB.
            0 => index,
            // Two to each side of a 1 GiB border.
            1 => (1 << 18) - 1024 + index,
            // Two to each side of a 512 GiB border.
            2 => (1 << 27) - 1024 + index,
            // The last two, and as many past the end: of what the tables can map, or of what a processor can address.
            _ => limit.min(1 << 40) - 1024 + index,
        })
    }
}

/// By one byte mostly, so that several operations of a sequence are about the same frame more often than not.
#[cfg(fuzzing)]
impl<'a> arbitrary::Arbitrary<'a> for Place {
    fn arbitrary(input: &mut arbitrary::Unstructured<'a>) -> arbitrary::Result<Self> {
        const MEETING: [u16; 8] = [0, 1, 5, 511, 512, 1023, 1024, 1536];
        let byte: u8 = input.arbitrary()?;
        let index = match byte {
            0..0xe0 => MEETING[usize::from(byte % 8)],
            _ => input.arbitrary()?,
        };
        Ok(Self {
            // The first region half of the time.
            region: (byte >> 3 & 7).saturating_sub(4),
            index,
        })
    }
}

/// Frames from a place on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(fuzzing, derive(arbitrary::Arbitrary))]
pub(crate) struct Span {
    pub(crate) from: Place,
    pub(crate) pages: u8,
}

impl Span {
    pub(crate) fn range(self, root_level: Level) -> GfnRange {
        let start = self.from.gfn(root_level);
        let pages = match self.pages % 16 {
            15 => 0,
            14 => 1 << 27,
            13 => (1 << 18) + 1,
            12 => 1 << 18,
            11 => 1024,
            10 => 513,
            9 => 512,
            8 => 511,
            few => u64::from(few) + 1,
        };
        GfnRange::new(start, pages).unwrap_or_default()
    }

    /// The same with an aligned start, often.
    pub(crate) fn aligned_range(self, root_level: Level) -> GfnRange {
        let range = self.range(root_level);
        if self.from.index.is_multiple_of(4) {
            return range;
        }
        let level = if range.pages() >= 1 << 18 {
            Level::L3
        } else {
            Level::L2
        };
        GfnRange::new(level.align_down(range.start), range.pages()).unwrap_or_default()
    }
}

/// One operation. Numbers are taken modulo what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(fuzzing, derive(arbitrary::Arbitrary))]
pub(crate) enum Op {
    /// A fault that an exit handler passes on.
    Fault {
        vcpu: u8,
        at: Place,
        access: u8,
        max_level: u8,
        prefetch: bool,
        /// Through a batch.
        batch: bool,
    },
    /// A bare map.
    Map {
        vcpu: u8,
        at: Place,
        access: u8,
        level: u8,
        perms: u8,
        aligned: bool,
        batch: bool,
    },
    /// An access of the guest, its fault resolved if it has one.
    Touch {
        vcpu: u8,
        at: Place,
        access: u8,
    },
    Zap {
        space: u8,
        span: Span,
        leaves_only: bool,
        /// Flushed only later.
        hold: bool,
    },
    /// Flushes all that is held.
    Flush,
    /// Begins an invalidation.
    Begin {
        space: u8,
        span: Span,
    },
    /// Zaps the range of an invalidation and flushes.
    Sweep {
        which: u8,
    },
    /// Ends an invalidation; its pages get other host frames first.
    End {
        which: u8,
    },
    Insert {
        space: u8,
        span: Span,
        level: u8,
        read_only: bool,
        log_dirty: bool,
        max_level: u8,
        /// Guest and host frames not aligned alike.
        skewed: bool,
        /// With an id of the caller's choice.
        id: Option<u8>,
    },
    Remove {
        which: u8,
    },
    Move {
        which: u8,
        to: Place,
    },
    SetFlags {
        which: u8,
        read_only: bool,
        log_dirty: bool,
    },
    InvalidateRoots {
        /// Torn down only later.
        hold: bool,
    },
    /// Tears down what is held.
    FinishTeardown,
    LoadRoot {
        vcpu: u8,
    },
    SetSpace {
        vcpu: u8,
        space: u8,
    },
    /// What the host answers from now on.
    Answer {
        kind: u8,
    },
    /// What the host permits from now on.
    Permit {
        perms: u8,
    },
    /// Whether there are frames.
    Starve {
        on: bool,
    },
    Synchronize,
}

/// How the MMU of a run is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(fuzzing, derive(arbitrary::Arbitrary))]
pub(crate) struct Setup {
    pub(crate) five_levels: bool,
    pub(crate) software_ad: bool,
    pub(crate) no_mmio_caching: bool,
    pub(crate) max_leaf: u8,
}

pub(crate) fn access(number: u8) -> Access {
    match number % 4 {
        0 => Access::Read,
        1 => Access::Write,
        2 => Access::Execute,
        _ => Access::UserExecute,
    }
}

pub(crate) fn level(number: u8) -> Level {
    // Leaves of levels 4 and 5 do not exist, but may be asked for.
    Level::from_number(number % 5 + 1).unwrap_or(Level::L1)
}

/// Permissions that every format can express.
pub(crate) fn perms(number: u8) -> Perms {
    match number % 6 {
        0 => Perms::RWX,
        1 => Perms::RX,
        2 => Perms::RW,
        3 => Perms::READ,
        4 => Perms::READ | Perms::EXEC,
        _ => Perms::EXEC | Perms::USER_EXEC,
    }
}

pub(crate) fn flags(read_only: bool, log_dirty: bool) -> SlotFlags {
    let mut flags = SlotFlags::empty();
    flags.set(SlotFlags::READ_ONLY, read_only);
    flags.set(SlotFlags::LOG_DIRTY, log_dirty);
    flags
}
