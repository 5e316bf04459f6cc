//! The loop under every sweep that changes leaves in place.
//!
//! Protocol. [`TdpIter`] walks down to level 2; the leaves of a table of level 1 are gone through in one tight loop, on the
//! table that the entry led to when it was read. The sweep's closure is called for each leaf with the value last read; if
//! it loses an exchange it says what it found instead, and is called again for as long as that is a leaf. A large leaf
//! that was split meanwhile is gone through as the table that it has become. A frozen entry is waited for, because what its
//! owner puts there may be a leaf that was there before. A table that is unlinked meanwhile shows sealed entries: what
//! it held was taken away, and what stands in its place was installed by a fault after the sweep began.

use crate::entry::{EntryRef, TablePage};
use crate::event::Site;
use crate::host::Host;
use crate::iter::TdpIter;
use crate::mmu::Shared;
use crate::root::Root;
use crate::table;
use tdp_arch::{Format, Gfn, GfnRange, Level, Spte};
use tdp_rcu::Visit;

/// One leaf of a sweep.
#[derive(Clone, Copy)]
pub(crate) struct LeafStep<'w> {
    /// First guest frame.
    pub(crate) gfn: Gfn,
    pub(crate) level: Level,
    /// What the entry held when it was read last: a leaf.
    pub(crate) spte: Spte,
    pub(crate) entry: EntryRef<'w>,
}

impl LeafStep<'_> {
    /// The guest frames that it maps.
    pub(crate) fn range(&self) -> GfnRange {
        self.level.range(self.gfn)
    }
}

/// What a sweep says to a leaf.
pub(crate) enum Verdict {
    /// On to the next.
    Next,
    /// This was found instead.
    Again(Spte),
    /// The sweep is over.
    Stop,
}

impl From<Result<(), Spte>> for Verdict {
    /// Of an exchange.
    #[inline(always)]
    fn from(exchanged: Result<(), Spte>) -> Self {
        match exchanged {
            Ok(()) => Verdict::Next,
            Err(actual) => Verdict::Again(actual),
        }
    }
}

/// A set of guest frames: words of 64 bits from a first frame on.
#[derive(Clone, Copy)]
pub(crate) struct Marks<'a> {
    start: Gfn,
    words: &'a [u64],
}

impl<'a> Marks<'a> {
    /// Without the empty words at both ends; `None` if no frame is marked.
    pub(crate) fn new(start: Gfn, words: &'a [u64]) -> Option<Self> {
        let first = words.iter().position(|&word| word != 0)?;
        let last = words.iter().rposition(|&word| word != 0)?;
        Some(Self {
            start: Gfn(start.0 + first as u64 * 64),
            words: &words[first..=last],
        })
    }

    /// From the first word to the last.
    pub(crate) fn frames(&self) -> GfnRange {
        GfnRange {
            start: self.start,
            end: Gfn(self.start.0 + self.words.len() as u64 * 64),
        }
    }

    /// The marks of `part`, which lies within: for each word the frame of its first bit, and the bits.
    #[inline(always)]
    fn words_of(self, part: GfnRange) -> impl Iterator<Item = (Gfn, u64)> + 'a {
        let (from, to) = (part.start.0 - self.start.0, part.end.0 - self.start.0);
        (from / 64..to.div_ceil(64)).map(move |number| {
            let first = number * 64;
            let mut bits = self.words.get(number as usize).copied().unwrap_or(0);
            if first < from {
                bits &= u64::MAX << (from - first);
            }
            if to - first < 64 {
                bits &= (1 << (to - first)) - 1;
            }
            (Gfn(self.start.0 + first), bits)
        })
    }
}

impl<F: Format, H: Host> Shared<F, H> {
    /// Calls `see` for every leaf of `root` whose frames meet `range`, in order.
    #[inline]
    pub(crate) fn sweep_leaves(
        &self,
        visit: &mut Visit<'_>,
        root: &Root<H>,
        range: GfnRange,
        see: impl FnMut(LeafStep<'_>) -> Verdict,
    ) {
        self.sweep(visit, root, range, |_| true, sweep_table::<F>, see);
    }

    /// Calls `see` for every leaf of `root` that maps a marked frame of `range`, in order.
    #[inline]
    pub(crate) fn sweep_marked(
        &self,
        visit: &mut Visit<'_>,
        root: &Root<H>,
        range: GfnRange,
        marks: Marks<'_>,
        see: impl FnMut(LeafStep<'_>) -> Verdict,
    ) {
        let range = GfnRange {
            start: range.start.max(marks.frames().start),
            end: range.end.min(marks.frames().end),
        };
        let within = |covered: GfnRange| GfnRange {
            start: covered.start.max(range.start),
            end: covered.end.min(range.end),
        };
        self.sweep(
            visit,
            root,
            range,
            |covered| marks.words_of(within(covered)).any(|(_, bits)| bits != 0),
            |table, part, see| sweep_marked_table::<F>(table, part, marks, see),
            see,
        );
    }

    #[inline(always)]
    fn sweep<See: FnMut(LeafStep<'_>) -> Verdict>(
        &self,
        visit: &mut Visit<'_>,
        root: &Root<H>,
        range: GfnRange,
        wanted: impl Fn(GfnRange) -> bool,
        table_of_small: impl Fn(LeafTable<'_>, GfnRange, &mut See) -> bool,
        mut see: See,
    ) {
        let mut iter = TdpIter::<F, H>::new(visit, &self.host, root, range, Level::L2);
        while let Some(step) = iter.next() {
            let (gfn, level, entry) = (step.gfn, step.level, step.entry);
            let mut spte = entry.load_thawed::<F>();
            let mut looked_at = 0;
            loop {
                if F::is_leaf(spte, level) {
                    if !wanted(level.range(gfn)) {
                        break;
                    }
                    let leaf = LeafStep {
                        gfn,
                        level,
                        spte,
                        entry,
                    };
                    match see(leaf) {
                        Verdict::Next => {}
                        Verdict::Again(actual) if actual == F::FROZEN => {
                            spte = entry.load_thawed::<F>();
                            continue;
                        }
                        Verdict::Again(actual) => {
                            spte = actual;
                            continue;
                        }
                        Verdict::Stop => return,
                    }
                } else if level == Level::L2 && F::is_table(spte) {
                    let table = (
                        table::page(self.host.frames(), F::pfn(spte)),
                        Site::new(root.as_id, gfn, F::pfn(spte)),
                    );
                    let covered = level.range(gfn);
                    let part = GfnRange {
                        start: covered.start.max(range.start),
                        end: covered.end.min(range.end),
                    };
                    looked_at = part.pages() as u32;
                    if !table_of_small(table, part, &mut see) {
                        return;
                    }
                }
                break;
            }
            iter.spend(looked_at);
        }
    }
}

/// A table of level 1, and where its first entry is.
type LeafTable<'w> = (&'w TablePage, Site);

/// The leaves of one table of level 1. `false` if the sweep is over.
#[inline(always)]
fn sweep_table<F: Format>(
    table: LeafTable<'_>,
    part: GfnRange,
    see: &mut impl FnMut(LeafStep<'_>) -> Verdict,
) -> bool {
    (part.start.0..part.end.0).all(|number| sweep_small::<F>(table, Gfn(number), see))
}

/// Those of them that are marked.
#[inline(always)]
fn sweep_marked_table<F: Format>(
    table: LeafTable<'_>,
    part: GfnRange,
    marks: Marks<'_>,
    see: &mut impl FnMut(LeafStep<'_>) -> Verdict,
) -> bool {
    marks.words_of(part).all(|(first, mut bits)| {
        while bits != 0 {
            let gfn = Gfn(first.0 + u64::from(bits.trailing_zeros()));
            bits &= bits - 1;
            if !sweep_small::<F>(table, gfn, see) {
                return false;
            }
        }
        true
    })
}

/// The leaf of one frame in a table of level 1. `false` if the sweep is over.
#[inline(always)]
fn sweep_small<F: Format>(
    (page, site): LeafTable<'_>,
    gfn: Gfn,
    see: &mut impl FnMut(LeafStep<'_>) -> Verdict,
) -> bool {
    let level = Level::L1;
    // The bit that makes a frame shared lies above this level.
    let Some(entry) = page.get(level.index(gfn)) else {
        return true;
    };
    let entry = entry.at(site.of(gfn));
    let mut spte = entry.load();
    while F::is_leaf(spte, level) {
        let leaf = LeafStep {
            gfn,
            level,
            spte,
            entry,
        };
        match see(leaf) {
            Verdict::Next => break,
            Verdict::Again(actual) => spte = actual,
            Verdict::Stop => return false,
        }
    }
    true
}
