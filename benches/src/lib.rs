//! Benchmarks of the `tdp` memory-management unit.
//!
//! Every scenario is a module of its own behind a subcommand of `tdp-bench` ([`cli`]). It measures the library and,
//! in the same process and interleaved with it, what a user would otherwise write or take ([`baseline`]), because
//! only ratios carry over from one machine to another. [`report`] is what the scenarios share towards the outside.

pub mod access_tracking_perf;
pub mod baseline;
pub mod cli;
pub mod compare;
pub mod confidential;
pub mod conflicts;
pub mod constant;
pub mod demand_paging;
pub mod dirty_log_perf;
pub mod formats;
pub mod hot;
pub mod instructions;
pub mod interference;
pub mod memory;
pub mod memslot_modification_stress;
pub mod memslot_perf;
pub mod mmu_stress;
pub mod nx_huge_pages_perf;
pub mod ours;
pub mod pre_fault_memory;
pub mod private_faults;
pub mod private_mem_conversions;
pub mod race;
pub mod replay;
pub mod report;
pub mod scaling;
pub mod size;
pub mod soak;
pub mod suite;
pub mod sweeping;
pub mod sweeps;
pub mod sync;
pub mod sys;
pub mod time;
pub mod vm_teardown;
