//! Reclamation for page-table walks: vCPU sections, visits, retirement in batches, grace periods that are driven.
//!
//! A table that is unlinked may still be walked by whoever read the link before. It is handed to a [`Domain`]
//! ([`Domain::retire`]) and dropped once nobody can be inside any more. Two kinds of readers differ in what they may cost:
//!
//! * **Sections** are the critical sections of vCPUs: hundreds of millions a second, one registered [`Reader`] per vCPU.
//!   Entering and leaving writes one word on a cache line that belongs to this vCPU alone and reads nothing else: no
//!   global epoch, no thread-local storage, no collection. The side that retires pays for that by looking at every record.
//! * **Visits** are sweeps, dumps and statistics: rare, long, from any thread, no registration. They belong to the side
//!   that retires, so they may collect garbage when they begin. They are pins of a crossbeam-epoch collector that
//!   belongs to the domain.
//!
//! Garbage passes through both in turn: it waits until every section that was inside at or after the unlinking has left
//! (the *section stage*, `section.rs`), and is then deferred on the collector, which waits for the visits (the *epoch
//! stage*). Nothing runs in the background: [`Domain::drive`] moves garbage on, and `retire` calls it by itself when
//! more than half of the bound waits.
//!
//! ```
//! use tdp_rcu::{Domain, DomainConfig};
//!
//! let domain = Domain::<Box<u64>>::new(DomainConfig { bound: 64 });
//! let mut reader = domain.reader();
//!
//! let section = reader.enter();
//! domain.retire(Box::new(42), 1); // unlinked by somebody while the section is inside
//! domain.drive();
//! assert_eq!(domain.counters().pending, 1); // so it waits
//! drop(section);
//! assert_eq!(domain.drive(), 1); // and goes once the section has left
//! ```

#![no_std]

extern crate alloc;
#[cfg(any(feature = "std", loom, shuttle))]
extern crate std;

mod barrier;
mod counters;
mod domain;
mod queue;
mod section;
pub mod sync;
mod visit;

pub use counters::Counters;
pub use domain::{Domain, DomainConfig};
pub use section::{NOTES, Notes, Reader, Section, Stamp};
pub use visit::Visit;
