//! Tickets: the flush between block and removal, as types.
//!
//! Protocol. A ticket is made when a flush begins and consumed when it has drained, by the module that answers for it. What
//! comes out is the only way to a call that takes something away (INV: flush-before-reuse).

/// A flush of the protected table that has begun. Linear: there is no copy, and polling it to the end turns it into
/// [`Drained`].
#[derive(Debug)]
#[must_use = "what was blocked stays blocked until the ticket is drained"]
pub struct Ticket(u64);

impl Ticket {
    /// A ticket that the module knows by `number`.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Its number.
    pub const fn number(&self) -> u64 {
        self.0
    }

    /// Says that no vCPU holds a translation from before the ticket. For implementations of
    /// [`ProtectedTable::flush_poll`](super::ProtectedTable::flush_poll).
    pub const fn drained(self) -> Drained {
        Drained(())
    }
}

/// Proof that a ticket has drained which began after whatever is to be taken away was blocked.
///
/// ```compile_fail
/// # use tdp::protected::{Drained, ProtectedTable};
/// # use tdp::{FrozenEntry, Pfn};
/// fn removal_without_a_ticket(table: &impl ProtectedTable, entry: &FrozenEntry<'_>) {
///     let _ = table.remove(entry, Pfn(0)); // no finished ticket: does not compile
/// }
/// ```
///
/// ```compile_fail
/// let forged = tdp::protected::Drained(()); // nor can one be made
/// ```
#[derive(Debug)]
pub struct Drained(());

impl Drained {
    /// For modules that flush inside their calls.
    pub(crate) const fn internal() -> Self {
        Self(())
    }
}
