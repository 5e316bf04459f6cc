//! Conversion between the halves, against faults on either.

use crate::module::Manner;
use crate::world::{A, B, FIRST, PRIVATE, SPACE, Vcpu, World, explore, only};
use loom::thread;
use tdp::{Fault, Gfn, MemoryFault, Outcome, Visibility};

fn touch(vcpu: &mut Vcpu, gfn: Gfn, private: bool) -> Outcome {
    let fault = Fault::write(gfn.address());
    vcpu.fault(if private { fault.private() } else { fault })
        .unwrap()
}

/// Which halves map a frame.
fn mapped(world: &World, vcpu: &mut Vcpu) -> [bool; 2] {
    let shared = world.leaf(vcpu, A);
    assert!(shared.is_none_or(|(pfn, _)| pfn.0 < PRIVATE.0));
    [shared.is_some(), world.mmu.host().module.leaf(A).is_some()]
}

/// A private fault against its frame becoming shared: the page is gone for good, or was never there.
#[test]
fn a_private_fault_against_conversion_to_shared() {
    explore("hand-off x convert", Some(2), || {
        let world = World::confidential(Manner::default(), false);
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];

        let other = thread::spawn(move || {
            let outcome = touch(&mut theirs, A, true);
            (theirs, outcome)
        });
        let to = Visibility::Shared;
        world.mmu.convert(SPACE, only(A), to).unwrap();
        let (mut theirs, outcome) = other.join().unwrap();

        let allowed = matches!(
            outcome,
            Outcome::Fixed { .. } | Outcome::Retry(_) | Outcome::MemoryFault(MemoryFault::IsShared)
        );
        assert!(allowed, "{outcome:?}");
        assert_eq!(mapped(&world, &mut ours), [false, false]);
        assert_eq!(
            touch(&mut theirs, A, true),
            Outcome::MemoryFault(MemoryFault::IsShared)
        );
        world.audit_private();
        world.finish([ours, theirs]);
    });
}

fn quick_private_fault(name: &str, remembers_the_table: bool) {
    explore(name, Some(2), move || {
        let world = World::confidential(Manner::default(), false);
        let mut vcpu = world.vcpu();
        assert!(matches!(touch(&mut vcpu, B, true), Outcome::Fixed { .. }));
        if remembers_the_table {
            // The first has linked the table, and remembers the slot only.
            world.mmu.zap_private(SPACE, only(B)).unwrap();
            assert!(matches!(touch(&mut vcpu, B, true), Outcome::Fixed { .. }));
        }

        // The conversion is the other thread: it looks where the fault may come to change something.
        let mmu = world.mmu.clone();
        let other = thread::spawn(move || {
            mmu.convert(SPACE, only(A), Visibility::Shared).unwrap();
        });
        let outcome = touch(&mut vcpu, A, true);
        other.join().unwrap();

        let allowed = matches!(
            outcome,
            Outcome::Fixed { .. } | Outcome::Retry(_) | Outcome::MemoryFault(MemoryFault::IsShared)
        );
        assert!(allowed, "{outcome:?}");
        assert_eq!(mapped(&world, &mut vcpu), [false, false]);
        world.audit_private();
        world.finish([vcpu]);
    });
}

/// The same for a fault that goes the short way, below a table that is there, on a slot that it knows.
#[test]
fn a_quick_private_fault_against_conversion_to_shared() {
    quick_private_fault("quick hand-off x convert", false);
}

/// The same for one that remembers the table, and that all of it is private.
#[test]
fn a_remembering_private_fault_against_conversion_to_shared() {
    quick_private_fault("remembering hand-off x convert", true);
}

/// A shared fault against its frame becoming private.
#[test]
fn a_shared_fault_against_conversion_to_private() {
    explore("shared fault x convert", Some(3), || {
        let world = World::confidential(Manner::default(), false);
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        world
            .mmu
            .convert(SPACE, only(A), Visibility::Shared)
            .unwrap();

        let other = thread::spawn(move || {
            let outcome = touch(&mut theirs, A, false);
            (theirs, outcome)
        });
        world
            .mmu
            .convert(SPACE, only(A), Visibility::Private)
            .unwrap();
        let (theirs, outcome) = other.join().unwrap();

        let allowed = matches!(
            outcome,
            Outcome::Fixed { .. }
                | Outcome::Retry(_)
                | Outcome::MemoryFault(MemoryFault::IsPrivate)
        );
        assert!(allowed, "{outcome:?}");
        assert_eq!(mapped(&world, &mut ours), [false, false]);
        world.audit_private();
        world.finish([ours, theirs]);
    });
}

/// The same for a fault that goes the short way, below a table that is there: it looks whether the frame is shared only after it
/// has made sure that no conversion is under way.
#[test]
fn a_quick_shared_fault_against_conversion_to_private() {
    explore("quick shared fault x convert", Some(3), || {
        let world = World::confidential(Manner::default(), false);
        let mut vcpu = world.vcpu();
        for gfn in [A, B] {
            world
                .mmu
                .convert(SPACE, only(gfn), Visibility::Shared)
                .unwrap();
        }
        assert!(matches!(touch(&mut vcpu, B, false), Outcome::Fixed { .. }));

        let other = thread::spawn(move || {
            let outcome = touch(&mut vcpu, A, false);
            (vcpu, outcome)
        });
        world
            .mmu
            .convert(SPACE, only(A), Visibility::Private)
            .unwrap();
        let (mut vcpu, outcome) = other.join().unwrap();

        let allowed = matches!(
            outcome,
            Outcome::Fixed { .. }
                | Outcome::Retry(_)
                | Outcome::MemoryFault(MemoryFault::IsPrivate)
        );
        assert!(allowed, "{outcome:?}");
        assert_eq!(mapped(&world, &mut vcpu), [false, false]);
        world.audit_private();
        world.finish([vcpu]);
    });
}

/// Two conversions of one frame to either side: whichever closes last, what the attributes forbid is not mapped.
#[test]
fn two_conversions() {
    explore("convert x convert", Some(2), || {
        let world = World::confidential(Manner::default(), false);
        let mut vcpu = world.vcpu();
        assert!(matches!(touch(&mut vcpu, A, true), Outcome::Fixed { .. }));

        let mmu = world.mmu.clone();
        let other = thread::spawn(move || {
            mmu.convert(SPACE, only(A), Visibility::Private).unwrap();
        });
        world
            .mmu
            .convert(SPACE, only(A), Visibility::Shared)
            .unwrap();
        other.join().unwrap();

        let [shared, private] = mapped(&world, &mut vcpu);
        assert!(!shared, "nobody has touched it");
        if private {
            assert_eq!(world.mmu.visibility(A), Some(Visibility::Private));
        }
        world.audit_private();
        world.finish([vcpu]);
    });
}

/// A removal freezes a table's entry and finds that it is not empty, since a block below was refused, while a frame below
/// becomes shared: the frame is taken away although its table was in other hands for a while.
#[test]
fn a_conversion_against_the_removal_of_a_table() {
    explore("convert x zap of the table", Some(2), || {
        let manner = Manner {
            refuse_blocks: 1,
            ..Manner::default()
        };
        let world = World::confidential(manner, false);
        let mut vcpu = world.vcpu();
        assert!(matches!(touch(&mut vcpu, A, true), Outcome::Fixed { .. }));

        let mmu = world.mmu.clone();
        let zapper = thread::spawn(move || {
            let _ = mmu.zap_private(SPACE, FIRST);
        });
        let converted = world.mmu.convert(SPACE, only(A), Visibility::Shared);
        zapper.join().unwrap();

        if converted.is_ok() {
            assert_eq!(mapped(&world, &mut vcpu), [false, false]);
        } else {
            assert_eq!(world.mmu.visibility(A), Some(Visibility::Private));
        }
        world.audit_private();
        world.finish([vcpu]);
    });
}
