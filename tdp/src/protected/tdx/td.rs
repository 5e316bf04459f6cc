//! One TD: its states, its locks, its counters.
//!
//! Protocol. What a TD is made of is reached through its root page, whose metadata lock every call takes first. Life
//! cycle and operational state change only under that lock held exclusively, or under their own lock; everything else
//! has a lock of its own or is one atomic word.

use super::calls::Call;
use super::epoch::Epochs;
use super::lifecycle::{Lifecycle, OpState};
use super::locks::ShareLock;
use super::memory::Memory;
use super::status::{Answer, Status};
use super::{Module, sept};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use tdp_arch::walker::EptWalker;
use tdp_arch::{Gpa, Hpa, Level};
use tdp_rcu::sync::{AtomicU32, AtomicU64, Mutex, Ordering, Plain};

/// What a TD is made of: free pages, and the shape of its address space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TdConfig {
    /// Page for the TD's root (TDR); names the TD in calls.
    pub tdr: Hpa,
    /// Page for its control structure. The real module wants several.
    pub control: Hpa,
    /// Page for the root table of its Secure EPT.
    pub root: Hpa,
    /// Level of the root table, [`Level::L4`] or [`Level::L5`].
    pub levels: Level,
    /// GPA bit that is set in shared addresses; 47 or 51.
    pub shared_bit: u32,
}

impl TdConfig {
    /// Four levels, and bit 47 for shared addresses.
    pub const fn new(tdr: Hpa, control: Hpa, root: Hpa) -> Self {
        Self {
            tdr,
            control,
            root,
            levels: Level::L4,
            shared_bit: 47,
        }
    }
}

/// A step of the measurement of the initial image, in the order in which it was made.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Measured {
    /// A page was added, with the content of a source page.
    Page {
        /// Where.
        gpa: Gpa,
        /// The source page.
        source: Hpa,
    },
    /// 256 bytes of content were measured.
    Chunk {
        /// Where.
        gpa: Gpa,
    },
    /// The measurement was closed.
    Final,
}

/// How often a call was made and what became of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CallCount {
    /// Made, whatever the answer.
    pub made: u64,
    /// Done.
    pub done: u64,
    /// Answered `OPERAND_BUSY`, `OPERAND_BUSY_HOST_PRIORITY` or `PREVIOUS_TLB_EPOCH_BUSY`.
    pub busy: u64,
}

/// Counts of all calls of a TD.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CallCounts([CallCount; Call::COUNT]);

impl CallCounts {
    /// Of one call.
    pub const fn of(&self, call: Call) -> CallCount {
        self.0[call.index()]
    }

    /// Of all calls of the host together.
    pub fn of_host(&self) -> CallCount {
        let mut sum = CallCount::default();
        for call in Call::ALL.into_iter().filter(|call| call.is_of_host()) {
            let one = self.of(call);
            sum.made += one.made;
            sum.done += one.done;
            sum.busy += one.busy;
        }
        sum
    }
}

const KINDS: usize = 3;

/// The same, being counted.
#[derive(Debug)]
pub(crate) struct Counts(Box<[Plain]>);

impl Counts {
    fn new() -> Self {
        Self(Plain::zeroed(Call::COUNT * KINDS))
    }

    pub(crate) fn note(&self, call: Call, answer: &Answer) {
        let base = call.index() * KINDS;
        self.0[base].add_shared(1);
        match answer.status {
            Status::Success => self.0[base + 1].add_shared(1),
            Status::OperandBusy
            | Status::OperandBusyHostPriority
            | Status::PreviousTlbEpochBusy => self.0[base + 2].add_shared(1),
            _ => {}
        }
    }

    pub(crate) fn read(&self) -> CallCounts {
        let mut counts = [CallCount::default(); Call::COUNT];
        for (count, words) in counts.iter_mut().zip(self.0.chunks_exact(KINDS)) {
            count.made = words[0].get();
            count.done = words[1].get();
            count.busy = words[2].get();
        }
        CallCounts(counts)
    }
}

/// A TD.
#[derive(Debug)]
pub(crate) struct TdInner {
    pub(crate) module: Arc<Module>,
    pub(crate) tdr: Hpa,
    pub(crate) root: Hpa,
    pub(crate) levels: Level,
    pub(crate) walker: EptWalker,
    shared_bit: u32,
    lifecycle: AtomicU32,
    op_state: AtomicU32,
    pub(crate) op_state_lock: ShareLock,
    pub(crate) tree_lock: ShareLock,
    pub(crate) epochs: Epochs,
    /// 4 KiB pages that belong to the TD, its root page not counted.
    pub(crate) children: AtomicU64,
    pub(crate) vcpus: AtomicU32,
    pub(crate) associated: AtomicU32,
    /// Caches were written back since the last vCPU was flushed.
    pub(crate) written_back: AtomicU32,
    /// Polls for an interrupt that are still to find one.
    pub(crate) interrupts: AtomicU32,
    pub(crate) measured: Mutex<Vec<Measured>>,
    pub(crate) counts: Counts,
}

impl TdInner {
    /// A TD whose pages are assigned and whose root table is free throughout.
    pub(crate) fn new(module: Arc<Module>, config: TdConfig, walker: EptWalker) -> Self {
        Self {
            module,
            tdr: config.tdr,
            root: config.root,
            levels: config.levels,
            walker,
            shared_bit: config.shared_bit,
            lifecycle: AtomicU32::new(Lifecycle::KeysConfigured as u32),
            op_state: AtomicU32::new(OpState::Uninitialized as u32),
            op_state_lock: ShareLock::new(),
            tree_lock: ShareLock::new(),
            epochs: Epochs::new(),
            children: AtomicU64::new(2),
            vcpus: AtomicU32::new(0),
            associated: AtomicU32::new(0),
            written_back: AtomicU32::new(0),
            interrupts: AtomicU32::new(0),
            measured: Mutex::new(Vec::new()),
            counts: Counts::new(),
        }
    }

    pub(crate) fn memory(&self) -> &Memory {
        &self.module.memory
    }

    pub(crate) fn lifecycle(&self) -> Lifecycle {
        // Acquire: pairs with `set_lifecycle`.
        Lifecycle::of(self.lifecycle.load(Ordering::Acquire))
    }

    /// The caller holds the root page exclusively.
    pub(crate) fn set_lifecycle(&self, to: Lifecycle) {
        self.lifecycle.store(to as u32, Ordering::Release);
    }

    pub(crate) fn op_state(&self) -> OpState {
        // Acquire: pairs with `set_op_state`.
        OpState::of(self.op_state.load(Ordering::Acquire))
    }

    /// The caller holds the root page or the operational state exclusively.
    pub(crate) fn set_op_state(&self, to: OpState) {
        self.op_state.store(to as u32, Ordering::Release);
    }

    /// Whether a GPA is a private one that the tree can map.
    pub(crate) fn is_private(&self, gpa: Gpa) -> bool {
        gpa.0 >> self.shared_bit == 0 && gpa.gfn() < self.levels.gfn_limit()
    }

    /// Whether an interrupt waits for the host at this poll.
    pub(crate) fn is_interrupted(&self) -> bool {
        self.interrupts
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |polls| {
                polls.checked_sub(1)
            })
            .is_ok()
    }

    /// Counts pages of the TD up.
    pub(crate) fn adopt(&self, pages: u64) {
        self.children.fetch_add(pages, Ordering::Relaxed);
    }

    /// Counts pages of the TD down.
    pub(crate) fn disown(&self, pages: u64) {
        // Release: pairs with the Acquire of whoever finds the count at zero and takes the root page.
        self.children.fetch_sub(pages, Ordering::Release);
    }

    /// Pages of the TD, its root page not counted.
    pub(crate) fn child_count(&self) -> u64 {
        self.children.load(Ordering::Acquire)
    }

    pub(crate) fn walk(&self, gpa: Gpa, level: Level) -> Option<sept::Walked<'_>> {
        sept::walk(self.memory(), self.root, self.levels, gpa, level)
    }
}
