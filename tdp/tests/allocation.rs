//! What a sweep allocates does not grow with what it finds.

#![cfg(not(loom))]
// UNSAFETY: a global allocator that counts is the only way to see an allocation.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use tdp::{AddressSpaceId, DirtyTracking, Fault, Gfn, Gpa, Level, Mmu, Npt, Outcome, Pfn};
use tdp::{LinearBacking, MmapPool, PoolConfig, Slot, SlotFlags, SoftwareHost};

thread_local!(static ALLOCATIONS: Cell<usize> = const { Cell::new(0) });

struct Counting;

// SAFETY: hands everything to the system's allocator and counts in a thread-local that needs no allocation itself.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's obligations are those of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
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
