//! Roots: made obsolete, taken down, loaded anew.

use crate::common::host::Memory;
use crate::common::processor::{Processor, Report};
use crate::common::rig::{Rig, RigSetup};
use std::time::{Duration, Instant};
use tdp::{
    Access, AdBits, AddressSpaceId, Fault, Gfn, Gpa, Level, MmuError, Outcome, Perms, Pfn,
    RetryReason, Slot, Vcpu,
};

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

    /// A teardown goes by pieces, between which everything goes on; each is flushed and given back.
    fn a_teardown_goes_by_pieces<F>() {
        let rig = Rig::<F>::new();
        let slot = Slot::new(Gfn(0)..Gfn(1 << 21), Memory::new(Pfn(BASE), Level::L1));
        rig.mmu.slots().insert(slot).expect("the first slot");
        let mut cpu = rig.processor(rig.vcpu());
        // Two pages of one gigabyte, one of the next, one of another, nothing between.
        for gfn in [0, 512, 1 << 18, 1 << 20] {
            assert!(cpu.run(Gfn(gfn).address(), Access::Write).is_ok());
        }
        let before = rig.frames().allocated();
        let mut teardown = rig.mmu.invalidate_roots();
        assert!(teardown.step());
        assert_eq!(rig.mmu.stats().pages, [2, 0, 0]);
        assert_eq!(rig.host().take_flushes().len(), 1);
        assert_eq!(cpu.touch(Gpa(0), Access::Read).result, Err(Report::Absent));
        assert!(cpu.touch(Gfn(1 << 20).address(), Access::Read).result.is_ok());
        rig.mmu.synchronize();
        assert_eq!(before - rig.frames().allocated(), 3);
        assert!(cpu.run(Gpa(0), Access::Write).is_ok(), "under a new root");
        assert!(teardown.step());
        assert_eq!(rig.mmu.stats().pages, [2, 0, 0]);
        assert!(teardown.step());
        assert_eq!(rig.mmu.stats().pages, [1, 0, 0]);
        assert!(!teardown.step(), "the root itself");
        assert!(!teardown.step(), "nothing more");
        rig.assert_maps(&mut cpu.vcpu, Gfn(0), Pfn(BASE), Level::L1, Perms::RWX);
        assert_eq!((rig.mmu.stats().pages, rig.mmu.stats().tables), ([1, 0, 0], 3));
    }

    /// Once all vCPUs have left, taking down flushes nothing.
    fn a_teardown_that_nobody_sees_flushes_nothing<F>() {
        for promised in [true, false] {
            let rig = rig_with::<F>(Level::L1);
            rig.host().script().reloads = promised;
            let mut cpu = rig.processor(rig.vcpu());
            assert!(cpu.run(Gpa(0), Access::Write).is_ok());
            let mut teardown = rig.mmu.invalidate_roots();
            assert_eq!(teardown.reload(), promised);
            teardown.finish();
            assert_eq!(rig.host().take_flushes().len(), usize::from(!promised));
            assert!(cpu.run(Gpa(0), Access::Write).is_ok());
        }
    }

    /// Making roots obsolete takes the same few instructions however much they map.
    fn invalidation_takes_constant_time<F>() {
        let fastest = |gibibytes: u64| {
            let rig = Rig::<F>::with(RigSetup { frames: 8192, ..RigSetup::default() });
            let slot = Slot::new(Gfn(0)..Gfn(1 << 28), Memory::new(Pfn(BASE), Level::L1));
            rig.mmu.slots().insert(slot).expect("the first slot");
            let mut vcpu = rig.vcpu();
            let mut fastest = Duration::MAX;
            for _ in 0..3 {
                vcpu.load_root().expect("a frame for the root");
                for gfn in (0..gibibytes).map(|n| Gfn(n << 18)) {
                    assert_eq!(vcpu.fault(Fault::write(gfn.address())), fixed());
                }
                let start = Instant::now();
                let teardown = rig.mmu.invalidate_roots();
                fastest = fastest.min(start.elapsed());
                teardown.finish();
                rig.mmu.synchronize();
            }
            fastest
        };
        // A pass over the tables of a sparse tebibyte reads a million entries: milliseconds.
        let (little, much) = (fastest(1), fastest(1024));
        assert!(much < Duration::from_micros(50), "{much:?}; a gibibyte: {little:?}");
    }

    /// An address space has a root for each kind of accessed and dirty bits. A vCPU asks for the one that its processor
    /// can walk, and each is aged and protected after its own kind.
    fn vcpus_with_and_without_accessed_bits<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut with = rig.vcpu();
        let mut without = rig.vcpu();
        assert_eq!((with.ad_bits(), without.ad_bits()), (AdBits::Processor, AdBits::Processor));
        let root = without.set_ad_bits(AdBits::Software).expect("a frame for the root");
        assert_eq!(without.ad_bits(), AdBits::Software);
        let kept = with.load_root().expect("the root is there");
        assert_ne!((root.hpa, root.generation), (kept.hpa, kept.generation));
        for vcpu in [&mut with, &mut without] {
            assert_eq!(vcpu.fault(Fault::write(Gpa(0))), fixed());
        }
        assert_eq!(rig.mmu.stats().pages, [2, 0, 0]);
        assert_eq!(rig.mmu.audit().pages, [2, 0, 0]);
        let leaf = |root| rig.entry(root, Gfn(0), Level::L1).expect("there is a table");
        assert_eq!(leaf(kept).0 & F::AD_SOFTWARE, 0);
        assert_ne!(leaf(root).0 & F::AD_SOFTWARE, 0);
        // Aging: a bit is cleared in the one, the permissions go in the other. Both are seen.
        assert!(rig.mmu.age(SPACE, Gfn(0)..Gfn(1)));
        assert_eq!(leaf(kept).0 & (F::ACCESSED | F::WRITABLE), F::WRITABLE);
        assert!(F::is_access_tracked(leaf(root)));
        assert!(!rig.mmu.test_age(SPACE, Gfn(0)..Gfn(1)));
        assert_eq!(without.fault(Fault::write(Gpa(0))), fixed());
        assert!(!F::is_access_tracked(leaf(root)));
        assert!(rig.mmu.test_age(SPACE, Gfn(0)..Gfn(1)), "used through one of them");
        // Write protection and zap reach both.
        let pending = rig.mmu.write_protect(SPACE, Gfn(0)..Gfn(1), Level::L1);
        assert_eq!(pending.leaves(), 2);
        pending.flush();
        assert_eq!((leaf(kept).0 | leaf(root).0) & F::WRITABLE, 0);
        let pending = rig.mmu.zap(SPACE, Gfn(0)..Gfn(1));
        assert_eq!(pending.leaves(), 2);
        pending.flush();
        assert_eq!(rig.mmu.stats().pages, [0; 3]);
    }

    /// A removed slot is gone from the roots of all kinds, and so are roots made obsolete.
    fn all_kinds_of_roots_are_swept<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut with = rig.processor(rig.vcpu());
        let mut vcpu = rig.vcpu();
        vcpu.set_ad_bits(AdBits::Software).expect("a frame for the root");
        assert_eq!(vcpu.fault(Fault::write(Gpa(0))), fixed());
        assert!(with.run(Gpa(0), Access::Write).is_ok());
        let id = rig.mmu.slots().list(SPACE)[0].id();
        rig.mmu.slots().remove(SPACE, id).expect("it is there");
        assert_eq!(rig.mmu.stats().pages, [0; 3]);
        let teardown = rig.mmu.invalidate_roots();
        assert!(vcpu.is_root_obsolete() && with.vcpu.is_root_obsolete());
        let root = vcpu.load_root().expect("a frame for the root");
        assert_eq!(vcpu.ad_bits(), AdBits::Software, "it gets one of the same kind");
        assert_ne!(root.generation, with.vcpu.load_root().expect("a frame").generation);
        drop(teardown);
        assert_eq!(rig.mmu.stats().roots_invalidated, 2);
    }

    /// A vCPU that goes back and forth between address spaces and kinds of roots finds what it left, without asking the
    /// host for a frame; there are never more roots than kinds, and an obsolete one is not kept.
    fn a_root_that_was_left_is_found_again<F>() {
        let rig = rig_with::<F>(Level::L1);
        let mut vcpu = rig.vcpu();
        let kinds = [
            (SPACE, AdBits::Processor),
            (OTHER, AdBits::Processor),
            (OTHER, AdBits::Software),
            (SPACE, AdBits::Software),
        ];
        let go = |vcpu: &mut Vcpu<F, _>, (space, ad_bits)| {
            vcpu.set_address_space(space)?;
            let root = vcpu.set_ad_bits(ad_bits)?;
            assert_eq!((vcpu.address_space(), vcpu.ad_bits()), (space, ad_bits));
            Ok::<_, MmuError>(root.generation)
        };
        let first: Vec<_> = kinds
            .iter()
            .map(|&kind| go(&mut vcpu, kind).expect("a frame for the root"))
            .collect();
        for (&kind, n) in kinds.iter().zip(0..) {
            go(&mut vcpu, kind).expect("it is there");
            assert_eq!(vcpu.fault(Fault::write(Gpa(n << 12))), fixed());
        }
        let allocated = rig.frames().allocated();
        rig.frames().starve(true);
        for _ in 0..3 {
            for (&kind, &generation) in kinds.iter().zip(&first).rev() {
                assert_eq!(go(&mut vcpu, kind), Ok(generation));
            }
        }
        rig.frames().starve(false);
        assert_eq!(rig.frames().allocated(), allocated);
        assert_eq!(rig.mmu.stats().roots_made, 4);
        let made = rig.frames().allocated();
        rig.mmu.invalidate_roots().finish();
        vcpu.load_root().expect("a frame for the root");
        rig.mmu.synchronize();
        assert_eq!(made - rig.frames().allocated(), 12 + 4 - 1, "it keeps no root that it cannot use");
        let second: Vec<_> = kinds
            .iter()
            .map(|&kind| go(&mut vcpu, kind).expect("a frame for the root"))
            .collect();
        assert!(first.iter().all(|old| second.iter().all(|new| new > old)));
        assert_eq!(made - rig.frames().allocated(), 12, "three tables below each root");
        assert_eq!(rig.mmu.stats().roots_made, 8);
        // A refused switch leaves it where it was.
        rig.mmu.invalidate_roots().finish();
        rig.frames().starve(true);
        assert!(vcpu.set_address_space(OTHER).is_err());
        assert!(vcpu.set_ad_bits(AdBits::Processor).is_err());
        assert_eq!((vcpu.address_space(), vcpu.ad_bits()), (SPACE, AdBits::Software));
        assert!(vcpu.load_root().is_err());
        rig.frames().starve(false);
        assert!(vcpu.load_root().is_ok());
        assert_eq!(vcpu.fault(Fault::write(Gpa(0))), fixed());
    }
}
