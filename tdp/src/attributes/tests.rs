//! The tree against a map of runs, at the boundaries of everything; readers beside a writer.

use super::*;
use Visibility::{Private, Shared};
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, RngSeed};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

const M2: u64 = Level::L2.pages();
const M128: u64 = 1 << Leaf::SHIFT;
const G1: u64 = Level::L3.pages();
const G64: u64 = 1 << Middle::SHIFT;
const T32: u64 = 1 << Deep::SHIFT;
const LIMITS: [u64; 5] = [
    1 << 45,
    1 << 36,
    3 * G64 + 77,
    reach::<Leaf>(),
    2 * M128 + M2 + 5,
];

fn frames(start: u64, end: u64) -> GfnRange {
    (Gfn(start)..Gfn(end)).into()
}

fn runs(attributes: &Attributes, within: GfnRange) -> Vec<(u64, u64, Visibility)> {
    let mut runs = Vec::new();
    attributes.ranges(within, |run, visibility| {
        runs.push((run.start.0, run.end.0, visibility));
    });
    runs
}

/// What the attributes should be: where each run starts, up to for ever, and the inhibited blocks.
struct Model {
    limit: u64,
    starts: BTreeMap<u64, Visibility>,
    inhibited: BTreeSet<u64>,
}

impl Model {
    fn new(limit: u64, default: Visibility) -> Self {
        Self {
            limit,
            starts: BTreeMap::from([(0, default)]),
            inhibited: BTreeSet::new(),
        }
    }

    fn get(&self, gfn: u64) -> Visibility {
        *self
            .starts
            .range(..=gfn)
            .next_back()
            .expect("starts at 0")
            .1
    }

    fn set(&mut self, start: u64, end: u64, visibility: Visibility) {
        let end = end.min(self.limit);
        if start >= end {
            return;
        }
        let after = self.get(end);
        self.starts.retain(|&at, _| at < start || at > end);
        self.starts.insert(start, visibility);
        self.starts.insert(end, after);
    }

    fn runs(&self, start: u64, end: u64) -> Vec<(u64, u64, Visibility)> {
        let end = end.min(self.limit);
        let mut runs: Vec<(u64, u64, Visibility)> = Vec::new();
        if start >= end {
            return runs;
        }
        let changes = self.starts.range(start + 1..end);
        let pieces = [(start, self.get(start))]
            .into_iter()
            .chain(changes.map(|(&at, &v)| (at, v)));
        for (at, visibility) in pieces {
            match runs.last_mut() {
                Some(last) if last.2 == visibility => {}
                Some(last) => {
                    last.1 = at;
                    runs.push((at, end, visibility));
                }
                None => runs.push((at, end, visibility)),
            }
        }
        runs
    }

    fn uniform(&self, gfn: u64, pages: u64) -> bool {
        let start = gfn & !(pages - 1);
        let first = self.get(start);
        self.starts
            .range(start..start + pages)
            .all(|(_, &v)| v == first)
    }

    fn largest_level(&self, gfn: u64, at_most: Level) -> Level {
        let may = |level: Level| {
            let block = level.range(Gfn(gfn));
            level <= at_most
                && self.uniform(gfn, level.pages())
                && self
                    .inhibited
                    .range(block.start.0..block.end.0)
                    .next()
                    .is_none()
        };
        let levels = [Level::L3, Level::L2];
        levels
            .into_iter()
            .find(|&level| may(level))
            .unwrap_or(Level::L1)
    }
}

#[derive(Clone, Debug)]
enum Op {
    Set(u64, u64, Visibility),
    Inhibit(u64),
    Allow(u64),
}

/// Frames at and around the boundaries of all that the tree is made of, and at both ends.
fn gfn() -> impl Strategy<Value = u64> {
    let base = prop_oneof![
        (0..3u64).prop_map(|n| n * M2),
        (1..4u64).prop_map(|n| n * M128),
        (1..3u64).prop_map(|n| n * G1),
        (1..4u64).prop_map(|n| n * G64),
        Just(T32),
        Just((1u64 << 36) - M2),
        Just(1u64 << 36),
        Just((1u64 << 45) - G1),
        Just((1u64 << 45) - M2),
        Just(1u64 << 45),
    ];
    let offset = prop_oneof![3 => Just(0i64), 2 => -3..4i64, 1 => -70..70i64, 1 => -600..600i64];
    (base, offset).prop_map(|(base, offset)| base.saturating_add_signed(offset))
}

fn visibility() -> impl Strategy<Value = Visibility> {
    prop_oneof![Just(Shared), Just(Private)]
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    let pages = prop_oneof![
        3 => 1..200u64,
        2 => Just(M2),
        2 => Just(M128),
        1 => Just(G1),
        1 => Just(G64),
        1 => 0..2 * G1,
    ];
    prop_oneof![
        4 => (gfn(), pages).prop_map(|(start, pages)| (start, start + pages)),
        1 => (gfn(), gfn()).prop_map(|(a, b)| (a.min(b), a.max(b))),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (range(), visibility()).prop_map(|((start, end), to)| Op::Set(start, end, to)),
        1 => gfn().prop_map(Op::Inhibit),
        1 => gfn().prop_map(Op::Allow),
    ]
}

proptest! {
#![proptest_config(Config {
    cases: 400,
    failure_persistence: None,
    rng_algorithm: RngAlgorithm::ChaCha,
    rng_seed: RngSeed::Fixed(0x7db_0a77),
    ..Config::default()
})]

#[test]
fn answers_are_those_of_a_map(
    limit in prop::sample::select(&LIMITS[..]),
    default in visibility(),
    ops in prop::collection::vec(op(), 1..40),
    probes in prop::collection::vec(gfn(), 8),
    spans in prop::collection::vec(range(), 2),
) {
    let attributes = Attributes::new(Gfn(limit), default);
    let mut model = Model::new(limit, default);
    for op in ops {
        match op {
            Op::Set(start, end, to) => {
                attributes.set(frames(start, end), to);
                model.set(start, end, to);
            }
            Op::Inhibit(gfn) => {
                attributes.inhibit_huge(Gfn(gfn));
                if gfn < limit {
                    model.inhibited.insert(gfn & !(M2 - 1));
                }
            }
            Op::Allow(gfn) => {
                attributes.allow_huge(Gfn(gfn));
                model.inhibited.remove(&(gfn & !(M2 - 1)));
            }
        }
        let touched: Vec<u64> = match op {
            Op::Set(start, end, _) => {
                [start, start.wrapping_sub(1), end.saturating_sub(1), end].into_iter().filter(|&at| at <= 1 << 46).collect()
            }
            Op::Inhibit(gfn) | Op::Allow(gfn) => [gfn].into(),
        };
        for gfn in touched.into_iter().chain(probes.iter().copied()) {
            prop_assert_eq!(attributes.get(Gfn(gfn)), model.get(gfn), "{:#x}", gfn);
            prop_assert_eq!(
                attributes.is_inhibited(Gfn(gfn)),
                model.inhibited.contains(&(gfn & !(M2 - 1)))
            );
            for level in Level::ALL {
                let uniform = model.uniform(gfn, level.pages());
                prop_assert_eq!(attributes.uniform(Gfn(gfn), level), uniform, "{:#x} {}", gfn, level);
                let largest = model.largest_level(gfn, level);
                prop_assert_eq!(attributes.largest_level(Gfn(gfn), level), largest, "{:#x}", gfn);
            }
        }
        for &(start, end) in &spans {
            let expected = model.runs(start, end);
            prop_assert_eq!(runs(&attributes, frames(start, end)), &expected[..]);
            let private = expected.iter().filter(|run| run.2 == Private).map(|run| run.1 - run.0);
            prop_assert_eq!(attributes.private_count(frames(start, end)), private.sum::<u64>());
        }
    }
    let all = (0, 1 << 46);
    prop_assert_eq!(runs(&attributes, frames(all.0, all.1)), model.runs(all.0, all.1));
}}

#[test]
fn every_number_has_an_answer() {
    for limit in [0, 1, M128, u64::MAX] {
        let attributes = Attributes::new(Gfn(limit), Private);
        attributes.set(frames(1 << 45, u64::MAX), Shared);
        attributes.set(frames(9, 9), Shared);
        attributes.set(frames(u64::MAX, 0), Shared);
        for gfn in [Gfn(u64::MAX), Gfn(1 << 45), Gfn(1 << 63)] {
            attributes.inhibit_huge(gfn);
            assert!(!attributes.is_inhibited(gfn));
            attributes.allow_huge(gfn);
            assert_eq!(attributes.get(gfn), Private);
            assert!(attributes.uniform(gfn, Level::L5));
            assert_eq!(attributes.largest_level(gfn, Level::L5), Level::L3);
        }
        let all = frames(0, u64::MAX);
        assert_eq!(attributes.private_count(all), limit.min(1 << 45));
        assert_eq!(runs(&attributes, all).len(), usize::from(limit > 0));
    }
}

/// What is aligned costs entries, not frames: no node is made for it, nor for what does not change.
#[test]
fn aligned_conversions_make_no_nodes() {
    let attributes = Attributes::new(Level::L4.gfn_limit(), Shared);
    attributes.set(frames(16 * G64, 32 * G64), Private);
    attributes.set(frames(5, 3 * M128 + 9), Shared);
    assert!(attributes.leaf(Gfn(16 * G64)).is_none() && attributes.leaf(Gfn(5)).is_none());
    // 128 MiB and a frame: one leaf.
    attributes.set(frames(M128, 2 * M128 + 1), Private);
    assert!(attributes.leaf(Gfn(2 * M128)).is_some());
    assert!(attributes.leaf(Gfn(M128)).is_none() && attributes.leaf(Gfn(0)).is_none());
    assert_eq!(
        attributes.private_count(frames(0, u64::MAX)),
        16 * G64 + M128 + 1
    );
}

/// What was set frame by frame is found as soon as what was set at once.
#[test]
fn uniform_again_is_marked_so() {
    let attributes = Attributes::new(Gfn(1 << 36), Shared);
    attributes.set(frames(3, 4), Private);
    assert!(matches!(attributes.find(Gfn(0)), (Below::Mixed(_), _)));
    attributes.set(frames(0, 3), Private);
    attributes.set(frames(4, M128), Private);
    attributes.set(frames(M128, G64 - 1), Private);
    assert!(
        matches!(attributes.find(Gfn(0)), (Below::Uniform(Private), width) if width == Leaf::SHIFT)
    );
    attributes.set(frames(G64 - 1, G64), Private);
    assert!(
        matches!(attributes.find(Gfn(0)), (Below::Uniform(Private), width) if width == Middle::SHIFT)
    );
    assert!(attributes.uniform(Gfn(0), Level::L3));
}

/// Inhibits outlive conversions of what is around them, also those that leave no word to look at.
#[test]
fn inhibits_outlive_conversions() {
    let attributes = Attributes::new(Gfn(1 << 36), Shared);
    let at = Gfn(G64 + 5 * M2 + 7);
    let level = |gfn: Gfn| attributes.largest_level(gfn, Level::L3);
    attributes.inhibit_huge(at);
    for to in [Private, Shared] {
        attributes.set(frames(0, 1 << 36), to);
        assert!(attributes.is_inhibited(at));
        assert_eq!(level(at), Level::L1);
        assert_eq!(level(Gfn(G64)), Level::L2);
        assert_eq!(level(Gfn(G64 + G1)), Level::L3);
        assert_eq!(attributes.get(at), to);
    }
    attributes.allow_huge(Gfn(G64 + 5 * M2));
    assert_eq!(level(at), Level::L3);
}

/// Readers look at frames of their own, in the words and leaves that a writer keeps changing, through every change
/// between mixed and uniform; each finds its frame as it was.
#[test]
fn readers_of_neighbours_see_their_own_frames() {
    const READS: usize = 40_000;
    let attributes = Attributes::new(Gfn(1 << 36), Private);
    // Own frames in the word, the block, the leaf and the inner node that change, all private.
    let own = [6, 70, M2 + 1, M128 - 1, M128, G1 + 3, G64 - 1];
    let readers = own.len();
    let (start, done) = (Barrier::new(readers + 1), AtomicUsize::new(0));
    let attributes = &attributes;
    let changes = thread::scope(|scope| {
        for gfn in own {
            let (start, done) = (&start, &done);
            scope.spawn(move || {
                start.wait();
                let wrong = (0..READS)
                    .filter(|_| attributes.get(Gfn(gfn)) != Private)
                    .count();
                done.fetch_add(1, Ordering::Release);
                assert_eq!(wrong, 0, "{gfn:#x}");
            });
        }
        start.wait();
        let mut changes = 0;
        while done.load(Ordering::Acquire) < readers || changes < 8 {
            for to in [Shared, Private] {
                attributes.set(frames(5, 6), to);
                attributes.set(frames(7, 70), to);
                attributes.set(frames(M2 + 2, M128 - 1), to);
                attributes.set(frames(M128 + 1, G1 + 3), to);
                attributes.set(frames(G1 + 4, G64 - 1), to);
                changes += 1;
            }
        }
        changes
    });
    assert!(changes >= 8);
    assert_eq!(attributes.private_count(frames(0, 1 << 36)), 1 << 36);
}
