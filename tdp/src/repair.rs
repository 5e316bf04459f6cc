//! The fast fault: giving back, by one exchange, what a sweep took away for a while.
//!
//! Protocol. Aging takes the permissions of a leaf and saves them in the leaf; write protection takes the writable bit and
//! leaves the leaf MMU-writable. In both cases the leaf itself says what may be given back, so that no one need be asked,
//! not even the host: had it taken the page back the leaf would be gone. Writing is given only to a write, so that
//! a page becomes dirty only by one. A large leaf of a slot whose writes are logged is not made writable, but split by
//! the slow path; a small one is marked in the log as soon as it is writable. The exchange compares the whole entry: whoever
//! changes it first wins, and the fault looks again.

use crate::entry::{self, EntryRef};
use crate::event::{self, Site};
use crate::fault::Outcome;
use crate::host::Host;
use crate::slots::{Slot, SlotFlags};
use crate::stats::{Stat, Tally};
use crate::table;
use crate::vcpu::Context;
use tdp_arch::{Access, Format, Gfn, Level, Spte};

/// Exchanges that one fault may lose here before it takes the long way.
const TRIES: u32 = 4;

/// The leaf with all that `access` needs and that it may give; `None` if that is not enough, or was never taken.
#[inline]
fn repaired<F: Format>(old: Spte, access: Access) -> Option<Spte> {
    let mut new = if F::is_access_tracked(old) {
        F::restore_access_tracked(old)
    } else {
        old
    };
    if access.is_write() && old.0 & F::MMU_WRITABLE != 0 {
        new.0 |= F::WRITABLE;
    }
    (new != old && F::allows(new, access)).then_some(new)
}

impl<F: Format, H: Host> Context<F, H> {
    /// Repairs `old`, the leaf of `level` at `entry`, for a slot whose writes are not logged.
    #[cold]
    pub(crate) fn repair_plain(
        &self,
        entry: EntryRef<'_>,
        level: Level,
        old: Spte,
        access: Access,
    ) -> bool {
        let Some(new) = repaired::<F>(old, access) else {
            return false;
        };
        let done = entry::amend::<F>(entry, level, old, new).is_ok();
        event::fast_page_fault(entry.site(), level, access, old, new, done);
        if done {
            self.add(Stat::Upgrades, 1);
            self.add(Stat::Fixed, 1);
        }
        done
    }

    /// Repairs the leaf of `gfn`, a frame of `slot`. `None` if that is not what it takes.
    pub(crate) fn repair(
        &self,
        slot: &Slot<H::Backing>,
        gfn: Gfn,
        access: Access,
    ) -> Option<Outcome> {
        let is_logged = slot.flags().contains(SlotFlags::LOG_DIRTY);
        for _ in 0..TRIES {
            let (entry, level) = self.last_entry(gfn)?;
            let old = entry.load();
            if !F::is_leaf(old, level) {
                return None;
            }
            let new = repaired::<F>(old, access)?;
            let grants = (new.0 ^ old.0) & F::WRITABLE != 0;
            if grants && is_logged && level > Level::L1 {
                return None;
            }
            let done = entry::amend::<F>(entry, level, old, new).is_ok();
            event::fast_page_fault(entry.site(), level, access, old, new, done);
            if done {
                if grants {
                    self.log_write(slot, gfn);
                }
                self.add(Stat::Upgrades, 1);
                self.add(Stat::Fixed, 1);
                return Some(Outcome::Fixed { level });
            }
        }
        None
    }

    /// Where the walk for `gfn` ends.
    fn last_entry(&self, gfn: Gfn) -> Option<(EntryRef<'_>, Level)> {
        let (mut page, mut table) = (self.root.page(), self.root.pfn);
        let mut level = self.root.level;
        loop {
            let entry = page.get(self.root.index(level, gfn))?;
            let entry = entry.at(Site::new(self.as_id, gfn, table));
            let spte = entry.load();
            match level.below().filter(|_| F::is_table(spte)) {
                Some(below) => {
                    table = F::pfn(spte);
                    page = table::page(self.shared.host.frames(), table);
                    level = below;
                }
                None => return Some((entry, level)),
            }
        }
    }
}
