//! What a replay does with the library, step by step: what [`Story`](super::story::Story) makes of a trace, and what
//! [`Driver`](super::driver::Driver) executes and checks.

use super::entry::Transition;
use super::expect::Contradiction;
use super::ledger::{Class, Episode, Key};
use super::rules::Rule;
use super::scenario::{Op, Region};
use super::spte::Leaf;
use super::trace::SpaceRange;
use serde::Serialize;
use std::fmt;

/// The processor's report of a nested page fault (APM volume 2, 15.25.6, EXITINFO1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code(pub u64);

impl Code {
    /// A read that found nothing, as a pre-fault stands for it.
    pub const READ: Self = Self(1 << 32 | 1 << 2);

    /// An entry was there and forbade the access.
    pub fn is_present(self) -> bool {
        self.0 & 1 != 0
    }

    /// It was a write.
    pub fn is_write(self) -> bool {
        self.0 & 1 << 1 != 0
    }

    /// A reserved bit was set: an MMIO entry.
    pub fn is_reserved(self) -> bool {
        self.0 & 1 << 3 != 0
    }

    /// It was an instruction fetch.
    pub fn is_fetch(self) -> bool {
        self.0 & 1 << 4 != 0
    }

    /// It was the processor's own access to a guest page table.
    pub fn is_table_walk(self) -> bool {
        self.0 & 1 << 33 != 0
    }

    /// Whether `leaf` lets the access pass.
    pub fn passes(self, leaf: &Leaf) -> bool {
        (!self.is_write() || leaf.is_writable()) && (!self.is_fetch() || leaf.is_executable())
    }
}

/// What a vCPU meets when it accesses memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meets {
    /// A page that permits the access.
    Page {
        /// Host frame.
        pfn: u64,
    },
    /// Nothing.
    Nothing,
    /// A page that forbids the access.
    Forbidden,
    /// An MMIO entry.
    Mmio,
}

impl Meets {
    /// What `code` says that the processor met.
    pub fn reported(code: Code) -> Self {
        match code {
            // The recorder's emulated processor leaves the present bit clear here, a real one sets it.
            code if code.is_reserved() => Self::Mmio,
            code if code.is_present() => Self::Forbidden,
            _ => Self::Nothing,
        }
    }
}

impl fmt::Display for Meets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Page { pfn } => write!(f, "the page at pfn {pfn:#x}"),
            Self::Nothing => f.write_str("nothing mapped"),
            Self::Forbidden => f.write_str("a page that forbids it"),
            Self::Mmio => f.write_str("an MMIO entry"),
        }
    }
}

/// A guest access on a vCPU, made before its fault is handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestAccess {
    /// Position in the trace.
    pub seq: u64,
    /// Number of the vCPU.
    pub vcpu: u32,
    /// Address space that it runs in.
    pub as_id: u8,
    /// Guest physical address.
    pub gpa: u64,
    /// What the processor reported when it was recorded.
    pub code: Code,
    /// What the recorded tables held at this point of the trace.
    pub meets: Meets,
}

/// What the host answers if the library asks it for the backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Backed.
    Mapped {
        /// Host frame of the faulting guest frame.
        pfn: u64,
        /// Level to map.
        level: u8,
        /// The host lets the page be written.
        writable: bool,
    },
    /// Not now.
    Retry,
    /// Not at all.
    Failed,
}

/// How a fault went when it was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Recorded {
    /// An entry was made or changed: the access then passes.
    Mapped,
    /// Nothing had to change: somebody else was faster.
    Unchanged,
    /// Nothing changed, and the guest was to try again; the trace does not tell whether that was for want of an answer
    /// or because the access had become possible.
    Retried,
    /// Device memory, or a write to a read-only slot.
    Mmio,
    /// There was no page; user space was told.
    Failed,
    /// A write to a page whose writes are tracked: it was emulated.
    Tracked,
}

/// A fault to resolve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Position in the trace.
    pub seq: u64,
    /// Number of the vCPU; `None` if the trace does not say for which one memory was mapped ahead.
    pub vcpu: Option<u32>,
    /// Address space.
    pub as_id: u8,
    /// Guest physical address.
    pub gpa: u64,
    /// What the processor reported.
    pub code: Code,
    /// Not a fault of a guest, but memory mapped ahead.
    pub ahead: bool,
    /// What the host answers.
    pub answer: Answer,
    /// How it went.
    pub recorded: Recorded,
}

/// An operation on the whole MMU, for the count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// A slot was made.
    SlotInsert,
    /// A slot was deleted.
    SlotRemove,
    /// A slot was moved.
    SlotMove,
    /// A slot's flags changed.
    SlotFlags,
    /// The host took frames back.
    Invalidate,
    /// All roots became obsolete.
    InvalidateRoots,
    /// A page was mapped ahead of the guest.
    PreFault,
    /// A root was given up for a new one of the same address space.
    RootChange,
    /// The host asked for accessed bits.
    Age,
    /// Writes to a frame are tracked from now on.
    TrackWrites,
    /// The dirty log of a slot was read.
    GetDirtyLog,
    /// Marks of a slot's dirty log were cleared.
    ClearDirtyLog,
    /// The dirty rings were harvested and reset.
    ResetDirtyRings,
    /// Executable large pages were forbidden or permitted.
    NxHugePages,
    /// Tables that stood for fetches were taken away.
    RecoverNx,
    /// Tables were checked for becoming large pages again.
    Collapse,
    /// The VM went away.
    Teardown,
}

/// A change of memory slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotChange {
    /// Make it.
    Insert(Region),
    /// Delete it.
    Remove(Region),
    /// Move it to the region's `gfn`.
    Move(Region),
    /// Give it the region's flags.
    Flags(Region),
}

impl SlotChange {
    /// Its kind, for the count.
    pub fn operation(&self) -> Operation {
        match self {
            Self::Insert(_) => Operation::SlotInsert,
            Self::Remove(_) => Operation::SlotRemove,
            Self::Move(_) => Operation::SlotMove,
            Self::Flags(_) => Operation::SlotFlags,
        }
    }
}

/// One step. When it is executed, the expected tables stand as after the event that it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Root tables have this level.
    Root(u8),
    /// Slots change.
    Slot {
        /// Position in the trace.
        seq: u64,
        /// How.
        change: SlotChange,
        /// All roots become obsolete with it.
        roots: bool,
    },
    /// All roots become obsolete.
    InvalidateRoots,
    /// The host takes frames back.
    Invalidate(Vec<SpaceRange>),
    /// A guest accesses memory.
    Access(GuestAccess),
    /// A fault is resolved.
    Fault(Fault),
    /// A fault that is no business of the library's.
    OutsideFault(Rule),
    /// The root of an address space is given up for a new one.
    GiveUpRoot(u8),
    /// The host asks for the accessed bits of these frames.
    Age {
        /// Where.
        ranges: Vec<SpaceRange>,
        /// They are cleared.
        clears: bool,
    },
    /// Writes to a frame are tracked from now on: none passes without asking the host.
    TrackWrites {
        /// Address space.
        as_id: u8,
        /// The frame, or any of a large page.
        gfn: u64,
    },
    /// Large pages may not be executed from now on, or may.
    NxHugePages(bool),
    /// The table at this place, which stands for fetches only, is taken away.
    RecoverNx {
        /// Address space.
        as_id: u8,
        /// First frame.
        gfn: u64,
        /// Level of the entry that leads to the table.
        level: u8,
    },
    /// Each vCPU has a dirty ring of this many entries.
    DirtyRing(u32),
    /// A page of a slot was written, and not by the guest.
    MarkDirty {
        /// Address space.
        as_id: u8,
        /// Number of the slot.
        slot: u32,
        /// The page, counted from the slot's first.
        page: u64,
    },
    /// An operation on the dirty log.
    DirtyLog {
        /// Position in the trace.
        seq: u64,
        /// Which.
        op: Op,
    },
    /// A sweep of KVM's has come to this entry. If the library has been there already, nothing is to be done.
    Sweep {
        /// Address space.
        as_id: u8,
        /// First frame.
        gfn: u64,
        /// Level.
        level: u8,
    },
    /// Tables over a range may become large pages, where the host has large pages.
    Collapse(SpaceRange),
    /// Bring the library into the recorded state in this range, because it has no means of its own for the change.
    Sync(SpaceRange),
    /// The same, because a rule says that the library does otherwise.
    Follow(Rule, SpaceRange),
    /// An operation is complete: what the library maps in these ranges must be what is recorded.
    Verify {
        /// Position in the trace.
        seq: u64,
        /// For the count.
        operation: Operation,
        /// Where.
        ranges: Vec<SpaceRange>,
    },
    /// Everything mapped must be what is recorded.
    Compare {
        /// Position in the trace.
        seq: u64,
    },
    /// The VM goes away; this is what was mapped until then.
    Teardown {
        /// Position in the trace.
        seq: u64,
        /// With the address space of each.
        leaves: Vec<(u8, Leaf)>,
    },
    /// KVM changed an entry.
    Recorded {
        /// Position in the trace.
        seq: u64,
        /// Which.
        key: Key,
        /// How.
        transition: Transition,
    },
    /// KVM changed an entry for which a rule has an explanation from the start.
    Explained(Rule),
    /// What follows belongs to this episode.
    By(Episode),
    /// An episode is over.
    Settle(Episode, Class),
    /// The trace contradicts itself.
    Contradiction {
        /// Position in the trace.
        seq: u64,
        /// How.
        contradiction: Contradiction,
    },
}
