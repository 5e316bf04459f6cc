//! The fence between announcing a section and walking, and the one between unlinking and looking for sections.
//!
//! The two are partners: of any pair, one comes first in a total order. If the section's does, the retire side sees the
//! section announced; if the retire side's does, the section sees the unlinking (both interleavings are told at the head
//! of `section.rs`). There are two ways to get there:
//!
//! * **symmetric**: both are `fence(SeqCst)`. Right everywhere; costs a section as much as a compare-exchange.
//! * **asymmetric**: the section's is nothing but a compiler fence, and the retire side's makes every running thread of
//!   the process execute a full barrier (`membarrier(2)`, private expedited). A thread that is interrupted so has either
//!   made its announcing store visible before the retire side goes on, or has it still ahead of it, and then all its
//!   loads too. A thread that is not running passed a full barrier when it was switched out.
//!
//! Sections are entered hundreds of millions of times a second, grace periods are rare: the side that retires pays. But it
//! pays dearly, and where grace periods are *not* rare, it is cheaper to have the sections pay. So an asymmetric domain goes
//! over to fences for a while: a reader owes a number of fences, counted in its own line.
//!
//! ```text
//!   section   word = odd                       retire side   unlink; fence(SeqCst)
//!             if owed != 0: fence,                           lock
//!                 owed -= 1; was it the last?                for each reader: owed == 0? owed = FENCES
//!                 fence once more                            any that owed none? membarrier
//!             walk                                           unlock; look at the words
//! ```
//!
//! A retire side that finds fences owed does without the barrier for that reader, and is right to:
//!
//! * The debt was imposed by a retire side that still held the lock while its barrier passed. A section that saw no debt was
//!   announced, visibly to all, when that barrier had passed; each later one sees the debt and fences.
//! * A debt that was found was not paid off before the fence that follows the unlinking: the reader fences once more after
//!   it has stored the 0, so had that fence come first, the 0 would have been found. So it comes second, and every section
//!   without a fence of its own, which is after it, sees the unlinking.
//! * Nobody loses what another wrote: the retire side writes only over 0, and the reader never does.
//!
//! A retire side that comes again within [`FENCES`] sections of a reader interrupts nobody, nor does one that meets only
//! readers which have not entered a section since; a reader left in peace for as long pays nothing again.
//!
//! A domain chooses whether it can go over at all when it is made: a section and a scan must not choose differently. The
//! asymmetric way needs `membarrier` for as long as the domain lives; a process that forbids itself the call later (seccomp)
//! is aborted at the next grace period that wants it.
//!
//! On x86-64 the fence of a section is an exchange of its word for the same word: with memory, that is a full barrier, and
//! two thirds of the price of a locked operation elsewhere.

// UNSAFETY: a system call and an instruction.
#![cfg_attr(not(any(loom, shuttle, miri)), allow(unsafe_code))]

use crate::sync::{AtomicU64, Mutex, Ordering, fence};

pub(crate) use imp::can_be_asymmetric;

/// Fences that a reader owes once a grace period has found it owing none. What they cost the reader, about 20 microseconds,
/// is what the barrier would have cost the retire side and the threads it interrupts, to a factor of two or three: no
/// pattern of grace periods makes either way much dearer than the better one.
const FENCES: u64 = 1 << 12;
/// What a reader of a symmetric domain owes for ever.
const ALL: u64 = u64::MAX;

/// The section's side: how many fences its reader owes. In the reader's own line.
pub(crate) struct Debt(AtomicU64);

impl Debt {
    pub(crate) fn new(asymmetric: bool) -> Self {
        Self(AtomicU64::new(if asymmetric { 0 } else { ALL }))
    }

    /// Announces a section by its word, with the section's fence after it. The caller is the reader. The store is Release.
    #[inline(always)]
    pub(crate) fn announce(&self, word: &AtomicU64, inside: u64) {
        word.store(inside, Ordering::Release);
        // After the store: a barrier of the retire side that comes between the two makes the store visible before it shows
        // the debt.
        crate::sync::compiler_fence(Ordering::SeqCst);
        // Relaxed: the barrier that follows its store orders it.
        let owed = self.0.load(Ordering::Relaxed);
        if owed != 0 {
            full_fence(word, inside);
            if owed != ALL {
                self.pay(owed);
            }
        }
    }

    /// Takes one off the debt.
    #[cold]
    fn pay(&self, owed: u64) {
        let owed = owed - 1;
        self.0.store(owed, Ordering::Relaxed);
        if owed == 0 {
            // Partner of the fence in `Fences::order`: whoever still finds the debt fenced before this.
            fence(Ordering::SeqCst);
        }
    }
}

/// The retire side of a domain.
pub(crate) struct Fences {
    asymmetric: bool,
    /// How many a reader is made to owe.
    imposed: u64,
    /// Held by the one that imposes debts, until its barrier has passed.
    imposing: Mutex<()>,
}

impl Fences {
    pub(crate) fn new(asymmetric: bool) -> Self {
        Self {
            asymmetric,
            imposed: FENCES,
            imposing: Mutex::new(()),
        }
    }

    /// With debts that are paid off soon.
    #[cfg(all(test, feature = "std", not(any(loom, shuttle))))]
    pub(crate) fn imposing(self, imposed: u64) -> Self {
        Self { imposed, ..self }
    }

    pub(crate) fn are_asymmetric(&self) -> bool {
        self.asymmetric
    }

    /// The fence between an unlinking and the look at the words of the readers whose debts these are.
    pub(crate) fn order<'a>(&self, debts: impl Iterator<Item = &'a Debt>) {
        fence(Ordering::SeqCst);
        if !self.asymmetric {
            return;
        }
        let _imposing = self.imposing.lock();
        let mut wanted = false;
        for Debt(owed) in debts {
            // Relaxed: ordered by the fence above, and a debt of others by their barrier and the lock.
            if owed.load(Ordering::Relaxed) == 0 {
                owed.store(self.imposed, Ordering::Relaxed);
                wanted = true;
            }
        }
        if wanted {
            imp::everywhere();
        }
    }
}

#[cfg(all(target_arch = "x86_64", not(any(loom, shuttle, miri))))]
#[inline(always)]
fn full_fence(word: &AtomicU64, inside: u64) {
    // SAFETY: stores to an atomic that is borrowed what its one writer has just stored, and is to the compiler what the other
    // form is, a SeqCst fence: it touches memory, so the compiler moves no access across; the processor moves none across an
    // exchange.
    unsafe {
        core::arch::asm!(
            "xchg qword ptr [{word}], {inside}",
            word = in(reg) word.as_ptr(),
            inside = inout(reg) inside => _,
            options(nostack, preserves_flags),
        );
    }
}

#[cfg(not(all(target_arch = "x86_64", not(any(loom, shuttle, miri)))))]
#[inline(always)]
fn full_fence(_word: &AtomicU64, _inside: u64) {
    fence(Ordering::SeqCst);
}

#[cfg(all(feature = "std", target_os = "linux", not(any(loom, shuttle, miri))))]
mod imp {
    use std::sync::OnceLock;

    static ASYMMETRIC: OnceLock<bool> = OnceLock::new();

    fn membarrier(command: libc::c_int) -> bool {
        // SAFETY: takes three integers and touches no memory of this process.
        unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
    }

    /// Whether this process can take the asymmetric way.
    pub(crate) fn can_be_asymmetric() -> bool {
        *ASYMMETRIC.get_or_init(|| membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED))
    }

    /// A full barrier in every running thread of the process.
    pub(crate) fn everywhere() {
        if !membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED) {
            // Registered, so the kernel has no reason to refuse. Going on without the barrier would free memory under
            // a reader; there is no other way to stop.
            std::process::abort();
        }
    }
}

#[cfg(not(all(feature = "std", target_os = "linux", not(any(loom, shuttle, miri)))))]
mod imp {
    /// Whether this process can take the asymmetric way.
    pub(crate) fn can_be_asymmetric() -> bool {
        false
    }

    /// Never called: no domain is asymmetric.
    pub(crate) fn everywhere() {}
}

#[cfg(all(test, feature = "std", not(any(loom, shuttle, miri))))]
mod tests;
