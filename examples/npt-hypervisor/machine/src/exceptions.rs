//! The interrupt table: exceptions end the machine with a message, a kick is acknowledged and that is all.
#![allow(unsafe_code)]
// UNSAFETY: the processor is told where its table is, and the table where the stubs are.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};
use x86_64::VirtAddr;
use x86_64::instructions::tables::lidt;
use x86_64::structures::DescriptorTablePointer;

/// Vector of the interrupt by which one processor asks for another's attention.
pub const KICK_VECTOR: u8 = 0x41;
const SPURIOUS_VECTOR: u8 = 0xff;

unsafe extern "C" {
    static exception_stubs: u8;
    static kick_stub: u8;
    static spurious_stub: u8;
}

#[repr(C, align(4096))]
struct Table(UnsafeCell<[[u64; 2]; 256]>);

// SAFETY: written by the first processor before any other runs, read by processors only after that.
unsafe impl Sync for Table {}

static TABLE: Table = Table(UnsafeCell::new([[0; 2]; 256]));
static FILLED: AtomicBool = AtomicBool::new(false);

/// An interrupt gate: present, interrupts off, the 64-bit code segment.
fn gate(handler: u64) -> [u64; 2] {
    let low = (handler & 0xffff) | 8 << 16 | 0x8e << 40 | (handler >> 16 & 0xffff) << 48;
    [low, handler >> 32]
}

/// Fills the table, once, and loads it.
pub(crate) fn load() {
    if !FILLED.swap(true, Ordering::AcqRel) {
        // SAFETY: the first processor is alone: the others are started after this.
        let table = unsafe { &mut *TABLE.0.get() };
        let stubs = &raw const exception_stubs as u64;
        for (vector, entry) in (0..32).zip(table.iter_mut()) {
            // Each stub is aligned to 16 bytes and shorter than that.
            *entry = gate(stubs + vector * 16);
        }
        table[usize::from(KICK_VECTOR)] = gate(&raw const kick_stub as u64);
        table[usize::from(SPURIOUS_VECTOR)] = gate(&raw const spurious_stub as u64);
        // The old interrupt controllers would use the vectors of exceptions: nothing comes from them.
        for port in [0x21, 0xa1] {
            crate::console::outb(port, 0xff);
        }
    }
    let pointer = DescriptorTablePointer {
        limit: (size_of::<Table>() - 1) as u16,
        base: VirtAddr::new(TABLE.0.get() as u64),
    };
    // SAFETY: the table is complete and stays.
    unsafe { lidt(&pointer) };
}

#[unsafe(no_mangle)]
extern "C" fn machine_exception(vector: u64, code: u64, rip: u64, cr2: u64) -> ! {
    panic!("exception {vector}, error code {code:#x}, at {rip:#x}, cr2 {cr2:#x}")
}
