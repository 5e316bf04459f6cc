//! Faults against everything that takes translations away, on software vCPUs whose TLBs keep what is not flushed.
//!
//! vCPU threads access random guest frames at full rate, while host threads invalidate ranges and give the pages to
//! others, zap, tear roots down, move slots and take them away. Every host frame knows its owner, so a vCPU that
//! reaches a frame sees at once whether it still may. Freed table frames are poisoned and used again at once, and every
//! place where being late matters is made late at random. What is left out on purpose (`Flaw`) must be found.
//!
//! `TDP_STRESS_SEED` sets the random course (thread timing stays what it is), `TDP_STRESS_SECONDS` the length of each
//! run.

mod chaos;
mod frames;
mod guest;
mod host;
mod memory;
mod plan;
#[allow(dead_code, reason = "shared with other tests")]
#[path = "../common/processor.rs"]
mod processor;

use chaos::{Random, Verdict};
use frames::PoisonPool;
use guest::{Guest, GuestCounts};
use host::{Hand, HostCounts, SPACE, StressHost, insert_area};
use memory::{AREAS, Memory, Standing, page_of};
use plan::{EVERYTHING, Flaw, INVALIDATIONS, Plan, SIZES, SLOTS, ZAPS};
use processor::{Processor, ProcessorSetup};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tdp::{Ept, Gfn, GfnRange, MmapPool, Mmu, Npt, Pfn, PoolConfig};
use tdp_arch::cpu::SoftwareVcpu;

/// Threads: more than processors, so that they are stopped in the middle of things.
const GUESTS: u64 = 3;
const HANDS: u64 = 2;
/// Runs a plan and returns the violations.
fn run<F: Processor>(plan: Plan, length: Duration) -> Vec<String> {
    let seed = plan::seed();
    let verdict = Verdict::new(length);
    let memory = Arc::new(Memory::new());
    let pool = MmapPool::new(PoolConfig {
        frames: plan.table_frames,
        base: Pfn(0x1000),
        huge_pages: false,
    });
    let frames = PoisonPool::new::<F>(pool.expect("a small pool"), verdict.clone());
    let host = StressHost::new(frames.clone(), memory.clone(), plan.flaw);
    // Without slots that go, no access ends in MMIO, and a malformed entry is a table that was freed.
    let mmio_caching = plan.slots != 0;
    let mmu = Mmu::<F, _>::builder(host)
        .mmio_caching(mmio_caching)
        .nx_huge_pages(plan.nx)
        .garbage_bound(8)
        .build()
        .expect("a possible set-up");
    for area in 0..AREAS {
        insert_area(&mmu, area, false);
        memory.stand(
            area,
            Standing {
                changing: false,
                present: true,
                moved: false,
                read_only: false,
            },
        );
    }
    let guests: Vec<_> = (0..GUESTS)
        .map(|number| {
            let random = Random::new(seed + number);
            let guest = guest::<F>(&mmu, &frames, &memory, plan, random);
            let verdict = verdict.clone();
            thread::spawn(move || guest.run(&verdict))
        })
        .collect();
    let hands: Vec<_> = (0..HANDS)
        .map(|number| {
            let hand = Hand {
                mmu: mmu.clone(),
                memory: memory.clone(),
                plan,
                random: Random::new(seed + GUESTS + number),
                counts: HostCounts::default(),
            };
            let verdict = verdict.clone();
            thread::spawn(move || hand.run(&verdict))
        })
        .collect();
    let guests = join(guests);
    let hands = join(hands);
    if verdict.violations().is_empty() {
        check_at_rest(&mmu, &memory, &frames, &verdict);
    }
    drop(mmu);
    if frames.allocated() != 0 {
        verdict.violation(format_args!("{} table frames leaked", frames.allocated()));
    }
    frames.check_free_frames();
    println!(
        "{} {}: seed {seed}, {guests:?}, {hands:?}",
        F::NAME,
        plan.name
    );
    verdict.violations()
}

fn guest<F: Processor>(
    mmu: &Mmu<F, StressHost>,
    frames: &PoisonPool,
    memory: &Arc<Memory>,
    plan: Plan,
    random: Random,
) -> Guest<F> {
    let mut vcpu = mmu.vcpu().expect("a frame for the root");
    let root = vcpu.load_root().expect("the root is there");
    Guest {
        vcpu,
        software: SoftwareVcpu::new(F::walker(ProcessorSetup::default()), root.hpa),
        tlb: mmu.host().tlb.vcpu(),
        root,
        frames: frames.clone(),
        memory: memory.clone(),
        random,
        flaw: plan.flaw,
        mmio_caching: plan.slots != 0,
        nx: plan.nx,
        counts: GuestCounts::default(),
    }
}

fn join<T>(threads: Vec<JoinHandle<T>>) -> Vec<T> {
    let join = |thread: JoinHandle<T>| thread.join().expect("a thread panicked");
    threads.into_iter().map(join).collect()
}

/// Nobody works any more: the tables must lead to their owners, and the books must be right.
fn check_at_rest<F: Processor>(
    mmu: &Mmu<F, StressHost>,
    memory: &Memory,
    frames: &PoisonPool,
    verdict: &Verdict,
) {
    mmu.synchronize();
    let mut pages = [0; 3];
    let all = GfnRange {
        start: Gfn(0),
        end: Gfn(u64::MAX),
    };
    mmu.visit_leaves(SPACE, all, |leaf| {
        pages[usize::from(leaf.level.number()) - 1] += 1;
        for index in 0..leaf.level.pages() {
            let (gfn, pfn) = (Gfn(leaf.gfn.0 + index), Pfn(leaf.pfn.0 + index));
            let owned = page_of(gfn).is_some_and(|(page, _)| memory.is_owned(pfn, page));
            if !owned {
                verdict.violation(format_args!("{leaf:?}: {pfn} belongs to somebody else"));
            }
        }
    });
    let stats = mmu.stats();
    if stats.pages != pages {
        verdict.violation(format_args!(
            "leaves are {pages:?}, by the counters {:?}",
            stats.pages
        ));
    }
    // Every vCPU is gone, with the tables that it kept ready.
    let roots = stats.roots_made - stats.roots_invalidated;
    let linked = (stats.tables + roots) as usize;
    if stats.garbage.pending != 0 || linked != frames.allocated() {
        verdict.violation(format_args!(
            "{linked} tables are linked, {} wait, {} frames are out",
            stats.garbage.pending,
            frames.allocated()
        ));
    }
}

fn passes<F: Processor>(plan: Plan) {
    let violations = run::<F>(plan, plan::length());
    assert!(violations.is_empty(), "{violations:#?}");
}

/// A run in which somebody neglects a duty. It ends at the first violation, which must come.
fn is_caught<F: Processor>(plan: Plan, flaw: Flaw) {
    let violations = run::<F>(plan.with(flaw), Duration::from_secs(60));
    assert!(!violations.is_empty(), "{flaw:?} went unseen");
    println!("{flaw:?}: {}", violations[0]);
}

macro_rules! tests {
    ($($(#[$doc:meta])* $name:ident: $body:expr;)+) => {
        $($(#[$doc])*
        mod $name {
            use super::*;

            #[test]
            fn ept() {
                type F = Ept;
                $body
            }

            #[test]
            fn npt() {
                type F = Npt;
                $body
            }
        })+
    };
}

tests! {
    faults_against_invalidations: passes::<F>(INVALIDATIONS);
    faults_against_zaps_and_teardowns: passes::<F>(ZAPS);
    faults_against_slots: passes::<F>(SLOTS);
    faults_against_sizes: passes::<F>(SIZES);
    faults_against_sizes_without_executable_large_leaves:
        passes::<F>(SIZES.without_executable_large_leaves());
    faults_against_everything: passes::<F>(EVERYTHING);
    a_missing_flush_is_caught: is_caught::<F>(EVERYTHING, Flaw::NoFlush);
    a_missing_flush_after_a_collapse_is_caught: is_caught::<F>(SIZES, Flaw::NoFlushOfSizes);
    a_tlb_that_is_kept_is_caught: is_caught::<F>(EVERYTHING, Flaw::VcpuKeepsTlb);
    a_page_given_away_too_early_is_caught: is_caught::<F>(INVALIDATIONS, Flaw::GivesAwayFirst);
}
