//! [`NestedPageTableOps`] of `axaddrspace` on an [`Mmu`]: axvisor's address space keeps its areas and its books, the tables below
//! it are `tdp`'s.
//!
//! Protocol. The address space says what is mapped where, so the MMU's memory slots are not used: pages go in by
//! [`Vcpu::map`] and come out by a zap. Whatever takes translations away has flushed them by [`Host::flush`] when it
//! returns, so a frame that `unmap` names can be reused at once. To change a mapping it is taken away, flushed and made
//! anew; an access in between faults, finds the address space busy with it (every change takes it by `&mut`), and tries
//! again.
//!
//! A part of a large mapping is changed by splitting it first. A range that is only partly mapped can be protected and
//! unmapped: what is not there is passed over, because lazily allocated areas are like that.
//!
//! [`NestedTable::mmu`] gives the MMU itself, for what the trait has no word for: aging, dirty logs, statistics.
#![no_std]

extern crate alloc;

use alloc::vec::Vec;
use ax_memory_addr::{PhysAddr, VirtAddr};
use axaddrspace::{AddrSpaceError, AddrSpaceResult, MappingFlags, NestedPageTableOps, PageSize};
use axvm_types::GuestPhysAddr;
use tdp::{
    Access, AddressSpaceId, Format, Gfn, GfnRange, Gpa, Host, Hpa, Leaf, LeafAttrs, Level, Mapping,
    MemoryType, Mmu, MmuError, Outcome, PAGE_SIZE, Perms, Vcpu,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);

/// Host memory that guests are made of: what the address space asks its page table for.
pub trait GuestMemory {
    /// A frame that nobody uses.
    fn alloc_frame(&self) -> Option<PhysAddr>;

    /// Takes one back.
    fn dealloc_frame(&self, frame: PhysAddr);

    /// Where the host itself finds an address.
    fn phys_to_virt(&self, address: PhysAddr) -> VirtAddr;
}

/// The nested page table of an address space.
#[derive(Debug)]
pub struct NestedTable<F: Format, H: Host, M: GuestMemory> {
    mmu: Mmu<F, H>,
    vcpu: Vcpu<F, H>,
    memory: M,
    root: PhysAddr,
    levels: usize,
}

impl<F: Format, H: Host, M: GuestMemory> NestedTable<F, H, M> {
    /// The table of `mmu`, for guest memory from `memory`.
    ///
    /// # Errors
    ///
    /// [`MmuError`] if there is no frame for the root.
    pub fn new(mmu: Mmu<F, H>, memory: M) -> Result<Self, MmuError> {
        let mut vcpu = mmu.vcpu()?;
        let root = vcpu.load_root()?;
        Ok(Self {
            vcpu,
            memory,
            root: PhysAddr::from_usize(root.hpa.0 as usize),
            levels: usize::from(root.level.number()),
            mmu,
        })
    }

    /// The MMU.
    pub fn mmu(&self) -> &Mmu<F, H> {
        &self.mmu
    }

    fn leaf(&self, gfn: Gfn) -> Option<Leaf> {
        self.mmu.translate(SPACE, gfn)
    }

    fn leaves(&self, range: GfnRange) -> Vec<Leaf> {
        let mut leaves = Vec::new();
        self.mmu
            .visit_leaves(SPACE, range, |leaf| leaves.push(leaf));
        leaves
    }

    /// Makes no leaf reach over an end of a range.
    fn split_at_ends(&self, range: GfnRange) -> AddrSpaceResult {
        for end in [range.start, range.end] {
            if self.leaf(end).is_some_and(|leaf| leaf.gfn < end) {
                let last = Gfn(end.0 - 1);
                self.mmu
                    .split(SPACE, last..Gfn(end.0 + 1), Level::L1)
                    .map_err(|_| AddrSpaceError::MappingState)?;
            }
        }
        Ok(())
    }

    /// Maps one block where nothing is mapped.
    fn map_block(&mut self, gfn: Gfn, mapping: Mapping, access: Access) -> AddrSpaceResult {
        let range = mapping.level.range(gfn);
        if !self.leaves(range).is_empty() {
            return Err(AddrSpaceError::MappingConflict);
        }
        if mapping.level > Level::L1 {
            // A table of what was mapped here before would be filled instead.
            self.mmu.zap(SPACE, range).flush();
        }
        loop {
            return match self.vcpu.map(gfn, mapping, access) {
                Ok(Outcome::Fixed { level }) if level == mapping.level => Ok(()),
                Ok(Outcome::Fixed { .. }) => {
                    self.mmu.zap(SPACE, range).flush();
                    Err(AddrSpaceError::InvalidMapping)
                }
                Ok(Outcome::Retry(_)) => {
                    self.vcpu
                        .load_root()
                        .map_err(|_| AddrSpaceError::MappingState)?;
                    continue;
                }
                Ok(Outcome::Spurious) => Err(AddrSpaceError::MappingConflict),
                Ok(_) => Err(AddrSpaceError::InvalidMapping),
                Err(_) => Err(AddrSpaceError::MappingState),
            };
        }
    }

    /// Maps a range by the largest blocks that fit. If that fails nothing of it stays.
    fn map_range(
        &mut self,
        range: GfnRange,
        first: Hpa,
        flags: MappingFlags,
        huge: bool,
    ) -> AddrSpaceResult {
        let (perms, memory_type, access) = decode(flags)?;
        if !self.leaves(range).is_empty() {
            return Err(AddrSpaceError::MappingConflict);
        }
        let mut gfn = range.start;
        while gfn < range.end {
            let pfn = tdp::Pfn(first.pfn().0 + (gfn.0 - range.start.0));
            let fits = |level: &Level| {
                let pages = level.pages();
                gfn.0.is_multiple_of(pages)
                    && pfn.0.is_multiple_of(pages)
                    && pages <= range.end.0 - gfn.0
            };
            let sizes: &[Level] = if huge { &[Level::L3, Level::L2] } else { &[] };
            let level = sizes.iter().copied().find(fits).unwrap_or(Level::L1);
            let mapping = Mapping {
                memory_type,
                ..Mapping::memory(pfn, level, perms)
            };
            if let Err(error) = self.map_block(gfn, mapping, access) {
                self.mmu.zap(SPACE, range).flush();
                return Err(error);
            }
            gfn = Gfn(gfn.0 + level.pages());
        }
        Ok(())
    }
}

/// What a mapping permits, how it is cached, and the access that it is made for.
fn decode(flags: MappingFlags) -> AddrSpaceResult<(Perms, MemoryType, Access)> {
    let mut perms = Perms::empty();
    // No format has a page that can be written and not read.
    if flags.intersects(MappingFlags::READ | MappingFlags::WRITE) {
        perms |= Perms::READ;
    }
    if flags.contains(MappingFlags::WRITE) {
        perms |= Perms::WRITE;
    }
    if flags.contains(MappingFlags::EXECUTE) {
        perms |= Perms::EXEC | Perms::USER_EXEC;
    }
    let access = if perms.contains(Perms::WRITE) {
        Access::Write
    } else if perms.contains(Perms::READ) {
        Access::Read
    } else if perms.contains(Perms::EXEC) {
        Access::Execute
    } else {
        return Err(AddrSpaceError::InvalidMapping);
    };
    let memory_type = if flags.intersects(MappingFlags::DEVICE | MappingFlags::UNCACHED) {
        MemoryType::Uncacheable
    } else {
        MemoryType::WriteBack
    };
    Ok((perms, memory_type, access))
}

/// Whether a leaf maps memory that is not cached. Entries say so in other bits by format and level, so it is compared with
/// what the library writes for either kind.
fn is_uncacheable<F: Format>(leaf: &Leaf) -> bool {
    let like = |memory_type| {
        let attrs = LeafAttrs {
            memory_type,
            ..LeafAttrs::memory(Perms::READ)
        };
        F::leaf(tdp::Pfn(0), leaf.level, attrs).0
    };
    let uncacheable = like(MemoryType::Uncacheable);
    let bits = uncacheable ^ like(MemoryType::WriteBack);
    (leaf.spte.0 ^ uncacheable) & bits == 0
}

fn flags_of<F: Format>(leaf: &Leaf) -> MappingFlags {
    let mut flags = MappingFlags::empty();
    flags.set(MappingFlags::READ, leaf.perms.contains(Perms::READ));
    flags.set(MappingFlags::WRITE, leaf.perms.contains(Perms::WRITE));
    flags.set(MappingFlags::EXECUTE, leaf.perms.contains(Perms::EXEC));
    flags.set(MappingFlags::DEVICE, is_uncacheable::<F>(leaf));
    flags
}

fn gpa(address: GuestPhysAddr) -> Gpa {
    Gpa(address.as_usize() as u64)
}

fn hpa(address: PhysAddr) -> Hpa {
    Hpa(address.as_usize() as u64)
}

fn level_of(size: PageSize) -> AddrSpaceResult<Level> {
    match size {
        PageSize::Size4K => Ok(Level::L1),
        PageSize::Size2M => Ok(Level::L2),
        PageSize::Size1G => Ok(Level::L3),
        _ => Err(AddrSpaceError::InvalidMapping),
    }
}

fn size_of_level(level: Level) -> PageSize {
    match level {
        Level::L1 => PageSize::Size4K,
        Level::L2 => PageSize::Size2M,
        _ => PageSize::Size1G,
    }
}

fn aligned(subject: &'static str, value: u64, alignment: u64) -> AddrSpaceResult {
    if value.is_multiple_of(alignment) {
        return Ok(());
    }
    Err(AddrSpaceError::Unaligned {
        subject,
        value: value as usize,
        alignment: alignment as usize,
    })
}

/// The frames of a range of whole pages.
fn frames(start: GuestPhysAddr, size: usize) -> AddrSpaceResult<GfnRange> {
    aligned("guest physical address", gpa(start).0, PAGE_SIZE)?;
    aligned("mapping size", size as u64, PAGE_SIZE)?;
    let overflow = AddrSpaceError::AddressOverflow {
        start: start.as_usize(),
        size,
    };
    GfnRange::new(gpa(start).gfn(), size as u64 / PAGE_SIZE).ok_or(overflow)
}

impl<F: Format, H: Host, M: GuestMemory> NestedPageTableOps for NestedTable<F, H, M> {
    fn root_paddr(&self) -> PhysAddr {
        self.root
    }

    fn levels(&self) -> usize {
        self.levels
    }

    fn alloc_frame(&self) -> Option<PhysAddr> {
        self.memory.alloc_frame()
    }

    fn dealloc_frame(&self, paddr: PhysAddr) {
        self.memory.dealloc_frame(paddr);
    }

    fn phys_to_virt(&self, paddr: PhysAddr) -> VirtAddr {
        self.memory.phys_to_virt(paddr)
    }

    fn map(
        &mut self,
        vaddr: GuestPhysAddr,
        paddr: PhysAddr,
        size: PageSize,
        flags: MappingFlags,
    ) -> AddrSpaceResult {
        let level = level_of(size)?;
        aligned("guest physical address", gpa(vaddr).0, level.bytes())?;
        aligned("host physical address", hpa(paddr).0, level.bytes())?;
        let (perms, memory_type, access) = decode(flags)?;
        let mapping = Mapping {
            memory_type,
            ..Mapping::memory(hpa(paddr).pfn(), level, perms)
        };
        self.map_block(gpa(vaddr).gfn(), mapping, access)
    }

    fn unmap(
        &mut self,
        vaddr: GuestPhysAddr,
    ) -> AddrSpaceResult<(PhysAddr, MappingFlags, PageSize)> {
        let unmapped = AddrSpaceError::Unmapped { address: vaddr };
        let leaf = self.leaf(gpa(vaddr).gfn()).ok_or(unmapped)?;
        self.mmu
            .zap_leaves(SPACE, leaf.level.range(leaf.gfn))
            .flush();
        let frame = PhysAddr::from_usize(leaf.pfn.address().0 as usize);
        Ok((frame, flags_of::<F>(&leaf), size_of_level(leaf.level)))
    }

    fn map_linear(
        &mut self,
        vaddr: GuestPhysAddr,
        paddr: PhysAddr,
        size: usize,
        flags: MappingFlags,
        allow_huge: bool,
    ) -> AddrSpaceResult {
        let range = frames(vaddr, size)?;
        aligned("host physical address", hpa(paddr).0, PAGE_SIZE)?;
        self.map_range(range, hpa(paddr), flags, allow_huge)
    }

    fn unmap_region(&mut self, start: GuestPhysAddr, size: usize) -> AddrSpaceResult {
        let range = frames(start, size)?;
        self.split_at_ends(range)?;
        self.mmu.zap(SPACE, range).flush();
        Ok(())
    }

    /// Of one page, whatever the size of the mapping that it is in. What cannot be mapped is refused before that is taken away.
    fn remap(&mut self, start: GuestPhysAddr, paddr: PhysAddr, flags: MappingFlags) -> bool {
        let page = GuestPhysAddr::from_usize(start.as_usize() & !(PAGE_SIZE as usize - 1));
        hpa(paddr).0.is_multiple_of(PAGE_SIZE)
            && decode(flags).is_ok()
            && self.unmap_region(page, PAGE_SIZE as usize).is_ok()
            && self.map(page, paddr, PageSize::Size4K, flags).is_ok()
    }

    fn protect_region(
        &mut self,
        start: GuestPhysAddr,
        size: usize,
        new_flags: MappingFlags,
    ) -> bool {
        let (Ok(range), Ok((perms, memory_type, access))) =
            (frames(start, size), decode(new_flags))
        else {
            return false;
        };
        if self.split_at_ends(range).is_err() {
            return false;
        }
        let leaves = self.leaves(range);
        self.mmu.zap_leaves(SPACE, range).flush();
        leaves.iter().all(|leaf| {
            let mapping = Mapping {
                memory_type,
                ..Mapping::memory(leaf.pfn, leaf.level, perms)
            };
            self.map_block(leaf.gfn, mapping, access).is_ok()
        })
    }

    fn query(&self, vaddr: GuestPhysAddr) -> AddrSpaceResult<(PhysAddr, MappingFlags, PageSize)> {
        let unmapped = AddrSpaceError::Unmapped { address: vaddr };
        let leaf = self.leaf(gpa(vaddr).gfn()).ok_or(unmapped)?;
        let offset = gpa(vaddr).0 & (leaf.level.bytes() - 1);
        let address = PhysAddr::from_usize((leaf.pfn.address().0 + offset) as usize);
        Ok((address, flags_of::<F>(&leaf), size_of_level(leaf.level)))
    }
}
