//! Resolving a fault: decode, look up, choose a level, install.
//!
//! Protocol. Inside one critical section: is the frame under invalidation? which slot? how is it backed, at what level?
//! Then the walk: Acquire loads from the root to the goal level; at a hole a table from the vCPU's cache is exchanged in
//! (INV: publish-complete), at the goal the leaf. Whoever loses an exchange goes on with the value that won. The fast
//! path is the walk that finds every table present and the goal empty; everything else starts over in
//! [`install_slow`](VcpuCore::install_slow), which meets each kind of entry:
//!
//! * *frozen*: wait locally, bounded, then `Retry` (INV: progress);
//! * *sealed*: the table was unlinked; walk again from the root;
//! * a leaf that permits the access: spurious; one that does not: widened in place, never narrowed;
//! * a larger leaf that does not permit the access: split into a table that translates alike, which needs no flush;
//! * a table where a larger leaf is to go: exchanged for the leaf, then sealed, flushed and retired by the winner.

use crate::entry::{self, EntryRef, TABLE_ENTRIES};
use crate::host::{Host, Lookup, Mapping, OutOfFrames};
use crate::range_zap::seal_subtree;
use crate::slots::{Slot, SlotFlags};
use crate::stats::{Stat, Tally};
use crate::table::{self, Place, TableState};
use crate::tlb::PendingFlush;
use crate::vcpu::VcpuCore;
use alloc::sync::Arc;
use tdp_arch::{Access, FaultCode, Format, Gfn, Gpa, LeafAttrs, Level, Perms, Pfn, Spte};
use tdp_rcu::Section;
use tdp_rcu::sync::Backoff;

/// Times that one fault starts over before the guest is asked to try again.
const RESTARTS: u32 = 16;

/// A guest access that could not be translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where.
    pub gpa: Gpa,
    /// What the guest tried.
    pub access: Access,
    /// Nobody waits for it: a present leaf of any permission will do, and the new one is not marked accessed.
    pub prefetch: bool,
    /// Largest leaf to install.
    pub max_level: Level,
}

impl Fault {
    /// A fault of `access` at `gpa`.
    pub const fn new(gpa: Gpa, access: Access) -> Self {
        Self {
            gpa,
            access,
            prefetch: false,
            max_level: Level::L3,
        }
    }

    /// A data read.
    pub const fn read(gpa: Gpa) -> Self {
        Self::new(gpa, Access::Read)
    }

    /// A data write.
    pub const fn write(gpa: Gpa) -> Self {
        Self::new(gpa, Access::Write)
    }

    /// An instruction fetch.
    pub const fn execute(gpa: Gpa) -> Self {
        Self::new(gpa, Access::Execute)
    }

    /// What the processor reported, decoded by [`Format::fault_code`].
    pub const fn from_code(code: FaultCode, gpa: Gpa) -> Self {
        Self::new(gpa, code.access)
    }

    /// Limits the leaf to `level`.
    #[must_use]
    pub const fn max_level(mut self, level: Level) -> Self {
        self.max_level = level;
        self
    }
}

/// Why the guest is to try again. Entering it is right in every case; the access faults anew if it still must.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RetryReason {
    /// Other threads kept changing the same entries.
    Raced,
    /// An entry on the way is frozen for longer than it is worth waiting.
    Frozen,
    /// The host is invalidating the frame.
    Invalidation,
    /// The slot is being removed, moved or changed.
    SlotChanging,
    /// The vCPU's root is obsolete: load the root again before entering.
    RootObsolete,
    /// The backing asked for it.
    Backing,
}

impl RetryReason {
    /// All reasons, in the order in which they are counted.
    pub const ALL: [RetryReason; 6] = [
        RetryReason::Raced,
        RetryReason::Frozen,
        RetryReason::Invalidation,
        RetryReason::SlotChanging,
        RetryReason::RootObsolete,
        RetryReason::Backing,
    ];

    /// A short name, for tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            RetryReason::Raced => "raced",
            RetryReason::Frozen => "frozen",
            RetryReason::Invalidation => "invalidation",
            RetryReason::SlotChanging => "slot_changing",
            RetryReason::RootObsolete => "root_obsolete",
            RetryReason::Backing => "backing",
        }
    }

    const fn stat(self) -> Stat {
        match self {
            RetryReason::Raced => Stat::RetryRaced,
            RetryReason::Frozen => Stat::RetryFrozen,
            RetryReason::Invalidation => Stat::RetryInvalidation,
            RetryReason::SlotChanging => Stat::RetrySlotChanging,
            RetryReason::RootObsolete => Stat::RetryRootObsolete,
            RetryReason::Backing => Stat::RetryBacking,
        }
    }
}

/// Why a fault is the embedder's to deal with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryFaultReason {
    /// The address is wider than the tables can map.
    BeyondWidth,
    /// The backing has no page there.
    NotBacked,
    /// The backing does not permit the access.
    NotPermitted,
}

/// A fault that the MMU cannot resolve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryFault {
    /// Where.
    pub gpa: Gpa,
    /// What the guest tried.
    pub access: Access,
    /// Why not.
    pub reason: MemoryFaultReason,
}

/// How a fault ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "says whether to enter the guest, to emulate or to report"]
pub enum Outcome {
    /// The access is possible now, through a leaf of this level. Enter the guest.
    Fixed {
        /// Level of the leaf.
        level: Level,
    },
    /// The access was possible already. Enter the guest.
    Spurious,
    /// Enter the guest and let it fault again.
    Retry(RetryReason),
    /// No memory there, or a write to a read-only slot: emulate the access.
    Mmio {
        /// Where.
        gpa: Gpa,
        /// A slot is there, and read-only.
        read_only: bool,
    },
    /// Tell the guest's owner.
    MemoryFault(MemoryFault),
}

/// A fault could not be worked on; the tables are as they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultError {
    /// No frame for a table, not even after waiting for grace periods.
    #[error("no table frame: {0}")]
    OutOfFrames(#[from] OutOfFrames),
}

/// What the first critical section of a fault came to.
pub(crate) enum Resolution<B> {
    Done(Outcome),
    /// The look-up has to sleep, outside. Holds the slot and the invalidation sequence before it.
    Sleep(Arc<Slot<B>>, u64),
}

/// What is to be installed.
#[derive(Clone, Copy)]
struct Request {
    gfn: Gfn,
    goal: Level,
    /// First host frame of the leaf.
    pfn: Pfn,
    attrs: LeafAttrs,
    access: Access,
    prefetch: bool,
}

enum Next {
    /// To the table below.
    Descend(Pfn),
    /// Look at the same entry again.
    Again,
    /// Walk again from the root.
    Restart,
    Done(Outcome),
}

impl<F: Format, H: Host> VcpuCore<F, H> {
    /// Works on a fault inside a critical section.
    #[inline(always)]
    pub(crate) fn resolve(
        &mut self,
        section: &Section<'_>,
        fault: Fault,
    ) -> Resolution<H::Backing> {
        let gfn = fault.gpa.gfn();
        if gfn >= self.root.limit() {
            return Resolution::Done(self.memory_fault(fault, MemoryFaultReason::BeyondWidth));
        }
        if self.root.is_obsolete() {
            return Resolution::Done(self.retry(RetryReason::RootObsolete));
        }
        if self.shared.invalidations.covers(self.as_id, gfn) {
            return Resolution::Done(self.retry(RetryReason::Invalidation));
        }
        let Some(slot) = self.find_slot(section, gfn) else {
            return Resolution::Done(self.mmio(fault));
        };
        if slot.changing {
            return Resolution::Done(self.retry(RetryReason::SlotChanging));
        }
        let lookup = self.shared.host.lookup(slot, gfn, fault.access);
        if let Lookup::Mapped(mapping) = lookup {
            let (flags, goal) = (
                slot.flags(),
                slot.level_at(gfn, fault.max_level.min(mapping.level)),
            );
            return Resolution::Done(self.install_backed(fault, flags, goal, mapping));
        }
        self.resolve_unmapped(section, fault, lookup)
    }

    #[cold]
    fn resolve_unmapped(
        &mut self,
        section: &Section<'_>,
        fault: Fault,
        lookup: Lookup,
    ) -> Resolution<H::Backing> {
        match (
            lookup,
            self.shared.slots.find(section, self.as_id, fault.gpa.gfn()),
        ) {
            (Lookup::Blocking, Some(slot)) => {
                Resolution::Sleep(slot.clone(), self.shared.invalidations.sequence())
            }
            (Lookup::Failed, _) => {
                Resolution::Done(self.memory_fault(fault, MemoryFaultReason::NotBacked))
            }
            _ => Resolution::Done(self.retry(RetryReason::Backing)),
        }
    }

    /// Goes on inside a new critical section with what a sleeping look-up found.
    pub(crate) fn resolve_slept(
        &mut self,
        section: &Section<'_>,
        fault: Fault,
        slept_on: &Arc<Slot<H::Backing>>,
        sequence: u64,
        lookup: Lookup,
    ) -> Outcome {
        let gfn = fault.gpa.gfn();
        if self.root.is_obsolete() {
            return self.retry(RetryReason::RootObsolete);
        }
        // INV: no-stale-install: an invalidation that is under way is seen by its range, one that has passed by the
        // sequence; a slot that was replaced is another one.
        let invalidations = &self.shared.invalidations;
        if invalidations.covers(self.as_id, gfn) || invalidations.sequence() != sequence {
            return self.retry(RetryReason::Invalidation);
        }
        match self.shared.slots.find(section, self.as_id, gfn) {
            Some(slot) if Arc::ptr_eq(slot, slept_on) => {}
            _ => return self.retry(RetryReason::SlotChanging),
        }
        match lookup {
            Lookup::Mapped(mapping) => {
                let goal = slept_on.level_at(gfn, fault.max_level.min(mapping.level));
                self.install_backed(fault, slept_on.flags(), goal, mapping)
            }
            Lookup::Failed => self.memory_fault(fault, MemoryFaultReason::NotBacked),
            Lookup::Blocking | Lookup::Retry => self.retry(RetryReason::Backing),
        }
    }

    #[inline(always)]
    fn install_backed(
        &mut self,
        fault: Fault,
        flags: SlotFlags,
        goal: Level,
        mapping: Mapping,
    ) -> Outcome {
        let mut perms = mapping.perms;
        if flags.contains(SlotFlags::READ_ONLY) {
            if fault.access.is_write() {
                self.shard.add(Stat::Mmio, 1);
                return Outcome::Mmio {
                    gpa: fault.gpa,
                    read_only: true,
                };
            }
            perms = perms.difference(Perms::WRITE);
        }
        if !perms.contains(fault.access.needs()) {
            return self.memory_fault(fault, MemoryFaultReason::NotPermitted);
        }
        self.install_mapping(fault, goal, mapping, perms)
    }

    /// Installs a mapping whose permissions were checked.
    #[inline(always)]
    pub(crate) fn install_mapping(
        &mut self,
        fault: Fault,
        goal: Level,
        mapping: Mapping,
        perms: Perms,
    ) -> Outcome {
        let gfn = fault.gpa.gfn();
        let mut goal = goal.min(self.shared.max_leaf);
        // A large leaf needs guest and host frame to agree below its size.
        while goal > Level::L1 && (gfn.0 ^ mapping.pfn.0) & (goal.pages() - 1) != 0 {
            goal = goal.below().unwrap_or(Level::L1);
        }
        let attrs = LeafAttrs {
            memory_type: mapping.memory_type,
            ignore_guest_pat: mapping.ignore_guest_pat,
            ad_bits: self.root.ad_bits,
            accessed: !fault.prefetch,
            ..LeafAttrs::memory(perms)
        };
        let pfn = Pfn(mapping.pfn.0 & !(goal.pages() - 1));
        self.install(Request {
            gfn,
            goal,
            pfn,
            attrs,
            access: fault.access,
            prefetch: fault.prefetch,
        })
    }

    #[inline(always)]
    fn install(&mut self, request: Request) -> Outcome {
        let Request { gfn, goal, .. } = request;
        let frames = self.shared.host.frames();
        let mut page = self.root.page();
        let mut level = self.root.level;
        while level > goal {
            let spte = page.entry(level.index(gfn)).load();
            if !F::is_table(spte) {
                return self.install_slow(request);
            }
            page = table::page(frames, F::pfn(spte));
            level = level.below().unwrap_or(Level::L1);
        }
        let entry = page.entry(goal.index(gfn));
        let leaf = F::leaf(request.pfn, goal, request.attrs);
        if entry.load() == F::EMPTY
            && entry::install_leaf::<F>(entry, goal, leaf, &*self.shard).is_ok()
        {
            self.shard.add(Stat::Fixed, 1);
            return Outcome::Fixed { level: goal };
        }
        self.install_slow(request)
    }

    #[cold]
    #[inline(never)]
    fn install_slow(&mut self, request: Request) -> Outcome {
        let outcome = self.walk(request.gfn, |core, entry, level, old| {
            core.install_step(request, entry, level, old)
        });
        match outcome {
            Outcome::Fixed { .. } => self.shard.add(Stat::Fixed, 1),
            Outcome::Spurious => self.shard.add(Stat::Spurious, 1),
            _ => {}
        }
        outcome
    }

    /// Walks from the root and lets `step` decide at each entry, for a bounded number of steps.
    fn walk(
        &mut self,
        gfn: Gfn,
        mut step: impl FnMut(&mut Self, EntryRef<'_>, Level, Spte) -> Next,
    ) -> Outcome {
        let shared = self.shared.clone();
        let root = self.root.clone();
        let mut page = root.page();
        let mut level = root.level;
        let mut restarts = 0;
        while restarts < RESTARTS {
            let Some(entry) = page.get(level.index(gfn)) else {
                break;
            };
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
                step(self, entry, level, old)
            };
            match next {
                Next::Done(outcome) => return outcome,
                Next::Again => restarts += 1,
                Next::Restart => {
                    restarts += 1;
                    page = root.page();
                    level = root.level;
                }
                Next::Descend(pfn) => {
                    page = table::page(shared.host.frames(), pfn);
                    level = level.below().unwrap_or(Level::L1);
                }
            }
        }
        self.retry(RetryReason::Raced)
    }

    fn install_step(
        &mut self,
        request: Request,
        entry: EntryRef<'_>,
        level: Level,
        old: Spte,
    ) -> Next {
        let is_leaf = F::is_leaf(old, level);
        if is_leaf && (request.prefetch || F::allows(old, request.access)) {
            return Next::Done(Outcome::Spurious);
        }
        let is_table = !is_leaf && F::is_mmu_present(old);
        if level > request.goal {
            return match (is_leaf, is_table) {
                (true, _) => self.split(entry, level, old, request.gfn),
                (_, true) => Next::Descend(F::pfn(old)),
                _ => self.link(entry, level, old, request.gfn),
            };
        }
        if is_leaf {
            self.upgrade(request, entry, level, old)
        } else if is_table {
            self.collapse(request, entry, level, old)
        } else {
            let leaf = F::leaf(request.pfn, level, request.attrs);
            match entry::exchange::<F>(entry, level, old, leaf, &*self.shard) {
                Ok(()) => Next::Done(Outcome::Fixed { level }),
                Err(_) => Next::Again,
            }
        }
    }

    /// Links an empty table.
    fn link(&mut self, entry: EntryRef<'_>, level: Level, old: Spte, gfn: Gfn) -> Next {
        let (Some(below), Some(pfn)) = (level.below(), self.cache.pop()) else {
            return Next::Done(self.retry(RetryReason::Raced));
        };
        self.shared.meta.link(
            pfn,
            Place {
                as_id: self.as_id,
                level: below,
                gfn: level.align_down(gfn),
            },
        );
        match entry::exchange::<F>(entry, level, old, F::table(pfn), &*self.shard) {
            Ok(()) => Next::Descend(pfn),
            Err(_) => {
                self.shared.meta.set_state(pfn, TableState::Spare);
                self.cache.push(pfn);
                Next::Again
            }
        }
    }

    /// Replaces a large leaf by a table of leaves that translate alike.
    fn split(&mut self, entry: EntryRef<'_>, level: Level, old: Spte, gfn: Gfn) -> Next {
        let (Some(below), Some(pfn)) = (level.below(), self.cache.pop()) else {
            return Next::Done(self.retry(RetryReason::Raced));
        };
        let page = table::page(self.shared.host.frames(), pfn);
        page.fill(|index| F::split_child(old, level, index));
        self.shared.meta.link(
            pfn,
            Place {
                as_id: self.as_id,
                level: below,
                gfn: level.align_down(gfn),
            },
        );
        // The whole old value is compared: a bit that the processor set after the children were made fails this.
        match entry::exchange::<F>(entry, level, old, F::table(pfn), &*self.shard) {
            Ok(()) => {
                self.shard.add(Stat::pages(below), TABLE_ENTRIES as i64);
                self.shard.add(Stat::Splits, 1);
                Next::Descend(pfn)
            }
            Err(_) => {
                page.fill(|_| F::EMPTY);
                self.shared.meta.set_state(pfn, TableState::Spare);
                self.cache.push(pfn);
                Next::Again
            }
        }
    }

    /// Widens the permissions of a leaf, or takes it away if it maps another page.
    fn upgrade(&mut self, request: Request, entry: EntryRef<'_>, level: Level, old: Spte) -> Next {
        if F::leaf_pfn(old, level) != request.pfn {
            // The backing changed without an invalidation: break before make.
            if entry::exchange::<F>(entry, level, old, F::EMPTY, &*self.shard).is_ok() {
                let shared = self.shared.clone();
                let mut pending = PendingFlush::new(&shared);
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
        let leaf = Spte(F::leaf(request.pfn, level, attrs).0 | old.0 & (F::ACCESSED | F::DIRTY));
        match entry::exchange::<F>(entry, level, old, leaf, &*self.shard) {
            Ok(()) => {
                self.shard.add(Stat::Upgrades, 1);
                Next::Done(Outcome::Fixed { level })
            }
            Err(_) => Next::Again,
        }
    }

    /// Replaces a table by one large leaf.
    fn collapse(&mut self, request: Request, entry: EntryRef<'_>, level: Level, old: Spte) -> Next {
        let leaf = F::leaf(request.pfn, level, request.attrs);
        if entry::exchange::<F>(entry, level, old, leaf, &*self.shard).is_err() {
            return Next::Again;
        }
        let Some(below) = level.below() else {
            return Next::Again;
        };
        let shared = self.shared.clone();
        let mut pending = PendingFlush::new(&shared);
        seal_subtree::<F, H>(&shared, F::pfn(old), below, &*self.shard, &mut pending);
        pending.note(self.as_id, level.range(request.gfn), true);
        pending.flush();
        self.shard.add(Stat::Collapses, 1);
        Next::Done(Outcome::Fixed { level })
    }

    /// Remembers that there is no memory at the fault's frame, so that the next access exits at once.
    #[cold]
    fn mmio(&mut self, fault: Fault) -> Outcome {
        let gfn = fault.gpa.gfn();
        let mmio = Outcome::Mmio {
            gpa: fault.gpa,
            read_only: false,
        };
        let generation = self.shared.slots.version();
        let Some(spte) = self
            .shared
            .mmio_caching
            .then(|| F::mmio(gfn, generation, self.shared.physical_bits))
            .flatten()
        else {
            self.shard.add(Stat::Mmio, 1);
            return mmio;
        };
        let outcome = self.walk(gfn, |core, entry, level, old| {
            if old == spte {
                return Next::Done(mmio);
            }
            if F::is_leaf(old, level) {
                return Next::Done(core.retry(RetryReason::SlotChanging));
            }
            if F::is_mmu_present(old) {
                return Next::Descend(F::pfn(old));
            }
            if level > Level::L1 {
                return core.link(entry, level, old, gfn);
            }
            match entry::exchange::<F>(entry, level, old, spte, &*core.shard) {
                Ok(()) => Next::Done(mmio),
                Err(_) => Next::Again,
            }
        });
        if outcome == mmio {
            self.shard.add(Stat::Mmio, 1);
        }
        outcome
    }

    #[cold]
    pub(crate) fn retry(&self, reason: RetryReason) -> Outcome {
        self.shard.add(reason.stat(), 1);
        Outcome::Retry(reason)
    }

    #[cold]
    pub(crate) fn memory_fault(&self, fault: Fault, reason: MemoryFaultReason) -> Outcome {
        self.shard.add(Stat::MemoryFault, 1);
        Outcome::MemoryFault(MemoryFault {
            gpa: fault.gpa,
            access: fault.access,
            reason,
        })
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
