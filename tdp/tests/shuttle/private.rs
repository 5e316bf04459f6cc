//! The private half on the model of the TDX module: faults, a guest inside, conversion and removal, all at once.
//!
//! At the end the protected table equals the private one and the module has met no call that a correct host never makes:
//! among them every page taken away without a ticket while a vCPU was inside.

use crate::explore;
use tdp::protected::tdx::{
    Enter, Exit, PageInfo, TdConfig, TdVcpu, TdxConfig, TdxModule, TdxTable,
};
use tdp::{
    AddressSpaceId, Ept, Fault, Gfn, Gpa, Hpa, Level, LinearBacking, MmapPool, Mmu, Pfn,
    PoolConfig, Slot, SoftwareHost, TlbTracker, Visibility,
};
use tdp_arch::walker::GuestAccess;

const SPACE: AddressSpaceId = AddressSpaceId(0);
const SHARED: u64 = 1 << 47;
const GUEST: u64 = 0x400;
/// Memory that the module manages.
const MODULE: u64 = 0x10_0000;
const PRIVATE: Pfn = Pfn(MODULE + 0x200);
const TWINS: std::ops::Range<Pfn> = Pfn(MODULE + 0x10)..Pfn(MODULE + 0x40);
/// Frames of the guest, two tables apart at their ends.
const GFNS: [u64; 2] = [0x1ff, 0x200];

type Host = SoftwareHost<TdxTable>;
type TestMmu = Mmu<Ept, Host>;

struct Guest {
    module: TdxModule,
    mmu: TestMmu,
    td_vcpu: TdVcpu,
}

fn guest() -> Guest {
    let page = |n: u64| Hpa((MODULE + n) << 12);
    let memory = Pfn(MODULE)..Pfn(PRIVATE.0 + GUEST);
    let module = TdxModule::new(TdxConfig::new(memory)).unwrap();
    let td = module
        .create_td(TdConfig::new(page(0), page(1), page(2)))
        .unwrap();
    assert!(td.mng_init().is_success());
    let td_vcpu = td.vp_create(page(3)).unwrap();
    let frames = MmapPool::new(PoolConfig {
        frames: 128,
        base: Pfn(0x1000),
        huge_pages: false,
    })
    .unwrap();
    let tlb = TlbTracker::new();
    let table = TdxTable::new(td, tlb.clone(), TWINS);
    let mmu = TestMmu::builder(SoftwareHost::confidential(frames, tlb, table))
        .shared_bit(47)
        .default_visibility(Visibility::Private)
        .garbage_bound(2)
        .build()
        .unwrap();
    let backing = LinearBacking::new(Pfn(0x8_0000), Level::L1).with_private(PRIVATE);
    mmu.slots()
        .insert(Slot::new(Gfn(0)..Gfn(GUEST), backing))
        .unwrap();
    mmu.build_private().unwrap().finalise().unwrap();
    Guest {
        module,
        mmu,
        td_vcpu,
    }
}

/// The guest enters, accepts a page, goes to it and leaves.
fn run_guest(mmu: &TestMmu, td_vcpu: &mut TdVcpu) {
    let mut tlb = mmu.host().tlb().vcpu();
    for gfn in [GFNS[0], GFNS[1], GFNS[0]] {
        let _ = tlb.enter();
        if let Enter::Inside(_) = td_vcpu.enter(0) {
            let gpa = Gfn(gfn).address();
            let _ = td_vcpu.td().page_accept(PageInfo::new(gpa, Level::L1));
            if let Ok(found) = td_vcpu.td().translate(gpa, GuestAccess::Write) {
                assert_eq!(found.hpa.pfn(), Pfn(PRIVATE.0 + gfn));
            }
            td_vcpu.exit(Exit::Other { rip: 0 });
        }
        tlb.exit();
    }
}

/// Two vCPUs fault, the guest runs, and its memory is converted to shared and back, or taken away.
fn private_half() {
    let Guest {
        module,
        mmu,
        mut td_vcpu,
    } = guest();
    let vcpus = [mmu.vcpu().unwrap(), mmu.vcpu().unwrap()];
    shuttle::thread::scope(|scope| {
        for (mut vcpu, shared) in vcpus.into_iter().zip([0, SHARED]) {
            scope.spawn(move || {
                for gfn in [GFNS[0], GFNS[1], GFNS[0], GFNS[1]] {
                    let private = Fault::write(Gfn(gfn).address());
                    let either = Fault::write(Gpa(Gfn(gfn).address().0 | shared));
                    // Whose half it is changes meanwhile.
                    let _ = vcpu.fault(private).expect("frames for tables");
                    let _ = vcpu.fault(either).expect("frames for tables");
                }
            });
        }
        scope.spawn(|| run_guest(&mmu, &mut td_vcpu));
        scope.spawn(|| {
            for to in [Visibility::Shared, Visibility::Private] {
                mmu.convert(SPACE, Gfn(GFNS[0])..Gfn(GFNS[1] + 1), to)
                    .expect("a module that takes every call");
            }
        });
        scope.spawn(|| {
            mmu.zap_private(SPACE, Gfn(0)..Gfn(0x200))
                .expect("a module that takes every call");
        });
    });
    let audit = mmu.audit_protected(SPACE);
    assert_eq!(audit.different, 0, "{audit:?}");
    let (audit, stats) = (mmu.audit(), mmu.stats());
    assert_eq!((audit.frozen, audit.misplaced, audit.unknown), (0, 0, 0));
    assert_eq!((audit.pages, audit.tables), (stats.pages, stats.tables));
    assert_eq!(module.violations(), []);
}

#[test]
fn the_private_half_under_everything_at_once() {
    explore(private_half);
}
