//! Sequences of operations on an MMU against the flat model, for both formats.
//!
//! The operations, the model and the interpreter are those of `tdp/tests/model.rs`; here the fuzzer chooses, led by
//! coverage of the library.
#![no_main]

#[path = "../../tdp/tests/common/mod.rs"]
mod common;

use common::host::SharedPool;
use common::ops::{Op, Place, Setup, Span};
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
    /// How much of the usual beginning comes first.
    begun: u8,
    ops: Vec<Op>,
}

/// A slot, two vCPUs that have pages of it in their TLBs, a sweep that has taken some of them away and not flushed, an
/// invalidation that gives them away, and a guest that must not reach them: so that not every sequence has to find the way.
fn beginning() -> [Op; 10] {
    let place = |index| Place { region: 0, index };
    let touch = |vcpu, index| Op::Touch {
        vcpu,
        at: place(index),
        access: 1,
    };
    let span = Span {
        from: place(0),
        pages: 11,
    };
    let insert = Op::Insert {
        space: 0,
        span,
        level: 1,
        read_only: false,
        log_dirty: false,
        max_level: 1,
        skewed: false,
        id: None,
    };
    let two = Span {
        from: place(0),
        pages: 1,
    };
    let zap = Op::Zap {
        space: 0,
        span: two,
        leaves_only: true,
        hold: true,
    };
    [
        insert,
        touch(0, 0),
        touch(1, 0),
        touch(0, 512),
        touch(1, 5),
        touch(1, 1),
        zap,
        Op::Begin {
            space: 0,
            span: two,
        },
        Op::End { which: 0 },
        touch(0, 0),
    ]
}

fuzz_target!(|input: Input| {
    let beginning = beginning();
    let begun = usize::from(input.begun) % (beginning.len() + 1);
    let ops = input.ops.get(..MOST_OPS).unwrap_or(&input.ops);
    let ops = [&beginning[..begun], ops].concat();
    let run = if input.npt {
        run_on::<Npt>
    } else {
        run_on::<Ept>
    };
    run(POOL.clone(), input.setup, &ops, Watch::Lightly);
});
