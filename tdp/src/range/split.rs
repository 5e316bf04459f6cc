//! Splitting large leaves of the shared half outside any fault.
//!
//! Protocol. A table that translates like the leaf is made and filled first, then exchanged for it (INV: publish-complete).
//! The whole old value is compared, so that a bit which the processor set since the children were made makes the exchange
//! fail and the children be made anew (INV: volatile-atomic). Both translate alike, so there is nothing to flush.

use crate::entry;
use crate::host::{AddressSpaceId, FrameSource, Host};
use crate::iter::TdpIter;
use crate::mmu::Shared;
use crate::stats::{Stat, Tally};
use crate::table::{self, Place, TableState};
use tdp_arch::{Format, Gfn, GfnRange, Level, Pfn};

impl<F: Format, H: Host> Shared<F, H> {
    /// Splits what maps `gfn` in the shared half until no leaf of which `range` covers only a part does. Without a frame
    /// for a table the leaf stays.
    pub(crate) fn split_partly_covered(&self, as_id: AddressSpaceId, range: GfnRange, gfn: Gfn) {
        let one = GfnRange {
            start: gfn,
            end: Gfn(gfn.0 + 1),
        };
        for root in self.roots.of(as_id) {
            let mut visit = self.domain.visit();
            let mut iter = TdpIter::<F, H>::new(&mut visit, &self.host, &root, one, Level::L1);
            while let Some(step) = iter.next() {
                let (Some(below), false) = (step.level.below(), range.covers(step.range())) else {
                    continue;
                };
                let mut old = step.spte;
                if !F::is_leaf(old, step.level) {
                    continue;
                }
                let mut frame = [Pfn(0)];
                if self.host.frames().allocate(&mut frame).is_err() {
                    return;
                }
                let [pfn] = frame;
                let place = Place {
                    as_id,
                    private: false,
                    level: below,
                    gfn: step.gfn,
                };
                self.meta.set_state(pfn, TableState::Spare);
                self.meta.link(pfn, place);
                let page = table::page(self.host.frames(), pfn);
                let tally = &self.shards.sweeps;
                let linked = loop {
                    if !F::is_leaf(old, step.level) {
                        break false;
                    }
                    page.fill(|index| F::split_child(old, step.level, index));
                    let table = F::table(pfn);
                    match entry::exchange::<F>(step.entry, step.level, old, table, tally) {
                        Ok(()) => break true,
                        Err(actual) => old = actual,
                    }
                };
                if linked {
                    tally.add(Stat::pages(below), entry::TABLE_ENTRIES as i64);
                    tally.add(Stat::Splits, 1);
                } else {
                    self.meta.set_state(pfn, TableState::Free);
                    self.host.frames().free(&[pfn]);
                }
            }
        }
    }
}
