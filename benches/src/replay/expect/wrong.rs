//! What can be wrong with a trace.

use std::fmt;

/// The trace contradicts itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contradiction {
    /// Address space.
    pub as_id: u8,
    /// Level of the entry.
    pub level: u8,
    /// First guest frame of the entry.
    pub gfn: u64,
    /// What is wrong.
    pub what: Wrong,
}

/// See [`Contradiction`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// The entry is recorded to have been something else before.
    OldValue {
        /// What the trace had written last; `None` if nothing.
        was: Option<u64>,
        /// What the event says.
        old: u64,
    },
    /// A new entry stands below no recorded table.
    NoTable,
    /// An entry below a table that went away was never removed.
    LeftBehind(u64),
    /// A leaf that KVM reports to have made is not there.
    NotMade(u64),
    /// An MMIO entry that KVM reports to have made is not there.
    NotMarked,
    /// The entry became something that KVM never writes.
    Unknown(u64),
    /// An entry was made without a fault that wanted it.
    NoFault,
    /// The processor reports this code, but the recorded tables make it meet something else.
    NotMet {
        /// Error code.
        reported: u64,
    },
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OldValue {
                was: Some(was),
                old,
            } => write!(
                f,
                "recorded old value {old:#x}, but {was:#x} was written last"
            ),
            Self::OldValue { was: None, old } => {
                write!(f, "recorded old value {old:#x}, but nothing was there")
            }
            Self::NoTable => f.write_str("recorded entry below no recorded table"),
            Self::LeftBehind(spte) => {
                write!(f, "{spte:#x} was left behind by the removal of its table")
            }
            Self::Unknown(spte) => write!(f, "{spte:#x} is no entry of KVM's"),
            Self::NoFault => f.write_str("recorded entry without a fault that made it"),
            Self::NotMarked => {
                f.write_str("an MMIO entry is reported as made, without an event that made it")
            }
            Self::NotMet { reported } => {
                write!(
                    f,
                    "the processor reported {reported:#x}, which the recorded tables do not explain"
                )
            }
            Self::NotMade(spte) => write!(
                f,
                "{spte:#x} is reported as made, without an event that made it"
            ),
        }
    }
}
