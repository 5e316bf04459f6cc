//! The command line from outside: exit codes, one-line errors that name the thing, and the shape of the JSON.

mod support;

use serde_json::Value;
use std::process::Output;
use support::{bench, json, text, words};

/// A run that is over in no time.
const SMALL: &str = "demand-paging -v 2 -b 4M -i 2";

fn small(more: &str) -> Output {
    bench(&words(&format!("{SMALL} {more}")))
}

#[test]
fn wrong_usage_is_one_line_that_names_it_and_exit_code_2() {
    for (args, names) in [
        ("", "scenario"),
        ("frobnicate", "frobnicate"),
        ("demand-paging --frobnicate", "--frobnicate"),
        ("demand-paging -q", "-q"),
        ("demand-paging extra", "extra"),
        ("demand-paging -v 0", "--vcpus"),
        ("demand-paging -v 100000", "--vcpus"),
        ("demand-paging -v two", "two"),
        ("demand-paging -b 0", "must not be zero"),
        ("demand-paging -b 1000", "multiple of 4K"),
        ("demand-paging -b 5000T", "52 bits"),
        ("demand-paging -b 99999999999999999999999", "52 bits"),
        ("demand-paging -b lots", "lots"),
        ("demand-paging -b -4096", "-4"),
        ("demand-paging -b 4M -s 3m", "3m"),
        ("demand-paging -b 3M -s 2m", "-b 3M"),
        ("demand-paging -b 512M -s 1g", "-b 512M"),
        ("demand-paging -v 2 -b 128T", "--levels"),
        ("demand-paging -f arm", "arm"),
        ("demand-paging -i 0", "--rounds"),
        ("demand-paging --levels 3", "--levels"),
        ("demand-paging --pool 0", "--pool"),
        ("demand-paging --against everything", "everything"),
        ("demand-paging -o=here", "here"),
        ("demand-paging -v 2 -c 0", "-c"),
        ("demand-paging -v 1 -b 4M -i 1 -c 1000000", "1000000"),
        (
            "demand-paging --json /nowhere/at/all.json",
            "/nowhere/at/all.json",
        ),
        ("demand-paging --json /tmp", "/tmp"),
        ("demand-paging --json", "--json"),
        ("memory -b 1M", "-b 1M"),
        ("memory --sparse 4M", "--sparse 4M"),
        ("memory --pages 0", "--pages"),
        ("instructions --renew", "--baseline"),
        ("instructions --limit much", "much"),
    ] {
        let output = bench(&words(args));
        let errors = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args}: {errors}");
        assert_eq!(errors.lines().count(), 1, "{args}: {errors}");
        assert!(
            errors.starts_with("error: ") && errors.contains(names),
            "{args}: {errors}"
        );
        assert!(output.stdout.is_empty(), "{args}");
    }
}

#[test]
fn a_pool_that_is_too_small_is_one_line_and_exit_code_1() {
    for (pool, frames) in [
        ("4K", "1 frames"),
        ("64K", "16 frames"),
        ("128K", "32 frames"),
    ] {
        let output = bench(&[
            "demand-paging",
            "-v",
            "2",
            "-b",
            "64M",
            "-i",
            "1",
            "--against",
            "none",
            "--pool",
            pool,
        ]);
        let errors = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{pool}: {errors}");
        assert_eq!(errors.lines().count(), 1, "{pool}: {errors}");
        let names = format!("frame pool exhausted: all {frames}");
        assert!(errors.contains(&names), "{pool}: {errors}");
    }
}

#[test]
fn memory_that_the_machine_does_not_have_is_exit_code_1() {
    for args in [
        "demand-paging -v 1 -b 64T",
        "memory -b 128T",
        "demand-paging -b 4M --pool 1024T",
    ] {
        let output = bench(&words(args));
        let errors = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args}: {errors}");
        assert_eq!(errors.lines().count(), 1, "{args}: {errors}");
        assert!(errors.contains("memory"), "{args}: {errors}");
    }
}

#[test]
fn a_json_file_that_cannot_be_written_is_exit_code_1() {
    let output = small("--against none --json /dev/full");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("/dev/full"));
}

#[test]
fn help_teaches_and_is_exit_code_0() {
    for (args, teaches) in [
        ("--help", "demand-paging"),
        ("demand-paging -h", "--against"),
        ("demand-paging --help", "tdp-bench demand-paging -v 2"),
        ("replay --help", "Usage"),
        ("--version", env!("CARGO_PKG_VERSION")),
    ] {
        let output = bench(&words(args));
        assert_eq!(output.status.code(), Some(0), "{args}");
        assert!(
            text(&output.stdout).contains(teaches),
            "{args}: {}",
            text(&output.stdout)
        );
    }
}

#[test]
fn the_constant_has_its_ratios_for_each_format() {
    for fences in ["asymmetric", "symmetric"] {
        let args = format!("constant -b 4M -i 2 --fences {fences} --json -");
        let report = json(&bench(&words(&args)));
        for format in ["ept", "npt"] {
            for ratio in [
                "sequential",
                "random",
                "map",
                "guard_vs_cas",
                "guard_share",
                "cold",
                "cold_fault_ns",
                "invalidation_median_ns",
            ] {
                let figure = report["ratios"][format][ratio].as_f64();
                assert!(
                    figure.is_some_and(|figure| figure > 0.0),
                    "{format} {ratio}: {figure:?}"
                );
            }
        }
        assert_eq!(report["checks"]["reachable"], 0);
        assert_eq!(report["checks"]["leaked_frames"], 0);
        for row in report["results"].as_array().unwrap() {
            assert!(row["invalidation"]["faults"].as_u64().unwrap() > 0);
        }
    }
}

#[test]
fn every_contender_runs_and_is_reported() {
    let output = small("--against all --json -");
    let report = json(&output);
    assert!(
        text(&output.stderr).contains("pgs/sec/vcpu"),
        "the table goes to standard error"
    );

    assert_eq!(report["scenario"], "demand-paging");
    assert_eq!(report["parameters"]["vcpus"], 2);
    let cpus = report["parameters"]["cpus"].as_array().map(Vec::len);
    let enough = std::thread::available_parallelism().is_ok_and(|n| n.get() >= 2);
    assert_eq!(cpus, Some(if enough { 2 } else { 0 }));
    assert_eq!(report["parameters"]["bytes_per_vcpu"], 4 << 20);
    for name in [
        "floor",
        "floor_map",
        "mutex",
        "rwlock",
        "table_lock",
        "page_table_multiarch",
        "x86_64",
    ] {
        let ratio = &report["ratios"][name];
        assert!(
            ratio.as_f64().is_some_and(|ratio| ratio > 0.0),
            "{name}: {ratio}"
        );
        for format in ["ept", "npt"] {
            for vcpus in ["1", "2"] {
                let ratio = &report["ratios"]["by_format"][format][vcpus][name];
                assert!(
                    ratio.as_f64().is_some_and(|ratio| ratio > 0.0),
                    "{format} {vcpus} {name}: {ratio}"
                );
            }
        }
    }
    for format in ["ept", "npt"] {
        assert_eq!(
            report["memory"][format]["tables"],
            3 + 4,
            "{format}: three above, four of leaves"
        );
        assert!(report["scaling"][format]["tdp fault, warm"].is_number());
    }
    rows_are_consistent(&report);
    // Two formats, four lanes, two rounds, by one vCPU (1024 pages) and by two (2048).
    assert_eq!(report["checks"]["translated"], 2 * 4 * 2 * (1024 + 2048));
    assert_eq!(report["checks"]["mismatched"], 0);
    assert_eq!(report["checks"]["leaked_frames"], 0);
    assert_eq!(report["checks"]["baselines_mismatched"], 0);
}

/// Every row's summary follows from its raw nanoseconds.
fn rows_are_consistent(report: &Value) {
    let rows = [&report["results"], &report["baselines"]];
    let rows: Vec<&Value> = rows
        .iter()
        .flat_map(|rows| rows.as_array().expect("a list"))
        .collect();
    assert_eq!(rows.len(), 2 * 2 * (4 + 6), "formats, courses, contenders");
    for row in rows {
        let vcpus = row["vcpus"].as_u64().expect("a number");
        assert_eq!(row["operations"], 1024 * vcpus, "{row}");
        let raw = |key: &str| -> Vec<f64> {
            row[key]
                .as_array()
                .expect("raw laps")
                .iter()
                .map(|ns| ns.as_f64().expect("nanoseconds"))
                .collect()
        };
        let (wall, cpu) = (raw("wall_ns"), raw("cpu_ns"));
        assert_eq!((wall.len(), cpu.len()), (2, 2), "{row}");
        let clock = if vcpus == 1 { &cpu } else { &wall };
        let fastest = clock.iter().copied().fold(f64::INFINITY, f64::min) / (1024.0 * vcpus as f64);
        let min = row["ns_per_operation"]["min"].as_f64().expect("a number");
        assert!(
            fastest > 0.0 && (min - fastest).abs() < 1e-6 * fastest,
            "{row}"
        );
        let median = row["ns_per_operation"]["median"]
            .as_f64()
            .expect("a number");
        assert!(median >= min, "{row}");
    }
}

#[test]
fn flags_do_what_they_say() {
    for (flags, operations) in [
        ("-o", 2048),
        ("-o=pages", 2 * 2048),
        ("-o=pages -a", 2 * 2048),
        ("-o=regions -a -r 7", 2048),
        ("-a", 2048),
        ("--levels 5", 2048),
        ("--huge-pool", 2048),
    ] {
        let report = json(&small(&format!("--against all {flags} --json -")));
        let row = report["results"]
            .as_array()
            .expect("a list")
            .iter()
            .find(|row| row["vcpus"] == 2);
        assert_eq!(
            row.expect("a row of both vCPUs")["operations"],
            operations,
            "{flags}"
        );
        assert_eq!(report["checks"]["mismatched"], 0, "{flags}");
        assert_eq!(report["checks"]["leaked_frames"], 0, "{flags}");
    }
}

#[test]
fn large_pages_are_mapped_as_such() {
    for (flags, operations) in [("-s 2m -b 64M", 32), ("-s 1g -b 4G", 4)] {
        let report = json(&bench(&words(&format!(
            "demand-paging -v 1 -i 1 {flags} --json -"
        ))));
        assert_eq!(report["results"][0]["operations"], operations, "{flags}");
        assert_eq!(report["checks"]["mismatched"], 0, "{flags}");
        assert!(report["ratios"]["x86_64"].is_number());
    }
}

#[test]
fn one_format_and_some_contenders() {
    let report = json(&small("-f npt --against floor,x86_64 --json -"));
    assert_eq!(report["parameters"]["formats"], serde_json::json!(["npt"]));
    let ratios = report["ratios"].as_object().expect("an object");
    let names: Vec<_> = ratios
        .iter()
        .filter(|(_, ratio)| ratio.is_number())
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(names, ["floor", "floor_map", "x86_64"]);
    assert!(report["memory"]["ept"].is_null());
}

#[test]
fn json_goes_to_a_file_and_the_table_to_standard_output() {
    let path = std::env::temp_dir().join(format!("tdp-bench-{}.json", std::process::id()));
    let output = small(&format!("--against none --json {}", path.display()));
    assert!(output.status.success());
    assert!(text(&output.stdout).contains("Overall demand paging rate:\t"));
    let written = std::fs::read(&path).expect("the file is there");
    std::fs::remove_file(&path).expect("and can go");
    let report: Value = serde_json::from_slice(&written).expect("JSON");
    assert_eq!(report["checks"]["mismatched"], 0);
}
