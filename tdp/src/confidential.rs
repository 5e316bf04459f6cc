//! What a confidential guest has beside its tables: phases of its life, attributes, the desk and the combiner.
//!
//! Protocol. A guest is *built* (pages with content go in, one after the other, measured in that order), then *runs*
//! (private faults are resolved), and in the end is *dead* (its key is released, everything is taken back at once). The
//! phase only moves forward. A fault reads it inside its critical section; whoever moves it to *dead* waits for the
//! sections that began before, so that no hand-off is in flight when the tree is taken apart.

use crate::attributes::{Attributes, Visibility};
use crate::protected::{Capabilities, Combiner, Desk};
use crate::range::Withheld;
use tdp_arch::{Gfn, Gpa, Level};
use tdp_rcu::sync::{AtomicU32, CachePadded, Ordering};

/// Where a confidential guest is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Phase {
    /// Pages with content go in. No private fault is resolved.
    Building = 0,
    /// Private faults are resolved.
    Running = 1,
    /// The module gave the guest up: nothing private changes any more but for being taken away.
    Lost = 2,
    /// Its key is released: pages can be reclaimed.
    Dead = 3,
}

impl Phase {
    const fn of(word: u32) -> Self {
        match word {
            0 => Phase::Building,
            1 => Phase::Running,
            2 => Phase::Lost,
            _ => Phase::Dead,
        }
    }
}

/// State of a confidential guest.
pub(crate) struct Confidential {
    /// Read by every fault.
    phase: AtomicU32,
    /// The bit of a guest frame that makes it shared; 0 if the fault itself says what it is.
    shared_bit: u64,
    pub(crate) capabilities: Capabilities,
    pub(crate) attributes: Attributes,
    /// Written by sweeps only.
    pub(crate) desk: CachePadded<Desk>,
    /// Written by sweeps only.
    pub(crate) combiner: CachePadded<Combiner>,
    /// Written by folds that fail only.
    pub(crate) withheld: Withheld,
}

impl Confidential {
    pub(crate) fn new(
        shared_bit: u64,
        limit: Gfn,
        default: Visibility,
        capabilities: Capabilities,
    ) -> Self {
        Self {
            phase: AtomicU32::new(Phase::Building as u32),
            shared_bit,
            capabilities,
            attributes: Attributes::new(limit, default),
            desk: CachePadded::new(Desk::new()),
            combiner: CachePadded::new(Combiner::default()),
            withheld: Withheld::default(),
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        // Acquire: pairs with `advance`.
        Phase::of(self.phase.load(Ordering::Acquire))
    }

    /// Whether the key is released.
    pub(crate) fn is_dead(&self) -> bool {
        self.phase() == Phase::Dead
    }

    /// Moves the phase forward. `false` if it was there or past it.
    pub(crate) fn advance(&self, to: Phase) -> bool {
        self.phase.fetch_max(to as u32, Ordering::AcqRel) < to as u32
    }

    /// Splits an address as the guest used it into its frame and whether it is private. `private` is what the fault says.
    #[inline(always)]
    pub(crate) fn route(&self, gpa: Gpa, private: bool) -> (Gfn, bool) {
        let gfn = gpa.gfn();
        if self.shared_bit == 0 {
            return (gfn, private);
        }
        (Gfn(gfn.0 & !self.shared_bit), gfn.0 & self.shared_bit == 0)
    }

    /// Largest private leaf in this phase.
    pub(crate) fn leaf_limit(&self) -> Level {
        match self.phase() {
            Phase::Building => self.capabilities.leaf_levels_before_finalise,
            _ => self.capabilities.leaf_levels,
        }
    }
}
