//! The section stage: garbage that waits for the sections which were inside when it was unlinked.
//!
//! `incoming` collects what is retired. A drive closes it into a *generation*: the batch, and the sections that are
//! inside after all of it was unlinked. Generations end in the order in which they were closed: a section that holds up an
//! older one was inside when the younger one was closed, so the younger one waits for it as well. Everything here runs
//! under the domain's queue lock, and nothing here drops a `G`.

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::mem;

use crate::counters::{Batch, Tally};
use crate::section::{Laggards, Registry};
use crate::sync::{Arc, Ordering};

/// How many generations wait at most. What is retired beyond them stays in `incoming` and takes part in a later one, so
/// that a stuck section does not make every drive scan all records.
const GENERATIONS: usize = 4;

pub(crate) struct Queue<G> {
    incoming: Batch<G>,
    waiting: VecDeque<Generation<G>>,
    /// Weight past which `retire` drives.
    drive_at: u64,
    /// A drive that `retire` started is running.
    driving: bool,
    pub(crate) pending_max: u64,
    pub(crate) grace_periods: u64,
}

struct Generation<G> {
    batch: Batch<G>,
    laggards: Laggards,
}

impl<G> Queue<G> {
    pub(crate) fn new(tally: &Arc<Tally>, drive_at: u64) -> Self {
        Self {
            incoming: Batch::new(tally),
            waiting: VecDeque::new(),
            drive_at,
            driving: false,
            pending_max: 0,
            grace_periods: 0,
        }
    }

    /// Takes garbage in. Says whether the caller is to drive; if so it calls [`drive_done`](Self::drive_done) after.
    pub(crate) fn push(&mut self, garbage: G, weight: u64, tally: &Tally) -> bool {
        self.incoming.garbage.push(garbage);
        self.incoming.bill.weight = self.incoming.bill.weight.wrapping_add(weight);
        // Relaxed: written under the queue lock only.
        let retired = tally.retired.load(Ordering::Relaxed).wrapping_add(weight);
        tally.retired.store(retired, Ordering::Relaxed);
        let pending = retired.wrapping_sub(tally.freed());
        self.pending_max = self.pending_max.max(pending);
        // One of these at a time is enough; a `G` whose drop retires does not start another from within.
        let drive = pending > self.drive_at && !self.driving;
        self.driving |= drive;
        drive
    }

    /// Ends a drive that `push` asked for.
    pub(crate) fn drive_done(&mut self) {
        self.driving = false;
    }

    /// Sets the weight past which `push` asks for the next drive.
    pub(crate) fn set_drive_at(&mut self, weight: u64) {
        self.drive_at = weight;
    }

    /// Closes `incoming` into a generation, if there is room for one, and takes out the batches whose sections have left.
    pub(crate) fn advance(&mut self, registry: &Registry, tally: &Arc<Tally>) -> Vec<Batch<G>> {
        let mut ripe = Vec::new();
        self.take_ripe(&mut ripe);
        if !self.incoming.garbage.is_empty() && self.waiting.len() < GENERATIONS {
            let batch = mem::replace(&mut self.incoming, Batch::new(tally));
            // The lock under which each item was pushed orders its unlinking before this snapshot.
            let laggards = registry.snapshot();
            self.waiting.push_back(Generation { batch, laggards });
            self.take_ripe(&mut ripe);
        }
        let weight = ripe.iter().map(|batch: &Batch<G>| batch.bill.weight);
        let deferred = weight.fold(tally.deferred.load(Ordering::Relaxed), u64::wrapping_add);
        tally.deferred.store(deferred, Ordering::Relaxed);
        ripe
    }

    fn take_ripe(&mut self, ripe: &mut Vec<Batch<G>>) {
        while self
            .waiting
            .front_mut()
            .is_some_and(|generation| generation.laggards.have_left())
        {
            ripe.extend(self.waiting.pop_front().map(|generation| generation.batch));
            self.grace_periods += 1;
        }
    }
}
