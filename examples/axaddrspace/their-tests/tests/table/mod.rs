//! Our nested page table by the name and with the bookkeeping that the tests of `axaddrspace` expect: each frame taken or given
//! back is counted in their counters, tables included. Guest memory is theirs; tables have a pool of their own, because theirs
//! has sixteen frames and never gives one out twice.

use crate::test_utils::{
    ALLOC_COUNT, ALLOC_SHOULD_FAIL, BASE_PADDR, DEALLOC_COUNT, MEMORY_LEN, MockHal, NEXT_PADDR,
};
use ax_memory_addr::{PhysAddr, VirtAddr};
use axaddrspace::{AddrSpaceResult, MappingFlags, NestedPageTableOps, PageSize};
use axvm_types::GuestPhysAddr;
use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::Ordering;
use tdp::protected::Unprotected;
use tdp::{
    Access, FlushRequest, FrameSource, Gfn, Host, Lookup, MmapPool, Mmu, Npt, OutOfFrames, Pfn, PoolConfig, Slot,
    TablePage,
};
use tdp_axaddrspace::{GuestMemory, NestedTable};

struct CountedPool(MmapPool);

// SAFETY: as of the pool, which answers every call.
unsafe impl FrameSource for CountedPool {
    fn window(&self) -> Range<Pfn> {
        self.0.window()
    }

    fn allocate(&self, out: &mut [Pfn]) -> Result<usize, OutOfFrames> {
        let count = self.0.allocate(out)?;
        ALLOC_COUNT.fetch_add(count, Ordering::SeqCst);
        Ok(count)
    }

    fn free(&self, frames: &[Pfn]) {
        DEALLOC_COUNT.fetch_add(frames.len(), Ordering::SeqCst);
        self.0.free(frames);
    }

    fn page(&self, pfn: Pfn) -> NonNull<TablePage> {
        self.0.page(pfn)
    }
}

struct TestHost(CountedPool);

impl Host for TestHost {
    type Frames = CountedPool;
    type Backing = ();
    type Protected = Unprotected;

    fn frames(&self) -> &CountedPool {
        &self.0
    }

    fn protected(&self) -> &Unprotected {
        &Unprotected
    }

    fn lookup(&self, _slot: &Slot<()>, _gfn: Gfn, _access: Access) -> Lookup {
        Lookup::Failed
    }

    fn flush(&self, _request: &FlushRequest) {}
}

struct TheirMemory;

impl GuestMemory for TheirMemory {
    fn alloc_frame(&self) -> Option<PhysAddr> {
        if ALLOC_SHOULD_FAIL.load(Ordering::SeqCst) {
            return None;
        }
        let frame = NEXT_PADDR.fetch_add(0x1000, Ordering::SeqCst);
        if frame >= BASE_PADDR + MEMORY_LEN {
            return None;
        }
        ALLOC_COUNT.fetch_add(1, Ordering::SeqCst);
        Some(PhysAddr::from_usize(frame))
    }

    fn dealloc_frame(&self, _frame: PhysAddr) {
        DEALLOC_COUNT.fetch_add(1, Ordering::SeqCst);
    }

    fn phys_to_virt(&self, address: PhysAddr) -> VirtAddr {
        MockHal::mock_phys_to_virt(address)
    }
}

/// What their tests make.
pub struct MockNestedPageTable(NestedTable<Npt, TestHost, TheirMemory>);

impl MockNestedPageTable {
    /// An empty one.
    pub fn new() -> Self {
        let frames = MmapPool::new(PoolConfig {
            frames: 64,
            base: Pfn(0x1000),
            huge_pages: false,
        });
        let mmu = Mmu::builder(TestHost(CountedPool(frames.unwrap()))).build().unwrap();
        Self(NestedTable::new(mmu, TheirMemory).unwrap())
    }
}

impl NestedPageTableOps for MockNestedPageTable {
    fn root_paddr(&self) -> PhysAddr {
        self.0.root_paddr()
    }

    fn levels(&self) -> usize {
        self.0.levels()
    }

    fn alloc_frame(&self) -> Option<PhysAddr> {
        self.0.alloc_frame()
    }

    fn dealloc_frame(&self, paddr: PhysAddr) {
        self.0.dealloc_frame(paddr);
    }

    fn phys_to_virt(&self, paddr: PhysAddr) -> VirtAddr {
        self.0.phys_to_virt(paddr)
    }

    fn map(&mut self, vaddr: GuestPhysAddr, paddr: PhysAddr, size: PageSize, flags: MappingFlags) -> AddrSpaceResult {
        self.0.map(vaddr, paddr, size, flags)
    }

    fn unmap(&mut self, vaddr: GuestPhysAddr) -> AddrSpaceResult<(PhysAddr, MappingFlags, PageSize)> {
        self.0.unmap(vaddr)
    }

    fn map_linear(
        &mut self,
        vaddr: GuestPhysAddr,
        paddr: PhysAddr,
        size: usize,
        flags: MappingFlags,
        allow_huge: bool,
    ) -> AddrSpaceResult {
        self.0.map_linear(vaddr, paddr, size, flags, allow_huge)
    }

    fn unmap_region(&mut self, start: GuestPhysAddr, size: usize) -> AddrSpaceResult {
        self.0.unmap_region(start, size)
    }

    fn remap(&mut self, start: GuestPhysAddr, paddr: PhysAddr, flags: MappingFlags) -> bool {
        self.0.remap(start, paddr, flags)
    }

    fn protect_region(&mut self, start: GuestPhysAddr, size: usize, new_flags: MappingFlags) -> bool {
        self.0.protect_region(start, size, new_flags)
    }

    fn query(&self, vaddr: GuestPhysAddr) -> AddrSpaceResult<(PhysAddr, MappingFlags, PageSize)> {
        self.0.query(vaddr)
    }
}
