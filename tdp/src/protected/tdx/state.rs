//! Secure-EPT entries: bits, states, and which call admits which state.
//!
//! Protocol. An entry is one 64-bit word in the processor's EPT format (SDM volume 3, 29.3.2): RWX, memory type, large
//! page, frame. Its *state* is a code of seven bits, scattered over bits that the processor ignores or that do not matter
//! in that state: dirty, ignore-PAT, large page, and the software bits 53 to 56 (exported, write-blocked, blocked,
//! pending). Two more software bits are a lock, not state: 11 (locked) and 52 (a host was refused). A walk by the
//! processor must run with accessed and dirty flags off, because the dirty bit is part of the code.

use super::calls::Call;
use super::status::Report;
use tdp_arch::{Gpa, Hpa, Level};

const READ_WRITE_EXECUTE: u64 = 0b111;
const MEMORY_TYPE: u64 = 0b111 << 3;
const WRITE_BACK: u64 = 6 << 3;
const IGNORE_PAT: u64 = 1 << 6;
const LEAF: u64 = 1 << 7;
const DIRTY: u64 = 1 << 9;
const EXPORTED: u64 = 1 << 53;
const WRITE_BLOCKED: u64 = 1 << 54;
const BLOCKED: u64 = 1 << 55;
const PENDING: u64 = 1 << 56;
const SUPPRESS_VE: u64 = 1 << 63;
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// Bit of the entry lock.
pub(crate) const LOCKED: u64 = 1 << 11;
/// Bit of host priority: a host was refused the entry lock.
pub(crate) const HOST_PRIORITY: u64 = 1 << 52;

const STATE: u64 = DIRTY | EXPORTED | WRITE_BLOCKED | BLOCKED | PENDING | IGNORE_PAT | LEAF;
const LEAF_STATE: u64 = IGNORE_PAT | LEAF;
/// What a caller is shown of a leaf and of a non-leaf entry.
const SHOWN_LEAF: u64 = READ_WRITE_EXECUTE | MEMORY_TYPE | FRAME | IGNORE_PAT | LEAF | SUPPRESS_VE;
const SHOWN_TABLE: u64 = READ_WRITE_EXECUTE | LEAF;

/// State of a Secure-EPT entry (TDX module ABI, "L1 Secure EPT entry state").
///
/// States of export and import are told apart, but only the migration calls lead there and they are not modelled.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum EntryState {
    /// Nothing.
    Free,
    /// Nothing, taken away while an import was in progress.
    Removed,
    /// A table.
    TableMapped,
    /// A table that no walk goes on into.
    TableBlocked,
    /// A page that the guest can reach.
    Mapped,
    /// A page that the guest cannot reach any more.
    Blocked,
    /// Blocked against writes.
    BlockedW,
    /// Exported, write-blocked.
    ExportedBlockedW,
    /// Exported, written since.
    ExportedDirty,
    /// Exported, written since, write-blocked.
    ExportedDirtyBlockedW,
    /// A page that the guest has yet to accept.
    Pending,
    /// A pending page that is blocked.
    PendingBlocked,
    /// Pending, write-blocked.
    PendingBlockedW,
    /// Pending, exported, write-blocked.
    PendingExportedBlockedW,
    /// Pending, exported, written since.
    PendingExportedDirty,
    /// Pending, exported, written since, write-blocked.
    PendingExportedDirtyBlockedW,
}

impl EntryState {
    /// Every state.
    pub const ALL: [EntryState; 16] = [
        EntryState::Free,
        EntryState::Removed,
        EntryState::TableMapped,
        EntryState::TableBlocked,
        EntryState::Mapped,
        EntryState::Blocked,
        EntryState::BlockedW,
        EntryState::ExportedBlockedW,
        EntryState::ExportedDirty,
        EntryState::ExportedDirtyBlockedW,
        EntryState::Pending,
        EntryState::PendingBlocked,
        EntryState::PendingBlockedW,
        EntryState::PendingExportedBlockedW,
        EntryState::PendingExportedDirty,
        EntryState::PendingExportedDirtyBlockedW,
    ];

    /// The number that calls report in bits 15:8 of RDX. Bit 7 of it marks a table.
    pub const fn architectural(self) -> u8 {
        match self {
            EntryState::Free => 0,
            EntryState::Blocked => 1,
            EntryState::Pending => 2,
            EntryState::PendingBlocked => 3,
            EntryState::Mapped => 4,
            EntryState::Removed => 5,
            EntryState::BlockedW => 8,
            EntryState::ExportedBlockedW => 9,
            EntryState::ExportedDirty => 11,
            EntryState::ExportedDirtyBlockedW => 12,
            EntryState::PendingBlockedW => 16,
            EntryState::PendingExportedBlockedW => 17,
            EntryState::PendingExportedDirty => 19,
            EntryState::PendingExportedDirtyBlockedW => 20,
            EntryState::TableBlocked => 0x81,
            EntryState::TableMapped => 0x84,
        }
    }

    /// Whether it holds a page.
    pub const fn is_leaf(self) -> bool {
        self.bits() & LEAF != 0
    }

    /// Whether it holds a table.
    pub const fn is_table(self) -> bool {
        matches!(self, EntryState::TableMapped | EntryState::TableBlocked)
    }

    /// Whether it was blocked against all accesses.
    pub const fn is_blocked(self) -> bool {
        matches!(
            self,
            EntryState::TableBlocked | EntryState::Blocked | EntryState::PendingBlocked
        )
    }

    /// Whether the guest reaches the page, be it only to read.
    pub const fn is_accessible_leaf(self) -> bool {
        matches!(
            self,
            EntryState::Mapped
                | EntryState::BlockedW
                | EntryState::ExportedBlockedW
                | EntryState::ExportedDirty
                | EntryState::ExportedDirtyBlockedW
        )
    }

    /// Whether a vCPU may hold a translation that must be gone before the entry is taken away.
    pub(crate) const fn needs_tracking(self) -> bool {
        !matches!(
            self,
            EntryState::ExportedBlockedW | EntryState::PendingExportedBlockedW
        )
    }

    /// What RANGE.BLOCK makes of it. A write block is forgotten.
    pub(crate) const fn blocked(self) -> Option<Self> {
        match self {
            EntryState::TableMapped => Some(EntryState::TableBlocked),
            EntryState::Mapped | EntryState::BlockedW => Some(EntryState::Blocked),
            EntryState::Pending | EntryState::PendingBlockedW => Some(EntryState::PendingBlocked),
            _ => None,
        }
    }

    /// What RANGE.UNBLOCK makes of it; a state that is not blocked stays.
    pub(crate) const fn unblocked(self) -> Self {
        match self {
            EntryState::TableBlocked => EntryState::TableMapped,
            EntryState::Blocked => EntryState::Mapped,
            EntryState::PendingBlocked => EntryState::Pending,
            other => other,
        }
    }

    const fn bits(self) -> u64 {
        const CLEAN: u64 = LEAF_STATE | EXPORTED | WRITE_BLOCKED;
        const WRITTEN: u64 = LEAF_STATE | EXPORTED | DIRTY;
        match self {
            EntryState::Free => EXPORTED | WRITE_BLOCKED | BLOCKED,
            EntryState::Removed => WRITE_BLOCKED | BLOCKED,
            EntryState::TableMapped => 0,
            EntryState::TableBlocked => BLOCKED,
            EntryState::Mapped => LEAF_STATE,
            EntryState::Blocked => LEAF_STATE | BLOCKED,
            EntryState::BlockedW => LEAF_STATE | WRITE_BLOCKED,
            EntryState::ExportedBlockedW => CLEAN,
            EntryState::ExportedDirty => WRITTEN,
            EntryState::ExportedDirtyBlockedW => WRITTEN | WRITE_BLOCKED,
            EntryState::Pending => LEAF_STATE | PENDING,
            EntryState::PendingBlocked => LEAF_STATE | PENDING | BLOCKED,
            EntryState::PendingBlockedW => LEAF_STATE | PENDING | WRITE_BLOCKED,
            EntryState::PendingExportedBlockedW => CLEAN | PENDING,
            EntryState::PendingExportedDirty => WRITTEN | PENDING,
            EntryState::PendingExportedDirtyBlockedW => WRITTEN | PENDING | WRITE_BLOCKED,
        }
    }

    /// Permissions of an entry in this state. Write-blocked ones keep read and execute.
    const fn permissions(self) -> u64 {
        match self {
            EntryState::TableMapped | EntryState::Mapped | EntryState::ExportedDirty => {
                READ_WRITE_EXECUTE
            }
            EntryState::BlockedW
            | EntryState::ExportedBlockedW
            | EntryState::ExportedDirtyBlockedW => 0b101,
            _ => 0,
        }
    }
}

/// One entry, as it was read: with or without its lock bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Entry(pub(crate) u64);

impl Entry {
    pub(crate) const FREE: Entry = Entry(SUPPRESS_VE | EntryState::Free.bits());
    pub(crate) const REMOVED: Entry = Entry(SUPPRESS_VE | EntryState::Removed.bits());

    /// A mapped table.
    pub(crate) const fn table(page: Hpa) -> Self {
        Self(SUPPRESS_VE | (page.0 & FRAME)).with_state(EntryState::TableMapped)
    }

    /// A page in a leaf state.
    pub(crate) const fn leaf(page: Hpa, state: EntryState) -> Self {
        Self(SUPPRESS_VE | WRITE_BACK | (page.0 & FRAME)).with_state(state)
    }

    /// The same table or page in another state, with that state's permissions, unlocked.
    pub(crate) const fn with_state(self, state: EntryState) -> Self {
        let kept = self.0 & !(STATE | READ_WRITE_EXECUTE | LOCKED | HOST_PRIORITY);
        Self(kept | state.bits() | state.permissions())
    }

    /// Without lock bits.
    pub(crate) const fn unlocked(self) -> Self {
        Self(self.0 & !(LOCKED | HOST_PRIORITY))
    }

    /// The state. Only this module makes entries, so each has one of the sixteen codes.
    pub(crate) fn state(self) -> EntryState {
        let code = self.0 & STATE;
        EntryState::ALL
            .into_iter()
            .find(|state| state.bits() == code)
            // A code of none is taken for the state that no call admits.
            .unwrap_or(EntryState::PendingExportedDirtyBlockedW)
    }

    /// The table or page.
    pub(crate) const fn page(self) -> Hpa {
        Hpa(self.0 & FRAME)
    }

    /// Whether a walk goes on from here: present, and not a page.
    pub(crate) const fn leads_on(self) -> bool {
        self.0 & READ_WRITE_EXECUTE != 0 && self.0 & LEAF == 0
    }

    /// RCX and RDX as calls report an entry: its architectural bits; level in bits 2:0, state in bits 15:8.
    pub(crate) fn report(self, level: Level) -> Report {
        let state = self.state();
        let shown = match state {
            EntryState::Free => SUPPRESS_VE,
            _ if state.is_leaf() => self.0 & SHOWN_LEAF,
            _ => self.0 & SHOWN_TABLE,
        };
        let info = module_level(level) | u64::from(state.architectural()) << 8;
        (shown, info)
    }
}

/// Level as the module counts: 0 for an entry that maps 4 KiB.
pub(crate) const fn module_level(level: Level) -> u64 {
    level.number() as u64 - 1
}

/// The operand that names an entry: GPA in bits 51:12, level in bits 2:0 (0 for 4 KiB).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PageInfo(u64);

impl PageInfo {
    const RESERVED: u64 = !(FRAME | 0b111);

    /// The entry of `gpa` at `level`. Low bits of the GPA below the page frame are dropped, others are not: a GPA that
    /// is not aligned to the level is refused by the call.
    pub const fn new(gpa: Gpa, level: Level) -> Self {
        Self((gpa.0 & !0xfff) | module_level(level))
    }

    /// Any register value, well-formed or not.
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// The register value.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// GPA and level, if nothing reserved is set, the level lies in the range and the GPA is aligned to it.
    pub(crate) fn parse(self, lowest: Level, highest: Level) -> Option<(Gpa, Level)> {
        let level = Level::from_number((self.0 & 0b111) as u8 + 1)?;
        let gpa = Gpa(self.0 & FRAME);
        (self.0 & Self::RESERVED == 0
            && (lowest..=highest).contains(&level)
            && level.is_aligned(gpa.gfn()))
        .then_some((gpa, level))
    }
}

/// Whether `call` admits an entry in `state`. A state that is admitted may still have to be blocked and tracked.
pub(crate) const fn admits(call: Call, state: EntryState) -> bool {
    use EntryState as S;
    match call {
        Call::MemSeptAdd | Call::MemPageAdd => matches!(state, S::Free),
        Call::MemPageAug => matches!(state, S::Free | S::Removed),
        Call::MemRangeBlock => state.blocked().is_some(),
        Call::MemRangeUnblock => state.is_blocked(),
        Call::MemPageRemove => matches!(
            state,
            S::Mapped
                | S::Blocked
                | S::BlockedW
                | S::Pending
                | S::PendingBlocked
                | S::PendingBlockedW
        ),
        Call::MemSeptRemove | Call::MemPagePromote => {
            matches!(state, S::TableMapped | S::TableBlocked)
        }
        Call::MemPageDemote => matches!(
            state,
            S::Mapped | S::Blocked | S::Pending | S::PendingBlocked
        ),
        Call::MemSeptRd => true,
        Call::MrExtend => matches!(state, S::Mapped),
        Call::GuestPageAccept => matches!(state, S::Pending | S::PendingExportedDirty),
        _ => false,
    }
}

// The codes are distinct, and permissions never point the processor at something that is not there.
const _: () = {
    let all = EntryState::ALL;
    let mut i = 0;
    while i < all.len() {
        assert!(all[i].bits() & !STATE == 0);
        assert!(
            all[i].permissions() == 0
                || all[i].is_accessible_leaf()
                || matches!(all[i], EntryState::TableMapped)
        );
        let mut j = i + 1;
        while j < all.len() {
            assert!(all[i].bits() != all[j].bits());
            assert!(all[i].architectural() != all[j].architectural());
            j += 1;
        }
        i += 1;
    }
};

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const PAGE: Hpa = Hpa(0x1234_5000);

    /// Entries of every state are told apart by the code alone, whatever their page and whoever holds their lock.
    #[test]
    fn a_state_is_read_back_as_it_was_written() {
        for state in EntryState::ALL {
            for page in [Hpa(0), PAGE, Hpa(FRAME)] {
                let entry = Entry::leaf(page, state);
                assert_eq!((entry.state(), entry.page()), (state, page));
                let locked = Entry(entry.0 | LOCKED | HOST_PRIORITY);
                assert_eq!((locked.state(), locked.unlocked()), (state, entry));
                for other in EntryState::ALL {
                    let changed = locked.with_state(other);
                    assert_eq!((changed.state(), changed.page()), (other, page));
                    assert_eq!(changed.unlocked(), changed, "it loses its lock bits");
                }
            }
        }
    }

    /// The processor reaches what the state says that the guest reaches, and goes on below tables that are not blocked.
    #[test]
    fn permissions_are_those_of_the_state() {
        for state in EntryState::ALL {
            let entry = Entry::leaf(PAGE, state);
            let readable = entry.0 & 1 != 0;
            let leads_on = state == EntryState::TableMapped;
            assert_eq!(entry.leads_on(), leads_on, "{state:?}");
            assert_eq!(
                readable,
                state.is_accessible_leaf() || leads_on,
                "{state:?}"
            );
            if state.is_blocked() || !(state.is_leaf() || state.is_table()) {
                assert_eq!(entry.0 & READ_WRITE_EXECUTE, 0, "{state:?}");
            }
        }
    }

    #[test]
    fn a_block_is_taken_back_but_for_a_block_against_writes() {
        use EntryState as S;
        for state in EntryState::ALL {
            let Some(blocked) = state.blocked() else {
                assert!(!state.unblocked().is_blocked(), "{state:?}");
                continue;
            };
            assert!(blocked.is_blocked() && !state.is_blocked(), "{state:?}");
            let expected = match state {
                S::BlockedW => S::Mapped,
                S::PendingBlockedW => S::Pending,
                state => state,
            };
            assert_eq!(blocked.unblocked(), expected);
            assert_eq!(expected.unblocked(), expected, "what is not blocked stays");
            assert!(admits(Call::MemRangeBlock, state));
            assert!(admits(Call::MemRangeUnblock, blocked));
            assert!(!admits(Call::MemRangeBlock, blocked));
        }
        assert!(
            S::ALL
                .into_iter()
                .all(|state| admits(Call::MemSeptRd, state))
        );
        assert!(
            !S::ALL
                .into_iter()
                .any(|state| admits(Call::MemTrack, state))
        );
    }
}
