//! Pages are filled once, with what the snapshot holds, whoever asks for them and however.

mod common;

use common::{MIB, serve, shape, skipped, source};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{io, thread};
use uffd_handler::memory::{Kind, word};
use uffd_handler::source::Source;
use uffd_handler::sys::features;
use uffd_handler::vmm::{Shape, Vmm};
use uffd_handler::{Config, Engine, vmm};

/// A source that counts how often each page is asked for.
struct Counting {
    inner: Arc<dyn Source>,
    asked: Vec<AtomicU64>,
}

impl Counting {
    fn new(len: u64) -> Arc<Self> {
        Arc::new(Self {
            inner: source(len),
            asked: (0..len / 4096).map(|_| AtomicU64::new(0)).collect(),
        })
    }

    fn most(&self) -> u64 {
        let asked = self.asked.iter().map(|it| it.load(Ordering::Relaxed));
        asked.max().unwrap_or(0)
    }

    fn all(&self) -> u64 {
        self.asked.iter().map(|it| it.load(Ordering::Relaxed)).sum()
    }
}

impl Source for Counting {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn with(&self, offset: u64, len: u64, fill: &mut dyn FnMut(u64)) -> io::Result<()> {
        for page in offset / 4096..(offset + len) / 4096 {
            self.asked[page as usize].fetch_add(1, Ordering::Relaxed);
        }
        self.inner.with(offset, len, fill)
    }
}

/// Guests that start in different places and read everything.
fn read_all(vmm: &Vmm, threads: u64) -> u64 {
    let len = vmm.memory().len();
    let wrong = AtomicU64::new(0);
    thread::scope(|scope| {
        for thread in 0..threads {
            let wrong = &wrong;
            let start = (len / threads * thread) & !4095;
            scope.spawn(move || {
                let seen = vmm.wrong_words(start, len) + vmm.wrong_words(0, start);
                wrong.fetch_add(seen, Ordering::Relaxed);
            });
        }
    });
    wrong.into_inner()
}

fn all_is_right(name: &str, shape: Shape, config: Config) {
    let counting = Counting::new(shape.len);
    let source: Arc<dyn Source> = counting.clone();
    let vmm = Vmm::new(shape).expect("a VMM");
    let background = config.background;
    let session = serve(&vmm, &source, config);
    assert_eq!(read_all(&vmm, 4), 0, "{name}: wrong words");
    let (filled, total) = session.progress();
    let report = session.stop().expect("a report");
    let pages = shape.len / shape.kind.page();
    if !background {
        assert_eq!(report.served.filled, pages, "{name}: {report:?}");
    }
    assert_eq!(report.existing, 0, "{name}: filled twice: {report:?}");
    assert_eq!(counting.most(), 1, "{name}: asked for twice");
    assert_eq!(counting.all(), shape.len / 4096, "{name}");
    assert_eq!(
        (filled, total),
        (shape.len / 4096, shape.len / 4096),
        "{name}"
    );
}

#[test]
fn anonymous_memory() {
    if skipped("anonymous_memory") {
        return;
    }
    for workers in [1, 2, 5] {
        let config = Config {
            workers,
            ..Config::default()
        };
        all_is_right("anonymous", Shape::new(Kind::Anonymous, 8 * MIB), config);
    }
}

#[test]
fn the_background_copy_and_faults_never_fill_a_page_twice() {
    if skipped("the_background_copy_and_faults_never_fill_a_page_twice") {
        return;
    }
    // With and without the gate that changes need.
    for features in [0, features::REMOVE] {
        let config = Config {
            background: true,
            ..Config::default()
        };
        let shape = shape(Kind::Anonymous, 32 * MIB, features);
        all_is_right("background", shape, config);
    }
}

#[test]
fn shared_memory_by_copy_and_by_its_file() {
    if skipped("shared_memory_by_copy_and_by_its_file") {
        return;
    }
    all_is_right(
        "shared",
        Shape::new(Kind::Shared, 8 * MIB),
        Config::default(),
    );
    let by_file = Shape {
        by_file: true,
        features: features::MINOR_SHMEM,
        ..Shape::new(Kind::Shared, 8 * MIB)
    };
    all_is_right("by its file", by_file, Config::default());
}

#[test]
fn huge_pages() {
    if skipped("huge_pages") {
        return;
    }
    let shape = Shape::new(Kind::Huge, 16 * MIB);
    if let Err(why) = common::huge_pages(8) {
        eprintln!("SKIPPED huge_pages: none can be had: {why}");
        return;
    }
    match Vmm::new(shape) {
        Err(why) => eprintln!("SKIPPED huge_pages: {why}"),
        Ok(vmm) => {
            drop(vmm);
            all_is_right("huge", shape, Config::default());
            let background = Config {
                background: true,
                ..Config::default()
            };
            all_is_right("huge, background", shape, background);
        }
    }
}

#[test]
fn the_working_set_comes_first_and_is_recorded() {
    if skipped("the_working_set_comes_first_and_is_recorded") {
        return;
    }
    let shape = Shape::new(Kind::Anonymous, 4 * MIB);
    let source = source(shape.len);
    let wanted = [0x3000u64, 0x20_1000, 0x5000, 0x3f_f000];

    let vmm = Vmm::new(shape).expect("a VMM");
    let config = Config {
        workers: 1,
        record: true,
        ..Config::default()
    };
    let session = serve(&vmm, &source, config);
    for at in wanted {
        assert_eq!(vmm.memory().load(at + 8), word(at + 8, 0));
    }
    let recorded = session.stop().expect("a report").recorded;
    assert_eq!(recorded, wanted);

    let vmm = Vmm::new(shape).expect("a VMM");
    let config = Config {
        prefetch: recorded,
        ..Config::default()
    };
    let session = serve(&vmm, &source, config);
    while session.progress().0 < wanted.len() as u64 {
        thread::yield_now();
    }
    for at in wanted {
        assert_eq!(vmm.memory().load(at + 16), word(at + 16, 0));
    }
    let report = session.stop().expect("a report");
    assert_eq!(report.prefetched, wanted.len() as u64);
    assert_eq!(report.served.filled, 0, "nobody had to wait: {report:?}");
}

#[test]
fn writes_are_tracked_and_none_is_lost() {
    if skipped("writes_are_tracked_and_none_is_lost") {
        return;
    }
    for kind in [Kind::Anonymous, Kind::Shared] {
        let shape = Shape {
            track_writes: true,
            features: features::WP | features::WP_SHMEM,
            ..Shape::new(kind, 4 * MIB)
        };
        let source = source(shape.len);
        let vmm = Vmm::new(shape).expect("a VMM");
        let session = serve(&vmm, &source, Config::default());
        let log = session.writes().expect("a log");
        let base = vmm.memory().address();
        let (pages, rounds) = (shape.len / 4096, 200u64);

        // The guest counts up in the first word of every page, without pause; the collector copies what the log names.
        let mut copies = vec![0u64; pages as usize];
        let copy = |copies: &mut Vec<u64>| {
            log.collect(|address| {
                let at = address - base;
                copies[(at / 4096) as usize] = vmm.memory().load(at);
            })
            .expect("a collection");
        };
        thread::scope(|scope| {
            let guests: Vec<_> = (0..2u64)
                .map(|guest| {
                    let memory = vmm.memory();
                    scope.spawn(move || {
                        let mut random = guest + 1;
                        for count in 1..=rounds * pages / 8 {
                            random = random
                                .wrapping_mul(6_364_136_223_846_793_005)
                                .wrapping_add(1);
                            let page = ((random >> 33) % (pages / 2)) * 2 + guest;
                            memory.store(page * 4096, count);
                        }
                    })
                })
                .collect();
            while guests.iter().any(|guest| !guest.is_finished()) {
                copy(&mut copies);
            }
        });
        copy(&mut copies);
        for page in 0..pages {
            let at = page * 4096;
            let (now, copied) = (vmm.memory().load(at), copies[page as usize]);
            if now != word(at, 0) {
                assert_eq!(copied, now, "{kind:?}: a write to page {page} was missed");
            }
            assert_eq!(vmm.memory().load(at + 8), word(at + 8, 0));
        }
        // Nothing is written now, and nothing is reported.
        let mut more = 0;
        log.collect(|_| more += 1).expect("a collection");
        assert_eq!(more, 0);
        let report = session.stop().expect("a report");
        assert!(report.served.writes > 0, "{report:?}");
    }
}

#[test]
fn the_baseline_is_right_too() {
    if skipped("the_baseline_is_right_too") {
        return;
    }
    let shape = Shape::new(Kind::Anonymous, 8 * MIB);
    let source: Arc<dyn Source> = Arc::new(uffd_handler::source::Snapshot::of(
        vmm::snapshot(shape.len).expect("memory"),
    ));
    let vmm = Vmm::new(shape).expect("a VMM");
    let config = Config {
        engine: Engine::Mutex,
        ..Config::default()
    };
    let session = serve(&vmm, &source, config);
    assert_eq!(read_all(&vmm, 4), 0);
    let report = session.stop().expect("a report");
    assert_eq!(report.served.filled, shape.len / 4096);
}
