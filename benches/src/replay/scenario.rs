//! `NAME.scenario.json`: the operations that the events of `NAME.trace.jsonl` refer to.

use super::trace::{ADDRESS_SPACES, Hex, MAX_FRAME, MAX_VCPUS};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::HashMap;

/// Pages of the largest slot that KVM takes (`KVM_MEM_MAX_NR_PAGES` in its `include/linux/kvm_host.h`).
const MOST_SLOT_PAGES: u64 = (1 << 31) - 1;

/// A memory slot as user space asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Address space.
    pub as_id: u8,
    /// Slot number, unique in its address space.
    pub slot: u32,
    /// First guest frame.
    pub gfn: u64,
    /// Pages; 0 deletes the slot.
    pub pages: u64,
    /// The guest may not write.
    pub read_only: bool,
    /// Writes are logged.
    pub log_dirty: bool,
    /// Marks stay until they are cleared by a call of their own.
    pub log_manual: bool,
    /// The log begins with every page marked.
    pub log_initially_set: bool,
}

/// Pages of a slot: the first and the last.
pub type PageRange = (u64, u64);

/// What an operation does to the MMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// A slot is made, deleted, moved, or its flags change.
    SetRegion(Region),
    /// Memory is mapped ahead of the guest.
    PreFault {
        /// For this vCPU.
        vcpu: u32,
    },
    /// The dirty log of a slot is read.
    GetDirtyLog {
        /// Address space.
        as_id: u8,
        /// Number of the slot.
        slot: u32,
        /// The pages that were reported, if that was recorded.
        pages: Option<Vec<PageRange>>,
    },
    /// Marks of a slot's dirty log are cleared.
    ClearDirtyLog {
        /// Address space.
        as_id: u8,
        /// Number of the slot.
        slot: u32,
        /// First page that the call is about, and how many.
        first: u64,
        /// See above.
        count: u64,
        /// The pages among them whose marks were taken, if not all were asked for.
        pages: Option<Vec<PageRange>>,
    },
    /// The dirty rings are harvested and reset.
    ResetDirtyRings {
        /// The pages that were harvested, if that was recorded: slot and page.
        pages: Option<Vec<(u32, u64)>>,
    },
    /// Marks of the dirty log stay until they are cleared (bit 0), and the log begins full (bit 1).
    ManualDirtyLog(u64),
    /// Each vCPU has a dirty ring of this many bytes.
    DirtyRing(u64),
    /// KVM's `nx_huge_pages` is turned on or off.
    NxHugePages(bool),
    /// Nothing that a replay must do itself: its effects on the MMU are events of the trace.
    Other,
}

/// A scenario.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Its name.
    pub name: String,
    /// Whether KVM let no huge page be executed at the start.
    pub nx_huge_pages: bool,
    /// Whether KVM kept MMIO entries.
    pub mmio_caching: bool,
    /// Whether KVM split large pages when a log was switched on.
    pub eager_split: bool,
    /// Whether deleting or moving a slot made all roots obsolete.
    pub slots_take_roots: bool,
    ops: HashMap<u32, Op>,
}

impl Scenario {
    /// Parses the file's text.
    ///
    /// # Errors
    ///
    /// One line saying what is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let raw: RawScenario =
            serde_json::from_str(text).map_err(|e| format!("not a scenario: {e}"))?;
        let param = |name: &str| raw.params.get(name).and_then(Value::as_str);
        let mut ops = HashMap::with_capacity(raw.ops.len());
        for op in &raw.ops {
            let parsed = op
                .parse()
                .map_err(|what| format!("operation {} ({}): {what}", op.i, op.op))?;
            if ops.insert(op.i, parsed).is_some() {
                return Err(format!("operation {} is there twice", op.i));
            }
        }
        Ok(Self {
            nx_huge_pages: param("nx_huge_pages").is_some_and(is_on),
            mmio_caching: param("mmio_caching").is_none_or(is_on),
            eager_split: param("eager_page_split").is_none_or(is_on),
            slots_take_roots: !raw.ops.iter().any(RawOp::keeps_roots),
            name: raw.name,
            ops,
        })
    }

    /// The indices of all operations.
    pub fn indices(&self) -> impl Iterator<Item = u32> {
        self.ops.keys().copied()
    }

    /// The operation with this index.
    pub fn op(&self, index: u32) -> Option<&Op> {
        self.ops.get(&index)
    }
}

/// Values of a module parameter that mean yes.
fn is_on(value: &str) -> bool {
    !matches!(value, "N" | "0" | "never" | "off" | "n")
}

#[derive(Deserialize)]
struct RawScenario {
    name: String,
    #[serde(default)]
    params: Map<String, Value>,
    ops: Vec<RawOp>,
}

/// An operation. Fields are looked at only where the operation needs them: other operations may use the same names
/// for other things.
#[derive(Deserialize)]
struct RawOp {
    i: u32,
    op: String,
    #[serde(flatten)]
    fields: Map<String, Value>,
}

impl RawOp {
    fn parse(&self) -> Result<Op, String> {
        Ok(match self.op.as_str() {
            // A call that KVM refused did nothing.
            "set_user_memory_region" if self.failed() => Op::Other,
            "set_user_memory_region" => Op::SetRegion(self.region()?),
            "KVM_PRE_FAULT_MEMORY" => Op::PreFault {
                vcpu: self.number("vcpu", u64::from(MAX_VCPUS))? as u32,
            },
            _ if self.failed() => Op::Other,
            "get_dirty_log" => self.get_dirty_log()?,
            "clear_dirty_log" => self.clear_dirty_log()?,
            "dirty_ring_collect_and_reset" => self.reset_dirty_rings()?,
            "enable_cap" => self.enable_cap(),
            "module_param" if self.text("name") == Some("nx_huge_pages") => {
                Op::NxHugePages(self.text("value").is_some_and(is_on))
            }
            _ => Op::Other,
        })
    }

    fn failed(&self) -> bool {
        let ret = self
            .fields
            .get("result")
            .and_then(|result| result.get("ret"));
        ret.and_then(Value::as_i64).is_some_and(|ret| ret != 0)
    }

    fn region(&self) -> Result<Region, String> {
        let (gpa, size) = (
            self.hex("gpa", MAX_FRAME << 12)?,
            self.hex("size", MAX_FRAME << 12)?,
        );
        if gpa & 0xfff != 0 || size & 0xfff != 0 {
            return Err(format!(
                "slot at {gpa:#x} of {size:#x} bytes is not page-aligned"
            ));
        }
        if size >> 12 > MOST_SLOT_PAGES {
            return Err(format!("no KVM takes a slot of {size:#x} bytes"));
        }
        let flags = self
            .fields
            .get("flags")
            .and_then(Value::as_array)
            .map_or(&[][..], Vec::as_slice);
        Ok(Region {
            as_id: self.number("as_id", u64::from(ADDRESS_SPACES))? as u8,
            slot: self.number("slot", 1 << 16)? as u32,
            gfn: gpa >> 12,
            pages: size >> 12,
            read_only: flags.iter().any(|f| f == "READONLY"),
            log_dirty: flags.iter().any(|f| f == "LOG_DIRTY_PAGES"),
            log_manual: false,
            log_initially_set: false,
        })
    }

    /// Which slot a call on a dirty log is about: its address space may stand in the upper half of its number.
    fn logged_slot(&self) -> Result<(u8, u32), String> {
        let slot = self.number("slot", u64::from(ADDRESS_SPACES) << 16)?;
        let as_id = match self.fields.contains_key("as_id") {
            true => self.number("as_id", u64::from(ADDRESS_SPACES))?,
            false => slot >> 16,
        };
        Ok((as_id as u8, slot as u32 & 0xffff))
    }

    fn get_dirty_log(&self) -> Result<Op, String> {
        let (as_id, slot) = self.logged_slot()?;
        let pages = self.page_ranges("dirty_page_ranges_in_slot")?;
        Ok(Op::GetDirtyLog { as_id, slot, pages })
    }

    fn clear_dirty_log(&self) -> Result<Op, String> {
        let (as_id, slot) = self.logged_slot()?;
        let first = self.number("first_page", MAX_FRAME)?;
        let count = self.number("num_pages", MAX_FRAME)?;
        let taken = self.page_ranges("cleared_page_ranges_in_slot")?;
        // A call without a bitmap of its own was seen by its effect only.
        let pages = match self.text("bitmap") {
            Some("all ones") => None,
            _ => Some(taken.unwrap_or_default()),
        };
        Ok(Op::ClearDirtyLog {
            as_id,
            slot,
            first,
            count,
            pages,
        })
    }

    fn reset_dirty_rings(&self) -> Result<Op, String> {
        let harvested = self.fields.get("result").and_then(|r| r.get("harvested"));
        let Some(harvested) = harvested.and_then(Value::as_array) else {
            return Ok(Op::ResetDirtyRings { pages: None });
        };
        let page = |entry: &Value| {
            let number = |name| entry.get(name).and_then(Value::as_u64);
            let slot = number("slot").and_then(|slot| u32::try_from(slot).ok())?;
            Some((slot, number("offset")?))
        };
        let pages: Option<Vec<_>> = harvested.iter().map(page).collect();
        let pages = pages.ok_or("a harvested page without slot or offset")?;
        Ok(Op::ResetDirtyRings { pages: Some(pages) })
    }

    fn page_ranges(&self, field: &str) -> Result<Option<Vec<PageRange>>, String> {
        let found = self.fields.get("result").and_then(|r| r.get(field));
        let Some(found) = found.and_then(Value::as_array) else {
            return Ok(None);
        };
        let mut ranges = Vec::with_capacity(found.len());
        for range in found {
            let bound = |n| range.get(n).and_then(Value::as_u64);
            let (first, last) = bound(0)
                .zip(bound(1))
                .ok_or_else(|| format!("{field}: not a range"))?;
            let last = within(last, field, MAX_FRAME)?;
            ranges.push((within(first, field, last + 1)?, last));
        }
        Ok(Some(ranges))
    }

    /// The capabilities that change what the MMU does, by their numbers in Linux' `kvm.h` or by their names.
    fn enable_cap(&self) -> Op {
        match (self.cap(), self.argument()) {
            (168, bits) => Op::ManualDirtyLog(bits),
            (192 | 223, bytes) => Op::DirtyRing(bytes),
            _ => Op::Other,
        }
    }

    fn cap(&self) -> u64 {
        match self.text("cap") {
            Some("KVM_CAP_DISABLE_QUIRKS") => 116,
            Some("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2") => 168,
            Some("KVM_CAP_DIRTY_LOG_RING") => 192,
            Some("KVM_CAP_DISABLE_QUIRKS2") => 213,
            Some("KVM_CAP_DIRTY_LOG_RING_ACQ_REL") => 223,
            _ => self.fields.get("cap").and_then(Value::as_u64).unwrap_or(0),
        }
    }

    fn argument(&self) -> u64 {
        self.fields
            .get("arg0")
            .and_then(|value| Hex::deserialize(value).ok())
            .map_or(0, |Hex(value)| value)
    }

    /// Whether the VMM disabled the habit of making all roots obsolete with a slot.
    fn keeps_roots(&self) -> bool {
        const SLOT_ZAP_ALL: u64 = 1 << 7;
        self.op == "enable_cap"
            && matches!(self.cap(), 116 | 213)
            && self.argument() & SLOT_ZAP_ALL != 0
    }

    fn text(&self, field: &str) -> Option<&str> {
        self.fields.get(field).and_then(Value::as_str)
    }

    fn number(&self, field: &str, limit: u64) -> Result<u64, String> {
        let value = self
            .fields
            .get(field)
            .and_then(Value::as_u64)
            .ok_or_else(|| format!("no number `{field}`"))?;
        within(value, field, limit)
    }

    fn hex(&self, field: &str, limit: u64) -> Result<u64, String> {
        let value = self
            .fields
            .get(field)
            .ok_or_else(|| format!("no field `{field}`"))?;
        let Hex(value) = Hex::deserialize(value).map_err(|e| format!("{field}: {e}"))?;
        within(value, field, limit)
    }
}

fn within(value: u64, field: &str, limit: u64) -> Result<u64, String> {
    if value < limit {
        Ok(value)
    } else {
        Err(format!("{field} {value:#x} is out of range"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOT: &str =
        r#""op":"set_user_memory_region","as_id":0,"slot":1,"gpa":"0x40000000","size":"0x8000""#;

    fn parse(ops: &str) -> Result<Scenario, String> {
        Scenario::parse(&format!(
            r#"{{"name":"x","params":{{"nx_huge_pages":"N"}},"ops":[{ops}]}}"#
        ))
    }

    #[test]
    fn reads_operations() {
        let scenario = parse(&format!(
            r#"{{"i":0,{SLOT},"flags":["READONLY"],"result":{{"ret":0}}}},{{"i":1,{SLOT},"result":{{"ret":-17}}}},
               {{"i":2,"op":"module_param","name":"nx_huge_pages","value":"force"}},
               {{"i":3,"op":"KVM_PRE_FAULT_MEMORY","vcpu":1}},{{"i":4,"op":"host","slot":"any"}}"#
        ))
        .unwrap();
        let region = Region {
            as_id: 0,
            slot: 1,
            gfn: 0x4_0000,
            pages: 8,
            read_only: true,
            log_dirty: false,
            log_manual: false,
            log_initially_set: false,
        };
        assert_eq!(scenario.op(0), Some(&Op::SetRegion(region)));
        assert_eq!(scenario.op(1), Some(&Op::Other));
        assert_eq!(scenario.op(2), Some(&Op::NxHugePages(true)));
        assert_eq!(scenario.op(3), Some(&Op::PreFault { vcpu: 1 }));
        assert_eq!(scenario.op(4), Some(&Op::Other));
        assert_eq!(scenario.op(5), None);
        assert!(!scenario.nx_huge_pages && scenario.mmio_caching);
    }

    #[test]
    fn says_what_is_wrong() {
        assert!(Scenario::parse("{").unwrap_err().contains("not a scenario"));
        let of = |op: &str| parse(op).unwrap_err();
        assert!(of(r#"{"i":3,"op":"set_user_memory_region"}"#).contains("operation 3"));
        assert!(
            of(&format!(
                r#"{{"i":0,{}}}"#,
                SLOT.replace("0x8000", "0x8001")
            ))
            .contains("not page-aligned")
        );
        assert!(
            of(&format!(
                r#"{{"i":0,{}}}"#,
                SLOT.replace("\"as_id\":0", "\"as_id\":7")
            ))
            .contains("out of range")
        );
        assert!(of(&format!(r#"{{"i":0,{SLOT}}},{{"i":0,{SLOT}}}"#)).contains("twice"));
    }
}
