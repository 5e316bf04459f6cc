//! Calls that end translations: RANGE.BLOCK, RANGE.UNBLOCK, TRACK.
//!
//! Protocol of taking something away from a TD that may run: block its entry; track; make every vCPU leave that is inside
//! since before; remove. One TRACK serves any number of blocks before it. To roll a block back needs the TRACK as well.

use super::super::Td;
use super::super::locks::Mode;
use super::super::state::PageInfo;
use super::super::status::{Answer, Operand, Refusal, Status};
use super::Call;
use tdp_arch::Level;

impl Td {
    /// TDH.MEM.RANGE.BLOCK: no new translation goes through the entry `info`, table or page, and no call gets below it.
    pub fn mem_range_block(&self, info: PageInfo) -> Answer {
        let td = &*self.inner;
        let call = Call::MemRangeBlock;
        td.run(call, [info.raw(), 0], || {
            let _gate = td.gate(call)?;
            let at = td.locate(info, Level::L1..=td.levels, Mode::Exclusive)?;
            let entry = at.entry();
            let state = entry.state();
            let Some(blocked) = state.blocked() else {
                return Err(at.refusal(if state.is_blocked() {
                    Status::GpaRangeAlreadyBlocked
                } else {
                    Status::EptEntryStateIncorrect
                }));
            };
            let page = td.metadata_of(entry, at.level)?;
            td.inside(call);
            at.lock.commit(entry.with_state(blocked));
            // In this order: a stamp taken before the entry is written could be tracked while a vCPU still walks it. Not
            // under the epoch's lock: a TRACK in between only makes the stamp younger than it need be.
            page.stamp(td.epochs.stamp());
            Ok((0, 0))
        })
    }

    /// TDH.MEM.RANGE.UNBLOCK: takes the block of the entry `info` back. If the TD may run, the block must be tracked.
    pub fn mem_range_unblock(&self, info: PageInfo) -> Answer {
        let td = &*self.inner;
        let call = Call::MemRangeUnblock;
        td.run(call, [info.raw(), 0], || {
            let _gate = td.gate(call)?;
            let at = td.locate(info, Level::L1..=td.levels, Mode::Exclusive)?;
            let entry = at.admitted(call)?;
            let page = td.metadata_of(entry, at.level)?;
            td.tracked(&at, page, Operand::SEPT_TREE)?;
            td.inside(call);
            at.lock.commit(entry.with_state(entry.state().unblocked()));
            Ok((0, 0))
        })
    }

    /// TDH.MEM.TRACK: advances the epoch, unless a vCPU is still inside since the epoch before the current one. It waits
    /// for nobody: after it, those who are inside since the current one have to be made to leave.
    pub fn mem_track(&self) -> Answer {
        let td = &*self.inner;
        let call = Call::MemTrack;
        td.run(call, [0, 0], || {
            let _gate = td.gate(call)?;
            let _epoch = td
                .epochs
                .lock
                .try_lock(Mode::Exclusive)
                .ok_or(Refusal::busy(Operand::TD_EPOCH))?;
            if !td.epochs.may_advance() {
                return Err(Refusal::new(Status::PreviousTlbEpochBusy, Operand::NONE));
            }
            td.inside(call);
            td.epochs.advance();
            Ok((0, 0))
        })
    }
}
