//! What user space and the host do to the MMU: operations of the scenario, slots, roots, frames taken back.

use super::{OpenOp, Story, Unmap};
use crate::replay::expect::Space;
use crate::replay::pending::Pending;
use crate::replay::scenario::Op;
use crate::replay::step::{Operation, SlotChange, Step};
use crate::replay::trace::{SpaceRange, everything};
use std::collections::BTreeSet;

/// Bytes of an entry of KVM's dirty rings.
const DIRTY_RING_ENTRY: u64 = 16;
/// Entries that the library's rings have at least and at most.
const LEAST_RING: u64 = 1 << 16;
const MOST_RING: u64 = 1 << 20;

impl Story {
    pub(super) fn begin(&mut self, t: u32, index: u32) -> Result<(), String> {
        self.close_ages(None, &everything());
        let op = self
            .scenario
            .op(index)
            .ok_or_else(|| format!("operation {index} is not in the scenario"))?
            .clone();
        let mut open = OpenOp {
            op,
            slot: None,
            region: None,
            unlogged: None,
            nx: None,
        };
        match open.op {
            Op::SetRegion(mut region) => {
                if region.log_dirty {
                    (region.log_manual, region.log_initially_set) = self.log_flags;
                }
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
                        self.slot(t, SlotChange::Flags(region));
                        if old.log_dirty && !region.log_dirty {
                            open.unlogged = Some(region);
                        }
                    }
                    Some(_) => {}
                }
            }
            Op::PreFault { vcpu } => self.thread(t).vcpu = Some(vcpu),
            Op::GetDirtyLog { .. } | Op::ClearDirtyLog { .. } | Op::ResetDirtyRings { .. } => {
                let (seq, op) = (self.seq, open.op.clone());
                self.by(t);
                self.steps.push(Step::DirtyLog { seq, op });
            }
            Op::ManualDirtyLog(bits) => self.log_flags = (bits & 1 != 0, bits & 3 == 3),
            Op::DirtyRing(bytes) => {
                // Where KVM's is full, a vCPU only waits: no entry changes. The library's is never full.
                let entries = (bytes / DIRTY_RING_ENTRY).clamp(LEAST_RING, MOST_RING);
                let entries = entries.next_power_of_two() as u32;
                self.steps.push(Step::DirtyRing(entries));
            }
            Op::NxHugePages(on) => {
                self.expected.nx_huge_pages = on;
                open.nx = Some(on);
            }
            Op::Other => {}
        }
        self.thread(t).op = Some(open);
        Ok(())
    }

    pub(super) fn end(&mut self, t: u32) {
        self.begin_slot_change(t);
        let Some(op) = self.thread(t).op.take() else {
            return;
        };
        if let Some(on) = op.nx {
            self.by(t);
            self.steps.push(Step::NxHugePages(on));
        }
        if let Some(region) = op.unlogged {
            self.by(t);
            self.steps.push(Step::Collapse(SpaceRange {
                as_id: region.as_id,
                start: region.gfn,
                end: region.gfn + region.pages,
            }));
        }
        self.settle_episode(t);
        if let Op::SetRegion(_) = op.op {
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

    /// A page of a logged slot was marked dirty: by the fault that let it be written, or because KVM or the VMM wrote it.
    pub(super) fn mark_dirty(&mut self, t: u32, as_id: u8, slot: u32, gfn: u64) {
        let by_fault = self.thread(t).fault.is_some_and(|fault| fault.gfn() == gfn);
        let region = self.slots.get(&(as_id, slot));
        let page = region.and_then(|region| gfn.checked_sub(region.gfn));
        if let Some(page) = page.filter(|_| !by_fault) {
            self.steps.push(Step::MarkDirty { as_id, slot, page });
        }
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
        self.close_ages(None, &everything());
        let slot = self.begin_slot_change_by(t, true);
        self.expected.detach_all(t);
        self.stamps.note_all(t, self.seq);
        self.overtake(t, |_| true);
        self.changed_since_compare = true;
        let nx = self.thread(t).op.as_mut().and_then(|op| op.nx.take());
        if let Some(on) = nx {
            self.by(t);
            self.steps.push(Step::NxHugePages(on));
        } else if !slot {
            self.by(t);
            self.steps.push(Step::InvalidateRoots);
        }
        let ranges = everything();
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
        self.close_ages(None, ranges);
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
