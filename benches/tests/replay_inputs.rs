//! What a replay makes of traces that are wrong, broken or odd: errors that name the place, differences that are found.

use serde_json::Value;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tdp::Npt;
use tdp_bench::replay::findings::Findings;
use tdp_bench::replay::rules::Rule;
use tdp_bench::replay::step::{Operation, Recorded};
use tdp_bench::replay::{replay, source};

/// A folder of this test's own.
fn folder(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("replay")
        .join(test);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("testdata/v6.18")
        .join(name)
}

/// A recording's lines, copied into `folder` after `change`.
fn altered(folder: &Path, name: &str, change: impl FnOnce(&mut Vec<String>)) -> PathBuf {
    let plain = testdata(&format!("{name}.trace.jsonl"));
    let path = if plain.exists() {
        plain
    } else {
        testdata(&format!("{name}.trace.jsonl.zst"))
    };
    let (mut reader, mut lines) = (source::Lines::open(&path).unwrap(), Vec::new());
    while let Some(line) = reader.next_line().unwrap() {
        lines.push(line.to_owned());
    }
    change(&mut lines);
    let scenario = format!("{name}.scenario.json");
    fs::copy(testdata(&scenario), folder.join(&scenario)).unwrap();
    let path = folder.join(format!("{name}.trace.jsonl"));
    fs::write(&path, lines.join("\n")).unwrap();
    path
}

fn bench(path: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tdp-bench"));
    command.arg("replay").arg(path).args(more).output().unwrap()
}

/// The one line of error of a run that must fail with exit code 1.
fn failure(path: &Path) -> String {
    let output = bench(path, &[]);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        output.status.code(),
        Some(1),
        "{}: {errors}",
        path.display()
    );
    let errors: Vec<&str> = errors.lines().collect();
    let [error] = errors[..] else {
        panic!("{}: not one line: {errors:?}", path.display())
    };
    assert!(error.starts_with("error: "), "{error}");
    error.to_owned()
}

/// A trace made of `events`, each without `seq`, and a scenario of `ops`.
fn made(test: &str, ops: &str, events: &[&str]) -> PathBuf {
    let folder = folder(test);
    let mut trace = String::new();
    for (seq, event) in events.iter().enumerate() {
        writeln!(trace, r#"{{"seq":{seq},{event}}}"#).unwrap();
    }
    fs::write(folder.join("made.trace.jsonl"), trace).unwrap();
    let scenario = format!(r#"{{"name":"made","params":{{"mmio_caching":"Y"}},"ops":[{ops}]}}"#);
    fs::write(folder.join("made.scenario.json"), scenario).unwrap();
    folder.join("made.trace.jsonl")
}

const SLOT: &str = r#"{"i":0,"op":"set_user_memory_region","as_id":0,"slot":1,"gpa":"0x0","size":"0x40000","flags":[]}"#;
const BEGIN: &str = r#""t":0,"event":"op_begin","op":0"#;
const END: &str = r#""t":0,"event":"op_end","op":0"#;
const ROOT: &str = r#""t":0,"event":"kvm_mmu_get_page","gfn":"0x0","level":4,"direct":true"#;
const READ_5: &str =
    r#""t":0,"event":"kvm_page_fault","vcpu":0,"gpa":"0x5000","error_code":"0x100000004""#;
const ANSWER_5: &str =
    r#""t":0,"event":"kvm_mmu_spte_requested","gfn":"0x5","level":1,"pfn":"0x777""#;

fn changed(thread: u32, level: u8, gfn: u64, old: u64, new: u64) -> String {
    format!(
        r#""t":{thread},"event":"kvm_tdp_mmu_spte_changed","as_id":0,"gfn":"{gfn:#x}","level":{level},"old_spte":"{old:#x}","new_spte":"{new:#x}""#
    )
}

fn run(path: &Path) -> Findings {
    replay::<Npt>(path, None).unwrap_or_else(|error| panic!("{error}"))
}

const NONE: u64 = 1 << 63;

// ---- what is not a trace

#[test]
fn a_path_that_is_no_trace_is_named() {
    let folder = folder("no_trace");
    assert!(failure(&folder.join("absent.trace.jsonl")).contains("absent.trace.jsonl"));
    let error = failure(&folder);
    assert!(
        error.contains("no_trace") && error.contains("no trace in this folder"),
        "{error}"
    );
    fs::write(folder.join("notes.txt"), "hello").unwrap();
    assert!(failure(&folder.join("notes.txt")).contains("notes.txt: not a trace"));
    fs::write(folder.join("alone.trace.jsonl"), "").unwrap();
    assert!(failure(&folder).contains("alone.scenario.json"));
    fs::write(folder.join("alone.scenario.json"), "{]").unwrap();
    assert!(failure(&folder).contains("alone.scenario.json: not a scenario"));
    fs::write(
        folder.join("alone.scenario.json"),
        r#"{"name":"alone","ops":[]}"#,
    )
    .unwrap();
    assert!(failure(&folder).contains("alone.trace.jsonl: at its end: the trace is empty"));
    fs::write(
        folder.join("alone.scenario.json"),
        r#"{"name":"alone","ops":[{"i":0,"op":"set_user_memory_region","as_id":0,"slot":0,"gpa":"0x0",
            "size":"0x80000000000","flags":["LOG_DIRTY_PAGES"],"result":{"ret":0}}]}"#,
    )
    .unwrap();
    assert!(failure(&folder).contains("no KVM takes a slot of 0x80000000000 bytes"));
    let output = bench(&folder, &["--limit-faults", "0"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_broken_line_is_named_with_its_file() {
    type Change = fn(&mut String);
    let cases: [(&str, Change, &str); 6] = [
        (
            "cut",
            |line| line.truncate(line.len() / 2),
            "not a trace event",
        ),
        (
            "word",
            |line| *line = "hello".to_owned(),
            "not a trace event",
        ),
        (
            "field",
            |line| *line = line.replace("error_code", "code"),
            "no field `error_code`",
        ),
        (
            "vcpu",
            |line| *line = line.replace(r#""vcpu":0"#, r#""vcpu":4000000000"#),
            "vcpu",
        ),
        (
            "gpa",
            |line| *line = line.replace("0x1100", "0x11000000000000000000"),
            "not a trace event",
        ),
        (
            "op",
            |line| *line = r#"{"seq":8,"t":0,"event":"op_begin","op":99}"#.to_owned(),
            "operation 99",
        ),
    ];
    for (name, change, says) in cases {
        let path = altered(&folder(&format!("broken_{name}")), "anon4k", |lines| {
            assert!(lines[8].contains("kvm_page_fault"));
            change(&mut lines[8]);
        });
        let error = failure(&path);
        assert!(
            error.contains("anon4k.trace.jsonl:9: ") && error.contains(says),
            "{name}: {error}"
        );
    }
}

/// Cut between two lines, every line that is left is whole: the scenario tells that some are missing.
#[test]
fn a_trace_that_is_cut_short_is_refused() {
    for name in ["anon4k", "slot_delete_move", "thp_2m"] {
        let mut count = 0;
        altered(&folder("whole"), name, |lines| count = lines.len());
        for left in [1, count / 3, count - 1] {
            let path = altered(&folder("cut_short"), name, |lines| lines.truncate(left));
            let error = failure(&path);
            let says = format!("{name}.trace.jsonl: at its end: the trace is cut short: operation");
            assert!(error.contains(&says), "{left} of {count}: {error}");
        }
    }
}

#[test]
fn a_line_without_end_is_refused() {
    let path = altered(&folder("long_line"), "anon4k", |lines| {
        lines[3] = "x".repeat(3 << 20)
    });
    let error = failure(&path);
    assert!(
        error.contains("anon4k.trace.jsonl:4: line longer than"),
        "{error}"
    );
}

#[test]
fn numbers_without_bound_are_refused() {
    let huge = changed(0, 1, 0, NONE, 0x7e67);
    let huge =
        format!(r#"{huge},"n":4194304,"gfn_step":"0x1","old_step":"0x0","new_step":"0x1000""#);
    let path = made("many", SLOT, &[BEGIN, END, ROOT, &huge]);
    let error = failure(&path);
    assert!(
        error.contains("made.trace.jsonl:4: the trace contradicts itself more than"),
        "{error}"
    );
}

/// All lines of a trace.
fn content(path: &Path) -> Result<Vec<String>, String> {
    let mut reader = source::Lines::open(path).map_err(|e| e.to_string())?;
    let mut lines = Vec::new();
    while let Some(line) = reader.next_line().map_err(|e| e.to_string())? {
        lines.push(line.to_owned());
    }
    Ok(lines)
}

#[test]
fn broken_compression_is_an_error_at_every_byte() {
    let name = "hugetlb_1g";
    let folder = folder("compressed");
    let scenario = format!("{name}.scenario.json");
    fs::copy(testdata(&scenario), folder.join(&scenario)).unwrap();
    let path = folder.join(format!("{name}.trace.jsonl.zst"));
    let original = testdata(&format!("{name}.trace.jsonl.zst"));
    let (whole, good) = (fs::read(&original).unwrap(), content(&original).unwrap());
    for length in 1..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(content(&path).is_err(), "cut to {length} bytes");
    }
    for byte in 0..whole.len() {
        let mut flipped = whole.clone();
        flipped[byte] ^= 1 << (byte % 8);
        fs::write(&path, &flipped).unwrap();
        // A flip that goes unnoticed changed nothing: the content has a checksum.
        assert!(
            content(&path).map_or(true, |lines| lines == good),
            "byte {byte}"
        );
    }
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let error = failure(&path);
    assert!(
        error.contains("hugetlb_1g.trace.jsonl.zst:") && error.contains("zstd"),
        "{error}"
    );
    fs::write(&path, [&whole[..], &whole[..]].concat()).unwrap();
    assert_eq!(
        content(&path).unwrap().len(),
        2 * good.len(),
        "two frames are one stream"
    );
}

// ---- what is not as recorded

#[test]
fn no_changed_entry_can_be_missing() {
    for name in ["anon4k", "zero_page", "slot_delete_move"] {
        let folder = folder(&format!("missing_{name}"));
        let whole = fs::read_to_string(altered(&folder, name, |_| {})).unwrap();
        let lines: Vec<&str> = whole.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            // An absent entry that is sealed leaves no trace of its own.
            let absent =
                line.contains(r#""old":"none","new":"frozen""#) || line.contains(r#""old":"mmio"#);
            let forgotten = line.contains(r#""new":"mmio"#);
            if !line.contains("kvm_tdp_mmu_spte_changed") || absent || forgotten {
                continue;
            }
            let path = altered(&folder, name, |lines| drop(lines.remove(index)));
            let found = run(&path);
            assert!(
                found.unexplained > 0,
                "{name}: line {} is not missed",
                index + 1
            );
            assert!(!found.differences.is_empty() && found.leaked_frames == 0);
        }
    }
}

#[test]
fn a_difference_is_told_and_fails_the_run() {
    let folder = folder("difference");
    // The host answered another frame than the one that got mapped.
    let path = altered(&folder, "anon4k", |lines| {
        assert!(lines[24].contains(r#""pfn":"0x184348""#));
        lines[24] = lines[24].replace("0x184348", "0x184349");
    });
    let error = failure(&path);
    assert!(error.contains("unexplained"), "{error}");
    let output = bench(&path, &["--json", "-"]);
    assert_eq!(output.status.code(), Some(1));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    // The fault, and the entry that it made.
    assert_eq!(
        (&json["scenario"], &json["unexplained"]),
        (&"replay".into(), &2.into())
    );
    let faults = &json["faults"];
    assert_eq!(
        (&faults["total"], &faults["matched"], &faults["unexplained"]),
        (&28.into(), &27.into(), &1.into())
    );
    let found = &json["scenarios"][0];
    assert_eq!(
        (&json["transitions"], &json["matched"]),
        (&36.into(), &35.into())
    );
    assert_eq!(found["transitions"]["unexplained"], 1);
    let difference = &found["differences"][0];
    assert_eq!(
        (
            &difference["gfn"],
            &difference["as_id"],
            &difference["level"]
        ),
        (&"0x40000".into(), &0.into(), &1.into())
    );
    assert!(
        difference["expected"]
            .as_str()
            .unwrap()
            .contains("0x184348")
    );
    assert!(difference["got"].as_str().unwrap().contains("0x184349"));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("gfn 0x40000, level 1: expected"), "{told}");
}

#[test]
fn a_recorded_level_that_the_answer_forbids_differs() {
    let path = altered(&folder("level"), "thp_2m", |lines| {
        assert!(lines[24].contains(r#""level":2,"pfn":"0x189805""#));
        lines[24] = lines[24].replace(r#""level":2"#, r#""level":1"#);
    });
    let found = run(&path);
    assert!(
        found
            .differences
            .iter()
            .any(|d| d.gfn == 0x4_0005 && d.level == 2),
        "{:?}",
        found.differences
    );
    // The difference is repaired, and nothing after it suffers.
    assert_eq!(found.matched, found.faults - 1);
}

#[test]
fn a_slot_that_cannot_be_is_a_difference() {
    let over = SLOT
        .replace(r#""i":0"#, r#""i":1"#)
        .replace(r#""slot":1"#, r#""slot":2"#);
    let ops = format!("{SLOT},{over}");
    let [begin, end] = [BEGIN, END].map(|event| event.replace(r#""op":0"#, r#""op":1"#));
    let tables = [4, 3, 2].map(|level| changed(0, level, 0, NONE, 0x1_8905_1827));
    let leaf = changed(0, 1, 5, NONE, 0x77_7e67);
    let path = made(
        "overlap",
        &ops,
        &[
            BEGIN, END, ROOT, READ_5, ANSWER_5, &tables[0], &tables[1], &tables[2], &leaf, &begin,
            &end,
        ],
    );
    let found = run(&path);
    assert_eq!((found.matched, found.unexplained), (1, 1));
    assert!(
        found.differences[0].got.contains("overlaps slot 1"),
        "{:?}",
        found.differences
    );
}

// ---- odd, but right

#[test]
fn a_write_to_a_read_only_slot_is_emulated() {
    let ops = SLOT.replace("[]", r#"["READONLY"]"#);
    let tables = [4, 3, 2].map(|level| changed(0, level, 0, NONE, 0x1_8905_1827));
    let leaf = changed(0, 1, 5, NONE, 0x77_7825);
    let write_5 = READ_5.replace("0x100000004", "0x100000007");
    let write_6 = READ_5
        .replace("0x5000", "0x6000")
        .replace("0x100000004", "0x100000006");
    let path = made(
        "read_only",
        &ops,
        &[
            BEGIN, END, ROOT, READ_5, ANSWER_5, &tables[0], &tables[1], &tables[2], &leaf,
            &write_5, &write_6,
        ],
    );
    let found = run(&path);
    assert_eq!(
        (found.faults, found.matched, found.unexplained),
        (3, 3, 0),
        "{:?}",
        found.differences
    );
    assert_eq!(
        found
            .faults_by_outcome
            .get(&Recorded::Mmio)
            .map(|tally| tally.matched),
        Some(2)
    );
}

/// A vCPU that makes a root where there is one uses the new one; the old one may be taken down by anybody, later.
#[test]
fn a_root_may_be_given_up_for_a_new_one() {
    let tables = [4, 3, 2].map(|level| changed(0, level, 0, NONE, 0x1_8905_1827));
    let leaf = changed(0, 1, 5, NONE, 0x77_7e67);
    let old = [
        changed(9, 1, 5, 0x77_7e67, NONE),
        changed(9, 4, 0, 0x1_8905_1827, NONE),
    ];
    let fault = [READ_5, ANSWER_5, &tables[0], &tables[1], &tables[2], &leaf];
    let events = [
        &[BEGIN, END, ROOT],
        &fault[..],
        &[ROOT],
        &fault[..],
        &[&old[0], &old[1]],
    ]
    .concat();
    let found = run(&made("root_change", SLOT, &events));
    assert_eq!(
        (found.faults, found.matched, found.unexplained),
        (2, 2, 0),
        "{:?}",
        found.differences
    );
    let changes = found.operations_by_kind.get(&Operation::RootChange);
    assert_eq!(changes.map(|tally| tally.matched), Some(1));
    let rule = found.transitions.by_rule.get(&Rule::OneRootPerSpace);
    assert_eq!(rule, Some(&2));
    // Without the new root, the second fault maps what is mapped.
    let events = [&[BEGIN, END, ROOT], &fault[..], &fault[..]].concat();
    assert!(run(&made("no_root_change", SLOT, &events)).unexplained > 0);
}

/// A nested guest without nested paging of its own uses two-dimensional tables below a root of its own.
#[test]
fn a_nested_guest_is_not_taken_for_its_hypervisor() {
    let tables = [4, 3, 2].map(|level| changed(0, level, 0, NONE, 0x1_8905_1827));
    let leaf = changed(0, 1, 5, NONE, 0x77_7e67);
    let enter = r#""t":0,"event":"kvm_nested_vmenter","text":"rip: 0x1 nested_npt=n""#;
    let leave = r#""t":0,"event":"kvm_nested_vmexit","text":"vcpu 0 reason npf rip 0x1""#;
    let fault = [READ_5, ANSWER_5, &tables[0], &tables[1], &tables[2], &leaf];
    let events = [
        &[BEGIN, END, ROOT],
        &fault[..],
        &[enter, ROOT, leave],
        &fault[..],
    ]
    .concat();
    let found = run(&made("nested", SLOT, &events));
    assert_eq!(
        (found.faults, found.matched, found.unexplained),
        (2, 1, 0),
        "{:?}",
        found.differences
    );
    assert_eq!(found.faults_by_rule.get(&Rule::NestedGuest), Some(&1));
    let rule = found.transitions.by_rule.get(&Rule::NestedGuest);
    assert_eq!(rule, Some(&4));
}
