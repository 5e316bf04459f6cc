//! What was done, and what was found to be wrong.

use super::chaos::Met;
use super::check::Checked;
use super::guest::Counts;
use super::hands::Done;
use super::plan::Plan;
use super::{Args, Episode};
use crate::report::{Error, Output};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

#[derive(Debug, Serialize)]
pub(super) struct Findings {
    parameters: Parameters,
    results: Results,
    checks: Checks,
}

#[derive(Debug, Serialize)]
struct Parameters {
    seconds: f64,
    seed: u64,
    vcpus: u16,
    threads: u16,
}

#[derive(Debug, Default, Serialize)]
struct Results {
    seconds: f64,
    /// Guests that lived, by what they were.
    episodes: BTreeMap<String, u64>,
    guest: Counts,
    host: Done,
    injected: Met,
    /// Of the library's own counters.
    library: BTreeMap<&'static str, u64>,
    checked: Checked,
    /// The guest of which something was wrong.
    failed: Option<Plan>,
}

#[derive(Debug, Default, Serialize)]
struct Checks {
    violations: u64,
    words: Vec<String>,
}

impl Findings {
    pub(super) fn new(args: &Args) -> Self {
        Self {
            parameters: Parameters {
                seconds: args.seconds,
                seed: args.seed,
                vcpus: args.vcpus,
                threads: args.threads,
            },
            results: Results::default(),
            checks: Checks::default(),
        }
    }

    pub(super) fn add(&mut self, plan: &Plan, episode: Episode) {
        let results = &mut self.results;
        let kind = match (plan.confidential, plan.npt) {
            (true, _) => "EPT and TDX",
            (false, true) => "NPT",
            (false, false) => "EPT",
        };
        *results
            .episodes
            .entry(format!("{kind}, {:?}", plan.tracking))
            .or_default() += 1;
        results.guest.add(&episode.guest);
        results.injected.add(&episode.met);
        results.checked.add(&episode.checked);
        for (name, times) in episode.host {
            *results.host.entry(name).or_default() += times;
        }
        let stats = &episode.stats;
        for (name, count) in [
            ("splits", stats.splits),
            ("collapses", stats.collapses),
            ("upgrades", stats.upgrades),
            ("tables_unlinked", stats.unlinked),
            ("flushes", stats.flushes),
            ("roots_made", stats.roots_made),
            ("nx_recovered", stats.nx_recovered),
            ("module_calls", stats.protected.calls.iter().sum()),
            ("frozen_waits", stats.protected.frozen_waits),
            ("removals_carried", stats.protected.carried),
        ] {
            *results.library.entry(name).or_default() += count;
        }
        self.checks.violations += episode.violations;
        if episode.violations != 0 {
            self.results.failed = Some(plan.clone());
            self.checks.words = episode.wrong;
        }
    }

    pub(super) fn is_wrong(&self) -> bool {
        self.checks.violations != 0
    }

    pub(super) fn finish(&mut self, took: Duration) {
        self.results.seconds = took.as_secs_f64();
    }

    /// Prints the readable part.
    pub(super) fn tell(&self, output: &Output) {
        let results = &self.results;
        let episodes: u64 = results.episodes.values().sum();
        output.say(format_args!(
            "{episodes} guests in {:.0} s, seed {}",
            results.seconds, self.parameters.seed
        ));
        list(output, "guests", &results.episodes);
        list(output, "vCPUs", &results.guest);
        list(output, "host", &results.host);
        list(output, "injected", &results.injected);
        list(output, "library", &results.library);
        list(output, "checked", &results.checked);
        output.say(format_args!("{} violations", self.checks.violations));
        for words in &self.checks.words {
            output.say(format_args!("  {words}"));
        }
    }

    /// # Errors
    ///
    /// [`Error::Check`] if anything is not as it should be, with how to run it again.
    pub(super) fn verdict(&self) -> Result<(), Error> {
        let Some(plan) = &self.results.failed else {
            return Ok(());
        };
        let Parameters {
            seed,
            vcpus,
            threads,
            ..
        } = self.parameters;
        Err(Error::Check(format!(
            "{} violations, the first: {}; again by --seed {seed} --episode {} -v {vcpus} -t {threads}",
            self.checks.violations,
            self.checks.words.first().map_or("?", String::as_str),
            plan.episode
        )))
    }
}

/// Counters by name, in one line.
fn list(output: &Output, title: &str, counts: &impl Serialize) {
    if let Ok(serde_json::Value::Object(counts)) = serde_json::to_value(counts) {
        let counts: Vec<_> = counts
            .iter()
            .map(|(name, count)| format!("{count} {name}"))
            .collect();
        output.say(format_args!("{title}: {}", counts.join(", ")));
    }
}
