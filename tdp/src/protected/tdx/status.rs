//! What a call answers: completion status, operand id, output registers.
//!
//! Protocol. Inside a call everything that goes wrong is a [`Refusal`], which says what is to be reported; the runner
//! turns it into an [`Answer`] by the rule of the call: a call that writes RCX and RDX writes zeroes unless it has
//! something to report, and leaves them alone if it was interrupted.

use core::fmt;

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Completion status of a call, named as the TDX module ABI names it.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum Status {
            $($(#[$doc])* $name,)*
        }

        impl Status {
            /// Its name in the ABI, without the `TDX_` in front.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Status::$name => $text,)*
                }
            }
        }
    };
}

statuses! {
    /// Done.
    Success = "SUCCESS",
    /// An operand is malformed.
    OperandInvalid = "OPERAND_INVALID",
    /// A host physical address lies outside the memory that the module manages.
    OperandAddrRangeError = "OPERAND_ADDR_RANGE_ERROR",
    /// A lock is held by another call. Nothing changed.
    OperandBusy = "OPERAND_BUSY",
    /// The guest gives way to a host that was refused this entry and has not come back. Nothing changed.
    OperandBusyHostPriority = "OPERAND_BUSY_HOST_PRIORITY",
    /// A vCPU is still inside since the epoch before the current one.
    PreviousTlbEpochBusy = "PREVIOUS_TLB_EPOCH_BUSY",
    /// A host was interrupted before anything changed; the call is to be made again.
    InterruptedRestartable = "INTERRUPTED_RESTARTABLE",
    /// A page is not of the type that the call wants.
    PageMetadataIncorrect = "PAGE_METADATA_INCORRECT",
    /// The TD's root page is to be reclaimed while it still owns others.
    TdAssociatedPagesExist = "TD_ASSOCIATED_PAGES_EXIST",
    /// The TD's key is not configured, or no longer.
    TdKeysNotConfigured = "TD_KEYS_NOT_CONFIGURED",
    /// The TD's life cycle does not admit the call.
    LifecycleStateIncorrect = "LIFECYCLE_STATE_INCORRECT",
    /// The TD's operational state does not admit the call.
    OpStateIncorrect = "OP_STATE_INCORRECT",
    /// A TD without vCPUs cannot be finalised.
    NoVcpus = "NO_VCPUS",
    /// The vCPU is not associated with a processor.
    VcpuNotAssociated = "VCPU_NOT_ASSOCIATED",
    /// A vCPU is still associated with a processor.
    FlushVpNotDone = "FLUSHVP_NOT_DONE",
    /// Caches were not written back since the vCPUs were flushed.
    WbCacheNotComplete = "WBCACHE_NOT_COMPLETE",
    /// The walk ended before the level that was asked for.
    EptWalkFailed = "EPT_WALK_FAILED",
    /// The entry is in a state that does not admit the call.
    EptEntryStateIncorrect = "EPT_ENTRY_STATE_INCORRECT",
    /// There is no mapped page to measure.
    EptEntryNotPresent = "EPT_ENTRY_NOT_PRESENT",
    /// A table that is to be removed has an entry that is not free.
    EptPageNotFree = "EPT_PAGE_NOT_FREE",
    /// The entries of a table do not add up to one large page.
    EptInvalidPromoteConditions = "EPT_INVALID_PROMOTE_CONDITIONS",
    /// The entry must be blocked first.
    GpaRangeNotBlocked = "GPA_RANGE_NOT_BLOCKED",
    /// The entry is blocked already. By its bit pattern a success.
    GpaRangeAlreadyBlocked = "GPA_RANGE_ALREADY_BLOCKED",
    /// A vCPU may still hold a translation from before the entry was blocked.
    TlbTrackingNotDone = "TLB_TRACKING_NOT_DONE",
    /// The guest accepted the page before.
    PageAlreadyAccepted = "PAGE_ALREADY_ACCEPTED",
    /// The guest accepts a large page where there is a table.
    PageSizeMismatch = "PAGE_SIZE_MISMATCH",
}

impl Status {
    /// Whether a correct caller meets this status: a lock held by another, a poll that is not over, an interrupt.
    /// All of them say that nothing changed, and are cured by making the call again.
    pub const fn is_transient(self) -> bool {
        matches!(
            self,
            Status::OperandBusy
                | Status::OperandBusyHostPriority
                | Status::PreviousTlbEpochBusy
                | Status::InterruptedRestartable
                | Status::TlbTrackingNotDone
        )
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a status is about: the low 32 bits of the completion code.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Operand(pub u32);

impl Operand {
    /// None named.
    pub const NONE: Operand = Operand(0);
    /// Register RCX: the GPA and level, or the page to reclaim; with `OPERAND_BUSY` the entry or the page behind it.
    pub const RCX: Operand = Operand(1);
    /// Register RDX: the TD.
    pub const RDX: Operand = Operand(2);
    /// Register R8: the page that is given to the TD.
    pub const R8: Operand = Operand(8);
    /// Register R9: the source page.
    pub const R9: Operand = Operand(9);
    /// The TD's root page, found through another page.
    pub const TDR: Operand = Operand(128);
    /// The lock of the whole Secure EPT.
    pub const SEPT_TREE: Operand = Operand(146);
    /// The lock of the TLB-tracking epoch.
    pub const TD_EPOCH: Operand = Operand(169);
    /// The lock of the operational state.
    pub const OP_STATE: Operand = Operand(172);
}

/// What a call returned.
#[must_use = "a call that was refused has changed nothing"]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Answer {
    /// Completion status.
    pub status: Status,
    /// What the status is about. For `PAGE_ALREADY_ACCEPTED` and `PAGE_SIZE_MISMATCH` a level instead.
    pub operand: Operand,
    /// RCX, if the call wrote it.
    pub rcx: Option<u64>,
    /// RDX, if the call wrote it.
    pub rdx: Option<u64>,
}

impl Answer {
    /// Whether the call was done.
    pub const fn is_success(&self) -> bool {
        matches!(self.status, Status::Success)
    }

    /// Whether it has this status about this operand.
    pub fn is(&self, status: Status, operand: Operand) -> bool {
        self.status == status && self.operand == operand
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} op={}", self.status, self.operand.0)?;
        if let (Some(rcx), Some(rdx)) = (self.rcx, self.rdx) {
            write!(f, " rcx={rcx:x} rdx={rdx:x}")?;
        }
        Ok(())
    }
}

/// What RCX and RDX are to hold.
pub(crate) type Report = (u64, u64);

/// A call that was done: what to report.
pub(crate) type Done = Result<Report, Refusal>;

/// A call that was not done, and why.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Refusal {
    pub(crate) status: Status,
    pub(crate) operand: Operand,
    pub(crate) report: Option<Report>,
    /// A transient status that no retry cures, because the caller left a step out.
    pub(crate) out_of_order: bool,
    /// Because of what the guest did or did not do, which its host cannot know.
    pub(crate) of_guest: bool,
}

impl Refusal {
    pub(crate) const fn new(status: Status, operand: Operand) -> Self {
        Self {
            status,
            operand,
            report: None,
            out_of_order: false,
            of_guest: false,
        }
    }

    pub(crate) const fn busy(operand: Operand) -> Self {
        Self::new(Status::OperandBusy, operand)
    }

    pub(crate) const fn reporting(mut self, report: Report) -> Self {
        self.report = Some(report);
        self
    }

    pub(crate) const fn out_of_order(mut self, is: bool) -> Self {
        self.out_of_order = is;
        self
    }

    pub(crate) const fn of_guest(mut self, is: bool) -> Self {
        self.of_guest = is;
        self
    }
}
