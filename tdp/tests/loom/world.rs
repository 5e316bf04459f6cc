//! What the models share: frames, host, processor, audit.
//!
//! Three things are checked all the time, by reads and writes of a loom cell that nothing but the MMU orders. A *table
//! frame* is read by whoever asks for its page and written by whoever gives it back; moreover a frame at home has no page,
//! and its entries are poisoned: who still walks it is led to a frame that does not exist. A *slot* is read by every
//! look-up and written when it is dropped. A *guest page* is read by the processor when it translates to it and written by
//! its owner once the MMU has promised that no vCPU can reach it.

#![allow(unsafe_code)]
// UNSAFETY: a frame source promises what its pages are.

use crate::module::{Manner, Module};
use loom::cell::UnsafeCell;
use loom::sync::Mutex;
use loom::sync::atomic::{AtomicU64, Ordering};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering as Plain};
use std::time::{Duration, Instant};
use tdp::{
    Access, AddressSpaceId, Decoded, DirtyTracking, Ept, FlushRequest, Format, FrameSource, Gfn,
    Host, Hpa, Level, Lookup, Mapping, OutOfFrames, Outcome, Perms, Pfn, Slot, SlotFlags,
    SlotRemoval, Spte, TableMemory, TablePage, TlbTracker, TlbVcpu, Visibility,
};
use tdp_arch::walker::PhysicalMemory;

pub(crate) type Mmu = tdp::Mmu<Ept, TestHost>;
pub(crate) type Vcpu = tdp::Vcpu<Ept, TestHost>;

pub(crate) const SPACE: AddressSpaceId = AddressSpaceId(0);
/// The two frames below the first entry of the root.
pub(crate) const A: Gfn = Gfn(0);
pub(crate) const B: Gfn = Gfn(1);
/// All frames that the models use.
pub(crate) const ALL: Range<Gfn> = Gfn(0)..Gfn(1024);
/// The frames below the first entry of the root: a zap of them unlinks the table.
pub(crate) const FIRST: Range<Gfn> = Gfn(0)..Gfn(512);

/// One frame.
pub(crate) fn only(gfn: Gfn) -> Range<Gfn> {
    gfn..Gfn(gfn.0 + 1)
}

/// Host frames that back the guest from frame 0 on, before and after the host has switched them. Aligned, so that large
/// leaves are possible.
pub(crate) const OLD: Pfn = Pfn(0x4000);
pub(crate) const NEW: Pfn = Pfn(0x8000);
/// Host frames that back its private half.
pub(crate) const PRIVATE: Pfn = Pfn(0xc000);

/// Stack of a model's first thread, in words of 8 bytes, as loom hands the number on.
const STACK_WORDS: usize = 1 << 14;

/// Explores a model and says how many executions it took.
pub(crate) fn explore(
    name: &str,
    preemptions: Option<usize>,
    model: impl Fn() + Send + Sync + 'static,
) {
    let executions = Arc::new(AtomicUsize::new(0));
    let count = executions.clone();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.max_duration = time_limit();
    // The time is looked at as often as this.
    builder.checkpoint_interval = 500;
    builder.max_branches = 20_000;
    let start = Instant::now();
    let model = Arc::new(model);
    builder.check(move || {
        count.fetch_add(1, Plain::Relaxed);
        let model = model.clone();
        // A thread of its own: the first thread's stack is small, and vCPUs that are handed about are not.
        let first = loom::thread::Builder::new().stack_size(STACK_WORDS);
        first.spawn(move || model()).unwrap().join().unwrap();
    });
    println!(
        "loom {name}: {} executions, {}{}, {:.1} s",
        executions.load(Plain::Relaxed),
        preemptions.map_or("exhaustive".into(), |bound| format!(
            "preemption bound {bound}"
        )),
        cut_off(start),
        start.elapsed().as_secs_f64(),
    );
}

/// What one model may take, from the environment; without it, as long as it needs.
fn time_limit() -> Option<Duration> {
    let seconds = std::env::var("MODEL_SECONDS").ok()?;
    let seconds = seconds.parse().expect("MODEL_SECONDS is a number");
    Some(Duration::from_secs(seconds))
}

/// Says so of a model that was not explored to its end.
fn cut_off(start: Instant) -> &'static str {
    let limit = time_limit().unwrap_or(Duration::MAX);
    if start.elapsed() >= limit {
        ", cut off"
    } else {
        ""
    }
}

const FIRST_FRAME: Pfn = Pfn(0x100);
const FRAMES: u64 = 20;
/// Leads to a table frame that does not exist, whoever follows it.
const POISON: Spte = Spte(1 << 11 | 0xbad << 12);

/// A frame source of a few boxed pages.
#[derive(Clone)]
pub(crate) struct Frames(Arc<Pages>);

struct Pages {
    pages: Vec<Frame>,
    /// loom's lock: a frame that comes back is handed out with all that was done to it.
    home: Mutex<Vec<Pfn>>,
}

struct Frame {
    page: Box<TablePage>,
    /// Read with every use of the frame, written when it is handed out and when it is given back.
    used: UnsafeCell<()>,
    out: AtomicBool,
}

// SAFETY: loom checks that every write of `used` is ordered against every other access, and a model runs its threads on
// one thread of the system.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Frames {
    fn new() -> Self {
        let frame = |_| Frame {
            page: Box::new(TablePage::zeroed()),
            used: UnsafeCell::new(()),
            out: AtomicBool::new(false),
        };
        Self(Arc::new(Pages {
            pages: (0..FRAMES).map(frame).collect(),
            home: Mutex::new((0..FRAMES).rev().map(|n| Pfn(FIRST_FRAME.0 + n)).collect()),
        }))
    }

    fn frame(&self, pfn: Pfn) -> &Frame {
        let number = pfn.0.checked_sub(FIRST_FRAME.0);
        let frame = number.and_then(|number| self.0.pages.get(number as usize));
        frame.unwrap_or_else(|| panic!("{pfn:?} was read from the entry of a frame that is gone"))
    }

    /// Frames that are out.
    pub(crate) fn out(&self) -> usize {
        let out = |frame: &&Frame| frame.out.load(Plain::Relaxed);
        self.0.pages.iter().filter(out).count()
    }
}

// SAFETY: a frame is in the list or out of it; its page is boxed and lives as long as the source.
unsafe impl FrameSource for Frames {
    fn window(&self) -> Range<Pfn> {
        FIRST_FRAME..Pfn(FIRST_FRAME.0 + FRAMES)
    }

    fn allocate(&self, out: &mut [Pfn]) -> Result<usize, OutOfFrames> {
        let mut home = self.0.home.lock().unwrap();
        // A few at a time: what a vCPU keeps in its cache is nothing that a model learns from. The frame that came home
        // last is the one that a cache hands out first.
        let count = out.len().min(home.len()).min(5);
        if count == 0 {
            let limit = FRAMES as usize;
            return Err(OutOfFrames { limit });
        }
        let rest = home.len() - count;
        for (slot, pfn) in out.iter_mut().zip(home.drain(rest..)) {
            let frame = self.frame(pfn);
            // Nobody else is to find it before its new owner says so.
            frame.used.with_mut(|_| ());
            let was_out = frame.out.swap(true, Plain::Relaxed);
            assert!(!was_out, "{pfn:?} is out already");
            *slot = pfn;
        }
        Ok(count)
    }

    fn free(&self, frames: &[Pfn]) {
        for &pfn in frames {
            let memory = TableMemory::new(self);
            for hpa in entries(pfn) {
                while let Some(old) = memory.load(hpa).filter(|&old| old != POISON.0) {
                    let _ = memory.compare_exchange(hpa, old, POISON.0);
                }
            }
            let frame = self.frame(pfn);
            frame.used.with_mut(|_| ());
            assert!(
                frame.out.swap(false, Plain::Relaxed),
                "{pfn:?} was freed twice"
            );
        }
        self.0.home.lock().unwrap().extend_from_slice(frames);
    }

    fn page(&self, pfn: Pfn) -> NonNull<TablePage> {
        let frame = self.frame(pfn);
        assert!(
            frame.out.load(Plain::Relaxed),
            "{pfn:?} is used after it was freed"
        );
        frame.used.with(|_| ());
        NonNull::from(&*frame.page)
    }
}

/// Addresses of the entries of a table.
fn entries(pfn: Pfn) -> [Hpa; 2] {
    [0, 8].map(|offset| Hpa(pfn.address().0 + offset))
}

/// What a slot knows: read by every look-up, written when the slot is dropped.
pub(crate) struct Backing(UnsafeCell<()>);

// SAFETY: as for `Pages`.
unsafe impl Sync for Backing {}

impl Backing {
    pub(crate) fn new() -> Self {
        Self(UnsafeCell::new(()))
    }
}

impl Clone for Backing {
    fn clone(&self) -> Self {
        Self::new()
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        self.0.with_mut(|_| ());
    }
}

/// A host of one kind of backing: consecutive frames from a base that can be switched.
pub(crate) struct TestHost {
    frames: Frames,
    /// Host frame of guest frame 0. Relaxed: the MMU has to order a switch against look-ups all by itself.
    base: AtomicU64,
    /// Largest leaf that the backing allows.
    level: Level,
    /// Permissions that the host gives, by access.
    perms: fn(Access) -> Perms,
    /// Look-ups have to sleep.
    sleeps: bool,
    /// vCPUs can be made to leave obsolete roots.
    reloads: bool,
    tlb: TlbTracker,
    /// The module of a confidential guest.
    pub(crate) module: Module,
    /// Guest pages behind [`OLD`]: read by the processor, written by the owner who took them away.
    pages: [UnsafeCell<()>; 2],
}

// SAFETY: as for `Pages`.
unsafe impl Sync for TestHost {}

impl TestHost {
    pub(crate) fn new() -> Self {
        Self {
            frames: Frames::new(),
            base: AtomicU64::new(OLD.0),
            level: Level::L1,
            perms: |_| Perms::RWX,
            sleeps: false,
            reloads: false,
            tlb: TlbTracker::new(),
            module: Module::new(Manner::default()),
            pages: [(); 2].map(UnsafeCell::new),
        }
    }

    /// A module of this manner.
    pub(crate) fn manner(mut self, manner: Manner) -> Self {
        self.module = Module::new(manner);
        self
    }

    /// Leaves up to `level`.
    pub(crate) fn level(mut self, level: Level) -> Self {
        self.level = level;
        self
    }

    /// A page is given for writing only to who writes.
    pub(crate) fn copy_on_write(mut self) -> Self {
        self.perms = |access| match access {
            Access::Write => Perms::RWX,
            _ => Perms::RX,
        };
        self
    }

    /// Each access gets what it needs beyond reading, and no more.
    pub(crate) fn by_access(mut self) -> Self {
        self.perms = |access| Perms::READ.union(access.needs());
        self
    }

    /// Look-ups have to sleep.
    pub(crate) fn sleeps(mut self) -> Self {
        self.sleeps = true;
        self
    }

    /// vCPUs can be made to leave obsolete roots, and slots go that way.
    pub(crate) fn reloads(mut self) -> Self {
        self.reloads = true;
        self
    }

    /// Switches the backing.
    pub(crate) fn switch(&self) {
        self.base.store(NEW.0, Ordering::Relaxed);
    }

    /// What the owner of the old page of `gfn` does with it once no vCPU can reach it.
    pub(crate) fn take_page(&self, gfn: Gfn) {
        self.pages[gfn.0 as usize].with_mut(|_| ());
    }

    fn find(&self, gfn: Gfn, access: Access) -> Lookup {
        let pfn = Pfn(self.base.load(Ordering::Relaxed) + gfn.0);
        Lookup::Mapped(Mapping::memory(pfn, self.level, (self.perms)(access)))
    }
}

impl Host for TestHost {
    type Frames = Frames;
    type Backing = Backing;
    type Protected = Module;

    fn protected(&self) -> &Module {
        &self.module
    }

    fn lookup_private(&self, slot: &Slot<Backing>, gfn: Gfn) -> Lookup {
        slot.backing().0.with(|_| ());
        Lookup::Mapped(Mapping::memory(
            Pfn(PRIVATE.0 + gfn.0),
            self.level,
            Perms::RWX,
        ))
    }

    fn frames(&self) -> &Frames {
        &self.frames
    }

    fn lookup(&self, slot: &Slot<Backing>, gfn: Gfn, access: Access) -> Lookup {
        slot.backing().0.with(|_| ());
        if self.sleeps {
            Lookup::Blocking
        } else {
            self.find(gfn, access)
        }
    }

    fn lookup_blocking(&self, slot: &Slot<Backing>, gfn: Gfn, access: Access) -> Lookup {
        slot.backing().0.with(|_| ());
        self.find(gfn, access)
    }

    fn flush(&self, _request: &FlushRequest) {
        self.tlb.track(|_| {});
    }

    fn reload_roots(&self) -> bool {
        if self.reloads {
            self.tlb.track(|_| {});
        }
        self.reloads
    }
}

/// One MMU of one execution, with a root of level 2.
pub(crate) struct World {
    pub(crate) mmu: Mmu,
    frames: Frames,
}

impl World {
    /// A world without slots, in which whatever is retired is freed as soon as it may be.
    pub(crate) fn new(host: TestHost) -> Self {
        Self::bounded(host, 1)
    }

    /// A world without slots whose next change of slots begins an age of MMIO entries. Nothing is freed before the end.
    pub(crate) fn before_an_age() -> Self {
        let host = TestHost::new();
        let frames = host.frames.clone();
        let builder = Mmu::builder(host)
            .levels(Level::L2)
            .slot_generation((1 << 18) - 1);
        let mmu = builder.garbage_bound(1 << 20).build().unwrap();
        Self { mmu, frames }
    }

    fn bounded(host: TestHost, garbage: usize) -> Self {
        let frames = host.frames.clone();
        let slot_removal = match host.reloads {
            true => SlotRemoval::InvalidateRoots,
            false => SlotRemoval::Zap,
        };
        let builder = Mmu::builder(host)
            .levels(Level::L2)
            .slot_removal(slot_removal);
        let mmu = builder.garbage_bound(garbage).build().unwrap();
        Self { mmu, frames }
    }

    /// A world with a slot over all frames, in which whatever is retired is freed as soon as it may be.
    pub(crate) fn with_memory(host: TestHost) -> Self {
        Self::with_memory_below(host, ALL)
    }

    /// The same with a slot over some frames.
    pub(crate) fn with_memory_below(host: TestHost, gfns: Range<Gfn>) -> Self {
        Self::new(host).and_memory(gfns)
    }

    /// The same, but nothing is freed before the end: for models of something else, in which two threads would meet in
    /// the collector more often than anywhere else.
    pub(crate) fn with_memory_and_patience(host: TestHost) -> Self {
        Self::bounded(host, 1 << 20).and_memory(ALL)
    }

    /// A world of one page, [`A`], whose writes are logged if `logged`; with rings of four entries if `rings`. Nothing is
    /// freed before the end.
    pub(crate) fn with_log(tracking: DirtyTracking, rings: bool, logged: bool) -> Self {
        let host = TestHost::new();
        let frames = host.frames.clone();
        let builder = Mmu::builder(host)
            .levels(Level::L2)
            .dirty_tracking(tracking)
            .dirty_ring(if rings { 4 } else { 0 })
            .garbage_bound(1 << 20);
        let mmu = builder.build().unwrap();
        let flags = if logged {
            SlotFlags::LOG_DIRTY
        } else {
            SlotFlags::empty()
        };
        let slot = Slot::new(only(A), Backing::new()).with_flags(flags);
        mmu.slots().insert(slot).unwrap();
        Self { mmu, frames }
    }

    /// A running confidential guest, private throughout, with a slot over all frames. Nothing is freed before the end
    /// unless `frees`.
    pub(crate) fn confidential(manner: Manner, frees: bool) -> Self {
        let level = if manner.large { Level::L2 } else { Level::L1 };
        let host = TestHost::new().manner(manner).level(level);
        let frames = host.frames.clone();
        let builder = Mmu::builder(host)
            .levels(Level::L2)
            .private_by_fault()
            .default_visibility(Visibility::Private)
            .garbage_bound(if frees { 1 } else { 1 << 20 });
        let mmu = builder.build().unwrap();
        mmu.build_private().unwrap().finalise().unwrap();
        Self { mmu, frames }.and_memory(ALL)
    }

    /// The protected table equals the private one, books and trees agree.
    pub(crate) fn audit_private(&self) {
        let audit = self.mmu.audit_protected(SPACE);
        assert_eq!(audit.different, 0, "{audit:?}");
        let (audit, stats) = (self.mmu.audit(), self.mmu.stats());
        assert_eq!((audit.frozen, audit.misplaced, audit.unknown), (0, 0, 0));
        assert_eq!((audit.pages, audit.tables), (stats.pages, stats.tables));
    }

    fn and_memory(self, gfns: Range<Gfn>) -> Self {
        let slot = Slot::new(gfns, Backing::new());
        self.mmu.slots().insert(slot).unwrap();
        self
    }

    /// Frees what may be freed, waiting for no section. Each insertion of a slot retires the map before it; the second
    /// passes the mark at which the domain is driven again.
    pub(crate) fn drive(&self) {
        for gfn in [ALL.end, Gfn(ALL.end.0 + 1)] {
            let slot = Slot::new(only(gfn), Backing::new());
            self.mmu.slots().insert(slot).unwrap();
        }
    }

    /// Frees what may be freed, waiting for no visit and without one of its own: each invalidation that begins beside
    /// another retires a list. They last until the end of the execution.
    pub(crate) fn drive_past_visits(&self) {
        for _ in 0..3 {
            std::mem::forget(self.mmu.invalidate_begin(SPACE, only(FIRST.end)));
        }
    }

    /// A vCPU whose cache is full.
    pub(crate) fn vcpu(&self) -> Vcpu {
        let mut vcpu = self.mmu.vcpu().unwrap();
        drop(vcpu.batch().unwrap());
        vcpu
    }

    /// A processor that runs under the root of `vcpu`.
    pub(crate) fn processor(&self, vcpu: &mut Vcpu) -> Processor {
        Processor {
            mmu: self.mmu.clone(),
            tlb: self.mmu.host().tlb.vcpu(),
            root: vcpu.load_root().unwrap().hpa.pfn(),
        }
    }

    /// The leaf of a frame, read as the processor would.
    pub(crate) fn leaf(&self, vcpu: &mut Vcpu, gfn: Gfn) -> Option<(Pfn, Perms)> {
        let root = vcpu.load_root().unwrap().hpa.pfn();
        translate(&self.frames, root, gfn)
    }

    /// The entry in which the walk for a frame ends.
    pub(crate) fn entry(&self, vcpu: &mut Vcpu, gfn: Gfn) -> Spte {
        let root = vcpu.load_root().unwrap().hpa.pfn();
        walk(&self.frames, root, gfn).2
    }

    /// Clears the dirty bit of a frame's leaf.
    pub(crate) fn clear_dirty(&self, vcpu: &mut Vcpu, gfn: Gfn) {
        let root = vcpu.load_root().unwrap().hpa.pfn();
        let (hpa, _, spte) = walk(&self.frames, root, gfn);
        let clean = spte.0 & !Ept::DIRTY;
        let memory = TableMemory::new(&self.frames);
        assert_eq!(memory.compare_exchange(hpa, spte.0, clean), Ok(()));
    }

    /// Compares the tree with the counters and with what the MMU shows. Nobody else is at work.
    pub(crate) fn audit(&self, vcpu: &mut Vcpu) -> Tree {
        let root = vcpu.load_root().unwrap();
        let mut tree = Tree::default();
        tree.walk(&self.frames, root.hpa.pfn(), root.level);
        let stats = self.mmu.stats();
        assert_eq!(stats.tables, tree.tables, "tables counted");
        assert_eq!(stats.pages, [tree.small, tree.large, 0], "leaves counted");
        let audit = self.mmu.audit();
        assert_eq!((audit.tables, audit.pages), (stats.tables, stats.pages));
        assert_eq!((audit.misplaced, audit.unknown), (0, 0), "{audit:?}");
        tree
    }

    /// Ends the execution: everything is freed, once.
    pub(crate) fn finish(self, vcpus: impl IntoIterator<Item = Vcpu>) {
        vcpus.into_iter().for_each(drop);
        drop(self.mmu);
        assert_eq!(self.frames.out(), 0, "frames that never came home");
    }
}

/// What hangs below a root.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    /// Tables, the root not counted.
    pub(crate) tables: u64,
    /// Leaves of level 1.
    pub(crate) small: u64,
    /// Leaves of level 2.
    pub(crate) large: u64,
}

impl Tree {
    fn walk(&mut self, frames: &Frames, table: Pfn, level: Level) {
        for hpa in entries(table) {
            let spte = Spte(TableMemory::new(frames).load(hpa).unwrap());
            match Ept::decode(spte, level) {
                Decoded::Empty | Decoded::Mmio(_) => {}
                Decoded::Table(below) => {
                    self.tables += 1;
                    self.walk(frames, below, level.below().unwrap());
                }
                Decoded::Leaf { .. } if level == Level::L1 => self.small += 1,
                Decoded::Leaf { .. } => self.large += 1,
                other => panic!("{other:?} in a table that is linked"),
            }
        }
    }
}

/// Where a walk for a frame ends, by loads of the entries and nothing else.
fn walk(frames: &Frames, root: Pfn, gfn: Gfn) -> (Hpa, Level, Spte) {
    let memory = TableMemory::new(frames);
    let (mut table, mut level) = (root, Level::L2);
    loop {
        let hpa = entries(table)[level.index(gfn)];
        let spte = Spte(memory.load(hpa).unwrap());
        match (Ept::decode(spte, level), level.below()) {
            (Decoded::Table(below), Some(level_below)) => (table, level) = (below, level_below),
            _ => return (hpa, level, spte),
        }
    }
}

/// The leaf of a frame below a root.
fn translate(frames: &Frames, root: Pfn, gfn: Gfn) -> Option<(Pfn, Perms)> {
    let (_, level, spte) = walk(frames, root, gfn);
    match Ept::decode(spte, level) {
        Decoded::Leaf { pfn, perms, .. } => {
            Some((Pfn(pfn.0 + (gfn.0 & (level.pages() - 1))), perms))
        }
        _ => None,
    }
}

/// A processor that runs a guest: in no critical section, held off by nothing but TLB tracking.
pub(crate) struct Processor {
    mmu: Mmu,
    tlb: TlbVcpu,
    root: Pfn,
}

impl Processor {
    /// Enters the guest, translates a frame, touches the page behind it, leaves.
    pub(crate) fn touch(&mut self, gfn: Gfn) {
        // Its TLB holds one translation, made below and gone at the end, so there is nothing to flush.
        let _ = self.tlb.enter();
        self.translate_and_leave(gfn);
    }

    /// The same under the root that its vCPU has now, looked at once more on the way in.
    pub(crate) fn touch_under_new_root(&mut self, vcpu: &mut Vcpu, gfn: Gfn) {
        loop {
            self.root = vcpu.load_root().unwrap().hpa.pfn();
            let _ = self.tlb.enter();
            if !vcpu.is_root_obsolete() {
                break;
            }
            self.tlb.exit();
        }
        self.translate_and_leave(gfn);
    }

    fn translate_and_leave(&mut self, gfn: Gfn) {
        let host = self.mmu.host();
        if let Some((pfn, _)) = translate(&host.frames, self.root, gfn)
            && let Some(page) = host.pages.get(pfn.0.wrapping_sub(OLD.0) as usize)
        {
            page.with(|_| ());
        }
        self.tlb.exit();
    }

    /// Sets the dirty bit of a frame's leaf, as a write of the guest does, if the leaf permits writing.
    pub(crate) fn set_dirty(&mut self, gfn: Gfn) -> bool {
        self.write(gfn, || {})
    }

    /// The same, and what the guest writes.
    pub(crate) fn write(&mut self, gfn: Gfn, store: impl FnOnce()) -> bool {
        let frames = &self.mmu.host().frames;
        let _ = self.tlb.enter();
        let set = loop {
            let (hpa, level, spte) = walk(frames, self.root, gfn);
            if !Ept::is_leaf(spte, level) || spte.0 & Ept::WRITABLE == 0 {
                break false;
            }
            // Whatever it finds instead, it walks again.
            let dirty = spte.0 | Ept::DIRTY;
            if TableMemory::new(frames)
                .compare_exchange(hpa, spte.0, dirty)
                .is_ok()
            {
                break true;
            }
        };
        if set {
            store();
        }
        self.tlb.exit();
        set
    }
}

/// Says whether a fault left the access possible.
#[track_caller]
pub(crate) fn settled(outcome: Outcome) -> bool {
    match outcome {
        Outcome::Fixed { .. } | Outcome::Spurious => true,
        Outcome::Retry(_) => false,
        other => panic!("{other:?}"),
    }
}
