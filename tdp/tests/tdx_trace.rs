//! The model against the module itself: every call that was recorded from the real handlers is made again, and must be
//! answered with the same status, operand and registers.
//!
//! A line is `label -> STATUS op=.. out.rcx=.. rdx=..`. The label says which call with which operands; what it leaves out
//! (addresses) follows from the registers that were recorded. Registers were shown after each call whether or not it
//! wrote them, so the test keeps them from call to call too.
#![cfg(not(loom))]

mod tdx_support;

use tdp::protected::tdx::{Accept, Answer, Enter, Exit, OpState, TdVcpu};
use tdp::{Hpa, Level};
use tdx_support::{HUGE, LARGE, PAGE, Rig, TOP, accepted, at, control, done, page};

const TRACE: &str = include_str!("data/tdx-module.txt");
/// Calls in the trace: the test must not lose any on the way.
const CALLS: usize = 67;

/// Guest addresses of the trace: the first 2 MiB hold 4 KiB pages, the next a large one.
const ADDED: u64 = 0;
const AUGMENTED: u64 = 0x1000;
const OTHER: u64 = 0x2000;
const LARGE_GPA: u64 = 0x20_0000;

/// Host pages of the trace.
const ADDED_PAGE: Hpa = Hpa(0x101_0000);
const AUGMENTED_PAGE: Hpa = Hpa(0x101_1000);
const UNUSED_PAGE: Hpa = Hpa(0x101_2000);
const SPLIT_TABLE: Hpa = Hpa(0x102_0000);
const LARGE_PAGE: Hpa = Hpa(0x200_0000);

/// What was recorded of one call.
#[derive(Debug, PartialEq)]
enum Recorded {
    Answer {
        status: String,
        operand: u32,
        rcx: u64,
        rdx: u64,
    },
    TdExit,
}

fn parse(line: &str) -> Option<(&str, Recorded)> {
    let (label, rest) = line.split_once("->")?;
    let label = label.trim();
    let mut words = rest.split_whitespace();
    let status = words.next()?.to_owned();
    if status == "[TD-EXIT]" {
        return Some((label, Recorded::TdExit));
    }
    let mut value = |name: &str| words.next()?.strip_prefix(name);
    let operand = value("op=")?.parse().ok()?;
    let rcx = u64::from_str_radix(value("out.rcx=")?, 16).ok()?;
    let rdx = u64::from_str_radix(value("rdx=")?, 16).ok()?;
    Some((
        label,
        Recorded::Answer {
            status,
            operand,
            rcx,
            rdx,
        },
    ))
}

struct Replay {
    rig: Rig,
    vcpus: [TdVcpu; 2],
    registers: (u64, u64),
    /// Times that the 2 MiB table entry was blocked.
    blocks: usize,
}

impl Replay {
    fn new() -> Self {
        let rig = Rig::building();
        let vcpus = [3, 4].map(|n| rig.td.vp_create(control(n)).unwrap());
        Self {
            rig,
            vcpus,
            registers: (0, 0),
            blocks: 0,
        }
    }

    fn event(&mut self, line: &str) {
        match line.trim() {
            "" | "== build phase" | "== removal" | "== huge" => {}
            "-- op_state=2" => {
                done(self.rig.td.mr_finalize());
                assert_eq!(self.rig.td.op_state(), OpState::Runnable);
            }
            "(vcpu0 enters, epoch 2)" => self.enter(0, 2),
            "(vcpu1 enters, epoch 3)" => self.enter(1, 3),
            "(vcpu0 exits)" => self.vcpus[0].exit(Exit::Other { rip: 0 }),
            "(vcpu1 exits)" => self.vcpus[1].exit(Exit::Other { rip: 0 }),
            other => panic!("event {other:?} is not known"),
        }
    }

    fn enter(&mut self, vcpu: usize, epoch: u64) {
        match self.vcpus[vcpu].enter(0) {
            Enter::Inside(entered) => assert_eq!(entered.epoch, epoch),
            refused => panic!("{refused:?}"),
        }
    }

    fn call(&mut self, label: &str) -> Accept {
        let td = self.rig.td.clone();
        let add = |level, table| td.mem_sept_add(at(ADDED, level), table);
        let aug = |gpa, level, page| td.mem_page_aug(at(gpa, level), page);
        Accept::Answered(match label {
            "AUG 4K before any parent" => aug(AUGMENTED, PAGE, AUGMENTED_PAGE),
            "SEPT_ADD level1 (PD entry) before level3/2" => add(LARGE, page(3)),
            "SEPT_ADD level3" => add(TOP, page(3)),
            "SEPT_ADD level3 again" => add(TOP, page(4)),
            "SEPT_ADD level2 with page in use" => add(HUGE, page(3)),
            "SEPT_ADD level2" => add(HUGE, page(4)),
            "SEPT_ADD level1 misaligned gpa" => td.mem_sept_add(at(0x1000, LARGE), page(5)),
            "SEPT_ADD level1" => add(LARGE, page(5)),
            "SEPT_ADD level0 (illegal)" => add(PAGE, page(6)),
            "PAGE_ADD" | "PAGE_ADD again" | "PAGE_ADD after finalize" => {
                td.mem_page_add(at(ADDED, PAGE), ADDED_PAGE, Hpa(0))
            }
            "PAGE_ADD same gpa" => td.mem_page_add(at(ADDED, PAGE), UNUSED_PAGE, Hpa(0)),
            "PAGE_ADD level 1 (2M)" => td.mem_page_add(at(LARGE_GPA, LARGE), LARGE_PAGE, Hpa(0)),
            "PAGE_REMOVE of ADDed page, TD not finalized, unblocked" => {
                td.mem_page_remove(at(ADDED, PAGE))
            }
            "TRACK in INITIALIZED"
            | "TRACK #1"
            | "TRACK #2 with old vcpu in"
            | "TRACK #2 after exit"
            | "TRACK" => td.mem_track(),
            "AUG ok" => aug(AUGMENTED, PAGE, AUGMENTED_PAGE),
            "AUG same gpa again" => aug(AUGMENTED, PAGE, UNUSED_PAGE),
            "AUG other gpa same hpa" => aug(OTHER, PAGE, AUGMENTED_PAGE),
            "AUG 2M over non-leaf" => aug(ADDED, LARGE, LARGE_PAGE),
            "AUG 2M hpa misaligned" => aug(LARGE_GPA, LARGE, Hpa(LARGE_PAGE.0 + 0x1000)),
            "AUG 2M whose HPA range is partly used" => aug(LARGE_GPA, LARGE, page(0)),
            "AUG 2M" => aug(LARGE_GPA, LARGE, LARGE_PAGE),
            "AUG 1G (illegal level)" => aug(0x4000_0000, HUGE, Hpa(0)),
            "AUG 4K under 2M leaf" => aug(LARGE_GPA + 0x1000, PAGE, UNUSED_PAGE),
            "ACCEPT 4K pending" | "ACCEPT 4K again" | "ACCEPT a blocked" => {
                return td.page_accept(at(AUGMENTED, PAGE));
            }
            "ACCEPT 4K inside 2M pending leaf" | "ACCEPT one 4K" => {
                return td.page_accept(at(LARGE_GPA, PAGE));
            }
            "ACCEPT 2M of a non-leaf" => return td.page_accept(at(ADDED, LARGE)),
            "ACCEPT unmapped" => return td.page_accept(at(OTHER, PAGE)),
            "PAGE_REMOVE not blocked"
            | "PAGE_REMOVE blocked, no track"
            | "PAGE_REMOVE tracked, old-epoch vcpu still in"
            | "PAGE_REMOVE"
            | "PAGE_REMOVE again (FREE)" => td.mem_page_remove(at(AUGMENTED, PAGE)),
            "UNBLOCK not blocked" | "UNBLOCK blocked, no track" => {
                td.mem_range_unblock(at(AUGMENTED, PAGE))
            }
            "BLOCK" | "BLOCK again" | "BLOCK a FREE entry" => {
                td.mem_range_block(at(AUGMENTED, PAGE))
            }
            "BLOCK 2M (pending)" => td.mem_range_block(at(LARGE_GPA, LARGE)),
            "BLOCK 2M non-leaf" => {
                self.blocks += 1;
                if self.blocks == 2 {
                    self.accept_the_rest();
                }
                td.mem_range_block(at(LARGE_GPA, LARGE))
            }
            "UNBLOCK 2M non-leaf" => td.mem_range_unblock(at(LARGE_GPA, LARGE)),
            "DEMOTE not blocked" | "DEMOTE blocked, no track" | "DEMOTE" => {
                td.mem_page_demote(at(LARGE_GPA, LARGE), SPLIT_TABLE)
            }
            "DEMOTE with host irq pending" => {
                td.pend_interrupts(1);
                td.mem_page_demote(at(LARGE_GPA, LARGE), SPLIT_TABLE)
            }
            "SEPT_RD 4K after demote" => td.mem_sept_rd(at(LARGE_GPA, PAGE)),
            "SEPT_RD 2M after demote" | "SEPT_RD 2M" => td.mem_sept_rd(at(LARGE_GPA, LARGE)),
            "AUG 4K on demoted" => aug(LARGE_GPA, PAGE, UNUSED_PAGE),
            "AUG 4K below a blocked non-leaf" => aug(LARGE_GPA, PAGE, UNUSED_PAGE),
            "BLOCK 4K below a blocked non-leaf" => td.mem_range_block(at(LARGE_GPA, PAGE)),
            "PROMOTE not blocked" | "PROMOTE mixed mapped/pending" | "PROMOTE ok" => {
                td.mem_page_promote(at(LARGE_GPA, LARGE))
            }
            "SEPT_REMOVE non-empty table" | "SEPT_REMOVE of a leaf" => {
                td.mem_sept_remove(at(LARGE_GPA, LARGE))
            }
            other => panic!("call {other:?} is not known"),
        })
    }

    /// The guest accepted the rest of the pages before the second block; the recording does not show it, but the
    /// promotion that follows proves it.
    fn accept_the_rest(&self) {
        for n in 1..512 {
            done(accepted(
                self.rig.td.page_accept(at(LARGE_GPA + n * 0x1000, PAGE)),
            ));
        }
    }

    /// The answer as the recording shows it: with registers that were not written left as they were.
    fn shown(&mut self, accept: Accept) -> Recorded {
        match accept {
            Accept::Exit(_) => Recorded::TdExit,
            Accept::Answered(Answer {
                status,
                operand,
                rcx,
                rdx,
            }) => {
                self.registers.0 = rcx.unwrap_or(self.registers.0);
                self.registers.1 = rdx.unwrap_or(self.registers.1);
                Recorded::Answer {
                    status: status.name().to_owned(),
                    operand: operand.0,
                    rcx: self.registers.0,
                    rdx: self.registers.1,
                }
            }
        }
    }
}

#[test]
fn every_recorded_call_is_answered_as_recorded() {
    let mut replay = Replay::new();
    let mut calls = 0;
    let mut differing = Vec::new();
    for (number, line) in TRACE.lines().enumerate() {
        if line.starts_with('#') {
            continue;
        }
        let Some((label, recorded)) = parse(line) else {
            assert!(!line.contains("->"), "line {} is malformed", number + 1);
            replay.event(line);
            continue;
        };
        calls += 1;
        let accept = replay.call(label);
        let shown = replay.shown(accept);
        if shown != recorded {
            differing.push(format!(
                "line {}: {label}\n  recorded {recorded:?}\n  answered {shown:?}",
                number + 1
            ));
        }
    }
    println!(
        "{} of {calls} recorded calls answered as recorded",
        calls - differing.len()
    );
    assert!(differing.is_empty(), "{}", differing.join("\n"));
    assert_eq!(calls, CALLS);
}

#[test]
fn what_the_recording_left_is_in_the_table() {
    let mut replay = Replay::new();
    for line in TRACE.lines().filter(|line| !line.starts_with('#')) {
        match parse(line) {
            Some((label, _)) => drop(replay.call(label)),
            None => replay.event(line),
        }
    }
    let td = &replay.rig.td;
    let mut leaves = Vec::new();
    td.visit_entries(|entry| {
        if entry.state.is_leaf() {
            leaves.push((entry.gpa.0, entry.level, entry.page));
        }
    });
    assert_eq!(
        leaves,
        [
            (ADDED, PAGE, Some(ADDED_PAGE)),
            (LARGE_GPA, Level::L2, Some(LARGE_PAGE)),
        ]
    );
    // Control structure, root table, two vCPUs; three tables; 1 + 512 pages.
    assert_eq!(td.child_count(), 4 + 3 + 513);
}
