//! The handshake on the real machine, and the shape of what it runs on.

use std::sync::Barrier;
use std::thread;

use super::*;
use crate::barrier;
use crate::sync::{AtomicBool, CachePadded};

struct Alone(Registry);

impl Home for Alone {
    fn registry(&self) -> &Registry {
        &self.0
    }
}

fn reader() -> (Arc<Alone>, Reader) {
    reader_of(Registry::new(false))
}

fn reader_of(registry: Registry) -> (Arc<Alone>, Reader) {
    let home = Arc::new(Alone(registry));
    let reader = Reader::register(home.clone());
    (home, reader)
}

#[test]
fn a_record_has_its_lines_to_itself() {
    assert_eq!(size_of::<Record>(), 128);
    assert_eq!(memoffset::offset_of!(Record, word), 0);
    let records: Vec<_> = (0..8).map(|_| Arc::new(Record::new(false))).collect();
    for record in &records {
        assert_eq!(Arc::as_ptr(record).addr() % 128, 0);
    }
}

/// Store buffering, at full speed: one thread enters sections and loads, the other stores, fences and looks at the word.
/// Returns how often both missed the other, which may be never (without either fence: one time in ten, or more often), and
/// how often the first saw something new.
fn both_missed(mut reader: Reader, heavy: impl Fn()) -> (usize, usize) {
    // Unoptimised, a store has mostly arrived before the load after it begins: more of them show no more.
    const UNLINKINGS: u64 = if cfg!(debug_assertions) {
        1_000
    } else {
        20_000
    };
    let record = reader.record.clone();
    let unlinked = CachePadded::new(AtomicU64::new(0));
    thread::scope(|scope| {
        let walker = scope.spawn(|| {
            // For each new value of `unlinked`: that value, and the word of the last section that did not see it.
            let mut news = std::vec![(0, 0)];
            let (mut last, mut seen) = (0, 0);
            while seen < UNLINKINGS {
                let section = reader.enter();
                let now = unlinked.load(Ordering::Relaxed);
                if now != seen {
                    news.push((now, last));
                    seen = now;
                }
                last = section.inside;
            }
            news
        });
        let looks: Vec<u64> = (1..=UNLINKINGS)
            .map(|unlinking| {
                unlinked.store(unlinking, Ordering::Relaxed);
                heavy();
                let look = record.word.load(Ordering::Acquire);
                // Not faster than the walker runs, or a busy machine would run the two one after the other.
                let backoff = Backoff::new();
                while unlinking < UNLINKINGS && record.word.load(Ordering::Relaxed) == look {
                    backoff.snooze();
                }
                look
            })
            .collect();
        let news = walker.join().unwrap();
        let mut news_of = news.iter().peekable();
        let missed = (1..).zip(looks).filter(|&(unlinking, look)| {
            while news_of.next_if(|(now, _)| *now < unlinking).is_some() {}
            // The last section that missed this unlinking had a word that the look came too early for.
            news_of.peek().is_some_and(|(_, last)| look < *last)
        });
        (missed.count(), news.len())
    })
}

/// The pair that works everywhere.
#[test]
fn either_side_sees_the_other_by_fences_alone() {
    let (home, reader) = reader();
    let record = reader.record.clone();
    let order = || home.0.fences.order([&record.debt].into_iter());
    let (missed, met) = both_missed(reader, order);
    assert_eq!(missed, 0, "of {met}");
}

/// The asymmetric pair, where the system has it, with so many fences owed each time.
fn either_side_sees_the_other_asymmetrically(imposed: u64) {
    let mut registry = Registry::new(barrier::can_be_asymmetric());
    registry.fences = registry.fences.imposing(imposed);
    let (home, reader) = reader_of(registry);
    let record = reader.record.clone();
    let order = || home.0.fences.order([&record.debt].into_iter());
    let (missed, met) = both_missed(reader, order);
    assert_eq!(missed, 0, "of {met}");
}

/// The retire side pays: it hardly ever finds a debt.
#[test]
fn either_side_sees_the_other_by_the_retire_sides_barrier() {
    either_side_sees_the_other_asymmetrically(1);
}

/// The sections pay, once the retire side has asked them to.
#[test]
fn either_side_sees_the_other_by_the_fences_that_are_owed() {
    either_side_sees_the_other_asymmetrically(1 << 16);
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
fn a_forgotten_section_is_inside_until_the_next_one() {
    let (home, mut reader) = reader();
    core::mem::forget(reader.enter());
    let mut laggards = home.0.snapshot();
    assert!(!laggards.have_left());
    let section = reader.enter();
    assert!(laggards.have_left());
    drop(section);
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
        std::panic::resume_unwind(Box::new(()));
    }));
    assert!(unwound.is_err());
    assert!(home.0.snapshot().have_left());
}

/// More readers than one scan remembers, all inside, leaving in reverse order of the scan.
#[test]
fn synchronize_waits_for_every_reader() {
    let home = Arc::new(Alone(Registry::new(false)));
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
