//! Memory by `mmap`, that of a guest and of a snapshot, reached a word at a time.
//!
//! Protocol. Other threads and other processes change it, so nothing here makes a reference to what is in it: words are
//! loaded and stored as atomics.
#![allow(unsafe_code)]
// UNSAFETY: system calls, and pointers into a mapping.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// How memory is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Anonymous, in pages of 4 KiB.
    Anonymous,
    /// Anonymous, in huge pages of 2 MiB.
    Huge,
    /// Shared, by a descriptor that [`Memory::file`] has.
    Shared,
}

impl Kind {
    /// Bytes of one of its pages.
    pub const fn page(self) -> u64 {
        match self {
            Kind::Huge => 2 << 20,
            Kind::Anonymous | Kind::Shared => 4096,
        }
    }
}

/// A mapping.
#[derive(Debug)]
pub struct Memory {
    start: NonNull<u8>,
    len: usize,
    file: Option<OwnedFd>,
}

// SAFETY: what is in it is reached through atomics only, and it stays mapped for as long as the value lives.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

fn map(
    len: usize,
    protection: i32,
    flags: i32,
    file: Option<&impl AsRawFd>,
) -> io::Result<NonNull<u8>> {
    let fd = file.map_or(-1, AsRawFd::as_raw_fd);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))
}

impl Memory {
    /// Makes memory that reads zero.
    ///
    /// # Errors
    ///
    /// The system's; of [`Kind::Huge`] it has none unless its owner keeps some.
    pub fn new(kind: Kind, len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let (start, file) = match kind {
            Kind::Anonymous => {
                let start = map(len, rw, private | libc::MAP_NORESERVE, None::<&File>)?;
                // SAFETY: the mapping just made. Without huge pages, so that each page is filled by itself.
                unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_NOHUGEPAGE) };
                (start, None)
            }
            Kind::Huge => (
                map(len, rw, private | libc::MAP_HUGETLB, None::<&File>)?,
                None,
            ),
            Kind::Shared => {
                // SAFETY: the name is a constant that ends in zero.
                let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
                if fd < 0 {
                    return Err(io::Error::last_os_error());
                }
                // SAFETY: just made, and nobody else's.
                let file = unsafe { OwnedFd::from_raw_fd(fd) };
                File::from(file.try_clone()?).set_len(len as u64)?;
                (map(len, rw, libc::MAP_SHARED, Some(&file))?, Some(file))
            }
        };
        Ok(Self { start, len, file })
    }

    /// Maps a file, to be read.
    ///
    /// # Errors
    ///
    /// The system's; an empty file cannot be mapped.
    pub fn open(file: &File) -> io::Result<Self> {
        let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let start = map(len, libc::PROT_READ, libc::MAP_SHARED, Some(file))?;
        Ok(Self {
            start,
            len,
            file: None,
        })
    }

    /// Its first address.
    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The descriptor of [`Kind::Shared`].
    pub fn file(&self) -> Option<&OwnedFd> {
        self.file.as_ref()
    }

    #[inline]
    fn word(&self, offset: u64) -> &AtomicU64 {
        let offset = offset as usize;
        assert!(
            offset.is_multiple_of(8) && offset <= self.len - 8,
            "no word at {offset:#x}"
        );
        // SAFETY: aligned, and inside the mapping, which lives as long as `self`.
        unsafe { &*self.start.as_ptr().add(offset).cast::<AtomicU64>() }
    }

    /// The word at an offset. Waits for whoever fills the page.
    ///
    /// # Panics
    ///
    /// If there is no word there.
    #[inline]
    pub fn load(&self, offset: u64) -> u64 {
        self.word(offset).load(Ordering::Relaxed)
    }

    /// Changes the word at an offset.
    ///
    /// # Panics
    ///
    /// If there is no word there.
    #[inline]
    pub fn store(&self, offset: u64, word: u64) {
        self.word(offset).store(word, Ordering::Relaxed);
    }

    /// Gives the pages of a range up: they read zero from now on, unless somebody fills them.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn give_up(&self, offset: u64, len: u64) -> io::Result<()> {
        let how = if self.file.is_some() {
            libc::MADV_REMOVE
        } else {
            libc::MADV_DONTNEED
        };
        if offset > self.len() || len > self.len() - offset {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        // SAFETY: inside the mapping, whose content may change at any time.
        let done = unsafe {
            let start = self.start.as_ptr().add(offset as usize);
            libc::madvise(start.cast(), len as usize, how)
        };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Unmaps the pages of a range of [`Kind::Shared`], which stay in its file.
    ///
    /// # Errors
    ///
    /// The system's; `InvalidInput` for other memory, whose pages would be given up.
    pub fn forget(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.file.is_none() || offset > self.len() || len > self.len() - offset {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        // SAFETY: inside the mapping, whose content does not change.
        let done = unsafe {
            let start = self.start.as_ptr().add(offset as usize);
            libc::madvise(start.cast(), len as usize, libc::MADV_DONTNEED)
        };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Moves the whole mapping to another address.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn relocate(&mut self) -> io::Result<()> {
        let room = map(
            self.len,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            None::<&File>,
        )?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: the target is a mapping of ours that nobody uses; `&mut self` says that nobody uses the source either.
        let moved = unsafe {
            libc::mremap(
                self.start.as_ptr().cast(),
                self.len,
                self.len,
                flags,
                room.as_ptr().cast::<libc::c_void>(),
            )
        };
        if moved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.start = room;
        Ok(())
    }

    /// Gives the last `len` bytes back to the system.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn shrink(&mut self, len: u64) -> io::Result<()> {
        let rest = self
            .len
            .checked_sub(len as usize)
            .filter(|&rest| rest > 0)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: the end of the mapping, which nobody refers to: `&mut self`.
        let done = unsafe { libc::munmap(self.start.as_ptr().add(rest).cast(), len as usize) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        self.len = rest;
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody refers to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// What the word at a byte offset of a snapshot holds, and of a guest that has rewritten the page `version` times.
/// Made so that two instructions check it.
#[inline]
pub const fn word(offset: u64, version: u64) -> u64 {
    (offset | 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ version.wrapping_mul(0xD6E8_FEB8_6659_FD93)
}
