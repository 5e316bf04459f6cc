//! Roots: the tables at the top, counted.
//!
//! Protocol. An address space has up to one root for each *role*: one whose accessed and dirty bits the processor keeps,
//! one whose bits it does not. A vCPU asks for the one that its processor can walk; sweeps cover all.
//!
//! A root is shared by an `Arc`: the MMU holds one count for the current root of each address space and role, each vCPU
//! one for the root that it has loaded and one for each that it has left and may come back to ([`RootCache`]), a sweep one
//! for as long as it walks. A count is taken from another count only, under the lock of the lists or from one's own, so
//! none comes back from zero. The page goes back to the frame source with the last count, so whoever can name a root can
//! walk it.
//!
//! *Obsolete* is set once, under the lock of the lists, before the tree is torn down: faults on it answer `Retry`, and the
//! vCPU takes the new root when it loads its root before the next guest entry. Setting it says nothing yet about vCPUs
//! that are in the guest or on their way there. Who needs them off the old root makes them leave *after* setting it, and a
//! vCPU looks at it once more *after* it has said that it is inside: with a `TlbTracker` the two fences in
//! there order that, so that either the vCPU is waited for or it sees that its root is obsolete and turns back. A
//! root that is being torn down stays on the list of dying roots until it maps nothing, so that a sweep of the host
//! reaches it too.
//!
//! No frame is allocated, filled or freed under the lock of the lists, so that making roots obsolete waits for a few
//! instructions at most.
//!
//! A confidential guest has a second root for each address space, the *private* one, under which the library alone walks.
//! It mirrors a table that cannot be replaced, so it never becomes obsolete: it lives as long as the MMU.

use crate::entry::TablePage;
use crate::event;
use crate::host::{AddressSpaceId, FrameSource, Host, MAX_ADDRESS_SPACES, OutOfFrames, SharedHost};
use crate::table::{self, TableMeta, TableState};
use alloc::sync::Arc;
use alloc::vec::Vec;
use tdp_arch::{AdBits, Format, Gfn, Hpa, Level, Pfn};
use tdp_rcu::sync::{AtomicBool, Mutex, Ordering};

/// A root table. Aligned, because every fault reads it and every sweep writes the count that lies before it.
#[repr(align(128))]
pub(crate) struct Root<H: Host> {
    host: SharedHost<H>,
    meta: Arc<TableMeta>,
    pub(crate) pfn: Pfn,
    pub(crate) level: Level,
    limit: Gfn,
    pub(crate) as_id: AddressSpaceId,
    /// Walked by the library only: each change is handed to the protected table.
    pub(crate) private: bool,
    /// Bits that every guest frame has in this tree and not in a slot: the bit that makes an address shared.
    pub(crate) gfn_bits: u64,
    pub(crate) ad_bits: AdBits,
    pub(crate) generation: u64,
    obsolete: AtomicBool,
}

impl<H: Host> Root<H> {
    /// Whether vCPUs have to load another root.
    #[inline(always)]
    pub(crate) fn is_obsolete(&self) -> bool {
        // Relaxed: a fault that misses it meets sealed entries (INV: unlink-seals).
        self.obsolete.load(Ordering::Relaxed)
    }

    /// Its page.
    #[inline(always)]
    pub(crate) fn page(&self) -> &TablePage {
        table::page(self.host.frames(), self.pfn)
    }

    /// Index of a guest frame's entry in a table of `level` of this tree.
    #[inline(always)]
    pub(crate) fn index(&self, level: Level, gfn: Gfn) -> usize {
        level.index(Gfn(gfn.0 | self.gfn_bits))
    }

    /// First frame past what it can map.
    #[inline(always)]
    pub(crate) fn limit(&self) -> Gfn {
        self.limit
    }
}

impl<H: Host> Drop for Root<H> {
    fn drop(&mut self) {
        self.meta.set_state(self.pfn, TableState::Free);
        self.host.frames().free(&[self.pfn]);
    }
}

/// Roles that the roots of an address space may have.
const ROLES: usize = 2;

/// Which of an address space's two trees is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    Shared,
    Private,
}

/// Which root is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RootKey {
    pub(crate) as_id: AddressSpaceId,
    pub(crate) half: Half,
    /// Role. Nothing but the library walks the private half, which has one for all.
    pub(crate) ad_bits: AdBits,
}

const fn role(ad_bits: AdBits) -> usize {
    match ad_bits {
        AdBits::Processor => 0,
        AdBits::Software => 1,
    }
}

type Place<H> = Option<Arc<Root<H>>>;

/// Room for the current roots of all address spaces and roles.
pub(crate) type AllRoots<H> = [Place<H>; ROLES * MAX_ADDRESS_SPACES];

struct Lists<H: Host> {
    current: [[Place<H>; ROLES]; MAX_ADDRESS_SPACES],
    private: [Place<H>; MAX_ADDRESS_SPACES],
    dying: Vec<Arc<Root<H>>>,
    generation: u64,
}

impl<H: Host> Lists<H> {
    fn place(&mut self, key: RootKey) -> &mut Place<H> {
        let space = usize::from(key.as_id.0) % MAX_ADDRESS_SPACES;
        match key.half {
            Half::Shared => &mut self.current[space][role(key.ad_bits)],
            Half::Private => &mut self.private[space],
        }
    }
}

/// The roots of an MMU.
pub(crate) struct RootSet<H: Host> {
    lists: Mutex<Lists<H>>,
    level: Level,
    /// Role of a vCPU that has not asked for another.
    ad_bits: AdBits,
    /// The bit of a guest frame that makes it shared, or 0.
    shared_bit: u64,
}

impl<H: Host> RootSet<H> {
    pub(crate) fn new(level: Level, ad_bits: AdBits, shared_bit: u64) -> Self {
        let lists = Lists {
            current: [const { [const { None }; ROLES] }; MAX_ADDRESS_SPACES],
            private: [const { None }; MAX_ADDRESS_SPACES],
            // Room for all that one invalidation makes obsolete.
            dying: Vec::with_capacity(ROLES * MAX_ADDRESS_SPACES),
            generation: 0,
        };
        Self {
            lists: Mutex::new(lists),
            level,
            ad_bits,
            shared_bit,
        }
    }

    /// First guest frame past what slots and trees can hold.
    pub(crate) fn limit(&self) -> Gfn {
        match self.shared_bit {
            0 => self.level.gfn_limit(),
            bit => Gfn(bit),
        }
    }

    pub(crate) fn level(&self) -> Level {
        self.level
    }

    /// Role of a vCPU that has not asked for another.
    pub(crate) fn ad_bits(&self) -> AdBits {
        self.ad_bits
    }

    /// The current root of a kind, made if there is none. The flag tells whether it was made.
    pub(crate) fn load<F: Format>(
        &self,
        host: &SharedHost<H>,
        meta: &Arc<TableMeta>,
        key: RootKey,
    ) -> Result<(Arc<Root<H>>, bool), OutOfFrames> {
        let generation = {
            let mut lists = self.lists.lock();
            if let Some(root) = lists.place(key) {
                return Ok((root.clone(), false));
            }
            lists.generation += 1;
            lists.generation
        };
        let new = Arc::new(self.make::<F>(host, meta, key, generation)?);
        let mut lists = self.lists.lock();
        let place = lists.place(key);
        if let Some(root) = place {
            // Another vCPU was first. The lock goes before the root that nobody wants.
            let root = root.clone();
            drop(lists);
            return Ok((root, false));
        }
        *place = Some(new.clone());
        drop(lists);
        event::root_made(key.as_id, self.level, key.half == Half::Private);
        Ok((new, true))
    }

    fn make<F: Format>(
        &self,
        host: &SharedHost<H>,
        meta: &Arc<TableMeta>,
        key: RootKey,
        generation: u64,
    ) -> Result<Root<H>, OutOfFrames> {
        let private = key.half == Half::Private;
        let mut pfn = [Pfn(0)];
        host.frames().allocate(&mut pfn)?;
        let [pfn] = pfn;
        table::page(host.frames(), pfn).empty::<F>();
        meta.set_state(pfn, TableState::Spare);
        meta.link(
            pfn,
            table::Place {
                as_id: key.as_id,
                private,
                level: self.level,
                gfn: Gfn(0),
            },
        );
        Ok(Root {
            host: host.clone(),
            meta: meta.clone(),
            pfn,
            level: self.level,
            limit: self.limit(),
            as_id: key.as_id,
            private,
            gfn_bits: if private { 0 } else { self.shared_bit },
            ad_bits: key.ad_bits,
            generation,
            obsolete: AtomicBool::new(false),
        })
    }

    /// The private root of an address space, if one was made.
    pub(crate) fn private(&self, as_id: AddressSpaceId) -> Option<Arc<Root<H>>> {
        self.lists.lock().private.get(usize::from(as_id.0))?.clone()
    }

    /// Every root of the shared half of an address space that may map something, of any role, the current ones first.
    pub(crate) fn of(&self, as_id: AddressSpaceId) -> Vec<Arc<Root<H>>> {
        let lists = self.lists.lock();
        let current = lists.current.iter().flatten().flatten();
        current
            .chain(lists.dying.iter())
            .filter(|root| root.as_id == as_id)
            .cloned()
            .collect()
    }

    /// A current root of an address space, if one was made: that of the usual role, or else of another.
    pub(crate) fn current(&self, as_id: AddressSpaceId) -> Option<Arc<Root<H>>> {
        let lists = self.lists.lock();
        let roots = lists.current.get(usize::from(as_id.0))?;
        let usual = roots[role(self.ad_bits)].as_ref();
        usual.or(roots.iter().flatten().next()).cloned()
    }

    /// Makes all current roots obsolete and returns them. Constant time, without an allocation: there is one for each address
    /// space and role.
    pub(crate) fn invalidate(&self) -> AllRoots<H> {
        let mut roots = [const { None }; ROLES * MAX_ADDRESS_SPACES];
        let mut lists = self.lists.lock();
        let lists = &mut *lists;
        let current = lists.current.iter_mut().flatten();
        for (place, root) in roots.iter_mut().zip(current.filter_map(Option::take)) {
            root.obsolete.store(true, Ordering::Relaxed);
            lists.dying.push(root.clone());
            *place = Some(root);
        }
        roots
    }

    /// Forgets a root that maps nothing any more.
    pub(crate) fn buried(&self, root: &Arc<Root<H>>) {
        self.lists
            .lock()
            .dying
            .retain(|other| !Arc::ptr_eq(other, root));
    }

    /// Forgets all roots, for an MMU that is going away.
    pub(crate) fn take_all(&self) -> Vec<Arc<Root<H>>> {
        let mut lists = self.lists.lock();
        let lists = &mut *lists;
        let current = lists.current.iter_mut().flatten();
        let current = current.chain(&mut lists.private);
        let mut roots: Vec<_> = current.filter_map(Option::take).collect();
        roots.append(&mut lists.dying);
        roots
    }
}

/// What a vCPU keeps of the roots that it has left, so that it comes back to them without a lock: one for each address
/// space and role at most, none of them obsolete for longer than until the vCPU loads its root again.
pub(crate) struct RootCache<H: Host>([Option<CachedRoot<H>>; ROLES * MAX_ADDRESS_SPACES]);

/// A root with that of the private half.
pub(crate) struct CachedRoot<H: Host> {
    pub(crate) root: Arc<Root<H>>,
    pub(crate) private: Option<Arc<Root<H>>>,
}

impl<H: Host> RootCache<H> {
    pub(crate) const fn new() -> Self {
        Self([const { None }; ROLES * MAX_ADDRESS_SPACES])
    }

    /// None for an address space that no MMU can have: a caller may ask for any.
    fn place(
        &mut self,
        as_id: AddressSpaceId,
        ad_bits: AdBits,
    ) -> Option<&mut Option<CachedRoot<H>>> {
        self.0.get_mut(usize::from(as_id.0) * ROLES + role(ad_bits))
    }

    /// Keeps a root that its vCPU leaves, unless it is obsolete.
    pub(crate) fn keep(&mut self, left: CachedRoot<H>) {
        let (as_id, ad_bits) = (left.root.as_id, left.root.ad_bits);
        if let Some(place) = self.place(as_id, ad_bits) {
            *place = Some(left).filter(|left| !left.root.is_obsolete());
        }
    }

    /// The root that the vCPU has left, unless it has become obsolete since.
    pub(crate) fn take(&mut self, as_id: AddressSpaceId, ad_bits: AdBits) -> Option<CachedRoot<H>> {
        self.place(as_id, ad_bits)?
            .take()
            .filter(|left| !left.root.is_obsolete())
    }

    /// Lets go of what has become obsolete.
    pub(crate) fn drop_obsolete(&mut self) {
        for place in &mut self.0 {
            place.take_if(|left| left.root.is_obsolete());
        }
    }
}

/// A root as a vCPU has to load it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadedRoot {
    /// Physical address of the root table.
    pub hpa: Hpa,
    /// Level of its entries: 4 or 5.
    pub level: Level,
    /// Value for the processor: EPTP or nCR3.
    pub pointer: u64,
    /// Differs from root to root of one MMU: a vCPU whose root changes must flush what it cached under the old one.
    pub generation: u64,
}
