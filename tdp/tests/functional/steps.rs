//! Sweeps in steps: what the parts come to is what the whole would have come to.

use crate::common::host::{Memory, TestHost};
use crate::common::processor::{Processor, Report};
use crate::common::rig::{Rig, RigSetup};
use std::ops::ControlFlow;
use tdp::protected::{HandOffCause, HandOffError, HandOffStep};
use tdp::{
    Absorb, Access, AddressSpaceId, ConvertError, EntryPlace, Fault, FlushRequest, Gfn, GfnRange,
    Gpa, Leaf, Level, Mmu, Outcome, PendingFlush, Pfn, Progress, RemovalError, Removed, Slot,
    Steps,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const OTHER: AddressSpaceId = AddressSpaceId(1);
const BASE: u64 = 1 << 20;
/// Neither end is one of a table.
const RANGE: GfnRange = GfnRange {
    start: Gfn(700),
    end: Gfn((1 << 20) + 300),
};

fn on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Pages and large pages here and there below 8 GiB, the same in both address spaces.
fn populated<F: Processor>() -> Rig<F> {
    let rig = Rig::<F>::with(RigSetup {
        frames: 4096,
        ..RigSetup::default()
    });
    for space in [SPACE, OTHER] {
        let slot = Slot::new(Gfn(0)..Gfn(1 << 21), Memory::new(Pfn(BASE), Level::L3));
        let slot = slot.in_space(space);
        rig.mmu.slots().insert(slot).expect("the first slot");
        let mut vcpu = rig.vcpu();
        vcpu.set_address_space(space).expect("a frame for the root");
        let large = vcpu.fault(Fault::write(Gfn(2 << 18).address()));
        assert_eq!(large, Ok(Outcome::Fixed { level: Level::L3 }));
        let mut number = 1u64;
        for n in 0..600 {
            number = number.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let level = match n % 8 {
                0 => Level::L2,
                _ => Level::L1,
            };
            let gfn = Gfn(number >> 43);
            let fault = Fault::write(gfn.address()).max_level(level);
            assert!(matches!(
                vcpu.fault(fault),
                Ok(Outcome::Fixed { .. } | Outcome::Spurious)
            ));
        }
    }
    // A large page in place of a table was one.
    let _ = rig.host().take_flushes();
    rig
}

fn leaves<F: Processor>(mmu: &Mmu<F, TestHost>, as_id: AddressSpaceId) -> Vec<Leaf> {
    let mut leaves = Vec::new();
    mmu.visit_leaves(as_id, Gfn(0)..Gfn(u64::MAX), |leaf| leaves.push(leaf));
    leaves
}

/// All that can be told of an MMU and of what a sweep left to be flushed.
#[derive(Debug, PartialEq)]
struct Seen {
    leaves: [Vec<Leaf>; 2],
    tables: u64,
    pages: [u64; 3],
    counted: (u64, usize),
    flushes: Vec<FlushRequest>,
}

fn seen<F: Processor>(rig: &Rig<F>, pending: PendingFlush<'_, F, TestHost>) -> Seen {
    let counted = (pending.leaves(), pending.tables());
    assert_eq!(
        rig.host().take_flushes(),
        [],
        "nothing is flushed by itself"
    );
    pending.flush();
    let (stats, audit) = (rig.mmu.stats(), rig.mmu.audit());
    assert_eq!((stats.pages, stats.tables), (audit.pages, audit.tables));
    assert_eq!((audit.misplaced, audit.unknown), (0, 0));
    Seen {
        leaves: [SPACE, OTHER].map(|space| leaves(&rig.mmu, space)),
        tables: stats.tables,
        pages: stats.pages,
        counted,
        flushes: rig.host().take_flushes(),
    }
}

type Sweep<F> = for<'a> fn(&'a Mmu<F, TestHost>, GfnRange) -> PendingFlush<'a, F, TestHost>;

/// Sweeps that leave something to be flushed, and whether they take tables away.
fn sweeps<F: Processor>() -> [(Sweep<F>, bool); 3] {
    [
        (|mmu, range| mmu.zap(SPACE, range), true),
        (|mmu, range| mmu.zap_leaves(SPACE, range), false),
        (
            |mmu, range| mmu.write_protect(SPACE, range, Level::L1),
            false,
        ),
    ]
}

fn steps(frames: u64, takes_tables: bool) -> Steps {
    let steps = Steps::new(RANGE, frames);
    match takes_tables {
        true => steps.with_upper_tables(),
        false => steps,
    }
}

#[test]
fn parts_cover_a_range_once_in_each_pass() {
    let end = u64::MAX;
    for (start, end) in [
        (0, 0),
        (9, 5),
        (0, 1),
        (511, 513),
        (700, (1 << 20) + 300),
        (1 << 18, 1 << 19),
        (end - 5000, end),
        (end, end),
    ] {
        for frames in [0, 1, 512, 513, 1 << 15, 1 << 18, u64::MAX] {
            let range = GfnRange {
                start: Gfn(start),
                end: Gfn(end),
            };
            for upper in [false, true] {
                let mut steps = Steps::new(range, frames);
                if upper {
                    steps = steps.with_upper_tables();
                }
                let total = steps.progress().total;
                let (mut next, mut passes, mut last) = (Gfn(start), 0, None);
                for part in steps.by_ref() {
                    assert!(!part.is_empty());
                    if part.start != next {
                        assert_eq!((part.start, next), (range.start, range.end));
                        passes += 1;
                    }
                    let is_cut = |gfn: Gfn| gfn.0.is_multiple_of(512);
                    assert!(part.start == range.start || is_cut(part.start));
                    assert!(part.end == range.end || is_cut(part.end));
                    next = part.end;
                    last = Some(part);
                }
                assert!(steps.is_done() && steps.next().is_none());
                assert_eq!(steps.progress().done, total);
                if range.is_empty() {
                    assert_eq!((last, total), (None, 0));
                } else {
                    assert_eq!(next, range.end);
                    assert_eq!(total, range.pages() * (passes + 1));
                    assert!(upper || passes == 0);
                    assert!(!upper || last == Some(range), "the last is all of it");
                }
            }
        }
    }
}

both_formats! {
    /// A sweep in steps of any length leaves the tables, the books and one flush as the sweep in one does.
    fn steps_come_to_the_whole<F>() {
        for (sweep, takes_tables) in sweeps::<F>() {
            let rig = populated::<F>();
            let whole = seen(&rig, sweep(&rig.mmu, RANGE));
            assert!(whole.counted.0 > 200 && whole.flushes.len() == 1);
            assert_eq!(whole.counted.1 > 100, takes_tables);
            for frames in [512, 1 << 12, 1 << 18, 1 << 20, 1 << 30] {
                let rig = populated::<F>();
                let parts = steps(frames, takes_tables).run(|part| sweep(&rig.mmu, part), on);
                assert_eq!(seen(&rig, parts.expect("it is not empty")), whole, "{frames}");
            }
        }
    }

    /// Without the further passes tables above the size of a step would stay.
    fn upper_tables_take_further_passes<F>() {
        let rig = populated::<F>();
        let range = GfnRange { start: Gfn(0), end: Gfn(1 << 21) };
        drop(Steps::new(range, 512).run(|part| rig.mmu.zap(SPACE, part), on));
        drop(Steps::new(range, 512).run(|part| rig.mmu.zap(OTHER, part), on));
        assert_eq!(rig.mmu.stats().pages, [0; 3]);
        assert!(rig.mmu.stats().tables > 2);
        for space in [SPACE, OTHER] {
            let mut steps = Steps::new(range, 512).with_upper_tables();
            drop(steps.run(|part| rig.mmu.zap(space, part), on));
        }
        assert_eq!(rig.mmu.stats().tables, 2, "the range does not cover what an entry of a root does");
    }

    /// Aging in steps, and looking, see what the whole sees.
    fn ages_are_put_together<F>() {
        let rig = populated::<F>();
        let test = |range| rig.mmu.test_age(SPACE, range);
        assert_eq!(Steps::new(RANGE, 512).run(test, on), Some(true));
        assert_eq!(Steps::new(RANGE, 512).run(|part| rig.mmu.age(SPACE, part), on), Some(true));
        assert_eq!(Steps::new(RANGE, 512).run(|part| rig.mmu.age(SPACE, part), on), Some(false));
        assert!(!rig.mmu.test_age(SPACE, RANGE));
        assert!(rig.mmu.test_age(OTHER, RANGE));
        let old = rig.mmu.translate(SPACE, Gfn(0)).is_some_and(|leaf| leaf.spte.0 & F::ACCESSED == 0);
        assert!(!old, "out of the range");
        assert_eq!(Steps::new(Gfn(5)..Gfn(5), 512).run(test, on), None);
    }

    /// The steps can be left after any and gone on with, whatever happened meanwhile: all is gone over, and what is reported
    /// tells how far.
    fn steps_can_be_left_and_gone_on_with<F>() {
        let rig = populated::<F>();
        let whole = seen(&rig, rig.mmu.zap(SPACE, RANGE));
        let rig = populated::<F>();
        let mut vcpu = rig.vcpu();
        let mut steps = Steps::new(RANGE, 1 << 15).with_upper_tables();
        let mut pending: Option<PendingFlush<'_, F, TestHost>> = None;
        let mut reports = vec![steps.progress()];
        let mut calls = 0;
        while !steps.is_done() {
            let mut left = 1 + calls % 3;
            let some = steps.run(
                |part| rig.mmu.zap(SPACE, part),
                |progress| {
                    reports.push(progress);
                    left -= 1;
                    if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                },
            );
            let some = some.expect("it was not done");
            match &mut pending {
                Some(pending) => pending.absorb(some),
                None => pending = Some(some),
            }
            calls += 1;
            // The world goes on outside the range, in a table of its own.
            let gfn = Gfn((1 << 20) + 512 + calls);
            assert!(vcpu.fault(Fault::write(gfn.address()).max_level(Level::L1)).is_ok());
        }
        assert!(calls > 10, "{calls}");
        assert!(reports.is_sorted_by(|a, b| a.done < b.done && a.total == b.total));
        assert_eq!(reports.last().map(|last| last.done), Some(steps.progress().total));
        assert!(steps.run(|part| rig.mmu.zap(SPACE, part), on).is_none());
        let pending = pending.expect("there was something");
        assert_eq!((pending.leaves(), pending.tables()), whole.counted);
        pending.flush();
        assert_eq!(rig.host().take_flushes(), whole.flushes);
        let in_range = |leaf: &&Leaf| leaf.level.range(leaf.gfn).overlaps(RANGE);
        assert_eq!(leaves(&rig.mmu, SPACE).iter().filter(in_range).count(), 0);
    }

    /// What is absorbed is flushed with the rest and not before; its tables wait for that.
    fn flushes_become_one<F>() {
        let rig = populated::<F>();
        let mut cpu = rig.processor(rig.vcpu());
        let gpas = [Gpa(0x7000_0000), Gpa(0x7800_0000)];
        for gpa in gpas {
            assert!(cpu.vcpu.fault(Fault::write(gpa).max_level(Level::L1)).is_ok());
            assert!(cpu.run(gpa, Access::Write).is_ok());
        }
        let _ = rig.host().take_flushes();
        let block = |gpa: Gpa| Level::L2.range(gpa.gfn());
        let mut pending = rig.mmu.zap(SPACE, block(gpas[0]));
        pending.absorb(rig.mmu.zap(SPACE, block(gpas[1])));
        // An empty one takes nothing from it.
        pending.absorb(rig.mmu.zap(SPACE, Gfn(1 << 30)..Gfn(1 << 31)));
        assert!(!pending.is_empty());
        assert_eq!(rig.host().take_flushes(), []);
        rig.mmu.synchronize();
        let before = rig.frames().allocated();
        for gpa in gpas {
            assert!(cpu.touch(gpa, Access::Write).result.is_ok(), "still cached");
        }
        let tables = pending.tables();
        assert_eq!(tables, 2);
        pending.flush();
        rig.mmu.synchronize();
        assert_eq!(before - rig.frames().allocated(), tables);
        let flushed = rig.host().take_flushes();
        assert_eq!(flushed.len(), 1);
        assert!(gpas.iter().all(|&gpa| flushed[0].range.contains(gpa.gfn())));
        for gpa in gpas {
            assert_eq!(cpu.touch(gpa, Access::Write).result, Err(Report::Absent));
        }
    }

    /// Another space has a flush of its own; what another MMU has left is flushed at once.
    fn each_space_and_each_mmu_is_flushed<F>() {
        let rig = populated::<F>();
        let apart = populated::<F>();
        let mut pending = rig.mmu.zap(SPACE, RANGE);
        let theirs = rig.mmu.zap(OTHER, RANGE);
        let leaves = pending.leaves() + theirs.leaves();
        pending.absorb(theirs);
        assert_eq!(rig.host().take_flushes(), []);
        pending.absorb(apart.mmu.zap(SPACE, RANGE));
        assert_eq!(apart.host().take_flushes().len(), 1);
        assert!(pending.leaves() > leaves);
        pending.flush();
        let flushed = rig.host().take_flushes();
        assert_eq!(flushed.iter().map(|it| it.as_id).collect::<Vec<_>>(), [SPACE, OTHER]);
    }

    /// A sweep in steps that finds nothing flushes nothing; what another has taken away and not flushed it flushes too.
    fn the_unflushed_of_others_is_flushed<F>() {
        let rig = populated::<F>();
        rig.mmu.zap(SPACE, RANGE).flush();
        let _ = rig.host().take_flushes();
        let sweep = || Steps::new(RANGE, 1 << 15).run(|part| rig.mmu.zap_leaves(SPACE, part), on);
        let nothing = sweep().expect("it is not empty");
        assert!(nothing.is_empty());
        drop(nothing);
        assert_eq!(rig.host().take_flushes(), []);
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gpa(0x3000_0000), Access::Write).is_ok());
        let _ = rig.host().take_flushes();
        let theirs = rig.mmu.zap_leaves(SPACE, RANGE);
        let ours = sweep().expect("it is not empty");
        assert!(!ours.is_empty() && ours.leaves() == 0);
        ours.flush();
        let flushed: Vec<_> = rig.host().take_flushes().iter().map(|it| it.range).collect();
        assert_eq!(flushed, [RANGE]);
        assert_eq!(cpu.touch(Gpa(0x3000_0000), Access::Read).result, Err(Report::Absent));
        drop(theirs);
    }
}

#[cfg(feature = "rayon")]
mod parallel {
    use super::*;

    both_formats! {
        /// Parts side by side come to the whole as well, while faults go on elsewhere.
        fn parallel_steps_come_to_the_whole<F>() {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().expect("three threads");
            for (sweep, takes_tables) in sweeps::<F>() {
                let rig = populated::<F>();
                let whole = seen(&rig, sweep(&rig.mmu, RANGE));
                for frames in [512, 1 << 13, 1 << 18] {
                    let rig = populated::<F>();
                    let mut last = None;
                    let parts = pool.install(|| {
                        steps(frames, takes_tables).run_parallel(
                            |part| sweep(&rig.mmu, part),
                            |progress| {
                                last = Some(progress);
                                ControlFlow::Continue(())
                            },
                        )
                    });
                    assert_eq!(seen(&rig, parts.expect("it is not empty")), whole, "{frames}");
                    assert!(last.is_some_and(|last| last.done == last.total));
                }
            }
        }

        /// They can be left and gone on with too.
        fn parallel_steps_can_be_left<F>() {
            let rig = populated::<F>();
            let whole = seen(&rig, rig.mmu.zap(SPACE, RANGE));
            let rig = populated::<F>();
            let mut steps = Steps::new(RANGE, 512).with_upper_tables();
            let (mut leaves, mut calls) = (0, 0);
            while let Some(pending) = steps.run_parallel(
                |part| rig.mmu.zap(SPACE, part),
                |_| ControlFlow::Break(()),
            ) {
                leaves += pending.leaves();
                calls += 1;
            }
            assert!(steps.is_done() && calls > 3);
            assert_eq!(leaves, whole.counted.0);
            assert_eq!(super::leaves(&rig.mmu, SPACE), whole.leaves[0]);
        }
    }
}

/// The first failure of any part is the whole's, and what all parts removed is counted whichever of them failed.
#[test]
fn parts_that_fail_do_not_hide_what_the_others_removed() {
    let removed = |frames| {
        let mut removed = Removed::default();
        (removed.frames, removed.tables, removed.leaked) = (frames, 1, 2);
        removed
    };
    let failed = |gfn, frames| {
        let place = EntryPlace {
            as_id: SPACE,
            gfn: Gfn(gfn),
            level: Level::L1,
        };
        RemovalError {
            failed: 1,
            first: HandOffError {
                place,
                step: HandOffStep::Block,
                cause: HandOffCause::Busy,
            },
            removed: removed(frames),
        }
    };
    let mut whole: Result<Removed, ConvertError> = Ok(removed(10));
    whole.absorb(Ok(removed(5)));
    assert_eq!(
        whole.map(|it| (it.frames, it.tables, it.leaked)),
        Ok((15, 2, 4))
    );
    whole.absorb(Err(failed(7, 100).into()));
    whole.absorb(Ok(removed(1000)));
    whole.absorb(Err(failed(8, 10_000).into()));
    let Err(ConvertError::Removal(error)) = whole else {
        panic!("{whole:?}");
    };
    assert_eq!((error.failed, error.first.place.gfn), (2, Gfn(7)));
    let all = error.removed;
    assert_eq!((all.frames, all.tables, all.leaked), (11_115, 5, 10));
    // What makes no sense for a part makes none for the whole, and stays so.
    let senseless = ConvertError::NotConfidential;
    let mut whole: Result<Removed, ConvertError> = Ok(removed(1));
    whole.absorb(Err(senseless));
    for other in [Ok(removed(1)), Err(failed(7, 1).into())] {
        whole.absorb(other);
        assert_eq!(whole, Err(senseless));
    }
    let mut sum = u64::MAX - 1;
    sum.absorb(1);
    sum.absorb(7);
    assert_eq!(sum, u64::MAX, "a count does not wrap");
}
