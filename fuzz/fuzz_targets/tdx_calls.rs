//! Arbitrary calls to the model of the TDX module: wrong ones are refused, none panics, and the books hold.
//!
//! Two TDs share a few pages, so that wrong owners, wrong states and wrong orders meet. After every call:
//!
//! * one that was refused has changed nothing;
//! * the audit log has grown by one if a correct host would not have made it, and else not at all;
//! * every page that an entry holds is of the right kind and size and in no other entry, and the TDs own as many pages as
//!   they say;
//! * nothing was taken away, split, merged or let in again while a vCPU inside may still go by what it has cached of it:
//!   a translation, or a table on the way to one.
//!
//! In the end both TDs are torn down, and every page is free.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use std::collections::BTreeMap;
use tdp::protected::tdx::{
    Accept, Answer, Call, Enter, EntryState, EntryView, Exit, Hooks, Lifecycle, OpState, PageInfo,
    PageKind, Status, Td, TdConfig, TdVcpu, TdxConfig, TdxModule,
};
use tdp::{Gpa, Hpa, Level, Pfn};
use tdp_arch::walker::GuestAccess;

/// Where the memory of the module begins: one block of 2 MiB with small pages in use, then two for large pages.
const FIRST: u64 = 0x1000;
const BLOCK: u64 = 512;
const BLOCKS: u64 = 3;
/// Pages of the first block that calls name.
const SMALL: u64 = 24;
/// Pages of the other blocks that calls name.
const NAMED: u64 = 8;
const MOST_STEPS: usize = 48;
const MOST_VCPUS: usize = 2;

/// Addresses that meet each other, and some that are malformed.
const GPAS: [u64; 12] = [
    0,
    0x1000,
    0x2000,
    0x1f_f000,
    0x20_0000,
    0x20_1000,
    0x4000_0000,
    0x80_0000_0000,
    1 << 47,
    (1 << 47) - 0x1000,
    0x1008,
    1 << 52,
];

#[derive(Debug, Arbitrary)]
struct Input {
    five_levels: bool,
    /// How far the first TD is built before the steps.
    built: u8,
    steps: Vec<Step>,
}

#[derive(Clone, Copy, Debug, Arbitrary)]
struct At {
    gpa: u8,
    level: u8,
}

impl At {
    fn gpa(self) -> Gpa {
        Gpa(GPAS[usize::from(self.gpa) % GPAS.len()])
    }

    fn level(self) -> Level {
        Level::from_number(self.level % 5 + 1).unwrap_or(Level::L1)
    }

    fn info(self) -> PageInfo {
        if self.level >= 0xf0 {
            // Bits that must be zero, levels that do not exist.
            return PageInfo::from_raw(self.gpa().0 | u64::from(self.level & 0xf) << 3 | 7);
        }
        let gpa = self.gpa().0;
        // Mostly aligned to the level.
        let aligned = if self.level < 0x80 {
            gpa & !(self.level().bytes() - 1)
        } else {
            gpa
        };
        PageInfo::new(Gpa(aligned), self.level())
    }
}

#[derive(Clone, Copy, Debug, Arbitrary)]
struct Page(u8);

impl Page {
    fn hpa(self) -> Hpa {
        let n = u64::from(self.0);
        Hpa(match n {
            0..0xc0 => (FIRST + n % SMALL) << 12,
            0xc0..0xf0 => (FIRST + BLOCK * (1 + n % (BLOCKS - 1))) << 12,
            // Inside a block, outside the memory, not aligned.
            0xf0..0xf8 => (FIRST + BLOCK + n - 0xf0) << 12,
            0xf8..0xfc => (FIRST + BLOCK * BLOCKS + n) << 12,
            _ => (FIRST << 12) + 8 * n,
        })
    }
}

#[derive(Clone, Copy, Debug, Arbitrary)]
struct Step {
    td: bool,
    action: Action,
}

#[derive(Clone, Copy, Debug, Arbitrary)]
enum Action {
    Init,
    VpCreate(Page),
    Extend(At),
    Finalize,
    Migrate(u8),
    Add(At, Page, Page),
    Aug(At, Page),
    Remove(At),
    Demote(At, Page),
    Promote(At),
    Block(At),
    Unblock(At),
    Track,
    SeptAdd(At, Page),
    SeptRemove(At),
    SeptRead(At),
    Accept(At),
    Enter(u8, u8),
    Exit(u8, u8, bool),
    Touch(u8, At, bool),
    Flush(u8),
    VpFlushDone,
    CacheWb,
    KeyFree,
    Reclaim(Page),
    Interrupts(u8),
    /// The next call is met by a call of another thread while it holds its locks.
    Meet(At, u8),
}

/// Everything that a refused call must leave alone.
#[derive(Default, PartialEq)]
struct View {
    entries: [Vec<EntryView>; 2],
    kinds: Vec<(PageKind, Level)>,
    tds: Option<[TdView; 2]>,
}

/// Pages, epoch, states, length of what is measured.
type TdView = (u64, u64, OpState, Lifecycle, usize);

/// What a vCPU may have cached of one entry: the translation of a page, or a table that it goes on from.
struct Cached {
    gpa: Gpa,
    /// Of the entry.
    level: Level,
    hpa: Hpa,
    kind: PageKind,
    /// The entry was changed since.
    stale: bool,
}

struct Runner {
    vcpu: TdVcpu,
    cached: Vec<Cached>,
}

type Intruder = Box<dyn FnOnce() + Send>;

/// A call of another thread in the middle of one.
#[derive(Clone, Default)]
struct Meanwhile(std::sync::Arc<std::sync::Mutex<Option<Intruder>>>);

impl Hooks for Meanwhile {
    fn inside(&self, _call: Call) {
        let due = self.0.lock().expect("no test panics here").take();
        if let Some(intruder) = due {
            intruder();
        }
    }
}

struct Guests {
    module: TdxModule,
    tds: [Td; 2],
    vcpus: [Vec<Runner>; 2],
    meanwhile: Meanwhile,
    violations: u64,
    /// After the last call.
    last: View,
}

fn page(n: u64) -> Hpa {
    Hpa((FIRST + n) << 12)
}

fn all_pages() -> impl Iterator<Item = Hpa> {
    (FIRST..FIRST + BLOCK * BLOCKS).map(|pfn| Pfn(pfn).address())
}

impl Guests {
    fn new(five_levels: bool) -> Self {
        let meanwhile = Meanwhile::default();
        let memory = Pfn(FIRST)..Pfn(FIRST + BLOCK * BLOCKS);
        let module = TdxModule::with_hooks(TdxConfig::new(memory), meanwhile.clone())
            .expect("memory that can be managed");
        let td = |n: u64, levels| {
            let config = TdConfig {
                levels,
                ..TdConfig::new(page(n), page(n + 1), page(n + 2))
            };
            module.create_td(config).expect("free pages")
        };
        let levels = if five_levels { Level::L5 } else { Level::L4 };
        Self {
            tds: [td(SMALL, levels), td(SMALL + 3, Level::L4)],
            module,
            vcpus: Default::default(),
            meanwhile,
            violations: 0,
            last: View::default(),
        }
    }

    /// Builds the first TD as far as `how_far` says, so that not every sequence has to find the way: from nothing to pages
    /// and tables that wait for one last call while a vCPU may go by them.
    fn build(&mut self, how_far: u8) {
        let how_far = how_far % 16;
        // From here on it goes another way, to a TD that is paused, and back.
        let exported = how_far.saturating_sub(11);
        let how_far = if exported > 0 { 6 } else { how_far };
        let levels = self.tds[0].levels();
        let done = |answer: Answer| assert!(answer.is_success(), "{answer}");
        let tables = [Level::L5, Level::L4, Level::L3, Level::L2];
        if how_far >= 1 {
            done(self.tds[0].mng_init());
        }
        if how_far >= 2 {
            for (n, level) in tables
                .into_iter()
                .filter(|level| *level <= levels)
                .enumerate()
            {
                done(self.tds[0].mem_sept_add(PageInfo::new(Gpa(0), level), page(n as u64)));
            }
        }
        if how_far >= 3 {
            let vcpu = self.tds[0].vp_create(page(5)).expect("a free page");
            self.vcpus[0].push(Runner {
                vcpu,
                cached: Vec::new(),
            });
            done(self.tds[0].mr_finalize());
        }
        let small = PageInfo::new(Gpa(0), Level::L1);
        let large = PageInfo::new(Gpa(0x20_0000), Level::L2);
        let accept = |td: &Td, info| {
            let accepted = td.page_accept(info);
            assert!(matches!(accepted, Accept::Answered(answer) if answer.is_success()));
        };
        if how_far >= 4 {
            done(self.tds[0].mem_page_aug(small, page(6)));
            accept(&self.tds[0], small);
        }
        if how_far >= 5 {
            // Inside, with a translation of that page.
            self.vcpu_step(0, Action::Enter(0, 0));
            self.vcpu_step(0, Action::Touch(0, At { gpa: 0, level: 0 }, true));
            assert!(self.vcpus[0][0].vcpu.is_inside());
        }
        if how_far >= 6 {
            // And one of a large page.
            done(self.tds[0].mem_page_aug(large, page(BLOCK)));
            accept(&self.tds[0], large);
            self.vcpu_step(0, Action::Touch(0, At { gpa: 4, level: 0 }, true));
        }
        if how_far >= 7 {
            done(self.tds[0].mem_range_block(small));
            done(self.tds[0].mem_range_block(large));
        }
        if how_far >= 8 {
            done(self.tds[0].mem_track());
        }
        if how_far >= 9 {
            self.vcpu_step(0, Action::Exit(0, 0, false));
        }
        if how_far >= 10 {
            // The small page is gone, and the vCPU inside has been where it was.
            done(self.tds[0].mem_page_remove(small));
            self.ended(0, At { gpa: 0, level: 0 });
            self.vcpu_step(0, Action::Enter(0, 0));
            self.vcpu_step(0, Action::Touch(0, At { gpa: 0, level: 0 }, true));
        }
        if how_far >= 11 {
            done(self.tds[0].mem_range_block(PageInfo::new(Gpa(0), Level::L2)));
        }
        if exported >= 1 {
            done(self.tds[0].migrate(OpState::LiveExport));
            let paused = self.tds[0].migrate(OpState::PausedExport);
            assert!(!paused.is_success(), "paused with a vCPU inside");
        }
        if exported >= 2 {
            self.vcpu_step(0, Action::Exit(0, 0, false));
            done(self.tds[0].migrate(OpState::PausedExport));
        }
        if exported >= 3 {
            done(self.tds[0].mem_page_remove(small));
            self.ended(0, At { gpa: 0, level: 0 });
        }
        if exported >= 4 {
            done(self.tds[0].migrate(OpState::Runnable));
        }
    }

    /// Shows the entries that calls can name: of all others, every one is shown at the end.
    fn view(&self) -> View {
        let entries = [0, 1].map(|n| {
            let mut entries = Vec::with_capacity(32);
            for level in Level::ALL {
                let firsts = GPAS.map(|gpa| gpa & !(level.bytes() - 1));
                for (i, first) in firsts.iter().enumerate() {
                    if !firsts[..i].contains(first) {
                        entries.extend(self.tds[n].entry(Gpa(*first), level));
                    }
                }
            }
            entries.retain(|entry| entry.state != EntryState::Free);
            entries
        });
        self.view_with(entries)
    }

    fn whole_view(&self) -> View {
        self.view_with([0, 1].map(|n| {
            let mut entries = Vec::new();
            self.tds[n].visit_entries(|entry| entries.push(entry));
            entries
        }))
    }

    fn view_with(&self, entries: [Vec<EntryView>; 2]) -> View {
        let of = |hpa| self.module.page_kind(hpa).expect("a page of the module");
        let mut kinds: Vec<_> = (0..SMALL + 8).map(|n| of(page(n))).collect();
        for block in 1..BLOCKS {
            // Calls name its first pages; of all the others either each or none is in use.
            let first: Vec<_> = (0..NAMED).map(|n| of(page(block * BLOCK + n))).collect();
            let in_small_pages = first
                .iter()
                .any(|&(kind, level)| kind != PageKind::Nda && level == Level::L1);
            kinds.extend(first.iter().take(if first[0].1 == Level::L1 {
                first.len()
            } else {
                1
            }));
            if in_small_pages {
                kinds.extend((NAMED..BLOCK).map(|n| of(page(block * BLOCK + n))));
            }
        }
        let tds = [0, 1].map(|n| {
            let td = &self.tds[n];
            let measured = td.measured().len();
            (
                td.child_count(),
                td.epoch(),
                td.op_state(),
                td.lifecycle(),
                measured,
            )
        });
        View {
            entries,
            kinds,
            tds: Some(tds),
        }
    }

    /// What must hold at all times.
    fn check(&self, view: &View) {
        let tds = view.tds.expect("a view of the TDs");
        let owned: u64 = view
            .kinds
            .iter()
            .filter(|(kind, _)| !matches!(kind, PageKind::Nda | PageKind::Tdr))
            .map(|(_, level)| level.pages())
            .sum();
        assert_eq!(owned, tds[0].0 + tds[1].0, "pages of TDs");
        let mut held = BTreeMap::new();
        for (n, entries) in view.entries.iter().enumerate() {
            if tds[n].3 == Lifecycle::Teardown {
                continue;
            }
            for entry in entries {
                let Some(hpa) = entry.page else {
                    assert!(!entry.state.is_leaf() && !entry.state.is_table());
                    continue;
                };
                let expected = if entry.state.is_table() {
                    (PageKind::Ept, Level::L1)
                } else {
                    (PageKind::Reg, entry.level)
                };
                assert_eq!(self.module.page_kind(hpa), Some(expected), "{entry:?}");
                let other = held.insert(hpa, entry);
                assert!(other.is_none(), "{entry:?} and {other:?}");
            }
        }
    }

    /// Judges a refusal or a success: returns whether it must have changed nothing.
    fn judge(&self, call: Action, of_host: bool, answer: Answer) -> bool {
        let noted = self.module.violation_count() - self.violations;
        let wrong = !answer.is_success() && !answer.status.is_transient();
        // That is the guest's doing as well, which has accepted some pages and not others.
        let excused = answer.status == Status::EptInvalidPromoteConditions;
        match of_host {
            false => assert_eq!(noted, 0, "{call:?}: {answer}"),
            true if answer.status == Status::TlbTrackingNotDone || answer.is_success() || wrong => {
                assert!(
                    noted <= 1 && (!wrong || excused || noted == 1),
                    "{call:?}: {answer}, {noted} noted"
                );
                assert!(noted == 0 || !answer.is_success(), "{call:?}: {answer}");
            }
            true => assert_eq!(noted, 0, "{call:?}: {answer}"),
        }
        !answer.is_success()
    }

    /// The entry at `at` was taken away, or what is below it was changed: nobody inside may go by it, and who is outside may
    /// not come in with it.
    fn ended(&mut self, n: usize, at: At) {
        let gpa = at.info().raw() & !0xfff;
        let range = gpa..gpa + at.level().bytes();
        for runner in &mut self.vcpus[n] {
            let by_it =
                |cached: &&mut Cached| cached.level <= at.level() && range.contains(&cached.gpa.0);
            for cached in runner.cached.iter_mut().filter(by_it) {
                let hpa = cached.hpa;
                assert!(!runner.vcpu.is_inside(), "{hpa} taken from a vCPU inside");
                cached.stale = true;
            }
        }
    }

    fn step(&mut self, step: Step) {
        let n = usize::from(step.td);
        self.violations = self.module.violation_count();
        let td = self.tds[n].clone();
        let met = self.meanwhile.0.lock().expect("no panic").is_some();
        // What a call puts an end to if it succeeds.
        let mut ending = None;
        let (of_host, answer) = match step.action {
            Action::Init => (true, td.mng_init()),
            Action::VpCreate(page) if self.vcpus[n].len() < MOST_VCPUS => {
                match td.vp_create(page.hpa()) {
                    Ok(vcpu) => {
                        self.vcpus[n].push(Runner {
                            vcpu,
                            cached: Vec::new(),
                        });
                        return self.after(false);
                    }
                    Err(answer) => (true, answer),
                }
            }
            Action::Extend(at) => (true, td.mr_extend(at.gpa())),
            Action::Finalize => (true, td.mr_finalize()),
            Action::Migrate(to) => (true, td.migrate(STATES[usize::from(to) % STATES.len()])),
            Action::Add(at, page, source) => {
                (true, td.mem_page_add(at.info(), page.hpa(), source.hpa()))
            }
            Action::Aug(at, page) => (true, td.mem_page_aug(at.info(), page.hpa())),
            Action::Remove(at) => {
                ending = Some(at);
                (true, td.mem_page_remove(at.info()))
            }
            Action::Demote(at, page) => {
                ending = Some(at);
                (true, td.mem_page_demote(at.info(), page.hpa()))
            }
            Action::Promote(at) => {
                ending = Some(at);
                (true, td.mem_page_promote(at.info()))
            }
            Action::Block(at) => (true, td.mem_range_block(at.info())),
            Action::Unblock(at) => {
                ending = Some(at);
                (true, td.mem_range_unblock(at.info()))
            }
            Action::Track => (true, td.mem_track()),
            Action::SeptAdd(at, page) => (true, td.mem_sept_add(at.info(), page.hpa())),
            Action::SeptRemove(at) => {
                ending = Some(at);
                (true, td.mem_sept_remove(at.info()))
            }
            Action::SeptRead(at) => (true, td.mem_sept_rd(at.info())),
            Action::Accept(at) => match td.page_accept(at.info()) {
                Accept::Answered(answer) => (false, answer),
                Accept::Exit(_) => return self.after(!met),
            },
            Action::VpFlushDone => (true, td.mng_vpflushdone()),
            Action::CacheWb => (true, td.phymem_cache_wb()),
            Action::KeyFree => (true, td.mng_key_freeid()),
            Action::Reclaim(page) => (true, td.phymem_page_reclaim(page.hpa())),
            Action::Interrupts(polls) => {
                td.pend_interrupts(u32::from(polls % 4));
                return;
            }
            Action::Meet(at, what) => {
                let intruder = td.clone();
                let intrude = move || {
                    let info = at.info();
                    let _ = match what % 6 {
                        0 => intruder.mem_range_block(info),
                        1 => intruder.mem_page_remove(info),
                        2 => intruder.mem_track(),
                        3 => intruder.mem_sept_rd(info),
                        4 => intruder.mem_page_aug(info, page(u64::from(what) % SMALL)),
                        _ => intruder.mem_range_unblock(info),
                    };
                };
                *self.meanwhile.0.lock().expect("no panic") = Some(Box::new(intrude));
                return;
            }
            _ => match self.vcpu_step(n, step.action) {
                Some(answer) => (true, answer),
                None => return self.after(false),
            },
        };
        if answer.is_success()
            && let Some(at) = ending
        {
            self.ended(n, at);
        }
        self.drop_cached_of_free_pages();
        let met = met && self.meanwhile.0.lock().expect("no panic").is_none();
        if met {
            // What the intruder was answered is judged by what must hold, not by what it noted.
            return self.after(false);
        }
        let refused = self.judge(step.action, of_host, answer);
        self.after(refused);
    }

    /// Pages may have been taken away, by whatever call, an intruder's too: nobody inside can have one of them.
    fn drop_cached_of_free_pages(&mut self) {
        for n in 0..2 {
            for runner in &mut self.vcpus[n] {
                for cached in &mut runner.cached {
                    let kind = self.module.page_kind(cached.hpa);
                    if kind.is_none_or(|(kind, _)| kind != cached.kind) {
                        assert!(!runner.vcpu.is_inside(), "taken from a vCPU inside");
                        cached.stale = true;
                    }
                }
            }
        }
    }

    fn after(&mut self, refused: bool) {
        let view = self.view();
        if refused {
            assert!(self.last == view, "a refused call changed something");
        } else {
            self.check(&view);
            self.last = view;
        }
    }

    fn vcpu_step(&mut self, n: usize, action: Action) -> Option<Answer> {
        let (Action::Enter(which, _)
        | Action::Exit(which, _, _)
        | Action::Touch(which, _, _)
        | Action::Flush(which)) = action
        else {
            return None;
        };
        let at = usize::from(which).checked_rem(self.vcpus[n].len())?;
        let runner = &mut self.vcpus[n][at];
        match action {
            Action::Enter(_, rip) => match runner.vcpu.enter(u64::from(rip % 4)) {
                Enter::Inside(entered) => {
                    if entered.flush {
                        runner.cached.clear();
                    }
                    let stale = runner.cached.iter().any(|cached| cached.stale);
                    assert!(!stale, "entered with a translation of a page that is gone");
                    None
                }
                Enter::Exited(_) => None,
                Enter::Refused(answer) => Some(answer),
            },
            Action::Exit(_, rip, violation) => {
                let rip = u64::from(rip % 4);
                let gpa = Gpa(GPAS[usize::from(which >> 4) % GPAS.len()]);
                runner.vcpu.exit(match violation {
                    true => Exit::EptViolation { gpa, rip },
                    false => Exit::Other { rip },
                });
                None
            }
            Action::Touch(_, at, write) if runner.vcpu.is_inside() => {
                let access = if write {
                    GuestAccess::Write
                } else {
                    GuestAccess::Read
                };
                let (td, gpa) = (&self.tds[n], at.gpa());
                let mut cache = |level, hpa, kind| {
                    runner.cached.push(Cached {
                        gpa,
                        level,
                        hpa: Hpa(hpa & !0xfff),
                        kind,
                        stale: false,
                    });
                };
                // The tables on the way, whether it gets to a page or not.
                for level in Level::ALL.into_iter().rev() {
                    let Some(entry) = td.entry(gpa, level) else {
                        continue;
                    };
                    let Some(hpa) = entry
                        .page
                        .filter(|_| entry.state == EntryState::TableMapped)
                    else {
                        break;
                    };
                    cache(level, hpa.0, PageKind::Ept);
                }
                if let Ok(found) = td.translate(gpa, access) {
                    let (kind, _) = self.module.page_kind(found.hpa).expect("a page");
                    assert_eq!(kind, PageKind::Reg, "the guest reaches {}", found.hpa);
                    cache(found.level, found.hpa.0, kind);
                }
                None
            }
            Action::Flush(_) => {
                let answer = runner.vcpu.flush();
                if answer.is_success() {
                    runner.cached.clear();
                }
                Some(answer)
            }
            _ => None,
        }
    }

    /// Takes both TDs down, and all of their pages back.
    fn tear_down(mut self) {
        for n in 0..2 {
            for mut runner in self.vcpus[n].drain(..) {
                runner.vcpu.exit(Exit::Other { rip: 0 });
                let _ = runner.vcpu.flush();
            }
        }
        let done = |answer: Answer| assert!(answer.is_success(), "{answer}");
        for td in &self.tds {
            td.pend_interrupts(0);
            if td.lifecycle() == Lifecycle::KeysConfigured {
                done(td.mng_vpflushdone());
            }
            if td.lifecycle() == Lifecycle::Blocked {
                done(td.phymem_cache_wb());
                done(td.mng_key_freeid());
            }
            for hpa in all_pages() {
                let (kind, level) = self.module.page_kind(hpa).expect("a page");
                let within = hpa.0.is_multiple_of(level.bytes());
                if within && !matches!(kind, PageKind::Nda | PageKind::Tdr) {
                    // Those of the other TD are refused.
                    let _ = td.phymem_page_reclaim(hpa);
                }
            }
            assert_eq!(td.child_count(), 0);
            if self
                .module
                .page_kind(td.tdr())
                .is_some_and(|(kind, _)| kind == PageKind::Tdr)
            {
                done(td.phymem_page_reclaim(td.tdr()));
            }
        }
        let free = |hpa| self.module.page_kind(hpa) == Some((PageKind::Nda, Level::L1));
        assert!(all_pages().all(free), "a page is lost");
    }
}

const STATES: [OpState; 11] = [
    OpState::Uninitialized,
    OpState::Initialized,
    OpState::Runnable,
    OpState::LiveExport,
    OpState::PausedExport,
    OpState::PostExport,
    OpState::MemoryImport,
    OpState::StateImport,
    OpState::PostImport,
    OpState::LiveImport,
    OpState::FailedImport,
];

fuzz_target!(|input: Input| {
    let mut guests = Guests::new(input.five_levels);
    guests.build(input.built);
    guests.after(false);
    for &step in input.steps.iter().take(MOST_STEPS) {
        guests.step(step);
    }
    guests.meanwhile.0.lock().expect("no panic").take();
    guests.check(&guests.whole_view());
    guests.tear_down();
});
