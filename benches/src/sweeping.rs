//! Sweeps over mapped memory: what the library, the baselines and the floor do to every leaf of a range, and what the
//! processor does to leaves on the other side.
//!
//! A sweep is a type ([`Kind`]), so that every contender's loop is compiled for it alone. What it makes of an entry is said
//! once, here, and serves the baselines as their work, the floor as the least that the work can be, and everybody as the
//! question that is asked afterwards: is there a leaf left to which it would still do something?

use crate::ours::{Operation, OurFailure, Ours, RETRIES, Walked};
use crate::race::Contender;
use crate::report::Error;
use std::fmt::Debug;
use std::hint;
use tdp::{
    AddressSpaceId, Fault, FaultError, Level, OutOfFrames, Outcome, SlotFlags, SlotId, TableMemory,
};
use tdp_arch::walker::{GuestAccess, Translation, WalkError, Walker};
use tdp_arch::{Access, Format, Gfn, GfnRange, Gpa, Spte};

/// The address space that is swept.
pub const SPACE: AddressSpaceId = AddressSpaceId(0);
/// The slot of an [`Ours`]: its first.
pub const SLOT: SlotId = SlotId(0);

/// What a sweep does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sweep {
    /// Takes write permission away until the next write.
    WriteProtect,
    /// Clears dirty bits, all of a range, as switching a log on does.
    ClearDirty,
    /// Takes write permission away from what masks of 64 frames name, as clearing a log does.
    ProtectMasks,
    /// Clears the dirty bits of what masks of 64 frames name.
    ClearMasks,
    /// Clears accessed bits.
    Age,
    /// Takes permissions away and keeps them, where the processor keeps no accessed bits.
    Track,
    /// Takes the leaf away.
    Zap,
    /// Replaces leaves of 2 MiB by tables.
    Split,
    /// Replaces tables of level 1 by leaves of 2 MiB.
    Collapse,
}

/// A sweep as a type.
pub trait Kind: Copy + Default + Debug + Send + Sync + 'static {
    /// Which it is.
    const SWEEP: Sweep;

    /// What it makes of a leaf of level 1, or of nothing; `None` if it leaves it as it is.
    #[inline(always)]
    fn change<F: Format>(spte: Spte) -> Option<Spte> {
        let without = |bit: u64| (spte.0 & bit != 0).then_some(Spte(spte.0 & !bit));
        match Self::SWEEP {
            Sweep::WriteProtect | Sweep::ProtectMasks => without(F::WRITABLE),
            Sweep::ClearDirty | Sweep::ClearMasks => without(F::DIRTY),
            Sweep::Age => without(F::ACCESSED),
            Sweep::Track => (!F::perms(spte).is_empty()).then(|| F::access_track(spte)),
            Sweep::Zap => (spte != F::EMPTY).then_some(F::EMPTY),
            // Not done leaf by leaf.
            Sweep::Split | Sweep::Collapse => None,
        }
    }
}

macro_rules! kinds {
    ($($name:ident),+) => {
        $(
            #[doc = concat!("[`Sweep::", stringify!($name), "`].")]
            #[derive(Clone, Copy, Debug, Default)]
            pub struct $name;

            impl Kind for $name {
                const SWEEP: Sweep = Sweep::$name;
            }
        )+
    };
}

kinds!(
    WriteProtect,
    ClearDirty,
    ProtectMasks,
    ClearMasks,
    Age,
    Track,
    Zap,
    Split,
    Collapse
);

/// A contender whose memory can be swept while faults on it go on.
pub trait Sweeping: Contender {
    /// Its entries.
    type Format: Walked;

    /// Has ready what a sweep of `gfns` presupposes of them, before they are mapped for it.
    ///
    /// # Errors
    ///
    /// If it is refused.
    fn prepare<K: Kind>(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Sweeps `gfns`, mapped by leaves of level 1 where they are mapped at all, and flushes what has to be flushed.
    ///
    /// # Errors
    ///
    /// If the sweep is refused.
    fn sweep<K: Kind>(&self, gfns: GfnRange) -> Result<(), Error>;

    /// Splits the large leaves of `gfns` and collapses what can be; nothing for a contender that has neither.
    ///
    /// # Errors
    ///
    /// If it is refused.
    fn resize(&self, gfns: GfnRange) -> Result<(), Error> {
        let _ = gfns;
        Ok(())
    }

    /// Adds a slot that nobody uses, and removes it. What a lock stands in for is what a removal does under it: it looks for
    /// what the slot maps, which is nothing.
    ///
    /// # Errors
    ///
    /// If it is refused.
    fn modify_slots(&self, unused: GfnRange) -> Result<(), Error> {
        self.sweep::<Zap>(unused)
    }

    /// One step of the recovery of large pages: takes one in `ratio` of the tables away that stand for a fetch only. A contender
    /// that knows no such tables zaps as much of `gfns`.
    ///
    /// # Errors
    ///
    /// If it is refused.
    fn recover(&self, gfns: GfnRange, ratio: u64) -> Result<(), Error> {
        let end = Gfn(gfns.start.0 + gfns.pages() / ratio.max(1));
        self.sweep::<Zap>(GfnRange { end, ..gfns })
    }

    /// Leaves of `gfns` to which a sweep would do something; of a split or a collapse, frames.
    fn left<K: Kind>(&self, gfns: GfnRange) -> u64;

    /// The processor's own access: a walk, with the bits that it sets.
    ///
    /// # Errors
    ///
    /// What the processor reports.
    fn access<W: Walker>(
        &self,
        walker: &W,
        gpa: Gpa,
        access: GuestAccess,
    ) -> Result<Translation, WalkError<W::Fault>>;

    /// Resolves what the processor reported of an access to `gfn`.
    ///
    /// # Errors
    ///
    /// If it cannot be resolved.
    fn fault(
        &self,
        worker: &mut Self::Worker,
        gfn: Gfn,
        access: Access,
    ) -> Result<(), Self::Failure>;
}

/// The access of a guest that makes an MMU see `access`.
pub const fn guest_access(access: Access) -> GuestAccess {
    match access {
        Access::Read => GuestAccess::Read,
        Access::Write => GuestAccess::Write,
        Access::Execute => GuestAccess::Fetch,
        Access::UserExecute => GuestAccess::UserFetch,
    }
}

impl<F: Walked, O: Operation> Sweeping for Ours<F, O> {
    type Format = F;

    fn prepare<K: Kind>(&self) -> Result<(), Error> {
        let flags = match K::SWEEP {
            Sweep::ProtectMasks | Sweep::ClearMasks => SlotFlags::LOG_DIRTY | SlotFlags::LOG_MANUAL,
            _ => SlotFlags::empty(),
        };
        let slots = self.mmu().slots();
        if slots
            .by_id(SPACE, SLOT)
            .is_some_and(|slot| slot.flags() != flags)
        {
            slots
                .set_flags(SPACE, SLOT, flags)
                .map_err(|e| Error::run("tdp", e))?;
        }
        if matches!(K::SWEEP, Sweep::Split | Sweep::Collapse) {
            // Nothing waits for a grace period in the middle of it.
            self.mmu().synchronize();
        }
        Ok(())
    }

    fn sweep<K: Kind>(&self, gfns: GfnRange) -> Result<(), Error> {
        let mmu = self.mmu();
        match K::SWEEP {
            Sweep::WriteProtect => drop(mmu.write_protect(SPACE, gfns, Level::L1).flush()),
            // What the log begins with, when the dirty bits keep it.
            Sweep::ClearDirty => mmu
                .slots()
                .set_flags(SPACE, SLOT, SlotFlags::LOG_DIRTY)
                .map_err(|e| Error::run("tdp", e))?,
            Sweep::ProtectMasks | Sweep::ClearMasks => {
                let log = mmu
                    .dirty_log(SPACE, SLOT)
                    .map_err(|e| Error::run("tdp", e))?;
                let masks = vec![u64::MAX; log.words()];
                let pending = log.clear(0, &masks);
                let _ = pending.map_err(|e| Error::run("tdp", e))?.flush();
            }
            Sweep::Age | Sweep::Track => drop(mmu.age(SPACE, gfns)),
            Sweep::Zap => drop(mmu.zap_leaves(SPACE, gfns).flush()),
            Sweep::Split => drop(
                mmu.split(SPACE, gfns, Level::L1)
                    .map_err(|e| Error::run("tdp", e))?,
            ),
            Sweep::Collapse => drop(mmu.collapse(SPACE, gfns).flush()),
        }
        Ok(())
    }

    fn resize(&self, gfns: GfnRange) -> Result<(), Error> {
        let mmu = self.mmu();
        // A split that found no frame for a table has left the rest as it was, which is as good here.
        let _ = mmu.split(SPACE, gfns, Level::L1);
        let _ = mmu.collapse(SPACE, gfns).flush();
        Ok(())
    }

    fn recover(&self, gfns: GfnRange, ratio: u64) -> Result<(), Error> {
        let tables = gfns.pages() / Level::L2.pages() / ratio.max(1);
        let limit = usize::try_from(tables.max(1)).unwrap_or(usize::MAX);
        let _ = self.mmu().recover_nx(limit).flush();
        Ok(())
    }

    fn modify_slots(&self, unused: GfnRange) -> Result<(), Error> {
        let slots = self.mmu().slots();
        let backing = tdp::LinearBacking::new(tdp::Pfn(unused.start.0), Level::L1);
        let slot = tdp::Slot::new(unused, backing);
        slots
            .insert(slot)
            .and_then(|id| slots.remove(SPACE, id))
            .map_err(|e| Error::run("slots", e))
    }

    fn left<K: Kind>(&self, gfns: GfnRange) -> u64 {
        let mut left = 0;
        self.mmu().visit_leaves(SPACE, gfns, |leaf| {
            left += match K::SWEEP {
                Sweep::Split if leaf.level > Level::L1 => leaf.level.pages(),
                Sweep::Collapse if leaf.level == Level::L1 => 1,
                _ => u64::from(K::change::<F>(leaf.spte).is_some()),
            };
        });
        left
    }

    #[inline]
    fn access<W: Walker>(
        &self,
        walker: &W,
        gpa: Gpa,
        access: GuestAccess,
    ) -> Result<Translation, WalkError<W::Fault>> {
        use tdp::Host;
        let memory = TableMemory::new(self.mmu().host().frames());
        walker.walk(&memory, self.root().hpa, gpa, access)
    }

    #[inline]
    fn fault(&self, vcpu: &mut Self::Worker, gfn: Gfn, access: Access) -> Result<(), OurFailure> {
        let fault = Fault::new(gfn.address(), access);
        let mut last = vcpu.fault(fault);
        for _ in 0..RETRIES {
            match last {
                Ok(Outcome::Fixed { .. } | Outcome::Spurious) => return Ok(()),
                Ok(Outcome::Retry(_)) => hint::spin_loop(),
                _ => break,
            }
            last = vcpu.fault(fault);
        }
        Err(match last {
            Ok(outcome) => OurFailure::Outcome(outcome),
            Err(FaultError::OutOfFrames) => OurFailure::OutOfFrames(OutOfFrames {
                limit: self.mmu().host().frames_limit(),
            }),
        })
    }
}

/// vCPUs that access memory of a contender as their processors do: walk, and fault where a walk ends in one.
#[derive(Debug)]
pub struct Touching<'c, C: Sweeping> {
    /// Whose memory.
    pub contender: &'c C,
    /// The processor.
    pub walker: &'c <C::Format as Walked>::Walker,
    /// What they do.
    pub access: Access,
}

/// Why an access never succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{access:?} at {gfn} never got through")]
pub struct NeverThrough {
    /// The frame.
    pub gfn: Gfn,
    /// What was tried.
    pub access: Access,
}

impl<C: Sweeping> Contender for Touching<'_, C> {
    type Worker = C::Worker;
    type Failure = Error;

    fn worker(&self) -> Result<C::Worker, Error> {
        self.contender.worker()
    }

    fn resolve(&self, worker: &mut C::Worker, gfn: Gfn) -> Result<(), Error> {
        for _ in 0..RETRIES {
            let access = guest_access(self.access);
            match self.contender.access(self.walker, gfn.address(), access) {
                Ok(_) => return Ok(()),
                Err(WalkError::Fault(fault)) => {
                    let told = C::Format::raw_code(fault);
                    let access = told.map_or(self.access, |raw| C::Format::fault_code(raw).access);
                    self.contender
                        .fault(worker, gfn, access)
                        .map_err(Into::into)?;
                }
                Err(WalkError::Abort(_)) => break,
            }
        }
        let access = self.access;
        Err(Error::run("access", NeverThrough { gfn, access }))
    }

    fn reset(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn translate(&self, gfn: Gfn) -> Option<crate::race::Translation> {
        self.contender.translate(gfn)
    }
}
