//! Guests: their accesses on software vCPUs, and what comes of their faults.
//!
//! Protocol. Before a fault is resolved its access is made, and must meet what the recorded tables held. After it the
//! access is made again, and must reach the recorded page.

use super::observe::Doing;
use super::{Driver, Machine, Stop, space};
use crate::replay::expect::{Expected, Space};
use crate::replay::findings::Difference;
use crate::replay::host::TraceHost;
use crate::replay::processor::Processor;
use crate::replay::spte::{self, Leaf};
use crate::replay::step::{Answer, Fault, GuestAccess, Meets, Recorded};
use crate::replay::trace::SpaceRange;
use tdp::{
    AddressSpaceId, FaultCode, Gfn, Gpa, Host, LoadedRoot, Mmu, MmuError, Outcome, TableMemory,
    TlbVcpu, Vcpu,
};
use tdp_arch::cpu::SoftwareVcpu;
use tdp_arch::walker::WalkError;

/// A recorded vCPU.
pub(super) struct Cpu<F: Processor> {
    pub(super) vcpu: Vcpu<F, TraceHost>,
    pub(super) processor: Box<SoftwareVcpu<F::Walker>>,
    tlb: TlbVcpu,
    /// Root that the processor has loaded.
    generation: u64,
    /// What the processor reported at the last access.
    reported: Option<FaultCode>,
}

impl<F: Processor> Driver<F> {
    pub(super) fn cpu(
        &mut self,
        number: Option<u32>,
    ) -> Result<(&mut Cpu<F>, &Mmu<F, TraceHost>), Stop> {
        let root = self.root;
        let Machine { vcpus, mmu, .. } = self.machine()?;
        let cpu = match vcpus.entry(number) {
            std::collections::btree_map::Entry::Occupied(cpu) => cpu.into_mut(),
            std::collections::btree_map::Entry::Vacant(place) => {
                let mut vcpu = mmu.vcpu()?;
                let LoadedRoot {
                    hpa, generation, ..
                } = vcpu.load_root()?;
                let processor = Box::new(SoftwareVcpu::new(F::walker(root)?, hpa));
                let tlb = mmu.host().tlb().vcpu();
                place.insert(Cpu {
                    vcpu,
                    processor,
                    tlb,
                    generation,
                    reported: None,
                })
            }
        };
        Ok((cpu, mmu))
    }

    /// A guest access: what it meets, and whether the report is the one recorded.
    fn touch(&mut self, access: &GuestAccess) -> Result<(Meets, bool), Stop> {
        self.findings.accesses += 1;
        let (cpu, mmu) = self.cpu(Some(access.vcpu))?;
        cpu.load(space(access.as_id))?;
        if cpu.tlb.enter() {
            cpu.processor.flush_all();
        }
        let memory = TableMemory::new(mmu.host().frames());
        let guest_access = access.code.guest_access();
        let walked = cpu.processor.access(&memory, Gpa(access.gpa), guest_access);
        cpu.tlb.exit();
        cpu.reported = None;
        match walked {
            Ok(translation) => Ok((
                Meets::Page {
                    pfn: translation.hpa.pfn().0,
                },
                true,
            )),
            Err(WalkError::Fault(report)) => {
                let code = F::code_of(report, guest_access);
                cpu.reported = Some(code);
                Ok((Meets::decoded(code), F::is_reported(report, access.code)))
            }
            Err(WalkError::Abort(abort)) => Err(abort.into()),
        }
    }

    /// The access that faulted when it was recorded.
    pub(super) fn access(&mut self, access: &GuestAccess) -> Result<(), Stop> {
        let (met, as_reported) = self.touch(access)?;
        let meant = Meets::reported(access.code);
        if met != access.meets || (meant == met && !as_reported) {
            let GuestAccess {
                seq,
                as_id,
                gpa,
                code,
                meets,
                ..
            } = *access;
            let got = if met == meets {
                "another report".to_owned()
            } else {
                met.to_string()
            };
            let expected = format!("{meets} for an access reported as {:#x}", code.0);
            self.findings.differs(Difference {
                seq,
                as_id,
                gfn: gpa >> 12,
                level: 0,
                expected,
                got,
            });
        }
        Ok(())
    }

    pub(super) fn fault(&mut self, fault: &Fault, expected: &Expected) -> Result<(), Stop> {
        let gfn = fault.gpa >> 12;
        let (cpu, _) = self.cpu(fault.vcpu)?;
        cpu.load(space(fault.as_id))?;
        let asked = match cpu.reported.take() {
            Some(code) if !fault.ahead => tdp::Fault::from_code(code, Gpa(fault.gpa)),
            _ => tdp::Fault {
                prefetch: fault.ahead,
                ..tdp::Fault::new(Gpa(fault.gpa), fault.code.access())
            },
        };
        let ranges = [self.reach_of(fault, expected)];
        let outcome = self.observed(&ranges, Doing::Library, |driver| {
            let (cpu, mmu) = driver.cpu(fault.vcpu)?;
            mmu.host().prepare(Some((gfn, fault.answer)));
            let outcome = cpu.vcpu.fault(asked);
            mmu.host().prepare(None);
            Ok(outcome?)
        })?;

        let leaf = expected.leaf_at(Space::normal(fault.as_id), gfn);
        let as_recorded = match (fault.recorded, outcome) {
            (Recorded::Mapped, Outcome::Fixed { level }) => {
                leaf.is_some_and(|leaf| leaf.level == level.number())
            }
            (Recorded::Unchanged, Outcome::Spurious)
            | (Recorded::Retried, Outcome::Retry(_) | Outcome::Spurious)
            | (Recorded::Mmio, Outcome::Mmio { .. })
            | (Recorded::Failed | Recorded::Tracked, Outcome::MemoryFault(_)) => true,
            _ => false,
        };
        if !as_recorded {
            let (seq, as_id, level) = (fault.seq, fault.as_id, leaf.map_or(0, |leaf| leaf.level));
            let (expected, got) = (format!("{:?}", fault.recorded), format!("{outcome:?}"));
            self.findings.note(Difference {
                seq,
                as_id,
                gfn,
                level,
                expected,
                got,
            });
        }
        let maps = self.maps(fault.seq, fault.as_id, gfn, leaf)?;
        let reached = maps && self.reaches(fault, leaf, expected)?;
        let matched = as_recorded && reached;
        self.findings.fault(fault.recorded, fault.ahead, matched);
        if !maps {
            self.repair(fault.as_id, gfn, leaf, expected)?;
        }
        Ok(())
    }

    /// What a fault can change: the path to its frame, and the whole of a large page that is made or split.
    fn reach_of(&self, fault: &Fault, expected: &Expected) -> SpaceRange {
        let gfn = fault.gpa >> 12;
        let answered = match fault.answer {
            Answer::Mapped { level, .. } => level,
            _ => 1,
        };
        let found = expected
            .leaf_at(Space::normal(fault.as_id), gfn)
            .map_or(1, |leaf| leaf.level);
        let present = self.machine.as_ref().and_then(|machine| {
            let leaf = machine.mmu.translate(space(fault.as_id), Gfn(gfn))?;
            Some(leaf.level.number())
        });
        let level = answered.max(found).max(present.unwrap_or(1));
        let start = spte::align(gfn, level);
        SpaceRange {
            as_id: fault.as_id,
            start,
            end: start + spte::pages(level),
        }
    }

    /// Whether the access, made again, meets the page, or the MMIO entry that was recorded.
    fn reaches(
        &mut self,
        fault: &Fault,
        leaf: Option<Leaf>,
        expected: &Expected,
    ) -> Result<bool, Stop> {
        let gfn = fault.gpa >> 12;
        let meets = match (fault.recorded, leaf) {
            (Recorded::Mapped | Recorded::Unchanged, Some(leaf)) => Meets::Page {
                pfn: leaf.pfn_of(gfn),
            },
            (Recorded::Mmio, None) if expected.is_mmio(Space::normal(fault.as_id), gfn) => {
                Meets::Mmio
            }
            _ => return Ok(true),
        };
        let Fault {
            seq,
            as_id,
            gpa,
            code,
            ..
        } = *fault;
        let Some(vcpu) = fault.vcpu else {
            return Ok(true);
        };
        let (met, _) = self.touch(&GuestAccess {
            seq,
            vcpu,
            as_id,
            gpa,
            code,
            meets,
        })?;
        if met != meets {
            let (expected, got) = (
                format!("{meets} for the access made again"),
                met.to_string(),
            );
            let level = leaf.map_or(1, |leaf| leaf.level);
            self.findings.note(Difference {
                seq,
                as_id,
                gfn,
                level,
                expected,
                got,
            });
        }
        Ok(met == meets)
    }
}

impl<F: Processor> Cpu<F> {
    /// Loads the root to enter the guest with.
    pub(super) fn load(&mut self, as_id: AddressSpaceId) -> Result<(), MmuError> {
        let root = if self.vcpu.address_space() == as_id {
            self.vcpu.load_root()?
        } else {
            self.vcpu.set_address_space(as_id)?
        };
        self.processor.set_root(root.hpa);
        if std::mem::replace(&mut self.generation, root.generation) != root.generation {
            self.processor.flush_all();
        }
        Ok(())
    }
}
