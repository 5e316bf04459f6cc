//! Soak: every operation on both halves, with callbacks that fail, stall and panic, for as long as one likes.
//!
//! A run is a row of *episodes*. Each has a guest of its own, whose configuration is drawn from the seed and the episode's
//! number, and is a few *rounds* long. In a round every thread does a fixed number of operations of its own random sequence, which
//! depends on seed, episode, round and thread and on nothing that happens; between rounds nobody is at work and everything
//! is checked. At the end of an episode everything is taken down and every frame accounted for. So an episode that failed
//! can be run again alone: the threads do the same again, if at other moments.
//!
//! * `plan` draws episodes, `chaos` has what goes wrong, `frames` tables that notice their use after they were freed;
//! * `world` is what threads share, `guest` the vCPUs, `hands` the host, `copier` follows the dirty log;
//! * `check` is what must hold; `findings` the report.

mod chaos;
mod check;
mod copier;
mod findings;
mod frames;
mod guest;
mod hands;
mod plan;
mod world;

use crate::confidential::conditions::splitmix;
use crate::confidential::layout::{Layout, SHARED_BIT};
use crate::ours::{PHYSICAL_BITS, POOL_BASE, Walked};
use crate::private_mem_conversions;
use crate::report::{Error, Output};
use crate::sync::{AtomicBool, AtomicU64, Ordering};
use chaos::Met;
use check::Checked;
use copier::Copier;
use findings::Findings;
use frames::SoakFrames;
use guest::{Counts, Guest};
use hands::{Done, Hand};
use plan::Plan;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tdp::protected::Unprotected;
use tdp::protected::tdx::{TdConfig, TdVcpu, TdxConfig, TdxModule, TdxTable};
use tdp::{MmapPool, Mmu, MmuBuilder, PoolConfig, Slot, TlbTracker, Visibility};
use tdp_arch::{Ept, Level, Npt};
use world::{COMING, Flaw, Half, LOGGED, Memory, ModuleChaos, SoakHost, Verdict, World};

/// Frames of guest memory: 16 MiB.
const PAGES: u64 = 4096;
/// A round that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(120);

const ABOUT: &str = "\
Runs guest after guest, each of another configuration, with every operation of the library on both halves at once, while callbacks
of the host and of the trusted module fail, stall and panic, table frames run out, and threads die holding a vCPU. Whenever
nobody is at work every invariant is checked; at the end of each guest every frame is accounted for.

Stops at the first guest of which something was wrong, and says how to run that one again.";

const EXAMPLES: &str = "\
Examples:
  tdp-bench soak
  tdp-bench soak --seconds 600 --seed 7 --json -
  tdp-bench soak --seed 7 --episode 12           the same threads do the same again";

/// Every operation on both halves, with injected faults, and every invariant checked between
#[derive(Debug, clap::Args)]
#[command(long_about = ABOUT, after_help = EXAMPLES)]
pub struct Args {
    /// How long: the guest that runs then is the last
    #[arg(long, value_name = "N", default_value_t = 10.0, value_parser = private_mem_conversions::seconds)]
    seconds: f64,

    /// Seed of whatever is random
    #[arg(short = 'r', long, default_value_t = 1)]
    seed: u64,

    /// vCPUs, a thread each
    #[arg(short = 'v', long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    vcpus: u16,

    /// Threads of the host
    #[arg(short = 't', long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: u16,

    /// Run this one guest only, by its number
    #[arg(long, value_name = "N")]
    episode: Option<u64>,

    /// Neglects a duty, to see that the checks notice
    #[arg(long, value_enum, hide = true)]
    flaw: Option<Flaw>,
}

/// Random numbers of one thread.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// A stream of its own for each combination.
    fn of(parts: [u64; 4]) -> Self {
        let mix =
            |state: u64, part: u64| splitmix(state ^ part.wrapping_mul(0xd6e8_feb8_6659_fd93)).1;
        Self(parts.into_iter().fold(0, mix))
    }

    fn next(&mut self) -> u64 {
        let (next, drawn) = splitmix(self.0);
        self.0 = next;
        drawn
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What one guest did and what was found.
#[derive(Debug, Default)]
struct Episode {
    guest: Counts,
    host: Done,
    met: Met,
    checked: Checked,
    stats: tdp::Stats,
    wrong: Vec<String>,
    violations: u64,
}

/// Runs the scenario.
///
/// # Errors
///
/// The library's own errors if a guest cannot be made, and [`Error::Check`] if anything was found to be wrong.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    let end = Instant::now() + Duration::from_secs_f64(args.seconds);
    let progress = output.progress(args.seconds.ceil() as u64);
    let mut findings = Findings::new(args);
    let begun = Instant::now();
    let mut number = args.episode.unwrap_or(0);
    loop {
        let plan = Plan::new(args.seed, number);
        progress.step(format!("guest {number}"));
        let episode = episode(args, &plan)?;
        findings.add(&plan, episode);
        number += 1;
        if findings.is_wrong() || args.episode.is_some() || Instant::now() >= end {
            break;
        }
    }
    drop(progress);
    findings.finish(begun.elapsed());
    findings.tell(output);
    output.finish("soak", &findings)?;
    findings.verdict()
}

fn episode(args: &Args, plan: &Plan) -> Result<Episode, Error> {
    if plan.confidential {
        confidential(args, plan)
    } else if plan.npt {
        shared::<Npt>(args, plan)
    } else {
        shared::<Ept>(args, plan)
    }
}

/// A guest without a private half.
fn shared<F: Walked>(args: &Args, plan: &Plan) -> Result<Episode, Error> {
    let layout = layout(args, plan)?;
    let memory = Arc::new(Memory::new(layout.gfns, layout.private(), plan));
    let host = host::<F, _>(args, plan, &layout, memory, TlbTracker::new(), Unprotected)?;
    let builder = Mmu::<F, _>::builder(host);
    live(args, plan, builder, None, Vec::new())
}

/// One with both halves.
fn confidential(args: &Args, plan: &Plan) -> Result<Episode, Error> {
    let failed = |what: String| Error::run("TDX module", what);
    let layout = layout(args, plan)?;
    let memory = Arc::new(Memory::new(layout.gfns, layout.private(), plan));
    let module = TdxModule::with_hooks(TdxConfig::new(layout.module()), ModuleChaos)
        .map_err(|e| failed(e.to_string()))?;
    let page = |n| layout.control(n).address();
    let td = module
        .create_td(TdConfig::new(page(0), page(1), page(2)))
        .map_err(|answer| failed(answer.to_string()))?;
    let begun = td.mng_init();
    if !begun.is_success() {
        return Err(failed(begun.to_string()));
    }
    let vcpus = (0..u64::from(args.vcpus))
        .map(|n| {
            td.vp_create(page(3 + n))
                .map_err(|answer| failed(answer.to_string()))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let tlb = TlbTracker::new();
    let table = TdxTable::new(td, tlb.clone(), layout.twins());
    let host = host::<Ept, _>(args, plan, &layout, memory, tlb, table)?;
    let builder = Mmu::<Ept, _>::builder(host)
        .shared_bit(SHARED_BIT)
        .default_visibility(Visibility::Private);
    live(args, plan, builder, Some(module), vcpus)
}

fn layout(args: &Args, plan: &Plan) -> Result<Layout, Error> {
    // Threads that die have vCPUs of their own for a moment.
    Layout::new(PAGES, plan.private_level, 2 * args.vcpus)
        .ok_or_else(|| Error::Usage("-v: too many".to_owned()))
}

fn host<F: Walked, P: Half>(
    args: &Args,
    plan: &Plan,
    layout: &Layout,
    memory: Arc<Memory>,
    tlb: TlbTracker,
    protected: P,
) -> Result<SoakHost<P>, Error> {
    let halves = if plan.confidential { 2 } else { 1 };
    let tables = halves * layout.tables(Level::L1);
    let pool = MmapPool::new(PoolConfig {
        // Each vCPU may hold some tables ready; of what is beyond that there is more or less than needed.
        frames: (plan.quarters * tables / 4 + 24 * u64::from(args.vcpus)) as usize,
        base: POOL_BASE,
        huge_pages: false,
    })
    .map_err(|e| Error::run("tdp", e))?;
    Ok(SoakHost {
        frames: SoakFrames::new::<F>(pool),
        tlb,
        memory,
        protected,
        flaw: args.flaw,
        left: Arc::new(OnceLock::new()),
    })
}

/// Builds the guest, has it live, and takes it down.
fn live<F: Walked, P: Half>(
    args: &Args,
    plan: &Plan,
    builder: MmuBuilder<F, SoakHost<P>>,
    module: Option<TdxModule>,
    td_vcpus: Vec<TdVcpu>,
) -> Result<Episode, Error> {
    let failed = |e: Box<dyn std::error::Error + Send + Sync>| Error::run("tdp", e);
    let mmu = builder
        .physical_bits(PHYSICAL_BITS)
        .dirty_tracking(plan.tracking)
        .dirty_ring(plan.ring)
        .eager_split(plan.eager_split)
        .nx_huge_pages(plan.nx)
        .garbage_bound(plan.garbage_bound)
        .slot_removal(plan.removal)
        .build()
        .map_err(|e| failed(e.into()))?;
    let memory = mmu.host().memory.clone();
    for (id, gfns) in [(LOGGED, memory.logged), (COMING, memory.coming_at(false))] {
        mmu.slots()
            .insert(Slot::new(gfns, ()).with_id(id))
            .map_err(|e| failed(e.into()))?;
    }
    if plan.confidential {
        mmu.build_private()
            .and_then(|mut image| image.finalise())
            .map_err(|e| failed(e.into()))?;
    }
    let left = mmu.host().left.clone();
    let frames = mmu.host().frames.clone();
    let world = World {
        mmu,
        memory,
        module,
        plan: plan.clone(),
        verdict: Verdict::default(),
        flaw: args.flaw,
        broken: AtomicBool::new(false),
    };
    let mut episode = rounds(args, &world, td_vcpus)?;
    if world.verdict.count() == 0 {
        check::at_end(&world, episode.guest.writes, &mut episode.checked);
    }
    episode.stats = world.mmu.stats();
    let verdict = world.verdict.words();
    episode.violations = world.verdict.count();
    episode.wrong = verdict;
    drop(world);
    // A host that still lives after its MMU has leaked as a whole.
    let out = left.get().map_or(u64::MAX, |&frames| frames as u64);
    if out != 0 || frames.check() != 0 {
        episode.violations += 1;
        episode
            .wrong
            .push(format!("{out} table frames did not come back"));
    }
    Ok(episode)
}

fn rounds<F: Walked, P: Half>(
    args: &Args,
    world: &World<F, P>,
    td_vcpus: Vec<TdVcpu>,
) -> Result<Episode, Error> {
    let mut td_vcpus = td_vcpus.into_iter();
    let mut guests = (0..args.vcpus)
        .map(|_| Guest::new(world, td_vcpus.next()))
        .collect::<Result<Vec<_>, _>>()?;
    let mut hands: Vec<_> = (0..args.threads).map(|_| Hand::new(world)).collect();
    let mut copier = Copier::new(world);
    let mut checked = Checked::default();
    for round in 0..world.plan.rounds {
        work(args, world, round, &mut guests, &mut hands, &mut copier);
        if world.broken.load(Ordering::Relaxed) {
            break;
        }
        checked.pages_compared_with_copies += copier.settle();
        check::at_rest(world, &mut checked);
        check::walks(world, &guests, &mut checked);
        if world.verdict.count() != 0 {
            break;
        }
    }
    let mut episode = Episode {
        checked,
        ..Episode::default()
    };
    let mut all = |done: Done| {
        for (name, times) in done {
            *episode.host.entry(name).or_default() += times;
        }
    };
    for hand in hands {
        all(hand.done);
        episode.met.add(&hand.met);
    }
    all(copier.done);
    episode.met.add(&copier.met);
    for guest in guests {
        episode.guest.add(&guest.counts);
        episode.met.add(&guest.met);
        // Outside, and dropped: the module may let it go.
        drop(guest.into_td());
    }
    Ok(episode)
}

/// One round: everybody at work.
fn work<F: Walked, P: Half>(
    args: &Args,
    world: &World<F, P>,
    round: u64,
    guests: &mut [Guest<'_, F, P>],
    hands: &mut [Hand<'_, F, P>],
    copier: &mut Copier<'_, F, P>,
) {
    let seed = |thread: u64| Random::of([args.seed, world.plan.episode, round, thread]).next();
    let at_work = AtomicU64::new(guests.len() as u64 + hands.len() as u64 + 1);
    std::thread::scope(|scope| {
        let at_work = &at_work;
        let mut seeds = (0..).map(seed);
        let mut next = || seeds.next().unwrap_or_default();
        for guest in guests {
            let seed = next();
            scope.spawn(move || at_it(world, at_work, || guest.run(seed)));
        }
        for hand in hands {
            let seed = next();
            scope.spawn(move || at_it(world, at_work, || hand.run(seed)));
        }
        let seed = next();
        scope.spawn(move || at_it(world, at_work, || copier.run(seed)));
        let begun = Instant::now();
        while at_work.load(Ordering::Relaxed) != 0 {
            std::thread::sleep(Duration::from_millis(1));
            if begun.elapsed() > PATIENCE {
                hangs(
                    args,
                    world.plan.episode,
                    round,
                    at_work.load(Ordering::Relaxed),
                );
            }
        }
    });
}

/// The work of one thread. A panic that was not made on purpose is a violation.
fn at_it<F: Walked, P: Half>(world: &World<F, P>, at_work: &AtomicU64, work: impl FnOnce()) {
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    if let Err(payload) = outcome {
        world.broken.store(true, Ordering::Relaxed);
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or(payload.downcast_ref::<&str>().copied());
        let text = text.unwrap_or("without words");
        world
            .verdict
            .violation(format_args!("a thread panicked: {text}"));
    }
    at_work.fetch_sub(1, Ordering::Relaxed);
}

/// Threads that do not come back cannot be joined: says so, and ends the process.
#[cold]
fn hangs(args: &Args, episode: u64, round: u64, threads: u64) -> ! {
    use std::io::Write;
    let _ = writeln!(
        std::io::stderr(),
        "error: {threads} threads hang in round {round} of guest {episode}; again by --seed {} --episode {episode} -v {} -t {}",
        args.seed,
        args.vcpus,
        args.threads
    );
    std::process::exit(1)
}
