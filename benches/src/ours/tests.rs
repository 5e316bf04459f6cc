//! The library as a contender maps what it should and gives everything back.

use super::*;
use crate::race::{Course, Leg, Order, lap};
use crate::sync::Padded;
use tdp::FrameSource;

fn setup(level: Level) -> OurSetup {
    let gfns = tdp_arch::GfnRange::new(Gfn(1 << 18), 1500 << level.gfn_shift()).unwrap();
    let backing = Backing {
        gfns,
        pfn: Pfn(1 << 28),
        level,
    };
    OurSetup {
        backing,
        root: Level::L4,
        frames: 256,
        huge: false,
    }
}

fn exercise<F: Walked, O: Operation>(level: Level, tables: Tables) {
    let setup = setup(level);
    let mut ours = Ours::<F, O>::new(setup, tables).unwrap();
    let all = Order(vec![Leg::Run {
        first: 0,
        count: 1500,
    }]);
    let orders = vec![all.clone(), all];
    let course = Course {
        base: setup.backing.gfns.start,
        page: level,
        orders,
        cpus: Vec::new(),
    };
    for _ in 0..2 {
        let mut workers: Vec<_> = (0..2).map(|_| Padded(ours.worker().unwrap())).collect();
        lap(&ours, &mut workers, &course).unwrap();
        for gfn in setup.backing.pages() {
            let expected = Translation {
                pfn: setup.backing.pfn_of(gfn),
                level,
                permitted: true,
            };
            assert_eq!(ours.translate(gfn), Some(expected));
        }
        assert_eq!(ours.leaves(), Some(1500));
        let linked = ours.footprint().unwrap().tables;
        ours.reset().unwrap();
        assert_eq!(ours.leaves(), Some(0));
        assert!(
            setup
                .backing
                .pages()
                .all(|gfn| ours.translate(gfn).is_none())
        );
        let left = if tables == Tables::Warm { linked } else { 1 };
        assert_eq!(ours.footprint().unwrap().tables, left);
    }
    assert_eq!(ours.leaked(), 0);
}

#[test]
fn maps_and_forgets() {
    for tables in [Tables::Warm, Tables::Fresh] {
        for level in [Level::L1, Level::L2] {
            exercise::<Ept, WholeFault>(level, tables);
            exercise::<Ept, BareMap>(level, tables);
            exercise::<Npt, WholeFault>(level, tables);
            exercise::<Npt, BareMap>(level, tables);
        }
    }
}

#[test]
fn a_frame_that_does_not_come_back_is_counted() {
    let ours = Ours::<Ept, BareMap>::new(setup(Level::L1), Tables::Warm).unwrap();
    let mut lost = [Pfn(0); 3];
    ours.mmu().host().frames().allocate(&mut lost).unwrap();
    assert_eq!(ours.leaked(), 3);
}

#[test]
fn an_mmu_that_does_not_go_away_is_a_leak() {
    let ours = Ours::<Ept, BareMap>::new(setup(Level::L1), Tables::Warm).unwrap();
    let _handle = ours.mmu().clone();
    assert_eq!(ours.leaked(), u64::MAX);
}
