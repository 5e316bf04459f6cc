//! The module is busy, refuses, gives up; the hook panics; frames run out.

use crate::rig::{Rig, SPACE, fixed, private};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use tdp::protected::tdx::{Call, Operand, PageInfo, Status};
use tdp::protected::{HandOffCause, HandOffStep};
use tdp::{
    ConvertError, FaultError, Gfn, Host, Level, MemoryFault, OutOfFrames, Outcome, Pfn,
    ProtectedTable, RetryReason, Visibility,
};

/// Answers every `every`-th call of a kind as busy.
fn busy(every: u64) -> impl FnMut(Call) -> Option<(Status, Operand)> + Send {
    let mut count = 0u64;
    move |call| {
        count += 1;
        let operand = match call {
            Call::MemRangeBlock => Operand::SEPT_TREE,
            Call::MemTrack => Operand::TD_EPOCH,
            _ => Operand::RCX,
        };
        count
            .is_multiple_of(every)
            .then_some((Status::OperandBusy, operand))
    }
}

#[test]
fn busy_calls_are_made_again() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    rig.script.refuse(busy(3));
    for n in 0..100 {
        assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
    }
    let removed = rig.mmu.zap_private(SPACE, Gfn(0)..Gfn(512)).unwrap();
    assert_eq!((removed.frames, removed.tables), (100, 1));
    rig.script.clear();
    assert!(rig.mmu.stats().protected.busy.iter().sum::<u64>() > 50);
    rig.check();
}

/// Whatever lock the module was found to be busy with, and in whatever words it says "again".
#[test]
fn every_answer_that_says_again_is_met_by_the_call_again() {
    let answers = [
        (Status::OperandBusy, Operand::RCX),
        (Status::OperandBusy, Operand::R8),
        (Status::OperandBusy, Operand::TDR),
        (Status::OperandBusy, Operand::SEPT_TREE),
        (Status::OperandBusyHostPriority, Operand::RCX),
        (Status::PreviousTlbEpochBusy, Operand::NONE),
        (Status::InterruptedRestartable, Operand::NONE),
        (Status::TlbTrackingNotDone, Operand::RCX),
    ];
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    for (n, answer) in (0..).zip(answers) {
        let mut once = Some(answer);
        rig.script
            .refuse(move |call| once.take_if(|_| call == Call::MemPageAug));
        assert_eq!(vcpu.fault(private(n)), fixed(Level::L1), "{answer:?}");
    }
    rig.script.clear();
    let busy = rig.mmu.stats().protected.busy_of(HandOffStep::Install);
    assert_eq!(busy, answers.len() as u64);
    rig.check();
}

#[test]
fn a_refused_link_and_a_refused_install_change_nothing() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    let twins = rig.table().twins_out();
    for call in [Call::MemSeptAdd, Call::MemPageAug] {
        rig.script
            .refuse(move |now| (now == call).then_some((Status::OperandInvalid, Operand::RCX)));
        assert_eq!(
            vcpu.fault(private(9)),
            Ok(Outcome::MemoryFault(MemoryFault::Refused))
        );
        rig.script.clear();
        rig.check();
    }
    assert_eq!(rig.mmu.stats().pages, [0; 3]);
    assert_eq!(vcpu.fault(private(9)), fixed(Level::L1));
    drop(vcpu);
    // Twins are with the TD or back home, none is lost.
    assert_eq!(rig.table().twins_out(), twins + 3);
    rig.check();
}

#[test]
fn a_fault_without_a_page_for_a_table_changes_nothing() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    let mut taken = vec![Pfn(0); 1 << 13];
    let count = rig.table().allocate_twins(&mut taken).unwrap();
    assert!(count > 1000, "{count}");
    let none = rig.table().allocate_twins(&mut [Pfn(0)]);
    assert_eq!(none, Err(OutOfFrames { limit: count }));
    assert_eq!(vcpu.fault(private(9)), Err(FaultError::OutOfFrames));
    assert_eq!((rig.mmu.stats().tables, rig.mmu.stats().pages), (0, [0; 3]));
    rig.table().free_twins(&taken[..count]);
    assert_eq!(vcpu.fault(private(9)), fixed(Level::L1));
    rig.check();
}

#[test]
fn a_panic_in_an_install_puts_the_entry_back() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    assert_eq!(vcpu.fault(private(0)), fixed(Level::L1));
    for (call, gfn) in [(Call::MemPageAug, 1), (Call::MemSeptAdd, 0x1000)] {
        rig.script.panic_in(call);
        let fault = catch_unwind(AssertUnwindSafe(|| vcpu.fault(private(gfn))));
        assert!(fault.is_err());
        rig.script.clear();
        rig.check();
        assert_eq!(vcpu.fault(private(gfn)), fixed(Level::L1));
    }
    rig.check();
}

#[test]
fn a_panic_in_a_removal_leaves_what_the_next_one_finishes() {
    for call in [
        Call::MemRangeBlock,
        Call::MemTrack,
        Call::MemPageRemove,
        Call::MemSeptRemove,
    ] {
        let rig = Rig::running(Level::L1);
        let mut vcpu = rig.vcpu();
        for n in 0..32 {
            assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
        }
        rig.script.panic_in(call);
        let zap = catch_unwind(AssertUnwindSafe(|| {
            let _ = rig.mmu.zap_private(SPACE, Gfn(0)..Gfn(512));
        }));
        assert!(zap.is_err(), "{call}");
        rig.script.clear();
        rig.check();
        // What was left blocked is taken back by who needs it.
        for n in 0..4 {
            let outcome = vcpu.fault(private(n)).unwrap();
            assert!(
                matches!(outcome, Outcome::Spurious | Outcome::Fixed { .. }),
                "{call}: {outcome:?}"
            );
        }
        rig.check();
        let removed = rig.mmu.zap_private(SPACE, Gfn(0)..Gfn(512)).unwrap();
        assert_eq!(removed.tables, 1, "{call}");
        assert_eq!(rig.mmu.stats().pages, [0; 3]);
        rig.check();
    }
}

#[test]
fn a_refused_block_leaves_its_page_and_takes_the_others() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    for n in 0..8 {
        assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
    }
    let mut blocks = 0;
    rig.script.refuse(move |call| {
        blocks += u64::from(call == Call::MemRangeBlock);
        (call == Call::MemRangeBlock && blocks == 3)
            .then_some((Status::OperandInvalid, Operand::RCX))
    });
    let error = match rig.mmu.zap_private(SPACE, Gfn(0)..Gfn(512)) {
        Err(ConvertError::Removal(error)) => error,
        other => panic!("{other:?}"),
    };
    assert_eq!((error.failed, error.removed.frames), (1, 7));
    assert_eq!(
        (error.first.step, error.first.place.gfn),
        (HandOffStep::Block, Gfn(2))
    );
    assert!(matches!(error.first.cause, HandOffCause::Refused(_)));
    rig.script.clear();
    assert_eq!(vcpu.fault(private(2)), Ok(Outcome::Spurious));
    rig.check();
}

#[test]
fn a_refused_split_is_undone() {
    let rig = Rig::running(Level::L2);
    let mut vcpu = rig.vcpu();
    assert_eq!(vcpu.fault(private(0)), fixed(Level::L2));
    rig.script.refuse(|call| {
        (call == Call::MemPageDemote).then_some((Status::OperandInvalid, Operand::RCX))
    });
    let mut out = Vec::new();
    for _ in 0..3 {
        assert_eq!(
            vcpu.fault(private(0).max_level(Level::L1)),
            Ok(Outcome::MemoryFault(MemoryFault::Refused))
        );
        let frames = rig.mmu.host().frames().allocated();
        out.push((frames, rig.table().twins_out()));
    }
    rig.script.clear();
    // What was to be the table, and its twin, are back each time.
    assert_eq!(out[1..], [out[0], out[0]]);
    assert_eq!(rig.mmu.stats().pages, [0, 1, 0]);
    rig.check();
    // And the block is not left blocked, which it would take a ticket to undo.
    let tracks = rig.module_tracks();
    assert_eq!(vcpu.fault(private(1)), Ok(Outcome::Spurious));
    assert_eq!(rig.module_tracks(), tracks);
}

/// Of a large leaf that cannot be split nothing is taken away, and the rest of the range is.
#[test]
fn a_removal_of_a_part_fails_with_the_split_that_it_needs() {
    let rig = Rig::running(Level::L2);
    let mut vcpu = rig.vcpu();
    for gfn in [0, 512] {
        assert_eq!(vcpu.fault(private(gfn)), fixed(Level::L2));
    }
    rig.script.refuse(|call| {
        (call == Call::MemPageDemote).then_some((Status::OperandInvalid, Operand::RCX))
    });
    let error = match rig.mmu.zap_private(SPACE, Gfn(5)..Gfn(1024)) {
        Err(ConvertError::Removal(error)) => error,
        other => panic!("{other:?}"),
    };
    assert_eq!((error.failed, error.removed.frames), (1, 512));
    assert_eq!(
        (error.first.step, error.first.place.gfn),
        (HandOffStep::Split, Gfn(0))
    );
    let shared = rig.mmu.convert(SPACE, Gfn(5)..Gfn(6), Visibility::Shared);
    assert!(
        matches!(shared, Err(ConvertError::Removal(_))),
        "{shared:?}"
    );
    assert_eq!(rig.mmu.visibility(Gfn(5)), Some(Visibility::Private));
    rig.script.clear();
    assert_eq!(vcpu.fault(private(5)), Ok(Outcome::Spurious));
    assert_eq!(rig.mmu.stats().pages, [0, 1, 0]);
    rig.check();
}

/// Of a block all that counts is that it is there.
#[test]
fn a_page_that_is_blocked_already_is_removed() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    for n in 0..4 {
        assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
    }
    let info = PageInfo::new(Gfn(2).address(), Level::L1);
    assert!(rig.table().td().mem_range_block(info).is_success());
    let removed = rig.mmu.zap_private(SPACE, Gfn(0)..Gfn(4)).unwrap();
    assert_eq!(removed.frames, 4);
    assert_eq!(rig.mmu.stats().pages, [0; 3]);
    assert_eq!(rig.mmu.audit_protected(SPACE).different, 0);
    assert_eq!(vcpu.fault(private(2)), fixed(Level::L1));
}

/// Leaves what is mapped from frame 0 on blocked: the hook panics when the ticket is to begin, or later.
fn leave_blocked(rig: &Rig, call: Call) {
    rig.script.panic_in(call);
    let zap = catch_unwind(AssertUnwindSafe(|| {
        let _ = rig.mmu.zap_private(SPACE, Gfn(0)..Gfn(512));
    }));
    assert!(zap.is_err());
    rig.script.clear();
}

/// Calls of a sweep that stay busy are given up at last. The fault that needs what they were for has waited long enough then:
/// the guest is entered for its interrupts, and what it comes back for is gone on with.
#[test]
fn a_fault_is_sent_back_once_by_a_split_and_a_ticket_that_were_given_up() {
    for call in [Call::MemPageDemote, Call::MemTrack] {
        let rig = Rig::running(Level::L2);
        let mut vcpu = rig.vcpu();
        assert_eq!(vcpu.fault(private(0)), fixed(Level::L2));
        let splits = call == Call::MemPageDemote;
        if !splits {
            leave_blocked(&rig, call);
        }
        // More than a sweep makes.
        let mut left = 1700;
        rig.script.refuse(move |now| {
            if now != call || left == 0 {
                return None;
            }
            left -= 1;
            Some((Status::OperandBusy, Operand::RCX))
        });
        let wanted = if splits { Level::L1 } else { Level::L2 };
        let outcome = vcpu.fault(private(3).max_level(wanted));
        assert_eq!(outcome, Ok(Outcome::Retry(RetryReason::Frozen)), "{call}");
        let outcome = vcpu.fault(private(3).max_level(wanted));
        assert_eq!(outcome, Ok(Outcome::Spurious), "{call}");
        let pages = if splits { [512, 0, 0] } else { [0, 1, 0] };
        assert_eq!(rig.mmu.stats().pages, pages);
        rig.script.clear();
        rig.check();
    }
}

/// Nobody waits in the guest for a prefault: it says where it stopped.
#[test]
fn a_prefault_stops_at_a_ticket_that_was_given_up() {
    let rig = Rig::running(Level::L2);
    let mut vcpu = rig.vcpu();
    assert_eq!(vcpu.fault(private(0)), fixed(Level::L2));
    leave_blocked(&rig, Call::MemTrack);
    rig.script.refuse(|call| {
        (call == Call::MemTrack).then_some((Status::OperandBusy, Operand::TD_EPOCH))
    });
    let done = vcpu.prefault(Gfn(0)..Gfn(8), Visibility::Private).unwrap();
    assert_eq!(done.stopped, Some(Outcome::Retry(RetryReason::Frozen)));
    assert_eq!(done.next, Gfn(0));
    rig.script.clear();
    let done = vcpu.prefault(Gfn(0)..Gfn(8), Visibility::Private).unwrap();
    assert_eq!((done.stopped, done.next), (None, Gfn(8)));
    rig.check();
}

#[test]
fn a_large_leaf_that_was_left_blocked_is_split_for_a_part_of_it() {
    let rig = Rig::running(Level::L2);
    let mut vcpu = rig.vcpu();
    assert_eq!(vcpu.fault(private(0)), fixed(Level::L2));
    leave_blocked(&rig, Call::MemTrack);
    rig.check();
    let removed = rig.mmu.zap_private(SPACE, Gfn(5)..Gfn(6)).unwrap();
    assert_eq!(removed.frames, 1);
    assert_eq!(rig.mmu.stats().pages, [511, 0, 0]);
    rig.check();
}

#[test]
fn a_table_that_was_left_blocked_is_reclaimed_from_a_dead_guest() {
    let mut rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    assert_eq!(vcpu.fault(private(3)), fixed(Level::L1));
    leave_blocked(&rig, Call::MemSeptRemove);
    rig.check();
    drop(rig.td_vcpu.take());
    let td = rig.table().td().clone();
    assert!(td.mng_vpflushdone().is_success());
    assert!(td.phymem_cache_wb().is_success());
    assert!(td.mng_key_freeid().is_success());
    let removed = rig.mmu.reclaim_private().unwrap();
    assert_eq!((removed.frames, removed.tables, removed.leaked), (0, 3, 0));
    assert_eq!(rig.module.violations(), []);
}

#[test]
fn a_fault_waits_for_a_ticket_outside_its_critical_section() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    assert_eq!(vcpu.fault(private(3)), fixed(Level::L1));
    leave_blocked(&rig, Call::MemTrack);
    // A vCPU in the guest that does not leave: no ticket drains.
    let mut tlb = rig.mmu.host().tlb().vcpu();
    let _ = tlb.enter();
    let (settled, before) = (AtomicBool::new(false), rig.module_tracks());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert_eq!(vcpu.fault(private(3)), Ok(Outcome::Spurious));
            settled.store(true, Ordering::Release);
        });
        while rig.module_tracks() == before {
            std::thread::yield_now();
        }
        // Waits for every critical section, and would wait for ever for one that waits for the ticket.
        drop(rig.mmu.invalidate_begin(SPACE, Gfn(9000)..Gfn(9001)));
        assert!(!settled.load(Ordering::Acquire));
        tlb.exit();
    });
    rig.check();
    assert_eq!(rig.mmu.stats().protected.ticket_waits, 0);
}

#[test]
fn who_waits_for_the_ticket_of_another_is_counted() {
    let rig = Rig::running(Level::L1);
    let [mut one, mut two] = [rig.vcpu(), rig.vcpu()];
    for n in [3, 4] {
        assert_eq!(one.fault(private(n)), fixed(Level::L1));
    }
    leave_blocked(&rig, Call::MemTrack);
    // A vCPU in the guest that does not leave: no ticket drains.
    let mut tlb = rig.mmu.host().tlb().vcpu();
    let _ = tlb.enter();
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(one.fault(private(3)), Ok(Outcome::Spurious)));
        scope.spawn(|| assert_eq!(two.fault(private(4)), Ok(Outcome::Spurious)));
        while rig.mmu.stats().protected.ticket_waits == 0 {
            std::thread::yield_now();
        }
        tlb.exit();
    });
    assert_eq!(rig.mmu.stats().protected.ticket_waits, 1);
    rig.check();
}

#[test]
fn a_batch_waits_for_no_ticket() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    assert_eq!(vcpu.fault(private(3)), fixed(Level::L1));
    leave_blocked(&rig, Call::MemTrack);
    let outcome = vcpu.batch().unwrap().fault(private(3));
    assert_eq!(outcome, Ok(Outcome::Retry(RetryReason::Frozen)));
    assert_eq!(vcpu.fault(private(3)), Ok(Outcome::Spurious));
    rig.check();
}

#[test]
fn a_panic_in_the_removal_of_a_slot_leaves_the_slot() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    for n in 0..4 {
        assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
    }
    let [id] = rig
        .mmu
        .slots()
        .list(SPACE)
        .iter()
        .map(|slot| slot.id())
        .collect::<Vec<_>>()[..]
    else {
        panic!("one slot");
    };
    rig.script.panic_in(Call::MemPageRemove);
    let removed = catch_unwind(AssertUnwindSafe(|| rig.mmu.slots().remove(SPACE, id)));
    assert!(removed.is_err());
    rig.script.clear();
    // Its memory is mapped as before, or anew.
    for n in 0..5 {
        let outcome = vcpu.fault(private(n)).unwrap();
        assert!(
            matches!(outcome, Outcome::Spurious | Outcome::Fixed { .. }),
            "{outcome:?}"
        );
    }
    rig.check();
    rig.mmu.slots().remove(SPACE, id).unwrap();
    assert_eq!(rig.mmu.stats().pages, [0; 3]);
    rig.check();
}

/// A table that is taken away gives its frame back, and its twin.
#[test]
fn a_table_that_is_gone_is_given_back() {
    let rig = Rig::running(Level::L1);
    let out = |rounds: usize| {
        let mut vcpu = rig.vcpu();
        for _ in 0..rounds {
            assert_eq!(vcpu.fault(private(0)), fixed(Level::L1));
            let removed = rig.mmu.zap_private(SPACE, Gfn(0)..Gfn(512)).unwrap();
            assert_eq!((removed.frames, removed.tables), (1, 1));
        }
        // What the vCPU keeps for its next faults goes with it.
        drop(vcpu);
        rig.mmu.synchronize();
        let frames = rig.mmu.host().frames().allocated();
        (frames, rig.table().twins_out())
    };
    let once = out(1);
    assert_eq!(out(5), once);
}

/// A panic in the removal of tables loses none of those that were gone before it: frames and twins are back, as when nothing
/// happens.
#[test]
fn tables_that_were_gone_when_a_removal_panicked_are_given_back() {
    let rig = Rig::running(Level::L1);
    let all = Gfn(0)..Gfn(4 * 512);
    let zap = || rig.mmu.zap_private(SPACE, all.clone());
    let touch = || {
        let mut vcpu = rig.vcpu();
        for n in 0..4 {
            assert_eq!(vcpu.fault(private(n * 512)), fixed(Level::L1));
        }
    };
    let out = || {
        rig.mmu.synchronize();
        let frames = rig.mmu.host().frames().allocated();
        (frames, rig.table().twins_out())
    };
    touch();
    assert_eq!(zap().unwrap().tables, 4);
    let before = out();
    for gone in 1..4 {
        touch();
        let mut unlinked = 0;
        rig.script.inside(move |call| {
            if call == Call::MemSeptRemove {
                unlinked += 1;
                assert!(unlinked != gone + 1, "the hook panics");
            }
        });
        assert!(catch_unwind(AssertUnwindSafe(zap)).is_err());
        rig.script.clear();
        rig.check();
        // What was left blocked is taken back by who needs it.
        touch();
        let removed = zap().unwrap();
        assert_eq!((removed.frames, removed.tables), (4, 4));
        assert_eq!(out(), before, "{gone} were gone");
        rig.check();
    }
}

/// What every other test goes by: the comparison of the two tables counts all that there is, and notices what is done behind the
/// library's back.
#[test]
fn a_block_that_nobody_asked_for_is_noticed() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    for n in [0, 1, 2, 3, 512] {
        assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
    }
    let audit = rig.mmu.audit_protected(SPACE);
    // The tables of the three lower levels; the private half of the root's entries, and all entries of the tables.
    assert_eq!((audit.leaves, audit.tables, audit.different), (5, 4, 0));
    assert!(audit.compared > 4 * 512);
    for (gfn, level) in [(2, Level::L1), (512, Level::L2)] {
        let info = PageInfo::new(Gfn(gfn).address(), level);
        assert!(rig.table().td().mem_range_block(info).is_success());
    }
    let audit = rig.mmu.audit_protected(SPACE);
    let (first, _) = audit.first.unwrap();
    assert_eq!((first.gfn, first.level), (Gfn(2), Level::L1));
    assert_eq!(audit.different, 2, "the leaf and the table");
}
