//! The life of a confidential guest: building its image, letting it run, taking it apart.
//!
//! Protocol. While the guest is built, one [`PrivateImage`] puts pages with content in, one after the other, so that the
//! module measures them in that order; each is a hand-off like a fault's. [`PrivateImage::finalise`] moves the guest to
//! *running*, from which on private faults are resolved. When its key has been released the embedder says so, and everything
//! is reclaimed, a call a page, without block or ticket.

use crate::confidential::Phase;
use crate::fault::{FaultError, Outcome};
use crate::host::{AddressSpaceId, Host, Lookup, Mapping};
use crate::mmu::{Mmu, MmuError, Shared};
use crate::private_fault::Origin;
use crate::protected::{Content, Failure, HandOffCause, Inspected, ProtectedTable};
use crate::range::{ConvertError, RemovalError, Removed};
use crate::vcpu::Vcpu;
use tdp_arch::{Format, Gfn, GfnRange, Level, Perms, Pfn};

/// A page could not be put into the image of a confidential guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The guest is not being built (any more).
    #[error("no image can be built: the guest is {phase:?}")]
    Phase {
        /// Where it is in its life.
        phase: Phase,
    },
    /// The guest has no private half.
    #[error("the guest has no private half")]
    NotConfidential,
    /// No root.
    #[error(transparent)]
    Mmu(#[from] MmuError),
    /// No frame for a table or its twin.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// The frame cannot hold the page: it is shared, in no slot, or holds one already.
    #[error("frame {gfn} cannot take a page: {outcome:?}")]
    Frame {
        /// The guest frame.
        gfn: Gfn,
        /// What a fault there comes to.
        outcome: Outcome,
    },
    /// The module would not let the guest run.
    #[error("the module did not finalise the guest: {0}")]
    Finalise(HandOffCause),
}

/// The image of a confidential guest in the making; see [`Mmu::build_private`].
#[derive(Debug)]
pub struct PrivateImage<F: Format, H: Host> {
    vcpu: Vcpu<F, H>,
}

impl<F: Format, H: Host> PrivateImage<F, H> {
    /// Gives the host's page `page` to the guest at `gfn`, with the content of the host's page `source`. Pages are measured
    /// in the order of the calls.
    ///
    /// # Errors
    ///
    /// [`ImageError`]; nothing changed.
    pub fn add(&mut self, gfn: Gfn, page: Pfn, source: Pfn) -> Result<(), ImageError> {
        let mapping = Mapping::memory(page, Level::L1, Perms::RWX);
        if gfn >= self.vcpu.core.ctx.root.limit() {
            let outcome = Outcome::MemoryFault(crate::fault::MemoryFault::BeyondWidth);
            return Err(ImageError::Frame { gfn, outcome });
        }
        let origin = Origin::Image(Lookup::Mapped(mapping), Content::Measured { source });
        match self.vcpu.fault_private(gfn, Level::L1, origin)? {
            Outcome::Fixed { .. } => Ok(()),
            outcome => Err(ImageError::Frame { gfn, outcome }),
        }
    }

    /// Ends the building: the guest can run.
    ///
    /// # Errors
    ///
    /// [`ImageError::Finalise`]: the image can be worked on. [`ImageError::Phase`] if it was finalised before.
    pub fn finalise(&mut self) -> Result<(), ImageError> {
        self.vcpu.core.ctx.shared.finalise()
    }
}

/// Whether the protected table equals the private one. Means something at quiet moments only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProtectedAudit {
    /// Entries compared.
    pub compared: u64,
    /// Leaves among them.
    pub leaves: u64,
    /// Tables among them.
    pub tables: u64,
    /// Entries that differ.
    pub different: u64,
    /// The first of them: where, and what the module says.
    pub first: Option<(crate::EntryPlace, Inspected)>,
}

impl<F: Format, H: Host> Shared<F, H> {
    fn finalise(&self) -> Result<(), ImageError> {
        let confidential = self
            .confidential
            .as_deref()
            .ok_or(ImageError::NotConfidential)?;
        let phase = confidential.phase();
        if phase != Phase::Building {
            return Err(ImageError::Phase { phase });
        }
        let table = self.host.protected();
        let mut pause = tdp_rcu::sync::Pause::new();
        let done = loop {
            match table.finalise() {
                Ok(()) => break Ok(()),
                Err(Failure::Busy { .. } | Failure::Restart) if !pause.is_over() => pause.wait(),
                Err(Failure::NeedPages(pages)) if !pause.is_over() => {
                    if table.donate(pages).is_err() {
                        break Err(HandOffCause::OutOfFrames);
                    }
                    pause.wait();
                }
                Err(Failure::NeedPages(_)) => break Err(HandOffCause::OutOfFrames),
                Err(Failure::Busy { .. } | Failure::Restart) => break Err(HandOffCause::Busy),
                Err(Failure::Refused(code)) => break Err(HandOffCause::Refused(code)),
                Err(_) => break Err(HandOffCause::Fatal),
            }
        };
        if let Err(cause) = done {
            self.lose_if(cause);
            return Err(ImageError::Finalise(cause));
        }
        confidential.advance(Phase::Running);
        Ok(())
    }

    fn audit_protected(&self, as_id: AddressSpaceId) -> ProtectedAudit {
        use crate::frozen::EntryPlace;
        use crate::handoff::is_blocked;
        use crate::iter::TdpIter;
        let mut audit = ProtectedAudit::default();
        let Some(root) = self.roots.private(as_id) else {
            return audit;
        };
        let needs_link = self.host.protected().capabilities().needs_link;
        let range = GfnRange {
            start: Gfn(0),
            end: root.limit(),
        };
        let mut visit = self.domain.visit();
        let mut iter = TdpIter::<F, H>::new(&mut visit, &self.host, &root, range, Level::L1);
        while let Some(step) = iter.next() {
            let place = EntryPlace {
                as_id,
                gfn: step.gfn,
                level: step.level,
            };
            let spte = self.stands_for(&step, &root);
            let blocked_here = is_blocked::<F>(spte);
            let found = self.host.protected().inspect(place);
            let same = if F::is_leaf(spte, step.level) {
                audit.leaves += 1;
                matches!(found, Inspected::Leaf { pfn, blocked, .. }
                    if pfn == F::leaf_pfn(spte, step.level) && blocked == blocked_here)
            } else if F::is_mmu_present(spte) {
                audit.tables += 1;
                let twin = self.meta.twin(F::pfn(spte)).is_some();
                !needs_link
                    || (twin
                        && found
                            == (Inspected::Table {
                                blocked: blocked_here,
                            }))
            } else {
                // Where the table above is blocked the module shows nothing, and there must be nothing.
                spte == F::EMPTY && matches!(found, Inspected::Free | Inspected::Unreachable)
            };
            audit.compared += 1;
            if !same {
                audit.different += 1;
                audit.first.get_or_insert((place, found));
            }
        }
        audit
    }
}

impl<F: Format, H: Host> Mmu<F, H> {
    /// Begins to build the image of a confidential guest.
    ///
    /// # Errors
    ///
    /// [`ImageError`] if there is no private half or the guest is past its building.
    pub fn build_private(&self) -> Result<PrivateImage<F, H>, ImageError> {
        match self.phase() {
            Some(Phase::Building) => Ok(PrivateImage { vcpu: self.vcpu()? }),
            Some(phase) => Err(ImageError::Phase { phase }),
            None => Err(ImageError::NotConfidential),
        }
    }

    /// Where a confidential guest is in its life; `None` for another guest.
    pub fn phase(&self) -> Option<Phase> {
        let confidential = self.shared().confidential.as_deref();
        confidential.map(|confidential| confidential.phase())
    }

    /// Takes private memory of a range away while the guest runs, and tables that lie wholly in it. Faults go on meanwhile and
    /// may map frames of the range again.
    ///
    /// # Errors
    ///
    /// [`ConvertError`].
    pub fn zap_private(
        &self,
        as_id: AddressSpaceId,
        range: impl Into<GfnRange>,
    ) -> Result<Removed, ConvertError> {
        let range = range.into();
        self.shared().check_private(as_id, range)?;
        Ok(self.shared().remove_private(as_id, range)?)
    }

    /// Replaces private tables of 4 KiB pages that lie wholly in a range by large leaves, where the module can and the pages
    /// are consecutive.
    ///
    /// # Errors
    ///
    /// [`FoldError`].
    pub fn fold_private(
        &self,
        as_id: AddressSpaceId,
        range: impl Into<GfnRange>,
    ) -> Result<crate::range::Folded, FoldError> {
        let range = range.into();
        self.shared().check_private(as_id, range)?;
        Ok(self.shared().fold_private(as_id, range)?)
    }

    /// Takes everything private back from a guest whose key has been released: one call of the module for each page and each
    /// table. No private fault is resolved any more.
    ///
    /// Waits for faults that began before; must not be called from inside a [`Batch`](crate::Batch) or a host callback.
    ///
    /// # Errors
    ///
    /// [`RemovalError`] if the module did not give some pages back. They are leaked; nothing is mapped any more.
    pub fn reclaim_private(&self) -> Result<Removed, RemovalError> {
        let shared = self.shared();
        let Some(confidential) = shared.confidential.as_deref() else {
            return Ok(Removed::default());
        };
        confidential.advance(Phase::Dead);
        // The fence inside pairs with the one at the start of every critical section: a fault that is not waited for began
        // later and sees the phase.
        shared.domain.synchronize_sections();
        let range = GfnRange {
            start: Gfn(0),
            end: shared.roots.limit(),
        };
        shared.remove_private_everywhere(range)
    }

    /// Makes a range private or shared, while faults run, in all address spaces: `as_id` is one of them. What the other half
    /// maps there is taken away: private memory loses its content.
    ///
    /// Waits for faults that began before; must not be called from inside a [`Batch`](crate::Batch) or a host callback.
    ///
    /// # Errors
    ///
    /// [`ConvertError`].
    pub fn convert(
        &self,
        as_id: AddressSpaceId,
        range: impl Into<GfnRange>,
        to: crate::Visibility,
    ) -> Result<Removed, ConvertError> {
        self.shared().convert(as_id, range.into(), to)
    }

    /// Whether a frame of a confidential guest is private; `None` for another guest.
    pub fn visibility(&self, gfn: Gfn) -> Option<crate::Visibility> {
        self.shared().visibility(gfn)
    }

    /// Tells an access apart as a fault would, without resolving it.
    pub fn explain(&self, fault: crate::Fault) -> AccessInfo {
        use crate::Visibility::{Private, Shared};
        let Some(confidential) = self.shared().confidential.as_deref() else {
            let gfn = fault.gpa.gfn();
            return AccessInfo {
                gfn,
                wanted: None,
                found: None,
                block: Level::L1.range(gfn),
            };
        };
        let (gfn, private) = confidential.route(fault.gpa, fault.private);
        let attributes = &confidential.attributes;
        AccessInfo {
            gfn,
            wanted: Some(if private { Private } else { Shared }),
            found: Some(attributes.get(gfn)),
            block: attributes.largest_level(gfn, Level::L3).range(gfn),
        }
    }

    /// Calls `each` for every longest run of frames of one visibility in a range, in order. Conversions may run meanwhile.
    /// Calls nothing for a guest without a private half.
    pub fn visibilities(
        &self,
        range: impl Into<GfnRange>,
        each: impl FnMut(GfnRange, crate::Visibility),
    ) {
        if let Some(confidential) = self.shared().confidential.as_deref() {
            confidential.attributes.ranges(range.into(), each);
        }
    }

    /// Frames of a range that are private.
    pub fn private_frames(&self, range: impl Into<GfnRange>) -> u64 {
        let confidential = self.shared().confidential.as_deref();
        confidential.map_or(0, |it| it.attributes.private_count(range.into()))
    }

    /// Allows large private leaves again around a frame for which the guest once
    /// [accepted](crate::Fault::max_level) a small one.
    pub fn allow_huge(&self, gfn: Gfn) {
        if let Some(confidential) = self.shared().confidential.as_deref() {
            confidential.attributes.allow_huge(gfn);
        }
    }

    /// Compares every entry of the private tree with the protected table.
    pub fn audit_protected(&self, as_id: AddressSpaceId) -> ProtectedAudit {
        self.shared().audit_protected(as_id)
    }
}

/// What an access was, and what memory it met: for the embedder that gets a [`MemoryFault`](crate::MemoryFault).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AccessInfo {
    /// Guest frame, without the bit that makes an address shared.
    pub gfn: Gfn,
    /// What the access was to; `None` for a guest without a private half.
    pub wanted: Option<crate::Visibility>,
    /// What the frame is.
    pub found: Option<crate::Visibility>,
    /// The largest block of 4 KiB, 2 MiB or 1 GiB around the frame that is the same throughout.
    pub block: GfnRange,
}

/// Private memory could not be folded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FoldError {
    /// The range makes no sense.
    #[error(transparent)]
    Range(#[from] ConvertError),
    /// The module gave up in the middle; the entry is as it was.
    #[error(transparent)]
    HandOff(#[from] crate::protected::HandOffError),
}
