//! A picture of the tables of a live MMU: for people as a text tree, for programs as JSON.
//!
//! Protocol. Taking the picture walks as a sweep does and changes nothing; faults and sweeps go on, so parts of it may be
//! from different moments. Neighbouring leaves of one level that map consecutive frames alike become one line. What is
//! shown is copied, so that it can be looked at for as long as one likes.

use crate::confidential::Phase;
use crate::handoff::is_blocked;
use crate::host::{AddressSpaceId, Host};
use crate::iter::TdpIter;
use crate::mmu::{Mmu, Shared};
use crate::root::Root;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use tdp_arch::{AdBits, Decoded, Format, Gfn, GfnRange, Level, Perms, Pfn};

/// What a line of a [`Dump`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DumpKind {
    /// A table; what it maps follows, one step further in.
    Table,
    /// Mapped memory.
    Leaf {
        /// What the guest may do; of an access-tracked leaf, what it may do again once it is restored.
        perms: Perms,
        /// The processor's accessed bit.
        accessed: bool,
        /// The processor's dirty bit.
        dirty: bool,
        /// Not present to the processor until the next access.
        access_tracked: bool,
        /// Private, and blocked in the protected table.
        blocked: bool,
    },
    /// Known to have no memory.
    Mmio {
        /// Generation of the memory slots, its low 19 bits.
        generation: u32,
    },
    /// A hand-off is under way.
    Frozen,
}

/// A line of a [`Dump`]: a table, or consecutive entries of one level that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DumpLine {
    /// Guest frames.
    pub gfns: GfnRange,
    /// Level of the entries.
    pub level: Level,
    /// First host frame, of the table or of the memory.
    pub pfn: Option<Pfn>,
    /// What it is.
    pub kind: DumpKind,
}

/// One tree of a [`Dump`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DumpTree {
    /// The private half's tree.
    pub private: bool,
    /// Host frame of the root table.
    pub root: Pfn,
    /// Level of its entries.
    pub level: Level,
    /// Made obsolete, and being taken down.
    pub obsolete: bool,
    /// Its entries, tables before what they hold.
    pub lines: Vec<DumpLine>,
}

/// The tables of an address space at about one moment. Its text form is a tree; [`json`](Dump::json) shows the same to
/// programs.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Dump {
    /// The entry format's name.
    pub format: &'static str,
    /// Address space.
    pub as_id: AddressSpaceId,
    /// Where a confidential guest is in its life.
    pub phase: Option<Phase>,
    /// Its trees, the current shared one first.
    pub trees: Vec<DumpTree>,
}

impl Dump {
    /// The same as JSON.
    pub fn json(&self) -> impl fmt::Display + '_ {
        Json(self)
    }
}

impl<F: Format, H: Host> Mmu<F, H> {
    /// Takes a picture of the tables of an address space.
    pub fn dump(&self, as_id: AddressSpaceId) -> Dump {
        let shared = self.shared();
        let roots = shared.roots.of(as_id);
        let trees = roots.into_iter().chain(shared.roots.private(as_id));
        Dump {
            format: F::NAME,
            as_id,
            phase: self.phase(),
            trees: trees.map(|root| shared.dump_tree(&root)).collect(),
        }
    }
}

impl<F: Format, H: Host> Shared<F, H> {
    fn dump_tree(&self, root: &Arc<Root<H>>) -> DumpTree {
        let range = GfnRange {
            start: Gfn(0),
            end: root.limit(),
        };
        let mut lines: Vec<DumpLine> = Vec::new();
        let mut visit = self.domain.visit();
        let mut iter = TdpIter::<F, H>::new(&mut visit, &self.host, root, range, Level::L1);
        while let Some(step) = iter.next() {
            let spte = step.spte;
            let bits = root.ad_bits == AdBits::Processor && !root.private;
            let (pfn, kind) = match F::decode(spte, step.level) {
                Decoded::Table(pfn) => (Some(pfn), DumpKind::Table),
                Decoded::Leaf {
                    pfn,
                    perms,
                    access_tracked,
                } => (
                    Some(pfn),
                    DumpKind::Leaf {
                        perms,
                        accessed: bits && spte.0 & F::ACCESSED != 0,
                        dirty: bits && spte.0 & F::DIRTY != 0,
                        access_tracked,
                        blocked: root.private && is_blocked::<F>(spte),
                    },
                ),
                Decoded::Mmio(mmio) => (
                    None,
                    DumpKind::Mmio {
                        generation: mmio.generation,
                    },
                ),
                Decoded::Frozen => (None, DumpKind::Frozen),
                Decoded::Empty | Decoded::Sealed | Decoded::Unknown => continue,
            };
            let line = DumpLine {
                gfns: step.range(),
                level: step.level,
                pfn,
                kind,
            };
            match lines.last_mut() {
                Some(last) if last.goes_on_with(&line) => last.gfns.end = line.gfns.end,
                _ => lines.push(line),
            }
        }
        DumpTree {
            private: root.private,
            root: root.pfn,
            level: root.level,
            obsolete: root.is_obsolete(),
            lines,
        }
    }
}

impl DumpLine {
    /// Whether `next` is more of the same.
    fn goes_on_with(&self, next: &DumpLine) -> bool {
        let follows = match (self.pfn, next.pfn) {
            (Some(first), Some(pfn)) => pfn.0 == first.0 + self.gfns.pages(),
            (None, None) => true,
            _ => false,
        };
        follows
            && self.kind == next.kind
            && self.kind != DumpKind::Table
            && self.level == next.level
            && self.gfns.end == next.gfns.start
    }
}

/// One letter for each permission that is there.
struct Letters(Perms);

impl fmt::Display for Letters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letters = [
            (Perms::READ, 'r'),
            (Perms::WRITE, 'w'),
            (Perms::EXEC, 'x'),
            (Perms::USER_EXEC, 'u'),
        ];
        for (perm, letter) in letters {
            let shown = if self.0.contains(perm) { letter } else { '-' };
            write!(f, "{shown}")?;
        }
        Ok(())
    }
}

impl fmt::Display for DumpLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.level, self.gfns)?;
        if let Some(pfn) = self.pfn {
            write!(f, " -> {pfn}")?;
        }
        match self.kind {
            DumpKind::Table => write!(f, " table"),
            DumpKind::Mmio { generation } => write!(f, " mmio, generation {generation}"),
            DumpKind::Frozen => write!(f, " frozen"),
            DumpKind::Leaf {
                perms,
                accessed,
                dirty,
                access_tracked,
                blocked,
            } => {
                write!(f, " {}", Letters(perms))?;
                let notes = [
                    (accessed, "accessed"),
                    (dirty, "dirty"),
                    (access_tracked, "access-tracked"),
                    (blocked, "blocked"),
                ];
                for (_, note) in notes.iter().filter(|(is, _)| *is) {
                    write!(f, " {note}")?;
                }
                Ok(())
            }
        }
    }
}

impl fmt::Display for Dump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} address space {}", self.format, self.as_id.0)?;
        if let Some(phase) = self.phase {
            write!(f, ", confidential, {phase:?}")?;
        }
        writeln!(f)?;
        for tree in &self.trees {
            let half = if tree.private { "private" } else { "shared" };
            let obsolete = if tree.obsolete { ", obsolete" } else { "" };
            writeln!(f, "{half} root {} {}{obsolete}", tree.root, tree.level)?;
            for line in &tree.lines {
                let depth = usize::from(tree.level.number() - line.level.number()) + 1;
                writeln!(f, "{:1$}{line}", "", 2 * depth)?;
            }
        }
        Ok(())
    }
}

struct Json<'a>(&'a Dump);

impl fmt::Display for Json<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dump = self.0;
        // Every string that appears is a word of this library's, so that nothing needs escaping.
        write!(
            f,
            r#"{{"format":"{}","as_id":{},"trees":["#,
            dump.format, dump.as_id.0
        )?;
        for (n, tree) in dump.trees.iter().enumerate() {
            let comma = if n == 0 { "" } else { "," };
            write!(
                f,
                r#"{comma}{{"private":{},"root":{},"level":{},"obsolete":{},"entries":["#,
                tree.private,
                tree.root.0,
                tree.level.number(),
                tree.obsolete
            )?;
            for (n, line) in tree.lines.iter().enumerate() {
                let comma = if n == 0 { "" } else { "," };
                write!(
                    f,
                    r#"{comma}{{"level":{},"gfn":{},"frames":{}"#,
                    line.level.number(),
                    line.gfns.start.0,
                    line.gfns.pages()
                )?;
                if let Some(pfn) = line.pfn {
                    write!(f, r#","pfn":{}"#, pfn.0)?;
                }
                match line.kind {
                    DumpKind::Table => write!(f, r#","kind":"table"}}"#)?,
                    DumpKind::Frozen => write!(f, r#","kind":"frozen"}}"#)?,
                    DumpKind::Mmio { generation } => {
                        write!(f, r#","kind":"mmio","generation":{generation}}}"#)?;
                    }
                    DumpKind::Leaf {
                        perms,
                        accessed,
                        dirty,
                        access_tracked,
                        blocked,
                    } => write!(
                        f,
                        r#","kind":"leaf","perms":"{}","accessed":{accessed},"dirty":{dirty},"access_tracked":{access_tracked},"blocked":{blocked}}}"#,
                        Letters(perms)
                    )?,
                }
            }
            f.write_str("]}")?;
        }
        f.write_str("]}")
    }
}
