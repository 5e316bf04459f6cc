//! Invalidations by the host, look-ups that answer otherwise than with a page, and look-ups that sleep.

use crate::common::host::{Answer, BlockingAnswer, Memory};
use crate::common::processor::{Processor, Report};
use crate::common::rig::{Rig, hear};
use tdp::{
    Access, AddressSpaceId, Fault, Gfn, GfnRange, Gpa, Level, Lookup, MemoryFault, Outcome, Perms,
    Pfn, RetryReason, Slot, SlotFlags, SlotId,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const BASE: u64 = 1 << 20;

pub(crate) fn rig_with<F: Processor>(level: Level) -> Rig<F> {
    let rig = Rig::new();
    let slot = Slot::new(Gfn(0)..Gfn(1 << 18), Memory::new(Pfn(BASE), level));
    rig.mmu
        .slots()
        .insert(slot.with_id(SlotId(1)))
        .expect("the first slot");
    rig
}

fn fixed(level: Level) -> Result<Outcome, tdp::FaultError> {
    Ok(Outcome::Fixed { level })
}

fn retry(reason: RetryReason) -> Result<Outcome, tdp::FaultError> {
    Ok(Outcome::Retry(reason))
}

both_formats! {
    /// From beginning to end, faults on the range retry and others do not; after the end the new page is mapped.
    fn faults_wait_for_the_end_of_an_invalidation<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut cpu = rig.processor(rig.vcpu());
        for gfn in [9, 10, 19, 20] {
            assert!(cpu.run(Gfn(gfn).address(), Access::Write).is_ok());
        }
        let invalidation = rig.mmu.invalidate_begin(SPACE, Gfn(10)..Gfn(20));
        for gfn in [10, 15, 19] {
            let fault = Fault::read(Gfn(gfn).address());
            assert_eq!(cpu.vcpu.fault(fault), retry(RetryReason::Invalidation));
        }
        assert_eq!(cpu.vcpu.fault(Fault::read(Gpa(9 << 12))), Ok(Outcome::Spurious));
        assert_eq!(cpu.vcpu.fault(Fault::read(Gpa(21 << 12))), fixed(Level::L1));
        let pending = invalidation.zap();
        assert_eq!(pending.leaves(), 2);
        let flushed = pending.flush();
        let range = rig.host().take_flushes()[0].range;
        assert_eq!(range, GfnRange { start: Gfn(10), end: Gfn(20) });
        for gfn in [10, 19] {
            let touched = cpu.touch(Gfn(gfn).address(), Access::Read);
            assert_eq!(touched.result, Err(Report::Absent));
        }
        rig.host().script().moved.insert(BASE + 10, Pfn(7 * BASE));
        let fault = Fault::read(Gfn(10).address());
        assert_eq!(cpu.vcpu.fault(fault), retry(RetryReason::Invalidation));
        invalidation.end(flushed);
        assert_eq!(cpu.vcpu.fault(fault), fixed(Level::L1));
        rig.assert_maps(&mut cpu.vcpu, Gfn(10), Pfn(7 * BASE), Level::L1, Perms::RWX);
        rig.assert_maps(&mut cpu.vcpu, Gfn(9), Pfn(BASE + 9), Level::L1, Perms::RWX);
    }

    /// Overlapping invalidations: a frame is free again when the last one has ended, however it ends.
    fn invalidations_may_overlap<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut vcpu = rig.vcpu();
        let first = rig.mmu.invalidate_begin(SPACE, Gfn(0)..Gfn(10));
        let second = rig.mmu.invalidate_begin(SPACE, Gfn(5)..Gfn(15));
        let third = rig.mmu.invalidate_begin(SPACE, Gfn(5)..Gfn(5));
        let fault = |gfn: u64| Fault::read(Gfn(gfn).address());
        assert_eq!(vcpu.fault(fault(4)), retry(RetryReason::Invalidation));
        drop(first);
        assert_eq!(vcpu.fault(fault(4)), fixed(Level::L1));
        assert_eq!(vcpu.fault(fault(5)), retry(RetryReason::Invalidation));
        let flushed = second.zap().flush();
        second.end(flushed);
        assert_eq!(vcpu.fault(fault(5)), fixed(Level::L1));
        drop(third);
    }

    /// One that is dropped takes away and flushes by itself what it covers, and ends then.
    fn an_invalidation_that_is_dropped_leaves_nothing<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut cpu = rig.processor(rig.vcpu());
        for gfn in [9, 10, 19] {
            assert!(cpu.run(Gfn(gfn).address(), Access::Write).is_ok());
        }
        drop(rig.mmu.invalidate_begin(SPACE, Gfn(10)..Gfn(20)));
        let flushed: Vec<_> = rig.host().take_flushes().iter().map(|it| it.range).collect();
        assert_eq!(flushed, [GfnRange { start: Gfn(10), end: Gfn(20) }]);
        for gfn in [10, 19] {
            let touched = cpu.touch(Gfn(gfn).address(), Access::Read);
            assert_eq!(touched.result, Err(Report::Absent));
        }
        assert!(cpu.touch(Gfn(9).address(), Access::Read).result.is_ok());
    }

    /// In a batch too.
    fn a_batch_sees_an_invalidation<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut vcpu = rig.vcpu();
        let invalidation = rig.mmu.invalidate_begin(SPACE, Gfn(10)..Gfn(20));
        let mut batch = vcpu.batch().expect("there are frames");
        assert_eq!(
            batch.fault(Fault::read(Gpa(10 << 12))),
            retry(RetryReason::Invalidation)
        );
        assert_eq!(batch.fault(Fault::read(Gpa(9 << 12))), fixed(Level::L1));
        drop(batch);
        drop(invalidation);
    }

    /// What the host answers without a page.
    fn the_host_may_have_no_page<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut vcpu = rig.vcpu();
        let gpa = Gpa(0x1008);
        let failed = Outcome::MemoryFault(MemoryFault::NotBacked);
        let blocking = |lookup| Answer::Blocking(BlockingAnswer::Fixed(lookup));
        for (answer, single, batched) in [
            (Answer::Fixed(Lookup::Retry), Outcome::Retry(RetryReason::Backing), None),
            (Answer::Fixed(Lookup::Failed), failed, None),
            (
                blocking(Lookup::Failed),
                failed,
                Some(Outcome::Retry(RetryReason::Backing)),
            ),
            (blocking(Lookup::Retry), Outcome::Retry(RetryReason::Backing), None),
            (blocking(Lookup::Blocking), Outcome::Retry(RetryReason::Backing), None),
        ] {
            rig.host().set_answer(answer);
            assert_eq!(vcpu.fault(Fault::write(gpa)), Ok(single), "{answer:?}");
            let mut batch = vcpu.batch().expect("there are frames");
            let batched = batched.unwrap_or(single);
            assert_eq!(batch.fault(Fault::write(gpa)), Ok(batched), "{answer:?} in a batch");
            drop(batch);
            rig.assert_absent(&mut vcpu, Gfn(1), Report::Absent);
        }
        assert_eq!(rig.mmu.stats().tables, 0);
    }

    /// A look-up that sleeps finds the page in the end; in a batch it may not sleep.
    fn a_look_up_may_sleep<F>() {
        let rig = rig_with::<F>(Level::L2);
        rig.host().set_answer(Answer::Blocking(BlockingAnswer::Page));
        let mut vcpu = rig.vcpu();
        let mut batch = vcpu.batch().expect("there are frames");
        assert_eq!(batch.fault(Fault::write(Gpa(0))), retry(RetryReason::Backing));
        drop(batch);
        assert_eq!(vcpu.fault(Fault::write(Gpa(0))), fixed(Level::L2));
        rig.assert_maps(&mut vcpu, Gfn(1), Pfn(BASE + 1), Level::L2, Perms::RWX);
        // The limits on the level and the flags of the slot count here too.
        let fault = Fault::write(Gfn(512).address()).max_level(Level::L1);
        assert_eq!(vcpu.fault(fault), fixed(Level::L1));
        let slots = rig.mmu.slots();
        slots.set_flags(SPACE, SlotId(1), SlotFlags::READ_ONLY).expect("it is there");
        assert_eq!(
            vcpu.fault(Fault::write(Gpa(0))),
            Ok(Outcome::Mmio { read_only: true })
        );
    }

    /// A whole invalidation passes while a look-up sleeps: what it found is not installed.
    fn an_invalidation_overtakes_a_sleeping_look_up<F>() {
        let rig = rig_with::<F>(Level::L1);
        rig.host().set_answer(Answer::Blocking(BlockingAnswer::Page));
        let mut vcpu = rig.vcpu();
        let mmu = rig.mmu.clone();
        rig.host().script().while_asleep = Some(Box::new(move || {
            let invalidation = mmu.invalidate_begin(SPACE, Gfn(0)..Gfn(1));
            let flushed = invalidation.zap().flush();
            mmu.host().script().moved.insert(BASE, Pfn(5 * BASE));
            invalidation.end(flushed);
        }));
        assert_eq!(vcpu.fault(Fault::read(Gpa(0))), retry(RetryReason::Invalidation));
        rig.assert_absent(&mut vcpu, Gfn(0), Report::Absent);
        assert_eq!(vcpu.fault(Fault::read(Gpa(0))), fixed(Level::L1));
        rig.assert_maps(&mut vcpu, Gfn(0), Pfn(5 * BASE), Level::L1, Perms::RWX);
    }

    /// An invalidation that began while a look-up slept and has not ended.
    fn an_invalidation_catches_a_sleeping_look_up<F>() {
        let rig = rig_with::<F>(Level::L1);
        rig.host().set_answer(Answer::Blocking(BlockingAnswer::Page));
        let mut vcpu = rig.vcpu();
        let (begin, began) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let mmu = rig.mmu.clone();
        let host = std::thread::spawn(move || {
            let invalidation = mmu.invalidate_begin(SPACE, Gfn(0)..Gfn(1));
            begin.send(()).expect("somebody listens");
            hear(&ended);
            drop(invalidation);
        });
        rig.host().script().while_asleep =
            Some(Box::new(move || hear(&began)));
        assert_eq!(vcpu.fault(Fault::read(Gpa(0))), retry(RetryReason::Invalidation));
        end.send(()).expect("somebody listens");
        host.join().expect("nothing goes wrong");
        rig.assert_absent(&mut vcpu, Gfn(0), Report::Absent);
    }

    /// A slot that is replaced, removed or moved while a look-up on it sleeps.
    fn a_slot_changes_under_a_sleeping_look_up<F>() {
        for change in 0..3 {
            let rig = rig_with::<F>(Level::L1);
            rig.host().set_answer(Answer::Blocking(BlockingAnswer::Page));
            let mut vcpu = rig.vcpu();
            let mmu = rig.mmu.clone();
            rig.host().script().while_asleep = Some(Box::new(move || {
                let slots = mmu.slots();
                match change {
                    0 => slots.remove(SPACE, SlotId(1)),
                    1 => slots.set_flags(SPACE, SlotId(1), SlotFlags::READ_ONLY),
                    _ => slots.move_to(SPACE, SlotId(1), Gfn(1 << 20)),
                }
                .expect("the slot is there");
            }));
            assert_eq!(vcpu.fault(Fault::write(Gpa(0))), retry(RetryReason::SlotChanging));
            rig.assert_absent(&mut vcpu, Gfn(0), Report::Absent);
        }
    }

    /// The roots become obsolete while a look-up sleeps.
    fn the_root_goes_under_a_sleeping_look_up<F>() {
        let rig = rig_with::<F>(Level::L1);
        rig.host().set_answer(Answer::Blocking(BlockingAnswer::Page));
        let mut vcpu = rig.vcpu();
        let mmu = rig.mmu.clone();
        rig.host().script().while_asleep =
            Some(Box::new(move || mmu.invalidate_roots().finish()));
        assert_eq!(vcpu.fault(Fault::write(Gpa(0))), retry(RetryReason::RootObsolete));
        vcpu.load_root().expect("a frame for the root");
        rig.assert_absent(&mut vcpu, Gfn(0), Report::Absent);
    }
}
