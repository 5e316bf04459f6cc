//! The processors that replays run on: a format's page walker, and what its reports mean.

use super::step::{Code, Meets};
use tdp_arch::walker::{
    ConfigError, EptConfig, EptFault, EptWalker, GuestAccess, NptConfig, NptFault, NptWalker,
    Walker,
};
use tdp_arch::{Access, Ept, FaultCode, Format, Level, Npt};

/// Bits of physical address: as many as leave a reserved one, which MMIO entries of NPT need.
pub const PHYSICAL_BITS: u32 = 51;

/// A format with its processor.
pub trait Processor: Format {
    /// What walks its tables.
    type Walker: Walker<Fault = Self::Report>;
    /// What that reports.
    type Report: Copy;

    /// A processor that walks trees with a root of level `root`.
    ///
    /// # Errors
    ///
    /// If there are no such trees.
    fn walker(root: Level) -> Result<Self::Walker, ConfigError>;

    /// A report of a failed `access`, decoded as an embedder would.
    fn code_of(report: Self::Report, access: GuestAccess) -> FaultCode;

    /// Whether the report is the recorded one, bit for bit as far as both formats can say.
    fn is_reported(report: Self::Report, recorded: Code) -> bool;
}

impl Processor for Npt {
    type Walker = NptWalker;
    type Report = NptFault;

    fn walker(root: Level) -> Result<NptWalker, ConfigError> {
        NptWalker::new(NptConfig {
            root_level: root,
            physical_bits: PHYSICAL_BITS,
            ..NptConfig::default()
        })
    }

    fn code_of(report: NptFault, _access: GuestAccess) -> FaultCode {
        Self::fault_code(report.exit_info_1)
    }

    fn is_reported(report: NptFault, recorded: Code) -> bool {
        // The recorder's emulated processor leaves the present bit clear with a reserved bit, a real one sets it.
        let ignored = u64::from(recorded.is_reserved());
        (report.exit_info_1 ^ recorded.0) & !ignored == 0
    }
}

impl Processor for Ept {
    type Walker = EptWalker;
    type Report = EptFault;

    fn walker(root: Level) -> Result<EptWalker, ConfigError> {
        EptWalker::new(EptConfig {
            root_level: root,
            physical_bits: PHYSICAL_BITS,
            ..EptConfig::default()
        })
    }

    fn code_of(report: EptFault, access: GuestAccess) -> FaultCode {
        match report {
            EptFault::Violation(violation) => Self::fault_code(violation.qualification),
            // This exit has no qualification: the embedder knows no more than the address.
            EptFault::Misconfiguration { .. } => FaultCode {
                access: kind(access),
                present: true,
                reserved: true,
                guest_table_walk: access.is_to_paging_structure(),
            },
        }
    }

    fn is_reported(report: EptFault, recorded: Code) -> bool {
        let EptFault::Violation(violation) = report else {
            return recorded.is_reserved();
        };
        let code = Self::fault_code(violation.qualification);
        code.access.is_write() == recorded.is_write()
            && code.access.is_execute() == recorded.is_fetch()
            && code.present == recorded.is_present()
            && code.guest_table_walk == recorded.is_table_walk()
    }
}

/// What the library calls it.
fn kind(access: GuestAccess) -> Access {
    match access {
        GuestAccess::Write | GuestAccess::TableWrite => Access::Write,
        access if access.is_fetch() => Access::Execute,
        _ => Access::Read,
    }
}

impl Code {
    /// The access that was tried.
    pub fn guest_access(self) -> GuestAccess {
        match (self.is_table_walk(), self.is_write(), self.is_fetch()) {
            (true, true, _) => GuestAccess::TableWrite,
            (true, false, _) => GuestAccess::TableRead,
            (false, true, _) => GuestAccess::Write,
            (false, false, true) => GuestAccess::Fetch,
            (false, false, false) => GuestAccess::Read,
        }
    }

    /// The same for the library, for a fault that only the record has.
    pub fn access(self) -> Access {
        kind(self.guest_access())
    }
}

impl Meets {
    /// What a processor met that reported `code`.
    pub fn decoded(code: FaultCode) -> Self {
        match code {
            FaultCode { reserved: true, .. } => Self::Mmio,
            FaultCode { present: true, .. } => Self::Forbidden,
            _ => Self::Nothing,
        }
    }
}
