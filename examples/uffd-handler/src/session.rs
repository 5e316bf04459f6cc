//! One VM's handler: workers that share a table, and what runs beside them.
//!
//! Protocol. Each worker looks a few times for a message; then one waits for all of them (`worker.rs`). Who reads a message
//! resolves it. Where the VMM reports changes, reading is one thread's at a time and may find some (`changes.rs`). A copy
//! that a change sends back is tried again after what there is to read has been read and applied. A fault that was read and
//! not resolved when a handler died sleeps until it is woken: so whoever begins wakes all.
//!
//! A session ends when its connection does, or when it is stopped, or by an error, which the others then see.

use crate::baseline::MutexTable;
use crate::changes::{self, ChangeError};
use crate::dirty::WriteLog;
use crate::host::{PageStates, SPACE, page_states};
use crate::protocol::{Hello, Region};
use crate::source::Source;
use crate::sys::{Message, Raw, Uffd};
use crate::table::{Gate, KernelTable, Refusal};
use crate::worker::{Served, Worker};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use tdp::{FaultError, MmuError};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Children of a VMM, and theirs, that are served at a time.
const CHILDREN: usize = 64;
/// The same with those whose process has ended, or whose session has, and who still have threads or descriptors.
const ENDING: usize = 4 * CHILDREN;
/// Messages read at a time when all are wanted.
const ROUND: usize = 16;
/// What a poll says of the userfaultfd. The others are looked at by whoever is woken.
const MESSAGES: u64 = 1;

/// A session could not begin, or ended in the middle.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The system refused something.
    #[error("{what}: {error}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        error: io::Error,
    },
    /// The table could not be made.
    #[error("the table could not be made: {0}")]
    Table(String),
    /// A worker's part of the table could not be made.
    #[error(transparent)]
    Mmu(#[from] MmuError),
    /// No memory for tables.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// The kernel or the source refused a page.
    #[error("the page at {address:#x} could not be filled: {}", explain(*why))]
    Page {
        /// Where.
        address: u64,
        /// Why.
        why: Refusal,
    },
    /// A change of the address space could not be followed.
    #[error(transparent)]
    Change(#[from] ChangeError),
    /// A thread waits for what nobody can fill, and would for ever.
    #[error("the fault at {0:#x} comes again and again: nothing is known of that address")]
    Stray(u64),
    /// The VMM and its children have forked more often than who is served has reason to.
    #[error("more than {CHILDREN} children of the VMM are alive")]
    Children,
    /// A thread of the session panicked.
    #[error("a thread of the handler panicked")]
    Panicked,
    /// The descriptor that messages come by has come to block, or has never been made ready.
    #[error("the userfaultfd cannot be waited for: it blocks, or it was never initialised")]
    Blocks,
    /// The kernel sent something that was not asked for.
    #[error("a message of unknown kind {0:#x}")]
    Message(u8),
}

fn explain(refusal: Refusal) -> String {
    match refusal {
        Refusal::Changing => "the address space never stops changing".into(),
        Refusal::Gone => "nothing is registered there".into(),
        Refusal::Dead => "the process is gone".into(),
        Refusal::Source(errno) => format!("the source: {}", io::Error::from_raw_os_error(errno)),
        Refusal::Errno(errno) => io::Error::from_raw_os_error(errno).to_string(),
    }
}

/// What resolves faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// The library.
    #[default]
    Tdp,
    /// One mutex and a bitmap: what it is compared with.
    Mutex,
}

/// How a session is to run.
#[derive(Clone, Debug)]
pub struct Config {
    /// Threads that resolve faults.
    pub workers: usize,
    /// What resolves them.
    pub engine: Engine,
    /// Fill everything that nobody asks for, beside the faults.
    pub background: bool,
    /// Snapshot offsets of pages to fill first: a working set that was recorded.
    pub prefetch: Vec<u64>,
    /// Note which pages are asked for, in order.
    pub record: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            workers: 2,
            engine: Engine::Tdp,
            background: false,
            prefetch: Vec::new(),
            record: false,
        }
    }
}

/// What came of a session.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// Faults, by how they ended.
    pub served: Served,
    /// Pages filled because of the recorded working set.
    pub prefetched: u64,
    /// Pages filled by the background copy.
    pub copied: u64,
    /// Pages that were there already, by what another handler did before or the VMM itself.
    pub existing: u64,
    /// Copies that a change of the address space sent back.
    pub sent_back: u64,
    /// Changes of the address space that were applied.
    pub changes: u64,
    /// Children that were served, and theirs.
    pub forks: u64,
    /// Snapshot offsets of the pages that were asked for, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub recorded: Vec<u64>,
}

/// The table of a session.
#[derive(Clone)]
pub(crate) enum Table {
    Tdp(PageStates),
    Mutex(Arc<MutexTable>),
}

/// What the threads of a session share.
pub(crate) struct Shared {
    pub(crate) table: Table,
    pub(crate) uffd: Uffd,
    pub(crate) writes: Option<WriteLog>,
    pub(crate) record: Option<Mutex<Vec<u64>>>,
    source: Arc<dyn Source>,
    /// Held by whoever reads where changes may be found, and until they are applied.
    reading: Mutex<Vec<Message>>,
    config: Config,
    /// Held by the worker that waits for messages.
    waiting: Mutex<()>,
    /// Ready while there are messages, faults that were put aside, or an end.
    epoll: Epoll,
    stop: EventFd,
    /// Readable while faults are put aside.
    more: EventFd,
    stopping: AtomicBool,
    failed: Mutex<Option<SessionError>>,
    family: Arc<Mutex<Family>>,
    changes: std::sync::atomic::AtomicU64,
}

/// A VMM's children, theirs, and so on: one list of all, so that it is bounded however they descend from each other. It is
/// the first session's to end.
#[derive(Default)]
struct Family {
    /// Nobody else is served.
    over: bool,
    /// Those that are about to be served.
    expected: usize,
    children: Vec<Session>,
    /// Those that have ended, and what their faults were.
    ended: u64,
    served: Served,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn system(what: &'static str) -> impl Fn(io::Error) -> SessionError {
    move |error| SessionError::System { what, error }
}

/// A running session.
pub struct Session {
    pub(crate) shared: Arc<Shared>,
    workers: Vec<JoinHandle<Served>>,
    helpers: Vec<JoinHandle<(u64, u64)>>,
    /// Whether it is a child's.
    child: bool,
}

/// Starts a thread of a session, if the system lets us. Its panic ends the session.
fn spawn<R: Send + 'static>(
    shared: &Arc<Shared>,
    run: impl FnOnce(&Arc<Shared>) -> R + Send + 'static,
) -> Result<JoinHandle<R>, SessionError> {
    let alarm = Alarm(shared.clone());
    thread::Builder::new()
        .spawn(move || run(&alarm.0))
        .map_err(system("a thread"))
}

impl Session {
    /// Begins to serve a VMM.
    ///
    /// # Errors
    ///
    /// [`SessionError`].
    pub fn start(
        hello: Hello,
        source: Arc<dyn Source>,
        config: Config,
    ) -> Result<Self, SessionError> {
        Self::start_in(None, hello, source, config)
    }

    /// The same of a child that is to be in a family.
    fn start_in(
        family: Option<Arc<Mutex<Family>>>,
        hello: Hello,
        source: Arc<dyn Source>,
        config: Config,
    ) -> Result<Self, SessionError> {
        let child = family.is_some();
        let Hello {
            regions,
            uffd,
            memory,
        } = hello;
        let clone = || uffd.try_clone().map_err(system("another descriptor"));
        let tracked = regions.iter().filter(|region| region.track_writes);
        let tracked = tracked.map(|region| region.base_host_virt_addr..region.end());
        let protected: Vec<_> = tracked.collect();
        let tracked = !protected.is_empty();
        let table = match config.engine {
            Engine::Mutex => Table::Mutex(Arc::new(MutexTable::new(
                clone()?,
                source.clone(),
                &regions,
            ))),
            Engine::Tdp => {
                let kernel = KernelTable::new(clone()?, source.clone(), memory, protected)
                    .map_err(system("what the descriptor can do"))?;
                Table::Tdp(page_states(kernel, &regions).map_err(SessionError::Table)?)
            }
        };
        let writes = match tracked {
            true => Some(WriteLog::new(clone()?, &regions).map_err(SessionError::Table)?),
            false => None,
        };
        for region in &regions {
            // For those whose fault another handler had read.
            let _ = uffd.wake(region.base_host_virt_addr, region.size);
        }
        let event = || EventFd::new(EFD_NONBLOCK).map_err(system("an event"));
        let (stop, more) = (event()?, event()?);
        let epoll = Epoll::new().map_err(system("a poll"))?;
        for (fd, what) in [
            (uffd.as_raw_fd(), MESSAGES),
            (stop.as_raw_fd(), 0),
            (more.as_raw_fd(), 0),
        ] {
            let event = EpollEvent::new(EventSet::IN, what);
            epoll
                .ctl(ControlOperation::Add, fd, event)
                .map_err(system("a poll"))?;
        }
        let shared = Arc::new(Shared {
            table,
            uffd,
            writes,
            record: config.record.then(Mutex::default),
            source,
            reading: Mutex::default(),
            waiting: Mutex::default(),
            epoll,
            stop,
            more,
            stopping: AtomicBool::new(false),
            failed: Mutex::default(),
            family: family.unwrap_or_default(),
            changes: 0.into(),
            config,
        });
        let mut session = Self {
            shared: shared.clone(),
            workers: Vec::new(),
            helpers: Vec::new(),
            child,
        };
        // Dropped, on failure, it stops those that run.
        for _ in 0..shared.config.workers.max(1) {
            let mut worker = Worker::new(&shared)?;
            session.workers.push(spawn(&shared, move |_| worker.run())?);
        }
        if let Table::Tdp(states) = &shared.table
            && (shared.config.background || !shared.config.prefetch.is_empty())
        {
            let vcpu = states.vcpu()?;
            let helper = move |shared: &Arc<_>| crate::background::run(shared, vcpu);
            session.helpers.push(spawn(&shared, helper)?);
        }
        Ok(session)
    }

    /// Pages of 4 KiB that are filled, and how many there are. What was given up is among neither.
    pub fn progress(&self) -> (u64, u64) {
        self.shared.progress()
    }

    /// The log of writes, if the VMM has its regions tracked.
    pub fn writes(&self) -> Option<&WriteLog> {
        self.shared.writes.as_ref()
    }

    /// Waits until the VMM closes its connection, or the session fails.
    pub fn wait(&self, stream: &UnixStream) {
        let _ = stream.set_read_timeout(Some(std::time::Duration::from_millis(50)));
        let mut byte = [0];
        while !self.shared.is_stopping() {
            match io::Read::read(&mut &*stream, &mut byte) {
                Ok(0) => break,
                // Nothing more is expected, and it does no harm.
                Ok(_) => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock
                            | io::ErrorKind::TimedOut
                            | io::ErrorKind::Interrupted
                    ) => {}
                Err(_) => break,
            }
        }
    }

    /// Whether it is ending.
    pub fn is_over(&self) -> bool {
        self.shared.is_stopping()
    }

    /// Has its threads end, without waiting for them.
    pub fn finish(&self) {
        self.shared.stop();
    }

    /// Whether it is over and all of its threads have ended, so that ending it waits for nobody.
    fn has_ended(&self) -> bool {
        self.workers.iter().all(JoinHandle::is_finished)
            && self.helpers.iter().all(JoinHandle::is_finished)
    }

    /// Ends it and says what came of it.
    ///
    /// # Errors
    ///
    /// The first error of any of its threads.
    pub fn stop(mut self) -> Result<Report, SessionError> {
        self.end()
    }

    fn end(&mut self) -> Result<Report, SessionError> {
        self.shared.stop();
        let mut report = Report::default();
        for worker in self.workers.drain(..) {
            if let Ok(served) = worker.join() {
                report.served.add(&served);
            }
        }
        for helper in self.helpers.drain(..) {
            if let Ok((prefetched, copied)) = helper.join() {
                report.prefetched += prefetched;
                report.copied += copied;
            }
        }
        if let Table::Tdp(states) = &self.shared.table {
            let counters = &tdp::Host::protected(states.host()).counters;
            report.existing = counters.existing.load(Ordering::Relaxed);
            report.sent_back = counters.sent_back.load(Ordering::Relaxed);
        }
        report.changes = self.shared.changes.load(Ordering::Relaxed);
        if let Some(record) = &self.shared.record {
            report.recorded = std::mem::take(&mut *lock(record));
        }
        let mut failed = lock(&self.shared.failed).take();
        if !self.child {
            let children = {
                let mut family = lock(&self.shared.family);
                family.over = true;
                report.forks += family.ended;
                report.served.add(&family.served);
                std::mem::take(&mut family.children)
            };
            for child in &children {
                child.finish();
            }
            for child in children {
                report.forks += 1;
                match child.stop() {
                    Ok(child) => report.served.add(&child.served),
                    Err(error) => failed = failed.or(Some(error)),
                }
            }
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(report),
        }
    }
}

/// Dropped by a thread that panics, it ends the session: with fewer threads, or none, the VM would hang.
struct Alarm(Arc<Shared>);

impl Drop for Alarm {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail(SessionError::Panicked);
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

impl Shared {
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        if let Some(writes) = &self.writes {
            writes.finish();
        }
        let _ = self.stop.write(1);
    }

    /// Ends the session for this reason, unless there is an earlier one. That the VMM has ended is no failure: often its
    /// pages go before its connection does.
    pub(crate) fn fail(&self, error: SessionError) {
        let over = matches!(
            error,
            SessionError::Page {
                why: Refusal::Dead,
                ..
            }
        );
        if !over {
            lock(&self.failed).get_or_insert(error);
        }
        self.stop();
    }

    pub(crate) fn progress(&self) -> (u64, u64) {
        let Table::Tdp(states) = &self.table else {
            return (0, 0);
        };
        let pages = states.stats().pages;
        let filled = pages[0] + (pages[1] << 9) + (pages[2] << 18);
        let slots = states.slots().list(SPACE);
        let total = slots
            .iter()
            .map(|slot| states.private_frames(slot.gfns()))
            .sum();
        (filled, total)
    }

    /// What keeps copies from overtaking changes, if there are any.
    fn gate(&self) -> Option<(&PageStates, &Gate)> {
        let Table::Tdp(states) = &self.table else {
            return None;
        };
        let gate = tdp::Host::protected(states.host()).gate.as_ref()?;
        Some((states, gate))
    }

    /// Whether the VMM reports changes.
    pub(crate) fn has_gate(&self) -> bool {
        self.gate().is_some()
    }

    /// Reads one message, or none if there is none. Changes are applied and not returned.
    pub(crate) fn read(&self) -> Result<Option<Message>, SessionError> {
        let mut raw = [Raw::default(); 1];
        let Some((states, gate)) = self.gate() else {
            let count = self.uffd.read(&mut raw).map_err(system("a message"))?;
            return Ok((count > 0).then(|| raw[0].decode()));
        };
        let mut ahead = lock(&self.reading);
        if ahead.is_empty() {
            // One, so that there is something left for the other workers.
            self.read_and_apply(states, gate, &mut ahead, 1)?;
            return Ok(ahead.pop());
        }
        let message = ahead.pop();
        if ahead.is_empty() {
            let _ = self.more.read();
        }
        Ok(message)
    }

    /// Waits for a message, alone, and reads it. None if another worker was quicker, and at the end.
    pub(crate) fn wait(&self) -> Result<Option<Message>, SessionError> {
        let _waiting = lock(&self.waiting);
        if self.is_stopping() {
            return Ok(None);
        }
        self.poll(-1)?;
        self.read()
    }

    /// Whether there may be a message, after so many milliseconds at most; -1 for no limit.
    pub(crate) fn poll(&self, timeout: i32) -> Result<bool, SessionError> {
        let mut events = [EpollEvent::default(); 3];
        match self.epoll.wait(timeout, &mut events) {
            Ok(count) => {
                let broken = |event: &EpollEvent| {
                    event.data() == MESSAGES && event.event_set().contains(EventSet::ERROR)
                };
                // The kernel says so of a userfaultfd that blocks, at once and for ever.
                if events.iter().take(count).any(broken) {
                    return Err(SessionError::Blocks);
                }
                Ok(count > 0)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            Err(error) => Err(system("a poll")(error)),
        }
    }

    /// Reads all there is, unless the session is ending: changes are applied, faults put aside.
    pub(crate) fn drain(&self) -> Result<(), SessionError> {
        if let Some((states, gate)) = self.gate() {
            let mut ahead = lock(&self.reading);
            // A VMM that changes its memory all the time would keep whoever is here.
            while !self.is_stopping() && self.read_and_apply(states, gate, &mut ahead, ROUND)? {}
            if !ahead.is_empty() {
                let _ = self.more.write(1);
            }
        }
        Ok(())
    }

    /// Reads one round of messages while nothing is copied. `false` if there were none.
    fn read_and_apply(
        &self,
        states: &PageStates,
        gate: &Gate,
        ahead: &mut Vec<Message>,
        most: usize,
    ) -> Result<bool, SessionError> {
        let read = gate.shut(|| {
            let mut raw = [Raw::default(); ROUND];
            let room = raw.split_at_mut(most.min(ROUND)).0;
            let messages: io::Result<Vec<Message>> = self
                .uffd
                .read(room)
                .map(|count| raw.into_iter().take(count).map(Raw::decode).collect());
            let changes = messages.iter().flatten();
            let changes = changes
                .filter(|message| changes::is_change(message))
                .count();
            (changes as u64, messages)
        });
        let messages = read.map_err(system("a message"))?;
        let any = !messages.is_empty();
        for message in messages {
            if !changes::is_change(&message) {
                ahead.push(message);
                continue;
            }
            // Unapplied for ever, if it fails: the session ends then, and nothing is copied any more.
            if let Some(writes) = &self.writes {
                writes.note(&message)?;
            }
            if let Some((uffd, regions)) = changes::apply(states, message)? {
                self.adopt(uffd, regions)?;
            }
            self.changes.fetch_add(1, Ordering::Relaxed);
            gate.applied(1);
        }
        Ok(any)
    }

    /// Serves a child of the VMM.
    fn adopt(&self, uffd: Uffd, regions: Vec<Region>) -> Result<(), SessionError> {
        // It blocks if its parent's was made to.
        uffd.unblock().map_err(system("a child's descriptor"))?;
        let hello = Hello {
            regions,
            uffd,
            memory: None,
        };
        let config = Config {
            prefetch: Vec::new(),
            record: false,
            background: false,
            ..self.config.clone()
        };
        if !lock(&self.family).expect_another()? {
            return Ok(());
        }
        // Without the family's lock, which the child's own threads may wait for: they are waited for if it cannot start.
        let relatives = Some(self.family.clone());
        let child = Session::start_in(relatives, hello, self.source.clone(), config);
        let mut family = lock(&self.family);
        family.expected -= 1;
        let child = child?;
        if family.over {
            // Its threads are waited for, and may wait for the family.
            drop(family);
            drop(child);
        } else {
            family.children.push(child);
        }
        Ok(())
    }
}

impl Family {
    /// Makes room for a child that is about to be served. `false` if nobody is to be any more.
    fn expect_another(&mut self) -> Result<bool, SessionError> {
        if self.over {
            return Ok(false);
        }
        // Those whose process has ended have nobody else who would notice, or be concerned by how. No thread is waited for:
        // it may be one that waits for the family, or this one.
        let has_ended = |child: &mut Session| {
            let orphaned = child.shared.uffd.is_orphaned();
            if orphaned {
                child.finish();
            }
            orphaned && child.has_ended()
        };
        for child in self.children.extract_if(.., has_ended) {
            self.ended += 1;
            if let Ok(report) = child.stop() {
                self.served.add(&report.served);
            }
        }
        let alive = self.children.iter().filter(|child| !child.is_over());
        if alive.count() + self.expected >= CHILDREN || self.children.len() >= ENDING {
            return Err(SessionError::Children);
        }
        self.expected += 1;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Kind;
    use crate::source::Snapshot;
    use crate::sys::features;
    use crate::vmm::{Shape, Vmm, snapshot};
    use std::time::Duration;

    #[test]
    fn what_is_ending_reads_no_more_messages() {
        if let Some(why) = crate::sys::unavailable() {
            eprintln!("SKIPPED what_is_ending_reads_no_more_messages: {why}");
            return;
        }
        let shape = Shape {
            features: features::REMOVE,
            ..Shape::new(Kind::Anonymous, 1 << 20)
        };
        let vmm = Vmm::new(shape).expect("a VMM");
        let source = Arc::new(Snapshot::of(snapshot(shape.len).expect("a snapshot")));
        let hello = vmm.hello().expect("a hello");
        let session = Session::start(hello, source, Config::default()).expect("a session");
        session.finish();
        while !session.has_ended() {
            thread::yield_now();
        }
        thread::scope(|scope| {
            // Returns once the report of it has been read.
            let removal = scope.spawn(|| vmm.memory().give_up(0, 4096));
            let reported = || {
                let mut events = [EpollEvent::default(); 3];
                let count = session.shared.epoll.wait(0, &mut events).expect("a poll");
                events.iter().take(count).any(|it| it.data() == MESSAGES)
            };
            while !reported() {
                thread::yield_now();
            }
            session.shared.drain().expect("no error");
            thread::sleep(Duration::from_millis(50));
            let read = removal.is_finished();
            session.shared.read().expect("a message");
            removal.join().expect("a thread").expect("a removal");
            assert!(!read, "the report of a removal was read");
        });
    }
}
