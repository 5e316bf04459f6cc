//! Whoever copies what is written, by the dirty log alone: this is how lost dirty pages are found.
//!
//! The log is switched on, everything is copied, then only what the log tells, by bitmap and by rings, each time after the
//! flush. When everybody rests the remainder is copied, and the copy must equal the memory.

use super::Random;
use super::chaos::{self, Met, Rates};
use super::hands::Done;
use super::world::{Flaw, Half, LOGGED, SPACE, World};
use crate::ours::Walked;
use crate::sync::Ordering;
use tdp::SlotFlags;

/// What it does in a round.
const OPERATIONS: u64 = 30;

/// See the module.
pub(super) struct Copier<'w, F: Walked, P: Half> {
    world: &'w World<F, P>,
    copy: Vec<u64>,
    /// Pages to be copied.
    told: Vec<bool>,
    is_logging: bool,
    pub(super) done: Done,
    pub(super) met: Met,
}

impl<'w, F: Walked, P: Half> Copier<'w, F, P> {
    pub(super) fn new(world: &'w World<F, P>) -> Self {
        let pages = world.memory.logged.pages() as usize;
        Self {
            world,
            copy: vec![0; pages],
            told: vec![false; pages],
            is_logging: false,
            done: Done::new(),
            met: Met::default(),
        }
    }

    /// One round.
    pub(super) fn run(&mut self, seed: u64) {
        let mut random = Random(seed);
        // Frames may run out and panic while a log begins; nothing else is called back.
        let rates = Rates {
            panic: self.world.plan.rates.panic / 20,
            ..self.world.plan.rates
        };
        chaos::begin(random.next(), rates);
        for _ in 0..OPERATIONS {
            if self.world.broken.load(Ordering::Relaxed) {
                break;
            }
            let (choice, flags) = (random.below(8), random.below(4));
            match (self.is_logging, choice) {
                (false, _) => self.begin(flags),
                (true, 0) => self.stop(),
                (true, _) => self.collect(),
            }
            for _ in 0..random.below(16) {
                std::thread::yield_now();
            }
        }
        self.met.add(&chaos::end());
    }

    fn note(&mut self, name: &'static str, times: u64) {
        *self.done.entry(name).or_default() += times;
    }

    fn begin(&mut self, choice: u64) {
        let mut flags = SlotFlags::LOG_DIRTY;
        if choice & 1 != 0 {
            flags |= SlotFlags::LOG_MANUAL;
        }
        if choice & 2 != 0 {
            flags |= SlotFlags::LOG_INITIALLY_SET;
        }
        let slots = self.world.mmu.slots();
        let begun = chaos::survive(|| slots.set_flags(SPACE, LOGGED, flags));
        match begun {
            Some(Ok(())) => self.note("log_begun", 1),
            Some(Err(_)) => self.note("log_refused", 1),
            None => self.note("log_unwound", 1),
        }
        // A log whose beginning was cut short is there, and must tell the truth.
        self.is_logging = self.world.mmu.dirty_log(SPACE, LOGGED).is_ok();
        if self.is_logging {
            (0..self.copy.len())
                .for_each(|page| self.copy[page] = self.world.memory.homes.value(page));
            self.told.fill(false);
        }
    }

    fn stop(&mut self) {
        let slots = self.world.mmu.slots();
        let _ = chaos::survive(|| slots.set_flags(SPACE, LOGGED, SlotFlags::empty()));
        self.is_logging = self.world.mmu.dirty_log(SPACE, LOGGED).is_ok();
        self.note("log_ended", 1);
    }

    /// Copies what the log tells.
    fn collect(&mut self) {
        let mmu = &self.world.mmu;
        let Ok(log) = mmu.dirty_log(SPACE, LOGGED) else {
            self.world.verdict.violation("the log is gone");
            return;
        };
        let mut bitmap = vec![0; log.words()];
        // Where leaves are made small first, frames may panic: what was taken by then is told again.
        let Some(collected) = chaos::survive(|| log.collect(&mut bitmap)) else {
            return self.note("log_unwound", 1);
        };
        let Ok(mut pending) = collected else {
            self.world
                .verdict
                .violation("the log has another length than it says");
            return;
        };
        let by_mask = mmu
            .slots()
            .by_id(SPACE, LOGGED)
            .is_some_and(|slot| slot.flags().contains(SlotFlags::LOG_MANUAL));
        if by_mask {
            let _ = pending.flush();
            match chaos::survive(|| log.clear(0, &bitmap)) {
                Some(Ok(cleared)) => pending = cleared,
                Some(Err(error)) => return self.world.verdict.violation(error),
                None => return self.note("log_unwound", 1),
            }
        }
        for page in 0..self.told.len() {
            self.told[page] |= bitmap[page / 64] >> (page % 64) & 1 != 0;
        }
        let mut by_rings = 0;
        for ring in mmu.dirty_rings() {
            by_rings += ring.harvest(|page| {
                if page.slot == LOGGED
                    && let Some(told) = self.told.get_mut(page.offset as usize)
                {
                    *told = true;
                }
            });
        }
        let Some(reset) = chaos::survive(|| mmu.reset_dirty_rings()) else {
            let _ = pending.flush();
            return self.note("log_unwound", 1);
        };
        let copied = if self.world.flaw == Some(Flaw::CopyFirst) {
            let copied = self.take();
            std::thread::sleep(std::time::Duration::from_millis(1));
            let _ = (pending.flush(), reset.flush());
            copied
        } else {
            let _ = (pending.flush(), reset.flush());
            self.take()
        };
        self.note("log_collected", 1);
        self.note("pages_copied", copied);
        self.note("ring_entries_harvested", by_rings);
    }

    fn take(&mut self) -> u64 {
        let mut copied = 0;
        for (page, told) in self.told.iter_mut().enumerate() {
            if std::mem::take(told) {
                self.copy[page] = self.world.memory.homes.value(page);
                copied += 1;
            }
        }
        copied
    }

    /// Nobody is at work: copies the rest and compares. Returns pages that were compared.
    pub(super) fn settle(&mut self) -> u64 {
        if !self.is_logging {
            return 0;
        }
        self.collect();
        for page in 0..self.copy.len() {
            let is = self.world.memory.homes.value(page);
            if self.copy[page] != is {
                self.world.verdict.violation(format_args!(
                    "page {page} was written {is} times, its copy says {}: lost by the log",
                    self.copy[page]
                ));
            }
        }
        self.copy.len() as u64
    }
}
