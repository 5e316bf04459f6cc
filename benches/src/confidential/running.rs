//! A guest on the model of the TDX module that really runs: vCPUs enter it, touch memory through what its processors would
//! walk and cache, leave for what is not there, and leave when they are kicked.

use super::backend::Tdx;
use super::faulting::{Tries, Unresolved};
use super::guest::{Guest, GuestVcpu, private_write, shared_write};

use crate::ours::{PHYSICAL_BITS, RETRIES};
use crate::report::Error;
use tdp::protected::tdx::{Accept, Enter, Exit, PageInfo, Status, TdVcpu, TdxModule};
use tdp::{Gpa, Host, Outcome, TableMemory, TlbVcpu, Visibility};
use tdp_arch::cpu::SoftwareVcpu;
use tdp_arch::walker::{EptConfig, EptWalker, GuestAccess, ReadOnly};
use tdp_arch::{Gfn, Level};

/// What became of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The guest reached the page.
    Reached {
        /// The page had to be mapped or accepted first.
        faulted: bool,
    },
    /// The frame is of the other half than the guest took it for.
    OtherHalf,
}

/// A vCPU of a guest on TDX, with its processor.
pub struct RunningVcpu<'g> {
    guest: &'g Guest<Tdx>,
    vcpu: GuestVcpu<Tdx>,
    td: Option<TdVcpu>,
    tlb: TlbVcpu,
    /// What the processor caches of the shared half, and of the private one.
    shared: SoftwareVcpu<EptWalker>,
    private: SoftwareVcpu<EptWalker>,
    module: TdxModule,
    /// Address of the guest's instruction: a new one for each access.
    rip: u64,
    tries: &'g Tries,
    /// The module took it for one that is being single-stepped.
    suspected: bool,
}

impl<'g> RunningVcpu<'g> {
    /// One more vCPU of `guest`, outside.
    ///
    /// # Errors
    ///
    /// If there is none left, or no root.
    pub fn new(guest: &'g Guest<Tdx>, tries: &'g Tries) -> Result<Self, Error> {
        let backend = guest.backend();
        let td = backend
            .take_vcpu()
            .ok_or_else(|| Error::run("TDX module", "no vCPU is left"))?;
        let mut vcpu = guest.vcpu()?;
        let root = vcpu.load_root().map_err(|e| Error::run("tdp", e))?;
        let walker = EptWalker::new(EptConfig {
            physical_bits: PHYSICAL_BITS,
            ..EptConfig::default()
        })
        .map_err(|e| Error::run("page walker", e))?;
        let of_td = backend.table().td();
        Ok(Self {
            vcpu,
            tlb: guest.mmu().host().tlb().vcpu(),
            shared: SoftwareVcpu::new(walker, root.hpa),
            private: SoftwareVcpu::new(of_td.walker(), of_td.root()),
            module: backend.module().clone(),
            td: Some(td),
            guest,
            rip: 0,
            tries,
            suspected: false,
        })
    }

    /// Whether the module ever took it for one that is being single-stepped.
    pub fn was_suspected(&self) -> bool {
        self.suspected
    }

    /// Enters the guest, and stays outside if the module turns it back at once.
    fn enter(&mut self) -> Result<bool, Error> {
        let Some(td) = &mut self.td else {
            return Err(Error::run("TDX module", "the vCPU is gone"));
        };
        loop {
            if self.tlb.enter() {
                self.shared.flush_all();
            }
            match td.enter(self.rip) {
                Enter::Inside(entered) => {
                    if entered.flush {
                        self.private.flush_all();
                    }
                    return Ok(true);
                }
                Enter::Exited(_) => {
                    self.tlb.exit();
                    return Ok(false);
                }
                Enter::Refused(answer) if answer.status == Status::OperandBusy => {
                    self.tlb.exit();
                    std::thread::yield_now();
                }
                Enter::Refused(answer) => {
                    self.tlb.exit();
                    return Err(Error::run("guest entry", answer.to_string()));
                }
            }
        }
    }

    /// Leaves the guest, if it is inside.
    pub fn leave(&mut self) {
        self.leave_for(Exit::Other { rip: self.rip });
    }

    fn leave_for(&mut self, why: Exit) {
        if let Some(td) = &mut self.td {
            td.exit(why);
            self.suspected |= td.is_suspected();
        }
        // After the module's count, so that a ticket which has drained here has drained there.
        self.tlb.exit();
    }

    /// The guest writes to `gfn`, which it takes for memory of `half`. It is inside afterwards.
    ///
    /// # Errors
    ///
    /// What neither the library nor the guest can go on from. It is outside then, so that nobody waits for it.
    pub fn access(&mut self, gfn: Gfn, half: Visibility) -> Result<Access, Error> {
        let outcome = self.try_access(gfn, half);
        if outcome.is_err() {
            self.leave();
        }
        outcome
    }

    fn try_access(&mut self, gfn: Gfn, half: Visibility) -> Result<Access, Error> {
        self.rip += 1;
        let mut faulted = false;
        for _ in 0..RETRIES {
            if self.suspected {
                return Err(Error::Check(format!(
                    "the module suspects that the guest is single-stepped at frame {gfn}"
                )));
            }
            let inside = self.td.as_ref().is_some_and(TdVcpu::is_inside);
            if inside && self.tlb.kicked() {
                self.leave();
                continue;
            }
            let level = if inside || self.enter()? {
                match self.touch(gfn, half) {
                    Touch::Reached { accepted } => {
                        faulted |= accepted;
                        return Ok(Access::Reached { faulted });
                    }
                    Touch::Again => continue,
                    Touch::Absent(level) => level,
                }
            } else {
                Level::L1
            };
            self.leave_for(match half {
                Visibility::Private => Exit::EptViolation {
                    gpa: gfn.address(),
                    rip: self.rip,
                },
                Visibility::Shared => Exit::Other { rip: self.rip },
            });
            faulted = true;
            if !self.resolve(gfn, half, level)? {
                return Ok(Access::OtherHalf);
            }
        }
        Err(Error::Check(format!(
            "the guest never reached frame {gfn}, {half:?}"
        )))
    }

    /// Has the library resolve the fault. `false` if the frame is of the other half.
    fn resolve(&mut self, gfn: Gfn, half: Visibility, level: Level) -> Result<bool, Error> {
        let fault = match half {
            Visibility::Private => private_write(gfn).max_level(level),
            Visibility::Shared => shared_write(gfn),
        };
        let outcome = match self.vcpu.fault(fault) {
            Ok(Outcome::Fixed { .. } | Outcome::Spurious) => return Ok(true),
            first => self.tries.persist(&mut self.vcpu, fault, first)?,
        };
        match outcome {
            Outcome::Fixed { .. } | Outcome::Spurious => Ok(true),
            Outcome::MemoryFault(tdp::MemoryFault::IsShared | tdp::MemoryFault::IsPrivate) => {
                Ok(false)
            }
            outcome => Err(Unresolved::Outcome(gfn, outcome).into()),
        }
    }

    /// The access itself, inside.
    fn touch(&mut self, gfn: Gfn, half: Visibility) -> Touch {
        if half == Visibility::Shared {
            let gpa = shared_write(gfn).gpa;
            let memory = TableMemory::new(self.guest.mmu().host().frames());
            return match self.shared.access(&memory, gpa, GuestAccess::Write) {
                Ok(_) => Touch::Reached { accepted: false },
                Err(_) => Touch::Absent(Level::L1),
            };
        }
        let memory = ReadOnly(&self.module);
        let gpa = gfn.address();
        if self
            .private
            .access(&memory, gpa, GuestAccess::Write)
            .is_ok()
        {
            return Touch::Reached { accepted: false };
        }
        // Not there, or pending: the guest accepts by the largest leaf first.
        let large = self.guest.layout().level;
        self.accept(gfn, large)
    }

    fn accept(&mut self, gfn: Gfn, level: Level) -> Touch {
        let info = PageInfo::new(Gpa(level.align_down(gfn).address().0), level);
        let td = self.guest.backend().table().td();
        match td.page_accept(info) {
            Accept::Exit(exit) => Touch::Absent(exit.level),
            Accept::Answered(answer) => match answer.status {
                Status::Success | Status::PageAlreadyAccepted => Touch::Reached { accepted: true },
                Status::PageSizeMismatch if level > Level::L1 => self.accept(gfn, Level::L1),
                _ => Touch::Again,
            },
        }
    }
}

/// What the processor found.
enum Touch {
    Reached {
        accepted: bool,
    },
    /// A lock was in the way; the guest tries again.
    Again,
    /// The guest leaves: nothing is there at the level that it asked for.
    Absent(Level),
}

impl Drop for RunningVcpu<'_> {
    fn drop(&mut self) {
        self.leave();
        if let Some(td) = self.td.take() {
            self.guest.backend().return_vcpu(td);
        }
    }
}
