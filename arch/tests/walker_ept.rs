//! Rules of the SDM, volume 3, 29.3 (extended page tables), one by one: how entries are found, which values they may
//! have, what a page is. Entries are written from bit numbers.

mod walker_support;

use tdp_arch::walker::{
    Abort, ConfigError, EptConfig, EptFault, EptViolation, EptWalker, GuestAccess, LeafMemoryType,
    WalkError, Walker,
};
use tdp_arch::{Gpa, Hpa, Level};
use walker_support::ept::{
    GPA, PAGE, WB, bit, misconfigured, mode_based, outcome, plain, violation, walk, walker,
};
use walker_support::{Memory, ROOT, chain, memory_with};

/// A kind of entry: its name, the entries down to one of it, its reserved bits, bits that would make it another kind.
type Kind = (&'static str, Vec<u64>, Vec<u32>, &'static [u32]);

/// 29.3.2: bits 51:12 come from the entry, the rest from the guest-physical address, for each page size.
#[test]
fn address_is_made_of_entry_and_offset() {
    let cases = [
        (
            vec![7, 7, 7, 0x7_6543_2000 | WB | 7],
            0x7_6543_2abc,
            Level::L1,
        ),
        (
            vec![7, 7, 0x7_6540_0000 | bit(7) | WB | 7],
            0x7_6558_9abc,
            Level::L2,
        ),
        (
            vec![7, 0x7_4000_0000 | bit(7) | WB | 7],
            0x7_5678_9abc,
            Level::L3,
        ),
        // Bit 7 of a PTE is ignored.
        (
            vec![7, 7, 7, 0x7_6543_2000 | bit(7) | WB | 7],
            0x7_6543_2abc,
            Level::L1,
        ),
        (
            vec![7, 7, 7, 0xf_ffff_ffff_f000 | WB | 7],
            0xf_ffff_ffff_fabc,
            Level::L1,
        ),
    ];
    for (entries, hpa, level) in cases {
        let found = outcome(plain(), &entries, GuestAccess::Read).expect("mapped");
        assert_eq!((found.hpa, found.level), (Hpa(hpa), level));
    }
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
    let kinds: [Kind; 6] = [
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

/// 25.6.11: bits 51:12 of EPTP locate the root; the others have other meanings.
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

/// A log shows of a fault what the VM exit would have: which kind, where, and the qualification.
#[test]
fn a_fault_says_what_the_exit_says() {
    let absent = walk(plain(), &memory_with(GPA, &[7, 0]), GuestAccess::Read);
    let malformed = walk(plain(), &memory_with(GPA, &[7, 0b010]), GuestAccess::Read);
    for (result, kind) in [(absent, "violation"), (malformed, "misconfiguration")] {
        let error = result.expect_err("nothing is mapped");
        let fault = error.fault().expect("the processor's own");
        assert_eq!(fault.gpa(), GPA);
        let said = fault.to_string();
        assert!(
            said.contains(kind) && said.contains(&GPA.to_string()),
            "{said}"
        );
        assert_eq!(error.to_string(), said);
        if let EptFault::Violation(violation) = fault {
            let qualification = format!("{:#x}", violation.qualification);
            assert!(said.ends_with(&qualification), "{said}");
        }
    }
    let config = mode_based();
    assert_eq!(*walker(config).config(), config);
}

/// What is no fault of the processor is not taken for one.
#[test]
fn an_abort_is_no_fault() {
    let mut memory = memory_with(GPA, &[7, 7]);
    memory.end = ROOT.0 + 0x1000;
    let error = walk(plain(), &memory, GuestAccess::Read).expect_err("there is no memory");
    assert!(matches!(error, WalkError::Abort(Abort::NoMemory { .. })));
    assert_eq!(error.fault(), None);
}

/// A walk through a reference to memory stores its flags there all the same.
#[test]
fn flags_are_stored_through_a_reference() {
    let config = EptConfig {
        accessed_dirty: true,
        ..plain()
    };
    let memory = memory_with(GPA, &[7, 7, 7, PAGE | WB | 7]);
    walker(config)
        .walk(&&memory, ROOT, GPA, GuestAccess::Write)
        .expect("mapped");
    assert_eq!(memory.exchanges.get(), 4);
}
