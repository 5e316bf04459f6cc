use super::*;
use crate::replay::entry::LeafBits;

const LEAF: LeafBits = LeafBits {
    pfn: 7,
    writable: true,
    executable: true,
    host_writable: true,
    mmu_writable: true,
    accessed: true,
    dirty: true,
};
const PROTECTED: LeafBits = LeafBits {
    writable: false,
    ..LEAF
};

fn key(gfn: u64) -> Key {
    Key {
        detached: false,
        as_id: 0,
        gfn,
        level: 1,
    }
}

fn change(from: Entry, to: Entry) -> Transition {
    Transition { from, to }
}

fn made(leaf: LeafBits) -> Transition {
    change(Entry::Gone, Entry::Leaf(leaf))
}

/// Enters both sides as one episode and settles it.
fn settled(recorded: &[(u64, Transition)], ours: &[(u64, Transition)]) -> Transitions {
    let orders = [true, false].map(|recorded_first| {
        let (mut ledger, mut tally) = (Ledger::default(), Transitions::default());
        for turn in [recorded_first, !recorded_first] {
            for &(gfn, transition) in if turn { recorded } else { ours } {
                if turn {
                    ledger.recorded(&mut tally, 1, 0, key(gfn), transition);
                } else {
                    ledger.ours(&mut tally, 1, 0, key(gfn), transition);
                }
            }
        }
        let differences = ledger.settle(&mut tally, 1, Class::Compared);
        assert_eq!(
            differences.is_empty(),
            tally.unexplained == 0,
            "{differences:?}"
        );
        assert!(ledger.is_settled() && ledger.episodes().is_empty());
        tally
    });
    let [one, other] = orders;
    assert_eq!(one, other, "whichever side is first");
    one
}

#[test]
fn the_same_changes_cancel_out_in_any_order_of_entries() {
    let found = settled(
        &[(1, made(LEAF)), (2, made(PROTECTED))],
        &[(2, made(PROTECTED)), (1, made(LEAF))],
    );
    assert_eq!((found.total, found.matched, found.unexplained), (2, 2, 0));
}

#[test]
fn what_is_missing_or_too_much_is_unexplained() {
    assert_eq!(settled(&[(1, made(LEAF))], &[]).unexplained, 1);
    let extra = settled(&[], &[(1, made(LEAF))]);
    assert_eq!((extra.total, extra.matched, extra.unexplained), (1, 0, 1));
    let elsewhere = settled(&[(1, made(LEAF))], &[(2, made(LEAF))]);
    assert_eq!((elsewhere.matched, elsewhere.unexplained), (0, 2));
}

#[test]
fn every_difference_of_a_leaf_is_seen() {
    let others = [
        LeafBits { pfn: 8, ..LEAF },
        PROTECTED,
        LeafBits {
            executable: false,
            ..LEAF
        },
        LeafBits {
            host_writable: false,
            ..LEAF
        },
        LeafBits {
            mmu_writable: false,
            ..LEAF
        },
        LeafBits {
            accessed: false,
            ..LEAF
        },
        LeafBits {
            dirty: false,
            ..LEAF
        },
    ];
    for other in others {
        let found = settled(&[(1, made(LEAF))], &[(1, made(other))]);
        assert_eq!((found.matched, found.unexplained), (0, 1), "{other:?}");
    }
}

#[test]
fn another_level_or_space_is_another_entry() {
    let (mut ledger, mut tally) = (Ledger::default(), Transitions::default());
    ledger.recorded(&mut tally, 1, 0, key(0), made(LEAF));
    for other in [
        Key { level: 2, ..key(0) },
        Key { as_id: 1, ..key(0) },
        Key {
            detached: true,
            ..key(0)
        },
    ] {
        ledger.ours(&mut tally, 1, 0, other, made(LEAF));
    }
    assert_eq!(ledger.settle(&mut tally, 1, Class::Compared).len(), 4);
    assert_eq!((tally.matched, tally.unexplained), (0, 4));
}

#[test]
fn a_sequence_is_the_same_as_its_sum() {
    let made_and_protected = [
        (1, made(LEAF)),
        (1, change(Entry::Leaf(LEAF), Entry::Leaf(PROTECTED))),
    ];
    let found = settled(&made_and_protected, &[(1, made(PROTECTED))]);
    assert_eq!((found.total, found.matched, found.unexplained), (2, 2, 0));
    let found = settled(&made_and_protected, &[(1, made(LEAF))]);
    assert_eq!((found.matched, found.unexplained), (1, 1));
}

#[test]
fn the_processors_bits_count_as_far_as_they_were_changed() {
    let aged = |leaf: LeafBits| LeafBits {
        accessed: false,
        ..leaf
    };
    let clean = LeafBits {
        dirty: false,
        ..LEAF
    };
    let age = |leaf| change(Entry::Leaf(leaf), Entry::Leaf(aged(leaf)));
    // Whether the page was dirty before is the processor's doing.
    let found = settled(&[(1, age(LEAF))], &[(1, age(clean))]);
    assert_eq!((found.matched, found.unexplained), (1, 0));
    let losing = change(Entry::Leaf(LEAF), Entry::Leaf(aged(clean)));
    let found = settled(&[(1, age(LEAF))], &[(1, losing)]);
    assert_eq!((found.matched, found.unexplained), (0, 1));
}

#[test]
fn what_is_copied_is_never_matched() {
    let (mut ledger, mut tally) = (Ledger::default(), Transitions::default());
    ledger.recorded(&mut tally, 1, 0, key(1), made(LEAF));
    ledger.copied(key(1), made(LEAF));
    ledger.copied(key(2), made(LEAF));
    assert!(ledger.is_settled());
    assert_eq!(ledger.settle(&mut tally, 1, Class::Compared).len(), 1);
    assert_eq!((tally.total, tally.matched, tally.unexplained), (1, 0, 1));
}

#[test]
fn what_follows_the_record_by_a_rule_counts_there() {
    let rule = Rule::CollapseInPlace;
    let (mut ledger, mut tally) = (Ledger::default(), Transitions::default());
    // One change was recorded before the replay followed, one after, one not at all.
    ledger.recorded(&mut tally, 1, 0, key(1), made(LEAF));
    for gfn in 1..4 {
        ledger.followed(1, key(gfn), made(LEAF), rule);
    }
    ledger.recorded(&mut tally, 1, 0, key(2), made(LEAF));
    assert_eq!(ledger.settle(&mut tally, 1, Class::Compared), []);
    assert_eq!((tally.total, tally.matched, tally.unexplained), (2, 0, 0));
    assert_eq!(tally.by_rule.get(&rule), Some(&2));
    assert!(ledger.episodes().is_empty());
}

#[test]
fn episodes_are_settled_apart() {
    let (mut ledger, mut tally) = (Ledger::default(), Transitions::default());
    ledger.recorded(&mut tally, 1, 0, key(1), made(LEAF));
    ledger.recorded(&mut tally, 2, 0, key(2), made(LEAF));
    assert_eq!(ledger.settle(&mut tally, 1, Class::Compared).len(), 1);
    ledger.ours(&mut tally, 2, 0, key(2), made(LEAF));
    assert_eq!(ledger.settle(&mut tally, 2, Class::Compared), []);
    assert_eq!((tally.matched, tally.unexplained), (1, 1));
}

#[test]
fn rules_look_at_what_happened_and_where() {
    let forgets = change(
        Entry::Leaf(LEAF),
        Entry::Leaf(LeafBits {
            dirty: false,
            ..LEAF
        }),
    );
    let of = |class| {
        let (mut ledger, mut tally) = (Ledger::default(), Transitions::default());
        ledger.recorded(&mut tally, 1, 0, key(1), forgets);
        ledger.settle(&mut tally, 1, class);
        (
            tally.by_rule.get(&Rule::DirtyBitKept).copied(),
            tally.unexplained,
        )
    };
    assert_eq!(of(Class::Fault), (Some(1), 0));
    // A sweep that takes dirty bits away is not a fault.
    assert_eq!(of(Class::Compared), (None, 1));
    for rule in Rule::ALL {
        assert!(!rule.reason().is_empty());
    }
}
