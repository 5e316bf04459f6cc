//! Large leaves: the policy on fetches and its recovery, logs of large memory, slots that end inside a block.

use crate::common::host::Memory;
use crate::common::processor::Processor;
use crate::common::rig::{Rig, RigSetup};
use crate::{OTHER, SPACE, fixed};
use std::sync::atomic::{AtomicBool, Ordering};
use tdp::{Access, Fault, Gfn, Gpa, Level, Perms, Pfn, Slot, SlotFlags, SlotId};

const BASE: u64 = 1 << 20;
const ID: SlotId = SlotId(1);
const BLOCKS: u64 = 16;

/// A slot of large pages in each address space, under the policy that no large leaf is executable.
fn rig_nx<F: Processor>() -> Rig<F> {
    let rig = Rig::with(RigSetup::default());
    rig.mmu
        .set_nx_huge_pages(true)
        .expect("it was off")
        .finish();
    for as_id in [SPACE, OTHER] {
        let memory = Memory::new(Pfn(BASE), Level::L2);
        let slot = Slot::new(Gfn(0)..Gfn(BLOCKS * 512), memory).in_space(as_id);
        rig.mmu
            .slots()
            .insert(slot.with_id(ID))
            .expect("the first slot there");
    }
    rig
}

fn level_at<F: Processor>(rig: &Rig<F>, gfn: u64) -> Option<Level> {
    rig.mmu.translate(SPACE, Gfn(gfn)).map(|leaf| leaf.level)
}

both_formats! {
    /// A marked table goes away ahead of recovery, and one comes behind it, between two of its steps: it goes on by frame
    /// numbers, so each table that is there has its turn.
    fn case_08_recovery_goes_on_where_tables_have_gone<F>() {
        let rig = rig_nx::<F>();
        let mut vcpu = rig.vcpu();
        let mut fetch = |block: u64| {
            let fault = Fault::execute(Gfn(block * 512).address());
            assert_eq!(vcpu.fault(fault), fixed(Level::L1));
        };
        (0..BLOCKS).for_each(&mut fetch);
        let mut taken = Vec::new();
        for step in 0.. {
            assert!(step <= 2 * BLOCKS, "it comes to no end: {taken:?}");
            let mapped = || -> Vec<u64> {
                let blocks = 0..BLOCKS;
                blocks.filter(|block| level_at(&rig, block * 512).is_some()).collect()
            };
            let before = mapped();
            let mmu = rig.mmu.clone();
            if step == 0 {
                // The table that the next step would begin with.
                rig.host().script().while_flushing = Some(Box::new(move || {
                    mmu.zap(SPACE, Gfn(512)..Gfn(1024)).flush();
                }));
            }
            let pending = rig.mmu.recover_nx(1);
            let after = mapped();
            taken.extend(before.into_iter().filter(|block| !after.contains(block)));
            if pending.tables() == 0 {
                break;
            }
            pending.flush();
            if step == 3 {
                fetch(0);
            }
        }
        let expected: Vec<u64> = [0].into_iter().chain(2..BLOCKS).chain([0]).collect();
        assert_eq!(taken, expected);
        let stats = rig.mmu.stats();
        assert_eq!((stats.nx_tables, stats.nx_recovered), (0, expected.len() as u64));
    }

    /// Recovery asks the slot of the table's own address space: the one frame is logged in one space and not in the other.
    fn case_17_recovery_looks_at_the_slot_of_its_own_space<F>() {
        for logged in [SPACE, OTHER] {
            let rig = rig_nx::<F>();
            let mut vcpus = [SPACE, OTHER].map(|as_id| {
                let mut vcpu = rig.vcpu();
                vcpu.set_address_space(as_id).expect("there are two");
                assert_eq!(vcpu.fault(Fault::execute(Gpa(0))), fixed(Level::L1));
                vcpu
            });
            rig.mmu.slots().set_flags(logged, ID, SlotFlags::LOG_DIRTY).expect("it is there");
            let pending = rig.mmu.recover_nx(9);
            assert_eq!(pending.tables(), 1);
            pending.flush();
            for vcpu in &mut vcpus {
                let as_id = vcpu.address_space();
                let kept = rig.mmu.translate(as_id, Gfn(0)).is_some();
                assert_eq!(kept, as_id == logged, "{as_id:?}, logged {logged:?}");
                // Where it went, a large leaf that cannot be fetched from comes back; a fetch still gets a small one.
                let level = if kept { Level::L1 } else { Level::L2 };
                assert!(vcpu.fault(Fault::write(Gpa(0x1000))).is_ok());
                assert_eq!(rig.mmu.translate(as_id, Gfn(1)).map(|leaf| leaf.level), Some(level));
            }
        }
    }

    /// Whoever finds a table that stands for a fetch finds it marked, however early it looks.
    fn case_18_the_mark_is_there_as_soon_as_the_table<F>() {
        let rig = rig_nx::<F>();
        let mut cpu = rig.processor(rig.vcpu());
        let root = cpu.root();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                let mut seen = 0u64;
                while !over.load(Ordering::Acquire) {
                    let Some(spte) = rig.entry(root, Gfn(0), Level::L2) else {
                        continue;
                    };
                    if F::is_table(spte) {
                        assert_ne!(spte.0 & F::NX_SPLIT, 0, "a table without its mark");
                        seen += 1;
                    }
                }
                seen
            });
            for round in 0..2000 {
                if round % 2 == 0 {
                    assert_eq!(cpu.vcpu.fault(Fault::write(Gpa(0))), fixed(Level::L2));
                }
                assert_eq!(cpu.vcpu.fault(Fault::execute(Gpa(0))), fixed(Level::L1));
                assert_eq!(rig.mmu.stats().nx_tables, 1);
                if round % 3 == 0 {
                    rig.mmu.recover_nx(1).flush();
                } else {
                    rig.mmu.zap(SPACE, Gfn(0)..Gfn(512)).flush();
                }
                assert_eq!(rig.mmu.stats().nx_tables, 0);
            }
            over.store(true, Ordering::Release);
            assert!(watcher.join().expect("every table is marked") > 0);
        });
    }

    /// A log that was begun and given up leaves no memory small, under the policy or without it: what was split for the log,
    /// and what was mapped while it ran, becomes large again, and nothing is taken for a table of a fetch.
    fn case_19_a_log_that_ends_leaves_large_leaves<F>() {
        for policy in [false, true] {
            for by_fault in [false, true] {
                let rig = rig_nx::<F>();
                if !policy {
                    rig.mmu.set_nx_huge_pages(false).expect("it was on").finish();
                }
                let mut vcpu = rig.vcpu();
                let slots = rig.mmu.slots();
                assert_eq!(vcpu.fault(Fault::write(Gpa(0))), fixed(Level::L2));
                slots.set_flags(SPACE, ID, SlotFlags::LOG_DIRTY).expect("it is there");
                assert_eq!(vcpu.fault(Fault::write(Gpa(0x1000))), fixed(Level::L1));
                assert_eq!(vcpu.fault(Fault::write(Gfn(512).address())), fixed(Level::L1));
                assert_eq!(rig.mmu.stats().nx_tables, 0);
                if by_fault {
                    // The collapse that ends the log gets no answer.
                    rig.host().set_answer(crate::common::host::Answer::Fixed(tdp::Lookup::Retry));
                }
                slots.set_flags(SPACE, ID, SlotFlags::empty()).expect("it is there");
                rig.host().set_answer(crate::common::host::Answer::Page);
                // Of the second block not all is mapped: the next fault there puts a large leaf in its place.
                assert!(vcpu.fault(Fault::write(Gfn(515).address())).is_ok());
                assert_eq!(level_at(&rig, 515), Some(Level::L2), "policy {policy}, by fault {by_fault}");
                rig.mmu.collapse(SPACE, Gfn(0)..Gfn(BLOCKS * 512)).flush();
                assert_eq!(level_at(&rig, 3), Some(Level::L2), "policy {policy}, by fault {by_fault}");
                assert_eq!((rig.mmu.stats().nx_tables, rig.mmu.stats().tables), (0, 2));
            }
        }
    }

    /// A block that a slot ends or begins in never becomes large: not by a fault, not by mapping ahead, not by a collapse of
    /// a wider range; the neighbour's frames are not looked for in the slot.
    fn case_33_a_block_that_straddles_the_end_of_a_slot_stays_small<F>() {
        let rig = Rig::<F>::new();
        let slots = rig.mmu.slots();
        // Frames 0x300 to 0x3ff belong to no slot; the second slot begins inside a block too.
        for (n, range) in [(1, Gfn(0)..Gfn(0x300)), (2, Gfn(0x500)..Gfn(0x800))] {
            let memory = Memory::new(Pfn(BASE + range.start.0), Level::L3);
            slots.insert(Slot::new(range, memory).with_id(SlotId(n))).expect("the place is free");
        }
        let mut vcpu = rig.vcpu();
        for gfn in [0x205, 0x2ff, 0x505, 0x5ff] {
            assert_eq!(vcpu.fault(Fault::write(Gfn(gfn).address())), fixed(Level::L1));
        }
        for gfn in [0x100, 0x700] {
            assert_eq!(vcpu.fault(Fault::write(Gfn(gfn).address())), fixed(Level::L2));
        }
        for id in [1, 2] {
            slots.set_flags(SPACE, SlotId(id), SlotFlags::LOG_DIRTY).expect("it is there");
            slots.set_flags(SPACE, SlotId(id), SlotFlags::empty()).expect("it is there");
        }
        rig.mmu.collapse(SPACE, Gfn(0)..Gfn(1 << 18)).flush();
        for (gfn, level) in [(0x205, Level::L1), (0x505, Level::L1), (0x100, Level::L2), (0x700, Level::L2)] {
            assert_eq!(level_at(&rig, gfn), Some(level), "{gfn:#x}");
        }
        for gfn in [0x300, 0x3ff, 0x4ff] {
            assert_eq!(rig.mmu.translate(SPACE, Gfn(gfn)), None);
        }
    }

    /// The first write to a large leaf of a logged slot marks its own page, and leaves the leaf's other pages to be noticed
    /// by writes of their own: the whole leaf is not made writable for one mark.
    fn case_34_one_write_to_a_large_leaf_does_not_hide_the_next<F>() {
        for tracking in [tdp::DirtyTracking::WriteProtect, tdp::DirtyTracking::DirtyBit] {
            let rig = Rig::<F>::with(RigSetup {
                dirty_tracking: tracking,
                eager_split: false,
                ..RigSetup::default()
            });
            let memory = Memory::new(Pfn(BASE), Level::L2);
            let slot = Slot::new(Gfn(0)..Gfn(512), memory).with_id(ID);
            rig.mmu.slots().insert(slot).expect("the first slot");
            let mut cpu = rig.processor(rig.vcpu());
            assert!(cpu.run(Gpa(0), Access::Write).is_ok());
            rig.mmu.slots().set_flags(SPACE, ID, SlotFlags::LOG_DIRTY).expect("it is there");
            assert_eq!(level_at(&rig, 0), Some(Level::L2), "not split yet");
            let log = rig.mmu.dirty_log(SPACE, ID).expect("it is logged");
            let collect = || {
                let mut bitmap = [0; 8];
                log.collect(&mut bitmap).expect("the right size").flush();
                bitmap
            };
            for gfn in [70, 5, 71, 511] {
                assert!(cpu.run(Gfn(gfn).address(), Access::Write).is_ok());
                let mut expected = [0; 8];
                expected[gfn as usize / 64] = 1 << (gfn % 64);
                assert_eq!(collect(), expected, "{tracking:?} {gfn}");
            }
            rig.assert_maps(&mut cpu.vcpu, Gfn(9), Pfn(BASE + 9), Level::L1, Perms::RX);
        }
    }
}
