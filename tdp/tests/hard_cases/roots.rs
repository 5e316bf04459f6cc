//! Roots that are obsolete, and faults and sweeps that still meet them.

use crate::common::host::Memory;
use crate::common::processor::{Processor, Report};
use crate::common::rig::{Rig, RigSetup, hear};
use crate::{OTHER, SPACE, fixed};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use tdp::{
    Access, AdBits, Fault, Gfn, Gpa, Level, Outcome, Pfn, RetryReason, Slot, SlotFlags, SlotId,
};

const BASE: u64 = 1 << 20;
const ID: SlotId = SlotId(1);

fn rig_with<F: Processor>(frames: usize) -> Rig<F> {
    let rig = Rig::with(RigSetup {
        frames,
        ..RigSetup::default()
    });
    for as_id in [SPACE, OTHER] {
        let memory = Memory::new(Pfn(BASE), Level::L1);
        let slot = Slot::new(Gfn(0)..Gfn(1 << 12), memory).in_space(as_id);
        rig.mmu
            .slots()
            .insert(slot.with_id(ID))
            .expect("the first slot there");
    }
    rig
}

both_formats! {
    /// While a root is being taken down, and its teardown is in the middle of a flush, the host takes a page back: when that
    /// is done no root maps the page, obsolete or not, and no vCPU reaches it.
    fn case_04_the_host_reaches_roots_that_are_being_torn_down<F>() {
        let rig = rig_with::<F>(256);
        let mut late = rig.processor(rig.vcpu());
        for gfn in [0, 600] {
            assert!(late.run(Gfn(gfn).address(), Access::Write).is_ok());
        }
        let teardown = rig.mmu.invalidate_roots();
        let mut new = rig.processor(rig.vcpu());
        assert!(new.run(Gpa(0), Access::Write).is_ok());
        let invalidation = rig.mmu.invalidate_begin(SPACE, Gfn(0)..Gfn(1));
        let pending = invalidation.zap();
        assert_eq!(pending.leaves(), 2);
        let flushed = pending.flush();
        invalidation.end(flushed);
        let gone = |root| {
            let leaf = rig.entry(root, Gfn(0), Level::L1);
            leaf.is_none_or(|spte| !F::is_mmu_present(spte))
        };
        assert!(gone(late.root()) && gone(new.root()));
        for cpu in [&mut late, &mut new] {
            assert_eq!(cpu.touch(Gpa(0), Access::Read).result, Err(Report::Absent));
        }
        assert!(late.touch(Gfn(600).address(), Access::Read).result.is_ok());
        teardown.finish();
    }

    /// The roots are replaced, and taken down, between a fault's check of its root and its exchange: nothing is installed
    /// into the dead tree. If they are only obsolete by then, what is installed goes with the tree.
    fn case_11_nothing_stays_in_a_dead_root<F>() {
        for finished in [false, true] {
            let rig = rig_with::<F>(256);
            // A flag that takes the fault past its shortcut: its root is looked at before its backing.
            let slots = rig.mmu.slots();
            slots.set_flags(SPACE, ID, SlotFlags::LOG_DIRTY).expect("it is there");
            let mut vcpu = rig.vcpu();
            assert_eq!(vcpu.fault(Fault::write(Gpa(0x1000))), fixed(Level::L1));
            let (mmu, (said, heard)) = (rig.mmu.clone(), channel());
            rig.host().script().while_looking = Some(Box::new(move || {
                let teardown = mmu.invalidate_roots();
                if finished {
                    teardown.finish();
                } else {
                    said.send(teardown).expect("somebody listens");
                }
            }));
            let outcome = vcpu.fault(Fault::write(Gpa(0)));
            if finished {
                assert_eq!(outcome, Ok(Outcome::Retry(RetryReason::RootObsolete)));
            } else {
                assert_eq!(outcome, fixed(Level::L1));
                hear(&heard).finish();
            }
            assert_eq!(rig.mmu.stats().pages, [0; 3], "finished first: {finished}");
            assert_eq!(
                vcpu.fault(Fault::write(Gpa(0))),
                Ok(Outcome::Retry(RetryReason::RootObsolete))
            );
            vcpu.load_root().expect("a frame for the root");
            assert_eq!(rig.mmu.translate(SPACE, Gfn(0)), None);
            assert_eq!(vcpu.fault(Fault::write(Gpa(0))), fixed(Level::L1));
        }
    }

    /// The kind of a vCPU's tree is asked for by its address space and by who keeps its bits, and by nothing that could have
    /// been reset in between: it is the same for every root that follows.
    fn case_30_a_new_root_is_of_the_kind_of_the_old_one<F>() {
        let rig = rig_with::<F>(256);
        let mut vcpu = rig.vcpu();
        vcpu.set_address_space(OTHER).expect("there are two");
        vcpu.set_ad_bits(AdBits::Software).expect("a frame for the root");
        for _ in 0..3 {
            rig.mmu.invalidate_roots().finish();
            let root = vcpu.load_root().expect("a frame for the root");
            assert_eq!((vcpu.address_space(), vcpu.ad_bits()), (OTHER, AdBits::Software));
            assert_eq!(vcpu.fault(Fault::write(Gpa(0))), fixed(Level::L1));
            let leaf = rig.entry(root, Gfn(0), Level::L1).expect("there is a table");
            assert_ne!(leaf.0 & F::AD_SOFTWARE, 0);
        }
    }

    /// vCPUs that load, leave and come back to roots while others make them obsolete and take them down: no root comes back
    /// from the dead, none is freed while it is used, and none is left in the end.
    fn case_38_a_root_is_not_found_again_after_its_last_count<F>() {
        let rig = rig_with::<F>(8192);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut vcpu = rig.vcpu();
                    let mut newest = 0;
                    let mut space = SPACE;
                    while !over.load(Ordering::Acquire) {
                        space = if space == SPACE { OTHER } else { SPACE };
                        vcpu.set_address_space(space).expect("a frame for the root");
                        let root = vcpu.load_root().expect("a frame for the root");
                        match vcpu.fault(Fault::write(Gpa(0))) {
                            Ok(Outcome::Fixed { .. } | Outcome::Spurious) => {
                                newest = newest.max(root.generation);
                            }
                            Ok(Outcome::Retry(_)) => {}
                            other => panic!("{other:?}"),
                        }
                        // The roots that were taken have generations of their own time.
                        assert!(root.generation + 3 * 2 >= newest, "{} after {newest}", root.generation);
                    }
                });
            }
            for _ in 0..300 {
                rig.mmu.invalidate_roots().finish();
                std::thread::yield_now();
            }
            over.store(true, Ordering::Release);
        });
        rig.mmu.invalidate_roots().finish();
        rig.mmu.synchronize();
        assert_eq!(rig.mmu.stats().pages, [0; 3]);
        assert_eq!(rig.frames().allocated(), 0, "a root is left");
        let stats = rig.mmu.stats();
        assert_eq!(stats.roots_made, stats.roots_invalidated);
    }
}
