//! Wrong calls, and calls that meet: each must be refused with the module's status and operand, and change nothing.
//!
//! The tests are the first twenty rows of the table of negative sequences that was drawn up for trusted modules, in its
//! order and with its numbers; the last one is their positive control.
#![cfg(not(loom))]

mod tdx_support;

use std::sync::{Arc, Mutex};
use tdp::protected::tdx::{
    Accept, Answer, Call, Costs, Enter, EntryState, Exit, OpState, Operand, Status, Td, TdVcpu,
};
use tdx_support::{
    HUGE, LARGE, Meanwhile, PAGE, Rig, TOP, accepted, at, control, done, large_page, page,
};

const RCX: Operand = Operand::RCX;
const R8: Operand = Operand::R8;
const NONE: Operand = Operand::NONE;
/// A 2 MiB entry whose table has room for nothing: it is free in [`Rig::running`].
const FREE_LARGE: u64 = 0x20_0000;

fn enter(vcpu: &mut TdVcpu) {
    let entered = vcpu.enter(0);
    assert!(matches!(entered, Enter::Inside(_)), "{entered:?}");
}

/// A TD that runs and has a second vCPU.
fn running_with_vcpu() -> (Rig, TdVcpu) {
    let rig = Rig::created(Costs::default(), ());
    done(rig.td.mng_init());
    rig.add_tables();
    let vcpu = rig.td.vp_create(control(3)).unwrap();
    done(rig.td.mr_finalize());
    (rig, vcpu)
}

/// What an intruder was answered.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<Answer>>>);

impl Seen {
    fn push(&self, answer: Answer) {
        self.0.lock().unwrap().push(answer);
    }

    #[track_caller]
    fn expect(&self, expected: &[(Status, Operand)]) {
        let seen: Vec<_> = self.0.lock().unwrap().drain(..).collect();
        let seen: Vec<_> = seen.iter().map(|a| (a.status, a.operand)).collect();
        assert_eq!(seen, expected);
    }
}

fn meeting() -> (Rig, Meanwhile, Seen) {
    let meanwhile = Meanwhile::default();
    let rig = Rig::running_with(Costs::default(), meanwhile.clone());
    (rig, meanwhile, Seen::default())
}

#[test]
fn row_01_install_without_a_parent() {
    let rig = Rig::building();
    let registers = rig.refused(
        |td| td.mem_page_aug(at(0, PAGE), page(9)),
        Status::EptWalkFailed,
        RCX,
    );
    assert_eq!(registers, (Some(1 << 63), Some(3)));
}

#[test]
fn row_02_link_a_table_before_those_above_it() {
    let rig = Rig::building();
    let registers = rig.refused(
        |td| td.mem_sept_add(at(0, LARGE), page(9)),
        Status::EptWalkFailed,
        RCX,
    );
    assert_eq!(registers.1, Some(3));
}

#[test]
fn row_03_link_the_same_entry_twice() {
    let rig = Rig::building();
    done(rig.td.mem_sept_add(at(0, TOP), page(3)));
    let registers = rig.refused(
        |td| td.mem_sept_add(at(0, TOP), page(4)),
        Status::EptEntryStateIncorrect,
        RCX,
    );
    assert_eq!(registers, (Some(7), Some(0x8403)));
}

#[test]
fn row_04_link_with_a_page_that_is_a_table() {
    let rig = Rig::building();
    done(rig.td.mem_sept_add(at(0, TOP), page(3)));
    rig.refused(
        |td| td.mem_sept_add(at(0, HUGE), page(3)),
        Status::PageMetadataIncorrect,
        R8,
    );
}

#[test]
fn row_05_one_page_at_two_addresses() {
    let rig = Rig::running();
    done(rig.td.mem_page_aug(at(0, PAGE), page(9)));
    rig.refused(
        |td| td.mem_page_aug(at(0x1000, PAGE), page(9)),
        Status::PageMetadataIncorrect,
        R8,
    );
}

#[test]
fn row_06_install_over_a_pending_page() {
    let rig = Rig::running();
    done(rig.td.mem_page_aug(at(0, PAGE), page(9)));
    let registers = rig.refused(
        |td| td.mem_page_aug(at(0, PAGE), page(10)),
        Status::EptEntryStateIncorrect,
        RCX,
    );
    assert_eq!(registers.1, Some(0x200));
}

#[test]
fn row_07_add_a_page_after_the_td_is_finalised() {
    let rig = Rig::running();
    rig.refused(
        |td| td.mem_page_add(at(0, PAGE), page(9), page(10)),
        Status::OpStateIncorrect,
        NONE,
    );
}

#[test]
fn row_08_remove_without_block() {
    let rig = Rig::running();
    rig.map(0, PAGE, page(9));
    let registers = rig.refused(
        |td| td.mem_page_remove(at(0, PAGE)),
        Status::GpaRangeNotBlocked,
        RCX,
    );
    assert_eq!(registers.1, Some(0x400));

    // While the TD is built nothing has to be blocked.
    let rig = Rig::building();
    rig.add_tables();
    done(rig.td.mem_page_add(at(0, PAGE), page(9), page(10)));
    let answer = rig.td.mem_page_remove(at(0, PAGE));
    assert!(answer.is_success());
    assert_eq!(answer.rcx, Some(page(9).0));

    // Nor while it is paused.
    let rig = Rig::running();
    rig.map(0, PAGE, page(9));
    done(rig.td.migrate(OpState::LiveExport));
    rig.refused(
        |td| td.mem_page_remove(at(0, PAGE)),
        Status::GpaRangeNotBlocked,
        RCX,
    );
    done(rig.td.migrate(OpState::PausedExport));
    done(rig.td.mem_page_remove(at(0, PAGE)));
}

#[test]
fn row_09_block_and_remove_without_track() {
    let rig = Rig::running();
    rig.map(0, PAGE, page(9));
    done(rig.td.mem_range_block(at(0, PAGE)));
    rig.refused(
        |td| td.mem_page_remove(at(0, PAGE)),
        Status::TlbTrackingNotDone,
        RCX,
    );
    // No wait can cure this: it is the caller's fault.
    assert_eq!(rig.module.violation_count(), 1);
}

#[test]
fn row_10_remove_with_a_vcpu_inside_since_before() {
    let (rig, mut vcpu) = running_with_vcpu();
    rig.map(0, PAGE, page(9));
    enter(&mut vcpu);
    rig.block_and_track(0, PAGE);
    rig.refused(
        |td| td.mem_page_remove(at(0, PAGE)),
        Status::TlbTrackingNotDone,
        RCX,
    );
    // This can be waited for.
    vcpu.exit(Exit::Other { rip: 0 });
    done(rig.td.mem_page_remove(at(0, PAGE)));
    assert_eq!(rig.module.violation_count(), 0);
}

#[test]
fn row_11_a_second_track_does_not_overtake_a_vcpu() {
    let (rig, mut vcpu) = running_with_vcpu();
    enter(&mut vcpu);
    done(rig.td.mem_track());
    rig.refused(Td::mem_track, Status::PreviousTlbEpochBusy, NONE);
    rig.refused(Td::mem_track, Status::PreviousTlbEpochBusy, NONE);
    vcpu.exit(Exit::Other { rip: 0 });
    done(rig.td.mem_track());
    assert_eq!(rig.module.violation_count(), 0);
}

#[test]
fn row_12_block_twice() {
    let rig = Rig::running();
    rig.map(0, PAGE, page(9));
    done(rig.td.mem_range_block(at(0, PAGE)));
    let registers = rig.refused(
        |td| td.mem_range_block(at(0, PAGE)),
        Status::GpaRangeAlreadyBlocked,
        RCX,
    );
    assert_eq!(registers.1, Some(0x100));
}

#[test]
fn row_13_unblock_before_track() {
    let rig = Rig::running();
    rig.map(0, PAGE, page(9));
    done(rig.td.mem_range_block(at(0, PAGE)));
    rig.refused(
        |td| td.mem_range_unblock(at(0, PAGE)),
        Status::TlbTrackingNotDone,
        Operand::SEPT_TREE,
    );
    done(rig.td.mem_track());
    done(rig.td.mem_range_unblock(at(0, PAGE)));
    let entry = rig.td.entry(tdp::Gpa(0), PAGE).unwrap();
    assert_eq!(entry.state, EntryState::Mapped);
}

#[test]
fn row_14_a_second_block_needs_a_second_track() {
    let rig = Rig::running();
    rig.map(0, PAGE, page(9));
    rig.block_and_track(0, PAGE);
    done(rig.td.mem_range_unblock(at(0, PAGE)));
    done(rig.td.mem_range_block(at(0, PAGE)));
    rig.refused(
        |td| td.mem_page_remove(at(0, PAGE)),
        Status::TlbTrackingNotDone,
        RCX,
    );
    done(rig.td.mem_track());
    done(rig.td.mem_page_remove(at(0, PAGE)));
}

#[test]
fn row_15_nothing_is_reached_below_a_blocked_table() {
    let rig = Rig::running();
    rig.map(0, PAGE, page(9));
    rig.block_and_track(0, LARGE);
    let calls: [&dyn Fn(&Td) -> Answer; 4] = [
        &|td| td.mem_page_remove(at(0, PAGE)),
        &|td| td.mem_range_block(at(0, PAGE)),
        &|td| td.mem_page_aug(at(0x1000, PAGE), page(10)),
        &|td| td.mem_sept_rd(at(0, PAGE)),
    ];
    for call in calls {
        let registers = rig.refused(call, Status::EptWalkFailed, RCX);
        assert_eq!(registers, (Some(0), Some(0x8101)));
    }
}

#[test]
fn row_16_unlink_a_table_with_a_live_child() {
    let rig = Rig::running();
    rig.map(0x5000, PAGE, page(9));
    rig.block_and_track(0, LARGE);
    let registers = rig.refused(
        |td| td.mem_sept_remove(at(0, LARGE)),
        Status::EptPageNotFree,
        RCX,
    );
    assert_eq!(registers.1, Some(0x8101));
    // Its turn comes after its child's.
    done(rig.td.mem_range_unblock(at(0, LARGE)));
    rig.block_and_track(0x5000, PAGE);
    done(rig.td.mem_page_remove(at(0x5000, PAGE)));
    rig.block_and_track(0, LARGE);
    let answer = rig.td.mem_sept_remove(at(0, LARGE));
    assert!(answer.is_success());
    assert_eq!(answer.rcx, Some(page(5).0));
}

#[test]
fn row_17_merge_with_one_child_pending() {
    let rig = Rig::running();
    done(rig.td.mem_page_aug(at(FREE_LARGE, LARGE), large_page(0)));
    rig.block_and_track(FREE_LARGE, LARGE);
    done(rig.td.mem_page_demote(at(FREE_LARGE, LARGE), page(9)));
    for n in 0..511 {
        done(accepted(
            rig.td.page_accept(at(FREE_LARGE + n * 0x1000, PAGE)),
        ));
    }
    rig.block_and_track(FREE_LARGE, LARGE);
    let merge = |td: &Td| td.mem_page_promote(at(FREE_LARGE, LARGE));
    rig.refused(merge, Status::EptInvalidPromoteConditions, RCX);
    // Which pages the guest has accepted its host cannot know.
    assert_eq!(rig.module.violation_count(), 0);
    // The refusal has locked none of the entries for good.
    done(rig.td.mem_range_unblock(at(FREE_LARGE, LARGE)));
    done(accepted(
        rig.td.page_accept(at(FREE_LARGE + 511 * 0x1000, PAGE)),
    ));
    rig.block_and_track(FREE_LARGE, LARGE);
    let answer = merge(&rig.td);
    assert!(answer.is_success(), "{answer}");
    assert_eq!(answer.rcx, Some(page(9).0));

    // But that a page is not there it does.
    rig.block_and_track(FREE_LARGE, LARGE);
    done(rig.td.mem_page_demote(at(FREE_LARGE, LARGE), page(9)));
    rig.block_and_track(FREE_LARGE, PAGE);
    done(rig.td.mem_page_remove(at(FREE_LARGE, PAGE)));
    rig.block_and_track(FREE_LARGE, LARGE);
    rig.refused(merge, Status::EptInvalidPromoteConditions, RCX);
    assert_eq!(rig.module.violation_count(), 1);
}

#[test]
fn row_18a_blocks_of_other_addresses_meet_in_the_tree() {
    let (rig, meanwhile, seen) = meeting();
    rig.map(0, PAGE, page(9));
    done(rig.td.mem_page_aug(at(FREE_LARGE, LARGE), large_page(0)));
    let (td, log) = (rig.td.clone(), seen.clone());
    meanwhile.inside(Call::MemRangeBlock, move || {
        log.push(td.mem_range_block(at(FREE_LARGE, LARGE)));
        log.push(td.mem_page_aug(at(0x1000, PAGE), page(10)));
        // The epoch is not the tree's.
        log.push(td.mem_track());
    });
    done(rig.td.mem_range_block(at(0, PAGE)));
    assert!(meanwhile.is_over());
    seen.expect(&[
        (Status::OperandBusy, Operand::SEPT_TREE),
        (Status::OperandBusy, Operand::SEPT_TREE),
        (Status::Success, NONE),
    ]);
    assert_eq!(rig.module.violation_count(), 0);
}

#[test]
fn row_18b_a_guest_gives_way_to_a_host_until_it_has_come_back() {
    let (rig, meanwhile, seen) = meeting();
    done(rig.td.mem_page_aug(at(0, PAGE), page(9)));
    let (td, log) = (rig.td.clone(), seen.clone());
    meanwhile.inside(Call::GuestPageAccept, move || {
        log.push(td.mem_range_block(at(0, PAGE)));
    });
    done(accepted(rig.td.page_accept(at(0, PAGE))));
    assert!(meanwhile.is_over());
    seen.expect(&[(Status::OperandBusy, RCX)]);
    // The entry is not locked any more, and still the guest is kept out of it, however often it comes.
    for _ in 0..3 {
        let answer = accepted(rig.td.page_accept(at(0, PAGE)));
        assert!(answer.is(Status::OperandBusyHostPriority, RCX), "{answer}");
    }
    done(rig.td.mem_range_block(at(0, PAGE)));
    assert!(matches!(rig.td.page_accept(at(0, PAGE)), Accept::Exit(_)));
    assert_eq!(rig.module.violation_count(), 0);
}

#[test]
fn row_19a_a_large_page_meets_calls_on_its_physical_neighbours() {
    let (rig, meanwhile, seen) = meeting();
    let (td, log) = (rig.td.clone(), seen.clone());
    // Inside, the page at the end of the 2 MiB is on its way to this TD.
    let neighbour = tdp::Hpa(large_page(0).0 + 511 * 0x1000);
    meanwhile.inside(Call::MemPageAug, move || {
        log.push(td.mem_page_aug(at(FREE_LARGE, LARGE), large_page(0)));
        log.push(td.mem_page_aug(at(0x1000, PAGE), large_page(0)));
    });
    done(rig.td.mem_page_aug(at(0, PAGE), neighbour));
    // The 4 KiB neighbour does not mind.
    seen.expect(&[(Status::OperandBusy, R8), (Status::Success, NONE)]);

    // And the other way round, even if the small page would be refused anyway.
    let (rig, meanwhile, seen) = meeting();
    let (td, log) = (rig.td.clone(), seen.clone());
    meanwhile.inside(Call::MemPageAug, move || {
        log.push(td.mem_page_aug(at(0, PAGE), neighbour));
    });
    done(rig.td.mem_page_aug(at(FREE_LARGE, LARGE), large_page(0)));
    seen.expect(&[(Status::OperandBusy, R8)]);
}

#[test]
fn row_19b_track_meets_an_entry() {
    let meanwhile = Meanwhile::default();
    let rig = Rig::created(Costs::default(), meanwhile.clone());
    done(rig.td.mng_init());
    let mut first = rig.td.vp_create(control(3)).unwrap();
    let second = Mutex::new(rig.td.vp_create(control(4)).unwrap());
    done(rig.td.mr_finalize());
    let (seen, td) = (Seen::default(), rig.td.clone());
    let log = seen.clone();
    meanwhile.inside(Call::VpEnter, move || {
        log.push(td.mem_track());
        // Entries do not exclude each other.
        enter(&mut second.lock().unwrap());
    });
    enter(&mut first);
    assert!(meanwhile.is_over());
    seen.expect(&[(Status::OperandBusy, Operand::TD_EPOCH)]);
    done(rig.td.mem_track());
}

#[test]
fn row_20_split_with_an_interrupt_pending() {
    let rig = Rig::running();
    done(rig.td.mem_page_aug(at(FREE_LARGE, LARGE), large_page(0)));
    rig.block_and_track(FREE_LARGE, LARGE);
    rig.td.pend_interrupts(2);
    for _ in 0..2 {
        let registers = rig.refused(
            |td| td.mem_page_demote(at(FREE_LARGE, LARGE), page(9)),
            Status::InterruptedRestartable,
            NONE,
        );
        assert_eq!(registers, (None, None));
    }
    done(rig.td.mem_page_demote(at(FREE_LARGE, LARGE), page(9)));
    assert_eq!(rig.module.violation_count(), 0);
}

#[test]
fn one_track_serves_eight_removals() {
    let (rig, mut vcpu) = running_with_vcpu();
    for n in 0..8 {
        rig.map(n * 0x1000, PAGE, page(9 + n));
    }
    enter(&mut vcpu);
    for n in 0..8 {
        done(rig.td.mem_range_block(at(n * 0x1000, PAGE)));
    }
    done(rig.td.mem_track());
    vcpu.exit(Exit::Other { rip: 0 });
    enter(&mut vcpu);
    for n in 0..8 {
        done(rig.td.mem_page_remove(at(n * 0x1000, PAGE)));
    }
    let counts = rig.td.call_counts();
    assert_eq!(counts.of(Call::MemTrack).made, 1);
    assert_eq!(counts.of(Call::MemPageRemove).done, 8);
    assert_eq!(counts.of_host().busy, 0);
    assert_eq!(rig.module.violations(), []);
}
