//! The tracker of vCPUs inside the guest, step by step on one thread.

use tdp::TlbTracker;

/// Begins a wait: its epoch, and which vCPUs are kicked.
fn begin(tracker: &TlbTracker) -> (u64, Vec<usize>) {
    let mut kicked = Vec::new();
    let epoch = tracker.begin(|number| kicked.push(number));
    (epoch, kicked)
}

#[test]
fn those_inside_from_before_are_kicked_and_waited_for() {
    let tracker = TlbTracker::new();
    let [mut one, mut two, mut three] = [(); 3].map(|()| tracker.vcpu());
    let (epoch, kicked) = begin(&tracker);
    assert!(tracker.is_drained(epoch) && kicked.is_empty());
    for vcpu in [&mut one, &mut two, &mut three] {
        let _ = vcpu.enter();
        assert!(!vcpu.kicked());
        vcpu.exit();
        assert!(!vcpu.enter(), "nothing to flush since");
    }
    two.exit();
    let (epoch, kicked) = begin(&tracker);
    assert_eq!(kicked, [0, 2]);
    assert!(one.kicked() && three.kicked());
    assert!(!tracker.is_drained(epoch));
    // One that enters now flushes first, and is neither asked to leave nor waited for.
    assert!(two.enter());
    assert!(!two.kicked());
    one.exit();
    assert!(!tracker.is_drained(epoch), "another is inside still");
    three.exit();
    assert!(tracker.is_drained(epoch));
}

#[test]
fn a_vcpu_that_is_gone_is_not_waited_for_and_the_others_are() {
    let tracker = TlbTracker::new();
    let [mut one, mut two] = [(); 2].map(|()| tracker.vcpu());
    let _ = (one.enter(), two.enter());
    drop(one);
    let (epoch, kicked) = begin(&tracker);
    assert_eq!(kicked.len(), 1);
    assert!(two.kicked() && !tracker.is_drained(epoch));
    two.exit();
    assert!(tracker.is_drained(epoch));
    let _ = two.enter();
    drop(two);
    let (epoch, kicked) = begin(&tracker);
    assert!(tracker.is_drained(epoch) && kicked.is_empty());
}
