//! The host: threads that do to the guest's memory whatever the library can do, all at once.
//!
//! As for vCPUs, what is done is drawn before it is done. What the library may refuse is counted by name, with what a panic of
//! a callback ended.

use super::Random;
use super::chaos::{self, Met};
use super::world::{COMING, Flaw, Half, SPACE, Standing, World};
use crate::mmu_stress::homes::BLOCK;
use crate::ours::Walked;
use crate::sync::Ordering;
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;
use tdp::{Gfn, GfnRange, Level, Slot, SlotFlags, Steps, Visibility};

/// How often each thing was done.
pub(super) type Done = BTreeMap<&'static str, u64>;

/// What one of the host's threads does in a round.
const OPERATIONS: u64 = 100;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    MovePages,
    Zap,
    ZapLeaves,
    ZapInSteps,
    WriteProtect,
    WriteProtectFrame,
    Age,
    TestAge,
    Split,
    Collapse,
    RecoverNx,
    SwitchNx,
    InvalidateRoots,
    ChangeSlot,
    Look,
    Synchronize,
    Convert,
    ZapPrivate,
    FoldPrivate,
    AllowHuge,
}

/// By weight, and by name.
const DEEDS: [(u64, Deed, &str); 20] = [
    (8, Deed::MovePages, "invalidate_and_move_pages"),
    (3, Deed::Zap, "zap"),
    (3, Deed::ZapLeaves, "zap_leaves"),
    (1, Deed::ZapInSteps, "zap_in_steps"),
    (4, Deed::WriteProtect, "write_protect"),
    (2, Deed::WriteProtectFrame, "write_protect_frame"),
    (4, Deed::Age, "age"),
    (2, Deed::TestAge, "test_age"),
    (4, Deed::Split, "split"),
    (4, Deed::Collapse, "collapse"),
    (3, Deed::RecoverNx, "recover_nx"),
    (1, Deed::SwitchNx, "switch_nx"),
    (2, Deed::InvalidateRoots, "invalidate_roots"),
    (3, Deed::ChangeSlot, "change_slot"),
    (1, Deed::Look, "look"),
    (1, Deed::Synchronize, "synchronize"),
    (16, Deed::Convert, "convert"),
    (6, Deed::ZapPrivate, "zap_private"),
    (4, Deed::FoldPrivate, "fold_private"),
    (2, Deed::AllowHuge, "allow_huge"),
];

/// One of the host's threads.
pub(super) struct Hand<'w, F: Walked, P: Half> {
    world: &'w World<F, P>,
    pub(super) done: Done,
    pub(super) met: Met,
}

impl<'w, F: Walked, P: Half> Hand<'w, F, P> {
    pub(super) fn new(world: &'w World<F, P>) -> Self {
        Self {
            world,
            done: Done::new(),
            met: Met::default(),
        }
    }

    /// One round.
    pub(super) fn run(&mut self, seed: u64) {
        let mut random = Random(seed);
        chaos::begin(random.next(), self.world.plan.rates);
        let sum: u64 = DEEDS.iter().map(|(weight, ..)| weight).sum();
        for _ in 0..OPERATIONS {
            if self.world.broken.load(Ordering::Relaxed) {
                break;
            }
            let mut choice = random.below(sum);
            let found = DEEDS.iter().find(|(weight, ..)| {
                let chosen = choice < *weight;
                choice = choice.saturating_sub(*weight);
                chosen
            });
            let seed = random.next();
            if random.once_in(1000) {
                chaos::stall_next(Duration::from_millis(100 + random.below(1900)));
            }
            if let Some(&(_, deed, name)) = found {
                match chaos::survive(|| self.perform(deed, Random(seed))) {
                    Some(true) => self.note(name),
                    Some(false) => {}
                    None => self.note("unwound"),
                }
            }
            for _ in 0..random.below(4) {
                std::thread::yield_now();
            }
        }
        self.met.add(&chaos::end());
    }

    fn note(&mut self, name: &'static str) {
        *self.done.entry(name).or_default() += 1;
    }

    /// Does it; `false` if it was refused or means nothing to this guest.
    fn perform(&mut self, deed: Deed, mut random: Random) -> bool {
        let world = self.world;
        let mmu = &world.mmu;
        let pages = world.some_pages(&mut random);
        let range = world.gfns_of(&pages);
        let blocks = GfnRange {
            start: Level::L2.align_down(range.start),
            end: Level::L2.range(Gfn(range.end.0 - 1)).end,
        };
        match deed {
            Deed::MovePages => self.move_pages(&pages),
            Deed::Zap => drop(mmu.zap(SPACE, range).flush()),
            Deed::ZapLeaves => {
                let pending = mmu.zap_leaves(SPACE, range);
                // Taken away, and not flushed: others sweep the same range meanwhile.
                chaos::pause();
                let _ = pending.flush();
            }
            Deed::ZapInSteps => {
                let mut steps = Steps::new(blocks, 512).with_upper_tables();
                let zap = |part: GfnRange| mmu.zap(SPACE, part);
                if let Some(pending) = steps.run(zap, |_| std::ops::ControlFlow::Continue(())) {
                    let _ = pending.flush();
                }
            }
            Deed::WriteProtect => drop(mmu.write_protect(SPACE, range, Level::L1).flush()),
            Deed::WriteProtectFrame => drop(mmu.write_protect_gfn(SPACE, range.start).flush()),
            Deed::Age => drop(mmu.age(SPACE, range)),
            Deed::TestAge => drop(mmu.test_age(SPACE, range)),
            Deed::Split => {
                if mmu.split(SPACE, range, Level::L1).is_err() {
                    self.note("split_refused");
                    return false;
                }
            }
            Deed::Collapse => drop(mmu.collapse(SPACE, blocks).flush()),
            Deed::RecoverNx => drop(mmu.recover_nx(1 + random.below(4) as usize).flush()),
            Deed::SwitchNx => {
                if let Some(mut teardown) = mmu.set_nx_huge_pages(random.once_in(2)) {
                    teardown.reload();
                    teardown.finish();
                }
            }
            Deed::InvalidateRoots => self.invalidate_roots(random),
            Deed::ChangeSlot => return self.change_slot(random),
            Deed::Look => self.look(range),
            Deed::Synchronize => mmu.synchronize(),
            _ if !world.plan.confidential => return false,
            Deed::Convert => return self.convert(pages, random),
            Deed::ZapPrivate => {
                if mmu.zap_private(SPACE, range).is_err() {
                    self.note("zap_private_refused");
                    return false;
                }
            }
            Deed::FoldPrivate => match mmu.fold_private(SPACE, blocks) {
                Ok(folded) => *self.done.entry("tables_folded").or_default() += folded.folded,
                Err(_) => {
                    self.note("fold_private_refused");
                    return false;
                }
            },
            Deed::AllowHuge => mmu.allow_huge(range.start),
        }
        true
    }

    fn invalidate_roots(&self, mut random: Random) {
        let mut teardown = self.world.mmu.invalidate_roots();
        match random.below(4) {
            0 => drop(teardown.reload()),
            // Step by step, and the rest when it is dropped.
            1 => drop(teardown.step()),
            2 => {
                chaos::pause();
                teardown.finish();
            }
            _ => teardown.finish(),
        }
    }

    /// Gives pages other homes, and the old ones to others.
    fn move_pages(&self, pages: &Range<u64>) {
        let world = self.world;
        let memory = &world.memory;
        let _still = memory.coming.lock();
        let range = world.gfns_of(pages);
        let Some((first, _)) = memory.page(range.start) else {
            return;
        };
        let pages = range.pages() as usize;
        let give_away = || {
            if pages.is_multiple_of(BLOCK) && first.is_multiple_of(BLOCK) {
                (first / BLOCK..(first + pages) / BLOCK)
                    .for_each(|block| memory.homes.move_block(block));
            } else {
                (first..first + pages).for_each(|page| memory.homes.move_page(page));
            }
        };
        let invalidation = world.mmu.invalidate_begin(SPACE, range);
        chaos::pause();
        if world.flaw == Some(Flaw::GivesAwayFirst) {
            give_away();
            std::thread::yield_now();
        }
        let flushed = invalidation.zap().flush();
        if world.flaw != Some(Flaw::GivesAwayFirst) {
            give_away();
        }
        chaos::pause();
        invalidation.end(flushed);
    }

    /// Takes the slot that comes and goes away, brings it back, moves it, or changes whether it can be written.
    fn change_slot(&mut self, mut random: Random) -> bool {
        let world = self.world;
        let memory = &world.memory;
        let slots = world.mmu.slots();
        let choice = random.below(4);
        let waits = random.below(64);
        let lazily = random.once_in(2);
        let _lock = memory.coming.lock();
        let now = memory.standing();
        memory.stand(Standing {
            changing: true,
            ..now
        });
        let is_there = slots.by_id(SPACE, COMING).is_some();
        let done = chaos::survive(|| match choice {
            _ if !is_there => {
                let slot = Slot::new(memory.coming_at(now.moved), ()).with_id(COMING);
                slots.insert(slot).is_ok()
            }
            0 => {
                let flags = if now.read_only {
                    SlotFlags::empty()
                } else {
                    SlotFlags::READ_ONLY
                };
                slots.set_flags(SPACE, COMING, flags).is_ok()
            }
            // A private page is given once: its other place is not for guests that have such.
            1 | 2 if !world.plan.confidential => {
                let start = memory.coming_at(!now.moved).start;
                slots.move_to(SPACE, COMING, start).is_ok()
            }
            _ if lazily => match slots.remove_lazily(SPACE, COMING) {
                Ok(teardown) => {
                    memory.stand(Standing { gone: true, ..now });
                    (0..waits).for_each(|_| std::thread::yield_now());
                    teardown.finish();
                    true
                }
                Err(_) => false,
            },
            _ => slots.remove(SPACE, COMING).is_ok(),
        });
        // Whatever became of it: a slot is as it was or as it was to be.
        let after = slots.by_id(SPACE, COMING);
        let next = match &after {
            None => Standing {
                gone: true,
                read_only: false,
                ..now
            },
            Some(slot) => Standing {
                changing: false,
                gone: false,
                read_only: slot.flags().contains(SlotFlags::READ_ONLY),
                moved: slot.gfns().start != memory.coming_at(false).start,
            },
        };
        let possible = [memory.coming_at(false), memory.coming_at(true)];
        if after.is_some_and(|slot| !possible.contains(&slot.gfns())) {
            world.verdict.violation("a slot is where nobody put it");
        }
        memory.stand(Standing {
            changing: false,
            ..next
        });
        match done {
            Some(true) => true,
            Some(false) => {
                self.note("change_slot_refused");
                false
            }
            None => {
                self.note("change_slot_unwound");
                false
            }
        }
    }

    /// Looks at everything, while everything changes.
    fn look(&self, range: GfnRange) {
        let mmu = &self.world.mmu;
        let _ = (mmu.audit(), mmu.stats(), mmu.dump(SPACE));
        mmu.visit_leaves(SPACE, range, |_| {});
        mmu.visit_entries(SPACE, range, |_| {});
        mmu.visit_private_leaves(SPACE, range, |_| {});
        let _ = mmu.private_frames(range);
    }

    /// Converts pages, each block of them by one thread at a time.
    fn convert(&mut self, pages: Range<u64>, mut random: Random) -> bool {
        let memory = &self.world.memory;
        let to = if random.once_in(2) {
            Visibility::Private
        } else {
            Visibility::Shared
        };
        // In order, so that no two threads wait for each other.
        let blocks = pages.start as usize / BLOCK..=(pages.end as usize - 1) / BLOCK;
        let _locks: Vec<_> = memory.converting[blocks]
            .iter()
            .map(|lock| lock.lock())
            .collect();
        memory.set_half(pages.clone(), None);
        let range = GfnRange {
            start: Gfn(memory.gfns.start.0 + pages.start),
            end: Gfn(memory.gfns.start.0 + pages.end),
        };
        match chaos::survive(|| self.world.mmu.convert(SPACE, range, to)) {
            Some(Ok(_)) => {
                memory.set_half(pages, Some(to));
                true
            }
            Some(Err(_)) => {
                self.note("convert_refused");
                false
            }
            None => {
                self.note("convert_unwound");
                false
            }
        }
    }
}
