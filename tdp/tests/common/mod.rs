//! What the tests of the MMU and its fuzz target share.
//!
//! * `processor`: pairs each entry format with the reference walker of its processor;
//! * `host`: a host whose answers a test writes, over a frame pool that the test can still see when the MMU is gone;
//! * `rig`: an MMU on such a host, and the guard that no frame of it leaks;
//! * `flat`: what the tables must hold, kept as plain maps;
//! * `ops`, `run`: operations on an MMU as data, and the interpreter that runs them against the flat model; it predicts
//!   what each operation comes to and compares everything after each.
#![allow(dead_code, reason = "each user takes a part of it")]

pub(crate) mod flat;
pub(crate) mod host;
pub(crate) mod ops;
pub(crate) mod processor;
pub(crate) mod rig;
pub(crate) mod run;
