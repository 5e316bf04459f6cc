//! loom models: readers of one frame while its neighbours are set. Here a word has 64 frames, a leaf 1024 and an inner
//! node two entries, as a root has.

use super::{Attributes, Visibility};
use Visibility::{Private, Shared};
use loom::thread;
use tdp_arch::{Gfn, GfnRange, Level};
use tdp_rcu::sync::Arc;

fn frames(start: u64, end: u64) -> GfnRange {
    (Gfn(start)..Gfn(end)).into()
}

/// Explores `write` and `read` side by side on what `prepare` leaves.
///
/// The reader is the thread that is spawned, so that in the first execution it comes last. loom goes back from a load to
/// the stores that it might have come before, but a store only to the latest load, which here is the writer's own.
fn explore(
    limit: u64,
    prepare: impl Fn(&Attributes) + Send + Sync + 'static,
    write: impl Fn(&Attributes) + Send + Sync + 'static,
    read: impl Fn(&Attributes) + Copy + Send + Sync + 'static,
) {
    loom::model(move || {
        let attributes = Arc::new(Attributes::new(Gfn(limit), Shared));
        prepare(&attributes);
        let reader = {
            let attributes = attributes.clone();
            thread::spawn(move || read(&attributes))
        };
        write(&attributes);
        reader.join().unwrap();
        read(&attributes);
    });
}

/// A leaf under a uniform mark is out of date; a part of it is set. Whoever finds it by the mark mixed finds it filled.
#[test]
fn out_of_date_leaf_is_filled_before_it_is_read() {
    explore(
        2048,
        |attributes| {
            attributes.set(frames(5, 6), Private);
            attributes.set(frames(0, 1024), Private);
        },
        |attributes| attributes.set(frames(7, 8), Shared),
        |attributes| {
            assert_eq!(attributes.get(Gfn(6)), Private);
            assert_eq!(attributes.get(Gfn(500)), Private);
            assert_eq!(attributes.largest_level(Gfn(600), Level::L2), Level::L2);
        },
    );
}

/// The same one level up: an inner node whose entries are out of date.
#[test]
fn out_of_date_inner_node_is_filled_before_it_is_read() {
    explore(
        4096,
        |attributes| {
            attributes.set(frames(5, 6), Private);
            attributes.set(frames(0, 2048), Private);
        },
        |attributes| attributes.set(frames(7, 8), Shared),
        |attributes| {
            assert_eq!(attributes.get(Gfn(6)), Private);
            assert_eq!(attributes.get(Gfn(1500)), Private);
        },
    );
}

/// A leaf becomes mixed, uniform and mixed again, while a reader may be inside by any of its marks.
#[test]
fn refilled_leaf_changes_no_neighbour() {
    explore(
        1024,
        |attributes| attributes.set(frames(5, 6), Private),
        |attributes| {
            attributes.set(frames(5, 6), Shared);
            attributes.set(frames(70, 71), Private);
        },
        |attributes| {
            assert_eq!(attributes.get(Gfn(6)), Shared);
            assert_eq!(attributes.get(Gfn(71)), Shared);
        },
    );
}

/// An inhibit makes the leaf without changing what is read of it.
#[test]
fn inhibit_changes_no_visibility() {
    explore(
        1024,
        |attributes| attributes.set(frames(0, 1024), Private),
        |attributes| attributes.inhibit_huge(Gfn(600)),
        |attributes| {
            assert_eq!(attributes.get(Gfn(600)), Private);
            assert_eq!(attributes.largest_level(Gfn(6), Level::L2), Level::L2);
            if attributes.is_inhibited(Gfn(600)) {
                assert_eq!(attributes.largest_level(Gfn(600), Level::L2), Level::L1);
            }
        },
    );
}

/// Two writers: neither loses what the other did.
#[test]
fn writers_are_serialised() {
    loom::model(|| {
        let attributes = Arc::new(Attributes::new(Gfn(2048), Shared));
        let writer = {
            let attributes = attributes.clone();
            thread::spawn(move || attributes.set(frames(5, 7), Private))
        };
        attributes.set(frames(7, 8), Private);
        writer.join().unwrap();
        assert_eq!(attributes.private_count(frames(0, 2048)), 3);
    });
}
