//! Guest memory that knows whose it is and what was written to it.
//!
//! Every page has a *home*, the host frame that backs it, and every host frame has an owner: a page, or nobody. A block of
//! 2 MiB may have one large home; when one of its pages moves, the block is broken, until all of it moves to a large home
//! again. A home that was left is given to another page as soon as possible, so that a translation to it finds another owner.
//! A frame holds one number, to which each write adds one.

use crate::sync::{AtomicBool, AtomicU64, Ordering};
use parking_lot::Mutex;
use tdp_arch::{Gfn, GfnRange, Level, Pfn};

/// Pages in a block.
pub(crate) const BLOCK: usize = 512;
/// First host frame: of a large home, aligned.
const FRAMES: u64 = 1 << 22;
/// Large homes more than blocks, and small ones in all.
const SPARE_BLOCKS: usize = 2;
const SMALL_HOMES: usize = 2048;
/// Nobody's.
const NOBODY: u64 = 0;

#[derive(Debug)]
struct Free {
    large: Vec<usize>,
    small: Vec<usize>,
    /// Pages that live in each large home.
    inhabitants: Vec<usize>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Homes {
    first: Gfn,
    pages: usize,
    /// Owner of each host frame: a page and one, or nobody.
    owners: Vec<AtomicU64>,
    /// What was written to each host frame.
    values: Vec<AtomicU64>,
    /// Home of each page.
    homes: Vec<AtomicU64>,
    /// Whether each block has a large home.
    whole: Vec<AtomicBool>,
    free: Mutex<Free>,
}

impl Homes {
    /// Memory of `gfns`, whole blocks, each in a large home.
    pub(crate) fn new(gfns: GfnRange) -> Self {
        let pages = gfns.pages() as usize;
        let blocks = pages / BLOCK;
        let large = blocks + SPARE_BLOCKS;
        let frames = large * BLOCK + SMALL_HOMES;
        let numbers = |count: usize| (0..count).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
        let homes = Self {
            first: gfns.start,
            pages,
            owners: numbers(frames),
            values: numbers(frames),
            homes: (0..pages).map(|page| AtomicU64::new(page as u64)).collect(),
            whole: (0..blocks).map(|_| AtomicBool::new(true)).collect(),
            free: Mutex::new(Free {
                large: (blocks..large).collect(),
                small: (large * BLOCK..frames).collect(),
                inhabitants: (0..large)
                    .map(|home| if home < blocks { BLOCK } else { 0 })
                    .collect(),
            }),
        };
        for page in 0..pages {
            homes.owners[page].store(page as u64 + 1, Ordering::Release);
        }
        homes
    }

    /// Number of a page.
    pub(crate) fn page(&self, gfn: Gfn) -> Option<usize> {
        let page = gfn.0.checked_sub(self.first.0)? as usize;
        (page < self.pages).then_some(page)
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// What backs a page: host frame and largest leaf.
    pub(crate) fn backing(&self, page: usize) -> (Pfn, Level) {
        let whole = self.whole[page / BLOCK].load(Ordering::Acquire);
        let home = self.homes[page].load(Ordering::Acquire);
        (
            Pfn(FRAMES + home),
            if whole { Level::L2 } else { Level::L1 },
        )
    }

    fn frame(&self, pfn: Pfn) -> Option<usize> {
        let frame = pfn.0.checked_sub(FRAMES)? as usize;
        (frame < self.owners.len()).then_some(frame)
    }

    /// Whether a host frame belongs to a page now.
    pub(crate) fn is_owned(&self, pfn: Pfn, page: usize) -> bool {
        self.frame(pfn)
            .is_some_and(|frame| self.owners[frame].load(Ordering::Acquire) == page as u64 + 1)
    }

    /// A guest writes to a host frame.
    pub(crate) fn write(&self, pfn: Pfn) {
        if let Some(frame) = self.frame(pfn) {
            self.values[frame].fetch_add(1, Ordering::AcqRel);
        }
    }

    /// What was written to a page. It does not move meanwhile.
    pub(crate) fn value(&self, page: usize) -> u64 {
        let _still = self.free.lock();
        let home = self.homes[page].load(Ordering::Acquire);
        self.values[home as usize].load(Ordering::Acquire)
    }

    /// Takes a page, with what was written to it, to another home and leaves the old one.
    fn settle(&self, free: &mut Free, page: usize, frame: usize) {
        let old = self.homes[page].load(Ordering::Relaxed) as usize;
        let value = self.values[old].load(Ordering::Acquire);
        self.values[frame].store(value, Ordering::Release);
        self.owners[frame].store(page as u64 + 1, Ordering::Release);
        self.homes[page].store(frame as u64, Ordering::Release);
        self.owners[old].store(NOBODY, Ordering::Release);
        let large = free.inhabitants.len() * BLOCK;
        if old >= large {
            free.small.push(old);
        } else {
            let home = old / BLOCK;
            free.inhabitants[home] -= 1;
            if free.inhabitants[home] == 0 {
                free.large.push(home);
            }
        }
    }

    /// Moves one page to a small home. No guest can reach it: it is under invalidation, zapped and flushed.
    pub(crate) fn move_page(&self, page: usize) {
        let mut free = self.free.lock();
        let Some(frame) = free.small.pop() else {
            return;
        };
        self.whole[page / BLOCK].store(false, Ordering::Release);
        self.settle(&mut free, page, frame);
    }

    /// Moves all pages of a block to a large home, if there is one; as [`move_page`](Self::move_page).
    pub(crate) fn move_block(&self, block: usize) {
        let mut free = self.free.lock();
        let Some(home) = free.large.pop() else {
            return;
        };
        free.inhabitants[home] = BLOCK;
        for index in 0..BLOCK {
            self.settle(&mut free, block * BLOCK + index, home * BLOCK + index);
        }
        self.whole[block].store(true, Ordering::Release);
    }
}
