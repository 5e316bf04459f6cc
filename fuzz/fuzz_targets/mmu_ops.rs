//! Sequences of operations on an MMU against the flat model, for both formats.
//!
//! The operations, the model and the interpreter are those of `tdp/tests/model.rs`; here the fuzzer chooses, led by
//! coverage of the library.
#![no_main]

#[path = "../../tdp/tests/common/mod.rs"]
mod common;

use common::ops::{Op, Setup};
use common::run::run;
use libfuzzer_sys::fuzz_target;
use tdp::{Ept, Npt};

/// Longer sequences find nothing that shorter ones do not, and take longer.
const MOST_OPS: usize = 200;

#[derive(Debug, arbitrary::Arbitrary)]
struct Input {
    npt: bool,
    setup: Setup,
    ops: Vec<Op>,
}

fuzz_target!(|input: Input| {
    let ops = input.ops.get(..MOST_OPS).unwrap_or(&input.ops);
    if input.npt {
        run::<Npt>(input.setup, ops);
    } else {
        run::<Ept>(input.setup, ops);
    }
});
