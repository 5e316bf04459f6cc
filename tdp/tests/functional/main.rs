//! What each operation does, one by one, on one thread unless it takes two.
//!
//! Every mapping is also checked through the reference walker of the format's processor, and every MMU gives all its
//! frames back.

#[path = "../common/mod.rs"]
mod common;

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

mod abuse;
mod accessed;
mod age;
mod collapse;
mod dirty;
mod dump;
mod errors;
mod frames;
mod handles;
mod hostile;
mod invalidation;
mod levels;
mod mmio;
mod nx;
mod overtaken;
mod permissions;
mod protect;
mod roots;
mod slots;
mod split;
mod steps;
mod tlb;
mod zap;
