//! Table frames: none left, given back, waiting for a grace period.

use crate::common::host::Memory;
use crate::common::processor::{Processor, Report};
use crate::common::rig::{Rig, RigSetup};
use tdp::{
    AddressSpaceId, Fault, FaultError, Gfn, Gpa, Level, MmuError, OutOfFrames, Outcome, Perms, Pfn,
    Slot,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const BASE: u64 = 1 << 20;
const FIXED: Result<Outcome, FaultError> = Ok(Outcome::Fixed { level: Level::L1 });

fn rig_with<F: Processor>(frames: usize) -> Rig<F> {
    let rig = Rig::with(RigSetup {
        frames,
        ..RigSetup::default()
    });
    rig.mmu
        .slots()
        .insert(Slot::new(
            Gfn(0)..Gfn(1 << 18),
            Memory::new(Pfn(BASE), Level::L1),
        ))
        .expect("the first slot");
    rig
}

const OUT: Result<Outcome, FaultError> = Err(FaultError::OutOfFrames);

both_formats! {
    /// No frame left: a typed error; what was mapped stays, what needs no table is
    /// mapped still, and with frames everything goes on.
    fn running_out_is_an_error_and_no_more<F>() {
        let limit = 24;
        let rig = rig_with::<F>(limit);
        let mut vcpu = rig.vcpu();
        let mut mapped = 0;
        let error = loop {
            match vcpu.fault(Fault::write(Gfn(mapped * 512).address())) {
                FIXED => mapped += 1,
                other => break other,
            }
        };
        assert_eq!(error, OUT);
        assert!(mapped > 10, "most of the frames were used: {mapped}");
        let stats = rig.mmu.stats();
        assert_eq!((stats.pages[0], stats.tables), (mapped, mapped + 2));
        rig.assert_absent(&mut vcpu, Gfn(mapped * 512), Report::Absent);
        for block in 0..mapped {
            let gfn = Gfn(block * 512);
            rig.assert_maps(&mut vcpu, gfn, Pfn(BASE + gfn.0), Level::L1, Perms::RWX);
            assert_eq!(vcpu.fault(Fault::read(gfn.address())), Ok(Outcome::Spurious));
        }
        assert_eq!(vcpu.fault(Fault::write(Gpa(0x1000))), FIXED, "its table is there");
        assert!(rig.frames().allocated() <= limit);
        rig.mmu.zap(SPACE, Gfn(0)..Gfn(1 << 18)).flush();
        assert_eq!(vcpu.fault(Fault::write(Gfn(mapped * 512).address())), FIXED);
    }

    /// The same in a batch and by bare maps.
    fn running_out_in_a_batch_or_a_bare_map<F>() {
        let limit = 24;
        let rig = rig_with::<F>(limit);
        let mut vcpu = rig.vcpu();
        rig.frames().starve(true);
        let mapping = tdp::Mapping::memory(Pfn(BASE), Level::L1, Perms::RWX);
        assert_eq!(vcpu.fault(Fault::read(Gpa(0))), OUT);
        assert_eq!(vcpu.map(Gfn(0), mapping, tdp::Access::Read), OUT);
        assert_eq!(vcpu.batch().err(), Some(FaultError::OutOfFrames));
        rig.frames().starve(false);
        let mut batch = vcpu.batch().expect("there are frames");
        rig.frames().starve(true);
        let mut block = 0;
        let error = loop {
            match batch.fault(Fault::read(Gfn(block * 512).address())) {
                FIXED => block += 1,
                other => break other,
            }
        };
        assert_eq!(error, OUT);
        assert_eq!(batch.map(Gfn(block * 512), mapping, tdp::Access::Read), OUT);
        drop(batch);
        assert_eq!(rig.mmu.stats().pages, [block, 0, 0]);
    }

    /// No frame for a root: for a new vCPU, another space, an obsolete root. Who has a root keeps it.
    fn running_out_of_roots<F>() {
        let limit = 24;
        let rig = rig_with::<F>(limit);
        let refused = MmuError::OutOfFrames(OutOfFrames { limit });
        rig.frames().starve(true);
        assert_eq!(rig.mmu.vcpu().err(), Some(refused));
        rig.frames().starve(false);
        let mut vcpu = rig.vcpu();
        assert_eq!(vcpu.fault(Fault::read(Gpa(0))), FIXED);
        rig.frames().starve(true);
        assert_eq!(vcpu.set_address_space(AddressSpaceId(1)), Err(refused));
        assert_eq!(vcpu.address_space(), SPACE);
        rig.assert_maps(&mut vcpu, Gfn(0), Pfn(BASE), Level::L1, Perms::RWX);
        rig.mmu.invalidate_roots().finish();
        assert_eq!(vcpu.load_root(), Err(refused));
        rig.frames().starve(false);
        vcpu.load_root().expect("there are frames");
        assert_eq!(vcpu.fault(Fault::read(Gpa(0))), FIXED);
    }

    /// INV: bounded-garbage. So are they by a vCPU that needs one for a root.
    fn a_root_drives_reclamation<F>() {
        let rig = rig_with::<F>(24);
        let mut vcpu = rig.vcpu();
        while rig.frames().allocated() < 24 {
            let gfn = Gfn(rig.mmu.stats().tables * 512);
            assert_eq!(vcpu.fault(Fault::read(gfn.address())), FIXED);
        }
        let tables = rig.mmu.stats().tables;
        let all = Gfn(0)..Gfn(1 << 18);
        assert_eq!(rig.mmu.zap(SPACE, all).tables() as u64, tables - 1);
        assert_eq!(rig.frames().allocated(), 24, "nothing drives it yet");
        assert!(vcpu.set_address_space(AddressSpaceId(1)).is_ok());
    }

    /// INV: bounded-garbage. Frames that wait for a grace period are brought back by whoever needs one.
    fn whoever_needs_a_frame_drives_reclamation<F>() {
        let rig = rig_with::<F>(40);
        let mut vcpu = rig.vcpu();
        for round in 0..20 {
            for block in 0..8 {
                let gfn = Gfn((round * 8 + block) * 512);
                assert_eq!(vcpu.fault(Fault::write(gfn.address())), FIXED, "round {round}");
            }
            // Nobody drives: the bound is far away.
            rig.mmu.zap(SPACE, Gfn(0)..Gfn(1 << 27)).flush();
        }
        let garbage = rig.mmu.stats().garbage;
        assert!(garbage.retired >= 200 && garbage.freed > 100, "{garbage:?}");
    }

    /// INV: bounded-garbage. The same inside one batch, which is itself what holds the frames up.
    fn a_batch_that_needs_a_frame_drives_reclamation<F>() {
        let rig = rig_with::<F>(40);
        let mut vcpu = rig.vcpu();
        let mut batch = vcpu.batch().expect("there are frames");
        for round in 0..20 {
            for block in 0..8 {
                let gfn = Gfn((round * 8 + block) * 512);
                assert_eq!(batch.fault(Fault::write(gfn.address())), FIXED, "round {round}");
            }
            rig.mmu.zap(SPACE, Gfn(0)..Gfn(1 << 27)).flush();
        }
    }

    /// INV: bounded-garbage. Past the bound, whoever allocates drives, though nobody retires any more and there are
    /// frames enough.
    fn past_the_bound_whoever_allocates_drives<F>() {
        let bound = 16;
        let rig = Rig::<F>::with(RigSetup { garbage_bound: bound, ..RigSetup::default() });
        let slot = Slot::new(Gfn(0)..Gfn(1 << 18), Memory::new(Pfn(BASE), Level::L1));
        rig.mmu.slots().insert(slot).expect("the first slot");
        let mut vcpu = rig.vcpu();
        let mut other = rig.vcpu();
        let holds_up = other.batch().expect("there are frames");
        while rig.mmu.stats().garbage.pending <= bound as u64 {
            assert_eq!(vcpu.fault(Fault::write(Gpa(0))), FIXED);
            rig.mmu.zap(SPACE, Gfn(0)..Gfn(512)).flush();
        }
        drop(holds_up);
        assert!(rig.mmu.stats().garbage.pending > bound as u64);
        for block in 0..32 {
            assert_eq!(vcpu.fault(Fault::write(Gfn(block * 512).address())), FIXED);
        }
        assert!(rig.mmu.stats().garbage.pending <= bound as u64);
    }

    /// INV: bounded-garbage. Past half of the bound, whoever retires drives.
    fn the_bound_keeps_garbage_small<F>() {
        let rig = Rig::<F>::with(RigSetup { garbage_bound: 16, ..RigSetup::default() });
        let slot = Slot::new(Gfn(0)..Gfn(1 << 18), Memory::new(Pfn(BASE), Level::L1));
        rig.mmu.slots().insert(slot).expect("the first slot");
        let mut vcpu = rig.vcpu();
        for _ in 0..100 {
            assert_eq!(vcpu.fault(Fault::write(Gpa(0))), FIXED);
            rig.mmu.zap(SPACE, Gfn(0)..Gfn(512)).flush();
            assert!(rig.mmu.stats().garbage.pending <= 16);
        }
        rig.mmu.synchronize();
        assert_eq!(rig.mmu.stats().garbage.pending, 0);
    }

    /// A table is given back after a grace period, not while a batch that may stand in it goes on.
    fn a_table_outlives_the_batch_that_may_stand_in_it<F>() {
        // So small that whoever retires drives at once.
        let rig = Rig::<F>::with(RigSetup { garbage_bound: 1, ..RigSetup::default() });
        let slot = Slot::new(Gfn(0)..Gfn(1 << 18), Memory::new(Pfn(BASE), Level::L1));
        rig.mmu.slots().insert(slot).expect("the first slot");
        let mut vcpu = rig.vcpu();
        assert_eq!(vcpu.fault(Fault::write(Gpa(0))), FIXED);
        let batch = vcpu.batch().expect("there are frames");
        let before = rig.frames().allocated();
        rig.mmu.zap(SPACE, Gfn(0)..Gfn(512)).flush();
        assert_eq!(rig.mmu.stats().garbage.pending, 1);
        assert_eq!(rig.frames().allocated(), before);
        drop(batch);
        rig.mmu.synchronize();
        assert_eq!(rig.mmu.stats().garbage.pending, 0);
        assert_eq!(rig.frames().allocated(), before - 1);
    }

    /// The frames that a vCPU keeps ready go back with it.
    fn a_vcpu_gives_its_spare_frames_back<F>() {
        let rig = rig_with::<F>(64);
        let mut vcpu = rig.vcpu();
        let other = rig.vcpu();
        assert_eq!(vcpu.fault(Fault::write(Gpa(0))), FIXED);
        assert!(rig.frames().allocated() > 4);
        drop(vcpu);
        assert_eq!(rig.frames().allocated(), 4, "a root and three tables");
        assert_eq!(rig.mmu.stats().fixed, 1, "its counters stay");
        drop(other);
    }

    /// vCPUs may outlive every other handle to the MMU.
    fn a_vcpu_keeps_the_mmu<F>() {
        let rig = rig_with::<F>(64);
        let mut vcpu = rig.vcpu();
        let frames = rig.frames().clone();
        let Rig { mmu, .. } = rig;
        drop(mmu);
        assert_eq!(vcpu.fault(Fault::write(Gpa(0))), FIXED);
        drop(vcpu);
        assert_eq!(frames.allocated(), 0);
    }
}
