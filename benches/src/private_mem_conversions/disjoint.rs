//! Four threads on four ranges: one converts, one removes, two fault. Whoever waits for another is counted.
//!
//! The upper tables are linked before the clock starts, and the ranges have no table of leaves in common, so that nothing in
//! the library is for two of them but what is for everybody.

use super::Args;
use crate::confidential::backend::{Backend, Null, NullOptions, Tdx, TdxOptions};
use crate::confidential::conditions::{Conditions, Weather};
use crate::confidential::guest::{Calls, Checks, Guest, SPACE, private_write};
use crate::confidential::layout::Layout;
use crate::race::join;
use crate::report::{Error, Progress};
use crate::sync::{AtomicBool, Ordering};
use std::sync::Barrier;
use std::time::Instant;
use tdp::{Gfn, GfnRange, Outcome, Visibility};
use tdp_arch::Level;

/// Frames of each range.
const RANGE: u64 = 4096;
/// Frames that are converted or removed at a time.
const CHUNK: u64 = 512;
/// Chunks that the one converts to and fro, and the other removes.
const TURNS: u64 = 32;

/// Times that one had to wait for another, or was told to try again.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub(super) struct Waits {
    /// For an entry that another had frozen.
    pub(super) frozen: u64,
    /// Removals that another carried; each is among those that waited for a carrier.
    pub(super) carried: u64,
    /// For another that carried, be it this removal or its own.
    pub(super) carrier: u64,
    /// For a ticket that another tended.
    pub(super) tickets: u64,
    /// For the module.
    pub(super) busy: u64,
    /// Faults that were sent back.
    pub(super) retried: u64,
}

impl Waits {
    pub(super) fn sum(&self) -> u64 {
        self.frozen + self.carrier + self.tickets + self.busy + self.retried
    }
}

/// What the four did.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub(super) struct Quartet {
    pub(super) faults: u64,
    pub(super) conversions: u64,
    pub(super) removals: u64,
    pub(super) wall_ns: u64,
    pub(super) waits: Waits,
}

#[derive(Debug)]
pub(super) struct Disjoint {
    pub(super) null: Quartet,
    pub(super) tdx: Quartet,
}

pub(super) fn run(
    args: &Args,
    checks: &mut Checks,
    progress: &Progress,
) -> Result<Disjoint, Error> {
    progress.step("disjoint ranges, null");
    let null = quartet::<Null>(args, NullOptions { needs_block: true }, checks)?;
    progress.step("disjoint ranges, tdx");
    let tdx = quartet::<Tdx>(args, TdxOptions::default(), checks)?;
    Ok(Disjoint { null, tdx })
}

fn quartet<B: Backend>(
    args: &Args,
    options: B::Options,
    checks: &mut Checks,
) -> Result<Quartet, Error> {
    let layout = Layout::new(4 * RANGE, Level::L1, 4)
        .ok_or_else(|| Error::Usage("no memory for four ranges".to_owned()))?;
    let weather = Weather {
        // What is refused on purpose would make its own thread wait, for nobody.
        busy_rate: 0.0,
        fail_rate: 0.0,
        ..args.module.weather()
    };
    let guest = Guest::<B>::new(
        layout,
        Visibility::Private,
        options,
        Conditions::new(weather),
    )?;
    let start = layout.gfns.start.0;
    let range = |n: u64| GfnRange {
        start: Gfn(start + n * RANGE),
        end: Gfn(start + (n + 1) * RANGE),
    };
    let failed = |e: &dyn std::fmt::Display| Error::run("disjoint ranges", e.to_string());
    // Links what all have in common.
    let mut vcpus = (0..4)
        .map(|_| guest.vcpu())
        .collect::<Result<Vec<_>, _>>()?;
    for (n, vcpu) in (0..).zip(&mut vcpus) {
        vcpu.prefault(range(n), Visibility::Private)
            .map_err(|e| failed(&e))?;
        guest
            .mmu()
            .zap_private(SPACE, range(n))
            .map_err(|e| failed(&e))?;
    }
    let before = guest.mmu().stats();
    guest.conditions().raise();
    let (over, line) = (AtomicBool::new(false), Barrier::new(4));
    let [mut converter, mut remover, mut one, mut other] =
        <[_; 4]>::try_from(vcpus).map_err(|_| failed(&"four vCPUs"))?;
    let mmu = guest.mmu();
    let chunk_of = |range: GfnRange, turn: u64| {
        let first = Gfn(range.start.0 + turn * CHUNK % RANGE);
        GfnRange {
            start: first,
            end: Gfn(first.0 + CHUNK),
        }
    };
    let begin = Instant::now();
    let (faults, conversions, removals) = std::thread::scope(|scope| {
        let (over, line) = (&over, &line);
        let converter = scope.spawn(move || {
            line.wait();
            let mut turns = 0;
            while turns < TURNS {
                let chunk = chunk_of(range(0), turns);
                converter
                    .prefault(chunk, Visibility::Private)
                    .map_err(|e| failed(&e))?;
                for to in [Visibility::Shared, Visibility::Private] {
                    mmu.convert(SPACE, chunk, to).map_err(|e| failed(&e))?;
                }
                turns += 1;
            }
            Ok::<u64, Error>(2 * turns)
        });
        let remover = scope.spawn(move || {
            line.wait();
            let mut turns = 0;
            while turns < TURNS {
                let chunk = chunk_of(range(1), turns);
                remover
                    .prefault(chunk, Visibility::Private)
                    .map_err(|e| failed(&e))?;
                mmu.zap_private(SPACE, chunk).map_err(|e| failed(&e))?;
                turns += 1;
            }
            Ok::<u64, Error>(turns)
        });
        let faulters = [(&mut one, 2), (&mut other, 3)].map(|(vcpu, n)| {
            scope.spawn(move || {
                line.wait();
                let mut faults = 0;
                // Once through, it finds everything mapped, and goes on.
                for gfn in (range(n).start.0..range(n).end.0).map(Gfn).cycle() {
                    if over.load(Ordering::Relaxed) && faults >= RANGE {
                        break;
                    }
                    loop {
                        faults += 1;
                        match vcpu.fault(private_write(gfn)) {
                            Ok(Outcome::Fixed { .. } | Outcome::Spurious) => break,
                            Ok(Outcome::Retry(_)) => {}
                            other => return Err(failed(&format!("{gfn}: {other:?}"))),
                        }
                    }
                }
                Ok::<u64, Error>(faults)
            })
        });
        let (conversions, removals) = (join(converter), join(remover));
        over.store(true, Ordering::Relaxed);
        let faults: Vec<_> = faulters.into_iter().map(join).collect();
        let faults = faults.into_iter().sum::<Result<u64, Error>>()?;
        Ok::<_, Error>((faults, conversions?, removals?))
    })?;
    let wall_ns = begin.elapsed().as_nanos() as u64;
    guest.conditions().calm();
    drop((one, other));
    let after = guest.mmu().stats();
    let calls = Calls::between(&before.protected, &after.protected);
    let waits = Waits {
        frozen: after.protected.frozen_waits - before.protected.frozen_waits,
        carried: after.protected.carried - before.protected.carried,
        carrier: after.protected.carrier_waits - before.protected.carrier_waits,
        tickets: after.protected.ticket_waits - before.protected.ticket_waits,
        busy: calls.all_busy(),
        retried: after.retries.iter().sum::<u64>() - before.retries.iter().sum::<u64>(),
    };
    guest.finish(checks)?;
    Ok(Quartet {
        faults,
        conversions,
        removals,
        wall_ns,
        waits,
    })
}
