use super::*;

const NONE: u64 = 1 << 63;
const FROZEN: u64 = NONE | 0x5a0;
const TABLE: u64 = 0x1_8905_1827;
const SPACE: Space = Space(0);

fn change(level: u8, gfn: u64, old: u64, new: u64) -> Change {
    Change {
        as_id: 0,
        level,
        gfn,
        old,
        new,
    }
}

/// Tables down to level 1 over gfn 0, and a leaf.
fn with_leaf() -> Expected {
    let mut expected = Expected::default();
    expected.set_root_level(4);
    for level in [4, 3, 2] {
        expected
            .apply(0, false, &change(level, 0, NONE, TABLE))
            .unwrap();
    }
    expected
        .apply(0, false, &change(1, 5, NONE, 0x7e67))
        .unwrap();
    expected
}

fn mapped(expected: &Expected) -> Vec<(u64, u8)> {
    expected
        .all_leaves(SPACE)
        .map(|leaf| (leaf.gfn, leaf.level))
        .collect()
}

#[test]
fn a_leaf_is_found_by_any_frame_that_it_maps() {
    let mut expected = with_leaf();
    expected
        .apply(0, false, &change(2, 0x200, NONE, 0x1_8980_0ee7))
        .unwrap();
    assert_eq!(mapped(&expected), [(5, 1), (0x200, 2)]);
    assert_eq!(
        expected.leaf_at(SPACE, 0x3ff).map(|l| l.pfn()),
        Some(0x18_9800)
    );
    assert_eq!(expected.leaf_at(SPACE, 0x400), None);
    assert_eq!(expected.leaves(SPACE, 0x300, 0x301).count(), 1);
    assert_eq!(expected.leaves(SPACE, 6, 0x200).count(), 0);
    assert!(expected.leaf_at(Space::nested(0), 5).is_none());
}

#[test]
fn a_missing_event_is_a_contradiction() {
    let mut expected = with_leaf();
    // The removal of gfn 5 is missing.
    let error = expected
        .apply(0, false, &change(1, 5, NONE, 0x8e67))
        .unwrap_err();
    assert_eq!(
        error.what,
        Wrong::OldValue {
            was: Some(0x7e67),
            old: NONE
        }
    );
    // The making of gfn 6 is missing.
    let error = expected
        .apply(0, false, &change(1, 6, 0x9e67, NONE))
        .unwrap_err();
    assert_eq!(
        error.what,
        Wrong::OldValue {
            was: None,
            old: 0x9e67
        }
    );
    // A table is missing.
    let error = expected
        .apply(0, false, &change(1, 0x200, NONE, 0x9e67))
        .unwrap_err();
    assert_eq!(error.what, Wrong::NoTable);
}

#[test]
fn accessed_and_dirty_bits_are_the_processors() {
    let mut expected = with_leaf();
    expected
        .apply(0, false, &change(1, 5, 0x7e07, NONE))
        .unwrap();
    assert_eq!(expected.all_leaves(Space::normal(0)).next(), None);
}

#[test]
fn a_split_derives_its_children() {
    let mut expected = with_leaf();
    expected
        .apply(0, false, &change(2, 0x200, NONE, 0x1_8980_0ee5))
        .unwrap();
    expected
        .apply(0, false, &change(2, 0x200, 0x1_8980_0ee5, TABLE))
        .unwrap();
    assert_eq!(mapped(&expected).len(), 513);
    expected
        .apply(0, false, &change(1, 0x201, 0x1_8980_1e65, 0x1_8980_1e67))
        .unwrap();
    assert!(
        expected
            .leaf_at(SPACE, 0x201)
            .is_some_and(|l| l.is_writable())
    );
}

#[test]
fn what_is_below_a_removed_table_is_not_mapped() {
    let mut expected = with_leaf();
    expected
        .apply(0, false, &change(2, 0, TABLE, 0x1_8980_0ee7))
        .unwrap();
    assert_eq!(mapped(&expected), [(0, 2)]);
    assert_eq!(
        expected
            .apply(0, false, &change(1, 5, 0x7e67, FROZEN))
            .unwrap()
            .place,
        Place::Detached
    );
    assert!(expected.finish_detached(0).is_empty());
    // Absent entries are sealed too; it means nothing.
    assert_eq!(
        expected
            .apply(0, false, &change(1, 6, NONE, FROZEN))
            .unwrap()
            .place,
        Place::Nowhere { unlinked: false }
    );
}

#[test]
fn an_entry_left_behind_is_a_contradiction() {
    let mut expected = with_leaf();
    expected
        .apply(7, false, &change(2, 0, TABLE, NONE))
        .unwrap();
    assert!(expected.finish_detached(0).is_empty());
    let left = expected.finish_detached(7);
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].what, Wrong::LeftBehind(0x7e67));
}

#[test]
fn old_roots_and_new_ones_do_not_mix() {
    let mut expected = with_leaf();
    expected.detach_all(0);
    assert_eq!(expected.all_leaves(Space::normal(0)).next(), None);
    for level in [4, 3, 2] {
        expected
            .apply(1, false, &change(level, 0, NONE, TABLE))
            .unwrap();
    }
    // The same leaf comes back in the new tree before the old one is zapped.
    expected
        .apply(1, false, &change(1, 5, NONE, 0x7e67))
        .unwrap();
    assert_eq!(
        expected
            .apply(0, false, &change(1, 5, 0x7e67, NONE))
            .unwrap()
            .place,
        Place::Detached
    );
    assert_eq!(mapped(&expected), [(5, 1)]);
}
