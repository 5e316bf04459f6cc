//! Faults, from the processor's report to their outcome.

use super::{Story, Unmap};
use crate::replay::expect::{Contradiction, NOBODY, Place, Space, Wrong};
use crate::replay::ledger::Class;
use crate::replay::pending::{Conclusion, End, Guest, Pending, Requested};
use crate::replay::spte::{self, Kind, Leaf, kind, pages};
use crate::replay::step::{Code, GuestAccess, Meets, Operation, Step};
use crate::replay::trace::{Change, FastFault, SpaceRange};

impl Story {
    pub(super) fn page_fault(
        &mut self,
        t: u32,
        previous: u64,
        left_nested: bool,
        vcpu: u32,
        gpa: u64,
        code: Code,
    ) {
        let (as_id, seq) = (self.space_of(Some(vcpu)), self.seq);
        let withheld = self.expected.nx_huge_pages;
        let thread = self.thread(t);
        thread.vcpu = Some(vcpu);
        let guest = match (left_nested, thread.nested_paging) {
            (false, _) => Guest::Ordinary,
            (true, true) => Guest::Shadow,
            (true, false) => Guest::NestedDirect,
        };
        let space = if guest == Guest::NestedDirect {
            Space::nested(as_id)
        } else {
            Space::normal(as_id)
        };
        let fault = Pending {
            seq,
            vcpu: Some(vcpu),
            space,
            guest,
            gpa,
            code,
            ahead: false,
            requested: None,
            overtaken: false,
            withheld,
            spurious: false,
            split: None,
            concluded: false,
        };
        thread.fault = Some(fault);
        let fresh_root = std::mem::take(&mut thread.fresh_root);
        if guest == Guest::Ordinary {
            if fresh_root {
                self.give_up_root(t, as_id);
            }
            self.settle(as_id, fault.gfn());
            self.access(t, previous, &fault, vcpu);
        }
    }

    /// A vCPU uses a new root of an address space that had one. The old one may be taken down by anybody, later.
    fn give_up_root(&mut self, t: u32, as_id: u8) {
        self.expected.detach_tree(NOBODY, Space::normal(as_id));
        self.by(t);
        self.steps.push(Step::GiveUpRoot(as_id));
        self.steps.push(Step::Verify {
            seq: self.seq,
            operation: Operation::RootChange,
            ranges: vec![SpaceRange {
                as_id,
                start: 0,
                end: u64::MAX,
            }],
        });
    }

    /// The access that faulted, before anything is done about it.
    pub(super) fn access(&mut self, t: u32, previous: u64, fault: &Pending, vcpu: u32) {
        let gfn = fault.gfn();
        let meets = match self.expected.leaf_at(fault.space, gfn) {
            Some(leaf) if fault.code.passes(&leaf) => Meets::Page {
                pfn: leaf.pfn_of(gfn),
            },
            Some(_) => Meets::Forbidden,
            None if self.expected.is_mmio(fault.space, gfn) => Meets::Mmio,
            None => Meets::Nothing,
        };
        let overtaken = self
            .stamps
            .changed_by_other(fault.space.as_id(), gfn, t, previous);
        if meets != Meets::reported(fault.code) && !overtaken {
            let what = Wrong::NotMet {
                reported: fault.code.0,
            };
            self.contradict(Contradiction {
                as_id: fault.space.as_id(),
                level: 1,
                gfn,
                what,
            });
        }
        let half_removed = |unmap: &Unmap| {
            unmap.executed
                && unmap
                    .ranges
                    .iter()
                    .any(|r| fault.lies_in(r.as_id, r.start, r.end))
        };
        if !self
            .threads
            .values()
            .any(|thread| thread.unmap.as_ref().is_some_and(half_removed))
        {
            let (as_id, gpa, code) = (fault.space.as_id(), fault.gpa, fault.code);
            self.steps.push(Step::Access(GuestAccess {
                seq: self.seq,
                vcpu,
                as_id,
                gpa,
                code,
                meets,
            }));
        }
    }

    pub(super) fn requested(&mut self, t: u32, gfn: u64, requested: Requested) {
        let open = self
            .thread(t)
            .fault
            .is_some_and(|f| f.gfn() == gfn && !f.concluded && !(f.ahead && f.requested.is_some()));
        // Without a fault of its own, memory is mapped ahead of the guest. (A shadow page's request names the frame of
        // the guest hypervisor, not that of its guest.)
        let shadow = self
            .thread(t)
            .fault
            .is_some_and(|f| f.guest == Guest::Shadow);
        if !open && !shadow {
            self.close_fault(t, End::Went);
            let vcpu = self.thread(t).vcpu;
            let space = Space::normal(self.space_of(vcpu));
            self.settle(space.as_id(), gfn);
            let seq = self.seq;
            self.thread(t).fault = Some(Pending {
                seq,
                vcpu,
                space,
                guest: Guest::Ordinary,
                gpa: gfn << 12,
                code: Code::READ,
                ahead: true,
                requested: None,
                overtaken: false,
                withheld: self.expected.nx_huge_pages,
                spurious: false,
                split: None,
                concluded: false,
            });
        }
        if let Some(fault) = &mut self.thread(t).fault {
            fault.requested = Some(requested);
        }
        self.conclude_if_satisfied(t);
    }

    /// The answer may find the page mapped already.
    pub(super) fn conclude_if_satisfied(&mut self, t: u32) {
        let Some(fault) = self
            .thread(t)
            .fault
            .filter(|f| !f.concluded && f.guest == Guest::Ordinary)
        else {
            return;
        };
        let leaf = self.expected.leaf_at(fault.space, fault.gfn());
        if fault.is_satisfied(leaf) {
            self.conclude(t, fault.effect(leaf, leaf, false));
        }
    }

    /// A fault of `t` that split a large leaf did nothing below, or one that found its page repaired is over.
    pub(super) fn conclude_split(&mut self, t: u32) {
        let Some(fault) = self.thread(t).fault.filter(|fault| !fault.concluded) else {
            return;
        };
        let after = self.expected.leaf_at(fault.space, fault.gfn());
        if fault.split.is_some() {
            self.conclude(t, fault.effect(fault.split, after, false));
        } else if fault.spurious && after.is_some_and(|leaf| fault.code.passes(&leaf)) {
            self.conclude(t, fault.effect(after, after, false));
        }
    }

    /// What `t` changed may have done the work of other threads' faults.
    pub(super) fn conclude_overtaken(&mut self, t: u32) {
        let others = self
            .threads
            .iter()
            .filter(|&(&other, thread)| other != t && thread.fault.is_some_and(|f| f.overtaken));
        for other in others.map(|(&other, _)| other).collect::<Vec<_>>() {
            self.conclude_if_satisfied(other);
        }
    }

    pub(super) fn conclude(&mut self, t: u32, conclusion: Conclusion) {
        let Some(fault) = &mut self.thread(t).fault else {
            return;
        };
        fault.concluded = true;
        let fault = *fault;
        self.faults_since_compare += 1;
        self.by(t);
        match conclusion {
            Conclusion::Outside(rule) => self.steps.push(Step::OutsideFault(rule)),
            Conclusion::Compare(answer, recorded) => {
                self.thread(t).class = Class::Fault;
                self.steps.push(Step::Fault(fault.step(answer, recorded)));
            }
        }
    }

    pub(super) fn fast_fault(&mut self, t: u32, fast: &FastFault) {
        let thread = self.thread(t);
        let vcpu = thread.vcpu;
        let space = thread.fault.map(|fault| fault.space);
        let space = space.unwrap_or_else(|| Space::normal(self.space_of(vcpu)));
        let level = fast.level.max(1);
        let gfn = spte::align(fast.gpa >> 12, level);
        let before = self.expected.leaf_at(space, gfn);
        if fast.fixed {
            let repaired = Leaf {
                gfn,
                level,
                spte: fast.new,
            };
            if !repaired.is_writable() {
                let what = Wrong::NotMade(fast.new);
                self.contradict(Contradiction {
                    as_id: space.as_id(),
                    level,
                    gfn,
                    what,
                });
            }
            let change = Change {
                as_id: space.as_id(),
                level,
                gfn,
                old: fast.old,
                new: fast.new,
            };
            match self.expected.repair(space, &change) {
                Ok(()) => self.record(t, &change, Place::Live(space)),
                Err(contradiction) => self.contradict(contradiction),
            }
            self.stamps
                .note(space.as_id(), gfn, gfn + pages(level), t, self.seq);
            self.changed_since_compare = true;
        }
        let fault = self.thread(t).fault;
        let open =
            fault.filter(|f| !f.concluded && f.lies_in(space.as_id(), gfn, gfn + pages(level)));
        if let Some(fault) = open.filter(|_| fast.fixed || fast.spurious) {
            let after = self.expected.leaf_at(space, gfn);
            if fast.fixed {
                self.conclude(t, fault.effect(before, after, false));
            } else if after.is_some_and(|leaf| fault.code.passes(&leaf)) {
                self.conclude(t, fault.effect(after, after, false));
            } else if let Some(fault) = &mut self.thread(t).fault {
                // Who repaired it is told later.
                fault.spurious = true;
            }
        }
    }

    /// KVM says what leaf the fault of `t` made.
    pub(super) fn check_made(&mut self, t: u32, gfn: u64, level: u8, spte: u64) {
        self.conclude_split(t);
        let Some(fault) = self
            .thread(t)
            .fault
            .filter(|fault| fault.guest == Guest::Ordinary)
        else {
            return;
        };
        let made = self.expected.leaf_at(fault.space, gfn);
        let differs =
            |leaf: Leaf| leaf.level != level || (leaf.spte ^ spte) & !spte::ACCESSED_DIRTY != 0;
        if kind(spte, level) == Kind::Leaf && made.is_none_or(differs) {
            let what = Wrong::NotMade(spte);
            self.contradict(Contradiction {
                as_id: fault.space.as_id(),
                level,
                gfn,
                what,
            });
        }
    }

    /// KVM says that the fault of `t` made an MMIO entry.
    pub(super) fn check_marked(&mut self, t: u32, gfn: u64) {
        let Some(fault) = self
            .thread(t)
            .fault
            .filter(|fault| fault.guest == Guest::Ordinary)
        else {
            return;
        };
        if !self.expected.is_mmio(fault.space, gfn) {
            let what = Wrong::NotMarked;
            self.contradict(Contradiction {
                as_id: fault.space.as_id(),
                level: 1,
                gfn,
                what,
            });
        }
    }
}
