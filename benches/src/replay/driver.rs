//! Executes the steps of a story on the library and checks every one of them.
//!
//! Protocol. The recorded guest's accesses are made on software vCPUs, which walk the library's own tables and keep
//! what they cached until the library's flush reaches them: each access must meet what the recorded tables held, each
//! fault must end as recorded, and the access made again must then reach the recorded page. What differs is noted, and
//! the library is brought back into the recorded state, so that one difference is told once.

use super::expect::Expected;
use super::findings::{Difference, Findings};
use super::host::TraceHost;
use super::ledger::{Class, Episode, Ledger};
use super::processor::{PHYSICAL_BITS, Processor};
use super::scenario::{Region, Scenario};
use super::step::{SlotChange, Step};
use super::trace::{ADDRESS_SPACES, SpaceRange, everything};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use tdp::{
    AddressSpaceId, Gfn, GfnRange, Host, Level, Mmu, Slot, SlotError, SlotFlags, SlotId,
    SlotRemoval, Vcpu,
};

mod compare;
mod copy;
mod guest;
mod logs;
mod observe;
mod sweeps;

use guest::Cpu;
use observe::Doing;

/// What stops a replay.
pub type Stop = Box<dyn std::error::Error + Send + Sync>;

/// The library with its vCPUs.
struct Machine<F: Processor> {
    vcpus: BTreeMap<Option<u32>, Cpu<F>>,
    /// Maps what is copied from the record.
    hand: Vcpu<F, TraceHost>,
    mmu: Mmu<F, TraceHost>,
}

/// How KVM and its VM were set up.
#[derive(Clone, Copy)]
struct Settings {
    mmio_caching: bool,
    eager_split: bool,
    slots_take_roots: bool,
    nx_huge_pages: bool,
    dirty_ring: u32,
}

/// See the module.
pub struct Driver<F: Processor> {
    machine: Option<Machine<F>>,
    root: Level,
    settings: Settings,
    slots: BTreeMap<(u8, u32), Region>,
    left: Vec<Arc<OnceLock<usize>>>,
    ledger: Ledger,
    /// Whose doing the next step is, and the last position in the trace that a step told.
    episode: Episode,
    seq: u64,
    findings: Findings,
}

fn space(as_id: u8) -> AddressSpaceId {
    AddressSpaceId(as_id)
}

impl<F: Processor> Driver<F> {
    /// A driver with nothing mapped; `findings` names the scenario.
    pub fn new(scenario: &Scenario, findings: Findings) -> Self {
        let settings = Settings {
            mmio_caching: scenario.mmio_caching,
            eager_split: scenario.eager_split,
            slots_take_roots: scenario.slots_take_roots,
            nx_huge_pages: scenario.nx_huge_pages,
            dirty_ring: 0,
        };
        let (root, slots, left) = (Level::L4, BTreeMap::new(), Vec::new());
        Self {
            machine: None,
            root,
            settings,
            slots,
            left,
            ledger: Ledger::default(),
            episode: 0,
            seq: 0,
            findings,
        }
    }

    /// Executes a step.
    ///
    /// # Errors
    ///
    /// If the library cannot go on: no table frame is left, or a bad configuration.
    pub fn execute(&mut self, step: &Step, expected: &Expected) -> Result<(), Stop> {
        match step {
            &Step::Root(level) => self.set_root(level, expected)?,
            &Step::Slot { seq, change, roots } => {
                if roots {
                    let view = self.view(&everything());
                    self.slot(seq, &change)?;
                    if !self.settings.slots_take_roots {
                        self.machine()?.mmu.invalidate_roots().finish();
                    }
                    self.enter_removal(&view);
                } else {
                    let ranges = self.reach_of_slot(&change);
                    self.observed(&ranges, Doing::Library, |driver| driver.slot(seq, &change))?;
                }
            }
            Step::InvalidateRoots => self.invalidate_roots()?,
            Step::Invalidate(ranges) => {
                self.observed(ranges, Doing::Library, |driver| driver.invalidate(ranges))?;
            }
            Step::Access(access) => self.access(access)?,
            Step::Fault(fault) => self.fault(fault, expected)?,
            &Step::OutsideFault(rule) => self.findings.fault_outside(rule),
            &Step::GiveUpRoot(as_id) => self.give_up_root(as_id)?,
            Step::Age { ranges, clears } => self.age(ranges, *clears)?,
            &Step::NxHugePages(on) => self.nx_huge_pages(on)?,
            &Step::RecoverNx { as_id, gfn, level } => {
                self.recover_nx(as_id, gfn, level, expected)?;
            }
            &Step::DirtyRing(entries) => self.settings.dirty_ring = entries,
            &Step::MarkDirty { as_id, slot, page } => self.mark_dirty(as_id, slot, page),
            Step::DirtyLog { seq, op } => self.dirty_log(*seq, op)?,
            &Step::Sweep { as_id, gfn, level } => self.sweep(as_id, gfn, level)?,
            Step::Collapse(range) => self.collapse(range)?,
            &Step::TrackWrites { as_id, gfn } => self.track_writes(as_id, gfn)?,
            Step::Sync(range) => self.sync(range, expected)?,
            Step::Follow(rule, range) => self.follow(*rule, range, expected)?,
            Step::Verify {
                seq,
                operation,
                ranges,
            } => {
                let matched = self.verify(*seq, ranges, expected)?;
                self.findings.operation(*operation, matched);
            }
            &Step::Compare { seq } => self.compare(seq, expected)?,
            Step::Teardown { seq, leaves } => self.teardown(*seq, leaves)?,
            &Step::Recorded {
                seq,
                key,
                transition,
            } => {
                self.seq = seq;
                let tally = &mut self.findings.transitions;
                self.ledger
                    .recorded(tally, self.episode, seq, key, transition);
            }
            &Step::Explained(rule) => {
                self.findings.transitions.total += 1;
                self.findings.transitions.explained(rule, 1);
            }
            &Step::By(episode) => self.episode = episode,
            &Step::Settle(episode, class) => self.settle(episode, class),
            &Step::Contradiction { seq, contradiction } => {
                self.findings.differs((seq, contradiction).into())
            }
        }
        Ok(())
    }

    fn settle(&mut self, episode: Episode, class: Class) {
        let tally = &mut self.findings.transitions;
        for difference in self.ledger.settle(tally, episode, class) {
            self.findings.differs(difference);
        }
    }

    /// Drops everything and tells what was found.
    pub fn finish(mut self) -> Findings {
        for episode in self.ledger.episodes() {
            self.settle(episode, Class::Compared);
        }
        if let Some(machine) = self.machine.take() {
            let peak = machine.mmu.host().frames().peak();
            self.findings.peak_frames = self.findings.peak_frames.max(peak as u64);
        }
        // A host that is still there has leaked as a whole.
        let leaked = self
            .left
            .iter()
            .map(|left| left.get().copied().unwrap_or(TraceHost::FRAMES) as u64);
        self.findings.leaked_frames = leaked.sum();
        self.findings.levels = self.root.number();
        self.findings
    }

    // ---- the library

    fn machine(&mut self) -> Result<&mut Machine<F>, Stop> {
        if self.machine.is_none() {
            let left = Arc::new(OnceLock::new());
            self.left.push(left.clone());
            let mmu = Mmu::<F, _>::builder(TraceHost::new(left)?)
                .levels(self.root)
                .address_spaces(ADDRESS_SPACES)
                .physical_bits(PHYSICAL_BITS)
                .mmio_caching(self.settings.mmio_caching)
                .eager_split(self.settings.eager_split)
                .slot_removal(if self.settings.slots_take_roots {
                    SlotRemoval::InvalidateRoots
                } else {
                    SlotRemoval::Zap
                })
                .nx_huge_pages(self.settings.nx_huge_pages)
                .dirty_ring(self.settings.dirty_ring)
                .build()?;
            for region in self.slots.values() {
                mmu.slots().insert(slot_of(region))?;
            }
            self.machine = Some(Machine {
                vcpus: BTreeMap::new(),
                hand: mmu.vcpu()?,
                mmu,
            });
        }
        self.machine.as_mut().ok_or_else(|| "no machine".into())
    }

    /// Trees get another level: a guest with wider addresses. Everything is made anew.
    fn set_root(&mut self, level: u8, expected: &Expected) -> Result<(), Stop> {
        let Some(level) = Level::from_number(level).filter(|&level| level != self.root) else {
            return Ok(());
        };
        self.root = level;
        if self.machine.take().is_some() {
            for as_id in 0..ADDRESS_SPACES {
                self.sync(
                    &SpaceRange {
                        as_id,
                        start: 0,
                        end: u64::MAX,
                    },
                    expected,
                )?;
            }
        }
        Ok(())
    }

    fn gfns(&self, range: &SpaceRange) -> GfnRange {
        let limit = self.root.gfn_limit();
        GfnRange {
            start: Gfn(range.start).min(limit),
            end: Gfn(range.end).min(limit),
        }
    }

    fn slot(&mut self, seq: u64, change: &SlotChange) -> Result<(), Stop> {
        let (operation, seen) = (change.operation(), self.machine.is_some());
        let slots = &mut self.slots;
        let region = match *change {
            SlotChange::Insert(region) | SlotChange::Move(region) | SlotChange::Flags(region) => {
                slots.insert((region.as_id, region.slot), region);
                region
            }
            SlotChange::Remove(region) => {
                slots.remove(&(region.as_id, region.slot));
                region
            }
        };
        // Before the first root is made there is nothing to tell the library; it gets all slots when it is made.
        if !seen {
            self.findings.operation(operation, true);
            return Ok(());
        }
        let slots = self.machine()?.mmu.slots();
        let (as_id, id) = (space(region.as_id), SlotId(region.slot));
        let done: Result<(), SlotError> = match change {
            SlotChange::Insert(region) => slots.insert(slot_of(region)).map(drop),
            SlotChange::Remove(_) => slots.remove(as_id, id),
            SlotChange::Move(region) => slots.move_to(as_id, id, Gfn(region.gfn)),
            SlotChange::Flags(region) => slots.set_flags(as_id, id, flags_of(region)),
        };
        if let Err(error) = &done {
            let (expected, got) = (
                "a slot change that KVM accepted".to_owned(),
                error.to_string(),
            );
            let Region { as_id, gfn, .. } = region;
            self.findings.note(Difference {
                seq,
                as_id,
                gfn,
                level: 0,
                expected,
                got,
            });
        }
        self.findings.operation(operation, done.is_ok());
        Ok(())
    }

    /// What a change of slots can change.
    fn reach_of_slot(&self, change: &SlotChange) -> Vec<SpaceRange> {
        let (SlotChange::Insert(region)
        | SlotChange::Remove(region)
        | SlotChange::Move(region)
        | SlotChange::Flags(region)) = change;
        let old = self.slots.get(&(region.as_id, region.slot));
        let range = |region: &Region| SpaceRange {
            as_id: region.as_id,
            start: region.gfn,
            end: region.gfn + region.pages,
        };
        old.map(range).into_iter().collect()
    }

    fn invalidate(&mut self, ranges: &[SpaceRange]) -> Result<(), Stop> {
        for range in ranges {
            let gfns = self.gfns(range);
            let mmu = &self.machine()?.mmu;
            let invalidation = mmu.invalidate_begin(space(range.as_id), gfns);
            let flushed = invalidation.zap().flush();
            invalidation.end(flushed);
        }
        Ok(())
    }

    /// All roots become obsolete and are taken down.
    fn invalidate_roots(&mut self) -> Result<(), Stop> {
        let view = self.view(&everything());
        self.machine()?.mmu.invalidate_roots().finish();
        self.enter_removal(&view);
        Ok(())
    }
}

fn slot_of(region: &Region) -> Slot<()> {
    let gfns = Gfn(region.gfn)..Gfn(region.gfn + region.pages);
    Slot::new(gfns, ())
        .in_space(space(region.as_id))
        .with_id(SlotId(region.slot))
        .with_flags(flags_of(region))
}

fn flags_of(region: &Region) -> SlotFlags {
    let mut flags = SlotFlags::empty();
    flags.set(SlotFlags::READ_ONLY, region.read_only);
    flags.set(SlotFlags::LOG_DIRTY, region.log_dirty);
    flags.set(SlotFlags::LOG_MANUAL, region.log_manual);
    flags.set(SlotFlags::LOG_INITIALLY_SET, region.log_initially_set);
    flags
}
