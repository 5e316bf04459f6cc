//! What a replay found, for the table, the JSON and the exit code.
//!
//! A change of an entry, a fault or an operation is counted once: as *matched* if the library did what was recorded, *by
//! rule* if it does otherwise on purpose, as *unexplained* otherwise. Differences that belong to no single one of them (found
//! when everything mapped is compared, or in a trace that contradicts itself) are unexplained as well.

use super::expect::Contradiction;
use super::rules::Rule;
use super::spte::Leaf;
use super::step::{Operation, Recorded};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// Differences of one scenario that are kept.
const KEPT: usize = 100;

/// How often something went how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// In all.
    pub total: u64,
    /// As recorded.
    pub matched: u64,
    /// Explained by a rule.
    pub by_rule: u64,
    /// Otherwise.
    pub unexplained: u64,
}

impl Tally {
    /// Counts one that could be compared.
    pub fn count(&mut self, matched: bool) {
        self.total += 1;
        if matched {
            self.matched += 1
        } else {
            self.unexplained += 1
        }
    }

    fn add(&mut self, other: &Self) {
        self.total += other.total;
        self.matched += other.matched;
        self.by_rule += other.by_rule;
        self.unexplained += other.unexplained;
    }
}

/// Changes of entries, one by one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Transitions {
    /// Recorded, those that follow from a split included, and the library's own that have no counterpart. Each is matched,
    /// explained by a rule, or unexplained.
    pub total: u64,
    /// The library made the same change in the same operation.
    pub matched: u64,
    /// Differences that are meant, by rule.
    pub by_rule: BTreeMap<Rule, u64>,
    /// Whatever else differs, recorded changes and the library's own alike.
    pub unexplained: u64,
}

impl Transitions {
    /// Counts differences that a rule explains.
    pub fn explained(&mut self, rule: Rule, count: u64) {
        *self.by_rule.entry(rule).or_default() += count;
    }
}

/// Something that differs from the record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Position in the trace.
    pub seq: u64,
    /// Address space.
    pub as_id: u8,
    /// Guest frame.
    #[serde(serialize_with = "hexadecimal")]
    pub gfn: u64,
    /// Level of what is expected, or else of what was found; 0 if of neither.
    pub level: u8,
    /// What the trace says.
    pub expected: String,
    /// What the library did.
    pub got: String,
}

fn hexadecimal<S: serde::Serializer>(gfn: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{gfn:#x}"))
}

impl Difference {
    /// A difference about what maps a frame.
    pub fn mapping(
        seq: u64,
        as_id: u8,
        gfn: u64,
        expected: Option<Mapped>,
        got: Option<Mapped>,
    ) -> Self {
        let level = expected.or(got).map_or(0, |mapped| mapped.level);
        let show = |mapped: Option<Mapped>| {
            mapped.map_or_else(|| "nothing mapped".to_owned(), |m| m.to_string())
        };
        Self {
            seq,
            as_id,
            gfn,
            level,
            expected: show(expected),
            got: show(got),
        }
    }
}

impl From<(u64, Contradiction)> for Difference {
    fn from((seq, contradiction): (u64, Contradiction)) -> Self {
        let Contradiction {
            as_id,
            level,
            gfn,
            what,
        } = contradiction;
        Self {
            seq,
            as_id,
            gfn,
            level,
            expected: "a trace that agrees with itself".to_owned(),
            got: what.to_string(),
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            seq,
            as_id,
            gfn,
            level,
            expected,
            got,
        } = self;
        write!(
            f,
            "seq {seq}, as_id {as_id}, gfn {gfn:#x}, level {level}: expected {expected}, got {got}"
        )
    }
}

/// A leaf, as far as it is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// First guest frame.
    pub gfn: u64,
    /// 1 to 3.
    pub level: u8,
    /// First host frame.
    pub pfn: u64,
    /// The guest may write.
    pub writable: bool,
    /// A sweep or its policy keeps the guest from writing what the host lets it write.
    pub protected: bool,
}

impl Mapped {
    /// Whether `found` maps the same memory with the same right to write, unless that is a sweep's business.
    pub fn is_matched_by(&self, found: &Self) -> bool {
        (self.gfn, self.level, self.pfn) == (found.gfn, found.level, found.pfn)
            && (self.protected || self.writable == found.writable)
    }
}

impl From<Leaf> for Mapped {
    fn from(leaf: Leaf) -> Self {
        let (writable, protected) = (
            leaf.is_writable(),
            leaf.is_host_writable() && !leaf.is_writable(),
        );
        Self {
            gfn: leaf.gfn,
            level: leaf.level,
            pfn: leaf.pfn(),
            writable,
            protected,
        }
    }
}

impl From<tdp::Leaf> for Mapped {
    fn from(leaf: tdp::Leaf) -> Self {
        let writable = leaf.perms.contains(tdp::Perms::WRITE);
        Self {
            gfn: leaf.gfn.0,
            level: leaf.level.number(),
            pfn: leaf.pfn.0,
            writable,
            protected: false,
        }
    }
}

impl fmt::Display for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            gfn,
            level,
            pfn,
            writable,
            ..
        } = self;
        let writable = if *writable { "writable" } else { "read-only" };
        write!(f, "level {level} gfn {gfn:#x} -> pfn {pfn:#x} {writable}")
    }
}

/// What the replay of one trace on one format found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Findings {
    /// Name of the scenario.
    pub name: String,
    /// The file.
    pub path: String,
    /// The format.
    pub format: String,
    /// Levels of the tree.
    pub levels: u8,
    /// Events read.
    pub events: u64,
    /// Guest page faults replayed.
    pub faults: u64,
    /// Faults that went as recorded.
    pub matched: u64,
    /// Everything that differs: faults, operations, what was mapped, the trace itself.
    pub unexplained: u64,
    /// Faults by how they went.
    pub faults_by_outcome: BTreeMap<Recorded, Tally>,
    /// Faults that a rule puts outside of the library, by rule.
    pub faults_by_rule: BTreeMap<Rule, u64>,
    /// Operations on the MMU.
    pub operations: Tally,
    /// The same by kind.
    pub operations_by_kind: BTreeMap<Operation, Tally>,
    /// Changes of entries.
    pub transitions: Transitions,
    /// Guest accesses made on software vCPUs.
    pub accesses: u64,
    /// Entries that a fault had changed between the library's sweep and KVM's, where the library swept again.
    pub swept_again: u64,
    /// Pages in a recorded dirty log that the guest had not written: KVM or the VMM had.
    pub written_by_others: u64,
    /// Times that everything mapped was compared.
    pub comparisons: u64,
    /// Times that tables, MMIO entries and permissions were compared as well.
    pub full_comparisons: u64,
    /// Accessed bits that the record shows to have been set, or not, and that were made so before pages were aged.
    pub accessed_bits_set: u64,
    /// See above.
    pub accessed_bits_cleared: u64,
    /// Entries that were compared then, in all.
    pub entries_compared: u64,
    /// Leaves that were compared, in all.
    pub leaves_compared: u64,
    /// Most table frames in use at a time.
    pub peak_frames: u64,
    /// Table frames that were still in use after everything was dropped.
    pub leaked_frames: u64,
    /// How long it took.
    pub nanoseconds: u64,
    /// The first differences.
    pub differences: Vec<Difference>,
}

impl Findings {
    /// Names trace and format: the same scenarios are recorded on several kernels, in folders of their own.
    pub fn label(&self) -> String {
        let folder = Path::new(&self.path)
            .parent()
            .and_then(Path::file_name)
            .unwrap_or_default();
        format!(
            "{}/{} ({})",
            folder.to_string_lossy(),
            self.name,
            self.format
        )
    }

    /// Notes a difference that belongs to a fault or an operation, which is counted by itself.
    pub fn note(&mut self, difference: Difference) {
        if self.differences.len() < KEPT {
            self.differences.push(difference);
        }
    }

    /// Notes and counts a difference of its own.
    pub fn differs(&mut self, difference: Difference) {
        self.unexplained += 1;
        self.note(difference);
    }

    /// Counts a fault, or what was mapped ahead, that was compared.
    pub fn fault(&mut self, recorded: Recorded, ahead: bool, matched: bool) {
        if ahead {
            return self.operation(Operation::PreFault, matched);
        }
        self.faults += 1;
        if matched {
            self.matched += 1
        } else {
            self.unexplained += 1
        }
        self.faults_by_outcome
            .entry(recorded)
            .or_default()
            .count(matched);
    }

    /// Counts a fault that is no business of the library's.
    pub fn fault_outside(&mut self, rule: Rule) {
        self.faults += 1;
        *self.faults_by_rule.entry(rule).or_default() += 1;
    }

    /// Counts an operation that was compared.
    pub fn operation(&mut self, operation: Operation, matched: bool) {
        self.unexplained += u64::from(!matched);
        self.operations.count(matched);
        self.operations_by_kind
            .entry(operation)
            .or_default()
            .count(matched);
    }
}

/// The JSON.
#[derive(Debug, Default, Serialize)]
pub struct Summary {
    /// Changes of entries: recorded ones, those that follow from a split included, and the library's own that have no
    /// counterpart.
    pub transitions: u64,
    /// Those that the library made as well, in the same operation.
    pub matched: u64,
    /// Differences that are meant, by rule.
    pub by_rule: BTreeMap<Rule, u64>,
    /// Everything else that differs: changes, faults, operations, what was mapped, the recordings themselves.
    pub unexplained: u64,
    /// Guest page faults.
    pub faults: Tally,
    /// Operations on the MMU.
    pub operations: Tally,
    /// Table frames that were not given back.
    pub leaked_frames: u64,
    /// One entry for each trace and format.
    pub scenarios: Vec<Findings>,
}

impl Summary {
    /// Adds what one replay found.
    pub fn add(&mut self, findings: Findings) {
        let changes = &findings.transitions;
        self.transitions += changes.total;
        self.matched += changes.matched;
        for (&rule, &count) in &changes.by_rule {
            *self.by_rule.entry(rule).or_default() += count;
        }
        self.unexplained += findings.unexplained;
        for tally in findings.faults_by_outcome.values() {
            self.faults.add(tally);
        }
        let by_rule: u64 = findings.faults_by_rule.values().sum();
        self.faults.add(&Tally {
            total: by_rule,
            by_rule,
            ..Tally::default()
        });
        self.operations.add(&findings.operations);
        self.leaked_frames += findings.leaked_frames;
        self.scenarios.push(findings);
    }
}
