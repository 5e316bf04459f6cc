//! Faults, bare maps and accesses of a run: what each must come to.

use super::{FlatSlot, Run};
use crate::common::flat::{Install, Installed, Tree};
use crate::common::host::{Answer, BlockingAnswer};
use crate::common::processor::{Processor, Report};
use crate::common::rig::Touched;
use tdp::{
    Access, AdBits, Fault, FaultError, Gfn, Gpa, Level, Lookup, Mapping, MemoryFault, Outcome,
    Perms, Pfn, RetryReason, SlotFlags,
};

/// A mapping that passed every check.
struct Backed {
    pfn: Pfn,
    goal: Level,
    perms: Perms,
}

impl<F: Processor> Run<'_, F> {
    pub(super) fn fault(&mut self, n: usize, fault: Fault, batch: bool) -> Option<Outcome> {
        let vcpu = &mut self.runners[n].cpu.vcpu;
        let result = if batch {
            vcpu.batch().and_then(|mut batch| batch.fault(fault))
        } else {
            vcpu.fault(fault)
        };
        let outcome = self.outcome(result)?;
        let expected = self.predict(n, fault, batch, outcome);
        assert_eq!(outcome, expected, "{fault:?}");
        self.count(outcome);
        Some(outcome)
    }

    pub(super) fn map(
        &mut self,
        n: usize,
        gfn: Gfn,
        mapping: Mapping,
        access: Access,
        batch: bool,
    ) {
        let vcpu = &mut self.runners[n].cpu.vcpu;
        let result = if batch {
            let map = |mut batch: tdp::Batch<'_, F, _>| batch.map(gfn, mapping, access);
            vcpu.batch().and_then(map)
        } else {
            vcpu.map(gfn, mapping, access)
        };
        let Some(outcome) = self.outcome(result) else {
            return;
        };
        let fault = Fault::new(gfn.address(), access);
        let expected = self.predict_map(n, fault, mapping, outcome);
        assert_eq!(outcome, expected, "map of {gfn}: {mapping:?}");
        self.count(outcome);
    }

    /// The outcome, unless there was no frame for a table and nothing was changed.
    fn outcome(&self, result: Result<Outcome, FaultError>) -> Option<Outcome> {
        match result {
            Ok(outcome) => Some(outcome),
            Err(error) => {
                assert!(self.rig.frames().is_starving(), "{error}");
                None
            }
        }
    }

    fn count(&mut self, outcome: Outcome) {
        let counter = match outcome {
            Outcome::Fixed { .. } => &mut self.counts.fixed,
            Outcome::Spurious => &mut self.counts.spurious,
            Outcome::Mmio { .. } => &mut self.counts.mmio,
            Outcome::MemoryFault(_) => &mut self.counts.memory_faults,
            Outcome::DirtyRingFull => panic!("there are no rings"),
            Outcome::Retry(reason) => {
                let at = RetryReason::ALL.iter().position(|&r| r == reason);
                &mut self.counts.retries[at.expect("every reason is listed")]
            }
        };
        *counter += 1;
    }

    fn is_obsolete(&self, n: usize) -> bool {
        let generation = self.runners[n].root.generation;
        self.roots.get(&generation).is_none_or(|root| root.obsolete)
    }

    fn slot_at(&self, space: usize, gfn: Gfn) -> Option<&FlatSlot> {
        self.slots
            .iter()
            .find(|slot| slot.space == space && slot.range.contains(gfn))
    }

    /// Whether a block of `level` around `gfn` has a frame that is being invalidated.
    fn is_invalidated(&self, space: usize, gfn: Gfn, level: Level) -> bool {
        let block = level.range(gfn);
        self.running
            .iter()
            .any(|running| running.space == space && running.range.overlaps(block))
    }

    /// What `fault` comes to. `seen` is what it came to: it decides where there is a choice.
    fn predict(&mut self, n: usize, fault: Fault, batch: bool, seen: Outcome) -> Outcome {
        let gfn = fault.gpa.gfn();
        let space = self.runners[n].space;
        if gfn >= self.rig.setup.root_level.gfn_limit() {
            return Outcome::MemoryFault(MemoryFault::BeyondWidth);
        }
        if self.is_obsolete(n) {
            return Outcome::Retry(RetryReason::RootObsolete);
        }
        if self.is_invalidated(space, gfn, Level::L1) {
            return Outcome::Retry(RetryReason::Invalidation);
        }
        let Some(slot) = self.slot_at(space, gfn) else {
            return self.predict_mmio(n, fault);
        };
        let read_only = slot.flags.contains(SlotFlags::READ_ONLY);
        if read_only && fault.access.is_write() {
            return Outcome::Mmio { read_only: true };
        }
        let logged = slot.flags.contains(SlotFlags::LOG_DIRTY);
        if !fault.prefetch
            && let Some(level) = self.tree(n).repair(gfn.0, fault.access, logged)
        {
            return Outcome::Fixed { level };
        }
        let slot = self.slot_at(space, gfn).expect("it was there");
        let lookup = match self.answer {
            Answer::Fixed(lookup) => Some(lookup),
            Answer::Blocking(_) if batch => Some(Lookup::Blocking),
            Answer::Blocking(BlockingAnswer::Fixed(lookup)) => Some(lookup),
            Answer::Page | Answer::Blocking(BlockingAnswer::Page) => None,
        };
        match lookup {
            Some(Lookup::Failed) => return Outcome::MemoryFault(MemoryFault::NotBacked),
            Some(_) => return Outcome::Retry(RetryReason::Backing),
            None => {}
        }
        let mut allowed = self.permitted;
        if read_only {
            allowed = allowed.difference(Perms::WRITE);
        }
        if !allowed.contains(fault.access.needs()) {
            return Outcome::MemoryFault(MemoryFault::NotPermitted);
        }
        let mut backed = self.backed(slot, gfn, fault.max_level, allowed);
        // Frames under invalidation may not come back in by way of a large leaf. How that is prevented is the MMU's
        // choice: smaller leaves, or another try.
        if self.is_invalidated(space, gfn, backed.goal) {
            match seen {
                Outcome::Retry(RetryReason::Invalidation) => return seen,
                Outcome::Fixed { level } => backed.goal = backed.goal.min(level),
                _ => {}
            }
            while self.is_invalidated(space, gfn, backed.goal) {
                backed.goal = backed.goal.below_or_leaf();
            }
        }
        self.predict_install(n, fault, backed)
    }

    /// Where `gfn` of `slot` is mapped, and how large a leaf may be.
    fn backed(&self, slot: &FlatSlot, gfn: Gfn, max_level: Level, perms: Perms) -> Backed {
        let at_first = slot.memory.pfn.0 + (gfn.0 - slot.range.start.0);
        let host = self.rig.host().script();
        let pfn = host.moved.get(&at_first).copied().unwrap_or(Pfn(at_first));
        let limits = [max_level, slot.memory.level, slot.max_level, self.max_leaf];
        let mut goal = limits.into_iter().min().unwrap_or(Level::L1);
        if slot.flags.contains(SlotFlags::LOG_DIRTY) {
            goal = Level::L1;
        }
        let fits = |level: Level| {
            let frames = at_first & !(level.pages() - 1);
            let whole = host.moved.range(frames..frames + level.pages());
            slot.range.covers(level.range(gfn))
                && (gfn.0 ^ pfn.0) & (level.pages() - 1) == 0
                && whole.count() == 0
        };
        while goal > Level::L1 && !fits(goal) {
            goal = goal.below_or_leaf();
        }
        Backed { pfn, goal, perms }
    }

    fn predict_map(&mut self, n: usize, fault: Fault, mapping: Mapping, seen: Outcome) -> Outcome {
        let gfn = fault.gpa.gfn();
        let reason = if gfn >= self.rig.setup.root_level.gfn_limit() {
            Some(MemoryFault::BeyondWidth)
        } else if !mapping.perms.contains(fault.access.needs()) {
            Some(MemoryFault::NotPermitted)
        } else {
            None
        };
        if let Some(reason) = reason {
            return Outcome::MemoryFault(reason);
        }
        if self.is_obsolete(n) {
            return Outcome::Retry(RetryReason::RootObsolete);
        }
        let mut goal = mapping.level.min(self.max_leaf);
        while (gfn.0 ^ mapping.pfn.0) & (goal.pages() - 1) != 0 {
            goal = goal.below_or_leaf();
        }
        // A bare map asks nobody, but may be kept from reaching into an invalidation as a fault is.
        let space = self.runners[n].space;
        match seen {
            _ if !self.is_invalidated(space, gfn, goal) => {}
            Outcome::Fixed { level } => goal = goal.min(level),
            _ => {
                while goal > Level::L1 && self.is_invalidated(space, gfn, goal) {
                    goal = goal.below_or_leaf();
                }
            }
        }
        let backed = Backed {
            pfn: mapping.pfn,
            goal,
            perms: mapping.perms,
        };
        self.predict_install(n, fault, backed)
    }

    fn predict_install(&mut self, n: usize, fault: Fault, backed: Backed) -> Outcome {
        let (accessed, dirty) = F::new_flags(
            self.rig.setup.ad_bits,
            !fault.prefetch,
            backed.perms.contains(Perms::WRITE),
        );
        let install = Install {
            gfn: fault.gpa.gfn().0,
            pfn: backed.pfn.0,
            goal: backed.goal,
            perms: F::expressed(backed.perms),
            access: fault.access,
            prefetch: fault.prefetch,
            accessed,
            dirty,
        };
        match self.tree(n).install(install) {
            Installed::Fixed(level) => Outcome::Fixed { level },
            Installed::Spurious => Outcome::Spurious,
        }
    }

    fn predict_mmio(&mut self, n: usize, fault: Fault) -> Outcome {
        let gfn = fault.gpa.gfn();
        let bits = self.rig.setup.physical_bits;
        let cached = !self.setup.no_mmio_caching && F::mmio(gfn, 0, bits).is_some();
        if cached {
            // Nothing is remembered over a bare map where there is no slot.
            let _ = self.tree(n).install_mmio(gfn.0);
        }
        Outcome::Mmio { read_only: false }
    }

    fn tree(&mut self, n: usize) -> &mut Tree {
        let generation = self.runners[n].root.generation;
        let root = self.roots.get_mut(&generation);
        &mut root.expect("not obsolete, so it is there").tree
    }

    /// An access of the guest, entered as an embedder enters it. A fault is passed on once.
    pub(super) fn touch(&mut self, n: usize, gfn: Gfn, access: Access) {
        if !self.load_root(n) {
            return;
        }
        let touched = self.runners[n].cpu.touch(gfn.address(), access);
        if let Ok(found) = touched.result {
            assert!(
                !self.is_given_away(found.pfn),
                "{access:?} at {gfn} in space {} reached frame {}, which belongs to somebody else",
                self.runners[n].space,
                found.pfn
            );
        }
        // Until everything is flushed, the processor may remember what was.
        if self.held.is_empty() {
            self.check_touch(n, gfn, access, touched);
        }
        if touched.walked && touched.result.is_ok() && self.keeps_flags() {
            self.tree(n).touch(gfn.0, access.is_write());
        }
        if let Some(fault) = touched.fault {
            self.fault(n, fault, false);
        }
    }

    fn keeps_flags(&self) -> bool {
        self.rig.setup.ad_bits == AdBits::Processor
    }

    fn check_touch(&mut self, n: usize, gfn: Gfn, access: Access, touched: Touched) {
        let expected = self.processor_sees(self.runners[n].root.generation, gfn, access);
        let found = touched.result.map(|found| found.pfn);
        assert_eq!(found, expected.map(|(pfn, _)| pfn), "{access:?} at {gfn}");
        if let (true, Ok(found), Ok((_, level))) = (touched.walked, touched.result, expected) {
            assert_eq!(found.level, level, "at {gfn}");
        }
    }

    /// What a processor with nothing cached finds at `gfn` under a root.
    pub(super) fn processor_sees(
        &self,
        generation: u64,
        gfn: Gfn,
        access: Access,
    ) -> Result<(Pfn, Level), Report> {
        let Gpa(address) = gfn.address();
        let root = &self.roots[&generation];
        if gfn >= self.rig.setup.root_level.gfn_limit() || address >> 52 != 0 {
            return Err(Report::Absent);
        }
        if root.tree.mmio.contains(&gfn.0) {
            return Err(Report::Malformed);
        }
        let Some((start, leaf)) = root.tree.leaf_at(gfn.0) else {
            return Err(Report::Absent);
        };
        let seen = F::seen(leaf.perms, self.rig.setup.mode_based_execute)?;
        if seen.contains(access.needs()) {
            Ok((Pfn(leaf.pfn + (gfn.0 - start)), leaf.level))
        } else {
            Err(Report::Denied)
        }
    }
}
