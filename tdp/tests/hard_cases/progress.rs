//! Who waits for whom, for how long, and that every retry and every yield gets further.

use crate::common::host::{Answer, BlockingAnswer, Memory};
use crate::common::processor::Processor;
use crate::common::rig::{Rig, RigSetup, hear};
use crate::{SPACE, fixed};
use std::ops::ControlFlow;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use tdp::{Access, Fault, Gfn, Gpa, Level, Outcome, Perms, Pfn, RetryReason, Slot, SlotId, Steps};

const BASE: u64 = 1 << 20;
const ID: SlotId = SlotId(1);
const FRAMES: u64 = 1 << 18;

fn rig_with<F: Processor>(setup: RigSetup) -> Rig<F> {
    let rig = Rig::with(setup);
    let slot = Slot::new(Gfn(0)..Gfn(FRAMES), Memory::new(Pfn(BASE), Level::L1)).with_id(ID);
    rig.mmu.slots().insert(slot).expect("the first slot");
    rig
}

fn fill<F: Processor>(rig: &Rig<F>, gfns: impl IntoIterator<Item = u64>) -> u64 {
    let mut vcpu = rig.vcpu();
    let mut count = 0;
    for gfn in gfns {
        let fault = Fault::write(Gfn(gfn).address());
        assert_eq!(vcpu.fault(fault), fixed(Level::L1));
        count += 1;
    }
    count
}

both_formats! {
    /// However many invalidations have ended, also where the count no longer fits narrower numbers or comes round: a fault
    /// that slept while none ended is not stale, and one that slept while one ended is.
    fn case_02_a_fault_is_stale_exactly_if_an_invalidation_has_passed<F>() {
        for border in [1 << 31, 1 << 32, 1 << 63, 0u64] {
            for below in 0..4 {
                let rig = rig_with::<F>(RigSetup {
                    invalidation_sequence: border.wrapping_sub(below),
                    ..RigSetup::default()
                });
                rig.host().set_answer(Answer::Blocking(BlockingAnswer::Page));
                let mut vcpu = rig.vcpu();
                for n in 0..4 {
                    let fault = Fault::write(Gfn(n).address());
                    assert_eq!(vcpu.fault(fault), fixed(Level::L1), "{border:#x} - {below}");
                    let mmu = rig.mmu.clone();
                    rig.host().script().while_asleep = Some(Box::new(move || {
                        // Of another frame: nothing but the count tells.
                        drop(mmu.invalidate_begin(SPACE, Gfn(1000)..Gfn(1001)));
                    }));
                    let stale = Ok(Outcome::Retry(RetryReason::Invalidation));
                    assert_eq!(vcpu.fault(Fault::write(Gfn(n + 8).address())), stale);
                }
            }
        }
    }

    /// A walk of more entries than it visits at a time, in which the table that it stands in goes away again and again, and
    /// with it what it has been through: it visits the rest once each, in order.
    fn case_05_a_walk_that_yields_skips_nothing<F>() {
        let rig = rig_with::<F>(RigSetup::default());
        let gfns = || 0..40 * 512;
        let count = fill(&rig, gfns());
        let mut seen = Vec::new();
        rig.mmu.visit_leaves(SPACE, Gfn(0)..Gfn(FRAMES), |leaf| {
            seen.push(leaf.gfn.0);
            let block = leaf.gfn.0 / 512;
            if block > 0 && seen.len() % 97 == 0 {
                rig.mmu.zap(SPACE, Gfn(0)..Gfn(block * 512)).flush();
            }
        });
        assert_eq!(seen.len() as u64, count);
        assert!(seen.into_iter().eq(gfns()));
        // The same of the frames that nobody touches, while the tables of the others come and go beside it.
        rig.mmu.zap(SPACE, Gfn(0)..Gfn(FRAMES)).flush();
        let steady = |gfn: &u64| (gfn / 512).is_multiple_of(2);
        fill(&rig, gfns().filter(steady));
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut vcpu = rig.vcpu();
                let odd = (0..20).map(|n| (2 * n + 1) * 512);
                for gfn in odd.cycle() {
                    if over.load(Ordering::Acquire) {
                        break;
                    }
                    let _ = vcpu.fault(Fault::write(Gfn(gfn + 9).address()));
                    rig.mmu.zap(SPACE, Gfn(gfn)..Gfn(gfn + 512)).flush();
                }
            });
            for _ in 0..10 {
                let mut seen = Vec::new();
                rig.mmu.visit_leaves(SPACE, Gfn(0)..Gfn(FRAMES), |leaf| seen.push(leaf.gfn.0));
                assert!(seen.is_sorted_by(|a, b| a < b), "in order, none twice");
                assert!(seen.into_iter().filter(steady).eq(gfns().filter(steady)));
            }
            over.store(true, Ordering::Release);
        });
    }

    /// While a zap has unlinked a table and is at the end of its work, its flush, faults map the frames of that table anew:
    /// nobody waits for the sweep, let alone for what it has yet to go through.
    fn case_26_faults_do_not_wait_for_a_subtree_that_goes<F>() {
        for teardown in [false, true] {
            let rig = rig_with::<F>(RigSetup { frames: 2048, ..RigSetup::default() });
            fill(&rig, (0..64).map(|block| block * 512));
            let (flushing, flushes) = channel();
            let (go_on, goes_on) = channel::<()>();
            rig.host().script().while_flushing = Some(Box::new(move || {
                flushing.send(()).expect("somebody listens");
                hear(&goes_on);
            }));
            let mmu = rig.mmu.clone();
            let sweep = std::thread::spawn(move || {
                if teardown {
                    mmu.invalidate_roots().finish();
                } else {
                    mmu.zap(SPACE, Gfn(0)..Gfn(FRAMES)).flush();
                }
            });
            hear(&flushes);
            let mut vcpu = rig.vcpu();
            for block in 0..64 {
                assert_eq!(vcpu.fault(Fault::write(Gfn(block * 512).address())), fixed(Level::L1));
            }
            assert_eq!(rig.mmu.stats().retries, [0; 6]);
            assert!(!sweep.is_finished());
            go_on.send(()).expect("somebody listens");
            sweep.join().expect("nothing goes wrong");
            assert_eq!(rig.mmu.stats().pages, [64, 0, 0]);
            rig.assert_maps(&mut vcpu, Gfn(512), Pfn(BASE + 512), Level::L1, Perms::RWX);
        }
    }

    /// A sweep against faults that undo it all the time comes to an end: each entry is looked at until it has been
    /// changed once, and then left behind.
    fn case_27_28_every_turn_of_a_sweep_gets_further<F>() {
        let rig = rig_with::<F>(RigSetup { frames: 1024, ..RigSetup::default() });
        let over = AtomicBool::new(false);
        let (done, is_done) = channel();
        std::thread::scope(|scope| {
            for first in 0..2 {
                let (rig, over) = (&rig, &over);
                scope.spawn(move || {
                    let mut vcpu = rig.vcpu();
                    for gfn in (first..24 * 512).step_by(3).cycle() {
                        if over.load(Ordering::Acquire) {
                            break;
                        }
                        // Whatever it comes to: it comes to an end.
                        let _ = vcpu.fault(Fault::write(Gfn(gfn).address()));
                    }
                });
            }
            scope.spawn(|| {
                for round in 0..60 {
                    // More entries than a walk goes through before it yields.
                    let range = Gfn(0)..Gfn(24 * 512);
                    match round % 4 {
                        0 => drop(rig.mmu.zap(SPACE, range)),
                        1 => drop(rig.mmu.write_protect(SPACE, range, Level::L1)),
                        2 => drop(rig.mmu.age(SPACE, range)),
                        _ => drop(rig.mmu.zap_leaves(SPACE, range)),
                    }
                }
                done.send(()).expect("somebody listens");
            });
            hear(&is_done);
            over.store(true, Ordering::Release);
        });
        let audit = rig.mmu.audit();
        assert_eq!((audit.pages, audit.frozen, audit.unknown), (rig.mmu.stats().pages, 0, 0));
        // Steps get further too, of whatever length, at whatever end.
        for (range, frames) in [(Gfn(5)..Gfn(5), 1), (Gfn(u64::MAX - 3)..Gfn(u64::MAX), 0), (Gfn(7)..Gfn(5000), u64::MAX)] {
            let parts: Vec<_> = Steps::new(range.clone(), frames).with_upper_tables().take(100).collect();
            assert!(parts.len() < 100 && parts.iter().all(|part| !part.is_empty()), "{range:?}");
        }
    }

    /// A gibibyte goes in steps, none longer than was asked for, and between two of them others work on the same tables.
    fn case_29_a_gibibyte_goes_in_short_steps<F>() {
        let rig = rig_with::<F>(RigSetup { frames: 2048, ..RigSetup::default() });
        let blocks = 512;
        fill(&rig, (0..blocks).flat_map(|block| (0..8).map(move |n| block * 512 + n)));
        let mut vcpu = rig.vcpu();
        let mut steps = Steps::new(Gfn(0)..Gfn(FRAMES), 4 * 512).with_upper_tables();
        let (mut longest, mut count) = (0, 0);
        let pending = steps.run(
            |part| {
                let pending = rig.mmu.zap(SPACE, part);
                longest = longest.max(pending.leaves());
                pending
            },
            |_| {
                count += 1;
                // A page of the last block, which is not reached yet.
                let outcome = vcpu.fault(Fault::write(Gfn(FRAMES - 1).address()));
                assert!(matches!(outcome, Ok(Outcome::Fixed { .. } | Outcome::Spurious)), "{outcome:?}");
                ControlFlow::Continue(())
            },
        );
        let _ = rig.host().take_flushes();
        pending.expect("there were parts").flush();
        assert_eq!(rig.host().take_flushes().len(), 1);
        assert!(count >= blocks / 4 && longest <= 4 * 8 + 1, "{count} steps, up to {longest} leaves");
        assert_eq!(rig.mmu.stats().pages, [1, 0, 0], "the one that came after the last step");

        // So does what a root maps.
        fill(&rig, (0..blocks - 1).map(|block| block * 512));
        let mut teardown = rig.mmu.invalidate_roots();
        let mut pieces = 0;
        while teardown.step() {
            pieces += 1;
            assert!(pieces < 8);
            vcpu.load_root().expect("a frame for the root");
            assert!(vcpu.fault(Fault::write(Gpa(0))).is_ok());
        }
        assert_eq!(rig.mmu.stats().pages, [1, 0, 0]);
    }

    /// Sweeps that take the same leaves, tables and tables of tables at the same time, beside faults: each leaf that a fault
    /// installed is counted as taken by one of them, and the books are even in the end.
    fn case_35_each_leaf_is_taken_once<F>() {
        // In step over the same leaves: who is beaten to one does not count it.
        let rig = rig_with::<F>(RigSetup::default());
        for round in 0..60 {
            let count = fill(&rig, 0..1024);
            let barrier = Barrier::new(2);
            let taken: u64 = std::thread::scope(|scope| {
                let sweep = || {
                    barrier.wait();
                    if round % 2 == 0 {
                        rig.mmu.zap_leaves(SPACE, Gfn(0)..Gfn(1024)).leaves()
                    } else {
                        rig.mmu.zap(SPACE, Gfn(0)..Gfn(1024)).leaves()
                    }
                };
                let sweeps = [scope.spawn(sweep), scope.spawn(sweep)];
                sweeps.into_iter().map(|it| it.join().expect("it goes on")).sum()
            });
            assert_eq!(taken, count, "round {round}");
            assert_eq!(rig.mmu.stats().pages, [0; 3]);
        }
        let rig = rig_with::<F>(RigSetup { frames: 2048, ..RigSetup::default() });
        let (installed, taken) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let (rig, installed, taken) = (&rig, &installed, &taken);
            scope.spawn(move || {
                let mut vcpu = rig.vcpu();
                for n in 0..30_000u64 {
                    let gfn = n * 37 % 2048;
                    if let Ok(Outcome::Fixed { .. }) = vcpu.fault(Fault::write(Gfn(gfn).address())) {
                        installed.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
            for sweep in 0..2u64 {
                scope.spawn(move || {
                    for round in 0..400u64 {
                        let first = round % 4 * 512;
                        let pending = match (round + sweep) % 3 {
                            0 => rig.mmu.zap(SPACE, Gfn(0)..Gfn(FRAMES)),
                            1 => rig.mmu.zap(SPACE, Gfn(first)..Gfn(first + 512)),
                            _ => rig.mmu.zap_leaves(SPACE, Gfn(first)..Gfn(first + 300)),
                        };
                        taken.fetch_add(pending.leaves(), Ordering::Relaxed);
                    }
                });
            }
        });
        let left = rig.mmu.stats().pages[0];
        assert_eq!(rig.mmu.audit().pages[0], left);
        assert_eq!(installed.into_inner(), taken.into_inner() + left);
        rig.mmu.zap(SPACE, Gfn(0)..Gfn(FRAMES)).flush();
        // One table reaches further than the range.
        assert_eq!((rig.mmu.stats().pages, rig.mmu.stats().tables), ([0; 3], 1));
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gpa(0), Access::Write).is_ok());
    }
}
