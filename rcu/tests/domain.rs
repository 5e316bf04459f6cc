//! What a domain promises, on one thread or two, step by step.

#![cfg(all(feature = "std", not(loom)))]

use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::thread;

use tdp_rcu::sync::{Arc, AtomicBool, AtomicUsize, Ordering};
use tdp_rcu::{Domain, DomainConfig, Reader, Stamp};

/// Garbage that counts its drops.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct World {
    domain: Domain<Counted>,
    drops: Arc<AtomicUsize>,
}

fn world(bound: usize) -> World {
    World {
        domain: Domain::new(DomainConfig { bound }),
        drops: Arc::default(),
    }
}

impl World {
    fn retire(&self) {
        self.domain.retire(Counted(self.drops.clone()), 1);
    }

    fn drops(&self) -> usize {
        self.drops.load(Ordering::Relaxed)
    }
}

#[test]
fn a_stamp_stays_until_something_is_handed_over() {
    let w = world(1000);
    let mut reader = w.domain.reader();
    let stamp = reader.enter().stamp();
    w.retire();
    w.domain.synchronize_sections();
    let mut section = reader.enter();
    assert_eq!(section.stamp(), stamp, "retired, and not handed over");
    w.domain.drive();
    assert_eq!(w.drops(), 0, "a section is inside");
    section.repin();
    assert_ne!(section.stamp(), stamp);
    assert_ne!(stamp, Stamp::NONE);
}

#[test]
fn nobody_inside_frees_at_once() {
    let w = world(1000);
    let _reader = w.domain.reader();
    for _ in 0..300 {
        w.retire();
    }
    assert_eq!(w.drops(), 0);
    assert_eq!(w.domain.drive(), 300);
    assert_eq!(w.drops(), 300);
    let counters = w.domain.counters();
    assert_eq!(counters.retired, 300);
    assert_eq!(counters.freed, 300);
    assert_eq!((counters.pending, counters.pending_max), (0, 300));
    assert_eq!((counters.grace_periods, counters.drives), (1, 1));
    assert_eq!(counters.readers, 1);
}

#[test]
fn a_section_holds_what_was_retired_while_it_was_inside() {
    let w = world(1000);
    let mut reader = w.domain.reader();
    let section = reader.enter();
    for _ in 0..10 {
        w.retire();
        assert_eq!(w.domain.drive(), 0);
    }
    assert_eq!(w.domain.counters().pending, 10);
    assert_eq!(w.domain.counters().grace_periods, 0);
    drop(section);
    while w.domain.drive() > 0 {}
    assert_eq!(w.drops(), 10);
    assert_eq!(w.domain.pending(), 0);
}

#[test]
fn a_section_that_begins_after_the_snapshot_holds_nothing() {
    let w = world(1000);
    let (mut first, mut second) = (w.domain.reader(), w.domain.reader());
    let before = first.enter();
    w.retire();
    w.domain.drive();
    let _after = second.enter();
    drop(before);
    assert_eq!(w.domain.drive(), 1);
}

#[test]
fn a_repinned_section_lets_go() {
    let w = world(1000);
    let mut reader = w.domain.reader();
    let mut section = reader.enter();
    w.retire();
    assert_eq!(w.domain.drive(), 0);
    section.repin();
    assert_eq!(w.domain.drive(), 1);
    w.retire();
    assert_eq!(w.domain.drive(), 0, "it is inside again");
}

#[test]
fn a_visit_holds_garbage_in_the_epoch_stage() {
    let w = world(1000);
    let mut visit = w.domain.visit();
    w.retire();
    for _ in 0..10 {
        assert_eq!(w.domain.drive(), 0);
    }
    let counters = w.domain.counters();
    assert_eq!((counters.pending, counters.pending_epoch), (1, 1));
    assert_eq!(counters.grace_periods, 1);
    // The epoch can be one ahead of the visit, and the garbage as well.
    visit.repin();
    w.domain.drive();
    visit.repin();
    w.domain.drive();
    assert_eq!(w.drops(), 1);
    w.retire();
    assert!(!w.domain.drain(10));
    assert_eq!(w.drops(), 1);
    drop(visit);
    assert!(w.domain.drain(4));
    assert_eq!(w.drops(), 2);
}

#[test]
fn both_stages_count() {
    let w = world(1000);
    let mut reader = w.domain.reader();
    let section = reader.enter();
    let visit = w.domain.visit();
    w.retire();
    w.domain.drive();
    drop(visit);
    assert!(!w.domain.drain(3), "the section alone holds it");
    let visit = w.domain.visit();
    drop(section);
    assert!(
        !w.domain.drain(3),
        "a visit that began before the sections left holds it"
    );
    drop(visit);
    assert!(w.domain.drain(3));
}

#[test]
fn a_forgotten_section_delays_and_a_dropped_reader_has_left() {
    let w = world(1000);
    let mut reader = w.domain.reader();
    mem::forget(reader.enter());
    w.retire();
    assert_eq!(w.domain.reclaim(3), 0);
    drop(reader.enter());
    assert_eq!(w.domain.reclaim(3), 1);

    mem::forget(reader.enter());
    w.retire();
    assert_eq!(w.domain.reclaim(3), 0);
    drop(reader);
    assert_eq!(w.domain.reclaim(3), 1);
    assert_eq!(w.domain.counters().readers, 0);
}

#[test]
fn retire_drives_past_half_of_the_bound() {
    let w = world(64);
    for _ in 0..10_000 {
        w.retire();
    }
    let counters = w.domain.counters();
    assert_eq!(counters.pending_max, 33);
    assert!(counters.pending <= 33);
    assert_eq!(counters.freed as usize, w.drops());
    assert!(!w.domain.is_over_bound());
}

#[test]
fn a_stuck_section_does_not_make_every_retirement_drive() {
    let w = world(64);
    let mut reader = w.domain.reader();
    let section = reader.enter();
    for _ in 0..10_000 {
        w.retire();
    }
    assert_eq!(w.drops(), 0);
    let counters = w.domain.counters();
    assert_eq!(counters.pending, 10_000);
    assert!(w.domain.is_over_bound());
    // One drive per sixteenth of the bound, four here.
    assert!((1_500..=2_500).contains(&counters.drives), "{counters:?}");
    drop(section);
    assert!(w.domain.drain(4));
    assert!(!w.domain.is_over_bound());
    for _ in 0..10_000 {
        w.retire();
    }
    assert!(w.domain.pending() <= 33, "the bound holds again");
}

#[test]
fn no_more_than_the_bound_is_not_over_it() {
    let w = world(64);
    let mut reader = w.domain.reader();
    let _section = reader.enter();
    for _ in 0..64 {
        w.retire();
    }
    assert!(!w.domain.is_over_bound());
    w.retire();
    assert!(w.domain.is_over_bound());
}

#[test]
fn reclaiming_goes_on_until_something_is_freed() {
    let w = world(1000);
    let mut reader = w.domain.reader();
    w.retire();
    assert_eq!(w.domain.reclaim(5), 1);
    assert_eq!(w.domain.counters().drives, 1, "that was enough");
    let section = reader.enter();
    w.retire();
    assert_eq!(w.domain.reclaim(5), 0);
    assert_eq!(w.domain.counters().drives, 6, "every attempt is made");
    drop(section);
    assert_eq!(w.domain.reclaim(5), 1);
}

#[test]
fn weightless_garbage_waits_too() {
    let w = world(64);
    let visit = w.domain.visit();
    w.domain.retire(Counted(w.drops.clone()), 0);
    w.domain.drive();
    assert_eq!(w.drops(), 0);
    assert_eq!(w.domain.pending(), 1);
    drop(visit);
    assert!(w.domain.drain(3));
    assert_eq!(w.drops(), 1);
}

#[test]
fn dropping_the_domain_frees_both_stages() {
    let w = world(1000);
    let visit = w.domain.visit();
    w.retire();
    w.domain.drive();
    w.retire();
    drop(visit);
    assert_eq!(w.domain.counters().pending_epoch, 1);
    let World { domain, drops } = w;
    let clone = domain.clone();
    drop(domain);
    assert_eq!(drops.load(Ordering::Relaxed), 0);
    drop(clone);
    assert_eq!(drops.load(Ordering::Relaxed), 2);
}

#[test]
fn a_reader_may_outlive_its_domain() {
    let World { domain, drops } = world(1000);
    let mut reader = domain.reader();
    let section = reader.enter();
    domain.retire(Counted(drops.clone()), 1);
    domain.drive();
    drop(domain);
    assert_eq!(
        drops.load(Ordering::Relaxed),
        0,
        "the section is still inside"
    );
    drop(section);
    drop(reader.enter());
    drop(reader);
    assert_eq!(drops.load(Ordering::Relaxed), 1);
}

#[test]
fn a_forgotten_visit_leaks_and_nothing_hangs() {
    let World { domain, drops } = world(1000);
    mem::forget(domain.visit());
    domain.retire(Counted(drops.clone()), 1);
    assert!(!domain.drain(5));
    drop(domain);
    assert_eq!(drops.load(Ordering::Relaxed), 0);
}

/// Retires another one of itself when dropped, some times.
struct Chain {
    domain: Domain<Chain>,
    left: usize,
    drops: Arc<AtomicUsize>,
}

impl Drop for Chain {
    fn drop(&mut self) {
        self.drops.fetch_add(1, Ordering::Relaxed);
        if self.left > 0 {
            let next = Chain {
                domain: self.domain.clone(),
                left: self.left - 1,
                drops: self.drops.clone(),
            };
            self.domain.retire(next, 1);
        }
    }
}

#[test]
fn garbage_may_retire_garbage() {
    // With this bound every retirement wants to drive, those from within a drive included.
    let domain = Domain::new(DomainConfig { bound: 0 });
    let drops = Arc::new(AtomicUsize::new(0));
    let left = 50_000;
    domain.retire(
        Chain {
            domain: domain.clone(),
            left,
            drops: drops.clone(),
        },
        1,
    );
    assert_eq!(domain.counters().drives, 1, "none from within another");
    assert!(domain.drain(left + 2));
    assert_eq!(drops.load(Ordering::Relaxed), left + 1);
}

struct Bomb(Arc<AtomicUsize>, bool);

impl Drop for Bomb {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
        assert!(!self.1, "a drop that panics");
    }
}

#[test]
fn a_panic_in_a_drop_loses_nothing_else() {
    let domain = Domain::new(DomainConfig { bound: 8 });
    let drops = Arc::new(AtomicUsize::new(0));
    let unwound = catch_unwind(AssertUnwindSafe(|| {
        for at in 0..10 {
            domain.retire(Bomb(drops.clone(), at == 2), 1);
        }
    }));
    assert!(unwound.is_err());
    assert_eq!(drops.load(Ordering::Relaxed), 5);
    assert_eq!(domain.counters().freed, 5);
    for _ in 0..100 {
        domain.retire(Bomb(drops.clone(), false), 1);
    }
    assert!(
        domain.pending() <= 5,
        "retire still drives: {:?}",
        domain.counters()
    );
    assert!(domain.drain(4));
    assert_eq!(drops.load(Ordering::Relaxed), 105);
}

/// Runs `wait` while another thread is inside what `inside` enters, and says whether it returned before the other left.
fn returns_early(inside: impl FnOnce(&mut dyn FnMut()) + Send, wait: impl FnOnce() + Send) -> bool {
    let left = AtomicBool::new(false);
    let (entered, is_inside) = mpsc::channel();
    let (returned, leave) = mpsc::channel();
    thread::scope(|scope| {
        let left = &left;
        scope.spawn(move || {
            inside(&mut || {
                entered.send(()).unwrap();
                // Long enough for a wait that does not wait to be seen, and the end of one that waits.
                let _ = leave.recv_timeout(std::time::Duration::from_millis(100));
                left.store(true, Ordering::SeqCst);
            });
        });
        is_inside.recv().unwrap();
        wait();
        let early = !left.load(Ordering::SeqCst);
        let _ = returned.send(());
        early
    })
}

#[test]
fn synchronize_waits_for_sections_and_visits() {
    let w = world(1000);
    let mut reader = w.domain.reader();
    let in_section = |reader: &mut Reader, body: &mut dyn FnMut()| {
        let _section = reader.enter();
        body();
    };
    let in_visit = |body: &mut dyn FnMut()| {
        let _visit = w.domain.visit();
        body();
    };
    assert!(!returns_early(
        |body| in_section(&mut reader, body),
        || w.domain.synchronize()
    ));
    assert!(!returns_early(in_visit, || w.domain.synchronize()));
    assert!(!returns_early(
        |body| in_section(&mut reader, body),
        || w.domain.synchronize_sections()
    ));
    assert!(
        returns_early(in_visit, || w.domain.synchronize_sections()),
        "visits do not matter here"
    );
}

/// Each visit leaves a bag with the collector, of which a drive takes a few: what was retired before the wait is freed all
/// the same, however many of them are in its way.
#[test]
fn synchronize_frees_what_was_retired_before_many_visits() {
    for visits in [1, 10, 100, 1000] {
        let world = world(1 << 20);
        world.retire();
        let long = world.domain.visit();
        for _ in 0..visits {
            drop(world.domain.visit());
        }
        drop(long);
        world.retire();
        world.domain.synchronize();
        assert_eq!(world.drops(), 2, "after {visits} visits");
        assert_eq!(world.domain.pending(), 0);
    }
}

#[test]
fn sections_may_be_synchronized_from_within_a_visit() {
    let w = world(1000);
    let _reader = w.domain.reader();
    let _visit = w.domain.visit();
    w.domain.synchronize_sections();
}

#[cfg(debug_assertions)]
#[test]
#[should_panic(expected = "inside a visit of the same thread")]
fn waiting_for_ones_own_visit_is_reported() {
    let w = world(1000);
    let _visit = w.domain.visit();
    w.domain.synchronize();
}

#[cfg(debug_assertions)]
#[test]
fn a_visit_of_another_domain_is_no_obstacle() {
    let (w, other) = (world(1000), world(1000));
    let _visit = other.domain.visit();
    drop(w.domain.visit());
    w.domain.synchronize();
}

/// An embedder's own types hold these, and are looked at while a thread hangs.
#[test]
fn each_handle_says_what_it_is_while_it_is_in_use() {
    let w = world(1000);
    let mut reader = w.domain.reader();
    let notes = reader.notes();
    notes.words()[1].set(0x5eed);
    w.retire();
    let shown = format!("{:?}", w.domain);
    for part in ["Domain", "readers: 1", "retired: 1", "pending: 1"] {
        assert!(shown.contains(part), "{shown}");
    }
    assert!(format!("{notes:?}").contains(&0x5eed.to_string()));
    assert!(format!("{reader:?}").starts_with("Reader"));
    let section = reader.enter();
    assert!(format!("{section:?}").starts_with("Section"));
    let visit = w.domain.visit();
    assert!(format!("{visit:?}").starts_with("Visit"));
    let mutex = tdp_rcu::sync::Mutex::new(7);
    let _held = mutex.lock();
    // Not the value: that would wait for who holds the lock.
    assert_eq!(format!("{mutex:?}"), "Mutex { .. }");
}
