//! MMU stress: every operation of the library at once, under software vCPUs that notice what is wrong.
//!
//! First the phases of KVM's mmu_stress_test, each timed: all vCPUs write to all of memory (`run1`), everything is made
//! obsolete (`reset`), they write again (`run2`), memory becomes read-only and is read (`ro`), writable again and is written
//! (`rw`). Then, for as long as is asked, vCPUs access memory at random, while the host moves pages, zaps, write-protects, ages,
//! splits, collapses, recovers and switches non-executable large pages, makes roots obsolete, takes a slot away and brings it
//! back, and copies what is written by the dirty log. A confidential guest is put through the same with conversions
//! ([`crate::private_mem_conversions`]). At last the obsolescence of the root of a large sparse
//! guest is timed.
//!
//! * `homes` is guest memory that knows whose it is; `world` what threads share;
//! * `guest` has the vCPUs, `hands` the host's threads;
//! * `sparse` the large guest, `findings` the JSON.

mod findings;
mod guest;
mod hands;
pub(crate) mod homes;
mod sparse;
mod world;

use crate::formats::FormatChoice;
use crate::ours::{PHYSICAL_BITS, POOL_BASE, Walked};
use crate::private_mem_conversions;
use crate::race::join;
use crate::report::{Error, Output};
use crate::size;
use findings::{Phases, Shared};
use guest::{Counts, Guest};
use hands::Hand;
use homes::{BLOCK, Homes};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tdp::{
    Access, DirtyTracking, Gfn, GfnRange, MmapPool, Mmu, PoolConfig, Slot, SlotFlags, TlbTracker,
};
use tdp_arch::{Ept, Format, Level, Npt, PAGE_SIZE};
use world::{COMING, Flaw, LOGGED, Random, SPACE, StressHost, World};

const ABOUT: &str = "\
Runs every operation of the library at once under software vCPUs, whose TLBs keep what is not flushed, and who look at whose
memory they reach. Lines follow KVM's mmu_stress_test: run1, reset, run2, ro, rw; the stress comes after them.

Checked, and each has to be 0: 'stale_translations', accesses that reached a frame of somebody else, or a slot that is gone;
'lost_dirty', pages of which a copy made by the dirty log alone lacks a write; 'mismatches', pages, counters and sums of
writes that are not as they should be at rest; 'leaked_frames'.";

const EXAMPLES: &str = "\
Examples:
  tdp-bench mmu-stress
  tdp-bench mmu-stress --seconds 60 --json -
  tdp-bench mmu-stress -f npt -v 8 -b 16M";

/// Every operation at once, under vCPUs that notice what is wrong
#[derive(Debug, clap::Args)]
#[command(long_about = ABOUT, after_help = EXAMPLES)]
pub struct Args {
    /// vCPUs, a thread each
    #[arg(short = 'v', long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    vcpus: u16,

    /// Guest memory: bytes, or with K, M, G or T
    #[arg(short = 'b', long, value_name = "SIZE", default_value = "32M", value_parser = size::parse)]
    bytes: u64,

    /// How long; a confidential guest takes its half of it
    #[arg(long, value_name = "N", default_value_t = 10.0, value_parser = private_mem_conversions::seconds)]
    seconds: f64,

    /// Entry format of the guest that is not confidential
    #[arg(short = 'f', long, value_enum, default_value_t = FormatChoice::Both)]
    format: FormatChoice,

    /// Seed of whatever is random
    #[arg(short = 'r', long, default_value_t = 1)]
    seed: u64,

    /// Guest-physical size of the sparse guest whose root is made obsolete
    #[arg(long, value_name = "SIZE", default_value = "1T", value_parser = size::parse)]
    sparse: u64,

    /// Neglects a duty, to see that the checks notice
    #[arg(long, value_enum, hide = true)]
    flaw: Option<Flaw>,
}

/// Runs the scenario.
///
/// # Errors
///
/// [`Error::Usage`] for arguments that do not go together, the library's own errors if a run fails, and [`Error::Check`] if
/// anything was found to be wrong.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    let unit = 2 * Level::L2.bytes();
    if !args.bytes.is_multiple_of(unit) || args.bytes > 1 << 34 {
        return Err(Error::Usage(format!(
            "-b {}: is not a multiple of {} up to 16G",
            size::show(args.bytes),
            size::show(unit)
        )));
    }
    let sparse = sparse::check(args.sparse)?;
    let formats =
        u32::from(args.format.includes::<Ept>()) + u32::from(args.format.includes::<Npt>());
    // Half of the time is the confidential guest's.
    let half = Duration::from_secs_f64(args.seconds / 2.0);
    let progress = output.progress(u64::from(formats) + 2);
    let mut shared = Vec::new();
    if args.format.includes::<Ept>() {
        progress.step(Ept::NAME);
        shared.push(stress::<Ept>(
            args,
            half / formats,
            DirtyTracking::DirtyBit,
        )?);
    }
    if args.format.includes::<Npt>() {
        progress.step(Npt::NAME);
        shared.push(stress::<Npt>(
            args,
            half / formats,
            DirtyTracking::WriteProtect,
        )?);
    }
    progress.step("confidential");
    let private = private_mem_conversions::under_sweeps(args.vcpus, half, args.seed)?;
    progress.step("sparse");
    let sparse = sparse::run(sparse)?;
    drop(progress);
    let body = findings::Body::new(args, shared, private, sparse);
    body.tell(output);
    output.finish("mmu-stress", &body)?;
    body.verdict()
}

/// The guest that is not confidential.
fn stress<F: Walked>(
    args: &Args,
    length: Duration,
    tracking: DirtyTracking,
) -> Result<Shared, Error> {
    let gfns = GfnRange::new(Gfn(1 << 18), args.bytes / PAGE_SIZE)
        .ok_or_else(|| Error::Usage("-b: too much".to_owned()))?;
    let blocks = gfns.pages() / BLOCK as u64;
    let logged = GfnRange {
        start: gfns.start,
        end: Gfn(gfns.start.0 + blocks / 2 * BLOCK as u64),
    };
    let left = Arc::new(OnceLock::new());
    let mmu = mmu::<F>(args, gfns, logged, tracking, left.clone())?;
    let mut world = World::new(mmu, gfns, logged, u64::from(args.vcpus));
    let phases = phases(&world, args)?;
    world.begin(length);
    let (counts, done) = std::thread::scope(|scope| {
        let world = &world;
        let guests = (0..u64::from(args.vcpus))
            .map(|number| {
                let guest = Guest::new(world, args.seed.wrapping_add(number << 8))?;
                Ok(scope.spawn(move || guest.run()))
            })
            .collect::<Result<Vec<_>, Error>>();
        let hands: Vec<_> = (0..2)
            .map(|number| {
                let hand = Hand {
                    world,
                    random: Random(args.seed.wrapping_add(0x1000 + number)),
                    is_first: number == 0,
                };
                scope.spawn(move || hand.run())
            })
            .collect();
        let copier =
            scope.spawn(move || hands::copy(world, Random(args.seed.wrapping_add(0x2000))));
        if guests.is_err() {
            world.finish();
        }
        let mut counts = Counts::default();
        let mut done = join(copier)?;
        for guest in guests? {
            counts.add(&join(guest));
        }
        for hand in hands {
            for (name, times) in join(hand)? {
                *done.entry(name).or_default() += times;
            }
        }
        Ok::<_, Error>((counts, done))
    })?;
    let writes = counts.writes + phases.writes;
    let checked = at_rest(&world, writes);
    let stats = world.mmu.stats();
    let verdict = std::mem::take(&mut world.verdict);
    drop(world);
    // A host that still lives after its MMU has leaked as a whole.
    let frames = left.get().map_or(u64::MAX, |&frames| frames as u64);
    Ok(Shared::new::<F>(
        tracking, phases, counts, done, checked, &verdict, &stats, frames,
    ))
}

fn mmu<F: Walked>(
    args: &Args,
    gfns: GfnRange,
    logged: GfnRange,
    tracking: DirtyTracking,
    left: Arc<OnceLock<usize>>,
) -> Result<Mmu<F, StressHost>, Error> {
    let failed = |e: Box<dyn std::error::Error + Send + Sync>| Error::run("tdp", e);
    let tables = crate::baseline::tables_for(gfns, Level::L1, Level::L4);
    let frames = MmapPool::new(PoolConfig {
        frames: 4 * tables as usize + 64 * (usize::from(args.vcpus) + 2),
        base: POOL_BASE,
        huge_pages: false,
    })
    .map_err(|e| failed(e.into()))?;
    let host = StressHost {
        frames,
        tlb: TlbTracker::new(),
        homes: Arc::new(Homes::new(gfns)),
        flaw: args.flaw,
        left,
    };
    let mmu = Mmu::<F, _>::builder(host)
        .physical_bits(PHYSICAL_BITS)
        .dirty_tracking(tracking)
        .nx_huge_pages(true)
        .garbage_bound(64)
        .build()
        .map_err(|e| failed(e.into()))?;
    let coming = GfnRange {
        start: logged.end,
        end: gfns.end,
    };
    for (id, gfns) in [(LOGGED, logged), (COMING, coming)] {
        mmu.slots()
            .insert(Slot::new(gfns, ()).with_id(id))
            .map_err(|e| failed(e.into()))?;
    }
    Ok(mmu)
}

/// The phases of KVM's test, in order.
fn phases<F: Walked>(world: &World<F>, args: &Args) -> Result<Phases, Error> {
    let mut guests = (0..u64::from(args.vcpus))
        .map(|number| Guest::new(world, number))
        .collect::<Result<Vec<_>, _>>()?;
    let mut all = |access: Access| {
        let begin = Instant::now();
        let outcome = std::thread::scope(|scope| {
            let threads: Vec<_> = guests
                .iter_mut()
                .map(|guest| scope.spawn(|| guest.touch_all(world.gfns, access)))
                .collect();
            threads.into_iter().try_for_each(join)
        });
        outcome
            .map(|()| begin.elapsed())
            .map_err(|gfn| Error::Check(format!("{access:?} at {gfn} never got through")))
    };
    let flags = |flags: SlotFlags| {
        let set = |id| world.mmu.slots().set_flags(SPACE, id, flags);
        set(LOGGED)
            .and_then(|()| set(COMING))
            .map_err(|e| Error::run("slots", e))
    };
    let run1 = all(Access::Write)?;
    let begin = Instant::now();
    let mut teardown = world.mmu.invalidate_roots();
    teardown.reload();
    teardown.finish();
    let reset = begin.elapsed();
    let run2 = all(Access::Write)?;
    let begin = Instant::now();
    flags(SlotFlags::READ_ONLY)?;
    all(Access::Read)?;
    let ro = begin.elapsed();
    let begin = Instant::now();
    flags(SlotFlags::empty())?;
    all(Access::Write)?;
    let rw = begin.elapsed();
    let writes = guests.iter().map(|guest| guest.counts.writes).sum();
    Ok(Phases::new([run1, reset, run2, ro, rw], writes))
}

/// Nobody works any more: the tables must lead to their owners, no write may be missing, and the books must be right.
/// Returns pages that were looked at.
fn at_rest<F: Walked>(world: &World<F>, writes: u64) -> u64 {
    let mmu = &world.mmu;
    mmu.synchronize();
    let (mut wrong, mut checked) = (0, 0);
    mmu.visit_leaves(SPACE, world.gfns, |leaf| {
        for index in 0..leaf.level.pages() {
            let (gfn, pfn) = (leaf.gfn.0 + index, leaf.pfn.0 + index);
            let owned = world
                .homes
                .page(Gfn(gfn))
                .is_some_and(|page| world.homes.is_owned(tdp_arch::Pfn(pfn), page));
            wrong += u64::from(!owned);
            checked += 1;
        }
    });
    let written: u64 = (0..world.homes.pages())
        .map(|page| world.homes.value(page))
        .sum();
    wrong += written.abs_diff(writes);
    let (audit, stats) = (mmu.audit(), mmu.stats());
    wrong += audit.frozen + audit.misplaced + audit.unknown;
    wrong += u64::from(audit.pages != stats.pages || audit.tables != stats.tables);
    world
        .verdict
        .mismatches
        .fetch_add(wrong, crate::sync::Ordering::Relaxed);
    checked
}
