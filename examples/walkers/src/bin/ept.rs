//! Extended page tables, walked by the processor that Bochs emulates.
#![no_std]
#![no_main]

extern crate alloc;

use core::arch::x86_64::__cpuid;
use machine::vmx::{self, Exit, Guest};
use machine::{BootInfo, println};
use tdp::{AdBits, Ept, Gpa, Level};
use tdp_arch::walker::{EptConfig, EptFault, EptWalker, GuestAccess};
use walkers::check::{self, CR3, Processor, Seen};

struct Vmx {
    guest: Guest,
    config: EptConfig,
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

    /// Bochs sets the bits when it has come to the end of a walk without a fault, as the manual allows.
    fn marks_otherwise(&self, _level: Level) -> bool {
        true
    }

    fn access(&mut self, pointer: u64, gpa: Gpa, access: GuestAccess, value: u64) -> Seen {
        self.guest.registers.rdi = gpa.0;
        self.guest.registers.rsi = value;
        let rip = match access {
            GuestAccess::Read => check::READ,
            GuestAccess::Write => check::WRITE,
            _ => check::FETCH,
        };
        match self.guest.run(pointer, rip) {
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
