//! The dirty log against the writes that it is to notice.
//!
//! The property of all: whoever copies a page at the start, then each time the log reports it, has a right copy in the end.

use crate::world::{A, Processor, SPACE, Vcpu, World, explore, only, settled};
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use std::sync::Arc;
use tdp::{DirtyTracking, Fault, Level, Outcome, SlotFlags, SlotId};

/// The page's content. Relaxed: only the MMU orders the guest's writes against the copying.
type Page = Arc<AtomicU64>;

/// A guest writes the page `times` times, with whatever faults that takes.
fn write(vcpu: &mut Vcpu, processor: &mut Processor, page: &Page, times: u64) {
    for value in 1..=times {
        while !processor.write(A, || page.store(value, Ordering::Relaxed)) {
            match vcpu.fault(Fault::write(A.address())).unwrap() {
                // The collector has to come round.
                Outcome::DirtyRingFull => thread::yield_now(),
                outcome => drop(settled(outcome)),
            }
        }
    }
}

/// Collects the log once and copies the page if it says so.
fn copy(world: &World, page: &Page, copy: &mut u64, rings: bool) {
    let mut reported = false;
    if rings {
        for ring in world.mmu.dirty_rings() {
            reported |= ring.harvest(|_| {}) > 0;
        }
        world.mmu.reset_dirty_rings().flush();
    }
    let log = world.mmu.dirty_log(SPACE, SlotId(0)).unwrap();
    let mut bitmap = [0];
    log.collect(&mut bitmap).unwrap().flush();
    if reported || bitmap[0] != 0 {
        *copy = page.load(Ordering::Relaxed);
    }
}

fn writes_against_the_collector(name: &str, bound: usize, tracking: DirtyTracking, rings: bool) {
    explore(name, Some(bound), move || {
        let world = World::with_log(tracking, rings, true);
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        let mut processor = world.processor(&mut ours);
        assert!(settled(ours.fault(Fault::write(A.address())).unwrap()));
        let page = Page::default();
        let content = page.clone();
        let guest = thread::spawn(move || {
            write(&mut theirs, &mut processor, &content, 2);
            theirs
        });
        let mut copied = 0;
        copy(&world, &page, &mut copied, rings);
        let theirs = guest.join().unwrap();
        copy(&world, &page, &mut copied, rings);
        assert_eq!(copied, 2, "a write was lost");
        world.audit(&mut ours);
        world.finish([ours, theirs]);
    });
}

/// The mark comes after the permission, the permission goes after the mark.
#[test]
fn write_protection_against_writes() {
    let tracking = DirtyTracking::WriteProtect;
    writes_against_the_collector("write x collect, by protection", 3, tracking, false);
}

/// The page is marked and cannot be written when it begins, so that the mark that the fault makes meets an older one.
#[test]
fn an_older_mark_against_writes() {
    explore("write x collect, marked before", Some(3), || {
        let world = World::with_log(DirtyTracking::WriteProtect, false, true);
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        let mut processor = world.processor(&mut ours);
        assert!(settled(ours.fault(Fault::write(A.address())).unwrap()));
        world.mmu.write_protect(SPACE, only(A), Level::L1).flush();
        let page = Page::default();
        let content = page.clone();
        let guest = thread::spawn(move || {
            write(&mut theirs, &mut processor, &content, 1);
            theirs
        });
        let mut copied = 0;
        copy(&world, &page, &mut copied, false);
        let theirs = guest.join().unwrap();
        copy(&world, &page, &mut copied, false);
        assert_eq!(copied, 1, "a write was lost");
        world.finish([ours, theirs]);
    });
}

/// The processor sets dirty bits while they are taken.
#[test]
fn dirty_bits_against_writes() {
    let tracking = DirtyTracking::DirtyBit;
    writes_against_the_collector("write x collect, by dirty bits", 3, tracking, false);
}

/// The ring is pushed into while it is harvested and reset.
#[test]
fn rings_against_writes() {
    let tracking = DirtyTracking::WriteProtect;
    writes_against_the_collector("write x harvest x reset", 3, tracking, true);
}

/// Collecting and clearing are two calls when they are made by hand.
#[test]
fn manual_clearing_against_writes() {
    explore("write x clear", Some(3), || {
        let world = World::with_log(DirtyTracking::WriteProtect, false, true);
        let slots = world.mmu.slots();
        let flags = SlotFlags::LOG_DIRTY | SlotFlags::LOG_MANUAL;
        slots.set_flags(SPACE, SlotId(0), flags).unwrap();
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        let mut processor = world.processor(&mut ours);
        assert!(settled(ours.fault(Fault::write(A.address())).unwrap()));
        let page = Page::default();
        let content = page.clone();
        let guest = thread::spawn(move || {
            write(&mut theirs, &mut processor, &content, 2);
            theirs
        });
        let log = world.mmu.dirty_log(SPACE, SlotId(0)).unwrap();
        log.clear(0, &[1]).unwrap().flush();
        let mut copied = page.load(Ordering::Relaxed);
        let theirs = guest.join().unwrap();
        let mut bitmap = [0];
        log.collect(&mut bitmap).unwrap().flush();
        if bitmap[0] != 0 {
            copied = page.load(Ordering::Relaxed);
        }
        assert_eq!(copied, 2, "a write was lost");
        world.finish([ours, theirs]);
    });
}

/// The log is switched on while a fault makes the page writable: it is marked, or the first copy has what was written.
#[test]
fn switching_on_against_writes() {
    explore("write x log on", Some(3), || {
        let world = World::with_log(DirtyTracking::WriteProtect, false, false);
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        let mut processor = world.processor(&mut ours);
        let page = Page::default();
        let content = page.clone();
        let guest = thread::spawn(move || {
            write(&mut theirs, &mut processor, &content, 2);
            theirs
        });
        let slots = world.mmu.slots();
        let log = SlotFlags::LOG_DIRTY;
        slots.set_flags(SPACE, SlotId(0), log).unwrap();
        let mut copied = page.load(Ordering::Relaxed);
        let theirs = guest.join().unwrap();
        copy(&world, &page, &mut copied, false);
        assert_eq!(copied, 2, "a write was lost");
        world.audit(&mut ours);
        world.finish([ours, theirs]);
    });
}

/// A leaf is taken away while the processor sets its dirty bit: the bit is in the log.
#[test]
fn a_zap_keeps_the_dirty_bit() {
    explore("write x zap x collect", Some(2), || {
        let world = World::with_log(DirtyTracking::DirtyBit, false, true);
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        let mut processor = world.processor(&mut ours);
        assert!(settled(ours.fault(Fault::read(A.address())).unwrap()));
        let page = Page::default();
        let content = page.clone();
        let guest = thread::spawn(move || {
            write(&mut theirs, &mut processor, &content, 1);
            theirs
        });
        let mut copied = page.load(Ordering::Relaxed);
        world.mmu.zap_leaves(SPACE, only(A)).flush();
        copy(&world, &page, &mut copied, false);
        let theirs = guest.join().unwrap();
        copy(&world, &page, &mut copied, false);
        assert_eq!(copied, 1, "a write was lost");
        world.finish([ours, theirs]);
    });
}
