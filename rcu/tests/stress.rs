//! Walkers, sweeps and retirers at full speed on objects that carry a generation stamp.
//!
//! Objects are never given back to the system. Freeing one changes its stamp and puts it on a free list, from which it is
//! linked again as another object, as a table frame would be. A reader that is still inside sees the stamp change under it.

#![cfg(all(feature = "std", not(loom)))]

use std::mem;
use std::sync::Barrier;
use std::thread;

use tdp_rcu::sync::{Arc, AtomicBool, AtomicU64, AtomicUsize, Mutex, Ordering};
use tdp_rcu::{Domain, DomainConfig, Stamp};

const SLOTS: usize = 8;
const OBJECTS: usize = 64;
const BOUND: usize = 4;
const RETIRERS: usize = 2;
const SWAPS: u64 = 1_500;
const WALKERS: usize = 4;

struct World {
    /// Object in the low half, its stamp in the high one.
    slots: [AtomicU64; SLOTS],
    stamps: Vec<AtomicU64>,
    free: Mutex<Vec<usize>>,
    stale: AtomicUsize,
}

impl World {
    /// A walk through one slot: takes the link, pauses, then looks at the object for a while.
    fn walk(&self, at: usize, pause: fn()) -> u64 {
        let link = self.slots[at % SLOTS].load(Ordering::Acquire);
        pause();
        self.look(link, at);
        link
    }

    fn look(&self, link: u64, at: usize) {
        let (object, stamp) = (link as u32 as usize, link >> 32);
        for _ in 0..8 << (at % 6) {
            if self.stamps[object].load(Ordering::Relaxed) != stamp {
                self.stale.fetch_add(1, Ordering::Relaxed);
                break;
            }
            std::hint::spin_loop();
        }
    }

    fn take(&self) -> Option<u64> {
        let object = self.free.lock().pop()?;
        Some(self.stamps[object].load(Ordering::Relaxed) << 32 | object as u64)
    }
}

/// Few walks pause, for a time slice each on a busy machine.
fn pause_if(now: bool) -> fn() {
    if now { thread::yield_now } else { || () }
}

struct Garbage(Arc<World>, usize);

impl Drop for Garbage {
    fn drop(&mut self) {
        let Self(world, object) = self;
        world.stamps[*object].fetch_add(1, Ordering::Relaxed);
        world.free.lock().push(*object);
    }
}

#[test]
fn no_reader_sees_a_freed_object() {
    run(Domain::new(DomainConfig { bound: BOUND }));
}

/// The same where the retire side pays for the fences, if the system has it.
#[test]
fn no_reader_without_a_fence_sees_a_freed_object() {
    run(Domain::asymmetric(DomainConfig { bound: BOUND }));
}

fn run(domain: Domain<Garbage>) {
    let world = Arc::new(World {
        slots: std::array::from_fn(|object| AtomicU64::new(object as u64)),
        stamps: (0..OBJECTS).map(|_| AtomicU64::new(0)).collect(),
        free: Mutex::new((SLOTS..OBJECTS).collect()),
        stale: AtomicUsize::new(0),
    });
    let done = AtomicBool::new(false);
    let walks = AtomicUsize::new(0);
    let kept = AtomicUsize::new(0);
    let start = Barrier::new(RETIRERS + WALKERS);
    thread::scope(|scope| {
        let retirers: Vec<_> = (0..RETIRERS)
            .map(|me| {
                let (world, domain, start) = (&world, &domain, &start);
                scope.spawn(move || {
                    start.wait();
                    for swap in 0..SWAPS {
                        // What an allocator does: past the bound, or out of objects, it drives.
                        while domain.is_over_bound() {
                            domain.reclaim(16);
                        }
                        let link = loop {
                            match world.take() {
                                Some(link) => break link,
                                None => drop(domain.reclaim(16)),
                            }
                        };
                        let at = (swap as usize + me * 3) % SLOTS;
                        let old = world.slots[at].swap(link, Ordering::AcqRel);
                        domain.retire(Garbage(world.clone(), old as u32 as usize), 1);
                        thread::yield_now();
                    }
                })
            })
            .collect();
        // They yield outside, or on few cores most of a grace period is the wait for a time slice.
        // A vCPU that repins and keeps what it found for as long as it may, one that forgets sections, one that is replaced all the time, and a sweep.
        scope.spawn(|| {
            start.wait();
            let mut reader = domain.reader();
            let mut at = 0;
            let mut find = (Stamp::NONE, 0);
            while !done.load(Ordering::Relaxed) {
                let mut section = reader.enter();
                for _ in 0..64 {
                    let stamp = section.stamp();
                    if find.0 == stamp {
                        world.look(find.1, at);
                        kept.fetch_add(1, Ordering::Relaxed);
                    } else {
                        find = (stamp, world.walk(at, pause_if(at % 16 == 0)));
                    }
                    section.repin();
                    at += 1;
                }
                drop(section);
                thread::yield_now();
            }
            walks.fetch_add(at, Ordering::Relaxed);
        });
        scope.spawn(|| {
            start.wait();
            let mut reader = domain.reader();
            let mut at = 0;
            while !done.load(Ordering::Relaxed) {
                let section = reader.enter();
                world.walk(at, pause_if(at % 7 == 1));
                if at % 7 == 0 {
                    mem::forget(section);
                } else {
                    drop(section);
                    thread::yield_now();
                }
                at += 1;
            }
            walks.fetch_add(at, Ordering::Relaxed);
        });
        scope.spawn(|| {
            start.wait();
            let mut at = 0;
            while !done.load(Ordering::Relaxed) {
                let mut reader = domain.reader();
                for _ in 0..16 {
                    let section = reader.enter();
                    world.walk(at, pause_if(at % 16 == 0));
                    drop(section);
                    at += 1;
                }
                mem::forget(reader.enter());
                drop(reader);
                thread::yield_now();
            }
            walks.fetch_add(at, Ordering::Relaxed);
        });
        scope.spawn(|| {
            start.wait();
            let mut at = 0;
            while !done.load(Ordering::Relaxed) {
                let mut visit = domain.visit();
                for _ in 0..16 {
                    world.walk(at, thread::yield_now);
                    visit.repin();
                    world.walk(at + 1, || ());
                    at += 1;
                }
                drop(visit);
                thread::yield_now();
            }
            walks.fetch_add(at, Ordering::Relaxed);
        });
        for retirer in retirers {
            retirer.join().unwrap();
        }
        domain.synchronize();
        done.store(true, Ordering::Relaxed);
    });
    assert!(domain.drain(16));
    let counters = domain.counters();
    println!("{} walks, {counters:?}", walks.load(Ordering::Relaxed));
    assert!(walks.load(Ordering::Relaxed) > 1_000, "nobody walked");
    assert!(kept.load(Ordering::Relaxed) > 100, "nothing was kept");
    assert_eq!(
        world.stale.load(Ordering::Relaxed),
        0,
        "walks that saw a freed object"
    );
    assert_eq!(counters.retired, RETIRERS as u64 * SWAPS);
    assert_eq!(counters.freed, counters.retired);
    assert_eq!(counters.readers, 0);
    // Each retirer looked at the bound before it retired one more.
    assert!(
        counters.pending_max <= (BOUND + RETIRERS) as u64,
        "{counters:?}"
    );
    assert_eq!(
        world.free.lock().len(),
        OBJECTS - SLOTS,
        "objects lost or freed twice"
    );
}
