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
}
