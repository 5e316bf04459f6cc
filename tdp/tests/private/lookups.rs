//! Private look-ups that sleep, that cannot say, that find nothing, and what may happen while they do.

use crate::least::Least;
use std::sync::{Mutex, MutexGuard};
use tdp::protected::{Capabilities, Content, Drained, Failure, HandOffStep, Inspected};
use tdp::{
    Access, AddressSpaceId, EntryPlace, Ept, Fault, FaultError, FlushRequest, FrozenEntry, Gfn,
    Host, Level, Lookup, Mapping, MemoryFault, MmapPool, Mmu, Outcome, Perms, Pfn, PoolConfig,
    ProtectedTable, RetryReason, Slot, SlotId, TlbTracker, Visibility,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);
/// Host frames behind what is shared.
const SHARED: Pfn = Pfn(0x8_0000);
/// Frames of 46 bits of physical address.
const FRAMES: u64 = 1 << 34;
const FIXED: Result<Outcome, FaultError> = Ok(Outcome::Fixed { level: Level::L1 });

type Hook = Box<dyn FnOnce() + Send>;

/// What the host answers; without it, the page that the slot's backing has at this place.
#[derive(Default)]
struct Answers {
    private: Option<Lookup>,
    sleeping: Option<Lookup>,
    /// A frame whose page is not the one after that of the frame before.
    moved: Option<(Gfn, Pfn)>,
    /// Runs in the middle of the next look-up that may sleep: after the page was found, before it is answered.
    while_asleep: Option<Hook>,
}

/// Puts pages in by one call for many as well.
struct Many(Least);

impl ProtectedTable for Many {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    fn install(&self, entry: &FrozenEntry<'_>, page: Pfn, content: Content) -> Result<(), Failure> {
        self.0.install(entry, page, content)
    }

    fn install_many(
        &self,
        entries: &[FrozenEntry<'_>],
        first: Pfn,
        content: Content,
    ) -> Result<(), Failure> {
        (first.0..)
            .zip(entries)
            .try_for_each(|(pfn, entry)| self.0.install(entry, Pfn(pfn), content))
    }

    fn remove(&self, entry: &FrozenEntry<'_>, drained: &Drained) -> Result<(), Failure> {
        self.0.remove(entry, drained)
    }

    fn inspect(&self, place: EntryPlace) -> Inspected {
        self.0.inspect(place)
    }
}

struct Asked {
    frames: MmapPool,
    table: Many,
    tlb: TlbTracker,
    answers: Mutex<Answers>,
}

impl Asked {
    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap()
    }
}

/// A slot's backing is its first private frame.
fn page(slot: &Slot<Pfn>, gfn: Gfn) -> Lookup {
    let pfn = Pfn(slot.backing().0 + slot.offset(gfn));
    Lookup::Mapped(Mapping::memory(pfn, Level::L1, Perms::RWX))
}

impl Host for Asked {
    type Frames = MmapPool;
    type Backing = Pfn;
    type Protected = Many;

    fn frames(&self) -> &MmapPool {
        &self.frames
    }

    fn protected(&self) -> &Many {
        &self.table
    }

    fn lookup(&self, slot: &Slot<Pfn>, gfn: Gfn, _: Access) -> Lookup {
        let pfn = Pfn(SHARED.0 + slot.offset(gfn));
        Lookup::Mapped(Mapping::memory(pfn, Level::L1, Perms::RWX))
    }

    fn lookup_private(&self, slot: &Slot<Pfn>, gfn: Gfn) -> Lookup {
        let answers = self.answers();
        match answers.moved {
            Some((moved, to)) if moved == gfn => {
                Lookup::Mapped(Mapping::memory(to, Level::L1, Perms::RWX))
            }
            _ => answers.private.unwrap_or(page(slot, gfn)),
        }
    }

    fn lookup_private_blocking(&self, slot: &Slot<Pfn>, gfn: Gfn) -> Lookup {
        let (found, hook) = {
            let mut answers = self.answers();
            let found = answers.sleeping.unwrap_or(page(slot, gfn));
            (found, answers.while_asleep.take())
        };
        if let Some(hook) = hook {
            hook();
        }
        found
    }

    fn flush(&self, _: &FlushRequest) {
        self.tlb.track(|_| {});
    }
}

type TestMmu = Mmu<Ept, Asked>;

fn pool() -> MmapPool {
    MmapPool::new(PoolConfig {
        frames: 128,
        base: Pfn(0x1000),
        huge_pages: false,
    })
    .unwrap()
}

fn slot(first: Pfn) -> Slot<Pfn> {
    Slot::new(Gfn(0)..Gfn(512), first)
}

/// A guest that is private throughout, and its slot.
fn guest() -> (TestMmu, SlotId) {
    let host = Asked {
        frames: pool(),
        table: Many(Least::new(Capabilities::none().range_ops())),
        tlb: TlbTracker::new(),
        answers: Mutex::default(),
    };
    let mmu = TestMmu::builder(host)
        .private_by_fault()
        .default_visibility(Visibility::Private)
        .build()
        .unwrap();
    let id = mmu.slots().insert(slot(Pfn(0x10_0000))).unwrap();
    mmu.build_private().unwrap().finalise().unwrap();
    (mmu, id)
}

fn private(gfn: u64) -> Fault {
    Fault::write(Gfn(gfn).address()).private()
}

/// The private page at a frame, if there is one.
fn mapped(mmu: &TestMmu, gfn: u64) -> Option<Pfn> {
    let mut found = None;
    mmu.visit_private_leaves(SPACE, Gfn(gfn)..Gfn(gfn + 1), |leaf| found = Some(leaf.pfn));
    found
}

#[test]
fn a_look_up_that_has_to_sleep_does_so_outside_the_critical_section() {
    let (mmu, _) = guest();
    mmu.host().answers().private = Some(Lookup::Blocking);
    let other = mmu.clone();
    mmu.host().answers().while_asleep = Some(Box::new(move || {
        // Waits for every critical section, and would wait for ever for this fault's.
        other.synchronize();
    }));
    let mut vcpu = mmu.vcpu().unwrap();
    assert_eq!(vcpu.fault(private(3)), FIXED);
    assert_eq!(mapped(&mmu, 3), Some(Pfn(0x10_0003)));
    // A vCPU that remembers everything sleeps for the next page all the same.
    for n in 4..8 {
        assert_eq!(vcpu.fault(private(n)), FIXED);
    }
    assert!(mmu.host().answers().while_asleep.is_none());
}

/// A batch is one critical section: it sends the guest back instead, and has mapped nothing.
#[test]
fn a_batch_does_not_sleep() {
    let (mmu, _) = guest();
    mmu.host().answers().private = Some(Lookup::Blocking);
    let mut vcpu = mmu.vcpu().unwrap();
    let mut batch = vcpu.batch().unwrap();
    let outcome = batch.fault(private(3));
    assert_eq!(outcome, Ok(Outcome::Retry(RetryReason::Backing)));
    drop(batch);
    assert_eq!(mapped(&mmu, 3), None);
    assert_eq!(vcpu.fault(private(3)), FIXED);
}

/// What a look-up found of a slot that was replaced while it slept is another slot's page.
#[test]
fn a_slot_that_was_replaced_meanwhile_is_looked_up_anew() {
    let (mmu, id) = guest();
    mmu.host().answers().private = Some(Lookup::Blocking);
    let other = mmu.clone();
    mmu.host().answers().while_asleep = Some(Box::new(move || {
        other.slots().remove(SPACE, id).unwrap();
        other.slots().insert(slot(Pfn(0x20_0000))).unwrap();
    }));
    assert_eq!(mmu.vcpu().unwrap().fault(private(3)), FIXED);
    assert_eq!(mapped(&mmu, 3), Some(Pfn(0x20_0003)));
    // And one that is gone has no page any more.
    let (mmu, id) = guest();
    mmu.host().answers().private = Some(Lookup::Blocking);
    let other = mmu.clone();
    mmu.host().answers().while_asleep = Some(Box::new(move || {
        other.slots().remove(SPACE, id).unwrap();
    }));
    let gone = Ok(Outcome::MemoryFault(MemoryFault::NotBacked));
    assert_eq!(mmu.vcpu().unwrap().fault(private(3)), gone);
    assert_eq!(mapped(&mmu, 3), None);
}

/// INV: no-stale-install. The page that was found is given away by an invalidation that begins and ends while the look-up
/// sleeps.
#[test]
fn a_page_that_was_taken_back_meanwhile_is_not_installed() {
    let (mmu, _) = guest();
    mmu.host().answers().private = Some(Lookup::Blocking);
    let other = mmu.clone();
    mmu.host().answers().while_asleep = Some(Box::new(move || {
        let invalidation = other.invalidate_begin(SPACE, Gfn(3)..Gfn(4));
        let flushed = invalidation.zap().flush();
        let moved = Mapping::memory(Pfn(0x30_0003), Level::L1, Perms::RWX);
        other.host().answers().sleeping = Some(Lookup::Mapped(moved));
        invalidation.end(flushed);
    }));
    assert_eq!(mmu.vcpu().unwrap().fault(private(3)), FIXED);
    assert_eq!(mapped(&mmu, 3), Some(Pfn(0x30_0003)));
}

#[test]
fn a_look_up_that_cannot_say_sends_the_guest_back() {
    let later = Ok(Outcome::Retry(RetryReason::Backing));
    for (quick, sleeping) in [
        (Lookup::Retry, Lookup::Failed),
        (Lookup::Blocking, Lookup::Retry),
        // It may not ask to sleep where it may sleep.
        (Lookup::Blocking, Lookup::Blocking),
    ] {
        let (mmu, _) = guest();
        let mut vcpu = mmu.vcpu().unwrap();
        // The straight way too, with all that it takes remembered.
        for warm in [false, true] {
            let first = if warm { 8 } else { 0 };
            mmu.host().answers().private = Some(quick);
            mmu.host().answers().sleeping = Some(sleeping);
            assert_eq!(vcpu.fault(private(first)), later, "{quick:?}, {sleeping:?}");
            assert_eq!(mapped(&mmu, first), None);
            mmu.host().answers().private = None;
            for n in first..first + 4 {
                assert_eq!(vcpu.fault(private(n)), FIXED);
            }
        }
    }
}

#[test]
fn a_look_up_that_finds_no_page_is_the_embedders() {
    let (mmu, _) = guest();
    let mut vcpu = mmu.vcpu().unwrap();
    let none = Ok(Outcome::MemoryFault(MemoryFault::NotBacked));
    let too_wide = Mapping::memory(Pfn(1 << 45), Level::L1, Perms::RWX);
    for first in [0, 8] {
        for (quick, sleeping) in [
            (Lookup::Failed, Lookup::Retry),
            (Lookup::Blocking, Lookup::Failed),
            (Lookup::Mapped(too_wide), Lookup::Retry),
            (Lookup::Blocking, Lookup::Mapped(too_wide)),
        ] {
            mmu.host().answers().private = Some(quick);
            mmu.host().answers().sleeping = Some(sleeping);
            assert_eq!(vcpu.fault(private(first)), none, "{quick:?}, {sleeping:?}");
            let batched = vcpu.batch().unwrap().fault(private(first));
            if quick != Lookup::Blocking {
                assert_eq!(batched, none);
            }
            assert_eq!(mapped(&mmu, first), None);
        }
        *mmu.host().answers() = Answers::default();
        for n in first..first + 4 {
            assert_eq!(vcpu.fault(private(n)), FIXED);
        }
    }
}

/// The processor's last frame is a page as any other, and the one past it is none: for a vCPU that comes for the first time, for
/// one that remembers all of the way, in a batch, and where the look-up sleeps.
#[test]
fn the_last_frame_within_reach_is_the_last_that_is_mapped() {
    let (mmu, _) = guest();
    let none = Ok(Outcome::MemoryFault(MemoryFault::NotBacked));
    let at = |pfn| Lookup::Mapped(Mapping::memory(Pfn(pfn), Level::L1, Perms::RWX));
    let mut vcpu = mmu.vcpu().unwrap();
    let mut next = 0;
    for _ in 0..3 {
        for (pfn, expected) in [(FRAMES, none), (FRAMES - 1, FIXED)] {
            for sleeps in [false, true] {
                for batched in [false, true] {
                    if sleeps && batched {
                        continue;
                    }
                    let quick = if sleeps { Lookup::Blocking } else { at(pfn) };
                    mmu.host().answers().private = Some(quick);
                    mmu.host().answers().sleeping = Some(at(pfn));
                    let outcome = if batched {
                        vcpu.batch().unwrap().fault(private(next))
                    } else {
                        vcpu.fault(private(next))
                    };
                    assert_eq!(outcome, expected, "{pfn:#x}, {sleeps}, {batched}");
                    let found = (expected == FIXED).then_some(Pfn(pfn));
                    assert_eq!(mapped(&mmu, next), found);
                    next += 1;
                }
            }
        }
    }
    // Nor is it one of a run of neighbours.
    mmu.host().answers().private = None;
    let last = Slot::new(Gfn(1024)..Gfn(1024 + 16), Pfn(FRAMES - 8));
    mmu.slots().insert(last).unwrap();
    let range = Gfn(1024)..Gfn(1024 + 16);
    let done = vcpu.prefault(range, Visibility::Private).unwrap();
    assert_eq!((done.next, done.frames), (Gfn(1024 + 8), 8));
    assert_eq!(Ok(done.stopped.unwrap()), none);
    assert_eq!(mapped(&mmu, 1024 + 7), Some(Pfn(FRAMES - 1)));
    assert_eq!(mapped(&mmu, 1024 + 8), None);
    assert_eq!(mmu.audit_protected(SPACE).different, 0);
}

/// One call maps neighbours whose pages follow each other. A page that lies elsewhere is mapped as well, by another call.
#[test]
fn pages_that_do_not_follow_each_other_are_mapped_ahead_each_where_it_is() {
    let (mmu, _) = guest();
    let elsewhere = Pfn(0x40_0000);
    mmu.host().answers().moved = Some((Gfn(10), elsewhere));
    let mut vcpu = mmu.vcpu().unwrap();
    let done = vcpu.prefault(Gfn(0)..Gfn(20), Visibility::Private).unwrap();
    assert_eq!((done.frames, done.stopped), (20, None));
    for n in 0..20 {
        let expected = if n == 10 {
            elsewhere
        } else {
            Pfn(0x10_0000 + n)
        };
        assert_eq!(mapped(&mmu, n), Some(expected));
    }
    assert_eq!(mmu.audit_protected(SPACE).different, 0);
    let calls = mmu.stats().protected.calls_of(HandOffStep::Install);
    assert!(calls < 10, "{calls} calls for 20 pages");
}

/// A host that implements no more than it must.
struct Bare {
    frames: MmapPool,
    table: Least,
}

impl Host for Bare {
    type Frames = MmapPool;
    type Backing = ();
    type Protected = Least;

    fn frames(&self) -> &MmapPool {
        &self.frames
    }

    fn protected(&self) -> &Least {
        &self.table
    }

    fn lookup(&self, _: &Slot<()>, _: Gfn, _: Access) -> Lookup {
        Lookup::Blocking
    }

    fn flush(&self, _: &FlushRequest) {}
}

/// What it leaves out finds no page, and promises nothing.
#[test]
fn a_host_that_implements_the_least_has_no_page_to_give() {
    let host = Bare {
        frames: pool(),
        table: Least::new(Capabilities::none()),
    };
    let mmu = Mmu::<Ept, _>::builder(host)
        .private_by_fault()
        .build()
        .unwrap();
    let slot = Slot::new(Gfn(0)..Gfn(512), ());
    mmu.slots().insert(slot.clone()).unwrap();
    mmu.build_private().unwrap().finalise().unwrap();
    mmu.convert(SPACE, Gfn(0)..Gfn(8), Visibility::Private)
        .unwrap();
    let mut vcpu = mmu.vcpu().unwrap();
    let none = Ok(Outcome::MemoryFault(MemoryFault::NotBacked));
    assert_eq!(vcpu.fault(private(0)), none);
    assert_eq!(vcpu.fault(Fault::write(Gfn(8).address())), none);
    assert_eq!(
        mmu.host().lookup_private_blocking(&slot, Gfn(0)),
        Lookup::Failed
    );
    assert!(!mmu.invalidate_roots().reload());
}
