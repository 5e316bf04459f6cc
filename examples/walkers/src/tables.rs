//! Tables built by the library: random operations on random guest memory.
//!
//! Guest memory lies in a few regions of 1 GiB below 1 TiB. What backs a region follows from its number: one leaf of 1 GiB, or
//! leaves of 2 MiB, or of 4 KiB, each with permissions of its own. Region 0 holds the guest's program and the page
//! tables that lead there ([`CONTROL_FRAMES`]), which are never spoilt. Other page tables of the guest's lie in any region.

use crate::memory::{DATA, DATA_FRAMES, Frames};
use crate::{Random, mix};
use alloc::vec::Vec;
use tdp::protected::Unprotected;
use tdp::{
    Access, AdBits, AddressSpaceId, Fault, FlushRequest, Format, Gfn, GfnRange, Gpa, Host, Level,
    Lookup, Mapping, MemoryType, Mmu, Outcome, Perms, Pfn, Slot, SlotFlags, SlotId,
};

/// Guest frames of region 0 that exist: host frames at the end of the data area.
pub const CONTROL_FRAMES: u64 = 16;
const CONTROL: Pfn = Pfn(DATA.0 + DATA_FRAMES - CONTROL_FRAMES);
const SPACE: AddressSpaceId = AddressSpaceId(0);
/// Frames of a region.
const REGION: u64 = 1 << 18;
/// Regions below 1 TiB.
const REGIONS: u64 = 1024;

/// Host of the guest.
pub struct TableHost {
    frames: Frames,
    seed: u64,
}

/// Host address of a control frame.
pub fn control(gfn: u64) -> Pfn {
    Pfn(CONTROL.0 + gfn)
}

impl Host for TableHost {
    type Frames = Frames;
    type Backing = ();
    type Protected = Unprotected;

    fn frames(&self) -> &Frames {
        &self.frames
    }

    fn protected(&self) -> &Unprotected {
        &Unprotected
    }

    fn lookup(&self, _slot: &Slot<()>, gfn: Gfn, _access: Access) -> Lookup {
        let region = gfn.0 / REGION;
        if region == 0 {
            return Lookup::Mapped(Mapping::memory(control(gfn.0), Level::L1, Perms::RWX));
        }
        let blocks = DATA_FRAMES / 512 - 1;
        let (key, pfn, level) = match mix(self.seed ^ region) % 4 {
            // Host address 0: what lies above 64 MiB of it is data.
            0 => (region, gfn.0 % REGION, Level::L3),
            1 => (
                gfn.0,
                DATA.0 + mix(self.seed ^ gfn.0 << 8) % (DATA_FRAMES - CONTROL_FRAMES),
                Level::L1,
            ),
            _ => {
                let block = DATA.0 + mix(self.seed ^ (gfn.0 / 512) << 16) % blocks * 512;
                (gfn.0 / 512, block + gfn.0 % 512, Level::L2)
            }
        };
        let key = mix(self.seed.rotate_left(7) ^ key);
        let perms = [
            Perms::RWX,
            Perms::RW,
            Perms::RX,
            Perms::READ,
            Perms::RWX,
            Perms::EXEC | Perms::USER_EXEC,
            Perms::READ | Perms::EXEC,
            Perms::READ | Perms::USER_EXEC,
        ];
        let memory_type = [
            MemoryType::WriteBack,
            MemoryType::WriteThrough,
            MemoryType::Uncacheable,
        ];
        Lookup::Mapped(Mapping {
            memory_type: memory_type[(key >> 8) as usize % 3],
            ..Mapping::memory(Pfn(pfn), level, perms[key as usize % perms.len()])
        })
    }

    fn flush(&self, _request: &FlushRequest) {
        // No guest runs while tables are built, and nothing is cached when one is entered.
    }
}

/// Tables of one round.
pub struct Tables<F: Format> {
    mmu: Mmu<F, TableHost>,
    /// Value for the processor.
    pub pointer: u64,
    /// Host frame of the root.
    pub root: Pfn,
    /// Who keeps the accessed and dirty bits.
    pub ad_bits: AdBits,
    regions: Vec<u64>,
    touched: Vec<Gfn>,
}

impl<F: Format> Tables<F> {
    /// Builds them.
    ///
    /// # Panics
    ///
    /// If the library answers what it must not.
    pub fn build(random: &mut Random, physical_bits: u32) -> Self {
        let ad_bits = random.pick(&[AdBits::Processor, AdBits::Processor, AdBits::Software]);
        let host = TableHost {
            frames: Frames::default(),
            seed: random.any(),
        };
        let mmu = Mmu::<F, _>::builder(host)
            .physical_bits(physical_bits)
            .ad_bits(ad_bits)
            .build()
            .expect("these settings are possible");
        let mut regions: Vec<u64> = (0..8).map(|_| 1 + random.below(REGIONS - 1)).collect();
        regions.sort_unstable();
        regions.dedup();
        let control = GfnRange::from(Gfn(0)..Gfn(CONTROL_FRAMES));
        let ranges = regions
            .iter()
            .map(|region| Level::L3.range(Gfn(region * REGION)));
        for (id, range) in core::iter::once(control).chain(ranges).enumerate() {
            let slot = Slot::new(range, ()).with_id(SlotId(id as u32));
            mmu.slots().insert(slot).expect("the regions are apart");
        }
        let mut vcpu = mmu.vcpu().expect("a frame for the root");
        for gfn in 0..CONTROL_FRAMES {
            let outcome = vcpu
                .fault(Fault::write(Gfn(gfn).address()))
                .expect("frames are left");
            assert_eq!(outcome, Outcome::Fixed { level: Level::L1 });
        }
        let root = vcpu.load_root().expect("it has one");
        let mut tables = Self {
            pointer: root.pointer,
            root: root.hpa.pfn(),
            ad_bits,
            regions,
            touched: Vec::new(),
            mmu: mmu.clone(),
        };
        for _ in 0..120 {
            tables.operate(&mut vcpu, random);
        }
        if random.below(2) == 0 {
            let all = tables.mmu.slots().addressable();
            tables.mmu.age(SPACE, Gfn(REGION)..all.end);
        }
        tables
    }

    /// A frame of a region, such that a leaf of 1 GiB maps it to data.
    fn somewhere(&self, random: &mut Random) -> Gfn {
        // Few blocks, so that operations meet each other.
        let block = DATA.0 / 512 + random.below(4);
        Gfn(random.pick(&self.regions) * REGION
            + block * 512
            + random.pick(&[0, 1, 2, 17, 510, 511]))
    }

    fn operate(&mut self, vcpu: &mut tdp::Vcpu<F, TableHost>, random: &mut Random) {
        let gfn = self.somewhere(random);
        let range = random.pick(&[Level::L1, Level::L1, Level::L2]).range(gfn);
        match random.below(24) {
            0 => drop(self.mmu.zap(SPACE, range).flush()),
            1 => drop(self.mmu.write_protect(SPACE, range, Level::L1).flush()),
            2 | 3 => {
                self.mmu.age(SPACE, range);
            }
            4 => drop(self.mmu.split(SPACE, range, Level::L1)),
            5 => drop(self.mmu.collapse(SPACE, Level::L3.range(gfn)).flush()),
            6 => {
                let slot = SlotId(1 + random.below(self.regions.len() as u64) as u32);
                let flags = random.pick(&[
                    SlotFlags::LOG_DIRTY,
                    SlotFlags::READ_ONLY,
                    SlotFlags::empty(),
                ]);
                self.mmu
                    .slots()
                    .set_flags(SPACE, slot, flags)
                    .expect("the slot is there");
            }
            _ => {
                // Every ninth where there is no memory: an entry for emulated devices.
                let gfn = if random.below(9) == 0 {
                    Gfn(gfn.0 ^ REGION << 3)
                } else {
                    gfn
                };
                let access = random.pick(&[
                    Access::Read,
                    Access::Write,
                    Access::Execute,
                    Access::UserExecute,
                ]);
                let level = random.pick(&[Level::L1, Level::L2, Level::L3]);
                let fault = Fault::new(gfn.address(), access).max_level(level);
                // None is left once two leaves of 1 GiB have been split for a log. The tables are then as they were.
                let Ok(outcome) = vcpu.fault(fault) else {
                    return;
                };
                assert!(
                    !matches!(outcome, Outcome::Retry(_)),
                    "nobody else is there"
                );
                self.touched.push(gfn);
            }
        }
    }

    /// Where to probe: mostly where something was done.
    pub fn probe_at(&self, random: &mut Random) -> Gpa {
        let gfn = match random.below(16) {
            0 => self.somewhere(random),
            1 => Gfn(REGION + random.below(REGION * (REGIONS - 1))),
            _ => random.pick(&self.touched),
        };
        Gpa(gfn.address().0 | (random.below(512) * 8))
    }
}
