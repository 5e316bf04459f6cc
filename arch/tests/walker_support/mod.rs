//! Host memory for walks, and trees written entry by entry from the bit numbers of the manuals.
#![allow(dead_code)]

pub(crate) mod cpu;
pub(crate) mod ept;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use tdp_arch::walker::PhysicalMemory;
use tdp_arch::{Gpa, Hpa, Level};

/// Where [`chain`] puts the root; the table of each lower level is one page further.
pub(crate) const ROOT: Hpa = Hpa(0x10_0000);

/// Words of 8 bytes; one that was never written reads as zero. There is no memory from `end` on.
#[derive(Debug)]
pub(crate) struct Memory {
    words: RefCell<BTreeMap<u64, u64>>,
    pub(crate) end: u64,
    pub(crate) loads: Cell<u64>,
    pub(crate) exchanges: Cell<u64>,
}

impl Memory {
    pub(crate) fn new() -> Self {
        Self {
            words: RefCell::default(),
            end: 1 << 52,
            loads: Cell::new(0),
            exchanges: Cell::new(0),
        }
    }

    pub(crate) fn get(&self, hpa: u64) -> u64 {
        self.words.borrow().get(&hpa).copied().unwrap_or(0)
    }

    pub(crate) fn set(&self, hpa: u64, value: u64) {
        self.words.borrow_mut().insert(hpa, value);
    }

    pub(crate) fn snapshot(&self) -> BTreeMap<u64, u64> {
        self.words.borrow().clone()
    }
}

impl PhysicalMemory for Memory {
    fn load(&self, hpa: Hpa) -> Option<u64> {
        assert_eq!(hpa.0 % 8, 0, "unaligned load");
        self.loads.set(self.loads.get() + 1);
        (hpa.0 < self.end).then(|| self.get(hpa.0))
    }

    fn compare_exchange(&self, hpa: Hpa, current: u64, new: u64) -> Result<(), u64> {
        assert!(hpa.0 < self.end, "exchange where there is no memory");
        self.exchanges.set(self.exchanges.get() + 1);
        let found = self.get(hpa.0);
        if found != current {
            return Err(found);
        }
        self.set(hpa.0, new);
        Ok(())
    }
}

/// Address of `gpa`'s entry of `level` in a table at `table`: 9 bits of the address for each level, from bit 12 up.
pub(crate) fn entry_address(table: u64, level: Level, gpa: Gpa) -> u64 {
    let shift = 12 + 9 * (u32::from(level.number()) - 1);
    table + 8 * (gpa.0 >> shift & 0x1ff)
}

/// Address of the table of `level` in a [`chain`] with a root of `root_level`.
pub(crate) fn table_of(root_level: Level, level: Level) -> u64 {
    ROOT.0 + 0x1000 * u64::from(root_level.number() - level.number())
}

/// Writes the entries on the way to `gpa`, root first. All but the last get the address of the next table.
pub(crate) fn chain(memory: &Memory, root_level: Level, gpa: Gpa, entries: &[u64]) {
    let mut level = root_level;
    for (depth, &entry) in entries.iter().enumerate() {
        let table = table_of(root_level, level);
        let last = depth + 1 == entries.len();
        memory.set(
            entry_address(table, level, gpa),
            if last {
                entry
            } else {
                entry | (table + 0x1000)
            },
        );
        if !last {
            level = level.below().expect("more entries than levels");
        }
    }
}

/// A fresh memory with one chain of a four-level tree.
pub(crate) fn memory_with(gpa: Gpa, entries: &[u64]) -> Memory {
    let memory = Memory::new();
    chain(&memory, Level::L4, gpa, entries);
    memory
}

/// Value of `gpa`'s entry of `level` in a chain of a four-level tree.
pub(crate) fn entry(memory: &Memory, level: Level, gpa: Gpa) -> u64 {
    memory.get(entry_address(table_of(Level::L4, level), level, gpa))
}
