//! What comes out of many laps: figures for each operation, and ratios of contenders.

use super::{Course, Lap};
use serde::Serialize;
use std::time::Duration;

/// The laps of one contender on one course, round by round.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Laps {
    /// Threads.
    pub vcpus: usize,
    /// Operations in a lap, of all threads together.
    pub operations: u64,
    /// Wall nanoseconds of each lap, in the order of the rounds.
    pub wall_ns: Vec<u64>,
    /// Processor nanoseconds of each lap, of all threads together.
    pub cpu_ns: Vec<u64>,
    /// How often threads were taken off their processors in each lap.
    pub preemptions: Vec<u64>,
}

impl Laps {
    /// No lap yet, of `course`.
    pub fn of(course: &Course) -> Self {
        Self {
            vcpus: course.orders.len(),
            operations: course.operations(),
            ..Self::default()
        }
    }

    /// Adds a lap.
    pub fn push(&mut self, lap: Lap) {
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.wall_ns.push(ns(lap.wall));
        self.cpu_ns.push(ns(lap.cpu));
        self.preemptions.push(lap.preemptions);
    }

    /// Nanoseconds an operation, round by round, by the clock that counts for this number of threads.
    pub fn per_operation(&self) -> Vec<f64> {
        let clock = if self.vcpus == 1 {
            &self.cpu_ns
        } else {
            &self.wall_ns
        };
        self.by(clock)
    }

    /// Wall nanoseconds an operation, round by round.
    pub fn wall_per_operation(&self) -> Vec<f64> {
        self.by(&self.wall_ns)
    }

    fn by(&self, clock: &[u64]) -> Vec<f64> {
        clock
            .iter()
            .map(|ns| *ns as f64 / self.operations as f64)
            .collect()
    }
}

/// The middle of `values` (of an even number the mean of the two in the middle); `NAN` of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[half],
        _ => f64::midpoint(sorted[half - 1], sorted[half]),
    }
}

/// The smallest of `values`; `NAN` of none.
pub fn minimum(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NAN, f64::min)
}

/// `theirs` over `ours`: the median over the rounds, each round's laps having run close together.
pub fn paired_ratio(theirs: &[f64], ours: &[f64]) -> f64 {
    median(
        &theirs
            .iter()
            .zip(ours)
            .map(|(theirs, ours)| theirs / ours)
            .collect::<Vec<_>>(),
    )
}
