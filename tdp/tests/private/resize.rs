//! Large private leaves: split and fold.

use crate::rig::{Rig, SPACE, fixed, private};
use tdp::{Gfn, Level, Outcome};

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
    // And it stays small: nothing folds it behind the guest's back.
    assert_eq!(
        rig.mmu
            .fold_private(SPACE, Gfn(0)..Gfn(512))
            .unwrap()
            .folded,
        0
    );
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
