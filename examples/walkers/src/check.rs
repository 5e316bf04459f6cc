//! One probe: what the reference walker says is to happen, what the processor did, and whether they agree.

use crate::guest::{self, OWN, Way};
use crate::memory::{self, Copy, TABLES};
use crate::tables::{Tables, control};
use crate::{Random, mix};
use alloc::vec::Vec;
use machine::println;
use serde::Serialize;
use tdp::{AdBits, Format, Gpa, Hpa, Level, Pfn, Spte};
use tdp_arch::walker::{GuestAccess, ReadOnly, WalkError, Walker};

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

    /// Bits of an entry of this level with this value that the manual reserves and this processor does not look at. No entry
    /// is spoilt so that it has one.
    fn unchecked(level: Level, entry: u64) -> u64;

    /// Whether this processor can, after a walk that faulted, hold `live` in an entry of this level on the way where the
    /// reference, which sets the accessed bit in each entry that points to a table before it goes on, has `reference`. Asked
    /// only if the two differ in the accessed bit and in nothing else.
    fn marks_otherwise(&self, level: Level, live: u64, reference: u64) -> bool;

    /// Whether this processor is known to report `seen` where the manual has `wanted`. Asked only if they differ.
    fn reports_otherwise(&self, seen: Seen, wanted: Seen) -> bool;

    /// Whether this processor walks again when it has to set a flag in an entry of a guest's page table, as for a write. One
    /// that does not sets the flag wherever the entry could be read.
    const WALKS_FOR_FLAGS: bool = true;

    /// Makes an access to a linear address with nothing cached, as the guest's user or its kernel. A write writes `value`.
    fn access(
        &mut self,
        pointer: u64,
        linear: u64,
        access: GuestAccess,
        user: bool,
        value: u64,
    ) -> Seen;

    /// What the reference walker's fault looks like when this processor reports it.
    fn reported(&self, fault: <Self::Walker as Walker>::Fault) -> Seen;
}

/// Differences that are known, by what differs.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Named {
    /// What is reported of a fault: [`Processor::reports_otherwise`].
    pub codes: u64,
    /// An accessed bit after a fault: [`Processor::marks_otherwise`].
    pub accessed: u64,
    /// A walk that is not made: [`Processor::WALKS_FOR_FLAGS`].
    pub walks: u64,
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
    /// Accesses of the guest's user.
    pub by_user: u64,
    /// Entries of guests' page tables that were read.
    pub table_entries: u64,
    /// Faults on them.
    pub table_faults: u64,
    /// Those of them that a mere read of the same word would not have met: the access counts as a write.
    pub tables_not_writable: u64,
    /// Such entries in which the guest's access had to set a flag, and has.
    pub table_flags_set: u64,
    /// Probes in which the processor has set an accessed or dirty bit.
    pub flags_set: u64,
    /// Entries that were spoilt.
    pub spoilt: u64,
    /// Accesses that were not made: a spoilt entry led out of the memory that there is, two entries or an entry and the word
    /// fell together, or the manual does not say which of two faults comes first.
    pub skipped: u64,
    /// Differences from the reference that this processor is known for, and that are named with it.
    pub named_differences: Named,
    /// Probes after which processor and reference differed.
    pub mismatches: u64,
}

impl Figures {
    /// Whether all agreed, and there was something of every kind to agree upon.
    pub fn is_good(&self) -> bool {
        let kinds = [
            self.faults,
            self.malformed,
            self.by_user,
            self.table_entries,
            self.table_faults,
            self.tables_not_writable,
            self.table_flags_set,
            self.flags_set,
            self.spoilt,
        ];
        self.mismatches == 0 && kinds.iter().chain(&self.reached).all(|&count| count > 0)
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
        guest::load(processor.call());
        let tables = Tables::<P::Format>::build(&mut random, processor.physical_bits());
        // Sets what the guest's own accesses set, on the way to its program and page tables, once and for all.
        for access in [GuestAccess::Read, GuestAccess::Write] {
            let seen = processor.access(tables.pointer, OWN.0, access, false, 0);
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

/// Flips a bit or two of an entry on the way to some address, none of which leads to the pages of the guest's in region 0.
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
    let spoilt = memory::load(at) ^ bits;
    if spoilt & P::unchecked(level, spoilt) != 0 {
        return false;
    }
    memory::spoil(at, bits);
    true
}

/// An address to probe, in most cases one that a walk for `access` gets to.
fn place<P: Processor>(
    walker: &P::Walker,
    tables: &Tables<P::Format>,
    access: GuestAccess,
    random: &mut Random,
) -> Gpa {
    let root = walker.at_root(tables.root.address());
    let tries = random.pick(&[1, 24, 24, 24]);
    let mut gpa = tables.probe_at(random);
    for _ in 1..tries {
        let found = walker.walk_on(&ReadOnly(Copy), root, gpa, access, |_| {});
        if found.is_ok_and(|found| is_free(found.hpa)) {
            break;
        }
        gpa = tables.probe_at(random);
    }
    gpa
}

/// Whether a probe may use the word there.
fn is_free(hpa: Hpa) -> bool {
    memory::is_data(hpa) && hpa.pfn().0 < control(0).0
}

/// Accesses to guest memory that one access of the guest consists of, in their order, and what they are to reach.
#[derive(Default)]
struct Plan {
    accesses: Vec<(Gpa, GuestAccess)>,
    /// The words that they reach, each once. The last access reaches the last one.
    words: Vec<Hpa>,
    /// Accesses left out, because this processor does not make them.
    left_out: u64,
}

impl Plan {
    /// Asks the reference without a trace. `None` if some word is not there, or not apart from the others, or if the manual
    /// does not say which of two accesses comes first and both fault.
    fn new<P: Processor>(
        walker: &P::Walker,
        root: Hpa,
        way: &Way,
        gpa: Gpa,
        access: GuestAccess,
    ) -> Option<Self> {
        let root = walker.at_root(root);
        let look = |at: Gpa, access| walker.walk_on(&ReadOnly(Copy), root, at, access, |_| {});
        let mut plan = Self::default();
        for (at, part) in way.accesses(gpa, access) {
            let for_flags = part == GuestAccess::TableWrite;
            match look(at, part) {
                Ok(found) => {
                    // The flags are in a word that has been read.
                    if !for_flags {
                        if !is_free(found.hpa) || plan.words.contains(&found.hpa) {
                            return None;
                        }
                        plan.words.push(found.hpa);
                    }
                    plan.accesses.push((at, part));
                }
                Err(WalkError::Fault(_)) if for_flags && !P::WALKS_FOR_FLAGS => plan.left_out += 1,
                Err(WalkError::Fault(_)) => {
                    if for_flags && look(gpa, access).is_err() {
                        return None;
                    }
                    plan.accesses.push((at, part));
                    break;
                }
                Err(WalkError::Abort(_)) => return None,
            }
        }
        Some(plan)
    }
}

fn check<P: Processor>(
    processor: &mut P,
    tables: &Tables<P::Format>,
    random: &mut Random,
    figures: &mut Figures,
) {
    let walker = processor.walker(tables.ad_bits);
    let user = random.below(3) == 0;
    let fetch = if user {
        GuestAccess::UserFetch
    } else {
        GuestAccess::Fetch
    };
    let access = random.pick(&[GuestAccess::Read, GuestAccess::Write, fetch]);
    let (gpa, way) = if random.below(2) == 0 {
        let gpa = tables.probe_at(random);
        (gpa, Way::plain(gpa))
    } else {
        let gpa = place::<P>(&walker, tables, access, random);
        let way = Way::through(random, gpa, access, |random| {
            place::<P>(&walker, tables, GuestAccess::TableRead, random)
        });
        (gpa, way)
    };
    let Some(plan) = Plan::new::<P>(&walker, tables.root.address(), &way, gpa, access) else {
        figures.skipped += 1;
        return;
    };
    for (entry, &word) in way.entries.iter().zip(&plan.words) {
        memory::store(word, entry.value);
    }

    // The reference makes them, of which only the last one can fault.
    let root = walker.at_root(tables.root.address());
    let look = |at: Gpa, access| walker.walk_on(&ReadOnly(Copy), root, at, access, |_| {});
    let mut last = None;
    for &(at, part) in &plan.accesses {
        let ended = walker.walk_on(&Copy, root, at, part, |_| {});
        if part.is_to_paging_structure() && ended.is_err() {
            figures.table_faults += 1;
            let readable = look(at, GuestAccess::Read).is_ok();
            figures.tables_not_writable += u64::from(readable);
        }
        figures.table_entries += u64::from(part == GuestAccess::TableRead && ended.is_ok());
        last = Some(ended);
    }
    let expected = last.expect("there is one at least");
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
    if let (Some(hpa), true) = (hpa, access.is_fetch()) {
        memory::store(hpa, a | b << 8 | c << 16);
    }
    let flags = || {
        let sums = plan.accesses.iter().map(|&(at, _)| flags::<P>(tables, at));
        sums.fold(0, |sum: u64, flags| sum.rotate_left(1) ^ flags)
    };
    let before = flags();
    let mut seen = processor.access(tables.pointer, way.linear, access, user, value);
    figures.flags_set += u64::from(flags() != before);
    figures.by_user += u64::from(user);
    figures.probes += 1;
    if let Some(hpa) = hpa {
        if access == GuestAccess::Write && memory::load(hpa) != value {
            seen = Seen::Other(memory::load(hpa));
        }
        for (entry, &word) in way.entries.iter().zip(&plan.words) {
            let (live, marked) = (memory::load(word), entry.value | entry.missing);
            if live != marked && seen == wanted {
                (seen, wanted) = (Seen::Entry(live), Seen::Entry(marked));
            }
            figures.table_flags_set += u64::from(entry.missing != 0);
        }
        figures.named_differences.walks += plan.left_out;
    } else {
        let reserved = matches!(wanted, Seen::Misconfigured { .. })
            || matches!(wanted, Seen::Fault { code, .. } if P::Format::fault_code(code).reserved);
        figures.malformed += u64::from(reserved);
        figures.faults += u64::from(!reserved);
    }
    plan.words
        .iter()
        .for_each(|&word| memory::store(word, word.0));
    if seen != wanted && processor.reports_otherwise(seen, wanted) {
        figures.named_differences.codes += 1;
        seen = wanted;
    }
    // What the copy holds says where the ways lead; what the processor walked has to be the same there. The walk that faulted
    // comes after those that did not, and the page that was not looked up any more comes last.
    let copy = |hpa: Hpa| tdp_arch::walker::PhysicalMemory::load(&Copy, hpa);
    let made = plan.accesses.len();
    let ways = plan.accesses.iter().map(|&(at, _)| at).chain([gpa]);
    for (number, at) in ways.clone().enumerate() {
        let faulted = expected.is_err() && number + 1 == made;
        for (entry, level) in path::<P::Format>(tables.root, at, copy) {
            let (live, reference) = (memory::load(entry), copy(entry).unwrap_or(0));
            if live == reference {
                continue;
            }
            memory::store(entry, reference);
            let only_accessed = live ^ reference == P::Format::ACCESSED;
            if faulted && only_accessed && processor.marks_otherwise(level, live, reference) {
                figures.named_differences.accessed += 1;
            } else if seen == wanted {
                (seen, wanted) = (Seen::Entry(live), Seen::Entry(reference));
            }
        }
    }
    if seen != wanted {
        figures.mismatches += 1;
        if figures.mismatches <= 8 {
            let who = if user { "user" } else { "kernel" };
            println!("{access:?} of {gpa} by the {who}: {seen:x?}, the reference says {wanted:x?}");
            for entry in &way.entries {
                println!("  through {entry:x?}");
            }
            for at in ways {
                println!("  {at}:");
                for (entry, level) in path::<P::Format>(tables.root, at, copy) {
                    println!("    {level} at {entry}: {:#018x}", memory::load(entry));
                }
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
