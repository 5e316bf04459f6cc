//! The other end, for tests and measurements: a program that plays the VMM.
//!
//! Protocol. It maps memory, registers all of it, hands the descriptor over, and reads and writes words as a guest would. What
//! the snapshot holds at each place follows from the place ([`word`]), so that every word that is read is checked.

use crate::memory::{Kind, Memory, word};
use crate::protocol::{self, Extent, Hello, Region};
use crate::sys::{Uffd, mode};
use std::io;
use std::os::unix::net::UnixStream;

/// How the VMM is to be.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Its memory.
    pub kind: Kind,
    /// Bytes of it.
    pub len: u64,
    /// Features of its userfaultfd ([`features`](crate::sys::features)).
    pub features: u64,
    /// Whether writes are to be tracked.
    pub track_writes: bool,
    /// Whether pages are to be put into its file and mapped.
    pub by_file: bool,
    /// Whether its userfaultfd is one that blocks.
    pub blocking: bool,
}

impl Shape {
    /// Plain memory.
    pub const fn new(kind: Kind, len: u64) -> Self {
        Self {
            kind,
            len,
            features: 0,
            track_writes: false,
            by_file: false,
            blocking: false,
        }
    }
}

/// A program that plays the VMM.
pub struct Vmm {
    shape: Shape,
    // Before the memory, in the order in which they are dropped: whoever unmaps waits until the report of it is read, and a
    // handler may be gone.
    uffd: Uffd,
    memory: Memory,
    removed: Vec<Extent>,
}

impl Vmm {
    /// Maps memory and registers it.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn new(shape: Shape) -> io::Result<Self> {
        let memory = Memory::new(shape.kind, shape.len)?;
        let uffd = match shape.blocking {
            true => Uffd::blocking(shape.features)?,
            false => Uffd::new(shape.features)?,
        };
        let mut how = mode::MISSING;
        if shape.track_writes {
            how |= mode::WP;
        }
        if shape.by_file {
            how |= mode::MINOR;
        }
        uffd.register(memory.address(), memory.len(), how)?;
        Ok(Self {
            shape,
            uffd,
            memory,
            removed: Vec::new(),
        })
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The same, to be moved or cut.
    pub fn memory_mut(&mut self) -> &mut Memory {
        &mut self.memory
    }

    /// What it says of its memory: in two regions, if that is large enough, as a VM has them below and above 4 GiB.
    pub fn regions(&self) -> Vec<Region> {
        let page = self.shape.kind.page();
        let half = (self.memory.len() / 2) & !(page - 1);
        let base = self.memory.address();
        let region = |start: u64, end: u64| {
            let mut region = Region::new(base + start, end - start, start).with_pages(page);
            region.track_writes = self.shape.track_writes;
            let inside = self.removed.iter().filter_map(|extent| {
                let from = extent.start.max(start);
                let to = (extent.start + extent.len).min(end);
                (from < to).then(|| Extent {
                    start: from - start,
                    len: to - from,
                })
            });
            region.removed = inside.collect();
            region
        };
        if half == 0 {
            return vec![region(0, self.memory.len())];
        }
        vec![region(0, half), region(half, self.memory.len())]
    }

    /// Says so over a connection.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn introduce(&self, stream: &UnixStream) -> io::Result<()> {
        let file = self.memory.file().filter(|_| self.shape.by_file);
        protocol::send(stream, &self.regions(), &self.uffd, file)
    }

    /// The same without a connection, for a handler in this process.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn hello(&self) -> io::Result<Hello> {
        let file = self.memory.file().filter(|_| self.shape.by_file);
        Ok(Hello {
            regions: self.regions(),
            uffd: self.uffd.try_clone()?,
            memory: file.map(|file| file.try_clone()).transpose()?,
        })
    }

    /// Gives pages up, and remembers it for the next handler.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn give_up(&mut self, start: u64, len: u64) -> io::Result<()> {
        // Before: a handler that dies between has not been told.
        self.removed.push(Extent { start, len });
        self.memory.give_up(start, len)
    }

    /// Reads every word from `start` to `end`; returns how many are not those of the snapshot.
    pub fn wrong_words(&self, start: u64, end: u64) -> u64 {
        let words = (start..end).step_by(8);
        words
            .filter(|&at| self.memory.load(at) != word(at, 0))
            .count() as u64
    }
}

/// A snapshot of so many bytes, made up.
///
/// # Errors
///
/// The system's.
pub fn snapshot(len: u64) -> io::Result<Memory> {
    let memory = Memory::new(Kind::Anonymous, len)?;
    for at in (0..len).step_by(8) {
        memory.store(at, word(at, 0));
    }
    Ok(memory)
}
