//! `NAME.scenario.json`: the operations that the events of `NAME.trace.jsonl` refer to.

use super::trace::{ADDRESS_SPACES, Hex, MAX_FRAME, MAX_VCPUS};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::HashMap;

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
}

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
    /// The dirty log is read, cleared or collected.
    DirtyLog,
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
            "get_dirty_log" | "clear_dirty_log" | "dirty_ring_collect_and_reset" => Op::DirtyLog,
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
        })
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
