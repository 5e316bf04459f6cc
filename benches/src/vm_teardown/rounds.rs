//! The rounds: fill, remove while the guest runs, fill again, release the key, reclaim.

use super::Args;
use crate::confidential::backend::{Tdx, TdxOptions};
use crate::confidential::conditions::Conditions;
use crate::confidential::faulting::{Tries, Unresolved};
use crate::confidential::guest::{Calls, Checks, Guest, GuestVcpu, SPACE, private_write};
use crate::confidential::layout::Layout;
use crate::confidential::running::RunningVcpu;
use crate::race::join;
use crate::report::{Error, Progress};
use crate::sync::{AtomicBool, AtomicU64, Ordering};
use std::sync::Barrier;
use std::time::Instant;
use tdp::{Gfn, Host, Outcome, Visibility};

/// Accesses of a running vCPU after which it lets others have the processor.
const BURST: u64 = 64;
/// Tables that one thread's cache may take more of at the second filling.
const SPARE: u64 = 16;

/// One removal of everything.
#[derive(Clone, Copy, Debug)]
pub(super) struct Removal {
    pub(super) wall_ns: u64,
    pub(super) calls: Calls,
    /// Removals that another thread carried.
    pub(super) carried: u64,
    /// Frames of 4 KiB, and tables, that came back.
    pub(super) frames: u64,
    pub(super) tables: u64,
    /// Accesses that vCPUs made meanwhile.
    pub(super) accesses: u64,
}

#[derive(Debug, Default)]
pub(super) struct Results {
    pub(super) combined: Vec<Removal>,
    pub(super) uncombined: Vec<Removal>,
    pub(super) released: Vec<Removal>,
    /// Tables that the second filling needed and the first did not.
    pub(super) not_reused: u64,
    pub(super) checks: Checks,
}

pub(super) fn run(
    args: &Args,
    layout: Layout,
    parts: (u64, u64),
    progress: &Progress,
) -> Result<Results, Error> {
    let mut results = Results::default();
    for round in 1..=args.rounds {
        for combine in [true, false] {
            progress.step(format!(
                "{}, round {round}",
                if combine { "combined" } else { "uncombined" }
            ));
            let conditions = Conditions::new(args.module.weather());
            let options = TdxOptions { combine };
            let guest = Guest::<Tdx>::new(layout, Visibility::Private, options, conditions)?;
            one_life(args, guest, parts, combine, &mut results)?;
        }
    }
    Ok(results)
}

/// A guest from its first page to its last.
fn one_life(
    args: &Args,
    guest: Guest<Tdx>,
    (share, chunk): (u64, u64),
    combine: bool,
    results: &mut Results,
) -> Result<(), Error> {
    let start = guest.layout().gfns.start.0;
    let shares: Vec<_> = (0..u64::from(args.threads))
        .map(|n| start + n * share..start + (n + 1) * share)
        .collect();
    let tries = Tries::default();
    let mut fillers = shares
        .iter()
        .map(|_| guest.vcpu())
        .collect::<Result<Vec<_>, _>>()?;
    fill(&guest, &mut fillers, &shares, &tries)?;
    let before = tables_out(&guest);

    guest.conditions().raise();
    let removal = remove_while_running(args, &guest, &shares, chunk, &tries)?;
    guest.conditions().calm();
    guest.audit(&mut results.checks);
    if combine {
        results.combined.push(removal);
    } else {
        results.uncombined.push(removal);
    }

    // What was unlinked is used again, as soon as every reader is past it.
    guest.mmu().synchronize();
    fill(&guest, &mut fillers, &shares, &tries)?;
    let spare = SPARE * fillers.len() as u64;
    let grown = |(after, before): (u64, u64)| after.saturating_sub(before + spare);
    let after = tables_out(&guest);
    results.not_reused += grown((after.0, before.0)) + grown((after.1, before.1));
    guest.audit(&mut results.checks);
    drop(fillers);

    guest.backend().release_key()?;
    guest.conditions().raise();
    let stats = guest.mmu().stats().protected;
    let begin = Instant::now();
    let removed = guest
        .mmu()
        .reclaim_private()
        .map_err(|e| Error::run("reclamation", e))?;
    let wall_ns = begin.elapsed().as_nanos() as u64;
    results.released.push(Removal {
        wall_ns,
        calls: Calls::between(&stats, &guest.mmu().stats().protected),
        carried: 0,
        frames: removed.frames,
        tables: removed.tables,
        accesses: 0,
    });
    results.checks.max_reentries = results.checks.max_reentries.max(tries.max_reentries());
    guest.finish(&mut results.checks)
}

/// Table frames that are not in the pool, and twins that are not with the host.
fn tables_out(guest: &Guest<Tdx>) -> (u64, u64) {
    let frames = guest.mmu().host().frames().allocated() as u64;
    (frames, guest.backend().table().twins_out() as u64)
}

/// Maps every page of the shares, a thread each.
fn fill(
    guest: &Guest<Tdx>,
    fillers: &mut [GuestVcpu<Tdx>],
    shares: &[std::ops::Range<u64>],
    tries: &Tries,
) -> Result<(), Error> {
    let page = guest.layout().level.pages() as usize;
    std::thread::scope(|scope| {
        let threads: Vec<_> = fillers
            .iter_mut()
            .zip(shares)
            .map(|(vcpu, share)| {
                scope.spawn(move || {
                    for gfn in share.clone().step_by(page).map(Gfn) {
                        let fault = private_write(gfn);
                        let first = vcpu.fault(fault);
                        match tries.persist(vcpu, fault, first)? {
                            Outcome::Fixed { .. } | Outcome::Spurious => {}
                            outcome => return Err(Unresolved::Outcome(gfn, outcome)),
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| join(thread))
    })
    .map_err(Into::into)
}

/// Has the vCPUs run, and the threads remove.
fn remove_while_running(
    args: &Args,
    guest: &Guest<Tdx>,
    shares: &[std::ops::Range<u64>],
    chunk: u64,
    tries: &Tries,
) -> Result<Removal, Error> {
    let own = tdp_arch::ENTRIES_PER_TABLE as u64 * guest.layout().level.pages();
    let first_own = shares.last().map_or(0, |share| share.end);
    let (over, accesses) = (AtomicBool::new(false), AtomicU64::new(0));
    let running = Barrier::new(usize::from(args.vcpus) + shares.len() + 1);
    let mut vcpus = (0..args.vcpus)
        .map(|_| RunningVcpu::new(guest, tries))
        .collect::<Result<Vec<_>, _>>()?;
    let page = guest.layout().level.pages();
    // Each on memory that stays, mapped and accepted before the clock starts.
    for (n, vcpu) in vcpus.iter_mut().enumerate() {
        for number in 0..BURST {
            let gfn = Gfn(first_own + n as u64 * own + number * page);
            vcpu.access(gfn, Visibility::Private)?;
        }
        vcpu.leave();
    }
    let stats = guest.mmu().stats().protected;
    let (wall_ns, frames, tables) = std::thread::scope(|scope| {
        let guests: Vec<_> = vcpus
            .iter_mut()
            .enumerate()
            .map(|(n, vcpu)| {
                let (running, over, accesses) = (&running, &over, &accesses);
                scope.spawn(move || {
                    running.wait();
                    let mut made = 0;
                    let mut outcome = Ok(());
                    while outcome.is_ok() && !over.load(Ordering::Relaxed) {
                        let gfn = Gfn(first_own + n as u64 * own + made % BURST * page);
                        outcome = vcpu.access(gfn, Visibility::Private).map(drop);
                        made += 1;
                        if made % BURST == 0 {
                            std::thread::yield_now();
                        }
                    }
                    vcpu.leave();
                    accesses.fetch_add(made, Ordering::Relaxed);
                    outcome
                })
            })
            .collect();
        let removers: Vec<_> = shares
            .iter()
            .map(|share| {
                let running = &running;
                scope.spawn(move || {
                    running.wait();
                    let begin = Instant::now();
                    let mut removed = (0, 0);
                    let mut start = share.start;
                    while start < share.end {
                        let end = (start + chunk).min(share.end);
                        let part = remove(guest, start..end)?;
                        removed = (removed.0 + part.0, removed.1 + part.1);
                        start = end;
                    }
                    Ok::<_, Error>((begin, Instant::now(), removed))
                })
            })
            .collect();
        running.wait();
        let removed: Result<Vec<_>, Error> = removers.into_iter().map(|it| join(it)).collect();
        over.store(true, Ordering::Relaxed);
        guests.into_iter().try_for_each(|thread| join(thread))?;
        let removed = removed?;
        let begin = removed.iter().map(|(begin, ..)| *begin).min();
        let end = removed.iter().map(|(_, end, _)| *end).max();
        let wall = begin.zip(end).map_or(0, |(b, e)| (e - b).as_nanos() as u64);
        let sum = |f: fn(&(u64, u64)) -> u64| removed.iter().map(|(.., it)| f(it)).sum::<u64>();
        Ok::<_, Error>((wall, sum(|it| it.0), sum(|it| it.1)))
    })?;
    let after = guest.mmu().stats().protected;
    Ok(Removal {
        wall_ns,
        calls: Calls::between(&stats, &after),
        carried: after.carried - stats.carried,
        frames,
        tables,
        accesses: accesses.load(Ordering::Relaxed),
    })
}

/// Removes a range, what was refused on purpose again.
fn remove(guest: &Guest<Tdx>, range: std::ops::Range<u64>) -> Result<(u64, u64), Error> {
    let mut removed = (0, 0);
    for _ in 0..crate::ours::RETRIES {
        match guest
            .mmu()
            .zap_private(SPACE, Gfn(range.start)..Gfn(range.end))
        {
            Ok(part) => return Ok((removed.0 + part.frames, removed.1 + part.tables)),
            Err(tdp::ConvertError::Removal(error)) if guest.conditions().injects() => {
                removed.0 += error.removed.frames;
                removed.1 += error.removed.tables;
            }
            Err(error) => return Err(Error::run("removal", error)),
        }
    }
    Err(Error::run("removal", "the module never let go"))
}
