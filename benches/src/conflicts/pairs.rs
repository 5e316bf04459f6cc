//! The pairs of operations, each on two parts of one guest that are far from each other.
//!
//! "Far" is what a guest makes of it: other pages of one leaf table, another leaf table, or another GiB. In one leaf table the
//! two sides are half a table apart.

use super::child::TURNS;
use crate::baseline::Setup;
use crate::baseline::host::Backing;
use crate::baseline::mutex::OneMutex;
use crate::baseline::rwlock::ReaderWriter;
use crate::baseline::table_lock::TableLock;
use crate::confidential::backend::{Null, NullOptions};
use crate::confidential::conditions::{Conditions, Weather};
use crate::confidential::faulting::{Faulting, Touched};
use crate::confidential::layout::Layout;
use crate::ours::{OurSetup, Ours, POOL_BASE, Tables, WholeFault};
use crate::race::Contender;
use crate::report::Error;
use crate::sweeping::SPACE;
use std::sync::Arc;
use tdp::{FrameSource, Host, SlotFlags, Visibility};
use tdp_arch::{Ept, Gfn, GfnRange, Level, PAGE_SIZE, Pfn};

/// Operations of a turn, as far as they are of one page.
const BATCH: u64 = 8;
/// Frames of a GiB, and of a leaf table.
const GIB: u64 = 1 << 18;
const TABLE: u64 = 512;
/// Table frames of each guest.
const FRAMES: usize = 2048;
/// The name under which single faults with everything in place are traced.
pub(super) const ONE_FAULT: &str = "one fault";
/// How the faults of a contender are named, by its own name.
pub(crate) fn faults_of(contender: &str) -> String {
    format!("faults, {contender}")
}

type Shared = Arc<Ours<Ept, WholeFault>>;
type Private = Arc<Faulting<Null>>;

/// What one side does.
pub(super) trait Part: Send {
    /// What has to be there for turn `number`. Not traced.
    fn prepare(&mut self, number: u64) -> Result<(), Error>;
    /// Turn `number`.
    fn act(&mut self, number: u64) -> Result<(), Error>;
}

/// Two sides of one guest.
pub(super) struct Pair {
    pub(super) name: String,
    /// First and last byte of its tables.
    pub(super) tables: Option<(u64, u64)>,
    pub(super) first: Box<dyn Part>,
    pub(super) second: Option<Box<dyn Part>>,
}

/// A side that resolves faults.
struct Faults<C: Contender> {
    guest: Arc<C>,
    vcpu: C::Worker,
    start: u64,
    stride: u64,
    batch: u64,
}

impl<C: Contender + Send + Sync> Part for Faults<C> {
    fn prepare(&mut self, _number: u64) -> Result<(), Error> {
        Ok(())
    }

    fn act(&mut self, number: u64) -> Result<(), Error> {
        for n in number * self.batch..(number + 1) * self.batch {
            self.guest
                .resolve(&mut self.vcpu, Gfn(self.start + n * self.stride))
                .map_err(Into::into)?;
        }
        Ok(())
    }
}

fn faults<C: Contender + Send + Sync + 'static>(
    guest: &Arc<C>,
    start: u64,
    stride: u64,
    batch: u64,
) -> Result<Box<dyn Part>, Error> {
    Ok(Box::new(Faults {
        vcpu: guest.worker()?,
        guest: guest.clone(),
        start,
        stride,
        batch,
    }))
}

/// A side that does something to pages that it has mapped itself, other ones each turn.
struct Sweep<C: Contender, S> {
    guest: Arc<C>,
    vcpu: C::Worker,
    start: u64,
    sweep: S,
}

impl<C: Contender + Send + Sync, S> Sweep<C, S> {
    /// The frames of a turn: a leaf table's, of which the first 64 are mapped.
    fn frames(&self, number: u64) -> GfnRange {
        let start = self.start + number * TABLE;
        GfnRange {
            start: Gfn(start),
            end: Gfn(start + TABLE),
        }
    }
}

impl<C, S> Part for Sweep<C, S>
where
    C: Contender + Send + Sync,
    S: FnMut(&C, GfnRange) -> Result<(), Error> + Send,
{
    fn prepare(&mut self, number: u64) -> Result<(), Error> {
        let start = self.frames(number).start.0;
        for gfn in start..start + 64 {
            self.guest
                .resolve(&mut self.vcpu, Gfn(gfn))
                .map_err(Into::into)?;
        }
        Ok(())
    }

    fn act(&mut self, number: u64) -> Result<(), Error> {
        let frames = self.frames(number);
        (self.sweep)(&self.guest, frames)
    }
}

fn sweep<C: Contender + Send + Sync + 'static>(
    guest: &Arc<C>,
    start: u64,
    sweep: impl FnMut(&C, GfnRange) -> Result<(), Error> + Send + 'static,
) -> Result<Option<Box<dyn Part>>, Error> {
    Ok(Some(Box::new(Sweep {
        vcpu: guest.worker()?,
        guest: guest.clone(),
        start,
        sweep,
    })))
}

const BACKING: Backing = Backing {
    gfns: GfnRange {
        start: Gfn(0),
        end: Gfn(8 * GIB),
    },
    pfn: Pfn(1 << 30),
    level: Level::L1,
};

fn shared() -> Result<Shared, Error> {
    let setup = OurSetup {
        backing: BACKING,
        root: Level::L4,
        frames: FRAMES,
        huge: false,
    };
    Ok(Arc::new(Ours::new(setup, Tables::Warm)?))
}

/// First and last byte of the tables of a guest.
fn tables(frames: &impl FrameSource) -> Option<(u64, u64)> {
    let first = frames.page(POOL_BASE).as_ptr().addr() as u64;
    Some((first, first + FRAMES as u64 * PAGE_SIZE - 1))
}

fn private() -> Result<Private, Error> {
    let layout = Layout::new(8 * GIB, Level::L1, 2)
        .ok_or_else(|| Error::run("a confidential guest", "does not fit"))?;
    let touched = Touched::Half(Visibility::Private);
    let calm = Conditions::new(Weather::default());
    Ok(Arc::new(Faulting::new(
        layout,
        touched,
        NullOptions::default(),
        calm,
    )?))
}

/// Every pair.
pub(super) fn all() -> Result<Vec<Pair>, Error> {
    let mut pairs = Vec::new();
    let far = 4 * GIB;
    // One guest a pair: what one leaves behind is in no other's way.
    let mut of_shared = |name: &str, make: &dyn Fn(&Shared) -> Result<Sides, Error>| {
        let guest = shared()?;
        let (first, second) = make(&guest)?;
        pairs.push(Pair {
            name: name.to_owned(),
            tables: tables(guest.mmu().host().frames()),
            first,
            second,
        });
        Ok::<(), Error>(())
    };
    of_shared(ONE_FAULT, &|guest| Ok((faults(guest, 0, 1, 1)?, None)))?;
    of_shared("fault x fault, same leaf table", &|guest| {
        Ok((
            faults(guest, 0, 1, BATCH)?,
            Some(faults(guest, TABLE / 2, 1, BATCH)?),
        ))
    })?;
    of_shared("fault x fault, another leaf table", &|guest| {
        Ok((
            faults(guest, 0, 1, BATCH)?,
            Some(faults(guest, TABLE, 1, BATCH)?),
        ))
    })?;
    of_shared("fault x fault, tables allocated on both", &|guest| {
        Ok((
            faults(guest, 0, TABLE, BATCH)?,
            Some(faults(guest, far, TABLE, BATCH)?),
        ))
    })?;
    of_shared("fault x age", &|guest| {
        let age = |guest: &Ours<Ept, WholeFault>, frames| {
            let _ = guest.mmu().age(SPACE, frames);
            Ok(())
        };
        Ok((faults(guest, 0, 1, BATCH)?, sweep(guest, far, age)?))
    })?;
    of_shared("fault x clear-dirty", &|guest| {
        let id = guest
            .mmu()
            .slots()
            .find(SPACE, Gfn(0))
            .map(|slot| slot.id());
        let id = id.ok_or_else(|| Error::run("the slot", "is not there"))?;
        let flags = SlotFlags::LOG_DIRTY | SlotFlags::LOG_MANUAL;
        let failed = |e: tdp::SlotError| Error::run("the slot", e);
        guest
            .mmu()
            .slots()
            .set_flags(SPACE, id, flags)
            .map_err(failed)?;
        let clear = move |guest: &Ours<Ept, WholeFault>, frames: GfnRange| {
            let failed = |e: tdp::DirtyLogError| Error::run("the log", e);
            let log = guest.mmu().dirty_log(SPACE, id).map_err(failed)?;
            let pending = log.clear(frames.start.0, &[u64::MAX]).map_err(failed)?;
            let _ = pending.flush();
            Ok(())
        };
        Ok((faults(guest, 0, 1, BATCH)?, sweep(guest, far, clear)?))
    })?;
    of_shared("fault x zap of leaves", &|guest| {
        let zap = |guest: &Ours<Ept, WholeFault>, frames| {
            let _ = guest.mmu().zap_leaves(SPACE, frames).flush();
            Ok(())
        };
        Ok((faults(guest, 0, 1, BATCH)?, sweep(guest, far, zap)?))
    })?;
    of_shared("fault x zap of a table", &|guest| {
        let zap = |guest: &Ours<Ept, WholeFault>, frames| {
            let _ = guest.mmu().zap(SPACE, frames).flush();
            Ok(())
        };
        Ok((faults(guest, 0, 1, BATCH)?, sweep(guest, far, zap)?))
    })?;
    of_shared("fault x invalidation", &|guest| {
        let invalidate = |guest: &Ours<Ept, WholeFault>, frames| {
            let invalidation = guest.mmu().invalidate_begin(SPACE, frames);
            let flushed = invalidation.zap().flush();
            invalidation.end(flushed);
            Ok(())
        };
        Ok((faults(guest, 0, 1, BATCH)?, sweep(guest, far, invalidate)?))
    })?;
    of_shared("slot read x fault", &|guest| {
        Ok(((read(guest)?), Some(faults(guest, far, 1, BATCH)?)))
    })?;
    of_shared("slot read x zap of leaves", &|guest| {
        let zap = |guest: &Ours<Ept, WholeFault>, frames| {
            let _ = guest.mmu().zap_leaves(SPACE, frames).flush();
            Ok(())
        };
        Ok((read(guest)?, sweep(guest, far, zap)?))
    })?;
    let mut of_private = |name: &str, make: &dyn Fn(&Private) -> Result<Sides, Error>| {
        let guest = private()?;
        let (first, second) = make(&guest)?;
        pairs.push(Pair {
            name: name.to_owned(),
            tables: tables(guest.guest().mmu().host().frames()),
            first,
            second,
        });
        Ok::<(), Error>(())
    };
    let base = Gfn(GIB).0;
    of_private("private fault x private fault, same leaf table", &|guest| {
        Ok((
            faults(guest, base, 1, BATCH)?,
            Some(faults(guest, base + TABLE / 2, 1, BATCH)?),
        ))
    })?;
    of_private(
        "private fault x private fault, another leaf table",
        &|guest| {
            Ok((
                faults(guest, base, 1, BATCH)?,
                Some(faults(guest, base + TABLE, 1, BATCH)?),
            ))
        },
    )?;
    of_private("hand-off x hand-off, tables linked on both", &|guest| {
        Ok((
            faults(guest, base, TABLE, BATCH)?,
            Some(faults(guest, base + far, TABLE, BATCH)?),
        ))
    })?;
    of_private("private fault x conversion", &|guest| {
        let convert = |guest: &Faulting<Null>, frames| {
            let shared = Visibility::Shared;
            let converted = guest.guest().mmu().convert(SPACE, frames, shared);
            let _ = converted.map_err(|e| Error::run("conversion", e))?;
            Ok(())
        };
        Ok((
            faults(guest, base, 1, BATCH)?,
            sweep(guest, base + far, convert)?,
        ))
    })?;
    Ok(pairs)
}

type Sides = (Box<dyn Part>, Option<Box<dyn Part>>);

/// A side that looks slots up, as its vCPU does for memory that is mapped already.
fn read(guest: &Shared) -> Result<Box<dyn Part>, Error> {
    // The same pages each turn: nothing is installed, the slot is read.
    Ok(Box::new(Again(Faults {
        vcpu: guest.worker()?,
        guest: guest.clone(),
        start: 0,
        stride: 1,
        batch: BATCH,
    })))
}

struct Again<C: Contender>(Faults<C>);

impl<C: Contender + Send + Sync> Part for Again<C> {
    fn prepare(&mut self, _number: u64) -> Result<(), Error> {
        Ok(())
    }

    fn act(&mut self, _number: u64) -> Result<(), Error> {
        self.0.act(0)
    }
}

/// Single faults of two vCPUs, of the library and of the baselines: each on tables of its own that are there.
pub(super) fn faults_of_all() -> Result<Vec<Pair>, Error> {
    let small = Backing {
        gfns: GfnRange {
            start: Gfn(0),
            end: Gfn(4 * TABLE),
        },
        ..BACKING
    };
    let setup = Setup {
        backing: small,
        huge: false,
    };
    fn pair<C: Contender + Send + Sync + 'static>(
        name: &str,
        guest: Arc<C>,
    ) -> Result<Pair, Error> {
        Ok(Pair {
            name: faults_of(name),
            tables: None,
            first: faults(&guest, 0, 1, 1)?,
            second: Some(faults(&guest, 2 * TABLE, 1, 1)?),
        })
    }
    const { assert!(TURNS < TABLE) };
    Ok(vec![
        pair("tdp", shared()?)?,
        pair("rwlock", Arc::new(ReaderWriter::<Ept, 4>::new(&setup)?))?,
        pair("table-lock", Arc::new(TableLock::<Ept, 4>::new(&setup)?))?,
        pair("mutex", Arc::new(OneMutex::<Ept, 4>::new(&setup)?))?,
    ])
}
