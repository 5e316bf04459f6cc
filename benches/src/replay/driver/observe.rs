//! What the library did to its entries: they are looked at before and after each step, and what changed is entered into
//! the ledger.
//!
//! The driver is the only thread, so that whatever changed between two looks is the step's doing. A look covers the
//! frames that the step can touch; what it changes elsewhere shows when everything is compared.

use super::{Driver, Stop, space};
use crate::replay::entry::{Entry, Transition, pages};
use crate::replay::ledger::{Key, removal};
use crate::replay::processor::Processor;
use crate::replay::rules::Rule;
use crate::replay::trace::SpaceRange;
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// Whose doing a change is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doing {
    /// The library's, by the operation that was recorded.
    Library,
    /// The driver's, which copied the record: because of a rule, or for want of an operation.
    Copied(Option<Rule>),
}

/// Entries as they stand, tables before what they hold: address space, first frame, level to raw value and meaning.
pub(super) type View = BTreeMap<(u8, u64, Reverse<u8>), (u64, Entry)>;

impl<F: Processor> Driver<F> {
    /// The entries over `ranges` now.
    pub(super) fn view(&self, ranges: &[SpaceRange]) -> View {
        let mut view = View::new();
        let Some(machine) = &self.machine else {
            return view;
        };
        for range in ranges {
            machine
                .mmu
                .visit_entries(space(range.as_id), self.gfns(range), |entry| {
                    let key = (range.as_id, entry.gfn.0, Reverse(entry.level.number()));
                    view.insert(key, (entry.spte.0, Entry::ours::<F>(&entry)));
                });
        }
        view
    }

    /// Does `act` and enters what it changed over `ranges`.
    pub(super) fn observed<R>(
        &mut self,
        ranges: &[SpaceRange],
        doing: Doing,
        act: impl FnOnce(&mut Self) -> Result<R, Stop>,
    ) -> Result<R, Stop> {
        let before = self.view(ranges);
        let result = act(self)?;
        let after = self.view(ranges);
        self.enter_changes(&before, &after, doing);
        Ok(result)
    }

    pub(super) fn enter_changes(&mut self, before: &View, after: &View, doing: Doing) {
        // Where the last table that went away ends, in its address space, and its level.
        let mut unlinked: Option<(u8, u64, u8)> = None;
        let keys: std::collections::BTreeSet<_> = before.keys().chain(after.keys()).collect();
        for &at @ (as_id, gfn, Reverse(level)) in keys {
            let (old, new) = (before.get(&at), after.get(&at));
            let detached = unlinked
                .is_some_and(|(space, end, above)| space == as_id && gfn < end && level < above);
            if old.map(|old| old.0) == new.map(|new| new.0) && !detached {
                continue;
            }
            let entry = |side: Option<&(u64, Entry)>| side.map_or(Entry::Gone, |side| side.1);
            let (from, to) = (entry(old), entry(new));
            let key = Key {
                detached: false,
                as_id,
                gfn,
                level,
            };
            let gone = Key {
                detached: true,
                ..key
            };
            if detached {
                // The old entry went with its table; the new one is of another table.
                if from != Entry::Gone {
                    self.enter_change(gone, removal(from), doing);
                }
                if to != Entry::Gone {
                    self.enter_change(
                        key,
                        Transition {
                            from: Entry::Gone,
                            to,
                        },
                        doing,
                    );
                }
                continue;
            }
            if from == Entry::Table {
                unlinked = Some((as_id, gfn.saturating_add(pages(level)), level));
            }
            if (from, to) == (Entry::Table, Entry::Table) {
                self.enter_change(key, removal(from), doing);
                self.enter_change(
                    key,
                    Transition {
                        from: Entry::Gone,
                        to,
                    },
                    doing,
                );
            } else {
                self.enter_change(key, Transition { from, to }, doing);
            }
        }
    }

    /// Whole trees went away: `view` is what they held. Where KVM took an entry down before it unlinked its table, the
    /// entry is entered there.
    pub(super) fn enter_removal(&mut self, view: &View) {
        for (&(as_id, gfn, Reverse(level)), &(_, from)) in view {
            let key = Key {
                detached: false,
                as_id,
                gfn,
                level,
            };
            let gone = removal(from);
            let owed = self.ledger.owed(key);
            let detached = owed.is_none_or(|owed| !owed.is_same(&gone));
            self.enter_change(Key { detached, ..key }, gone, Doing::Library);
        }
    }

    fn enter_change(&mut self, key: Key, transition: Transition, doing: Doing) {
        match doing {
            Doing::Library => {
                let tally = &mut self.findings.transitions;
                self.ledger
                    .ours(tally, self.episode, self.seq, key, transition);
            }
            Doing::Copied(None) => self.ledger.copied(key, transition),
            Doing::Copied(Some(rule)) => {
                self.ledger.followed(self.episode, key, transition, rule);
            }
        }
    }
}
