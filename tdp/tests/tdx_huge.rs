//! Large pages on the model: what a merge and a split leave behind, at both sizes.
#![cfg(not(loom))]

mod tdx_support;

use tdp::protected::tdx::{
    EntryState, Operand, PageKind, Status, Td, TdConfig, TdxConfig, TdxModule,
};
use tdp::{Gpa, Hpa, Level, Pfn};
use tdp_arch::walker::GuestAccess;
use tdx_support::{HUGE, LARGE, PAGE, TOP, accepted, at, done};

const GIGABYTE: u64 = 1 << 30;
/// The second gigabyte of memory is to become one page; the first holds everything else.
const FIRST: u64 = GIGABYTE;
const PIECE: Hpa = Hpa(2 * GIGABYTE);

fn spare(n: u64) -> Hpa {
    Hpa(FIRST + n * 0x1000)
}

fn running() -> (TdxModule, Td) {
    let memory = Pfn(FIRST >> 12)..Pfn((FIRST + 2 * GIGABYTE) >> 12);
    let module = TdxModule::new(TdxConfig::new(memory)).unwrap();
    let td = module
        .create_td(TdConfig::new(spare(0), spare(1), spare(2)))
        .unwrap();
    done(td.mng_init());
    drop(td.vp_create(spare(3)).unwrap());
    done(td.mem_sept_add(at(0, TOP), spare(4)));
    done(td.mem_sept_add(at(0, HUGE), spare(5)));
    done(td.mr_finalize());
    (module, td)
}

fn block_and_track(td: &Td, level: Level) {
    done(td.mem_range_block(at(0, level)));
    done(td.mem_track());
}

#[test]
fn a_gigabyte_is_merged_and_split_down_to_4k() {
    let (module, td) = running();
    let before = td.child_count();
    for n in 0..512 {
        let entry = at(n * LARGE.bytes(), LARGE);
        done(td.mem_page_aug(entry, Hpa(PIECE.0 + n * LARGE.bytes())));
        done(accepted(td.page_accept(entry)));
    }
    block_and_track(&td, HUGE);
    let merged = td.mem_page_promote(at(0, HUGE));
    assert!(merged.is_success(), "{merged}");
    assert_eq!(merged.rcx, Some(spare(5).0));

    // One page, and its metadata in one place.
    let found = td.translate(Gpa(0x1234_5678), GuestAccess::Write).unwrap();
    assert_eq!((found.hpa, found.level), (Hpa(PIECE.0 + 0x1234_5678), HUGE));
    assert_eq!(module.page_kind(PIECE), Some((PageKind::Reg, HUGE)));
    assert_eq!(module.page_kind(spare(5)), Some((PageKind::Nda, PAGE)));
    assert_eq!(td.child_count(), before - 1 + HUGE.pages());
    // Nobody gets at a part of it.
    let taken = td.mem_sept_add(at(GIGABYTE, HUGE), Hpa(PIECE.0 + 0x5000));
    assert!(taken.is(Status::PageMetadataIncorrect, Operand::R8));

    block_and_track(&td, HUGE);
    done(td.mem_page_demote(at(0, HUGE), spare(5)));
    assert_eq!(module.page_kind(PIECE), Some((PageKind::Reg, LARGE)));
    block_and_track(&td, LARGE);
    done(td.mem_page_demote(at(0, LARGE), spare(6)));
    assert_eq!(module.page_kind(PIECE), Some((PageKind::Reg, PAGE)));
    let found = td.translate(Gpa(0x1_2345), GuestAccess::Write).unwrap();
    assert_eq!((found.hpa, found.level), (Hpa(PIECE.0 + 0x1_2345), PAGE));
    assert_eq!(td.child_count(), before + 1 + HUGE.pages());

    // What was split is not blocked, and can be taken away piece by piece.
    let entry = td.entry(Gpa(0), PAGE).unwrap();
    assert_eq!(entry.state, EntryState::Mapped);
    block_and_track(&td, PAGE);
    let removed = td.mem_page_remove(at(0, PAGE));
    assert_eq!((removed.is_success(), removed.rcx), (true, Some(PIECE.0)));
    assert_eq!(module.violation_count(), 1, "{:?}", module.violations());
}

#[test]
fn a_merge_wants_one_aligned_piece() {
    let (_, td) = running();
    done(td.mem_sept_add(at(0, LARGE), spare(7)));
    // Contiguous, but from the middle of a 2 MiB block on.
    for n in 0..512 {
        let entry = at(n * 0x1000, PAGE);
        done(td.mem_page_aug(entry, Hpa(PIECE.0 + LARGE.bytes() / 2 + n * 0x1000)));
    }
    block_and_track(&td, LARGE);
    let refused = td.mem_page_promote(at(0, LARGE));
    assert!(refused.is(Status::EptInvalidPromoteConditions, Operand::RCX));
    assert_eq!(refused.rdx, Some(0x8101));
    let entry = td.entry(Gpa(0), LARGE).unwrap();
    assert_eq!(entry.state, EntryState::TableBlocked);
}
