//! What waits for a grace period, and how each kind is freed.

use crate::host::{FrameSource, Host, SharedHost};
use crate::invalidate::Ranges;
use crate::slots::Snapshot;
use alloc::boxed::Box;
use alloc::vec::Vec;
use tdp_arch::Pfn;

/// Something that no new reader can find, and that is freed by dropping it once the old ones have gone.
pub(crate) enum Retired<H: Host> {
    /// Tables, unlinked, sealed and flushed.
    Tables {
        /// Where they go back to.
        host: SharedHost<H>,
        /// The tables.
        frames: Vec<Pfn>,
    },
    /// A replaced state of the memory slots.
    Slots {
        /// Dropped with this.
        _snapshot: Box<Snapshot<H::Backing>>,
    },
    /// A replaced list of ranges under invalidation.
    Ranges {
        /// Dropped with this.
        _ranges: Box<Ranges>,
    },
}

impl<H: Host> Retired<H> {
    pub(crate) fn tables(host: SharedHost<H>, frames: Vec<Pfn>) -> Self {
        Retired::Tables { host, frames }
    }
}

impl<H: Host> Drop for Retired<H> {
    fn drop(&mut self) {
        if let Retired::Tables { host, frames } = self {
            host.frames().free(frames);
        }
    }
}
