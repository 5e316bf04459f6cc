//! Collapse: when a table gives way to a large leaf, what the leaf permits, and what is flushed.

use crate::common::host::{Answer, Memory};
use crate::common::processor::Processor;
use crate::common::rig::Rig;
use tdp::{
    Access, AdBits, AddressSpaceId, Fault, FlushRequest, Gfn, GfnRange, Level, Lookup, MemoryType,
    Outcome, Perms, Pfn, Slot, SlotFlags, Visibility,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);
/// Frames of 1 GiB.
const GIB: u64 = 1 << 18;
const BASE: u64 = 4 * GIB;
const ALL: std::ops::Range<Gfn> = Gfn(0)..Gfn(2 * GIB);
const BLOCK: std::ops::Range<Gfn> = Gfn(0)..Gfn(512);

fn slot(level: Level) -> Slot<Memory> {
    Slot::new(ALL, Memory::new(Pfn(BASE), level))
}

fn rig_with<F: Processor>(ad_bits: AdBits, slot: Slot<Memory>) -> Rig<F> {
    let rig = Rig::with_ad_bits(ad_bits);
    rig.mmu.slots().insert(slot).expect("the first slot");
    rig
}

fn small(gfn: u64, access: Access) -> Fault {
    Fault::new(Gfn(gfn).address(), access).max_level(Level::L1)
}

fn flush_of(start: u64, end: u64) -> FlushRequest {
    FlushRequest {
        as_id: SPACE,
        range: GfnRange {
            start: Gfn(start),
            end: Gfn(end),
        },
        tables: true,
    }
}

/// A rig whose first block is mapped by small leaves at these frames, each written.
fn written<F: Processor>(
    slot: Slot<Memory>,
    gfns: &[u64],
) -> (Rig<F>, tdp::Vcpu<F, crate::common::host::TestHost>) {
    let rig = rig_with::<F>(AdBits::Processor, slot);
    let mut vcpu = rig.vcpu();
    for &gfn in gfns {
        assert_eq!(
            vcpu.fault(small(gfn, Access::Write)),
            Ok(Outcome::Fixed { level: Level::L1 })
        );
    }
    (rig, vcpu)
}

/// Asserts that a collapse of everything changes nothing.
#[track_caller]
fn stays<F: Processor>(rig: &Rig<F>, what: &str) {
    let before = rig.mmu.stats();
    let pending = rig.mmu.collapse(SPACE, ALL);
    assert!(pending.is_empty() && pending.tables() == 0, "{what}");
    pending.flush();
    let after = rig.mmu.stats();
    assert_eq!(
        (before.pages, before.tables),
        (after.pages, after.tables),
        "{what}"
    );
    assert_eq!(after.collapses, 0, "{what}");
}

both_formats! {
    /// A split undone: the guest never misses a translation, one flush in all, every table comes home.
    fn a_collapse_undoes_a_split<F>() {
        let rig = rig_with::<F>(AdBits::Processor, slot(Level::L2));
        let mut cpu = rig.processor(rig.vcpu());
        for block in 0..4 {
            assert!(cpu.run(Gfn(block * 512 + 3).address(), Access::Write).is_ok());
        }
        let before = rig.frames().allocated();
        rig.mmu.split(SPACE, ALL, Level::L1).expect("there are frames");
        let pending = rig.mmu.collapse(SPACE, ALL);
        assert_eq!((pending.tables(), pending.leaves()), (4, 4 * 512));
        assert!(rig.host().take_flushes().is_empty(), "flushed by the caller");
        pending.flush();
        assert_eq!(rig.host().take_flushes(), [flush_of(0, 4 * 512)]);
        for block in 0..4 {
            let gfn = Gfn(block * 512 + 3);
            let touched = cpu.touch(gfn.address(), Access::Write);
            assert!(touched.result.is_ok() && touched.walked, "flushed, and there all the same");
            rig.assert_maps(&mut cpu.vcpu, gfn, Pfn(BASE + gfn.0), Level::L2, Perms::RWX);
        }
        let stats = rig.mmu.stats();
        assert_eq!((stats.pages, stats.collapses), ([0, 4, 0], 4));
        rig.mmu.synchronize();
        assert_eq!(rig.frames().allocated(), before);
        stays_collapsed(&rig);
    }

    /// Down to 4 KiB and back to 1 GiB at once.
    fn a_gibibyte_comes_back_at_once<F>() {
        let rig = Rig::<F>::with(crate::common::rig::RigSetup { frames: 600, ..Default::default() });
        rig.mmu.slots().insert(slot(Level::L3)).expect("the first slot");
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gfn(7).address(), Access::Write).is_ok());
        rig.mmu.split(SPACE, ALL, Level::L1).expect("there are frames");
        let pending = rig.mmu.collapse(SPACE, Gfn(0)..Gfn(GIB));
        assert_eq!((pending.tables(), pending.leaves()), (513, GIB));
        pending.flush();
        assert_eq!(rig.host().take_flushes(), [flush_of(0, GIB)]);
        rig.assert_maps(&mut cpu.vcpu, Gfn(GIB - 1), Pfn(BASE + GIB - 1), Level::L3, Perms::RWX);
        assert_eq!(rig.mmu.stats().tables, 1);
    }

    /// One leaf is enough; the rest of the block is mapped with it. A table without any is left to the next fault.
    fn a_table_that_is_not_full_collapses<F>() {
        let (rig, mut vcpu) = written::<F>(slot(Level::L2), &[300]);
        assert_eq!(vcpu.fault(small(1024, Access::Write)), Ok(Outcome::Fixed { level: Level::L1 }));
        rig.mmu.zap_leaves(SPACE, Gfn(1024)..Gfn(1025)).flush();
        let pending = rig.mmu.collapse(SPACE, ALL);
        assert_eq!((pending.tables(), pending.leaves()), (1, 1));
        pending.flush();
        rig.assert_maps(&mut vcpu, Gfn(0), Pfn(BASE), Level::L2, Perms::RWX);
        assert_eq!(rig.mmu.translate(SPACE, Gfn(1024)), None);
    }

    /// What stands against a large leaf for a fault stands against a collapse.
    fn what_forbids_a_large_leaf_keeps_the_table<F>() {
        let gfns = [0, 1, 511];
        let cases = [
            ("the slot is logged", slot(Level::L2).with_flags(SlotFlags::LOG_DIRTY)),
            ("the slot forbids it", slot(Level::L2).max_level(Level::L1)),
            ("the host has small pages", slot(Level::L1)),
            ("the slot ends inside", Slot::new(Gfn(0)..Gfn(512 - 1), Memory::new(Pfn(BASE), Level::L2))),
            ("the slot begins inside", Slot::new(Gfn(1)..ALL.end, Memory::new(Pfn(BASE + 1), Level::L2))),
            ("the frames are skewed", Slot::new(ALL, Memory::new(Pfn(BASE + 8), Level::L2))),
        ];
        for (what, slot) in cases {
            let gfns: Vec<_> = gfns.into_iter().filter(|&gfn| slot.contains(Gfn(gfn))).collect();
            let (rig, _vcpu) = written::<F>(slot, &gfns);
            stays(&rig, what);
        }
        let (rig, _vcpu) = written::<F>(slot(Level::L2), &gfns);
        for answer in [Lookup::Blocking, Lookup::Retry, Lookup::Failed] {
            rig.host().set_answer(Answer::Fixed(answer));
            stays(&rig, "the host has no answer");
        }
        rig.host().set_answer(Answer::Page);
        rig.host().script().memory_type = MemoryType::Uncacheable;
        stays(&rig, "another memory type");
        rig.host().script().memory_type = MemoryType::WriteBack;
        rig.host().permit(Perms::RX);
        stays(&rig, "more than the host gives");
        rig.host().permit(Perms::RW);
        stays(&rig, "fetches that the host does not give");
        rig.host().script().perms = None;
        rig.host().script().moved.insert(BASE + 5, Pfn(77));
        stays(&rig, "one page of the block is elsewhere");
        rig.host().script().moved.clear();
        for range in [Gfn(1)..ALL.end, Gfn(0)..Gfn(511), Gfn(512)..ALL.end] {
            let pending = rig.mmu.collapse(SPACE, range);
            assert!(pending.is_empty(), "only what lies in the range as a whole");
        }
        assert!(rig.mmu.collapse(AddressSpaceId(1), ALL).is_empty());
        let invalidation = rig.mmu.invalidate_begin(SPACE, Gfn(511)..Gfn(513));
        stays(&rig, "a page of it is under invalidation");
        invalidation.end(rig.mmu.zap_leaves(SPACE, Gfn(511)..Gfn(513)).flush());
        rig.mmu.collapse(SPACE, ALL).flush();
        assert_eq!(rig.mmu.stats().collapses, 1, "nothing stands against it any more");
    }

    /// The largest leaf of the MMU is not exceeded.
    fn the_largest_leaf_counts<F>() {
        let rig = Rig::<F>::with(crate::common::rig::RigSetup { max_leaf: Level::L1, ..Default::default() });
        rig.mmu.slots().insert(slot(Level::L3)).expect("the first slot");
        let mut vcpu = rig.vcpu();
        assert_eq!(vcpu.fault(Fault::write(tdp::Gpa(0))), Ok(Outcome::Fixed { level: Level::L1 }));
        stays(&rig, "no large leaves at all");
    }

    /// Leaves that map something else than the host says now keep the table: whoever moved the page zaps it.
    fn a_leaf_of_another_page_keeps_the_table<F>() {
        let (rig, mut vcpu) = written::<F>(slot(Level::L2), &[0]);
        let other = tdp::Mapping::memory(Pfn(99), Level::L1, Perms::RWX);
        assert!(vcpu.map(Gfn(17), other, Access::Write).is_ok());
        stays(&rig, "one leaf is of another page");
    }

    /// A table of tables gives way as a whole or not at all; what below it can be collapsed is collapsed all the same.
    fn a_leaf_of_another_page_keeps_the_tables_above_it_only<F>() {
        for odd in [17, 512 + 17] {
            let (rig, mut vcpu) = written::<F>(slot(Level::L3), &[0, 512]);
            let other = tdp::Mapping::memory(Pfn(99), Level::L1, Perms::RWX);
            assert!(vcpu.map(Gfn(odd), other, Access::Write).is_ok());
            let pending = rig.mmu.collapse(SPACE, ALL);
            assert_eq!(pending.tables(), 1);
            pending.flush();
            let level = |gfn| rig.mmu.translate(SPACE, Gfn(gfn)).map(|leaf| leaf.level);
            let collapsed = if odd < 512 { 512 } else { 0 };
            assert_eq!(level(collapsed), Some(Level::L2));
            assert_eq!(level(512 - collapsed), Some(Level::L1));
            let kept = rig.mmu.translate(SPACE, Gfn(odd)).map(|leaf| leaf.pfn);
            assert_eq!(kept, Some(Pfn(99)));
            stays_collapsed(&rig);
            // Once it is gone the whole gives way.
            rig.mmu.zap_leaves(SPACE, Gfn(odd)..Gfn(odd + 1)).flush();
            rig.mmu.collapse(SPACE, ALL).flush();
            assert_eq!(level(0), Some(Level::L3));
        }
    }

    /// A frame that was protected for good keeps the table, wherever it stands.
    fn a_frame_protected_for_good_keeps_the_table<F>() {
        for gfn in [0, 200, 511] {
            let (rig, _vcpu) = written::<F>(slot(Level::L2), &[0, 200, 511]);
            rig.mmu.write_protect_gfn(SPACE, Gfn(gfn)).flush();
            stays(&rig, "the host has yet to permit writing");
        }
    }

    /// The writable bit is the first leaf's; a write gets through in either case.
    fn the_first_leaf_says_whether_it_is_writable<F>() {
        for (protected, writable) in [(0, false), (9, true)] {
            let rig = rig_with::<F>(AdBits::Processor, slot(Level::L2));
            let mut cpu = rig.processor(rig.vcpu());
            for gfn in [0, 9] {
                assert_eq!(cpu.vcpu.fault(small(gfn, Access::Write)), Ok(Outcome::Fixed { level: Level::L1 }));
            }
            rig.mmu.write_protect(SPACE, Gfn(protected)..Gfn(protected + 1), Level::L1).flush();
            rig.mmu.collapse(SPACE, ALL).flush();
            let leaf = rig.mmu.translate(SPACE, Gfn(0)).expect("it is mapped");
            assert_eq!(leaf.level, Level::L2);
            assert_eq!(leaf.spte.0 & F::WRITABLE != 0, writable);
            assert!(leaf.spte.0 & F::MMU_WRITABLE != 0);
            assert!(cpu.run(Gfn(9).address(), Access::Write).is_ok());
            rig.assert_maps(&mut cpu.vcpu, Gfn(9), Pfn(BASE + 9), Level::L2, Perms::RWX);
        }
    }

    /// The host is asked for the access that needs most of what the leaf is to permit: it may have to make a page writable first,
    /// and is not to for one that is only read.
    fn the_host_is_asked_for_what_the_leaf_permits<F>() {
        let fetched = if F::NAME == "ept" { Access::Execute } else { Access::Read };
        let cases = [
            (Perms::RWX, Access::Read, Access::Write),
            (Perms::RX, Access::Read, Access::Read),
            (Perms::EXEC | Perms::USER_EXEC, Access::Execute, fetched),
        ];
        for (perms, access, asked) in cases {
            let rig = rig_with::<F>(AdBits::Processor, slot(Level::L2));
            rig.host().permit(perms);
            let mut vcpu = rig.vcpu();
            assert_eq!(vcpu.fault(small(5, access)), Ok(Outcome::Fixed { level: Level::L1 }));
            rig.mmu.collapse(SPACE, ALL).flush();
            assert_eq!(rig.host().script().asked_for, Some(asked), "{perms:?}");
            assert_eq!(rig.mmu.stats().pages, [0, 1, 0]);
        }
    }

    /// Memory that may not be written stays so.
    fn read_only_memory_stays_read_only<F>() {
        let rig = rig_with::<F>(AdBits::Processor, slot(Level::L2).with_flags(SlotFlags::READ_ONLY));
        let mut vcpu = rig.vcpu();
        assert_eq!(vcpu.fault(small(3, Access::Execute)), Ok(Outcome::Fixed { level: Level::L1 }));
        rig.mmu.collapse(SPACE, ALL).flush();
        rig.assert_maps(&mut vcpu, Gfn(3), Pfn(BASE + 3), Level::L2, Perms::RX);
        let leaf = rig.mmu.translate(SPACE, Gfn(3)).expect("it is mapped").spte;
        assert_eq!(leaf.0 & (F::WRITABLE | F::MMU_WRITABLE | F::HOST_WRITABLE), 0);
    }

    /// Old if all was old, young if anything was used; with the processor's bit and without.
    fn the_leaf_is_as_young_as_the_youngest<F>() {
        for ad_bits in [AdBits::Processor, AdBits::Software] {
            for used in [None, Some(0), Some(200)] {
                let rig = rig_with::<F>(ad_bits, slot(Level::L2));
                let mut cpu = rig.processor(rig.vcpu());
                for gfn in [0, 100, 200] {
                    assert_eq!(cpu.vcpu.fault(small(gfn, Access::Write)), Ok(Outcome::Fixed { level: Level::L1 }));
                }
                assert!(rig.mmu.age(SPACE, ALL));
                if let Some(gfn) = used {
                    assert!(cpu.run(Gfn(gfn).address(), Access::Read).is_ok());
                }
                rig.mmu.collapse(SPACE, ALL).flush();
                assert_eq!(rig.mmu.stats().pages, [0, 1, 0]);
                assert_eq!(rig.mmu.test_age(SPACE, ALL), used.is_some(), "{ad_bits:?} {used:?}");
                // Where the processor keeps the bit, its being clear says enough.
                let leaf = rig.mmu.translate(SPACE, Gfn(0)).expect("it is mapped");
                let tracked = ad_bits == AdBits::Software && used.is_none();
                assert_eq!(F::is_access_tracked(leaf.spte), tracked, "{ad_bits:?} {used:?}");
                let found = cpu.run(Gfn(511).address(), Access::Write).expect("it is mapped");
                assert_eq!((found.pfn, found.level), (Pfn(BASE + 511), Level::L2));
            }
        }
    }

    /// Dirty if anything below was written.
    fn a_written_page_leaves_the_block_dirty<F>() {
        for written in [None, Some(0), Some(200)] {
            let rig = rig_with::<F>(AdBits::Processor, slot(Level::L2));
            rig.host().permit(Perms::RX);
            let mut cpu = rig.processor(rig.vcpu());
            for gfn in [0, 200] {
                assert_eq!(cpu.vcpu.fault(small(gfn, Access::Read)), Ok(Outcome::Fixed { level: Level::L1 }));
            }
            rig.host().script().perms = None;
            if let Some(gfn) = written {
                // Of memory that the host has come to let be written: both, or they would not agree.
                for gfn in [gfn, 200 - gfn] {
                    assert_eq!(cpu.vcpu.fault(small(gfn, Access::Write)), Ok(Outcome::Fixed { level: Level::L1 }));
                }
            }
            rig.mmu.collapse(SPACE, ALL).flush();
            let leaf = rig.mmu.translate(SPACE, Gfn(0)).expect("it is mapped");
            assert_eq!(leaf.level, Level::L2);
            assert_eq!(leaf.spte.0 & F::DIRTY != 0, written.is_some());
        }
    }

    /// The stale small translations go with the flush, not before.
    fn a_collapsed_table_is_flushed_before_it_is_freed<F>() {
        let (rig, vcpu) = written::<F>(slot(Level::L2), &[0]);
        let mut cpu = rig.processor(vcpu);
        assert!(cpu.run(Gfn(0).address(), Access::Write).is_ok());
        let pending = rig.mmu.collapse(SPACE, BLOCK);
        let out = rig.frames().allocated();
        rig.mmu.synchronize();
        assert_eq!(rig.frames().allocated(), out, "not freed before it is flushed");
        assert!(!cpu.touch(Gfn(0).address(), Access::Write).walked, "still cached");
        // Its paging-structure cache leads into the table, which is sealed.
        assert!(cpu.touch(Gfn(1).address(), Access::Read).result.is_err());
        pending.flush();
        assert!(cpu.touch(Gfn(1).address(), Access::Read).result.is_ok());
        rig.mmu.synchronize();
        assert_eq!(rig.frames().allocated(), out - 1);
    }

    /// Private memory is not collapsed into shared, nor a block of both.
    fn a_block_of_both_kinds_keeps_its_table<F>() {
        let pool = crate::common::rig::pool(64);
        let builder = tdp::Mmu::<F, _>::builder(crate::common::host::TestHost::new(pool));
        let mmu = builder.shared_bit(47).build().expect("a possible set-up");
        mmu.slots().insert(slot(Level::L2)).expect("the first slot");
        let mut vcpu = mmu.vcpu().expect("a frame for the root");
        let shared = |gfn: u64| Gfn(gfn | 1 << 35);
        for gfn in [0, 512] {
            let fault = Fault::write(shared(gfn).address()).max_level(Level::L1);
            assert_eq!(vcpu.fault(fault), Ok(Outcome::Fixed { level: Level::L1 }));
        }
        mmu.convert(SPACE, Gfn(100)..Gfn(101), Visibility::Private).expect("a possible range");
        let pending = mmu.collapse(SPACE, ALL);
        assert_eq!(pending.tables(), 1, "the other block is shared throughout");
        pending.flush();
        assert_eq!(mmu.translate(SPACE, Gfn(0)).map(|leaf| leaf.level), Some(Level::L1));
        assert_eq!(mmu.translate(SPACE, Gfn(512)).map(|leaf| leaf.level), Some(Level::L2));
    }
}

/// There is nothing left to collapse.
fn stays_collapsed<F: Processor>(rig: &Rig<F>) {
    let pending = rig.mmu.collapse(SPACE, ALL);
    assert!(pending.is_empty());
}
