//! Guests that mean harm: what they can make the MMU and the module spend, and that it ends there.

use crate::rig::{GUEST, Rig, SPACE, fixed, private, shared};
use std::sync::mpsc::channel;
use std::time::Duration;
use tdp::protected::tdx::Call;
use tdp::{Gfn, Host, Level, MemoryFault, Outcome, RetryReason, Visibility};

/// One vCPU's fault is with the module, and the module takes its time. A vCPU that hammers the frozen entry is sent back
/// three times at most, without a call of the module; a vCPU that faults on every other page of the same table is served.
#[test]
fn a_frozen_entry_that_is_hammered_holds_up_its_own_page_only() {
    let rig = Rig::running(Level::L1);
    let mut warm = rig.vcpu();
    assert_eq!(warm.fault(private(0)), fixed(Level::L1));
    let (is_inside, inside) = channel();
    let (go_on, goes_on) = channel::<()>();
    let mut armed = true;
    rig.script.inside(move |call| {
        if call == Call::MemPageAug && std::mem::take(&mut armed) {
            is_inside.send(()).expect("somebody listens");
            goes_on
                .recv_timeout(Duration::from_secs(30))
                .expect("it is let go");
        }
    });
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(rig.vcpu().fault(private(7)), fixed(Level::L1)));
        inside
            .recv_timeout(Duration::from_secs(30))
            .expect("it gets there");
        let mut hammering = rig.vcpu();
        let calls = || rig.mmu.stats().protected.calls.iter().sum::<u64>();
        let before = calls();
        for _ in 0..3 {
            let outcome = hammering.fault(private(7));
            assert_eq!(outcome, Ok(Outcome::Retry(RetryReason::Frozen)));
        }
        assert_eq!(calls(), before, "the module hears nothing of it");
        // The fourth waits here, so that the guest does not spin through the module.
        let waits = scope.spawn(move || hammering.fault(private(7)));
        let mut other = rig.vcpu();
        for gfn in (1..512).filter(|gfn| *gfn != 7) {
            assert_eq!(other.fault(private(gfn)), fixed(Level::L1));
        }
        assert!(!waits.is_finished());
        go_on.send(()).expect("it waits for that");
        let settled = waits.join().expect("nothing goes wrong");
        assert_eq!(settled, Ok(Outcome::Spurious));
    });
    assert_eq!(rig.mmu.stats().protected.sent_back, 3);
    rig.check();
}

/// A guest has pages converted to and fro for as long as it likes, and touches each in between: tables, twins and garbage stay
/// what the first turns needed.
#[test]
fn conversions_in_a_loop_cost_no_more_than_the_first() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    let frames = || rig.mmu.host().frames().allocated();
    let mut most = (0, 0);
    for turn in 0..300_u64 {
        let gfn = turn * 37 % 2048;
        let range = Gfn(gfn)..Gfn(gfn + 1 + turn % 3);
        for (to, fault) in [
            (Visibility::Shared, shared(gfn)),
            (Visibility::Private, private(gfn)),
        ] {
            rig.mmu.convert(SPACE, range.clone(), to).unwrap();
            assert_eq!(vcpu.fault(fault), fixed(Level::L1));
        }
        let now = (frames(), rig.table().twins_out());
        if turn < 60 {
            most = (most.0.max(now.0), most.1.max(now.1));
        } else {
            // What a vCPU holds ready comes and goes by one batch.
            assert!(
                now.0 <= most.0 + 32 && now.1 <= most.1 + 32,
                "{now:?}, {most:?} before"
            );
        }
    }
    rig.check();
}

/// A guest that takes every page for what it is not costs the module nothing and the tables nothing.
#[test]
fn a_guest_that_mistakes_every_page_costs_nothing() {
    let rig = Rig::running(Level::L2);
    let mut vcpu = rig.vcpu();
    let before = rig.mmu.stats();
    for gfn in 0..GUEST {
        let outcome = vcpu.fault(shared(gfn));
        assert_eq!(outcome, Ok(Outcome::MemoryFault(MemoryFault::IsPrivate)));
    }
    let after = rig.mmu.stats();
    assert_eq!((after.tables, after.pages), (before.tables, before.pages));
    assert_eq!(after.protected.calls, before.protected.calls);
    assert_eq!(after.memory_faults - before.memory_faults, GUEST);
}
