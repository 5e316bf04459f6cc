//! TLB tracking: which vCPUs may hold a translation from before an entry was blocked.
//!
//! Protocol. The TD has an epoch, from 1 on, and two counts of vCPUs inside, for even and for odd epochs. A vCPU enters
//! in the current epoch, counts itself there, and drops its translations first if that is not its last one; it leaves the
//! count of its own epoch. TRACK advances the epoch unless somebody is still inside since the one before. BLOCK writes
//! the entry, then stamps the page with the epoch. A stamp is *tracked* if it lies two epochs back, or one back with
//! nobody left inside of it.
//!
//! Epoch and counts are one word, so that whoever looks sees one moment. Every access is a read-modify-write or an
//! Acquire load: the read-modify-writes form one chain, in which a vCPU that enters in a later epoch than a stamp comes
//! after the BLOCK that made it, and so walks the blocked entry.

use super::locks::ShareLock;
use tdp_rcu::sync::{AtomicU64, Ordering};

const COUNT_BITS: u32 = 14;
const COUNT: u64 = (1 << COUNT_BITS) - 1;
const EPOCH_SHIFT: u32 = 2 * COUNT_BITS;
const ONE_EPOCH: u64 = 1 << EPOCH_SHIFT;
const LAST_EPOCH: u64 = u64::MAX >> EPOCH_SHIFT;

/// Where the tracking of a stamp stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Tracking {
    Done,
    /// A vCPU that may hold the translation has yet to leave.
    Pending,
    /// No TRACK since the stamp: waiting does not help.
    NotBegun,
}

/// Epoch and counts of one TD.
#[derive(Debug)]
pub(crate) struct Epochs {
    /// Shared by those who enter, exclusive for TRACK.
    pub(crate) lock: ShareLock,
    word: AtomicU64,
}

const fn slot(epoch: u64) -> u32 {
    (epoch & 1) as u32 * COUNT_BITS
}

const fn epoch_of(word: u64) -> u64 {
    word >> EPOCH_SHIFT
}

const fn inside(word: u64, epoch: u64) -> u64 {
    word >> slot(epoch) & COUNT
}

impl Epochs {
    pub(crate) fn new() -> Self {
        Self {
            lock: ShareLock::new(),
            word: AtomicU64::new(ONE_EPOCH),
        }
    }

    /// Counts one more vCPU inside and returns the epoch in which it is; `None` if no more can be counted. The caller
    /// holds the lock shared.
    pub(crate) fn enter(&self) -> Option<u64> {
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            let epoch = epoch_of(word);
            if inside(word, epoch) == COUNT {
                return None;
            }
            // AcqRel: a link of the chain. A loser lost to another vCPU that entered or left.
            match self.word.compare_exchange_weak(
                word,
                word + (1 << slot(epoch)),
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(epoch),
                Err(found) => word = found,
            }
        }
    }

    /// Takes a vCPU that entered in `epoch` out of the count.
    pub(crate) fn exit(&self, epoch: u64) {
        // AcqRel: whoever sees the count without it sees what the vCPU did inside as done.
        self.word.fetch_sub(1 << slot(epoch), Ordering::AcqRel);
    }

    /// Whether the epoch may advance: nobody is inside since the one before, and epochs are left. The caller holds the
    /// lock exclusively, so that only leaving can change it.
    pub(crate) fn may_advance(&self) -> bool {
        let word = self.word.load(Ordering::Acquire);
        let epoch = epoch_of(word);
        inside(word, epoch + 1) == 0 && epoch < LAST_EPOCH
    }

    /// Advances the epoch. The caller holds the lock exclusively and has asked.
    pub(crate) fn advance(&self) {
        // AcqRel: a link of the chain.
        self.word.fetch_add(ONE_EPOCH, Ordering::AcqRel);
    }

    /// The epoch, for a stamp: after this, whoever enters in a later epoch sees what the caller wrote before.
    pub(crate) fn stamp(&self) -> u64 {
        // A read-modify-write although nothing changes. Release: a vCPU that enters later in the chain acquires it and
        // walks the entry that was blocked before. A plain load could be ordered before that write, and then a vCPU
        // that enters after the next TRACK, with the stamp looking old enough, could still walk the entry unblocked.
        epoch_of(self.word.fetch_add(0, Ordering::AcqRel))
    }

    /// Where the tracking of `stamp` stands.
    pub(crate) fn tracking(&self, stamp: u64) -> Tracking {
        // Acquire: pairs with the exits that emptied the count.
        let word = self.word.load(Ordering::Acquire);
        let epoch = epoch_of(word);
        if stamp >= epoch {
            Tracking::NotBegun
        } else if stamp + 1 < epoch || inside(word, stamp) == 0 {
            Tracking::Done
        } else {
            Tracking::Pending
        }
    }

    /// The epoch now.
    pub(crate) fn current(&self) -> u64 {
        epoch_of(self.word.load(Ordering::Relaxed))
    }
}
