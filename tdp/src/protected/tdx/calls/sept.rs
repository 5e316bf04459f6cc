//! Calls on tables: SEPT.ADD, SEPT.REMOVE, SEPT.RD.

use super::super::Td;
use super::super::locks::Mode;
use super::super::pamt::PageKind;
use super::super::state::{Entry, EntryState, PageInfo};
use super::super::status::{Answer, Operand, Refusal, Status};
use super::{Call, lock_found};
use tdp_arch::{Hpa, Level};
use tdp_rcu::sync::Ordering;

impl Td {
    /// TDH.MEM.SEPT.ADD: puts a table, the free page `table`, into the free entry `info` (level 1 and up: the entry that
    /// is filled). All entries of the table are free.
    pub fn mem_sept_add(&self, info: PageInfo, table: Hpa) -> Answer {
        let td = &*self.inner;
        let call = Call::MemSeptAdd;
        td.run(call, [info.raw(), table.0], || {
            let _gate = td.gate(call)?;
            let at = td.locate(info, Level::L2..=td.levels, Mode::Shared)?;
            at.admitted(call)?;
            let page = td.lock_new_page(table, Level::L1)?;
            let content = td
                .memory()
                .table(table)
                .ok_or(Refusal::new(Status::OperandAddrRangeError, Operand::R8))?;
            td.inside(call);
            content.fill(|_| Entry::FREE);
            page.entry().assign(PageKind::Ept, td.tdr);
            at.lock.commit(Entry::table(table));
            td.adopt(1);
            Ok((0, 0))
        })
    }

    /// TDH.MEM.SEPT.REMOVE: takes the table out of the entry `info`. All its entries must be free, and it must be blocked
    /// and tracked if the TD may run. RCX tells which page it was.
    pub fn mem_sept_remove(&self, info: PageInfo) -> Answer {
        let td = &*self.inner;
        let call = Call::MemSeptRemove;
        td.run(call, [info.raw(), 0], || {
            let _gate = td.gate(call)?;
            let at = td.locate(info, Level::L2..=td.levels, Mode::Exclusive)?;
            let table = at.admitted(call)?.page();
            let page = td.metadata(table)?.page;
            let _page = lock_found(page)?;
            td.tracked(&at, page, Operand::RCX)?;
            let content = td
                .memory()
                .table(table)
                .ok_or(at.refusal(Status::EptPageNotFree))?;
            let is_free = |word: &tdp_rcu::sync::AtomicU64| {
                Entry(word.load(Ordering::Acquire)).state() == EntryState::Free
            };
            if !content.words().all(is_free) {
                return Err(at.refusal(Status::EptPageNotFree));
            }
            td.inside(call);
            at.lock.commit(Entry::FREE);
            page.release();
            td.disown(1);
            Ok((table.0, 0))
        })
    }

    /// TDH.MEM.SEPT.RD: reads the entry `info` into RCX and RDX.
    pub fn mem_sept_rd(&self, info: PageInfo) -> Answer {
        let td = &*self.inner;
        let call = Call::MemSeptRd;
        td.run(call, [info.raw(), 0], || {
            let _gate = td.gate(call)?;
            let at = td.locate(info, Level::L1..=td.levels, Mode::Shared)?;
            td.inside(call);
            Ok(at.entry().report(at.level))
        })
    }
}
