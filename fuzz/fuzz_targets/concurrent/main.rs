//! Operations of up to three threads at once: the tables are sound afterwards, and what each thread saw of each guest frame adds up
//! to a history of one operation after the other.
//!
//! The fuzzer chooses the operations, their frames and how long each thread waits before each; when exactly they meet is the
//! machine's. So that operations of a few hundred instructions do meet, to the instruction, the same ones are run over and
//! over, each time with the threads shifted against each other: few times, because another input finds more than another
//! round of the same. `TDP_FUZZ_ROUNDS=1000` replays a failure that does not come again at once. All leaves are small, so that
//! frames do not depend on each other. A retry changes nothing.
#![no_main]

#[path = "../../../tdp/tests/common/mod.rs"]
mod common;
mod history;

use arbitrary::Arbitrary;
use common::host::{Memory, SharedPool};
use common::processor::{Processor, guest_access};
use common::rig::{Rig, RigSetup, pool};
use history::{Did, Event, after, endings};
use libfuzzer_sys::fuzz_target;
use std::collections::HashSet;
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
/// How often the threads do what they do.
static ROUNDS: LazyLock<usize> = LazyLock::new(|| {
    let told = std::env::var("TDP_FUZZ_ROUNDS").ok();
    let told = told.and_then(|n| n.parse().ok());
    told.filter(|&n| n > 0).unwrap_or(4)
});
/// Pauses by which the threads are shifted against each other, at most.
const MOST_SHIFT: usize = 24;
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
    /// Threads that have something to do, and the first.
    threads: usize,
    clock: AtomicU64,
    arrived: AtomicUsize,
}

impl<F: Processor> World<'_, F> {
    /// Waits for the others, who come here as often.
    fn meet(&self, times: &mut usize) {
        *times += 1;
        self.arrived.fetch_add(1, Ordering::SeqCst);
        let mut looks = 0;
        while self.arrived.load(Ordering::SeqCst) < *times * self.threads {
            looks += 1;
            if looks % 64 == 0 {
                // Not all may have a processor.
                std::thread::yield_now();
            } else {
                spin_loop();
            }
        }
    }

    /// What there is when nobody does anything.
    fn rest(&self, gfn: u64) -> Did {
        let leaf = self.rig.mmu.translate(SPACE, Gfn(gfn));
        Did::Final(leaf.map(|leaf| leaf.spte.0 & F::DIRTY != 0))
    }
}

/// What was seen of each frame.
type Seen = [Vec<Event>; GFNS.len()];

/// One thread.
struct Hand<'a, F: Processor> {
    world: &'a World<'a, F>,
    vcpu: Vcpu<F, common::host::TestHost>,
    tlb: TlbVcpu,
    root: Hpa,
    /// In each round.
    seen: Vec<Seen>,
    /// After each round, by one of the threads.
    rests: Vec<[Did; GFNS.len()]>,
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

    fn round(&mut self, ops: &[(Op, u8, u8)]) {
        let mut seen = Seen::default();
        for &(op, at, delay) in ops.iter().take(MOST_OPS) {
            match delay {
                0..0x80 => {}
                0x80..0xf0 => (0..delay & 0xf).for_each(|_| spin_loop()),
                0xf0..0xf8 => (0..delay).for_each(|_| spin_loop()),
                _ => std::thread::yield_now(),
            }
            let at = usize::from(at) % GFNS.len();
            let began = self.now();
            let (did, everywhere) = self.operate(op, at);
            let ended = self.now();
            let Some(did) = did else { continue };
            for (n, seen) in seen.iter_mut().enumerate() {
                if everywhere || n == at {
                    seen.push(Event { began, ended, did });
                }
            }
        }
        self.seen.push(seen);
    }

    /// All rounds of thread `number`, the first of which looks at what there is after each.
    fn run(mut self, number: usize, ops: &[(Op, u8, u8)]) -> Self {
        let mut times = 0;
        for round in 0..*ROUNDS {
            self.world.meet(&mut times);
            let shift = round * [0, 7, 11][number % 3] % MOST_SHIFT;
            (0..shift).for_each(|_| spin_loop());
            self.round(ops);
            self.world.meet(&mut times);
            if number == 0 {
                self.rests.push(GFNS.map(|gfn| self.world.rest(gfn)));
            }
        }
        self
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
    let [first, others @ ..] = &input.threads;
    // Who does nothing would only be waited for.
    let others: Vec<_> = others.iter().filter(|ops| !ops.is_empty()).collect();
    let world = World {
        rig: &rig,
        threads: 1 + others.len(),
        clock: AtomicU64::new(0),
        arrived: AtomicUsize::new(0),
    };
    let hand = || {
        let mut vcpu = rig.vcpu();
        Hand {
            root: vcpu.load_root().expect("the root is there").hpa,
            vcpu,
            tlb: rig.host().tlb().vcpu(),
            world: &world,
            seen: Vec::with_capacity(*ROUNDS),
            rests: Vec::new(),
        }
    };
    let hands: Vec<_> = others.iter().map(|_| hand()).collect();
    let own = hand();
    let hands: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> = hands
            .into_iter()
            .zip(others)
            .zip(1..)
            .map(|((hand, ops), number)| scope.spawn(move || hand.run(number, ops)))
            .collect();
        let own = own.run(0, first);
        // A thread that panicked has stopped the fuzzer.
        let others = running.into_iter().filter_map(|thread| thread.join().ok());
        [own].into_iter().chain(others).collect()
    });
    for (n, gfn) in GFNS.iter().enumerate() {
        let mut states = HashSet::from([None]);
        for round in 0..*ROUNDS {
            let threads: [&[Event]; THREADS] =
                std::array::from_fn(|t| hands.get(t).map_or(&[][..], |hand| &hand.seen[round][n]));
            let rest = hands[0].rests[round][n];
            let next = endings(&threads, &states);
            let next: HashSet<_> = next
                .iter()
                .filter_map(|&state| after(state, rest))
                .collect();
            assert!(
                !next.is_empty(),
                "no history of frame {gfn:#x} from one of {states:?} to {rest:?}: {threads:#?}"
            );
            states = next;
        }
    }
    drop(hands);
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
