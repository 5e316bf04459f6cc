//! A page-fault handler for VMs that are restored lazily, and an example of how the library is embedded where the table that
//! counts belongs to somebody else: here to the kernel, which changes it by ioctl.
//!
//! A VMM maps guest memory, registers it with a userfaultfd, and hands that over by Firecracker's protocol ([`protocol`]).
//! Several workers answer its faults at once. What they share is one MMU ([`host`]): a page's life is its entry, and the
//! ioctl that fills it runs while the entry is frozen ([`table`]).
#![cfg(target_os = "linux")]

mod background;
pub mod baseline;
pub mod bench;
mod changes;
pub mod dirty;
pub mod host;
pub mod memory;
pub mod protocol;
pub mod session;
pub mod source;
pub mod sys;
pub mod table;
pub mod vmm;
mod worker;

pub use session::{Config, Engine, Report, Session, SessionError};
pub use worker::Served;
