//! Collecting the dirty log of a slot, clearing parts of it, and switching it on.
//!
//! The protocol is told in [`dirty`](crate::dirty).

use crate::dirty::{DirtyBitmap, DirtyPage, DirtyRing, DirtyTracking};
use crate::entry;
use crate::event;
use crate::host::{AddressSpaceId, Host};
use crate::mmu::{Mmu, Shared};
use crate::range::leaves::{LeafStep, Marks, Verdict};
use crate::range::protect::may_be_cached_writable;
use crate::root::Root;
use crate::slots::{Slot, SlotFlags, SlotId};
use crate::tlb::PendingFlush;
use alloc::sync::Arc;
use alloc::vec::Vec;
use tdp_arch::{AdBits, Format, Gfn, GfnRange, Level, Spte};

/// Words of marks that are taken before their leaves are restricted: 16 MiB of guest memory.
const WORDS_AT_A_TIME: usize = 64;

/// A dirty log could not be used so; nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyLogError {
    /// No slot of that id.
    #[error("there is no slot {} in address space {}", id.0, as_id.0)]
    NoSuchSlot {
        /// Address space.
        as_id: AddressSpaceId,
        /// What was asked for.
        id: SlotId,
    },
    /// The slot's writes are not logged.
    #[error("slot {} is not logged", id.0)]
    NotLogged {
        /// The slot.
        id: SlotId,
    },
    /// The bitmap has another size.
    #[error("the slot has {words} words of marks, the bitmap {given}")]
    WrongLength {
        /// Words that the slot has.
        words: usize,
        /// Words that were given.
        given: usize,
    },
    /// The part to be cleared begins inside a word.
    #[error("frame {first} of the slot is not the first of a word of 64")]
    Unaligned {
        /// What was asked for.
        first: u64,
    },
    /// The part to be cleared reaches past the slot's end.
    #[error("{given} words from frame {first} on reach past the slot's {words} words")]
    BeyondEnd {
        /// What was asked for.
        first: u64,
        /// What was asked for.
        given: usize,
        /// Words that the slot has.
        words: usize,
    },
}

/// The dirty log of one slot. Made by [`Mmu::dirty_log`]; stays with the slot as it was then.
pub struct DirtyLog<'a, F: Format, H: Host> {
    shared: &'a Shared<F, H>,
    slot: Arc<Slot<H::Backing>>,
    bitmap: Arc<DirtyBitmap>,
}

impl<F: Format, H: Host> core::fmt::Debug for DirtyLog<'_, F, H> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("DirtyLog")
            .field("slot", &self.slot.id())
            .field("words", &self.bitmap.words())
            .finish()
    }
}

impl<'a, F: Format, H: Host> DirtyLog<'a, F, H> {
    /// Words of the bitmap: one for 64 frames, the last one perhaps for fewer. Bit `n` of word `w` stands for frame
    /// `64 * w + n` of the slot.
    pub fn words(&self) -> usize {
        self.bitmap.words()
    }

    /// Puts the marks into `bitmap` and takes them, so that each page is reported once for all its writes until then; with
    /// [`SlotFlags::LOG_MANUAL`] they stay, to be taken by [`clear`](DirtyLog::clear). The pages are to be read after the
    /// flush.
    ///
    /// With [`DirtyTracking::DirtyBit`] it waits for faults and sweeps that began before; it must not be called from inside a
    /// [`Batch`](crate::Batch) or a host callback.
    ///
    /// # Errors
    ///
    /// [`DirtyLogError::WrongLength`] unless `bitmap` has [`words`](DirtyLog::words) words.
    pub fn collect(&self, bitmap: &mut [u64]) -> Result<PendingFlush<'a, F, H>, DirtyLogError> {
        let words = self.words();
        if bitmap.len() != words {
            let given = bitmap.len();
            return Err(DirtyLogError::WrongLength { words, given });
        }
        let mut pending = PendingFlush::new(self.shared);
        if self.shared.dirty_tracking == DirtyTracking::DirtyBit {
            self.scan(&mut pending);
            // A leaf that was taken away before the scan came by is marked by whoever took it, in the same visit or section.
            self.shared.domain.synchronize();
        }
        if self.slot.flags().contains(SlotFlags::LOG_MANUAL) {
            for (word, marks) in bitmap.iter_mut().enumerate() {
                *marks = self.bitmap.get(word);
            }
        } else {
            for (chunk, marks) in bitmap.chunks_mut(WORDS_AT_A_TIME).enumerate() {
                let first = chunk * WORDS_AT_A_TIME;
                for (n, marks) in marks.iter_mut().enumerate() {
                    *marks = self.bitmap.take(first + n, u64::MAX);
                }
                self.restrict(first, marks, &mut pending);
            }
        }
        pending.settle(self.slot.as_id(), self.slot.gfns());
        Ok(pending)
    }

    /// Takes those marks from frame `first` of the slot on that `mask` names, so that the next write to their pages is
    /// noticed. The pages are to be read after the flush.
    ///
    /// # Errors
    ///
    /// [`DirtyLogError::Unaligned`] unless `first` is a multiple of 64, [`DirtyLogError::BeyondEnd`] if the mask is too
    /// long.
    pub fn clear(&self, first: u64, mask: &[u64]) -> Result<PendingFlush<'a, F, H>, DirtyLogError> {
        if !first.is_multiple_of(64) {
            return Err(DirtyLogError::Unaligned { first });
        }
        let (words, given) = (self.words(), mask.len());
        let start = usize::try_from(first / 64)
            .ok()
            .filter(|start| start.checked_add(given).is_some_and(|end| end <= words))
            .ok_or(DirtyLogError::BeyondEnd {
                first,
                given,
                words,
            })?;
        let mut pending = PendingFlush::new(self.shared);
        for (chunk, mask) in mask.chunks(WORDS_AT_A_TIME).enumerate() {
            let start = start + chunk * WORDS_AT_A_TIME;
            let mut taken = [0; WORDS_AT_A_TIME];
            for (n, (taken, &mask)) in taken.iter_mut().zip(mask).enumerate() {
                *taken = self.bitmap.take(start + n, mask);
            }
            self.restrict(start, &taken[..mask.len()], &mut pending);
        }
        pending.settle(self.slot.as_id(), self.slot.gfns());
        Ok(pending)
    }

    /// Marks `count` frames from frame `offset` of the slot on: for writes that are the embedder's own. Called after
    /// the write.
    pub fn mark(&self, offset: u64, count: u64) {
        self.bitmap.mark(offset, count);
    }

    /// Whether a frame of the slot is marked. A write that only a dirty bit or a ring knows of is not.
    pub fn is_marked(&self, offset: u64) -> bool {
        let word = usize::try_from(offset / 64).unwrap_or(usize::MAX);
        self.bitmap.get(word) >> (offset % 64) & 1 != 0
    }

    /// Moves the dirty bits of the slot's leaves into the bitmap.
    fn scan(&self, pending: &mut PendingFlush<'_, F, H>) {
        let (as_id, shared) = (self.slot.as_id(), self.shared);
        for root in shared.roots.of(as_id) {
            if !shared.tracks_by_bit(&root) {
                continue;
            }
            let mut visit = shared.domain.visit();
            shared.sweep_leaves(&mut visit, &root, self.slot.gfns(), |leaf| {
                if leaf.level > Level::L1 || leaf.spte.0 & F::DIRTY == 0 {
                    return Verdict::Next;
                }
                let clean = Spte(leaf.spte.0 & !F::DIRTY);
                if let Err(actual) = entry::amend::<F>(leaf.entry, leaf.level, leaf.spte, clean) {
                    return Verdict::Again(actual);
                }
                self.bitmap.mark(self.slot.offset(leaf.gfn), 1);
                pending.count_leaf();
                pending.note(as_id, leaf.range(), false);
                Verdict::Next
            });
        }
    }

    /// Restricts what `marks` name, words from `first` on.
    fn restrict(&self, first: usize, marks: &[u64], pending: &mut PendingFlush<'_, F, H>) {
        self.shared
            .restrict_marked(&self.slot, first, marks, pending);
    }
}

impl<F: Format, H: Host> Shared<F, H> {
    /// Whether writes below a root are noticed by dirty bits.
    pub(crate) fn tracks_by_bit(&self, root: &Root<H>) -> bool {
        self.dirty_tracking != DirtyTracking::WriteProtect && root.ad_bits == AdBits::Processor
    }

    /// Makes the next write to a leaf's pages be noticed.
    #[inline(always)]
    fn restrict_leaf(
        &self,
        as_id: AddressSpaceId,
        by_bit: bool,
        leaf: LeafStep<'_>,
        pending: &mut PendingFlush<'_, F, H>,
    ) -> Verdict {
        let is_small = leaf.level == Level::L1;
        let stale = if by_bit && is_small {
            leaf.spte.0 & F::DIRTY != 0
        } else {
            may_be_cached_writable::<F>(leaf.spte)
        };
        if !stale {
            return Verdict::Next;
        }
        // A large leaf loses its dirty bit too, or all that it is split into would seem to be written.
        let bits = match (by_bit, is_small) {
            (false, _) => F::WRITABLE,
            (true, true) => F::DIRTY,
            (true, false) => F::WRITABLE | F::DIRTY,
        };
        let restricted = Spte(leaf.spte.0 & !bits);
        if restricted != leaf.spte
            && let Err(actual) = entry::amend::<F>(leaf.entry, leaf.level, leaf.spte, restricted)
        {
            return Verdict::Again(actual);
        }
        pending.count_leaf();
        pending.note(as_id, leaf.range(), false);
        Verdict::Next
    }

    /// Restricts what `marks` name, words from `first` on, of a slot whose marks the caller has taken.
    fn restrict_marked(
        &self,
        slot: &Slot<H::Backing>,
        first: usize,
        marks: &[u64],
        pending: &mut PendingFlush<'_, F, H>,
    ) {
        let as_id = slot.as_id();
        let start = |word: usize| Gfn(slot.gfns().start.0 + (first + word) as u64 * 64);
        if self.eager_split && slot.flags().contains(SlotFlags::LOG_INITIALLY_SET) {
            // Nothing was split when this log began.
            let back = slot.bitmap().map(|bitmap| RemarkOnUnwind {
                bitmap,
                first,
                marks,
            });
            let mut word = 0;
            for run in marks.chunk_by(|a, b| (*a == 0) == (*b == 0)) {
                let end = word + run.len();
                if run[0] != 0 {
                    self.split_for_log(slot, start(word)..start(end).min(slot.gfns().end));
                }
                word = end;
            }
            core::mem::forget(back);
        }
        let Some(marks) = Marks::new(start(0), marks) else {
            return;
        };
        event::sweep("clear_dirty", as_id, marks.frames());
        for root in self.roots.of(as_id) {
            let by_bit = self.tracks_by_bit(&root);
            let mut visit = self.domain.visit();
            self.sweep_marked(&mut visit, &root, slot.gfns(), marks, |leaf| {
                self.restrict_leaf(as_id, by_bit, leaf, pending)
            });
        }
    }

    /// Begins to log a slot that is published as logged already, once no fault is left that knew it otherwise.
    pub(crate) fn start_log(&self, slot: &Slot<H::Backing>) -> PendingFlush<'_, F, H> {
        let (as_id, range) = (slot.as_id(), slot.gfns());
        event::sweep("start_log", as_id, range);
        let mut pending = PendingFlush::new(self);
        if !slot.flags().contains(SlotFlags::LOG_INITIALLY_SET) {
            if self.eager_split {
                let at_least = RestrictOnUnwind { shared: self, slot };
                self.split_for_log(slot, range);
                core::mem::forget(at_least);
            }
            self.restrict(slot, &mut pending);
        }
        pending.settle(as_id, range);
        pending
    }

    /// Has the next write to each page of a slot noticed.
    fn restrict(&self, slot: &Slot<H::Backing>, pending: &mut PendingFlush<'_, F, H>) {
        let as_id = slot.as_id();
        for root in self.roots.of(as_id) {
            let by_bit = self.tracks_by_bit(&root);
            let mut visit = self.domain.visit();
            self.sweep_leaves(&mut visit, &root, slot.gfns(), |leaf| {
                self.restrict_leaf(as_id, by_bit, leaf, pending)
            });
        }
    }

    fn split_for_log(&self, slot: &Slot<H::Backing>, range: impl Into<GfnRange>) {
        // What there is no frame for stays large, and is write-protected as a whole.
        let _ = self.split(slot.as_id(), range.into(), Level::L1);
    }

    /// Keeps the dirty bit of a leaf that was taken away, where nothing else tells of the write. Called where the leaf was
    /// taken away: in the same section or visit.
    #[inline(always)]
    pub(crate) fn keep_dirty(&self, as_id: AddressSpaceId, gfn: Gfn, level: Level, old: Spte) {
        if self.dirty_tracking == DirtyTracking::DirtyBit
            && F::is_leaf(old, level)
            && old.0 & (F::DIRTY | F::AD_SOFTWARE) == F::DIRTY
        {
            self.mark_dirty(as_id, gfn, level);
        }
    }

    /// As [`keep_dirty`](Self::keep_dirty). A visit of its own for each leaf would do as well, but the memory of all of them
    /// would wait for the end of the visit around them.
    #[cold]
    #[allow(unsafe_code)]
    fn mark_dirty(&self, as_id: AddressSpaceId, gfn: Gfn, level: Level) {
        // UNSAFETY: the slots are read by RCU, and what protects them is not at hand here.
        // SAFETY: whoever takes a leaf away is inside a section or a visit of this domain, and calls this from there; the
        // snapshot is used until the end of this function.
        let slots = unsafe { self.slots.protected() };
        let slot = slots.find(as_id, gfn);
        if let Some((slot, bitmap)) = slot.and_then(|slot| Some((slot, slot.bitmap()?))) {
            bitmap.mark(slot.offset(gfn), level.pages());
        }
    }
}

/// Restricts a slot although the host's frame source has panicked in making its leaves small: the slot says already that its
/// writes are noticed.
struct RestrictOnUnwind<'a, F: Format, H: Host> {
    shared: &'a Shared<F, H>,
    slot: &'a Slot<H::Backing>,
}

impl<F: Format, H: Host> Drop for RestrictOnUnwind<'_, F, H> {
    fn drop(&mut self) {
        let mut pending = PendingFlush::new(self.shared);
        self.shared.restrict(self.slot, &mut pending);
        pending.settle(self.slot.as_id(), self.slot.gfns());
        pending.flush();
    }
}

/// Puts marks back that were taken, although the host's frame source has panicked before what they name was restricted: the
/// leaves are writable still, and nothing else tells of their pages.
struct RemarkOnUnwind<'a> {
    bitmap: &'a DirtyBitmap,
    /// Word of the first of the marks.
    first: usize,
    marks: &'a [u64],
}

impl Drop for RemarkOnUnwind<'_> {
    fn drop(&mut self) {
        for (word, &marks) in (self.first as u64..).zip(self.marks) {
            for bit in (0..64).filter(|bit| marks >> bit & 1 != 0) {
                self.bitmap.mark(word * 64 + bit, 1);
            }
        }
    }
}

impl<F: Format, H: Host> Mmu<F, H> {
    /// The dirty log of a slot.
    ///
    /// # Errors
    ///
    /// [`DirtyLogError::NoSuchSlot`], or [`DirtyLogError::NotLogged`] if it has not [`SlotFlags::LOG_DIRTY`].
    pub fn dirty_log(
        &self,
        as_id: AddressSpaceId,
        id: SlotId,
    ) -> Result<DirtyLog<'_, F, H>, DirtyLogError> {
        let slot = self
            .slots()
            .by_id(as_id, id)
            .ok_or(DirtyLogError::NoSuchSlot { as_id, id })?;
        let bitmap = slot
            .bitmap()
            .ok_or(DirtyLogError::NotLogged { id })?
            .clone();
        Ok(DirtyLog {
            shared: self.shared(),
            slot,
            bitmap,
        })
    }

    /// The dirty rings of all vCPUs, and of those gone whose rings still hold something.
    pub fn dirty_rings(&self) -> Vec<Arc<DirtyRing>> {
        self.shared().rings.all()
    }

    /// Frees the entries of all rings that were harvested, so that the next write to their pages is noticed again.
    /// The pages are to be read after the flush.
    pub fn reset_dirty_rings(&self) -> PendingFlush<'_, F, H> {
        let shared = self.shared();
        let mut pending = PendingFlush::new(shared);
        shared.rings.free(|pages| {
            let mut pages: Vec<DirtyPage> = pages.collect();
            pages.sort_unstable();
            self.restrict_pages(&pages, &mut pending);
        });
        pending
    }

    /// Restricts pages in order.
    fn restrict_pages(&self, pages: &[DirtyPage], pending: &mut PendingFlush<'_, F, H>) {
        let mut words: Vec<u64> = Vec::new();
        for pages in pages.chunk_by(|a, b| (a.as_id, a.slot) == (b.as_id, b.slot)) {
            let Some(page) = pages.first() else {
                continue;
            };
            // Removed since, with all that it mapped.
            let Some(slot) = self.slots().by_id(page.as_id, page.slot) else {
                continue;
            };
            for run in pages.chunk_by(|a, b| b.offset / 64 - a.offset / 64 <= 1) {
                let first = run[0].offset / 64;
                words.clear();
                for page in run {
                    let word = (page.offset / 64 - first) as usize;
                    words.resize(words.len().max(word + 1), 0);
                    words[word] |= 1 << (page.offset % 64);
                }
                self.shared()
                    .restrict_marked(&slot, first as usize, &words, pending);
            }
            pending.settle(slot.as_id(), slot.gfns());
        }
    }
}
