//! One line of a recorded trace, parsed and checked.
//!
//! Protocol. A trace is a file of JSON lines in the order of the kernel's global trace counter; the README beside the
//! recordings gives the form. Nothing here trusts a line: every number that later code uses as an index, a count or a
//! shift is bounded when it is read, so that a corrupt line ends in a [`TraceError`] and never in a panic or a loop
//! without end. Events that a replay needs nothing of become [`Event::Other`], or [`Event::Inside`] if they can stand
//! between a fault and its outcome, whatever their fields.

mod raw;
#[cfg(test)]
mod tests;

pub(super) use raw::Hex;

/// Frame numbers have 40 bits: addresses have 52.
pub const MAX_FRAME: u64 = 1 << 40;
/// Most vCPUs that a trace may name.
pub const MAX_VCPUS: u32 = 4096;
/// Address spaces that KVM has on x86: normal and system-management mode.
pub const ADDRESS_SPACES: u8 = 2;
/// Most entries that one run-length line may stand for: all of 16 GiB in 4 KiB pages.
pub const MAX_RUN: u64 = 1 << 22;

/// What is wrong with a line.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// Not JSON, or not of the expected types.
    #[error("not a trace event: {0}")]
    Json(#[from] serde_json::Error),
    /// A field is not there.
    #[error("{event}: no field `{field}`")]
    Missing {
        /// Name of the event.
        event: String,
        /// Name of the field.
        field: &'static str,
    },
    /// A number makes no sense.
    #[error("{event}: {field} {value:#x} is out of range")]
    Range {
        /// Name of the event.
        event: String,
        /// Name of the field.
        field: &'static str,
        /// What it was.
        value: u64,
    },
}

/// A half-open range of guest frames of one address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpaceRange {
    /// Address space.
    pub as_id: u8,
    /// First frame.
    pub start: u64,
    /// One past the last frame.
    pub end: u64,
}

/// Every frame of every address space.
pub fn everything() -> Vec<SpaceRange> {
    let all = |as_id| SpaceRange {
        as_id,
        start: 0,
        end: u64::MAX,
    };
    (0..ADDRESS_SPACES).map(all).collect()
}

/// One changed entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Address space.
    pub as_id: u8,
    /// Level of the entry, 1 to 5.
    pub level: u8,
    /// First frame that the entry covers.
    pub gfn: u64,
    /// What it was.
    pub old: u64,
    /// What it became.
    pub new: u64,
}

/// `n` changed entries at regular distances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    first: Change,
    n: u64,
    gfn_step: u64,
    old_step: u64,
    new_step: u64,
}

impl Run {
    /// Every change of the run, in order.
    pub fn changes(self) -> impl Iterator<Item = Change> {
        (0..self.n).map(move |k| Change {
            gfn: self.first.gfn.wrapping_add(k.wrapping_mul(self.gfn_step)),
            old: self.first.old.wrapping_add(k.wrapping_mul(self.old_step)),
            new: self.first.new.wrapping_add(k.wrapping_mul(self.new_step)),
            ..self.first
        })
    }
}

/// The lock-free repair of an entry that KVM tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FastFault {
    /// Guest address.
    pub gpa: u64,
    /// Level of the entry, inferred by the recorder.
    pub level: u8,
    /// What the entry was.
    pub old: u64,
    /// What it became, if `fixed`.
    pub new: u64,
    /// The entry was repaired.
    pub fixed: bool,
    /// Somebody else had repaired it.
    pub spurious: bool,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The operation with this index in the scenario begins.
    OpBegin(u32),
    /// It ends.
    OpEnd(u32),
    /// A guest faulted.
    PageFault {
        /// Number of the vCPU.
        vcpu: u32,
        /// Guest physical address.
        gpa: u64,
        /// Error code of the processor.
        code: u64,
    },
    /// The host answered a fault's look-up: the frame behind `gfn` and the level to map.
    Requested {
        /// Guest frame.
        gfn: u64,
        /// Level that KVM set out to map.
        level: u8,
        /// Host frame; `None` if no slot covers the guest frame.
        pfn: Option<u64>,
    },
    /// Entries changed.
    Changed(Run),
    /// KVM says what leaf a fault made.
    SetSpte {
        /// First frame of the leaf.
        gfn: u64,
        /// Level of the leaf.
        level: u8,
        /// The leaf.
        spte: u64,
    },
    /// KVM says that it made an MMIO entry for this frame.
    MarkMmio(u64),
    /// See [`FastFault`].
    FastFault(FastFault),
    /// A root table was made: a table of level 4 or 5 of the two-dimensional MMU.
    Root(u8),
    /// All roots became obsolete.
    ZapAllFast,
    /// The host took these frames back.
    Unmap(Vec<SpaceRange>),
    /// The host asked for the accessed bits of these frames.
    Age {
        /// Where.
        ranges: Vec<SpaceRange>,
        /// It cleared them.
        clears: bool,
    },
    /// A page of a logged slot was marked dirty.
    MarkDirty {
        /// Address space.
        as_id: u8,
        /// Number of the slot.
        slot: u32,
        /// Guest frame.
        gfn: u64,
    },
    /// A vCPU enters or leaves system-management mode.
    Smm {
        /// Number of the vCPU.
        vcpu: u32,
        /// Whether it enters.
        entering: bool,
    },
    /// A vCPU starts a nested guest, with or without nested paging of its own.
    NestedEnter {
        /// The guest hypervisor uses nested paging: KVM shadows its tables.
        nested_paging: bool,
    },
    /// A vCPU leaves a nested guest.
    NestedExit {
        /// Because of a second-level fault.
        page_fault: bool,
    },
    /// A vCPU returns to user space.
    UserspaceExit {
        /// With an error instead of an exit reason.
        error: bool,
    },
    /// Something that can happen between a fault and its outcome.
    Inside,
    /// Anything else.
    Other,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Position in the trace.
    pub seq: u64,
    /// Thread that did it.
    pub thread: u32,
    /// What happened.
    pub event: Event,
}

impl Line {
    /// Parses one line of a trace.
    ///
    /// # Errors
    ///
    /// [`TraceError`] if it is not an event, lacks a field or has an absurd number.
    pub fn parse(text: &str) -> Result<Self, TraceError> {
        let raw: raw::Raw<'_> = serde_json::from_str(text)?;
        // The largest number stands for nobody.
        let thread = raw.within(u64::from(raw.t), "t", u64::from(u32::MAX))? as u32;
        Ok(Self {
            seq: raw.seq,
            thread,
            event: raw.event()?,
        })
    }
}
