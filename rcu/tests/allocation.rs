//! The paths that promise to allocate nothing.

#![cfg(all(feature = "std", not(loom)))]
// UNSAFETY: a global allocator that counts is the only way to see an allocation.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use tdp_rcu::{Domain, DomainConfig};

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

fn allocations(of: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.get();
    of();
    ALLOCATIONS.get() - before
}

#[test]
fn sections_and_their_grace_period_allocate_nothing() {
    let domain = Domain::<u64>::new(DomainConfig::default());
    let mut readers: Vec<_> = (0..300).map(|_| domain.reader()).collect();
    assert!(
        allocations(|| drop(Vec::<u8>::with_capacity(1))) > 0,
        "the count works"
    );
    assert_eq!(allocations(|| readers[0].enter().repin()), 0);
    assert_eq!(allocations(|| domain.synchronize_sections()), 0);
    assert_eq!(
        allocations(|| assert_eq!(domain.drive(), 0)),
        0,
        "with nothing to do"
    );
}
