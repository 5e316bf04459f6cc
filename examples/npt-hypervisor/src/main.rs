//! A bare-metal hypervisor that embeds the library: AMD SVM, nested page tables, a vCPU on each of several processors.
//!
//! The first processor plays the host: it takes guest memory away, moves pages to other frames and copies what the guest
//! writes (`manager.rs`). The others run one vCPU each (`vcpu.rs`): the guest checks every word of its memory that it reads
//! (`guest.s`), and each of its nested faults is resolved by one shared MMU, in parallel and beside the host's sweeps. Two
//! guests run one after the other, one whose writes are logged by write protection and one by the processor's dirty bits.
//!
//! What the processor walks is the emulator's own reading of the manual; an emulator's TLB keeps a translation until it is
//! told otherwise, which is why leaving out the interrupts (`kick=false` on the command line) shows at once.
//!
//! The verdict is the exit status, the figures are one line of JSON on the serial port.
#![no_std]
#![no_main]

extern crate alloc;

mod guest;
mod host;
mod manager;
mod memory;
mod vcpu;

use alloc::vec::Vec;
use core::str::FromStr;
use machine::{BootInfo, exit, println, processors, svm};
use manager::{Plan, Report};
use serde::Serialize;
use tdp::DirtyTracking;

/// Everything was as it should be.
const GOOD: u32 = 0x10;
/// A translation was used that should have been gone.
const STALE: u32 = 0x11;
/// Something else was not as it should be.
const BAD: u32 = 3;

/// The figures.
#[derive(Debug, Serialize)]
struct Figures {
    vcpus: usize,
    kick: bool,
    faults: u64,
    retries: u64,
    spurious: u64,
    /// Faults that were neither: each has installed or repaired an entry. What is demanded is demanded of these.
    resolved: u64,
    wrong_words: u64,
    late_writes: u64,
    unlogged_pages: u64,
    guests: Vec<Report>,
}

/// The value of `name` on the command line.
fn setting<T: FromStr>(line: &str, name: &str, default: T) -> T {
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
        .unwrap_or(default)
}

#[unsafe(no_mangle)]
#[allow(
    unsafe_code,
    reason = "UNSAFETY: the machine's boot code calls it by name"
)]
fn kernel_main(info: &BootInfo) -> ! {
    let line = info.command_line;
    let vcpus = setting(line, "vcpus", 2usize);
    let faults = setting(line, "faults", 120_000u64);
    let plan = Plan {
        vcpus,
        faults: faults.div_ceil(2),
        kick: setting(line, "kick", true),
        seed: setting(line, "seed", 1),
    };
    let Some(features) = svm::begin() else {
        println!("this processor has no SVM, or no nested paging");
        exit(BAD);
    };
    processors::start(vcpus);
    println!("{vcpus} vCPUs, one a processor; {features:?}; {plan:?}");
    let mut guests: Vec<Report> = Vec::new();
    for tracking in [DirtyTracking::WriteProtect, DirtyTracking::DirtyBit] {
        let shown = !plan.kick && guests.iter().any(Report::is_stale);
        if !shown {
            guests.push(manager::run_guest(plan, tracking));
        }
    }
    let sum = |of: fn(&Report) -> u64| guests.iter().map(of).sum();
    let figures = Figures {
        vcpus,
        kick: plan.kick,
        faults: sum(|guest| guest.faults),
        retries: sum(|guest| guest.retries),
        spurious: sum(|guest| guest.spurious),
        resolved: sum(|guest| guest.resolved),
        wrong_words: sum(|guest| guest.wrong_words),
        late_writes: sum(|guest| guest.late_writes),
        unlogged_pages: sum(|guest| guest.unlogged_pages),
        guests,
    };
    println!(
        "{} faults, {} of them retries, {} spurious: {} entries installed or repaired, {faults} demanded",
        figures.faults, figures.retries, figures.spurious, figures.resolved
    );
    match serde_json::to_string(&figures) {
        Ok(json) => println!("{json}"),
        Err(error) => println!("the figures cannot be written: {error}"),
    }
    if figures.guests.iter().any(Report::is_stale) {
        exit(STALE);
    }
    let whole =
        |guest: &Report| guest.misplaced + guest.leaked_tables == 0 && guest.comparisons > 0;
    let good = figures.resolved >= faults && figures.guests.iter().all(whole);
    exit(if good { GOOD } else { BAD })
}
