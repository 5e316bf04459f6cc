//! Short hands for tests of the software vCPU.

use tdp_arch::cpu::SoftwareVcpu;
use tdp_arch::walker::{
    EptConfig, EptWalker, GuestAccess, NptConfig, NptWalker, Translation, WalkError, Walker,
};
use tdp_arch::{Gpa, Level};

use super::{Memory, ROOT, entry_address, memory_with, table_of};

pub(crate) const GPA: Gpa = Gpa(0x1234_5678_9abc);
/// The next page, in the same table of level 1.
pub(crate) const NEXT: Gpa = Gpa(GPA.0 + 0x1000);
pub(crate) const PAGE: u64 = 0x7_6543_2000;
pub(crate) const OTHER: u64 = 0x5_5555_5000;
/// Where a second table goes.
pub(crate) const SPARE: u64 = 0x20_0000;
pub(crate) const WB: u64 = 6 << 3;
pub(crate) const A: u64 = 1 << 8;
pub(crate) const D: u64 = 1 << 9;
pub(crate) const PS: u64 = 1 << 7;

pub(crate) type Vcpu<W> = SoftwareVcpu<W, 16>;

pub(crate) fn ept() -> Vcpu<EptWalker> {
    Vcpu::new(
        EptWalker::new(EptConfig::default()).expect("a valid configuration"),
        ROOT,
    )
}

pub(crate) fn npt() -> Vcpu<NptWalker> {
    Vcpu::new(
        NptWalker::new(NptConfig::default()).expect("a valid configuration"),
        ROOT,
    )
}

pub(crate) fn mapped() -> Memory {
    memory_with(GPA, &[7, 7, 7, PAGE | WB | 7])
}

pub(crate) fn put(memory: &Memory, level: Level, gpa: Gpa, value: u64) {
    memory.set(entry_address(table_of(Level::L4, level), level, gpa), value);
}

pub(crate) fn read<W: Walker>(
    vcpu: &mut Vcpu<W>,
    memory: &Memory,
    gpa: Gpa,
) -> Result<Translation, WalkError<W::Fault>> {
    vcpu.access(memory, gpa, GuestAccess::Read)
}

/// Address that a read of `gpa` reaches; `None` if it faults.
pub(crate) fn reached<W: Walker>(vcpu: &mut Vcpu<W>, memory: &Memory, gpa: Gpa) -> Option<u64> {
    read(vcpu, memory, gpa).ok().map(|found| found.hpa.0)
}

pub(crate) fn write<W: Walker>(
    vcpu: &mut Vcpu<W>,
    memory: &Memory,
) -> Result<Translation, WalkError<W::Fault>> {
    vcpu.access(memory, GPA, GuestAccess::Write)
}
