//! The library as a contender: its whole fault and its bare map, with tables in place or without any.

use crate::baseline::host::Backing;
use crate::race::{Contender, Footprint, Translation};
use crate::report::Error;
use std::marker::PhantomData;
use std::sync::{Arc, OnceLock};
use tdp::protected::Unprotected;
use tdp::{
    Access, AdBits, AddressSpaceId, Fault, FaultError, FlushRequest, Host, LinearBacking,
    LoadedRoot, Lookup, Mapping, MmapPool, Mmu, MmuBuilder, OutOfFrames, Outcome, Perms,
    PoolConfig, ProtectedTable, Slot, SoftwareHost, TableMemory, TlbTracker, Vcpu,
};
use tdp_arch::walker::{
    ConfigError, EptConfig, EptFault, EptWalker, GuestAccess, NptConfig, NptFault, NptWalker,
    Permissions, ReadOnly, Walker,
};
use tdp_arch::{Ept, Format, Gfn, Level, Npt, PAGE_SIZE, Pfn};

/// Bits of physical address of the processor that is meant.
pub(crate) const PHYSICAL_BITS: u32 = tdp_arch::addr::MAX_PHYSICAL_BITS;
/// The first table frame. Guest memory lies elsewhere, so that a table taken for a page or the reverse is seen.
pub(crate) const POOL_BASE: Pfn = Pfn(1 << 20);
/// Times that a fault may be told to try again before the run is given up.
pub(crate) const RETRIES: u32 = 1 << 20;

/// A format with its page walker.
pub trait Walked: Format {
    /// The processor's walk of this format.
    type Walker: Walker<Fault: Send> + Copy + std::fmt::Debug + Send + Sync + 'static;

    /// A walker of trees with a root of level `root`, with every page size. With [`AdBits::Software`] it keeps no accessed
    /// and dirty bits, if the processor can be told so.
    ///
    /// # Errors
    ///
    /// If there are no such trees.
    fn walker(root: Level, ad_bits: AdBits) -> Result<Self::Walker, ConfigError>;

    /// What the exit handler of an embedder sees of a fault: the raw code that [`Format::fault_code`] reads, or `None`
    /// for an exit that has none.
    fn raw_code(fault: <Self::Walker as Walker>::Fault) -> Option<u64>;
}

impl Walked for Ept {
    type Walker = EptWalker;

    fn walker(root: Level, ad_bits: AdBits) -> Result<EptWalker, ConfigError> {
        EptWalker::new(EptConfig {
            root_level: root,
            physical_bits: PHYSICAL_BITS,
            accessed_dirty: ad_bits == AdBits::Processor,
            ..EptConfig::default()
        })
    }

    fn raw_code(fault: EptFault) -> Option<u64> {
        match fault {
            EptFault::Violation(violation) => Some(violation.qualification),
            EptFault::Misconfiguration { .. } => None,
        }
    }
}

impl Walked for Npt {
    type Walker = NptWalker;

    fn walker(root: Level, _ad_bits: AdBits) -> Result<NptWalker, ConfigError> {
        NptWalker::new(NptConfig {
            root_level: root,
            physical_bits: PHYSICAL_BITS,
            ..NptConfig::default()
        })
    }

    fn raw_code(fault: NptFault) -> Option<u64> {
        Some(fault.exit_info_1)
    }
}

/// Guest memory and table memory of an MMU.
#[derive(Clone, Copy, Debug)]
pub struct OurSetup {
    /// Guest memory, one slot.
    pub backing: Backing,
    /// Level of the root table.
    pub root: Level,
    /// Table frames that may be in use at one time.
    pub frames: usize,
    /// Advise huge pages for table memory.
    pub huge: bool,
}

/// A software host that tells how many frames were still out of its pool when it went away.
#[derive(Debug)]
pub struct BenchHost<P: ProtectedTable = Unprotected> {
    inner: SoftwareHost<P>,
    left: Arc<OnceLock<usize>>,
}

impl<P: ProtectedTable> BenchHost<P> {
    /// `inner`, which tells `left` when it goes away.
    pub fn new(inner: SoftwareHost<P>, left: Arc<OnceLock<usize>>) -> Self {
        Self { inner, left }
    }

    /// Table frames that may be in use at one time.
    pub fn frames_limit(&self) -> usize {
        self.inner.frames().limit()
    }

    /// Which software vCPUs are in the guest.
    pub fn tlb(&self) -> &TlbTracker {
        self.inner.tlb()
    }
}

impl<P: ProtectedTable> Host for BenchHost<P> {
    type Frames = MmapPool;
    type Backing = LinearBacking;
    type Protected = P;

    #[inline(always)]
    fn protected(&self) -> &P {
        self.inner.protected_table()
    }

    #[inline(always)]
    fn frames(&self) -> &MmapPool {
        self.inner.frames()
    }

    #[inline(always)]
    fn lookup(&self, slot: &Slot<LinearBacking>, gfn: Gfn, access: Access) -> Lookup {
        self.inner.lookup(slot, gfn, access)
    }

    #[inline(always)]
    fn lookup_private(&self, slot: &Slot<LinearBacking>, gfn: Gfn) -> Lookup {
        self.inner.lookup_private(slot, gfn)
    }

    fn flush(&self, request: &FlushRequest) {
        self.inner.flush(request);
    }
}

impl<P: ProtectedTable> Drop for BenchHost<P> {
    fn drop(&mut self) {
        // The MMU is gone and can give nothing back any more. Set once: a host is dropped once.
        let _ = self.left.set(self.inner.frames().allocated());
    }
}

/// What is timed.
pub trait Operation: Sync {
    /// Has `vcpu` resolve a write to `gfn`.
    ///
    /// # Errors
    ///
    /// As the library's.
    fn perform<F: Format>(
        vcpu: &mut Vcpu<F, BenchHost>,
        gfn: Gfn,
        setup: &OurSetup,
    ) -> Result<Outcome, FaultError>;
}

/// [`Vcpu::fault`].
#[derive(Debug)]
pub struct WholeFault;

impl Operation for WholeFault {
    #[inline(always)]
    fn perform<F: Format>(
        vcpu: &mut Vcpu<F, BenchHost>,
        gfn: Gfn,
        _setup: &OurSetup,
    ) -> Result<Outcome, FaultError> {
        vcpu.fault(Fault::write(gfn.address()))
    }
}

/// [`Vcpu::map`].
#[derive(Debug)]
pub struct BareMap;

impl Operation for BareMap {
    #[inline(always)]
    fn perform<F: Format>(
        vcpu: &mut Vcpu<F, BenchHost>,
        gfn: Gfn,
        setup: &OurSetup,
    ) -> Result<Outcome, FaultError> {
        let pfn = setup.backing.pfn_of(gfn);
        vcpu.map(
            gfn,
            Mapping::memory(pfn, setup.backing.level, Perms::RWX),
            Access::Write,
        )
    }
}

/// What is there when a lap starts; no page is mapped in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tables {
    /// Every table that the lap needs.
    Warm,
    /// No table but the root.
    Fresh,
}

/// Why the library did not resolve a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OurFailure {
    /// It needed a table and had no frame for it.
    #[error(transparent)]
    OutOfFrames(OutOfFrames),
    /// It was resolved to something that no page of a slot can be.
    #[error("a fault on memory was answered by {0:?}")]
    Outcome(Outcome),
}

impl From<OurFailure> for Error {
    fn from(failure: OurFailure) -> Self {
        Error::run("tdp", failure)
    }
}

/// The library.
#[derive(Debug)]
pub struct Ours<F: Walked, O> {
    mmu: Mmu<F, BenchHost>,
    setup: OurSetup,
    tables: Tables,
    root: LoadedRoot,
    walker: F::Walker,
    left: Arc<OnceLock<usize>>,
    operation: PhantomData<O>,
}

impl<F: Walked, O: Operation> Ours<F, O> {
    /// An MMU with one slot and nothing mapped.
    ///
    /// # Errors
    ///
    /// What the library refuses, each with its own message.
    pub fn new(setup: OurSetup, tables: Tables) -> Result<Self, Error> {
        Self::with(setup, tables, AdBits::Processor, |builder| builder)
    }

    /// The same with what `configure` makes of the builder; the accessed and dirty bits are kept as `ad_bits` says.
    ///
    /// # Errors
    ///
    /// What the library refuses, each with its own message.
    pub fn with(
        setup: OurSetup,
        tables: Tables,
        ad_bits: AdBits,
        configure: impl FnOnce(MmuBuilder<F, BenchHost>) -> MmuBuilder<F, BenchHost>,
    ) -> Result<Self, Error> {
        let failed = |e: Box<dyn std::error::Error + Send + Sync>| Error::run("tdp", e);
        let config = PoolConfig {
            frames: setup.frames,
            base: POOL_BASE,
            huge_pages: setup.huge,
        };
        let pool = MmapPool::new(config).map_err(|e| failed(e.into()))?;
        pool.populate();
        let left = Arc::new(OnceLock::new());
        let host = BenchHost::new(SoftwareHost::new(pool), left.clone());
        let builder = Mmu::<F, _>::builder(host)
            .levels(setup.root)
            .physical_bits(PHYSICAL_BITS)
            .ad_bits(ad_bits);
        let mmu = configure(builder).build().map_err(|e| failed(e.into()))?;
        let Backing { gfns, pfn, level } = setup.backing;
        mmu.slots()
            .insert(Slot::new(gfns, LinearBacking::new(pfn, level)))
            .map_err(|e| failed(e.into()))?;
        let mut vcpu = mmu.vcpu().map_err(|e| failed(e.into()))?;
        let root = vcpu.load_root().map_err(|e| failed(e.into()))?;
        drop(vcpu);
        let walker = F::walker(setup.root, ad_bits).map_err(|e| failed(e.into()))?;
        Ok(Self {
            mmu,
            setup,
            tables,
            root,
            walker,
            left,
            operation: PhantomData,
        })
    }

    /// Tries again for as long as that is what the library says.
    #[cold]
    #[inline(never)]
    fn resolve_slowly(
        &self,
        vcpu: &mut Vcpu<F, BenchHost>,
        gfn: Gfn,
        mut outcome: Result<Outcome, FaultError>,
    ) -> Result<(), OurFailure> {
        for _ in 0..RETRIES {
            match outcome {
                Ok(Outcome::Fixed { .. } | Outcome::Spurious) => return Ok(()),
                Ok(Outcome::Retry(_)) => std::hint::spin_loop(),
                _ => break,
            }
            outcome = O::perform(vcpu, gfn, &self.setup);
        }
        Err(match outcome {
            Ok(outcome) => OurFailure::Outcome(outcome),
            Err(FaultError::OutOfFrames) => OurFailure::OutOfFrames(OutOfFrames {
                limit: self.setup.frames,
            }),
        })
    }

    /// Its MMU.
    pub fn mmu(&self) -> &Mmu<F, BenchHost> {
        &self.mmu
    }

    /// Its first root.
    pub fn root(&self) -> LoadedRoot {
        self.root
    }
}

impl<F: Walked, O: Operation> Contender for Ours<F, O> {
    type Worker = Vcpu<F, BenchHost>;
    type Failure = OurFailure;

    fn worker(&self) -> Result<Self::Worker, Error> {
        self.mmu.vcpu().map_err(|e| Error::run("tdp", e))
    }

    #[inline(always)]
    fn resolve(&self, vcpu: &mut Self::Worker, gfn: Gfn) -> Result<(), OurFailure> {
        match O::perform(vcpu, gfn, &self.setup) {
            Ok(Outcome::Fixed { .. } | Outcome::Spurious) => Ok(()),
            other => self.resolve_slowly(vcpu, gfn, other),
        }
    }

    fn reset(&mut self) -> Result<(), Error> {
        let everything = Gfn(0)..self.setup.root.gfn_limit();
        match self.tables {
            Tables::Warm => self
                .mmu
                .zap_leaves(AddressSpaceId::default(), everything)
                .flush(),
            Tables::Fresh => self.mmu.zap(AddressSpaceId::default(), everything).flush(),
        };
        self.mmu.synchronize();
        Ok(())
    }

    fn translate(&self, gfn: Gfn) -> Option<Translation> {
        let memory = ReadOnly(TableMemory::new(self.mmu.host().frames()));
        let found = self
            .walker
            .walk(&memory, self.root.hpa, gfn.address(), GuestAccess::Write)
            .ok()?;
        // Without mode-based execute control a walk tells one permission to execute, not two.
        let permitted = found
            .permissions
            .contains(Permissions::READ | Permissions::WRITE | Permissions::EXEC);
        Some(Translation {
            pfn: found.hpa.pfn(),
            level: found.level,
            permitted,
        })
    }

    fn leaves(&self) -> Option<u64> {
        Some(self.mmu.stats().pages.iter().sum())
    }

    fn footprint(&self) -> Option<Footprint> {
        let tables = self.mmu.stats().tables + 1;
        let pool = self.mmu.host().frames();
        Some(Footprint {
            tables,
            table_bytes: tables * PAGE_SIZE,
            metadata_bytes: (pool.limit() * Mmu::<F, BenchHost>::metadata_per_table()) as u64,
            spare_bytes: (pool.allocated() as u64).saturating_sub(tables) * PAGE_SIZE,
        })
    }

    fn leaked(self) -> u64 {
        let left = self.left.clone();
        drop(self);
        // A host that still lives after its MMU has leaked as a whole.
        left.get().map_or(u64::MAX, |&frames| frames as u64)
    }
}

#[cfg(test)]
mod tests;
