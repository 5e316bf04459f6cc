//! Calls that end a TD: MNG.VPFLUSHDONE, PHYMEM.CACHE.WB, MNG.KEY.FREEID, PHYMEM.PAGE.RECLAIM.
//!
//! Protocol. Flush every vCPU; VPFLUSHDONE, from which on no call on the TD's memory is admitted; write caches back; give
//! the key up; then reclaim every page, in any order, without block or track, the TD's root page last.

use super::super::Td;
use super::super::lifecycle::Lifecycle;
use super::super::locks::Mode;
use super::super::pamt::PageKind;
use super::super::status::{Answer, Operand, Refusal, Status};
use super::Call;
use tdp_arch::{Hpa, Level};
use tdp_rcu::sync::Ordering;

impl Td {
    /// TDH.MNG.VPFLUSHDONE: the key is not used by any vCPU any more.
    pub fn mng_vpflushdone(&self) -> Answer {
        let td = &*self.inner;
        let call = Call::MngVpFlushDone;
        td.run(call, [0, 0], || {
            let _root = td.lock_root(call)?;
            td.in_lifecycle(Lifecycle::KeysConfigured)?;
            if td.associated.load(Ordering::Relaxed) != 0 {
                return Err(Refusal::new(Status::FlushVpNotDone, Operand::NONE));
            }
            td.inside(call);
            td.written_back.store(0, Ordering::Relaxed);
            td.set_lifecycle(Lifecycle::Blocked);
            Ok((0, 0))
        })
    }

    /// TDH.PHYMEM.CACHE.WB on every package: no cache holds a line under the TD's key any more.
    pub fn phymem_cache_wb(&self) -> Answer {
        let td = &*self.inner;
        let call = Call::PhymemCacheWb;
        td.run(call, [0, 0], || {
            td.inside(call);
            td.written_back.store(1, Ordering::Relaxed);
            Ok((0, 0))
        })
    }

    /// TDH.MNG.KEY.FREEID: the key is given up.
    pub fn mng_key_freeid(&self) -> Answer {
        let td = &*self.inner;
        let call = Call::MngKeyFreeId;
        td.run(call, [0, 0], || {
            let _root = td.lock_root(call)?;
            td.in_lifecycle(Lifecycle::Blocked)?;
            if td.written_back.load(Ordering::Relaxed) == 0 {
                return Err(Refusal::new(Status::WbCacheNotComplete, Operand::NONE));
            }
            td.inside(call);
            td.set_lifecycle(Lifecycle::Teardown);
            Ok((0, 0))
        })
    }

    /// TDH.PHYMEM.PAGE.RECLAIM: takes any page of the dead TD back, a large one whole. RCX tells its type ([`PageKind`]),
    /// RDX the root page of its owner.
    ///
    /// The real call finds the TD by the page. Here a page of another TD is refused as `PAGE_METADATA_INCORRECT`.
    pub fn phymem_page_reclaim(&self, page: Hpa) -> Answer {
        let td = &*self.inner;
        let call = Call::PhymemPageReclaim;
        td.run(call, [page.0, 0], || {
            let found = td
                .memory()
                .lock_any(page, Level::L1, Mode::Exclusive)
                .map_err(|status| Refusal::new(status, Operand::RCX))?;
            let (kind, owner) = (found.entry().kind(), found.entry().owner());
            let is_root = kind == PageKind::Tdr;
            if kind == PageKind::Nda || owner != td.tdr {
                return Err(Refusal::new(Status::PageMetadataIncorrect, Operand::RCX));
            }
            let report = (kind as u64, owner.0);
            let refused = |status, operand| Err(Refusal::new(status, operand).reporting(report));
            if !page.0.is_multiple_of(found.level().bytes()) {
                return refused(Status::OperandInvalid, Operand::RCX);
            }
            // Found through the page: only the root page's own entry is locked.
            let _root = if is_root {
                None
            } else {
                let root = td.metadata(td.tdr)?.page;
                match root.lock.try_lock(Mode::Shared) {
                    Some(held) => Some(held),
                    None => return refused(Status::OperandBusy, Operand::TDR),
                }
            };
            if td.lifecycle() != Lifecycle::Teardown {
                return refused(Status::LifecycleStateIncorrect, Operand::NONE);
            }
            if is_root && td.child_count() != 0 {
                return refused(Status::TdAssociatedPagesExist, Operand::NONE);
            }
            td.inside(call);
            found.entry().release();
            if !is_root {
                td.disown(found.level().pages());
            }
            Ok(report)
        })
    }
}
