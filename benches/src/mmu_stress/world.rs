//! What the threads of a run share: the MMU, the memory, what is known of the slots, the verdict, and the pause button.

use super::homes::Homes;
use crate::confidential::conditions::splitmix;
use crate::ours::Walked;
use crate::sync::{AtomicBool, AtomicU64, Ordering, Padded};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tdp::protected::Unprotected;
use tdp::{
    Access, AddressSpaceId, FlushRequest, Gfn, GfnRange, Host, Lookup, Mapping, MmapPool, Mmu,
    Perms, Slot, SlotId, TlbTracker,
};

pub(super) const SPACE: AddressSpaceId = AddressSpaceId(0);
/// The slot whose writes are logged from time to time, and the one that comes and goes.
pub(super) const LOGGED: SlotId = SlotId(0);
pub(super) const COMING: SlotId = SlotId(1);

/// A duty that is neglected on purpose, so that the checks must see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Flaw {
    /// The host's flush returns at once
    NoFlush,
    /// Whoever copies dirty pages does so before the flush
    CopyFirst,
}

/// The host as the MMU sees it.
#[derive(Debug)]
pub(super) struct StressHost {
    pub(super) frames: MmapPool,
    pub(super) tlb: TlbTracker,
    pub(super) homes: Arc<Homes>,
    pub(super) flaw: Option<Flaw>,
    pub(super) left: Arc<OnceLock<usize>>,
}

impl Host for StressHost {
    type Frames = MmapPool;
    type Backing = ();
    type Protected = Unprotected;

    fn frames(&self) -> &MmapPool {
        &self.frames
    }

    fn protected(&self) -> &Unprotected {
        &Unprotected
    }

    fn lookup(&self, _slot: &Slot<()>, gfn: Gfn, _access: Access) -> Lookup {
        let Some(page) = self.homes.page(gfn) else {
            return Lookup::Failed;
        };
        let (pfn, level) = self.homes.backing(page);
        Lookup::Mapped(Mapping::memory(pfn, level, Perms::RWX))
    }

    fn flush(&self, _request: &FlushRequest) {
        if self.flaw != Some(Flaw::NoFlush) {
            self.tlb.track(|_| {});
        }
    }

    fn reload_roots(&self) -> bool {
        self.tlb.track(|_| {});
        true
    }
}

impl Drop for StressHost {
    fn drop(&mut self) {
        // The MMU is gone and can give nothing back any more. Set once: a host is dropped once.
        let _ = self.left.set(self.frames.allocated());
    }
}

/// What the guest may know of the slot that comes and goes, in one word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Standing {
    /// Something is under way: either state may be seen.
    pub(super) changing: bool,
    pub(super) gone: bool,
    pub(super) read_only: bool,
}

/// What was found to be wrong.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    /// Pages, counters and sums that are not as they should be, at quiet moments.
    pub(super) mismatches: AtomicU64,
    /// Pages of which the copy lacks a write.
    pub(super) lost_dirty: AtomicU64,
    /// Accesses that reached a frame of somebody else, or what is not there or not writable any more.
    pub(super) stale: AtomicU64,
}

/// See the module.
pub(super) struct World<F: Walked> {
    pub(super) mmu: Mmu<F, StressHost>,
    pub(super) homes: Arc<Homes>,
    /// All of guest memory, its logged part first.
    pub(super) gfns: GfnRange,
    pub(super) logged: GfnRange,
    pub(super) coming: GfnRange,
    pub(super) verdict: Verdict,
    pub(super) flaw: Option<Flaw>,
    standing: Padded<AtomicU64>,
    end: Instant,
    over: AtomicBool,
    pause: AtomicBool,
    parked: AtomicU64,
    pub(super) vcpus: u64,
}

impl<F: Walked> World<F> {
    pub(super) fn new(
        mmu: Mmu<F, StressHost>,
        gfns: GfnRange,
        logged: GfnRange,
        vcpus: u64,
    ) -> Self {
        let (homes, flaw) = (mmu.host().homes.clone(), mmu.host().flaw);
        let coming = GfnRange {
            start: logged.end,
            end: gfns.end,
        };
        Self {
            mmu,
            homes,
            gfns,
            logged,
            coming,
            verdict: Verdict::default(),
            flaw,
            standing: Padded::default(),
            end: Instant::now(),
            over: AtomicBool::new(false),
            pause: AtomicBool::new(false),
            parked: AtomicU64::new(0),
            vcpus,
        }
    }

    /// The run takes `length` from now on.
    pub(super) fn begin(&mut self, length: Duration) {
        self.end = Instant::now() + length;
    }

    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed) || Instant::now() >= self.end
    }

    /// Ends the run for all.
    pub(super) fn finish(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    pub(super) fn standing(&self) -> Standing {
        // Acquire: whoever reads that a change is over reads it after the change.
        let word = self.standing.0.load(Ordering::Acquire);
        Standing {
            changing: word & 1 != 0,
            gone: word & 2 != 0,
            read_only: word & 4 != 0,
        }
    }

    pub(super) fn stand(&self, standing: Standing) {
        let word = u64::from(standing.changing)
            | u64::from(standing.gone) << 1
            | u64::from(standing.read_only) << 2;
        self.standing.0.store(word, Ordering::Release);
    }

    /// A vCPU that is out of the guest waits for as long as somebody wants all of them out.
    pub(super) fn park(&self) {
        if self.pause.load(Ordering::Acquire) {
            self.parked.fetch_add(1, Ordering::AcqRel);
            while self.pause.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_micros(100));
            }
            self.parked.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Does `work` while no vCPU is in the guest.
    pub(super) fn quietly<R>(&self, work: impl FnOnce() -> R) -> R {
        self.pause.store(true, Ordering::Release);
        while self.parked.load(Ordering::Acquire) < self.vcpus && !self.is_over() {
            std::thread::sleep(Duration::from_micros(100));
        }
        let done = work();
        self.pause.store(false, Ordering::Release);
        done
    }

    /// Whether every vCPU waits, so that what is seen now is at rest.
    pub(super) fn is_quiet(&self) -> bool {
        self.parked.load(Ordering::Acquire) >= self.vcpus
    }
}

/// Random numbers of one thread.
#[derive(Clone, Debug)]
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, n: u64) -> u64 {
        let (next, drawn) = splitmix(self.0);
        self.0 = next;
        drawn % n
    }

    pub(super) fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}
