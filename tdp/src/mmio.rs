//! Frames without memory, remembered in the tables: entries of a generation, and how it comes round.
//!
//! Protocol. A fault that finds no slot puts an MMIO entry where its frame would be mapped. The processor then reports
//! another kind of exit for it, and [`Vcpu::is_mmio`] tells that it need not be resolved, without a look at the slots. The
//! entry says under which generation of the slots it was made; every change of them moves the generation, so that one made
//! before is *stale* and the fault looks again.
//!
//! An entry holds the low 19 bits of the generation only. Of one that is 2^19 changes old they would be those of now. So
//! each time that an *age* of 2^18 changes begins, and before the next change, all MMIO entries are swept out of all
//! trees. An entry is therefore never older than one age and a half of the bits is never ambiguous, not even
//! while the sweep is under way.
//!
//! A fault may put its entry in late, behind the sweep, with a generation that it read before. It looks at the generation
//! once more after it has done so, and takes the entry back if another age has begun. The fences order that: either the
//! sweep finds the entry, or the fault finds the new age. So nobody waits: a change of the slots stays possible
//! from where waiting for a fault is not. Nothing is flushed, because a processor caches no entry that it may not walk
//! through.

use crate::entry::{self, EntryRef};
use crate::event;
use crate::fault::{Fault, Outcome};
use crate::host::{AddressSpaceId, Host};
use crate::install::Next;
use crate::iter::TdpIter;
use crate::mmu::Shared;
use crate::stats::{Stat, Tally};
use crate::table::{self, TableCache};
use crate::vcpu::{Context, Vcpu};

use tdp_arch::{Format, Gfn, GfnRange, Gpa, Level, MMIO_GENERATION_BITS, Spte};
use tdp_rcu::sync::{Ordering, fence};

/// Bits of the generation that count changes within an age: one less than an entry holds.
const AGE_BITS: u32 = MMIO_GENERATION_BITS - 1;
/// Bits of the generation that an entry holds.
const HELD: u64 = (1 << MMIO_GENERATION_BITS) - 1;

const fn age(generation: u64) -> u64 {
    generation >> AGE_BITS
}

impl<F: Format, H: Host> Context<F, H> {
    /// Remembers that there is no memory at the fault's frame, so that the next access exits at once. `generation` is
    /// that of the slots which were searched, not the newest: memory added meanwhile makes the entry old from the start.
    #[cold]
    pub(crate) fn mmio(&self, cache: &mut TableCache, fault: Fault, generation: u64) -> Outcome {
        let gfn = fault.gpa.gfn();
        let mmio = Outcome::Mmio { read_only: false };
        let Some(spte) = self
            .shared
            .mmio_caching
            .then(|| F::mmio(gfn, generation, self.shared.physical_bits))
            .flatten()
        else {
            self.add(Stat::Mmio, 1);
            return mmio;
        };
        let outcome = self.walk(gfn, |entry, level, old| {
            if old == spte {
                return Next::Done(mmio);
            }
            if F::is_leaf(old, level) {
                // Mapped by hand where there is no slot: nothing to remember.
                return Next::Done(mmio);
            }
            if F::is_mmu_present(old) {
                return Next::Descend(F::pfn(old));
            }
            if level > Level::L1 {
                return self.link(cache, entry, level, old, gfn, F::table);
            }
            match entry::exchange::<F>(entry, level, old, spte, self) {
                Ok(()) => {
                    event::mark_mmio(self.as_id, gfn, fault.access, generation);
                    self.forget_if_overtaken(entry, spte, generation);
                    Next::Done(mmio)
                }
                Err(_) => Next::Again,
            }
        });
        if outcome == mmio {
            self.add(Stat::Mmio, 1);
        }
        outcome
    }

    /// Takes the entry back that was put in for `generation`, if an age has begun since: the sweep may be past it.
    fn forget_if_overtaken(&self, entry: EntryRef<'_>, spte: Spte, generation: u64) {
        // SeqCst: pairs with the fence in `age_mmio_entries`. If this one is first the sweep finds the entry; if that one
        // is, the load below sees the generation that began the age.
        fence(Ordering::SeqCst);
        if age(self.shared.slots.version()) != age(generation) {
            // Whatever else is there by now has taken its place.
            let _ = entry::exchange::<F>(entry, Level::L1, spte, F::EMPTY, self);
        }
    }

    /// Whether the tables say that there is no memory at `gfn`, and said so under the slots of now.
    fn is_mmio(&self, gfn: Gfn) -> bool {
        let version = self.shared.slots.version();
        let mut page = self.root.page();
        let mut level = self.root.level;
        loop {
            let Some(spte) = page.get(self.root.index(level, gfn)).map(EntryRef::load) else {
                return false;
            };
            match level.below().filter(|_| F::is_table(spte)) {
                Some(below) => {
                    page = table::page(self.shared.host.frames(), F::pfn(spte));
                    level = below;
                }
                None => {
                    let is_now = |generation| u64::from(generation) == version & HELD;
                    return F::mmio_entry(spte).is_some_and(|it| is_now(it.generation));
                }
            }
        }
    }
}

impl<F: Format, H: Host> Vcpu<F, H> {
    /// Whether the tables remember that there is no memory at `gpa`, under the slots of now: the quick answer to an exit
    /// that the processor reports for such an entry (a misconfiguration on EPT, a reserved bit on NPT). If not, the access
    /// is to be resolved as a [`fault`](Vcpu::fault). Always `false` for a confidential guest.
    pub fn is_mmio(&mut self, gpa: Gpa) -> bool {
        let ctx = &self.core.ctx;
        let gfn = gpa.gfn();
        if ctx.private_root.is_some() || gfn >= ctx.root.limit() {
            return false;
        }
        let section = self.reader.enter();
        let is_mmio = ctx.is_mmio(gfn);
        drop(section);
        if is_mmio {
            ctx.add(Stat::Mmio, 1);
        }
        is_mmio
    }
}

impl<F: Format, H: Host> Shared<F, H> {
    /// Sweeps all MMIO entries out if `generation`, which was just published, begins an age. The caller holds the slots'
    /// writer lock.
    pub(crate) fn age_mmio_entries(&self, generation: u64) {
        if age(generation) != age(generation.wrapping_sub(1)) {
            self.forget_mmio();
        }
    }

    #[cold]
    fn forget_mmio(&self) {
        // SeqCst: pairs with the fence in `forget_if_overtaken`.
        fence(Ordering::SeqCst);
        let tally = &self.shards.sweeps;
        for as_id in (0..self.address_spaces).map(AddressSpaceId) {
            for root in self.roots.of(as_id) {
                let all = GfnRange {
                    start: Gfn(0),
                    end: root.limit(),
                };
                let mut visit = self.domain.visit();
                let mut iter = TdpIter::<F, H>::new(&mut visit, &self.host, &root, all, Level::L1);
                while let Some(step) = iter.next() {
                    let mut old = step.spte;
                    while F::mmio_entry(old).is_some() {
                        match entry::exchange::<F>(step.entry, step.level, old, F::EMPTY, tally) {
                            Ok(()) => break,
                            Err(actual) => old = actual,
                        }
                    }
                }
            }
        }
    }
}
