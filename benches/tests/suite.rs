//! The suite and the comparison of its reports, from outside.

mod support;

use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use support::{bench, json as report, text, words};

/// A folder that goes away.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tdp-suite-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.0.join(name);
        fs::write(&path, content).expect("a file");
        shown(&path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left is the system's to clean.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn shown(path: &Path) -> String {
    path.to_str().expect("a path of text").to_owned()
}

/// Two rounds of what is over soonest.
fn suite(out: &Path) -> Value {
    let out = shown(out);
    let args = words("suite --quick -i 2 --only vm-teardown,pre-fault-memory --json - --out");
    let output = bench(&[&args[..], &[&out]].concat());
    report(&output)
}

#[test]
fn a_run_leaves_a_page_that_needs_nothing_else_and_a_report_that_equals_itself() {
    let folder = Folder::new("run");
    let told = suite(&folder.0.join("deep/down"));
    let path = folder.0.join("deep/down/report.json");
    let kept: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert_eq!(kept, told, "the file is what --json shows");

    assert_eq!(told["rounds"], 2);
    assert!(told["machine"]["cpus"].as_u64().is_some_and(|n| n > 0));
    let scenarios = told["scenarios"].as_array().unwrap();
    let names: Vec<_> = scenarios
        .iter()
        .map(|s| s["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["pre-fault-memory", "vm-teardown"]);
    let mut figures = 0;
    for scenario in scenarios {
        assert_eq!(scenario["errors"], json!([]));
        assert!(scenario["parameters"].is_object() && scenario["checks"].is_object());
        for figure in scenario["figures"].as_array().unwrap() {
            let values = figure["values"].as_array().unwrap();
            assert_eq!(values.len(), 2, "one a round: {figure}");
            let (min, max) = (&figure["min"], &figure["max"]);
            assert!(min.as_f64().unwrap() <= max.as_f64().unwrap());
            figures += 1;
        }
    }
    assert!(figures > 8, "{figures}");

    let page = fs::read_to_string(folder.0.join("deep/down/report.html")).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>\n"));
    for word in ["http", "src=", "<script", "<link", "@import", "url("] {
        assert!(!page.contains(word), "{word}");
    }
    assert_eq!(page.matches("<circle").count(), 2 * figures);

    let path = shown(&path);
    let same = report(&bench(&["compare", &path, &path, "--json", "-"]));
    assert_eq!(same["rows"].as_array().unwrap().len(), figures);
    for key in ["better", "worse", "unmatched"] {
        assert_eq!(same[key], 0, "{key}");
    }

    // Everything takes twice as long, and one figure is gone.
    let mut slow = told;
    let list = slow["scenarios"][0]["figures"].as_array_mut().unwrap();
    list.remove(0);
    for figure in list {
        for value in figure["values"].as_array_mut().unwrap() {
            *value = json!(value.as_f64().unwrap() * 1e3);
        }
    }
    let slow = folder.file("slow.json", slow.to_string());
    let output = bench(&["compare", &path, &slow, "--json", "-"]);
    let compared = report(&output);
    assert_eq!(compared["worse"], 3, "{compared}");
    assert_eq!(
        (&compared["better"], &compared["unmatched"]),
        (&json!(0), &json!(1))
    );
    let compared = report(&bench(&["compare", &slow, &path, "--json", "-"]));
    assert_eq!(
        (&compared["better"], &compared["worse"]),
        (&json!(3), &json!(0))
    );
}

#[test]
fn what_is_no_report_is_one_line_and_exit_code_1() {
    let folder = Folder::new("bad");
    let empty = json!({"commit": null, "started": 0, "seconds": 1.0, "quick": true, "rounds": 1, "scenarios": []});
    let with = |key: &str, value: Value| {
        let mut report = empty.clone();
        report["scenario"] = json!("suite");
        report[key] = value;
        report.to_string()
    };
    let figures = |values: Value| {
        with(
            "scenarios",
            json!([{"name": "x", "about": "", "command": "", "figures": [{
                "name": "x", "unit": "ns", "more_is_better": false, "values": values,
                "median": 1.0, "lower": 1.0, "upper": 1.0, "min": 1.0, "max": 1.0
            }]}]),
        )
    };
    let good = folder.file("good.json", figures(json!([1.0, 2.0])));
    for (name, content, names) in [
        ("empty.json", String::new(), "no report"),
        (
            "text.json",
            "Once upon a time\nthere was".to_owned(),
            "no report",
        ),
        ("number.json", "7".to_owned(), "no report"),
        (
            "other.json",
            r#"{"scenario": "sweeps"}"#.to_owned(),
            "sweeps",
        ),
        (
            "bare.json",
            r#"{"scenario": "suite"}"#.to_owned(),
            "no figures",
        ),
        ("rounds.json", with("rounds", json!(-1)), "no figures"),
        ("words.json", figures(json!(["fast"])), "no figures"),
        ("none.json", figures(json!([])), "in common"),
        ("nothing.json", with("scenarios", json!([])), "in common"),
        ("deep.json", "[".repeat(100_000), "no report"),
        ("bytes.json", "\u{0}\u{1}".to_owned(), "no report"),
    ] {
        let bad = folder.file(name, content);
        for args in [[&good, &bad], [&bad, &good]] {
            fails(&["compare", args[0], args[1]], 1, &[name, names]);
        }
    }
    let folder_path = shown(&folder.0);
    fails(&["compare", &good, &folder_path], 1, &[&folder_path]);
    fails(
        &["compare", "/nowhere/at/all.json", &good],
        1,
        &["/nowhere/at/all.json"],
    );
    fails(&["compare", &good], 2, &["B.json"]);
    fails(&["compare"], 2, &["A.json"]);

    fails(&["suite"], 2, &["--out"]);
    fails(
        &["suite", "-i", "0", "--out", &folder_path],
        2,
        &["--rounds"],
    );
    fails(
        &["suite", "--only", "x", "--out", &folder_path],
        2,
        &["'x'"],
    );
    fails(&["suite", "--quick", "--out", &good], 1, &[&good]);
    fails(
        &["suite", "--quick", "--out", "/proc/none"],
        1,
        &["/proc/none"],
    );
}

fn fails(args: &[&str], code: i32, names: &[&str]) {
    let output = bench(args);
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {errors}");
    assert_eq!(errors.lines().count(), 1, "{args:?}: {errors}");
    assert!(errors.starts_with("error: "), "{args:?}: {errors}");
    for name in names {
        assert!(errors.contains(name), "{args:?}: {errors}");
    }
}
