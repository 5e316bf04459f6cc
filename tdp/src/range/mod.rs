//! Sweeps: operations on a range of guest frames. Each uses the same exchanges on the same entries as a fault does; none
//! takes an exclusive lock.

mod age;
mod audit;
mod leaves;
mod protect;
mod visit;
pub(crate) mod zap;

pub use audit::Audit;
pub use visit::Leaf;
