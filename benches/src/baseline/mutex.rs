//! Plain tables under one mutex: what one writes first.
//!
//! The whole fault runs under the lock: slot, staleness, level, walk, install, statistics. Entries are loaded and
//! stored without any ordering of their own. A sweep takes the lock and lets go of it between two tables if somebody waits;
//! only there are entries exchanged, because the processor sets bits without asking for the lock.

use super::host::{Counters, Host};
use super::tree::{Stuck, Tree};
use super::{Memory, Setup, left, swept_by_processor, tables, translate};
use crate::ours::Walked;
use crate::race::{Contender, Translation};
use crate::report::Error;
use crate::sweeping::{Kind, Sweep, Sweeping};
use crate::sync::Ordering;
use parking_lot::{Mutex, MutexGuard};
use tdp_arch::walker::{GuestAccess, WalkError, Walker};
use tdp_arch::{Access, Format, Gfn, GfnRange, Gpa, Level};

/// See the module.
#[derive(Debug)]
pub struct OneMutex<F, const ROOT: u8> {
    host: Host,
    state: Mutex<State<F, ROOT>>,
    leaf: Level,
    memory: Memory,
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
        let tree = setup.tree()?;
        let memory = Memory::of(&tree);
        let state = Mutex::new(State {
            tree,
            pages: [0; 3],
        });
        Ok(Self {
            host: Host::new(setup.backing),
            state,
            memory,
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

impl<F: Walked, const ROOT: u8> Sweeping for OneMutex<F, ROOT> {
    swept_by_processor!();

    fn sweep<K: Kind>(&self, gfns: GfnRange) -> Result<(), Error> {
        let mut guard = self.state.lock();
        for part in tables(gfns) {
            let state = &mut *guard;
            state.tree.small_tables(part, |table, part| {
                let changed = table.sweep(part, K::change::<F>);
                if K::SWEEP == Sweep::Zap {
                    state.pages[0] = state.pages[0].wrapping_sub(changed);
                }
            });
            MutexGuard::bump(&mut guard);
        }
        Ok(())
    }

    fn left<K: Kind>(&self, gfns: GfnRange) -> u64 {
        left::<F, K, ROOT>(&self.state.lock().tree, gfns)
    }
}
