//! The functions that a guest's speed depends on, each as a piece of work that can be repeated: for whoever measures them one
//! by one, in time or in instructions.
//!
//! A piece of work does so many operations on one thread, after `prepare` has brought its guest to where the work begins. Guests
//! are small: eight tables of small pages, so that what is measured is the library and not the machine's caches.

use crate::baseline::host::Backing;
use crate::confidential::backend::{Null, NullOptions};
use crate::confidential::conditions::{Conditions, Weather, splitmix};
use crate::confidential::faulting::{Faulting, Touched};
use crate::confidential::guest::GuestVcpu;
use crate::confidential::layout::Layout;
use crate::ours::{BareMap, BenchHost, Operation, Ours, Tables, Walked, WholeFault};
use crate::race::Contender;
use crate::report::Error;
use crate::sweeping::{
    Age, ClearDirty, ClearMasks, Collapse, ProtectMasks, SPACE, Split, Sweeping, Track,
    WriteProtect, Zap,
};
use crate::sweeps::our_setup;
use std::hint::black_box;
use tdp::{AdBits, DirtyTracking, Fault, Outcome, Vcpu, Visibility};
use tdp_arch::{Ept, Gfn, GfnRange, Level, Npt, Pfn};
use tdp_rcu::{Domain, DomainConfig, Reader};

/// Small pages of a guest: eight tables' worth.
const PAGES: u64 = 4096;
const FIRST: Gfn = Gfn(1 << 18);
const HOST: Pfn = Pfn(1 << 27);

/// A piece of work.
pub trait Work {
    /// Brings about what the work begins with.
    ///
    /// # Errors
    ///
    /// If the library refuses it.
    fn prepare(&mut self) -> Result<(), Error>;

    /// The work.
    ///
    /// # Errors
    ///
    /// If the library refuses it.
    fn work(&mut self) -> Result<(), Error>;
}

/// A function that is hot.
pub struct Hot {
    /// Entry format, or none.
    pub group: &'static str,
    /// What it does.
    pub name: &'static str,
    /// How often the work does it.
    pub operations: u64,
    /// The work.
    pub work: Box<dyn Work>,
}

/// Something with two things to do.
struct Job<S> {
    state: S,
    prepare: fn(&mut S) -> Result<(), Error>,
    work: fn(&mut S) -> Result<(), Error>,
}

impl<S> Work for Job<S> {
    fn prepare(&mut self) -> Result<(), Error> {
        (self.prepare)(&mut self.state)
    }

    fn work(&mut self) -> Result<(), Error> {
        (self.work)(&mut self.state)
    }
}

/// All of them.
///
/// # Errors
///
/// If a guest cannot be had.
pub fn all() -> Result<Vec<Hot>, Error> {
    let mut hot = shared::<Ept>()?;
    hot.extend(shared::<Npt>()?);
    hot.extend(private()?);
    hot.push(pin());
    Ok(hot)
}

/// A guest without a private half, and its vCPU.
struct Shared<F: Walked, O: Operation> {
    guest: Ours<F, O>,
    vcpu: Vcpu<F, BenchHost>,
    /// Pages in the order in which they are touched.
    order: Vec<Gfn>,
}

/// Orders of pages.
#[derive(Clone, Copy)]
enum Order {
    Sequential,
    Random,
}

impl Order {
    fn gfns(self) -> Vec<Gfn> {
        let at = |n: u64| match self {
            Self::Sequential => n,
            Self::Random => splitmix(n).1,
        };
        let mut numbers: Vec<u64> = (0..PAGES).collect();
        numbers.sort_by_key(|&n| (at(n), n));
        numbers.into_iter().map(|n| Gfn(FIRST.0 + n)).collect()
    }
}

fn gfns() -> GfnRange {
    GfnRange {
        start: FIRST,
        end: Gfn(FIRST.0 + PAGES),
    }
}

type Step<S> = fn(&mut S) -> Result<(), Error>;

/// How a guest is set up.
#[derive(Clone, Copy)]
struct Kind {
    order: Order,
    level: Level,
    ad_bits: AdBits,
    tracking: DirtyTracking,
}

const PLAIN: Kind = Kind {
    order: Order::Sequential,
    level: Level::L1,
    ad_bits: AdBits::Processor,
    tracking: DirtyTracking::WriteProtect,
};
const RANDOM: Kind = Kind {
    order: Order::Random,
    ..PLAIN
};
const SOFTWARE: Kind = Kind {
    ad_bits: AdBits::Software,
    ..PLAIN
};
const DIRTY_BIT: Kind = Kind {
    tracking: DirtyTracking::DirtyBit,
    ..PLAIN
};
const LARGE: Kind = Kind {
    level: Level::L2,
    ..PLAIN
};

impl<F: Walked, O: Operation> Shared<F, O> {
    fn new(kind: Kind) -> Result<Self, Error> {
        let backing = Backing {
            gfns: gfns(),
            pfn: HOST,
            level: Level::L1,
        };
        let mut setup = our_setup(backing, 1)?;
        setup.backing.level = kind.level;
        // For tables that are retired and not free yet.
        setup.frames *= 3;
        let guest = Ours::<F, O>::with(setup, Tables::Warm, kind.ad_bits, |builder| {
            builder.dirty_tracking(kind.tracking)
        })?;
        let vcpu = guest.worker()?;
        Ok(Self {
            guest,
            vcpu,
            order: kind.order.gfns(),
        })
    }

    fn touch(&mut self) -> Result<(), Error> {
        for gfn in &self.order {
            self.guest.resolve(&mut self.vcpu, black_box(*gfn))?;
        }
        Ok(())
    }

    fn batch(&mut self) -> Result<(), Error> {
        let mut batch = self.vcpu.batch().map_err(|e| Error::run("tdp", e))?;
        for gfn in &self.order {
            let fault = Fault::write(black_box(*gfn).address());
            match batch.fault(fault) {
                Ok(Outcome::Fixed { .. } | Outcome::Spurious) => {}
                other => return Err(Error::run("tdp", format!("{other:?}"))),
            }
        }
        Ok(())
    }

    fn prefault(&mut self) -> Result<(), Error> {
        self.vcpu
            .prefault(gfns(), Visibility::Shared)
            .map(drop)
            .map_err(|e| Error::run("tdp", e))
    }

    fn sweep<K: crate::sweeping::Kind>(&mut self) -> Result<(), Error> {
        self.guest.sweep::<K>(gfns())
    }

    /// All mapped and written, ready for a sweep.
    fn fill<K: crate::sweeping::Kind>(&mut self) -> Result<(), Error> {
        self.sweep::<Zap>()?;
        self.guest.prepare::<K>()?;
        self.touch()
    }

    fn empty(&mut self) -> Result<(), Error> {
        // The tables are there.
        self.touch()?;
        self.sweep::<Zap>()
    }

    fn without_tables(&mut self) -> Result<(), Error> {
        self.zap_tables()?;
        self.guest.mmu().synchronize();
        Ok(())
    }

    fn zap_tables(&mut self) -> Result<(), Error> {
        let everything = Gfn(0)..Level::L4.gfn_limit();
        self.guest.mmu().zap(SPACE, everything).flush();
        Ok(())
    }

    fn hot(
        name: &'static str,
        kind: Kind,
        operations: u64,
        prepare: Step<Self>,
        work: Step<Self>,
    ) -> Result<Hot, Error>
    where
        O: 'static,
    {
        let state = Self::new(kind)?;
        Ok(Hot {
            group: F::NAME,
            name,
            operations,
            work: Box::new(Job {
                state,
                prepare,
                work,
            }),
        })
    }
}

fn shared<F: Walked>() -> Result<Vec<Hot>, Error> {
    type Map<F> = Shared<F, BareMap>;
    type Whole<F> = Shared<F, WholeFault>;
    let tables = PAGES / Level::L2.pages();
    Ok(vec![
        Map::<F>::hot(
            "map, sequential",
            PLAIN,
            PAGES,
            |s| s.empty(),
            |s| s.touch(),
        )?,
        Whole::<F>::hot(
            "fault, sequential",
            PLAIN,
            PAGES,
            |s| s.empty(),
            |s| s.touch(),
        )?,
        Whole::<F>::hot("fault, random", RANDOM, PAGES, |s| s.empty(), |s| s.touch())?,
        Whole::<F>::hot(
            "fault in a batch",
            PLAIN,
            PAGES,
            |s| s.empty(),
            |s| s.batch(),
        )?,
        Whole::<F>::hot(
            "fault, no tables",
            PLAIN,
            PAGES,
            |s| s.without_tables(),
            |s| s.touch(),
        )?,
        Whole::<F>::hot(
            "fault, spurious",
            PLAIN,
            PAGES,
            |s| s.touch(),
            |s| s.touch(),
        )?,
        Whole::<F>::hot("prefault", PLAIN, PAGES, |s| s.empty(), |s| s.prefault())?,
        Whole::<F>::hot(
            "repair of write protection",
            PLAIN,
            PAGES,
            |s| s.touch().and_then(|()| s.sweep::<WriteProtect>()),
            |s| s.touch(),
        )?,
        Whole::<F>::hot(
            "repair of access tracking",
            SOFTWARE,
            PAGES,
            |s| s.touch().and_then(|()| s.sweep::<Track>()),
            |s| s.touch(),
        )?,
        Whole::<F>::hot(
            "zap, leaves",
            PLAIN,
            PAGES,
            |s| s.touch(),
            |s| s.sweep::<Zap>(),
        )?,
        Whole::<F>::hot(
            "zap, tables",
            PLAIN,
            PAGES,
            |s| s.touch(),
            |s| s.zap_tables(),
        )?,
        Whole::<F>::hot(
            "age",
            PLAIN,
            PAGES,
            |s| s.fill::<Age>(),
            |s| s.sweep::<Age>(),
        )?,
        Whole::<F>::hot(
            "age by tracking",
            SOFTWARE,
            PAGES,
            |s| s.fill::<Track>(),
            |s| s.sweep::<Track>(),
        )?,
        Whole::<F>::hot(
            "write protect",
            PLAIN,
            PAGES,
            |s| s.fill::<WriteProtect>(),
            |s| s.sweep::<WriteProtect>(),
        )?,
        Whole::<F>::hot(
            "clear dirty",
            DIRTY_BIT,
            PAGES,
            |s| s.fill::<ClearDirty>(),
            |s| s.sweep::<ClearDirty>(),
        )?,
        Whole::<F>::hot(
            "clear a log",
            PLAIN,
            PAGES,
            |s| s.fill::<ProtectMasks>(),
            |s| s.sweep::<ProtectMasks>(),
        )?,
        Whole::<F>::hot(
            "clear a log of dirty bits",
            DIRTY_BIT,
            PAGES,
            |s| s.fill::<ClearMasks>(),
            |s| s.sweep::<ClearMasks>(),
        )?,
        Whole::<F>::hot(
            "split",
            LARGE,
            tables,
            |s| s.fill::<Split>(),
            |s| s.sweep::<Split>(),
        )?,
        Whole::<F>::hot(
            "collapse",
            LARGE,
            tables,
            |s| s.fill::<Split>().and_then(|()| s.sweep::<Split>()),
            |s| s.sweep::<Collapse>(),
        )?,
    ])
}

/// A confidential guest on a module that does nothing.
struct Private {
    guest: Faulting<Null>,
    vcpu: GuestVcpu<Null>,
}

impl Private {
    fn new() -> Result<Self, Error> {
        let layout = Layout::new(PAGES, Level::L1, 1)
            .ok_or_else(|| Error::run("private guest", "too large"))?;
        let conditions = Conditions::new(Weather::default());
        let half = Touched::Half(Visibility::Private);
        let guest = Faulting::new(layout, half, NullOptions::default(), conditions)?;
        let vcpu = guest.worker()?;
        Ok(Self { guest, vcpu })
    }

    fn touch(&mut self) -> Result<(), Error> {
        for number in 0..PAGES {
            let gfn = Gfn(self.guest.guest().layout().gfns.start.0 + number);
            self.guest.resolve(&mut self.vcpu, black_box(gfn))?;
        }
        Ok(())
    }

    fn remove(&mut self) -> Result<(), Error> {
        self.guest.guest().remove_leaves(Level::L1)
    }

    fn hot(name: &'static str, prepare: Step<Self>, work: Step<Self>) -> Result<Hot, Error> {
        let state = Self::new()?;
        Ok(Hot {
            group: "private",
            name,
            operations: PAGES,
            work: Box::new(Job {
                state,
                prepare,
                work,
            }),
        })
    }
}

fn private() -> Result<Vec<Hot>, Error> {
    Ok(vec![
        Private::hot(
            "hand-off of a fault",
            |p| p.touch().and_then(|()| p.remove()),
            |p| p.touch(),
        )?,
        Private::hot("hand-off of a removal", |p| p.touch(), |p| p.remove())?,
    ])
}

/// A vCPU that enters a section and leaves it.
fn pin() -> Hot {
    let domain = Domain::<()>::new(DomainConfig::default());
    let work: Step<Reader> = |reader| {
        for _ in 0..PAGES {
            drop(black_box(reader.enter()));
        }
        Ok(())
    };
    Hot {
        group: "epoch",
        name: "pin",
        operations: PAGES,
        work: Box::new(Job {
            state: domain.reader(),
            prepare: |_| Ok(()),
            work,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweeping::Sweep;
    use std::collections::BTreeSet;

    #[test]
    fn every_order_has_every_page_once() {
        let all: Vec<_> = (0..PAGES).map(|n| Gfn(FIRST.0 + n)).collect();
        assert_eq!(Order::Sequential.gfns(), all);
        let mut random = Order::Random.gfns();
        let neighbours = random.windows(2).filter(|w| w[1].0 == w[0].0 + 1).count();
        assert!(neighbours < 16, "{neighbours}");
        random.sort_unstable();
        assert_eq!(random, all);
    }

    #[test]
    fn all_work_can_be_repeated_and_has_a_name_of_its_own() {
        let mut names = BTreeSet::new();
        for mut hot in all().unwrap() {
            assert!(names.insert((hot.group, hot.name)), "{}", hot.name);
            for _ in 0..2 {
                hot.work.prepare().unwrap();
                hot.work.work().unwrap();
            }
        }
    }

    /// Whether a sweep finds everything to do, and leaves nothing.
    fn sweeps<F: Walked, K: crate::sweeping::Kind>(kind: Kind) {
        let mut guest = Shared::<F, WholeFault>::new(kind).unwrap();
        guest.fill::<K>().unwrap();
        if K::SWEEP == Sweep::Collapse {
            guest.sweep::<Split>().unwrap();
        }
        assert_eq!(guest.guest.left::<K>(gfns()), PAGES, "{:?}", K::SWEEP);
        guest.sweep::<K>().unwrap();
        assert_eq!(guest.guest.left::<K>(gfns()), 0, "{:?}", K::SWEEP);
        if matches!(K::SWEEP, Sweep::WriteProtect | Sweep::Track) {
            guest.touch().unwrap();
            assert_eq!(guest.guest.left::<K>(gfns()), PAGES, "repair");
        }
    }

    fn all_sweeps<F: Walked>() {
        sweeps::<F, Zap>(PLAIN);
        sweeps::<F, Age>(PLAIN);
        sweeps::<F, Track>(SOFTWARE);
        sweeps::<F, WriteProtect>(PLAIN);
        sweeps::<F, ClearDirty>(DIRTY_BIT);
        sweeps::<F, ProtectMasks>(PLAIN);
        sweeps::<F, ClearMasks>(DIRTY_BIT);
        sweeps::<F, Split>(LARGE);
        sweeps::<F, Collapse>(LARGE);
    }

    #[test]
    fn work_has_something_to_do() {
        all_sweeps::<Ept>();
        all_sweeps::<Npt>();
    }
}
