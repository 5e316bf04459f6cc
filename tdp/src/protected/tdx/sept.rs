//! The Secure EPT itself: the module's walk, and reading it without a call.
//!
//! Protocol. The module walks from the root through entries that are present and no pages, and stops at the level that
//! was asked for, or earlier. A blocked table is not present, so that nothing below it can be reached by any call. The
//! tree cannot lose a table under a walk: the host's hold the lock of the tree, and those of a guest are inside an epoch.
//! Whoever looks at the tree without a call ([`Td::entry`], [`Td::visit_entries`]) goes through blocked tables as well,
//! takes no lock, and sees a whole picture only while no call runs.

use super::Td;
use super::memory::{Memory, Table};
use super::state::{Entry, EntryState};
use super::status::{Operand, Refusal, Status};
use super::td::TdInner;
use tdp_arch::{ENTRIES_PER_TABLE, Gfn, Gpa, Hpa, Level};
use tdp_rcu::sync::{AtomicU64, Ordering};

/// Where a walk ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Walked<'a> {
    pub(crate) word: &'a AtomicU64,
    /// What was read there.
    pub(crate) entry: Entry,
    pub(crate) level: Level,
}

impl Walked<'_> {
    /// Replaces the entry without its lock: the caller holds the TD's root page exclusively, and nobody else is in the
    /// tree.
    pub(crate) fn set(&self, entry: Entry) {
        // Release: pairs with the Acquire of `read`.
        self.word.store(entry.0, Ordering::Release);
    }
}

fn read(word: &AtomicU64) -> Entry {
    // Acquire: pairs with the Release of the commit that made the table behind it reachable.
    Entry(word.load(Ordering::Acquire)).unlocked()
}

/// Walks to the entry of `gpa` at `target`, or to the one where it cannot go on.
pub(crate) fn walk<'a>(
    memory: &'a Memory,
    root: Hpa,
    levels: Level,
    gpa: Gpa,
    target: Level,
) -> Option<Walked<'a>> {
    let mut table = memory.table(root)?;
    let mut level = levels;
    loop {
        let word = table.word(level.index(gpa.gfn()));
        let entry = read(word);
        let here = Walked { word, entry, level };
        if level == target || !entry.leads_on() {
            return Some(here);
        }
        match (level.below(), memory.table(entry.page())) {
            (Some(below), Some(next)) => {
                level = below;
                table = next;
            }
            _ => return Some(here),
        }
    }
}

impl TdInner {
    /// The entry of `gpa` at `level`, or a refusal that reports where the walk ended.
    pub(crate) fn walk_to(&self, gpa: Gpa, level: Level) -> Result<Walked<'_>, Refusal> {
        let failed = Refusal::new(Status::EptWalkFailed, Operand::RCX);
        let walked = self.walk(gpa, level).ok_or(failed)?;
        if walked.level == level {
            Ok(walked)
        } else {
            Err(failed.reporting(walked.entry.report(walked.level)))
        }
    }
}

/// An entry of the Secure EPT, as it is in memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EntryView {
    /// First address that it maps.
    pub gpa: Gpa,
    /// Its level.
    pub level: Level,
    /// Its state.
    pub state: EntryState,
    /// The table or page that it holds.
    pub page: Option<Hpa>,
    /// The word, without the lock's bits.
    pub raw: u64,
}

impl EntryView {
    fn new(gpa: Gpa, level: Level, entry: Entry) -> Self {
        let state = entry.state();
        Self {
            gpa,
            level,
            state,
            page: (state.is_leaf() || state.is_table()).then(|| entry.page()),
            raw: entry.0,
        }
    }
}

impl Td {
    /// The entry of `gpa` at `level`; `None` if there is no table that holds it.
    pub fn entry(&self, gpa: Gpa, level: Level) -> Option<EntryView> {
        if !self.inner.is_private(gpa) {
            return None;
        }
        let memory = self.inner.memory();
        let mut at = self.inner.levels;
        let mut table = memory.table(self.inner.root)?;
        while at > level {
            let entry = read(table.word(at.index(gpa.gfn())));
            if !entry.state().is_table() {
                return None;
            }
            table = memory.table(entry.page())?;
            at = at.below()?;
        }
        let entry = read(table.word(at.index(gpa.gfn())));
        let start = at.align_down(gpa.gfn()).checked_address()?;
        (at == level).then(|| EntryView::new(start, level, entry))
    }

    /// Shows every entry that is not free, tables before what they hold, in the order of addresses.
    pub fn visit_entries(&self, mut visit: impl FnMut(EntryView)) {
        if let Some(root) = self.inner.memory().table(self.inner.root) {
            self.visit_table(root, self.inner.levels, Gfn(0), &mut visit);
        }
    }

    fn visit_table(
        &self,
        table: &Table,
        level: Level,
        base: Gfn,
        visit: &mut impl FnMut(EntryView),
    ) {
        for (index, word) in table.words().enumerate().take(ENTRIES_PER_TABLE) {
            let entry = read(word);
            let state = entry.state();
            let gfn = Gfn(base.0 + index as u64 * level.pages());
            let Some(gpa) = gfn.checked_address() else {
                return;
            };
            if state == EntryState::Free {
                continue;
            }
            visit(EntryView::new(gpa, level, entry));
            if !state.is_table() {
                continue;
            }
            if let (Some(below), Some(next)) =
                (level.below(), self.inner.memory().table(entry.page()))
            {
                self.visit_table(next, below, gfn, visit);
            }
        }
    }
}
