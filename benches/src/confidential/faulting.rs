//! A confidential guest as a contender: its vCPUs resolve faults, nothing else.

use super::backend::Backend;
use super::guest::{Checks, Guest, GuestVcpu, private_write, shared_write};
use super::layout::SHARED_BIT;
use crate::ours::RETRIES;
use crate::race::{Contender, Translation};
use crate::report::Error;
use crate::sync::{AtomicU64, Ordering, Padded};
use tdp::protected::Inspected;
use tdp::{EntryPlace, Fault, FaultError, Gfn, Level, MemoryFault, Outcome, Visibility};

/// Why a fault was not resolved.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub enum Unresolved {
    /// No frame for a table.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// It was resolved to something that no page of a slot can be.
    #[error("a fault at frame {0} was answered by {1:?}")]
    Outcome(Gfn, Outcome),
}

impl From<Unresolved> for Error {
    fn from(failure: Unresolved) -> Self {
        Error::run("tdp", failure)
    }
}

/// How often faults were not resolved at once.
#[derive(Debug, Default)]
pub struct Tries {
    /// Most times in a row that one private address was to be entered again with its fault unresolved.
    max_reentries: AtomicU64,
    /// Faults that the module refused, and that were made again.
    refused: AtomicU64,
    /// Faults to be tried again.
    retried: AtomicU64,
}

impl Tries {
    /// Most times in a row that a guest was sent back to one address.
    pub fn max_reentries(&self) -> u64 {
        self.max_reentries.load(Ordering::Relaxed)
    }

    /// Faults that the module refused.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Faults to be tried again.
    pub fn retried(&self) -> u64 {
        self.retried.load(Ordering::Relaxed)
    }

    /// Resolves `fault` by `vcpu`, again and again: as a guest does that is entered, touches the same address, and leaves.
    ///
    /// # Errors
    ///
    /// What no entering again can change.
    #[cold]
    #[inline(never)]
    pub fn persist<B: Backend>(
        &self,
        vcpu: &mut GuestVcpu<B>,
        fault: Fault,
        first: Result<Outcome, FaultError>,
    ) -> Result<Outcome, Unresolved> {
        let mut outcome = first?;
        let mut in_a_row = 0;
        // The module minds private addresses only.
        let private = fault.gpa.0 >> SHARED_BIT & 1 == 0;
        for _ in 0..RETRIES {
            match outcome {
                Outcome::Retry(_) => {
                    in_a_row += 1;
                    self.retried.fetch_add(1, Ordering::Relaxed);
                    if private {
                        self.max_reentries.fetch_max(in_a_row, Ordering::Relaxed);
                    } else {
                        std::thread::yield_now();
                    }
                }
                // The embedder is told, and may do something about it: the guest is not sent back for nothing.
                Outcome::MemoryFault(MemoryFault::Refused) => {
                    in_a_row = 0;
                    self.refused.fetch_add(1, Ordering::Relaxed);
                }
                other => return Ok(other),
            }
            outcome = vcpu.fault(fault)?;
        }
        Err(Unresolved::Outcome(fault.gpa.gfn(), outcome))
    }
}

/// A guest whose vCPUs touch memory that is not mapped.
#[derive(Debug)]
pub struct Faulting<B: Backend> {
    guest: Guest<B>,
    /// Which half is touched; by the frame's own visibility if `None`.
    half: Option<Visibility>,
    page: Level,
    tries: Padded<Tries>,
}

impl<B: Backend> Faulting<B> {
    /// A guest that is touched page by page: in one half, or in that of each frame.
    pub fn new(guest: Guest<B>, half: Option<Visibility>, page: Level) -> Self {
        Self {
            guest,
            half,
            page,
            tries: Padded::default(),
        }
    }

    /// The guest.
    pub fn guest(&self) -> &Guest<B> {
        &self.guest
    }

    /// How often faults were not resolved at once.
    pub fn tries(&self) -> &Tries {
        &self.tries.0
    }

    /// Takes everything down, the workers already being gone.
    ///
    /// # Errors
    ///
    /// As [`Guest::finish`].
    pub fn finish(self, checks: &mut Checks) -> Result<(), Error> {
        checks.max_reentries = checks.max_reentries.max(self.tries().max_reentries());
        self.guest.finish(checks)
    }

    #[inline(always)]
    fn fault(&self, gfn: Gfn) -> Fault {
        let half = match self.half {
            Some(half) => half,
            None => self.visibility(gfn),
        };
        match half {
            Visibility::Private => private_write(gfn),
            Visibility::Shared => shared_write(gfn),
        }
    }

    fn visibility(&self, gfn: Gfn) -> Visibility {
        self.guest
            .mmu()
            .visibility(gfn)
            .unwrap_or(Visibility::Shared)
    }
}

impl<B: Backend> Contender for Faulting<B> {
    type Worker = GuestVcpu<B>;
    type Failure = Unresolved;

    fn worker(&self) -> Result<Self::Worker, Error> {
        self.guest.vcpu()
    }

    #[inline(always)]
    fn resolve(&self, vcpu: &mut Self::Worker, gfn: Gfn) -> Result<(), Unresolved> {
        let fault = self.fault(gfn);
        let outcome = match vcpu.fault(fault) {
            Ok(Outcome::Fixed { .. } | Outcome::Spurious) => return Ok(()),
            other => self.tries.0.persist(vcpu, fault, other)?,
        };
        match outcome {
            Outcome::Fixed { .. } | Outcome::Spurious => Ok(()),
            outcome => Err(Unresolved::Outcome(gfn, outcome)),
        }
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.guest.conditions().calm();
        self.guest.remove_leaves(self.page)?;
        let mmu = self.guest.mmu();
        mmu.zap_leaves(super::guest::SPACE, self.guest.layout().gfns)
            .flush();
        mmu.synchronize();
        Ok(())
    }

    fn translate(&self, gfn: Gfn) -> Option<Translation> {
        let mmu = self.guest.mmu();
        if self.visibility(gfn) == Visibility::Shared {
            let leaf = mmu.translate(super::guest::SPACE, gfn)?;
            return Some(Translation {
                pfn: tdp::Pfn(leaf.pfn.0 + (gfn.0 - leaf.gfn.0)),
                level: leaf.level,
                permitted: leaf.perms == tdp::Perms::RWX,
            });
        }
        [Level::L1, Level::L2].into_iter().find_map(|level| {
            let place = EntryPlace {
                as_id: super::guest::SPACE,
                gfn: level.align_down(gfn),
                level,
            };
            match self.guest.backend().inspect(place) {
                Inspected::Leaf { pfn, blocked, .. } => Some(Translation {
                    pfn: tdp::Pfn(pfn.0 + (gfn.0 - place.gfn.0)),
                    level,
                    permitted: !blocked,
                }),
                _ => None,
            }
        })
    }

    fn leaves(&self) -> Option<u64> {
        Some(self.guest.mmu().stats().pages.iter().sum())
    }
}
