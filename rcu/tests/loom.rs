//! loom models of the domain: every interleaving, and every value that a load may return, of tiny programs.
//!
//! ```text
//! RUSTFLAGS="--cfg loom --cfg crossbeam_loom" cargo test -p tdp-rcu --release --test loom -- --nocapture
//! ```
//!
//! The object that is retired is a loom `UnsafeCell`: readers read it, its garbage writes it when dropped. loom then
//! reports not only a drop while a reader can be inside, but also one that is not ordered after the reads.

#![cfg(loom)]
#![allow(unsafe_code)] // UNSAFETY: the models read and write loom's `UnsafeCell`, which checks each access.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering as Plain};
use std::time::{Duration, Instant};

use loom::cell::UnsafeCell;
use loom::thread;
use tdp_rcu::sync::{AtomicBool, Ordering};
use tdp_rcu::{Domain, DomainConfig, Reader, Section, Visit};

const ALIVE: u32 = 0xa11e;
const DEAD: u32 = 0xdead;

/// Explores a model and says how many executions it took.
fn explore(name: &str, preemptions: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
    let executions = Arc::new(AtomicUsize::new(0));
    let count = executions.clone();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.max_duration = time_limit();
    // The time is looked at as often as this.
    builder.checkpoint_interval = 500;
    builder.max_branches = 10_000;
    let start = Instant::now();
    builder.check(move || {
        count.fetch_add(1, Plain::Relaxed);
        model();
    });
    println!(
        "loom {name}: {} executions, {}{}, {:.1} s",
        executions.load(Plain::Relaxed),
        preemptions.map_or("exhaustive".into(), |bound| format!(
            "preemption bound {bound}"
        )),
        cut_off(start),
        start.elapsed().as_secs_f64(),
    );
}

/// What one model may take, from the environment; without it, as long as it needs.
fn time_limit() -> Option<Duration> {
    let seconds = std::env::var("MODEL_SECONDS").ok()?;
    let seconds = seconds.parse().expect("MODEL_SECONDS is a number");
    Some(Duration::from_secs(seconds))
}

/// Says so of a model that was not explored to its end.
fn cut_off(start: Instant) -> &'static str {
    let limit = time_limit().unwrap_or(Duration::MAX);
    if start.elapsed() >= limit {
        ", cut off"
    } else {
        ""
    }
}

/// An object behind a link, as a table is behind an entry.
struct Object {
    linked: AtomicBool,
    memory: UnsafeCell<u32>,
}

// SAFETY: loom checks that every write of `memory` is ordered against every other access.
unsafe impl Sync for Object {}

impl Object {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            linked: AtomicBool::new(true),
            memory: UnsafeCell::new(ALIVE),
        })
    }

    /// What a walk does. Relaxed: the handshake of section and retirement has to order it all by itself.
    fn walk(&self) {
        if self.linked.load(Ordering::Relaxed) {
            self.read();
        }
    }

    fn read(&self) {
        // SAFETY: loom checks that no write is concurrent with this read, which is what the models are about.
        self.memory
            .with(|memory| assert_eq!(unsafe { *memory }, ALIVE, "freed while linked for us"));
    }

    fn walk_in_section(&self, _inside: &Section<'_>) {
        self.walk();
    }

    fn walk_in_visit(&self, _inside: &Visit<'_>) {
        self.walk();
    }

    fn unlink(&self) {
        self.linked.store(false, Ordering::Relaxed);
    }

    fn free(&self) {
        self.memory.with_mut(|memory| {
            // SAFETY: as in `walk`.
            let was = unsafe { std::mem::replace(&mut *memory, DEAD) };
            assert_eq!(was, ALIVE, "freed twice");
        });
    }

    fn is_freed(&self) -> bool {
        // SAFETY: as in `walk`.
        self.memory.with(|memory| unsafe { *memory == DEAD })
    }
}

/// The obligation to free an object.
struct Garbage(Arc<Object>);

impl Drop for Garbage {
    fn drop(&mut self) {
        self.0.free();
    }
}

fn domain() -> Domain<Garbage> {
    Domain::new(DomainConfig { bound: 1 << 20 })
}

/// After all threads were joined: everything goes, once, and the counts agree.
fn finish(domain: &Domain<Garbage>, objects: &[&Arc<Object>]) {
    assert!(domain.drain(4));
    let counters = domain.counters();
    assert_eq!(counters.retired, objects.len() as u64);
    assert_eq!(counters.freed, objects.len() as u64);
    assert_eq!(counters.pending, 0);
    assert!(objects.iter().all(|object| object.is_freed()));
}

/// A reader's life on a thread of its own against an unlinking, a retirement and one drive.
fn sections_against_drive(read: impl Fn(&mut Reader, &Object) + Copy + Send + Sync + 'static) {
    let domain = domain();
    let object = Object::new();
    let mut reader = domain.reader();
    let walker = thread::spawn({
        let object = object.clone();
        move || read(&mut reader, &object)
    });
    object.unlink();
    domain.retire(Garbage(object.clone()), 1);
    domain.drive();
    walker.join().unwrap();
    finish(&domain, &[&object]);
}

#[test]
fn section_against_retire() {
    explore("section x retire", None, || {
        sections_against_drive(|reader, object| object.walk_in_section(&reader.enter()));
    });
}

#[test]
fn two_sections_against_retire() {
    explore("section, section x retire", None, || {
        sections_against_drive(|reader, object| {
            object.walk_in_section(&reader.enter());
            object.walk_in_section(&reader.enter());
        });
    });
}

#[test]
fn repinned_section_against_retire() {
    explore("section, repin x retire", None, || {
        sections_against_drive(|reader, object| {
            let mut section = reader.enter();
            object.walk_in_section(&section);
            section.repin();
            object.walk_in_section(&section);
        });
    });
}

/// What one section has found the next one uses without looking at the link, if the stamp is the same.
fn kept(reader: &mut Reader, object: &Object) {
    let section = reader.enter();
    let stamp = section.stamp();
    let found = object.linked.load(Ordering::Relaxed);
    object.walk_in_section(&section);
    drop(section);
    let section = reader.enter();
    if found && section.stamp() == stamp {
        object.read();
    }
    drop(section);
}

#[test]
fn kept_find_against_retire() {
    explore("section, section by the stamp x retire", None, || {
        sections_against_drive(kept);
    });
}

#[test]
fn forgotten_section_against_retire() {
    explore("forgotten section, section x retire", None, || {
        sections_against_drive(|reader, object| {
            let section = reader.enter();
            object.walk_in_section(&section);
            std::mem::forget(section);
            object.walk_in_section(&reader.enter());
        });
    });
}

#[test]
fn dropped_reader_against_retire() {
    explore("forgotten section, reader dropped x retire", None, || {
        let domain = domain();
        let object = Object::new();
        let mut reader = domain.reader();
        let walker = thread::spawn({
            let object = object.clone();
            move || {
                let section = reader.enter();
                object.walk_in_section(&section);
                std::mem::forget(section);
            }
        });
        object.unlink();
        domain.retire(Garbage(object.clone()), 1);
        domain.drive();
        walker.join().unwrap();
        finish(&domain, &[&object]);
    });
}

#[test]
fn registration_against_retire() {
    explore("register, section x retire", None, || {
        let domain = domain();
        let object = Object::new();
        let walker = thread::spawn({
            let (domain, object) = (domain.clone(), object.clone());
            move || object.walk_in_section(&domain.reader().enter())
        });
        object.unlink();
        domain.retire(Garbage(object.clone()), 1);
        domain.drive();
        walker.join().unwrap();
        finish(&domain, &[&object]);
    });
}

/// The same against the blocking grace period, which has no fence but its own: what it does not order is not ordered.
fn sections_against_synchronize(
    read: impl Fn(&mut Reader, &Object) + Copy + Send + Sync + 'static,
) {
    let domain = domain();
    let object = Object::new();
    let mut reader = domain.reader();
    let walker = thread::spawn({
        let object = object.clone();
        move || read(&mut reader, &object)
    });
    object.unlink();
    domain.synchronize_sections();
    object.free();
    walker.join().unwrap();
}

#[test]
fn section_against_synchronize_sections() {
    explore("section, section x synchronize_sections", None, || {
        sections_against_synchronize(|reader, object| {
            object.walk_in_section(&reader.enter());
            object.walk_in_section(&reader.enter());
        });
    });
}

#[test]
fn repinned_section_against_synchronize_sections() {
    explore("section, repin x synchronize_sections", None, || {
        sections_against_synchronize(|reader, object| {
            let mut section = reader.enter();
            object.walk_in_section(&section);
            section.repin();
            object.walk_in_section(&section);
        });
    });
}

#[test]
fn forgotten_section_against_synchronize_sections() {
    explore(
        "forgotten section, reader dropped x synchronize_sections",
        None,
        || {
            let domain = domain();
            let object = Object::new();
            let mut reader = domain.reader();
            let walker = thread::spawn({
                let object = object.clone();
                move || {
                    let section = reader.enter();
                    object.walk_in_section(&section);
                    std::mem::forget(section);
                }
            });
            object.unlink();
            domain.synchronize_sections();
            object.free();
            walker.join().unwrap();
        },
    );
}

#[test]
fn two_sections_against_synchronize_sections() {
    explore("section + section x synchronize_sections", Some(3), || {
        let domain = domain();
        let object = Object::new();
        let walkers = [(); 2].map(|()| {
            let object = object.clone();
            let mut reader = domain.reader();
            thread::spawn(move || object.walk_in_section(&reader.enter()))
        });
        object.unlink();
        domain.synchronize_sections();
        object.free();
        for walker in walkers {
            walker.join().unwrap();
        }
    });
}

#[test]
fn visit_against_retire() {
    explore("visit x retire", Some(2), || {
        let domain = domain();
        let object = Object::new();
        let walker = thread::spawn({
            let (domain, object) = (domain.clone(), object.clone());
            move || object.walk_in_visit(&domain.visit())
        });
        object.unlink();
        domain.retire(Garbage(object.clone()), 1);
        domain.drive();
        walker.join().unwrap();
        finish(&domain, &[&object]);
    });
}

#[test]
fn visit_against_synchronize() {
    explore("visit x synchronize", Some(2), || {
        let domain = domain();
        let object = Object::new();
        let walker = thread::spawn({
            let (domain, object) = (domain.clone(), object.clone());
            move || object.walk_in_visit(&domain.visit())
        });
        object.unlink();
        domain.synchronize();
        object.free();
        walker.join().unwrap();
    });
}

/// The same where the visitor waits for a grace period too, and may run what ends the other's.
#[test]
fn visit_against_two_that_synchronize() {
    explore("visit, synchronize x synchronize", Some(1), || {
        let domain = domain();
        let object = Object::new();
        let walker = thread::spawn({
            let (domain, object) = (domain.clone(), object.clone());
            move || {
                object.walk_in_visit(&domain.visit());
                domain.synchronize();
            }
        });
        object.unlink();
        domain.synchronize();
        object.free();
        walker.join().unwrap();
    });
}

#[test]
fn two_retirers() {
    explore("retire, drive x retire, drive", Some(2), || {
        let domain = domain();
        let objects = [Object::new(), Object::new()];
        let other = thread::spawn({
            let (domain, object) = (domain.clone(), objects[1].clone());
            move || {
                object.unlink();
                domain.retire(Garbage(object.clone()), 1);
                domain.drive();
            }
        });
        objects[0].unlink();
        domain.retire(Garbage(objects[0].clone()), 1);
        domain.drive();
        other.join().unwrap();
        finish(&domain, &[&objects[0], &objects[1]]);
    });
}

#[test]
fn section_against_retire_and_drive() {
    explore("section x retire x drive", Some(2), || {
        let domain = domain();
        let object = Object::new();
        let mut reader = domain.reader();
        let walker = thread::spawn({
            let object = object.clone();
            move || object.walk_in_section(&reader.enter())
        });
        let retirer = thread::spawn({
            let (domain, object) = (domain.clone(), object.clone());
            move || {
                object.unlink();
                domain.retire(Garbage(object.clone()), 1);
            }
        });
        domain.drive();
        walker.join().unwrap();
        retirer.join().unwrap();
        finish(&domain, &[&object]);
    });
}

#[test]
fn section_against_two_retirers() {
    explore("section x retire, drive x retire, drive", Some(1), || {
        let domain = domain();
        let objects = [Object::new(), Object::new()];
        let mut reader = domain.reader();
        let walker = thread::spawn({
            let objects = objects.clone();
            move || {
                let section = reader.enter();
                objects[0].walk_in_section(&section);
                objects[1].walk_in_section(&section);
            }
        });
        let other = thread::spawn({
            let (domain, object) = (domain.clone(), objects[1].clone());
            move || {
                object.unlink();
                domain.retire(Garbage(object.clone()), 1);
                domain.drive();
            }
        });
        objects[0].unlink();
        domain.retire(Garbage(objects[0].clone()), 1);
        domain.drive();
        walker.join().unwrap();
        other.join().unwrap();
        finish(&domain, &[&objects[0], &objects[1]]);
    });
}
