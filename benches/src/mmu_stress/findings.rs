//! What was done, and what was found to be wrong.

use super::Args;
use super::guest::Counts;
use super::hands::Done;
use super::sparse::Sparse;
use super::world::Verdict;
use crate::private_mem_conversions::UnderSweeps;
use crate::report::{Error, Output};
use crate::sync::Ordering;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;
use tdp::{DirtyTracking, Stats};
use tdp_arch::Format;

/// Times of the phases of KVM's test.
#[derive(Debug, Serialize)]
pub(super) struct Phases {
    run1_ns: u64,
    reset_ns: u64,
    run2_ns: u64,
    ro_ns: u64,
    rw_ns: u64,
    #[serde(skip)]
    pub(super) writes: u64,
}

impl Phases {
    pub(super) fn new(times: [Duration; 5], writes: u64) -> Self {
        let [run1_ns, reset_ns, run2_ns, ro_ns, rw_ns] =
            times.map(|time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        Self {
            run1_ns,
            reset_ns,
            run2_ns,
            ro_ns,
            rw_ns,
            writes,
        }
    }
}

/// One guest that is not confidential.
#[derive(Debug, Serialize)]
pub(super) struct Shared {
    format: &'static str,
    dirty_tracking: String,
    phases: Phases,
    guest: Counts,
    host: Done,
    stats: BTreeMap<&'static str, u64>,
    /// Pages looked at, at rest.
    checked: u64,
    mismatches: u64,
    lost_dirty: u64,
    stale_translations: u64,
    leaked_frames: u64,
}

impl Shared {
    #[allow(clippy::too_many_arguments, reason = "made in one place")]
    pub(super) fn new<F: Format>(
        tracking: DirtyTracking,
        phases: Phases,
        guest: Counts,
        host: Done,
        checked: u64,
        verdict: &Verdict,
        stats: &Stats,
        leaked_frames: u64,
    ) -> Self {
        Self {
            format: F::NAME,
            dirty_tracking: format!("{tracking:?}"),
            phases,
            guest,
            host,
            stats: BTreeMap::from([
                ("fixed", stats.fixed),
                ("splits", stats.splits),
                ("collapses", stats.collapses),
                ("flushes", stats.flushes),
                ("roots_made", stats.roots_made),
            ]),
            checked,
            mismatches: verdict.mismatches.load(Ordering::Relaxed),
            lost_dirty: verdict.lost_dirty.load(Ordering::Relaxed),
            stale_translations: verdict.stale.load(Ordering::Relaxed),
            leaked_frames,
        }
    }
}

#[derive(Serialize)]
pub(super) struct Body {
    parameters: Parameters,
    results: Results,
    ratios: Ratios,
    checks: Checks,
}

#[derive(Serialize)]
struct Parameters {
    vcpus: u16,
    bytes: u64,
    seconds: f64,
    seed: u64,
}

#[derive(Serialize)]
struct Results {
    shared: Vec<Shared>,
    private: UnderSweeps,
    sparse: Sparse,
}

#[derive(Serialize)]
struct Ratios {
    /// Median time of the call that makes the root of the sparse guest obsolete, after 8192 other tables were touched.
    invalidate_us: f64,
    /// The same soon after another such call.
    invalidate_again_us: f64,
    /// Median time to take its tables down.
    teardown_ms: f64,
    /// Median of a vCPU's longest fault in a round, alone and during that.
    longest_fault_idle_us: f64,
    longest_fault_teardown_us: f64,
}

#[derive(Serialize)]
struct Checks {
    mismatches: u64,
    lost_dirty: u64,
    stale_translations: u64,
    leaked_frames: u64,
    /// Of the confidential guest: frames mapped by both halves.
    double_mapped: u64,
    audit_violations: u64,
}

impl Body {
    pub(super) fn new(
        args: &Args,
        shared: Vec<Shared>,
        private: UnderSweeps,
        sparse: Sparse,
    ) -> Self {
        let sum = |of: fn(&Shared) -> u64| {
            shared
                .iter()
                .fold(0_u64, |sum, guest| sum.saturating_add(of(guest)))
        };
        let checks = Checks {
            mismatches: sum(|guest| guest.mismatches) + private.mismatches(),
            lost_dirty: sum(|guest| guest.lost_dirty),
            stale_translations: sum(|guest| guest.stale_translations),
            leaked_frames: sum(|guest| guest.leaked_frames)
                .saturating_add(private.leaked_frames())
                .saturating_add(sparse.leaked),
            double_mapped: private.double_mapped(),
            audit_violations: private.audit_violations(),
        };
        let (cold, warm) = sparse.invalidate_us();
        let (idle, teardown) = sparse.longest_fault_us();
        Self {
            parameters: Parameters {
                vcpus: args.vcpus,
                bytes: args.bytes,
                seconds: args.seconds,
                seed: args.seed,
            },
            ratios: Ratios {
                invalidate_us: cold,
                invalidate_again_us: warm,
                teardown_ms: sparse.teardown_ms(),
                longest_fault_idle_us: idle,
                longest_fault_teardown_us: teardown,
            },
            results: Results {
                shared,
                private,
                sparse,
            },
            checks,
        }
    }

    /// Prints the readable part.
    pub(super) fn tell(&self, output: &Output) {
        let seconds = |ns: u64| format!("{}.{:09}s", ns / 1_000_000_000, ns % 1_000_000_000);
        for guest in &self.results.shared {
            let phases = &guest.phases;
            output.say(format_args!(
                "{}: run1 = {}, reset = {}, run2 = {}, ro = {}, rw = {}",
                guest.format,
                seconds(phases.run1_ns),
                seconds(phases.reset_ns),
                seconds(phases.run2_ns),
                seconds(phases.ro_ns),
                seconds(phases.rw_ns),
            ));
            let counts = &guest.guest;
            output.say(format_args!(
                "{}, {}: {} accesses, {} writes, {} faults ({} fixed, {} spurious, {} retries, {} emulated), {} flushes, {} \
                 roots loaded",
                guest.format,
                guest.dirty_tracking,
                counts.accesses,
                counts.writes,
                counts.faults,
                counts.fixed,
                counts.spurious,
                counts.retries,
                counts.emulated,
                counts.flushes,
                counts.reloads,
            ));
            let done: Vec<_> = guest
                .host
                .iter()
                .map(|(name, times)| format!("{times} {name}"))
                .collect();
            output.say(format_args!("host: {}", done.join(", ")));
        }
        output.say(&self.results.private);
        output.say(format_args!(
            "A sparse guest's root is made obsolete in {:.2} us with cold caches, {:.2} us with warm ones, taken down in {:.2} \
             ms; longest fault {:.1} us alone, {:.1} us meanwhile",
            self.ratios.invalidate_us,
            self.ratios.invalidate_again_us,
            self.ratios.teardown_ms,
            self.ratios.longest_fault_idle_us,
            self.ratios.longest_fault_teardown_us,
        ));
        let checks = &self.checks;
        output.say(format_args!(
            "{} mismatches, {} lost dirty pages, {} stale translations, {} frames leaked, {} frames of both halves, {} \
             violations",
            checks.mismatches,
            checks.lost_dirty,
            checks.stale_translations,
            checks.leaked_frames,
            checks.double_mapped,
            checks.audit_violations,
        ));
    }

    /// # Errors
    ///
    /// [`Error::Check`] if anything is not as it should be.
    pub(super) fn verdict(&self) -> Result<(), Error> {
        let checks = &self.checks;
        let wrong: Vec<_> = [
            (checks.mismatches, "mismatches"),
            (checks.lost_dirty, "lost dirty pages"),
            (checks.stale_translations, "stale translations"),
            (checks.leaked_frames, "frames leaked"),
            (checks.double_mapped, "frames of both halves"),
            (
                checks.audit_violations,
                "calls that a correct host never makes",
            ),
        ]
        .into_iter()
        .filter(|(count, _)| *count != 0)
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
        if wrong.is_empty() {
            Ok(())
        } else {
            Err(Error::Check(wrong.join(", ")))
        }
    }
}
