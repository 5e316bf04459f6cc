//! A confidential guest on a backend, and what is checked of it at quiet moments.

use super::backend::Backend;
use super::conditions::Conditions;
use super::layout::{Layout, SHARED_BIT};
use crate::ours::{BenchHost, PHYSICAL_BITS, POOL_BASE};
use crate::report::{Error, Output};
use serde::Serialize;
use std::sync::{Arc, OnceLock};
use tdp::protected::HandOffStep;
use tdp::{
    AddressSpaceId, Fault, Gfn, Gpa, LinearBacking, MmapPool, Mmu, Phase, PoolConfig, Slot,
    SoftwareHost, TlbTracker, Vcpu, Visibility,
};
use tdp_arch::Ept;

/// The address space that guests run in.
pub const SPACE: AddressSpaceId = AddressSpaceId(0);

/// Every frame of a half.
pub const EVERYTHING: std::ops::Range<Gfn> = Gfn(0)..Gfn(1 << (SHARED_BIT - tdp_arch::PAGE_SHIFT));

/// The MMU of a guest on `B`.
pub type GuestMmu<B> = Mmu<Ept, BenchHost<B>>;
/// A vCPU of it.
pub type GuestVcpu<B> = Vcpu<Ept, BenchHost<B>>;

/// A guest that runs, with nothing mapped.
#[derive(Debug)]
pub struct Guest<B: Backend> {
    mmu: GuestMmu<B>,
    layout: Layout,
    conditions: Arc<Conditions>,
    left: Arc<OnceLock<usize>>,
}

impl<B: Backend> Guest<B> {
    /// A guest whose memory is of `visibility` throughout.
    ///
    /// # Errors
    ///
    /// What the library or the module refuses, each with its own message.
    pub fn new(
        layout: Layout,
        visibility: Visibility,
        options: B::Options,
        conditions: Conditions,
    ) -> Result<Self, Error> {
        type Boxed = Box<dyn std::error::Error + Send + Sync>;
        let failed = |e: Boxed| Error::run("tdp", e);
        let conditions = Arc::new(conditions);
        let pool = MmapPool::new(PoolConfig {
            frames: usize::try_from(layout.frames()).map_err(|e| failed(e.into()))?,
            base: POOL_BASE,
            huge_pages: false,
        })
        .map_err(|e| failed(e.into()))?;
        pool.populate();
        let tlb = TlbTracker::new();
        let backend = B::make(&layout, options, tlb.clone(), conditions.clone())?;
        let left = Arc::new(OnceLock::new());
        let host = BenchHost::new(SoftwareHost::confidential(pool, tlb, backend), left.clone());
        let mmu = GuestMmu::<B>::builder(host)
            .physical_bits(PHYSICAL_BITS)
            .shared_bit(SHARED_BIT)
            .default_visibility(visibility)
            .build()
            .map_err(|e| failed(e.into()))?;
        let backing =
            LinearBacking::new(layout.shared(), layout.level).with_private(layout.private());
        mmu.slots()
            .insert(Slot::new(layout.gfns, backing))
            .map_err(|e| failed(e.into()))?;
        mmu.build_private()
            .and_then(|mut image| image.finalise())
            .map_err(|e| failed(e.into()))?;
        Ok(Self {
            mmu,
            layout,
            conditions,
            left,
        })
    }

    /// Its MMU.
    pub fn mmu(&self) -> &GuestMmu<B> {
        &self.mmu
    }

    /// What it is made of.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Conditions of its module.
    pub fn conditions(&self) -> &Conditions {
        &self.conditions
    }

    /// Its module.
    pub fn backend(&self) -> &B {
        use tdp::Host;
        self.mmu.host().protected()
    }

    /// One more vCPU.
    ///
    /// # Errors
    ///
    /// If its root cannot be made.
    pub fn vcpu(&self) -> Result<GuestVcpu<B>, Error> {
        self.mmu.vcpu().map_err(|e| Error::run("tdp", e))
    }

    /// Takes everything private of guest memory away, and leaves tables that hold leaves of `leaf` where they are.
    ///
    /// # Errors
    ///
    /// If the module keeps something.
    pub fn remove_leaves(&self, leaf: tdp::Level) -> Result<(), Error> {
        let gfns = self.layout.gfns;
        let table = leaf.above().unwrap_or(leaf).pages();
        // No part covers a table, so that none is taken along.
        let part = table / 2;
        let mut start = gfns.start.0;
        while start < gfns.end.0 {
            let end = (start / part * part + part).min(gfns.end.0);
            self.mmu
                .zap_private(SPACE, Gfn(start)..Gfn(end))
                .map_err(|e| Error::run("removal", e))?;
            start = end;
        }
        Ok(())
    }

    /// Compares what there is to compare. Nobody is at work.
    pub fn audit(&self, checks: &mut Checks) {
        let backend = self.backend();
        if let Some(violations) = backend.violations() {
            checks.audit_violations = Some(checks.audit_violations.unwrap_or(0).max(violations));
        }
        // Of a dead guest there is no table to look into.
        if backend.keeps_a_table() && self.mmu.phase() == Some(Phase::Running) {
            let audit = self.mmu.audit_protected(SPACE);
            checks.compared += audit.compared;
            checks.different += audit.different;
            checks.protected_equals_private = Some(checks.different == 0);
        }
        let (audit, stats) = (self.mmu.audit(), self.mmu.stats());
        let books = audit.pages != stats.pages || audit.tables != stats.tables;
        checks.books_wrong += audit.frozen + audit.misplaced + audit.unknown + u64::from(books);
    }

    /// Takes everything down, the vCPUs already being gone, and counts what does not come back.
    ///
    /// # Errors
    ///
    /// If the module keeps something of a guest that still lives.
    pub fn finish(self, checks: &mut Checks) -> Result<(), Error> {
        self.conditions.calm();
        if self.mmu.phase() == Some(Phase::Running) {
            self.mmu
                .zap_private(SPACE, EVERYTHING)
                .map_err(|e| Error::run("removal", e))?;
        }
        self.audit(checks);
        let leaked = self.mmu.stats().protected.leaked + self.backend().kept();
        let left = self.left.clone();
        drop(self);
        // A host that still lives after its MMU has leaked as a whole.
        let frames = left.get().map_or(u64::MAX, |&frames| frames as u64);
        checks.leaked_frames = checks
            .leaked_frames
            .saturating_add(leaked)
            .saturating_add(frames);
        Ok(())
    }
}

/// A write to `gfn` where it is private.
pub const fn private_write(gfn: Gfn) -> Fault {
    Fault::write(gfn.address())
}

/// A write to `gfn` where it is shared.
pub const fn shared_write(gfn: Gfn) -> Fault {
    Fault::write(Gpa(gfn.address().0 | 1 << SHARED_BIT))
}

/// Times in a row that a guest may be sent back to one private address unresolved.
pub const MAX_REENTRIES: u64 = 3;

/// What was verified.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Checks {
    /// Calls that a correct host never makes, by the module's own log; null if it keeps none.
    pub audit_violations: Option<u64>,
    /// Whether every entry of the protected table was as in the private one, at every quiet moment; null if the module
    /// keeps no table.
    pub protected_equals_private: Option<bool>,
    /// Entries compared.
    pub compared: u64,
    /// Those that differed.
    pub different: u64,
    /// Entries that stand where they must not, and counters that disagree with the trees.
    pub books_wrong: u64,
    /// Most times in a row that a guest was sent back to one private address unresolved.
    pub max_reentries: u64,
    /// Frames, tables and the guest's, that did not come back.
    pub leaked_frames: u64,
}

impl Checks {
    /// What is wrong, in words.
    pub fn wrong(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut note = |count: u64, what: &str| {
            if count != 0 {
                wrong.push(format!("{count} {what}"));
            }
        };
        note(
            self.audit_violations.unwrap_or(0),
            "calls that a correct host never makes",
        );
        note(self.different, "entries differ from the protected table's");
        note(self.books_wrong, "entries or counters are wrong");
        note(self.leaked_frames, "frames leaked");
        if self.max_reentries > MAX_REENTRIES {
            wrong.push(format!(
                "a guest was sent back {} times to one address",
                self.max_reentries
            ));
        }
        wrong
    }

    /// Prints them.
    pub fn tell(&self, output: &Output) {
        let violations = self
            .audit_violations
            .map_or_else(|| "no audit log".to_owned(), |n| format!("{n} violations"));
        output.say(format_args!(
            "Checked: {violations}; {} entries compared with the protected table, {} differ; at most {} re-entries at one \
             address; {} frames leaked",
            self.compared, self.different, self.max_reentries, self.leaked_frames
        ));
    }

    /// # Errors
    ///
    /// [`Error::Check`] if anything is not as it should be.
    pub fn verdict(&self) -> Result<(), Error> {
        verdict(self.wrong())
    }
}

/// # Errors
///
/// [`Error::Check`] if anything is wrong.
pub fn verdict(wrong: Vec<String>) -> Result<(), Error> {
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(Error::Check(wrong.join(", ")))
    }
}

/// Calls of the hook in one interval, by kind.
#[derive(Clone, Copy, Debug, Default)]
pub struct Calls {
    made: [u64; HandOffStep::ALL.len()],
    busy: [u64; HandOffStep::ALL.len()],
}

impl Calls {
    /// Between two readings of the counters.
    pub fn between(before: &tdp::ProtectedStats, after: &tdp::ProtectedStats) -> Self {
        Self {
            made: std::array::from_fn(|n| after.calls[n] - before.calls[n]),
            busy: std::array::from_fn(|n| after.busy[n] - before.busy[n]),
        }
    }

    /// Of one kind.
    pub const fn of(&self, step: HandOffStep) -> u64 {
        self.made[step as usize]
    }

    /// Of one kind, answered "again".
    pub const fn busy_of(&self, step: HandOffStep) -> u64 {
        self.busy[step as usize]
    }

    /// Of all kinds.
    pub fn all(&self) -> u64 {
        self.made.iter().sum()
    }

    /// Of all kinds, answered "again".
    pub fn all_busy(&self) -> u64 {
        self.busy.iter().sum()
    }

    /// By name, without those that were never made: made, and answered "again".
    pub fn named(&self) -> std::collections::BTreeMap<&'static str, (u64, u64)> {
        HandOffStep::ALL
            .into_iter()
            .filter(|&step| self.of(step) != 0)
            .map(|step| (step.name(), (self.of(step), self.busy_of(step))))
            .collect()
    }
}
