//! Model of Intel's TDX module, Secure-EPT side: an executable specification.
//!
//! A [`TdxModule`] manages a range of physical memory and any number of [`Td`]s. A TD's private memory is mapped by a
//! Secure EPT that lives in pages which the host gave away; the host changes it through calls, each of which answers a
//! status, the operand that it is about, and two registers ([`Answer`]). The model answers what the module answers
//! (TDX module 1.5.01), call by call:
//!
//! * **entries** (`state`): real words in real table pages, walked by [`tdp_arch::walker::EptWalker`];
//! * **pages** (`pamt`, `memory`): every physical page has one use and one owner;
//! * **life** (`lifecycle`, `calls`): what a TD admits while it is built, runs, is paused, migrates, is torn down;
//! * **locks** (`locks`): all are tried, none is waited for, so that calls that meet answer `OPERAND_BUSY` as the real
//!   ones do; nothing else is shared between calls;
//! * **TLB tracking** (`epoch`): nothing is taken from a running TD while a vCPU may still hold a translation;
//! * **the guest** (`guest`): entry and exit, the zero-step rule, ACCEPT.
//!
//! [`TdxTable`] drives it from an MMU: the hook in terms of its calls.
//!
//! A call that is refused has changed nothing. One that a correct host never makes is noted in the audit log
//! ([`TdxModule::violations`]).
//!
//! Left out: nested (L2) tables, export and import but for the states they lead to, page relocation, debug TDs, the
//! content of pages, and the value of the measurement (its order is kept).
//!
//! ```
//! use tdp::protected::tdx::{PageInfo, Status, TdConfig, TdxConfig, TdxModule};
//! use tdp::{Gpa, Hpa, Level, Pfn};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let module = TdxModule::new(TdxConfig::new(Pfn(0x1000)..Pfn(0x2000)))?;
//! let page = |n: u64| Hpa((0x1000 + n) << 12);
//! let td = module.create_td(TdConfig::new(page(0), page(1), page(2))).map_err(|a| a.to_string())?;
//! assert!(td.mng_init().is_success());
//!
//! // Parents before children: the walk ends at level 3, the root of a four-level tree.
//! let entry = |level| PageInfo::new(Gpa(0), level);
//! let early = td.mem_page_aug(entry(Level::L1), page(9));
//! assert_eq!((early.status, early.rdx), (Status::EptWalkFailed, Some(3)));
//! assert_eq!(module.violation_count(), 1);
//!
//! for (n, level) in [(3, Level::L4), (4, Level::L3), (5, Level::L2)] {
//!     assert!(td.mem_sept_add(entry(level), page(n)).is_success());
//! }
//! assert!(td.mem_page_aug(entry(Level::L1), page(9)).is_success());
//! # Ok(())
//! # }
//! ```

mod audit;
mod calls;
mod cost;
mod epoch;
mod guest;
mod lifecycle;
mod locks;
mod memory;
mod pamt;
mod sept;
mod state;
mod status;
mod table;
mod td;

pub use audit::{KEPT, Violation};
pub use calls::Call;
pub use cost::{Costs, Hooks, Wait};
pub use guest::{Accept, Enter, Entered, EptExit, Exit, TdVcpu, ZERO_STEP_FAULTS};
pub use lifecycle::{Lifecycle, OpState};
pub use pamt::PageKind;
pub use sept::EntryView;
pub use state::{EntryState, PageInfo};
pub use status::{Answer, Operand, Status};
pub use table::TdxTable;
pub use td::{CallCount, CallCounts, Measured, TdConfig};

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;
use locks::Mode;
use memory::Memory;
use state::Entry;
use status::Refusal;
use td::TdInner;
use tdp_arch::walker::{EptConfig, EptWalker, PhysicalMemory};
use tdp_arch::{Hpa, Level, Pfn};
use tdp_rcu::sync::Ordering;

/// How to make a module.
#[derive(Clone, Debug)]
pub struct TdxConfig {
    /// Physical memory that can be given to TDs.
    pub memory: Range<Pfn>,
    /// What calls cost.
    pub costs: Costs,
}

impl TdxConfig {
    /// A module of this memory whose calls cost nothing.
    pub fn new(memory: Range<Pfn>) -> Self {
        Self {
            memory,
            costs: Costs::default(),
        }
    }
}

/// A module cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// No memory, or more than can be managed.
    #[error("frames {:?} cannot be managed: there must be 1 to {} of them", .0, Memory::LIMIT)]
    Memory(Range<Pfn>),
}

struct Module {
    memory: Memory,
    costs: Costs,
    hooks: Box<dyn Hooks>,
    log: audit::Log,
}

impl fmt::Debug for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Module")
            .field("costs", &self.costs)
            .field("violations", &self.log.count())
            .finish_non_exhaustive()
    }
}

/// A TDX module. Clones are the same module.
///
/// It is [`PhysicalMemory`]: what the processor finds when it walks a Secure EPT.
#[derive(Clone, Debug)]
pub struct TdxModule {
    inner: Arc<Module>,
}

/// A trust domain. Clones are the same TD. Its methods are the calls, in the module's names.
#[derive(Clone, Debug)]
pub struct Td {
    inner: Arc<TdInner>,
}

impl TdxModule {
    /// A module without TDs.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if the memory makes no sense.
    pub fn new(config: TdxConfig) -> Result<Self, ConfigError> {
        Self::with_hooks(config, ())
    }

    /// The same, with hooks into its calls.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_hooks(config: TdxConfig, hooks: impl Hooks + 'static) -> Result<Self, ConfigError> {
        let memory =
            Memory::new(config.memory.clone()).ok_or(ConfigError::Memory(config.memory))?;
        let inner = Module {
            memory,
            costs: config.costs,
            hooks: Box::new(hooks),
            log: audit::Log::default(),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Makes a TD from free pages, with its key: TDH.MNG.CREATE, KEY.CONFIG and ADDCX in one.
    ///
    /// # Errors
    ///
    /// The answer, if it is not a success. Nothing is taken then.
    pub fn create_td(&self, config: TdConfig) -> Result<Td, Answer> {
        self.try_create(config).map_err(|refusal| Answer {
            status: refusal.status,
            operand: refusal.operand,
            rcx: None,
            rdx: None,
        })
    }

    fn try_create(&self, config: TdConfig) -> Result<Td, Refusal> {
        let invalid = Refusal::new(Status::OperandInvalid, Operand::RDX);
        if !(32..52).contains(&config.shared_bit) {
            return Err(invalid);
        }
        // Secure EPT is walked without accessed and dirty flags; a bit of them is part of an entry's state.
        let walker = EptWalker::new(EptConfig {
            root_level: config.levels,
            accessed_dirty: false,
            ..EptConfig::default()
        })
        .map_err(|_| invalid)?;
        let memory = &self.inner.memory;
        let lock = |page| {
            memory
                .lock_page(page, Level::L1, Mode::Exclusive, PageKind::Nda)
                .map_err(|status| Refusal::new(status, Operand::RCX))
        };
        let (tdr, control, root) = (lock(config.tdr)?, lock(config.control)?, lock(config.root)?);
        let table = memory.table(config.root).ok_or(invalid)?;
        table.fill(|_| Entry::FREE);
        tdr.entry().assign(PageKind::Tdr, config.tdr);
        control.entry().assign(PageKind::Tdcx, config.tdr);
        root.entry().assign(PageKind::Tdcx, config.tdr);
        let inner = TdInner::new(self.inner.clone(), config, walker);
        Ok(Td {
            inner: Arc::new(inner),
        })
    }

    /// What a physical page is used for, and the size of the page that it lies in; `None` if it is not managed.
    pub fn page_kind(&self, page: Hpa) -> Option<(PageKind, Level)> {
        let data = self.inner.memory.metadata(page.pfn())?;
        [Level::L3, Level::L2, Level::L1]
            .into_iter()
            .map(|level| (data.at(level).kind(), level))
            .find(|(kind, level)| *kind != PageKind::Nda || *level == Level::L1)
    }

    /// Calls so far that a correct host never makes.
    pub fn violation_count(&self) -> u64 {
        self.inner.log.count()
    }

    /// The first [`KEPT`] of them.
    pub fn violations(&self) -> Vec<Violation> {
        self.inner.log.notes()
    }

    /// The same, and begins the log anew.
    pub fn take_violations(&self) -> Vec<Violation> {
        self.inner.log.take()
    }
}

impl PhysicalMemory for TdxModule {
    fn load(&self, hpa: Hpa) -> Option<u64> {
        self.inner.memory.load(hpa)
    }

    fn compare_exchange(&self, hpa: Hpa, current: u64, new: u64) -> Result<(), u64> {
        self.inner.memory.compare_exchange(hpa, current, new)
    }
}

impl Td {
    /// Its module.
    pub fn module(&self) -> TdxModule {
        TdxModule {
            inner: self.inner.module.clone(),
        }
    }

    /// Its root page, which names it.
    pub fn tdr(&self) -> Hpa {
        self.inner.tdr
    }

    /// Level of the root table.
    pub fn levels(&self) -> Level {
        self.inner.levels
    }

    /// Life cycle.
    pub fn lifecycle(&self) -> Lifecycle {
        self.inner.lifecycle()
    }

    /// Operational state.
    pub fn op_state(&self) -> OpState {
        self.inner.op_state()
    }

    /// TLB-tracking epoch.
    pub fn epoch(&self) -> u64 {
        self.inner.epochs.current()
    }

    /// 4 KiB pages that belong to it, its root page not counted: control structure, root table, vCPUs, tables, pages.
    pub fn child_count(&self) -> u64 {
        self.inner.child_count()
    }

    /// The measurement so far, in order.
    pub fn measured(&self) -> Vec<Measured> {
        self.inner.measured.lock().clone()
    }

    /// How often each call was made.
    pub fn call_counts(&self) -> CallCounts {
        self.inner.counts.read()
    }

    /// Has the next `polls` polls for an interrupt of the host find one.
    pub fn pend_interrupts(&self, polls: u32) {
        self.inner.interrupts.store(polls, Ordering::Relaxed);
    }
}
