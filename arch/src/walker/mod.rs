//! What the processor does with second-level tables: one walk, written from the manuals.
//!
//! A walk begins at the root (or at a table that a paging-structure cache remembered) and reads one entry per
//! level. Each value that was read goes through these steps, and no other value is ever acted upon:
//!
//! 1. *decode* ([`EptWalker`], [`NptWalker`]): not present, malformed, a table, or a page;
//! 2. not present or malformed ends the walk with the format's fault; nothing is written;
//! 3. a table: its accessed flag is set, then the walk goes on in it with the permissions so far AND its own;
//! 4. a page: only now are the permissions of all levels judged (SDM 29.3.3.3: a malformed or missing entry further
//!    down wins over a permission that an upper entry denies); if they allow the access, the accessed flag, and for
//!    a write the dirty flag, are set together.
//!
//! Flags are set by compare-exchange against the very value that was decoded. If another agent changed the entry in
//! between, the new value starts again at step 1, as the processor's locked update does. A loser knows that somebody
//! else moved, so this cannot go on for ever unless the entry is changed for ever; after [`MAX_LOST_RACES`] the walk
//! gives up with [`Abort::Contended`].
//!
//! Setting the accessed flag of upper entries before the leaf is known is a choice that the manuals allow (they say
//! when a flag *must* be set) and that paging-structure caches require: an upper entry may be cached even if nothing
//! below it translates, but only with its accessed flag set (SDM 4.10.3.1).
//!
//! This module shares no constant with the encoders of this crate, so that one can be tested against the other.

use crate::addr::{Gpa, Hpa, MAX_PHYSICAL_BITS};
use crate::level::Level;
use core::fmt;

mod ept;
mod npt;

pub use ept::{EptConfig, EptFault, EptViolation, EptWalker};
pub use npt::{NptConfig, NptFault, NptWalker};

/// Compare-exchanges that one walk may lose to other agents before it ends with [`Abort::Contended`].
pub const MAX_LOST_RACES: u32 = 1024;

/// Bits 51:12 of an address: where a table can lie (SDM 29.3.2, APM 5.3.3).
const TABLE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Host memory that holds the tables, 8 bytes at a time.
///
/// Whoever implements it owns the atomics: [`load`](Self::load) must be single-copy atomic and at least an *acquire*
/// load (the processor never sees a table older than the entry that led to it), and
/// [`compare_exchange`](Self::compare_exchange) at least *acquire-release*.
pub trait PhysicalMemory {
    /// Reads the entry at `hpa`, which is 8-byte aligned; `None` if there is no memory.
    fn load(&self, hpa: Hpa) -> Option<u64>;

    /// Replaces the entry at `hpa` by `new` if it equals `current`. Called only where [`load`](Self::load) answered.
    ///
    /// # Errors
    ///
    /// The value found there, if it was another (or, spuriously, the same).
    fn compare_exchange(&self, hpa: Hpa, current: u64, new: u64) -> Result<(), u64>;
}

impl<M: PhysicalMemory + ?Sized> PhysicalMemory for &M {
    #[inline]
    fn load(&self, hpa: Hpa) -> Option<u64> {
        (**self).load(hpa)
    }

    #[inline]
    fn compare_exchange(&self, hpa: Hpa, current: u64, new: u64) -> Result<(), u64> {
        (**self).compare_exchange(hpa, current, new)
    }
}

/// View of memory through which a walk leaves no trace: accessed and dirty flags are decided but not stored.
///
/// For checks that must not disturb what they look at.
#[derive(Clone, Copy, Debug)]
pub struct ReadOnly<M>(pub M);

impl<M: PhysicalMemory> PhysicalMemory for ReadOnly<M> {
    fn load(&self, hpa: Hpa) -> Option<u64> {
        self.0.load(hpa)
    }

    fn compare_exchange(&self, hpa: Hpa, current: u64, _new: u64) -> Result<(), u64> {
        match self.0.load(hpa) {
            Some(found) if found != current => Err(found),
            _ => Ok(()),
        }
    }
}

bitflags::bitflags! {
    /// What the entries of a walk allow, over all levels so far.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub struct Permissions: u8 {
        /// Data reads.
        const READ = 1 << 0;
        /// Data writes.
        const WRITE = 1 << 1;
        /// Instruction fetches from supervisor-mode linear addresses.
        const EXEC = 1 << 2;
        /// Instruction fetches from user-mode linear addresses; the same as `EXEC` unless the format tells them apart.
        const USER_EXEC = 1 << 3;
    }
}

/// One access of a guest to its physical memory, as the second level sees it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum GuestAccess {
    /// Data read of the final page.
    Read,
    /// Data write to the final page.
    Write,
    /// Instruction fetch from a supervisor-mode linear address.
    Fetch,
    /// Instruction fetch from a user-mode linear address.
    UserFetch,
    /// Read of a guest paging-structure entry in order to translate a linear address. Each format says when it counts
    /// as a write.
    TableRead,
    /// Update of the accessed or dirty flag of a guest paging-structure entry.
    TableWrite,
    /// Load of the guest's page-directory pointers by MOV to CR under PAE paging; has no linear address.
    PdpteLoad,
}

impl GuestAccess {
    /// Every kind.
    pub const ALL: [GuestAccess; 7] = [
        GuestAccess::Read,
        GuestAccess::Write,
        GuestAccess::Fetch,
        GuestAccess::UserFetch,
        GuestAccess::TableRead,
        GuestAccess::TableWrite,
        GuestAccess::PdpteLoad,
    ];

    /// Whether it is an instruction fetch.
    #[inline]
    pub const fn is_fetch(self) -> bool {
        matches!(self, GuestAccess::Fetch | GuestAccess::UserFetch)
    }

    /// Whether it goes to the guest's own paging structures instead of the page that they lead to.
    #[inline]
    pub const fn is_to_paging_structure(self) -> bool {
        matches!(
            self,
            GuestAccess::TableRead | GuestAccess::TableWrite | GuestAccess::PdpteLoad
        )
    }
}

/// Memory type that the leaf entry asks for, before it is combined with the guest's own.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum LeafMemoryType {
    /// EPT memory type, bits 5:3 of the leaf (SDM 29.3.7).
    Ept {
        /// 0 uncacheable, 1 write combining, 4 write through, 5 write protected, 6 write back.
        memory_type: u8,
        /// Whether the guest's PAT is ignored (bit 6).
        ignore_pat: bool,
    },
    /// Index, 0 to 7, into the host's PAT register (APM 7.8.4): PAT, PCD and PWT of the leaf.
    Npt {
        /// PAT * 4 + PCD * 2 + PWT.
        pat_index: u8,
    },
}

/// What a successful walk found.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Translation {
    /// Host physical address of the byte.
    pub hpa: Hpa,
    /// Level of the leaf: how much it maps.
    pub level: Level,
    /// AND of what the entries of all levels allow.
    pub permissions: Permissions,
    /// Memory type of the leaf.
    pub memory_type: LeafMemoryType,
    /// Whether the leaf has its accessed flag set after the walk; `false` if the format keeps none.
    pub accessed: bool,
    /// Whether the leaf has its dirty flag set after the walk; `false` if the format keeps none.
    pub dirty: bool,
}

/// Where a walk stands: the table that it reads next and what the entries above it allow.
///
/// This is what a paging-structure cache remembers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Cursor {
    /// The table. Bits other than 51:12 are ignored, as those of EPTP and CR3 are.
    pub table: Hpa,
    /// Level of its entries.
    pub level: Level,
    /// AND of what the entries on the way allow.
    pub permissions: Permissions,
}

/// Reason why a walk ended without a translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WalkError<F> {
    /// The processor's own fault.
    #[error("{0}")]
    Fault(F),
    /// Something that a processor never meets or that it has no report for.
    #[error("{0}")]
    Abort(#[from] Abort),
}

impl<F> WalkError<F> {
    /// The processor's fault, if it is one.
    pub fn fault(self) -> Option<F> {
        match self {
            WalkError::Fault(fault) => Some(fault),
            WalkError::Abort(_) => None,
        }
    }
}

/// End of a walk that is nobody's architecture: a hole in host memory, or an entry that never holds still.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Abort {
    /// A table pointer leads to where there is no memory. A stale or a wild pointer; hardware would read all ones or
    /// raise a machine check.
    #[error("no memory at {hpa} for the entry of {gpa} at {level}")]
    NoMemory {
        /// Address that was walked.
        gpa: Gpa,
        /// Where the entry should have been.
        hpa: Hpa,
        /// Level of the entry.
        level: Level,
    },
    /// [`MAX_LOST_RACES`] attempts to set a flag were lost to other writers.
    #[error("entry of {gpa} at {level} ({hpa}) changed under each of {MAX_LOST_RACES} updates")]
    Contended {
        /// Address that was walked.
        gpa: Gpa,
        /// The entry.
        hpa: Hpa,
        /// Level of the entry.
        level: Level,
    },
}

/// Refusal of a walker's configuration.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ConfigError {
    /// Physical addresses of that width do not exist.
    #[error("physical-address width of {0} bits is not between 32 and 52")]
    PhysicalBits(u32),
    /// Trees have four or five levels.
    #[error("a tree with a root of level {0} does not exist; it is 4 or 5")]
    RootLevel(Level),
}

/// A processor's walk of one format of table.
pub trait Walker {
    /// What the processor reports when a walk fails.
    type Fault: Copy + PartialEq + fmt::Debug + fmt::Display;

    /// Level of the root table.
    fn root_level(&self) -> Level;

    /// Permission that `access` must find at every level. Contains [`Permissions::WRITE`] exactly if the access
    /// counts as a write, and so sets the dirty flag.
    fn needs(&self, access: GuestAccess) -> Permissions;

    /// Whether accessed and dirty flags are kept at all.
    fn keeps_flags(&self) -> bool;

    /// Whether a cached walk that ended in `fault` has to be repeated from the root before the fault is delivered.
    fn repeats_before(&self, fault: &Self::Fault) -> bool;

    /// Walks on from `from` and calls `passed` for each table that it goes on into (after the accessed flag of the
    /// entry that points there is set).
    ///
    /// # Errors
    ///
    /// The fault that the processor reports, or an [`Abort`]. Entries that were passed keep their accessed flag.
    fn walk_on<M: PhysicalMemory + ?Sized>(
        &self,
        memory: &M,
        from: Cursor,
        gpa: Gpa,
        access: GuestAccess,
        passed: impl FnMut(Cursor),
    ) -> Result<Translation, WalkError<Self::Fault>>;

    /// Start of a walk from the root. Of `root` only the bits 51:12 count.
    #[inline]
    fn at_root(&self, root: Hpa) -> Cursor {
        Cursor {
            table: root,
            level: self.root_level(),
            permissions: Permissions::all(),
        }
    }

    /// Walks from the root.
    ///
    /// # Errors
    ///
    /// As [`walk_on`](Self::walk_on).
    ///
    /// # Examples
    ///
    /// ```
    /// use std::{cell::RefCell, collections::HashMap};
    /// use tdp_arch::walker::{EptConfig, EptWalker, GuestAccess, PhysicalMemory, Walker};
    /// use tdp_arch::{Gpa, Hpa, Level};
    ///
    /// struct Memory(RefCell<HashMap<u64, u64>>);
    ///
    /// impl PhysicalMemory for Memory {
    ///     fn load(&self, hpa: Hpa) -> Option<u64> {
    ///         Some(self.0.borrow().get(&hpa.0).copied().unwrap_or(0))
    ///     }
    ///     fn compare_exchange(&self, hpa: Hpa, current: u64, new: u64) -> Result<(), u64> {
    ///         match self.load(hpa) {
    ///             Some(found) if found != current => Err(found),
    ///             _ => {
    ///                 self.0.borrow_mut().insert(hpa.0, new);
    ///                 Ok(())
    ///             }
    ///         }
    ///     }
    /// }
    ///
    /// // A PML4E at 0x1000 and a 1 GiB page (bit 7) of type write-back, all readable and writable.
    /// let memory = Memory(RefCell::new(HashMap::from([(0x1000, 0x2003), (0x2000, 0x1_4000_00b3)])));
    /// let walker = EptWalker::new(EptConfig::default())?;
    ///
    /// let found = walker.walk(&memory, Hpa(0x1000), Gpa(0x1234), GuestAccess::Read)?;
    /// assert_eq!((found.hpa, found.level), (Hpa(0x1_4000_1234), Level::L3));
    /// assert!(found.accessed && !found.dirty);
    ///
    /// let fault = walker.walk(&memory, Hpa(0x1000), Gpa(0x1234), GuestAccess::Fetch).unwrap_err();
    /// assert_eq!(fault.to_string(), "EPT violation at 0x1234, exit qualification 0x19c");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[inline]
    fn walk<M: PhysicalMemory + ?Sized>(
        &self,
        memory: &M,
        root: Hpa,
        gpa: Gpa,
        access: GuestAccess,
    ) -> Result<Translation, WalkError<Self::Fault>> {
        self.walk_on(memory, self.at_root(root), gpa, access, |_| ())
    }
}

/// What a well-formed, present entry leads to.
enum Entry {
    Table {
        table: Hpa,
        level: Level,
        permissions: Permissions,
    },
    Page {
        base: Hpa,
        permissions: Permissions,
        memory_type: LeafMemoryType,
    },
}

/// Why the processor refuses an access.
enum Cause {
    /// The address has bits that no level of the tree looks at.
    OutOfReach,
    /// The entry with this value is not present.
    NotPresent { entry: u64 },
    /// An entry has a value that the format does not allow.
    Malformed,
    /// The leaf with this value and the entries above it allow only `permissions`.
    Denied {
        entry: u64,
        permissions: Permissions,
    },
}

/// The manual of one format, as far as walks of different formats differ.
trait Rules: Walker {
    /// Accessed flag of every entry.
    const ACCESSED: u64;
    /// Dirty flag of a leaf.
    const DIRTY: u64;

    /// Judges the value of an entry of a table of `level`: refuses it as not present or malformed.
    fn decode(&self, level: Level, entry: u64) -> Result<Entry, Cause>;

    /// Puts a refusal into the processor's words.
    fn fault(&self, cause: Cause, gpa: Gpa, access: GuestAccess) -> Self::Fault;
}

/// The walk; the head of this module states its steps.
#[inline]
fn walk_on<R: Rules, M: PhysicalMemory + ?Sized>(
    rules: &R,
    memory: &M,
    from: Cursor,
    gpa: Gpa,
    access: GuestAccess,
    mut passed: impl FnMut(Cursor),
) -> Result<Translation, WalkError<R::Fault>> {
    let fault = |cause| WalkError::Fault(rules.fault(cause, gpa, access));
    if gpa.gfn() >= rules.root_level().gfn_limit() || gpa.0 >> MAX_PHYSICAL_BITS != 0 {
        return Err(fault(Cause::OutOfReach));
    }
    let need = rules.needs(access);
    let mut at = from;
    let mut lost = 0;
    loop {
        let level = at.level;
        let hpa = Hpa((at.table.0 & TABLE_ADDRESS) + 8 * level.index(gpa.gfn()) as u64);
        let mut value = memory
            .load(hpa)
            .ok_or(Abort::NoMemory { gpa, hpa, level })?;
        at = loop {
            let entry = rules.decode(level, value).map_err(fault)?;
            let mut flags = R::ACCESSED;
            if let Entry::Page { permissions, .. } = entry {
                let permissions = at.permissions & permissions;
                if !permissions.contains(need) {
                    return Err(fault(Cause::Denied {
                        entry: value,
                        permissions,
                    }));
                }
                if need.contains(Permissions::WRITE) {
                    flags |= R::DIRTY;
                }
            }
            if rules.keeps_flags() && value & flags != flags {
                if let Err(found) = memory.compare_exchange(hpa, value, value | flags) {
                    lost += 1;
                    if lost == MAX_LOST_RACES {
                        return Err(Abort::Contended { gpa, hpa, level }.into());
                    }
                    value = found;
                    continue;
                }
                value |= flags;
            }
            match entry {
                Entry::Table {
                    table,
                    level,
                    permissions,
                } => {
                    break Cursor {
                        table,
                        level,
                        permissions: at.permissions & permissions,
                    };
                }
                Entry::Page {
                    base,
                    permissions,
                    memory_type,
                } => {
                    return Ok(Translation {
                        hpa: Hpa(base.0 | gpa.0 & (level.bytes() - 1)),
                        level,
                        permissions: at.permissions & permissions,
                        memory_type,
                        accessed: rules.keeps_flags() && value & R::ACCESSED != 0,
                        dirty: rules.keeps_flags() && value & R::DIRTY != 0,
                    });
                }
            }
        };
        passed(at);
    }
}

/// Bits of an entry that hold addresses beyond `physical_bits`: 51:N.
const fn beyond_width(physical_bits: u32) -> u64 {
    (1 << MAX_PHYSICAL_BITS) - (1 << physical_bits)
}

/// Checks what the configurations of both formats share.
const fn check(root_level: Level, physical_bits: u32) -> Result<(), ConfigError> {
    if physical_bits < 32 || physical_bits > MAX_PHYSICAL_BITS {
        return Err(ConfigError::PhysicalBits(physical_bits));
    }
    match root_level {
        Level::L4 | Level::L5 => Ok(()),
        other => Err(ConfigError::RootLevel(other)),
    }
}
