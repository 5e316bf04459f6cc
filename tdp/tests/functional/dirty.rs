//! Dirty logging: by write protection, by dirty bits and by the processor's log, into bitmaps and into rings.

use crate::common::host::Memory;
use crate::common::processor::Processor;
use crate::common::rig::{Cpu, Rig, RigSetup};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tdp::{
    Access, AdBits, AddressSpaceId, DirtyLogError, DirtyPage, DirtyTracking, Fault, Gfn, Gpa,
    Level, Outcome, Perms, Pfn, Slot, SlotFlags, SlotId,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const ID: SlotId = SlotId(3);
/// Not a multiple of 64, so that words of the log and entries of a table are out of step.
const FIRST: u64 = 512 * 4 - 24;
const PAGES: u64 = 1200;
const BASE: u64 = (1 << 20) - 24;
const WORDS: usize = 19;
const LOG: SlotFlags = SlotFlags::LOG_DIRTY;

const TRACKINGS: [DirtyTracking; 3] = [
    DirtyTracking::WriteProtect,
    DirtyTracking::DirtyBit,
    DirtyTracking::ModificationLog,
];

fn rig_with<F: Processor>(
    tracking: DirtyTracking,
    ad_bits: AdBits,
    level: Level,
    ring: u32,
) -> Rig<F> {
    let mut setup = RigSetup {
        dirty_tracking: tracking,
        dirty_ring: ring,
        ..RigSetup::default()
    };
    setup.processor.ad_bits = ad_bits;
    let rig = Rig::with(setup);
    let memory = Memory::new(Pfn(BASE), level);
    let slot = Slot::new(Gfn(FIRST)..Gfn(FIRST + PAGES), memory).with_id(ID);
    rig.mmu.slots().insert(slot).expect("the first slot");
    rig
}

fn rig_splitting<F: Processor>(tracking: DirtyTracking, eager_split: bool) -> Rig<F> {
    let rig = Rig::with(RigSetup {
        dirty_tracking: tracking,
        eager_split,
        ..RigSetup::default()
    });
    let memory = Memory::new(Pfn(BASE), Level::L2);
    let slot = Slot::new(Gfn(FIRST)..Gfn(FIRST + PAGES), memory).with_id(ID);
    rig.mmu.slots().insert(slot).expect("the first slot");
    rig
}

fn log<F: Processor>(rig: &Rig<F>, flags: SlotFlags) {
    rig.mmu
        .slots()
        .set_flags(SPACE, ID, flags)
        .expect("it is there");
}

fn page(offset: u64) -> Gpa {
    Gfn(FIRST + offset).address()
}

fn write<F: Processor>(cpu: &mut Cpu<F>, offset: u64) {
    assert!(cpu.run(page(offset), Access::Write).is_ok());
}

/// Offsets of the marks.
fn offsets(bitmap: &[u64]) -> Vec<u64> {
    let bit = |n: &u64| bitmap[(n / 64) as usize] >> (n % 64) & 1 != 0;
    (0..bitmap.len() as u64 * 64).filter(bit).collect()
}

/// What the log has; flushed.
fn collect<F: Processor>(rig: &Rig<F>) -> Vec<u64> {
    let log = rig.mmu.dirty_log(SPACE, ID).expect("it is logged");
    let mut bitmap = vec![0; log.words()];
    log.collect(&mut bitmap).expect("the right size").flush();
    offsets(&bitmap)
}

both_formats! {
    /// A change that takes away what the slot maps puts the slot back with its log: the one that runs, or one begun by it.
    fn a_log_outlasts_a_change_of_what_is_permitted<F>() {
        let tracking = DirtyTracking::WriteProtect;
        let rig = rig_with::<F>(tracking, AdBits::Processor, Level::L1, 0);
        let mut cpu = rig.processor(rig.vcpu());
        log(&rig, LOG | SlotFlags::READ_ONLY);
        assert_eq!(collect(&rig), [0; 0]);
        log(&rig, LOG);
        write(&mut cpu, 5);
        log(&rig, LOG | SlotFlags::READ_ONLY);
        log(&rig, LOG);
        write(&mut cpu, 6);
        assert_eq!(collect(&rig), [5, 6]);
        log(&rig, SlotFlags::READ_ONLY);
        assert!(rig.mmu.dirty_log(SPACE, ID).is_err());
    }

    /// Each page is reported once for all its writes, and again for the next one.
    fn writes_are_logged_until_they_are_collected<F>() {
        for ad_bits in [AdBits::Processor, AdBits::Software] {
            for tracking in [DirtyTracking::WriteProtect, DirtyTracking::DirtyBit] {
                let rig = rig_with::<F>(tracking, ad_bits, Level::L1, 0);
                let mut cpu = rig.processor(rig.vcpu());
                write(&mut cpu, 5);
                write(&mut cpu, 700);
                log(&rig, LOG);
                assert_eq!(collect(&rig), [0; 0], "written before");
                for offset in [700, 0, 700, PAGES - 1] {
                    write(&mut cpu, offset);
                }
                assert!(cpu.run(page(5), Access::Read).is_ok());
                assert_eq!(collect(&rig), [0, 700, PAGES - 1], "{tracking:?} {ad_bits:?}");
                assert_eq!(collect(&rig), [0; 0]);
                write(&mut cpu, 700);
                assert_eq!(collect(&rig), [700]);
                rig.mmu.zap_leaves(SPACE, Gfn(FIRST)..Gfn(FIRST + PAGES)).flush();
                assert_eq!(collect(&rig), [0; 0], "told before it was taken away");
                log(&rig, SlotFlags::empty());
                let refused = rig.mmu.dirty_log(SPACE, ID).map(drop);
                assert_eq!(refused, Err(DirtyLogError::NotLogged { id: ID }));
            }
        }
    }

    /// By write protection a page counts as written when it becomes writable, by dirty bits when it is written.
    fn a_read_marks_what_it_makes_writable<F>() {
        for (tracking, expected) in TRACKINGS.into_iter().zip([vec![9], vec![], vec![]]) {
            let rig = rig_with::<F>(tracking, AdBits::Processor, Level::L1, 0);
            log(&rig, LOG);
            let mut cpu = rig.processor(rig.vcpu());
            assert!(cpu.run(page(9), Access::Read).is_ok());
            assert_eq!(collect(&rig), expected, "{tracking:?}");
            // One that is writable from then on, by the leaf or by the dirty bit.
            assert!(cpu.touch(page(9), Access::Write).result.is_ok() == expected.is_empty());
        }
    }

    /// A read that gives an aged leaf back marks nothing.
    fn a_read_of_an_aged_page_marks_nothing<F>() {
        let rig = rig_with::<F>(DirtyTracking::WriteProtect, AdBits::Software, Level::L1, 0);
        log(&rig, LOG);
        let mut cpu = rig.processor(rig.vcpu());
        write(&mut cpu, 9);
        assert_eq!(collect(&rig), [9]);
        assert!(rig.mmu.age(SPACE, Gfn(FIRST)..Gfn(FIRST + PAGES)));
        assert!(cpu.run(page(9), Access::Read).is_ok());
        assert_eq!(collect(&rig), [0; 0]);
        write(&mut cpu, 9);
        assert_eq!(collect(&rig), [9]);
    }

    /// Large leaves are protected whatever the tracking; the first write splits them and marks its own page alone. Split at
    /// once they are tracked as small ones are.
    fn large_leaves_are_split_at_once_or_by_the_first_write<F>() {
        for (tracking, eager) in TRACKINGS.into_iter().flat_map(|it| [(it, false), (it, true)]) {
            let rig = rig_splitting::<F>(tracking, eager);
            let mut cpu = rig.processor(rig.vcpu());
            write(&mut cpu, 24);
            let leaf = rig.mmu.translate(SPACE, Gfn(FIRST + 24)).expect("mapped");
            assert_eq!(leaf.level, Level::L2);
            log(&rig, LOG);
            let level = if eager { Level::L1 } else { Level::L2 };
            let leaf = rig.mmu.translate(SPACE, Gfn(FIRST + 100)).expect("mapped");
            assert_eq!(leaf.level, level);
            let by_bit = eager && tracking != DirtyTracking::WriteProtect;
            assert_eq!(cpu.touch(page(100), Access::Write).result.is_ok(), by_bit, "{tracking:?}");
            write(&mut cpu, 100);
            let gfn = Gfn(FIRST + 100);
            rig.assert_maps(&mut cpu.vcpu, gfn, Pfn(BASE + 100), Level::L1, Perms::RWX);
            if by_bit && tracking == DirtyTracking::ModificationLog {
                cpu.vcpu.log_modified(&[page(100)]);
            }
            assert_eq!(collect(&rig), [100], "{tracking:?}");
            log(&rig, SlotFlags::empty());
            let leaf = rig.mmu.translate(SPACE, gfn).expect("mapped");
            assert_eq!(leaf.level, Level::L2, "large again");
            write(&mut cpu, 101);
        }
    }

    /// A panic of the frame source, while leaves are made small, leaves a log that notices every write.
    fn a_log_that_panicked_in_the_beginning_is_one<F>() {
        for tracking in TRACKINGS {
            let rig = rig_splitting::<F>(tracking, true);
            let mut cpu = rig.processor(rig.vcpu());
            write(&mut cpu, 24);
            let _ = rig.host().take_flushes();
            rig.frames().panic_once();
            let begun = catch_unwind(AssertUnwindSafe(|| log(&rig, LOG)));
            assert!(begun.is_err());
            assert!(!rig.host().take_flushes().is_empty());
            assert_eq!(collect(&rig), [0; 0]);
            assert!(cpu.touch(page(24), Access::Write).result.is_err(), "{tracking:?}");
            write(&mut cpu, 25);
            assert_eq!(collect(&rig), [25], "{tracking:?}");
            assert_eq!(rig.mmu.audit().misplaced, 0);
        }
    }

    /// A panic of the frame source, while leaves of a log that began full are made small, loses no mark: what was taken and not
    /// restricted is told again.
    fn a_log_that_panicked_in_the_middle_tells_again<F>() {
        for by_mask in [false, true] {
            let rig = rig_splitting::<F>(DirtyTracking::WriteProtect, true);
            let mut cpu = rig.processor(rig.vcpu());
            write(&mut cpu, 24);
            let manual = if by_mask { SlotFlags::LOG_MANUAL } else { SlotFlags::empty() };
            log(&rig, LOG | SlotFlags::LOG_INITIALLY_SET | manual);
            let dirty = rig.mmu.dirty_log(SPACE, ID).expect("it is logged");
            let mut bitmap = vec![0; dirty.words()];
            rig.frames().panic_once();
            let taken = catch_unwind(AssertUnwindSafe(|| {
                if by_mask {
                    let _ = dirty.clear(0, &[u64::MAX]).expect("in range").flush();
                } else {
                    let _ = dirty.collect(&mut bitmap).expect("as long as it is").flush();
                }
            }));
            assert!(taken.is_err());
            // The page can be written unseen still: it has to be told.
            assert!(cpu.touch(page(24), Access::Write).result.is_ok());
            assert_eq!(collect(&rig), Vec::from_iter(0..PAGES), "by mask: {by_mask}");
            assert_eq!(rig.mmu.audit().misplaced, 0);
        }
    }

    /// With manual clearing, collecting leaves marks and leaves alone; clearing takes what the mask names.
    fn marks_are_cleared_by_mask<F>() {
        let rig = rig_with::<F>(DirtyTracking::WriteProtect, AdBits::Processor, Level::L1, 0);
        log(&rig, LOG | SlotFlags::LOG_MANUAL);
        let mut cpu = rig.processor(rig.vcpu());
        for offset in [0, 63, 64, 130, 1199] {
            write(&mut cpu, offset);
        }
        let _ = rig.host().take_flushes();
        for _ in 0..2 {
            assert_eq!(collect(&rig), [0, 63, 64, 130, 1199]);
        }
        assert_eq!(rig.host().take_flushes(), []);
        let dirty = rig.mmu.dirty_log(SPACE, ID).expect("it is logged");
        // Frame 62 is not marked: nothing to take there.
        let pending = dirty.clear(0, &[1 << 63 | 1 << 62, u64::MAX]).expect("in range");
        assert_eq!(pending.leaves(), 2);
        pending.flush();
        assert_eq!(rig.host().take_flushes().len(), 1);
        assert_eq!(collect(&rig), [0, 130, 1199]);
        for (offset, writable) in [(0, true), (63, false), (64, false), (130, true)] {
            let found = cpu.touch(page(offset), Access::Write).result;
            assert_eq!(found.is_ok(), writable, "frame {offset}");
        }
        dirty.clear(64 * 18, &[u64::MAX]).expect("in range").flush();
        assert_eq!(collect(&rig), [0, 130]);
        write(&mut cpu, 63);
        assert_eq!(collect(&rig), [0, 63, 130]);
        // The embedder's own writes.
        dirty.mark(127, 3);
        assert!(dirty.is_marked(128) && !dirty.is_marked(126));
        assert_eq!(collect(&rig), [0, 63, 127, 128, 129, 130]);
    }

    /// Clearing a mark touches the leaf of its page alone: no neighbour in the word, nor in the other table where a word reaches
    /// into two.
    fn clearing_touches_only_what_is_named<F>() {
        let rig = rig_with::<F>(DirtyTracking::WriteProtect, AdBits::Processor, Level::L1, 0);
        log(&rig, LOG | SlotFlags::LOG_MANUAL);
        let mut cpu = rig.processor(rig.vcpu());
        // Page 24 is the first of its table.
        let offsets = [0, 20, 23, 24, 30, 40, 63];
        for offset in offsets {
            write(&mut cpu, offset);
        }
        let dirty = rig.mmu.dirty_log(SPACE, ID).expect("it is logged");
        let mut cleared = Vec::new();
        for offset in [23, 40, 24] {
            let pending = dirty.clear(0, &[1 << offset]).expect("in range");
            assert_eq!(pending.leaves(), 1);
            pending.flush();
            cleared.push(offset);
            for other in offsets {
                let found = cpu.touch(page(other), Access::Write).result;
                assert_eq!(found.is_err(), cleared.contains(&other), "{other} after {cleared:?}");
            }
        }
    }

    /// A log of more words than are taken at a time: what is marked, taken and restricted are the same pages, at its end as
    /// at its beginning.
    fn a_long_log_is_told_in_full<F>() {
        const AT_A_TIME: u64 = 64 * 64;
        let marked = [5, 70, AT_A_TIME - 1, AT_A_TIME, AT_A_TIME + 133, 2 * AT_A_TIME + 200];
        for flags in [LOG, LOG | SlotFlags::LOG_MANUAL] {
            let rig = Rig::<F>::new();
            let memory = Memory::new(Pfn(BASE), Level::L1);
            let slot = Slot::new(Gfn(FIRST)..Gfn(FIRST + 3 * AT_A_TIME - 30), memory);
            rig.mmu.slots().insert(slot.with_id(ID)).expect("the first slot");
            log(&rig, flags);
            let mut cpu = rig.processor(rig.vcpu());
            for offset in marked {
                write(&mut cpu, offset);
            }
            let dirty = rig.mmu.dirty_log(SPACE, ID).expect("it is logged");
            for offset in marked {
                assert!(dirty.is_marked(offset), "frame {offset}");
            }
            for offset in [6, 69, AT_A_TIME + 5, AT_A_TIME + 134, 2 * AT_A_TIME + 5, 1 << 40] {
                assert!(!dirty.is_marked(offset), "frame {offset}");
            }
            assert_eq!(collect(&rig), marked);
            let first = if flags == LOG {
                0
            } else {
                // All but the first word, which holds one page.
                let rest = vec![u64::MAX; dirty.words() - 1];
                dirty.clear(64, &rest).expect("in range").flush();
                assert_eq!(collect(&rig), [5]);
                assert!(cpu.touch(page(5), Access::Write).result.is_ok(), "not cleared");
                1
            };
            for offset in &marked[first..] {
                let found = cpu.touch(page(*offset), Access::Write).result;
                assert!(found.is_err(), "the next write to frame {offset} is noticed");
            }
        }
    }

    /// A log that begins full changes no leaf before it is cleared, and then those that the mask names.
    fn a_log_that_begins_full<F>() {
        let rig = rig_with::<F>(DirtyTracking::WriteProtect, AdBits::Processor, Level::L2, 0);
        let mut cpu = rig.processor(rig.vcpu());
        write(&mut cpu, 24);
        let _ = rig.host().take_flushes();
        log(&rig, LOG | SlotFlags::LOG_MANUAL | SlotFlags::LOG_INITIALLY_SET);
        assert_eq!(rig.host().take_flushes(), []);
        assert_eq!(collect(&rig), Vec::from_iter(0..PAGES));
        assert!(cpu.touch(page(24), Access::Write).result.is_ok());
        let dirty = rig.mmu.dirty_log(SPACE, ID).expect("it is logged");
        dirty.clear(64, &[1]).expect("in range").flush();
        assert!(cpu.touch(page(64), Access::Write).result.is_err());
        write(&mut cpu, 64);
        assert!(dirty.is_marked(64));
        dirty.clear(0, &[u64::MAX; WORDS]).expect("in range").flush();
        assert_eq!(collect(&rig), [0; 0]);
        assert!(cpu.touch(page(64), Access::Write).result.is_err());
    }

    /// Of a log that begins full each large page is split when a mark in it is cleared, and no other is; none where they are not to
    /// be split ahead.
    fn what_is_cleared_is_split_and_nothing_else<F>() {
        // Words of the mask, and which of the two large pages they lie in.
        let cases: [(&[usize], [bool; 2]); 6] = [
            (&[1], [true, false]),
            (&[7], [true, false]),
            (&[10], [false, true]),
            (&[0, 18], [true, false]),
            (&[18], [false, false]),
            (&[2, 3, 12], [true, true]),
        ];
        for eager in [true, false] {
            for (words, splits) in cases {
                let rig = rig_splitting::<F>(DirtyTracking::WriteProtect, eager);
                let mut cpu = rig.processor(rig.vcpu());
                write(&mut cpu, 24);
                write(&mut cpu, 600);
                assert_eq!(rig.mmu.stats().pages, [0, 2, 0]);
                log(&rig, LOG | SlotFlags::LOG_MANUAL | SlotFlags::LOG_INITIALLY_SET);
                let mut mask = [0; WORDS];
                for &word in words {
                    mask[word] = u64::MAX;
                }
                let dirty = rig.mmu.dirty_log(SPACE, ID).expect("it is logged");
                dirty.clear(0, &mask).expect("in range").flush();
                let level = |offset| rig.mmu.translate(SPACE, Gfn(FIRST + offset)).map(|leaf| leaf.level);
                for (offset, split) in [24, 600].into_iter().zip(splits) {
                    let expected = if eager && split { Level::L1 } else { Level::L2 };
                    assert_eq!(level(offset), Some(expected), "{words:?}, page {offset}, eager: {eager}");
                }
            }
        }
    }

    /// What the processor has logged is handed over.
    fn the_processors_log_is_drained<F>() {
        let rig = rig_with::<F>(DirtyTracking::ModificationLog, AdBits::Processor, Level::L1, 0);
        log(&rig, LOG);
        let mut cpu = rig.processor(rig.vcpu());
        for offset in [1, 2] {
            assert!(cpu.run(page(offset), Access::Read).is_ok());
        }
        assert!(cpu.touch(page(2), Access::Write).result.is_ok(), "without a fault");
        assert_eq!(collect(&rig), [0; 0]);
        cpu.vcpu.log_modified(&[page(2), Gpa(0), Gpa(u64::MAX)]);
        assert_eq!(collect(&rig), [2]);
        let leaf = rig.mmu.translate(SPACE, Gfn(FIRST + 2)).expect("mapped");
        assert_eq!(leaf.spte.0 & F::DIRTY, 0, "the next write is logged again");
    }

    /// A leaf that is taken away leaves its dirty bit in the log.
    fn a_dirty_bit_outlives_its_leaf<F>() {
        let rig = rig_with::<F>(DirtyTracking::DirtyBit, AdBits::Processor, Level::L1, 0);
        log(&rig, LOG);
        let mut cpu = rig.processor(rig.vcpu());
        for offset in [1, 2, 600] {
            assert!(cpu.run(page(offset), Access::Read).is_ok());
        }
        write(&mut cpu, 2);
        rig.mmu.zap_leaves(SPACE, Gfn(FIRST)..Gfn(FIRST + 10)).flush();
        assert_eq!(collect(&rig), [2]);
        write(&mut cpu, 600);
        rig.mmu.zap(SPACE, Gfn(0)..Gfn(1 << 20)).flush();
        assert_eq!(collect(&rig), [600], "the table went with it");
        write(&mut cpu, 7);
        rig.mmu.invalidate_roots().finish();
        assert_eq!(collect(&rig), [7]);
    }

    /// Pages come out of the ring in order; resetting restricts them; a full ring stops the vCPU and nothing is lost.
    fn rings_are_harvested_and_reset<F>() {
        for tracking in [DirtyTracking::WriteProtect, DirtyTracking::ModificationLog] {
            let rig = rig_with::<F>(tracking, AdBits::Processor, Level::L1, 1024);
            log(&rig, LOG);
            let mut cpu = rig.processor(rig.vcpu());
            let ring = cpu.vcpu.dirty_ring().expect("rings").clone();
            assert_eq!((ring.capacity(), ring.len()), (1024, 0));
            let harvest = || {
                let mut pages = Vec::new();
                let seen = ring.harvest(|page: DirtyPage| {
                    assert_eq!((page.as_id, page.slot), (SPACE, ID));
                    pages.push(page.offset);
                });
                assert_eq!(seen, pages.len() as u64);
                pages
            };
            for offset in [70, 3, 70, 1199, 4] {
                write(&mut cpu, offset);
            }
            assert_eq!(harvest(), [70, 3, 1199, 4]);
            assert_eq!(harvest(), [0; 0]);
            assert_eq!(ring.len(), 4, "not reset yet");
            let pending = rig.mmu.reset_dirty_rings();
            assert_eq!(pending.leaves(), 4);
            pending.flush();
            assert!(ring.is_empty());
            assert_eq!(collect(&rig), [0; 0], "the bitmap has nothing of it");
            if tracking == DirtyTracking::WriteProtect {
                let mut filled = 0;
                while cpu.run(page(filled), Access::Write).is_ok() {
                    filled += 1;
                }
                assert!(ring.is_full() && filled > 400);
                let denied = cpu.vcpu.fault(Fault::write(page(filled)));
                assert_eq!(denied, Ok(Outcome::DirtyRingFull));
                // What is pushed nevertheless goes into the reserve, then to the bitmap.
                let logged: Vec<Gpa> = (0..700).map(|n| page(n % PAGES)).collect();
                cpu.vcpu.log_modified(&logged);
                assert!(ring.is_full(), "beyond the limit too");
                let harvested = harvest();
                assert_eq!(harvested.len(), 1024);
                assert_eq!(harvested[..filled as usize], Vec::from_iter(0..filled));
                let rest = 700 - (1024 - filled);
                assert_eq!(collect(&rig), Vec::from_iter(700 - rest..700));
                rig.mmu.reset_dirty_rings().flush();
                write(&mut cpu, 0);
                assert_eq!(harvest(), [0]);
            }
        }
    }

    /// The ring of a vCPU that is gone is there until what it holds has been taken and reset, and no longer.
    fn a_ring_outlives_its_vcpu_while_it_holds_something<F>() {
        let rig = rig_with::<F>(DirtyTracking::WriteProtect, AdBits::Processor, Level::L1, 1024);
        log(&rig, LOG);
        let idle = rig.vcpu();
        let mut cpu = rig.processor(rig.vcpu());
        write(&mut cpu, 7);
        drop((cpu, idle));
        let rings = rig.mmu.dirty_rings();
        assert_eq!(rings.len(), 1, "one holds nothing");
        let mut pages = Vec::new();
        rings[0].harvest(|page| pages.push(page.offset));
        assert_eq!(pages, [7]);
        drop(rings);
        let pending = rig.mmu.reset_dirty_rings();
        assert_eq!(pending.leaves(), 1);
        pending.flush();
        assert!(rig.mmu.dirty_rings().is_empty());
    }

    /// Rings hold pages of both address spaces: a reset is flushed in both.
    fn a_reset_is_flushed_in_every_space<F>() {
        let rig = rig_with::<F>(DirtyTracking::WriteProtect, AdBits::Processor, Level::L1, 1024);
        let other = AddressSpaceId(1);
        let memory = Memory::new(Pfn(BASE), Level::L1);
        let slot = Slot::new(Gfn(1 << 18)..Gfn((1 << 18) + PAGES), memory).with_id(ID);
        rig.mmu.slots().insert(slot.in_space(other)).expect("the first slot");
        for space in [SPACE, other] {
            rig.mmu.slots().set_flags(space, ID, LOG).expect("it is there");
        }
        let mut cpu = rig.processor(rig.vcpu());
        write(&mut cpu, 5);
        cpu.vcpu.set_address_space(other).expect("a frame for the root");
        assert!(cpu.run(Gfn((1 << 18) + 9).address(), Access::Write).is_ok());
        let ring = cpu.vcpu.dirty_ring().expect("rings").clone();
        let mut pages = Vec::new();
        ring.harvest(|page| pages.push((page.as_id, page.offset)));
        assert_eq!(pages, [(SPACE, 5), (other, 9)]);
        let _ = rig.host().take_flushes();
        rig.mmu.reset_dirty_rings().flush();
        let flushed: Vec<_> = rig.host().take_flushes().iter().map(|it| (it.as_id, it.range.start)).collect();
        assert_eq!(flushed, [(SPACE, Gfn(FIRST + 5)), (other, Gfn((1 << 18) + 9))]);
    }

    /// A page that was harvested, and whose slot has gone since, is nobody's: the others are reset all the same.
    fn a_reset_passes_over_slots_that_are_gone<F>() {
        let rig = rig_with::<F>(DirtyTracking::WriteProtect, AdBits::Processor, Level::L1, 1024);
        let gone = SlotId(7);
        let memory = Memory::new(Pfn(BASE), Level::L1);
        let slot = Slot::new(Gfn(1 << 18)..Gfn((1 << 18) + PAGES), memory).with_id(gone);
        rig.mmu.slots().insert(slot).expect("the place is free");
        for id in [ID, gone] {
            rig.mmu.slots().set_flags(SPACE, id, LOG).expect("it is there");
        }
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gfn((1 << 18) + 9).address(), Access::Write).is_ok());
        write(&mut cpu, 5);
        let ring = cpu.vcpu.dirty_ring().expect("rings").clone();
        let harvest = || {
            let mut pages = Vec::new();
            ring.harvest(|page| pages.push((page.slot, page.offset)));
            pages
        };
        assert_eq!(harvest(), [(gone, 9), (ID, 5)]);
        rig.mmu.slots().remove(SPACE, gone).expect("it is there");
        rig.mmu.reset_dirty_rings().flush();
        write(&mut cpu, 5);
        assert_eq!(harvest(), [(ID, 5)], "it was protected again");
    }

    /// What cannot be asked for.
    fn wrong_questions_are_refused<F>() {
        let rig = rig_with::<F>(DirtyTracking::WriteProtect, AdBits::Processor, Level::L1, 0);
        let id = SlotId(9);
        let missing = rig.mmu.dirty_log(SPACE, id).map(drop);
        assert_eq!(missing, Err(DirtyLogError::NoSuchSlot { as_id: SPACE, id }));
        log(&rig, LOG);
        let dirty = rig.mmu.dirty_log(SPACE, ID).expect("it is logged");
        assert_eq!(dirty.words(), WORDS);
        let (words, given) = (WORDS, WORDS - 1);
        let short = dirty.collect(&mut vec![0; given]).map(drop);
        assert_eq!(short, Err(DirtyLogError::WrongLength { words, given }));
        let inside = dirty.clear(32, &[1]).map(drop);
        assert_eq!(inside, Err(DirtyLogError::Unaligned { first: 32 }));
        for (first, given) in [(64 * 18, 2), (!63, 1)] {
            let beyond = dirty.clear(first, &vec![1; given]).map(drop);
            assert_eq!(beyond, Err(DirtyLogError::BeyondEnd { first, given, words }));
        }
        // Whole words and parts of words, no frame more.
        for (first, count) in [(60, 200), (64, 64), (0, 63), (1, 63), (65, 63), (63, 1)] {
            dirty.mark(first, count);
            let marked = Vec::from_iter((0..PAGES).filter(|&offset| dirty.is_marked(offset)));
            assert_eq!(marked, Vec::from_iter(first..first + count));
            assert_eq!(collect(&rig), marked);
        }
        assert!(!dirty.is_marked(PAGES) && !dirty.is_marked(u64::MAX));
        // Bits past the last frame stand for nothing.
        dirty.mark(PAGES - 1, u64::MAX);
        dirty.mark(u64::MAX, 2);
        assert_eq!(collect(&rig), [PAGES - 1]);
    }

    /// A guest writes while its memory is copied, page by page, by what the log says. In the end the copy is right.
    fn a_copy_made_by_the_log_is_right<F>() {
        for tracking in [DirtyTracking::WriteProtect, DirtyTracking::DirtyBit] {
            for flags in [LOG, LOG | SlotFlags::LOG_MANUAL] {
                migrate::<F>(tracking, flags, false);
            }
        }
    }

    /// The same by rings.
    fn a_copy_made_by_rings_is_right<F>() {
        migrate::<F>(DirtyTracking::WriteProtect, LOG, true);
    }
}

/// Two vCPUs write, one thread copies, one takes leaves away and puts large ones in their place.
fn migrate<F: Processor>(tracking: DirtyTracking, flags: SlotFlags, by_rings: bool) {
    let ring = if by_rings { 1024 } else { 0 };
    let rig = rig_with::<F>(tracking, AdBits::Processor, Level::L2, ring);
    let memory: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let mut copy = vec![0; PAGES as usize];
    let copied = |copy: &mut Vec<u64>, offset: u64| {
        copy[offset as usize] = memory[offset as usize].load(Ordering::Relaxed);
    };
    let mut cpus = [rig.processor(rig.vcpu()), rig.processor(rig.vcpu())];
    for offset in (0..PAGES).step_by(64) {
        write(&mut cpus[0], offset);
    }
    log(&rig, flags);
    let stop = AtomicBool::new(false);
    let mut rounds = 0;
    let mut pass = |copy: &mut Vec<u64>| {
        let mut dirty = Vec::new();
        if by_rings {
            for ring in rig.mmu.dirty_rings() {
                ring.harvest(|page| dirty.push(page.offset));
            }
            rig.mmu.reset_dirty_rings().flush();
        }
        let log = rig.mmu.dirty_log(SPACE, ID).expect("it is logged");
        let mut bitmap = vec![0; log.words()];
        log.collect(&mut bitmap).expect("the right size").flush();
        if flags.contains(SlotFlags::LOG_MANUAL) {
            log.clear(0, &bitmap).expect("in range").flush();
        }
        dirty.extend(offsets(&bitmap));
        for &offset in &dirty {
            copied(copy, offset);
        }
        rounds += 1;
    };
    std::thread::scope(|scope| {
        let memory = &memory;
        let stop = &stop;
        let guests: Vec<_> = (1..)
            .zip(cpus.iter_mut())
            .map(|(number, cpu)| {
                scope.spawn(move || {
                    let mut seed: u64 = number * 0x9e37_79b9;
                    let mut count = 0;
                    while !stop.load(Ordering::Relaxed) {
                        seed = seed
                            .wrapping_mul(0x5851_f42d_4c95_7f2d)
                            .wrapping_add(number | 1);
                        let offset = (seed >> 33) % PAGES;
                        let store = |pfn: Pfn| {
                            memory[(pfn.0 - BASE) as usize].fetch_add(1, Ordering::Relaxed);
                        };
                        let touched = cpu.touch_then(page(offset), Access::Write, store);
                        let root = cpu.vcpu.load_root().expect("a frame");
                        cpu.load(root);
                        if let Some(fault) = touched.fault {
                            let outcome = cpu.vcpu.fault(fault).expect("frames");
                            if let Outcome::MemoryFault(why) = outcome {
                                panic!("{why:?}");
                            }
                        } else {
                            count += 1;
                        }
                    }
                    count
                })
            })
            .collect();
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                rig.mmu
                    .zap(SPACE, Gfn(FIRST)..Gfn(FIRST + PAGES / 2))
                    .flush();
                std::thread::yield_now();
                rig.mmu
                    .write_protect(SPACE, Gfn(FIRST)..Gfn(FIRST + PAGES), Level::L1)
                    .flush();
                std::thread::sleep(std::time::Duration::from_micros(50));
            }
        });
        let until = std::time::Instant::now() + std::time::Duration::from_millis(250);
        while std::time::Instant::now() < until {
            pass(&mut copy);
        }
        stop.store(true, Ordering::Relaxed);
        let written: u64 = guests
            .into_iter()
            .map(|guest| guest.join().expect("it goes on"))
            .sum();
        assert!(written > 100, "{written} writes");
    });
    pass(&mut copy);
    let now: Vec<u64> = memory
        .iter()
        .map(|word| word.load(Ordering::Relaxed))
        .collect();
    let lost = (0..PAGES as usize).filter(|&n| now[n] != copy[n]).count();
    assert_eq!(
        lost, 0,
        "pages lost in {rounds} rounds, {tracking:?} {flags:?}"
    );
}
