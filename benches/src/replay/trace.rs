//! One line of a recorded trace, parsed and checked.
//!
//! Protocol. A trace is a file of JSON lines in the order of the kernel's global trace counter; the README beside the
//! recordings gives the form. Nothing here trusts a line: every number that later code uses as an index, a count or a
//! shift is bounded when it is read, so that a corrupt line ends in a [`TraceError`] and never in a panic or a loop
//! without end. Events that a replay needs nothing of become [`Event::Other`], or [`Event::Inside`] if they can stand
//! between a fault and its outcome, whatever their fields.

use serde::{Deserialize, Deserializer, de};
use std::borrow::Cow;
use std::fmt;

/// Frame numbers have 40 bits: addresses have 52.
pub const MAX_FRAME: u64 = 1 << 40;
/// Most vCPUs that a trace may name.
pub const MAX_VCPUS: u32 = 4096;
/// Address spaces that KVM has on x86: normal and system-management mode.
pub const ADDRESS_SPACES: u8 = 2;
/// Most entries that one run-length line may stand for: all of 16 GiB in 4 KiB pages.
pub const MAX_RUN: u64 = 1 << 22;

/// What is wrong with a line.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// Not JSON, or not of the expected types.
    #[error("not a trace event: {0}")]
    Json(#[from] serde_json::Error),
    /// A field is not there.
    #[error("{event}: no field `{field}`")]
    Missing {
        /// Name of the event.
        event: String,
        /// Name of the field.
        field: &'static str,
    },
    /// A number makes no sense.
    #[error("{event}: {field} {value:#x} is out of range")]
    Range {
        /// Name of the event.
        event: String,
        /// Name of the field.
        field: &'static str,
        /// What it was.
        value: u64,
    },
}

/// A half-open range of guest frames of one address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpaceRange {
    /// Address space.
    pub as_id: u8,
    /// First frame.
    pub start: u64,
    /// One past the last frame.
    pub end: u64,
}

/// One changed entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Address space.
    pub as_id: u8,
    /// Level of the entry, 1 to 5.
    pub level: u8,
    /// First frame that the entry covers.
    pub gfn: u64,
    /// What it was.
    pub old: u64,
    /// What it became.
    pub new: u64,
}

/// `n` changed entries at regular distances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    first: Change,
    n: u64,
    gfn_step: u64,
    old_step: u64,
    new_step: u64,
}

impl Run {
    /// Every change of the run, in order.
    pub fn changes(self) -> impl Iterator<Item = Change> {
        (0..self.n).map(move |k| Change {
            gfn: self.first.gfn.wrapping_add(k.wrapping_mul(self.gfn_step)),
            old: self.first.old.wrapping_add(k.wrapping_mul(self.old_step)),
            new: self.first.new.wrapping_add(k.wrapping_mul(self.new_step)),
            ..self.first
        })
    }
}

/// The lock-free repair of an entry that KVM tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FastFault {
    /// Guest address.
    pub gpa: u64,
    /// Level of the entry, inferred by the recorder.
    pub level: u8,
    /// What the entry was.
    pub old: u64,
    /// What it became, if `fixed`.
    pub new: u64,
    /// The entry was repaired.
    pub fixed: bool,
    /// Somebody else had repaired it.
    pub spurious: bool,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The operation with this index in the scenario begins.
    OpBegin(u32),
    /// It ends.
    OpEnd(u32),
    /// A guest faulted.
    PageFault {
        /// Number of the vCPU.
        vcpu: u32,
        /// Guest physical address.
        gpa: u64,
        /// Error code of the processor.
        code: u64,
    },
    /// The host answered a fault's look-up: the frame behind `gfn` and the level to map.
    Requested {
        /// Guest frame.
        gfn: u64,
        /// Level that KVM set out to map.
        level: u8,
        /// Host frame; `None` if no slot covers the guest frame.
        pfn: Option<u64>,
    },
    /// Entries changed.
    Changed(Run),
    /// KVM says what leaf a fault made.
    SetSpte {
        /// First frame of the leaf.
        gfn: u64,
        /// Level of the leaf.
        level: u8,
        /// The leaf.
        spte: u64,
    },
    /// See [`FastFault`].
    FastFault(FastFault),
    /// A root table was made: a table of level 4 or 5 of the two-dimensional MMU.
    Root(u8),
    /// All roots became obsolete.
    ZapAllFast,
    /// The host took these frames back.
    Unmap(Vec<SpaceRange>),
    /// The host asked for accessed bits (and cleared them, or not).
    Age,
    /// A vCPU enters or leaves system-management mode.
    Smm {
        /// Number of the vCPU.
        vcpu: u32,
        /// Whether it enters.
        entering: bool,
    },
    /// A vCPU starts a nested guest, with or without nested paging of its own.
    NestedEnter {
        /// The guest hypervisor uses nested paging: KVM shadows its tables.
        nested_paging: bool,
    },
    /// A vCPU leaves a nested guest.
    NestedExit {
        /// Because of a second-level fault.
        page_fault: bool,
    },
    /// A vCPU returns to user space.
    UserspaceExit {
        /// With an error instead of an exit reason.
        error: bool,
    },
    /// Something that can happen between a fault and its outcome.
    Inside,
    /// Anything else.
    Other,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Position in the trace.
    pub seq: u64,
    /// Thread that did it.
    pub thread: u32,
    /// What happened.
    pub event: Event,
}

impl Line {
    /// Parses one line of a trace.
    ///
    /// # Errors
    ///
    /// [`TraceError`] if it is not an event, lacks a field or has an absurd number.
    pub fn parse(text: &str) -> Result<Self, TraceError> {
        let raw: Raw<'_> = serde_json::from_str(text)?;
        Ok(Self { seq: raw.seq, thread: raw.t, event: raw.event()? })
    }
}

/// A number written as a string of hexadecimal digits.
#[derive(Clone, Copy)]
pub(super) struct Hex(pub u64);

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Hex;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a hexadecimal number such as \"0x1f\"")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Hex, E> {
                let digits = text.strip_prefix("0x").filter(|d| !d.starts_with('+'));
                digits
                    .and_then(|d| u64::from_str_radix(d, 16).ok())
                    .map(Hex)
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}

/// A host frame, or `noslot`.
#[derive(Clone, Copy)]
struct HostFrame(Option<u64>);

impl<'de> Deserialize<'de> for HostFrame {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        if text == "noslot" {
            return Ok(Self(None));
        }
        let text: de::value::StrDeserializer<'_, D::Error> = de::IntoDeserializer::into_deserializer(&*text);
        Hex::deserialize(text).map(|Hex(pfn)| Self(Some(pfn)))
    }
}

/// A flag, which older recordings write as a number.
#[derive(Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Flag {
    Bool(bool),
    Number(u64),
}

impl Flag {
    fn is_set(self) -> bool {
        match self {
            Self::Bool(b) => b,
            Self::Number(n) => n != 0,
        }
    }
}

#[derive(Deserialize)]
struct RawRange {
    as_id: u64,
    gfn_start: Hex,
    gfn_end: Hex,
}

/// Every field that any event has, as it stands in the file.
#[derive(Deserialize)]
struct Raw<'a> {
    seq: u64,
    t: u32,
    #[serde(borrow)]
    event: Cow<'a, str>,
    op: Option<u32>,
    vcpu: Option<u64>,
    gpa: Option<Hex>,
    error_code: Option<Hex>,
    as_id: Option<u64>,
    gfn: Option<Hex>,
    level: Option<u64>,
    pfn: Option<HostFrame>,
    old_spte: Option<Hex>,
    new_spte: Option<Hex>,
    n: Option<u64>,
    gfn_step: Option<Hex>,
    old_step: Option<Hex>,
    new_step: Option<Hex>,
    spte: Option<Hex>,
    level_inferred: Option<u64>,
    fixed: Option<Flag>,
    spurious: Option<Flag>,
    direct: Option<Flag>,
    entering: Option<Flag>,
    gfn_ranges: Option<Vec<RawRange>>,
    #[serde(borrow)]
    text: Option<Cow<'a, str>>,
}

impl Raw<'_> {
    fn event(&self) -> Result<Event, TraceError> {
        Ok(match &*self.event {
            "op_begin" => Event::OpBegin(self.need(self.op, "op")?),
            "op_end" => Event::OpEnd(self.need(self.op, "op")?),
            "kvm_page_fault" => Event::PageFault {
                vcpu: self.vcpu(self.need(self.vcpu, "vcpu")?)?,
                gpa: self.gpa()?,
                code: self.need(self.error_code, "error_code")?.0,
            },
            "kvm_mmu_spte_requested" => Event::Requested {
                gfn: self.gfn()?,
                level: self.leaf_level()?,
                pfn: match self.need(self.pfn, "pfn")?.0 {
                    Some(pfn) => Some(self.within(pfn, "pfn", MAX_FRAME)?),
                    None => None,
                },
            },
            "kvm_tdp_mmu_spte_changed" => Event::Changed(self.run()?),
            // The rest of the line describes a shadow page or this entry; only the entry matters.
            "kvm_mmu_set_spte" => match (self.gfn, self.level, self.spte) {
                (Some(_), Some(_), Some(Hex(spte))) => {
                    Event::SetSpte { gfn: self.gfn()?, level: self.leaf_level()?, spte }
                }
                _ => Event::Inside,
            },
            "fast_page_fault" => Event::FastFault(FastFault {
                gpa: self.gpa()?,
                level: self.within(self.need(self.level_inferred, "level_inferred")?, "level_inferred", 4)? as u8,
                old: self.need(self.old_spte, "old_spte")?.0,
                new: self.need(self.new_spte, "new_spte")?.0,
                fixed: self.need(self.fixed, "fixed")?.is_set(),
                spurious: self.need(self.spurious, "spurious")?.is_set(),
            }),
            "kvm_mmu_get_page" => match self.need(self.level, "level")? {
                level @ 4..=5 if self.need(self.direct, "direct")?.is_set() => Event::Root(level as u8),
                _ => Event::Inside,
            },
            "kvm_mmu_zap_all_fast" => Event::ZapAllFast,
            "kvm_unmap_hva_range" => Event::Unmap(self.ranges()?),
            "kvm_age_hva" | "kvm_test_age_hva" => Event::Age,
            "kvm_smm_transition" => self.smm()?,
            "kvm_nested_vmenter" | "kvm_nested_vmrun" => {
                let text = self.text.as_deref().unwrap_or_default();
                Event::NestedEnter { nested_paging: text.contains("nested_npt=y") || text.contains("npt: on") }
            }
            "kvm_nested_vmexit" => {
                Event::NestedExit { page_fault: self.text.as_deref().unwrap_or_default().contains("reason npf") }
            }
            "kvm_userspace_exit" => {
                Event::UserspaceExit { error: self.text.as_deref().unwrap_or_default().contains("reason error") }
            }
            "kvm_mmu_prepare_zap_page" | "kvm_mmu_split_huge_page" | "kvm_mmu_unsync_page" | "kvm_mmu_sync_page"
            | "mark_mmio_spte" | "check_mmio_spte" | "handle_mmio_page_fault" | "mark_page_dirty_in_slot"
            | "kvm_dirty_ring_push" => Event::Inside,
            _ => Event::Other,
        })
    }

    fn need<T>(&self, value: Option<T>, field: &'static str) -> Result<T, TraceError> {
        value.ok_or_else(|| TraceError::Missing { event: self.event.to_string(), field })
    }

    /// `value`, if it is below `limit`.
    fn within(&self, value: u64, field: &'static str, limit: u64) -> Result<u64, TraceError> {
        if value < limit { Ok(value) } else { Err(TraceError::Range { event: self.event.to_string(), field, value }) }
    }

    fn vcpu(&self, number: u64) -> Result<u32, TraceError> {
        self.within(number, "vcpu", u64::from(MAX_VCPUS)).map(|n| n as u32)
    }

    fn gpa(&self) -> Result<u64, TraceError> {
        self.within(self.need(self.gpa, "gpa")?.0, "gpa", MAX_FRAME << 12)
    }

    fn gfn(&self) -> Result<u64, TraceError> {
        self.within(self.need(self.gfn, "gfn")?.0, "gfn", MAX_FRAME)
    }

    /// Level 1 to 3: what can map memory.
    fn leaf_level(&self) -> Result<u8, TraceError> {
        let level = self.need(self.level, "level")?;
        if level == 0 {
            return Err(TraceError::Range { event: self.event.to_string(), field: "level", value: level });
        }
        self.within(level, "level", 4).map(|l| l as u8)
    }

    fn run(&self) -> Result<Run, TraceError> {
        let level = self.need(self.level, "level")?;
        if level == 0 {
            return Err(TraceError::Range { event: self.event.to_string(), field: "level", value: level });
        }
        let n = self.n.unwrap_or(1);
        if n == 0 {
            return Err(TraceError::Range { event: self.event.to_string(), field: "n", value: n });
        }
        let n = self.within(n, "n", MAX_RUN + 1)?;
        let step = |value, field| if n == 1 { Ok(0) } else { self.need(value, field).map(|Hex(v)| v) };
        let run = Run {
            first: Change {
                as_id: self.within(self.need(self.as_id, "as_id")?, "as_id", u64::from(ADDRESS_SPACES))? as u8,
                level: self.within(level, "level", 6)? as u8,
                gfn: self.gfn()?,
                old: self.need(self.old_spte, "old_spte")?.0,
                new: self.need(self.new_spte, "new_spte")?.0,
            },
            n,
            gfn_step: step(self.gfn_step, "gfn_step")?,
            old_step: step(self.old_step, "old_step")?,
            new_step: step(self.new_step, "new_step")?,
        };
        let span = u128::from(run.gfn_step) * u128::from(n - 1);
        if u128::from(run.first.gfn) + span >= u128::from(MAX_FRAME) {
            return Err(TraceError::Range { event: self.event.to_string(), field: "gfn_step", value: run.gfn_step });
        }
        Ok(run)
    }

    fn ranges(&self) -> Result<Vec<SpaceRange>, TraceError> {
        let Some(ranges) = &self.gfn_ranges else { return Ok(Vec::new()) };
        let mut all = Vec::with_capacity(ranges.len());
        for range in ranges {
            let as_id = self.within(range.as_id, "as_id", u64::from(ADDRESS_SPACES))? as u8;
            let end = self.within(range.gfn_end.0, "gfn_end", MAX_FRAME + 1)?;
            let start = self.within(range.gfn_start.0, "gfn_start", end)?;
            all.push(SpaceRange { as_id, start, end });
        }
        Ok(all)
    }

    /// Newer recordings have fields, older ones a text such as `vcpu 0: entering SMM, smbase 0x30000`.
    fn smm(&self) -> Result<Event, TraceError> {
        if let (Some(vcpu), Some(entering)) = (self.vcpu, self.entering) {
            return Ok(Event::Smm { vcpu: self.vcpu(vcpu)?, entering: entering.is_set() });
        }
        let text = self.need(self.text.as_deref(), "text")?;
        let number = text.strip_prefix("vcpu ").and_then(|rest| rest.split(':').next()?.trim().parse().ok());
        Ok(Event::Smm { vcpu: self.vcpu(self.need(number, "vcpu")?)?, entering: text.contains("entering") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(text: &str) -> Event {
        Line::parse(text).unwrap().event
    }

    fn error(text: &str) -> String {
        Line::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn reads_a_fault_and_its_answer() {
        let line = Line::parse(
            r#"{"seq":8,"op":3,"t":2,"event":"kvm_page_fault","vcpu":1,"gpa":"0x1100","error_code":"0x100000014"}"#,
        )
        .unwrap();
        assert_eq!((line.seq, line.thread), (8, 2));
        assert_eq!(line.event, Event::PageFault { vcpu: 1, gpa: 0x1100, code: 0x1_0000_0014 });
        assert_eq!(
            event(
                r#"{"seq":9,"t":0,"event":"kvm_mmu_spte_requested","gfn":"0x1","level":2,"pfn":"0x184a7f","frame":"D0"}"#
            ),
            Event::Requested { gfn: 1, level: 2, pfn: Some(0x18_4a7f) }
        );
        assert_eq!(
            event(r#"{"seq":9,"t":0,"event":"kvm_mmu_spte_requested","gfn":"0x1","level":1,"pfn":"noslot"}"#),
            Event::Requested { gfn: 1, level: 1, pfn: None }
        );
    }

    #[test]
    fn expands_a_run() {
        let Event::Changed(run) = event(
            r#"{"seq":1,"t":0,"event":"kvm_tdp_mmu_spte_changed","as_id":1,"gfn":"0x200","level":1,"n":3,"gfn_step":"0x1",
                "old_spte":"0x1000e67","old_step":"0x1000","new_spte":"0x80000000000005a0","new_step":"0x0"}"#,
        ) else {
            panic!("not a change");
        };
        let changes: Vec<_> = run.changes().collect();
        assert_eq!(changes.len(), 3);
        let last = Change { as_id: 1, level: 1, gfn: 0x202, old: 0x100_2e67, new: 0x8000_0000_0000_05a0 };
        assert_eq!(changes[2], last);
    }

    #[test]
    fn reads_both_forms_of_a_mode_change() {
        let fields = r#"{"seq":1,"t":1,"event":"kvm_smm_transition","vcpu":0,"entering":true}"#;
        let text =
            r#"{"seq":1,"t":1,"event":"kvm_smm_transition","text":"vcpu 0: entering SMM, smbase 0x30000"}"#;
        assert_eq!(event(fields), Event::Smm { vcpu: 0, entering: true });
        assert_eq!(event(fields), event(text));
    }

    #[test]
    fn tells_roots_from_other_tables() {
        let page = |level, direct| {
            event(&format!(
                r#"{{"seq":1,"t":0,"event":"kvm_mmu_get_page","gfn":"0x0","level":{level},"direct":{direct}}}"#
            ))
        };
        assert_eq!(page(5, true), Event::Root(5));
        assert_eq!(page(4, false), Event::Inside);
        assert_eq!(page(3, true), Event::Inside);
    }

    #[test]
    fn an_unknown_event_is_no_error() {
        assert_eq!(event(r#"{"seq":1,"t":0,"event":"kvm_new_thing","gfn":7}"#.replace("7", "\"0x7\"").as_str()), Event::Other);
    }

    #[test]
    fn bad_lines_say_what_is_wrong() {
        assert!(error("").contains("not a trace event"));
        assert!(error(r#"{"seq":1,"t":0}"#).contains("event"));
        assert!(error(r#"{"seq":1,"t":0,"event":"kvm_page_fault","vcpu":0,"gpa":"0x1"}"#).contains("error_code"));
        assert!(
            error(r#"{"seq":1,"t":0,"event":"kvm_page_fault","vcpu":0,"gpa":"pear","error_code":"0x4"}"#)
                .contains("pear")
        );
        let absurd = [
            (r#""kvm_page_fault","vcpu":99999999,"gpa":"0x1","error_code":"0x4""#, "vcpu"),
            (r#""kvm_page_fault","vcpu":0,"gpa":"0xfffffffffffff000","error_code":"0x4""#, "gpa"),
            (r#""kvm_mmu_spte_requested","gfn":"0x1","level":0,"pfn":"0x1""#, "level"),
            (r#""kvm_mmu_spte_requested","gfn":"0x1","level":4,"pfn":"0x1""#, "level"),
            (r#""kvm_mmu_spte_requested","gfn":"0x1","level":1,"pfn":"0xffffffffffffffff""#, "pfn"),
            (r#""kvm_tdp_mmu_spte_changed","as_id":2,"gfn":"0x1","level":1,"old_spte":"0x0","new_spte":"0x1""#, "as_id"),
            (r#""kvm_tdp_mmu_spte_changed","as_id":0,"gfn":"0x1","level":6,"old_spte":"0x0","new_spte":"0x1""#, "level"),
            (
                r#""kvm_tdp_mmu_spte_changed","as_id":0,"gfn":"0x1","level":1,"old_spte":"0x0","new_spte":"0x1","n":1000000000000,"gfn_step":"0x0","old_step":"0x0","new_step":"0x0""#,
                "n ",
            ),
            (
                r#""kvm_tdp_mmu_spte_changed","as_id":0,"gfn":"0x1","level":1,"old_spte":"0x0","new_spte":"0x1","n":3,"gfn_step":"0xffffffffffffffff","old_step":"0x0","new_step":"0x0""#,
                "gfn_step",
            ),
            (r#""kvm_unmap_hva_range","gfn_ranges":[{"as_id":0,"gfn_start":"0x8","gfn_end":"0x4"}]"#, "gfn_start"),
        ];
        for (rest, field) in absurd {
            let message = error(&format!(r#"{{"seq":1,"t":0,"event":{rest}}}"#));
            assert!(message.contains(field) && message.contains("out of range"), "{message}");
        }
    }
}
