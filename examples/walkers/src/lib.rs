//! The reference page walker of `tdp-arch` against a processor, on tables that `tdp` builds.
//!
//! Protocol. In each round the library builds tables by random operations ([`tables`]). They are kept three times: as they
//! are, for the processor; a copy for the reference walker; and a copy to go back to. Some entries are then spoilt, alike in
//! both. Each probe is one access of a guest, by its kernel or its user, and half of them lead through page tables of the
//! guest's that lie in memory like any other ([`guest`]): the reference walks its copy for each of them and for the access,
//! and says what is to happen and which word is reached. The processor makes the access with nothing cached, and what it
//! reports, which word it reached and every entry on the way, accessed and dirty bits included, has to be the same
//! ([`check`]).
#![no_std]

extern crate alloc;

pub mod check;
pub mod guest;
pub mod memory;
pub mod tables;

/// The next random number.
#[derive(Clone, Copy, Debug)]
pub struct Random(pub u64);

impl Random {
    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        (self.any() >> 16) % limit
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}

/// A number that depends on all bits of `value`.
pub fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}
