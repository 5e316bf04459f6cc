//! Faults against faults.

use crate::world::{A, B, Backing, FIRST, SPACE, TestHost, World, explore, only, settled};
use loom::thread;
use tdp::{Access, Ept, Fault, Format, Gfn, Level, Outcome, Perms, Slot};

const FIXED: Outcome = Outcome::Fixed { level: Level::L1 };

/// Two vCPUs fault on one page of a table that is there: one installs the leaf, the other finds it.
#[test]
fn install_against_install() {
    explore("install x install", None, || {
        let world = World::with_memory(TestHost::new());
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        assert_eq!(ours.fault(Fault::read(B.address())), Ok(FIXED));

        let other = thread::spawn(move || {
            let outcome = theirs.fault(Fault::write(A.address())).unwrap();
            (theirs, outcome)
        });
        let outcome = ours.fault(Fault::write(A.address())).unwrap();
        let (theirs, other) = other.join().unwrap();

        let outcomes = [outcome, other];
        assert!(outcomes.contains(&FIXED) && outcomes.contains(&Outcome::Spurious));
        let tree = world.audit(&mut ours);
        assert_eq!((tree.tables, tree.small), (1, 2));
        world.finish([ours, theirs]);
    });
}

/// A reader's leaf against a writer's: whoever comes second finds the other's leaf and never narrows it.
#[test]
fn read_against_write() {
    explore("install x install and upgrade", None, || {
        let world = World::with_memory(TestHost::new().copy_on_write());
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        assert_eq!(ours.fault(Fault::read(B.address())), Ok(FIXED));

        let reader = thread::spawn(move || {
            let outcome = theirs.fault(Fault::read(A.address())).unwrap();
            (theirs, outcome)
        });
        assert_eq!(ours.fault(Fault::write(A.address())), Ok(FIXED));
        let (theirs, reader) = reader.join().unwrap();

        assert!(settled(reader));
        assert_eq!(
            world.leaf(&mut ours, A).map(|leaf| leaf.1),
            Some(Perms::RWX)
        );
        let upgrades = world.mmu.stats().upgrades;
        assert_eq!(upgrades == 1, reader == FIXED, "{upgrades} upgrades");
        assert_eq!(world.audit(&mut ours).small, 2);
        world.finish([ours, theirs]);
    });
}

/// Writing and fetching widen one leaf at once: both permissions are there in the end.
#[test]
fn upgrade_against_upgrade() {
    explore("upgrade x upgrade", None, || {
        let world = World::with_memory(TestHost::new().by_access());
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        assert_eq!(ours.fault(Fault::read(A.address())), Ok(FIXED));

        let other = thread::spawn(move || {
            assert_eq!(theirs.fault(Fault::write(A.address())), Ok(FIXED));
            theirs
        });
        assert_eq!(ours.fault(Fault::execute(A.address())), Ok(FIXED));
        let theirs = other.join().unwrap();

        let perms = world.leaf(&mut ours, A).unwrap().1;
        let wanted = [Access::Read, Access::Write, Access::Execute];
        assert!(wanted.iter().all(|access| perms.contains(access.needs())));
        assert_eq!(world.mmu.stats().upgrades, 2);
        assert_eq!(world.audit(&mut ours).small, 1);
        world.finish([ours, theirs]);
    });
}

/// Two vCPUs fault on two pages below a table that is missing: one links a table, the other keeps its own, and both
/// leaves are in the one that is linked.
#[test]
fn link_against_link() {
    explore("link x link", None, || {
        let world = World::with_memory(TestHost::new());
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];

        let other = thread::spawn(move || {
            assert_eq!(theirs.fault(Fault::write(B.address())), Ok(FIXED));
            theirs
        });
        assert_eq!(ours.fault(Fault::write(A.address())), Ok(FIXED));
        let theirs = other.join().unwrap();

        let tree = world.audit(&mut ours);
        assert_eq!((tree.tables, tree.small), (1, 2));
        assert!(
            [A, B]
                .iter()
                .all(|&gfn| world.leaf(&mut ours, gfn).is_some())
        );
        world.finish([ours, theirs]);
    });
}

/// Three vCPUs fault on one page below a table that is missing.
#[test]
fn three_links() {
    explore("link x link x link", Some(3), || {
        let world = World::with_memory(TestHost::new());
        let [mut ours, second, third] = [world.vcpu(), world.vcpu(), world.vcpu()];

        let others = [second, third].map(|mut vcpu| {
            thread::spawn(move || {
                let outcome = vcpu.fault(Fault::write(A.address())).unwrap();
                (vcpu, outcome)
            })
        });
        let mut outcomes = vec![ours.fault(Fault::write(A.address())).unwrap()];
        let others = others.map(|other| {
            let (vcpu, outcome) = other.join().unwrap();
            outcomes.push(outcome);
            vcpu
        });

        let fixed = outcomes.iter().filter(|&&outcome| outcome == FIXED).count();
        assert_eq!(fixed, 1);
        assert!(outcomes.into_iter().all(settled));
        let tree = world.audit(&mut ours);
        assert_eq!((tree.tables, tree.small), (1, 1));
        world.finish(std::iter::once(ours).chain(others));
    });
}

/// A large leaf that only permits reading is split by two writers at once: into one table, and both write.
#[test]
fn split_against_split() {
    explore("split x split", None, || {
        let world = World::with_memory(TestHost::new().level(Level::L2).copy_on_write());
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        let large = Outcome::Fixed { level: Level::L2 };
        assert_eq!(ours.fault(Fault::read(A.address())), Ok(large));

        let write = |gfn: Gfn| Fault::write(gfn.address()).max_level(Level::L1);
        let other = thread::spawn(move || {
            assert_eq!(theirs.fault(write(B)), Ok(FIXED));
            theirs
        });
        assert_eq!(ours.fault(write(A)), Ok(FIXED));
        let theirs = other.join().unwrap();

        let writable = |leaf: Option<(_, Perms)>| leaf.unwrap().1.contains(Perms::WRITE);
        assert!(
            [A, B]
                .iter()
                .all(|&gfn| writable(world.leaf(&mut ours, gfn)))
        );
        assert_eq!(world.mmu.stats().splits, 1);
        let tree = world.audit(&mut ours);
        assert_eq!((tree.tables, tree.small, tree.large), (1, 2, 0));
        world.finish([ours, theirs]);
    });
}

/// A table is collapsed into a large leaf while another vCPU faults below it: the access is possible afterwards, through
/// the one or the other, and the table's frame goes only when the other has left it.
#[test]
fn collapse_against_install() {
    explore("collapse x install", Some(3), || {
        let world = World::with_memory_below(TestHost::new().level(Level::L2), FIRST);
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        let small = Fault::read(B.address()).max_level(Level::L1);
        assert_eq!(ours.fault(small), Ok(FIXED));

        let other = thread::spawn(move || {
            let small = Fault::write(A.address()).max_level(Level::L1);
            let outcome = theirs.fault(small).unwrap();
            (theirs, outcome)
        });
        let large = ours.fault(Fault::write(A.address())).unwrap();
        world.drive();
        let (theirs, small) = other.join().unwrap();

        assert!(settled(large) && settled(small));
        assert!(world.leaf(&mut ours, A).is_some());
        world.audit(&mut ours);
        world.finish([ours, theirs]);
    });
}

/// A frame that was a table before is linked again while another vCPU faults: whoever finds the link finds a table, not
/// what was in the frame before.
#[test]
fn reuse_against_install() {
    explore("unlink, link again x install", None, || {
        let world = World::with_memory(TestHost::new());
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        assert_eq!(ours.fault(Fault::write(B.address())), Ok(FIXED));

        let other = thread::spawn(move || {
            assert!(settled(theirs.fault(Fault::write(B.address())).unwrap()));
            theirs
        });
        world.mmu.zap(SPACE, FIRST).flush();
        assert_eq!(ours.fault(Fault::write(A.address())), Ok(FIXED));
        let theirs = other.join().unwrap();

        assert!(world.leaf(&mut ours, A).is_some());
        world.audit(&mut ours);
        world.finish([ours, theirs]);
    });
}

/// A vCPU goes straight to the table that it used before while that is unlinked, freed and linked again: it installs into a
/// table that is linked, or into none; and never looks at a frame that has gone home.
#[test]
fn remembered_table_against_reuse() {
    explore("remembered table x unlink, link again", Some(4), || {
        let world = World::with_memory(TestHost::new());
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        assert_eq!(theirs.fault(Fault::write(A.address())), Ok(FIXED));
        // The first made the table; this one comes down to it and remembers it.
        let again = theirs.fault(Fault::write(A.address()));
        assert_eq!(again, Ok(Outcome::Spurious));

        let other = thread::spawn(move || {
            assert!(settled(theirs.fault(Fault::write(B.address())).unwrap()));
            theirs
        });
        world.mmu.zap(SPACE, FIRST).flush();
        assert_eq!(ours.fault(Fault::write(A.address())), Ok(FIXED));
        let theirs = other.join().unwrap();

        assert!(world.leaf(&mut ours, A).is_some());
        world.audit(&mut ours);
        world.finish([ours, theirs]);
    });
}

/// The same in a batch, whose section lasts: the table goes while the batch stands still, and between its faults.
#[test]
fn remembered_table_in_a_batch() {
    explore("remembered table in a batch x unlink", Some(3), || {
        let world = World::with_memory(TestHost::new());
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        for _ in 0..2 {
            assert!(settled(theirs.fault(Fault::write(A.address())).unwrap()));
        }

        let other = thread::spawn(move || {
            let mut batch = theirs.batch().unwrap();
            for gfn in [B, A] {
                assert!(settled(batch.fault(Fault::write(gfn.address())).unwrap()));
            }
            drop(batch);
            theirs
        });
        world.mmu.zap(SPACE, FIRST).flush();
        let theirs = other.join().unwrap();

        world.audit(&mut ours);
        world.finish([ours, theirs]);
    });
}

/// A vCPU works off a batch, one critical section renewed at each fault, while the table below it is unlinked.
#[test]
fn batch_against_unlink() {
    explore("batch x unlink", Some(4), || {
        let world = World::with_memory(TestHost::new());
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        assert_eq!(ours.fault(Fault::read(B.address())), Ok(FIXED));

        let other = thread::spawn(move || {
            let mut batch = theirs.batch().unwrap();
            for gfn in [A, B] {
                assert!(settled(batch.fault(Fault::write(gfn.address())).unwrap()));
            }
            drop(batch);
            theirs
        });
        world.mmu.zap(SPACE, FIRST).flush();
        let theirs = other.join().unwrap();

        world.audit(&mut ours);
        world.finish([ours, theirs]);
    });
}

/// A fault remembers that there is no memory while the generation of slots comes round: whatever is in the tables in the end
/// was made in the new age.
#[test]
fn mmio_against_a_new_age() {
    explore("mmio x new age", Some(4), || {
        let world = World::before_an_age();
        let mut vcpu = world.vcpu();
        let guest = thread::spawn(move || {
            let outcome = vcpu.fault(Fault::write(A.address())).unwrap();
            assert_eq!(outcome, Outcome::Mmio { read_only: false });
            vcpu
        });
        let slot = Slot::new(only(B), Backing::new());
        world.mmu.slots().insert(slot).unwrap();
        let mut vcpu = guest.join().unwrap();
        if let Some(mmio) = Ept::mmio_entry(world.entry(&mut vcpu, A)) {
            assert_eq!(mmio.generation, 1 << 18);
        }
        world.finish([vcpu]);
    });
}
