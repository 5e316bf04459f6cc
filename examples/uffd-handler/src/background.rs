//! Filling pages that nobody waits for: a working set that was recorded, then everything else.
//!
//! Protocol. The same table as the workers', so that a page which a fault is about to fill is not filled twice, and none that
//! was given up is brought back. Small runs at a time: a fault on a page of the run waits for it.

use crate::host::{Backing, SPACE, UffdHost};
use crate::session::{SessionError, Shared, Table};
use crate::table::{RUN, Refusal, last_refusal};
use std::sync::Arc;
use tdp::{Ept, Gfn, GfnRange, MemoryFault, Outcome, Slot, Vcpu, Visibility};

/// Fills the working set and then, if it is to, the rest. Returns how many pages of each.
pub(crate) fn run(shared: &Arc<Shared>, mut vcpu: Vcpu<Ept, UffdHost>) -> (u64, u64) {
    let mut filled = (0, 0);
    if let Err(error) = fill(shared, &mut vcpu, &mut filled) {
        shared.fail(error);
    }
    filled
}

fn fill(
    shared: &Shared,
    vcpu: &mut Vcpu<Ept, UffdHost>,
    (prefetched, copied): &mut (u64, u64),
) -> Result<(), SessionError> {
    let Table::Tdp(states) = &shared.table else {
        return Ok(());
    };
    for &offset in &shared.config().prefetch {
        if shared.is_stopping() {
            return Ok(());
        }
        let slots = states.slots().list(SPACE);
        let place = slots.iter().find_map(|slot| place_of(slot, offset));
        if let Some(range) = place {
            *prefetched += fill_range(shared, vcpu, range)?;
        }
    }
    if !shared.config().background {
        return Ok(());
    }
    loop {
        let generation = states.slots().generation();
        for slot in states.slots().list(SPACE) {
            *copied += fill_range(shared, vcpu, slot.gfns())?;
        }
        if shared.is_stopping() || states.slots().generation() == generation {
            return Ok(());
        }
    }
}

/// Where a page of the snapshot belongs, if it is in this slot.
fn place_of(slot: &Slot<Backing>, offset: u64) -> Option<GfnRange> {
    let Backing { first, level } = *slot.backing();
    let pages = (offset >> 12).checked_sub(first.0)?;
    let start = Gfn(slot.gfns().start.0.checked_add(pages)?);
    let whole = level.range(start);
    slot.contains(start).then_some(whole)
}

/// Fills what of a range is there to be filled.
fn fill_range(
    shared: &Shared,
    vcpu: &mut Vcpu<Ept, UffdHost>,
    range: GfnRange,
) -> Result<u64, SessionError> {
    let mut filled = 0;
    let mut next = range.start;
    while next < range.end && !shared.is_stopping() {
        let end = Gfn((next.0 + RUN as u64).min(range.end.0));
        let done = vcpu.prefault(next..end, Visibility::Private)?;
        filled += done.frames;
        next = done.next;
        match done.stopped {
            None | Some(Outcome::Retry(_)) => {}
            Some(Outcome::MemoryFault(MemoryFault::Refused)) => match last_refusal() {
                Some(Refusal::Changing) => shared.drain()?,
                Some(Refusal::Gone) => {
                    shared.drain()?;
                    next = Gfn(next.0 + 1);
                }
                why => {
                    let address = next.address().0;
                    let why = why.unwrap_or(Refusal::Errno(libc::EIO));
                    return Err(SessionError::Page { address, why });
                }
            },
            // Given up, or no region's any more.
            Some(_) => next = Gfn(next.0 + 1),
        }
    }
    Ok(filled)
}
