//! The private half, whose every change is a call that can be lost, refused or slow.

use crate::SPACE;
use crate::private_rig::{GUEST, PRIVATE_PFN, Rig, SHARED, fixed, private, shared};
use std::sync::Barrier;
use std::sync::mpsc::channel;
use std::time::Duration;
use tdp::protected::HandOffStep;
use tdp::protected::tdx::{Call, Operand, Status};
use tdp::{
    ConvertError, Fault, Gfn, Gpa, Level, MemoryFault, Outcome, RetryReason, SlotError, Visibility,
};

/// No leaf of either half has frames of both kinds below it.
fn no_leaf_spans(rig: &Rig, at: &str) {
    let check = |half: Visibility, leaf: tdp::Leaf| {
        let block = leaf.level.range(leaf.gfn);
        let private = rig.mmu.private_frames(block);
        let expected = if half == Visibility::Private {
            block.pages()
        } else {
            0
        };
        assert_eq!(private, expected, "{at}: {half:?} {leaf:?}");
    };
    let all = Gfn(0)..Gfn(GUEST);
    rig.mmu
        .visit_leaves(SPACE, all.clone(), |leaf| check(Visibility::Shared, leaf));
    rig.mmu
        .visit_private_leaves(SPACE, all, |leaf| check(Visibility::Private, leaf));
}

/// Whatever is converted, and from wherever faults come, between two conversions too: a leaf of either half maps frames of
/// its own kind only.
#[test]
fn case_20_no_leaf_ever_spans_two_kinds() {
    let rig = Rig::running(Level::L2);
    let mut vcpu = rig.vcpu();
    let touch_all = |vcpu: &mut crate::private_rig::Vcpu| {
        for gfn in [0, 3, 511, 512, 700, 1023, 1024, 1500, 2047] {
            for fault in [private(gfn), shared(gfn)] {
                let outcome = vcpu.fault(fault).unwrap();
                let other_half = matches!(
                    outcome,
                    Outcome::MemoryFault(MemoryFault::IsShared | MemoryFault::IsPrivate)
                );
                let mapped = matches!(outcome, Outcome::Fixed { .. } | Outcome::Spurious);
                assert!(mapped || other_half, "{outcome:?}");
            }
        }
    };
    touch_all(&mut vcpu);
    let conversions = [
        (700..701, Visibility::Shared),
        (512..1024, Visibility::Shared),
        (1023..1025, Visibility::Private),
        (3..2000, Visibility::Shared),
        (511..513, Visibility::Private),
        (0..2048, Visibility::Private),
    ];
    for (frames, to) in conversions {
        let range = Gfn(frames.start)..Gfn(frames.end);
        rig.mmu.convert(SPACE, range, to).unwrap();
        let at = format!("{frames:?} to {to:?}");
        no_leaf_spans(&rig, &at);
        touch_all(&mut vcpu);
        no_leaf_spans(&rig, &at);
        rig.check();
    }
}

/// A private fault on a slot that is being removed is sent back a few times and then waits where it holds nothing up: the
/// removal ends, and so does the wait.
#[test]
fn case_23_a_private_fault_does_not_hold_up_the_slot_it_waits_for() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    for n in 0..4 {
        assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
    }
    let id = rig.mmu.slots().list(SPACE)[0].id();
    let (removing, removes) = channel();
    let (go_on, goes_on) = channel::<()>();
    let mut goes_on = Some(goes_on);
    rig.script.inside(move |call| {
        if let (Call::MemPageRemove, Some(goes_on)) =
            (call, goes_on.take_if(|_| call == Call::MemPageRemove))
        {
            removing.send(()).unwrap();
            goes_on.recv_timeout(Duration::from_secs(30)).unwrap();
        }
    });
    let mmu = rig.mmu.clone();
    let removal = std::thread::spawn(move || mmu.slots().remove(SPACE, id));
    removes.recv_timeout(Duration::from_secs(30)).unwrap();
    for _ in 0..3 {
        let outcome = vcpu.fault(private(9));
        assert_eq!(outcome, Ok(Outcome::Retry(RetryReason::SlotChanging)));
    }
    let (said, heard) = channel();
    std::thread::spawn(move || {
        let outcome = vcpu.fault(private(9));
        said.send(outcome).unwrap();
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(heard.try_recv().is_err(), "it waits");
    go_on.send(()).unwrap();
    removal.join().unwrap().unwrap();
    let outcome = heard.recv_timeout(Duration::from_secs(30)).unwrap();
    assert_eq!(outcome, Ok(Outcome::MemoryFault(MemoryFault::NotBacked)));
    rig.check();
}

/// A frame number with the bit that makes an address shared names no frame: it is refused wherever ranges are named, and not
/// taken for the frame without the bit, in either half.
#[test]
fn case_25_the_shared_bit_is_no_part_of_a_frame() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    let bit = SHARED >> 12;
    let beyond = Some(Outcome::MemoryFault(MemoryFault::BeyondWidth));
    for to in [Visibility::Private, Visibility::Shared] {
        rig.mmu.convert(SPACE, Gfn(0)..Gfn(512), to).unwrap();
        for visibility in [Visibility::Private, Visibility::Shared] {
            let done = vcpu.prefault(Gfn(bit)..Gfn(bit + 4), visibility).unwrap();
            assert_eq!((done.frames, done.stopped), (0, beyond), "{visibility:?}");
        }
        let refused = rig.mmu.convert(SPACE, Gfn(bit)..Gfn(bit + 4), to);
        assert!(
            matches!(refused, Err(ConvertError::Range { .. })),
            "{refused:?}"
        );
    }
    assert_eq!(rig.mmu.stats().pages, [0; 3]);
    // In an address it is the guest's way to say which half it means.
    let fault = Fault::write(Gpa(SHARED | 0x3000));
    assert_eq!(vcpu.fault(fault), fixed(Level::L1));
    assert_eq!(
        rig.mmu.translate(SPACE, Gfn(3)).map(|leaf| leaf.gfn),
        Some(Gfn(3))
    );
    rig.check();
}

/// vCPUs race for the same private frames and the same missing tables: whoever loses an exchange goes on with what it found,
/// and the module is called once for each frame and each table, by the winner.
#[test]
fn case_31_who_loses_an_exchange_goes_on_with_what_it_found() {
    let rig = Rig::running(Level::L1);
    let frames = 6 * 512 + 40;
    let barrier = Barrier::new(2);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let (rig, barrier) = (&rig, &barrier);
            scope.spawn(move || {
                let mut vcpu = rig.vcpu();
                barrier.wait();
                for gfn in (0..frames).step_by(3) {
                    loop {
                        match vcpu.fault(private(gfn)).unwrap() {
                            Outcome::Fixed { level: Level::L1 } | Outcome::Spurious => break,
                            Outcome::Retry(_) => {}
                            other => panic!("{other:?}"),
                        }
                    }
                }
            });
        }
    });
    let protected = rig.mmu.stats().protected;
    let busy = |step| protected.busy_of(step);
    let made = |step| protected.calls_of(step) - busy(step);
    assert_eq!(made(HandOffStep::Install), frames.div_ceil(3));
    assert_eq!(made(HandOffStep::Link), 2 + 7);
    assert_eq!(rig.mmu.stats().pages, [frames.div_ceil(3), 0, 0]);
    rig.check();
}

/// The module does not give a page back: the page is not reported as removed, neither is the slot, so that nobody frees what
/// the guest has still; once the module gives it back it is.
#[test]
fn case_32_a_page_that_the_module_keeps_is_not_given_back() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    for n in 0..4 {
        assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
    }
    let id = rig.mmu.slots().list(SPACE)[0].id();
    let mut blocks = 0;
    rig.script.refuse(move |call| {
        blocks += u64::from(call == Call::MemRangeBlock);
        (call == Call::MemRangeBlock && blocks == 2)
            .then_some((Status::OperandInvalid, Operand::RCX))
    });
    let error = match rig.mmu.slots().remove(SPACE, id) {
        Err(SlotError::Private(error)) => error,
        other => panic!("{other:?}"),
    };
    rig.script.clear();
    assert_eq!(
        (error.failed, error.removed.frames, error.removed.leaked),
        (1, 3, 0)
    );
    let kept = error.first.place.gfn;
    assert!(
        rig.mmu.slots().by_id(SPACE, id).is_some(),
        "it has a page of the guest's"
    );
    let of_guest = |gfn: Gfn| {
        let page = tdp::Pfn(PRIVATE_PFN.0 + gfn.0).address();
        rig.module
            .page_kind(page)
            .map(|(kind, _)| format!("{kind:?}"))
    };
    let others: Vec<_> = (0..4)
        .map(Gfn)
        .filter(|gfn| *gfn != kept)
        .map(of_guest)
        .collect();
    assert!(
        others.iter().all(|kind| *kind != of_guest(kept)),
        "{others:?}"
    );
    rig.check();
    assert_eq!(vcpu.fault(private(kept.0)), Ok(Outcome::Spurious));
    rig.mmu.slots().remove(SPACE, id).unwrap();
    assert_eq!(of_guest(kept), others[0]);
    rig.check();
}

/// A call that fails, at any step and for good or for a while, leaves no entry frozen and no page or table counted; the next
/// fault gets through.
#[test]
fn case_36_a_failed_call_leaves_nothing_behind() {
    let failures = [
        (Call::MemSeptAdd, Status::OperandInvalid),
        (Call::MemPageAug, Status::OperandInvalid),
        (Call::MemSeptAdd, Status::OperandBusy),
        (Call::MemPageAug, Status::OperandBusy),
    ];
    for (call, status) in failures {
        let rig = Rig::running(Level::L1);
        let mut vcpu = rig.vcpu();
        rig.script
            .refuse(move |now| (now == call).then_some((status, Operand::RCX)));
        let outcome = vcpu.fault(private(9)).unwrap();
        let expected = if status == Status::OperandBusy {
            Outcome::Retry(RetryReason::Frozen)
        } else {
            Outcome::MemoryFault(MemoryFault::Refused)
        };
        assert_eq!(outcome, expected, "{call:?}");
        assert_eq!(rig.mmu.audit().frozen, 0, "{call:?} {status:?}");
        assert_eq!(rig.mmu.stats().pages, [0; 3]);
        rig.check();
        rig.script.clear();
        assert_eq!(
            vcpu.fault(private(9)),
            fixed(Level::L1),
            "{call:?} {status:?}"
        );
        assert_eq!(
            (rig.mmu.stats().pages, rig.mmu.stats().tables),
            ([1, 0, 0], 3)
        );
        rig.check();
    }
}

/// A removal waits for its ticket, with the entries of its pages frozen or blocked: faults on other entries, of the same
/// table too, go on.
#[test]
fn case_26_a_removal_that_waits_holds_up_its_own_entries_only() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    for n in 0..4 {
        assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
    }
    // A vCPU in the guest that does not leave: no ticket drains.
    let mut tlb = rig.mmu.host().tlb().vcpu();
    let _ = tlb.enter();
    let before = rig.module_tracks();
    std::thread::scope(|scope| {
        let removal = scope.spawn(|| rig.mmu.zap_private(SPACE, Gfn(0)..Gfn(2)));
        while rig.module_tracks() == before {
            std::thread::yield_now();
        }
        for n in [2, 9, 511, 512, 5000] {
            let outcome = vcpu.fault(private(n)).unwrap();
            assert!(
                matches!(outcome, Outcome::Fixed { .. } | Outcome::Spurious),
                "{n}: {outcome:?}"
            );
        }
        assert!(!removal.is_finished());
        tlb.exit();
        assert_eq!(removal.join().unwrap().unwrap().frames, 2);
    });
    rig.check();
}
