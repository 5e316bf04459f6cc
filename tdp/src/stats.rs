//! Counters: one shard per vCPU, written by its owner alone, and one for sweeps.
//!
//! A shard lies on cache lines of its own (INV: no-shared-write). A vCPU adds by a plain load and store of its own
//! word; a reader on another thread may see a sum that is a moment old, never a torn one. Gauges such as mapped pages
//! are sums of signed shards: one vCPU may map what a sweep unmaps.

use alloc::sync::Arc;
use alloc::vec::Vec;
use tdp_arch::Level;
use tdp_rcu::sync::{CachePadded, Mutex, Plain};

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
    Fixed, Spurious, Mmio, MemoryFault,
    RetryRaced, RetryFrozen, RetryInvalidation, RetrySlotChanging, RetryRootObsolete, RetryBacking,
    Splits, Collapses, Upgrades, Unlinked, Flushes, RootsMade, RootsInvalidated,
}

impl Stat {
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

/// Somewhere to count.
pub(crate) trait Tally {
    /// Adds `n`.
    fn add(&self, stat: Stat, n: i64);
}

/// Counters of one vCPU. Only its owner adds.
#[derive(Default)]
pub(crate) struct Shard(CachePadded<[Plain; STATS]>);

impl Tally for Shard {
    #[inline(always)]
    fn add(&self, stat: Stat, n: i64) {
        self.0[stat as usize].add_owned(n as u64);
    }
}

impl Shard {
    fn get(&self, stat: Stat) -> i64 {
        self.0[stat as usize].get() as i64
    }
}

/// Counters of all sweeps.
#[derive(Default)]
pub(crate) struct SharedShard(Shard);

impl Tally for SharedShard {
    fn add(&self, stat: Stat, n: i64) {
        self.0.0[stat as usize].add_shared(n as u64);
    }
}

/// All shards of one MMU.
#[derive(Default)]
pub(crate) struct Shards {
    pub(crate) sweeps: SharedShard,
    vcpus: Mutex<Vec<Arc<Shard>>>,
}

impl Shards {
    /// Makes a shard for a new vCPU. It stays listed for as long as the MMU lives or until it is folded away.
    pub(crate) fn vcpu(&self) -> Arc<Shard> {
        let shard = Arc::new(Shard::default());
        self.vcpus.lock().push(shard.clone());
        shard
    }

    /// Folds the shard of a vCPU that goes away into the shared one.
    pub(crate) fn retire(&self, shard: &Arc<Shard>) {
        let mut vcpus = self.vcpus.lock();
        vcpus.retain(|other| !Arc::ptr_eq(other, shard));
        for (into, from) in self.sweeps.0.0.iter().zip(shard.0.iter()) {
            into.add_shared(from.get());
        }
    }

    fn sum(&self, vcpus: &[Arc<Shard>], stat: Stat) -> i64 {
        self.sweeps.0.get(stat) + vcpus.iter().map(|shard| shard.get(stat)).sum::<i64>()
    }

    /// Adds everything up.
    pub(crate) fn snapshot(&self) -> Stats {
        let vcpus = self.vcpus.lock();
        let get = |stat| u64::try_from(self.sum(&vcpus, stat)).unwrap_or(0);
        Stats {
            pages: [get(Stat::Pages4K), get(Stat::Pages2M), get(Stat::Pages1G)],
            tables: get(Stat::Tables),
            fixed: get(Stat::Fixed),
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
            flushes: get(Stat::Flushes),
            roots_made: get(Stat::RootsMade),
            roots_invalidated: get(Stat::RootsInvalidated),
            garbage: tdp_rcu::Counters::default(),
        }
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
    /// Flushes asked of the host.
    pub flushes: u64,
    /// Root tables made.
    pub roots_made: u64,
    /// Root tables made obsolete.
    pub roots_invalidated: u64,
    /// What waits for a grace period, counted in frames.
    pub garbage: tdp_rcu::Counters,
}
