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
//!   loads too. A thread that is not running passed a full barrier when it was switched out. Sections are entered
//!   hundreds of millions of times a second, grace periods are rare: the side that retires pays.
//!
//! A domain chooses its way when it is made and never changes it: a section and a scan must not choose differently. The
//! symmetric way is the default. The other makes a section cheaper by about the price of a compare-exchange, but interrupts
//! every processor that runs a thread of the process, one in guest mode included, for each grace period: microseconds
//! where the symmetric way takes a fraction of one. It also needs `membarrier` for as long as the domain lives; a process
//! that forbids itself the call later (seccomp) is aborted at the next grace period.

// UNSAFETY: a system call.
#![cfg_attr(
    all(feature = "std", target_os = "linux", not(any(loom, miri))),
    allow(unsafe_code)
)]

use crate::sync::{Ordering, fence};

pub(crate) use imp::{can_be_asymmetric, heavy};

/// The section's fence. `asymmetric` is the way of the domain.
#[inline(always)]
pub(crate) fn light(asymmetric: bool) {
    if asymmetric {
        crate::sync::compiler_fence(Ordering::SeqCst);
    } else {
        fence(Ordering::SeqCst);
    }
}

#[cfg(all(feature = "std", target_os = "linux", not(any(loom, miri))))]
mod imp {
    use super::{Ordering, fence};
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

    /// The retire side's fence.
    pub(crate) fn heavy(asymmetric: bool) {
        fence(Ordering::SeqCst);
        if asymmetric && !membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED) {
            // Registered, so the kernel has no reason to refuse. Going on without the barrier would free memory under
            // a reader; there is no other way to stop.
            std::process::abort();
        }
    }
}

#[cfg(not(all(feature = "std", target_os = "linux", not(any(loom, miri)))))]
mod imp {
    use super::{Ordering, fence};

    /// Whether this process can take the asymmetric way.
    pub(crate) fn can_be_asymmetric() -> bool {
        false
    }

    /// The retire side's fence.
    pub(crate) fn heavy(_asymmetric: bool) {
        fence(Ordering::SeqCst);
    }
}
