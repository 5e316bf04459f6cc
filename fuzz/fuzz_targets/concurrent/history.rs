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
    /// When all are done: whether there is a leaf, and whether its dirty flag is set.
    Final(Option<bool>),
}

/// One operation of one thread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    pub(crate) began: u64,
    pub(crate) ended: u64,
    pub(crate) did: Did,
}

/// A leaf, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Leaf {
    writable: bool,
    young: bool,
    /// A write went through: its dirty flag must be there.
    written: bool,
}

pub(crate) type State = Option<Leaf>;

/// The state afterwards, if `did` can have happened in `state`.
pub(crate) fn after(state: State, did: Did) -> Option<State> {
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

/// In which states the frame may be after the events of the threads, each in its own order, if it was in one of `before`. None
/// if the events cannot be told as one history.
pub(crate) fn endings<const THREADS: usize>(
    threads: &[&[Event]; THREADS],
    before: &HashSet<State>,
) -> HashSet<State> {
    let mut endings = HashSet::new();
    let mut seen = HashSet::new();
    let mut open: Vec<_> = before.iter().map(|&state| ([0; THREADS], state)).collect();
    while let Some((told, state)) = open.pop() {
        let next = |t: usize| threads[t].get(told[t]);
        let Some(first_end) = (0..THREADS).filter_map(|t| Some(next(t)?.ended)).min() else {
            endings.insert(state);
            continue;
        };
        for t in 0..THREADS {
            let Some(event) = next(t).filter(|event| event.began <= first_end) else {
                continue;
            };
            if let Some(state) = after(state, event.did) {
                let mut told = told;
                told[t] += 1;
                if seen.insert((told, state)) {
                    open.push((told, state));
                }
            }
        }
    }
    endings
}
