//! Operations on ranges that the library has of its own: aging, and write protection for good.

use super::observe::Doing;
use super::{Driver, Stop, space};
use crate::replay::entry::Entry;
use crate::replay::ledger::Key;
use crate::replay::processor::Processor;
use crate::replay::step::Operation;
use crate::replay::trace::SpaceRange;
use std::cmp::Reverse;
use tdp::{Gfn, Gpa, Host, TableMemory};
use tdp_arch::walker::{GuestAccess, WalkError};

impl<F: Processor> Driver<F> {
    /// A vCPU uses a new root; the old one is not entered any more.
    pub(super) fn give_up_root(&mut self, as_id: u8) -> Result<(), Stop> {
        let range = SpaceRange {
            as_id,
            start: 0,
            end: u64::MAX,
        };
        let gfns = self.gfns(&range);
        self.machine()?.mmu.zap(space(as_id), gfns).flush();
        Ok(())
    }

    /// The host asks for accessed bits. What the processor had set by then is an input, and not recorded but by what is
    /// cleared: it is made so first.
    pub(super) fn age(&mut self, ranges: &[SpaceRange], clears: bool) -> Result<(), Stop> {
        if clears {
            self.take_over_accessed_bits(ranges)?;
        }
        self.observed(ranges, Doing::Library, |driver| {
            for range in ranges {
                let (as_id, gfns) = (space(range.as_id), driver.gfns(range));
                let mmu = &driver.machine()?.mmu;
                if clears {
                    mmu.age(as_id, gfns);
                } else {
                    mmu.test_age(as_id, gfns);
                }
            }
            Ok(())
        })?;
        self.findings.operation(Operation::Age, true);
        Ok(())
    }

    fn take_over_accessed_bits(&mut self, ranges: &[SpaceRange]) -> Result<(), Stop> {
        for (&(as_id, gfn, Reverse(level)), &(_, entry)) in &self.view(ranges) {
            let Entry::Leaf(leaf) = entry else { continue };
            let key = Key {
                detached: false,
                as_id,
                gfn,
                level,
            };
            let was_accessed = self.ledger.owed(key).is_some_and(|owed| {
                matches!((owed.from, owed.to), (Entry::Leaf(from), Entry::Leaf(to))
                    if from.accessed && !to.accessed)
            });
            if was_accessed && !leaf.accessed {
                self.findings.accessed_bits_set += 1;
                self.set_accessed(as_id, gfn)?;
            } else if !was_accessed && leaf.accessed {
                self.findings.accessed_bits_cleared += 1;
                let page = self.gfns(&SpaceRange {
                    as_id,
                    start: gfn,
                    end: gfn + 1,
                });
                self.machine()?.mmu.age(space(as_id), page);
            }
        }
        Ok(())
    }

    /// A processor reads a page of which it has nothing cached.
    fn set_accessed(&mut self, as_id: u8, gfn: u64) -> Result<(), Stop> {
        let (cpu, mmu) = self.cpu(None)?;
        cpu.load(space(as_id))?;
        cpu.processor.flush_all();
        let memory = TableMemory::new(mmu.host().frames());
        match cpu
            .processor
            .access(&memory, Gpa(gfn << 12), GuestAccess::Read)
        {
            Err(WalkError::Abort(abort)) => Err(abort.into()),
            _ => Ok(()),
        }
    }

    /// Writes to a frame are tracked from now on.
    pub(super) fn track_writes(&mut self, as_id: u8, gfn: u64) -> Result<(), Stop> {
        self.machine()?;
        let range = SpaceRange {
            as_id,
            start: gfn,
            end: gfn + 1,
        };
        self.observed(&[range], Doing::Library, |driver| {
            let mmu = &driver.machine()?.mmu;
            mmu.write_protect_gfn(space(as_id), Gfn(gfn)).flush();
            Ok(())
        })?;
        self.findings.operation(Operation::TrackWrites, true);
        Ok(())
    }
}
