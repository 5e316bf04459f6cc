//! Replays of the recordings in `testdata`, by the library's own interface.

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use tdp::{Ept, Npt};
use tdp_bench::replay::expect::Space;
use tdp_bench::replay::findings::Findings;
use tdp_bench::replay::processor::Processor;
use tdp_bench::replay::step::{Operation, Recorded};
use tdp_bench::replay::story::Story;
use tdp_bench::replay::trace::{Event, Line};
use tdp_bench::replay::{replay, source};

fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata")
}

fn traces() -> Vec<PathBuf> {
    source::find(&[testdata()]).unwrap()
}

fn trace(name: &str) -> PathBuf {
    let named = |path: &PathBuf| {
        path.file_name()
            .unwrap()
            .to_string_lossy()
            .starts_with(&format!("{name}."))
    };
    traces().into_iter().find(named).unwrap()
}

fn run<F: Processor>(path: &Path) -> Findings {
    replay::<F>(path, None).unwrap_or_else(|error| panic!("{error}"))
}

fn assert_as_recorded(found: &Findings) {
    assert_eq!(
        (found.unexplained, found.leaked_frames),
        (0, 0),
        "{}: {:?}",
        found.name,
        found.differences
    );
    assert_eq!(
        found.faults,
        found.matched + found.faults_by_rule.values().sum::<u64>(),
        "{}",
        found.name
    );
    let changes = &found.transitions;
    let by_rule: u64 = changes.by_rule.values().sum();
    assert_eq!(
        changes.total,
        changes.matched + by_rule,
        "{}: {changes:?}",
        found.name
    );
    let operations = found.operations;
    assert_eq!(operations.total, operations.matched, "{}", found.name);
}

#[test]
fn every_recording_is_as_recorded_on_both_formats() {
    for path in traces() {
        let (npt, ept) = (run::<Npt>(&path), run::<Ept>(&path));
        assert_as_recorded(&npt);
        assert_as_recorded(&ept);
        assert_eq!(
            (npt.matched, &npt.transitions),
            (ept.matched, &ept.transitions),
            "{}",
            npt.name
        );
        assert!(
            npt.matched > 0 && npt.comparisons > 0 && npt.leaves_compared > 0,
            "{}",
            npt.name
        );
    }
}

/// The faults of each recording, all of them matched.
#[test]
fn every_fault_is_matched() {
    let whole = [
        ("anon4k", 28),
        ("thp_2m", 10),
        ("hugetlb_1g", 4),
        ("mmio", 18),
        ("prefault", 1),
        ("zero_page", 19),
        ("notifier_anon", 37),
        ("notifier_memfd", 17),
        ("slot_delete_move", 14),
        ("slot_delete_move_noquirk", 12),
        ("vm_teardown", 5),
        ("boot_thp", 1785),
        ("boot_4k_first_10000", 10_000),
    ];
    for (name, faults) in whole {
        let found = run::<Npt>(&trace(name));
        assert_eq!((found.faults, found.matched), (faults, faults), "{name}");
    }
}

/// Sweeps are the library's own: nothing is copied from the record, and hardly anything swept a second time.
#[test]
fn sweeps_are_made_and_matched() {
    let of = |name: &str, operation| {
        let found = run::<Npt>(&trace(name));
        assert_eq!(found.swept_again, 0, "{name}");
        let operations = found.operations_by_kind.get(&operation);
        operations.map_or(0, |tally| tally.matched)
    };
    assert_eq!(of("aging_damon", Operation::Age), 64);
    assert_eq!(of("dirty_4k", Operation::GetDirtyLog), 4);
    assert_eq!(of("dirty_2m_lazy", Operation::Collapse), 1);
    assert_eq!(of("nx_huge_pages", Operation::RecoverNx), 2);
    assert_eq!(of("nested_npt_4k", Operation::TrackWrites), 5);
}

#[test]
fn outcomes_are_told_apart() {
    let outcome = |name: &str, recorded| {
        let found = run::<Npt>(&trace(name));
        found
            .faults_by_outcome
            .get(&recorded)
            .map_or(0, |tally| tally.matched)
    };
    assert_eq!(outcome("mmio", Recorded::Mmio), 13);
    assert_eq!(outcome("zero_page", Recorded::Retried), 4);
    assert_eq!(outcome("notifier_anon", Recorded::Failed), 3);
    assert_eq!(outcome("boot_thp", Recorded::Unchanged), 28);
    let ahead = run::<Npt>(&trace("prefault"));
    assert_eq!(
        ahead
            .operations_by_kind
            .get(&Operation::PreFault)
            .map(|tally| tally.matched),
        Some(15)
    );
}

#[test]
fn five_levels_are_seen_in_the_trace() {
    assert_eq!(run::<Npt>(&trace("long_mode")).levels, 5);
    assert_eq!(run::<Npt>(&trace("anon4k")).levels, 4);
}

#[test]
fn a_limit_ends_the_replay() {
    let found = replay::<Npt>(&trace("boot_4k_first_10000"), Some(2000)).unwrap();
    assert_as_recorded(&found);
    assert_eq!(found.matched, 2000);
}

/// KVM's own count of leaves after each operation is the independent witness for the expected tables.
#[test]
fn the_expected_tables_have_as_many_leaves_as_kvm_counted() {
    let mut compared = 0;
    for path in traces() {
        let scenario = source::scenario(&path).unwrap();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let beside =
            path.with_file_name(format!("{}.scenario.json", name.split_once('.').unwrap().0));
        let raw: Value = serde_json::from_str(&fs::read_to_string(beside).unwrap()).unwrap();
        // KVM counts the shadow pages of nested guests as well.
        if raw["ops"]
            .as_array()
            .unwrap()
            .iter()
            .any(|op| op["op"].as_str().unwrap().contains("VMRUN"))
        {
            continue;
        }
        let (mut story, mut lines) = (Story::new(scenario), source::Lines::open(&path).unwrap());
        while let Some(text) = lines.next_line().unwrap() {
            let line = Line::parse(text).unwrap();
            story.feed(&line).unwrap();
            drop(story.take_steps());
            let Event::OpEnd(index) = line.event else {
                continue;
            };
            let op = raw["ops"]
                .as_array()
                .unwrap()
                .iter()
                .find(|op| op["i"] == index)
                .unwrap();
            let Some(counted) = op["stats"]["pages_4k"].as_u64() else {
                continue;
            };
            let counted = [
                counted,
                op["stats"]["pages_2m"].as_u64().unwrap(),
                op["stats"]["pages_1g"].as_u64().unwrap(),
            ];
            let mut found = [0; 3];
            for as_id in 0..2 {
                for leaf in story.expected().all_leaves(Space::normal(as_id)) {
                    found[usize::from(leaf.level) - 1] += 1;
                }
            }
            assert_eq!(found, counted, "{name}, operation {index}");
            compared += 1;
        }
    }
    assert!(compared > 400, "{compared} operations compared");
}
