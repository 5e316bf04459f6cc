//! The vCPUs: software processors whose TLBs keep what is not flushed, and who look at whose memory they reach.

use super::world::{Random, StressHost, World};
use crate::ours::Walked;
use crate::report::Error;
use crate::sweeping::guest_access;
use crate::sync::Ordering;
use serde::Serialize;
use tdp::{
    Access, Fault, FaultError, Gfn, GfnRange, Gpa, LoadedRoot, Outcome, TableMemory, TlbVcpu, Vcpu,
    Visibility,
};
use tdp_arch::Level;
use tdp_arch::cpu::SoftwareVcpu;
use tdp_arch::walker::{Translation, WalkError};

/// Most accesses between two looks at whether the host wants the vCPU out.
const ACCESSES_PER_ENTRY: usize = 64;
/// Times that an access of [`Guest::touch_all`] may be told to try again.
const PATIENCE: u32 = 1 << 20;

/// What a vCPU has done.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Counts {
    pub(super) accesses: u64,
    pub(super) writes: u64,
    pub(super) faults: u64,
    pub(super) fixed: u64,
    pub(super) spurious: u64,
    pub(super) retries: u64,
    pub(super) emulated: u64,
    pub(super) starved: u64,
    pub(super) flushes: u64,
    pub(super) reloads: u64,
}

impl Counts {
    pub(super) fn add(&mut self, other: &Self) {
        self.accesses += other.accesses;
        self.writes += other.writes;
        self.faults += other.faults;
        self.fixed += other.fixed;
        self.spurious += other.spurious;
        self.retries += other.retries;
        self.emulated += other.emulated;
        self.starved += other.starved;
        self.flushes += other.flushes;
        self.reloads += other.reloads;
    }
}

/// One vCPU.
pub(super) struct Guest<'w, F: Walked> {
    world: &'w World<F>,
    vcpu: Vcpu<F, StressHost>,
    software: SoftwareVcpu<F::Walker>,
    tlb: TlbVcpu,
    root: LoadedRoot,
    random: Random,
    pub(super) counts: Counts,
}

impl<'w, F: Walked> Guest<'w, F> {
    /// One more vCPU, outside.
    ///
    /// # Errors
    ///
    /// If there is no frame for its root.
    pub(super) fn new(world: &'w World<F>, seed: u64) -> Result<Self, Error> {
        let mut vcpu = world.mmu.vcpu().map_err(|e| Error::run("tdp", e))?;
        let root = vcpu.load_root().map_err(|e| Error::run("tdp", e))?;
        let walker = F::walker(Level::L4, vcpu.ad_bits()).map_err(|e| Error::run("walker", e))?;
        Ok(Self {
            tlb: world.mmu.host().tlb.vcpu(),
            world,
            vcpu,
            software: SoftwareVcpu::new(walker, root.hpa),
            root,
            random: Random(seed),
            counts: Counts::default(),
        })
    }

    /// Runs the guest until the run is over.
    pub(super) fn run(mut self) -> Counts {
        while !self.world.is_over() {
            self.world.park();
            if !self.enter() {
                continue;
            }
            let fault = self.accesses();
            self.tlb.exit();
            // With more threads than processors this is the moment to be taken off one: nobody waits for a vCPU that is out.
            if self.random.once_in(8) {
                std::thread::yield_now();
            }
            if let Some(fault) = fault {
                let _ = self.handle(fault);
            }
            if self.random.once_in(64) {
                self.prefault();
            }
        }
        self.counts
    }

    /// Goes into the guest under the root of the moment; `false` if it has to turn back.
    fn enter(&mut self) -> bool {
        let Ok(root) = self.vcpu.load_root() else {
            self.starve();
            return false;
        };
        if root.generation != self.root.generation {
            self.software.set_root(root.hpa);
            self.software.flush_all();
            self.root = root;
            self.counts.reloads += 1;
        }
        if self.tlb.enter() {
            self.software.flush_all();
            self.counts.flushes += 1;
        }
        if self.vcpu.is_root_obsolete() {
            self.tlb.exit();
            return false;
        }
        true
    }

    fn accesses(&mut self) -> Option<Fault> {
        for _ in 0..ACCESSES_PER_ENTRY {
            if self.tlb.kicked() {
                return None;
            }
            let gfn = self.somewhere();
            let access = match self.random.below(8) {
                0..4 => Access::Read,
                4..7 => Access::Write,
                _ => Access::Execute,
            };
            let gpa = Gpa(gfn.address().0 + self.random.below(512) * 8);
            if let Err(fault) = self.access(gpa, access) {
                return fault;
            }
        }
        None
    }

    /// One access, inside. What it ended in if it did not get through: a fault, or nothing that can be resolved.
    fn access(&mut self, gpa: Gpa, access: Access) -> Result<(), Option<Fault>> {
        let memory = TableMemory::new(&self.world.mmu.host().frames);
        let answer = self.software.access(&memory, gpa, guest_access(access));
        self.counts.accesses += 1;
        match answer {
            Ok(found) => {
                self.check(gpa.gfn(), access, found);
                Ok(())
            }
            Err(WalkError::Fault(fault)) => Err(Some(match F::raw_code(fault) {
                Some(raw) => Fault::from_code(F::fault_code(raw), gpa),
                None => Fault::new(gpa, access),
            })),
            Err(WalkError::Abort(_)) => {
                self.world.verdict.stale.fetch_add(1, Ordering::Relaxed);
                Err(None)
            }
        }
    }

    /// The guest got through: the frame must be the page's own, now, while the vCPU is in the guest.
    fn check(&mut self, gfn: Gfn, access: Access, found: Translation) {
        let world = self.world;
        let Some(page) = world.homes.page(gfn) else {
            return;
        };
        let pfn = found.hpa.pfn();
        let mut stale = !world.homes.is_owned(pfn, page);
        if access.is_write() {
            world.homes.write(pfn);
            self.counts.writes += 1;
        }
        if world.coming.contains(gfn) {
            // Read last: what it says was so when the translation was used.
            let standing = world.standing();
            stale |=
                !standing.changing && (standing.gone || standing.read_only && access.is_write());
        }
        world
            .verdict
            .stale
            .fetch_add(u64::from(stale), Ordering::Relaxed);
    }

    /// A guest frame: mostly one of few, so that a translation is used again and again.
    fn somewhere(&mut self) -> Gfn {
        let pages = self.world.gfns.pages();
        let page = if self.random.once_in(4) {
            self.random.below(pages)
        } else {
            let near = self.random.below(pages / 128) * 128;
            near + self.random.below(2)
        };
        Gfn(self.world.gfns.start.0 + page)
    }

    fn handle(&mut self, mut fault: Fault) -> Option<Outcome> {
        self.counts.faults += 1;
        if self.random.once_in(4) {
            fault = fault.max_level(Level::L1);
        }
        match self.vcpu.fault(fault) {
            Ok(outcome) => {
                match outcome {
                    Outcome::Fixed { .. } => self.counts.fixed += 1,
                    Outcome::Spurious => self.counts.spurious += 1,
                    Outcome::Retry(_) => self.counts.retries += 1,
                    _ => self.counts.emulated += 1,
                }
                Some(outcome)
            }
            Err(FaultError::OutOfFrames) => {
                self.starve();
                None
            }
        }
    }

    /// Maps some pages before the guest needs them.
    fn prefault(&mut self) {
        let start = self.somewhere();
        let end = Gfn((start.0 + 16).min(self.world.gfns.end.0));
        if self
            .vcpu
            .prefault(GfnRange { start, end }, Visibility::Shared)
            .is_err()
        {
            self.starve();
        }
    }

    fn starve(&mut self) {
        self.counts.starved += 1;
        std::thread::yield_now();
    }

    /// Accesses every page of a range once, in order; `Err` is a page that cannot be reached.
    pub(super) fn touch_all(&mut self, gfns: GfnRange, access: Access) -> Result<(), Gfn> {
        for number in gfns.start.0..gfns.end.0 {
            let gfn = Gfn(number);
            let mut tries = 0;
            loop {
                tries += 1;
                if tries > PATIENCE {
                    return Err(gfn);
                }
                if !self.enter() {
                    continue;
                }
                let answer = self.access(gfn.address(), access);
                self.tlb.exit();
                match answer {
                    Ok(()) => break,
                    Err(Some(fault)) => drop(self.handle(fault)),
                    Err(None) => return Err(gfn),
                }
            }
        }
        Ok(())
    }
}
