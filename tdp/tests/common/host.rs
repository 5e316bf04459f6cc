//! A host whose answers a test writes.
#![allow(unsafe_code)]
// UNSAFETY: a frame source promises what its pages are; this one hands the promise of the pool on.

use std::collections::BTreeMap;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use tdp::protected::Unprotected;
use tdp::{
    Access, FlushRequest, FrameSource, Gfn, Host, Level, Lookup, Mapping, MemoryType, MmapPool,
    OutOfFrames, Perms, Pfn, Slot, TablePage, TlbTracker,
};

/// A pool that is seen from outside, and that can be made to refuse.
#[derive(Clone, Debug)]
pub(crate) struct SharedPool {
    pool: Arc<MmapPool>,
    starving: Arc<AtomicBool>,
    panicking: Arc<AtomicBool>,
}

impl SharedPool {
    pub(crate) fn new(pool: MmapPool) -> Self {
        Self {
            pool: Arc::new(pool),
            starving: Arc::default(),
            panicking: Arc::default(),
        }
    }

    /// Frames that are out of it.
    pub(crate) fn allocated(&self) -> usize {
        self.pool.allocated()
    }

    /// Refuses all frames from now on, or no longer.
    pub(crate) fn starve(&self, on: bool) {
        self.starving.store(on, Ordering::Relaxed);
    }

    /// Panics when it is asked for frames the next time.
    pub(crate) fn panic_once(&self) {
        self.panicking.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_starving(&self) -> bool {
        self.starving.load(Ordering::Relaxed)
    }
}

// SAFETY: every promise is the pool's own; refusing is always allowed.
unsafe impl FrameSource for SharedPool {
    fn window(&self) -> Range<Pfn> {
        self.pool.window()
    }

    fn allocate(&self, out: &mut [Pfn]) -> Result<usize, OutOfFrames> {
        assert!(
            !self.panicking.swap(false, Ordering::Relaxed),
            "as the test asked"
        );
        if self.is_starving() {
            let limit = self.pool.limit();
            return Err(OutOfFrames { limit });
        }
        self.pool.allocate(out)
    }

    fn free(&self, frames: &[Pfn]) {
        self.pool.free(frames);
    }

    fn page(&self, pfn: Pfn) -> NonNull<TablePage> {
        self.pool.page(pfn)
    }
}

/// Backing of a slot: consecutive host frames, except for pages that were moved elsewhere one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    /// Host frame of the slot's first guest frame.
    pub(crate) pfn: Pfn,
    /// Largest leaf that the host's own mapping allows.
    pub(crate) level: Level,
}

impl Memory {
    pub(crate) const fn new(pfn: Pfn, level: Level) -> Self {
        Self { pfn, level }
    }
}

/// What the host answers to a look-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) enum Answer {
    /// What backs the page.
    #[default]
    Page,
    /// This, whatever backs it.
    Fixed(Lookup),
    /// Asks to be asked again where it may sleep, and answers there.
    Blocking(BlockingAnswer),
}

/// What the host answers where it may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockingAnswer {
    /// What backs the page.
    Page,
    /// This.
    Fixed(Lookup),
}

pub(crate) type Hook = Box<dyn FnOnce() + Send>;

/// What the host says and does from now on.
#[derive(Default)]
pub(crate) struct Script {
    pub(crate) answer: Answer,
    /// Runs in the middle of the next look-up that may sleep: after the page was found, before it is answered.
    pub(crate) while_asleep: Option<Hook>,
    /// Runs in the next look-up that may not sleep, before it is answered.
    pub(crate) while_looking: Option<Hook>,
    /// Runs in the next flush.
    pub(crate) while_flushing: Option<Hook>,
    /// What backs a page that was moved, by where it was at first.
    pub(crate) moved: BTreeMap<u64, Pfn>,
    /// What the host permits.
    pub(crate) perms: Option<Perms>,
    pub(crate) memory_type: MemoryType,
    /// Every flush that was asked for.
    pub(crate) flushes: Vec<FlushRequest>,
    pub(crate) lookups: u64,
    /// What the last look-up that may not sleep was for.
    pub(crate) asked_for: Option<Access>,
    /// Whether the host promises that vCPUs load their root anew when it is asked to.
    pub(crate) reloads: bool,
    /// How often it was asked to.
    pub(crate) reloads_asked: u64,
}

/// The host.
pub(crate) struct TestHost {
    frames: SharedPool,
    tlb: TlbTracker,
    script: Mutex<Script>,
}

impl TestHost {
    pub(crate) fn new(frames: SharedPool) -> Self {
        Self {
            frames,
            tlb: TlbTracker::new(),
            script: Mutex::default(),
        }
    }

    pub(crate) fn tlb(&self) -> &TlbTracker {
        &self.tlb
    }

    pub(crate) fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().expect("no test panics while writing it")
    }

    pub(crate) fn set_answer(&self, answer: Answer) {
        self.script().answer = answer;
    }

    pub(crate) fn permit(&self, perms: Perms) {
        self.script().perms = Some(perms);
    }

    /// Flushes asked for since the last call.
    pub(crate) fn take_flushes(&self) -> Vec<FlushRequest> {
        std::mem::take(&mut self.script().flushes)
    }
}

impl Script {
    /// What backs `gfn`, the way the host would find it.
    pub(crate) fn mapping(&self, slot: &Slot<Memory>, gfn: Gfn) -> Mapping {
        let backing = *slot.backing();
        let at_first = backing.pfn.0 + slot.offset(gfn);
        let is_whole = |level: Level| {
            let start = at_first & !(level.pages() - 1);
            let mut moved = self.moved.range(start..start + level.pages());
            moved.next().is_none()
        };
        let mut level = backing.level;
        while level > Level::L1 && !is_whole(level) {
            level = level.below().unwrap_or(Level::L1);
        }
        Mapping {
            memory_type: self.memory_type,
            ..Mapping::memory(
                self.moved.get(&at_first).copied().unwrap_or(Pfn(at_first)),
                level,
                self.perms.unwrap_or(Perms::RWX),
            )
        }
    }
}

impl Host for TestHost {
    type Frames = SharedPool;
    type Backing = Memory;
    type Protected = Unprotected;

    fn protected(&self) -> &Unprotected {
        &Unprotected
    }

    fn frames(&self) -> &SharedPool {
        &self.frames
    }

    fn lookup(&self, slot: &Slot<Memory>, gfn: Gfn, access: Access) -> Lookup {
        let (lookup, hook) = {
            let mut script = self.script();
            script.lookups += 1;
            script.asked_for = Some(access);
            let lookup = match script.answer {
                Answer::Page => Lookup::Mapped(script.mapping(slot, gfn)),
                Answer::Fixed(lookup) => lookup,
                Answer::Blocking(_) => Lookup::Blocking,
            };
            (lookup, script.while_looking.take())
        };
        if let Some(hook) = hook {
            hook();
        }
        lookup
    }

    fn lookup_blocking(&self, slot: &Slot<Memory>, gfn: Gfn, _access: Access) -> Lookup {
        let (lookup, hook) = {
            let mut script = self.script();
            let lookup = match script.answer {
                Answer::Blocking(BlockingAnswer::Fixed(lookup)) => lookup,
                _ => Lookup::Mapped(script.mapping(slot, gfn)),
            };
            (lookup, script.while_asleep.take())
        };
        if let Some(hook) = hook {
            hook();
        }
        lookup
    }

    fn flush(&self, request: &FlushRequest) {
        let hook = {
            let mut script = self.script();
            script.flushes.push(*request);
            script.while_flushing.take()
        };
        if let Some(hook) = hook {
            hook();
        }
        self.tlb.track(|_| {});
    }

    fn reload_roots(&self) -> bool {
        let promised = {
            let mut script = self.script();
            script.reloads_asked += 1;
            script.reloads
        };
        if promised {
            self.tlb.track(|_| {});
        }
        promised
    }
}
