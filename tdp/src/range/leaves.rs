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
use crate::host::{AddressSpaceId, Host};
use crate::iter::TdpIter;
use crate::mmu::Shared;
use crate::root::Root;
use crate::table;
use tdp_arch::{Format, Gfn, GfnRange, Level, Pfn, Spte};
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

impl<F: Format, H: Host> Shared<F, H> {
    /// Calls `see` for every leaf of `root` whose frames meet `range`, in order.
    #[inline]
    pub(crate) fn sweep_leaves(
        &self,
        visit: &mut Visit<'_>,
        root: &Root<H>,
        range: GfnRange,
        mut see: impl FnMut(LeafStep<'_>) -> Verdict,
    ) {
        let mut iter = TdpIter::<F, H>::new(visit, &self.host, root, range, Level::L2);
        while let Some(step) = iter.next() {
            let (gfn, level, entry) = (step.gfn, step.level, step.entry);
            let mut spte = entry.load_thawed::<F>();
            let mut looked_at = 0;
            loop {
                if F::is_leaf(spte, level) {
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
                    let table = (root.as_id, F::pfn(spte));
                    let page = table::page(self.host.frames(), F::pfn(spte));
                    let covered = level.range(gfn);
                    let part = GfnRange {
                        start: covered.start.max(range.start),
                        end: covered.end.min(range.end),
                    };
                    looked_at = part.pages() as u32;
                    if !sweep_table::<F>(page, table, part, &mut see) {
                        return;
                    }
                }
                break;
            }
            iter.spend(looked_at);
        }
    }
}

/// The leaves of one table of level 1. `false` if the sweep is over.
#[inline(always)]
fn sweep_table<F: Format>(
    page: &TablePage,
    (as_id, table): (AddressSpaceId, Pfn),
    part: GfnRange,
    see: &mut impl FnMut(LeafStep<'_>) -> Verdict,
) -> bool {
    let level = Level::L1;
    for number in part.start.0..part.end.0 {
        let gfn = Gfn(number);
        // The bit that makes a frame shared lies above this level.
        let Some(entry) = page.get(level.index(gfn)) else {
            break;
        };
        let entry = entry.at(Site::new(as_id, gfn, table));
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
    }
    true
}
