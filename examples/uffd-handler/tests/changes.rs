//! The address space changes while pages are filled: what was given up reads zero, what was moved keeps its content.

mod common;

use common::{MIB, serve, shape, skipped, source};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{io, thread};
use uffd_handler::Config;
use uffd_handler::memory::{Kind, word};
use uffd_handler::source::{Remote, Snapshot, Source};
use uffd_handler::sys::features;
use uffd_handler::vmm::{Shape, Vmm, snapshot};

const PAGE: u64 = 4096;

#[test]
fn what_was_given_up_reads_zero_beside_faults_and_the_background_copy() {
    if skipped("what_was_given_up_reads_zero_beside_faults_and_the_background_copy") {
        return;
    }
    for (kind, background) in [
        (Kind::Anonymous, true),
        (Kind::Anonymous, false),
        (Kind::Shared, true),
    ] {
        let shape = shape(kind, 16 * MIB, features::REMOVE);
        let source = source(shape.len);
        let vmm = Vmm::new(shape).expect("a VMM");
        let config = Config {
            workers: 3,
            background,
            ..Config::default()
        };
        let session = serve(&vmm, &source, config);
        let pages = shape.len / PAGE;
        // Each page is given up once, in an order of its own, while others read it without pause. Who has seen it given up
        // sees zeroes for ever after; who has not sees the snapshot or zeroes.
        let given: Vec<AtomicBool> = (0..pages).map(|_| AtomicBool::new(false)).collect();
        let stop = AtomicBool::new(false);
        let reads = AtomicU64::new(0);
        thread::scope(|scope| {
            let readers: Vec<_> = (0..3u64)
                .map(|reader| {
                    let (vmm, given, stop, reads) = (&vmm, &given, &stop, &reads);
                    scope.spawn(move || {
                        let mut random = reader + 1;
                        while !stop.load(Ordering::Acquire) {
                            random = random
                                .wrapping_mul(6_364_136_223_846_793_005)
                                .wrapping_add(1);
                            let page = (random >> 33) % pages;
                            let at = page * PAGE + (random >> 20) % 512 * 8;
                            let gone = given[page as usize].load(Ordering::Acquire);
                            let seen = vmm.memory().load(at);
                            assert!(
                                seen == 0 || (!gone && seen == word(at, 0)),
                                "page {page} reads {seen:#x}, given up before: {gone}"
                            );
                            reads.fetch_add(1, Ordering::Relaxed);
                        }
                    })
                })
                .collect();
            for step in 0..pages / 4 {
                let page = ((step * 4 * 37) % pages) & !3;
                // Runs of one to four pages.
                let run = 1 + step % 4;
                vmm.memory()
                    .give_up(page * PAGE, run * PAGE)
                    .expect("a removal");
                for page in page..page + run {
                    given[page as usize].store(true, Ordering::Release);
                }
            }
            // Once more all of it.
            let wrong = (0..pages).filter(|&page| {
                let at = page * PAGE + 8;
                let gone = given[page as usize].load(Ordering::Acquire);
                let expected = if gone { 0 } else { word(at, 0) };
                vmm.memory().load(at) != expected
            });
            assert_eq!(wrong.count(), 0, "{kind:?}");
            stop.store(true, Ordering::Release);
            for reader in readers {
                reader.join().expect("a reader");
            }
        });
        let report = session.stop().expect("a report");
        assert!(report.changes > 0 && report.served.zeroed > 0, "{report:?}");
        assert!(reads.into_inner() > 0);
    }
}

#[test]
fn a_whole_region_can_be_given_up_and_filled_again() {
    if skipped("a_whole_region_can_be_given_up_and_filled_again") {
        return;
    }
    let shape = shape(Kind::Anonymous, 4 * MIB, features::REMOVE);
    let source = source(shape.len);
    let vmm = Vmm::new(shape).expect("a VMM");
    let session = serve(&vmm, &source, Config::default());
    assert_eq!(vmm.wrong_words(0, MIB), 0);
    for _ in 0..3 {
        vmm.memory().give_up(0, shape.len).expect("a removal");
        for at in (0..shape.len).step_by(PAGE as usize) {
            assert_eq!(vmm.memory().load(at), 0);
            vmm.memory().store(at, at + 1);
        }
        for at in (0..shape.len).step_by(PAGE as usize) {
            assert_eq!(vmm.memory().load(at), at + 1);
        }
    }
    let report = session.stop().expect("a report");
    assert_eq!(report.served.zeroed, 3 * shape.len / PAGE, "{report:?}");
}

#[test]
fn memory_that_moves_keeps_its_content_and_its_holes() {
    if skipped("memory_that_moves_keeps_its_content_and_its_holes") {
        return;
    }
    let features = features::REMOVE | features::REMAP | features::UNMAP;
    let shape = shape(Kind::Anonymous, 8 * MIB, features);
    let source = source(shape.len);
    let mut vmm = Vmm::new(shape).expect("a VMM");
    let session = serve(&vmm, &source, Config::default());
    assert_eq!(vmm.wrong_words(MIB, 2 * MIB), 0);
    vmm.memory().store(3 * MIB, 77);
    vmm.memory().give_up(5 * MIB, 16 * PAGE).expect("a removal");
    let before = vmm.memory().address();
    vmm.memory_mut().relocate().expect("a move");
    assert_ne!(vmm.memory().address(), before);

    assert_eq!(vmm.memory().load(3 * MIB), 77);
    assert_eq!(vmm.wrong_words(0, 3 * MIB), 0);
    for page in 0..16 {
        assert_eq!(vmm.memory().load(5 * MIB + page * PAGE), 0);
    }
    assert_eq!(vmm.wrong_words(5 * MIB + 16 * PAGE, shape.len), 0);

    // Cut off, it is nobody's; what is left is served on.
    let cut = 2 * MIB;
    vmm.memory_mut().shrink(cut).expect("a cut");
    assert_eq!(vmm.wrong_words(3 * MIB + 8, 5 * MIB), 0);
    let (filled, total) = session.progress();
    assert!(
        filled <= total && total <= (shape.len - cut) / PAGE,
        "{filled} of {total}"
    );
    let report = session.stop().expect("a report");
    assert!(report.changes >= 3, "{report:?}");
}

#[test]
fn memory_by_its_file_that_moves_keeps_what_was_written_beside_the_background_copy() {
    if skipped("memory_by_its_file_that_moves_keeps_what_was_written_beside_the_background_copy") {
        return;
    }
    let shape = Shape {
        by_file: true,
        ..shape(
            Kind::Shared,
            4 * MIB,
            features::MINOR_SHMEM | features::REMAP,
        )
    };
    // So slow that it is under way when the memory moves.
    let delay = Duration::from_micros(200);
    let snapshot = snapshot(shape.len).expect("a snapshot");
    let source: Arc<dyn Source> = Arc::new(Remote::new(Snapshot::of(snapshot), delay));
    let mut vmm = Vmm::new(shape).expect("a VMM");
    let config = Config {
        background: true,
        ..Config::default()
    };
    let session = serve(&vmm, &source, config);
    for page in 0..16 {
        vmm.memory().store(page * PAGE, page);
    }
    vmm.memory_mut().relocate().expect("a move");
    // If it had ended by then, it has nothing to do afterwards.
    let (begun, pages) = (Instant::now(), shape.len / PAGE);
    while session.progress() != (pages, pages) && begun.elapsed() < Duration::from_secs(5) {
        thread::yield_now();
    }
    for page in 0..16 {
        assert_eq!(vmm.memory().load(page * PAGE), page);
    }
    assert_eq!(vmm.wrong_words(16 * PAGE, shape.len), 0);
    let report = session.stop().expect("a report");
    assert_eq!(report.changes, 1, "{report:?}");
}

#[test]
fn the_background_copy_that_begins_while_memory_moves_misses_nothing() {
    if skipped("the_background_copy_that_begins_while_memory_moves_misses_nothing") {
        return;
    }
    let shape = shape(Kind::Anonymous, MIB, features::REMAP);
    let pages = shape.len / PAGE;
    let source = source(shape.len);
    let mut during = 0;
    for round in 0..300 {
        let mut vmm = Vmm::new(shape).expect("a VMM");
        let config = Config {
            background: true,
            ..Config::default()
        };
        let session = serve(&vmm, &source, config);
        // A little later each time.
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_nanos(200 * (round % 500)) {}
        let before = session.progress() == (pages, pages);
        vmm.memory_mut().relocate().expect("a move");
        let begun = Instant::now();
        while !before
            && session.progress() != (pages, pages)
            && begun.elapsed() < Duration::from_secs(5)
        {
            thread::yield_now();
        }
        // Where it had ended before, it has nothing to do afterwards.
        let report = session.stop().expect("a report");
        assert!(before || report.copied >= pages, "{round} {report:?}");
        during += u64::from(!before);
    }
    assert!(during > 0);
}

/// A source that holds one page back until it is told to go on.
struct Held {
    inner: Arc<dyn Source>,
    page: u64,
    asked: AtomicBool,
    go_on: AtomicBool,
}

impl Source for Held {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn with(&self, offset: u64, len: u64, fill: &mut dyn FnMut(u64)) -> io::Result<()> {
        if offset == self.page {
            self.asked.store(true, Ordering::Release);
            while !self.go_on.load(Ordering::Acquire) {
                thread::yield_now();
            }
        }
        self.inner.with(offset, len, fill)
    }
}

#[test]
fn a_copy_that_set_out_before_a_page_was_given_up_does_not_arrive_after() {
    if skipped("a_copy_that_set_out_before_a_page_was_given_up_does_not_arrive_after") {
        return;
    }
    let shape = shape(Kind::Anonymous, 4 * MIB, features::REMOVE);
    let page = MIB;
    let held = Arc::new(Held {
        inner: source(shape.len),
        page,
        asked: AtomicBool::new(false),
        go_on: AtomicBool::new(false),
    });
    let source: Arc<dyn Source> = held.clone();
    let vmm = Vmm::new(shape).expect("a VMM");
    let session = serve(&vmm, &source, Config::default());
    thread::scope(|scope| {
        let guest = scope.spawn(|| vmm.memory().load(page));
        while !held.asked.load(Ordering::Acquire) {
            thread::yield_now();
        }
        // Returns when the kernel's report has been read and the page is gone: the kernel refuses no copy any more.
        vmm.memory().give_up(page, PAGE).expect("a removal");
        held.go_on.store(true, Ordering::Release);
        assert_eq!(guest.join().expect("a guest"), 0);
    });
    assert_eq!(vmm.wrong_words(0, page), 0);
    assert_eq!(vmm.memory().load(page + 8), 0);
    let report = session.stop().expect("a report");
    assert!(report.sent_back > 0, "{report:?}");
    assert_eq!(report.served.zeroed, 1, "{report:?}");
}
