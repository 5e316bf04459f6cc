//! Ranges of frames against sets of frames, and levels against division.

use std::collections::BTreeSet;
use tdp_arch::{Gfn, GfnRange, Level};

/// Every range with ends below 6, empty and reversed ones included, with its frames.
fn ranges() -> Vec<(GfnRange, BTreeSet<u64>)> {
    let ends = |start| (0..6).map(move |end| (start, end));
    let range = |(start, end)| (GfnRange::from(Gfn(start)..Gfn(end)), (start..end).collect());
    (0..6).flat_map(ends).map(range).collect()
}

#[test]
fn a_range_is_a_set_of_frames() {
    for (range, frames) in ranges() {
        assert_eq!(range.pages(), frames.len() as u64, "{range:?}");
        assert_eq!(range.is_empty(), frames.is_empty(), "{range:?}");
        for gfn in 0..7 {
            let is_in = frames.contains(&gfn);
            assert_eq!(range.contains(Gfn(gfn)), is_in, "{gfn} in {range:?}");
        }
        for (other, others) in ranges() {
            let meet = !frames.is_disjoint(&others);
            assert_eq!(range.overlaps(other), meet, "{range:?} and {other:?}");
            if !others.is_empty() {
                let covers = frames.is_superset(&others);
                assert_eq!(range.covers(other), covers, "{range:?} and {other:?}");
            }
        }
    }
}

#[test]
fn levels_divide_frames() {
    let mut pages = 1;
    for level in Level::ALL {
        assert_eq!((level.pages(), level.bytes()), (pages, pages << 12));
        for gfn in [
            0,
            1,
            511,
            512,
            513,
            (1 << 18) - 1,
            1 << 18,
            (1 << 27) + 5,
            0x9_8765_4321,
        ] {
            let start = gfn / pages * pages;
            assert_eq!(
                level.align_down(Gfn(gfn)),
                Gfn(start),
                "{gfn:#x} at {level}"
            );
            assert_eq!(
                level.is_aligned(Gfn(gfn)),
                start == gfn,
                "{gfn:#x} at {level}"
            );
            let range = GfnRange::from(Gfn(start)..Gfn(start + pages));
            assert_eq!(level.range(Gfn(gfn)), range, "{gfn:#x} at {level}");
            let index = (gfn / pages % 512) as usize;
            assert_eq!(level.index(Gfn(gfn)), index, "{gfn:#x} at {level}");
        }
        pages *= 512;
        assert_eq!(level.gfn_limit(), Gfn(pages));
    }
}
