//! Rules of the SDM, volume 3, 29.3 (extended page tables), one by one: who may do what, how a refusal is reported, and
//! which flags an access leaves behind. Entries are written from bit numbers.

mod walker_support;

use tdp_arch::walker::{EptConfig, GuestAccess, Permissions, PhysicalMemory, ReadOnly, Walker};
use tdp_arch::{Hpa, Level};
use walker_support::ept::{
    A, D, GPA, PAGE, WB, bit, mode_based, outcome, plain, violation, walk, walker,
};
use walker_support::{Memory, ROOT, entry, memory_with};

/// 29.3.3.2 and table 28-7: which access which bits allow, and bits 2:0 and 5:3 of the exit qualification.
#[test]
fn permission_bits_decide_and_are_reported() {
    // Bits 2:0 of the leaf, then whether read, write, fetch are allowed.
    let cases = [
        (0b001, [true, false, false]),
        (0b011, [true, true, false]),
        (0b100, [false, false, true]),
        (0b101, [true, false, true]),
        (0b111, [true, true, true]),
    ];
    let accesses = [GuestAccess::Read, GuestAccess::Write, GuestAccess::Fetch];
    for (rwx, allowed) in cases {
        for (n, access) in accesses.into_iter().enumerate() {
            let result = outcome(plain(), &[7, 7, 7, PAGE | WB | rwx], access);
            if allowed[n] {
                assert_eq!(result.expect("allowed").hpa, Hpa(PAGE | 0xabc));
            } else {
                let expected = 1 << n | rwx << 3 | bit(7) | bit(8);
                assert_eq!(
                    violation(result).qualification,
                    expected,
                    "{rwx:03b} {access:?}"
                );
            }
        }
    }
}

/// The values that an emulator of a processor was seen to report: an unmapped read and a write to a read-only page.
#[test]
fn qualifications_seen_elsewhere() {
    assert_eq!(
        violation(outcome(plain(), &[7, 7, 7, 0], GuestAccess::Read)).qualification,
        0x181
    );
    assert_eq!(
        violation(outcome(
            plain(),
            &[7, 7, 7, PAGE | WB | 1],
            GuestAccess::Write
        ))
        .qualification,
        0x18a
    );
}

/// 29.3.3.2: a permission must be given by *every* entry; the qualification has the AND.
#[test]
fn permissions_are_the_and_of_all_levels() {
    for weak in 0..4 {
        for (rwx, refused) in [
            (0b101, GuestAccess::Write),
            (0b011, GuestAccess::Fetch),
            (0b100, GuestAccess::Read),
        ] {
            let mut entries = [7, 7, 7, PAGE | WB | 7];
            entries[weak] = entries[weak] & !7 | rwx;
            let found = violation(outcome(plain(), &entries, refused));
            assert_eq!(found.qualification >> 3 & 7, rwx, "level {}", 4 - weak);
        }
        let mut entries = [7, 7, 7, PAGE | WB | 7];
        entries[weak] = entries[weak] & !7 | 0b001;
        let found = outcome(plain(), &entries, GuestAccess::Read).expect("readable");
        assert_eq!(found.permissions, Permissions::READ);
    }
    // Two entries that each lack something else.
    let found = violation(outcome(
        plain(),
        &[7, 0b101, 0b011, PAGE | WB | 7],
        GuestAccess::Write,
    ));
    assert_eq!(found.qualification >> 3 & 7, 0b001);
}

/// 29.3.2: with mode-based execute control an entry is not present only if bit 10 is clear as well, and user-mode
/// fetches need bit 10, supervisor-mode ones bit 2. Bit 6 of the qualification is the AND of bit 10.
#[test]
fn mode_based_execute_control() {
    let leaf = |bits: u64| [bit(10) | 7, bit(10) | 7, bit(10) | 7, PAGE | WB | bits];
    // Bits, supervisor fetch allowed, user fetch allowed.
    for (bits, supervisor, user) in [
        (bit(10), false, true),
        (bit(2), true, false),
        (bit(10) | 4, true, true),
        (bit(0), false, false),
    ] {
        let fetch = outcome(mode_based(), &leaf(bits), GuestAccess::Fetch);
        let user_fetch = outcome(mode_based(), &leaf(bits), GuestAccess::UserFetch);
        assert_eq!(
            (fetch.is_ok(), user_fetch.is_ok()),
            (supervisor, user),
            "{bits:#x}"
        );
        let found = violation(outcome(mode_based(), &leaf(bits), GuestAccess::Write));
        assert_eq!(
            found.qualification >> 3 & 0xf,
            bits & 7 | bits >> 10 << 3,
            "{bits:#x}"
        );
    }
    // An upper entry without bit 10 takes user execution away.
    let mut entries = leaf(bit(10) | 7);
    entries[1] = 7;
    assert_eq!(
        violation(outcome(mode_based(), &entries, GuestAccess::UserFetch)).qualification >> 2
            & 0x1f,
        0b01111
    );
    // Not present: bits 2:0 and 10 all clear.
    let found = violation(outcome(mode_based(), &leaf(0), GuestAccess::UserFetch));
    assert_eq!(found.qualification, bit(2) | bit(7) | bit(8));
    // Without the control bit 10 means nothing, and bit 2 is for both modes.
    assert!(outcome(plain(), &[7, 7, 7, PAGE | WB | 4], GuestAccess::UserFetch).is_ok());
    let found = violation(outcome(plain(), &leaf(bit(10) | 1), GuestAccess::UserFetch));
    assert_eq!(found.qualification, bit(2) | bit(3) | bit(7) | bit(8));
}

/// 26.5.7.1: bit 63 of exactly one entry decides: the one that is not present, or the one that maps the page.
#[test]
fn suppress_ve_of_one_entry_decides() {
    let ve = bit(63);
    // Entries, whether the violation of a write is convertible.
    let cases = [
        (vec![7, 7, 7, 0], true),
        (vec![7, 7, 7, ve], false),
        (vec![7, 0], true),
        (vec![7, ve], false),
        (vec![7 | ve, 7 | ve, 7 | ve, PAGE | WB | 1], true),
        (vec![7, 7, 7, PAGE | WB | 1 | ve], false),
        (vec![7 | ve, 7 | ve, bit(7) | WB | 1], true),
        (vec![7, 7, bit(7) | WB | 1 | ve], false),
        // Denied by an upper entry: still the leaf's bit.
        (vec![7, 7, 1 | ve, PAGE | WB | 7], true),
        (vec![7, 7, 1, PAGE | WB | 7 | ve], false),
    ];
    for (entries, convertible) in cases {
        let found = violation(outcome(plain(), &entries, GuestAccess::Write));
        assert_eq!(found.convertible, convertible, "{entries:x?}");
    }
    // An access that is allowed takes no notice.
    assert!(outcome(plain(), &[7, 7, 7, PAGE | WB | 7 | ve], GuestAccess::Write).is_ok());
}

/// 29.3.5: the accessed flag of every entry used, the dirty flag of the leaf on a write, nothing else, never cleared.
#[test]
fn accessed_and_dirty_flags() {
    let shapes = [
        vec![7, 7, 7, PAGE | WB | 7],
        vec![7, 7, bit(7) | WB | 7],
        vec![7, bit(7) | WB | 7],
    ];
    for entries in shapes {
        let leaf = Level::from_number(5 - entries.len() as u8).expect("a level");
        for (access, flags) in [
            (GuestAccess::Read, A),
            (GuestAccess::Fetch, A),
            (GuestAccess::UserFetch, A),
            (GuestAccess::Write, A | D),
        ] {
            let memory = memory_with(GPA, &entries);
            let before = memory.snapshot();
            let found = walk(EptConfig::default(), &memory, access).expect("allowed");
            assert_eq!((found.accessed, found.dirty), (true, flags & D != 0));
            for level in Level::ALL
                .into_iter()
                .filter(|&l| l >= leaf && l <= Level::L4)
            {
                let change = entry(&memory, level, GPA) ^ before[&entry_of(level)];
                assert_eq!(
                    change,
                    if level == leaf { flags } else { A },
                    "{level} {access:?}"
                );
            }
            // The second time there is nothing to set; a read leaves the dirty flag alone.
            let exchanges = memory.exchanges.get();
            let after = memory.snapshot();
            let again = walk(EptConfig::default(), &memory, GuestAccess::Read).expect("allowed");
            assert_eq!(again.dirty, flags & D != 0);
            assert_eq!(
                (memory.exchanges.get(), memory.snapshot()),
                (exchanges, after)
            );
        }
    }

    fn entry_of(level: Level) -> u64 {
        walker_support::entry_address(walker_support::table_of(Level::L4, level), level, GPA)
    }
}

/// 25.6.11: with EPTP bit 6 clear no flag is written or reported, set or not.
#[test]
fn without_the_control_no_flag_is_touched() {
    let entries = [7, 7, 7, PAGE | WB | A | D | 7];
    let memory = memory_with(GPA, &entries);
    let before = memory.snapshot();
    for access in GuestAccess::ALL {
        let found = walk(plain(), &memory, access).expect("allowed");
        assert_eq!((found.accessed, found.dirty), (false, false));
    }
    assert_eq!((memory.exchanges.get(), memory.snapshot()), (0, before));
}

/// A refused access leaves the leaf alone; entries that were passed may be marked accessed, and here are.
#[test]
fn a_refused_access_does_not_mark_the_leaf() {
    for (leaf, access) in [
        (PAGE | WB | 1, GuestAccess::Write),
        (0, GuestAccess::Read),
        (PAGE | 7 << 3 | 7, GuestAccess::Read),
    ] {
        let memory = memory_with(GPA, &[7, 7, 7, leaf]);
        assert!(walk(EptConfig::default(), &memory, access).is_err());
        assert_eq!(entry(&memory, Level::L1, GPA), leaf);
        for level in [Level::L2, Level::L3, Level::L4] {
            assert_eq!(entry(&memory, level, GPA) & (A | D), A, "{level}");
        }
    }
}

/// 29.3.3.2, 29.3.5, table 28-7: with flags enabled an access to a guest paging structure is treated as a write: it
/// needs write permission, sets the dirty flag, and reports both bit 0 and bit 1. Bit 8 is clear.
#[test]
fn guest_paging_structures() {
    for access in [GuestAccess::TableRead, GuestAccess::TableWrite] {
        let memory = memory_with(GPA, &[7, 7, 7, PAGE | WB | 7]);
        assert!(
            walk(EptConfig::default(), &memory, access)
                .expect("writable")
                .dirty
        );
        assert_eq!(entry(&memory, Level::L1, GPA) & (A | D), A | D);

        let read_only = [7, 7, 7, PAGE | WB | 1];
        let found = violation(outcome(EptConfig::default(), &read_only, access));
        assert_eq!(found.qualification, 0b11 | bit(3) | bit(7));
    }
    let read_only = [7, 7, 7, PAGE | WB | 1];
    assert!(outcome(plain(), &read_only, GuestAccess::TableRead).is_ok());
    assert_eq!(
        violation(outcome(plain(), &read_only, GuestAccess::TableWrite)).qualification,
        bit(1) | bit(3) | bit(7)
    );
    let execute_only = [7, 7, 7, PAGE | WB | 4];
    assert_eq!(
        violation(outcome(plain(), &execute_only, GuestAccess::TableRead)).qualification,
        bit(0) | bit(5) | bit(7)
    );
}

/// 29.3.3.2: loads of PDPTEs by MOV to CR are reads even with flags enabled; they have no linear address (bit 7).
#[test]
fn pdpte_loads_are_reads() {
    let memory = memory_with(GPA, &[7, 7, 7, PAGE | WB | 1]);
    assert!(
        !walk(EptConfig::default(), &memory, GuestAccess::PdpteLoad)
            .expect("readable")
            .dirty
    );
    assert_eq!(entry(&memory, Level::L1, GPA) & (A | D), A);
    let found = violation(outcome(
        EptConfig::default(),
        &[7, 7, 7, 0],
        GuestAccess::PdpteLoad,
    ));
    assert_eq!(found.qualification, bit(0));
}

#[test]
fn a_read_only_view_decides_flags_but_stores_none() {
    let memory = memory_with(GPA, &[7, 7, 7, PAGE | WB | 7]);
    let before = memory.snapshot();
    let found =
        walker(EptConfig::default()).walk(&ReadOnly(&memory), ROOT, GPA, GuestAccess::Write);
    assert!(found.expect("allowed").dirty);
    assert_eq!(memory.snapshot(), before);
}

/// An exchange by a view that stores nothing fails where it would, so that a walk looks again at an entry that has changed.
#[test]
fn a_read_only_view_tells_of_a_change() {
    let memory = Memory::new();
    memory.set(0x1000, 5);
    let view = ReadOnly(&memory);
    assert_eq!(view.compare_exchange(Hpa(0x1000), 5, 6), Ok(()));
    assert_eq!(view.compare_exchange(Hpa(0x1000), 6, 7), Err(5));
    assert_eq!(memory.get(0x1000), 5);
    // Through a reference it is the memory itself.
    let stored = PhysicalMemory::compare_exchange(&&memory, Hpa(0x1000), 5, 6);
    assert_eq!((stored, memory.get(0x1000)), (Ok(()), 6));
}
