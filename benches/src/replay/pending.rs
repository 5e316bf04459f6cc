//! A recorded fault from its report to its outcome, and what the library has to do to match it.
//!
//! Protocol. A fault is *pending* from the processor's report until the trace shows its effect (an entry over the
//! faulting frame changes in the faulting thread) or that it had none (the thread does something else). Threads
//! interleave, so what others do to the same frame meanwhile is remembered: it explains a fault that was overtaken.

use super::expect::Space;
use super::rules::Rule;
use super::spte::{self, Leaf};
use super::step::{Answer, Code, Fault, Recorded};

/// The host's answer as recorded: the level to map, and the host frame unless no slot covers the guest frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Requested {
    pub level: u8,
    pub pfn: Option<u64>,
}

impl Requested {
    /// The level at which the host has the page. KVM tells the level that it set out to map, and a fetch is mapped by the
    /// smallest pages while large ones may not be executed: then it shows by the alignment of the frames, because
    /// frames of different pages are rarely aligned alike.
    fn host_level(&self, gfn: u64, withheld: bool) -> u8 {
        let aligned = |&level: &u8| {
            let pfn = self.pfn.unwrap_or_default();
            (gfn ^ pfn) & (spte::pages(level) - 1) == 0
        };
        match [3, 2].iter().copied().find(aligned) {
            Some(level) if withheld && self.level == 1 => level,
            _ => self.level,
        }
    }
}

/// Whose tables a fault is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guest {
    /// The guest's own.
    Ordinary,
    /// A nested guest without nested paging: the two-dimensional tables, but a root of its own.
    NestedDirect,
    /// A nested guest with nested paging: shadow tables, which are not the two-dimensional MMU's.
    Shadow,
}

/// What shows that a fault had no effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The thread went on.
    Went,
    /// It returned to user space with an error.
    Error,
}

/// What to make of a fault whose outcome is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Conclusion {
    Compare(Answer, Recorded),
    Outside(Rule),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    pub seq: u64,
    pub vcpu: Option<u32>,
    pub space: Space,
    pub guest: Guest,
    pub gpa: u64,
    pub code: Code,
    /// See [`Fault::ahead`].
    pub ahead: bool,
    pub requested: Option<Requested>,
    /// Another thread changed an entry on the way to the frame, or took frames back.
    pub overtaken: bool,
    /// Large pages may not be executed.
    pub withheld: bool,
    /// It found the page mapped as wanted, before the trace shows by whom.
    pub spurious: bool,
    /// It split this large leaf; what it did below has yet to show.
    pub split: Option<Leaf>,
    /// Its effect was seen.
    pub concluded: bool,
}

impl Pending {
    pub(super) fn gfn(&self) -> u64 {
        self.gpa >> 12
    }

    /// Whether the frame lies in `[start, end)` of `as_id`.
    pub(super) fn lies_in(&self, as_id: u8, start: u64, end: u64) -> bool {
        self.space.as_id() == as_id && (start..end).contains(&self.gfn())
    }

    pub(super) fn step(&self, answer: Answer, recorded: Recorded) -> Fault {
        let Self {
            seq,
            vcpu,
            space,
            gpa,
            code,
            ahead,
            ..
        } = *self;
        Fault {
            seq,
            vcpu,
            as_id: space.as_id(),
            gpa,
            code,
            ahead,
            answer,
            recorded,
        }
    }

    /// The recorded answer of the host, which let the page be written if the leaf says so.
    fn answer(&self, leaf: Option<Leaf>) -> Answer {
        match self.requested {
            Some(requested @ Requested { pfn: Some(pfn), .. }) => Answer::Mapped {
                pfn,
                level: requested.host_level(self.gfn(), self.withheld && self.code.is_fetch()),
                writable: leaf.is_none_or(|leaf| leaf.is_host_writable()),
            },
            // Never asked, so never answered; what the library needs not ask for must not matter.
            _ => Answer::Failed,
        }
    }

    /// What to make of it when an entry over the frame changed. `mmio` says that it is an MMIO entry now.
    pub(super) fn effect(
        &self,
        before: Option<Leaf>,
        after: Option<Leaf>,
        mmio: bool,
    ) -> Conclusion {
        if self.guest != Guest::Ordinary {
            return Conclusion::Outside(Rule::NestedGuest);
        }
        let mut answer = self.answer(after);
        let shows = |leaf: Leaf| {
            (
                leaf.gfn,
                leaf.level,
                leaf.pfn(),
                leaf.is_writable(),
                leaf.is_executable(),
            )
        };
        let recorded = match (before.map(shows), after.map(shows)) {
            (_, None) if mmio => Recorded::Mmio,
            (before, after) if before == after => Recorded::Unchanged,
            _ => Recorded::Mapped,
        };
        if let (Recorded::Unchanged, Answer::Failed, Some(leaf)) = (recorded, answer, after) {
            // Found as wanted before the host was asked; the library asks first.
            answer = Answer::Mapped {
                pfn: leaf.pfn_of(self.gfn()),
                level: leaf.level,
                writable: leaf.is_host_writable(),
            };
        }
        Conclusion::Compare(answer, recorded)
    }

    /// Whether the answer found the page mapped as asked for, so that nothing had to change.
    pub(super) fn is_satisfied(&self, leaf: Option<Leaf>) -> bool {
        let Some((leaf, requested)) = leaf.zip(self.requested) else {
            return false;
        };
        requested.pfn.is_some()
            && leaf.level == requested.level
            && (self.ahead || self.code.passes(&leaf))
    }

    /// What to make of it when it had no effect. `leaf` maps the frame now; `mmio` says that an MMIO entry is there;
    /// `read_only` that its slot may not be written.
    pub(super) fn no_effect(
        &self,
        end: End,
        leaf: Option<Leaf>,
        mmio: bool,
        read_only: bool,
    ) -> Conclusion {
        if self.guest != Guest::Ordinary {
            return Conclusion::Outside(Rule::NestedGuest);
        }
        if let Some(leaf) = leaf.filter(|leaf| self.code.is_write() && leaf.is_tracked()) {
            let pfn = leaf.pfn_of(self.gfn());
            let answer = Answer::Mapped {
                pfn,
                level: leaf.level,
                writable: false,
            };
            return Conclusion::Compare(answer, Recorded::Tracked);
        }
        let passes = leaf.is_some_and(|leaf| self.ahead || self.code.passes(&leaf));
        let (answer, recorded) = match self.requested {
            Some(_) if passes => (self.answer(leaf), Recorded::Unchanged),
            Some(Requested { pfn: None, .. }) if mmio || !self.overtaken => {
                (Answer::Failed, Recorded::Mmio)
            }
            Some(_) if self.overtaken => (Answer::Retry, Recorded::Retried),
            // Nothing explains why nothing was made: the library will make it, and the difference shows.
            Some(_) => (self.answer(leaf), Recorded::Unchanged),
            None if self.code.is_reserved() => (Answer::Failed, Recorded::Mmio),
            None if end == End::Error => (Answer::Failed, Recorded::Failed),
            // The host would not be asked to write to such a slot; what it says otherwise must not matter.
            None if read_only && self.code.is_write() => {
                let pfn = leaf.map_or(0, |leaf| leaf.pfn_of(self.gfn()));
                (
                    Answer::Mapped {
                        pfn,
                        level: 1,
                        writable: false,
                    },
                    Recorded::Mmio,
                )
            }
            None => (Answer::Retry, Recorded::Retried),
        };
        Conclusion::Compare(answer, recorded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ_ONLY: Leaf = Leaf {
        gfn: 5,
        level: 1,
        spte: 0x7825,
    };
    const WRITABLE: Leaf = Leaf {
        gfn: 5,
        level: 1,
        spte: 0x7e67,
    };
    const PROTECTED: Leaf = Leaf {
        gfn: 5,
        level: 1,
        spte: 0x7e65,
    };
    const TRACKED: Leaf = Leaf {
        gfn: 5,
        level: 1,
        spte: 0x7a65,
    };
    fn write(present: bool) -> Pending {
        Pending {
            seq: 0,
            vcpu: Some(0),
            space: Space::normal(0),
            guest: Guest::Ordinary,
            gpa: 0x5010,
            code: Code(1 << 32 | 6 | u64::from(present)),
            ahead: false,
            requested: None,
            overtaken: false,
            withheld: false,
            spurious: false,
            split: None,
            concluded: false,
        }
    }

    fn asked(pending: Pending) -> Pending {
        Pending {
            requested: Some(Requested {
                level: 1,
                pfn: Some(7),
            }),
            ..pending
        }
    }

    fn end(pending: &Pending, leaf: Option<Leaf>) -> Conclusion {
        pending.no_effect(End::Went, leaf, false, false)
    }

    #[test]
    fn a_first_touch_is_compared() {
        let mapped = Answer::Mapped {
            pfn: 7,
            level: 1,
            writable: true,
        };
        let fault = asked(write(false));
        assert_eq!(
            fault.effect(None, Some(WRITABLE), false),
            Conclusion::Compare(mapped, Recorded::Mapped)
        );
        let read = Pending {
            code: Code::READ,
            ..fault
        };
        let mapped = Answer::Mapped {
            pfn: 7,
            level: 1,
            writable: false,
        };
        assert_eq!(
            read.effect(None, Some(READ_ONLY), false),
            Conclusion::Compare(mapped, Recorded::Mapped)
        );
        // Only the dirty bit changed: nothing that a guest could see.
        let prefault = Pending {
            ahead: true,
            code: Code::READ,
            ..fault
        };
        let again = Leaf {
            spte: 0x7e07,
            ..WRITABLE
        };
        assert!(matches!(
            prefault.effect(Some(WRITABLE), Some(again), false),
            Conclusion::Compare(_, Recorded::Unchanged)
        ));
    }

    #[test]
    fn what_sweeps_took_is_given_back_without_asking() {
        let fault = write(true);
        assert_eq!(
            fault.effect(Some(PROTECTED), Some(WRITABLE), false),
            Conclusion::Compare(Answer::Failed, Recorded::Mapped)
        );
        let found = Answer::Mapped {
            pfn: 7,
            level: 1,
            writable: true,
        };
        assert_eq!(
            fault.effect(Some(WRITABLE), Some(WRITABLE), false),
            Conclusion::Compare(found, Recorded::Unchanged)
        );
        let tracked = Answer::Mapped {
            pfn: 7,
            level: 1,
            writable: false,
        };
        assert_eq!(
            end(&fault, Some(TRACKED)),
            Conclusion::Compare(tracked, Recorded::Tracked)
        );
    }

    #[test]
    fn a_nested_guest_is_no_business_of_the_librarys() {
        let shadow = Pending {
            guest: Guest::Shadow,
            ..write(false)
        };
        assert_eq!(end(&shadow, None), Conclusion::Outside(Rule::NestedGuest));
    }

    #[test]
    fn copy_on_write_is_tried_again() {
        // The host let the page only be read; the write finds it so, and the guest is to try again.
        let retried = Conclusion::Compare(Answer::Retry, Recorded::Retried);
        assert_eq!(end(&write(true), Some(READ_ONLY)), retried);
        assert_eq!(end(&write(false), None), retried);
    }

    #[test]
    fn an_answer_without_effect_needs_a_reason() {
        let fault = asked(write(false));
        assert!(matches!(
            end(&fault, Some(WRITABLE)),
            Conclusion::Compare(_, Recorded::Unchanged)
        ));
        assert!(fault.is_satisfied(Some(WRITABLE)) && !fault.is_satisfied(Some(READ_ONLY)));
        let overtaken = Pending {
            overtaken: true,
            ..fault
        };
        assert_eq!(
            end(&overtaken, None),
            Conclusion::Compare(Answer::Retry, Recorded::Retried)
        );
        // Nobody overtook it, and yet nothing is there: the library will map it, and that is a difference.
        let mapped = Answer::Mapped {
            pfn: 7,
            level: 1,
            writable: true,
        };
        assert_eq!(
            end(&fault, None),
            Conclusion::Compare(mapped, Recorded::Unchanged)
        );
    }

    #[test]
    fn device_memory_and_failures() {
        let cached = Pending {
            code: Code(1 << 32 | 0xe),
            ..write(false)
        };
        assert_eq!(
            end(&cached, None),
            Conclusion::Compare(Answer::Failed, Recorded::Mmio)
        );
        let fault = write(true);
        let to_rom = fault.no_effect(End::Went, Some(READ_ONLY), false, true);
        let asked_anyway = Answer::Mapped {
            pfn: 7,
            level: 1,
            writable: false,
        };
        assert_eq!(to_rom, Conclusion::Compare(asked_anyway, Recorded::Mmio));
        let failed = write(false).no_effect(End::Error, None, false, false);
        assert_eq!(
            failed,
            Conclusion::Compare(Answer::Failed, Recorded::Failed)
        );
        let hole = Pending {
            requested: Some(Requested {
                level: 1,
                pfn: None,
            }),
            ..write(false)
        };
        assert_eq!(
            hole.effect(None, None, true),
            Conclusion::Compare(Answer::Failed, Recorded::Mmio)
        );
    }
}
