//! What user space and the host do to the MMU: operations of the scenario, slots, roots, frames taken back.

use super::{OpenOp, Story, Unmap};
use crate::replay::expect::Space;
use crate::replay::pending::Pending;
use crate::replay::scenario::Op;
use crate::replay::step::{NotYet, Operation, SlotChange, Step};
use crate::replay::trace::SpaceRange;
use std::collections::BTreeSet;

impl Story {
    pub(super) fn begin(&mut self, t: u32, index: u32) -> Result<(), String> {
        let op = self
            .scenario
            .op(index)
            .ok_or_else(|| format!("operation {index} is not in the scenario"))?
            .clone();
        let mut open = OpenOp {
            op,
            slot: None,
            region: None,
        };
        match open.op {
            Op::SetRegion(region) => {
                let old = self.slots.get(&(region.as_id, region.slot)).copied();
                match old {
                    None if region.pages == 0 => {}
                    None => self.slot(t, SlotChange::Insert(region)),
                    // KVM removes first and shows the new place last; what lies between shows when it begins.
                    Some(old) if region.pages == 0 => {
                        (open.slot, open.region) = (Some(SlotChange::Remove(old)), Some(old));
                    }
                    Some(old) if old.gfn != region.gfn => {
                        (open.slot, open.region) = (Some(SlotChange::Move(region)), Some(old));
                    }
                    Some(old) if old != region => {
                        if old.log_dirty != region.log_dirty {
                            self.sweeps(t, NotYet::DirtyLogging);
                        }
                        self.slot(t, SlotChange::Flags(region));
                    }
                    Some(_) => {}
                }
            }
            Op::PreFault { vcpu } => self.thread(t).vcpu = Some(vcpu),
            Op::DirtyLog => {
                self.sweeps(t, NotYet::DirtyLogging);
            }
            Op::NxHugePages(on) => self.expected.nx_huge_pages = on,
            Op::Other => {}
        }
        self.thread(t).op = Some(open);
        Ok(())
    }

    pub(super) fn end(&mut self, t: u32) {
        self.begin_slot_change(t);
        if let Some(OpenOp {
            op: Op::SetRegion(_),
            ..
        }) = self.thread(t).op.take()
        {
            self.changed_since_compare = true;
        }
        self.compare();
    }

    fn slot(&mut self, t: u32, change: SlotChange) {
        self.slot_by(t, change, false);
    }

    fn slot_by(&mut self, t: u32, change: SlotChange, roots: bool) {
        match change {
            SlotChange::Insert(region) | SlotChange::Move(region) | SlotChange::Flags(region) => {
                self.slots.insert((region.as_id, region.slot), region);
            }
            SlotChange::Remove(region) => {
                self.slots.remove(&(region.as_id, region.slot));
            }
        }
        let seq = self.seq;
        self.by(t);
        self.steps.push(Step::Slot { seq, change, roots });
    }

    /// The deletion or move that `t` is in the middle of shows now.
    pub(super) fn begin_slot_change(&mut self, t: u32) {
        self.begin_slot_change_by(t, false);
    }

    /// The same, with all roots becoming obsolete or not. Returns whether there was such a change.
    fn begin_slot_change_by(&mut self, t: u32, roots: bool) -> bool {
        let change = self.thread(t).op.as_mut().and_then(|op| op.slot.take());
        if let Some(change) = change {
            self.slot_by(t, change, roots);
        }
        change.is_some()
    }

    /// `t` made a root table, where there may be one already: for a nested guest, or to use in its place.
    pub(super) fn another_root(&mut self, t: u32) {
        let vcpu = self.thread(t).vcpu;
        let space = Space::normal(self.space_of(vcpu));
        self.thread(t).fresh_root = self.expected.has_entries(space);
    }

    pub(super) fn zap_all(&mut self, t: u32) {
        let slot = self.begin_slot_change_by(t, true);
        self.expected.detach_all(t);
        self.stamps.note_all(t, self.seq);
        self.overtake(t, |_| true);
        self.changed_since_compare = true;
        if !slot {
            self.by(t);
            self.steps.push(Step::InvalidateRoots);
        }
        let everything = |as_id| SpaceRange {
            as_id,
            start: 0,
            end: u64::MAX,
        };
        let ranges = vec![everything(0), everything(1)];
        self.steps.push(Step::Verify {
            seq: self.seq,
            operation: Operation::InvalidateRoots,
            ranges,
        });
    }

    pub(super) fn unmap(&mut self, t: u32, ranges: &[SpaceRange]) {
        if ranges.is_empty() {
            return;
        }
        let mut owed = BTreeSet::new();
        for range in ranges {
            let leaves = self
                .expected
                .leaves(Space::normal(range.as_id), range.start, range.end);
            owed.extend(leaves.map(|leaf| (range.as_id, leaf.gfn, leaf.level)));
        }
        self.overtake(t, |fault| {
            ranges
                .iter()
                .any(|r| fault.lies_in(r.as_id, r.start, r.end))
        });
        let mut unmap = Unmap {
            ranges: ranges.to_vec(),
            owed,
            executed: false,
        };
        if unmap.owed.is_empty() {
            self.execute_unmap(t, &mut unmap);
            self.verify_unmap(unmap);
        } else {
            self.thread(t).unmap = Some(unmap);
        }
    }

    pub(super) fn execute_unmap(&mut self, t: u32, unmap: &mut Unmap) {
        if !unmap.executed {
            unmap.executed = true;
            self.by(t);
            self.steps.push(Step::Invalidate(unmap.ranges.clone()));
        }
    }

    pub(super) fn verify_unmap(&mut self, unmap: Unmap) {
        self.steps.push(Step::Verify {
            seq: self.seq,
            operation: Operation::Invalidate,
            ranges: unmap.ranges,
        });
    }

    /// Faults of other threads have something in common with what `t` did.
    pub(super) fn overtake(&mut self, t: u32, concerns: impl Fn(&Pending) -> bool) {
        for (&other, thread) in &mut self.threads {
            if other != t
                && let Some(fault) = thread.fault.as_mut().filter(|fault| concerns(fault))
            {
                fault.overtaken = true;
            }
        }
    }
}
