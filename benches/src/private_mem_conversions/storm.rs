//! Conversions and accesses, all at once.

use super::Args;
use crate::confidential::backend::{Tdx, TdxOptions};
use crate::confidential::conditions::{Conditions, Met, splitmix};
use crate::confidential::faulting::Tries;
use crate::confidential::guest::{Calls, Checks, Guest, SPACE};
use crate::confidential::layout::Layout;
use crate::confidential::running::{Access, RunningVcpu};
use crate::race::join;
use crate::report::{Error, Progress};
use crate::sync::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tdp::protected::{Inspected, ProtectedTable};
use tdp::{ConvertError, EntryPlace, Gfn, Leaf, Level, Visibility};

/// Time between two quiet moments.
const SLICE: Duration = Duration::from_millis(500);
/// Accesses of a vCPU after which it lets others have the processor.
const BURST: u64 = 32;

pub(super) fn slices(args: &Args) -> u64 {
    args.duration().div_duration_f64(SLICE).ceil().max(1.0) as u64
}

/// What vCPUs did.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub(super) struct Accesses {
    pub(super) made: u64,
    /// Those for which a page had to be mapped or accepted.
    pub(super) faulted: u64,
    /// Those of which the frame had become the other half's in the meantime.
    pub(super) other_half: u64,
}

/// What converting threads did.
#[derive(Clone, Debug, Default)]
pub(super) struct Conversions {
    pub(super) to_private: u64,
    pub(super) to_shared: u64,
    /// Refused by the module.
    pub(super) failed: u64,
    /// Nanoseconds of each that was done.
    pub(super) ns: Vec<u64>,
}

impl Conversions {
    pub(super) fn done(&self) -> u64 {
        self.to_private + self.to_shared
    }
}

#[derive(Debug)]
pub(super) struct Storm {
    pub(super) wall: Duration,
    pub(super) accesses: Accesses,
    pub(super) conversions: Conversions,
    pub(super) calls: Calls,
    pub(super) met: Met,
    pub(super) frozen_waits: u64,
    pub(super) carried: u64,
    pub(super) carrier_waits: u64,
    pub(super) ticket_waits: u64,
    pub(super) splits: u64,
    pub(super) retried: u64,
    pub(super) refused: u64,
    /// Frames that were looked at while everything went on.
    pub(super) looked_at: u64,
    /// Frames found mapped by both halves, then or at a quiet moment.
    pub(super) double_mapped: u64,
    /// Frames found mapped by a half that they are not of, at a quiet moment.
    pub(super) misplaced: u64,
    /// Sweeps of the shared half meanwhile.
    pub(super) sweeps: u64,
    pub(super) checks: Checks,
}

/// What threads share.
struct Field<'g> {
    guest: &'g Guest<Tdx>,
    chunk: Level,
    /// Of each chunk, conversions begun and ended: odd while one is going on.
    turns: Vec<AtomicU64>,
    over: AtomicBool,
    looked_at: AtomicU64,
    double_mapped: AtomicU64,
    sweeps: AtomicU64,
}

pub(super) fn run(args: &Args, layout: Layout, progress: &Progress) -> Result<Storm, Error> {
    let conditions = Conditions::new(args.module.weather());
    let guest = Guest::<Tdx>::new(
        layout,
        Visibility::Private,
        TdxOptions::default(),
        conditions,
    )?;
    let tries = Tries::default();
    let chunk = args.chunk.level();
    let field = Field {
        guest: &guest,
        chunk,
        turns: (0..layout.gfns.pages() / chunk.pages())
            .map(|_| AtomicU64::new(0))
            .collect(),
        over: AtomicBool::new(false),
        looked_at: AtomicU64::new(0),
        double_mapped: AtomicU64::new(0),
        sweeps: AtomicU64::new(0),
    };
    let mut vcpus = (0..args.vcpus)
        .map(|_| RunningVcpu::new(&guest, &tries))
        .collect::<Result<Vec<_>, _>>()?;
    let (mut checks, mut misplaced) = (Checks::default(), 0);
    let (mut accesses, mut conversions) = (Accesses::default(), Conversions::default());
    let mut wall = Duration::ZERO;
    let mut rng = args.module.seed;
    let slices = slices(args);
    for slice in 0..slices {
        progress.step(format!("conversions, slice {} of {slices}", slice + 1));
        guest.conditions().raise();
        let time = args.duration() / u32::try_from(slices).unwrap_or(u32::MAX);
        let begin = Instant::now();
        field.slice(
            args,
            &mut vcpus,
            time,
            &mut rng,
            &mut accesses,
            &mut conversions,
        )?;
        wall += begin.elapsed();
        guest.conditions().calm();
        guest.audit(&mut checks);
        let quiet = quiet_look(&guest);
        field.double_mapped.fetch_add(quiet.0, Ordering::Relaxed);
        misplaced += quiet.1;
    }
    drop(vcpus);
    let stats = guest.mmu().stats();
    let met = guest.conditions().met();
    let (looked_at, double_mapped) = (
        field.looked_at.load(Ordering::Relaxed),
        field.double_mapped.load(Ordering::Relaxed),
    );
    let sweeps = field.sweeps.load(Ordering::Relaxed);
    checks.max_reentries = tries.max_reentries();
    let storm = Storm {
        wall,
        accesses,
        conversions,
        calls: Calls::between(&tdp::ProtectedStats::default(), &stats.protected),
        met,
        frozen_waits: stats.protected.frozen_waits,
        carried: stats.protected.carried,
        carrier_waits: stats.protected.carrier_waits,
        ticket_waits: stats.protected.ticket_waits,
        splits: stats.splits,
        retried: tries.retried(),
        refused: tries.refused(),
        looked_at,
        double_mapped,
        misplaced,
        sweeps,
        checks,
    };
    let mut checks = storm.checks.clone();
    guest.finish(&mut checks)?;
    Ok(Storm { checks, ..storm })
}

/// Frames mapped by both halves, and by the half that they are not of. Nobody is at work.
fn quiet_look(guest: &Guest<Tdx>) -> (u64, u64) {
    let (mmu, gfns) = (guest.mmu(), guest.layout().gfns);
    let mut mapped = vec![0_u8; gfns.pages() as usize];
    let mut note = |leaf: Leaf, half: u8| {
        let first = leaf.gfn.0.saturating_sub(gfns.start.0) as usize;
        mapped
            .iter_mut()
            .skip(first)
            .take(leaf.level.pages() as usize)
            .for_each(|frame| *frame |= half);
    };
    mmu.visit_leaves(SPACE, gfns, |leaf| note(leaf, 1));
    mmu.visit_private_leaves(SPACE, gfns, |leaf| note(leaf, 2));
    let (mut double, mut misplaced) = (0, 0);
    for (n, &halves) in mapped.iter().enumerate() {
        let own = match mmu.visibility(Gfn(gfns.start.0 + n as u64)) {
            Some(Visibility::Private) => 2,
            _ => 1,
        };
        double += u64::from(halves == 3);
        misplaced += u64::from(halves & !own != 0);
    }
    (double, misplaced)
}

impl Field<'_> {
    /// Everybody at work for `time`.
    fn slice(
        &self,
        args: &Args,
        vcpus: &mut [RunningVcpu<'_>],
        time: Duration,
        rng: &mut u64,
        accesses: &mut Accesses,
        conversions: &mut Conversions,
    ) -> Result<(), Error> {
        self.over.store(false, Ordering::Relaxed);
        let mut seed = || {
            let (next, drawn) = splitmix(*rng);
            *rng = next;
            drawn
        };
        std::thread::scope(|scope| {
            let guests: Vec<_> = vcpus
                .iter_mut()
                .map(|vcpu| {
                    let seed = seed();
                    scope.spawn(move || self.until_over(|| self.use_memory(vcpu, seed)))
                })
                .collect();
            let converters: Vec<_> = (0..args.threads)
                .map(|_| {
                    let seed = seed();
                    scope.spawn(move || self.until_over(|| self.convert(seed)))
                })
                .collect();
            let sweeper = args.sweeps.then(|| {
                let seed = seed();
                scope.spawn(move || self.until_over(|| self.sweep(seed)))
            });
            let seed = seed();
            let looker = scope.spawn(move || self.until_over(|| self.look(seed)));
            let end = Instant::now() + time;
            // In steps, so that a thread that failed ends it for all.
            while Instant::now() < end && !self.over.load(Ordering::Relaxed) {
                std::thread::sleep((end - Instant::now().min(end)).min(Duration::from_millis(10)));
            }
            self.over.store(true, Ordering::Relaxed);
            let mut outcome = join(looker);
            if let Some(Err(error)) = sweeper.map(join) {
                outcome = Err(error);
            }
            for guest in guests {
                match join(guest) {
                    Ok(made) => {
                        accesses.made += made.made;
                        accesses.faulted += made.faulted;
                        accesses.other_half += made.other_half;
                    }
                    Err(error) => outcome = Err(error),
                }
            }
            for converter in converters {
                match join(converter) {
                    Ok(mut made) => {
                        conversions.to_private += made.to_private;
                        conversions.to_shared += made.to_shared;
                        conversions.failed += made.failed;
                        conversions.ns.append(&mut made.ns);
                    }
                    Err(error) => outcome = Err(error),
                }
            }
            outcome
        })
    }

    /// Has a thread's end, if it is a failure, be everybody's.
    fn until_over<T>(&self, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        let outcome = work();
        if outcome.is_err() {
            self.over.store(true, Ordering::Relaxed);
        }
        outcome
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn any_frame(&self, seed: &mut u64) -> Gfn {
        let gfns = self.guest.layout().gfns;
        let (next, drawn) = splitmix(*seed);
        *seed = next;
        Gfn(gfns.start.0 + drawn % gfns.pages())
    }

    fn visibility(&self, gfn: Gfn) -> Visibility {
        self.guest
            .mmu()
            .visibility(gfn)
            .unwrap_or(Visibility::Shared)
    }

    /// A vCPU writes to memory here and there, as what it is.
    fn use_memory(&self, vcpu: &mut RunningVcpu<'_>, mut seed: u64) -> Result<Accesses, Error> {
        let mut accesses = Accesses::default();
        while !self.is_over() {
            let gfn = self.any_frame(&mut seed);
            match vcpu.access(gfn, self.visibility(gfn))? {
                Access::Reached { faulted } => accesses.faulted += u64::from(faulted),
                Access::OtherHalf => accesses.other_half += 1,
            }
            accesses.made += 1;
            if accesses.made.is_multiple_of(BURST) {
                std::thread::yield_now();
            }
        }
        vcpu.leave();
        Ok(accesses)
    }

    /// Converts one chunk after the other, each to what it is not.
    fn convert(&self, mut seed: u64) -> Result<Conversions, Error> {
        let mut made = Conversions::default();
        while !self.is_over() {
            let start = self.chunk.align_down(self.any_frame(&mut seed));
            let turn = &self.turns[self.number(start)];
            let found = turn.load(Ordering::Relaxed);
            // SeqCst, here and below: pairs with the looker's loads, whose looks lie between them. Another thread's chunk is
            // left to it.
            let is_free = found.is_multiple_of(2)
                && turn
                    .compare_exchange(found, found + 1, Ordering::SeqCst, Ordering::Relaxed)
                    .is_ok();
            if !is_free {
                continue;
            }
            let to = match self.visibility(start) {
                Visibility::Private => Visibility::Shared,
                Visibility::Shared => Visibility::Private,
            };
            let begin = Instant::now();
            let outcome = self.guest.mmu().convert(SPACE, self.chunk.range(start), to);
            let ns = begin.elapsed().as_nanos() as u64;
            turn.fetch_add(1, Ordering::SeqCst);
            match outcome {
                Ok(_) => {
                    made.ns.push(ns);
                    match to {
                        Visibility::Private => made.to_private += 1,
                        Visibility::Shared => made.to_shared += 1,
                    }
                }
                Err(ConvertError::Removal(_)) if self.guest.conditions().injects() => {
                    made.failed += 1;
                }
                Err(error) => return Err(Error::run("conversion", error)),
            }
        }
        Ok(made)
    }

    /// Does to the shared half whatever can be done to it, a block here and there.
    fn sweep(&self, mut seed: u64) -> Result<(), Error> {
        let mmu = self.guest.mmu();
        while !self.is_over() {
            let block = Level::L2.range(self.any_frame(&mut seed));
            let (next, drawn) = splitmix(seed);
            seed = next;
            match drawn % 8 {
                0 => drop(mmu.zap(SPACE, block).flush()),
                1 => drop(mmu.zap_leaves(SPACE, block).flush()),
                2 => drop(mmu.write_protect(SPACE, block, Level::L1).flush()),
                3 => drop(mmu.age(SPACE, block)),
                4 => drop(mmu.test_age(SPACE, block)),
                // Without a frame for a table the rest stays as it is.
                5 => drop(mmu.split(SPACE, block, Level::L1)),
                6 => drop(mmu.collapse(SPACE, block).flush()),
                _ => {
                    let invalidation = mmu.invalidate_begin(SPACE, block);
                    let flushed = invalidation.zap().flush();
                    invalidation.end(flushed);
                }
            }
            self.sweeps.fetch_add(1, Ordering::Relaxed);
            std::thread::yield_now();
        }
        Ok(())
    }

    fn number(&self, gfn: Gfn) -> usize {
        ((gfn.0 - self.guest.layout().gfns.start.0) / self.chunk.pages()) as usize
    }

    /// Looks at one frame after the other: is it mapped by both halves?
    ///
    /// Looks at the shared half, at the private one, and at the shared one again. Within one turn of its chunk a half that
    /// lets go of a frame does not get it back, so a frame that was there each time was there all the time.
    fn look(&self, mut seed: u64) -> Result<(), Error> {
        let mut looked_at = 0;
        while !self.is_over() {
            let gfn = self.any_frame(&mut seed);
            let turn = &self.turns[self.number(gfn)];
            let before = turn.load(Ordering::SeqCst);
            let shared = || self.guest.mmu().translate(SPACE, gfn).is_some();
            let double = shared() && self.is_mapped_private(gfn) && shared();
            if turn.load(Ordering::SeqCst) == before {
                looked_at += 1;
                self.double_mapped
                    .fetch_add(u64::from(double), Ordering::Relaxed);
            }
            if looked_at % BURST == 0 {
                std::thread::yield_now();
            }
        }
        self.looked_at.fetch_add(looked_at, Ordering::Relaxed);
        Ok(())
    }

    /// By the library's books or by the module's.
    fn is_mapped_private(&self, gfn: Gfn) -> bool {
        let mut found = false;
        let mmu = self.guest.mmu();
        mmu.visit_private_leaves(SPACE, Level::L1.range(gfn), |_| found = true);
        found
            || [Level::L1, Level::L2].into_iter().any(|level| {
                let place = EntryPlace {
                    as_id: SPACE,
                    gfn: level.align_down(gfn),
                    level,
                };
                matches!(self.guest.backend().inspect(place), Inspected::Leaf { .. })
            })
    }
}
