//! Each entry format with the processor that walks it.

use tdp::{Access, AdBits, Ept, Format, Level, Npt, Perms};
use tdp_arch::walker::{
    EptConfig, EptFault, EptWalker, GuestAccess, NptConfig, NptFault, NptWalker, Permissions,
    Walker,
};

/// How a processor is set up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProcessorSetup {
    pub(crate) root_level: Level,
    pub(crate) physical_bits: u32,
    pub(crate) ad_bits: AdBits,
    /// Mode-based execute control (EPT only).
    pub(crate) mode_based_execute: bool,
}

impl Default for ProcessorSetup {
    fn default() -> Self {
        Self {
            root_level: Level::L4,
            physical_bits: 46,
            ad_bits: AdBits::Processor,
            mode_based_execute: false,
        }
    }
}

/// What the processor says when an access does not translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Report {
    /// Nothing there.
    Absent,
    /// There is a leaf, and it does not permit the access.
    Denied,
    /// Misconfiguration or reserved bit.
    Malformed,
}

/// A format with its processor.
pub(crate) trait Processor: Format {
    type Walker: Walker<Fault: Send> + Copy + Send + 'static;

    fn walker(setup: ProcessorSetup) -> Self::Walker;

    /// What the exit handler of an embedder sees: the raw code that [`Format::fault_code`] reads, or `None` for an exit
    /// that has none.
    fn raw_code(fault: <Self::Walker as Walker>::Fault) -> Option<u64>;

    fn report(fault: <Self::Walker as Walker>::Fault) -> Report;

    /// What a leaf made for `perms` lets a guest do: what the format can express.
    fn expressed(perms: Perms) -> Perms;

    /// What the processor makes of a leaf for `perms` under tables that permit everything: what it allows, or how it
    /// refuses every access.
    fn seen(perms: Perms, mode_based_execute: bool) -> Result<Perms, Report>;

    /// Accessed and dirty bits of a new leaf, as `ad_bits` has them kept.
    fn new_flags(ad_bits: AdBits, accessed: bool, dirty: bool) -> (bool, bool);
}

impl Processor for Ept {
    type Walker = EptWalker;

    fn walker(setup: ProcessorSetup) -> EptWalker {
        EptWalker::new(EptConfig {
            root_level: setup.root_level,
            physical_bits: setup.physical_bits,
            accessed_dirty: setup.ad_bits == AdBits::Processor,
            mode_based_execute: setup.mode_based_execute,
            ..EptConfig::default()
        })
        .expect("a valid configuration")
    }

    fn raw_code(fault: EptFault) -> Option<u64> {
        match fault {
            EptFault::Violation(violation) => Some(violation.qualification),
            EptFault::Misconfiguration { .. } => None,
        }
    }

    fn report(fault: EptFault) -> Report {
        match fault {
            EptFault::Misconfiguration { .. } => Report::Malformed,
            EptFault::Violation(violation) if violation.qualification & 0b111_1000 == 0 => {
                Report::Absent
            }
            EptFault::Violation(_) => Report::Denied,
        }
    }

    fn expressed(perms: Perms) -> Perms {
        perms
    }

    fn seen(perms: Perms, mode_based_execute: bool) -> Result<Perms, Report> {
        // Without mode-based execute control one bit is for every fetch, and bit 10 means nothing.
        let user_fetch = if mode_based_execute {
            Perms::USER_EXEC
        } else {
            Perms::EXEC
        };
        let mut seen = perms.difference(Perms::USER_EXEC);
        if perms.contains(user_fetch) {
            seen |= Perms::USER_EXEC;
        }
        if seen.is_empty() {
            Err(Report::Absent)
        } else if seen.contains(Perms::WRITE) && !seen.contains(Perms::READ) {
            Err(Report::Malformed)
        } else {
            Ok(seen)
        }
    }

    fn new_flags(ad_bits: AdBits, accessed: bool, dirty: bool) -> (bool, bool) {
        match ad_bits {
            AdBits::Processor => (accessed, dirty),
            AdBits::Software => (false, false),
        }
    }
}

impl Processor for Npt {
    type Walker = NptWalker;

    fn walker(setup: ProcessorSetup) -> NptWalker {
        NptWalker::new(NptConfig {
            root_level: setup.root_level,
            physical_bits: setup.physical_bits,
            ..NptConfig::default()
        })
        .expect("a valid configuration")
    }

    fn raw_code(fault: NptFault) -> Option<u64> {
        Some(fault.exit_info_1)
    }

    fn report(fault: NptFault) -> Report {
        match fault.exit_info_1 & 0b1001 {
            0 => Report::Absent,
            1 => Report::Denied,
            _ => Report::Malformed,
        }
    }

    fn expressed(perms: Perms) -> Perms {
        let mut expressed = perms;
        if !perms.is_empty() {
            expressed |= Perms::READ;
        }
        if perms.intersects(Perms::EXEC | Perms::USER_EXEC) {
            expressed |= Perms::EXEC | Perms::USER_EXEC;
        }
        expressed
    }

    fn seen(perms: Perms, _mode_based_execute: bool) -> Result<Perms, Report> {
        if perms.is_empty() {
            Err(Report::Absent)
        } else {
            Ok(Self::expressed(perms))
        }
    }

    fn new_flags(ad_bits: AdBits, accessed: bool, dirty: bool) -> (bool, bool) {
        match ad_bits {
            AdBits::Processor => (accessed, dirty),
            // They cannot be turned off, so they are on from the start.
            AdBits::Software => (true, true),
        }
    }
}

/// The access of the guest that makes the MMU see `access`.
pub(crate) fn guest_access(access: Access) -> GuestAccess {
    match access {
        Access::Read => GuestAccess::Read,
        Access::Write => GuestAccess::Write,
        Access::Execute => GuestAccess::Fetch,
        Access::UserExecute => GuestAccess::UserFetch,
    }
}

/// The walker's permissions in the MMU's words.
pub(crate) fn perms(permissions: Permissions) -> Perms {
    Perms::from_bits_truncate(permissions.bits())
}
