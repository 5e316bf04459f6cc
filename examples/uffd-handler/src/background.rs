//! Filling pages that nobody waits for: a working set that was recorded, then everything else.
//!
//! Protocol. The same table as the workers', so that a page which a fault is about to fill is not filled twice, and none that
//! was given up is brought back. Small runs at a time: a fault on a page of the run waits for it. It ends when it has been
//! through all regions and they are still the same; if some was not where it should be, it waits for the report of that, which
//! the kernel sends when memory has moved and not before.

use crate::host::{Backing, PageStates, SPACE, UffdHost};
use crate::session::{SessionError, Shared, Table};
use crate::table::{RUN, Refusal, last_refusal};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use tdp::{Ept, Gfn, GfnRange, Host, MemoryFault, Outcome, Slot, Vcpu, Visibility};

/// How long a report may be on its way: as long as it takes to move a VM's memory. A VMM that does not ask for reports of
/// what it does never sends one.
const PATIENCE: Duration = Duration::from_secs(10);

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
        let (_, slots) = regions(shared, states)?;
        let place = slots.iter().find_map(|slot| place_of(slot, offset));
        if let Some(range) = place {
            *prefetched += fill_range(shared, vcpu, range)?.0;
        }
    }
    if !shared.config().background {
        return Ok(());
    }
    loop {
        let (generation, slots) = regions(shared, states)?;
        let mut gone = false;
        for slot in slots {
            let (filled, absent) = fill_range(shared, vcpu, slot.gfns())?;
            *copied += filled;
            gone |= absent;
        }
        let begun = Instant::now();
        let same = || Ok::<_, SessionError>(regions(shared, states)?.0 == generation);
        while same()? {
            let wait = gone && shared.has_gate() && begun.elapsed() < PATIENCE;
            if shared.is_stopping() || !wait {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(1));
        }
        if shared.is_stopping() {
            return Ok(());
        }
    }
}

type Slots = Vec<Arc<Slot<Backing>>>;

/// What there is to fill, and the generation of it. Not in the middle of a change: what is being moved is nowhere then.
fn regions(shared: &Shared, states: &PageStates) -> Result<(u64, Slots), SessionError> {
    while !shared.is_stopping() {
        if let Ok(_guard) = states.host().protected().pass() {
            let slots = states.slots();
            return Ok((slots.generation(), slots.list(SPACE)));
        }
        shared.drain()?;
    }
    Ok((0, Vec::new()))
}

/// Where a page of the snapshot belongs, if it is in this slot.
fn place_of(slot: &Slot<Backing>, offset: u64) -> Option<GfnRange> {
    let Backing { first, level } = *slot.backing();
    let pages = (offset >> 12).checked_sub(first.0)?;
    let start = Gfn(slot.gfns().start.0.checked_add(pages)?);
    let whole = level.range(start);
    slot.contains(start).then_some(whole)
}

/// Fills what of a range is there to be filled. How many pages, and whether there were some where nothing is registered.
fn fill_range(
    shared: &Shared,
    vcpu: &mut Vcpu<Ept, UffdHost>,
    range: GfnRange,
) -> Result<(u64, bool), SessionError> {
    let (mut filled, mut gone) = (0, false);
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
                    gone = true;
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
    Ok((filled, gone))
}
