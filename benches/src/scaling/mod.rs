//! `scaling`: what coherence costs a fault, for more vCPUs than this machine has processors.
//!
//! The accesses to memory of single faults are traced as for `conflicts`, of two vCPUs, and replayed through a model of the
//! coherence protocol (`mesi.rs`) for 1 to 512 vCPUs, the library and the baselines alike. That gives cache-line transfers per
//! fault; with a time for each transfer, a bound of the rate: a fault takes the time that it takes alone, which is measured, and
//! its transfers, and no line can be in two places at once. A lock's own queue, and what the memory bus can carry, are not in
//! it. One and two threads are measured as well, and drawn beside.

mod mesi;
mod plot;

use crate::baseline::Setup;
use crate::baseline::host::Backing;
use crate::baseline::mutex::OneMutex;
use crate::baseline::rwlock::ReaderWriter;
use crate::baseline::table_lock::TableLock;
use crate::conflicts::{Side, Traced, Turn, faults_of, trace};
use crate::ours::{OurSetup, Ours, Tables, WholeFault};
use crate::race::{self, Contender, Course, Leg, Order, median};
use crate::report::{Error, Output};
use crate::sync::Padded;
use crate::sys;
use clap::Args as ClapArgs;
use mesi::{Grain, Program, Step};
use serde::Serialize;
use std::path::PathBuf;
use tdp_arch::{Ept, Gfn, GfnRange, Level, Pfn};

/// Replays the memory accesses of single faults through a model of the coherence protocol, for 1 to 512 vCPUs: transfers per
/// fault, and a bound of the rate. The library beside locked baselines. Needs valgrind.
///
/// Everything beyond the two threads that are measured is projected, and a bound: of the fewest transfers that there can be.
/// It is kind to whoever has a lock: waiting for it is not in it.
#[derive(Clone, Debug, ClapArgs)]
pub struct Args {
    /// Nanoseconds that a cache line takes from one processor to another; one socket has 40 to 80, two have 100 to 200
    #[arg(long, default_value_t = 100.0, value_name = "NS")]
    transfer_cost: f64,
    /// Write a plot of the rates, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Rounds of what is measured
    #[arg(short = 'i', long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

/// Numbers of vCPUs that are projected.
const VCPUS: [usize; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];
/// Pages of each thread that is measured: 64 MiB, on tables of its own.
const PAGES: u64 = 1 << 14;
const NAMES: [&str; 4] = ["tdp", "rwlock", "table-lock", "mutex"];

/// A number of vCPUs.
#[derive(Clone, Copy, Debug, Serialize)]
struct Point {
    vcpus: usize,
    /// Cache lines that move for a fault, if faults overlap as much as they can.
    transfers_per_fault: f64,
    /// The same if no fault overlaps another: no fewer can be.
    transfers_at_least: f64,
    /// Of those, the ones of the line that moves most.
    transfers_of_hottest_line: f64,
    /// Faults a second of all vCPUs, at most; projected.
    projected_rate: f64,
    /// That rate over as many times that of one vCPU.
    projected_efficiency: f64,
}

#[derive(Clone, Debug, Serialize)]
struct Curve {
    contender: &'static str,
    /// Measured: nanoseconds of a fault by one thread.
    one_thread_ns: f64,
    /// Measured: faults a second of one thread, and of two.
    measured_rate: [f64; 2],
    points: Vec<Point>,
}

#[derive(Debug, Serialize)]
struct Ratios {
    /// Measured: two threads over one.
    two_threads: f64,
    /// Most transfers over fewest, 2 to 512 vCPUs; 1 if there are none at all.
    transfers_spread: f64,
    projected_efficiency_64: f64,
    /// Projected rate at 64 vCPUs over that of the reader-writer lock.
    projected_over_rwlock_64: f64,
}

#[derive(Debug, Serialize)]
struct Body {
    transfer_cost_ns: f64,
    curves: Vec<Curve>,
    ratios: Ratios,
}

/// Runs the scenario.
///
/// # Errors
///
/// [`Error::Usage`] for a cost that is none; [`Error::Run`] if there is no valgrind; a plot that cannot be written.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    if !(args.transfer_cost.is_finite() && args.transfer_cost >= 0.0) {
        return Err(Error::Usage(format!(
            "--transfer-cost {}: is no time",
            args.transfer_cost
        )));
    }
    let measured = measure(args.rounds)?;
    let trace = trace(Traced::Faults)?;
    let mut curves = Vec::new();
    for (name, [one, two]) in NAMES.into_iter().zip(measured) {
        let turns = trace
            .pairs
            .iter()
            .find(|(pair, _)| *pair == faults_of(name));
        let program = turns.map(|(_, turns)| program(turns));
        let program = program
            .filter(|it| !it.first.is_empty() && !it.second.is_empty())
            .ok_or_else(|| Error::Check(format!("{name}: nothing was traced")))?;
        curves.push(Curve {
            contender: name,
            one_thread_ns: one,
            measured_rate: [1e9 / one, 1e9 / two],
            points: project(&program, name, one, args.transfer_cost),
        });
    }
    let body = Body {
        transfer_cost_ns: args.transfer_cost,
        ratios: ratios(&curves),
        curves,
    };
    show(&body, output);
    if let Some(path) = &args.plot {
        plot::write(path, &body)?;
    }
    output.finish("scaling", &body)
}

fn program(turns: &[Turn]) -> Program {
    let of = |side| -> Vec<Vec<Step>> {
        let turns = turns.iter().filter(|turn| turn.side == side);
        turns
            .map(|turn| {
                turn.accesses
                    .iter()
                    .map(|it| (it.line, it.writes))
                    .collect()
            })
            .collect()
    };
    Program {
        first: of(Side::First),
        second: of(Side::Second),
    }
}

fn project(program: &Program, name: &str, one_thread_ns: f64, cost: f64) -> Vec<Point> {
    let mut alone = 0.0;
    VCPUS
        .iter()
        .map(|&vcpus| {
            let replay = |grain| mesi::replay(program, vcpus, vcpus as u64, grain);
            // The bound is of the fewest transfers that there can be.
            let (most, traffic) = (replay(Grain::Access), replay(Grain::Operation));
            let each = vcpus as f64 * 1e9 / (one_thread_ns + traffic.per_operation * cost);
            let line = match traffic.of_hottest * cost {
                busy if busy > 0.0 => 1e9 / busy,
                _ => f64::INFINITY,
            };
            // One lock around everything lets one through at a time.
            let serial = match name {
                "mutex" => 1e9 / (one_thread_ns + traffic.of_hottest * cost),
                _ => f64::INFINITY,
            };
            let rate = each.min(line).min(serial);
            if vcpus == 1 {
                alone = rate;
            }
            Point {
                vcpus,
                transfers_per_fault: most.per_operation,
                transfers_at_least: traffic.per_operation,
                transfers_of_hottest_line: traffic.of_hottest,
                projected_rate: rate,
                projected_efficiency: rate / (vcpus as f64 * alone),
            }
        })
        .collect()
}

fn at(curve: &Curve, vcpus: usize) -> Option<&Point> {
    curve.points.iter().find(|point| point.vcpus == vcpus)
}

fn ratios(curves: &[Curve]) -> Ratios {
    let ours = &curves[0];
    let rate = |name| {
        let curve = curves.iter().find(|curve| curve.contender == name);
        curve
            .and_then(|curve| at(curve, 64))
            .map_or(f64::NAN, |point| point.projected_rate)
    };
    let transfers: Vec<f64> = ours
        .points
        .iter()
        .filter(|point| point.vcpus >= 2)
        .map(|point| point.transfers_per_fault)
        .collect();
    let most = transfers.iter().copied().fold(0.0, f64::max);
    let fewest = transfers.iter().copied().fold(f64::INFINITY, f64::min);
    Ratios {
        two_threads: ours.measured_rate[1] / ours.measured_rate[0],
        transfers_spread: if most == 0.0 { 1.0 } else { most / fewest },
        projected_efficiency_64: at(ours, 64).map_or(f64::NAN, |it| it.projected_efficiency),
        projected_over_rwlock_64: rate("tdp") / rate("rwlock"),
    }
}

fn show(body: &Body, output: &Output) {
    output.table(
        &[
            "contender",
            "vCPUs",
            "transfers/fault",
            "at least",
            "projected M/s",
            "efficiency",
        ],
        body.curves.iter().flat_map(|curve| {
            curve.points.iter().map(|point| {
                [
                    curve.contender.to_owned(),
                    point.vcpus.to_string(),
                    format!("{:.3}", point.transfers_per_fault),
                    format!("{:.3}", point.transfers_at_least),
                    format!("{:.1}", point.projected_rate / 1e6),
                    format!("{:.2}", point.projected_efficiency),
                ]
            })
        }),
    );
    for curve in &body.curves {
        let [one, two] = curve.measured_rate.map(|rate| rate / 1e6);
        output.say(format!(
            "{}: measured {one:.1} M/s with one thread, {two:.1} M/s with two",
            curve.contender
        ));
    }
    let Ratios {
        two_threads,
        transfers_spread,
        projected_efficiency_64,
        projected_over_rwlock_64,
    } = body.ratios;
    output.say(format!(
        "The library: two threads {two_threads:.2} times one (measured); transfers at most {transfers_spread:.2} times the fewest \
         from 2 to 512 vCPUs; projected efficiency at 64 vCPUs {projected_efficiency_64:.2}, {projected_over_rwlock_64:.1} times \
         the reader-writer lock's rate, at {} ns a transfer",
        body.transfer_cost_ns
    ));
}

/// A contender that is measured.
trait Measured {
    /// Nanoseconds a fault, all threads together.
    fn lap(&mut self, threads: u64) -> Result<f64, Error>;
}

struct Seated<C: Contender> {
    contender: C,
    workers: Vec<Padded<C::Worker>>,
}

impl<C: Contender> Measured for Seated<C> {
    fn lap(&mut self, threads: u64) -> Result<f64, Error> {
        let order = |thread| {
            Order(vec![Leg::Run {
                first: thread * PAGES,
                count: PAGES,
            }])
        };
        let course = Course {
            base: Gfn(0),
            page: Level::L1,
            orders: (0..threads).map(order).collect(),
            cpus: sys::allowed(),
        };
        let lap = race::undisturbed(threads as usize, |_| {
            self.contender.reset()?;
            race::lap(&self.contender, &mut self.workers, &course)
        })?;
        let time = if threads == 1 { lap.cpu } else { lap.wall };
        Ok(time.as_secs_f64() * 1e9 / course.operations() as f64)
    }
}

fn seat<C: Contender + 'static>(contender: Result<C, Error>) -> Result<Box<dyn Measured>, Error> {
    let contender = contender?;
    let workers = (0..2)
        .map(|_| contender.worker().map(Padded))
        .collect::<Result<_, _>>()?;
    Ok(Box::new(Seated { contender, workers }))
}

/// Nanoseconds a fault by one thread and by two, of each contender: medians of interleaved rounds.
fn measure(rounds: u32) -> Result<Vec<[f64; 2]>, Error> {
    let backing = Backing {
        gfns: GfnRange {
            start: Gfn(0),
            end: Gfn(2 * PAGES),
        },
        pfn: Pfn(1 << 30),
        level: Level::L1,
    };
    let ours = OurSetup {
        backing,
        root: Level::L4,
        frames: 512,
        huge: false,
    };
    let theirs = Setup {
        backing,
        huge: false,
    };
    let mut seats = vec![
        seat(Ours::<Ept, WholeFault>::new(ours, Tables::Warm))?,
        seat(ReaderWriter::<Ept, 4>::new(&theirs))?,
        seat(TableLock::<Ept, 4>::new(&theirs))?,
        seat(OneMutex::<Ept, 4>::new(&theirs))?,
    ];
    let mut times = vec![[const { Vec::new() }; 2]; seats.len()];
    for seat in &mut seats {
        // Makes the tables.
        seat.lap(2)?;
    }
    for _ in 0..rounds {
        for (seat, times) in seats.iter_mut().zip(&mut times) {
            for (threads, times) in (1..).zip(times) {
                times.push(seat.lap(threads)?);
            }
        }
    }
    Ok(times
        .iter()
        .map(|of_one| [0, 1].map(|n| median(&of_one[n])))
        .collect())
}
