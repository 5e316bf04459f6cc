//! A guest that is mapped, measured, zapped and measured meanwhile.

use crate::baseline::host::Backing;
use crate::ours::{OurSetup, Ours, Tables, Walked, WholeFault};
use crate::race::{Contender, join};
use crate::report::Error;
use crate::size::show;
use crate::sweeping::SPACE;
use crate::sync::{AtomicBool, Ordering};
use crate::sys;
use serde::Serialize;
use std::time::Duration;
use tdp::{Host, Mmu};
use tdp_arch::{Gfn, Level, PAGE_SIZE};

/// Table frames that a vCPU may hold ready.
const SPARE: u64 = 64;
/// Between two looks at the heap.
const SAMPLE: Duration = Duration::from_micros(100);

/// Which pages of a guest are mapped.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pages {
    pub(super) name: &'static str,
    pub(super) backing: Backing,
    pub(super) count: u64,
    /// Frames from one to the next.
    pub(super) stride: u64,
}

/// Who is there while all is zapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Alone,
    BesideFaults,
    HeldBack,
}

impl Way {
    pub(super) const ALL: [Self; 3] = [Self::Alone, Self::BesideFaults, Self::HeldBack];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::BesideFaults => "beside_faults",
            Self::HeldBack => "held_back",
        }
    }
}

/// What is taken at one time, in bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Taken {
    /// Table frames that are out of the pool: linked, held ready, garbage.
    pub(super) frame_bytes: u64,
    /// Of these, what waits for a grace period.
    pub(super) garbage_bytes: u64,
    /// What the guest has on the heap; `None` if the system does not tell.
    pub(super) heap_bytes: Option<u64>,
}

impl Taken {
    pub(super) fn total(&self) -> u64 {
        self.frame_bytes + self.heap_bytes.unwrap_or(0)
    }
}

/// One guest, zapped in one way.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) format: &'static str,
    pub(super) zap: &'static str,
    pub(super) guest_bytes: u64,
    pub(super) pages: u64,
    /// Linked at rest, the root among them.
    pub(super) tables: u64,
    /// Frames that the pool may give, each with metadata that is there from the start.
    pub(super) pool_frames: u64,
    pub(super) metadata_bytes: u64,
    /// Of frames that vCPUs hold ready at rest.
    pub(super) spare_bytes: u64,
    pub(super) rest: Taken,
    pub(super) worst: Taken,
    /// Frames that still waited after a grace period.
    pub(super) waiting: u64,
    pub(super) leaked_frames: u64,
}

type Guest<F> = Ours<F, WholeFault>;

/// Bytes of the heap beyond `before`.
fn heap_since(before: Option<u64>) -> Option<u64> {
    sys::heap()
        .zip(before)
        .map(|(now, before)| now.saturating_sub(before))
}

pub(super) fn run<F: Walked>(pages: &Pages, way: Way) -> Result<Row, Error> {
    let setup = setup(pages, way)?;
    let before = sys::heap();
    let mut guest = Guest::<F>::new(setup, Tables::Fresh)?;
    let mut vcpu = guest.worker()?;
    map(&guest, &mut vcpu, pages, &AtomicBool::new(false))?;
    // The slots of before the one slot was there are garbage too.
    guest.mmu().synchronize();
    let pool = guest.mmu().host().frames();
    let stats = guest.mmu().stats();
    let frames = |count: u64| count * PAGE_SIZE;
    let tables = stats.tables + 1;
    let metadata = Mmu::<F, crate::ours::BenchHost>::metadata_per_table() * pool.limit();
    let allocated = pool.allocated() as u64;
    let mut row = Row {
        name: pages.name,
        format: F::NAME,
        zap: way.name(),
        guest_bytes: pages.backing.gfns.pages() * PAGE_SIZE,
        pages: pages.count,
        tables,
        pool_frames: pool.limit() as u64,
        metadata_bytes: metadata as u64,
        spare_bytes: frames(allocated.saturating_sub(tables)),
        rest: Taken {
            frame_bytes: frames(allocated),
            garbage_bytes: frames(stats.garbage.pending),
            heap_bytes: heap_since(before),
        },
        worst: Taken {
            frame_bytes: 0,
            garbage_bytes: 0,
            heap_bytes: None,
        },
        waiting: 0,
        leaked_frames: 0,
    };
    let heap = zap(&guest, vcpu, pages, way, before)?;
    let stats = guest.mmu().stats();
    row.worst = Taken {
        frame_bytes: frames(guest.mmu().host().frames().peak() as u64),
        garbage_bytes: frames(stats.garbage.pending_max),
        heap_bytes: heap,
    };
    guest.reset()?;
    row.waiting = guest.mmu().stats().garbage.pending;
    row.leaked_frames = guest.leaked();
    Ok(row)
}

fn setup(pages: &Pages, way: Way) -> Result<OurSetup, Error> {
    // Tables below the root, level by level: as many as there are pages, or as fit.
    let spans = pages.backing.gfns;
    let tables = |level: Level| {
        let below = spans.pages().div_ceil(level.pages()) + 1;
        below.min(pages.count)
    };
    let tables: u64 = [Level::L2, Level::L3, Level::L4]
        .into_iter()
        .map(tables)
        .sum();
    // New ones beside old ones.
    let times = if way == Way::BesideFaults { 2 } else { 1 };
    let frames = times * tables + 1 + 2 * SPARE;
    let bytes = frames.saturating_mul(PAGE_SIZE);
    if bytes > sys::available_memory().unwrap_or(u64::MAX) {
        let need = show(bytes);
        return Err(Error::run(
            "frame pool",
            format!("{need} of tables do not fit the memory of this machine"),
        ));
    }
    Ok(OurSetup {
        backing: pages.backing,
        root: Level::L4,
        frames: usize::try_from(frames).map_err(|e| Error::run("frame pool", e))?,
        huge: false,
    })
}

type Vcpu<F> = <Guest<F> as Contender>::Worker;

/// Maps all pages, or as many as there is time for.
fn map<F: Walked>(
    guest: &Guest<F>,
    vcpu: &mut Vcpu<F>,
    pages: &Pages,
    stop: &AtomicBool,
) -> Result<(), Error> {
    for page in 0..pages.count {
        let gfn = Gfn(pages.backing.gfns.start.0 + page * pages.stride);
        guest.resolve(vcpu, gfn)?;
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    Ok(())
}

/// Zaps everything, with `vcpu` at what `way` says. Returns the most that the heap was seen to have beyond `before`.
fn zap<F: Walked>(
    guest: &Guest<F>,
    mut vcpu: Vcpu<F>,
    pages: &Pages,
    way: Way,
    before: Option<u64>,
) -> Result<Option<u64>, Error> {
    let (ready, over) = (AtomicBool::new(way == Way::Alone), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let beside = scope.spawn(|| match way {
            Way::Alone => Ok(()),
            Way::BesideFaults => {
                ready.store(true, Ordering::Release);
                while !over.load(Ordering::Relaxed) {
                    map(guest, &mut vcpu, pages, &over)?;
                }
                Ok(())
            }
            Way::HeldBack => {
                let batch = vcpu.batch().map_err(|e| Error::run("tdp", e));
                ready.store(true, Ordering::Release);
                let batch = batch?;
                wait_for(&over);
                drop(batch);
                Ok(())
            }
        });
        let heap = scope.spawn(|| {
            let mut most = heap_since(before);
            while !over.load(Ordering::Relaxed) {
                most = most.max(heap_since(before));
                std::thread::sleep(SAMPLE);
            }
            most.max(heap_since(before))
        });
        wait_for(&ready);
        let everything = Gfn(0)..Level::L4.gfn_limit();
        guest.mmu().zap(SPACE, everything).flush();
        over.store(true, Ordering::Release);
        let most = join(heap);
        join(beside).map(|()| most)
    })
}

fn wait_for(flag: &AtomicBool) {
    while !flag.load(Ordering::Acquire) {
        std::thread::yield_now();
    }
}
