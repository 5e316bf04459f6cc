//! The trusted modules that a confidential guest can be put on.
//!
//! * [`Tdx`] is the library's model of the TDX module: it refuses what the real one refuses, its locks are busy, and it keeps
//!   an audit log. It has a guest's side.
//! * [`Null`] does nothing: what is left of a fault on it is the library's own time. It needs links, so that the library does
//!   all that it does for TDX. It keeps no table, so there is nothing to compare with.

use super::conditions::{Conditions, Injected, TdxConditions, may_fail};
use super::layout::Layout;
use crate::report::Error;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use tdp::protected::tdx::{TdConfig, TdVcpu, TdxConfig, TdxModule, TdxTable};
use tdp::protected::{
    Capabilities, Content, Drained, Failure, HandOffStep, Inspected, Scope, Ticket,
};
use tdp::{EntryPlace, FrozenEntry, Level, OutOfFrames, Pfn, ProtectedTable, TlbTracker};

/// Which module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BackendChoice {
    /// The model of the TDX module
    Tdx,
    /// A module that does nothing
    Null,
}

/// A trusted module with one guest.
pub trait Backend: ProtectedTable + Sized {
    /// How it is to be.
    type Options: Copy + Send + Sync;

    /// A module for a guest of `layout`.
    ///
    /// # Errors
    ///
    /// If it does not take that much memory or that many vCPUs.
    fn make(
        layout: &Layout,
        options: Self::Options,
        tlb: TlbTracker,
        conditions: Arc<Conditions>,
    ) -> Result<Self, Error>;

    /// Calls so far that a correct host never makes, if it keeps a log.
    fn violations(&self) -> Option<u64>;

    /// Whether [`inspect`](ProtectedTable::inspect) tells what is in the table.
    fn keeps_a_table(&self) -> bool;

    /// Pages, the guest's and tables, that the module has still or that are lost between it and the host. No vCPU is left.
    fn kept(&self) -> u64;
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How the model of the TDX module is to be.
#[derive(Clone, Copy, Debug)]
pub struct TdxOptions {
    /// Tell the library that blocks exclude each other, so that it has one thread carry the removals of all.
    pub combine: bool,
}

impl Default for TdxOptions {
    fn default() -> Self {
        Self { combine: true }
    }
}

/// The model of the TDX module, with one TD.
#[derive(Debug)]
pub struct Tdx {
    table: TdxTable,
    module: TdxModule,
    options: TdxOptions,
    vcpus: Mutex<Vec<TdVcpu>>,
    /// Pages of the TD before the first was given to it as memory.
    own_pages: u64,
}

impl Tdx {
    /// The module.
    pub fn module(&self) -> &TdxModule {
        &self.module
    }

    /// The hook.
    pub fn table(&self) -> &TdxTable {
        &self.table
    }

    /// A vCPU of the TD that nobody has taken yet.
    pub fn take_vcpu(&self) -> Option<TdVcpu> {
        lock(&self.vcpus).pop()
    }

    /// Gives a vCPU back.
    pub fn return_vcpu(&self, vcpu: TdVcpu) {
        lock(&self.vcpus).push(vcpu);
    }

    /// Releases the TD's key. All its vCPUs have been given back.
    ///
    /// # Errors
    ///
    /// What the module answers.
    pub fn release_key(&self) -> Result<(), Error> {
        for vcpu in &mut *lock(&self.vcpus) {
            // One that never entered has nothing to be flushed.
            let _ = vcpu.flush();
        }
        let td = self.table.td();
        for answer in [
            td.mng_vpflushdone(),
            td.phymem_cache_wb(),
            td.mng_key_freeid(),
        ] {
            if !answer.is_success() {
                return Err(Error::run("release of the key", answer.to_string()));
            }
        }
        Ok(())
    }
}

impl Backend for Tdx {
    type Options = TdxOptions;

    fn make(
        layout: &Layout,
        options: TdxOptions,
        tlb: TlbTracker,
        conditions: Arc<Conditions>,
    ) -> Result<Self, Error> {
        let failed = |what: &dyn std::fmt::Display| Error::run("TDX module", what.to_string());
        let module =
            TdxModule::with_hooks(TdxConfig::new(layout.module()), TdxConditions(conditions))
                .map_err(|e| failed(&e))?;
        let page = |n| layout.control(n).address();
        let td = module
            .create_td(TdConfig::new(page(0), page(1), page(2)))
            .map_err(|answer| failed(&answer))?;
        let begun = td.mng_init();
        if !begun.is_success() {
            return Err(failed(&begun));
        }
        let vcpus = (0..u64::from(layout.vcpus))
            .map(|n| td.vp_create(page(3 + n)))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|answer| failed(&answer))?;
        let own_pages = td.child_count();
        Ok(Self {
            table: TdxTable::new(td, tlb, layout.twins()),
            module,
            options,
            vcpus: Mutex::new(vcpus),
            own_pages,
        })
    }

    fn violations(&self) -> Option<u64> {
        Some(self.module.violation_count())
    }

    fn keeps_a_table(&self) -> bool {
        true
    }

    fn kept(&self) -> u64 {
        let pages = self.table.td().child_count() - self.own_pages;
        pages.max(self.table.twins_out() as u64)
    }
}

/// The model's own hook, but for what it says of itself.
impl ProtectedTable for Tdx {
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = self.table.capabilities();
        capabilities.serialises_block &= self.options.combine;
        capabilities
    }

    fn allocate_twins(&self, out: &mut [Pfn]) -> Result<usize, OutOfFrames> {
        self.table.allocate_twins(out)
    }

    fn free_twins(&self, twins: &[Pfn]) {
        self.table.free_twins(twins);
    }

    fn donate(&self, pages: u32) -> Result<(), OutOfFrames> {
        self.table.donate(pages)
    }

    fn kick(&self) {
        self.table.kick();
    }

    fn link(&self, entry: &FrozenEntry<'_>, twin: Pfn) -> Result<(), Failure> {
        self.table.link(entry, twin)
    }

    fn install(&self, entry: &FrozenEntry<'_>, page: Pfn, content: Content) -> Result<(), Failure> {
        self.table.install(entry, page, content)
    }

    fn block(&self, entry: &FrozenEntry<'_>) -> Result<(), Failure> {
        self.table.block(entry)
    }

    fn flush_begin(&self) -> Result<Ticket, Failure> {
        self.table.flush_begin()
    }

    fn flush_poll(&self, ticket: Ticket) -> Result<Drained, Ticket> {
        self.table.flush_poll(ticket)
    }

    fn unblock(&self, entry: &FrozenEntry<'_>, drained: &Drained) -> Result<(), Failure> {
        self.table.unblock(entry, drained)
    }

    fn remove(&self, entry: &FrozenEntry<'_>, drained: &Drained) -> Result<(), Failure> {
        self.table.remove(entry, drained)
    }

    fn unlink(&self, entry: &FrozenEntry<'_>, drained: &Drained) -> Result<(), Failure> {
        self.table.unlink(entry, drained)
    }

    fn split(&self, entry: &FrozenEntry<'_>, twin: Pfn, drained: &Drained) -> Result<(), Failure> {
        self.table.split(entry, twin, drained)
    }

    fn merge(&self, entry: &FrozenEntry<'_>, drained: &Drained) -> Result<(), Failure> {
        self.table.merge(entry, drained)
    }

    fn finalise(&self) -> Result<(), Failure> {
        self.table.finalise()
    }

    fn reclaim(&self, page: Pfn, level: Level) -> Result<(), Failure> {
        self.table.reclaim(page, level)
    }

    fn leaked(&self, page: Pfn, level: Level) {
        self.table.leaked(page, level);
    }

    fn inspect(&self, place: EntryPlace) -> Inspected {
        self.table.inspect(place)
    }
}

/// How the null module is to be.
#[derive(Clone, Copy, Debug, Default)]
pub struct NullOptions {
    /// Have what is removed blocked first, with a ticket in between.
    pub needs_block: bool,
}

/// A module that does nothing.
#[derive(Debug)]
pub struct Null {
    options: NullOptions,
    conditions: Arc<Conditions>,
    twins: Mutex<Twins>,
    limit: usize,
}

#[derive(Debug)]
struct Twins {
    fresh: Range<Pfn>,
    returned: Vec<Pfn>,
}

impl Null {
    #[inline(always)]
    fn call(&self, step: HandOffStep) -> Result<(), Failure> {
        match self.conditions.refuse(may_fail(step)) {
            None => {
                self.conditions.spend();
                Ok(())
            }
            Some(Injected::Busy) => Err(Failure::Busy {
                scope: Scope::Entry,
            }),
            Some(Injected::Failed) => Err(Failure::Refused(1)),
        }
    }
}

impl Backend for Null {
    type Options = NullOptions;

    fn make(
        layout: &Layout,
        options: NullOptions,
        _tlb: TlbTracker,
        conditions: Arc<Conditions>,
    ) -> Result<Self, Error> {
        let twins = layout.twins();
        Ok(Self {
            options,
            conditions,
            limit: (twins.end.0 - twins.start.0) as usize,
            twins: Mutex::new(Twins {
                fresh: twins,
                returned: Vec::new(),
            }),
        })
    }

    fn violations(&self) -> Option<u64> {
        None
    }

    fn keeps_a_table(&self) -> bool {
        false
    }

    fn kept(&self) -> u64 {
        let twins = lock(&self.twins);
        let fresh = (twins.fresh.end.0 - twins.fresh.start.0) as usize;
        (self.limit - fresh - twins.returned.len()) as u64
    }
}

impl ProtectedTable for Null {
    fn capabilities(&self) -> Capabilities {
        let capabilities = Capabilities::none()
            .needs_link()
            .split_live()
            .merge()
            .leaves(Level::L1, Level::L2);
        if self.options.needs_block {
            capabilities.needs_block().parallel_tickets()
        } else {
            capabilities
        }
    }

    fn allocate_twins(&self, out: &mut [Pfn]) -> Result<usize, OutOfFrames> {
        let mut twins = lock(&self.twins);
        let mut count = 0;
        for slot in out.iter_mut() {
            *slot = match twins.returned.pop() {
                Some(twin) => twin,
                None if twins.fresh.start < twins.fresh.end => {
                    let twin = twins.fresh.start;
                    twins.fresh.start = Pfn(twin.0 + 1);
                    twin
                }
                None => break,
            };
            count += 1;
        }
        if count == 0 {
            return Err(OutOfFrames { limit: self.limit });
        }
        Ok(count)
    }

    fn free_twins(&self, twins: &[Pfn]) {
        lock(&self.twins).returned.extend_from_slice(twins);
    }

    #[inline(always)]
    fn link(&self, _: &FrozenEntry<'_>, _: Pfn) -> Result<(), Failure> {
        self.call(HandOffStep::Link)
    }

    #[inline(always)]
    fn install(&self, _: &FrozenEntry<'_>, _: Pfn, _: Content) -> Result<(), Failure> {
        self.call(HandOffStep::Install)
    }

    fn block(&self, _: &FrozenEntry<'_>) -> Result<(), Failure> {
        self.call(HandOffStep::Block)
    }

    fn flush_begin(&self) -> Result<Ticket, Failure> {
        self.call(HandOffStep::Flush)?;
        Ok(Ticket::new(0))
    }

    fn unblock(&self, _: &FrozenEntry<'_>, _: &Drained) -> Result<(), Failure> {
        self.call(HandOffStep::Unblock)
    }

    fn remove(&self, _: &FrozenEntry<'_>, _: &Drained) -> Result<(), Failure> {
        self.call(HandOffStep::Remove)
    }

    fn unlink(&self, _: &FrozenEntry<'_>, _: &Drained) -> Result<(), Failure> {
        self.call(HandOffStep::Unlink)
    }

    fn split(&self, _: &FrozenEntry<'_>, _: Pfn, _: &Drained) -> Result<(), Failure> {
        self.call(HandOffStep::Split)
    }

    fn merge(&self, _: &FrozenEntry<'_>, _: &Drained) -> Result<(), Failure> {
        self.call(HandOffStep::Merge)
    }

    fn reclaim(&self, _: Pfn, _: Level) -> Result<(), Failure> {
        self.call(HandOffStep::Reclaim)
    }

    fn inspect(&self, _: EntryPlace) -> Inspected {
        Inspected::Free
    }
}
