//! Tables and their metadata: a word per table frame beside the page itself, and its protected twin.
//!
//! Protocol. A frame is *spare* in a vCPU's cache, *linked* in one tree, *sealed* once it is unlinked, and gone when it
//! is retired. The word says so, with the place that the table has in its tree. It is written before the exchange that
//! links the table (which publishes it) and after the one that unlinks it, so whoever owns the step owns the word; a
//! walk never reads it.

use crate::entry::TablePage;
use crate::host::{AddressSpaceId, FrameSource};
use alloc::boxed::Box;
use tdp_arch::{Gfn, Level, Pfn};
use tdp_rcu::sync::Plain;

/// What a frame is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum TableState {
    /// Not in use by the MMU.
    Free = 0,
    /// In a vCPU's cache, every entry empty.
    Spare = 1,
    /// Reachable from a root, or about to be.
    Linked = 2,
    /// Unlinked, every entry sealed.
    Sealed = 3,
}

const STATE_BITS: u32 = 2;
const LEVEL_BITS: u32 = 3;
const SPACE_BITS: u32 = 1;
const PRIVATE_BITS: u32 = 1;
const LEVEL_SHIFT: u32 = STATE_BITS;
const SPACE_SHIFT: u32 = LEVEL_SHIFT + LEVEL_BITS;
const PRIVATE_SHIFT: u32 = SPACE_SHIFT + SPACE_BITS;
const GFN_SHIFT: u32 = PRIVATE_SHIFT + PRIVATE_BITS;
const _: () = assert!(GFN_SHIFT + 52 - 12 <= 64, "a frame number of 40 bits fits");

/// Place of a table in its tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) as_id: AddressSpaceId,
    /// In the private half: the table has a twin, if the module wants one.
    pub(crate) private: bool,
    /// Level of its entries.
    pub(crate) level: Level,
    /// First guest frame below it.
    pub(crate) gfn: Gfn,
}

/// One word for every frame of the source's window, two if there is a private half.
pub(crate) struct TableMeta {
    words: Box<[Plain]>,
    /// Twin of each table of a private tree, plus one; 0 for none. Empty without a private half.
    twins: Box<[Plain]>,
    base: Pfn,
}

impl TableMeta {
    /// Bytes of metadata for one table.
    pub(crate) const BYTES: usize = size_of::<u64>();

    pub(crate) fn new(frames: &impl FrameSource, twins: bool) -> Self {
        let window = frames.window();
        let count = usize::try_from(window.end.0.saturating_sub(window.start.0)).unwrap_or(0);
        Self {
            words: Plain::zeroed(count),
            twins: Plain::zeroed(if twins { count } else { 0 }),
            base: window.start,
        }
    }

    fn index(&self, pfn: Pfn) -> Option<usize> {
        usize::try_from(pfn.0.checked_sub(self.base.0)?).ok()
    }

    fn word(&self, pfn: Pfn) -> Option<&Plain> {
        self.words.get(self.index(pfn)?)
    }

    /// Notes the page that the module has for its table, or that it has none any more. Done by whoever owns the table's
    /// entry.
    pub(crate) fn set_twin(&self, pfn: Pfn, twin: Option<Pfn>) {
        if let Some(word) = self.index(pfn).and_then(|index| self.twins.get(index)) {
            word.set(twin.map_or(0, |twin| twin.0 + 1));
        }
    }

    /// The page that the module has for a table of the private half.
    pub(crate) fn twin(&self, pfn: Pfn) -> Option<Pfn> {
        let word = self.twins.get(self.index(pfn)?)?.get();
        word.checked_sub(1).map(Pfn)
    }

    fn set(&self, pfn: Pfn, word: u64) {
        if let Some(slot) = self.word(pfn) {
            // Plain: published by the exchange that links the table, or read by the thread that wrote it.
            slot.set(word);
        }
    }

    /// Notes that the frame is about to be linked at `place`.
    pub(crate) fn link(&self, pfn: Pfn, place: Place) {
        debug_assert!(
            matches!(self.state(pfn), TableState::Spare),
            "only a spare table is linked"
        );
        self.set(
            pfn,
            TableState::Linked as u64
                | u64::from(place.level.number()) << LEVEL_SHIFT
                | u64::from(place.as_id.0) << SPACE_SHIFT
                | u64::from(place.private) << PRIVATE_SHIFT
                | place.gfn.0 << GFN_SHIFT,
        );
    }

    /// Notes a change of use.
    pub(crate) fn set_state(&self, pfn: Pfn, state: TableState) {
        self.set(pfn, state as u64);
    }

    /// What the frame is used for.
    pub(crate) fn state(&self, pfn: Pfn) -> TableState {
        let word = self.word(pfn).map_or(0, Plain::get);
        match word & ((1 << STATE_BITS) - 1) {
            1 => TableState::Spare,
            2 => TableState::Linked,
            3 => TableState::Sealed,
            _ => TableState::Free,
        }
    }

    /// Where a linked table stands.
    pub(crate) fn place(&self, pfn: Pfn) -> Option<Place> {
        let word = self.word(pfn)?.get();
        if word & ((1 << STATE_BITS) - 1) != TableState::Linked as u64 {
            return None;
        }
        Some(Place {
            as_id: AddressSpaceId((word >> SPACE_SHIFT & ((1 << SPACE_BITS) - 1)) as u8),
            private: word >> PRIVATE_SHIFT & ((1 << PRIVATE_BITS) - 1) != 0,
            level: Level::from_number((word >> LEVEL_SHIFT & ((1 << LEVEL_BITS) - 1)) as u8)?,
            gfn: Gfn(word >> GFN_SHIFT),
        })
    }
}

/// The page of a table frame.
///
/// The caller holds a critical section or a visit that began while the table was linked, or owns the frame.
#[allow(unsafe_code)]
#[inline(always)]
pub(crate) fn page(frames: &impl FrameSource, pfn: Pfn) -> &TablePage {
    // UNSAFETY: the one place where a frame number becomes a reference.
    // SAFETY: FrameSource promises a valid page for every frame of its window for as long as the source lives, and only
    // frames that it handed out are ever put into an entry (INV: one-choke-point). What is in the page is atomic, so a
    // reader that is late sees another table's entries at worst, and INV: flush-before-reuse keeps it from being late.
    unsafe { frames.page(pfn).as_ref() }
}

/// Frames that a vCPU keeps ready, so that a fault never allocates inside its critical section: tables, every entry empty;
/// or twins for tables of the private half.
pub(crate) struct TableCache {
    frames: [Pfn; TableCache::CAPACITY],
    len: usize,
}

impl TableCache {
    /// Most tables kept.
    const CAPACITY: usize = 32;

    pub(crate) fn new() -> Self {
        Self {
            frames: [Pfn(0); Self::CAPACITY],
            len: 0,
        }
    }

    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Free places, to be filled by a frame source; what was filled is taken over by [`TableCache::grown`].
    pub(crate) fn room(&mut self, want: usize) -> &mut [Pfn] {
        let end = (self.len + want).min(Self::CAPACITY);
        &mut self.frames[self.len..end]
    }

    /// Takes over `count` frames that were written to [`TableCache::room`]; returns them.
    pub(crate) fn grown(&mut self, count: usize) -> &[Pfn] {
        let start = self.len;
        self.len = (start + count).min(Self::CAPACITY);
        &self.frames[start..self.len]
    }

    #[inline]
    pub(crate) fn pop(&mut self) -> Option<Pfn> {
        self.len = self.len.checked_sub(1)?;
        Some(self.frames[self.len])
    }

    /// Takes a table back that was popped and is empty again.
    pub(crate) fn push(&mut self, pfn: Pfn) {
        debug_assert!(self.len < Self::CAPACITY, "only what was popped comes back");
        if let Some(slot) = self.frames.get_mut(self.len) {
            *slot = pfn;
            self.len += 1;
        }
    }

    /// Empties the cache.
    pub(crate) fn drain(&mut self) -> &[Pfn] {
        let len = core::mem::take(&mut self.len);
        &self.frames[..len]
    }
}
