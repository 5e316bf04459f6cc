//! Invalidation by the host, without a lock.
//!
//! Protocol. *Begin* publishes the range, has all vCPUs forget what they remember (`memo.rs`), then waits until every critical
//! section that began before has ended, then the caller zaps and flushes. A fault looks at the published ranges inside its
//! critical section, before its backing look-up, or goes by what was remembered while there were none: either it began early
//! enough to be waited for, and what it installed is zapped; or it sees the range and answers `Retry`. *End* moves the sequence
//! and withdraws the range. A look-up that has to sleep does so outside any critical section; it compares the sequence before and after, because a whole invalidation may have passed
//! meanwhile (INV: no-stale-install).
//!
//! A fault reads the published ranges **once**, before its look-up, and judges by them until it is done: one that is
//! not among them either had ended, and the look-up saw what it changed, or has yet to begin, and waits for the fault.
//! One that ends meanwhile waits for nobody; looking again would miss it.
//!
//! The read side is one load of a pointer that is null while nothing is being invalidated, and not even that for a fault
//! that has everything in its memo.

use crate::host::{AddressSpaceId, Host};
use crate::mmu::Shared;
use crate::range_zap::ZapScope;
use crate::reclaim::Retired;
use crate::tlb::{Flushed, PendingFlush};
use alloc::boxed::Box;
use alloc::vec::Vec;
use tdp_arch::{Format, GfnRange};
use tdp_rcu::Section;
use tdp_rcu::sync::{AtomicPtr, AtomicU64, CachePadded, Mutex, Ordering};

/// Ranges under invalidation.
pub(crate) struct Ranges(Vec<(u64, AddressSpaceId, GfnRange)>);

impl Ranges {
    /// Whether a frame of `wanted` is among them.
    pub(crate) fn overlap(&self, as_id: AddressSpaceId, wanted: GfnRange) -> bool {
        self.0
            .iter()
            .any(|(_, space, range)| *space == as_id && range.overlaps(wanted))
    }
}

/// State of invalidations.
pub(crate) struct Invalidations {
    /// Null, or a boxed [`Ranges`].
    published: AtomicPtr<Ranges>,
    /// Invalidations ended so far. 64 bits: it never comes round.
    ended: AtomicU64,
    writer: CachePadded<Mutex<Writer>>,
}

#[derive(Default)]
struct Writer {
    ranges: Vec<(u64, AddressSpaceId, GfnRange)>,
    next: u64,
}

impl Invalidations {
    pub(crate) fn new(ended: u64) -> Self {
        Self {
            published: AtomicPtr::new(core::ptr::null_mut()),
            ended: AtomicU64::new(ended),
            writer: CachePadded::new(Mutex::new(Writer::default())),
        }
    }

    /// Invalidations ended so far.
    #[inline]
    pub(crate) fn sequence(&self) -> u64 {
        self.ended.load(Ordering::Acquire)
    }

    /// Whether anything is being invalidated. The caller is inside a critical section.
    #[inline(always)]
    pub(crate) fn any(&self) -> bool {
        !self.published.load(Ordering::Acquire).is_null()
    }

    /// What is being invalidated now.
    #[allow(unsafe_code)]
    pub(crate) fn now<'s>(&self, _section: &'s Section<'_>) -> Option<&'s Ranges> {
        // Acquire: pairs with the Release of `publish`; what is pointed to is complete.
        let ranges = self.published.load(Ordering::Acquire);
        // UNSAFETY: a pointer read by RCU.
        // SAFETY: null or from a box; a replaced list is retired to the domain of the section, which began before the
        // pointer was loaded, so it lives until that section ends.
        unsafe { ranges.as_ref() }
    }

    /// Publishes the writer's list and returns the one that it replaces.
    #[allow(unsafe_code)]
    fn publish(&self, writer: &Writer) -> Option<Box<Ranges>> {
        let next = if writer.ranges.is_empty() {
            core::ptr::null_mut()
        } else {
            Box::into_raw(Box::new(Ranges(writer.ranges.clone())))
        };
        let old = self.published.swap(next, Ordering::AcqRel);
        // UNSAFETY: the other end of `Box::into_raw`.
        // SAFETY: every pointer stored came from a box, and the swap gives each to one caller only.
        (!old.is_null()).then(|| unsafe { Box::from_raw(old) })
    }
}

impl Drop for Invalidations {
    fn drop(&mut self) {
        drop(self.publish(&Writer::default()));
    }
}

/// An invalidation in progress: faults on its range answer [`Retry`](crate::Outcome::Retry) until it ends.
///
/// [`end`](Invalidation::end) takes the proof that what [`zap`](Invalidation::zap) took away has been flushed. One that is
/// dropped instead zaps and flushes by itself before it ends.
#[must_use = "the invalidation ends when this is dropped"]
pub struct Invalidation<'a, F: Format, H: Host> {
    shared: &'a Shared<F, H>,
    number: u64,
    as_id: AddressSpaceId,
    range: GfnRange,
    flushed: bool,
}

impl<F: Format, H: Host> Shared<F, H> {
    /// Begins an invalidation.
    pub(crate) fn invalidate_begin(
        &self,
        as_id: AddressSpaceId,
        range: GfnRange,
    ) -> Invalidation<'_, F, H> {
        let (number, replaced) = {
            let mut writer = self.invalidations.writer.lock();
            let number = writer.next;
            writer.next += 1;
            writer.ranges.push((number, as_id, range));
            (number, self.invalidations.publish(&writer))
        };
        self.retire_ranges(replaced);
        self.domain.move_stamps();
        // The fence inside pairs with the one at the start of every critical section: a fault that is not waited for
        // here began later and sees the range, or a stamp that is not its memo's.
        self.domain.synchronize_sections();
        Invalidation {
            shared: self,
            number,
            as_id,
            range,
            flushed: false,
        }
    }

    fn retire_ranges(&self, replaced: Option<Box<Ranges>>) {
        if let Some(ranges) = replaced {
            self.domain.retire(Retired::Ranges { _ranges: ranges }, 1);
        }
    }
}

impl<F: Format, H: Host> Invalidation<'_, F, H> {
    /// Takes all leaves of the range away. Once they are flushed no vCPU can reach the old pages.
    pub fn zap(&self) -> PendingFlush<'_, F, H> {
        self.shared.zap(self.as_id, self.range, ZapScope::Leaves)
    }

    /// Ends the invalidation. `_flushed` says that what was zapped has been flushed.
    pub fn end(mut self, _flushed: Flushed) {
        self.flushed = true;
    }
}

impl<F: Format, H: Host> Drop for Invalidation<'_, F, H> {
    fn drop(&mut self) {
        if !self.flushed {
            self.zap().flush();
        }
        let replaced = {
            let mut writer = self.shared.invalidations.writer.lock();
            // The sequence moves before the range is withdrawn: a sleeping look-up that began before sees either.
            self.shared
                .invalidations
                .ended
                .fetch_add(1, Ordering::AcqRel);
            writer.ranges.retain(|(number, ..)| *number != self.number);
            self.shared.invalidations.publish(&writer)
        };
        self.shared.retire_ranges(replaced);
    }
}
