//! The scenarios about sweeps, slots, logs and stress, from outside: bad input, and small runs of which every check holds.

mod support;

use serde_json::Value;
use support::{bench, json, text, words};

fn report(line: &str) -> Value {
    json(&bench(&words(&format!("{line} --json -"))))
}

/// Every check is zero but those that count what was done.
fn all_is_well(report: &Value, done: &[&str]) {
    for (check, count) in report["checks"].as_object().expect("checks") {
        if done.contains(&check.as_str()) {
            assert!(count.as_u64().is_some_and(|n| n > 0), "{check}: {count}");
        } else {
            assert_eq!(*count, 0, "{check}");
        }
    }
}

fn is_ratio(value: &Value) -> bool {
    value.as_f64().is_some_and(|ratio| ratio > 0.0)
}

#[test]
fn wrong_usage_is_one_line_that_names_it_and_exit_code_2() {
    for (args, names) in [
        ("sweeps -b 0", "must not be zero"),
        ("sweeps -b 1M", "-b 1M"),
        ("sweeps -b 512T", "-b 512T"),
        ("sweeps -i 0", "--rounds"),
        ("sweeps extra", "extra"),
        ("interference -b 1000", "multiple of 4K"),
        ("interference -c 0", "-c"),
        ("interference -b 4M -i 1 -c 0,1000000", "1000000"),
        ("access-tracking-perf -v 0", "--vcpus"),
        ("access-tracking-perf -b 4096T", "does not fit"),
        ("dirty-log-perf -w 101", "--writes"),
        ("dirty-log-perf -b 4M -s 2m -x 8", "-x 8"),
        ("dirty-log-perf -s 3m", "3m"),
        ("dirty-log-perf -i 0", "--iterations"),
        ("memslot-perf -s 1", "--slots"),
        ("memslot-perf -s 32765", "--slots"),
        ("memslot-perf -s 512 -b 1M", "-s 512"),
        ("memslot-perf -l 0", "--length"),
        ("memslot-modification-stress -d 5", "--delay"),
        ("nx-huge-pages-perf -r 0", "--ratio"),
        ("nx-huge-pages-perf -p 5s", "--period"),
        ("mmu-stress -b 2M", "-b 2M"),
        ("mmu-stress --seconds 0", "seconds"),
        ("mmu-stress -v 65", "--vcpus"),
        ("mmu-stress --sparse 1G", "--sparse 1G"),
        ("soak --seconds 0", "seconds"),
        ("soak -v 0", "--vcpus"),
        ("soak --seed x", "--seed"),
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
fn sweeps_leave_nothing_out() {
    let report = report("sweeps -b 4M -i 2");
    all_is_well(&report, &[]);
    for sweep in [
        "write_protect",
        "age",
        "age_software_ad",
        "zap",
        "clear_dirty",
        "clear_masks",
        "clear_masks_dirty_bit",
        "split",
        "collapse",
    ] {
        assert!(is_ratio(&report["ratios"]["over_floor"][sweep]), "{sweep}");
    }
    for baseline in ["mutex", "rwlock", "table_lock"] {
        assert!(is_ratio(&report["ratios"]["baselines"][baseline]["age"]));
    }
}

#[test]
fn a_vcpu_is_swept_and_goes_on() {
    let report = report("interference -b 4M -i 1");
    all_is_well(&report, &[]);
    for contender in ["tdp", "tdp_all", "rwlock", "mutex", "table_lock"] {
        assert!(
            is_ratio(&report["ratios"]["rate_kept"][contender]),
            "{contender}"
        );
        assert!(is_ratio(&report["ratios"]["worst_fault"][contender]));
    }
}

#[test]
fn pages_are_as_young_and_as_old_as_they_should_be() {
    let report = report("access-tracking-perf -b 2M -i 1 -p -f both");
    all_is_well(&report, &[]);
    assert!(is_ratio(&report["ratios"]["aging_over_floor"]));
    for contender in ["tdp", "tdp_software_ad", "rwlock"] {
        assert!(is_ratio(&report["ratios"]["slowdown_by_aging"][contender]));
    }
    let lines = text(&bench(&words("access-tracking-perf -b 2M -i 1")).stdout);
    assert!(
        lines.contains("Mark memory idle              : "),
        "{lines}"
    );
}

#[test]
fn logs_tell_what_was_written_and_nothing_else() {
    for flags in [
        "-b 4M -w 50 -f both",
        "-b 4M -s 4k -w 5 -g",
        "-b 8M -x 3 -i 3 -e",
        "-v 1 -b 1G -s 1g -w 1 -i 1 --rounds 1",
    ] {
        let rounds = if flags.contains("--rounds") {
            ""
        } else {
            "--rounds 1"
        };
        let report = report(&format!("dirty-log-perf {flags} {rounds}"));
        all_is_well(&report, &[]);
        assert!(is_ratio(&report["ratios"]["rwlock"]["dirty 1"]), "{flags}");
    }
}

#[test]
fn slots_come_go_and_move() {
    let report_of_perf = report("memslot-perf -s 16 -b 8M -l 0.01 -f both");
    all_is_well(&report_of_perf, &[]);
    assert!(is_ratio(&report_of_perf["ratios"]["rwlock"]["unmap"]));
    let stress = report("memslot-modification-stress -b 4M -i 1");
    all_is_well(&stress, &["modifications"]);
    assert!(is_ratio(&stress["ratios"]["rate_kept"]["tdp"]));
}

#[test]
fn large_pages_are_recovered_while_a_vcpu_fetches() {
    let report = report("nx-huge-pages-perf -b 8M -i 1 -p 100us -r 1");
    all_is_well(&report, &["steps"]);
    assert!(is_ratio(&report["ratios"]["longest_fault"]["rwlock"]));
}

#[test]
fn everything_at_once_is_survived() {
    let report = report("mmu-stress --seconds 2 -b 8M --sparse 16G");
    all_is_well(&report, &[]);
    assert!(is_ratio(&report["ratios"]["invalidate_us"]));
    // A guest whose root was taken down at last has no page to check; not all end so.
    let mut checked = 0;
    for guest in report["results"]["shared"].as_array().expect("guests") {
        assert!(guest["host"]["migrations"].as_u64().is_some_and(|n| n > 0));
        checked += guest["checked"].as_u64().expect("pages");
    }
    assert!(checked > 0);
    let private = &report["results"]["private"];
    assert!(private["sweeps"].as_u64().is_some_and(|n| n > 0));
    assert!(private["conversions"].as_u64().is_some_and(|n| n > 0));
}

#[test]
fn what_is_neglected_on_purpose_is_noticed() {
    let output = bench(&words(
        "mmu-stress --seconds 6 -f npt --sparse 16G --flaw no-flush --json -",
    ));
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).expect("a report all the same");
    let stale = report["checks"]["stale_translations"].as_u64();
    assert!(stale.is_some_and(|n| n > 0), "{}", report["checks"]);
}

/// Four guests: each half and each format.
#[test]
fn a_soak_finds_nothing_wrong_and_accounts_for_every_frame() {
    // A guest whose roots were all taken down at last has no frame to account for; not all four end so.
    let mut frames = 0;
    for episode in 0..4 {
        let report = report(&format!("soak --seed 5 --episode {episode}"));
        assert_eq!(report["checks"]["violations"], 0, "{}", report["checks"]);
        let results = &report["results"];
        for done in ["quiet_points", "walks"] {
            let count = results["checked"][done].as_u64();
            assert!(count.is_some_and(|n| n > 0), "{done}: {count:?}");
        }
        frames += results["checked"]["frames_accounted_for"].as_u64().unwrap();
        assert!(
            results["guest"]["threads_died"]
                .as_u64()
                .is_some_and(|n| n > 0)
        );
    }
    assert!(frames > 0);
}

/// The sequences are the seed's: what threads decide to do does not depend on what happened.
#[test]
fn a_soak_repeats_what_threads_do() {
    let one = || {
        let report = report("soak --seed 5 --episode 1");
        let done = &report["results"];
        (
            done["guest"]["threads_died"].clone(),
            done["host"]["age"].clone(),
        )
    };
    assert_eq!(one(), one());
}

#[test]
fn a_soak_notices_what_is_neglected_on_purpose() {
    for flaw in ["no-flush", "gives-away-first", "keeps-private"] {
        let output = bench(&words(&format!(
            "soak --seconds 30 --seed 3 --flaw {flaw} --json -"
        )));
        assert_eq!(output.status.code(), Some(1), "{flaw}");
        let report: Value = serde_json::from_slice(&output.stdout).expect("a report all the same");
        assert!(
            report["checks"]["violations"]
                .as_u64()
                .is_some_and(|n| n > 0),
            "{flaw}"
        );
        assert!(text(&output.stderr).contains("--episode"), "{flaw}");
    }
}
