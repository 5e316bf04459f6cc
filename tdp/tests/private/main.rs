//! The private half: hand-offs to the model of the TDX module, one thread at a time.

#[cfg(not(loom))]
mod abuse;
#[cfg(not(loom))]
mod batch;
#[cfg(not(loom))]
mod convert;
#[cfg(not(loom))]
mod failures;
#[cfg(not(loom))]
mod kinds;
#[cfg(not(loom))]
mod least;
#[cfg(not(loom))]
mod life;
#[cfg(not(loom))]
mod lookups;
#[cfg(not(loom))]
mod prefault;
#[cfg(not(loom))]
mod resize;
#[cfg(not(loom))]
mod rig;
#[cfg(not(loom))]
mod stress;
