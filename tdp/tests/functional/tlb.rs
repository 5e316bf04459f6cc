//! The tracker of vCPUs inside the guest, step by step on one thread.

use std::sync::atomic::{AtomicBool, Ordering};
use tdp::{
    AddressSpaceId, Ept, Fault, Gfn, Level, LinearBacking, MmapPool, Mmu, Outcome, Pfn, PoolConfig,
    Slot, SoftwareHost, TlbTracker,
};

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

/// A page that was zapped may be cached by whoever was in the guest before, and by whoever was in it and will be again. The flush
/// waits for the one, and has the other flush first.
#[test]
fn a_flush_of_the_software_host_reaches_every_vcpu() {
    let frames = MmapPool::new(PoolConfig {
        frames: 64,
        base: Pfn(0x1000),
        huge_pages: false,
    })
    .expect("a pool of this size");
    let mmu = Mmu::<Ept, _>::builder(SoftwareHost::new(frames))
        .build()
        .expect("a possible set-up");
    let backing = LinearBacking::new(Pfn(0x8_0000), Level::L1);
    mmu.slots()
        .insert(Slot::new(Gfn(0)..Gfn(512), backing))
        .expect("the first slot");
    let mut vcpu = mmu.vcpu().expect("a frame for the root");
    let [mut inside, mut outside] = [(); 2].map(|()| mmu.host().tlb().vcpu());
    let mut map = || {
        let outcome = vcpu.fault(Fault::write(Gfn(3).address()));
        assert_eq!(outcome, Ok(Outcome::Fixed { level: Level::L1 }));
    };
    let zap = || mmu.zap(AddressSpaceId(0), Gfn(3)..Gfn(4)).flush();
    let _ = outside.enter();
    outside.exit();
    assert!(!outside.enter(), "nothing to flush since");
    outside.exit();
    map();
    let _ = zap();
    assert!(outside.enter(), "what it cached is gone from the tables");
    outside.exit();
    map();
    let _ = inside.enter();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = zap();
            is_over.store(true, Ordering::Release);
        });
        while !inside.kicked() {
            assert!(!is_over.load(Ordering::Acquire), "it is inside still");
            std::thread::yield_now();
        }
        assert!(!is_over.load(Ordering::Acquire), "it is inside still");
        inside.exit();
    });
    assert!(inside.enter());
}
