//! Splits and folds of private memory, against faults, removals and conversions.

use crate::module::Manner;
use crate::world::{A, B, FIRST, Mmu, PRIVATE, SPACE, Vcpu, World, explore, only};
use loom::thread;
use tdp::{Fault, FoldError, Folded, Gfn, Level, Outcome, Pfn, Visibility};

const LARGE: Manner = Manner {
    combine: false,
    flushes_itself: false,
    refuse_installs: 0,
    busy_blocks: 0,
    refuse_blocks: 0,
    large: true,
    refuse_merges: 0,
};

/// A private fault until it is settled.
fn settle(vcpu: &mut Vcpu, gfn: Gfn, level: Level) {
    let fault = Fault::write(gfn.address()).private().max_level(level);
    while let Outcome::Retry(_) = vcpu.fault(fault).unwrap() {
        thread::yield_now();
    }
}

/// What the module maps at both frames.
fn mapped(world: &World) -> [bool; 2] {
    [A, B].map(|gfn| {
        let pfn = world.mmu.host().module.leaf(gfn);
        assert!(pfn.is_none_or(|pfn| pfn == Pfn(PRIVATE.0 + gfn.0)));
        pfn.is_some()
    })
}

fn fold(mmu: &Mmu) -> Result<Folded, FoldError> {
    mmu.fold_private(SPACE, FIRST)
}

/// Everything can be taken away afterwards, and comes home.
fn finish(world: World, vcpus: impl IntoIterator<Item = Vcpu>) {
    world.audit_private();
    vcpus.into_iter().for_each(drop);
    world.mmu.zap_private(SPACE, FIRST).unwrap();
    world.audit_private();
    assert_eq!(world.mmu.host().module.twins_out(), 0);
    world.finish([]);
}

/// Two guests accept small pages of one large leaf: it is split once, and both find theirs.
#[test]
fn two_splits() {
    explore("private split x split", Some(2), || {
        let world = World::confidential(LARGE, false);
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        settle(&mut ours, A, Level::L2);

        let other = thread::spawn(move || {
            settle(&mut theirs, B, Level::L1);
            theirs
        });
        settle(&mut ours, A, Level::L1);
        let theirs = other.join().unwrap();

        assert_eq!(mapped(&world), [true, true]);
        assert_eq!(world.mmu.stats().pages, [2, 0, 0]);
        assert_eq!(world.mmu.stats().splits, 1);
        finish(world, [ours, theirs]);
    });
}

/// A large leaf is split while another fault looks for its page in it.
#[test]
fn a_split_against_a_fault() {
    explore("private split x fault", Some(3), || {
        let world = World::confidential(LARGE, false);
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        settle(&mut ours, A, Level::L2);

        let other = thread::spawn(move || {
            settle(&mut theirs, B, Level::L2);
            theirs
        });
        settle(&mut ours, A, Level::L1);
        let theirs = other.join().unwrap();

        assert_eq!(mapped(&world), [true, true]);
        assert_eq!(world.mmu.stats().pages, [2, 0, 0]);
        finish(world, [ours, theirs]);
    });
}

/// A table is folded while a fault installs the page that it lacks: the fold comes too early, or takes that page along.
#[test]
fn a_fold_against_a_fault() {
    explore("private fold x fault", Some(3), || {
        let world = World::confidential(LARGE, true);
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        settle(&mut ours, A, Level::L1);

        let other = thread::spawn(move || {
            settle(&mut theirs, B, Level::L1);
            theirs
        });
        let folded = fold(&world.mmu).unwrap();
        let theirs = other.join().unwrap();

        assert_eq!(folded.folded + folded.left, 1);
        assert_eq!(mapped(&world), [true, true]);
        finish(world, [ours, theirs]);
    });
}

fn share_a(mmu: &Mmu) {
    mmu.convert(SPACE, only(A), Visibility::Shared).unwrap();
}

fn folded_beside(
    name: &str,
    manner: Manner,
    preemptions: usize,
    other: impl Fn(&Mmu) + Copy + Send + Sync + 'static,
    check: impl Fn(&World) + Send + Sync + 'static,
) {
    explore(name, Some(preemptions), move || {
        let world = World::confidential(manner, false);
        let mut vcpu = world.vcpu();
        settle(&mut vcpu, A, Level::L1);
        settle(&mut vcpu, B, Level::L1);

        let mmu = world.mmu.clone();
        let thread = thread::spawn(move || other(&mmu));
        fold(&world.mmu).unwrap();
        thread.join().unwrap();

        check(&world);
        finish(world, [vcpu]);
    });
}

/// A table is folded while one of its frames becomes shared: whichever comes first, that frame is taken away and the other
/// stays.
#[test]
fn a_fold_against_conversion() {
    folded_beside("private fold x convert", LARGE, 2, share_a, |world| {
        assert_eq!(mapped(world), [false, true])
    });
}

/// The same with a fold that the module refuses, so that the table is put back.
#[test]
fn a_refused_fold_against_conversion() {
    let manner = Manner {
        refuse_merges: 1,
        ..LARGE
    };
    folded_beside(
        "refused private fold x convert",
        manner,
        2,
        share_a,
        |world| assert_eq!(mapped(world), [false, true]),
    );
}

/// A table is folded while all of it is taken away.
#[test]
fn a_fold_against_the_removal_of_its_table() {
    folded_beside(
        "private fold x zap of the table",
        LARGE,
        2,
        |mmu| assert!(mmu.zap_private(SPACE, FIRST).unwrap().frames >= 2),
        |world| assert_eq!(mapped(world), [false, false]),
    );
}

/// A table is folded while one of its pages is taken away, and a ticket is refused: whoever gets no ticket leaves what it
/// blocked blocked, and nobody calls below a table that is.
#[test]
fn a_fold_without_a_ticket_against_removal() {
    explore("private fold without a ticket x zap", Some(2), || {
        let world = World::confidential(LARGE, false);
        let mut vcpu = world.vcpu();
        settle(&mut vcpu, A, Level::L1);
        settle(&mut vcpu, B, Level::L1);
        world.mmu.host().module.refuse_tickets(1);

        let mmu = world.mmu.clone();
        let thread = thread::spawn(move || mmu.zap_private(SPACE, only(B)));
        let folded = fold(&world.mmu);
        let removed = thread.join().unwrap();

        assert!(
            folded.is_err() != removed.is_err(),
            "one ticket is refused: {folded:?}, {removed:?}"
        );
        settle(&mut vcpu, B, Level::L1);
        assert_eq!(mapped(&world), [true, true]);
        finish(world, [vcpu]);
    });
}
