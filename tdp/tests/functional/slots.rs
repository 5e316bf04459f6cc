//! Memory slots: what is refused, what a change takes away, two address spaces.

use crate::common::host::{Memory, TestHost};
use crate::common::processor::{Processor, Report};
use crate::common::rig::{Rig, RigSetup};
use tdp::{
    Access, AdBits, AddressSpaceId, Fault, Gfn, GfnRange, Gpa, Level, MmuError, Outcome, Perms,
    Pfn, RetryReason, RootTeardown, Slot, SlotError, SlotFlags, SlotId, SlotRemoval, Slots,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const OTHER: AddressSpaceId = AddressSpaceId(1);
const BASE: u64 = 1 << 20;

fn memory() -> Memory {
    Memory::new(Pfn(BASE), Level::L1)
}

fn gfns(start: u64, end: u64) -> GfnRange {
    GfnRange {
        start: Gfn(start),
        end: Gfn(end),
    }
}

fn slot(start: u64, end: u64) -> Slot<Memory> {
    Slot::new(gfns(start, end), memory())
}

fn fixed() -> Result<Outcome, tdp::FaultError> {
    Ok(Outcome::Fixed { level: Level::L1 })
}

/// Ranges of all slots of a space, in order.
fn ranges<F: Processor>(slots: &Slots<'_, F, TestHost>, as_id: AddressSpaceId) -> Vec<GfnRange> {
    slots.list(as_id).iter().map(|slot| slot.gfns()).collect()
}

/// Slots are removed by making roots obsolete; `reloads` says whether the host promises that vCPUs load new ones.
fn invalidating<F: Processor>(reloads: bool) -> Rig<F> {
    let rig = Rig::with(RigSetup {
        slot_removal: SlotRemoval::InvalidateRoots,
        ..RigSetup::default()
    });
    rig.host().script().reloads = reloads;
    rig
}

both_formats! {
    /// A read-only slot begins in the table of a plain one: what a vCPU remembers of the one, and of their table, says nothing
    /// about the other, though it is the slot used last.
    fn a_neighbour_in_one_table_keeps_its_own_rules<F>() {
        let rig = Rig::<F>::with(RigSetup::default());
        let slots = rig.mmu.slots();
        slots.insert(slot(0, 0x80)).expect("the first slot");
        let read_only = slot(0x80, 0x400).with_flags(SlotFlags::READ_ONLY);
        slots.insert(read_only).expect("the place is free");
        let mut vcpu = rig.vcpu();
        // The table and the leaf are remembered, then the other slot, by a page below another table.
        for gfn in 0..3 {
            assert_eq!(vcpu.fault(Fault::write(Gfn(gfn).address())), fixed());
        }
        assert_eq!(vcpu.fault(Fault::read(Gfn(0x200).address())), fixed());
        assert_eq!(
            vcpu.fault(Fault::write(Gfn(0x81).address())),
            Ok(Outcome::Mmio { read_only: true })
        );
    }

    /// A vCPU keeps what it remembers of tables in fewer places than a guest has tables: those that fall on one are told apart.
    fn tables_that_share_a_place_are_told_apart<F>() {
        let rig = Rig::<F>::with(RigSetup::default());
        rig.mmu.slots().insert(slot(0, 1 << 24)).expect("the first slot");
        let mut vcpu = rig.vcpu();
        // 256 MiB and 32 GiB further on.
        for far in [1 << 16, 1 << 23] {
            assert_eq!(vcpu.fault(Fault::write(Gfn(far).address())), fixed());
            for gfn in [far + 1, 3, 4, far + 5] {
                let outcome = vcpu.fault(Fault::write(Gfn(gfn).address()));
                assert!(matches!(outcome, Ok(Outcome::Fixed { .. } | Outcome::Spurious)));
                rig.assert_maps(&mut vcpu, Gfn(gfn), Pfn(BASE + gfn), Level::L1, Perms::RWX);
            }
        }
    }

    /// What a vCPU remembers of tables is of one address space, and of one kind of root: having gone to another it finds the
    /// tables there, and those of before when it comes back.
    fn what_is_remembered_is_of_one_root<F>() {
        let rig = Rig::<F>::new();
        let spaces = [(SPACE, BASE), (OTHER, 2 * BASE)];
        for (space, base) in spaces {
            let memory = Memory::new(Pfn(base), Level::L1);
            let slot = Slot::new(Gfn(0)..Gfn(0x200), memory).in_space(space);
            rig.mmu.slots().insert(slot).expect("the first slot");
        }
        let mut vcpu = rig.vcpu();
        for round in 0..2 {
            for (space, base) in spaces {
                vcpu.set_address_space(space).expect("a frame for the root");
                // By the long way, and by what is remembered.
                for gfn in (3 * round..).take(3) {
                    assert_eq!(vcpu.fault(Fault::write(Gfn(gfn).address())), fixed());
                    rig.assert_maps(&mut vcpu, Gfn(gfn), Pfn(base + gfn), Level::L1, Perms::RWX);
                }
            }
        }
        let root = vcpu.set_ad_bits(AdBits::Software).expect("a frame for the root");
        for gfn in 0..3 {
            assert_eq!(vcpu.fault(Fault::write(Gfn(gfn).address())), fixed());
            let leaf = rig.entry(root, Gfn(gfn), Level::L1).expect("there is a table");
            assert!(leaf.0 & F::AD_SOFTWARE != 0);
        }
    }

    /// A slot is removed by making roots obsolete: nothing is zapped or flushed, vCPUs are told to load new roots, faults go
    /// on before the old ones are taken down, and that flushes nothing either.
    fn a_slot_goes_with_the_roots<F>() {
        let rig = invalidating::<F>(true);
        let slots = rig.mmu.slots();
        let id = slots.insert(slot(0, 0x200)).expect("the first slot");
        slots.insert(slot(0x200, 0x400)).expect("the place is free");
        let mut cpu = rig.processor(rig.vcpu());
        for gfn in [0x1ff, 0x200] {
            assert!(cpu.run(Gfn(gfn).address(), Access::Write).is_ok());
        }
        let root = cpu.root();
        let teardown = slots.remove_lazily(SPACE, id).expect("it is there");
        assert_eq!(rig.host().script().reloads_asked, 1);
        assert!(cpu.vcpu.is_root_obsolete());
        assert!(rig.entry(root, Gfn(0x1ff), Level::L1).is_some_and(F::is_mmu_present));
        let gone = Err(Outcome::Mmio { read_only: false });
        assert_eq!(cpu.run(Gfn(0x1ff).address(), Access::Read), gone);
        assert_ne!(cpu.root().generation, root.generation);
        rig.assert_absent(&mut cpu.vcpu, Gfn(0x200), Report::Absent);
        assert!(cpu.run(Gfn(0x200).address(), Access::Write).is_ok());
        teardown.finish();
        rig.assert_maps(&mut cpu.vcpu, Gfn(0x200), Pfn(BASE), Level::L1, Perms::RWX);
        assert_eq!(rig.host().take_flushes(), []);
        assert_eq!((rig.mmu.stats().pages, rig.mmu.stats().tables), ([1, 0, 0], 4));
    }

    /// A host that cannot promise it: what the slot maps is zapped and flushed, under roots that were obsolete before too.
    fn a_slot_goes_before_the_roots_where_vcpus_stay<F>() {
        let rig = invalidating::<F>(false);
        let slots = rig.mmu.slots();
        let id = slots.insert(slot(0, 0x200)).expect("the first slot");
        slots.insert(slot(0x200, 0x400)).expect("the place is free");
        let mut late = rig.processor(rig.vcpu());
        for gfn in [0x1ff, 0x200] {
            assert!(late.run(Gfn(gfn).address(), Access::Write).is_ok());
        }
        let older = rig.mmu.invalidate_roots();
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gfn(0x1ff).address(), Access::Write).is_ok());
        let teardown = slots.remove_lazily(SPACE, id).expect("it is there");
        let flushed = rig.host().take_flushes();
        assert_eq!(flushed.len(), 1);
        assert_eq!((flushed[0].as_id, flushed[0].range), (SPACE, gfns(0x1ff, 0x200)));
        for cpu in [&mut late, &mut cpu] {
            let touched = cpu.touch(Gfn(0x1ff).address(), Access::Read);
            assert_eq!(touched.result, Err(Report::Absent));
        }
        assert!(late.touch(Gfn(0x200).address(), Access::Read).result.is_ok());
        drop((older, teardown));
        let touched = late.touch(Gfn(0x200).address(), Access::Read);
        assert_eq!(touched.result, Err(Report::Absent));
        assert_eq!(rig.host().take_flushes().len(), 2, "one for each root");
    }

    /// A slot moves with the roots; what cannot be changes nothing.
    fn a_slot_moves_with_the_roots<F>() {
        let rig = invalidating::<F>(true);
        let slots = rig.mmu.slots();
        let id = slots.insert(slot(0, 0x200)).expect("the first slot");
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gfn(3).address(), Access::Write).is_ok());
        assert!(slots.move_to(SPACE, id, Gfn(u64::MAX)).is_err());
        assert!(slots.remove_lazily(SPACE, SlotId(7)).is_err());
        assert!(!cpu.vcpu.is_root_obsolete());
        slots.move_to(SPACE, id, Gfn(0x100)).expect("only itself is there");
        assert!(cpu.vcpu.is_root_obsolete());
        assert!(cpu.run(Gfn(3).address(), Access::Write).is_err());
        let found = cpu.run(Gfn(0x103).address(), Access::Write).expect("it is here now");
        assert_eq!(found.pfn, Pfn(BASE + 3));
        assert_eq!(rig.host().take_flushes(), []);
        // A change of flags leaves the roots.
        slots.set_flags(SPACE, id, SlotFlags::READ_ONLY).expect("it is there");
        assert!(!cpu.vcpu.is_root_obsolete());
        assert_eq!(rig.mmu.stats().roots_invalidated, 1);
        slots.remove_lazily(SPACE, id).map(RootTeardown::finish).expect("it is there");
        assert_eq!(rig.mmu.stats().pages, [0; 3]);
    }

    /// Every slot that cannot be is refused with its reason, and nothing changes.
    fn impossible_slots_are_refused<F>() {
        let rig = Rig::<F>::new();
        let slots = rig.mmu.slots();
        let limit = Level::L4.gfn_limit();
        assert_eq!(slots.addressable(), gfns(0, limit.0));
        let first = slots.insert(slot(0x100, 0x200)).expect("the first slot");
        let with_id = slot(0x800, 0x900).with_id(SlotId(70));
        assert_eq!(slots.insert(with_id), Ok(SlotId(70)));
        let generation = slots.generation();
        let overlap = |start, end| SlotError::Overlap {
            gfns: gfns(start, end),
            other: first,
            other_gfns: gfns(0x100, 0x200),
        };
        let nowhere = AddressSpaceId(2);
        let refused = [
            (slot(5, 5), SlotError::Empty { gfns: gfns(5, 5) }),
            (slot(9, 5), SlotError::Empty { gfns: gfns(9, 5) }),
            (
                slot(limit.0 - 1, limit.0 + 1),
                SlotError::BeyondWidth { gfns: gfns(limit.0 - 1, limit.0 + 1), limit },
            ),
            (slot(0, 0x101), overlap(0, 0x101)),
            (slot(0x1ff, 0x300), overlap(0x1ff, 0x300)),
            (slot(0x150, 0x160), overlap(0x150, 0x160)),
            (slot(0, 0x300), overlap(0, 0x300)),
            (slot(0, 1).with_id(first), SlotError::IdInUse { id: first }),
            (slot(0, 1).in_space(nowhere), SlotError::NoSuchSpace { as_id: nowhere }),
        ];
        for (slot, error) in refused {
            assert_eq!(slots.insert(slot), Err(error), "{error}");
        }
        let no_such = |id| Err(SlotError::NoSuchSlot { as_id: SPACE, id });
        assert_eq!(slots.remove(SPACE, SlotId(9)), no_such(SlotId(9)));
        assert_eq!(slots.move_to(SPACE, SlotId(9), Gfn(0)), no_such(SlotId(9)));
        assert_eq!(slots.set_flags(SPACE, SlotId(9), SlotFlags::empty()), no_such(SlotId(9)));
        assert!(slots.remove(nowhere, first).is_err());
        assert_eq!(
            slots.move_to(SPACE, SlotId(70), Gfn(0x180)),
            Err(overlap(0x180, 0x280))
        );
        assert_eq!(
            slots.move_to(SPACE, first, Gfn(limit.0 - 1)),
            Err(SlotError::BeyondWidth { gfns: gfns(limit.0 - 1, limit.0 + 0xff), limit })
        );
        assert!(slots.move_to(SPACE, first, Gfn(u64::MAX)).is_err());
        assert_eq!(slots.generation(), generation);
        assert_eq!(ranges(&slots, SPACE), [gfns(0x100, 0x200), gfns(0x800, 0x900)]);
        // Neighbours do not overlap.
        assert!(slots.insert(slot(0, 0x100)).is_ok());
        assert!(slots.insert(slot(0x200, 0x800)).is_ok());
        assert!(slots.insert(slot(limit.0 - 1, limit.0)).is_ok());
        assert_eq!(ranges(&slots, SPACE).len(), 5);
    }

    /// A log needs memory in proportion to its slot: how much a slot may have is for the embedder's caller to say, and what is
    /// too much is told, not tried.
    fn the_log_of_a_slot_has_a_bound<F>() {
        let rig = Rig::<F>::new();
        let slots = rig.mmu.slots();
        let most = (1 << 31) - 1;
        let too_large = slot(0, most + 1).with_flags(SlotFlags::LOG_DIRTY);
        let refused = Err(SlotError::TooLargeToLog { gfns: gfns(0, most + 1) });
        assert_eq!(slots.insert(too_large), refused);
        assert_eq!(ranges(&slots, SPACE), []);
        let id = slots.insert(slot(0, most + 1)).expect("a free range");
        let refused = refused.map(drop);
        for flags in [SlotFlags::LOG_DIRTY, SlotFlags::LOG_DIRTY | SlotFlags::READ_ONLY] {
            assert_eq!(slots.set_flags(SPACE, id, flags), refused);
            let still = slots.by_id(SPACE, id).expect("it stays");
            assert_eq!(still.flags(), SlotFlags::empty());
        }
        slots.remove(SPACE, id).expect("it is there");
        let logged = slot(0, 0x100).with_flags(SlotFlags::LOG_DIRTY);
        assert!(slots.insert(logged).is_ok());
    }

    /// Slots are found by frame and by id, and say what they were made with.
    fn slots_are_found<F>() {
        let rig = Rig::<F>::new();
        let slots = rig.mmu.slots();
        let made = slot(0x100, 0x200).with_id(SlotId(7)).with_flags(SlotFlags::LOG_DIRTY);
        slots.insert(made).expect("the first slot");
        for gfn in [0x100, 0x1ff] {
            let found = slots.find(SPACE, Gfn(gfn)).expect("it is in there");
            assert_eq!((found.id(), found.as_id()), (SlotId(7), SPACE));
            assert_eq!((found.gfns(), found.offset(Gfn(gfn))), (gfns(0x100, 0x200), gfn - 0x100));
            assert_eq!((found.flags(), *found.backing()), (SlotFlags::LOG_DIRTY, memory()));
        }
        for gfn in [0, 0xff, 0x200, u64::MAX] {
            assert!(slots.find(SPACE, Gfn(gfn)).is_none());
        }
        assert!(slots.by_id(SPACE, SlotId(7)).is_some());
        assert!(slots.by_id(OTHER, SlotId(7)).is_none());
        assert!(slots.find(AddressSpaceId(200), Gfn(0x100)).is_none());
    }

    /// A removed slot maps nothing, was flushed, and its frames have no memory.
    fn a_removed_slot_is_gone<F>() {
        let rig = Rig::<F>::new();
        let slots = rig.mmu.slots();
        let id = slots.insert(slot(0, 0x200)).expect("the first slot");
        slots.insert(slot(0x200, 0x400)).expect("the place is free");
        let mut cpu = rig.processor(rig.vcpu());
        for gfn in [0x1ff, 0x200] {
            assert!(cpu.run(Gfn(gfn).address(), Access::Write).is_ok());
        }
        slots.remove(SPACE, id).expect("it is there");
        let flushed = rig.host().take_flushes();
        assert_eq!(flushed.len(), 1);
        assert_eq!((flushed[0].as_id, flushed[0].range), (SPACE, gfns(0x1ff, 0x200)));
        assert_eq!(cpu.touch(Gfn(0x1ff).address(), Access::Read).result, Err(Report::Absent));
        rig.assert_absent(&mut cpu.vcpu, Gfn(0x1ff), Report::Absent);
        rig.assert_maps(&mut cpu.vcpu, Gfn(0x200), Pfn(BASE), Level::L1, Perms::RWX);
        let gpa = Gfn(0x1ff).address();
        assert_eq!(
            cpu.run(gpa, Access::Read),
            Err(Outcome::Mmio { read_only: false })
        );
        assert_eq!(ranges(&slots, SPACE), [gfns(0x200, 0x400)]);
    }

    /// A moved slot is mapped at its new place only, with the same backing.
    fn a_moved_slot_is_elsewhere<F>() {
        let rig = Rig::<F>::new();
        let slots = rig.mmu.slots();
        let id = slots.insert(slot(0, 0x200)).expect("the first slot");
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gfn(3).address(), Access::Write).is_ok());
        // It may overlap itself.
        slots.move_to(SPACE, id, Gfn(0x100)).expect("only itself is there");
        assert_eq!(cpu.touch(Gfn(3).address(), Access::Write).result, Err(Report::Absent));
        let gpa = Gfn(3).address();
        assert!(cpu.run(gpa, Access::Write).is_err());
        let found = cpu.run(Gfn(0x103).address(), Access::Write).expect("it is here now");
        assert_eq!(found.pfn, Pfn(BASE + 3));
        assert_eq!(slots.by_id(SPACE, id).map(|slot| slot.gfns()), Some(gfns(0x100, 0x300)));
    }

    /// Making a slot read-only takes the write permission away from every vCPU; making it writable gives it back.
    fn read_only_can_be_turned_on_and_off<F>() {
        let rig = Rig::<F>::new();
        let slots = rig.mmu.slots();
        let id = slots.insert(slot(0, 0x200)).expect("the first slot");
        let mut cpu = rig.processor(rig.vcpu());
        let gpa = Gpa(0x3000);
        assert!(cpu.run(gpa, Access::Write).is_ok());
        slots.set_flags(SPACE, id, SlotFlags::READ_ONLY).expect("it is there");
        assert_eq!(
            cpu.run(gpa, Access::Write),
            Err(Outcome::Mmio { read_only: true })
        );
        assert!(cpu.run(gpa, Access::Read).is_ok());
        rig.assert_maps(&mut cpu.vcpu, Gfn(3), Pfn(BASE + 3), Level::L1, Perms::RX);
        slots.set_flags(SPACE, id, SlotFlags::empty()).expect("it is there");
        assert!(cpu.run(gpa, Access::Write).is_ok());
        rig.assert_maps(&mut cpu.vcpu, Gfn(3), Pfn(BASE + 3), Level::L1, Perms::RWX);
    }

    /// Logging writes splits what is mapped and takes its write permission; new leaves are small.
    fn dirty_logging_makes_new_leaves_small<F>() {
        let rig = Rig::<F>::new();
        let slots = rig.mmu.slots();
        let large = Slot::new(gfns(0, 0x400), Memory::new(Pfn(BASE), Level::L2));
        let id = slots.insert(large).expect("the first slot");
        let mut vcpu = rig.vcpu();
        assert_eq!(vcpu.fault(Fault::read(Gpa(0))), Ok(Outcome::Fixed { level: Level::L2 }));
        let generation = slots.generation();
        slots.set_flags(SPACE, id, SlotFlags::LOG_DIRTY).expect("it is there");
        assert_ne!(slots.generation(), generation);
        assert_eq!(rig.host().take_flushes().len(), 1);
        assert_eq!(vcpu.fault(Fault::read(Gfn(0x200).address())), fixed());
        assert_eq!(rig.mmu.stats().pages, [513, 0, 0]);
    }

    /// A vCPU that used a slot last is not misled by what comes after it.
    fn the_slot_used_last_is_not_trusted_for_long<F>() {
        let rig = Rig::<F>::new();
        let slots = rig.mmu.slots();
        let mut vcpu = rig.vcpu();
        for round in 0..4 {
            let backing = Memory::new(Pfn(BASE * (round + 1)), Level::L1);
            let id = slots.insert(Slot::new(gfns(0, 8), backing)).expect("the place is free");
            assert_eq!(vcpu.fault(Fault::read(Gpa(0))), fixed());
            assert_eq!(vcpu.fault(Fault::read(Gpa(0x1000))), fixed());
            let pfn = Pfn(BASE * (round + 1) + 1);
            rig.assert_maps(&mut vcpu, Gfn(1), pfn, Level::L1, Perms::RWX);
            slots.remove(SPACE, id).expect("it is there");
            let outcome = vcpu.fault(Fault::read(Gpa(0)));
            assert!(matches!(outcome, Ok(Outcome::Mmio { .. })), "{outcome:?}");
        }
    }

    /// While a slot is being changed, faults on it are to be tried again; others are not held up.
    fn faults_on_a_changing_slot_retry<F>() {
        let rig = Rig::<F>::new();
        let slots = rig.mmu.slots();
        let id = slots.insert(slot(0, 8)).expect("the first slot");
        slots.insert(slot(8, 16)).expect("the place is free");
        let mut vcpu = rig.vcpu();
        assert_eq!(vcpu.fault(Fault::read(Gpa(0))), fixed());
        let mut other = rig.vcpu();
        rig.host().script().while_flushing = Some(Box::new(move || {
            for _ in 0..2 {
                let retry = Outcome::Retry(RetryReason::SlotChanging);
                assert_eq!(other.fault(Fault::read(Gpa(0x1000))), Ok(retry));
                let mut batch = other.batch().expect("there are frames");
                assert_eq!(batch.fault(Fault::read(Gpa(0x1000))), Ok(retry));
            }
            assert_eq!(other.fault(Fault::read(Gpa(0x8000))), fixed());
        }));
        slots.remove(SPACE, id).expect("it is there");
        let at = RetryReason::ALL.iter().position(|&r| r == RetryReason::SlotChanging);
        assert_eq!(rig.mmu.stats().retries[at.expect("it is listed")], 4);
        rig.assert_absent(&mut vcpu, Gfn(1), Report::Absent);
        rig.assert_maps(&mut vcpu, Gfn(8), Pfn(BASE), Level::L1, Perms::RWX);
    }

    /// Two address spaces share nothing but the MMU.
    fn address_spaces_are_apart<F>() {
        let rig = Rig::<F>::new();
        let slots = rig.mmu.slots();
        let first = slots.insert(slot(0, 8)).expect("the first slot");
        let other = Slot::new(gfns(0, 8), Memory::new(Pfn(2 * BASE), Level::L1)).in_space(OTHER);
        assert_eq!(slots.insert(other), Ok(first), "ids are each space's own");
        let mut normal = rig.vcpu();
        let mut smm = rig.vcpu();
        let root = smm.set_address_space(OTHER).expect("it exists");
        assert_eq!(smm.address_space(), OTHER);
        assert_ne!(root.hpa, normal.load_root().expect("the root is there").hpa);
        assert_eq!(normal.fault(Fault::read(Gpa(0))), fixed());
        assert_eq!(smm.fault(Fault::read(Gpa(0x1000))), fixed());
        rig.assert_maps(&mut normal, Gfn(0), Pfn(BASE), Level::L1, Perms::RWX);
        rig.assert_absent(&mut normal, Gfn(1), Report::Absent);
        rig.assert_maps(&mut smm, Gfn(1), Pfn(2 * BASE + 1), Level::L1, Perms::RWX);
        rig.assert_absent(&mut smm, Gfn(0), Report::Absent);
        // A sweep, an invalidation, a removal in one leaves the other alone.
        assert_eq!(rig.mmu.zap(OTHER, gfns(0, 1)).leaves(), 0);
        let invalidation = rig.mmu.invalidate_begin(OTHER, gfns(2, 8));
        assert_eq!(normal.fault(Fault::read(Gpa(0x2000))), fixed());
        drop(invalidation);
        slots.remove(SPACE, first).expect("it is there");
        rig.assert_maps(&mut smm, Gfn(1), Pfn(2 * BASE + 1), Level::L1, Perms::RWX);
        // No id of a space that is not there stands for a root that was left.
        for nowhere in (2..=u8::MAX).map(AddressSpaceId) {
            assert_eq!(smm.set_address_space(nowhere), Err(MmuError::NoSuchSpace(nowhere)));
            assert_eq!(smm.address_space(), OTHER, "it stays where it was");
        }
        // Back again.
        smm.set_address_space(SPACE).expect("it exists");
        let outcome = smm.fault(Fault::read(Gpa(0x1000)));
        assert!(matches!(outcome, Ok(Outcome::Mmio { .. })), "{outcome:?}");
        let nowhere = AddressSpaceId(2);
        assert_eq!(smm.set_address_space(nowhere), Err(MmuError::NoSuchSpace(nowhere)));
        assert_eq!(smm.address_space(), SPACE, "it stays where it was");
    }

    /// An MMU with one address space has no second one.
    fn there_are_as_many_spaces_as_asked_for<F>() {
        let rig = Rig::<F>::with(RigSetup { address_spaces: 1, ..RigSetup::default() });
        let refused = rig.mmu.slots().insert(slot(0, 8).in_space(OTHER));
        assert_eq!(refused, Err(SlotError::NoSuchSpace { as_id: OTHER }));
        let mut vcpu = rig.vcpu();
        assert_eq!(vcpu.set_address_space(OTHER), Err(MmuError::NoSuchSpace(OTHER)));
    }
}

/// Ids that nobody chose come after those in use, and begin anew where there is none after the last.
#[test]
fn a_slot_without_an_id_gets_one_that_is_free() {
    let rig = Rig::<tdp::Ept>::new();
    let slots = rig.mmu.slots();
    let last = SlotId(u32::MAX);
    let before_last = SlotId(u32::MAX - 1);
    for (n, id) in [(0, last), (1, before_last), (2, SlotId(0))] {
        slots
            .insert(slot(n, n + 1).with_id(id))
            .expect("the place is free");
    }
    assert_eq!(slots.insert(slot(3, 4)), Ok(SlotId(1)));
    assert_eq!(slots.insert(slot(4, 5)), Ok(SlotId(2)));
    let taken = slots.insert(slot(5, 6).with_id(last));
    assert_eq!(taken, Err(SlotError::IdInUse { id: last }));
}
