//! Faults that fill holes: outcome, level, memory type.

use crate::common::host::Memory;
use crate::common::processor::{Processor, Report};
use crate::common::rig::{ACCESSES, Rig, RigSetup};
use tdp::{
    Access, AddressSpaceId, Fault, Gfn, Gpa, Level, MemoryFault, MemoryType, Outcome, Perms, Pfn,
    Slot, SlotFlags,
};
use tdp_arch::walker::{GuestAccess, LeafMemoryType, Walker};

/// Frames of 1 GiB.
const GIB: u64 = 1 << 18;

fn fixed(level: Level) -> Outcome {
    Outcome::Fixed { level }
}

/// A rig with one slot of 2 GiB whose host frames are aligned as its guest frames are.
fn rig_with<F: Processor>(level: Level) -> Rig<F> {
    let rig = Rig::new();
    let memory = Memory::new(Pfn(4 * GIB), level);
    rig.mmu
        .slots()
        .insert(Slot::new(Gfn(0)..Gfn(2 * GIB), memory))
        .expect("the first slot");
    rig
}

both_formats! {
    /// The first fault on a page installs a leaf of the size that backs it, the next ones find it.
    fn the_size_of_the_backing_is_the_size_of_the_leaf<F>() {
        for (level, pages) in [
            (Level::L1, [1, 0, 0]),
            (Level::L2, [0, 1, 0]),
            (Level::L3, [0, 0, 1]),
        ] {
            let rig = rig_with::<F>(level);
            let mut vcpu = rig.vcpu();
            let gfn = Gfn(GIB + 0x1234);
            rig.assert_absent(&mut vcpu, gfn, Report::Absent);
            assert_eq!(vcpu.fault(Fault::read(gfn.address())), Ok(fixed(level)));
            rig.assert_maps(&mut vcpu, gfn, Pfn(5 * GIB + 0x1234), level, Perms::RWX);
            let first = level.align_down(gfn);
            let last = Gfn(first.0 + level.pages() - 1);
            for at in [first, last] {
                rig.assert_maps(&mut vcpu, at, Pfn(4 * GIB + at.0), level, Perms::RWX);
                for access in ACCESSES {
                    let outcome = vcpu.fault(Fault::new(at.address(), access));
                    assert_eq!(outcome, Ok(Outcome::Spurious));
                }
            }
            let stats = rig.mmu.stats();
            assert_eq!(stats.pages, pages);
            assert_eq!(stats.tables, u64::from(4 - level.number()));
            assert_eq!((stats.fixed, stats.spurious), (1, 8));
        }
    }

    /// Each limit on the level of a leaf counts, and the least of them decides.
    fn every_limit_lowers_the_level<F>() {
        let whole = Slot::new(Gfn(0)..Gfn(2 * GIB), Memory::new(Pfn(4 * GIB), Level::L3));
        let gib = |pfn| Memory::new(Pfn(pfn), Level::L3);
        let plain = Fault::read(Gfn(GIB + 5).address());
        let cases = [
            ("nothing", whole.clone(), plain, Level::L3),
            ("fault: 2M", whole.clone(), plain.max_level(Level::L2), Level::L2),
            ("fault: 4K", whole.clone(), plain.max_level(Level::L1), Level::L1),
            ("fault: no such leaf", whole.clone(), plain.max_level(Level::L5), Level::L3),
            ("slot: 2M", whole.clone().max_level(Level::L2), plain, Level::L2),
            ("slot: 4K", whole.clone().max_level(Level::L1), plain, Level::L1),
            ("dirty log", whole.with_flags(SlotFlags::LOG_DIRTY), plain, Level::L1),
            // Bounds: the block of 1 GiB or of 2 MiB around the page sticks out at either end.
            ("start", Slot::new(Gfn(GIB + 1)..Gfn(3 * GIB), gib(5 * GIB + 1)), plain, Level::L1),
            ("start of 1G", Slot::new(Gfn(GIB)..Gfn(3 * GIB), gib(5 * GIB)), plain, Level::L3),
            ("end", Slot::new(Gfn(0)..Gfn(GIB + 511), gib(4 * GIB)), plain, Level::L1),
            ("end of 2M", Slot::new(Gfn(0)..Gfn(GIB + 512), gib(4 * GIB)), plain, Level::L2),
            // Alignment: guest and host frames differ below 1 GiB or below 2 MiB.
            ("skewed by 2M", Slot::new(Gfn(0)..Gfn(2 * GIB), gib(4 * GIB + 512)), plain, Level::L2),
            ("skewed by 4K", Slot::new(Gfn(0)..Gfn(2 * GIB), gib(4 * GIB + 1)), plain, Level::L1),
        ];
        for (what, slot, fault, level) in cases {
            let rig = Rig::<F>::new();
            let pfn = Pfn(slot.backing().pfn.0 + slot.offset(Gfn(GIB + 5)));
            rig.mmu.slots().insert(slot).expect("the first slot");
            let mut vcpu = rig.vcpu();
            assert_eq!(vcpu.fault(fault), Ok(fixed(level)), "{what}");
            rig.assert_maps(&mut vcpu, Gfn(GIB + 5), pfn, level, Perms::RWX);
        }
    }

    /// The MMU's own limit on leaves.
    fn the_largest_leaf_can_be_set<F>() {
        for level in [Level::L1, Level::L2, Level::L3] {
            let rig = Rig::<F>::with(RigSetup { max_leaf: level, ..RigSetup::default() });
            let memory = Memory::new(Pfn(4 * GIB), Level::L3);
            rig.mmu.slots().insert(Slot::new(Gfn(0)..Gfn(GIB), memory)).expect("the first slot");
            let mut vcpu = rig.vcpu();
            assert_eq!(vcpu.fault(Fault::write(Gpa(0))), Ok(fixed(level)));
            rig.assert_maps(&mut vcpu, Gfn(0), Pfn(4 * GIB), level, Perms::RWX);
        }
    }

    /// Five levels: pages past 256 TiB, and the other end of what four levels map.
    fn five_levels_map_what_four_do_not<F>() {
        let mut setup = RigSetup::default();
        setup.processor.root_level = Level::L5;
        let rig = Rig::<F>::with(setup);
        let far = Gfn(1 << 36);
        let memory = Memory::new(Pfn(4 * GIB), Level::L2);
        rig.mmu.slots().insert(Slot::new(far..Gfn(far.0 + GIB), memory)).expect("the first slot");
        let mut vcpu = rig.vcpu();
        let root = vcpu.load_root().expect("the root is there");
        assert_eq!(root.level, Level::L5);
        assert_eq!(vcpu.fault(Fault::write(far.address())), Ok(fixed(Level::L2)));
        rig.assert_maps(&mut vcpu, Gfn(far.0 + 7), Pfn(4 * GIB + 7), Level::L2, Perms::RWX);
        // The same bits below the fifth level lead nowhere.
        rig.assert_absent(&mut vcpu, Gfn(0), Report::Absent);
        assert_eq!(rig.mmu.stats().tables, 3);
    }

    /// Past the width of the tables there is nothing, and nothing to emulate.
    fn past_the_width_is_a_memory_fault<F>() {
        for level in [Level::L4, Level::L5] {
            let mut setup = RigSetup::default();
            setup.processor.root_level = level;
            let rig = Rig::<F>::with(setup);
            let mut vcpu = rig.vcpu();
            for gfn in [level.gfn_limit(), Gfn((1 << 52) - 1)] {
                let gpa = gfn.address();
                let expected = Outcome::MemoryFault(MemoryFault::BeyondWidth);
                assert_eq!(vcpu.fault(Fault::execute(gpa)), Ok(expected));
                let mut batch = vcpu.batch().expect("there are frames");
                assert_eq!(batch.fault(Fault::execute(gpa)), Ok(expected));
            }
            assert_eq!(rig.mmu.stats().memory_faults, 4);
            assert_eq!(rig.mmu.stats().tables, 0);
        }
    }

    /// What the processor reports is what the MMU resolves, for each kind of access; then the guest gets through.
    fn a_guest_gets_through_by_its_own_faults<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut cpu = rig.processor(rig.vcpu());
        for (number, access) in ACCESSES.into_iter().enumerate() {
            let gfn = Gfn(3 * number as u64);
            let found = cpu.run(gfn.address(), access).expect("there is memory");
            assert_eq!((found.pfn, found.level), (Pfn(4 * GIB + gfn.0), Level::L1));
        }
        assert_eq!(rig.mmu.stats().fixed, 4);
    }

    /// The host's memory type is what the processor finds.
    fn the_memory_type_reaches_the_processor<F>() {
        for memory_type in [
            MemoryType::Uncacheable,
            MemoryType::WriteCombining,
            MemoryType::WriteThrough,
            MemoryType::WriteProtected,
            MemoryType::WriteBack,
        ] {
            let rig = rig_with::<F>(Level::L2);
            rig.host().script().memory_type = memory_type;
            let mut vcpu = rig.vcpu();
            assert_eq!(vcpu.fault(Fault::read(Gpa(0))), Ok(fixed(Level::L2)));
            let root = vcpu.load_root().expect("the root is there");
            let memory = tdp::TableMemory::new(rig.frames());
            let found = F::walker(rig.setup)
                .walk(&memory, root.hpa, Gpa(0), GuestAccess::Read)
                .expect("it was fixed");
            let expected = match found.memory_type {
                LeafMemoryType::Ept { .. } => LeafMemoryType::Ept {
                    memory_type: memory_type as u8,
                    ignore_pat: false,
                },
                // Entries of the PAT after reset: 0 write back, 1 write through, 3 uncacheable.
                LeafMemoryType::Npt { .. } => LeafMemoryType::Npt {
                    pat_index: match memory_type {
                        MemoryType::WriteBack => 0,
                        MemoryType::WriteThrough => 1,
                        _ => 3,
                    },
                },
            };
            assert_eq!(found.memory_type, expected);
        }
    }

    /// Where the host says that the guest's own memory types are not to count, the processor finds that too (EPT; NPT has no
    /// such bit), whichever way the leaf was made.
    fn the_guests_memory_type_is_ignored_where_the_host_says_so<F>() {
        let rig = Rig::<F>::new();
        let mut vcpu = rig.vcpu();
        // The first of each size by the long way, the second of the small ones by what is remembered of the first.
        for (gfn, level) in [(0, Level::L2), (512, Level::L1), (513, Level::L1), (514, Level::L1)] {
            let mapping = tdp::Mapping {
                ignore_guest_pat: gfn != 514,
                ..tdp::Mapping::memory(Pfn(4 * GIB + gfn), level, Perms::RWX)
            };
            assert_eq!(vcpu.map(Gfn(gfn), mapping, Access::Write), Ok(fixed(level)));
            let root = vcpu.load_root().expect("the root is there");
            let memory = tdp::TableMemory::new(rig.frames());
            let found = F::walker(rig.setup)
                .walk(&memory, root.hpa, Gfn(gfn).address(), GuestAccess::Read)
                .expect("it was fixed");
            if let LeafMemoryType::Ept { ignore_pat, .. } = found.memory_type {
                assert_eq!(ignore_pat, gfn != 514, "frame {gfn}");
            }
        }
    }

    /// The root, as the vCPU has to load it.
    fn the_root_is_as_the_processor_wants_it<F>() {
        let rig = Rig::<F>::new();
        let mut vcpu = rig.vcpu();
        let root = vcpu.load_root().expect("the root is there");
        let expected = match F::NAME {
            // SDM 25.6.11: write back, four levels less one, accessed and dirty flags.
            "ept" => root.hpa.0 | 3 << 3 | 1 << 6 | 6,
            _ => root.hpa.0,
        };
        assert_eq!(root.pointer, expected);
        assert_eq!(root.level, Level::L4);
        // The same for the next vCPU, and until it is obsolete.
        assert_eq!(rig.vcpu().load_root(), Ok(root));
        assert_eq!(vcpu.load_root(), Ok(root));
        assert_eq!(rig.mmu.stats().roots_made, 1);
    }

    /// A batch resolves as single faults do, and grace periods pass between its faults.
    fn a_batch_does_what_single_faults_do<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut vcpu = rig.vcpu();
        let mut batch = vcpu.batch().expect("there are frames");
        // One table each: more than a vCPU keeps.
        for block in 0..40 {
            let gpa = Gfn(block * 512).address();
            assert_eq!(batch.fault(Fault::write(gpa)), Ok(fixed(Level::L1)));
            assert_eq!(batch.fault(Fault::read(gpa)), Ok(Outcome::Spurious));
        }
        drop(batch);
        assert_eq!(rig.mmu.stats().pages, [40, 0, 0]);
        rig.assert_maps(&mut vcpu, Gfn(39 * 512), Pfn(4 * GIB + 39 * 512), Level::L1, Perms::RWX);
    }

    /// A bare map asks no slot.
    fn a_bare_map_needs_no_slot<F>() {
        let rig = Rig::<F>::new();
        let mut vcpu = rig.vcpu();
        let mapping = tdp::Mapping::memory(Pfn(7 * GIB), Level::L3, Perms::RX);
        assert_eq!(vcpu.map(Gfn(GIB), mapping, Access::Read), Ok(fixed(Level::L3)));
        rig.assert_maps(&mut vcpu, Gfn(GIB + 9), Pfn(7 * GIB + 9), Level::L3, Perms::RX);
        assert_eq!(vcpu.map(Gfn(GIB), mapping, Access::Read), Ok(Outcome::Spurious));
        let refused = |reason| {
            Ok(Outcome::MemoryFault(reason))
        };
        assert_eq!(
            vcpu.map(Gfn(GIB), mapping, Access::Write),
            refused(MemoryFault::NotPermitted)
        );
        let mut batch = vcpu.batch().expect("there are frames");
        assert_eq!(
            batch.map(Gfn(GIB), mapping, Access::Write),
            refused(MemoryFault::NotPermitted)
        );
        assert_eq!(batch.map(Gfn(0), mapping, Access::Execute), Ok(fixed(Level::L3)));
        drop(batch);
        assert_eq!(rig.mmu.translate(AddressSpaceId(1), Gfn(GIB)), None);
    }
}
