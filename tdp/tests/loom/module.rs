//! A trusted module in small, which notices every call out of order.
//!
//! Each place of the protected table is a loom cell. A call writes the cell of its own place, so that two calls on one
//! place that nothing orders are a race; and it reads the cell of the parent, so that a parent that is linked, blocked or
//! taken out beside it is one too. What the module checks on top is what a real one checks: states, tickets, pages.

#![allow(unsafe_code)]
// UNSAFETY: the cells are reached from several threads.

use loom::cell::UnsafeCell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering as Plain};
use tdp::protected::{Capabilities, Content, Drained, Failure, Inspected, Scope, Ticket};
use tdp::{EntryPlace, FrozenEntry, Gfn, Level, OutOfFrames, Pfn, ProtectedTable};

/// First of the pages that the module can have as tables.
const FIRST_TWIN: u64 = 0x7000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Table { twin: Pfn, blocked: Option<u64> },
    Leaf { pfn: Pfn, blocked: Option<u64> },
}

/// What calls do besides.
#[derive(Clone, Copy, Default)]
pub(crate) struct Manner {
    /// Blocks exclude each other: one thread carries for all.
    pub(crate) combine: bool,
    /// No block and no ticket.
    pub(crate) flushes_itself: bool,
    /// The first so many installs are refused.
    pub(crate) refuse_installs: usize,
    /// The first so many blocks are busy.
    pub(crate) busy_blocks: usize,
    /// The first so many blocks are refused.
    pub(crate) refuse_blocks: usize,
    /// Large leaves, which are split and merged.
    pub(crate) large: bool,
    /// The first so many merges are refused.
    pub(crate) refuse_merges: usize,
}

pub(crate) struct Module {
    manner: Manner,
    /// Entries of level 2 at frames 0 and 512, then of level 1 at 0, 1, 512, 513.
    places: [UnsafeCell<State>; 6],
    refused: AtomicUsize,
    busy: AtomicUsize,
    refused_blocks: AtomicUsize,
    refused_merges: AtomicUsize,
    refuse_tickets: AtomicUsize,
    begun: AtomicU64,
    drained: AtomicU64,
    twins: Mutex<Vec<Pfn>>,
}

// SAFETY: loom checks the accesses of the cells, and a model runs its threads on one thread of the system.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    pub(crate) fn new(manner: Manner) -> Self {
        Self {
            manner,
            places: std::array::from_fn(|_| UnsafeCell::new(State::Free)),
            refused: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            refused_blocks: AtomicUsize::new(0),
            refused_merges: AtomicUsize::new(0),
            refuse_tickets: AtomicUsize::new(0),
            begun: AtomicU64::new(0),
            drained: AtomicU64::new(0),
            twins: Mutex::new((0..12).map(|n| Pfn(FIRST_TWIN + n)).collect()),
        }
    }

    fn cell(&self, gfn: Gfn, level: Level) -> &UnsafeCell<State> {
        let table = (gfn.0 >> 9) as usize;
        match level {
            Level::L2 => &self.places[table],
            _ => &self.places[2 + 2 * table + (gfn.0 & 1) as usize],
        }
    }

    /// Changes the state of a place, below a parent that is there and not blocked.
    fn change(
        &self,
        entry: &FrozenEntry<'_>,
        change: impl FnOnce(State) -> Result<State, Failure>,
    ) -> Result<(), Failure> {
        let EntryPlace { gfn, level, .. } = entry.place();
        if level == Level::L1 {
            self.cell(gfn, Level::L2).with(|parent| {
                // SAFETY: loom has checked that nobody writes it now.
                let parent = unsafe { *parent };
                assert!(
                    matches!(parent, State::Table { blocked: None, .. }),
                    "a call below {parent:?}"
                );
            });
        }
        self.cell(gfn, level).with_mut(|state| {
            // SAFETY: loom has checked that nobody else reads or writes it now.
            let state = unsafe { &mut *state };
            *state = change(*state)?;
            Ok(())
        })
    }

    /// Whether both entries of the table below a place are free. Whoever owns the table's entry may look.
    fn is_empty(&self, place: EntryPlace) -> bool {
        [0, 1].into_iter().all(|n| {
            self.cell(Gfn(place.gfn.0 + n), Level::L1).with(|state| {
                // SAFETY: as for a parent.
                unsafe { *state == State::Free }
            })
        })
    }

    /// Exchanges what both entries of the table below a place hold. Whoever owns the table's entry may do so.
    fn exchange_below(&self, place: EntryPlace, new: [State; 2]) -> [State; 2] {
        let mut number = 0;
        new.map(|new| {
            let gfn = Gfn(place.gfn.0 + number);
            number += 1;
            self.cell(gfn, Level::L1).with_mut(|state| {
                // SAFETY: loom has checked that nobody else reads or writes it now.
                std::mem::replace(unsafe { &mut *state }, new)
            })
        })
    }

    fn check_drained(&self, stamp: Option<u64>) {
        if self.manner.flushes_itself {
            return;
        }
        let stamp = stamp.expect("blocked before it is taken away");
        assert!(
            self.drained.load(Plain::Relaxed) > stamp,
            "a ticket that began before the block"
        );
    }

    /// Refuses the next so many tickets.
    pub(crate) fn refuse_tickets(&self, count: usize) {
        self.refuse_tickets.store(count, Plain::Relaxed);
    }

    /// Pages given as tables that have not come back.
    pub(crate) fn twins_out(&self) -> usize {
        12 - self.twins.lock().unwrap().len()
    }

    /// What is mapped at a frame. Nobody is at work.
    pub(crate) fn leaf(&self, gfn: Gfn) -> Option<Pfn> {
        [Level::L2, Level::L1].into_iter().find_map(|level| {
            self.cell(gfn, level).with(|state| {
                // SAFETY: as for a parent.
                match unsafe { *state } {
                    State::Leaf { pfn, .. } => Some(Pfn(pfn.0 + (gfn.0 & (level.pages() - 1)))),
                    _ => None,
                }
            })
        })
    }
}

impl ProtectedTable for Module {
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::none().needs_link();
        if !self.manner.flushes_itself {
            capabilities = capabilities.needs_block();
        }
        if self.manner.combine {
            capabilities = capabilities.serialises_block();
        }
        if self.manner.large {
            capabilities = capabilities
                .split_live()
                .merge()
                .leaves(Level::L1, Level::L2);
        }
        capabilities
    }

    fn allocate_twins(&self, out: &mut [Pfn]) -> Result<usize, OutOfFrames> {
        let mut twins = self.twins.lock().unwrap();
        let count = out.len().min(twins.len()).min(4);
        for slot in &mut out[..count] {
            *slot = twins.pop().unwrap();
        }
        if count == 0 {
            return Err(OutOfFrames { limit: 12 });
        }
        Ok(count)
    }

    fn free_twins(&self, twins: &[Pfn]) {
        let mut home = self.twins.lock().unwrap();
        for &twin in twins {
            assert!(!home.contains(&twin), "{twin:?} came home twice");
            home.push(twin);
        }
    }

    fn link(&self, entry: &FrozenEntry<'_>, twin: Pfn) -> Result<(), Failure> {
        assert!(self.is_empty(entry.place()));
        self.change(entry, |state| {
            assert_eq!(state, State::Free, "linked twice");
            let blocked = None;
            Ok(State::Table { twin, blocked })
        })
    }

    fn install(&self, entry: &FrozenEntry<'_>, pfn: Pfn, _: Content) -> Result<(), Failure> {
        if self.refused.fetch_add(1, Plain::Relaxed) < self.manner.refuse_installs {
            return Err(Failure::Refused(7));
        }
        self.change(entry, |state| {
            assert_eq!(state, State::Free, "installed twice");
            Ok(State::Leaf { pfn, blocked: None })
        })
    }

    fn block(&self, entry: &FrozenEntry<'_>) -> Result<(), Failure> {
        if self.busy.fetch_add(1, Plain::Relaxed) < self.manner.busy_blocks {
            return Err(Failure::Busy { scope: Scope::Tree });
        }
        if self.refused_blocks.fetch_add(1, Plain::Relaxed) < self.manner.refuse_blocks {
            return Err(Failure::Refused(8));
        }
        let stamp = Some(self.begun.load(Plain::Relaxed));
        self.change(entry, |state| match state {
            State::Table {
                twin,
                blocked: None,
            } => Ok(State::Table {
                twin,
                blocked: stamp,
            }),
            State::Leaf { pfn, blocked: None } => Ok(State::Leaf {
                pfn,
                blocked: stamp,
            }),
            state => panic!("{state:?} is blocked"),
        })
    }

    fn flush_begin(&self) -> Result<Ticket, Failure> {
        let refuse = &self.refuse_tickets;
        if refuse.load(Plain::Relaxed) > 0 {
            refuse.fetch_sub(1, Plain::Relaxed);
            return Err(Failure::Refused(10));
        }
        let number = self.begun.fetch_add(1, Plain::Relaxed) + 1;
        assert_eq!(
            self.drained.load(Plain::Relaxed) + 1,
            number,
            "one ticket at a time"
        );
        Ok(Ticket::new(number))
    }

    fn flush_poll(&self, ticket: Ticket) -> Result<Drained, Ticket> {
        self.drained.store(ticket.number(), Plain::Relaxed);
        Ok(ticket.drained())
    }

    fn unblock(&self, entry: &FrozenEntry<'_>, _: &Drained) -> Result<(), Failure> {
        self.change(entry, |state| match state {
            State::Leaf {
                pfn,
                blocked: Some(stamp),
            } => {
                self.check_drained(Some(stamp));
                Ok(State::Leaf { pfn, blocked: None })
            }
            State::Table {
                twin,
                blocked: Some(stamp),
            } => {
                self.check_drained(Some(stamp));
                Ok(State::Table {
                    twin,
                    blocked: None,
                })
            }
            state => panic!("{state:?} is unblocked"),
        })
    }

    fn remove(&self, entry: &FrozenEntry<'_>, _: &Drained) -> Result<(), Failure> {
        self.change(entry, |state| match state {
            State::Leaf { blocked, .. } => {
                self.check_drained(blocked);
                Ok(State::Free)
            }
            state => panic!("{state:?} is removed"),
        })
    }

    fn unlink(&self, entry: &FrozenEntry<'_>, _: &Drained) -> Result<(), Failure> {
        assert!(self.is_empty(entry.place()), "children before their table");
        self.change(entry, |state| match state {
            State::Table { blocked, .. } => {
                self.check_drained(blocked);
                Ok(State::Free)
            }
            state => panic!("{state:?} is unlinked"),
        })
    }

    fn split(&self, entry: &FrozenEntry<'_>, twin: Pfn, _: &Drained) -> Result<(), Failure> {
        self.change(entry, |state| match state {
            State::Leaf { pfn, blocked } => {
                self.check_drained(blocked);
                let small = [0, 1].map(|n| State::Leaf {
                    pfn: Pfn(pfn.0 + n),
                    blocked: None,
                });
                let before = self.exchange_below(entry.place(), small);
                assert_eq!(before, [State::Free; 2]);
                let blocked = None;
                Ok(State::Table { twin, blocked })
            }
            state => panic!("{state:?} is split"),
        })
    }

    fn merge(&self, entry: &FrozenEntry<'_>, _: &Drained) -> Result<(), Failure> {
        if self.refused_merges.fetch_add(1, Plain::Relaxed) < self.manner.refuse_merges {
            return Err(Failure::Refused(9));
        }
        self.change(entry, |state| match state {
            State::Table { blocked, .. } => {
                self.check_drained(blocked);
                match self.exchange_below(entry.place(), [State::Free; 2]) {
                    [
                        State::Leaf { pfn, blocked: None },
                        State::Leaf {
                            pfn: next,
                            blocked: None,
                        },
                    ] if next.0 == pfn.0 + 1 => Ok(State::Leaf { pfn, blocked: None }),
                    below => panic!("{below:?} are merged"),
                }
            }
            state => panic!("{state:?} is merged"),
        })
    }

    fn inspect(&self, place: EntryPlace) -> Inspected {
        // An audit's look: tables here have two entries.
        self.cell(place.gfn, place.level).with(|state| {
            // SAFETY: as for a parent.
            match unsafe { *state } {
                State::Free => Inspected::Free,
                State::Table { blocked, .. } => Inspected::Table {
                    blocked: blocked.is_some(),
                },
                State::Leaf { pfn, blocked } => Inspected::Leaf {
                    pfn,
                    pending: true,
                    blocked: blocked.is_some(),
                },
            }
        })
    }
}
