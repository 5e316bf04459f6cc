//! Table frames from anonymous memory: a fixed window reserved by `mmap`, handed out in address order, reused last in
//! first out.
//!
//! Protocol. The window is mapped once and stays mapped until the pool is dropped, so that a pointer into it is always
//! valid memory, even when a reader is late. A frame is either in the pool or out of it; the mutex around the free list
//! is taken once per batch, by a vCPU that tops up its cache and by whoever frees after a grace period.
#![allow(unsafe_code)]
// UNSAFETY: system calls, and a pointer into the mapping.

use crate::entry::TablePage;
use crate::host::{FrameSource, OutOfFrames};
use core::ops::Range;
use core::ptr::NonNull;
use std::vec::Vec;
use tdp_arch::{PAGE_SIZE, Pfn};
use tdp_rcu::sync::{CachePadded, Mutex};

/// How to make a [`MmapPool`].
#[derive(Clone, Copy, Debug)]
pub struct PoolConfig {
    /// Frames that may be out of the pool at one time: the hard limit.
    pub frames: usize,
    /// Host frame number of the first one. Any number will do where no processor walks the tables.
    pub base: Pfn,
    /// Ask the kernel to back the window by huge pages.
    pub huge_pages: bool,
}

/// A pool could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// No frames, or more than an address space holds.
    #[error("a frame pool of {0} frames cannot be made")]
    Size(usize),
    /// The system refused the memory.
    #[error("mapping a frame pool of {frames} frames failed: error {errno}")]
    Map {
        /// Frames asked for.
        frames: usize,
        /// The system's error number.
        errno: i32,
    },
}

/// Table frames from anonymous memory, zeroed at first use.
#[derive(Debug)]
pub struct MmapPool {
    start: NonNull<u8>,
    /// Address of a frame less its physical address, so that looking one up is one addition.
    displacement: usize,
    base: Pfn,
    limit: usize,
    free: CachePadded<Mutex<FreeList>>,
}

#[derive(Debug, Default)]
struct FreeList {
    /// Frames given back, the latest last.
    recycled: Vec<Pfn>,
    /// Frames of the window never handed out start here.
    fresh: usize,
    peak: usize,
}

// SAFETY: the pool owns its mapping for as long as it lives; what is in it is reached through atomics only, and the
// free list through its mutex.
unsafe impl Send for MmapPool {}
// SAFETY: as above.
unsafe impl Sync for MmapPool {}

impl MmapPool {
    /// Reserves the window. Memory is taken from the system when a frame is first used.
    ///
    /// # Errors
    ///
    /// [`PoolError`] if the size makes no sense or the system refuses.
    pub fn new(config: PoolConfig) -> Result<Self, PoolError> {
        let size_error = PoolError::Size(config.frames);
        let page = PAGE_SIZE as usize;
        let bytes = config
            .frames
            .checked_mul(page)
            .filter(|&b| b > 0 && b <= isize::MAX as usize)
            .ok_or(size_error)?;
        let end = config
            .base
            .checked_add(config.frames as u64)
            .ok_or(size_error)?;
        if end.0 > 1 << 40 {
            return Err(size_error);
        }
        // SAFETY: a fresh anonymous mapping at an address of the system's choice touches no memory of ours.
        let start = unsafe {
            libc::mmap(
                core::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let Some(start) = NonNull::new(start.cast::<u8>()).filter(|_| start != libc::MAP_FAILED)
        else {
            let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
            return Err(PoolError::Map {
                frames: config.frames,
                errno,
            });
        };
        if config.huge_pages {
            // SAFETY: advice about the mapping just made. A refusal costs speed only.
            let _ = unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        let displacement = start
            .as_ptr()
            .expose_provenance()
            .wrapping_sub((config.base.0 * PAGE_SIZE) as usize);
        Ok(Self {
            start,
            displacement,
            base: config.base,
            limit: config.frames,
            free: CachePadded::new(Mutex::new(FreeList::default())),
        })
    }

    /// Frames out of the pool now.
    pub fn allocated(&self) -> usize {
        let free = self.free.lock();
        free.fresh - free.recycled.len()
    }

    /// Most frames that were out of the pool at one time.
    pub fn peak(&self) -> usize {
        self.free.lock().peak
    }

    /// Frames that may be out of the pool at one time.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Has the system supply the whole window now, so that no later use of a frame waits for it. A refusal costs speed
    /// only.
    pub fn populate(&self) {
        // SAFETY: supplies pages of our own mapping and changes no content.
        let _ = unsafe {
            libc::madvise(
                self.start.as_ptr().cast(),
                self.limit * PAGE_SIZE as usize,
                libc::MADV_POPULATE_WRITE,
            )
        };
    }
}

impl Drop for MmapPool {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no pointer into it outlives the pool (FrameSource's contract).
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.limit * PAGE_SIZE as usize) };
    }
}

// SAFETY: frames are in the free list or out of it, never both; the mapping stays until drop, is aligned to 4 KiB, and
// any 4 KiB of it is a valid TablePage because every bit pattern is.
unsafe impl FrameSource for MmapPool {
    fn window(&self) -> Range<Pfn> {
        self.base..Pfn(self.base.0 + self.limit as u64)
    }

    fn allocate(&self, out: &mut [Pfn]) -> Result<usize, OutOfFrames> {
        let mut free = self.free.lock();
        let mut count = 0;
        for slot in out.iter_mut() {
            *slot = match free.recycled.pop() {
                Some(pfn) => pfn,
                None if free.fresh < self.limit => {
                    free.fresh += 1;
                    Pfn(self.base.0 + free.fresh as u64 - 1)
                }
                None => break,
            };
            count += 1;
        }
        free.peak = free.peak.max(free.fresh - free.recycled.len());
        if count == 0 {
            Err(OutOfFrames { limit: self.limit })
        } else {
            Ok(count)
        }
    }

    fn free(&self, frames: &[Pfn]) {
        self.free.lock().recycled.extend_from_slice(frames);
    }

    #[inline(always)]
    fn page(&self, pfn: Pfn) -> NonNull<TablePage> {
        debug_assert!(self.window().contains(&pfn), "a frame of the window");
        let address = self.displacement.wrapping_add((pfn.0 << 12) as usize);
        let pointer = core::ptr::with_exposed_provenance_mut::<TablePage>(address);
        // SAFETY: frames of the window lie in a mapping, which is not at address zero.
        unsafe { NonNull::new_unchecked(pointer) }
    }
}
