//! Hand-offs against each other: on one entry, on a parent and its child, with a module that refuses.

use crate::module::Manner;
use crate::world::{A, B, PRIVATE, Vcpu, World, explore};
use loom::thread;
use tdp::protected::HandOffStep;
use tdp::{Fault, Gfn, Level, MemoryFault, Outcome, Pfn};

const FIXED: Outcome = Outcome::Fixed { level: Level::L1 };

fn touch(vcpu: &mut Vcpu, gfn: Gfn) -> Outcome {
    vcpu.fault(Fault::write(gfn.address()).private()).unwrap()
}

/// A fault until it is settled: the guest goes on to enter.
fn settle(vcpu: &mut Vcpu, gfn: Gfn) {
    while let Outcome::Retry(_) = touch(vcpu, gfn) {
        thread::yield_now();
    }
}

fn backed(gfn: Gfn) -> Option<Pfn> {
    Some(Pfn(PRIVATE.0 + gfn.0))
}

/// Two faults on one frame: one installs, the other waits for it or finds it done. The module sees one page.
#[test]
fn two_faults_on_one_frame() {
    explore("hand-off x hand-off, one entry", None, || {
        let world = World::confidential(Manner::default(), false);
        let [mut ours, mut theirs, mut first] = [world.vcpu(), world.vcpu(), world.vcpu()];
        settle(&mut first, B);

        let other = thread::spawn(move || {
            settle(&mut theirs, A);
            theirs
        });
        settle(&mut ours, A);
        let theirs = other.join().unwrap();

        let calls = world.mmu.stats().protected;
        assert_eq!(calls.calls_of(HandOffStep::Install), 2);
        assert_eq!(world.mmu.host().module.leaf(A), backed(A));
        world.audit_private();
        world.finish([ours, theirs, first]);
    });
}

/// Two faults below a table that is yet to be linked: one links it, and no call below comes before that one is done.
#[test]
fn two_faults_below_a_missing_table() {
    explore("hand-off x hand-off, parent and child", Some(3), || {
        let world = World::confidential(Manner::default(), false);
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];

        let other = thread::spawn(move || {
            settle(&mut theirs, B);
            theirs
        });
        settle(&mut ours, A);
        let theirs = other.join().unwrap();

        let calls = world.mmu.stats().protected;
        assert_eq!(calls.calls_of(HandOffStep::Link), 1);
        let module = &world.mmu.host().module;
        assert_eq!([A, B].map(|gfn| module.leaf(gfn)), [A, B].map(backed));
        world.audit_private();
        world.finish([ours, theirs]);
    });
}

/// One of two installs on one frame is refused: it is undone, and the other goes through.
#[test]
fn a_refused_hand_off_against_another() {
    refused("hand-off x failure", None, true);
}

/// The same where a table has to be linked first.
#[test]
fn a_refused_hand_off_below_a_missing_table_against_another() {
    refused("hand-off below a missing table x failure", Some(2), false);
}

fn refused(name: &str, bound: Option<usize>, linked: bool) {
    explore(name, bound, move || {
        let manner = Manner {
            refuse_installs: if linked { 2 } else { 1 },
            ..Manner::default()
        };
        let world = World::confidential(manner, false);
        let [mut ours, mut theirs, mut first] = [world.vcpu(), world.vcpu(), world.vcpu()];
        let refused = Outcome::MemoryFault(MemoryFault::Refused);
        if linked {
            assert_eq!(touch(&mut first, B), refused);
        }

        let other = thread::spawn(move || {
            let outcome = touch(&mut theirs, A);
            (theirs, outcome)
        });
        let outcome = touch(&mut ours, A);
        let (theirs, others_outcome) = other.join().unwrap();

        let both = [outcome, others_outcome];
        assert!(both.contains(&refused), "{both:?}");
        let settled = both
            .iter()
            .filter(|&&outcome| outcome == FIXED || outcome == Outcome::Spurious)
            .count();
        let mapped = world.mmu.host().module.leaf(A).is_some();
        assert_eq!(mapped, settled > 0, "{both:?}");
        world.audit_private();
        world.finish([ours, theirs, first]);
    });
}
