//! The memory that the library takes, from outside.

mod support;

use serde_json::Value;
use support::{bench, json, text, words};

fn number(row: &Value, path: &str) -> u64 {
    let value = row.pointer(path).and_then(Value::as_u64);
    value.unwrap_or_else(|| panic!("{path} of {row}"))
}

#[test]
fn every_table_is_counted_at_rest_and_while_it_waits() {
    let output = bench(&words(
        "memory -b 64M --sparse 64G --pages 64 -f both --json -",
    ));
    let report = json(&output);
    let rows = report["results"].as_array().unwrap();
    assert_eq!(rows.len(), 12, "two guests, three ways, two formats");
    for row in rows {
        // 64 MiB from 1 GiB on: 32 tables of pages and one for each level above; of the other, a page every GiB.
        let tables = if row["name"] == "dense" {
            32 + 3
        } else {
            2 * 64 + 2
        };
        assert_eq!(number(row, "/tables"), tables, "{row}");
        let (rest, worst) = (&row["rest"], &row["worst"]);
        let linked = number(rest, "/frame_bytes") - number(row, "/spare_bytes");
        assert_eq!(linked, tables * 4096);
        assert_eq!(number(rest, "/garbage_bytes"), 0);
        assert!(number(worst, "/frame_bytes") >= number(rest, "/frame_bytes"));
        // A root stays.
        if row["zap"] == "held_back" {
            assert_eq!(
                number(worst, "/garbage_bytes"),
                (tables - 1) * 4096,
                "{row}"
            );
        }
        if cfg!(target_env = "gnu") {
            assert!(number(rest, "/heap_bytes") >= number(row, "/metadata_bytes"));
        }
    }
    assert_eq!(report["checks"]["leaked_frames"], 0);
    let ratio = report["ratios"]["at_rest_over_entries"]["dense ept"].as_f64();
    assert!(
        ratio.is_some_and(|ratio| (1.0..2.0).contains(&ratio)),
        "{ratio:?}"
    );
    assert!(text(&output.stderr).contains("at the worst moment"));
}
