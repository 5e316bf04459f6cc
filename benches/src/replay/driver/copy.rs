//! Copying the record: what keeps the library comparable where it cannot make a change itself.
//!
//! Everything over a range is taken away, and then made as recorded: leaves by hand with the permissions that they end
//! with, tables that hold nothing, MMIO entries where no slot is in the way.

use super::observe::Doing;
use super::{Driver, Machine, Stop, space};
use crate::replay::entry::{Entry, LeafBits};
use crate::replay::expect::{Expected, Space};
use crate::replay::processor::Processor;
use crate::replay::rules::Rule;
use crate::replay::trace::SpaceRange;
use tdp::{Access, Gfn, GfnRange, Level, Mapping, Perms, Pfn};

impl<F: Processor> Driver<F> {
    /// Copies a range from the record.
    pub(super) fn sync(&mut self, range: &SpaceRange, expected: &Expected) -> Result<(), Stop> {
        self.copied(range, expected, None)
    }

    /// The same where a rule says that the library does otherwise.
    pub(super) fn follow(
        &mut self,
        rule: Rule,
        range: &SpaceRange,
        expected: &Expected,
    ) -> Result<(), Stop> {
        self.copied(range, expected, Some(rule))
    }

    fn copied(
        &mut self,
        range: &SpaceRange,
        expected: &Expected,
        rule: Option<Rule>,
    ) -> Result<(), Stop> {
        self.machine()?;
        self.observed(&[*range], Doing::Copied(rule), |driver| {
            driver.copy(range, expected)
        })
    }

    /// Brings a range into the recorded state.
    pub(super) fn copy(&mut self, range: &SpaceRange, expected: &Expected) -> Result<(), Stop> {
        let (gfns, nx_huge_pages) = (self.gfns(range), self.settings.nx_huge_pages);
        let Machine { hand, mmu, .. } = self.machine()?;
        let as_id = space(range.as_id);
        mmu.zap(as_id, gfns).flush();
        hand.set_address_space(as_id)?;
        let scratch = Mapping::memory(Pfn(0), Level::L1, Perms::READ);
        for (gfn, level, spte) in
            expected.entries_over(Space::normal(range.as_id), range.start, range.end)
        {
            // Whether it came out as recorded shows when it is compared.
            match Entry::recorded(spte, level) {
                Entry::Table if level == 2 && !expected.has_below(range.as_id, gfn, level) => {
                    let first = Gfn(gfn);
                    let _outcome = hand.map(first, scratch, Access::Read)?;
                    let page = GfnRange {
                        start: first,
                        end: Gfn(gfn + 1),
                    };
                    mmu.zap_leaves(as_id, page).flush();
                }
                Entry::Mmio if mmu.slots().find(as_id, Gfn(gfn)).is_none() => {
                    let _outcome = hand.fault(tdp::Fault::read(Gfn(gfn).address()))?;
                }
                Entry::Leaf(leaf) => {
                    let level = Level::from_number(level).unwrap_or(Level::L1);
                    let block = level.range(Gfn(gfn));
                    let large = Level::L2.pages() - 1;
                    let _outcome = if nx_huge_pages
                        && level == Level::L1
                        && leaf.executable
                        && (gfn ^ leaf.pfn) & large == 0
                    {
                        // Small because of a fetch, and its table is to say so.
                        hand.map(Gfn(gfn), mapping(leaf, Level::L2), Access::Execute)?
                    } else {
                        hand.map(Gfn(gfn), mapping(leaf, level), Access::Read)?
                    };
                    if !leaf.writable && leaf.mmu_writable {
                        mmu.write_protect(as_id, block, Level::L1).flush();
                    } else if !leaf.writable && leaf.host_writable {
                        mmu.write_protect_gfn(as_id, Gfn(gfn)).flush();
                    }
                    if !leaf.accessed {
                        mmu.age(as_id, block);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// A mapping that makes the leaf, but for what is taken away afterwards.
fn mapping(leaf: LeafBits, level: Level) -> Mapping {
    let mut perms = if leaf.executable {
        Perms::RX
    } else {
        Perms::READ
    };
    perms.set(Perms::WRITE, leaf.host_writable);
    Mapping::memory(Pfn(leaf.pfn), level, perms)
}
