//! The heap: a fixed part of physical memory.
#![allow(unsafe_code)]
// UNSAFETY: memory is given to the allocator by address.

use linked_list_allocator::LockedHeap;

/// Where it begins: above every image of these kernels.
const START: u64 = 16 << 20;
/// Its bytes. What lies above, from 32 MiB on, is the kernel's.
const SIZE: usize = 16 << 20;

#[global_allocator]
static HEAP: LockedHeap = LockedHeap::empty();

pub(crate) fn begin() {
    assert!(
        crate::image_end() <= START,
        "the image reaches into the heap"
    );
    // SAFETY: nothing else uses this memory: the image ends below it, and it is given once.
    unsafe { HEAP.lock().init(START as *mut u8, SIZE) };
}
