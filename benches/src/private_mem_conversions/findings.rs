//! What the run says: rates, waits, checks.

use super::Args;
use super::disjoint::{Disjoint, Quartet};
use super::storm::{Accesses, Storm};
use crate::confidential::args::ModuleParameters;
use crate::confidential::conditions::Met;
use crate::confidential::guest::Checks;
use crate::report::Output;
use serde::Serialize;
use std::collections::BTreeMap;

#[derive(Serialize)]
pub(super) struct Body<'a> {
    parameters: Parameters,
    conversions_per_second: f64,
    accesses_per_second: f64,
    conversions: Conversions,
    accesses: Accesses,
    waits: Waits,
    /// By kind: made, and answered "again".
    calls: BTreeMap<&'static str, (u64, u64)>,
    met: Met,
    disjoint: BTreeMap<&'static str, Quartet>,
    checks: Verified<'a>,
}

#[derive(Serialize)]
struct Parameters {
    vcpus: u16,
    bytes_per_vcpu: u64,
    chunk_bytes: u64,
    page_bytes: u64,
    threads: u16,
    seconds: f64,
    #[serde(flatten)]
    module: ModuleParameters,
}

#[derive(Serialize)]
struct Conversions {
    to_private: u64,
    to_shared: u64,
    failed: u64,
    splits: u64,
    ns: Latency,
}

/// Of one conversion.
#[derive(Clone, Copy, Default, Serialize)]
struct Latency {
    p50: u64,
    p99: u64,
    p9999: u64,
    max: u64,
}

#[derive(Serialize)]
struct Waits {
    frozen: u64,
    carried: u64,
    carrier: u64,
    tickets: u64,
    retried: u64,
    refused: u64,
}

#[derive(Serialize)]
struct Verified<'a> {
    #[serde(flatten)]
    checks: &'a Checks,
    /// Frames that were looked at while everything went on, beside all frames at each quiet moment.
    looked_at: u64,
    double_mapped: u64,
    misplaced: u64,
    disjoint_waits: u64,
}

impl Latency {
    fn of(ns: &[u64]) -> Self {
        let mut sorted = ns.to_vec();
        sorted.sort_unstable();
        let at = |share: f64| {
            let rank = (sorted.len() as f64 * share).ceil() as usize;
            sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0)
        };
        Self {
            p50: at(0.5),
            p99: at(0.99),
            p9999: at(0.9999),
            max: at(1.0),
        }
    }
}

impl<'a> Body<'a> {
    pub(super) fn new(args: &Args, storm: &'a Storm, disjoint: &Disjoint) -> Self {
        let seconds = storm.wall.as_secs_f64();
        Self {
            parameters: Parameters {
                vcpus: args.vcpus,
                bytes_per_vcpu: args.bytes,
                chunk_bytes: args.chunk.level().bytes(),
                page_bytes: args.backing.level().bytes(),
                threads: args.threads,
                seconds: args.seconds,
                module: args.module.parameters(),
            },
            conversions_per_second: storm.conversions.done() as f64 / seconds,
            accesses_per_second: storm.accesses.made as f64 / seconds,
            conversions: Conversions {
                to_private: storm.conversions.to_private,
                to_shared: storm.conversions.to_shared,
                failed: storm.conversions.failed,
                splits: storm.splits,
                ns: Latency::of(&storm.conversions.ns),
            },
            accesses: storm.accesses,
            waits: Waits {
                frozen: storm.frozen_waits,
                carried: storm.carried,
                carrier: storm.carrier_waits,
                tickets: storm.ticket_waits,
                retried: storm.retried,
                refused: storm.refused,
            },
            calls: storm.calls.named(),
            met: storm.met,
            disjoint: [("null", disjoint.null), ("tdx", disjoint.tdx)]
                .into_iter()
                .collect(),
            checks: Verified {
                checks: &storm.checks,
                looked_at: storm.looked_at,
                double_mapped: storm.double_mapped,
                misplaced: storm.misplaced,
                disjoint_waits: disjoint.null.waits.sum(),
            },
        }
    }
}

/// Prints the readable part.
pub(super) fn tell(output: &Output, args: &Args, storm: &Storm, disjoint: &Disjoint) {
    let seconds = storm.wall.as_secs_f64();
    let latency = Latency::of(&storm.conversions.ns);
    let us = |ns: u64| format!("{:.1}", ns as f64 / 1e3);
    output.say(format_args!(
        "{} vCPUs on {} MiB each, pages of {}; {} threads convert {} at a time, for {seconds:.2} s",
        args.vcpus,
        args.bytes >> 20,
        crate::size::show(args.backing.level().bytes()),
        args.threads,
        crate::size::show(args.chunk.level().bytes()),
    ));
    output.table(
        &["", "a second", "number", "p50 us", "p99 us", "max us"],
        [
            vec![
                "conversions".to_owned(),
                format!("{:.0}", storm.conversions.done() as f64 / seconds),
                storm.conversions.done().to_string(),
                us(latency.p50),
                us(latency.p99),
                us(latency.max),
            ],
            vec![
                "accesses".to_owned(),
                format!("{:.0}", storm.accesses.made as f64 / seconds),
                storm.accesses.made.to_string(),
            ],
            vec![
                "that faulted".to_owned(),
                format!("{:.0}", storm.accesses.faulted as f64 / seconds),
                storm.accesses.faulted.to_string(),
            ],
        ],
    );
    output.say(format_args!(
        "Waits: {} for frozen entries, {} for a carrier ({} removals carried by another thread), {} for another's ticket, {} faults tried again; {} calls busy",
        storm.frozen_waits,
        storm.carrier_waits,
        storm.carried,
        storm.ticket_waits,
        storm.retried,
        storm.calls.all_busy()
    ));
    output.say(format_args!(
        "Injected: {} busy, {} failures; {} conversions and {} faults were refused; {} large leaves split",
        storm.met.injected_busy,
        storm.met.injected_failures,
        storm.conversions.failed,
        storm.refused,
        storm.splits,
    ));
    for (name, it) in [("null", disjoint.null), ("tdx", disjoint.tdx)] {
        output.say(format_args!(
            "Disjoint ranges, {name}: {} faults, {} conversions, {} removals; waits: {} frozen, {} for a carrier, {} for another's ticket, {} busy, {} retried",
            it.faults,
            it.conversions,
            it.removals,
            it.waits.frozen,
            it.waits.carrier,
            it.waits.tickets,
            it.waits.busy,
            it.waits.retried
        ));
    }
    output.say(format_args!(
        "Looked at {} frames meanwhile, and at all at each quiet moment: {} mapped by both halves, {} by the wrong one",
        storm.looked_at, storm.double_mapped, storm.misplaced
    ));
    storm.checks.tell(output);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_are_of_the_ranks_that_they_name() {
        let ns: Vec<u64> = (1..=10_000).rev().collect();
        let latency = Latency::of(&ns);
        assert_eq!(
            (latency.p50, latency.p99, latency.p9999, latency.max),
            (5000, 9900, 9999, 10_000)
        );
        assert_eq!(Latency::of(&[]).max, 0);
        assert_eq!(Latency::of(&[7]).p50, 7);
    }
}
