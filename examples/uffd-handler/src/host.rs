//! What the library asks of a page-fault handler: frames for tables, and which page of the snapshot belongs where.
//!
//! Protocol. All of the VMM's memory is *private*: the kernel's table holds it. What was given up is *shared* from then on:
//! it reads zero. The shared half maps nothing.

use crate::protocol::Region;
use crate::table::{KernelTable, frame};
use tdp::{Access, Level};
use tdp::{
    AddressSpaceId, Ept, FlushRequest, Gfn, GfnRange, Host, Lookup, Mapping, MmapPool, Mmu, Perms,
    Pfn, PoolConfig, Slot, Visibility,
};

/// The one address space.
pub(crate) const SPACE: AddressSpaceId = AddressSpaceId(0);

/// What backs a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Page of the snapshot that belongs to the region's first page.
    pub first: Pfn,
    /// Its pages.
    pub level: Level,
}

/// The handler's side of the MMU.
pub struct UffdHost {
    frames: MmapPool,
    table: KernelTable,
}

/// The MMU that the workers share.
pub type PageStates = Mmu<Ept, UffdHost>;

impl Host for UffdHost {
    type Frames = MmapPool;
    type Backing = Backing;
    type Protected = KernelTable;

    #[inline(always)]
    fn frames(&self) -> &MmapPool {
        &self.frames
    }

    #[inline(always)]
    fn protected(&self) -> &KernelTable {
        &self.table
    }

    fn lookup(&self, _: &Slot<Backing>, _: Gfn, _: Access) -> Lookup {
        Lookup::Failed
    }

    #[inline(always)]
    fn lookup_private(&self, slot: &Slot<Backing>, gfn: Gfn) -> Lookup {
        let Backing { first, level } = *slot.backing();
        let pfn = Pfn(first.0.wrapping_add(slot.offset(gfn)));
        Lookup::Mapped(Mapping::memory(pfn, level, Perms::RWX))
    }

    fn flush(&self, _: &FlushRequest) {
        // No processor walks these tables.
    }
}

/// The level whose leaves are one page of so many bytes.
pub(crate) const fn level_of(page_size: u64) -> Level {
    match page_size {
        0x20_0000 => Level::L2,
        0x4000_0000 => Level::L3,
        _ => Level::L1,
    }
}

/// Pages from `start` to `end`, in bytes; a page that lies there in part is among them.
pub(crate) fn frames(start: u64, end: u64) -> GfnRange {
    let end = Gfn(end.div_ceil(4096));
    GfnRange {
        start: frame(start),
        end,
    }
}

/// Makes the MMU for the regions of a VMM.
///
/// # Errors
///
/// The library's, as text: no memory for tables, regions that overlap.
pub(crate) fn page_states(table: KernelTable, regions: &[Region]) -> Result<PageStates, String> {
    // Tables for everything, and as many again for what is moved about; what is not used takes no memory.
    let bytes: u64 = regions.iter().map(|region| region.size).sum();
    let tables = 2 * (bytes >> 21) + 64 * regions.len() as u64 + 4096;
    let pool = MmapPool::new(PoolConfig {
        frames: tables as usize,
        base: Pfn(0x1000),
        huge_pages: false,
    })
    .map_err(|error| error.to_string())?;
    let host = UffdHost {
        frames: pool,
        table,
    };
    let mmu = PageStates::builder(host)
        .private_by_fault()
        .default_visibility(Visibility::Private)
        .physical_bits(52)
        .build()
        .map_err(|error| error.to_string())?;
    for region in regions {
        let start = region.base_host_virt_addr;
        let backing = Backing {
            first: Pfn(region.offset >> 12),
            level: level_of(region.page_size),
        };
        mmu.slots()
            .insert(Slot::new(frames(start, region.end()), backing))
            .map_err(|error| error.to_string())?;
        for removed in &region.removed {
            let from = start + removed.start;
            if removed.len > 0 {
                mmu.convert(SPACE, frames(from, from + removed.len), Visibility::Shared)
                    .map_err(|error| error.to_string())?;
            }
        }
    }
    mmu.build_private()
        .and_then(|mut image| image.finalise())
        .map_err(|error| error.to_string())?;
    Ok(mmu)
}
