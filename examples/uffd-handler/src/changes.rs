//! Changes of the VMM's address space, as the kernel reports them.
//!
//! Protocol. One thread at a time reads reports and applies what it read, in that order, before the next is read: a removal
//! that follows a move must not overtake it. While it reads, nothing is copied (`table.rs`).
//!
//! | report | what becomes of the table |
//! |---|---|
//! | remove | the range is converted to shared: its entries go, and whoever faults there gets zeroes |
//! | unmap | its slots go |
//! | remap | its slots go and come back elsewhere; what was given up there stays so |
//! | fork | a session of its own for the child, with the same slots |
//!
//! A page whose slot went and came back is absent for the table and may be present for the kernel, with what the guest has
//! written since. It is asked for again at most once, by an ioctl that the kernel refuses if the page is there (`table.rs`),
//! and the kernel's `EEXIST` is taken for success.

use crate::host::{Backing, PageStates, SPACE, frames};
use crate::protocol::{Extent, Region};
use crate::sys::{Message, Uffd};
use crate::table::bytes;
use tdp::{Gfn, GfnRange, Host, Pfn, Slot, Visibility};

/// A change could not be applied. The table no longer says what the kernel does.
#[derive(Debug, thiserror::Error)]
#[error("a change of the address space could not be followed: {0}")]
pub struct ChangeError(String);

pub(crate) fn lost(error: impl std::fmt::Display) -> ChangeError {
    ChangeError(error.to_string())
}

/// Whether a report is of a change.
pub(crate) fn is_change(message: &Message) -> bool {
    !matches!(message, Message::Fault { .. } | Message::Unknown(_))
}

/// Applies one report. A fork is answered with the regions of the child.
pub(crate) fn apply(
    states: &PageStates,
    change: Message,
) -> Result<Option<(Uffd, Vec<Region>)>, ChangeError> {
    match change {
        Message::Remove { start, end } if start < end => {
            let range = frames(start, end);
            states
                .convert(SPACE, range, Visibility::Shared)
                .map_err(lost)?;
        }
        Message::Unmap { start, end } if start < end => {
            let range = frames(start, end);
            take_out(states, range)?;
            // What is mapped there next is another region's.
            states
                .convert(SPACE, range, Visibility::Private)
                .map_err(lost)?;
        }
        Message::Remap { from, to, len } if len > 0 => {
            states.host().protected().doubt();
            let (old, new) = (frames(from, from + len), frames(to, to + len));
            let mut removed = Vec::new();
            states.visibilities(old, |range, visibility| {
                if visibility == Visibility::Shared {
                    removed.push(range);
                }
            });
            let moved = take_out(states, old)?;
            take_out(states, new)?;
            for range in [old, new] {
                states
                    .convert(SPACE, range, Visibility::Private)
                    .map_err(lost)?;
            }
            let there = |gfn: Gfn| Gfn(gfn.0 - old.start.0 + new.start.0);
            for range in removed {
                let range = there(range.start)..there(range.end);
                states
                    .convert(SPACE, range, Visibility::Shared)
                    .map_err(lost)?;
            }
            for (range, backing) in moved {
                let range = there(range.start)..there(range.end);
                put_in(states, range.into(), backing)?;
            }
        }
        Message::Fork(uffd) => {
            states.host().protected().doubt();
            return Ok(Some((uffd, regions(states))));
        }
        _ => {}
    }
    Ok(None)
}

fn put_in(states: &PageStates, range: GfnRange, backing: Backing) -> Result<(), ChangeError> {
    if !range.is_empty() {
        states
            .slots()
            .insert(Slot::new(range, backing))
            .map_err(lost)?;
    }
    Ok(())
}

/// Removes what slots there are in a range and returns it; what reaches beyond stays.
fn take_out(states: &PageStates, range: GfnRange) -> Result<Vec<(GfnRange, Backing)>, ChangeError> {
    let mut taken = Vec::new();
    for slot in states.slots().list(SPACE) {
        let gfns = slot.gfns();
        if !gfns.overlaps(range) {
            continue;
        }
        let part = |start: Gfn, end: Gfn| {
            let first = slot.backing().first.0 + (start.0 - gfns.start.0);
            let backing = Backing {
                first: Pfn(first),
                ..*slot.backing()
            };
            (GfnRange { start, end }, backing)
        };
        states.slots().remove(SPACE, slot.id()).map_err(lost)?;
        let start = gfns.start.max(range.start);
        let end = gfns.end.min(range.end);
        for (rest, backing) in [part(gfns.start, start), part(end, gfns.end)] {
            put_in(states, rest, backing)?;
        }
        taken.push(part(start, end));
    }
    Ok(taken)
}

/// What is served now, as a VMM would say it.
pub(crate) fn regions(states: &PageStates) -> Vec<Region> {
    let mut regions = Vec::new();
    for slot in states.slots().list(SPACE) {
        let (gfns, backing) = (slot.gfns(), slot.backing());
        let base = gfns.start.address().0;
        let mut removed = Vec::new();
        states.visibilities(gfns, |range, visibility| {
            if visibility == Visibility::Shared {
                removed.push(Extent {
                    start: range.start.address().0 - base,
                    len: range.pages() * 4096,
                });
            }
        });
        let offset = backing.first.address().0;
        let mut region = Region::new(base, gfns.pages() * 4096, offset);
        region = region.with_pages(bytes(backing.level));
        region.removed = removed;
        regions.push(region);
    }
    regions
}
