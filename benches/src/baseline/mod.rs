//! What a user would otherwise write or take, and the least that the work can cost; a file each, all behind
//! [`Contender`](crate::race::Contender).
//!
//! | module | its shape | does |
//! |---|---|---|
//! | [`floor`] | a raw walk and one compare-exchange, tables preallocated, nothing else | map |
//! | [`mutex`] | plain tables, everything under one mutex | whole fault |
//! | [`rwlock`] | KVM's: compare-exchange under a reader-writer lock taken for reading | whole fault |
//! | [`table_lock`] | CortenMM's: a walk without locks, then the lock of one table page | whole fault |
//! | [`multiarch`] | the crate `page_table_multiarch` under a mutex | map |
//! | [`x86`] | the crate `x86_64` under a mutex | map |
//!
//! The first four share [`tree`] (the library's entry formats, in memory that is touched beforehand) and the
//! whole faults share [`host`]. Wherever there was a choice it favours the baseline: tables are never freed and so need
//! no protection while they are walked, frames need no translation to pointers, and there is exactly one slot.

pub mod floor;
pub mod host;
pub mod multiarch;
pub mod mutex;
pub mod rwlock;
pub mod table_lock;
pub mod tree;
pub mod x86;

use crate::race::Translation;
use crate::report::Error;
use crate::sweeping::Kind;
use host::Backing;
use std::sync::Arc;
use tdp_arch::walker::{GuestAccess, WalkError, Walker};
use tdp_arch::{Format, Gfn, GfnRange, Gpa, Hpa, Level, PAGE_SIZE, Perms, Pfn};
use tree::{Arena, Tree};

/// Levels of the published crates.
const FOUR: u8 = 4;

/// What every baseline is built from.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Guest memory.
    pub backing: Backing,
    /// Advise huge pages for table memory.
    pub huge: bool,
}

impl Setup {
    /// An arena for the tables that mapping all of guest memory takes below a root of level `root`.
    ///
    /// # Errors
    ///
    /// If so much memory is not there.
    fn arena(&self, root: u8) -> Result<Arena, Error> {
        let root = Level::from_number(root).unwrap_or(Level::L5);
        let range = self.backing.gfns;
        let tables = tables_for(range, self.backing.level, root);
        let available = crate::sys::available_memory().unwrap_or(u64::MAX);
        if tables.saturating_mul(PAGE_SIZE) > available {
            let need = crate::size::show(tables.saturating_mul(PAGE_SIZE));
            return Err(Error::Usage(format!(
                "{need} of tables do not fit the memory of this machine"
            )));
        }
        let tables = usize::try_from(tables).map_err(|e| Error::run("tables of a baseline", e))?;
        Arena::new(tables, self.huge)
    }

    /// An empty tree that can map all of guest memory.
    ///
    /// # Errors
    ///
    /// If the memory is not there.
    fn tree<F: Format, const ROOT: u8>(&self) -> Result<Tree<F, ROOT>, Error> {
        Tree::new(self.arena(ROOT)?)
    }
}

/// Tables, the root included, that a tree with a root of level `root` needs to map `range` by leaves of `leaf`.
pub fn tables_for(range: GfnRange, leaf: Level, root: Level) -> u64 {
    let last = range.end.0.saturating_sub(1);
    let tables = |level: Level| match level.above() {
        Some(above) if level < root => {
            (last >> above.gfn_shift()) - (range.start.0 >> above.gfn_shift()) + 1
        }
        _ => 1,
    };
    Level::ALL
        .into_iter()
        .filter(|level| (leaf..=root).contains(level))
        .map(tables)
        .sum()
}

/// [`Contender::translate`](crate::race::Contender::translate) for a tree.
fn translate<F: Format, const ROOT: u8>(tree: &Tree<F, ROOT>, gfn: Gfn) -> Option<Translation> {
    let (spte, level) = tree.leaf(gfn)?;
    let pfn = Pfn(F::leaf_pfn(spte, level).0 + (gfn.0 & (level.pages() - 1)));
    Some(Translation {
        pfn,
        level,
        permitted: F::perms(spte) == Perms::RWX,
    })
}

/// The tables of a tree as the processor sees them, whatever lock the tree is under.
#[derive(Clone, Debug)]
struct Memory {
    arena: Arc<Arena>,
    root: Hpa,
}

impl Memory {
    fn of<F: Format, const ROOT: u8>(tree: &Tree<F, ROOT>) -> Self {
        Self {
            arena: tree.arena().clone(),
            root: tree.root_address(),
        }
    }

    #[inline]
    fn walk<W: Walker>(
        &self,
        walker: &W,
        gpa: Gpa,
        access: GuestAccess,
    ) -> Result<tdp_arch::walker::Translation, WalkError<W::Fault>> {
        walker.walk(&*self.arena, self.root, gpa, access)
    }
}

/// [`Sweeping::left`](crate::sweeping::Sweeping::left) for a tree.
fn left<F: Format, K: Kind, const ROOT: u8>(tree: &Tree<F, ROOT>, gfns: GfnRange) -> u64 {
    let mut left = 0;
    tree.small_tables(gfns, |table, part| {
        left += table.count(part, |spte| K::change::<F>(spte).is_some());
    });
    left
}

/// The parts of `gfns` that a table of level 1 maps each.
fn tables(gfns: GfnRange) -> impl Iterator<Item = GfnRange> {
    let mut rest = gfns;
    std::iter::from_fn(move || {
        let end = Level::L2.range(rest.start).end.min(rest.end);
        let part = GfnRange {
            start: rest.start,
            end,
        };
        rest.start = end;
        (!part.is_empty()).then_some(part)
    })
}

/// What a baseline's [`Sweeping`](crate::sweeping::Sweeping) shares: everything but the sweep itself.
macro_rules! swept_by_processor {
    () => {
        type Format = F;

        #[inline]
        fn access<W: Walker>(
            &self,
            walker: &W,
            gpa: Gpa,
            access: GuestAccess,
        ) -> Result<tdp_arch::walker::Translation, WalkError<W::Fault>> {
            self.memory.walk(walker, gpa, access)
        }

        #[inline]
        fn fault(&self, worker: &mut Self::Worker, gfn: Gfn, _access: Access) -> Result<(), Stuck> {
            self.resolve(worker, gfn)
        }
    };
}
use swept_by_processor;

#[cfg(test)]
mod tests;
