//! Conflicts that are meant to be, each with its reason.

/// One kind: in which pairs, which function of the side that is not the fault's, and why.
struct Permitted {
    /// Part of the pair's name.
    pair: &'static str,
    /// Part of the name of a function of either side.
    function: &'static str,
    reason: &'static str,
}

const LIST: &[Permitted] = &[
    Permitted {
        pair: "tables",
        function: "tdp/src/table.rs",
        reason: "metadata of eight neighbouring table frames: written when a table is linked, once in 512 pages",
    },
    Permitted {
        pair: "tables",
        function: "tdp/src/pool.rs",
        reason: "the free list of the frame pool, from which a vCPU fills up its own tables, several at a time",
    },
    Permitted {
        pair: "tables",
        function: "benches/src/confidential/backend.rs",
        reason: "the module's own: its twins",
    },
    Permitted {
        pair: "conversion",
        function: "benches/src/confidential/",
        reason: "the module's own",
    },
    Permitted {
        pair: "invalidation",
        function: "tdp/src/invalidate.rs",
        reason: "a fault reads which ranges are under invalidation, and an invalidation says so: the fault writes nothing",
    },
    Permitted {
        pair: "conversion",
        function: "tdp/src/invalidate.rs",
        reason: "a fault reads which ranges are being converted, and a conversion says so: the fault writes nothing",
    },
    Permitted {
        pair: "",
        function: "rcu/src/section.rs",
        reason: "a grace period looks at the word of each vCPU: it waits for their sections",
    },
];

/// Why a conflict of functions in a pair is permitted.
pub(super) fn reason(pair: &str, first: &[String], second: &[String]) -> Option<&'static str> {
    let named = |function: &str| {
        first
            .iter()
            .chain(second)
            .any(|name| name.contains(function))
    };
    LIST.iter()
        .find(|permitted| pair.contains(permitted.pair) && named(permitted.function))
        .map(|permitted| permitted.reason)
}
