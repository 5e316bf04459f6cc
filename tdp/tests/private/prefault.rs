//! Mapping ahead, and telling accesses apart.

use crate::rig::{GUEST, Rig, SPACE, fixed, private, shared};
use tdp::protected::HandOffStep;
use tdp::{Gfn, Level, MemoryFault, Outcome, Visibility};

#[test]
fn both_halves_are_mapped_ahead() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    rig.mmu
        .convert(SPACE, Gfn(0x800)..Gfn(0x1000), Visibility::Shared)
        .unwrap();
    assert_eq!(vcpu.fault(private(3)), fixed(Level::L1));
    let done = vcpu
        .prefault(Gfn(0)..Gfn(600), Visibility::Private)
        .unwrap();
    assert_eq!(
        (done.next, done.frames, done.stopped),
        (Gfn(600), 599, None)
    );
    let done = vcpu
        .prefault(Gfn(0x800)..Gfn(0x900), Visibility::Shared)
        .unwrap();
    assert_eq!((done.frames, done.stopped), (0x100, None));
    assert_eq!(vcpu.fault(shared(0x801)), Ok(Outcome::Spurious));
    assert_eq!(rig.mmu.stats().pages, [600 + 0x100, 0, 0]);
    assert_eq!(
        rig.mmu.stats().protected.calls_of(HandOffStep::Install),
        600
    );
    rig.check();
}

#[test]
fn large_leaves_are_mapped_ahead_as_large_ones() {
    let rig = Rig::running(Level::L2);
    let mut vcpu = rig.vcpu();
    let done = vcpu
        .prefault(Gfn(0)..Gfn(1024), Visibility::Private)
        .unwrap();
    assert_eq!((done.frames, done.stopped), (1024, None));
    assert_eq!(rig.mmu.stats().pages, [0, 2, 0]);
    rig.check();
}

#[test]
fn it_stops_where_it_cannot_go_on() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    let stop = |reason| Some(Outcome::MemoryFault(reason));
    let done = vcpu
        .prefault(Gfn(GUEST - 2)..Gfn(GUEST + 2), Visibility::Private)
        .unwrap();
    assert_eq!((done.next, done.frames), (Gfn(GUEST), 2));
    assert_eq!(done.stopped, stop(MemoryFault::NotBacked));
    let done = vcpu.prefault(Gfn(0)..Gfn(1), Visibility::Shared).unwrap();
    assert_eq!(done.stopped, stop(MemoryFault::IsPrivate));
    // The shared bit in the frame number is refused, not taken for the other half.
    let with_bit = Gfn(1 << 35)..Gfn((1 << 35) + 1);
    for visibility in [Visibility::Private, Visibility::Shared] {
        let done = vcpu.prefault(with_bit.clone(), visibility).unwrap();
        assert_eq!(done.stopped, stop(MemoryFault::BeyondWidth));
    }
    // A slot that is going away, or a window, is not waited for without end.
    let window = rig.mmu.invalidate_begin(SPACE, Gfn(0)..Gfn(1));
    let done = vcpu.prefault(Gfn(0)..Gfn(1), Visibility::Private).unwrap();
    assert!(matches!(done.stopped, Some(Outcome::Retry(_))));
    drop(window);
    rig.check();
}

#[test]
fn an_access_is_told_apart() {
    let rig = Rig::running(Level::L1);
    rig.mmu
        .convert(SPACE, Gfn(512)..Gfn(1024), Visibility::Shared)
        .unwrap();
    let info = rig.mmu.explain(shared(3));
    assert_eq!(info.gfn, Gfn(3));
    assert_eq!(info.wanted, Some(Visibility::Shared));
    assert_eq!(info.found, Some(Visibility::Private));
    assert_eq!(info.block.start, Gfn(0));
    assert_eq!(info.block.pages(), 512);
    assert_eq!(
        rig.mmu.explain(private(700)).found,
        Some(Visibility::Shared)
    );
    assert_eq!(rig.mmu.private_frames(Gfn(0)..Gfn(2048)), 1536);
}
