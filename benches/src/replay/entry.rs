//! An entry of a second-level table as far as two MMUs can agree on it, and its change.
//!
//! What is left of an entry after frame numbers of tables, software bits and the patterns that stand for "nothing here"
//! are taken away: nothing, device memory, a table, or a leaf with what the guest may do, who may write, and the
//! processor's bits. The recorded entries are read by [`spte`], the library's by its own decoder; neither
//! knows the other.

use super::spte::{self, Kind, Leaf};
use std::fmt;
use tdp::{Decoded, Format, Level, Perms};

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing: empty, or owned by whoever takes it down.
    Gone,
    /// Known to be device memory.
    Mmio,
    /// Points to a table.
    Table,
    /// Maps memory.
    Leaf(LeafBits),
}

/// What a leaf says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafBits {
    /// First host frame.
    pub pfn: u64,
    /// The guest may write.
    pub writable: bool,
    /// The guest may fetch instructions.
    pub executable: bool,
    /// The host lets the page be written.
    pub host_writable: bool,
    /// The MMU may let the guest write again without asking the host.
    pub mmu_writable: bool,
    /// Accessed.
    pub accessed: bool,
    /// Dirty.
    pub dirty: bool,
}

impl Entry {
    /// A recorded entry of `level`.
    pub fn recorded(spte: u64, level: u8) -> Self {
        let leaf = Leaf {
            gfn: 0,
            level,
            spte,
        };
        match spte::kind(spte, level) {
            Kind::None | Kind::Frozen | Kind::Unknown => Self::Gone,
            Kind::Mmio => Self::Mmio,
            Kind::Table => Self::Table,
            Kind::Leaf => Self::Leaf(LeafBits {
                pfn: leaf.pfn(),
                writable: leaf.is_writable(),
                executable: leaf.is_executable(),
                host_writable: leaf.is_host_writable(),
                mmu_writable: leaf.is_mmu_writable(),
                accessed: leaf.is_accessed(),
                dirty: leaf.is_dirty(),
            }),
        }
    }

    /// An entry of the library's.
    pub fn ours<F: Format>(entry: &tdp::Entry) -> Self {
        let has = |bit: u64| entry.spte.0 & bit != 0;
        match entry.decoded {
            Decoded::Mmio(_) => Self::Mmio,
            Decoded::Table(_) => Self::Table,
            Decoded::Leaf { perms, .. } => Self::Leaf(LeafBits {
                pfn: F::leaf_pfn(entry.spte, entry.level).0,
                writable: perms.contains(Perms::WRITE),
                executable: perms.contains(Perms::EXEC),
                host_writable: has(F::HOST_WRITABLE),
                mmu_writable: has(F::MMU_WRITABLE),
                accessed: has(F::ACCESSED),
                dirty: has(F::DIRTY),
            }),
            _ => Self::Gone,
        }
    }

    /// Whether both are the same but for what the processor sets.
    pub fn is_same_mapping(&self, other: &Self) -> bool {
        let without = |entry: &Self| match *entry {
            Self::Leaf(leaf) => Self::Leaf(LeafBits {
                accessed: false,
                dirty: false,
                ..leaf
            }),
            other => other,
        };
        without(self) == without(other)
    }
}

/// Frames below an entry of `level`.
pub fn pages(level: u8) -> u64 {
    Level::from_number(level).map_or_else(|| spte::pages(level), Level::pages)
}

/// A change of one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// What it was.
    pub from: Entry,
    /// What it became.
    pub to: Entry,
}

/// What a change did to a bit that the processor sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BitChange {
    Kept,
    Set,
    Cleared,
}

impl BitChange {
    fn of(from: bool, to: bool) -> Self {
        match (from, to) {
            (false, true) => Self::Set,
            (true, false) => Self::Cleared,
            _ => Self::Kept,
        }
    }
}

impl Transition {
    /// This change and then `next`, as one.
    pub fn then(self, next: Self) -> Self {
        Self {
            from: self.from,
            to: next.to,
        }
    }

    /// Whether nothing changed, the processor's bits left out.
    pub fn is_nothing(&self) -> bool {
        self.from.is_same_mapping(&self.to) && self.from != Entry::Mmio
    }

    /// Whether both did the same. Of the processor's bits it counts what was done to them, where both entries are
    /// leaves of one page: what they were before is the processor's doing.
    pub fn is_same(&self, other: &Self) -> bool {
        if !self.from.is_same_mapping(&other.from) || !self.to.is_same_mapping(&other.to) {
            return false;
        }
        match (self.from, self.to, other.from, other.to) {
            (
                Entry::Leaf(from),
                Entry::Leaf(to),
                Entry::Leaf(other_from),
                Entry::Leaf(other_to),
            ) if from.pfn == to.pfn => {
                let done = |from: LeafBits, to: LeafBits| {
                    (
                        BitChange::of(from.accessed, to.accessed),
                        BitChange::of(from.dirty, to.dirty),
                    )
                };
                done(from, to) == done(other_from, other_to)
            }
            (_, to, _, other_to) => to == other_to,
        }
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("nothing"),
            Self::Mmio => f.write_str("mmio"),
            Self::Table => f.write_str("table"),
            Self::Leaf(leaf) => {
                let letters = [
                    (true, 'r'),
                    (leaf.writable, 'w'),
                    (leaf.executable, 'x'),
                    (leaf.host_writable, 'h'),
                    (leaf.mmu_writable, 'm'),
                    (leaf.accessed, 'a'),
                    (leaf.dirty, 'd'),
                ];
                write!(f, "pfn {:#x} ", leaf.pfn)?;
                letters
                    .iter()
                    .try_for_each(|&(is, letter)| write!(f, "{}", if is { letter } else { '-' }))
            }
        }
    }
}

impl fmt::Display for Transition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}", self.from, self.to)
    }
}
