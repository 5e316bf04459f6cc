//! Timing: contenders resolve the same pages in the same order, from one thread or from many at once.
//!
//! How the clock is read:
//!
//! * every thread stamps its own start and end, after a common start line, so that waking and joining threads is in
//!   no figure;
//! * one vCPU is charged its thread's processor time, which the rest of the machine disturbs less than wall time;
//!   many vCPUs are charged the wall time from the first start to the last end, divided by all operations;
//! * contenders take turns, round by round, in one process; a slow spell of the machine meets all of them alike;
//! * threads that are to be in the same place at the same time meet between the legs of their orders; what the meetings
//!   take is in everybody's figures alike;
//! * a lap tells how often a thread of it was taken off its processor against its will, so that whoever runs it can
//!   repeat it. Threads that sleep on a lock go of their own will and are not counted.

mod laps;

pub use laps::{Laps, median, minimum, paired_ratio};

use crate::report::Error;
use crate::sync::{AtomicUsize, Ordering, Padded};
use crate::sys;
use serde::Serialize;
use std::hint::black_box;
use std::time::{Duration, Instant};
use tdp_arch::{Gfn, Level, Pfn};

/// Something that resolves faults, and can be brought back to where nothing is mapped.
pub trait Contender: Sync {
    /// What a thread keeps to itself.
    type Worker: Send;
    /// Why an operation failed.
    type Failure: Into<Error>;

    /// The state of one more thread.
    ///
    /// # Errors
    ///
    /// If it cannot be had.
    fn worker(&self) -> Result<Self::Worker, Error>;

    /// Resolves a write to `gfn`: afterwards it is mapped. The timed operation.
    ///
    /// # Errors
    ///
    /// If it cannot be resolved; the lap ends.
    fn resolve(&self, worker: &mut Self::Worker, gfn: Gfn) -> Result<(), Self::Failure>;

    /// Makes the next lap start from nothing mapped. Not timed; no worker is at work.
    ///
    /// # Errors
    ///
    /// If it cannot be done.
    fn reset(&mut self) -> Result<(), Error>;

    /// Where `gfn` is mapped, asked of the tables and not of what was meant to be in them. No worker is at work.
    fn translate(&self, gfn: Gfn) -> Option<Translation>;

    /// How many leaves are mapped by the contender's own books, if it keeps any. No worker is at work.
    fn leaves(&self) -> Option<u64> {
        None
    }

    /// What its tables take now, if it can tell.
    fn footprint(&self) -> Option<Footprint> {
        None
    }

    /// Takes everything down, the workers already being gone, and tells how many table frames did not come back.
    fn leaked(self) -> u64
    where
        Self: Sized,
    {
        0
    }
}

/// Memory of a contender's tables, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Footprint {
    /// Tables that are linked, the root included.
    pub tables: u64,
    /// Their pages.
    pub table_bytes: u64,
    /// What is kept beside them.
    pub metadata_bytes: u64,
    /// Tables that vCPUs hold ready.
    pub spare_bytes: u64,
}

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Host frame of the guest frame asked for.
    pub pfn: Pfn,
    /// Size of the page.
    pub level: Level,
    /// A guest may read, write and execute it.
    pub permitted: bool,
}

/// The pages that one thread resolves, in its order: leg by leg. No thread begins a leg before all have ended the one
/// before, so every order of a course has as many.
#[derive(Clone, Debug)]
pub struct Order(pub Vec<Leg>);

/// Pages that are resolved without waiting for anybody.
#[derive(Clone, Debug)]
pub enum Leg {
    /// `count` pages from the `first`-th on.
    Run {
        /// Number of the first page.
        first: u64,
        /// How many.
        count: u64,
    },
    /// The pages with these numbers.
    List(Vec<u32>),
}

impl Leg {
    fn len(&self) -> u64 {
        match self {
            Self::Run { count, .. } => *count,
            Self::List(list) => list.len() as u64,
        }
    }
}

/// What a lap consists of.
#[derive(Clone, Debug)]
pub struct Course {
    /// First frame of guest memory.
    pub base: Gfn,
    /// Size of the pages that the orders number.
    pub page: Level,
    /// One order a thread.
    pub orders: Vec<Order>,
    /// Processor for each thread; empty to leave them to the scheduler.
    pub cpus: Vec<usize>,
}

impl Course {
    /// Operations in a lap.
    pub fn operations(&self) -> u64 {
        self.orders
            .iter()
            .flat_map(|order| &order.0)
            .map(Leg::len)
            .sum()
    }

    #[inline(always)]
    fn gfn(&self, number: u64) -> Gfn {
        Gfn(self.base.0 + (number << self.page.gfn_shift()))
    }
}

/// One lap's figures.
#[derive(Clone, Copy, Debug)]
pub struct Lap {
    /// From the first thread's start to the last one's end.
    pub wall: Duration,
    /// Processor time of all threads together.
    pub cpu: Duration,
    /// Times that a thread was taken off its processor against its will.
    pub preemptions: u64,
}

/// Where threads wait for each other: before the clock starts, and between legs. They spin, because a thread that has to
/// be woken starts late.
struct Meeting {
    threads: usize,
    arrivals: AtomicUsize,
}

/// More arrivals than any number of waits can ask for.
const GONE: usize = 1 << 48;

impl Meeting {
    fn new(threads: usize) -> Self {
        Self {
            threads,
            arrivals: AtomicUsize::new(0),
        }
    }

    /// Waits until all have come to their `n`-th meeting, counted from 0.
    #[inline]
    fn wait(&self, n: usize) {
        self.arrivals.fetch_add(1, Ordering::AcqRel);
        let mut spins = 0_u32;
        while self.arrivals.load(Ordering::Acquire) < (n + 1) * self.threads {
            // With more threads than processors the others need this one's.
            spins += 1;
            if spins.is_multiple_of(1024) {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    }
}

/// A thread's promise to come to the meetings. When it goes, whatever the reason, nobody waits for it any more.
struct Attendance<'a>(&'a Meeting);

impl Drop for Attendance<'_> {
    fn drop(&mut self) {
        // Those who came to all meetings change nothing by this: their arrivals are counted already.
        self.0.arrivals.fetch_max(GONE, Ordering::AcqRel);
    }
}

/// Runs one lap: `workers[i]` takes the `i`-th order of `course`.
///
/// # Errors
///
/// The first failure of an operation, or a processor that a thread cannot be tied to.
///
/// # Panics
///
/// If there are fewer workers than orders, or if a contender does.
pub fn lap<C: Contender>(
    contender: &C,
    workers: &mut [Padded<C::Worker>],
    course: &Course,
) -> Result<Lap, Error> {
    assert!(
        workers.len() >= course.orders.len(),
        "a worker for every order"
    );
    let meeting = Meeting::new(course.orders.len());
    let runs: Vec<Result<Run, Error>> = std::thread::scope(|scope| {
        let threads: Vec<_> = workers
            .iter_mut()
            .zip(&course.orders)
            .enumerate()
            .map(|(i, (worker, order))| {
                let (meeting, cpu) = (&meeting, course.cpus.get(i).copied());
                scope.spawn(move || run(contender, &mut worker.0, course, order, cpu, meeting))
            })
            .collect();
        threads.into_iter().map(join).collect()
    });
    let runs = runs.into_iter().collect::<Result<Vec<_>, _>>()?;
    let start = runs.iter().map(|run| run.start).min();
    let end = runs.iter().map(|run| run.end).max();
    let wall = start
        .zip(end)
        .map_or(Duration::ZERO, |(start, end)| end - start);
    Ok(Lap {
        wall,
        cpu: runs.iter().map(|run| run.cpu).sum(),
        preemptions: runs.iter().map(|run| run.preemptions).sum(),
    })
}

/// What a thread came to. A panic of it goes on here.
pub(crate) fn join<T>(thread: std::thread::ScopedJoinHandle<'_, T>) -> T {
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Laps that are run at most for one that the operating system leaves alone.
const ATTEMPTS: u32 = 5;

/// Runs a lap of `threads` threads, again if the operating system took a processor away in the middle of it; after
/// `ATTEMPTS` times it counts as it is. More threads than processors cannot but disturb each other. `lap` is told whether there
/// was one before, which it has to undo.
///
/// # Errors
///
/// As `lap`.
pub fn undisturbed(
    threads: usize,
    mut lap: impl FnMut(bool) -> Result<Lap, Error>,
) -> Result<Lap, Error> {
    let processors = std::thread::available_parallelism().map_or(1, Into::into);
    let attempts = if threads > processors { 1 } else { ATTEMPTS };
    let mut last = lap(false)?;
    for _ in 1..attempts {
        if last.preemptions == 0 {
            break;
        }
        last = lap(true)?;
    }
    Ok(last)
}

/// One thread's part of a lap.
struct Run {
    start: Instant,
    end: Instant,
    cpu: Duration,
    preemptions: u64,
}

fn run<C: Contender>(
    contender: &C,
    worker: &mut C::Worker,
    course: &Course,
    order: &Order,
    cpu: Option<usize>,
    meeting: &Meeting,
) -> Result<Run, Error> {
    let _attendance = Attendance(meeting);
    if let Some(cpu) = cpu {
        sys::pin(cpu).map_err(|e| Error::Usage(format!("--cpus {cpu}: cannot run there: {e}")))?;
    }
    meeting.wait(0);
    let preemptions = sys::preemptions();
    let (cpu, start) = (sys::thread_time(), Instant::now());
    let outcome = traverse(contender, worker, course, order, meeting);
    let end = Instant::now();
    let cpu = sys::thread_time() - cpu;
    let preemptions = sys::preemptions() - preemptions;
    outcome.map_err(Into::into)?;
    Ok(Run {
        start,
        end,
        cpu,
        preemptions,
    })
}

/// The timed loop.
#[inline(never)]
fn traverse<C: Contender>(
    contender: &C,
    worker: &mut C::Worker,
    course: &Course,
    order: &Order,
    meeting: &Meeting,
) -> Result<(), C::Failure> {
    for (n, leg) in order.0.iter().enumerate() {
        if n > 0 {
            meeting.wait(n);
        }
        // A guest's next address is known to nobody beforehand, nor to the compiler.
        match leg {
            Leg::Run { first, count } => {
                for number in *first..first + count {
                    contender.resolve(worker, black_box(course.gfn(number)))?;
                }
            }
            Leg::List(list) => {
                for number in list {
                    contender.resolve(worker, black_box(course.gfn(u64::from(*number))))?;
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
