//! The smallest embedding: two vCPUs made of software run on one guest while the host takes memory away.
//!
//! A real vCPU thread does what [`run_vcpu`] does, with the processor in place of [`SoftwareVcpu`]: load the root,
//! flush if it has to, enter, and hand each fault to the MMU.

use std::error::Error;
use std::thread;
use tdp::{AddressSpaceId, Ept, Fault, Format, Gfn, GfnRange, Gpa, Level, Mmu, Outcome, Pfn, Slot};
use tdp::{Host, LinearBacking, MmapPool, PoolConfig, SoftwareHost, TableMemory};
use tdp_arch::cpu::SoftwareVcpu;
use tdp_arch::walker::{EptConfig, EptFault, EptWalker, GuestAccess, WalkError};

/// Guest memory: 64 MiB from guest frame 0, backed by host frames from here on.
const GUEST: GfnRange = GfnRange {
    start: Gfn(0),
    end: Gfn(1 << 14),
};
const BACKING: Pfn = Pfn(0x8_0000);
/// Accesses of each vCPU.
const ACCESSES: u64 = 200_000;

type GuestMmu = Mmu<Ept, SoftwareHost>;

/// Figures of one vCPU.
#[derive(Debug, Default)]
struct Tally {
    accesses: u64,
    faults: u64,
    entries: u64,
}

fn run_vcpu(mmu: &GuestMmu, seed: u64) -> Result<Tally, Box<dyn Error + Send + Sync>> {
    let memory = TableMemory::new(mmu.host().frames());
    let mut vcpu = mmu.vcpu()?;
    let mut presence = mmu.host().tlb().vcpu();
    let mut root = vcpu.load_root()?;
    let mut processor = SoftwareVcpu::<_>::new(EptWalker::new(EptConfig::default())?, root.hpa);
    let mut tally = Tally::default();
    let mut random = seed;

    while tally.accesses < ACCESSES {
        // Guest entry: the root of the moment, and a flush if one was asked for while the vCPU was out.
        let now = vcpu.load_root()?;
        let flush = presence.enter();
        if flush || now.generation != root.generation {
            processor.flush_all();
        }
        root = now;
        processor.set_root(root.hpa);
        tally.entries += 1;

        // The guest runs until it faults or is kicked.
        let fault = loop {
            if presence.kicked() || tally.accesses == ACCESSES {
                break None;
            }
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let gpa = Gpa((random >> 20) % (GUEST.pages() << 12));
            match processor.access(&memory, gpa, GuestAccess::Write) {
                Ok(translation) => {
                    let expected = Pfn(BACKING.0 + gpa.gfn().0);
                    assert_eq!(
                        translation.hpa.pfn(),
                        expected,
                        "a wrong translation of {gpa}"
                    );
                    tally.accesses += 1;
                }
                Err(error) => break Some((gpa, error)),
            }
        };
        presence.exit();

        // The exit handler.
        if let Some((gpa, error)) = fault {
            let WalkError::Fault(EptFault::Violation(violation)) = error else {
                return Err(error.into());
            };
            tally.faults += 1;
            let code = Ept::fault_code(violation.qualification);
            match vcpu.fault(Fault::from_code(code, gpa))? {
                Outcome::Fixed { .. } | Outcome::Spurious | Outcome::Retry(_) => {}
                other => return Err(format!("unexpected outcome at {gpa}: {other:?}").into()),
            }
        }
    }
    Ok(tally)
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let frames = MmapPool::new(PoolConfig {
        frames: 1024,
        base: Pfn(0x1000),
        huge_pages: false,
    })?;
    let mmu = GuestMmu::builder(SoftwareHost::new(frames)).build()?;
    mmu.slots()
        .insert(Slot::new(GUEST, LinearBacking::new(BACKING, Level::L1)))?;

    let (tallies, zapped) = thread::scope(|scope| {
        let vcpus: Vec<_> = (1..=2)
            .map(|seed| {
                let mmu = mmu.clone();
                scope.spawn(move || run_vcpu(&mmu, seed))
            })
            .collect();
        // The host takes 2 MiB at a time away for as long as a vCPU runs; the guest faults it back in.
        let mut zapped = 0;
        let mut block = 0;
        while vcpus.iter().any(|vcpu| !vcpu.is_finished()) {
            let start = Gfn((block % (GUEST.pages() >> 9)) << 9);
            let pending = mmu.zap(AddressSpaceId(0), Level::L2.range(start));
            zapped += pending.leaves();
            pending.flush();
            block += 1;
        }
        let tallies: Vec<_> = vcpus.into_iter().map(|vcpu| vcpu.join()).collect();
        (tallies, zapped)
    });

    for (number, tally) in tallies.into_iter().enumerate() {
        let tally = tally.map_err(|_| format!("vCPU {number} panicked"))??;
        println!(
            "vCPU {number}: {} accesses, {} faults, {} guest entries",
            tally.accesses, tally.faults, tally.entries
        );
    }
    mmu.synchronize();
    let stats = mmu.stats();
    println!(
        "host: {zapped} pages taken away, {} flushes, {} tables freed",
        stats.flushes, stats.garbage.freed
    );
    println!(
        "mapped at the end: {} pages in {} tables",
        stats.pages[0], stats.tables
    );
    Ok(())
}
