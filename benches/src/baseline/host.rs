//! What a whole fault needs besides its table, in the plainest form that is correct: slots, an invalidation count and
//! the choice of a level. The baselines that resolve whole faults share it.

use super::tree::Stuck;
use crate::sync::{AtomicU64, Ordering, Padded};
use tdp_arch::{Gfn, GfnRange, Level, Pfn};

/// Guest memory of a baseline.
#[derive(Clone, Copy, Debug)]
pub struct Backing {
    /// The guest frames.
    pub gfns: GfnRange,
    /// Host frame of the first of them.
    pub pfn: Pfn,
    /// Largest page of the host memory.
    pub level: Level,
}

impl Backing {
    /// Host frame of `gfn`, which lies in the range.
    #[inline(always)]
    pub fn pfn_of(&self, gfn: Gfn) -> Pfn {
        Pfn(self.pfn.0 + (gfn.0 - self.gfns.start.0))
    }

    /// First guest frame of every page of the backing's size.
    pub fn pages(&self) -> impl Iterator<Item = Gfn> + use<> {
        (self.gfns.start.0..self.gfns.end.0)
            .step_by(self.level.pages() as usize)
            .map(Gfn)
    }

    /// Largest level at which `gfn` can be mapped: its whole page lies in the range and host memory of that size is
    /// behind it.
    #[inline(always)]
    pub fn largest(&self, gfn: Gfn) -> Level {
        let mut level = self.level;
        while let Some(below) = level.below() {
            let page = level.range(gfn);
            if self.gfns.covers(page) && level.is_aligned(Gfn(self.pfn_of(gfn).0 ^ gfn.0)) {
                break;
            }
            level = below;
        }
        level
    }
}

/// See the module.
#[derive(Debug)]
pub struct Host {
    slots: Vec<Backing>,
    /// Counts invalidations; a fault that saw another value before it took its lock starts over.
    invalidations: Padded<AtomicU64>,
}

impl Host {
    /// A host with one slot.
    pub fn new(backing: Backing) -> Self {
        Self {
            slots: vec![backing],
            invalidations: Padded(AtomicU64::new(0)),
        }
    }

    /// The count to hand to [`Host::is_stale`] later.
    #[inline(always)]
    pub fn invalidations(&self) -> u64 {
        // Acquire: the slot is looked up after the count is read.
        self.invalidations.0.load(Ordering::Acquire)
    }

    /// Whether an invalidation has overtaken a look-up made after `seen` was read.
    #[inline(always)]
    pub fn is_stale(&self, seen: u64) -> bool {
        self.invalidations.0.load(Ordering::Acquire) != seen
    }

    /// The slot that holds `gfn`.
    ///
    /// # Errors
    ///
    /// [`Stuck::NoSlot`].
    #[inline(always)]
    pub fn slot(&self, gfn: Gfn) -> Result<&Backing, Stuck> {
        let after = self.slots.partition_point(|slot| slot.gfns.start <= gfn);
        self.slots[..after]
            .last()
            .filter(|slot| slot.gfns.contains(gfn))
            .ok_or(Stuck::NoSlot(gfn))
    }
}

/// What a vCPU counts for itself.
#[derive(Debug, Default)]
pub struct Counters {
    /// Faults that mapped something.
    pub fixed: u64,
    /// Faults that found it mapped.
    pub spurious: u64,
    /// Leaves mapped, by level.
    pub pages: [u64; 3],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chooses_the_level_by_alignment_and_bounds() {
        let range = GfnRange::new(Gfn(0x200), 0x400 + 7).unwrap();
        let aligned = Backing {
            gfns: range,
            pfn: Pfn(0x1_0000),
            level: Level::L3,
        };
        assert_eq!(
            aligned.largest(Gfn(0x3ff)),
            Level::L2,
            "1G would leave the slot"
        );
        assert_eq!(
            aligned.largest(Gfn(0x603)),
            Level::L1,
            "2M would leave the slot"
        );
        let shifted = Backing {
            pfn: Pfn(0x1_0001),
            ..aligned
        };
        assert_eq!(shifted.largest(Gfn(0x3ff)), Level::L1);
        let small = Backing {
            level: Level::L1,
            ..aligned
        };
        assert_eq!(small.largest(Gfn(0x3ff)), Level::L1);
    }

    #[test]
    fn finds_the_slot() {
        let host = Host::new(Backing {
            gfns: GfnRange::new(Gfn(16), 16).unwrap(),
            pfn: Pfn(100),
            level: Level::L1,
        });
        assert_eq!(host.slot(Gfn(15)).unwrap_err(), Stuck::NoSlot(Gfn(15)));
        assert_eq!(host.slot(Gfn(31)).unwrap().pfn_of(Gfn(31)), Pfn(115));
        assert!(host.slot(Gfn(32)).is_err());
    }
}
