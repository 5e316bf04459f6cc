//! What an embedder keeps: how it is shown, what of it costs memory, and what of it is there for confidential guests only.

use crate::common::host::{Memory, TestHost};
use crate::common::processor::Processor;
use crate::common::rig::{Rig, RigSetup, pool};
use std::collections::HashSet;
use tdp::{
    Access, AddressSpaceId, ConvertError, DirtyTracking, Fault, FoldError, Gfn, Gpa, ImageError,
    Level, Mmu, Outcome, PAGE_SIZE, Pfn, RetryReason, Slot, SlotFlags, SlotId, TlbTracker,
    Visibility,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const ID: SlotId = SlotId(3);

fn rig<F: Processor>() -> Rig<F> {
    let rig = Rig::with(RigSetup {
        dirty_tracking: DirtyTracking::WriteProtect,
        ..RigSetup::default()
    });
    let slot = Slot::new(Gfn(0)..Gfn(1024), Memory::new(Pfn(1 << 20), Level::L1)).with_id(ID);
    rig.mmu.slots().insert(slot).expect("the first slot");
    rig
}

#[track_caller]
fn assert_shows(shown: &str, parts: &[&str]) {
    for part in parts {
        assert!(shown.contains(part), "{part:?} is not in {shown:?}");
    }
}

both_formats! {
    /// An embedder's own types hold these. None waits for anything, and each names what tells it from others of its kind.
    fn each_handle_says_which_it_is<F>() {
        let rig = rig::<F>();
        let mut vcpu = rig.vcpu();
        for gfn in [0, 600] {
            let outcome = vcpu.fault(Fault::write(Gfn(gfn).address()));
            assert_eq!(outcome, Ok(Outcome::Fixed { level: Level::L1 }));
        }
        let shown = format!("{:?}", rig.mmu);
        assert_shows(&shown, &["Mmu", &format!("{:?}", F::NAME), &format!("{:?}", Level::L4)]);
        assert_shows(&format!("{vcpu:?}"), &["Vcpu", "AddressSpaceId(0)", "spare_tables"]);
        rig.mmu.slots().set_flags(SPACE, ID, SlotFlags::LOG_DIRTY).expect("it is there");
        let log = rig.mmu.dirty_log(SPACE, ID).expect("it is logged");
        assert_shows(&format!("{log:?}"), &["DirtyLog", "SlotId(3)", "words: 16"]);
        let pending = rig.mmu.zap(SPACE, Gfn(512)..Gfn(1024));
        assert_shows(&format!("{pending:?}"), &["PendingFlush", "[0x200, 0x400)", "tables: 1"]);
        pending.flush();
        let teardown = rig.mmu.invalidate_roots();
        assert_shows(&format!("{teardown:?}"), &["RootTeardown", "roots: 1", "left_by_all: false"]);
    }

    /// All that is asked of a private half says that there is none, and changes nothing.
    fn a_guest_without_a_private_half_says_so<F>() {
        let rig = rig::<F>();
        let mmu = &rig.mmu;
        let mut vcpu = rig.vcpu();
        let fixed = Ok(Outcome::Fixed { level: Level::L1 });
        assert_eq!(vcpu.fault(Fault::write(Gpa(0x5000))), fixed);
        let before = mmu.stats();
        let range = Gfn(0)..Gfn(512);
        assert_eq!(mmu.build_private().map(drop), Err(ImageError::NotConfidential));
        let none = ConvertError::NotConfidential;
        for to in [Visibility::Private, Visibility::Shared] {
            assert_eq!(mmu.convert(SPACE, range.clone(), to), Err(none));
        }
        assert_eq!(mmu.zap_private(SPACE, range.clone()), Err(none));
        let fold = mmu.fold_private(SPACE, range.clone());
        assert_eq!(fold, Err(FoldError::Range(none)));
        assert_eq!(mmu.reclaim_private(), Ok(Default::default()));
        assert_eq!((mmu.phase(), mmu.visibility(Gfn(5))), (None, None));
        assert_eq!(mmu.private_frames(range.clone()), 0);
        mmu.visibilities(range, |range, _| panic!("{range} is neither"));
        mmu.allow_huge(Gfn(5));
        assert_eq!(mmu.audit_protected(SPACE), Default::default());
        let access = mmu.explain(Fault::new(Gpa(0x5123), Access::Write));
        assert_eq!((access.gfn, access.wanted, access.found), (Gfn(5), None, None));
        assert_eq!(access.block, (Gfn(5)..Gfn(6)).into());
        let after = mmu.stats();
        assert_eq!((after.pages, after.tables), (before.pages, before.tables));
        assert_eq!(vcpu.fault(Fault::write(Gpa(0x5000))), Ok(Outcome::Spurious));
    }

    /// Without interruptions of other threads an invalidation waits for faults, and frees what it took, all the same.
    fn fences_may_be_where_they_cost_each_fault_something<F>() {
        let frames = pool(64);
        let mmu: Mmu<F, TestHost> = Mmu::builder(TestHost::new(frames.clone()))
            .asymmetric_fences(false)
            .build()
            .expect("a possible set-up");
        let slot = Slot::new(Gfn(0)..Gfn(1024), Memory::new(Pfn(1 << 20), Level::L1));
        mmu.slots().insert(slot).expect("the first slot");
        let mut vcpu = mmu.vcpu().expect("a frame for the root");
        for round in 0..20 {
            for gfn in (0..1024).step_by(64) {
                let outcome = vcpu.fault(Fault::write(Gfn(gfn).address()));
                assert_eq!(outcome, Ok(Outcome::Fixed { level: Level::L1 }), "round {round}");
            }
            let invalidation = mmu.invalidate_begin(SPACE, Gfn(0)..Gfn(1024));
            let flushed = invalidation.zap().flush();
            invalidation.end(flushed);
            assert_eq!(mmu.translate(SPACE, Gfn(0)), None);
        }
        mmu.synchronize();
        assert_eq!(mmu.stats().garbage.pending, 0);
        drop((vcpu, mmu));
        assert_eq!(frames.allocated(), 0);
    }

    /// What is kept beside a table is small enough not to count.
    fn a_table_costs_little_more_than_its_page<F>() {
        let beside = Mmu::<F, TestHost>::metadata_per_table();
        assert!(beside > 0 && beside as u64 <= PAGE_SIZE / 100, "{beside} bytes");
    }
}

#[test]
fn reasons_to_try_again_have_names_of_their_own() {
    let names: HashSet<_> = RetryReason::ALL.map(RetryReason::name).into();
    assert_eq!(names.len(), RetryReason::ALL.len());
    for name in names {
        assert!(
            name.chars().all(|c| c.is_ascii_lowercase() || c == '_'),
            "{name:?}"
        );
    }
}

/// A tracker that nobody has asked for a vCPU has nobody to wait for.
#[test]
fn a_tracker_without_vcpus_waits_for_nobody() {
    let tracker = TlbTracker::default();
    tracker.track(|vcpu| panic!("there is no vCPU {vcpu}"));
    assert!(tracker.is_drained(tracker.begin(|_| {})));
}
