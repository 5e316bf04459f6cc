//! The ticket desk: one flush of the protected table at a time, shared by all who wait for one.
//!
//! Protocol. Tickets are numbered. Whoever has blocked something takes the number of the *next* ticket to begin, because
//! the running one may have begun before the block. Then it either finds that ticket drained, or tends the desk itself:
//! begins the next ticket and polls it to the end. So any number of threads that block at the same time wait for two
//! tickets at most, and the module never sees a second ticket while one is out. A module that can have several out at a time
//! needs no desk: each thread begins its own and waits for nobody else.
//!
//! Waiting here while entries are frozen is safe: the tender waits for vCPUs in the guest, which wait for nobody.

use super::{Drained, Failure, HandOffCause, ProtectedTable, Ticket};
use tdp_rcu::sync::{AtomicBool, AtomicU64, Ordering, Pause, Plain};

#[derive(Debug)]
pub(crate) struct Desk {
    begun: AtomicU64,
    drained: AtomicU64,
    tended: AtomicBool,
    /// Times that a thread waited for a ticket which another tended.
    waits: Plain,
}

impl Desk {
    pub(crate) fn new() -> Self {
        Self {
            begun: AtomicU64::new(0),
            drained: AtomicU64::new(0),
            tended: AtomicBool::new(false),
            waits: Plain::new(0),
        }
    }

    /// Times so far that a thread had to wait for a ticket which another tended.
    pub(crate) fn waits(&self) -> u64 {
        self.waits.get()
    }

    /// Returns when a ticket that began after the call has drained. `persist` makes the calls that begin one.
    pub(crate) fn drain<P: ProtectedTable>(
        &self,
        table: &P,
        begin: impl Fn(&dyn Fn() -> Result<Ticket, Failure>) -> Result<Ticket, HandOffCause>,
    ) -> Result<Drained, HandOffCause> {
        // A read-modify-write although nothing changes: Release puts the caller's blocks before the ticket of the number
        // that it will wait for, whose tender's increment comes later in the same chain.
        let wanted = self.begun.fetch_add(0, Ordering::AcqRel) + 1;
        let mut pause = Pause::new();
        let mut waited = false;
        loop {
            // Acquire: pairs with the Release of the tender.
            if self.drained.load(Ordering::Acquire) >= wanted {
                return Ok(Drained::internal());
            }
            // Looked at first: whoever waits writes nothing.
            if !self.tended.load(Ordering::Relaxed) && !self.tended.swap(true, Ordering::Acquire) {
                let tender = Tender(self);
                if self.drained.load(Ordering::Acquire) < wanted {
                    return tender.run(table, begin);
                }
            }
            if !waited {
                waited = true;
                self.waits.add_shared(1);
            }
            pause.wait();
        }
    }
}

/// Polls a ticket to the end. Vcpus that do not leave the guest are kicked now and then.
fn poll<P: ProtectedTable>(table: &P, mut ticket: Ticket) -> Drained {
    let mut pause = Pause::new();
    loop {
        match table.flush_poll(ticket) {
            Ok(drained) => return drained,
            Err(again) => ticket = again,
        }
        pause.wait();
        if pause.is_over() {
            table.kick();
            pause = Pause::new();
        }
    }
}

/// A ticket of one's own, past the desk.
pub(crate) fn drain_alone<P: ProtectedTable>(
    table: &P,
    begin: impl Fn(&dyn Fn() -> Result<Ticket, Failure>) -> Result<Ticket, HandOffCause>,
) -> Result<Drained, HandOffCause> {
    begin(&|| table.flush_begin()).map(|ticket| poll(table, ticket))
}

/// Tends the desk; leaves it when dropped, by unwinding too.
struct Tender<'a>(&'a Desk);

impl Tender<'_> {
    fn run<P: ProtectedTable>(
        &self,
        table: &P,
        begin: impl Fn(&dyn Fn() -> Result<Ticket, Failure>) -> Result<Ticket, HandOffCause>,
    ) -> Result<Drained, HandOffCause> {
        let number = self.0.begun.fetch_add(1, Ordering::AcqRel) + 1;
        let drained = drain_alone(table, begin)?;
        self.0.drained.store(number, Ordering::Release);
        Ok(drained)
    }
}

impl Drop for Tender<'_> {
    fn drop(&mut self) {
        self.0.tended.store(false, Ordering::Release);
    }
}
