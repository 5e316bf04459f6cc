//! The combiner: one thread carries the removals of many.
//!
//! Protocol. A module that blocks under a lock of its whole table refuses all but one of the threads that block at the same
//! time. So a thread that wants entries removed, all of them frozen by it, puts its request into the queue and then either
//! carries, for itself and for everybody who has queued meanwhile: many blocks, one ticket, many removals; or finds that its
//! request has been carried. A request changes hands whole, with the ownership of its frozen entries (INV: frozen-owns).
//!
//! There is no lock around the hook here either: whoever faults, installs or links does not come by. Only threads that the
//! module would refuse wait for each other, and only for modules that say so
//! ([`Capabilities::serialises_block`](super::Capabilities::serialises_block)).

use super::{HandOffCause, HandOffError, HandOffStep};
use crate::frozen::EntryPlace;
use alloc::vec::Vec;
use tdp_arch::{Pfn, Spte};
use tdp_rcu::sync::{Arc, AtomicBool, Mutex, Ordering, Pause, Plain};

/// A frozen entry that is to be removed, without its type-state: to be handed from thread to thread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Removal {
    /// The table page that holds the entry, kept from going away by the entry being frozen.
    pub(crate) table: Pfn,
    pub(crate) index: usize,
    pub(crate) place: EntryPlace,
    /// What it held: a leaf, or a table whose entries are all sealed.
    pub(crate) old: Spte,
    /// How it ended, once it was carried.
    pub(crate) result: Option<Result<(), HandOffError>>,
}

#[derive(Debug, Default)]
struct Job {
    work: Mutex<Vec<Removal>>,
    done: AtomicBool,
}

impl Job {
    fn is_done(&self) -> bool {
        // Acquire: pairs with the Release of the carrier, whose results are to be seen.
        self.done.load(Ordering::Acquire)
    }
}

/// Gives the results of a request back to who asked, by unwinding too.
struct GiveBack<'a> {
    job: Arc<Job>,
    work: &'a mut Vec<Removal>,
}

impl Drop for GiveBack<'_> {
    fn drop(&mut self) {
        self.work.append(&mut self.job.work.lock());
    }
}

#[derive(Debug, Default)]
pub(crate) struct Combiner {
    queue: Mutex<Vec<Arc<Job>>>,
    carrying: AtomicBool,
    /// Requests that another thread has carried.
    carried: Plain,
    /// Requests that found another thread carrying.
    waits: Plain,
}

impl Combiner {
    /// Requests so far that another thread than the asking one has carried.
    pub(crate) fn carried(&self) -> u64 {
        self.carried.get()
    }

    /// Requests so far that had to wait because another thread was carrying, whoever carried them in the end.
    pub(crate) fn waits(&self) -> u64 {
        self.waits.get()
    }

    /// Has `work` done by `carry`, on this thread or another, together with what others want done. The results are in `work`
    /// afterwards, if `carry` panics too.
    pub(crate) fn submit(&self, work: &mut Vec<Removal>, mut carry: impl FnMut(&mut [Removal])) {
        let job = Arc::new(Job {
            work: Mutex::new(core::mem::take(work)),
            done: AtomicBool::new(false),
        });
        let mine = GiveBack { job, work };
        self.queue.lock().push(mine.job.clone());
        let mut pause = Pause::new();
        let mut own = false;
        let mut waited = false;
        while !mine.job.is_done() {
            // Looked at first: whoever waits writes nothing.
            if self.carrying.load(Ordering::Relaxed) || self.carrying.swap(true, Ordering::Acquire)
            {
                if !waited {
                    waited = true;
                    self.waits.add_shared(1);
                }
                pause.wait();
                continue;
            }
            let _carrying = Carrying(self);
            own = true;
            while !mine.job.is_done() {
                self.carry_all(&mut carry);
            }
        }
        if !own {
            self.carried.add_shared(1);
        }
    }

    fn carry_all(&self, carry: &mut impl FnMut(&mut [Removal])) {
        let jobs = core::mem::take(&mut *self.queue.lock());
        let mut all: Vec<Removal> = Vec::new();
        let mut ends = Vec::with_capacity(jobs.len());
        for job in &jobs {
            all.append(&mut job.work.lock());
            ends.push(all.len());
        }
        let mut returned = Return { jobs, ends, all };
        carry(&mut returned.all);
    }
}

/// Gives requests back with their results when dropped, by unwinding too.
struct Return {
    jobs: Vec<Arc<Job>>,
    ends: Vec<usize>,
    all: Vec<Removal>,
}

impl Drop for Return {
    fn drop(&mut self) {
        for removal in &mut self.all {
            // Only a panic leaves something undone.
            removal.result.get_or_insert(Err(HandOffError {
                place: removal.place,
                step: HandOffStep::Remove,
                cause: HandOffCause::Panicked,
            }));
        }
        let mut start = 0;
        for (job, &end) in self.jobs.iter().zip(&self.ends) {
            if let Some(part) = self.all.get(start..end) {
                job.work.lock().extend_from_slice(part);
            }
            start = end;
            // Release: the results are there for whoever sees it done.
            job.done.store(true, Ordering::Release);
        }
    }
}

struct Carrying<'a>(&'a Combiner);

impl Drop for Carrying<'_> {
    fn drop(&mut self) {
        self.0.carrying.store(false, Ordering::Release);
    }
}
