//! One bit for every frame of a logged slot.
//!
//! The protocol is told in [`dirty`](crate::dirty).

use alloc::boxed::Box;
use tdp_rcu::sync::{AtomicU64, Ordering};

/// Marks of one slot. Shared by all states of the slot for as long as it is logged. On lines of its own: faults read where the
/// words are, and who asks for the log counts up the references to it, just before.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct DirtyBitmap {
    words: Box<[AtomicU64]>,
    frames: u64,
}

impl DirtyBitmap {
    /// For `frames` frames, all marked or none.
    pub(crate) fn new(frames: u64, marked: bool) -> Self {
        let count = usize::try_from(frames.div_ceil(64)).unwrap_or(usize::MAX);
        let bitmap = Self {
            words: (0..count).map(|_| AtomicU64::new(0)).collect(),
            frames,
        };
        if marked {
            for index in 0..count {
                bitmap.words[index].store(bitmap.valid(index), Ordering::Relaxed);
            }
        }
        bitmap
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
