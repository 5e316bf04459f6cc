//! One vCPU on a processor of its own: enter, exit, fault, until it is told to stop.

use crate::guest::{Call, GuestProgram};
use crate::host::{BareHost, Notes, Way};
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use machine::svm::{self, ControlBlock, Exit, Features, TlbControl};
use machine::{println, processors::cycles};
use serde::Serialize;
use spin::Mutex;
use tdp::{Fault, Format, Gpa, Mmu, Npt, Outcome, TlbVcpu};

/// The MMU of this hypervisor.
pub type GuestMmu = Mmu<Npt, BareHost>;

/// What happened on one vCPU.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Tally {
    /// Visits of pages that the guest completed.
    pub visits: u64,
    /// Times that the guest was left.
    pub exits: u64,
    /// Nested page faults.
    pub faults: u64,
    /// Those whose access was the processor's own, on the guest's page tables.
    pub faults_on_guest_tables: u64,
    /// Faults that were told to retry.
    pub retries: u64,
    /// Faults that found the access possible already.
    pub spurious: u64,
    /// Exits for an interrupt.
    pub interrupts: u64,
    /// Flushes by the control block, by a new identifier, and pages flushed one by one.
    pub flushes_guest: u64,
    pub flushes_new_asid: u64,
    pub flushes_pages: u64,
    /// Words that the guest read and did not expect.
    pub wrong_words: u64,
    /// Processor cycles spent in the library's fault handler.
    pub fault_cycles: u64,
}

/// What the manager and all vCPUs of a guest have in common.
pub struct Shared {
    pub mmu: GuestMmu,
    /// Nested faults of all vCPUs so far that installed or repaired an entry.
    pub resolved: AtomicU64,
    /// Words that the guest did not expect, on all vCPUs so far.
    pub wrong_words: AtomicU64,
    /// vCPUs that wait because of [`BareHost::pause`].
    pub parked: AtomicUsize,
    /// The guest is to end: each vCPU checks all that it has, and stops.
    pub stop: AtomicBool,
    /// vCPUs that have stopped, with what happened there.
    pub done: Mutex<alloc::vec::Vec<Tally>>,
}

/// Identifiers of translations on the processor that this runs on.
struct Asids {
    features: Features,
    now: u32,
}

impl Asids {
    fn flush_guest(&self) -> TlbControl {
        if self.features.flush_by_asid {
            TlbControl::Guest
        } else {
            TlbControl::All
        }
    }

    /// The next one, which is clean, or the first, when everything has to be flushed.
    fn next(&mut self) -> TlbControl {
        self.now += 1;
        if self.now < self.features.asids {
            return TlbControl::Nothing;
        }
        self.now = 1;
        TlbControl::All
    }
}

/// Runs vCPU `number` of a guest on this processor until the guest has ended.
pub fn run(shared: &Arc<Shared>, number: usize, presence: TlbVcpu, program: GuestProgram) {
    let features = svm::begin().expect("every processor has what the first one has");
    let mut asids = Asids { features, now: 0 };
    let tally = Runner {
        shared,
        number,
        presence,
        block: program.start(number),
        program,
        tally: Tally::default(),
        flush: asids.next(),
        asids,
    }
    .run();
    shared.done.lock().push(tally);
}

struct Runner<'a> {
    shared: &'a Arc<Shared>,
    number: usize,
    presence: TlbVcpu,
    block: ControlBlock,
    program: GuestProgram,
    tally: Tally,
    asids: Asids,
    /// What the control block is to flush at the next entry.
    flush: TlbControl,
}

impl Runner<'_> {
    fn run(mut self) -> Tally {
        let mmu = &self.shared.mmu;
        let host = mmu.host();
        let mut vcpu = mmu.vcpu().expect("a frame for the root");
        let mut generation = None;
        loop {
            if host.pause.load(Ordering::Acquire) {
                self.park();
            }
            let root = vcpu.load_root().expect("a frame for the root");
            let must_flush = self.presence.enter();
            if vcpu.is_root_obsolete() {
                // The notes are still there, and what they ask for is done under the next root.
                self.presence.exit();
                self.flush = self.asids.flush_guest();
                continue;
            }
            if generation.replace(root.generation) != Some(root.generation) {
                self.flush = self.asids.flush_guest();
            } else if must_flush {
                self.carry_out(host.take_notes(self.number));
            }
            self.block.set_nested_root(root.pointer);
            self.block.set_asid(self.asids.now, self.flush);
            self.flush = TlbControl::Nothing;
            let exit = self.block.run();
            self.presence.exit();
            self.tally.exits += 1;
            match exit {
                Exit::Interrupt => self.tally.interrupts += 1,
                Exit::NestedFault { code, gpa } => {
                    let decoded = Npt::fault_code(code);
                    let start = cycles();
                    let outcome = vcpu.fault(Fault::from_code(decoded, Gpa(gpa)));
                    self.tally.fault_cycles += cycles() - start;
                    self.tally.faults += 1;
                    self.tally.faults_on_guest_tables += u64::from(decoded.guest_table_walk);
                    match outcome {
                        Ok(Outcome::Fixed { .. }) => {
                            self.shared.resolved.fetch_add(1, Ordering::Relaxed);
                        }
                        Ok(Outcome::Spurious) => self.tally.spurious += 1,
                        Ok(Outcome::Retry(_)) => self.tally.retries += 1,
                        other => panic!("fault {code:#x} at {gpa:#x}: {other:?}"),
                    }
                }
                Exit::Call => {
                    if self.answer() {
                        return self.tally;
                    }
                }
                Exit::Other(code) => panic!("exit {code:#x} at {:#x}", self.block.rip()),
            }
        }
    }

    /// Does what the notes ask for, as the host wants it done.
    fn carry_out(&mut self, notes: Notes) {
        match (notes, self.shared.mmu.host().way()) {
            (Notes::Nothing, _) => {}
            (Notes::Pages(pages), Way::Pages) => {
                for page in pages {
                    svm::invalidate_page(page.address().0, self.asids.now);
                    self.tally.flushes_pages += 1;
                }
            }
            (_, Way::NewAsid) => {
                self.flush = self.asids.next();
                self.tally.flushes_new_asid += 1;
            }
            _ => {
                self.flush = self.asids.flush_guest();
                self.tally.flushes_guest += 1;
            }
        }
    }

    /// The guest has called. Returns whether it has ended.
    fn answer(&mut self) -> bool {
        self.block.return_from_call();
        match self.program.call(&self.block) {
            Call::Wrong {
                address,
                expected,
                found,
            } => {
                self.tally.wrong_words += 1;
                self.shared.wrong_words.fetch_add(1, Ordering::Relaxed);
                if self.tally.wrong_words <= 3 {
                    println!(
                        "vCPU {}: {found:#x} at {address:#x} in place of {expected:#x}",
                        self.number
                    );
                }
                false
            }
            Call::Done { visits, was_final } => {
                self.tally.visits += visits;
                let last = self.shared.stop.load(Ordering::Acquire);
                if !was_final || !last {
                    self.program.next(&mut self.block, last);
                }
                was_final && last
            }
        }
    }

    /// Waits outside the guest for as long as the host wants it.
    fn park(&self) {
        self.shared.parked.fetch_add(1, Ordering::AcqRel);
        while self.shared.mmu.host().pause.load(Ordering::Acquire) {
            core::hint::spin_loop();
        }
        self.shared.parked.fetch_sub(1, Ordering::AcqRel);
    }
}
