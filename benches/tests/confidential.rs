//! The scenarios about confidential guests, from outside: bad input, and small runs of which every check holds.

mod support;

use serde_json::Value;
use support::{bench, json, text, words};

fn report(line: &str) -> Value {
    let report = json(&bench(&words(&format!("{line} --json -"))));
    let checks = &report["checks"];
    for (check, good) in [
        ("audit_violations", 0),
        ("different", 0),
        ("books_wrong", 0),
        ("leaked_frames", 0),
    ] {
        if !checks[check].is_null() {
            assert_eq!(checks[check], good, "{line}: {check}");
        }
    }
    assert!(checks["max_reentries"].as_u64().is_some_and(|n| n <= 3));
    report
}

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn wrong_usage_is_one_line_that_names_it_and_exit_code_2() {
    for (args, names) in [
        ("private-faults -v 0", "--vcpus"),
        ("private-faults -b 0", "must not be zero"),
        ("private-faults -b 4K -s 2m", "-b 4K"),
        ("private-faults -v 1024 -b 2G", "1T in all"),
        ("private-faults -s 1g", "1g"),
        ("private-faults --backend sgx", "sgx"),
        ("private-faults --backend-cost 5", "--backend-cost"),
        ("private-faults --backend-cost 5s", "as in 5us"),
        ("private-faults --backend-cost 1001ms", "more than 1s"),
        ("private-faults --backend-wait doze", "doze"),
        ("private-faults --busy-rate 1", "0.9"),
        ("private-faults --busy-rate NaN", "0.9"),
        ("private-faults --fail-rate -0.1", "-0"),
        ("private-faults -i 0", "--rounds"),
        ("private-mem-conversions -s 2m -b 4K", "-b 4K"),
        ("private-mem-conversions -t 0", "--threads"),
        ("private-mem-conversions --seconds 0", "seconds"),
        ("private-mem-conversions --seconds inf", "seconds"),
        ("private-mem-conversions --backend null", "--backend"),
        ("vm-teardown -b 1M", "-b 1M"),
        ("vm-teardown -b 6M", "-b 6M"),
        ("vm-teardown --chunk 1000", "multiple of 4K"),
        ("vm-teardown -s 2m -b 4G --chunk 4K", "--chunk 4K"),
        ("vm-teardown -t 257", "--threads"),
        ("pre-fault-memory -b 4K", "-b 4K"),
        ("pre-fault-memory -s 4k,8k", "8k"),
        ("demand-paging --visibility secret", "secret"),
        ("demand-paging --visibility private -f npt", "-f"),
        ("demand-paging --visibility mixed -s 1g -b 1G", "-s"),
        ("demand-paging --visibility private --levels 5", "--levels"),
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
fn help_teaches() {
    for (args, teaches) in [
        ("private-faults --help", "overlap"),
        ("private-mem-conversions --help", "mapped by one half"),
        ("vm-teardown --help", "uncombined"),
        ("pre-fault-memory --help", "tdp-bench pre-fault-memory"),
    ] {
        let output = bench(&words(args));
        assert_eq!(output.status.code(), Some(0), "{args}");
        assert!(text(&output.stdout).contains(teaches), "{args}");
    }
}

#[test]
fn sleeping_calls_of_many_vcpus_overlap() {
    let line = "private-faults -v 16 -b 32K -i 3 --backend-cost 2ms --backend-wait sleep";
    let report = report(line);
    // A lock around the call, whoever held it, would give 1.
    assert!(
        number(&report["ratios"]["overlap"]) > 4.0,
        "{}",
        report["ratios"]
    );
    assert!(number(&report["achieved"]["one_ns_per_call"]) >= 2e6);
    assert_eq!(report["checks"]["protected_equals_private"], true);
    assert!(number(&report["checks"]["compared"]) > 128.0);
    assert!(number(&report["ratios"]["vs_shared"]) > 0.0);
    assert!(number(&report["ratios"]["overhead"]) > 0.0);
    let names: Vec<_> = report["results"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|row| row["name"].as_str().expect("a name"))
        .collect();
    assert_eq!(names, ["shared", "private", "overhead", "one", "all"]);
}

#[test]
fn private_faults_under_injected_faults() {
    for more in ["", "--backend null", "-s 2m -b 256M"] {
        let line = format!(
            "private-faults -v 2 -b 2M -i 2 --backend-cost 0 --busy-rate 0.1 --fail-rate 0.05 {more}"
        );
        // Of two sizes the last counts: clap refuses the same flag twice.
        let line = if more.contains("-b") {
            line.replace("-b 2M ", "")
        } else {
            line
        };
        let report = report(&line);
        assert!(
            number(&report["counts"]["all"]["injected_busy"]) > 0.0,
            "{line}"
        );
        assert!(number(&report["counts"]["refused"]) > 0.0, "{line}");
    }
}

#[test]
fn conversions_map_no_frame_twice() {
    for flags in [
        "--busy-rate 0.05 --fail-rate 0.02",
        "-s 2m",
        "--backing 4k -t 1",
    ] {
        let line =
            format!("private-mem-conversions -v 2 -b 4M --seconds 0.3 --backend-cost 0 {flags}");
        let report = report(&line);
        let checks = &report["checks"];
        assert_eq!(checks["double_mapped"], 0, "{line}");
        assert_eq!(checks["misplaced"], 0, "{line}");
        assert_eq!(checks["disjoint_waits"], 0, "{line}");
        assert_eq!(checks["protected_equals_private"], true, "{line}");
        assert!(number(&checks["looked_at"]) > 0.0, "{line}");
        assert!(number(&report["conversions_per_second"]) > 0.0, "{line}");
        assert!(number(&report["accesses"]["faulted"]) > 0.0, "{line}");
        assert_eq!(
            number(&report["conversions"]["failed"]) > 0.0,
            flags.contains("fail"),
            "{line}"
        );
    }
}

#[test]
fn teardown_takes_as_few_calls_as_it_promises() {
    let report = report("vm-teardown -b 64M -i 1 --backend-cost 0");
    let ratios = &report["ratios"];
    for (ratio, most) in [
        ("calls_per_page", 2.05),
        ("tracks_per_512_pages", 1.0),
        ("busy_per_block", 0.1),
        ("released_calls_per_page", 1.01),
    ] {
        assert!(number(&ratios[ratio]) <= most, "{ratio}: {ratios}");
    }
    let combined = &report["results"]["combined"];
    assert_eq!(combined["pages"], 16384);
    assert_eq!(combined["tables"], 32);
    assert!(number(&combined["guest_accesses"]) > 0.0, "the guest ran");
    assert_eq!(report["checks"]["tables_not_reused"], 0);
}

#[test]
fn teardown_by_chunks_of_large_pages_and_under_injected_faults() {
    for line in [
        "vm-teardown -b 8G -s 2m -i 1 --backend-cost 0",
        "vm-teardown -b 8M --chunk 2M -i 1 --busy-rate 0.05 --fail-rate 0.02",
    ] {
        assert_eq!(report(line)["checks"]["tables_not_reused"], 0, "{line}");
    }
}

#[test]
fn a_range_is_mapped_ahead_in_both_halves() {
    for flags in ["", "--backend null", "--busy-rate 0.05 --fail-rate 0.02"] {
        let line = format!("pre-fault-memory -b 8M -i 2 --backend-cost 0 {flags}");
        let report = report(&line);
        let rows = report["results"].as_array().expect("a list");
        let pages: Vec<_> = rows.iter().map(|row| number(&row["pages"])).collect();
        assert_eq!(pages, [2048.0, 2048.0, 4.0, 4.0], "{line}");
        assert_eq!(report["checks"]["left_out"], 0, "{line}");
        assert_eq!(report["checks"]["exits"], 0, "{line}");
    }
}

#[test]
fn demand_paging_of_a_confidential_guest_is_compared() {
    for (flags, name) in [
        ("--visibility private", "tdp_private"),
        ("--visibility mixed", "tdp_mixed"),
        ("--visibility private --backend tdx", "tdp_private"),
        ("--visibility mixed --backend tdx -s 2m -b 64M", "tdp_mixed"),
    ] {
        let size = if flags.contains("-b") { "" } else { "-b 4M" };
        let line = format!("demand-paging -v 2 {size} -i 2 -f ept --against none {flags} --json -");
        let report = json(&bench(&words(&line)));
        assert!(number(&report["ratios"][name]) > 0.0, "{line}");
        assert_eq!(report["checks"]["baselines_mismatched"], 0, "{line}");
        assert_eq!(report["checks"]["leaked_frames"], 0, "{line}");
    }
}
