//! What cannot be made, and what it says.

use crate::common::host::TestHost;
use crate::common::rig::pool;
use std::error::Error;
use tdp::{
    BuildError, Ept, FaultError, FrameSource, Gfn, GfnRange, Level, MmapPool, Mmu, MmuBuilder,
    MmuError, OutOfFrames, Pfn, PoolConfig, PoolError, SlotError, SlotId,
};

type Change = fn(MmuBuilder<Ept, TestHost>) -> MmuBuilder<Ept, TestHost>;

/// Asserts that a message is one line that names what it is about.
fn assert_says(error: &dyn Error, what: &str) {
    let message = error.to_string();
    assert!(message.contains(what), "{message:?} does not name {what:?}");
    assert!(!message.contains('\n'), "{message:?}");
}

#[test]
fn impossible_settings_are_refused() {
    let cases: [(Change, BuildError, &str); 20] = [
        (|b| b.levels(Level::L3), BuildError::Levels(Level::L3), "3"),
        (|b| b.levels(Level::L1), BuildError::Levels(Level::L1), "1"),
        (|b| b.address_spaces(0), BuildError::AddressSpaces(0), "0"),
        (|b| b.address_spaces(3), BuildError::AddressSpaces(3), "3"),
        (
            |b| b.address_spaces(255),
            BuildError::AddressSpaces(255),
            "255",
        ),
        (|b| b.physical_bits(31), BuildError::PhysicalBits(31), "31"),
        (|b| b.physical_bits(53), BuildError::PhysicalBits(53), "53"),
        (|b| b.physical_bits(0), BuildError::PhysicalBits(0), "0"),
        (
            |b| b.physical_bits(u32::MAX),
            BuildError::PhysicalBits(u32::MAX),
            "4294967295",
        ),
        (
            |b| b.max_leaf(Level::L4),
            BuildError::MaxLeaf(Level::L4),
            "4",
        ),
        (
            |b| b.max_leaf(Level::L5),
            BuildError::MaxLeaf(Level::L5),
            "5",
        ),
        (
            |b| b.levels(Level::L2).address_spaces(0),
            BuildError::Levels(Level::L2),
            "2",
        ),
        // Too short, and no power of two.
        (|b| b.dirty_ring(1), BuildError::DirtyRing(1), "1024"),
        (|b| b.dirty_ring(512), BuildError::DirtyRing(512), "512"),
        (|b| b.dirty_ring(1025), BuildError::DirtyRing(1025), "1025"),
        (|b| b.dirty_ring(1536), BuildError::DirtyRing(1536), "1536"),
        // No bit of a frame number; one below the root entries; one past what the tables reach; one that no address has.
        (|b| b.shared_bit(11), BuildError::SharedBit(11), "11"),
        (|b| b.shared_bit(38), BuildError::SharedBit(38), "38"),
        (|b| b.shared_bit(48), BuildError::SharedBit(48), "48"),
        (|b| b.shared_bit(200), BuildError::SharedBit(200), "200"),
    ];
    let possible: [Change; 3] = [
        |b| b.dirty_ring(1024),
        |b| b.shared_bit(39),
        |b| b.shared_bit(47),
    ];
    for change in possible {
        let builder = Mmu::<Ept, _>::builder(TestHost::new(pool(8)));
        assert!(change(builder).build().is_ok());
    }
    for (change, expected, named) in cases {
        let builder = Mmu::<Ept, _>::builder(TestHost::new(pool(8)));
        let error = change(builder).build().expect_err("it is impossible");
        assert_eq!(error, expected);
        assert_says(&error, named);
    }
}

#[test]
fn tables_have_to_be_where_the_processor_can_see_them() {
    for (base, bits, fits) in [
        ((1 << 20) - 8, 32, true),
        ((1 << 20) - 7, 32, false),
        ((1 << 40) - 8, 52, true),
        ((1 << 40) - 8, 51, false),
    ] {
        let config = PoolConfig {
            frames: 8,
            base: Pfn(base),
            huge_pages: false,
        };
        let pool = MmapPool::new(config).expect("a small pool");
        let end = pool.window().end.0;
        let host = TestHost::new(crate::common::host::SharedPool::new(pool));
        let result = Mmu::<Ept, _>::builder(host).physical_bits(bits).build();
        match result {
            Ok(_) => assert!(fits, "{base:#x} in {bits} bits"),
            Err(error) => {
                assert_eq!(error, BuildError::Window { end, bits });
                assert!(!fits);
                assert_says(&error, &bits.to_string());
            }
        }
    }
}

#[test]
fn impossible_pools_are_refused() {
    let config = |frames, base| PoolConfig {
        frames,
        base: Pfn(base),
        huge_pages: false,
    };
    for (frames, base) in [
        (0, 0),
        (usize::MAX, 0),
        (usize::MAX / 4096 + 1, 0),
        (1, u64::MAX),
        (2, (1 << 40) - 1),
    ] {
        let error = MmapPool::new(config(frames, base)).expect_err("it is impossible");
        assert_eq!(error, PoolError::Size(frames));
        assert_says(&error, &frames.to_string());
    }
    // More than an address space of 47 bits.
    let frames = 1 << 36;
    let error = MmapPool::new(config(frames, 0)).expect_err("there is no room");
    assert!(matches!(error, PoolError::Map { frames: f, .. } if f == frames));
    assert_says(&error, &frames.to_string());
}

/// An address space has room for some hundred pools of this size, and for as many as one likes one after another.
#[test]
fn a_pool_that_is_gone_leaves_its_addresses() {
    for n in 0..1024 {
        let config = PoolConfig {
            frames: 1 << 26,
            base: Pfn(0),
            huge_pages: false,
        };
        let pool = MmapPool::new(config);
        if n == 0 && pool.is_err() {
            eprintln!("SKIPPED: no pool of this size can be had here");
            return;
        }
        assert!(pool.is_ok(), "no room for pool {n}: {:?}", pool.err());
    }
}

#[test]
fn a_pool_hands_out_what_it_has_and_no_more() {
    for huge_pages in [false, true] {
        let config = PoolConfig {
            frames: 5,
            base: Pfn(100),
            huge_pages,
        };
        let pool = MmapPool::new(config).expect("a small pool");
        assert_eq!(pool.window(), Pfn(100)..Pfn(105));
        let mut out = [Pfn(0); 4];
        assert_eq!(pool.allocate(&mut out), Ok(4));
        assert_eq!(pool.allocated(), 4);
        let mut rest = [Pfn(0); 4];
        assert_eq!(pool.allocate(&mut rest), Ok(1));
        let mut all: Vec<_> = out.iter().chain(&rest[..1]).copied().collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 5, "each is handed out once");
        assert!(all.iter().all(|pfn| pool.window().contains(pfn)));
        assert_eq!(pool.allocate(&mut rest), Err(OutOfFrames { limit: 5 }));
        pool.free(&out);
        assert_eq!((pool.allocated(), pool.peak(), pool.limit()), (1, 5, 5));
        assert_eq!(pool.allocate(&mut rest), Ok(4));
        assert_eq!(pool.allocate(&mut []), Err(OutOfFrames { limit: 5 }));
        pool.populate();
    }
}

#[test]
fn messages_name_what_they_are_about() {
    let frames = OutOfFrames { limit: 77 };
    assert_says(&frames, "77");
    assert_says(&FaultError::OutOfFrames, "no table frame");
    assert_says(&MmuError::OutOfFrames(frames), "77");
    assert_says(&MmuError::NoSuchSpace(tdp::AddressSpaceId(9)), "9");
    let gfns = GfnRange {
        start: Gfn(0x123),
        end: Gfn(0x456),
    };
    let other = GfnRange {
        start: Gfn(0x400),
        end: Gfn(0x789),
    };
    let overlap = SlotError::Overlap {
        gfns,
        other: SlotId(31),
        other_gfns: other,
    };
    for part in ["0x123", "0x456", "31", "0x789"] {
        assert_says(&overlap, part);
    }
    assert_says(&SlotError::Empty { gfns }, "0x123");
    let beyond = SlotError::BeyondWidth {
        gfns,
        limit: Gfn(0x1000),
    };
    assert_says(&beyond, "0x1000");
    assert_says(&SlotError::IdInUse { id: SlotId(31) }, "31");
}
