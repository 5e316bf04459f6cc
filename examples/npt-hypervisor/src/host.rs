//! The embedder's side of the MMU: what backs guest memory, and how translations are flushed on other processors.
//!
//! Protocol of flushing. What has to be flushed is noted for every vCPU, then the tracker's epoch moves, the processors that
//! are inside a guest are interrupted, and the flush is over when each has left. A vCPU that enters and learns that the epoch
//! moved takes its notes and does what they say ([`Way`]). A vCPU may take a note before the epoch moves: the entry had
//! changed by then, so what it caches after is the new one.
//!
//! Protocol of backing. Each frame of a [`Backing::Pages`] slot has a place that says which host frame it has. A frame that
//! has none yet gets one outside the critical section, by compare-exchange: of two vCPUs that both make one, the later gives
//! its own back. The host moves a page between `invalidate_begin` and `end` only.

use crate::memory::{GuestFrames, TableFrames, clear};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use machine::local_apic;
use spin::Mutex;
use tdp::protected::Unprotected;
use tdp::{
    Access, FlushRequest, Gfn, GfnRange, Host, Level, Lookup, Mapping, Perms, Pfn, Slot, TlbTracker,
};

/// How a vCPU carries a flush out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Way {
    /// By the control block: all that the guest's identifier has.
    Guest,
    /// By taking an identifier that this processor has not used since it last flushed everything.
    NewAsid,
    /// Page by page, by `INVLPGA`, where no table went away and the pages are few. The instruction takes guest-linear
    /// addresses, of which this host knows that they are the guest-physical ones.
    Pages,
}

impl Way {
    /// All of them.
    pub const ALL: [Way; 3] = [Way::Guest, Way::NewAsid, Way::Pages];
}

/// What a vCPU has to flush before it enters its guest.
#[derive(Clone, Debug, Default)]
pub enum Notes {
    /// Nothing.
    #[default]
    Nothing,
    /// These pages.
    Pages(Vec<Gfn>),
    /// Everything of the guest.
    Everything,
}

impl Notes {
    /// Pages beyond which a flush of everything is cheaper.
    const FEW: u64 = 16;

    fn add(&mut self, request: &FlushRequest) {
        let known = match self {
            Notes::Nothing => 0,
            Notes::Pages(pages) => pages.len() as u64,
            Notes::Everything => return,
        };
        let GfnRange { start, end } = request.range;
        if request.tables || known + request.range.pages() > Self::FEW {
            *self = Notes::Everything;
            return;
        }
        if known == 0 {
            *self = Notes::Pages(Vec::new());
        }
        if let Notes::Pages(pages) = self {
            pages.extend((start.0..end.0).map(Gfn));
        }
    }
}

/// What the host keeps of one vCPU.
struct Place {
    /// Interrupt controller of the processor that it runs on.
    apic_id: u8,
    notes: Mutex<Notes>,
}

/// What backs a slot.
#[derive(Clone, Copy, Debug)]
pub enum Backing {
    /// Frames one by one, which the host may move.
    Pages,
    /// Consecutive frames from this one on, by leaves of up to 2 MiB.
    Block(Pfn),
}

/// The host of one guest.
pub struct BareHost {
    tables: TableFrames,
    /// Frames that guests' memory is made of.
    pub frames: GuestFrames,
    /// Host frame plus one of each frame of the paged slot; 0: none yet.
    pages: Vec<AtomicU64>,
    /// Who is inside the guest.
    pub tracker: TlbTracker,
    places: Vec<Place>,
    way: AtomicU8,
    /// Whether processors inside the guest are interrupted and waited for. Without it the library is lied to.
    kick: bool,
    /// Vcpus leave the guest and wait.
    pub pause: AtomicBool,
    /// Interrupts sent.
    pub kicks: AtomicU64,
}

impl BareHost {
    /// A host whose paged slot begins at guest frame 0 and has `pages` frames, for vCPUs on the processors with these
    /// controllers, in the order in which they register with the tracker.
    pub fn new(
        frames: GuestFrames,
        pages: u64,
        apic_ids: impl Iterator<Item = u8>,
        kick: bool,
    ) -> Self {
        Self {
            tables: TableFrames::new(),
            frames,
            pages: (0..pages).map(|_| AtomicU64::new(0)).collect(),
            tracker: TlbTracker::new(),
            places: apic_ids
                .map(|apic_id| Place {
                    apic_id,
                    notes: Mutex::default(),
                })
                .collect(),
            way: AtomicU8::new(Way::Guest as u8),
            kick,
            pause: AtomicBool::new(false),
            kicks: AtomicU64::new(0),
        }
    }

    /// The frame that backs `gfn` of the paged slot.
    pub fn page(&self, gfn: Gfn) -> Option<Pfn> {
        let page = self.pages.get(gfn.0 as usize)?.load(Ordering::Acquire);
        page.checked_sub(1).map(Pfn)
    }

    /// Gives `gfn` of the paged slot a frame of zeros if it has none.
    pub fn supply(&self, gfn: Gfn) -> Option<Pfn> {
        let place = self.pages.get(gfn.0 as usize)?;
        if let Some(pfn) = self.page(gfn) {
            return Some(pfn);
        }
        let pfn = self.frames.take();
        clear(pfn);
        match place.compare_exchange(0, pfn.0 + 1, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Some(pfn),
            Err(winner) => {
                self.frames.give_back(pfn);
                Some(Pfn(winner - 1))
            }
        }
    }

    /// Has `gfn` backed by `pfn` from now on. The frame is being invalidated.
    pub fn set_page(&self, gfn: Gfn, pfn: Pfn) {
        self.pages[gfn.0 as usize].store(pfn.0 + 1, Ordering::Release);
    }

    /// How flushes are carried out.
    pub fn way(&self) -> Way {
        Way::ALL[usize::from(self.way.load(Ordering::Relaxed)) % Way::ALL.len()]
    }

    /// Has flushes carried out so from now on.
    pub fn set_way(&self, way: Way) {
        self.way.store(way as u8, Ordering::Relaxed);
    }

    /// What vCPU `number` has to flush.
    pub fn take_notes(&self, number: usize) -> Notes {
        core::mem::take(&mut *self.places[number].notes.lock())
    }

    /// Makes every vCPU leave the guest and returns when each has.
    pub fn expel(&self) {
        self.tracker.track(|number| {
            self.kicks.fetch_add(1, Ordering::Relaxed);
            local_apic::kick(self.places[number].apic_id);
        });
    }

    /// Table frames that are out.
    pub fn table_frames(&self) -> usize {
        self.tables.allocated()
    }
}

impl Host for BareHost {
    type Frames = TableFrames;
    type Backing = Backing;
    type Protected = Unprotected;

    fn frames(&self) -> &TableFrames {
        &self.tables
    }

    fn protected(&self) -> &Unprotected {
        &Unprotected
    }

    fn lookup(&self, slot: &Slot<Backing>, gfn: Gfn, _access: Access) -> Lookup {
        let (pfn, level) = match slot.backing() {
            Backing::Pages => match self.page(gfn) {
                Some(pfn) => (pfn, Level::L1),
                None => return Lookup::Blocking,
            },
            Backing::Block(first) => (Pfn(first.0 + slot.offset(gfn)), Level::L2),
        };
        Lookup::Mapped(Mapping::memory(pfn, level, Perms::RWX))
    }

    fn lookup_blocking(&self, _slot: &Slot<Backing>, gfn: Gfn, _access: Access) -> Lookup {
        match self.supply(gfn) {
            Some(pfn) => Lookup::Mapped(Mapping::memory(pfn, Level::L1, Perms::RWX)),
            None => Lookup::Failed,
        }
    }

    fn flush(&self, request: &FlushRequest) {
        for place in &self.places {
            place.notes.lock().add(request);
        }
        if self.kick {
            self.expel();
        }
    }
}
