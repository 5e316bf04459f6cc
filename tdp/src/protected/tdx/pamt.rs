//! Metadata of physical pages (the module's PAMT): type, owner, block epoch, lock.
//!
//! Protocol. A page that a caller names is looked up from the top: the 1 GiB entry shared, the 2 MiB entry shared, the
//! 4 KiB entry as wanted; a 2 MiB page stops one step earlier, with its own entry exclusive. So a call on any 4 KiB page
//! and one on the 2 MiB around it exclude each other, whoever's they are. A page that the module finds in its own tables
//! is looked up directly: only its own entry is locked. Type and owner change only under the exclusive lock; the block
//! epoch is stamped without one.

use super::locks::{Held, Mode, ShareLock};
use super::memory::Memory;
use super::status::Status;
use tdp_arch::{Hpa, Level};
use tdp_rcu::sync::{AtomicU64, Ordering};

/// What a physical page is used for, by the module's numbers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum PageKind {
    /// Not directly assigned: belongs to nobody, or is part of a larger page.
    Nda = 0,
    /// A page of a TD.
    Reg = 3,
    /// Root of a TD.
    Tdr = 4,
    /// Control structure of a TD, root table of its Secure EPT included.
    Tdcx = 5,
    /// Root of a vCPU.
    Tdvpr = 6,
    /// Table of a Secure EPT.
    Ept = 8,
}

impl PageKind {
    const fn of(bits: u64) -> Self {
        match bits {
            3 => PageKind::Reg,
            4 => PageKind::Tdr,
            5 => PageKind::Tdcx,
            6 => PageKind::Tdvpr,
            8 => PageKind::Ept,
            _ => PageKind::Nda,
        }
    }
}

const KIND: u64 = 0xff;

/// Metadata of one page of 4 KiB, 2 MiB or 1 GiB.
#[derive(Debug)]
pub(crate) struct PamtEntry {
    pub(crate) lock: ShareLock,
    /// Address of the owner's root page in bits 51:12, type in bits 7:0.
    assigned: AtomicU64,
    block_epoch: AtomicU64,
}

impl PamtEntry {
    pub(crate) fn new() -> Self {
        Self {
            lock: ShareLock::new(),
            assigned: AtomicU64::new(PageKind::Nda as u64),
            block_epoch: AtomicU64::new(0),
        }
    }

    pub(crate) fn kind(&self) -> PageKind {
        // Acquire: pairs with the Release of `assign`.
        PageKind::of(self.assigned.load(Ordering::Acquire) & KIND)
    }

    /// Root page of the TD that owns it.
    pub(crate) fn owner(&self) -> Hpa {
        Hpa(self.assigned.load(Ordering::Acquire) & !KIND)
    }

    /// Gives the page to a TD.
    pub(crate) fn assign(&self, kind: PageKind, owner: Hpa) {
        self.block_epoch.store(0, Ordering::Relaxed);
        // Release: a walk that finds a table here finds its content initialised.
        self.assigned
            .store(owner.0 | kind as u64, Ordering::Release);
    }

    /// Takes the page back.
    pub(crate) fn release(&self) {
        // Release: whoever finds the page unassigned comes after everything that its last owner did.
        self.assigned.store(PageKind::Nda as u64, Ordering::Release);
    }

    /// Epoch at which the entry that holds the page was last blocked.
    pub(crate) fn block_epoch(&self) -> u64 {
        self.block_epoch.load(Ordering::Relaxed)
    }

    /// Stamps the epoch.
    pub(crate) fn stamp(&self, epoch: u64) {
        // Relaxed: whoever reads it has locked the Secure-EPT entry, whose lock the stamper held.
        self.block_epoch.store(epoch, Ordering::Relaxed);
    }
}

/// A page that a caller named, with everything locked on the way. Fields drop in the order of release.
#[derive(Debug)]
pub(crate) struct PageLock<'a> {
    entry: &'a PamtEntry,
    level: Level,
    entry_lock: Held<'a>,
    _block: Option<Held<'a>>,
    _gigabyte: Option<Held<'a>>,
}

impl<'a> PageLock<'a> {
    pub(crate) const fn entry(&self) -> &'a PamtEntry {
        self.entry
    }

    /// Keeps the lock of the page itself beyond the guard, and gives up those above; [`ShareLock::release`] ends it.
    pub(crate) fn forget_entry(self) {
        self.entry_lock.forget();
    }

    /// Size of the page.
    pub(crate) const fn level(&self) -> Level {
        self.level
    }
}

impl Memory {
    /// Finds and locks the page of `level` (4 KiB or 2 MiB) at `page`, which a caller named and which must be of the type
    /// `expected`; a free one of 2 MiB must be free throughout.
    ///
    /// # Errors
    ///
    /// The status to answer, in the order of the checks: misaligned, not managed, locked, of another type.
    pub(crate) fn lock_page(
        &self,
        page: Hpa,
        level: Level,
        mode: Mode,
        expected: PageKind,
    ) -> Result<PageLock<'_>, Status> {
        let found = self.lock_any(page, level, mode)?;
        if found.level != level || found.entry.kind() != expected {
            return Err(Status::PageMetadataIncorrect);
        }
        if level == Level::L2 && expected == PageKind::Nda {
            let data = self
                .metadata(page.pfn())
                .ok_or(Status::OperandAddrRangeError)?;
            if data.block_pages.iter().any(|p| p.kind() != PageKind::Nda) {
                return Err(Status::PageMetadataIncorrect);
            }
        }
        Ok(found)
    }

    /// Finds and locks the smallest page that holds `page`, of `lowest` size at least.
    ///
    /// # Errors
    ///
    /// The status to answer: misaligned for `lowest`, not managed, locked.
    pub(crate) fn lock_any(
        &self,
        page: Hpa,
        lowest: Level,
        mode: Mode,
    ) -> Result<PageLock<'_>, Status> {
        if page.0 & (lowest.bytes() - 1) != 0 || page.0 >> 52 != 0 {
            return Err(Status::OperandInvalid);
        }
        let data = self
            .metadata(page.pfn())
            .filter(|_| self.contains(page.pfn(), lowest))
            .ok_or(Status::OperandAddrRangeError)?;
        let gigabyte = take(data.gigabyte, Mode::Shared)?;
        if data.gigabyte.kind() != PageKind::Nda {
            drop(gigabyte);
            return Ok(PageLock {
                entry: data.gigabyte,
                level: Level::L3,
                entry_lock: take(data.gigabyte, mode)?,
                _block: None,
                _gigabyte: None,
            });
        }
        if lowest == Level::L2 {
            return Ok(PageLock {
                entry: data.block,
                level: Level::L2,
                entry_lock: take(data.block, mode)?,
                _block: None,
                _gigabyte: Some(gigabyte),
            });
        }
        let block = take(data.block, Mode::Shared)?;
        if data.block.kind() != PageKind::Nda {
            drop(block);
            return Ok(PageLock {
                entry: data.block,
                level: Level::L2,
                entry_lock: take(data.block, mode)?,
                _block: None,
                _gigabyte: Some(gigabyte),
            });
        }
        Ok(PageLock {
            entry: data.page,
            level: Level::L1,
            entry_lock: take(data.page, mode)?,
            _block: Some(block),
            _gigabyte: Some(gigabyte),
        })
    }
}

fn take(entry: &PamtEntry, mode: Mode) -> Result<Held<'_>, Status> {
    entry.lock.try_lock(mode).ok_or(Status::OperandBusy)
}
