//! Roots: the tables at the top, counted.
//!
//! Protocol. A root is shared by an `Arc`: the MMU holds one count for the current root of each address space, each
//! vCPU one for the root that it has loaded, a sweep one for as long as it walks. The page goes back to the frame source
//! with the last count, so whoever can name a root can walk it. *Obsolete* is set once, before the tree is torn down:
//! faults on it answer `Retry`, and the vCPU takes the new root when it loads its root before the next guest entry. A
//! root that is being torn down stays on the list of dying roots until it maps nothing, so that a sweep of the host
//! reaches it too.

use crate::entry::TablePage;
use crate::host::{AddressSpaceId, FrameSource, Host, MAX_ADDRESS_SPACES, OutOfFrames, SharedHost};
use crate::table::{self, Place, TableMeta, TableState};
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

struct Lists<H: Host> {
    current: [Option<Arc<Root<H>>>; MAX_ADDRESS_SPACES],
    dying: Vec<Arc<Root<H>>>,
    generation: u64,
}

/// The roots of an MMU.
pub(crate) struct RootSet<H: Host> {
    lists: Mutex<Lists<H>>,
    level: Level,
    ad_bits: AdBits,
}

impl<H: Host> RootSet<H> {
    pub(crate) fn new(level: Level, ad_bits: AdBits) -> Self {
        let lists = Lists {
            current: [const { None }; MAX_ADDRESS_SPACES],
            dying: Vec::new(),
            generation: 0,
        };
        Self {
            lists: Mutex::new(lists),
            level,
            ad_bits,
        }
    }

    pub(crate) fn level(&self) -> Level {
        self.level
    }

    /// The current root of an address space, made if there is none. The flag tells whether it was made.
    pub(crate) fn load<F: Format>(
        &self,
        host: &SharedHost<H>,
        meta: &Arc<TableMeta>,
        as_id: AddressSpaceId,
    ) -> Result<(Arc<Root<H>>, bool), OutOfFrames> {
        let mut lists = self.lists.lock();
        let space = usize::from(as_id.0) % MAX_ADDRESS_SPACES;
        if let Some(root) = &lists.current[space] {
            return Ok((root.clone(), false));
        }
        let mut pfn = [Pfn(0)];
        host.frames().allocate(&mut pfn)?;
        let [pfn] = pfn;
        table::page(host.frames(), pfn).fill(|_| F::EMPTY);
        meta.set_state(pfn, TableState::Spare);
        meta.link(
            pfn,
            Place {
                as_id,
                level: self.level,
                gfn: Gfn(0),
            },
        );
        lists.generation += 1;
        let root = Arc::new(Root {
            host: host.clone(),
            meta: meta.clone(),
            pfn,
            level: self.level,
            limit: self.level.gfn_limit(),
            as_id,
            ad_bits: self.ad_bits,
            generation: lists.generation,
            obsolete: AtomicBool::new(false),
        });
        lists.current[space] = Some(root.clone());
        Ok((root, true))
    }

    /// Every root of an address space that may map something, the current one first.
    pub(crate) fn of(&self, as_id: AddressSpaceId) -> Vec<Arc<Root<H>>> {
        let lists = self.lists.lock();
        let current = lists.current.iter().flatten();
        current
            .chain(lists.dying.iter())
            .filter(|root| root.as_id == as_id)
            .cloned()
            .collect()
    }

    /// The current root of an address space, if one was made.
    pub(crate) fn current(&self, as_id: AddressSpaceId) -> Option<Arc<Root<H>>> {
        self.lists.lock().current.get(usize::from(as_id.0))?.clone()
    }

    /// Makes all current roots obsolete and returns them. Constant time.
    pub(crate) fn invalidate(&self) -> Vec<Arc<Root<H>>> {
        let mut lists = self.lists.lock();
        let lists = &mut *lists;
        let roots: Vec<_> = lists.current.iter_mut().filter_map(Option::take).collect();
        for root in &roots {
            root.obsolete.store(true, Ordering::Relaxed);
            lists.dying.push(root.clone());
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
        let current = lists.current.iter_mut().filter_map(Option::take);
        let mut roots: Vec<_> = current.collect();
        roots.append(&mut lists.dying);
        roots
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
