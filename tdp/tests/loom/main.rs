//! loom models of the MMU: every interleaving, within a bound on preemptions, and every value that a load may return, of
//! tiny programs that run the code that ships.
//!
//! ```text
//! RUSTFLAGS="--cfg loom --cfg crossbeam_loom" cargo test -p tdp --release --test loom -- --nocapture
//! ```
//!
//! Each model states one property. Under loom a table has two entries and a root may be of level 2, so that a tree is a
//! root and one or two tables. What the models share is in [`world`]: a frame source that notices a frame used after it
//! was given back, a host whose backing can be switched, a processor that walks the tables outside any critical section and
//! touches guest memory, and an audit of the tree against the counters.

#![cfg(loom)]

mod bits;
mod conversion;
mod dirty;
mod faults;
mod handoff;
mod invalidation;
mod module;
mod removal;
mod resize;
mod sizes;
mod sweeps;
mod tlb;
mod world;
