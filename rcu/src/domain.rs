//! The domain: what ties readers, visits and garbage together.
//!
//! `retire` puts garbage into the queue; `drive` takes it through the section stage (`queue.rs`) and hands what is ripe to
//! the collector, which drops it once the visits that were there have ended. The queue lock is held for neither: the drop of
//! a `G` may be slow and may call back into the domain.
//!
//! Nothing runs in the background and no call except `synchronize`, `synchronize_sections`, `reclaim` and `drain` waits
//! for a reader. The garbage is bounded by the caller: `retire` drives past half of the bound, and an allocator that runs
//! out, or sees the bound passed, calls `reclaim`.

use alloc::vec::Vec;

use crossbeam_epoch::Collector;

use crate::barrier;
use crate::counters::{Batch, Counters, Tally};
use crate::queue::Queue;
use crate::section::{Home, Reader, Registry};
use crate::sync::{Arc, AtomicBool, Backoff, Mutex, Ordering, Pause};
use crate::visit::{self, Visit};

/// How often a drive moves the epoch on. A bag of garbage is dropped two advances after it was sealed; the first flush
/// seals it, so that with no visit in the way three rounds drop all that one drive hands over.
const ROUNDS: usize = 3;

/// How a domain is set up.
#[derive(Clone, Copy, Debug)]
pub struct DomainConfig {
    /// The weight of garbage that may wait, in the unit given to [`Domain::retire`]. Past half of it `retire` drives.
    pub bound: usize,
}

impl Default for DomainConfig {
    fn default() -> Self {
        Self { bound: 4096 }
    }
}

/// A reclamation domain for garbage of type `G`, which is freed by dropping it. Clones are the same domain.
///
/// The drop of a `G` runs in whatever call moved it on (`drive`, `retire`, `visit`, the blocking calls), without a lock of
/// the domain held; it may retire more. It should not panic: a panic passes through that call.
///
/// When the last clone and the last [`Reader`] are gone, everything that still waits is dropped at once: no section and no
/// visit can be alive then.
pub struct Domain<G: Send + 'static> {
    inner: Arc<Inner<G>>,
}

// The order of the fields is the order of their drops: first what waits for sections (there are none: every reader holds
// this), then the collector (nobody visits: a visit borrows a domain, which holds this), whose last reference drops all
// that was deferred on it.
struct Inner<G: Send + 'static> {
    queue: Mutex<Queue<G>>,
    collector: Collector,
    registry: Registry,
    tally: Arc<Tally>,
    bound: u64,
}

impl<G: Send + 'static> Home for Inner<G> {
    fn registry(&self) -> &Registry {
        &self.registry
    }
}

impl<G: Send + 'static> Domain<G> {
    /// Makes a domain without readers.
    pub fn new(config: DomainConfig) -> Self {
        Self::with_fences(config, false)
    }

    /// Makes a domain whose sections cost one fence less as long as grace periods are rare, at the price of some of these,
    /// which interrupt every running thread of the process (`membarrier(2)`); see `barrier.rs`. The same as
    /// [`new`](Self::new) where the system has no such call.
    pub fn asymmetric(config: DomainConfig) -> Self {
        Self::with_fences(config, barrier::can_be_asymmetric())
    }

    fn with_fences(config: DomainConfig, asymmetric: bool) -> Self {
        let tally = Arc::new(Tally::default());
        let bound = config.bound as u64;
        Self {
            inner: Arc::new(Inner {
                queue: Mutex::new(Queue::new(&tally, bound / 2)),
                collector: Collector::new(),
                registry: Registry::new(asymmetric),
                tally,
                bound,
            }),
        }
    }

    /// Registers a reader: one per vCPU. Takes a lock and allocates.
    pub fn reader(&self) -> Reader {
        Reader::register(self.inner.clone())
    }

    /// Begins a visit: what is reachable from here on stays until it ends. Allocates, and may drop garbage that is ripe.
    pub fn visit(&self) -> Visit<'_> {
        Visit::begin(&self.inner.collector)
    }

    /// Takes garbage that no new reader can reach any more, and drops it once no old one can be inside.
    ///
    /// `weight` is what it counts for against the bound, at least 1. May be called inside a section or a visit, waits for no reader, and
    /// costs a push under a lock; past half of the bound it drives, which may drop other garbage.
    pub fn retire(&self, garbage: G, weight: usize) {
        let inner = &*self.inner;
        let drive = inner
            .queue
            .lock()
            .push(garbage, weight.max(1) as u64, &inner.tally);
        if drive {
            let _done = DriveDone(inner);
            self.drive();
        }
    }

    /// Moves garbage on as far as readers allow, waiting for none: polls the sections, hands over what is ripe, advances
    /// the epoch. Returns the weight that was freed meanwhile, by whomever.
    ///
    /// May be called anywhere; inside a section or a visit, what that one holds up stays.
    pub fn drive(&self) -> usize {
        let inner = &*self.inner;
        let before = inner.tally.freed();
        inner.tally.drives.fetch_add(1, Ordering::Relaxed);
        let ripe = inner.queue.lock().advance(&inner.registry, &inner.tally);
        let nothing_deferred = || inner.tally.pending_epoch() == 0;
        if !ripe.is_empty() || !nothing_deferred() {
            inner.advance_epoch(ripe, nothing_deferred);
        }
        inner.rearm();
        inner.tally.freed().wrapping_sub(before) as usize
    }

    /// Blocks until every section and every visit that began before has ended or been repinned (a visit up to twice);
    /// drives at the end. A visit that begins meanwhile may be waited for as well.
    ///
    /// Garbage that was retired before may still wait for sections and visits that began later: that is what
    /// [`drain`](Self::drain) is for. Must not be called by a thread inside a section or a visit of this domain: it would
    /// wait for itself, which debug builds with std report by a panic.
    pub fn synchronize(&self) {
        let inner = &*self.inner;
        visit::forbid_own(&inner.collector);
        self.synchronize_sections();
        // What has been retired goes to the collector before the flag does, because bags go in the order in which they
        // came: each visit that ended has left one, and a drive takes only so many.
        if inner.tally.pending() != 0 {
            self.drive();
        }
        // The collector drops what is deferred on it when all the visits of now have ended: a flag will do.
        let ended = Arc::new(AtomicBool::new(false));
        {
            let ended = ended.clone();
            let handle = inner.collector.register();
            let guard = handle.pin();
            // Release, partner of the Acquire below: the visits' accesses happen before this call returns, by way of
            // whichever thread ran this.
            guard.defer(move || ended.store(true, Ordering::Release));
            guard.flush();
        }
        let backoff = Backoff::new();
        loop {
            inner.advance_epoch(Vec::new(), || ended.load(Ordering::Acquire));
            if ended.load(Ordering::Acquire) {
                break;
            }
            backoff.snooze();
        }
        self.drive();
    }

    /// Blocks until every section that was inside at the call has left: the grace period of an invalidation. Does not wait
    /// for visits, frees nothing, allocates nothing.
    ///
    /// What the caller wrote before is seen by every section that begins later; what a section wrote that began earlier is
    /// seen by the caller after. Must not be called by a thread inside a section of this domain, as for
    /// [`synchronize`](Self::synchronize).
    pub fn synchronize_sections(&self) {
        self.inner.registry.synchronize();
    }

    /// Has every reader's [`stamp`](crate::Section::stamp) move, so that what it remembers from section to section is found
    /// anew: for whoever has changed what can be found. A section that still goes by the old one began before, and is
    /// waited for by [`synchronize_sections`](Self::synchronize_sections) after this.
    pub fn move_stamps(&self) {
        self.inner.registry.move_stamps();
    }

    /// Drives until something is freed, at most `attempts` times with a growing wait between: for an allocator that ran
    /// out. Returns the weight freed.
    pub fn reclaim(&self, attempts: usize) -> usize {
        self.drive_until(attempts, |freed| freed > 0)
    }

    /// Drives until nothing waits, at most `attempts` times, with a growing wait where one frees nothing. Returns
    /// whether nothing waits.
    pub fn drain(&self, attempts: usize) -> bool {
        self.drive_until(attempts, |_| self.pending() == 0);
        self.pending() == 0
    }

    fn drive_until(&self, attempts: usize, enough: impl Fn(usize) -> bool) -> usize {
        // A reader may be stopped in the middle of its section for as long as others have the processor: the wait grows to
        // what that takes.
        let mut pause = Pause::new();
        let mut freed = 0;
        let mut stuck = false;
        for _ in 0..attempts {
            if stuck {
                pause.wait();
            }
            let now = self.drive();
            freed += now;
            if enough(freed) {
                break;
            }
            // After progress nobody is known to be in the way of the rest: garbage of garbage, for example.
            stuck = now == 0;
            if !stuck {
                pause = Pause::new();
            }
        }
        freed
    }

    /// The weight that waits; cheap, and exact up to what is being retired at this moment.
    #[inline]
    pub fn pending(&self) -> usize {
        self.inner.tally.pending() as usize
    }

    /// Whether more waits than the bound: who allocates is to call [`reclaim`](Self::reclaim) first.
    #[inline]
    pub fn is_over_bound(&self) -> bool {
        self.inner.tally.pending() > self.inner.bound
    }

    /// What the domain has done so far, and what waits.
    pub fn counters(&self) -> Counters {
        let inner = &*self.inner;
        let readers = inner.registry.len() as u64;
        let queue = inner.queue.lock();
        let tally = &inner.tally;
        let freed = tally.freed();
        let retired = tally.retired.load(Ordering::Relaxed);
        let deferred = tally.deferred.load(Ordering::Relaxed);
        Counters {
            retired,
            freed,
            pending: retired.wrapping_sub(freed),
            pending_epoch: deferred.wrapping_sub(freed),
            pending_max: queue.pending_max,
            grace_periods: queue.grace_periods,
            drives: tally.drives.load(Ordering::Relaxed),
            readers,
        }
    }
}

impl<G: Send + 'static> Inner<G> {
    /// Hands ripe batches to the collector and moves its epoch on, without waiting, until `enough` or as often as it takes
    /// with no visit in the way.
    fn advance_epoch(&self, ripe: Vec<Batch<G>>, enough: impl Fn() -> bool) {
        let handle = self.collector.register();
        let mut guard = handle.pin();
        if !ripe.is_empty() {
            // One deferral for all of them: should the drop of a `G` panic, the vector still drops the others, and no other
            // deferral shares the participant's bag.
            guard.defer(move || drop(ripe));
        }
        for _ in 0..ROUNDS {
            guard.flush();
            if enough() {
                break;
            }
            guard.repin();
        }
    }

    /// Sets when `retire` drives next: past half of the bound, or, if a reader holds up more than that, after a sixteenth
    /// of the bound more.
    fn rearm(&self) {
        let mut queue = self.queue.lock();
        let step = (self.bound / 16).max(1);
        let pending = self.tally.pending();
        let half = self.bound / 2;
        queue.set_drive_at(if pending > half {
            pending.saturating_add(step)
        } else {
            half
        });
    }
}

/// Ends the drive of a `retire`, when the drop of garbage panics too.
struct DriveDone<'a, G: Send + 'static>(&'a Inner<G>);

impl<G: Send + 'static> Drop for DriveDone<'_, G> {
    fn drop(&mut self) {
        self.0.queue.lock().drive_done();
    }
}

impl<G: Send + 'static> Clone for Domain<G> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
        }
    }
}

impl<G: Send + 'static> core::fmt::Debug for Domain<G> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Domain")
            .field("counters", &self.counters())
            .finish()
    }
}
