//! Where the content of pages comes from.
//!
//! Protocol. A source is asked for each page once: the table's entry is frozen while it is, so that nobody else asks for the
//! same. It may sleep. It names an address from which the kernel reads; that is good until its callback returns.

use crate::memory::Memory;
use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

/// Where the content of pages comes from.
pub trait Source: Send + Sync + 'static {
    /// Bytes that there are.
    fn len(&self) -> u64;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `fill` once, with the address in this process of the `len` bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// The source's own; then `fill` has not been called.
    fn with(&self, offset: u64, len: u64, fill: &mut dyn FnMut(u64)) -> io::Result<()>;
}

/// A snapshot in memory: a file that is mapped, or one that was made up.
#[derive(Debug)]
pub struct Snapshot(Memory);

impl Snapshot {
    /// Maps a file.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn open(path: &Path) -> io::Result<Self> {
        Memory::open(&File::open(path)?).map(Self)
    }

    /// The content of some memory.
    pub fn of(memory: Memory) -> Self {
        Self(memory)
    }
}

impl Source for Snapshot {
    fn len(&self) -> u64 {
        self.0.len()
    }

    #[inline]
    fn with(&self, offset: u64, len: u64, fill: &mut dyn FnMut(u64)) -> io::Result<()> {
        if offset > self.0.len() || len > self.0.len() - offset {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        fill(self.0.address() + offset);
        Ok(())
    }
}

/// A source that takes its time for each page: a remote store.
#[derive(Debug)]
pub struct Remote<S> {
    inner: S,
    delay: Duration,
}

impl<S: Source> Remote<S> {
    /// `inner`, after sleeping for `delay`.
    pub fn new(inner: S, delay: Duration) -> Self {
        Self { inner, delay }
    }
}

impl<S: Source> Source for Remote<S> {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn with(&self, offset: u64, len: u64, fill: &mut dyn FnMut(u64)) -> io::Result<()> {
        std::thread::sleep(self.delay);
        self.inner.with(offset, len, fill)
    }
}
