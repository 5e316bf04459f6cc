//! One page invalidated against a vCPU that faults without pause.
//!
//! The vCPU faults on all pages of 2 MiB in turn, over and over; the other thread invalidates one after the other: begin, zap,
//! flush, end, on the clock as one. What was zapped the vCPU maps anew when it comes by, so its faults install, find and are
//! sent back. Between zap and end no fault may install on the page: that is looked at, off the clock.

use crate::ours::{Ours, Walked, WholeFault};
use crate::race::{Contender, join};
use crate::report::Error;
use crate::sync::{AtomicBool, AtomicU64, Ordering, Padded};
use crate::sys;
use serde::Serialize;
use std::time::Instant;
use tdp::{AddressSpaceId, Fault};
use tdp_arch::{Gfn, GfnRange, Level};

/// Invalidations that are timed.
const TIMES: u64 = 20_000;
/// One in so many is looked at.
const LOOKED_AT: u64 = 16;

/// What was found.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Found {
    pub(super) invalidations: u64,
    pub(super) median_ns: f64,
    pub(super) p99_ns: f64,
    /// Faults of the vCPU meanwhile.
    pub(super) faults: u64,
    /// Pages that could be reached while they were being invalidated.
    pub(super) reachable: u64,
}

/// Runs it on the first 2 MiB of `gfns`.
pub(super) fn run<F: Walked>(ours: &Ours<F, WholeFault>, gfns: GfnRange) -> Result<Found, Error> {
    let space = AddressSpaceId::default();
    let start = gfns.start.0;
    let pages = gfns.pages().min(Level::L2.pages());
    let mut vcpu = ours.worker()?;
    let (done, faults) = (AtomicBool::new(false), Padded(AtomicU64::new(0)));
    let cpus = sys::allowed();
    std::thread::scope(|scope| {
        let (done, faults) = (&done, &faults);
        let guest_cpu = cpus.get(1).copied();
        let guest = scope.spawn(move || {
            if let Some(cpu) = guest_cpu {
                sys::pin(cpu).map_err(|e| Error::run("a processor", e))?;
            }
            // Relaxed: says when to stop, and how many there were.
            let mut count = 0;
            while !done.load(Ordering::Relaxed) {
                for page in 0..pages {
                    let fault = Fault::write(Gfn(start + page).address());
                    // Any answer will do: a page under invalidation is to be tried again.
                    let _ = vcpu.fault(fault).map_err(|e| Error::run("tdp", e))?;
                }
                count += pages;
                faults.0.store(count, Ordering::Relaxed);
            }
            Ok::<_, Error>(())
        });
        // On a thread of its own, which alone is tied to a processor.
        let host_cpu = cpus.first().copied().filter(|_| cpus.len() > 1);
        let host = scope.spawn(move || {
            if let Some(cpu) = host_cpu {
                sys::pin(cpu).map_err(|e| Error::run("a processor", e))?;
            }
            // Not before the vCPU is at work.
            while faults.0.load(Ordering::Relaxed) == 0 && !guest.is_finished() {
                std::thread::yield_now();
            }
            let before = faults.0.load(Ordering::Relaxed);
            let (mut found, ns) = invalidate(ours, space, start, pages);
            found.faults = faults.0.load(Ordering::Relaxed) - before;
            done.store(true, Ordering::Relaxed);
            join(guest)?;
            Ok::<_, Error>((found, ns))
        });
        let (mut found, mut ns) = join(host)?;
        found.invalidations = ns.len() as u64;
        (found.median_ns, found.p99_ns) = super::spread(&mut ns);
        Ok(found)
    })
}

/// The timed loop. Returns how long each took.
fn invalidate<F: Walked>(
    ours: &Ours<F, WholeFault>,
    space: AddressSpaceId,
    start: u64,
    pages: u64,
) -> (Found, Vec<u64>) {
    let mut found = Found::default();
    let mut ns: Vec<u64> = Vec::with_capacity(TIMES as usize);
    for n in 0..TIMES {
        let page = Gfn(start + n * 7 % pages);
        let only = page..Gfn(page.0 + 1);
        if n % LOOKED_AT == 0 {
            let invalidation = ours.mmu().invalidate_begin(space, only);
            let flushed = invalidation.zap().flush();
            found.reachable += u64::from(ours.translate(page).is_some());
            invalidation.end(flushed);
            continue;
        }
        let clock = Instant::now();
        let invalidation = ours.mmu().invalidate_begin(space, only);
        let flushed = invalidation.zap().flush();
        invalidation.end(flushed);
        ns.push(u64::try_from(clock.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }
    (found, ns)
}
