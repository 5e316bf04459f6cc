//! The nested page table by itself, and under axvisor's address space.

use ax_memory_addr::{PhysAddr, VirtAddr};
use axaddrspace::{AddrSpace, AddrSpaceError, MappingFlags, NestedPageTableOps, PageSize};
use axvm_types::GuestPhysAddr;
use std::cell::RefCell;
use tdp::{Ept, Format, MmapPool, Mmu, Npt, Pfn, PoolConfig, SoftwareHost};
use tdp_axaddrspace::{GuestMemory, NestedTable};

/// Frames that are only numbers.
#[derive(Debug, Default)]
struct Numbers {
    out: RefCell<Vec<usize>>,
    next: RefCell<usize>,
}

impl GuestMemory for Numbers {
    fn alloc_frame(&self) -> Option<PhysAddr> {
        *self.next.borrow_mut() += 1;
        let frame = 0x8000_0000 + (*self.next.borrow() << 12);
        self.out.borrow_mut().push(frame);
        Some(PhysAddr::from_usize(frame))
    }

    fn dealloc_frame(&self, frame: PhysAddr) {
        self.out.borrow_mut().retain(|&out| out != frame.as_usize());
    }

    fn phys_to_virt(&self, address: PhysAddr) -> VirtAddr {
        VirtAddr::from_usize(address.as_usize())
    }
}

type Table<F> = NestedTable<F, SoftwareHost, Numbers>;

fn table<F: Format>() -> Table<F> {
    let frames = MmapPool::new(PoolConfig {
        frames: 128,
        base: Pfn(0x1000),
        huge_pages: false,
    });
    let mmu = Mmu::builder(SoftwareHost::new(frames.unwrap()))
        .build()
        .unwrap();
    NestedTable::new(mmu, Numbers::default()).unwrap()
}

const GPA: GuestPhysAddr = GuestPhysAddr::from_usize(0x4000_0000);
const HPA: PhysAddr = PhysAddr::from_usize(0x1_4000_0000);
const RW: MappingFlags = MappingFlags::READ.union(MappingFlags::WRITE);
const M2: usize = 2 << 20;

fn maps_what_it_is_told<F: Format>() {
    let mut table = table::<F>();
    assert_eq!(table.levels(), 4);
    assert_ne!(table.root_paddr().as_usize(), 0);
    assert_eq!(
        table.query(GPA),
        Err(AddrSpaceError::Unmapped { address: GPA })
    );
    for (size, step) in [
        (PageSize::Size4K, 0x1000),
        (PageSize::Size2M, M2),
        (PageSize::Size1G, 1 << 30),
    ] {
        table.map(GPA, HPA, size, RW).unwrap();
        let last = GPA + (step - 8);
        assert_eq!(table.query(last), Ok((HPA + (step - 8), RW, size)));
        assert_eq!(
            table.map(GPA, HPA, PageSize::Size4K, RW),
            Err(AddrSpaceError::MappingConflict)
        );
        assert_eq!(table.unmap(GPA), Ok((HPA, RW, size)));
        assert_eq!(
            table.unmap(GPA),
            Err(AddrSpaceError::Unmapped { address: GPA })
        );
    }
    assert!(matches!(
        table.map(GPA + 0x1000, HPA, PageSize::Size2M, RW),
        Err(AddrSpaceError::Unaligned { .. })
    ));
    assert_eq!(
        table.map(GPA, HPA, PageSize::Size1M, RW),
        Err(AddrSpaceError::InvalidMapping)
    );
    assert_eq!(
        table.map(GPA, HPA, PageSize::Size4K, MappingFlags::empty()),
        Err(AddrSpaceError::InvalidMapping)
    );
}

fn says_what_is_a_device<F: Format>() {
    let mut table = table::<F>();
    let device = RW | MappingFlags::DEVICE;
    for size in [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G] {
        table.map(GPA, HPA, size, device).unwrap();
        assert_eq!(table.query(GPA), Ok((HPA, device, size)));
        // A part of it is no other device.
        if size == PageSize::Size2M {
            table.unmap_region(GPA + 0x1000, 0x1000).unwrap();
            assert_eq!(table.query(GPA), Ok((HPA, device, PageSize::Size4K)));
            assert!(table.protect_region(GPA, 0x1000, RW));
            assert_eq!(table.query(GPA), Ok((HPA, RW, PageSize::Size4K)));
        }
        table.unmap_region(GPA, 1 << 30).unwrap();
    }
}

fn what_cannot_be_mapped_takes_nothing_away<F: Format>() {
    let mut table = table::<F>();
    table.map(GPA, HPA, PageSize::Size2M, RW).unwrap();
    assert!(!table.remap(GPA, HPA, MappingFlags::empty()));
    assert!(!table.remap(GPA, HPA + 0x123, RW));
    assert!(!table.protect_region(GPA, M2, MappingFlags::empty()));
    assert_eq!(table.query(GPA), Ok((HPA, RW, PageSize::Size2M)));
}

fn maps_ranges_by_large_blocks_and_changes_parts_of_them<F: Format>() {
    let mut table = table::<F>();
    let size = 2 * M2 + 0x3000;
    table.map_linear(GPA, HPA, size, RW, true).unwrap();
    assert_eq!(table.mmu().stats().pages, [3, 2, 0]);
    assert_eq!(
        table.map_linear(GPA + M2, HPA, M2, RW, true),
        Err(AddrSpaceError::MappingConflict)
    );

    // A page in the middle of a block gets another frame, the rest stays.
    let at = GPA + 0x7123;
    assert!(table.remap(at, PhysAddr::from_usize(0x9000), RW));
    assert_eq!(
        table.query(at),
        Ok((PhysAddr::from_usize(0x9123), RW, PageSize::Size4K))
    );
    assert_eq!(table.translate(GPA + 0x6000), Some(HPA + 0x6000));
    assert_eq!(table.translate(GPA + 0x8000), Some(HPA + 0x8000));

    // Permissions of a range that begins and ends inside blocks.
    assert!(table.protect_region(GPA + (M2 - 0x1000), 0x3000, MappingFlags::READ));
    let flags = |offset: usize| table.query(GPA + offset).map(|(_, flags, _)| flags);
    assert_eq!(flags(M2 - 0x2000), Ok(RW));
    for offset in [M2 - 0x1000, M2, M2 + 0x1000] {
        assert_eq!(flags(offset), Ok(MappingFlags::READ));
        assert_eq!(table.translate(GPA + offset), Some(HPA + offset));
    }
    assert_eq!(flags(M2 + 0x2000), Ok(RW));

    // And the same for taking it away.
    table.unmap_region(GPA + 0x1000, 0x1000).unwrap();
    assert_eq!(table.translate(GPA + 0x1000), None);
    assert_eq!(table.translate(GPA + 0x2000), Some(HPA + 0x2000));
    table.unmap_region(GPA, size).unwrap();
    assert_eq!(table.mmu().stats().pages, [0, 0, 0]);

    // What was small before can be large again.
    table.map_linear(GPA, HPA, M2, RW, true).unwrap();
    assert_eq!(table.query(GPA), Ok((HPA, RW, PageSize::Size2M)));
}

fn a_range_that_cannot_be_mapped_whole_is_not_mapped_at_all<F: Format>() {
    let mut table = table::<F>();
    // More tables than there are frames.
    let size = 256 * M2;
    assert_eq!(
        table.map_linear(GPA, HPA, size, RW, false),
        Err(AddrSpaceError::MappingState)
    );
    assert_eq!(table.mmu().stats().pages, [0, 0, 0]);
    table.mmu().synchronize();
    table.map_linear(GPA, HPA, 8 * M2, RW, false).unwrap();
}

fn an_address_space_sits_on_it<F: Format>() {
    let mut space = AddrSpace::new_empty(table::<F>(), GPA, 1 << 30).unwrap();
    space.map_linear(GPA, HPA, M2, RW).unwrap();
    space.map_alloc(GPA + M2, 0x4000, RW, false).unwrap();
    assert!(!space.handle_page_fault(GPA + M2, MappingFlags::EXECUTE));
    for offset in [0, 0x1008] {
        assert!(space.handle_page_fault(GPA + (M2 + offset), MappingFlags::WRITE));
    }
    assert!(space.translate(GPA + M2).is_some());
    assert_eq!(space.translate(GPA + (M2 + 0x2000)), None);
    space.unmap(GPA + M2, 0x4000).unwrap();
    assert_eq!(space.translate(GPA + M2), None);
    assert_eq!(space.translate(GPA + 8), Some(HPA + 8));
    space.clear();
    let table = space.page_table();
    assert_eq!(table.mmu().stats().pages, [0, 0, 0]);
    let audit = table.mmu().audit();
    assert_eq!((audit.misplaced, audit.unknown), (0, 0));
}

macro_rules! for_each_format {
    ($($name:ident),+) => {
        $(mod $name {
            #[test]
            fn ept() {
                super::$name::<super::Ept>();
            }
            #[test]
            fn npt() {
                super::$name::<super::Npt>();
            }
        })+
    };
}

for_each_format!(
    maps_what_it_is_told,
    says_what_is_a_device,
    what_cannot_be_mapped_takes_nothing_away,
    maps_ranges_by_large_blocks_and_changes_parts_of_them,
    a_range_that_cannot_be_mapped_whole_is_not_mapped_at_all,
    an_address_space_sits_on_it
);
