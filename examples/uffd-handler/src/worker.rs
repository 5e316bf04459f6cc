//! A thread that resolves faults.
//!
//! Protocol. What a fault finds in the table says what is to be done:
//!
//! | the table | the worker |
//! |---|---|
//! | filled it | nothing: the copy has woken who waited |
//! | had it already | wakes who asks, who may have asked before it came; maps it, if it is in the file and not mapped |
//! | had it already, again and again | fills it from the source anew: it was given up, and nobody has said so |
//! | given up | zeroes, unless something is in the file |
//! | no region | wakes: the thread will see for itself; if it comes again and again, the session ends |
//! | sent back by a change | reads and applies changes, then tries again |
//!
//! Of the workers that have nothing to do one waits for messages, the others for its place, which it leaves once it has
//! read one: a fault finds a single waiter to wake, however many workers there are.

use crate::baseline::MutexTable;
use crate::changes;
use crate::dirty::Writer;
use crate::host::{PageStates, SPACE, UffdHost, frames};
use crate::session::{SessionError, Shared, Table, lock};
use crate::sys::Message;
use crate::table::{Known, Refusal, bytes, frame, knowing, last_refusal};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use tdp::{Ept, Fault, Gpa, Host, MemoryFault, Outcome, Vcpu, Visibility};

/// Faults by how they ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Served {
    /// Filled from the source.
    pub filled: u64,
    /// In the file of guest memory already, and mapped.
    pub mapped: u64,
    /// Filled with zeroes, because they had been given up.
    pub zeroed: u64,
    /// There already when they were looked at.
    pub spurious: u64,
    /// Writes to protected pages.
    pub writes: u64,
    /// In no region.
    pub strays: u64,
    /// Looked at again: frozen by another thread for longer than it is worth waiting, or sent back by a change.
    pub retries: u64,
}

impl Served {
    pub(crate) fn add(&mut self, other: &Served) {
        self.filled += other.filled;
        self.mapped += other.mapped;
        self.zeroed += other.zeroed;
        self.spurious += other.spurious;
        self.writes += other.writes;
        self.strays += other.strays;
        self.retries += other.retries;
    }
}

enum Engine {
    Tdp(Box<Vcpu<Ept, UffdHost>>),
    Mutex(Arc<MutexTable>),
}

/// A worker of a session.
pub(crate) struct Worker {
    shared: Arc<Shared>,
    engine: Engine,
    writer: Option<Writer>,
    served: Served,
    /// Whether it is worth to look for the next message before a wait: the last time that this was done one came. Where none
    /// comes, the looks are system calls for nothing.
    eager: bool,
    /// Messages read since it was last tried.
    since: u32,
    /// Faults on pages that the table has.
    present: Times,
    /// Faults about which nothing could be done.
    stray: Times,
}

/// Faults on a page of which nothing is known. One that is being unmapped is reported a few times.
const STRAYS: u32 = 1000;
/// Faults on a page that the table has. Threads that asked for it before it came are at most one for each message that was
/// read by then, and most of those are read by other workers.
const PRESENT: u32 = 4;

/// How often each page came up lately.
struct Times {
    pages: HashMap<u64, u32>,
    since: Instant,
}

impl Times {
    /// What lies longer back has nothing to do with now: a fault that comes again and again does so at once.
    const LATELY: Duration = Duration::from_secs(60);
    /// Pages that are kept in mind: more than a VM has threads, each of which waits for one.
    const MOST: usize = 4096;

    fn new() -> Self {
        Self {
            pages: HashMap::new(),
            since: Instant::now(),
        }
    }

    /// Notes another, and says how many there were.
    fn another(&mut self, page: u64) -> u32 {
        if self.pages.len() >= Self::MOST || self.since.elapsed() > Self::LATELY {
            self.pages.clear();
            self.since = Instant::now();
        }
        let times = self.pages.entry(page).or_default();
        *times += 1;
        *times
    }

    fn forget(&mut self, page: u64) {
        self.pages.remove(&page);
    }
}

/// After so many messages it is tried again.
const TRY_AFTER: u32 = 8;
/// Looks before a wait. Whoever has its page goes on and often faults again soon, on this processor, which the looks let it
/// have: to be put to sleep and woken for that costs more than the copy.
const LOOKS: u32 = 32;

fn system(what: &'static str) -> impl Fn(io::Error) -> SessionError {
    move |error| SessionError::System { what, error }
}

impl Worker {
    pub(crate) fn new(shared: &Arc<Shared>) -> Result<Self, SessionError> {
        let engine = match &shared.table {
            Table::Tdp(states) => Engine::Tdp(Box::new(states.vcpu()?)),
            Table::Mutex(table) => Engine::Mutex(table.clone()),
        };
        let writer = shared.writes.as_ref().map(|log| log.writer()).transpose()?;
        Ok(Self {
            shared: shared.clone(),
            engine,
            writer,
            served: Served::default(),
            eager: true,
            since: 0,
            present: Times::new(),
            stray: Times::new(),
        })
    }

    pub(crate) fn run(&mut self) -> Served {
        while !self.shared.is_stopping() {
            if let Err(error) = self.step() {
                self.shared.fail(error);
            }
        }
        self.served
    }

    fn step(&mut self) -> Result<(), SessionError> {
        let message = if self.eager {
            self.look()?
        } else {
            self.shared.wait()?
        };
        self.since += 1;
        if message.is_none() || self.since == TRY_AFTER {
            // If there was one, the next may come as soon; if not, it is to be waited for.
            self.eager = message.is_some();
            self.since = 0;
        }
        match message {
            Some(Message::Fault {
                address,
                protected: true,
                ..
            }) => self.write(address),
            Some(Message::Fault { address, minor, .. }) => self.fill(address, minor),
            Some(Message::Unknown(kind)) => Err(SessionError::Message(kind)),
            // Applied.
            Some(_) => Ok(()),
            None => Ok(()),
        }
    }

    /// Looks a few times for a message, and lets others run in between.
    fn look(&self) -> Result<Option<Message>, SessionError> {
        for _ in 0..LOOKS {
            // Reading what may be a change keeps the others from copying: not without reason.
            if !self.shared.has_gate() || self.shared.poll(0)? {
                let message = self.shared.read()?;
                if message.is_some() || self.shared.is_stopping() {
                    return Ok(message);
                }
            }
            thread::yield_now();
        }
        Ok(None)
    }

    /// A thread waits for a page, which is in the file of guest memory or is not.
    fn fill(&mut self, address: u64, cached: bool) -> Result<(), SessionError> {
        let shared = self.shared.clone();
        let states = match (&mut self.engine, &shared.table) {
            (Engine::Mutex(table), _) => {
                let table = table.clone();
                let fill = |anew| table.fill(address, anew).map_err(system("a copy"));
                let filled = fill(false)? || self.is_lost(address, 4096) && fill(true)?;
                self.served.filled += u64::from(filled);
                return Ok(());
            }
            (Engine::Tdp(_), Table::Tdp(states)) => states,
            (Engine::Tdp(_), Table::Mutex(_)) => return Ok(()),
        };
        let mut known = if cached {
            Known::Cached
        } else {
            Known::Missing
        };
        while !shared.is_stopping() {
            let Engine::Tdp(vcpu) = &mut self.engine else {
                break;
            };
            let fault = Fault::read(Gpa(address)).private();
            match knowing(known, || vcpu.fault(fault))? {
                Outcome::Fixed { .. } => {
                    if known == Known::Nothing {
                        self.changes(states, address)?;
                    }
                    self.served.filled += 1;
                    self.record(states, address);
                    return Ok(());
                }
                Outcome::Spurious if !cached => {
                    let page = page_size(states, address).unwrap_or(4096);
                    if !self.is_lost(address, page) {
                        return Ok(());
                    }
                    // Another worker may do the same, and the guest may have written to what that one put there: what the
                    // kernel has said of the page counts no longer, to whichever worker it was said.
                    known = Known::Nothing;
                    self.changes(states, address)?;
                    states.host().protected().doubt();
                    let to = address & !(page - 1);
                    states
                        .zap_private(SPACE, frames(to, to + page))
                        .map_err(changes::lost)?;
                }
                Outcome::Spurious => {
                    let page = page_size(states, address).unwrap_or(4096);
                    let (table, to) = (states.host().protected(), address & !(page - 1));
                    match table.pass().and_then(|_guard| table.map(to, page)) {
                        Ok(true) => {
                            self.served.mapped += 1;
                            return Ok(());
                        }
                        // Given up, of which the report is on its way.
                        Ok(false) => {
                            self.shared.drain()?;
                            return self.stray(address);
                        }
                        Err(why) => {
                            if self.refused(address, why)? {
                                return Ok(());
                            }
                        }
                    }
                }
                Outcome::Retry(_) => self.served.retries += 1,
                Outcome::MemoryFault(MemoryFault::IsShared) => {
                    self.changes(states, address)?;
                    match zero(states, address, cached) {
                        Ok(Some(zeroed)) => {
                            self.changes(states, address)?;
                            self.served.zeroed += u64::from(zeroed);
                            self.served.mapped += u64::from(!zeroed);
                            return Ok(());
                        }
                        Ok(None) => {}
                        Err(why) => {
                            if self.refused(address, why)? {
                                return Ok(());
                            }
                        }
                    }
                }
                Outcome::MemoryFault(MemoryFault::Refused) => {
                    let why = last_refusal().unwrap_or(Refusal::Errno(libc::EIO));
                    if self.refused(address, why)? {
                        return Ok(());
                    }
                }
                _ => return self.stray(address),
            }
        }
        Ok(())
    }

    /// What is to be done about a refusal: `true` if there is nothing left to do for this fault.
    fn refused(&mut self, address: u64, why: Refusal) -> Result<bool, SessionError> {
        match why {
            Refusal::Changing => {
                self.served.retries += 1;
                self.shared.drain()?;
                Ok(false)
            }
            Refusal::Gone => {
                self.shared.drain()?;
                self.stray(address).map(|()| true)
            }
            why => Err(SessionError::Page { address, why }),
        }
    }

    /// A thread waits for a page that the table has. Wakes it, unless that did not help before: then the page was given up
    /// without a report, and is to be filled as if nobody had asked for it yet.
    fn is_lost(&mut self, address: u64, page: u64) -> bool {
        self.served.spurious += 1;
        let to = address & !(page - 1);
        if self.present.another(to) > PRESENT {
            self.present.forget(to);
            return true;
        }
        let _ = self.shared.uffd.wake(to, page);
        false
    }

    fn stray(&mut self, address: u64) -> Result<(), SessionError> {
        self.served.strays += 1;
        let page = address & !4095;
        if self.stray.another(page) > STRAYS {
            return Err(SessionError::Stray(address));
        }
        let _ = self.shared.uffd.wake(page, 4096);
        Ok(())
    }

    /// A page comes to hold something else than it did, by no write of the guest's. Called before, so that whoever goes on
    /// once it is there goes on after the mark, and after, for a collection in between that finds nothing in the file yet.
    fn changes(&self, states: &PageStates, address: u64) -> Result<(), SessionError> {
        if let Some(writes) = &self.shared.writes {
            let page = page_size(states, address).unwrap_or(4096);
            let to = address & !(page - 1);
            writes.mark(frames(to, to + page))?;
        }
        Ok(())
    }

    fn record(&self, states: &PageStates, address: u64) {
        let Some(record) = &self.shared.record else {
            return;
        };
        if let Some(slot) = states.slots().find(SPACE, frame(address)) {
            let page = slot.backing().first.0 + slot.offset(frame(address));
            lock(record).push(page << 12);
        }
    }

    /// A thread waits to write to a protected page.
    fn write(&mut self, address: u64) -> Result<(), SessionError> {
        while !self.shared.is_stopping() {
            let done = match &mut self.writer {
                Some(writer) => writer.write(address)?,
                // A child's pages are as protected as its parent's, and nobody asks what it writes.
                None => {
                    let done = self.shared.uffd.protect(address & !4095, 4096, false);
                    done.map_err(Refusal::from)
                }
            };
            match done {
                Ok(()) => {
                    self.served.writes += 1;
                    return Ok(());
                }
                Err(why) => match why {
                    Refusal::Changing => self.shared.drain()?,
                    Refusal::Gone => return self.stray(address),
                    why => return Err(SessionError::Page { address, why }),
                },
            }
        }
        Ok(())
    }
}

fn page_size(states: &PageStates, address: u64) -> Option<u64> {
    let slot = states.slots().find(SPACE, frame(address))?;
    Some(bytes(slot.backing().level))
}

/// Fills a page that was given up, or maps what the file has there since: `Some(false)`. `None` if it is not such a page, by
/// now.
fn zero(states: &PageStates, address: u64, cached: bool) -> Result<Option<bool>, Refusal> {
    let table = states.host().protected();
    // Nothing changes while this is held, and what was read before has been applied.
    let _guard = table.pass()?;
    if states.visibility(frame(address)) != Some(Visibility::Shared) {
        return Ok(None);
    }
    let page = page_size(states, address).ok_or(Refusal::Gone)?;
    let to = address & !(page - 1);
    if cached && table.map(to, page)? {
        return Ok(Some(false));
    }
    table.zero(to, page).map(|()| Some(true))
}
