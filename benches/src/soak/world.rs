//! What the threads of an episode share: the host as the MMU sees it, the memory, and what is known of slots and halves.

use super::Random;
use super::chaos;
use super::frames::SoakFrames;
use super::plan::Plan;
use crate::confidential::conditions::{may_fail, step_of};
use crate::mmu_stress::homes::{BLOCK, Homes};
use crate::sync::{AtomicBool, AtomicU64, Ordering, Padded};
use parking_lot::Mutex;
use std::sync::{Arc, OnceLock};
use tdp::protected::Unprotected;
use tdp::protected::tdx::{Call, Hooks, Operand, Status, TdxModule, TdxTable};
use tdp::{
    Access, AddressSpaceId, FlushRequest, Format, Gfn, GfnRange, Host, Level, Lookup, Mapping, Mmu,
    Perms, Pfn, ProtectedTable, Slot, SlotId, TlbTracker, Visibility,
};

pub(super) const SPACE: AddressSpaceId = AddressSpaceId(0);
/// The slot whose writes are logged, and the one that comes, goes and moves.
pub(super) const LOGGED: SlotId = SlotId(0);
pub(super) const COMING: SlotId = SlotId(1);
/// Guest frames from one place of the slot that moves to its other place.
const OTHER_PLACE: u64 = 1 << 20;

/// A duty that is neglected on purpose, so that the checks must see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Flaw {
    /// The host's flush returns at once
    NoFlush,
    /// Whoever copies dirty pages does so before the flush
    CopyFirst,
    /// The host gives pages away before the range is flushed
    GivesAwayFirst,
    /// A vCPU keeps its translations of the private half when it is told to drop them
    KeepsPrivate,
}

/// The private half of a guest, if there is one.
pub(super) trait Half: ProtectedTable {
    /// Twins of tables, and pages, that the module has still.
    fn kept(&self) -> u64;
}

impl Half for Unprotected {
    fn kept(&self) -> u64 {
        0
    }
}

impl Half for TdxTable {
    fn kept(&self) -> u64 {
        self.twins_out() as u64
    }
}

/// What the calls of the TDX module meet.
#[derive(Debug)]
pub(super) struct ModuleChaos;

impl Hooks for ModuleChaos {
    fn refuse(&self, call: Call) -> Option<(Status, Operand)> {
        let step = step_of(call)?;
        if chaos::is_busy() {
            Some((Status::OperandBusy, Operand::RCX))
        } else if may_fail(step) && chaos::is_refused() {
            Some((Status::OperandInvalid, Operand::R8))
        } else {
            None
        }
    }

    fn inside(&self, call: Call) {
        if step_of(call).is_some() {
            chaos::in_hand_off();
        }
    }
}

/// The host as the MMU sees it.
pub(super) struct SoakHost<P> {
    pub(super) frames: SoakFrames,
    pub(super) tlb: TlbTracker,
    pub(super) memory: Arc<Memory>,
    pub(super) protected: P,
    pub(super) flaw: Option<Flaw>,
    pub(super) left: Arc<OnceLock<usize>>,
}

impl<P> SoakHost<P> {
    fn find(&self, slot: &Slot<()>, gfn: Gfn) -> Lookup {
        let first = if slot.id() == LOGGED {
            self.memory.gfns.start
        } else {
            self.memory.logged.end
        };
        let Some(page) = self.memory.homes.page(Gfn(first.0 + slot.offset(gfn))) else {
            return Lookup::Failed;
        };
        let (pfn, level) = self.memory.homes.backing(page);
        // Between finding the page and saying so: the place to be slow.
        chaos::in_critical_section();
        Lookup::Mapped(Mapping::memory(pfn, level, Perms::RWX))
    }

    fn find_private(&self, gfn: Gfn) -> Lookup {
        chaos::in_critical_section();
        let (pfn, level) = (self.memory.private_home(gfn), self.memory.private_level);
        Lookup::Mapped(Mapping::memory(pfn, level, Perms::RWX))
    }
}

/// What a look-up that may not sleep answers now and then.
fn instead() -> Option<Lookup> {
    chaos::other_answer().map(|number| match number {
        0 => Lookup::Failed,
        1 => Lookup::Retry,
        _ => Lookup::Blocking,
    })
}

impl<P: Half> Host for SoakHost<P> {
    type Frames = SoakFrames;
    type Backing = ();
    type Protected = P;

    fn frames(&self) -> &SoakFrames {
        &self.frames
    }

    fn protected(&self) -> &P {
        &self.protected
    }

    fn lookup(&self, slot: &Slot<()>, gfn: Gfn, _access: Access) -> Lookup {
        instead().unwrap_or_else(|| self.find(slot, gfn))
    }

    fn lookup_blocking(&self, slot: &Slot<()>, gfn: Gfn, _access: Access) -> Lookup {
        let found = self.find(slot, gfn);
        chaos::pause();
        found
    }

    fn lookup_private(&self, _slot: &Slot<()>, gfn: Gfn) -> Lookup {
        instead().unwrap_or_else(|| self.find_private(gfn))
    }

    fn lookup_private_blocking(&self, _slot: &Slot<()>, gfn: Gfn) -> Lookup {
        self.find_private(gfn)
    }

    fn flush(&self, _request: &FlushRequest) {
        chaos::pause();
        if self.flaw != Some(Flaw::NoFlush) {
            self.tlb.track(|_| {});
        }
    }

    fn reload_roots(&self) -> bool {
        self.tlb.track(|_| {});
        true
    }
}

impl<P> Drop for SoakHost<P> {
    fn drop(&mut self) {
        // The MMU is gone and can give nothing back any more. Set once: a host is dropped once.
        let _ = self.left.set(self.frames.allocated());
    }
}

/// What the guest may know of the slot that comes and goes, in one word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Standing {
    /// Something is under way: either state may be seen.
    pub(super) changing: bool,
    pub(super) gone: bool,
    pub(super) read_only: bool,
    /// It is at its other place.
    pub(super) moved: bool,
}

/// Guest memory: where it is, whose, and of which half.
pub(super) struct Memory {
    /// All of it, the logged part first.
    pub(super) gfns: GfnRange,
    pub(super) logged: GfnRange,
    pub(super) homes: Homes,
    pub(super) private_level: Level,
    /// Host frame of the first guest frame where it is private.
    pub(super) private_first: Pfn,
    standing: Padded<AtomicU64>,
    /// Of each page: 0 while it is being converted, else what it is.
    halves: Vec<AtomicU64>,
    /// Held by who converts pages of a block.
    pub(super) converting: Vec<Mutex<()>>,
    /// Held by who changes the slot that comes and goes, or moves its pages.
    pub(super) coming: Mutex<()>,
}

impl Memory {
    pub(super) fn new(gfns: GfnRange, private_first: Pfn, plan: &Plan) -> Self {
        let blocks = gfns.pages() / BLOCK as u64;
        let start = if plan.confidential { 1 } else { 2 };
        Self {
            gfns,
            logged: GfnRange {
                start: gfns.start,
                end: Gfn(gfns.start.0 + blocks / 2 * BLOCK as u64),
            },
            homes: Homes::new(gfns),
            private_level: plan.private_level,
            private_first,
            standing: Padded::default(),
            halves: (0..gfns.pages()).map(|_| AtomicU64::new(start)).collect(),
            converting: (0..blocks).map(|_| Mutex::default()).collect(),
            coming: Mutex::default(),
        }
    }

    pub(super) fn private_home(&self, gfn: Gfn) -> Pfn {
        Pfn(self.private_first.0 + gfn.0.saturating_sub(self.gfns.start.0))
    }

    /// Where the slot that comes and goes is.
    pub(super) fn coming_at(&self, moved: bool) -> GfnRange {
        let by = if moved { OTHER_PLACE } else { 0 };
        GfnRange {
            start: Gfn(self.logged.end.0 + by),
            end: Gfn(self.gfns.end.0 + by),
        }
    }

    /// The guest frame of a page, as the slot that it is of stands.
    pub(super) fn at(&self, page: u64, moved: bool) -> Gfn {
        let gfn = Gfn(self.gfns.start.0 + page);
        if moved && gfn >= self.logged.end {
            Gfn(gfn.0 + OTHER_PLACE)
        } else {
            gfn
        }
    }

    /// The page of a guest frame, at whichever place, and whether that is the other place.
    pub(super) fn page(&self, gfn: Gfn) -> Option<(usize, bool)> {
        let moved = self.coming_at(true).contains(gfn);
        let main = if moved { Gfn(gfn.0 - OTHER_PLACE) } else { gfn };
        self.homes.page(main).map(|page| (page, moved))
    }

    /// Whether a host frame may be reached at a guest frame of the shared half.
    pub(super) fn is_owned(&self, pfn: Pfn, gfn: Gfn) -> bool {
        self.page(gfn)
            .is_some_and(|(page, _)| self.homes.is_owned(pfn, page))
    }

    pub(super) fn standing(&self) -> Standing {
        // Acquire: whoever reads that a change is over reads it after the change.
        let word = self.standing.0.load(Ordering::Acquire);
        Standing {
            changing: word & 1 != 0,
            gone: word & 2 != 0,
            read_only: word & 4 != 0,
            moved: word & 8 != 0,
        }
    }

    pub(super) fn stand(&self, standing: Standing) {
        let word = u64::from(standing.changing)
            | u64::from(standing.gone) << 1
            | u64::from(standing.read_only) << 2
            | u64::from(standing.moved) << 3;
        self.standing.0.store(word, Ordering::Release);
    }

    /// What a page is, if it is not being converted.
    pub(super) fn half(&self, page: usize) -> Option<Visibility> {
        match self.halves.get(page)?.load(Ordering::Acquire) {
            1 => Some(Visibility::Private),
            2 => Some(Visibility::Shared),
            _ => None,
        }
    }

    pub(super) fn set_half(&self, pages: std::ops::Range<u64>, half: Option<Visibility>) {
        let word = match half {
            None => 0,
            Some(Visibility::Private) => 1,
            Some(Visibility::Shared) => 2,
        };
        for page in pages {
            if let Some(half) = self.halves.get(page as usize) {
                half.store(word, Ordering::Release);
            }
        }
    }
}

/// What was found to be wrong: the first few in words.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    words: Mutex<Vec<String>>,
    count: AtomicU64,
}

impl Verdict {
    #[cold]
    pub(super) fn violation(&self, what: impl std::fmt::Display) {
        self.count.fetch_add(1, Ordering::Relaxed);
        let mut words = self.words.lock();
        if words.len() < 8 {
            words.push(what.to_string());
        }
    }

    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    pub(super) fn words(&self) -> Vec<String> {
        self.words.lock().clone()
    }
}

/// See the module.
pub(super) struct World<F: Format, P: Half> {
    pub(super) mmu: Mmu<F, SoakHost<P>>,
    pub(super) memory: Arc<Memory>,
    pub(super) module: Option<TdxModule>,
    pub(super) plan: Plan,
    pub(super) verdict: Verdict,
    pub(super) flaw: Option<Flaw>,
    /// A thread of the round has panicked: the others stop.
    pub(super) broken: AtomicBool,
}

impl<F: Format, P: Half> World<F, P> {
    /// Some pages from somewhere on: few, or whole blocks.
    pub(super) fn some_pages(&self, random: &mut Random) -> std::ops::Range<u64> {
        let pages = self.memory.gfns.pages();
        if random.once_in(3) {
            let blocks = pages / BLOCK as u64;
            let block = random.below(blocks);
            let count = 1 + random.below((blocks - block).min(3));
            block * BLOCK as u64..(block + count) * BLOCK as u64
        } else {
            let first = random.below(pages);
            first..(first + 1 + random.below(16)).min(pages)
        }
    }

    /// Guest frames of pages where they are now. Pages of both slots, one of which has moved, are those of the first.
    pub(super) fn gfns_of(&self, pages: &std::ops::Range<u64>) -> GfnRange {
        let moved = self.memory.standing().moved;
        let start = self.memory.at(pages.start, moved);
        let end = Gfn(self.memory.at(pages.end - 1, moved).0 + 1);
        let logged = self.memory.logged;
        if moved && logged.contains(start) && !logged.contains(Gfn(end.0 - 1)) {
            return GfnRange {
                start,
                end: logged.end,
            };
        }
        GfnRange { start, end }
    }
}
