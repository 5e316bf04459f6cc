//! What a trace tells, as steps to take with the library.
//!
//! Protocol. [`Story::feed`] takes the lines in order; after each, [`Story::take_steps`] gives what is to be done,
//! with [`Story::expected`] standing as after that line. An input of the host (slots, invalidations) becomes a step at
//! the point of the trace where its effect begins; a fault where its effect shows (`pending`); and what the library
//! has no operation for yet is counted as such and copied from the record ([`Step::Sync`]), so that what follows stays
//! comparable. Nothing is decided by the name of a file or of a task.

use super::expect::{Contradiction, Expected};
use super::ledger::{Class, Episode};
use super::pending::{End, Pending, Requested};
use super::scenario::{Op, Region, Scenario};
use super::spte::{self, Leaf, pages};
use super::stamps::Stamps;
use super::step::{Code, SlotChange, Step};
use super::trace::{Event, Line, SpaceRange};
use std::collections::{BTreeMap, BTreeSet, HashMap};

mod changes;
mod faults;
mod inputs;

/// After so many faults everything mapped is compared.
const COMPARE_EVERY: u32 = 4096;
/// Contradictions after which a trace is given up.
const MAX_CONTRADICTIONS: u64 = 10_000;
/// Entries that the recorded tables may have at a time: those of 32 GiB in 4 KiB pages.
const MAX_ENTRIES: usize = 1 << 23;

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
    /// Where a log ended.
    unlogged: Option<Region>,
    /// Executable large pages have yet to be forbidden or permitted.
    nx: Option<bool>,
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
    /// Where it removed leaves and tables without a known reason.
    zapped: Vec<SpaceRange>,
    /// Frames whose accessed bits the host asks for, and whether it clears them.
    age: Option<(Vec<SpaceRange>, bool)>,
    nested_paging: bool,
    /// It ran nested guests: their hypervisor's tables may be tracked.
    ran_nested: bool,
    left_nested: bool,
    /// It made a root for an address space that had one.
    fresh_root: bool,
    episode: Episode,
    /// It did something in this episode.
    acted: bool,
    class: Class,
}

/// See the module.
#[derive(Debug)]
pub struct Story {
    scenario: Scenario,
    /// Operations of the scenario whose end the trace has yet to show.
    not_ended: BTreeSet<u32>,
    expected: Expected,
    threads: BTreeMap<u32, Thread>,
    in_smm: HashMap<u32, bool>,
    slots: HashMap<(u8, u32), Region>,
    /// Flags that every logged slot has from now on: manual, initially set.
    log_flags: (bool, bool),
    stamps: Stamps,
    root_level: u8,
    seq: u64,
    steps: Vec<Step>,
    /// The episode that the last step belongs to, and the last one that began.
    acting: Episode,
    episodes: Episode,
    contradictions: u64,
    faults_since_compare: u32,
    changed_since_compare: bool,
}

impl Story {
    /// A story of `scenario`, before its first event.
    pub fn new(scenario: Scenario) -> Self {
        let expected = Expected::new(scenario.nx_huge_pages);
        Self {
            not_ended: scenario.indices().collect(),
            scenario,
            expected,
            threads: BTreeMap::new(),
            in_smm: HashMap::new(),
            slots: HashMap::new(),
            log_flags: (false, false),
            stamps: Stamps::default(),
            root_level: 0,
            seq: 0,
            steps: Vec::new(),
            acting: 0,
            episodes: 0,
            contradictions: 0,
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
    /// One line of text if the line names an operation that the scenario does not have, or the trace is beyond bounds.
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
            Event::OpEnd(index) => {
                self.not_ended.remove(index);
                self.close(t, End::Went);
                self.end(t);
            }
            &Event::PageFault { vcpu, gpa, code } => {
                self.close(t, End::Went);
                self.page_fault(t, previous, left_nested, vcpu, gpa, Code(code));
            }
            &Event::Requested { gfn, level, pfn } => {
                self.requested(t, gfn, Requested { level, pfn })
            }
            Event::Changed(run) => {
                if self.root_level == 0 {
                    self.root(4);
                }
                for change in run.changes() {
                    self.change(t, &change);
                    self.check_bounds()?;
                }
                self.conclude_overtaken(t);
            }
            &Event::SetSpte { gfn, level, spte } => self.check_made(t, gfn, level, spte),
            &Event::MarkMmio(gfn) => self.check_marked(t, gfn),
            &Event::MarkDirty { as_id, slot, gfn } => self.mark_dirty(t, as_id, slot, gfn),
            Event::FastFault(fast) => self.fast_fault(t, fast),
            &Event::Root(level) if level > self.root_level => self.root(level),
            // Below a root of level 5, a table of level 4 is no root.
            &Event::Root(level) if level == self.root_level => self.another_root(t),
            Event::Root(_) => {}
            Event::ZapAllFast => {
                self.close(t, End::Went);
                self.zap_all(t);
            }
            Event::Unmap(ranges) => {
                self.close(t, End::Went);
                self.unmap(t, ranges);
            }
            Event::Age { ranges, clears } => {
                self.close_activity(t);
                self.settle_episode(t);
                self.thread(t).age = Some((ranges.clone(), *clears));
            }
            &Event::Smm { vcpu, entering } => {
                self.close(t, End::Went);
                self.in_smm.insert(vcpu, entering);
            }
            &Event::NestedEnter { nested_paging } => {
                self.close(t, End::Went);
                self.thread(t).nested_paging = nested_paging;
                self.thread(t).ran_nested = true;
            }
            &Event::NestedExit { page_fault } => {
                self.close(t, End::Went);
                self.thread(t).left_nested = page_fault;
            }
            &Event::UserspaceExit { error } => {
                self.close(t, if error { End::Error } else { End::Went })
            }
        }
        if self.faults_since_compare >= COMPARE_EVERY {
            self.compare();
        }
        Ok(())
    }

    /// Whether the trace has shown all of the scenario.
    ///
    /// # Errors
    ///
    /// One line of text that names the first operation whose end is missing.
    pub fn check_whole(&self) -> Result<(), String> {
        match self.not_ended.first() {
            Some(index) => Err(format!(
                "the trace is cut short: operation {index} of the scenario has not ended"
            )),
            None => Ok(()),
        }
    }

    /// The trace ends here, or with `cut` the replay does: a fault whose effect is not known then is left out.
    pub fn finish(&mut self, cut: bool) {
        let threads: Vec<u32> = self.threads.keys().copied().collect();
        for &t in &threads {
            if cut {
                self.thread(t)
                    .fault
                    .take_if(|fault| !fault.code.is_reserved());
            }
            self.close_fault(t, End::Went);
        }
        for t in threads {
            self.close_activity(t);
            self.settle_episode(t);
        }
        self.changed_since_compare = true;
        self.compare();
    }

    /// A corrupt trace must not take all memory.
    fn check_bounds(&self) -> Result<(), String> {
        if self.contradictions > MAX_CONTRADICTIONS {
            return Err(format!(
                "the trace contradicts itself more than {MAX_CONTRADICTIONS} times"
            ));
        }
        if self.expected.entries() > MAX_ENTRIES {
            return Err(format!(
                "the trace makes more than {MAX_ENTRIES} entries at a time"
            ));
        }
        Ok(())
    }

    fn thread(&mut self, t: u32) -> &mut Thread {
        self.threads.entry(t).or_default()
    }

    /// What follows is the doing of `t`.
    fn by(&mut self, t: u32) {
        if self.thread(t).episode == 0 {
            self.episodes += 1;
            self.thread(t).episode = self.episodes;
        }
        let thread = self.thread(t);
        thread.acted = true;
        let episode = thread.episode;
        if self.acting != episode {
            self.acting = episode;
            self.steps.push(Step::By(episode));
        }
    }

    /// `t` is done with what it was about.
    fn settle_episode(&mut self, t: u32) {
        let thread = self.thread(t);
        let (episode, class) = (
            std::mem::take(&mut thread.episode),
            std::mem::take(&mut thread.class),
        );
        if std::mem::take(&mut thread.acted) {
            self.steps.push(Step::Settle(episode, class));
        }
    }

    fn root(&mut self, level: u8) {
        self.root_level = level;
        self.expected.set_root_level(level);
        self.steps.push(Step::Root(level));
    }

    fn space_of(&self, vcpu: Option<u32>) -> u8 {
        vcpu.and_then(|vcpu| self.in_smm.get(&vcpu))
            .copied()
            .unwrap_or_default()
            .into()
    }

    fn contradict(&mut self, contradiction: Contradiction) {
        self.contradictions += 1;
        self.steps.push(Step::Contradiction {
            seq: self.seq,
            contradiction,
        });
    }

    fn sync(&mut self, as_id: u8, gfn: u64, level: u8) {
        let start = spte::align(gfn, level);
        let range = SpaceRange {
            as_id,
            start,
            end: start + pages(level),
        };
        match self.steps.last_mut() {
            Some(Step::Sync(last)) if last.as_id == as_id && last.end == range.start => {
                last.end = range.end
            }
            _ => self.steps.push(Step::Sync(range)),
        }
    }

    /// Everything is compared, unless some removal is only half told.
    fn compare(&mut self) {
        let half_told = |thread: &Thread| {
            !thread.zapped.is_empty() || thread.unmap.as_ref().is_some_and(|unmap| unmap.executed)
        };
        if self.changed_since_compare && !self.threads.values().any(half_told) {
            self.changed_since_compare = false;
            self.faults_since_compare = 0;
            self.steps.push(Step::Compare { seq: self.seq });
        }
    }

    /// `t` turns to something else.
    fn close(&mut self, t: u32, end: End) {
        self.close_fault(t, end);
        self.close_activity(t);
        self.settle_episode(t);
    }

    fn close_fault(&mut self, t: u32, end: End) {
        self.conclude_split(t);
        if let Some(fault) = self.thread(t).fault.filter(|fault| !fault.concluded) {
            let gfn = fault.gfn();
            let leaf = self.expected.leaf_at(fault.space, gfn);
            let mmio = self.expected.is_mmio(fault.space, gfn);
            let in_slot = |r: &Region| {
                r.as_id == fault.space.as_id() && r.gfn <= gfn && gfn - r.gfn < r.pages
            };
            let read_only = self
                .slots
                .values()
                .any(|region| region.read_only && in_slot(region));
            let conclusion = fault.no_effect(end, leaf, mmio, read_only);
            self.conclude(t, conclusion);
        }
        self.thread(t).fault = None;
    }

    fn close_activity(&mut self, t: u32) {
        for contradiction in self.expected.finish_detached(t) {
            self.contradict(contradiction);
        }
        if let Some((ranges, clears)) = self.thread(t).age.take() {
            self.by(t);
            self.steps.push(Step::Age { ranges, clears });
        }
        if let Some(mut unmap) = self.thread(t).unmap.take() {
            self.execute_unmap(t, &mut unmap);
            self.verify_unmap(unmap);
        }
        let thread = self.thread(t);
        let removed = std::mem::take(&mut thread.removed);
        let zapped = std::mem::take(&mut thread.zapped);
        if !removed.is_empty() && self.expected.maps_nothing() {
            self.teardown(t, removed);
        } else if !zapped.is_empty() {
            // The episode will show it; what follows is to be comparable.
            self.steps.extend(zapped.into_iter().map(Step::Sync));
        }
    }

    /// Nothing is mapped any more: the VM went away.
    fn teardown(&mut self, t: u32, mut leaves: Vec<(u8, Leaf)>) {
        for thread in self.threads.values_mut() {
            leaves.append(&mut thread.removed);
            thread.zapped.clear();
        }
        leaves.sort_by_key(|(as_id, leaf)| (*as_id, leaf.gfn));
        self.by(t);
        self.steps.push(Step::Teardown {
            seq: self.seq,
            leaves,
        });
    }
}
