//! What the encoders write is what the processor reads: every kind of entry of both formats, walked by the reference
//! walker, which shares no constant with them.

mod machine;
#[path = "../walker_support/mod.rs"]
mod walker_support;

use machine::{
    Machine, Report, Scene, Setup, accesses, place, report, scenes, seen, setups, tree, walk,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, RngSeed};
use tdp_arch::walker::{GuestAccess, Permissions, Translation, WalkError, Walker};
use tdp_arch::{
    Access, AdBits, Decoded, Ept, Format, Gfn, Gpa, Hpa, LeafAttrs, Level, MMIO_GENERATION_BITS,
    Npt, Perms, Pfn, Spte,
};
use walker_support::{Memory, ROOT, table_of};

/// The same cases in every run.
fn config() -> Config {
    Config {
        cases: 512,
        failure_persistence: None,
        rng_algorithm: RngAlgorithm::ChaCha,
        rng_seed: RngSeed::Fixed(0x7db_0002),
        ..Config::default()
    }
}

/// A leaf translates to its frame with its permissions and type; the processor sets the flags it keeps, and writes
/// nothing else. What it refuses, it refuses because of the permissions.
fn a_leaf_translates<F: Machine>(scene: Scene, access: GuestAccess) -> Result<(), TestCaseError> {
    let (setup, level, pfn, attrs, gpa) = scene;
    let leaf = F::leaf(pfn, level, attrs);
    let memory = tree::<F>(setup.root_level, gpa, level, leaf);
    let before = memory.snapshot();
    let walked = walk::<F>(setup, &memory, gpa, access);
    let at = place(setup.root_level, gpa, level);
    let Some(seen) = seen::<F>(setup, attrs.perms) else {
        prop_assert_eq!(report::<F>(walked), Report::Absent);
        prop_assert_eq!(memory.snapshot(), before);
        return Ok(());
    };
    let needs = F::walker(setup).needs(access);
    if !seen.contains(needs) {
        prop_assert_eq!(report::<F>(walked), Report::Denied);
        prop_assert_eq!(memory.snapshot(), before);
        return Ok(());
    }
    let found = walked.expect("it is permitted");
    let offset = gpa.0 & (level.bytes() - 1);
    prop_assert_eq!(found.hpa, Hpa(pfn.address().0 + offset));
    prop_assert_eq!(found.level, level);
    prop_assert_eq!(found.permissions, seen);
    prop_assert_eq!(found.memory_type, F::memory_type(attrs));
    let write = needs.contains(Permissions::WRITE);
    let mut expected = before;
    if setup.ad_bits == AdBits::Processor {
        let dirty = if write { F::DIRTY } else { 0 };
        expected.insert(at, leaf.0 | F::ACCESSED | dirty);
        prop_assert!(found.accessed && found.dirty == (write || attrs.dirty));
    }
    // Tables have their accessed flag from the start, and nothing is written where software keeps the flags.
    prop_assert_eq!(memory.snapshot(), expected);
    Ok(())
}

/// What the format says of its own leaf is what it was made of.
fn a_leaf_is_decoded<F: Machine>(scene: Scene) -> Result<(), TestCaseError> {
    let (_, level, pfn, attrs, _) = scene;
    let leaf = F::leaf(pfn, level, attrs);
    let perms = F::expressed(attrs.perms);
    prop_assert!(F::is_leaf(leaf, level) && F::is_mmu_present(leaf));
    prop_assert!(level == Level::L1 || !F::is_table(leaf));
    prop_assert_eq!(F::leaf_pfn(leaf, level), pfn);
    prop_assert_eq!(F::perms(leaf), perms);
    prop_assert_eq!(F::mmio_entry(leaf), None);
    let decoded = Decoded::Leaf {
        pfn,
        perms,
        access_tracked: perms.is_empty(),
    };
    prop_assert_eq!(F::decode(leaf, level), decoded);
    for access in [
        Access::Read,
        Access::Write,
        Access::Execute,
        Access::UserExecute,
    ] {
        prop_assert_eq!(F::allows(leaf, access), perms.contains(access.needs()));
    }
    prop_assert_eq!(leaf.0 & F::HOST_WRITABLE != 0, attrs.host_writable);
    prop_assert_eq!(leaf.0 & F::MMU_WRITABLE != 0, attrs.mmu_writable);
    prop_assert_eq!(
        leaf.0 & F::AD_SOFTWARE != 0,
        attrs.ad_bits == AdBits::Software
    );
    prop_assert_eq!(leaf.0 & F::WRITABLE != 0, perms.contains(Perms::WRITE));
    prop_assert_eq!(leaf.0 & F::NX_SPLIT, 0);
    if !perms.is_empty() {
        let fetched = LeafAttrs {
            perms: attrs.perms | Perms::EXEC | Perms::USER_EXEC,
            ..attrs
        };
        prop_assert_eq!(F::permit_fetch(leaf), F::leaf(pfn, level, fetched));
    }
    Ok(())
}

/// A leaf that is made once and then moved to its frame is one that was made there.
fn a_leaf_can_be_moved<F: Machine>(scene: Scene) -> Result<(), TestCaseError> {
    let (_, level, pfn, attrs, _) = scene;
    let made = F::leaf(Pfn(0), level, attrs);
    prop_assert_eq!(F::with_pfn(made, pfn), F::leaf(pfn, level, attrs));
    prop_assert_eq!(F::with_pfn(made, Pfn(0)), made);
    Ok(())
}

/// Software bits are nothing to the processor, in leaves and in tables.
fn software_bits_mean_nothing<F: Machine>(
    scene: Scene,
    access: GuestAccess,
    bits: u8,
) -> Result<(), TestCaseError> {
    let (setup, level, pfn, attrs, gpa) = scene;
    let software = [
        F::HOST_WRITABLE,
        F::MMU_WRITABLE,
        F::AD_SOFTWARE,
        F::NX_SPLIT,
        F::MMU_PRESENT,
    ];
    let chosen = software
        .iter()
        .enumerate()
        .filter(|(n, _)| bits >> n & 1 != 0);
    let flip = chosen.fold(0, |flip, (_, bit)| flip | bit);
    let memory = tree::<F>(setup.root_level, gpa, level, F::leaf(pfn, level, attrs));
    let flipped = tree::<F>(setup.root_level, gpa, level, F::leaf(pfn, level, attrs));
    for (hpa, word) in flipped.snapshot() {
        flipped.set(hpa, word ^ flip);
    }
    prop_assert_eq!(
        walk::<F>(setup, &memory, gpa, access),
        walk::<F>(setup, &flipped, gpa, access)
    );
    Ok(())
}

/// An access-tracked leaf is not there for the processor; restored it is what it was, but not writable.
fn an_access_tracked_leaf_faults<F: Machine>(
    scene: Scene,
    access: GuestAccess,
) -> Result<(), TestCaseError> {
    let (setup, level, pfn, attrs, gpa) = scene;
    prop_assume!(!attrs.perms.is_empty());
    let leaf = F::leaf(pfn, level, attrs);
    let tracked = F::access_track(leaf);
    let memory = tree::<F>(setup.root_level, gpa, level, tracked);
    let walked = walk::<F>(setup, &memory, gpa, access);
    prop_assert_eq!(report::<F>(walked), Report::Absent);
    prop_assert_eq!(memory.get(place(setup.root_level, gpa, level)), tracked.0);
    prop_assert!(F::is_access_tracked(tracked) && F::is_leaf(tracked, level));
    prop_assert_eq!(F::perms(tracked), Perms::empty());
    let perms = F::expressed(attrs.perms).difference(Perms::WRITE);
    let decoded = Decoded::Leaf {
        pfn,
        perms,
        access_tracked: true,
    };
    prop_assert_eq!(F::decode(tracked, level), decoded);
    let restored = F::restore_access_tracked(tracked);
    prop_assert_eq!(restored, Spte(leaf.0 & !F::WRITABLE));
    prop_assert_eq!(F::access_track(restored), tracked);
    Ok(())
}

/// The 512 parts of a large leaf translate exactly as it does, and know the same.
fn parts_translate_like_the_whole<F: Machine>(
    scene: Scene,
    access: GuestAccess,
    tracked: bool,
) -> Result<(), TestCaseError> {
    let (setup, level, pfn, attrs, gpa) = scene;
    let Some(below) = level.below() else {
        return Ok(());
    };
    let mut whole = F::leaf(pfn, level, attrs);
    if tracked {
        whole = F::access_track(whole);
    }
    let start = gpa.0 & !(level.bytes() - 1);
    let table = table_of(setup.root_level, below);
    for index in 0..512 {
        let gpa = Gpa(start + index * below.bytes() + gpa.0 % below.bytes());
        let large = tree::<F>(setup.root_level, gpa, level, whole);
        let small = tree::<F>(setup.root_level, gpa, level, F::table(Pfn(table >> 12)));
        let part = F::split_child(whole, level, index as usize);
        small.set(place(setup.root_level, gpa, below), part.0);
        let by_large = walk::<F>(setup, &large, gpa, access);
        let by_small = walk::<F>(setup, &small, gpa, access);
        let expected = by_large.map(|found| Translation {
            level: below,
            ..found
        });
        prop_assert_eq!(by_small, expected, "part {}", index);
        // What the processor noted in the one is what it noted in the other.
        let noted = |memory: &Memory, level| {
            memory.get(place(setup.root_level, gpa, level)) & (F::ACCESSED | F::DIRTY)
        };
        prop_assert_eq!(noted(&small, below), noted(&large, level));
        prop_assert!(F::is_leaf(part, below));
        if !tracked {
            let frame = Pfn(pfn.0 + index * below.pages());
            prop_assert_eq!(
                part,
                F::leaf(frame, below, attrs),
                "as if made for its place"
            );
        }
        prop_assert_eq!(F::is_access_tracked(part), F::is_access_tracked(whole));
        let software = F::HOST_WRITABLE | F::MMU_WRITABLE | F::AD_SOFTWARE;
        prop_assert_eq!(part.0 & software, whole.0 & software);
        let perms = |spte, level| match F::decode(spte, level) {
            Decoded::Leaf { perms, .. } => Some(perms),
            _ => None,
        };
        prop_assert_eq!(perms(part, below), perms(whole, level));
    }
    Ok(())
}

/// Entries that lead nowhere: nothing there, and only the host is told.
fn patterns_are_absent<F: Machine>(
    setup: Setup,
    gpa: Gpa,
    access: GuestAccess,
) -> Result<(), TestCaseError> {
    for (pattern, decoded) in [
        (F::EMPTY, Decoded::Empty),
        (F::FROZEN, Decoded::Frozen),
        (F::SEALED, Decoded::Sealed),
    ] {
        for level in Level::ALL
            .into_iter()
            .filter(|&level| level <= setup.root_level)
        {
            let memory = tree::<F>(setup.root_level, gpa, level, pattern);
            let walked = walk::<F>(setup, &memory, gpa, access);
            let fault = walked.expect_err("nothing is there").fault();
            let fault = fault.expect("an ordinary fault");
            prop_assert_eq!(
                F::report(fault),
                Report::Absent,
                "{:?} of {}",
                decoded,
                level
            );
            prop_assert!(!F::is_convertible(fault), "{:?}", decoded);
            prop_assert!(!F::fault_code(F::raw(fault)).present);
            prop_assert_eq!(memory.get(place(setup.root_level, gpa, level)), pattern.0);
            prop_assert_eq!(F::decode(pattern, level), decoded);
            prop_assert!(!F::is_mmu_present(pattern) && !F::is_leaf(pattern, level));
        }
        prop_assert_eq!(F::mmio_entry(pattern), None);
    }
    Ok(())
}

/// A word that comes near one of those, and that nobody writes, is told apart from them: an audit has to see it.
fn a_stray_word_is_none_of_them<F: Machine>(flipped: u32) -> Result<(), TestCaseError> {
    for pattern in [F::FROZEN, F::SEALED] {
        let stray = Spte(pattern.0 ^ (1 << flipped));
        if F::is_mmu_present(stray) || F::mmio_entry(stray).is_some() {
            continue;
        }
        for level in Level::ALL {
            prop_assert_eq!(F::decode(stray, level), Decoded::Unknown, "{:?}", stray);
        }
    }
    Ok(())
}

/// An MMIO entry exits as malformed whatever the access, and remembers frame and generation.
fn mmio_is_malformed<F: Machine>(
    setup: Setup,
    gfn: Gfn,
    generation: u64,
    gpa: Gpa,
    access: GuestAccess,
) -> Result<(), TestCaseError> {
    let Some(entry) = F::mmio(gfn, generation, setup.physical_bits) else {
        // 39 bits of frame number fit both formats on any processor with a reserved address bit.
        prop_assert!(gfn.0 >> 39 != 0 || setup.physical_bits > 51);
        return Ok(());
    };
    let memory = tree::<F>(setup.root_level, gpa, Level::L1, entry);
    let walked = walk::<F>(setup, &memory, gpa, access);
    let fault = walked.expect_err("malformed").fault();
    let fault = fault.expect("an ordinary fault");
    prop_assert_eq!(F::report(fault), Report::Malformed);
    // EPT has an exit of its own for it, without a code.
    if F::NAME == "npt" {
        let code = F::fault_code(F::raw(fault));
        prop_assert!(code.present && code.reserved);
    }
    prop_assert_eq!(memory.get(place(setup.root_level, gpa, Level::L1)), entry.0);
    let found = F::mmio_entry(entry).expect("it is one");
    prop_assert_eq!(found.gfn, gfn);
    prop_assert_eq!(
        u64::from(found.generation),
        generation & ((1 << MMIO_GENERATION_BITS) - 1)
    );
    prop_assert_eq!(F::decode(entry, Level::L1), Decoded::Mmio(found));
    prop_assert!(!F::is_mmu_present(entry));
    Ok(())
}

/// A table entry leads to its table and takes nothing away.
fn a_table_takes_nothing_away<F: Machine>(pfn: Pfn) -> Result<(), TestCaseError> {
    let table = F::table(pfn);
    for level in [Level::L2, Level::L3, Level::L4, Level::L5] {
        prop_assert_eq!(F::decode(table, level), Decoded::Table(pfn));
        prop_assert!(!F::is_leaf(table, level));
    }
    prop_assert!(F::is_table(table) && F::is_mmu_present(table));
    prop_assert_eq!(F::pfn(table), pfn);
    prop_assert_eq!(F::perms(table), Perms::all());
    prop_assert_eq!(F::mmio_entry(table), None);
    Ok(())
}

/// The register value that points to the root: the walk from it is the walk from the root.
fn the_root_pointer_points_to_the_root<F: Machine>(scene: Scene) -> Result<(), TestCaseError> {
    let (setup, level, pfn, attrs, gpa) = scene;
    let memory = tree::<F>(setup.root_level, gpa, level, F::leaf(pfn, level, attrs));
    let pointer = F::root_pointer(ROOT.pfn(), setup.root_level, setup.ad_bits);
    let walker = F::walker(setup);
    prop_assert_eq!(
        walker.walk(&memory, Hpa(pointer), gpa, GuestAccess::Read),
        walker.walk(&memory, ROOT, gpa, GuestAccess::Read)
    );
    let low = match F::NAME {
        // SDM 25.6.11: memory type 6, levels less one, accessed and dirty flags.
        "ept" => {
            let flags = u64::from(setup.ad_bits == AdBits::Processor);
            6 | u64::from(setup.root_level.number() - 1) << 3 | flags << 6
        }
        _ => 0,
    };
    prop_assert_eq!(pointer & 0xfff, low);
    Ok(())
}

/// A refused access is decoded as one that the leaf does not permit, so that resolving it changes something.
fn the_fault_code_says_what_was_refused<F: Machine>(
    scene: Scene,
    access: GuestAccess,
) -> Result<(), TestCaseError> {
    let (setup, level, pfn, attrs, gpa) = scene;
    let leaf = F::leaf(pfn, level, attrs);
    let memory = tree::<F>(setup.root_level, gpa, level, leaf);
    let Err(WalkError::Fault(fault)) = walk::<F>(setup, &memory, gpa, access) else {
        return Ok(());
    };
    let code = F::fault_code(F::raw(fault));
    prop_assert_eq!(code.present, F::report(fault) == Report::Denied);
    prop_assert!(!code.reserved);
    // Without a linear address there is no saying that it was a table; for EPT there is none then.
    let table =
        access.is_to_paging_structure() && (access != GuestAccess::PdpteLoad || F::NAME == "npt");
    prop_assert_eq!(code.guest_table_walk, table);
    prop_assert_eq!(code.access.is_execute(), access.is_fetch());
    let needs = F::walker(setup).needs(access);
    prop_assert_eq!(code.access.is_write(), needs.contains(Permissions::WRITE));
    if code.present {
        prop_assert!(
            !F::allows(leaf, code.access),
            "{:?} is permitted: {:?}",
            code.access,
            leaf
        );
    }
    Ok(())
}

macro_rules! properties {
    ($($(#[$doc:meta])* $name:ident($($arg:ident in $strategy:expr),*) = $check:ident;)*) => {
        mod ept {
            use super::*;
            proptest! {
                #![proptest_config(config())]
                $($(#[$doc])* #[test] fn $name($($arg in $strategy),*) { $check::<Ept>($($arg),*)?; })*
            }
        }
        mod npt {
            use super::*;
            proptest! {
                #![proptest_config(config())]
                $($(#[$doc])* #[test] fn $name($($arg in $strategy),*) { $check::<Npt>($($arg),*)?; })*
            }
        }
    };
}

properties! {
    leaf_translates(scene in scenes(), access in accesses()) = a_leaf_translates;
    leaf_is_decoded(scene in scenes()) = a_leaf_is_decoded;
    leaf_is_moved(scene in scenes()) = a_leaf_can_be_moved;
    software_bits(scene in scenes(), access in accesses(), bits in any::<u8>()) = software_bits_mean_nothing;
    access_tracked(scene in scenes(), access in accesses()) = an_access_tracked_leaf_faults;
    patterns(setup in setups(), gpa in (0..1u64 << 48).prop_map(Gpa), access in accesses()) = patterns_are_absent;
    stray_words(flipped in 0..64u32) = a_stray_word_is_none_of_them;
    mmio(
        setup in setups(),
        gfn in (0..1u64 << 41).prop_map(Gfn),
        generation in any::<u64>(),
        gpa in (0..1u64 << 48).prop_map(Gpa),
        access in accesses()
    ) = mmio_is_malformed;
    table(pfn in (0..1u64 << 40).prop_map(Pfn)) = a_table_takes_nothing_away;
    root_pointer(scene in scenes()) = the_root_pointer_points_to_the_root;
    fault_code(scene in scenes(), access in accesses()) = the_fault_code_says_what_was_refused;
}

/// What a format cannot express is what its processor takes for malformed, and nothing else.
#[test]
fn what_cannot_be_expressed_is_malformed() {
    fn check<F: Machine>() {
        let setup = Setup {
            root_level: Level::L4,
            physical_bits: 46,
            ad_bits: AdBits::Processor,
            mode_based_execute: true,
        };
        for perms in (1..16).map(Perms::from_bits_truncate) {
            let leaf = F::leaf(Pfn(5), Level::L1, LeafAttrs::memory(perms));
            let memory = tree::<F>(setup.root_level, Gpa(0), Level::L1, leaf);
            let walked = walk::<F>(setup, &memory, Gpa(0), GuestAccess::Read);
            let fault = walked.err().and_then(WalkError::fault);
            let malformed = fault.map(F::report) == Some(Report::Malformed);
            assert_eq!(F::can_express(perms), !malformed, "{perms:?}");
        }
    }
    check::<Ept>();
    check::<Npt>();
}

/// An MMIO entry can name every frame for which it has bits, and no other; that of NPT takes a bit that has to be reserved.
#[test]
fn mmio_entries_name_what_they_have_room_for() {
    fn last_is<F: Machine>(last: u64) {
        let entry = F::mmio(Gfn(last), 1, 51).expect("there is room");
        let found = F::mmio_entry(entry).expect("it is one");
        assert_eq!((found.gfn, found.generation), (Gfn(last), 1));
        assert_eq!(F::mmio(Gfn(last + 1), 1, 51), None);
    }
    last_is::<Ept>((1 << 40) - 1);
    last_is::<Npt>((1 << 39) - 1);
    assert!(Ept::mmio(Gfn(0), 1, 52).is_some());
    assert_eq!(Npt::mmio(Gfn(0), 1, 52), None);
}

/// Fewer cases: each is 512 walks of each kind.
fn few() -> Config {
    Config {
        cases: 48,
        ..config()
    }
}

proptest! {
    #![proptest_config(few())]

    #[test]
    fn ept_parts(scene in scenes(), access in accesses(), tracked in any::<bool>()) {
        parts_translate_like_the_whole::<Ept>(scene, access, tracked)?;
    }

    #[test]
    fn npt_parts(scene in scenes(), access in accesses(), tracked in any::<bool>()) {
        parts_translate_like_the_whole::<Npt>(scene, access, tracked)?;
    }
}

/// The encoder never sets the third bit of an NPT leaf's PAT index; of a leaf that has it, as another writer's may, the parts
/// keep it, where the size of the part has it (APM 5.4.1: bit 7 of a small leaf, bit 12 of a large one).
#[test]
fn parts_of_a_leaf_keep_its_whole_pat_index() {
    let whole = Npt::leaf(Pfn(0x4_0000), Level::L3, LeafAttrs::memory(Perms::RWX));
    let whole = Spte(whole.0 | 1 << 12);
    let large = Npt::split_child(whole, Level::L3, 3);
    assert_eq!(large.0 & (1 << 12 | 1 << 7), 1 << 12 | 1 << 7);
    assert_eq!(
        Npt::pfn(Spte(large.0 & !(1 << 12))),
        Pfn(0x4_0000 + 3 * 512)
    );
    let small = Npt::split_child(large, Level::L2, 4);
    assert_eq!(small.0 & (1 << 12 | 1 << 7), 1 << 7);
    assert_eq!(Npt::pfn(small), Pfn(0x4_0000 + 3 * 512 + 4));
    let plain = Npt::split_child(Spte(large.0 & !(1 << 12)), Level::L2, 4);
    assert_eq!(plain.0 & (1 << 12 | 1 << 7), 0);
}
