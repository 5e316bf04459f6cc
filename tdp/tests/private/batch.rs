//! Batches of a confidential guest: one critical section for faults on both halves, which waits for nothing.

use crate::rig::{GUEST, Rig, SPACE, fixed, private, shared};
use tdp::protected::tdx::{Call, Operand, Status};
use tdp::{Fault, FaultError, Gfn, Gpa, Level, MemoryFault, Outcome, RetryReason, Visibility};

fn fault(reason: MemoryFault) -> Result<Outcome, FaultError> {
    Ok(Outcome::MemoryFault(reason))
}

/// What a batch answers is what faults one by one would have been answered, on both halves and on either way through.
#[test]
fn a_batch_tells_the_halves_apart_as_faults_do() {
    let wide = Fault::write(Gpa(1 << 48));
    // The first of each half goes the long way, those that follow by what is remembered.
    let faults = [
        (shared(0), fixed(Level::L1)),
        (private(8), fixed(Level::L1)),
        (shared(1), fixed(Level::L1)),
        (shared(1), Ok(Outcome::Spurious)),
        (private(9), fixed(Level::L1)),
        (private(10), fixed(Level::L1)),
        (private(11), fixed(Level::L1)),
        (private(11), Ok(Outcome::Spurious)),
        (shared(9), fault(MemoryFault::IsPrivate)),
        (private(1), fault(MemoryFault::IsShared)),
        (private(GUEST), fault(MemoryFault::NotBacked)),
        (shared(GUEST), fault(MemoryFault::IsPrivate)),
        (wide, fault(MemoryFault::BeyondWidth)),
        (shared(2), fixed(Level::L1)),
        (private(12), fixed(Level::L1)),
    ];
    for batched in [false, true] {
        let rig = Rig::running(Level::L1);
        rig.mmu
            .convert(SPACE, Gfn(0)..Gfn(4), Visibility::Shared)
            .unwrap();
        let mut vcpu = rig.vcpu();
        if batched {
            let mut batch = vcpu.batch().unwrap();
            for (n, (fault, expected)) in faults.into_iter().enumerate() {
                assert_eq!(batch.fault(fault), expected, "fault {n}");
            }
        } else {
            for (n, (fault, expected)) in faults.into_iter().enumerate() {
                assert_eq!(vcpu.fault(fault), expected, "fault {n}");
            }
        }
        assert_eq!(rig.mmu.stats().pages, [8, 0, 0]);
        rig.check();
    }
}

#[test]
fn a_batch_waits_neither_for_a_window_nor_for_a_split() {
    let rig = Rig::running(Level::L2);
    let mut vcpu = rig.vcpu();
    assert_eq!(vcpu.fault(private(0)), fixed(Level::L2));
    let window = rig.mmu.invalidate_begin(SPACE, Gfn(600)..Gfn(601));
    let mut batch = vcpu.batch().unwrap();
    assert_eq!(
        batch.fault(private(600)),
        Ok(Outcome::Retry(RetryReason::Invalidation))
    );
    let small = private(3).max_level(Level::L1);
    assert_eq!(batch.fault(small), Ok(Outcome::Retry(RetryReason::Frozen)));
    assert_eq!(rig.mmu.stats().pages, [0, 1, 0], "nothing is split");
    // Beside the window the guest gets on, by a leaf that does not reach into it.
    assert_eq!(batch.fault(private(602)), fixed(Level::L1));
    drop(batch);
    drop(window);
    assert_eq!(vcpu.fault(small), Ok(Outcome::Spurious));
    assert_eq!(rig.mmu.stats().pages, [513, 0, 0]);
    rig.check();
}

#[test]
fn what_the_module_refuses_in_a_batch_is_the_embedders() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    // Where tables are to be linked, where the walk ends at an entry, and by what is remembered.
    for first in [0, 8] {
        let before = rig.mmu.stats();
        rig.script.refuse(|call| {
            let refused = matches!(call, Call::MemSeptAdd | Call::MemPageAug);
            refused.then_some((Status::OperandInvalid, Operand::RCX))
        });
        let refused = vcpu.batch().unwrap().fault(private(first));
        assert_eq!(refused, fault(MemoryFault::Refused));
        rig.script.clear();
        let after = rig.mmu.stats();
        assert_eq!((after.pages, after.tables), (before.pages, before.tables));
        let mut batch = vcpu.batch().unwrap();
        for n in first..first + 4 {
            assert_eq!(batch.fault(private(n)), fixed(Level::L1));
        }
    }
    rig.check();
}
