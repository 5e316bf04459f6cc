//! The root of a large guest of which little is mapped, made obsolete at once; nobody waits for the teardown.

use crate::ours::{BenchHost, PHYSICAL_BITS, POOL_BASE};
use crate::race::{join, median};
use crate::report::Error;
use crate::size::show;
use crate::sync::{AtomicBool, Ordering};
use serde::Serialize;
use std::sync::{Arc, OnceLock};
use std::time::Instant;
use tdp::{
    Fault, Gfn, GfnRange, LinearBacking, MmapPool, Mmu, Outcome, Pfn, PoolConfig, Slot,
    SoftwareHost,
};
use tdp_arch::{Ept, Level, PAGE_SIZE};

/// Pages that are mapped, as far from each other as they can be, each below a table of its own.
const PAGES: u64 = 8192;
/// How often the root is made obsolete.
const ROUNDS: u32 = 15;
/// Frames that a vCPU may hold ready.
const SPARE: u64 = 64;

/// What was measured.
#[derive(Debug, Serialize)]
pub(super) struct Sparse {
    bytes: u64,
    tables: u64,
    /// Of each call that makes the root obsolete, nanoseconds: after the caches were filled with the guest's tables.
    invalidate_ns: Vec<u64>,
    /// Of the next such call, soon after.
    invalidate_again_ns: Vec<u64>,
    /// Of taking the tables down afterwards.
    teardown_ns: Vec<u64>,
    /// The longest fault of a vCPU while nothing was taken down, and while something was.
    longest_fault_idle_ns: Vec<u64>,
    longest_fault_teardown_ns: Vec<u64>,
    #[serde(skip)]
    pub(super) leaked: u64,
}

impl Sparse {
    /// Microseconds, medians: with cold caches and with warm ones.
    pub(super) fn invalidate_us(&self) -> (f64, f64) {
        let us = |ns: &[u64]| {
            let ns: Vec<f64> = ns.iter().map(|ns| *ns as f64).collect();
            median(&ns) / 1e3
        };
        (us(&self.invalidate_ns), us(&self.invalidate_again_ns))
    }

    /// Milliseconds, median.
    pub(super) fn teardown_ms(&self) -> f64 {
        let ns: Vec<f64> = self.teardown_ns.iter().map(|ns| *ns as f64).collect();
        median(&ns) / 1e6
    }

    /// Median of the longest faults, in microseconds: idle, and while tables are taken down.
    pub(super) fn longest_fault_us(&self) -> (f64, f64) {
        let us = |ns: &[u64]| {
            let ns: Vec<f64> = ns.iter().map(|ns| *ns as f64).collect();
            median(&ns) / 1e3
        };
        (
            us(&self.longest_fault_idle_ns),
            us(&self.longest_fault_teardown_ns),
        )
    }
}

/// The guest frames of the sparse guest.
///
/// # Errors
///
/// [`Error::Usage`] if they do not fit the addresses, or are too few to be sparse.
pub(super) fn check(bytes: u64) -> Result<GfnRange, Error> {
    let gfns = GfnRange::new(Gfn(0), bytes / PAGE_SIZE).filter(|gfns| {
        gfns.end <= Level::L4.gfn_limit() && gfns.pages() / PAGES >= Level::L2.pages()
    });
    gfns.ok_or_else(|| {
        Error::Usage(format!(
            "--sparse {}: is less than 16G, or does not fit the addresses of 4 levels",
            show(bytes)
        ))
    })
}

pub(super) fn run(gfns: GfnRange) -> Result<Sparse, Error> {
    let failed = |e: Box<dyn std::error::Error + Send + Sync>| Error::run("tdp", e);
    let pool = MmapPool::new(PoolConfig {
        frames: (3 * (PAGES + gfns.pages() / Level::L3.pages()) + 2 * SPARE) as usize,
        base: POOL_BASE,
        huge_pages: false,
    })
    .map_err(|e| failed(e.into()))?;
    pool.populate();
    let left = Arc::new(OnceLock::new());
    let host = BenchHost::new(SoftwareHost::new(pool), left.clone());
    let mmu = Mmu::<Ept, _>::builder(host)
        .physical_bits(PHYSICAL_BITS)
        .build()
        .map_err(|e| failed(e.into()))?;
    let backing = LinearBacking::new(Pfn(1 << 37), Level::L1);
    mmu.slots()
        .insert(Slot::new(gfns, backing))
        .map_err(|e| failed(e.into()))?;
    let mut vcpu = mmu.vcpu().map_err(|e| failed(e.into()))?;
    let stride = gfns.pages() / PAGES;
    let mut sparse = Sparse {
        bytes: gfns.pages() * PAGE_SIZE,
        tables: 0,
        invalidate_ns: Vec::new(),
        invalidate_again_ns: Vec::new(),
        teardown_ns: Vec::new(),
        longest_fault_idle_ns: Vec::new(),
        longest_fault_teardown_ns: Vec::new(),
        leaked: 0,
    };
    // Maps pages until there is no more or it is told to stop, and returns the longest fault.
    let map = |vcpu: &mut tdp::Vcpu<Ept, BenchHost>, stop: &AtomicBool| {
        vcpu.load_root().map_err(|e| failed(e.into()))?;
        let mut longest = 0;
        for page in 0..PAGES {
            let begin = Instant::now();
            loop {
                let fault = Fault::write(Gfn(page * stride).address());
                match vcpu.fault(fault).map_err(|e| failed(e.into()))? {
                    Outcome::Retry(_) => {}
                    _ => break,
                }
            }
            longest = longest.max(begin.elapsed().as_nanos() as u64);
            if stop.load(Ordering::Relaxed) {
                break;
            }
        }
        Ok::<u64, Error>(longest)
    };
    let never = AtomicBool::new(false);
    map(&mut vcpu, &never)?;
    sparse.tables = mmu.stats().tables;
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        let teardown = mmu.invalidate_roots();
        sparse.invalidate_ns.push(begin.elapsed().as_nanos() as u64);
        let stop = AtomicBool::new(false);
        let (longest, took) = std::thread::scope(|scope| {
            let faulting = scope.spawn(|| map(&mut vcpu, &stop));
            let begin = Instant::now();
            teardown.finish();
            let took = begin.elapsed().as_nanos() as u64;
            stop.store(true, Ordering::Relaxed);
            (join(faulting), took)
        });
        sparse.longest_fault_teardown_ns.push(longest?);
        sparse.teardown_ns.push(took);
        let begin = Instant::now();
        let teardown = mmu.invalidate_roots();
        sparse
            .invalidate_again_ns
            .push(begin.elapsed().as_nanos() as u64);
        teardown.finish();
        mmu.synchronize();
        sparse.longest_fault_idle_ns.push(map(&mut vcpu, &never)?);
    }
    drop(vcpu);
    drop(mmu);
    sparse.leaked = left.get().map_or(u64::MAX, |&frames| frames as u64);
    Ok(sparse)
}
