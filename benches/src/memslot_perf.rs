//! Memslot performance: guest memory cut into many slots, mapped, unmapped, moved and used.
//!
//! The tests are those of KVM's memslot_perf_test: `map` (a vCPU writes to every page), `unmap` (the host takes everything away
//! by one call), `unmap chunked` (2 MiB a call), `move active area` (a slot moves while a vCPU faults on another), `move inactive
//! area` (nobody does anything), and `RW` (a vCPU reads and writes pages that are there). Each is repeated for a given time.
//!
//! A baseline has one slot of the same memory. Its move is what a move does under its lock: it takes away what is mapped.

use crate::baseline::Setup;
use crate::baseline::host::Backing;
use crate::baseline::mutex::OneMutex;
use crate::baseline::rwlock::ReaderWriter;
use crate::baseline::table_lock::TableLock;
use crate::formats::FormatChoice;
use crate::ours::{Ours, Tables, Walked, WholeFault};
use crate::private_mem_conversions::seconds;
use crate::race::{Contender, join, median, minimum};
use crate::report::{Error, Output, Progress};
use crate::size;
use crate::sweeping::{SPACE, Sweeping, Touching, Zap};
use crate::sweeps::{memory, our_setup};
use crate::sync::{AtomicBool, Ordering};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tdp::{LinearBacking, Pfn, Slot, SlotId};
use tdp_arch::{Access, AdBits, Ept, Gfn, GfnRange, Level, Npt};

const ABOUT: &str = "\
Cuts guest memory into slots and maps, unmaps, moves and uses it. Flags and lines follow KVM's memslot_perf_test: map, unmap,
unmap chunked, move active area, move inactive area, RW; each for -l seconds. Baselines have one slot of the same memory; their
move is the zap under their lock.";

const EXAMPLES: &str = "\
Examples:
  tdp-bench memslot-perf
  tdp-bench memslot-perf -s 32764 -b 1G -l 5 --json -";

/// Memory of many slots, mapped, unmapped, moved and used
#[derive(Debug, clap::Args)]
#[command(long_about = ABOUT, after_help = EXAMPLES)]
pub struct Args {
    /// Slots that guest memory is cut into
    #[arg(short = 's', long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..=32764))]
    slots: u32,

    /// Guest memory: bytes, or with K, M, G or T
    #[arg(short = 'b', long, value_name = "SIZE", default_value = "512M", value_parser = size::parse)]
    bytes: u64,

    /// How long each test is repeated
    #[arg(short = 'l', long, value_name = "SECONDS", default_value_t = 0.3, value_parser = seconds)]
    length: f64,

    /// Entry format
    #[arg(short = 'f', long, value_enum, default_value_t = FormatChoice::Ept)]
    format: FormatChoice,
}

/// The tests, in order.
const TESTS: [&str; 6] = [
    "map",
    "unmap",
    "unmap chunked",
    "move active area",
    "move inactive area",
    "RW",
];

/// One contender.
#[derive(Serialize)]
struct Row {
    name: &'static str,
    format: &'static str,
    slots: u32,
    /// Time to add all slots.
    setup_ns: u64,
    /// Nanoseconds of each iteration, by test.
    ns: BTreeMap<&'static str, Vec<u64>>,
    /// Pages that an iteration left mapped or unmapped wrongly.
    wrong: u64,
    leaked: u64,
}

#[derive(Serialize)]
struct Body<'a> {
    parameters: Parameters,
    results: Vec<&'a Row>,
    baselines: Vec<&'a Row>,
    /// By baseline, by test: its best iteration over the library's, the smaller of the formats' figures.
    ratios: BTreeMap<&'static str, BTreeMap<&'static str, f64>>,
    checks: Checks,
}

#[derive(Serialize)]
struct Parameters {
    slots: u32,
    bytes: u64,
    seconds: f64,
}

#[derive(Serialize)]
struct Checks {
    mismatched: u64,
    leaked_frames: u64,
}

/// Runs the scenario.
///
/// # Errors
///
/// [`Error::Usage`] for arguments that do not go together, the library's own errors if a run fails, and [`Error::Check`] if
/// something was mapped that should not be or the reverse, or a frame was lost.
pub fn run(args: &Args, output: &Output) -> Result<(), Error> {
    let backing = memory(args.bytes)?;
    if backing.gfns.pages() < u64::from(args.slots) {
        return Err(Error::Usage(format!(
            "-s {}: more slots than pages (-b)",
            args.slots
        )));
    }
    let formats =
        u64::from(args.format.includes::<Ept>()) + u64::from(args.format.includes::<Npt>());
    let progress = output.progress(formats * 4);
    let mut rows = Vec::new();
    if args.format.includes::<Ept>() {
        rows.extend(measure::<Ept>(args, backing, &progress)?);
    }
    if args.format.includes::<Npt>() {
        rows.extend(measure::<Npt>(args, backing, &progress)?);
    }
    drop(progress);
    tell(output, &rows);
    let checks = Checks {
        mismatched: rows.iter().map(|row| row.wrong).sum(),
        leaked_frames: rows
            .iter()
            .fold(0, |sum, row| sum.saturating_add(row.leaked)),
    };
    let (wrong, leaked) = (checks.mismatched, checks.leaked_frames);
    let (results, baselines) = rows.iter().partition(|row| row.name == "tdp");
    let body = Body {
        parameters: Parameters {
            slots: args.slots,
            bytes: args.bytes,
            seconds: args.length,
        },
        results,
        baselines,
        ratios: ratios(&rows),
        checks,
    };
    output.finish("memslot-perf", &body)?;
    if wrong + leaked != 0 {
        return Err(Error::Check(format!(
            "{wrong} pages wrongly mapped or not, {leaked} table frames leaked"
        )));
    }
    Ok(())
}

fn floats(ns: &[u64]) -> Vec<f64> {
    ns.iter().map(|ns| *ns as f64).collect()
}

fn ratios(rows: &[Row]) -> BTreeMap<&'static str, BTreeMap<&'static str, f64>> {
    let best = |row: &Row, test| row.ns.get(test).map(|ns| minimum(&floats(ns)));
    let mut ratios = BTreeMap::<_, BTreeMap<_, f64>>::new();
    for row in rows.iter().filter(|row| row.name != "tdp") {
        let ours = rows
            .iter()
            .find(|ours| ours.name == "tdp" && ours.format == row.format);
        for test in TESTS {
            if let Some((theirs, ours)) =
                best(row, test).zip(ours.and_then(|ours| best(ours, test)))
            {
                let by_test = ratios.entry(row.name).or_default();
                let least = by_test.entry(test).or_insert(f64::INFINITY);
                *least = least.min(theirs / ours);
            }
        }
    }
    ratios
}

fn tell(output: &Output, rows: &[Row]) {
    let seconds = |ns: f64| format!("{:.9}s", ns / 1e9);
    for row in rows.iter().filter(|row| row.name == "tdp") {
        output.say(format_args!(
            "{}: {} slots set up in {}",
            row.format,
            row.slots,
            seconds(row.setup_ns as f64)
        ));
        for test in TESTS {
            let ns = row.ns.get(test).map_or(&[][..], Vec::as_slice);
            let average = floats(ns).iter().sum::<f64>() / ns.len() as f64;
            output.say(format_args!(
                "Test {test}: done {} iterations, avg {} each, best {}",
                ns.len(),
                seconds(average),
                seconds(minimum(&floats(ns)))
            ));
        }
    }
    let mut header = vec!["", ""];
    header.extend(TESTS);
    output.say("Median milliseconds an iteration:");
    output.table(
        &header,
        rows.iter().map(|row| {
            let mut cells = vec![row.format.to_owned(), row.name.to_owned()];
            cells.extend(TESTS.map(|test| {
                let ns = row.ns.get(test).map_or(&[][..], Vec::as_slice);
                format!("{:.4}", median(&floats(ns)) / 1e6)
            }));
            cells
        }),
    );
}

/// What a move is to a contender: of the slot that is the `number`-th in order.
trait Moving: Sweeping {
    /// Moves the slot of `gfns` away and back.
    fn move_slot(&self, number: u32, gfns: GfnRange) -> Result<(), Error>;

    /// Cuts memory into slots.
    fn cut(&self, slots: &[GfnRange]) -> Result<(), Error>;
}

macro_rules! moves_by_zap {
    ($($name:ident),+) => {
        $(
            impl<F: Walked> Moving for $name<F, 4> {
                fn move_slot(&self, _number: u32, gfns: GfnRange) -> Result<(), Error> {
                    self.sweep::<Zap>(gfns)?;
                    self.sweep::<Zap>(gfns)
                }

                fn cut(&self, _slots: &[GfnRange]) -> Result<(), Error> {
                    Ok(())
                }
            }
        )+
    };
}

moves_by_zap!(ReaderWriter, OneMutex, TableLock);

/// Host frame less guest frame, as [`memory`] has it.
fn host_frame(gfn: Gfn) -> Pfn {
    Pfn(gfn.0 + (1 << 27))
}

/// Guest frames from a slot's place to its other place.
const OTHER_PLACE: u64 = 1 << 30;

impl<F: Walked> Moving for Ours<F, WholeFault> {
    fn move_slot(&self, number: u32, gfns: GfnRange) -> Result<(), Error> {
        let slots = self.mmu().slots();
        let id = SlotId(number);
        slots
            .move_to(SPACE, id, Gfn(gfns.start.0 + OTHER_PLACE))
            .and_then(|()| slots.move_to(SPACE, id, gfns.start))
            .map_err(|e| Error::run("slots", e))
    }

    fn cut(&self, parts: &[GfnRange]) -> Result<(), Error> {
        let slots = self.mmu().slots();
        slots
            .remove(SPACE, SlotId(0))
            .map_err(|e| Error::run("slots", e))?;
        for (number, gfns) in (0..).zip(parts) {
            let backing = LinearBacking::new(host_frame(gfns.start), Level::L1);
            slots
                .insert(Slot::new(*gfns, backing).with_id(SlotId(number)))
                .map_err(|e| Error::run("slots", e))?;
        }
        Ok(())
    }
}

fn measure<F: Walked>(
    args: &Args,
    backing: Backing,
    progress: &Progress,
) -> Result<Vec<Row>, Error> {
    let theirs = Setup {
        backing,
        huge: false,
    };
    let ours = Ours::<F, WholeFault>::new(our_setup(backing, 2)?, Tables::Warm)?;
    progress.step(format!("{} tdp", F::NAME));
    let mut rows = vec![tests(args, backing, ours, "tdp")?];
    progress.step(format!("{} rwlock", F::NAME));
    rows.push(tests(
        args,
        backing,
        ReaderWriter::<F, 4>::new(&theirs)?,
        "rwlock",
    )?);
    progress.step(format!("{} mutex", F::NAME));
    rows.push(tests(
        args,
        backing,
        OneMutex::<F, 4>::new(&theirs)?,
        "mutex",
    )?);
    progress.step(format!("{} table_lock", F::NAME));
    rows.push(tests(
        args,
        backing,
        TableLock::<F, 4>::new(&theirs)?,
        "table_lock",
    )?);
    Ok(rows)
}

/// All tests of one contender.
fn tests<C: Moving>(
    args: &Args,
    backing: Backing,
    contender: C,
    name: &'static str,
) -> Result<Row, Error> {
    let gfns = backing.gfns;
    let parts: Vec<GfnRange> = (0..u64::from(args.slots))
        .map(|n| {
            let cut = |n: u64| Gfn(gfns.start.0 + gfns.pages() * n / u64::from(args.slots));
            GfnRange {
                start: cut(n),
                end: cut(n + 1),
            }
        })
        .collect();
    let begin = Instant::now();
    contender.cut(&parts)?;
    let mut row = Row {
        name,
        format: <C::Format as tdp_arch::Format>::NAME,
        slots: args.slots,
        setup_ns: begin.elapsed().as_nanos() as u64,
        ns: BTreeMap::new(),
        wrong: 0,
        leaked: 0,
    };
    let length = Duration::from_secs_f64(args.length);
    let mut worker = contender.worker()?;
    map(&contender, &mut worker, gfns)?;
    for test in TESTS {
        let mut ns = Vec::new();
        let end = Instant::now() + length;
        while ns.is_empty() || Instant::now() < end {
            ns.push(match test {
                "map" => {
                    contender.sweep::<Zap>(gfns)?;
                    row.wrong += contender.left::<Zap>(gfns);
                    timed(|| map(&contender, &mut worker, gfns))?
                }
                "unmap" => {
                    map(&contender, &mut worker, gfns)?;
                    row.wrong += gfns.pages() - contender.left::<Zap>(gfns);
                    timed(|| contender.sweep::<Zap>(gfns))?
                }
                "unmap chunked" => {
                    map(&contender, &mut worker, gfns)?;
                    timed(|| chunks(gfns).try_for_each(|chunk| contender.sweep::<Zap>(chunk)))?
                }
                "move active area" => moved_under_faults(&contender, &mut worker, &parts)?,
                "move inactive area" => {
                    map(&contender, &mut worker, parts[0])?;
                    let ns = timed(|| contender.move_slot(0, parts[0]))?;
                    row.wrong += contender.left::<Zap>(parts[0]);
                    ns
                }
                _ => read_and_write(&contender, &mut worker, gfns)?,
            });
        }
        row.ns.insert(test, ns);
    }
    drop(worker);
    row.leaked = contender.leaked();
    Ok(row)
}

fn timed(work: impl FnOnce() -> Result<(), Error>) -> Result<u64, Error> {
    let begin = Instant::now();
    work()?;
    Ok(begin.elapsed().as_nanos() as u64)
}

fn chunks(gfns: GfnRange) -> impl Iterator<Item = GfnRange> {
    let step = Level::L2.pages();
    (gfns.start.0..gfns.end.0)
        .step_by(step as usize)
        .map(move |start| GfnRange {
            start: Gfn(start),
            end: Gfn((start + step).min(gfns.end.0)),
        })
}

fn map<C: Sweeping>(contender: &C, worker: &mut C::Worker, gfns: GfnRange) -> Result<(), Error> {
    for number in gfns.start.0..gfns.end.0 {
        contender.resolve(worker, Gfn(number)).map_err(Into::into)?;
    }
    Ok(())
}

/// Moves the first slot while a vCPU maps the others, and returns what that took.
fn moved_under_faults<C: Moving>(
    contender: &C,
    worker: &mut C::Worker,
    parts: &[GfnRange],
) -> Result<u64, Error> {
    let moving = parts[0];
    map(contender, worker, moving)?;
    let others = GfnRange {
        start: moving.end,
        end: parts[parts.len() - 1].end,
    };
    let (begun, over) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let vcpu = scope.spawn(|| {
            let mut outcome = Ok(());
            while outcome.is_ok() && !over.load(Ordering::Relaxed) {
                for chunk in chunks(others) {
                    outcome = map(contender, worker, chunk);
                    begun.store(true, Ordering::Relaxed);
                    if outcome.is_err() || over.load(Ordering::Relaxed) {
                        break;
                    }
                }
            }
            begun.store(true, Ordering::Relaxed);
            outcome
        });
        while !begun.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        let moved = timed(|| contender.move_slot(0, moving));
        over.store(true, Ordering::Relaxed);
        join(vcpu)?;
        moved
    })
}

/// A vCPU reads and writes every page by turns.
fn read_and_write<C: Sweeping>(
    contender: &C,
    worker: &mut C::Worker,
    gfns: GfnRange,
) -> Result<u64, Error> {
    let walker = C::Format::walker(Level::L4, AdBits::Processor)
        .map_err(|e| Error::run("page walker", e))?;
    let touching = |access| Touching {
        contender,
        walker: &walker,
        access,
    };
    let (reading, writing) = (touching(Access::Read), touching(Access::Write));
    timed(|| {
        for number in gfns.start.0..gfns.end.0 {
            if number % 2 == 0 {
                reading.resolve(worker, Gfn(number))?;
            } else {
                writing.resolve(worker, Gfn(number))?;
            }
        }
        Ok(())
    })
}
