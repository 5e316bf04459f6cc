//! A snapshot restored lazily, while all guests run on it.
//!
//! Protocol. The handler serves over a connection, as it would in a process of its own. First every guest reads all of the
//! memory, each from another place on, so that they fault on the same pages at the same time; then each rewrites a quarter of
//! its own part, with writes tracked by both sides, and what KVM's log says is compared with what ours says.

use crate::guest::State;
use crate::machine::{Kind, Machine};
use serde::Serialize;
use std::collections::BTreeSet;
use std::error::Error;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;
use uffd_handler::memory::Kind as MemoryKind;
use uffd_handler::source::{Snapshot, Source};
use uffd_handler::sys::features;
use uffd_handler::vmm::{Shape, Vmm, snapshot};
use uffd_handler::{Config, Engine, Session, protocol};

pub(crate) type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// What to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) kind: Kind,
    pub(crate) vcpus: u64,
    pub(crate) memory: u64,
    pub(crate) workers: usize,
    pub(crate) rounds: usize,
}

/// What came of it.
#[derive(Debug, Serialize)]
pub(crate) struct Figures {
    /// What ran the guests.
    pub(crate) machine: &'static str,
    pub(crate) vcpus: u64,
    pub(crate) workers: usize,
    pub(crate) memory_bytes: u64,
    /// Pages that were filled because a guest waited for them, in all rounds of the library.
    pub(crate) pages_served: u64,
    pub(crate) wrong_words: u64,
    pub(crate) double_fills: u64,
    /// Medians of the rounds, from the first guest's start to the last one's end of reading all.
    pub(crate) pages_per_s: f64,
    pub(crate) mutex_pages_per_s: f64,
    pub(crate) ratio: f64,
    pub(crate) dirty: Dirty,
}

/// Two logs of the same writes.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Dirty {
    /// Pages that were rewritten.
    pub(crate) written: u64,
    pub(crate) ours: u64,
    /// `null` if no KVM keeps one.
    pub(crate) kvm: Option<u64>,
    /// Pages that were written and are not in ours.
    pub(crate) missed: u64,
    /// Pages that only one of the logs has; 0 if there is only ours.
    pub(crate) different: u64,
}

/// A VMM that is served by a handler of this process, over a connection.
pub(crate) struct Served {
    // The session first, so that it is over before the memory goes.
    pub(crate) session: Session,
    _connection: (UnixStream, UnixStream),
    pub(crate) vmm: Arc<Vmm>,
}

impl Served {
    pub(crate) fn new(shape: Shape, source: Arc<dyn Source>, config: Config) -> Outcome<Self> {
        Self::of(Arc::new(Vmm::new(shape)?), source, config)
    }

    /// The same with a VMM that is there.
    pub(crate) fn of(vmm: Arc<Vmm>, source: Arc<dyn Source>, config: Config) -> Outcome<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        vmm.introduce(&ours)?;
        let hello = protocol::receive(&theirs, source.len())?;
        let session = Session::start(hello, source, config)?;
        Ok(Self {
            session,
            _connection: (ours, theirs),
            vmm,
        })
    }
}

/// Memory of a guest, with writes tracked or not.
pub(crate) fn shape(memory: u64, track_writes: bool) -> Shape {
    Shape {
        track_writes,
        features: if track_writes {
            features::WP | features::WP_SHMEM
        } else {
            0
        },
        ..Shape::new(MemoryKind::Shared, memory)
    }
}

/// A guest for each vCPU, each with a part of the memory of its own, which it rewrites.
pub(crate) fn parts(plan: &Plan, passes: u64) -> Vec<State> {
    let edge = |vcpu| plan.memory / 4096 * vcpu / plan.vcpus;
    let part = |vcpu| {
        let first = edge(vcpu);
        State::new(first * 4096, edge(vcpu + 1) - first, passes, true)
    };
    (0..plan.vcpus).map(part).collect()
}

pub(crate) fn wrong_words(states: &[State]) -> u64 {
    states.iter().map(|state| state.wrong).sum()
}

pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Every guest reads everything. Returns pages for each second, and adds to the figures.
fn read_all(
    plan: &Plan,
    engine: Engine,
    source: &Arc<dyn Source>,
    figures: &mut Figures,
) -> Outcome<f64> {
    let config = Config {
        workers: plan.workers,
        engine,
        ..Config::default()
    };
    let served = Served::new(shape(plan.memory, false), source.clone(), config)?;
    let machine = Machine::new(plan.kind, served.vmm.clone(), false)?;
    let pages = plan.memory / 4096;
    let guests = (0..plan.vcpus).map(|vcpu| {
        // The first pass begins in the middle, the second reads all.
        let mut state = State::new(0, pages, 2, false);
        state.page = vcpu * pages / plan.vcpus;
        state
    });
    let start = Instant::now();
    let running = machine.start(guests.collect())?;
    let states = running.watched(&served.session)?;
    let elapsed = start.elapsed();
    figures.wrong_words += wrong_words(&states);
    drop(machine);
    let report = served.session.stop()?;
    if engine == Engine::Tdp {
        figures.pages_served += report.served.filled;
        figures.double_fills += report.existing + report.served.filled.saturating_sub(pages);
    }
    Ok(pages as f64 / elapsed.as_secs_f64())
}

/// Guests rewrite pages, and two logs say which.
fn compare_logs(plan: &Plan, source: &Arc<dyn Source>, figures: &mut Figures) -> Outcome<()> {
    let config = Config {
        workers: plan.workers,
        ..Config::default()
    };
    let served = Served::new(shape(plan.memory, true), source.clone(), config)?;
    let machine = Machine::new(plan.kind, served.vmm.clone(), true)?;
    let log = served.session.writes().ok_or("writes are not tracked")?;
    let base = served.vmm.memory().address();
    let (mut ours, mut theirs) = (BTreeSet::new(), BTreeSet::new());
    // The second time on pages that both logs have protected again.
    let mut states = parts(plan, 1);
    for _ in 0..2 {
        let (mut now, mut kvm) = (BTreeSet::new(), BTreeSet::new());
        states = machine.start(states)?.watched(&served.session)?;
        log.collect(|address| {
            now.insert(address - base);
        })?;
        let logged = machine.dirty(|offset| {
            kvm.insert(offset);
        })?;
        for state in &states {
            let written = (state.first..state.first + state.pages * 4096).step_by(4 * 4096);
            for page in written {
                figures.dirty.written += 1;
                figures.dirty.missed += u64::from(!now.contains(&page));
            }
        }
        if logged {
            figures.dirty.different += now.symmetric_difference(&kvm).count() as u64;
            theirs.extend(kvm);
            figures.dirty.kvm = Some(theirs.len() as u64);
        }
        ours.extend(now);
        for state in &mut states {
            state.passes += 1;
        }
    }
    figures.dirty.ours = ours.len() as u64;
    figures.wrong_words += wrong_words(&states);
    drop(machine);
    let report = served.session.stop()?;
    figures.pages_served += report.served.filled;
    figures.double_fills += report.existing;
    Ok(())
}

/// Does all of it.
pub(crate) fn run(plan: &Plan) -> Outcome<Figures> {
    let source: Arc<dyn Source> = Arc::new(Snapshot::of(snapshot(plan.memory)?));
    let mut figures = Figures {
        machine: plan.kind.name(),
        vcpus: plan.vcpus,
        workers: plan.workers,
        memory_bytes: plan.memory,
        pages_served: 0,
        wrong_words: 0,
        double_fills: 0,
        pages_per_s: 0.0,
        mutex_pages_per_s: 0.0,
        ratio: 0.0,
        dirty: Dirty::default(),
    };
    let (mut tdp, mut mutex, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..plan.rounds {
        let mut rates = [0.0; 2];
        for turn in 0..2 {
            let which = (turn + round) % 2;
            let engine = [Engine::Tdp, Engine::Mutex][which];
            rates[which] = read_all(plan, engine, &source, &mut figures)?;
        }
        tdp.push(rates[0]);
        mutex.push(rates[1]);
        ratios.push(rates[0] / rates[1]);
    }
    figures.pages_per_s = median(&mut tdp);
    figures.mutex_pages_per_s = median(&mut mutex);
    figures.ratio = median(&mut ratios);
    compare_logs(plan, &source, &mut figures)?;
    Ok(figures)
}
