//! The other processors: started once, then each runs what it is given, one thing after another.
//!
//! Protocol. A processor that came up publishes its interrupt controller's number, then spins on its own place. Whoever
//! gives it work puts it there; the processor takes it out and runs it. The end of it is the work's own business.
#![allow(unsafe_code)]
// UNSAFETY: the trampoline is copied to where a starting processor looks for it.

use crate::boot::MAX_PROCESSORS;
use crate::local_apic;
use alloc::boxed::Box;
use core::hint::spin_loop;
use core::sync::atomic::{AtomicU32, Ordering};
use spin::Mutex;

/// What a processor is given to do.
pub type Work = Box<dyn FnOnce() + Send>;

struct Processor {
    /// Controller number plus one; 0 until it is up.
    up: AtomicU32,
    work: Mutex<Option<Work>>,
}

static PROCESSORS: [Processor; MAX_PROCESSORS] = [const {
    Processor {
        up: AtomicU32::new(0),
        work: Mutex::new(None),
    }
}; MAX_PROCESSORS];

/// Page of memory at which the others start.
const TRAMPOLINE_PAGE: u8 = 8;
/// How long the first processor waits for another, in cycles of its counter.
const PATIENCE: u64 = 20_000_000_000;

/// Cycles since some moment.
pub fn cycles() -> u64 {
    // SAFETY: reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Waits.
pub fn spin_for(duration: u64) {
    let start = cycles();
    while cycles().wrapping_sub(start) < duration {
        spin_loop();
    }
}

/// Starts the other processors and waits until `count` of them are up. Their numbers are 1 to `count`. Called once.
///
/// # Panics
///
/// If they do not come up, or the boot code has no room for so many.
pub fn start(count: usize) {
    unsafe extern "C" {
        static ap_trampoline: u8;
        static ap_trampoline_end: u8;
    }
    assert!(
        count < MAX_PROCESSORS,
        "at most {} other processors",
        MAX_PROCESSORS - 1
    );
    local_apic::begin();
    let start = &raw const ap_trampoline;
    let bytes = &raw const ap_trampoline_end as usize - start as usize;
    let page = usize::from(TRAMPOLINE_PAGE) << 12;
    // SAFETY: low memory that nobody uses, and the trampoline of the boot code.
    unsafe { core::ptr::copy_nonoverlapping(start, page as *mut u8, bytes) };
    local_apic::start_others(TRAMPOLINE_PAGE);
    let begun = cycles();
    for (number, processor) in PROCESSORS.iter().enumerate().skip(1).take(count) {
        while processor.up.load(Ordering::Acquire) == 0 {
            assert!(
                cycles().wrapping_sub(begun) < PATIENCE,
                "processor {number} does not start"
            );
            spin_loop();
        }
    }
}

/// Number of a processor's interrupt controller.
///
/// # Panics
///
/// If the processor was not started.
pub fn apic_id(number: usize) -> u8 {
    let up = PROCESSORS[number].up.load(Ordering::Acquire);
    assert!(up != 0, "processor {number} is not up");
    (up - 1) as u8
}

/// Gives processor `number` something to do, once it has taken what it was given before.
///
/// # Panics
///
/// If there is no such processor.
pub fn run_on(number: usize, work: Work) {
    let place = &PROCESSORS[number].work;
    let mut work = Some(work);
    while work.is_some() {
        let mut place = place.lock();
        if place.is_none() {
            *place = work.take();
        }
    }
}

pub(crate) fn wait_for_work(number: usize) -> ! {
    let processor = &PROCESSORS[number];
    processor
        .up
        .store(u32::from(local_apic::begin()) + 1, Ordering::Release);
    loop {
        let work = processor.work.lock().take();
        match work {
            Some(work) => work(),
            None => spin_loop(),
        }
    }
}
