//! Slot operations of a run, and what becomes of the host's pages.

use super::{FlatSlot, MOST_MOVED, MOST_SLOTS, Run, SLOT_BLOCK, SLOT_FRAMES, space_id};
use crate::common::flat::{FlatLeaf, Zapped};
use crate::common::host::Memory;
use crate::common::ops::{Op, flags, level};
use crate::common::processor::Processor;
use std::mem::discriminant;
use tdp::{Gfn, GfnRange, Level, Pfn, Slot, SlotError, SlotFlags, SlotId};

impl<F: Processor> Run<'_, F> {
    /// Gives the pages of a range other host frames. The old ones belong to somebody else.
    pub(super) fn move_pages(&mut self, space: usize, range: GfnRange) {
        let host = self.rig.host();
        let mut left = MOST_MOVED;
        for slot in self.slots.iter().filter(|slot| slot.space == space) {
            let start = slot.range.start.0.max(range.start.0);
            let end = slot.range.end.0.min(range.end.0);
            for gfn in (start..end).take(left as usize) {
                left -= 1;
                let at_first = slot.memory.pfn.0 + (gfn - slot.range.start.0);
                let new = self.next_moved;
                self.next_moved += 1;
                let old = host.script().moved.insert(at_first, Pfn(new));
                let old = old.map_or(at_first, |pfn| pfn.0);
                self.given_away.push(old..old + 1);
            }
        }
    }

    pub(super) fn change_slots(&mut self, op: Op) -> Gfn {
        if let Op::Insert { .. } = op {
            return self.insert_slot(op);
        }
        let (Op::Remove { which } | Op::Move { which, .. } | Op::SetFlags { which, .. }) = op
        else {
            return Gfn(0);
        };
        let Some(at) = usize::from(which).checked_rem(self.slots.len()) else {
            return Gfn(0);
        };
        let slots = self.rig.mmu.slots();
        let generation = slots.generation();
        let FlatSlot {
            id, space, range, ..
        } = self.slots[at];
        let as_id = space_id(space);
        let mut remapped = true;
        match op {
            Op::Move { to, .. } => {
                let start = to.gfn(self.level());
                let to = GfnRange::new(start, range.pages()).expect("far from the end");
                let expected = self.refusal(space, to, None, Some(id));
                let refused = slots.move_to(as_id, id, start).err();
                assert_eq!(
                    refused.as_ref().map(discriminant),
                    expected.as_ref().map(discriminant),
                    "move of {range} to {to}"
                );
                if refused.is_some() {
                    assert_eq!(slots.generation(), generation);
                    return start;
                }
                self.slots[at].range = to;
            }
            Op::SetFlags {
                read_only,
                log_dirty,
                ..
            } => {
                let flags = flags(read_only, log_dirty);
                slots
                    .set_flags(as_id, id, flags)
                    .expect("the slot is there");
                let slot = &mut self.slots[at];
                let changed = slot.flags ^ flags;
                remapped = changed.contains(SlotFlags::READ_ONLY);
                slot.flags = flags;
                if !remapped && changed.contains(SlotFlags::LOG_DIRTY) {
                    if log_dirty {
                        self.each_tree(space, |tree| {
                            tree.write_protect(range);
                            Zapped::default()
                        });
                    } else {
                        self.adopt_collapsed(space, range);
                    }
                }
            }
            _ => {
                slots.remove(as_id, id).expect("the slot is there");
                let gone = self.slots.swap_remove(at);
                let first = gone.memory.pfn.0;
                let frames = first..first + range.pages();
                self.given_away.push(frames.clone());
                let script = self.rig.host().script();
                let moved = script.moved.range(frames).map(|(_, pfn)| pfn.0..pfn.0 + 1);
                self.given_away.extend(moved);
            }
        }
        assert_ne!(slots.generation(), generation, "a change moves it");
        if remapped {
            self.each_tree(space, |tree| tree.zap_leaves(range));
        }
        range.start
    }

    /// A slot is no longer logged: what was split may be large again, and must translate as it did.
    fn adopt_collapsed(&mut self, space: usize, range: GfnRange) {
        let mut large = Vec::new();
        self.rig.mmu.visit_leaves(space_id(space), range, |leaf| {
            if leaf.level > Level::L1 {
                large.push(leaf);
            }
        });
        let mut roots = self.roots.values_mut();
        let Some(root) = roots.find(|root| root.space == space && !root.obsolete) else {
            return;
        };
        for leaf in large {
            let flat = root.tree.leaves.get(&leaf.gfn.0);
            if flat.is_none_or(|flat| flat.level != leaf.level) {
                let flat = FlatLeaf {
                    level: leaf.level,
                    pfn: leaf.pfn.0,
                    perms: leaf.perms,
                    writable: false,
                    accessed: leaf.spte.0 & F::ACCESSED != 0,
                    dirty: leaf.spte.0 & F::DIRTY != 0,
                };
                root.tree.adopt_collapsed(range, leaf.gfn.0, flat);
            }
        }
    }

    fn insert_slot(&mut self, op: Op) -> Gfn {
        let Op::Insert {
            space,
            span,
            level: largest,
            read_only,
            log_dirty,
            max_level,
            skewed,
            id,
        } = op
        else {
            return Gfn(0);
        };
        let mut range = span.aligned_range(self.level());
        let most = range.start.0 + (1 << 18) + 1;
        range.end = Gfn(range.end.0.min(most));
        if self.slots.len() == MOST_SLOTS {
            return range.start;
        }
        let space = usize::from(space) % 3;
        let aligned = range.start.0 & (Level::L3.pages() - 1);
        let first = SLOT_FRAMES + self.next_block * SLOT_BLOCK + aligned + u64::from(skewed);
        let memory = Memory::new(Pfn(first), level(largest));
        let slot = Slot::new(range, memory)
            .in_space(space_id(space))
            .with_flags(flags(read_only, log_dirty))
            .max_level(level(max_level));
        let id = id.map(|id| SlotId(u32::from(id % 8)));
        let slot = match id {
            Some(id) => slot.with_id(id),
            None => slot,
        };
        let expected = self.refusal(space, range, id, None);
        let result = self.rig.mmu.slots().insert(slot);
        assert_eq!(
            result.as_ref().err().map(discriminant),
            expected.as_ref().map(discriminant),
            "slot {range}: {result:?}"
        );
        if let Ok(given) = result {
            assert!(id.is_none_or(|id| id == given));
            let known = |slot: &FlatSlot| slot.space == space && slot.id == given;
            assert!(!self.slots.iter().any(known), "the id is new");
            self.next_block += 1;
            self.slots.push(FlatSlot {
                id: given,
                space,
                range,
                flags: flags(read_only, log_dirty),
                max_level: level(max_level),
                memory,
            });
        }
        range.start
    }

    /// Why a slot at `gfns` has to be refused.
    fn refusal(
        &self,
        space: usize,
        gfns: GfnRange,
        id: Option<SlotId>,
        except: Option<SlotId>,
    ) -> Option<SlotError> {
        let limit = self.level().gfn_limit();
        let as_id = space_id(space);
        let mut others = self
            .slots
            .iter()
            .filter(|slot| slot.space == space && Some(slot.id) != except);
        if space > 1 {
            return Some(SlotError::NoSuchSpace { as_id });
        }
        if gfns.is_empty() {
            return Some(SlotError::Empty { gfns });
        }
        if gfns.end > limit {
            return Some(SlotError::BeyondWidth { gfns, limit });
        }
        if let Some(other) = others.clone().find(|other| other.range.overlaps(gfns)) {
            return Some(SlotError::Overlap {
                gfns,
                other: other.id,
                other_gfns: other.range,
            });
        }
        let id = id.filter(|&id| others.any(|other| other.id == id))?;
        Some(SlotError::IdInUse { id })
    }
}
