//! Random sequences of operations against the flat model.
//!
//! Each sequence runs on an MMU, on software vCPUs with TLBs that forget nothing, and on plain maps; after each
//! operation the leaves, the look-ups, the processor's walks and the counters are compared. The sequences are the same
//! in every run.

mod common;

use common::ops::{Op, Place, Setup, Span};
use common::processor::Processor;
use common::run::run;
use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestRunner};
use tdp::{Ept, Npt};

fn place() -> impl Strategy<Value = Place> {
    let region = prop_oneof![8 => Just(0u8), 2 => 1u8..4];
    // Few enough to meet: near the ends of blocks, or anywhere.
    let index = prop_oneof![
        3 => (0u16..4, 0u16..4).prop_map(|(block, index)| block * 512 + index),
        1 => (0u16..4).prop_map(|block| block * 512 + 511),
        1 => 0u16..2048,
    ];
    (region, index).prop_map(|(region, index)| Place { region, index })
}

fn span() -> impl Strategy<Value = Span> {
    (place(), any::<u8>()).prop_map(|(from, pages)| Span { from, pages })
}

fn fault() -> impl Strategy<Value = Op> {
    let max_level = prop_oneof![2 => Just(4u8), 1 => 0u8..5];
    (
        any::<u8>(),
        place(),
        any::<u8>(),
        max_level,
        weighted(0.2),
        weighted(0.2),
    )
        .prop_map(|(vcpu, at, access, max_level, prefetch, batch)| Op::Fault {
            vcpu,
            at,
            access,
            max_level,
            prefetch,
            batch,
        })
}

fn map() -> impl Strategy<Value = Op> {
    let numbers = (any::<u8>(), any::<u8>(), any::<u8>(), any::<u8>());
    (numbers, place(), weighted(0.8), weighted(0.2)).prop_map(
        |((vcpu, access, level, perms), at, aligned, batch)| Op::Map {
            vcpu,
            at,
            access,
            level,
            perms,
            aligned,
            batch,
        },
    )
}

/// Where a slot lies: mostly large and at the start of a block.
fn slot_span() -> impl Strategy<Value = Span> {
    let region = prop_oneof![6 => Just(0u8), 3 => 1u8..4];
    let block = (0u16..4).prop_map(|block| block * 512 + 1);
    let start = (region, prop_oneof![4 => block, 1 => 0u16..2048]);
    let pages = prop_oneof![4 => 8u8..14, 1 => any::<u8>()];
    (start, pages).prop_map(|((region, index), pages)| Span {
        from: Place { region, index },
        pages,
    })
}

fn insert() -> impl Strategy<Value = Op> {
    let space = prop_oneof![6 => Just(0u8), 2 => Just(1u8), 1 => Just(2u8)];
    insert_at(space, slot_span())
}

/// A slot of 4 MiB over the first or second half of the first blocks.
fn half(space: u8, half: u16) -> impl Strategy<Value = Op> {
    let from = Place {
        region: 0,
        index: half * 1024 + 1,
    };
    insert_at(Just(space), Just(Span { from, pages: 11 }))
}

fn insert_at(
    space: impl Strategy<Value = u8>,
    span: impl Strategy<Value = Span>,
) -> impl Strategy<Value = Op> {
    let numbers = (
        space,
        prop_oneof![1 => Just(0u8), 3 => 1u8..5],
        prop_oneof![1 => Just(0u8), 4 => 1u8..5],
    );
    let id = prop::option::weighted(0.2, any::<u8>());
    let flags = (weighted(0.2), weighted(0.1), weighted(0.2));
    (numbers, span, flags, id).prop_map(
        |((space, level, max_level), span, (read_only, log_dirty, skewed), id)| Op::Insert {
            space,
            span,
            level,
            read_only,
            log_dirty,
            max_level,
            skewed,
            id,
        },
    )
}

fn weighted(probability: f64) -> impl Strategy<Value = bool> {
    prop::bool::weighted(probability)
}

fn op() -> impl Strategy<Value = Op> {
    let which = any::<u8>;
    prop_oneof![
        20 => fault(),
        20 => (which(), place(), any::<u8>())
            .prop_map(|(vcpu, at, access)| Op::Touch { vcpu, at, access }),
        3 => map(),
        5 => (which(), span(), any::<bool>(), weighted(0.3)).prop_map(
            |(space, span, leaves_only, hold)| Op::Zap { space, span, leaves_only, hold }),
        2 => Just(Op::Flush),
        4 => (which(), span()).prop_map(|(space, span)| Op::Begin { space, span }),
        3 => which().prop_map(|which| Op::Sweep { which }),
        4 => which().prop_map(|which| Op::End { which }),
        5 => insert(),
        1 => which().prop_map(|which| Op::Remove { which }),
        2 => (which(), place()).prop_map(|(which, to)| Op::Move { which, to }),
        2 => (which(), any::<bool>(), weighted(0.2)).prop_map(
            |(which, read_only, log_dirty)| Op::SetFlags { which, read_only, log_dirty }),
        1 => any::<bool>().prop_map(|hold| Op::InvalidateRoots { hold }),
        1 => Just(Op::FinishTeardown),
        2 => which().prop_map(|vcpu| Op::LoadRoot { vcpu }),
        1 => (which(), prop_oneof![3 => Just(0u8), 2 => 1u8..3]).prop_map(|(vcpu, space)| Op::SetSpace { vcpu, space }),
        2 => prop_oneof![2 => Just(0u8), 1 => 3u8..8].prop_map(|kind| Op::Answer { kind }),
        4 => prop_oneof![2 => Just(0u8), 2 => 1u8..6].prop_map(|perms| Op::Permit { perms }),
        1 => weighted(0.3).prop_map(|on| Op::Starve { on }),
        1 => Just(Op::Synchronize),
    ]
}

/// A leaf made while the host permits little, then an access that needs more, by a leaf of another size.
fn widen() -> impl Strategy<Value = Vec<Op>> {
    let numbers = (any::<u8>(), 1u8..6, 0u8..6, any::<u8>(), 0u8..5);
    (numbers, place()).prop_map(|((vcpu, narrow, wide, access, max_level), at)| {
        let fault = |access, max_level| Op::Fault {
            vcpu,
            at,
            access,
            max_level,
            prefetch: false,
            batch: false,
        };
        vec![
            Op::Permit { perms: narrow },
            fault(if narrow == 5 { 2 } else { 0 }, 4),
            Op::Permit { perms: wide },
            fault(access, max_level),
        ]
    })
}

/// A page that a vCPU remembers, a sweep over it that is not flushed yet, and another sweep that gives the page away.
fn overtaken() -> impl Strategy<Value = Vec<Op>> {
    let numbers = (any::<u8>(), any::<bool>(), any::<u8>());
    (numbers, place(), weighted(0.7)).prop_map(|((vcpu, leaves_only, which), from, invalidate)| {
        let touch = Op::Touch {
            vcpu,
            at: from,
            access: 0,
        };
        let span = Span { from, pages: 0 };
        let zap = Op::Zap {
            space: 0,
            span,
            leaves_only,
            hold: true,
        };
        let mut ops = vec![Op::Answer { kind: 0 }, Op::Permit { perms: 0 }, touch, zap];
        if invalidate {
            ops.push(Op::Begin { space: 0, span });
            ops.extend([Op::Sweep { which }, Op::End { which }]);
        } else {
            ops.push(Op::Remove { which });
        }
        ops.push(touch);
        ops
    })
}

fn setup() -> impl Strategy<Value = Setup> {
    (
        weighted(0.2),
        weighted(0.2),
        weighted(0.2),
        prop_oneof![3 => Just(0u8), 1 => 1u8..3],
    )
        .prop_map(
            |(five_levels, software_ad, no_mmio_caching, max_leaf)| Setup {
                five_levels,
                software_ad,
                no_mmio_caching,
                max_leaf,
            },
        )
}

fn follows_the_model<F: Processor>() {
    let config = ProptestConfig {
        cases: 150,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(0x7d9),
        ..ProptestConfig::default()
    };
    // The first operations give the guest memory; without it most others would meet nothing.
    let step = prop_oneof![15 => op().prop_map(|op| vec![op]), 1 => widen(), 1 => overtaken()];
    let sequence = (
        setup(),
        (half(0, 0), half(0, 1), half(1, 0)),
        prop::collection::vec(step, 1..80),
    );
    let result = TestRunner::new(config).run(&sequence, |(setup, (a, b, c), rest)| {
        let mut ops = vec![a, b, c];
        ops.extend(rest.into_iter().flatten());
        run::<F>(setup, &ops);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn ept_follows_the_model() {
    follows_the_model::<Ept>();
}

#[test]
fn npt_follows_the_model() {
    follows_the_model::<Npt>();
}
