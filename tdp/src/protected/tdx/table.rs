//! The hook to a TD: [`ProtectedTable`] in terms of the module's calls.
//!
//! Protocol. Each method is one call (adding a page with content may measure it by more). What the module answers is
//! translated: a lock that is held is *busy*, with its scope told by the operand; tracking that is not done is *not
//! drained*; a block that is there already is a success; everything else is *refused*, with the status as its code.
//!
//! A ticket is TRACK, then a kick of every vCPU that is inside since before, through the component that tracks them
//! ([`TlbTracker`]); it has drained when all of those have left. The module checks the same by its own epochs, and answers
//! *not done* if it is asked too early.

use super::calls::Call;
use super::sept::EntryView;
use super::state::PageInfo;
use super::status::{Answer, Operand, Status};
use super::{EntryState, Td};
use crate::frozen::{EntryPlace, FrozenEntry};
use crate::host::OutOfFrames;
use crate::protected::{
    Capabilities, Content, Drained, Failure, Inspected, ProtectedTable, Scope, Ticket,
};
use crate::tlb::TlbTracker;
use alloc::vec::Vec;
use core::ops::Range;
use tdp_arch::{Gpa, Level, PAGE_SIZE, Pfn};
use tdp_rcu::sync::{Mutex, Pause};

/// Bytes that one MR.EXTEND measures.
const CHUNK: u64 = 256;

/// The protected table of a TD.
#[derive(Debug)]
pub struct TdxTable {
    td: Td,
    tlb: TlbTracker,
    measure: bool,
    twins: Mutex<Twins>,
}

/// Pages of the module's memory that are kept for tables.
#[derive(Debug)]
struct Twins {
    fresh: Range<Pfn>,
    recycled: Vec<Pfn>,
    limit: usize,
}

impl TdxTable {
    /// The table of `td`, whose vCPUs are tracked by `tlb`. Tables are made of the pages `twins`, which must be free and
    /// managed by the module.
    pub fn new(td: Td, tlb: TlbTracker, twins: Range<Pfn>) -> Self {
        let limit = usize::try_from(twins.end.0.saturating_sub(twins.start.0)).unwrap_or(0);
        Self {
            td,
            tlb,
            measure: false,
            twins: Mutex::new(Twins {
                fresh: twins,
                recycled: Vec::new(),
                limit,
            }),
        }
    }

    /// Has the content of the image measured too, not its addresses only: 16 calls a page.
    #[must_use]
    pub fn measuring_content(mut self) -> Self {
        self.measure = true;
        self
    }

    /// The TD.
    pub fn td(&self) -> &Td {
        &self.td
    }

    /// Twins that are with the TD or in a vCPU's cache.
    pub fn twins_out(&self) -> usize {
        let twins = self.twins.lock();
        let fresh = usize::try_from(twins.fresh.end.0 - twins.fresh.start.0).unwrap_or(0);
        twins.limit - fresh - twins.recycled.len()
    }

    fn info(entry: &FrozenEntry<'_>) -> PageInfo {
        let place = entry.place();
        PageInfo::new(place.gfn.address(), place.level)
    }
}

fn scope(operand: Operand) -> Scope {
    match operand {
        Operand::SEPT_TREE => Scope::Tree,
        Operand::TD_EPOCH => Scope::Epoch,
        Operand::R8 => Scope::PhysNeighbour,
        Operand::RCX => Scope::Entry,
        _ => Scope::Vm,
    }
}

fn done(answer: Answer) -> Result<(), Failure> {
    Err(match answer.status {
        Status::Success => return Ok(()),
        Status::OperandBusy | Status::OperandBusyHostPriority => Failure::Busy {
            scope: scope(answer.operand),
        },
        Status::PreviousTlbEpochBusy => Failure::Busy {
            scope: Scope::Epoch,
        },
        Status::InterruptedRestartable => Failure::Restart,
        Status::TlbTrackingNotDone => Failure::NotDrained,
        status => Failure::Refused(status as u64),
    })
}

/// Makes a call until it is no longer busy, for a bounded time. The page that was added is measured already and cannot be
/// added again, and one that is not measured to the end cannot stay: neither may be left to who makes the whole again.
fn persist(call: impl Fn() -> Result<(), Failure>) -> Result<(), Failure> {
    let mut pause = Pause::new();
    loop {
        match call() {
            Err(Failure::Busy { .. } | Failure::Restart) if !pause.is_over() => pause.wait(),
            // Not "again": the page would be added, and measured, twice.
            Err(Failure::Busy { .. } | Failure::Restart) => {
                return Err(Failure::Refused(Status::OperandBusy as u64));
            }
            done => return done,
        }
    }
}

impl ProtectedTable for TdxTable {
    fn capabilities(&self) -> Capabilities {
        Capabilities::none()
            .needs_link()
            .needs_block()
            .serialises_block()
            .split_live()
            .merge()
            .leaves(Level::L1, Level::L2)
    }

    fn allocate_twins(&self, out: &mut [Pfn]) -> Result<usize, OutOfFrames> {
        let mut twins = self.twins.lock();
        let mut count = 0;
        for slot in out.iter_mut() {
            *slot = match twins.recycled.pop() {
                Some(pfn) => pfn,
                None if twins.fresh.start < twins.fresh.end => {
                    let pfn = twins.fresh.start;
                    twins.fresh.start = Pfn(pfn.0 + 1);
                    pfn
                }
                None => break,
            };
            count += 1;
        }
        if count == 0 {
            return Err(OutOfFrames { limit: twins.limit });
        }
        Ok(count)
    }

    fn free_twins(&self, twins: &[Pfn]) {
        self.twins.lock().recycled.extend_from_slice(twins);
    }

    fn kick(&self) {
        self.tlb.begin(|_| {});
    }

    fn link(&self, entry: &FrozenEntry<'_>, twin: Pfn) -> Result<(), Failure> {
        done(self.td.mem_sept_add(Self::info(entry), twin.address()))
    }

    fn install(&self, entry: &FrozenEntry<'_>, page: Pfn, content: Content) -> Result<(), Failure> {
        let info = Self::info(entry);
        match content {
            Content::Pending => done(self.td.mem_page_aug(info, page.address())),
            Content::Measured { source } => {
                done(self.td.mem_page_add(info, page.address(), source.address()))?;
                let gpa = entry.place().gfn.address();
                let chunks = if self.measure { PAGE_SIZE / CHUNK } else { 0 };
                for n in 0..chunks {
                    let chunk = Gpa(gpa.0 + n * CHUNK);
                    if let Err(failure) = persist(|| done(self.td.mr_extend(chunk))) {
                        // Not finalised: it goes without block and ticket.
                        let _ = persist(|| done(self.td.mem_page_remove(info)));
                        return Err(failure);
                    }
                }
                Ok(())
            }
            // Pages of a TD are zeroed when the guest accepts them, never before.
            Content::Zero => Err(Failure::Refused(Status::OperandInvalid as u64)),
        }
    }

    fn block(&self, entry: &FrozenEntry<'_>) -> Result<(), Failure> {
        match self.td.mem_range_block(Self::info(entry)) {
            answer if answer.status == Status::GpaRangeAlreadyBlocked => Ok(()),
            answer => done(answer),
        }
    }

    fn flush_begin(&self) -> Result<Ticket, Failure> {
        done(self.td.mem_track())?;
        Ok(Ticket::new(self.tlb.begin(|_| {})))
    }

    fn flush_poll(&self, ticket: Ticket) -> Result<Drained, Ticket> {
        if self.tlb.is_drained(ticket.number()) {
            Ok(ticket.drained())
        } else {
            Err(ticket)
        }
    }

    fn unblock(&self, entry: &FrozenEntry<'_>, _: &Drained) -> Result<(), Failure> {
        done(self.td.mem_range_unblock(Self::info(entry)))
    }

    fn remove(&self, entry: &FrozenEntry<'_>, _: &Drained) -> Result<(), Failure> {
        done(self.td.mem_page_remove(Self::info(entry)))
    }

    fn unlink(&self, entry: &FrozenEntry<'_>, _: &Drained) -> Result<(), Failure> {
        done(self.td.mem_sept_remove(Self::info(entry)))
    }

    fn split(&self, entry: &FrozenEntry<'_>, twin: Pfn, _: &Drained) -> Result<(), Failure> {
        done(self.td.mem_page_demote(Self::info(entry), twin.address()))
    }

    fn merge(&self, entry: &FrozenEntry<'_>, _: &Drained) -> Result<(), Failure> {
        done(self.td.mem_page_promote(Self::info(entry)))
    }

    fn finalise(&self) -> Result<(), Failure> {
        done(self.td.mr_finalize())
    }

    fn reclaim(&self, page: Pfn, _: Level) -> Result<(), Failure> {
        done(self.td.phymem_page_reclaim(page.address()))
    }

    fn inspect(&self, place: EntryPlace) -> Inspected {
        let Some(EntryView { state, page, .. }) = self.td.entry(place.gfn.address(), place.level)
        else {
            return Inspected::Unreachable;
        };
        let blocked = state.is_blocked();
        match page {
            Some(_) if state.is_table() => Inspected::Table { blocked },
            Some(page) => Inspected::Leaf {
                pfn: page.pfn(),
                pending: matches!(state, EntryState::Pending | EntryState::PendingBlocked),
                blocked,
            },
            None => Inspected::Free,
        }
    }
}

/// Which call of the module a step of a hand-off makes: to read its counters.
impl Call {
    /// The call behind `step` at run time.
    pub const fn of_step(step: crate::protected::HandOffStep) -> Self {
        use crate::protected::HandOffStep as Step;
        match step {
            Step::Link => Call::MemSeptAdd,
            Step::Install => Call::MemPageAug,
            Step::Block => Call::MemRangeBlock,
            Step::Flush => Call::MemTrack,
            Step::Unblock => Call::MemRangeUnblock,
            Step::Remove => Call::MemPageRemove,
            Step::Unlink => Call::MemSeptRemove,
            Step::Split => Call::MemPageDemote,
            Step::Merge => Call::MemPagePromote,
            Step::Reclaim => Call::PhymemPageReclaim,
        }
    }
}
