//! The host of a replay: it answers what the recorded host answered.

use super::processor::PHYSICAL_BITS;
use super::step::Answer;
use parking_lot::Mutex;
use std::sync::{Arc, OnceLock};
use tdp::protected::Unprotected;
use tdp::{
    Access, FlushRequest, Gfn, Host, Level, Lookup, Mapping, MmapPool, Perms, Pfn, PoolConfig,
    PoolError, Slot, SoftwareHost, TlbTracker,
};

/// See the module.
#[derive(Debug)]
pub struct TraceHost {
    inner: SoftwareHost,
    /// The only frame that may be asked for now, and what is behind it.
    answer: Mutex<Option<(u64, Answer)>>,
    left: Arc<OnceLock<usize>>,
}

impl TraceHost {
    /// Table frames that one replay may use at a time.
    pub const FRAMES: usize = 1 << 16;

    /// A host with table frames of its own, at the far end of physical memory, where no recorded frame lies. How many
    /// of them are still in use when it goes away is told to `left`.
    ///
    /// # Errors
    ///
    /// If there is no memory for the frames.
    pub fn new(left: Arc<OnceLock<usize>>) -> Result<Self, PoolError> {
        let base =
            Pfn((1 << (PHYSICAL_BITS - tdp::PAGE_SIZE.trailing_zeros())) - Self::FRAMES as u64);
        let pool = MmapPool::new(PoolConfig {
            frames: Self::FRAMES,
            base,
            huge_pages: false,
        })?;
        Ok(Self {
            inner: SoftwareHost::new(pool),
            answer: Mutex::new(None),
            left,
        })
    }

    /// Answers so if asked for `gfn`, until the next call.
    pub fn prepare(&self, answer: Option<(u64, Answer)>) {
        *self.answer.lock() = answer;
    }

    /// Which vCPUs may hold stale translations.
    pub fn tlb(&self) -> &TlbTracker {
        self.inner.tlb()
    }
}

impl Host for TraceHost {
    type Frames = MmapPool;
    type Backing = ();
    type Protected = Unprotected;

    fn protected(&self) -> &Unprotected {
        &Unprotected
    }

    fn frames(&self) -> &MmapPool {
        self.inner.frames()
    }

    fn lookup(&self, _slot: &Slot<()>, gfn: Gfn, _access: Access) -> Lookup {
        match *self.answer.lock() {
            Some((
                asked,
                Answer::Mapped {
                    pfn,
                    level,
                    writable,
                },
            )) if asked == gfn.0 => {
                let level = Level::from_number(level).unwrap_or(Level::L1);
                let perms = if writable { Perms::RWX } else { Perms::RX };
                Lookup::Mapped(Mapping::memory(Pfn(pfn), level, perms))
            }
            Some((asked, Answer::Retry)) if asked == gfn.0 => Lookup::Retry,
            // Also for a question that the recorded host was not asked.
            _ => Lookup::Failed,
        }
    }

    fn flush(&self, request: &FlushRequest) {
        self.inner.flush(request);
    }

    /// The replay's vCPUs load their root before every access and flush what they cached under another.
    fn reload_roots(&self) -> bool {
        true
    }
}

impl Drop for TraceHost {
    fn drop(&mut self) {
        // Set once: a host is dropped once.
        let _ = self.left.set(self.frames().allocated());
    }
}
