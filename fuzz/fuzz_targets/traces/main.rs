//! What reads text from outside: lines of a trace, scenarios, compressed traces, sizes, durations; and the replay of
//! traces that no kernel wrote.
//!
//! Any bytes are read or refused. A size that is read is shown as it is read; what is refused says why. The first byte
//! chooses. The sources of the command line are compiled in, without the rest of its crate, which takes long.
#![no_main]

mod invented;

#[allow(dead_code, reason = "the command line uses the rest")]
#[path = "../../../benches/src/formats.rs"]
mod formats;
#[allow(dead_code, unreachable_pub, reason = "the command line uses the rest")]
#[path = "../../../benches/src/replay/mod.rs"]
mod replay;
#[allow(dead_code, reason = "the command line uses the rest")]
#[path = "../../../benches/src/report.rs"]
mod report;
#[allow(dead_code, reason = "the command line uses the rest")]
#[path = "../../../benches/src/size.rs"]
mod size;
#[allow(dead_code, unreachable_pub, reason = "the command line uses the rest")]
#[path = "../../../benches/src/sys.rs"]
mod sys;
#[path = "../../../benches/src/time.rs"]
mod time;

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use replay::scenario::Scenario;
use replay::source::Lines;
use replay::trace::{Event, Line};
use std::io::Cursor;

/// Lines of one execution.
const MOST_LINES: usize = 16;
/// Changes of a run that are looked at.
const MOST_CHANGES: usize = 64;

fn line(text: &str) {
    match Line::parse(text) {
        Ok(line) => {
            if let Event::Changed(run) = line.event {
                for change in run.changes().take(MOST_CHANGES) {
                    assert!((1..=5).contains(&change.level) && change.as_id < 2);
                    assert!(change.gfn < 1 << 40, "{change:x?}");
                }
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn lines(bytes: &[u8], compressed: bool) {
    let mut lines = Lines::of(Cursor::new(bytes.to_vec()), compressed);
    for _ in 0..MOST_LINES {
        match lines.next_line() {
            Ok(Some(text)) => {
                assert!(!text.is_empty() && !text.contains('\n'));
                line(text);
            }
            Ok(None) | Err(_) => break,
        }
    }
}

fn numbers(text: &str) {
    if let Ok(bytes) = size::parse(text) {
        assert!(bytes > 0 && bytes.is_multiple_of(4096) && bytes <= 1 << 52);
        assert_eq!(size::parse(&size::show(bytes)), Ok(bytes));
    }
    if let Ok(time) = time::parse(text) {
        assert!(time.as_secs() <= 1);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&kind, rest)) = bytes.split_first() else {
        return;
    };
    let text = str::from_utf8(rest);
    match (kind, text) {
        (b'z', _) => lines(rest, true),
        (b'l', _) => lines(rest, false),
        (b's', Ok(text)) => {
            if let Err(what) = Scenario::parse(text) {
                assert!(!what.is_empty());
            }
        }
        (b'n', Ok(text)) => numbers(text),
        _ => {
            if let Ok(input) = invented::Input::arbitrary_take_rest(Unstructured::new(rest)) {
                invented::run(&input);
            }
        }
    }
});
