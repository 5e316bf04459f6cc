//! What a sweep owes: its flush is never forgotten, never smaller than what it took away, and nothing is reused before it.

use crate::common::host::Memory;
use crate::common::processor::Processor;
use crate::common::rig::{Rig, RigSetup};
use crate::{OTHER, SPACE, fixed};
use std::sync::mpsc::channel;
use tdp::{
    Access, AdBits, Fault, FlushRequest, Gfn, GfnRange, Gpa, Level, Perms, Pfn, Slot, SlotId,
    SlotRemoval,
};

const BASE: u64 = 1 << 20;
const ID: SlotId = SlotId(1);
const FRAMES: u64 = 1 << 16;

fn rig_with<F: Processor>(setup: RigSetup, level: Level) -> Rig<F> {
    let rig = Rig::with(setup);
    for as_id in [SPACE, OTHER] {
        let memory = Memory::new(Pfn(BASE), level);
        let slot = Slot::new(Gfn(0)..Gfn(FRAMES), memory).in_space(as_id);
        rig.mmu
            .slots()
            .insert(slot.with_id(ID))
            .expect("the first slot there");
    }
    rig
}

fn flush_of(start: u64, end: u64, tables: bool) -> FlushRequest {
    FlushRequest {
        as_id: SPACE,
        range: GfnRange {
            start: Gfn(start),
            end: Gfn(end),
        },
        tables,
    }
}

fn small(gfn: u64) -> Fault {
    Fault::write(Gfn(gfn).address()).max_level(Level::L1)
}

both_formats! {
    /// A sweep long enough to let grace periods pass several times: there is one flush, of all, and no table that it has
    /// unlinked is given back before it, although garbage is not tolerated.
    fn case_06_10_a_sweep_that_yields_reuses_nothing_before_its_flush<F>() {
        let rig = rig_with::<F>(RigSetup { garbage_bound: 1, ..RigSetup::default() }, Level::L1);
        let mut cpu = rig.processor(rig.vcpu());
        let last = 40 * 512 - 1;
        for gfn in (0..40 * 512).step_by(13).chain([last]) {
            assert_eq!(cpu.vcpu.fault(small(gfn)), fixed(Level::L1));
        }
        assert!(cpu.touch(Gpa(0), Access::Write).result.is_ok());
        for leaves_only in [true, false] {
            let before = rig.frames().allocated();
            let (frames, mmu, (said, heard)) = (rig.frames().clone(), rig.mmu.clone(), channel());
            rig.host().script().while_flushing = Some(Box::new(move || {
                // All grace periods that there can be.
                mmu.synchronize();
                said.send(frames.allocated()).expect("somebody listens");
            }));
            let _ = rig.host().take_flushes();
            let range = Gfn(0)..Gfn(FRAMES);
            let pending = if leaves_only {
                rig.mmu.zap_leaves(SPACE, range)
            } else {
                rig.mmu.zap(SPACE, range)
            };
            assert!(!cpu.touch(Gpa(0), Access::Write).walked, "still cached");
            assert_eq!(rig.host().take_flushes(), [], "one flush, at the end");
            pending.flush();
            assert_eq!(heard.recv(), Ok(before), "given back before the flush");
            let [flush] = rig.host().take_flushes()[..] else {
                panic!("one flush");
            };
            assert!(flush.range.start == Gfn(0) && flush.range.end > Gfn(last), "{flush:?}");
            assert!(cpu.touch(Gpa(0), Access::Write).result.is_err());
            // The other way with the same leaves.
            for gfn in (0..40 * 512).step_by(13).chain([last]) {
                assert_eq!(cpu.vcpu.fault(small(gfn)), fixed(Level::L1));
            }
            assert!(cpu.touch(Gpa(0), Access::Write).result.is_ok());
            rig.mmu.synchronize();
        }
    }

    /// Nor by any other way in which a table goes: recovery, collapse, a large leaf by a fault, the teardown of a root.
    fn case_10_no_table_is_given_back_before_the_flush<F>() {
        for way in 0..4 {
            let rig = rig_with::<F>(RigSetup { garbage_bound: 1, ..RigSetup::default() }, Level::L2);
            if way == 0 {
                rig.mmu.set_nx_huge_pages(true).expect("it was off").finish();
            }
            let mut vcpu = rig.vcpu();
            let fault = if way == 0 { Fault::execute(Gpa(0)) } else { small(0) };
            assert_eq!(vcpu.fault(fault), fixed(Level::L1));
            rig.mmu.synchronize();
            let before = rig.frames().allocated();
            let (frames, mmu, (said, heard)) = (rig.frames().clone(), rig.mmu.clone(), channel());
            rig.host().script().while_flushing = Some(Box::new(move || {
                if way != 2 {
                    // A fault flushes inside its critical section, where nobody waits.
                    mmu.synchronize();
                }
                said.send(frames.allocated()).expect("somebody listens");
            }));
            match way {
                0 => drop(rig.mmu.recover_nx(1).flush()),
                1 => drop(rig.mmu.collapse(SPACE, Gfn(0)..Gfn(FRAMES)).flush()),
                2 => assert_eq!(vcpu.fault(Fault::write(Gpa(0x5000))), fixed(Level::L2)),
                _ => rig.mmu.invalidate_roots().finish(),
            }
            assert_eq!(heard.recv(), Ok(before), "way {way}");
            vcpu.load_root().expect("a frame for the root");
            rig.mmu.synchronize();
            let after = rig.frames().allocated();
            assert!(way == 3 || after == before - 1, "way {way}: {after} of {before}");
        }
    }

    /// What recovery has to flush is not forgotten when a later step, another root or another address space has nothing.
    fn case_07_recovery_does_not_forget_its_flush<F>() {
        let rig = rig_with::<F>(RigSetup::default(), Level::L2);
        rig.mmu.set_nx_huge_pages(true).expect("it was off").finish();
        let mut cpu = rig.processor(rig.vcpu());
        let mut other = rig.vcpu();
        other.set_address_space(OTHER).expect("there are two");
        assert!(other.fault(Fault::write(Gpa(0))).is_ok());
        assert!(cpu.run(Gfn(0x203).address(), Access::Execute).is_ok());
        let _ = rig.host().take_flushes();
        let mut pending = rig.mmu.recover_nx(1);
        pending.absorb(rig.mmu.recover_nx(5));
        pending.absorb(rig.mmu.recover_nx(5));
        assert!(!pending.is_empty());
        pending.flush();
        assert_eq!(rig.host().take_flushes(), [flush_of(0x200, 0x400, true)]);
        assert!(cpu.touch(Gfn(0x203).address(), Access::Execute).result.is_err());
    }

    /// A sweep over several roots, of which only one has anything: first, in the middle, last. What the one leaves to be
    /// flushed is not overwritten by the others.
    fn case_09_the_flush_of_one_root_outlives_the_others<F>() {
        for full in 0..3 {
            let rig = rig_with::<F>(RigSetup::default(), Level::L1);
            // One that is being torn down, and one of each kind.
            let mut roots = [rig.vcpu(), rig.vcpu(), rig.vcpu()];
            if full == 0 {
                assert_eq!(roots[0].fault(small(7)), fixed(Level::L1));
            }
            let teardown = rig.mmu.invalidate_roots();
            for (n, vcpu) in roots.iter_mut().enumerate().skip(1) {
                vcpu.load_root().expect("a frame for the root");
                if n == 2 {
                    vcpu.set_ad_bits(AdBits::Software).expect("a frame for the root");
                }
                let gfn = if n == full { 7 } else { 100 };
                assert_eq!(vcpu.fault(small(gfn)), fixed(Level::L1));
            }
            let range = Gfn(0)..Gfn(64);
            let pending = rig.mmu.write_protect(SPACE, range.clone(), Level::L1);
            assert!(!pending.is_empty(), "root {full}");
            pending.flush();
            assert_eq!(rig.host().take_flushes(), [flush_of(7, 8, false)], "root {full}");
            let pending = rig.mmu.zap_leaves(SPACE, range);
            assert!(!pending.is_empty(), "root {full}");
            assert_eq!(pending.leaves(), 1);
            pending.flush();
            assert_eq!(rig.host().take_flushes(), [flush_of(7, 8, false)], "root {full}");
            drop(teardown);
        }
    }

    /// What is flushed for a table is what the table covered, by whichever way it went, and wherever the sweep ended.
    fn case_12_the_flush_is_that_of_the_table<F>() {
        let block = 0x600..0x800;
        for way in 0..4 {
            let rig = rig_with::<F>(RigSetup::default(), Level::L2);
            if way == 0 {
                rig.mmu.set_nx_huge_pages(true).expect("it was off").finish();
            }
            let mut cpu = rig.processor(rig.vcpu());
            let gpa = Gfn(block.start + 9).address();
            let fault = if way == 0 { Fault::execute(gpa) } else { small(block.start + 9) };
            assert_eq!(cpu.vcpu.fault(fault), fixed(Level::L1));
            assert!(cpu.touch(gpa, Access::Read).result.is_ok());
            let _ = rig.host().take_flushes();
            match way {
                0 => drop(rig.mmu.recover_nx(9).flush()),
                1 => drop(rig.mmu.collapse(SPACE, Gfn(0)..Gfn(FRAMES)).flush()),
                2 => drop(rig.mmu.zap(SPACE, Gfn(0x400)..Gfn(0x900)).flush()),
                _ => {
                    let beside = Fault::write(Gfn(block.end - 1).address());
                    assert_eq!(cpu.vcpu.fault(beside), fixed(Level::L2));
                }
            }
            let flushes = rig.host().take_flushes();
            assert_eq!(flushes, [flush_of(block.start, block.end, true)], "way {way}");
        }
    }

    /// Roots that no vCPU can be on are taken down without a flush, and the slot for which that was done is gone without one.
    fn case_37_what_no_vcpu_reaches_is_not_flushed<F>() {
        let setup = RigSetup { slot_removal: SlotRemoval::InvalidateRoots, ..RigSetup::default() };
        let rig = rig_with::<F>(setup, Level::L1);
        rig.host().script().reloads = true;
        let mut cpu = rig.processor(rig.vcpu());
        for gfn in 0..64 {
            assert!(cpu.run(Gfn(gfn * 512).address(), Access::Write).is_ok());
        }
        let teardown = rig.mmu.slots().remove_lazily(SPACE, ID).expect("it is there");
        assert!(cpu.vcpu.is_root_obsolete());
        teardown.finish();
        assert_eq!(rig.host().take_flushes(), []);
        assert_eq!(rig.mmu.stats().pages, [0; 3]);
        assert!(cpu.run(Gpa(0), Access::Read).is_err(), "there is no slot");
        // Under the new root flushes are what they were.
        let memory = Memory::new(Pfn(BASE), Level::L1);
        let slot = Slot::new(Gfn(0)..Gfn(64), memory).with_id(ID);
        rig.mmu.slots().insert(slot).expect("the place is free");
        assert!(cpu.run(Gpa(0), Access::Write).is_ok());
        rig.mmu.zap_leaves(SPACE, Gfn(0)..Gfn(64)).flush();
        assert_eq!(rig.host().take_flushes(), [flush_of(0, 1, false)]);
        rig.host().permit(Perms::RWX);
    }
}
