//! Ratios, scaling and the verdict from laps made up.

use super::super::lanes::{Checked, Label};
use super::*;

fn lane(name: &'static str, work: Work, one: [u64; 3], two: [u64; 3]) -> LaneResult {
    let laps = |vcpus, ns: [u64; 3]| Laps {
        vcpus,
        operations: 10 * vcpus as u64,
        wall_ns: ns.to_vec(),
        cpu_ns: ns.to_vec(),
        preemptions: vec![0; 3],
    };
    LaneResult {
        label: Label {
            name,
            work,
            tables: "warm",
        },
        laps: vec![laps(1, one), laps(2, two)],
    }
}

fn result(format: &'static str, ours: u64) -> FormatResult {
    FormatResult {
        format,
        lanes: vec![
            lane(OURS, Work::Fault, [ours; 3], [ours; 3]),
            lane(OURS, Work::Map, [ours / 2; 3], [ours / 2; 3]),
            lane("floor", Work::Map, [10, 20, 1000], [30; 3]),
            lane("mutex", Work::Fault, [100; 3], [400; 3]),
            lane("x86_64", Work::Map, [100; 3], [400; 3]),
        ],
        footprint: None,
        checked: Checked {
            translated: 7,
            mismatched: 0,
        },
        baselines_mismatched: 0,
        leaked: 0,
    }
}

#[test]
fn ratios_compare_like_with_like() {
    let ratios = Ratios::new(&[result("ept", 100), result("npt", 200)]);
    let ept = &ratios.by_format["ept"];
    assert_eq!(
        ept[&1]["floor"], 0.2,
        "the median round's floor over the whole fault"
    );
    assert_eq!(ept[&1]["floor_map"], 0.4, "the same over the map");
    assert_eq!(ept[&1]["mutex"], 1.0, "a whole fault over the whole fault");
    assert_eq!(ept[&2]["x86_64"], 8.0, "a map over the map");
    assert_eq!(ratios.of_minima["ept"][&1]["floor"], 0.1);
    assert_eq!(
        ratios.headline["floor"], 0.1,
        "by one vCPU, the format that does worse"
    );
    assert_eq!(
        ratios.headline["x86_64"], 4.0,
        "by all vCPUs, the format that does worse"
    );
}

#[test]
fn scaling_is_throughput_over_throughput() {
    assert_eq!(
        scaling(&lane(OURS, Work::Fault, [100; 3], [100; 3])),
        Some(2.0)
    );
    assert_eq!(
        scaling(&lane(OURS, Work::Fault, [100; 3], [200; 3])),
        Some(1.0)
    );
}

#[test]
fn the_verdict_names_what_is_wrong() {
    let checks = |mismatched, leaked_frames, baselines_mismatched| Checks {
        translated: 9,
        mismatched,
        leaked_frames,
        baselines_mismatched,
    };
    assert!(checks(0, 0, 0).verdict().is_ok());
    for (checks, says) in [
        (checks(2, 0, 0), "2 of 9 translations are wrong"),
        (checks(0, 3, 0), "3 table frames leaked"),
        (checks(0, 0, 4), "4 translations of baselines are wrong"),
    ] {
        assert_eq!(checks.verdict().unwrap_err().to_string(), says);
    }
}
