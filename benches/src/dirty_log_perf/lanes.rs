//! The contenders, how each keeps a log, and the phases that each goes through.

use super::Args;
use crate::baseline::Setup;
use crate::baseline::host::Backing;
use crate::baseline::mutex::OneMutex;
use crate::baseline::rwlock::ReaderWriter;
use crate::baseline::table_lock::TableLock;
use crate::confidential::conditions::splitmix;
use crate::ours::{Ours, Tables, Walked, WholeFault};
use crate::race::{self, Contender, Course, Leg, Order, Translation, join};
use crate::report::{Error, Progress};
use crate::sweeping::{Kind, SPACE, Sweeping, Touching, WriteProtect, Zap};
use crate::sweeps::our_setup;
use crate::sync::{AtomicBool, AtomicU64, Ordering, Padded};
use crate::sys;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Instant;
use tdp::{DirtyTracking, LinearBacking, Slot, SlotFlags, SlotId};
use tdp_arch::walker::{GuestAccess, WalkError, Walker};
use tdp_arch::{Access, AdBits, Gfn, GfnRange, Gpa, Level, Pfn};

/// One contender.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) format: &'static str,
    pub(super) pages: u64,
    /// Nanoseconds of each phase, round by round, by name; iterations are numbered from 1.
    pub(super) ns: BTreeMap<String, Vec<u64>>,
    /// Pages that were written and not reported, and reported and not written.
    pub(super) lost: u64,
    pub(super) extra: u64,
    #[serde(skip)]
    pub(super) leaked: u64,
}

/// A contender that keeps a log of what is written.
trait Logged: Sweeping {
    /// Switches the log on or off.
    fn log(&self, on: bool, manual: bool) -> Result<(), Error>;

    /// Puts the marks into `bitmap`, one bit a page; without `manual` it takes them, so that the next write is noticed.
    fn get(&self, bitmap: &mut [u64], manual: bool) -> Result<(), Error>;

    /// Takes the marks that `bitmap` names, so that the next write to their pages is noticed.
    fn clear(&self, bitmap: &[u64]) -> Result<(), Error>;
}

/// The library, its memory cut into slots of whole words of marks.
struct OurLog<F: Walked> {
    ours: Ours<F, WholeFault>,
    first: Gfn,
    slots: Vec<(SlotId, GfnRange)>,
}

impl<F: Walked> OurLog<F> {
    fn new(args: &Args, backing: Backing, tracking: DirtyTracking) -> Result<Self, Error> {
        let mut setup = our_setup(backing, args.vcpus)?;
        setup.backing.level = args.backing.level();
        setup.frames *= 3;
        let ours = Ours::<F, WholeFault>::with(setup, Tables::Fresh, AdBits::Processor, |b| {
            b.dirty_tracking(tracking)
        })?;
        let failed = |e: tdp::SlotError| Error::run("slots", e);
        let gfns = backing.gfns;
        let slots = ours.mmu().slots();
        slots.remove(SPACE, SlotId(0)).map_err(failed)?;
        let page = args.backing.level().pages().max(64);
        let count = u64::from(args.slots);
        let cut = |n: u64| {
            if n == count {
                gfns.end
            } else {
                Gfn(gfns.start.0 + gfns.pages() * n / count / page * page)
            }
        };
        let mut cuts = Vec::new();
        for n in 0..count {
            let part = GfnRange {
                start: cut(n),
                end: cut(n + 1),
            };
            let pfn = Pfn(backing.pfn.0 + (part.start.0 - gfns.start.0));
            let id = SlotId(n as u32);
            let slot = Slot::new(part, LinearBacking::new(pfn, args.backing.level()));
            slots.insert(slot.with_id(id)).map_err(failed)?;
            cuts.push((id, part));
        }
        Ok(Self {
            ours,
            first: gfns.start,
            slots: cuts,
        })
    }

    /// The words of a bitmap of all memory that are a slot's.
    fn words(&self, gfns: GfnRange) -> std::ops::Range<usize> {
        let word = |gfn: Gfn| (gfn.0 - self.first.0).div_ceil(64) as usize;
        word(gfns.start)..word(gfns.end)
    }
}

/// A baseline with a bitmap beside it, which whoever resolves a write marks.
struct MarkedLog<C> {
    baseline: C,
    gfns: GfnRange,
    on: AtomicBool,
    marks: Vec<AtomicU64>,
}

macro_rules! delegates {
    ($field:ident, $inner:ty) => {
        type Format = <$inner as Sweeping>::Format;

        fn sweep<K: Kind>(&self, gfns: GfnRange) -> Result<(), Error> {
            self.$field.sweep::<K>(gfns)
        }

        fn left<K: Kind>(&self, gfns: GfnRange) -> u64 {
            self.$field.left::<K>(gfns)
        }

        fn access<W: Walker>(
            &self,
            walker: &W,
            gpa: Gpa,
            access: GuestAccess,
        ) -> Result<tdp_arch::walker::Translation, WalkError<W::Fault>> {
            self.$field.access(walker, gpa, access)
        }
    };
}

macro_rules! contends {
    ($field:ident, $inner:ty) => {
        type Worker = <$inner as Contender>::Worker;
        type Failure = <$inner as Contender>::Failure;

        fn worker(&self) -> Result<Self::Worker, Error> {
            self.$field.worker()
        }

        fn resolve(&self, worker: &mut Self::Worker, gfn: Gfn) -> Result<(), Self::Failure> {
            self.fault(worker, gfn, Access::Write)
        }

        fn reset(&mut self) -> Result<(), Error> {
            self.$field.reset()
        }

        fn translate(&self, gfn: Gfn) -> Option<Translation> {
            self.$field.translate(gfn)
        }

        fn leaked(self) -> u64 {
            self.$field.leaked()
        }
    };
}

impl<F: Walked> Contender for OurLog<F> {
    contends!(ours, Ours<F, WholeFault>);
}

impl<F: Walked> Sweeping for OurLog<F> {
    delegates!(ours, Ours<F, WholeFault>);

    fn fault(
        &self,
        worker: &mut Self::Worker,
        gfn: Gfn,
        access: Access,
    ) -> Result<(), Self::Failure> {
        self.ours.fault(worker, gfn, access)
    }
}

impl<C: Sweeping> Contender for MarkedLog<C> {
    contends!(baseline, C);
}

impl<C: Sweeping> Sweeping for MarkedLog<C> {
    delegates!(baseline, C);

    fn fault(
        &self,
        worker: &mut Self::Worker,
        gfn: Gfn,
        access: Access,
    ) -> Result<(), Self::Failure> {
        self.baseline.fault(worker, gfn, access)?;
        // The baselines make every leaf writable, so a read that faults counts as a write: in their favour.
        if self.on.load(Ordering::Relaxed) && access.is_write() {
            let page = gfn.0 - self.gfns.start.0;
            self.marks[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::AcqRel);
        }
        Ok(())
    }
}

impl<F: Walked> Logged for OurLog<F> {
    fn log(&self, on: bool, manual: bool) -> Result<(), Error> {
        let flags = match (on, manual) {
            (false, _) => SlotFlags::empty(),
            (true, false) => SlotFlags::LOG_DIRTY,
            (true, true) => SlotFlags::LOG_DIRTY | SlotFlags::LOG_MANUAL,
        };
        for &(id, _) in &self.slots {
            let slots = self.ours.mmu().slots();
            slots
                .set_flags(SPACE, id, flags)
                .map_err(|e| Error::run("slots", e))?;
        }
        Ok(())
    }

    fn get(&self, bitmap: &mut [u64], _manual: bool) -> Result<(), Error> {
        for &(id, gfns) in &self.slots {
            let log = self.ours.mmu().dirty_log(SPACE, id);
            let log = log.map_err(|e| Error::run("dirty log", e))?;
            let marks = &mut bitmap[self.words(gfns)];
            let _ = log
                .collect(marks)
                .map_err(|e| Error::run("dirty log", e))?
                .flush();
        }
        Ok(())
    }

    fn clear(&self, bitmap: &[u64]) -> Result<(), Error> {
        for &(id, gfns) in &self.slots {
            let log = self.ours.mmu().dirty_log(SPACE, id);
            let log = log.map_err(|e| Error::run("dirty log", e))?;
            let marks = &bitmap[self.words(gfns)];
            let _ = log
                .clear(0, marks)
                .map_err(|e| Error::run("dirty log", e))?
                .flush();
        }
        Ok(())
    }
}

impl<C: Sweeping> Logged for MarkedLog<C> {
    fn log(&self, on: bool, _manual: bool) -> Result<(), Error> {
        self.on.store(on, Ordering::SeqCst);
        if on {
            self.baseline.sweep::<WriteProtect>(self.gfns)?;
        }
        Ok(())
    }

    fn get(&self, bitmap: &mut [u64], manual: bool) -> Result<(), Error> {
        for (word, marks) in bitmap.iter_mut().zip(&self.marks) {
            *word = marks.load(Ordering::Acquire);
        }
        if manual { Ok(()) } else { self.clear(bitmap) }
    }

    fn clear(&self, bitmap: &[u64]) -> Result<(), Error> {
        for (word, marks) in bitmap.iter().zip(&self.marks) {
            marks.fetch_and(!word, Ordering::AcqRel);
        }
        // One sweep for each table of which a page is named.
        for (table, words) in (0_u64..).zip(bitmap.chunks(8)) {
            if words.iter().any(|&word| word != 0) {
                let start = Gfn(self.gfns.start.0 + table * 512);
                let end = Gfn((start.0 + 512).min(self.gfns.end.0));
                self.baseline
                    .sweep::<WriteProtect>(GfnRange { start, end })?;
            }
        }
        Ok(())
    }
}

trait Seat {
    fn round(&mut self, plan: &Plan) -> Result<(), Error>;
    fn finish(self: Box<Self>) -> Row;
}

/// What every contender does.
struct Plan {
    gfns: GfnRange,
    iterations: u16,
    manual: bool,
    run_while_disabling: bool,
    everything: Course,
    written: Course,
    read: Course,
    /// What is written, one bit a page.
    expected: Vec<u64>,
}

struct Seated<C: Sweeping> {
    contender: C,
    walker: <C::Format as Walked>::Walker,
    workers: Vec<Padded<C::Worker>>,
    row: Row,
}

fn elapsed(begin: Instant) -> u64 {
    u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

impl<C: Logged> Seated<C> {
    fn accesses(&mut self, course: &Course, access: Access) -> Result<u64, Error> {
        let touching = Touching {
            contender: &self.contender,
            walker: &self.walker,
            access,
        };
        let lap = race::lap(&touching, &mut self.workers, course)?;
        Ok(u64::try_from(lap.wall.as_nanos()).unwrap_or(u64::MAX))
    }

    fn dirty(&mut self, plan: &Plan) -> Result<u64, Error> {
        let written = self.accesses(&plan.written, Access::Write)?;
        Ok(written + self.accesses(&plan.read, Access::Read)?)
    }

    fn phase(&mut self, phase: impl Into<String>, ns: u64) {
        self.row.ns.entry(phase.into()).or_default().push(ns);
    }

    fn switch_off(&mut self, plan: &Plan) -> Result<u64, Error> {
        if !plan.run_while_disabling {
            let begin = Instant::now();
            self.contender.log(false, plan.manual)?;
            return Ok(elapsed(begin));
        }
        let touching = Touching {
            contender: &self.contender,
            walker: &self.walker,
            access: Access::Write,
        };
        let workers = &mut self.workers;
        std::thread::scope(|scope| {
            let vcpus = scope.spawn(|| race::lap(&touching, workers, &plan.everything));
            let begin = Instant::now();
            let outcome = touching.contender.log(false, plan.manual);
            let ns = elapsed(begin);
            join(vcpus)?;
            outcome?;
            Ok(ns)
        })
    }
}

impl<C: Logged> Seat for Seated<C> {
    fn round(&mut self, plan: &Plan) -> Result<(), Error> {
        self.contender.sweep::<Zap>(plan.gfns)?;
        let ns = self.accesses(&plan.everything, Access::Write)?;
        self.phase("populate", ns);
        let begin = Instant::now();
        self.contender.log(true, plan.manual)?;
        self.phase("enable", elapsed(begin));
        let mut bitmap = vec![0; plan.expected.len()];
        for iteration in 1..=plan.iterations {
            let ns = self.dirty(plan)?;
            self.phase(format!("dirty {iteration}"), ns);
            let begin = Instant::now();
            self.contender.get(&mut bitmap, plan.manual)?;
            self.phase(format!("get {iteration}"), elapsed(begin));
            for (found, expected) in bitmap.iter().zip(&plan.expected) {
                self.row.lost += u64::from((expected & !found).count_ones());
                self.row.extra += u64::from((found & !expected).count_ones());
            }
            if plan.manual {
                let begin = Instant::now();
                self.contender.clear(&bitmap)?;
                self.phase(format!("clear {iteration}"), elapsed(begin));
            }
        }
        let ns = self.switch_off(plan)?;
        self.phase("disable", ns);
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

fn seat<C: Logged + 'static>(
    contender: Result<C, Error>,
    name: &'static str,
    args: &Args,
    gfns: GfnRange,
) -> Result<Box<dyn Seat>, Error> {
    let contender = contender?;
    let workers = (0..args.vcpus)
        .map(|_| contender.worker().map(Padded))
        .collect::<Result<_, _>>()?;
    let walker = C::Format::walker(Level::L4, AdBits::Processor)
        .map_err(|e| Error::run("page walker", e))?;
    Ok(Box::new(Seated {
        contender,
        walker,
        workers,
        row: Row {
            name,
            format: <C::Format as tdp_arch::Format>::NAME,
            pages: gfns.pages(),
            ns: BTreeMap::new(),
            lost: 0,
            extra: 0,
            leaked: 0,
        },
    }))
}

fn marked<C: Sweeping>(baseline: Result<C, Error>, gfns: GfnRange) -> Result<MarkedLog<C>, Error> {
    let words = gfns.pages().div_ceil(64);
    Ok(MarkedLog {
        baseline: baseline?,
        gfns,
        on: AtomicBool::new(false),
        marks: (0..words).map(|_| AtomicU64::new(0)).collect(),
    })
}

/// Runs all rounds of one format.
pub(super) fn run<F: Walked>(
    args: &Args,
    backing: Backing,
    progress: &Progress,
) -> Result<Vec<Row>, Error> {
    let gfns = backing.gfns;
    let theirs = Setup {
        backing,
        huge: false,
    };
    let by = |tracking| OurLog::<F>::new(args, backing, tracking);
    let mut seats = vec![
        seat(by(DirtyTracking::WriteProtect), "tdp", args, gfns)?,
        seat(by(DirtyTracking::DirtyBit), "tdp_dirty_bit", args, gfns)?,
        seat(
            marked(ReaderWriter::<F, 4>::new(&theirs), gfns),
            "rwlock",
            args,
            gfns,
        )?,
        seat(
            marked(OneMutex::<F, 4>::new(&theirs), gfns),
            "mutex",
            args,
            gfns,
        )?,
        seat(
            marked(TableLock::<F, 4>::new(&theirs), gfns),
            "table_lock",
            args,
            gfns,
        )?,
    ];
    let plan = plan(args, gfns);
    for round in 1..=args.rounds {
        progress.step(format!("{}, round {round}", F::NAME));
        for seat in &mut seats {
            seat.round(&plan)?;
        }
    }
    Ok(seats.into_iter().map(Seat::finish).collect())
}

fn plan(args: &Args, gfns: GfnRange) -> Plan {
    let (vcpus, pages) = (u64::from(args.vcpus), gfns.pages());
    let mut cpus = sys::allowed();
    cpus.truncate(usize::from(args.vcpus));
    if cpus.len() < usize::from(args.vcpus) {
        cpus.clear();
    }
    let is_written = |page: u64| splitmix(page).1 % 100 < u64::from(args.writes);
    let mut expected = vec![0; pages.div_ceil(64) as usize];
    (0..pages)
        .filter(|&page| is_written(page))
        .for_each(|page| expected[(page / 64) as usize] |= 1 << (page % 64));
    let course = |which: &dyn Fn(u64) -> bool| Course {
        base: gfns.start,
        page: Level::L1,
        orders: (0..vcpus)
            .map(|vcpu| {
                let mine = pages * vcpu / vcpus..pages * (vcpu + 1) / vcpus;
                let list = mine.filter(|&page| which(page)).map(|page| page as u32);
                Order(vec![Leg::List(list.collect())])
            })
            .collect(),
        cpus: cpus.clone(),
    };
    Plan {
        gfns,
        iterations: args.iterations,
        manual: !args.no_manual_protect,
        run_while_disabling: args.run_while_disabling,
        everything: course(&|_| true),
        written: course(&is_written),
        read: course(&|page| !is_written(page)),
        expected,
    }
}
