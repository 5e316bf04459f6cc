//! Physical memory above the kernel: frames for tables, frames for guests, and the copy that stands for another machine.
//!
//! Protocol of guest frames. A free frame is full of a pattern of its own. Who takes one checks the pattern first: a word
//! that differs was written through a translation that should have been gone. Frames are reused first in, last out, so that
//! a late write has time to come.
#![allow(unsafe_code)]
// UNSAFETY: physical memory is reached by address, which the boot code maps to itself.

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};
use spin::Mutex;
use tdp::{FrameSource, OutOfFrames, Pfn, TablePage};

/// Words of a frame.
pub const WORDS: usize = 512;

/// Table frames: 16 MiB above the heap.
const TABLES: Range<Pfn> = Pfn(0x2000)..Pfn(0x3000);
/// What guests and the copy are made of starts here; its end is said by the machine's size.
pub const REST: Pfn = Pfn(0x3000);

/// The words of a frame of guest memory. Guests change them at any time, so each access is volatile.
pub fn words(pfn: Pfn) -> impl Iterator<Item = *mut u64> {
    let first = (pfn.0 << 12) as *mut u64;
    (0..WORDS).map(move |word| first.wrapping_add(word))
}

/// One word of physical memory.
pub fn load(address: *const u64) -> u64 {
    // SAFETY: callers name words of frames that belong to guests or to nobody, all of them mapped.
    unsafe { address.read_volatile() }
}

fn store(address: *mut u64, value: u64) {
    // SAFETY: as above.
    unsafe { address.write_volatile(value) }
}

/// Copies a frame.
pub fn copy(from: Pfn, to: Pfn) {
    for (from, to) in words(from).zip(words(to)) {
        store(to, load(from));
    }
}

/// Fills a frame with zeros.
pub fn clear(pfn: Pfn) {
    words(pfn).for_each(|word| store(word, 0));
}

/// Writes `bytes` to the beginning of a frame.
pub fn write(pfn: Pfn, bytes: &[u8]) {
    for (word, bytes) in words(pfn).zip(bytes.chunks(8)) {
        let mut whole = [0; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        store(word, u64::from_le_bytes(whole));
    }
}

/// Whether two frames hold the same.
pub fn equal(a: Pfn, b: Pfn) -> bool {
    words(a).zip(words(b)).all(|(a, b)| load(a) == load(b))
}

/// Frames for tables: a window of memory and a list of those that are free.
pub struct TableFrames(Mutex<Vec<Pfn>>);

impl TableFrames {
    /// All of them free.
    pub fn new() -> Self {
        Self(Mutex::new(
            (TABLES.start.0..TABLES.end.0).rev().map(Pfn).collect(),
        ))
    }

    const LIMIT: usize = (TABLES.end.0 - TABLES.start.0) as usize;

    /// How many are out.
    pub fn allocated(&self) -> usize {
        Self::LIMIT - self.0.lock().len()
    }
}

// SAFETY: a frame is in the list or out of it, never both; the window is memory that nothing else uses, mapped for ever.
unsafe impl FrameSource for TableFrames {
    fn window(&self) -> Range<Pfn> {
        TABLES
    }

    fn allocate(&self, out: &mut [Pfn]) -> Result<usize, OutOfFrames> {
        let mut free = self.0.lock();
        let count = out.len().min(free.len());
        if count == 0 {
            return Err(OutOfFrames { limit: Self::LIMIT });
        }
        let rest = free.len() - count;
        out[..count].copy_from_slice(&free[rest..]);
        free.truncate(rest);
        Ok(count)
    }

    fn free(&self, frames: &[Pfn]) {
        self.0.lock().extend_from_slice(frames);
    }

    fn page(&self, pfn: Pfn) -> NonNull<TablePage> {
        NonNull::new((pfn.0 << 12) as *mut TablePage).expect("no table lies at address 0")
    }
}

/// Frames for a guest's memory.
pub struct GuestFrames {
    free: Mutex<VecDeque<Pfn>>,
    /// Words of free frames that were not as they were left.
    late_writes: AtomicU64,
}

/// What word `word` of a free frame holds.
fn pattern(pfn: Pfn, word: usize) -> u64 {
    0xdead_0000_0000_0000 | pfn.0 << 12 | word as u64
}

fn fill_with_pattern(pfn: Pfn) {
    for (number, word) in words(pfn).enumerate() {
        store(word, pattern(pfn, number));
    }
}

impl GuestFrames {
    /// All of `range`, free.
    pub fn new(range: Range<Pfn>) -> Self {
        let frames: VecDeque<Pfn> = (range.start.0..range.end.0).map(Pfn).collect();
        frames.iter().copied().for_each(fill_with_pattern);
        Self {
            free: Mutex::new(frames),
            late_writes: AtomicU64::new(0),
        }
    }

    /// Takes the frame that has been free for longest. Its content is the pattern.
    ///
    /// # Panics
    ///
    /// If there is none: the guests' memory and what is free have a fixed sum.
    pub fn take(&self) -> Pfn {
        let pfn = self.free.lock().pop_front().expect("a guest frame is free");
        self.check(pfn);
        pfn
    }

    /// Gives a frame back that no guest can reach any more.
    pub fn give_back(&self, pfn: Pfn) {
        fill_with_pattern(pfn);
        self.free.lock().push_back(pfn);
    }

    fn check(&self, pfn: Pfn) {
        let late = words(pfn)
            .enumerate()
            .filter(|&(number, word)| load(word) != pattern(pfn, number))
            .count();
        self.late_writes.fetch_add(late as u64, Ordering::Relaxed);
    }

    /// Words of free frames that somebody wrote, those that are free now included.
    pub fn late_writes(&self) -> u64 {
        let free = self.free.lock();
        free.iter().for_each(|&pfn| self.check(pfn));
        self.late_writes.load(Ordering::Relaxed)
    }
}
