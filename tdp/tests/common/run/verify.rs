//! Compares an MMU with the flat model: leaves, look-ups, the processor's walks, counters.

use super::{Run, space_id};
use crate::common::processor::Processor;
use crate::common::rig::ACCESSES;
use tdp::{Gfn, GfnRange, LoadedRoot, Pfn};

/// Leaves of each root whose ends are probed.
const PROBED_LEAVES: usize = 3;

impl<F: Processor> Run<'_, F> {
    /// Compares everything; `at` is looked at from close by.
    pub(super) fn verify(&mut self, at: Gfn) {
        self.verify_around(at, PROBED_LEAVES);
        for space in 0..self.watchers.len() {
            if let Ok(root) = self.watchers[space].load_root() {
                self.verify_leaves(space, root.generation);
            }
        }
    }

    /// Compares the counters, which tell of a leaf or a table too many or too few anywhere, and what is around `at` and
    /// around `leaves` leaves of each root.
    pub(super) fn verify_around(&mut self, at: Gfn, leaves: usize) {
        for space in 0..self.watchers.len() {
            let Ok(root) = self.watchers[space].load_root() else {
                assert!(self.rig.frames().is_starving());
                continue;
            };
            self.register(root, space);
            for gfn in self.probes(root.generation, at, leaves) {
                self.verify_frame(space, root, gfn);
            }
        }
        self.verify_counters();
    }

    fn verify_leaves(&self, space: usize, generation: u64) {
        let all = GfnRange {
            start: Gfn(0),
            end: Gfn(u64::MAX),
        };
        let tree = &self.roots[&generation].tree;
        let mut expected = tree.leaves.iter();
        self.rig.mmu.visit_leaves(space_id(space), all, |leaf| {
            let Some((&start, flat)) = expected.next() else {
                panic!("{leaf:?} in space {space} should not be there");
            };
            assert_eq!(
                (leaf.gfn.0, leaf.level, leaf.pfn.0, leaf.perms),
                (start, flat.level, flat.pfn, flat.perms),
                "leaf in space {space}: guest frame, level, host frame, permissions"
            );
            assert_eq!(
                (leaf.spte.0 & F::ACCESSED != 0, leaf.spte.0 & F::DIRTY != 0),
                (flat.accessed, flat.dirty),
                "accessed and dirty bits of {leaf:?}"
            );
        });
        let missing = expected.next();
        assert!(
            missing.is_none(),
            "{missing:x?} in space {space} is missing"
        );
    }

    /// Frames to look at: around `at`, and at the ends of `count` leaves.
    fn probes(&self, generation: u64, at: Gfn, count: usize) -> Vec<Gfn> {
        let leaves = &self.roots[&generation].tree.leaves;
        let turn = at.0 as usize % (leaves.len() + 1);
        let ends = leaves.iter().skip(turn).chain(leaves).take(count);
        let ends = ends.flat_map(|(&start, leaf)| {
            let pages = leaf.level.pages();
            [start, start + pages - 1, start + pages]
        });
        let around = [at.0.saturating_sub(1), at.0, at.0 + 1];
        around.into_iter().chain(ends).map(Gfn).collect()
    }

    fn verify_frame(&self, space: usize, root: LoadedRoot, gfn: Gfn) {
        let tree = &self.roots[&root.generation].tree;
        let flat = tree.leaf_at(gfn.0);
        let leaf = self.rig.mmu.translate(space_id(space), gfn);
        assert_eq!(
            leaf.map(|leaf| (leaf.gfn.0, leaf.level, leaf.pfn)),
            flat.map(|(start, leaf)| (start, leaf.level, Pfn(leaf.pfn))),
            "translation of {gfn} in space {space}"
        );
        for access in ACCESSES {
            let found = self.rig.walk(root, gfn.address(), access);
            assert_eq!(
                found.map(|found| (found.pfn, found.level)),
                self.processor_sees(root.generation, gfn, access),
                "{access:?} at {gfn} in space {space}, walked by the processor"
            );
        }
    }

    fn verify_counters(&self) {
        let stats = self.rig.mmu.stats();
        let mut pages = [0; 3];
        let mut tables = 0;
        for root in self.roots.values() {
            for (sum, n) in pages.iter_mut().zip(root.tree.pages()) {
                *sum += n;
            }
            tables += root.tree.tables.len() as u64;
        }
        assert_eq!(stats.pages, pages, "leaves by the counters");
        assert_eq!(stats.tables, tables, "tables by the counters");
        let counts = super::Counts {
            fixed: stats.fixed,
            spurious: stats.spurious,
            mmio: stats.mmio,
            memory_faults: stats.memory_faults,
            retries: stats.retries,
        };
        assert_eq!(counts, self.counts, "outcomes by the counters");
    }
}
