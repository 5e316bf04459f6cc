//! Rules of the SDM, volume 3, 29.3 (extended page tables), one by one. Entries are written from bit numbers.

mod walker_support;

use tdp_arch::walker::{
    Abort, ConfigError, EptConfig, EptFault, EptViolation, EptWalker, GuestAccess, LeafMemoryType,
    Permissions, ReadOnly, Translation, WalkError, Walker,
};
use tdp_arch::{Gpa, Hpa, Level};
use walker_support::{Memory, ROOT, chain, entry, memory_with};

const GPA: Gpa = Gpa(0x1234_5678_9abc);
const PAGE: u64 = 0x7_6543_2000;
/// Write-back in bits 5:3.
const WB: u64 = 6 << 3;
const A: u64 = 1 << 8;
const D: u64 = 1 << 9;

fn bit(n: u32) -> u64 {
    1 << n
}

fn plain() -> EptConfig {
    EptConfig {
        accessed_dirty: false,
        ..EptConfig::default()
    }
}

fn mode_based() -> EptConfig {
    EptConfig {
        mode_based_execute: true,
        ..plain()
    }
}

fn walker(config: EptConfig) -> EptWalker {
    EptWalker::new(config).expect("a valid configuration")
}

fn walk(
    config: EptConfig,
    memory: &Memory,
    access: GuestAccess,
) -> Result<Translation, WalkError<EptFault>> {
    walker(config).walk(memory, ROOT, GPA, access)
}

fn outcome(
    config: EptConfig,
    entries: &[u64],
    access: GuestAccess,
) -> Result<Translation, WalkError<EptFault>> {
    walk(config, &memory_with(GPA, entries), access)
}

fn violation(result: Result<Translation, WalkError<EptFault>>) -> EptViolation {
    match result {
        Err(WalkError::Fault(EptFault::Violation(violation))) => violation,
        other => panic!("not a violation: {other:x?}"),
    }
}

fn misconfigured(result: Result<Translation, WalkError<EptFault>>) -> bool {
    result == Err(WalkError::Fault(EptFault::Misconfiguration { gpa: GPA }))
}

/// 29.3.2: bits 51:12 come from the entry, the rest from the guest-physical address, for each page size.
#[test]
fn address_is_made_of_entry_and_offset() {
    let large = 0x7_6540_0000;
    let huge = 0x7_4000_0000;
    let cases = [
        (vec![7, 7, 7, PAGE | WB | 7], PAGE | 0xabc, Level::L1),
        (
            vec![7, 7, large | bit(7) | WB | 7],
            large | 0x18_9abc,
            Level::L2,
        ),
        (
            vec![7, huge | bit(7) | WB | 7],
            huge | 0x3878_9abc,
            Level::L3,
        ),
    ];
    for (entries, hpa, level) in cases {
        let found = outcome(plain(), &entries, GuestAccess::Read).expect("mapped");
        assert_eq!(
            (found.hpa, found.level),
            (
                Hpa(hpa & !0xfff | GPA.0 & 0xfff | found.hpa.0 & 0x3fff_f000),
                level
            )
        );
        assert_eq!(
            found.hpa.0,
            (hpa & !(level.bytes() - 1)) | GPA.0 & (level.bytes() - 1),
            "{level}"
        );
    }
}

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

/// 29.3.2: bits 2:0 zero mean not present, whatever the other bits; bits 5:3 of the qualification are then zero.
#[test]
fn not_present_ignores_all_other_bits() {
    for depth in 1..=4 {
        for junk in [0, bit(63), bit(10), 0xf8, 0x000f_ffff_ffff_f000, !7] {
            let mut entries = vec![7; depth];
            entries[depth - 1] = junk;
            let found = violation(outcome(plain(), &entries, GuestAccess::Write));
            assert_eq!(
                found.qualification,
                bit(1) | bit(7) | bit(8),
                "depth {depth}, {junk:#x}"
            );
            assert_eq!(found.gpa, GPA);
        }
    }
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

/// 29.3.3.1: writable but not readable; executable but not readable where that is not supported. At every level.
#[test]
fn unreadable_entries_are_misconfigured() {
    let no_execute_only = EptConfig {
        execute_only: false,
        ..plain()
    };
    let no_execute_only_modes = EptConfig {
        execute_only: false,
        ..mode_based()
    };
    for depth in 0..4 {
        let with = |bits: u64| {
            let mut entries = [
                bit(10) | 7,
                bit(10) | 7,
                bit(10) | 7,
                PAGE | WB | bit(10) | 7,
            ];
            entries[depth] = entries[depth] & !7 & !bit(10) | bits;
            entries
        };
        for access in GuestAccess::ALL {
            for config in [plain(), mode_based(), no_execute_only] {
                assert!(
                    misconfigured(outcome(config, &with(0b010), access)),
                    "write-only"
                );
                assert!(
                    misconfigured(outcome(config, &with(0b110), access)),
                    "write and execute"
                );
            }
            assert!(
                misconfigured(outcome(no_execute_only, &with(0b100), access)),
                "execute-only unsupported"
            );
            assert!(misconfigured(outcome(
                no_execute_only_modes,
                &with(0b100),
                access
            )));
            assert!(
                misconfigured(outcome(no_execute_only_modes, &with(bit(10)), access)),
                "user execute only"
            );
            assert!(!misconfigured(outcome(plain(), &with(0b100), access)));
            assert!(!misconfigured(outcome(
                mode_based(),
                &with(bit(10)),
                access
            )));
            // Bit 10 alone does not make an entry present without the control.
            assert!(!misconfigured(outcome(
                no_execute_only,
                &with(bit(10)),
                access
            )));
        }
    }
}

/// Tables 29-1 to 29-6: reserved bits of each kind of entry, one bit at a time, and that all others are not reserved.
#[test]
fn reserved_bits_are_misconfigured_and_no_others() {
    let config = EptConfig {
        physical_bits: 46,
        ..plain()
    };
    let large = bit(7) | WB | 7;
    // Entries down to the one in question, and its reserved bits; bits that make it another kind are left out.
    let beyond: Vec<u32> = (46..52).collect();
    let kinds: [(&str, Vec<u64>, Vec<u32>, &[u32]); 6] = [
        ("PML4E", vec![7], (3..8).collect(), &[]),
        ("PDPTE to a table", vec![7, 7], (3..7).collect(), &[7]),
        ("PDE to a table", vec![7, 7, 7], (3..7).collect(), &[7]),
        ("PDPTE of a page", vec![7, large], (12..30).collect(), &[7]),
        ("PDE of a page", vec![7, 7, large], (12..21).collect(), &[7]),
        ("PTE", vec![7, 7, 7, WB | 7], vec![], &[]),
    ];
    for (name, entries, reserved, kind_bits) in kinds {
        let is_page = name.ends_with("page") || name == "PTE";
        for n in 3..64 {
            if kind_bits.contains(&n) || is_page && (3..6).contains(&n) {
                continue;
            }
            let mut entries = entries.clone();
            *entries.last_mut().expect("not empty") |= bit(n);
            let expected = reserved.contains(&n) || beyond.contains(&n);
            let result = outcome(config, &entries, GuestAccess::Read);
            assert_eq!(
                misconfigured(result),
                expected,
                "{name}, bit {n}: {result:x?}"
            );
        }
    }
}

/// 29.3.2: the same reserved bits in a PML5E as in a PML4E; the walk starts with bits 56:48 of the address.
#[test]
fn five_levels() {
    let config = EptConfig {
        root_level: Level::L5,
        ..plain()
    };
    let gpa = Gpa(0x000f_1234_5678_9abc);
    let memory = Memory::new();
    chain(&memory, Level::L5, gpa, &[7, 7, 7, 7, PAGE | WB | 7]);
    let found = walker(config)
        .walk(&memory, ROOT, gpa, GuestAccess::Read)
        .expect("mapped");
    assert_eq!((found.hpa, found.level), (Hpa(PAGE | 0xabc), Level::L1));
    for n in 3..8 {
        let memory = Memory::new();
        chain(
            &memory,
            Level::L5,
            gpa,
            &[7 | bit(n), 7, 7, 7, PAGE | WB | 7],
        );
        let result = walker(config).walk(&memory, ROOT, gpa, GuestAccess::Read);
        assert_eq!(
            result,
            Err(WalkError::Fault(EptFault::Misconfiguration { gpa })),
            "PML5E bit {n}"
        );
    }
    // Another PML5E, which is empty.
    assert!(
        walker(config)
            .walk(&memory, ROOT, Gpa(0x1234_5678_9abc), GuestAccess::Read)
            .is_err()
    );
}

/// No level looks at bits above 47 (or 51): reported as a missing entry that cannot become a #VE.
#[test]
fn addresses_out_of_reach_violate() {
    let memory = memory_with(Gpa(0), &[7, 7, 7, PAGE | WB | 7]);
    for gpa in [1 << 48, 1 << 51, 1 << 52, 1 << 57, u64::MAX] {
        let gpa = Gpa(gpa);
        let found = violation(walker(plain()).walk(&memory, ROOT, gpa, GuestAccess::Read));
        assert_eq!(
            found,
            EptViolation {
                gpa,
                qualification: 0x181,
                convertible: false
            }
        );
    }
    let config = EptConfig {
        root_level: Level::L5,
        ..plain()
    };
    for gpa in [1 << 52, 1 << 57, u64::MAX] {
        assert!(
            !violation(walker(config).walk(&memory, ROOT, Gpa(gpa), GuestAccess::Read)).convertible
        );
    }
    assert_eq!(memory.loads.get(), 0);
}

/// IA32_VMX_EPT_VPID_CAP bits 16 and 17: where a page size is not supported, bit 7 is reserved.
#[test]
fn unsupported_page_sizes_are_misconfigured() {
    let huge = [7, bit(7) | WB | 7];
    let large = [7, 7, bit(7) | WB | 7];
    assert!(misconfigured(outcome(
        EptConfig {
            pages_1g: false,
            ..plain()
        },
        &huge,
        GuestAccess::Read
    )));
    assert!(misconfigured(outcome(
        EptConfig {
            pages_2m: false,
            ..plain()
        },
        &large,
        GuestAccess::Read
    )));
    assert!(
        outcome(
            EptConfig {
                pages_2m: false,
                ..plain()
            },
            &huge,
            GuestAccess::Read
        )
        .is_ok()
    );
    assert!(
        outcome(
            EptConfig {
                pages_1g: false,
                ..plain()
            },
            &large,
            GuestAccess::Read
        )
        .is_ok()
    );
}

/// 29.3.3.1 and 29.3.7: memory types 2, 3 and 7 are reserved in every leaf; bit 6 is ignore-PAT.
#[test]
fn memory_types() {
    for memory_type in 0..8u8 {
        for ignore_pat in [false, true] {
            let bits = u64::from(memory_type) << 3 | if ignore_pat { bit(6) } else { 0 } | 7;
            for entries in [
                vec![7, bit(7) | bits],
                vec![7, 7, bit(7) | bits],
                vec![7, 7, 7, bits],
            ] {
                let result = outcome(plain(), &entries, GuestAccess::Read);
                if matches!(memory_type, 2 | 3 | 7) {
                    assert!(misconfigured(result), "type {memory_type}");
                } else {
                    let found = result.expect("mapped").memory_type;
                    assert_eq!(
                        found,
                        LeafMemoryType::Ept {
                            memory_type,
                            ignore_pat
                        }
                    );
                }
            }
        }
    }
}

/// 29.3.3.3: entries are judged in walk order; permissions only once the whole walk succeeded.
#[test]
fn misconfiguration_and_absence_come_before_permissions() {
    let malformed_leaf = PAGE | 7 << 3 | 7;
    let deny_write = 0b101;
    assert!(misconfigured(outcome(
        plain(),
        &[7, deny_write, 7, malformed_leaf],
        GuestAccess::Write
    )));
    // An upper entry that is missing hides a malformed lower one, a malformed upper one hides a missing one.
    assert_eq!(
        violation(outcome(
            plain(),
            &[7, 0, 7, malformed_leaf],
            GuestAccess::Write
        ))
        .qualification,
        0x182
    );
    assert!(misconfigured(outcome(
        plain(),
        &[7, 7 | bit(3), 7, 0],
        GuestAccess::Write
    )));
    // A missing leaf below a denying entry: bits 5:3 are zero, not those of the entry above.
    assert_eq!(
        violation(outcome(plain(), &[7, deny_write, 7, 0], GuestAccess::Write)).qualification,
        0x182
    );
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

/// 24.6.11: with EPTP bit 6 clear no flag is written or reported, set or not.
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

/// 24.6.11: bits 51:12 of EPTP locate the root; the others have other meanings.
#[test]
fn low_bits_of_the_root_pointer_are_not_address() {
    let memory = memory_with(GPA, &[7, 7, 7, PAGE | WB | 7]);
    let eptp = Hpa(ROOT.0 | 0x5e | bit(60));
    assert!(
        walker(plain())
            .walk(&memory, eptp, GPA, GuestAccess::Read)
            .is_ok()
    );
}

#[test]
fn a_hole_in_memory_is_an_abort() {
    let mut memory = memory_with(GPA, &[7, 7, 7, PAGE | WB | 7]);
    memory.end = ROOT.0 + 0x2000;
    let hpa = Hpa(ROOT.0 + 0x2000 + (GPA.0 >> 21 & 0x1ff) * 8);
    assert_eq!(
        walk(plain(), &memory, GuestAccess::Read),
        Err(WalkError::Abort(Abort::NoMemory {
            gpa: GPA,
            hpa,
            level: Level::L2
        }))
    );
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

#[test]
fn impossible_configurations_are_refused() {
    for bits in [0, 31, 53, u32::MAX] {
        let config = EptConfig {
            physical_bits: bits,
            ..plain()
        };
        assert_eq!(EptWalker::new(config), Err(ConfigError::PhysicalBits(bits)));
    }
    for level in [Level::L1, Level::L2, Level::L3] {
        let config = EptConfig {
            root_level: level,
            ..plain()
        };
        assert_eq!(EptWalker::new(config), Err(ConfigError::RootLevel(level)));
    }
    assert!(
        EptWalker::new(EptConfig {
            physical_bits: 32,
            ..plain()
        })
        .is_ok()
    );
}
