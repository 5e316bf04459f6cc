//! Software vCPU: a [`Walker`] behind a TLB and a paging-structure cache that remember too much.
//!
//! A real processor may keep a translation until software invalidates it, but seldom does so for long, so that a
//! missing flush hides. This one keeps everything that the manuals let it keep, until it is flushed or replaced, and
//! uses it:
//!
//! * **TLB** (SDM 4.10.2, 29.4.2; APM 5.5): one array for each page size; a large page is cached whole. What is cached
//!   is the frame and the permissions *then*. A page whose dirty flag was clear is cached as not writable, so that
//!   the first write walks and sets the flag; after that, writes do not look at the entry.
//! * **Paging-structure cache** (SDM 4.10.3, 29.4.2): for each table that a walk went on into, its address and the
//!   permissions on the way, by the address bits that lead there. A walk begins at the deepest table that is known.
//! * An entry that is not present or malformed is never cached (SDM 4.10.2.3, 29.4.2; APM 5.5.2).
//! * A TLB entry that does not allow the access is dropped and the address walked again. A fault is only ever
//!   delivered by a walk.
//! * A fault drops what was cached for its address, TLB and paging-structure cache, in the current root (SDM
//!   29.4.3.1). A violation or misconfiguration that a stale table led to is therefore delivered, once. For formats
//!   that say so ([`Walker::repeats_before`]) the walk is repeated from the root first.
//! * Cached information belongs to the root with which it was made: EP4TA of Intel, one ASID for each root with AMD.
//!   [`SoftwareVcpu::set_root`] flushes nothing, and going back to a root finds what was cached for it. Of
//!   [`ROOTS`] roots remembered, the oldest gives way, with all that was cached for it.
//!
//! Replacement goes in turn, without randomness.

use crate::addr::{Gpa, Hpa};
use crate::level::Level;
use crate::walker::{
    Cursor, GuestAccess, LeafMemoryType, Permissions, PhysicalMemory, Translation, WalkError,
    Walker,
};

mod cache;

use cache::Cache;

/// Roots whose cached information is kept apart at a time.
pub const ROOTS: usize = 4;
/// Sets of the 2 MiB and of the 1 GiB TLB, and of the paging-structure cache of each level.
const LARGE_SETS: usize = 16;
const HUGE_SETS: usize = 4;
const TABLE_SETS: usize = 16;

/// Bits of a key below the number of the root. A page number has 52 bits at most.
const ROOT_SHIFT: u32 = 52;

/// What the TLB keeps of a translation.
#[derive(Clone, Copy, Debug)]
struct Page {
    base: u64,
    permissions: Permissions,
    /// The permissions that need no walk: without write while the dirty flag is not known to be set.
    usable: Permissions,
    memory_type: LeafMemoryType,
    accessed: bool,
    dirty: bool,
}

impl Page {
    const FILLER: Page = Page {
        base: 0,
        permissions: Permissions::empty(),
        usable: Permissions::empty(),
        memory_type: LeafMemoryType::Npt { pat_index: 0 },
        accessed: false,
        dirty: false,
    };

    #[inline]
    const fn translation(&self, gpa: Gpa, level: Level) -> Translation {
        Translation {
            hpa: Hpa(self.base | gpa.0 & (level.bytes() - 1)),
            level,
            permissions: self.permissions,
            memory_type: self.memory_type,
            accessed: self.accessed,
            dirty: self.dirty,
        }
    }
}

/// What a software vCPU has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Accesses that the TLB answered.
    pub hits: u64,
    /// Accesses for which the TLB had nothing.
    pub misses: u64,
    /// Accesses for which the TLB had an entry that does not allow them, dirty flag included.
    pub upgrades: u64,
    /// Walks, repeated ones included.
    pub walks: u64,
    /// Walks that began at a table of the paging-structure cache instead of the root.
    pub short_walks: u64,
    /// Walks that ended in a fault or an abort that was delivered.
    pub faults: u64,
    /// Calls of the functions that flush.
    pub flushes: u64,
}

/// A guest's processor, as far as the second level sees it. `SETS` times 4 pages of 4 KiB fit its TLB; it must be a
/// power of two. It needs `SETS` times about 100 bytes and some 10 KiB more, and allocates nothing.
///
/// # Examples
///
/// A translation outlives its entry until it is flushed:
///
/// ```
/// use std::{cell::RefCell, collections::HashMap};
/// use tdp_arch::cpu::SoftwareVcpu;
/// use tdp_arch::walker::{EptConfig, EptWalker, GuestAccess, PhysicalMemory};
/// use tdp_arch::{Gpa, Hpa};
///
/// struct Memory(RefCell<HashMap<u64, u64>>);
///
/// impl PhysicalMemory for Memory {
///     fn load(&self, hpa: Hpa) -> Option<u64> {
///         Some(self.0.borrow().get(&hpa.0).copied().unwrap_or(0))
///     }
///     fn compare_exchange(&self, hpa: Hpa, _current: u64, new: u64) -> Result<(), u64> {
///         self.0.borrow_mut().insert(hpa.0, new);
///         Ok(())
///     }
/// }
///
/// // A PML4E and a PDPTE that maps 1 GiB.
/// let memory = Memory(RefCell::new(HashMap::from([(0x1000, 0x2007), (0x2000, 0x4000_00b7)])));
/// let walker = EptWalker::new(EptConfig::default())?;
/// let mut vcpu = SoftwareVcpu::<_>::new(walker, Hpa(0x1000));
/// assert_eq!(vcpu.access(&memory, Gpa(0x123), GuestAccess::Read)?.hpa, Hpa(0x4000_0123));
///
/// memory.0.borrow_mut().insert(0x2000, 0);
/// assert_eq!(vcpu.access(&memory, Gpa(0x456), GuestAccess::Read)?.hpa, Hpa(0x4000_0456));
/// vcpu.flush_all();
/// assert!(vcpu.access(&memory, Gpa(0x456), GuestAccess::Read).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct SoftwareVcpu<W, const SETS: usize = 128> {
    walker: W,
    /// Addresses of the roots that are told apart.
    roots: [Option<Hpa>; ROOTS],
    /// The current one of them.
    root: Hpa,
    /// Its number in `roots`, in the bits of a key above a page number.
    context: u64,
    /// Place in `roots` that is given away next.
    turn: usize,
    small: Cache<Page, SETS>,
    large: Cache<Page, LARGE_SETS>,
    huge: Cache<Page, HUGE_SETS>,
    /// Tables of levels 1 to 4.
    tables: [Cache<Cursor, TABLE_SETS>; 4],
    counters: Counters,
}

/// Page number of `gpa` in pages of what an entry of `level` maps.
#[inline]
const fn page(gpa: Gpa, level: Level) -> u64 {
    gpa.gfn().0 >> level.gfn_shift()
}

impl<W: Walker, const SETS: usize> SoftwareVcpu<W, SETS> {
    /// vCPU with nothing cached that walks from `root`, a table of the walker's root level.
    pub fn new(walker: W, root: Hpa) -> Self {
        let filler = walker.at_root(root);
        let mut roots = [None; ROOTS];
        roots[0] = Some(root);
        Self {
            walker,
            roots,
            root,
            context: 0,
            turn: 1,
            small: Cache::new(Page::FILLER),
            large: Cache::new(Page::FILLER),
            huge: Cache::new(Page::FILLER),
            tables: core::array::from_fn(|_| Cache::new(filler)),
            counters: Counters::default(),
        }
    }

    /// The walker.
    pub const fn walker(&self) -> &W {
        &self.walker
    }

    /// The current root.
    pub const fn root(&self) -> Hpa {
        self.root
    }

    /// What it has done so far.
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// Walks from `root` from now on. Flushes nothing; see the module.
    pub fn set_root(&mut self, root: Hpa) {
        let known = self.roots.iter().position(|&r| r == Some(root));
        let number = known.unwrap_or_else(|| {
            let number = self.turn;
            self.turn = (number + 1) % ROOTS;
            self.roots[number] = Some(root);
            self.drop_keys(|key, _| key >> ROOT_SHIFT == number as u64);
            number
        });
        self.root = root;
        self.context = (number as u64) << ROOT_SHIFT;
    }

    /// Translates `gpa` for `access`, from the TLB if it can, else by a walk of `memory`.
    ///
    /// Flags in a [`Translation`] from the TLB are those of the time when it was cached.
    ///
    /// # Errors
    ///
    /// What the walker reports. After that, nothing is cached for `gpa`.
    #[inline]
    pub fn access<M: PhysicalMemory + ?Sized>(
        &mut self,
        memory: &M,
        gpa: Gpa,
        access: GuestAccess,
    ) -> Result<Translation, WalkError<W::Fault>> {
        let found = self.look_up(gpa);
        if let Some((page, level)) = found
            && page.usable.contains(self.walker.needs(access))
        {
            let translation = page.translation(gpa, level);
            self.counters.hits += 1;
            return Ok(translation);
        }
        let level = found.map(|(_, level)| level);
        self.walk(memory, gpa, access, level)
    }

    #[inline]
    fn look_up(&self, gpa: Gpa) -> Option<(&Page, Level)> {
        let key = |level| page(gpa, level) | self.context;
        if let Some(page) = self.small.get(key(Level::L1)) {
            return Some((page, Level::L1));
        }
        if let Some(page) = self.large.get(key(Level::L2)) {
            return Some((page, Level::L2));
        }
        self.huge.get(key(Level::L3)).map(|page| (page, Level::L3))
    }

    /// Walks; `insufficient` is the level of a TLB entry that does not allow the access.
    #[cold]
    #[inline(never)]
    fn walk<M: PhysicalMemory + ?Sized>(
        &mut self,
        memory: &M,
        gpa: Gpa,
        access: GuestAccess,
        insufficient: Option<Level>,
    ) -> Result<Translation, WalkError<W::Fault>> {
        match insufficient {
            Some(level) => {
                self.counters.upgrades += 1;
                self.drop_page(gpa, level);
            }
            None => self.counters.misses += 1,
        }
        let known = self.deepest_table(gpa);
        let mut result = self.walk_once(memory, known, gpa, access);
        if known.is_some()
            && let Err(WalkError::Fault(fault)) = &result
            && self.walker.repeats_before(fault)
        {
            result = self.walk_once(memory, None, gpa, access);
        }
        match &result {
            Ok(translation) => self.keep(gpa, translation),
            Err(_) => {
                self.counters.faults += 1;
                self.drop_address(gpa);
            }
        }
        result
    }

    /// One walk, from `known` or else from the root, which fills the paging-structure cache.
    fn walk_once<M: PhysicalMemory + ?Sized>(
        &mut self,
        memory: &M,
        known: Option<Cursor>,
        gpa: Gpa,
        access: GuestAccess,
    ) -> Result<Translation, WalkError<W::Fault>> {
        self.counters.walks += 1;
        self.counters.short_walks += u64::from(known.is_some());
        let from = known.unwrap_or_else(|| self.walker.at_root(self.root));
        let Self {
            walker,
            tables,
            context,
            ..
        } = self;
        walker.walk_on(memory, from, gpa, access, |table| {
            if let Some(level) = table.level.above() {
                tables[table.level as usize - 1].insert(page(gpa, level) | *context, table);
            }
        })
    }

    /// The cached table nearest to the leaf on the way to `gpa`. A table is known by the address bits that choose
    /// the entry that points to it.
    fn deepest_table(&self, gpa: Gpa) -> Option<Cursor> {
        let levels = [Level::L2, Level::L3, Level::L4, Level::L5];
        let found = self
            .tables
            .iter()
            .zip(levels)
            .find_map(|(cache, level)| cache.get(page(gpa, level) | self.context));
        found.copied()
    }

    fn keep(&mut self, gpa: Gpa, translation: &Translation) {
        let &Translation {
            hpa,
            level,
            permissions,
            memory_type,
            accessed,
            dirty,
        } = translation;
        let mut usable = permissions;
        if self.walker.keeps_flags() && !dirty {
            usable.remove(Permissions::WRITE);
        }
        let base = hpa.0 & !(level.bytes() - 1);
        let entry = Page {
            base,
            permissions,
            usable,
            memory_type,
            accessed,
            dirty,
        };
        let key = page(gpa, level) | self.context;
        match level {
            Level::L1 => self.small.insert(key, entry),
            Level::L2 => self.large.insert(key, entry),
            Level::L3 => self.huge.insert(key, entry),
            // No format has pages of that size.
            Level::L4 | Level::L5 => {}
        }
    }

    fn drop_page(&mut self, gpa: Gpa, level: Level) {
        let key = page(gpa, level) | self.context;
        match level {
            Level::L1 => self.small.remove(key),
            Level::L2 => self.large.remove(key),
            Level::L3 => self.huge.remove(key),
            Level::L4 | Level::L5 => {}
        }
    }

    /// Drops all that the current root has cached for `gpa`.
    fn drop_address(&mut self, gpa: Gpa) {
        for level in [Level::L1, Level::L2, Level::L3] {
            self.drop_page(gpa, level);
        }
        for (cache, level) in
            self.tables
                .iter_mut()
                .zip([Level::L2, Level::L3, Level::L4, Level::L5])
        {
            cache.remove(page(gpa, level) | self.context);
        }
    }

    /// Drops every entry of every cache for which `unwanted` holds; it is given the key and the level of entry whose
    /// span the key numbers.
    fn drop_keys(&mut self, unwanted: impl Fn(u64, Level) -> bool) {
        self.small.remove_if(|key| unwanted(key, Level::L1));
        self.large.remove_if(|key| unwanted(key, Level::L2));
        self.huge.remove_if(|key| unwanted(key, Level::L3));
        for (cache, level) in
            self.tables
                .iter_mut()
                .zip([Level::L2, Level::L3, Level::L4, Level::L5])
        {
            cache.remove_if(|key| unwanted(key, level));
        }
    }

    /// Drops all cached information of all roots, as INVEPT of all contexts does.
    pub fn flush_all(&mut self) {
        self.counters.flushes += 1;
        self.small.clear();
        self.large.clear();
        self.huge.clear();
        self.tables.iter_mut().for_each(Cache::clear);
    }

    /// Drops, in all roots, translations of every page that has a byte in `start..end` and every table through which
    /// an address in it is reached. Nothing else goes: what a missing flush leaves behind stays visible.
    pub fn flush_gpa_range(&mut self, start: Gpa, end: Gpa) {
        self.counters.flushes += 1;
        if start >= end {
            return;
        }
        let last = Gpa(end.0 - 1);
        self.drop_keys(|key, level| {
            let number = key & ((1 << ROOT_SHIFT) - 1);
            (page(start, level)..=page(last, level)).contains(&number)
        });
    }
}
