//! Nested page tables, walked by the processor that QEMU emulates.
#![no_std]
#![no_main]

extern crate alloc;

use core::arch::x86_64::__cpuid;
use machine::svm::{self, ControlBlock, Exit, TlbControl};
use machine::{BootInfo, exit, println};
use tdp::{AdBits, Gpa, Level, Npt};
use tdp_arch::walker::{GuestAccess, NptConfig, NptFault, NptWalker};
use walkers::check::{self, CR3, Processor, Seen};

struct Svm {
    block: ControlBlock,
    config: NptConfig,
}

/// A reserved bit can only be found in an entry that is present, and the manuals have both bits set (APM 8.4.2). QEMU
/// reports the one without the other.
fn with_present(code: u64) -> u64 {
    const PRESENT: u64 = 1 << 0;
    const RESERVED: u64 = 1 << 3;
    if code & RESERVED != 0 {
        code | PRESENT
    } else {
        code
    }
}

impl Processor for Svm {
    type Format = Npt;
    type Walker = NptWalker;

    fn walker(&self, _ad_bits: AdBits) -> NptWalker {
        NptWalker::new(self.config).expect("this processor exists")
    }

    fn physical_bits(&self) -> u32 {
        self.config.physical_bits
    }

    fn call(&self) -> [u8; 3] {
        [0x0f, 0x01, 0xd9]
    }

    /// Bit 8: the manual has bits 8:7 zero there (APM 5.3.3), QEMU looks at bit 7 only.
    const UNCHECKED_IN_ROOT: u64 = 1 << 8;

    /// QEMU treats an entry that maps 1 GiB as one that points to a table until it has set the bit.
    fn marks_otherwise(&self, level: Level) -> bool {
        level == Level::L3
    }

    fn access(&mut self, pointer: u64, gpa: Gpa, access: GuestAccess, value: u64) -> Seen {
        self.block.set_nested_root(pointer);
        self.block.set_asid(1, TlbControl::All);
        self.block.registers.rdi = gpa.0;
        self.block.registers.rsi = value;
        self.block.set_rip(match access {
            GuestAccess::Read => check::READ,
            GuestAccess::Write => check::WRITE,
            _ => check::FETCH,
        });
        match self.block.run() {
            Exit::Call => Seen::Done((access == GuestAccess::Read).then(|| self.block.rax())),
            Exit::NestedFault { code, gpa } => Seen::Fault {
                code: with_present(code),
                gpa,
            },
            Exit::Interrupt => Seen::Other(0x60),
            Exit::Other(code) => Seen::Other(code),
        }
    }

    fn reported(&self, fault: NptFault) -> Seen {
        Seen::Fault {
            code: fault.exit_info_1,
            gpa: fault.exit_info_2.0,
        }
    }
}

#[unsafe(no_mangle)]
#[allow(
    unsafe_code,
    reason = "UNSAFETY: the machine's boot code calls it by name"
)]
fn kernel_main(_info: &BootInfo) -> ! {
    if svm::begin().is_none() {
        println!("this processor has no SVM, or no nested paging");
        exit(3);
    }
    let config = NptConfig {
        physical_bits: __cpuid(0x8000_0008).eax & 0xff,
        ..NptConfig::default()
    };
    println!("{config:?}");
    let block = ControlBlock::new(0, CR3);
    let figures = check::run(&mut Svm { block, config }, 1, 60, 400);
    println!("{}", serde_json::to_string(&figures).unwrap_or_default());
    exit(if figures.is_good() { 0x10 } else { 3 })
}
