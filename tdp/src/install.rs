//! Installing a mapping: the walk from the root, and what it does at each kind of entry.
//!
//! Protocol. Acquire loads from the root to the goal level; at a hole a table from the vCPU's cache is exchanged in
//! (INV: publish-complete), at the goal the leaf. Whoever loses an exchange goes on with the value that won, for a bounded
//! number of times. What is met on the way:
//!
//! * *frozen*: wait locally, bounded, then `Retry` (INV: progress);
//! * *sealed*: the table was unlinked; walk again from the root;
//! * a leaf that permits the access: spurious; one that does not: widened in place, never narrowed;
//! * a larger leaf that does not permit the access: split into a table that translates alike, which needs no flush;
//! * a table where a larger leaf is to go: exchanged for the leaf, then sealed, flushed and retired by the winner, and the leaf
//!   gets the accessed and dirty bits that the seal finds (INV: volatile-atomic). One that stands there for a fetch ([`nx`])
//!   stays, and the leaf goes one level down; so does one below which something is permitted that the leaf would not permit,
//!   because a fault narrows nothing, and one that maps anything at all where nobody waits for the leaf. What is installed
//!   there after that look is taken away with the table, and comes back by its own fault.

use crate::entry::{self, EntryRef, TABLE_ENTRIES};
use crate::event::{self, Site};
use crate::fault::{Outcome, RetryReason};
use crate::host::Host;
use crate::nx;
use crate::range_zap::seal_subtree;
use crate::stats::{Stat, Tally};
use crate::table::{self, Place, TableCache, TableState};
use crate::tlb::PendingFlush;
use crate::vcpu::Context;
use tdp_arch::{Access, Format, Gfn, LeafAttrs, Level, Perms, Pfn, Spte};
use tdp_rcu::sync::Backoff;

/// Times that one fault starts over before the guest is asked to try again.
const RESTARTS: u32 = 16;

/// What is to be installed.
#[derive(Clone, Copy)]
pub(crate) struct Request {
    pub(crate) gfn: Gfn,
    pub(crate) goal: Level,
    /// What the goal would be if large leaves were executable.
    pub(crate) wanted: Level,
    /// Large leaves withhold fetches.
    pub(crate) withholds: bool,
    /// Host frame of `gfn`.
    pub(crate) frame: Pfn,
    pub(crate) attrs: LeafAttrs,
    pub(crate) access: Access,
    pub(crate) prefetch: bool,
}

impl Request {
    /// First host frame of the leaf of `level`.
    fn pfn(&self, level: Level) -> Pfn {
        Pfn(self.frame.0 & !(level.pages() - 1))
    }

    /// The leaf of `level` with `attrs`.
    fn leaf<F: Format>(&self, level: Level, attrs: LeafAttrs) -> Spte {
        nx::leaf::<F>(self.pfn(level), level, attrs, self.withholds)
    }

    /// The entry that is to point to a table below an entry of `level`.
    fn table<F: Format>(&self, pfn: Pfn, level: Level) -> Spte {
        let table = F::table(pfn);
        // No larger than wanted: without the policy there would be a leaf here.
        if self.goal < level && level <= self.wanted {
            nx::marked::<F>(table)
        } else {
            table
        }
    }
}

pub(crate) enum Next {
    /// To the table below.
    Descend(Pfn),
    /// Look at the same entry again.
    Again,
    /// Walk again from the root.
    Restart,
    Done(Outcome),
}

impl<F: Format, H: Host> Context<F, H> {
    #[cold]
    #[inline(never)]
    pub(crate) fn install(&self, cache: &mut TableCache, request: Request) -> Outcome {
        let mut has_split = false;
        let mut outcome = self.walk(request.gfn, |entry, level, old| {
            self.install_step(cache, request, entry, level, old, &mut has_split)
        });
        if has_split && outcome == Outcome::Spurious {
            // By what the large leaf withheld.
            outcome = Outcome::Fixed { level: Level::L1 };
        }
        self.count(outcome);
        outcome
    }

    /// Walks from the root and lets `step` decide at each entry, for a bounded number of steps.
    pub(crate) fn walk(
        &self,
        gfn: Gfn,
        mut step: impl FnMut(EntryRef<'_>, Level, Spte) -> Next,
    ) -> Outcome {
        let root = &*self.root;
        let (mut page, mut table) = (root.page(), root.pfn);
        let mut level = root.level;
        let mut restarts = 0;
        while restarts < RESTARTS {
            let Some(entry) = page.get(root.index(level, gfn)) else {
                break;
            };
            let entry = entry.at(Site::new(self.as_id, gfn, table));
            let old = entry.load();
            let next = if old == F::SEALED {
                if root.is_obsolete() {
                    return self.retry(RetryReason::RootObsolete);
                }
                Next::Restart
            } else if old == F::FROZEN {
                if !wait_while_frozen::<F>(entry) {
                    return self.retry(RetryReason::Frozen);
                }
                Next::Again
            } else {
                step(entry, level, old)
            };
            match next {
                Next::Done(outcome) => return outcome,
                Next::Again => restarts += 1,
                Next::Restart => {
                    restarts += 1;
                    (page, table) = (root.page(), root.pfn);
                    level = root.level;
                }
                Next::Descend(pfn) => {
                    table = pfn;
                    page = table::page(self.shared.host.frames(), pfn);
                    level = level.below_or_leaf();
                }
            }
        }
        self.retry(RetryReason::Raced)
    }

    fn install_step(
        &self,
        cache: &mut TableCache,
        request: Request,
        entry: EntryRef<'_>,
        level: Level,
        old: Spte,
        has_split: &mut bool,
    ) -> Next {
        let is_leaf = F::is_leaf(old, level);
        if is_leaf && (request.prefetch || F::allows(old, request.access)) {
            return Next::Done(Outcome::Spurious);
        }
        let is_table = !is_leaf && F::is_mmu_present(old);
        if level > request.goal {
            return match (is_leaf, is_table) {
                (true, _) => {
                    let next = self.split(cache, request, entry, level, old);
                    *has_split |= matches!(next, Next::Descend(_));
                    next
                }
                (_, true) => Next::Descend(F::pfn(old)),
                _ => {
                    let to = |pfn| request.table::<F>(pfn, level);
                    self.link(cache, entry, level, old, request.gfn, to)
                }
            };
        }
        if is_leaf {
            self.upgrade(request, entry, level, old)
        } else if is_table && request.withholds && nx::is_marked::<F>(old, level) {
            // The guest fetches somewhere below: a smaller leaf instead.
            Next::Descend(F::pfn(old))
        } else if is_table {
            let permitted = F::perms(F::leaf(
                Pfn(0),
                Level::L1,
                LeafAttrs::memory(request.attrs.perms),
            ));
            if self.has_more(&request, permitted, F::pfn(old), level, request.pfn(level)) {
                return Next::Descend(F::pfn(old));
            }
            self.collapse(request, entry, level, old)
        } else {
            let leaf = request.leaf::<F>(level, request.attrs);
            match entry::exchange::<F>(entry, level, old, leaf, self) {
                Ok(()) => {
                    event::set_spte(entry.site(), level, leaf);
                    Next::Done(Outcome::Fixed { level })
                }
                Err(_) => Next::Again,
            }
        }
    }

    /// Links an empty table by the entry that `to` makes of its frame.
    pub(crate) fn link(
        &self,
        cache: &mut TableCache,
        entry: EntryRef<'_>,
        level: Level,
        old: Spte,
        gfn: Gfn,
        to: impl FnOnce(Pfn) -> Spte,
    ) -> Next {
        let (Some(below), Some(pfn)) = (level.below(), cache.pop()) else {
            return Next::Done(self.retry(RetryReason::Raced));
        };
        self.shared.meta.link(
            pfn,
            Place {
                as_id: self.as_id,
                private: false,
                level: below,
                gfn: level.align_down(gfn),
            },
        );
        match entry::exchange::<F>(entry, level, old, to(pfn), self) {
            Ok(()) => Next::Descend(pfn),
            Err(_) => {
                self.shared.meta.set_state(pfn, TableState::Spare);
                cache.push(pfn);
                Next::Again
            }
        }
    }

    /// Replaces a large leaf by a table of leaves that translate alike.
    fn split(
        &self,
        cache: &mut TableCache,
        request: Request,
        entry: EntryRef<'_>,
        level: Level,
        old: Spte,
    ) -> Next {
        let (Some(below), Some(pfn)) = (level.below(), cache.pop()) else {
            return Next::Done(self.retry(RetryReason::Raced));
        };
        let page = table::page(self.shared.host.frames(), pfn);
        let (first, step) = nx::children::<F>(old, level);
        page.fill(first, step);
        self.shared.meta.link(
            pfn,
            Place {
                as_id: self.as_id,
                private: false,
                level: below,
                gfn: level.align_down(request.gfn),
            },
        );
        // The whole old value is compared: a bit that the processor set after the children were made fails this.
        let table = request.table::<F>(pfn, level);
        match entry::exchange::<F>(entry, level, old, table, self) {
            Ok(()) => {
                self.add(Stat::pages(below), TABLE_ENTRIES as i64);
                self.add(Stat::Splits, 1);
                Next::Descend(pfn)
            }
            Err(_) => {
                page.empty::<F>();
                self.shared.meta.set_state(pfn, TableState::Spare);
                cache.push(pfn);
                Next::Again
            }
        }
    }

    /// Widens the permissions of a leaf, or takes it away if it maps another page.
    fn upgrade(&self, request: Request, entry: EntryRef<'_>, level: Level, old: Spte) -> Next {
        if F::leaf_pfn(old, level) != request.pfn(level) {
            // The backing changed without an invalidation: break before make.
            let mut pending = PendingFlush::new(&self.shared);
            if entry::exchange::<F>(entry, level, old, F::EMPTY, self).is_ok() {
                let gfn = level.align_down(request.gfn);
                self.shared.keep_dirty(self.as_id, gfn, level, old);
                pending.note(self.as_id, level.range(request.gfn), false);
                pending.flush();
            }
            return Next::Again;
        }
        // A fault never narrows: what the old leaf permitted stays, and so do its accessed and dirty bits.
        let shown = if F::is_access_tracked(old) {
            F::restore_access_tracked(old)
        } else {
            old
        };
        let mut attrs = request.attrs;
        attrs.perms = attrs.perms.union(F::perms(shown));
        attrs.host_writable |= old.0 & F::HOST_WRITABLE != 0;
        attrs.mmu_writable |= old.0 & F::MMU_WRITABLE != 0;
        let leaf = request.leaf::<F>(level, attrs);
        let leaf = Spte(leaf.0 | old.0 & (F::ACCESSED | F::DIRTY));
        match entry::exchange::<F>(entry, level, old, leaf, self) {
            Ok(()) => {
                self.add(Stat::Upgrades, 1);
                event::set_spte(entry.site(), level, leaf);
                Next::Done(Outcome::Fixed { level })
            }
            Err(_) => Next::Again,
        }
    }

    /// Whether there is something below a table that a leaf for `pfn` in its entry of `level` must not take away:
    /// permissions beyond `permitted`, or, where nobody waits for the leaf, any leaf.
    #[cold]
    fn has_more(
        &self,
        request: &Request,
        permitted: Perms,
        table: Pfn,
        level: Level,
        pfn: Pfn,
    ) -> bool {
        let Some(below) = level.below() else {
            return false;
        };
        let page = table::page(self.shared.host.frames(), table);
        let mut index = 0;
        while let Some(spte) = page.get(index).map(EntryRef::load) {
            let part = Pfn(pfn.0 + index as u64 * below.pages());
            let keeps = if F::is_leaf(spte, below) {
                let shown = nx::unrestricted::<F>(spte);
                let narrows = !permitted.contains(F::perms(shown))
                    || (shown.0 & F::MMU_WRITABLE != 0 && !request.attrs.mmu_writable);
                // Another page is no longer the guest's: its backing has changed.
                request.prefetch || (narrows && F::leaf_pfn(spte, below) == part)
            } else {
                F::is_mmu_present(spte)
                    && self.has_more(request, permitted, F::pfn(spte), below, part)
            };
            if keeps {
                return true;
            }
            index += 1;
        }
        false
    }

    /// Replaces a table by one large leaf.
    fn collapse(&self, request: Request, entry: EntryRef<'_>, level: Level, old: Spte) -> Next {
        let leaf = request.leaf::<F>(level, request.attrs);
        let mut pending = PendingFlush::new(&self.shared);
        if entry::exchange::<F>(entry, level, old, leaf, self).is_err() {
            return Next::Again;
        }
        let Some(below) = level.below() else {
            return Next::Again;
        };
        let harvest = seal_subtree::<F, H>(&self.shared, F::pfn(old), below, self, &mut pending);
        self.shared
            .inherit(entry, level, request.pfn(level), harvest);
        pending.note(self.as_id, level.range(request.gfn), true);
        pending.flush();
        self.add(Stat::Collapses, 1);
        event::set_spte(entry.site(), level, leaf);
        Next::Done(Outcome::Fixed { level })
    }
}

/// Waits, bounded, for the owner of a frozen entry. `false` if it is still frozen.
fn wait_while_frozen<F: Format>(entry: EntryRef<'_>) -> bool {
    let backoff = Backoff::new();
    while entry.load() == F::FROZEN {
        if backoff.is_completed() {
            return false;
        }
        backoff.snooze();
    }
    true
}
