//! The contenders, and the phases that each goes through.

use super::Args;
use crate::baseline::Setup;
use crate::baseline::floor::Floor;
use crate::baseline::host::Backing;
use crate::baseline::mutex::OneMutex;
use crate::baseline::rwlock::ReaderWriter;
use crate::baseline::table_lock::TableLock;
use crate::ours::{Ours, Tables, Walked, WholeFault};
use crate::race::{self, Course, Leg, Order, join};
use crate::report::{Error, Progress};
use crate::sweeping::{Age, Kind, Sweeping, Touching, Track, Zap};
use crate::sweeps::our_setup;
use crate::sync::{AtomicBool, Ordering, Padded};
use crate::sys;
use serde::Serialize;
use std::marker::PhantomData;
use std::time::Instant;
use tdp_arch::{Access, AdBits, Level};

/// What happens in a phase, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Phase {
    Populate,
    WritePopulated,
    ReadPopulated,
    MarkIdleBeforeWriting,
    WriteIdle,
    MarkIdleBeforeReading,
    ReadIdle,
    /// Writing while another thread ages.
    WriteWhileAging,
    /// One of that thread's passes, on average.
    AgeWhileWriting,
}

/// One contender.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) format: &'static str,
    pub(super) pages: u64,
    /// Nanoseconds of each phase, round by round: wall time of accesses, processor time of aging passes.
    pub(super) ns: std::collections::BTreeMap<Phase, Vec<u64>>,
    /// Pages that were young after a pass, or old after an access.
    pub(super) wrong: u64,
    #[serde(skip)]
    pub(super) leaked: u64,
}

trait Seat {
    fn round(&mut self, course: &Course, parallel: bool) -> Result<(), Error>;
    fn finish(self: Box<Self>) -> Row;
}

struct Seated<C: Sweeping, K> {
    contender: C,
    walker: <C::Format as Walked>::Walker,
    workers: Vec<Padded<C::Worker>>,
    backing: Backing,
    row: Row,
    kind: PhantomData<K>,
}

impl<C: Sweeping, K: Kind> Seated<C, K> {
    fn accesses(&mut self, course: &Course, access: Access) -> Result<u64, Error> {
        let touching = Touching {
            contender: &self.contender,
            walker: &self.walker,
            access,
        };
        let lap = race::lap(&touching, &mut self.workers, course)?;
        Ok(u64::try_from(lap.wall.as_nanos()).unwrap_or(u64::MAX))
    }

    fn phase(&mut self, phase: Phase, ns: u64) {
        self.row.ns.entry(phase).or_default().push(ns);
    }

    fn mark_idle(&mut self, phase: Phase) -> Result<(), Error> {
        let gfns = self.backing.gfns;
        let cpu = sys::thread_time();
        self.contender.sweep::<K>(gfns)?;
        let ns = (sys::thread_time() - cpu).as_nanos();
        self.phase(phase, u64::try_from(ns).unwrap_or(u64::MAX));
        self.row.wrong += self.contender.left::<K>(gfns);
        Ok(())
    }

    fn access_phase(&mut self, course: &Course, access: Access, phase: Phase) -> Result<(), Error> {
        let ns = self.accesses(course, access)?;
        self.phase(phase, ns);
        let young = self.contender.left::<K>(self.backing.gfns);
        self.row.wrong += self.backing.gfns.pages() - young;
        Ok(())
    }

    /// Writing while another thread ages without pause.
    fn parallel(&mut self, course: &Course) -> Result<(), Error> {
        let gfns = self.backing.gfns;
        let over = AtomicBool::new(false);
        let Self {
            contender,
            walker,
            workers,
            ..
        } = &mut *self;
        let contender = &*contender;
        let (written, aged) = std::thread::scope(|scope| {
            let ager = scope.spawn(|| {
                let (start, mut passes) = (Instant::now(), 0);
                // Relaxed: nothing is handed over by it.
                while passes == 0 || !over.load(Ordering::Relaxed) {
                    contender.sweep::<K>(gfns)?;
                    passes += 1;
                }
                Ok::<_, Error>(start.elapsed().as_nanos() / passes)
            });
            let touching = Touching {
                contender,
                walker: &*walker,
                access: Access::Write,
            };
            let lap = race::lap(&touching, workers, course);
            over.store(true, Ordering::Relaxed);
            (lap, join(ager))
        });
        let ns = |ns: u128| u64::try_from(ns).unwrap_or(u64::MAX);
        self.phase(Phase::WriteWhileAging, ns(written?.wall.as_nanos()));
        self.phase(Phase::AgeWhileWriting, ns(aged?));
        Ok(())
    }
}

impl<C: Sweeping, K: Kind> Seat for Seated<C, K> {
    fn round(&mut self, course: &Course, parallel: bool) -> Result<(), Error> {
        use Access::{Read, Write};
        self.contender.sweep::<Zap>(self.backing.gfns)?;
        self.access_phase(course, Write, Phase::Populate)?;
        self.access_phase(course, Write, Phase::WritePopulated)?;
        self.access_phase(course, Read, Phase::ReadPopulated)?;
        self.mark_idle(Phase::MarkIdleBeforeWriting)?;
        self.access_phase(course, Write, Phase::WriteIdle)?;
        self.mark_idle(Phase::MarkIdleBeforeReading)?;
        self.access_phase(course, Read, Phase::ReadIdle)?;
        if parallel {
            self.parallel(course)?;
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Row {
        let Self {
            contender,
            workers,
            mut row,
            ..
        } = *self;
        drop(workers);
        row.leaked = contender.leaked();
        row
    }
}

fn seat<C: Sweeping + 'static, K: Kind>(
    contender: Result<C, Error>,
    name: &'static str,
    ad_bits: AdBits,
    backing: Backing,
    vcpus: u16,
) -> Result<Box<dyn Seat>, Error> {
    let contender = contender?;
    let workers = (0..vcpus)
        .map(|_| contender.worker().map(Padded))
        .collect::<Result<_, _>>()?;
    let walker = C::Format::walker(Level::L4, ad_bits).map_err(|e| Error::run("page walker", e))?;
    Ok(Box::new(Seated::<C, K> {
        contender,
        walker,
        workers,
        backing,
        row: Row {
            name,
            format: <C::Format as tdp_arch::Format>::NAME,
            pages: backing.gfns.pages(),
            ns: std::collections::BTreeMap::new(),
            wrong: 0,
            leaked: 0,
        },
        kind: PhantomData,
    }))
}

/// Runs all rounds of one format.
pub(super) fn run<F: Walked>(
    args: &Args,
    backing: Backing,
    progress: &Progress,
) -> Result<Vec<Row>, Error> {
    use AdBits::{Processor, Software};
    let ours = our_setup(backing, args.vcpus)?;
    let theirs = Setup {
        backing,
        huge: false,
    };
    let vcpus = args.vcpus;
    let made =
        |ad_bits| Ours::<F, WholeFault>::with(ours, Tables::Warm, ad_bits, |builder| builder);
    let mut seats = vec![
        seat::<_, Age>(made(Processor), "tdp", Processor, backing, vcpus)?,
        seat::<_, Track>(made(Software), "tdp_software_ad", Software, backing, vcpus)?,
        seat::<_, Age>(
            Floor::<F, 4, 1>::new(&theirs),
            "floor",
            Processor,
            backing,
            vcpus,
        )?,
        seat::<_, Age>(
            OneMutex::<F, 4>::new(&theirs),
            "mutex",
            Processor,
            backing,
            vcpus,
        )?,
        seat::<_, Age>(
            ReaderWriter::<F, 4>::new(&theirs),
            "rwlock",
            Processor,
            backing,
            vcpus,
        )?,
        seat::<_, Age>(
            TableLock::<F, 4>::new(&theirs),
            "table_lock",
            Processor,
            backing,
            vcpus,
        )?,
    ];
    let course = course(args, backing);
    for round in 1..=args.rounds {
        progress.step(format!("{}, round {round}", F::NAME));
        for seat in &mut seats {
            seat.round(&course, args.parallel)?;
        }
    }
    Ok(seats.into_iter().map(Seat::finish).collect())
}

/// Each vCPU's own memory, page by page.
fn course(args: &Args, backing: Backing) -> Course {
    let (vcpus, pages) = (u64::from(args.vcpus), backing.gfns.pages());
    let mut cpus = sys::allowed();
    cpus.truncate(usize::from(args.vcpus));
    if cpus.len() < usize::from(args.vcpus) {
        cpus.clear();
    }
    let count = pages / vcpus;
    Course {
        base: backing.gfns.start,
        page: Level::L1,
        orders: (0..vcpus)
            .map(|vcpu| {
                Order(vec![Leg::Run {
                    first: vcpu * count,
                    count,
                }])
            })
            .collect(),
        cpus,
    }
}
