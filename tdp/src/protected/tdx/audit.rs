//! The audit log: calls that a correct host never makes.
//!
//! Protocol. Every host call that is refused is judged. What a correct host meets is not noted: locks, interrupts, a
//! TRACK or a removal that has to wait for vCPUs. All else is: a wrong state, a wrong page, a walk that ends early, a
//! removal without a TRACK since the block. What the guest does wrong is not the host's fault, nor is that some pages of a
//! table to be merged are accepted and others are not; injected refusals are nobody's. The number is exact; of the notes
//! themselves only the first [`KEPT`] are kept.

use super::calls::Call;
use super::status::{Answer, Refusal};
use alloc::vec::Vec;
use core::fmt;
use tdp_arch::Hpa;
use tdp_rcu::sync::{Mutex, Plain};

/// Notes that are kept.
pub const KEPT: usize = 1024;

/// A call that a correct host never makes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Violation {
    /// The call.
    pub call: Call,
    /// Root page of the TD.
    pub td: Hpa,
    /// What was given beside the TD: the entry or the page it is about, then the page that was given to the TD; 0 where
    /// there is none.
    pub operands: [u64; 2],
    /// What was answered.
    pub answer: Answer,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, second] = self.operands;
        write!(
            f,
            "{}({first:#x}, {second:#x}) of TD {} -> {}",
            self.call, self.td, self.answer
        )
    }
}

/// What was noted, over all TDs of a module.
#[derive(Debug, Default)]
pub(crate) struct Log {
    count: Plain,
    notes: Mutex<Vec<Violation>>,
}

impl Log {
    pub(crate) fn judge(&self, refusal: &Refusal, violation: Violation) {
        let excused = refusal.of_guest || refusal.status.is_transient() && !refusal.out_of_order;
        if !violation.call.is_of_host() || excused {
            return;
        }
        self.count.add_shared(1);
        let mut notes = self.notes.lock();
        if notes.len() < KEPT {
            notes.push(violation);
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.count.get()
    }

    pub(crate) fn notes(&self) -> Vec<Violation> {
        self.notes.lock().clone()
    }

    pub(crate) fn take(&self) -> Vec<Violation> {
        let mut notes = self.notes.lock();
        self.count.set(0);
        core::mem::take(&mut *notes)
    }
}
