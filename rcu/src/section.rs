//! Sections: the readers that are vCPUs, and the grace period over them.
//!
//! Every reader has one record, a word on 128 bytes of its own: even outside, odd inside, written by its owner alone.
//!
//! ```text
//!   enter   word = odd   (Release)          retire side   unlink
//!           light fence                                   heavy fence
//!           walk: load links                              load word (Acquire): odd? remember it
//!   leave   word += 1    (Release)                        free when the word is another one (Acquire)
//! ```
//!
//! Of the two fences (`barrier.rs`) one comes first. If the section's does, the retire side sees the odd word and waits for it to
//! change. If the retire side's does, the section's walk sees the unlinking and cannot reach the garbage. A word that
//! has changed belongs to a section that has left: its owner counts upwards, so no word comes back.
//!
//! `leave` is Release and the retire side's loads are Acquire, so that all a section did happens before what the
//! grace period was for. The store of `enter` is Release for the same reason: the retire side may load this one and never
//! see the `leave` before it, and a plain store would not carry what came before that `leave`.
//!
//! A reader may keep what it found in one section for the next, if it can tell that nothing was handed over to be freed in
//! between: each snapshot, before its fence, counts up the *stamp* of every record. So does whoever changed what readers
//! remember, before it waits for them.
//!
//! ```text
//!   enter; stamp (Acquire); walk: find        unlink
//!   leave                                     stamp += 1   (AcqRel)
//!   enter (fence); stamp: the same?           heavy fence; load word
//! ```
//!
//! What was found is freed after a snapshot that follows its unlinking. If that one had counted before the first section took
//! its stamp, the walk would have seen the unlinking (Acquire of the count). If it counts later, then either the fence of
//! the section that asks again comes first, and the snapshot sees it inside and waits for it; or the snapshot's does, and the
//! section sees another stamp. A stamp that is the same says *memory*, not *linked*: the two may have been parted since. It
//! says *linked*, too, of what is unlinked by those only who move the stamps and wait for the sections before they go on.
//!
//! A section that is forgotten leaves its word odd until the next one of the same reader leaves for it, or the reader is dropped.
//! What was found in it cannot be used any more by then: the reader is borrowed for as long as that can.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::cell::Cell;
use core::marker::PhantomData;

use crate::barrier::{Debt, Fences};
#[cfg(not(loom))]
use crate::sync::spin_loop;
use crate::sync::{Arc, AtomicU64, Backoff, Mutex, Ordering, Plain};

/// Words that a reader has for its user.
pub const NOTES: usize = 4;

/// How many records a scan remembers on the stack before it waits for them.
const SCAN: usize = if cfg!(loom) { 2 } else { 128 };

/// How often a wait looks at the word, with one pause in between, before it backs off. A fault is shorter than this.
#[cfg(not(loom))]
const LOOKS: usize = 64;

/// What one reader shares with the retire side, and the notes of its user. Twice the line size of common processors, which fetch
/// lines in pairs.
#[repr(C, align(128))]
pub(crate) struct Record {
    word: AtomicU64,
    /// Times that the retire side wanted whatever was remembered to be forgotten.
    stamp: AtomicU64,
    /// Fences that the sections owe.
    debt: Debt,
    notes: [Plain; NOTES],
    #[cfg(all(debug_assertions, feature = "std", not(any(loom, shuttle))))]
    owner: crate::sync::AtomicUsize,
}

const _: () = assert!(align_of::<Record>() == 128);
#[cfg(not(loom))]
const _: () = assert!(core::mem::offset_of!(Record, notes) + size_of::<[Plain; NOTES]>() <= 64);

impl Record {
    fn new(asymmetric: bool) -> Self {
        Self {
            word: AtomicU64::new(0),
            stamp: AtomicU64::new(0),
            debt: Debt::new(asymmetric),
            notes: [const { Plain::new(0) }; NOTES],
            #[cfg(all(debug_assertions, feature = "std", not(any(loom, shuttle))))]
            owner: crate::sync::AtomicUsize::new(0),
        }
    }

    /// The word of the section that is inside, if one is. Acquire, partner of the Release in `enter`, `leave` and
    /// `repin`: if the section before has left, its accesses happen before the caller goes on; if it had not, the
    /// caller waits for it.
    #[inline]
    fn inside(&self) -> Option<u64> {
        let word = self.word.load(Ordering::Acquire);
        (word & 1 == 1).then_some(word)
    }

    /// Whether the section that had this word has left. Acquire as in [`inside`](Self::inside).
    #[inline]
    fn has_left(&self, word: u64) -> bool {
        self.word.load(Ordering::Acquire) != word
    }

    /// Leaves a section that was forgotten, and had this word. Returns the word after it. Apart from what enters, where the next
    /// word then is the last one and two: the sum that one section hands to the next is as short as can be.
    #[cold]
    #[inline(never)]
    fn leave_forgotten(&self, inside: u64) -> u64 {
        let outside = inside.wrapping_add(1);
        // Release as in `Section::drop`.
        self.word.store(outside, Ordering::Release);
        outside
    }

    /// Waits until the section that had this word has left.
    #[cold]
    fn wait(&self, word: u64) {
        #[cfg(not(loom))]
        for _ in 0..LOOKS {
            if self.has_left(word) {
                return;
            }
            spin_loop();
        }
        self.forbid_own(word);
        let backoff = Backoff::new();
        while !self.has_left(word) {
            backoff.snooze();
        }
    }

    /// Says so, in debug builds, instead of waiting for ever for a section of this very thread.
    #[inline]
    fn forbid_own(&self, _word: u64) {
        #[cfg(all(debug_assertions, feature = "std", not(any(loom, shuttle))))]
        assert!(
            self.owner.load(Ordering::Relaxed) != thread_number() || self.has_left(_word),
            "a grace period was waited for inside a section of the same thread"
        );
    }

    #[inline]
    fn note_owner(&self) {
        #[cfg(all(debug_assertions, feature = "std", not(any(loom, shuttle))))]
        self.owner.store(thread_number(), Ordering::Relaxed);
    }
}

/// A number that no two living threads share, never 0.
#[cfg(all(debug_assertions, feature = "std", not(any(loom, shuttle))))]
fn thread_number() -> usize {
    std::thread_local!(static MARK: u8 = const { 0 });
    MARK.with(|mark| core::ptr::from_ref(mark).addr())
}

/// The registered readers of a domain. Registration replaces the list when a scan holds on to it; a scan never locks
/// readers out while it waits.
pub(crate) struct Registry {
    // A lock, not another generation of reclamation: it is taken when a vCPU comes or goes and once per scan. A reader
    // that registers after a scan took the list locks after it, so all its sections see the unlinking.
    records: Mutex<Arc<Vec<Arc<Record>>>>,
    fences: Fences,
}

impl Registry {
    pub(crate) fn new(asymmetric: bool) -> Self {
        Self {
            fences: Fences::new(asymmetric),
            records: Mutex::new(Arc::new(Vec::new())),
        }
    }

    fn register(&self) -> Arc<Record> {
        let record = Arc::new(Record::new(self.fences.are_asymmetric()));
        Arc::make_mut(&mut self.records.lock()).push(record.clone());
        record
    }

    fn unregister(&self, record: &Arc<Record>) {
        let mut records = self.records.lock();
        if let Some(at) = records.iter().position(|other| Arc::ptr_eq(other, record)) {
            Arc::make_mut(&mut records).swap_remove(at);
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.records.lock().len()
    }

    /// Has every reader forget what it remembers, see [`Section::stamp`].
    pub(crate) fn move_stamps(&self) {
        let records = self.records.lock().clone();
        move_stamps(&records);
    }

    /// Remembers who is inside now; what was unlinked before the call may be freed when all of them have left.
    pub(crate) fn snapshot(&self) -> Laggards {
        let records = self.records.lock().clone();
        if records.is_empty() {
            return Laggards(Vec::new());
        }
        move_stamps(&records);
        self.fences.order(records.iter().map(|record| &record.debt));
        Laggards(
            records
                .iter()
                .filter_map(|record| record.inside().map(|word| (record.clone(), word)))
                .collect(),
        )
    }

    /// Waits until every section that was inside at the call has left. Allocates nothing.
    pub(crate) fn synchronize(&self) {
        let records = self.records.lock().clone();
        if records.is_empty() {
            return;
        }
        self.fences.order(records.iter().map(|record| &record.debt));
        for records in records.chunks(SCAN) {
            // All words first, then the waits: the waits overlap, and no section that begins meanwhile is waited for.
            let mut words = [0; SCAN];
            for (word, record) in words.iter_mut().zip(records) {
                *word = record.inside().unwrap_or(0);
            }
            for (&word, record) in words.iter().zip(records) {
                if word != 0 {
                    record.wait(word);
                }
            }
        }
    }
}

fn move_stamps(records: &[Arc<Record>]) {
    for record in records {
        // AcqRel: Release, for a section that takes its stamp after this and must not find what was unlinked before; the fence
        // that follows orders it before the look at the words.
        record.stamp.fetch_add(1, Ordering::AcqRel);
    }
}

/// Sections that were inside when a snapshot was taken, with the words that they had.
pub(crate) struct Laggards(Vec<(Arc<Record>, u64)>);

impl Laggards {
    /// Whether all of them have left by now. Forgets those that have.
    pub(crate) fn have_left(&mut self) -> bool {
        while let Some((record, word)) = self.0.last() {
            if !record.has_left(*word) {
                return false;
            }
            self.0.pop();
        }
        true
    }
}

/// What a reader needs of its domain, whatever the garbage is.
pub(crate) trait Home: Send + Sync {
    fn registry(&self) -> &Registry;
}

/// A registered reader: one per vCPU. Enters sections, one at a time; may be sent to another thread between them.
///
/// Dropping it unregisters it; batches that wait for it count it as left. It keeps what it needs of the domain alive, the
/// pending garbage included, so it may outlive the [`Domain`](crate::Domain).
// The record comes first, for whoever puts what else a section needs into the same line; in a box, the rest takes one word.
#[repr(C)]
pub struct Reader {
    record: Arc<Record>,
    home: Box<Arc<dyn Home>>,
    _not_sync: PhantomData<Cell<()>>,
}

impl Reader {
    pub(crate) fn register(home: Arc<dyn Home>) -> Self {
        Self {
            record: home.registry().register(),
            home: Box::new(home),
            _not_sync: PhantomData,
        }
    }

    /// The words of this reader's user, [`NOTES`] of them, all 0 at first. They lie in the line that each section writes, so
    /// that what is noted in them costs no other.
    pub fn notes(&self) -> Notes {
        Notes(self.record.clone())
    }

    /// Enters a section: what is reachable from here on stays until the section is dropped.
    ///
    /// Writes this reader's own line, and no other memory is touched. If the section is forgotten, the garbage of
    /// the domain waits until the next one of this reader begins or the reader is dropped.
    #[inline]
    pub fn enter(&mut self) -> Section<'_> {
        let record: &Record = &self.record;
        record.note_owner();
        // Relaxed: only the owner writes the word, and `&mut self` is the owner.
        let mut outside = record.word.load(Ordering::Relaxed);
        if outside & 1 == 1 {
            outside = record.leave_forgotten(outside);
        }
        let inside = outside.wrapping_add(1);
        record.debt.announce(&record.word, inside);
        Section {
            record,
            inside,
            _not_send: PhantomData,
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // No section is alive, but one may have been forgotten: its word is made even, which is another one, and whoever
        // waits for it goes on. Release as in `Section::drop`.
        let word = self.record.word.load(Ordering::Relaxed);
        if word & 1 == 1 {
            self.record.leave_forgotten(word);
        }
        self.home.registry().unregister(&self.record);
    }
}

impl core::fmt::Debug for Reader {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Reader { .. }")
    }
}

/// The words that a reader has for its user, see [`Reader::notes`]. They outlive the reader.
#[derive(Clone)]
pub struct Notes(Arc<Record>);

impl Notes {
    /// The words.
    #[inline(always)]
    pub fn words(&self) -> &[Plain; NOTES] {
        &self.0.notes
    }
}

impl core::fmt::Debug for Notes {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_tuple("Notes").field(self.words()).finish()
    }
}

/// A vCPU inside its critical section. Leaves when dropped, by unwinding too.
///
/// What was read under it must not be used after it is dropped or repinned: tie such references to a borrow of the
/// section, not to the lifetime `'r` of the borrowed reader.
#[must_use = "a section that is dropped at once protects nothing"]
pub struct Section<'r> {
    record: &'r Record,
    inside: u64,
    // A section belongs to the thread that entered it.
    _not_send: PhantomData<*const ()>,
}

/// What a reader's section tells of what went before it, see [`Section::stamp`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp(u64);

impl Stamp {
    /// The stamp of no section.
    pub const NONE: Self = Self(u64::MAX);
}

impl Section<'_> {
    /// What a later section of the same reader compares with its own: as long as the two are the same, what was found in the
    /// earlier section after this call is still there. It may have been unlinked meanwhile. Reads the reader's own line.
    #[inline(always)]
    pub fn stamp(&self) -> Stamp {
        // Acquire, partner of the count in `Registry::snapshot`: what is found from here on was not unlinked before it.
        Stamp(self.record.stamp.load(Ordering::Acquire))
    }

    /// The words of the reader's user, see [`Reader::notes`].
    #[inline(always)]
    pub fn notes(&self) -> &[Plain; NOTES] {
        &self.record.notes
    }

    /// Leaves and enters again in one go, between two items of a batch. Nothing read before may be used after.
    #[inline]
    pub fn repin(&mut self) {
        self.inside = self.inside.wrapping_add(2);
        // To the retire side this is both: another odd word, so the section before has left (Release), and a section
        // that is inside, announced before its walk (fence).
        self.record.debt.announce(&self.record.word, self.inside);
    }
}

impl Drop for Section<'_> {
    #[inline]
    fn drop(&mut self) {
        // Release, partner of the Acquire loads of the retire side: every access of this section happens before
        // whatever waited for its end. If that side still loads the odd word, it waits on.
        self.record
            .word
            .store(self.inside.wrapping_add(1), Ordering::Release);
    }
}

impl core::fmt::Debug for Section<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Section { .. }")
    }
}

#[cfg(all(test, feature = "std", not(loom)))]
mod tests;
