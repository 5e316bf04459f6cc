//! Operations of three threads at once: the tables are sound afterwards, and what each thread saw of each guest frame adds up
//! to a history of one operation after the other.
//!
//! The fuzzer chooses the operations, their frames and how long each thread waits before each; when exactly they meet is the
//! machine's. All leaves are small, so that frames do not depend on each other. A retry changes nothing.
#![no_main]

#[path = "../../../tdp/tests/common/mod.rs"]
mod common;
mod history;

use arbitrary::Arbitrary;
use common::host::{Memory, SharedPool};
use common::processor::{Processor, guest_access};
use common::rig::{Rig, RigSetup, pool};
use history::{Did, Event, is_possible};
use libfuzzer_sys::fuzz_target;
use std::hint::spin_loop;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use tdp::{
    Access, AddressSpaceId, Ept, Fault, Gfn, GfnRange, Hpa, Level, Npt, Outcome, Pfn, Slot,
    TableMemory, TlbVcpu, Vcpu,
};
use tdp_arch::walker::{WalkError, Walker};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const THREADS: usize = 3;
const MOST_OPS: usize = 8;
const FRAMES: usize = 512;
/// Frames of the guest, on both sides of the border between two tables.
const GFNS: [u64; 4] = [0x1fe, 0x1ff, 0x200, 0x201];

static POOL: LazyLock<SharedPool> = LazyLock::new(|| pool(FRAMES));

#[derive(Debug, Arbitrary)]
struct Input {
    npt: bool,
    threads: [Vec<(Op, u8, u8)>; THREADS],
}

#[derive(Clone, Copy, Debug, Arbitrary)]
enum Op {
    Fault { write: bool },
    ZapLeaf,
    ZapTables,
    Invalidate,
    Protect,
    Age,
    TestAge,
    Look,
    Touch { write: bool },
}

/// What all threads share.
struct World<'a, F: Processor> {
    rig: &'a Rig<F>,
    clock: AtomicU64,
    ready: AtomicUsize,
}

/// One thread.
struct Hand<'a, F: Processor> {
    world: &'a World<'a, F>,
    vcpu: Vcpu<F, common::host::TestHost>,
    tlb: TlbVcpu,
    root: Hpa,
    seen: [Vec<Event>; GFNS.len()],
}

impl<F: Processor> Hand<'_, F> {
    fn now(&self) -> u64 {
        self.world.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// What the operation did to which frames, as far as it says.
    fn operate(&mut self, op: Op, at: usize) -> (Option<Did>, bool) {
        let mmu = &self.world.rig.mmu;
        let gfn = Gfn(GFNS[at]);
        let one = GfnRange::new(gfn, 1).expect("a frame");
        let did = match op {
            Op::Fault { write } => {
                let gpa = gfn.address();
                let fault = if write {
                    Fault::write(gpa)
                } else {
                    Fault::read(gpa)
                };
                match self.vcpu.fault(fault).expect("frames for tables") {
                    Outcome::Fixed { level } => {
                        assert_eq!(level, Level::L1);
                        Did::Fault { write, fixed: true }
                    }
                    Outcome::Spurious => Did::Fault {
                        write,
                        fixed: false,
                    },
                    Outcome::Retry(_) => return (None, false),
                    other => panic!("{other:?}"),
                }
            }
            Op::ZapLeaf => {
                let pending = mmu.zap_leaves(SPACE, one);
                let was = pending.leaves() == 1;
                pending.flush();
                Did::Zap(Some(was))
            }
            Op::ZapTables => {
                mmu.zap(SPACE, Gfn(0)..Gfn(0x400)).flush();
                return (Some(Did::Zap(None)), true);
            }
            Op::Invalidate => {
                let guard = mmu.invalidate_begin(SPACE, one);
                let flushed = guard.zap().flush();
                guard.end(flushed);
                Did::Zap(None)
            }
            Op::Protect => {
                let pending = mmu.write_protect(SPACE, one, Level::L1);
                let was = pending.leaves() == 1;
                pending.flush();
                Did::Protect(was)
            }
            Op::Age => Did::Age(mmu.age(SPACE, one)),
            Op::TestAge => Did::TestAge(mmu.test_age(SPACE, one)),
            Op::Look => Did::Look(mmu.translate(SPACE, gfn).is_some()),
            Op::Touch { write } => {
                let access = if write { Access::Write } else { Access::Read };
                // A walk with nothing cached. Tables stay while it is inside.
                let _ = self.tlb.enter();
                let memory = TableMemory::new(self.world.rig.frames());
                let walker = F::walker(self.world.rig.setup);
                let found = walker.walk(&memory, self.root, gfn.address(), guest_access(access));
                self.tlb.exit();
                match found {
                    Ok(found) => {
                        assert_eq!(found.hpa.pfn(), Pfn((1 << 24) + gfn.0));
                        Did::Touch {
                            write,
                            through: true,
                        }
                    }
                    Err(WalkError::Fault(_)) => Did::Touch {
                        write,
                        through: false,
                    },
                    Err(WalkError::Abort(abort)) => panic!("{abort}"),
                }
            }
        };
        (Some(did), false)
    }

    fn run(mut self, ops: &[(Op, u8, u8)]) -> [Vec<Event>; GFNS.len()] {
        self.world.ready.fetch_add(1, Ordering::SeqCst);
        while self.world.ready.load(Ordering::SeqCst) < THREADS {
            std::thread::yield_now();
        }
        for &(op, at, delay) in ops.iter().take(MOST_OPS) {
            match delay {
                0..0xf8 => (0..delay).for_each(|_| spin_loop()),
                _ => std::thread::yield_now(),
            }
            let at = usize::from(at) % GFNS.len();
            let began = self.now();
            let (did, everywhere) = self.operate(op, at);
            let ended = self.now();
            let Some(did) = did else { continue };
            for (n, seen) in self.seen.iter_mut().enumerate() {
                if everywhere || n == at {
                    seen.push(Event { began, ended, did });
                }
            }
        }
        self.seen
    }
}

fn check<F: Processor>(input: &Input) {
    let setup = RigSetup {
        max_leaf: Level::L1,
        garbage_bound: 2,
        ..RigSetup::default()
    };
    let rig = Rig::<F>::on(POOL.clone(), setup);
    let memory = Memory::new(Pfn(1 << 24), Level::L1);
    let slot = Slot::new(Gfn(0)..Gfn(0x400), memory);
    rig.mmu.slots().insert(slot).expect("a free range");
    let world = World {
        rig: &rig,
        clock: AtomicU64::new(0),
        ready: AtomicUsize::new(0),
    };
    let hand = || {
        let mut vcpu = rig.vcpu();
        Hand {
            root: vcpu.load_root().expect("the root is there").hpa,
            vcpu,
            tlb: rig.host().tlb().vcpu(),
            world: &world,
            seen: Default::default(),
        }
    };
    let [first, others @ ..] = &input.threads;
    let hands = [hand(), hand()];
    let own = hand();
    let mut seen = std::thread::scope(|scope| {
        let running: Vec<_> = hands
            .into_iter()
            .zip(others)
            .map(|(hand, ops)| scope.spawn(|| hand.run(ops)))
            .collect();
        let mut seen = vec![own.run(first)];
        // A thread that panicked has stopped the fuzzer.
        seen.extend(running.into_iter().filter_map(|thread| thread.join().ok()));
        seen
    });
    // What is left in the end is seen by one more.
    let now = world.clock.load(Ordering::SeqCst);
    seen.push(GFNS.map(|gfn| {
        let leaf = rig.mmu.translate(SPACE, Gfn(gfn));
        let last = Did::Final(leaf.map(|leaf| leaf.spte.0 & F::DIRTY != 0));
        vec![Event {
            began: now,
            ended: now,
            did: last,
        }]
    }));
    for (n, gfn) in GFNS.iter().enumerate() {
        let threads: Vec<_> = seen.iter().map(|seen| seen[n].clone()).collect();
        assert!(
            is_possible(&threads),
            "no history of frame {gfn:#x}: {threads:#?}"
        );
    }
    rig.mmu.synchronize();
    let (audit, stats) = (rig.mmu.audit(), rig.mmu.stats());
    assert_eq!(stats.garbage.pending, 0);
    assert_eq!((audit.frozen, audit.misplaced, audit.unknown), (0, 0, 0));
    assert_eq!((audit.pages, audit.tables), (stats.pages, stats.tables));
}

fuzz_target!(|input: Input| {
    if input.npt {
        check::<Npt>(&input);
    } else {
        check::<Ept>(&input);
    }
});
