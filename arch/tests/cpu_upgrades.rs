//! When a software vCPU looks at the tables again although it remembers something: permissions, flags, faults.

mod walker_support;

use tdp_arch::cpu::Counters;
use tdp_arch::walker::{Abort, EptConfig, EptFault, EptWalker, GuestAccess, WalkError, Walker};
use tdp_arch::{Gpa, Hpa, Level};
use walker_support::cpu::{
    A, D, GPA, NEXT, OTHER, PAGE, PS, SPARE, Vcpu, WB, ept, mapped, npt, put, reached, read, write,
};
use walker_support::{Memory, ROOT, entry, entry_address, memory_with, table_of};

/// Nothing is cached of entries that are not present or malformed: what is repaired is seen at once, at every level.
#[test]
fn failures_are_not_cached() {
    let whole = [7, 7, 7, PAGE | WB | 7];
    for depth in 0..4 {
        for broken in [0, 0b010, 7 | 1 << 51] {
            let config = EptConfig {
                physical_bits: 48,
                ..EptConfig::default()
            };
            let mut vcpu = Vcpu::new(EptWalker::new(config).expect("a valid configuration"), ROOT);
            let memory = memory_with(GPA, &whole);
            let level = Level::from_number(4 - depth as u8).expect("a level");
            let good = entry(&memory, level, GPA);
            put(&memory, level, GPA, broken);
            assert!(read(&mut vcpu, &memory, GPA).is_err());
            put(&memory, level, GPA, good);
            assert_eq!(reached(&mut vcpu, &memory, GPA), Some(PAGE | 0xabc));
        }
    }
}

/// A permission that a cached entry lacks is looked up again; one that it has is not.
#[test]
fn permissions_are_upgraded_but_not_downgraded_by_a_walk() {
    let (memory, mut vcpu) = (memory_with(GPA, &[7, 7, 7, PAGE | WB | 1]), ept());
    assert!(read(&mut vcpu, &memory, GPA).is_ok());
    put(&memory, Level::L1, GPA, OTHER | WB | 3);
    // Reads go on to the old page; the write looks again and so do reads after it.
    assert_eq!(reached(&mut vcpu, &memory, GPA), Some(PAGE | 0xabc));
    assert_eq!(
        write(&mut vcpu, &memory).expect("upgraded").hpa,
        Hpa(OTHER | 0xabc)
    );
    assert_eq!(reached(&mut vcpu, &memory, GPA), Some(OTHER | 0xabc));
    let Counters {
        hits,
        misses,
        upgrades,
        walks,
        short_walks,
        faults,
        flushes,
    } = vcpu.counters();
    assert_eq!(
        (hits, misses, upgrades, walks, short_walks, faults, flushes),
        (2, 1, 1, 2, 1, 0, 0)
    );
}

/// What did not allow the access is gone, even if what allows it has another size.
#[test]
fn an_insufficient_entry_is_dropped() {
    for page in [PS | WB | 7, PS | WB | D | 7] {
        let (memory, mut vcpu) = (memory_with(GPA, &[7, 7, 7, PAGE | WB | 1]), ept());
        assert_eq!(reached(&mut vcpu, &memory, GPA), Some(PAGE | 0xabc));
        // Through the remembered table of level 1 the page is still read-only: a fault, which forgets that table.
        put(&memory, Level::L2, GPA, page);
        assert!(write(&mut vcpu, &memory).is_err());
        assert_eq!(reached(&mut vcpu, &memory, GPA), Some(0x18_9abc));

        // The same with a page of 4 KiB that is cached while the tables already hold a larger one.
        let (memory, mut vcpu) = (memory_with(GPA, &[7, 7, 7, PAGE | WB | 1]), ept());
        assert!(read(&mut vcpu, &memory, GPA).is_ok());
        put(&memory, Level::L1, NEXT, 0);
        assert!(
            read(&mut vcpu, &memory, NEXT).is_err(),
            "forgets the table, not the page"
        );
        put(&memory, Level::L2, GPA, page);
        assert_eq!(reached(&mut vcpu, &memory, GPA), Some(PAGE | 0xabc));
        assert_eq!(
            write(&mut vcpu, &memory).expect("upgraded").level,
            Level::L2
        );
        assert_eq!(reached(&mut vcpu, &memory, GPA), Some(0x18_9abc));
    }
}

/// A write to a page cached with its dirty flag clear walks and sets it; later writes do not look at the entry, so
/// that a flag cleared without a flush stays clear.
#[test]
fn dirty_flags_are_set_once_per_flush() {
    let (memory, mut vcpu) = (mapped(), ept());
    assert!(!read(&mut vcpu, &memory, GPA).expect("mapped").dirty);
    assert_eq!(entry(&memory, Level::L1, GPA) & (A | D), A);
    assert!(write(&mut vcpu, &memory).expect("writable").dirty);
    assert_eq!(entry(&memory, Level::L1, GPA) & (A | D), A | D);
    assert_eq!(
        (vcpu.counters().upgrades, vcpu.counters().short_walks),
        (1, 1)
    );

    put(&memory, Level::L1, GPA, PAGE | WB | 7);
    for _ in 0..3 {
        assert!(write(&mut vcpu, &memory).is_ok());
    }
    assert_eq!(
        entry(&memory, Level::L1, GPA) & (A | D),
        0,
        "a hit set flags"
    );
    vcpu.flush_gpa_range(GPA, NEXT);
    assert!(write(&mut vcpu, &memory).is_ok());
    assert_eq!(entry(&memory, Level::L1, GPA) & (A | D), A | D);
}

/// A page that was dirty when it was read is cached as writable.
#[test]
fn a_dirty_page_needs_no_second_walk() {
    let (memory, mut vcpu) = (memory_with(GPA, &[7, 7, 7, PAGE | WB | D | 7]), ept());
    assert!(read(&mut vcpu, &memory, GPA).expect("mapped").dirty);
    assert!(write(&mut vcpu, &memory).is_ok());
    assert_eq!(vcpu.counters().walks, 1);
}

/// Without accessed and dirty flags there is nothing to set, and a write hits.
#[test]
fn without_flags_a_write_hits_after_a_read() {
    let config = EptConfig {
        accessed_dirty: false,
        ..EptConfig::default()
    };
    let mut vcpu = Vcpu::new(EptWalker::new(config).expect("a valid configuration"), ROOT);
    let memory = mapped();
    assert!(read(&mut vcpu, &memory, GPA).is_ok());
    assert!(write(&mut vcpu, &memory).is_ok());
    assert_eq!((vcpu.counters().hits, vcpu.counters().walks), (1, 1));
}

/// Accesses to guest tables need, through the TLB as well, what the format says: with flags enabled, a dirty page.
#[test]
fn guest_table_accesses_through_the_tlb() {
    let (memory, mut vcpu) = (mapped(), ept());
    assert!(read(&mut vcpu, &memory, GPA).is_ok());
    assert!(vcpu.access(&memory, GPA, GuestAccess::PdpteLoad).is_ok());
    assert_eq!(vcpu.counters().hits, 1);
    assert!(vcpu.access(&memory, GPA, GuestAccess::TableRead).is_ok());
    assert_eq!(entry(&memory, Level::L1, GPA) & D, D);
    assert_eq!(vcpu.counters().upgrades, 1);
}

/// SDM 29.4.3.1: a violation that a stale table led to is delivered, and drops what led to it: the next access walks
/// from the root.
#[test]
fn a_fault_drops_what_it_rests_on() {
    fn set_up<W: Walker>(vcpu: &mut Vcpu<W>) -> Memory {
        let memory = mapped();
        assert!(reached(vcpu, &memory, GPA).is_some());
        put(&memory, Level::L2, GPA, SPARE | 7);
        memory.set(entry_address(SPARE, Level::L1, NEXT), OTHER | WB | 7);
        memory
    }
    let mut vcpu = ept();
    let memory = set_up(&mut vcpu);
    assert!(matches!(
        read(&mut vcpu, &memory, NEXT),
        Err(WalkError::Fault(EptFault::Violation(_)))
    ));
    assert_eq!(reached(&mut vcpu, &memory, NEXT), Some(OTHER | 0xabc));
    // The page itself was not the cause and is still cached.
    assert_eq!(reached(&mut vcpu, &memory, GPA), Some(PAGE | 0xabc));

    // A stale table whose frame now holds something else: the misconfiguration is delivered as well.
    let mut vcpu = ept();
    let memory = set_up(&mut vcpu);
    put(&memory, Level::L1, NEXT, 0b010);
    assert!(matches!(
        read(&mut vcpu, &memory, NEXT),
        Err(WalkError::Fault(EptFault::Misconfiguration { .. }))
    ));
    assert_eq!(reached(&mut vcpu, &memory, NEXT), Some(OTHER | 0xabc));

    let mut vcpu = npt();
    let memory = set_up(&mut vcpu);
    assert!(read(&mut vcpu, &memory, NEXT).is_err());
    assert_eq!(reached(&mut vcpu, &memory, NEXT), Some(OTHER | 0xabc));
}

/// APM 5.5.2: removing a restriction needs no flush, wherever it was; the processor looks again before it faults. SDM
/// allows the violation, once.
#[test]
fn a_lifted_restriction_of_an_upper_entry() {
    let entries = [7, 7, 0b101, PAGE | WB | 7];
    let lift = |memory: &Memory| put(memory, Level::L2, GPA, entry(memory, Level::L2, GPA) | 7);

    let (memory, mut vcpu) = (memory_with(GPA, &entries), npt());
    assert!(read(&mut vcpu, &memory, GPA).is_ok());
    lift(&memory);
    assert!(write(&mut vcpu, &memory).is_ok());
    assert_eq!((vcpu.counters().walks, vcpu.counters().faults), (3, 0));
    // What the repeated walk found has taken the place of what was known before.
    put(&memory, Level::L1, NEXT, OTHER | WB | 7);
    assert!(vcpu.access(&memory, NEXT, GuestAccess::Write).is_ok());
    assert_eq!((vcpu.counters().walks, vcpu.counters().short_walks), (4, 2));

    let (memory, mut vcpu) = (memory_with(GPA, &entries), ept());
    assert!(read(&mut vcpu, &memory, GPA).is_ok());
    lift(&memory);
    assert!(write(&mut vcpu, &memory).is_err());
    assert!(write(&mut vcpu, &memory).is_ok());
    assert_eq!((vcpu.counters().walks, vcpu.counters().faults), (3, 1));
}

/// An abort of the walk is handed on, and what led to it is dropped.
#[test]
fn an_abort_is_handed_on() {
    let (mut memory, mut vcpu) = (mapped(), ept());
    assert!(read(&mut vcpu, &memory, GPA).is_ok());
    memory.end = table_of(Level::L4, Level::L1);
    let hpa = Hpa(entry_address(
        table_of(Level::L4, Level::L1),
        Level::L1,
        NEXT,
    ));
    let expected = Err(WalkError::Abort(Abort::NoMemory {
        gpa: NEXT,
        hpa,
        level: Level::L1,
    }));
    assert_eq!(read(&mut vcpu, &memory, NEXT), expected);
    assert!(read(&mut vcpu, &memory, GPA).is_ok(), "cached");
    assert_eq!(vcpu.counters().faults, 1);
}

/// Addresses that no tree reaches fault, and never meet the entries of another root in the cache.
#[test]
fn wild_addresses_fault() {
    let memory = memory_with(Gpa(0), &[7, 7, 7, PAGE | WB | 7]);
    let mut vcpu = ept();
    assert!(read(&mut vcpu, &memory, Gpa(0)).is_ok());
    for shift in 48..64 {
        assert!(
            read(&mut vcpu, &memory, Gpa(1 << shift)).is_err(),
            "bit {shift}"
        );
    }
    assert!(read(&mut vcpu, &memory, Gpa(u64::MAX)).is_err());
}
