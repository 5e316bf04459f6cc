//! A directory of cache lines by the MESI protocol, and traces replayed through it for as many vCPUs as wanted.
//!
//! What one operation does to memory was traced of two vCPUs. Every further one does as they do, by turns: a line that only one
//! of the two touches is its own, and each vCPU gets one like it; a line that both touch is one for all. Caches are large
//! enough: a line goes only where another vCPU wants it, so what is counted is coherence and nothing else.
//!
//! A *transfer* is a line that comes from another vCPU's cache, or that is taken from the others' so that it can be written.
//! The order of vCPUs is drawn by lot, in one of two grains. By single accesses, operations overlap as much as they can: that
//! gives the most transfers, more than there are where a lock keeps operations apart. By whole operations, a line comes
//! once and stays until the operation is done: no machine has fewer.

use std::collections::{BTreeMap, BTreeSet};

/// One access of an operation: the line, and whether it is written.
pub(super) type Step = (u64, bool);

/// What vCPUs do, by turns: the operations of the one kind and of the other.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) first: Vec<Vec<Step>>,
    pub(super) second: Vec<Vec<Step>>,
}

/// What a vCPU does before another one has its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grain {
    Access,
    Operation,
}

/// What a replay came to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Traffic {
    /// Transfers of an operation, on average.
    pub(super) per_operation: f64,
    /// Of them, those of the line that has most.
    pub(super) of_hottest: f64,
}

/// A line's copies.
#[derive(Clone, Debug)]
struct Line {
    /// vCPUs that have it. One that may write it is alone.
    holders: Vec<bool>,
    transfers: u64,
}

impl Line {
    fn of(vcpus: usize) -> Self {
        Self {
            holders: vec![false; vcpus],
            transfers: 0,
        }
    }

    /// One access of `vcpu`. Counts a transfer if another has to be asked.
    fn access(&mut self, vcpu: usize, writes: bool, counted: bool) {
        let others = self
            .holders
            .iter()
            .enumerate()
            .any(|(other, &holds)| holds && other != vcpu);
        let has = self.holders[vcpu];
        // A clean copy may come from anywhere, but never from nowhere: the first time is memory's, not another cache's.
        let asks = if writes { others } else { !has && others };
        self.transfers += u64::from(asks && counted);
        if writes {
            self.holders.fill(false);
        }
        self.holders[vcpu] = true;
    }
}

/// Replays a program for `vcpus` vCPUs.
pub(super) fn replay(program: &Program, vcpus: usize, seed: u64, grain: Grain) -> Traffic {
    let lines_of = |operations: &[Vec<Step>]| -> BTreeSet<u64> {
        operations.iter().flatten().map(|&(line, _)| line).collect()
    };
    // What only one of the two touches is each vCPU's own, and in its cache: it needs no replay.
    let both = &lines_of(&program.first) & &lines_of(&program.second);
    let shared = |steps: &[Step]| -> Vec<Step> {
        steps
            .iter()
            .filter(|(line, _)| both.contains(line))
            .copied()
            .collect()
    };
    let mut lines: BTreeMap<u64, Line> = both.iter().map(|&line| (line, Line::of(vcpus))).collect();
    // What is done in one turn, and whether it is counted: the first half brings every line to where it is used.
    let programs = [&program.first, &program.second].map(|operations| {
        let early = operations.len() / 2;
        let turns = operations.iter().enumerate().flat_map(|(number, steps)| {
            let steps = shared(steps);
            let size = match grain {
                Grain::Access => 1,
                Grain::Operation => steps.len().max(1),
            };
            let turns: Vec<_> = steps.chunks(size).map(<[Step]>::to_vec).collect();
            turns.into_iter().map(move |turn| (turn, number >= early))
        });
        turns.collect::<Vec<_>>()
    });
    let mut at = vec![0; vcpus];
    let mut running: Vec<usize> = (0..vcpus).collect();
    let mut lot = Lot(seed);
    while !running.is_empty() {
        let drawn = lot.below(running.len());
        let vcpu = running[drawn];
        let Some((turn, counted)) = programs[vcpu % 2].get(at[vcpu]) else {
            running.swap_remove(drawn);
            continue;
        };
        for (line, writes) in turn {
            if let Some(line) = lines.get_mut(line) {
                line.access(vcpu, *writes, *counted);
            }
        }
        at[vcpu] += 1;
    }
    let operations: usize = (0..vcpus)
        .map(|vcpu| {
            let all = if vcpu % 2 == 0 {
                program.first.len()
            } else {
                program.second.len()
            };
            all - all / 2
        })
        .sum();
    let transfers = lines.values().map(|line| line.transfers);
    let per = |count: u64| count as f64 / operations.max(1) as f64;
    Traffic {
        per_operation: per(transfers.clone().sum()),
        of_hottest: per(transfers.max().unwrap_or(0)),
    }
}

/// Numbers drawn by lot (splitmix64).
struct Lot(u64);

impl Lot {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(first: &[Step], second: &[Step]) -> Program {
        let times = |steps: &[Step]| vec![steps.to_vec(); 16];
        Program {
            first: times(first),
            second: times(second),
        }
    }

    const GRAINS: [Grain; 2] = [Grain::Access, Grain::Operation];

    #[test]
    fn what_is_ones_own_moves_never() {
        let apart = program(&[(1, true), (2, false)], &[(3, true), (4, false)]);
        for (vcpus, grain) in [1, 2, 64].into_iter().flat_map(|n| GRAINS.map(|g| (n, g))) {
            assert_eq!(replay(&apart, vcpus, 1, grain), Traffic::default());
        }
    }

    #[test]
    fn what_all_read_moves_never_once_it_is_everywhere() {
        let read = program(&[(1, false)], &[(1, false)]);
        for grain in GRAINS {
            assert_eq!(replay(&read, 64, 1, grain), Traffic::default());
        }
    }

    #[test]
    fn what_all_write_moves_ever_more_often_up_to_once_a_turn() {
        let written = program(&[(1, true), (1, true)], &[(1, true), (1, true)]);
        for (grain, turns) in GRAINS.into_iter().zip([2.0, 1.0]) {
            assert_eq!(replay(&written, 1, 1, grain).per_operation, 0.0);
            let [two, many] = [2, 128].map(|vcpus| replay(&written, vcpus, 1, grain));
            let few = 0.25 * turns..0.75 * turns;
            assert!(few.contains(&two.per_operation), "{two:?}");
            let most = 0.9 * turns..=turns;
            assert!(most.contains(&many.per_operation), "{many:?}");
            assert_eq!(many.per_operation, many.of_hottest);
        }
    }

    #[test]
    fn one_writer_is_felt_by_all_readers() {
        let mixed = program(&[(1, true)], &[(1, false)]);
        for grain in GRAINS {
            assert!(replay(&mixed, 64, 1, grain).per_operation > 0.5);
        }
    }
}
