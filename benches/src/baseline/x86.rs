//! The crate `x86_64` as one would take it for second-level tables: `MappedPageTable` under a `parking_lot` mutex.
//!
//! Its entries are those of ordinary long-mode paging, which are also NPT's; it has four levels. Frame and pointer are
//! the same number here, the cheapest translation there is (`OffsetPageTable` is slower). It maps and does nothing else.

// UNSAFETY: the crate's constructor and `map_to` are unsafe.
#![allow(unsafe_code)]

use super::host::Backing;
use super::tree::{Arena, Stuck};
use super::{FOUR, Setup};
use crate::race::{Contender, Translation};
use crate::report::Error;
use parking_lot::Mutex;
use std::ptr::NonNull;
use tdp_arch::{Gfn, Level, Pfn};
use x86_64::structures::paging::mapper::{
    MapToError, MappedFrame, MappedPageTable, Mapper, PageTableFrameMapping, Translate,
    TranslateResult,
};
use x86_64::structures::paging::{
    FrameAllocator, Page, PageSize, PageTable, PageTableFlags, PhysFrame, Size1GiB, Size2MiB,
    Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

/// Physical addresses are addresses of this process.
#[derive(Debug)]
struct Identity;

// SAFETY: every frame in the tables came from `Frames`, whose numbers are addresses of pages in its arena.
unsafe impl PageTableFrameMapping for Identity {
    #[inline(always)]
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        std::ptr::with_exposed_provenance_mut(frame.start_address().as_u64() as usize)
    }
}

/// Table memory.
#[derive(Debug)]
struct Frames(Arena);

// SAFETY: the arena hands every page out once.
unsafe impl FrameAllocator<Size4KiB> for Frames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let page = self.0.take_zeroed()?;
        Some(PhysFrame::containing_address(PhysAddr::new_truncate(
            page.as_ptr().expose_provenance() as u64,
        )))
    }
}

/// What the lock protects. The mapper's tables lie in `frames`, which is dropped after it.
#[derive(Debug)]
struct State {
    mapper: MappedPageTable<'static, Identity>,
    frames: Frames,
}

/// See the module.
#[derive(Debug)]
pub struct X86 {
    state: Mutex<State>,
    backing: Backing,
}

const FLAGS: PageTableFlags = PageTableFlags::PRESENT
    .union(PageTableFlags::WRITABLE)
    .union(PageTableFlags::USER_ACCESSIBLE);

impl X86 {
    /// An empty table.
    ///
    /// # Errors
    ///
    /// If the memory is not there.
    pub fn new(setup: &Setup) -> Result<Self, Error> {
        let frames = Frames(setup.arena(FOUR)?);
        let root: NonNull<PageTable> = frames.0.take_zeroed().ok_or(Stuck::OutOfTables)?.cast();
        // SAFETY: a zeroed page is an empty table; it is borrowed by the mapper alone, which `State` drops before the
        // arena. `Identity` is the mapping that `Frames` uses.
        let mapper = unsafe { MappedPageTable::new(&mut *root.as_ptr(), Identity) };
        Ok(Self {
            state: Mutex::new(State { mapper, frames }),
            backing: setup.backing,
        })
    }
}

#[inline(always)]
fn address(gfn: Gfn) -> VirtAddr {
    VirtAddr::new_truncate(gfn.0 << 12)
}

impl State {
    #[inline(always)]
    fn map<S: PageSize>(&mut self, gfn: Gfn, pfn: Pfn) -> Result<(), Stuck>
    where
        MappedPageTable<'static, Identity>: Mapper<S>,
    {
        let page = Page::<S>::containing_address(address(gfn));
        let frame = PhysFrame::containing_address(PhysAddr::new_truncate(pfn.0 << 12));
        // SAFETY: nothing is ever accessed through these tables.
        match unsafe { self.mapper.map_to(page, frame, FLAGS, &mut self.frames) } {
            Ok(flush) => flush.ignore(),
            Err(MapToError::PageAlreadyMapped(_)) => {}
            Err(MapToError::FrameAllocationFailed) => return Err(Stuck::OutOfTables),
            Err(MapToError::ParentEntryHugePage) => return Err(Stuck::InTheWay(gfn)),
        }
        Ok(())
    }

    fn unmap<S: PageSize>(&mut self, gfn: Gfn)
    where
        MappedPageTable<'static, Identity>: Mapper<S>,
    {
        if let Ok((_, flush)) = self
            .mapper
            .unmap(Page::<S>::containing_address(address(gfn)))
        {
            flush.ignore();
        }
    }
}

impl Contender for X86 {
    type Worker = ();
    type Failure = Stuck;

    fn worker(&self) -> Result<(), Error> {
        Ok(())
    }

    #[inline(always)]
    fn resolve(&self, (): &mut (), gfn: Gfn) -> Result<(), Stuck> {
        let pfn = self.backing.pfn_of(gfn);
        let mut state = self.state.lock();
        match self.backing.level {
            Level::L1 => state.map::<Size4KiB>(gfn, pfn),
            Level::L2 => state.map::<Size2MiB>(gfn, pfn),
            _ => state.map::<Size1GiB>(gfn, pfn),
        }
    }

    fn reset(&mut self) -> Result<(), Error> {
        let state = self.state.get_mut();
        for gfn in self.backing.pages() {
            match self.backing.level {
                Level::L1 => state.unmap::<Size4KiB>(gfn),
                Level::L2 => state.unmap::<Size2MiB>(gfn),
                _ => state.unmap::<Size1GiB>(gfn),
            }
        }
        Ok(())
    }

    fn translate(&self, gfn: Gfn) -> Option<Translation> {
        let TranslateResult::Mapped {
            frame,
            offset,
            flags,
        } = self.state.lock().mapper.translate(address(gfn))
        else {
            return None;
        };
        let level = match frame {
            MappedFrame::Size4KiB(_) => Level::L1,
            MappedFrame::Size2MiB(_) => Level::L2,
            MappedFrame::Size1GiB(_) => Level::L3,
        };
        let pfn = Pfn((frame.start_address().as_u64() + offset) >> 12);
        let permitted = flags.contains(FLAGS) && !flags.contains(PageTableFlags::NO_EXECUTE);
        Some(Translation {
            pfn,
            level,
            permitted,
        })
    }
}
