//! Calls on pages: PAGE.ADD, PAGE.AUG, PAGE.REMOVE.

use super::super::Td;
use super::super::locks::Mode;
use super::super::pamt::PageKind;
use super::super::state::{self, Entry, EntryState, PageInfo};
use super::super::status::{Answer, Operand, Refusal, Status};
use super::super::td::Measured;
use super::{Call, lock_found};
use tdp_arch::{Hpa, Level, PAGE_SIZE};

impl Td {
    /// TDH.MEM.PAGE.ADD: puts the free page `page`, with the content of the host's page `source`, into the free 4 KiB
    /// entry `info`, mapped, while the TD is built. The address is measured.
    ///
    /// No other call on the TD runs meanwhile: its root page is locked exclusively, and neither tree nor entry are.
    pub fn mem_page_add(&self, info: PageInfo, page: Hpa, source: Hpa) -> Answer {
        let td = &*self.inner;
        let call = Call::MemPageAdd;
        td.run(call, [info.raw(), page.0], || {
            let _gate = td.gate(call)?;
            let (gpa, level) = td.parse(info, Level::L1..=Level::L1)?;
            let walked = td.walk_to(gpa, level)?;
            if !state::admits(call, walked.entry.state()) {
                return Err(Refusal::new(Status::EptEntryStateIncorrect, Operand::RCX)
                    .reporting(walked.entry.report(level)));
            }
            if !source.0.is_multiple_of(PAGE_SIZE) {
                return Err(Refusal::new(Status::OperandInvalid, Operand::R9));
            }
            let new = td.lock_new_page(page, level)?;
            td.inside(call);
            new.entry().assign(PageKind::Reg, td.tdr);
            walked.set(Entry::leaf(page, EntryState::Mapped));
            td.measured.lock().push(Measured::Page { gpa, source });
            td.adopt(1);
            Ok((0, 0))
        })
    }

    /// TDH.MEM.PAGE.AUG: puts the free page `page` of 4 KiB or 2 MiB into the free entry `info`. The guest has to accept
    /// it.
    pub fn mem_page_aug(&self, info: PageInfo, page: Hpa) -> Answer {
        let td = &*self.inner;
        let call = Call::MemPageAug;
        td.run(call, [info.raw(), page.0], || {
            let _gate = td.gate(call)?;
            let at = td.locate(info, Level::L1..=Level::L2, Mode::Shared)?;
            at.admitted(call)?;
            let new = td.lock_new_page(page, at.level)?;
            td.inside(call);
            new.entry().assign(PageKind::Reg, td.tdr);
            at.lock.commit(Entry::leaf(page, EntryState::Pending));
            td.adopt(at.level.pages());
            Ok((0, 0))
        })
    }

    /// TDH.MEM.PAGE.REMOVE: takes the page out of the entry `info`. It must be blocked and tracked if the TD may run. RCX
    /// tells which page it was.
    pub fn mem_page_remove(&self, info: PageInfo) -> Answer {
        let td = &*self.inner;
        let call = Call::MemPageRemove;
        td.run(call, [info.raw(), 0], || {
            let _gate = td.gate(call)?;
            let at = td.locate(info, Level::L1..=Level::L3, Mode::Shared)?;
            let entry = at.admitted(call)?;
            let page = td.metadata_of(entry, at.level)?;
            let _page = lock_found(page)?;
            td.tracked(&at, page, Operand::RCX)?;
            td.inside(call);
            at.lock.commit(if td.op_state().is_importing() {
                Entry::REMOVED
            } else {
                Entry::FREE
            });
            page.release();
            td.disown(at.level.pages());
            Ok((entry.page().0, 0))
        })
    }
}
