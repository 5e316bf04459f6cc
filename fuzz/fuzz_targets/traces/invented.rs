//! Traces that no kernel wrote: any events in any order, with numbers that mean something, are told and replayed.
//!
//! The events are written as the lines of a file and read back, so that the whole way of a replay is taken. A replay ends
//! with findings or says why it cannot go on; it gives back every frame.

use crate::replay::scenario::Scenario;
use crate::replay::source::Lines;
use crate::replay::{processor::Processor, replay_lines};
use arbitrary::Arbitrary;
use std::fmt::Write;
use std::io::Cursor;
use std::path::Path;
use tdp::{Ept, Npt};

const MOST_EVENTS: usize = 24;
const MOST_OPS: usize = 4;

/// A trace and its scenario.
#[derive(Debug, Arbitrary)]
pub(crate) struct Input {
    ept: bool,
    params: u8,
    ops: Vec<Op>,
    events: Vec<(u8, Event)>,
}

/// A guest frame: few enough to meet.
#[derive(Clone, Copy, Debug, Arbitrary)]
struct Frame(u8);

impl Frame {
    fn gfn(self) -> u64 {
        match self.0 {
            0..0x80 => u64::from(self.0 % 8),
            0x80..0xc0 => 0x200 * u64::from(self.0 % 4),
            0xc0..0xe0 => 0x200 + u64::from(self.0 % 8),
            0xe0..0xf0 => 0x4_0000 * u64::from(self.0 % 4),
            0xf0..0xf8 => (1 << 27) - u64::from(self.0 % 2),
            _ => (1 << 40) - 1,
        }
    }
}

#[derive(Debug, Arbitrary)]
enum Op {
    Region {
        space: bool,
        slot: u8,
        at: Frame,
        pages: u8,
        flags: u8,
    },
    PreFault(u8),
    GetLog(u8, Frame, u8),
    ClearLog(u8, Frame, u8),
    Ring(Frame),
    Cap(u8, u8),
    NxPages(bool),
    Other,
}

#[derive(Debug, Arbitrary)]
enum Event {
    Begin(u8),
    End(u8),
    Fault {
        vcpu: u8,
        at: Frame,
        code: u8,
    },
    Requested {
        at: Frame,
        level: u8,
        pfn: u8,
    },
    Changed {
        space: bool,
        at: Frame,
        level: u8,
        old: Word,
        new: Word,
        n: u8,
        step: u8,
    },
    SetSpte {
        at: Frame,
        level: u8,
        spte: Word,
    },
    Mmio(Frame),
    Fast {
        at: Frame,
        level: u8,
        old: Word,
        new: Word,
        fixed: bool,
        spurious: bool,
    },
    Page {
        level: u8,
        direct: bool,
    },
    ZapAll,
    Unmap {
        space: bool,
        at: Frame,
        pages: u8,
    },
    Age {
        space: bool,
        at: Frame,
        pages: u8,
        test: bool,
        n: u8,
    },
    MarkDirty {
        space: bool,
        slot: u8,
        at: Frame,
    },
    Smm(u8, bool),
    Nested(bool, bool),
    Exit(bool),
}

/// An entry, mostly one that KVM would write.
#[derive(Clone, Copy, Debug, Arbitrary)]
enum Word {
    None,
    Table(u8),
    Leaf { pfn: u8, bits: u8, level: u8 },
    Mmio(u8),
    Frozen,
    Any(u64),
}

impl Word {
    /// The word for an entry of `level`. From 1 GiB on it holds no leaf: a replay keeps the leaves of such a block one by
    /// one where it is split, and a few events would take minutes.
    fn at(self, level: u8) -> u64 {
        match level % 5 + 1 {
            1 | 2 => self.bits(),
            _ => self.bits() & !(1 << 7),
        }
    }

    fn bits(self) -> u64 {
        match self {
            Word::None => 1 << 63,
            Word::Table(n) => (0x18_9000 + u64::from(n)) << 12 | 0x827,
            Word::Leaf { pfn, bits, level } => {
                let large = if level % 3 == 0 { 0 } else { 1 << 7 };
                let pfn = if level % 3 == 0 {
                    u64::from(pfn)
                } else {
                    u64::from(pfn) << 9
                };
                let kept: u64 = [0x927, 0x925, 0xb67, 0x867, 0x825, 0xf67][usize::from(bits % 6)];
                let host = 3 << 9 << (48 * u64::from(bits >> 7));
                (0x10_0000 + pfn) << 12 | kept | large | host
            }
            Word::Mmio(n) => 1 << 51 | u64::from(n) << 12 | 0x8_0000_0000_0001 << 2 | 7,
            Word::Frozen => 0x5a0,
            Word::Any(bits) => bits,
        }
    }
}

fn pages(n: u8) -> u64 {
    match n {
        0 => 0,
        1..0xa0 => u64::from(n),
        0xa0..0xe0 => 0x200 * u64::from(n % 4),
        0xe0..0xf8 => 0x4_0000 * u64::from(n % 4),
        _ => (1 << 40) - 1,
    }
}

fn scenario(input: &Input) -> String {
    let flag = |bit: u32| {
        if input.params >> bit & 1 == 0 {
            "Y"
        } else {
            "N"
        }
    };
    let mut text = format!(
        r#"{{"name":"x","params":{{"nx_huge_pages":"{}","mmio_caching":"{}","eager_page_split":"{}"}},"ops":["#,
        flag(0),
        flag(1),
        flag(2)
    );
    for (i, op) in input.ops.iter().take(MOST_OPS).enumerate() {
        let comma = if i == 0 { "" } else { "," };
        let ok = r#""result":{"ret":0}"#;
        let _ = match op {
            Op::Region {
                space,
                slot,
                at,
                pages: n,
                flags,
            } => {
                let flags = ["", r#""READONLY""#, r#""LOG_DIRTY_PAGES""#][usize::from(flags % 3)];
                write!(
                    text,
                    r#"{comma}{{"i":{i},"op":"set_user_memory_region","as_id":{},"slot":{},"gpa":"{:#x}","size":"{:#x}","flags":[{flags}],{ok}}}"#,
                    u8::from(*space),
                    slot % 4,
                    at.gfn() << 12,
                    pages(*n) << 12
                )
            }
            Op::PreFault(vcpu) => write!(
                text,
                r#"{comma}{{"i":{i},"op":"KVM_PRE_FAULT_MEMORY","vcpu":{}}}"#,
                vcpu % 3
            ),
            Op::GetLog(slot, at, n) => write!(
                text,
                r#"{comma}{{"i":{i},"op":"get_dirty_log","slot":{},"result":{{"ret":0,"dirty_page_ranges_in_slot":[[{},{}]]}}}}"#,
                slot % 4,
                at.gfn(),
                at.gfn() + pages(*n)
            ),
            Op::ClearLog(slot, at, n) => write!(
                text,
                r#"{comma}{{"i":{i},"op":"clear_dirty_log","slot":{},"first_page":{},"num_pages":{},"bitmap":"all ones",{ok}}}"#,
                slot % 4,
                at.gfn(),
                pages(*n)
            ),
            Op::Ring(at) => write!(
                text,
                r#"{comma}{{"i":{i},"op":"dirty_ring_collect_and_reset","result":{{"ret":0,"harvested":[{{"slot":0,"offset":{}}}]}}}}"#,
                at.gfn()
            ),
            Op::Cap(which, argument) => write!(
                text,
                r#"{comma}{{"i":{i},"op":"enable_cap","cap":{},"arg0":"{:#x}",{ok}}}"#,
                [116, 168, 192, 213][usize::from(which % 4)],
                1u64 << (argument % 40)
            ),
            Op::NxPages(on) => write!(
                text,
                r#"{comma}{{"i":{i},"op":"module_param","name":"nx_huge_pages","value":"{}",{ok}}}"#,
                if *on { "force" } else { "N" }
            ),
            Op::Other => write!(text, r#"{comma}{{"i":{i},"op":"guest_access"}}"#),
        };
    }
    text.push_str("]}");
    text
}

fn line(seq: usize, thread: u8, event: &Event) -> String {
    let head = format!(r#"{{"seq":{seq},"t":{},"event":"#, thread % 3);
    let rest = match event {
        Event::Begin(op) => format!(r#""op_begin","op":{}"#, op % 5),
        Event::End(op) => format!(r#""op_end","op":{}"#, op % 5),
        Event::Fault { vcpu, at, code } => {
            let code = [
                0x1_0000_0004u64,
                0x1_0000_0006,
                0x1_0000_0014,
                0x1_0000_0007,
                0x2_0000_0006,
                0x1_0000_000f,
            ][usize::from(code % 6)];
            format!(
                r#""kvm_page_fault","vcpu":{},"gpa":"{:#x}","error_code":"{code:#x}""#,
                vcpu % 3,
                at.gfn() << 12
            )
        }
        Event::Requested { at, level, pfn } => {
            let pfn = match pfn {
                0xff => "noslot".to_owned(),
                pfn => format!("{:#x}", 0x10_0000 + (u64::from(*pfn) << (9 * (level % 2)))),
            };
            format!(
                r#""kvm_mmu_spte_requested","gfn":"{:#x}","level":{},"pfn":"{pfn}""#,
                at.gfn(),
                level % 3 + 1
            )
        }
        Event::Changed {
            space,
            at,
            level,
            old,
            new,
            n,
            step,
        } => {
            let run = match n {
                0..0xe0 => String::new(),
                n => format!(
                    r#","n":{},"gfn_step":"{:#x}","old_step":"0x0","new_step":"0x1000""#,
                    n - 0xde,
                    step % 4
                ),
            };
            format!(
                r#""kvm_tdp_mmu_spte_changed","as_id":{},"gfn":"{:#x}","level":{},"old_spte":"{:#x}","new_spte":"{:#x}"{run}"#,
                u8::from(*space),
                at.gfn(),
                level % 5 + 1,
                old.at(*level),
                new.at(*level)
            )
        }
        Event::SetSpte { at, level, spte } => format!(
            r#""kvm_mmu_set_spte","gfn":"{:#x}","level":{},"spte":"{:#x}""#,
            at.gfn(),
            level % 3 + 1,
            spte.bits()
        ),
        Event::Mmio(at) => format!(r#""mark_mmio_spte","gfn":"{:#x}""#, at.gfn()),
        Event::Fast {
            at,
            level,
            old,
            new,
            fixed,
            spurious,
        } => format!(
            r#""fast_page_fault","gpa":"{:#x}","level_inferred":{},"old_spte":"{:#x}","new_spte":"{:#x}","fixed":{fixed},"spurious":{spurious}"#,
            at.gfn() << 12,
            level % 4,
            old.bits(),
            new.bits()
        ),
        Event::Page { level, direct } => {
            format!(
                r#""kvm_mmu_get_page","level":{},"direct":{direct}"#,
                level % 5 + 1
            )
        }
        Event::ZapAll => r#""kvm_mmu_zap_all_fast""#.to_owned(),
        Event::Unmap {
            space,
            at,
            pages: n,
        } => format!(
            r#""kvm_unmap_hva_range","gfn_ranges":[{{"as_id":{},"gfn_start":"{:#x}","gfn_end":"{:#x}"}}]"#,
            u8::from(*space),
            at.gfn(),
            at.gfn() + pages(*n)
        ),
        Event::Age {
            space,
            at,
            pages: count,
            test,
            n,
        } => format!(
            r#""{}","gfn_ranges":[{{"as_id":{},"gfn_start":"{:#x}","gfn_end":"{:#x}"}}],"n":{},"gfn_step":"0x1""#,
            if *test {
                "kvm_test_age_hva"
            } else {
                "kvm_age_hva"
            },
            u8::from(*space),
            at.gfn(),
            at.gfn() + pages(*count),
            n % 4
        ),
        Event::MarkDirty { space, slot, at } => format!(
            r#""mark_page_dirty_in_slot","as_id":{},"slot":{},"gfn":"{:#x}""#,
            u8::from(*space),
            slot % 4,
            at.gfn()
        ),
        Event::Smm(vcpu, entering) => {
            format!(
                r#""kvm_smm_transition","vcpu":{},"entering":{entering}"#,
                vcpu % 3
            )
        }
        Event::Nested(enter, flag) => match (enter, flag) {
            (true, true) => r#""kvm_nested_vmenter","text":"nested_npt=y""#.to_owned(),
            (true, false) => r#""kvm_nested_vmrun","text":"npt: off""#.to_owned(),
            (false, true) => r#""kvm_nested_vmexit","text":"reason npf""#.to_owned(),
            (false, false) => r#""kvm_nested_vmexit","text":"reason hlt""#.to_owned(),
        },
        Event::Exit(error) => {
            let reason = if *error { "reason error" } else { "reason io" };
            format!(r#""kvm_userspace_exit","text":"{reason}""#)
        }
    };
    format!("{head}{rest}}}\n")
}

fn check<F: Processor>(input: &Input) {
    // Numbers of an operation may be beyond what a scenario may say.
    let Ok(scenario) = Scenario::parse(&scenario(input)) else {
        return;
    };
    let events = input.events.iter().take(MOST_EVENTS).enumerate();
    let text: String = events
        .map(|(seq, (t, event))| line(seq, *t, event))
        .collect();
    let lines = Lines::of(Cursor::new(text.into_bytes()), false);
    if let Ok(findings) = replay_lines::<F>(Path::new("trace"), scenario, lines, None) {
        assert_eq!(findings.leaked_frames, 0);
    }
}

/// Replays what `input` invents.
pub(crate) fn run(input: &Input) {
    if input.ept {
        check::<Ept>(input);
    } else {
        check::<Npt>(input);
    }
}
