//! The host's memory: which frame is whose.
//!
//! Guest memory is a number of areas, one slot each. Every page of an area has a *home*, the host frame that backs it,
//! and every host frame has an owner: a page, or nobody. A block of pages may have one home of 2 MiB; when one of its
//! pages moves, the block is broken, until all of it moves to a new large home. Frames are used again as soon as they
//! are given away, so that a translation to a former home finds another owner there.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tdp::{Gfn, GfnRange, Level, Pfn};

/// Areas of guest memory.
pub(crate) const AREAS: usize = 4;
/// Blocks of 2 MiB in one.
pub(crate) const BLOCKS: usize = 2;
pub(crate) const BLOCK_PAGES: usize = 512;
/// Pages in an area.
pub(crate) const PAGES: usize = BLOCKS * BLOCK_PAGES;
/// Guest frames from one place of an area to its other place.
const OTHER_PLACE: u64 = 1 << 18;

/// First host frame of guest memory.
const FRAMES: u64 = 1 << 22;
/// Large homes: a few more than are ever used at a time, so that each is used again soon.
const LARGE_HOMES: usize = AREAS * BLOCKS + 2;
/// Small homes; the same.
const SMALL_HOMES: usize = AREAS * PAGES + 64;
const SMALL_FRAMES: usize = LARGE_HOMES * BLOCK_PAGES;

/// Nobody's.
const NOBODY: u64 = 0;

/// Where an area is, as far as the guest may know: one word, so that it is read at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    /// A slot operation is under way: what it changes may be seen either way.
    pub(crate) changing: bool,
    /// There is a slot.
    pub(crate) present: bool,
    /// It is at its other place.
    pub(crate) moved: bool,
    pub(crate) read_only: bool,
}

impl Standing {
    fn to_word(self) -> u64 {
        u64::from(self.changing)
            | u64::from(self.present) << 1
            | u64::from(self.moved) << 2
            | u64::from(self.read_only) << 3
    }

    fn from_word(word: u64) -> Self {
        Self {
            changing: word & 1 != 0,
            present: word & 2 != 0,
            moved: word & 4 != 0,
            read_only: word & 8 != 0,
        }
    }
}

/// First guest frame of an area at one of its places.
pub(crate) fn area_start(area: usize, moved: bool) -> Gfn {
    let place = if moved { OTHER_PLACE } else { 0 };
    Gfn((area * PAGES) as u64 + place)
}

/// Its guest frames there.
pub(crate) fn area_range(area: usize, moved: bool) -> GfnRange {
    GfnRange::new(area_start(area, moved), PAGES as u64).expect("far from the end")
}

/// Guest frames from the first area to the last, at one place.
pub(crate) fn all_areas(moved: bool) -> GfnRange {
    GfnRange {
        start: area_start(0, moved),
        end: area_start(AREAS, moved),
    }
}

/// Page and place of a guest frame.
pub(crate) fn page_of(gfn: Gfn) -> Option<(usize, bool)> {
    let page = (gfn.0 % OTHER_PLACE) as usize;
    (gfn.0 < 2 * OTHER_PLACE && page < AREAS * PAGES).then_some((page, gfn.0 >= OTHER_PLACE))
}

#[derive(Debug)]
struct FreeHomes {
    large: Vec<usize>,
    small: Vec<usize>,
    /// Pages that live in each large home.
    inhabitants: Vec<usize>,
}

/// The memory.
#[derive(Debug)]
pub(crate) struct Memory {
    /// Owner of each host frame: a page and one, or nobody.
    owners: Vec<AtomicU64>,
    /// Home of each page.
    homes: Vec<AtomicU64>,
    /// Whether each block has a home of 2 MiB.
    whole: Vec<AtomicBool>,
    standings: Vec<AtomicU64>,
    /// Held by the host thread that changes an area.
    pub(crate) locks: Vec<Mutex<()>>,
    free: Mutex<FreeHomes>,
}

impl Memory {
    pub(crate) fn new() -> Self {
        let memory = Self {
            owners: (0..SMALL_FRAMES + SMALL_HOMES)
                .map(|_| AtomicU64::new(NOBODY))
                .collect(),
            homes: (0..AREAS * PAGES).map(|_| AtomicU64::new(0)).collect(),
            whole: (0..AREAS * BLOCKS)
                .map(|_| AtomicBool::new(false))
                .collect(),
            standings: (0..AREAS).map(|_| AtomicU64::new(0)).collect(),
            locks: (0..AREAS).map(|_| Mutex::new(())).collect(),
            free: Mutex::new(FreeHomes {
                large: (0..LARGE_HOMES).collect(),
                small: (SMALL_FRAMES..SMALL_FRAMES + SMALL_HOMES).collect(),
                inhabitants: vec![0; LARGE_HOMES],
            }),
        };
        for block in 0..AREAS * BLOCKS {
            memory.move_block(block);
        }
        memory
    }

    pub(crate) fn standing(&self, area: usize) -> Standing {
        // Acquire: pairs with the Release below. Whoever reads that a change is over reads it after the change.
        Standing::from_word(self.standings[area].load(Ordering::Acquire))
    }

    pub(crate) fn stand(&self, area: usize, standing: Standing) {
        self.standings[area].store(standing.to_word(), Ordering::Release);
    }

    /// What backs a page: host frame and largest leaf.
    pub(crate) fn backing(&self, page: usize) -> (Pfn, Level) {
        let whole = self.whole[page / BLOCK_PAGES].load(Ordering::Acquire);
        let home = self.homes[page].load(Ordering::Acquire);
        let level = if whole { Level::L2 } else { Level::L1 };
        (Pfn(FRAMES + home), level)
    }

    /// Whether a host frame belongs to a page now.
    pub(crate) fn is_owned(&self, pfn: Pfn, page: usize) -> bool {
        pfn.0
            .checked_sub(FRAMES)
            .and_then(|frame| self.owners.get(frame as usize))
            .is_some_and(|owner| owner.load(Ordering::Acquire) == page as u64 + 1)
    }

    fn settle(&self, page: usize, frame: usize) {
        self.owners[frame].store(page as u64 + 1, Ordering::Release);
        self.homes[page].store(frame as u64, Ordering::Release);
    }

    fn leave(&self, free: &mut FreeHomes, frame: usize) {
        self.owners[frame].store(NOBODY, Ordering::Release);
        if frame >= SMALL_FRAMES {
            free.small.push(frame);
        } else {
            let home = frame / BLOCK_PAGES;
            free.inhabitants[home] -= 1;
            if free.inhabitants[home] == 0 {
                free.large.push(home);
            }
        }
    }

    /// Moves one page to a small home. Its former home is given away.
    pub(crate) fn move_page(&self, page: usize) {
        let mut free = self.free.lock().expect("nobody panics inside");
        let Some(frame) = free.small.pop() else {
            return;
        };
        self.whole[page / BLOCK_PAGES].store(false, Ordering::Release);
        let old = self.homes[page].load(Ordering::Relaxed) as usize;
        self.settle(page, frame);
        self.leave(&mut free, old);
    }

    /// Moves all pages of a block to a large home, if there is one.
    pub(crate) fn move_block(&self, block: usize) {
        let mut free = self.free.lock().expect("nobody panics inside");
        let Some(home) = free.large.pop() else {
            return;
        };
        free.inhabitants[home] = BLOCK_PAGES;
        for index in 0..BLOCK_PAGES {
            let page = block * BLOCK_PAGES + index;
            let old = self.homes[page].load(Ordering::Relaxed) as usize;
            let lived_there = self.owners[old].load(Ordering::Relaxed) == page as u64 + 1;
            self.settle(page, home * BLOCK_PAGES + index);
            if lived_there {
                self.leave(&mut free, old);
            }
        }
        self.whole[block].store(true, Ordering::Release);
    }
}
