//! Which fields may share a cache line (INV: no-shared-write): what every fault reads lies on no line that a sweep, a
//! slot writer or another vCPU writes.

use crate::mmu::Shared;
use crate::software::SoftwareHost;
use crate::vcpu::Vcpu;
use core::ops::Range;
use memoffset::span_of;
use std::vec::Vec;
use tdp_arch::Ept;

/// Bytes that a processor fetches together: two lines of 64.
const LINE: usize = 128;

type S = Shared<Ept, SoftwareHost>;

fn lines(span: &Range<usize>) -> Range<usize> {
    span.start / LINE..span.end.div_ceil(LINE)
}

#[test]
fn faults_read_no_line_that_sweeps_write() {
    assert_eq!(align_of::<S>() % LINE, 0);
    let read = [
        ("host", span_of!(S, host)),
        ("meta", span_of!(S, meta)),
        ("max_leaf", span_of!(S, max_leaf)),
        ("physical_bits", span_of!(S, physical_bits)),
        ("mmio_caching", span_of!(S, mmio_caching)),
        ("nx", span_of!(S, nx)),
    ];
    let written = [
        ("roots", span_of!(S, roots)),
        ("domain", span_of!(S, domain)),
        ("shards", span_of!(S, shards)),
        ("nx_cursor", span_of!(S, nx_cursor)),
    ];
    let mut shared = Vec::new();
    for (reader, a) in &read {
        for (writer, b) in &written {
            let (a, b) = (lines(a), lines(b));
            if a.start < b.end && b.start < a.end {
                shared.push((*reader, *writer));
            }
        }
    }
    assert!(shared.is_empty(), "on one line: {shared:?}");
}

#[test]
fn two_vcpus_side_by_side_share_no_line() {
    assert_eq!(align_of::<Vcpu<Ept, SoftwareHost>>() % LINE, 0);
    assert_eq!(size_of::<Vcpu<Ept, SoftwareHost>>() % LINE, 0);
}

/// What the straight path of a fault reads of its vCPU, but for one remembered table, is in the first line. With events a
/// remembered table is larger and aligned to more, which leaves a gap before the memo.
#[cfg(not(feature = "tracing"))]
#[test]
fn a_fault_reads_one_line_of_its_vcpu() {
    use crate::vcpu::{Context, VcpuCore};
    use memoffset::offset_of;
    type Core = VcpuCore<Ept, SoftwareHost>;
    type Ctx = Context<Ept, SoftwareHost>;
    let core = offset_of!(Vcpu<Ept, SoftwareHost>, core);
    let ctx = core + offset_of!(Core, ctx);
    let last = span_of!(Ctx, host);
    assert!(ctx + last.end <= 64, "{last:?} from {ctx} on");
}
