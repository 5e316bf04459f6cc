//! The guest: its programs, its page tables, and ways to an address through page tables that fault like any other memory.
//!
//! Linear addresses below 1 TiB are guest-physical ones: tables in region 0 map them to themselves by leaves of 1 GiB, and
//! accesses to those tables never fault. The 512 GiB after them belong to the probe that is made: its [`Way`] puts one to
//! three tables wherever guest memory may be, and only the entry of the root that leads there lies in region 0.

use crate::Random;
use crate::memory;
use crate::tables::control;
use alloc::vec::Vec;
use tdp::{Gpa, Hpa};
use tdp_arch::walker::GuestAccess;

/// Offsets of the guest's programs in its page 1.
pub const READ: u64 = 0x1000;
/// As above.
pub const WRITE: u64 = 0x1010;
/// As above.
pub const FETCH: u64 = 0x1020;
/// The guest's root table.
pub const CR3: u64 = 0x2000;
/// A word of the guest's own that can be read and written.
pub const OWN: Gpa = Gpa(0x5000);

/// The program that makes an access.
pub fn program(access: GuestAccess) -> u64 {
    match access {
        GuestAccess::Read => READ,
        GuestAccess::Write => WRITE,
        _ => FETCH,
    }
}

/// Entry of the root that ways begin with.
const WINDOW: u64 = 2;

/// Bits of the guest's entries: present, writable and the user's; accessed; dirty; maps a large page.
const OPEN: u64 = 0b111;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;

fn put(gpa: u64, value: u64) {
    memory::store(Hpa(control(gpa >> 12).address().0 | gpa & 0xfff), value);
}

/// Writes the guest's programs, and page tables that map the first TiB to itself. The programs end with `call`.
pub fn load(call: [u8; 3]) {
    let [a, b, c] = call.map(u64::from);
    let call = a | b << 8 | c << 16;
    put(READ, 0x07_8b48 | call << 24); // mov (%rdi), %rax
    put(WRITE, 0x37_8948 | call << 24); // mov %rsi, (%rdi)
    put(FETCH, 0xe7ff); // jmp *%rdi
    for half in 0..WINDOW {
        let table = CR3 + 0x1000 * (half + 1);
        put(CR3 + 8 * half, table | OPEN);
        for leaf in 0..512 {
            let page = half << 39 | leaf << 30;
            put(table + 8 * leaf, page | OPEN | ACCESSED | DIRTY | LARGE);
        }
    }
}

/// An entry of a guest's page table.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Where it lies.
    pub at: Gpa,
    /// What it holds.
    pub value: u64,
    /// Flags that the access has to set in it.
    pub missing: u64,
}

/// What a linear address leads through.
#[derive(Clone, Debug, Default)]
pub struct Way {
    /// The linear address.
    pub linear: u64,
    /// Entries in memory that may fault, the first one first.
    pub entries: Vec<Entry>,
}

impl Way {
    /// The way through tables of region 0 alone.
    pub fn plain(gpa: Gpa) -> Self {
        Self {
            linear: gpa.0,
            entries: Vec::new(),
        }
    }

    /// A way through one to three tables, each in the page that `place` names. The last entry may lack flags that `access`
    /// has to set: the others have theirs, for whether those are set before or after the next table is read is nowhere said.
    pub fn through(
        random: &mut Random,
        gpa: Gpa,
        access: GuestAccess,
        mut place: impl FnMut(&mut Random) -> Gpa,
    ) -> Self {
        let mut way = Self {
            linear: WINDOW << 39,
            entries: Vec::new(),
        };
        let depth = 1 + random.below(3);
        for table in 0..depth {
            let page = place(random).0 & !0xfff;
            let pointer = page | OPEN | ACCESSED;
            match way.entries.last_mut() {
                Some(above) => above.value = pointer,
                None => put(CR3 + 8 * WINDOW, pointer),
            }
            let index = random.below(512);
            way.linear |= index << (30 - 9 * table);
            way.entries.push(Entry {
                at: Gpa(page | (index * 8)),
                value: 0,
                missing: 0,
            });
        }
        let within = (1 << (39 - 9 * depth)) - 1;
        way.linear |= gpa.0 & within;
        let flags = random.pick(&[ACCESSED | DIRTY, ACCESSED | DIRTY, ACCESSED, 0]);
        let wanted = match access {
            GuestAccess::Write => ACCESSED | DIRTY,
            _ => ACCESSED,
        };
        if let Some(leaf) = way.entries.last_mut() {
            let large = if depth < 3 { LARGE } else { 0 };
            leaf.value = gpa.0 & !within | OPEN | large | flags;
            leaf.missing = wanted & !flags;
        }
        way
    }

    /// The accesses to guest memory that lead to `access` of `gpa`, in their order.
    pub fn accesses(&self, gpa: Gpa, access: GuestAccess) -> Vec<(Gpa, GuestAccess)> {
        let mut all = Vec::new();
        for entry in &self.entries {
            all.push((entry.at, GuestAccess::TableRead));
            if entry.missing != 0 {
                all.push((entry.at, GuestAccess::TableWrite));
            }
        }
        all.push((gpa, access));
        all
    }
}
