//! Building, running, taking memory away, taking everything apart.

use crate::rig::{GUEST, PRIVATE_PFN, Rig, SHARED_PFN, SPACE, fixed, private, shared};
use std::sync::mpsc::channel;
use std::time::Duration;
use tdp::protected::HandOffStep;
use tdp::protected::tdx::{Call, Measured, Operand, Status};
use tdp::{
    DumpKind, Gfn, Gpa, ImageError, Level, MemoryFault, Outcome, Pfn, Phase, RetryReason,
    Visibility,
};

fn fault(reason: MemoryFault) -> Result<Outcome, tdp::FaultError> {
    Ok(Outcome::MemoryFault(reason))
}

#[test]
fn an_image_is_measured_in_the_order_of_its_pages() {
    let rig = Rig::building(Level::L1);
    let mut vcpu = rig.vcpu();
    assert_eq!(vcpu.fault(private(0)), fault(MemoryFault::NotFinalised));
    let mut image = rig.mmu.build_private().unwrap();
    let order = [7u64, 3, 0x205, 4];
    for &n in &order {
        image
            .add(Gfn(n), Pfn(PRIVATE_PFN.0 + n), Pfn(0x77 + n))
            .unwrap();
    }
    let again = image.add(Gfn(3), Pfn(PRIVATE_PFN.0 + 9), Pfn(0x77));
    assert!(matches!(again, Err(ImageError::Frame { gfn: Gfn(3), .. })));
    rig.check();
    image.finalise().unwrap();
    let measured: Vec<_> = rig
        .table()
        .td()
        .measured()
        .iter()
        .filter_map(|step| match step {
            Measured::Page { gpa, source } => Some((gpa.gfn().0, source.pfn().0)),
            _ => None,
        })
        .collect();
    assert_eq!(measured, order.map(|n| (n, 0x77 + n)));
    assert_eq!(rig.mmu.phase(), Some(Phase::Running));
    assert!(matches!(
        rig.mmu.build_private().map(drop),
        Err(ImageError::Phase {
            phase: Phase::Running
        })
    ));
    assert_eq!(vcpu.fault(private(7)), Ok(Outcome::Spurious));
    rig.check();
}

/// Every part of each page is measured, in order and after the page itself, and then the whole is closed.
#[test]
fn every_part_of_a_page_is_measured() {
    let rig = Rig::measuring();
    let mut image = rig.mmu.build_private().unwrap();
    for n in [7, 3] {
        image
            .add(Gfn(n), Pfn(PRIVATE_PFN.0 + n), Pfn(0x77))
            .unwrap();
    }
    image.finalise().unwrap();
    let mut expected = Vec::new();
    for gpa in [0x7000, 0x3000] {
        let source = Pfn(0x77).address();
        expected.push(Measured::Page {
            gpa: Gpa(gpa),
            source,
        });
        let chunks = (gpa..gpa + 0x1000).step_by(256);
        expected.extend(chunks.map(|gpa| Measured::Chunk { gpa: Gpa(gpa) }));
    }
    expected.push(Measured::Final);
    let measured = rig.table().td().measured();
    assert!(measured.ends_with(&expected), "{measured:x?}");
}

#[test]
fn a_private_fault_links_tables_top_down_and_installs_once() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    assert_eq!(vcpu.fault(private(5)), fixed(Level::L1));
    assert_eq!(vcpu.fault(private(5)), Ok(Outcome::Spurious));
    assert_eq!(vcpu.fault(private(6)), fixed(Level::L1));
    let stats = rig.mmu.stats();
    assert_eq!(stats.protected.calls_of(HandOffStep::Link), 3);
    assert_eq!(stats.protected.calls_of(HandOffStep::Install), 2);
    assert_eq!(stats.protected.busy, [0; 10]);
    assert_eq!((stats.pages, stats.tables), ([2, 0, 0], 3));
    rig.accept(5, Level::L1);
    rig.check();
}

#[test]
fn an_access_to_the_wrong_half_is_the_embedders() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    assert_eq!(vcpu.fault(shared(1)), fault(MemoryFault::IsPrivate));
    rig.mmu
        .convert(SPACE, Gfn(1)..Gfn(2), Visibility::Shared)
        .unwrap();
    assert_eq!(vcpu.fault(private(1)), fault(MemoryFault::IsShared));
    assert_eq!(vcpu.fault(shared(1)), fixed(Level::L1));
    assert_eq!(vcpu.fault(shared(1)), Ok(Outcome::Spurious));
    assert_eq!(vcpu.fault(private(2)), fixed(Level::L1));
    // The short way too: the slot is the one used last, and the tables of both halves are there.
    assert_eq!(vcpu.fault(shared(3)), fault(MemoryFault::IsPrivate));
    assert_eq!(vcpu.fault(private(1)), fault(MemoryFault::IsShared));
    // No slot, and an address wider than both halves.
    assert_eq!(vcpu.fault(private(GUEST)), fault(MemoryFault::NotBacked));
    assert_eq!(
        vcpu.fault(tdp::Fault::write(Gpa(1 << 48))),
        fault(MemoryFault::BeyondWidth)
    );
    rig.check();
}

#[test]
fn removal_takes_one_ticket_for_many_pages_and_gives_tables_back() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    for n in 0..1024 {
        assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
    }
    let twins = rig.table().twins_out();
    let removed = rig.mmu.zap_private(SPACE, Gfn(0)..Gfn(1024)).unwrap();
    assert_eq!(
        (removed.frames, removed.tables, removed.leaked),
        (1024, 2, 0)
    );
    let calls = rig.mmu.stats().protected;
    assert_eq!(calls.calls_of(HandOffStep::Block), 1024 + 2);
    assert_eq!(calls.calls_of(HandOffStep::Remove), 1024);
    assert_eq!(calls.calls_of(HandOffStep::Unlink), 2);
    assert_eq!(calls.calls_of(HandOffStep::Flush), 2);
    assert_eq!(rig.table().twins_out(), twins - 2);
    rig.check();
    assert_eq!(vcpu.fault(private(3)), fixed(Level::L1));
    assert_eq!(rig.mmu.stats().tables, 3);
    rig.check();
}

#[test]
fn a_part_of_a_table_leaves_the_table() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    for n in 0..8 {
        assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
    }
    let removed = rig.mmu.zap_private(SPACE, Gfn(2)..Gfn(5)).unwrap();
    assert_eq!((removed.frames, removed.tables), (3, 0));
    assert_eq!(vcpu.fault(private(1)), Ok(Outcome::Spurious));
    assert_eq!(vcpu.fault(private(2)), fixed(Level::L1));
    rig.check();
}

#[test]
fn a_dead_guest_costs_one_call_a_page() {
    let mut rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    for n in 0..600 {
        assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
    }
    drop(rig.td_vcpu.take());
    let td = rig.table().td().clone();
    assert!(td.mng_vpflushdone().is_success());
    assert!(td.phymem_cache_wb().is_success());
    assert!(td.mng_key_freeid().is_success());
    let before = rig.mmu.stats().protected;
    let removed = rig.mmu.reclaim_private().unwrap();
    assert_eq!(
        (removed.frames, removed.tables, removed.leaked),
        (600, 4, 0)
    );
    let after = rig.mmu.stats().protected;
    let calls: u64 = after.calls.iter().sum::<u64>() - before.calls.iter().sum::<u64>();
    assert_eq!(calls, 604);
    assert_eq!(after.calls_of(HandOffStep::Reclaim), 604);
    assert_eq!(rig.mmu.phase(), Some(Phase::Dead));
    assert_eq!(vcpu.fault(private(3)), fault(MemoryFault::NotBacked));
    // Control page and root table are the embedder's: three pages were given at the start, and the vCPU's.
    assert_eq!(td.child_count(), 3);
    assert_eq!(rig.mmu.stats().pages, [0; 3]);
}

#[test]
fn a_page_that_a_dead_guest_keeps_is_leaked_and_reported() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    for n in 0..4 {
        assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
    }
    // The key was never released: the module gives nothing back.
    let error = rig.mmu.reclaim_private().unwrap_err();
    assert_eq!((error.removed.frames, error.removed.tables), (0, 3));
    assert_eq!((error.failed, error.removed.leaked), (7, 7));
    assert_eq!(error.first.step, HandOffStep::Reclaim);
    assert_eq!(rig.mmu.stats().protected.leaked, 7);
    assert_eq!(rig.mmu.stats().pages, [0; 3]);
}

#[test]
fn a_slot_takes_its_private_memory_along() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    assert_eq!(vcpu.fault(private(1)), fixed(Level::L1));
    let id = rig.mmu.slots().list(SPACE)[0].id();
    rig.mmu.slots().remove(SPACE, id).unwrap();
    assert_eq!(rig.mmu.stats().pages, [0; 3]);
    assert_eq!(vcpu.fault(private(1)), fault(MemoryFault::NotBacked));
    rig.check();
}

#[test]
fn a_private_fault_in_a_window_is_sent_back_three_times_at_most() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    let window = rig.mmu.invalidate_begin(SPACE, Gfn(0)..Gfn(1));
    for _ in 0..3 {
        assert_eq!(
            vcpu.fault(private(0)),
            Ok(Outcome::Retry(RetryReason::Invalidation))
        );
    }
    // Now the wait goes on until the window closes.
    let (started, begun) = channel();
    let fault = std::thread::spawn(move || {
        started.send(()).unwrap();
        vcpu.fault(private(0))
    });
    begun.recv().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(!fault.is_finished());
    drop(window);
    assert_eq!(fault.join().unwrap(), fixed(Level::L1));
    assert_eq!(rig.mmu.stats().protected.sent_back, 3);
    rig.check();
}

#[test]
fn every_call_is_counted_as_the_module_counts_it() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    for n in 0..20 {
        assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
    }
    rig.mmu.zap_private(SPACE, Gfn(0)..Gfn(512)).unwrap();
    let counted = rig.mmu.stats().protected;
    let module = rig.table().td().call_counts();
    for step in HandOffStep::ALL {
        assert_eq!(
            counted.calls_of(step),
            module.of(Call::of_step(step)).made,
            "{}",
            step.name()
        );
    }
}

#[test]
fn faults_that_take_turns_are_each_sent_back_three_times_at_most() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    let window = rig.mmu.invalidate_begin(SPACE, Gfn(0)..Gfn(8));
    std::thread::scope(|scope| {
        // One instruction that touches two pages.
        let guest = scope.spawn(|| {
            let mut sent_back = [0; 2];
            while sent_back != [4; 2] {
                for n in 0..2 {
                    match vcpu.fault(private(n)) {
                        Ok(Outcome::Retry(_)) => sent_back[n as usize] += 1,
                        _ => return sent_back,
                    }
                }
            }
            sent_back
        });
        while rig.mmu.stats().protected.sent_back < 6 {
            assert!(!guest.is_finished());
            std::thread::yield_now();
        }
        // The seventh waits for as long as it takes.
        std::thread::sleep(Duration::from_millis(300));
        assert!(!guest.is_finished());
        drop(window);
        assert_eq!(guest.join().unwrap(), [3, 3]);
    });
    assert_eq!(rig.mmu.stats().protected.sent_back, 6);
    rig.check();
}

#[test]
fn an_image_page_beyond_the_guests_width_is_refused() {
    let rig = Rig::building(Level::L1);
    let mut image = rig.mmu.build_private().unwrap();
    let window = rig.mmu.invalidate_begin(SPACE, Gfn(0)..Gfn(1));
    for gfn in [Gfn(u64::MAX), Gfn(1 << 35)] {
        let added = image.add(gfn, PRIVATE_PFN, SHARED_PFN);
        assert!(matches!(added, Err(ImageError::Frame { .. })), "{added:?}");
    }
    drop(window);
}

#[test]
fn a_page_of_the_image_that_is_measured_on_a_busy_module_is_added_once() {
    let rig = Rig::measuring();
    let mut image = rig.mmu.build_private().unwrap();
    let mut calls = 0;
    rig.script.refuse(move |call| {
        calls += 1;
        let often = matches!(call, Call::MrExtend | Call::MemPageRemove) && calls % 2 == 0;
        often.then_some((Status::OperandBusy, Operand::TDR))
    });
    image.add(Gfn(3), PRIVATE_PFN, SHARED_PFN).unwrap();
    // One that cannot be measured is taken back, and is not there for either.
    rig.script
        .refuse(|call| (call == Call::MrExtend).then_some((Status::OperandInvalid, Operand::RCX)));
    assert!(
        image
            .add(Gfn(4), Pfn(PRIVATE_PFN.0 + 1), SHARED_PFN)
            .is_err()
    );
    rig.script.clear();
    let counts = rig.table().td().call_counts();
    assert_eq!(counts.of(Call::MemPageAdd).done, 2);
    assert_eq!(counts.of(Call::MrExtend).done, 16);
    rig.check();
}

/// A page of the image whose content the module stays too busy to measure is not left there unmeasured.
#[test]
fn a_page_of_the_image_that_is_never_measured_is_taken_back() {
    let rig = Rig::measuring();
    let mut image = rig.mmu.build_private().unwrap();
    rig.script
        .refuse(|call| (call == Call::MrExtend).then_some((Status::OperandBusy, Operand::TDR)));
    let refused = image.add(Gfn(3), PRIVATE_PFN, SHARED_PFN);
    assert!(matches!(
        refused,
        Err(ImageError::Frame { gfn: Gfn(3), .. })
    ));
    rig.script.clear();
    assert_eq!(rig.mmu.stats().pages, [0; 3]);
    rig.check();
    image.add(Gfn(3), PRIVATE_PFN, SHARED_PFN).unwrap();
    rig.check();
}

/// An entry that is with the module is in neither tree's leaves; the picture of the tables shows it for what it is.
#[test]
fn the_picture_of_the_tables_shows_both_halves_and_what_is_with_the_module() {
    let rig = Rig::running(Level::L1);
    let mut vcpu = rig.vcpu();
    rig.mmu
        .convert(SPACE, Gfn(512)..Gfn(1024), Visibility::Shared)
        .unwrap();
    for n in 0..3 {
        assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
        assert_eq!(vcpu.fault(shared(512 + n)), fixed(Level::L1));
    }
    let (is_inside, inside) = channel();
    let (go_on, goes_on) = channel::<()>();
    let mut armed = true;
    rig.script.inside(move |call| {
        if call == Call::MemPageAug && std::mem::take(&mut armed) {
            is_inside.send(()).expect("somebody listens");
            let gone_on = goes_on.recv_timeout(Duration::from_secs(30));
            gone_on.expect("it is let go");
        }
    });
    let dump = std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(vcpu.fault(private(7)), fixed(Level::L1)));
        let begun = inside.recv_timeout(Duration::from_secs(30));
        begun.expect("it gets there");
        let (dump, audit) = (rig.mmu.dump(SPACE), rig.mmu.audit());
        go_on.send(()).expect("it waits for that");
        assert_eq!((audit.frozen, audit.pages), (1, [6, 0, 0]));
        dump
    });
    let shown: Vec<_> = dump
        .trees
        .iter()
        .flat_map(|tree| tree.lines.iter().map(|line| (tree.private, line)))
        .filter(|(_, line)| line.kind != DumpKind::Table)
        .map(|(private, line)| (private, line.gfns.start.0, line.gfns.pages(), line.pfn))
        .collect();
    let with_module = (true, 7, 1, None);
    assert_eq!(shown.len(), 3, "{dump}");
    for line in [
        (true, 0, 3, Some(PRIVATE_PFN)),
        (false, 512, 3, Some(Pfn(SHARED_PFN.0 + 512))),
        with_module,
    ] {
        assert!(shown.contains(&line), "{line:?} is not in {dump}");
    }
    let text = dump.to_string();
    for part in [
        "confidential, Running",
        "private root",
        "shared root",
        "[0x7, 0x8) frozen",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let json = dump.json().to_string();
    assert!(
        json.contains(r#""gfn":7,"frames":1,"kind":"frozen"}"#),
        "{json}"
    );
    assert!(json.contains(r#"]},{"private":"#), "two trees: {json}");
    assert_eq!(json.matches('{').count(), json.matches('}').count());
    rig.check();
}

/// Visibility is told in the longest runs that there are, to the last frame.
#[test]
fn runs_of_one_visibility_are_told_in_order() {
    use Visibility::{Private, Shared};
    let rig = Rig::running(Level::L1);
    for range in [Gfn(3)..Gfn(700), Gfn(700)..Gfn(900), Gfn(2000)..Gfn(2001)] {
        rig.mmu.convert(SPACE, range, Shared).unwrap();
    }
    let mut runs = Vec::new();
    rig.mmu.visibilities(Gfn(2)..Gfn(2500), |run, visibility| {
        runs.push((run.start.0, run.end.0, visibility));
    });
    let expected = [
        (2, 3, Private),
        (3, 900, Shared),
        (900, 2000, Private),
        (2000, 2001, Shared),
        (2001, 2500, Private),
    ];
    assert_eq!(runs, expected);
}
