//! Trace events: whoever only listens knows every entry.
//!
//! A listener keeps a copy of the tables, made from nothing but events. Each event has to go on from what the copy holds,
//! but for bits that the processor sets, and in the end the copy is the tree.

#[path = "../common/mod.rs"]
mod common;
mod listener;
#[path = "../private/rig.rs"]
#[allow(dead_code, reason = "the tests of the private half take all of it")]
mod private_rig;

use common::host::{Memory, TestHost};
use common::processor::Processor;
use common::rig::Rig;
use listener::{Copy, interrupt, listen};
use std::sync::{Arc, Mutex};
use tdp::{
    Access, AddressSpaceId, Ept, Fault, Gfn, Gpa, Level, Npt, Outcome, Perms, Pfn, Slot, Vcpu,
    Visibility,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const OTHER: AddressSpaceId = AddressSpaceId(1);
const ALL: std::ops::Range<Gfn> = Gfn(0)..Gfn(1 << 20);

fn rig<F: Processor>() -> Rig<F> {
    let rig = Rig::new();
    for space in [SPACE, OTHER] {
        let slot = Slot::new(ALL, Memory::new(Pfn(1 << 21), Level::L3)).in_space(space);
        rig.mmu.slots().insert(slot).expect("the first slot");
    }
    rig
}

fn the_copy_is_the_tree<F: Processor>() {
    let (copy, events) = listen::<F, _>(|| {
        let rig = rig::<F>();
        let mut vcpu = rig.vcpu();
        let mut other = rig.vcpu();
        other
            .set_address_space(OTHER)
            .expect("a frame for the root");
        let small = |gfn: u64| Fault::write(Gfn(gfn).address()).max_level(Level::L1);
        let large = |gfn: u64| Fault::write(Gfn(gfn).address()).max_level(Level::L2);
        // Tables and leaves; what is permitted is widened; a large leaf is split, a table gives way to one.
        rig.host().permit(Perms::READ);
        for gfn in [1 << 18, (1 << 18) + 511] {
            let _ = vcpu.fault(small(gfn)).expect("there are frames");
            let _ = vcpu
                .fault(Fault::read(Gfn(gfn).address()).max_level(Level::L1))
                .expect("there are frames");
        }
        let _ = vcpu
            .fault(Fault::read(Gfn(2 << 18).address()).max_level(Level::L2))
            .expect("there are frames");
        rig.host().permit(Perms::RWX);
        for fault in [
            small(1 << 18),
            small(2 << 18),
            small(0),
            small(5),
            large(512),
            large(1 << 18),
        ] {
            let outcome = vcpu.fault(fault).expect("there are frames");
            assert!(matches!(outcome, Outcome::Fixed { .. }), "{outcome:?}");
            let _ = other.fault(fault).expect("there are frames");
        }
        let mut batch = vcpu.batch().expect("there are frames");
        let _ = batch.fault(small(6)).expect("there are frames");
        drop(batch);
        // No memory.
        let none = Fault::read(Gfn((1 << 20) + 7).address());
        let _ = vcpu.fault(none).expect("there are frames");
        // Sweeps in place, and what repairs them.
        rig.mmu.age(SPACE, ALL);
        rig.mmu.write_protect(SPACE, ALL, Level::L1).flush();
        for gfn in [5, 0, 512] {
            assert!(matches!(vcpu.fault(large(gfn)), Ok(Outcome::Fixed { .. })));
        }
        // Leaves go, then tables with what they hold.
        rig.mmu.zap_leaves(SPACE, Gfn(5)..Gfn(6)).flush();
        let _ = vcpu.fault(small(5)).expect("there are frames");
        rig.mmu.zap(OTHER, ALL).flush();
        rig.mmu.zap(SPACE, Gfn(0)..Gfn(512)).flush();
        let _ = vcpu.fault(small(3)).expect("there are frames");
        // A large page is split ahead of time, and put together again.
        let block = Gfn(3 << 9)..Gfn(4 << 9);
        let _ = vcpu.fault(large(3 << 9)).expect("there are frames");
        rig.mmu
            .split(SPACE, block.clone(), Level::L1)
            .expect("there are frames");
        rig.mmu
            .write_protect(SPACE, Gfn((3 << 9) + 7)..Gfn((3 << 9) + 8), Level::L1)
            .flush();
        let pending = rig.mmu.collapse(SPACE, block);
        assert_eq!(pending.tables(), 1);
        pending.flush();
        // A root goes with all below it, and there is another.
        rig.mmu.invalidate_roots().finish();
        vcpu.load_root().expect("a frame for the root");
        for gfn in [9, 700] {
            let _ = vcpu.fault(small(gfn)).expect("there are frames");
        }
        Copy::of(&rig.mmu, [SPACE, OTHER])
    });
    assert_eq!(events.copy(), copy);
    assert_eq!(copy.len(), 2);
    for (name, least) in [
        ("page_fault", 20),
        ("spte_requested", 15),
        ("spte_changed", 50),
        ("set_spte", 15),
        ("get_page", 15),
        ("prepare_zap_page", 10),
        ("split_huge_page", 2),
        ("fast_page_fault", 3),
        ("mark_mmio", 1),
        ("zap_all_fast", 1),
        ("sweep", 8),
    ] {
        assert!(
            events.count(name) >= least,
            "{name}: {}",
            events.count(name)
        );
    }
    assert_eq!(
        events.count("get_page"),
        events.count("prepare_zap_page") + 3 + 2
    );
}

#[test]
fn the_copy_is_the_tree_on_ept() {
    the_copy_is_the_tree::<Ept>();
}

#[test]
fn the_copy_is_the_tree_on_npt() {
    the_copy_is_the_tree::<Npt>();
}

/// The fields are those that the documentation names.
#[test]
fn events_have_their_fields() {
    let (_, events) = listen::<Ept, _>(|| {
        let rig = rig::<Ept>();
        let mut vcpu = rig.vcpu();
        let gpa = Gpa(0x5000);
        let _ = vcpu
            .fault(Fault::write(gpa).max_level(Level::L1))
            .expect("there are frames");
        rig.mmu.write_protect(SPACE, ALL, Level::L1).flush();
        let _ = vcpu.fault(Fault::write(gpa)).expect("there are frames");
        let _ = vcpu
            .fault(Fault::new(Gpa(1 << 33), Access::Execute))
            .expect("there are frames");
        for level in [Level::L2, Level::L1] {
            rig.host().permit(match level {
                Level::L1 => Perms::RWX,
                _ => Perms::READ,
            });
            let fault = Fault::new(
                Gpa(0x40_0000),
                match level {
                    Level::L1 => Access::Write,
                    _ => Access::Read,
                },
            );
            let _ = vcpu
                .fault(fault.max_level(level))
                .expect("there are frames");
        }
        rig.mmu.invalidate_roots().finish();
    });
    let leaf = events.first("set_spte");
    assert_eq!((leaf["gfn"], leaf["level"], leaf["index"]), (5, 1, 5));
    assert_eq!(leaf["spte"] >> 12 & 0xff_ffff, 1 << 21 | 5);
    assert_ne!(leaf["table"], 0);
    let asked = events.first("spte_requested");
    assert_eq!(
        (asked["gfn"], asked["level"], asked["pfn"]),
        (5, 1, 1 << 21 | 5)
    );
    let fast = events.first("fast_page_fault");
    assert_eq!((fast["gfn"], fast["level"], fast["fixed"]), (5, 1, 1));
    assert_eq!(fast["old_spte"] ^ fast["new_spte"], 1 << 1, "writable");
    let mmio = events.first("mark_mmio");
    assert_eq!((mmio["gfn"], mmio["generation"]), (1 << 21, 2));
    assert_eq!(events.first("page_fault")["gpa"], 0x5000);
    assert_eq!(events.first("zap_all_fast")["roots"], 1);
    for (name, fields) in [
        ("page_fault", "access as_id gpa prefetch"),
        ("spte_requested", "as_id gfn level pfn"),
        ("spte_changed", "as_id gfn level new_spte old_spte private"),
        ("set_spte", "as_id gfn index level spte table"),
        ("get_page", "as_id gfn level private"),
        ("prepare_zap_page", "as_id gfn invalid level private"),
        (
            "fast_page_fault",
            "access as_id fixed gfn level new_spte old_spte",
        ),
        ("mark_mmio", "access as_id generation gfn"),
        ("split_huge_page", "as_id errno gfn huge_spte level private"),
        ("zap_all_fast", "roots"),
        ("sweep", "as_id end start what"),
    ] {
        let names: Vec<_> = events.first(name).keys().copied().collect();
        assert_eq!(names.join(" "), fields, "{name}");
    }
}

/// A vCPU remembers a table whose tree has just been unlinked, and which is not sealed yet: it is not told that its processor,
/// which finds nothing there, has nothing to complain of.
#[test]
fn an_unlinked_table_is_not_believed() {
    let small = |gfn: u64| Fault::write(Gfn(gfn).address()).max_level(Level::L1);
    let next = 1 << 18;
    // The vCPU that is to fault meanwhile, once there is one, and what it is told.
    let waiting = Arc::new(Mutex::new(None));
    let told = Arc::new(Mutex::new(None));
    let (vcpu, answer) = (waiting.clone(), told.clone());
    let meanwhile = move |name: &str, fields: &listener::Fields| {
        // The first leaf is sealed: the next GiB still has its own.
        if name != "spte_changed" || fields["level"] != 1 {
            return;
        }
        let vcpu: Option<Vcpu<Ept, TestHost>> = vcpu.lock().expect("one thread").take();
        if let Some(mut vcpu) = vcpu {
            assert_eq!(fields["gfn"], 0);
            let outcome = vcpu.fault(small(next)).expect("there are frames");
            *answer.lock().expect("one thread") = Some(outcome);
        }
    };
    // All of it is listened to: an event that is first told where nobody listens may stay unheard elsewhere.
    interrupt(meanwhile, || {
        let rig = rig::<Ept>();
        let mut vcpu = rig.vcpu();
        for gfn in [0, next, next + 1] {
            let _ = vcpu.fault(small(gfn)).expect("there are frames");
        }
        *waiting.lock().expect("one thread") = Some(vcpu);
        let everything = Gfn(0)..Level::L4.gfn_limit();
        rig.mmu.zap(SPACE, everything).flush();
    });
    let told = told.lock().expect("one thread").take();
    assert!(matches!(told, Some(Outcome::Fixed { .. })), "{told:?}");
}

/// The private half tells as well: tables and pages that come and go, a large page that is split.
#[test]
fn the_private_half_is_told_of() {
    use private_rig::{Rig, private, shared};
    let (copy, events) = listen::<Ept, _>(|| {
        let rig = Rig::running(Level::L2);
        let mut vcpu = rig.vcpu();
        for gfn in [0, 512, 1024] {
            let _ = vcpu.fault(private(gfn)).expect("there are frames");
        }
        let _ = vcpu
            .fault(private(512).max_level(Level::L1))
            .expect("there are frames");
        rig.mmu
            .convert(SPACE, Gfn(1024)..Gfn(1030), Visibility::Shared)
            .expect("nothing fails");
        let _ = vcpu.fault(shared(1025)).expect("there are frames");
        rig.mmu
            .zap_private(SPACE, Gfn(0)..Gfn(600))
            .expect("nothing fails");
        let _ = vcpu.fault(private(3)).expect("there are frames");
        Copy::of(&rig.mmu, [SPACE])
    });
    assert_eq!(events.copy(), copy);
    assert!(copy.len() > 500, "{}", copy.len());
    assert!(events.count("split_huge_page") >= 2);
    let private = |name: &str| {
        let all = events.all(name);
        all.filter(|fields| fields["private"] == 1).count()
    };
    assert!(private("spte_changed") > 80);
    assert!(private("get_page") >= 4);
}
