//! What changes a leaf in place, aging, the fast fault and the look of a collection, against the processor, against each other
//! and against what takes the leaf away.

use crate::world::{A, NEW, SPACE, TestHost, Vcpu, World, explore, only, settled};
use loom::thread;
use tdp::{Access, AdBits, DirtyTracking, Ept, Fault, Format, Level, Outcome, Perms, SlotId};

const FIXED: Outcome = Outcome::Fixed { level: Level::L1 };

/// A vCPU on a tree whose accessed and dirty bits the processor does not keep.
fn without_bits(world: &World) -> Vcpu {
    let mut vcpu = world.vcpu();
    vcpu.set_ad_bits(AdBits::Software).unwrap();
    vcpu
}

/// A page is aged while the processor marks it dirty: it is old in the end, and dirty.
#[test]
fn dirty_against_age() {
    explore("dirty x age", None, || {
        let world = World::with_memory(TestHost::new());
        let mut vcpu = world.vcpu();
        assert_eq!(vcpu.fault(Fault::write(A.address())), Ok(FIXED));
        world.clear_dirty(&mut vcpu, A);
        let mut processor = world.processor(&mut vcpu);
        let other = thread::spawn({
            let mmu = world.mmu.clone();
            move || mmu.age(SPACE, only(A))
        });
        assert!(processor.set_dirty(A));
        drop(processor);
        assert!(other.join().unwrap(), "it was young");
        let spte = world.entry(&mut vcpu, A);
        assert!(spte.0 & Ept::DIRTY != 0, "a dirty bit was lost");
        assert!(spte.0 & Ept::ACCESSED == 0, "young still");
        world.finish([vcpu]);
    });
}

/// A page is write-protected while the processor marks it dirty: it is dirty if the write got through.
#[test]
fn dirty_against_write_protection() {
    explore("dirty x write protection", Some(3), || {
        let world = World::with_memory(TestHost::new());
        let mut vcpu = world.vcpu();
        assert_eq!(vcpu.fault(Fault::write(A.address())), Ok(FIXED));
        world.clear_dirty(&mut vcpu, A);
        let mut processor = world.processor(&mut vcpu);
        let other = thread::spawn({
            let mmu = world.mmu.clone();
            move || mmu.write_protect(SPACE, only(A), Level::L1).flush()
        });
        let written = processor.set_dirty(A);
        drop(processor);
        other.join().unwrap();
        let spte = world.entry(&mut vcpu, A);
        assert_eq!(written, spte.0 & Ept::DIRTY != 0, "a dirty bit was lost");
        assert!(!Ept::allows(spte, Access::Write));
        world.finish([vcpu]);
    });
}

/// A fast fault gives a tracked leaf its permissions back while the leaf is aged again: it has all of them or is tracked, and
/// the next fault finds or restores all.
#[test]
fn fast_fault_against_age() {
    explore("fast fault x age", None, || {
        let world = World::with_memory(TestHost::new());
        let [mut ours, mut theirs] = [(); 2].map(|()| without_bits(&world));
        assert_eq!(ours.fault(Fault::write(A.address())), Ok(FIXED));
        assert!(world.mmu.age(SPACE, only(A)));
        // The sweep is the other thread: it may change nothing, and loom goes back from a change to the last look only.
        let other = thread::spawn({
            let mmu = world.mmu.clone();
            move || mmu.age(SPACE, only(A))
        });
        assert!(settled(theirs.fault(Fault::write(A.address())).unwrap()));
        let young = other.join().unwrap();
        let spte = world.entry(&mut ours, A);
        // Aged before the fault, or by an exchange that lost: then it is young.
        let tracked = Ept::is_access_tracked(spte);
        assert!(!tracked || young, "nobody has aged it");
        assert!(tracked || Ept::allows(spte, Access::Write));
        assert!(settled(ours.fault(Fault::write(A.address())).unwrap()));
        assert_eq!(world.leaf(&mut ours, A).unwrap().1, Perms::RWX);
        assert_eq!(world.audit(&mut ours).small, 1);
        world.finish([ours, theirs]);
    });
}

/// A page that was used once is aged by two threads: one of them is told, whoever keeps the accessed bit.
#[test]
fn age_against_age() {
    // With tracked leaves there are two roots, and twice as much to look at.
    let kinds = [
        ("age x age", AdBits::Processor, 2),
        ("age x age, tracked", AdBits::Software, 1),
    ];
    for (name, bits, bound) in kinds {
        explore(name, Some(bound), move || {
            let world = World::with_memory(TestHost::new());
            let mut vcpu = world.vcpu();
            vcpu.set_ad_bits(bits).unwrap();
            assert_eq!(vcpu.fault(Fault::write(A.address())), Ok(FIXED));
            let other = thread::spawn({
                let mmu = world.mmu.clone();
                move || mmu.age(SPACE, only(A))
            });
            let ours = world.mmu.age(SPACE, only(A));
            assert!(other.join().unwrap() != ours, "one use, told {ours}");
            assert!(!world.mmu.test_age(SPACE, only(A)));
            world.finish([vcpu]);
        });
    }
}

/// Two fast faults on one leaf: it has the permissions of both in the end.
#[test]
fn fast_fault_against_fast_fault() {
    explore("fast fault x fast fault", None, || {
        let world = World::with_memory(TestHost::new());
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        assert_eq!(ours.fault(Fault::write(A.address())), Ok(FIXED));
        world.mmu.write_protect(SPACE, only(A), Level::L1).flush();
        let guest = thread::spawn(move || {
            let outcome = theirs.fault(Fault::write(A.address())).unwrap();
            (theirs, outcome)
        });
        let outcome = ours.fault(Fault::write(A.address())).unwrap();
        let (theirs, other) = guest.join().unwrap();
        assert!(settled(outcome) && settled(other));
        assert!([outcome, other].contains(&FIXED));
        assert_eq!(world.leaf(&mut ours, A).unwrap().1, Perms::RWX);
        assert_eq!(world.mmu.stats().upgrades, 1);
        world.finish([ours, theirs]);
    });
}

/// A fast fault asks nobody for the page: one that the host takes back meanwhile is not given back by it.
#[test]
fn fast_fault_against_invalidation() {
    explore("fast fault x invalidation", Some(3), || {
        let world = World::with_memory(TestHost::new());
        let mut vcpu = without_bits(&world);
        assert_eq!(vcpu.fault(Fault::write(A.address())), Ok(FIXED));
        assert!(world.mmu.age(SPACE, only(A)));
        let mut processor = world.processor(&mut vcpu);
        let guest = thread::spawn(move || {
            if settled(vcpu.fault(Fault::write(A.address())).unwrap()) {
                processor.touch(A);
            }
            vcpu
        });
        let invalidation = world.mmu.invalidate_begin(SPACE, only(A));
        let flushed = invalidation.zap().flush();
        world.mmu.host().switch();
        invalidation.end(flushed);
        world.mmu.host().take_page(A);
        let mut vcpu = guest.join().unwrap();
        let leaf = world.leaf(&mut vcpu, A);
        assert!(leaf.is_none_or(|(pfn, _)| pfn == NEW), "stale: {leaf:?}");
        world.audit(&mut vcpu);
        world.finish([vcpu]);
    });
}

/// A page was written before the log is collected, and its leaf is taken away meanwhile: this collection reports it, by the
/// leaf or by who took the leaf away.
#[test]
fn collection_against_zap() {
    explore("collect x zap", Some(1), || {
        let world = World::with_log(DirtyTracking::DirtyBit, false, true);
        let mut vcpu = world.vcpu();
        let mut processor = world.processor(&mut vcpu);
        assert!(settled(vcpu.fault(Fault::read(A.address())).unwrap()));
        assert!(processor.set_dirty(A));
        drop(processor);
        let collector = thread::spawn({
            let mmu = world.mmu.clone();
            move || {
                let log = mmu.dirty_log(SPACE, SlotId(0)).unwrap();
                let mut bitmap = [0];
                log.collect(&mut bitmap).unwrap().flush();
                bitmap
            }
        });
        world.mmu.zap_leaves(SPACE, only(A)).flush();
        assert_eq!(collector.join().unwrap(), [1], "a write was not reported");
        world.finish([vcpu]);
    });
}
