//! Answers of a host that make no sense, and codes of a processor that do not either (INV: no-panic).
//!
//! Whatever the host says: if a fault comes to *fixed*, the guest gets through, to the very frame that was named.
//! Anything else would have it fault for ever, or reach another page.

use crate::common::host::{Answer, Memory};
use crate::common::processor::Processor;
use crate::common::rig::{ACCESSES, Rig};
use tdp::{
    Access, AddressSpaceId, Fault, Gfn, Gpa, Level, Lookup, Mapping, MemoryFault, MemoryType,
    Outcome, Perms, Pfn, Slot,
};

/// Frames of 46 bits of physical address.
const FRAMES: u64 = 1 << 34;

fn rig_with<F: Processor>() -> Rig<F> {
    let rig = Rig::new();
    let slot = Slot::new(Gfn(0)..Gfn(1 << 18), Memory::new(Pfn(0), Level::L3));
    rig.mmu.slots().insert(slot).expect("the first slot");
    rig
}

/// Resolves every kind of access of a guest at `gfn`, which the host backs by `mapping`.
fn assert_fixed_means_reachable<F: Processor>(mapping: Mapping, gfn: Gfn) {
    for bare in [false, true] {
        for access in ACCESSES {
            let rig = rig_with::<F>();
            rig.host()
                .set_answer(Answer::Fixed(Lookup::Mapped(mapping)));
            let mut vcpu = rig.vcpu();
            let result = if bare {
                vcpu.map(gfn, mapping, access)
            } else {
                vcpu.fault(Fault::new(gfn.address(), access))
            };
            let Ok(Outcome::Fixed { .. }) = result else {
                assert!(result.is_ok(), "{result:?}");
                continue;
            };
            let root = vcpu.load_root().expect("the root is there");
            let found = rig.walk(root, gfn.address(), access);
            assert_eq!(
                found.map(|found| found.pfn),
                Ok(mapping.pfn),
                "{access:?} at {gfn} was fixed, bare: {bare}, by {mapping:x?}"
            );
        }
    }
}

both_formats! {
    /// Frames that no processor of that width, or no processor at all, can address.
    fn frames_out_of_reach<F>() {
        for pfn in [FRAMES - 1, FRAMES, FRAMES + 5, 1 << 39, 1 << 40, 1 << 52, u64::MAX] {
            for level in [Level::L1, Level::L3] {
                let mapping = Mapping::memory(Pfn(pfn), level, Perms::RWX);
                assert_fixed_means_reachable::<F>(mapping, Gfn(pfn & 0x3ffff));
            }
        }
    }

    /// The processor's last frame is memory as any other, and the one past it is not: for a guest that comes for the first time,
    /// for one whose vCPU remembers all of the way, and for a bare map.
    fn the_last_frame_within_reach_is_the_last_that_is_mapped<F>() {
        let rig = rig_with::<F>();
        let mut vcpu = rig.vcpu();
        let answer = |pfn| {
            let mapping = Mapping::memory(Pfn(pfn), Level::L1, Perms::RWX);
            rig.host().set_answer(Answer::Fixed(Lookup::Mapped(mapping)));
            mapping
        };
        let fixed = Ok(Outcome::Fixed { level: Level::L1 });
        let beyond = Ok(Outcome::MemoryFault(MemoryFault::NotBacked));
        let mut next = 0;
        for _ in 0..4 {
            for (pfn, expected) in [(FRAMES, beyond), (FRAMES - 1, fixed)] {
                let mapping = answer(pfn);
                for bare in [false, true] {
                    let gfn = Gfn(next);
                    next += 1;
                    let outcome = if bare {
                        vcpu.map(gfn, mapping, Access::Write)
                    } else {
                        vcpu.fault(Fault::write(gfn.address()))
                    };
                    assert_eq!(outcome, expected, "{pfn:#x}, bare: {bare}");
                    if expected == fixed {
                        rig.assert_maps(&mut vcpu, gfn, Pfn(pfn), Level::L1, Perms::RWX);
                    } else {
                        assert_eq!(rig.mmu.translate(AddressSpaceId(0), gfn), None);
                    }
                }
            }
        }
    }

    /// The last large page of the processor's is mapped by large leaves, by a fault and by a collapse; the one past it is not.
    fn the_last_large_page_within_reach_is_the_last_that_is_mapped<F>() {
        let all = Gfn(0)..Gfn(1 << 18);
        let rig = Rig::<F>::new();
        let memory = Memory::new(Pfn(FRAMES - 1024), Level::L2);
        let slot = Slot::new(Gfn(0)..Gfn(2048), memory);
        rig.mmu.slots().insert(slot).expect("the first slot");
        let mut vcpu = rig.vcpu();
        let fault = Fault::write(Gfn(0).address());
        assert_eq!(vcpu.fault(fault), Ok(Outcome::Fixed { level: Level::L2 }));
        let last = Gfn(1023).address();
        let small = Fault::write(last).max_level(Level::L1);
        assert_eq!(vcpu.fault(small), Ok(Outcome::Fixed { level: Level::L1 }));
        rig.mmu.collapse(AddressSpaceId(0), all).flush();
        rig.assert_maps(&mut vcpu, Gfn(1023), Pfn(FRAMES - 1), Level::L2, Perms::RWX);
        for level in [Level::L1, Level::L2] {
            let past = Fault::write(Gfn(1024).address()).max_level(level);
            let outcome = vcpu.fault(past);
            assert!(matches!(outcome, Ok(Outcome::MemoryFault(_))), "{outcome:?}");
        }
        assert_eq!(rig.mmu.stats().pages, [0, 2, 0]);
    }

    /// Permissions that no entry can express. Without mode-based execute control, user fetches are like all others.
    fn permissions_out_of_the_ordinary<F>() {
        for bits in 0..16 {
            let perms = Perms::from_bits_truncate(bits);
            if perms.contains(Perms::EXEC) != perms.contains(Perms::USER_EXEC) {
                continue;
            }
            let mapping = Mapping::memory(Pfn(0x1234), Level::L1, perms);
            assert_fixed_means_reachable::<F>(mapping, Gfn(7));
        }
    }

    /// Levels that no leaf has, and memory types of all kinds.
    fn levels_and_types<F>() {
        for level in Level::ALL {
            for memory_type in [MemoryType::WriteCombining, MemoryType::Uncacheable] {
                for ignore_guest_pat in [false, true] {
                    let mapping = Mapping {
                        memory_type,
                        ignore_guest_pat,
                        ..Mapping::memory(Pfn(1 << 20 | 7), level, Perms::RWX)
                    };
                    assert_fixed_means_reachable::<F>(mapping, Gfn(7));
                }
            }
        }
    }

    /// A leaf that somebody mapped by hand where there is no slot: a fault there ends, it is not tried again for ever.
    fn a_leaf_without_a_slot<F>() {
        let rig = Rig::<F>::new();
        let mut cpu = rig.processor(rig.vcpu());
        let mapping = Mapping::memory(Pfn(0x1234), Level::L1, Perms::RX);
        let outcome = cpu.vcpu.map(Gfn(7), mapping, Access::Read);
        assert_eq!(outcome, Ok(Outcome::Fixed { level: Level::L1 }));
        for access in ACCESSES {
            let outcome = cpu.vcpu.fault(Fault::new(Gpa(0x7000), access));
            assert!(!matches!(outcome, Ok(Outcome::Retry(_))), "{access:?}: {outcome:?}");
        }
    }

    /// Every fault code leads to some outcome.
    fn any_fault_code<F>() {
        let rig = rig_with::<F>();
        let mut vcpu = rig.vcpu();
        for bit in 0..64 {
            for other in 0..64 {
                let code = F::fault_code(1 << bit | 1 << other);
                let outcome = vcpu.fault(Fault::from_code(code, Gpa(1 << other)));
                assert!(outcome.is_ok(), "{outcome:?}");
            }
        }
    }
}
