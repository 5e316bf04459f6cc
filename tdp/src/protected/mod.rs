//! Protected tables: what a confidential guest's processor walks and no host may write.
//!
//! The table belongs to a trusted module; a host changes it by calls that the module may refuse. Here is one model for
//! each module, an executable specification that refuses what the real one refuses:
//!
//! * [`tdx`]: Intel's TDX module and its Secure EPT.

pub mod tdx;
