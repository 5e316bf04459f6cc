//! Measurements: ratios in one run, rounds interleaved, medians.
//!
//! Protocol. A round makes a VMM and a handler in this process, lets threads read one word of every page once, and looks at
//! the clock. What is compared runs in turn within each round, so that a machine which slows down slows both.

use crate::memory::{Kind, Memory, word};
use crate::protocol::Region;
use crate::session::{Config, Engine, Session};
use crate::source::{Remote, Snapshot, Source};
use crate::table::KernelTable;
use crate::vmm::{Shape, Vmm, snapshot};
use crate::{host, sys};
use serde::Serialize;
use std::error::Error;
use std::sync::Arc;
use std::sync::Barrier;
use std::time::{Duration, Instant};
use std::{io, thread};
use tdp::{Fault, Gpa, Outcome, Visibility};
use vmm_sys_util::eventfd::EventFd;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Pages of each thread on the slow source: enough for each of many, and not so much that one takes minutes.
const PAGES_EACH: u64 = 256;

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Bytes of guest memory.
    pub memory: u64,
    /// Rounds of each.
    pub rounds: usize,
    /// Faulting threads, and as many workers, of the comparison.
    pub threads: usize,
    /// Faulting threads, and as many workers, on the slow source.
    pub many: usize,
    /// What the slow source sleeps for each page.
    pub delay: Duration,
}

/// Two ways to do the same.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    /// What was read.
    pub what: String,
    /// Bytes of one page.
    pub page_size: u64,
    /// Faulting threads, and as many workers.
    pub threads: usize,
    /// Pages for each second, medians.
    pub tdp_pages_per_s: f64,
    /// The same, with one mutex and a bitmap.
    pub mutex_pages_per_s: f64,
    /// The median of the rounds' ratios.
    pub ratio: f64,
    /// Words that were not those of the snapshot.
    pub wrong_words: u64,
    /// Pages that were filled twice.
    pub double_fills: u64,
}

/// Many against one on a slow source.
#[derive(Clone, Debug, Serialize)]
pub struct Scaled {
    /// Microseconds that the source sleeps for each page.
    pub delay_us: u128,
    /// Faulting threads, and as many workers.
    pub threads: usize,
    /// Pages for each second, of one thread and one worker.
    pub one_pages_per_s: f64,
    /// The same of many.
    pub many_pages_per_s: f64,
    /// The same of many with one mutex and a bitmap.
    pub mutex_pages_per_s: f64,
    /// The median of the rounds' ratios of many to one.
    pub ratio: f64,
    /// The same of pairs of threads of which one asks, and the other sleeps as long and answers, with nothing else: what
    /// this machine's sleeps and switches allow.
    pub bare_ratio: f64,
    /// Words that were not those of the snapshot.
    pub wrong_words: u64,
    /// Pages that were filled twice.
    pub double_fills: u64,
}

/// What the library adds to an ioctl.
#[derive(Clone, Debug, Serialize)]
pub struct Overhead {
    /// Nanoseconds of `UFFDIO_COPY` of one page.
    pub ioctl_ns: f64,
    /// Nanoseconds of a fault whose hook does everything but the ioctl.
    pub library_ns: f64,
    /// The second as a part of the first.
    pub percent: f64,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Processors.
    pub processors: usize,
    /// The comparison.
    pub compared: Vec<Compared>,
    /// The slow source.
    pub scaled: Scaled,
    /// The cost of the library.
    pub overhead: Overhead,
}

/// Least rate of the library, as a multiple of that with one mutex. Of pages of 4 KiB: there are so few of 2 MiB in a run
/// that the figure says little.
pub const LEAST_RATIO: f64 = 1.3;
/// Most that the library may add to an ioctl, in per cent of it.
pub const MOST_OVERHEAD: f64 = 3.0;
/// Least rate of many threads on a slow source, as a multiple of that of one.
pub const LEAST_SCALING: f64 = 50.0;
/// The same as a part of what bare threads reach: enough where the machine does not allow more.
pub const LEAST_OF_BARE: f64 = 0.9;

impl Figures {
    /// What is not as it should be, a line for each.
    pub fn shortcomings(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut demand = |good: bool, what: String| {
            if !good {
                found.push(what);
            }
        };
        let mut right = |what: &str, wrong_words: u64, double_fills: u64| {
            let good = wrong_words == 0 && double_fills == 0;
            demand(
                good,
                format!("{what}: {wrong_words} wrong words and {double_fills} double fills"),
            );
        };
        for it in &self.compared {
            right(&it.what, it.wrong_words, it.double_fills);
        }
        let Scaled {
            ratio, bare_ratio, ..
        } = self.scaled;
        right(
            "the slow source",
            self.scaled.wrong_words,
            self.scaled.double_fills,
        );
        // A figure that is none is not as it should be: so nothing is asked the other way round.
        for it in self.compared.iter().filter(|it| it.page_size == 4096) {
            let text = format!(
                "{}: {:.2} times the rate with one mutex, not {LEAST_RATIO}",
                it.what, it.ratio
            );
            demand(it.ratio >= LEAST_RATIO, text);
        }
        demand(
            ratio >= LEAST_SCALING || ratio >= LEAST_OF_BARE * bare_ratio,
            format!(
                "the slow source: {ratio:.1} times the rate of one thread, neither {LEAST_SCALING} nor {LEAST_OF_BARE} of the {bare_ratio:.1} of bare threads"
            ),
        );
        let percent = self.overhead.percent;
        demand(
            percent <= MOST_OVERHEAD,
            format!("the library adds {percent:.1} % to an ioctl, more than {MOST_OVERHEAD}"),
        );
        found
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// What a run came to.
struct Run {
    pages_per_s: f64,
    wrong: u64,
    double: u64,
}

/// Reads one word of every page, by so many threads and with as many workers.
fn run(shape: Shape, source: &Arc<dyn Source>, engine: Engine, threads: usize) -> Result<Run> {
    let vmm = Vmm::new(shape)?;
    let config = Config {
        workers: threads,
        engine,
        ..Config::default()
    };
    let session = Session::start(vmm.hello()?, source.clone(), config)?;
    let page = shape.kind.page();
    let begin = Barrier::new(threads + 1);
    let (elapsed, wrong) = thread::scope(|scope| {
        let guests: Vec<_> = (0..threads as u64)
            .map(|guest| {
                let (begin, vmm) = (&begin, &vmm);
                scope.spawn(move || {
                    let each = shape.len / page / threads as u64;
                    begin.wait();
                    let mut wrong = 0;
                    for index in guest * each..(guest + 1) * each {
                        let at = index * page;
                        wrong += u64::from(vmm.memory().load(at) != word(at, 0));
                    }
                    wrong
                })
            })
            .collect();
        begin.wait();
        let start = Instant::now();
        let wrong = guests.into_iter().map(|it| it.join().unwrap_or(u64::MAX));
        let wrong = wrong.fold(0, u64::saturating_add);
        (start.elapsed(), wrong)
    });
    let report = session.stop()?;
    let filled = shape.len / page / threads as u64 * threads as u64;
    Ok(Run {
        pages_per_s: filled as f64 / elapsed.as_secs_f64(),
        wrong,
        double: report.existing + report.served.filled.saturating_sub(filled),
    })
}

fn compare(plan: &Plan, what: &str, shape: Shape, source: &Arc<dyn Source>) -> Result<Compared> {
    let (mut tdp, mut mutex, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let (mut wrong, mut double) = (0, 0);
    for round in 0..plan.rounds {
        let mut rates = [0.0; 2];
        let order = [Engine::Tdp, Engine::Mutex];
        for turn in 0..2 {
            let which = (turn + round) % 2;
            let done = run(shape, source, order[which], plan.threads)?;
            rates[which] = done.pages_per_s;
            wrong += done.wrong;
            double += done.double;
        }
        tdp.push(rates[0]);
        mutex.push(rates[1]);
        ratios.push(rates[0] / rates[1]);
    }
    Ok(Compared {
        what: what.into(),
        page_size: shape.kind.page(),
        threads: plan.threads,
        tdp_pages_per_s: median(tdp),
        mutex_pages_per_s: median(mutex),
        ratio: median(ratios),
        wrong_words: wrong,
        double_fills: double,
    })
}

/// So many pairs of threads: one asks so many times, the other sleeps and answers. Answers for each second.
fn bare(pairs: usize, times: u64, delay: Duration) -> Result<f64> {
    let event = || EventFd::new(0);
    let events: io::Result<Vec<_>> = (0..pairs).map(|_| Ok((event()?, event()?))).collect();
    let events = events?;
    let begin = Barrier::new(pairs + 1);
    thread::scope(|scope| {
        let asking: Vec<_> = events
            .iter()
            .map(|(asked, answered)| {
                scope.spawn(move || {
                    (0..times).try_for_each(|_| {
                        asked.read()?;
                        thread::sleep(delay);
                        answered.write(1)
                    })
                });
                let begin = &begin;
                scope.spawn(move || {
                    begin.wait();
                    (0..times).try_for_each(|_| {
                        asked.write(1)?;
                        answered.read().map(drop)
                    })
                })
            })
            .collect();
        begin.wait();
        let start = Instant::now();
        for thread in asking {
            thread.join().map_err(|_| "a thread panicked")??;
        }
        Ok((pairs as u64 * times) as f64 / start.elapsed().as_secs_f64())
    })
}

fn scale(plan: &Plan) -> Result<Scaled> {
    let pages = |threads: usize| threads as u64 * PAGES_EACH;
    let source = |threads| -> Result<Arc<dyn Source>> {
        let snapshot = Snapshot::of(snapshot(pages(threads) * 4096)?);
        Ok(Arc::new(Remote::new(snapshot, plan.delay)))
    };
    let shape = |threads| Shape::new(Kind::Anonymous, pages(threads) * 4096);
    let (single, multiple) = (source(1)?, source(plan.many)?);
    let (mut one, mut many, mut mutex, mut ratios) = (vec![], vec![], vec![], vec![]);
    let mut bare_ratios = vec![];
    let (mut wrong, mut double) = (0, 0);
    for round in 0..plan.rounds {
        let first = run(shape(1), &single, Engine::Tdp, 1)?;
        let all = run(shape(plan.many), &multiple, Engine::Tdp, plan.many)?;
        for done in [&first, &all] {
            wrong += done.wrong;
            double += done.double;
        }
        one.push(first.pages_per_s);
        many.push(all.pages_per_s);
        ratios.push(all.pages_per_s / first.pages_per_s);
        let alone = bare(1, PAGES_EACH, plan.delay)?;
        bare_ratios.push(bare(plan.many, PAGES_EACH, plan.delay)? / alone);
        if round == 0 {
            // One after the other, it takes the time of one thread for the pages of all: once is enough.
            let few = Shape::new(Kind::Anonymous, pages(1) * 4096);
            let done = run(few, &single, Engine::Mutex, plan.many)?;
            wrong += done.wrong;
            mutex.push(done.pages_per_s);
        }
    }
    Ok(Scaled {
        delay_us: plan.delay.as_micros(),
        threads: plan.many,
        one_pages_per_s: median(one),
        many_pages_per_s: median(many),
        mutex_pages_per_s: median(mutex),
        ratio: median(ratios),
        bare_ratio: median(bare_ratios),
        wrong_words: wrong,
        double_fills: double,
    })
}

/// One thread fills all of a VM's memory: by ioctls alone, and by faults whose hook does everything but the ioctl.
fn overhead(plan: &Plan, source: &Arc<dyn Source>) -> Result<Overhead> {
    let pages = plan.memory / 4096;
    let (mut ioctl, mut library, mut percent) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..plan.rounds {
        let vmm = Vmm::new(Shape::new(Kind::Anonymous, plan.memory))?;
        let hello = vmm.hello()?;
        let base = vmm.memory().address();
        let mut from = 0;
        source.with(0, plan.memory, &mut |address| from = address)?;
        let start = sys::thread_time();
        for page in 0..pages {
            hello
                .uffd
                .copy(base + page * 4096, from + page * 4096, 4096, false)
                .map_err(|short| io::Error::from_raw_os_error(short.errno))?;
        }
        let alone = (sys::thread_time() - start).as_nanos() as f64 / pages as f64;

        let regions = [Region::new(base, plan.memory, 0)];
        let mut kernel = KernelTable::new(hello.uffd, source.clone(), None, Vec::new())?;
        kernel.idle = true;
        let states = host::page_states(kernel, &regions)?;
        let mut vcpu = states.vcpu()?;
        // The tables are there, as they are for all but one page in 512.
        let all = host::frames(base, base + plan.memory);
        vcpu.prefault(all, Visibility::Private)?;
        states.zap_private(host::SPACE, all)?;
        let start = sys::thread_time();
        for page in 0..pages {
            let fault = Fault::read(Gpa(base + page * 4096)).private();
            if !matches!(vcpu.fault(fault)?, Outcome::Fixed { .. }) {
                return Err("a page of a new VM was there".into());
            }
        }
        let added = (sys::thread_time() - start).as_nanos() as f64 / pages as f64;
        ioctl.push(alone);
        library.push(added);
        percent.push(100.0 * added / alone);
    }
    Ok(Overhead {
        ioctl_ns: median(ioctl),
        library_ns: median(library),
        percent: median(percent),
    })
}

/// Measures everything.
///
/// # Errors
///
/// Where userfaultfd cannot be used, and where memory is short.
pub fn measure(plan: &Plan) -> Result<Figures> {
    if let Some(why) = sys::unavailable() {
        return Err(why.into());
    }
    let source: Arc<dyn Source> = Arc::new(Snapshot::of(snapshot(plan.memory)?));
    let overhead = overhead(plan, &source)?;
    let small = Shape::new(Kind::Anonymous, plan.memory);
    let mut compared = vec![compare(plan, "4 KiB pages", small, &source)?];
    match Memory::new(Kind::Huge, plan.memory) {
        Ok(memory) => {
            drop(memory);
            let huge = Shape::new(Kind::Huge, plan.memory);
            compared.push(compare(plan, "2 MiB pages", huge, &source)?);
        }
        Err(why) => eprintln!("2 MiB pages: skipped, none can be had: {why}"),
    }
    Ok(Figures {
        processors: thread::available_parallelism()?.get(),
        compared,
        scaled: scale(plan)?,
        overhead,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Figures {
        Figures {
            processors: 2,
            compared: vec![Compared {
                what: "pages".into(),
                page_size: 4096,
                threads: 2,
                tdp_pages_per_s: 130.0,
                mutex_pages_per_s: 100.0,
                ratio: 1.3,
                wrong_words: 0,
                double_fills: 0,
            }],
            scaled: Scaled {
                delay_us: 1000,
                threads: 64,
                one_pages_per_s: 100.0,
                many_pages_per_s: 5000.0,
                mutex_pages_per_s: 100.0,
                ratio: 50.0,
                bare_ratio: 64.0,
                wrong_words: 0,
                double_fills: 0,
            },
            overhead: Overhead {
                ioctl_ns: 1000.0,
                library_ns: 30.0,
                percent: 3.0,
            },
        }
    }

    #[test]
    fn what_falls_short_is_named() {
        assert_eq!(good().shortcomings(), [""; 0]);
        // What the machine does not allow is not asked for, nor the rate of large pages.
        let mut slow = good();
        (slow.scaled.ratio, slow.scaled.bare_ratio) = (19.0, 21.0);
        slow.compared.push(Compared {
            page_size: 2 << 20,
            ratio: 0.9,
            ..slow.compared[0].clone()
        });
        assert_eq!(slow.shortcomings(), [""; 0]);
        slow.compared[1].wrong_words = 1;
        assert_eq!(slow.shortcomings().len(), 1);

        type Case = (fn(&mut Figures), &'static str);
        let cases: [Case; 9] = [
            (|it| it.compared[0].ratio = 1.29, "one mutex"),
            (|it| it.compared[0].ratio = f64::NAN, "one mutex"),
            (|it| it.compared[0].wrong_words = 1, "1 wrong words"),
            (|it| it.compared[0].double_fills = 2, "2 double fills"),
            (|it| it.scaled.ratio = 49.0, "49.0 times"),
            (|it| it.scaled.ratio = f64::NAN, "NaN times"),
            (|it| it.scaled.wrong_words = 3, "3 wrong words"),
            (|it| it.overhead.percent = 3.1, "3.1 %"),
            (|it| it.overhead.percent = f64::NAN, "NaN %"),
        ];
        for (spoil, text) in cases {
            let mut bad = good();
            spoil(&mut bad);
            let found = bad.shortcomings();
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].contains(text), "{found:?}");
        }
    }
}
