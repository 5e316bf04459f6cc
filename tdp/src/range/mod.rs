//! Sweeps: operations on a range of guest frames. Each uses the same exchanges on the same entries as a fault does; none
//! takes an exclusive lock.

mod age;
mod audit;
mod convert;
mod leaves;
mod private;
mod protect;
mod resize;
mod split;
mod visit;
pub(crate) mod zap;

pub use audit::Audit;
pub use convert::ConvertError;
pub use private::{RemovalError, Removed};
pub use resize::Folded;
pub use visit::{Entry, Leaf};
