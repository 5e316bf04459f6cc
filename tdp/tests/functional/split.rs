//! Eager split: down to a level, in one pass, without a flush, with frames got in batches.

use crate::common::host::Memory;
use crate::common::processor::Processor;
use crate::common::rig::{Rig, RigSetup};
use tdp::{Access, AddressSpaceId, Format, Gfn, GfnRange, Level, Perms, Pfn, Slot, Spte};

const SPACE: AddressSpaceId = AddressSpaceId(0);
/// Frames of 1 GiB.
const GIB: u64 = 1 << 18;
const BASE: u64 = 4 * GIB;

fn rig_with<F: Processor>(level: Level, frames: usize) -> Rig<F> {
    let rig = Rig::with(RigSetup {
        frames,
        ..RigSetup::default()
    });
    let slot = Slot::new(Gfn(0)..Gfn(2 * GIB), Memory::new(Pfn(BASE), level));
    rig.mmu.slots().insert(slot).expect("the first slot");
    rig
}

/// Accessed and dirty bits of the leaf of `gfn`.
fn used<F: Format>(rig: &Rig<impl Processor>, gfn: Gfn) -> (bool, bool) {
    let Spte(bits) = rig.mmu.translate(SPACE, gfn).expect("it is mapped").spte;
    (bits & F::ACCESSED != 0, bits & F::DIRTY != 0)
}

both_formats! {
    /// Each level down to each level: what the guest can do stays what it was, and what its TLB holds stays right.
    fn a_split_translates_alike<F>() {
        for (from, to, splits, tables) in [
            (Level::L2, Level::L1, 1, 3),
            (Level::L3, Level::L2, 1, 2),
            (Level::L3, Level::L1, 513, 514),
            (Level::L2, Level::L2, 0, 2),
            (Level::L3, Level::L3, 0, 1),
        ] {
            let rig = rig_with::<F>(from, 600);
            let mut cpu = rig.processor(rig.vcpu());
            let gfn = Gfn(5);
            assert!(cpu.run(gfn.address(), Access::Write).is_ok());
            let done = rig.mmu.split(SPACE, from.range(gfn), to).expect("there are frames");
            assert_eq!((done.splits, done.next), (splits, from.range(gfn).end));
            assert!(rig.host().take_flushes().is_empty(), "both translate alike");
            let stats = rig.mmu.stats();
            assert_eq!((stats.splits, stats.tables), (splits, tables));
            let level = from.min(to);
            for gfn in [Gfn(0), gfn, Gfn(from.pages() - 1)] {
                rig.assert_maps(&mut cpu.vcpu, gfn, Pfn(BASE + gfn.0), level, Perms::RWX);
                assert_eq!(used::<F>(&rig, gfn), (true, true), "the leaf was used");
            }
            let touched = cpu.touch(gfn.address(), Access::Write);
            assert!(touched.result.is_ok() && !touched.walked, "still cached, and right");
            assert_eq!(rig.mmu.audit().misplaced, 0);
        }
    }

    /// A range that meets a leaf in part splits all of it, and none that it does not meet.
    fn only_leaves_that_meet_the_range_are_split<F>() {
        let rig = rig_with::<F>(Level::L2, 64);
        let mut vcpu = rig.vcpu();
        for block in 0..4 {
            let gpa = Gfn(block * 512).address();
            assert!(vcpu.fault(tdp::Fault::write(gpa)).is_ok());
        }
        let range = Gfn(512 + 511)..Gfn(2 * 512 + 1);
        let done = rig.mmu.split(SPACE, range, Level::L1).expect("there are frames");
        assert_eq!(done.splits, 2);
        assert_eq!(rig.mmu.stats().pages, [1024, 2, 0]);
        for (block, level) in [(0, Level::L2), (1, Level::L1), (2, Level::L1), (3, Level::L2)] {
            let leaf = rig.mmu.translate(SPACE, Gfn(block * 512)).expect("it is mapped");
            assert_eq!(leaf.level, level);
        }
        // Nothing is large any more: no frame is taken for it.
        let out = rig.frames().allocated();
        rig.frames().starve(true);
        let again = rig.mmu.split(SPACE, Gfn(512)..Gfn(1536), Level::L1).expect("no frame is needed");
        assert_eq!((again.splits, rig.frames().allocated()), (0, out));
        rig.frames().starve(false);
    }

    /// More leaves than a batch has frames.
    fn a_range_larger_than_a_batch_is_split_in_one_pass<F>() {
        let rig = rig_with::<F>(Level::L2, 600);
        let mut vcpu = rig.vcpu();
        for block in 0..300 {
            let gpa = Gfn(block * 512).address();
            assert!(vcpu.fault(tdp::Fault::write(gpa)).is_ok());
        }
        let before = rig.frames().allocated();
        let done = rig.mmu.split(SPACE, Gfn(0)..Gfn(2 * GIB), Level::L1).expect("there are frames");
        assert_eq!(done.splits, 300);
        assert_eq!(rig.mmu.stats().pages, [300 * 512, 0, 0]);
        assert_eq!(rig.frames().allocated(), before + 300, "what was not used went back");
        assert_eq!(rig.mmu.audit().misplaced, 0);
    }

    /// Without frames it says how far it came; what it did stays, and the rest is as it was.
    fn running_out_says_how_far_it_came<F>() {
        let rig = rig_with::<F>(Level::L2, 64);
        let mut vcpu = rig.vcpu();
        for block in 0..80 {
            let gpa = Gfn(block * 512).address();
            assert!(vcpu.fault(tdp::Fault::write(gpa)).is_ok());
        }
        let room = (64 - rig.frames().allocated()) as u64;
        let stopped = rig.mmu.split(SPACE, Gfn(0)..Gfn(2 * GIB), Level::L1).expect_err("too few");
        assert_eq!(stopped.error.limit, 64);
        assert_eq!((stopped.done.splits, stopped.done.next), (room, Gfn(room * 512)));
        assert_eq!(rig.mmu.stats().pages, [room * 512, 80 - room, 0]);
        for gfn in [Gfn(0), Gfn(79 * 512)] {
            let level = if gfn.0 == 0 { Level::L1 } else { Level::L2 };
            rig.assert_maps(&mut vcpu, gfn, Pfn(BASE + gfn.0), level, Perms::RWX);
        }
        // It goes on from there.
        rig.mmu.zap(SPACE, Gfn(0)..stopped.done.next).flush();
        rig.mmu.synchronize();
        let rest = stopped.done.next..Gfn(2 * GIB);
        assert_eq!(rig.mmu.split(SPACE, rest, Level::L1).map(|done| done.splits), Ok(80 - room));
    }

    /// What a leaf was protected or aged to stays with its parts.
    fn the_state_of_the_leaf_stays<F>() {
        for ad_bits in [tdp::AdBits::Processor, tdp::AdBits::Software] {
            let rig = Rig::<F>::with_ad_bits(ad_bits);
            let slot = Slot::new(Gfn(0)..Gfn(GIB), Memory::new(Pfn(BASE), Level::L2));
            rig.mmu.slots().insert(slot).expect("the first slot");
            let mut cpu = rig.processor(rig.vcpu());
            assert!(cpu.run(Gfn(0).address(), Access::Write).is_ok());
            rig.mmu.write_protect(SPACE, Gfn(0)..Gfn(512), Level::L1).flush();
            assert!(rig.mmu.age(SPACE, Gfn(0)..Gfn(512)));
            rig.mmu.split(SPACE, Gfn(0)..Gfn(512), Level::L1).expect("there are frames");
            assert!(!rig.mmu.test_age(SPACE, Gfn(0)..Gfn(512)), "nobody has used it since");
            let leaf = rig.mmu.translate(SPACE, Gfn(7)).expect("it is mapped").spte;
            assert_eq!(leaf.0 & F::WRITABLE, 0);
            assert!(leaf.0 & F::MMU_WRITABLE != 0);
            let written = cpu.run(Gfn(7).address(), Access::Write).expect("a write repairs it");
            assert_eq!((written.pfn, written.level), (Pfn(BASE + 7), Level::L1));
            assert!(rig.mmu.test_age(SPACE, Gfn(7)..Gfn(8)));
            assert!(!rig.mmu.test_age(SPACE, Gfn(8)..Gfn(9)));
        }
    }

    /// Another address space, and a root that is being torn down, are left alone.
    fn other_trees_are_left_alone<F>() {
        let rig = rig_with::<F>(Level::L2, 64);
        let mut vcpu = rig.vcpu();
        assert!(vcpu.fault(tdp::Fault::write(tdp::Gpa(0))).is_ok());
        let all = GfnRange { start: Gfn(0), end: Gfn(2 * GIB) };
        assert_eq!(rig.mmu.split(AddressSpaceId(1), all, Level::L1).map(|it| it.splits), Ok(0));
        assert_eq!(rig.mmu.split(AddressSpaceId(9), all, Level::L1).map(|it| it.splits), Ok(0));
        let teardown = rig.mmu.invalidate_roots();
        assert_eq!(rig.mmu.split(SPACE, all, Level::L1).map(|it| it.splits), Ok(0));
        teardown.finish();
    }
}
