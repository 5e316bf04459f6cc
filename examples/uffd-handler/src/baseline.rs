//! What the table is measured against: one mutex, held over the copy, and a bitmap of what was copied. It is the shape of the
//! page-fault handlers of crosvm (`PageHandler`) and cloud-hypervisor, with several workers.

use crate::protocol::Region;
use crate::source::Source;
use crate::sys::Uffd;
use std::io;
use std::sync::{Arc, Mutex};

/// Everything that is known of a VM's pages, under one mutex.
pub struct MutexTable {
    uffd: Uffd,
    source: Arc<dyn Source>,
    state: Mutex<Vec<Part>>,
}

struct Part {
    region: Region,
    copied: Vec<u64>,
}

impl MutexTable {
    /// A table in which nothing is copied yet.
    pub fn new(uffd: Uffd, source: Arc<dyn Source>, regions: &[Region]) -> Self {
        let parts = regions.iter().map(|region| Part {
            copied: vec![0; (region.size / region.page_size).div_ceil(64) as usize],
            region: region.clone(),
        });
        let state = Mutex::new(parts.collect());
        Self {
            uffd,
            source,
            state,
        }
    }

    /// Makes sure that the page of an address is there, whatever the bitmap says of it if it is to be filled `anew`. `false`
    /// if it was.
    ///
    /// # Errors
    ///
    /// The source's and the system's; `NotFound` for an address in no region.
    pub fn fill(&self, address: u64, anew: bool) -> io::Result<bool> {
        let mut parts = self
            .state
            .lock()
            .unwrap_or_else(|poison| poison.into_inner());
        let part = parts
            .iter_mut()
            .find(|part| (part.region.base_host_virt_addr..part.region.end()).contains(&address))
            .ok_or(io::ErrorKind::NotFound)?;
        let page = part.region.page_size;
        let index = (address - part.region.base_host_virt_addr) / page;
        let (word, bit) = (&mut part.copied[index as usize / 64], 1 << (index % 64));
        if *word & bit != 0 && !anew {
            return Ok(false);
        }
        let to = part.region.base_host_virt_addr + index * page;
        let mut done = Ok(());
        self.source
            .with(part.region.offset + index * page, page, &mut |source| {
                done = self.uffd.copy(to, source, page, false);
            })?;
        match done {
            Ok(()) => {}
            Err(short) if short.errno == libc::EEXIST => {
                // Whoever waits for it is not woken by a copy that was not made.
                let _ = self.uffd.wake(to, page);
            }
            Err(short) => return Err(io::Error::from_raw_os_error(short.errno)),
        }
        *word |= bit;
        Ok(true)
    }
}
