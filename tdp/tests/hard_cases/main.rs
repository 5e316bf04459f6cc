//! The hard cases known from Linux KVM's TDP MMU: bugs that it had, and places where it took care not to have one. Each that
//! can exist here has a named regression test, in this directory or where the last column says; of each that cannot, the table
//! says why. Tests outside this directory are named by their path below `tests`.
//!
//! | case | what must not be | test, or why it cannot be |
//! |---|---|---|
//! | 1 | an accessed, dirty or writable bit that the processor or another fault set between a sweep's read and its write is lost | `bits::case_01`; exhaustively `loom::sweeps::processor_against_unlink`, `loom::dirty::a_zap_keeps_the_dirty_bit` |
//! | 2 | a fault is stale for ever once many invalidations have ended, because their count was kept in a narrower number | `progress::case_02`, at 2^31, 2^32, 2^63 and where 64 bits come round |
//! | 3 | a helper that needs the exclusive lock runs under the shared one | excluded: there is no lock whose mode could be mistaken; what needs a tree for itself takes it by value or by `&mut`, as `Drop` does |
//! | 4 | the host takes a page back and misses a root that is being torn down | `roots::case_04`; `functional::overtaken::an_invalidation_ends_flushed_although_a_teardown_was_first` |
//! | 5 | a walk that goes on after a yield skips entries | `progress::case_05` |
//! | 6 | a sweep yields with a flush pending, and what it took away is reused | `flush::case_06_10`: tables stay with the pending flush, whatever yields |
//! | 7 | recovery of tables forgets its flush, or overwrites it with that of a step that had none | `flush::case_07` |
//! | 8 | recovery goes on with a stale list position after a yield | `huge::case_08`; there is no list, the position is a frame number |
//! | 9 | the flush owed for one root is overwritten by the result of the next | `flush::case_09` |
//! | 10 | a table is reused before the flush, because readers were let go first | `flush::case_10`, `flush::case_06_10`; `stress` with poisoned frames |
//! | 11 | a mapping is put into a root that died meanwhile; a root without a page is looked into | `roots::case_11`; the second half is excluded: every root has a page |
//! | 12 | another range is flushed than that of the table that went | `flush::case_12` |
//! | 13 | aging clears the dirty bit as well | `bits::case_13` |
//! | 14 | the guest writes to a frame that was protected for good, because its leaf had no writable bit to clear at that moment | `bits::case_14`; `functional::protect::a_frame_protected_twice_is_flushed` |
//! | 15 | clearing dirty marks changes entries that are not present | `bits::case_15` |
//! | 16 | how writes are noticed is chosen for the whole MMU although trees differ | `bits::case_16` |
//! | 17 | recovery asks the slot of another address space | `huge::case_17` |
//! | 18 | a table that stands for a fetch is found before its mark is | `huge::case_18`; `loom::sizes::recovery_against_fault` |
//! | 19 | after a cancelled migration nothing becomes large again, because every table counts as one of a fetch | `huge::case_19` |
//! | 20 | a large leaf spans private and shared memory, by a fault beside a conversion | `private::case_20`; `loom::conversion`, `private::stress::large_pages` |
//! | 21 | a read fault replaces a writable entry by a read-only one | `bits::case_21`; `loom::faults::read_against_write` |
//! | 22 | mapping ahead replaces an entry that is there, and its accessed bit is lost | `prefault::case_22` |
//! | 23 | mapping ahead, or a local retry, waits for a slot that waits for it | `prefault::case_23`, `private::case_23` |
//! | 24 | mapping ahead retries for ever on an obsolete root | `prefault::case_24` |
//! | 25 | a range with the shared bit in it maps the wrong alias | `private::case_25` |
//! | 26 | faults wait on a frozen entry while a whole subtree is worked off | `progress::case_26`: the shared half freezes nothing; `private::case_26` |
//! | 27 | a retry from an inner loop meets a check for progress in an outer one, and both wait for ever | `progress::case_27_28` |
//! | 28 | a sweep yields again before it got any further | `progress::case_27_28`; `functional::steps::parts_cover_a_range_once_in_each_pass` |
//! | 29 | a gibibyte is taken away in one step that nothing interrupts | `progress::case_29` |
//! | 30 | the mode of a lock is taken from a role that has been reset meanwhile | excluded as case 3; that a new root has the role of the old one: `roots::case_30` |
//! | 31 | who loses an exchange on a private entry goes on with the value of before | `private::case_31`; `loom::handoff::two_faults_on_one_frame`; a failed exchange returns what it found |
//! | 32 | a private page is freed although its removal failed | `private::case_32`; after the block `private::kinds::a_guest_that_is_given_up_during_a_removal_is_lost_too`; of a dead guest `private::life::a_page_that_a_dead_guest_keeps_is_leaked_and_reported` |
//! | 33 | a slot's data is read out of bounds for a table that reaches over the slot's end | `huge::case_33` |
//! | 34 | a write to a large leaf marks its first page only, and makes all of it writable | `huge::case_34` |
//! | 35 | two sweeps on one subtree count a leaf twice, or not at all | `progress::case_35`; `loom::sweeps::unlink_against_unlink` |
//! | 36 | a failed call of the module leaves a frozen entry, or a page or table that is counted | `private::case_36`; a panic: `private::failures::a_panic_in_an_install_puts_the_entry_back` |
//! | 37 | what is below roots that no vCPU is on is flushed all the same | `flush::case_37` |
//! | 38 | a root is found again while its last count goes, and freed under who found it | `roots::case_38`: a count is only ever made from a count; `loom::tlb::obsolete_root_against_fault` |

#[path = "../common/mod.rs"]
mod common;
#[path = "../private/rig.rs"]
#[allow(dead_code, reason = "each user takes a part of it")]
mod private_rig;

use tdp::{AddressSpaceId, FaultError, Level, Outcome};

const SPACE: AddressSpaceId = AddressSpaceId(0);
const OTHER: AddressSpaceId = AddressSpaceId(1);

fn fixed(level: Level) -> Result<Outcome, FaultError> {
    Ok(Outcome::Fixed { level })
}

/// Makes each function two tests, one for each format.
macro_rules! both_formats {
    ($($(#[$doc:meta])* fn $name:ident<F>() $body:block)+) => {
        $($(#[$doc])*
        mod $name {
            #[allow(unused_imports, reason = "not every test needs every name")]
            use super::*;

            fn check<F: crate::common::processor::Processor>() $body

            #[test]
            fn ept() {
                check::<tdp::Ept>();
            }

            #[test]
            fn npt() {
                check::<tdp::Npt>();
            }
        })+
    };
}

mod bits;
mod flush;
mod huge;
mod prefault;
mod private;
mod progress;
mod roots;
