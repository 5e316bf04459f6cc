//! The vCPUs: software processors whose TLBs keep what is not flushed, and who look at whose memory they reach.
//!
//! What a vCPU does is drawn before it is done, never after an outcome, so that the same seed has it do the same again.

use super::Random;
use super::chaos::{self, Met};
use super::world::{Flaw, Half, SoakHost, World};
use crate::confidential::layout::SHARED_BIT;
use crate::ours::Walked;
use crate::report::Error;
use crate::sweeping::guest_access;
use crate::sync::Ordering;
use serde::Serialize;
use std::cell::Cell;
use std::time::Duration;
use tdp::protected::tdx::{Accept, Enter, Exit, PageInfo, TdVcpu};
use tdp::{
    Access, AdBits, DirtyTracking, Fault, FaultError, Gfn, GfnRange, Gpa, Hpa, LoadedRoot, Outcome,
    TableMemory, TlbVcpu, Vcpu, Visibility,
};
use tdp_arch::cpu::SoftwareVcpu;
use tdp_arch::walker::{EptWalker, GuestAccess, PhysicalMemory, ReadOnly, Translation, WalkError};
use tdp_arch::{FaultCode, Level};

/// What a vCPU does in a round.
const OPERATIONS: u64 = 220;
/// Times that one access is tried.
const TRIES: u32 = 12;
/// Bit of an EPT entry that says that the page was written.
const EPT_DIRTY: u64 = 1 << 9;

/// What vCPUs have done.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Counts {
    pub(super) entries: u64,
    pub(super) accesses: u64,
    pub(super) private_accesses: u64,
    pub(super) writes: u64,
    pub(super) faults: u64,
    pub(super) fixed: u64,
    pub(super) spurious: u64,
    pub(super) retries: u64,
    pub(super) mmio: u64,
    pub(super) memory_faults: u64,
    pub(super) ring_full: u64,
    pub(super) starved: u64,
    pub(super) unwound: u64,
    pub(super) prefaults: u64,
    pub(super) batches: u64,
    pub(super) accepted: u64,
    pub(super) given_up: u64,
    pub(super) vcpus_dropped: u64,
    pub(super) threads_died: u64,
    pub(super) roots_loaded: u64,
    pub(super) root_kinds_switched: u64,
    pub(super) logged_by_processor: u64,
    pub(super) tables_folded: u64,
}

impl Counts {
    pub(super) fn add(&mut self, other: &Self) {
        self.entries += other.entries;
        self.accesses += other.accesses;
        self.private_accesses += other.private_accesses;
        self.writes += other.writes;
        self.faults += other.faults;
        self.fixed += other.fixed;
        self.spurious += other.spurious;
        self.retries += other.retries;
        self.mmio += other.mmio;
        self.memory_faults += other.memory_faults;
        self.ring_full += other.ring_full;
        self.starved += other.starved;
        self.unwound += other.unwound;
        self.prefaults += other.prefaults;
        self.batches += other.batches;
        self.accepted += other.accepted;
        self.given_up += other.given_up;
        self.vcpus_dropped += other.vcpus_dropped;
        self.threads_died += other.threads_died;
        self.roots_loaded += other.roots_loaded;
        self.root_kinds_switched += other.root_kinds_switched;
        self.logged_by_processor += other.logged_by_processor;
        self.tables_folded += other.tables_folded;
    }
}

/// Table memory that notices when the processor sets a dirty bit, as a processor that logs modifications does.
struct Noting<'a, M> {
    memory: M,
    dirtied: &'a Cell<bool>,
}

impl<M: PhysicalMemory> PhysicalMemory for Noting<'_, M> {
    fn load(&self, hpa: Hpa) -> Option<u64> {
        self.memory.load(hpa)
    }

    fn compare_exchange(&self, hpa: Hpa, current: u64, new: u64) -> Result<(), u64> {
        self.memory.compare_exchange(hpa, current, new)?;
        if new & !current & EPT_DIRTY != 0 {
            self.dirtied.set(true);
        }
        Ok(())
    }
}

/// An access to be made.
#[derive(Clone, Copy)]
struct Want {
    gfn: Gfn,
    offset: u64,
    access: Access,
    /// Taken for the other half than it is.
    wrong_half: bool,
    small: bool,
}

/// A vCPU of a TD with what its processor caches of the private half.
struct Private {
    vcpu: TdVcpu,
    software: SoftwareVcpu<EptWalker>,
}

/// One vCPU.
pub(super) struct Guest<'w, F: Walked, P: Half> {
    world: &'w World<F, P>,
    /// `None` after it died, until there are frames for another.
    vcpu: Option<Vcpu<F, SoakHost<P>>>,
    software: SoftwareVcpu<F::Walker>,
    private: Option<Private>,
    tlb: TlbVcpu,
    root: LoadedRoot,
    inside: bool,
    rip: u64,
    /// What the processor has logged since the last exit.
    modified: Vec<Gpa>,
    pub(super) counts: Counts,
    pub(super) met: Met,
}

impl<'w, F: Walked, P: Half> Guest<'w, F, P> {
    /// One more vCPU, outside.
    ///
    /// # Errors
    ///
    /// If there is no frame for its root.
    pub(super) fn new(world: &'w World<F, P>, td: Option<TdVcpu>) -> Result<Self, Error> {
        let mut vcpu = world.mmu.vcpu().map_err(|e| Error::run("tdp", e))?;
        let root = vcpu.load_root().map_err(|e| Error::run("tdp", e))?;
        let walker = F::walker(Level::L4, vcpu.ad_bits()).map_err(|e| Error::run("walker", e))?;
        let private = td.map(|vcpu| Private {
            software: SoftwareVcpu::new(vcpu.td().walker(), vcpu.td().root()),
            vcpu,
        });
        Ok(Self {
            tlb: world.mmu.host().tlb.vcpu(),
            world,
            vcpu: Some(vcpu),
            software: SoftwareVcpu::new(walker, root.hpa),
            private,
            root,
            inside: false,
            rip: 0,
            modified: Vec::new(),
            counts: Counts::default(),
            met: Met::default(),
        })
    }

    /// One round.
    pub(super) fn run(&mut self, seed: u64) {
        let mut random = Random(seed);
        chaos::begin(random.next(), self.world.plan.rates);
        for _ in 0..OPERATIONS {
            if self.world.broken.load(Ordering::Relaxed) {
                break;
            }
            self.operation(&mut random);
        }
        self.leave();
        self.met.add(&chaos::end());
    }

    fn operation(&mut self, random: &mut Random) {
        let (choice, seed) = (random.below(64), random.next());
        if random.once_in(2500) {
            chaos::stall_next(Duration::from_millis(100 + random.below(1900)));
        }
        match choice {
            0..50 => self.burst(Random(seed)),
            50..54 => self.prefault(Random(seed)),
            54..57 => self.batch(Random(seed)),
            57 => self.look(Random(seed)),
            58 => self.fold(Random(seed)),
            59 => self.switch_roots(),
            60..62 => self.die(),
            _ => self.thread_dies(seed),
        }
        self.leave();
        if random.once_in(4) {
            std::thread::yield_now();
        }
    }

    /// A guest frame: mostly one of few, so that a translation is used again and again, sometimes where the slot was.
    fn somewhere(&self, random: &mut Random) -> Gfn {
        let memory = &self.world.memory;
        let pages = memory.gfns.pages();
        let page = if random.once_in(4) {
            random.below(pages)
        } else {
            random.below(pages / 128) * 128 + random.below(2)
        };
        let elsewhere = random.once_in(16) && !self.world.plan.confidential;
        memory.at(page, memory.standing().moved != elsewhere)
    }

    fn burst(&mut self, mut random: Random) {
        for _ in 0..4 + random.below(24) {
            let gfn = self.somewhere(&mut random);
            let want = Want {
                gfn,
                offset: random.below(512) * 8,
                access: match random.below(8) {
                    0..4 => Access::Read,
                    4..7 => Access::Write,
                    _ => Access::Execute,
                },
                wrong_half: random.once_in(16),
                small: random.once_in(4),
            };
            self.reach(want);
        }
    }

    /// Whether a frame is to be taken for private memory.
    fn is_private(&self, gfn: Gfn, wrong_half: bool) -> bool {
        self.private.is_some()
            && (self.world.mmu.visibility(gfn) == Some(Visibility::Private)) != wrong_half
    }

    fn reach(&mut self, want: Want) {
        let private = self.is_private(want.gfn, want.wrong_half);
        for _ in 0..TRIES {
            if self.inside && self.tlb.kicked() {
                self.leave();
            }
            if !self.inside && !self.enter() {
                continue;
            }
            let reached = if private {
                self.reach_private(want)
            } else {
                self.reach_shared(want)
            };
            match reached {
                Ok(()) => return,
                Err(None) => {}
                Err(Some(fault)) => {
                    self.leave();
                    if !self.handle(fault, want.small) {
                        return;
                    }
                }
            }
        }
        self.counts.given_up += 1;
    }

    /// Goes into the guest under the root of the moment; `false` if it has to turn back.
    fn enter(&mut self) -> bool {
        if self.vcpu.is_none() {
            self.revive();
        }
        let Some(vcpu) = &mut self.vcpu else {
            return false;
        };
        let root = match chaos::survive(|| vcpu.load_root()) {
            Some(Ok(root)) => root,
            Some(Err(_)) => {
                self.starve();
                return false;
            }
            None => {
                self.counts.unwound += 1;
                return false;
            }
        };
        if root.generation != self.root.generation {
            self.adopt(root);
        }
        if self.tlb.enter() {
            self.software.flush_all();
        }
        let obsolete = self.vcpu.as_ref().is_none_or(Vcpu::is_root_obsolete);
        if obsolete || !self.enter_td() {
            self.tlb.exit();
            return false;
        }
        self.inside = true;
        self.counts.entries += 1;
        true
    }

    fn adopt(&mut self, root: LoadedRoot) {
        self.software.set_root(root.hpa);
        self.software.flush_all();
        self.root = root;
        self.counts.roots_loaded += 1;
    }

    fn enter_td(&mut self) -> bool {
        let Some(private) = &mut self.private else {
            return true;
        };
        self.rip += 1;
        match private.vcpu.enter(self.rip) {
            Enter::Inside(entered) => {
                if entered.flush && self.world.flaw != Some(Flaw::KeepsPrivate) {
                    private.software.flush_all();
                }
                true
            }
            Enter::Exited(_) | Enter::Refused(_) => {
                std::thread::yield_now();
                false
            }
        }
    }

    /// Leaves the guest, if it is inside.
    fn leave(&mut self) {
        if !self.inside {
            return;
        }
        if let Some(private) = &mut self.private {
            private.vcpu.exit(Exit::Other { rip: self.rip });
        }
        self.tlb.exit();
        self.inside = false;
        if let Some(vcpu) = &mut self.vcpu
            && !self.modified.is_empty()
        {
            vcpu.log_modified(&self.modified);
            self.counts.logged_by_processor += self.modified.len() as u64;
            self.modified.clear();
        }
    }

    fn shared_gpa(&self, gpa: Gpa) -> Gpa {
        match self.private {
            Some(_) => Gpa(gpa.0 | 1 << SHARED_BIT),
            None => gpa,
        }
    }

    /// One access to shared memory, inside. What it ended in if it did not get through.
    fn reach_shared(&mut self, want: Want) -> Result<(), Option<Fault>> {
        let world = self.world;
        let gpa = self.shared_gpa(Gpa(want.gfn.address().0 + want.offset));
        let dirtied = Cell::new(false);
        let memory = Noting {
            memory: TableMemory::new(&world.mmu.host().frames),
            dirtied: &dirtied,
        };
        let answer = self
            .software
            .access(&memory, gpa, guest_access(want.access));
        if dirtied.get() && world.plan.tracking == DirtyTracking::ModificationLog {
            self.modified.push(gpa);
        }
        self.counts.accesses += 1;
        match answer {
            Ok(found) => {
                self.check_shared(want, found);
                Ok(())
            }
            Err(WalkError::Fault(fault)) => Err(Some(match F::raw_code(fault) {
                Some(raw) => Fault::from_code(code::<F>(raw), gpa),
                None => Fault::new(gpa, want.access),
            })),
            Err(WalkError::Abort(abort)) => {
                world.verdict.violation(format_args!(
                    "the processor ran wild at {}: {abort}",
                    want.gfn
                ));
                Err(None)
            }
        }
    }

    /// The guest got through: the frame must be the page's own, now, while the vCPU is in the guest.
    fn check_shared(&mut self, want: Want, found: Translation) {
        let world = self.world;
        let (gfn, pfn) = (want.gfn, found.hpa.pfn());
        if !world.memory.is_owned(pfn, gfn) {
            world.verdict.violation(format_args!(
                "{:?} at {gfn} reached frame {pfn}, which belongs to somebody else",
                want.access
            ));
        } else if want.access.is_write() {
            world.memory.homes.write(pfn);
            self.counts.writes += 1;
        }
        self.check_standing(gfn, want.access, Visibility::Shared);
    }

    /// What is known of a frame must permit what was done. Read last: what it says was so when the translation was used.
    fn check_standing(&self, gfn: Gfn, access: Access, half: Visibility) {
        let world = self.world;
        let Some((page, moved)) = world.memory.page(gfn) else {
            world
                .verdict
                .violation(format_args!("{access:?} at {gfn}, where nothing ever was"));
            return;
        };
        if !world.memory.logged.contains(gfn) {
            let standing = world.memory.standing();
            let write = access.is_write() && half == Visibility::Shared;
            if !standing.changing
                && (standing.gone || standing.moved != moved || standing.read_only && write)
            {
                world.verdict.violation(format_args!(
                    "{access:?} at {gfn} of a slot that is {standing:?}"
                ));
            }
        }
        if world.plan.confidential && world.memory.half(page).is_some_and(|is| is != half) {
            world
                .verdict
                .violation(format_args!("{access:?} at {gfn} reached it as {half:?}"));
        }
    }

    /// One access to private memory, inside.
    fn reach_private(&mut self, want: Want) -> Result<(), Option<Fault>> {
        let world = self.world;
        let (Some(private), Some(module)) = (&mut self.private, &world.module) else {
            return Err(None);
        };
        let gpa = want.gfn.address();
        let memory = ReadOnly(module);
        self.counts.private_accesses += 1;
        if let Ok(found) = private.software.access(&memory, gpa, GuestAccess::Write) {
            if found.hpa.pfn() != world.memory.private_home(want.gfn) {
                world
                    .verdict
                    .violation(format_args!("private {} reached {}", want.gfn, found.hpa));
            }
            self.check_standing(want.gfn, want.access, Visibility::Private);
            return Ok(());
        }
        // Not there, or pending: the guest accepts, by the largest leaf first.
        let mut level = world.memory.private_level;
        loop {
            let info = PageInfo::new(Gpa(level.align_down(want.gfn).address().0), level);
            match private.vcpu.td().page_accept(info) {
                Accept::Answered(answer) if answer.is_success() => {
                    self.counts.accepted += 1;
                    return Err(None);
                }
                Accept::Answered(_) if level > Level::L1 => level = Level::L1,
                Accept::Answered(_) => return Err(None),
                Accept::Exit(exit) => {
                    return Err(Some(Fault::new(gpa, want.access).max_level(exit.level)));
                }
            }
        }
    }

    /// Has the library resolve a fault. `false` if entering again would not help.
    fn handle(&mut self, fault: Fault, small: bool) -> bool {
        let Some(vcpu) = &mut self.vcpu else {
            return false;
        };
        self.counts.faults += 1;
        let fault = if small {
            fault.max_level(Level::L1)
        } else {
            fault
        };
        match chaos::survive(|| vcpu.fault(fault)) {
            Some(Ok(outcome)) => self.count(outcome),
            Some(Err(FaultError::OutOfFrames)) => {
                self.starve();
                true
            }
            None => {
                self.counts.unwound += 1;
                true
            }
        }
    }

    fn count(&mut self, outcome: Outcome) -> bool {
        let (counter, again) = match outcome {
            Outcome::Fixed { .. } => (&mut self.counts.fixed, true),
            Outcome::Spurious => (&mut self.counts.spurious, true),
            Outcome::Retry(_) => (&mut self.counts.retries, true),
            Outcome::Mmio { .. } => (&mut self.counts.mmio, false),
            Outcome::MemoryFault(_) => (&mut self.counts.memory_faults, false),
            Outcome::DirtyRingFull => (&mut self.counts.ring_full, false),
        };
        *counter += 1;
        again
    }

    /// Maps some pages before the guest needs them.
    fn prefault(&mut self, mut random: Random) {
        let start = self.somewhere(&mut random);
        let range = GfnRange {
            start,
            end: Gfn(start.0 + 1 + random.below(48)),
        };
        let half = if self.is_private(start, random.once_in(8)) {
            Visibility::Private
        } else {
            Visibility::Shared
        };
        if let Some(vcpu) = &mut self.vcpu {
            match chaos::survive(|| vcpu.prefault(range, half)) {
                Some(Ok(_)) => self.counts.prefaults += 1,
                Some(Err(_)) => self.starve(),
                None => self.counts.unwound += 1,
            }
        }
    }

    /// Several faults in one critical section.
    fn batch(&mut self, mut random: Random) {
        let first = self.somewhere(&mut random);
        let access = if random.once_in(2) {
            Access::Write
        } else {
            Access::Read
        };
        let faults: Vec<_> = (0..8)
            .map(|n| Fault::new(self.shared_gpa(Gfn(first.0 + n).address()), access))
            .collect();
        let Some(vcpu) = &mut self.vcpu else { return };
        let done = chaos::survive(|| {
            let mut batch = vcpu.batch()?;
            for fault in faults {
                let _ = batch.fault(fault)?;
            }
            Ok::<_, FaultError>(())
        });
        match done {
            Some(Ok(())) => self.counts.batches += 1,
            Some(Err(_)) => self.starve(),
            None => self.counts.unwound += 1,
        }
    }

    /// Uses and accepts every private page of a block one by one, and then has them become one.
    fn fold(&mut self, mut random: Random) {
        let gfn = self.somewhere(&mut random);
        let block = Level::L2.range(gfn);
        let (Some(vcpu), Some(private)) = (&mut self.vcpu, &self.private) else {
            return;
        };
        for n in block.start.0..block.end.0 {
            let gpa = Gfn(n).address();
            let fault = Fault::write(gpa).max_level(Level::L1);
            if !matches!(chaos::survive(|| vcpu.fault(fault)), Some(Ok(_))) {
                continue;
            }
            if let Accept::Answered(_) =
                private.vcpu.td().page_accept(PageInfo::new(gpa, Level::L1))
            {}
        }
        let mmu = &self.world.mmu;
        mmu.allow_huge(gfn);
        if let Some(Ok(folded)) = chaos::survive(|| mmu.fold_private(super::world::SPACE, block)) {
            self.counts.tables_folded += folded.folded;
        }
    }

    /// Asks what an access is.
    fn look(&mut self, mut random: Random) {
        let gfn = self.somewhere(&mut random);
        let _ = self.world.mmu.explain(Fault::read(gfn.address()));
        let _ = self.world.mmu.translate(super::world::SPACE, gfn);
        if let Some(vcpu) = &mut self.vcpu {
            let _ = vcpu.is_mmio(gfn.address());
        }
    }

    /// Runs on a tree of the other kind from now on.
    fn switch_roots(&mut self) {
        let Some(vcpu) = &mut self.vcpu else { return };
        let next = match vcpu.ad_bits() {
            AdBits::Processor => AdBits::Software,
            AdBits::Software => AdBits::Processor,
        };
        let switched = chaos::survive(|| vcpu.set_ad_bits(next));
        let now = vcpu.ad_bits();
        if matches!(switched, Some(Ok(_))) {
            self.counts.root_kinds_switched += 1;
        }
        self.run_on(now);
    }

    /// A processor for trees of a kind, under the root of the moment.
    fn run_on(&mut self, bits: AdBits) {
        if let Ok(walker) = F::walker(Level::L4, bits) {
            // Entered under whatever root there is then: nothing is cached, and the root is loaded first.
            self.software = SoftwareVcpu::new(walker, self.root.hpa);
            self.root.generation = u64::MAX;
        }
    }

    /// Its handle is dropped, with the tables that it holds ready and what its ring holds.
    fn die(&mut self) {
        if self.vcpu.take().is_some() {
            self.counts.vcpus_dropped += 1;
        }
        self.revive();
    }

    fn revive(&mut self) {
        match chaos::survive(|| self.world.mmu.vcpu()) {
            Some(Ok(vcpu)) => {
                let bits = vcpu.ad_bits();
                self.vcpu = Some(vcpu);
                self.run_on(bits);
            }
            Some(Err(_)) => self.starve(),
            None => self.counts.unwound += 1,
        }
    }

    /// Another thread faults on a vCPU of its own and dies holding it: by a panic, or by simply ending.
    fn thread_dies(&mut self, seed: u64) {
        let mut random = Random(seed);
        let faults: Vec<_> = (0..1 + random.below(12))
            .map(|_| {
                let gfn = self.somewhere(&mut random);
                let private = self.is_private(gfn, false);
                let gpa = gfn.address();
                Fault::write(if private { gpa } else { self.shared_gpa(gpa) })
            })
            .collect();
        let world = self.world;
        let died = std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                chaos::begin(random.next(), world.plan.rates);
                let _ = chaos::survive(|| {
                    let Ok(mut vcpu) = world.mmu.vcpu() else {
                        return;
                    };
                    for fault in faults {
                        let _ = vcpu.fault(fault);
                    }
                    if random.once_in(2) {
                        chaos::die();
                    }
                });
                chaos::end()
            });
            thread.join()
        });
        match died {
            Ok(met) => self.met.add(&met),
            Err(payload) => std::panic::resume_unwind(payload),
        }
        self.counts.threads_died += 1;
    }

    fn starve(&mut self) {
        self.counts.starved += 1;
        std::thread::yield_now();
    }

    /// What the processor finds at a page under the vCPU's root, leaving no trace; compared with what the library says.
    /// Nobody is at work.
    pub(super) fn compare(&self, gfn: Gfn) -> bool {
        let Some(vcpu) = &self.vcpu else { return true };
        if vcpu.is_root_obsolete() || self.root.generation == u64::MAX {
            return true;
        }
        let Ok(walker) = F::walker(Level::L4, vcpu.ad_bits()) else {
            return true;
        };
        let frames = &self.world.mmu.host().frames;
        let memory = ReadOnly(TableMemory::new(frames));
        let gpa = self.shared_gpa(gfn.address());
        let mut processor = SoftwareVcpu::<F::Walker>::new(walker, self.root.hpa);
        let found = processor.access(&memory, gpa, GuestAccess::Read).ok();
        let owned = found.map(|found| self.world.memory.is_owned(found.hpa.pfn(), gfn));
        owned != Some(false)
    }

    /// The vCPU of the TD, outside.
    pub(super) fn into_td(mut self) -> Option<TdVcpu> {
        self.leave();
        self.private.take().map(|private| private.vcpu)
    }
}

fn code<F: Walked>(raw: u64) -> FaultCode {
    F::fault_code(raw)
}
