//! Write protection: of ranges, which a write ends, and of frames, which only the host ends.

use crate::common::host::{Answer, Memory};
use crate::common::processor::Processor;
use crate::common::rig::Rig;
use tdp::{
    Access, AdBits, AddressSpaceId, FlushRequest, Gfn, GfnRange, Gpa, Level, Lookup, MemoryFault,
    Outcome, Perms, Pfn, Slot,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const BASE: u64 = 1 << 20;
const ALL: std::ops::Range<Gfn> = Gfn(0)..Gfn(1 << 18);

fn rig_with<F: Processor>(ad_bits: AdBits, level: Level) -> Rig<F> {
    let rig = Rig::with_ad_bits(ad_bits);
    let slot = Slot::new(ALL, Memory::new(Pfn(BASE), level));
    rig.mmu.slots().insert(slot).expect("the first slot");
    rig
}

fn flush_of(start: u64, end: u64) -> FlushRequest {
    FlushRequest {
        as_id: SPACE,
        range: GfnRange {
            start: Gfn(start),
            end: Gfn(end),
        },
        tables: false,
    }
}

both_formats! {
    /// A protected leaf refuses the next write once it is flushed, and the write gets it back without the host.
    fn a_write_repairs_a_protected_leaf<F>() {
        for level in [Level::L1, Level::L2, Level::L3] {
            let rig = rig_with::<F>(AdBits::Processor, level);
            let mut cpu = rig.processor(rig.vcpu());
            assert!(cpu.run(Gpa(0), Access::Write).is_ok());
            let pending = rig.mmu.write_protect(SPACE, ALL, Level::L1);
            assert_eq!((pending.leaves(), pending.tables()), (1, 0));
            assert!(cpu.touch(Gpa(0), Access::Write).result.is_ok(), "cached until it is flushed");
            pending.flush();
            assert_eq!(rig.host().take_flushes(), [flush_of(0, level.pages())]);
            assert!(cpu.touch(Gpa(0), Access::Write).result.is_err());
            assert!(cpu.touch(Gpa(0), Access::Read).result.is_ok());
            rig.assert_maps(&mut cpu.vcpu, Gfn(0), Pfn(BASE), level, Perms::RX);
            rig.host().set_answer(Answer::Blocking(
                crate::common::host::BlockingAnswer::Fixed(Lookup::Failed),
            ));
            assert!(cpu.run(Gpa(0), Access::Write).is_ok());
            rig.assert_maps(&mut cpu.vcpu, Gfn(0), Pfn(BASE), level, Perms::RWX);
            // Protected already: nothing to do, nothing to flush.
            rig.mmu.write_protect(SPACE, ALL, Level::L1).flush();
            let _ = rig.host().take_flushes();
            assert!(rig.mmu.write_protect(SPACE, ALL, Level::L1).is_empty());
        }
    }

    /// Protection from level 2 up leaves small leaves alone; a range keeps to itself.
    fn protection_keeps_to_its_level_and_range<F>() {
        let rig = rig_with::<F>(AdBits::Processor, Level::L2);
        let mut cpu = rig.processor(rig.vcpu());
        let small = tdp::Fault::write(Gpa(0)).max_level(Level::L1);
        assert_eq!(cpu.vcpu.fault(small), Ok(Outcome::Fixed { level: Level::L1 }));
        for gfn in [512, 1024] {
            assert!(cpu.run(Gfn(gfn).address(), Access::Write).is_ok());
        }
        rig.mmu.write_protect(SPACE, Gfn(0)..Gfn(513), Level::L2).flush();
        assert_eq!(rig.host().take_flushes(), [flush_of(512, 1024)]);
        for (gfn, level, perms) in [
            (0, Level::L1, Perms::RWX),
            (512, Level::L2, Perms::RX),
            (1024, Level::L2, Perms::RWX),
        ] {
            rig.assert_maps(&mut cpu.vcpu, Gfn(gfn), Pfn(BASE + gfn), level, perms);
        }
    }

    /// A protected frame stays so, whatever the leaf once permitted, until the host permits writing.
    fn only_the_host_ends_the_protection_of_a_frame<F>() {
        let rig = rig_with::<F>(AdBits::Processor, Level::L1);
        let mut cpu = rig.processor(rig.vcpu());
        for gfn in [0, 1] {
            assert!(cpu.run(Gfn(gfn).address(), Access::Write).is_ok());
        }
        // The writable bit is gone already, and not flushed.
        let unflushed = rig.mmu.write_protect(SPACE, Gfn(0)..Gfn(1), Level::L1);
        rig.mmu.write_protect_gfn(SPACE, Gfn(0)).flush();
        assert_eq!(rig.host().take_flushes().len(), 1, "flushed although nothing was writable");
        unflushed.flush();
        let _ = rig.host().take_flushes();
        rig.host().permit(Perms::RX);
        let refused = Err(Outcome::MemoryFault(MemoryFault::NotPermitted));
        assert_eq!(cpu.run(Gpa(0), Access::Write), refused);
        assert!(cpu.run(Gfn(1).address(), Access::Write).is_ok(), "the neighbour is not meant");
        let leaf = rig.mmu.translate(SPACE, Gfn(0)).expect("it is mapped");
        assert_eq!(leaf.spte.0 & (F::WRITABLE | F::MMU_WRITABLE), 0);
        assert!(leaf.spte.0 & F::HOST_WRITABLE != 0);
        assert!(rig.mmu.write_protect_gfn(SPACE, Gfn(0)).is_empty());
        rig.host().permit(Perms::RWX);
        assert!(cpu.run(Gpa(0), Access::Write).is_ok());
        rig.assert_maps(&mut cpu.vcpu, Gfn(0), Pfn(BASE), Level::L1, Perms::RWX);
    }

    /// The protection of a frame is not ended by a stale writable bit that comes and goes with dirty logging, at any
    /// moment: also flushed alone, with no other sweep unflushed.
    fn a_frame_protected_twice_is_flushed<F>() {
        let rig = rig_with::<F>(AdBits::Processor, Level::L1);
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gpa(0), Access::Write).is_ok());
        rig.mmu.write_protect(SPACE, ALL, Level::L1).flush();
        let _ = rig.host().take_flushes();
        rig.mmu.write_protect_gfn(SPACE, Gfn(0)).flush();
        assert_eq!(rig.host().take_flushes(), [flush_of(0, 1)]);
    }

    /// Aging takes the writable bit without a flush: protecting the range afterwards flushes, though nothing is writable.
    fn a_tracked_leaf_is_flushed_when_its_range_is_protected<F>() {
        let rig = rig_with::<F>(AdBits::Software, Level::L1);
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gpa(0), Access::Write).is_ok());
        assert!(rig.mmu.age(SPACE, ALL));
        assert!(cpu.touch(Gpa(0), Access::Write).result.is_ok(), "still cached");
        rig.mmu.write_protect(SPACE, ALL, Level::L1).flush();
        assert_eq!(rig.host().take_flushes(), [flush_of(0, 1)]);
        assert!(cpu.touch(Gpa(0), Access::Write).result.is_err());
    }

    /// Roots that are being torn down are protected too: a vCPU may be running on one.
    fn obsolete_roots_are_protected<F>() {
        let rig = rig_with::<F>(AdBits::Processor, Level::L1);
        let mut cpu = rig.processor(rig.vcpu());
        assert!(cpu.run(Gpa(0), Access::Write).is_ok());
        let teardown = rig.mmu.invalidate_roots();
        let pending = rig.mmu.write_protect(SPACE, ALL, Level::L1);
        assert_eq!(pending.leaves(), 1);
        pending.flush();
        assert!(cpu.touch(Gpa(0), Access::Write).result.is_err());
        teardown.finish();
    }
}
