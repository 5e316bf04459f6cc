//! The constant: what one fault costs over the least that it can cost, and the parts of which the difference is made.
//!
//! Four things are measured, in rounds that interleave them ([`crate::race`] says how the clock is read):
//!
//! * *laps*: the whole fault and the bare map against the floor, pages in order and at random, tables in place;
//! * *guard*: entering and leaving a critical section against a lone compare-exchange in the first-level cache;
//! * *cold*: one fault and one pass of the floor, each after the caches were filled with other memory;
//! * *invalidation*: of one page, begin to end, by one thread, while a vCPU faults without pause on the 2 MiB around it.
//!
//! With `--only` nothing is compared: one kind of lap runs, for a tool that counts its instructions. The count of two
//! numbers of rounds, subtracted and divided by the pages between, is free of what happens before and after.

mod cold;
mod invalidation;

use crate::baseline::Setup;
use crate::baseline::floor::Floor;
use crate::demand_paging::plan::shuffled;
use crate::formats::FormatChoice;
use crate::ours::{BareMap, Operation, Ours, Tables, Walked, WholeFault};
use crate::race::{self, Contender, Course, Laps, Leg, Order, median, paired_ratio};
use crate::report::{Error, Output, Progress};
use crate::size;
use crate::sweeps::{memory, our_setup};
use crate::sync::{AtomicU64, Ordering, Padded};
use crate::sys;
use clap::ValueEnum;
use serde::Serialize;
use std::collections::BTreeMap;
use std::hint::black_box;
use tdp_arch::{AdBits, Ept, Gfn, Level, Npt};
use tdp_rcu::{Domain, DomainConfig};

const ABOUT: &str = "\
Measures what one fault of one vCPU costs, tables in place, over the least that it can cost: 'sequential' and 'random' are the
whole fault over the floor (a raw walk and one compare-exchange), 'map' the bare install over it. 'guard_vs_cas' is a critical
section entered and left, over a lone compare-exchange; 'guard_share' the same over a sequential fault. 'cold' is one fault after
the caches were filled with other memory, in nanoseconds and over a pass of the floor after the same. 'invalidation' is one page
invalidated, zapped and flushed, begin to end, while a vCPU faults without pause beside it.

All ratios are medians of rounds, and the less the better. --fences symmetric has every fault pay for its own fence.";

const EXAMPLES: &str = "\
Examples:
  tdp-bench constant --json -
  tdp-bench constant --fences symmetric
  valgrind --tool=callgrind --toggle-collect='*traverse*' tdp-bench constant -b 8M -f ept --only fault -i 4";

/// What one fault costs over the least that it can
#[derive(Debug, clap::Args)]
#[command(long_about = ABOUT, after_help = EXAMPLES)]
pub struct Args {
    /// The vCPU's memory: bytes, or with K, M, G or T
    #[arg(short = 'b', long, value_name = "SIZE", default_value = "256M", value_parser = size::parse)]
    bytes: u64,

    /// Entry format
    #[arg(short = 'f', long, value_enum, default_value_t = FormatChoice::Both)]
    format: FormatChoice,

    /// Rounds
    #[arg(short = 'i', long, default_value_t = 15, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,

    /// Who pays for the order between a fault and a grace period
    #[arg(long, value_enum, default_value_t = Fences::Asymmetric)]
    fences: Fences,

    /// Run laps of one kind only and tell nothing of them: for a tool that counts instructions
    #[arg(long, value_enum, value_name = "WHICH")]
    only: Option<Only>,
}

/// Who pays for the order between a fault and a grace period.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum Fences {
    /// The grace period, where the system can do that
    Asymmetric,
    /// Both
    Symmetric,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Only {
    /// Whole faults, in order
    Fault,
    /// Bare maps, in order
    Map,
    /// The floor, in order
    Floor,
}

/// One format's figures, round by round.
#[derive(Debug, Serialize)]
struct Row {
    format: &'static str,
    floor_sequential: Laps,
    fault_sequential: Laps,
    map_sequential: Laps,
    floor_random: Laps,
    fault_random: Laps,
    guard_ns: Vec<f64>,
    compare_exchange_ns: Vec<f64>,
    cold: cold::Found,
    invalidation: invalidation::Found,
    leaked: u64,
}

/// The figures that have a goal.
#[derive(Debug, Serialize)]
struct Ratios {
    sequential: f64,
    random: f64,
    map: f64,
    guard_vs_cas: f64,
    guard_share: f64,
    cold: f64,
    cold_fault_ns: f64,
    invalidation_median_ns: f64,
}

impl Row {
    fn ratios(&self) -> Ratios {
        let over =
            |ours: &Laps, floor: &Laps| paired_ratio(&ours.per_operation(), &floor.per_operation());
        Ratios {
            sequential: over(&self.fault_sequential, &self.floor_sequential),
            random: over(&self.fault_random, &self.floor_random),
            map: over(&self.map_sequential, &self.floor_sequential),
            guard_vs_cas: paired_ratio(&self.guard_ns, &self.compare_exchange_ns),
            guard_share: paired_ratio(&self.guard_ns, &self.fault_sequential.per_operation()),
            cold: paired_ratio(&self.cold.fault_ns, &self.cold.floor_ns),
            cold_fault_ns: median(&self.cold.fault_ns),
            invalidation_median_ns: self.invalidation.median_ns,
        }
    }
}

#[derive(Serialize)]
struct Body<'a> {
    parameters: Parameters,
    results: &'a [Row],
    ratios: BTreeMap<&'static str, Ratios>,
    checks: Checks,
}

#[derive(Serialize)]
struct Parameters {
    bytes: u64,
    rounds: u16,
    fences: Fences,
}

#[derive(Serialize)]
struct Checks {
    /// Pages that were invalidated and could be reached afterwards.
    reachable: u64,
    leaked_frames: u64,
}

/// Runs the scenario.
///
/// # Errors
///
/// [`Error::Usage`] for memory that there is not, the library's own errors if a run fails, and [`Error::Check`] if a frame
/// was lost or an invalidated page could be reached.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    if args.bytes < Level::L2.bytes() {
        return Err(Error::Usage("-b: at least 2M".to_owned()));
    }
    let formats =
        u64::from(args.format.includes::<Ept>()) + u64::from(args.format.includes::<Npt>());
    let progress = output.progress(formats * u64::from(args.rounds));
    let mut rows = Vec::new();
    if args.format.includes::<Ept>() {
        rows.extend(measure::<Ept>(args, &progress)?);
    }
    if args.format.includes::<Npt>() {
        rows.extend(measure::<Npt>(args, &progress)?);
    }
    drop(progress);
    if args.only.is_some() {
        return Ok(());
    }
    let ratios: BTreeMap<_, _> = rows.iter().map(|row| (row.format, row.ratios())).collect();
    output.table(
        &[
            "over the floor",
            "sequential",
            "random",
            "map",
            "guard / cas",
            "guard / fault",
            "cold",
            "cold, ns",
            "invalidation, ns",
            "99 of 100",
        ],
        rows.iter().map(|row| {
            let ratios = row.ratios();
            [
                row.format.to_owned(),
                format!("{:.2}", ratios.sequential),
                format!("{:.2}", ratios.random),
                format!("{:.2}", ratios.map),
                format!("{:.2}", ratios.guard_vs_cas),
                format!("{:.2}", ratios.guard_share),
                format!("{:.2}", ratios.cold),
                format!("{:.0}", ratios.cold_fault_ns),
                format!("{:.0}", ratios.invalidation_median_ns),
                format!("{:.0}", row.invalidation.p99_ns),
            ]
        }),
    );
    let checks = Checks {
        reachable: rows.iter().map(|row| row.invalidation.reachable).sum(),
        leaked_frames: rows
            .iter()
            .fold(0, |sum, row| sum.saturating_add(row.leaked)),
    };
    let verdict = (checks.reachable, checks.leaked_frames);
    let body = Body {
        parameters: Parameters {
            bytes: args.bytes,
            rounds: args.rounds,
            fences: args.fences,
        },
        results: &rows,
        ratios,
        checks,
    };
    output.finish("constant", &body)?;
    match verdict {
        (0, 0) => Ok(()),
        (reachable, leaked) => Err(Error::Check(format!(
            "{reachable} invalidated pages could be reached, {leaked} table frames leaked"
        ))),
    }
}

/// A contender with its one thread's state.
struct Seated<C: Contender> {
    contender: C,
    workers: Vec<Padded<C::Worker>>,
}

impl<C: Contender> Seated<C> {
    fn new(contender: Result<C, Error>) -> Result<Self, Error> {
        let contender = contender?;
        let workers = vec![Padded(contender.worker()?)];
        Ok(Self { contender, workers })
    }

    /// Runs one lap, again if the system disturbed it, and brings the contender back to nothing mapped.
    fn lap(&mut self, course: &Course, laps: &mut Laps) -> Result<(), Error> {
        let lap = race::undisturbed(1, |again| {
            if again {
                self.contender.reset()?;
            }
            race::lap(&self.contender, &mut self.workers, course)
        })?;
        laps.push(lap);
        self.contender.reset()
    }

    /// Runs laps that nobody times.
    fn count(&mut self, course: &Course, rounds: u16) -> Result<(), Error> {
        for _ in 0..rounds {
            race::lap(&self.contender, &mut self.workers, course)?;
            self.contender.reset()?;
        }
        Ok(())
    }

    /// Times one operation with every line cold, and brings the contender back to nothing mapped.
    fn cold(&mut self, evictor: &cold::Evictor, gfn: Gfn) -> Result<f64, Error> {
        let Some(Padded(worker)) = self.workers.first_mut() else {
            return Err(Error::run("a worker", "is gone"));
        };
        let ns = evictor.time(&self.contender, worker, gfn)?;
        self.contender.reset()?;
        Ok(ns)
    }

    fn leaked(self) -> u64 {
        drop(self.workers);
        self.contender.leaked()
    }
}

fn measure<F: Walked>(args: &Args, progress: &Progress) -> Result<Option<Row>, Error> {
    let backing = memory(args.bytes)?;
    let setup = our_setup(backing, 2)?;
    let asymmetric = args.fences == Fences::Asymmetric;
    fn ours<F: Walked, O: Operation>(
        setup: crate::ours::OurSetup,
        asymmetric: bool,
    ) -> Result<Ours<F, O>, Error> {
        Ours::with(setup, Tables::Warm, AdBits::Processor, |builder| {
            builder.asymmetric_fences(asymmetric)
        })
    }
    let pages = backing.gfns.pages();
    let course = |leg| Course {
        base: backing.gfns.start,
        page: Level::L1,
        orders: vec![Order(vec![leg])],
        cpus: sys::allowed().into_iter().take(1).collect(),
    };
    let sequential = course(Leg::Run {
        first: 0,
        count: pages,
    });
    let random = course(Leg::List(shuffled(0, pages, 1)?));
    let theirs = Setup {
        backing,
        huge: false,
    };
    let floor = || Seated::new(Floor::<F, 4, 1>::new(&theirs));
    match args.only {
        Some(Only::Fault) => {
            let ours = ours::<F, WholeFault>(setup, asymmetric);
            Seated::new(ours)?.count(&sequential, args.rounds)?;
            return Ok(None);
        }
        Some(Only::Map) => {
            let ours = ours::<F, BareMap>(setup, asymmetric);
            Seated::new(ours)?.count(&sequential, args.rounds)?;
            return Ok(None);
        }
        Some(Only::Floor) => {
            floor()?.count(&sequential, args.rounds)?;
            return Ok(None);
        }
        None => {}
    }
    let mut floor = floor()?;
    let mut fault = Seated::new(ours::<F, WholeFault>(setup, asymmetric))?;
    let mut map = Seated::new(ours::<F, BareMap>(setup, asymmetric))?;
    // Once without the clock, so that no lap is the first.
    floor.count(&sequential, 1)?;
    fault.count(&sequential, 1)?;
    map.count(&sequential, 1)?;
    let evictor = cold::Evictor::new();
    let mut row = Row {
        format: F::NAME,
        floor_sequential: Laps::of(&sequential),
        fault_sequential: Laps::of(&sequential),
        map_sequential: Laps::of(&sequential),
        floor_random: Laps::of(&random),
        fault_random: Laps::of(&random),
        guard_ns: Vec::new(),
        compare_exchange_ns: Vec::new(),
        cold: cold::Found {
            evicted_by_bytes: evictor.bytes(),
            ..cold::Found::default()
        },
        invalidation: invalidation::Found::default(),
        leaked: 0,
    };
    for round in 1..=args.rounds {
        progress.step(format!("{}, round {round}", F::NAME));
        floor.lap(&sequential, &mut row.floor_sequential)?;
        fault.lap(&sequential, &mut row.fault_sequential)?;
        map.lap(&sequential, &mut row.map_sequential)?;
        floor.lap(&random, &mut row.floor_random)?;
        fault.lap(&random, &mut row.fault_random)?;
        row.guard_ns.push(guard(asymmetric));
        row.compare_exchange_ns.push(compare_exchange());
        // Another table each time.
        let table = u64::from(round) % (pages / Level::L2.pages());
        let gfn = Gfn(backing.gfns.start.0 + table * Level::L2.pages());
        row.cold.floor_ns.push(floor.cold(&evictor, gfn)?);
        row.cold.fault_ns.push(fault.cold(&evictor, gfn)?);
    }
    row.invalidation = invalidation::run::<F>(&fault.contender, backing.gfns)?;
    row.leaked = fault.leaked().saturating_add(map.leaked());
    Ok(Some(row))
}

/// Operations of which one figure is made, and figures of which the least counts: what interrupts one only lengthens it.
const OPERATIONS: u32 = 1 << 14;
const ATTEMPTS: u32 = 8;

fn least(mut operation: impl FnMut()) -> f64 {
    let attempts: Vec<f64> = (0..ATTEMPTS)
        .map(|_| {
            let start = sys::thread_time();
            for _ in 0..OPERATIONS {
                operation();
            }
            (sys::thread_time() - start).as_nanos() as f64 / f64::from(OPERATIONS)
        })
        .collect();
    race::minimum(&attempts)
}

/// Nanoseconds of a critical section with nothing in it.
fn guard(asymmetric: bool) -> f64 {
    let config = DomainConfig::default();
    let domain: Domain<()> = if asymmetric {
        Domain::asymmetric(config)
    } else {
        Domain::new(config)
    };
    let mut reader = domain.reader();
    least(|| {
        let section = black_box(&mut reader).enter();
        drop(section);
    })
}

/// Nanoseconds of a compare-exchange, each waiting for the one before only as the processor has it.
fn compare_exchange() -> f64 {
    let word = Padded(AtomicU64::new(0));
    let mut value = 0;
    least(|| {
        let next = value + 1;
        let found =
            black_box(&word)
                .0
                .compare_exchange(value, next, Ordering::AcqRel, Ordering::Acquire);
        debug_assert!(found.is_ok(), "nobody else has the word");
        value = next;
    })
}

/// The middle and the 99th hundredth of `ns`, which it sorts.
fn spread(ns: &mut [u64]) -> (f64, f64) {
    ns.sort_unstable();
    let all: Vec<f64> = ns.iter().map(|&ns| ns as f64).collect();
    let p99 = ns
        .get(ns.len() * 99 / 100)
        .map_or(f64::NAN, |&ns| ns as f64);
    (median(&all), p99)
}
