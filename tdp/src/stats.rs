//! Counters: one shard per vCPU, written by its owner alone, and one for sweeps.
//!
//! A shard lies on cache lines of its own (INV: no-shared-write), but for what the common faults count: that is noted in the
//! line which their critical sections write anyway. A vCPU adds by a plain load and store of its own
//! word; a reader on another thread may see a sum that is a moment old, never a torn one. Gauges such as mapped pages
//! are sums of signed shards: one vCPU may map what a sweep unmaps.

use crate::protected::HandOffStep;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::Cell;
use tdp_arch::Level;
use tdp_rcu::sync::{CachePadded, Mutex, Plain};
use tdp_rcu::{NOTES, Notes, Section};

macro_rules! stats {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// What is counted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub(crate) enum Stat { $($(#[$doc])* $name),+ }

        /// How many things are counted.
        const STATS: usize = [$(Stat::$name),+].len();
    };
}

stats! {
    Pages4K, Pages2M, Pages1G, Tables,
    /// Pages of 4 KiB that are mapped by faults that were so fixed: counted here, and neither there nor there.
    Straight,
    Fixed, Spurious, Mmio, MemoryFault,
    RetryRaced, RetryFrozen, RetryInvalidation, RetrySlotChanging, RetryRootObsolete, RetryBacking,
    Splits, Collapses, Upgrades, Unlinked, Flushes, RootsMade, RootsInvalidated,
    NxTables, NxRecovered,
    FrozenWaits, SentBack, Leaked,
    CallLink, CallInstall, CallBlock, CallFlush, CallUnblock, CallRemove, CallUnlink, CallSplit, CallMerge, CallReclaim,
    BusyLink, BusyInstall, BusyBlock, BusyFlush, BusyUnblock, BusyRemove, BusyUnlink, BusySplit, BusyMerge, BusyReclaim,
}

/// Calls of the hook, in the order of [`HandOffStep::ALL`].
const CALLS: [Stat; HandOffStep::ALL.len()] = [
    Stat::CallLink,
    Stat::CallInstall,
    Stat::CallBlock,
    Stat::CallFlush,
    Stat::CallUnblock,
    Stat::CallRemove,
    Stat::CallUnlink,
    Stat::CallSplit,
    Stat::CallMerge,
    Stat::CallReclaim,
];
/// Those that were answered "again", in the same order.
const BUSY: [Stat; HandOffStep::ALL.len()] = [
    Stat::BusyLink,
    Stat::BusyInstall,
    Stat::BusyBlock,
    Stat::BusyFlush,
    Stat::BusyUnblock,
    Stat::BusyRemove,
    Stat::BusyUnlink,
    Stat::BusySplit,
    Stat::BusyMerge,
    Stat::BusyReclaim,
];

impl Stat {
    /// Calls of the hook for `step`.
    #[inline(always)]
    pub(crate) const fn calls(step: HandOffStep) -> Stat {
        CALLS[step as usize]
    }

    /// Calls of the hook for `step` that were answered "again".
    pub(crate) const fn busy(step: HandOffStep) -> Stat {
        BUSY[step as usize]
    }

    /// The gauge of leaves of `level`.
    #[inline(always)]
    pub(crate) const fn pages(level: Level) -> Stat {
        match level {
            Level::L1 => Stat::Pages4K,
            Level::L2 => Stat::Pages2M,
            _ => Stat::Pages1G,
        }
    }
}

/// What is counted in the words that a reader of the epoch domain has for its user, in their order.
const NOTED: [Stat; NOTES] = [
    Stat::Straight,
    Stat::Pages4K,
    Stat::Fixed,
    Stat::CallInstall,
];

impl Stat {
    /// Where it is among those.
    #[inline(always)]
    const fn note(self) -> Option<usize> {
        let mut at = 0;
        while at < NOTED.len() {
            if NOTED[at] as usize == self as usize {
                return Some(at);
            }
            at += 1;
        }
        None
    }
}

/// Somewhere to count.
pub(crate) trait Tally {
    /// Adds `n`.
    fn add(&self, stat: Stat, n: i64);
}

/// Counts a fault that its vCPU resolves by what it remembers, as what it installs and as fixed, in one word.
pub(crate) struct Straight<'a>(pub(crate) &'a Section<'a>);

impl Tally for Straight<'_> {
    #[inline(always)]
    fn add(&self, stat: Stat, n: i64) {
        debug_assert_eq!(stat, Stat::Pages4K, "another leaf than those remembered");
        const AT: usize = match Stat::Straight.note() {
            Some(at) => at,
            None => panic!("it is noted"),
        };
        self.0.notes()[AT].add_owned(n as u64);
    }
}

/// Words to count in.
struct Words(CachePadded<[Plain; STATS]>);

impl Default for Words {
    fn default() -> Self {
        Self(CachePadded::new([const { Plain::new(0) }; STATS]))
    }
}

/// Counters of one vCPU. Only its owner adds.
pub(crate) struct Shard {
    /// In place of some of the rest.
    notes: Notes,
    rest: Words,
}

impl Shard {
    /// The word of what is counted, if one knows the notes of this shard: to whom they are nearer than the shard itself.
    #[inline(always)]
    pub(crate) fn word<'a>(self: &'a Arc<Self>, notes: &'a Notes, stat: Stat) -> &'a Plain {
        match stat.note() {
            Some(at) => &notes.words()[at],
            None => &self.rest.0[stat as usize],
        }
    }

    fn get(&self, stat: Stat) -> i64 {
        let word = match stat.note() {
            Some(at) => &self.notes.words()[at],
            None => &self.rest.0[stat as usize],
        };
        word.get() as i64
    }
}

/// Counters of all sweeps.
#[derive(Default)]
pub(crate) struct SharedShard(Words);

impl Tally for SharedShard {
    fn add(&self, stat: Stat, n: i64) {
        self.0.0[stat as usize].add_shared(n as u64);
    }
}

/// Counts of a part of a sweep, added to a shared shard when it is dropped: what is shared is written once.
pub(crate) struct Deferred<'a> {
    counts: [Cell<i64>; STATS],
    shard: &'a SharedShard,
}

impl<'a> Deferred<'a> {
    pub(crate) fn new(shard: &'a SharedShard) -> Self {
        Self {
            counts: [const { Cell::new(0) }; STATS],
            shard,
        }
    }
}

impl Tally for Deferred<'_> {
    #[inline(always)]
    fn add(&self, stat: Stat, n: i64) {
        let count = &self.counts[stat as usize];
        count.set(count.get().wrapping_add(n));
    }
}

impl Drop for Deferred<'_> {
    fn drop(&mut self) {
        for (word, count) in self.shard.0.0.iter().zip(&self.counts) {
            if count.get() != 0 {
                word.add_shared(count.get() as u64);
            }
        }
    }
}

/// All shards of one MMU.
#[derive(Default)]
pub(crate) struct Shards {
    pub(crate) sweeps: SharedShard,
    vcpus: Mutex<Vec<Arc<Shard>>>,
}

impl Shards {
    /// Makes a shard for a new vCPU, whose notes are given. It stays listed for as long as the MMU lives or until it is folded
    /// away.
    pub(crate) fn vcpu(&self, notes: Notes) -> Arc<Shard> {
        let shard = Arc::new(Shard {
            notes,
            rest: Words::default(),
        });
        self.vcpus.lock().push(shard.clone());
        shard
    }

    /// Folds the shard of a vCPU that goes away into the shared one.
    pub(crate) fn retire(&self, shard: &Arc<Shard>) {
        let mut vcpus = self.vcpus.lock();
        vcpus.retain(|other| !Arc::ptr_eq(other, shard));
        let own = shard.rest.0.iter().chain(shard.notes.words());
        let stats = (0..STATS).chain(NOTED.map(|stat| stat as usize));
        for (stat, from) in stats.zip(own) {
            self.sweeps.0.0[stat].add_shared(from.get());
        }
    }

    fn sum(&self, vcpus: &[Arc<Shard>], stat: Stat) -> i64 {
        self.sweeps.0.0[stat as usize].get() as i64
            + vcpus.iter().map(|shard| shard.get(stat)).sum::<i64>()
    }

    /// Adds everything up.
    pub(crate) fn snapshot(&self) -> Stats {
        let vcpus = self.vcpus.lock();
        let get = |stat| u64::try_from(self.sum(&vcpus, stat)).unwrap_or(0);
        let pages = [Stat::Pages4K, Stat::Straight].map(|stat| self.sum(&vcpus, stat));
        let pages = u64::try_from(pages.iter().sum::<i64>()).unwrap_or(0);
        Stats {
            pages: [pages, get(Stat::Pages2M), get(Stat::Pages1G)],
            tables: get(Stat::Tables),
            fixed: get(Stat::Fixed) + get(Stat::Straight),
            spurious: get(Stat::Spurious),
            mmio: get(Stat::Mmio),
            memory_faults: get(Stat::MemoryFault),
            retries: [
                get(Stat::RetryRaced),
                get(Stat::RetryFrozen),
                get(Stat::RetryInvalidation),
                get(Stat::RetrySlotChanging),
                get(Stat::RetryRootObsolete),
                get(Stat::RetryBacking),
            ],
            splits: get(Stat::Splits),
            collapses: get(Stat::Collapses),
            upgrades: get(Stat::Upgrades),
            unlinked: get(Stat::Unlinked),
            nx_tables: get(Stat::NxTables),
            nx_recovered: get(Stat::NxRecovered),
            flushes: get(Stat::Flushes),
            roots_made: get(Stat::RootsMade),
            roots_invalidated: get(Stat::RootsInvalidated),
            garbage: tdp_rcu::Counters::default(),
            protected: ProtectedStats {
                calls: CALLS.map(get),
                busy: BUSY.map(get),
                frozen_waits: get(Stat::FrozenWaits),
                sent_back: get(Stat::SentBack),
                carried: 0,
                carrier_waits: 0,
                ticket_waits: 0,
                leaked: get(Stat::Leaked),
            },
        }
    }
}

/// What became of hand-offs to the protected table. The arrays are in the order of [`HandOffStep::ALL`].
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct ProtectedStats {
    /// Calls of the hook, those included that were answered "again".
    pub calls: [u64; HandOffStep::ALL.len()],
    /// Calls that were answered "again": busy, interrupted, not drained.
    pub busy: [u64; HandOffStep::ALL.len()],
    /// Times that a thread met an entry that another had frozen, and waited.
    pub frozen_waits: u64,
    /// Private faults that were sent back to the guest unresolved.
    pub sent_back: u64,
    /// Removals that were carried by another thread than the one that asked.
    pub carried: u64,
    /// Removals that had to wait because another thread was carrying; those that it carried are among them.
    pub carrier_waits: u64,
    /// Times that a thread waited for a ticket which another thread tended. A wait for one's own ticket is for the guest.
    pub ticket_waits: u64,
    /// Frames of 4 KiB, pages and twins of tables, that the module did not give back and the host must never use again.
    pub leaked: u64,
}

impl ProtectedStats {
    /// Calls of the hook for `step`.
    pub const fn calls_of(&self, step: HandOffStep) -> u64 {
        self.calls[step as usize]
    }

    /// Calls of the hook for `step` that were answered "again".
    pub const fn busy_of(&self, step: HandOffStep) -> u64 {
        self.busy[step as usize]
    }
}

/// Counters of one MMU, summed over all vCPUs at about one moment.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Stats {
    /// Leaves mapped now: 4 KiB, 2 MiB, 1 GiB.
    pub pages: [u64; 3],
    /// Tables linked now, roots not counted.
    pub tables: u64,
    /// Faults that changed an entry.
    pub fixed: u64,
    /// Faults that found the access already possible.
    pub spurious: u64,
    /// Faults on device memory or writes to read-only slots.
    pub mmio: u64,
    /// Faults handed to the embedder as errors of the guest or of the backing.
    pub memory_faults: u64,
    /// Faults to be tried again, in the order of [`RetryReason::ALL`](crate::RetryReason::ALL).
    pub retries: [u64; 6],
    /// Large leaves replaced by a table of smaller ones.
    pub splits: u64,
    /// Tables replaced by a large leaf.
    pub collapses: u64,
    /// Leaves whose permissions were widened in place.
    pub upgrades: u64,
    /// Tables unlinked.
    pub unlinked: u64,
    /// Tables linked now that stand only because the guest fetched there while large leaves are kept from being executable.
    pub nx_tables: u64,
    /// Such tables that recovery took away.
    pub nx_recovered: u64,
    /// Flushes asked of the host.
    pub flushes: u64,
    /// Root tables made.
    pub roots_made: u64,
    /// Root tables made obsolete.
    pub roots_invalidated: u64,
    /// What waits for a grace period, counted in frames.
    pub garbage: tdp_rcu::Counters,
    /// Hand-offs to the protected table.
    pub protected: ProtectedStats,
}
