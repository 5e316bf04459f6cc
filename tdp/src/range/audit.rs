//! The audit: does a tree hold only what may stand in it, and do the books agree?
//!
//! It reads a live tree as a sweep does. Its figures mean something only while nobody changes the tree: at a quiet
//! moment `pages` and `tables` equal those of [`Stats`](crate::Stats), and nothing is misplaced or unknown.

use crate::host::{AddressSpaceId, Host};
use crate::iter::TdpIter;
use crate::mmu::Shared;
use crate::table::Place;
use tdp_arch::{Decoded, Format, Gfn, GfnRange, Level};

/// What an audit found in the trees of all address spaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Audit {
    /// Leaves: 4 KiB, 2 MiB, 1 GiB.
    pub pages: [u64; 3],
    /// Linked tables, roots not counted.
    pub tables: u64,
    /// MMIO entries.
    pub mmio: u64,
    /// Entries owned by a running hook.
    pub frozen: u64,
    /// Tables that are linked where their metadata says that they are not.
    pub misplaced: u64,
    /// Entries that this library never writes, sealed entries of linked tables, and leaves at levels that have none.
    pub unknown: u64,
}

impl<F: Format, H: Host> Shared<F, H> {
    pub(crate) fn audit(&self) -> Audit {
        let mut audit = Audit::default();
        for as_id in (0..self.address_spaces).map(AddressSpaceId) {
            for root in self
                .roots
                .of(as_id)
                .iter()
                .chain(&self.roots.private(as_id))
                .filter(|root| !root.is_obsolete())
            {
                let range = GfnRange {
                    start: Gfn(0),
                    end: root.limit(),
                };
                let mut visit = self.domain.visit();
                let mut iter = TdpIter::<F, H>::new(&mut visit, &self.host, root, range, Level::L1);
                while let Some(step) = iter.next() {
                    match F::decode(self.stands_for(&step, root), step.level) {
                        Decoded::Empty => {}
                        Decoded::Frozen => audit.frozen += 1,
                        Decoded::Mmio(_) if step.level == Level::L1 => audit.mmio += 1,
                        Decoded::Leaf { .. } if step.level <= Level::L3 => {
                            audit.pages[usize::from(step.level.number()) - 1] += 1;
                        }
                        Decoded::Table(pfn) => {
                            audit.tables += 1;
                            let place = step.level.below().map(|level| Place {
                                as_id,
                                private: root.private,
                                level,
                                gfn: step.gfn,
                            });
                            audit.misplaced += u64::from(self.meta.place(pfn) != place);
                        }
                        _ => audit.unknown += 1,
                    }
                }
            }
        }
        audit
    }
}
