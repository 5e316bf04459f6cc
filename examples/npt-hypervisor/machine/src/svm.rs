//! AMD's virtualisation extension (APM volume 2, chapter 15): switching it on, the control block, guest entry.
#![allow(unsafe_code)]
// UNSAFETY: model-specific registers, the control block's memory, the world switch.

use alloc::boxed::Box;
use core::arch::global_asm;
use core::arch::x86_64::__cpuid;
use x86_64::registers::model_specific::Msr;

global_asm!(include_str!("svm.s"), options(att_syntax));

unsafe extern "C" {
    fn svm_run(control_block: u64, registers: *mut Registers);
}

/// 4 KiB that the processor keeps its own things in.
#[repr(C, align(4096))]
struct Page([u64; 512]);

/// What the processor can do.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// Number of address-space identifiers; 0 is the host's.
    pub asids: u32,
    /// Whether one identifier's translations can be flushed alone.
    pub flush_by_asid: bool,
}

const EFER: u32 = 0xc000_0080;
const EFER_SVM: u64 = 1 << 12;
const VM_HSAVE_PA: u32 = 0xc001_0117;

/// Switches it on, on this processor; `None` if it is not there.
pub fn begin() -> Option<Features> {
    let (extended, svm) = (__cpuid(0x8000_0001), __cpuid(0x8000_000a));
    let has = |word: u32, bit: u32| word >> bit & 1 != 0;
    if !has(extended.ecx, 2) || !has(svm.edx, 0) {
        return None;
    }
    let save = Box::leak(Box::new(Page([0; 512])));
    // SAFETY: the feature is there; the save area is this processor's for ever.
    unsafe {
        let mut efer = Msr::new(EFER);
        let now = efer.read();
        efer.write(now | EFER_SVM);
        Msr::new(VM_HSAVE_PA).write(core::ptr::from_mut(save) as u64);
    }
    Some(Features {
        asids: svm.ebx,
        flush_by_asid: has(svm.edx, 6),
    })
}

/// Invalidates what this processor has cached of one guest-linear page under `asid`.
pub fn invalidate_page(linear: u64, asid: u32) {
    // SAFETY: drops translations; the next access makes them anew.
    unsafe {
        core::arch::asm!("invlpga rax, ecx", in("rax") linear, in("ecx") asid, options(nostack, preserves_flags));
    }
}

/// The guest's registers, but for those that the control block holds.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Registers {
    /// rbx.
    pub rbx: u64,
    /// rcx.
    pub rcx: u64,
    /// rdx.
    pub rdx: u64,
    /// rsi.
    pub rsi: u64,
    /// rdi.
    pub rdi: u64,
    /// rbp.
    pub rbp: u64,
    /// r8 to r15.
    pub r8_to_r15: [u64; 8],
}

/// What is to be flushed on the way into the guest (APM 15.16.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum TlbControl {
    /// Nothing.
    Nothing = 0,
    /// Everything, of all identifiers.
    All = 1,
    /// What is the guest's.
    Guest = 3,
}

/// Why the guest was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// An interrupt for the host.
    Interrupt,
    /// The guest calls.
    Call,
    /// Nested page fault.
    NestedFault {
        /// Error code.
        code: u64,
        /// Guest physical address.
        gpa: u64,
    },
    /// Anything else, by number.
    Other(u64),
}

// Offsets in the control block (APM volume 2, appendix B).
const INTERCEPTS_1: usize = 0x00c;
const INTERCEPTS_2: usize = 0x010;
const ASID: usize = 0x058;
const TLB_CONTROL: usize = 0x05c;
const VIRTUAL_INTERRUPTS: usize = 0x060;
const EXIT_CODE: usize = 0x070;
const EXIT_INFO_1: usize = 0x078;
const EXIT_INFO_2: usize = 0x080;
const NESTED_ENABLE: usize = 0x090;
const NESTED_CR3: usize = 0x0b0;
const ES: usize = 0x400;
const CS: usize = 0x410;
const SS: usize = 0x420;
const DS: usize = 0x430;
const GDTR: usize = 0x460;
const IDTR: usize = 0x480;
const PRIVILEGE: usize = 0x4cb;
const GUEST_EFER: usize = 0x4d0;
const CR4: usize = 0x548;
const CR3: usize = 0x550;
const CR0: usize = 0x558;
const DR7: usize = 0x560;
const DR6: usize = 0x568;
const RFLAGS: usize = 0x570;
const RIP: usize = 0x578;
const RAX: usize = 0x5f8;
const PAT: usize = 0x668;

const INTERCEPT_INTERRUPT: u32 = 1 << 0;
const INTERCEPT_HALT: u32 = 1 << 24;
const INTERCEPT_SHUTDOWN: u32 = 1 << 31;
const INTERCEPT_RUN: u32 = 1 << 0;
const INTERCEPT_CALL: u32 = 1 << 1;
/// The host's interrupt flag says whether physical interrupts come, not the guest's.
const MASK_INTERRUPTS_BY_HOST: u64 = 1 << 24;

/// A guest processor, in 64-bit mode with paging on and interrupts off.
pub struct ControlBlock {
    page: Box<Page>,
    /// What of the guest's registers the block does not hold.
    pub registers: Registers,
}

impl ControlBlock {
    /// One that begins at `rip` on the page tables at `cr3`, both guest-physical.
    pub fn new(rip: u64, cr3: u64) -> Self {
        let mut block = Self {
            page: Box::new(Page([0; 512])),
            registers: Registers::default(),
        };
        block.write(
            INTERCEPTS_1,
            INTERCEPT_INTERRUPT | INTERCEPT_HALT | INTERCEPT_SHUTDOWN,
        );
        block.write(INTERCEPTS_2, INTERCEPT_RUN | INTERCEPT_CALL);
        block.write(VIRTUAL_INTERRUPTS, MASK_INTERRUPTS_BY_HOST);
        block.write(NESTED_ENABLE, 1u64);
        // Selector and attributes, limit, base: 64-bit code, flat data.
        block.segment(CS, 8, 0xa9b);
        for segment in [ES, SS, DS] {
            block.segment(segment, 16, 0xc93);
        }
        for table in [GDTR, IDTR] {
            block.write(table + 4, 0u32);
        }
        // SAFETY: reads a register that exists.
        block.write(GUEST_EFER, unsafe { Msr::new(EFER).read() });
        block.write(CR0, 0x8001_0033u64);
        block.write(CR3, cr3);
        block.write(CR4, 0x20u64);
        block.write(DR6, 0xffff_0ff0u64);
        block.write(DR7, 0x400u64);
        block.write(RFLAGS, 2u64);
        block.write(RIP, rip);
        block.write(PAT, 0x0007_0406_0007_0406u64);
        block
    }

    fn segment(&mut self, offset: usize, selector: u16, attributes: u16) {
        self.write(offset, selector);
        self.write(offset + 2, attributes);
        self.write(offset + 4, u32::MAX);
        self.write(offset + 8, 0u64);
    }

    fn write<T>(&mut self, offset: usize, value: T) {
        debug_assert!(offset + size_of::<T>() <= size_of::<Page>());
        let page = &raw mut *self.page;
        // SAFETY: inside the page, and aligned as every field of the control block is.
        unsafe {
            page.cast::<u8>()
                .add(offset)
                .cast::<T>()
                .write_volatile(value)
        }
    }

    fn read(&self, offset: usize) -> u64 {
        let page = &raw const *self.page;
        // SAFETY: inside the page; the fields read are 8 bytes wide.
        unsafe { page.cast::<u8>().add(offset).cast::<u64>().read_volatile() }
    }

    /// The nested tables to run on.
    pub fn set_nested_root(&mut self, pointer: u64) {
        self.write(NESTED_CR3, pointer);
    }

    /// The identifier of its translations, and which are flushed at the next entry.
    pub fn set_asid(&mut self, asid: u32, flush: TlbControl) {
        self.write(ASID, asid);
        self.write(TLB_CONTROL, flush as u8);
    }

    /// The guest's rax: the number of its call.
    pub fn rax(&self) -> u64 {
        self.read(RAX)
    }

    /// Goes on after the instruction by which the guest called.
    pub fn return_from_call(&mut self) {
        const CALL_BYTES: u64 = 3;
        let rip = self.read(RIP);
        self.write(RIP, rip + CALL_BYTES);
    }

    /// Goes on at the user's privilege, or at the kernel's.
    pub fn set_user(&mut self, user: bool) {
        let level: u16 = if user { 3 } else { 0 };
        self.segment(CS, 8 | level, 0xa9b | level << 5);
        self.segment(SS, 16 | level, 0xc93 | level << 5);
        self.write(PRIVILEGE, level as u8);
    }

    /// Goes on elsewhere.
    pub fn set_rip(&mut self, rip: u64) {
        self.write(RIP, rip);
    }

    /// Where the guest is.
    pub fn rip(&self) -> u64 {
        self.read(RIP)
    }

    /// Runs the guest until it has to be left.
    pub fn run(&mut self) -> Exit {
        let page = &raw mut *self.page;
        // SAFETY: a complete control block, at the physical address that is its own; interrupts find their gates.
        unsafe { svm_run(page as u64, &mut self.registers) };
        match self.read(EXIT_CODE) {
            0x60 => Exit::Interrupt,
            0x81 => Exit::Call,
            0x400 => Exit::NestedFault {
                code: self.read(EXIT_INFO_1),
                gpa: self.read(EXIT_INFO_2),
            },
            other => Exit::Other(other),
        }
    }
}
