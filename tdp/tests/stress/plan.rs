//! What a run does, and for how long.

use std::time::Duration;

/// How often the host does what, by weight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) name: &'static str,
    pub(crate) invalidations: u64,
    pub(crate) zaps: u64,
    pub(crate) teardowns: u64,
    pub(crate) slots: u64,
    /// Splits and collapses, and steps of recovery.
    pub(crate) sizes: u64,
    /// Large leaves are not executable.
    pub(crate) nx: bool,
    /// Table frames: not many, so that each is used again soon.
    pub(crate) table_frames: usize,
    /// What somebody does wrong on purpose.
    pub(crate) flaw: Option<Flaw>,
}

/// A duty that is neglected, so that the run must find a violation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// The host's flush returns at once.
    NoFlush,
    /// The host's flush returns at once when tables gave way to large leaves, or were recovered.
    NoFlushOfSizes,
    /// A vCPU does not flush its TLB when it is told to.
    VcpuKeepsTlb,
    /// The host gives pages away before the range is flushed.
    GivesAwayFirst,
}

/// The host takes pages away from a guest that needs them.
pub(crate) const INVALIDATIONS: Plan = Plan {
    name: "invalidations",
    invalidations: 1,
    zaps: 0,
    teardowns: 0,
    slots: 0,
    sizes: 0,
    nx: false,
    table_frames: 160,
    flaw: None,
};

/// The host takes tables and roots away.
pub(crate) const ZAPS: Plan = Plan {
    name: "zaps",
    zaps: 6,
    teardowns: 1,
    invalidations: 1,
    ..INVALIDATIONS
};

/// The host takes slots away.
pub(crate) const SLOTS: Plan = Plan {
    name: "slots",
    slots: 4,
    zaps: 1,
    ..INVALIDATIONS
};

/// The host changes the sizes of leaves, and everything else now and then.
pub(crate) const SIZES: Plan = Plan {
    name: "sizes",
    sizes: 12,
    zaps: 1,
    slots: 1,
    invalidations: 3,
    ..INVALIDATIONS
};

/// All of it, with too few frames.
pub(crate) const EVERYTHING: Plan = Plan {
    name: "everything",
    invalidations: 4,
    zaps: 4,
    teardowns: 1,
    slots: 3,
    sizes: 4,
    nx: false,
    table_frames: 64,
    flaw: None,
};

impl Plan {
    /// The same without executable large leaves.
    pub(crate) const fn without_executable_large_leaves(self) -> Self {
        Self { nx: true, ..self }
    }

    pub(crate) const fn with(self, flaw: Flaw) -> Self {
        Self {
            flaw: Some(flaw),
            ..self
        }
    }
}

fn number<T: std::str::FromStr>(variable: &str) -> Option<T> {
    let text = std::env::var(variable).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{variable}={text} is not a number")))
}

/// The seed: what the environment says, or another one each time.
pub(crate) fn seed() -> u64 {
    number("TDP_STRESS_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |now| now.as_nanos() as u64) % 1_000_000
    })
}

/// How long a run takes that finds nothing.
pub(crate) fn length() -> Duration {
    Duration::from_secs_f64(number("TDP_STRESS_SECONDS").unwrap_or(1.5))
}
