//! Entry codecs of every format, and the processor's walk of images made of any words.
//!
//! * Any word is told apart without a panic and as one thing only; what an encoder writes is read back as it was meant,
//!   and what is not one of its words is never taken for one.
//! * The processor reads a leaf as it was meant, memory type included, and the parts of a large one as it reads the whole.
//! * A walk of tables full of encoded entries, and of words that nobody ever wrote, ends; it finds what the entries say;
//!   it changes accessed and dirty flags only; a second walk finds the same and changes nothing.
#![no_main]

#[path = "../../tdp/tests/common/mod.rs"]
mod common;

use arbitrary::Arbitrary;
use common::ops::{access, perms};
use common::processor::{Processor, ProcessorSetup, Report, guest_access};
use libfuzzer_sys::fuzz_target;
use std::cell::Cell;
use tdp::{Access, AdBits, Ept, Gfn, Gpa, Hpa, LeafAttrs, Level, MemoryType, Npt, Pfn, Spte};
use tdp_arch::walker::{
    GuestAccess, LeafMemoryType, PhysicalMemory, ReadOnly, Translation, WalkError, Walker,
};
use tdp_arch::{Decoded, MMIO_GENERATION_BITS};

/// Tables of an image; each has `WORDS` entries that repeat through the table.
const TABLES: usize = 6;
const WORDS: usize = 4;
const BASE: u64 = 0x100;
const MOST_ENTRIES: usize = 24;
const MOST_WALKS: usize = 8;

#[derive(Debug, Arbitrary)]
struct Input {
    format: u8,
    five_levels: bool,
    software_ad: bool,
    mode_based_execute: bool,
    physical_bits: u8,
    words: [u64; 3],
    leaf: Leaf,
    index: u16,
    entries: Vec<(u8, Entry)>,
    walks: Vec<(u64, u8)>,
}

/// One entry of an image.
#[derive(Debug, Arbitrary)]
enum Entry {
    /// Anything.
    Word(u64),
    /// A table as the encoder writes it.
    Table(u8),
    /// A leaf as the encoder writes it.
    Leaf(Leaf),
    /// A table with some bits turned around.
    Bent(u8, u64),
    /// A leaf with one bit turned around.
    BentLeaf(Leaf, u8),
}

#[derive(Clone, Copy, Debug, Arbitrary)]
struct Leaf {
    pfn: u32,
    level: u8,
    perms: u8,
    memory_type: u8,
    /// Pat, software flags, accessed, dirty, host-writable, MMU-writable.
    flags: u8,
    access_tracked: bool,
}

impl Leaf {
    fn level(self) -> Level {
        Level::from_number(self.level % 3 + 1).unwrap_or(Level::L1)
    }

    fn pfn(self) -> Pfn {
        Pfn(u64::from(self.pfn) & !(self.level().pages() - 1))
    }

    fn attrs(self, ad_bits: AdBits) -> LeafAttrs {
        let flag = |bit: u32| self.flags >> bit & 1 != 0;
        let perms = perms(self.perms);
        LeafAttrs {
            memory_type: match self.memory_type % 5 {
                0 => MemoryType::Uncacheable,
                1 => MemoryType::WriteCombining,
                2 => MemoryType::WriteThrough,
                3 => MemoryType::WriteProtected,
                _ => MemoryType::WriteBack,
            },
            ignore_guest_pat: flag(0),
            ad_bits,
            accessed: flag(1),
            dirty: flag(2),
            host_writable: flag(3),
            mmu_writable: flag(3) && flag(4),
            ..LeafAttrs::memory(perms)
        }
    }
}

/// Every word of an image, by table and place.
struct Image([[Cell<u64>; WORDS]; TABLES]);

impl Image {
    /// Every address leads to `entry`, one of `level`, below tables as the encoder writes them.
    fn leading_to<F: Processor>(root_level: Level, level: Level, entry: Spte) -> Self {
        let image = Self(Default::default());
        let above = usize::from(root_level.number() - level.number());
        for (n, words) in image.0.iter().enumerate().take(above + 1) {
            let word = if n < above {
                F::table(table_at(n as u8 + 1))
            } else {
                entry
            };
            words.iter().for_each(|cell| cell.set(word.0));
        }
        image
    }

    fn cell(&self, hpa: Hpa) -> Option<&Cell<u64>> {
        assert_eq!(hpa.0 % 8, 0, "an entry that is not aligned");
        let table = (hpa.0 >> 12).checked_sub(BASE)?;
        let words = self.0.get(usize::try_from(table).ok()?)?;
        Some(&words[(hpa.0 >> 3) as usize % WORDS])
    }
}

impl PhysicalMemory for Image {
    fn load(&self, hpa: Hpa) -> Option<u64> {
        self.cell(hpa).map(Cell::get)
    }

    fn compare_exchange(&self, hpa: Hpa, current: u64, new: u64) -> Result<(), u64> {
        let cell = self
            .cell(hpa)
            .expect("asked for only where a load answered");
        match cell.get() {
            found if found == current => {
                cell.set(new);
                Ok(())
            }
            found => Err(found),
        }
    }
}

fn table_at(number: u8) -> Pfn {
    Pfn(BASE + u64::from(number) % TABLES as u64)
}

fn codecs<F: Processor>(input: &Input, setup: ProcessorSetup) {
    for (word, level) in input
        .words
        .iter()
        .flat_map(|&word| Level::ALL.into_iter().map(move |level| (Spte(word), level)))
    {
        let decoded = F::decode(word, level);
        match decoded {
            Decoded::Empty => assert_eq!(word, F::EMPTY),
            Decoded::Frozen => assert_eq!(word, F::FROZEN),
            Decoded::Sealed => assert_eq!(word, F::SEALED),
            Decoded::Mmio(_) => assert!(!F::is_mmu_present(word)),
            Decoded::Table(pfn) => {
                assert!(F::is_table(word) && level > Level::L1);
                assert_eq!(pfn.0 << 12, word.0 & F::PFN_MASK);
            }
            Decoded::Leaf { pfn, .. } => {
                assert!(F::is_leaf(word, level));
                assert!(level > Level::L3 || pfn.0.is_multiple_of(level.pages()));
            }
            Decoded::Unknown => assert!(!F::is_mmu_present(word)),
        }
        let _ = F::fault_code(word.0);
    }
    let gfn = Gfn(input.words[0] & ((1 << 40) - 1));
    if let Some(mmio) = F::mmio(gfn, input.words[1], setup.physical_bits) {
        let Decoded::Mmio(entry) = F::decode(mmio, Level::L1) else {
            panic!("{mmio:?} is not MMIO");
        };
        assert_eq!(entry.gfn, gfn);
        let mask = (1 << MMIO_GENERATION_BITS) - 1;
        assert_eq!(u64::from(entry.generation), input.words[1] & mask);
    }
    let table = F::table(Pfn(input.words[2] & ((1 << 40) - 1)));
    for level in [Level::L2, Level::L3, Level::L4, Level::L5] {
        let expected = Pfn(input.words[2] & ((1 << 40) - 1));
        assert_eq!(F::decode(table, level), Decoded::Table(expected));
    }
    leaf::<F>(input, setup);
    leaf_as_walked::<F>(input, setup);
}

fn leaf<F: Processor>(input: &Input, setup: ProcessorSetup) {
    let (level, pfn) = (input.leaf.level(), input.leaf.pfn());
    let attrs = input.leaf.attrs(setup.ad_bits);
    let leaf = F::leaf(pfn, level, attrs);
    let told = |spte| match F::decode(spte, level) {
        Decoded::Leaf {
            pfn: at,
            perms,
            access_tracked,
        } => {
            assert_eq!(at, pfn);
            (perms, access_tracked)
        }
        other => panic!("{spte:?} of {attrs:?} is {other:?}"),
    };
    assert_eq!(told(leaf), (F::expressed(attrs.perms), false));
    for kind in 0..4 {
        let access = access(kind);
        let allowed = F::expressed(attrs.perms).contains(access.needs());
        assert_eq!(F::allows(leaf, access), allowed, "{access:?}");
    }
    // What tracking takes away comes back, but for the write permission.
    let tracked = F::access_track(leaf);
    let back = F::restore_access_tracked(tracked);
    if F::is_access_tracked(tracked) {
        let (saved, access_tracked) = told(tracked);
        assert!(access_tracked);
        assert_eq!(F::perms(back), saved);
        assert!(F::expressed(attrs.perms).contains(saved));
    }
    assert_eq!(F::with_pfn(F::leaf(Pfn(0), level, attrs), pfn), leaf);
    let Some(below) = level.below() else { return };
    let index = usize::from(input.index) % 512;
    let child = F::split_child(leaf, level, index);
    let place = Pfn(pfn.0 + index as u64 * below.pages());
    let expected = Decoded::Leaf {
        pfn: place,
        perms: F::expressed(attrs.perms),
        access_tracked: false,
    };
    assert_eq!(F::decode(child, below), expected);
    assert_eq!(child, F::leaf(place, below, attrs));
}

/// What the processor is to make of the memory type.
fn memory_type<F: Processor>(attrs: LeafAttrs) -> LeafMemoryType {
    if F::NAME == "ept" {
        LeafMemoryType::Ept {
            memory_type: attrs.memory_type as u8,
            ignore_pat: attrs.ignore_guest_pat,
        }
    } else {
        LeafMemoryType::Npt {
            // The PAT after reset: 0 write back, 1 write through, 3 uncacheable.
            pat_index: match attrs.memory_type {
                MemoryType::WriteBack => 0,
                MemoryType::WriteThrough => 1,
                _ => 3,
            },
        }
    }
}

/// The processor's walk to a leaf, and to a part of it.
fn leaf_as_walked<F: Processor>(input: &Input, setup: ProcessorSetup) {
    let (level, attrs) = (input.leaf.level(), input.leaf.attrs(setup.ad_bits));
    let frames = 1 << (setup.physical_bits - 12);
    let pfn = Pfn(input.leaf.pfn().0 % frames);
    let leaf = F::leaf(pfn, level, attrs);
    let walker = F::walker(setup);
    let gpa = Gpa(input.words[0] & ((1 << 48) - 1));
    let offset = gpa.0 % level.bytes();
    let walked = |level, entry, gpa, access| {
        let image = Image::leading_to::<F>(setup.root_level, level, entry);
        walker.walk(&image, Pfn(BASE).address(), gpa, guest_access(access))
    };
    for kind in 0..4 {
        let access = access(kind);
        let found = walked(level, leaf, gpa, access);
        let expected = match F::seen(F::expressed(attrs.perms), setup.mode_based_execute) {
            Ok(seen) if seen.contains(access.needs()) => Ok(level),
            Ok(_) => Err(Report::Denied),
            Err(report) => Err(report),
        };
        match found {
            Ok(found) => {
                assert_eq!(Ok(found.level), expected, "{access:?}: {attrs:?}");
                assert_eq!(found.hpa, Hpa(pfn.address().0 + offset));
                assert_eq!(found.memory_type, memory_type::<F>(attrs));
            }
            Err(WalkError::Fault(fault)) => assert_eq!(Err(F::report(fault)), expected),
            Err(WalkError::Abort(abort)) => panic!("{abort}"),
        }
        let Some(below) = level.below() else { continue };
        let index = usize::from(input.index) % 512;
        let start = gpa.0 - offset + index as u64 * below.bytes();
        let gpa = Gpa(start + gpa.0 % below.bytes());
        // With the one bit, too, that is a memory type in large leaves of one format and that no encoder sets.
        for bent in [0, 1 << 12] {
            let whole = Spte(leaf.0 ^ bent);
            let by_whole = walked(level, whole, gpa, access);
            let by_part = walked(below, F::split_child(whole, level, index), gpa, access);
            let Ok(found) = by_whole else {
                assert!(bent != 0 || by_part.is_err(), "{access:?} passes a part");
                continue;
            };
            let expected = Translation {
                level: below,
                ..found
            };
            assert_eq!(
                by_part,
                Ok(expected),
                "{access:?}: part {index} of {whole:?}"
            );
        }
    }
}

/// Whether `access` counts as a write.
fn writes(access: Access) -> bool {
    access.is_write()
}

type Found<F> = Result<Translation, WalkError<<<F as Processor>::Walker as Walker>::Fault>>;

fn walks<F: Processor>(input: &Input, setup: ProcessorSetup) {
    let image = Image(Default::default());
    for (n, (place, entry)) in input.entries.iter().take(MOST_ENTRIES).enumerate() {
        let word = match *entry {
            Entry::Word(word) => word,
            Entry::Table(to) => F::table(table_at(to)).0,
            Entry::Bent(to, bits) => F::table(table_at(to)).0 ^ (bits & bits >> 32),
            Entry::Leaf(leaf) | Entry::BentLeaf(leaf, _) => {
                let whole = F::leaf(leaf.pfn(), leaf.level(), leaf.attrs(setup.ad_bits));
                let whole = if leaf.access_tracked {
                    F::access_track(whole)
                } else {
                    whole
                };
                match *entry {
                    Entry::BentLeaf(_, bit) => whole.0 ^ 1 << (bit % 64),
                    _ => whole.0,
                }
            }
        };
        // In the order of the levels at first, so that walks get down.
        let table = if n < TABLES {
            n
        } else {
            usize::from(*place) % TABLES
        };
        image.0[table][usize::from(*place >> 4) % WORDS].set(word);
    }
    let walker = F::walker(setup);
    let root = Pfn(BASE).address();
    for &(gpa, kind) in input.walks.iter().take(MOST_WALKS) {
        let gpa = Gpa(gpa & ((1 << 52) - 1));
        let wanted = access(kind);
        let before: Vec<u64> = image.0.iter().flatten().map(Cell::get).collect();
        let quiet = walker.walk(&ReadOnly(&image), root, gpa, guest_access(wanted));
        assert!(
            image
                .0
                .iter()
                .flatten()
                .map(Cell::get)
                .eq(before.iter().copied())
        );
        let found: Found<F> = walker.walk(&image, root, gpa, guest_access(wanted));
        let flags = F::ACCESSED | F::DIRTY;
        for (&old, new) in before.iter().zip(image.0.iter().flatten()) {
            assert_eq!(old & !flags, new.get() & !flags, "more than flags changed");
            assert_eq!(old & !new.get(), 0, "a flag was cleared");
            assert!(walker.keeps_flags() || old == new.get());
        }
        // Words that stand at several places of a walk may be marked by it and read again, so the walk that left no
        // trace may differ in the flags that it reports, and in nothing else.
        match (&quiet, &found) {
            (Ok(quiet), Ok(found)) => {
                assert_eq!((quiet.hpa, quiet.level), (found.hpa, found.level));
                assert_eq!(quiet.permissions, found.permissions);
                assert_eq!(found.hpa.0 & 0xfff, gpa.0 & 0xfff);
                assert!(
                    found
                        .permissions
                        .contains(walker.needs(guest_access(wanted)))
                );
                if walker.keeps_flags() {
                    assert!(found.accessed && (found.dirty || !writes(wanted)));
                }
            }
            (quiet, found) => assert_eq!(quiet, found),
        }
        let after: Vec<u64> = image.0.iter().flatten().map(Cell::get).collect();
        let again: Found<F> = walker.walk(&image, root, gpa, guest_access(wanted));
        assert_eq!(again, found, "a second walk");
        assert!(image.0.iter().flatten().map(Cell::get).eq(after));
        if let Err(WalkError::Fault(fault)) = found {
            reported::<F>(fault, wanted);
        }
    }
    // Kinds of access that only the processor makes end as well.
    for (&(gpa, _), kind) in input.walks.iter().zip(GuestAccess::ALL) {
        let _ = walker.walk(&image, root, Gpa(gpa & ((1 << 52) - 1)), kind);
    }
}

/// What an embedder reads out of the report is what the guest did.
fn reported<F: Processor>(fault: <F::Walker as Walker>::Fault, wanted: Access) {
    let Some(raw) = F::raw_code(fault) else {
        assert_eq!(F::report(fault), Report::Malformed);
        return;
    };
    let code = F::fault_code(raw);
    assert_eq!(code.access.is_write(), wanted.is_write());
    assert_eq!(code.access.is_execute(), wanted.is_execute());
    assert_eq!(code.present, F::report(fault) != Report::Absent);
    assert_eq!(code.reserved, F::report(fault) == Report::Malformed);
}

fn check<F: Processor>(input: &Input) {
    let setup = ProcessorSetup {
        root_level: if input.five_levels {
            Level::L5
        } else {
            Level::L4
        },
        physical_bits: 36 + u32::from(input.physical_bits) % 17,
        ad_bits: if input.software_ad {
            AdBits::Software
        } else {
            AdBits::Processor
        },
        mode_based_execute: input.mode_based_execute,
    };
    codecs::<F>(input, setup);
    walks::<F>(input, setup);
}

fuzz_target!(|input: Input| {
    match input.format % 2 {
        0 => check::<Ept>(&input),
        _ => check::<Npt>(&input),
    }
});
