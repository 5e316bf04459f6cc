//! Faults that meet a leaf or a table: spurious, widened, split, collapsed.

use crate::common::host::Memory;
use crate::common::processor::{Processor, Report};
use crate::common::rig::Rig;
use tdp::{
    Access, AdBits, AddressSpaceId, Fault, FlushRequest, Gfn, GfnRange, Gpa, Leaf, Level,
    MemoryFault, Outcome, Perms, Pfn, Slot,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const BASE: u64 = 1 << 20;

fn rig_with<F: Processor>(level: Level) -> Rig<F> {
    let rig = Rig::new();
    let memory = Memory::new(Pfn(BASE), level);
    rig.mmu
        .slots()
        .insert(Slot::new(Gfn(0)..Gfn(1 << 18), memory))
        .expect("the first slot");
    rig
}

fn fixed(level: Level) -> Outcome {
    Outcome::Fixed { level }
}

fn flags<F: Processor>(leaf: Leaf) -> (bool, bool) {
    (leaf.spte.0 & F::ACCESSED != 0, leaf.spte.0 & F::DIRTY != 0)
}

both_formats! {
    /// A leaf that permits too little is widened in place: nothing is flushed, nothing is lost.
    fn a_leaf_is_widened_in_place<F>() {
        for level in [Level::L1, Level::L2, Level::L3] {
            let rig = rig_with::<F>(level);
            let mut vcpu = rig.vcpu();
            rig.host().permit(Perms::READ);
            assert_eq!(vcpu.fault(Fault::read(Gpa(0))), Ok(fixed(level)));
            rig.assert_maps(&mut vcpu, Gfn(0), Pfn(BASE), level, Perms::READ);
            // What is permitted by now is less than the leaf says: it stays.
            rig.host().permit(Perms::EXEC | Perms::USER_EXEC);
            assert_eq!(vcpu.fault(Fault::execute(Gpa(0))), Ok(fixed(level)));
            rig.assert_maps(&mut vcpu, Gfn(0), Pfn(BASE), level, Perms::RX);
            rig.host().permit(Perms::RW);
            assert_eq!(vcpu.fault(Fault::write(Gpa(0))), Ok(fixed(level)));
            rig.assert_maps(&mut vcpu, Gfn(0), Pfn(BASE), level, Perms::RWX);
            assert_eq!(rig.mmu.stats().upgrades, 2);
            assert_eq!(rig.host().take_flushes(), []);
        }
    }

    /// Each leaf is what its own mapping says, whatever the one that was made before it is remembered as.
    fn a_leaf_is_made_as_its_own_mapping_says<F>() {
        let kinds = [Perms::RWX, Perms::RX, Perms::RWX, Perms::READ, Perms::RW];
        let rig = rig_with::<F>(Level::L1);
        let mut vcpu = rig.vcpu();
        for (kind, perms) in kinds.into_iter().enumerate() {
            rig.host().permit(perms);
            let first = 8 * kind as u64;
            for gfn in first..first + 3 {
                assert_eq!(vcpu.fault(Fault::read(Gfn(gfn).address())), Ok(fixed(Level::L1)));
                rig.assert_maps(&mut vcpu, Gfn(gfn), Pfn(BASE + gfn), Level::L1, perms);
            }
            for gfn in first + 3..first + 6 {
                let mapping = tdp::Mapping::memory(Pfn(gfn), Level::L1, perms);
                assert_eq!(vcpu.map(Gfn(gfn), mapping, Access::Read), Ok(fixed(Level::L1)));
                rig.assert_maps(&mut vcpu, Gfn(gfn), Pfn(gfn), Level::L1, perms);
            }
        }
        // The last frame that an entry can name, and those past it; one that may not be written either.
        let limit = 1 << (rig.setup.physical_bits - 12);
        let mapping = tdp::Mapping::memory(Pfn(limit), Level::L1, Perms::READ);
        let refused = Outcome::MemoryFault(MemoryFault::NotPermitted);
        assert_eq!(vcpu.map(Gfn(101), mapping, Access::Write), Ok(refused));
        let mut map = |gfn: u64, pfn: u64| {
            let mapping = tdp::Mapping::memory(Pfn(pfn), Level::L1, Perms::RW);
            vcpu.map(Gfn(gfn), mapping, Access::Write)
        };
        for pfn in [limit, limit + 1, u64::MAX >> 12] {
            let refused = Outcome::MemoryFault(MemoryFault::NotBacked);
            assert_eq!(map(100, pfn), Ok(refused), "{pfn:#x}");
        }
        assert_eq!(map(100, limit - 1), Ok(fixed(Level::L1)));
        rig.assert_maps(&mut vcpu, Gfn(100), Pfn(limit - 1), Level::L1, Perms::RW);
    }

    /// A leaf that may not be written is not to be written after it was widened for something else, neither by the host's leave
    /// nor by the MMU's own.
    fn a_leaf_widened_for_fetching_is_no_more_writable<F>() {
        for level in [Level::L1, Level::L2] {
            let rig = rig_with::<F>(level);
            let mut vcpu = rig.vcpu();
            rig.host().permit(Perms::READ);
            assert_eq!(vcpu.fault(Fault::read(Gpa(0))), Ok(fixed(level)));
            rig.host().permit(Perms::RX);
            assert_eq!(vcpu.fault(Fault::execute(Gpa(0))), Ok(fixed(level)));
            let leaf = rig.mmu.translate(SPACE, Gfn(0)).expect("it was fixed");
            assert_eq!(leaf.spte.0 & (F::WRITABLE | F::MMU_WRITABLE | F::HOST_WRITABLE), 0);
            let refused = Outcome::MemoryFault(MemoryFault::NotPermitted);
            assert_eq!(vcpu.fault(Fault::write(Gpa(0))), Ok(refused));
        }
    }

    /// An access that the host does not permit is the embedder's, and changes nothing.
    fn what_the_host_does_not_permit_is_reported<F>() {
        let rig = rig_with::<F>(Level::L2);
        let mut vcpu = rig.vcpu();
        rig.host().permit(Perms::RX);
        let gpa = Gpa(0x1008);
        let refused = Outcome::MemoryFault(MemoryFault::NotPermitted);
        assert_eq!(vcpu.fault(Fault::write(gpa)), Ok(refused));
        rig.assert_absent(&mut vcpu, gpa.gfn(), Report::Absent);
        assert_eq!(vcpu.fault(Fault::read(gpa)), Ok(fixed(Level::L2)));
        assert_eq!(vcpu.fault(Fault::write(gpa)), Ok(refused));
        rig.assert_maps(&mut vcpu, Gfn(1), Pfn(BASE + 1), Level::L2, Perms::RX);
        assert_eq!(rig.mmu.stats().memory_faults, 2);
        // Nor is there an EPT leaf that can be written and not read; one of NPT that can be written can be read.
        for level in [Level::L1, Level::L2] {
            let odd = tdp::Mapping::memory(Pfn(BASE), level, Perms::WRITE);
            let found = vcpu.map(Gfn(9216), odd, Access::Write);
            if F::NAME == "ept" {
                assert_eq!(found, Ok(refused));
                rig.assert_absent(&mut vcpu, Gfn(9216), Report::Absent);
            } else {
                assert_eq!(found, Ok(fixed(level)));
                rig.mmu.zap(SPACE, Gfn(9216)..Gfn(9216 + 512)).flush();
            }
        }
        // Nor does it become possible by a frame that no entry can name.
        for level in [Level::L1, Level::L2] {
            let beyond = tdp::Mapping::memory(Pfn(1 << 40), level, Perms::RX);
            assert_eq!(vcpu.map(Gfn(9000), beyond, Access::Write), Ok(refused));
            let unbacked = Outcome::MemoryFault(MemoryFault::NotBacked);
            assert_eq!(vcpu.map(Gfn(9000), beyond, Access::Read), Ok(unbacked));
        }
        rig.assert_absent(&mut vcpu, Gfn(9000), Report::Absent);
    }

    /// A new leaf is accessed unless nobody asked for it, and dirty if it may be written; then the processor sets the
    /// bits.
    fn the_processor_sets_accessed_and_dirty<F>() {
        let rig = rig_with::<F>(Level::L1);
        rig.host().permit(Perms::READ);
        let mut cpu = rig.processor(rig.vcpu());
        let prefetch = |fault| Fault { prefetch: true, ..fault };
        assert_eq!(cpu.vcpu.fault(prefetch(Fault::read(Gpa(0)))), Ok(fixed(Level::L1)));
        let leaf = rig.mmu.translate(SPACE, Gfn(0)).expect("it was fixed");
        assert_eq!(flags::<F>(leaf), (false, false), "nobody has been there");
        assert!(cpu.touch(Gpa(0), Access::Read).result.is_ok());
        let leaf = rig.mmu.translate(SPACE, Gfn(0)).expect("it was fixed");
        assert_eq!(flags::<F>(leaf), (true, false), "the processor has");
        rig.host().permit(Perms::RWX);
        assert!(cpu.run(Gpa(0), Access::Write).is_ok());
        let leaf = rig.mmu.translate(SPACE, Gfn(0)).expect("it was fixed");
        assert_eq!(flags::<F>(leaf), (true, true));
    }

    /// The dirty bit survives a widening by a mapping that says nothing of writes.
    fn widening_keeps_the_dirty_bit<F>() {
        let rig = rig_with::<F>(Level::L1);
        rig.host().permit(Perms::RW);
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gpa(0), Access::Write).is_ok());
        rig.host().permit(Perms::RX);
        assert!(cpu.run(Gpa(0), Access::Execute).is_ok());
        let leaf = rig.mmu.translate(SPACE, Gfn(0)).expect("it was fixed");
        assert_eq!(flags::<F>(leaf), (true, true));
        rig.assert_maps(&mut cpu.vcpu, Gfn(0), Pfn(BASE), Level::L1, Perms::RWX);
    }

    /// A prefetch takes any leaf for good, and does not touch it.
    fn a_prefetch_leaves_a_present_leaf_alone<F>() {
        let rig = rig_with::<F>(Level::L1);
        rig.host().permit(Perms::READ);
        let mut vcpu = rig.vcpu();
        assert_eq!(vcpu.fault(Fault::read(Gpa(0))), Ok(fixed(Level::L1)));
        let before = rig.mmu.translate(SPACE, Gfn(0));
        rig.host().permit(Perms::RWX);
        let prefetch = Fault { prefetch: true, ..Fault::write(Gpa(0)) };
        assert_eq!(vcpu.fault(prefetch), Ok(Outcome::Spurious));
        assert_eq!(rig.mmu.translate(SPACE, Gfn(0)), before);
    }

    /// Where the processor keeps no such bits, entries are as if they had always been set, or never.
    fn software_accessed_bits_are_not_the_processors<F>() {
        let rig = Rig::<F>::with_ad_bits(AdBits::Software);
        let memory = Memory::new(Pfn(BASE), Level::L1);
        rig.mmu.slots().insert(Slot::new(Gfn(0)..Gfn(8), memory)).expect("the first slot");
        let mut cpu = rig.processor(rig.vcpu());
        let prefetch = Fault { prefetch: true, ..Fault::read(Gpa(0)) };
        assert_eq!(cpu.vcpu.fault(prefetch), Ok(fixed(Level::L1)));
        let before = rig.mmu.translate(SPACE, Gfn(0)).expect("it was fixed");
        assert!(before.spte.0 & F::AD_SOFTWARE != 0);
        assert!(cpu.touch(Gpa(0), Access::Write).result.is_ok());
        assert_eq!(rig.mmu.translate(SPACE, Gfn(0)), Some(before), "the processor wrote nothing");
    }

    /// A write to one page of a read-only large leaf, by a small leaf: split, and only that page is widened.
    fn a_smaller_fault_splits_a_leaf<F>() {
        for (large, splits) in [(Level::L2, 1), (Level::L3, 2)] {
            let rig = rig_with::<F>(large);
            let mut cpu = rig.processor(rig.vcpu());
            rig.host().permit(Perms::RX);
            assert!(cpu.run(Gfn(5).address(), Access::Read).is_ok());
            rig.host().permit(Perms::RWX);
            let fault = Fault::write(Gfn(5).address()).max_level(Level::L1);
            assert_eq!(cpu.vcpu.fault(fault), Ok(fixed(Level::L1)));
            assert_eq!(rig.mmu.stats().splits, splits);
            assert_eq!(rig.host().take_flushes(), [], "it translates alike");
            let pages = rig.mmu.stats().pages;
            assert_eq!(pages, if large == Level::L2 { [512, 0, 0] } else { [512, 511, 0] });
            let vcpu = &mut cpu.vcpu;
            rig.assert_maps(vcpu, Gfn(5), Pfn(BASE + 5), Level::L1, Perms::RWX);
            for gfn in [0, 4, 6, 511] {
                rig.assert_maps(vcpu, Gfn(gfn), Pfn(BASE + gfn), Level::L1, Perms::RX);
            }
            if large == Level::L3 {
                let last = (1 << 18) - 1;
                rig.assert_maps(vcpu, Gfn(512), Pfn(BASE + 512), Level::L2, Perms::RX);
                rig.assert_maps(vcpu, Gfn(last), Pfn(BASE + last), Level::L2, Perms::RX);
            }
            // The bits of the large leaf are those of each part.
            rig.mmu.visit_leaves(SPACE, Gfn(0)..Gfn(1 << 18), |leaf| {
                assert_eq!(flags::<F>(leaf), (true, leaf.gfn == Gfn(5)), "{leaf:?}");
            });
            // A vCPU that still remembers the large leaf learns of the wider one by its own fault.
            assert!(cpu.run(Gfn(5).address(), Access::Write).is_ok());
        }
    }

    /// A smaller fault on a large leaf that permits the access has nothing to do.
    fn a_large_leaf_that_permits_is_not_split<F>() {
        let rig = rig_with::<F>(Level::L2);
        let mut vcpu = rig.vcpu();
        assert_eq!(vcpu.fault(Fault::write(Gpa(0))), Ok(fixed(Level::L2)));
        let fault = Fault::write(Gpa(0x3000)).max_level(Level::L1);
        assert_eq!(vcpu.fault(fault), Ok(Outcome::Spurious));
        assert_eq!(rig.mmu.stats().splits, 0);
    }

    /// A larger fault where a table is: the leaf takes its place, what the table led to is flushed, its frames come
    /// back.
    fn a_larger_fault_collapses_a_table<F>() {
        let rig = rig_with::<F>(Level::L3);
        let mut cpu = rig.processor(rig.vcpu());
        for gfn in [3, 600] {
            let fault = Fault::write(Gfn(gfn).address()).max_level(Level::L1);
            assert_eq!(cpu.vcpu.fault(fault), Ok(fixed(Level::L1)));
            assert!(cpu.touch(Gfn(gfn).address(), Access::Write).result.is_ok());
        }
        assert_eq!(rig.mmu.stats().tables, 4);
        let fault = Fault::write(Gfn(3).address()).max_level(Level::L2);
        assert_eq!(cpu.vcpu.fault(fault), Ok(fixed(Level::L2)));
        let flushed = |end| FlushRequest {
            as_id: SPACE,
            range: GfnRange { start: Gfn(0), end: Gfn(end) },
            tables: true,
        };
        assert_eq!(rig.host().take_flushes(), [flushed(512)]);
        assert_eq!(rig.mmu.stats().pages, [1, 1, 0]);
        assert_eq!(rig.mmu.stats().tables, 3);
        rig.assert_maps(&mut cpu.vcpu, Gfn(511), Pfn(BASE + 511), Level::L2, Perms::RWX);
        let leaf = rig.mmu.translate(SPACE, Gfn(3)).expect("it was fixed");
        assert_eq!(flags::<F>(leaf), (true, true), "by the fault and by what was below");
        // Two levels at once.
        let fault = Fault::write(Gfn(700).address());
        assert_eq!(cpu.vcpu.fault(fault), Ok(fixed(Level::L3)));
        assert_eq!(rig.host().take_flushes(), [flushed(1 << 18)]);
        assert_eq!(rig.mmu.stats().pages, [0, 0, 1]);
        assert_eq!(rig.mmu.stats().tables, 1);
        assert_eq!(rig.mmu.stats().collapses, 2);
        rig.assert_maps(&mut cpu.vcpu, Gfn(600), Pfn(BASE + 600), Level::L3, Perms::RWX);
        let before = rig.frames().allocated();
        rig.mmu.synchronize();
        assert_eq!(rig.mmu.stats().garbage.pending, 0);
        assert_eq!(before - rig.frames().allocated(), 3);
    }

    /// A small leaf that permits more than the large one would keeps its table, wherever in it the leaf is, and whether it may be
    /// written now or is only to be asked for no leave; one that permits no more does not.
    fn a_wider_leaf_below_keeps_its_table<F>() {
        let sizes = [(Level::L2, Level::L1), (Level::L3, Level::L2)];
        for (large, small) in sizes {
            for index in [0, 5, 511] {
                let gfn = Gfn(index * small.pages());
                let other = Gfn(100 * small.pages());
                for protected in [false, true] {
                    let rig = rig_with::<F>(large);
                    let mut vcpu = rig.vcpu();
                    let fault = Fault::write(gfn.address()).max_level(small);
                    assert_eq!(vcpu.fault(fault), Ok(fixed(small)));
                    if protected {
                        rig.mmu.write_protect(SPACE, Gfn(0)..Gfn(1 << 18), Level::L1).flush();
                    }
                    let before = rig.mmu.translate(SPACE, gfn);
                    rig.host().permit(Perms::RX);
                    assert_eq!(vcpu.fault(Fault::read(other.address())), Ok(fixed(small)));
                    assert_eq!(rig.mmu.translate(SPACE, gfn), before, "{protected}");
                }
                let rig = rig_with::<F>(large);
                let mut vcpu = rig.vcpu();
                rig.host().permit(Perms::RX);
                let fault = Fault::read(gfn.address()).max_level(small);
                assert_eq!(vcpu.fault(fault), Ok(fixed(small)));
                assert_eq!(vcpu.fault(Fault::read(other.address())), Ok(fixed(large)));
                rig.assert_maps(&mut vcpu, gfn, Pfn(BASE + gfn.0), large, Perms::RX);
            }
        }
    }

    /// The backing changed behind the MMU's back: the old page is flushed before the new one is mapped.
    fn another_page_is_mapped_only_after_a_flush<F>() {
        let rig = rig_with::<F>(Level::L1);
        rig.host().permit(Perms::RX);
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gpa(0), Access::Read).is_ok());
        rig.host().permit(Perms::RWX);
        rig.host().script().moved.insert(BASE, Pfn(BASE + 0x777));
        let mmu = rig.mmu.clone();
        rig.host().script().while_flushing = Some(Box::new(move || {
            assert_eq!(mmu.translate(SPACE, Gfn(0)), None, "break before make");
        }));
        let found = cpu.run(Gpa(0), Access::Write).expect("there is memory");
        assert_eq!(found.pfn, Pfn(BASE + 0x777));
        assert_eq!(rig.host().take_flushes().len(), 1);
        rig.assert_maps(&mut cpu.vcpu, Gfn(0), Pfn(BASE + 0x777), Level::L1, Perms::RWX);
        let found = cpu.touch(Gpa(0), Access::Read).result.expect("it is mapped");
        assert_eq!(found.pfn, Pfn(BASE + 0x777));
    }

    /// What was taken from a leaf for a while is given back to nobody who does not ask for it, and not if it maps another page
    /// by now.
    fn a_leaf_is_given_back_to_who_asks_for_its_page<F>() {
        for level in [Level::L1, Level::L2] {
            let rig = rig_with::<F>(level);
            let mut vcpu = rig.vcpu();
            let mapping = |pfn| tdp::Mapping::memory(Pfn(pfn), level, Perms::RWX);
            // The second block is for the way to it to be known.
            for gfn in [0, 512] {
                let mapped = vcpu.map(Gfn(gfn), mapping(BASE + gfn), Access::Write);
                assert_eq!(mapped, Ok(fixed(level)));
            }
            rig.mmu.write_protect(SPACE, Gfn(0)..Gfn(1 << 18), Level::L1).flush();
            let before = rig.mmu.translate(SPACE, Gfn(0));
            let prefetch = Fault { prefetch: true, ..Fault::write(Gpa(0)) };
            assert_eq!(vcpu.fault(prefetch), Ok(Outcome::Spurious));
            assert_eq!(rig.mmu.translate(SPACE, Gfn(0)), before);
            let _ = rig.host().take_flushes();
            let moved = vcpu.map(Gfn(0), mapping(8 * BASE), Access::Write);
            assert_eq!(moved, Ok(fixed(level)));
            rig.assert_maps(&mut vcpu, Gfn(0), Pfn(8 * BASE), level, Perms::RWX);
            assert_eq!(rig.host().take_flushes().len(), 1);
            let back = vcpu.map(Gfn(512), mapping(BASE + 512), Access::Write);
            assert_eq!(back, Ok(fixed(level)));
            assert_eq!(rig.host().take_flushes(), []);
        }
    }
}
