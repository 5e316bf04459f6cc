//! Two operations on the same frames, one inside the other: what the inner one promises holds although the outer one
//! has not finished.

use super::invalidation::rig_with;
use crate::common::host::{Answer, BlockingAnswer};
use crate::common::processor::{Processor, Report};
use crate::common::rig::{Cpu, Rig, hear};
use std::sync::mpsc::channel;
use tdp::{Access, AddressSpaceId, Fault, Gfn, Gpa, Level, Outcome, Perms, Pfn, SlotId};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const BASE: u64 = 1 << 20;

/// A vCPU that has the page at frame 0 in its TLB.
fn remembering<F: Processor>(rig: &Rig<F>) -> Cpu<F> {
    let mut cpu = rig.processor(rig.vcpu());
    assert!(cpu.run(Gpa(0), Access::Write).is_ok());
    cpu
}

/// Invalidates frame 0 and gives its page away.
fn give_away<F: Processor>(rig: &Rig<F>) {
    let invalidation = rig.mmu.invalidate_begin(SPACE, Gfn(0)..Gfn(1));
    let flushed = invalidation.zap().flush();
    rig.host().script().moved.insert(BASE, Pfn(9 * BASE));
    invalidation.end(flushed);
}

fn assert_cannot_reach<F: Processor>(cpu: &mut Cpu<F>) {
    let touched = cpu.touch(Gpa(0), Access::Read);
    assert_eq!(
        touched.result,
        Err(Report::Absent),
        "the page belongs to somebody else by now"
    );
}

both_formats! {
    /// INV: flush-before-reuse. A sweep took the leaf away and has not flushed yet; the invalidation that comes after
    /// finds no leaf, and yet may not end before the vCPU has forgotten the page.
    fn an_invalidation_ends_flushed_although_a_sweep_was_first<F>() {
        for leaves_only in [false, true] {
            let rig = rig_with::<F>(Level::L1);
            let mut cpu = remembering(&rig);
            let range = Gfn(0)..Gfn(512);
            let pending = if leaves_only {
                rig.mmu.zap_leaves(SPACE, range)
            } else {
                rig.mmu.zap(SPACE, range)
            };
            give_away(&rig);
            assert_cannot_reach(&mut cpu);
            drop(pending);
        }
    }

    /// The same with roots that are being torn down: sealed, and not flushed yet.
    fn an_invalidation_ends_flushed_although_a_teardown_was_first<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut cpu = remembering(&rig);
        let (mmu, (sealed, wait)) = (rig.mmu.clone(), channel());
        let (done, goes_on) = channel::<()>();
        rig.host().script().while_flushing = Some(Box::new(move || {
            sealed.send(()).expect("somebody listens");
            hear(&goes_on);
        }));
        let teardown = std::thread::spawn(move || mmu.invalidate_roots().finish());
        hear(&wait);
        give_away(&rig);
        // The vCPU has not loaded its root anew; it enters with the old one.
        assert_cannot_reach(&mut cpu);
        done.send(()).expect("somebody listens");
        teardown.join().expect("nothing goes wrong");
    }

    /// The same with a slot that is removed.
    fn a_slot_is_removed_flushed_although_a_sweep_was_first<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut cpu = remembering(&rig);
        let pending = rig.mmu.zap_leaves(SPACE, Gfn(0)..Gfn(1));
        rig.mmu.slots().remove(SPACE, SlotId(1)).expect("it is there");
        assert_cannot_reach(&mut cpu);
        drop(pending);
    }

    /// The same with a fault on another vCPU: it has taken a leaf away, because the backing is another page by now, and
    /// has not flushed yet.
    fn a_sweep_ends_flushed_although_a_fault_was_first<F>() {
        let rig = rig_with::<F>(Level::L1);
        rig.host().permit(Perms::RX);
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gpa(0), Access::Read).is_ok());
        rig.host().permit(Perms::RWX);
        rig.host().script().moved.insert(BASE, Pfn(9 * BASE));
        let mut other = rig.vcpu();
        let (taken, wait) = channel();
        let (done, goes_on) = channel::<()>();
        rig.host().script().while_flushing = Some(Box::new(move || {
            taken.send(()).expect("somebody listens");
            hear(&goes_on);
        }));
        let fault = std::thread::spawn(move || other.fault(Fault::write(Gpa(0))));
        hear(&wait);
        // That fault is inside its critical section, so an invalidation would wait for it. A plain sweep does not, and
        // its flush says all the same that the page cannot be reached any more.
        rig.mmu.zap_leaves(SPACE, Gfn(0)..Gfn(1)).flush();
        assert_cannot_reach(&mut cpu);
        done.send(()).expect("somebody listens");
        let outcome = fault.join().expect("nothing goes wrong");
        assert_eq!(outcome, Ok(Outcome::Fixed { level: Level::L1 }));
    }

    /// INV: no-stale-install. A fault beside the range, backed by a large page, may not map the range by the way.
    fn no_large_leaf_reaches_into_an_invalidation<F>() {
        for level in [Level::L2, Level::L3] {
            let rig = rig_with::<F>(level);
            let mut cpu = remembering(&rig);
            let invalidation = rig.mmu.invalidate_begin(SPACE, Gfn(0)..Gfn(1));
            let flushed = invalidation.zap().flush();
            // Its old page is still what the host would answer, at the old level.
            let beside = Gfn(level.pages() - 1);
            let _ = cpu.vcpu.fault(Fault::read(beside.address())).expect("there are frames");
            rig.host().script().moved.insert(BASE, Pfn(9 * BASE));
            rig.assert_absent(&mut cpu.vcpu, Gfn(0), Report::Absent);
            invalidation.end(flushed);
            let found = cpu.run(Gpa(0), Access::Write).expect("there is memory");
            assert_eq!(found.pfn, Pfn(9 * BASE));
            rig.assert_maps(&mut cpu.vcpu, Gfn(0), Pfn(9 * BASE), Level::L1, Perms::RWX);
        }
    }

    /// The same for a look-up that sleeps.
    fn no_large_leaf_of_a_sleeping_look_up_reaches_into_an_invalidation<F>() {
        let rig = rig_with::<F>(Level::L2);
        rig.host().set_answer(Answer::Blocking(BlockingAnswer::Page));
        let mut cpu = remembering(&rig);
        let invalidation = rig.mmu.invalidate_begin(SPACE, Gfn(0)..Gfn(1));
        let flushed = invalidation.zap().flush();
        let _ = cpu.vcpu.fault(Fault::read(Gpa(0x1000))).expect("there are frames");
        rig.host().script().moved.insert(BASE, Pfn(9 * BASE));
        rig.assert_absent(&mut cpu.vcpu, Gfn(0), Report::Absent);
        invalidation.end(flushed);
    }

    /// INV: no-stale-install. An invalidation that is under way when the host finds a large page, and has ended when
    /// the leaf is made: the leaf may not reach the page that moved meanwhile.
    fn an_invalidation_that_ends_in_mid_fault_is_not_missed<F>() {
        let rig = rig_with::<F>(Level::L2);
        let mut vcpu = rig.vcpu();
        let (begun, wait) = channel();
        let (go, goes_on) = channel::<()>();
        let (ended, is_over) = channel();
        let mmu = rig.mmu.clone();
        let host = std::thread::spawn(move || {
            let invalidation = mmu.invalidate_begin(SPACE, Gfn(0)..Gfn(1));
            begun.send(()).expect("somebody listens");
            hear(&goes_on);
            let flushed = invalidation.zap().flush();
            mmu.host().script().moved.insert(BASE, Pfn(9 * BASE));
            invalidation.end(flushed);
            ended.send(()).expect("somebody listens");
        });
        hear(&wait);
        // The page is found, and then the invalidation ends.
        rig.host().script().while_looking = Some(Box::new(move || {
            go.send(()).expect("somebody listens");
            hear(&is_over);
        }));
        let _ = vcpu.fault(Fault::read(Gpa(0x1000))).expect("there are frames");
        host.join().expect("nothing goes wrong");
        if let Some(leaf) = rig.mmu.translate(SPACE, Gfn(0)) {
            assert_eq!(leaf.pfn, Pfn(9 * BASE), "the old page is mapped: {leaf:?}");
        }
    }

    /// INV: no-stale-install. A slot is marked as changing while a fault on it looks its page up; the look-up then
    /// sleeps until the slot's leaves have been taken away. What it found may not be installed.
    fn a_sleeping_look_up_does_not_wake_on_a_changing_slot<F>() {
        let rig = rig_with::<F>(Level::L1);
        // A leaf, so that the removal has something to flush.
        assert_eq!(
            rig.vcpu().fault(Fault::read(Gpa(0x5000))),
            Ok(Outcome::Fixed { level: Level::L1 })
        );
        let mut vcpu = rig.vcpu();
        let generation = rig.mmu.slots().generation();
        let (flushing, is_flushing) = channel();
        let (done, goes_on) = channel::<()>();
        rig.host().script().while_flushing = Some(Box::new(move || {
            flushing.send(()).expect("somebody listens");
            hear(&goes_on);
        }));
        let (mmu, (started, removal)) = (rig.mmu.clone(), channel());
        rig.host().script().while_looking = Some(Box::new(move || {
            let remover = {
                let mmu = mmu.clone();
                std::thread::spawn(move || mmu.slots().remove(SPACE, SlotId(1)))
            };
            while mmu.slots().generation() == generation {
                std::thread::yield_now();
            }
            started.send(remover).expect("somebody listens");
        }));
        rig.host().script().while_asleep =
            Some(Box::new(move || hear(&is_flushing)));
        rig.host().set_answer(Answer::Blocking(BlockingAnswer::Page));
        let outcome = vcpu.fault(Fault::read(Gpa(0))).expect("there are frames");
        done.send(()).expect("somebody listens");
        let remover = hear(&removal);
        remover.join().expect("nothing goes wrong").expect("the slot was there");
        assert!(matches!(outcome, Outcome::Retry(_)), "{outcome:?}");
        rig.assert_absent(&mut vcpu, Gfn(0), Report::Absent);
    }
}
