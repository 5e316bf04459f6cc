//! Sweeps: operations on a range of guest frames. Each uses the same exchanges on the same entries as a fault does; none
//! takes an exclusive lock.

mod age;
mod audit;
mod blocked;
mod collapse;
mod convert;
pub(crate) mod leaves;
mod private;
mod private_sweep;
pub(crate) mod protect;
mod resize;
mod split;
mod steps;
mod visit;
pub(crate) mod zap;

pub use audit::Audit;
pub(crate) use blocked::Withheld;
pub use convert::ConvertError;
pub use private_sweep::{RemovalError, Removed};
pub use resize::Folded;
pub use split::{SplitReport, SplitStopped};
pub use steps::{Absorb, Progress, Steps};
pub use visit::{Entry, Leaf};
