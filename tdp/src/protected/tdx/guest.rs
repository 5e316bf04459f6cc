//! The guest's side: vCPUs that enter and leave, what they accept, what they reach.
//!
//! Protocol of a vCPU. [`enter`](TdVcpu::enter): lock the vCPU's and the TD's root pages shared, for as long as it is
//! inside; check the states; associate; take the epoch's lock shared and count itself in. It must drop every translation
//! first if it is told so. Then the *zero-step* check: a vCPU that left for private addresses that were not there, at one
//! instruction, [`ZERO_STEP_FAULTS`] times over, is suspected of being single-stepped by its host. From then on, until it
//! gets past that instruction, each entry takes the lock of the tree exclusively, and is turned back at once if one of
//! those addresses is still not there. So a host that sends a guest back without having fixed its fault makes its own
//! calls busy.
//!
//! A guest that accepts a page takes the lock of the entry as a guest does, and none of the others.

use super::Td;
use super::calls::Call;
use super::lifecycle::{self, Lifecycle};
use super::locks::{EntryLock, Mode};
use super::pamt::PageKind;
use super::state::{self, EntryState, PageInfo, module_level};
use super::status::{Answer, Operand, Refusal, Status};
use super::td::TdInner;
use alloc::vec::Vec;
use tdp_arch::walker::{EptFault, EptWalker, GuestAccess, Translation, WalkError, Walker};
use tdp_arch::{Gpa, Hpa, Level};
use tdp_rcu::sync::Ordering;

/// Exits for private addresses at one instruction from which on a vCPU's entries take the lock of the tree. The real
/// module remembers addresses only after that many exits, so that there it takes one more; the model is the stricter.
pub const ZERO_STEP_FAULTS: u32 = 6;
/// Addresses that are remembered of those exits.
const ZERO_STEP_ADDRESSES: usize = 32;

/// The guest left because of an EPT violation at a private address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EptExit {
    /// The address.
    pub gpa: Gpa,
    /// Size that the guest asked for: of an ACCEPT its own, else [`Level::L1`].
    pub level: Level,
}

/// What became of an ACCEPT.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Accept {
    /// The guest was answered, and goes on.
    Answered(Answer),
    /// There is nothing to accept: the host has to do something first.
    Exit(EptExit),
}

impl Td {
    /// TDG.MEM.PAGE.ACCEPT by a vCPU that is inside: the pending page of the entry `info`, 4 KiB or 2 MiB, becomes
    /// reachable.
    pub fn page_accept(&self, info: PageInfo) -> Accept {
        let mut exit = None;
        let answer = self.inner.run(Call::GuestPageAccept, [info.raw(), 0], || {
            exit = self.inner.accept(info)?;
            Ok((0, 0))
        });
        exit.map_or(Accept::Answered(answer), Accept::Exit)
    }

    /// What the processor finds at a private address, without TLB. `gpa` is without the bit of shared addresses.
    ///
    /// # Errors
    ///
    /// The processor's fault.
    pub fn translate(
        &self,
        gpa: Gpa,
        access: GuestAccess,
    ) -> Result<Translation, WalkError<EptFault>> {
        let td = &*self.inner;
        td.walker.walk(td.memory(), td.root, gpa, access)
    }

    /// The processor that walks this tree: accessed and dirty flags are off. Together with [`root`](Td::root) and the
    /// module's memory it makes a software vCPU.
    pub fn walker(&self) -> EptWalker {
        self.inner.walker
    }

    /// The root table.
    pub fn root(&self) -> Hpa {
        self.inner.root
    }
}

impl TdInner {
    fn accept(&self, info: PageInfo) -> Result<Option<EptExit>, Refusal> {
        let call = Call::GuestPageAccept;
        let (gpa, level) = self.parse(info, Level::L1..=Level::L2)?;
        let exit = Ok(Some(EptExit { gpa, level }));
        let Some(walked) = self.walk(gpa, level) else {
            return exit;
        };
        let about = |status, level| Err(Refusal::new(status, Operand(module_level(level) as u32)));
        if walked.level != level {
            return if walked.entry.state().is_accessible_leaf() {
                about(Status::PageAlreadyAccepted, walked.level)
            } else {
                exit
            };
        }
        let lock =
            EntryLock::guest(walked.word).map_err(|status| Refusal::new(status, Operand::RCX))?;
        let entry = lock.entry();
        let state = entry.state();
        if state != EntryState::Free && !state.is_leaf() {
            return about(Status::PageSizeMismatch, level);
        }
        if state.is_accessible_leaf() {
            return about(Status::PageAlreadyAccepted, level);
        }
        if !state::admits(call, state) {
            return exit;
        }
        self.inside(call);
        lock.commit(entry.with_state(match state {
            EntryState::PendingExportedDirty => EntryState::ExportedDirty,
            _ => EntryState::Mapped,
        }));
        Ok(None)
    }
}

/// A vCPU is inside.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Entered {
    /// Epoch in which it entered.
    pub epoch: u64,
    /// Whether it must drop every cached translation of the TD before it does anything: the epoch is not that of its
    /// last entry, or it was dissociated in between.
    pub flush: bool,
}

/// What became of an entry.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Enter {
    /// The vCPU is inside.
    Inside(Entered),
    /// It was turned back: an address that it needs is still not there. It is outside.
    Exited(EptExit),
    /// Refused.
    Refused(Answer),
}

/// Why a vCPU leaves.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Exit {
    /// An EPT violation at `gpa`.
    EptViolation {
        /// Faulting address.
        gpa: Gpa,
        /// Address of the instruction.
        rip: u64,
    },
    /// Anything else: an interrupt, a kick.
    Other {
        /// Address of the next instruction.
        rip: u64,
    },
}

/// What speaks for single-stepping.
#[derive(Debug, Default)]
struct ZeroStep {
    rip: u64,
    faults: u32,
    gpas: Vec<Gpa>,
}

impl ZeroStep {
    fn note(&mut self, exit: Exit, is_private: impl FnOnce(Gpa) -> bool) {
        let (Exit::EptViolation { rip, .. } | Exit::Other { rip }) = exit;
        if rip != self.rip {
            self.faults = 0;
            self.gpas.clear();
        }
        let Exit::EptViolation { gpa, .. } = exit else {
            return;
        };
        if !is_private(gpa) {
            return;
        }
        self.faults = self.faults.saturating_add(1);
        if self.faults >= ZERO_STEP_FAULTS
            && self.gpas.len() < ZERO_STEP_ADDRESSES
            && !self.gpas.contains(&gpa)
        {
            self.gpas.push(gpa);
        }
    }
}

/// A vCPU of a TD; one thread at a time has it. Leaves when it is dropped, but stays associated.
#[derive(Debug)]
pub struct TdVcpu {
    td: Td,
    tdvpr: Hpa,
    /// Epoch of the last entry; 0 before the first and after a flush.
    epoch: u64,
    associated: bool,
    inside: bool,
    zero_step: ZeroStep,
}

impl TdVcpu {
    pub(crate) fn new(td: Td, tdvpr: Hpa) -> Self {
        Self {
            td,
            tdvpr,
            epoch: 0,
            associated: false,
            inside: false,
            zero_step: ZeroStep::default(),
        }
    }

    /// Its TD.
    pub const fn td(&self) -> &Td {
        &self.td
    }

    /// Its root page.
    pub const fn tdvpr(&self) -> Hpa {
        self.tdvpr
    }

    /// Whether it is inside.
    pub const fn is_inside(&self) -> bool {
        self.inside
    }

    /// Whether its entries take the lock of the tree: it is suspected of being single-stepped.
    pub fn is_suspected(&self) -> bool {
        !self.zero_step.gpas.is_empty()
    }

    /// TDH.VP.ENTER: enters the guest at the instruction at `rip`.
    pub fn enter(&mut self, rip: u64) -> Enter {
        let td = self.td.clone();
        let mut turned_back = None;
        let mut entered = None;
        let answer = td.inner.run(Call::VpEnter, [self.tdvpr.0, 0], || {
            match self.try_enter(&td.inner, rip)? {
                Ok(inside) => entered = Some(inside),
                Err(exit) => turned_back = Some(exit),
            }
            Ok((0, 0))
        });
        match (entered, turned_back) {
            (Some(inside), _) => Enter::Inside(inside),
            (None, Some(exit)) => Enter::Exited(exit),
            (None, None) => Enter::Refused(answer),
        }
    }

    fn try_enter(&mut self, td: &TdInner, rip: u64) -> Result<Result<Entered, EptExit>, Refusal> {
        let call = Call::VpEnter;
        if self.inside {
            return Err(Refusal::busy(Operand::RCX));
        }
        let own = td
            .memory()
            .lock_page(self.tdvpr, Level::L1, Mode::Shared, PageKind::Tdvpr)
            .map_err(|status| Refusal::new(status, Operand::RCX))?;
        // Found through the vCPU: only the root page's own entry is locked.
        let root = td
            .metadata(td.tdr)?
            .page
            .lock
            .try_lock(Mode::Shared)
            .ok_or(Refusal::busy(Operand::TDR))?;
        td.in_lifecycle(Lifecycle::KeysConfigured)
            .map_err(|_| Refusal::new(Status::TdKeysNotConfigured, Operand::NONE))?;
        let _op_state = td.lock_op_state(Mode::Shared)?;
        if !lifecycle::admits(call, td.op_state()) {
            return Err(Refusal::new(Status::OpStateIncorrect, Operand::NONE));
        }
        if !self.associated {
            self.associated = true;
            td.associated.fetch_add(1, Ordering::Relaxed);
        }
        let epoch = {
            let busy = Refusal::busy(Operand::TD_EPOCH);
            let _lock = td.epochs.lock.try_lock(Mode::Shared).ok_or(busy)?;
            td.inside(call);
            td.epochs.enter().ok_or(busy)?
        };
        self.zero_step.rip = rip;
        let tree = match self.is_suspected() {
            false => None,
            true => match td.tree_lock.try_lock(Mode::Exclusive) {
                None => {
                    td.epochs.exit(epoch);
                    return Err(Refusal::busy(Operand::SEPT_TREE));
                }
                held => held,
            },
        };
        let missing = |gpa: &&Gpa| self.td.translate(**gpa, GuestAccess::Write).is_err();
        if let Some(&gpa) = self.zero_step.gpas.iter().find(missing) {
            td.epochs.exit(epoch);
            let level = Level::L1;
            return Ok(Err(EptExit { gpa, level }));
        }
        drop(tree);
        let flush = self.epoch != epoch;
        self.epoch = epoch;
        self.inside = true;
        // Both stay locked until it leaves. Of its own page the lock is enough, not those of the blocks around it: the
        // page is not free, so that nobody else gets at them.
        own.forget_entry();
        root.forget();
        Ok(Ok(Entered { epoch, flush }))
    }

    /// Leaves the guest. Does nothing if it is not inside.
    pub fn exit(&mut self, why: Exit) {
        if !self.inside {
            return;
        }
        let td = &*self.td.inner;
        self.zero_step.note(why, |gpa| td.is_private(gpa));
        self.leave();
    }

    fn leave(&mut self) {
        self.inside = false;
        let td = &*self.td.inner;
        td.epochs.exit(self.epoch);
        for page in [td.tdr, self.tdvpr] {
            if let Some(data) = td.memory().metadata(page.pfn()) {
                data.page.lock.release(Mode::Shared);
            }
        }
    }

    /// TDH.VP.FLUSH: dissociates the vCPU from its processor, whose cached translations are dropped.
    pub fn flush(&mut self) -> Answer {
        let td = self.td.clone();
        let td = &*td.inner;
        let call = Call::VpFlush;
        td.run(call, [self.tdvpr.0, 0], || {
            let _own = td
                .memory()
                .lock_page(self.tdvpr, Level::L1, Mode::Exclusive, PageKind::Tdvpr)
                .map_err(|status| Refusal::new(status, Operand::RCX))?;
            let _root = td
                .metadata(td.tdr)?
                .page
                .lock
                .try_lock(Mode::Shared)
                .ok_or(Refusal::busy(Operand::TDR))?;
            if !self.associated {
                return Err(Refusal::new(Status::VcpuNotAssociated, Operand::NONE));
            }
            td.inside(call);
            self.associated = false;
            self.epoch = 0;
            td.associated.fetch_sub(1, Ordering::Relaxed);
            Ok((0, 0))
        })
    }
}

impl Drop for TdVcpu {
    fn drop(&mut self) {
        if self.inside {
            self.leave();
        }
    }
}
