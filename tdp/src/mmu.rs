//! The MMU: what an embedder makes once per VM and calls from every thread.

use crate::attributes::Visibility;
use crate::confidential::{Confidential, Phase};
use crate::dirty::{DirtyRing, DirtyRings, DirtyTracking};
use crate::host::{AddressSpaceId, FrameSource, Host, MAX_ADDRESS_SPACES, OutOfFrames, SharedHost};
use crate::invalidate::{Invalidation, Invalidations};
use crate::nx::NxHugePages;
use crate::protected::{HandOffCause, ProtectedTable};
use crate::range::{Audit, Entry, Leaf};
use crate::range_zap::{ZapScope, free_tree};
use crate::reclaim::Retired;
use crate::root::{Half, Root, RootKey, RootSet};
use crate::slot_map::{SlotMap, Slots};
use crate::stats::{Shards, Stat, Stats, Tally};
use crate::table::TableMeta;
use crate::teardown::{RootTeardown, SlotRemoval};
use crate::tlb::PendingFlush;
use crate::vcpu::{RECLAIM_ROUNDS, Vcpu};
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::marker::PhantomData;
use tdp_arch::{AdBits, Format, Gfn, GfnRange, Level, Pfn};
use tdp_rcu::sync::{AtomicU64, CachePadded, Plain};
use tdp_rcu::{Domain, DomainConfig};

/// Widest physical address for which a processor may be built, in bits.
const MAX_PHYSICAL_BITS: u32 = tdp_arch::addr::MAX_PHYSICAL_BITS;

/// An MMU could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// Only trees of four and five levels are walked by a processor.
    #[error("a root of level {} cannot be walked: 4 or 5 is meant", .0.number())]
    Levels(Level),
    /// Too many address spaces, or none.
    #[error("{0} address spaces: 1 to {MAX_ADDRESS_SPACES} are possible")]
    AddressSpaces(u8),
    /// No such processor.
    #[error("{0} bits of physical address: 32 to 52 are possible")]
    PhysicalBits(u32),
    /// The frame source's window lies beyond what an entry can name.
    #[error("table frames up to {end:#x} do not fit {bits} bits of physical address")]
    Window {
        /// First frame number past the window.
        end: u64,
        /// Bits of physical address.
        bits: u32,
    },
    /// Too few entries, or not a power of two.
    #[error("a dirty ring of {0} entries: a power of two from {least} on is meant", least = DirtyRing::LEAST)]
    DirtyRing(u32),
    /// No address has this bit, or it does not choose a root entry.
    #[error("bit {0} of a guest address cannot say whether memory is shared")]
    SharedBit(u32),
    /// Leaves of this level do not exist.
    #[error("leaves of level {} do not exist: 1 to 3 are meant", .0.number())]
    MaxLeaf(Level),
}

/// An MMU refused an operation; nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MmuError {
    /// No frame for a root table.
    #[error("no frame for a root table: {0}")]
    OutOfFrames(#[from] OutOfFrames),
    /// No such address space.
    #[error("there is no address space {}", .0.0)]
    NoSuchSpace(AddressSpaceId),
}

/// Settings of an MMU in the making; see [`Mmu::builder`].
#[derive(Debug)]
#[must_use = "nothing is made before `build`"]
pub struct MmuBuilder<F: Format, H: Host> {
    host: H,
    levels: Level,
    address_spaces: u8,
    physical_bits: u32,
    ad_bits: AdBits,
    mmio_caching: bool,
    dirty_tracking: DirtyTracking,
    dirty_ring: u32,
    eager_split: bool,
    nx_huge_pages: bool,
    max_leaf: Level,
    garbage_bound: usize,
    slot_removal: SlotRemoval,
    slot_generation: u64,
    invalidation_sequence: u64,
    asymmetric_fences: bool,
    private_half: Option<Routing>,
    default_visibility: Visibility,
    _format: PhantomData<F>,
}

/// How an access tells whether it is to private memory.
#[derive(Clone, Copy, Debug)]
enum Routing {
    /// By this bit of the address, set for shared memory.
    SharedBit(u32),
    /// By what the fault says.
    Fault,
}

impl<F: Format, H: Host> MmuBuilder<F, H> {
    /// Level of the root: 4 (the default, 48 bits of guest-physical address) or 5 (57 bits).
    pub fn levels(mut self, level: Level) -> Self {
        self.levels = level;
        self
    }

    /// How many address spaces there are: 1 (the default) or 2.
    pub fn address_spaces(mut self, count: u8) -> Self {
        self.address_spaces = count;
        self
    }

    /// Bits of physical address of the processor, 32 to 52. The default is 46.
    pub fn physical_bits(mut self, bits: u32) -> Self {
        self.physical_bits = bits;
        self
    }

    /// Who keeps the accessed and dirty bits, unless a vCPU asks for another kind of tree
    /// ([`Vcpu::set_ad_bits`](crate::Vcpu::set_ad_bits)). The default is the processor.
    pub fn ad_bits(mut self, ad_bits: AdBits) -> Self {
        self.ad_bits = ad_bits;
        self
    }

    /// Whether frames without memory are remembered in the tables, so that the next access exits at once. The default
    /// is yes. It lets a guest make tables for address space that has no memory.
    pub fn mmio_caching(mut self, on: bool) -> Self {
        self.mmio_caching = on;
        self
    }

    /// How writes to logged slots are noticed. The default is by write protection.
    pub fn dirty_tracking(mut self, tracking: DirtyTracking) -> Self {
        self.dirty_tracking = tracking;
        self
    }

    /// Whether the large leaves of a slot are split when its log is switched on, or, if it begins full, where it is cleared,
    /// and not one by one when the guest writes. The default is yes: writes fault less, and switching on takes longer.
    pub fn eager_split(mut self, on: bool) -> Self {
        self.eager_split = on;
        self
    }

    /// Gives each vCPU a dirty ring of that many entries, a power of two from 1024 on, 16 bytes each. The default is 0:
    /// no rings, only bitmaps.
    pub fn dirty_ring(mut self, entries: u32) -> Self {
        self.dirty_ring = entries;
        self
    }

    /// Whether large leaves are kept from being executable, against a guest that could stop the machine by changing
    /// the size of a page while it fetches from it (erratum ITLB_MULTIHIT). The default is no; see
    /// [`Mmu::set_nx_huge_pages`].
    pub fn nx_huge_pages(mut self, on: bool) -> Self {
        self.nx_huge_pages = on;
        self
    }

    /// Largest leaf. The default is 1 GiB.
    pub fn max_leaf(mut self, level: Level) -> Self {
        self.max_leaf = level;
        self
    }

    /// Table frames that may wait for a grace period before whoever retires drives it forward. The default is 4096.
    pub fn garbage_bound(mut self, frames: usize) -> Self {
        self.garbage_bound = frames;
        self
    }

    /// How removing or moving a memory slot takes away what it maps. The default is to zap its range.
    pub fn slot_removal(mut self, how: SlotRemoval) -> Self {
        self.slot_removal = how;
        self
    }

    /// Generation of the memory slots before their first change, for tests of what comes round. The default is 0.
    #[doc(hidden)]
    pub fn slot_generation(mut self, generation: u64) -> Self {
        self.slot_generation = generation;
        self
    }

    /// Invalidations that count as ended before the first, for tests of large counts. The default is 0.
    #[doc(hidden)]
    pub fn invalidation_sequence(mut self, ended: u64) -> Self {
        self.invalidation_sequence = ended;
        self
    }

    /// Whether faults go without a fence, and grace periods (invalidation, slot changes, reclamation) interrupt every running
    /// thread of the process instead, by `membarrier(2)`. The default is yes. Linux with `std` only; elsewhere it changes
    /// nothing.
    ///
    /// An embedder whose threads must not be interrupted, or that forbids itself the system call once the MMU is made, says
    /// no: a grace period that is refused the call aborts the process.
    pub fn asymmetric_fences(mut self, on: bool) -> Self {
        self.asymmetric_fences = on;
        self
    }

    /// Gives the guest a private half, as TDX and CCA have it: bit `bit` of a guest-physical address is set for shared memory.
    /// TDX: 47 with four levels, 51 with five. Slots and ranges are named without the bit.
    pub fn shared_bit(mut self, bit: u32) -> Self {
        self.private_half = Some(Routing::SharedBit(bit));
        self
    }

    /// Gives the guest a private half, as SNP has it: no bit of the address tells, each [`Fault`](crate::Fault) does.
    pub fn private_by_fault(mut self) -> Self {
        self.private_half = Some(Routing::Fault);
        self
    }

    /// What memory of a confidential guest is before it is first converted. The default is shared.
    pub fn default_visibility(mut self, visibility: Visibility) -> Self {
        self.default_visibility = visibility;
        self
    }

    /// Makes the MMU.
    ///
    /// # Errors
    ///
    /// [`BuildError`] names the setting that cannot be.
    pub fn build(self) -> Result<Mmu<F, H>, BuildError> {
        if !cfg!(loom) && !matches!(self.levels, Level::L4 | Level::L5) {
            return Err(BuildError::Levels(self.levels));
        }
        if self.address_spaces == 0 || usize::from(self.address_spaces) > MAX_ADDRESS_SPACES {
            return Err(BuildError::AddressSpaces(self.address_spaces));
        }
        if !(32..=MAX_PHYSICAL_BITS).contains(&self.physical_bits) {
            return Err(BuildError::PhysicalBits(self.physical_bits));
        }
        if self.max_leaf > Level::L3 {
            return Err(BuildError::MaxLeaf(self.max_leaf));
        }
        let ring = self.dirty_ring;
        if ring != 0 && !(ring.is_power_of_two() && ring >= DirtyRing::LEAST) {
            return Err(BuildError::DirtyRing(ring));
        }
        let window = self.host.frames().window();
        if window.end.0 > 1 << (self.physical_bits - tdp_arch::PAGE_SHIFT) {
            return Err(BuildError::Window {
                end: window.end.0,
                bits: self.physical_bits,
            });
        }
        let config = DomainConfig {
            bound: self.garbage_bound,
        };
        let domain = if self.asymmetric_fences {
            Domain::asymmetric(config)
        } else {
            Domain::new(config)
        };
        let shared_bit = match self.private_half {
            Some(Routing::SharedBit(bit)) => {
                let gfn_bit = bit.checked_sub(tdp_arch::PAGE_SHIFT).filter(|&gfn_bit| {
                    // Above a root entry: the two halves have no table in common but the root.
                    (self.levels.gfn_shift()..64).contains(&gfn_bit)
                        && 1 << gfn_bit < self.levels.gfn_limit().0
                });
                1 << gfn_bit.ok_or(BuildError::SharedBit(bit))?
            }
            _ => 0,
        };
        let host: SharedHost<H> = Arc::new(CachePadded::new(self.host));
        let meta = Arc::new(TableMeta::new(host.frames(), self.private_half.is_some()));
        let roots = RootSet::new(self.levels, self.ad_bits, shared_bit);
        let confidential = self.private_half.map(|_| {
            Box::new(Confidential::new(
                shared_bit,
                roots.limit(),
                self.default_visibility,
                host.protected().capabilities(),
            ))
        });
        Ok(Mmu {
            shared: Arc::new(Shared {
                slots: SlotMap::new(self.slot_generation),
                invalidations: Invalidations::new(self.invalidation_sequence),
                address_spaces: self.address_spaces,
                physical_bits: self.physical_bits,
                mmio_caching: self.mmio_caching,
                dirty_tracking: self.dirty_tracking,
                eager_split: self.eager_split,
                rings: DirtyRings::new(self.dirty_ring),
                nx: NxHugePages::new(self.nx_huge_pages),
                nx_cursor: CachePadded::new(Plain::new(0)),
                max_leaf: self.max_leaf,
                slot_removal: self.slot_removal,
                pfn_limit: Pfn(1 << (self.physical_bits - tdp_arch::PAGE_SHIFT)),
                unflushed: CachePadded::new(AtomicU64::new(0)),
                roots: CachePadded::new(roots),
                confidential,
                domain: CachePadded::new(domain),
                shards: CachePadded::new(Shards::default()),
                meta,
                host,
                _format: PhantomData,
            }),
        })
    }
}

/// What all handles of one MMU share. Faults read it; only its parts that are not on their way are ever written.
pub(crate) struct Shared<F: Format, H: Host> {
    pub(crate) slots: SlotMap<H::Backing>,
    pub(crate) invalidations: Invalidations,
    pub(crate) address_spaces: u8,
    pub(crate) physical_bits: u32,
    pub(crate) mmio_caching: bool,
    pub(crate) dirty_tracking: DirtyTracking,
    pub(crate) eager_split: bool,
    pub(crate) nx: NxHugePages,
    /// Frame at which the next recovery of tables begins. Written by recoveries.
    pub(crate) nx_cursor: CachePadded<Plain>,
    pub(crate) max_leaf: Level,
    pub(crate) slot_removal: SlotRemoval,
    /// First host frame that the processor cannot address.
    pub(crate) pfn_limit: Pfn,
    /// Sweeps, and faults that took something away, that have not flushed yet.
    pub(crate) unflushed: CachePadded<AtomicU64>,
    pub(crate) rings: DirtyRings,
    /// The private half, if there is one.
    pub(crate) confidential: Option<Box<Confidential>>,
    /// Written by vCPUs that load a root and by sweeps.
    pub(crate) roots: CachePadded<RootSet<H>>,
    /// Written by whoever retires.
    pub(crate) domain: CachePadded<Domain<Retired<H>>>,
    pub(crate) shards: CachePadded<Shards>,
    pub(crate) meta: Arc<TableMeta>,
    pub(crate) host: SharedHost<H>,
    _format: PhantomData<F>,
}

impl<F: Format, H: Host> Shared<F, H> {
    /// The current root of an address space for a role.
    pub(crate) fn load_root(
        &self,
        as_id: AddressSpaceId,
        ad_bits: AdBits,
    ) -> Result<Arc<Root<H>>, MmuError> {
        self.load_half(as_id, Half::Shared, ad_bits)
    }

    /// The root of its private half, if there is one.
    pub(crate) fn load_private_root(
        &self,
        as_id: AddressSpaceId,
    ) -> Result<Option<Arc<Root<H>>>, MmuError> {
        if self.confidential.is_none() {
            return Ok(None);
        }
        self.load_half(as_id, Half::Private, self.roots.ad_bits())
            .map(Some)
    }

    fn load_half(
        &self,
        as_id: AddressSpaceId,
        half: Half,
        ad_bits: AdBits,
    ) -> Result<Arc<Root<H>>, MmuError> {
        if as_id.0 >= self.address_spaces {
            return Err(MmuError::NoSuchSpace(as_id));
        }
        let key = RootKey {
            as_id,
            half,
            ad_bits,
        };
        let load = || self.roots.load::<F>(&self.host, &self.meta, key);
        let (root, made) = load().or_else(|_| {
            // INV: bounded-garbage: frames that wait for a grace period are brought back first.
            self.domain.drain(RECLAIM_ROUNDS);
            load()
        })?;
        if made {
            self.shards.sweeps.add(Stat::RootsMade, 1);
        }
        Ok(root)
    }

    /// Notes that the module gave the guest up, if that is why a call was.
    pub(crate) fn lose_if(&self, cause: HandOffCause) {
        if let (HandOffCause::Fatal, Some(confidential)) = (cause, &self.confidential) {
            confidential.advance(Phase::Lost);
        }
    }
}

impl<F: Format, H: Host> Drop for Shared<F, H> {
    fn drop(&mut self) {
        // No vCPU, sweep or teardown is left: each holds a handle. What was unlinked is with the domain, which frees it
        // when it is dropped after this.
        for root in self.roots.take_all() {
            if root.private {
                self.abandon_private(&root);
            }
            free_tree::<F, H>(&self.host, &root, &self.meta);
        }
    }
}

/// A second-level MMU: the tables that translate a guest's physical addresses, and the means to resolve faults on them
/// from all vCPUs at once. A handle; cloning it makes another to the same MMU.
pub struct Mmu<F: Format, H: Host> {
    pub(crate) shared: Arc<Shared<F, H>>,
}

impl<F: Format, H: Host> Clone for Mmu<F, H> {
    fn clone(&self) -> Self {
        Self {
            shared: self.shared.clone(),
        }
    }
}

impl<F: Format, H: Host> core::fmt::Debug for Mmu<F, H> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Mmu")
            .field("format", &F::NAME)
            .field("levels", &self.shared.roots.level())
            .finish()
    }
}

impl<F: Format, H: Host> Mmu<F, H> {
    /// Begins to make an MMU for `host`.
    pub fn builder(host: H) -> MmuBuilder<F, H> {
        MmuBuilder {
            host,
            levels: Level::L4,
            address_spaces: 1,
            physical_bits: 46,
            ad_bits: AdBits::Processor,
            mmio_caching: true,
            dirty_tracking: DirtyTracking::default(),
            dirty_ring: 0,
            eager_split: true,
            nx_huge_pages: false,
            max_leaf: Level::L3,
            garbage_bound: 4096,
            slot_removal: SlotRemoval::default(),
            slot_generation: 0,
            invalidation_sequence: 0,
            asymmetric_fences: true,
            private_half: None,
            default_visibility: Visibility::Shared,
            _format: PhantomData,
        }
    }

    pub(crate) fn shared(&self) -> &Shared<F, H> {
        &self.shared
    }

    /// The embedder's side.
    pub fn host(&self) -> &H {
        &self.shared.host
    }

    /// The memory slots.
    pub fn slots(&self) -> Slots<'_, F, H> {
        Slots::new(&self.shared)
    }

    /// Makes a vCPU, in the normal address space.
    ///
    /// # Errors
    ///
    /// [`MmuError`] if its root has yet to be made and there is no frame for it.
    pub fn vcpu(&self) -> Result<Vcpu<F, H>, MmuError> {
        Vcpu::new(self.shared.clone())
    }

    /// Zaps a range: every leaf whose frames meet it, and every table that lies wholly in it. Faults go on meanwhile
    /// and may map frames of the range again.
    pub fn zap(&self, as_id: AddressSpaceId, range: impl Into<GfnRange>) -> PendingFlush<'_, F, H> {
        self.shared.zap(as_id, range.into(), ZapScope::Tables)
    }

    /// Zaps the leaves of a range and leaves the tables, for ranges that will soon be mapped again.
    pub fn zap_leaves(
        &self,
        as_id: AddressSpaceId,
        range: impl Into<GfnRange>,
    ) -> PendingFlush<'_, F, H> {
        self.shared.zap(as_id, range.into(), ZapScope::Leaves)
    }

    /// Begins to invalidate a range of which the host is about to change the backing: faults on it are told to retry
    /// until it ends. When this returns, every fault that might still install the old backing has ended.
    ///
    /// Must not be called from inside a [`Batch`](crate::Batch) or a host callback: it waits for them.
    pub fn invalidate_begin(
        &self,
        as_id: AddressSpaceId,
        range: impl Into<GfnRange>,
    ) -> Invalidation<'_, F, H> {
        self.shared.invalidate_begin(as_id, range.into())
    }

    /// Makes the roots of all address spaces obsolete, at once, whatever they map. Each vCPU takes a new one when it
    /// loads its root before its next guest entry. What the old ones map is taken down by the returned
    /// [`RootTeardown`], while faults go on under the new ones; until then a vCPU that is in the guest goes on under the
    /// old one.
    pub fn invalidate_roots(&self) -> RootTeardown<F, H> {
        RootTeardown::begin(&self.shared)
    }

    /// Calls `see` for every leaf of the current root of an address space whose frames meet `range`, in order. The MMU
    /// may change meanwhile.
    pub fn visit_leaves(
        &self,
        as_id: AddressSpaceId,
        range: impl Into<GfnRange>,
        see: impl FnMut(Leaf),
    ) {
        self.shared
            .visit_leaves(as_id, Half::Shared, range.into(), see);
    }

    /// The same for the private half: what the library believes the protected table to map. Large leaves and small ones;
    /// the permissions mean nothing there.
    pub fn visit_private_leaves(
        &self,
        as_id: AddressSpaceId,
        range: impl Into<GfnRange>,
        see: impl FnMut(Leaf),
    ) {
        self.shared
            .visit_leaves(as_id, Half::Private, range.into(), see);
    }

    /// Calls `see` for every entry of the current root of an address space that is not empty and covers a frame of
    /// `range`, in order, each table before what it holds. For a range of one frame, these are the steps of a walk. The
    /// MMU may change meanwhile.
    pub fn visit_entries(
        &self,
        as_id: AddressSpaceId,
        range: impl Into<GfnRange>,
        see: impl FnMut(Entry),
    ) {
        self.shared.visit_entries(as_id, range.into(), see);
    }

    /// The leaf of the shared half that maps `gfn` now.
    pub fn translate(&self, as_id: AddressSpaceId, gfn: Gfn) -> Option<Leaf> {
        let mut found = None;
        let range = GfnRange::new(gfn, 1)?;
        self.shared
            .visit_leaves(as_id, Half::Shared, range, |leaf| found = Some(leaf));
        found
    }

    /// Checks every entry of every current tree.
    pub fn audit(&self) -> Audit {
        self.shared.audit()
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        let stats = self.shared.shards.snapshot();
        Stats {
            garbage: self.shared.domain.counters(),
            protected: self.shared.protected_stats(&stats),
            ..stats
        }
    }

    /// Bytes of metadata kept for each table beside its page.
    pub const fn metadata_per_table() -> usize {
        TableMeta::BYTES
    }

    /// Waits for a grace period: until every fault, batch and sweep that began before has ended. What was retired before
    /// is freed then, unless one that began meanwhile holds it up.
    ///
    /// Must not be called from inside a [`Batch`](crate::Batch) or a host callback.
    pub fn synchronize(&self) {
        self.shared.domain.synchronize();
    }
}
