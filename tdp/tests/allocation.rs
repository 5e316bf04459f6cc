//! What a sweep allocates does not grow with what it finds, and what an MMU allocates is given back.

#![cfg(not(loom))]
// UNSAFETY: a global allocator that counts is the only way to see an allocation.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use tdp::{AddressSpaceId, DirtyTracking, Fault, Gfn, Gpa, Level, Mmu, Npt, Outcome, Pfn};
use tdp::{LinearBacking, MmapPool, PoolConfig, Slot, SlotFlags, SoftwareHost, Visibility};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
    /// Bytes that this thread has allocated more than it has given back.
    static BYTES: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: hands everything to the system's allocator and counts in a thread-local that needs no allocation itself.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        BYTES.set(BYTES.get() + layout.size() as isize);
        // SAFETY: the caller's obligations are those of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        BYTES.set(BYTES.get() - layout.size() as isize);
        // SAFETY: the caller's obligations are those of `System`, which `at` came from.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Allocations of a zap that takes `pages` written pages of a slot away whose log is kept by dirty bits.
fn allocations_of_zap(pages: u64) -> usize {
    let frames = MmapPool::new(PoolConfig {
        frames: 64,
        base: Pfn(0x1000),
        huge_pages: false,
    });
    let mmu = Mmu::<Npt, _>::builder(SoftwareHost::new(frames.unwrap()))
        .dirty_tracking(DirtyTracking::DirtyBit)
        .build()
        .unwrap();
    let slot = Slot::new(
        Gfn(0)..Gfn(8192),
        LinearBacking::new(Pfn(1 << 20), Level::L1),
    );
    mmu.slots()
        .insert(slot.with_flags(SlotFlags::LOG_DIRTY))
        .unwrap();
    let mut vcpu = mmu.vcpu().unwrap();
    for gfn in 0..pages {
        let outcome = vcpu.fault(Fault::write(Gpa(gfn << 12))).unwrap();
        assert_eq!(outcome, Outcome::Fixed { level: Level::L1 });
    }
    let before = ALLOCATIONS.get();
    let pending = mmu.zap_leaves(AddressSpaceId(0), Gfn(0)..Gfn(8192));
    let allocations = ALLOCATIONS.get() - before;
    assert_eq!(pending.leaves(), pages);
    pending.flush();
    allocations
}

#[test]
fn a_zap_of_written_pages_allocates_as_much_for_many_as_for_few() {
    let few = allocations_of_zap(512);
    assert!(
        few > 0,
        "the count works: a sweep is a visit, which allocates"
    );
    assert_eq!(allocations_of_zap(8192), few);
}

/// The life of an MMU with something of all that allocates.
fn live_and_die() {
    const SPACE: AddressSpaceId = AddressSpaceId(0);
    let frames = MmapPool::new(PoolConfig {
        frames: 64,
        base: Pfn(0x1000),
        huge_pages: false,
    });
    let mmu = Mmu::<Npt, _>::builder(SoftwareHost::new(frames.unwrap()))
        .shared_bit(47)
        .dirty_ring(1024)
        .build()
        .unwrap();
    let slot = |start: u64| {
        let backing = LinearBacking::new(Pfn(1 << 20), Level::L2);
        Slot::new(Gfn(start)..Gfn(start + 4096), backing)
    };
    let id = mmu.slots().insert(slot(0)).unwrap();
    mmu.slots().insert(slot(4096)).unwrap();
    // Attributes of one frame and of many, near and far.
    for range in [Gfn(7)..Gfn(8), Gfn(1 << 20)..Gfn(1 << 30)] {
        mmu.convert(SPACE, range, Visibility::Private).unwrap();
    }
    let mut vcpu = mmu.vcpu().unwrap();
    for gfn in [0, 600, 5000] {
        let fault = Fault::write(Gpa(gfn << 12 | 1 << 47));
        assert!(matches!(vcpu.fault(fault), Ok(Outcome::Fixed { .. })));
    }
    mmu.slots()
        .set_flags(SPACE, id, SlotFlags::LOG_DIRTY)
        .unwrap();
    mmu.zap(SPACE, Gfn(0)..Gfn(512)).flush();
    mmu.slots().remove(SPACE, id).unwrap();
    drop(mmu.invalidate_begin(SPACE, Gfn(0)..Gfn(512)));
    // One that never ends is no reason to keep anything either.
    std::mem::forget(mmu.invalidate_begin(SPACE, Gfn(0)..Gfn(512)));
}

#[test]
fn what_an_mmu_allocates_is_given_back() {
    // What a thread or the process makes once, for all that come after.
    live_and_die();
    let before = BYTES.get();
    live_and_die();
    assert_eq!(BYTES.get() - before, 0, "bytes are left");
}
