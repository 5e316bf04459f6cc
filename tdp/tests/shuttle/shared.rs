//! The shared half: what a vCPU reaches while its memory is taken back, its slot goes, its leaves change their size, its log is
//! read.
//!
//! A host frame that was given away is noted at the moment from which nobody may reach it. A vCPU that is inside lets the
//! others run between its access and what it does with the frame, so that a flush that does not wait for it is seen.

use crate::common::host::Memory;
use crate::common::processor::Processor;
use crate::common::rig::{Cpu, Rig, RigSetup};
use crate::explore;
use std::sync::Mutex;
use tdp::{
    Access, AddressSpaceId, DirtyTracking, Ept, Gfn, GfnRange, Gpa, Level, Npt, Outcome, Pfn, Slot,
    SlotFlags,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);
/// Frames of the guest, two tables apart at their ends.
const GFNS: [u64; 3] = [0x1ff, 0x200, 0x201];
const ALL: std::ops::Range<Gfn> = Gfn(0)..Gfn(0x400);
const FIRST: Pfn = Pfn(1 << 24);
/// Where pages are moved to.
const ELSEWHERE: Pfn = Pfn(1 << 33);
/// Times that a guest tries again before it lets it be.
const MOST_TRIES: usize = 6;

/// Turns that a vCPU gives to the others while it is inside with a frame.
const LINGER: usize = 24;

/// Host frames that belong to somebody else by now.
#[derive(Default)]
struct Gone(Mutex<Vec<u64>>);

impl Gone {
    fn add(&self, pfns: impl IntoIterator<Item = u64>) {
        self.0.lock().unwrap().extend(pfns);
    }

    fn check(&self, pfn: Pfn) {
        for _ in 0..LINGER {
            shuttle::thread::yield_now();
            assert!(!self.0.lock().unwrap().contains(&pfn.0), "{pfn} is reached");
        }
    }
}

fn setup() -> RigSetup {
    RigSetup {
        frames: 64,
        // So that retiring drives reclamation in the middle of things.
        garbage_bound: 2,
        max_leaf: Level::L1,
        ..RigSetup::default()
    }
}

fn slot(first: Pfn) -> Slot<Memory> {
    Slot::new(ALL, Memory::new(first, Level::L1))
}

/// The guest accesses a frame, until it gets through or the MMU has no answer for long.
fn access<F: Processor>(cpu: &mut Cpu<F>, gfn: u64, access: Access, mut inside: impl FnMut(Pfn)) {
    let gpa = Gpa(Gfn(gfn).address().0);
    for _ in 0..MOST_TRIES {
        let root = cpu.vcpu.load_root().expect("a frame for the root");
        cpu.load(root);
        let Some(fault) = cpu.touch_then(gpa, access, &mut inside).fault else {
            return;
        };
        match cpu.vcpu.fault(fault).expect("frames for tables") {
            Outcome::Fixed { .. } | Outcome::Spurious | Outcome::Retry(_) => {}
            Outcome::MemoryFault(_) | Outcome::Mmio { .. } => return,
            Outcome::DirtyRingFull => panic!("there is no ring"),
        }
    }
}

fn at_rest<F: Processor>(rig: &Rig<F>) {
    rig.mmu.synchronize();
    let (audit, stats) = (rig.mmu.audit(), rig.mmu.stats());
    assert_eq!(stats.garbage.pending, 0);
    assert_eq!((audit.frozen, audit.misplaced, audit.unknown), (0, 0, 0));
    assert_eq!((audit.pages, audit.tables), (stats.pages, stats.tables));
}

/// Two vCPUs, a host that moves pages elsewhere one by one, and one who zaps and replaces the root.
fn invalidation<F: Processor>() {
    let rig = Rig::<F>::with(setup());
    rig.mmu.slots().insert(slot(FIRST)).expect("a free range");
    let gone = Gone::default();
    let cpus = [rig.processor(rig.vcpu()), rig.processor(rig.vcpu())];
    shuttle::thread::scope(|scope| {
        for (mut cpu, kind) in cpus.into_iter().zip([Access::Read, Access::Write]) {
            let gone = &gone;
            scope.spawn(move || {
                for gfn in [GFNS[0], GFNS[1], GFNS[0]] {
                    access(&mut cpu, gfn, kind, |pfn| gone.check(pfn));
                }
            });
        }
        scope.spawn(|| {
            for (n, gfn) in GFNS.into_iter().enumerate().take(2) {
                let range = GfnRange::new(Gfn(gfn), 1).expect("a frame");
                let guard = rig.mmu.invalidate_begin(SPACE, range);
                let flushed = guard.zap().flush();
                let old = FIRST.0 + gfn;
                let new = Pfn(ELSEWHERE.0 + n as u64);
                rig.host().script().moved.insert(old, new);
                guard.end(flushed);
                gone.add([old]);
            }
        });
        scope.spawn(|| {
            rig.mmu.zap(SPACE, Gfn(0x200)..Gfn(0x400)).flush();
            rig.mmu.invalidate_roots().finish();
        });
    });
    at_rest(&rig);
}

/// Two vCPUs, and a slot that goes and comes back with other memory.
fn slots<F: Processor>() {
    let rig = Rig::<F>::with(setup());
    let id = rig.mmu.slots().insert(slot(FIRST)).expect("a free range");
    let gone = Gone::default();
    let cpus = [rig.processor(rig.vcpu()), rig.processor(rig.vcpu())];
    shuttle::thread::scope(|scope| {
        for mut cpu in cpus {
            let gone = &gone;
            scope.spawn(move || {
                for gfn in [GFNS[1], GFNS[0], GFNS[1]] {
                    access(&mut cpu, gfn, Access::Write, |pfn| gone.check(pfn));
                }
            });
        }
        scope.spawn(|| {
            rig.mmu.slots().remove(SPACE, id).expect("it is there");
            gone.add(GFNS.map(|gfn| FIRST.0 + gfn));
            let other = slot(Pfn(1 << 25));
            rig.mmu.slots().insert(other).expect("a free range");
        });
    });
    at_rest(&rig);
}

/// Two vCPUs on large leaves, which are split and put together again while a page of them moves and tables are unlinked.
fn sizes<F: Processor>() {
    let rig = Rig::<F>::with(RigSetup {
        max_leaf: Level::L2,
        ..setup()
    });
    let large = Slot::new(ALL, Memory::new(FIRST, Level::L2));
    rig.mmu.slots().insert(large).expect("a free range");
    let moves = GFNS[2];
    let gone = Gone::default();
    let cpus = [rig.processor(rig.vcpu()), rig.processor(rig.vcpu())];
    shuttle::thread::scope(|scope| {
        for (mut cpu, kind) in cpus.into_iter().zip([Access::Read, Access::Write]) {
            let gone = &gone;
            scope.spawn(move || {
                for gfn in [0x200, 0x1fe, 0x201, 0x1ff, 0x202, 0x1fd, 0x203] {
                    access(&mut cpu, gfn, kind, |pfn| {
                        let at_first = Pfn(FIRST.0 + gfn);
                        assert!(pfn == at_first || gfn == moves && pfn == ELSEWHERE);
                        gone.check(pfn);
                    });
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..2 {
                rig.mmu.split(SPACE, ALL, Level::L1).expect("frames");
                shuttle::thread::yield_now();
                rig.mmu.collapse(SPACE, ALL).flush();
            }
            rig.mmu.zap(SPACE, Gfn(0)..Gfn(0x200)).flush();
        });
        scope.spawn(|| {
            let range = GfnRange::new(Gfn(moves), 1).expect("a frame");
            let guard = rig.mmu.invalidate_begin(SPACE, range);
            let flushed = guard.zap().flush();
            rig.host().script().moved.insert(FIRST.0 + moves, ELSEWHERE);
            guard.end(flushed);
            gone.add([FIRST.0 + moves]);
        });
    });
    at_rest(&rig);
}

/// Two vCPUs write, one reads the log, one ages: a write that no reading of the log has told is told by the next.
fn log<F: Processor>(dirty_tracking: DirtyTracking) {
    let rig = Rig::<F>::with(RigSetup {
        dirty_tracking,
        ..setup()
    });
    let logged = slot(FIRST).with_flags(SlotFlags::LOG_DIRTY);
    let id = rig.mmu.slots().insert(logged).expect("a free range");
    let untold = Mutex::new([false; GFNS.len()]);
    let collect = || {
        let log = rig.mmu.dirty_log(SPACE, id).expect("a logged slot");
        let mut bitmap = vec![0; log.words()];
        log.collect(&mut bitmap).expect("its length").flush();
        // Now the pages would be read: what was written until here is told.
        let mut untold = untold.lock().unwrap();
        for (n, &gfn) in GFNS.iter().enumerate() {
            if bitmap[gfn as usize / 64] >> (gfn % 64) & 1 != 0 {
                untold[n] = false;
            }
        }
    };
    let cpus = [rig.processor(rig.vcpu()), rig.processor(rig.vcpu())];
    shuttle::thread::scope(|scope| {
        for (mut cpu, order) in cpus.into_iter().zip([[0, 1, 0], [1, 2, 1]]) {
            let untold = &untold;
            scope.spawn(move || {
                for n in order {
                    access(&mut cpu, GFNS[n], Access::Write, |_| {
                        shuttle::thread::yield_now();
                        untold.lock().unwrap()[n] = true;
                    });
                }
            });
        }
        scope.spawn(|| {
            collect();
            collect();
        });
        scope.spawn(|| {
            let _ = rig.mmu.age(SPACE, ALL);
        });
    });
    collect();
    assert_eq!(*untold.lock().unwrap(), [false; GFNS.len()]);
    at_rest(&rig);
}

#[test]
fn ept_moves_pages_under_its_vcpus() {
    explore(invalidation::<Ept>);
}

#[test]
fn npt_moves_pages_under_its_vcpus() {
    explore(invalidation::<Npt>);
}

#[test]
fn ept_takes_a_slot_away() {
    explore(slots::<Ept>);
}

#[test]
fn npt_takes_a_slot_away() {
    explore(slots::<Npt>);
}

#[test]
fn ept_changes_sizes_under_its_vcpus() {
    explore(sizes::<Ept>);
}

#[test]
fn npt_changes_sizes_under_its_vcpus() {
    explore(sizes::<Npt>);
}

#[test]
fn ept_logs_by_write_protection() {
    explore(|| log::<Ept>(DirtyTracking::WriteProtect));
}

#[test]
fn npt_logs_by_dirty_bits() {
    explore(|| log::<Npt>(DirtyTracking::DirtyBit));
}
