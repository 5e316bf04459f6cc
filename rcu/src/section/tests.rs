//! The handshake on the real machine, and the shape of what it runs on.

use std::sync::Barrier;
use std::thread;

use super::*;
use crate::sync::{AtomicBool, CachePadded};

struct Alone(Registry);

impl Home for Alone {
    fn registry(&self) -> &Registry {
        &self.0
    }
}

fn reader() -> (Arc<Alone>, Reader) {
    let home = Arc::new(Alone(Registry::new()));
    let reader = Reader::register(home.clone());
    (home, reader)
}

#[test]
fn a_record_has_its_lines_to_itself() {
    assert_eq!(size_of::<Record>(), 128);
    assert_eq!(memoffset::offset_of!(Record, word), 0);
    let records: Vec<_> = (0..8).map(|_| Arc::new(Record::new())).collect();
    for record in &records {
        assert_eq!(Arc::as_ptr(record).addr() % 128, 0);
    }
}

/// Store buffering: a section that announces itself and loads, against a retire side that stores, fences and looks.
/// Returns in how many rounds both missed the other, which may be none.
fn rounds_missed(mut reader: Reader, heavy: fn()) -> usize {
    const ROUNDS: u64 = 20_000;
    let record = reader.record.clone();
    let unlinked = CachePadded::new(AtomicU64::new(0));
    let turn = [(); 2].map(|()| CachePadded::new(AtomicU64::new(0)));
    let meet = |me: usize, round: u64| {
        turn[me].store(round, Ordering::Release);
        let backoff = Backoff::new();
        while turn[1 - me].load(Ordering::Acquire) < round {
            backoff.snooze();
        }
    };
    thread::scope(|scope| {
        let walker = scope.spawn(|| {
            let mut saw = Vec::with_capacity(ROUNDS as usize);
            for round in 1..=ROUNDS {
                meet(0, 3 * round);
                let section = reader.enter();
                saw.push(unlinked.load(Ordering::Relaxed) == round);
                meet(0, 3 * round + 1);
                drop(section);
                meet(0, 3 * round + 2);
            }
            saw
        });
        let mut saw = Vec::with_capacity(ROUNDS as usize);
        for round in 1..=ROUNDS {
            meet(1, 3 * round);
            unlinked.store(round, Ordering::Relaxed);
            heavy();
            saw.push(record.inside().is_some());
            meet(1, 3 * round + 1);
            meet(1, 3 * round + 2);
        }
        let walker = walker.join().unwrap();
        let both = walker.iter().zip(&saw);
        both.filter(|(walker, retirer)| !**walker && !**retirer)
            .count()
    })
}

/// The pair that this process uses: asymmetric where the system can.
#[test]
fn either_side_sees_the_other() {
    assert_eq!(rounds_missed(reader().1, barrier::heavy), 0);
}

/// The pair that works everywhere.
#[test]
fn either_side_sees_the_other_by_fences_alone() {
    let (_home, mut reader) = reader();
    reader.asymmetric = false;
    let fence = || crate::sync::fence(Ordering::SeqCst);
    assert_eq!(rounds_missed(reader, fence), 0);
}

#[test]
fn a_snapshot_holds_who_is_inside_until_they_leave() {
    let (home, mut first) = reader();
    let mut second = Reader::register(home.clone());
    assert!(home.0.snapshot().have_left());

    let mut section = first.enter();
    let other = second.enter();
    let mut laggards = home.0.snapshot();
    assert_eq!(laggards.0.len(), 2);
    assert!(!laggards.have_left());
    section.repin();
    assert!(!laggards.have_left());
    drop(other);
    assert!(laggards.have_left());
    assert!(
        !home.0.snapshot().have_left(),
        "the repinned section is inside"
    );
    drop(section);
    assert!(home.0.snapshot().have_left());
}

#[test]
fn a_forgotten_section_is_inside_until_the_next_one_leaves() {
    let (home, mut reader) = reader();
    core::mem::forget(reader.enter());
    let mut laggards = home.0.snapshot();
    let section = reader.enter();
    assert!(!laggards.have_left(), "the next section continues it");
    drop(section);
    assert!(laggards.have_left());
    assert!(home.0.snapshot().have_left());

    core::mem::forget(reader.enter());
    let mut laggards = home.0.snapshot();
    assert!(!laggards.have_left());
    drop(reader);
    assert!(laggards.have_left(), "a dropped reader has left");
    assert_eq!(home.0.len(), 0);
}

#[test]
fn unwinding_leaves_the_section() {
    let (home, mut reader) = reader();
    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _section = reader.enter();
        assert!(!home.0.snapshot().have_left());
        std::panic::resume_unwind(std::boxed::Box::new(()));
    }));
    assert!(unwound.is_err());
    assert!(home.0.snapshot().have_left());
}

/// More readers than one scan remembers, all inside, leaving in reverse order of the scan.
#[test]
fn synchronize_waits_for_every_reader() {
    let home = Arc::new(Alone(Registry::new()));
    let mut readers: Vec<_> = (0..2 * SCAN + 3)
        .map(|_| Reader::register(home.clone()))
        .collect();
    let entered = Barrier::new(2);
    let all_left = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut sections: Vec<_> = readers.iter_mut().map(Reader::enter).collect();
            entered.wait();
            while let Some(section) = sections.pop() {
                thread::yield_now();
                if sections.is_empty() {
                    all_left.store(true, Ordering::Relaxed);
                }
                drop(section);
            }
        });
        entered.wait();
        home.0.synchronize();
        assert!(all_left.load(Ordering::Relaxed));
    });
    drop(readers);
    assert_eq!(home.0.len(), 0);
}

#[test]
fn registration_during_a_wait_is_not_held_up() {
    let (home, mut reader) = reader();
    let section = reader.enter();
    let waits = Barrier::new(2);
    thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            waits.wait();
            home.0.synchronize();
        });
        waits.wait();
        for _ in 0..100 {
            drop(Reader::register(home.clone()).enter());
        }
        assert_eq!(home.0.len(), 1);
        drop(section);
        waiter.join().unwrap();
    });
}

#[cfg(debug_assertions)]
#[test]
#[should_panic(expected = "inside a section of the same thread")]
fn waiting_for_oneself_is_reported() {
    let (home, mut reader) = reader();
    let _section = reader.enter();
    home.0.synchronize();
}
