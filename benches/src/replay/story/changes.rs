//! Changed entries: whose doing each was.

use super::{Story, Thread};
use crate::replay::entry::{Entry, Transition};
use crate::replay::expect::{Applied, Contradiction, Place, Space, Wrong};
use crate::replay::ledger::Key;
use crate::replay::pending::Guest;
use crate::replay::rules::Rule;
use crate::replay::scenario::{Op, Region};
use crate::replay::spte::{self, Kind, Leaf, kind, pages};
use crate::replay::step::Step;
use crate::replay::trace::{Change, SpaceRange};

impl Story {
    pub(super) fn change(&mut self, t: u32, change: &Change) {
        let (as_id, level) = (change.as_id, change.level);
        let (start, end) = (change.gfn, change.gfn.saturating_add(pages(level)));
        self.close_ages(Some(t), &[SpaceRange { as_id, start, end }]);
        let fault = self.thread(t).fault;
        let covers = fault.filter(|f| f.lies_in(as_id, start, end) && f.guest != Guest::Shadow);
        let before = covers.and_then(|f| self.expected.leaf_at(f.space, f.gfn()));
        let below: Vec<Leaf> =
            if kind(change.old, level) == Kind::Table && kind(change.new, level) != Kind::Table {
                self.expected
                    .leaves(Space::normal(as_id), start, end)
                    .collect()
            } else {
                Vec::new()
            };
        let nested = fault.is_some_and(|f| f.guest == Guest::NestedDirect);
        let Applied { place, from, to } = match self.expected.apply(t, nested, change) {
            Ok(applied) => applied,
            Err(contradiction) => {
                self.contradict(contradiction);
                self.stamps.note(as_id, start, end, t, self.seq);
                self.sync(as_id, start, level);
                return;
            }
        };
        self.record(t, change, place);
        let Place::Live(space) = place else { return };
        self.stamps.note(as_id, start, end, t, self.seq);
        self.overtake(t, |fault| fault.lies_in(as_id, start, end));
        self.changed_since_compare = true;
        if space.is_nested() {
            if let Some(fault) =
                covers.filter(|f| !f.concluded && from != Kind::Table && to != Kind::Table)
            {
                self.conclude(t, fault.effect(None, None, false));
            }
            return;
        }
        let made = matches!(from, Kind::None | Kind::Frozen | Kind::Mmio)
            && !matches!(to, Kind::None | Kind::Frozen);
        if made && fault.is_none() {
            // Only a fault, or memory mapped ahead, makes entries.
            let what = Wrong::NoFault;
            self.contradict(Contradiction {
                as_id,
                level,
                gfn: start,
                what,
            });
            self.sync(as_id, start, level);
            return;
        }
        if to == Kind::Table && from != Kind::Leaf {
            return;
        }
        if matches!(to, Kind::None | Kind::Frozen) {
            let own = covers.is_some_and(|fault| !fault.concluded);
            let leaf = Leaf {
                gfn: start,
                level,
                spte: change.old,
            };
            if own && level > 1 && from != Kind::Mmio {
                self.follow(Rule::LargeLeafIsSplit, as_id, start, level);
            } else if from == Kind::Table && self.is_unlogging(t, as_id, start) {
                self.follow(Rule::CollapseInPlace, as_id, start, level);
            } else if from == Kind::Table && self.is_recovering(t) {
                let gfn = start;
                self.steps.push(Step::RecoverNx { as_id, gfn, level });
            } else if from == Kind::Leaf {
                self.removed(t, as_id, &[leaf]);
            } else if from == Kind::Table {
                let known = self.removed(t, as_id, &below);
                if !known {
                    self.thread(t).zapped.push(SpaceRange { as_id, start, end });
                }
            }
            return;
        }
        match covers {
            Some(fault) if !fault.concluded && (from, to) == (Kind::Leaf, Kind::Table) => {
                if let Some(fault) = &mut self.thread(t).fault {
                    fault.split = fault.split.or(before);
                }
            }
            Some(fault) if !fault.concluded => {
                let before = fault.split.or(before);
                let after = self.expected.leaf_at(fault.space, fault.gfn());
                let mmio = self.expected.is_mmio(fault.space, fault.gfn());
                let conclusion = fault.effect(before, after, mmio);
                self.conclude(t, conclusion);
            }
            // A second change of the same fault, below a split.
            Some(_) => {}
            None if self.is_tracking(t) && tracks_writes(change, from, to) => {
                let gfn = change.gfn;
                self.steps.push(Step::TrackWrites { as_id, gfn });
            }
            // Part of what the host asked for.
            None if self.thread(t).age.is_some() && ages(change, from, to) => {}
            None if self.sweeps_logs(t) && is_sweep(change, from, to) => {
                let gfn = change.gfn;
                self.steps.push(Step::Sweep { as_id, gfn, level });
            }
            None => {
                // Nothing that the library knows of; the episode will show it.
                self.sync_visible(change);
            }
        }
    }

    /// Whether `t` is in an operation that brings sweeps with it: a log that begins or ends, is read or cleared.
    fn sweeps_logs(&mut self, t: u32) -> bool {
        self.thread(t).op.as_ref().is_some_and(|open| {
            matches!(
                open.op,
                Op::SetRegion(_)
                    | Op::GetDirtyLog { .. }
                    | Op::ClearDirtyLog { .. }
                    | Op::ResetDirtyRings { .. }
            )
        })
    }

    /// Whether `t` may be beginning to track writes: it runs nested guests, whose hypervisor's tables are shadowed.
    fn is_tracking(&mut self, t: u32) -> bool {
        self.thread(t).ran_nested && !self.sweeps_logs(t)
    }

    /// The library does otherwise by a rule, and is made to follow the record.
    fn follow(&mut self, rule: Rule, as_id: u8, gfn: u64, level: u8) {
        let range = SpaceRange {
            as_id,
            start: gfn,
            end: gfn + pages(level),
        };
        self.steps.push(Step::Follow(rule, range));
    }

    /// Whether `t` is switching the log of the slot at `gfn` off.
    fn is_unlogging(&mut self, t: u32, as_id: u8, gfn: u64) -> bool {
        let op = self.thread(t).op.as_ref();
        op.and_then(|op| op.unlogged.as_ref())
            .is_some_and(|r| r.as_id == as_id && (r.gfn..r.gfn + r.pages).contains(&gfn))
    }

    /// Whether `t` takes tables away for no reason but that they stand for fetches.
    fn is_recovering(&mut self, t: u32) -> bool {
        let nx_huge_pages = self.expected.nx_huge_pages;
        let thread = self.thread(t);
        nx_huge_pages && thread.op.is_none() && thread.unmap.is_none() && thread.vcpu.is_none()
    }

    /// Enters a change into the books, with what follows from it that KVM does not record.
    pub(super) fn record(&mut self, t: u32, change: &Change, place: Place) {
        self.by(t);
        let detached = match place {
            Place::Live(space) if !space.is_nested() => false,
            Place::Live(_) | Place::Nested => {
                return self.steps.push(Step::Explained(Rule::NestedGuest));
            }
            Place::Detached => true,
            Place::GivenUp => {
                return self.steps.push(Step::Explained(Rule::OneRootPerSpace));
            }
            Place::Nowhere { unlinked: true } => {
                return self.steps.push(Step::Explained(Rule::EmptyEntrySealed));
            }
            Place::Nowhere { unlinked: false } => {
                return self.steps.push(Step::Explained(Rule::FrozenIsTransient));
            }
        };
        let Change {
            as_id,
            level,
            gfn,
            old,
            new,
        } = *change;
        let transition = Transition {
            from: Entry::recorded(old, level),
            to: Entry::recorded(new, level),
        };
        self.enter(as_id, gfn, level, detached, transition);
        if let (Entry::Leaf(_), Entry::Table) = (transition.from, transition.to) {
            let huge = Leaf {
                gfn,
                level,
                spte: old,
            };
            for index in 0..512 {
                let child = huge.child(index, self.expected.nx_huge_pages);
                let made = Transition {
                    from: Entry::Gone,
                    to: Entry::recorded(child.spte, child.level),
                };
                self.enter(as_id, child.gfn, child.level, false, made);
            }
        }
    }

    fn enter(&mut self, as_id: u8, gfn: u64, level: u8, detached: bool, transition: Transition) {
        let key = Key {
            detached,
            as_id,
            gfn,
            level,
        };
        self.steps.push(Step::Recorded {
            seq: self.seq,
            key,
            transition,
        });
    }

    /// Copies a change, unless it is only about what the processor sets.
    pub(super) fn sync_visible(&mut self, change: &Change) {
        if (change.old ^ change.new) & !spte::ACCESSED_DIRTY != 0 {
            self.sync(change.as_id, change.gfn, change.level);
        }
    }

    /// `t` removed these leaves from a live tree: find the reason. Returns whether there is one for any of them.
    fn removed(&mut self, t: u32, as_id: u8, leaves: &[Leaf]) -> bool {
        let mut known = false;
        for &leaf in leaves {
            let key = (as_id, leaf.gfn, leaf.level);
            for thread in self.threads.values_mut() {
                if let Some(unmap) = &mut thread.unmap {
                    unmap.owed.remove(&key);
                }
            }
            let overlaps =
                |r: &SpaceRange| r.as_id == as_id && r.start < leaf.end() && leaf.gfn < r.end;
            if let Some(mut unmap) = self
                .thread(t)
                .unmap
                .take_if(|unmap| unmap.ranges.iter().any(overlaps))
            {
                self.execute_unmap(t, &mut unmap);
                if unmap.owed.is_empty() {
                    self.verify_unmap(unmap);
                } else {
                    self.thread(t).unmap = Some(unmap);
                }
                known = true;
                continue;
            }
            let region = self.thread(t).op.as_ref().and_then(|op| op.region);
            let in_slot =
                |r: &Region| r.as_id == as_id && r.gfn < leaf.end() && leaf.gfn < r.gfn + r.pages;
            if region.as_ref().is_some_and(in_slot) {
                self.begin_slot_change(t);
                known = true;
                continue;
            }
            let thread = self.thread(t);
            thread.removed.push((as_id, leaf));
            thread.zapped.push(SpaceRange {
                as_id,
                start: leaf.gfn,
                end: leaf.end(),
            });
        }
        known
    }

    /// Something is about to happen at `gfn`: removals there whose reason is unknown are copied now, and what the host
    /// asked for about it is done.
    pub(super) fn settle(&mut self, as_id: u8, gfn: u64) {
        let page = SpaceRange {
            as_id,
            start: gfn,
            end: gfn + 1,
        };
        self.close_ages(None, &[page]);
        let concerns = |thread: &Thread| {
            thread
                .zapped
                .iter()
                .any(|r| r.as_id == as_id && (r.start..r.end).contains(&gfn))
        };
        let threads: Vec<u32> = self
            .threads
            .iter()
            .filter(|(_, thread)| concerns(thread))
            .map(|(&t, _)| t)
            .collect();
        for t in threads {
            self.close_activity(t);
        }
    }
}

impl Story {
    /// What the host asked for about accessed bits in `ranges` is done, because entries there change otherwise now, by
    /// `but`, whose own request goes on.
    pub(super) fn close_ages(&mut self, but: Option<u32>, ranges: &[SpaceRange]) {
        let overlap = |a: &SpaceRange, b: &SpaceRange| {
            a.as_id == b.as_id && a.start < b.end && b.start < a.end
        };
        let concerns = |thread: &Thread| {
            thread
                .age
                .as_ref()
                .is_some_and(|(aged, _)| aged.iter().any(|a| ranges.iter().any(|b| overlap(a, b))))
        };
        let threads = self
            .threads
            .iter()
            .filter(|&(&t, thread)| Some(t) != but && concerns(thread));
        for t in threads.map(|(&t, _)| t).collect::<Vec<_>>() {
            self.close_activity(t);
        }
    }
}

/// Whether all that happened to a leaf is that it is not writable any more before the host is asked.
fn tracks_writes(change: &Change, from: Kind, to: Kind) -> bool {
    let leaf = |spte| Leaf {
        gfn: change.gfn,
        level: change.level,
        spte,
    };
    let (old, new) = (leaf(change.old), leaf(change.new));
    (from, to) == (Kind::Leaf, Kind::Leaf)
        && old.is_mmu_writable()
        && !new.is_mmu_writable()
        && new.is_host_writable()
}

/// Whether all that happened to a leaf is that it is not accessed any more.
fn ages(change: &Change, from: Kind, to: Kind) -> bool {
    (from, to) == (Kind::Leaf, Kind::Leaf)
        && change.old & !change.new == spte::ACCESSED
        && change.new & !change.old == 0
}

/// Whether a sweep that the library has makes such a change: splitting, collapsing, taking write permission.
fn is_sweep(change: &Change, from: Kind, to: Kind) -> bool {
    match (from, to) {
        (Kind::Leaf, Kind::Table) | (Kind::Table, Kind::Leaf) => true,
        (Kind::Leaf, Kind::Leaf) => {
            let writable = |spte| {
                let leaf = Leaf {
                    gfn: change.gfn,
                    level: change.level,
                    spte,
                };
                (leaf.is_writable(), leaf.is_mmu_writable())
            };
            (writable(change.old), writable(change.new)) == ((true, true), (false, true))
        }
        _ => false,
    }
}
