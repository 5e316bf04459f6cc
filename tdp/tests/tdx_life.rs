//! A TD's life on the model: what each state admits, building, migration, teardown, what the guest sees.
#![cfg(not(loom))]

mod tdx_support;

use std::time::{Duration, Instant};
use tdp::protected::tdx::{
    Accept, Answer, Call, Costs, Enter, EntryState, Exit, Hooks, Lifecycle, Measured, OpState,
    Operand, PageInfo, PageKind, Status, Td, TdConfig, TdxConfig, TdxModule, Wait,
    ZERO_STEP_FAULTS,
};
use tdp::{Gpa, Hpa, Level, Pfn};
use tdp_arch::cpu::SoftwareVcpu;
use tdp_arch::walker::{GuestAccess, PhysicalMemory, WalkError};
use tdx_support::{
    HUGE, LARGE, MEMORY, Meanwhile, PAGE, Rig, TOP, accepted, at, control, done, large_page, page,
};

/// The way to an operational state, from a TD that is created.
fn reach(td: &Td, state: OpState) {
    use OpState as S;
    let way: &[OpState] = match state {
        S::Uninitialized | S::Initialized | S::Runnable => &[],
        S::LiveExport => &[S::LiveExport],
        S::PausedExport => &[S::LiveExport, S::PausedExport],
        S::PostExport => &[S::LiveExport, S::PausedExport, S::PostExport],
        S::MemoryImport => &[S::MemoryImport],
        S::StateImport => &[S::MemoryImport, S::StateImport],
        S::PostImport => &[S::MemoryImport, S::StateImport, S::PostImport],
        S::LiveImport => &[
            S::MemoryImport,
            S::StateImport,
            S::PostImport,
            S::LiveImport,
        ],
        S::FailedImport => &[S::MemoryImport, S::FailedImport],
    };
    let built = matches!(
        state,
        S::Runnable | S::LiveExport | S::PausedExport | S::PostExport
    );
    if built || state == S::Initialized {
        done(td.mng_init());
    }
    if built {
        drop(td.vp_create(control(3)).unwrap());
        done(td.mr_finalize());
    }
    for step in way {
        done(td.migrate(*step));
    }
    assert_eq!(td.op_state(), state);
}

#[test]
fn every_state_admits_the_calls_of_the_manual_and_no_others() {
    use OpState as S;
    const ALL: [OpState; 11] = [
        S::Uninitialized,
        S::Initialized,
        S::Runnable,
        S::LiveExport,
        S::PausedExport,
        S::PostExport,
        S::MemoryImport,
        S::StateImport,
        S::PostImport,
        S::LiveImport,
        S::FailedImport,
    ];
    // One column for each state, in that order.
    type Row = (&'static str, fn(&Td) -> Answer, [u8; 11]);
    #[rustfmt::skip]
    let table: [Row; 13] = [
        ("SEPT.ADD", |td| td.mem_sept_add(at(0, LARGE), page(9)), [0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0]),
        ("SEPT.REMOVE", |td| td.mem_sept_remove(at(0, LARGE)), [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("SEPT.RD", |td| td.mem_sept_rd(at(0, PAGE)), [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("PAGE.ADD", |td| td.mem_page_add(at(0, PAGE), page(9), page(10)), [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("MR.EXTEND", |td| td.mr_extend(Gpa(0)), [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("PAGE.AUG", |td| td.mem_page_aug(at(0, PAGE), page(9)), [0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0]),
        ("RANGE.BLOCK", |td| td.mem_range_block(at(0, PAGE)), [0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0]),
        ("RANGE.UNBLOCK", |td| td.mem_range_unblock(at(0, PAGE)), [0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0]),
        ("PAGE.DEMOTE", |td| td.mem_page_demote(at(0, LARGE), page(9)), [0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0]),
        ("PAGE.PROMOTE", |td| td.mem_page_promote(at(0, LARGE)), [0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0]),
        ("PAGE.REMOVE", |td| td.mem_page_remove(at(0, PAGE)), [0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1]),
        ("TRACK", |td| td.mem_track(), [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]),
        ("MNG.INIT", |td| td.mng_init(), [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    ];
    for (name, call, admitted) in table {
        for (state, admitted) in ALL.into_iter().zip(admitted) {
            let rig = Rig::created(Costs::default(), ());
            reach(&rig.td, state);
            let answer = call(&rig.td);
            assert_eq!(
                answer.status != Status::OpStateIncorrect,
                admitted == 1,
                "{name} in {state:?} answered {answer}"
            );
        }
    }
}

#[test]
fn a_td_that_is_not_alive_admits_nothing_but_its_end() {
    let rig = Rig::created(Costs::default(), ());
    let td = &rig.td;
    done(td.mng_init());
    rig.add_tables();
    let mut vcpu = td.vp_create(control(3)).unwrap();
    done(td.mem_page_add(at(0, PAGE), page(9), page(10)));
    done(td.mr_finalize());
    done(td.mem_page_aug(at(0x20_0000, LARGE), large_page(0)));
    let is = |answer: Answer, status, operand| assert!(answer.is(status, operand), "{answer}");

    // A vCPU inside holds the TD's root page.
    assert!(matches!(vcpu.enter(0), Enter::Inside(_)));
    is(td.mng_vpflushdone(), Status::OperandBusy, Operand::RCX);
    is(vcpu.flush(), Status::OperandBusy, Operand::RCX);
    vcpu.exit(Exit::Other { rip: 0 });
    is(td.mng_vpflushdone(), Status::FlushVpNotDone, Operand::NONE);
    done(vcpu.flush());
    is(vcpu.flush(), Status::VcpuNotAssociated, Operand::NONE);
    is(
        td.mng_key_freeid(),
        Status::LifecycleStateIncorrect,
        Operand::NONE,
    );
    is(
        td.phymem_page_reclaim(page(9)),
        Status::LifecycleStateIncorrect,
        Operand::NONE,
    );

    done(td.mng_vpflushdone());
    assert_eq!(td.lifecycle(), Lifecycle::Blocked);
    let dead = [
        td.mem_page_remove(at(0, PAGE)),
        td.mem_range_block(at(0, PAGE)),
        td.mem_track(),
        td.mem_sept_rd(at(0, PAGE)),
    ];
    for answer in dead {
        is(answer, Status::TdKeysNotConfigured, Operand::NONE);
    }
    assert!(matches!(
        vcpu.enter(0),
        Enter::Refused(a) if a.is(Status::TdKeysNotConfigured, Operand::NONE)
    ));
    is(
        td.mng_key_freeid(),
        Status::WbCacheNotComplete,
        Operand::NONE,
    );
    done(td.phymem_cache_wb());
    done(td.mng_key_freeid());

    // Any order, parents before children, one call a page; the large page whole and by its first address.
    let before = td.call_counts().of(Call::PhymemPageReclaim).done;
    is(
        td.phymem_page_reclaim(control(0)),
        Status::TdAssociatedPagesExist,
        Operand::NONE,
    );
    is(
        td.phymem_page_reclaim(Hpa(large_page(0).0 + 0x1000)),
        Status::OperandInvalid,
        Operand::RCX,
    );
    let pages = [
        (page(3), PageKind::Ept),
        (control(2), PageKind::Tdcx),
        (large_page(0), PageKind::Reg),
        (page(9), PageKind::Reg),
        (control(3), PageKind::Tdvpr),
        (page(5), PageKind::Ept),
        (control(1), PageKind::Tdcx),
        (page(4), PageKind::Ept),
        (control(0), PageKind::Tdr),
    ];
    for (address, kind) in pages {
        let answer = td.phymem_page_reclaim(address);
        assert!(answer.is_success(), "{address}: {answer}");
        assert_eq!(answer.rcx, Some(kind as u64));
        assert_eq!(answer.rdx, Some(control(0).0));
        is(
            td.phymem_page_reclaim(address),
            Status::PageMetadataIncorrect,
            Operand::RCX,
        );
    }
    let made = td.call_counts().of(Call::PhymemPageReclaim).done - before;
    assert_eq!(made, pages.len() as u64);
    assert_eq!(td.child_count(), 0);
    is(td.mem_track(), Status::PageMetadataIncorrect, Operand::RCX);
    is(
        td.mem_sept_rd(at(0, PAGE)),
        Status::PageMetadataIncorrect,
        Operand::RDX,
    );
    for pfn in MEMORY.start.0..MEMORY.end.0 {
        let (kind, _) = rig.module.page_kind(Hpa(pfn << 12)).unwrap();
        assert_eq!(kind, PageKind::Nda);
    }
    // The pages are free for another TD.
    assert!(
        rig.module
            .create_td(TdConfig::new(page(3), control(0), large_page(0)))
            .is_ok()
    );
}

#[test]
fn building_is_measured_in_order() {
    let rig = Rig::building();
    let td = &rig.td;
    rig.add_tables();
    let absent = |answer: Answer, operand| {
        assert!(answer.is(Status::EptEntryNotPresent, operand), "{answer}");
    };
    absent(td.mr_extend(Gpa(0)), Operand::RCX);
    done(td.mem_page_aug(at(0x2000, PAGE), page(11)));
    absent(td.mr_extend(Gpa(0x2000)), Operand::NONE);
    done(td.mem_page_add(at(0x1000, PAGE), page(9), page(20)));
    done(td.mr_extend(Gpa(0x1100)));
    done(td.mr_extend(Gpa(0x1000)));
    done(td.mem_page_add(at(0, PAGE), page(10), page(21)));
    assert!(
        td.mr_extend(Gpa(0x1080))
            .is(Status::OperandInvalid, Operand::RCX)
    );
    assert!(td.mr_finalize().is(Status::NoVcpus, Operand::NONE));
    drop(td.vp_create(control(3)).unwrap());
    done(td.mr_finalize());
    let page = |gpa, source| Measured::Page {
        gpa: Gpa(gpa),
        source,
    };
    assert_eq!(
        td.measured(),
        [
            page(0x1000, tdx_support::page(20)),
            Measured::Chunk { gpa: Gpa(0x1100) },
            Measured::Chunk { gpa: Gpa(0x1000) },
            page(0, tdx_support::page(21)),
            Measured::Final,
        ]
    );
}

#[test]
fn building_excludes_every_other_call() {
    let meanwhile = Meanwhile::default();
    let rig = Rig::created(Costs::default(), meanwhile.clone());
    done(rig.td.mng_init());
    rig.add_tables();
    let td = rig.td.clone();
    meanwhile.inside(Call::MemPageAdd, move || {
        let busy = td.mem_sept_rd(at(0, PAGE));
        assert!(busy.is(Status::OperandBusy, Operand::RDX), "{busy}");
        let busy = td.mem_track();
        assert!(busy.is(Status::OperandBusy, Operand::RCX), "{busy}");
    });
    done(rig.td.mem_page_add(at(0, PAGE), page(9), page(10)));
    assert!(meanwhile.is_over());

    drop(rig.td.vp_create(control(3)).unwrap());
    done(rig.td.mr_finalize());
    let td = rig.td.clone();
    meanwhile.inside(Call::Migrate, move || {
        let busy = td.mem_sept_rd(at(0, PAGE));
        assert!(busy.is(Status::OperandBusy, Operand::OP_STATE), "{busy}");
    });
    done(rig.td.migrate(OpState::LiveExport));
    assert!(meanwhile.is_over());
    assert_eq!(rig.module.violation_count(), 0);
}

#[test]
fn who_comes_back_from_a_pause_has_forgotten_everything() {
    let rig = Rig::created(Costs::default(), ());
    let td = &rig.td;
    done(td.mng_init());
    rig.add_tables();
    let mut vcpu = td.vp_create(control(3)).unwrap();
    done(td.mr_finalize());
    rig.map(0, PAGE, page(9));
    let entered = |enter| match enter {
        Enter::Inside(entered) => entered.flush,
        other => panic!("{other:?}"),
    };
    assert!(entered(vcpu.enter(0)));
    done(td.migrate(OpState::LiveExport));
    let busy = td.migrate(OpState::PausedExport);
    assert!(busy.is(Status::OperandBusy, Operand::RCX), "{busy}");
    vcpu.exit(Exit::Other { rip: 0 });
    done(td.migrate(OpState::PausedExport));
    // Neither blocked nor tracked; then the export is given up.
    done(td.mem_page_remove(at(0, PAGE)));
    done(td.migrate(OpState::Runnable));
    assert!(entered(vcpu.enter(0)));
}

#[test]
fn what_is_removed_during_an_import_stays_marked() {
    let rig = Rig::created(Costs::default(), ());
    let td = &rig.td;
    reach(td, OpState::LiveImport);
    rig.add_tables();
    rig.map(0, PAGE, page(9));
    rig.block_and_track(0, PAGE);
    done(td.mem_page_remove(at(0, PAGE)));
    let entry = td.entry(Gpa(0), PAGE).unwrap();
    assert_eq!((entry.state, entry.page), (EntryState::Removed, None));
    rig.block_and_track(0, LARGE);
    let answer = td.mem_sept_remove(at(0, LARGE));
    assert!(answer.is(Status::EptPageNotFree, Operand::RCX));
    done(td.mem_range_unblock(at(0, LARGE)));
    done(td.mem_page_aug(at(0, PAGE), page(9)));
}

#[test]
fn the_guest_sees_what_it_accepted_until_it_has_to_forget_it() {
    let rig = Rig::created(Costs::default(), ());
    let td = &rig.td;
    done(td.mng_init());
    rig.add_tables();
    let mut vcpu = td.vp_create(control(3)).unwrap();
    done(td.mr_finalize());
    let mut processor = SoftwareVcpu::<_, 64>::new(td.walker(), td.root());
    let write = |processor: &mut SoftwareVcpu<_, 64>, gpa| {
        processor.access(&rig.module, Gpa(gpa), GuestAccess::Write)
    };

    assert!(matches!(vcpu.enter(0), Enter::Inside(entered) if entered.flush));
    processor.flush_all();
    done(td.mem_page_aug(at(0x3000, PAGE), page(9)));
    assert!(matches!(
        write(&mut processor, 0x3000),
        Err(WalkError::Fault(_))
    ));
    done(accepted(td.page_accept(at(0x3000, PAGE))));
    let found = write(&mut processor, 0x3123).unwrap();
    assert_eq!(found.hpa, Hpa(page(9).0 + 0x123));

    // Blocked: whoever walks finds nothing, but this one does not walk.
    done(td.mem_range_block(at(0x3000, PAGE)));
    assert!(td.translate(Gpa(0x3000), GuestAccess::Read).is_err());
    assert!(write(&mut processor, 0x3000).is_ok());
    done(td.mem_track());
    assert!(!td.mem_page_remove(at(0x3000, PAGE)).is_success());
    vcpu.exit(Exit::Other { rip: 0 });
    done(td.mem_page_remove(at(0x3000, PAGE)));
    assert!(matches!(vcpu.enter(0), Enter::Inside(entered) if entered.flush));
    processor.flush_all();
    assert!(write(&mut processor, 0x3000).is_err());
    vcpu.exit(Exit::Other { rip: 0 });
    assert!(matches!(vcpu.enter(0), Enter::Inside(entered) if !entered.flush));
    vcpu.exit(Exit::Other { rip: 0 });

    // A table that was taken away is no memory any more.
    let slot = Hpa(page(5).0 + 3 * 8);
    assert!(rig.module.load(slot).is_some());
    rig.block_and_track(0, LARGE);
    done(td.mem_sept_remove(at(0, LARGE)));
    assert_eq!(rig.module.load(slot), None);
    assert_eq!(rig.module.violation_count(), 0);
}

#[test]
fn a_guest_that_is_sent_back_without_help_takes_the_tree() {
    let meanwhile = Meanwhile::default();
    let rig = Rig::created(Costs::default(), meanwhile.clone());
    let td = &rig.td;
    done(td.mng_init());
    rig.add_tables();
    let mut vcpu = td.vp_create(control(3)).unwrap();
    done(td.mr_finalize());
    let gpa = Gpa(0x5000);
    let fault = Exit::EptViolation { gpa, rip: 0x10 };

    for n in 0..ZERO_STEP_FAULTS {
        assert!(!vcpu.is_suspected(), "after {n} faults");
        assert!(matches!(vcpu.enter(0x10), Enter::Inside(_)));
        vcpu.exit(fault);
    }
    assert!(vcpu.is_suspected());
    // Nothing was done about its fault: it does not even get in.
    let entered = vcpu.enter(0x10);
    assert!(matches!(entered, Enter::Exited(exit) if exit.gpa == gpa));
    assert!(!vcpu.is_inside());
    // It left no trace in the epoch.
    done(td.mem_track());
    done(td.mem_track());

    // And it meets the host in the lock of the tree.
    let vcpu = std::sync::Arc::new(std::sync::Mutex::new(vcpu));
    let guest = vcpu.clone();
    meanwhile.inside(Call::MemPageAug, move || {
        let entered = guest.lock().unwrap().enter(0x10);
        assert!(
            matches!(entered, Enter::Refused(a) if a.is(Status::OperandBusy, Operand::SEPT_TREE)),
            "{entered:?}"
        );
    });
    done(td.mem_page_aug(at(gpa.0, PAGE), page(9)));
    assert!(meanwhile.is_over());
    done(accepted(td.page_accept(at(gpa.0, PAGE))));
    let mut vcpu = vcpu.lock().unwrap();
    assert!(matches!(vcpu.enter(0x10), Enter::Inside(_)));
    assert!(vcpu.is_suspected(), "until it gets past the instruction");
    vcpu.exit(Exit::Other { rip: 0x14 });
    assert!(!vcpu.is_suspected());
}

#[test]
fn operands_are_checked_before_anything_is_touched() {
    let rig = Rig::running();
    let invalid = [
        PageInfo::from_raw(5),                 // level beyond the root
        PageInfo::from_raw(8),                 // reserved bit 3
        PageInfo::from_raw(1 << 52),           // reserved bit 52
        PageInfo::new(Gpa(1 << 47), PAGE),     // shared
        PageInfo::new(Gpa(0x1000), Level::L2), // misaligned
    ];
    for info in invalid {
        rig.refused(
            |td| td.mem_range_block(info),
            Status::OperandInvalid,
            Operand::RCX,
        );
        let accept = rig.td.page_accept(info);
        assert!(
            matches!(accept, Accept::Answered(a) if a.is(Status::OperandInvalid, Operand::RCX))
        );
    }
    let pages = [
        (Hpa(page(9).0 + 8), Status::OperandInvalid),
        (Hpa(1 << 52), Status::OperandInvalid),
        (MEMORY.end.address(), Status::OperandAddrRangeError),
        (Hpa(0), Status::OperandAddrRangeError),
        (control(1), Status::PageMetadataIncorrect),
    ];
    for (page, status) in pages {
        rig.refused(|td| td.mem_page_aug(at(0, PAGE), page), status, Operand::R8);
    }
    assert!(TdxModule::new(TdxConfig::new(Pfn(5)..Pfn(5))).is_err());
    assert!(TdxModule::new(TdxConfig::new(Pfn(0)..Pfn(1 << 41))).is_err());
}

struct Unwilling;

impl Hooks for Unwilling {
    fn refuse(&self, call: Call) -> Option<(Status, Operand)> {
        (call == Call::MemTrack).then_some((Status::OperandBusy, Operand::TD_EPOCH))
    }
}

#[test]
fn injected_refusals_are_counted_and_not_audited() {
    let rig = Rig::running_with(Costs::default(), Unwilling);
    let answer = rig.td.mem_track();
    assert!(answer.is(Status::OperandBusy, Operand::TD_EPOCH));
    assert_eq!((answer.rcx, rig.td.epoch()), (None, 1));
    let count = rig.td.call_counts().of(Call::MemTrack);
    assert_eq!((count.made, count.done, count.busy), (1, 0, 1));
    assert_eq!(rig.module.violation_count(), 0);
}

#[test]
fn the_log_says_which_call_was_wrong() {
    let rig = Rig::running();
    assert!(!rig.td.mem_page_aug(at(0, HUGE), page(9)).is_success());
    assert!(!rig.td.mem_sept_add(at(0, TOP), page(9)).is_success());
    let notes = rig.module.take_violations();
    assert_eq!(rig.module.violation_count(), 0);
    let text: Vec<_> = notes.iter().map(ToString::to_string).collect();
    assert_eq!(
        text,
        [
            "TDH.MEM.PAGE.AUG(0x2, 0x1009000) of TD 0x4000000 -> OPERAND_INVALID op=1 rcx=0 rdx=0",
            "TDH.MEM.SEPT.ADD(0x3, 0x1009000) of TD 0x4000000 -> \
             EPT_ENTRY_STATE_INCORRECT op=1 rcx=7 rdx=8403",
        ]
    );
}

#[test]
fn calls_last_as_long_as_they_cost() {
    for wait in [Wait::Spin, Wait::Sleep] {
        let costs =
            Costs::uniform(wait, Duration::ZERO).with(Call::MemTrack, Duration::from_millis(3));
        let rig = Rig::running_with(costs, ());
        let begin = Instant::now();
        done(rig.td.mem_track());
        assert!(begin.elapsed() >= Duration::from_millis(3));
    }
}

/// A TD that cannot be made takes none of its pages.
#[test]
fn a_td_of_impossible_shape_or_of_pages_that_are_not_free_is_refused() {
    let rig = Rig::created(Costs::default(), ());
    let free = TdConfig::new(page(0), page(1), page(2));
    let shared_bit = |shared_bit| TdConfig { shared_bit, ..free };
    let levels = |levels| TdConfig { levels, ..free };
    let invalid = (Status::OperandInvalid, Operand::RDX);
    let taken = (Status::PageMetadataIncorrect, Operand::RCX);
    let cases = [
        (shared_bit(31), invalid),
        (shared_bit(52), invalid),
        (levels(Level::L3), invalid),
        (
            TdConfig {
                tdr: control(0),
                ..free
            },
            taken,
        ),
        (
            TdConfig {
                control: control(1),
                ..free
            },
            taken,
        ),
        (
            TdConfig {
                root: control(2),
                ..free
            },
            taken,
        ),
        (
            TdConfig {
                root: Hpa(page(2).0 + 8),
                ..free
            },
            (Status::OperandInvalid, Operand::RCX),
        ),
        (
            TdConfig {
                tdr: MEMORY.end.address(),
                ..free
            },
            (Status::OperandAddrRangeError, Operand::RCX),
        ),
    ];
    for (config, (status, operand)) in cases {
        let refused = rig.module.create_td(config).expect_err("it is impossible");
        assert!(refused.is(status, operand), "{config:?}: {refused}");
        for n in 0..3 {
            let free = Some((PageKind::Nda, PAGE));
            assert_eq!(rig.module.page_kind(page(n)), free, "{config:?}");
        }
    }
    assert_eq!(rig.module.page_kind(MEMORY.end.address()), None);
    let td = rig.module.create_td(free).unwrap();
    assert_eq!((td.tdr(), td.root(), td.levels()), (page(0), page(2), TOP));
    assert_eq!(td.module().page_kind(page(0)), Some((PageKind::Tdr, PAGE)));
    // Two TDs of one module, which shows how it is without waiting for either.
    let shown = format!("{:?}", td.module());
    assert!(shown.contains("violations: 0"), "{shown}");
}

#[test]
fn a_vcpu_is_made_of_a_free_page_and_is_inside_once() {
    let rig = Rig::created(Costs::default(), ());
    let td = &rig.td;
    done(td.mng_init());
    let taken = td.vp_create(control(1)).map(drop);
    assert!(matches!(taken, Err(a) if a.is(Status::PageMetadataIncorrect, Operand::RCX)));
    let mut vcpu = td.vp_create(control(3)).unwrap();
    vcpu.exit(Exit::Other { rip: 0 });
    assert_eq!((vcpu.tdvpr(), vcpu.td().tdr()), (control(3), td.tdr()));
    // Not before the TD is finalised.
    let entered = vcpu.enter(0);
    assert!(
        matches!(entered, Enter::Refused(a) if a.is(Status::OpStateIncorrect, Operand::NONE)),
        "{entered:?}"
    );
    done(td.mr_finalize());
    assert!(matches!(vcpu.enter(0), Enter::Inside(_)));
    let entered = vcpu.enter(0);
    assert!(
        matches!(entered, Enter::Refused(a) if a.is(Status::OperandBusy, Operand::RCX)),
        "{entered:?}"
    );
    assert!(vcpu.is_inside());
    // Dropped, it has left, and nothing waits for it.
    drop(vcpu);
    done(td.mem_track());
    done(td.mem_track());
    // A page that is in use and a TD that cannot run yet are a host's mistakes; that its vCPU is inside is none.
    assert_eq!(rig.module.violation_count(), 2);
}

/// Only what its host is to blame for speaks for single-stepping: a shared page is the guest's own affair.
#[test]
fn faults_at_shared_addresses_do_not_make_a_vcpu_suspected() {
    let rig = Rig::created(Costs::default(), ());
    done(rig.td.mng_init());
    let mut vcpu = rig.td.vp_create(control(3)).unwrap();
    done(rig.td.mr_finalize());
    let at = |gpa| Exit::EptViolation {
        gpa: Gpa(gpa),
        rip: 0x10,
    };
    for _ in 0..2 * ZERO_STEP_FAULTS {
        assert!(matches!(vcpu.enter(0x10), Enter::Inside(_)));
        vcpu.exit(at(1 << 47 | 0x5000));
        assert!(!vcpu.is_suspected());
    }
    for _ in 0..ZERO_STEP_FAULTS {
        assert!(matches!(vcpu.enter(0x10), Enter::Inside(_)));
        vcpu.exit(at(0x5000));
    }
    assert!(vcpu.is_suspected());
}

/// Every step from a state to a state that there is; there is no other.
#[test]
fn migration_takes_these_steps_and_no_others() {
    use OpState as S;
    let all = [
        S::Uninitialized,
        S::Initialized,
        S::Runnable,
        S::LiveExport,
        S::PausedExport,
        S::PostExport,
        S::MemoryImport,
        S::StateImport,
        S::PostImport,
        S::LiveImport,
        S::FailedImport,
    ];
    let steps = [
        (S::Runnable, S::LiveExport),
        (S::LiveExport, S::PausedExport),
        (S::PausedExport, S::PostExport),
        // An export that is given up.
        (S::LiveExport, S::Runnable),
        (S::PausedExport, S::Runnable),
        (S::PostExport, S::Runnable),
        (S::Uninitialized, S::MemoryImport),
        (S::MemoryImport, S::StateImport),
        (S::StateImport, S::PostImport),
        (S::PostImport, S::LiveImport),
        (S::PostImport, S::Runnable),
        (S::LiveImport, S::Runnable),
        // An import that fails before the TD may run.
        (S::MemoryImport, S::FailedImport),
        (S::StateImport, S::FailedImport),
        (S::PostImport, S::FailedImport),
    ];
    for from in all {
        for to in all {
            let there_is = steps.contains(&(from, to));
            assert_eq!(from.leads_to(to), there_is, "{from:?} to {to:?}");
            let rig = Rig::created(Costs::default(), ());
            reach(&rig.td, from);
            if there_is {
                done(rig.td.migrate(to));
                assert_eq!(rig.td.op_state(), to);
            } else {
                rig.refused(|td| td.migrate(to), Status::OpStateIncorrect, Operand::NONE);
            }
        }
    }
}

/// The module's memory need not begin or end with a large page. One of which a part is outside of it is none of the module's.
#[test]
fn a_large_page_lies_in_the_memory_of_the_module_as_a_whole() {
    let page = |pfn: u64| Hpa(pfn << 12);
    for (memory, whole, parts) in [
        (0x1001..0x1a00, [0x1200, 0x1800], [0x1000, 0x1a00]),
        (0x1001..0x19ff, [0x1200, 0x1600], [0x1000, 0x1800]),
        (0x1001..0x1801, [0x1200, 0x1600], [0x1000, 0x1800]),
    ] {
        let config = TdxConfig::new(Pfn(memory.start)..Pfn(memory.end));
        let module = TdxModule::new(config).unwrap();
        let [tdr, control, root] = [0x1001, 0x1002, 0x1003].map(page);
        let td = module.create_td(TdConfig::new(tdr, control, root)).unwrap();
        done(td.mng_init());
        for (n, level) in [(0x1004, TOP), (0x1005, HUGE)] {
            done(td.mem_sept_add(at(0, level), page(n)));
        }
        for part in parts {
            let answer = td.mem_page_aug(at(0, LARGE), page(part));
            assert!(
                answer.is(Status::OperandAddrRangeError, Operand::R8),
                "{part:#x} of {memory:x?}: {answer}"
            );
        }
        for (n, whole) in (0..).zip(whole) {
            done(td.mem_page_aug(at(n << 21, LARGE), page(whole)));
        }
        // The very first page and the very last, and none beside them.
        assert_eq!(module.page_kind(page(memory.start - 1)), None);
        let first = module.page_kind(page(memory.start));
        assert_eq!(first, Some((PageKind::Tdr, PAGE)));
        assert!(module.page_kind(page(memory.end - 1)).is_some());
        assert_eq!(module.page_kind(page(memory.end)), None);
    }
}

/// The key of one TD is given up, not of all: what belongs to another is not reclaimed with it, nor what belongs to nobody.
#[test]
fn a_dead_td_has_none_but_its_own_pages_reclaimed() {
    let rig = Rig::running();
    let config = TdConfig::new(page(20), page(21), page(22));
    let other = rig.module.create_td(config).unwrap();
    done(other.mng_init());
    done(other.mem_sept_add(at(0, TOP), page(23)));
    done(rig.td.mem_page_aug(at(0, PAGE), page(9)));
    done(rig.td.mng_vpflushdone());
    done(rig.td.phymem_cache_wb());
    done(rig.td.mng_key_freeid());
    let children = other.child_count();
    // The other's root page, its control page, its root and its table; then a free page.
    for n in [20, 21, 22, 23, 30] {
        rig.refused(
            |td| td.phymem_page_reclaim(page(n)),
            Status::PageMetadataIncorrect,
            Operand::RCX,
        );
    }
    assert_eq!(other.child_count(), children);
    done(other.mem_sept_add(at(0, HUGE), page(24)));
    done(rig.td.phymem_page_reclaim(page(9)));
    // Nor is one of its own by the other, which lives.
    let answer = other.phymem_page_reclaim(page(3));
    assert!(
        answer.is(Status::PageMetadataIncorrect, Operand::RCX),
        "{answer}"
    );
}

/// Two TRACKs after a block nobody can have the translation any more, whoever is inside since.
#[test]
fn who_entered_two_epochs_after_a_block_is_not_waited_for() {
    let rig = Rig::created(Costs::default(), ());
    let td = &rig.td;
    done(td.mng_init());
    rig.add_tables();
    let [mut one, mut two] = [3, 4].map(|n| td.vp_create(control(n)).unwrap());
    done(td.mr_finalize());
    rig.map(0, PAGE, page(9));
    rig.map(0x1000, PAGE, page(10));
    for gpa in [0, 0x1000] {
        done(td.mem_range_block(at(gpa, PAGE)));
    }
    let inside = |vcpu: &mut tdp::protected::tdx::TdVcpu| {
        assert!(matches!(vcpu.enter(0), Enter::Inside(_)));
    };
    // One epoch later there is room for those from before, and there are none.
    done(td.mem_track());
    inside(&mut one);
    done(td.mem_page_remove(at(0, PAGE)));
    done(td.mem_track());
    inside(&mut two);
    done(td.mem_page_remove(at(0x1000, PAGE)));
    // Who is inside since the epoch before holds up the next one, and only that.
    rig.refused(Td::mem_track, Status::PreviousTlbEpochBusy, Operand::NONE);
    one.exit(Exit::Other { rip: 0 });
    done(td.mem_track());
    assert_eq!(rig.module.violation_count(), 0);
}

/// An address is private if the tables reach it, which may be less than what the shared bit leaves.
#[test]
fn an_address_past_the_tables_is_not_private() {
    let rig = Rig::created(Costs::default(), ());
    let config = TdConfig {
        shared_bit: 51,
        levels: TOP,
        ..TdConfig::new(page(20), page(21), page(22))
    };
    let td = rig.module.create_td(config).unwrap();
    done(td.mng_init());
    let limit = 1 << 48;
    let last = limit - HUGE.bytes() * 512;
    done(td.mem_sept_add(at(last, TOP), page(23)));
    for gpa in [limit, limit + HUGE.bytes() * 512, 1 << 51] {
        let answer = td.mem_sept_add(at(gpa, TOP), page(24));
        assert!(
            answer.is(Status::OperandInvalid, Operand::RCX),
            "{gpa:#x}: {answer}"
        );
    }
}

/// Status and operand both count.
#[test]
fn an_answer_is_what_it_says_and_nothing_else() {
    let rig = Rig::building();
    let answer = rig.td.mem_page_aug(at(0, PAGE), page(9));
    assert!(answer.is(Status::EptWalkFailed, Operand::RCX));
    assert!(!answer.is(Status::EptWalkFailed, Operand::R8));
    assert!(!answer.is(Status::OperandInvalid, Operand::RCX));
    assert!(!answer.is(Status::Success, Operand::NONE) && !answer.is_success());
}

#[test]
fn a_page_of_the_image_is_copied_from_a_whole_page() {
    let rig = Rig::building();
    rig.add_tables();
    rig.refused(
        |td| td.mem_page_add(at(0, PAGE), page(9), Hpa(page(10).0 + 8)),
        Status::OperandInvalid,
        Operand::R9,
    );
    done(rig.td.mem_page_add(at(0, PAGE), page(9), page(10)));
}

/// Of all that a dead TD has, its pages go by one call each, and none goes while a call has the TD's root page.
#[test]
fn a_page_is_not_reclaimed_inside_a_call_that_ends_its_td() {
    let meanwhile = Meanwhile::default();
    let rig = Rig::running_with(Costs::default(), meanwhile.clone());
    let td = rig.td.clone();
    done(rig.td.mem_page_aug(at(0, PAGE), page(9)));
    meanwhile.inside(Call::MngVpFlushDone, move || {
        let busy = td.phymem_page_reclaim(page(9));
        assert!(busy.is(Status::OperandBusy, Operand::TDR), "{busy}");
    });
    done(rig.td.mng_vpflushdone());
    assert!(meanwhile.is_over());
    done(rig.td.phymem_cache_wb());
    done(rig.td.mng_key_freeid());
    done(rig.td.phymem_page_reclaim(page(9)));
}

/// A merge takes long enough to be interrupted. It has changed nothing then, and is made again.
#[test]
fn a_merge_with_an_interrupt_pending_is_made_again() {
    let rig = Rig::running();
    for n in 0..512 {
        rig.map(n * 0x1000, PAGE, Hpa(large_page(0).0 + n * 0x1000));
    }
    rig.block_and_track(0, LARGE);
    rig.td.pend_interrupts(2);
    for _ in 0..2 {
        let registers = rig.refused(
            |td| td.mem_page_promote(at(0, LARGE)),
            Status::InterruptedRestartable,
            Operand::NONE,
        );
        assert_eq!(registers, (None, None));
    }
    done(rig.td.mem_page_promote(at(0, LARGE)));
    assert_eq!(rig.module.violation_count(), 0);
}

/// An answer is one line that says what the registers would.
#[test]
fn an_answer_says_what_its_registers_hold() {
    let rig = Rig::running();
    let done = rig.td.mem_track();
    assert_eq!(done.to_string(), format!("{} op=0", Status::Success));
    let refused = rig.td.mem_page_aug(at(0x20_0000, PAGE), page(9));
    let (rcx, rdx) = (refused.rcx.unwrap(), refused.rdx.unwrap());
    let said = refused.to_string();
    let expected = format!(
        "{} op={} rcx={rcx:x} rdx={rdx:x}",
        Status::EptWalkFailed,
        Operand::RCX.0
    );
    assert_eq!(said, expected);
}

/// The numbers of the module's ABI: what RDX says of an entry.
#[test]
fn states_have_the_numbers_of_the_abi() {
    use EntryState as S;
    let numbers = [
        (S::Free, 0),
        (S::Removed, 5),
        (S::TableMapped, 0x84),
        (S::TableBlocked, 0x81),
        (S::Mapped, 4),
        (S::Blocked, 1),
        (S::BlockedW, 8),
        (S::ExportedBlockedW, 9),
        (S::ExportedDirty, 11),
        (S::ExportedDirtyBlockedW, 12),
        (S::Pending, 2),
        (S::PendingBlocked, 3),
        (S::PendingBlockedW, 16),
        (S::PendingExportedBlockedW, 17),
        (S::PendingExportedDirty, 19),
        (S::PendingExportedDirtyBlockedW, 20),
    ];
    assert_eq!(numbers.map(|(state, _)| state), S::ALL);
    for (state, number) in numbers {
        assert_eq!(state.architectural(), number, "{state:?}");
        assert_eq!(state.is_table(), number & 0x80 != 0, "{state:?}");
        let holds_nothing = matches!(state, S::Free | S::Removed);
        assert_eq!(state.is_leaf(), !state.is_table() && !holds_nothing);
        // What the guest reaches is a page, not blocked, and accepted.
        if state.is_accessible_leaf() {
            assert!(state.is_leaf() && !state.is_blocked(), "{state:?}");
        }
    }
}

/// Entries are walked with accessed and dirty flags off: whoever would set one finds that the word is not there to be changed.
#[test]
fn a_processor_changes_no_entry() {
    let rig = Rig::running();
    rig.map(0, PAGE, page(9));
    let slot = page(5);
    let word = rig.module.load(slot).expect("a table");
    let refused = rig.module.compare_exchange(slot, word, word | 1 << 8);
    assert_eq!(refused, Err(word));
    assert_eq!(rig.module.load(slot), Some(word));
    assert!(rig.td.translate(Gpa(0), GuestAccess::Write).is_ok());
    // A page of the guest is no table to be walked, and one that is not managed is no memory.
    assert_eq!(rig.module.load(page(9)), None);
    let nowhere = MEMORY.end.address();
    assert_eq!(rig.module.compare_exchange(nowhere, 0, 1), Err(0));
}
