//! Where the library differs from KVM on purpose.
//!
//! A rule speaks of behaviour: what was recorded for an entry against what the library did to it. It knows no file, no
//! scenario and no place in a trace. Whatever no rule explains is unexplained.

use super::entry::{Entry, LeafBits, Transition};
use super::ledger::Key;
use serde::Serialize;

/// A difference that is meant, with its reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// Empty entries of an unlinked table become KVM's frozen pattern.
    EmptyEntrySealed,
    /// An entry goes from the frozen pattern to nothing by a change of its own.
    FrozenIsTransient,
    /// The library takes MMIO entries down with their table where KVM leaves them in the freed page.
    MmioGoesWithItsTable,
    /// A fault that finds its page mapped, or an MMIO entry in its place, makes the leaf without its dirty bit.
    DirtyBitKept,
    /// A large leaf, or a table in its place, is taken away by the fault that then maps a smaller page.
    LargeLeafIsSplit,
    /// Tables are taken away when a log ends, to be mapped large by later faults.
    CollapseInPlace,
    /// The accessed and dirty bits of a leaf that was put together.
    CollapseKeepsUse,
    /// Which of several tables that stand for fetches only is taken away first.
    RecoveryOrder,
    /// What a root held that was given up for another one.
    OneRootPerSpace,
    /// Tables and faults of a nested guest.
    NestedGuest,
}

impl Rule {
    /// Every rule.
    pub const ALL: [Self; 10] = [
        Self::EmptyEntrySealed,
        Self::FrozenIsTransient,
        Self::MmioGoesWithItsTable,
        Self::DirtyBitKept,
        Self::LargeLeafIsSplit,
        Self::CollapseInPlace,
        Self::CollapseKeepsUse,
        Self::RecoveryOrder,
        Self::OneRootPerSpace,
        Self::NestedGuest,
    ];

    /// Why it is so.
    pub fn reason(self) -> &'static str {
        match self {
            Self::EmptyEntrySealed => {
                "KVM freezes also the empty entries of a table that it unlinked; the library seals them (a pattern of \
                 its own, so that a walker starts over instead of waiting), and neither can be reached any more"
            }
            Self::FrozenIsTransient => {
                "KVM removes a table in two steps, by way of the frozen pattern; the library's entry is empty at once"
            }
            Self::MmioGoesWithItsTable => {
                "KVM skips MMIO entries when it frees a tree that nobody else can walk; the library seals every entry"
            }
            Self::DirtyBitKept => {
                "KVM up to 6.12 forgets the dirty bit of a leaf that it writes over another entry, be it the same leaf; the \
                 library sets it, and changes nothing if the fault is spurious, as KVM 6.18 does"
            }
            Self::LargeLeafIsSplit => {
                "KVM before 6.2 takes a large leaf away when only a part of it may be mapped on, and refills it fault by \
                 fault; the library splits it in place, as later kernels do (the replay follows the record)"
            }
            Self::CollapseInPlace => {
                "KVM up to 6.12 zaps tables when a log ends and lets faults map large pages; the library collapses them \
                 in place, as KVM 6.18 does (the replay follows the record)"
            }
            Self::CollapseKeepsUse => {
                "KVM makes a large leaf of the first small one, and forgets what the others say of their use; the \
                 library's is accessed or dirty if any of them was"
            }
            Self::RecoveryOrder => {
                "KVM recovers tables in the order in which they were made; the library goes round by guest frame, and \
                 keeps no list (the replay follows the record)"
            }
            Self::OneRootPerSpace => {
                "KVM makes a root for every mode of a processor, and takes an unused one down whenever its last user lets \
                 go; the library has one for an address space, which the replay empties at the change"
            }
            Self::NestedGuest => {
                "guests of a guest have tables of their own, made from the guest hypervisor's: outside this library"
            }
        }
    }
}

/// What is left of one entry's changes when an episode is over.
#[derive(Clone, Copy, Debug)]
pub struct Leftover {
    /// Which entry.
    pub key: Key,
    /// What KVM did.
    pub recorded: Option<Transition>,
    /// What the library did.
    pub ours: Option<Transition>,
    /// In the course of a fault.
    pub in_fault: bool,
}

impl Leftover {
    /// The rule that explains it.
    pub fn rule(&self) -> Option<Rule> {
        let Self {
            key,
            recorded,
            ours,
            in_fault,
        } = *self;
        match (recorded, ours) {
            (Some(recorded), None) if in_fault && forgets_dirty(&recorded) => {
                Some(Rule::DirtyBitKept)
            }
            (Some(recorded), Some(ours)) if in_fault && makes_clean(&recorded, &ours) => {
                Some(Rule::DirtyBitKept)
            }
            (Some(recorded), Some(ours)) if gathers_use(&recorded, &ours) => {
                Some(Rule::CollapseKeepsUse)
            }
            (
                None,
                Some(Transition {
                    from: Entry::Mmio,
                    to: Entry::Gone,
                }),
            ) if key.detached => Some(Rule::MmioGoesWithItsTable),
            _ => None,
        }
    }
}

/// Whether both put the same leaf in the place of an MMIO entry, and only the library's is dirty.
fn makes_clean(recorded: &Transition, ours: &Transition) -> bool {
    let (Entry::Mmio, Entry::Leaf(leaf), Entry::Mmio, Entry::Leaf(own)) =
        (recorded.from, recorded.to, ours.from, ours.to)
    else {
        return false;
    };
    !leaf.dirty
        && LeafBits {
            dirty: true,
            ..leaf
        } == own
}

/// Whether both put the same leaf in the place of a table, and the library's says more of its use.
fn gathers_use(recorded: &Transition, ours: &Transition) -> bool {
    let (Entry::Table, Entry::Leaf(leaf), Entry::Table, Entry::Leaf(own)) =
        (recorded.from, recorded.to, ours.from, ours.to)
    else {
        return false;
    };
    recorded.to.is_same_mapping(&ours.to)
        && own.accessed >= leaf.accessed
        && own.dirty >= leaf.dirty
}

/// Whether all that happened to a leaf is that it is not dirty any more.
fn forgets_dirty(transition: &Transition) -> bool {
    let (Entry::Leaf(from), Entry::Leaf(to)) = (transition.from, transition.to) else {
        return false;
    };
    from.dirty
        && LeafBits {
            dirty: false,
            ..from
        } == to
}
