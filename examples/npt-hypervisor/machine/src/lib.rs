//! An x86-64 machine without an operating system: what the kernels of these examples share.
//!
//! Protocol. The loader's processor comes up first, gets a heap, a console and an interrupt table, and calls the kernel's
//! `kernel_main`. [`processors::start`] brings up the others, which wait for work ([`processors::run_on`]). Physical memory
//! below 4 GiB is mapped to itself, so an address is a pointer. Interrupts are off wherever Rust code runs; a kernel lets
//! one in where it means to. Nothing saves floating-point registers: guests must not use them.
#![no_std]

extern crate alloc;

mod boot;
pub mod console;
mod exceptions;
mod heap;
pub mod local_apic;
mod mem;
pub mod processors;
pub mod svm;
pub mod vmx;

pub use boot::{BootInfo, Module, image_end};
pub use exceptions::KICK_VECTOR;

/// Ends the machine: QEMU by its debug-exit device, whose exit status becomes `2 * code + 1`.
pub fn exit(code: u32) -> ! {
    console::outl(0xf4, code);
    loop {
        x86_64::instructions::hlt();
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    console::print_panic(info);
    exit(1)
}
