//! The dirty log as the bitmap of a `vm-memory` region: what the VMM writes by way of guest memory is logged beside what
//! the guest writes.

use tdp::{
    AddressSpaceId, Ept, Fault, Gfn, Gpa, Level, LinearBacking, MmapPool, Mmu, Outcome, Pfn,
    PoolConfig, Slot, SlotBitmap, SlotFlags, SoftwareHost,
};
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

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
    mmu.slots()
        .set_flags(SPACE, id, SlotFlags::LOG_DIRTY)
        .unwrap();
    // One byte, two pages across their edge, the last byte.
    write(4096 * 2 + 5, 1);
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
    assert_eq!(marked, [2, 70, 71, 100, PAGES - 1]);
    assert!(!bitmap.dirty_at(4096 * 2));
    bitmap.mark_dirty(4096 * (PAGES as usize - 1), usize::MAX);
    bitmap.mark_dirty(usize::MAX, usize::MAX);
    bitmap.mark_dirty(0, 0);
    assert!(!bitmap.dirty_at(0) && bitmap.dirty_at(4096 * (PAGES as usize - 1)));
}
