//! What a trace tells, as steps to take with the library.
//!
//! Protocol. [`Story::feed`] takes the lines in order; after each, [`Story::take_steps`] gives what is to be done,
//! with [`Story::expected`] standing as after that line. An input of the host (slots, invalidations) becomes a step at
//! the point of the trace where its effect begins; a fault where its effect shows ([`Pending`]); and what the library
//! has no operation for yet is counted as such and copied from the record ([`Step::Sync`]), so that what follows stays
//! comparable. Nothing is decided by the name of a file or of a task.

use super::expect::{Applied, Contradiction, Expected, Place, Space, Wrong};
use super::pending::{Conclusion, End, Guest, Pending, Requested};
use super::scenario::{Op, Region, Scenario};
use super::spte::{self, Kind, Leaf, kind, pages};
use super::stamps::Stamps;
use super::step::{Code, GuestAccess, Meets, NotYet, Operation, SlotChange, Step};
use super::trace::{Change, Event, FastFault, Line, SpaceRange};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// After so many faults everything mapped is compared.
const COMPARE_EVERY: u32 = 4096;

/// What the host takes back.
#[derive(Debug)]
struct Unmap {
    ranges: Vec<SpaceRange>,
    /// Leaves (space, first frame, level) whose removal the trace has yet to show.
    owed: BTreeSet<(u8, u64, u8)>,
    executed: bool,
}

/// An operation of the scenario that is going on.
#[derive(Debug)]
struct OpenOp {
    op: Op,
    /// A deletion or move that has not begun to show.
    slot: Option<SlotChange>,
    /// Where that slot is, or was.
    region: Option<Region>,
}

/// What one thread is in the middle of.
#[derive(Debug, Default)]
struct Thread {
    last: u64,
    vcpu: Option<u32>,
    op: Option<OpenOp>,
    fault: Option<Pending>,
    unmap: Option<Unmap>,
    /// Leaves that it removed without a known reason, with their address spaces.
    removed: Vec<(u8, Leaf)>,
    sweeps: BTreeSet<NotYet>,
    nested_paging: bool,
    left_nested: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Story {
    scenario: Scenario,
    expected: Expected,
    threads: BTreeMap<u32, Thread>,
    in_smm: HashMap<u32, bool>,
    slots: HashMap<(u8, u32), Region>,
    stamps: Stamps,
    root_level: u8,
    seq: u64,
    steps: Vec<Step>,
    faults_since_compare: u32,
    changed_since_compare: bool,
}

impl Story {
    /// A story of `scenario`, before its first event.
    pub fn new(scenario: Scenario) -> Self {
        let expected = Expected::new(scenario.nx_huge_pages);
        Self {
            scenario,
            expected,
            threads: BTreeMap::new(),
            in_smm: HashMap::new(),
            slots: HashMap::new(),
            stamps: Stamps::default(),
            root_level: 0,
            seq: 0,
            steps: Vec::new(),
            faults_since_compare: 0,
            changed_since_compare: false,
        }
    }

    /// The tables as recorded.
    pub fn expected(&self) -> &Expected {
        &self.expected
    }

    /// The steps since the last call.
    pub fn take_steps(&mut self) -> Vec<Step> {
        std::mem::take(&mut self.steps)
    }

    /// Goes on by one line.
    ///
    /// # Errors
    ///
    /// One line of text if the line names an operation that the scenario does not have.
    pub fn feed(&mut self, line: &Line) -> Result<(), String> {
        let t = line.thread;
        self.seq = line.seq;
        let thread = self.threads.entry(t).or_default();
        let previous = std::mem::replace(&mut thread.last, line.seq);
        let left_nested = std::mem::take(&mut thread.left_nested);
        match &line.event {
            Event::Inside | Event::Other => {}
            Event::OpBegin(index) => {
                self.close(t, End::Went);
                self.begin(t, *index)?;
            }
            Event::OpEnd(_) => {
                self.close(t, End::Went);
                self.end(t);
            }
            &Event::PageFault { vcpu, gpa, code } => {
                self.close(t, End::Went);
                self.page_fault(t, previous, left_nested, vcpu, gpa, Code(code));
            }
            &Event::Requested { gfn, level, pfn } => self.requested(t, gfn, Requested { level, pfn }),
            Event::Changed(run) => {
                if self.root_level == 0 {
                    self.root(4);
                }
                for change in run.changes() {
                    self.change(t, &change);
                }
                self.conclude_overtaken(t);
            }
            &Event::SetSpte { gfn, level, spte } => self.check_made(t, gfn, level, spte),
            Event::FastFault(fast) => self.fast_fault(t, fast),
            // Below a root of level 5, a table of level 4 is no root.
            &Event::Root(level) if level > self.root_level => self.root(level),
            Event::Root(_) => {}
            Event::ZapAllFast => {
                self.close(t, End::Went);
                self.zap_all(t);
            }
            Event::Unmap(ranges) => {
                self.close(t, End::Went);
                self.unmap(t, ranges);
            }
            Event::Age => {
                self.close_activity(t);
                self.thread(t).sweeps.insert(NotYet::Aging);
            }
            &Event::Smm { vcpu, entering } => {
                self.close(t, End::Went);
                self.in_smm.insert(vcpu, entering);
            }
            &Event::NestedEnter { nested_paging } => {
                self.close(t, End::Went);
                self.thread(t).nested_paging = nested_paging;
            }
            &Event::NestedExit { page_fault } => {
                self.close(t, End::Went);
                self.thread(t).left_nested = page_fault;
            }
            &Event::UserspaceExit { error } => self.close(t, if error { End::Error } else { End::Went }),
        }
        if self.faults_since_compare >= COMPARE_EVERY {
            self.compare();
        }
        Ok(())
    }

    /// The trace ends here, or with `cut` the replay does: a fault whose effect is not known then is left out.
    pub fn finish(&mut self, cut: bool) {
        let threads: Vec<u32> = self.threads.keys().copied().collect();
        for &t in &threads {
            if cut {
                self.thread(t).fault.take_if(|fault| !fault.code.is_reserved());
            }
            self.close_fault(t, End::Went);
        }
        for t in threads {
            self.close_activity(t);
        }
        self.changed_since_compare = true;
        self.compare();
    }

    fn thread(&mut self, t: u32) -> &mut Thread {
        self.threads.entry(t).or_default()
    }

    fn root(&mut self, level: u8) {
        self.root_level = level;
        self.expected.set_root_level(level);
        self.steps.push(Step::Root(level));
    }

    fn space_of(&self, vcpu: Option<u32>) -> u8 {
        vcpu.and_then(|vcpu| self.in_smm.get(&vcpu)).copied().unwrap_or_default().into()
    }

    fn contradict(&mut self, contradiction: Contradiction) {
        self.steps.push(Step::Contradiction { seq: self.seq, contradiction });
    }

    fn sync(&mut self, as_id: u8, gfn: u64, level: u8) {
        let start = spte::align(gfn, level);
        self.steps.push(Step::Sync(SpaceRange { as_id, start, end: start + pages(level) }));
    }

    /// Everything is compared, unless some removal is only half told.
    fn compare(&mut self) {
        let half_told = |thread: &Thread| {
            !thread.removed.is_empty() || thread.unmap.as_ref().is_some_and(|unmap| unmap.executed)
        };
        if self.changed_since_compare && !self.threads.values().any(half_told) {
            self.changed_since_compare = false;
            self.faults_since_compare = 0;
            self.steps.push(Step::Compare { seq: self.seq });
        }
    }

    // ---- operations of the scenario

    fn begin(&mut self, t: u32, index: u32) -> Result<(), String> {
        let op = self.scenario.op(index).ok_or_else(|| format!("operation {index} is not in the scenario"))?.clone();
        let mut open = OpenOp { op, slot: None, region: None };
        match open.op {
            Op::SetRegion(region) => {
                let old = self.slots.get(&(region.as_id, region.slot)).copied();
                match old {
                    None if region.pages == 0 => {}
                    None => self.slot(SlotChange::Insert(region)),
                    // KVM removes first and shows the new place last; what lies between shows when it begins.
                    Some(old) if region.pages == 0 => {
                        (open.slot, open.region) = (Some(SlotChange::Remove(old)), Some(old));
                    }
                    Some(old) if old.gfn != region.gfn => {
                        (open.slot, open.region) = (Some(SlotChange::Move(region)), Some(old));
                    }
                    Some(old) if old != region => {
                        if old.log_dirty != region.log_dirty {
                            self.thread(t).sweeps.insert(NotYet::DirtyLogging);
                        }
                        self.slot(SlotChange::Flags(region));
                    }
                    Some(_) => {}
                }
            }
            Op::PreFault { vcpu } => self.thread(t).vcpu = Some(vcpu),
            Op::DirtyLog => {
                self.thread(t).sweeps.insert(NotYet::DirtyLogging);
            }
            Op::NxHugePages(on) => self.expected.nx_huge_pages = on,
            Op::Other => {}
        }
        self.thread(t).op = Some(open);
        Ok(())
    }

    fn end(&mut self, t: u32) {
        self.begin_slot_change(t);
        if let Some(OpenOp { op: Op::SetRegion(_), .. }) = self.thread(t).op.take() {
            self.changed_since_compare = true;
        }
        self.compare();
    }

    fn slot(&mut self, change: SlotChange) {
        match change {
            SlotChange::Insert(region) | SlotChange::Move(region) | SlotChange::Flags(region) => {
                self.slots.insert((region.as_id, region.slot), region);
            }
            SlotChange::Remove(region) => {
                self.slots.remove(&(region.as_id, region.slot));
            }
        }
        self.steps.push(Step::Slot(change));
    }

    /// The deletion or move that `t` is in the middle of shows now. Returns the slot's place before it, if there is one.
    fn begin_slot_change(&mut self, t: u32) -> Option<Region> {
        let op = self.thread(t).op.as_mut()?;
        let (change, region) = (op.slot.take(), op.region);
        if let Some(change) = change {
            self.slot(change);
        }
        region
    }

    // ---- inputs of the host

    fn zap_all(&mut self, t: u32) {
        self.begin_slot_change(t);
        self.expected.detach_all(t);
        self.stamps.note_all(t, self.seq);
        self.overtake(t, |_| true);
        self.changed_since_compare = true;
        self.steps.push(Step::InvalidateRoots);
        let everything = |as_id| SpaceRange { as_id, start: 0, end: u64::MAX };
        let ranges = vec![everything(0), everything(1)];
        self.steps.push(Step::Verify { seq: self.seq, operation: Operation::InvalidateRoots, ranges });
    }

    fn unmap(&mut self, t: u32, ranges: &[SpaceRange]) {
        if ranges.is_empty() {
            return;
        }
        let mut owed = BTreeSet::new();
        for range in ranges {
            let leaves = self.expected.leaves(Space::normal(range.as_id), range.start, range.end);
            owed.extend(leaves.map(|leaf| (range.as_id, leaf.gfn, leaf.level)));
        }
        self.overtake(t, |fault| ranges.iter().any(|r| fault.lies_in(r.as_id, r.start, r.end)));
        let mut unmap = Unmap { ranges: ranges.to_vec(), owed, executed: false };
        if unmap.owed.is_empty() {
            self.execute_unmap(&mut unmap);
            self.verify_unmap(unmap);
        } else {
            self.thread(t).unmap = Some(unmap);
        }
    }

    fn execute_unmap(&mut self, unmap: &mut Unmap) {
        if !unmap.executed {
            unmap.executed = true;
            self.steps.push(Step::Invalidate(unmap.ranges.clone()));
        }
    }

    fn verify_unmap(&mut self, unmap: Unmap) {
        self.steps.push(Step::Verify { seq: self.seq, operation: Operation::Invalidate, ranges: unmap.ranges });
    }

    /// Faults of other threads have something in common with what `t` did.
    fn overtake(&mut self, t: u32, concerns: impl Fn(&Pending) -> bool) {
        for (&other, thread) in &mut self.threads {
            if other != t && let Some(fault) = thread.fault.as_mut().filter(|fault| concerns(fault)) {
                fault.overtaken = true;
            }
        }
    }

    // ---- faults

    fn page_fault(&mut self, t: u32, previous: u64, left_nested: bool, vcpu: u32, gpa: u64, code: Code) {
        let (as_id, seq) = (self.space_of(Some(vcpu)), self.seq);
        let thread = self.thread(t);
        thread.vcpu = Some(vcpu);
        let guest = match (left_nested, thread.nested_paging) {
            (false, _) => Guest::Ordinary,
            (true, true) => Guest::Shadow,
            (true, false) => Guest::NestedDirect,
        };
        let space = if guest == Guest::NestedDirect { Space::nested(as_id) } else { Space::normal(as_id) };
        let fault = Pending {
            seq,
            vcpu: Some(vcpu),
            space,
            guest,
            gpa,
            code,
            ahead: false,
            requested: None,
            overtaken: false,
            concluded: false,
        };
        thread.fault = Some(fault);
        if guest == Guest::Ordinary {
            self.settle(as_id, fault.gfn());
            self.access(t, previous, &fault, vcpu);
        }
    }

    /// The access that faulted, before anything is done about it.
    fn access(&mut self, t: u32, previous: u64, fault: &Pending, vcpu: u32) {
        let gfn = fault.gfn();
        let meets = match self.expected.leaf_at(fault.space, gfn) {
            Some(leaf) if fault.code.passes(&leaf) => Meets::Page { pfn: leaf.pfn() + (gfn - leaf.gfn) },
            Some(_) => Meets::Forbidden,
            None if self.expected.is_mmio(fault.space, gfn) => Meets::Mmio,
            None => Meets::Nothing,
        };
        let overtaken = self.stamps.changed_by_other(fault.space.as_id(), gfn, t, previous);
        if meets != Meets::reported(fault.code) && !overtaken {
            let what = Wrong::NotMet { reported: fault.code.0 };
            self.contradict(Contradiction { as_id: fault.space.as_id(), level: 1, gfn, what });
        }
        let half_removed = |unmap: &Unmap| unmap.executed && unmap.ranges.iter().any(|r| fault.lies_in(r.as_id, r.start, r.end));
        if !self.threads.values().any(|thread| thread.unmap.as_ref().is_some_and(half_removed)) {
            let (as_id, gpa, code) = (fault.space.as_id(), fault.gpa, fault.code);
            self.steps.push(Step::Access(GuestAccess { seq: self.seq, vcpu, as_id, gpa, code, meets }));
        }
    }

    fn requested(&mut self, t: u32, gfn: u64, requested: Requested) {
        let open = self.thread(t).fault.is_some_and(|f| f.gfn() == gfn && !f.concluded && !(f.ahead && f.requested.is_some()));
        // Without a fault of its own, memory is mapped ahead of the guest. (A shadow page's request names the frame of
        // the guest hypervisor, not that of its guest.)
        let shadow = self.thread(t).fault.is_some_and(|f| f.guest == Guest::Shadow);
        if !open && !shadow {
            self.close_fault(t, End::Went);
            let vcpu = self.thread(t).vcpu;
            let space = Space::normal(self.space_of(vcpu));
            self.settle(space.as_id(), gfn);
            let seq = self.seq;
            self.thread(t).fault = Some(Pending {
                seq,
                vcpu,
                space,
                guest: Guest::Ordinary,
                gpa: gfn << 12,
                code: Code::READ,
                ahead: true,
                requested: None,
                overtaken: false,
                concluded: false,
            });
        }
        if let Some(fault) = &mut self.thread(t).fault {
            fault.requested = Some(requested);
        }
        self.conclude_if_satisfied(t);
    }

    /// The answer may find the page mapped already.
    fn conclude_if_satisfied(&mut self, t: u32) {
        let Some(fault) = self.thread(t).fault.filter(|f| !f.concluded && f.guest == Guest::Ordinary) else { return };
        let leaf = self.expected.leaf_at(fault.space, fault.gfn());
        if fault.is_satisfied(leaf) {
            self.conclude(t, fault.effect(leaf, leaf, false, self.expected.nx_huge_pages));
        }
    }

    /// What `t` changed may have done the work of other threads' faults.
    fn conclude_overtaken(&mut self, t: u32) {
        let others = self.threads.iter().filter(|&(&other, thread)| other != t && thread.fault.is_some_and(|f| f.overtaken));
        for other in others.map(|(&other, _)| other).collect::<Vec<_>>() {
            self.conclude_if_satisfied(other);
        }
    }

    fn conclude(&mut self, t: u32, conclusion: Conclusion) {
        let Some(fault) = &mut self.thread(t).fault else { return };
        fault.concluded = true;
        let fault = *fault;
        self.faults_since_compare += 1;
        let gfn = fault.gfn();
        match conclusion {
            Conclusion::NotYet(reason) => {
                self.steps.push(Step::NotYetFault { seq: fault.seq, reason, ahead: fault.ahead });
            }
            Conclusion::Compare(answer, recorded) => {
                self.steps.push(Step::Fault(fault.step(answer, recorded)));
                // The permissions that a sweep's policy took away are copied.
                let leaf = self.expected.leaf_at(fault.space, gfn);
                if let Some(leaf) = leaf.filter(|l| !l.is_executable() || l.is_writable() != l.is_host_writable()) {
                    self.sync(fault.space.as_id(), leaf.gfn, leaf.level);
                }
            }
        }
    }

    fn fast_fault(&mut self, t: u32, fast: &FastFault) {
        let thread = self.thread(t);
        let vcpu = thread.vcpu;
        let space = thread.fault.map(|fault| fault.space);
        let space = space.unwrap_or_else(|| Space::normal(self.space_of(vcpu)));
        let level = fast.level.max(1);
        let gfn = spte::align(fast.gpa >> 12, level);
        if fast.fixed {
            let change = Change { as_id: space.as_id(), level, gfn, old: fast.old, new: fast.new };
            if let Err(contradiction) = self.expected.repair(space, &change) {
                self.contradict(contradiction);
            }
            self.stamps.note(space.as_id(), gfn, gfn + pages(level), t, self.seq);
            self.changed_since_compare = true;
            if !space.is_nested() {
                self.sync(space.as_id(), gfn, level);
            }
        }
        if (fast.fixed || fast.spurious) && self.thread(t).fault.is_some_and(|f| !f.concluded) {
            self.conclude(t, Conclusion::NotYet(NotYet::DirtyLogging));
        }
    }

    /// KVM says what leaf the fault of `t` made.
    fn check_made(&mut self, t: u32, gfn: u64, level: u8, spte: u64) {
        let Some(fault) = self.thread(t).fault.filter(|fault| fault.guest == Guest::Ordinary) else { return };
        let made = self.expected.leaf_at(fault.space, gfn);
        let differs = |leaf: Leaf| leaf.level != level || (leaf.spte ^ spte) & !spte::ACCESSED_DIRTY != 0;
        if kind(spte, level) == Kind::Leaf && made.is_none_or(differs) {
            let what = Wrong::NotMade(spte);
            self.contradict(Contradiction { as_id: fault.space.as_id(), level, gfn, what });
        }
    }

    // ---- changes of entries

    fn change(&mut self, t: u32, change: &Change) {
        let (as_id, level) = (change.as_id, change.level);
        let (start, end) = (change.gfn, change.gfn.saturating_add(pages(level)));
        let fault = self.thread(t).fault;
        let covers = fault.filter(|f| f.lies_in(as_id, start, end) && f.guest != Guest::Shadow);
        let before = covers.and_then(|f| self.expected.leaf_at(f.space, f.gfn()));
        let below: Vec<Leaf> = if kind(change.old, level) == Kind::Table && kind(change.new, level) != Kind::Table {
            self.expected.leaves(Space::normal(as_id), start, end).collect()
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
        let Place::Live(space) = place else { return };
        self.stamps.note(as_id, start, end, t, self.seq);
        self.overtake(t, |fault| fault.lies_in(as_id, start, end));
        self.changed_since_compare = true;
        if space.is_nested() {
            if let Some(fault) = covers.filter(|f| !f.concluded && from != Kind::Table && to != Kind::Table) {
                self.conclude(t, fault.effect(None, None, false, false));
            }
            return;
        }
        if to == Kind::Table && from != Kind::Leaf {
            return;
        }
        if matches!(to, Kind::None | Kind::Frozen) {
            // Older kernels remove a huge page that is write-protected, and the same fault maps smaller ones.
            let conclusion = covers.filter(|f| !f.concluded).map(|f| f.effect(before, before, false, false));
            if let Some(conclusion @ Conclusion::NotYet(_)) = conclusion {
                self.conclude(t, conclusion);
                self.sync(as_id, start, level);
            } else if from != Kind::Mmio {
                let leaf = Leaf { gfn: start, level, spte: change.old };
                self.removed(t, as_id, if from == Kind::Leaf { vec![leaf] } else { below });
            }
            return;
        }
        match covers {
            Some(fault) if !fault.concluded => {
                let after = self.expected.leaf_at(fault.space, fault.gfn());
                let mmio = self.expected.is_mmio(fault.space, fault.gfn());
                let conclusion = fault.effect(before, after, mmio, self.expected.nx_huge_pages);
                self.conclude(t, conclusion);
                if matches!(conclusion, Conclusion::NotYet(_)) {
                    self.sync(as_id, start, level);
                }
            }
            // A second change of the same fault, below a split.
            Some(_) => self.sync(as_id, start, level),
            None => {
                let reason = sweep(change, from, to);
                self.thread(t).sweeps.insert(reason);
                self.sync(as_id, start, level);
            }
        }
    }

    /// `t` removed these leaves from a live tree: find the reason.
    fn removed(&mut self, t: u32, as_id: u8, leaves: Vec<Leaf>) {
        for leaf in leaves {
            let key = (as_id, leaf.gfn, leaf.level);
            for thread in self.threads.values_mut() {
                if let Some(unmap) = &mut thread.unmap {
                    unmap.owed.remove(&key);
                }
            }
            let overlaps = |r: &SpaceRange| r.as_id == as_id && r.start < leaf.end() && leaf.gfn < r.end;
            if let Some(mut unmap) = self.thread(t).unmap.take_if(|unmap| unmap.ranges.iter().any(overlaps)) {
                self.execute_unmap(&mut unmap);
                if unmap.owed.is_empty() {
                    self.verify_unmap(unmap);
                } else {
                    self.thread(t).unmap = Some(unmap);
                }
                continue;
            }
            let region = self.thread(t).op.as_ref().and_then(|op| op.region);
            let in_slot = |r: &Region| r.as_id == as_id && r.gfn < leaf.end() && leaf.gfn < r.gfn + r.pages;
            if region.as_ref().is_some_and(in_slot) {
                self.begin_slot_change(t);
                continue;
            }
            self.thread(t).removed.push((as_id, leaf));
        }
    }

    /// Something is about to happen at `gfn`: removals there whose reason is unknown are copied now.
    fn settle(&mut self, as_id: u8, gfn: u64) {
        let concerns = |thread: &Thread| {
            thread.removed.iter().any(|(space, leaf)| *space == as_id && (leaf.gfn..leaf.end()).contains(&gfn))
        };
        let threads: Vec<u32> = self.threads.iter().filter(|(_, thread)| concerns(thread)).map(|(&t, _)| t).collect();
        for t in threads {
            self.close_activity(t);
        }
    }

    // ---- ends

    /// `t` turns to something else.
    fn close(&mut self, t: u32, end: End) {
        self.close_fault(t, end);
        self.close_activity(t);
    }

    fn close_fault(&mut self, t: u32, end: End) {
        if let Some(fault) = self.thread(t).fault.filter(|fault| !fault.concluded) {
            let gfn = fault.gfn();
            let leaf = self.expected.leaf_at(fault.space, gfn);
            let mmio = self.expected.is_mmio(fault.space, gfn);
            let in_slot = |r: &Region| r.as_id == fault.space.as_id() && r.gfn <= gfn && gfn - r.gfn < r.pages;
            let read_only = self.slots.values().any(|region| region.read_only && in_slot(region));
            let conclusion = fault.no_effect(end, leaf, mmio, read_only, self.expected.nx_huge_pages);
            self.conclude(t, conclusion);
        }
        self.thread(t).fault = None;
    }

    fn close_activity(&mut self, t: u32) {
        for contradiction in self.expected.finish_detached(t) {
            self.contradict(contradiction);
        }
        if let Some(mut unmap) = self.thread(t).unmap.take() {
            self.execute_unmap(&mut unmap);
            self.verify_unmap(unmap);
        }
        let removed = std::mem::take(&mut self.thread(t).removed);
        if !removed.is_empty() {
            if self.expected.is_empty() {
                self.teardown(removed);
            } else {
                self.thread(t).sweeps.insert(NotYet::Recovery);
                for (as_id, leaf) in removed {
                    self.sync(as_id, leaf.gfn, leaf.level);
                }
            }
        }
        for reason in std::mem::take(&mut self.thread(t).sweeps) {
            self.steps.push(Step::NotYetOperation(reason));
        }
    }

    /// Nothing is mapped any more: the VM went away.
    fn teardown(&mut self, mut leaves: Vec<(u8, Leaf)>) {
        for thread in self.threads.values_mut() {
            leaves.append(&mut thread.removed);
        }
        leaves.sort_by_key(|(as_id, leaf)| (*as_id, leaf.gfn));
        self.steps.push(Step::Teardown { seq: self.seq, leaves });
    }
}

/// What kind of sweep makes such a change without a fault.
fn sweep(change: &Change, from: Kind, to: Kind) -> NotYet {
    let leaf = |spte| Leaf { gfn: change.gfn, level: change.level, spte };
    match (from, to) {
        (Kind::Leaf, Kind::Table) => NotYet::EagerSplit,
        (Kind::Table, Kind::Leaf) => NotYet::Collapse,
        (Kind::Leaf, Kind::Leaf) => match (leaf(change.old), leaf(change.new)) {
            (old, new) if old.is_mmu_writable() && !new.is_mmu_writable() => NotYet::Nested,
            (old, new) if old.is_writable() != new.is_writable() => NotYet::DirtyLogging,
            _ if change.old ^ change.new == 0x20 => NotYet::Aging,
            _ => NotYet::OtherSweep,
        },
        _ => NotYet::OtherSweep,
    }
}
