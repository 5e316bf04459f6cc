//! What a replay makes of other kernels' habits, and of histories that differ: each made by hand from the form that the
//! recordings have.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use tdp::Npt;
use tdp_bench::replay::findings::Findings;
use tdp_bench::replay::replay;
use tdp_bench::replay::rules::Rule;

const NONE: u64 = 1 << 63;
const FROZEN: u64 = NONE | 0x5a0;
const TABLE: u64 = 0x1_8905_1827;
/// Large, writable, accessed and dirty, at frame 0x18a600.
const LARGE: u64 = 0x1_8a60_0ee7;
const PROTECTED: u64 = LARGE & !2;

/// Entry of the small page `n` of the large one.
fn small(large: u64, n: u64) -> u64 {
    (large & !0x80) + (n << 12)
}

/// A trace in the making.
#[derive(Default)]
struct Trace {
    events: Vec<String>,
    ops: Vec<String>,
}

impl Trace {
    fn new() -> Self {
        let mut trace = Self::default();
        trace.op(&slot(""));
        trace.end();
        trace.event(
            0,
            r#""event":"kvm_mmu_get_page","gfn":"0x0","level":4,"direct":true"#,
        );
        trace
    }

    fn event(&mut self, thread: u32, event: &str) -> &mut Self {
        let seq = self.events.len();
        self.events
            .push(format!(r#"{{"seq":{seq},"t":{thread},{event}}}"#));
        self
    }

    fn op(&mut self, op: &str) -> &mut Self {
        let i = self.ops.len();
        self.ops.push(format!(r#"{{"i":{i},{op}}}"#));
        self.event(0, &format!(r#""event":"op_begin","op":{i}"#))
    }

    fn end(&mut self) -> &mut Self {
        let i = self.ops.len() - 1;
        self.event(0, &format!(r#""event":"op_end","op":{i}"#))
    }

    fn fault(&mut self, gfn: u64, code: u64) -> &mut Self {
        let gpa = gfn << 12;
        self.event(
            1,
            &format!(
                r#""event":"kvm_page_fault","vcpu":0,"gpa":"{gpa:#x}","error_code":"{:#x}""#,
                1u64 << 32 | code
            ),
        )
    }

    fn answer(&mut self, gfn: u64, level: u8, pfn: u64) -> &mut Self {
        self.event(
            1,
            &format!(
                r#""event":"kvm_mmu_spte_requested","gfn":"{gfn:#x}","level":{level},"pfn":"{pfn:#x}""#
            ),
        )
    }

    fn changed(&mut self, thread: u32, level: u8, gfn: u64, old: u64, new: u64) -> &mut Self {
        self.event(
            thread,
            &format!(
                r#""event":"kvm_tdp_mmu_spte_changed","as_id":0,"gfn":"{gfn:#x}","level":{level},"old_spte":"{old:#x}","new_spte":"{new:#x}""#
            ),
        )
    }

    /// The first fault of the guest: a read that maps a large page.
    fn map_large(&mut self) -> &mut Self {
        self.fault(0x200, 4)
            .answer(0x200, 2, 0x18_a600)
            .changed(1, 4, 0, NONE, TABLE)
            .changed(1, 3, 0, NONE, TABLE)
            .changed(1, 2, 0x200, NONE, LARGE)
            .event(
                1,
                r#""event":"kvm_userspace_exit","text":"reason KVM_EXIT_HLT (5)""#,
            )
    }

    /// Its log is switched on, and large pages are only protected.
    fn log(&mut self) -> &mut Self {
        self.op(&slot(r#""LOG_DIRTY_PAGES""#))
            .changed(0, 2, 0x200, LARGE, PROTECTED)
            .end()
    }

    /// A write splits the page.
    fn split(&mut self) -> &mut Self {
        self.fault(0x203, 7)
            .answer(0x203, 1, 0x18_a603)
            .changed(1, 2, 0x200, PROTECTED, TABLE)
            .changed(1, 1, 0x203, small(PROTECTED, 3), small(LARGE, 3))
    }

    fn replay(&self, test: &str) -> Findings {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("replay_rules");
        fs::create_dir_all(&folder).unwrap();
        let path: PathBuf = folder.join(format!("{test}.trace.jsonl"));
        let mut text = String::new();
        for event in &self.events {
            writeln!(text, "{event}").unwrap();
        }
        fs::write(&path, text).unwrap();
        let ops = self.ops.join(",");
        let params = r#"{"mmio_caching":"Y","eager_page_split":"N","nx_huge_pages":"N"}"#;
        let scenario = format!(r#"{{"name":"made","params":{params},"ops":[{ops}]}}"#);
        fs::write(folder.join(format!("{test}.scenario.json")), scenario).unwrap();
        replay::<Npt>(&path, None).unwrap_or_else(|error| panic!("{error}"))
    }
}

fn slot(flags: &str) -> String {
    format!(
        r#""op":"set_user_memory_region","as_id":0,"slot":1,"gpa":"0x0","size":"0x400000","flags":[{flags}],"result":{{"ret":0}}"#
    )
}

fn by_rule(found: &Findings, rule: Rule) -> u64 {
    assert_eq!(found.unexplained, 0, "{:?}", found.differences);
    found.transitions.by_rule.get(&rule).copied().unwrap_or(0)
}

fn changes_of(found: &Findings) -> (u64, u64, u64) {
    let changes = &found.transitions;
    (changes.total, changes.matched, changes.unexplained)
}

// ---- the same habits

#[test]
fn a_log_that_begins_and_a_write_that_splits() {
    let found = Trace::new().map_large().log().split().replay("split");
    assert_eq!(found.differences, []);
    // Two tables, the leaf, its protection; the table, its 512 leaves, the one that was written.
    assert_eq!(changes_of(&found), (4 + 514, 4 + 514, 0));
}

#[test]
fn a_log_that_ends_collapses() {
    let mut trace = Trace::new();
    trace.map_large().log().split();
    trace.op(&slot("")).changed(0, 2, 0x200, TABLE, PROTECTED);
    for n in 0..512 {
        let leaf = if n == 3 { LARGE } else { PROTECTED };
        trace.changed(0, 1, 0x200 + n, small(leaf, n), FROZEN);
    }
    let found = trace.end().replay("collapse");
    assert_eq!(found.differences, []);
    assert_eq!(changes_of(&found), (518 + 513, 518 + 513, 0));
}

// ---- other kernels' habits

/// KVM up to 6.12: what was split is taken away when the log ends, and mapped large by the next fault.
#[test]
fn a_log_that_ends_may_zap() {
    for gone in [NONE, FROZEN] {
        let mut trace = Trace::new();
        trace.map_large().log().split();
        trace.op(&slot("")).changed(0, 2, 0x200, TABLE, gone);
        for n in 0..512 {
            let leaf = if n == 3 { LARGE } else { PROTECTED };
            trace.changed(0, 1, 0x200 + n, small(leaf, n), FROZEN);
        }
        trace
            .end()
            .fault(0x207, 6)
            .answer(0x207, 2, 0x18_a607)
            .changed(1, 2, 0x200, NONE, LARGE);
        let found = trace.replay("zapped_collapsible");
        assert_eq!(by_rule(&found, Rule::CollapseInPlace), 513);
        assert_eq!(changes_of(&found), (518 + 513 + 1, 518 + 1, 0));
    }
}

/// KVM before 6.2: a write to a protected large page takes it away and maps a small one.
#[test]
fn a_write_may_take_a_large_page_away() {
    let mut trace = Trace::new();
    trace
        .map_large()
        .log()
        .fault(0x203, 7)
        .answer(0x203, 1, 0x18_a603)
        .changed(1, 2, 0x200, PROTECTED, FROZEN)
        .changed(1, 2, 0x200, NONE, TABLE)
        .changed(1, 1, 0x203, NONE, small(LARGE, 3));
    let found = trace.replay("zapped_large");
    assert_eq!(by_rule(&found, Rule::LargeLeafIsSplit), 1);
    assert_eq!(changes_of(&found), (7, 6, 0));
}

/// KVM up to 6.12: a leaf in the place of an MMIO entry is not dirty.
#[test]
fn a_leaf_over_an_mmio_entry_may_be_clean() {
    let mmio = |generation: u64| 1 << 51 | 0x500 << 12 | generation << 3 | 7;
    let mut trace = Trace::new();
    trace
        .fault(0x500, 6)
        .event(
            1,
            r#""event":"kvm_mmu_spte_requested","gfn":"0x500","level":1,"pfn":"noslot""#,
        )
        .changed(1, 4, 0, NONE, TABLE)
        .changed(1, 3, 0, NONE, TABLE)
        .changed(1, 2, 0x400, NONE, TABLE)
        .changed(1, 1, 0x500, NONE, mmio(2))
        .event(1, r#""event":"mark_mmio_spte","gfn":"0x500","gen":2"#)
        .event(
            1,
            r#""event":"kvm_userspace_exit","text":"reason KVM_EXIT_MMIO (6)""#,
        )
        .op(&slot("")
            .replace("\"slot\":1", "\"slot\":2")
            .replace("\"0x0\"", "\"0x400000\""))
        .end()
        .fault(0x500, 0xe)
        .answer(0x500, 1, 0x777)
        .changed(1, 1, 0x500, mmio(2), 0x77_7e27);
    let found = trace.replay("clean_over_mmio");
    assert_eq!(by_rule(&found, Rule::DirtyBitKept), 1);
    assert_eq!(changes_of(&found), (5, 4, 0));
}

// ---- histories that differ

#[test]
fn a_missing_change_of_a_sweep_is_unexplained() {
    // The log begins, and the page stays writable.
    let mut trace = Trace::new();
    trace.map_large().op(&slot(r#""LOG_DIRTY_PAGES""#)).end();
    let found = trace.replay("not_protected");
    assert_eq!(changes_of(&found), (4, 3, 1));
}

#[test]
fn an_extra_change_of_a_sweep_is_unexplained() {
    // The library has nothing to age where the host asks for nothing.
    let mut trace = Trace::new();
    trace.map_large().event(
        2,
        r#""event":"kvm_age_hva","gfn_ranges":[{"as_id":0,"slot":1,"gfn_start":"0x0","gfn_end":"0x1"}]"#,
    );
    trace.changed(2, 2, 0x200, LARGE, LARGE & !0x20);
    let found = trace.replay("aged_elsewhere");
    assert_eq!(changes_of(&found), (4, 3, 1));
}

#[test]
fn another_permission_is_unexplained() {
    // The host let the page be written; KVM is recorded to have mapped it without saying so.
    let mut trace = Trace::new();
    trace
        .fault(0x200, 4)
        .answer(0x200, 2, 0x18_a600)
        .changed(1, 4, 0, NONE, TABLE)
        .changed(1, 3, 0, NONE, TABLE)
        .changed(1, 2, 0x200, NONE, LARGE & !0x402);
    let found = trace.replay("other_permission");
    assert_eq!(changes_of(&found), (3, 2, 1));
}

#[test]
fn another_level_is_unexplained() {
    // The answer was a large page, and a small one is recorded to have been mapped.
    let mut trace = Trace::new();
    trace
        .fault(0x200, 4)
        .answer(0x200, 2, 0x18_a600)
        .changed(1, 4, 0, NONE, TABLE)
        .changed(1, 3, 0, NONE, TABLE)
        .changed(1, 2, 0x200, NONE, TABLE)
        .changed(1, 1, 0x200, NONE, small(LARGE, 0));
    let found = trace.replay("other_level");
    let (total, matched, unexplained) = changes_of(&found);
    assert_eq!((total, matched), (4, 2));
    assert!(unexplained > 0 && found.unexplained > unexplained);
}

/// A page is aged although no processor had used it: nothing that the library could have done.
#[test]
fn a_bit_that_is_set_where_it_should_be_cleared_is_unexplained() {
    let mut trace = Trace::new();
    trace.map_large().event(
        2,
        r#""event":"kvm_age_hva","gfn_ranges":[{"as_id":0,"slot":1,"gfn_start":"0x200","gfn_end":"0x400"}]"#,
    );
    // The dirty bit goes as well.
    trace.changed(2, 2, 0x200, LARGE, LARGE & !0x60);
    let found = trace.replay("aged_and_cleaned");
    // The change, and the library's own of the accessed bit alone, are one entry's.
    assert_eq!(changes_of(&found), (4, 3, 1));
}

/// Nobody asked for it: no log, no nested guest.
#[test]
fn a_page_that_is_protected_for_no_reason_is_unexplained() {
    for bits in [0x2, 0x402] {
        let mut trace = Trace::new();
        trace.map_large().changed(2, 2, 0x200, LARGE, LARGE & !bits);
        assert_eq!(changes_of(&trace.replay("no_reason")), (4, 3, 1));
    }
    let mut trace = Trace::new();
    trace.map_large().changed(2, 2, 0x200, LARGE, NONE);
    assert_eq!(changes_of(&trace.replay("removed")), (4, 3, 1));
    // Aged, but not only aged.
    let mut trace = Trace::new();
    trace.map_large().event(
        2,
        r#""event":"kvm_age_hva","gfn_ranges":[{"as_id":0,"slot":1,"gfn_start":"0x200","gfn_end":"0x400"}]"#,
    );
    trace.changed(2, 2, 0x200, LARGE, LARGE & !0x22);
    assert_eq!(changes_of(&trace.replay("aged_and_protected")), (4, 3, 1));
}
