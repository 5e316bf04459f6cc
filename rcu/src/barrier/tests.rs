//! The protocol of debts, explored. No model checker knows `membarrier`, so this is one of its own: a reader and two retire
//! sides step by step, in every order, on processors whose stores wait in a buffer (total store order, as on x86), with a
//! barrier that empties all of them. A section that uses what has been freed is the fault to be found.

use std::collections::HashSet;
use std::vec::Vec;

/// Fences that are imposed, and sections that the reader enters. Enough of these to pay a debt off and go on.
const FENCES: u8 = 2;
const SECTIONS: u8 = 4;
const RETIRERS: usize = 2;

/// What is left out of the protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Without {
    Nothing,
    /// A section that owes a fence does not fence.
    Fence,
    /// The fence after the last one owed.
    LastFence,
    /// The debt is looked at before the section is announced.
    Order,
    /// The lock is given up before the barrier.
    Lock,
    /// The barrier.
    Barrier,
    /// The retire side's own fence.
    RetiringFence,
}

/// Places in memory.
const WORD: usize = 0;
const OWED: usize = 1;
const LOCK: usize = 2;
const UNLINKED: usize = 3;
const PLACES: usize = UNLINKED + RETIRERS;

/// A thread's place in its program, its buffer and its registers.
#[derive(Clone, PartialEq, Eq, Hash, Default, Debug)]
struct Thread {
    at: u8,
    buffer: Vec<(usize, u8)>,
    seen: [u8; RETIRERS],
    register: u8,
    round: u8,
}

impl Thread {
    fn store(&mut self, place: usize, value: u8) {
        self.buffer.push((place, value));
    }

    fn load(&self, memory: &[u8; PLACES], place: usize) -> u8 {
        let own = self.buffer.iter().rev().find(|(at, _)| *at == place);
        own.map_or(memory[place], |&(_, value)| value)
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Default, Debug)]
struct State {
    memory: [u8; PLACES],
    freed: [bool; RETIRERS],
    reader: Thread,
    retirers: [Thread; RETIRERS],
}

/// A section used what had been freed.
#[derive(Debug)]
struct UsedFreed;

impl State {
    /// The reader's next step; `None` if it has to wait or is done.
    fn read(&self, without: Without) -> Result<Option<Self>, UsedFreed> {
        let mut next = self.clone();
        let reader = &mut next.reader;
        let fenced = reader.buffer.is_empty();
        let memory = &self.memory;
        let looks_first = without == Without::Order;
        match reader.at {
            0 if reader.round == SECTIONS => return Ok(None),
            // Announce, look at the debt; or the other way round.
            at @ (0 | 1) => {
                if (at == 0) != looks_first {
                    reader.store(WORD, 2 * reader.round + 1);
                } else {
                    reader.register = reader.load(memory, OWED);
                }
                reader.at += 1;
            }
            2 if reader.register == 0 => reader.at = 5,
            2 if fenced || without == Without::Fence => reader.at = 3,
            3 => {
                reader.store(OWED, reader.register - 1);
                let last = reader.register == 1 && without != Without::LastFence;
                reader.at = if last { 4 } else { 5 };
            }
            4 if fenced => reader.at = 5,
            2 | 4 => return Ok(None),
            // Walk, one link after the other.
            at @ (5 | 6) => {
                let link = usize::from(at - 5);
                reader.seen[link] = reader.load(memory, UNLINKED + link);
                reader.at += 1;
            }
            // Use what was found.
            7 => {
                let used = reader.seen.iter().zip(self.freed);
                if used
                    .into_iter()
                    .any(|(&unlinked, freed)| unlinked == 0 && freed)
                {
                    return Err(UsedFreed);
                }
                reader.at = 8;
            }
            _ => {
                reader.round += 1;
                reader.store(WORD, 2 * reader.round);
                reader.at = 0;
            }
        }
        Ok(Some(next))
    }

    /// The next step of a retire side.
    fn retire(&self, which: usize, without: Without) -> Option<Self> {
        let mut next = self.clone();
        let me = &mut next.retirers[which];
        let fenced = me.buffer.is_empty();
        let early = without == Without::Lock;
        match me.at {
            // Unlink: no more than a store here, so that the fence after it is needed.
            0 => me.store(UNLINKED + which, 1),
            1 if fenced || without == Without::RetiringFence => {}
            // The lock is an exchange, which fences; without the fence before it, it would stand in for it, so the lock
            // is then taken to be one that does not.
            2 if self.memory[LOCK] == 0 && (fenced || without == Without::RetiringFence) => {
                next.memory[LOCK] = 1;
            }
            3 => {
                me.register = me.load(&self.memory, OWED);
                if me.register == 0 {
                    me.store(OWED, FENCES);
                }
                if early {
                    me.store(LOCK, 0);
                }
            }
            4 if me.register != 0 || without == Without::Barrier => {}
            4 if fenced => {
                let buffers = [&mut next.reader].into_iter().chain(&mut next.retirers);
                for (place, value) in buffers.flat_map(|thread| thread.buffer.drain(..)) {
                    next.memory[place] = value;
                }
            }
            5 => {
                if !early {
                    me.store(LOCK, 0);
                }
            }
            // Look at the word, and wait if it is odd.
            6 => me.register = me.load(&self.memory, WORD),
            7 if me.register.is_multiple_of(2) || me.load(&self.memory, WORD) != me.register => {
                next.freed[which] = true;
            }
            _ => return None,
        }
        next.retirers[which].at += 1;
        Some(next)
    }

    /// The states in which a thread's oldest store has reached memory.
    fn drained(&self) -> impl Iterator<Item = Self> {
        (0..=RETIRERS).filter_map(|which| {
            let mut next = self.clone();
            let thread = match which.checked_sub(1) {
                None => &mut next.reader,
                Some(which) => &mut next.retirers[which],
            };
            if thread.buffer.is_empty() {
                return None;
            }
            let (place, value) = thread.buffer.remove(0);
            next.memory[place] = value;
            Some(next)
        })
    }
}

/// Takes every way; the number of states, or what went wrong.
fn explore(without: Without) -> Result<usize, UsedFreed> {
    let mut known = HashSet::new();
    let mut open = std::vec![State::default()];
    while let Some(state) = open.pop() {
        if !known.insert(state.clone()) {
            continue;
        }
        open.extend(state.read(without)?);
        open.extend((0..RETIRERS).filter_map(|which| state.retire(which, without)));
        open.extend(state.drained());
    }
    Ok(known.len())
}

#[test]
fn no_section_uses_what_was_freed() {
    let states = explore(Without::Nothing).unwrap();
    assert!(states > 10_000, "{states} states are not all");
}

#[test]
fn every_part_of_the_protocol_is_needed() {
    for without in [
        Without::Fence,
        Without::LastFence,
        Without::Order,
        Without::Lock,
        Without::Barrier,
        Without::RetiringFence,
    ] {
        assert!(explore(without).is_err(), "{without:?} is not missed");
    }
}
