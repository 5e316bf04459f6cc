//! The guest: vCPUs whose TLBs forget nothing, and who look at whose memory they reach.

use crate::chaos::{Random, Verdict, allow_pauses, pause};
use crate::frames::{PoisonPool, TRAP};
use crate::host::StressHost;
use crate::memory::{AREAS, Memory, PAGES, area_start, page_of};
use crate::plan::Flaw;
use crate::processor::{Processor, Report, guest_access};
use std::sync::Arc;
use tdp::{
    Access, Fault, FaultError, Gfn, Gpa, Level, LoadedRoot, Outcome, TableMemory, TlbVcpu, Vcpu,
};
use tdp_arch::cpu::SoftwareVcpu;
use tdp_arch::walker::{Translation, WalkError};

/// Most accesses between two looks at whether the host wants the vCPU out.
const ACCESSES_PER_ENTRY: usize = 64;

/// What a vCPU has done.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct GuestCounts {
    pub(crate) accesses: u64,
    pub(crate) faults: u64,
    pub(crate) fixed: u64,
    pub(crate) retries: u64,
    pub(crate) starved: u64,
    pub(crate) flushes: u64,
}

/// One vCPU.
pub(crate) struct Guest<F: Processor> {
    pub(crate) vcpu: Vcpu<F, StressHost>,
    pub(crate) software: SoftwareVcpu<F::Walker>,
    pub(crate) tlb: TlbVcpu,
    pub(crate) root: LoadedRoot,
    pub(crate) frames: PoisonPool,
    pub(crate) memory: Arc<Memory>,
    pub(crate) random: Random,
    pub(crate) flaw: Option<Flaw>,
    pub(crate) mmio_caching: bool,
    /// Large leaves are not executable.
    pub(crate) nx: bool,
    pub(crate) counts: GuestCounts,
}

impl<F: Processor> Guest<F> {
    /// Runs the guest until the run is over.
    pub(crate) fn run(mut self, verdict: &Verdict) -> GuestCounts {
        allow_pauses(self.random.next());
        while !verdict.is_over() {
            let Ok(root) = self.vcpu.load_root() else {
                self.starve();
                continue;
            };
            if root.generation != self.root.generation {
                self.software.set_root(root.hpa);
                self.software.flush_all();
                self.root = root;
            }
            pause(64);
            if let Some(fault) = self.enter(verdict) {
                self.handle(fault);
            }
            if self.random.once_in(64) {
                self.prefetch();
            }
        }
        self.counts
    }

    /// In the guest, until an access faults or the host wants the vCPU out.
    fn enter(&mut self, verdict: &Verdict) -> Option<Fault> {
        if self.tlb.enter() && self.flaw != Some(Flaw::VcpuKeepsTlb) {
            self.software.flush_all();
            self.counts.flushes += 1;
        }
        let fault = self.accesses(verdict);
        self.tlb.exit();
        fault
    }

    fn accesses(&mut self, verdict: &Verdict) -> Option<Fault> {
        for _ in 0..ACCESSES_PER_ENTRY {
            if self.tlb.kicked() {
                return None;
            }
            let gfn = self.somewhere();
            let access = match self.random.below(4) {
                0 | 1 => Access::Read,
                2 => Access::Write,
                _ => Access::Execute,
            };
            let gpa = Gpa(gfn.address().0 + self.random.below(512) * 8);
            let memory = TableMemory::new(&self.frames);
            let answer = self.software.access(&memory, gpa, guest_access(access));
            self.counts.accesses += 1;
            match answer {
                Ok(found) => self.check(gfn, access, found, verdict),
                Err(WalkError::Fault(fault)) => {
                    if F::report(fault) == Report::Malformed && !self.mmio_caching {
                        verdict.violation(format_args!("a malformed entry on the way: {fault}"));
                    }
                    return Some(match F::raw_code(fault) {
                        Some(raw) => Fault::from_code(F::fault_code(raw), gpa),
                        None => Fault::new(gpa, access),
                    });
                }
                Err(WalkError::Abort(abort)) => {
                    verdict.violation(format_args!("the processor ran wild: {abort}"));
                    return None;
                }
            }
        }
        None
    }

    /// A guest frame: mostly one of few, where the slot is, sometimes where it was.
    fn somewhere(&mut self) -> Gfn {
        let area = self.random.below(AREAS as u64) as usize;
        let page = if self.random.once_in(4) {
            self.random.below(PAGES as u64)
        } else {
            self.random.below(8) * 128 + self.random.below(2)
        };
        let moved = self.memory.standing(area).moved != self.random.once_in(8);
        Gfn(area_start(area, moved).0 + page)
    }

    /// The guest got through: the frame must be the page's own, now, while the vCPU is in the guest.
    fn check(&self, gfn: Gfn, access: Access, found: Translation, verdict: &Verdict) {
        let pfn = found.hpa.pfn();
        let Some((page, moved)) = page_of(gfn) else {
            return;
        };
        let area = page / PAGES;
        if self.nx && access == Access::Execute && found.level != Level::L1 {
            verdict.violation(format_args!(
                "fetch at {gfn} through a leaf of {}",
                found.level
            ));
        }
        if pfn.0 >= TRAP.0 {
            verdict.violation(format_args!(
                "{access:?} at {gfn} was translated by a table that had been freed"
            ));
            return;
        }
        let owned = self.memory.is_owned(pfn, page);
        // Read last: what it says was so when the translation was used.
        let standing = self.memory.standing(area);
        if !owned {
            verdict.violation(format_args!(
                "{access:?} at {gfn} reached frame {pfn} through a leaf of {}, which belongs to somebody else",
                found.level
            ));
        } else if standing.changing {
            // Either way is right.
        } else if !standing.present || standing.moved != moved {
            verdict.violation(format_args!(
                "{access:?} at {gfn}, where no slot is any more"
            ));
        } else if standing.read_only && access.is_write() {
            verdict.violation(format_args!("write at {gfn}, which is read-only by now"));
        }
    }

    fn handle(&mut self, mut fault: Fault) {
        self.counts.faults += 1;
        if self.random.once_in(4) {
            fault = fault.max_level(Level::L1);
        }
        match self.vcpu.fault(fault) {
            Ok(Outcome::Fixed { .. }) => self.counts.fixed += 1,
            Ok(Outcome::Retry(_)) => self.counts.retries += 1,
            Ok(_) => {}
            Err(FaultError::OutOfFrames) => self.starve(),
        }
    }

    /// Maps some pages before the guest needs them.
    fn prefetch(&mut self) {
        let first = self.somewhere();
        let Ok(mut batch) = self.vcpu.batch() else {
            return;
        };
        for page in 0..8 {
            let fault = Fault {
                prefetch: true,
                ..Fault::read(Gpa(Gfn(first.0 + page).address().0))
            };
            if batch.fault(fault).is_err() {
                break;
            }
        }
    }

    fn starve(&mut self) {
        self.counts.starved += 1;
        std::thread::yield_now();
    }
}
