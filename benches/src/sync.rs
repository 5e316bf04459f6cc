//! The one module of this package that names atomics.
//!
//! The baselines stand beside the library and use nothing of it, so they do not take its atomics either.

pub use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};

/// A value on cache lines of its own. 128 bytes: processors fetch lines in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Padded<T>(pub T);
