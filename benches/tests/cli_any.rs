//! Any command line is read or refused, whatever it is made of; nothing is run.

use proptest::prelude::*;
use std::ffi::OsString;
use tdp_bench::cli;

/// Arguments that mean something somewhere.
const WORDS: [&str; 44] = [
    "demand-paging",
    "pre-fault-memory",
    "private-faults",
    "private-mem-conversions",
    "vm-teardown",
    "access-tracking-perf",
    "memslot-perf",
    "memslot-modification-stress",
    "nx-huge-pages-perf",
    "dirty-log-perf",
    "mmu-stress",
    "sweeps",
    "interference",
    "replay",
    "--json",
    "-",
    "--",
    "-v",
    "-b",
    "-i",
    "-f",
    "-s",
    "-w",
    "-x",
    "-l",
    "-p",
    "-o",
    "-d",
    "--against",
    "--visibility",
    "--backend-cost",
    "--backend-wait",
    "--busy-rate",
    "--fail-rate",
    "--seconds",
    "--limit-faults",
    "--help",
    "-h",
    "--version",
    "all",
    "both",
    "ept",
    "mixed",
    "benches/testdata",
];

fn argument() -> impl Strategy<Value = OsString> {
    let number = prop_oneof![
        any::<u64>().prop_map(|n| n.to_string()),
        (
            any::<u16>(),
            prop::sample::select(&["K", "m", "G", "T", "us", "ms", "ns", "%", ""][..])
        )
            .prop_map(|(n, unit)| format!("{n}{unit}")),
        any::<f64>().prop_map(|n| n.to_string()),
    ];
    let text = prop_oneof![
        5 => prop::sample::select(&WORDS[..]).prop_map(str::to_owned),
        3 => number,
        1 => ".{0,12}",
        1 => (prop::sample::select(&WORDS[..]), ".{0,6}").prop_map(|(word, rest)| format!("{word}={rest}")),
    ];
    text.prop_map(OsString::from)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_arguments_are_read_or_refused(
        scenario in prop::option::weighted(0.9, prop::sample::select(&WORDS[..14])),
        arguments in prop::collection::vec(argument(), 0..8),
    ) {
        let first = ["tdp-bench"].into_iter().chain(scenario).map(OsString::from);
        if let Err(error) = cli::check(first.chain(arguments)) {
            prop_assert!(!error.to_string().is_empty());
        }
    }
}
