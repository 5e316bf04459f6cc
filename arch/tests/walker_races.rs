//! Accessed and dirty flags against other writers of the same entries.

mod walker_support;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

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

/// Memory as a walking thread sees it, shared with one that changes the leaf. Every other load of a clean leaf lets a
/// change happen before the update that rests on it.
struct Walking<'a> {
    words: &'a Mutex<Vec<u64>>,
    leaf: Hpa,
    /// Signalled after each change that is not a walk's.
    changed: &'a Condvar,
    clean_loads: Cell<u32>,
    lost: Cell<u32>,
}

fn lock(words: &Mutex<Vec<u64>>) -> MutexGuard<'_, Vec<u64>> {
    words.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PhysicalMemory for Walking<'_> {
    fn load(&self, hpa: Hpa) -> Option<u64> {
        let words = lock(self.words);
        let value = words.get(hpa.0 as usize / 8).copied();
        let clean = value.is_some_and(|value| value != 0 && value & D == 0);
        if hpa == self.leaf && clean {
            self.clean_loads.set(self.clean_loads.get() + 1);
            if self.clean_loads.get().is_multiple_of(2) {
                // The time limit only keeps a test that fails elsewhere from hanging.
                drop(self.changed.wait_timeout(words, Duration::from_millis(50)));
            }
        }
        value
    }

    fn compare_exchange(&self, hpa: Hpa, current: u64, new: u64) -> Result<(), u64> {
        let word = &mut lock(self.words)[hpa.0 as usize / 8];
        if *word == current {
            *word = new;
            Ok(())
        } else {
            self.lost.set(self.lost.get() + 1);
            Err(*word)
        }
    }
}

/// One thread writes through walks; another takes the leaf away and puts it back clean with the next frame. The frames
/// that were written are exactly those whose leaf had its dirty flag when it was taken: none is lost, none invented.
#[test]
fn no_dirty_flag_is_lost_between_threads() {
    let mut tables = vec![0; 5 * 512];
    for (table, next) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007)] {
        tables[table / 8] = next;
    }
    let leaf = Hpa(0x4000);
    let words = &Mutex::new(tables);
    let changed = &Condvar::new();
    let rounds = 50;
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || {
            let memory = Walking {
                words,
                leaf,
                changed,
                clean_loads: Cell::new(0),
                lost: Cell::new(0),
            };
            let mut written = BTreeSet::new();
            while written.len() < rounds {
                match ept().walk(&memory, Hpa(0x1000), Gpa(0), GuestAccess::Write) {
                    Ok(found) => {
                        assert!(found.dirty);
                        written.insert(found.hpa.0);
                    }
                    Err(WalkError::Fault(EptFault::Violation(_))) => {}
                    Err(other) => panic!("{other}"),
                }
            }
            (written, memory.lost.get())
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
            harvest(std::mem::take(&mut lock(words)[leaf.0 as usize / 8]));
            std::thread::yield_now();
            frame += 1;
            let gap =
                std::mem::replace(&mut lock(words)[leaf.0 as usize / 8], frame << 12 | WB | 7);
            assert_eq!(gap, 0, "a walk wrote an entry that is not present");
            changed.notify_all();
            std::thread::yield_now();
        }
        harvest(lock(words)[leaf.0 as usize / 8]);
        let (written, lost) = writer.join().expect("the writer ends");
        assert_eq!(written, dirty);
        assert!(lost > 0, "no update was ever in a race");
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
