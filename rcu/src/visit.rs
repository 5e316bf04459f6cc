//! Visits: the readers of the side that retires.
//!
//! A visit is a pin of the domain's own crossbeam-epoch collector by a participant of its own, which needs no
//! registration by the caller and no thread-local storage. It allocates (about two kilobytes) and may free garbage when it
//! begins; it is meant for sweeps, dumps and statistics, never for a fault.
//!
//! The epoch stage relies on crossbeam for this: what is deferred on a guard runs only after every participant that was
//! pinned at that moment has been unpinned or repinned. Garbage is deferred after it was unlinked, so a visit that could
//! have seen the link was pinned then, and one that pins later cannot see it.

use core::marker::PhantomData;

use crossbeam_epoch::{Collector, Guard, LocalHandle};

/// A pin that keeps what is reachable alive, for any thread. Ends when dropped.
///
/// What was read under it must not be used after it is dropped or repinned: tie such references to a borrow of the visit.
/// A visit that is forgotten holds up all garbage of the domain for ever, and leaks it in the end.
#[must_use = "a visit that is dropped at once protects nothing"]
pub struct Visit<'d> {
    // Both keep the participant registered; whichever is dropped last unregisters it.
    guard: Guard,
    _handle: LocalHandle,
    _own: Own,
    _domain: PhantomData<&'d ()>,
}

impl<'d> Visit<'d> {
    pub(crate) fn begin(collector: &'d Collector) -> Self {
        let handle = collector.register();
        Self {
            guard: handle.pin(),
            _handle: handle,
            _own: Own::begin(collector),
            _domain: PhantomData,
        }
    }

    /// Lets garbage go that was retired since the visit began or was last repinned: a yield point of a long sweep.
    /// Nothing read before may be used after.
    ///
    /// The epoch may be one ahead of the visit already, so it can take two of these until a given piece of garbage goes.
    pub fn repin(&mut self) {
        self.guard.repin();
    }
}

impl core::fmt::Debug for Visit<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Visit { .. }")
    }
}

/// Says so, in debug builds with std, when a thread is about to wait for a visit of its own.
pub(crate) fn forbid_own(collector: &Collector) {
    assert!(
        !Own::is_inside(collector),
        "a grace period was waited for inside a visit of the same thread"
    );
}

pub(crate) use own::Own;

#[cfg(all(debug_assertions, feature = "std", not(any(loom, shuttle))))]
mod own {
    //! Which collectors this thread visits. A visit cannot change threads.

    use core::cell::RefCell;
    use std::vec::Vec;

    use crossbeam_epoch::Collector;

    std::thread_local!(static VISITED: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) });

    pub(crate) struct Own(usize);

    impl Own {
        pub(super) fn begin(collector: &Collector) -> Self {
            let address = core::ptr::from_ref(collector).addr();
            VISITED.with_borrow_mut(|visited| visited.push(address));
            Self(address)
        }

        pub(super) fn is_inside(collector: &Collector) -> bool {
            let address = core::ptr::from_ref(collector).addr();
            VISITED.with_borrow(|visited| visited.contains(&address))
        }
    }

    impl Drop for Own {
        fn drop(&mut self) {
            // The thread may be ending, its list gone already.
            let _ = VISITED.try_with(|visited| {
                let mut visited = visited.borrow_mut();
                if let Some(at) = visited.iter().rposition(|&address| address == self.0) {
                    visited.swap_remove(at);
                }
            });
        }
    }
}

#[cfg(not(all(debug_assertions, feature = "std", not(any(loom, shuttle)))))]
mod own {
    use crossbeam_epoch::Collector;

    pub(crate) struct Own;

    impl Own {
        pub(super) fn begin(_collector: &Collector) -> Self {
            Self
        }

        pub(super) fn is_inside(_collector: &Collector) -> bool {
            false
        }
    }
}
