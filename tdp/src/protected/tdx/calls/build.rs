//! Calls that build a TD: MNG.INIT, VP.CREATE, MR.EXTEND, MR.FINALIZE; and the stand-in for migration.

use super::super::Td;
use super::super::guest::TdVcpu;
use super::super::lifecycle::{Lifecycle, OpState};
use super::super::locks::Mode;
use super::super::pamt::PageKind;
use super::super::state;
use super::super::status::{Answer, Operand, Refusal, Status};
use super::super::td::Measured;
use super::Call;
use tdp_arch::{Gpa, Hpa, Level};
use tdp_rcu::sync::Ordering;

/// Bytes that one MR.EXTEND measures.
const CHUNK: u64 = 256;

impl Td {
    /// TDH.MNG.INIT: the TD can be built.
    pub fn mng_init(&self) -> Answer {
        let td = &*self.inner;
        let call = Call::MngInit;
        td.run(call, [0, 0], || {
            let _gate = td.gate(call)?;
            td.inside(call);
            td.set_op_state(OpState::Initialized);
            Ok((0, 0))
        })
    }

    /// TDH.VP.CREATE, ADDCX and INIT in one: a vCPU, with the free page `tdvpr` as its root.
    ///
    /// # Errors
    ///
    /// The answer, if it is not a success.
    pub fn vp_create(&self, tdvpr: Hpa) -> Result<TdVcpu, Answer> {
        let td = &*self.inner;
        let call = Call::VpCreate;
        let answer = td.run(call, [tdvpr.0, 0], || {
            let _gate = td.gate(call)?;
            let page = td
                .memory()
                .lock_page(tdvpr, Level::L1, Mode::Exclusive, PageKind::Nda)
                .map_err(|status| Refusal::new(status, Operand::RCX))?;
            td.inside(call);
            page.entry().assign(PageKind::Tdvpr, td.tdr);
            td.vcpus.fetch_add(1, Ordering::Relaxed);
            td.adopt(1);
            Ok((0, 0))
        });
        if answer.is_success() {
            Ok(TdVcpu::new(self.clone(), tdvpr))
        } else {
            Err(answer)
        }
    }

    /// TDH.MR.EXTEND: measures the content of the 256 bytes at `gpa`, which must be mapped.
    pub fn mr_extend(&self, gpa: Gpa) -> Answer {
        let td = &*self.inner;
        let call = Call::MrExtend;
        td.run(call, [gpa.0, 0], || {
            let _gate = td.gate(call)?;
            if !gpa.0.is_multiple_of(CHUNK) || !td.is_private(gpa) {
                return Err(Refusal::new(Status::OperandInvalid, Operand::RCX));
            }
            let absent = Refusal::new(Status::EptEntryNotPresent, Operand::RCX);
            let walked = td.walk(gpa, Level::L1).ok_or(absent)?;
            if !walked.entry.state().is_leaf() {
                return Err(absent.reporting(walked.entry.report(walked.level)));
            }
            if !state::admits(call, walked.entry.state()) {
                return Err(Refusal::new(Status::EptEntryNotPresent, Operand::NONE));
            }
            td.inside(call);
            td.measured.lock().push(Measured::Chunk { gpa });
            Ok((0, 0))
        })
    }

    /// TDH.MR.FINALIZE: closes the measurement; the TD, which must have a vCPU, can run.
    pub fn mr_finalize(&self) -> Answer {
        let td = &*self.inner;
        let call = Call::MrFinalize;
        td.run(call, [0, 0], || {
            let _gate = td.gate(call)?;
            if td.vcpus.load(Ordering::Relaxed) == 0 {
                return Err(Refusal::new(Status::NoVcpus, Operand::NONE));
            }
            td.inside(call);
            td.measured.lock().push(Measured::Final);
            td.set_op_state(OpState::Runnable);
            Ok((0, 0))
        })
    }

    /// Stands for the export and import calls: changes the operational state as one of them would
    /// ([`OpState::leads_to`]). `OP_STATE_INCORRECT` where none does. Nothing else changes, but for the TLB epoch, which the
    /// call that pauses the TD for its export advances: what is taken away from then on need not be tracked.
    pub fn migrate(&self, to: OpState) -> Answer {
        let td = &*self.inner;
        let call = Call::Migrate;
        td.run(call, [to as u64, 0], || {
            let pauses = to == OpState::PausedExport;
            // To pause needs every vCPU outside.
            let mode = if pauses {
                Mode::Exclusive
            } else {
                Mode::Shared
            };
            let _root = td.lock_root_as(call, mode)?;
            td.in_lifecycle(Lifecycle::KeysConfigured)
                .map_err(|_| Refusal::new(Status::TdKeysNotConfigured, Operand::NONE))?;
            let _op_state = td.lock_op_state(Mode::Exclusive)?;
            if !td.op_state().leads_to(to) {
                return Err(Refusal::new(Status::OpStateIncorrect, Operand::NONE));
            }
            if pauses && !td.epochs.may_advance() {
                return Err(Refusal::new(Status::PreviousTlbEpochBusy, Operand::NONE));
            }
            td.inside(call);
            if pauses {
                // If the export is given up, each vCPU drops its translations when it enters again.
                td.epochs.advance();
            }
            td.set_op_state(to);
            Ok((0, 0))
        })
    }
}
