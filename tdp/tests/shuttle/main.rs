//! The whole library under schedules that shuttle chooses: three to five threads, at random and by PCT (a few changes of
//! priority at random places, which finds what needs few of them with a known probability).
//!
//! ```text
//! RUSTFLAGS="--cfg shuttle" cargo test -p tdp --release --test shuttle -- --nocapture
//! ```
//!
//! The code that ships runs, with tables in the pool that ships, software vCPUs with their TLBs and the model of the TDX
//! module: where loom needs tiny tables and few steps, a schedule here is hundreds of steps long, but the order of memory is
//! sequentially consistent and schedules are sampled. Every access to an atomic and every lock is a place where another
//! thread may go on; the collector behind visits is one step from one such place to the next.
//!
//! `TDP_SHUTTLE_ITERATIONS` schedules are run for each scenario and each way. The seed is fixed; `SHUTTLE_RANDOM_SEED`
//! sets another. A failure prints its schedule, which `shuttle::replay` runs again.
#![cfg(shuttle)]

#[path = "../common/mod.rs"]
mod common;

mod private;
mod shared;

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, Runner};

/// Schedules of each scenario and each way, unless told.
const ITERATIONS: usize = 200;
/// Changes of priority that PCT makes, and one.
const DEPTH: usize = 3;
const SEED: u64 = 0x7d9;

fn config() -> Config {
    let mut config = Config::new();
    config.stack_size = 1 << 22;
    config
}

/// Runs a scenario under many schedules.
fn explore(scenario: impl Fn() + Copy + Send + Sync + 'static) {
    let iterations = std::env::var("TDP_SHUTTLE_ITERATIONS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(ITERATIONS);
    let random = RandomScheduler::new_from_seed(SEED, iterations);
    Runner::new(random, config()).run(scenario);
    let pct = PctScheduler::new_from_seed(SEED, DEPTH, iterations);
    Runner::new(pct, config()).run(scenario);
}
