//! Where things lie: guest memory, and host memory that a trusted module manages.

use crate::baseline::tables_for;
use std::ops::Range;
use tdp_arch::{Gfn, GfnRange, Level, Pfn};

/// Where guest memory starts: not at zero, where mistakes look right.
const GUEST_START: Gfn = Gfn(1 << 18);
/// Host frames behind the shared half.
const SHARED_START: Pfn = Pfn(1 << 27);
/// Host frames that the module manages.
const MODULE_START: Pfn = Pfn(1 << 30);
/// Frames for control structures, the vCPUs' among them.
const CONTROL: u64 = 4096;
/// Tables, and as many twins, that a vCPU may hold ready.
const SPARE: u64 = 64;
/// The bit of an address that makes it shared.
pub const SHARED_BIT: u32 = 47;

/// What a guest is made of.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Guest memory, one slot.
    pub gfns: GfnRange,
    /// Largest leaf that the backing allows.
    pub level: Level,
    /// vCPUs of the guest, each of which may hold tables ready.
    pub vcpus: u16,
    /// Host frame of the first guest frame where it is shared.
    shared: Pfn,
}

impl Layout {
    /// Most frames of guest memory: 1 TiB.
    pub const LIMIT: u64 = 1 << 28;

    /// `frames` frames of guest memory; `None` if there are none, or too many.
    pub fn new(frames: u64, level: Level, vcpus: u16) -> Option<Self> {
        let gfns =
            GfnRange::new(GUEST_START, frames).filter(|_| (1..=Self::LIMIT).contains(&frames))?;
        Some(Self {
            gfns,
            level,
            vcpus,
            shared: SHARED_START,
        })
    }

    /// The same from another guest frame on, whose host frame is `shared` where it is shared.
    #[must_use]
    pub fn numbered(self, first: Gfn, shared: Pfn) -> Self {
        let gfns = GfnRange {
            start: first,
            end: Gfn(first.0 + self.gfns.pages()),
        };
        Self {
            gfns,
            shared,
            ..self
        }
    }

    /// Tables of one half, if everything is mapped by leaves of `leaf`.
    pub fn tables(&self, leaf: Level) -> u64 {
        tables_for(self.gfns, leaf, Level::L4)
    }

    /// Table frames for both halves and what vCPUs hold ready.
    pub fn frames(&self) -> u64 {
        2 * self.tables(Level::L1) + SPARE * (u64::from(self.vcpus) + 1)
    }

    /// Host frame of the first guest frame where it is shared.
    pub fn shared(&self) -> Pfn {
        self.shared
    }

    /// Host frame of the first guest frame where it is private.
    pub fn private(&self) -> Pfn {
        // To a multiple of 1 GiB, as the guest's.
        let level = Level::L3;
        Pfn(level.align_down(Gfn(self.twins().end.0)).0 + level.pages())
    }

    /// Everything that the module manages.
    pub fn module(&self) -> Range<Pfn> {
        MODULE_START..Pfn(self.private().0 + self.gfns.pages())
    }

    /// The `n`-th frame for a control structure.
    pub fn control(&self, n: u64) -> Pfn {
        debug_assert!(n < CONTROL, "frames for control structures");
        Pfn(MODULE_START.0 + n)
    }

    /// Frames for twins of private tables.
    pub fn twins(&self) -> Range<Pfn> {
        let start = MODULE_START.0 + CONTROL;
        let count = self.tables(Level::L1) + SPARE * (u64::from(self.vcpus) + 1);
        Pfn(start)..Pfn(start + count)
    }
}
