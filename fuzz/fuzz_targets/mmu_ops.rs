//! Sequences of operations on an MMU against the flat model, for both formats.
//!
//! The operations, the model and the interpreter are those of `tdp/tests/model.rs`; here the fuzzer chooses, led by
//! coverage of the library.
#![no_main]

#[path = "../../tdp/tests/common/mod.rs"]
mod common;

use common::host::SharedPool;
use common::ops::{Op, Setup};
use common::run::{FRAMES, Watch, run_on};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use tdp::{Ept, Npt};

/// Longer sequences find nothing that shorter ones do not, and take longer.
const MOST_OPS: usize = 24;

/// Mapped once: an execution gives back all that it takes, or fails.
static POOL: LazyLock<SharedPool> = LazyLock::new(|| common::rig::pool(FRAMES));

#[derive(Debug, arbitrary::Arbitrary)]
struct Input {
    npt: bool,
    setup: Setup,
    ops: Vec<Op>,
}

fuzz_target!(|input: Input| {
    let ops = input.ops.get(..MOST_OPS).unwrap_or(&input.ops);
    let run = if input.npt {
        run_on::<Npt>
    } else {
        run_on::<Ept>
    };
    run(POOL.clone(), input.setup, ops, Watch::Lightly);
});
