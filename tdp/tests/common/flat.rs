//! What the tables of an MMU must hold, kept as plain maps and changed one operation at a time.
//!
//! A [`Tree`] is one root: its leaves by first frame, its MMIO entries, and which tables are linked. It knows what an
//! operation must do from the documentation of the MMU, and walks nothing.

use std::collections::{BTreeMap, BTreeSet};
use tdp::{Access, Gfn, GfnRange, Level, Perms};

/// A leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FlatLeaf {
    pub(crate) level: Level,
    /// First host frame.
    pub(crate) pfn: u64,
    /// What the entry says that the guest may do.
    pub(crate) perms: Perms,
    /// A write gets the permission back without asking the host.
    pub(crate) writable: bool,
    pub(crate) accessed: bool,
    pub(crate) dirty: bool,
}

/// A mapping to be installed, its goal level decided.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Install {
    pub(crate) gfn: u64,
    /// Host frame of `gfn`.
    pub(crate) pfn: u64,
    pub(crate) goal: Level,
    /// As the format expresses them.
    pub(crate) perms: Perms,
    pub(crate) access: Access,
    pub(crate) prefetch: bool,
    pub(crate) accessed: bool,
    pub(crate) dirty: bool,
}

/// What an installation comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Installed {
    /// An entry changed.
    Fixed(Level),
    /// A leaf permitted the access already.
    Spurious,
}

/// What a zap takes away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Zapped {
    pub(crate) leaves: u64,
    pub(crate) tables: usize,
}

/// One root and what hangs from it.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    root_level: Level,
    /// By first guest frame. They never overlap.
    pub(crate) leaves: BTreeMap<u64, FlatLeaf>,
    /// Frames known to have no memory.
    pub(crate) mmio: BTreeSet<u64>,
    /// Linked tables but the root: level of their entries, first guest frame.
    pub(crate) tables: BTreeSet<(Level, u64)>,
}

fn first(gfn: u64, level: Level) -> u64 {
    level.align_down(Gfn(gfn)).0
}

/// Frames below a table of `level`.
fn span(level: Level) -> u64 {
    level.pages() * 512
}

impl Tree {
    pub(crate) fn new(root_level: Level) -> Self {
        Self {
            root_level,
            leaves: BTreeMap::new(),
            mmio: BTreeSet::new(),
            tables: BTreeSet::new(),
        }
    }

    /// The leaf that maps `gfn`, with its first frame.
    pub(crate) fn leaf_at(&self, gfn: u64) -> Option<(u64, FlatLeaf)> {
        let (&start, &leaf) = self.leaves.range(..=gfn).next_back()?;
        (gfn - start < leaf.level.pages()).then_some((start, leaf))
    }

    /// Leaves of each level: 4 KiB, 2 MiB, 1 GiB.
    pub(crate) fn pages(&self) -> [u64; 3] {
        let mut pages = [0; 3];
        for leaf in self.leaves.values() {
            pages[usize::from(leaf.level.number()) - 1] += 1;
        }
        pages
    }

    /// First frames of the leaves that meet `range`.
    fn meeting(&self, range: GfnRange) -> Vec<u64> {
        let before = self.leaf_at(range.start.0).map(|(start, _)| start);
        let from = before.unwrap_or(range.start.0);
        let leaves = self.leaves.range(from..range.end.0.max(from));
        leaves.map(|(&start, _)| start).collect()
    }

    /// Links the tables on the way to an entry of `goal`.
    fn link(&mut self, gfn: u64, goal: Level) {
        let mut level = self.root_level;
        while let Some(below) = level.below().filter(|_| level > goal) {
            self.tables.insert((below, first(gfn, level)));
            level = below;
        }
    }

    /// Takes the table of `level` at `start` away with all that is in it.
    fn unlink(&mut self, level: Level, start: u64) -> Zapped {
        let range = start..start + span(level);
        let tables = self.tables.len();
        self.tables
            .retain(|&(other, at)| other > level || !range.contains(&at));
        let leaves: Vec<u64> = self.leaves.range(range.clone()).map(|(&s, _)| s).collect();
        for leaf in &leaves {
            self.leaves.remove(leaf);
        }
        self.mmio.retain(|gfn| !range.contains(gfn));
        Zapped {
            leaves: leaves.len() as u64,
            tables: tables - self.tables.len(),
        }
    }

    fn split(&mut self, start: u64, leaf: FlatLeaf) {
        let Some(below) = leaf.level.below() else {
            return;
        };
        self.tables.insert((below, start));
        for index in 0..512 {
            let offset = index * below.pages();
            let child = FlatLeaf {
                level: below,
                pfn: leaf.pfn + offset,
                ..leaf
            };
            self.leaves.insert(start + offset, child);
        }
    }

    /// Installs a mapping: a leaf that permits the access is left alone, one that does not is split down to the goal and
    /// widened there, a table at the goal gives way, holes are filled.
    pub(crate) fn install(&mut self, new: Install) -> Installed {
        let goal = new.goal;
        let mut was_split = false;
        while let Some((start, leaf)) = self.leaf_at(new.gfn) {
            if leaf.level < goal {
                break;
            }
            if new.prefetch || leaf.perms.contains(new.access.needs()) {
                return Installed::Spurious;
            }
            if leaf.level > goal {
                self.leaves.remove(&start);
                self.split(start, leaf);
                was_split = true;
                continue;
            }
            let mut made = new.leaf();
            if leaf.pfn == made.pfn {
                // What a split has just made is widened, and is used by who faults; what was there before is repaired.
                if !was_split && let Some(level) = self.repair(new.gfn, new.access, false) {
                    return Installed::Fixed(level);
                }
                made.perms |= leaf.perms;
                made.writable |= leaf.writable;
                made.accessed |= leaf.accessed;
                made.dirty |= leaf.dirty;
            }
            self.leaves.insert(start, made);
            return Installed::Fixed(goal);
        }
        self.link(new.gfn, goal);
        let start = first(new.gfn, goal);
        let mut made = new.leaf();
        if let Some(below) = goal.below()
            && self.tables.contains(&(below, start))
        {
            for (&at, leaf) in self.leaves.range(start..start + goal.pages()) {
                let same = leaf.pfn == made.pfn + (at - start);
                let narrowed =
                    !made.perms.contains(leaf.perms) || (leaf.writable && !made.writable);
                if new.prefetch || (same && narrowed) {
                    return self.install(Install { goal: below, ..new });
                }
                made.accessed |= leaf.accessed;
                made.dirty |= leaf.dirty;
            }
            self.unlink(below, start);
        }
        self.mmio.remove(&start);
        self.leaves.insert(start, made);
        Installed::Fixed(goal)
    }

    /// Gives a leaf the write permission back that a sweep took, for a write. A large leaf that is logged is split instead.
    pub(crate) fn repair(&mut self, gfn: u64, access: Access, logged: bool) -> Option<Level> {
        let (start, leaf) = self.leaf_at(gfn)?;
        let lacks = leaf.writable && !leaf.perms.contains(Perms::WRITE);
        if !access.is_write() || !lacks || (logged && leaf.level > Level::L1) {
            return None;
        }
        self.leaves.get_mut(&start)?.perms |= Perms::WRITE;
        Some(leaf.level)
    }

    /// Takes write permission from every leaf whose frames meet `range`.
    pub(crate) fn write_protect(&mut self, range: GfnRange) {
        for start in self.meeting(range) {
            if let Some(leaf) = self.leaves.get_mut(&start) {
                leaf.perms = leaf.perms.difference(Perms::WRITE);
            }
        }
    }

    /// Takes over a large leaf that is said to stand for all that was below a table within `range`.
    pub(crate) fn adopt_collapsed(&mut self, range: GfnRange, start: u64, large: FlatLeaf) {
        let block = start..start + large.level.pages();
        let below = large.level.below().expect("a large leaf");
        assert!(
            self.tables.contains(&(below, start)),
            "no table was at {start:#x}"
        );
        assert!(
            range.start.0 <= block.start && block.end <= range.end.0,
            "beyond the slot"
        );
        let (mut writable, mut any) = (false, false);
        for (&at, leaf) in self.leaves.range(block) {
            let bare = |leaf: &FlatLeaf| leaf.perms.difference(Perms::WRITE);
            assert_eq!(
                leaf.pfn,
                large.pfn + (at - start),
                "other memory at {at:#x}"
            );
            assert_eq!(bare(leaf), bare(&large), "other permissions at {at:#x}");
            assert!(!large.perms.contains(Perms::WRITE) || leaf.writable);
            assert!(large.accessed || !leaf.accessed);
            assert!(large.dirty || !leaf.dirty);
            (writable, any) = (leaf.writable, true);
        }
        assert!(any, "made of nothing at {start:#x}");
        self.unlink(below, start);
        self.leaves.insert(start, FlatLeaf { writable, ..large });
    }

    /// Remembers that there is no memory at `gfn`. `false` if a leaf is there.
    pub(crate) fn install_mmio(&mut self, gfn: u64) -> bool {
        if self.leaf_at(gfn).is_some() {
            return false;
        }
        self.link(gfn, Level::L1);
        self.mmio.insert(gfn);
        true
    }

    /// Takes every leaf away whose frames meet `range`.
    pub(crate) fn zap_leaves(&mut self, range: GfnRange) -> Zapped {
        if range.is_empty() {
            return Zapped::default();
        }
        let leaves = self.meeting(range);
        for start in &leaves {
            self.leaves.remove(start);
        }
        Zapped {
            leaves: leaves.len() as u64,
            tables: 0,
        }
    }

    /// Takes away every leaf whose frames meet `range`, and every table and MMIO entry that lies in it.
    pub(crate) fn zap(&mut self, range: GfnRange) -> Zapped {
        if range.is_empty() {
            return Zapped::default();
        }
        let mut zapped = Zapped::default();
        let covered = |&&(level, start): &&(Level, u64)| {
            range.start.0 <= start && start + span(level) <= range.end.0
        };
        // The highest first: what is below it goes with it.
        while let Some(&(level, start)) = self.tables.iter().rev().find(covered) {
            let below = self.unlink(level, start);
            zapped.leaves += below.leaves;
            zapped.tables += below.tables;
        }
        self.mmio.retain(|&gfn| !range.contains(Gfn(gfn)));
        zapped.leaves += self.zap_leaves(range).leaves;
        zapped
    }

    /// The processor walked to `gfn` for `access` and got through.
    pub(crate) fn touch(&mut self, gfn: u64, write: bool) {
        if let Some((start, _)) = self.leaf_at(gfn)
            && let Some(leaf) = self.leaves.get_mut(&start)
        {
            leaf.accessed = true;
            leaf.dirty |= write;
        }
    }
}

impl Install {
    fn leaf(&self) -> FlatLeaf {
        FlatLeaf {
            level: self.goal,
            pfn: self.pfn & !(self.goal.pages() - 1),
            perms: self.perms,
            writable: self.perms.contains(Perms::WRITE),
            accessed: self.accessed,
            dirty: self.dirty,
        }
    }
}
