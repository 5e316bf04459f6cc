//! The lanes, and the rounds that they run.

use super::Args;
use crate::baseline::host::Backing;
use crate::baseline::tables_for;
use crate::confidential::backend::{Backend, Null, NullOptions};
use crate::confidential::conditions::{Conditions, Met, Wait, Weather};
use crate::confidential::faulting::Faulting;
use crate::confidential::guest::{Checks, Guest};
use crate::confidential::layout::Layout;
use crate::ours::{OurSetup, Ours, Tables, WholeFault};
use crate::race::{self, Contender, Course, Laps, Leg, Order};
use crate::report::{Error, Progress};
use crate::sync::Padded;
use std::time::Duration;
use tdp::Visibility;
use tdp_arch::{ENTRIES_PER_TABLE, Ept, Level};

/// Laps in a round.
pub(super) const LANES: u64 = 5;
/// What a call takes in the lane `overhead`: a real TDX module's.
const OVERHEAD_COST: Duration = Duration::from_micros(5);
/// Pages of the lane `overhead`.
const OVERHEAD_PAGES: u64 = 2048;
/// Tables that the lanes `shared` and `private` fill.
const COMPARED_TABLES: u64 = 32;

/// What all lanes came to.
#[derive(Debug)]
pub(super) struct Results {
    pub(super) shared: Laps,
    pub(super) private: Laps,
    pub(super) overhead: Laps,
    /// Nanoseconds that the module took in each lap of `overhead`.
    pub(super) overhead_hook_ns: Vec<u64>,
    pub(super) one: Laps,
    pub(super) all: Laps,
    /// What the module's calls met in the laps of `one`, and of `all`.
    pub(super) met: [Met; 2],
    /// Calls of the module in the laps of `one` and `all` that were answered "again".
    pub(super) busy: u64,
    pub(super) frozen_waits: u64,
    pub(super) retried: u64,
    pub(super) refused: u64,
    pub(super) checks: Checks,
}

/// A contender with the states of its threads.
struct Lane<C: Contender> {
    contender: C,
    workers: Vec<Padded<C::Worker>>,
}

impl<C: Contender> Lane<C> {
    /// Seats a contender, and has it run `course` once, so that its tables are in place.
    fn new(contender: C, vcpus: usize, course: &Course) -> Result<Self, Error> {
        let workers = (0..vcpus)
            .map(|_| contender.worker().map(Padded))
            .collect::<Result<_, _>>()?;
        let mut lane = Self { contender, workers };
        race::lap(&lane.contender, &mut lane.workers, course)?;
        lane.contender.reset()?;
        Ok(lane)
    }

    fn lap(&mut self, course: &Course, mut before: impl FnMut(&C)) -> Result<race::Lap, Error> {
        race::undisturbed(course.orders.len(), |again| {
            if again {
                self.contender.reset()?;
            }
            before(&self.contender);
            race::lap(&self.contender, &mut self.workers, course)
        })
    }
}

/// Each vCPU's pages: all vCPUs in the same table at about the same time, side by side.
fn course(layout: &Layout, vcpus: u16, running: u16) -> Course {
    let page = layout.level;
    let region = ENTRIES_PER_TABLE as u64;
    let (pages, vcpus) = (layout.gfns.pages() / page.pages(), u64::from(vcpus));
    let share = pages / vcpus;
    let orders = (0..u64::from(running))
        .map(|vcpu| {
            // Of each table an equal part; what does not divide evenly lies at the end.
            let each = (region / vcpus).max(1);
            let turns = share.div_ceil(each);
            let numbers = (0..turns)
                .flat_map(|turn| {
                    let taken = turn * each;
                    let count = each.min(share - taken);
                    // What comes before: all vCPUs' earlier turns, then this turn of the vCPUs before this one.
                    let first = taken * vcpus + vcpu * count;
                    (first..first + count).map(|number| number as u32)
                })
                .collect();
            Order(vec![Leg::List(numbers)])
        })
        .collect();
    Course {
        base: layout.gfns.start,
        page,
        orders,
        cpus: Vec::new(),
    }
}

/// One vCPU, `count` pages one after the other.
fn straight(layout: &Layout, count: u64) -> Course {
    Course {
        base: layout.gfns.start,
        page: layout.level,
        orders: vec![Order(vec![Leg::Run { first: 0, count }])],
        cpus: Vec::new(),
    }
}

fn private_guest<B: Backend>(
    layout: Layout,
    options: B::Options,
    weather: Weather,
) -> Result<Faulting<B>, Error> {
    let conditions = Conditions::new(weather);
    let guest = Guest::new(layout, Visibility::Private, options, conditions)?;
    Ok(Faulting::new(
        guest,
        Some(Visibility::Private),
        layout.level,
    ))
}

/// The guest without a private half.
fn shared_guest(layout: &Layout) -> Result<Ours<Ept, WholeFault>, Error> {
    let backing = Backing {
        gfns: layout.gfns,
        pfn: layout.shared(),
        level: layout.level,
    };
    let setup = OurSetup {
        backing,
        root: Level::L4,
        frames: layout
            .frames()
            .max(tables_for(layout.gfns, layout.level, Level::L4)) as usize,
        huge: false,
    };
    Ours::new(setup, Tables::Warm)
}

/// Runs all rounds.
pub(super) fn run<B: Backend>(
    args: &Args,
    layout: Layout,
    options: B::Options,
    progress: &Progress,
) -> Result<Results, Error> {
    let compared = COMPARED_TABLES * ENTRIES_PER_TABLE as u64;
    let compared = Layout::new(compared * layout.level.pages(), layout.level, 1)
        .ok_or_else(|| Error::Usage("no memory to compare halves on".to_owned()))?;
    let straight_all = straight(&compared, compared.gfns.pages() / compared.level.pages());
    let straight_few = straight(&compared, OVERHEAD_PAGES);
    let (course_one, course_all) = (
        course(&layout, args.vcpus, 1),
        course(&layout, args.vcpus, args.vcpus),
    );
    let slow = Weather {
        wait: Wait::Spin,
        cost: OVERHEAD_COST,
        ..Weather::default()
    };
    let null = NullOptions::default();
    let mut shared = Lane::new(shared_guest(&compared)?, 1, &straight_all)?;
    let free = Weather::default();
    let mut private = Lane::new(
        private_guest::<Null>(compared, null, free)?,
        1,
        &straight_all,
    )?;
    let mut overhead = Lane::new(
        private_guest::<Null>(compared, null, slow)?,
        1,
        &straight_few,
    )?;
    let asked = private_guest::<B>(layout, options, args.backend.module.weather())?;
    let mut asked = Lane::new(asked, usize::from(args.vcpus), &course_all)?;

    let mut results = Results {
        shared: Laps::of(&straight_all),
        private: Laps::of(&straight_all),
        overhead: Laps::of(&straight_few),
        overhead_hook_ns: Vec::new(),
        one: Laps::of(&course_one),
        all: Laps::of(&course_all),
        met: [Met::default(); 2],
        busy: 0,
        frozen_waits: 0,
        retried: 0,
        refused: 0,
        checks: Checks::default(),
    };
    for round in 1..=args.rounds {
        let step = |lane| progress.step(format!("{lane}, round {round}"));
        results.shared.push(shared.lap(&straight_all, |_| {})?);
        shared.contender.reset()?;
        step("private");
        results.private.push(private.lap(&straight_all, |_| {})?);
        private.contender.reset()?;
        step("overhead");
        let mut before = Met::default();
        results.overhead.push(overhead.lap(&straight_few, |lane| {
            before = lane.guest().conditions().met();
            lane.guest().conditions().raise();
        })?);
        let met = overhead.contender.guest().conditions().met().since(&before);
        results.overhead_hook_ns.push(met.ns);
        overhead.contender.reset()?;
        for (n, course) in [&course_one, &course_all].into_iter().enumerate() {
            step(if n == 0 { "one vCPU" } else { "all vCPUs" });
            let guest = asked.contender.guest();
            let (met, stats) = (guest.conditions().met(), guest.mmu().stats().protected);
            let lap = asked.lap(course, |lane| lane.guest().conditions().raise())?;
            let guest = asked.contender.guest();
            guest.conditions().calm();
            let met = guest.conditions().met().since(&met);
            results.met[n].add(&met);
            let after = guest.mmu().stats().protected;
            results.busy += after.busy.iter().sum::<u64>() - stats.busy.iter().sum::<u64>();
            results.frozen_waits += after.frozen_waits - stats.frozen_waits;
            guest.audit(&mut results.checks);
            let laps = if n == 0 {
                &mut results.one
            } else {
                &mut results.all
            };
            laps.push(lap);
            asked.contender.reset()?;
        }
    }
    results.retried = asked.contender.tries().retried();
    results.refused = asked.contender.tries().refused();
    for lane in [private, overhead] {
        drop(lane.workers);
        lane.contender.finish(&mut results.checks)?;
    }
    drop(asked.workers);
    asked.contender.finish(&mut results.checks)?;
    drop(shared.workers);
    results.checks.leaked_frames += shared.contender.leaked();
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_one_vcpus_and_all_are_in_one_table_at_a_time() {
        for (vcpus, frames) in [(64, 64 * 1024), (3, 3 * 700), (1, 512), (600, 600 * 2)] {
            let layout = Layout::new(frames, Level::L1, vcpus).unwrap();
            let course = course(&layout, vcpus, vcpus);
            let mut seen: Vec<_> = course
                .orders
                .iter()
                .flat_map(|order| &order.0)
                .flat_map(|leg| match leg {
                    Leg::List(list) => list.clone(),
                    Leg::Run { .. } => Vec::new(),
                })
                .collect();
            seen.sort_unstable();
            assert!(seen.iter().copied().eq(0..frames as u32), "{vcpus}");
        }
    }
}
