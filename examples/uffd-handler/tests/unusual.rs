//! What few VMMs do, and what goes wrong: no thread of a guest waits for ever, and a session that cannot go on says why.

mod common;

use common::{MIB, serve, shape, skipped, source};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use std::{io, thread};
use uffd_handler::memory::{Kind, word};
use uffd_handler::source::{Snapshot, Source};
use uffd_handler::sys::features;
use uffd_handler::vmm::{Shape, Vmm};
use uffd_handler::{Config, Engine, Session};

/// Longer than any wait that ends.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a guest finds in a thread of its own, which is left alone if it waits for ever.
fn guest<R: Send + 'static>(
    vmm: &Arc<Vmm>,
    doing: impl FnOnce(&Vmm) -> R + Send + 'static,
) -> Option<R> {
    let (sender, receiver) = mpsc::channel();
    let vmm = vmm.clone();
    thread::spawn(move || sender.send(doing(&vmm)));
    receiver.recv_timeout(PATIENCE).ok()
}

/// Waits for the end of a session that cannot go on; its reason.
fn reason(session: Session) -> String {
    let begun = Instant::now();
    while !session.is_over() {
        assert!(begun.elapsed() < PATIENCE, "it goes on");
        thread::sleep(Duration::from_millis(1));
    }
    match session.stop() {
        Ok(report) => panic!("all was well: {report:?}"),
        Err(error) => error.to_string(),
    }
}

fn by_file(features: u64) -> Shape {
    Shape {
        by_file: true,
        ..shape(Kind::Shared, 4 * MIB, features::MINOR_SHMEM | features)
    }
}

#[test]
fn a_page_that_is_in_the_file_is_mapped_and_not_filled_again() {
    if skipped("a_page_that_is_in_the_file_is_mapped_and_not_filled_again") {
        return;
    }
    for more in [0, features::REMOVE] {
        let shape = by_file(more);
        let source = source(shape.len);
        let vmm = Arc::new(Vmm::new(shape).expect("a VMM"));
        // Put there by the VMM itself, before anybody asked.
        let file = vmm.memory().file().expect("a file").try_clone();
        let file = File::from(file.expect("a descriptor"));
        file.write_all_at(&77u64.to_ne_bytes(), MIB)
            .expect("a word");
        let session = serve(&vmm, &source, Config::default());
        assert_eq!(guest(&vmm, |vmm| vmm.memory().load(MIB)), Some(77));

        // Filled, changed, no longer mapped, given up, changed again, no longer mapped.
        assert_eq!(guest(&vmm, |vmm| vmm.memory().load(8)), Some(word(8, 0)));
        vmm.memory().store(8, 5);
        vmm.memory().forget(0, 4096).expect("the system");
        assert_eq!(guest(&vmm, |vmm| vmm.memory().load(8)), Some(5));
        if more == features::REMOVE {
            vmm.memory().give_up(0, 4096).expect("a removal");
            assert_eq!(guest(&vmm, |vmm| vmm.memory().load(8)), Some(0));
        }
        vmm.memory().store(16, 6);
        vmm.memory().forget(0, 4096).expect("the system");
        assert_eq!(guest(&vmm, |vmm| vmm.memory().load(16)), Some(6));
        let report = session.stop().expect("a report");
        assert!(report.served.mapped >= 2, "{report:?}");
        assert_eq!(report.existing, 0, "{report:?}");
    }
}

/// Waits until a session has nothing left to fill.
fn all_filled(session: &Session) {
    let begun = Instant::now();
    while session.progress().0 < session.progress().1 {
        assert!(begun.elapsed() < PATIENCE, "{:?}", session.progress());
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn what_nobody_asks_for_is_not_put_over_what_is_in_the_file() {
    if skipped("what_nobody_asks_for_is_not_put_over_what_is_in_the_file") {
        return;
    }
    let (written, put) = (0..16u64, 16..32u64);
    for more in [0, features::REMOVE] {
        for background in [true, false] {
            let shape = by_file(more);
            let source = source(shape.len);
            let vmm = Arc::new(Vmm::new(shape).expect("a VMM"));
            // Some pages are put there by the VMM itself, some come by a handler and are written to by the guest.
            let file = vmm.memory().file().expect("a file").try_clone();
            let file = File::from(file.expect("a descriptor"));
            for page in put.clone() {
                file.write_all_at(&page.to_ne_bytes(), page * 4096)
                    .expect("a word");
            }
            let session = serve(&vmm, &source, Config::default());
            let pages = written.clone();
            let wrote = guest(&vmm, move |vmm| {
                for page in pages {
                    assert_eq!(vmm.memory().load(page * 4096), word(page * 4096, 0));
                    vmm.memory().store(page * 4096, page);
                }
            });
            assert!(wrote.is_some());
            session.stop().expect("a report");

            // The next one knows nothing of that.
            let config = Config {
                background,
                prefetch: match background {
                    true => Vec::new(),
                    false => (0..shape.len).step_by(4096).collect(),
                },
                ..Config::default()
            };
            let session = serve(&vmm, &source, config);
            all_filled(&session);
            for page in written.start..put.end {
                let seen = guest(&vmm, move |vmm| vmm.memory().load(page * 4096));
                assert_eq!(seen, Some(page), "background: {background}");
            }
            let rest = put.end * 4096;
            let wrong = guest(&vmm, move |vmm| vmm.wrong_words(rest, vmm.memory().len()));
            assert_eq!(wrong, Some(0));
            session.stop().expect("a report");
        }
    }
}

#[test]
fn a_region_without_a_log_can_lie_beside_one_that_has_one() {
    if skipped("a_region_without_a_log_can_lie_beside_one_that_has_one") {
        return;
    }
    let shape = Shape {
        track_writes: true,
        features: features::WP | features::UNMAP,
        ..Shape::new(Kind::Anonymous, 4 * MIB)
    };
    let mut vmm = Vmm::new(shape).expect("a VMM");
    let mut hello = vmm.hello().expect("a hello");
    hello.regions[1].track_writes = false;
    let second = hello.regions[0].size;
    let session = Session::start(hello, source(shape.len), Config::default()).expect("a session");
    // It may go, too.
    vmm.memory_mut().shrink(MIB).expect("a cut");
    let vmm = Arc::new(vmm);
    for at in [0, second] {
        let stored = guest(&vmm, move |vmm| {
            let before = vmm.memory().load(at);
            vmm.memory().store(at, 1);
            before
        });
        assert_eq!(stored, Some(word(at, 0)));
    }
    let mut written = Vec::new();
    let log = session.writes().expect("a log");
    log.collect(|address| written.push(address - vmm.memory().address()))
        .expect("a collection");
    assert_eq!(written, [0]);
    session.stop().expect("a report");
}

#[test]
fn what_is_filled_anew_is_in_the_log() {
    if skipped("what_is_filled_anew_is_in_the_log") {
        return;
    }
    // With a report it comes back as zeroes, without one from the snapshot: in either case as something else than the guest
    // wrote last.
    for (reported, expected) in [(features::REMOVE, 0), (0, word(0, 0))] {
        let shape = Shape {
            track_writes: true,
            features: features::WP | reported,
            ..Shape::new(Kind::Anonymous, MIB)
        };
        let vmm = Arc::new(Vmm::new(shape).expect("a VMM"));
        let session = serve(&vmm, &source(shape.len), Config::default());
        let log = session.writes().expect("a log");
        let base = vmm.memory().address();
        let collect = || {
            let mut seen = Vec::new();
            log.collect(|address| seen.push(address - base))
                .expect("a collection");
            seen
        };
        assert!(guest(&vmm, |vmm| vmm.memory().store(0, 9)).is_some());
        assert_eq!(collect(), [0]);
        let gone = guest(&vmm, |vmm| vmm.memory().give_up(0, 4096).is_ok());
        assert_eq!(gone, Some(true));
        while !collect().is_empty() {}
        assert_eq!(guest(&vmm, |vmm| vmm.memory().load(0)), Some(expected));
        assert_eq!(collect(), [0]);
        session.stop().expect("a report");
    }
}

#[test]
fn a_fault_where_nothing_was_said_to_be_ends_the_session() {
    if skipped("a_fault_where_nothing_was_said_to_be_ends_the_session") {
        return;
    }
    let shape = Shape::new(Kind::Anonymous, 4 * MIB);
    let vmm = Arc::new(Vmm::new(shape).expect("a VMM"));
    let mut hello = vmm.hello().expect("a hello");
    let silent = hello.regions.pop().expect("two regions").offset;
    let session = Session::start(hello, source(shape.len), Config::default()).expect("a session");
    let there = vmm.clone();
    thread::spawn(move || there.memory().load(silent));
    let reason = reason(session);
    assert!(reason.contains("nothing is known"), "{reason}");
}

#[test]
fn a_vmm_that_has_its_descriptor_block_is_told_so_and_keeps_nobody() {
    if skipped("a_vmm_that_has_its_descriptor_block_is_told_so_and_keeps_nobody") {
        return;
    }
    // With and without reports of changes, whose reader is alone with what it holds.
    for features in [0, features::REMOVE] {
        for workers in [1, 4] {
            let shape = shape(Kind::Anonymous, MIB, features);
            let vmm = Arc::new(Vmm::new(shape).expect("a VMM"));
            let config = Config {
                workers,
                ..Config::default()
            };
            let session = serve(&vmm, &source(shape.len), config);
            assert_eq!(guest(&vmm, |vmm| vmm.memory().load(0)), Some(word(0, 0)));
            let shared = vmm.hello().expect("a hello").uffd;
            // UNSAFETY: a system call. SAFETY: no memory is passed.
            #[allow(unsafe_code)]
            let set = unsafe { libc::fcntl(shared.as_raw_fd(), libc::F_SETFL, 0) };
            assert_eq!(set, 0, "other flags");
            // Something to read, by which whoever waits notices.
            let there = vmm.clone();
            thread::spawn(move || there.memory().load(4096));
            let reason = guest(&vmm, move |_| reason(session));
            let reason = reason.expect("its end");
            assert!(reason.contains("it blocks"), "{reason}");
        }
    }
}

#[test]
fn what_is_given_up_without_a_report_is_filled_again() {
    if skipped("what_is_given_up_without_a_report_is_filled_again") {
        return;
    }
    for (engine, shape) in [
        (Engine::Tdp, Shape::new(Kind::Anonymous, 4 * MIB)),
        (Engine::Mutex, Shape::new(Kind::Anonymous, 4 * MIB)),
        (Engine::Tdp, by_file(0)),
    ] {
        let vmm = Arc::new(Vmm::new(shape).expect("a VMM"));
        let config = Config {
            engine,
            workers: 3,
            ..Config::default()
        };
        let session = serve(&vmm, &source(shape.len), config);
        for _ in 0..3 {
            let read = |from: u64| move |vmm: &Vmm| vmm.wrong_words(from, from + MIB);
            assert_eq!(guest(&vmm, read(MIB)), Some(0));
            vmm.memory().store(2 * MIB, 5);
            vmm.memory().give_up(MIB, MIB).expect("a removal");
            // Several threads, each with a page of its own: none gets in the way of another.
            let ours: Vec<_> = (0..4)
                .map(|which| {
                    let there = vmm.clone();
                    thread::spawn(move || {
                        let first = MIB + which * 4096;
                        let pages = (first..2 * MIB).step_by(4 * 4096);
                        let read = move |vmm: &Vmm| {
                            let ends = pages.map(|at| vmm.wrong_words(at, at + 4096));
                            ends.sum::<u64>()
                        };
                        guest(&there, read)
                    })
                })
                .collect();
            for thread in ours {
                assert_eq!(thread.join().expect("a guest"), Some(0), "{engine:?}");
            }
            assert_eq!(vmm.memory().load(2 * MIB), 5);
        }
        session.stop().expect("a report");
    }
}

#[test]
fn two_faults_where_nothing_was_said_to_be_end_the_session_as_one_does() {
    if skipped("two_faults_where_nothing_was_said_to_be_end_the_session_as_one_does") {
        return;
    }
    let shape = Shape::new(Kind::Anonymous, 4 * MIB);
    let vmm = Arc::new(Vmm::new(shape).expect("a VMM"));
    let mut hello = vmm.hello().expect("a hello");
    let silent = hello.regions.pop().expect("two regions").offset;
    let config = Config {
        workers: 1,
        ..Config::default()
    };
    let session = Session::start(hello, source(shape.len), config).expect("a session");
    for page in 0..2 {
        let there = vmm.clone();
        thread::spawn(move || there.memory().load(silent + page * 4096));
    }
    let reason = reason(session);
    assert!(reason.contains("nothing is known"), "{reason}");
}

/// A source that does not do what it should.
struct Broken(Arc<dyn Source>);

impl Source for Broken {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn with(&self, _: u64, _: u64, _: &mut dyn FnMut(u64)) -> io::Result<()> {
        panic!("this source is broken");
    }
}

#[test]
fn a_thread_that_panics_ends_the_session() {
    if skipped("a_thread_that_panics_ends_the_session") {
        return;
    }
    for background in [false, true] {
        let shape = Shape::new(Kind::Anonymous, MIB);
        let vmm = Arc::new(Vmm::new(shape).expect("a VMM"));
        let source: Arc<dyn Source> = Arc::new(Broken(source(shape.len)));
        let config = Config {
            background,
            ..Config::default()
        };
        let session = serve(&vmm, &source, config);
        if !background {
            let there = vmm.clone();
            thread::spawn(move || there.memory().load(0));
        }
        let reason = reason(session);
        assert!(reason.contains("panicked"), "{reason}");
    }
}

#[test]
fn a_snapshot_that_was_cut_off_ends_the_session() {
    if skipped("a_snapshot_that_was_cut_off_ends_the_session") {
        return;
    }
    let shape = Shape::new(Kind::Anonymous, MIB);
    let name = format!("{}-cut.mem", std::process::id());
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let file = File::create(&path).expect("a file");
    file.set_len(shape.len).expect("its length");
    let snapshot = Snapshot::open(&path).expect("a snapshot");
    let _ = std::fs::remove_file(&path);
    let source: Arc<dyn Source> = Arc::new(snapshot);
    let vmm = Arc::new(Vmm::new(shape).expect("a VMM"));
    let session = serve(&vmm, &source, Config::default());
    assert_eq!(guest(&vmm, |vmm| vmm.memory().load(0)), Some(0));
    file.set_len(4096).expect("its length");
    let there = vmm.clone();
    thread::spawn(move || there.memory().load(8192));
    let reason = reason(session);
    assert!(reason.contains("could not be filled"), "{reason}");
}

#[test]
fn a_log_of_a_session_that_is_over_does_not_wait_for_it() {
    if skipped("a_log_of_a_session_that_is_over_does_not_wait_for_it") {
        return;
    }
    let shape = Shape {
        track_writes: true,
        features: features::WP | features::REMOVE,
        ..Shape::new(Kind::Anonymous, MIB)
    };
    let vmm = Arc::new(Vmm::new(shape).expect("a VMM"));
    let session = Arc::new(serve(&vmm, &source(shape.len), Config::default()));
    assert!(guest(&vmm, |vmm| vmm.memory().store(0, 1)).is_some());
    session.finish();
    // A removal waits until somebody reads the report of it: nobody, once the last worker has noticed that it is over.
    let waits = (1..100).any(|page| {
        let there = vmm.clone();
        let removal = thread::spawn(move || there.memory().give_up(page * 4096, 4096));
        thread::sleep(Duration::from_millis(100));
        !removal.is_finished()
    });
    assert!(waits, "somebody reads on");
    let collected = guest(&vmm, move |_| {
        session.writes().map(|log| log.collect(|_| ()).is_err())
    });
    assert_eq!(collected, Some(Some(true)));
}
