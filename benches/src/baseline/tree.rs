//! The tables that our own baselines walk: pages of 512 entries in the library's formats, out of one arena.
//!
//! A table is named by its address in this process, which goes into an entry as if it were a physical address: the
//! walk needs no translation from frame to pointer at all. That favours the baselines.
//!
//! Tables are taken from the arena and linked, which is rare, under a lock; none is ever unlinked, so that nothing here
//! needs reclamation. What an
//! entry may hold is kept by this module alone: `Table::link` is the only writer of an entry that points to a
//! table, and every other entry that is written is a leaf of the table's own level, or in a table of level 1, from which
//! nothing leads on.

// UNSAFETY: turns the address in an entry into a reference, and maps the arena.
#![allow(unsafe_code)]

use crate::report::Error;
use crate::sync::{AtomicU64, AtomicUsize, Ordering};
use parking_lot::Mutex;
use std::io;
use std::marker::PhantomData;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use tdp_arch::walker::PhysicalMemory;
use tdp_arch::{
    ENTRIES_PER_TABLE, Format, Gfn, GfnRange, Hpa, LeafAttrs, Level, PAGE_SIZE, Perms, Pfn, Spte,
};

/// One table page.
#[repr(C, align(4096))]
struct Page([AtomicU64; ENTRIES_PER_TABLE]);

const _: () = assert!(size_of::<Page>() as u64 == PAGE_SIZE);

/// All memory that a baseline's tables can take, touched when made.
#[derive(Debug)]
pub struct Arena {
    base: NonNull<Page>,
    pages: usize,
    taken: AtomicUsize,
    /// Held while a table is linked, so that no page is lost to a race.
    linking: Mutex<()>,
}

// SAFETY: the pages hold atomics and belong to the arena alone until it is dropped.
unsafe impl Send for Arena {}
// SAFETY: as for `Send`; `take` hands every page out once.
unsafe impl Sync for Arena {}

impl Arena {
    /// An arena of `pages` pages; `huge` advises the operating system to back it by huge pages.
    ///
    /// # Errors
    ///
    /// If the memory cannot be had.
    pub fn new(pages: usize, huge: bool) -> Result<Self, Error> {
        let failed = |source: io::Error| {
            Error::run(format!("{pages} pages for a baseline's tables"), source)
        };
        let bytes = pages
            .max(1)
            .checked_mul(size_of::<Page>())
            .ok_or_else(|| failed(io::Error::from_raw_os_error(libc::ENOMEM)))?;
        // SAFETY: a new private anonymous mapping at an address of the system's choice touches nothing that exists.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        let base = NonNull::new(base.cast::<Page>())
            .ok_or_else(|| failed(io::ErrorKind::OutOfMemory.into()))?;
        let arena = Self {
            base,
            pages: pages.max(1),
            taken: AtomicUsize::new(0),
            linking: Mutex::new(()),
        };
        if huge {
            // SAFETY: the range is exactly the mapping made above. Advice may be refused; then there are small pages.
            let _ = unsafe { libc::madvise(base.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        // SAFETY: as above; the mapping is writable and nobody else knows it yet.
        unsafe { ptr::write_bytes(base.as_ptr().cast::<u8>(), 0, bytes) };
        // Entries hold addresses; `Table::next` turns them back into references.
        let _ = base.as_ptr().expose_provenance();
        Ok(arena)
    }

    /// A page filled with `empty`, or `None` if all are taken.
    fn take(&self, empty: Spte) -> Option<&Page> {
        let index = self
            .taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
                (n < self.pages).then_some(n + 1)
            })
            .ok()?;
        // SAFETY: `index` is below `pages`, so the page lies in the mapping, which lives as long as `self`; zeroed
        // memory is a valid `Page`.
        let page = unsafe { self.base.add(index).as_ref() };
        for entry in &page.0 {
            entry.store(empty.0, Ordering::Relaxed);
        }
        Some(page)
    }

    /// The address of a zeroed page, or `None` if all are taken. It is valid for as long as the arena lives.
    pub fn take_zeroed(&self) -> Option<NonNull<u8>> {
        self.take(Spte(0))
            .map(|page| NonNull::from_ref(page).cast())
    }

    /// Pages in all.
    pub fn pages(&self) -> usize {
        self.pages
    }
}

/// What the processor that walks the tables sees.
impl PhysicalMemory for Arena {
    fn load(&self, hpa: Hpa) -> Option<u64> {
        self.entry(hpa).map(|entry| entry.load(Ordering::Acquire))
    }

    fn compare_exchange(&self, hpa: Hpa, current: u64, new: u64) -> Result<(), u64> {
        self.entry(hpa)
            .ok_or(0u64)?
            .compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
    }
}

impl Arena {
    /// The entry at an address, if that lies in a page of the arena.
    fn entry(&self, hpa: Hpa) -> Option<&AtomicU64> {
        let offset = (hpa.0 as usize).checked_sub(self.base.as_ptr().addr())?;
        let (page, index) = (offset / size_of::<Page>(), offset % size_of::<Page>() / 8);
        if page >= self.pages {
            return None;
        }
        // SAFETY: `page` is below `pages`, so the page lies in the mapping, which lives as long as `self`; it is
        // initialised memory, and zeroed memory is a valid `Page`.
        Some(unsafe { &self.base.add(page).as_ref().0[index] })
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with this length; every reference into it borrowed `self`. An error
        // would leave it mapped, which harms nobody.
        let _ = unsafe { libc::munmap(self.base.as_ptr().cast(), self.pages * size_of::<Page>()) };
    }
}

/// A tree of tables with an arena of its own and a root of level `ROOT`, a constant so that the compiler can unroll
/// walks.
#[derive(Debug)]
pub struct Tree<F, const ROOT: u8> {
    arena: Arc<Arena>,
    root: usize,
    format: PhantomData<F>,
}

impl<F: Format, const ROOT: u8> Tree<F, ROOT> {
    /// Level of the root table.
    pub const LEVEL: Level = Level::from_number(ROOT).expect("a root level is 4 or 5");

    /// An empty tree in `arena`.
    ///
    /// # Errors
    ///
    /// If the arena has no page.
    pub fn new(arena: Arena) -> Result<Self, Error> {
        let root = arena.take(F::EMPTY).ok_or(Stuck::OutOfTables)?;
        let root = ptr::from_ref(root).addr();
        Ok(Self {
            arena: Arc::new(arena),
            root,
            format: PhantomData,
        })
    }

    /// The address of the root table, as the processor is given it.
    pub fn root_address(&self) -> Hpa {
        Hpa(self.root as u64)
    }

    /// The root table.
    #[inline(always)]
    pub fn root(&self) -> Table<'_, F> {
        // SAFETY: `root` is the address of a page of `arena`, which `self` keeps alive.
        let page = unsafe { page_at(self.root) };
        Table {
            page,
            level: Self::LEVEL,
            format: PhantomData,
        }
    }

    /// Its tables' memory.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// Which page of the arena `table` is.
    #[inline(always)]
    pub fn number(&self, table: Table<'_, F>) -> usize {
        (ptr::from_ref(table.page).addr() - self.arena.base.as_ptr().addr()) / size_of::<Page>()
    }

    /// The table of `target` that covers `gfn`; tables missing on the way are linked.
    ///
    /// # Errors
    ///
    /// [`Stuck`] if the arena is exhausted or a leaf of a higher level is in the way.
    #[inline(always)]
    pub fn descend(&self, gfn: Gfn, target: Level, order: Ordering) -> Result<Table<'_, F>, Stuck> {
        let mut table = self.root();
        while table.level > target {
            table = match table.next(gfn, order) {
                Ok(next) => next,
                Err(_) => table.link(gfn, &self.arena)?,
            };
        }
        Ok(table)
    }

    /// The tables of level 1 that hold frames of `range`, in order, each with the numbers of their entries. Parts without a
    /// table are passed over.
    #[inline(always)]
    pub fn small_tables(&self, range: GfnRange, mut see: impl FnMut(Table<'_, F>, Part)) {
        let mut gfn = range.start;
        while gfn < range.end {
            let covered = Level::L2.range(gfn);
            if let Some(table) = self.small_table(gfn) {
                see(table, Part::of(covered, range));
            }
            gfn = covered.end;
        }
    }

    /// The table of level 1 that holds `gfn`, if it is there.
    #[inline(always)]
    fn small_table(&self, gfn: Gfn) -> Option<Table<'_, F>> {
        let mut table = self.root();
        while table.level > Level::L1 {
            table = table.next(gfn, Ordering::Acquire).ok()?;
        }
        Some(table)
    }

    /// Makes every leaf of `level` empty; tables stay. Nobody else may be at work, or leaves may survive.
    pub fn clear_leaves(&self, level: Level) {
        self.root().clear_leaves(level);
    }

    /// The leaf that maps `gfn`, and its level.
    pub fn leaf(&self, gfn: Gfn) -> Option<(Spte, Level)> {
        let mut table = self.root();
        loop {
            match table.next(gfn, Ordering::Acquire) {
                Ok(next) => table = next,
                Err(spte) => return F::is_leaf(spte, table.level).then_some((spte, table.level)),
            }
        }
    }
}

/// A fault that a baseline cannot resolve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stuck {
    /// No memory for another table.
    #[error("a baseline's table memory is exhausted")]
    OutOfTables,
    /// A leaf where a table should be.
    #[error("a larger leaf is in the way at GFN {0}")]
    InTheWay(Gfn),
    /// Nothing is mapped there by the host.
    #[error("no slot at GFN {0}")]
    NoSlot(Gfn),
}

impl From<Stuck> for Error {
    fn from(stuck: Stuck) -> Self {
        Error::run("baseline", stuck)
    }
}

/// Entries of a table: the numbers of the first and of the one after the last.
#[derive(Clone, Copy, Debug)]
pub struct Part(usize, usize);

impl Part {
    /// Those of the table of `covered` that hold frames of `range`.
    fn of(covered: GfnRange, range: GfnRange) -> Self {
        let index = |gfn: Gfn| (gfn.0 - covered.start.0) as usize;
        Self(
            index(covered.start.max(range.start)),
            index(covered.end.min(range.end)),
        )
    }
}

/// A table of a [`Tree`].
#[derive(Debug)]
pub struct Table<'a, F> {
    page: &'a Page,
    level: Level,
    format: PhantomData<F>,
}

impl std::fmt::Debug for Page {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Page({self:p})")
    }
}

impl<F> Clone for Table<'_, F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<F> Copy for Table<'_, F> {}

/// The page at `address`.
///
/// # Safety
///
/// `address` is that of a page handed out by an [`Arena`] that lives for `'a`.
#[inline(always)]
unsafe fn page_at<'a>(address: usize) -> &'a Page {
    // SAFETY: the caller's; provenance was exposed in `Arena::new`.
    unsafe { &*ptr::with_exposed_provenance::<Page>(address) }
}

impl<'a, F: Format> Table<'a, F> {
    #[inline(always)]
    fn entry(self, gfn: Gfn) -> &'a AtomicU64 {
        &self.page.0[self.level.index(gfn)]
    }

    /// The table below `gfn`'s entry, or that entry if it is none.
    ///
    /// # Errors
    ///
    /// The entry, if it does not point to a table.
    #[inline(always)]
    pub fn next(self, gfn: Gfn, order: Ordering) -> Result<Self, Spte> {
        let spte = Spte(self.entry(gfn).load(order));
        match self.level.below() {
            Some(level) if F::is_table(spte) => {
                // SAFETY: above level 1 `link` alone writes entries that are tables (leaves carry `F::LARGE`), always
                // with the address of a page of the same arena, which is borrowed for `'a`.
                let page = unsafe { page_at((spte.0 & F::PFN_MASK) as usize) };
                Ok(Self {
                    page,
                    level,
                    format: PhantomData,
                })
            }
            _ => Err(spte),
        }
    }

    /// Links an empty table below `gfn`'s entry, or takes the one that another thread linked meanwhile.
    ///
    /// # Errors
    ///
    /// As [`Tree::descend`].
    #[cold]
    fn link(self, gfn: Gfn, arena: &'a Arena) -> Result<Self, Stuck> {
        if self.level.below().is_none() {
            return Err(Stuck::InTheWay(gfn));
        }
        let _linking = arena.linking.lock();
        match self.next(gfn, Ordering::Acquire) {
            Ok(next) => Ok(next),
            Err(spte) if spte != F::EMPTY => Err(Stuck::InTheWay(gfn)),
            Err(_) => {
                let page = arena.take(F::EMPTY).ok_or(Stuck::OutOfTables)?;
                let table = F::table(Pfn(ptr::from_ref(page).expose_provenance() as u64 >> 12));
                // Release: whoever reads the entry with Acquire sees the page filled.
                self.entry(gfn).store(table.0, Ordering::Release);
                self.next(gfn, Ordering::Acquire)
                    .map_err(|_| Stuck::InTheWay(gfn))
            }
        }
    }

    /// The leaf of this table's level for the page at `pfn`.
    #[inline(always)]
    fn leaf(self, pfn: Pfn) -> Spte {
        F::leaf(pfn, self.level, LeafAttrs::memory(Perms::RWX))
    }

    /// `gfn`'s entry.
    #[inline(always)]
    pub fn get(self, gfn: Gfn, order: Ordering) -> Spte {
        Spte(self.entry(gfn).load(order))
    }

    /// Stores a leaf in `gfn`'s entry, whatever was there.
    #[inline(always)]
    pub fn set(self, gfn: Gfn, pfn: Pfn, order: Ordering) {
        debug_assert!(!self.points_to_table(gfn));
        self.entry(gfn).store(self.leaf(pfn).0, order);
    }

    /// Stores a leaf in `gfn`'s entry if that is still `old`, which is no table.
    #[inline(always)]
    pub fn compare_exchange(self, gfn: Gfn, old: Spte, pfn: Pfn) -> bool {
        self.entry(gfn)
            .compare_exchange(old.0, self.leaf(pfn).0, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Replaces each entry of `part` for which `change` has another value, by one compare-exchange, and returns how many
    /// that were. What somebody else changes at that moment is left to them if `change` is asked again and has nothing.
    ///
    /// # Panics
    ///
    /// If this is not a table of level 1.
    #[inline(always)]
    pub fn sweep(self, part: Part, change: impl Fn(Spte) -> Option<Spte>) -> u64 {
        // Above it an entry may lead to a table, and `link` alone writes such.
        assert!(self.level == Level::L1, "leaves of level 1");
        let mut changed = 0;
        for entry in &self.page.0[part.0..part.1] {
            let mut old = entry.load(Ordering::Relaxed);
            while let Some(new) = change(Spte(old)) {
                match entry.compare_exchange(old, new.0, Ordering::AcqRel, Ordering::Relaxed) {
                    Ok(_) => {
                        changed += 1;
                        break;
                    }
                    Err(actual) => old = actual,
                }
            }
        }
        changed
    }

    /// Stores leaves for consecutive pages from `first` on, whatever was there.
    ///
    /// # Panics
    ///
    /// If this is not a table of level 1.
    #[inline(always)]
    pub fn fill(self, part: Part, first: Pfn) {
        assert!(self.level == Level::L1, "leaves of level 1");
        for (entry, pfn) in self.page.0[part.0..part.1].iter().zip(first.0..) {
            entry.store(self.leaf(Pfn(pfn)).0, Ordering::Relaxed);
        }
    }

    /// Entries of `part` that are as `is` asks.
    pub fn count(self, part: Part, is: impl Fn(Spte) -> bool) -> u64 {
        let entries = self.page.0[part.0..part.1].iter();
        entries
            .map(|entry| u64::from(is(Spte(entry.load(Ordering::Relaxed)))))
            .sum()
    }

    fn points_to_table(self, gfn: Gfn) -> bool {
        self.level != Level::L1 && F::is_table(self.get(gfn, Ordering::Relaxed))
    }

    fn clear_leaves(self, level: Level) {
        for index in 0..ENTRIES_PER_TABLE {
            let gfn = Gfn(index as u64 * self.level.pages());
            match self.next(gfn, Ordering::Relaxed) {
                Ok(next) => next.clear_leaves(level),
                Err(_) if self.level == level => {
                    self.entry(gfn).store(F::EMPTY.0, Ordering::Relaxed)
                }
                Err(_) => {}
            }
        }
    }
}
