//! Installing private memory: each change of the private table is handed to the protected one.
//!
//! Protocol. The walk is that of `install.rs`, in the private tree. What changes an entry is a *hand-off*: exchange the old
//! value for *frozen*, call the hook, publish the new value on success, put the old one back on failure
//! (INV: frozen-owns). A table is linked by a hand-off on its parent's entry before anything below it can be found
//! (INV: parent-before-child), so no call ever walks to a parent that the module does not have yet.
//!
//! Whoever meets a frozen entry holds nothing frozen itself and does not wait here: it says so
//! ([`Step::Wait`]), leaves its critical section, waits outside, and walks again. Inside, a stall would hold up every
//! grace period; outside, it holds up nobody (INV: progress).
//!
//! What a walk meets besides:
//!
//! * a *blocked* leaf or table: a removal that was begun and could not be finished. Whoever needs the entry takes the block
//!   back, by a hand-off as well, from outside the critical section because that takes a ticket;
//! * a larger leaf than the guest may have here: it is split, from outside as well.

use crate::entry::{EntryRef, TablePage};
use crate::fault::{MemoryFault, Outcome, RetryReason};
use crate::frozen::{EntryPlace, FrozenEntry};
use crate::host::Host;
use crate::protected::{
    Caller, Content, HandOffCause, HandOffError, HandOffStep, Patience, ProtectedTable,
};
use crate::root::Root;
use crate::stats::{Stat, Tally};
use crate::table::{self, Place, TableCache, TableState};
use crate::vcpu::Context;
use tdp_arch::{Format, Gfn, LeafAttrs, Level, Perms, Pfn, Spte};

/// Times that one walk starts over before it is given up for now.
const RESTARTS: u32 = 16;

/// What is to be installed.
#[derive(Clone, Copy)]
pub(crate) struct PrivateRequest {
    pub(crate) gfn: Gfn,
    /// Level that alignment, slot, attributes and backing allow.
    pub(crate) goal: Level,
    /// Largest leaf that may stand there already: what the guest accepts.
    pub(crate) at_most: Level,
    /// Host frame of `gfn`.
    pub(crate) pfn: Pfn,
    pub(crate) content: Content,
}

/// What a walk came to.
pub(crate) enum Step {
    Done(Outcome),
    /// Wait outside the critical section, then walk again.
    Wait(RetryReason),
    /// A larger leaf than the guest may have has to be split first.
    Split,
    /// A removal that was not finished has left a block in the way, which has to be taken back first.
    Unblock,
    /// The module said no. The tables are as they were.
    Failed(HandOffError),
}

enum Next {
    Descend(Pfn),
    Again,
    Stop(Step),
}

/// Marks an entry of a private table as one that the module has blocked.
pub(crate) const fn blocked<F: Format>(spte: Spte) -> Spte {
    // The bit's other meaning belongs to tables that the processor walks: no policy on execution applies here.
    Spte(spte.0 | F::NX_SPLIT)
}

/// The same entry, not blocked.
pub(crate) const fn unblocked<F: Format>(spte: Spte) -> Spte {
    Spte(spte.0 & !F::NX_SPLIT)
}

/// Whether the module has blocked what a private entry stands for.
#[inline(always)]
pub(crate) const fn is_blocked<F: Format>(spte: Spte) -> bool {
    spte.0 & F::NX_SPLIT != 0
}

/// The private entry for a page. Nobody but the library reads it, so nothing but the frame and the level matters.
#[inline(always)]
pub(crate) fn private_leaf<F: Format>(pfn: Pfn, level: Level) -> Spte {
    F::leaf(pfn, level, LeafAttrs::memory(Perms::RWX))
}

impl<F: Format, H: Host> Context<F, H> {
    #[inline(always)]
    fn caller(&self) -> Caller<'_, H::Protected, Self> {
        Caller {
            table: self.host.protected(),
            tally: self,
            patience: Patience::Fault,
            resumable: self.capabilities.resumable,
        }
    }

    /// Walks the private tree and installs.
    pub(crate) fn install_private(
        &self,
        root: &Root<H>,
        tables: &mut TableCache,
        twins: &mut TableCache,
        request: PrivateRequest,
    ) -> Step {
        let gfn = request.gfn;
        let mut page = root.page();
        let mut level = root.level;
        let mut restarts = 0;
        while restarts < RESTARTS {
            let Some(entry) = page.get(level.index(gfn)) else {
                break;
            };
            let old = entry.load();
            let next = if old == F::SEALED {
                // Its table is going away under a frozen entry further up: from there.
                restarts += 1;
                page = root.page();
                level = root.level;
                continue;
            } else if old == F::FROZEN {
                self.add(Stat::FrozenWaits, 1);
                Next::Stop(Step::Wait(RetryReason::Frozen))
            } else {
                self.private_step(tables, twins, &request, entry, level, old)
            };
            match next {
                Next::Stop(step) => return step,
                Next::Again => restarts += 1,
                Next::Descend(pfn) => {
                    page = table::page(self.shared.host.frames(), pfn);
                    level = level.below_or_leaf();
                }
            }
        }
        Step::Wait(RetryReason::Raced)
    }

    /// The common case: a leaf of level `goal` in an empty entry of `table`. `None` if it is any other; nothing is changed then.
    /// `pfn` is the host frame of `gfn`. With a constant `goal` every shift is one.
    #[inline(always)]
    pub(crate) fn install_private_fast(
        &self,
        table: &TablePage,
        gfn: Gfn,
        pfn: Pfn,
        goal: Level,
    ) -> Option<Step> {
        let entry = table.get(goal.index(gfn))?;
        let old = entry.load();
        if old != F::EMPTY {
            let is_live = F::is_leaf(old, goal) && !is_blocked::<F>(old);
            return is_live.then_some(Step::Done(Outcome::Spurious));
        }
        self.hand_over_leaf(entry, gfn, pfn, goal)
    }

    /// The hand-off of a leaf to be at an empty entry. `None` if the entry is not empty, or the module too busy.
    #[inline(always)]
    pub(crate) fn hand_over_leaf(
        &self,
        entry: EntryRef<'_>,
        gfn: Gfn,
        pfn: Pfn,
        level: Level,
    ) -> Option<Step> {
        let pfn = Pfn(pfn.0 & !(level.pages() - 1));
        let place = EntryPlace {
            as_id: self.as_id,
            gfn: level.align_down(gfn),
            level,
        };
        let frozen = FrozenEntry::freeze::<F>(entry, place, F::EMPTY).ok()?;
        let hook = self.host.protected();
        let done = self.caller().call(HandOffStep::Install, &frozen, || {
            hook.install(&frozen, pfn, Content::Pending)
        });
        match done {
            Ok(()) => {
                frozen.publish_new::<F>(private_leaf::<F>(pfn, level), self);
                Some(Step::Done(Outcome::Fixed { level }))
            }
            Err(cause) => match self.failed(place, HandOffStep::Install, cause) {
                Next::Stop(step @ Step::Failed(_)) => Some(step),
                _ => None,
            },
        }
    }

    #[inline(always)]
    fn private_step(
        &self,
        tables: &mut TableCache,
        twins: &mut TableCache,
        request: &PrivateRequest,
        entry: EntryRef<'_>,
        level: Level,
        old: Spte,
    ) -> Next {
        let place = EntryPlace {
            as_id: self.as_id,
            gfn: level.align_down(request.gfn),
            level,
        };
        if old == F::EMPTY {
            return if level > request.goal {
                self.link_private(tables, twins, entry, place, old)
            } else {
                self.install_leaf(request, entry, place)
            };
        }
        if is_blocked::<F>(old) {
            return Next::Stop(Step::Unblock);
        }
        if F::is_leaf(old, level) {
            return Next::Stop(if level > request.at_most {
                Step::Split
            } else {
                Step::Done(Outcome::Spurious)
            });
        }
        // A table stays, whatever the goal: a fault folds nothing.
        Next::Descend(F::pfn(old))
    }

    #[inline(always)]
    fn install_leaf(
        &self,
        request: &PrivateRequest,
        entry: EntryRef<'_>,
        place: EntryPlace,
    ) -> Next {
        let Ok(frozen) = FrozenEntry::freeze::<F>(entry, place, F::EMPTY) else {
            return Next::Again;
        };
        let host = &self.shared.host;
        let pfn = Pfn(request.pfn.0 & !(place.level.pages() - 1));
        let done = self.caller().call(HandOffStep::Install, &frozen, || {
            host.protected().install(&frozen, pfn, request.content)
        });
        match done {
            Ok(()) => {
                frozen.publish::<F>(private_leaf::<F>(pfn, place.level), self);
                Next::Stop(Step::Done(Outcome::Fixed { level: place.level }))
            }
            Err(cause) => self.failed(place, HandOffStep::Install, cause),
        }
    }

    fn link_private(
        &self,
        tables: &mut TableCache,
        twins: &mut TableCache,
        entry: EntryRef<'_>,
        place: EntryPlace,
        old: Spte,
    ) -> Next {
        let needs_link = self.capabilities.needs_link;
        let Some(below) = place.level.below() else {
            return Next::Stop(Step::Wait(RetryReason::Raced));
        };
        let Some(spare) = Spare::take(self, tables, twins, needs_link) else {
            return Next::Stop(Step::Wait(RetryReason::Raced));
        };
        let Ok(frozen) = FrozenEntry::freeze::<F>(entry, place, old) else {
            return Next::Again;
        };
        self.shared.meta.link(
            spare.table,
            Place {
                as_id: self.as_id,
                private: true,
                level: below,
                gfn: place.gfn,
            },
        );
        self.shared.meta.set_twin(spare.table, spare.twin);
        if let Some(twin) = spare.twin {
            let host = &self.shared.host;
            let done = self.caller().call(HandOffStep::Link, &frozen, || {
                host.protected().link(&frozen, twin)
            });
            if let Err(cause) = done {
                return self.failed(place, HandOffStep::Link, cause);
            }
        }
        let pfn = spare.keep();
        frozen.publish::<F>(F::table(pfn), self);
        Next::Descend(pfn)
    }

    #[cold]
    fn failed(&self, place: EntryPlace, step: HandOffStep, cause: HandOffCause) -> Next {
        Next::Stop(match cause {
            HandOffCause::Busy => Step::Wait(RetryReason::Frozen),
            cause => Step::Failed(HandOffError { place, step, cause }),
        })
    }

    /// Turns a refusal into what the embedder is told.
    #[cold]
    pub(crate) fn refused(&self, error: HandOffError) -> Outcome {
        self.shared.lose_if(error.cause);
        self.memory_fault(MemoryFault::Refused)
    }
}

/// A table and its twin on their way into the tree. Dropped, on failure or by a panic of the hook, both go back to the
/// caches that they came from.
struct Spare<'c, 's, F: Format, H: Host> {
    ctx: &'s Context<F, H>,
    tables: &'c mut TableCache,
    twins: &'c mut TableCache,
    table: Pfn,
    twin: Option<Pfn>,
    kept: bool,
}

impl<'c, 's, F: Format, H: Host> Spare<'c, 's, F, H> {
    fn take(
        ctx: &'s Context<F, H>,
        tables: &'c mut TableCache,
        twins: &'c mut TableCache,
        needs_twin: bool,
    ) -> Option<Self> {
        let twin = if needs_twin { Some(twins.pop()?) } else { None };
        let Some(table) = tables.pop() else {
            if let Some(twin) = twin {
                twins.push(twin);
            }
            return None;
        };
        Some(Self {
            ctx,
            tables,
            twins,
            table,
            twin,
            kept: false,
        })
    }

    /// The table is linked: both stay.
    fn keep(mut self) -> Pfn {
        self.kept = true;
        self.table
    }
}

impl<F: Format, H: Host> Drop for Spare<'_, '_, F, H> {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let meta = &self.ctx.shared.meta;
        meta.set_twin(self.table, None);
        meta.set_state(self.table, TableState::Spare);
        self.tables.push(self.table);
        if let Some(twin) = self.twin {
            self.twins.push(twin);
        }
    }
}
