//! One bit for every frame of a logged slot.
//!
//! The protocol is told in [`dirty`](crate::dirty).

use alloc::boxed::Box;
use alloc::vec::Vec;
use tdp_rcu::sync::{AtomicU64, Ordering};

/// Frames of the largest slot that is logged, 8 TiB less one: those of a slot of KVM's (`KVM_MEM_MAX_NR_PAGES` in its
/// `include/linux/kvm_host.h`). The marks are 256 MiB then.
pub(crate) const MOST_FRAMES: u64 = (1 << 31) - 1;

/// Words of the marks of so many frames, if those are not too many.
fn words_for(frames: u64) -> Option<usize> {
    if frames > MOST_FRAMES {
        return None;
    }
    usize::try_from(frames.div_ceil(64)).ok()
}

/// Marks of one slot. Shared by all states of the slot for as long as it is logged. On lines of its own: faults read where the
/// words are, and who asks for the log counts up the references to it, just before.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct DirtyBitmap {
    words: Box<[AtomicU64]>,
    frames: u64,
}

impl DirtyBitmap {
    /// For `frames` frames, all marked or none. `None` for more than [`MOST_FRAMES`], and without memory for it.
    pub(crate) fn new(frames: u64, marked: bool) -> Option<Self> {
        let count = words_for(frames)?;
        let mut words = Vec::new();
        // What a file or another process says may decide on the size: an allocation that is refused does not end the host.
        words.try_reserve_exact(count).ok()?;
        words.extend((0..count).map(|_| AtomicU64::new(0)));
        let bitmap = Self {
            words: words.into_boxed_slice(),
            frames,
        };
        if marked {
            for (index, word) in bitmap.words.iter().enumerate() {
                word.store(bitmap.valid(index), Ordering::Relaxed);
            }
        }
        Some(bitmap)
    }

    /// Words of 64 frames.
    pub(crate) fn words(&self) -> usize {
        self.words.len()
    }

    /// Bits of a word that stand for frames.
    pub(crate) fn valid(&self, word: usize) -> u64 {
        match self.frames.saturating_sub(word as u64 * 64) {
            0 => 0,
            rest if rest < 64 => (1 << rest) - 1,
            _ => u64::MAX,
        }
    }

    /// Marks `count` frames from `offset` on; those past the end are left out.
    pub(crate) fn mark(&self, offset: u64, count: u64) {
        let end = offset.saturating_add(count).min(self.frames);
        let mut at = offset;
        while at < end {
            let (word, bit) = (at / 64, at % 64);
            let part = (end - at).min(64 - bit);
            let mask = if part == 64 {
                u64::MAX
            } else {
                ((1 << part) - 1) << bit
            };
            if let Some(word) = self.words.get(word as usize) {
                // Always a read-modify-write, never only a look whether the bit is set: see the protocol. Release: pairs
                // with the Acquire of `take`: who takes the mark sees the leaf writable.
                word.fetch_or(mask, Ordering::Release);
            }
            at += part;
        }
    }

    /// Takes those marks of a word that `mask` names.
    pub(crate) fn take(&self, word: usize, mask: u64) -> u64 {
        let Some(bits) = self.words.get(word) else {
            return 0;
        };
        // A look first: most words are empty, and a word that is not written stays in every cache.
        if bits.load(Ordering::Relaxed) & mask == 0 {
            return 0;
        }
        bits.fetch_and(!mask, Ordering::AcqRel) & mask
    }

    /// The marks of a word.
    pub(crate) fn get(&self, word: usize) -> u64 {
        self.words
            .get(word)
            .map_or(0, |word| word.load(Ordering::Acquire))
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn a_log_has_room_for_the_largest_slot_of_kvm_and_no_more() {
        assert_eq!(words_for(MOST_FRAMES), Some(1 << 25));
        assert_eq!(words_for(MOST_FRAMES + 1), None);
        assert_eq!((words_for(1), words_for(65)), (Some(1), Some(2)));
    }
}
