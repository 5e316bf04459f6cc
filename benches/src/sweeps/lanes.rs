//! The contenders, and the rounds that they are swept in.

use super::Args;
use crate::baseline::Setup;
use crate::baseline::floor::Floor;
use crate::baseline::host::Backing;
use crate::baseline::mutex::OneMutex;
use crate::baseline::rwlock::ReaderWriter;
use crate::baseline::table_lock::TableLock;
use crate::baseline::tables_for;
use crate::ours::{OurSetup, Ours, Tables, Walked, WholeFault};
use crate::race::{self, Lap};
use crate::report::{Error, Progress};
use crate::sweeping::{
    Age, ClearDirty, ClearMasks, Collapse, Kind, ProtectMasks, Split, Sweep, Sweeping, Track,
    WriteProtect, Zap,
};
use crate::sys;
use std::hint::black_box;
use std::time::Instant;
use tdp_arch::{AdBits, GfnRange, Level};

/// The library's name among the contenders, and the floor's.
pub(super) const OURS: &str = "tdp";
pub(super) const FLOOR: &str = "floor";

/// Table frames that a vCPU may hold ready.
const SPARE_TABLES: u64 = 64;

/// A way in which one contender was swept.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) contender: &'static str,
    pub(super) ad_bits: AdBits,
    pub(super) sweep: Sweep,
    /// Leaves that were mapped.
    pub(super) leaves: u64,
    /// Processor nanoseconds of each round.
    pub(super) cpu_ns: Vec<u64>,
    pub(super) preemptions: Vec<u64>,
}

/// One format.
#[derive(Debug)]
pub(super) struct FormatResult {
    pub(super) format: &'static str,
    pub(super) rows: Vec<Row>,
    /// Leaves that sweeps found nothing to do for beforehand, or something afterwards.
    pub(super) missed: u64,
    pub(super) leaked: u64,
}

/// A contender with its type forgotten.
trait Seat {
    /// One sweep of memory that was just mapped, and the leaves that were not as they should be before or after.
    fn lap(&mut self, sweep: Sweep, gfns: GfnRange) -> Result<(Lap, u64), Error>;
    fn leaked(self: Box<Self>) -> u64;
}

struct Seated<C: Sweeping> {
    contender: C,
    worker: C::Worker,
    /// Whether its leaves are split and collapsed.
    resizes: bool,
    other: Vec<u64>,
}

/// Words of memory that fill the caches: 64 MiB.
const OTHER_MEMORY: usize = 8 << 20;

impl<C: Sweeping> Seated<C> {
    /// Maps all of `gfns` anew, as written pages.
    fn fill<K: Kind>(&mut self, gfns: GfnRange) -> Result<(), Error> {
        self.contender.sweep::<Zap>(gfns)?;
        self.contender.prepare::<K>()?;
        for number in gfns.start.0..gfns.end.0 {
            self.contender
                .resolve(&mut self.worker, tdp_arch::Gfn(number))
                .map_err(Into::into)?;
        }
        Ok(())
    }

    /// Has other memory in the processor's caches.
    fn evict(&mut self) {
        self.other.resize(OTHER_MEMORY, 0);
        for (word, n) in self.other.iter_mut().zip(0_u64..) {
            *word = word.wrapping_add(n);
        }
        black_box(&self.other);
    }

    fn run<K: Kind>(&mut self, gfns: GfnRange) -> Result<(Lap, u64), Error> {
        let mut missed = 0;
        // The floor's tables are neither split nor collapsed, only filled and emptied.
        let told = self.resizes || !matches!(K::SWEEP, Sweep::Split | Sweep::Collapse);
        let lap = race::undisturbed(1, |_| {
            self.fill::<K>(gfns)?;
            if K::SWEEP == Sweep::Collapse {
                self.contender.sweep::<Split>(gfns)?;
            }
            if told {
                missed += gfns.pages() - self.contender.left::<K>(gfns);
            }
            if K::SWEEP == Sweep::Split {
                // New tables are in no cache, and the floor's must not be either.
                self.evict();
            }
            let preemptions = sys::preemptions();
            let (cpu, start) = (sys::thread_time(), Instant::now());
            let swept = self.contender.sweep::<K>(gfns);
            let (cpu, wall) = (sys::thread_time() - cpu, start.elapsed());
            swept?;
            if told {
                missed += self.contender.left::<K>(gfns);
            }
            Ok(Lap {
                wall,
                cpu,
                preemptions: sys::preemptions() - preemptions,
            })
        })?;
        Ok((lap, missed))
    }
}

impl<C: Sweeping> Seat for Seated<C> {
    fn lap(&mut self, sweep: Sweep, gfns: GfnRange) -> Result<(Lap, u64), Error> {
        match sweep {
            Sweep::WriteProtect => self.run::<WriteProtect>(gfns),
            Sweep::ClearDirty => self.run::<ClearDirty>(gfns),
            Sweep::ProtectMasks => self.run::<ProtectMasks>(gfns),
            Sweep::ClearMasks => self.run::<ClearMasks>(gfns),
            Sweep::Age => self.run::<Age>(gfns),
            Sweep::Track => self.run::<Track>(gfns),
            Sweep::Zap => self.run::<Zap>(gfns),
            Sweep::Split => self.run::<Split>(gfns),
            Sweep::Collapse => self.run::<Collapse>(gfns),
        }
    }

    fn leaked(self: Box<Self>) -> u64 {
        let Self {
            contender, worker, ..
        } = *self;
        drop(worker);
        contender.leaked()
    }
}

struct Lane {
    seat: Box<dyn Seat>,
    rows: Vec<Row>,
}

impl Lane {
    fn new<C: Sweeping + 'static>(
        contender: Result<C, Error>,
        name: &'static str,
        ad_bits: AdBits,
        sweeps: &[Sweep],
        gfns: GfnRange,
    ) -> Result<Self, Error> {
        let contender = contender?;
        let worker = contender.worker()?;
        let mut seat = Box::new(Seated {
            contender,
            worker,
            resizes: name == OURS,
            other: Vec::new(),
        });
        // So that no lap is the first: every table is there, and its memory has been touched.
        seat.fill::<Zap>(gfns)?;
        let row = |&sweep| Row {
            contender: name,
            ad_bits,
            sweep,
            leaves: gfns.pages(),
            cpu_ns: Vec::new(),
            preemptions: Vec::new(),
        };
        Ok(Self {
            seat,
            rows: sweeps.iter().map(row).collect(),
        })
    }
}

/// The library, and what it is compared with.
fn lanes<F: Walked>(backing: Backing) -> Result<Vec<Lane>, Error> {
    use AdBits::{Processor, Software};
    use Sweep::{
        Age, ClearDirty, ClearMasks, Collapse, ProtectMasks, Split, Track, WriteProtect, Zap,
    };
    let gfns = backing.gfns;
    // Tables in large pages of the system's, as a kernel has its own, and everybody alike. Else what a sweep costs is what a miss
    // in the TLB costs, one a table.
    let huge = true;
    let ours = OurSetup {
        huge,
        ..our_setup(backing, 1)?
    };
    let theirs = Setup { backing, huge };
    let plain = Ours::<F, WholeFault>::with(ours, Tables::Warm, Processor, |builder| builder);
    let software = Ours::<F, WholeFault>::with(ours, Tables::Warm, Software, |builder| builder);
    let by_bit = Ours::<F, WholeFault>::with(ours, Tables::Warm, Processor, |builder| {
        builder.dirty_tracking(tdp::DirtyTracking::DirtyBit)
    });
    // Frames for tables that are retired and not free yet.
    let large = OurSetup {
        backing: Backing {
            level: Level::L2,
            ..backing
        },
        frames: 3 * ours.frames,
        ..ours
    };
    let large = Ours::<F, WholeFault>::new(large, Tables::Warm);
    let baselines = [WriteProtect, Age, Zap, ClearDirty];
    let floor = Floor::<F, 4, 1>::new(&theirs);
    let everything = [
        WriteProtect,
        Age,
        Zap,
        Track,
        ClearDirty,
        ProtectMasks,
        ClearMasks,
        Split,
        Collapse,
    ];
    Ok(vec![
        Lane::new(floor, FLOOR, Processor, &everything, gfns)?,
        Lane::new(
            plain,
            OURS,
            Processor,
            &[WriteProtect, Age, Zap, ProtectMasks],
            gfns,
        )?,
        Lane::new(software, OURS, Software, &[WriteProtect, Track, Zap], gfns)?,
        Lane::new(by_bit, OURS, Processor, &[ClearDirty, ClearMasks], gfns)?,
        Lane::new(large, OURS, Processor, &[Split, Collapse], gfns)?,
        Lane::new(
            OneMutex::<F, 4>::new(&theirs),
            "mutex",
            Processor,
            &baselines,
            gfns,
        )?,
        Lane::new(
            ReaderWriter::<F, 4>::new(&theirs),
            "rwlock",
            Processor,
            &baselines,
            gfns,
        )?,
        Lane::new(
            TableLock::<F, 4>::new(&theirs),
            "table_lock",
            Processor,
            &baselines,
            gfns,
        )?,
    ])
}

/// The library's guest and table memory for `vcpus` vCPUs.
///
/// # Errors
///
/// If so much table memory is not there.
pub(crate) fn our_setup(backing: Backing, vcpus: u16) -> Result<OurSetup, Error> {
    let frames =
        tables_for(backing.gfns, Level::L1, Level::L4) + SPARE_TABLES * (u64::from(vcpus) + 1);
    Ok(OurSetup {
        backing,
        root: Level::L4,
        frames: usize::try_from(frames).map_err(|e| Error::run("frame pool", e))?,
        huge: false,
    })
}

/// Runs all rounds of one format.
pub(super) fn run<F: Walked>(
    args: &Args,
    backing: Backing,
    progress: &Progress,
) -> Result<FormatResult, Error> {
    let mut result = FormatResult {
        format: F::NAME,
        rows: Vec::new(),
        missed: 0,
        leaked: 0,
    };
    let mut lanes = lanes::<F>(backing)?;
    for round in 1..=args.rounds {
        progress.step(format!("{}, round {round}", F::NAME));
        for lane in &mut lanes {
            for row in &mut lane.rows {
                let (lap, missed) = lane.seat.lap(row.sweep, backing.gfns)?;
                row.cpu_ns
                    .push(u64::try_from(lap.cpu.as_nanos()).unwrap_or(u64::MAX));
                row.preemptions.push(lap.preemptions);
                result.missed += missed;
            }
        }
    }
    for lane in lanes {
        result.leaked = result.leaked.saturating_add(lane.seat.leaked());
        result.rows.extend(lane.rows);
    }
    Ok(result)
}
