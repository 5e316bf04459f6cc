//! Locks as the module has them: tried, never waited for.
//!
//! Protocol. A [`ShareLock`] is held by any number of calls shared or by one exclusively; whoever cannot have it at once
//! gives up, and the call answers `OPERAND_BUSY` with the operand that the lock stands for. An [`EntryLock`] is two bits
//! of the Secure-EPT entry itself: *locked*, and *host priority*, which a host sets when it is refused. A guest that wins
//! the lock but finds host priority set gives it back; the next host that wins clears it. So a host that was refused must
//! come back, or the guest never gets this entry again.
//!
//! Guards release on drop, so that a panic inside a call leaves no lock behind.

use super::state::{Entry, HOST_PRIORITY, LOCKED};
use super::status::Status;
use tdp_rcu::sync::{AtomicU32, AtomicU64, Ordering};

/// How a [`ShareLock`] is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    Shared,
    Exclusive,
}

const EXCLUSIVE: u32 = 1;
const READER: u32 = 2;

/// A lock for many or for one.
#[derive(Debug)]
pub(crate) struct ShareLock(AtomicU32);

impl ShareLock {
    pub(crate) fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Takes the lock if it is to be had now.
    pub(crate) fn try_lock(&self, mode: Mode) -> Option<Held<'_>> {
        let taken = match mode {
            Mode::Shared => self.try_shared(),
            // Acquire: pairs with the Release of whoever held it before.
            Mode::Exclusive => self
                .0
                .compare_exchange(0, EXCLUSIVE, Ordering::Acquire, Ordering::Relaxed)
                .is_ok(),
        };
        // Lazily: a guard that is made is dropped, and would release what it does not hold.
        taken.then(|| Held { lock: self, mode })
    }

    fn try_shared(&self) -> bool {
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            if word & EXCLUSIVE != 0 {
                return false;
            }
            // Acquire: pairs with the Release of the last exclusive holder. A loser lost to another reader that got in
            // or out, so this ends.
            match self.0.compare_exchange_weak(
                word,
                word + READER,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return true,
                Err(found) => word = found,
            }
        }
    }

    /// Gives up one hold. The caller has it: from a guard that it forgot.
    pub(crate) fn release(&self, mode: Mode) {
        let held = match mode {
            Mode::Shared => READER,
            Mode::Exclusive => EXCLUSIVE,
        };
        // Release: pairs with the Acquire of whoever takes it next.
        self.0.fetch_sub(held, Ordering::Release);
    }
}

/// A hold on a [`ShareLock`].
#[derive(Debug)]
pub(crate) struct Held<'a> {
    lock: &'a ShareLock,
    mode: Mode,
}

impl Held<'_> {
    /// Keeps the lock beyond the guard; [`ShareLock::release`] gives it up.
    pub(crate) fn forget(self) {
        core::mem::forget(self);
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.lock.release(self.mode);
    }
}

/// The lock of a Secure-EPT entry, held.
#[derive(Debug)]
pub(crate) struct EntryLock<'a> {
    word: &'a AtomicU64,
}

impl<'a> EntryLock<'a> {
    /// Takes it for the host. A host that is refused leaves word that it was here.
    pub(crate) fn host(word: &'a AtomicU64) -> Option<Self> {
        // Acquire: pairs with the Release of the previous holder.
        if word.fetch_or(LOCKED, Ordering::Acquire) & LOCKED != 0 {
            word.fetch_or(HOST_PRIORITY, Ordering::Relaxed);
            return None;
        }
        word.fetch_and(!HOST_PRIORITY, Ordering::Relaxed);
        Some(Self { word })
    }

    /// Takes it for the guest.
    ///
    /// # Errors
    ///
    /// The status to answer: held, or free but a host comes first.
    pub(crate) fn guest(word: &'a AtomicU64) -> Result<Self, Status> {
        // Acquire: pairs with the Release of the previous holder.
        let found = word.fetch_or(LOCKED, Ordering::Acquire);
        if found & LOCKED != 0 {
            return Err(Status::OperandBusy);
        }
        let lock = Self { word };
        if found & HOST_PRIORITY != 0 {
            return Err(Status::OperandBusyHostPriority);
        }
        Ok(lock)
    }

    /// The entry, which nobody else can change now.
    pub(crate) fn entry(&self) -> Entry {
        Entry(self.word.load(Ordering::Relaxed)).unlocked()
    }

    /// Replaces the entry. It stays locked until the guard is dropped, and keeps the word of a host that was refused.
    pub(crate) fn commit(&self, new: Entry) {
        let mut found = self.word.load(Ordering::Relaxed);
        loop {
            let next = new.unlocked().0 | LOCKED | (found & HOST_PRIORITY);
            // Release: pairs with the Acquire loads of walks, which then see the table behind the entry initialised.
            // Only a refused host changes the word of a locked entry, and only once, so this ends.
            match self
                .word
                .compare_exchange(found, next, Ordering::Release, Ordering::Relaxed)
            {
                Ok(_) => return,
                Err(other) => found = other,
            }
        }
    }
}

impl Drop for EntryLock<'_> {
    fn drop(&mut self) {
        // Release: pairs with the Acquire of the next holder.
        self.word.fetch_and(!LOCKED, Ordering::Release);
    }
}
