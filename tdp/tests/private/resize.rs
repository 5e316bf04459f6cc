//! Large private leaves: split and fold.

use crate::rig::{PRIVATE_PFN, Rig, SPACE, Vcpu, fixed, private};
use std::panic::{AssertUnwindSafe, catch_unwind};
use tdp::protected::tdx::{Call, Operand, Status};
use tdp::{Gfn, Level, Outcome, Pfn};

#[test]
fn a_guest_that_accepts_small_pages_has_the_large_one_split() {
    let rig = Rig::running(Level::L2);
    let mut vcpu = rig.vcpu();
    assert_eq!(vcpu.fault(private(3)), fixed(Level::L2));
    // ACCEPT of 4 KiB on a block of 2 MiB exits with the level that the guest wants.
    assert_eq!(
        vcpu.fault(private(7).max_level(Level::L1)),
        Ok(Outcome::Spurious)
    );
    assert_eq!(rig.mmu.stats().pages, [512, 0, 0]);
    assert_eq!(rig.mmu.stats().splits, 1);
    rig.check();
    rig.accept(7, Level::L1);
    for n in (0..512).filter(|&n| n != 7) {
        rig.accept(n, Level::L1);
    }
    // And it stays small, uniform as it is: nothing folds it behind the guest's back until that is allowed again.
    let fold = || rig.mmu.fold_private(SPACE, Gfn(0)..Gfn(512)).unwrap();
    let folded = fold();
    assert_eq!((folded.folded, rig.mmu.stats().pages), (0, [512, 0, 0]));
    rig.check();
    rig.mmu.allow_huge(Gfn(100));
    let folded = fold();
    assert_eq!((folded.folded, rig.mmu.stats().pages), (1, [0, 1, 0]));
    rig.check();
}

#[test]
fn uniform_tables_are_folded() {
    let rig = Rig::running(Level::L2);
    let mut vcpu = rig.vcpu();
    for n in 0..512 {
        let outcome = vcpu.fault(private(n).max_level(Level::L1));
        assert_eq!(outcome, fixed(Level::L1));
        rig.accept(n, Level::L1);
    }
    let twins = rig.table().twins_out();
    let folded = rig.mmu.fold_private(SPACE, Gfn(0)..Gfn(1024)).unwrap();
    assert_eq!((folded.folded, folded.left), (1, 0));
    assert_eq!(rig.mmu.stats().pages, [0, 1, 0]);
    assert_eq!(rig.table().twins_out(), twins - 1);
    rig.check();
    assert_eq!(vcpu.fault(private(9)), Ok(Outcome::Spurious));
}

/// Of an image the module takes small pages only. They are not folded before it is closed, whatever the guest may have later: the
/// module is not even asked.
#[test]
fn an_image_is_not_folded_before_it_is_closed() {
    let rig = Rig::building(Level::L2);
    let mut image = rig.mmu.build_private().unwrap();
    for n in 0..512 {
        image
            .add(Gfn(n), Pfn(PRIVATE_PFN.0 + n), Pfn(0x77))
            .unwrap();
    }
    let fold = || rig.mmu.fold_private(SPACE, Gfn(0)..Gfn(512)).unwrap();
    let calls = || rig.mmu.stats().protected.calls.iter().sum::<u64>();
    let before = calls();
    let folded = fold();
    assert_eq!((folded.folded, folded.left), (0, 0));
    assert_eq!(calls(), before);
    assert_eq!(rig.mmu.stats().pages, [512, 0, 0]);
    image.finalise().unwrap();
    assert_eq!(fold().folded, 1);
    assert_eq!(rig.mmu.stats().pages, [0, 1, 0]);
    rig.check();
}

#[test]
fn tables_that_are_not_uniform_are_left_as_they_are() {
    let rig = Rig::running(Level::L2);
    let mut vcpu = rig.vcpu();
    for n in 0..512 {
        assert_eq!(
            vcpu.fault(private(n).max_level(Level::L1)),
            fixed(Level::L1)
        );
    }
    for n in 1..512 {
        rig.accept(n, Level::L1);
    }
    // One page is still pending: the module does not merge.
    let folded = rig.mmu.fold_private(SPACE, Gfn(0)..Gfn(512)).unwrap();
    assert_eq!((folded.folded, folded.left), (0, 1));
    assert_eq!(rig.mmu.stats().pages, [512, 0, 0]);
    assert_eq!(vcpu.fault(private(3)), Ok(Outcome::Spurious));
    rig.mmu.zap_private(SPACE, Gfn(4)..Gfn(5)).unwrap();
    let folded = rig.mmu.fold_private(SPACE, Gfn(0)..Gfn(512)).unwrap();
    assert_eq!((folded.folded, folded.left), (0, 1));
    rig.accept(0, Level::L1);
    // The refused merge is a call that a correct host does not make; the library cannot know what the guest has accepted.
    let _ = rig.module.take_violations();
    rig.check();
}

/// 512 small pages, all accepted, in one table.
fn uniform_table() -> (Rig, Vcpu) {
    let rig = Rig::running(Level::L2);
    let mut vcpu = rig.vcpu();
    for n in 0..512 {
        let outcome = vcpu.fault(private(n).max_level(Level::L1));
        assert_eq!(outcome, fixed(Level::L1));
        rig.accept(n, Level::L1);
    }
    (rig, vcpu)
}

/// Has a fold fail after it has blocked the table, so that the block stays.
fn fold_half(rig: &Rig, how: &str) {
    match how {
        "no ticket" => rig.script.refuse(|call| {
            (call == Call::MemTrack).then_some((Status::OperandInvalid, Operand::RDX))
        }),
        "panic in the ticket" => rig.script.panic_in(Call::MemTrack),
        "panic in the merge" => rig.script.panic_in(Call::MemPagePromote),
        _ => rig.script.refuse(|call| match call {
            Call::MemPagePromote => Some((Status::OperandInvalid, Operand::RCX)),
            Call::MemRangeUnblock => Some((Status::OperandInvalid, Operand::SEPT_TREE)),
            _ => None,
        }),
    }
    let folded = catch_unwind(AssertUnwindSafe(|| {
        rig.mmu.fold_private(SPACE, Gfn(0)..Gfn(512))
    }));
    assert!(!matches!(folded, Ok(Ok(it)) if it.folded > 0), "{how}");
    rig.script.clear();
}

const HALVES: [&str; 4] = [
    "no ticket",
    "panic in the ticket",
    "panic in the merge",
    "no unblock",
];

#[test]
fn a_table_that_a_fold_left_blocked_is_opened_by_who_needs_it() {
    for how in HALVES {
        let (rig, mut vcpu) = uniform_table();
        fold_half(&rig, how);
        // What it maps is still on the books, and in the module.
        rig.check();
        let mut leaves = 0;
        rig.mmu
            .visit_private_leaves(SPACE, Gfn(0)..Gfn(512), |leaf| {
                assert_eq!(leaf.pfn, Pfn(PRIVATE_PFN.0 + leaf.gfn.0));
                leaves += 1;
            });
        assert_eq!(leaves, 512, "{how}");
        assert_eq!(vcpu.fault(private(77)), Ok(Outcome::Spurious), "{how}");
        rig.check();
        let folded = rig.mmu.fold_private(SPACE, Gfn(0)..Gfn(512)).unwrap();
        assert_eq!(folded.folded, 1, "{how}");
        rig.check();
    }
}

#[test]
fn a_table_that_a_fold_left_blocked_is_taken_away_whole_and_in_part() {
    for how in HALVES {
        for (frames, tables) in [(512, 1), (3, 0)] {
            let (rig, _vcpu) = uniform_table();
            fold_half(&rig, how);
            let removed = rig.mmu.zap_private(SPACE, Gfn(0)..Gfn(frames)).unwrap();
            assert_eq!((removed.frames, removed.tables), (frames, tables), "{how}");
            assert_eq!(rig.mmu.stats().pages, [512 - frames, 0, 0], "{how}");
            rig.check();
        }
    }
}

#[test]
fn a_table_that_a_fold_left_blocked_is_reclaimed_from_a_dead_guest() {
    for how in HALVES {
        let (mut rig, vcpu) = uniform_table();
        fold_half(&rig, how);
        drop(vcpu);
        drop(rig.td_vcpu.take());
        let td = rig.table().td().clone();
        assert!(td.mng_vpflushdone().is_success());
        assert!(td.phymem_cache_wb().is_success());
        assert!(td.mng_key_freeid().is_success());
        let removed = rig.mmu.reclaim_private().unwrap();
        assert_eq!(
            (removed.frames, removed.tables, removed.leaked),
            (512, 3, 0)
        );
        assert_eq!(rig.mmu.stats().pages, [0; 3]);
        assert_eq!(rig.table().twins_out(), 0);
    }
}

#[test]
fn a_block_that_cannot_be_taken_back_ends_a_removal_with_an_error() {
    let (rig, mut vcpu) = uniform_table();
    fold_half(&rig, "no ticket");
    rig.script
        .refuse(|call| (call == Call::MemTrack).then_some((Status::OperandInvalid, Operand::RDX)));
    let removed = rig.mmu.zap_private(SPACE, Gfn(0)..Gfn(512));
    assert!(removed.is_err(), "{removed:?}");
    rig.script.clear();
    rig.check();
    assert_eq!(vcpu.fault(private(5)), Ok(Outcome::Spurious));
    rig.check();
}
