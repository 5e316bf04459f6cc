//! A confidential guest on the model of the TDX module, with faults to be injected into the module's calls.

use std::sync::{Arc, Mutex};
use tdp::protected::tdx::{
    Accept, Call, Costs, Hooks, Operand, PageInfo, Status, TdConfig, TdVcpu, TdxConfig, TdxModule,
    TdxTable,
};
use tdp::{
    AddressSpaceId, Ept, Fault, Gfn, Gpa, Hpa, Level, LinearBacking, MmapPool, Mmu, Outcome, Pfn,
    PoolConfig, Slot, SoftwareHost, TlbTracker, Visibility,
};

pub(crate) type Host = SoftwareHost<TdxTable>;
pub(crate) type TestMmu = Mmu<Ept, Host>;
pub(crate) type Vcpu = tdp::Vcpu<Ept, Host>;

pub(crate) const SPACE: AddressSpaceId = AddressSpaceId(0);
/// The bit of an address that makes it shared.
pub(crate) const SHARED: u64 = 1 << 47;
/// Frames of the guest: 64 MiB.
pub(crate) const GUEST: u64 = 1 << 14;
/// Host frames behind its shared half.
pub(crate) const SHARED_PFN: Pfn = Pfn(0x8_0000);
/// Memory that the module manages: control pages, twins of tables, and from `PRIVATE_PFN` on the private half.
const MODULE: u64 = 0x10_0000;
const TWINS: std::ops::Range<Pfn> = Pfn(MODULE + 0x100)..Pfn(MODULE + 0x1000);
pub(crate) const PRIVATE_PFN: Pfn = Pfn(MODULE + 0x2000);
const MODULE_END: Pfn = Pfn(PRIVATE_PFN.0 + GUEST);

type Body = Box<dyn FnMut(Call) + Send>;
type Injected = Box<dyn FnMut(Call) -> Option<(Status, Operand)> + Send>;

/// What the next calls are to be answered, and what is to happen inside them.
#[derive(Clone, Default)]
pub(crate) struct Script {
    refuse: Arc<Mutex<Option<Injected>>>,
    inside: Arc<Mutex<Option<Body>>>,
}

impl Script {
    /// Asks `answer` before every call.
    pub(crate) fn refuse(
        &self,
        answer: impl FnMut(Call) -> Option<(Status, Operand)> + Send + 'static,
    ) {
        *self.refuse.lock().unwrap() = Some(Box::new(answer));
    }

    /// Runs `body` inside every call, with the call's locks held.
    pub(crate) fn inside(&self, body: impl FnMut(Call) + Send + 'static) {
        *self.inside.lock().unwrap() = Some(Box::new(body));
    }

    /// Panics in the next `call`.
    pub(crate) fn panic_in(&self, call: Call) {
        let mut armed = true;
        self.inside(move |now| {
            if now == call && std::mem::take(&mut armed) {
                panic!("the hook panics");
            }
        });
    }

    pub(crate) fn clear(&self) {
        *self.refuse.lock().unwrap_or_else(|e| e.into_inner()) = None;
        *self.inside.lock().unwrap_or_else(|e| e.into_inner()) = None;
    }
}

impl Hooks for Script {
    fn refuse(&self, call: Call) -> Option<(Status, Operand)> {
        let mut refuse = self.refuse.lock().unwrap_or_else(|e| e.into_inner());
        refuse.as_mut().and_then(|answer| answer(call))
    }

    fn inside(&self, call: Call) {
        // Taken out while it runs: it may panic, or look at the script.
        let body = self.inside.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(mut body) = body {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(call)));
            self.inside
                .lock()
                .unwrap_or_else(|e| e.into_inner())
                .get_or_insert(body);
            if let Err(panic) = result {
                std::panic::resume_unwind(panic);
            }
        }
    }
}

pub(crate) struct Rig {
    pub(crate) module: TdxModule,
    pub(crate) mmu: TestMmu,
    pub(crate) script: Script,
    pub(crate) td_vcpu: Option<TdVcpu>,
}

impl Rig {
    /// A guest that is being built, private throughout, by leaves up to `level`.
    pub(crate) fn building(level: Level) -> Self {
        Self::with_costs(level, Costs::default())
    }

    pub(crate) fn with_costs(level: Level, costs: Costs) -> Self {
        Self::made(level, costs, false)
    }

    /// A guest that is being built by small pages whose content is measured.
    pub(crate) fn measuring() -> Self {
        Self::made(Level::L1, Costs::default(), true)
    }

    fn made(level: Level, costs: Costs, measuring: bool) -> Self {
        let script = Script::default();
        let config = TdxConfig {
            memory: Pfn(MODULE)..MODULE_END,
            costs,
        };
        let module = TdxModule::with_hooks(config, script.clone()).unwrap();
        let page = |n: u64| Hpa((MODULE + n) << 12);
        let td = module
            .create_td(TdConfig::new(page(0), page(1), page(2)))
            .unwrap();
        assert!(td.mng_init().is_success());
        let td_vcpu = td.vp_create(page(3)).unwrap();
        let tlb = TlbTracker::new();
        let frames = MmapPool::new(PoolConfig {
            frames: 1024,
            base: Pfn(0x1000),
            huge_pages: false,
        })
        .unwrap();
        let mut table = TdxTable::new(td, tlb.clone(), TWINS);
        if measuring {
            table = table.measuring_content();
        }
        let mmu = TestMmu::builder(SoftwareHost::confidential(frames, tlb.clone(), table))
            .shared_bit(47)
            .default_visibility(Visibility::Private)
            .build()
            .unwrap();
        let backing = LinearBacking::new(SHARED_PFN, level).with_private(PRIVATE_PFN);
        mmu.slots()
            .insert(Slot::new(Gfn(0)..Gfn(GUEST), backing))
            .unwrap();
        Self {
            module,
            mmu,
            script,
            td_vcpu: Some(td_vcpu),
        }
    }

    /// A guest that runs.
    pub(crate) fn running(level: Level) -> Self {
        let rig = Self::building(level);
        rig.run();
        rig
    }

    pub(crate) fn run(&self) {
        let mut image = self.mmu.build_private().unwrap();
        image.finalise().unwrap();
    }

    pub(crate) fn table(&self) -> &TdxTable {
        self.mmu.host().protected_table()
    }

    /// Tickets that the module was asked for.
    pub(crate) fn module_tracks(&self) -> u64 {
        self.table().td().call_counts().of(Call::MemTrack).made
    }

    pub(crate) fn vcpu(&self) -> Vcpu {
        self.mmu.vcpu().unwrap()
    }

    /// The guest accepts the page or block of `level` at `gfn`, which is mapped.
    pub(crate) fn accept(&self, gfn: u64, level: Level) {
        let info = PageInfo::new(Gfn(gfn).address(), level);
        match self.table().td().page_accept(info) {
            Accept::Answered(answer) => assert!(answer.is_success(), "{answer}"),
            Accept::Exit(exit) => panic!("not there: {exit:?}"),
        }
    }

    /// The protected table equals the private one, books and trees agree, and the module has nothing to complain of.
    pub(crate) fn check(&self) {
        let audit = self.mmu.audit_protected(SPACE);
        assert_eq!(audit.different, 0, "{audit:?}");
        let (audit, stats) = (self.mmu.audit(), self.mmu.stats());
        assert_eq!((audit.frozen, audit.misplaced, audit.unknown), (0, 0, 0));
        assert_eq!((audit.pages, audit.tables), (stats.pages, stats.tables));
        assert_eq!(self.module.violations(), []);
    }
}

/// A private access.
pub(crate) fn private(gfn: u64) -> Fault {
    Fault::write(Gfn(gfn).address())
}

/// A shared access.
pub(crate) fn shared(gfn: u64) -> Fault {
    Fault::write(Gpa(Gfn(gfn).address().0 | SHARED))
}

pub(crate) fn fixed(level: Level) -> Result<Outcome, tdp::FaultError> {
    Ok(Outcome::Fixed { level })
}
