//! The kernel's side: userfaultfd, by its system calls.
//!
//! Protocol. A userfaultfd reports faults and changes of the address space as messages of 32 bytes, and takes pages by
//! ioctl. None of the ioctls can harm the memory of whoever calls them: the kernel fills pages that are absent in ranges
//! that their owner registered, and reads the source as a `write` would, with an error if it is not there.
//!
//! While the owner changes its address space and the message that says so has not been read, every ioctl that fills or
//! protects answers `EAGAIN`.
#![allow(unsafe_code)]
// UNSAFETY: system calls.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Features asked for at creation.
pub mod features {
    /// Write-protect faults are reported.
    pub const WP: u64 = 1 << 0;
    /// Forks are reported.
    pub const FORK: u64 = 1 << 1;
    /// `mremap` is reported.
    pub const REMAP: u64 = 1 << 2;
    /// `madvise` and hole punching are reported.
    pub const REMOVE: u64 = 1 << 3;
    /// `munmap` is reported.
    pub const UNMAP: u64 = 1 << 6;
    /// Minor faults on shared memory can be registered.
    pub const MINOR_SHMEM: u64 = 1 << 10;
    /// Shared memory and huge pages can be write-protected.
    pub const WP_SHMEM: u64 = 1 << 12;
    /// Changes of the address space that are reported, and so make ioctls wait.
    pub const CHANGES: u64 = FORK | REMAP | REMOVE | UNMAP;
}

/// What a range is registered for.
pub mod mode {
    /// Pages that are absent.
    pub const MISSING: u64 = 1 << 0;
    /// Pages that are write-protected.
    pub const WP: u64 = 1 << 1;
    /// Pages that are in the page cache and not mapped.
    pub const MINOR: u64 = 1 << 2;
}

const COPY_MODE_WP: u64 = 1 << 1;
const CONTINUE_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const FAULT_WRITE: u64 = 1 << 0;
const FAULT_WP: u64 = 1 << 1;
const FAULT_MINOR: u64 = 1 << 2;

/// Number of an ioctl that reads and writes `T` (`_IOWR`), or only reads it from user memory the other way round (`_IOR`).
const fn number<T>(direction: u64, nr: u64) -> u64 {
    (direction << 30) | ((size_of::<T>() as u64) << 16) | (0xAA << 8) | nr
}

const API: u64 = number::<[u64; 3]>(3, 0x3F);
const REGISTER: u64 = number::<[u64; 4]>(3, 0x00);
const UNREGISTER: u64 = number::<[u64; 2]>(2, 0x01);
const WAKE: u64 = number::<[u64; 2]>(2, 0x02);
const COPY: u64 = number::<[u64; 5]>(3, 0x03);
const ZEROPAGE: u64 = number::<[u64; 4]>(3, 0x04);
const WRITEPROTECT: u64 = number::<[u64; 3]>(3, 0x06);
const CONTINUE: u64 = number::<[u64; 4]>(3, 0x07);

// As `linux/userfaultfd.h` has them.
const _: () = assert!(COPY == 0xC028_AA03 && WAKE == 0x8010_AA02 && CONTINUE == 0xC020_AA07);

/// An ioctl that filled less than it was asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Short {
    /// Bytes that are filled.
    pub done: u64,
    /// Why it stopped.
    pub errno: i32,
}

/// What a userfaultfd reports.
#[derive(Debug)]
pub enum Message {
    /// A thread waits for a page.
    Fault {
        /// Where.
        address: u64,
        /// It wants to write.
        write: bool,
        /// The page is there and write-protected.
        protected: bool,
        /// The page is in the page cache.
        minor: bool,
    },
    /// The process forked; this one serves the child.
    Fork(Uffd),
    /// A range was moved.
    Remap {
        /// From here.
        from: u64,
        /// To here.
        to: u64,
        /// Bytes.
        len: u64,
    },
    /// The pages of a range are given up: they read zero from now on.
    Remove {
        /// First byte.
        start: u64,
        /// First byte after.
        end: u64,
    },
    /// A range is mapped no longer.
    Unmap {
        /// First byte.
        start: u64,
        /// First byte after.
        end: u64,
    },
    /// Something that this program did not ask for.
    Unknown(u8),
}

/// A message as the kernel writes it.
#[repr(C, align(8))]
#[derive(Clone, Copy, Default)]
pub struct Raw {
    event: u8,
    reserved: [u8; 7],
    words: [u64; 3],
}

const _: () = assert!(size_of::<Raw>() == 32);

impl Raw {
    /// Decodes it. Once for each: a fork hands a descriptor over.
    pub fn decode(self) -> Message {
        let [a, b, c] = self.words;
        match self.event {
            0x12 => Message::Fault {
                address: b,
                write: a & FAULT_WRITE != 0,
                protected: a & FAULT_WP != 0,
                minor: a & FAULT_MINOR != 0,
            },
            0x13 => {
                // SAFETY: the kernel has just made this descriptor for us, and nobody else knows its number.
                Message::Fork(Uffd::of(unsafe { OwnedFd::from_raw_fd(a as u32 as RawFd) }))
            }
            0x14 => Message::Remap {
                from: a,
                to: b,
                len: c,
            },
            0x15 => Message::Remove { start: a, end: b },
            0x16 => Message::Unmap { start: a, end: b },
            event => Message::Unknown(event),
        }
    }
}

/// A userfaultfd.
///
/// Its open file description is shared with whoever handed it over, who may change its flags at any time: so a read says
/// itself that it is not to wait.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    /// Reads cannot say so: the kernel is older than 6.10, or the descriptor is one that it made for a child, which nobody
    /// shares.
    plain: AtomicBool,
}

impl AsRawFd for Uffd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Uffd {
    fn of(fd: OwnedFd) -> Self {
        let plain = AtomicBool::new(false);
        Self { fd, plain }
    }

    /// Makes one for this process. It does not block.
    ///
    /// # Errors
    ///
    /// The system's: `EPERM` where it may not be used, `ENOSYS` where it does not exist, `EINVAL` for a feature that this
    /// kernel does not have.
    pub fn new(features: u64) -> io::Result<Self> {
        Self::make(features, libc::O_NONBLOCK)
    }

    /// Makes one that blocks, as do those that the kernel makes for its owner's children.
    ///
    /// # Errors
    ///
    /// As [`new`](Uffd::new).
    pub fn blocking(features: u64) -> io::Result<Self> {
        Self::make(features, 0)
    }

    fn make(features: u64, flags: i32) -> io::Result<Self> {
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that was just made and is nobody else's.
        let uffd = Self::of(unsafe { OwnedFd::from_raw_fd(fd as RawFd) });
        uffd.ioctl(API, &mut [0xAA, features, 0])?;
        Ok(uffd)
    }

    /// Takes a descriptor that came from elsewhere.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if it is not a userfaultfd.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if link.as_os_str() != "anon_inode:[userfaultfd]" {
            let text = format!("a descriptor of {} is no userfaultfd", link.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let uffd = Self::of(fd);
        uffd.unblock()?;
        Ok(uffd)
    }

    /// Makes it one that does not block. One that does cannot be waited for.
    ///
    /// # Errors
    ///
    /// The system's.
    pub(crate) fn unblock(&self) -> io::Result<()> {
        // SAFETY: a descriptor that we own.
        let flags = unsafe { libc::fcntl(self.as_raw_fd(), libc::F_GETFL) };
        if flags < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        let set = unsafe { libc::fcntl(self.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
        if set < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Another descriptor of the same userfaultfd.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.fd.try_clone().map(Self::of)
    }

    /// The features that it was made with, by what the kernel tells of the descriptor.
    ///
    /// # Errors
    ///
    /// The system's; `InvalidData` if the kernel tells nothing.
    pub fn features(&self) -> io::Result<u64> {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.as_raw_fd()))?;
        info.lines()
            .find_map(|line| line.strip_prefix("API:"))
            .and_then(|line| line.split(':').nth(1))
            .and_then(|word| u64::from_str_radix(word.trim(), 16).ok())
            .ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, format!("no API in {info:?}"))
            })
    }

    fn ioctl<const N: usize>(&self, number: u64, words: &mut [u64; N]) -> io::Result<()> {
        // SAFETY: the number says how many bytes the kernel reads and writes, and they are those of `words`: each constant
        // above is made from the array's type. What else the words point to is checked by the kernel.
        let done = unsafe { libc::ioctl(self.as_raw_fd(), number as _, words.as_mut_ptr()) };
        if done < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// The same for what may stop half-way: `done` is the word in which the kernel counts.
    #[inline]
    fn fill<const N: usize>(
        &self,
        number: u64,
        mut words: [u64; N],
        done: usize,
    ) -> Result<(), Short> {
        self.ioctl(number, &mut words).map_err(|error| {
            let done = words.get(done).map_or(0, |&word| word as i64);
            Short {
                done: u64::try_from(done).unwrap_or(0),
                errno: error.raw_os_error().unwrap_or(0),
            }
        })
    }

    /// Registers a range of this process; returns which ioctls it takes.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn register(&self, start: u64, len: u64, mode: u64) -> io::Result<u64> {
        let mut words = [start, len, mode, 0];
        self.ioctl(REGISTER, &mut words)?;
        Ok(words[3])
    }

    /// Takes a range back; waiting threads go on.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        self.ioctl(UNREGISTER, &mut [start, len])
    }

    /// Whether the process whose memory it is has ended.
    pub(crate) fn is_orphaned(&self) -> bool {
        // Nothing is ever registered at the end of the addresses, so nothing comes of it but an answer.
        const LAST: u64 = (1 << 47) - 0x2000;
        let answer = self.map_cached(LAST, 4096, false);
        answer.is_err_and(|short| short.errno == libc::ESRCH)
    }

    /// Fills absent pages with what lies at `source` in this process, and wakes who waits for them.
    ///
    /// # Errors
    ///
    /// [`Short`]: `EEXIST` at a page that is there, `EAGAIN` while the address space changes.
    #[inline]
    pub fn copy(&self, to: u64, source: u64, len: u64, protect: bool) -> Result<(), Short> {
        let mode = if protect { COPY_MODE_WP } else { 0 };
        self.fill(COPY, [to, source, len, mode, 0], 4)
    }

    /// Fills absent pages with zeroes, and wakes.
    ///
    /// # Errors
    ///
    /// As [`copy`](Uffd::copy).
    pub fn zero(&self, to: u64, len: u64) -> Result<(), Short> {
        self.fill(ZEROPAGE, [to, len, 0, 0], 3)
    }

    /// Maps pages that are in the page cache, and wakes.
    ///
    /// # Errors
    ///
    /// As [`copy`](Uffd::copy).
    pub fn map_cached(&self, to: u64, len: u64, protect: bool) -> Result<(), Short> {
        let mode = if protect { CONTINUE_MODE_WP } else { 0 };
        self.fill(CONTINUE, [to, len, mode, 0], 3)
    }

    /// Write-protects pages, or lets them be written and wakes.
    ///
    /// # Errors
    ///
    /// [`Short`] with nothing done.
    pub fn protect(&self, start: u64, len: u64, on: bool) -> Result<(), Short> {
        let mode = if on { WRITEPROTECT_MODE_WP } else { 0 };
        self.fill(WRITEPROTECT, [start, len, mode], usize::MAX)
    }

    /// Wakes who waits for a page of a range; whoever still lacks it reports it anew.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        self.ioctl(WAKE, &mut [start, len])
    }

    /// Reads messages into the front of `out` and returns how many: 0 if there is none now.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn read(&self, out: &mut [Raw]) -> io::Result<usize> {
        let read = if self.plain.load(Ordering::Relaxed) {
            self.read_plainly(out)?
        } else {
            let len = size_of_val(out);
            let room = libc::iovec {
                iov_base: out.as_mut_ptr().cast(),
                iov_len: len,
            };
            let fd = self.as_raw_fd();
            // SAFETY: the kernel writes at most so many bytes, and any bytes make a `Raw`.
            unsafe { libc::preadv2(fd, &raw const room, 1, -1, libc::RWF_NOWAIT) }
        };
        if read >= 0 {
            return Ok(read as usize / size_of::<Raw>());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR) => Ok(0),
            Some(libc::EOPNOTSUPP | libc::ENOSYS) if !self.plain.load(Ordering::Relaxed) => {
                self.plain.store(true, Ordering::Relaxed);
                self.read(out)
            }
            _ => Err(error),
        }
    }

    /// The same where a read cannot say that it is not to wait: looks first. Whoever shares the descriptor and makes it block
    /// in between has it wait for the next message.
    #[cold]
    fn read_plainly(&self, out: &mut [Raw]) -> io::Result<isize> {
        let mut poll = libc::pollfd {
            fd: self.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: the kernel writes `poll`.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
        if ready <= 0 {
            return Ok(0);
        }
        if poll.revents & libc::POLLERR != 0 {
            return Err(io::Error::other("it blocks"));
        }
        // SAFETY: the kernel writes at most so many bytes, and any bytes make a `Raw`.
        Ok(unsafe { libc::read(self.as_raw_fd(), out.as_mut_ptr().cast(), size_of_val(out)) })
    }
}

/// Why userfaultfd cannot be used here, if it cannot: for programs and tests that then say so and do without.
pub fn unavailable() -> Option<String> {
    Uffd::new(0)
        .err()
        .map(|error| format!("userfaultfd cannot be used here: {error}"))
}

/// Writes what lies at `source` in this process into a file.
pub(crate) fn write_at(file: &fs::File, source: u64, len: u64, offset: u64) -> Result<(), i32> {
    let mut done = 0;
    while done < len {
        let from = (source + done) as *const libc::c_void;
        let (count, to) = ((len - done) as usize, (offset + done) as libc::off_t);
        // SAFETY: the kernel reads the bytes, and answers with an error where there are none.
        let written = unsafe { libc::pwrite(file.as_raw_fd(), from, count, to) };
        match u64::try_from(written) {
            Ok(0) => return Err(libc::EIO),
            Ok(written) => done += written,
            Err(_) => match io::Error::last_os_error().raw_os_error() {
                Some(libc::EINTR) => {}
                errno => return Err(errno.unwrap_or(libc::EIO)),
            },
        }
    }
    Ok(())
}

/// What the system says of a connection. `T` is one of the types that it writes for the option `name`.
fn option<T: Copy>(
    stream: &std::os::unix::net::UnixStream,
    name: i32,
    mut told: T,
) -> io::Result<T> {
    let mut len = size_of::<T>() as libc::socklen_t;
    let room = (&raw mut told).cast();
    let fd = stream.as_raw_fd();
    // SAFETY: the kernel writes at most `len` bytes, those of `told`: plain numbers, of which any are valid.
    let done = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, name, room, &raw mut len) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(told)
}

/// Ends the process at the other end of a connection, whose threads would wait for their pages for ever. Returns its number.
///
/// The number alone may be another process's by now, so it is used only where the kernel, older than 6.5, has nothing better.
///
/// # Errors
///
/// The system's; `NotFound` if it cannot be told who that is.
pub fn end_peer(stream: &std::os::unix::net::UnixStream) -> io::Result<i32> {
    let nobody = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let peer = option(stream, libc::SO_PEERCRED, nobody)?;
    if peer.pid <= 1 || peer.pid == std::process::id() as i32 {
        return Err(io::Error::from(io::ErrorKind::NotFound));
    }
    let done = match option(stream, libc::SO_PEERPIDFD, -1 as RawFd) {
        Ok(process) => {
            // SAFETY: a descriptor that the kernel has just made for us.
            let process = unsafe { OwnedFd::from_raw_fd(process) };
            let (fd, none) = (process.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
            // SAFETY: no memory is passed.
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, none, 0) }
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
            // SAFETY: no memory is passed.
            unsafe { libc::kill(peer.pid, libc::SIGKILL).into() }
        }
        Err(error) => return Err(error),
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(peer.pid)
}

/// Processor time of the calling thread.
pub fn thread_time() -> std::time::Duration {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes `now`.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) };
    std::time::Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Sends what lies at `source` in this process.
///
/// # Errors
///
/// The system's; `EFAULT` if there is nothing.
pub fn send_from(stream: &std::os::unix::net::UnixStream, source: u64, len: u64) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let from = (source + done) as *const libc::c_void;
        // SAFETY: the kernel reads the bytes, and answers with an error where there are none.
        let sent = unsafe {
            libc::send(
                stream.as_raw_fd(),
                from,
                (len - done) as usize,
                libc::MSG_NOSIGNAL,
            )
        };
        match u64::try_from(sent) {
            Ok(sent) => done += sent,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn a_read_does_not_wait_whatever_the_flags_of_the_descriptor_are() {
        let uffd = match Uffd::blocking(0) {
            Ok(uffd) => uffd,
            Err(why) => {
                eprintln!("SKIPPED a_read_does_not_wait_whatever_the_flags: {why}");
                return;
            }
        };
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let mut room = [Raw::default()];
            let _ = sender.send(uffd.read(&mut room).ok());
            // Where a read cannot say that it is not to wait.
            uffd.plain.store(true, Ordering::Relaxed);
            let _ = sender.send(uffd.read(&mut room).ok());
            uffd.unblock().expect("other flags");
            let _ = sender.send(uffd.read(&mut room).ok());
        });
        let next = || receiver.recv_timeout(Duration::from_secs(20));
        // A kernel that cannot be told refuses; none waits.
        assert!(matches!(next(), Ok(Some(0) | None)));
        assert_eq!(next(), Ok(None));
        assert_eq!(next(), Ok(Some(0)));
    }
}
