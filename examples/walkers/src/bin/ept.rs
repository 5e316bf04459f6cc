//! Extended page tables, walked by the processor that Bochs emulates.
#![no_std]
#![no_main]

extern crate alloc;

use core::arch::x86_64::__cpuid;
use machine::vmx::{self, Exit, Guest};
use machine::{BootInfo, println};
use tdp::{AdBits, Ept, Format, Level};
use tdp_arch::walker::{EptConfig, EptFault, EptWalker, GuestAccess};
use walkers::check::{self, Processor, Seen};
use walkers::guest::{self, CR3};

struct Vmx {
    guest: Guest,
    config: EptConfig,
}

/// What Bochs reports of a violation where the manual has `qualification`: of a read of a guest's page table that counts as a
/// write, bit 1. The manual has bits 0 and 1 set (SDM, table 28-7).
fn as_bochs(qualification: u64) -> u64 {
    const READ: u64 = 1 << 0;
    const WRITE: u64 = 1 << 1;
    const LINEAR: u64 = 1 << 7;
    const FINAL: u64 = 1 << 8;
    if qualification & (READ | WRITE | LINEAR | FINAL) == READ | WRITE | LINEAR {
        qualification & !READ
    } else {
        qualification
    }
}

impl Processor for Vmx {
    type Format = Ept;
    type Walker = EptWalker;

    fn walker(&self, ad_bits: AdBits) -> EptWalker {
        let accessed_dirty = ad_bits == AdBits::Processor;
        EptWalker::new(EptConfig {
            accessed_dirty,
            ..self.config
        })
        .expect("this processor exists")
    }

    fn physical_bits(&self) -> u32 {
        self.config.physical_bits
    }

    fn call(&self) -> [u8; 3] {
        [0x0f, 0x01, 0xc1]
    }

    /// Bit 12 of what maps a large page: the manual has all bits of the address below the page's size zero (SDM 29.3.2), Bochs
    /// leaves out the one that is PAT in other tables.
    fn unchecked(level: Level, entry: u64) -> u64 {
        if level != Level::L1 && entry & Ept::LARGE != 0 {
            1 << 12
        } else {
            0
        }
    }

    /// Bochs sets the bits when it has come to the end of a walk without a fault, as the manual allows.
    fn marks_otherwise(&self, _level: Level, live: u64, _reference: u64) -> bool {
        live & Ept::ACCESSED == 0
    }

    fn reports_otherwise(&self, seen: Seen, wanted: Seen) -> bool {
        match wanted {
            Seen::Fault { code, gpa } => {
                let code = as_bochs(code);
                seen == Seen::Fault { code, gpa }
            }
            _ => false,
        }
    }

    /// Bochs writes flags to where it has read the entry. The manual has that for a write, which the extended page tables must
    /// allow (SDM 29.3.3.2); with accessed and dirty bits the read itself counts as one, without them nobody looks.
    const WALKS_FOR_FLAGS: bool = false;

    fn access(
        &mut self,
        pointer: u64,
        linear: u64,
        access: GuestAccess,
        user: bool,
        value: u64,
    ) -> Seen {
        self.guest.registers.rdi = linear;
        self.guest.registers.rsi = value;
        self.guest.set_user(user);
        match self.guest.run(pointer, guest::program(access)) {
            Exit::Call => {
                Seen::Done((access == GuestAccess::Read).then_some(self.guest.registers.rax))
            }
            Exit::Violation { qualification, gpa } => Seen::Fault {
                code: qualification,
                gpa,
            },
            Exit::Misconfiguration { gpa } => Seen::Misconfigured { gpa },
            Exit::Other(code) => Seen::Other(code),
        }
    }

    fn reported(&self, fault: EptFault) -> Seen {
        match fault {
            EptFault::Violation(violation) => Seen::Fault {
                code: violation.qualification,
                gpa: violation.gpa.0,
            },
            EptFault::Misconfiguration { gpa } => Seen::Misconfigured { gpa: gpa.0 },
        }
    }
}

/// Ends Bochs, by its port for that. It calls that a panic, whatever the reason.
fn shut_down() -> ! {
    for byte in b"Shutdown" {
        machine::console::outb(0x8900, *byte);
    }
    machine::exit(0)
}

#[unsafe(no_mangle)]
#[allow(
    unsafe_code,
    reason = "UNSAFETY: the machine's boot code calls it by name"
)]
fn kernel_main(_info: &BootInfo) -> ! {
    if !vmx::begin() {
        println!("this processor has no VMX");
        shut_down();
    }
    let capabilities = vmx::ept_capabilities();
    let has = |bit: u32| capabilities >> bit & 1 != 0;
    let config = EptConfig {
        root_level: Level::L4,
        physical_bits: __cpuid(0x8000_0008).eax & 0xff,
        execute_only: has(0),
        pages_2m: has(16),
        pages_1g: has(17),
        accessed_dirty: has(21),
        mode_based_execute: false,
    };
    println!("{config:?}");
    let guest = Guest::new(CR3);
    let figures = check::run(&mut Vmx { guest, config }, 1, 12, 400);
    println!("{}", serde_json::to_string(&figures).unwrap_or_default());
    println!("{}", if figures.is_good() { "GOOD" } else { "BAD" });
    shut_down()
}
