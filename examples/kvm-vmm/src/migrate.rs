//! A live migration to another process: pages ahead of the guests, then the guests, then the rest when they ask for it.
//!
//! Protocol. The guests run on and rewrite pages without pause. First all pages are sent, then, round by round, those that
//! the log of writes names. Then the guests are stopped, the log is read once more, and what it names is not sent but said to
//! be absent; the guests go over with all that their registers hold. The source serves pages until the destination is done.
//!
//! A page is sent after the log that named it was collected, so one that is written while it is sent is named again.
//!
//! KVM keeps a log of its own, which is compared with ours collection by collection ([`Logs`]), for guests write the same
//! pages again and again: what one round lost would be found in another.
//!
//! How fast absent pages are fetched is measured by migrations of which nothing goes ahead: what is left over otherwise is
//! little, and another number of pages each time.

use crate::machine::{Machine, Running, give_up, patience};
use crate::restore::{Outcome, Plan, Served, median, parts, shape, wrong_words};
use crate::wire::{self, Arrived, Message};
use serde::Serialize;
use std::collections::BTreeSet;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use std::{fs, io};
use uffd_handler::Config;
use uffd_handler::dirty::WriteLog;
use uffd_handler::source::{Snapshot, Source};
use uffd_handler::sys::send_from;
use uffd_handler::vmm::{Vmm, snapshot};

/// What came of it, over all rounds.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Moved {
    pub(crate) machine: &'static str,
    pub(crate) vcpus: u64,
    pub(crate) workers: usize,
    pub(crate) memory_bytes: u64,
    pub(crate) migrations: u64,
    pub(crate) wrong_words: u64,
    pub(crate) double_fills: u64,
    /// Pages that went ahead, of the last migration, round by round.
    pub(crate) ahead: Vec<u64>,
    /// Pages that were absent at the switch, of all migrations.
    pub(crate) absent: u64,
    /// Pages that were fetched after it.
    pub(crate) fetched: u64,
    /// Pages for each second that went ahead while the guests ran. Median; `null` if none did.
    pub(crate) ahead_pages_per_s: Option<f64>,
    /// Milliseconds during which no guest ran, with pages ahead. Median.
    pub(crate) downtime_ms: Option<f64>,
    /// Pages for each second until the guests had read everything, where nothing went ahead. Medians.
    pub(crate) pages_per_s: f64,
    pub(crate) mutex_pages_per_s: f64,
    pub(crate) ratio: f64,
    /// Pages that KVM's log of the source has and ours has not, of each collection; `null` if no KVM keeps one.
    pub(crate) missed: Option<u64>,
    /// Pages that only ours has: a guest was about to write there when it was stopped.
    pub(crate) only_ours: Option<u64>,
}

impl Moved {
    fn add(&mut self, one: &One) {
        self.migrations += 1;
        self.wrong_words += one.wrong + one.arrived.wrong_words;
        self.double_fills += one.arrived.double_fills;
        self.absent += one.absent;
        self.fetched += one.arrived.fetched;
        if let Some([missed, only_ours]) = one.logs {
            *self.missed.get_or_insert(0) += missed;
            *self.only_ours.get_or_insert(0) += only_ours;
        }
    }
}

/// The other process; ended when it is dropped.
struct Destination {
    child: Child,
    socket: PathBuf,
    /// Who answers it.
    answering: Option<Answering>,
}

impl Destination {
    /// Waits until it has ended.
    fn end(&mut self, patience: Duration) -> Outcome<()> {
        let begun = Instant::now();
        while self.child.try_wait()?.is_none() {
            if begun.elapsed() > patience {
                return Err("the destination does not end".into());
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Waits until it connects, or has ended without.
    fn connection(&mut self, listener: &UnixListener) -> Outcome<UnixStream> {
        listener.set_nonblocking(true)?;
        let begun = Instant::now();
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("the destination did not come up: {status}").into());
            }
            if begun.elapsed() > patience(0) {
                return Err("the destination does not come up".into());
            }
            thread::sleep(Duration::from_millis(1));
        };
        listener.set_nonblocking(false)?;
        Ok(stream)
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // It has closed its connections; the threads end.
        drop(self.answering.take());
        let _ = fs::remove_file(&self.socket);
    }
}

/// One migration.
struct One {
    arrived: Arrived,
    ahead: Vec<u64>,
    absent: u64,
    sending: Duration,
    downtime: Duration,
    wrong: u64,
    /// Pages that KVM's log has and ours has not, collection by collection, and that only ours has, over all of them.
    logs: Option<[u64; 2]>,
}

/// The two logs of the same writes.
///
/// KVM's is read before each collection of ours and, while guests run, after it. Between ours and the second reading every
/// vCPU leaves the guest once, so that nothing of what KVM knew before is still on its way to its log. What the first reading
/// has was thus made writable after the previous collection of ours, which had protected all, and before this one: it must be
/// in this one. What the second has was made writable before this collection or since: it must be in this one or the next.
#[derive(Default)]
struct Logs {
    ours: BTreeSet<u64>,
    theirs: BTreeSet<u64>,
    /// Pages of KVM's that must be in the next collection of ours.
    due: BTreeSet<u64>,
    missed: u64,
    /// Whether there is a log of KVM's.
    compared: bool,
}

impl Logs {
    /// Collects both, while guests run or after they have been stopped. Returns what ours has.
    fn collect(
        &mut self,
        machine: &Machine,
        log: &WriteLog,
        base: u64,
        running: Option<&Running>,
    ) -> Outcome<BTreeSet<u64>> {
        let mut due = std::mem::take(&mut self.due);
        self.compared = machine.dirty(|offset| {
            due.insert(offset);
        })?;
        let mut now = BTreeSet::new();
        log.collect(|address| {
            now.insert(address - base);
        })?;
        if !self.compared {
            return Ok(now);
        }
        let mut after = BTreeSet::new();
        if let Some(running) = running {
            running.leave_once();
            machine.dirty(|offset| {
                after.insert(offset);
            })?;
        }
        self.missed += due.difference(&now).count() as u64;
        self.due = after.difference(&now).copied().collect();
        self.theirs.extend(due);
        self.theirs.extend(after);
        self.ours.extend(&now);
        Ok(now)
    }

    /// After the last collection, which leaves nothing due: pages that ours missed, and that only ours has.
    fn verdict(&self) -> Option<[u64; 2]> {
        let more = self.ours.difference(&self.theirs).count() as u64;
        self.compared.then_some([self.missed, more])
    }
}

/// Sends pages, in runs.
fn send_pages(
    control: &UnixStream,
    vmm: &Vmm,
    offsets: impl IntoIterator<Item = u64>,
) -> io::Result<u64> {
    let mut offsets = offsets.into_iter().peekable();
    let mut pages = 0;
    while let Some(offset) = offsets.next() {
        let mut len = 4096;
        while len < wire::RUN && offsets.next_if_eq(&(offset + len)).is_some() {
            len += 4096;
        }
        wire::send(control, &Message::Run { offset, len })?;
        send_from(control, vmm.memory().address() + offset, len)?;
        pages += len / 4096;
    }
    Ok(pages)
}

/// Answers requests for pages until the other end goes.
fn serve_pages(stream: &UnixStream, vmm: &Vmm) -> io::Result<()> {
    while let Some((offset, len)) = wire::asked(stream)? {
        if !wire::is_run(offset, len, vmm.memory().len()) {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        }
        send_from(stream, vmm.memory().address() + offset, len)?;
    }
    Ok(())
}

/// Threads that answer requests for pages. Dropped, they have ended; the process ends if they do not, because a page of this
/// end's never comes.
struct Answering {
    patience: Duration,
    stop: Arc<AtomicBool>,
    socket: PathBuf,
    accepting: Option<thread::JoinHandle<()>>,
}

impl Answering {
    fn start(listener: UnixListener, socket: PathBuf, vmm: Arc<Vmm>) -> Self {
        let patience = patience(vmm.memory().len());
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let accepting = thread::spawn(move || {
            thread::scope(|scope| {
                for stream in listener.incoming().map_while(Result::ok) {
                    if stopping.load(Ordering::Acquire) {
                        break;
                    }
                    let vmm = &vmm;
                    // What goes wrong on a connection is the other end's to notice.
                    scope.spawn(move || serve_pages(&stream, vmm).unwrap_or_default());
                }
            });
        });
        Self {
            patience,
            stop,
            socket,
            accepting: Some(accepting),
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // So that it looks.
        let _ = UnixStream::connect(&self.socket);
        if let Some(accepting) = self.accepting.take() {
            let begun = Instant::now();
            while !accepting.is_finished() {
                if begun.elapsed() > self.patience {
                    give_up("a page that was asked for has not been sent", self.patience);
                }
                thread::sleep(Duration::from_millis(1));
            }
            let _ = accepting.join();
        }
    }
}

fn once(plan: &Plan, rounds: usize, mutex: bool, source: &Arc<dyn Source>) -> Outcome<One> {
    let name = format!("kvm-vmm-{}.sock", std::process::id());
    let socket = std::env::temp_dir().join(name);
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket)?;
    let mut destination = Destination {
        child: Command::new(std::env::current_exe()?)
            .arg("destination")
            .arg(&socket)
            .spawn()?,
        socket,
        answering: None,
    };
    let control = destination.connection(&listener)?;
    let patience = patience(plan.memory);
    wire::limit(&control, patience)?;
    wire::send(
        &control,
        &Message::Begin {
            memory: plan.memory,
            kind: plan.kind,
            workers: plan.workers,
            mutex,
        },
    )?;

    let config = Config {
        workers: plan.workers,
        ..Config::default()
    };
    let served = Served::new(shape(plan.memory, true), source.clone(), config)?;
    let (vmm, base) = (served.vmm.clone(), served.vmm.memory().address());
    let machine = Machine::new(plan.kind, vmm.clone(), true)?;
    let log = served.session.writes().ok_or("writes are not tracked")?;
    let running = machine.start(parts(plan, u64::MAX))?;

    let mut logs = Logs::default();
    let start = Instant::now();
    let mut ahead = Vec::new();
    for round in 0..rounds {
        let dirty = logs.collect(&machine, log, base, Some(&running))?;
        ahead.push(match round {
            0 => send_pages(&control, &vmm, (0..plan.memory).step_by(4096))?,
            _ => send_pages(&control, &vmm, dirty)?,
        });
    }
    let sending = start.elapsed();

    let stopped = Instant::now();
    let guests = running.stop()?;
    let mut absent = logs.collect(&machine, log, base, None)?;
    if rounds == 0 {
        absent = (0..plan.memory).step_by(4096).collect();
    }
    let logs = logs.verdict();
    let wrong = wrong_words(&guests);
    let count = absent.len() as u64;
    let absent = absent.into_iter().collect();
    wire::send(&control, &Message::Switch { guests, absent })?;

    // From here on the other end asks, until it is told that nobody answers any more.
    let answering = Answering::start(listener, destination.socket.clone(), vmm);
    destination.answering = Some(answering);
    let Message::Started = wire::receive(&control)? else {
        return Err("the destination does not start the guests".into());
    };
    let downtime = stopped.elapsed();
    let Message::Done(arrived) = wire::receive(&control)? else {
        return Err("the destination does not say how it ended".into());
    };
    destination.end(patience)?;
    drop(destination);
    Ok(One {
        arrived,
        ahead,
        absent: count,
        sending,
        downtime,
        wrong,
        logs,
    })
}

/// Migrates several times, with pages fetched by the library and, to compare, under one mutex.
pub(crate) fn run(plan: &Plan, ahead: usize) -> Outcome<Moved> {
    let source: Arc<dyn Source> = Arc::new(Snapshot::of(snapshot(plan.memory)?));
    let mut moved = Moved {
        machine: plan.kind.name(),
        vcpus: plan.vcpus,
        workers: plan.workers,
        memory_bytes: plan.memory,
        ..Moved::default()
    };
    let [mut tdp, mut mutex, mut ratios, mut sent, mut down] = [const { Vec::new() }; 5];
    for round in 0..plan.rounds {
        let mut rates = [0.0; 2];
        for turn in 0..2 {
            let which = (turn + round) % 2;
            let one = once(plan, 0, which == 1, &source)?;
            rates[which] = one.absent as f64 * 1e9 / one.arrived.nanoseconds as f64;
            moved.add(&one);
        }
        tdp.push(rates[0]);
        mutex.push(rates[1]);
        ratios.push(rates[0] / rates[1]);
        if ahead > 0 {
            let one = once(plan, ahead, false, &source)?;
            let pages: u64 = one.ahead.iter().sum();
            sent.push(pages as f64 / one.sending.as_secs_f64());
            down.push(one.downtime.as_secs_f64() * 1e3);
            moved.add(&one);
            moved.ahead = one.ahead;
        }
    }
    moved.pages_per_s = median(&mut tdp);
    moved.mutex_pages_per_s = median(&mut mutex);
    moved.ratio = median(&mut ratios);
    moved.ahead_pages_per_s = (ahead > 0).then(|| median(&mut sent));
    moved.downtime_ms = (ahead > 0).then(|| median(&mut down));
    Ok(moved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_that_does_not_come_up_is_not_waited_for() {
        let name = format!("kvm-vmm-{}-no.sock", std::process::id());
        let socket = std::env::temp_dir().join(name);
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).expect("a socket");
        let mut destination = Destination {
            child: Command::new("false").spawn().expect("a process"),
            socket,
            answering: None,
        };
        let came = destination.connection(&listener);
        assert!(came.is_err(), "{came:?}");
    }
}
