//! Mapping ahead: what is there stays as it is, and nothing is waited for that may never come.

use crate::common::host::Memory;
use crate::common::rig::{Rig, RigSetup, hear};
use crate::{SPACE, fixed};
use std::sync::mpsc::channel;
use tdp::{
    Access, Fault, Gfn, Gpa, Level, Outcome, Perms, Pfn, RetryReason, Slot, SlotId, Visibility,
};

const BASE: u64 = 1 << 20;
const ID: SlotId = SlotId(1);

both_formats! {
    /// What is mapped is not replaced by a leaf that nobody has used: a page that the guest has used is young still, and
    /// permits what it did, of whatever size the leaf is that mapping ahead would make.
    fn case_22_mapping_ahead_leaves_what_is_there<F>() {
        for backing in [Level::L1, Level::L2] {
            let rig = Rig::<F>::new();
            let slot = Slot::new(Gfn(0)..Gfn(1024), Memory::new(Pfn(BASE), backing)).with_id(ID);
            rig.mmu.slots().insert(slot).expect("the first slot");
            let mut cpu = rig.processor(rig.vcpu());
            let write = Fault::write(Gpa(0x3000)).max_level(Level::L1);
            assert_eq!(cpu.vcpu.fault(write), fixed(Level::L1));
            assert!(cpu.touch(Gpa(0x3000), Access::Write).result.is_ok());
            assert!(cpu.run(Gfn(512).address(), Access::Write).is_ok());
            let before = rig.mmu.translate(SPACE, Gfn(512)).expect("it is mapped");
            rig.host().permit(Perms::RX);
            let done = cpu.vcpu.prefault(Gfn(0)..Gfn(1024), Visibility::Shared).expect("there are frames");
            assert_eq!((done.next, done.stopped), (Gfn(1024), None));
            assert_eq!(rig.mmu.translate(SPACE, Gfn(512)), Some(before));
            let leaf = rig.mmu.translate(SPACE, Gfn(3)).expect("it is mapped");
            assert_ne!(leaf.spte.0 & F::ACCESSED, 0, "{backing:?}: {leaf:?}");
            assert_ne!(leaf.spte.0 & F::DIRTY, 0, "{backing:?}: {leaf:?}");
            assert!(leaf.perms.contains(Perms::WRITE), "{backing:?}: {leaf:?}");
            assert!(rig.mmu.test_age(SPACE, Gfn(3)..Gfn(4)));
            // An empty table is nothing that could stay.
            rig.mmu.zap_leaves(SPACE, Gfn(0)..Gfn(1024)).flush();
            let done = cpu.vcpu.prefault(Gfn(0)..Gfn(1024), Visibility::Shared).expect("there are frames");
            assert_eq!((done.frames, done.stopped), (1024, None));
            let leaf = rig.mmu.translate(SPACE, Gfn(3)).expect("it is mapped");
            assert_eq!(leaf.level, backing);
        }
    }

    /// The slot is going away, and does not get any further while somebody maps it ahead: that gives up after a bounded
    /// wait, outside any critical section.
    fn case_23_mapping_ahead_does_not_wait_for_a_slot_that_goes<F>() {
        let rig = Rig::<F>::new();
        let slot = Slot::new(Gfn(0)..Gfn(64), Memory::new(Pfn(BASE), Level::L1)).with_id(ID);
        rig.mmu.slots().insert(slot).expect("the first slot");
        let mut vcpu = rig.vcpu();
        assert_eq!(vcpu.fault(Fault::write(Gpa(0))), fixed(Level::L1));
        let (going, goes) = channel();
        let (go_on, goes_on) = channel::<()>();
        rig.host().script().while_flushing = Some(Box::new(move || {
            going.send(()).expect("somebody listens");
            hear(&goes_on);
        }));
        let mmu = rig.mmu.clone();
        let removal = std::thread::spawn(move || mmu.slots().remove(SPACE, ID));
        hear(&goes);
        // Here the slot is going, and stays so for as long as this takes.
        let (said, heard) = channel();
        let ahead = std::thread::spawn(move || {
            let done = vcpu.prefault(Gfn(0)..Gfn(64), Visibility::Shared);
            said.send(done).expect("somebody listens");
            vcpu
        });
        let done = hear(&heard).expect("there are frames");
        assert_eq!(done.next, Gfn(0));
        assert_eq!(done.stopped, Some(Outcome::Retry(RetryReason::SlotChanging)));
        go_on.send(()).expect("somebody listens");
        removal.join().expect("nothing goes wrong").expect("the slot was there");
        let mut vcpu = ahead.join().expect("nothing goes wrong");
        let done = vcpu.prefault(Gfn(0)..Gfn(64), Visibility::Shared).expect("there are frames");
        assert_eq!(done.stopped, Some(Outcome::Mmio { read_only: false }));
    }

    /// The root is obsolete at the start, or becomes so on the way: a new one is loaded, and the rest is mapped there.
    fn case_24_mapping_ahead_loads_a_new_root<F>() {
        for on_the_way in [false, true] {
            let rig = Rig::<F>::with(RigSetup::default());
            let slot = Slot::new(Gfn(0)..Gfn(64), Memory::new(Pfn(BASE), Level::L1)).with_id(ID);
            rig.mmu.slots().insert(slot).expect("the first slot");
            let mut vcpu = rig.vcpu();
            assert_eq!(vcpu.fault(Fault::write(Gpa(0))), fixed(Level::L1));
            let first = vcpu.load_root().expect("the root is there").generation;
            if on_the_way {
                let mmu = rig.mmu.clone();
                rig.host().script().while_looking = Some(Box::new(move || mmu.invalidate_roots().finish()));
            } else {
                rig.mmu.invalidate_roots().finish();
            }
            let (said, heard) = channel();
            let ahead = std::thread::spawn(move || {
                let done = vcpu.prefault(Gfn(8)..Gfn(64), Visibility::Shared);
                said.send(done).expect("somebody listens");
                vcpu
            });
            let done = hear(&heard).expect("there are frames");
            assert_eq!((done.next, done.frames, done.stopped), (Gfn(64), 56, None));
            let mut vcpu = ahead.join().expect("nothing goes wrong");
            assert_ne!(vcpu.load_root().expect("the root is there").generation, first);
            rig.assert_maps(&mut vcpu, Gfn(63), Pfn(BASE + 63), Level::L1, Perms::RWX);
            assert_eq!(rig.mmu.stats().pages, [56, 0, 0]);
        }
    }
}
