//! The guest's program and the memory it runs in.
//!
//! Guest-physical memory: page 1 the program, pages 2 and 3 its page tables, which map the first 4 GiB to themselves by
//! leaves of 1 GiB, from page 16 on the versions, from 1 MiB on the pages that it writes and checks (`guest.s`). All of it is
//! backed on demand, so that the program, its page tables and its data are all reached through nested faults.
#![allow(unsafe_code)]
// UNSAFETY: the program is assembly between two symbols.

use crate::host::BareHost;
use crate::memory;
use core::arch::global_asm;
use machine::svm::ControlBlock;
use tdp::{Gfn, GfnRange, PAGE_SIZE};

global_asm!(include_str!("guest.s"), options(att_syntax));

unsafe extern "C" {
    static guest_start: u8;
    static guest_end: u8;
}

const PROGRAM: Gfn = Gfn(1);
const ROOT_TABLE: Gfn = Gfn(2);
const SECOND_TABLE: Gfn = Gfn(3);
const VERSIONS: Gfn = Gfn(16);
const DATA: Gfn = Gfn(256);
/// Pages of each vCPU that it visits most.
const OFTEN: u64 = 32;

const PRESENT_WRITABLE_USER: u64 = 7;
const LARGE: u64 = 1 << 7;

/// Visits between two calls of the host.
const VISITS: u64 = 256;

/// What the guest is told to do, on each of its vCPUs.
#[derive(Clone, Copy, Debug)]
pub struct GuestProgram {
    vcpus: u64,
    /// Pages of each vCPU.
    pages: u64,
}

/// What the guest calls the host for.
#[derive(Clone, Copy, Debug)]
pub enum Call {
    /// It has visited as many pages as it was told to; `was_final` if those were all of them, one after another.
    Done { visits: u64, was_final: bool },
    /// A word was not what it should be.
    Wrong {
        address: u64,
        expected: u64,
        found: u64,
    },
}

impl GuestProgram {
    /// For a guest with memory up to `end`, whose pages are dealt out to its vCPUs in turn.
    pub fn new(end: Gfn, vcpus: usize) -> Self {
        let pages = end.0 - DATA.0;
        assert!(
            pages * 8 <= (DATA.0 - VERSIONS.0) * PAGE_SIZE,
            "the versions fit below the data"
        );
        Self {
            vcpus: vcpus as u64,
            pages: pages / vcpus as u64,
        }
    }

    /// The pages that the guest uses most, all of them paged.
    pub fn often_used(&self) -> GfnRange {
        (DATA..Gfn(DATA.0 + OFTEN * self.vcpus)).into()
    }

    /// Puts the program and its page tables into the guest's memory.
    pub fn load(&self, host: &BareHost) {
        let start = &raw const guest_start;
        let bytes = &raw const guest_end as usize - start as usize;
        // SAFETY: the two symbols enclose the program.
        let code = unsafe { core::slice::from_raw_parts(start, bytes) };
        let page = |gfn| {
            host.supply(gfn)
                .expect("the first pages of the guest are paged")
        };
        memory::write(page(PROGRAM), code);
        let entry = ROOT_TABLE
            .checked_add(1)
            .map(|next| next.address().0 | PRESENT_WRITABLE_USER);
        debug_assert_eq!(SECOND_TABLE.0, ROOT_TABLE.0 + 1);
        memory::write(page(ROOT_TABLE), &entry.unwrap_or(0).to_le_bytes());
        let mut leaves = [0; 4 * 8];
        for (number, leaf) in leaves.chunks_exact_mut(8).enumerate() {
            let entry = (number as u64) << 30 | LARGE | PRESENT_WRITABLE_USER;
            leaf.copy_from_slice(&entry.to_le_bytes());
        }
        memory::write(page(SECOND_TABLE), &leaves);
    }

    /// The vCPU as it begins.
    pub fn start(&self, number: usize) -> ControlBlock {
        let mut block = ControlBlock::new(PROGRAM.address().0, ROOT_TABLE.address().0);
        block.registers.rdi = DATA.address().0;
        block.registers.rsi = VERSIONS.address().0;
        let r = &mut block.registers.r8_to_r15;
        r[0] = self.pages;
        r[1] = 0x1234_5678_9abc_def1 ^ (number as u64) << 17;
        r[2] = self.vcpus;
        r[3] = number as u64;
        r[4] = VISITS;
        block
    }

    /// What the guest has called for.
    pub fn call(&self, block: &ControlBlock) -> Call {
        let registers = &block.registers;
        if block.rax() == 2 {
            return Call::Wrong {
                address: registers.rbx,
                expected: registers.rcx,
                found: registers.rdx,
            };
        }
        let was_final = registers.r8_to_r15[5] != 0;
        Call::Done {
            visits: if was_final { self.pages } else { VISITS },
            was_final,
        }
    }

    /// Has the guest go on: at random, or `last` over all of its pages one after another.
    pub fn next(&self, block: &mut ControlBlock, last: bool) {
        let r = &mut block.registers.r8_to_r15;
        r[4] = if last { self.pages } else { VISITS };
        r[5] = u64::from(last);
    }
}
