//! What a software vCPU remembers, for how long, and what makes it forget.

mod walker_support;

use tdp_arch::cpu::ROOTS;
use tdp_arch::walker::{EptConfig, EptWalker};
use tdp_arch::{Gpa, Hpa, Level};
use walker_support::cpu::{
    GPA, NEXT, OTHER, PAGE, PS, SPARE, Vcpu, WB, ept, mapped, put, reached, read, write,
};
use walker_support::{Memory, ROOT, chain, entry, entry_address, memory_with, table_of};

/// What was unmapped, moved or write-protected is reached as before until it is flushed, by either kind of flush.
#[test]
fn a_translation_outlives_its_entry_until_flushed() {
    type Flush = fn(&mut Vcpu<EptWalker>);
    let flushes: [Flush; 3] = [
        |vcpu| vcpu.flush_all(),
        |vcpu| vcpu.flush_gpa_range(Gpa(GPA.0 & !0xfff), NEXT),
        |vcpu| vcpu.flush_gpa_range(Gpa(0), Gpa(u64::MAX)),
    ];
    for flush in flushes {
        for (value, after) in [
            (0, None),
            (OTHER | WB | 7, Some(OTHER | 0xabc)),
            (PAGE | WB | 1, None),
        ] {
            let (memory, mut vcpu) = (mapped(), ept());
            assert_eq!(
                write(&mut vcpu, &memory).expect("mapped").hpa,
                Hpa(PAGE | 0xabc)
            );
            put(&memory, Level::L1, GPA, value);
            for _ in 0..3 {
                assert_eq!(
                    write(&mut vcpu, &memory).expect("stale").hpa,
                    Hpa(PAGE | 0xabc)
                );
            }
            assert_eq!(
                entry(&memory, Level::L1, GPA),
                value,
                "a hit wrote to the entry"
            );
            flush(&mut vcpu);
            assert_eq!(
                write(&mut vcpu, &memory).ok().map(|t| t.hpa.0),
                after,
                "{value:#x}"
            );
        }
    }
}

/// A flush of a range drops the pages with a byte in it and no others.
#[test]
fn a_range_drops_what_overlaps_and_nothing_else() {
    // Size of page, whether the range (as offsets from its first byte) drops it.
    for (level, entries) in [
        (Level::L1, vec![7, 7, 7, WB | 7]),
        (Level::L2, vec![7, 7, PS | WB | 7]),
        (Level::L3, vec![7, PS | WB | 7]),
    ] {
        let size = level.bytes();
        let first = GPA.0 & !(size - 1);
        let cases = [
            (first, first + size, true),
            (first, first + 1, true),
            (first + size - 1, first + size, true),
            (first + size / 2, first + size / 2 + 1, true),
            (0, first + 1, true),
            (first + size - 1, u64::MAX, true),
            (first - size, first, false),
            (first + size, first + 2 * size, false),
            (first, first, false),
            (first + 8, first + 8, false),
            (first + 16, first + 8, false),
            (0, 0, false),
            (first + size, first, false),
        ];
        for (start, end, dropped) in cases {
            let (memory, mut vcpu) = (memory_with(GPA, &entries), ept());
            assert!(read(&mut vcpu, &memory, GPA).is_ok());
            put(&memory, level, GPA, 0);
            vcpu.flush_gpa_range(Gpa(start), Gpa(end));
            assert_eq!(
                read(&mut vcpu, &memory, GPA).is_err(),
                dropped,
                "{level} {start:#x}..{end:#x}"
            );
        }
    }
}

/// Any upper entry may point elsewhere by now: a walk begins at the table that it pointed to before, until a flush
/// whose range is reached through that table. Checked for every level, in four- and in five-level trees.
#[test]
fn a_table_pointer_outlives_its_entry_until_flushed() {
    for root_level in [Level::L4, Level::L5] {
        let config = EptConfig {
            root_level,
            ..EptConfig::default()
        };
        for level in Level::ALL
            .into_iter()
            .filter(|&l| l > Level::L1 && l <= root_level)
        {
            let memory = Memory::new();
            let depth = usize::from(root_level.number());
            let mut entries = vec![7; depth];
            entries[depth - 1] = PAGE | WB | 7;
            chain(&memory, root_level, GPA, &entries);
            // Another address in the same span of the entry below `level`, so that only the pointer is shared.
            let below = level.below().expect("above the leaf");
            let sibling = Gpa(GPA.0 ^ below.bytes());
            let leaf_of = |table: u64, frame: u64| {
                let low = if below == Level::L1 { 0 } else { PS };
                memory.set(entry_address(table, below, sibling), frame | low | WB | 7);
            };
            // A frame aligned to 1 GiB serves every size below; tables of level 4 hold no pages.
            let (old, new) = (0x7_4000_0000, 0x5_4000_0000);
            if below > Level::L3 {
                continue;
            }
            leaf_of(table_of(root_level, below), old);
            leaf_of(SPARE, new);

            let mut vcpu = Vcpu::new(EptWalker::new(config).expect("a valid configuration"), ROOT);
            assert!(reached(&mut vcpu, &memory, GPA).is_some());
            memory.set(
                entry_address(table_of(root_level, level), level, GPA),
                SPARE | 7,
            );
            let offset = sibling.0 & (below.bytes() - 1);
            assert_eq!(
                reached(&mut vcpu, &memory, sibling),
                Some(old + offset),
                "{level}: pointer not kept"
            );
            assert_eq!(vcpu.counters().short_walks, 1);

            // Flushing what lies outside the span of the pointer leaves it; one byte inside drops it.
            let span = GPA.0 & !(level.bytes() - 1);
            let mut other = vcpu.clone();
            other.flush_gpa_range(Gpa(span + level.bytes()), Gpa(u64::MAX));
            other.flush_gpa_range(Gpa(0), Gpa(span));
            other.flush_gpa_range(sibling, Gpa(sibling.0 + 1));
            assert_eq!(
                reached(&mut other, &memory, sibling),
                Some(new + offset),
                "{level}: pointer not flushed"
            );
            vcpu.flush_gpa_range(Gpa(span + level.bytes()), Gpa(u64::MAX));
            memory.set(
                entry_address(table_of(root_level, below), below, Gpa(sibling.0)),
                0,
            );
            assert_eq!(reached(&mut vcpu, &memory, sibling), Some(old + offset));
            vcpu.flush_all();
            assert_eq!(reached(&mut vcpu, &memory, sibling), Some(new + offset));
        }
    }
}

/// The table of level 4 under a root of level 5 is remembered as well.
#[test]
fn the_pointer_of_a_pml5e_is_kept() {
    let config = EptConfig {
        root_level: Level::L5,
        ..EptConfig::default()
    };
    let memory = Memory::new();
    chain(&memory, Level::L5, GPA, &[7, 7, 7, 7, PAGE | WB | 7]);
    let sibling = Gpa(GPA.0 ^ 1 << 40);
    let mut vcpu = Vcpu::new(EptWalker::new(config).expect("a valid configuration"), ROOT);
    assert!(reached(&mut vcpu, &memory, GPA).is_some());
    memory.set(ROOT.0 + 8 * (GPA.0 >> 48), 0);
    // The way on from the remembered table: a 1 GiB page under a fresh table.
    memory.set(
        entry_address(table_of(Level::L5, Level::L4), Level::L4, sibling),
        SPARE | 7,
    );
    memory.set(
        entry_address(SPARE, Level::L3, sibling),
        0x7_4000_0000 | PS | WB | 7,
    );
    assert!(reached(&mut vcpu, &memory, sibling).is_some());
    vcpu.flush_all();
    assert_eq!(reached(&mut vcpu, &memory, sibling), None);
}

/// A large page is cached whole: after it is split, every address in it is still reached through it.
#[test]
fn a_large_page_is_cached_whole() {
    for (level, entries) in [
        (Level::L2, vec![7, 7, PS | WB | 7]),
        (Level::L3, vec![7, PS | WB | 7]),
    ] {
        let (memory, mut vcpu) = (memory_with(GPA, &entries), ept());
        assert!(read(&mut vcpu, &memory, GPA).is_ok());
        put(&memory, level, GPA, SPARE | 7);
        for gpa in [GPA.0 & !(level.bytes() - 1), GPA.0 | (level.bytes() - 1)] {
            let found = read(&mut vcpu, &memory, Gpa(gpa)).expect("cached");
            assert_eq!(
                (found.hpa, found.level),
                (Hpa(gpa & (level.bytes() - 1)), level)
            );
        }
        vcpu.flush_gpa_range(GPA, NEXT);
        assert_eq!(reached(&mut vcpu, &memory, GPA), None);
    }
}

/// What was cached under one root is not used under another, and found again when the root comes back.
#[test]
fn roots_are_told_apart() {
    let memory = mapped();
    let second = Hpa(0x30_0000);
    let mut vcpu = ept();
    assert_eq!(reached(&mut vcpu, &memory, GPA), Some(PAGE | 0xabc));
    vcpu.set_root(second);
    assert_eq!(vcpu.root(), second);
    assert_eq!(reached(&mut vcpu, &memory, GPA), None);
    put(&memory, Level::L1, GPA, 0);
    vcpu.set_root(ROOT);
    assert_eq!(
        reached(&mut vcpu, &memory, GPA),
        Some(PAGE | 0xabc),
        "cached for that root"
    );

    // A flush in one root is a flush in all.
    let flushes: [fn(&mut Vcpu<EptWalker>); 2] = [
        |vcpu| vcpu.flush_all(),
        |vcpu| vcpu.flush_gpa_range(GPA, NEXT),
    ];
    for flush in flushes {
        for first in [ROOT, second] {
            let memory = mapped();
            let mut vcpu = Vcpu::new(*ept().walker(), first);
            vcpu.set_root(ROOT);
            assert!(read(&mut vcpu, &memory, GPA).is_ok());
            put(&memory, Level::L1, GPA, 0);
            vcpu.set_root(second);
            flush(&mut vcpu);
            vcpu.set_root(ROOT);
            assert_eq!(reached(&mut vcpu, &memory, GPA), None);
        }
    }

    // The oldest root gives way to a new one, with all that was cached for it.
    for n in 1..ROOTS as u64 {
        vcpu.set_root(Hpa(0x30_0000 + n * 0x1000));
        assert_eq!(
            reached(&mut vcpu, &memory, GPA),
            None,
            "not cached for that root"
        );
        vcpu.set_root(ROOT);
        let kept = reached(&mut vcpu, &memory, GPA).is_some();
        assert_eq!(kept, n + 1 < ROOTS as u64, "after {n} more roots");
    }
}

/// A set that is full replaces its entries in turn, the same in every run.
#[test]
fn replacement_goes_in_turn() {
    // With 16 sets, pages 64 KiB apart share one.
    let gpa = |n: u64| Gpa(n * 0x1_0000);
    let memory = Memory::new();
    for n in 0..6 {
        chain(
            &memory,
            Level::L4,
            gpa(n),
            &[7, 7, 7, (0x100 + n) << 12 | WB | 7],
        );
    }
    let mut vcpu = ept();
    for n in 0..6 {
        assert!(reached(&mut vcpu, &memory, gpa(n)).is_some());
    }
    for n in 0..6 {
        put(&memory, Level::L1, gpa(n), 0);
    }
    // Those that hit come first, since a fault changes nothing else.
    let kept: Vec<bool> = (0..6)
        .map(|n| reached(&mut vcpu, &memory, gpa(n)).is_some())
        .collect();
    assert_eq!(kept, [false, false, true, true, true, true]);
}
