//! What the suite runs, and which numbers of each report are its figures.

/// One scenario with its arguments.
#[derive(Debug)]
pub struct Scenario {
    /// Heading in the report, and what `--only` names.
    pub name: &'static str,
    /// The subcommand.
    pub command: &'static str,
    /// Its arguments for a look, a second or so a round.
    pub quick: &'static str,
    /// Its arguments for figures to keep.
    pub full: &'static str,
    /// What it tells, in a line.
    pub about: &'static str,
    /// Which numbers of its JSON are figures.
    pub picks: &'static [Pick],
}

/// Figures below one place of a report.
#[derive(Debug)]
pub struct Pick {
    /// Keys from the top, with dots between; `*` is every key, or every element of an array.
    pub path: &'static str,
    /// What the numbers are.
    pub unit: &'static str,
    /// Whether more is better.
    pub more_is_better: bool,
}

/// Ratios that are better if larger: a baseline's time over the library's, a rate over another.
const fn gain(path: &'static str) -> Pick {
    Pick {
        path,
        unit: "ratio, more is better",
        more_is_better: true,
    }
}

/// Ratios that are better if smaller: the library's time over a bound, a slowdown.
const fn cost(path: &'static str) -> Pick {
    Pick {
        path,
        unit: "ratio, less is better",
        more_is_better: false,
    }
}

/// What is better if smaller and no ratio: times, sizes.
const fn less(path: &'static str, unit: &'static str) -> Pick {
    Pick {
        path,
        unit,
        more_is_better: false,
    }
}

/// Nanoseconds an operation or a page.
const fn each(path: &'static str) -> Pick {
    less(path, "ns each")
}

/// Things done in a second.
const fn rate(path: &'static str) -> Pick {
    Pick {
        path,
        unit: "per second",
        more_is_better: true,
    }
}

const PAGING: &[Pick] = &[
    gain("ratios.by_format.*.*.*"),
    gain("scaling.*.*"),
    each("results.*.ns_per_operation.median"),
    each("baselines.*.ns_per_operation.median"),
    cost("memory.*.ratio"),
];

/// A confidential guest beside one that is not: its ratio is a slowdown of the library by itself.
const CONFIDENTIAL_PAGING: &[Pick] = &[
    cost("ratios.by_format.*.*.*"),
    gain("scaling.*.*"),
    each("baselines.*.ns_per_operation.median"),
];

const SWEPT: &[Pick] = &[
    gain("ratios.rate_kept.*"),
    cost("ratios.worst_fault.*"),
    cost("ratios.longest_fault.*"),
];

/// All of it, in the order of a round.
pub const PLAN: &[Scenario] = &[
    Scenario {
        name: "demand-paging",
        command: "demand-paging",
        quick: "-v 2 -b 64M -i 1",
        full: "-v 2 -b 512M -i 1",
        about: "Memory faulted in page by page. Ratios are a contender's time over the library's for the same work; the floor is a \
                walk and one compare-exchange, and below 1.",
        picks: PAGING,
    },
    Scenario {
        name: "demand-paging, one region",
        command: "demand-paging",
        quick: "-v 2 -b 64M -i 1 -o -f ept",
        full: "-v 2 -b 512M -i 1 -o -f ept",
        about: "The same with all vCPUs below the same table at the same time.",
        picks: PAGING,
    },
    Scenario {
        name: "demand-paging, random",
        command: "demand-paging",
        quick: "-v 2 -b 64M -i 1 -a -f ept",
        full: "-v 2 -b 512M -i 1 -a -f ept",
        about: "The same with pages in random order.",
        picks: PAGING,
    },
    Scenario {
        name: "demand-paging, confidential",
        command: "demand-paging",
        quick: "-v 2 -b 64M -i 1 -f ept --visibility mixed --against none",
        full: "-v 2 -b 512M -i 1 -f ept --visibility mixed --against none",
        about: "A guest with private and shared memory by turns, on a module that costs nothing; its time over that of a guest that \
                is not confidential.",
        picks: CONFIDENTIAL_PAGING,
    },
    Scenario {
        name: "pre-fault-memory",
        command: "pre-fault-memory",
        quick: "-b 16M -i 1",
        full: "-b 64M -i 1",
        about: "Ranges mapped ahead of their use, in both halves.",
        picks: &[each("results.*.ns_per_page.median")],
    },
    Scenario {
        name: "private-faults",
        command: "private-faults",
        quick: "-i 1",
        full: "-b 16M -i 1",
        about: "Private memory faulted in through a trusted module: how far calls overlap, what a fault costs over a shared one, and \
                what the library adds to a call.",
        picks: &[
            gain("ratios.overlap"),
            cost("ratios.vs_shared"),
            cost("ratios.overhead"),
            each("results.*.ns_per_operation.median"),
        ],
    },
    Scenario {
        name: "private-mem-conversions",
        command: "private-mem-conversions",
        quick: "-b 8M --seconds 0.5",
        full: "-b 64M --seconds 5",
        about: "Memory made private and shared while vCPUs use it.",
        picks: &[
            rate("conversions_per_second"),
            rate("accesses_per_second"),
            less("conversions.ns.p50", "ns"),
            less("conversions.ns.p99", "ns"),
        ],
    },
    Scenario {
        name: "vm-teardown",
        command: "vm-teardown",
        quick: "-b 8M -i 1",
        full: "-b 64M -i 1",
        about: "Private memory taken back, page by page beside a running guest, and whole.",
        picks: &[
            gain("ratios.released_speedup"),
            gain("ratios.uncombined_time"),
            cost("ratios.calls_per_page"),
            cost("ratios.busy_per_block"),
            each("results.*.ns_per_page.median"),
        ],
    },
    Scenario {
        name: "access-tracking-perf",
        command: "access-tracking-perf",
        quick: "-b 64M -i 1 -p",
        full: "-b 256M -i 1 -p",
        about: "Aging, and what it costs vCPUs.",
        picks: &[
            cost("ratios.aging_over_floor"),
            gain("ratios.aging.*"),
            cost("ratios.slowdown_by_aging.*"),
            each("ratios.aging_ns_per_page.*"),
        ],
    },
    Scenario {
        name: "sweeps",
        command: "sweeps",
        quick: "-b 64M -i 1",
        full: "-b 1G -i 1",
        about: "Each sweep by one thread: the library's time over the floor's, and baselines' over the library's.",
        picks: &[
            cost("ratios.over_floor.*"),
            gain("ratios.baselines.*.*"),
            each("results.*.ns_per_leaf_median"),
        ],
    },
    Scenario {
        name: "interference",
        command: "interference",
        quick: "-b 32M -i 1",
        full: "-b 256M -i 1",
        about: "A vCPU that faults while its memory is swept without pause: share of its rate that it keeps, and its worst faults over \
                those of an idle machine.",
        picks: SWEPT,
    },
    Scenario {
        name: "dirty-log-perf",
        command: "dirty-log-perf",
        quick: "-b 64M --rounds 1",
        full: "-b 256M --rounds 1",
        about: "Which pages were written: the phases of KVM's test, baselines' times over the library's.",
        picks: &[gain("ratios.*.*"), less("results.*.ns.*", "ns")],
    },
    Scenario {
        name: "memslot-perf",
        command: "memslot-perf",
        quick: "-s 64 -b 64M -l 0.05",
        full: "-s 512 -b 512M -l 0.3",
        about: "Memory of many slots mapped, unmapped, moved and used.",
        picks: &[gain("ratios.*.*"), less("results.*.ns.*", "ns")],
    },
    Scenario {
        name: "memslot-modification-stress",
        command: "memslot-modification-stress",
        quick: "-b 64M -i 1",
        full: "-b 256M -i 1",
        about: "A vCPU that faults while a slot elsewhere comes and goes.",
        picks: SWEPT,
    },
    Scenario {
        name: "nx-huge-pages-perf",
        command: "nx-huge-pages-perf",
        quick: "-b 256M -i 1",
        full: "-b 1G -i 1",
        about: "A vCPU that fetches while large pages are recovered.",
        picks: SWEPT,
    },
    Scenario {
        name: "mmu-stress",
        command: "mmu-stress",
        quick: "--seconds 1 -b 16M --sparse 64G",
        full: "--seconds 10 -b 32M --sparse 1T",
        about: "Everything at once under vCPUs that notice what is wrong; the phases of KVM's test, and a sparse guest taken down.",
        picks: &[
            less("ratios.invalidate_us", "us"),
            less("ratios.teardown_ms", "ms"),
            less("ratios.longest_fault_idle_us", "us"),
            less("ratios.longest_fault_teardown_us", "us"),
            less("results.shared.*.phases.*", "ns"),
        ],
    },
    Scenario {
        name: "constant",
        command: "constant",
        quick: "-b 128M -i 3",
        full: "-b 256M -i 3",
        about: "What one fault of one vCPU costs over the least that it can, tables in place; a critical section over a \
                compare-exchange; a fault with every line cold; a page invalidated beside a vCPU that faults.",
        picks: &[
            cost("ratios.*.sequential"),
            cost("ratios.*.random"),
            cost("ratios.*.map"),
            cost("ratios.*.guard_vs_cas"),
            cost("ratios.*.guard_share"),
            cost("ratios.*.cold"),
            less("ratios.*.cold_fault_ns", "ns"),
            less("ratios.*.invalidation_median_ns", "ns"),
        ],
    },
    Scenario {
        name: "scaling",
        command: "scaling",
        quick: "-i 1",
        full: "-i 1",
        about: "Cache lines that move for a fault, and the rate that this bounds for many vCPUs. Beyond two threads: projected.",
        picks: &[
            gain("ratios.two_threads"),
            cost("ratios.transfers_spread"),
            gain("ratios.projected_efficiency_64"),
            gain("ratios.projected_over_rwlock_64"),
        ],
    },
    Scenario {
        name: "memory",
        command: "memory",
        quick: "-b 1G --sparse 1T",
        full: "",
        about: "What the library takes for each GiB of a guest, at rest and at the worst moment of a full zap.",
        picks: &[
            less("ratios.bytes_per_gib_at_rest.*", "bytes"),
            less("ratios.bytes_per_gib_at_worst.*", "bytes"),
            cost("ratios.at_rest_over_entries.*"),
            cost("ratios.worst_over_rest.*"),
        ],
    },
];
