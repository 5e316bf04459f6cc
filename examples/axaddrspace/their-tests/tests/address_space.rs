//! The tests of `axaddrspace` for its address space, over our nested page table (`table/mod.rs`).
// UNSAFETY: theirs.
#![allow(
    unsafe_code,
    missing_docs,
    unreachable_pub,
    unused,
    unused_qualifications,
    clippy::all
)]

include!(concat!(env!("OUT_DIR"), "/tests/address_space.rs"));
