//! Protected tables: what a confidential guest's processor walks and no host may write.
//!
//! The table belongs to a trusted module; a host changes it by calls that the module may refuse. [`ProtectedTable`] is the
//! hook through which the MMU makes those calls, with one shape for every module: TDX, CCA, SNP, pKVM, CoVE.
//!
//! Here is also one model for each module, an executable specification that refuses what the real one refuses:
//!
//! * `tdx`: Intel's TDX module and its Secure EPT (with `std`).
//!
//! Protocol, seen from the module. For each entry of its table:
//!
//! ```text
//!   free --link--> table --block--> blocked table --(ticket)--> unlink --> free
//!   free --install--> leaf --block--> blocked leaf --(ticket)--> remove --> free
//!                                                            \-> unblock --> leaf
//!                     leaf --block--(ticket)--> split --> table        table --block--(ticket)--> merge --> leaf
//! ```
//!
//! The MMU promises, for every call:
//!
//! 1. the entry is frozen for the whole call: no other call on the same place runs, from whatever thread
//!    (INV: frozen-owns); calls on other places do run, at any time, and the MMU holds no lock around them;
//! 2. a parent is linked before any call below it, and children are removed before their table is blocked
//!    (INV: parent-before-child);
//! 3. what is removed, unlinked, split or merged was blocked first, if the module needs that, and a ticket begun after the
//!    block has drained: [`Drained`] cannot be had otherwise;
//! 4. no page is offered twice while it is in the table;
//! 5. every failure that says "again" is answered by the call made again, or by its undoing;
//! 6. a call that panics is taken for one that changed nothing.

mod combiner;
mod desk;
mod persist;
#[cfg(feature = "std")]
pub mod tdx;
mod tickets;

pub(crate) use combiner::{Combiner, Removal};
pub(crate) use desk::{Desk, drain_alone};
pub(crate) use persist::{Caller, Patience};
pub use tickets::{Drained, Ticket};

use crate::frozen::{EntryPlace, FrozenEntry};
use crate::host::OutOfFrames;
use core::fmt;
use tdp_arch::{Level, Pfn};

/// What a module can do, and what it wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// Each table of the protected tree is a page that the host gives by [`ProtectedTable::link`], the *twin* of the
    /// table that the MMU walks. Without it, `link` and `unlink` are not called.
    pub needs_link: bool,
    /// Live entries must be blocked, and a ticket drained, before they are taken away. Without it, `block`, `unblock` and
    /// tickets are not used: the module flushes inside its calls.
    pub needs_block: bool,
    /// `block` takes a lock of the whole table, so that threads which block at the same time refuse each other: the MMU
    /// lets one thread carry the removals of all.
    pub serialises_block: bool,
    /// Any number of tickets can be out at a time. Without it the MMU has one, and threads wait for each other's.
    pub parallel_tickets: bool,
    /// Neighbouring leaves are cheaper in one call ([`ProtectedTable::install_many`]).
    pub range_ops: bool,
    /// Live large leaves can be split.
    pub split_live: bool,
    /// Tables of leaves can be merged into a large one.
    pub merge: bool,
    /// An unfinished call can be gone on with ([`ProtectedTable::resume`]).
    pub resumable: bool,
    /// Largest leaf while the guest is built.
    pub leaf_levels_before_finalise: Level,
    /// Largest leaf once it runs.
    pub leaf_levels: Level,
    /// Pages that the module may ask for during one call ([`Failure::NeedPages`]). For the host, which has to have them: the MMU
    /// donates what it is asked for.
    pub donation_per_op: u32,
}

impl Capabilities {
    /// A module without any of it: leaves of 4 KiB, tables of its own, flushes of its own.
    pub const fn none() -> Self {
        Self {
            needs_link: false,
            needs_block: false,
            serialises_block: false,
            parallel_tickets: false,
            range_ops: false,
            split_live: false,
            merge: false,
            resumable: false,
            leaf_levels_before_finalise: Level::L1,
            leaf_levels: Level::L1,
            donation_per_op: 0,
        }
    }

    /// With twins of tables.
    pub const fn needs_link(mut self) -> Self {
        self.needs_link = true;
        self
    }

    /// With block and tickets.
    pub const fn needs_block(mut self) -> Self {
        self.needs_block = true;
        self
    }

    /// With blocks that exclude each other.
    pub const fn serialises_block(mut self) -> Self {
        self.serialises_block = true;
        self
    }

    /// With any number of tickets at a time.
    pub const fn parallel_tickets(mut self) -> Self {
        self.parallel_tickets = true;
        self
    }

    /// With calls on neighbouring leaves.
    pub const fn range_ops(mut self) -> Self {
        self.range_ops = true;
        self
    }

    /// With splits of live large leaves.
    pub const fn split_live(mut self) -> Self {
        self.split_live = true;
        self
    }

    /// With merges.
    pub const fn merge(mut self) -> Self {
        self.merge = true;
        self
    }

    /// With calls that can be gone on with.
    pub const fn resumable(mut self) -> Self {
        self.resumable = true;
        self
    }

    /// With leaves up to `level` once the guest runs, and up to `before` while it is built.
    pub const fn leaves(mut self, before: Level, level: Level) -> Self {
        self.leaf_levels_before_finalise = before;
        self.leaf_levels = level;
        self
    }

    /// With this many pages that one call may ask for.
    pub const fn donation_per_op(mut self, pages: u32) -> Self {
        self.donation_per_op = pages;
        self
    }
}

/// What was in the way of a call that changed nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Another call on the same entry, or the guest's.
    Entry,
    /// The module's lock of the whole table. Vcpus that leave the guest help.
    Tree,
    /// The module's lock of the whole VM.
    Vm,
    /// The TLB-tracking epoch. Vcpus that leave the guest help.
    Epoch,
    /// A call on a page that lies near in physical memory. Only time helps.
    PhysNeighbour,
}

/// What a call is to be gone on with.
#[derive(Debug, PartialEq, Eq)]
pub struct Token(pub u64);

/// Why a call was not done.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// Nothing changed. The MMU makes the call again, with growing waits in between, and asks for a
    /// [`kick`](ProtectedTable::kick) where that helps; when it has tried long enough it undoes what it had begun and
    /// tells its caller to try again.
    #[error("the module is busy: {scope:?}")]
    Busy {
        /// With what.
        scope: Scope,
    },
    /// A vCPU may still hold what was blocked. Nothing changed. The MMU makes the call again; it never blocks anew.
    #[error("a vCPU may still hold a translation")]
    NotDrained,
    /// The call was interrupted and changed nothing. The MMU makes it again, as often as it would a busy one.
    #[error("the call was interrupted before it changed anything")]
    Restart,
    /// The call has begun. The entry stays frozen and the MMU calls [`ProtectedTable::resume`] until it is done. From a
    /// module that has not declared itself [`resumable`](Capabilities::resumable) it is [`Fatal`](Failure::Fatal).
    #[error("the call is to be gone on with")]
    Incomplete(Token),
    /// Of a call on many entries, this many are done. The MMU publishes those and makes the call again for the rest.
    #[error("{0} entries are done")]
    Partial(usize),
    /// Nothing changed; the module needs this many pages. The MMU [donates](ProtectedTable::donate) them and makes the
    /// call again.
    #[error("the module needs {0} pages")]
    NeedPages(u32),
    /// Nothing changed, and the same call would be refused again: a mistake of the embedder, or the guest's doing. The MMU
    /// undoes what it had begun and reports the code.
    #[error("refused with code {0:#x}")]
    Refused(u64),
    /// The module or the VM is lost. The MMU undoes what it had begun; private faults report it from then on.
    #[error("the module gave the VM up")]
    Fatal,
}

/// What a page that is installed holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// While the guest is built: a copy of the host's page `source`, measured in the order of the calls.
    Measured {
        /// The page to copy.
        source: Pfn,
    },
    /// Zeroes, usable at once.
    Zero,
    /// The guest has to accept it before its first use. What the MMU asks for once the guest runs.
    Pending,
}

/// What a module says of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inspected {
    /// Nothing there.
    Free,
    /// A table.
    Table {
        /// Blocked.
        blocked: bool,
    },
    /// A page.
    Leaf {
        /// Its first host frame.
        pfn: Pfn,
        /// Not accepted by the guest yet.
        pending: bool,
        /// Blocked.
        blocked: bool,
    },
    /// Not to be reached: a parent is missing or blocked.
    Unreachable,
}

/// The hook to the trusted module that owns the protected table.
///
/// The head of [this module](self) says what the MMU promises and in which order it calls. Every method may be called from
/// any thread, for different places at the same time. What each [`Failure`] obliges the MMU to do is said there; a method
/// that fails with anything but [`Incomplete`](Failure::Incomplete) and [`Partial`](Failure::Partial) has changed
/// nothing.
///
/// From inside a method the MMU must not be called.
#[allow(unused_variables)]
pub trait ProtectedTable: Send + Sync + 'static {
    /// What the module can do. Constant.
    fn capabilities(&self) -> Capabilities;

    /// Fills the front of `out` with pages that may be given to the module as tables and returns how many: at least one.
    ///
    /// # Errors
    ///
    /// [`OutOfFrames`] if there is none.
    fn allocate_twins(&self, out: &mut [Pfn]) -> Result<usize, OutOfFrames> {
        Err(OutOfFrames { limit: 0 })
    }

    /// Takes pages back that the module does not own (any more).
    fn free_twins(&self, twins: &[Pfn]) {}

    /// Gives the module pages to work with, outside any hand-off.
    ///
    /// # Errors
    ///
    /// [`OutOfFrames`] if there are none.
    fn donate(&self, pages: u32) -> Result<(), OutOfFrames> {
        Ok(())
    }

    /// Has vCPUs that are in the guest leave it once, without waiting for them. Called when calls stay busy.
    fn kick(&self) {}

    /// Makes the free entry refer to an empty table in the page `twin`.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    fn link(&self, entry: &FrozenEntry<'_>, twin: Pfn) -> Result<(), Failure> {
        Ok(())
    }

    /// Puts a page of the entry's level into the free entry.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    fn install(&self, entry: &FrozenEntry<'_>, page: Pfn, content: Content) -> Result<(), Failure>;

    /// The same for neighbouring free entries of one table and consecutive pages from `first` on.
    ///
    /// # Errors
    ///
    /// [`Failure`]; with [`Partial`](Failure::Partial) the first so many are installed, with any other none. It cannot be gone
    /// on with: [`Incomplete`](Failure::Incomplete) is taken for [`Fatal`](Failure::Fatal).
    fn install_many(
        &self,
        entries: &[FrozenEntry<'_>],
        first: Pfn,
        content: Content,
    ) -> Result<(), Failure> {
        // One of them, so that a panic has changed nothing.
        let Some((entry, rest)) = entries.split_first() else {
            return Ok(());
        };
        self.install(entry, first, content)?;
        if rest.is_empty() {
            Ok(())
        } else {
            Err(Failure::Partial(1))
        }
    }

    /// Lets no new translation go through the entry, table or leaf. On an entry that is blocked already it does nothing.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    fn block(&self, entry: &FrozenEntry<'_>) -> Result<(), Failure> {
        Ok(())
    }

    /// Begins to flush what was blocked so far from all vCPUs, and makes those leave the guest that are in the way. The MMU
    /// has one ticket at a time, unless the module can do with [more](Capabilities::parallel_tickets).
    ///
    /// # Errors
    ///
    /// [`Failure`].
    fn flush_begin(&self) -> Result<Ticket, Failure> {
        Ok(Ticket::new(0))
    }

    /// Says whether the ticket has drained.
    ///
    /// # Errors
    ///
    /// The ticket, if it has not.
    fn flush_poll(&self, ticket: Ticket) -> Result<Drained, Ticket> {
        Ok(ticket.drained())
    }

    /// Takes a block back.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    fn unblock(&self, entry: &FrozenEntry<'_>, drained: &Drained) -> Result<(), Failure> {
        Ok(())
    }

    /// Takes the leaf's page out. When it returns the page is the host's again, and scrubbed.
    ///
    /// # Errors
    ///
    /// [`Failure`]; after a block and its ticket only those that say "again".
    fn remove(&self, entry: &FrozenEntry<'_>, drained: &Drained) -> Result<(), Failure>;

    /// Takes an empty table out. When it returns its page is the host's again.
    ///
    /// # Errors
    ///
    /// As [`remove`](ProtectedTable::remove).
    fn unlink(&self, entry: &FrozenEntry<'_>, drained: &Drained) -> Result<(), Failure> {
        Ok(())
    }

    /// Replaces the large leaf by a table in the page `twin` that maps the same memory; the entry is live again.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    fn split(&self, entry: &FrozenEntry<'_>, twin: Pfn, drained: &Drained) -> Result<(), Failure> {
        Err(Failure::Refused(0))
    }

    /// Replaces the table by one leaf that maps the same memory; the entry is live again and the table's page the host's.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    fn merge(&self, entry: &FrozenEntry<'_>, drained: &Drained) -> Result<(), Failure> {
        Err(Failure::Refused(0))
    }

    /// Goes on with a call that was [`Incomplete`](Failure::Incomplete).
    ///
    /// # Errors
    ///
    /// [`Incomplete`](Failure::Incomplete) again, or those that say "again".
    fn resume(&self, entry: &FrozenEntry<'_>, token: Token) -> Result<(), Failure> {
        Err(Failure::Fatal)
    }

    /// Ends the building of the guest: from now on it can run.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    fn finalise(&self) -> Result<(), Failure> {
        Ok(())
    }

    /// Takes a page, leaf of `level` or table, back from a guest whose key was released. Any order, no block, no ticket.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    fn reclaim(&self, page: Pfn, level: Level) -> Result<(), Failure> {
        Err(Failure::Refused(0))
    }

    /// Told of a page, leaf of `level` or table, that the module did not give back: the host must never use it again.
    fn leaked(&self, page: Pfn, level: Level) {}

    /// What the module says of an entry: for checks at quiet moments.
    fn inspect(&self, place: EntryPlace) -> Inspected;
}

/// For hosts whose guests have no private half.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unprotected;

impl ProtectedTable for Unprotected {
    fn capabilities(&self) -> Capabilities {
        Capabilities::none()
    }

    fn install(&self, _: &FrozenEntry<'_>, _: Pfn, _: Content) -> Result<(), Failure> {
        Err(Failure::Fatal)
    }

    fn remove(&self, _: &FrozenEntry<'_>, _: &Drained) -> Result<(), Failure> {
        Err(Failure::Fatal)
    }

    fn inspect(&self, _: EntryPlace) -> Inspected {
        Inspected::Free
    }
}

/// A call on one entry that the MMU could not complete. The entry is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandOffError {
    /// Where.
    pub place: EntryPlace,
    /// What was to be done.
    pub step: HandOffStep,
    /// Why not.
    pub cause: HandOffCause,
}

impl fmt::Display for HandOffError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let EntryPlace { gfn, level, .. } = self.place;
        write!(
            f,
            "{} of frame {gfn} at level {}: {}",
            self.step.name(),
            level.number(),
            self.cause
        )
    }
}

impl core::error::Error for HandOffError {}

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// A call of the hook.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum HandOffStep { $($(#[$doc])* $name,)* }

        impl HandOffStep {
            /// Every step.
            pub const ALL: [HandOffStep; [$($text),*].len()] = [$(HandOffStep::$name),*];

            /// A short name, for messages and JSON.
            pub const fn name(self) -> &'static str {
                match self { $(HandOffStep::$name => $text,)* }
            }
        }
    };
}

steps! {
    /// [`ProtectedTable::link`].
    Link = "link",
    /// [`ProtectedTable::install`].
    Install = "install",
    /// [`ProtectedTable::block`].
    Block = "block",
    /// [`ProtectedTable::flush_begin`].
    Flush = "flush",
    /// [`ProtectedTable::unblock`].
    Unblock = "unblock",
    /// [`ProtectedTable::remove`].
    Remove = "remove",
    /// [`ProtectedTable::unlink`].
    Unlink = "unlink",
    /// [`ProtectedTable::split`].
    Split = "split",
    /// [`ProtectedTable::merge`].
    Merge = "merge",
    /// [`ProtectedTable::reclaim`].
    Reclaim = "reclaim",
}

/// Why a hand-off was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum HandOffCause {
    /// The module stayed busy for longer than a bounded wait.
    #[error("the module stayed busy")]
    Busy,
    /// The module refused.
    #[error("refused with code {0:#x}")]
    Refused(u64),
    /// The module or the VM is lost.
    #[error("the module gave the VM up")]
    Fatal,
    /// No page for a table or for the module.
    #[error("no page is left")]
    OutOfFrames,
    /// Another thread that carried the request panicked.
    #[error("the hook panicked")]
    Panicked,
}
