//! Text on the first serial port, and on port 0xe9 where an emulator listens there. One line at a time.
#![allow(unsafe_code)]
// UNSAFETY: port accesses.

use core::fmt::{self, Write};
use spin::Mutex;
use x86_64::instructions::port::Port;

const SERIAL: u16 = 0x3f8;
const LINE_STATUS: u16 = SERIAL + 5;
const CAN_SEND: u8 = 1 << 5;
const DEBUG_PORT: u16 = 0xe9;

/// Writes 8 bits to a port that devices of an emulator listen to.
pub fn outb(port: u16, value: u8) {
    // SAFETY: the ports named here change nothing that Rust code relies on.
    unsafe { Port::new(port).write(value) }
}

/// Writes 32 bits to a port that devices of an emulator listen to.
pub fn outl(port: u16, value: u32) {
    // SAFETY: as above.
    unsafe { Port::new(port).write(value) }
}

fn inb(port: u16) -> u8 {
    // SAFETY: as above.
    unsafe { Port::new(port).read() }
}

struct Console;

static CONSOLE: Mutex<Console> = Mutex::new(Console);

/// 115200 baud, 8 bits, no interrupts.
pub(crate) fn begin() {
    for (register, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 1)] {
        outb(SERIAL + register, value);
    }
}

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while inb(LINE_STATUS) & CAN_SEND == 0 {}
            outb(SERIAL, byte);
            outb(DEBUG_PORT, byte);
        }
        Ok(())
    }
}

/// Prints a line. What [`println!`](crate::println) expands to.
pub fn print_line(line: fmt::Arguments<'_>) {
    // A console cannot fail.
    let _ = writeln!(CONSOLE.lock(), "{line}");
}

/// Whoever held the console will not go on.
pub(crate) fn print_panic(info: &core::panic::PanicInfo<'_>) {
    let _ = writeln!(Console, "\n{info}");
}

/// Prints a line on the console.
#[macro_export]
macro_rules! println {
    ($($text:tt)*) => { $crate::console::print_line(format_args!($($text)*)) };
}
