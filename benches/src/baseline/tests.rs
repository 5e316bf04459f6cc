//! Every baseline maps what it should, at every page size, from one thread and from two.

use super::host::Backing;
use super::{Setup, floor, multiarch, mutex, rwlock, table_lock, tables_for, x86};
use crate::race::{Contender, Course, Leg, Order, Translation, lap};
use crate::sync::Padded;
use tdp_arch::{Ept, Format, Gfn, GfnRange, Level, Npt, Pfn};

fn setup(level: Level, pages: u64) -> Setup {
    let start = Gfn(3 << 18);
    let gfns = GfnRange::new(start, pages << level.gfn_shift()).unwrap();
    Setup {
        backing: Backing {
            gfns,
            pfn: Pfn(5 << 18),
            level,
        },
        huge: false,
    }
}

/// Maps everything from two threads that race for every page, checks it, takes it away, and does so again from one.
fn exercise<C: Contender>(mut contender: C, setup: &Setup) {
    let backing = setup.backing;
    let count = backing.pages().count() as u64;
    let all = Order(vec![Leg::Run { first: 0, count }]);
    for orders in [vec![all.clone(), all.clone()], vec![all]] {
        let course = Course {
            base: backing.gfns.start,
            page: backing.level,
            orders,
            cpus: Vec::new(),
        };
        let mut workers: Vec<_> = course
            .orders
            .iter()
            .map(|_| Padded(contender.worker().unwrap()))
            .collect();
        for gfn in backing.pages() {
            assert_eq!(contender.translate(gfn), None, "before");
        }
        lap(&contender, &mut workers, &course).unwrap();
        for gfn in backing.pages() {
            let gfn = Gfn(gfn.0 + (backing.level.pages() - 1));
            let expected = Translation {
                pfn: backing.pfn_of(gfn),
                level: backing.level,
                permitted: true,
            };
            assert_eq!(contender.translate(gfn), Some(expected), "{gfn}");
        }
        contender.reset().unwrap();
    }
}

fn own<F: Format, const ROOT: u8>() {
    for (level, pages) in [(Level::L1, 1500), (Level::L2, 700), (Level::L3, 9)] {
        let setup = setup(level, pages);
        match level {
            Level::L1 => exercise(floor::Floor::<F, ROOT, 1>::new(&setup).unwrap(), &setup),
            Level::L2 => exercise(floor::Floor::<F, ROOT, 2>::new(&setup).unwrap(), &setup),
            _ => exercise(floor::Floor::<F, ROOT, 3>::new(&setup).unwrap(), &setup),
        }
        exercise(mutex::OneMutex::<F, ROOT>::new(&setup).unwrap(), &setup);
        exercise(
            rwlock::ReaderWriter::<F, ROOT>::new(&setup).unwrap(),
            &setup,
        );
        exercise(
            table_lock::TableLock::<F, ROOT>::new(&setup).unwrap(),
            &setup,
        );
    }
}

#[test]
fn own_tables_map() {
    own::<Ept, 4>();
    own::<Ept, 5>();
    own::<Npt, 4>();
    own::<Npt, 5>();
}

#[test]
fn crates_map() {
    for (level, pages) in [(Level::L1, 1500), (Level::L2, 700), (Level::L3, 9)] {
        let setup = setup(level, pages);
        exercise(multiarch::MultiArch::new(&setup).unwrap(), &setup);
        exercise(x86::X86::new(&setup).unwrap(), &setup);
    }
}

#[test]
fn a_fault_outside_the_slot_is_refused() {
    let setup = setup(Level::L1, 8);
    let outside = setup.backing.gfns.end;
    let mutex = mutex::OneMutex::<Ept, 4>::new(&setup).unwrap();
    assert!(
        mutex
            .resolve(&mut mutex.worker().unwrap(), outside)
            .is_err()
    );
    let rwlock = rwlock::ReaderWriter::<Ept, 4>::new(&setup).unwrap();
    assert!(
        rwlock
            .resolve(&mut rwlock.worker().unwrap(), outside)
            .is_err()
    );
    let table_lock = table_lock::TableLock::<Ept, 4>::new(&setup).unwrap();
    assert!(
        table_lock
            .resolve(&mut table_lock.worker().unwrap(), outside)
            .is_err()
    );
}

#[test]
fn memory_that_no_machine_has_is_refused() {
    let setup = setup(Level::L1, 1 << 36);
    assert!(mutex::OneMutex::<Ept, 5>::new(&setup).is_err());
}

#[test]
fn tables_are_counted() {
    let range = |start, pages| GfnRange::new(Gfn(start), pages).unwrap();
    assert_eq!(tables_for(range(0, 1), Level::L1, Level::L4), 4);
    assert_eq!(tables_for(range(511, 2), Level::L1, Level::L4), 5);
    assert_eq!(tables_for(range(0, 1 << 18), Level::L1, Level::L5), 512 + 4);
    assert_eq!(tables_for(range(0, 1 << 18), Level::L2, Level::L4), 3);
    assert_eq!(tables_for(range(0, 1 << 18), Level::L3, Level::L4), 2);
}
