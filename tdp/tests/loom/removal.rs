//! Taking private memory away: against faults, against each other, through the combiner and without.

use crate::module::Manner;
use crate::world::{A, B, FIRST, SPACE, Vcpu, World, explore, only};
use loom::thread;
use tdp::protected::HandOffStep;
use tdp::{Fault, Gfn, Outcome};

fn settle(vcpu: &mut Vcpu, gfn: Gfn) {
    let fault = Fault::write(gfn.address()).private();
    while let Outcome::Retry(_) = vcpu.fault(fault).unwrap() {
        thread::yield_now();
    }
}

/// A fault on a frame that is taken away meanwhile: the page is there in the end or it is not, in both tables alike.
#[test]
fn a_fault_against_the_removal_of_its_leaf() {
    explore("hand-off x zap of the leaf", Some(3), || {
        let world = World::confidential(Manner::default(), false);
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        settle(&mut ours, A);

        let other = thread::spawn(move || {
            settle(&mut theirs, A);
            theirs
        });
        world.mmu.zap_private(SPACE, only(A)).unwrap();
        let theirs = other.join().unwrap();

        let calls = world.mmu.stats().protected;
        let (installed, removed) = (
            calls.calls_of(HandOffStep::Install),
            calls.calls_of(HandOffStep::Remove),
        );
        let mapped = world.mmu.host().module.leaf(A).is_some();
        assert_eq!(installed - removed, u64::from(mapped));
        world.audit_private();
        world.finish([ours, theirs]);
    });
}

/// A fault that installs the very leaf which a removal is on its way to: it is left, or waited for and taken away.
#[test]
fn a_removal_against_the_fault_that_installs_its_leaf() {
    explore("zap of the leaf x hand-off", Some(3), || {
        let world = World::confidential(Manner::default(), false);
        let mut vcpu = world.vcpu();
        settle(&mut vcpu, B);

        // The removal is the other thread: it looks where the fault may come to change something.
        let other = thread::spawn({
            let mmu = world.mmu.clone();
            move || mmu.zap_private(SPACE, only(A)).unwrap().frames
        });
        settle(&mut vcpu, A);
        let removed = other.join().unwrap();

        let mapped = world.mmu.host().module.leaf(A).is_some();
        assert_eq!(removed, u64::from(!mapped), "it was installed once");
        world.audit_private();
        world.finish([vcpu]);
    });
}

/// A fault below a table that is being unlinked: the table stays, or goes and comes again, and its frame is freed only when
/// the fault has left it.
#[test]
fn a_fault_against_the_removal_of_its_table() {
    explore("hand-off x zap of the table", Some(2), || {
        let world = World::confidential(Manner::default(), true);
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        settle(&mut ours, A);

        let other = thread::spawn(move || {
            settle(&mut theirs, B);
            theirs
        });
        let removed = world.mmu.zap_private(SPACE, FIRST).unwrap();
        let theirs = other.join().unwrap();

        assert!(removed.frames >= 1);
        let module = &world.mmu.host().module;
        let left = [A, B]
            .iter()
            .filter(|&&gfn| module.leaf(gfn).is_some())
            .count() as u64;
        assert_eq!(removed.frames + left, 2);
        world.audit_private();
        world.mmu.zap_private(SPACE, FIRST).unwrap();
        drop((ours, theirs));
        assert_eq!(world.mmu.host().module.twins_out(), 0);
        world.finish([]);
    });
}

/// The same for a fault that goes by the table that it remembers.
#[test]
fn a_fault_that_remembers_against_the_removal_of_its_table() {
    explore("remembering hand-off x zap of the table", Some(2), || {
        let world = World::confidential(Manner::default(), true);
        let mut vcpu = world.vcpu();
        // The second remembers.
        for _ in 0..2 {
            settle(&mut vcpu, A);
            world.mmu.zap_private(SPACE, only(A)).unwrap();
        }

        let other = thread::spawn(move || {
            settle(&mut vcpu, A);
            vcpu
        });
        let removed = world.mmu.zap_private(SPACE, FIRST).unwrap();
        let vcpu = other.join().unwrap();

        let left = world.mmu.host().module.leaf(A).is_some();
        assert_eq!(removed.frames + u64::from(left), 1);
        world.audit_private();
        world.mmu.zap_private(SPACE, FIRST).unwrap();
        drop(vcpu);
        assert_eq!(world.mmu.host().module.twins_out(), 0);
        world.finish([]);
    });
}

fn two_removals(name: &str, manner: Manner) {
    explore(name, Some(1), move || {
        let world = World::confidential(manner, false);
        let mut vcpu = world.vcpu();
        settle(&mut vcpu, A);
        settle(&mut vcpu, B);

        let mmu = world.mmu.clone();
        let other = thread::spawn(move || mmu.zap_private(SPACE, FIRST).unwrap());
        let ours = world.mmu.zap_private(SPACE, FIRST).unwrap();
        let theirs = other.join().unwrap();

        assert_eq!(ours.frames + theirs.frames, 2, "each page once");
        assert_eq!(ours.tables + theirs.tables, 1, "the table once");
        world.audit_private();
        drop(vcpu);
        assert_eq!(world.mmu.host().module.twins_out(), 0);
        world.finish([]);
    });
}

/// Two sweeps over the same pages and their table: each goes once, and neither waits for ever.
#[test]
fn two_removals_on_their_own() {
    two_removals("zap x zap, each on its own", Manner::default());
}

/// The same where one thread carries for both.
#[test]
fn two_removals_that_are_carried() {
    let manner = Manner {
        combine: true,
        ..Manner::default()
    };
    two_removals("zap x zap, combined", manner);
}

/// The same with a module that flushes inside its calls.
#[test]
fn two_removals_without_tickets() {
    let manner = Manner {
        flushes_itself: true,
        ..Manner::default()
    };
    two_removals("zap x zap, without tickets", manner);
}

/// Two sweeps over different pages share the desk: neither removes on a ticket that began before its block.
#[test]
fn two_removals_share_the_desk() {
    explore("ticket x ticket", Some(2), || {
        let world = World::confidential(Manner::default(), false);
        let mut vcpu = world.vcpu();
        settle(&mut vcpu, A);
        settle(&mut vcpu, B);

        let mmu = world.mmu.clone();
        let other = thread::spawn(move || mmu.zap_private(SPACE, only(B)).unwrap());
        let ours = world.mmu.zap_private(SPACE, only(A)).unwrap();
        let theirs = other.join().unwrap();

        assert_eq!((ours.frames, theirs.frames), (1, 1));
        assert!(world.mmu.stats().protected.calls_of(HandOffStep::Flush) <= 2);
        world.audit_private();
        world.finish([vcpu]);
    });
}

/// An empty table is to be unlinked and gets no ticket, while a fault is on its way below: the fault installs nothing below
/// a table that is blocked, and takes the block back.
#[test]
fn a_fault_against_the_removal_of_its_table_without_a_ticket() {
    explore(
        "hand-off x zap of the table without a ticket",
        Some(2),
        || {
            let world = World::confidential(Manner::default(), true);
            let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
            settle(&mut ours, A);
            world.mmu.zap_private(SPACE, only(A)).unwrap();
            world.mmu.host().module.refuse_tickets(1);

            let other = thread::spawn(move || {
                // Its own ticket may be the one that is refused.
                let fault = Fault::write(B.address()).private();
                while let Outcome::Retry(_) | Outcome::MemoryFault(_) = theirs.fault(fault).unwrap()
                {
                    thread::yield_now();
                }
                theirs
            });
            let _ = world.mmu.zap_private(SPACE, FIRST);
            let theirs = other.join().unwrap();

            world.mmu.host().module.refuse_tickets(0);
            world.audit_private();
            world.mmu.zap_private(SPACE, FIRST).unwrap();
            drop((ours, theirs));
            assert_eq!(world.mmu.host().module.twins_out(), 0);
            world.finish([]);
        },
    );
}
