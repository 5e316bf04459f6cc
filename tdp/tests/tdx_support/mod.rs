//! What the tests of the TDX module's model share: a module with one TD, addresses, and the guard that a refused call
//! changes nothing.
#![allow(dead_code, reason = "each user takes a part of it")]

use std::sync::{Arc, Mutex};
use tdp::protected::tdx::{
    Accept, Answer, Call, Costs, EntryView, Hooks, Lifecycle, OpState, Operand, PageInfo, PageKind,
    Status, Td, TdConfig, TdxConfig, TdxModule,
};
use tdp::{Gpa, Hpa, Level, Pfn};

/// Size of a page by the module's numbers.
pub(crate) const PAGE: Level = Level::L1;
pub(crate) const LARGE: Level = Level::L2;
pub(crate) const HUGE: Level = Level::L3;
pub(crate) const TOP: Level = Level::L4;

/// Memory that the modules of tests manage: 64 MiB from 16 MiB on.
pub(crate) const MEMORY: std::ops::Range<Pfn> = Pfn(0x1000)..Pfn(0x5000);

/// Where tests have their 4 KiB pages, tables first.
pub(crate) fn page(n: u64) -> Hpa {
    Hpa((0x1000 + n) << 12)
}

/// Where they have control pages: in a 2 MiB block of their own, which every call locks shared on its way.
pub(crate) fn control(n: u64) -> Hpa {
    Hpa((0x4000 + n) << 12)
}

/// Free 2 MiB pages, at most 22 of them: none of the above lies in them.
pub(crate) fn large_page(n: u64) -> Hpa {
    Hpa((0x1200 + n * 0x200) << 12)
}

pub(crate) fn at(gpa: u64, level: Level) -> PageInfo {
    PageInfo::new(Gpa(gpa), level)
}

/// A module with one TD, whose pages are `control(0..3)`.
pub(crate) struct Rig {
    pub(crate) module: TdxModule,
    pub(crate) td: Td,
}

type Intruder = Box<dyn FnOnce() + Send>;

/// Runs something of the test's inside one call, with all locks of that call held. What it calls on the same TD meets
/// those locks, as a call of another thread would.
#[derive(Clone, Default)]
pub(crate) struct Meanwhile(Arc<Mutex<Option<(Call, Intruder)>>>);

impl Meanwhile {
    /// Runs `intruder` inside the next `call`.
    pub(crate) fn inside(&self, call: Call, intruder: impl FnOnce() + Send + 'static) {
        *self.0.lock().unwrap() = Some((call, Box::new(intruder)));
    }

    /// Whether the intruder has run.
    pub(crate) fn is_over(&self) -> bool {
        self.0.lock().unwrap().is_none()
    }
}

impl Hooks for Meanwhile {
    fn inside(&self, call: Call) {
        let due = self.0.lock().unwrap().take_if(|(on, _)| *on == call);
        if let Some((_, intruder)) = due {
            intruder();
        }
    }
}

impl Rig {
    /// A TD that is created and no more.
    pub(crate) fn created(costs: Costs, hooks: impl Hooks + 'static) -> Self {
        let config = TdxConfig {
            memory: MEMORY,
            costs,
        };
        let module = TdxModule::with_hooks(config, hooks).unwrap();
        let td = module
            .create_td(TdConfig::new(control(0), control(1), control(2)))
            .unwrap();
        Self { module, td }
    }

    /// A TD that is being built, without a table.
    pub(crate) fn building() -> Self {
        let rig = Self::created(Costs::default(), ());
        done(rig.td.mng_init());
        rig
    }

    /// A TD that runs, with tables `page(3..=5)` down to the 4 KiB entries of its first 2 MiB, and a vCPU
    /// at `control(3)`.
    pub(crate) fn running() -> Self {
        Self::running_with(Costs::default(), ())
    }

    pub(crate) fn running_with(costs: Costs, hooks: impl Hooks + 'static) -> Self {
        let rig = Self::created(costs, hooks);
        done(rig.td.mng_init());
        rig.add_tables();
        drop(rig.td.vp_create(control(3)).unwrap());
        done(rig.td.mr_finalize());
        rig
    }

    pub(crate) fn add_tables(&self) {
        for (n, level) in [(3, TOP), (4, HUGE), (5, LARGE)] {
            done(self.td.mem_sept_add(at(0, level), page(n)));
        }
    }

    /// Puts `page` at `gpa` as pending, accepts it and leaves it mapped.
    pub(crate) fn map(&self, gpa: u64, level: Level, page: Hpa) {
        done(self.td.mem_page_aug(at(gpa, level), page));
        done(accepted(self.td.page_accept(at(gpa, level))));
    }

    /// Blocks and tracks an entry while nobody is inside.
    pub(crate) fn block_and_track(&self, gpa: u64, level: Level) {
        done(self.td.mem_range_block(at(gpa, level)));
        done(self.td.mem_track());
    }

    /// Everything that a refused call must leave alone.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let mut entries = Vec::new();
        self.td.visit_entries(|entry| entries.push(entry));
        let kinds = (MEMORY.start.0..MEMORY.start.0 + 0x800)
            .map(|pfn| self.module.page_kind(Hpa(pfn << 12)))
            .collect();
        Snapshot {
            entries,
            kinds,
            children: self.td.child_count(),
            epoch: self.td.epoch(),
            state: (self.td.op_state(), self.td.lifecycle()),
            measured: self.td.measured().len(),
        }
    }

    /// Makes a call that must be refused so, and must leave everything as it was. Returns RCX and RDX.
    #[track_caller]
    pub(crate) fn refused(
        &self,
        call: impl FnOnce(&Td) -> Answer,
        status: Status,
        operand: Operand,
    ) -> (Option<u64>, Option<u64>) {
        let before = self.snapshot();
        let answer = call(&self.td);
        assert!(answer.is(status, operand), "answered {answer}");
        assert_eq!(self.snapshot(), before, "a refused call changed something");
        (answer.rcx, answer.rdx)
    }
}

/// The answer to an ACCEPT that is not to end in an exit.
#[track_caller]
pub(crate) fn accepted(accept: Accept) -> Answer {
    match accept {
        Accept::Answered(answer) => answer,
        Accept::Exit(exit) => panic!("{exit:?}"),
    }
}

#[derive(PartialEq, Debug)]
pub(crate) struct Snapshot {
    entries: Vec<EntryView>,
    kinds: Vec<Option<(PageKind, Level)>>,
    children: u64,
    epoch: u64,
    state: (OpState, Lifecycle),
    measured: usize,
}

#[track_caller]
pub(crate) fn done(answer: Answer) {
    assert!(answer.is_success(), "answered {answer}");
}
