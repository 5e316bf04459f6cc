//! No executable large leaves: what a fault installs, which tables are marked, recovery, and the switch.

use crate::common::host::Memory;
use crate::common::processor::Processor;
use crate::common::rig::{Cpu, Rig};
use tdp::{
    Access, AdBits, AddressSpaceId, Fault, Format, Gfn, Gpa, Level, Mmu, Outcome, Perms, Pfn, Slot,
    SlotFlags, SlotId,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);
/// Frames of 1 GiB.
const GIB: u64 = 1 << 18;
const BASE: u64 = 4 * GIB;
const ALL: std::ops::Range<Gfn> = Gfn(0)..Gfn(2 * GIB);

fn rig_with<F: Processor>(level: Level) -> Rig<F> {
    rig_of(AdBits::Processor, level)
}

fn rig_of<F: Processor>(ad_bits: AdBits, level: Level) -> Rig<F> {
    let rig = Rig::with_ad_bits(ad_bits);
    assert!(rig.mmu.set_nx_huge_pages(true).is_some());
    let slot = Slot::new(ALL, Memory::new(Pfn(BASE), level));
    rig.mmu.slots().insert(slot).expect("the first slot");
    rig
}

fn level_of<F: Format, H: tdp::Host>(mmu: &Mmu<F, H>, gfn: u64) -> Option<Level> {
    mmu.translate(SPACE, Gfn(gfn)).map(|leaf| leaf.level)
}

/// Whether the entry of `level` points to a table that is marked.
fn is_marked<F: Processor>(rig: &Rig<F>, cpu: &Cpu<F>, gfn: u64, level: Level) -> bool {
    let spte = rig
        .entry(cpu.root(), Gfn(gfn), level)
        .expect("the tables are there");
    F::is_table(spte) && spte.0 & F::NX_SPLIT != 0
}

both_formats! {
    /// Reads and writes get large leaves that no fetch passes.
    fn a_large_leaf_permits_no_fetch<F>() {
        for level in [Level::L2, Level::L3] {
            let rig = rig_with::<F>(level);
            let mut cpu = rig.processor(rig.vcpu());
            assert!(cpu.run(Gpa(0), Access::Read).is_ok());
            rig.assert_maps(&mut cpu.vcpu, Gfn(9), Pfn(BASE + 9), level, Perms::RW);
            assert!(cpu.run(Gfn(9).address(), Access::Write).is_ok());
            rig.assert_maps(&mut cpu.vcpu, Gfn(9), Pfn(BASE + 9), level, Perms::RW);
            assert_eq!(rig.mmu.stats().nx_tables, 0);
        }
    }

    /// A fetch splits it, down to leaves that permit fetches again: the neighbour's too. The tables are marked.
    fn a_fetch_splits_the_large_leaf<F>() {
        for (level, marked) in [(Level::L2, 1), (Level::L3, 2)] {
            let rig = rig_with::<F>(level);
            let mut cpu = rig.processor(rig.vcpu());
            assert!(cpu.run(Gpa(0), Access::Write).is_ok());
            let fetch = Fault::execute(Gfn(3).address());
            assert_eq!(cpu.vcpu.fault(fetch), Ok(Outcome::Fixed { level: Level::L1 }));
            for gfn in [0, 3, 511] {
                rig.assert_maps(&mut cpu.vcpu, Gfn(gfn), Pfn(BASE + gfn), Level::L1, Perms::RWX);
            }
            assert!(cpu.run(Gfn(4).address(), Access::Execute).is_ok());
            let stats = rig.mmu.stats();
            assert_eq!((stats.nx_tables, stats.splits), (marked, marked));
            assert!(is_marked(&rig, &cpu, 3, Level::L2));
            assert_eq!(is_marked(&rig, &cpu, 3, Level::L3), level == Level::L3);
            if level == Level::L3 {
                // The rest of it is as large as can be, and withholds fetches still.
                rig.assert_maps(&mut cpu.vcpu, Gfn(512), Pfn(BASE + 512), Level::L2, Perms::RW);
            }
        }
    }

    /// A fetch where nothing is makes a marked table with one leaf; faults beside it step down and leave the table alone.
    fn a_fetch_into_a_hole_keeps_its_table<F>() {
        for (level, marked) in [(Level::L2, 1), (Level::L3, 2)] {
            let rig = rig_with::<F>(level);
            let mut cpu = rig.processor(rig.vcpu());
            assert!(cpu.run(Gfn(3).address(), Access::Execute).is_ok());
            rig.assert_maps(&mut cpu.vcpu, Gfn(3), Pfn(BASE + 3), Level::L1, Perms::RWX);
            assert_eq!(rig.mmu.stats().nx_tables, marked);
            assert!(cpu.run(Gfn(4).address(), Access::Write).is_ok());
            rig.assert_maps(&mut cpu.vcpu, Gfn(4), Pfn(BASE + 4), Level::L1, Perms::RWX);
            assert!(cpu.run(Gfn(3).address(), Access::Execute).is_ok());
            if level == Level::L3 {
                assert!(cpu.run(Gfn(513).address(), Access::Write).is_ok());
                rig.assert_maps(&mut cpu.vcpu, Gfn(513), Pfn(BASE + 513), Level::L2, Perms::RW);
            }
            let stats = rig.mmu.stats();
            assert_eq!((stats.nx_tables, stats.collapses), (marked, 0));
        }
    }

    /// A table that stands for another reason is not marked, and gives way as ever.
    fn other_tables_are_not_marked<F>() {
        // Small pages by the host, by the fault, by the log: a fetch costs nothing there.
        let rig = rig_with::<F>(Level::L1);
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gfn(3).address(), Access::Execute).is_ok());
        assert_eq!(rig.mmu.stats().nx_tables, 0);

        let rig = rig_with::<F>(Level::L2);
        let mut vcpu = rig.vcpu();
        let fixed = |level| Ok(Outcome::Fixed { level });
        let small = Fault::execute(Gpa(0)).max_level(Level::L1);
        assert_eq!(vcpu.fault(small), fixed(Level::L1));
        assert_eq!(rig.mmu.stats().nx_tables, 0);
        assert_eq!(vcpu.fault(Fault::write(Gfn(1).address())), fixed(Level::L2));
        assert_eq!(rig.mmu.stats().collapses, 1);
        rig.mmu.split(SPACE, ALL, Level::L1).expect("there are frames");
        assert_eq!(rig.mmu.stats().nx_tables, 0);
        // Split ahead of time, its leaves permit fetches all the same.
        rig.assert_maps(&mut vcpu, Gfn(1), Pfn(BASE + 1), Level::L1, Perms::RWX);
    }

    /// What the host does not permit is not given by a split: only what the policy withheld comes back.
    fn a_split_gives_no_more_than_the_host<F>() {
        let rig = rig_with::<F>(Level::L2);
        rig.host().permit(Perms::RW);
        let mut vcpu = rig.vcpu();
        assert!(vcpu.fault(Fault::write(Gpa(0))).is_ok());
        rig.mmu.split(SPACE, ALL, Level::L1).expect("there are frames");
        rig.assert_maps(&mut vcpu, Gfn(1), Pfn(BASE + 1), Level::L1, Perms::RW);
    }

    /// Aged leaves that were split have what was withheld, once they are used.
    fn an_aged_leaf_splits_as_well<F>() {
        for ad_bits in [AdBits::Processor, AdBits::Software] {
            let rig = rig_of::<F>(ad_bits, Level::L2);
            let mut cpu = rig.processor(rig.vcpu());
            assert!(cpu.run(Gpa(0), Access::Write).is_ok());
            assert!(rig.mmu.age(SPACE, ALL));
            assert!(cpu.run(Gfn(3).address(), Access::Execute).is_ok());
            assert!(cpu.run(Gfn(4).address(), Access::Execute).is_ok());
            assert!(!rig.mmu.test_age(SPACE, Gfn(5)..Gfn(6)));
            assert!(cpu.run(Gfn(5).address(), Access::Write).is_ok());
            rig.assert_maps(&mut cpu.vcpu, Gfn(5), Pfn(BASE + 5), Level::L1, Perms::RWX);
        }
    }

    /// What a prefault maps, and a bare map, is by the same policy.
    fn no_way_in_is_left_out<F>() {
        let rig = rig_with::<F>(Level::L2);
        let mut vcpu = rig.vcpu();
        vcpu.prefault(Gfn(0)..Gfn(512), tdp::Visibility::Shared).expect("there are frames");
        rig.assert_maps(&mut vcpu, Gfn(9), Pfn(BASE + 9), Level::L2, Perms::RW);
        let far = Gfn(4 * GIB);
        let mapping = tdp::Mapping::memory(Pfn(7 * GIB), Level::L2, Perms::RWX);
        assert_eq!(vcpu.map(far, mapping, Access::Read), Ok(Outcome::Fixed { level: Level::L2 }));
        rig.assert_maps(&mut vcpu, far, Pfn(7 * GIB), Level::L2, Perms::RW);
        assert_eq!(vcpu.map(far, mapping, Access::Execute), Ok(Outcome::Fixed { level: Level::L1 }));
        rig.assert_maps(&mut vcpu, far, Pfn(7 * GIB), Level::L1, Perms::RWX);
    }

    /// Recovery takes marked tables, at most so many, each in its turn, with one flush; the next access is large again.
    fn recovery_takes_marked_tables_in_turn<F>() {
        let rig = rig_with::<F>(Level::L2);
        let mut cpu = rig.processor(rig.vcpu());
        for block in 0..5 {
            assert!(cpu.run(Gfn(block * 512).address(), Access::Execute).is_ok());
        }
        // One that is not marked.
        let other = Fault::write(Gfn(5 * 512).address()).max_level(Level::L1);
        assert_eq!(cpu.vcpu.fault(other), Ok(Outcome::Fixed { level: Level::L1 }));
        assert!(rig.mmu.recover_nx(0).is_empty());
        let standing = || (0..6).filter(|block| level_of(&rig.mmu, block * 512).is_some()).collect::<Vec<_>>();
        for (limit, left) in [(2, vec![2, 3, 4, 5]), (2, vec![4, 5])] {
            let pending = rig.mmu.recover_nx(limit);
            assert_eq!((pending.tables(), pending.leaves()), (limit, limit as u64));
            pending.flush();
            assert_eq!(rig.host().take_flushes().len(), 1);
            assert_eq!(standing(), left);
        }
        // Back at the beginning: the one at the end has its turn before it.
        assert!(cpu.run(Gfn(0).address(), Access::Execute).is_ok());
        rig.mmu.recover_nx(1).flush();
        assert_eq!(standing(), [0, 5]);
        rig.mmu.recover_nx(9).flush();
        assert_eq!(standing(), [5]);
        let stats = rig.mmu.stats();
        assert_eq!((stats.nx_tables, stats.nx_recovered), (0, 6));
        assert!(cpu.run(Gfn(0).address(), Access::Write).is_ok());
        rig.assert_maps(&mut cpu.vcpu, Gfn(0), Pfn(BASE), Level::L2, Perms::RW);
    }

    /// A marked table takes the marked tables below it along.
    fn recovery_takes_a_whole_gibibyte<F>() {
        let rig = rig_with::<F>(Level::L3);
        let mut cpu = rig.processor(rig.vcpu());
        for block in 0..3 {
            assert!(cpu.run(Gfn(block * 512).address(), Access::Execute).is_ok());
        }
        assert_eq!(rig.mmu.stats().nx_tables, 4);
        let pending = rig.mmu.recover_nx(1);
        assert_eq!(pending.tables(), 4);
        pending.flush();
        assert_eq!(rig.mmu.stats().nx_tables, 0);
        assert!(cpu.run(Gfn(0).address(), Access::Write).is_ok());
        rig.assert_maps(&mut cpu.vcpu, Gfn(0), Pfn(BASE), Level::L3, Perms::RW);
    }

    /// What the guest cached through a table that recovery took goes with the flush, and the table's frame after it.
    fn recovery_flushes_before_it_frees<F>() {
        let rig = rig_with::<F>(Level::L2);
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gfn(0).address(), Access::Execute).is_ok());
        let out = rig.frames().allocated();
        let pending = rig.mmu.recover_nx(1);
        rig.mmu.synchronize();
        assert_eq!(rig.frames().allocated(), out);
        assert!(!cpu.touch(Gfn(0).address(), Access::Execute).walked, "still cached");
        pending.flush();
        assert!(cpu.touch(Gfn(0).address(), Access::Execute).result.is_err());
        rig.mmu.synchronize();
        assert_eq!(rig.frames().allocated(), out - 1);
    }

    /// The table of a logged slot stays; the same frame of another address space, whose slot is not logged, does not.
    fn a_logged_slot_keeps_its_tables<F>() {
        let rig = Rig::<F>::new();
        assert!(rig.mmu.set_nx_huge_pages(true).is_some());
        let other = AddressSpaceId(1);
        let mut vcpus = Vec::new();
        for as_id in [SPACE, other] {
            let slot = Slot::new(ALL, Memory::new(Pfn(BASE), Level::L2)).in_space(as_id);
            rig.mmu.slots().insert(slot).expect("the first slot there");
            let mut vcpu = rig.vcpu();
            vcpu.set_address_space(as_id).expect("there are two");
            assert_eq!(vcpu.fault(Fault::execute(Gpa(0))), Ok(Outcome::Fixed { level: Level::L1 }));
            vcpus.push(vcpu);
        }
        rig.mmu.slots().set_flags(other, SlotId(0), SlotFlags::LOG_DIRTY).expect("it is there");
        assert_eq!(rig.mmu.stats().nx_tables, 2);
        let pending = rig.mmu.recover_nx(9);
        assert_eq!(pending.tables(), 1);
        pending.flush();
        assert_eq!(rig.mmu.translate(SPACE, Gfn(0)), None);
        assert!(rig.mmu.translate(other, Gfn(0)).is_some());
        let stats = rig.mmu.stats();
        assert_eq!((stats.nx_tables, stats.nx_recovered), (0, 1), "no longer counted");
    }

    /// Every way in which a marked table can go is counted.
    fn the_count_of_marked_tables_is_right<F>() {
        let rig = rig_with::<F>(Level::L2);
        let mut cpu = rig.processor(rig.vcpu());
        for (what, go) in [
            ("zap", (|mmu| mmu.zap(SPACE, ALL).flush()) as fn(&Mmu<F, _>) -> _),
            ("zap of a part", |mmu| mmu.zap(SPACE, Gfn(0)..Gfn(512)).flush()),
            ("collapse", |mmu| mmu.collapse(SPACE, ALL).flush()),
            ("recovery", |mmu| mmu.recover_nx(1).flush()),
        ] {
            assert!(cpu.run(Gfn(3).address(), Access::Execute).is_ok());
            assert_eq!(rig.mmu.stats().nx_tables, 1, "before {what}");
            go(&rig.mmu);
            assert_eq!(rig.mmu.stats().nx_tables, 0, "after {what}");
            rig.mmu.zap(SPACE, ALL).flush();
        }
        assert!(cpu.run(Gfn(3).address(), Access::Execute).is_ok());
        rig.mmu.invalidate_roots().finish();
        assert_eq!(rig.mmu.stats().nx_tables, 0, "after the teardown of its root");
    }

    /// A collapsed block is as large as it was, and no more executable.
    fn a_collapse_keeps_to_the_policy<F>() {
        let rig = rig_with::<F>(Level::L2);
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gpa(0), Access::Write).is_ok());
        rig.mmu.split(SPACE, ALL, Level::L1).expect("there are frames");
        assert!(cpu.run(Gfn(3).address(), Access::Execute).is_ok());
        rig.mmu.collapse(SPACE, ALL).flush();
        rig.assert_maps(&mut cpu.vcpu, Gfn(3), Pfn(BASE + 3), Level::L2, Perms::RW);
        assert!(cpu.run(Gfn(3).address(), Access::Execute).is_ok());
        rig.assert_maps(&mut cpu.vcpu, Gfn(4), Pfn(BASE + 4), Level::L1, Perms::RWX);
    }

    /// Collapsed twice: small leaves to 2 MiB, those to 1 GiB, where the host came to have larger pages meanwhile.
    fn a_collapse_of_large_leaves_keeps_to_the_policy<F>() {
        let rig = rig_with::<F>(Level::L3);
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gpa(0), Access::Write).is_ok());
        rig.mmu.split(SPACE, ALL, Level::L2).expect("there are frames");
        rig.mmu.collapse(SPACE, ALL).flush();
        rig.assert_maps(&mut cpu.vcpu, Gfn(3), Pfn(BASE + 3), Level::L3, Perms::RW);
        assert!(cpu.run(Gfn(3).address(), Access::Execute).is_ok());
        rig.assert_maps(&mut cpu.vcpu, Gfn(4), Pfn(BASE + 4), Level::L1, Perms::RWX);
    }

    /// Switched on, what is executable and large goes with its root; switched off, it comes back.
    fn the_switch_replaces_everything<F>() {
        let rig = Rig::<F>::new();
        let slot = Slot::new(ALL, Memory::new(Pfn(BASE), Level::L2));
        rig.mmu.slots().insert(slot).expect("the first slot");
        let mut cpu = rig.processor(rig.vcpu());
        assert!(!rig.mmu.nx_huge_pages());
        assert!(rig.mmu.set_nx_huge_pages(false).is_none());
        assert!(cpu.run(Gpa(0), Access::Execute).is_ok());
        assert_eq!(level_of(&rig.mmu, 0), Some(Level::L2));

        let teardown = rig.mmu.set_nx_huge_pages(true).expect("it was off");
        assert!(rig.mmu.nx_huge_pages());
        let late = cpu.vcpu.fault(Fault::write(Gfn(512).address()));
        assert_eq!(late, Ok(Outcome::Retry(tdp::RetryReason::RootObsolete)));
        assert!(cpu.run(Gpa(0), Access::Execute).is_ok());
        rig.assert_maps(&mut cpu.vcpu, Gfn(0), Pfn(BASE), Level::L1, Perms::RWX);
        assert_eq!(rig.mmu.stats().nx_tables, 1);
        teardown.finish();

        rig.mmu.set_nx_huge_pages(false).expect("it was on").finish();
        assert_eq!(rig.mmu.stats().nx_tables, 0);
        assert!(cpu.run(Gpa(0), Access::Execute).is_ok());
        rig.assert_maps(&mut cpu.vcpu, Gfn(0), Pfn(BASE), Level::L2, Perms::RWX);
    }

    /// It can be on from the start.
    fn it_can_be_on_from_the_start<F>() {
        let host = crate::common::host::TestHost::new(crate::common::rig::pool(64));
        let mmu = Mmu::<F, _>::builder(host).nx_huge_pages(true).build().expect("a possible set-up");
        assert!(mmu.nx_huge_pages());
        let slot = Slot::new(ALL, Memory::new(Pfn(BASE), Level::L2));
        mmu.slots().insert(slot).expect("the first slot");
        let mut vcpu = mmu.vcpu().expect("a frame for the root");
        assert_eq!(vcpu.fault(Fault::write(Gpa(0))), Ok(Outcome::Fixed { level: Level::L2 }));
        assert_eq!(vcpu.fault(Fault::execute(Gpa(0))), Ok(Outcome::Fixed { level: Level::L1 }));
    }
}

/// Memory that may only be fetched from has no large leaf: nothing would be left of it.
#[test]
fn execute_only_memory_is_small() {
    let rig = rig_with::<tdp::Ept>(Level::L2);
    rig.host().permit(Perms::EXEC | Perms::USER_EXEC);
    let mut vcpu = rig.vcpu();
    let fixed = Ok(Outcome::Fixed { level: Level::L1 });
    assert_eq!(vcpu.fault(Fault::execute(Gpa(0))), fixed);
    vcpu.prefault(Gfn(512)..Gfn(514), tdp::Visibility::Shared)
        .expect("there are frames");
    assert_ne!(level_of(&rig.mmu, 512), Some(Level::L2));
    let pending = rig.mmu.collapse(SPACE, ALL);
    assert!(pending.is_empty());
}
