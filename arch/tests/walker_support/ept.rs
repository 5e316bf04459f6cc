//! Short hands for tests of the EPT walker.

use tdp_arch::Gpa;
use tdp_arch::walker::{
    EptConfig, EptFault, EptViolation, EptWalker, GuestAccess, Translation, WalkError, Walker,
};

use super::{Memory, ROOT, memory_with};

pub(crate) const GPA: Gpa = Gpa(0x1234_5678_9abc);
pub(crate) const PAGE: u64 = 0x7_6543_2000;
/// Write-back in bits 5:3.
pub(crate) const WB: u64 = 6 << 3;
pub(crate) const A: u64 = 1 << 8;
pub(crate) const D: u64 = 1 << 9;

pub(crate) fn bit(n: u32) -> u64 {
    1 << n
}

pub(crate) fn plain() -> EptConfig {
    EptConfig {
        accessed_dirty: false,
        ..EptConfig::default()
    }
}

pub(crate) fn mode_based() -> EptConfig {
    EptConfig {
        mode_based_execute: true,
        ..plain()
    }
}

pub(crate) fn walker(config: EptConfig) -> EptWalker {
    EptWalker::new(config).expect("a valid configuration")
}

pub(crate) fn walk(
    config: EptConfig,
    memory: &Memory,
    access: GuestAccess,
) -> Result<Translation, WalkError<EptFault>> {
    walker(config).walk(memory, ROOT, GPA, access)
}

pub(crate) fn outcome(
    config: EptConfig,
    entries: &[u64],
    access: GuestAccess,
) -> Result<Translation, WalkError<EptFault>> {
    walk(config, &memory_with(GPA, entries), access)
}

pub(crate) fn violation(result: Result<Translation, WalkError<EptFault>>) -> EptViolation {
    match result {
        Err(WalkError::Fault(EptFault::Violation(violation))) => violation,
        other => panic!("not a violation: {other:x?}"),
    }
}

pub(crate) fn misconfigured(result: Result<Translation, WalkError<EptFault>>) -> bool {
    result == Err(WalkError::Fault(EptFault::Misconfiguration { gpa: GPA }))
}
