//! Mapping a range ahead of its first use.
//!
//! Protocol. Each step is a fault for which nobody waits: what is mapped already stays as it is, and nothing is marked
//! accessed or dirty beyond what a fault would. A step that is to be retried is, here, outside any critical section, until
//! a bounded wait is over; then the caller gets the place where it stopped and may go on from there. So a range whose slot
//! is going away is not waited for without end.
//!
//! Private neighbours in one table, whose pages are consecutive, are handed over by one call where the module has one: the
//! entries are frozen in order, and published in order as far as the module got. Whoever holds several waits for none
//! (`frozen.rs`).

use crate::attributes::Visibility;
use crate::confidential::Phase;
use crate::entry::{EntryRef, TABLE_ENTRIES};
use crate::fault::{Fault, FaultError, Outcome, RetryReason};
use crate::frozen::{EntryPlace, FrozenEntry};
use crate::handoff::{is_blocked, private_leaf};
use crate::host::{Host, Lookup};
use crate::private_fault::Origin;
use crate::protected::{Content, Failure, HandOffCause, HandOffStep, ProtectedTable};
use crate::stats::{Stat, Tally};
use crate::table;
use crate::vcpu::{Vcpu, VcpuCore};
use alloc::vec::Vec;
use tdp_arch::{Access, Format, Gfn, GfnRange, Level, Pfn};
use tdp_rcu::Section;
use tdp_rcu::sync::Pause;

/// Entries handed over by one call.
const RUN: usize = 64;

/// How far a prefault got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Prefaulted {
    /// First frame that was not reached: the end of the range if all was.
    pub next: Gfn,
    /// Frames of the range that this call mapped.
    pub frames: u64,
    /// Why it stopped before the end.
    pub stopped: Option<Outcome>,
}

impl<F: Format, H: Host> Vcpu<F, H> {
    /// Maps a range of shared or private memory ahead of its first use.
    ///
    /// # Errors
    ///
    /// As [`fault`](Vcpu::fault); what was mapped before stays.
    pub fn prefault(
        &mut self,
        range: impl Into<GfnRange>,
        visibility: Visibility,
    ) -> Result<Prefaulted, FaultError> {
        let range = range.into();
        let mut done = Prefaulted {
            next: range.start,
            frames: 0,
            stopped: None,
        };
        let mut pause = Pause::new();
        while done.next < range.end {
            let gfn = done.next;
            let outcome = self.prefault_step(gfn, visibility)?;
            let level = match outcome {
                Outcome::Fixed { level } => {
                    let block = level.range(gfn);
                    let end = block.end.min(range.end);
                    done.frames += end.0 - gfn.0;
                    level
                }
                Outcome::Spurious => Level::L1,
                Outcome::Retry(RetryReason::RootObsolete) if self.load_root().is_ok() => continue,
                // A private step has waited already.
                Outcome::Retry(_) if visibility == Visibility::Shared && !pause.is_over() => {
                    pause.wait();
                    continue;
                }
                outcome => {
                    done.stopped = Some(outcome);
                    break;
                }
            };
            pause = Pause::new();
            done.next = level.range(gfn).end.min(range.end);
            if visibility == Visibility::Private && level == Level::L1 {
                let run = self.prefault_run(GfnRange {
                    start: done.next,
                    end: range.end,
                });
                done.frames += run;
                done.next = Gfn(done.next.0 + run);
            }
        }
        Ok(done)
    }

    fn prefault_step(&mut self, gfn: Gfn, visibility: Visibility) -> Result<Outcome, FaultError> {
        if gfn >= self.core.ctx.root.limit() {
            // The bit that makes an address shared is among those of a frame beyond the limit.
            let reason = crate::fault::MemoryFault::BeyondWidth;
            return Ok(self.core.ctx.memory_fault(reason));
        }
        match visibility {
            Visibility::Private => self.fault_private(gfn, Level::L3, Origin::Prefault),
            Visibility::Shared => {
                let bit = self.core.ctx.root.gfn_bits;
                let mut fault = Fault::new(Gfn(gfn.0 | bit).address(), Access::Read);
                fault.prefetch = true;
                self.fault(fault)
            }
        }
    }

    /// Maps as many neighbours from the start of `range` on as one call of the module takes. Returns how many.
    fn prefault_run(&mut self, range: GfnRange) -> u64 {
        if !self.core.ctx.capabilities.range_ops || range.is_empty() {
            return 0;
        }
        let section = self.reader.enter();
        self.core.install_run(&section, range)
    }
}

impl<F: Format, H: Host> VcpuCore<F, H> {
    fn install_run(&mut self, section: &Section<'_>, range: GfnRange) -> u64 {
        // INV: no-stale-install: with anything under invalidation the faults go one by one.
        if !self.remembers(section) {
            return 0;
        }
        let Some(slot) = self.slot(section, range.start) else {
            return 0;
        };
        let ctx = &self.ctx;
        let shared = &*ctx.shared;
        let (Some(confidential), Some(root)) =
            (shared.confidential.as_deref(), ctx.private_root.as_deref())
        else {
            return 0;
        };
        if confidential.phase() != Phase::Running {
            return 0;
        }
        let mut page = root.page();
        let mut level = root.level;
        while level > Level::L1 {
            let Some(spte) = page.get(level.index(range.start)).map(EntryRef::load) else {
                return 0;
            };
            if !F::is_table(spte) || is_blocked::<F>(spte) {
                return 0;
            }
            page = table::page(shared.host.frames(), F::pfn(spte));
            level = level.below_or_leaf();
        }
        let in_table = TABLE_ENTRIES - Level::L1.index(range.start);
        let frames = (range.start.0..range.end.0).take(RUN.min(in_table));
        let mut run: Vec<FrozenEntry<'_>> = Vec::with_capacity(RUN);
        let mut first = Pfn(0);
        for gfn in frames.map(Gfn) {
            let usable = slot.is_plain()
                && slot.contains(gfn)
                && confidential.attributes.get(gfn) == Visibility::Private;
            if !usable {
                break;
            }
            let Lookup::Mapped(mapping) = shared.host.lookup_private(slot, gfn) else {
                break;
            };
            if run.is_empty() {
                first = mapping.pfn;
            }
            let next = Pfn(first.0 + run.len() as u64);
            if mapping.pfn != next || mapping.pfn >= shared.pfn_limit {
                break;
            }
            let place = EntryPlace {
                as_id: ctx.as_id,
                gfn,
                level,
            };
            let entry = page.get(level.index(gfn));
            let Some(Ok(frozen)) =
                entry.map(|entry| FrozenEntry::freeze::<F>(entry, place, F::EMPTY))
            else {
                break;
            };
            run.push(frozen);
        }
        if run.is_empty() {
            return 0;
        }
        ctx.add(Stat::calls(HandOffStep::Install), 1);
        let hook = shared.host.protected();
        let done = match hook.install_many(&run, first, Content::Pending) {
            Ok(()) => run.len(),
            Err(Failure::Partial(done)) => done.min(run.len()),
            Err(Failure::Fatal | Failure::Incomplete(_)) => {
                shared.lose_if(HandOffCause::Fatal);
                0
            }
            // Put back; the next one goes by itself and meets whatever it was.
            Err(_) => 0,
        };
        for (n, frozen) in run.into_iter().enumerate() {
            if n < done {
                let pfn = Pfn(first.0 + n as u64);
                frozen.publish::<F>(private_leaf::<F>(pfn, level), ctx);
                ctx.add(Stat::Fixed, 1);
            }
        }
        done as u64
    }
}
