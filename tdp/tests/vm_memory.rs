//! The dirty log as the bitmap of a `vm-memory` region: what the VMM writes by way of guest memory is logged beside what
//! the guest writes. And slots from guest memory.

use tdp::{
    AddressSpaceId, Ept, Fault, Gfn, Gpa, GuestMemoryError, Level, LinearBacking, MmapPool, Mmu,
    Outcome, Pfn, PoolConfig, Slot, SlotBitmap, SlotError, SlotFlags, SoftwareHost,
};
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const START: u64 = 1 << 30;
const PAGES: u64 = 300;

#[test]
fn writes_by_way_of_guest_memory_are_logged() {
    let frames = MmapPool::new(PoolConfig {
        frames: 64,
        base: Pfn(0x1000),
        huge_pages: false,
    })
    .unwrap();
    let mmu = Mmu::<Ept, _>::builder(SoftwareHost::new(frames))
        .build()
        .unwrap();
    let gfns = Gfn(START >> 12)..Gfn((START >> 12) + PAGES);
    let slot = Slot::new(gfns, LinearBacking::new(Pfn(1 << 20), Level::L1));
    let id = mmu.slots().insert(slot).unwrap();
    let bitmap = SlotBitmap::new(&mmu, SPACE, id);
    let region = MmapRegionBuilder::new_with_bitmap(PAGES as usize * 4096, bitmap.clone())
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE)
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(START)).unwrap();
    let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
    let write = |offset: u64, len: usize| {
        let data = vec![7; len];
        memory
            .write_slice(&data, GuestAddress(START + offset))
            .unwrap();
    };

    write(0, 1);
    assert!(!bitmap.dirty_at(0), "not logged yet");
    let shown = format!("{:?}", bitmap.slice_at(4096));
    assert!(
        shown.contains("SlotBitmap") && shown.contains("4096"),
        "{shown}"
    );
    mmu.slots()
        .set_flags(SPACE, id, SlotFlags::LOG_DIRTY)
        .unwrap();
    // One byte, a whole page, two pages across their edge, the last byte.
    write(4096 * 2 + 5, 1);
    write(4096 * 10, 4096);
    write(4096 * 70 + 4090, 12);
    write(4096 * PAGES - 1, 1);
    let mut vcpu = mmu.vcpu().unwrap();
    let fault = Fault::write(Gpa(START + 4096 * 100));
    assert_eq!(vcpu.fault(fault), Ok(Outcome::Fixed { level: Level::L1 }));
    assert!(bitmap.dirty_at(4096 * 3 - 1) && !bitmap.dirty_at(4096 * 3));
    assert!(bitmap.slice_at(4096).dirty_at(4096 * 69));

    let log = mmu.dirty_log(SPACE, id).unwrap();
    let mut words = vec![0; log.words()];
    log.collect(&mut words).unwrap().flush();
    let marked = |&n: &u64| words[(n / 64) as usize] >> (n % 64) & 1 != 0;
    let marked: Vec<u64> = (0..PAGES).filter(marked).collect();
    assert_eq!(marked, [2, 10, 70, 71, 100, PAGES - 1]);
    assert!(!bitmap.dirty_at(4096 * 2));
    bitmap.mark_dirty(4096 * (PAGES as usize - 1), usize::MAX);
    bitmap.mark_dirty(usize::MAX, usize::MAX);
    bitmap.mark_dirty(0, 0);
    assert!(!bitmap.dirty_at(0) && bitmap.dirty_at(4096 * (PAGES as usize - 1)));
}

fn guest(regions: &[(u64, usize)]) -> GuestMemoryMmap {
    let ranges: Vec<_> = regions
        .iter()
        .map(|&(start, bytes)| (GuestAddress(start), bytes))
        .collect();
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

#[test]
fn guest_memory_becomes_slots_or_does_not() {
    let frames = MmapPool::new(PoolConfig {
        frames: 64,
        base: Pfn(0x1000),
        huge_pages: false,
    })
    .unwrap();
    let mmu = Mmu::<Ept, _>::builder(SoftwareHost::new(frames))
        .build()
        .unwrap();
    // What backs a region is told by the region.
    let backing = |region: &GuestRegionMmap| {
        LinearBacking::new(Pfn(0x10_0000 + (region.start_addr().0 >> 12)), Level::L1)
    };
    let memory = guest(&[(0, 0x10_0000), (START, 0x20_0000)]);
    let ids = mmu.slots().insert_memory(SPACE, &memory, backing).unwrap();
    let slots = mmu.slots().list(SPACE);
    let gfns: Vec<_> = slots
        .iter()
        .map(|slot| (slot.id(), slot.gfns().start.0, slot.gfns().pages()))
        .collect();
    assert_eq!(gfns, [(ids[0], 0, 256), (ids[1], START >> 12, 512)]);
    let mut vcpu = mmu.vcpu().unwrap();
    let fault = Fault::write(Gpa(START + 0x5000));
    assert_eq!(vcpu.fault(fault), Ok(Outcome::Fixed { level: Level::L1 }));
    let leaf = mmu.translate(SPACE, Gfn((START >> 12) + 5)).unwrap();
    assert_eq!(leaf.pfn, Pfn(0x10_0000 + (START >> 12) + 5));

    // The second region is refused, so the first does not stay; neither does one that ends inside a frame.
    let overlapping = guest(&[(2 * START, 0x1000), (3 * START, 0x1000)]);
    let taken = Slot::new(
        Gfn((3 * START) >> 12)..Gfn(((3 * START) >> 12) + 1),
        LinearBacking::new(Pfn(0), Level::L1),
    );
    mmu.slots().insert(taken).unwrap();
    let refused = mmu.slots().insert_memory(SPACE, &overlapping, backing);
    assert!(matches!(
        refused,
        Err(GuestMemoryError::Slot(SlotError::Overlap { .. }))
    ));
    let odd = guest(&[(2 * START, 0x1000), (4 * START, 0x1800)]);
    let refused = mmu.slots().insert_memory(SPACE, &odd, backing);
    assert_eq!(
        refused,
        Err(GuestMemoryError::Unaligned {
            start: Gpa(4 * START),
            bytes: 0x1800,
        })
    );
    assert_eq!(mmu.slots().list(SPACE).len(), 3);
}
