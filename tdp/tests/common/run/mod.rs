//! Runs operations on an MMU and on the flat model side by side.
//!
//! The rules that the model follows are the documentation's: what a fault comes to, what a sweep takes away, what a slot
//! operation refuses. On top of that it holds the promises that a guest depends on. Once an invalidation has ended or a
//! slot is removed, the host gives the pages away, and no access of a software vCPU, whose TLB keeps whatever was not
//! flushed, may reach one of them again.

mod predict;
mod slots;
mod verify;

use crate::common::flat::{Tree, Zapped};
use crate::common::host::{Answer, BlockingAnswer, Memory, SharedPool, TestHost};
use crate::common::ops::{Op, Setup, Span, access, level, perms};
use crate::common::processor::{Processor, ProcessorSetup};
use crate::common::rig::{Cpu, Rig, RigSetup, pool};
use std::collections::BTreeMap;
use std::ops::Range;
use tdp::{
    AdBits, AddressSpaceId, Fault, Flushed, Gfn, GfnRange, Gpa, Invalidation, Level, LoadedRoot,
    Lookup, Mapping, MmuError, PendingFlush, Perms, Pfn, RootTeardown, SlotFlags, SlotId, Vcpu,
};

/// vCPUs of a run.
const VCPUS: usize = 2;
/// Most slots, invalidations and sweeps that wait to be flushed.
const MOST_SLOTS: usize = 12;
const MOST_RUNNING: usize = 3;
/// Pages that one invalidation moves.
const MOST_MOVED: u64 = 64;

/// Host frames: of slots (one block each), of pages that were moved, of bare maps.
const SLOT_FRAMES: u64 = 1 << 24;
const SLOT_BLOCK: u64 = 1 << 20;
const MOVED_FRAMES: u64 = 1 << 33;
const BARE_FRAMES: u64 = 3 << 32;

/// How often a run is compared with the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Watch {
    /// All of it after each operation.
    Closely,
    /// The counters and the surroundings after each operation, all of it at times and at the end: for many short runs.
    Lightly,
}

/// Frames of the pool of a run.
pub(crate) const FRAMES: usize = 1 << 14;

/// Operations between two comparisons of all of a run that is watched lightly.
const LIGHTLY: usize = 32;

/// Runs `ops` from the start on a pool of its own, and compares after each.
pub(crate) fn run<F: Processor>(setup: Setup, ops: &[Op]) {
    run_on::<F>(pool(FRAMES), setup, ops, Watch::Closely);
}

/// Runs `ops` from the start on a pool whose frames are all in it, and compares as `watch` says.
pub(crate) fn run_on<F: Processor>(pool: SharedPool, setup: Setup, ops: &[Op], watch: Watch) {
    let processor = ProcessorSetup {
        root_level: if setup.five_levels {
            Level::L5
        } else {
            Level::L4
        },
        ad_bits: if setup.software_ad {
            AdBits::Software
        } else {
            AdBits::Processor
        },
        ..ProcessorSetup::default()
    };
    let max_leaf = Level::from_number(3 - setup.max_leaf % 3).unwrap_or(Level::L3);
    let rig_setup = RigSetup {
        processor,
        mmio_caching: !setup.no_mmio_caching,
        max_leaf,
        // Small, so that retiring drives reclamation in the middle of things.
        garbage_bound: 4,
        eager_split: false,
        ..RigSetup::default()
    };
    let rig = Rig::<F>::on(pool, rig_setup);
    let mut run = Run::new(&rig, setup, max_leaf);
    run.verify(Gfn(0));
    for (step, &op) in ops.iter().enumerate() {
        let at = run.step(op);
        if watch == Watch::Closely || step % LIGHTLY == LIGHTLY - 1 {
            run.verify(at);
        } else {
            run.verify_around(at, 0);
        }
    }
    run.finish();
}

struct Running<'m, F: Processor> {
    guard: Invalidation<'m, F, TestHost>,
    space: usize,
    range: GfnRange,
    flushed: Option<Flushed>,
}

/// A sweep that is not flushed yet.
struct Held<'m, F: Processor> {
    pending: PendingFlush<'m, F, TestHost>,
    space: usize,
    /// The leaves that it took away.
    gone: Vec<GfnRange>,
}

struct FlatSlot {
    id: SlotId,
    space: usize,
    range: GfnRange,
    flags: SlotFlags,
    max_level: Level,
    memory: Memory,
}

/// One root, by its generation.
struct FlatRoot {
    tree: Tree,
    space: usize,
    obsolete: bool,
}

/// One vCPU.
struct Runner<F: Processor> {
    cpu: Cpu<F>,
    root: LoadedRoot,
    space: usize,
}

/// What the MMU has counted so far.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    fixed: u64,
    spurious: u64,
    mmio: u64,
    memory_faults: u64,
    retries: [u64; 6],
}

struct Run<'m, F: Processor> {
    rig: &'m Rig<F>,
    setup: Setup,
    max_leaf: Level,
    runners: Vec<Runner<F>>,
    /// One for each space, which looks at its current root.
    watchers: Vec<Vcpu<F, TestHost>>,
    roots: BTreeMap<u64, FlatRoot>,
    slots: Vec<FlatSlot>,
    held: Vec<Held<'m, F>>,
    teardowns: Vec<(RootTeardown<F, TestHost>, Vec<u64>)>,
    running: Vec<Running<'m, F>>,
    /// Host frames that belong to somebody else by now.
    given_away: Vec<Range<u64>>,
    next_block: u64,
    next_moved: u64,
    answer: Answer,
    permitted: Perms,
    counts: Counts,
}

fn space_id(space: usize) -> AddressSpaceId {
    AddressSpaceId(space as u8)
}

impl<'m, F: Processor> Run<'m, F> {
    fn new(rig: &'m Rig<F>, setup: Setup, max_leaf: Level) -> Self {
        let runner = |_| {
            let cpu = rig.processor(rig.vcpu());
            Runner {
                root: cpu.root(),
                cpu,
                space: 0,
            }
        };
        let watcher = |space| {
            let mut watcher = rig.vcpu();
            watcher
                .set_address_space(space_id(space))
                .expect("a frame for the root");
            watcher
        };
        Self {
            rig,
            setup,
            max_leaf,
            runners: (0..VCPUS).map(runner).collect(),
            watchers: (0..2).map(watcher).collect(),
            roots: BTreeMap::new(),
            slots: Vec::new(),
            held: Vec::new(),
            teardowns: Vec::new(),
            running: Vec::new(),
            given_away: Vec::new(),
            next_block: 0,
            next_moved: MOVED_FRAMES,
            answer: Answer::Page,
            permitted: Perms::RWX,
            counts: Counts::default(),
        }
    }

    fn level(&self) -> Level {
        self.rig.setup.root_level
    }

    /// Runs one operation; returns the frame that it was about.
    fn step(&mut self, op: Op) -> Gfn {
        let root_level = self.level();
        match op {
            Op::Fault {
                vcpu,
                at,
                access: kind,
                max_level,
                prefetch,
                batch,
            } => {
                let gfn = at.gfn(root_level);
                let fault = Fault {
                    gpa: Gpa(gfn.address().0 | u64::from(at.index & 0xfff)),
                    access: access(kind),
                    prefetch,
                    max_level: level(max_level),
                    private: false,
                };
                self.fault(usize::from(vcpu) % VCPUS, fault, batch);
                gfn
            }
            Op::Map {
                vcpu,
                at,
                access: kind,
                level: largest,
                perms: allowed,
                aligned,
                batch,
            } => {
                let gfn = at.gfn(root_level);
                let skew = u64::from(!aligned);
                let pfn = Pfn(BARE_FRAMES + (gfn.0 & ((1 << 30) - 1)) + skew);
                let mapping = Mapping::memory(pfn, level(largest), perms(allowed));
                self.map(usize::from(vcpu) % VCPUS, gfn, mapping, access(kind), batch);
                gfn
            }
            Op::Touch {
                vcpu,
                at,
                access: kind,
            } => {
                let gfn = at.gfn(root_level);
                self.touch(usize::from(vcpu) % VCPUS, gfn, access(kind));
                gfn
            }
            Op::LoadRoot { vcpu } => {
                self.load_root(usize::from(vcpu) % VCPUS);
                Gfn(0)
            }
            Op::SetSpace { vcpu, space } => {
                self.set_space(usize::from(vcpu) % VCPUS, usize::from(space) % 3);
                Gfn(0)
            }
            Op::Zap {
                space,
                span,
                leaves_only,
                hold,
            } => self.zap(usize::from(space) % 2, span, leaves_only, hold),
            Op::Flush => {
                self.flush_held();
                Gfn(0)
            }
            Op::Begin { .. } | Op::Sweep { .. } | Op::End { .. } => self.invalidate(op),
            Op::Insert { .. } | Op::Remove { .. } | Op::Move { .. } | Op::SetFlags { .. } => {
                self.change_slots(op)
            }
            Op::InvalidateRoots { hold } => {
                let teardown = self.rig.mmu.invalidate_roots();
                let alive = self.roots.iter_mut().filter(|(_, root)| !root.obsolete);
                let generations = alive.map(|(&generation, root)| {
                    root.obsolete = true;
                    generation
                });
                self.teardowns.push((teardown, generations.collect()));
                if !hold {
                    self.finish_teardowns();
                }
                Gfn(0)
            }
            Op::FinishTeardown => {
                self.finish_teardowns();
                Gfn(0)
            }
            Op::Answer { kind } => {
                self.answer = match kind % 8 {
                    3 => Answer::Fixed(Lookup::Retry),
                    4 => Answer::Fixed(Lookup::Failed),
                    5 => Answer::Blocking(BlockingAnswer::Page),
                    6 => Answer::Blocking(BlockingAnswer::Fixed(Lookup::Retry)),
                    7 => Answer::Blocking(BlockingAnswer::Fixed(Lookup::Failed)),
                    _ => Answer::Page,
                };
                self.rig.host().set_answer(self.answer);
                Gfn(0)
            }
            Op::Permit { perms: allowed } => {
                self.permitted = perms(allowed);
                self.rig.host().permit(self.permitted);
                Gfn(0)
            }
            Op::Starve { on } => {
                self.rig.frames().starve(on);
                Gfn(0)
            }
            Op::Synchronize => {
                self.rig.mmu.synchronize();
                assert_eq!(self.rig.mmu.stats().garbage.pending, 0);
                Gfn(0)
            }
        }
    }

    fn load_root(&mut self, n: usize) -> bool {
        match self.runners[n].cpu.vcpu.load_root() {
            Ok(root) => {
                self.loaded(n, root);
                true
            }
            Err(error) => {
                assert!(matches!(error, MmuError::OutOfFrames(_)), "{error}");
                assert!(self.rig.frames().is_starving());
                false
            }
        }
    }

    fn loaded(&mut self, n: usize, root: LoadedRoot) {
        let space = self.runners[n].space;
        self.register(root, space);
        let runner = &mut self.runners[n];
        runner.root = root;
        runner.cpu.load(root);
    }

    /// A root that was loaded is the current one of its space, made now if there was none.
    fn register(&mut self, root: LoadedRoot, space: usize) {
        assert_eq!(root.level, self.level());
        let mut current = self
            .roots
            .iter()
            .filter(|(_, root)| !root.obsolete && root.space == space);
        match current.next() {
            Some((&generation, _)) => assert_eq!(root.generation, generation),
            None => {
                let root_level = self.level();
                let flat = FlatRoot {
                    tree: Tree::new(root_level),
                    space,
                    obsolete: false,
                };
                let known = self.roots.insert(root.generation, flat);
                assert!(known.is_none(), "an obsolete root was loaded");
            }
        }
    }

    fn set_space(&mut self, n: usize, space: usize) {
        match self.runners[n].cpu.vcpu.set_address_space(space_id(space)) {
            Ok(root) => {
                self.runners[n].space = space;
                self.loaded(n, root);
            }
            Err(MmuError::NoSuchSpace(id)) => assert_eq!(usize::from(id.0), 2),
            Err(error) => assert!(self.rig.frames().is_starving(), "{error}"),
        }
    }

    /// Changes every tree of a space that may map something.
    fn each_tree(&mut self, space: usize, change: impl Fn(&mut Tree) -> Zapped) -> Zapped {
        let mut sum = Zapped::default();
        for root in self.roots.values_mut().filter(|root| root.space == space) {
            let zapped = change(&mut root.tree);
            sum.leaves += zapped.leaves;
            sum.tables += zapped.tables;
        }
        sum
    }

    fn zap(&mut self, space: usize, span: Span, leaves_only: bool, hold: bool) -> Gfn {
        let range = span.aligned_range(self.level());
        let (id, mmu) = (space_id(space), &self.rig.mmu);
        let pending = if leaves_only {
            mmu.zap_leaves(id, range)
        } else {
            mmu.zap(id, range)
        };
        let gone = self.leaves_in(space, range);
        let expected = self.each_tree(space, |tree| {
            if leaves_only {
                tree.zap_leaves(range)
            } else {
                tree.zap(range)
            }
        });
        let zapped = Zapped {
            leaves: pending.leaves(),
            tables: pending.tables(),
        };
        assert_eq!(zapped, expected, "zap of {range}");
        let swept = Held {
            pending,
            space,
            gone,
        };
        if hold && self.held.len() < MOST_RUNNING {
            self.held.push(swept);
        } else {
            self.flush(swept);
        }
        range.start
    }

    /// What is mapped of a range, by any root.
    fn leaves_in(&self, space: usize, range: GfnRange) -> Vec<GfnRange> {
        let roots = self.roots.values().filter(|root| root.space == space);
        let leaves = roots.flat_map(|root| &root.tree.leaves);
        leaves
            .map(|(&start, leaf)| leaf.level.range(Gfn(start)))
            .filter(|leaf| leaf.overlaps(range))
            .collect()
    }

    /// Flushes: the host is told of every leaf that is gone.
    fn flush(&self, swept: Held<'m, F>) -> Flushed {
        let host = self.rig.host();
        host.take_flushes();
        let flushed = swept.pending.flush();
        let asked = host.take_flushes();
        for leaf in swept.gone {
            let told = asked.iter().any(|request| {
                request.as_id == space_id(swept.space) && request.range.covers(leaf)
            });
            assert!(told, "{leaf} is gone, and flushed was {asked:?}");
        }
        flushed
    }

    fn flush_held(&mut self) {
        for swept in core::mem::take(&mut self.held) {
            self.flush(swept);
        }
    }

    fn invalidate(&mut self, op: Op) -> Gfn {
        let which = match op {
            Op::Begin { space, span } => {
                let range = span.aligned_range(self.level());
                let space = usize::from(space) % 2;
                if self.running.len() < MOST_RUNNING {
                    self.running.push(Running {
                        guard: self.rig.mmu.invalidate_begin(space_id(space), range),
                        space,
                        range,
                        flushed: None,
                    });
                }
                return range.start;
            }
            Op::Sweep { which } | Op::End { which } => usize::from(which),
            _ => return Gfn(0),
        };
        let Some(at) = which.checked_rem(self.running.len()) else {
            return Gfn(0);
        };
        let (space, range) = (self.running[at].space, self.running[at].range);
        if let Op::Sweep { .. } = op {
            let pending = self.running[at].guard.zap();
            let leaves = pending.leaves();
            let gone = self.leaves_in(space, range);
            self.running[at].flushed = Some(self.flush(Held {
                pending,
                space,
                gone,
            }));
            let expected = self.each_tree(space, |tree| tree.zap_leaves(range));
            assert_eq!(leaves, expected.leaves, "invalidation of {range}");
        } else {
            self.end_invalidation(at);
        }
        range.start
    }

    /// Its pages get other host frames, then it ends: with the proof of a flush, or by being dropped, when it sweeps by
    /// itself.
    fn end_invalidation(&mut self, at: usize) {
        let ended = self.running.swap_remove(at);
        self.move_pages(ended.space, ended.range);
        match ended.flushed {
            Some(flushed) => ended.guard.end(flushed),
            None => {
                drop(ended.guard);
                self.each_tree(ended.space, |tree| tree.zap_leaves(ended.range));
            }
        }
    }

    fn is_given_away(&self, pfn: Pfn) -> bool {
        self.given_away.iter().any(|range| range.contains(&pfn.0))
    }

    fn finish_teardowns(&mut self) {
        for (teardown, generations) in self.teardowns.drain(..) {
            teardown.finish();
            for generation in generations {
                self.roots.remove(&generation);
            }
        }
    }

    /// Lets everything come to rest.
    fn finish(mut self) {
        self.rig.frames().starve(false);
        self.flush_held();
        while !self.running.is_empty() {
            self.end_invalidation(0);
        }
        self.finish_teardowns();
        self.verify(Gfn(0));
        self.rig.mmu.synchronize();
        assert_eq!(self.rig.mmu.stats().garbage.pending, 0);
    }
}
