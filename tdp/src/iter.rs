//! The RCU-protected pre-order iterator over the entries of a root.
//!
//! Protocol. [`TdpIter`] borrows a visit for as long as it walks, so every table that it stands on stays memory. It
//! reads an entry once, hands it out as a [`Step`], and **re-reads it before it descends**: the caller may have changed
//! it. A table that is unlinked while the iterator stands in it shows only sealed entries from then on; the iterator
//! leaves it as if it were empty, and whatever replaced it belongs to whoever unlinked it; unless the caller has it walk
//! again.
//!
//! At a *yield point* the visit is re-pinned, which ends its claim on every table: the iterator forgets where it stood
//! and walks again from the root to the next guest frame. A walk with yields visits the same frames as one without,
//! each once, in order; it always goes on by at least one entry between two yields.

use crate::entry::{EntryRef, TABLE_ENTRIES, TablePage};
use crate::event::Site;
use crate::handoff::is_blocked;
use crate::host::Host;
use crate::root::Root;
use crate::table;
use tdp_arch::{Format, Gfn, GfnRange, Level, Pfn, Spte};
use tdp_rcu::Visit;

/// Entries visited between two yield points.
const ENTRIES_BETWEEN_YIELDS: u32 = 4096;

/// One entry of a walk.
#[derive(Clone, Copy)]
pub(crate) struct Step<'w> {
    /// First guest frame below the entry.
    pub(crate) gfn: Gfn,
    /// Its level.
    pub(crate) level: Level,
    /// The table that holds it.
    pub(crate) table: Pfn,
    /// What it held when it was read.
    pub(crate) spte: Spte,
    /// The entry.
    pub(crate) entry: EntryRef<'w>,
}

impl Step<'_> {
    /// The guest frames below the entry.
    pub(crate) fn range(&self) -> GfnRange {
        self.level.range(self.gfn)
    }
}

/// Pre-order walk over all entries, down to a least level, whose frames meet a range.
pub(crate) struct TdpIter<'v, 'd, F: Format, H: Host> {
    visit: &'v mut Visit<'d>,
    root: &'v Root<H>,
    host: &'v H,
    range: GfnRange,
    min_level: Level,
    /// Table of each level on the way to `gfn`, valid from the root's level down to `level`.
    path: [Option<(Pfn, &'v TablePage)>; 5],
    level: Level,
    gfn: Gfn,
    state: State,
    lingers: bool,
    budget: u32,
    _format: core::marker::PhantomData<F>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing handed out since the walk started at the root.
    Start,
    /// An entry was handed out: go below it or past it.
    Here,
    /// An entry was handed out: go past it.
    Past,
    /// Hand out the entry that it stands on.
    Again,
    Done,
}

/// What is below an entry.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Below {
    /// A table, on which the walk stands now.
    Table,
    /// No table, or none any more.
    Other,
    /// Nothing can be.
    Nothing,
}

impl<'v, 'd, F: Format, H: Host> TdpIter<'v, 'd, F, H> {
    pub(crate) fn new(
        visit: &'v mut Visit<'d>,
        host: &'v H,
        root: &'v Root<H>,
        range: GfnRange,
        min_level: Level,
    ) -> Self {
        let end = range.end.min(root.limit());
        let range = GfnRange {
            start: range.start,
            end,
        };
        Self {
            visit,
            root,
            host,
            range,
            min_level,
            path: [None; 5],
            level: root.level,
            gfn: range.start,
            state: if range.is_empty() {
                State::Done
            } else {
                State::Start
            },
            lingers: false,
            budget: ENTRIES_BETWEEN_YIELDS,
            _format: core::marker::PhantomData,
        }
    }

    /// Passes no entry that might lead to a table unless told to by [`skip_below`](Self::skip_below): one that turns out to be
    /// none, or none any more, is handed out again, so that nothing is missed that others split, fold or put back meanwhile.
    pub(crate) fn lingering(mut self) -> Self {
        self.lingers = true;
        self
    }

    /// Walks down from the root again and hands out the entry in which the way to the same frame ends now, or the one handed
    /// out last: for who stands in a table that is sealed, be it gone or only in another's hands. A lingering walk stops at a
    /// table that is blocked, below which all is sealed.
    pub(crate) fn walk_again(&mut self) {
        self.path = [None; 5];
        let level = self.level;
        self.level = self.root.level;
        let root = self.root;
        *self.slot(root.level) = Some((root.pfn, root.page()));
        while self.level > level && !self.is_barred() && self.descend() == Below::Table {}
        self.state = State::Again;
    }

    /// Whether the entry that it stands on is a table that a lingering walk does not enter by itself.
    fn is_barred(&self) -> bool {
        self.lingers
            && self.root.private
            && self
                .current()
                .is_some_and(|(_, entry)| is_blocked::<F>(entry.load()))
    }

    fn slot(&mut self, level: Level) -> &mut Option<(Pfn, &'v TablePage)> {
        &mut self.path[usize::from(level.number()) - 1]
    }

    /// The entry of `self.gfn` at `self.level`. A model checker's tables are short: past their end nothing is mapped.
    fn current(&self) -> Option<(Pfn, EntryRef<'v>)> {
        let (table, page) = self.path[usize::from(self.level.number()) - 1]?;
        let entry = page.get(self.root.index(self.level, self.gfn))?;
        let site = Site::new(self.root.as_id, self.gfn, table);
        Some((table, entry.at(site)))
    }

    /// Goes on to the next entry. The step is valid until the next call.
    pub(crate) fn next(&mut self) -> Option<Step<'_>> {
        loop {
            match self.state {
                State::Done => return None,
                State::Start => {
                    self.level = self.root.level;
                    let root = self.root;
                    *self.slot(root.level) = Some((root.pfn, root.page()));
                }
                State::Again => {}
                State::Here => match self.descend() {
                    Below::Table => {}
                    Below::Other if self.lingers => {}
                    Below::Other | Below::Nothing => {
                        if !self.pass() {
                            self.state = State::Done;
                            return None;
                        }
                    }
                },
                State::Past => {
                    if !self.pass() {
                        self.state = State::Done;
                        return None;
                    }
                }
            }
            self.state = State::Here;
            if let Some((table, entry)) = self.current() {
                let spte = entry.load();
                return Some(Step {
                    gfn: self.level.align_down(self.gfn),
                    level: self.level,
                    table,
                    spte,
                    entry,
                });
            }
            self.state = State::Past;
        }
    }

    /// Does not go below the entry handed out last.
    pub(crate) fn skip_below(&mut self) {
        if self.state == State::Here {
            self.state = State::Past;
        }
    }

    /// Counts entries that the caller looked at by itself, below the one handed out last, towards the next yield point.
    pub(crate) fn spend(&mut self, entries: u32) {
        self.budget = self.budget.saturating_sub(entries).max(1);
    }

    fn descend(&mut self) -> Below {
        let Some(below) = self.level.below().filter(|_| self.level > self.min_level) else {
            return Below::Nothing;
        };
        match self.current().map(|(_, entry)| entry.load()) {
            Some(spte) if F::is_table(spte) => {
                let pfn = F::pfn(spte);
                *self.slot(below) = Some((pfn, table::page(self.host.frames(), pfn)));
                self.level = below;
                Below::Table
            }
            _ => Below::Other,
        }
    }

    /// Goes past the entry at `gfn`: to its neighbour, or up until there is one.
    fn pass(&mut self) -> bool {
        loop {
            let next = self.level.range(self.gfn).end;
            if next >= self.range.end {
                return false;
            }
            if self.root.index(self.level, self.gfn) + 1 < TABLE_ENTRIES {
                self.gfn = next;
                break;
            }
            match self.level.above().filter(|_| self.level < self.root.level) {
                Some(above) => self.level = above,
                None => return false,
            }
        }
        self.budget = self.budget.saturating_sub(1);
        if self.budget == 0 {
            self.yield_now();
        }
        true
    }

    /// Lets grace periods pass, then stands where it stood, on whatever is there now.
    fn yield_now(&mut self) {
        self.path = [None; 5];
        self.visit.repin();
        self.budget = ENTRIES_BETWEEN_YIELDS;
        self.walk_again();
    }
}
