//! The contenders in their lanes, and the rounds that they run.

use super::plan::{Circuit, Plan};
use super::{Against, Args};
use crate::baseline::Setup;
use crate::baseline::floor::Floor;
use crate::baseline::host::Backing;
use crate::baseline::multiarch::MultiArch;
use crate::baseline::mutex::OneMutex;
use crate::baseline::rwlock::ReaderWriter;
use crate::baseline::table_lock::TableLock;
use crate::baseline::x86::X86;
use crate::confidential::backend::{Backend, BackendChoice, Null, Tdx};
use crate::confidential::conditions::{Conditions, Weather};
use crate::confidential::faulting::{Faulting, Touched};
use crate::confidential::layout::Layout;
use crate::ours::{BareMap, OurSetup, Ours, Tables, Walked, WholeFault};
use crate::race::{self, Contender, Footprint, Laps, Translation};
use crate::report::{Error, Progress};
use crate::sync::Padded;
use rayon::prelude::*;
use serde::Serialize;
use tdp_arch::{Ept, Format, Gfn, Level};

/// What a contender does in its timed operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Work {
    /// A whole fault.
    Fault,
    /// The install of a known frame.
    Map,
}

/// Who runs in a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Label {
    pub(super) name: &'static str,
    pub(super) work: Work,
    /// `warm` or `fresh`.
    pub(super) tables: &'static str,
}

/// The library's own name among the contenders.
pub(super) const OURS: &str = "tdp";

/// What a check of translations found.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Checked {
    pub(super) translated: u64,
    pub(super) mismatched: u64,
}

/// A lane after its laps: one [`Laps`] for each course.
#[derive(Debug)]
pub(super) struct LaneResult {
    pub(super) label: Label,
    pub(super) laps: Vec<Laps>,
}

/// All lanes of one format.
#[derive(Debug)]
pub(super) struct FormatResult {
    pub(super) format: &'static str,
    pub(super) lanes: Vec<LaneResult>,
    /// Of the library, with everything mapped.
    pub(super) footprint: Option<Footprint>,
    /// Of the library, after every lap.
    pub(super) checked: Checked,
    /// Of the baselines, after their last laps.
    pub(super) baselines_mismatched: u64,
    pub(super) leaked: u64,
}

/// A contender with its threads' states, its type forgotten.
trait Seat {
    fn lap(&mut self, circuit: &Circuit) -> Result<race::Lap, Error>;
    fn reset(&mut self) -> Result<(), Error>;
    fn check(&self, backing: &Backing, mapped_to: Gfn) -> Checked;
    fn footprint(&self) -> Option<Footprint>;
    fn leaked(self: Box<Self>) -> u64;
}

struct Seated<C: Contender> {
    contender: C,
    workers: Vec<Padded<C::Worker>>,
}

impl<C: Contender> Seat for Seated<C> {
    fn lap(&mut self, circuit: &Circuit) -> Result<race::Lap, Error> {
        race::lap(&self.contender, &mut self.workers, &circuit.course)
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.contender.reset()
    }

    fn check(&self, backing: &Backing, mapped_to: Gfn) -> Checked {
        check(&self.contender, backing, mapped_to)
    }

    fn footprint(&self) -> Option<Footprint> {
        self.contender.footprint()
    }

    fn leaked(self: Box<Self>) -> u64 {
        let Seated { contender, workers } = *self;
        drop(workers);
        contender.leaked()
    }
}

/// Translates every page of guest memory (a large page by its first and its last frame) and compares: pages below
/// `mapped_to` are mapped to their own host frame with every permission and the page size asked for, those above are
/// not mapped.
fn check<C: Contender>(contender: &C, backing: &Backing, mapped_to: Gfn) -> Checked {
    let page = backing.level.pages();
    let numbers = 0..backing.gfns.pages() / page;
    let mut checked = numbers
        .into_par_iter()
        .map(|number| {
            let first = Gfn(backing.gfns.start.0 + number * page);
            let mapped = first < mapped_to;
            let right = [first, Gfn(first.0 + page - 1)].into_iter().all(|gfn| {
                let expected = Translation {
                    pfn: backing.pfn_of(gfn),
                    level: backing.level,
                    permitted: true,
                };
                contender.translate(gfn) == mapped.then_some(expected)
            });
            Checked {
                translated: u64::from(mapped),
                mismatched: u64::from(!right),
            }
        })
        .reduce(Checked::default, |a, b| Checked {
            translated: a.translated + b.translated,
            mismatched: a.mismatched + b.mismatched,
        });
    if let Some(leaves) = contender.leaves() {
        checked.mismatched += leaves.abs_diff(checked.translated);
    }
    checked
}

struct Lane {
    label: Label,
    seat: Box<dyn Seat>,
    laps: Vec<Laps>,
}

impl Lane {
    /// Seats a contender, and has it run every course once, so that no lap is the first: the memory of its tables has
    /// been touched, and where tables stay they are all there.
    fn new<C: Contender + 'static>(
        plan: &Plan,
        name: &'static str,
        work: Work,
        tables: Tables,
        contender: Result<C, Error>,
    ) -> Result<Self, Error> {
        let contender = contender?;
        let vcpus = plan
            .courses
            .iter()
            .map(|circuit| circuit.course.orders.len())
            .max()
            .unwrap_or(0);
        let workers = (0..vcpus)
            .map(|_| contender.worker().map(Padded))
            .collect::<Result<_, _>>()?;
        let mut seat = Box::new(Seated { contender, workers });
        for circuit in &plan.courses {
            seat.lap(circuit)?;
            seat.reset()?;
        }
        let tables = match tables {
            Tables::Warm => "warm",
            Tables::Fresh => "fresh",
        };
        let laps = plan
            .courses
            .iter()
            .map(|circuit| Laps::of(&circuit.course))
            .collect();
        Ok(Self {
            label: Label { name, work, tables },
            seat,
            laps,
        })
    }
}

/// Seats the library and the contenders asked for.
fn lanes<F: Walked, const ROOT: u8>(args: &Args, plan: &Plan) -> Result<Vec<Lane>, Error> {
    use Tables::{Fresh, Warm};
    let ours = OurSetup {
        backing: plan.backing,
        root: plan.root,
        frames: plan.frames,
        huge: args.huge_pool,
    };
    let theirs = Setup {
        backing: plan.backing,
        huge: args.huge_pool,
    };
    let mut lanes = vec![
        Lane::new(
            plan,
            OURS,
            Work::Fault,
            Warm,
            Ours::<F, WholeFault>::new(ours, Warm),
        )?,
        Lane::new(
            plan,
            OURS,
            Work::Map,
            Warm,
            Ours::<F, BareMap>::new(ours, Warm),
        )?,
        Lane::new(
            plan,
            OURS,
            Work::Fault,
            Fresh,
            Ours::<F, WholeFault>::new(ours, Fresh),
        )?,
        Lane::new(
            plan,
            OURS,
            Work::Map,
            Fresh,
            Ours::<F, BareMap>::new(ours, Fresh),
        )?,
    ];
    if let Some((touched, name)) = confidential::<F>(args) {
        lanes.push(match args.backend {
            BackendChoice::Null => private_lane::<Null>(plan, args, touched, name),
            BackendChoice::Tdx => private_lane::<Tdx>(plan, args, touched, name),
        }?);
    }
    if args.runs(Against::Floor) {
        let name = "floor";
        lanes.push(match plan.backing.level {
            Level::L1 => Lane::new(
                plan,
                name,
                Work::Map,
                Warm,
                Floor::<F, ROOT, 1>::new(&theirs),
            ),
            Level::L2 => Lane::new(
                plan,
                name,
                Work::Map,
                Warm,
                Floor::<F, ROOT, 2>::new(&theirs),
            ),
            _ => Lane::new(
                plan,
                name,
                Work::Map,
                Warm,
                Floor::<F, ROOT, 3>::new(&theirs),
            ),
        }?);
    }
    if args.runs(Against::Mutex) {
        lanes.push(Lane::new(
            plan,
            "mutex",
            Work::Fault,
            Warm,
            OneMutex::<F, ROOT>::new(&theirs),
        )?);
    }
    if args.runs(Against::Rwlock) {
        lanes.push(Lane::new(
            plan,
            "rwlock",
            Work::Fault,
            Warm,
            ReaderWriter::<F, ROOT>::new(&theirs),
        )?);
    }
    if args.runs(Against::TableLock) {
        lanes.push(Lane::new(
            plan,
            "table_lock",
            Work::Fault,
            Warm,
            TableLock::<F, ROOT>::new(&theirs),
        )?);
    }
    if args.runs(Against::PageTableMultiarch) {
        lanes.push(Lane::new(
            plan,
            "page_table_multiarch",
            Work::Map,
            Warm,
            MultiArch::new(&theirs),
        )?);
    }
    if args.runs(Against::X86) {
        lanes.push(Lane::new(
            plan,
            "x86_64",
            Work::Map,
            Warm,
            X86::new(&theirs),
        )?);
    }
    Ok(lanes)
}

/// What the confidential guest touches, if one runs with format `F`.
fn confidential<F: Walked>(args: &Args) -> Option<(Touched, &'static str)> {
    args.visibility.touched().filter(|_| F::NAME == Ept::NAME)
}

/// A confidential guest, its tables in place.
fn private_lane<B: Backend + std::fmt::Debug>(
    plan: &Plan,
    args: &Args,
    touched: Touched,
    name: &'static str,
) -> Result<Lane, Error>
where
    B::Options: Default,
{
    let layout = Layout::new(plan.backing.gfns.pages(), plan.backing.level, args.vcpus)
        .ok_or_else(|| Error::Usage("-b: is too much for a confidential guest".to_owned()))?
        .numbered(plan.backing.gfns.start, plan.backing.pfn);
    let calm = Conditions::new(Weather::default());
    let contender = Faulting::<B>::new(layout, touched, B::Options::default(), calm);
    Lane::new(plan, name, Work::Fault, Tables::Warm, contender)
}

/// Laps that one format takes.
pub(super) fn steps(args: &Args, plan: &Plan) -> u64 {
    let baselines = [
        Against::Floor,
        Against::Mutex,
        Against::Rwlock,
        Against::TableLock,
        Against::PageTableMultiarch,
        Against::X86,
    ];
    let lanes = 4
        + usize::from(args.visibility.touched().is_some())
        + baselines
            .into_iter()
            .filter(|&baseline| args.runs(baseline))
            .count();
    (lanes * plan.courses.len()) as u64 * u64::from(args.rounds)
}

/// One lap that counts.
fn undisturbed(seat: &mut dyn Seat, circuit: &Circuit) -> Result<race::Lap, Error> {
    race::undisturbed(circuit.course.orders.len(), |again| {
        if again {
            seat.reset()?;
        }
        seat.lap(circuit)
    })
}

/// Runs all rounds of one format.
pub(super) fn run<F: Walked, const ROOT: u8>(
    args: &Args,
    plan: &Plan,
    progress: &Progress,
) -> Result<FormatResult, Error> {
    let mut result = FormatResult {
        format: F::NAME,
        lanes: Vec::new(),
        footprint: None,
        checked: Checked::default(),
        baselines_mismatched: 0,
        leaked: 0,
    };
    let mut lanes = lanes::<F, ROOT>(args, plan)?;
    for round in 1..=args.rounds {
        for lane in &mut lanes {
            for (circuit, laps) in plan.courses.iter().zip(&mut lane.laps) {
                laps.push(undisturbed(&mut *lane.seat, circuit)?);
                if lane.label.name == OURS {
                    let checked = lane.seat.check(&plan.backing, circuit.end);
                    result.checked.translated += checked.translated;
                    result.checked.mismatched += checked.mismatched;
                    result.footprint = lane.seat.footprint();
                } else if round == args.rounds {
                    result.baselines_mismatched +=
                        lane.seat.check(&plan.backing, circuit.end).mismatched;
                }
                lane.seat.reset()?;
                progress.step(format!("{} {}, round {round}", F::NAME, lane.label.name));
            }
        }
    }
    for lane in lanes {
        result.leaked = result.leaked.saturating_add(lane.seat.leaked());
        result.lanes.push(LaneResult {
            label: lane.label,
            laps: lane.laps,
        });
    }
    Ok(result)
}

#[cfg(test)]
mod tests;
