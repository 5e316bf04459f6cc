//! A line as it stands in the file, and how it becomes an [`Event`].
//!
//! One structure has every field that any event has; each event takes the ones that it needs and checks them.

use super::{
    ADDRESS_SPACES, Change, Event, FastFault, MAX_FRAME, MAX_RUN, MAX_VCPUS, Run, SpaceRange,
    TraceError,
};
use serde::{Deserialize, Deserializer, de};
use std::borrow::Cow;
use std::fmt;

/// A number written as a string of hexadecimal digits.
#[derive(Clone, Copy)]
pub(in crate::replay) struct Hex(pub u64);

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
        let text: de::value::StrDeserializer<'_, D::Error> =
            de::IntoDeserializer::into_deserializer(&*text);
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
pub(super) struct Raw<'a> {
    pub(super) seq: u64,
    pub(super) t: u32,
    #[serde(borrow)]
    event: Cow<'a, str>,
    op: Option<u32>,
    vcpu: Option<u64>,
    gpa: Option<Hex>,
    error_code: Option<Hex>,
    as_id: Option<u64>,
    slot: Option<u64>,
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
    /// What happened, with every number checked.
    pub(super) fn event(&self) -> Result<Event, TraceError> {
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
                (Some(_), Some(_), Some(Hex(spte))) => Event::SetSpte {
                    gfn: self.gfn()?,
                    level: self.leaf_level()?,
                    spte,
                },
                _ => Event::Inside,
            },
            "mark_mmio_spte" => Event::MarkMmio(self.gfn()?),
            "fast_page_fault" => Event::FastFault(FastFault {
                gpa: self.gpa()?,
                level: self.within(
                    self.need(self.level_inferred, "level_inferred")?,
                    "level_inferred",
                    4,
                )? as u8,
                old: self.need(self.old_spte, "old_spte")?.0,
                new: self.need(self.new_spte, "new_spte")?.0,
                fixed: self.need(self.fixed, "fixed")?.is_set(),
                spurious: self.need(self.spurious, "spurious")?.is_set(),
            }),
            "kvm_mmu_get_page" => match self.need(self.level, "level")? {
                level @ 4..=5 if self.need(self.direct, "direct")?.is_set() => {
                    Event::Root(level as u8)
                }
                _ => Event::Inside,
            },
            "kvm_mmu_zap_all_fast" => Event::ZapAllFast,
            "kvm_unmap_hva_range" => Event::Unmap(self.ranges()?),
            "kvm_age_hva" | "kvm_test_age_hva" => Event::Age {
                ranges: self.repeated_ranges()?,
                clears: self.event == "kvm_age_hva",
            },
            "kvm_smm_transition" => self.smm()?,
            "mark_page_dirty_in_slot" => Event::MarkDirty {
                as_id: self.within(
                    self.need(self.as_id, "as_id")?,
                    "as_id",
                    u64::from(ADDRESS_SPACES),
                )? as u8,
                slot: self.within(self.need(self.slot, "slot")?, "slot", 1 << 16)? as u32,
                gfn: self.gfn()?,
            },
            "kvm_nested_vmenter" | "kvm_nested_vmrun" => {
                let text = self.text.as_deref().unwrap_or_default();
                Event::NestedEnter {
                    nested_paging: text.contains("nested_npt=y") || text.contains("npt: on"),
                }
            }
            "kvm_nested_vmexit" => Event::NestedExit {
                page_fault: self
                    .text
                    .as_deref()
                    .unwrap_or_default()
                    .contains("reason npf"),
            },
            "kvm_userspace_exit" => Event::UserspaceExit {
                error: self
                    .text
                    .as_deref()
                    .unwrap_or_default()
                    .contains("reason error"),
            },
            "kvm_mmu_prepare_zap_page"
            | "kvm_mmu_split_huge_page"
            | "kvm_mmu_unsync_page"
            | "kvm_mmu_sync_page"
            | "check_mmio_spte"
            | "handle_mmio_page_fault"
            | "kvm_dirty_ring_push" => Event::Inside,
            _ => Event::Other,
        })
    }

    fn need<T>(&self, value: Option<T>, field: &'static str) -> Result<T, TraceError> {
        value.ok_or_else(|| TraceError::Missing {
            event: self.event.to_string(),
            field,
        })
    }

    /// `value`, if it is below `limit`.
    pub(super) fn within(
        &self,
        value: u64,
        field: &'static str,
        limit: u64,
    ) -> Result<u64, TraceError> {
        if value < limit {
            Ok(value)
        } else {
            Err(TraceError::Range {
                event: self.event.to_string(),
                field,
                value,
            })
        }
    }

    fn vcpu(&self, number: u64) -> Result<u32, TraceError> {
        self.within(number, "vcpu", u64::from(MAX_VCPUS))
            .map(|n| n as u32)
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
            return Err(TraceError::Range {
                event: self.event.to_string(),
                field: "level",
                value: level,
            });
        }
        self.within(level, "level", 4).map(|l| l as u8)
    }

    fn run(&self) -> Result<Run, TraceError> {
        let level = self.need(self.level, "level")?;
        if level == 0 {
            return Err(TraceError::Range {
                event: self.event.to_string(),
                field: "level",
                value: level,
            });
        }
        let n = self.n.unwrap_or(1);
        if n == 0 {
            return Err(TraceError::Range {
                event: self.event.to_string(),
                field: "n",
                value: n,
            });
        }
        let n = self.within(n, "n", MAX_RUN + 1)?;
        let step = |value, field| {
            if n == 1 {
                Ok(0)
            } else {
                self.need(value, field).map(|Hex(v)| v)
            }
        };
        let run = Run {
            first: Change {
                as_id: self.within(
                    self.need(self.as_id, "as_id")?,
                    "as_id",
                    u64::from(ADDRESS_SPACES),
                )? as u8,
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
            return Err(TraceError::Range {
                event: self.event.to_string(),
                field: "gfn_step",
                value: run.gfn_step,
            });
        }
        Ok(run)
    }

    fn ranges(&self) -> Result<Vec<SpaceRange>, TraceError> {
        let Some(ranges) = &self.gfn_ranges else {
            return Ok(Vec::new());
        };
        let mut all = Vec::with_capacity(ranges.len());
        for range in ranges {
            let as_id = self.within(range.as_id, "as_id", u64::from(ADDRESS_SPACES))? as u8;
            let end = self.within(range.gfn_end.0, "gfn_end", MAX_FRAME + 1)?;
            let start = self.within(range.gfn_start.0, "gfn_start", end)?;
            all.push(SpaceRange { as_id, start, end });
        }
        Ok(all)
    }

    /// The ranges of a line that stands for several, each a step further.
    fn repeated_ranges(&self) -> Result<Vec<SpaceRange>, TraceError> {
        let ranges = self.ranges()?;
        let n = self.within(self.n.unwrap_or(1), "n", MAX_RUN + 1)?;
        if n <= 1 {
            return Ok(ranges);
        }
        let step = self.need(self.gfn_step, "gfn_step")?.0;
        let mut all: Vec<SpaceRange> = Vec::new();
        for range in ranges {
            let span = u128::from(step) * u128::from(n - 1);
            if u128::from(range.end) + span > u128::from(MAX_FRAME) {
                return Err(TraceError::Range {
                    event: self.event.to_string(),
                    field: "gfn_step",
                    value: step,
                });
            }
            // What the steps leave out between two ranges is small, and a line stands for many ranges.
            all.push(SpaceRange {
                end: range.end + step * (n - 1),
                ..range
            });
        }
        Ok(all)
    }

    /// Newer recordings have fields, older ones a text such as `vcpu 0: entering SMM, smbase 0x30000`.
    fn smm(&self) -> Result<Event, TraceError> {
        if let (Some(vcpu), Some(entering)) = (self.vcpu, self.entering) {
            return Ok(Event::Smm {
                vcpu: self.vcpu(vcpu)?,
                entering: entering.is_set(),
            });
        }
        let text = self.need(self.text.as_deref(), "text")?;
        let number = text
            .strip_prefix("vcpu ")
            .and_then(|rest| rest.split(':').next()?.trim().parse().ok());
        Ok(Event::Smm {
            vcpu: self.vcpu(self.need(number, "vcpu")?)?,
            entering: text.contains("entering"),
        })
    }
}
