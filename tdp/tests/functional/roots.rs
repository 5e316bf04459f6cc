//! Roots: made obsolete, taken down, loaded anew.

use crate::common::host::Memory;
use crate::common::processor::{Processor, Report};
use crate::common::rig::Rig;
use tdp::{Access, AddressSpaceId, Fault, Gfn, Gpa, Level, Outcome, Perms, Pfn, RetryReason, Slot};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const OTHER: AddressSpaceId = AddressSpaceId(1);
const BASE: u64 = 1 << 20;

fn rig_with<F: Processor>(level: Level) -> Rig<F> {
    let rig = Rig::new();
    for space in [SPACE, OTHER] {
        let slot = Slot::new(Gfn(0)..Gfn(1 << 18), Memory::new(Pfn(BASE), level));
        rig.mmu
            .slots()
            .insert(slot.in_space(space))
            .expect("the place is free");
    }
    rig
}

fn fixed() -> Result<Outcome, tdp::FaultError> {
    Ok(Outcome::Fixed { level: Level::L1 })
}

const OBSOLETE: Outcome = Outcome::Retry(RetryReason::RootObsolete);

both_formats! {
    /// An obsolete root takes no more faults; the vCPU loads another one, which is empty, and goes on.
    fn an_obsolete_root_is_loaded_anew<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gpa(0), Access::Write).is_ok());
        let old = cpu.root();
        let teardown = rig.mmu.invalidate_roots();
        assert_eq!(cpu.vcpu.fault(Fault::read(Gpa(0))), Ok(OBSOLETE));
        assert_eq!(cpu.vcpu.fault(Fault::read(Gpa(0x1000))), Ok(OBSOLETE));
        assert_eq!(rig.mmu.translate(SPACE, Gfn(0)), None, "there is no current root");
        let new = cpu.vcpu.load_root().expect("a frame for the root");
        assert_ne!(new.generation, old.generation);
        assert_ne!(new.hpa, old.hpa, "the old one is still in use");
        rig.assert_absent(&mut cpu.vcpu, Gfn(0), Report::Absent);
        assert!(cpu.run(Gpa(0), Access::Write).is_ok());
        rig.assert_maps(&mut cpu.vcpu, Gfn(0), Pfn(BASE), Level::L1, Perms::RWX);
        teardown.finish();
        rig.assert_maps(&mut cpu.vcpu, Gfn(0), Pfn(BASE), Level::L1, Perms::RWX);
        let stats = rig.mmu.stats();
        assert_eq!((stats.roots_made, stats.roots_invalidated), (2, 1));
        assert_eq!((stats.pages, stats.tables), ([1, 0, 0], 3));
    }

    /// A teardown flushes the whole space, gives the tables back, and the root with the last vCPU that leaves it.
    fn a_teardown_gives_everything_back<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut cpu = rig.processor(rig.vcpu());
        for gfn in [0, 512, 1 << 17] {
            assert!(cpu.run(Gfn(gfn).address(), Access::Write).is_ok());
        }
        let before = rig.frames().allocated();
        rig.mmu.invalidate_roots().finish();
        let flushed = rig.host().take_flushes();
        assert_eq!(flushed.len(), 1);
        assert!(flushed[0].tables && flushed[0].as_id == SPACE);
        assert_eq!(flushed[0].range.start, Gfn(0));
        assert_eq!(flushed[0].range.end, Level::L4.gfn_limit());
        // The vCPU enters once more with the root that it has, whose entries are sealed.
        assert_eq!(cpu.touch(Gpa(0), Access::Read).result, Err(Report::Absent));
        assert_eq!(cpu.vcpu.fault(Fault::read(Gpa(0))), Ok(OBSOLETE));
        rig.mmu.synchronize();
        assert_eq!(rig.mmu.stats().tables, 0);
        assert_eq!(rig.mmu.stats().pages, [0; 3]);
        assert_eq!(before - rig.frames().allocated(), 5, "three tables of pages, two above");
        let tables = rig.frames().allocated();
        cpu.vcpu.load_root().expect("a frame for the root");
        assert_eq!(rig.frames().allocated(), tables, "one root came, one went");
    }

    /// All spaces at once.
    fn all_spaces_become_obsolete_at_once<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut normal = rig.vcpu();
        let mut smm = rig.vcpu();
        smm.set_address_space(OTHER).expect("it exists");
        for vcpu in [&mut normal, &mut smm] {
            assert_eq!(vcpu.fault(Fault::read(Gpa(0))), fixed());
        }
        let teardown = rig.mmu.invalidate_roots();
        for vcpu in [&mut normal, &mut smm] {
            assert_eq!(vcpu.fault(Fault::read(Gpa(0))), Ok(OBSOLETE));
            vcpu.load_root().expect("a frame for the root");
            assert_eq!(vcpu.fault(Fault::read(Gpa(0))), fixed());
        }
        drop(teardown);
        assert_eq!(rig.mmu.stats().roots_invalidated, 2);
        assert_eq!(rig.mmu.stats().pages, [2, 0, 0]);
        // Nothing to invalidate: nothing to do.
        drop((normal, smm));
        rig.mmu.invalidate_roots().finish();
        rig.mmu.invalidate_roots().finish();
        assert_eq!(rig.mmu.stats().roots_invalidated, 4);
    }

    /// INV: after a sweep returned, no root maps the range, obsolete or not: a vCPU may still run on the old one.
    fn a_sweep_reaches_obsolete_roots<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gpa(0), Access::Write).is_ok());
        assert!(cpu.run(Gpa(0x1000), Access::Write).is_ok());
        let teardown = rig.mmu.invalidate_roots();
        let mut other = rig.vcpu();
        assert_eq!(other.fault(Fault::read(Gpa(0))), fixed());
        let pending = rig.mmu.zap_leaves(SPACE, Gfn(0)..Gfn(1));
        assert_eq!(pending.leaves(), 2);
        pending.flush();
        assert_eq!(cpu.touch(Gpa(0), Access::Read).result, Err(Report::Absent));
        assert!(cpu.touch(Gpa(0x1000), Access::Read).result.is_ok(), "it was not asked for");
        teardown.finish();
        assert_eq!(cpu.touch(Gpa(0x1000), Access::Read).result, Err(Report::Absent));
    }

    /// A vCPU that stays on an obsolete root for long holds up nobody.
    fn a_vcpu_may_be_late<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut late = rig.vcpu();
        assert_eq!(late.fault(Fault::read(Gpa(0))), fixed());
        let mut generations = Vec::new();
        for _ in 0..8 {
            let mut vcpu = rig.vcpu();
            generations.push(vcpu.load_root().expect("the root is there").generation);
            assert_eq!(vcpu.fault(Fault::read(Gpa(0x2000))).map(|_| ()), Ok(()));
            drop(vcpu);
            rig.mmu.invalidate_roots().finish();
        }
        assert!(generations.is_sorted_by(|a, b| a < b), "{generations:?}");
        rig.mmu.synchronize();
        assert_eq!(late.fault(Fault::read(Gpa(0))), Ok(OBSOLETE));
        late.load_root().expect("a frame for the root");
        assert_eq!(late.fault(Fault::read(Gpa(0))), fixed());
    }

    /// In a batch too.
    fn a_batch_sees_an_obsolete_root<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut vcpu = rig.vcpu();
        assert_eq!(vcpu.fault(Fault::read(Gpa(0))), fixed());
        let mut batch = vcpu.batch().expect("there are frames");
        let teardown = rig.mmu.invalidate_roots();
        let mapping = tdp::Mapping::memory(Pfn(BASE), Level::L1, Perms::RWX);
        assert_eq!(batch.fault(Fault::read(Gpa(0))), Ok(OBSOLETE));
        assert_eq!(batch.map(Gfn(0), mapping, Access::Read), Ok(OBSOLETE));
        drop(batch);
        assert_eq!(vcpu.map(Gfn(0), mapping, Access::Read), Ok(OBSOLETE));
        drop(teardown);
    }
}
