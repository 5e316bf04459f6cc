//! Nested page tables, walked by the processor that QEMU emulates.
#![no_std]
#![no_main]

extern crate alloc;

use core::arch::x86_64::__cpuid;
use machine::svm::{self, ControlBlock, Exit, TlbControl};
use machine::{BootInfo, exit, println};
use tdp::{AdBits, Format, Level, Npt};
use tdp_arch::walker::{GuestAccess, NptConfig, NptFault, NptWalker};
use walkers::check::{self, Processor, Seen};
use walkers::guest::{self, CR3};

struct Svm {
    block: ControlBlock,
    config: NptConfig,
}

const CODE_PRESENT: u64 = 1 << 0;
const CODE_RESERVED: u64 = 1 << 3;

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

    /// Bit 8 in the root: the manual has bits 8:7 zero there (APM 5.3.3), QEMU looks at bit 7 only.
    fn unchecked(level: Level, _entry: u64) -> u64 {
        if level == Level::L4 { 1 << 8 } else { 0 }
    }

    /// QEMU treats an entry that maps 1 GiB as one that points to a table until it has set the bit.
    fn marks_otherwise(&self, level: Level, live: u64, _reference: u64) -> bool {
        level == Level::L3 && live & Npt::LARGE != 0 && live & Npt::ACCESSED != 0
    }

    /// A reserved bit can only be found in an entry that is present, and the manuals have both bits set (APM 8.4.2). QEMU
    /// reports the one without the other.
    fn reports_otherwise(&self, seen: Seen, wanted: Seen) -> bool {
        match wanted {
            Seen::Fault { code, gpa } if code & CODE_RESERVED != 0 => {
                let code = code & !CODE_PRESENT;
                seen == Seen::Fault { code, gpa }
            }
            _ => false,
        }
    }

    fn access(
        &mut self,
        pointer: u64,
        linear: u64,
        access: GuestAccess,
        user: bool,
        value: u64,
    ) -> Seen {
        self.block.set_nested_root(pointer);
        self.block.set_asid(1, TlbControl::All);
        self.block.registers.rdi = linear;
        self.block.registers.rsi = value;
        self.block.set_user(user);
        self.block.set_rip(guest::program(access));
        match self.block.run() {
            Exit::Call => Seen::Done((access == GuestAccess::Read).then(|| self.block.rax())),
            Exit::NestedFault { code, gpa } => Seen::Fault { code, gpa },
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
