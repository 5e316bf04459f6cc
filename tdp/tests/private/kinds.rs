//! What each kind of failure obliges the MMU to do, with a module that answers by a script.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use tdp::protected::{
    Capabilities, Content, Drained, Failure, HandOffCause, HandOffStep, Inspected, Scope, Ticket,
    Token,
};
use tdp::{
    AddressSpaceId, ConvertError, EntryPlace, Ept, Fault, FaultError, FrozenEntry, Gfn, ImageError,
    Level, LinearBacking, MemoryFault, MmapPool, Mmu, OutOfFrames, Outcome, Pfn, Phase, PoolConfig,
    ProtectedTable, RetryReason, Slot, SlotFlags, SoftwareHost, TlbTracker, Visibility,
};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const PRIVATE: Pfn = Pfn(0x10_0000);
/// Under which the answers to calls on many entries are scripted; this module merges nothing.
const MANY: HandOffStep = HandOffStep::Merge;
/// Under which the answers to the end of the building are; it reclaims nothing either.
const FINALISE: HandOffStep = HandOffStep::Reclaim;
/// Under which those of calls that are gone on with are; it splits nothing either.
const RESUME: HandOffStep = HandOffStep::Split;

#[derive(Default)]
struct State {
    /// What each place holds; `None` for a table.
    entries: HashMap<(u64, u8), Option<Pfn>>,
    /// What the next calls of a step are answered.
    answers: HashMap<HandOffStep, VecDeque<Failure>>,
    /// Tokens that `resume` was called with.
    resumed: Vec<u64>,
    donated: u32,
    /// There are no pages to be donated.
    stingy: bool,
    /// Tickets begun.
    tickets: u64,
    /// The ticket that does not drain.
    held: Option<u64>,
    kicks: u32,
    /// Busy with every page until it is asked to kick.
    busy_until_kicked: bool,
    calls: Vec<HandOffStep>,
    twins: u64,
    /// Pages of each call on many entries.
    runs: Vec<usize>,
}

struct Scripted {
    capabilities: Capabilities,
    state: Mutex<State>,
    /// Pages that it was told are never to be used again. Outlives the MMU.
    leaked: Leaked,
}

type Leaked = Arc<Mutex<Vec<(Pfn, Level)>>>;

impl Scripted {
    fn answer(&self, step: HandOffStep) -> Result<(), Failure> {
        let mut state = self.state.lock().unwrap();
        if state.busy_until_kicked && step == HandOffStep::Install {
            return Err(busy(Scope::Entry));
        }
        state.calls.push(step);
        match state.answers.get_mut(&step).and_then(VecDeque::pop_front) {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    fn set(&self, entry: &FrozenEntry<'_>, to: Option<Option<Pfn>>) {
        let EntryPlace { gfn, level, .. } = entry.place();
        let mut state = self.state.lock().unwrap();
        match to {
            Some(what) => state.entries.insert((gfn.0, level.number()), what),
            None => state.entries.remove(&(gfn.0, level.number())),
        };
    }
}

impl ProtectedTable for Scripted {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn allocate_twins(&self, out: &mut [Pfn]) -> Result<usize, OutOfFrames> {
        let mut state = self.state.lock().unwrap();
        for slot in out.iter_mut() {
            state.twins += 1;
            *slot = Pfn(0x9_0000 + state.twins);
        }
        Ok(out.len())
    }

    fn donate(&self, pages: u32) -> Result<(), OutOfFrames> {
        let mut state = self.state.lock().unwrap();
        if state.stingy {
            return Err(OutOfFrames { limit: 0 });
        }
        state.donated += pages;
        Ok(())
    }

    fn kick(&self) {
        let mut state = self.state.lock().unwrap();
        state.kicks += 1;
        state.busy_until_kicked = false;
    }

    fn link(&self, entry: &FrozenEntry<'_>, _: Pfn) -> Result<(), Failure> {
        self.answer(HandOffStep::Link)?;
        self.set(entry, Some(None));
        Ok(())
    }

    fn install(&self, entry: &FrozenEntry<'_>, page: Pfn, _: Content) -> Result<(), Failure> {
        let answer = self.answer(HandOffStep::Install);
        // A call that is incomplete has begun.
        if matches!(answer, Ok(()) | Err(Failure::Incomplete(_))) {
            self.set(entry, Some(Some(page)));
        }
        answer
    }

    fn install_many(
        &self,
        entries: &[FrozenEntry<'_>],
        first: Pfn,
        _: Content,
    ) -> Result<(), Failure> {
        let done = match self.answer(MANY) {
            Ok(()) => entries.len(),
            Err(Failure::Partial(done)) => done,
            Err(failure) => return Err(failure),
        };
        for (n, entry) in entries.iter().enumerate().take(done) {
            self.set(entry, Some(Some(Pfn(first.0 + n as u64))));
        }
        self.state.lock().unwrap().runs.push(done);
        if done == entries.len() {
            Ok(())
        } else {
            Err(Failure::Partial(done))
        }
    }

    fn block(&self, _: &FrozenEntry<'_>) -> Result<(), Failure> {
        self.answer(HandOffStep::Block)
    }

    fn flush_begin(&self) -> Result<Ticket, Failure> {
        self.answer(HandOffStep::Flush)?;
        let mut state = self.state.lock().unwrap();
        state.tickets += 1;
        Ok(Ticket::new(state.tickets))
    }

    fn flush_poll(&self, ticket: Ticket) -> Result<Drained, Ticket> {
        if self.state.lock().unwrap().held == Some(ticket.number()) {
            Err(ticket)
        } else {
            Ok(ticket.drained())
        }
    }

    fn remove(&self, entry: &FrozenEntry<'_>, _: &Drained) -> Result<(), Failure> {
        self.answer(HandOffStep::Remove)?;
        self.set(entry, None);
        Ok(())
    }

    fn unlink(&self, entry: &FrozenEntry<'_>, _: &Drained) -> Result<(), Failure> {
        self.answer(HandOffStep::Unlink)?;
        self.set(entry, None);
        Ok(())
    }

    fn resume(&self, _: &FrozenEntry<'_>, token: Token) -> Result<(), Failure> {
        let mut state = self.state.lock().unwrap();
        state.resumed.push(token.0);
        let answers = state.answers.get_mut(&RESUME);
        if let Some(failure) = answers.and_then(VecDeque::pop_front) {
            return Err(failure);
        }
        match token.0 {
            0 => Ok(()),
            left => Err(Failure::Incomplete(Token(left - 1))),
        }
    }

    fn finalise(&self) -> Result<(), Failure> {
        match self.state.lock().unwrap().answers.get_mut(&FINALISE) {
            Some(answers) => answers.pop_front().map_or(Ok(()), Err),
            None => Ok(()),
        }
    }

    fn leaked(&self, page: Pfn, level: Level) {
        self.leaked.lock().unwrap().push((page, level));
    }

    fn inspect(&self, place: EntryPlace) -> Inspected {
        let state = self.state.lock().unwrap();
        match state.entries.get(&(place.gfn.0, place.level.number())) {
            None => Inspected::Free,
            Some(None) => Inspected::Table { blocked: false },
            Some(&Some(pfn)) => Inspected::Leaf {
                pfn,
                pending: true,
                blocked: false,
            },
        }
    }
}

type TestMmu = Mmu<Ept, SoftwareHost<Scripted>>;

fn building(capabilities: Capabilities) -> TestMmu {
    building_in(1, capabilities)
}

fn building_in(spaces: u8, capabilities: Capabilities) -> TestMmu {
    let frames = MmapPool::new(PoolConfig {
        frames: 256,
        base: Pfn(0x1000),
        huge_pages: false,
    })
    .unwrap();
    let table = Scripted {
        capabilities,
        state: Mutex::default(),
        leaked: Leaked::default(),
    };
    let host = SoftwareHost::confidential(frames, TlbTracker::new(), table);
    let mmu = TestMmu::builder(host)
        .private_by_fault()
        .address_spaces(spaces)
        .default_visibility(Visibility::Private)
        .build()
        .unwrap();
    let backing = LinearBacking::new(Pfn(0x8_0000), Level::L1).with_private(PRIVATE);
    mmu.slots()
        .insert(Slot::new(Gfn(0)..Gfn(4096), backing))
        .unwrap();
    mmu
}

fn guest(capabilities: Capabilities) -> TestMmu {
    let mmu = building(capabilities);
    mmu.build_private().unwrap().finalise().unwrap();
    mmu
}

fn usual() -> TestMmu {
    guest(Capabilities::none().needs_link().needs_block())
}

fn script(mmu: &TestMmu, step: HandOffStep, answers: impl IntoIterator<Item = Failure>) {
    let mut state = mmu.host().protected_table().state.lock().unwrap();
    state.answers.insert(step, answers.into_iter().collect());
}

fn touch(mmu: &TestMmu, gfn: u64) -> Result<Outcome, FaultError> {
    let fault = Fault::write(Gfn(gfn).address()).private();
    mmu.vcpu().unwrap().fault(fault)
}

const FIXED: Result<Outcome, FaultError> = Ok(Outcome::Fixed { level: Level::L1 });
const REFUSED: Result<Outcome, FaultError> = Ok(Outcome::MemoryFault(MemoryFault::Refused));

#[track_caller]
fn check(mmu: &TestMmu) {
    let audit = mmu.audit_protected(SPACE);
    assert_eq!(audit.different, 0, "{audit:?}");
    assert_eq!(mmu.audit().frozen, 0);
    let (audit, stats) = (mmu.audit(), mmu.stats());
    assert_eq!((audit.pages, audit.tables), (stats.pages, stats.tables));
}

fn busy(scope: Scope) -> Failure {
    Failure::Busy { scope }
}

#[test]
fn busy_in_every_scope_and_restart_are_met_by_the_call_again() {
    let scopes = [
        Scope::Entry,
        Scope::Tree,
        Scope::Vm,
        Scope::Epoch,
        Scope::PhysNeighbour,
    ];
    for step in [HandOffStep::Link, HandOffStep::Install] {
        let mmu = usual();
        script(
            &mmu,
            step,
            scopes.map(busy).into_iter().chain([Failure::Restart]),
        );
        assert_eq!(touch(&mmu, 3), FIXED);
        assert_eq!(mmu.stats().protected.busy_of(step), 6);
        check(&mmu);
    }
    for step in [
        HandOffStep::Block,
        HandOffStep::Flush,
        HandOffStep::Remove,
        HandOffStep::Unlink,
    ] {
        let mmu = usual();
        assert_eq!(touch(&mmu, 3), FIXED);
        script(
            &mmu,
            step,
            scopes.map(busy).into_iter().chain([Failure::Restart]),
        );
        let removed = mmu.zap_private(SPACE, Gfn(0)..Gfn(512)).unwrap();
        assert_eq!((removed.frames, removed.tables), (1, 1));
        assert_eq!(mmu.stats().protected.busy_of(step), 6);
        check(&mmu);
    }
}

#[test]
fn vcpus_are_kicked_where_that_helps_and_only_there() {
    for (scope, helps) in [
        (Scope::Tree, true),
        (Scope::Epoch, true),
        (Scope::PhysNeighbour, false),
    ] {
        let mmu = usual();
        assert_eq!(touch(&mmu, 3), FIXED);
        script(&mmu, HandOffStep::Block, (0..40).map(|_| busy(scope)));
        mmu.zap_private(SPACE, Gfn(3)..Gfn(4)).unwrap();
        let kicks = mmu.host().protected_table().state.lock().unwrap().kicks;
        assert_eq!(kicks > 0, helps, "{scope:?}");
    }
}

#[test]
fn a_module_that_stays_busy_is_given_up_before_the_ticket_and_never_after() {
    let mmu = usual();
    assert_eq!(touch(&mmu, 3), FIXED);
    script(
        &mmu,
        HandOffStep::Block,
        (0..10_000).map(|_| busy(Scope::Entry)),
    );
    let error = match mmu.zap_private(SPACE, Gfn(3)..Gfn(4)) {
        Err(ConvertError::Removal(error)) => error,
        other => panic!("{other:?}"),
    };
    assert_eq!(error.first.cause, HandOffCause::Busy);
    check(&mmu);
    assert_eq!(touch(&mmu, 3), Ok(Outcome::Spurious));
    script(&mmu, HandOffStep::Block, []);
    // More than a sweep waits: nothing undoes what follows a ticket.
    script(
        &mmu,
        HandOffStep::Remove,
        (0..2000).map(|_| busy(Scope::Entry)),
    );
    assert_eq!(mmu.zap_private(SPACE, Gfn(3)..Gfn(4)).unwrap().frames, 1);
    check(&mmu);
}

#[test]
fn what_is_not_drained_is_asked_again_and_not_blocked_again() {
    let mmu = usual();
    assert_eq!(touch(&mmu, 3), FIXED);
    script(
        &mmu,
        HandOffStep::Remove,
        (0..20).map(|_| Failure::NotDrained),
    );
    mmu.zap_private(SPACE, Gfn(3)..Gfn(4)).unwrap();
    let calls = mmu.stats().protected;
    assert_eq!(calls.calls_of(HandOffStep::Block), 1);
    assert_eq!(calls.calls_of(HandOffStep::Remove), 21);
    check(&mmu);
}

#[test]
fn an_incomplete_call_is_gone_on_with_until_it_is_done() {
    let mmu = guest(Capabilities::none().needs_link().needs_block().resumable());
    script(&mmu, HandOffStep::Install, [Failure::Incomplete(Token(3))]);
    assert_eq!(touch(&mmu, 3), FIXED);
    let resumed = mmu
        .host()
        .protected_table()
        .state
        .lock()
        .unwrap()
        .resumed
        .clone();
    assert_eq!(resumed, [3, 2, 1, 0]);
    assert_eq!(mmu.stats().protected.calls_of(HandOffStep::Install), 1);
    check(&mmu);
}

/// It has begun: nothing but its end can follow, however long the module is busy, and what it says then is final.
#[test]
fn an_incomplete_call_is_gone_on_with_however_often_the_module_is_busy() {
    let resumable = Capabilities::none().needs_link().needs_block().resumable();
    let begun = || Failure::Incomplete(Token(2));
    let state = |mmu: &TestMmu| {
        mmu.host()
            .protected_table()
            .state
            .lock()
            .unwrap()
            .resumed
            .clone()
    };
    let mmu = guest(resumable);
    script(&mmu, HandOffStep::Install, [begun()]);
    let again = [busy(Scope::Entry), Failure::NotDrained, Failure::Restart];
    script(&mmu, RESUME, again);
    assert_eq!(touch(&mmu, 3), FIXED);
    assert_eq!(state(&mmu), [2, 2, 2, 2, 1, 0], "with the same token");
    check(&mmu);
    let mmu = guest(resumable);
    script(&mmu, HandOffStep::Link, [begun()]);
    script(&mmu, RESUME, [Failure::Refused(7)]);
    assert_eq!(touch(&mmu, 3), REFUSED);
    assert_eq!(mmu.phase(), Some(Phase::Running));
    check(&mmu);
    assert_eq!(touch(&mmu, 3), FIXED);
    let mmu = guest(resumable);
    script(&mmu, HandOffStep::Link, [begun()]);
    script(&mmu, RESUME, [Failure::NeedPages(1)]);
    assert_eq!(touch(&mmu, 3), REFUSED);
    assert_eq!(mmu.phase(), Some(Phase::Lost));
    check(&mmu);
}

#[test]
fn pages_that_the_module_needs_are_donated() {
    let mmu = usual();
    script(
        &mmu,
        HandOffStep::Install,
        [Failure::NeedPages(2), Failure::NeedPages(1)],
    );
    assert_eq!(touch(&mmu, 3), FIXED);
    assert_eq!(
        mmu.host().protected_table().state.lock().unwrap().donated,
        3
    );
    check(&mmu);
    // One that asks for ever is not believed for ever.
    script(
        &mmu,
        HandOffStep::Install,
        (0..100).map(|_| Failure::NeedPages(1)),
    );
    assert_eq!(touch(&mmu, 4), REFUSED);
    check(&mmu);
}

#[test]
fn a_refusal_is_undone_and_reported() {
    for step in [HandOffStep::Link, HandOffStep::Install] {
        let mmu = usual();
        script(&mmu, step, [Failure::Refused(5)]);
        assert_eq!(touch(&mmu, 3), REFUSED);
        assert_eq!(mmu.phase(), Some(Phase::Running));
        check(&mmu);
        assert_eq!(touch(&mmu, 3), FIXED);
    }
}

#[test]
fn a_guest_that_is_given_up_is_lost_for_good() {
    let mmu = usual();
    assert_eq!(touch(&mmu, 2), FIXED);
    script(&mmu, HandOffStep::Install, [Failure::Fatal]);
    assert_eq!(touch(&mmu, 3), REFUSED);
    assert_eq!(mmu.phase(), Some(Phase::Lost));
    check(&mmu);
    let calls = mmu.stats().protected.calls_of(HandOffStep::Install);
    assert_eq!(touch(&mmu, 4), REFUSED);
    assert_eq!(mmu.stats().protected.calls_of(HandOffStep::Install), calls);
}

#[test]
fn a_guest_that_is_given_up_during_a_removal_is_lost_too() {
    for step in [HandOffStep::Block, HandOffStep::Flush, HandOffStep::Remove] {
        let mmu = usual();
        assert_eq!(touch(&mmu, 2), FIXED);
        script(&mmu, step, [Failure::Fatal]);
        let error = match mmu.zap_private(SPACE, Gfn(2)..Gfn(3)) {
            Err(ConvertError::Removal(error)) => error,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            (error.first.step, error.first.cause),
            (step, HandOffCause::Fatal)
        );
        assert_eq!(mmu.phase(), Some(Phase::Lost));
        assert_eq!(touch(&mmu, 3), REFUSED);
        assert_eq!(mmu.stats().pages, [1, 0, 0], "what was not taken out stays");
    }
}

#[test]
fn what_does_not_suit_a_call_gives_the_guest_up() {
    // One entry has no parts, and this module cannot go on with anything.
    for failure in [Failure::Partial(1), Failure::Incomplete(Token(0))] {
        let mmu = usual();
        script(&mmu, HandOffStep::Link, [failure]);
        assert_eq!(touch(&mmu, 3), REFUSED);
        assert_eq!(mmu.phase(), Some(Phase::Lost));
        check(&mmu);
    }
}

#[test]
fn finalising_is_persisted_in_as_any_call() {
    let answers = [
        busy(Scope::Vm),
        Failure::Restart,
        Failure::NeedPages(2),
        Failure::Refused(9),
    ];
    let mmu = building(Capabilities::none());
    script(&mmu, FINALISE, answers);
    let mut image = mmu.build_private().unwrap();
    assert_eq!(
        image.finalise(),
        Err(ImageError::Finalise(HandOffCause::Refused(9)))
    );
    assert_eq!(
        mmu.host().protected_table().state.lock().unwrap().donated,
        2
    );
    assert_eq!(mmu.phase(), Some(Phase::Building));
    script(&mmu, FINALISE, [Failure::Fatal]);
    assert!(image.finalise().is_err());
    assert_eq!(mmu.phase(), Some(Phase::Lost));
    // And it never runs: there is no way back.
    assert!(matches!(
        image.finalise(),
        Err(ImageError::Phase { phase: Phase::Lost })
    ));
}

#[test]
fn finalising_is_given_up_in_the_end_and_can_be_tried_again() {
    let mmu = building(Capabilities::none());
    let mut image = mmu.build_private().unwrap();
    let stingy = |on| mmu.host().protected_table().state.lock().unwrap().stingy = on;
    let for_ever = |failure: fn() -> Failure| {
        script(&mmu, FINALISE, std::iter::repeat_with(failure).take(10_000));
    };
    for (failure, cause) in [
        ((|| busy(Scope::Vm)) as fn() -> Failure, HandOffCause::Busy),
        (|| Failure::Restart, HandOffCause::Busy),
        (|| Failure::NeedPages(1), HandOffCause::OutOfFrames),
    ] {
        for_ever(failure);
        assert_eq!(image.finalise(), Err(ImageError::Finalise(cause)));
        assert_eq!(mmu.phase(), Some(Phase::Building));
    }
    // Without a page to give it is not asked again.
    stingy(true);
    script(&mmu, FINALISE, [Failure::NeedPages(1)]);
    let out = HandOffCause::OutOfFrames;
    assert_eq!(image.finalise(), Err(ImageError::Finalise(out)));
    assert_eq!(
        touch(&mmu, 3),
        Ok(Outcome::MemoryFault(MemoryFault::NotFinalised))
    );
    stingy(false);
    image.finalise().unwrap();
    assert_eq!(touch(&mmu, 3), FIXED);
}

#[test]
fn memory_of_a_guest_that_is_lost_is_not_converted() {
    let mmu = usual();
    assert_eq!(touch(&mmu, 2), FIXED);
    script(&mmu, HandOffStep::Install, [Failure::Fatal]);
    assert_eq!(touch(&mmu, 3), REFUSED);
    for to in [Visibility::Shared, Visibility::Private] {
        assert_eq!(
            mmu.convert(SPACE, Gfn(2)..Gfn(3), to),
            Err(ConvertError::Phase { phase: Phase::Lost })
        );
    }
    assert_eq!(mmu.visibility(Gfn(2)), Some(Visibility::Private));
    assert_eq!(mmu.stats().pages, [1, 0, 0]);
}

/// The embedder takes the MMU down without having had everything back. It is told of all that the module still has, below a
/// table that a fold has left blocked too, and of nothing twice.
#[test]
fn what_the_module_has_when_the_mmu_goes_is_leaked() {
    let capabilities = Capabilities::none().needs_link().needs_block().merge();
    let mmu = guest(capabilities.leaves(Level::L1, Level::L2));
    let mut vcpu = mmu.vcpu().unwrap();
    for n in 0..600 {
        assert_eq!(vcpu.fault(write(n)), FIXED);
    }
    script(&mmu, HandOffStep::Flush, [Failure::Refused(1)]);
    assert!(mmu.fold_private(SPACE, Gfn(0)..Gfn(512)).is_err());
    assert_eq!(mmu.stats().pages, [600, 0, 0]);
    let tables = mmu.stats().tables;
    let leaked = mmu.host().protected_table().leaked.clone();
    assert_eq!(*leaked.lock().unwrap(), []);
    drop((vcpu, mmu));
    let mut leaked = leaked.lock().unwrap();
    leaked.sort();
    let (twins, pages) = leaked.split_at(tables as usize);
    let expected = (0..600).map(|n| (Pfn(PRIVATE.0 + n), Level::L1));
    assert!(pages.iter().copied().eq(expected), "{} pages", pages.len());
    assert!(
        twins
            .iter()
            .all(|(twin, level)| twin.0 < PRIVATE.0 && *level == Level::L1)
    );
    assert!(twins.windows(2).all(|two| two[0] != two[1]));
}

/// The module hears of no fold that cannot be: where it merges nothing or has small leaves only, and of pages that make no large
/// one because the first of them is not where a large one begins.
#[test]
fn a_fold_that_cannot_be_makes_no_call() {
    let usual = Capabilities::none().needs_link().needs_block();
    let aligned = Pfn(0x20_0000);
    let skewed = |by| Pfn(aligned.0 + by);
    for (capabilities, first, is_asked) in [
        (usual.merge().leaves(Level::L1, Level::L2), aligned, true),
        (usual.merge(), aligned, false),
        (usual.leaves(Level::L1, Level::L2), aligned, false),
        (usual.merge().leaves(Level::L1, Level::L2), skewed(1), false),
        (usual.merge().leaves(Level::L1, Level::L2), skewed(2), false),
        (
            usual.merge().leaves(Level::L1, Level::L2),
            skewed(256),
            false,
        ),
    ] {
        let mmu = guest(capabilities);
        let base = 1 << 15;
        let range = Gfn(base)..Gfn(base + 512);
        let backing = LinearBacking::new(Pfn(0x8_0000), Level::L1).with_private(first);
        mmu.slots()
            .insert(Slot::new(range.clone(), backing))
            .unwrap();
        let mut vcpu = mmu.vcpu().unwrap();
        for n in 0..512 {
            assert_eq!(vcpu.fault(write(base + n)), FIXED);
        }
        let calls = || mmu.stats().protected.calls.iter().sum::<u64>();
        let before = calls();
        let folded = mmu.fold_private(SPACE, range);
        assert_eq!(folded.map(|it| it.folded), Ok(0));
        assert_eq!(calls() > before, is_asked, "{capabilities:?}, {first:?}");
        assert_eq!(mmu.stats().pages, [512, 0, 0]);
        check(&mmu);
    }
}

/// The straight way makes a call a few times, then leaves the critical section and goes on outside.
#[test]
fn a_module_that_is_busy_for_longer_than_a_section_may_last_is_waited_for_outside() {
    let mmu = usual();
    let mut vcpu = mmu.vcpu().unwrap();
    for n in 0..4 {
        assert_eq!(vcpu.fault(write(n)), FIXED);
    }
    script(
        &mmu,
        HandOffStep::Install,
        (0..30).map(|_| busy(Scope::Entry)),
    );
    assert_eq!(vcpu.fault(write(4)), FIXED);
    assert_eq!(mmu.stats().protected.busy_of(HandOffStep::Install), 30);
    assert_eq!(mmu.stats().protected.sent_back, 0);
    check(&mmu);
    // A batch does not leave its section: the guest tries again.
    script(
        &mmu,
        HandOffStep::Install,
        (0..30).map(|_| busy(Scope::Entry)),
    );
    let outcome = vcpu.batch().unwrap().fault(write(5));
    assert_eq!(outcome, Ok(Outcome::Retry(RetryReason::Frozen)));
    check(&mmu);
    script(&mmu, HandOffStep::Install, []);
    assert_eq!(vcpu.batch().unwrap().fault(write(5)), FIXED);
    check(&mmu);
}

/// What one audit is for: whatever the module has otherwise than the tables say is found, and told where.
#[test]
fn an_audit_finds_what_the_module_has_otherwise() {
    let other = |mmu: &TestMmu, at: (u64, u8), what: Option<Option<Pfn>>| {
        let mut state = mmu.host().protected_table().state.lock().unwrap();
        match what {
            Some(what) => state.entries.insert(at, what),
            None => state.entries.remove(&at),
        };
    };
    let cases = [
        ((3, 1), None),
        ((3, 1), Some(Some(Pfn(PRIVATE.0 + 4)))),
        ((3, 1), Some(None)),
        ((5, 1), Some(Some(Pfn(PRIVATE.0 + 5)))),
        ((0, 2), None),
    ];
    for (at, what) in cases {
        let mmu = usual();
        assert_eq!(touch(&mmu, 3), FIXED);
        let before = mmu.audit_protected(SPACE);
        assert_eq!(
            (before.leaves, before.different, before.first),
            (1, 0, None)
        );
        other(&mmu, at, what);
        let audit = mmu.audit_protected(SPACE);
        assert_eq!(audit.different, 1, "{at:?}, {what:?}");
        let (place, _) = audit.first.unwrap();
        assert_eq!((place.gfn.0, place.level.number()), at);
    }
    let none = usual().audit_protected(AddressSpaceId(7));
    assert_eq!(none, Default::default(), "no such space");
}

/// One call takes neighbours that a fault each would take, and stops where one of those would come to something else.
#[test]
fn a_run_of_neighbours_ends_where_a_fault_would_end() {
    let range_ops = Capabilities::none().needs_link().needs_block().range_ops();
    let ahead = |mmu: &TestMmu, first: u64, last: u64| {
        let mut vcpu = mmu.vcpu().unwrap();
        let range = Gfn(first)..Gfn(last);
        vcpu.prefault(range, Visibility::Private).unwrap()
    };
    let stopped = |reason| Some(Outcome::MemoryFault(reason));
    // A frame that is shared.
    let mmu = guest(range_ops);
    mmu.convert(SPACE, Gfn(20)..Gfn(21), Visibility::Shared)
        .unwrap();
    let done = ahead(&mmu, 0, 40);
    assert_eq!((done.next, done.frames), (Gfn(20), 20));
    assert_eq!(done.stopped, stopped(MemoryFault::IsShared));
    check(&mmu);
    // The end of memory; a slot whose pages do not follow those of the one before; one that is only to be read; one without
    // private pages; one whose pages the host's addresses do not reach.
    let mmu = guest(range_ops);
    let base = 1 << 15;
    let slot = |first: u64, private: Option<Pfn>| {
        let backing = LinearBacking::new(Pfn(0x8_0000 + first), Level::L1);
        let backing = private.map_or(backing, |pfn| backing.with_private(pfn));
        Slot::new(Gfn(base + first)..Gfn(base + first + 64), backing)
    };
    for slot in [
        slot(0, Some(Pfn(0x30_0000))),
        slot(64, Some(Pfn(0x20_0000))),
        slot(128, Some(Pfn(0x40_0000))).with_flags(SlotFlags::READ_ONLY),
        slot(192, None),
        slot(256, Some(Pfn(1 << 50))),
    ] {
        mmu.slots().insert(slot).unwrap();
    }
    for (first, next, frames, reason) in [
        (0, 128, 128, MemoryFault::NotPermitted),
        (192, 192, 0, MemoryFault::NotBacked),
        (256, 256, 0, MemoryFault::NotBacked),
        (320, 320, 0, MemoryFault::NotBacked),
    ] {
        let done = ahead(&mmu, base + first, base + 400);
        assert_eq!((done.next, done.frames), (Gfn(base + next), frames));
        assert_eq!(done.stopped, stopped(reason), "from {first}");
    }
    let mut pages = Vec::new();
    mmu.visit_private_leaves(SPACE, Gfn(base)..Gfn(base + 400), |leaf| {
        pages.push((leaf.gfn.0 - base, leaf.pfn.0));
    });
    let expected = (0..128).map(|n| {
        (
            n,
            if n < 64 {
                0x30_0000 + n
            } else {
                0x20_0000 + n - 64
            },
        )
    });
    assert!(pages.into_iter().eq(expected));
    check(&mmu);
    // A run ends with its table, and the next page has one linked; there is none past the last slot.
    let done = ahead(&mmu, 511, 520);
    assert_eq!((done.frames, done.stopped), (9, None));
    let done = ahead(&mmu, 4094, 4100);
    assert_eq!((done.next, done.frames), (Gfn(4096), 2));
    assert_eq!(done.stopped, stopped(MemoryFault::NotBacked));
    // One that is under invalidation, beside a run.
    let window = mmu.invalidate_begin(SPACE, Gfn(10)..Gfn(11));
    let done = ahead(&mmu, 0, 40);
    assert_eq!((done.next, done.frames), (Gfn(10), 10));
    assert_eq!(
        done.stopped,
        Some(Outcome::Retry(RetryReason::Invalidation))
    );
    drop(window);
    assert_eq!(ahead(&mmu, 0, 40).frames, 30);
    check(&mmu);
}

/// A run that begins in one table does not go on in it as if that had no end.
#[test]
fn a_run_of_neighbours_goes_on_in_the_next_table() {
    let mmu = guest(Capabilities::none().needs_link().needs_block().range_ops());
    let mut vcpu = mmu.vcpu().unwrap();
    let range = Gfn(505)..Gfn(530);
    let done = vcpu.prefault(range.clone(), Visibility::Private).unwrap();
    assert_eq!((done.frames, done.stopped), (25, None));
    let mut pages = Vec::new();
    mmu.visit_private_leaves(SPACE, Gfn(0)..Gfn(1024), |leaf| {
        pages.push((leaf.gfn.0, leaf.pfn.0));
    });
    let expected = (505..530).map(|n| (n, PRIVATE.0 + n));
    assert!(pages.iter().copied().eq(expected), "{pages:x?}");
    check(&mmu);
}

/// Where shared memory is mapped ahead its private neighbours are not.
#[test]
fn shared_memory_is_mapped_ahead_without_its_private_neighbours() {
    let mmu = guest(Capabilities::none().needs_link().needs_block().range_ops());
    mmu.convert(SPACE, Gfn(0)..Gfn(4), Visibility::Shared)
        .unwrap();
    let mut vcpu = mmu.vcpu().unwrap();
    // Their table is there, and the vCPU has used it.
    for n in 100..104 {
        assert_eq!(vcpu.fault(write(n)), FIXED);
    }
    let done = vcpu.prefault(Gfn(0)..Gfn(8), Visibility::Shared).unwrap();
    assert_eq!((done.next, done.frames), (Gfn(4), 4));
    let stopped = Outcome::MemoryFault(MemoryFault::IsPrivate);
    assert_eq!(done.stopped, Some(stopped));
    let mut private = Vec::new();
    mmu.visit_private_leaves(SPACE, Gfn(0)..Gfn(512), |leaf| private.push(leaf.gfn.0));
    assert_eq!(private, [100, 101, 102, 103]);
    check(&mmu);
}

/// A module that knows no call on many entries gets none.
#[test]
fn a_module_without_calls_on_many_entries_takes_neighbours_one_by_one() {
    let mmu = usual();
    let mut vcpu = mmu.vcpu().unwrap();
    let done = vcpu.prefault(Gfn(0)..Gfn(40), Visibility::Private).unwrap();
    assert_eq!((done.frames, done.stopped), (40, None));
    let state = mmu.host().protected_table().state.lock().unwrap();
    assert_eq!(state.runs, [0; 0]);
    let installs = state
        .calls
        .iter()
        .filter(|&&call| call == HandOffStep::Install);
    assert_eq!(installs.count(), 40);
}

#[test]
fn neighbours_go_through_one_call_as_far_as_the_module_takes_them() {
    let mmu = guest(Capabilities::none().needs_link().needs_block().range_ops());
    // The first page by itself, which links the tables; then a run of which the module does seven; then the rest.
    script(&mmu, HandOffStep::Install, []);
    let mut vcpu = mmu.vcpu().unwrap();
    let done = vcpu.prefault(Gfn(0)..Gfn(1), Visibility::Private).unwrap();
    assert_eq!(done.frames, 1);
    assert_eq!(touch(&mmu, 30), FIXED);
    script(&mmu, MANY, [busy(Scope::Entry), Failure::Partial(7)]);
    let done = vcpu
        .prefault(Gfn(1)..Gfn(100), Visibility::Private)
        .unwrap();
    assert_eq!((done.frames, done.stopped), (98, None));
    assert_eq!(mmu.stats().pages, [100, 0, 0]);
    let runs = mmu
        .host()
        .protected_table()
        .state
        .lock()
        .unwrap()
        .runs
        .clone();
    assert!(runs.contains(&7), "{runs:?}");
    assert!(runs.iter().any(|&pages| pages > 20), "{runs:?}");
    let calls = mmu.stats().protected.calls_of(HandOffStep::Install);
    assert!(calls < 20, "{calls} calls for 100 pages");
    check(&mmu);
}

#[test]
fn a_module_without_links_and_blocks_sees_neither() {
    let mmu = guest(Capabilities::none());
    assert_eq!(touch(&mmu, 3), FIXED);
    mmu.zap_private(SPACE, Gfn(0)..Gfn(512)).unwrap();
    let calls = mmu
        .host()
        .protected_table()
        .state
        .lock()
        .unwrap()
        .calls
        .clone();
    assert_eq!(calls, [HandOffStep::Install, HandOffStep::Remove]);
    assert_eq!(mmu.stats().tables, 2, "the table is unlinked all the same");
    check(&mmu);
}

#[test]
fn a_conversion_takes_place_in_all_address_spaces() {
    let other = AddressSpaceId(1);
    let mmu = building_in(2, Capabilities::none().needs_link().needs_block());
    let backing = LinearBacking::new(Pfn(0x8_0000), Level::L1).with_private(PRIVATE);
    mmu.slots()
        .insert(Slot::new(Gfn(0)..Gfn(4096), backing).in_space(other))
        .unwrap();
    mmu.build_private().unwrap().finalise().unwrap();
    let mut vcpu = mmu.vcpu().unwrap();
    vcpu.set_address_space(other).unwrap();
    let mapped = |private: bool| {
        let mut leaves = 0;
        if private {
            mmu.visit_private_leaves(other, Gfn(0)..Gfn(4096), |_| leaves += 1);
        } else {
            mmu.visit_leaves(other, Gfn(0)..Gfn(4096), |_| leaves += 1);
        }
        leaves
    };
    let fault = Fault::write(Gfn(3).address());
    assert_eq!(vcpu.fault(fault.private()), FIXED);
    // Of the guest, whichever space is named.
    let removed = mmu
        .convert(SPACE, Gfn(3)..Gfn(4), Visibility::Shared)
        .unwrap();
    assert_eq!((removed.frames, mapped(true)), (1, 0));
    assert_eq!(vcpu.fault(fault), FIXED);
    mmu.convert(SPACE, Gfn(3)..Gfn(4), Visibility::Private)
        .unwrap();
    assert_eq!(mapped(false), 0);
    assert_eq!(vcpu.fault(fault.private()), FIXED);
}

/// Beside what failed the error tells all that was taken away, of every address space.
#[test]
fn what_was_removed_beside_a_failure_is_told_of_all_address_spaces() {
    let other = AddressSpaceId(1);
    let mmu = building_in(2, Capabilities::none().needs_link().needs_block());
    let backing = LinearBacking::new(Pfn(0x8_0000), Level::L1).with_private(PRIVATE);
    mmu.slots()
        .insert(Slot::new(Gfn(0)..Gfn(4096), backing).in_space(other))
        .unwrap();
    mmu.build_private().unwrap().finalise().unwrap();
    let mut vcpu = mmu.vcpu().unwrap();
    for space in [SPACE, other] {
        vcpu.set_address_space(space).unwrap();
        for n in 0..4 {
            assert_eq!(vcpu.fault(write(n)), FIXED);
        }
    }
    script(&mmu, HandOffStep::Block, [Failure::Refused(5)]);
    let error = match mmu.convert(SPACE, Gfn(0)..Gfn(4), Visibility::Shared) {
        Err(ConvertError::Removal(error)) => error,
        other => panic!("{other:?}"),
    };
    assert_eq!((error.failed, error.removed.frames), (1, 7));
    assert_eq!(error.first.place.as_id, SPACE);
    assert_eq!(mmu.stats().pages, [1, 0, 0]);
}

#[test]
fn a_module_that_cannot_finish_a_call_on_neighbours_gives_the_guest_up() {
    for failure in [Failure::Fatal, Failure::Incomplete(Token(1))] {
        let mmu = guest(
            Capabilities::none()
                .needs_link()
                .needs_block()
                .range_ops()
                .resumable(),
        );
        script(&mmu, MANY, [failure]);
        let done = mmu
            .vcpu()
            .unwrap()
            .prefault(Gfn(0)..Gfn(64), Visibility::Private)
            .unwrap();
        assert_eq!(done.frames, 1);
        assert_eq!(mmu.phase(), Some(Phase::Lost));
        check(&mmu);
    }
}

#[test]
fn threads_wait_for_no_other_ticket_where_the_module_can_do_with_many() {
    let mmu = guest(
        Capabilities::none()
            .needs_link()
            .needs_block()
            .parallel_tickets(),
    );
    for n in [3, 4] {
        assert_eq!(touch(&mmu, n), FIXED);
    }
    let state = || mmu.host().protected_table().state.lock().unwrap();
    state().held = Some(1);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| mmu.zap_private(SPACE, Gfn(3)..Gfn(4)).unwrap());
        while state().tickets == 0 {
            std::thread::yield_now();
        }
        assert_eq!(mmu.zap_private(SPACE, Gfn(4)..Gfn(5)).unwrap().frames, 1);
        assert!(!first.is_finished());
        state().held = None;
        assert_eq!(first.join().unwrap().frames, 1);
    });
    assert_eq!(mmu.stats().protected.ticket_waits, 0);
    check(&mmu);
}

fn write(gfn: u64) -> Fault {
    Fault::write(Gfn(gfn).address()).private()
}

/// A vCPU that remembers its private table asks the module for nothing once the guest is lost.
#[test]
fn who_remembers_the_table_sees_that_the_guest_is_lost() {
    let mmu = usual();
    let mut vcpu = mmu.vcpu().unwrap();
    for n in 0..4 {
        assert_eq!(vcpu.fault(write(n)), FIXED);
    }
    script(&mmu, HandOffStep::Install, [Failure::Fatal]);
    assert_eq!(touch(&mmu, 10), REFUSED);
    let calls = || mmu.stats().protected.calls_of(HandOffStep::Install);
    let before = calls();
    assert_eq!(vcpu.fault(write(4)), REFUSED);
    assert_eq!(calls(), before);
    check(&mmu);
}

/// Slots may share a table. A vCPU that remembers it looks at each as if it did not.
#[test]
fn who_remembers_the_table_looks_at_each_slot_of_it() {
    let mmu = usual();
    let base = 1 << 15;
    let slot = |first: u64, private: Pfn| {
        let backing = LinearBacking::new(Pfn(0x8_0000 + first), Level::L1).with_private(private);
        Slot::new(Gfn(base + first)..Gfn(base + first + 128), backing)
    };
    let read_only = slot(128, Pfn(0x20_0000)).with_flags(SlotFlags::READ_ONLY);
    let beyond_the_host = slot(256, Pfn(1 << 50));
    for slot in [slot(0, Pfn(0x30_0000)), read_only, beyond_the_host] {
        mmu.slots().insert(slot).unwrap();
    }
    let mut vcpu = mmu.vcpu().unwrap();
    let fault = |reason| Ok(Outcome::MemoryFault(reason));
    let expected = [
        FIXED,
        fault(MemoryFault::NotPermitted),
        fault(MemoryFault::NotBacked),
        fault(MemoryFault::NotBacked),
    ];
    for (first, expected) in [0, 128, 256, 384].into_iter().zip(expected) {
        for n in 0..4 {
            assert_eq!(vcpu.fault(write(base + first + n)), expected, "{first}");
        }
    }
    check(&mmu);
}

/// How often a guest is sent back with its fault on a page, before the fault waits for a module that is busy with it: which it
/// does by having vCPUs kicked, and then it is settled.
fn sent_back(mmu: &TestMmu, vcpu: &mut tdp::Vcpu<Ept, SoftwareHost<Scripted>>, gfn: u64) -> u32 {
    for times in 0..10 {
        if send_back(mmu, vcpu, gfn) == FIXED {
            return times;
        }
    }
    panic!("it is sent back for ever");
}

/// One fault on a page with which the module is busy.
fn send_back(
    mmu: &TestMmu,
    vcpu: &mut tdp::Vcpu<Ept, SoftwareHost<Scripted>>,
    gfn: u64,
) -> Result<Outcome, FaultError> {
    let busy = |on| {
        mmu.host()
            .protected_table()
            .state
            .lock()
            .unwrap()
            .busy_until_kicked = on
    };
    busy(true);
    let outcome = vcpu.fault(write(gfn));
    busy(false);
    outcome
}

const SENT_BACK: Result<Outcome, FaultError> = Ok(Outcome::Retry(RetryReason::Frozen));

/// A guest that comes back for a page too often looks as if it were single-stepped, so the times are counted. Those before the
/// page was resolved are over with that, whichever way it was resolved, and those of other pages are not.
#[test]
fn a_page_that_was_resolved_is_sent_back_as_often_as_a_new_one() {
    let mmu = usual();
    let mut vcpu = mmu.vcpu().unwrap();
    assert_eq!(vcpu.fault(write(100)), FIXED);
    for round in 0..2 {
        assert_eq!(send_back(&mmu, &mut vcpu, 4), SENT_BACK);
        assert_eq!(sent_back(&mmu, &mut vcpu, 3), 3, "round {round}");
        assert_eq!(sent_back(&mmu, &mut vcpu, 4), 2, "round {round}");
        mmu.zap_private(SPACE, Gfn(3)..Gfn(5)).unwrap();
        // Resolved without having been waited for.
        for _ in 0..3 {
            assert_eq!(send_back(&mmu, &mut vcpu, 5), SENT_BACK);
        }
        assert_eq!(vcpu.fault(write(5)), FIXED);
        mmu.zap_private(SPACE, Gfn(5)..Gfn(6)).unwrap();
        check(&mmu);
    }
    assert_eq!(mmu.stats().protected.sent_back, 2 * (1 + 3 + 2 + 3));
}

/// Of more pages than one instruction touches the one that was first sent back is forgotten, and no other.
#[test]
fn of_too_many_pages_that_are_sent_back_the_oldest_is_forgotten() {
    let mmu = usual();
    let mut vcpu = mmu.vcpu().unwrap();
    assert_eq!(vcpu.fault(write(100)), FIXED);
    for n in 0..9 {
        assert_eq!(send_back(&mmu, &mut vcpu, n), SENT_BACK);
    }
    for (n, left) in [(1, 2), (7, 2), (0, 3)] {
        assert_eq!(sent_back(&mmu, &mut vcpu, n), left, "page {n}");
    }
    check(&mmu);
}
