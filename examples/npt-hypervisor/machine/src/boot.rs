//! The first Rust code of each processor, and what the loader said.
#![allow(unsafe_code)]
// UNSAFETY: symbols of the assembly, and structures that the loader left in memory.

use crate::{console, exceptions, heap, processors};
use core::arch::global_asm;

/// Processors that the boot code has stacks for.
pub(crate) const MAX_PROCESSORS: usize = 8;
const BOOT_STACK: usize = 64 << 10;

global_asm!(
    ".set MAX_PROCESSORS, {max}\n.set BOOT_STACK, {stack}\n.set MULTIBOOT, {multiboot}\n",
    max = const MAX_PROCESSORS,
    stack = const BOOT_STACK,
    multiboot = const cfg!(feature = "multiboot") as u32,
    options(att_syntax)
);
global_asm!(include_str!("boot.s"), options(att_syntax));

unsafe extern "C" {
    #[link_name = "image_end"]
    static IMAGE_END: u8;
}

unsafe extern "Rust" {
    /// The kernel's own beginning, on the first processor.
    safe fn kernel_main(info: &BootInfo) -> !;
}

/// First address after the kernel's image.
pub fn image_end() -> u64 {
    &raw const IMAGE_END as u64
}

/// A file that the loader put into memory.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// Physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
}

/// What the loader said.
#[derive(Clone, Copy, Debug)]
pub struct BootInfo {
    /// The command line; empty if there is none.
    pub command_line: &'static str,
    /// The first module.
    pub module: Option<Module>,
}

/// Magic number of the PVH start information.
const PVH_MAGIC: u32 = 0x336e_c578;

impl BootInfo {
    /// Reads PVH start information; empty if there is none at `address`.
    ///
    /// # Safety
    ///
    /// `address` is what the loader passed at entry.
    unsafe fn read(address: u32) -> Self {
        let read = |offset: u64| {
            // SAFETY: the structure is below 4 GiB and nobody has written there since.
            unsafe { ((u64::from(address) + offset) as *const u64).read_unaligned() }
        };
        let mut info = Self {
            command_line: "",
            module: None,
        };
        if address == 0 || read(0) as u32 != PVH_MAGIC {
            return info;
        }
        let (modules, list, command_line) = (read(12) as u32, read(16), read(24));
        if modules > 0 && list != 0 {
            // SAFETY: the list has at least one element, of which these are the first two words.
            let (start, size) = unsafe {
                (
                    (list as *const u64).read(),
                    (list as *const u64).add(1).read(),
                )
            };
            info.module = Some(Module { start, size });
        }
        if command_line != 0 {
            // SAFETY: a string that ends with a zero, below 4 GiB, that nobody writes.
            let text =
                unsafe { core::ffi::CStr::from_ptr(command_line as *const core::ffi::c_char) };
            info.command_line = text.to_str().unwrap_or("");
        }
        info
    }
}

#[unsafe(no_mangle)]
extern "C" fn machine_first(info: u32) -> ! {
    console::begin();
    heap::begin();
    exceptions::load();
    // SAFETY: the boot code passes on what it was given.
    let info = unsafe { BootInfo::read(info) };
    kernel_main(&info)
}

#[unsafe(no_mangle)]
extern "C" fn machine_other(number: u32) -> ! {
    exceptions::load();
    processors::wait_for_work(number as usize)
}
