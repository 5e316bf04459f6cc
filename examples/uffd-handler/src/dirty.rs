//! Which pages a guest has written, by write protection of the kernel's table.
//!
//! Protocol. A second MMU, without a private half, keeps for each page whether it may be written; its slots are logged. The
//! kernel's table is to it what a processor's TLB is to a table in memory: it holds what was true when it was filled, and
//! [`flush`](tdp::Host::flush) makes it forget.
//!
//! * A write to a protected page: the worker *enters*, has the library make the entry writable, which marks the page, lets
//!   the kernel's page be written, and *exits*.
//! * Collecting: the library takes the marks and the permission, then flushes: it waits for the workers that are inside,
//!   whose permission may be from before, and protects the range again. Only then are the pages read.
//!
//! So a worker that was overtaken between its entry and the kernel's page cannot leave a page writable that the log holds for
//! clean.
//!
//! What is given up changes after the kernel has reported it, and nothing says when. So such a page is reported by the next
//! two collections, the second of which reads it when the first has long been done; and once more if it is filled with zeroes
//! because somebody asks for it.

use crate::changes::{ChangeError, lost};
use crate::host::{SPACE, frames};
use crate::protocol::Region;
use crate::session::{SessionError, lock};
use crate::sys::{Message, Short, Uffd};
use crate::table::Refusal;
use std::collections::HashMap;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use tdp::Level;
use tdp::protected::Unprotected;
use tdp::{
    Access, Ept, Fault, FlushRequest, Gfn, GfnRange, Gpa, Host, Lookup, Mapping, MmapPool, Mmu,
    Outcome, Perms, Pfn, PoolConfig, Slot, SlotFlags, TlbTracker, TlbVcpu, Vcpu,
};

/// The host of the second MMU.
pub(crate) struct WriteHost {
    frames: MmapPool,
    uffd: Uffd,
    inside: TlbTracker,
    /// Nobody reads messages any more.
    over: AtomicBool,
    /// An error number of the kernel, if it once refused to protect a range.
    failed: AtomicI32,
}

impl Host for WriteHost {
    type Frames = MmapPool;
    type Backing = ();
    type Protected = Unprotected;

    fn frames(&self) -> &MmapPool {
        &self.frames
    }

    fn protected(&self) -> &Unprotected {
        &Unprotected
    }

    fn lookup(&self, _: &Slot<()>, gfn: Gfn, _: Access) -> Lookup {
        Lookup::Mapped(Mapping::memory(Pfn(gfn.0), Level::L1, Perms::RWX))
    }

    fn flush(&self, request: &FlushRequest) {
        self.inside.track(|_| {});
        let start = request.range.start.address().0;
        let len = request.range.pages() * 4096;
        // While the address space changes, the workers read why.
        while let Err(Short { errno, .. }) = self.uffd.protect(start, len, true) {
            if errno != libc::EAGAIN || self.over.load(Ordering::Acquire) {
                self.failed.store(errno, Ordering::Release);
                return;
            }
            std::thread::yield_now();
        }
    }
}

/// What was given up of a region: a bit for each page, no words where there was nothing.
#[derive(Default)]
struct GivenUp {
    /// Since the last collection.
    since: Vec<u64>,
    /// Between the last two.
    before: Vec<u64>,
}

/// The log of one VM's writes.
pub struct WriteLog {
    mmu: Mmu<Ept, WriteHost>,
    /// For each region, by its first page.
    given_up: Mutex<HashMap<u64, GivenUp>>,
}

/// What two ranges have in common.
fn common(a: GfnRange, b: GfnRange) -> Option<GfnRange> {
    a.overlaps(b).then(|| GfnRange {
        start: a.start.max(b.start),
        end: a.end.min(b.end),
    })
}

/// Sets the bits from `from` to `to`.
fn set(bits: &mut Vec<u64>, from: u64, to: u64) {
    let words = to.div_ceil(64) as usize;
    if bits.len() < words {
        bits.resize(words, 0);
    }
    let words = bits.iter_mut().enumerate().take(words);
    for (index, word) in words.skip((from / 64) as usize) {
        let first = index as u64 * 64;
        let (from, to) = (from.max(first) - first, to.min(first + 64) - first);
        *word |= (u64::MAX >> (64 - (to - from))) << from;
    }
}

impl WriteLog {
    /// A log of those regions that are to have one, in which nothing is written. Their pages come protected.
    pub(crate) fn new(uffd: Uffd, regions: &[Region]) -> Result<Self, String> {
        let tracked: Vec<_> = regions.iter().filter(|it| it.track_writes).collect();
        let bytes: u64 = tracked.iter().map(|region| region.size).sum();
        let pool = MmapPool::new(PoolConfig {
            frames: (2 * (bytes >> 21)) as usize + 4096,
            base: Pfn(0x1000),
            huge_pages: false,
        });
        let host = WriteHost {
            frames: pool.map_err(|error| error.to_string())?,
            uffd,
            inside: TlbTracker::new(),
            over: AtomicBool::new(false),
            failed: AtomicI32::new(0),
        };
        let mmu = Mmu::builder(host)
            .physical_bits(52)
            .build()
            .map_err(|error| error.to_string())?;
        for region in tracked {
            let range = frames(region.base_host_virt_addr, region.end());
            mmu.slots()
                .insert(Slot::new(range, ()).with_flags(SlotFlags::LOG_DIRTY))
                .map_err(|error| error.to_string())?;
        }
        let given_up = Mutex::default();
        Ok(Self { mmu, given_up })
    }

    /// From now on nobody reads why the address space changes, so nobody is to wait for that.
    pub(crate) fn finish(&self) {
        self.mmu.host().over.store(true, Ordering::Release);
    }

    pub(crate) fn writer(&self) -> Result<Writer, SessionError> {
        Ok(Writer {
            inside: self.mmu.host().inside.vcpu(),
            vcpu: self.mmu.vcpu()?,
            uffd: self.mmu.host().uffd.try_clone().map_err(|error| {
                let what = "another descriptor";
                SessionError::System { what, error }
            })?,
        })
    }

    /// Calls `see` with the address of every page that was written since the last time. What is written from now on is
    /// reported the next time. The pages are to be read after this returns. What was given up is reported twice, by this call
    /// and the next.
    ///
    /// # Errors
    ///
    /// The system's, if it could not protect what was written: then later writes may be missed.
    pub fn collect(&self, mut see: impl FnMut(u64)) -> io::Result<()> {
        let mut written = Vec::new();
        // Before the marks are taken: so what is given up in between is reported again by a later collection than the one
        // that finds its mark.
        let mut before: HashMap<u64, Vec<u64>> = lock(&self.given_up)
            .iter_mut()
            .map(|(&region, it)| {
                let since = std::mem::take(&mut it.since);
                (region, std::mem::replace(&mut it.before, since))
            })
            .collect();
        for slot in self.mmu.slots().list(SPACE) {
            let log = self
                .mmu
                .dirty_log(SPACE, slot.id())
                .map_err(io::Error::other)?;
            let mut marks = vec![0u64; log.words()];
            log.collect(&mut marks).map_err(io::Error::other)?.flush();
            let start = slot.gfns().start;
            let again = before.remove(&start.0).unwrap_or_default();
            for (mark, again) in marks.iter_mut().zip(again) {
                *mark |= again;
            }
            written.push((start, marks));
        }
        match self.mmu.host().failed.load(Ordering::Acquire) {
            0 => {}
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
        for (start, marks) in written {
            for (word, mut bits) in marks.into_iter().enumerate() {
                while bits != 0 {
                    let page = word as u64 * 64 + u64::from(bits.trailing_zeros());
                    see(Gfn(start.0 + page).address().0);
                    bits &= bits - 1;
                }
            }
        }
        Ok(())
    }

    /// Marks pages that were written otherwise than by the guest. To be called after.
    pub(crate) fn mark(&self, range: GfnRange) -> Result<(), ChangeError> {
        for slot in self.mmu.slots().list(SPACE) {
            if let Some(part) = common(slot.gfns(), range) {
                let log = self.mmu.dirty_log(SPACE, slot.id()).map_err(lost)?;
                log.mark(part.start.0 - slot.gfns().start.0, part.pages());
            }
        }
        Ok(())
    }

    /// Marks what a change of the address space writes.
    pub(crate) fn note(&self, change: &Message) -> Result<(), ChangeError> {
        match change {
            Message::Remove { start, end } if start < end => {
                let range = frames(*start, *end);
                self.mark(range)?;
                for slot in self.mmu.slots().list(SPACE) {
                    let first = slot.gfns().start.0;
                    if let Some(part) = common(slot.gfns(), range) {
                        let mut given_up = lock(&self.given_up);
                        let since = &mut given_up.entry(first).or_default().since;
                        set(since, part.start.0 - first, part.end.0 - first);
                    }
                }
                Ok(())
            }
            Message::Remap { from, to, len } => {
                let ends = [*from, *to].map(|start| frames(start, start.saturating_add(*len)));
                self.stays(&ends)
            }
            Message::Unmap { start, end } if start < end => self.stays(&[frames(*start, *end)]),
            _ => Ok(()),
        }
    }

    /// Sees to it that none of these is tracked, because the memory there goes or others comes.
    fn stays(&self, ranges: &[GfnRange]) -> Result<(), ChangeError> {
        let slots = self.mmu.slots().list(SPACE);
        let touched = |range: &GfnRange| slots.iter().any(|slot| slot.gfns().overlaps(*range));
        if ranges.iter().any(touched) {
            return Err(lost(
                "regions whose writes are tracked have to stay where they are",
            ));
        }
        Ok(())
    }
}

/// A worker's part of the log.
pub(crate) struct Writer {
    vcpu: Vcpu<Ept, WriteHost>,
    inside: TlbVcpu,
    uffd: Uffd,
}

impl Writer {
    /// Marks the page of an address and lets it be written.
    pub(crate) fn write(&mut self, address: u64) -> Result<Result<(), Refusal>, SessionError> {
        loop {
            // It keeps nothing from one write to the next that it would have to forget.
            let _ = self.inside.enter();
            let outcome = self.vcpu.fault(Fault::write(Gpa(address)));
            let done = match outcome {
                Ok(Outcome::Retry(_)) | Err(_) => None,
                // Also a page of a region that has no log: nobody asks what is written there.
                Ok(_) => Some(self.uffd.protect(address & !4095, 4096, false)),
            };
            self.inside.exit();
            let _ = outcome?;
            if let Some(done) = done {
                return Ok(done.map_err(Refusal::from));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Kind;
    use crate::sys::{Raw, features};
    use crate::vmm::{Shape, Vmm};
    use std::thread;
    use std::time::{Duration, Instant};

    /// A worker is overtaken by a collection after it has marked a page and before it lets the page be written.
    #[test]
    fn a_worker_that_was_overtaken_leaves_no_clean_page_writable() {
        if let Some(why) = crate::sys::unavailable() {
            eprintln!("SKIPPED a_worker_that_was_overtaken_leaves_no_clean_page_writable: {why}");
            return;
        }
        let vmm = Vmm::new(Shape {
            track_writes: true,
            features: features::WP,
            ..Shape::new(Kind::Anonymous, 1 << 20)
        })
        .expect("a VMM");
        let hello = vmm.hello().expect("a hello");
        let base = vmm.memory().address();
        let page = [7u64; 512];
        let filled = hello.uffd.copy(base, page.as_ptr() as u64, 4096, true);
        filled.expect("a page");
        let clone = hello.uffd.try_clone().expect("a descriptor");
        let log = WriteLog::new(clone, &hello.regions).expect("a log");
        let mut writer = log.writer().expect("a writer");

        let _ = writer.inside.enter();
        let marked = writer.vcpu.fault(Fault::write(Gpa(base)));
        assert!(matches!(marked, Ok(Outcome::Fixed { .. })), "{marked:?}");
        thread::scope(|scope| {
            let collector = scope.spawn(|| {
                let mut seen = Vec::new();
                log.collect(|address| seen.push(address)).map(|()| seen)
            });
            // It does not end before the worker does; if it did, here it would have the time.
            let begun = Instant::now();
            while !collector.is_finished() && begun.elapsed() < Duration::from_millis(100) {
                thread::yield_now();
            }
            hello.uffd.protect(base, 4096, false).expect("permission");
            writer.inside.exit();
            let seen = collector.join().expect("a collector").expect("a log");
            assert_eq!(seen, [base]);

            // A write from now on is noticed.
            let guest = scope.spawn(|| vmm.memory().store(0, 8));
            let mut noticed = 0;
            while noticed == 0 && !guest.is_finished() {
                noticed = hello.uffd.read(&mut [Raw::default()]).expect("messages");
            }
            writer.write(base).expect("a log").expect("permission");
            assert_eq!(noticed, 1, "a write to a clean page went unseen");
        });
        assert_eq!(vmm.memory().load(0), 8);
    }
    fn tracked(shape: Shape) -> (Vmm, WriteLog) {
        let vmm = Vmm::new(Shape {
            track_writes: true,
            ..shape
        })
        .expect("a VMM");
        let hello = vmm.hello().expect("a hello");
        let log = WriteLog::new(hello.uffd, &hello.regions).expect("a log");
        (vmm, log)
    }

    #[test]
    fn only_what_is_tracked_has_to_stay_where_it_is() {
        if let Some(why) = crate::sys::unavailable() {
            eprintln!("SKIPPED only_what_is_tracked_has_to_stay_where_it_is: {why}");
            return;
        }
        let shape = Shape {
            features: features::WP,
            ..Shape::new(Kind::Anonymous, 1 << 20)
        };
        let (vmm, log) = tracked(shape);
        let start = vmm.memory().address();
        let end = start + shape.len;
        let (away, len) = (end + (1 << 30), 4096);
        let unmap = |start, end| Message::Unmap { start, end };
        let remap = |from, to, len| Message::Remap { from, to, len };
        for change in [
            unmap(end, end + len),
            unmap(start - len, start),
            remap(end, away, len),
            remap(away, start - len, len),
        ] {
            log.note(&change).expect("nothing tracked is touched");
        }
        for change in [
            unmap(end - len, end),
            unmap(start - len, start + len),
            remap(start, away, len),
            remap(away, end - len, len),
            remap(away, start - len, 2 * len),
        ] {
            assert!(log.note(&change).is_err(), "{change:?}");
        }
    }

    #[test]
    fn what_was_given_up_is_reported_by_two_collections() {
        if let Some(why) = crate::sys::unavailable() {
            eprintln!("SKIPPED what_was_given_up_is_reported_by_two_collections: {why}");
            return;
        }
        let shape = Shape {
            features: features::WP,
            ..Shape::new(Kind::Anonymous, 1 << 20)
        };
        let (vmm, log) = tracked(shape);
        let base = vmm.memory().address();
        let pages = shape.len / 4096;
        let collect = || {
            let mut seen = Vec::new();
            log.collect(|address| seen.push((address - base) / 4096))
                .expect("a collection");
            seen
        };
        // Across words of the bitmap, and across regions, of which there are two.
        for (from, to) in [(0, 1), (3, 3 + 64), (63, 65), (pages / 2 - 1, pages)] {
            let (start, end) = (base + from * 4096, base + to * 4096);
            let removed = Message::Remove { start, end };
            log.note(&removed).expect("a note");
            let all: Vec<u64> = (from..to).collect();
            assert_eq!(collect(), all);
            // The kernel may have taken them only now.
            assert_eq!(collect(), all);
            assert_eq!(collect(), [0; 0]);
        }
        // Two that overlap in time.
        let remove = |page: u64| {
            let start = base + page * 4096;
            let end = start + 4096;
            log.note(&Message::Remove { start, end }).expect("a note");
        };
        remove(1);
        assert_eq!(collect(), [1]);
        remove(2);
        assert_eq!(collect(), [1, 2]);
        assert_eq!(collect(), [2]);
        assert_eq!(collect(), [0; 0]);
    }
}
