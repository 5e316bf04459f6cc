//! Intel's virtualisation extension (SDM volume 3, chapters 24 to 28): switching it on, one guest, guest entry.
#![allow(unsafe_code)]
// UNSAFETY: model-specific and control registers, the control structure, the world switch.

use alloc::boxed::Box;
use core::arch::x86_64::__cpuid;
use core::arch::{asm, global_asm};
use x86_64::registers::control::{Cr0, Cr3, Cr4, Cr4Flags};
use x86_64::registers::model_specific::Msr;

global_asm!(include_str!("vmx.s"), options(att_syntax));

unsafe extern "C" {
    fn vmx_run(again: u64, registers: *mut Registers) -> u64;
    fn vmx_exit();
    static boot_gdt_pointer: u8;
}

#[repr(C, align(4096))]
struct Page([u64; 512]);

impl Page {
    /// A page that the processor keeps for ever.
    fn leak(first: u64) -> u64 {
        let mut page = Box::new(Page([0; 512]));
        page.0[0] = first;
        core::ptr::from_mut(Box::leak(page)) as u64
    }
}

const FEATURE_CONTROL: u32 = 0x3a;
const BASIC: u32 = 0x480;
const EPT_VPID: u32 = 0x48c;
const EFER: u32 = 0xc000_0080;

fn read_msr(number: u32) -> u64 {
    // SAFETY: callers name registers that a processor with this extension has.
    unsafe { Msr::new(number).read() }
}

/// Capabilities of extended page tables, as the processor reports them.
pub fn ept_capabilities() -> u64 {
    read_msr(EPT_VPID)
}

fn write(field: u64, value: u64) {
    let failed: u8;
    // SAFETY: writes a field of the current control structure.
    unsafe {
        asm!("vmwrite {f}, {v}", "setbe {e}", f = in(reg) field, v = in(reg) value, e = out(reg_byte) failed)
    };
    assert!(failed == 0, "field {field:#x} cannot be written");
}

fn read(field: u64) -> u64 {
    let value;
    // SAFETY: reads a field of the current control structure.
    unsafe { asm!("vmread {v}, {f}", f = in(reg) field, v = out(reg) value) };
    value
}

/// What a control word can be: the bits that must be set, and those that may.
fn allowed(wanted: u32, register: u32) -> u64 {
    let limits = read_msr(register);
    u64::from((wanted | limits as u32) & (limits >> 32) as u32)
}

/// Switches the extension on, on this processor; `false` if it is not there.
///
/// # Panics
///
/// If the firmware has locked it off.
pub fn begin() -> bool {
    if __cpuid(1).ecx >> 5 & 1 == 0 {
        return false;
    }
    let control = read_msr(FEATURE_CONTROL);
    if control & 1 == 0 {
        // SAFETY: not locked yet: allow it, and lock.
        unsafe { Msr::new(FEATURE_CONTROL).write(control | 0b101) };
    }
    // SAFETY: the extension is there.
    unsafe { Cr4::update(|flags| *flags |= Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS) };
    let revision = read_msr(BASIC) & 0x7fff_ffff;
    let (on, structure) = (Page::leak(revision), Page::leak(revision));
    let (a, b, c): (u8, u8, u8);
    // SAFETY: both pages begin with the revision and are the processor's from here on.
    unsafe {
        asm!("vmxon [{}]", "setbe {}", in(reg) &on, out(reg_byte) a);
        asm!("vmclear [{}]", "setbe {}", in(reg) &structure, out(reg_byte) b);
        asm!("vmptrld [{}]", "setbe {}", in(reg) &structure, out(reg_byte) c);
    }
    assert!((a, b, c) == (0, 0, 0), "VMX cannot be entered");
    true
}

/// The registers that are carried across.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Registers {
    /// rax.
    pub rax: u64,
    /// rsi.
    pub rsi: u64,
    /// rdi.
    pub rdi: u64,
}

/// Why the guest was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest calls.
    Call,
    /// EPT violation.
    Violation {
        /// Exit qualification.
        qualification: u64,
        /// Guest physical address.
        gpa: u64,
    },
    /// EPT misconfiguration.
    Misconfiguration {
        /// Guest physical address.
        gpa: u64,
    },
    /// Anything else, by number.
    Other(u64),
}

/// The guest of this processor, in 64-bit mode with paging on and interrupts off.
pub struct Guest {
    again: bool,
    /// Its registers.
    pub registers: Registers,
}

impl Guest {
    /// Fills the control structure: a guest on the page tables at the guest-physical address `cr3`.
    pub fn new(cr3: u64) -> Self {
        let fixed = read_msr(BASIC) >> 55 & 1 != 0;
        let msr = |old: u32, new: u32| if fixed { new } else { old };
        write(0x4000, allowed(0, msr(0x481, 0x48d)));
        // Halting exits, secondary controls; extended page tables; 64-bit host and guest, EFER saved and loaded.
        write(0x4002, allowed(1 << 31 | 1 << 7, msr(0x482, 0x48e)));
        write(0x401e, allowed(1 << 1, 0x48b));
        write(
            0x400c,
            allowed(1 << 9 | 1 << 20 | 1 << 21, msr(0x483, 0x48f)),
        );
        write(0x4012, allowed(1 << 9 | 1 << 15, msr(0x484, 0x490)));
        write(0x4004, 0);
        write(0x2800, !0);
        for segment in 0..8u64 {
            // Selector, access rights, limit of ES, CS, SS, DS, FS, GS, LDTR, TR.
            let (selector, rights, limit) = match segment {
                1 => (8, 0xa09b, 0xffff_ffffu64),
                6 => (0, 0x10000, 0),
                7 => (0x20, 0x8b, 0x67),
                _ => (16, 0xc093, 0xffff_ffff),
            };
            write(0x800 + 2 * segment, selector);
            write(0x4800 + 2 * segment, limit);
            write(0x4814 + 2 * segment, rights);
            write(0x6806 + 2 * segment, 0);
        }
        // SAFETY: the boot code's table pointer: a limit of 16 bits, then an address of 32.
        let gdt = u64::from(unsafe {
            (&raw const boot_gdt_pointer)
                .add(2)
                .cast::<u32>()
                .read_unaligned()
        });
        let (cr0, cr4, efer) = (Cr0::read_raw(), Cr4::read_raw(), read_msr(EFER));
        let host_cr3 = Cr3::read_raw().0.start_address().as_u64();
        let guest = [
            (0x4810, 31),
            (0x6816, gdt),
            (0x4812, 0),
            (0x6818, 0),
            (0x6800, cr0),
            (0x6802, cr3),
            (0x6804, cr4),
            (0x681a, 0x400),
            (0x681c, 0),
            (0x6820, 2),
            (0x4826, 0),
            (0x4824, 0),
            (0x2806, efer),
            (0x2802, 0),
        ];
        let host = [
            (0xc00, 16),
            (0xc02, 8),
            (0xc04, 16),
            (0xc06, 16),
            (0xc08, 16),
            (0xc0a, 16),
            (0xc0c, 0x20),
            (0x6c00, cr0),
            (0x6c02, host_cr3),
            (0x6c04, cr4),
            (0x6c0c, gdt),
            (0x6c16, vmx_exit as *const () as u64),
            (0x2c02, efer),
        ];
        for (field, value) in guest.into_iter().chain(host) {
            write(field, value);
        }
        Self {
            again: false,
            registers: Registers::default(),
        }
    }

    /// Goes on at the user's privilege, or at the kernel's.
    pub fn set_user(&mut self, user: bool) {
        let level = if user { 3 } else { 0 };
        // CS and SS: selector, access rights.
        for (segment, selector, rights) in [(1, 8, 0xa09b), (2, 16, 0xc093)] {
            write(0x800 + 2 * segment, selector | level);
            write(0x4814 + 2 * segment, rights | level << 5);
        }
    }

    /// Runs the guest from `rip` on with the extended page tables at `pointer`, of which nothing is cached.
    ///
    /// # Panics
    ///
    /// If the guest cannot be entered.
    pub fn run(&mut self, pointer: u64, rip: u64) -> Exit {
        write(0x201a, pointer);
        write(0x681e, rip);
        let everything = [0u64; 2];
        // SAFETY: flushes all translations; then a complete control structure is entered.
        let failed = unsafe {
            asm!("invept {}, [{}]", in(reg) 2u64, in(reg) &everything);
            vmx_run(u64::from(self.again), &mut self.registers)
        };
        assert!(failed == 0, "guest entry failed: {}", read(0x4400));
        self.again = true;
        let gpa = read(0x2400);
        match read(0x4402) {
            18 => Exit::Call,
            48 => Exit::Violation {
                qualification: read(0x6400),
                gpa,
            },
            49 => Exit::Misconfiguration { gpa },
            other => Exit::Other(other),
        }
    }
}
