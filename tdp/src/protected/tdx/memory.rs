//! The physical memory that the module manages: metadata of every page, content of those that hold tables.
//!
//! Protocol. Everything hangs off one array with a cell for each 2 MiB of memory, filled when that memory is first
//! touched and never emptied, so that looking a page up is two loads and no reference ever dangles. A table's content
//! belongs to the module: it is encrypted by the TD's key and the host has no pointer to it. What counts as a table at
//! any moment is said by the metadata alone: a walk that comes to a page which is no table any more finds no memory.

use super::pamt::{PageKind, PamtEntry};
use super::state::Entry;
use alloc::boxed::Box;
use core::array;
use core::ops::Range;
use std::sync::OnceLock;
use tdp_arch::walker::PhysicalMemory;
use tdp_arch::{ENTRIES_PER_TABLE, Hpa, Level, Pfn};
use tdp_rcu::sync::{AtomicU64, Ordering};

/// Content of one table page.
#[derive(Debug)]
pub(crate) struct Table {
    entries: [AtomicU64; ENTRIES_PER_TABLE],
}

impl Table {
    fn new() -> Self {
        Self {
            entries: array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// The word at `index`, taken modulo the size of a table.
    pub(crate) fn word(&self, index: usize) -> &AtomicU64 {
        &self.entries[index % ENTRIES_PER_TABLE]
    }

    /// Every word, in order.
    pub(crate) fn words(&self) -> impl Iterator<Item = &AtomicU64> {
        self.entries.iter()
    }

    /// Fills a page that no entry points to yet.
    pub(crate) fn fill(&self, mut entry: impl FnMut(usize) -> Entry) {
        for (index, word) in self.entries.iter().enumerate() {
            // Relaxed: the commit of the entry that will point here publishes all of it.
            word.store(entry(index).0, Ordering::Relaxed);
        }
    }
}

/// Metadata and content of 2 MiB.
#[derive(Debug)]
struct Region {
    whole: PamtEntry,
    pages: [PamtEntry; ENTRIES_PER_TABLE],
    tables: [OnceLock<Box<Table>>; ENTRIES_PER_TABLE],
}

impl Region {
    fn new() -> Self {
        Self {
            whole: PamtEntry::new(),
            pages: array::from_fn(|_| PamtEntry::new()),
            tables: array::from_fn(|_| OnceLock::new()),
        }
    }
}

/// Metadata of a page and of the larger blocks that it lies in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Metadata<'a> {
    pub(crate) gigabyte: &'a PamtEntry,
    pub(crate) block: &'a PamtEntry,
    pub(crate) page: &'a PamtEntry,
    /// All pages of the block.
    pub(crate) block_pages: &'a [PamtEntry],
}

impl<'a> Metadata<'a> {
    /// The entry of the leaf that a Secure-EPT entry of `level` holds.
    pub(crate) const fn at(&self, level: Level) -> &'a PamtEntry {
        match level {
            Level::L1 => self.page,
            Level::L2 => self.block,
            Level::L3 | Level::L4 | Level::L5 => self.gigabyte,
        }
    }
}

/// The memory that the module manages.
#[derive(Debug)]
pub(crate) struct Memory {
    pages: Range<Pfn>,
    gigabytes: Box<[PamtEntry]>,
    regions: Box<[OnceLock<Box<Region>>]>,
}

/// Units of `level` from the one that holds the first page to the one that holds the last.
fn units(pages: &Range<Pfn>, level: Level) -> u64 {
    let size = level.pages();
    pages.end.0.div_ceil(size) - pages.start.0 / size
}

impl Memory {
    /// Most pages that can be managed: 4 TiB.
    pub(crate) const LIMIT: u64 = 1 << 30;

    /// Memory that belongs to nobody; `None` if there is none or too much of it.
    pub(crate) fn new(pages: Range<Pfn>) -> Option<Self> {
        let count = pages.end.0.checked_sub(pages.start.0)?;
        if count == 0 || count > Self::LIMIT || pages.end.0 > 1 << 40 {
            return None;
        }
        let gigabytes = units(&pages, Level::L3);
        let regions = units(&pages, Level::L2);
        Some(Self {
            gigabytes: (0..gigabytes).map(|_| PamtEntry::new()).collect(),
            regions: (0..regions).map(|_| OnceLock::new()).collect(),
            pages,
        })
    }

    /// Index of the unit of `level` that holds `pfn`, which is one of ours.
    fn unit(&self, pfn: Pfn, level: Level) -> usize {
        let size = level.pages();
        (pfn.0 / size - self.pages.start.0 / size) as usize
    }

    fn cell(&self, pfn: Pfn) -> Option<&OnceLock<Box<Region>>> {
        if !self.pages.contains(&pfn) {
            return None;
        }
        self.regions.get(self.unit(pfn, Level::L2))
    }

    fn region(&self, pfn: Pfn) -> Option<&Region> {
        Some(self.cell(pfn)?.get_or_init(|| Box::new(Region::new())))
    }

    /// Whether every page of a block of `level` from `pfn` on is managed.
    pub(crate) fn contains(&self, pfn: Pfn, level: Level) -> bool {
        self.pages.contains(&pfn) && pfn.0 + level.pages() <= self.pages.end.0
    }

    /// Metadata of a page; `None` if it is not managed.
    pub(crate) fn metadata(&self, pfn: Pfn) -> Option<Metadata<'_>> {
        let region = self.region(pfn)?;
        Some(Metadata {
            gigabyte: self.gigabytes.get(self.unit(pfn, Level::L3))?,
            block: &region.whole,
            page: &region.pages[pfn.0 as usize % ENTRIES_PER_TABLE],
            block_pages: &region.pages,
        })
    }

    /// Content of a page as a table, whatever it is used for; `None` if it is not managed.
    pub(crate) fn table(&self, page: Hpa) -> Option<&Table> {
        let pfn = page.pfn();
        let cell = &self.region(pfn)?.tables[pfn.0 as usize % ENTRIES_PER_TABLE];
        Some(cell.get_or_init(|| Box::new(Table::new())))
    }
}

/// As the processor sees it: only tables are there, and nothing can be written, because Secure EPT is walked with
/// accessed and dirty flags off.
impl PhysicalMemory for Memory {
    fn load(&self, hpa: Hpa) -> Option<u64> {
        let pfn = hpa.pfn();
        let index = pfn.0 as usize % ENTRIES_PER_TABLE;
        let region = self.cell(pfn)?.get()?;
        if !matches!(region.pages[index].kind(), PageKind::Ept | PageKind::Tdcx) {
            return None;
        }
        let word = region.tables[index]
            .get()?
            .word((hpa.page_offset() / 8) as usize);
        // Acquire: pairs with the Release of the commit that made a table reachable.
        Some(word.load(Ordering::Acquire))
    }

    fn compare_exchange(&self, hpa: Hpa, _current: u64, _new: u64) -> Result<(), u64> {
        Err(self.load(hpa).unwrap_or(0))
    }
}
