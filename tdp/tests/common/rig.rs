//! An MMU on a host that a test writes, software vCPUs to run on it, and the guard that nothing leaks.

use super::host::{SharedPool, TestHost};
use super::processor::{Processor, ProcessorSetup, Report, guest_access, perms};
use std::sync::mpsc::Receiver;
use std::time::Duration;
use tdp::{
    Access, AdBits, DirtyTracking, Fault, Gfn, Gpa, Host, Hpa, Level, LoadedRoot, MmapPool, Mmu,
    MmuBuilder, Outcome, Perms, Pfn, PoolConfig, SlotRemoval, Spte, TableMemory, TlbVcpu, Vcpu,
};
use tdp_arch::cpu::SoftwareVcpu;
use tdp_arch::walker::{PhysicalMemory, ReadOnly, WalkError, Walker};

/// First frame of the pools in tests.
pub(crate) const POOL_BASE: Pfn = Pfn(0x1000);

/// A pool of `frames` frames.
pub(crate) fn pool(frames: usize) -> SharedPool {
    let config = PoolConfig {
        frames,
        base: POOL_BASE,
        huge_pages: false,
    };
    SharedPool::new(MmapPool::new(config).expect("a pool of this size"))
}

/// Asserts, when dropped last, that every frame is back in the pool.
pub(crate) struct NoLeak(pub(crate) SharedPool);

impl Drop for NoLeak {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(self.0.allocated(), 0, "frames leaked");
        }
    }
}

/// An MMU with all that a test wants to see of it. Declare what holds a handle to it, such as a vCPU, after it.
pub(crate) struct Rig<F: Processor> {
    pub(crate) mmu: Mmu<F, TestHost>,
    pub(crate) setup: ProcessorSetup,
    _no_leak: NoLeak,
}

/// How to make a [`Rig`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct RigSetup {
    pub(crate) processor: ProcessorSetup,
    pub(crate) frames: usize,
    pub(crate) address_spaces: u8,
    pub(crate) mmio_caching: bool,
    pub(crate) max_leaf: Level,
    pub(crate) garbage_bound: usize,
    pub(crate) dirty_tracking: DirtyTracking,
    pub(crate) dirty_ring: u32,
    pub(crate) eager_split: bool,
    pub(crate) slot_removal: SlotRemoval,
    pub(crate) slot_generation: u64,
    pub(crate) invalidation_sequence: u64,
}

impl Default for RigSetup {
    fn default() -> Self {
        Self {
            processor: ProcessorSetup::default(),
            frames: 256,
            address_spaces: 2,
            mmio_caching: true,
            max_leaf: Level::L3,
            garbage_bound: 4096,
            dirty_tracking: DirtyTracking::default(),
            dirty_ring: 0,
            eager_split: true,
            slot_removal: SlotRemoval::default(),
            slot_generation: 0,
            invalidation_sequence: 0,
        }
    }
}

impl<F: Processor> Rig<F> {
    pub(crate) fn new() -> Self {
        Self::with(RigSetup::default())
    }

    pub(crate) fn with(setup: RigSetup) -> Self {
        Self::on(pool(setup.frames), setup)
    }

    /// The same with the frames of `pool`, which all are in it: what was mapped once serves many MMUs in turn.
    pub(crate) fn on(pool: SharedPool, setup: RigSetup) -> Self {
        let builder: MmuBuilder<F, TestHost> = Mmu::builder(TestHost::new(pool.clone()));
        let mmu = builder
            .levels(setup.processor.root_level)
            .physical_bits(setup.processor.physical_bits)
            .ad_bits(setup.processor.ad_bits)
            .address_spaces(setup.address_spaces)
            .mmio_caching(setup.mmio_caching)
            .max_leaf(setup.max_leaf)
            .garbage_bound(setup.garbage_bound)
            .dirty_tracking(setup.dirty_tracking)
            .dirty_ring(setup.dirty_ring)
            .eager_split(setup.eager_split)
            .slot_removal(setup.slot_removal)
            .slot_generation(setup.slot_generation)
            .invalidation_sequence(setup.invalidation_sequence)
            .build()
            .expect("a possible set-up");
        Self {
            mmu,
            setup: setup.processor,
            _no_leak: NoLeak(pool),
        }
    }

    pub(crate) fn with_ad_bits(ad_bits: AdBits) -> Self {
        let mut setup = RigSetup::default();
        setup.processor.ad_bits = ad_bits;
        Self::with(setup)
    }

    pub(crate) fn host(&self) -> &TestHost {
        self.mmu.host()
    }

    pub(crate) fn frames(&self) -> &SharedPool {
        self.host().frames()
    }

    pub(crate) fn vcpu(&self) -> Vcpu<F, TestHost> {
        self.mmu.vcpu().expect("a frame for the root")
    }

    /// A processor that runs a guest on `vcpu`.
    pub(crate) fn processor(&self, vcpu: Vcpu<F, TestHost>) -> Cpu<F> {
        Cpu::new(self, vcpu)
    }

    /// What the processor finds at `gpa` under `root`, leaving no trace.
    pub(crate) fn walk(&self, root: LoadedRoot, gpa: Gpa, access: Access) -> Result<Found, Report> {
        let memory = ReadOnly(TableMemory::new(self.frames()));
        let found = F::walker(self.setup).walk(&memory, root.hpa, gpa, guest_access(access));
        match found {
            Ok(found) => Ok(Found {
                pfn: found.hpa.pfn(),
                level: found.level,
                perms: perms(found.permissions),
            }),
            Err(WalkError::Fault(fault)) => Err(F::report(fault)),
            Err(WalkError::Abort(abort)) => panic!("{abort}"),
        }
    }

    /// Asserts that `gfn` translates to `pfn` through a leaf of `level` with exactly `allowed`, by the MMU's own account
    /// and by the processor's for every kind of access.
    pub(crate) fn assert_maps(
        &self,
        vcpu: &mut Vcpu<F, TestHost>,
        gfn: Gfn,
        pfn: Pfn,
        level: Level,
        allowed: Perms,
    ) {
        let leaf = self
            .mmu
            .translate(vcpu.address_space(), gfn)
            .unwrap_or_else(|| panic!("nothing at {gfn}"));
        assert_eq!(leaf.level, level, "level at {gfn}");
        assert_eq!(leaf.gfn, level.align_down(gfn));
        assert_eq!(leaf.pfn.0 + (gfn.0 - leaf.gfn.0), pfn.0, "frame at {gfn}");
        assert_eq!(leaf.perms, F::expressed(allowed), "permissions at {gfn}");
        let root = vcpu.load_root().expect("the root is there");
        for access in ACCESSES {
            let expected = match F::seen(F::expressed(allowed), self.setup.mode_based_execute) {
                Ok(seen) if seen.contains(access.needs()) => Ok((pfn, level)),
                Ok(_) => Err(Report::Denied),
                Err(report) => Err(report),
            };
            let found = self.walk(root, gfn.address(), access);
            assert_eq!(
                found.map(|found| (found.pfn, found.level)),
                expected,
                "{access:?} at {gfn}"
            );
        }
    }

    /// The entry of `gfn` in its table of `level`, if there is one.
    pub(crate) fn entry(&self, root: LoadedRoot, gfn: Gfn, level: Level) -> Option<Spte> {
        let memory = TableMemory::new(self.frames());
        let mut table = root.hpa;
        let mut at = root.level;
        loop {
            let spte = Spte(memory.load(Hpa(table.0 + 8 * at.index(gfn) as u64))?);
            if at == level {
                return Some(spte);
            }
            if !F::is_table(spte) {
                return None;
            }
            table = F::pfn(spte).address();
            at = at.below()?;
        }
    }

    /// Asserts that the MMU maps nothing at `gfn` and that every access faults as `report` says.
    pub(crate) fn assert_absent(&self, vcpu: &mut Vcpu<F, TestHost>, gfn: Gfn, report: Report) {
        assert_eq!(self.mmu.translate(vcpu.address_space(), gfn), None);
        let root = vcpu.load_root().expect("the root is there");
        for access in ACCESSES {
            let found = self.walk(root, gfn.address(), access);
            assert_eq!(found, Err(report), "{access:?} at {gfn}");
        }
    }
}

/// Every kind of access.
pub(crate) const ACCESSES: [Access; 4] = [
    Access::Read,
    Access::Write,
    Access::Execute,
    Access::UserExecute,
];

/// What a walk found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) pfn: Pfn,
    pub(crate) level: Level,
    pub(crate) perms: Perms,
}

/// A software vCPU as an embedder runs it: loads its root, flushes when it is told to, enters, leaves.
pub(crate) struct Cpu<F: Processor> {
    pub(crate) vcpu: Vcpu<F, TestHost>,
    software: SoftwareVcpu<F::Walker>,
    tlb: TlbVcpu,
    root: LoadedRoot,
    frames: SharedPool,
}

/// What an access of the guest came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Touched {
    pub(crate) result: Result<Found, Report>,
    /// The fault as an embedder decodes it; of a misconfiguration only the address is known.
    pub(crate) fault: Option<Fault>,
    /// The tables were looked at: the answer did not come from the TLB.
    pub(crate) walked: bool,
}

impl<F: Processor> Cpu<F> {
    fn new(rig: &Rig<F>, mut vcpu: Vcpu<F, TestHost>) -> Self {
        let root = vcpu.load_root().expect("the root is there");
        Self {
            vcpu,
            software: SoftwareVcpu::new(F::walker(rig.setup), root.hpa),
            tlb: rig.host().tlb().vcpu(),
            root,
            frames: rig.frames().clone(),
        }
    }

    /// Loads the root; what was cached under another one of the same address goes.
    pub(crate) fn load(&mut self, root: LoadedRoot) {
        if root.generation != self.root.generation {
            self.software.set_root(root.hpa);
            self.software.flush_all();
            self.root = root;
        }
    }

    pub(crate) fn root(&self) -> LoadedRoot {
        self.root
    }

    /// One access of the guest under the root that was loaded last.
    pub(crate) fn touch(&mut self, gpa: Gpa, access: Access) -> Touched {
        self.touch_then(gpa, access, |_| {})
    }

    /// The same, and what the guest does with the frame while it is inside.
    pub(crate) fn touch_then(
        &mut self,
        gpa: Gpa,
        access: Access,
        then: impl FnOnce(Pfn),
    ) -> Touched {
        if self.tlb.enter() {
            self.software.flush_all();
        }
        let before = self.software.counters().walks;
        let memory = TableMemory::new(&self.frames);
        let answer = self.software.access(&memory, gpa, guest_access(access));
        if let Ok(found) = &answer {
            then(found.hpa.pfn());
        }
        self.tlb.exit();
        let walked = self.software.counters().walks != before;
        let (result, fault) = match answer {
            Ok(found) => (
                Ok(Found {
                    pfn: found.hpa.pfn(),
                    level: found.level,
                    perms: perms(found.permissions),
                }),
                None,
            ),
            Err(WalkError::Fault(fault)) => {
                let decoded = match F::raw_code(fault) {
                    Some(raw) => Fault::from_code(F::fault_code(raw), gpa),
                    None => Fault::new(gpa, access),
                };
                (Err(F::report(fault)), Some(decoded))
            }
            Err(WalkError::Abort(abort)) => panic!("{abort}"),
        };
        Touched {
            result,
            fault,
            walked,
        }
    }

    /// Loads the root, accesses, and lets the MMU resolve the fault, until the guest gets through or the MMU has another
    /// answer than to enter again.
    pub(crate) fn run(&mut self, gpa: Gpa, access: Access) -> Result<Found, Outcome> {
        for _ in 0..8 {
            let root = self.vcpu.load_root().expect("a frame for the root");
            self.load(root);
            let touched = self.touch(gpa, access);
            let Some(fault) = touched.fault else {
                return Ok(touched.result.expect("a fault would be there"));
            };
            match self.vcpu.fault(fault).expect("frames for tables") {
                Outcome::Fixed { .. } | Outcome::Spurious => {}
                other => return Err(other),
            }
        }
        panic!("{access:?} at {gpa} faults for ever");
    }
}

/// Waits for what another thread has to say. It fails where waiting for ever would hang the test.
pub(crate) fn hear<T>(from: &Receiver<T>) -> T {
    from.recv_timeout(Duration::from_secs(30))
        .expect("the other thread gets there")
}
