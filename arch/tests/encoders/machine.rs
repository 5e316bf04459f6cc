//! A format with its processor, trees of its entries, and random leaves in them.

use crate::walker_support::{Memory, ROOT, entry_address, table_of};
use proptest::prelude::*;
use std::fmt::Debug;
use tdp_arch::walker::{
    EptConfig, EptFault, EptWalker, GuestAccess, LeafMemoryType, NptConfig, NptFault, NptWalker,
    Permissions, Translation, WalkError, Walker,
};
use tdp_arch::{AdBits, Ept, Format, Gpa, LeafAttrs, Level, MemoryType, Npt, Perms, Pfn, Spte};

/// How a processor is set up, as far as it matters to an encoder.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) root_level: Level,
    pub(crate) physical_bits: u32,
    pub(crate) ad_bits: AdBits,
    pub(crate) mode_based_execute: bool,
}

/// What a processor says of an access that does not get through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Report {
    Absent,
    Denied,
    Malformed,
}

/// A format and its processor.
pub(crate) trait Machine: Format {
    type Walker: Walker<Fault = Self::Fault>;
    type Fault: Copy + Debug + PartialEq;

    fn walker(setup: Setup) -> Self::Walker;
    fn report(fault: Self::Fault) -> Report;
    /// The code that `fault_code` reads.
    fn raw(fault: Self::Fault) -> u64;
    /// Whether the guest may be told of the fault instead of the host.
    fn is_convertible(fault: Self::Fault) -> bool;
    /// What a leaf for `perms` permits, as far as the format can say it.
    fn expressed(perms: Perms) -> Perms;
    fn memory_type(attrs: LeafAttrs) -> LeafMemoryType;
}

impl Machine for Ept {
    type Walker = EptWalker;
    type Fault = EptFault;

    fn walker(setup: Setup) -> EptWalker {
        EptWalker::new(EptConfig {
            root_level: setup.root_level,
            physical_bits: setup.physical_bits,
            accessed_dirty: setup.ad_bits == AdBits::Processor,
            mode_based_execute: setup.mode_based_execute,
            ..EptConfig::default()
        })
        .expect("a valid configuration")
    }

    fn report(fault: EptFault) -> Report {
        match fault {
            EptFault::Misconfiguration { .. } => Report::Malformed,
            EptFault::Violation(v) if v.qualification & 0b111_1000 == 0 => Report::Absent,
            EptFault::Violation(_) => Report::Denied,
        }
    }

    fn raw(fault: EptFault) -> u64 {
        match fault {
            EptFault::Misconfiguration { .. } => 0,
            EptFault::Violation(violation) => violation.qualification,
        }
    }

    fn is_convertible(fault: EptFault) -> bool {
        matches!(fault, EptFault::Violation(violation) if violation.convertible)
    }

    fn expressed(perms: Perms) -> Perms {
        perms
    }

    fn memory_type(attrs: LeafAttrs) -> LeafMemoryType {
        LeafMemoryType::Ept {
            memory_type: attrs.memory_type as u8,
            ignore_pat: attrs.ignore_guest_pat,
        }
    }
}

impl Machine for Npt {
    type Walker = NptWalker;
    type Fault = NptFault;

    fn walker(setup: Setup) -> NptWalker {
        NptWalker::new(NptConfig {
            root_level: setup.root_level,
            physical_bits: setup.physical_bits,
            ..NptConfig::default()
        })
        .expect("a valid configuration")
    }

    fn report(fault: NptFault) -> Report {
        match fault.exit_info_1 & 0b1001 {
            0 => Report::Absent,
            1 => Report::Denied,
            _ => Report::Malformed,
        }
    }

    fn raw(fault: NptFault) -> u64 {
        fault.exit_info_1
    }

    fn is_convertible(_fault: NptFault) -> bool {
        false
    }

    fn expressed(perms: Perms) -> Perms {
        let fetches = Perms::EXEC | Perms::USER_EXEC;
        let mut expressed = perms;
        if !perms.is_empty() {
            expressed |= Perms::READ;
        }
        if perms.intersects(fetches) {
            expressed |= fetches;
        }
        expressed
    }

    fn memory_type(attrs: LeafAttrs) -> LeafMemoryType {
        LeafMemoryType::Npt {
            // The PAT after reset: 0 write back, 1 write through, 3 uncacheable.
            pat_index: match attrs.memory_type {
                MemoryType::WriteBack => 0,
                MemoryType::WriteThrough => 1,
                _ => 3,
            },
        }
    }
}

pub(crate) type Walked<F> = Result<Translation, WalkError<<F as Machine>::Fault>>;

/// A tree whose tables are the format's own, with `entry` as the entry of `level` on the way to `gpa`.
pub(crate) fn tree<F: Machine>(root_level: Level, gpa: Gpa, level: Level, entry: Spte) -> Memory {
    let memory = Memory::new();
    let mut at = root_level;
    while let Some(below) = at.below().filter(|_| at > level) {
        let table = F::table(Pfn(table_of(root_level, below) >> 12));
        memory.set(entry_address(table_of(root_level, at), at, gpa), table.0);
        at = below;
    }
    memory.set(place(root_level, gpa, level), entry.0);
    memory
}

pub(crate) fn place(root_level: Level, gpa: Gpa, level: Level) -> u64 {
    entry_address(table_of(root_level, level), level, gpa)
}

pub(crate) fn walk<F: Machine>(
    setup: Setup,
    memory: &Memory,
    gpa: Gpa,
    access: GuestAccess,
) -> Walked<F> {
    F::walker(setup).walk(memory, ROOT, gpa, access)
}

pub(crate) fn report<F: Machine>(walked: Walked<F>) -> Report {
    match walked {
        Err(WalkError::Fault(fault)) => F::report(fault),
        other => panic!("not a fault: {other:x?}"),
    }
}

pub(crate) fn setups() -> impl Strategy<Value = Setup> {
    let levels = prop_oneof![Just(Level::L4), Just(Level::L5)];
    let ad_bits = prop_oneof![Just(AdBits::Processor), Just(AdBits::Software)];
    (levels, 40u32..=51, ad_bits, any::<bool>()).prop_map(
        |(root_level, physical_bits, ad_bits, mode_based_execute)| Setup {
            root_level,
            physical_bits,
            ad_bits,
            mode_based_execute,
        },
    )
}

pub(crate) fn leaf_levels() -> impl Strategy<Value = Level> {
    prop_oneof![Just(Level::L1), Just(Level::L2), Just(Level::L3)]
}

/// Permissions that make sense in both formats: readable, or to be fetched only.
pub(crate) fn perms() -> impl Strategy<Value = Perms> {
    (0u8..16).prop_map(|bits| {
        let perms = Perms::from_bits_truncate(bits);
        if perms.contains(Perms::WRITE) {
            perms | Perms::READ
        } else {
            perms
        }
    })
}

pub(crate) fn attrs(ad_bits: AdBits) -> impl Strategy<Value = LeafAttrs> {
    let types = prop_oneof![
        Just(MemoryType::Uncacheable),
        Just(MemoryType::WriteCombining),
        Just(MemoryType::WriteThrough),
        Just(MemoryType::WriteProtected),
        Just(MemoryType::WriteBack),
    ];
    (perms(), types, any::<[bool; 5]>()).prop_map(move |(perms, memory_type, bits)| LeafAttrs {
        perms,
        memory_type,
        ignore_guest_pat: bits[0],
        ad_bits,
        accessed: bits[1],
        dirty: bits[2],
        host_writable: bits[3],
        mmu_writable: bits[4],
    })
}

/// A leaf somewhere: set-up, level, host frame, the rest, and an address that it maps.
pub(crate) type Scene = (Setup, Level, Pfn, LeafAttrs, Gpa);

pub(crate) fn scenes() -> impl Strategy<Value = Scene> {
    let numbers = (any::<u64>(), any::<u64>());
    (setups(), leaf_levels(), numbers).prop_flat_map(|(setup, level, (frame, address))| {
        let frames = 1u64 << (setup.physical_bits - 12);
        let pfn = Pfn((frame % frames) & !(level.pages() - 1));
        let width = if setup.root_level == Level::L4 {
            48
        } else {
            52
        };
        let gpa = Gpa(address % (1 << width));
        attrs(setup.ad_bits).prop_map(move |attrs| (setup, level, pfn, attrs, gpa))
    })
}

pub(crate) fn accesses() -> impl Strategy<Value = GuestAccess> {
    prop::sample::select(GuestAccess::ALL.to_vec())
}

/// What the processor makes of a leaf for `perms`: `None` if it is not present to it.
pub(crate) fn seen<F: Machine>(setup: Setup, perms: Perms) -> Option<Permissions> {
    let expressed = F::expressed(perms);
    let mut seen = Permissions::from_bits_truncate(expressed.bits());
    if F::NAME == "ept" && !setup.mode_based_execute {
        // One bit is for every fetch, and the other means nothing.
        let fetch = seen.contains(Permissions::EXEC);
        seen.set(Permissions::USER_EXEC, fetch);
    }
    (!seen.is_empty()).then_some(seen)
}
