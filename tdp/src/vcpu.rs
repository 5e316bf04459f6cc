//! One vCPU's end of the MMU: everything that a fault needs and nobody else writes.
//!
//! Protocol. A [`Vcpu`] is used by one thread at a time. Its tables are topped up *outside* the critical section, so a
//! fault never allocates inside one. Its critical section is its own word of the epoch domain, with what the common faults
//! count beside it; its other counters, its cache and its memo are its own memory (INV: no-shared-write). Its root is counted: the tree under it stays walkable,
//! even when it is obsolete, until [`Vcpu::load_root`] takes the next one. So are the roots that it has left for another
//! address space or another kind of tree, until it finds them obsolete.

use crate::dirty::DirtyRing;
use crate::event;
use crate::fault::{Fault, FaultError, MemoryFault, Outcome, RetryReason};
use crate::host::{AddressSpaceId, FrameSource, Host, Mapping, OutOfFrames, SharedHost};
use crate::memo::{Memo, Tables, Wish};
use crate::mmu::{MmuError, Shared};
use crate::private_fault::SentBack;
use crate::protected::{Capabilities, ProtectedTable};
use crate::resolve::{Fast, Resolution};
use crate::root::{CachedRoot, LoadedRoot, Root, RootCache};
use crate::slots::{Slot, Snapshot};
use crate::stats::{Shard, Stat, Tally};
use crate::table::{self, TableCache, TableState};
use alloc::sync::Arc;
use tdp_arch::{Access, AdBits, Format, Gfn, Gpa, Level};
use tdp_rcu::{Notes, Reader, Section};

/// Tables that one fault may need: one for each level below a root of level 5, and one to spare.
const TABLES_PER_FAULT: usize = 5;
/// Tables asked for at a time.
const TOP_UP: usize = 16;
/// Rounds of driving reclamation before an allocation gives up.
pub(crate) const RECLAIM_ROUNDS: usize = 128;

/// One vCPU. Made by [`Mmu::vcpu`](crate::Mmu::vcpu); may move between threads, but not be shared.
///
/// Aligned to two cache lines, so that neither of two vCPUs side by side in memory slows the other.
// In this order, so that all that the common fault reads of it is in the first line, but for one remembered table.
#[repr(C, align(128))]
pub struct Vcpu<F: Format, H: Host> {
    pub(crate) reader: Reader,
    pub(crate) core: VcpuCore<F, H>,
}

/// The part of a vCPU that works inside a critical section.
#[repr(C)]
pub(crate) struct VcpuCore<F: Format, H: Host> {
    pub(crate) memo: Memo<H::Backing>,
    pub(crate) ctx: Context<F, H>,
    pub(crate) tables: Tables,
    /// Roots that were left and may be wanted again.
    left: RootCache<H>,
    pub(crate) cache: TableCache,
    /// Pages to be given to the module as twins of tables.
    pub(crate) twins: TableCache,
    /// The private faults that were last sent back to the guest unresolved.
    pub(crate) sent_back: SentBack,
}

/// What a fault reads and does not change: where it works, and for whom.
#[repr(C)]
pub(crate) struct Context<F: Format, H: Host> {
    /// The same as `shared`'s, one step nearer.
    pub(crate) host: SharedHost<H>,
    /// What it counts in, and where the common faults do.
    pub(crate) notes: Notes,
    shard: Arc<Shard>,
    pub(crate) root: Arc<Root<H>>,
    /// The root of the private half, if there is one.
    pub(crate) private_root: Option<Arc<Root<H>>>,
    /// What the module of the private half can do.
    pub(crate) capabilities: Capabilities,
    pub(crate) shared: Arc<Shared<F, H>>,
    pub(crate) as_id: AddressSpaceId,
    /// Where it notes the pages that it lets be written, if there are rings.
    pub(crate) ring: Option<Arc<DirtyRing>>,
}

impl<F: Format, H: Host> Tally for Context<F, H> {
    #[inline(always)]
    fn add(&self, stat: Stat, n: i64) {
        self.shard.word(&self.notes, stat).add_owned(n as u64);
    }
}

impl<F: Format, H: Host> Vcpu<F, H> {
    pub(crate) fn new(shared: Arc<Shared<F, H>>) -> Result<Self, MmuError> {
        let as_id = AddressSpaceId::default();
        let root = shared.load_root(as_id, shared.roots.ad_bits())?;
        let private_root = shared.load_private_root(as_id)?;
        let capabilities = shared
            .confidential
            .as_ref()
            .map_or(Capabilities::none(), |confidential| {
                confidential.capabilities
            });
        let reader = shared.domain.reader();
        let notes = reader.notes();
        let shard = shared.shards.vcpu(notes.clone());
        let ring = shared.rings.vcpu();
        let core = VcpuCore {
            memo: Memo::new(private_root.is_some()),
            ctx: Context {
                host: shared.host.clone(),
                notes,
                shard,
                root,
                private_root,
                capabilities,
                shared,
                as_id,
                ring,
            },
            tables: Tables::new(),
            left: RootCache::new(),
            cache: TableCache::new(),
            twins: TableCache::new(),
            sent_back: SentBack::default(),
        };
        Ok(Self { reader, core })
    }

    /// Resolves a fault.
    ///
    /// # Errors
    ///
    /// [`FaultError::OutOfFrames`] if a table may be needed and the frame source has none left, even after a bounded wait for
    /// grace periods that would free some. Nothing was changed.
    #[inline(always)]
    pub fn fault(&mut self, fault: Fault) -> Result<Outcome, FaultError> {
        let Fault {
            gpa,
            access,
            prefetch,
            max_level,
            private,
        } = fault;
        event::page_fault(self.core.ctx.as_id, gpa, access, prefetch);
        if self.core.memo.is_confidential() {
            return self.fault_confidential(gpa, access, max_level, prefetch, private);
        }
        let section = self.reader.enter();
        let straight = self.core.fault_straight(&section, &fault);
        drop(section);
        match straight {
            Some(outcome) => Ok(outcome),
            None => self.fault_bent(gpa, access, max_level, prefetch),
        }
    }

    /// A fault that the memo does not resolve. Takes and returns what fits registers: a fault passed through memory costs as
    /// much as its walk.
    #[inline(never)]
    fn fault_bent(
        &mut self,
        gpa: Gpa,
        access: Access,
        max_level: Level,
        prefetch: bool,
    ) -> Result<Outcome, FaultError> {
        let section = self.reader.enter();
        let fast = self
            .core
            .fault_fast(&section, gpa.gfn(), access, max_level, prefetch);
        drop(section);
        match fast {
            Fast::Fixed(level) => Ok(Outcome::Fixed { level }),
            Fast::Spurious => Ok(Outcome::Spurious),
            Fast::GaveUp => self.fault_slow(Fault {
                gpa,
                access,
                prefetch,
                max_level,
                private: false,
            }),
        }
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn fault_slow(&mut self, fault: Fault) -> Result<Outcome, FaultError> {
        self.core.top_up(true)?;
        let section = self.reader.enter();
        match self.core.resolve(&section, fault) {
            Resolution::Done(outcome) => Ok(outcome),
            Resolution::Sleep(slot, sequence) => {
                drop(section);
                Ok(self.sleep(fault, &slot, sequence))
            }
        }
    }

    #[cold]
    fn sleep(&mut self, fault: Fault, slot: &Arc<Slot<H::Backing>>, sequence: u64) -> Outcome {
        let lookup = self
            .core
            .ctx
            .shared
            .host
            .lookup_blocking(slot, fault.gpa.gfn(), fault.access);
        let section = self.reader.enter();
        self.core
            .resolve_slept(&section, fault, slot, sequence, lookup)
    }

    /// Maps `gfn` as `mapping` says, for `access`, whatever the memory slots say: the bare operation below
    /// [`fault`](Vcpu::fault), for embedders that keep their own books. Of a confidential guest it maps shared memory only.
    /// The leaf's level is at most `mapping.level`,
    /// and less where guest and host frame are not aligned alike.
    ///
    /// # Errors
    ///
    /// As [`fault`](Vcpu::fault).
    #[inline(always)]
    pub fn map(
        &mut self,
        gfn: Gfn,
        mapping: Mapping,
        access: Access,
    ) -> Result<Outcome, FaultError> {
        let section = self.reader.enter();
        let straight = self.core.map_straight(&section, gfn, &mapping, access);
        drop(section);
        match straight {
            Some(outcome) => Ok(outcome),
            None => self.map_bent(gfn, mapping, access),
        }
    }

    #[inline(never)]
    fn map_bent(
        &mut self,
        gfn: Gfn,
        mapping: Mapping,
        access: Access,
    ) -> Result<Outcome, FaultError> {
        let section = self.reader.enter();
        let fast = self.core.map_checked(&section, gfn, mapping, access);
        drop(section);
        match fast {
            Fast::Fixed(level) => Ok(Outcome::Fixed { level }),
            Fast::Spurious => Ok(Outcome::Spurious),
            Fast::GaveUp => self.map_slow(gfn, mapping, access),
        }
    }

    #[cold]
    #[inline(never)]
    fn map_slow(
        &mut self,
        gfn: Gfn,
        mapping: Mapping,
        access: Access,
    ) -> Result<Outcome, FaultError> {
        self.core.top_up(true)?;
        let section = self.reader.enter();
        Ok(self.core.map(&section, gfn, mapping, access))
    }

    /// Begins a batch: one critical section for many faults, renewed at each.
    ///
    /// # Errors
    ///
    /// As [`fault`](Vcpu::fault).
    pub fn batch(&mut self) -> Result<Batch<'_, F, H>, FaultError> {
        self.core.top_up(true)?;
        Ok(Batch {
            section: self.reader.enter(),
            core: &mut self.core,
        })
    }

    /// The address space that this vCPU runs in.
    pub fn address_space(&self) -> AddressSpaceId {
        self.core.ctx.as_id
    }

    /// Runs this vCPU in another address space from its next root on, which is loaded now.
    ///
    /// # Errors
    ///
    /// [`MmuError`] if there is no such space or no frame for its root; the vCPU stays where it was.
    pub fn set_address_space(&mut self, as_id: AddressSpaceId) -> Result<LoadedRoot, MmuError> {
        self.core.switch(as_id, self.core.ctx.root.ad_bits)
    }

    /// Who keeps the accessed and dirty bits of the tree that this vCPU runs on.
    pub fn ad_bits(&self) -> AdBits {
        self.core.ctx.root.ad_bits
    }

    /// Runs this vCPU on a tree of another kind from its next root on, which is loaded now: one whose accessed and dirty
    /// bits the processor keeps, or one whose bits it does not. An address space has one of each, with slots, sweeps and
    /// everything else in common.
    ///
    /// # Errors
    ///
    /// [`MmuError`] if there is no frame for its root; the vCPU stays where it was.
    pub fn set_ad_bits(&mut self, ad_bits: AdBits) -> Result<LoadedRoot, MmuError> {
        self.core.switch(self.core.ctx.as_id, ad_bits)
    }

    /// The root to enter the guest with. Called before every entry: it is the current one unless that has become
    /// obsolete, which costs a look at one flag.
    ///
    /// # Errors
    ///
    /// [`MmuError`] if a new root is needed and there is no frame for it.
    pub fn load_root(&mut self) -> Result<LoadedRoot, MmuError> {
        if self.core.ctx.root.is_obsolete() {
            self.core.renew_root()?;
        }
        Ok(self.core.loaded())
    }

    /// Whether the root that was loaded last has become obsolete. To be asked on the way into the guest, once the vCPU
    /// has made known that it is inside (for instance by [`TlbVcpu::enter`](crate::TlbVcpu::enter)): if so it leaves again
    /// and loads its root anew. Without that look an embedder cannot promise
    /// [`Host::reload_roots`](crate::Host::reload_roots).
    #[inline]
    pub fn is_root_obsolete(&self) -> bool {
        self.core.ctx.root.is_obsolete()
    }
}

impl<F: Format, H: Host> Drop for Vcpu<F, H> {
    fn drop(&mut self) {
        let core = &mut self.core;
        let spare = core.cache.drain();
        for &pfn in spare {
            core.ctx.shared.meta.set_state(pfn, TableState::Free);
        }
        core.ctx.shared.host.frames().free(spare);
        let twins = core.twins.drain();
        if !twins.is_empty() {
            core.ctx.shared.host.protected().free_twins(twins);
        }
        core.ctx.shared.shards.retire(&core.ctx.shard);
    }
}

impl<F: Format, H: Host> core::fmt::Debug for Vcpu<F, H> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Vcpu")
            .field("as_id", &self.core.ctx.as_id)
            .field("spare_tables", &self.core.cache.len())
            .finish()
    }
}

/// Faults under one critical section. Grace periods still pass: the section is renewed at every fault.
pub struct Batch<'a, F: Format, H: Host> {
    pub(crate) section: Section<'a>,
    pub(crate) core: &'a mut VcpuCore<F, H>,
}

impl<F: Format, H: Host> Batch<'_, F, H> {
    /// As [`Vcpu::fault`]; a look-up that would have to sleep is answered
    /// [`Retry`](crate::RetryReason::Backing), because a batch does not leave its critical section.
    ///
    /// # Errors
    ///
    /// As [`Vcpu::fault`].
    #[inline]
    pub fn fault(&mut self, fault: Fault) -> Result<Outcome, FaultError> {
        event::page_fault(self.core.ctx.as_id, fault.gpa, fault.access, fault.prefetch);
        self.section.repin();
        if self.core.memo.is_confidential() {
            return self.fault_confidential(fault);
        }
        match self.core.fault_straight(&self.section, &fault) {
            Some(outcome) => Ok(outcome),
            None => self.fault_bent(fault),
        }
    }

    #[inline(never)]
    fn fault_bent(&mut self, fault: Fault) -> Result<Outcome, FaultError> {
        let Fault {
            gpa,
            access,
            prefetch,
            max_level,
            ..
        } = fault;
        match self
            .core
            .fault_fast(&self.section, gpa.gfn(), access, max_level, prefetch)
        {
            Fast::Fixed(level) => Ok(Outcome::Fixed { level }),
            Fast::Spurious => Ok(Outcome::Spurious),
            Fast::GaveUp => self.fault_slow(fault),
        }
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn fault_slow(&mut self, fault: Fault) -> Result<Outcome, FaultError> {
        self.top_up()?;
        match self.core.resolve(&self.section, fault) {
            Resolution::Done(outcome) => Ok(outcome),
            Resolution::Sleep(..) => Ok(self.core.ctx.retry(RetryReason::Backing)),
        }
    }

    /// What was retired lately waits for this very section, which lets go of it when it is renewed.
    pub(crate) fn top_up(&mut self) -> Result<(), FaultError> {
        self.core.top_up(false).or_else(|_| {
            self.section.repin();
            self.core.top_up(false)
        })
    }

    /// As [`Vcpu::map`].
    ///
    /// # Errors
    ///
    /// As [`Vcpu::fault`].
    #[inline(always)]
    pub fn map(
        &mut self,
        gfn: Gfn,
        mapping: Mapping,
        access: Access,
    ) -> Result<Outcome, FaultError> {
        self.section.repin();
        match self.core.map_straight(&self.section, gfn, &mapping, access) {
            Some(outcome) => Ok(outcome),
            None => self.map_bent(gfn, mapping, access),
        }
    }

    #[inline(never)]
    fn map_bent(
        &mut self,
        gfn: Gfn,
        mapping: Mapping,
        access: Access,
    ) -> Result<Outcome, FaultError> {
        match self.core.map_checked(&self.section, gfn, mapping, access) {
            Fast::Fixed(level) => Ok(Outcome::Fixed { level }),
            Fast::Spurious => Ok(Outcome::Spurious),
            Fast::GaveUp => self.map_slow(gfn, mapping, access),
        }
    }

    #[cold]
    #[inline(never)]
    fn map_slow(
        &mut self,
        gfn: Gfn,
        mapping: Mapping,
        access: Access,
    ) -> Result<Outcome, FaultError> {
        self.top_up()?;
        Ok(self.core.map(&self.section, gfn, mapping, access))
    }
}

impl<F: Format, H: Host> VcpuCore<F, H> {
    #[inline(always)]
    fn map_checked(
        &mut self,
        section: &Section<'_>,
        gfn: Gfn,
        mapping: Mapping,
        access: Access,
    ) -> Fast {
        // What half a frame belongs to is looked up on the slow path.
        if gfn >= self.ctx.root.limit() || self.ctx.private_root.is_some() {
            return Fast::GaveUp;
        }
        if !self.remembers(section) {
            return Fast::GaveUp;
        }
        let wish = Wish::new(&mapping, Level::L3, false);
        self.map_fast(section, gfn, mapping, mapping.level, access, wish)
    }

    fn map(
        &mut self,
        section: &Section<'_>,
        gfn: Gfn,
        mapping: Mapping,
        access: Access,
    ) -> Outcome {
        let fault = Fault::new(gfn.address(), access);
        if gfn >= self.ctx.root.limit() {
            return self.ctx.memory_fault(MemoryFault::BeyondWidth);
        }
        if !mapping.perms.contains(access.needs()) {
            return self.ctx.memory_fault(MemoryFault::NotPermitted);
        }
        if self.ctx.root.is_obsolete() {
            return self.ctx.retry(RetryReason::RootObsolete);
        }
        let (mut goal, mut invalidated) = (mapping.level, None);
        if self.ctx.private_root.is_some() {
            // A conversion holds faults back by a window: one half at a time maps a frame.
            invalidated = self.ctx.shared.invalidations.now(section);
            if self.ctx.is_among(invalidated, gfn, Level::L1) {
                return self.ctx.retry(RetryReason::Invalidation);
            }
            if self.ctx.is_private(gfn) {
                return self.ctx.memory_fault(MemoryFault::IsPrivate);
            }
            goal = self.ctx.uniform_level(gfn, goal);
        }
        self.install_mapping(fault, goal, mapping, mapping.perms, false, invalidated)
    }

    /// Makes sure that one fault finds enough tables: asks the frame source; where it has none, or where more waits for
    /// grace periods than the bound allows, drives reclamation forward (INV: bounded-garbage). Inside a section, which
    /// would hold up whatever was retired since it began, that is tried once and not waited for.
    pub(crate) fn top_up(&mut self, outside: bool) -> Result<(), FaultError> {
        if self.cache.len() >= TABLES_PER_FAULT {
            return Ok(());
        }
        let domain = &self.ctx.shared.domain;
        let rounds = if outside { RECLAIM_ROUNDS } else { 1 };
        if domain.is_over_bound() {
            domain.reclaim(rounds);
        }
        let mut drained = false;
        while self.cache.len() < TABLES_PER_FAULT {
            match self.allocate() {
                Ok(()) => {}
                Err(error) if drained => return Err(error.into()),
                Err(_) => {
                    self.ctx.shared.domain.drain(rounds);
                    drained = true;
                }
            }
        }
        Ok(())
    }

    fn allocate(&mut self) -> Result<(), OutOfFrames> {
        let shared = &*self.ctx.shared;
        let frames = shared.host.frames();
        let room = self.cache.room(TOP_UP);
        let most = room.len();
        // No more than was asked for, whatever the host says: the rest of the room holds tables of before.
        let count = frames.allocate(room)?.min(most);
        for &pfn in self.cache.grown(count) {
            shared.meta.set_state(pfn, TableState::Spare);
            table::page(frames, pfn).empty::<F>();
        }
        Ok(())
    }

    /// Whether the memo holds for `section`, emptied if it did not. It cannot while anything is under invalidation or the root
    /// is obsolete.
    #[inline(always)]
    pub(crate) fn remembers(&mut self, section: &Section<'_>) -> bool {
        self.memo.current(section).is_some() || self.renew_memo(section)
    }

    #[cold]
    #[inline(never)]
    fn renew_memo(&mut self, section: &Section<'_>) -> bool {
        // Before the rest, which must not be older.
        let stamp = section.stamp();
        if self.ctx.shared.invalidations.any() || self.ctx.root.is_obsolete() {
            return false;
        }
        self.memo.renew(&mut self.tables, stamp);
        true
    }

    /// The slot that holds `gfn`: the one used last or another.
    #[inline(always)]
    pub(crate) fn slot<'s>(
        &mut self,
        section: &'s Section<'_>,
        gfn: Gfn,
    ) -> Option<&'s Slot<H::Backing>> {
        let last = self.memo.current(section).and_then(|memo| memo.slot(gfn));
        last.or_else(|| self.other_slot(section, gfn))
    }

    #[cold]
    #[inline(never)]
    fn other_slot<'s>(
        &mut self,
        section: &'s Section<'_>,
        gfn: Gfn,
    ) -> Option<&'s Slot<H::Backing>> {
        let snapshot = self.ctx.shared.slots.snapshot(section);
        self.find_slot(snapshot, gfn).map(|slot| &**slot)
    }

    /// The slot of `snapshot` that holds `gfn`.
    pub(crate) fn find_slot<'s>(
        &mut self,
        snapshot: &'s Snapshot<H::Backing>,
        gfn: Gfn,
    ) -> Option<&'s Arc<Slot<H::Backing>>> {
        let slot = snapshot.find(self.ctx.as_id, gfn)?;
        self.memo.note_slot(slot);
        Some(slot)
    }

    /// Takes the place of an obsolete root's successor.
    #[cold]
    fn renew_root(&mut self) -> Result<(), MmuError> {
        self.memo.forget();
        self.left.drop_obsolete();
        let ctx = &mut self.ctx;
        ctx.root = ctx.shared.load_root(ctx.as_id, ctx.root.ad_bits)?;
        Ok(())
    }

    /// Goes to the root of another address space or role.
    fn switch(&mut self, as_id: AddressSpaceId, ad_bits: AdBits) -> Result<LoadedRoot, MmuError> {
        if (as_id, ad_bits) != (self.ctx.as_id, self.ctx.root.ad_bits) {
            let next = match self.left.take(as_id, ad_bits) {
                Some(next) => next,
                None => CachedRoot {
                    root: self.ctx.shared.load_root(as_id, ad_bits)?,
                    private: self.ctx.shared.load_private_root(as_id)?,
                },
            };
            self.left.keep(CachedRoot {
                root: core::mem::replace(&mut self.ctx.root, next.root),
                private: core::mem::replace(&mut self.ctx.private_root, next.private),
            });
            self.left.drop_obsolete();
            self.ctx.as_id = as_id;
            self.memo.forget();
        } else if self.ctx.root.is_obsolete() {
            self.renew_root()?;
        }
        Ok(self.loaded())
    }

    fn loaded(&self) -> LoadedRoot {
        let root = &self.ctx.root;
        LoadedRoot {
            hpa: root.pfn.address(),
            level: root.level,
            pointer: F::root_pointer(root.pfn, root.level, root.ad_bits),
            generation: root.generation,
        }
    }
}
