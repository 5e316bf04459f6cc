//! Comparing what the library maps with what is recorded: one frame, a range, everything.

use super::{Driver, Stop, space};
use crate::replay::entry::Entry;
use crate::replay::expect::{Expected, Space};
use crate::replay::findings::{Difference, Mapped};
use crate::replay::ledger::Class;
use crate::replay::processor::Processor;
use crate::replay::spte::Leaf;
use crate::replay::step::Operation;
use crate::replay::trace::{ADDRESS_SPACES, SpaceRange, everything};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use tdp::{Gfn, Level};

impl<F: Processor> Driver<F> {
    /// Whether the library maps `gfn` by `leaf`.
    pub(super) fn maps(
        &mut self,
        seq: u64,
        as_id: u8,
        gfn: u64,
        leaf: Option<Leaf>,
    ) -> Result<bool, Stop> {
        let found = self
            .machine()?
            .mmu
            .translate(space(as_id), Gfn(gfn))
            .map(Mapped::from);
        let leaf = leaf.map(Mapped::from);
        let same = self.compare_one(leaf, found);
        if !same {
            self.findings
                .note(Difference::mapping(seq, as_id, gfn, leaf, found));
        }
        Ok(same)
    }

    pub(super) fn compare_one(&mut self, leaf: Option<Mapped>, found: Option<Mapped>) -> bool {
        self.findings.leaves_compared += u64::from(leaf.is_some());
        match (leaf, found) {
            (Some(leaf), Some(found)) => leaf.is_matched_by(&found),
            (None, None) => true,
            _ => false,
        }
    }

    /// After a difference, brings the library back into the recorded state around `gfn`.
    pub(super) fn repair(
        &mut self,
        as_id: u8,
        gfn: u64,
        leaf: Option<Leaf>,
        expected: &Expected,
    ) -> Result<(), Stop> {
        // What differs is told before it is put right.
        self.settle(self.episode, Class::Compared);
        let found = self.machine()?.mmu.translate(space(as_id), Gfn(gfn));
        let mut range = SpaceRange {
            as_id,
            start: gfn,
            end: gfn + 1,
        };
        for (start, end) in found
            .map(|leaf| (leaf.gfn.0, leaf.gfn.0 + leaf.level.pages()))
            .into_iter()
            .chain(leaf.map(|leaf| (leaf.gfn, leaf.end())))
        {
            (range.start, range.end) = (range.start.min(start), range.end.max(end));
        }
        self.sync(&range, expected)
    }

    /// Whether the library maps in `ranges` what is recorded. Differences are noted and repaired.
    pub(super) fn verify(
        &mut self,
        seq: u64,
        ranges: &[SpaceRange],
        expected: &Expected,
    ) -> Result<bool, Stop> {
        let mut same = true;
        for range in ranges {
            let leaves = expected.leaves(Space::normal(range.as_id), range.start, range.end);
            let leaves: Vec<Mapped> = leaves.map(Mapped::from).collect();
            let differing = self.compare_range(seq, range, &leaves)?;
            same &= differing.is_empty();
            for range in differing {
                self.sync(&range, expected)?;
            }
        }
        Ok(same)
    }

    /// Compares what the library maps in `range` with `leaves`. Returns what differs, after noting it.
    pub(super) fn compare_range(
        &mut self,
        seq: u64,
        range: &SpaceRange,
        leaves: &[Mapped],
    ) -> Result<Vec<SpaceRange>, Stop> {
        let gfns = self.gfns(range);
        let mut found = Vec::with_capacity(leaves.len());
        self.machine()?
            .mmu
            .visit_leaves(space(range.as_id), gfns, |leaf| {
                found.push(Mapped::from(leaf))
            });
        let (mut leaves, mut found) = (
            leaves.iter().copied().peekable(),
            found.into_iter().peekable(),
        );
        let mut differing = Vec::new();
        while let Some(first) = leaves
            .peek()
            .into_iter()
            .chain(found.peek())
            .map(|mapped| mapped.gfn)
            .min()
        {
            let leaf = leaves.next_if(|mapped| mapped.gfn == first);
            let found = found.next_if(|mapped| mapped.gfn == first);
            if !self.compare_one(leaf, found) {
                self.findings
                    .note(Difference::mapping(seq, range.as_id, first, leaf, found));
                let level = leaf
                    .into_iter()
                    .chain(found)
                    .map(|mapped| mapped.level)
                    .max()
                    .unwrap_or(1);
                let pages = Level::from_number(level).map_or(1, Level::pages);
                differing.push(SpaceRange {
                    as_id: range.as_id,
                    start: first,
                    end: first + pages,
                });
            }
        }
        Ok(differing)
    }

    pub(super) fn compare(&mut self, seq: u64, expected: &Expected) -> Result<(), Stop> {
        if self.machine.is_none() {
            // Nothing can be mapped, and how the MMU is to be set up may be still to come.
            return Ok(());
        }
        self.findings.comparisons += 1;
        let mut counted = [0; 3];
        for as_id in 0..ADDRESS_SPACES {
            let leaves: Vec<Mapped> = expected
                .all_leaves(Space::normal(as_id))
                .map(Mapped::from)
                .collect();
            for leaf in &leaves {
                if let Some(count) = counted.get_mut(usize::from(leaf.level) - 1) {
                    *count += 1;
                }
            }
            let everything = SpaceRange {
                as_id,
                start: 0,
                end: u64::MAX,
            };
            let differing = self.compare_range(seq, &everything, &leaves)?;
            self.findings.unexplained += differing.len() as u64;
            for range in differing {
                self.sync(&range, expected)?;
            }
        }
        self.compare_entries(seq, expected);
        let pages = self.machine()?.mmu.stats().pages;
        if pages != counted {
            let (expected, got) = (
                format!("{counted:?} leaves by level"),
                format!("{pages:?} in the statistics"),
            );
            self.findings.differs(Difference {
                seq,
                as_id: 0,
                gfn: 0,
                level: 0,
                expected,
                got,
            });
        }
        Ok(())
    }

    /// Everything that leaves are not: tables, MMIO entries, and who may write. Only when no change is half told.
    fn compare_entries(&mut self, seq: u64, expected: &Expected) {
        if !self.ledger.is_settled() {
            return;
        }
        self.findings.full_comparisons += 1;
        for range in everything() {
            let as_id = range.as_id;
            let space = Space::normal(as_id);
            let recorded = expected.entries_over(space, 0, u64::MAX);
            let recorded: BTreeMap<_, _> = recorded
                .map(|(gfn, level, spte)| {
                    ((as_id, gfn, Reverse(level)), Entry::recorded(spte, level))
                })
                .filter(|(_, entry)| *entry != Entry::Gone)
                .collect();
            let found = self.view(&[range]);
            let keys: BTreeSet<_> = recorded.keys().chain(found.keys()).collect();
            for key @ &(as_id, gfn, Reverse(level)) in keys {
                let expected = recorded.get(key).copied().unwrap_or(Entry::Gone);
                let got = found.get(key).map_or(Entry::Gone, |found| found.1);
                self.findings.entries_compared += 1;
                if !expected.is_same_mapping(&got) {
                    self.findings.differs(Difference {
                        seq,
                        as_id,
                        gfn,
                        level,
                        expected: format!("{expected} when everything is compared"),
                        got: got.to_string(),
                    });
                }
            }
        }
    }

    pub(super) fn teardown(&mut self, seq: u64, leaves: &[(u8, Leaf)]) -> Result<(), Stop> {
        let mut same = true;
        for as_id in 0..ADDRESS_SPACES {
            let own = leaves.iter().filter(|(space, _)| *space == as_id);
            let own: Vec<Mapped> = own.map(|&(_, leaf)| leaf.into()).collect();
            same &= self
                .compare_range(
                    seq,
                    &SpaceRange {
                        as_id,
                        start: 0,
                        end: u64::MAX,
                    },
                    &own,
                )?
                .is_empty();
        }
        self.findings.operation(Operation::Teardown, same);
        self.invalidate_roots()
    }
}
