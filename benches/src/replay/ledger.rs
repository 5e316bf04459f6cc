//! What KVM did to each entry against what the library did to it.
//!
//! Protocol. Both sides enter every change of an entry, in the order in which it happened there. Changes that are equal,
//! one by one or as a sequence with the same beginning and end, cancel each other out, whichever side was first: within
//! an operation the order among different entries is free. An *episode* is what one thread of the recording did for one
//! reason: a fault, an operation of user space, an invalidation by the host. When it ends it is *settled*: what is left
//! of its changes is explained by a [`Rule`], or is *unexplained*, on either side.
//!
//! What was copied from the record to keep the library comparable is entered as such; it cancels the recorded change
//! out and is never counted as matched.

use super::entry::{Entry, Transition};
use super::findings::{Difference, Transitions};
use super::rules::{Leftover, Rule};
use std::collections::{BTreeMap, BTreeSet};

#[cfg(test)]
mod tests;

/// Which entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// Its table is unlinked, and is being taken down.
    pub detached: bool,
    /// Address space.
    pub as_id: u8,
    /// First guest frame.
    pub gfn: u64,
    /// Level.
    pub level: u8,
}

/// What an episode was about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Class {
    /// The library did it as well.
    #[default]
    Compared,
    /// The same, in the course of a fault.
    Fault,
}

/// Number of an episode.
pub type Episode = u64;

#[derive(Clone, Copy, Debug)]
struct Item {
    episode: Episode,
    seq: u64,
    transition: Transition,
}

/// Changes of one entry that have not been cancelled out.
#[derive(Debug, Default)]
struct Account {
    recorded: Vec<Item>,
    ours: Vec<Item>,
    /// Recorded changes that the library was made to follow.
    copied: Vec<(Item, Option<Rule>)>,
    /// Changes that the library was made to make by a rule, and that have yet to be recorded.
    ahead: Vec<(Episode, Transition, Rule)>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Ledger {
    open: BTreeMap<Key, Account>,
    /// Entries with open changes, by the episode that made them.
    by_episode: BTreeMap<Episode, BTreeSet<Key>>,
}

/// The changes of `items` as one.
fn whole(items: &[Item]) -> Option<Transition> {
    items
        .iter()
        .map(|item| item.transition)
        .reduce(Transition::then)
}

impl Account {
    /// Takes recorded changes for copied, up to one that ends as `transition` does.
    fn copy(&mut self, transition: Transition, rule: Option<Rule>) -> bool {
        // What is copied is the state after the last recorded change.
        let last = self.recorded.last();
        let is_last = last.is_some_and(|last| last.transition.to.is_same_mapping(&transition.to));
        if is_last {
            let recorded = self.recorded.drain(..);
            self.copied.extend(recorded.map(|item| (item, rule)));
        }
        is_last
    }

    /// The last recorded change was copied already.
    fn catch_up(&mut self) {
        let Some(&(_, transition, rule)) = self.ahead.first() else {
            return;
        };
        if self
            .recorded
            .last()
            .is_some_and(|last| last.transition.is_same(&transition))
        {
            self.ahead.remove(0);
            self.copy(transition, Some(rule));
        }
    }

    fn is_empty(&self) -> bool {
        self.recorded.is_empty()
            && self.ours.is_empty()
            && self.copied.is_empty()
            && self.ahead.is_empty()
    }

    /// The shortest beginnings of both sides that come to the same.
    fn cancelled(&self) -> Option<(usize, usize)> {
        let lengths =
            (1..=self.recorded.len()).flat_map(|n| (1..=self.ours.len()).map(move |m| (n, m)));
        lengths
            .filter(|&(n, m)| {
                let recorded = self.recorded.get(..n).and_then(whole);
                let ours = self.ours.get(..m).and_then(whole);
                recorded.zip(ours).is_some_and(|(r, o)| r.is_same(&o))
            })
            .min_by_key(|&(n, m)| n + m)
    }
}

impl Ledger {
    /// Whether everything is cancelled out.
    pub fn is_settled(&self) -> bool {
        self.open
            .values()
            .all(|account| account.ours.is_empty() && account.recorded.is_empty())
    }

    /// The changes that KVM made of an entry and the library has yet to, as one.
    pub fn owed(&self, key: Key) -> Option<Transition> {
        whole(&self.open.get(&key)?.recorded)
    }

    /// KVM changed an entry.
    pub fn recorded(
        &mut self,
        tally: &mut Transitions,
        episode: Episode,
        seq: u64,
        key: Key,
        transition: Transition,
    ) {
        tally.total += 1;
        let item = Item {
            episode,
            seq,
            transition,
        };
        let account = self.open.entry(key).or_default();
        account.recorded.push(item);
        account.catch_up();
        self.enter(tally, episode, key);
    }

    /// The library changed an entry.
    pub fn ours(
        &mut self,
        tally: &mut Transitions,
        episode: Episode,
        seq: u64,
        key: Key,
        transition: Transition,
    ) {
        let item = Item {
            episode,
            seq,
            transition,
        };
        self.open.entry(key).or_default().ours.push(item);
        self.enter(tally, episode, key);
    }

    /// The library was made to change an entry as recorded, for want of an operation.
    pub fn copied(&mut self, key: Key, transition: Transition) {
        if let Some(account) = self.open.get_mut(&key) {
            account.copy(transition, None);
        }
    }

    /// The library was made to follow the record because of a rule. What goes with it may be recorded later.
    pub fn followed(&mut self, episode: Episode, key: Key, transition: Transition, rule: Rule) {
        let account = self.open.entry(key).or_default();
        if !account.copy(transition, Some(rule)) {
            account.ahead.push((episode, transition, rule));
            self.by_episode.entry(episode).or_default().insert(key);
        }
    }

    fn enter(&mut self, tally: &mut Transitions, episode: Episode, key: Key) {
        let Some(account) = self.open.get_mut(&key) else {
            return;
        };
        while let Some((n, m)) = account.cancelled() {
            account.recorded.drain(..n);
            account.ours.drain(..m);
            tally.matched += n as u64;
        }
        if account.is_empty() {
            self.open.remove(&key);
        } else {
            self.by_episode.entry(episode).or_default().insert(key);
        }
    }

    /// The episode is over.
    pub fn settle(
        &mut self,
        tally: &mut Transitions,
        episode: Episode,
        class: Class,
    ) -> Vec<Difference> {
        let mut differences = Vec::new();
        for key in self.by_episode.remove(&episode).unwrap_or_default() {
            let Some(account) = self.open.get_mut(&key) else {
                continue;
            };
            let own = |item: &mut Item| item.episode == episode;
            let left: Vec<Item> = account.recorded.extract_if(.., own).collect();
            let ours: Vec<Item> = account.ours.extract_if(.., own).collect();
            account.ahead.retain(|ahead| ahead.0 != episode);
            let own = |(item, _): &mut (Item, _)| item.episode == episode;
            let mut recorded = Vec::new();
            for (item, rule) in account.copied.extract_if(.., own) {
                match rule {
                    Some(rule) => tally.explained(rule, 1),
                    None => recorded.push(item),
                }
            }
            recorded.extend(left);
            if account.is_empty() {
                self.open.remove(&key);
            }
            let seq = recorded.iter().chain(&ours).map(|item| item.seq).max();
            let leftover = Leftover {
                key,
                recorded: whole(&recorded),
                ours: whole(&ours),
                in_fault: class == Class::Fault,
            };
            let (count, extra) = (recorded.len() as u64, ours.len() as u64);
            if count == 0 && extra > 0 {
                // The library's own, which nobody recorded.
                tally.total += 1;
            }
            if count + extra == 0 {
                continue;
            }
            match leftover.rule() {
                Some(rule) => tally.explained(rule, count.max(1)),
                None => {
                    tally.unexplained += count.max(1);
                    differences.push(difference(seq.unwrap_or_default(), &leftover));
                }
            }
        }
        differences
    }

    /// Everything is over: episodes that the trace does not end, in the order of their numbers.
    pub fn episodes(&self) -> Vec<Episode> {
        self.by_episode.keys().copied().collect()
    }
}

fn difference(seq: u64, leftover: &Leftover) -> Difference {
    let show = |transition: Option<Transition>| {
        transition.map_or_else(
            || "no change".to_owned(),
            |transition| transition.to_string(),
        )
    };
    let Key {
        as_id, gfn, level, ..
    } = leftover.key;
    Difference {
        seq,
        as_id,
        gfn,
        level,
        expected: show(leftover.recorded),
        got: show(leftover.ours),
    }
}

/// A change that makes nothing of an entry.
pub fn removal(from: Entry) -> Transition {
    Transition {
        from,
        to: Entry::Gone,
    }
}
