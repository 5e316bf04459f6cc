//! What the laps say: ratios, the readable table, the JSON body.

use super::Args;
use super::lanes::Results;
use crate::confidential::args::BackendParameters;
use crate::confidential::conditions::Met;
use crate::confidential::guest::Checks;
use crate::race::{Laps, median, minimum, paired_ratio};
use crate::report::Output;
use serde::Serialize;

#[derive(Serialize)]
pub(super) struct Body<'a> {
    parameters: Parameters,
    results: Vec<Row<'a>>,
    ratios: Ratios,
    /// What the module's calls took that was asked for; null if calls cost nothing.
    achieved: Achieved,
    counts: Counts,
    checks: &'a Checks,
}

#[derive(Serialize)]
struct Parameters {
    vcpus: u16,
    bytes_per_vcpu: u64,
    page_bytes: u64,
    rounds: u16,
    #[serde(flatten)]
    backend: BackendParameters,
    /// Tables are linked before the clock starts.
    tables: &'static str,
}

/// One lane.
#[derive(Serialize)]
struct Row<'a> {
    name: &'static str,
    ns_per_operation: Figures,
    operations_per_second: f64,
    #[serde(flatten)]
    laps: &'a Laps,
    /// Of each lap, the nanoseconds that the module took.
    #[serde(skip_serializing_if = "<[u64]>::is_empty")]
    hook_ns: &'a [u64],
}

#[derive(Serialize)]
struct Figures {
    median: f64,
    min: f64,
}

/// Medians of the rounds' ratios.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Ratios {
    /// Rate of all vCPUs over that of one; above 1 calls of the module overlap.
    overlap: f64,
    /// A private fault on a module that does nothing over a shared one.
    vs_shared: f64,
    /// What the library adds to a call of 5 us, over that.
    overhead: f64,
}

#[derive(Serialize)]
struct Achieved {
    one_ns_per_call: Option<f64>,
    all_ns_per_call: Option<f64>,
}

#[derive(Serialize)]
struct Counts {
    /// Of the lanes `one` and `all`.
    one: Met,
    all: Met,
    /// Calls that were answered "again", injected ones included.
    busy: u64,
    frozen_waits: u64,
    /// Faults to be tried again, and faults that the module refused.
    retried: u64,
    refused: u64,
}

impl Ratios {
    pub(super) fn new(results: &Results) -> Self {
        let overhead: Vec<f64> = results
            .overhead
            .cpu_ns
            .iter()
            .zip(&results.overhead_hook_ns)
            .map(|(&cpu, &hook)| (cpu as f64 - hook as f64) / hook as f64)
            .collect();
        Self {
            overlap: paired_ratio(
                &results.one.wall_per_operation(),
                &results.all.wall_per_operation(),
            ),
            vs_shared: paired_ratio(
                &results.private.per_operation(),
                &results.shared.per_operation(),
            ),
            overhead: median(&overhead),
        }
    }
}

impl<'a> Body<'a> {
    pub(super) fn new(args: &Args, results: &'a Results) -> Self {
        let row = |name, laps: &'a Laps, hook_ns| {
            let ns = clock(name, laps);
            Row {
                name,
                ns_per_operation: Figures {
                    median: median(&ns),
                    min: minimum(&ns),
                },
                operations_per_second: 1e9 / median(&ns),
                laps,
                hook_ns,
            }
        };
        Self {
            parameters: Parameters {
                vcpus: args.vcpus,
                bytes_per_vcpu: args.bytes,
                page_bytes: args.backing.level().bytes(),
                rounds: args.rounds,
                backend: args.backend.parameters(),
                tables: "warm",
            },
            results: vec![
                row("shared", &results.shared, &[]),
                row("private", &results.private, &[]),
                row("overhead", &results.overhead, &results.overhead_hook_ns),
                row("one", &results.one, &[]),
                row("all", &results.all, &[]),
            ],
            ratios: Ratios::new(results),
            achieved: Achieved {
                one_ns_per_call: results.met[0].ns_per_call(),
                all_ns_per_call: results.met[1].ns_per_call(),
            },
            counts: Counts {
                one: results.met[0],
                all: results.met[1],
                busy: results.busy,
                frozen_waits: results.frozen_waits,
                retried: results.retried,
                refused: results.refused,
            },
            checks: &results.checks,
        }
    }
}

/// The module's calls may sleep in the lanes that it was asked for: those are charged wall time.
fn clock(name: &str, laps: &Laps) -> Vec<f64> {
    match name {
        "one" | "all" => laps.wall_per_operation(),
        _ => laps.per_operation(),
    }
}

/// Prints the readable part.
pub(super) fn tell(output: &Output, args: &Args, results: &Results) {
    let ratios = Ratios::new(results);
    output.say(format_args!(
        "{} MiB of private memory a vCPU in pages of {}; nanoseconds a page, median of rounds (fastest)",
        args.bytes >> 20,
        crate::size::show(args.backing.level().bytes()),
    ));
    let line = |name: &'static str, what: String, laps: &Laps| {
        let ns = clock(name, laps);
        vec![
            what,
            format!("{:.1} ({:.1})", median(&ns), minimum(&ns)),
            format!("{:.0}", 1e9 / median(&ns)),
        ]
    };
    let asked = |vcpus: u16| {
        format!(
            "private, {}, {:?}, {vcpus} vCPUs",
            args.backend.name(),
            args.backend.module.backend_cost
        )
    };
    output.table(
        &["", "ns a page", "pages/s"],
        [
            line("shared", "shared".to_owned(), &results.shared),
            line(
                "private",
                "private, free calls".to_owned(),
                &results.private,
            ),
            line(
                "overhead",
                "private, calls of 5us".to_owned(),
                &results.overhead,
            ),
            line("one", asked(1), &results.one),
            line("all", asked(args.vcpus), &results.all),
        ],
    );
    output.say(format_args!(
        "Overlap: {} vCPUs map {:.2} times what one does",
        args.vcpus, ratios.overlap
    ));
    output.say(format_args!(
        "Private over shared: {:.2}; added to a call of 5us: {:.2} %",
        ratios.vs_shared,
        ratios.overhead * 100.0
    ));
    if let [Some(one), Some(all)] = results.met.map(|met| met.ns_per_call()) {
        output.say(format_args!(
            "A call took {:.1} us by one vCPU, {:.1} us by all; tables were linked beforehand",
            one / 1e3,
            all / 1e3
        ));
    }
    results.checks.tell(output);
}
