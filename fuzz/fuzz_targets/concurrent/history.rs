//! Whether what threads saw of one guest frame can be told as a history of one operation after the other.
//!
//! An operation lies somewhere between its beginning and its end, by a clock that all threads share. The search tries what
//! may come next, thread by thread: an operation may come next unless another one that is not told yet ended before it
//! began. A frame is nothing or a leaf with three flags, so that where the search was and in which state is soon exhausted.

use std::collections::HashSet;

/// What was done to one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Did {
    /// A fault, for a write or not; whether an entry changed.
    Fault { write: bool, fixed: bool },
    /// The leaf was taken away; whether there was one, if that is known.
    Zap(Option<bool>),
    /// Write permission was taken; whether there was any.
    Protect(bool),
    /// The accessed flag was taken; whether it was set.
    Age(bool),
    /// Whether it is set.
    TestAge(bool),
    /// Whether there is a leaf.
    Look(bool),
    /// The processor walked there; whether it got through.
    Touch { write: bool, through: bool },
    /// At the end: whether there is a leaf, and whether its dirty flag is set.
    Final(Option<bool>),
}

/// One operation of one thread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    pub(crate) began: u64,
    pub(crate) ended: u64,
    pub(crate) did: Did,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Leaf {
    writable: bool,
    young: bool,
    /// A write went through: its dirty flag must be there.
    written: bool,
}

type State = Option<Leaf>;

/// The state afterwards, if `did` can have happened in `state`.
fn after(state: State, did: Did) -> Option<State> {
    match (did, state) {
        (Did::Fault { fixed: true, .. }, None) => Some(Some(Leaf {
            writable: true,
            young: true,
            written: false,
        })),
        (Did::Fault { fixed: false, .. }, None) => None,
        (Did::Fault { write, fixed }, Some(leaf)) => {
            let repairs = write && !leaf.writable;
            let repaired = Leaf {
                writable: leaf.writable || repairs,
                ..leaf
            };
            (fixed == repairs).then_some(Some(repaired))
        }
        (Did::Zap(was), state) => was.is_none_or(|was| was == state.is_some()).then_some(None),
        (Did::Protect(was), state) => {
            let is = state.is_some_and(|leaf| leaf.writable);
            let protected = state.map(|leaf| Leaf {
                writable: false,
                ..leaf
            });
            (was == is).then_some(protected)
        }
        (Did::Age(was), state) => {
            let is = state.is_some_and(|leaf| leaf.young);
            let aged = state.map(|leaf| Leaf {
                young: false,
                ..leaf
            });
            (was == is).then_some(aged)
        }
        (Did::TestAge(was), state) => {
            (was == state.is_some_and(|leaf| leaf.young)).then_some(state)
        }
        (Did::Look(was), state) => (was == state.is_some()).then_some(state),
        (Did::Touch { write, through }, state) => {
            let passes = state.is_some_and(|leaf| leaf.writable || !write);
            let touched = state.map(|leaf| match passes {
                true => Leaf {
                    young: true,
                    written: leaf.written || write,
                    ..leaf
                },
                false => leaf,
            });
            (through == passes).then_some(touched)
        }
        (Did::Final(None), state) => state.is_none().then_some(state),
        (Did::Final(Some(dirty)), Some(leaf)) => (dirty || !leaf.written).then_some(state),
        (Did::Final(Some(_)), None) => None,
    }
}

/// Whether the events of the threads, each in its own order, can be told as one history.
pub(crate) fn is_possible(threads: &[Vec<Event>]) -> bool {
    let mut seen = HashSet::new();
    let mut open = vec![(vec![0usize; threads.len()], None)];
    while let Some((told, state)) = open.pop() {
        if told
            .iter()
            .zip(threads)
            .all(|(&n, events)| n == events.len())
        {
            return true;
        }
        let next = |t: usize| threads[t].get(told[t]);
        let first_end = (0..threads.len())
            .filter_map(|t| Some(next(t)?.ended))
            .min();
        for t in 0..threads.len() {
            let Some(event) = next(t).filter(|event| Some(event.began) <= first_end) else {
                continue;
            };
            if let Some(state) = after(state, event.did) {
                let mut told = told.clone();
                told[t] += 1;
                if seen.insert((told.clone(), state)) {
                    open.push((told, state));
                }
            }
        }
    }
    false
}
