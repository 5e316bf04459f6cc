//! Laps, orders and figures.

use super::*;
use std::collections::BTreeMap;
use std::sync::Mutex;

#[test]
fn middles() {
    assert!(median(&[]).is_nan());
    assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
    assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    assert_eq!(minimum(&[2.0, 1.0]), 1.0);
    assert_eq!(paired_ratio(&[2.0, 8.0, 9.0], &[1.0, 2.0, 3.0]), 3.0);
}

/// Counts how often each page was resolved.
struct Tally(Mutex<BTreeMap<u64, u32>>);

impl Contender for Tally {
    type Worker = ();
    type Failure = Error;

    fn worker(&self) -> Result<(), Error> {
        Ok(())
    }

    fn resolve(&self, (): &mut (), gfn: Gfn) -> Result<(), Error> {
        if gfn.0 == 0xdead {
            return Err(Error::Check("dead".to_owned()));
        }
        *self.0.lock().unwrap().entry(gfn.0).or_default() += 1;
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.0.get_mut().unwrap().clear();
        Ok(())
    }

    fn translate(&self, _gfn: Gfn) -> Option<Translation> {
        None
    }
}

fn course(orders: Vec<Order>) -> Course {
    Course {
        base: Gfn(0x1000),
        page: Level::L2,
        orders,
        cpus: Vec::new(),
    }
}

fn order(legs: &[&[u32]]) -> Order {
    Order(legs.iter().map(|leg| Leg::List(leg.to_vec())).collect())
}

#[test]
fn every_page_of_every_order_is_resolved() {
    let tally = Tally(Mutex::default());
    let course = course(vec![
        Order(vec![Leg::Run { first: 3, count: 3 }, Leg::List(vec![])]),
        order(&[&[9, 7], &[5]]),
    ]);
    let lap = lap(&tally, &mut [Padded(()), Padded(())], &course).unwrap();
    let expected =
        [(3, 1), (4, 1), (5, 2), (7, 1), (9, 1)].map(|(n, times)| (0x1000 + n * 512, times));
    assert_eq!(*tally.0.lock().unwrap(), BTreeMap::from(expected));
    assert_eq!(course.operations(), 6);
    assert!(lap.wall > Duration::ZERO);
}

/// Remembers the order in which pages were resolved.
struct Diary(Mutex<Vec<u64>>);

impl Contender for Diary {
    type Worker = ();
    type Failure = Error;

    fn worker(&self) -> Result<(), Error> {
        Ok(())
    }

    fn resolve(&self, (): &mut (), gfn: Gfn) -> Result<(), Error> {
        self.0.lock().unwrap().push((gfn.0 - 0x1000) / 512);
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn translate(&self, _gfn: Gfn) -> Option<Translation> {
        None
    }
}

#[test]
fn nobody_begins_a_leg_before_all_have_ended_the_last() {
    // The number of a page is its leg, and one thread has far less to do in each than the other.
    let legs = |pages: usize| Order((0..100).map(|leg| Leg::List(vec![leg; pages])).collect());
    let course = course(vec![legs(1), legs(20), legs(1)]);
    let diary = Diary(Mutex::default());
    lap(&diary, &mut [Padded(()), Padded(()), Padded(())], &course).unwrap();
    let diary = diary.0.into_inner().unwrap();
    assert_eq!(diary.len(), 2200);
    assert!(diary.is_sorted());
}

#[test]
fn a_failure_ends_the_lap_with_its_error() {
    let mut course = course(vec![
        order(&[&[1], &[2], &[3]]),
        order(&[&[1], &[0xdead], &[3]]),
    ]);
    (course.base, course.page) = (Gfn(0), Level::L1);
    let error = lap(
        &Tally(Mutex::default()),
        &mut [Padded(()), Padded(())],
        &course,
    )
    .unwrap_err();
    assert_eq!(error.to_string(), "dead");
}

#[test]
fn a_processor_that_does_not_exist_is_an_error_for_all() {
    let mut course = course(vec![order(&[&[1], &[2]]); 2]);
    course.cpus = vec![0, usize::MAX];
    assert!(
        lap(
            &Tally(Mutex::default()),
            &mut [Padded(()), Padded(())],
            &course
        )
        .is_err()
    );
}
