//! x
#[path = "../common/mod.rs"]
mod common;

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
mod roots;
