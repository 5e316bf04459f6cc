//! Plain tables under one mutex: what one writes first.
//!
//! The whole fault runs under the lock: slot, staleness, level, walk, install, statistics. Entries are loaded and
//! stored without any ordering of their own.

use super::host::{Counters, Host};
use super::tree::{Stuck, Tree};
use super::{Setup, translate};
use crate::race::{Contender, Translation};
use crate::report::Error;
use crate::sync::Ordering;
use parking_lot::Mutex;
use tdp_arch::{Access, Format, Gfn, Level};

/// See the module.
#[derive(Debug)]
pub struct OneMutex<F, const ROOT: u8> {
    host: Host,
    state: Mutex<State<F, ROOT>>,
    leaf: Level,
}

/// What the lock protects.
#[derive(Debug)]
struct State<F, const ROOT: u8> {
    tree: Tree<F, ROOT>,
    /// Leaves mapped, by level.
    pages: [u64; 3],
}

impl<F: Format, const ROOT: u8> OneMutex<F, ROOT> {
    /// An empty table.
    ///
    /// # Errors
    ///
    /// If the memory is not there.
    pub fn new(setup: &Setup) -> Result<Self, Error> {
        let state = Mutex::new(State {
            tree: setup.tree()?,
            pages: [0; 3],
        });
        Ok(Self {
            host: Host::new(setup.backing),
            state,
            leaf: setup.backing.level,
        })
    }
}

impl<F: Format, const ROOT: u8> Contender for OneMutex<F, ROOT> {
    type Worker = Counters;
    type Failure = Stuck;

    fn worker(&self) -> Result<Counters, Error> {
        Ok(Counters::default())
    }

    #[inline(always)]
    fn resolve(&self, worker: &mut Counters, gfn: Gfn) -> Result<(), Stuck> {
        loop {
            let seen = self.host.invalidations();
            let state = &mut *self.state.lock();
            let slot = self.host.slot(gfn)?;
            let pfn = slot.pfn_of(gfn);
            if self.host.is_stale(seen) {
                continue;
            }
            let level = slot.largest(gfn);
            let table = state.tree.descend(gfn, level, Ordering::Relaxed)?;
            let old = table.get(gfn, Ordering::Relaxed);
            if F::is_leaf(old, level) && F::allows(old, Access::Write) {
                worker.spurious += 1;
                return Ok(());
            }
            table.set(
                gfn,
                tdp_arch::Pfn(pfn.0 & !(level.pages() - 1)),
                Ordering::Relaxed,
            );
            state.pages[usize::from(level.number() - 1)] += 1;
            worker.fixed += 1;
            return Ok(());
        }
    }

    fn reset(&mut self) -> Result<(), Error> {
        let state = self.state.get_mut();
        state.tree.clear_leaves(self.leaf);
        state.pages = [0; 3];
        Ok(())
    }

    fn translate(&self, gfn: Gfn) -> Option<Translation> {
        translate(&self.state.lock().tree, gfn)
    }
}
