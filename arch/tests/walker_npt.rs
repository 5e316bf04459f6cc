//! Rules of the APM, volume 2, 5.3 to 5.6 (long-mode translation) and 15.25 (nested paging), one by one. Entries are
//! written from bit numbers.

mod walker_support;

use tdp_arch::walker::{
    ConfigError, GuestAccess, LeafMemoryType, NptConfig, NptFault, NptWalker, Permissions,
    Translation, WalkError, Walker,
};
use tdp_arch::{Gpa, Hpa, Level};
use walker_support::{Memory, ROOT, chain, entry, memory_with};

/// A kind of entry: its name, the entries down to one of it, its reserved bits, bits that would make it another kind.
type Kind = (&'static str, Vec<u64>, Vec<u32>, &'static [u32]);

const GPA: Gpa = Gpa(0x1234_5678_9abc);
const PAGE: u64 = 0x7_6543_2000;
const P: u64 = 1 << 0;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const NX: u64 = 1 << 63;
/// Error-code bits 2 and 32: what every fault on a final page has.
const FINAL: u64 = 1 << 32 | 1 << 2;
const TABLE: u64 = 1 << 33 | 1 << 2;

fn bit(n: u32) -> u64 {
    1 << n
}

fn walker(config: NptConfig) -> NptWalker {
    NptWalker::new(config).expect("a valid configuration")
}

fn walk(
    config: NptConfig,
    memory: &Memory,
    access: GuestAccess,
) -> Result<Translation, WalkError<NptFault>> {
    walker(config).walk(memory, ROOT, GPA, access)
}

fn outcome(
    config: NptConfig,
    entries: &[u64],
    access: GuestAccess,
) -> Result<Translation, WalkError<NptFault>> {
    walk(config, &memory_with(GPA, entries), access)
}

fn plain() -> NptConfig {
    NptConfig::default()
}

/// Error code of a fault; EXITINFO2 must be the address.
fn code(result: Result<Translation, WalkError<NptFault>>) -> u64 {
    match result {
        Err(WalkError::Fault(NptFault {
            exit_info_1,
            exit_info_2,
        })) => {
            assert_eq!(exit_info_2, GPA);
            exit_info_1
        }
        other => panic!("not a fault: {other:x?}"),
    }
}

/// 5.3.3 to 5.3.5: frame from the entry, offset from the address, for each page size. PAT of a large page (bit 12)
/// is not address.
#[test]
fn address_is_made_of_entry_and_offset() {
    let cases = [
        (vec![7, 7, 7, PAGE | 7], 0x7_6543_2abc, Level::L1),
        (vec![7, 7, 0x7_6540_0000 | PS | 7], 0x7_6558_9abc, Level::L2),
        (
            vec![7, 7, 0x7_6540_0000 | bit(12) | PS | 7],
            0x7_6558_9abc,
            Level::L2,
        ),
        (vec![7, 0x7_4000_0000 | PS | 7], 0x7_5678_9abc, Level::L3),
        (
            vec![7, 0x7_4000_0000 | bit(12) | PS | 7],
            0x7_5678_9abc,
            Level::L3,
        ),
        (
            vec![7, 7, 7, 0xf_ffff_ffff_f000 | 7],
            0xf_ffff_ffff_fabc,
            Level::L1,
        ),
    ];
    for (entries, hpa, level) in cases {
        let found = outcome(plain(), &entries, GuestAccess::Read).expect("mapped");
        assert_eq!((found.hpa, found.level), (Hpa(hpa), level));
    }
    // An offset with bit 12 clear shows that PAT stays out of the address.
    for (entries, hpa) in [
        (vec![7, 7, PS | bit(12) | 7], 0x18_8abc),
        (vec![7, PS | bit(12) | 7], 0x1678_8abc),
    ] {
        let gpa = Gpa(GPA.0 & !0x1000);
        let found = walker(plain()).walk(&memory_with(gpa, &entries), ROOT, gpa, GuestAccess::Read);
        assert_eq!(found.map(|t| t.hpa), Ok(Hpa(hpa)));
    }
}

/// The values that an emulator of a processor was seen to report: an unmapped read and a write to a read-only page.
#[test]
fn error_codes_seen_elsewhere() {
    assert_eq!(
        code(outcome(plain(), &[7, 7, 7, 0], GuestAccess::Read)),
        0x1_0000_0004
    );
    assert_eq!(
        code(outcome(
            plain(),
            &[7, 7, 7, PAGE | P | US],
            GuestAccess::Write
        )),
        0x1_0000_0007
    );
}

/// 5.4.1, 5.6: R/W, U/S and NX of every level, the most restrictive counts. 15.25.5: all accesses are user accesses.
#[test]
fn permissions_are_the_most_restrictive_of_all_levels() {
    // Bits that one entry gets instead of P, RW, US; then whether read, write, fetch are allowed.
    let cases = [
        (P | RW | US, [true, true, true]),
        (P | US, [true, false, true]),
        (P | RW | US | NX, [true, true, false]),
        (P | US | NX, [true, false, false]),
        (P | RW, [false, false, false]),
        (P | RW | NX, [false, false, false]),
        (P, [false, false, false]),
    ];
    let accesses = [
        (GuestAccess::Read, 0),
        (GuestAccess::Write, bit(1)),
        (GuestAccess::Fetch, bit(4)),
    ];
    for level in 0..4 {
        for (bits, allowed) in cases {
            let mut entries = [7, 7, 7, PAGE | 7];
            entries[level] = entries[level] & !7 | bits;
            for ((access, kind), allowed) in accesses.into_iter().zip(allowed) {
                let result = outcome(plain(), &entries, access);
                if allowed {
                    assert_eq!(result.expect("allowed").hpa, Hpa(PAGE | 0xabc));
                } else {
                    assert_eq!(
                        code(result),
                        FINAL | P | kind,
                        "level {}, {bits:#x}, {access:?}",
                        4 - level
                    );
                }
            }
            assert_eq!(
                outcome(plain(), &entries, GuestAccess::UserFetch).is_ok(),
                allowed[2]
            );
        }
    }
    let found =
        outcome(plain(), &[7, 7 | NX, P | US, PAGE | 7], GuestAccess::Read).expect("readable");
    assert_eq!(found.permissions, Permissions::READ);
}

/// 5.4.1: with P clear all other bits are ignored; 15.25.6: bit 0 of the error code is then clear.
#[test]
fn not_present_ignores_all_other_bits() {
    for depth in 1..=4 {
        for junk in [0, NX, 0xfe, bit(63) | bit(51), !P] {
            let mut entries = vec![7; depth];
            entries[depth - 1] = junk;
            assert_eq!(
                code(outcome(plain(), &entries, GuestAccess::Write)),
                FINAL | bit(1),
                "{depth} {junk:#x}"
            );
        }
    }
}

/// 5.3.3 to 5.3.5, figures: must-be-zero bits of each kind of entry, one at a time, and that all others are not.
#[test]
fn reserved_bits_fault_and_no_others() {
    let config = NptConfig {
        physical_bits: 48,
        ..plain()
    };
    let beyond: Vec<u32> = (48..52).collect();
    // Entries down to the one in question, its must-be-zero bits, bits that make it another kind.
    let kinds: [Kind; 6] = [
        ("PML4E", vec![7], vec![7, 8], &[]),
        ("PDPE to a table", vec![7, 7], vec![], &[7]),
        ("PDE to a table", vec![7, 7, 7], vec![], &[7]),
        ("PDPE of a page", vec![7, PS | 7], (13..30).collect(), &[7]),
        (
            "PDE of a page",
            vec![7, 7, PS | 7],
            (13..21).collect(),
            &[7],
        ),
        ("PTE", vec![7, 7, 7, 7], vec![], &[]),
    ];
    for (name, entries, reserved, kind_bits) in kinds {
        for n in (3..64).filter(|n| !kind_bits.contains(n)) {
            let mut entries = entries.clone();
            *entries.last_mut().expect("not empty") |= bit(n);
            let expected = reserved.contains(&n) || beyond.contains(&n);
            let result = outcome(config, &entries, GuestAccess::Read);
            let faulted = result.is_err() && code(result) & bit(3) != 0;
            assert_eq!(faulted, expected, "{name}, bit {n}: {result:x?}");
            if faulted {
                assert_eq!(code(result), FINAL | P | bit(3));
            }
        }
    }
}

/// 5.6.1: without EFER.NXE bit 63 is reserved at every level, and the error code has no instruction-fetch bit.
#[test]
fn no_execute_needs_its_enable() {
    let config = NptConfig {
        no_execute: false,
        ..plain()
    };
    for level in 0..4 {
        let mut entries = [7, 7, 7, PAGE | 7];
        entries[level] |= NX;
        assert_eq!(
            code(outcome(config, &entries, GuestAccess::Read)),
            FINAL | P | bit(3)
        );
        assert_eq!(
            code(outcome(plain(), &entries, GuestAccess::Fetch)),
            FINAL | P | bit(4)
        );
    }
    assert_eq!(
        code(outcome(config, &[7, 7, 7, 0], GuestAccess::Fetch)),
        FINAL
    );
    assert_eq!(
        code(outcome(plain(), &[7, 7, 7, 0], GuestAccess::Fetch)),
        FINAL | bit(4)
    );
    assert_eq!(
        code(outcome(plain(), &[7, 7, 7, 0], GuestAccess::UserFetch)),
        FINAL | bit(4)
    );
}

/// CPUID 8000_0001h EDX bit 26: without it the page-size bit of a PDPE is reserved.
#[test]
fn huge_pages_need_support() {
    let config = NptConfig {
        pages_1g: false,
        ..plain()
    };
    assert_eq!(
        code(outcome(config, &[7, PS | 7], GuestAccess::Read)),
        FINAL | P | bit(3)
    );
    assert!(outcome(config, &[7, 7, PS | 7], GuestAccess::Read).is_ok());
}

/// 7.8.4, 5.4.1: PAT is bit 7 of a PTE, bit 12 of a large page; with PCD (4) and PWT (3) it numbers the type.
#[test]
fn memory_type_is_an_index_into_the_pat() {
    for index in 0..8u64 {
        let low = (index & 1) << 3 | (index >> 1 & 1) << 4;
        let pat = index >> 2;
        for entries in [
            vec![7, 7, 7, PAGE | low | pat << 7 | 7],
            vec![7, 7, low | pat << 12 | PS | 7],
            vec![7, low | pat << 12 | PS | 7],
        ] {
            let found = outcome(plain(), &entries, GuestAccess::Read).expect("mapped");
            assert_eq!(
                found.memory_type,
                LeafMemoryType::Npt {
                    pat_index: index as u8
                }
            );
        }
    }
}

/// A missing or malformed entry further down wins over a permission that an upper entry denies.
#[test]
fn permissions_are_judged_last() {
    let upper_read_only = P | US;
    assert_eq!(
        code(outcome(
            plain(),
            &[7, upper_read_only, 7, 0],
            GuestAccess::Write
        )),
        FINAL | bit(1)
    );
    let malformed = bit(13) | PS | 7;
    assert_eq!(
        code(outcome(
            plain(),
            &[7, upper_read_only, malformed],
            GuestAccess::Write
        )),
        FINAL | P | bit(1) | bit(3)
    );
    assert_eq!(
        code(outcome(plain(), &[7 | bit(8), 0], GuestAccess::Read)),
        FINAL | P | bit(3)
    );
}

/// 5.4.1: accessed in every entry used, dirty in the leaf on a write, nothing else, never cleared.
#[test]
fn accessed_and_dirty_flags() {
    for entries in [vec![7, 7, 7, PAGE | 7], vec![7, 7, PS | 7], vec![7, PS | 7]] {
        let leaf = Level::from_number(5 - entries.len() as u8).expect("a level");
        for (access, flags) in [
            (GuestAccess::Read, A),
            (GuestAccess::Fetch, A),
            (GuestAccess::Write, A | D),
        ] {
            let memory = memory_with(GPA, &entries);
            let before = memory_with(GPA, &entries);
            let found = walk(plain(), &memory, access).expect("allowed");
            assert_eq!((found.accessed, found.dirty), (true, flags & D != 0));
            for level in Level::ALL
                .into_iter()
                .filter(|&l| l >= leaf && l <= Level::L4)
            {
                let change = entry(&memory, level, GPA) ^ entry(&before, level, GPA);
                assert_eq!(
                    change,
                    if level == leaf { flags } else { A },
                    "{level} {access:?}"
                );
            }
            let exchanges = memory.exchanges.get();
            assert_eq!(
                walk(plain(), &memory, GuestAccess::Read)
                    .expect("allowed")
                    .dirty,
                flags & D != 0
            );
            assert_eq!(memory.exchanges.get(), exchanges);
        }
    }
}

/// A refused access leaves the leaf alone.
#[test]
fn a_refused_access_does_not_mark_the_leaf() {
    for (leaf, access) in [
        (PAGE | P | US, GuestAccess::Write),
        (PAGE | P | RW, GuestAccess::Read),
        (PAGE | 7 | NX, GuestAccess::Fetch),
        (0, GuestAccess::Read),
    ] {
        let memory = memory_with(GPA, &[7, 7, 7, leaf]);
        assert!(walk(plain(), &memory, access).is_err());
        assert_eq!(entry(&memory, Level::L1, GPA), leaf);
    }
}

/// 15.25.5: table walks for guest page tables are always treated as user writes; 15.25.6: bit 33 instead of 32, and
/// bit 1, even if the walk serves a fetch.
#[test]
fn guest_table_walks_are_writes() {
    for access in [
        GuestAccess::TableRead,
        GuestAccess::TableWrite,
        GuestAccess::PdpteLoad,
    ] {
        let memory = memory_with(GPA, &[7, 7, 7, PAGE | 7 | NX]);
        assert!(walk(plain(), &memory, access).expect("writable").dirty);
        assert_eq!(entry(&memory, Level::L1, GPA) & (A | D), A | D);
        assert_eq!(
            code(outcome(plain(), &[7, 7, 7, PAGE | P | US], access)),
            TABLE | P | bit(1)
        );
        assert_eq!(
            code(outcome(plain(), &[7, 7, 7, 0], access)),
            TABLE | bit(1)
        );
        assert_eq!(
            code(outcome(plain(), &[7, 7, 7, PAGE | P | RW], access)),
            TABLE | P | bit(1)
        );
    }
}

/// 5.3.3: with CR4.LA57 the walk starts with bits 56:48; a PML5E has the must-be-zero bits of a PML4E.
#[test]
fn five_levels() {
    let config = NptConfig {
        root_level: Level::L5,
        ..plain()
    };
    let gpa = Gpa(0x000f_1234_5678_9abc);
    let memory = Memory::new();
    chain(&memory, Level::L5, gpa, &[7, 7, 7, 7, PAGE | 7]);
    let found = walker(config)
        .walk(&memory, ROOT, gpa, GuestAccess::Read)
        .expect("mapped");
    assert_eq!((found.hpa, found.level), (Hpa(PAGE | 0xabc), Level::L1));
    for (entries, reserved) in [
        ([7 | bit(7), 7], 0x9),
        ([7 | bit(8), 7], 0x9),
        ([7 | bit(9), 0], 0),
    ] {
        let memory = Memory::new();
        chain(&memory, Level::L5, gpa, &entries);
        let result = walker(config).walk(&memory, ROOT, gpa, GuestAccess::Read);
        let expected = NptFault {
            exit_info_1: FINAL | reserved,
            exit_info_2: gpa,
        };
        assert_eq!(result, Err(WalkError::Fault(expected)), "{entries:x?}");
    }
}

/// No level looks at bits above 47 (or 51): reported as a missing entry.
#[test]
fn addresses_out_of_reach_fault() {
    let memory = memory_with(Gpa(0), &[7, 7, 7, PAGE | 7]);
    for gpa in [1 << 48, 1 << 52, 1 << 57, u64::MAX] {
        let result = walker(plain()).walk(&memory, ROOT, Gpa(gpa), GuestAccess::Read);
        assert_eq!(
            result,
            Err(WalkError::Fault(NptFault {
                exit_info_1: FINAL,
                exit_info_2: Gpa(gpa)
            }))
        );
    }
    let config = NptConfig {
        root_level: Level::L5,
        ..plain()
    };
    assert!(
        walker(config)
            .walk(&memory, ROOT, Gpa(1 << 52), GuestAccess::Read)
            .is_err()
    );
    assert_eq!(memory.loads.get(), 0);
}

#[test]
fn impossible_configurations_are_refused() {
    for bits in [0, 31, 53, u32::MAX] {
        let config = NptConfig {
            physical_bits: bits,
            ..plain()
        };
        assert_eq!(NptWalker::new(config), Err(ConfigError::PhysicalBits(bits)));
    }
    for bits in [32, 52] {
        let config = NptConfig {
            physical_bits: bits,
            ..plain()
        };
        assert!(NptWalker::new(config).is_ok(), "{bits} bits are possible");
    }
    let config = NptConfig {
        root_level: Level::L3,
        ..plain()
    };
    assert_eq!(
        NptWalker::new(config),
        Err(ConfigError::RootLevel(Level::L3))
    );
}

/// A log shows of a fault what the VMCB would: where, and the error code.
#[test]
fn a_fault_says_what_the_exit_says() {
    let error = outcome(plain(), &[P | RW | US, 0], GuestAccess::Write).expect_err("nothing there");
    let fault = error.fault().expect("the processor's own");
    assert_eq!(fault.gpa(), GPA);
    let said = fault.to_string();
    let code = format!("{:#x}", fault.exit_info_1);
    assert!(
        said.contains(&GPA.to_string()) && said.ends_with(&code),
        "{said}"
    );
    assert_eq!(*walker(plain()).config(), plain());
}
