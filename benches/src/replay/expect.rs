//! The tables as they must have stood, worked out from the recorded changes alone.
//!
//! Protocol. Every recorded change is applied in the order of the trace. An entry's recorded old value must be the
//! last one written to it, up to the accessed and dirty bits, and a new entry must stand below a recorded table: a
//! trace with an event missing contradicts itself here, and [`Contradiction`] says where. What KVM does not record is
//! derived: the children of a split, and what becomes unreachable with a table or a root that is taken down. Such
//! entries are *detached*: they no longer count as mapped, and are only kept to recognise the events of their removal.

use super::spte::{self, ACCESSED_DIRTY, Kind, Leaf, kind, pages};
use super::trace::Change;
use std::collections::{BTreeMap, BTreeSet, HashMap};

#[cfg(test)]
mod tests;
mod wrong;

pub use wrong::{Contradiction, Wrong};

/// A thread that no trace has: it owns roots that were given up for others.
pub const NOBODY: u32 = u32::MAX;
/// Bit of a [`Space`] that stands for the root of a nested guest without nested paging of its own.
const NESTED: u8 = 0x80;

/// Which tree of tables: an address space, or what KVM keeps for nested guests in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Space(u8);

impl Space {
    /// The tree of an address space.
    pub fn normal(as_id: u8) -> Self {
        Self(as_id & !NESTED)
    }

    /// The tree that nested guests without nested paging use.
    pub fn nested(as_id: u8) -> Self {
        Self(as_id | NESTED)
    }

    /// Whether it is the tree of nested guests.
    pub fn is_nested(self) -> bool {
        self.0 & NESTED != 0
    }

    /// Address space.
    pub fn as_id(self) -> u8 {
        self.0 & !NESTED
    }
}

/// Where a change took place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a tree that vCPUs use.
    Live(Space),
    /// Below a table or root that is being taken down.
    Detached,
    /// The same, in a tree of nested guests.
    Nested,
    /// Below a root that was given up for another one.
    GivenUp,
    /// Nowhere: nothing became nothing.
    Nowhere {
        /// In a table that is being taken down.
        unlinked: bool,
    },
}

/// What an applied change was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    /// Where.
    pub place: Place,
    /// From what.
    pub from: Kind,
    /// To what.
    pub to: Kind,
}

/// Space, first frame, level.
type Key = (Space, u64, u8);

/// Entries that are on their way out.
#[derive(Debug)]
struct Detached {
    owner: u32,
    space: Space,
    /// By level and first frame.
    entries: HashMap<(u8, u64), u64>,
}

/// A table or tree that is on its way out.
#[derive(Clone, Copy, Debug)]
struct Unlinked {
    owner: u32,
    as_id: u8,
    start: u64,
    end: u64,
    /// Of the entry that led to it.
    level: u8,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Expected {
    live: BTreeMap<Key, u64>,
    detached: Vec<Detached>,
    unlinked: Vec<Unlinked>,
    /// Level of the root tables; 0 while none is known.
    root_level: u8,
    /// Whether huge pages may not be executed.
    pub nx_huge_pages: bool,
}

/// Whether `now` can be what the event calls `old`.
fn is_same(now: u64, old: u64) -> bool {
    (now ^ old) & !ACCESSED_DIRTY == 0
}

fn is_gone(kind: Kind) -> bool {
    matches!(kind, Kind::None | Kind::Frozen)
}

impl Expected {
    /// Nothing mapped.
    pub fn new(nx_huge_pages: bool) -> Self {
        Self {
            nx_huge_pages,
            ..Self::default()
        }
    }

    /// Roots have this level from now on.
    pub fn set_root_level(&mut self, level: u8) {
        self.root_level = level;
    }

    /// Applies one change that `thread` made: in the tree of nested guests, if `nested` and it makes an entry.
    ///
    /// # Errors
    ///
    /// [`Contradiction`] if the event cannot follow what came before. The entry then is what the event says.
    pub fn apply(
        &mut self,
        thread: u32,
        nested: bool,
        change: &Change,
    ) -> Result<Applied, Contradiction> {
        let (from, to) = (
            kind(change.old, change.level),
            kind(change.new, change.level),
        );
        let applied = |place| Ok(Applied { place, from, to });
        if to == Kind::Unknown || (to == Kind::Leaf && change.level > 3) {
            return Err(contradiction(change, Wrong::Unknown(change.new)));
        }
        if is_gone(to)
            && let Some((owner, space)) = self.remove_detached(thread, change)
        {
            return applied(match owner {
                _ if space.is_nested() => Place::Nested,
                NOBODY => Place::GivenUp,
                _ => Place::Detached,
            });
        }
        if is_gone(from) && is_gone(to) {
            let unlinked = self.unlinked.iter().any(|unlinked| {
                unlinked.as_id == change.as_id
                    && (unlinked.start..unlinked.end).contains(&change.gfn)
                    && unlinked.level > change.level
            });
            return applied(Place::Nowhere { unlinked });
        }
        let own = if nested {
            Space::nested(change.as_id)
        } else {
            Space::normal(change.as_id)
        };
        let spaces = if is_gone(from) {
            [own, own]
        } else {
            [Space::normal(change.as_id), Space::nested(change.as_id)]
        };
        let key = |space| (space, change.gfn, change.level);
        let found = spaces
            .into_iter()
            .find(|&space| match self.live.get(&key(space)) {
                Some(&now) => is_same(now, change.old),
                None => is_gone(from),
            });
        let Some(space) = found else {
            let was = self.live.get(&key(own)).copied();
            self.write(thread, own, change);
            return Err(contradiction(
                change,
                Wrong::OldValue {
                    was,
                    old: change.old,
                },
            ));
        };
        let below_table = is_gone(to) || self.has_parent(space, change);
        self.write(thread, space, change);
        if below_table {
            applied(Place::Live(space))
        } else {
            Err(contradiction(change, Wrong::NoTable))
        }
    }

    /// Removes the entry from what is detached, and tells who took that down and which tree it was of. A thread looks at what it took down itself first.
    fn remove_detached(&mut self, thread: u32, change: &Change) -> Option<(u32, Space)> {
        let holds = |d: &Detached| {
            d.space.as_id() == change.as_id
                && d.entries
                    .get(&(change.level, change.gfn))
                    .is_some_and(|&now| is_same(now, change.old))
        };
        let own = self
            .detached
            .iter()
            .position(|d| d.owner == thread && holds(d));
        let index = own.or_else(|| self.detached.iter().position(holds))?;
        let detached = self.detached.get_mut(index)?;
        detached.entries.remove(&(change.level, change.gfn));
        Some((detached.owner, detached.space))
    }

    fn has_parent(&self, space: Space, change: &Change) -> bool {
        if change.level >= self.root_level {
            return change.level == self.root_level;
        }
        let parent = change.level + 1;
        let key = (space, spte::align(change.gfn, parent), parent);
        self.live
            .get(&key)
            .is_some_and(|&now| kind(now, parent) == Kind::Table)
    }

    /// Writes the new value, with what follows from it for the entries below.
    fn write(&mut self, thread: u32, space: Space, change: &Change) {
        let (from, to) = (
            kind(change.old, change.level),
            kind(change.new, change.level),
        );
        let key = (space, change.gfn, change.level);
        if is_gone(to) {
            self.live.remove(&key);
        } else {
            self.live.insert(key, change.new);
        }
        if from == Kind::Table && to != Kind::Table {
            self.detach(thread, space, change.gfn, change.level);
        }
        if from == Kind::Leaf && to == Kind::Table {
            let huge = Leaf {
                gfn: change.gfn,
                level: change.level,
                spte: change.old,
            };
            for index in 0..512 {
                let child = huge.child(index, self.nx_huge_pages);
                self.live
                    .insert((space, child.gfn, child.level), child.spte);
            }
        }
    }

    /// Detaches everything below the table at `gfn` and `level`.
    fn detach(&mut self, owner: u32, space: Space, gfn: u64, level: u8) {
        self.unlinked.push(Unlinked {
            owner,
            as_id: space.as_id(),
            start: gfn,
            end: gfn.saturating_add(pages(level)),
            level,
        });
        let below: Vec<Key> = self
            .live
            .range((space, gfn, 0)..(space, gfn.saturating_add(pages(level)), 0))
            .map(|(&key, _)| key)
            .filter(|key| key.2 < level)
            .collect();
        let mut entries = HashMap::with_capacity(below.len());
        for key in below {
            if let Some(now) = self.live.remove(&key) {
                entries.insert((key.2, key.1), now);
            }
        }
        if !entries.is_empty() {
            self.detached.push(Detached {
                owner,
                space,
                entries,
            });
        }
    }

    /// All roots become obsolete at once; `owner` takes them down.
    pub fn detach_all(&mut self, owner: u32) {
        let spaces: BTreeSet<Space> = self.live.keys().map(|&(space, ..)| space).collect();
        for space in spaces {
            self.detach_tree(owner, space);
        }
    }

    /// One root becomes obsolete; `owner` takes it down.
    pub fn detach_tree(&mut self, owner: u32, space: Space) {
        self.unlinked.push(Unlinked {
            owner,
            as_id: space.as_id(),
            start: 0,
            end: u64::MAX,
            level: u8::MAX,
        });
        let entries: HashMap<(u8, u64), u64> = self
            .live
            .extract_if((space, 0, 0)..=(space, u64::MAX, u8::MAX), |_, _| true)
            .map(|((_, gfn, level), now)| ((level, gfn), now))
            .collect();
        self.detached.push(Detached {
            owner,
            space,
            entries,
        });
    }

    /// Whether a tree has any entry.
    pub fn has_entries(&self, space: Space) -> bool {
        self.live
            .range((space, 0, 0)..=(space, u64::MAX, u8::MAX))
            .next()
            .is_some()
    }

    /// `thread` is done with what it took down: whatever is left of it should not be.
    pub fn finish_detached(&mut self, thread: u32) -> Vec<Contradiction> {
        self.unlinked.retain(|unlinked| unlinked.owner != thread);
        let mut left = Vec::new();
        self.detached.retain(|detached| {
            if detached.owner != thread {
                return !detached.entries.is_empty();
            }
            for (&(level, gfn), &now) in &detached.entries {
                if matches!(kind(now, level), Kind::Leaf | Kind::Table) {
                    left.push(Contradiction {
                        as_id: detached.space.as_id(),
                        level,
                        gfn,
                        what: Wrong::LeftBehind(now),
                    });
                }
            }
            false
        });
        left.sort_by_key(|c| (c.as_id, c.gfn, c.level));
        left
    }

    /// Repairs the entry of `level` over `gfn` as the lock-free path did.
    ///
    /// # Errors
    ///
    /// [`Contradiction`] if the entry was not what the event says.
    pub fn repair(&mut self, space: Space, change: &Change) -> Result<(), Contradiction> {
        match self.live.get_mut(&(space, change.gfn, change.level)) {
            Some(now)
                if is_same(*now, change.old) && kind(change.new, change.level) == Kind::Leaf =>
            {
                *now = change.new;
                Ok(())
            }
            now => Err(contradiction(
                change,
                Wrong::OldValue {
                    was: now.copied(),
                    old: change.old,
                },
            )),
        }
    }

    /// The leaf that maps `gfn`.
    pub fn leaf_at(&self, space: Space, gfn: u64) -> Option<Leaf> {
        (1..=3).find_map(|level| {
            let first = spte::align(gfn, level);
            let &spte = self.live.get(&(space, first, level))?;
            (kind(spte, level) == Kind::Leaf).then_some(Leaf {
                gfn: first,
                level,
                spte,
            })
        })
    }

    /// Whether `gfn` is known to be device memory.
    pub fn is_mmio(&self, space: Space, gfn: u64) -> bool {
        self.live
            .get(&(space, gfn, 1))
            .is_some_and(|&now| kind(now, 1) == Kind::Mmio)
    }

    /// The leaves that map any frame of `[start, end)`, in order.
    pub fn leaves(&self, space: Space, start: u64, end: u64) -> impl Iterator<Item = Leaf> {
        let over_start = if start < end {
            self.leaf_at(space, start).filter(|leaf| leaf.gfn < start)
        } else {
            None
        };
        let inside = self
            .live
            .range((space, start, 0)..(space, end.max(start), 0))
            .filter(|&(&(_, _, level), &now)| kind(now, level) == Kind::Leaf)
            .map(|(&(_, gfn, level), &spte)| Leaf { gfn, level, spte });
        over_start.into_iter().chain(inside)
    }

    /// Every entry that covers a frame of `[start, end)`, tables before what they hold: first frame, level, value.
    pub fn entries_over(
        &self,
        space: Space,
        start: u64,
        end: u64,
    ) -> impl Iterator<Item = (u64, u8, u64)> {
        let over = (1..=5).rev().filter_map(move |level| {
            let first = spte::align(start, level);
            let spte = *self.live.get(&(space, first, level))?;
            (first < start && start < end).then_some((first, level, spte))
        });
        let mut inside: Vec<(u64, u8, u64)> = self
            .live
            .range((space, start, 0)..(space, end.max(start), 0))
            .map(|(&(_, gfn, level), &spte)| (gfn, level, spte))
            .collect();
        inside.sort_by_key(|&(gfn, level, _)| (gfn, std::cmp::Reverse(level)));
        over.chain(inside)
    }

    /// Whether the table below the entry at `gfn` and `level` holds anything.
    pub fn has_below(&self, as_id: u8, gfn: u64, level: u8) -> bool {
        let space = Space::normal(as_id);
        self.live
            .range((space, gfn, 0)..(space, gfn.saturating_add(pages(level)), 0))
            .any(|(&(_, _, below), _)| below < level)
    }

    /// All leaves of a tree, in order.
    pub fn all_leaves(&self, space: Space) -> impl Iterator<Item = Leaf> {
        self.leaves(space, 0, u64::MAX)
    }

    /// Entries of the trees that vCPUs use.
    pub fn entries(&self) -> usize {
        self.live.len()
    }

    /// Whether no tree has a leaf or a table.
    pub fn maps_nothing(&self) -> bool {
        !self
            .live
            .iter()
            .any(|(&(_, _, level), &now)| matches!(kind(now, level), Kind::Leaf | Kind::Table))
    }
}

fn contradiction(change: &Change, what: Wrong) -> Contradiction {
    Contradiction {
        as_id: change.as_id,
        level: change.level,
        gfn: change.gfn,
        what,
    }
}
