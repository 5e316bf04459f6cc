//! What the scenarios about confidential guests share: a guest on a trusted module, conditions under which the module works,
//! and what is checked of both.

pub mod args;
pub mod backend;
pub mod conditions;
pub mod faulting;
pub mod guest;
pub mod layout;
pub mod running;
