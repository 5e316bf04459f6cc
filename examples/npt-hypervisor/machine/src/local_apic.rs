//! The local interrupt controller: who am I, and interrupts to other processors.
#![allow(unsafe_code)]
// UNSAFETY: registers in memory.

use crate::exceptions::KICK_VECTOR;

const BASE: u64 = 0xfee0_0000;
const ID: u64 = 0x20;
const SPURIOUS: u64 = 0xf0;
const COMMAND_LOW: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;
/// Command: the last one has not been sent yet.
const PENDING: u32 = 1 << 12;
const ALL_OTHERS: u32 = 0b11 << 18;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;
const FIXED: u32 = 0x4000;

fn read(register: u64) -> u32 {
    // SAFETY: the registers of this processor's controller, mapped at their address.
    unsafe { ((BASE + register) as *const u32).read_volatile() }
}

fn write(register: u64, value: u32) {
    // SAFETY: as above; an interrupt finds its gate in the table.
    unsafe { ((BASE + register) as *mut u32).write_volatile(value) }
}

/// Switches this processor's controller on and returns its number.
pub(crate) fn begin() -> u8 {
    write(SPURIOUS, 0x1ff);
    (read(ID) >> 24) as u8
}

fn command(low: u32, high: u32) {
    while read(COMMAND_LOW) & PENDING != 0 {
        core::hint::spin_loop();
    }
    write(COMMAND_HIGH, high);
    write(COMMAND_LOW, low);
}

/// Brings all other processors to the code at page `page` of memory.
pub(crate) fn start_others(page: u8) {
    command(ALL_OTHERS | INIT, 0);
    crate::processors::spin_for(20_000_000);
    for _ in 0..2 {
        command(ALL_OTHERS | STARTUP | u32::from(page), 0);
        crate::processors::spin_for(2_000_000);
    }
}

/// Interrupts the processor with controller number `id`.
pub fn kick(id: u8) {
    command(FIXED | u32::from(KICK_VECTOR), u32::from(id) << 24);
}
