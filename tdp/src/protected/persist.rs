//! Making a call of the hook until it is done or given up: what each failure obliges the MMU to do.
//!
//! Protocol. The caller owns the entry. Every answer that says "again" is met by the same call, after a wait that grows;
//! where vCPUs in the guest may be in the way, they are made to leave after a while. How long depends on what can be
//! undone: a fault gives up early and tries again from outside its critical section, a sweep late, and what follows a block
//! and its ticket never, because nothing undoes those but going on.

use super::{Failure, HandOffCause, HandOffStep, ProtectedTable, Scope, Ticket, Token};
use crate::frozen::FrozenEntry;
use crate::stats::{Stat, Tally};
use core::cell::Cell;
use tdp_rcu::sync::Pause;

/// How long a call is made again.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Inside a critical section: for some microseconds.
    Fault,
    /// For several bounded waits, about a second: no guest waits for a sweep, and a module that many threads call on a busy
    /// machine may be found busy a hundred times in a row.
    Sweep,
    /// Until it is done.
    Endless,
}

/// Calls that a fault makes again before it leaves its critical section.
const FAULT_TRIES: u32 = 12;

/// Bounded waits of a sweep before it gives up. Each begins by trying in quick succession.
const SWEEP_ROUNDS: u32 = if cfg!(loom) { 1 } else { 10 };

/// Makes calls and counts them.
pub(crate) struct Caller<'a, P, T> {
    pub(crate) table: &'a P,
    pub(crate) tally: &'a T,
    pub(crate) patience: Patience,
    /// Whether a call may be gone on with.
    pub(crate) resumable: bool,
}

impl<P: ProtectedTable, T: Tally> Caller<'_, P, T> {
    /// Makes `call` for `step` on `entry`.
    #[inline(always)]
    pub(crate) fn call(
        &self,
        step: HandOffStep,
        entry: &FrozenEntry<'_>,
        call: impl Fn() -> Result<(), Failure>,
    ) -> Result<(), HandOffCause> {
        self.tally.add(Stat::calls(step), 1);
        match call() {
            Ok(()) => Ok(()),
            Err(failure) => self.again(step, Some(entry), failure, &call),
        }
    }

    /// Begins a ticket.
    pub(crate) fn begin(
        &self,
        begin: &dyn Fn() -> Result<Ticket, Failure>,
    ) -> Result<Ticket, HandOffCause> {
        let ticket = Cell::new(None);
        let call = || begin().map(|begun| ticket.set(Some(begun)));
        self.tally.add(Stat::calls(HandOffStep::Flush), 1);
        if let Err(failure) = call() {
            self.again(HandOffStep::Flush, None, failure, &call)?;
        }
        ticket.into_inner().ok_or(HandOffCause::Fatal)
    }

    #[cold]
    #[inline(never)]
    fn again(
        &self,
        step: HandOffStep,
        entry: Option<&FrozenEntry<'_>>,
        failure: Failure,
        call: &dyn Fn() -> Result<(), Failure>,
    ) -> Result<(), HandOffCause> {
        let mut pause = Pause::new();
        let (mut tries, mut rounds) = (0u32, 0u32);
        let mut failure = failure;
        loop {
            match failure {
                Failure::Busy { .. } | Failure::NotDrained | Failure::Restart => {
                    self.tally.add(Stat::busy(step), 1);
                    tries = tries.saturating_add(1);
                    let over = match self.patience {
                        Patience::Fault => tries > FAULT_TRIES,
                        Patience::Sweep => rounds >= SWEEP_ROUNDS,
                        Patience::Endless => false,
                    };
                    if over {
                        return Err(HandOffCause::Busy);
                    }
                    let kick = matches!(
                        failure,
                        Failure::NotDrained
                            | Failure::Busy {
                                scope: Scope::Tree | Scope::Epoch | Scope::Vm
                            }
                    );
                    // Once it is clear that spinning does not help, and now and then after.
                    if kick && tries % 32 == 16 {
                        self.table.kick();
                    }
                    pause.wait();
                    if pause.is_over() {
                        pause = Pause::new();
                        rounds = rounds.saturating_add(1);
                    }
                }
                Failure::Incomplete(token) => {
                    let entry = entry
                        .filter(|_| self.resumable)
                        .ok_or(HandOffCause::Fatal)?;
                    return self.resume(entry, token);
                }
                Failure::NeedPages(pages) => {
                    tries = tries.saturating_add(1);
                    // A module that asks for ever is not believed for ever.
                    if tries > FAULT_TRIES {
                        return Err(HandOffCause::OutOfFrames);
                    }
                    self.table
                        .donate(pages)
                        .map_err(|_| HandOffCause::OutOfFrames)?;
                }
                Failure::Refused(code) => return Err(HandOffCause::Refused(code)),
                // Progress is reported by calls on many entries only.
                Failure::Partial(_) | Failure::Fatal => return Err(HandOffCause::Fatal),
            }
            self.tally.add(Stat::calls(step), 1);
            match call() {
                Ok(()) => return Ok(()),
                Err(next) => failure = next,
            }
        }
    }

    /// Goes on with a call that has begun: there is no way back, so it goes on until it is done.
    fn resume(&self, entry: &FrozenEntry<'_>, token: Token) -> Result<(), HandOffCause> {
        let mut pause = Pause::new();
        let mut token = token;
        loop {
            let number = token.0;
            match self.table.resume(entry, token) {
                Ok(()) => return Ok(()),
                Err(Failure::Incomplete(next)) => token = next,
                Err(Failure::Busy { .. } | Failure::NotDrained | Failure::Restart) => {
                    token = Token(number);
                    pause.wait();
                }
                Err(Failure::Refused(code)) => return Err(HandOffCause::Refused(code)),
                Err(_) => return Err(HandOffCause::Fatal),
            }
        }
    }
}
