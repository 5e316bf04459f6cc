//! Bits of an entry that the processor, a fault or a sweep changes at the same time: none is lost, none is given back that
//! was taken, and nothing but a leaf is touched.

use crate::common::host::Memory;
use crate::common::processor::Processor;
use crate::common::rig::{Rig, RigSetup};
use crate::{SPACE, fixed};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use tdp::{
    Access, AdBits, DirtyTracking, Fault, Gfn, Gpa, Level, MemoryFault, Outcome, Perms, Pfn, Slot,
    SlotFlags, SlotId, Spte,
};

const BASE: u64 = 1 << 20;
const PAGES: u64 = 128;
const ID: SlotId = SlotId(1);

/// A slot of small pages whose writes are logged by dirty bits.
fn rig_logged<F: Processor>(flags: SlotFlags) -> Rig<F> {
    let rig = Rig::with(RigSetup {
        dirty_tracking: DirtyTracking::DirtyBit,
        ..RigSetup::default()
    });
    insert(&rig, Level::L1);
    let slots = rig.mmu.slots();
    slots
        .set_flags(SPACE, ID, SlotFlags::LOG_DIRTY | flags)
        .expect("it is there");
    rig
}

fn insert<F: Processor>(rig: &Rig<F>, level: Level) {
    let slot = Slot::new(Gfn(0)..Gfn(PAGES), Memory::new(Pfn(BASE), level)).with_id(ID);
    rig.mmu.slots().insert(slot).expect("the first slot");
}

/// The marks of the log; flushed.
fn collect<F: Processor>(rig: &Rig<F>) -> [u64; 2] {
    let mut bitmap = [0; 2];
    let log = rig.mmu.dirty_log(SPACE, ID).expect("it is logged");
    log.collect(&mut bitmap).expect("the right size").flush();
    bitmap
}

fn leaf<F: Processor>(rig: &Rig<F>, gfn: u64) -> Spte {
    let leaf = rig.mmu.translate(SPACE, Gfn(gfn)).expect("it is mapped");
    leaf.spte
}

both_formats! {
    /// A write that got through sets its dirty bit while a sweep is at the same entry. Whatever the sweep does to the entry,
    /// the log has the page, and no other.
    fn case_01_no_dirty_bit_set_beside_a_sweep_is_lost<F>() {
        let rig = rig_logged::<F>(SlotFlags::empty());
        let mut cpu = rig.processor(rig.vcpu());
        let all = Gfn(0)..Gfn(PAGES);
        let met = Cell::new(0);
        // On a busy machine it takes long for the two to meet; that they do is up to the scheduler.
        for round in (0..2400u64).take_while(|&round| round < 240 || met.get() == 0) {
            // Writable and clean.
            for gfn in 0..PAGES {
                assert_eq!(cpu.vcpu.fault(Fault::read(Gfn(gfn).address())), fixed(Level::L1));
                assert_eq!(leaf(&rig, gfn).0 & F::DIRTY, 0);
            }
            let started = AtomicBool::new(false);
            let (written, held) = std::thread::scope(|scope| {
                let processor = scope.spawn(|| {
                    started.store(true, Ordering::Release);
                    let mut written = [0u64; 2];
                    for gfn in 0..PAGES {
                        let touched = cpu.touch(Gfn(gfn).address(), Access::Write);
                        written[gfn as usize / 64] |= u64::from(touched.result.is_ok()) << (gfn % 64);
                    }
                    written
                });
                while !started.load(Ordering::Acquire) {
                    std::hint::spin_loop();
                }
                // The two go over the pages side by side and have to meet: one of them is a little late, now more, now less.
                for _ in 0..round % 16 * 64 {
                    std::hint::spin_loop();
                }
                let mut held = Vec::new();
                for gfn in 0..PAGES {
                    let page = Gfn(gfn)..Gfn(gfn + 1);
                    match round % 3 {
                        0 => held.push(rig.mmu.zap_leaves(SPACE, page)),
                        1 => held.push(rig.mmu.write_protect(SPACE, page, Level::L1)),
                        _ => drop(rig.mmu.age(SPACE, page)),
                    }
                }
                (processor.join().expect("the processor goes on"), held)
            });
            drop(held);
            met.set(met.get() + u64::from(written != [0; 2] && written != [u64::MAX; 2]));
            assert_eq!(collect(&rig), written, "round {round}");
            rig.mmu.zap(SPACE, all.clone()).flush();
        }
        println!("the two met in {} rounds", met.get());
    }

    /// Aging takes the accessed bit, or the permissions for a while; the dirty bit, which the log needs, and the right to be
    /// written stay.
    fn case_13_aging_leaves_the_dirty_bit<F>() {
        let rig = rig_logged::<F>(SlotFlags::empty());
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gpa(0x3000), Access::Write).is_ok());
        let before = leaf(&rig, 3);
        assert_eq!(before.0 & (F::DIRTY | F::ACCESSED), F::DIRTY | F::ACCESSED);
        assert!(rig.mmu.age(SPACE, Gfn(0)..Gfn(PAGES)));
        assert_eq!(leaf(&rig, 3), Spte(before.0 & !F::ACCESSED));
        assert_eq!(collect(&rig), [1 << 3, 0]);

        // Without the bits nothing but permissions is taken, and the next write has all of them again.
        let rig = Rig::<F>::with_ad_bits(AdBits::Software);
        insert(&rig, Level::L1);
        let mut vcpu = rig.vcpu();
        assert_eq!(vcpu.fault(Fault::write(Gpa(0x3000))), fixed(Level::L1));
        let before = leaf(&rig, 3);
        assert!(rig.mmu.age(SPACE, Gfn(0)..Gfn(PAGES)));
        assert_eq!(vcpu.fault(Fault::write(Gpa(0x3000))), fixed(Level::L1));
        assert_eq!(leaf(&rig, 3), before);
    }

    /// A frame that was protected for good while its writable bit was clear already, by the log or by aging: the repair that
    /// asks no one must not give the bit back, and whoever still has it cached must be flushed.
    fn case_14_the_repair_does_not_undo_the_protection_of_a_frame<F>() {
        for ad_bits in [AdBits::Processor, AdBits::Software] {
            let rig = Rig::<F>::with_ad_bits(ad_bits);
            insert(&rig, Level::L1);
            let mut cpu = rig.processor(rig.vcpu());
            assert!(cpu.run(Gpa(0), Access::Write).is_ok());
            if ad_bits == AdBits::Processor {
                rig.mmu.write_protect(SPACE, Gfn(0)..Gfn(PAGES), Level::L1).flush();
            } else {
                assert!(rig.mmu.age(SPACE, Gfn(0)..Gfn(PAGES)));
            }
            assert_eq!(leaf(&rig, 0).0 & (F::WRITABLE | F::MMU_WRITABLE), F::MMU_WRITABLE);
            let _ = rig.host().take_flushes();
            let pending = rig.mmu.write_protect_gfn(SPACE, Gfn(0));
            assert!(!pending.is_empty(), "it may be cached as writable");
            pending.flush();
            assert_eq!(rig.host().take_flushes().len(), 1);
            rig.host().permit(Perms::RX);
            let lookups = rig.host().script().lookups;
            let refused = Err(Outcome::MemoryFault(MemoryFault::NotPermitted));
            assert_eq!(cpu.run(Gpa(0), Access::Write), refused, "{ad_bits:?}");
            assert!(rig.host().script().lookups > lookups, "the host was asked");
            assert!(cpu.run(Gpa(0), Access::Read).is_ok());
            assert_eq!(leaf(&rig, 0).0 & (F::WRITABLE | F::MMU_WRITABLE), 0);
        }
    }

    /// Marks are cleared of frames that nothing maps, or that stand for device memory from before the slot came: in such an
    /// entry the same bits mean something else, and stay.
    fn case_15_clearing_marks_touches_leaves_only<F>() {
        let rig = Rig::<F>::with(RigSetup {
            dirty_tracking: DirtyTracking::DirtyBit,
            ..RigSetup::default()
        });
        let mut vcpu = rig.vcpu();
        // With a generation and a frame number that have every bit which a leaf has for dirty and writable.
        let device = Gfn(0x7f);
        assert_eq!(
            vcpu.fault(Fault::write(device.address())),
            Ok(Outcome::Mmio { read_only: false })
        );
        insert(&rig, Level::L1);
        let flags = SlotFlags::LOG_DIRTY | SlotFlags::LOG_MANUAL | SlotFlags::LOG_INITIALLY_SET;
        rig.mmu.slots().set_flags(SPACE, ID, flags).expect("it is there");
        assert_eq!(vcpu.fault(Fault::write(Gpa(0x5000))), fixed(Level::L1));
        let root = vcpu.load_root().expect("the root is there");
        let entries = |skip| -> Vec<Spte> {
            let others = (0..512).filter(|&gfn| gfn != skip);
            others.map(|gfn| rig.entry(root, Gfn(gfn), Level::L1).expect("there is a table")).collect()
        };
        let before = entries(5);
        assert!(F::mmio_entry(rig.entry(root, device, Level::L1).expect("as above")).is_some());
        assert_eq!(before.iter().filter(|&&spte| spte == F::EMPTY).count(), 510);
        let log = rig.mmu.dirty_log(SPACE, ID).expect("it is logged");
        let pending = log.clear(0, &[u64::MAX, u64::MAX]).expect("it fits");
        assert_eq!(pending.leaves(), 1);
        pending.flush();
        let all = Gfn(0)..Gfn(PAGES);
        rig.mmu.write_protect(SPACE, all.clone(), Level::L1).flush();
        rig.mmu.age(SPACE, all.clone());
        let mut bitmap = [0; 2];
        log.collect(&mut bitmap).expect("the right size").flush();
        rig.mmu.zap_leaves(SPACE, all).flush();
        assert_eq!(entries(5), before);
    }

    /// An address space with a tree whose bits the processor keeps and one whose bits it does not: each write is logged in the
    /// way of its own tree, again after every collection.
    fn case_16_each_tree_is_logged_in_its_own_way<F>() {
        let rig = rig_logged::<F>(SlotFlags::empty());
        let mut with = rig.processor(rig.vcpu());
        let mut without = rig.vcpu();
        let root = without.set_ad_bits(AdBits::Software).expect("a frame for the root");
        for round in 0..3 {
            assert!(with.run(Gpa(0x2000), Access::Write).is_ok());
            assert_eq!(without.fault(Fault::write(Gpa(0x47_000))), fixed(Level::L1), "{round}");
            let other = rig.entry(root, Gfn(0x47), Level::L1).expect("there is a table");
            assert_ne!(other.0 & F::WRITABLE, 0);
            assert_eq!(collect(&rig), [1 << 2, 1 << 7], "{round}");
            // By its bit, and by being taken the right to write.
            assert_eq!(leaf(&rig, 2).0 & (F::DIRTY | F::WRITABLE), F::WRITABLE);
            let other = rig.entry(root, Gfn(0x47), Level::L1).expect("there is a table");
            assert_eq!(other.0 & F::WRITABLE, 0);
            assert_eq!(collect(&rig), [0, 0]);
        }
    }

    /// A read is told by the host that it may not be written; before it is installed another vCPU's write is, by a host that
    /// permits it by now. The read leaves the wider leaf alone, of whatever size the two are.
    fn case_21_a_read_does_not_narrow_what_a_write_installed<F>() {
        for (backing, of_write) in [(Level::L1, Level::L1), (Level::L2, Level::L2), (Level::L2, Level::L1)] {
            let rig = Rig::<F>::new();
            let slot = Slot::new(Gfn(0)..Gfn(512), Memory::new(Pfn(BASE), backing)).with_id(ID);
            rig.mmu.slots().insert(slot).expect("the first slot");
            let (mut reader, mut writer) = (rig.vcpu(), rig.vcpu());
            rig.host().permit(Perms::RX);
            let (mmu, (said, heard)) = (rig.mmu.clone(), std::sync::mpsc::channel());
            rig.host().script().while_looking = Some(Box::new(move || {
                mmu.host().permit(Perms::RWX);
                let write = Fault::write(Gpa(0)).max_level(of_write);
                said.send(writer.fault(write)).expect("somebody listens");
                // However often the reader asks, it is told the same.
                mmu.host().permit(Perms::RX);
            }));
            assert_eq!(reader.fault(Fault::read(Gpa(0))), Ok(Outcome::Spurious));
            assert_eq!(heard.recv(), Ok(fixed(of_write)));
            assert_ne!(leaf(&rig, 0).0 & F::WRITABLE, 0, "{backing:?} {of_write:?}");
            rig.host().permit(Perms::RWX);
            let write = Fault::write(Gpa(0)).max_level(of_write);
            assert_eq!(reader.fault(write), Ok(Outcome::Spurious));
        }
    }
}
