//! The guest: a program that checks every word that it reads.
//!
//! Protocol. Guest memory begins at [`BASE`]; what the word at an offset holds follows from the offset and from how often its
//! page was rewritten ([`word`]). A guest reads its pages in order, pass after pass, and counts the words that are wrong.
//! If it writes, it rewrites every fourth page of its part after having checked it, so that what it must find there the next
//! time is the number of the pass.
//!
//! The same program is here twice: in machine code, for a vCPU at privilege level 3, with everything that it knows in
//! registers; and in Rust, for a thread that stands in for one. Both go on from any state in which they were stopped.

use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, Ordering};
use uffd_handler::memory::{Memory, word};

/// Guest-physical address of the memory that is restored: above all that is special below 4 GiB.
pub(crate) const BASE: u64 = 4 << 30;

/// A page is rewritten if its number is a multiple of this.
const EVERY: u64 = 4;

/// Where a guest stands in its work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    /// First byte of its part of the memory.
    pub(crate) first: u64,
    /// Pages of its part.
    pub(crate) pages: u64,
    /// The page that is next.
    pub(crate) page: u64,
    /// Passes that are done.
    pub(crate) pass: u64,
    /// Passes to be done.
    pub(crate) passes: u64,
    /// Whether it writes.
    pub(crate) writes: bool,
    /// Words that were wrong.
    pub(crate) wrong: u64,
    /// All registers of a vCPU, in the middle of a page.
    pub(crate) registers: Option<[u64; 18]>,
}

impl State {
    /// A guest that begins.
    pub(crate) const fn new(first: u64, pages: u64, passes: u64, writes: bool) -> Self {
        Self {
            first,
            pages,
            page: 0,
            pass: 0,
            passes,
            writes,
            wrong: 0,
            registers: None,
        }
    }

    /// Whether its work is done.
    pub(crate) const fn is_done(&self) -> bool {
        self.pass >= self.passes
    }

    /// Does its work in this thread, until it is done or is to stop.
    pub(crate) fn run_here(&mut self, memory: &Memory, stop: &AtomicBool) {
        while !self.is_done() && !stop.load(Ordering::Relaxed) {
            let hot = self.writes && self.page.is_multiple_of(EVERY);
            let version = if hot { self.pass } else { 0 };
            let start = self.first + self.page * 4096;
            for at in (start..start + 4096).step_by(8) {
                self.wrong += u64::from(memory.load(at) != word(at, version));
            }
            if hot {
                for at in (start..start + 4096).step_by(8) {
                    memory.store(at, word(at, version + 1));
                }
            }
            self.page += 1;
            if self.page == self.pages {
                self.page = 0;
                self.pass += 1;
            }
        }
    }
}

/// The machine code.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
pub(crate) mod code {
    // UNSAFETY: machine code, and the symbols that enclose it.
    use std::ptr::addr_of;

    // rdi: address of the first page; rsi: pages; rbx: page; r8: pass; r9: passes; r10: wrong words; r14: whether it writes;
    // rbp: address of guest memory; r11, r13: the factors of `word`.
    std::arch::global_asm!(
        ".pushsection .rodata.guest, \"a\"",
        ".globl kvm_vmm_guest, kvm_vmm_guest_end",
        "kvm_vmm_guest:",
        "2:",
        "mov rax, rbx",
        "shl rax, 12",
        "add rax, rdi",
        "lea rcx, [rax + 4096]",
        // The version that the page must have.
        "xor r12d, r12d",
        "test bl, 3",
        "cmovz r12, r8",
        "test r14, r14",
        "cmovz r12, r14",
        "imul r12, r13",
        "3:",
        "mov rdx, rax",
        "sub rdx, rbp",
        "or rdx, 1",
        "imul rdx, r11",
        "xor rdx, r12",
        "cmp [rax], rdx",
        "je 4f",
        "inc r10",
        "4:",
        "add rax, 8",
        "cmp rax, rcx",
        "jb 3b",
        "test r14, r14",
        "jz 6f",
        "test bl, 3",
        "jnz 6f",
        // Rewrites it.
        "sub rax, 4096",
        "lea r15, [r8 + 1]",
        "imul r15, r13",
        "5:",
        "mov rdx, rax",
        "sub rdx, rbp",
        "or rdx, 1",
        "imul rdx, r11",
        "xor rdx, r15",
        "mov [rax], rdx",
        "add rax, 8",
        "cmp rax, rcx",
        "jb 5b",
        "6:",
        "inc rbx",
        "cmp rbx, rsi",
        "jb 2b",
        "xor ebx, ebx",
        "inc r8",
        "cmp r8, r9",
        "jb 2b",
        // Tells the host that it is done.
        "out 0x10, al",
        "7:",
        "jmp 7b",
        "kvm_vmm_guest_end:",
        ".popsection",
    );

    unsafe extern "C" {
        static kvm_vmm_guest: u8;
        static kvm_vmm_guest_end: u8;
    }

    /// The port by which the guest tells that it is done.
    pub(crate) const DONE: u16 = 0x10;

    /// Its bytes.
    pub(crate) fn bytes() -> &'static [u8] {
        // SAFETY: both symbols are in one read-only section, the first before the second, with nothing but code between.
        unsafe {
            let (start, end) = (addr_of!(kvm_vmm_guest), addr_of!(kvm_vmm_guest_end));
            std::slice::from_raw_parts(start, end.offset_from(start) as usize)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uffd_handler::memory::Kind;
    use uffd_handler::vmm::snapshot;

    #[test]
    fn a_guest_that_is_stopped_goes_on_and_finds_what_is_wrong() {
        let memory = snapshot(16 * 4096).expect("memory");
        let mut guest = State::new(0, 16, 3, true);
        let stop = AtomicBool::new(false);
        let done = AtomicBool::new(true);
        guest.run_here(&memory, &done);
        assert_eq!((guest.page, guest.pass), (0, 0));
        guest.run_here(&memory, &stop);
        assert!(guest.is_done());
        assert_eq!(guest.wrong, 0);

        // A page of the last version but one, and a word of a page that is never rewritten.
        memory.store(4 * 4096, word(4 * 4096, 2));
        memory.store(5 * 4096 + 8, 0);
        guest.passes += 1;
        guest.run_here(&memory, &stop);
        assert_eq!(guest.wrong, 2);
        assert!(Memory::new(Kind::Anonymous, 4096).is_ok());
    }
}
