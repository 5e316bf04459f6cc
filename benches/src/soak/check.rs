//! What must hold whenever nobody is at work, and when everything is gone.

use super::guest::Guest;
use super::world::{COMING, Half, LOGGED, SPACE, World};
use crate::ours::Walked;
use serde::Serialize;
use tdp::protected::tdx::Call;
use tdp::{Gfn, GfnRange, Leaf, Perms, SlotFlags, Visibility};

/// How much was looked at.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Checked {
    pub(super) quiet_points: u64,
    pub(super) leaves: u64,
    pub(super) private_leaves: u64,
    pub(super) protected_entries: u64,
    pub(super) walks: u64,
    pub(super) pages_compared_with_copies: u64,
    pub(super) frames_accounted_for: u64,
}

impl Checked {
    pub(super) fn add(&mut self, other: &Self) {
        self.quiet_points += other.quiet_points;
        self.leaves += other.leaves;
        self.private_leaves += other.private_leaves;
        self.protected_entries += other.protected_entries;
        self.walks += other.walks;
        self.pages_compared_with_copies += other.pages_compared_with_copies;
        self.frames_accounted_for += other.frames_accounted_for;
    }
}

/// Every frame of the tables.
fn everything<F: Walked, P: Half>(world: &World<F, P>) -> GfnRange {
    world.mmu.slots().addressable()
}

/// Nobody is at work.
pub(super) fn at_rest<F: Walked, P: Half>(world: &World<F, P>, checked: &mut Checked) {
    checked.quiet_points += 1;
    world.mmu.synchronize();
    shared_leaves(world, checked);
    private_leaves(world, checked);
    let (audit, stats) = (world.mmu.audit(), world.mmu.stats());
    if audit.frozen + audit.misplaced + audit.unknown != 0 {
        world
            .verdict
            .violation(format_args!("the trees hold what they must not: {audit:?}"));
    }
    if (audit.pages, audit.tables) != (stats.pages, stats.tables) {
        world.verdict.violation(format_args!(
            "the trees hold {:?} leaves and {} tables, by the counters {:?} and {}",
            audit.pages, audit.tables, stats.pages, stats.tables
        ));
    }
    if let Some(module) = &world.module {
        let audit = world.mmu.audit_protected(SPACE);
        checked.protected_entries += audit.compared;
        if audit.different != 0 {
            world
                .verdict
                .violation(format_args!("the protected table differs: {audit:?}"));
        }
        for violation in module.take_violations() {
            // A merge of pages that the guest has not accepted is refused; the library cannot know.
            if violation.call != Call::MemPagePromote {
                world
                    .verdict
                    .violation(format_args!("no correct host does this: {violation:?}"));
            }
        }
        if stats.protected.leaked != 0 {
            world.verdict.violation(format_args!(
                "{} frames are lost to the module",
                stats.protected.leaked
            ));
        }
    }
    let wrong = world.mmu.host().frames.check();
    if wrong != 0 {
        world.verdict.violation(format_args!(
            "{wrong} table frames were used after they were freed, or freed twice"
        ));
    }
    let (linked, out) = (linked(world), world.mmu.host().frames.allocated() as u64);
    if out < linked {
        world.verdict.violation(format_args!(
            "{linked} tables are linked, {out} frames are out"
        ));
    }
}

/// Tables that are linked, roots among them.
fn linked<F: Walked, P: Half>(world: &World<F, P>) -> u64 {
    let stats = world.mmu.stats();
    stats.tables + stats.roots_made - stats.roots_invalidated
}

fn shared_leaves<F: Walked, P: Half>(world: &World<F, P>, checked: &mut Checked) {
    let slots = world.mmu.slots();
    let slots: Vec<_> = [LOGGED, COMING]
        .into_iter()
        .filter_map(|id| slots.by_id(SPACE, id))
        .collect();
    world.mmu.visit_leaves(SPACE, everything(world), |leaf| {
        checked.leaves += 1;
        for n in 0..leaf.level.pages() {
            let (gfn, pfn) = (Gfn(leaf.gfn.0 + n), tdp::Pfn(leaf.pfn.0 + n));
            if !world.memory.is_owned(pfn, gfn) {
                world
                    .verdict
                    .violation(format_args!("{leaf:?}: {pfn} belongs to somebody else"));
            }
            let slot = slots.iter().find(|slot| slot.gfns().contains(gfn));
            let may_write = slot.is_some_and(|slot| !slot.flags().contains(SlotFlags::READ_ONLY));
            if slot.is_none() || !may_write && leaf.perms.contains(Perms::WRITE) {
                world
                    .verdict
                    .violation(format_args!("{leaf:?}: no slot permits it"));
            }
            half(world, leaf, gfn, Visibility::Shared);
        }
    });
}

fn half<F: Walked, P: Half>(world: &World<F, P>, leaf: Leaf, gfn: Gfn, half: Visibility) {
    let is = world.mmu.visibility(gfn);
    let known = world
        .memory
        .page(gfn)
        .and_then(|(page, _)| world.memory.half(page));
    if is.is_some_and(|is| is != half) || (is.is_some() && known.is_some_and(|is| is != half)) {
        world
            .verdict
            .violation(format_args!("{leaf:?}: {half:?}, which {gfn} is not"));
    }
}

fn private_leaves<F: Walked, P: Half>(world: &World<F, P>, checked: &mut Checked) {
    world
        .mmu
        .visit_private_leaves(SPACE, everything(world), |leaf| {
            checked.private_leaves += 1;
            if leaf.pfn != world.memory.private_home(leaf.gfn) {
                world
                    .verdict
                    .violation(format_args!("{leaf:?}: not the page's own frame"));
            }
            for n in 0..leaf.level.pages() {
                half(world, leaf, Gfn(leaf.gfn.0 + n), Visibility::Private);
            }
        });
}

/// Walks as a processor does, leaving no trace.
pub(super) fn walks<F: Walked, P: Half>(
    world: &World<F, P>,
    guests: &[Guest<'_, F, P>],
    checked: &mut Checked,
) {
    let moved = world.memory.standing().moved;
    for guest in guests {
        for page in (0..world.memory.gfns.pages()).step_by(7) {
            let gfn = world.memory.at(page, moved);
            checked.walks += 1;
            if !guest.compare(gfn) {
                world.verdict.violation(format_args!(
                    "a walk to {gfn} ends at a frame of somebody else"
                ));
            }
        }
    }
}

/// No vCPU is left: takes everything private away, and accounts for every frame.
pub(super) fn at_end<F: Walked, P: Half>(world: &World<F, P>, writes: u64, checked: &mut Checked) {
    if world.plan.confidential
        && let Err(error) = world.mmu.zap_private(SPACE, everything(world))
    {
        world
            .verdict
            .violation(format_args!("private memory stays: {error}"));
    }
    at_rest(world, checked);
    let written: u64 = (0..world.memory.homes.pages())
        .map(|page| world.memory.homes.value(page))
        .sum();
    if written != writes {
        world.verdict.violation(format_args!(
            "{writes} writes were made, {written} are in memory"
        ));
    }
    let kept = world.mmu.host().protected.kept();
    if kept != 0 {
        world
            .verdict
            .violation(format_args!("the module keeps {kept} frames"));
    }
    let stats = world.mmu.stats();
    let (linked, out) = (linked(world), world.mmu.host().frames.allocated() as u64);
    if stats.garbage.pending != 0 || linked != out {
        world.verdict.violation(format_args!(
            "{linked} tables are linked, {} wait, {out} frames are out",
            stats.garbage.pending
        ));
    }
    checked.frames_accounted_for += out;
}
