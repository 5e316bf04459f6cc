//! Properties of walks over arbitrary table contents, for both formats.

mod walker_support;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, RngSeed};
use tdp_arch::walker::{
    EptConfig, EptFault, EptWalker, GuestAccess, NptConfig, NptWalker, Permissions, ReadOnly,
    WalkError, Walker,
};
use tdp_arch::{Gpa, Hpa, Level};
use walker_support::Memory;

/// The same cases in every run.
fn config() -> Config {
    Config {
        cases: 1024,
        failure_persistence: None,
        rng_algorithm: RngAlgorithm::ChaCha,
        rng_seed: RngSeed::Fixed(0x7db_0001),
        ..Config::default()
    }
}

const FRAMES: u64 = 8;
const SLOTS: u64 = 3;

/// An entry: mostly one that allows everything and leads to one of the few frames (or just past them), sometimes one
/// with other permissions, a few odd bits or nothing but noise.
fn entries() -> impl Strategy<Value = u64> {
    let frame = 0..=FRAMES;
    prop_oneof![
        1 => any::<u64>(),
        14 => frame.clone().prop_map(|frame| frame << 12 | 7),
        4 => (frame.clone(), 0..8u64, any::<bool>()).prop_map(|(frame, low, top)| frame << 12 | low | u64::from(top) << 63),
        2 => (frame, 0..0x1000u64).prop_map(|(frame, low)| frame << 12 | low),
        // Large pages, of type write-back for EPT.
        4 => (0..1u64 << 22, 0..8u64).prop_map(|(frame, low)| frame << 30 | 0xb0 | low),
    ]
}

/// Memory of a few frames in which only the first few slots of each table are used, and an address that uses them.
fn scenes() -> impl Strategy<Value = (Vec<(u64, u64, u64)>, Gpa)> {
    let slots = prop::collection::vec(entries(), (FRAMES * SLOTS) as usize).prop_map(|entries| {
        (0..)
            .zip(entries)
            .map(|(n, entry)| (n / SLOTS, n % SLOTS, entry))
            .collect()
    });
    let gpa = (
        prop::collection::vec(0..SLOTS, 5),
        0..4096u64,
        prop::bool::weighted(0.02),
        any::<u64>(),
    )
        .prop_map(|(indices, offset, wild, noise)| {
            let reached = indices.iter().fold(0, |gpa, index| gpa << 9 | index);
            Gpa(if wild {
                noise
            } else {
                (reached & 0xff_ffff_ffff) << 12 | offset
            })
        });
    (slots, gpa)
}

fn memory_of(slots: &[(u64, u64, u64)]) -> Memory {
    let mut memory = Memory::new();
    memory.end = FRAMES << 12;
    for &(frame, slot, entry) in slots {
        memory.set(frame << 12 | slot << 3, entry);
    }
    memory
}

fn accesses() -> impl Strategy<Value = GuestAccess> {
    prop::sample::select(GuestAccess::ALL.as_slice())
}

fn ept_walkers() -> impl Strategy<Value = EptWalker> {
    (any::<[bool; 6]>(), 32..=52u32).prop_map(
        |([five, execute_only, pages_2m, pages_1g, flags, modes], bits)| {
            let config = EptConfig {
                root_level: if five { Level::L5 } else { Level::L4 },
                physical_bits: bits,
                execute_only,
                pages_2m: pages_2m || pages_1g,
                pages_1g,
                accessed_dirty: flags,
                mode_based_execute: modes,
            };
            EptWalker::new(config).expect("a valid configuration")
        },
    )
}

fn npt_walkers() -> impl Strategy<Value = NptWalker> {
    (any::<[bool; 3]>(), 32..=52u32).prop_map(|([five, no_execute, pages_1g], bits)| {
        let root_level = if five { Level::L5 } else { Level::L4 };
        let config = NptConfig {
            root_level,
            physical_bits: bits,
            no_execute,
            pages_1g,
        };
        NptWalker::new(config).expect("a valid configuration")
    })
}

/// What must hold of every walk. `flags` are the accessed and the dirty flag of the format.
fn check<W: Walker>(
    walker: &W,
    (accessed, dirty): (u64, u64),
    slots: &[(u64, u64, u64)],
    gpa: Gpa,
    access: GuestAccess,
) -> Result<(), TestCaseError> {
    let memory = memory_of(slots);
    let before = memory.snapshot();
    let root = Hpa(0);
    let dry = walker.walk(&ReadOnly(&memory), root, gpa, access);
    prop_assert_eq!(&memory.snapshot(), &before, "a read-only walk wrote");

    let mut passed = Vec::new();
    let result = walker.walk_on(&memory, walker.at_root(root), gpa, access, |cursor| {
        passed.push(cursor)
    });
    // The same entry can serve two levels of one walk, as table and as leaf; then flags set at the first show at the
    // second.
    let mut tables: Vec<_> = passed.iter().map(|c| c.table).collect();
    tables.push(root);
    tables.sort_unstable();
    let loops = tables.windows(2).any(|pair| pair[0] == pair[1]);
    if !loops {
        prop_assert_eq!(&dry, &result);
    }

    // Only flags were written, only set, and one entry per level at most.
    let after = memory.snapshot();
    let mut changed = 0;
    for (address, &value) in &after {
        let old = before.get(address).copied().unwrap_or(0);
        changed += usize::from(value != old);
        let set = value ^ old;
        prop_assert!(
            set & old == 0 && set & !(accessed | dirty) == 0,
            "{:#x} became {:#x}",
            old,
            value
        );
        if set != 0 {
            prop_assert!(walker.keeps_flags());
        }
        if set & dirty != 0 {
            prop_assert!(result.is_ok() && walker.needs(access).contains(Permissions::WRITE));
        }
    }
    prop_assert!(changed <= passed.len() + usize::from(result.is_ok()));

    for pair in passed.windows(2) {
        prop_assert_eq!(pair[0].level.below(), Some(pair[1].level));
        prop_assert!(
            pair[0].permissions.contains(pair[1].permissions),
            "permissions grew on the way"
        );
    }
    let Ok(found) = result else { return Ok(()) };
    prop_assert_eq!(
        passed.last().map_or(walker.root_level(), |c| c.level),
        found.level
    );
    let offset = (1u64 << (12 + 9 * (u32::from(found.level.number()) - 1))) - 1;
    prop_assert_eq!(found.hpa.0 & offset, gpa.0 & offset);
    prop_assert!(found.hpa.0 >> 52 == 0);
    prop_assert_eq!(found.accessed, walker.keeps_flags());
    if walker.keeps_flags() && walker.needs(access).contains(Permissions::WRITE) {
        prop_assert!(found.dirty);
    }

    // Again, nothing is left to do; and from every table on the way the rest of the walk is the same.
    prop_assert_eq!(walker.walk(&memory, root, gpa, access), Ok(found));
    for cursor in passed {
        prop_assert_eq!(
            walker.walk_on(&memory, cursor, gpa, access, |_| ()),
            Ok(found)
        );
    }
    prop_assert_eq!(&memory.snapshot(), &after);

    // The permissions that were reported are the ones that decide.
    for other in GuestAccess::ALL {
        let allowed = found.permissions.contains(walker.needs(other));
        prop_assert_eq!(
            walker.walk(&ReadOnly(&memory), root, gpa, other).is_ok(),
            allowed,
            "{:?}",
            other
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn ept_walks((slots, gpa) in scenes(), access in accesses(), walker in ept_walkers()) {
        check(&walker, (1 << 8, 1 << 9), &slots, gpa, access)?;
    }

    #[test]
    fn npt_walks((slots, gpa) in scenes(), access in accesses(), walker in npt_walkers()) {
        check(&walker, (1 << 5, 1 << 6), &slots, gpa, access)?;
    }

    /// Offsets and frames of every page size, for addresses all over the space.
    #[test]
    fn large_pages_keep_offsets(gpa in 0..1u64 << 48, frame in 0..1u64 << 22, level in 1..=3u8) {
        let level = Level::from_number(level).expect("a level");
        let offset = (1u64 << (12 + 9 * (u32::from(level.number()) - 1))) - 1;
        let base = frame << 30;
        let mut entries = vec![7; 5 - usize::from(level.number())];
        *entries.last_mut().expect("not empty") |= base | if level > Level::L1 { 0x80 } else { 0 };
        let memory = walker_support::memory_with(Gpa(gpa), &entries);
        let npt = NptWalker::new(NptConfig::default()).expect("a valid configuration");
        let ept = EptWalker::new(EptConfig { accessed_dirty: false, ..EptConfig::default() }).expect("a valid configuration");
        for hpa in [
            npt.walk(&ReadOnly(&memory), walker_support::ROOT, Gpa(gpa), GuestAccess::Write).map(|t| t.hpa).ok(),
            ept.walk(&memory, walker_support::ROOT, Gpa(gpa), GuestAccess::Write).map(|t| t.hpa).ok(),
        ] {
            prop_assert_eq!(hpa, Some(Hpa(base + (gpa & offset))));
        }
    }

    /// An exit qualification says of an access what the walk would say of others: bits 5:3 (and 6) are what is allowed.
    #[test]
    fn ept_qualifications_tell_what_is_allowed((slots, gpa) in scenes(), access in accesses(), walker in ept_walkers()) {
        let memory = memory_of(&slots);
        let fault = walker.walk(&memory, Hpa(0), gpa, access);
        if let Err(WalkError::Fault(EptFault::Violation(violation))) = fault {
            let q = violation.qualification;
            prop_assert_eq!(violation.gpa, gpa);
            prop_assert!(q & 7 != 0 && q >> 9 == 0);
            for (other, bit) in [(GuestAccess::PdpteLoad, 3), (GuestAccess::Write, 4), (GuestAccess::Fetch, 5)] {
                let allowed = walker.walk(&ReadOnly(&memory), Hpa(0), gpa, other).is_ok();
                prop_assert_eq!(allowed, q >> bit & 1 == 1, "{:?} {:#x}", other, q);
            }
        }
    }
}

/// The scenes are worth something: a fair part of them translates, and a fair part fails in each way.
#[test]
fn scenes_are_varied() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::new(config());
    let walker = EptWalker::new(EptConfig::default()).expect("a valid configuration");
    let (mut mapped, mut violated, mut misconfigured, mut aborted) = (0, 0, 0, 0);
    for _ in 0..2048 {
        let (slots, gpa) = scenes().new_tree(&mut runner).expect("a scene").current();
        match walker.walk(&memory_of(&slots), Hpa(0), gpa, GuestAccess::Read) {
            Ok(_) => mapped += 1,
            Err(WalkError::Fault(EptFault::Violation(_))) => violated += 1,
            Err(WalkError::Fault(EptFault::Misconfiguration { .. })) => misconfigured += 1,
            Err(WalkError::Abort(_)) => aborted += 1,
        }
    }
    println!(
        "mapped {mapped}, violations {violated}, misconfigurations {misconfigured}, aborted {aborted}"
    );
    assert!(
        mapped > 100 && violated > 100 && misconfigured > 100,
        "{mapped} {violated} {misconfigured} {aborted}"
    );
}
