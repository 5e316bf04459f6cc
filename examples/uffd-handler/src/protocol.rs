//! What a VMM says to its page-fault handler: Firecracker's protocol, one message over a Unix socket.
//!
//! Protocol. The VMM connects and sends one JSON array, an object for each region of guest memory, and with it a userfaultfd
//! as `SCM_RIGHTS`. Nothing more follows; the connection stays open for as long as the VM lives. What differs here from
//! Firecracker is optional:
//!
//! * a second descriptor is the file that all of guest memory is mapped from: pages that the kernel reports as missing are
//!   then written into it, and those that are in it are mapped, by `UFFDIO_CONTINUE`;
//! * `removed`: ranges of a region that were given up before this handler was started, because another handler died;
//! * `track_writes`: the region is registered for write-protect faults as well.
//!
//! Everything in the message is checked, because a handler serves many VMs and one of them may be hostile.
#![allow(unsafe_code)]
// UNSAFETY: descriptors that arrive are numbers first.

use crate::sys::Uffd;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Most descriptors of a message.
const DESCRIPTORS: usize = 2;
/// Longest message.
const LONGEST: usize = 1 << 20;
/// Most regions of a guest. Some of what is done for a page goes through all of them.
const REGIONS: usize = 1024;
/// How long a VMM may take to send all of it.
const PATIENCE: Duration = Duration::from_secs(5);
/// First address that no user memory has.
const ADDRESSES: u64 = 1 << 47;
/// First byte of a snapshot that cannot be named.
const OFFSETS: u64 = 1 << 47;

/// One region of guest memory. Addresses, offsets and sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Where the VMM has mapped it.
    pub base_host_virt_addr: u64,
    /// How large it is.
    pub size: u64,
    /// Where its content begins in the snapshot.
    pub offset: u64,
    /// Its pages.
    #[serde(default)]
    pub page_size: u64,
    /// The same, in bytes for all its name, by older VMMs.
    #[serde(default)]
    pub page_size_kib: u64,
    /// What was given up before this handler was started.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<Extent>,
    /// Whether it is registered for write-protect faults.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub track_writes: bool,
}

/// A part of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// First byte, from the region's start.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

impl Region {
    /// A region of 4 KiB pages.
    pub const fn new(base: u64, size: u64, offset: u64) -> Self {
        Self {
            base_host_virt_addr: base,
            size,
            offset,
            page_size: 4096,
            page_size_kib: 4096,
            removed: Vec::new(),
            track_writes: false,
        }
    }

    /// The same with pages of this many bytes.
    #[must_use]
    pub const fn with_pages(mut self, page_size: u64) -> Self {
        self.page_size = page_size;
        self.page_size_kib = page_size;
        self
    }

    /// First address after it.
    pub const fn end(&self) -> u64 {
        self.base_host_virt_addr.saturating_add(self.size)
    }
}

/// A message could not be accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The VMM went away, or was silent for too long.
    #[error("the message ends after {0} bytes, in the middle")]
    Incomplete(usize),
    /// It never ends.
    #[error("the message is longer than {LONGEST} bytes")]
    TooLong,
    /// It is not what was expected.
    #[error("the message is no list of regions: {0}")]
    Json(serde_json::Error),
    /// No descriptor, or too many.
    #[error(
        "{0} descriptors came with the message: a userfaultfd is meant, and perhaps the file of the memory"
    )]
    Descriptors(usize),
    /// The first descriptor is of something else.
    #[error("the first descriptor cannot be used: {0}")]
    NotUffd(io::Error),
    /// A guest without memory.
    #[error("the list of regions is empty")]
    NoRegions,
    /// A guest of shreds.
    #[error("there are {0} regions: {REGIONS} are served at most")]
    TooManyRegions(usize),
    /// A region makes no sense.
    #[error("region {index} at {base:#x}: {reason}")]
    Region {
        /// Which one.
        index: usize,
        /// Where it says to be.
        base: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// What a VMM has said.
#[derive(Debug)]
pub struct Hello {
    /// By their addresses.
    pub regions: Vec<Region>,
    /// The descriptor that reports faults.
    pub uffd: Uffd,
    /// The file that guest memory is mapped from.
    pub memory: Option<OwnedFd>,
}

/// Checks a list of regions and puts it in order.
///
/// # Errors
///
/// [`ProtocolError`] names the first region that makes no sense.
pub fn check(mut regions: Vec<Region>, snapshot: u64) -> Result<Vec<Region>, ProtocolError> {
    if regions.is_empty() {
        return Err(ProtocolError::NoRegions);
    }
    if regions.len() > REGIONS {
        return Err(ProtocolError::TooManyRegions(regions.len()));
    }
    for (index, region) in regions.iter_mut().enumerate() {
        if region.page_size == 0 {
            region.page_size = match region.page_size_kib {
                0 => 4096,
                bytes => bytes,
            };
        }
        if let Some(reason) = fault_of(region, snapshot) {
            let base = region.base_host_virt_addr;
            return Err(ProtocolError::Region {
                index,
                base,
                reason,
            });
        }
    }
    regions.sort_by_key(|region| region.base_host_virt_addr);
    for (index, pair) in regions.windows(2).enumerate() {
        if let [before, after] = pair
            && before.end() > after.base_host_virt_addr
        {
            return Err(ProtocolError::Region {
                index: index + 1,
                base: after.base_host_virt_addr,
                reason: "overlaps the one before",
            });
        }
    }
    Ok(regions)
}

/// What is wrong with a region, if anything is.
fn fault_of(region: &Region, snapshot: u64) -> Option<&'static str> {
    let page = region.page_size;
    if !matches!(page, 0x1000 | 0x20_0000 | 0x4000_0000) {
        return Some("pages of 4 KiB, 2 MiB and 1 GiB can be served");
    }
    let words = [region.base_host_virt_addr, region.size, region.offset];
    if words.iter().any(|word| !word.is_multiple_of(page)) {
        return Some("base, size and offset are to be multiples of the page size");
    }
    if region.track_writes && page != 0x1000 {
        return Some("writes are tracked in pages of 4 KiB only");
    }
    if region.size == 0 {
        return Some("it is empty");
    }
    let end = region.base_host_virt_addr.checked_add(region.size);
    if end.is_none_or(|end| end > ADDRESSES) {
        return Some("it reaches past the addresses of a process");
    }
    let end = region.offset.checked_add(region.size);
    if end.is_none_or(|end| end > OFFSETS || end > snapshot) {
        return Some("it reaches past the end of the snapshot");
    }
    let inside = |extent: &Extent| {
        extent.start.is_multiple_of(page)
            && extent.len.is_multiple_of(page)
            && extent.start <= region.size
            && extent.len <= region.size - extent.start
    };
    if !region.removed.iter().all(inside) {
        return Some("what was removed is to be whole pages of it");
    }
    None
}

/// Takes a VMM's message. `snapshot` is how many bytes there are to be served.
///
/// # Errors
///
/// [`ProtocolError`].
pub fn receive(stream: &UnixStream, snapshot: u64) -> Result<Hello, ProtocolError> {
    receive_within(stream, snapshot, PATIENCE)
}

fn receive_within(
    stream: &UnixStream,
    snapshot: u64,
    patience: Duration,
) -> Result<Hello, ProtocolError> {
    let begun = Instant::now();
    let mut text: Vec<u8> = Vec::new();
    // Bytes of it that have been looked at.
    let mut tried = 0;
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    let regions: Vec<Region> = loop {
        // Of the whole message: who sends a byte now and then has no more time than who sends nothing.
        let left = patience.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Err(ProtocolError::Incomplete(text.len()));
        }
        stream.set_read_timeout(Some(left))?;
        let mut part = [0u8; 4096];
        let mut arrived = [-1 as RawFd; 8];
        let mut slices = [libc::iovec {
            iov_base: part.as_mut_ptr().cast(),
            iov_len: part.len(),
        }];
        // SAFETY: the slice is `part`, which outlives the call and may hold any bytes.
        let received = unsafe { stream.recv_with_fds(&mut slices, &mut arrived) };
        let (bytes, count) = match received {
            Ok(received) => received,
            Err(error) if error.errno() == libc::EAGAIN => (0, 0),
            Err(error) => return Err(io::Error::from(error).into()),
        };
        for &fd in arrived.iter().take(count) {
            // SAFETY: the kernel has just made these descriptors for us.
            descriptors.push(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        // At once, because other VMs have to share what descriptors this process may have.
        if descriptors.len() > DESCRIPTORS {
            return Err(ProtocolError::Descriptors(descriptors.len()));
        }
        if bytes == 0 {
            return Err(match serde_json::from_slice::<Vec<Region>>(&text) {
                Err(error) if !error.is_eof() => ProtocolError::Json(error),
                _ => ProtocolError::Incomplete(text.len()),
            });
        }
        text.extend_from_slice(part.get(..bytes).unwrap_or_default());
        if text.len() > LONGEST {
            return Err(ProtocolError::TooLong);
        }
        // A long one is not to be looked at from the start with each part.
        if !text.trim_ascii_end().ends_with(b"]") && text.len() < 2 * tried {
            continue;
        }
        tried = text.len();
        match serde_json::from_slice(&text) {
            Ok(regions) => break regions,
            Err(error) if error.is_eof() => {}
            Err(error) => return Err(ProtocolError::Json(error)),
        }
    };
    stream.set_read_timeout(None)?;
    let count = descriptors.len();
    let mut descriptors = descriptors.into_iter();
    let uffd = descriptors
        .next()
        .ok_or(ProtocolError::Descriptors(count))?;
    Ok(Hello {
        regions: check(regions, snapshot)?,
        uffd: Uffd::from_fd(uffd).map_err(ProtocolError::NotUffd)?,
        memory: descriptors.next(),
    })
}

/// Sends a VMM's message.
///
/// # Errors
///
/// The system's.
pub fn send(
    stream: &UnixStream,
    regions: &[Region],
    uffd: &Uffd,
    memory: Option<&OwnedFd>,
) -> io::Result<()> {
    let text = serde_json::to_vec(regions)?;
    let mut descriptors = vec![uffd.as_raw_fd()];
    descriptors.extend(memory.map(AsRawFd::as_raw_fd));
    send_bytes(stream, &text, &descriptors)
}

/// Sends any bytes with any descriptors: what tests need to be rude.
///
/// # Errors
///
/// The system's.
pub fn send_bytes(stream: &UnixStream, bytes: &[u8], descriptors: &[RawFd]) -> io::Result<()> {
    let sent = stream.send_with_fds(&[bytes], descriptors)?;
    io::Write::write_all(&mut &*stream, bytes.get(sent..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::thread;

    #[test]
    fn a_message_that_dribbles_has_no_more_time_than_one_that_stops() {
        let (mut ours, theirs) = UnixStream::pair().expect("a connection");
        let dribbling = thread::spawn(move || {
            // Text that makes sense and has no end, until the other side hangs up.
            let mut sent = 0;
            let text = b"[{\"size\":".iter().chain([b' '; 5000].iter());
            for &byte in text {
                if ours.write_all(&[byte]).is_err() {
                    break;
                }
                sent += 1;
                thread::sleep(Duration::from_millis(2));
            }
            sent
        });
        let begun = Instant::now();
        let answer = receive_within(&theirs, 1 << 20, Duration::from_millis(100));
        let took = begun.elapsed();
        drop(theirs);
        let sent = dribbling.join().expect("a sender");
        assert!(
            matches!(answer, Err(ProtocolError::Incomplete(_))),
            "{answer:?}"
        );
        assert!(sent < 5000, "it was listened to until it ended: {took:?}");
    }
}
