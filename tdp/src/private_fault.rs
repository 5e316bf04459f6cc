//! Faults of a confidential guest: which half, and the whole of a private fault.
//!
//! Protocol. The address, or the fault itself, says whether the access was to private memory; the attributes say what the
//! frame is. A fault on the other half than the attributes say is the embedder's. On its own half it is resolved in the
//! shared tree as any guest's is, or in the private tree by a hand-off (`handoff.rs`). There are the same three ways through as
//! for any fault (`resolve.rs`). The straight one does not ask for the attribute: with a private table the memo remembers that
//! all frames below are private.
//!
//! A private fault that has to wait, for a frozen entry, an invalidation or a busy module, leaves its critical section and
//! waits outside, at first for a bounded time (INV: progress). Then the guest is entered again, which gives it its
//! interrupts; but a trusted module takes a guest that comes back for the same address too often for one that is being
//! single-stepped, and makes everything slow (TDX at six times). So after [`MAX_SENT_BACK`] times the wait goes on here.

use crate::attributes::Visibility;
use crate::confidential::{Confidential, Phase};
use crate::entry::EntryRef;
use crate::fault::{Fault, FaultError, MemoryFault, Outcome, RetryReason};
use crate::handoff::{PrivateRequest, Step};
use crate::host::{Host, Lookup, OutOfFrames};
use crate::protected::{Content, HandOffCause, ProtectedTable};
use crate::resolve::Fast;
use crate::slots::{Slot, SlotFlags};
use crate::stats::{Stat, Tally};
use crate::vcpu::{Batch, Vcpu, VcpuCore};
use alloc::sync::Arc;
use tdp_arch::{Access, Format, Gfn, Gpa, Level, Pfn};
use tdp_rcu::Section;
use tdp_rcu::sync::Pause;

/// Times in a row that a guest is sent back to one private address unresolved.
const MAX_SENT_BACK: u32 = 3;
/// Twins that one fault may need: one for each table below the root.
const TWINS_PER_FAULT: usize = 4;
/// Twins asked for at a time.
const TWINS_TOP_UP: usize = 16;

/// What one critical section of a private fault came to.
enum Attempt<B> {
    Step(Step),
    /// The look-up has to sleep, outside. Holds the slot and the invalidation sequence before it.
    Sleep(Arc<Slot<B>>, u64),
}

/// What the straight path of a private fault came to.
enum Straight {
    /// This is to be told to the guest.
    Told(Outcome),
    /// There is more to it. Nothing was changed.
    NotTaken,
    /// Another was at the entry first, or the module is too busy. Nothing was changed in the end.
    InVain,
}

/// Who wants private memory mapped.
#[derive(Clone, Copy)]
pub(crate) enum Origin {
    /// The guest waits for it.
    Guest,
    /// Nobody waits for it yet.
    Prefault,
    /// The image of a guest that is being built: this page, with this content.
    Image(Lookup, Content),
}

/// What a sleeping look-up found, for which slot, and the invalidation sequence before it.
struct Slept<'a, B> {
    slot: &'a Arc<Slot<B>>,
    sequence: u64,
    lookup: Lookup,
}

impl<F: Format, H: Host> Vcpu<F, H> {
    /// A fault of a guest that has a private half. Takes what fits registers.
    #[inline(never)]
    pub(crate) fn fault_confidential(
        &mut self,
        gpa: Gpa,
        access: Access,
        max_level: Level,
        prefetch: bool,
        private: bool,
    ) -> Result<Outcome, FaultError> {
        let Some((gfn, private)) = self.core.route(gpa, private) else {
            return Ok(self.core.ctx.memory_fault(MemoryFault::BeyondWidth));
        };
        if private {
            let section = self.reader.enter();
            let straight = self.core.private_straight(&section, gfn, max_level);
            drop(section);
            return match straight {
                Straight::Told(outcome) => Ok(outcome),
                Straight::NotTaken => self.fault_private(gfn, max_level, Origin::Guest),
                Straight::InVain => self.fault_private_slow(gfn, max_level, Origin::Guest),
            };
        }
        self.fault_shared(Fault {
            gpa: gfn.address(),
            access,
            max_level,
            prefetch,
            private,
        })
    }

    /// A fault on the shared half, at the address without its shared bit.
    fn fault_shared(&mut self, fault: Fault) -> Result<Outcome, FaultError> {
        let section = self.reader.enter();
        let fast = self.core.shared_fast(&section, fault.gpa.gfn(), &fault);
        drop(section);
        match fast {
            Fast::Fixed(level) => Ok(Outcome::Fixed { level }),
            Fast::Spurious => Ok(Outcome::Spurious),
            Fast::GaveUp => self.fault_slow(fault),
        }
    }

    /// Resolves a private fault, or what is to be treated as one.
    pub(crate) fn fault_private(
        &mut self,
        gfn: Gfn,
        at_most: Level,
        origin: Origin,
    ) -> Result<Outcome, FaultError> {
        if !matches!(origin, Origin::Image(..)) {
            let section = self.reader.enter();
            let fast = self.core.private_fast(&section, gfn, at_most);
            drop(section);
            if let Some(outcome) = fast {
                return Ok(outcome);
            }
        }
        self.fault_private_slow(gfn, at_most, origin)
    }

    #[cold]
    #[inline(never)]
    fn fault_private_slow(
        &mut self,
        gfn: Gfn,
        at_most: Level,
        origin: Origin,
    ) -> Result<Outcome, FaultError> {
        let content = match origin {
            Origin::Image(lookup, content) => Some((lookup, content)),
            Origin::Guest | Origin::Prefault => None,
        };
        let mut pause = Pause::new();
        loop {
            self.core.top_up(true)?;
            self.core.top_up_twins()?;
            let section = self.reader.enter();
            let mut attempt = self
                .core
                .resolve_private(&section, gfn, at_most, content, None);
            drop(section);
            if let Attempt::Sleep(slot, sequence) = attempt {
                let host = self.core.ctx.shared.host.clone();
                let lookup = host.lookup_private_blocking(&slot, gfn);
                let section = self.reader.enter();
                let slept = Some(Slept {
                    slot: &slot,
                    sequence,
                    lookup,
                });
                attempt = self
                    .core
                    .resolve_private(&section, gfn, at_most, content, slept);
            }
            let Attempt::Step(step) = attempt else {
                return Ok(self.core.ctx.retry(RetryReason::Backing));
            };
            // Whether a sweep has already waited as long as this fault may.
            let mut waited = false;
            let reason = match step {
                Step::Done(outcome) => {
                    self.core.sent_back.resolved(gfn);
                    return Ok(outcome);
                }
                Step::Failed(error) => return Ok(self.core.ctx.refused(error)),
                Step::Unblock => {
                    let as_id = self.core.ctx.as_id;
                    match self.core.ctx.shared.unblock_private(as_id, gfn) {
                        // The way is free: nothing to wait for.
                        Ok(()) => continue,
                        Err(error) => match error.cause {
                            HandOffCause::Busy => {
                                waited = true;
                                RetryReason::Frozen
                            }
                            _ => return Ok(self.core.ctx.refused(error)),
                        },
                    }
                }
                Step::Split => {
                    let as_id = self.core.ctx.as_id;
                    match self.core.ctx.shared.split_private(as_id, gfn, at_most) {
                        Ok(()) => {
                            // The guest goes on accepting by small leaves: nobody folds these while it does.
                            self.core.inhibit_huge(gfn);
                            RetryReason::Raced
                        }
                        Err(error) => match error.cause {
                            HandOffCause::Busy => {
                                waited = true;
                                RetryReason::Frozen
                            }
                            HandOffCause::OutOfFrames => return Err(FaultError::OutOfFrames),
                            _ => return Ok(self.core.ctx.refused(error)),
                        },
                    }
                }
                Step::Wait(reason) => reason,
            };
            let may_end = |core: &mut VcpuCore<F, H>| match origin {
                Origin::Guest => core.may_send_back(gfn),
                Origin::Prefault | Origin::Image(..) => true,
            };
            if waited || pause.is_over() {
                if may_end(&mut self.core) {
                    return Ok(self.core.ctx.retry(reason));
                }
                // A module that is busy with vCPUs in the guest is waited for without end else.
                self.core.ctx.shared.host.protected().kick();
                pause = Pause::new();
            }
            pause.wait();
        }
    }
}

impl<F: Format, H: Host> Batch<'_, F, H> {
    /// As [`Vcpu::fault_confidential`], without leaving the critical section: what would have to wait is retried.
    pub(crate) fn fault_confidential(&mut self, fault: Fault) -> Result<Outcome, FaultError> {
        let (section, core) = (&self.section, &mut *self.core);
        let Some((gfn, private)) = core.route(fault.gpa, fault.private) else {
            return Ok(core.ctx.memory_fault(MemoryFault::BeyondWidth));
        };
        if !private {
            let fast = core.shared_fast(section, gfn, &fault);
            return match fast {
                Fast::Fixed(level) => Ok(Outcome::Fixed { level }),
                Fast::Spurious => Ok(Outcome::Spurious),
                Fast::GaveUp => self.fault_slow(Fault {
                    gpa: gfn.address(),
                    ..fault
                }),
            };
        }
        let quick = match core.private_straight(section, gfn, fault.max_level) {
            Straight::Told(outcome) => Some(outcome),
            Straight::NotTaken => core.private_fast(section, gfn, fault.max_level),
            Straight::InVain => None,
        };
        if let Some(outcome) = quick {
            return Ok(outcome);
        }
        self.top_up()?;
        let (section, core) = (&self.section, &mut *self.core);
        core.top_up_twins()?;
        Ok(
            match core.resolve_private(section, gfn, fault.max_level, None, None) {
                Attempt::Step(Step::Done(outcome)) => outcome,
                Attempt::Step(Step::Failed(error)) => core.ctx.refused(error),
                Attempt::Step(Step::Wait(reason)) => core.ctx.retry(reason),
                // Both wait for a ticket, which a batch does not.
                Attempt::Step(Step::Split | Step::Unblock) => core.ctx.retry(RetryReason::Frozen),
                Attempt::Sleep(..) => core.ctx.retry(RetryReason::Backing),
            },
        )
    }
}

impl<F: Format, H: Host> VcpuCore<F, H> {
    fn confidential(&self) -> Option<&Confidential> {
        self.ctx.shared.confidential.as_deref()
    }

    fn inhibit_huge(&self, gfn: Gfn) {
        if let Some(confidential) = self.confidential() {
            confidential.attributes.inhibit_huge(gfn);
        }
    }

    /// Frame and half of a fault; `None` for an address that is too wide.
    #[inline(always)]
    fn route(&self, gpa: Gpa, private: bool) -> Option<(Gfn, bool)> {
        let (gfn, private) = self.confidential()?.route(gpa, private);
        (gfn < self.ctx.root.limit()).then_some((gfn, private))
    }

    /// The fast path of a fault on the shared half.
    #[inline(always)]
    fn shared_fast(&mut self, section: &Section<'_>, gfn: Gfn, fault: &Fault) -> Fast {
        // INV: no-stale-install. Before the attribute: a conversion that comes after this waits for the section, and one that
        // came before either is seen or has told what the frame is now.
        if !self.remembers(section) {
            return Fast::GaveUp;
        }
        match self.confidential() {
            Some(confidential) if confidential.attributes.get(gfn) == Visibility::Shared => {}
            _ => return Fast::GaveUp,
        }
        self.fault_fast(section, gfn, fault.access, fault.max_level, fault.prefetch)
    }

    /// The straight path of a private fault: on an empty entry of level 1, with all that it needs in the memo.
    #[inline(always)]
    fn private_straight(&mut self, section: &Section<'_>, gfn: Gfn, at_most: Level) -> Straight {
        let Some((entry, pfn)) = self.private_wish(section, gfn, at_most) else {
            return Straight::NotTaken;
        };
        let step = self.ctx.hand_over_leaf(entry, gfn, pfn, Level::L1);
        match step.and_then(|step| self.told(gfn, step)) {
            Some(outcome) => Straight::Told(outcome),
            None => Straight::InVain,
        }
    }

    /// The empty entry of level 1 for a private page, and the host frame that is to go there, if the memo has all that it takes
    /// to tell.
    #[inline(always)]
    fn private_wish<'s>(
        &self,
        section: &'s Section<'_>,
        gfn: Gfn,
        at_most: Level,
    ) -> Option<(EntryRef<'s>, Pfn)> {
        // INV: no-stale-install: a conversion or a change of slots since would have moved the stamp, and waits for this section.
        let memo = self.memo.current(section)?;
        let table = memo.private(&self.tables, gfn)?;
        if self.confidential()?.phase() != Phase::Running {
            return None;
        }
        // Looked at before the host is asked; what is in the way is nobody's business here.
        let entry = table
            .get(Level::L1.index(gfn))
            .filter(|entry| entry.load() == F::EMPTY)?;
        let slot = memo.plain_slot(gfn)?;
        let ctx = &self.ctx;
        let Lookup::Mapped(mapping) = ctx.host.lookup_private(slot, gfn) else {
            return None;
        };
        let goal = mapping.level.min(at_most).min(ctx.capabilities.leaf_levels);
        (goal == Level::L1 && mapping.pfn < ctx.shared.pfn_limit).then_some((entry, mapping.pfn))
    }

    /// What the guest is told of a step; `None` if the step has to be waited for.
    #[inline(always)]
    fn told(&mut self, gfn: Gfn, step: Step) -> Option<Outcome> {
        match step {
            Step::Done(outcome) => {
                self.ctx.count(outcome);
                self.sent_back.resolved(gfn);
                Some(outcome)
            }
            Step::Failed(error) => Some(self.ctx.refused(error)),
            Step::Wait(_) | Step::Split | Step::Unblock => None,
        }
    }

    /// The fast path of a private fault: `None` if it gave up, having changed nothing, or if a call of the module was in vain.
    #[inline(always)]
    fn private_fast(&mut self, section: &Section<'_>, gfn: Gfn, at_most: Level) -> Option<Outcome> {
        if !self.remembers(section) {
            return None;
        }
        let confidential = self.ctx.shared.confidential.as_deref()?;
        if confidential.phase() != Phase::Running
            || confidential.attributes.get(gfn) != Visibility::Private
        {
            return None;
        }
        let slot = self.slot(section, gfn)?;
        if !slot.is_plain() {
            return None;
        }
        let Lookup::Mapped(mapping) = self.ctx.shared.host.lookup_private(slot, gfn) else {
            return None;
        };
        if mapping.pfn >= self.ctx.shared.pfn_limit {
            return None;
        }
        let ctx = &self.ctx;
        let root = ctx.private_root.as_deref()?;
        let mut goal = mapping.level.min(at_most).min(ctx.capabilities.leaf_levels);
        if goal > Level::L1 {
            // Nothing is under invalidation, and whatever comes to be waits for this section.
            goal = ctx.aligned(gfn, mapping.pfn, slot.level_at(gfn, goal));
            goal = ctx.uniform_level(gfn, goal);
        }
        // INV: parent-before-child: a table that is blocked is entered as well, but its entries are sealed (`range/blocked.rs`).
        let step = if goal == Level::L1 {
            let table = ctx.table_of(root, gfn, Level::L1)?;
            let confidential = self.confidential();
            if confidential.is_some_and(|it| it.attributes.uniform(gfn, Level::L2)) {
                self.tables.note_private(gfn, table);
            }
            ctx.install_private_fast(table.1, gfn, mapping.pfn, Level::L1)?
        } else {
            let (_, table) = ctx.table_of(root, gfn, goal)?;
            ctx.install_private_fast(table, gfn, mapping.pfn, goal)?
        };
        self.told(gfn, step)
    }

    fn resolve_private(
        &mut self,
        section: &Section<'_>,
        gfn: Gfn,
        at_most: Level,
        content: Option<(Lookup, Content)>,
        slept: Option<Slept<'_, H::Backing>>,
    ) -> Attempt<H::Backing> {
        let done = |outcome| Attempt::Step(Step::Done(outcome));
        let wait = |reason| Attempt::Step(Step::Wait(reason));
        let Some(phase) = self.confidential().map(Confidential::phase) else {
            return done(self.ctx.memory_fault(MemoryFault::IsShared));
        };
        match (phase, content.is_some()) {
            (Phase::Running, false) | (Phase::Building, true) => {}
            (Phase::Building, false) => {
                return done(self.ctx.memory_fault(MemoryFault::NotFinalised));
            }
            (Phase::Lost, _) => return done(self.ctx.memory_fault(MemoryFault::Refused)),
            (Phase::Running | Phase::Dead, _) => {
                return done(self.ctx.memory_fault(MemoryFault::NotBacked));
            }
        }
        // INV: no-stale-install: one look, before the attributes and the look-up.
        let invalidated = self.ctx.shared.invalidations.now(section);
        if self.ctx.is_among(invalidated, gfn, Level::L1) {
            return wait(RetryReason::Invalidation);
        }
        if !self.ctx.is_private(gfn) {
            return done(self.ctx.memory_fault(MemoryFault::IsShared));
        }
        let snapshot = self.ctx.shared.slots.snapshot(section);
        let Some(slot) = self.find_slot(snapshot, gfn) else {
            return done(self.ctx.memory_fault(MemoryFault::NotBacked));
        };
        if slot.changing {
            return wait(RetryReason::SlotChanging);
        }
        if slot.flags().contains(SlotFlags::READ_ONLY) {
            return done(self.ctx.memory_fault(MemoryFault::NotPermitted));
        }
        let lookup = match (slept, content) {
            (Some(slept), _) => {
                if !Arc::ptr_eq(slot, slept.slot) {
                    return wait(RetryReason::SlotChanging);
                }
                if self.ctx.shared.invalidations.sequence() != slept.sequence {
                    return wait(RetryReason::Invalidation);
                }
                match slept.lookup {
                    Lookup::Blocking => Lookup::Retry,
                    lookup => lookup,
                }
            }
            (None, Some((lookup, _))) => lookup,
            (None, None) => self.ctx.shared.host.lookup_private(slot, gfn),
        };
        let mapping = match lookup {
            Lookup::Mapped(mapping) => mapping,
            Lookup::Blocking => {
                return Attempt::Sleep(slot.clone(), self.ctx.shared.invalidations.sequence());
            }
            Lookup::Retry => return wait(RetryReason::Backing),
            Lookup::Failed => return done(self.ctx.memory_fault(MemoryFault::NotBacked)),
        };
        if mapping.pfn >= self.ctx.shared.pfn_limit {
            return done(self.ctx.memory_fault(MemoryFault::NotBacked));
        }
        let largest = self
            .confidential()
            .map_or(Level::L1, Confidential::leaf_limit);
        let limit = at_most.min(mapping.level).min(largest);
        let mut goal = self
            .ctx
            .aligned(gfn, mapping.pfn, slot.level_at(gfn, limit));
        goal = self.ctx.uniform_level(gfn, goal);
        while goal > Level::L1 && self.ctx.is_among(invalidated, gfn, goal) {
            goal = goal.below_or_leaf();
        }
        let request = PrivateRequest {
            gfn,
            goal,
            at_most,
            pfn: mapping.pfn,
            content: content.map_or(Content::Pending, |(_, content)| content),
        };
        let Some(root) = self.ctx.private_root.as_deref() else {
            return done(self.ctx.memory_fault(MemoryFault::IsShared));
        };
        let step = self
            .ctx
            .install_private(root, &mut self.cache, &mut self.twins, request);
        if let Step::Done(outcome) = &step {
            self.ctx.count(*outcome);
        }
        Attempt::Step(step)
    }

    /// Makes sure that one fault finds enough twins.
    fn top_up_twins(&mut self) -> Result<(), FaultError> {
        if !self.ctx.capabilities.needs_link {
            return Ok(());
        }
        while self.twins.len() < TWINS_PER_FAULT {
            let table = self.ctx.shared.host.protected();
            let room = self.twins.room(TWINS_TOP_UP);
            let most = room.len();
            match table.allocate_twins(room) {
                Ok(count) if count > 0 => {
                    // No more than was asked for, whatever the host says: the rest of the room holds twins of before.
                    self.twins.grown(count.min(most));
                }
                Ok(_) => return Err(OutOfFrames { limit: 0 }.into()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Whether the guest may be entered once more with its fault at `gfn` unresolved. Counts it.
    fn may_send_back(&mut self, gfn: Gfn) -> bool {
        let may = self.sent_back.may(gfn);
        self.ctx.add(Stat::SentBack, i64::from(may));
        may
    }
}

/// Private frames whose faults were last sent back to the guest unresolved, and how often since they were last resolved.
/// One instruction can touch several pages, and a module counts by instruction: it is no help that the guest comes back for
/// another address in between.
#[derive(Debug, Default)]
pub(crate) struct SentBack {
    frames: [Option<(Gfn, u32)>; SentBack::FRAMES],
    /// Forgotten next.
    next: usize,
    /// Whether there may be any.
    any: bool,
}

impl SentBack {
    /// Pages that one instruction can touch: its own, its source and its destination, each across a boundary; and to spare.
    const FRAMES: usize = 8;

    fn may(&mut self, gfn: Gfn) -> bool {
        if let Some((_, times)) = self.frames.iter_mut().flatten().find(|it| it.0 == gfn) {
            let may = *times < MAX_SENT_BACK;
            *times += u32::from(may);
            return may;
        }
        self.any = true;
        let free = self.frames.iter().position(Option::is_none);
        let at = free.unwrap_or(self.next);
        self.frames[at] = Some((gfn, 1));
        self.next = (at + 1) % Self::FRAMES;
        true
    }

    #[inline(always)]
    fn resolved(&mut self, gfn: Gfn) {
        if self.any {
            self.forget(gfn);
        }
    }

    #[cold]
    fn forget(&mut self, gfn: Gfn) {
        for frame in &mut self.frames {
            if frame.is_some_and(|it| it.0 == gfn) {
                *frame = None;
            }
        }
        self.any = self.frames.iter().any(Option::is_some);
    }
}
