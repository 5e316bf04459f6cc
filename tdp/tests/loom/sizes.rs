//! Split and collapse of ranges, against faults, against the processor, and against what takes away.

use crate::world::{
    A, ALL, B, FIRST, Mmu, NEW, SPACE, TestHost, Vcpu, World, explore, only, settled,
};
use loom::thread;
use tdp::{Access, Ept, Fault, Format, Gfn, Level, Outcome, Perms, SlotFlags, SlotId, Spte};

const SMALL: Outcome = Outcome::Fixed { level: Level::L1 };
const LARGE: Outcome = Outcome::Fixed { level: Level::L2 };

/// A world whose first block is mapped by a large leaf.
fn large(host: TestHost) -> (World, Vcpu) {
    let world = World::with_memory_and_patience(host.level(Level::L2));
    let mut vcpu = world.vcpu();
    assert_eq!(vcpu.fault(Fault::write(A.address())), Ok(LARGE));
    (world, vcpu)
}

/// A world whose first block is mapped by one small leaf, at frame A, where a large one could be.
fn small(host: TestHost) -> (World, Vcpu) {
    small_in(World::with_memory_and_patience(host.level(Level::L2)))
}

fn small_in(world: World) -> (World, Vcpu) {
    let mut vcpu = world.vcpu();
    let fault = Fault::write(A.address()).max_level(Level::L1);
    assert_eq!(vcpu.fault(fault), Ok(SMALL));
    (world, vcpu)
}

fn collapse(mmu: &Mmu) -> usize {
    let pending = mmu.collapse(SPACE, FIRST);
    let tables = pending.tables();
    pending.flush();
    tables
}

/// The processor marks a large leaf dirty while it is split ahead of time.
#[test]
fn dirty_against_eager_split() {
    explore("dirty x eager split", None, || {
        let (world, mut vcpu) = large(TestHost::new());
        world.clear_dirty(&mut vcpu, A);
        let mut processor = world.processor(&mut vcpu);
        let guest = thread::spawn(move || assert!(processor.set_dirty(B)));
        let done = world.mmu.split(SPACE, FIRST, Level::L1).unwrap();
        assert_eq!(done.splits, 1);
        guest.join().unwrap();
        let spte = world.entry(&mut vcpu, B);
        assert!(spte.0 & Ept::DIRTY != 0, "a dirty bit was lost");
        let tree = world.audit(&mut vcpu);
        assert_eq!((tree.tables, tree.small, tree.large), (1, 2, 0));
        world.finish([vcpu]);
    });
}

/// The same to the neighbour, whose table is filled before its turn comes.
#[test]
fn dirty_neighbour_against_eager_split() {
    explore("dirty neighbour x eager split", None, || {
        let (world, mut vcpu) = large(TestHost::new());
        let far = Gfn(512);
        assert_eq!(vcpu.fault(Fault::write(far.address())), Ok(LARGE));
        world.clear_dirty(&mut vcpu, far);
        let mut processor = world.processor(&mut vcpu);
        // The splitter is the other thread: loom goes back to the last of its looks only, and has to stop between two.
        let other = thread::spawn({
            let mmu = world.mmu.clone();
            move || mmu.split(SPACE, ALL, Level::L1).unwrap().splits
        });
        assert!(processor.set_dirty(far));
        drop(processor);
        assert_eq!(other.join().unwrap(), 2);
        let spte = world.entry(&mut vcpu, far);
        assert!(spte.0 & Ept::DIRTY != 0, "a dirty bit was lost");
        let tree = world.audit(&mut vcpu);
        assert_eq!((tree.tables, tree.small, tree.large), (2, 4, 0));
        world.finish([vcpu]);
    });
}

/// A fault splits the leaf that is split ahead of time: one table stands in the end.
#[test]
fn fault_against_eager_split() {
    explore("fault x eager split", Some(2), || {
        let (world, mut ours) = large(TestHost::new().by_access());
        let mut theirs = world.vcpu();
        let other = thread::spawn(move || {
            let fault = Fault::execute(B.address()).max_level(Level::L1);
            assert_eq!(theirs.fault(fault), Ok(SMALL));
            theirs
        });
        world.mmu.split(SPACE, FIRST, Level::L1).unwrap();
        let theirs = other.join().unwrap();
        assert!(Ept::allows(world.entry(&mut ours, B), Access::Execute));
        let tree = world.audit(&mut ours);
        assert_eq!((tree.tables, tree.small, tree.large), (1, 2, 0));
        assert_eq!(world.mmu.stats().splits, 1);
        world.finish([ours, theirs]);
    });
}

/// Two splits and a zap of one page: it is gone, the other is there.
#[test]
fn zap_against_eager_split() {
    explore("zap x eager split", Some(2), || {
        let (world, mut vcpu) = large(TestHost::new());
        let other = thread::spawn({
            let mmu = world.mmu.clone();
            move || mmu.split(SPACE, FIRST, Level::L1).unwrap().splits
        });
        let pending = world.mmu.zap_leaves(SPACE, only(B));
        assert_eq!(pending.leaves(), 1);
        pending.flush();
        let splits = other.join().unwrap();
        assert_eq!(world.leaf(&mut vcpu, B), None);
        let tree = world.audit(&mut vcpu);
        assert_eq!(
            (tree.tables, tree.small),
            (splits, splits),
            "the page that was not zapped"
        );
        world.finish([vcpu]);
    });
}

/// A fault beside a collapse of its table: its page is mapped in the end, by the large leaf or by its own in a table that is
/// linked.
#[test]
fn fault_against_collapse() {
    explore("fault x collapse", Some(2), || {
        let (world, mut ours) = small(TestHost::new());
        let mut theirs = world.vcpu();
        let other = thread::spawn(move || {
            let fault = Fault::write(B.address()).max_level(Level::L1);
            assert!(settled(theirs.fault(fault).unwrap()));
            theirs
        });
        assert_eq!(collapse(&world.mmu), 1);
        let theirs = other.join().unwrap();
        assert_eq!(
            world.leaf(&mut ours, A).map(|leaf| leaf.1),
            Some(Perms::RWX)
        );
        let tree = world.audit(&mut ours);
        // Its leaf was harvested, or it met the large one.
        assert_eq!((tree.tables, tree.small, tree.large), (0, 0, 1));
        world.finish([ours, theirs]);
    });
}

/// The processor marks a small leaf dirty, or young, while its table is collapsed: the large one says so.
#[test]
fn dirty_against_collapse() {
    explore("dirty x collapse", Some(3), || {
        let (world, mut vcpu) = small(TestHost::new());
        world.clear_dirty(&mut vcpu, A);
        let mut processor = world.processor(&mut vcpu);
        let guest = thread::spawn(move || processor.set_dirty(A));
        assert_eq!(collapse(&world.mmu), 1);
        // Not if it met a sealed entry: then the access faults.
        let written = guest.join().unwrap();
        let spte = world.entry(&mut vcpu, A);
        assert!(!written || spte.0 & Ept::DIRTY != 0, "a dirty bit was lost");
        assert_eq!(world.audit(&mut vcpu).large, 1);
        world.finish([vcpu]);
    });
}

/// The same with a split right after, by another thread: the bit reaches a part of what was split.
#[test]
fn dirty_against_collapse_and_split() {
    explore("dirty x collapse x split", Some(1), || {
        let (world, mut vcpu) = small(TestHost::new());
        world.clear_dirty(&mut vcpu, A);
        let mut processor = world.processor(&mut vcpu);
        let guest = thread::spawn(move || processor.set_dirty(A));
        let splitter = thread::spawn({
            let mmu = world.mmu.clone();
            move || mmu.split(SPACE, FIRST, Level::L1).unwrap()
        });
        assert_eq!(collapse(&world.mmu), 1);
        let written = guest.join().unwrap();
        splitter.join().unwrap();
        let spte = world.entry(&mut vcpu, A);
        assert!(!written || spte.0 & Ept::DIRTY != 0, "a dirty bit was lost");
        world.audit(&mut vcpu);
        world.finish([vcpu]);
    });
}

/// The processor walks and uses a table that is collapsed: its frame comes home only when it has left it.
#[test]
fn processor_against_collapse() {
    explore("processor x collapse", Some(2), || {
        // Here the frame is freed as soon as it may be.
        let (world, mut vcpu) = small_in(World::with_memory_below(
            TestHost::new().level(Level::L2),
            FIRST,
        ));
        let mut processor = world.processor(&mut vcpu);
        let guest = thread::spawn(move || processor.touch(A));
        assert_eq!(collapse(&world.mmu), 1);
        world.drive();
        guest.join().unwrap();
        world.audit(&mut vcpu);
        world.finish([vcpu]);
    });
}

/// A table is collapsed while it is unlinked: one of the two has it, and nothing is counted twice.
#[test]
fn unlink_against_collapse() {
    explore("unlink x collapse", Some(2), || {
        let (world, mut vcpu) = small(TestHost::new());
        let other = thread::spawn({
            let mmu = world.mmu.clone();
            move || collapse(&mmu)
        });
        let pending = world.mmu.zap(SPACE, FIRST);
        let (tables, leaves) = (pending.tables(), pending.leaves());
        pending.flush();
        let collapsed = other.join().unwrap();
        assert_eq!((tables + collapsed, leaves), (1, 1));
        let tree = world.audit(&mut vcpu);
        assert_eq!((tree.tables, tree.small, tree.large), (0, 0, 0));
        world.finish([vcpu]);
    });
}

/// Two collapses of one table.
#[test]
fn collapse_against_collapse() {
    explore("collapse x collapse", Some(2), || {
        let (world, mut vcpu) = small(TestHost::new());
        let other = thread::spawn({
            let mmu = world.mmu.clone();
            move || collapse(&mmu)
        });
        let ours = collapse(&world.mmu);
        assert_eq!(ours + other.join().unwrap(), 1);
        assert_eq!(world.audit(&mut vcpu).large, 1);
        world.finish([vcpu]);
    });
}

/// A page of the block is given to somebody else while the table is collapsed for its neighbour's sake: no vCPU reaches it
/// afterwards.
#[test]
fn invalidation_against_collapse() {
    explore("invalidation x collapse", Some(2), || {
        let (world, mut vcpu) = small(TestHost::new());
        let fault = Fault::write(B.address()).max_level(Level::L1);
        assert_eq!(vcpu.fault(fault), Ok(SMALL));
        let mut processor = world.processor(&mut vcpu);
        let other = thread::spawn({
            let mmu = world.mmu.clone();
            move || {
                collapse(&mmu);
                processor.touch(B);
            }
        });
        let invalidation = world.mmu.invalidate_begin(SPACE, only(B));
        let flushed = invalidation.zap().flush();
        world.mmu.host().switch();
        invalidation.end(flushed);
        world.mmu.host().take_page(B);
        other.join().unwrap();
        let leaf = world.leaf(&mut vcpu, B);
        assert!(
            leaf.is_none_or(|(pfn, _)| pfn.0 == NEW.0 + 1),
            "stale: {leaf:?}"
        );
        world.audit(&mut vcpu);
        world.finish([vcpu]);
    });
}

/// The slot goes while a table of it is collapsed.
#[test]
fn removal_against_collapse() {
    explore("slot removal x collapse", Some(1), || {
        let (world, mut vcpu) = small(TestHost::new());
        let other = thread::spawn({
            let mmu = world.mmu.clone();
            move || collapse(&mmu)
        });
        world.mmu.slots().remove(SPACE, SlotId(0)).unwrap();
        other.join().unwrap();
        assert_eq!(world.leaf(&mut vcpu, A), None, "a leaf outlived its slot");
        world.audit(&mut vcpu);
        world.finish([vcpu]);
    });
}

/// A table is recovered while the guest faults below it: nothing is lost, and the count of such tables is right.
#[test]
fn recovery_against_fault() {
    explore("nx recovery x fault", Some(2), || {
        let world = World::with_memory_and_patience(TestHost::new().level(Level::L2));
        drop(world.mmu.set_nx_huge_pages(true));
        let mut ours = world.vcpu();
        assert_eq!(ours.fault(Fault::execute(A.address())), Ok(SMALL));
        assert_eq!(world.mmu.stats().nx_tables, 1);
        let mut theirs = world.vcpu();
        let other = thread::spawn(move || {
            assert!(settled(theirs.fault(Fault::write(B.address())).unwrap()));
            theirs
        });
        let pending = world.mmu.recover_nx(1);
        assert_eq!(pending.tables(), 1);
        pending.flush();
        let theirs = other.join().unwrap();
        let tree = world.audit(&mut ours);
        // Small and taken away with the table, or large in its place; never small in a table of its own.
        assert_eq!((tree.tables, tree.small), (0, 0));
        assert_eq!(world.mmu.stats().nx_tables, 0);
        world.finish([ours, theirs]);
    });
}

/// A fetch and a write in one block where nothing is: nobody finds the table of the fetch without its mark, so it is never
/// replaced by a large leaf.
#[test]
fn fetch_against_write() {
    explore("nx fetch x write", Some(2), || {
        let world = World::with_memory_and_patience(TestHost::new().level(Level::L2));
        drop(world.mmu.set_nx_huge_pages(true));
        let [mut ours, mut theirs] = [world.vcpu(), world.vcpu()];
        let other = thread::spawn(move || {
            assert!(settled(theirs.fault(Fault::write(B.address())).unwrap()));
            theirs
        });
        assert_eq!(ours.fault(Fault::execute(A.address())), Ok(SMALL));
        let theirs = other.join().unwrap();
        assert!(Ept::allows(world.entry(&mut ours, A), Access::Execute));
        let stats = world.mmu.stats();
        assert_eq!((stats.collapses, stats.nx_tables), (0, 1));
        let tree = world.audit(&mut ours);
        assert_eq!((tree.tables, tree.large), (1, 0));
        world.finish([ours, theirs]);
    });
}

/// The policy is switched on while a vCPU faults: under the new root no large leaf is executable.
#[test]
fn switch_against_fault() {
    explore("nx switch x fault", Some(2), || {
        let world = World::with_memory_and_patience(TestHost::new().level(Level::L2));
        let mut vcpu = world.vcpu();
        let guest = thread::spawn(move || {
            vcpu.load_root().unwrap();
            let _ = vcpu.fault(Fault::write(A.address())).unwrap();
            vcpu.load_root().unwrap();
            let _ = vcpu.fault(Fault::write(A.address())).unwrap();
            vcpu
        });
        world.mmu.set_nx_huge_pages(true).unwrap().finish();
        let mut vcpu = guest.join().unwrap();
        vcpu.load_root().unwrap();
        let Spte(bits) = world.entry(&mut vcpu, A);
        assert!(
            !Ept::allows(Spte(bits), Access::Execute),
            "executable and large"
        );
        world.audit(&mut vcpu);
        world.finish([vcpu]);
    });
}

/// A slot's log is switched on while a table of it is collapsed. Whoever then waits for sections, as the log does, finds no
/// large leaf in the slot that it does not see.
#[test]
fn log_against_collapse() {
    explore("log x collapse", Some(1), || {
        let (world, mut vcpu) = small(TestHost::new());
        let other = thread::spawn({
            let mmu = world.mmu.clone();
            move || collapse(&mmu)
        });
        let slots = world.mmu.slots();
        slots
            .set_flags(SPACE, SlotId(0), SlotFlags::LOG_DIRTY)
            .unwrap();
        other.join().unwrap();
        let tree = world.audit(&mut vcpu);
        assert_eq!(tree.large, 0, "large in a slot whose log is on");
        world.finish([vcpu]);
    });
}
