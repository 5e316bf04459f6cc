//! CortenMM's shape: walk without locks, take the lock of the table page that holds the entry, check that the page is
//! still part of the tree, store, unlock.
//!
//! In CortenMM the walk runs in an RCU section; here tables are never freed and the walk needs none. The locks lie in
//! metadata beside the tables, a cache line each. A sweep takes the lock of each table once for all of its entries.

use super::host::{Counters, Host};
use super::tree::{Stuck, Tree};
use super::{Memory, Setup, left, swept_by_processor, translate};
use crate::ours::Walked;
use crate::race::{Contender, Translation};
use crate::report::Error;
use crate::sweeping::{Kind, Sweeping};
use crate::sync::Ordering;
use parking_lot::Mutex;
use tdp_arch::walker::{GuestAccess, WalkError, Walker};
use tdp_arch::{Access, Format, Gfn, GfnRange, Gpa, Level, Pfn};

/// Metadata of one table page.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Meta {
    /// Whether the page has left the tree; held while an entry changes.
    stray: Mutex<bool>,
}

/// See the module.
#[derive(Debug)]
pub struct TableLock<F, const ROOT: u8> {
    host: Host,
    tree: Tree<F, ROOT>,
    meta: Vec<Meta>,
    leaf: Level,
    memory: Memory,
}

impl<F: Format, const ROOT: u8> TableLock<F, ROOT> {
    /// An empty table.
    ///
    /// # Errors
    ///
    /// If the memory is not there.
    pub fn new(setup: &Setup) -> Result<Self, Error> {
        let tree = setup.tree::<F, ROOT>()?;
        let meta = (0..tree.arena().pages()).map(|_| Meta::default()).collect();
        Ok(Self {
            host: Host::new(setup.backing),
            memory: Memory::of(&tree),
            tree,
            meta,
            leaf: setup.backing.level,
        })
    }
}

impl<F: Format, const ROOT: u8> Contender for TableLock<F, ROOT> {
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
            let level = slot.largest(gfn);
            let table = self.tree.descend(gfn, level, Ordering::Acquire)?;
            let stray = self.meta[self.tree.number(table)].stray.lock();
            if *stray || self.host.is_stale(seen) {
                continue;
            }
            let old = table.get(gfn, Ordering::Relaxed);
            if F::is_leaf(old, level) && F::allows(old, Access::Write) {
                worker.spurious += 1;
                return Ok(());
            }
            table.set(gfn, Pfn(pfn.0 & !(level.pages() - 1)), Ordering::Relaxed);
            worker.pages[usize::from(level.number() - 1)] += 1;
            worker.fixed += 1;
            return Ok(());
        }
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.tree.clear_leaves(self.leaf);
        Ok(())
    }

    fn translate(&self, gfn: Gfn) -> Option<Translation> {
        translate(&self.tree, gfn)
    }
}

impl<F: Walked, const ROOT: u8> Sweeping for TableLock<F, ROOT> {
    swept_by_processor!();

    fn sweep<K: Kind>(&self, gfns: GfnRange) -> Result<(), Error> {
        self.tree.small_tables(gfns, |table, part| {
            let stray = self.meta[self.tree.number(table)].stray.lock();
            if !*stray {
                table.sweep(part, K::change::<F>);
            }
        });
        Ok(())
    }

    fn left<K: Kind>(&self, gfns: GfnRange) -> u64 {
        left::<F, K, ROOT>(&self.tree, gfns)
    }
}
