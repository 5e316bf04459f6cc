//! Roots: the tables at the top, counted.
//!
//! Protocol. A root is shared by an `Arc`: the MMU holds one count for the current root of each address space, each
//! vCPU one for the root that it has loaded, a sweep one for as long as it walks. The page goes back to the frame source
//! with the last count, so whoever can name a root can walk it. *Obsolete* is set once, before the tree is torn down:
//! faults on it answer `Retry`, and the vCPU takes the new root when it loads its root before the next guest entry. A
//! root that is being torn down stays on the list of dying roots until it maps nothing, so that a sweep of the host
//! reaches it too.
//!
//! A confidential guest has a second root for each address space, the *private* one, under which the library alone walks.
//! It mirrors a table that cannot be replaced, so it never becomes obsolete: it lives as long as the MMU.

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

struct Lists<H: Host> {
    current: [Option<Arc<Root<H>>>; MAX_ADDRESS_SPACES],
    private: [Option<Arc<Root<H>>>; MAX_ADDRESS_SPACES],
    dying: Vec<Arc<Root<H>>>,
    generation: u64,
}

/// Which of an address space's two trees is meant.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    Shared,
    Private,
}

/// The roots of an MMU.
pub(crate) struct RootSet<H: Host> {
    lists: Mutex<Lists<H>>,
    level: Level,
    ad_bits: AdBits,
    /// The bit of a guest frame that makes it shared, or 0.
    shared_bit: u64,
}

impl<H: Host> RootSet<H> {
    pub(crate) fn new(level: Level, ad_bits: AdBits, shared_bit: u64) -> Self {
        let lists = Lists {
            current: [const { None }; MAX_ADDRESS_SPACES],
            private: [const { None }; MAX_ADDRESS_SPACES],
            dying: Vec::new(),
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

    /// The current root of a half of an address space, made if there is none. The flag tells whether it was made.
    pub(crate) fn load<F: Format>(
        &self,
        host: &SharedHost<H>,
        meta: &Arc<TableMeta>,
        as_id: AddressSpaceId,
        half: Half,
    ) -> Result<(Arc<Root<H>>, bool), OutOfFrames> {
        let mut lists = self.lists.lock();
        let lists = &mut *lists;
        let private = half == Half::Private;
        let spaces = match half {
            Half::Shared => &mut lists.current,
            Half::Private => &mut lists.private,
        };
        let place = &mut spaces[usize::from(as_id.0) % MAX_ADDRESS_SPACES];
        if let Some(root) = place {
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
                private,
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
            limit: self.limit(),
            as_id,
            private,
            gfn_bits: if private { 0 } else { self.shared_bit },
            ad_bits: self.ad_bits,
            generation: lists.generation,
            obsolete: AtomicBool::new(false),
        });
        *place = Some(root.clone());
        Ok((root, true))
    }

    /// The private root of an address space, if one was made.
    pub(crate) fn private(&self, as_id: AddressSpaceId) -> Option<Arc<Root<H>>> {
        self.lists.lock().private.get(usize::from(as_id.0))?.clone()
    }

    /// Every root of the shared half of an address space that may map something, the current one first.
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
        let current = lists.current.iter_mut().chain(&mut lists.private);
        let mut roots: Vec<_> = current.filter_map(Option::take).collect();
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
