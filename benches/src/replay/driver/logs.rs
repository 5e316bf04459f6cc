//! The dirty log, and the sweeps that it brings with it.
//!
//! The library is given the calls that user space made, at the point of the trace where they began. Its own sweep is
//! then over at once; KVM's goes on for a while, and vCPUs fault meanwhile. An entry that such a fault made or repaired
//! after the library had been there, and before KVM was, is swept again when KVM comes to it: within a sweep, it is free
//! which entries are looked at before a fault and which after.

use super::observe::Doing;
use super::{Driver, Stop, space};
use crate::replay::entry::{Entry, Transition};
use crate::replay::expect::Expected;
use crate::replay::findings::Difference;
use crate::replay::ledger::Key;
use crate::replay::processor::Processor;
use crate::replay::rules::Rule;
use crate::replay::scenario::{Op, PageRange};
use crate::replay::spte;
use crate::replay::step::{Answer, Operation};
use crate::replay::trace::{SpaceRange, everything};
use std::cmp::Reverse;
use std::collections::BTreeSet;
use tdp::{DirtyPage, Gfn, Level, Perms, SlotId};

/// Pages per word of a bitmap.
const WORD: u64 = 64;

impl<F: Processor> Driver<F> {
    /// A call on a dirty log.
    pub(super) fn dirty_log(&mut self, seq: u64, op: &Op) -> Result<(), Stop> {
        match op {
            Op::GetDirtyLog { as_id, slot, pages } => {
                self.get_dirty_log(seq, *as_id, *slot, pages.as_deref())
            }
            &Op::ClearDirtyLog {
                as_id,
                slot,
                first,
                count,
                ref pages,
            } => {
                let all = [(first, first.saturating_add(count).saturating_sub(1))];
                let taken = pages.as_deref();
                let asked = taken.unwrap_or(if count == 0 { &[] } else { &all });
                self.clear_dirty_log(seq, as_id, slot, asked, taken.is_some())
            }
            Op::ResetDirtyRings { pages } => self.reset_dirty_rings(seq, pages.as_deref()),
            _ => Ok(()),
        }
    }

    /// Where a slot is.
    fn range_of(&self, as_id: u8, slot: u32) -> Vec<SpaceRange> {
        let region = self.slots.get(&(as_id, slot));
        let range = region.map(|region| SpaceRange {
            as_id,
            start: region.gfn,
            end: region.gfn + region.pages,
        });
        range.into_iter().collect()
    }

    fn get_dirty_log(
        &mut self,
        seq: u64,
        as_id: u8,
        slot: u32,
        pages: Option<&[PageRange]>,
    ) -> Result<(), Stop> {
        let ranges = self.range_of(as_id, slot);
        self.machine()?;
        let marks = self.observed(&ranges, Doing::Library, |driver| {
            let log = driver
                .machine()?
                .mmu
                .dirty_log(space(as_id), SlotId(slot))?;
            let mut marks = vec![0; log.words()];
            log.collect(&mut marks)?.flush();
            Ok(marks)
        })?;
        let found: Vec<u64> = marked(&marks).collect();
        let most = marks.len() * WORD as usize + 1;
        let recorded: Option<Vec<u64>> = pages.map(|pages| {
            let pages = pages.iter().map(|&(first, last)| first..=last);
            pages.flatten().take(most).collect()
        });
        let same = recorded
            .as_ref()
            .is_none_or(|recorded| self.is_same_log(as_id, slot, recorded, &found));
        if let Some(recorded) = recorded.filter(|_| !same) {
            self.note_log(seq, as_id, slot, &recorded, &found);
        }
        self.findings.operation(Operation::GetDirtyLog, same);
        Ok(())
    }

    /// Clears the marks of `asked`; if `taken`, all of them must be there.
    fn clear_dirty_log(
        &mut self,
        seq: u64,
        as_id: u8,
        slot: u32,
        asked: &[PageRange],
        taken: bool,
    ) -> Result<(), Stop> {
        let ranges = self.range_of(as_id, slot);
        self.machine()?;
        let missing = self.observed(&ranges, Doing::Library, |driver| {
            let log = driver
                .machine()?
                .mmu
                .dirty_log(space(as_id), SlotId(slot))?;
            let mut mask = vec![0; log.words()];
            let mut missing = Vec::new();
            for page in asked.iter().flat_map(|&(first, last)| first..=last) {
                let word = usize::try_from(page / WORD)?;
                let word = mask
                    .get_mut(word)
                    .ok_or("a page beyond the slot is cleared")?;
                *word |= 1 << (page % WORD);
                if taken && !log.is_marked(page) {
                    missing.push(page);
                }
            }
            log.clear(0, &mask)?.flush();
            Ok(missing)
        })?;
        let same = self.is_same_log(as_id, slot, &missing, &[]);
        if !same {
            self.note_log(seq, as_id, slot, &missing, &[]);
        }
        self.findings.operation(Operation::ClearDirtyLog, same);
        Ok(())
    }

    /// Whether two lists of dirty pages of a slot, in order, say the same of what the guest wrote. KVM's also has pages
    /// that KVM or the VMM wrote; a guest that cannot write a page has not been overlooked.
    fn is_same_log(&mut self, as_id: u8, slot: u32, recorded: &[u64], found: &[u64]) -> bool {
        let Some(region) = self.slots.get(&(as_id, slot)).copied() else {
            return recorded == found;
        };
        let Some(machine) = &self.machine else {
            return recorded == found;
        };
        let recorded: BTreeSet<u64> = recorded.iter().copied().collect();
        let found: BTreeSet<u64> = found.iter().copied().collect();
        let mut by_others = 0;
        let overlooked = recorded.difference(&found).any(|page| {
            let gfn = Gfn(region.gfn + page);
            by_others += 1;
            let leaf = machine.mmu.translate(space(as_id), gfn);
            leaf.is_some_and(|leaf| leaf.perms.contains(Perms::WRITE))
        });
        self.findings.written_by_others += by_others;
        !overlooked && found.is_subset(&recorded)
    }

    fn reset_dirty_rings(&mut self, seq: u64, pages: Option<&[(u32, u64)]>) -> Result<(), Stop> {
        self.machine()?;
        let mut found = self.observed(&everything(), Doing::Library, |driver| {
            let mmu = &driver.machine()?.mmu;
            let mut found = Vec::new();
            for ring in mmu.dirty_rings() {
                ring.harvest(|page: DirtyPage| found.push((page.slot.0, page.offset)));
            }
            mmu.reset_dirty_rings().flush();
            Ok(found)
        })?;
        found.sort_unstable();
        let recorded = pages.map(|pages| {
            let mut pages = pages.to_vec();
            pages.sort_unstable();
            pages
        });
        let same = recorded.as_ref().is_none_or(|recorded| *recorded == found);
        if let Some(recorded) = recorded.filter(|_| !same) {
            let of = |pages: &[(u32, u64)]| pages.iter().map(|page| page.1).collect::<Vec<_>>();
            self.note_log(seq, 0, 0, &of(&recorded), &of(&found));
        }
        self.findings.operation(Operation::ResetDirtyRings, same);
        Ok(())
    }

    fn note_log(&mut self, seq: u64, as_id: u8, slot: u32, recorded: &[u64], found: &[u64]) {
        let gfn = self.slots.get(&(as_id, slot)).map_or(0, |r| r.gfn);
        let show = |pages: &[u64]| format!("{} pages dirty, {:?}", pages.len(), first_of(pages));
        self.findings.note(Difference {
            seq,
            as_id,
            gfn,
            level: 0,
            expected: show(recorded),
            got: show(found),
        });
    }

    /// KVM or the VMM wrote to a page of a logged slot.
    pub(super) fn mark_dirty(&mut self, as_id: u8, slot: u32, page: u64) {
        let Some(machine) = &self.machine else { return };
        // Before its log begins, or after it ended, there is nothing to mark.
        if let Ok(log) = machine.mmu.dirty_log(space(as_id), SlotId(slot)) {
            log.mark(page, 1);
        }
    }

    /// KVM's sweep has come to an entry. The library's has been there, or comes now.
    pub(super) fn sweep(&mut self, as_id: u8, gfn: u64, level: u8) -> Result<(), Stop> {
        let key = Key {
            detached: false,
            as_id,
            gfn,
            level,
        };
        let Some(Transition { from, to }) = self.ledger.owed(key) else {
            return Ok(());
        };
        let block = SpaceRange {
            as_id,
            start: gfn,
            end: gfn + spte::pages(level),
        };
        let below = Level::from_number(level.saturating_sub(1)).unwrap_or(Level::L1);
        self.machine()?;
        self.observed(&[block], Doing::Library, |driver| {
            let (as_id, gfns) = (space(as_id), driver.gfns(&block));
            let mmu = &driver.machine()?.mmu;
            match (from, to) {
                (Entry::Table, Entry::Leaf(leaf)) => {
                    let answer = Answer::Mapped {
                        pfn: leaf.pfn,
                        level,
                        writable: leaf.host_writable,
                    };
                    mmu.host().prepare(Some((gfn, answer)));
                    mmu.collapse(as_id, gfns).flush();
                    mmu.host().prepare(None);
                }
                (Entry::Leaf(_), Entry::Table) => {
                    mmu.split(as_id, gfns, below)?;
                }
                (Entry::Leaf(from), Entry::Leaf(to)) if from.writable && !to.writable => {
                    mmu.write_protect(as_id, gfns, Level::L1).flush();
                }
                _ => {}
            }
            Ok(())
        })?;
        self.findings.swept_again += u64::from(to != Entry::Table && from != Entry::Table);
        Ok(())
    }

    /// A log has ended. What the host backs by large pages was collapsed when KVM came to it; the rest must stay.
    pub(super) fn collapse(&mut self, range: &SpaceRange) -> Result<(), Stop> {
        self.machine()?;
        self.observed(&[*range], Doing::Library, |driver| {
            let gfns = driver.gfns(range);
            let mmu = &driver.machine()?.mmu;
            mmu.collapse(space(range.as_id), gfns).flush();
            Ok(())
        })?;
        self.findings.operation(Operation::Collapse, true);
        Ok(())
    }

    /// Executable large pages are forbidden from now on, or permitted.
    pub(super) fn nx_huge_pages(&mut self, on: bool) -> Result<(), Stop> {
        self.settings.nx_huge_pages = on;
        if self.machine.is_some() {
            let view = self.view(&everything());
            if let Some(teardown) = self.machine()?.mmu.set_nx_huge_pages(on) {
                teardown.finish();
                self.enter_removal(&view);
            }
        }
        self.findings.operation(Operation::NxHugePages, true);
        Ok(())
    }

    /// A table that stands for fetches only is taken away. Which one of several the library takes first is its own
    /// affair: if it is another one, that one is put back, and the record followed.
    pub(super) fn recover_nx(
        &mut self,
        as_id: u8,
        gfn: u64,
        level: u8,
        expected: &Expected,
    ) -> Result<(), Stop> {
        self.machine()?;
        let before = self.view(&everything());
        self.machine()?.mmu.recover_nx(1).flush();
        let after = self.view(&everything());
        let block = |as_id: u8, gfn: u64, level: u8| SpaceRange {
            as_id,
            start: gfn,
            end: gfn + spte::pages(level),
        };
        let taken = before.iter().find(|&(at, (_, entry))| {
            *entry == Entry::Table && after.get(at).is_none_or(|now| now.1 != Entry::Table)
        });
        match taken {
            Some((&(space, first, Reverse(at)), _))
                if (space, first, at) != (as_id, gfn, level) =>
            {
                self.copy(&block(space, first, at), expected)?;
                self.follow(Rule::RecoveryOrder, &block(as_id, gfn, level), expected)?;
            }
            _ => self.enter_changes(&before, &after, Doing::Library),
        }
        self.findings.operation(Operation::RecoverNx, true);
        Ok(())
    }
}

/// The pages whose bits are set.
fn marked(marks: &[u64]) -> impl Iterator<Item = u64> {
    let words = (0u64..).zip(marks);
    words.flat_map(|(n, &word)| {
        (0..WORD)
            .filter(move |bit| word >> bit & 1 != 0)
            .map(move |bit| n * WORD + bit)
    })
}

fn first_of(pages: &[u64]) -> &[u64] {
    pages.get(..8).unwrap_or(pages)
}
