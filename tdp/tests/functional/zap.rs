//! Sweeps that take translations away, and what they leave to be flushed.

use crate::common::host::Memory;
use crate::common::processor::{Processor, Report};
use crate::common::rig::Rig;
use tdp::{
    Access, AddressSpaceId, Fault, FlushRequest, Gfn, GfnRange, Gpa, Level, Outcome, Perms, Pfn,
    Slot,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const BASE: u64 = 1 << 20;

fn rig_with<F: Processor>(level: Level) -> Rig<F> {
    let rig = Rig::new();
    let memory = Memory::new(Pfn(BASE), level);
    rig.mmu
        .slots()
        .insert(Slot::new(Gfn(0)..Gfn(1 << 18), memory))
        .expect("the first slot");
    rig
}

both_formats! {
    /// Leaves at the edges go, tables inside go, tables at the edges stay.
    fn a_zap_takes_leaves_and_whole_tables<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut vcpu = rig.vcpu();
        for gfn in [0, 511, 512, 1023, 1024, 1025] {
            let outcome = vcpu.fault(Fault::read(Gfn(gfn).address()));
            assert_eq!(outcome, Ok(Outcome::Fixed { level: Level::L1 }));
        }
        let pending = rig.mmu.zap(SPACE, Gfn(511)..Gfn(1025));
        assert!(!pending.is_empty());
        assert_eq!((pending.leaves(), pending.tables()), (4, 1));
        assert_eq!(rig.host().take_flushes(), [], "not before it is asked for");
        pending.flush();
        let request = FlushRequest {
            as_id: SPACE,
            range: GfnRange { start: Gfn(511), end: Gfn(1025) },
            tables: true,
        };
        assert_eq!(rig.host().take_flushes(), [request]);
        for gfn in [511, 512, 1023, 1024] {
            rig.assert_absent(&mut vcpu, Gfn(gfn), Report::Absent);
        }
        for gfn in [0, 1025] {
            rig.assert_maps(&mut vcpu, Gfn(gfn), Pfn(BASE + gfn), Level::L1, Perms::RWX);
        }
        assert_eq!(rig.mmu.stats().tables, 4);
    }

    /// A large leaf of which the range has only a part goes as a whole.
    fn a_zap_takes_large_leaves_it_only_meets<F>() {
        for leaves_only in [false, true] {
            let rig = rig_with::<F>(Level::L2);
            let mut vcpu = rig.vcpu();
            for gfn in [0, 512, 1024] {
                let outcome = vcpu.fault(Fault::read(Gfn(gfn).address()));
                assert_eq!(outcome, Ok(Outcome::Fixed { level: Level::L2 }));
            }
            let range = Gfn(511)..Gfn(513);
            let pending = if leaves_only {
                rig.mmu.zap_leaves(SPACE, range)
            } else {
                rig.mmu.zap(SPACE, range)
            };
            assert_eq!((pending.leaves(), pending.tables()), (2, 0));
            pending.flush();
            let flushed = rig.host().take_flushes()[0];
            assert_eq!(flushed.range, GfnRange { start: Gfn(0), end: Gfn(1024) });
            assert!(!flushed.tables);
            rig.assert_absent(&mut vcpu, Gfn(511), Report::Absent);
            rig.assert_absent(&mut vcpu, Gfn(1023), Report::Absent);
            rig.assert_maps(&mut vcpu, Gfn(1024), Pfn(BASE + 1024), Level::L2, Perms::RWX);
        }
    }

    /// Without tables only leaves go.
    fn zapping_leaves_leaves_the_tables<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut vcpu = rig.vcpu();
        assert_eq!(vcpu.fault(Fault::read(Gpa(0))), Ok(Outcome::Fixed { level: Level::L1 }));
        let pending = rig.mmu.zap_leaves(SPACE, Gfn(0)..Gfn(u64::MAX));
        assert_eq!((pending.leaves(), pending.tables()), (1, 0));
        pending.flush();
        assert_eq!(rig.mmu.stats().tables, 3);
        assert_eq!(rig.mmu.stats().pages, [0; 3]);
        rig.assert_absent(&mut vcpu, Gfn(0), Report::Absent);
        // What was not there needs no flush.
        let pending = rig.mmu.zap_leaves(SPACE, Gfn(0)..Gfn(u64::MAX));
        assert!(pending.is_empty());
        pending.flush();
        assert_eq!(rig.host().take_flushes().len(), 1);
    }

    /// A sweep that is dropped is flushed all the same, and its tables come back.
    fn a_dropped_sweep_is_flushed<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gpa(0), Access::Write).is_ok());
        let before = rig.frames().allocated();
        drop(rig.mmu.zap(SPACE, Gfn(0)..Gfn(1 << 27)));
        assert_eq!(rig.host().take_flushes().len(), 1);
        assert_eq!(cpu.touch(Gpa(0), Access::Write).result, Err(Report::Absent));
        rig.mmu.synchronize();
        assert_eq!(before - rig.frames().allocated(), 3);
        assert_eq!(rig.mmu.stats().tables, 0);
    }

    /// Until it is flushed, a vCPU may use what it remembers: the flush is what ends that.
    fn the_flush_is_what_a_vcpu_notices<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gpa(0), Access::Write).is_ok());
        let pending = rig.mmu.zap(SPACE, Gfn(0)..Gfn(1));
        assert!(cpu.touch(Gpa(0), Access::Write).result.is_ok(), "its TLB forgets nothing");
        pending.flush();
        assert_eq!(cpu.touch(Gpa(0), Access::Write).result, Err(Report::Absent));
    }

    /// Ranges that are empty, reversed or past the end hurt nobody.
    fn odd_ranges_do_nothing<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut vcpu = rig.vcpu();
        assert_eq!(vcpu.fault(Fault::read(Gpa(0))), Ok(Outcome::Fixed { level: Level::L1 }));
        let limit = Level::L4.gfn_limit().0;
        for (start, end) in [(0, 0), (5, 0), (limit, limit + 512), (u64::MAX, u64::MAX)] {
            let range = GfnRange { start: Gfn(start), end: Gfn(end) };
            for leaves_only in [false, true] {
                let pending = if leaves_only {
                    rig.mmu.zap_leaves(SPACE, range)
                } else {
                    rig.mmu.zap(SPACE, range)
                };
                assert!(pending.is_empty());
                assert_eq!((pending.leaves(), pending.tables()), (0, 0));
            }
        }
        let pending = rig.mmu.zap(AddressSpaceId(7), Gfn(0)..Gfn(u64::MAX));
        assert!(pending.is_empty(), "there is no such space");
        drop(pending);
        rig.assert_maps(&mut vcpu, Gfn(0), Pfn(BASE), Level::L1, Perms::RWX);
    }

    /// A walk of more entries than it visits between two yields misses none and visits none twice.
    fn a_long_walk_visits_every_leaf_once<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut vcpu = rig.vcpu();
        let step = 37;
        let mut batch = vcpu.batch().expect("there are frames");
        for gfn in (0..40 * 512).step_by(step) {
            let outcome = batch.fault(Fault::read(Gfn(gfn).address()));
            assert_eq!(outcome, Ok(Outcome::Fixed { level: Level::L1 }));
        }
        drop(batch);
        let mut next = 0;
        rig.mmu.visit_leaves(SPACE, Gfn(0)..Gfn(1 << 18), |leaf| {
            assert_eq!(leaf.gfn, Gfn(next));
            next += step as u64;
        });
        assert_eq!(next, (40 * 512u64).next_multiple_of(step as u64));
        let pending = rig.mmu.zap_leaves(SPACE, Gfn(0)..Gfn(1 << 18));
        assert_eq!(pending.leaves(), next / step as u64);
        drop(pending);
        assert_eq!(rig.mmu.stats().pages, [0; 3]);
    }
}
