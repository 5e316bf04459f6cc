//! Nodes of the attribute tree, and the marked pointers to them. The protocol is told in [`attributes`](super).
//!
//! Frames are numbered from the first of the node that is asked; a leaf ignores higher bits and takes full numbers as well.
//! Whatever changes a node is called with the writer's mutex held.

use super::{Visibility, past};
use alloc::boxed::Box;
use core::marker::PhantomData;
use core::ops::Range;
use tdp_arch::{Gfn, Level};
use tdp_rcu::sync::{AtomicPtr, AtomicU64, Ordering, Plain};

/// Entries of an inner node.
const ENTRIES: usize = if cfg!(loom) { 2 } else { 512 };
/// Blocks of 2 MiB below a leaf: the bits of its inhibit word.
const BLOCKS: usize = if cfg!(loom) { 2 } else { 64 };
/// Log2 of the frames of a word.
const WORD_SHIFT: u32 = u64::BITS.trailing_zeros();
/// Words of a block of 2 MiB.
const BLOCK_WORDS: usize = (Level::L2.pages() >> WORD_SHIFT) as usize;

/// A mark is in the two low bits of a pointer.
const MARK: usize = 0b11;
const SHARED: usize = 0b00;
const PRIVATE: usize = 0b01;
const MIXED: usize = 0b10;

/// A node of the tree.
pub(super) trait Node {
    /// Log2 of the frames below it.
    const SHIFT: u32;
    /// A node of shared frames, without inhibits.
    fn new() -> Self;
    /// Makes all frames one, whatever they were; inhibits stay.
    fn fill(&self, visibility: Visibility);
    /// Makes the frames of a range one.
    fn set(&self, range: Range<u64>, visibility: Visibility);
    /// What all frames are, if they are one.
    fn whole(&self) -> Option<Visibility>;
    /// As the function [`find`], below this node.
    fn find(&self, at: u64) -> Option<(Below<'_>, u32)>;
    /// As the function [`leaf`], below this node.
    fn leaf(&self, at: u64) -> Option<&Leaf>;
    /// As the function [`leaf_or_new`], below this node.
    fn leaf_or_new(&self, at: u64) -> Option<&Leaf>;
}

/// What a walk by marks ends at.
#[derive(Clone, Copy)]
pub(super) enum Below<'a> {
    /// All frames of the block are one.
    Uniform(Visibility),
    /// The leaf's words say it.
    Mixed(&'a Leaf),
}

/// Index of the entry of `C` for `at` in a node or root.
#[inline(always)]
fn entry<C: Node>(entries: &[Entry<C>], at: u64) -> Option<&Entry<C>> {
    entries.get(usize::try_from(at >> C::SHIFT).ok()?)
}

/// `at` relative to the node that covers it.
#[inline(always)]
fn within<C: Node>(at: u64) -> u64 {
    at & ((1 << C::SHIFT) - 1)
}

/// Cuts a range at multiples of 2^`shift`: index of each piece, and the piece relative to that multiple.
fn pieces(range: Range<u64>, shift: u32) -> impl Iterator<Item = (usize, Range<u64>)> {
    (range.start >> shift..range.end.div_ceil(1 << shift)).map(move |index| {
        let base = index << shift;
        let from = range.start.max(base) - base;
        let to = (range.end - base).min(1 << shift);
        (index as usize, from..to)
    })
}

/// Walks by marks to what says the visibility of `at`; `None` past the end of the root. With it comes the width (log2 of
/// frames) of the block for which it holds.
#[inline(always)]
pub(super) fn find<C: Node>(entries: &[Entry<C>], at: u64) -> Option<(Below<'_>, u32)> {
    let seen = entry(entries, at)?.load();
    match seen.uniform {
        Some(visibility) => Some((Below::Uniform(visibility), C::SHIFT)),
        None => seen.node?.find(within::<C>(at)),
    }
}

/// The leaf over `at`, if there is one, whatever the marks on the way.
#[inline(always)]
pub(super) fn leaf<C: Node>(entries: &[Entry<C>], at: u64) -> Option<&Leaf> {
    entry(entries, at)?.load().node?.leaf(within::<C>(at))
}

/// The leaf over `at`, made with the nodes on the way to it if there is none; no mark changes.
pub(super) fn leaf_or_new<C: Node>(entries: &[Entry<C>], at: u64) -> Option<&Leaf> {
    entry(entries, at)?
        .node_or_new()
        .leaf_or_new(within::<C>(at))
}

/// Makes the frames of a range one.
pub(super) fn set<C: Node>(entries: &[Entry<C>], range: Range<u64>, visibility: Visibility) {
    for (index, piece) in pieces(range, C::SHIFT) {
        if let Some(entry) = entries.get(index) {
            entry.set(piece, visibility);
        }
    }
}

/// A marked pointer to a node, which it owns.
pub(super) struct Entry<C> {
    word: AtomicPtr<C>,
    _owned: PhantomData<C>,
}

/// An entry as it was read.
struct Seen<'a, C> {
    node: Option<&'a C>,
    /// The mark; `None` is mixed, and there is a node.
    uniform: Option<Visibility>,
}

fn mark(uniform: Option<Visibility>) -> usize {
    match uniform {
        Some(Visibility::Shared) => SHARED,
        Some(Visibility::Private) => PRIVATE,
        None => MIXED,
    }
}

#[allow(unsafe_code)]
// UNSAFETY: nodes are reached through raw pointers, whose low bits are marks.
impl<C: Node> Entry<C> {
    pub(super) fn new(visibility: Visibility) -> Self {
        const { assert!(align_of::<C>() > MARK) };
        Self {
            word: AtomicPtr::new(core::ptr::without_provenance_mut(mark(Some(visibility)))),
            _owned: PhantomData,
        }
    }

    #[inline(always)]
    fn load(&self) -> Seen<'_, C> {
        // Acquire: pairs with the Release in `store`. Whoever sees a node sees it initialised, and under the mark mixed it
        // sees it filled (INV: publish-complete).
        let word = self.word.load(Ordering::Acquire);
        Seen {
            // SAFETY: without its mark a word is null or came from a box in `node_or_new`, initialised before it was
            // published; it is freed by the entry's drop alone, which the borrow of the entry rules out.
            node: unsafe { unmarked(word).as_ref() },
            uniform: match word.addr() & MARK {
                SHARED => Some(Visibility::Shared),
                PRIVATE => Some(Visibility::Private),
                _ => None,
            },
        }
    }

    fn store(&self, node: *mut C, uniform: Option<Visibility>) {
        let word = node.map_addr(|address| address | mark(uniform));
        // A store will do: only the holder of the writer's mutex stores. Release: pairs with the Acquire in `load`.
        self.word.store(word, Ordering::Release);
    }

    fn set_mark(&self, uniform: Option<Visibility>) {
        // Relaxed: the last to store was this thread, or one that held the mutex before.
        self.store(unmarked(self.word.load(Ordering::Relaxed)), uniform);
    }

    /// The node, made if there is none. The mark stays.
    fn node_or_new(&self) -> &C {
        let seen = self.load();
        if let Some(node) = seen.node {
            return node;
        }
        let node = Box::into_raw(Box::new(C::new()));
        self.store(node, seen.uniform);
        // SAFETY: it came from a box, and is freed by the entry's drop at the earliest.
        unsafe { &*node }
    }

    fn set(&self, range: Range<u64>, visibility: Visibility) {
        let uniform = self.load().uniform;
        if uniform == Some(visibility) {
            return;
        }
        if range == (0..1 << C::SHIFT) {
            self.set_mark(Some(visibility));
            return;
        }
        let node = self.node_or_new();
        if let Some(before) = uniform {
            // INV: publish-complete: what the mark says is in the node before the mark is gone.
            node.fill(before);
            self.set_mark(None);
        }
        node.set(range, visibility);
        if let Some(whole) = node.whole() {
            self.set_mark(Some(whole));
        }
    }
}

fn unmarked<C>(word: *mut C) -> *mut C {
    word.map_addr(|address| address & !MARK)
}

#[allow(unsafe_code)]
impl<C> Drop for Entry<C> {
    fn drop(&mut self) {
        let node = unmarked(self.word.load(Ordering::Acquire));
        if !node.is_null() {
            // UNSAFETY: the other end of `Box::into_raw`.
            // SAFETY: it came from a box in `node_or_new`, and nobody else holds the entry.
            drop(unsafe { Box::from_raw(node) });
        }
    }
}

/// A node of entries.
pub(super) struct Inner<C> {
    entries: [Entry<C>; ENTRIES],
}

impl<C: Node> Node for Inner<C> {
    const SHIFT: u32 = C::SHIFT + ENTRIES.trailing_zeros();

    fn new() -> Self {
        Self {
            entries: core::array::from_fn(|_| Entry::new(Visibility::Shared)),
        }
    }

    fn fill(&self, visibility: Visibility) {
        for entry in &self.entries {
            entry.set_mark(Some(visibility));
        }
    }

    fn set(&self, range: Range<u64>, visibility: Visibility) {
        set(&self.entries, range, visibility);
    }

    fn whole(&self) -> Option<Visibility> {
        let mut marks = self.entries.iter().map(|entry| entry.load().uniform);
        let first = marks.next()??;
        marks.all(|mark| mark == Some(first)).then_some(first)
    }

    #[inline(always)]
    fn find(&self, at: u64) -> Option<(Below<'_>, u32)> {
        find(&self.entries, at)
    }

    #[inline(always)]
    fn leaf(&self, at: u64) -> Option<&Leaf> {
        leaf(&self.entries, at)
    }

    fn leaf_or_new(&self, at: u64) -> Option<&Leaf> {
        leaf_or_new(&self.entries, at)
    }
}

/// 128 MiB of guest: a bit for each frame, set if it is private, and one for each block of 2 MiB, set if it is inhibited.
pub(super) struct Leaf {
    words: [AtomicU64; BLOCKS * BLOCK_WORDS],
    inhibited: AtomicU64,
    /// Bits that are set in `words`. Only writers look.
    private: Plain,
}

/// A word of 64 frames that are one.
#[inline(always)]
fn word_of(visibility: Visibility) -> u64 {
    match visibility {
        Visibility::Shared => 0,
        Visibility::Private => u64::MAX,
    }
}

/// What the first frame of a word is.
#[inline(always)]
fn visibility_of(word: u64) -> Visibility {
    if word & 1 == 0 {
        Visibility::Shared
    } else {
        Visibility::Private
    }
}

// Relaxed throughout: a word publishes nothing but itself, and coherence is all that a reader of one frame needs. What was
// set before the reader began reaches it through the entry's mark or through the caller's invalidation window.
impl Leaf {
    const FRAMES: u64 = 1 << Self::SHIFT;

    #[inline(always)]
    fn word(&self, at: u64) -> u64 {
        self.words[(at >> WORD_SHIFT) as usize % self.words.len()].load(Ordering::Relaxed)
    }

    #[inline(always)]
    fn bit_of_block(at: u64) -> u64 {
        1 << ((at >> Level::L2.gfn_shift()) as usize % BLOCKS)
    }

    #[inline(always)]
    pub(super) fn get(&self, at: u64) -> Visibility {
        visibility_of(self.word(at) >> (at % 64))
    }

    /// Whether all frames of a block of `level`, 2 MiB at most, are one.
    #[inline(always)]
    pub(super) fn uniform(&self, at: u64, level: Level) -> bool {
        let block = level.range(Gfn(at));
        let first = word_of(self.get(at));
        level == Level::L1
            || (block.start.0..block.end.0)
                .step_by(64)
                .all(|at| self.word(at) == first)
    }

    /// What `at` is, and the first frame after it that is not, or the end of the leaf.
    pub(super) fn run(&self, at: Gfn) -> (Visibility, Gfn) {
        let end = past(at, Self::SHIFT).0;
        // One load says both, so that whatever a writer does the run has a frame.
        let rest = self.word(at.0) >> (at.0 % 64);
        let visibility = visibility_of(rest);
        let mut others = rest ^ word_of(visibility) >> (at.0 % 64);
        let mut from = at.0;
        while others == 0 {
            from = (from | 63) + 1;
            if from >= end {
                return (visibility, Gfn(end));
            }
            others = self.word(from) ^ word_of(visibility);
        }
        (visibility, Gfn(from + u64::from(others.trailing_zeros())))
    }

    #[inline(always)]
    pub(super) fn is_inhibited(&self, at: u64) -> bool {
        self.inhibited.load(Ordering::Relaxed) & Self::bit_of_block(at) != 0
    }

    #[inline(always)]
    pub(super) fn any_inhibited(&self) -> bool {
        self.inhibited.load(Ordering::Relaxed) != 0
    }

    pub(super) fn set_inhibited(&self, at: u64, inhibited: bool) {
        let bit = Self::bit_of_block(at);
        if inhibited {
            self.inhibited.fetch_or(bit, Ordering::Relaxed);
        } else {
            self.inhibited.fetch_and(!bit, Ordering::Relaxed);
        }
    }
}

impl Node for Leaf {
    const SHIFT: u32 = Level::L2.gfn_shift() + BLOCKS.trailing_zeros();

    fn new() -> Self {
        Self {
            words: core::array::from_fn(|_| AtomicU64::new(0)),
            inhibited: AtomicU64::new(0),
            private: Plain::default(),
        }
    }

    fn fill(&self, visibility: Visibility) {
        let word = word_of(visibility);
        for slot in &self.words {
            // A store will do: whoever may be looking finds the word to be this already.
            slot.store(word, Ordering::Relaxed);
        }
        self.private.set(match visibility {
            Visibility::Shared => 0,
            Visibility::Private => Self::FRAMES,
        });
    }

    fn set(&self, range: Range<u64>, visibility: Visibility) {
        for (index, piece) in pieces(range, WORD_SHIFT) {
            let Some(word) = self.words.get(index) else {
                return;
            };
            let mask = u64::MAX >> (64 - (piece.end - piece.start)) << piece.start;
            // Read-modify-writes of the range's own bits: the others belong to frames that may be read just now.
            let (before, after) = match visibility {
                Visibility::Private => {
                    let before = word.fetch_or(mask, Ordering::Relaxed);
                    (before, before | mask)
                }
                Visibility::Shared => {
                    let before = word.fetch_and(!mask, Ordering::Relaxed);
                    (before, before & !mask)
                }
            };
            let private = self.private.get() + u64::from(after.count_ones());
            self.private.set(private - u64::from(before.count_ones()));
        }
    }

    fn whole(&self) -> Option<Visibility> {
        match self.private.get() {
            0 => Some(Visibility::Shared),
            Self::FRAMES => Some(Visibility::Private),
            _ => None,
        }
    }

    #[inline(always)]
    fn find(&self, _at: u64) -> Option<(Below<'_>, u32)> {
        Some((Below::Mixed(self), Self::SHIFT))
    }

    #[inline(always)]
    fn leaf(&self, _at: u64) -> Option<&Leaf> {
        Some(self)
    }

    fn leaf_or_new(&self, _at: u64) -> Option<&Leaf> {
        Some(self)
    }
}
