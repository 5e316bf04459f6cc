//! Flush requests, the proof of a flush, and TLB tracking.
//!
//! Protocol of tracking. A global epoch, and per vCPU the epoch at which it entered the guest (0: not inside). *Track*
//! advances the epoch and waits until no vCPU is inside with an older one; a vCPU that enters publishes the epoch it
//! saw, and flushes its own TLB first if that is not the one of its last flush. So a vCPU that is outside when the epoch
//! moves is not waited for, and yet never runs with what it cached before.

use crate::host::{AddressSpaceId, FlushRequest, Host, MAX_ADDRESS_SPACES};
use crate::mmu::Shared;
use crate::reclaim::Retired;
use crate::stats::{Stat, Tally};
use alloc::sync::Arc;
use alloc::vec::Vec;
use tdp_arch::{Format, Gfn, GfnRange, Pfn};
use tdp_rcu::sync::{AtomicU64, Backoff, CachePadded, Mutex, Ordering, fence};

/// Proof that a flush has happened since a sweep changed its entries. Only flushing makes one.
#[derive(Debug)]
pub struct Flushed(());

impl Flushed {
    /// For an invalidation under which nothing of the shared half was taken away.
    pub(crate) const fn nothing_shared() -> Self {
        Self(())
    }
}

/// What a sweep leaves to be flushed: translations that vCPUs may still hold, and the tables that go with them.
///
/// Freeing anything the guest could reach through those translations needs the [`Flushed`] that
/// [`flush`](PendingFlush::flush) returns (INV: flush-before-reuse). Dropping it flushes too; it is never lost.
#[must_use = "what a sweep took away is still cached by vCPUs until it is flushed"]
pub struct PendingFlush<'a, F: Format, H: Host> {
    shared: &'a Shared<F, H>,
    /// One for each address space.
    requests: [Option<FlushRequest>; MAX_ADDRESS_SPACES],
    pub(crate) tables: Vec<Pfn>,
    leaves: u64,
    /// What the sweep covered in each address space, whatever it found there, if it may have found frames that others had
    /// emptied and not flushed.
    covered: [Option<GfnRange>; MAX_ADDRESS_SPACES],
    /// Sweeps that this is what is left of, each counted among the unflushed.
    open: u64,
}

/// The least range that holds both.
fn hull(a: GfnRange, b: GfnRange) -> GfnRange {
    GfnRange {
        start: Gfn(a.start.0.min(b.start.0)),
        end: Gfn(a.end.0.max(b.end.0)),
    }
}

impl<'a, F: Format, H: Host> PendingFlush<'a, F, H> {
    /// Opened before the first entry is changed: whoever finds an entry empty that this sweep emptied also finds the
    /// sweep counted, for as long as it has not flushed.
    pub(crate) fn new(shared: &'a Shared<F, H>) -> Self {
        // AcqRel: the exchanges that follow publish it; pairs with the Acquire in `has_others`.
        shared.unflushed.fetch_add(1, Ordering::AcqRel);
        Self {
            shared,
            requests: [None; MAX_ADDRESS_SPACES],
            tables: Vec::new(),
            leaves: 0,
            covered: [None; MAX_ADDRESS_SPACES],
            open: 1,
        }
    }

    /// Ends a sweep of `range`. Frames that another sweep or fault has emptied and not flushed yet are flushed by this one
    /// too: that it found nothing there does not mean that no vCPU does (INV: flush-before-reuse). Whether another has yet to
    /// flush is asked now, because one that begins later emptied nothing before, and once more when this one flushes: one
    /// that has flushed by then did it after it emptied what this sweep found, and one that was absorbed is this one.
    pub(crate) fn settle(&mut self, as_id: AddressSpaceId, range: GfnRange) {
        if self.has_others() {
            self.cover(as_id, range);
        }
    }

    /// Whether a sweep or fault that is no part of this one has yet to flush.
    fn has_others(&self) -> bool {
        self.shared.unflushed.load(Ordering::Acquire) > self.open
    }

    fn cover(&mut self, as_id: AddressSpaceId, range: GfnRange) {
        // There is nothing in a space that there is not.
        if let Some(covered) = self.covered.get_mut(usize::from(as_id.0)) {
            *covered = Some(covered.map_or(range, |before| hull(before, range)));
        }
    }

    /// Takes over what another sweep has left to be flushed, so that one flush for each address space does for both. Nothing
    /// that either noted is forgotten. What another MMU's sweep has left is flushed at once.
    pub fn absorb(&mut self, mut other: Self) {
        self.leaves += other.leaves;
        if !core::ptr::eq(self.shared, other.shared) {
            return other.run();
        }
        self.tables.append(&mut other.tables);
        for request in core::mem::take(&mut other.requests).into_iter().flatten() {
            self.note(request.as_id, request.range, request.tables);
        }
        for (as_id, covered) in (0..).zip(core::mem::take(&mut other.covered)) {
            if let Some(range) = covered {
                self.cover(AddressSpaceId(as_id), range);
            }
        }
        self.open += core::mem::take(&mut other.open);
    }

    /// Notes that translations of `range` went away. Monotone: what was noted stays noted.
    pub(crate) fn note(&mut self, as_id: AddressSpaceId, range: GfnRange, tables: bool) {
        let Some(request) = self.requests.get_mut(usize::from(as_id.0)) else {
            return;
        };
        let request = request.get_or_insert(FlushRequest {
            as_id,
            range,
            tables,
        });
        request.range = hull(request.range, range);
        request.tables |= tables;
    }

    pub(crate) fn count_leaf(&mut self) {
        self.leaves += 1;
    }

    pub(crate) fn count_leaves(&mut self, leaves: u64) {
        self.leaves += leaves;
    }

    /// Nothing needs to be flushed: what went away is below a root that no vCPU runs on or will run on.
    pub(crate) fn is_below_no_vcpu(&mut self) {
        self.requests = [None; MAX_ADDRESS_SPACES];
        self.covered = [None; MAX_ADDRESS_SPACES];
    }

    /// Whether there is nothing to flush.
    pub fn is_empty(&self) -> bool {
        let found_gone = || self.covered.iter().any(Option::is_some) && self.has_others();
        self.requests.iter().all(Option::is_none) && !found_gone()
    }

    /// Leaves that the sweep took away or restricted.
    pub fn leaves(&self) -> u64 {
        self.leaves
    }

    /// Tables that the sweep unlinked.
    pub fn tables(&self) -> usize {
        self.tables.len()
    }

    /// Flushes, then retires the unlinked tables: they are freed after a grace period.
    pub fn flush(mut self) -> Flushed {
        self.run();
        Flushed(())
    }

    fn run(&mut self) {
        let covered = core::mem::take(&mut self.covered);
        if self.has_others() {
            for (as_id, covered) in (0..).zip(covered) {
                if let Some(range) = covered {
                    self.note(AddressSpaceId(as_id), range, true);
                }
            }
        }
        // Taken before the host is called: if its flush panics the tables are leaked, never freed unflushed.
        let frames = core::mem::take(&mut self.tables);
        let open = core::mem::take(&mut self.open);
        for request in core::mem::take(&mut self.requests).into_iter().flatten() {
            self.shared.shards.sweeps.add(Stat::Flushes, 1);
            self.shared.host.flush(&request);
        }
        if open > 0 {
            // Release: the flush is over for whoever reads the lower count. A sweep whose flush panicked stays counted.
            self.shared.unflushed.fetch_sub(open, Ordering::Release);
        }
        if !frames.is_empty() {
            // INV: flush-before-reuse: unlinked, sealed and flushed; the grace period is the domain's.
            let weight = frames.len();
            let retired = Retired::tables(self.shared.host.clone(), frames);
            self.shared.domain.retire(retired, weight);
        }
    }
}

impl<F: Format, H: Host> Drop for PendingFlush<'_, F, H> {
    fn drop(&mut self) {
        self.run();
    }
}

impl<F: Format, H: Host> core::fmt::Debug for PendingFlush<'_, F, H> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("PendingFlush")
            .field("requests", &self.requests)
            .field("tables", &self.tables.len())
            .finish()
    }
}

/// Epoch 0 means "not in the guest".
const OUTSIDE: u64 = 0;

#[derive(Debug, Default)]
struct TlbRecord {
    /// Epoch at guest entry, or [`OUTSIDE`].
    inside: CachePadded<AtomicU64>,
}

#[derive(Debug)]
struct TrackerInner {
    epoch: CachePadded<AtomicU64>,
    vcpus: Mutex<Vec<Arc<TlbRecord>>>,
}

/// Which vCPUs may hold translations from before a moment. One per VM; a handle to it is cheap to clone.
#[derive(Clone, Debug)]
pub struct TlbTracker {
    inner: Arc<TrackerInner>,
}

impl Default for TlbTracker {
    fn default() -> Self {
        Self::new()
    }
}

impl TlbTracker {
    /// A tracker without vCPUs.
    pub fn new() -> Self {
        let inner = TrackerInner {
            epoch: CachePadded::new(AtomicU64::new(1)),
            vcpus: Mutex::new(Vec::new()),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Registers a vCPU, which is outside the guest and has an empty TLB.
    pub fn vcpu(&self) -> TlbVcpu {
        let record = Arc::new(TlbRecord::default());
        self.inner.vcpus.lock().push(record.clone());
        TlbVcpu {
            tracker: self.inner.clone(),
            record,
            entered: OUTSIDE,
            flushed_at: OUTSIDE,
        }
    }

    /// Advances the epoch and waits until every vCPU that is in the guest with an older one has left it. `kick` is
    /// called once with the number, in order of registration, of each that has to be made to leave.
    pub fn track(&self, kick: impl FnMut(usize)) {
        let epoch = self.begin(kick);
        let vcpus = self.records();
        for record in &vcpus {
            let backoff = Backoff::new();
            while record.is_behind(epoch) {
                backoff.snooze();
            }
        }
    }

    /// Advances the epoch without waiting and returns it: the first half of [`track`](TlbTracker::track), for those who
    /// poll.
    pub fn begin(&self, mut kick: impl FnMut(usize)) -> u64 {
        // SeqCst fence: pairs with the one in `enter`. Either a vCPU's entry is seen below and waited for, or the vCPU
        // sees the new epoch and flushes.
        let epoch = self.inner.epoch.fetch_add(1, Ordering::AcqRel) + 1;
        fence(Ordering::SeqCst);
        for (number, record) in self.records().iter().enumerate() {
            if record.is_behind(epoch) {
                kick(number);
            }
        }
        epoch
    }

    /// Whether no vCPU is in the guest with an older epoch than `epoch`, which [`begin`](TlbTracker::begin) returned.
    pub fn is_drained(&self, epoch: u64) -> bool {
        // SeqCst: as in `begin`, for vCPUs that the caller did not see then.
        fence(Ordering::SeqCst);
        !self
            .inner
            .vcpus
            .lock()
            .iter()
            .any(|record| record.is_behind(epoch))
    }

    fn records(&self) -> Vec<Arc<TlbRecord>> {
        self.inner.vcpus.lock().clone()
    }
}

impl TlbRecord {
    /// Whether its vCPU is in the guest with an older epoch.
    fn is_behind(&self, epoch: u64) -> bool {
        // Acquire: pairs with the Release of `exit` and `enter`, so that what the vCPU did inside came before.
        let inside = self.inside.load(Ordering::Acquire);
        inside != OUTSIDE && inside < epoch
    }
}

/// A vCPU's end of a [`TlbTracker`].
#[derive(Debug)]
pub struct TlbVcpu {
    tracker: Arc<TrackerInner>,
    record: Arc<TlbRecord>,
    entered: u64,
    flushed_at: u64,
}

impl TlbVcpu {
    /// Enters the guest. Returns whether the vCPU must flush its TLB before its first access.
    #[must_use = "a vCPU that must flush and does not runs with stale translations"]
    pub fn enter(&mut self) -> bool {
        loop {
            let epoch = self.tracker.epoch.load(Ordering::Relaxed);
            // Release, as in `exit`: the tracker may load this one, find the vCPU inside with the new epoch and go on
            // without having seen the `exit` before it. A plain store would not carry what came before that `exit`.
            self.record.inside.store(epoch, Ordering::Release);
            // SeqCst: pairs with the fence in `track`. If the store is ordered first, the tracker sees this vCPU inside;
            // if the tracker's advance is, the load below sees the new epoch and entry starts over.
            fence(Ordering::SeqCst);
            if self.tracker.epoch.load(Ordering::Acquire) == epoch {
                self.entered = epoch;
                break;
            }
        }
        core::mem::replace(&mut self.flushed_at, self.entered) != self.entered
    }

    /// Whether the vCPU is asked to leave the guest.
    #[inline]
    pub fn kicked(&self) -> bool {
        self.tracker.epoch.load(Ordering::Relaxed) != self.entered
    }

    /// Leaves the guest.
    pub fn exit(&mut self) {
        // Release: pairs with the Acquire of `track`.
        self.record.inside.store(OUTSIDE, Ordering::Release);
    }
}

impl Drop for TlbVcpu {
    fn drop(&mut self) {
        self.exit();
        self.tracker
            .vcpus
            .lock()
            .retain(|other| !Arc::ptr_eq(other, &self.record));
    }
}
