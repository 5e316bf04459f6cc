//! What a domain counts: weights in, weights out, the most that ever waited.
//!
//! `retired` and `deferred` are written under the domain's queue lock only, `freed` by whoever drops a batch, after the
//! drop. Nothing is freed before it was retired, so `freed <= deferred <= retired` always, and a reader that loads
//! `freed` first never sees a negative difference.

use crate::sync::{Arc, AtomicU64, CachePadded, Ordering};

/// What a domain has done so far, and what waits. Weights are in the unit that the caller of `retire` gave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Weight handed to `retire`.
    pub retired: u64,
    /// Weight of the garbage that has been dropped.
    pub freed: u64,
    /// Weight that waits: `retired - freed`, exact at one moment during the call.
    pub pending: u64,
    /// The part of `pending` that has left the section stage and waits for visits.
    pub pending_epoch: u64,
    /// The most that `pending` ever was.
    pub pending_max: u64,
    /// Section grace periods that batches of garbage have waited for and that have ended.
    pub grace_periods: u64,
    /// Calls of `drive`, including those that `retire` and the blocking calls make.
    pub drives: u64,
    /// Readers registered now.
    pub readers: u64,
}

/// The shared side of the counters.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Written under the queue lock.
    pub(crate) retired: AtomicU64,
    /// Written under the queue lock.
    pub(crate) deferred: AtomicU64,
    /// Written by whoever drops garbage, on a line of its own.
    freed: CachePadded<AtomicU64>,
    pub(crate) drives: AtomicU64,
}

impl Tally {
    /// The weight freed. Acquire, partner of the Release in [`Bill::drop`]: whoever sees a weight counted sees the drops
    /// that it stands for, in particular the frames that they gave back. (Counted too late, it would see frames and no
    /// weight, which harms nobody.)
    #[inline]
    pub(crate) fn freed(&self) -> u64 {
        self.freed.load(Ordering::Acquire)
    }

    /// The weight that waits; exact at the moment of the first load if the caller holds the queue lock, otherwise too
    /// high by at most what was retired between the two loads.
    #[inline]
    pub(crate) fn pending(&self) -> u64 {
        let freed = self.freed();
        self.retired.load(Ordering::Relaxed).wrapping_sub(freed)
    }

    /// The weight that the epoch stage holds, with the same exactness.
    #[inline]
    pub(crate) fn pending_epoch(&self) -> u64 {
        let freed = self.freed();
        self.deferred.load(Ordering::Relaxed).wrapping_sub(freed)
    }
}

/// Garbage together with what is counted once it is gone.
///
/// The fields drop in this order, by a panic in the drop of a `G` too: first the garbage, then the bill.
pub(crate) struct Batch<G> {
    pub(crate) garbage: alloc::vec::Vec<G>,
    pub(crate) bill: Bill,
}

impl<G> Batch<G> {
    pub(crate) fn new(tally: &Arc<Tally>) -> Self {
        Self {
            garbage: alloc::vec::Vec::new(),
            bill: Bill {
                tally: tally.clone(),
                weight: 0,
            },
        }
    }
}

/// A weight that is counted as freed when this is dropped.
pub(crate) struct Bill {
    tally: Arc<Tally>,
    pub(crate) weight: u64,
}

impl Drop for Bill {
    fn drop(&mut self) {
        self.tally.freed.fetch_add(self.weight, Ordering::Release);
    }
}
