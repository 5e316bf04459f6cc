//! Visits: the readers of the side that retires.
//!
//! A visit is a pin of the domain's own crossbeam-epoch collector by a participant of its own, which needs no
//! registration by the caller and no thread-local storage. It allocates (about two kilobytes) and may free garbage when it
//! begins; it is meant for sweeps, dumps and statistics, never for a fault.

use core::marker::PhantomData;

use crossbeam_epoch::{Collector, Guard, LocalHandle};

/// A pin that keeps what is reachable alive, for any thread. Ends when dropped.
#[must_use = "a visit that is dropped at once protects nothing"]
pub struct Visit<'d> {
    // Both keep the participant registered; whichever is dropped last unregisters it.
    guard: Guard,
    _handle: LocalHandle,
    _domain: PhantomData<&'d ()>,
}

impl<'d> Visit<'d> {
    pub(crate) fn begin(collector: &'d Collector) -> Self {
        let handle = collector.register();
        Self {
            guard: handle.pin(),
            _handle: handle,
            _domain: PhantomData,
        }
    }

    /// Lets garbage go that was retired since the visit began or was last repinned: a yield point of a long sweep.
    /// Nothing read before may be used after.
    pub fn repin(&mut self) {
        self.guard.repin();
    }
}

impl core::fmt::Debug for Visit<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Visit { .. }")
    }
}
