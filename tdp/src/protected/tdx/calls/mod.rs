//! The calls, and what all of them share.
//!
//! Protocol of a call, in this order; the first check that fails is the answer, and nothing has changed:
//!
//! 1. the TD's root page: type, lock (shared; exclusive while the TD is built or torn down);
//! 2. life cycle: the key is configured;
//! 3. operational state: lock shared (not under an exclusive root page), then whether it admits the call;
//! 4. operands: level and GPA;
//! 5. lock of the tree, then the walk;
//! 6. lock of the entry, its state, tracking, then the page that is given or taken.
//!
//! Then the body's time is spent and the change is made in an order in which a processor that walks at any moment meets
//! only whole tables. Locks are released in the opposite order.

mod build;
mod huge;
mod page;
mod range;
mod sept;
mod teardown;

use super::epoch::Tracking;
use super::lifecycle::{self, Lifecycle};
use super::locks::{EntryLock, Held, Mode};
use super::memory::Metadata;
use super::pamt::{PageKind, PageLock, PamtEntry};
use super::state::{self, Entry, PageInfo};
use super::status::{Answer, Done, Operand, Refusal, Status};
use super::td::TdInner;
use core::fmt;
use core::ops::RangeInclusive;
use tdp_arch::{Gpa, Hpa, Level};

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// A call of the module.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum Call {
            $($(#[$doc])* $name,)*
        }

        impl Call {
            /// Every call.
            pub const ALL: [Call; [$($text),*].len()] = [$(Call::$name),*];
            /// How many there are.
            pub const COUNT: usize = Self::ALL.len();

            /// Its name in the ABI.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Call::$name => $text,)*
                }
            }
        }
    };
}

calls! {
    /// Begins to build it.
    MngInit = "TDH.MNG.INIT",
    /// Makes a vCPU.
    VpCreate = "TDH.VP.CREATE",
    /// Adds a table.
    MemSeptAdd = "TDH.MEM.SEPT.ADD",
    /// Removes a table.
    MemSeptRemove = "TDH.MEM.SEPT.REMOVE",
    /// Reads an entry.
    MemSeptRd = "TDH.MEM.SEPT.RD",
    /// Adds a page with content while the TD is built.
    MemPageAdd = "TDH.MEM.PAGE.ADD",
    /// Adds a page that the guest must accept.
    MemPageAug = "TDH.MEM.PAGE.AUG",
    /// Removes a page.
    MemPageRemove = "TDH.MEM.PAGE.REMOVE",
    /// Splits a large page.
    MemPageDemote = "TDH.MEM.PAGE.DEMOTE",
    /// Merges a table into a large page.
    MemPagePromote = "TDH.MEM.PAGE.PROMOTE",
    /// Blocks an entry: no new translation goes through it.
    MemRangeBlock = "TDH.MEM.RANGE.BLOCK",
    /// Takes the block back.
    MemRangeUnblock = "TDH.MEM.RANGE.UNBLOCK",
    /// Advances the TLB-tracking epoch.
    MemTrack = "TDH.MEM.TRACK",
    /// Measures 256 bytes of a page.
    MrExtend = "TDH.MR.EXTEND",
    /// Ends the building: the TD can run.
    MrFinalize = "TDH.MR.FINALIZE",
    /// Enters the guest.
    VpEnter = "TDH.VP.ENTER",
    /// Dissociates a vCPU from its processor.
    VpFlush = "TDH.VP.FLUSH",
    /// Ends the use of the key by vCPUs.
    MngVpFlushDone = "TDH.MNG.VPFLUSHDONE",
    /// Writes caches back.
    PhymemCacheWb = "TDH.PHYMEM.CACHE.WB",
    /// Gives the key up.
    MngKeyFreeId = "TDH.MNG.KEY.FREEID",
    /// Takes any page of a dead TD back.
    PhymemPageReclaim = "TDH.PHYMEM.PAGE.RECLAIM",
    /// Stands for the export and import calls that change the operational state.
    Migrate = "TDH.EXPORT/IMPORT",
    /// The guest accepts a pending page.
    GuestPageAccept = "TDG.MEM.PAGE.ACCEPT",
}

impl Call {
    pub(crate) const fn index(self) -> usize {
        self as usize
    }

    /// Whether the host makes it.
    pub const fn is_of_host(self) -> bool {
        !matches!(self, Call::GuestPageAccept)
    }

    /// Whether RCX and RDX hold something of the call's own afterwards.
    const fn writes_registers(self) -> bool {
        matches!(
            self,
            Call::MemSeptAdd
                | Call::MemSeptRemove
                | Call::MemSeptRd
                | Call::MemPageAdd
                | Call::MemPageAug
                | Call::MemPageRemove
                | Call::MemPageDemote
                | Call::MemPagePromote
                | Call::MemRangeBlock
                | Call::MemRangeUnblock
                | Call::MrExtend
                | Call::PhymemPageReclaim
        )
    }

    /// The register that names the TD.
    const fn td_operand(self) -> Operand {
        if self.writes_registers() || matches!(self, Call::VpCreate) {
            Operand::RDX
        } else {
            Operand::RCX
        }
    }

    /// How the TD's root page is locked.
    const fn td_mode(self) -> Mode {
        match self {
            Call::MngInit
            | Call::MemPageAdd
            | Call::MrExtend
            | Call::MrFinalize
            | Call::MngVpFlushDone
            | Call::MngKeyFreeId => Mode::Exclusive,
            _ => Mode::Shared,
        }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Steps 1 to 3, held. Fields drop in the order of release.
pub(crate) struct Gate<'a> {
    _op_state: Option<Held<'a>>,
    _td: PageLock<'a>,
}

/// Steps 4 to 6 up to the entry lock, held. Fields drop in the order of release.
pub(crate) struct Located<'a> {
    pub(crate) lock: EntryLock<'a>,
    pub(crate) level: Level,
    _tree: Held<'a>,
}

impl Located<'_> {
    /// The entry.
    pub(crate) fn entry(&self) -> Entry {
        self.lock.entry()
    }

    /// A refusal that reports the entry.
    pub(crate) fn refusal(&self, status: Status) -> Refusal {
        Refusal::new(status, Operand::RCX).reporting(self.entry().report(self.level))
    }

    /// The entry, if its state admits `call`.
    pub(crate) fn admitted(&self, call: Call) -> Result<Entry, Refusal> {
        let entry = self.entry();
        if state::admits(call, entry.state()) {
            Ok(entry)
        } else {
            Err(self.refusal(Status::EptEntryStateIncorrect))
        }
    }
}

impl TdInner {
    /// Runs a call: hooks, cost of the transition, the call, the books.
    pub(crate) fn run(
        &self,
        call: Call,
        operands: [u64; 2],
        body: impl FnOnce() -> Done,
    ) -> Answer {
        let module = &*self.module;
        if let Some((status, operand)) = module.hooks.refuse(call) {
            let refused = answer(call, Err(Refusal::new(status, operand)));
            self.counts.note(call, &refused);
            return refused;
        }
        module.costs.spend_transition();
        let done = body();
        let given = answer(call, done);
        self.counts.note(call, &given);
        if let Err(refusal) = &done {
            let violation = super::audit::Violation {
                call,
                td: self.tdr,
                operands,
                answer: given,
            };
            module.log.judge(refusal, violation);
        }
        given
    }

    /// Every lock is held and every check has passed: what the call costs, it costs now.
    pub(crate) fn inside(&self, call: Call) {
        self.module.hooks.inside(call);
        self.module.costs.spend_body(call);
    }

    /// Steps 1 to 3.
    pub(crate) fn gate(&self, call: Call) -> Result<Gate<'_>, Refusal> {
        let td = self.lock_root(call)?;
        self.in_lifecycle(Lifecycle::KeysConfigured)
            .map_err(|_| Refusal::new(Status::TdKeysNotConfigured, Operand::NONE))?;
        let op_state = match call.td_mode() {
            Mode::Exclusive => None,
            Mode::Shared => Some(self.lock_op_state(Mode::Shared)?),
        };
        if !lifecycle::admits(call, self.op_state()) {
            return Err(Refusal::new(Status::OpStateIncorrect, Operand::NONE));
        }
        Ok(Gate {
            _op_state: op_state,
            _td: td,
        })
    }

    /// Step 1.
    pub(crate) fn lock_root(&self, call: Call) -> Result<PageLock<'_>, Refusal> {
        self.lock_root_as(call, call.td_mode())
    }

    /// Step 1 of a call that does not always lock alike.
    pub(crate) fn lock_root_as(&self, call: Call, mode: Mode) -> Result<PageLock<'_>, Refusal> {
        self.memory()
            .lock_page(self.tdr, Level::L1, mode, PageKind::Tdr)
            .map_err(|status| Refusal::new(status, call.td_operand()))
    }

    pub(crate) fn in_lifecycle(&self, wanted: Lifecycle) -> Result<(), Refusal> {
        if self.lifecycle() == wanted {
            Ok(())
        } else {
            Err(Refusal::new(Status::LifecycleStateIncorrect, Operand::NONE))
        }
    }

    pub(crate) fn lock_op_state(&self, mode: Mode) -> Result<Held<'_>, Refusal> {
        self.op_state_lock
            .try_lock(mode)
            .ok_or(Refusal::busy(Operand::OP_STATE))
    }

    /// Step 4.
    pub(crate) fn parse(
        &self,
        info: PageInfo,
        levels: RangeInclusive<Level>,
    ) -> Result<(Gpa, Level), Refusal> {
        info.parse(*levels.start(), *levels.end())
            .filter(|(gpa, _)| self.is_private(*gpa))
            .ok_or(Refusal::new(Status::OperandInvalid, Operand::RCX))
    }

    /// Steps 4 to 6, up to the lock of the entry.
    pub(crate) fn locate(
        &self,
        info: PageInfo,
        levels: RangeInclusive<Level>,
        tree: Mode,
    ) -> Result<Located<'_>, Refusal> {
        let (gpa, level) = self.parse(info, levels)?;
        let tree = self.lock_tree(tree)?;
        let walked = self.walk_to(gpa, level)?;
        let lock = EntryLock::host(walked.word)
            .ok_or(Refusal::busy(Operand::RCX).reporting(walked.entry.report(level)))?;
        Ok(Located {
            lock,
            level,
            _tree: tree,
        })
    }

    pub(crate) fn lock_tree(&self, mode: Mode) -> Result<Held<'_>, Refusal> {
        self.tree_lock
            .try_lock(mode)
            .ok_or(Refusal::busy(Operand::SEPT_TREE))
    }

    /// Whether the entry may be taken away: if the TD may run, it must be blocked and its block tracked. `operand` names
    /// what is not tracked.
    pub(crate) fn tracked(
        &self,
        at: &Located<'_>,
        page: &PamtEntry,
        operand: Operand,
    ) -> Result<(), Refusal> {
        let state = at.entry().state();
        if !state.needs_tracking() || !self.op_state().needs_tracking() {
            return Ok(());
        }
        if !state.is_blocked() {
            return Err(at.refusal(Status::GpaRangeNotBlocked));
        }
        match self.epochs.tracking(page.block_epoch()) {
            Tracking::Done => Ok(()),
            not_yet => Err(Refusal::new(Status::TlbTrackingNotDone, operand)
                .out_of_order(not_yet == Tracking::NotBegun)),
        }
    }

    /// Metadata of a page that the module found in its own tables.
    pub(crate) fn metadata(&self, page: Hpa) -> Result<Metadata<'_>, Refusal> {
        self.memory()
            .metadata(page.pfn())
            .ok_or(Refusal::new(Status::OperandAddrRangeError, Operand::RCX))
    }

    /// Metadata of what `entry`, an entry of `level`, holds: a table has 4 KiB, a page the size of its level.
    pub(crate) fn metadata_of(&self, entry: Entry, level: Level) -> Result<&PamtEntry, Refusal> {
        let size = if entry.state().is_table() {
            Level::L1
        } else {
            level
        };
        Ok(self.metadata(entry.page())?.at(size))
    }

    /// Locks a free page of `level` that the caller gives in R8.
    pub(crate) fn lock_new_page(&self, page: Hpa, level: Level) -> Result<PageLock<'_>, Refusal> {
        self.memory()
            .lock_page(page, level, Mode::Exclusive, PageKind::Nda)
            .map_err(|status| Refusal::new(status, Operand::R8))
    }
}

/// Locks a page that the module found in its own tables.
pub(crate) fn lock_found(page: &PamtEntry) -> Result<Held<'_>, Refusal> {
    page.lock
        .try_lock(Mode::Exclusive)
        .ok_or(Refusal::busy(Operand::RCX))
}

fn answer(call: Call, done: Done) -> Answer {
    let (status, operand, report) = match done {
        Ok(report) => (Status::Success, Operand::NONE, Some(report)),
        Err(refusal) => (
            refusal.status,
            refusal.operand,
            // An interrupted call leaves the registers as the caller set them.
            (refusal.status != Status::InterruptedRestartable)
                .then(|| refusal.report.unwrap_or_default()),
        ),
    };
    let report = report.filter(|_| call.writes_registers());
    Answer {
        status,
        operand,
        rcx: report.map(|(rcx, _)| rcx),
        rdx: report.map(|(_, rdx)| rdx),
    }
}
