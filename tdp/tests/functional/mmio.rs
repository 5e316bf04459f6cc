//! Frames without memory, and read-only slots.

use crate::common::host::Memory;
use crate::common::processor::{Processor, Report};
use crate::common::rig::{ACCESSES, Rig, RigSetup};
use tdp::{
    Access, AdBits, AddressSpaceId, Fault, Gfn, Gpa, Level, Outcome, Perms, Pfn, Slot, SlotFlags,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);

const MMIO: Outcome = Outcome::Mmio { read_only: false };

/// Generation in the entry of `gfn`, if it is one of MMIO.
fn cached_generation<F: Processor>(rig: &Rig<F>, gfn: Gfn) -> Option<u64> {
    let root = rig.vcpu().load_root().expect("the root is there");
    let entry = F::mmio_entry(rig.entry(root, gfn, Level::L1)?)?;
    assert_eq!(entry.gfn, gfn);
    Some(u64::from(entry.generation))
}

both_formats! {
    /// No slot: to be emulated. The entry remembers it, so that the next access is told from a missing page.
    fn no_memory_is_mmio_and_remembered<F>() {
        let rig = Rig::<F>::new();
        let mut cpu = rig.processor(rig.vcpu());
        let gpa = Gpa(0xfee0_0008);
        assert_eq!(cpu.run(gpa, Access::Write), Err(MMIO));
        rig.assert_absent(&mut cpu.vcpu, gpa.gfn(), Report::Malformed);
        assert_eq!(cached_generation(&rig, gpa.gfn()), Some(0));
        for access in ACCESSES {
            assert_eq!(cpu.touch(gpa, access).result, Err(Report::Malformed));
            assert_eq!(cpu.vcpu.fault(Fault::new(gpa, access)), Ok(MMIO));
        }
        // Only there.
        rig.assert_absent(&mut cpu.vcpu, Gfn(gpa.gfn().0 + 1), Report::Absent);
        let stats = rig.mmu.stats();
        assert_eq!((stats.mmio, stats.tables, stats.pages), (5, 3, [0; 3]));
    }

    /// Remembering can be turned off: a guest then makes no tables for what is not there.
    fn remembering_can_be_turned_off<F>() {
        let rig = Rig::<F>::with(RigSetup { mmio_caching: false, ..RigSetup::default() });
        let mut vcpu = rig.vcpu();
        let gpa = Gpa(0xfee0_0008);
        assert_eq!(vcpu.fault(Fault::read(gpa)), Ok(MMIO));
        rig.assert_absent(&mut vcpu, gpa.gfn(), Report::Absent);
        assert_eq!(rig.mmu.stats().tables, 0);
    }

    /// What an entry cannot express is not remembered.
    fn what_does_not_fit_an_entry_is_not_remembered<F>() {
        let mut setup = RigSetup::default();
        setup.processor.root_level = Level::L5;
        let rig = Rig::<F>::with(setup);
        let mut vcpu = rig.vcpu();
        let gpa = Gfn(1 << 40).address();
        assert_eq!(vcpu.fault(Fault::read(gpa)), Ok(MMIO));
        assert_eq!(rig.mmu.stats().tables, 0);
        // A processor with all 52 bits of physical address has no reserved one: of the two formats only EPT has
        // another way.
        let mut setup = RigSetup::default();
        setup.processor.physical_bits = 52;
        let rig = Rig::<F>::with(setup);
        let mut vcpu = rig.vcpu();
        assert_eq!(vcpu.fault(Fault::read(Gpa(0))), Ok(MMIO));
        let (tables, report) = match F::NAME {
            "ept" => (3, Report::Malformed),
            _ => (0, Report::Absent),
        };
        assert_eq!(rig.mmu.stats().tables, tables);
        rig.assert_absent(&mut vcpu, Gfn(0), report);
    }

    /// Each change of the slots makes the entries of before old; the next fault renews the entry.
    fn a_change_of_slots_makes_entries_old<F>() {
        let rig = Rig::<F>::new();
        let mut vcpu = rig.vcpu();
        let gpa = Gpa(0x9000);
        assert_eq!(vcpu.fault(Fault::read(gpa)), Ok(MMIO));
        let slots = rig.mmu.slots();
        for round in 0..3 {
            let before = slots.generation();
            assert_eq!(cached_generation(&rig, gpa.gfn()), Some(before));
            let slot = Slot::new(Gfn(64)..Gfn(65), Memory::new(Pfn(1 << 20), Level::L1));
            if round % 2 == 0 {
                slots.insert(slot).expect("the place is free");
            } else {
                let id = slots.list(SPACE)[0].id();
                slots.remove(SPACE, id).expect("it is there");
            }
            assert_ne!(slots.generation(), before);
            assert_eq!(cached_generation(&rig, gpa.gfn()), Some(before));
            assert_eq!(vcpu.fault(Fault::read(gpa)), Ok(MMIO));
            assert_eq!(cached_generation(&rig, gpa.gfn()), Some(slots.generation()));
        }
    }

    /// Memory where there was none: the entry gives way, to a small leaf and to a large one.
    fn memory_takes_the_place_of_mmio<F>() {
        for level in [Level::L1, Level::L2] {
            let rig = Rig::<F>::new();
            let mut cpu = rig.processor(rig.vcpu());
            assert_eq!(cpu.run(Gpa(0x5000), Access::Read), Err(MMIO));
            let memory = Memory::new(Pfn(1 << 20), level);
            rig.mmu.slots().insert(Slot::new(Gfn(0)..Gfn(512), memory)).expect("the first slot");
            let found = cpu.run(Gpa(0x5000), Access::Write).expect("there is memory now");
            assert_eq!(found.pfn, Pfn(1 << 20 | 5));
            rig.assert_maps(&mut cpu.vcpu, Gfn(5), Pfn(1 << 20 | 5), level, Perms::RWX);
        }
    }

    /// A zap of the range takes MMIO entries along; one of leaves does not.
    fn a_zap_takes_mmio_entries<F>() {
        let rig = Rig::<F>::new();
        let mut vcpu = rig.vcpu();
        assert_eq!(vcpu.fault(Fault::read(Gpa(0x5000))), Ok(MMIO));
        rig.mmu.zap_leaves(SPACE, Gfn(5)..Gfn(6)).flush();
        rig.assert_absent(&mut vcpu, Gfn(5), Report::Malformed);
        let pending = rig.mmu.zap(SPACE, Gfn(5)..Gfn(6));
        assert_eq!((pending.leaves(), pending.tables()), (0, 0));
        drop(pending);
        rig.assert_absent(&mut vcpu, Gfn(5), Report::Absent);
        assert_eq!(vcpu.fault(Fault::read(Gpa(0x5000))), Ok(MMIO));
        rig.mmu.zap(SPACE, Gfn(0)..Gfn(512)).flush();
        rig.assert_absent(&mut vcpu, Gfn(5), Report::Absent);
        assert_eq!(rig.mmu.stats().tables, 2);
    }

    /// A read-only slot: reads map the page, without write; writes are to be emulated, mapped or not.
    fn writes_to_a_read_only_slot_are_emulated<F>() {
        let rig = Rig::<F>::new();
        let memory = Memory::new(Pfn(1 << 20), Level::L2);
        let slot = Slot::new(Gfn(0)..Gfn(512), memory).with_flags(SlotFlags::READ_ONLY);
        rig.mmu.slots().insert(slot).expect("the first slot");
        let mut cpu = rig.processor(rig.vcpu());
        let gpa = Gpa(0x7008);
        let emulate = Outcome::Mmio { read_only: true };
        assert_eq!(cpu.run(gpa, Access::Write), Err(emulate));
        rig.assert_absent(&mut cpu.vcpu, Gfn(7), Report::Absent);
        assert!(cpu.run(gpa, Access::Execute).is_ok());
        rig.assert_maps(&mut cpu.vcpu, Gfn(7), Pfn(1 << 20 | 7), Level::L2, Perms::RX);
        assert_eq!(cpu.run(gpa, Access::Write), Err(emulate));
        rig.assert_maps(&mut cpu.vcpu, Gfn(7), Pfn(1 << 20 | 7), Level::L2, Perms::RX);
        assert_eq!(rig.mmu.stats().mmio, 2);
    }

    /// The quick answer to an exit for a frame without memory holds under the slots of now and no others.
    fn mmio_is_told_without_a_look_at_the_slots<F>() {
        let rig = Rig::<F>::new();
        let mut vcpu = rig.vcpu();
        let gpa = Gpa(0x9008);
        assert!(!vcpu.is_mmio(gpa), "nothing is remembered yet");
        assert_eq!(vcpu.fault(Fault::read(gpa)), Ok(MMIO));
        assert!(vcpu.is_mmio(gpa));
        assert!(!vcpu.is_mmio(Gpa(0xa000)) && !vcpu.is_mmio(Gpa(u64::MAX)));
        assert_eq!(rig.mmu.stats().mmio, 2);
        let slot = Slot::new(Gfn(0)..Gfn(16), Memory::new(Pfn(1 << 20), Level::L1));
        let id = rig.mmu.slots().insert(slot).expect("the first slot");
        assert!(!vcpu.is_mmio(gpa), "there is memory now");
        assert_eq!(vcpu.fault(Fault::read(gpa)), Ok(Outcome::Fixed { level: Level::L1 }));
        assert!(!vcpu.is_mmio(gpa));
        rig.mmu.slots().remove(SPACE, id).expect("it is there");
        assert!(!vcpu.is_mmio(gpa));
        assert_eq!(vcpu.fault(Fault::read(gpa)), Ok(MMIO));
        assert!(vcpu.is_mmio(gpa));
    }

    /// The tables tell addresses apart as far as they reach. One beyond is not taken for the one that it would be without its high
    /// bits.
    fn nothing_is_remembered_of_addresses_beyond_the_tables<F>() {
        let rig = Rig::<F>::new();
        let mut vcpu = rig.vcpu();
        let gpa = Gpa(0x9000);
        assert_eq!(vcpu.fault(Fault::read(gpa)), Ok(MMIO));
        assert!(vcpu.is_mmio(gpa));
        for bit in 48..52 {
            assert!(!vcpu.is_mmio(Gpa(gpa.0 | 1 << bit)), "bit {bit}");
        }
    }

    /// The bits that an entry holds of a generation come round. Before any entry could be mistaken for a new one it is swept
    /// out, from the trees of all spaces and kinds; leaves stay.
    fn generations_come_round<F>() {
        // An entry holds 19 bits. The sweep is due each time that the lower 18 come round.
        for last in [(1 << 18) - 1, (1 << 19) - 1, 5 * (1 << 18) - 1] {
            let setup = RigSetup { slot_generation: last - 2, ..RigSetup::default() };
            let rig = Rig::<F>::with(setup);
            let slots = rig.mmu.slots();
            let slot = |gfn| Slot::new(Gfn(gfn)..Gfn(gfn + 1), Memory::new(Pfn(1 << 20), Level::L1));
            slots.insert(slot(0)).expect("the first slot");
            let gpa = Gpa(0x9000);
            let mut vcpus = [rig.vcpu(), rig.vcpu(), rig.vcpu()];
            let [_, other, without] = &mut vcpus;
            other.set_address_space(AddressSpaceId(1)).expect("a frame for the root");
            without.set_ad_bits(AdBits::Software).expect("a frame for the root");
            assert_eq!(vcpus[0].fault(Fault::read(Gpa(0))), Ok(Outcome::Fixed { level: Level::L1 }));
            for vcpu in &mut vcpus {
                assert_eq!(vcpu.fault(Fault::read(gpa)), Ok(MMIO));
                assert!(vcpu.is_mmio(gpa));
            }
            slots.insert(slot(64)).expect("the place is free");
            assert_eq!(slots.generation(), last);
            assert_eq!(rig.mmu.audit().mmio, 3, "stale, and left for the next fault");
            assert_eq!(vcpus[0].fault(Fault::read(gpa)), Ok(MMIO));
            assert!(vcpus[0].is_mmio(gpa) && !vcpus[1].is_mmio(gpa));
            slots.insert(slot(65)).expect("the place is free");
            assert_eq!(rig.mmu.audit().mmio, 0);
            assert_eq!(rig.mmu.stats().pages, [1, 0, 0]);
            assert!(vcpus.iter_mut().all(|vcpu| !vcpu.is_mmio(gpa)));
            assert_eq!(vcpus[0].fault(Fault::read(gpa)), Ok(MMIO));
            assert!(vcpus[0].is_mmio(gpa));
            slots.insert(slot(66)).expect("the place is free");
            assert_eq!(rig.mmu.audit().mmio, 1, "the next sweep is far away");
        }
    }
}
