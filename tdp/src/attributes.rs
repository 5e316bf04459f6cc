//! Attributes of guest frames: which are private and which shared, and which 2 MiB blocks must not be mapped huge.
//!
//! Protocol. A radix tree of atomics is read without a lock and without a write (INV: no-shared-write), from inside a
//! critical section of a vCPU or from anywhere else. Each entry of an inner node is a pointer to the node below and, in its
//! low bits, a *mark*: all frames below are shared, all are private, or *mixed*: look into the node. Under a uniform mark
//! there may be no node, and one that is there counts only for its inhibits, its visibilities being out of date. So
//! whatever its size, aligned memory is converted by marking a few entries, and a reader of it stops early.
//!
//! Writers hold one mutex. To set part of what a uniform entry covers, the writer takes or makes its node, fills it with
//! what the mark says, and only then stores the mark *mixed* with Release; readers load entries with Acquire
//! (INV: publish-complete). When a node has become uniform again, its entry is marked so and the node stays. **A node
//! is freed when the map is dropped and not before**, hence readers need no grace period, and a borrow of the map will do.
//!
//! What a reader of a frame may rely on: while a range that does not hold the frame is set, it reads the frame's own
//! visibility, whatever the two share, be it a node or a word. A word changes by atomic read-modify-writes of the bits of
//! the range alone; filling never changes a frame that a reader of it could see, since a reader is in the node either
//! by a later mark, which publishes the filling, or by an earlier one, after which the words themselves became uniform.
//! That fails for a frame which is itself in the range. The caller of [`Attributes::set`] therefore sees to it that no
//! fault on the range is in flight and that faults which begin after it find the change (an invalidation window). Answers
//! about blocks ([`Attributes::uniform`], [`Attributes::largest_level`]) read every frame of the block, so whoever acts on
//! one looks at the window too: a block that a window meets is not mapped by one leaf.

mod node;

#[cfg(all(test, loom))]
mod model;
#[cfg(all(test, feature = "std", not(loom)))]
mod tests;

use alloc::boxed::Box;
use node::{Below, Entry, Inner, Leaf, Node};
use tdp_arch::{Gfn, GfnRange, Level};
use tdp_rcu::sync::{CachePadded, Mutex};

/// Which half of a confidential guest's memory a frame belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Visibility {
    /// Plain memory that the host may read and write.
    Shared,
    /// Memory of the guest alone, mapped through the protected table.
    Private,
}

/// Most entries of a root; with them a tree of one kind of node reaches as far as the next one starts to be needed.
const ROOT_ENTRIES: u64 = if cfg!(loom) { 2 } else { 4096 };

/// Frames that a root of `C` can cover.
const fn reach<C: Node>() -> u64 {
    ROOT_ENTRIES << C::SHIFT
}

const _: () = assert!(cfg!(loom) || reach::<Deep>() == Level::L5.gfn_limit().0);

type Middle = Inner<Leaf>;
type Deep = Inner<Middle>;

/// The root, as deep as the guest needs.
enum Tree {
    /// Up to 512 GiB.
    Narrow(Box<[Entry<Leaf>]>),
    /// Up to 256 TiB.
    Wide(Box<[Entry<Middle>]>),
    /// Up to 128 PiB.
    Widest(Box<[Entry<Deep>]>),
}

/// Runs `$body` with the entries of whichever root there is.
macro_rules! at_root {
    ($tree:expr, $entries:ident => $body:expr) => {
        match &$tree {
            Tree::Narrow($entries) => $body,
            Tree::Wide($entries) => $body,
            Tree::Widest($entries) => $body,
        }
    };
}

fn root<C: Node>(limit: u64, visibility: Visibility) -> Box<[Entry<C>]> {
    (0..limit.div_ceil(1 << C::SHIFT))
        .map(|_| Entry::new(visibility))
        .collect()
}

/// First frame past the aligned block of 2^`width` frames around `at`.
#[inline(always)]
fn past(at: Gfn, width: u32) -> Gfn {
    Gfn(((at.0 >> width) + 1) << width)
}

/// The attributes of every guest frame below a limit.
pub(crate) struct Attributes {
    tree: Tree,
    limit: Gfn,
    default: Visibility,
    /// Held by the one writer; on lines of its own, so that readers of the root never miss for it.
    writer: CachePadded<Mutex<()>>,
}

impl Attributes {
    /// Attributes for frames below `gfn_limit` (cut to 2^45 frames, a guest of 57-bit addresses), all of which are
    /// `default`, and none inhibited. Frames from the limit on stay so for ever: what is set there is ignored, and where a
    /// block reaches beyond the limit they count.
    pub(crate) fn new(gfn_limit: Gfn, default: Visibility) -> Self {
        let limit = gfn_limit.0.min(reach::<Deep>());
        let tree = if limit <= reach::<Leaf>() {
            Tree::Narrow(root(limit, default))
        } else if limit <= reach::<Middle>() {
            Tree::Wide(root(limit, default))
        } else {
            Tree::Widest(root(limit, default))
        };
        Self {
            tree,
            limit: Gfn(limit),
            default,
            writer: CachePadded::new(Mutex::new(())),
        }
    }

    /// What is known of `gfn` before a leaf's words are read, and the width (log2 of frames) of the aligned block around
    /// it for which that holds.
    #[inline(always)]
    fn find(&self, gfn: Gfn) -> (Below<'_>, u32) {
        at_root!(self.tree, entries => node::find(entries, gfn.0))
            .unwrap_or((Below::Uniform(self.default), u64::BITS - 1))
    }

    #[inline(always)]
    fn leaf(&self, gfn: Gfn) -> Option<&Leaf> {
        at_root!(self.tree, entries => node::leaf(entries, gfn.0))
    }

    /// The part of `range` that lies below the limit.
    fn cut(&self, range: GfnRange) -> GfnRange {
        GfnRange {
            start: range.start,
            end: range.end.min(self.limit),
        }
    }

    /// `gfn`'s block, unless it lies beyond the limit, where all is uniform.
    #[inline(always)]
    fn block(&self, gfn: Gfn, level: Level) -> Option<GfnRange> {
        let start = level.align_down(gfn);
        (start < self.limit).then(|| level.range(start))
    }

    /// Whether `gfn` is private or shared.
    #[inline]
    pub(crate) fn get(&self, gfn: Gfn) -> Visibility {
        match self.find(gfn).0 {
            Below::Uniform(visibility) => visibility,
            Below::Mixed(leaf) => leaf.get(gfn.0),
        }
    }

    /// Makes all frames of `range` private or shared.
    ///
    /// The caller holds an invalidation window over the range; see the head of this file.
    pub(crate) fn set(&self, range: GfnRange, visibility: Visibility) {
        let range = self.cut(range);
        if range.is_empty() {
            return;
        }
        let _writer = self.writer.lock();
        at_root!(self.tree, entries => node::set(entries, range.start.0..range.end.0, visibility));
    }

    /// Whether all frames of `gfn`'s block at `level` have the same visibility.
    ///
    /// Reads 8 words of a leaf for a block of 2 MiB, and 8 neighbouring entries for one of 1 GiB.
    #[inline]
    pub(crate) fn uniform(&self, gfn: Gfn, level: Level) -> bool {
        let Some(block) = self.block(gfn, level) else {
            return true;
        };
        let (mut at, mut first) = (block.start, None);
        while at < block.end {
            let (below, width) = self.find(at);
            match below {
                Below::Mixed(leaf) => return level <= Level::L2 && leaf.uniform(at.0, level),
                Below::Uniform(visibility) if *first.get_or_insert(visibility) != visibility => {
                    return false;
                }
                Below::Uniform(_) => at = past(at, width),
            }
        }
        true
    }

    /// The largest level, `at_most` or below, at which `gfn`'s block may be one leaf: it is uniform and nothing in it is
    /// inhibited.
    #[inline]
    pub(crate) fn largest_level(&self, gfn: Gfn, at_most: Level) -> Level {
        let mut level = Level::L1;
        for above in [Level::L2, Level::L3] {
            if above > at_most || !self.uniform(gfn, above) || self.inhibited(gfn, above) {
                break;
            }
            level = above;
        }
        level
    }

    /// Whether a block of 2 MiB in `gfn`'s block at `level` (2 MiB or more) is inhibited.
    #[inline]
    fn inhibited(&self, gfn: Gfn, level: Level) -> bool {
        if level == Level::L2 {
            return self.is_inhibited(gfn);
        }
        self.block(gfn, level).is_some_and(|block| {
            (block.start.0..block.end.0)
                .step_by(1 << Leaf::SHIFT)
                .any(|start| self.leaf(Gfn(start)).is_some_and(Leaf::any_inhibited))
        })
    }

    /// Whether the 2 MiB block of `gfn` must not be mapped by one leaf, nor the 1 GiB around it.
    #[inline]
    pub(crate) fn is_inhibited(&self, gfn: Gfn) -> bool {
        self.leaf(gfn).is_some_and(|leaf| leaf.is_inhibited(gfn.0))
    }

    /// Forbids leaves of 2 MiB and more over `gfn` until [`Attributes::allow_huge`]. What is mapped is not looked at.
    pub(crate) fn inhibit_huge(&self, gfn: Gfn) {
        let _writer = self.writer.lock();
        if gfn < self.limit
            && let Some(leaf) = at_root!(self.tree, entries => node::leaf_or_new(entries, gfn.0))
        {
            leaf.set_inhibited(gfn.0, true);
        }
    }

    /// Takes [`Attributes::inhibit_huge`] back, however often it was called for the block.
    pub(crate) fn allow_huge(&self, gfn: Gfn) {
        let _writer = self.writer.lock();
        if let Some(leaf) = self.leaf(gfn) {
            leaf.set_inhibited(gfn.0, false);
        }
    }

    /// Calls `each` for every longest run of frames of one visibility in `within` (below the limit), in order.
    ///
    /// A run that is set meanwhile may be told as before, as after, or in pieces.
    pub(crate) fn ranges(&self, within: GfnRange, mut each: impl FnMut(GfnRange, Visibility)) {
        let within = self.cut(within);
        let mut at = within.start;
        let mut open: Option<(Gfn, Visibility)> = None;
        while at < within.end {
            let (visibility, next) = match self.find(at) {
                (Below::Uniform(visibility), width) => (visibility, past(at, width)),
                (Below::Mixed(leaf), _) => leaf.run(at),
            };
            match open {
                Some((_, same)) if same == visibility => {}
                Some((start, other)) => {
                    each(GfnRange { start, end: at }, other);
                    open = Some((at, visibility));
                }
                None => open = Some((at, visibility)),
            }
            at = next.min(within.end);
        }
        if let Some((start, visibility)) = open {
            each(GfnRange { start, end: at }, visibility);
        }
    }

    /// Private frames in `range` (below the limit).
    pub(crate) fn private_count(&self, range: GfnRange) -> u64 {
        let mut count = 0;
        self.ranges(range, |run, visibility| {
            if visibility == Visibility::Private {
                count += run.pages();
            }
        });
        count
    }
}
