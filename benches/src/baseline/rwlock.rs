//! KVM's shape: entries change by compare-exchange under a reader-writer lock that every fault takes for reading.
//!
//! As in KVM the slot and the host frame are looked up before the lock, staleness is checked under it, and the number
//! of mapped pages is one counter that all vCPUs add to. Unlike KVM's the tables are never freed, so there is no RCU
//! section inside the lock.
//!
//! A sweep takes the lock for writing and lets go of it between two tables if somebody waits, as KVM does where it
//! zaps, clears dirty bits by masks and, until Linux 6.15, ages.

use super::host::{Counters, Host};
use super::tree::{Stuck, Tree};
use super::{Memory, Setup, left, swept_by_processor, tables, translate};
use crate::ours::Walked;
use crate::race::{Contender, Translation};
use crate::report::Error;
use crate::sweeping::{Kind, Sweep, Sweeping};
use crate::sync::{AtomicU64, Ordering, Padded};
use parking_lot::{RwLock, RwLockWriteGuard};
use tdp_arch::walker::{GuestAccess, WalkError, Walker};
use tdp_arch::{Access, Format, Gfn, GfnRange, Gpa, Level, Pfn};

/// See the module.
#[derive(Debug)]
pub struct ReaderWriter<F, const ROOT: u8> {
    host: Host,
    tree: Padded<RwLock<Tree<F, ROOT>>>,
    /// Leaves mapped, by level; one line for all, as in KVM.
    pages: Padded<[AtomicU64; 3]>,
    leaf: Level,
    memory: Memory,
}

impl<F: Format, const ROOT: u8> ReaderWriter<F, ROOT> {
    /// An empty table.
    ///
    /// # Errors
    ///
    /// If the memory is not there.
    pub fn new(setup: &Setup) -> Result<Self, Error> {
        let tree = setup.tree()?;
        Ok(Self {
            host: Host::new(setup.backing),
            memory: Memory::of(&tree),
            tree: Padded(RwLock::new(tree)),
            pages: Padded::default(),
            leaf: setup.backing.level,
        })
    }
}

impl<F: Format, const ROOT: u8> Contender for ReaderWriter<F, ROOT> {
    type Worker = Counters;
    type Failure = Stuck;

    fn worker(&self) -> Result<Counters, Error> {
        Ok(Counters::default())
    }

    #[inline(always)]
    fn resolve(&self, worker: &mut Counters, gfn: Gfn) -> Result<(), Stuck> {
        loop {
            let seen = self.host.invalidations();
            let slot = self.host.slot(gfn)?;
            let pfn = slot.pfn_of(gfn);
            let tree = self.tree.0.read();
            if self.host.is_stale(seen) {
                continue;
            }
            let level = slot.largest(gfn);
            let table = tree.descend(gfn, level, Ordering::Acquire)?;
            let old = table.get(gfn, Ordering::Acquire);
            if F::is_leaf(old, level) && F::allows(old, Access::Write) {
                worker.spurious += 1;
                return Ok(());
            }
            if table.compare_exchange(gfn, old, Pfn(pfn.0 & !(level.pages() - 1))) {
                self.pages.0[usize::from(level.number() - 1)].fetch_add(1, Ordering::Relaxed);
                worker.fixed += 1;
                return Ok(());
            }
        }
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.tree.0.get_mut().clear_leaves(self.leaf);
        Ok(())
    }

    fn translate(&self, gfn: Gfn) -> Option<Translation> {
        translate(&self.tree.0.read(), gfn)
    }
}

impl<F: Walked, const ROOT: u8> Sweeping for ReaderWriter<F, ROOT> {
    swept_by_processor!();

    fn sweep<K: Kind>(&self, gfns: GfnRange) -> Result<(), Error> {
        let mut tree = self.tree.0.write();
        for part in tables(gfns) {
            tree.small_tables(part, |table, part| {
                let changed = table.sweep(part, K::change::<F>);
                if K::SWEEP == Sweep::Zap {
                    self.pages.0[0].fetch_sub(changed, Ordering::Relaxed);
                }
            });
            RwLockWriteGuard::bump(&mut tree);
        }
        Ok(())
    }

    fn left<K: Kind>(&self, gfns: GfnRange) -> u64 {
        left::<F, K, ROOT>(&self.tree.0.read(), gfns)
    }
}
