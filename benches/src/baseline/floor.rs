//! The floor: a raw walk and one compare-exchange.
//!
//! Every table exists before the clock starts and none ever goes away, so the walk protects itself against nothing;
//! there is no slot, no staleness check, no statistics, and nobody looks at whether the entry was empty. The levels
//! are constants, so that the walk is straight-line code. Nothing that installs an entry from several threads can
//! do less. Its sweep is one pass over all entries with one compare-exchange for each that changes, and nothing else.

use super::tree::{Stuck, Table, Tree};
use super::{Memory, Setup, left, swept_by_processor, translate};
use crate::ours::Walked;
use crate::race::{Contender, Translation};
use crate::report::Error;
use crate::sweeping::{Kind, Sweep, Sweeping, Zap};
use crate::sync::Ordering;
use tdp_arch::walker::{GuestAccess, WalkError, Walker};
use tdp_arch::{Access, Format, Gfn, GfnRange, Gpa, Level, Pfn};

/// The floor for trees with a root of level `ROOT` and leaves of level `LEAF`.
#[derive(Debug)]
pub struct Floor<F, const ROOT: u8, const LEAF: u8> {
    tree: Tree<F, ROOT>,
    /// What turns a guest frame into its host frame.
    offset: u64,
    memory: Memory,
}

impl<F: Format, const ROOT: u8, const LEAF: u8> Floor<F, ROOT, LEAF> {
    /// A floor with all tables in place.
    ///
    /// # Errors
    ///
    /// If the memory is not there.
    pub fn new(setup: &Setup) -> Result<Self, Error> {
        let tree = setup.tree()?;
        let backing = setup.backing;
        let leaf = Level::from_number(LEAF).unwrap_or(Level::L1);
        let span = leaf.above().unwrap_or(leaf).pages();
        let mut gfn = backing.gfns.start;
        while gfn < backing.gfns.end {
            tree.descend(gfn, leaf, Ordering::Acquire)?;
            gfn = Gfn((gfn.0 & !(span - 1)) + span);
        }
        Ok(Self {
            memory: Memory::of(&tree),
            tree,
            offset: backing.pfn.0.wrapping_sub(backing.gfns.start.0),
        })
    }
}

/// One level down, where there is a table.
#[inline(always)]
fn step<F: Format>(table: Table<'_, F>, gfn: Gfn) -> Result<Table<'_, F>, Stuck> {
    table
        .next(gfn, Ordering::Acquire)
        .map_err(|_| Stuck::InTheWay(gfn))
}

impl<F: Format, const ROOT: u8, const LEAF: u8> Contender for Floor<F, ROOT, LEAF> {
    type Worker = ();
    type Failure = Stuck;

    fn worker(&self) -> Result<(), Error> {
        Ok(())
    }

    #[inline(always)]
    fn resolve(&self, (): &mut (), gfn: Gfn) -> Result<(), Stuck> {
        let mut table = self.tree.root();
        if ROOT > 4 {
            table = step(table, gfn)?;
        }
        if LEAF < 4 {
            table = step(table, gfn)?;
        }
        if LEAF < 3 {
            table = step(table, gfn)?;
        }
        if LEAF < 2 {
            table = step(table, gfn)?;
        }
        table.compare_exchange(gfn, F::EMPTY, Pfn(gfn.0.wrapping_add(self.offset)));
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Error> {
        Level::from_number(LEAF)
            .into_iter()
            .for_each(|leaf| self.tree.clear_leaves(leaf));
        Ok(())
    }

    fn translate(&self, gfn: Gfn) -> Option<Translation> {
        translate(&self.tree, gfn)
    }
}

impl<F: Walked, const ROOT: u8> Sweeping for Floor<F, ROOT, 1> {
    swept_by_processor!();

    fn sweep<K: Kind>(&self, gfns: GfnRange) -> Result<(), Error> {
        self.tree.small_tables(gfns, |table, part| {
            match K::SWEEP {
                // The same tables filled by plain stores.
                Sweep::Split => table.fill(part, Pfn(0x1000)),
                // Every leaf below a table is to be taken away.
                Sweep::Collapse => drop(table.sweep(part, Zap::change::<F>)),
                _ => drop(table.sweep(part, K::change::<F>)),
            }
        });
        Ok(())
    }

    fn left<K: Kind>(&self, gfns: GfnRange) -> u64 {
        left::<F, K, ROOT>(&self.tree, gfns)
    }
}
