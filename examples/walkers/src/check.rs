//! One probe: what the reference walker says is to happen, what the processor did, and whether they agree.

use crate::memory::{self, Copy, TABLES};
use crate::tables::{Tables, control};
use crate::{Random, mix};
use machine::println;
use serde::Serialize;
use tdp::{AdBits, Format, Gpa, Hpa, Level, Pfn, Spte};
use tdp_arch::walker::{GuestAccess, ReadOnly, Translation, WalkError, Walker};

/// How an access ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// It was made. For a read, the word that was read.
    Done(Option<u64>),
    /// A fault with a code, at an address.
    Fault {
        /// What the processor reported.
        code: u64,
        /// Where.
        gpa: u64,
    },
    /// The table makes no sense, says a processor that has a report of its own for that.
    Misconfigured {
        /// Where.
        gpa: u64,
    },
    /// An entry on the way holds this afterwards.
    Entry(u64),
    /// Something else.
    Other(u64),
}

/// A processor that walks tables of a format.
pub trait Processor {
    /// The format.
    type Format: Format;
    /// The reference.
    type Walker: Walker;

    /// The reference walker that is like this processor.
    fn walker(&self, ad_bits: AdBits) -> Self::Walker;

    /// Bits of physical address.
    fn physical_bits(&self) -> u32;

    /// What the guest's program ends with: its call of the host.
    fn call(&self) -> [u8; 3];

    /// Bits of entries of the root that the manual reserves and this processor does not look at.
    const UNCHECKED_IN_ROOT: u64 = 0;

    /// Whether this processor, when an access faults, can have another accessed bit in an entry of this level on the way than
    /// the reference, which sets it in each entry that points to a table before it goes on.
    fn marks_otherwise(&self, level: Level) -> bool;

    /// Makes an access with nothing cached. A write writes `value`.
    fn access(&mut self, pointer: u64, gpa: Gpa, access: GuestAccess, value: u64) -> Seen;

    /// What the reference walker's fault looks like when this processor reports it.
    fn reported(&self, fault: <Self::Walker as Walker>::Fault) -> Seen;
}

/// What has been checked.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Figures {
    /// Tables built.
    pub rounds: u64,
    /// Accesses made.
    pub probes: u64,
    /// Accesses that reached their word, by the level of the leaf.
    pub reached: [u64; 3],
    /// Faults for want of an entry, and for want of a permission.
    pub faults: u64,
    /// Faults because an entry makes no sense.
    pub malformed: u64,
    /// Accessed or dirty bits that the processor has set.
    pub flags_set: u64,
    /// Entries that were spoilt.
    pub spoilt: u64,
    /// Accesses that were not made, because a spoilt entry led out of the memory that there is.
    pub skipped: u64,
    /// Differences from the reference that this processor is known for, and that are named with it.
    pub named_differences: u64,
    /// Probes after which processor and reference differed.
    pub mismatches: u64,
}

impl Figures {
    /// Whether all agreed, and there was something of every kind to agree upon.
    pub fn is_good(&self) -> bool {
        let kinds = [self.faults, self.malformed, self.flags_set, self.spoilt];
        self.mismatches == 0 && kinds.iter().chain(&self.reached).all(|&count| count > 0)
    }
}

/// Offsets of the guest's programs in its page 1.
pub const READ: u64 = 0x1000;
/// As above.
pub const WRITE: u64 = 0x1010;
/// As above.
pub const FETCH: u64 = 0x1020;
/// The guest's root table.
pub const CR3: u64 = 0x2000;
/// A word of the guest's own that can be read and written.
const OWN: Gpa = Gpa(0x5000);

/// Writes the guest's programs, and page tables that map the first TiB to itself by leaves of 1 GiB.
fn load_guest(call: [u8; 3]) {
    let [a, b, c] = call.map(u64::from);
    let call = a | b << 8 | c << 16;
    let put = |gpa: u64, value: u64| {
        memory::store(Hpa(control(gpa >> 12).address().0 | gpa & 0xfff), value)
    };
    put(READ, 0x07_8b48 | call << 24); // mov (%rdi), %rax
    put(WRITE, 0x37_8948 | call << 24); // mov %rsi, (%rdi)
    put(FETCH, 0xe7ff); // jmp *%rdi
    for half in 0..2u64 {
        let table = CR3 + 0x1000 * (half + 1);
        put(CR3 + 8 * half, table | 7);
        for leaf in 0..512 {
            put(table + 8 * leaf, (half << 39 | leaf << 30) | 0xe7);
        }
    }
}

/// Checks `rounds` tables by `probes` accesses each.
///
/// # Panics
///
/// If the guest cannot even read and write its own memory.
pub fn run<P: Processor>(processor: &mut P, seed: u64, rounds: u64, probes: u64) -> Figures {
    let mut random = Random(seed);
    let mut figures = Figures::default();
    memory::fill_data();
    for _ in 0..rounds {
        load_guest(processor.call());
        let tables = Tables::<P::Format>::build(&mut random, processor.physical_bits());
        // Sets what the guest's own accesses set, on the way to its program and page tables, once and for all.
        for access in [GuestAccess::Read, GuestAccess::Write] {
            let seen = processor.access(tables.pointer, OWN, access, 0);
            assert!(
                matches!(seen, Seen::Done(_)),
                "the guest does not run: {seen:?}"
            );
        }
        memory::copy_tables();
        for probe in 0..probes {
            // The first part of the probes finds the tables as the library left them.
            if probe >= probes / 4 && probe % 2 == 0 {
                figures.spoilt += u64::from(spoil::<P>(&tables, &mut random));
            }
            check(processor, &tables, &mut random, &mut figures);
        }
        let differing = memory::differing_tables();
        if differing > 0 {
            println!("{differing} words of tables differ at the end of the round");
            figures.mismatches += 1;
        }
        memory::restore_tables();
        figures.rounds += 1;
    }
    figures
}

/// The entries on the way to an address: where each lies, its level.
fn path<F: Format>(
    root: Pfn,
    gpa: Gpa,
    load: impl Fn(Hpa) -> Option<u64>,
) -> impl Iterator<Item = (Hpa, Level)> {
    let mut next = Some((root, Level::L4));
    core::iter::from_fn(move || {
        let (table, level) = next.take()?;
        let at = Hpa(table.address().0 + 8 * level.index(gpa.gfn()) as u64);
        let entry = Spte(load(at)?);
        if let Some(below) = level.below()
            && !F::is_leaf(entry, level)
            && TABLES.contains(&F::pfn(entry))
        {
            next = Some((F::pfn(entry), below));
        }
        Some((at, level))
    })
}

/// Flips a bit or two of an entry on the way to some address, none of which leads to the guest's own pages.
fn spoil<P: Processor>(tables: &Tables<P::Format>, random: &mut Random) -> bool {
    let gpa = tables.probe_at(random);
    let live = |hpa: Hpa| Some(memory::load(hpa));
    let own = |at: Hpa| path::<P::Format>(tables.root, OWN, live).any(|(own, _)| own == at);
    let count = path::<P::Format>(tables.root, gpa, live).count() as u64;
    let chosen = path::<P::Format>(tables.root, gpa, live).nth(random.below(count) as usize);
    let Some((at, level)) = chosen.filter(|&(at, _)| !own(at)) else {
        return false;
    };
    let mut bits = 0;
    for _ in 0..1 + random.below(2) {
        bits |= 1u64
            << match random.below(4) {
                0 => 52 + random.below(12),
                // Of the address, beyond what most processors have.
                1 => 44 + random.below(8),
                2 => 12 + random.below(9),
                _ => random.below(12),
            };
    }
    if level == Level::L4 {
        bits &= !P::UNCHECKED_IN_ROOT;
    }
    memory::spoil(at, bits);
    true
}

fn check<P: Processor>(
    processor: &mut P,
    tables: &Tables<P::Format>,
    random: &mut Random,
    figures: &mut Figures,
) {
    let walker = processor.walker(tables.ad_bits);
    let gpa = tables.probe_at(random);
    let access = random.pick(&[GuestAccess::Read, GuestAccess::Write, GuestAccess::Fetch]);
    let root = walker.at_root(tables.root.address());
    let walk = |read_only: bool| -> Result<Translation, WalkError<_>> {
        if read_only {
            walker.walk_on(&ReadOnly(Copy), root, gpa, access, |_| {})
        } else {
            walker.walk_on(&Copy, root, gpa, access, |_| {})
        }
    };
    // Whether it can be made at all is asked without a trace.
    match walk(true) {
        Ok(translation)
            if memory::is_data(translation.hpa) && translation.hpa.pfn().0 < control(0).0 => {}
        Err(WalkError::Fault(_)) => {}
        Ok(_) | Err(WalkError::Abort(_)) => {
            figures.skipped += 1;
            return;
        }
    }
    let expected = walk(false);
    let value = mix(gpa.0 ^ random.any());
    let mut wanted = match expected {
        Ok(translation) => {
            let level = match translation.level {
                Level::L1 => 0,
                Level::L2 => 1,
                _ => 2,
            };
            figures.reached[level] += 1;
            Seen::Done((access == GuestAccess::Read).then_some(translation.hpa.0))
        }
        Err(WalkError::Fault(fault)) => processor.reported(fault),
        Err(WalkError::Abort(_)) => Seen::Other(u64::MAX),
    };
    let [a, b, c] = processor.call().map(u64::from);
    let hpa = expected.ok().map(|translation| translation.hpa);
    if let (Some(hpa), GuestAccess::Fetch) = (hpa, access) {
        memory::store(hpa, a | b << 8 | c << 16);
    }
    let before = flags::<P>(tables, gpa);
    let mut seen = processor.access(tables.pointer, gpa, access, value);
    if let Some(hpa) = hpa {
        if access == GuestAccess::Write && memory::load(hpa) != value {
            seen = Seen::Other(memory::load(hpa));
        }
        memory::store(hpa, hpa.0);
    } else {
        let reserved = matches!(wanted, Seen::Misconfigured { .. })
            || matches!(wanted, Seen::Fault { code, .. } if P::Format::fault_code(code).reserved);
        figures.malformed += u64::from(reserved);
        figures.faults += u64::from(!reserved);
    }
    figures.flags_set += u64::from(flags::<P>(tables, gpa) != before);
    figures.probes += 1;
    // What the copy holds says where the way leads; what the processor walked has to be the same there.
    let copy = |hpa: Hpa| tdp_arch::walker::PhysicalMemory::load(&Copy, hpa);
    for (at, level) in path::<P::Format>(tables.root, gpa, copy) {
        let (live, reference) = (memory::load(at), copy(at).unwrap_or(0));
        if live == reference {
            continue;
        }
        memory::store(at, reference);
        let only_accessed = live ^ reference == P::Format::ACCESSED;
        if expected.is_err() && only_accessed && processor.marks_otherwise(level) {
            figures.named_differences += 1;
        } else if seen == wanted {
            (seen, wanted) = (Seen::Entry(live), Seen::Entry(reference));
        }
    }
    if seen != wanted {
        figures.mismatches += 1;
        if figures.mismatches <= 8 {
            println!("{access:?} of {gpa}: {seen:x?}, the reference says {wanted:x?}");
            for (at, level) in path::<P::Format>(tables.root, gpa, copy) {
                println!("  {level} at {at}: {:#018x}", memory::load(at));
            }
        }
    }
}

/// The entries on the way to an address, put together.
fn flags<P: Processor>(tables: &Tables<P::Format>, gpa: Gpa) -> u64 {
    let live = |hpa: Hpa| Some(memory::load(hpa));
    path::<P::Format>(tables.root, gpa, live)
        .fold(0, |sum, (at, _)| sum.rotate_left(1) ^ memory::load(at))
}
