//! A hook that implements no more than it must: what it leaves out does nothing, or is refused and undone.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tdp::protected::{
    Capabilities, Content, Drained, Failure, HandOffCause, HandOffError, HandOffStep, Inspected,
    Scope, Token,
};
use tdp::{
    AddressSpaceId, EntryPlace, Ept, Fault, FaultError, FrameSource, FrozenEntry, Gfn, Host, Level,
    LinearBacking, MemoryFault, MmapPool, Mmu, OutOfFrames, Outcome, Pfn, Phase, PoolConfig,
    ProtectedTable, Slot, SoftwareHost, TlbTracker, Visibility,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const PRIVATE: Pfn = Pfn(0x10_0000);
const REFUSED: Result<Outcome, FaultError> = Ok(Outcome::MemoryFault(MemoryFault::Refused));

/// Puts pages in and takes them out.
pub(crate) struct Least {
    capabilities: Capabilities,
    pages: Mutex<HashMap<(u64, u8), Pfn>>,
    /// What the next calls are answered.
    answers: Mutex<VecDeque<Failure>>,
}

impl Least {
    pub(crate) fn new(capabilities: Capabilities) -> Self {
        Self {
            capabilities,
            pages: Mutex::default(),
            answers: Mutex::default(),
        }
    }
}

impl ProtectedTable for Least {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn install(&self, entry: &FrozenEntry<'_>, page: Pfn, _: Content) -> Result<(), Failure> {
        if let Some(failure) = self.answers.lock().unwrap().pop_front() {
            return Err(failure);
        }
        let EntryPlace { gfn, level, .. } = entry.place();
        let before = self
            .pages
            .lock()
            .unwrap()
            .insert((gfn.0, level.number()), page);
        assert_eq!(before, None, "installed twice");
        Ok(())
    }

    fn remove(&self, entry: &FrozenEntry<'_>, _: &Drained) -> Result<(), Failure> {
        if let Some(failure) = self.answers.lock().unwrap().pop_front() {
            return Err(failure);
        }
        let EntryPlace { gfn, level, .. } = entry.place();
        let page = self.pages.lock().unwrap().remove(&(gfn.0, level.number()));
        assert!(page.is_some(), "nothing to remove");
        Ok(())
    }

    fn inspect(&self, place: EntryPlace) -> Inspected {
        match self
            .pages
            .lock()
            .unwrap()
            .get(&(place.gfn.0, place.level.number()))
        {
            Some(&pfn) => Inspected::Leaf {
                pfn,
                pending: true,
                blocked: false,
            },
            None => Inspected::Free,
        }
    }
}

/// The same, with pages for tables, as many as there are.
struct WithTwins {
    least: Least,
    left: AtomicUsize,
    /// How often it was asked and had none.
    in_vain: AtomicUsize,
}

impl WithTwins {
    fn new(capabilities: Capabilities, left: usize) -> Self {
        Self {
            least: Least::new(capabilities),
            left: AtomicUsize::new(left),
            in_vain: AtomicUsize::new(0),
        }
    }
}

impl ProtectedTable for WithTwins {
    fn capabilities(&self) -> Capabilities {
        self.least.capabilities()
    }

    fn allocate_twins(&self, out: &mut [Pfn]) -> Result<usize, OutOfFrames> {
        let mut left = self.left.load(Ordering::Relaxed);
        let count = out.len().min(left);
        for twin in &mut out[..count] {
            *twin = Pfn(0x9_0000 + left as u64);
            left -= 1;
        }
        self.left.store(left, Ordering::Relaxed);
        let vain = usize::from(count == 0);
        let before = self.in_vain.fetch_add(vain, Ordering::Relaxed);
        assert!(before < 100, "it is asked for ever");
        // It says 0 where it ought to fail.
        Ok(count)
    }

    fn free_twins(&self, twins: &[Pfn]) {
        self.left.fetch_add(twins.len(), Ordering::Relaxed);
    }

    fn install(&self, entry: &FrozenEntry<'_>, page: Pfn, content: Content) -> Result<(), Failure> {
        self.least.install(entry, page, content)
    }

    fn remove(&self, entry: &FrozenEntry<'_>, drained: &Drained) -> Result<(), Failure> {
        self.least.remove(entry, drained)
    }

    fn inspect(&self, place: EntryPlace) -> Inspected {
        self.least.inspect(place)
    }
}

type TestMmu<P> = Mmu<Ept, SoftwareHost<P>>;

fn building<P: ProtectedTable>(table: P) -> TestMmu<P> {
    let frames = MmapPool::new(PoolConfig {
        frames: 128,
        base: Pfn(0x1000),
        huge_pages: false,
    })
    .unwrap();
    let mmu = Mmu::builder(SoftwareHost::confidential(frames, TlbTracker::new(), table))
        .private_by_fault()
        .default_visibility(Visibility::Private)
        .build()
        .unwrap();
    let backing = LinearBacking::new(Pfn(0x8_0000), Level::L2).with_private(PRIVATE);
    mmu.slots()
        .insert(Slot::new(Gfn(0)..Gfn(4096), backing))
        .unwrap();
    mmu
}

fn guest<P: ProtectedTable>(table: P) -> TestMmu<P> {
    let mmu = building(table);
    mmu.build_private().unwrap().finalise().unwrap();
    assert_eq!(mmu.phase(), Some(Phase::Running));
    mmu
}

fn private(gfn: u64) -> Fault {
    Fault::write(Gfn(gfn).address()).private()
}

fn fixed(level: Level) -> Result<Outcome, FaultError> {
    Ok(Outcome::Fixed { level })
}

/// The capabilities of a module that splits and merges, for a hook that does neither.
fn resizing() -> Capabilities {
    Capabilities::none()
        .needs_block()
        .split_live()
        .merge()
        .leaves(Level::L1, Level::L2)
}

#[test]
fn a_hook_that_implements_the_least_serves_a_guest() {
    let none = Capabilities::none();
    for capabilities in [
        none,
        none.donation_per_op(1),
        none.needs_block(),
        none.needs_block().serialises_block().parallel_tickets(),
        none.needs_block().range_ops(),
    ] {
        let mmu = guest(Least::new(capabilities));
        let mut vcpu = mmu.vcpu().unwrap();
        for n in [0, 1, 2, 3, 600] {
            assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
        }
        // A call on many entries does one, which is enough to get on.
        let done = vcpu.prefault(Gfn(2)..Gfn(40), Visibility::Private).unwrap();
        assert_eq!((done.frames, done.stopped), (36, None));
        // Pages that it asks for are not missed.
        *mmu.host().protected_table().answers.lock().unwrap() = [Failure::NeedPages(1)].into();
        assert_eq!(vcpu.fault(private(40)), fixed(Level::L1));
        assert_eq!(mmu.stats().pages, [42, 0, 0]);
        assert_eq!(mmu.audit_protected(SPACE).different, 0);
        // Nor is a kick, which would only make a long wait shorter.
        let busy = || Failure::Busy { scope: Scope::Tree };
        *mmu.host().protected_table().answers.lock().unwrap() =
            std::iter::repeat_with(busy).take(40).collect();
        let removed = mmu.zap_private(SPACE, Gfn(0)..Gfn(1024)).unwrap();
        assert_eq!((removed.frames, removed.tables), (42, 2));
        assert_eq!(mmu.stats().protected.busy_of(HandOffStep::Remove), 40);
        assert!(
            mmu.host()
                .protected_table()
                .pages
                .lock()
                .unwrap()
                .is_empty()
        );
        assert_eq!(mmu.audit_protected(SPACE).different, 0);
        assert_eq!(vcpu.fault(private(0)), fixed(Level::L1));
    }
}

#[test]
fn a_split_and_a_merge_that_a_hook_leaves_out_are_refused_and_undone() {
    let mmu = guest(Least::new(resizing()));
    let mut vcpu = mmu.vcpu().unwrap();
    assert_eq!(vcpu.fault(private(0)), fixed(Level::L2));
    assert_eq!(vcpu.fault(private(3).max_level(Level::L1)), REFUSED);
    assert_eq!(mmu.phase(), Some(Phase::Running));
    assert_eq!(mmu.stats().pages, [0, 1, 0]);
    assert_eq!(mmu.audit_protected(SPACE).different, 0);
    assert_eq!(vcpu.fault(private(3)), Ok(Outcome::Spurious));
    for n in 512..1024 {
        assert_eq!(
            vcpu.fault(private(n).max_level(Level::L1)),
            fixed(Level::L1)
        );
    }
    mmu.allow_huge(Gfn(512));
    let folded = mmu.fold_private(SPACE, Gfn(0)..Gfn(1024)).unwrap();
    assert_eq!((folded.folded, folded.left), (0, 1));
    assert_eq!(mmu.stats().pages, [512, 1, 0]);
    assert_eq!(mmu.audit_protected(SPACE).different, 0);
    assert_eq!(vcpu.fault(private(600)), Ok(Outcome::Spurious));
}

#[test]
fn what_a_hook_does_not_give_back_is_leaked() {
    let mmu = guest(Least::new(Capabilities::none()));
    let mut vcpu = mmu.vcpu().unwrap();
    for n in 0..3 {
        assert_eq!(vcpu.fault(private(n)), fixed(Level::L1));
    }
    let error = mmu.reclaim_private().unwrap_err();
    assert_eq!((error.failed, error.removed.leaked), (3, 3));
    assert_eq!(error.first.step, HandOffStep::Reclaim);
    assert_eq!(error.first.cause, HandOffCause::Refused(0));
    assert_eq!(mmu.stats().pages, [0; 3]);
}

#[test]
fn a_hook_that_begins_a_call_and_cannot_go_on_with_it_gives_the_guest_up() {
    let mmu = guest(Least::new(Capabilities::none().resumable()));
    *mmu.host().protected_table().answers.lock().unwrap() = [Failure::Incomplete(Token(1))].into();
    assert_eq!(mmu.vcpu().unwrap().fault(private(0)), REFUSED);
    assert_eq!(mmu.phase(), Some(Phase::Lost));
    assert_eq!(mmu.stats().pages, [0; 3]);
}

#[test]
fn a_fault_that_finds_no_page_for_a_table_of_the_module_says_so() {
    let without = guest(Least::new(Capabilities::none().needs_link()));
    let mut vcpu = without.vcpu().unwrap();
    assert_eq!(vcpu.fault(private(0)), Err(FaultError::OutOfFrames));
    let mmu = guest(WithTwins::new(Capabilities::none().needs_link(), 0));
    let mut vcpu = mmu.vcpu().unwrap();
    let left = &mmu.host().protected_table().left;
    assert_eq!(vcpu.fault(private(0)), Err(FaultError::OutOfFrames));
    assert_eq!(
        vcpu.batch().unwrap().fault(private(0)),
        Err(FaultError::OutOfFrames)
    );
    left.store(16, Ordering::Relaxed);
    assert_eq!(vcpu.fault(private(0)), fixed(Level::L1));
    assert_eq!(mmu.stats().tables, 3);
    // A call that is left out links and unlinks whatever it is given.
    let removed = mmu.zap_private(SPACE, Gfn(0)..Gfn(512)).unwrap();
    assert_eq!((removed.frames, removed.tables), (1, 1));
    assert_eq!(mmu.stats().tables, 2);
}

/// Fewer pages than a fault may need are no page: the fault ends with an error, and they are kept for the next one, or go home
/// with the vCPU.
#[test]
fn a_fault_that_finds_too_few_pages_for_the_tables_of_the_module_loses_none() {
    let mmu = guest(WithTwins::new(Capabilities::none().needs_link(), 1));
    let left = &mmu.host().protected_table().left;
    let mut vcpu = mmu.vcpu().unwrap();
    let allocated = mmu.host().frames().allocated();
    for _ in 0..3 {
        assert_eq!(vcpu.fault(private(0)), Err(FaultError::OutOfFrames));
        let batched = vcpu.batch().unwrap().fault(private(0));
        assert_eq!(batched, Err(FaultError::OutOfFrames));
    }
    assert_eq!((mmu.stats().tables, mmu.stats().pages), (0, [0; 3]));
    assert_eq!(left.load(Ordering::Relaxed), 0);
    drop(vcpu);
    assert_eq!(left.load(Ordering::Relaxed), 1, "it is back");
    assert!(mmu.host().frames().allocated() <= allocated);
    // What one fault could not use the next one can.
    let mut vcpu = mmu.vcpu().unwrap();
    assert_eq!(vcpu.fault(private(0)), Err(FaultError::OutOfFrames));
    left.store(15, Ordering::Relaxed);
    assert_eq!(vcpu.fault(private(0)), fixed(Level::L1));
    drop(vcpu);
    let tables = mmu.stats().tables as usize;
    assert_eq!(left.load(Ordering::Relaxed) + tables, 16);
}

/// A split needs a table and its twin. Without either the large leaf stays the guest's, and nothing that was taken for the
/// split is lost.
#[test]
fn a_split_without_a_page_for_its_table_changes_nothing() {
    let mmu = guest(WithTwins::new(resizing().needs_link(), 16));
    let mut vcpu = mmu.vcpu().unwrap();
    assert_eq!(vcpu.fault(private(0)), fixed(Level::L2));
    assert_eq!(mmu.host().protected_table().left.load(Ordering::Relaxed), 0);
    let small = private(3).max_level(Level::L1);
    let allocated = mmu.host().frames().allocated();
    let unchanged = |allocated: usize| {
        assert_eq!(mmu.stats().pages, [0, 1, 0]);
        assert_eq!(mmu.stats().protected.calls_of(HandOffStep::Block), 0);
        assert_eq!(mmu.host().frames().allocated(), allocated);
    };
    assert_eq!(vcpu.fault(small), Err(FaultError::OutOfFrames));
    unchanged(allocated);
    // Twins, and no frame.
    mmu.host()
        .protected_table()
        .left
        .store(16, Ordering::Relaxed);
    let frames = mmu.host().frames();
    let mut taken = Vec::new();
    let mut room = [Pfn(0); 16];
    while let Ok(count) = frames.allocate(&mut room) {
        taken.extend_from_slice(&room[..count]);
    }
    assert_eq!(vcpu.fault(small), Err(FaultError::OutOfFrames));
    unchanged(allocated + taken.len());
    frames.free(&taken);
    assert_eq!(vcpu.fault(private(3)), Ok(Outcome::Spurious));
}

/// A private half on a host that has no module for it: nothing is ever mapped there, and the guest is told once and for all.
#[test]
fn a_private_half_without_a_module_is_lost_at_its_first_page() {
    let frames = MmapPool::new(PoolConfig {
        frames: 64,
        base: Pfn(0x1000),
        huge_pages: false,
    })
    .unwrap();
    let mmu = Mmu::<Ept, _>::builder(SoftwareHost::new(frames))
        .private_by_fault()
        .build()
        .unwrap();
    let backing = LinearBacking::new(Pfn(0x8_0000), Level::L1).with_private(PRIVATE);
    mmu.slots()
        .insert(Slot::new(Gfn(0)..Gfn(512), backing))
        .unwrap();
    mmu.build_private().unwrap().finalise().unwrap();
    mmu.convert(SPACE, Gfn(0)..Gfn(1), Visibility::Private)
        .unwrap();
    let mut vcpu = mmu.vcpu().unwrap();
    assert_eq!(vcpu.fault(private(0)), REFUSED);
    assert_eq!(mmu.phase(), Some(Phase::Lost));
    assert_eq!(mmu.audit_protected(SPACE).different, 0);
    // The shared half lives on.
    let shared = Fault::write(Gfn(1).address());
    assert_eq!(vcpu.fault(shared), fixed(Level::L1));
}

#[test]
fn an_error_says_which_call_failed_where_and_why() {
    let place = EntryPlace {
        as_id: SPACE,
        gfn: Gfn(0x200),
        level: Level::L2,
    };
    assert_eq!(place.range(), (Gfn(0x200)..Gfn(0x400)).into());
    let mut names = std::collections::HashSet::new();
    for step in HandOffStep::ALL {
        assert!(names.insert(step.name()), "{} twice", step.name());
        for (cause, why) in [
            (HandOffCause::Busy, "busy"),
            (HandOffCause::Refused(0x1234), "0x1234"),
            (HandOffCause::Fatal, "gave the VM up"),
            (HandOffCause::OutOfFrames, "no page"),
            (HandOffCause::Panicked, "panicked"),
        ] {
            let said = HandOffError { place, step, cause }.to_string();
            for part in [step.name(), "0x200", "level 2", why] {
                assert!(said.contains(part), "{said:?} does not name {part:?}");
            }
        }
    }
}
