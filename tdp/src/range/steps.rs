//! Long work in bounded steps, by one thread or by many.
//!
//! Protocol. A sweep of a range is the same as sweeps of its parts, one after the other or side by side: none of them holds
//! anything from one entry to the next. [`Steps`] cuts a range into parts at multiples of a step, which are multiples of what a
//! table of level 1 covers, so that two parts have no leaf table in common. It says which part is next and nothing else, so
//! it can be kept, and gone on with later, whatever happened to the tables meanwhile; between two parts nothing
//! is held, neither a lock nor a grace period.
//!
//! One thing parts do not do: a sweep of a range takes tables away that lie wholly in *it*, and a table above the size of a
//! step lies in no part. [`Steps::with_upper_tables`] adds passes whose steps are 512 times as long each, up to one over the
//! whole range. What lies below was taken away by the pass before, so that a step of them is no longer than one of the
//! first.
//!
//! What the parts come to is put together by [`Absorb`]: the flushes of all become one flush.

use crate::host::Host;
use crate::range::convert::ConvertError;
use crate::range::private_sweep::Removed;
use crate::tlb::PendingFlush;
use core::ops::ControlFlow;
use tdp_arch::{Format, Gfn, GfnRange, Level};

/// What a sweep of a part of a range comes to, and how the parts' become the whole's.
pub trait Absorb {
    /// Takes over what another part came to.
    fn absorb(&mut self, other: Self);
}

impl Absorb for () {
    fn absorb(&mut self, (): Self) {}
}

impl Absorb for bool {
    /// Whether any part says yes: as for [`Mmu::age`](crate::Mmu::age).
    fn absorb(&mut self, other: Self) {
        *self |= other;
    }
}

impl Absorb for u64 {
    /// The sum.
    fn absorb(&mut self, other: Self) {
        *self = self.saturating_add(other);
    }
}

impl<F: Format, H: Host> Absorb for PendingFlush<'_, F, H> {
    fn absorb(&mut self, other: Self) {
        PendingFlush::absorb(self, other);
    }
}

impl Absorb for Removed {
    fn absorb(&mut self, other: Self) {
        self.frames += other.frames;
        self.tables += other.tables;
        self.leaked += other.leaked;
    }
}

impl Absorb for Result<Removed, ConvertError> {
    /// Fails if a part did, with the first failure and with all that was removed.
    fn absorb(&mut self, other: Self) {
        use ConvertError::Removal;
        let failed = match (&mut *self, other) {
            (Ok(removed), Ok(more)) => return removed.absorb(more),
            (Err(Removal(error)), Ok(more)) => return error.removed.absorb(more),
            (Err(Removal(error)), Err(Removal(more))) => {
                error.failed += more.failed;
                return error.removed.absorb(more.removed);
            }
            (Ok(removed), Err(Removal(mut error))) => {
                error.removed.absorb(*removed);
                Removal(error)
            }
            // What was asked for cannot be, the same for every part.
            (Ok(_), Err(error)) => error,
            (Err(_), _) => return,
        };
        *self = Err(failed);
    }
}

/// How far a sweep in steps has come, in frames of all passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Frames gone over.
    pub done: u64,
    /// Frames to be gone over in all.
    pub total: u64,
}

/// A range cut into parts that a sweep goes over one by one: a cursor that can be kept and gone on with.
///
/// ```
/// # use tdp::{Ept, Gfn, Mmu, MmapPool, Pfn, PoolConfig, SoftwareHost};
/// use core::ops::ControlFlow;
/// use tdp::{AddressSpaceId, Steps};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let frames = MmapPool::new(PoolConfig { frames: 64, base: Pfn(0x1000), huge_pages: false })?;
/// # let mmu = Mmu::<Ept, _>::builder(SoftwareHost::new(frames)).build()?;
///
/// let space = AddressSpaceId(0);
/// // A zap of a tebibyte, a gibibyte at a time; one flush for all of it.
/// let mut steps = Steps::new(Gfn(0)..Gfn(1 << 28), 1 << 18).with_upper_tables();
/// let pending = steps.run(
///     |part| mmu.zap(space, part),
///     |progress| {
///         println!("{} of {} frames", progress.done, progress.total);
///         ControlFlow::Continue(())
///     },
/// );
/// pending.map(|pending| pending.flush());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing is done before the steps are taken"]
pub struct Steps {
    range: GfnRange,
    /// Frames of a step of this pass, a power of two.
    step: u64,
    next: Gfn,
    upper_tables: bool,
    progress: Progress,
}

impl Steps {
    /// Cuts `range` at multiples of `frames`, rounded up to a power of two and to 512.
    pub fn new(range: impl Into<GfnRange>, frames: u64) -> Self {
        let range = range.into();
        let least = Level::L2.pages();
        let most = 1 << 52;
        Self {
            range,
            step: frames.clamp(least, most).next_power_of_two(),
            next: range.start,
            upper_tables: false,
            progress: Progress {
                done: 0,
                total: range.pages(),
            },
        }
    }

    /// Goes over the range again in longer and longer steps, for sweeps that take tables away: [`Mmu::zap`](crate::Mmu::zap),
    /// [`Mmu::zap_private`](crate::Mmu::zap_private). Called before the first step.
    pub fn with_upper_tables(mut self) -> Self {
        self.upper_tables = true;
        let (mut passes, mut step) = (1, self.step);
        while !self.is_one_step(step) {
            step = longer(step);
            passes += 1;
        }
        self.progress.total = self.range.pages().saturating_mul(passes);
        self
    }

    /// How far it has come.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// Whether nothing is left.
    pub fn is_done(&self) -> bool {
        self.next >= self.range.end && !self.has_another_pass()
    }

    /// Sweeps part by part until all is done or `report`, which is called after each, says that it is enough for now. Call
    /// it again to go on. Returns what the parts of this call came to, or `None` if there was none.
    pub fn run<R: Absorb>(
        &mut self,
        mut sweep: impl FnMut(GfnRange) -> R,
        mut report: impl FnMut(Progress) -> ControlFlow<()>,
    ) -> Option<R> {
        let mut whole = None;
        while let Some(part) = self.next() {
            add(&mut whole, sweep(part));
            if report(self.progress).is_break() {
                break;
            }
        }
        whole
    }

    /// The same with the parts of a pass side by side, on the threads of the current rayon pool: some parts at a time,
    /// after which `report` is called.
    #[cfg(feature = "rayon")]
    pub fn run_parallel<R: Absorb + Send>(
        &mut self,
        sweep: impl Fn(GfnRange) -> R + Sync,
        mut report: impl FnMut(Progress) -> ControlFlow<()>,
    ) -> Option<R> {
        use rayon::iter::{IntoParallelIterator, ParallelIterator};
        // Enough that a part which takes longer than the others does not hold all threads up.
        let parts_at_a_time = 8 * rayon::current_num_threads();
        let mut whole = None;
        while let Some(first) = self.next() {
            let mut parts = alloc::vec![first];
            parts.extend(core::iter::from_fn(|| self.next_of_pass()).take(parts_at_a_time - 1));
            let come_to = parts
                .into_par_iter()
                .map(&sweep)
                .reduce_with(|mut some, more| {
                    some.absorb(more);
                    some
                });
            if let Some(some) = come_to {
                add(&mut whole, some);
            }
            if report(self.progress).is_break() {
                break;
            }
        }
        whole
    }

    fn is_one_step(&self, step: u64) -> bool {
        let last = self.range.end.0.saturating_sub(1).max(self.range.start.0);
        self.range.start.0 / step == last / step
    }

    fn has_another_pass(&self) -> bool {
        self.upper_tables && !self.range.is_empty() && !self.is_one_step(self.step)
    }

    fn next_of_pass(&mut self) -> Option<GfnRange> {
        let start = self.next;
        if start >= self.range.end {
            return None;
        }
        // Past the end of the number space there is no next multiple.
        let end = (start.0 | (self.step - 1)).saturating_add(1);
        let end = Gfn(end.min(self.range.end.0));
        self.next = end;
        let part = GfnRange { start, end };
        self.progress.done = self.progress.done.saturating_add(part.pages());
        Some(part)
    }
}

fn add<R: Absorb>(whole: &mut Option<R>, part: R) {
    match whole {
        Some(whole) => whole.absorb(part),
        None => *whole = Some(part),
    }
}

/// Steps of the next pass.
const fn longer(step: u64) -> u64 {
    step.saturating_mul(512)
}

impl Iterator for Steps {
    type Item = GfnRange;

    /// The next part.
    fn next(&mut self) -> Option<GfnRange> {
        self.next_of_pass().or_else(|| {
            if !self.has_another_pass() {
                return None;
            }
            self.step = longer(self.step);
            self.next = self.range.start;
            self.next_of_pass()
        })
    }
}

impl core::iter::FusedIterator for Steps {}
