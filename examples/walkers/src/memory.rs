//! Physical memory: tables, their copies, and data in which every word holds its own address.
#![allow(unsafe_code)]
// UNSAFETY: physical memory is reached by address, which the boot code maps to itself.

use alloc::vec::Vec;
use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};
use spin::Mutex;
use tdp::{FrameSource, Hpa, OutOfFrames, Pfn, TablePage};
use tdp_arch::walker::PhysicalMemory;

/// Frames of the tables that the processor walks.
pub const TABLES: Range<Pfn> = Pfn(0x3000)..Pfn(0x3400);
/// Frames from a table to its copy for the reference walker.
const COPY: u64 = 0x400;
/// Frames from a table to its copy to go back to.
const SAVED: u64 = 0x800;
/// Frames that guest memory is backed by, and their number.
pub const DATA: Pfn = Pfn(0x4000);
/// As above.
pub const DATA_FRAMES: u64 = 0x8000;

fn word(hpa: Hpa) -> &'static AtomicU64 {
    // SAFETY: callers name aligned words of the areas above, which nothing else uses and which stay.
    unsafe { AtomicU64::from_ptr(hpa.0 as *mut u64) }
}

/// Whether a word of data lies there.
pub fn is_data(hpa: Hpa) -> bool {
    (DATA.0..DATA.0 + DATA_FRAMES).contains(&hpa.pfn().0)
}

/// Reads a word of data or of a table.
pub fn load(hpa: Hpa) -> u64 {
    word(hpa).load(Ordering::Acquire)
}

/// Writes one.
pub fn store(hpa: Hpa, value: u64) {
    word(hpa).store(value, Ordering::Release);
}

/// Has every word of data hold its address.
pub fn fill_data() {
    for address in (DATA.address().0..Pfn(DATA.0 + DATA_FRAMES).address().0).step_by(8) {
        store(Hpa(address), address);
    }
}

fn moved(hpa: Hpa, frames: u64) -> Hpa {
    Hpa(hpa.0 + (frames << 12))
}

fn table_words() -> impl Iterator<Item = Hpa> {
    (TABLES.start.address().0..TABLES.end.address().0)
        .step_by(8)
        .map(Hpa)
}

/// Copies all tables for the reference walker, and to go back to.
pub fn copy_tables() {
    for hpa in table_words() {
        store(moved(hpa, COPY), load(hpa));
        store(moved(hpa, SAVED), load(hpa));
    }
}

/// Goes back.
pub fn restore_tables() {
    table_words().for_each(|hpa| store(hpa, load(moved(hpa, SAVED))));
}

/// Changes a word of a table, and of the reference walker's copy, by flipping bits.
pub fn spoil(hpa: Hpa, bits: u64) {
    for hpa in [hpa, moved(hpa, COPY)] {
        store(hpa, load(hpa) ^ bits);
    }
}

/// Words of tables that differ from the reference walker's copy.
pub fn differing_tables() -> u64 {
    table_words()
        .filter(|&hpa| load(hpa) != load(moved(hpa, COPY)))
        .count() as u64
}

/// The reference walker's copy, by the addresses of what it is a copy of.
#[derive(Clone, Copy, Debug)]
pub struct Copy;

impl PhysicalMemory for Copy {
    fn load(&self, hpa: Hpa) -> Option<u64> {
        TABLES.contains(&hpa.pfn()).then(|| load(moved(hpa, COPY)))
    }

    fn compare_exchange(&self, hpa: Hpa, current: u64, new: u64) -> Result<(), u64> {
        word(moved(hpa, COPY))
            .compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
    }
}

/// Frames for tables.
pub struct Frames(Mutex<Vec<Pfn>>);

impl Frames {
    const LIMIT: usize = (TABLES.end.0 - TABLES.start.0) as usize;
}

impl Default for Frames {
    /// All of them free, and zero: what was there before is not to be taken for a difference.
    fn default() -> Self {
        table_words().for_each(|hpa| store(hpa, 0));
        Self(Mutex::new(
            (TABLES.start.0..TABLES.end.0).rev().map(Pfn).collect(),
        ))
    }
}

// SAFETY: a frame is in the list or out of it, never both; the window is memory that nothing else uses, mapped for ever.
unsafe impl FrameSource for Frames {
    fn window(&self) -> Range<Pfn> {
        TABLES
    }

    fn allocate(&self, out: &mut [Pfn]) -> Result<usize, OutOfFrames> {
        let mut free = self.0.lock();
        let mut count = 0;
        for place in out.iter_mut() {
            let Some(pfn) = free.pop() else { break };
            *place = pfn;
            count += 1;
        }
        if count == 0 {
            return Err(OutOfFrames { limit: Self::LIMIT });
        }
        Ok(count)
    }

    fn free(&self, frames: &[Pfn]) {
        self.0.lock().extend_from_slice(frames);
    }

    fn page(&self, pfn: Pfn) -> NonNull<TablePage> {
        NonNull::new((pfn.0 << 12) as *mut TablePage).expect("no table lies at address 0")
    }
}
