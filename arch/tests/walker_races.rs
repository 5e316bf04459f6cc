//! Accessed and dirty flags against other writers of the same entries.

mod walker_support;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tdp_arch::walker::{
    Abort, EptConfig, EptFault, EptWalker, GuestAccess, MAX_LOST_RACES, NptConfig, NptWalker,
    PhysicalMemory, WalkError, Walker,
};
use tdp_arch::{Gpa, Hpa, Level};
use walker_support::{Memory, ROOT, chain, entry, entry_address, memory_with, table_of};

const GPA: Gpa = Gpa(0x1234_5678_9abc);
const PAGE: u64 = 0x7_6543_2000;
const OTHER: u64 = 0x5_5555_5000;
const WB: u64 = 6 << 3;
const A: u64 = 1 << 8;
const D: u64 = 1 << 9;

fn ept() -> EptWalker {
    EptWalker::new(EptConfig::default()).expect("a valid configuration")
}

/// Memory in which somebody else acts just before the compare-exchange on `at`.
struct Interfered<'a, F> {
    memory: &'a Memory,
    at: u64,
    times: Cell<u32>,
    act: F,
}

impl<F: Fn(&Memory)> PhysicalMemory for Interfered<'_, F> {
    fn load(&self, hpa: Hpa) -> Option<u64> {
        self.memory.load(hpa)
    }

    fn compare_exchange(&self, hpa: Hpa, current: u64, new: u64) -> Result<(), u64> {
        if hpa.0 == self.at && self.times.get() > 0 {
            self.times.set(self.times.get() - 1);
            (self.act)(self.memory);
        }
        self.memory.compare_exchange(hpa, current, new)
    }
}

fn leaf() -> u64 {
    entry_address(table_of(Level::L4, Level::L1), Level::L1, GPA)
}

/// An update that lost decides again by the value that won: a leaf that was unmapped, re-mapped, or made read-only
/// between the load and the update is obeyed, and only the entry that is used gets flags.
#[test]
fn a_lost_update_decides_again() {
    let cases: [(u64, Option<u64>, u64); 4] = [
        (0, None, 0),
        (OTHER | WB | 7, Some(OTHER | 0xabc), OTHER | WB | 7 | A | D),
        (PAGE | WB | 1, None, PAGE | WB | 1),
        (PAGE | WB | A | 7, Some(PAGE | 0xabc), PAGE | WB | 7 | A | D),
    ];
    for (winner, hpa, left) in cases {
        let memory = memory_with(GPA, &[7, 7, 7, PAGE | WB | 7]);
        let shared = Interfered {
            memory: &memory,
            at: leaf(),
            times: Cell::new(1),
            act: |m: &Memory| m.set(leaf(), winner),
        };
        let result = ept().walk(&shared, ROOT, GPA, GuestAccess::Write);
        assert_eq!(result.ok().map(|t| t.hpa.0), hpa, "{winner:#x}");
        assert_eq!(entry(&memory, Level::L1, GPA), left, "{winner:#x}");
    }
}

/// The same for an upper entry: a table that was unlinked while its accessed flag was about to be set is not entered,
/// one that became a large page is used as such.
#[test]
fn a_table_that_changes_is_not_entered() {
    let pde = entry_address(table_of(Level::L4, Level::L2), Level::L2, GPA);
    let large = 0x7_6540_0000 | 1 << 7 | WB | 7;
    for (winner, hpa) in [(0, None), (large, Some(0x7_6558_9abc))] {
        let memory = memory_with(GPA, &[7, 7, 7, PAGE | WB | 7]);
        let shared = Interfered {
            memory: &memory,
            at: pde,
            times: Cell::new(1),
            act: |m: &Memory| m.set(pde, winner),
        };
        let result = ept().walk(&shared, ROOT, GPA, GuestAccess::Read);
        assert_eq!(result.ok().map(|t| t.hpa.0), hpa, "{winner:#x}");
        assert_eq!(
            entry(&memory, Level::L1, GPA),
            PAGE | WB | 7,
            "the old table was entered"
        );
    }
}

/// A walk ends however often it loses; it takes as many losses as it promises.
#[test]
fn an_entry_that_never_holds_still_ends_the_walk() {
    for (lost, ends) in [
        (MAX_LOST_RACES - 1, false),
        (MAX_LOST_RACES, true),
        (u32::MAX, true),
    ] {
        let memory = memory_with(GPA, &[7, 7, 7, PAGE | WB | 7]);
        let act = |m: &Memory| m.set(leaf(), m.get(leaf()) ^ 1 << 60);
        let shared = Interfered {
            memory: &memory,
            at: leaf(),
            times: Cell::new(lost),
            act,
        };
        let result = ept().walk(&shared, ROOT, GPA, GuestAccess::Write);
        let contended = WalkError::Abort(Abort::Contended {
            gpa: GPA,
            hpa: Hpa(leaf()),
            level: Level::L1,
        });
        assert_eq!(result.err(), ends.then_some(contended), "{lost} losses");
    }
}

/// Memory that threads share.
struct Shared(Mutex<Vec<u64>>);

impl Shared {
    fn words(&self) -> MutexGuard<'_, Vec<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PhysicalMemory for Shared {
    fn load(&self, hpa: Hpa) -> Option<u64> {
        let value = self.words().get(hpa.0 as usize / 8).copied();
        // Time for the other thread between a load and the update that rests on it.
        std::thread::yield_now();
        value
    }

    fn compare_exchange(&self, hpa: Hpa, current: u64, new: u64) -> Result<(), u64> {
        let word = &mut self.words()[hpa.0 as usize / 8];
        if *word == current {
            *word = new;
            Ok(())
        } else {
            Err(*word)
        }
    }
}

/// One thread writes through walks; another takes the leaf away and puts it back clean with the next frame. The frames
/// that were written are exactly those whose leaf had its dirty flag when it was taken: none is lost, none invented.
#[test]
fn no_dirty_flag_is_lost_between_threads() {
    let mut words = vec![0; 5 * 512];
    for (table, next) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007)] {
        words[table / 8] = next;
    }
    let memory = Shared(Mutex::new(words));
    let leaf = Hpa(0x4000);
    let (walker, rounds) = (ept(), 500);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut written = BTreeSet::new();
            while written.len() < rounds {
                match walker.walk(&memory, Hpa(0x1000), Gpa(0), GuestAccess::Write) {
                    Ok(found) => {
                        assert!(found.dirty);
                        written.insert(found.hpa.0);
                    }
                    Err(WalkError::Fault(EptFault::Violation(_))) => {}
                    Err(other) => panic!("{other}"),
                }
            }
            written
        });
        let mut dirty = BTreeSet::new();
        let mut harvest = |value: u64| {
            assert!(
                matches!(value & (A | D), 0) || value & (A | D) == A | D,
                "half an update: {value:#x}"
            );
            if value & D != 0 {
                dirty.insert(value & 0xf_ffff_ffff_f000);
            }
        };
        let mut frame = 0x1_0000;
        while !writer.is_finished() {
            let value = memory.load(leaf).expect("memory");
            if memory.compare_exchange(leaf, value, 0).is_ok() {
                harvest(value);
                frame += 1;
                let put = memory.compare_exchange(leaf, 0, frame << 12 | WB | 7);
                put.expect("a walk wrote an entry that is not present");
            }
            std::thread::yield_now();
        }
        harvest(memory.load(leaf).expect("memory"));
        assert_eq!(writer.join().expect("the writer ends"), dirty);
    });
}

/// NPT updates its own bits by the same rules.
#[test]
fn npt_decides_again_as_well() {
    let memory = Memory::new();
    chain(&memory, Level::L4, GPA, &[7, 7, 7, PAGE | 7]);
    let shared = Interfered {
        memory: &memory,
        at: leaf(),
        times: Cell::new(1),
        act: |m: &Memory| m.set(leaf(), OTHER | 7),
    };
    let walker = NptWalker::new(NptConfig::default()).expect("a valid configuration");
    let found = walker
        .walk(&shared, ROOT, GPA, GuestAccess::Write)
        .expect("mapped");
    assert_eq!(found.hpa, Hpa(OTHER | 0xabc));
    assert_eq!(entry(&memory, Level::L1, GPA), OTHER | 7 | 0x60);
}
