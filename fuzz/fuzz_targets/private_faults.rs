//! The private half with a failure injected at any step: a call of the module that is busy, interrupted, refused or panics,
//! a frame source that has nothing or panics.
//!
//! After every operation in which something failed, every few others and the last one the protected table equals the private
//! one, books and trees agree, nothing stays frozen, and the module has nothing to complain of. An operation into which nothing was injected comes to what the
//! documentation says. In the end the guest is taken apart: every page, every twin and every frame is where it came from.
#![no_main]

#[path = "../../tdp/tests/common/mod.rs"]
mod common;

use arbitrary::Arbitrary;
use common::host::SharedPool;
use common::rig::pool;
use libfuzzer_sys::fuzz_target;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, LazyLock};
use tdp::protected::tdx::{
    Call, Hooks, Operand, PageInfo, Status, Td, TdConfig, TdVcpu, TdxConfig, TdxModule, TdxTable,
};
use tdp::{
    Access, AddressSpaceId, Ept, Fault, FlushRequest, FrameSource, Gfn, GfnRange, Gpa, Host, Hpa,
    Level, LinearBacking, Lookup, Mapping, MemoryFault, Mmu, OutOfFrames, Outcome, Perms, Pfn,
    Slot, TablePage, TlbTracker, Vcpu, Visibility,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const SHARED: u64 = 1 << 47;
/// Frames of the guest: 8 MiB.
const GUEST: u64 = 1 << 11;
const SHARED_PFN: Pfn = Pfn(0x8_0000);
/// Memory that the module manages: control pages, twins of tables, and from `PRIVATE` on the private half.
const MODULE: u64 = 0x10_0000;
const TWINS: Range<Pfn> = Pfn(MODULE + 0x10)..Pfn(MODULE + 0x80);
const PRIVATE: Pfn = Pfn(MODULE + 0x200);
const MOST_OPS: usize = 24;
const FRAMES: usize = 256;
/// After so many operations into which nothing was injected all is compared; to look at everything takes longer than to do it.
const COMPARE_AFTER: usize = 8;

static POOL: LazyLock<SharedPool> = LazyLock::new(|| pool(FRAMES));

#[derive(Debug, Arbitrary)]
struct Input {
    large: bool,
    ops: Vec<Op>,
}

#[derive(Clone, Copy, Debug, Arbitrary)]
enum Op {
    Private {
        at: u8,
        level: u8,
    },
    Shared {
        at: u8,
    },
    Prefault {
        at: u8,
        pages: u8,
        private: bool,
    },
    Convert {
        at: u8,
        pages: u8,
        private: bool,
    },
    ZapPrivate {
        at: u8,
        pages: u8,
    },
    Zap {
        at: u8,
        pages: u8,
    },
    Fold {
        at: u8,
        pages: u8,
    },
    Accept {
        at: u8,
        level: u8,
    },
    AllowHuge {
        at: u8,
    },
    RemoveSlot,
    InsertSlot,
    /// The call of the module that is so many calls ahead fails.
    Inject {
        after: u8,
        how: u8,
    },
    /// The frames that are asked for so many times from now are not there.
    Starve {
        after: u8,
        panic: bool,
    },
}

fn gfn(at: u8) -> u64 {
    match at {
        0..0xc0 => u64::from(at % 8),
        0xc0..0xe0 => 0x1fc + u64::from(at % 8),
        0xe0..0xf8 => 0x200 * u64::from(at % 4),
        _ => GUEST - 2 + u64::from(at % 4),
    }
}

fn range(at: u8, pages: u8) -> GfnRange {
    let pages = match pages {
        0..0xc0 => u64::from(pages % 12),
        0xc0..0xf0 => 0x200,
        _ => 0x400,
    };
    GfnRange::new(Gfn(gfn(at)), pages).unwrap_or_default()
}

/// What fails, and when: how many times until then, `u32::MAX` for never.
#[derive(Debug, Default)]
struct Plan {
    calls: AtomicU32,
    how: AtomicU32,
    frames: AtomicU32,
    frames_panic: AtomicBool,
    fired: AtomicBool,
}

/// Not a failure of a test: what the injected panics carry, so that the fuzzer's hook does not see them.
struct Injected;

impl Plan {
    fn clear(&self) {
        self.calls.store(u32::MAX, Relaxed);
        self.frames.store(u32::MAX, Relaxed);
    }

    /// Whether this is the time that was meant.
    fn is_due(&self, left: &AtomicU32) -> bool {
        match left.load(Relaxed) {
            u32::MAX => false,
            0 => {
                left.store(u32::MAX, Relaxed);
                self.fired.store(true, Relaxed);
                true
            }
            n => {
                left.store(n - 1, Relaxed);
                false
            }
        }
    }
}

/// May a call of this kind be refused for good? What takes away may not, once it is begun.
fn may_refuse(call: Call) -> bool {
    matches!(
        call,
        Call::MemSeptAdd | Call::MemPageAug | Call::MemPageDemote | Call::MemPagePromote
    ) || call == Call::MemRangeBlock
}

#[derive(Clone)]
struct Script(Arc<Plan>);

impl Hooks for Script {
    fn refuse(&self, call: Call) -> Option<(Status, Operand)> {
        let plan = &self.0;
        if plan.how.load(Relaxed) % 5 == 4 || !plan.is_due(&plan.calls) {
            return None;
        }
        match plan.how.load(Relaxed) % 5 {
            0 if may_refuse(call) => Some((Status::OperandInvalid, Operand::RCX)),
            1 => Some((Status::InterruptedRestartable, Operand::NONE)),
            2 => resume_unwind(Box::new(Injected)),
            _ => Some(match call {
                Call::MemRangeBlock => (Status::OperandBusy, Operand::SEPT_TREE),
                Call::MemTrack => (Status::OperandBusy, Operand::TD_EPOCH),
                _ => (Status::OperandBusy, Operand::RCX),
            }),
        }
    }

    fn inside(&self, _call: Call) {
        let plan = &self.0;
        if plan.how.load(Relaxed) % 5 == 4 && plan.is_due(&plan.calls) {
            resume_unwind(Box::new(Injected));
        }
    }
}

/// Frames that fail when the plan says so.
struct Frames {
    pool: SharedPool,
    plan: Arc<Plan>,
}

// SAFETY: every promise is the pool's own; refusing and panicking are always allowed.
unsafe impl FrameSource for Frames {
    fn window(&self) -> Range<Pfn> {
        self.pool.window()
    }

    fn allocate(&self, out: &mut [Pfn]) -> Result<usize, OutOfFrames> {
        if self.plan.is_due(&self.plan.frames) {
            if self.plan.frames_panic.load(Relaxed) {
                resume_unwind(Box::new(Injected));
            }
            return Err(OutOfFrames { limit: FRAMES });
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

struct GuestHost {
    frames: Frames,
    tlb: TlbTracker,
    table: TdxTable,
}

impl Host for GuestHost {
    type Frames = Frames;
    type Backing = LinearBacking;
    type Protected = TdxTable;

    fn frames(&self) -> &Frames {
        &self.frames
    }

    fn protected(&self) -> &TdxTable {
        &self.table
    }

    fn lookup(&self, slot: &Slot<LinearBacking>, gfn: Gfn, _access: Access) -> Lookup {
        let pfn = Pfn(SHARED_PFN.0 + slot.offset(gfn));
        Lookup::Mapped(Mapping::memory(pfn, slot.backing().level, Perms::RWX))
    }

    fn lookup_private(&self, slot: &Slot<LinearBacking>, gfn: Gfn) -> Lookup {
        let pfn = Pfn(PRIVATE.0 + slot.offset(gfn));
        Lookup::Mapped(Mapping::memory(pfn, slot.backing().level, Perms::RWX))
    }

    fn flush(&self, _request: &FlushRequest) {
        self.tlb.track(|_| {});
    }
}

type GuestMmu = Mmu<Ept, GuestHost>;

struct Guest {
    plan: Arc<Plan>,
    module: TdxModule,
    td: Td,
    td_vcpu: TdVcpu,
    /// Pages of the TD that are not memory of the guest.
    own_pages: u64,
    level: Level,
    mmu: GuestMmu,
    vcpu: Vcpu<Ept, GuestHost>,
    has_slot: bool,
    /// Whether a guest that nothing happened to is known to be as the documentation says.
    shared: Vec<bool>,
}

impl Guest {
    fn new(large: bool) -> Self {
        let plan = Arc::<Plan>::default();
        plan.clear();
        let config = TdxConfig::new(Pfn(MODULE)..Pfn(PRIVATE.0 + GUEST));
        let module = TdxModule::with_hooks(config, Script(plan.clone())).expect("memory");
        let page = |n: u64| Hpa((MODULE + n) << 12);
        let td = module
            .create_td(TdConfig::new(page(0), page(1), page(2)))
            .expect("free pages");
        assert!(td.mng_init().is_success());
        let td_vcpu = td.vp_create(page(3)).expect("a free page");
        let tlb = TlbTracker::new();
        let host = GuestHost {
            frames: Frames {
                pool: POOL.clone(),
                plan: plan.clone(),
            },
            table: TdxTable::new(td.clone(), tlb.clone(), TWINS),
            tlb,
        };
        let mmu = GuestMmu::builder(host)
            .shared_bit(47)
            .default_visibility(Visibility::Private)
            .garbage_bound(4)
            .build()
            .expect("a possible set-up");
        let mut image = mmu.build_private().expect("a guest that is being built");
        image.finalise().expect("an empty image");
        drop(image);
        let vcpu = mmu.vcpu().expect("a frame for the root");
        let mut guest = Self {
            own_pages: td.child_count(),
            plan,
            module,
            td,
            td_vcpu,
            level: if large { Level::L2 } else { Level::L1 },
            mmu,
            vcpu,
            has_slot: false,
            shared: vec![false; GUEST as usize],
        };
        guest.insert_slot();
        guest
    }

    fn insert_slot(&mut self) {
        let backing = LinearBacking::new(SHARED_PFN, self.level).with_private(PRIVATE);
        let slot = Slot::new(Gfn(0)..Gfn(GUEST), backing);
        self.has_slot |= self.mmu.slots().insert(slot).is_ok();
    }

    fn fault(&mut self, n: u64, private: bool, level: Level) {
        let gpa = Gfn(n).address().0 | if private { 0 } else { SHARED };
        let outcome = self.vcpu.fault(Fault::write(Gpa(gpa)).max_level(level));
        if self.plan.fired.load(Relaxed) {
            return;
        }
        let known = self.shared.get(n as usize).copied();
        match (known, outcome.expect("frames for tables")) {
            (Some(shared), Outcome::Fixed { .. } | Outcome::Spurious) => {
                assert!(self.has_slot && shared != private, "{n:#x}");
            }
            (Some(true), Outcome::MemoryFault(MemoryFault::IsShared)) => assert!(private),
            (Some(false), Outcome::MemoryFault(MemoryFault::IsPrivate)) => assert!(!private),
            (_, Outcome::MemoryFault(MemoryFault::NotBacked) | Outcome::Mmio { .. }) => {
                assert!(!self.has_slot || known.is_none(), "{n:#x}");
            }
            (None, _) => {}
            (_, other) => panic!("{n:#x}, private: {private}: {other:?}"),
        }
    }

    fn convert(&mut self, range: GfnRange, to: Visibility) {
        let done = self.mmu.convert(SPACE, range, to);
        if done.is_ok() {
            let end = range.end.0.min(GUEST);
            for n in range.start.0.min(end)..end {
                self.shared[n as usize] = to == Visibility::Shared;
            }
        } else if !range.is_empty() {
            assert!(self.plan.fired.load(Relaxed), "{done:?}");
        }
    }

    fn step(&mut self, op: Op) {
        let visibility = |private| match private {
            true => Visibility::Private,
            false => Visibility::Shared,
        };
        let level = |n: u8| {
            if n.is_multiple_of(3) {
                Level::L2
            } else {
                Level::L1
            }
        };
        match op {
            Op::Private { at, level: n } => self.fault(gfn(at), true, level(n)),
            Op::Shared { at } => self.fault(gfn(at), false, Level::L2),
            Op::Prefault { at, pages, private } => {
                let _ = self
                    .vcpu
                    .prefault(range(at, pages % 0xd0), visibility(private));
            }
            Op::Convert { at, pages, private } => {
                self.convert(range(at, pages), visibility(private));
            }
            Op::ZapPrivate { at, pages } => {
                let range = range(at, pages);
                let done = self.mmu.zap_private(SPACE, range);
                let fired = self.plan.fired.load(Relaxed);
                assert!(done.is_ok() || fired || range.is_empty(), "{done:?}");
            }
            Op::Zap { at, pages } => {
                self.mmu.zap(SPACE, range(at, pages)).flush();
            }
            Op::Fold { at, pages } => {
                let _ = self.mmu.fold_private(SPACE, range(at, pages));
            }
            Op::Accept { at, level: n } => {
                let info = PageInfo::new(Gfn(gfn(at)).address(), level(n));
                let _ = self.td.page_accept(info);
            }
            Op::AllowHuge { at } => self.mmu.allow_huge(Gfn(gfn(at))),
            Op::RemoveSlot => {
                let ids: Vec<_> = self
                    .mmu
                    .slots()
                    .list(SPACE)
                    .iter()
                    .map(|s| s.id())
                    .collect();
                for id in ids {
                    self.has_slot &= self.mmu.slots().remove(SPACE, id).is_err();
                }
            }
            Op::InsertSlot => self.insert_slot(),
            Op::Inject { after, how } => {
                self.plan.how.store(u32::from(how), Relaxed);
                self.plan.calls.store(u32::from(after % 24), Relaxed);
            }
            Op::Starve { after, panic } => {
                self.plan.frames_panic.store(panic, Relaxed);
                self.plan.frames.store(u32::from(after % 4), Relaxed);
            }
        }
    }

    fn check(&mut self) {
        let audit = self.mmu.audit_protected(SPACE);
        assert_eq!(audit.different, 0, "{audit:?}");
        let (audit, stats) = (self.mmu.audit(), self.mmu.stats());
        assert_eq!((audit.frozen, audit.misplaced, audit.unknown), (0, 0, 0));
        assert_eq!((audit.pages, audit.tables), (stats.pages, stats.tables));
        assert_eq!(self.module.violations(), []);
    }

    fn run(&mut self, op: Op, compare: bool) {
        self.plan.fired.store(false, Relaxed);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.step(op))) {
            assert!(panic.is::<Injected>(), "a panic of the library");
        }
        if self.plan.fired.load(Relaxed) {
            // How far it got is for the MMU to say.
            self.has_slot = !self.mmu.slots().list(SPACE).is_empty();
            for (n, shared) in self.shared.iter_mut().enumerate() {
                *shared = self.mmu.visibility(Gfn(n as u64)) == Some(Visibility::Shared);
            }
        }
        if compare || self.plan.fired.load(Relaxed) {
            self.check();
        }
    }

    fn take_apart(self) {
        let Self {
            plan,
            module,
            td,
            td_vcpu,
            own_pages,
            mmu,
            vcpu,
            ..
        } = self;
        plan.clear();
        drop(vcpu);
        drop(td_vcpu);
        assert!(td.mng_vpflushdone().is_success());
        assert!(td.phymem_cache_wb().is_success());
        assert!(td.mng_key_freeid().is_success());
        let removed = mmu
            .reclaim_private()
            .expect("a module that takes every call");
        assert_eq!(removed.leaked, 0);
        assert_eq!(td.child_count(), own_pages, "pages left with the TD");
        assert_eq!(mmu.host().table.twins_out(), 0, "twins lost");
        assert_eq!(module.violations(), []);
        drop(mmu);
        assert_eq!(POOL.allocated(), 0, "frames lost");
    }
}

fuzz_target!(|input: Input| {
    let mut guest = Guest::new(input.large);
    let ops = input.ops.get(..MOST_OPS).unwrap_or(&input.ops);
    for (n, &op) in ops.iter().enumerate() {
        let all = n % COMPARE_AFTER == COMPARE_AFTER - 1;
        guest.run(op, all || n + 1 == ops.len());
    }
    guest.take_apart();
});
