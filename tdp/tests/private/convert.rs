//! Conversion between the halves.

use crate::rig::{GUEST, Rig, SPACE, fixed, private, shared};
use std::ops::ControlFlow;
use tdp::protected::tdx::{Call, Operand, Status};
use tdp::{
    Access, ConvertError, FrameSource, Gfn, Host, Level, Mapping, MemoryFault, Outcome, Perms, Pfn,
    RetryReason, Steps, Visibility,
};

#[test]
fn conversion_takes_away_what_the_other_half_maps() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    for n in 0..4 {
        assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
    }
    let removed = rig
        .mmu
        .convert(SPACE, Gfn(1)..Gfn(3), Visibility::Shared)
        .unwrap();
    assert_eq!(removed.frames, 2);
    assert_eq!(rig.mmu.visibility(Gfn(1)), Some(Visibility::Shared));
    assert_eq!(rig.mmu.visibility(Gfn(3)), Some(Visibility::Private));
    assert_eq!(vcpu.fault(shared(1)), fixed(Level::L1));
    assert_eq!(vcpu.fault(private(0)), Ok(Outcome::Spurious));
    rig.check();
    rig.mmu
        .convert(SPACE, Gfn(1)..Gfn(2), Visibility::Private)
        .unwrap();
    assert!(rig.mmu.translate(SPACE, Gfn(1)).is_none());
    assert_eq!(vcpu.fault(private(1)), fixed(Level::L1));
    assert_eq!(
        vcpu.fault(shared(1)),
        Ok(Outcome::MemoryFault(MemoryFault::IsPrivate))
    );
    rig.check();
}

#[test]
fn visibilities_are_told_in_runs() {
    let rig = Rig::running(Level::L1);
    for range in [Gfn(5)..Gfn(7), Gfn(600)..Gfn(601)] {
        rig.mmu.convert(SPACE, range, Visibility::Shared).unwrap();
    }
    let (private, shared) = (Visibility::Private, Visibility::Shared);
    let mut runs = Vec::new();
    rig.mmu.visibilities(Gfn(3)..Gfn(700), |range, visibility| {
        runs.push((range.start.0..range.end.0, visibility));
    });
    let expected = [
        (3..5, private),
        (5..7, shared),
        (7..600, private),
        (600..601, shared),
        (601..700, private),
    ];
    assert_eq!(runs, expected);
    assert_eq!(rig.mmu.private_frames(Gfn(3)..Gfn(700)), 697 - 3);
}

/// A vCPU that goes by what it remembers of a region tells its halves apart all the same.
#[test]
fn what_is_remembered_of_a_region_ends_with_a_conversion() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    // By the long way, by one that remembers, by what is remembered.
    for n in 0..3 {
        assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
    }
    assert_eq!(vcpu.fault(private(2)), Ok(Outcome::Spurious));
    let is_shared = Ok(Outcome::MemoryFault(MemoryFault::IsShared));
    let one = Gfn(5)..Gfn(6);
    rig.mmu
        .convert(SPACE, one.clone(), Visibility::Shared)
        .unwrap();
    for n in 6..9 {
        assert_eq!(vcpu.fault(private(5)), is_shared);
        assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
    }
    assert_eq!(vcpu.fault(shared(5)), fixed(Level::L1));
    rig.mmu.convert(SPACE, one, Visibility::Private).unwrap();
    assert_eq!(vcpu.fault(private(5)), fixed(Level::L1));
    assert_eq!(
        vcpu.fault(shared(5)),
        Ok(Outcome::MemoryFault(MemoryFault::IsPrivate))
    );
    rig.check();
}

#[test]
fn a_large_private_leaf_is_split_before_a_part_of_it_is_converted() {
    let rig = Rig::running(Level::L2);
    let mut vcpu = rig.vcpu();
    assert_eq!(vcpu.fault(private(0)), fixed(Level::L2));
    rig.accept(0, Level::L2);
    let removed = rig
        .mmu
        .convert(SPACE, Gfn(5)..Gfn(6), Visibility::Shared)
        .unwrap();
    assert_eq!(removed.frames, 1);
    assert_eq!(rig.mmu.stats().pages, [511, 0, 0]);
    // The rest kept its content: it needs no second ACCEPT.
    assert_eq!(vcpu.fault(private(4)), Ok(Outcome::Spurious));
    rig.check();
    // No large leaf of either kind across the edge.
    assert_eq!(vcpu.fault(shared(5)), fixed(Level::L1));
    rig.check();
}

#[test]
fn a_large_shared_leaf_is_split_before_a_part_of_it_is_converted() {
    let rig = Rig::running(Level::L2);
    let mut vcpu = rig.vcpu();
    let all = Gfn(0)..Gfn(1024);
    rig.mmu.convert(SPACE, all, Visibility::Shared).unwrap();
    assert_eq!(vcpu.fault(shared(0)), fixed(Level::L2));
    assert_eq!(vcpu.fault(shared(600)), fixed(Level::L2));
    rig.mmu
        .convert(SPACE, Gfn(500)..Gfn(520), Visibility::Private)
        .unwrap();
    assert_eq!(rig.mmu.stats().pages, [1024 - 20, 0, 0]);
    assert_eq!(rig.mmu.stats().splits, 2);
    // What was not converted never stopped being mapped.
    assert_eq!(vcpu.fault(shared(499)), Ok(Outcome::Spurious));
    assert_eq!(vcpu.fault(shared(520)), Ok(Outcome::Spurious));
    assert_eq!(vcpu.fault(private(510)), fixed(Level::L1));
    rig.check();
}

/// Without a frame for the table that a split needs, all that the leaf maps is taken away: what was not converted faults again.
#[test]
fn a_part_of_a_large_shared_leaf_is_converted_without_a_frame_to_split_it() {
    let rig = Rig::running(Level::L2);
    let mut vcpu = rig.vcpu();
    let all = Gfn(0)..Gfn(1024);
    rig.mmu.convert(SPACE, all, Visibility::Shared).unwrap();
    for gfn in [0, 512] {
        assert_eq!(vcpu.fault(shared(gfn)), fixed(Level::L2));
    }
    let frames = rig.mmu.host().frames();
    let (mut taken, mut room) = (Vec::new(), [Pfn(0); 64]);
    while let Ok(count) = frames.allocate(&mut room) {
        taken.extend_from_slice(&room[..count]);
    }
    let part = Gfn(5)..Gfn(6);
    rig.mmu.convert(SPACE, part, Visibility::Private).unwrap();
    assert_eq!(rig.mmu.visibility(Gfn(5)), Some(Visibility::Private));
    assert!(rig.mmu.translate(SPACE, Gfn(5)).is_none());
    assert_eq!(rig.mmu.stats().pages, [0, 1, 0]);
    frames.free(&taken);
    assert_eq!(vcpu.fault(private(5)), fixed(Level::L1));
    assert_eq!(vcpu.fault(shared(4)), fixed(Level::L1));
    assert_eq!(vcpu.fault(shared(600)), Ok(Outcome::Spurious));
    rig.check();
}

#[test]
fn no_leaf_spans_both_kinds() {
    let rig = Rig::running(Level::L2);
    let mut vcpu = rig.vcpu();
    rig.mmu
        .convert(SPACE, Gfn(512)..Gfn(513), Visibility::Shared)
        .unwrap();
    assert_eq!(vcpu.fault(private(600)), fixed(Level::L1));
    assert_eq!(vcpu.fault(private(0)), fixed(Level::L2));
    assert_eq!(vcpu.fault(shared(512)), fixed(Level::L1));
    rig.mmu
        .convert(SPACE, Gfn(1024)..Gfn(1536), Visibility::Shared)
        .unwrap();
    assert_eq!(vcpu.fault(shared(1030)), fixed(Level::L2));
    rig.check();
}

#[test]
fn no_large_leaf_reaches_into_an_invalidation() {
    let rig = Rig::running(Level::L2);
    let mut vcpu = rig.vcpu();
    let invalidation = rig.mmu.invalidate_begin(SPACE, Gfn(5)..Gfn(6));
    assert_eq!(vcpu.fault(private(100)), fixed(Level::L1));
    assert_eq!(vcpu.fault(private(600)), fixed(Level::L2));
    drop(invalidation);
    rig.check();
}

#[test]
fn ranges_that_make_no_sense_are_refused() {
    let rig = Rig::running(Level::L1);
    let with_bit = Gfn(1 << 35)..Gfn((1 << 35) + 1);
    for range in [Gfn(5)..Gfn(5), with_bit] {
        assert!(matches!(
            rig.mmu.convert(SPACE, range.clone(), Visibility::Shared),
            Err(ConvertError::Range { .. })
        ));
        assert!(rig.mmu.zap_private(SPACE, range).is_err());
    }
    // The last frames that there can be are as good as any.
    let last = Gfn((1 << 35) - 512)..Gfn(1 << 35);
    rig.mmu.convert(SPACE, last, Visibility::Shared).unwrap();
    let of = |gfn: u64| rig.mmu.visibility(Gfn(gfn));
    assert_eq!(of((1 << 35) - 1), Some(Visibility::Shared));
    assert_eq!(of((1 << 35) - 513), Some(Visibility::Private));
    let slot = tdp::Slot::new(
        Gfn(1 << 35)..Gfn((1 << 35) + GUEST),
        tdp::LinearBacking::new(Pfn(0), Level::L1),
    );
    assert!(rig.mmu.slots().insert(slot).is_err());
}

#[test]
fn below_tables_that_are_there_no_leaf_spans_both_kinds_either() {
    let rig = Rig::running(Level::L2);
    let mut vcpu = rig.vcpu();
    let mut touch = |gfn: u64, at_most| match vcpu.fault(private(gfn).max_level(at_most)) {
        Ok(Outcome::Fixed { level }) => level,
        other => panic!("{other:?}"),
    };
    // Links all tables above.
    assert_eq!(touch(0, Level::L2), Level::L2);
    let share = |gfn: u64| {
        let range = Gfn(gfn)..Gfn(gfn + 1);
        rig.mmu.convert(SPACE, range, Visibility::Shared).unwrap();
    };
    share(512);
    share(2047);
    assert_eq!(touch(700, Level::L2), Level::L1);
    assert_eq!(touch(1024 + 3, Level::L2), Level::L2);
    assert_eq!(touch(2046, Level::L2), Level::L1);
    // What the guest accepts, and what it accepted once.
    assert_eq!(touch(2048 + 5, Level::L1), Level::L1);
    assert_eq!(touch(2560 + 511, Level::L3), Level::L2);
    let pages = rig.mmu.stats().pages;
    assert_eq!(pages, [3, 3, 0]);
    rig.check();
}

/// Private memory goes in steps as it goes in one: the same pages, the same tables, the same complaints.
#[test]
fn private_memory_is_removed_in_steps() {
    let populated = || {
        let rig = Rig::running(Level::L1);
        let mut vcpu = rig.vcpu();
        for n in (0..GUEST).step_by(97) {
            assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
        }
        drop(vcpu);
        rig
    };
    let range = Gfn(100)..Gfn(GUEST - 100);
    let rig = populated();
    let whole = rig.mmu.zap_private(SPACE, range.clone()).unwrap();
    assert!(whole.frames > 100 && whole.tables > 20);
    let rig = populated();
    let mut steps = Steps::new(range.clone(), 512).with_upper_tables();
    let parts = steps.run(
        |part| rig.mmu.zap_private(SPACE, part),
        |_| ControlFlow::Continue(()),
    );
    assert_eq!(parts, Some(Ok(whole)));
    rig.check();
    // Some fail: the rest is removed and counted, as in one.
    let rig = populated();
    let pages = rig.mmu.stats().pages[0];
    let mut blocks = 0u64;
    rig.script.refuse(move |call| {
        let is_block = call == Call::MemRangeBlock;
        blocks += u64::from(is_block);
        let refused = is_block && [1, 40, 90].contains(&blocks);
        refused.then_some((Status::OperandInvalid, Operand::RCX))
    });
    let parts = Steps::new(Gfn(0)..Gfn(GUEST), 512).run(
        |part| rig.mmu.zap_private(SPACE, part),
        |_| ControlFlow::Continue(()),
    );
    rig.script.clear();
    let Some(Err(ConvertError::Removal(error))) = parts else {
        panic!("{parts:?}");
    };
    assert_eq!(error.first.place.gfn, Gfn(0));
    let left = rig.mmu.stats().pages[0];
    assert_eq!(error.removed.frames, pages - left);
    assert_eq!(error.failed, 3);
    assert!(left > 0 && left <= 3);
    rig.check();
}

/// The bare operation below a fault asks no slot, and yet never maps what is private.
#[test]
fn a_bare_map_maps_shared_memory_only() {
    let rig = Rig::running(Level::L2);
    let mut vcpu = rig.vcpu();
    let mapping = Mapping::memory(Pfn(1 << 24), Level::L2, Perms::RWX);
    let refused = Ok(Outcome::MemoryFault(MemoryFault::IsPrivate));
    assert_eq!(vcpu.map(Gfn(0), mapping, Access::Read), refused);
    let shared = Visibility::Shared;
    rig.mmu.convert(SPACE, Gfn(0)..Gfn(8), shared).unwrap();
    // Not the private rest of the block with it.
    assert_eq!(vcpu.map(Gfn(0), mapping, Access::Read), fixed(Level::L1));
    assert!(rig.mmu.translate(SPACE, Gfn(8)).is_none());
    assert_eq!(vcpu.map(Gfn(8), mapping, Access::Read), refused);
    // Nor while an invalidation holds the frame back; the same in one critical section with others.
    let window = rig.mmu.invalidate_begin(SPACE, Gfn(3)..Gfn(4));
    let held = Ok(Outcome::Retry(RetryReason::Invalidation));
    let small = |gfn| Mapping::memory(Pfn((1 << 24) + gfn), Level::L1, Perms::RWX);
    let mut batch = vcpu.batch().unwrap();
    for (gfn, expected) in [
        (1, fixed(Level::L1)),
        (1, Ok(Outcome::Spurious)),
        (2, fixed(Level::L1)),
        (3, held),
        (8, refused),
    ] {
        assert_eq!(batch.map(Gfn(gfn), small(gfn), Access::Write), expected);
    }
    drop(batch);
    assert_eq!(vcpu.map(Gfn(3), small(3), Access::Write), held);
    drop(window);
    assert_eq!(vcpu.map(Gfn(3), small(3), Access::Write), fixed(Level::L1));
    rig.check();
}
