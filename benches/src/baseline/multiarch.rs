//! The crate `page_table_multiarch` as one would take it for second-level tables: `X64PageTable` under a `parking_lot`
//! mutex.
//!
//! Its entries are those of ordinary long-mode paging, which are also NPT's; it has four levels. The crate asks for
//! frames through functions without a receiver, so they come from one list for the whole process. It maps and does
//! nothing else.

use super::host::Backing;
use super::tree::{Arena, Stuck};
use super::{FOUR, Setup};
use crate::race::{Contender, Translation};
use crate::report::Error;
use memory_addr::{PhysAddr, VirtAddr};
use page_table_multiarch::x86_64::X64PageTable;
use page_table_multiarch::{MappingFlags, PageSize, PagingError, PagingHandler};
use parking_lot::Mutex;
use tdp_arch::{Gfn, Level, Pfn};

/// Free frames, by address: what is not in a table now. They are never given back to the system.
static FREE: Mutex<Vec<usize>> = Mutex::new(Vec::new());

/// Frames from [`FREE`]; frame and pointer are the same number.
struct Frames;

impl Frames {
    /// Adds the pages of `arena`, the first to be taken first.
    fn add(arena: Arena) {
        let arena = Box::leak(Box::new(arena));
        let mut pages: Vec<_> = std::iter::from_fn(|| arena.take_zeroed())
            .map(|page| page.as_ptr().expose_provenance())
            .collect();
        pages.reverse();
        FREE.lock().append(&mut pages);
    }
}

impl PagingHandler for Frames {
    fn alloc_frames(num: usize, _align: usize) -> Option<PhysAddr> {
        // The crate takes tables one by one and fills them with zeroes itself.
        if num == 1 {
            FREE.lock().pop().map(PhysAddr::from)
        } else {
            None
        }
    }

    fn dealloc_frames(paddr: PhysAddr, _num: usize) {
        FREE.lock().push(paddr.into());
    }

    #[inline(always)]
    fn phys_to_virt(paddr: PhysAddr) -> VirtAddr {
        VirtAddr::from(usize::from(paddr))
    }
}

/// See the module.
pub struct MultiArch {
    table: Mutex<X64PageTable<Frames>>,
    backing: Backing,
    size: PageSize,
}

const FLAGS: MappingFlags = MappingFlags::READ
    .union(MappingFlags::WRITE)
    .union(MappingFlags::EXECUTE)
    .union(MappingFlags::USER);

fn stuck(error: PagingError, gfn: Gfn) -> Stuck {
    match error {
        PagingError::NoMemory => Stuck::OutOfTables,
        _ => Stuck::InTheWay(gfn),
    }
}

fn address(gfn: Gfn) -> VirtAddr {
    VirtAddr::from((gfn.0 << 12) as usize)
}

impl MultiArch {
    /// An empty table.
    ///
    /// # Errors
    ///
    /// If the memory is not there.
    pub fn new(setup: &Setup) -> Result<Self, Error> {
        Frames::add(setup.arena(FOUR)?);
        let table = X64PageTable::try_new().map_err(|e| stuck(e, setup.backing.gfns.start))?;
        let size = match setup.backing.level {
            Level::L1 => PageSize::Size4K,
            Level::L2 => PageSize::Size2M,
            _ => PageSize::Size1G,
        };
        Ok(Self {
            table: Mutex::new(table),
            backing: setup.backing,
            size,
        })
    }
}

impl Contender for MultiArch {
    type Worker = ();
    type Failure = Stuck;

    fn worker(&self) -> Result<(), Error> {
        Ok(())
    }

    #[inline(always)]
    fn resolve(&self, (): &mut (), gfn: Gfn) -> Result<(), Stuck> {
        let target = PhysAddr::from((self.backing.pfn_of(gfn).0 << 12) as usize);
        match self
            .table
            .lock()
            .cursor()
            .map(address(gfn), target, self.size, FLAGS)
        {
            Ok(()) | Err(PagingError::AlreadyMapped) => Ok(()),
            Err(error) => Err(stuck(error, gfn)),
        }
    }

    fn reset(&mut self) -> Result<(), Error> {
        let table = self.table.get_mut();
        let mut cursor = table.cursor();
        for gfn in self.backing.pages() {
            // What is not mapped needs no unmapping.
            let _ = cursor.unmap(address(gfn));
        }
        Ok(())
    }

    fn translate(&self, gfn: Gfn) -> Option<Translation> {
        let (paddr, flags, size) = self.table.lock().query(address(gfn)).ok()?;
        let level = match size {
            PageSize::Size4K => Level::L1,
            PageSize::Size2M => Level::L2,
            _ => Level::L3,
        };
        Some(Translation {
            pfn: Pfn(usize::from(paddr) as u64 >> 12),
            level,
            permitted: flags == FLAGS,
        })
    }
}
