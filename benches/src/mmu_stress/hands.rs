//! The host: threads that do to the guest's memory whatever the library can do, all at once, and one that copies what is
//! written.
//!
//! The copy is how lost dirty pages are found. The log is switched on, everything is copied, then only what the log tells,
//! each time after the flush; at the end all vCPUs wait outside, the rest is copied, and the copy must equal the memory.

use super::homes::BLOCK;
use super::world::{COMING, Flaw, LOGGED, Random, SPACE, Standing, World};
use crate::ours::Walked;
use crate::report::Error;
use crate::sync::Ordering;
use serde::Serialize;
use std::collections::BTreeMap;
use tdp::{Gfn, GfnRange, Level, Slot, SlotFlags};

/// How often each thing was done.
pub(super) type Done = BTreeMap<&'static str, u64>;

/// What one of the host's threads does, by weight.
const WEIGHTS: [(u64, Deed); 14] = [
    (6, Deed::MovePages),
    (2, Deed::MoveBlock),
    (2, Deed::Zap),
    (2, Deed::ZapLeaves),
    (4, Deed::WriteProtect),
    (2, Deed::WriteProtectFrame),
    (4, Deed::Age),
    (2, Deed::TestAge),
    (3, Deed::Split),
    (3, Deed::Collapse),
    (3, Deed::RecoverNx),
    (1, Deed::SwitchNx),
    (1, Deed::InvalidateRoots),
    (2, Deed::ChangeSlot),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
enum Deed {
    MovePages,
    MoveBlock,
    Zap,
    ZapLeaves,
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
}

impl Deed {
    const fn name(self) -> &'static str {
        match self {
            Self::MovePages => "move_pages",
            Self::MoveBlock => "move_block",
            Self::Zap => "zap",
            Self::ZapLeaves => "zap_leaves",
            Self::WriteProtect => "write_protect",
            Self::WriteProtectFrame => "write_protect_frame",
            Self::Age => "age",
            Self::TestAge => "test_age",
            Self::Split => "split",
            Self::Collapse => "collapse",
            Self::RecoverNx => "recover_nx",
            Self::SwitchNx => "switch_nx",
            Self::InvalidateRoots => "invalidate_roots",
            Self::ChangeSlot => "change_slot",
        }
    }
}

/// One of the host's threads. Only `is_first` changes slots and policies.
pub(super) struct Hand<'w, F: Walked> {
    pub(super) world: &'w World<F>,
    pub(super) random: Random,
    pub(super) is_first: bool,
}

impl<F: Walked> Hand<'_, F> {
    /// Works until the run is over.
    ///
    /// # Errors
    ///
    /// What the library refuses.
    pub(super) fn run(mut self) -> Result<Done, Error> {
        let sum: u64 = WEIGHTS.iter().map(|(weight, _)| weight).sum();
        let mut done = Done::new();
        while !self.world.is_over() {
            let mut choice = self.random.below(sum);
            let deed = WEIGHTS.iter().find(|(weight, _)| {
                let chosen = choice < *weight;
                choice = choice.saturating_sub(*weight);
                chosen
            });
            let Some(&(_, deed)) = deed else { continue };
            if matches!(deed, Deed::ChangeSlot | Deed::SwitchNx) && !self.is_first {
                continue;
            }
            let outcome = self.perform(deed);
            if outcome.is_err() {
                self.world.finish();
            }
            outcome?;
            *done.entry(deed.name()).or_default() += 1;
            // Lets the guest come in between.
            for _ in 0..self.random.below(4) {
                std::thread::yield_now();
            }
        }
        Ok(done)
    }

    /// Some pages from somewhere on: few, or whole blocks.
    fn some_pages(&mut self) -> GfnRange {
        let gfns = self.world.gfns;
        let (first, count) = if self.random.once_in(3) {
            let blocks = gfns.pages() / BLOCK as u64;
            let block = self.random.below(blocks);
            let count = 1 + self.random.below((blocks - block).min(4));
            (block * BLOCK as u64, count * BLOCK as u64)
        } else {
            let first = self.random.below(gfns.pages());
            (first, 1 + self.random.below(8))
        };
        let start = Gfn(gfns.start.0 + first);
        let end = Gfn((start.0 + count).min(gfns.end.0));
        GfnRange { start, end }
    }

    fn perform(&mut self, deed: Deed) -> Result<(), Error> {
        let world = self.world;
        let mmu = &world.mmu;
        let range = self.some_pages();
        match deed {
            Deed::MovePages => self.move_pages(range),
            Deed::MoveBlock => {
                let block = Level::L2.range(range.start);
                self.move_pages(block);
            }
            Deed::Zap => drop(mmu.zap(SPACE, range).flush()),
            Deed::ZapLeaves => drop(mmu.zap_leaves(SPACE, range).flush()),
            Deed::WriteProtect => drop(mmu.write_protect(SPACE, range, Level::L1).flush()),
            Deed::WriteProtectFrame => drop(mmu.write_protect_gfn(SPACE, range.start).flush()),
            Deed::Age => drop(mmu.age(SPACE, range)),
            Deed::TestAge => drop(mmu.test_age(SPACE, range)),
            // Without a frame for a table the rest stays as it is.
            Deed::Split => drop(mmu.split(SPACE, range, Level::L1)),
            Deed::Collapse => {
                let end = Level::L2.range(Gfn(range.end.0 - 1)).end;
                let start = Level::L2.align_down(range.start);
                let _ = mmu.collapse(SPACE, GfnRange { start, end }).flush();
            }
            Deed::RecoverNx => drop(mmu.recover_nx(4).flush()),
            Deed::SwitchNx => {
                if let Some(mut teardown) = mmu.set_nx_huge_pages(!mmu.nx_huge_pages()) {
                    teardown.reload();
                    teardown.finish();
                }
            }
            Deed::InvalidateRoots => {
                let mut teardown = mmu.invalidate_roots();
                if self.random.once_in(2) {
                    teardown.reload();
                }
                teardown.finish();
            }
            Deed::ChangeSlot => self.change_slot()?,
        }
        Ok(())
    }

    /// Gives the pages of a range other homes, and the old ones to others.
    fn move_pages(&mut self, range: GfnRange) {
        let world = self.world;
        let invalidation = world.mmu.invalidate_begin(SPACE, range);
        let flushed = invalidation.zap().flush();
        let pages = range.pages() as usize;
        if let Some(first) = world.homes.page(range.start) {
            if pages.is_multiple_of(BLOCK) && first.is_multiple_of(BLOCK) {
                (first / BLOCK..(first + pages) / BLOCK)
                    .for_each(|block| world.homes.move_block(block));
            } else {
                (first..first + pages).for_each(|page| world.homes.move_page(page));
            }
        }
        invalidation.end(flushed);
    }

    /// Takes the slot that comes and goes away and brings it back, or changes whether it can be written.
    fn change_slot(&mut self) -> Result<(), Error> {
        let failed = |e: tdp::SlotError| Error::run("slots", e);
        let world = self.world;
        let slots = world.mmu.slots();
        let mut next = world.standing();
        world.stand(Standing {
            changing: true,
            ..next
        });
        if self.random.once_in(2) {
            next.read_only = !next.read_only;
            let flags = if next.read_only {
                SlotFlags::READ_ONLY
            } else {
                SlotFlags::empty()
            };
            slots.set_flags(SPACE, COMING, flags).map_err(failed)?;
        } else {
            slots.remove(SPACE, COMING).map_err(failed)?;
            world.stand(Standing {
                gone: true,
                ..Standing::default()
            });
            for _ in 0..self.random.below(64) {
                std::thread::yield_now();
            }
            world.stand(Standing {
                changing: true,
                ..Standing::default()
            });
            slots
                .insert(Slot::new(world.coming, ()).with_id(COMING))
                .map_err(failed)?;
            next = Standing::default();
        }
        world.stand(next);
        Ok(())
    }
}

/// Copies what is written to the logged slot, and compares.
///
/// # Errors
///
/// What the library refuses.
pub(super) fn copy<F: Walked>(world: &World<F>, random: Random) -> Result<Done, Error> {
    let outcome = migrate(world, random);
    if outcome.is_err() {
        world.finish();
    }
    outcome
}

fn migrate<F: Walked>(world: &World<F>, mut random: Random) -> Result<Done, Error> {
    let failed = |e: Box<dyn std::error::Error + Send + Sync>| Error::run("dirty log", e);
    let slots = world.mmu.slots();
    let pages = world.logged.pages() as usize;
    let mut done = Done::new();
    let mut copy = vec![0; pages];
    let mut bitmap = vec![0_u64; pages.div_ceil(64)];
    while !world.is_over() {
        let mut flags = SlotFlags::LOG_DIRTY;
        let manual = random.once_in(2);
        if manual {
            flags |= SlotFlags::LOG_MANUAL;
        }
        let initially_set = random.once_in(2);
        if initially_set {
            flags |= SlotFlags::LOG_INITIALLY_SET;
        }
        slots
            .set_flags(SPACE, LOGGED, flags)
            .map_err(|e| failed(e.into()))?;
        let log = world
            .mmu
            .dirty_log(SPACE, LOGGED)
            .map_err(|e| failed(e.into()))?;
        if !initially_set {
            (0..pages).for_each(|page| copy[page] = world.homes.value(page));
        }
        let mut round = |copy: &mut [u64]| {
            let pending = log.collect(&mut bitmap).map_err(|e| failed(e.into()))?;
            let pending = if manual {
                let _ = pending.flush();
                log.clear(0, &bitmap).map_err(|e| failed(e.into()))?
            } else {
                pending
            };
            let mut copied = 0;
            let mut take = || {
                for (page, copy) in copy.iter_mut().enumerate() {
                    if bitmap[page / 64] >> (page % 64) & 1 != 0 {
                        *copy = world.homes.value(page);
                        copied += 1;
                    }
                }
            };
            if world.flaw == Some(Flaw::CopyFirst) {
                take();
                let _ = pending.flush();
            } else {
                let _ = pending.flush();
                take();
            }
            Ok::<u64, Error>(copied)
        };
        for _ in 0..1 + random.below(6) {
            *done.entry("pages_copied").or_default() += round(&mut copy)?;
            *done.entry("log_collected").or_default() += 1;
            std::thread::yield_now();
        }
        let lost = world.quietly(|| {
            round(&mut copy)?;
            let differs = |page: &usize| copy[*page] != world.homes.value(*page);
            // Of a run that ended meanwhile nothing can be said.
            let quiet = world.is_quiet();
            let lost = (0..pages).filter(differs).count() as u64;
            Ok::<u64, Error>(if quiet { lost } else { 0 })
        })?;
        world.verdict.lost_dirty.fetch_add(lost, Ordering::Relaxed);
        *done.entry("migrations").or_default() += 1;
        slots
            .set_flags(SPACE, LOGGED, SlotFlags::empty())
            .map_err(|e| failed(e.into()))?;
    }
    Ok(done)
}
