//! Calls on large pages: PAGE.DEMOTE, PAGE.PROMOTE.
//!
//! Protocol. Both leave the guest's view as it was, unblocked. A demotion takes the lock of the split page's metadata
//! inside; a promotion locks all 512 entries of the table, and those locks go with the table: a call that found an entry
//! of it before finds it locked for ever, as the real one does.

use super::super::Td;
use super::super::locks::{EntryLock, Mode};
use super::super::memory::Table;
use super::super::pamt::{PageKind, PamtEntry};
use super::super::state::{Entry, EntryState, PageInfo};
use super::super::status::{Answer, Operand, Refusal, Status};
use super::super::td::TdInner;
use super::{Call, lock_found};
use alloc::vec::Vec;
use tdp_arch::{ENTRIES_PER_TABLE, Hpa, Level};

const INTERRUPTED: Refusal = Refusal::new(Status::InterruptedRestartable, Operand::NONE);

impl Td {
    /// TDH.MEM.PAGE.DEMOTE: splits the 2 MiB or 1 GiB page of the entry `info` into 512 smaller ones in a table, the free
    /// page `table`. It must be blocked and tracked if the TD may run; the small ones are not blocked.
    pub fn mem_page_demote(&self, info: PageInfo, table: Hpa) -> Answer {
        let td = &*self.inner;
        let call = Call::MemPageDemote;
        td.run(call, [info.raw(), table.0], || {
            let _gate = td.gate(call)?;
            let at = td.locate(info, Level::L2..=Level::L3, Mode::Shared)?;
            let entry = at.admitted(call)?;
            let large = td.metadata_of(entry, at.level)?;
            td.tracked(&at, large, Operand::RCX)?;
            let new = td.lock_new_page(table, Level::L1)?;
            let below = at.level.below_or_leaf();
            let (first, state) = (entry.page(), entry.state().unblocked());
            let content = td
                .memory()
                .table(table)
                .ok_or(Refusal::new(Status::OperandAddrRangeError, Operand::R8))?;
            let parts = parts_of(td, first, below)?;
            if td.is_interrupted() {
                return Err(INTERRUPTED);
            }
            let _large = lock_found(large)?;
            td.inside(call);
            for part in parts {
                part.assign(PageKind::Reg, td.tdr);
            }
            large.release();
            content.fill(|index| Entry::leaf(part(first, below, index), state));
            new.entry().assign(PageKind::Ept, td.tdr);
            at.lock.commit(Entry::table(table));
            td.adopt(1);
            Ok((0, 0))
        })
    }

    /// TDH.MEM.PAGE.PROMOTE: merges the 512 pages of the table in the entry `info` into one. They must be all mapped or
    /// all pending and physically one piece; the table must be blocked and tracked if the TD may run. The large page is
    /// not blocked. RCX tells which page the table was.
    pub fn mem_page_promote(&self, info: PageInfo) -> Answer {
        let td = &*self.inner;
        let call = Call::MemPagePromote;
        td.run(call, [info.raw(), 0], || {
            let _gate = td.gate(call)?;
            let at = td.locate(info, Level::L2..=Level::L3, Mode::Shared)?;
            let table = at.admitted(call)?.page();
            let page = td.metadata(table)?.page;
            let _page = lock_found(page)?;
            td.tracked(&at, page, Operand::RCX)?;
            let content = td
                .memory()
                .table(table)
                .ok_or(at.refusal(Status::EptInvalidPromoteConditions))?;
            let below = at.level.below_or_leaf();
            let (locks, merged) = lock_all(content, below)
                .map_err(|Apart { status, of_guest }| at.refusal(status).of_guest(of_guest))?;
            if td.is_interrupted() {
                return Err(INTERRUPTED);
            }
            let large = td.metadata(merged.page())?.at(at.level);
            let parts = parts_of(td, merged.page(), below)?;
            let _large = lock_found(large)?;
            td.inside(call);
            large.assign(PageKind::Reg, td.tdr);
            for part in parts {
                part.release();
            }
            at.lock.commit(merged);
            page.release();
            td.disown(1);
            // The table is the module's no longer: its locks stay.
            locks.into_iter().for_each(core::mem::forget);
            Ok((table.0, 0))
        })
    }
}

/// Page `index` of those of `level` that make up the larger one at `first`.
fn part(first: Hpa, level: Level, index: usize) -> Hpa {
    Hpa(first.0 + index as u64 * level.bytes())
}

/// Metadata of the pages of `level` that make up the larger one at `first`.
fn parts_of(td: &TdInner, first: Hpa, level: Level) -> Result<Vec<&PamtEntry>, Refusal> {
    (0..ENTRIES_PER_TABLE)
        .map(|index| Ok(td.metadata(part(first, level, index))?.at(level)))
        .collect()
}

/// Why the entries of a table make up no large page.
struct Apart {
    status: Status,
    /// Because the guest has accepted some of its pages and others not.
    of_guest: bool,
}

impl From<Status> for Apart {
    fn from(status: Status) -> Self {
        Self {
            status,
            of_guest: false,
        }
    }
}

/// Locks every entry of a table of `level` and returns the large page that they make up.
fn lock_all(table: &Table, level: Level) -> Result<(Vec<EntryLock<'_>>, Entry), Apart> {
    let mut locks = Vec::with_capacity(ENTRIES_PER_TABLE);
    let mut first = None;
    let mut are_alike = true;
    for (index, word) in table.words().enumerate() {
        let lock = EntryLock::host(word).ok_or(Status::OperandBusy)?;
        let entry = lock.entry();
        locks.push(lock);
        let head = *first.get_or_insert(entry);
        let state = entry.state();
        let large = level.bytes() * ENTRIES_PER_TABLE as u64;
        if !matches!(state, EntryState::Mapped | EntryState::Pending)
            || !head.page().0.is_multiple_of(large)
            || entry != Entry::leaf(part(head.page(), level, index), state)
        {
            return Err(Status::EptInvalidPromoteConditions.into());
        }
        are_alike &= state == head.state();
    }
    if !are_alike {
        return Err(Apart {
            status: Status::EptInvalidPromoteConditions,
            of_guest: true,
        });
    }
    let head = first.ok_or(Status::EptInvalidPromoteConditions)?;
    Ok((locks, head))
}
