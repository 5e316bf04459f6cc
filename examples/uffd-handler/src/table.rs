//! The kernel's table as a protected table: only ioctls change it, one entry at a time.
//!
//! Protocol. A guest frame of the library is a page of the VMM's address space, its host frame a page of the snapshot. The
//! entry is frozen for as long as its page is being filled: while the source is asked and the kernel copies. So each page is
//! fetched once and copied once, whoever wants it: a fault, the working set, the background copy.
//!
//! Taking a page away is no call: the kernel has done it, or is about to, when it reports it. What must not happen is that a
//! copy which set out before arrives after, and brings back what was given up. The kernel refuses copies from the moment
//! when it queues a report until somebody reads it; from then on it is for this side to see to it:
//!
//! * whoever reads reports holds the [`Gate`] for writing, and counts those that are changes as *unapplied* before it lets
//!   go; whoever copies holds it for reading, and turns back if any is unapplied;
//! * a change is applied by the library's own means (`changes.rs`), which wait for every fault that began before: so a copy
//!   that passed the gate belongs to a fault that knew of every change that was read before it.
//!
//! Where the VMM reports no changes, there is no gate.

use crate::memory::{Kind, Memory};
use crate::source::Source;
use crate::sys::{Short, Uffd, features};
use std::cell::Cell;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard};
use std::{fs::File, io};
use tdp::protected::{Capabilities, Content, Drained, Failure, Inspected};
use tdp::{EntryPlace, FrozenEntry, Gfn, Level, Pfn, ProtectedTable};

/// Pages that one call of the background copy fills: its entries are frozen meanwhile, and a fault on one of them waits.
pub const RUN: usize = 16;

/// Why the kernel's table was not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A change of the address space has to be read, or applied, first.
    Changing,
    /// There is nothing registered: it is unmapped, and the report of it is on its way.
    Gone,
    /// The process is.
    Dead,
    /// The source failed.
    Source(i32),
    /// Any other error number.
    Errno(i32),
}

impl From<Short> for Refusal {
    fn from(short: Short) -> Self {
        match short.errno {
            libc::EAGAIN => Refusal::Changing,
            libc::ENOENT => Refusal::Gone,
            libc::ESRCH => Refusal::Dead,
            errno => Refusal::Errno(errno),
        }
    }
}

/// What the kernel has said of the page that is about to be filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// Nothing: nobody waits for it, and whatever the table says it may be there.
    Nothing,
    /// It is absent, and absent from the file of guest memory.
    Missing,
    /// It is in the file of guest memory, and not mapped.
    Cached,
}

thread_local! {
    static KNOWN: Cell<Known> = const { Cell::new(Known::Nothing) };
    static REFUSAL: Cell<Option<Refusal>> = const { Cell::new(None) };
}

/// Runs `fault`, which resolves a fault on a page of which the kernel has said so much.
pub(crate) fn knowing<R>(known: Known, fault: impl FnOnce() -> R) -> R {
    KNOWN.set(known);
    let result = fault();
    KNOWN.set(Known::Nothing);
    result
}

/// Why the last hook that this thread ran was refused.
pub fn last_refusal() -> Option<Refusal> {
    REFUSAL.take()
}

/// Keeps copies that set out before a change was read from arriving after it.
#[derive(Debug, Default)]
pub struct Gate {
    lock: RwLock<()>,
    unapplied: AtomicU64,
}

impl Gate {
    /// Passes it, unless a change that was read has not been applied.
    fn pass(&self) -> Result<RwLockReadGuard<'_, ()>, Refusal> {
        let guard = self
            .lock
            .read()
            .unwrap_or_else(|poison| poison.into_inner());
        // Changed only under the lock's other half, or back to what lets pass.
        match self.unapplied.load(Ordering::Acquire) {
            0 => Ok(guard),
            _ => Err(Refusal::Changing),
        }
    }

    /// Runs `read` while nothing is copied. It returns how many changes it found, which are unapplied from then on.
    pub fn shut<R>(&self, read: impl FnOnce() -> (u64, R)) -> R {
        let _guard = self
            .lock
            .write()
            .unwrap_or_else(|poison| poison.into_inner());
        let (changes, result) = read();
        self.unapplied.fetch_add(changes, Ordering::Release);
        result
    }

    /// Notes that changes have been applied.
    pub fn applied(&self, changes: u64) {
        self.unapplied.fetch_sub(changes, Ordering::Release);
    }
}

/// Counts of what is rare.
#[derive(Debug, Default)]
pub struct Counters {
    /// Pages that were there already: by another handler, before.
    pub existing: AtomicU64,
    /// Copies that a change of the address space sent back.
    pub sent_back: AtomicU64,
}

/// The table that the kernel keeps for one VMM.
pub struct KernelTable {
    pub(crate) uffd: Uffd,
    pub(crate) gate: Option<Gate>,
    pub(crate) counters: Counters,
    source: Arc<dyn Source>,
    /// Guest memory's file, if pages are to be put there and mapped.
    memory: Option<File>,
    /// Whether what the kernel said of a page may be out of date by the time it is filled.
    doubtful: AtomicBool,
    /// Addresses whose pages come write-protected. Such regions stay where they are.
    protected: Vec<Range<u64>>,
    /// Nothing is copied: for measuring what is left then.
    pub(crate) idle: bool,
}

impl KernelTable {
    /// The table behind a userfaultfd.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn new(
        uffd: Uffd,
        source: Arc<dyn Source>,
        memory: Option<OwnedFd>,
        protected: Vec<Range<u64>>,
    ) -> io::Result<Self> {
        let gate = (uffd.features()? & features::CHANGES != 0).then(Gate::default);
        Ok(Self {
            uffd,
            gate,
            counters: Counters::default(),
            source,
            memory: memory.map(File::from),
            doubtful: AtomicBool::new(false),
            protected,
            idle: false,
        })
    }

    /// Whether the page at an address comes write-protected.
    #[inline]
    fn protects(&self, address: u64) -> bool {
        let mut ranges = self.protected.iter();
        ranges.any(|range| range.contains(&address))
    }

    /// Whether changes are being read or applied; to be kept for as long as nothing may change.
    pub(crate) fn pass(&self) -> Result<Option<RwLockReadGuard<'_, ()>>, Refusal> {
        self.gate.as_ref().map(Gate::pass).transpose()
    }

    /// Fills a page with zeroes. The caller has passed the gate.
    pub(crate) fn zero(&self, to: u64, len: u64) -> Result<(), Refusal> {
        if !self.protects(to) && len == 4096 {
            return self.settle(to, len, self.uffd.zero(to, len));
        }
        // The kernel has no call for these.
        let zeroes = Memory::new(Kind::Anonymous, len)
            .map_err(|error| Refusal::Errno(error.raw_os_error().unwrap_or(libc::ENOMEM)))?;
        let done = self.uffd.copy(to, zeroes.address(), len, self.protects(to));
        self.settle(to, len, done)
    }

    /// Maps a page that is in the file of guest memory and was filled before. `false` if it is not there by now. The caller
    /// has passed the gate.
    pub(crate) fn map(&self, to: u64, len: u64) -> Result<bool, Refusal> {
        match self.uffd.map_cached(to, len, self.protects(to)) {
            Ok(()) => Ok(true),
            Err(short) if short.errno == libc::EEXIST => {
                let _ = self.uffd.wake(to, len);
                Ok(true)
            }
            Err(short) if short.errno == libc::EFAULT => Ok(false),
            Err(short) => Err(short.into()),
        }
    }

    /// The VMM has forked, moved memory, or given up pages without a report. Guest memory that is a file is the child's too,
    /// which puts pages there; where a page was missing when its fault was read, another may have been moved to; and one that
    /// the table forgets may come back before all who were told that it is missing have acted. So from now on no page is
    /// written to the file: it comes by a copy, which the kernel refuses if one is there. To be called before the table
    /// changes.
    pub(crate) fn doubt(&self) {
        self.doubtful.store(true, Ordering::Release);
    }

    /// Takes for done what is there already.
    fn settle(&self, to: u64, page: u64, done: Result<(), Short>) -> Result<(), Refusal> {
        match done {
            Ok(()) => Ok(()),
            Err(short) => self.fell_short(to, page, short),
        }
    }

    #[cold]
    fn fell_short(&self, to: u64, page: u64, short: Short) -> Result<(), Refusal> {
        if short.errno != libc::EEXIST {
            return Err(short.into());
        }
        if self.memory.is_some() && self.uffd.map_cached(to, page, self.protects(to)).is_ok() {
            // It was in the file, and not mapped.
            return Ok(());
        }
        self.counters.existing.fetch_add(1, Ordering::Relaxed);
        // Whoever waits for it is not woken by a copy that was not made.
        let _ = self.uffd.wake(to, page);
        Ok(())
    }

    /// One ioctl.
    ///
    /// A page is written to the file of guest memory only if the kernel has said that it is not there. That the table says
    /// so proves nothing: an earlier handler, or the VMM, may have put it there, and the guest may have changed it since.
    #[inline]
    fn put(&self, known: Known, to: u64, offset: u64, source: u64, len: u64) -> Result<(), Short> {
        if self.idle {
            return Ok(());
        }
        let Some(memory) = &self.memory else {
            return self.uffd.copy(to, source, len, self.protects(to));
        };
        if known == Known::Cached {
            match self.uffd.map_cached(to, len, self.protects(to)) {
                // It has gone meanwhile.
                Err(short) if short.errno == libc::EFAULT => {}
                done => return done,
            }
        }
        if known != Known::Missing || self.doubtful.load(Ordering::Acquire) {
            return self.uffd.copy(to, source, len, self.protects(to));
        }
        crate::sys::write_at(memory, source, len, offset)
            .map_err(|errno| Short { done: 0, errno })?;
        self.uffd.map_cached(to, len, self.protects(to))
    }

    /// Asks the source and fills `len` bytes at `to`. What was filled before it fell short counts from the start.
    #[inline]
    fn fill(
        &self,
        known: Known,
        to: u64,
        page: Pfn,
        len: u64,
    ) -> Result<Result<(), Short>, Refusal> {
        let mut done = Ok(Ok(()));
        let offset = page.address().0;
        let asked = self.source.with(offset, len, &mut |source| {
            done = self
                .pass()
                .map(|_guard| self.put(known, to, offset, source, len));
        });
        match asked {
            Ok(()) => done,
            Err(error) => Err(Refusal::Source(error.raw_os_error().unwrap_or(libc::EIO))),
        }
    }

    #[cold]
    fn refuse(&self, refusal: Refusal) -> Failure {
        if refusal == Refusal::Changing {
            self.counters.sent_back.fetch_add(1, Ordering::Relaxed);
        }
        REFUSAL.set(Some(refusal));
        // The death of the process too: each thread is to learn of it, and not from another that the guest is lost.
        match refusal {
            Refusal::Dead => Failure::Refused(libc::ESRCH as u64),
            Refusal::Changing | Refusal::Gone => Failure::Refused(0),
            Refusal::Source(errno) | Refusal::Errno(errno) => Failure::Refused(errno as u64),
        }
    }
}

/// Bytes of a leaf of a level.
pub const fn bytes(level: Level) -> u64 {
    level.pages() * 4096
}

impl ProtectedTable for KernelTable {
    fn capabilities(&self) -> Capabilities {
        Capabilities::none()
            .range_ops()
            .leaves(Level::L3, Level::L3)
    }

    #[inline]
    fn install(&self, entry: &FrozenEntry<'_>, page: Pfn, _: Content) -> Result<(), Failure> {
        let place = entry.place();
        let to = place.gfn.address().0;
        let len = bytes(place.level);
        self.fill(KNOWN.get(), to, page, len)
            .and_then(|done| self.settle(to, len, done))
            .map_err(|refusal| self.refuse(refusal))
    }

    fn install_many(
        &self,
        entries: &[FrozenEntry<'_>],
        first: Pfn,
        _: Content,
    ) -> Result<(), Failure> {
        let Some(entry) = entries.first() else {
            return Ok(());
        };
        let to = entry.place().gfn.address().0;
        let page = bytes(entry.place().level);
        let count = entries.len().min(RUN);
        let done = self
            .fill(Known::Nothing, to, first, page * count as u64)
            .map_err(|refusal| self.refuse(refusal))?;
        let filled = match done {
            Ok(()) => count,
            // The kernel has stopped at a page that is there, or at a change; what comes before is filled.
            Err(short) if short.done >= page => (short.done / page) as usize,
            Err(short) => {
                self.fell_short(to, page, short)
                    .map_err(|refusal| self.refuse(refusal))?;
                1
            }
        };
        if filled == entries.len() {
            Ok(())
        } else {
            Err(Failure::Partial(filled))
        }
    }

    fn remove(&self, _: &FrozenEntry<'_>, _: &Drained) -> Result<(), Failure> {
        // The kernel's own doing.
        Ok(())
    }

    fn inspect(&self, _: EntryPlace) -> Inspected {
        // The kernel does not say what it holds of another process.
        Inspected::Unreachable
    }
}

/// The first page of an address.
pub(crate) const fn frame(address: u64) -> Gfn {
    Gfn(address >> 12)
}

/// The descriptor that events are waited for by.
impl AsRawFd for KernelTable {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.uffd.as_raw_fd()
    }
}
