//! Calls from many threads: who meets whom, who does not, and that the books are right afterwards.
#![cfg(not(loom))]

mod tdx_support;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};
use tdp::protected::tdx::{
    Accept, Answer, Call, Costs, Enter, Entered, EntryState, Exit, Hooks, Operand, PageKind,
    Status, Td, TdVcpu, Wait,
};
use tdp::{Gpa, Hpa, Level};
use tdp_arch::walker::GuestAccess;
use tdx_support::{LARGE, PAGE, Rig, accepted, at, control, done, large_page, page};

/// Bytes of 2 MiB.
const REGION: u64 = 0x20_0000;

/// Refusals that a caller may meet and has to repeat, by call.
type Met = BTreeSet<(Call, Status, Operand)>;

/// Makes a call until it is done, noting what it meets, and returns RCX. What is not transient ends the test.
fn insist(met: &mut Met, call: Call, mut make: impl FnMut() -> Answer) -> Option<u64> {
    loop {
        let answer = make();
        if answer.is_success() {
            return answer.rcx;
        }
        assert!(answer.status.is_transient(), "{call}: {answer}");
        met.insert((call, answer.status, answer.operand));
        thread::yield_now();
    }
}

/// Takes a page in at `gpa` and out again.
fn cycle(td: &Td, met: &mut Met, gpa: u64, page: Hpa) {
    let entry = at(gpa, PAGE);
    insist(met, Call::MemPageAug, || td.mem_page_aug(entry, page));
    insist(met, Call::MemRangeBlock, || td.mem_range_block(entry));
    insist(met, Call::MemTrack, || td.mem_track());
    let removed = insist(met, Call::MemPageRemove, || td.mem_page_remove(entry));
    assert_eq!(removed, Some(page.0));
}

/// Tables for the 4 KiB entries of the second 2 MiB as well.
fn add_second_table(rig: &Rig) {
    done(rig.td.mem_sept_add(at(REGION, LARGE), page(7)));
}

/// Every kind of collision that calls of this mix can have: never the TD's root page or its state, which all take shared,
/// and never a page, since each has its own.
fn expected(met: &Met) {
    let possible = |&(call, status, operand): &(Call, Status, Operand)| match (status, operand) {
        (Status::OperandBusy, Operand::SEPT_TREE) => call != Call::MemTrack,
        (Status::OperandBusy, Operand::TD_EPOCH) => call == Call::MemTrack,
        (Status::PreviousTlbEpochBusy, Operand::NONE) => call == Call::MemTrack,
        (Status::TlbTrackingNotDone, Operand::RCX) => call == Call::MemPageRemove,
        _ => false,
    };
    let odd: Vec<_> = met.iter().filter(|met| !possible(met)).collect();
    assert!(odd.is_empty(), "{odd:?}");
}

#[test]
fn two_threads_cycle_in_regions_of_their_own() {
    const CYCLES: u64 = 20_000;
    let rig = Rig::running();
    add_second_table(&rig);
    let before = rig.td.child_count();
    let threads: Vec<_> = (0..2)
        .map(|n| {
            let td = rig.td.clone();
            thread::spawn(move || {
                let mut met = Met::new();
                for turn in 0..CYCLES {
                    let gpa = n * REGION + turn % 512 * 0x1000;
                    cycle(
                        &td,
                        &mut met,
                        gpa,
                        Hpa(large_page(n).0 + turn % 512 * 0x1000),
                    );
                }
                met
            })
        })
        .collect();
    for thread in threads {
        expected(&thread.join().unwrap());
    }
    let counts = rig.td.call_counts();
    println!(
        "of {} blocks {} were busy",
        counts.of(Call::MemRangeBlock).made,
        counts.of(Call::MemRangeBlock).busy
    );
    for call in [
        Call::MemPageAug,
        Call::MemRangeBlock,
        Call::MemTrack,
        Call::MemPageRemove,
    ] {
        assert_eq!(counts.of(call).done, 2 * CYCLES, "{call}");
    }
    assert_eq!(rig.td.child_count(), before);
    assert_eq!(rig.module.violations(), []);
    let mut leaves = 0;
    rig.td
        .visit_entries(|entry| leaves += usize::from(entry.state.is_leaf()));
    assert_eq!(leaves, 0);
}

/// Calls that sleep with their locks held meet in the tree, however few processors there are: two that install sleep
/// together, and of what they do next, to block, one meets the other.
#[test]
fn slow_blocks_meet_in_the_tree() {
    const CYCLES: u64 = 25;
    let slow = Duration::from_millis(2);
    let costs = Costs::uniform(Wait::Sleep, Duration::ZERO)
        .with(Call::MemPageAug, slow)
        .with(Call::MemRangeBlock, slow);
    let rig = Rig::running_with(costs, ());
    add_second_table(&rig);
    let threads: Vec<_> = (0..2)
        .map(|n| {
            let td = rig.td.clone();
            thread::spawn(move || {
                let mut met = Met::new();
                for _ in 0..CYCLES {
                    cycle(&td, &mut met, n * REGION, page(10 + n));
                }
                met
            })
        })
        .collect();
    let mut met = Met::new();
    for thread in threads {
        met.append(&mut thread.join().unwrap());
    }
    expected(&met);
    let tree = (Call::MemRangeBlock, Status::OperandBusy, Operand::SEPT_TREE);
    assert!(met.contains(&tree), "{met:?}");
    assert_eq!(rig.module.violations(), []);
}

/// Holds each call until as many of its kind are inside as are wanted.
struct Together {
    on: Call,
    wanted: usize,
    inside: AtomicUsize,
}

impl Hooks for Together {
    fn inside(&self, call: Call) {
        if call != self.on {
            return;
        }
        self.inside.fetch_add(1, Ordering::SeqCst);
        let begin = Instant::now();
        while self.inside.load(Ordering::SeqCst) < self.wanted {
            assert!(
                begin.elapsed() < Duration::from_secs(60),
                "the module lets only some of them in at a time"
            );
            thread::yield_now();
        }
    }
}

#[test]
fn installs_below_one_table_are_all_inside_at_once() {
    const THREADS: usize = 16;
    let together = Together {
        on: Call::MemPageAug,
        wanted: THREADS,
        inside: AtomicUsize::new(0),
    };
    let rig = Rig::running_with(Costs::default(), together);
    let threads: Vec<_> = (0..THREADS as u64)
        .map(|n| {
            let td = rig.td.clone();
            thread::spawn(move || td.mem_page_aug(at(n * 0x1000, PAGE), page(32 + n)))
        })
        .collect();
    for thread in threads {
        done(thread.join().unwrap());
    }
}

#[test]
fn removals_of_blocked_pages_are_all_inside_at_once() {
    const THREADS: usize = 8;
    let together = Together {
        on: Call::MemPageRemove,
        wanted: THREADS,
        inside: AtomicUsize::new(0),
    };
    let rig = Rig::running_with(Costs::default(), together);
    for n in 0..THREADS as u64 {
        rig.map(n * 0x1000, PAGE, page(32 + n));
        done(rig.td.mem_range_block(at(n * 0x1000, PAGE)));
    }
    done(rig.td.mem_track());
    let threads: Vec<_> = (0..THREADS as u64)
        .map(|n| {
            let td = rig.td.clone();
            thread::spawn(move || td.mem_page_remove(at(n * 0x1000, PAGE)))
        })
        .collect();
    for thread in threads {
        done(thread.join().unwrap());
    }
}

/// Two hosts at one entry: one gets in, the other meets the entry's lock and reports the entry.
#[test]
fn two_hosts_at_one_entry() {
    let meanwhile = tdx_support::Meanwhile::default();
    let rig = Rig::running_with(Costs::default(), meanwhile.clone());
    let td = rig.td.clone();
    meanwhile.inside(Call::MemPageAug, move || {
        let busy = td.mem_page_aug(at(0, PAGE), page(10));
        assert!(busy.is(Status::OperandBusy, Operand::RCX), "{busy}");
        assert_eq!((busy.rcx, busy.rdx), (Some(1 << 63), Some(0)));
    });
    done(rig.td.mem_page_aug(at(0, PAGE), page(9)));
    assert!(meanwhile.is_over());
    // The host that was refused comes before the guest, until it comes back, if only to see that it is too late.
    let kept_out = accepted(rig.td.page_accept(at(0, PAGE)));
    assert!(kept_out.is(Status::OperandBusyHostPriority, Operand::RCX));
    let late = rig.td.mem_page_aug(at(0, PAGE), page(10));
    assert!(late.is(Status::EptEntryStateIncorrect, Operand::RCX));
    done(accepted(rig.td.page_accept(at(0, PAGE))));
}

fn entered(vcpu: &mut TdVcpu) -> Entered {
    loop {
        match vcpu.enter(0) {
            Enter::Inside(entered) => return entered,
            Enter::Refused(answer) => assert!(answer.status.is_transient(), "{answer}"),
            Enter::Exited(exit) => panic!("{exit:?}"),
        }
        thread::yield_now();
    }
}

/// Guests use translations, fresh and cached, for as long as they are inside. A page that was taken away is used by
/// nobody.
#[test]
fn no_page_is_taken_while_a_vcpu_may_hold_its_translation() {
    const VCPUS: u64 = 3;
    const CYCLES: u64 = 1500;
    const PAGES: usize = 64;
    let rig = Rig::created(Costs::default(), ());
    done(rig.td.mng_init());
    rig.add_tables();
    let vcpus: Vec<_> = (0..VCPUS)
        .map(|n| rig.td.vp_create(control(8 + n)).unwrap())
        .collect();
    done(rig.td.mr_finalize());
    let given: Arc<[AtomicBool; PAGES]> = Arc::new([const { AtomicBool::new(false) }; PAGES]);
    let stop = Arc::new(AtomicBool::new(false));
    let begin = Arc::new(Barrier::new(VCPUS as usize + 1));
    let used = Arc::new(AtomicU64::new(0));
    let guests: Vec<_> = vcpus
        .into_iter()
        .map(|mut vcpu| {
            let (given, stop, begin, used) =
                (given.clone(), stop.clone(), begin.clone(), used.clone());
            thread::spawn(move || {
                begin.wait();
                // What it cached last, as a TLB of one entry; the model tells when it has to forget it.
                let mut cached = None;
                while !stop.load(Ordering::SeqCst) {
                    if entered(&mut vcpu).flush {
                        cached = None;
                    }
                    cached = cached.or_else(|| {
                        let found = vcpu.td().translate(Gpa(0), GuestAccess::Write);
                        found.ok().map(|found| found.hpa)
                    });
                    if let Some(hpa) = cached {
                        let index = hpa.pfn().0 as usize % PAGES;
                        for _ in 0..2 {
                            assert!(
                                given[index].load(Ordering::SeqCst),
                                "a vCPU uses {hpa}, which was taken away"
                            );
                            used.fetch_add(1, Ordering::Relaxed);
                            thread::yield_now();
                        }
                    }
                    vcpu.exit(Exit::Other { rip: 0 });
                    thread::yield_now();
                }
            })
        })
        .collect();

    begin.wait();
    let mut met = Met::new();
    for turn in 0..CYCLES {
        let (entry, new) = (at(0, PAGE), page(64 + turn % PAGES as u64));
        let is_given = &given[new.pfn().0 as usize % PAGES];
        is_given.store(true, Ordering::SeqCst);
        insist(&mut met, Call::MemPageAug, || {
            rig.td.mem_page_aug(entry, new)
        });
        done(accepted(rig.td.page_accept(entry)));
        if turn % 4 == 0 {
            thread::yield_now();
        }
        insist(&mut met, Call::MemRangeBlock, || {
            rig.td.mem_range_block(entry)
        });
        insist(&mut met, Call::MemTrack, || rig.td.mem_track());
        insist(&mut met, Call::MemPageRemove, || {
            rig.td.mem_page_remove(entry)
        });
        is_given.store(false, Ordering::SeqCst);
    }
    stop.store(true, Ordering::SeqCst);
    for guest in guests {
        guest.join().unwrap();
    }
    println!("{} uses by vCPUs, {met:?}", used.load(Ordering::Relaxed));
    expected(&met);
    assert_eq!(rig.module.violations(), []);
}

/// Threads that make any call at any time on few addresses and pages. Most are refused; whatever happens, each page has
/// one place and the count is that of the tree.
#[test]
fn the_books_survive_threads_that_do_not_care() {
    const THREADS: u64 = 3;
    const CALLS: usize = 6000;
    let rig = Rig::created(Costs::default(), ());
    done(rig.td.mng_init());
    rig.add_tables();
    let vcpus: Vec<_> = (0..THREADS)
        .map(|n| rig.td.vp_create(control(8 + n)).unwrap())
        .collect();
    done(rig.td.mr_finalize());
    let threads: Vec<_> = vcpus
        .into_iter()
        .zip(0..)
        .map(|(mut vcpu, n): (TdVcpu, u64)| {
            let td = rig.td.clone();
            let mut random = 0x9e37_79b9_7f4a_7c15 ^ (n + 1);
            let mut next = move |below: u64| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random % below
            };
            thread::spawn(move || {
                for _ in 0..CALLS {
                    let level = Level::from_number(next(4) as u8 + 1).unwrap();
                    let gpa = (next(3) * REGION + next(3) * 0x1000) & !(level.bytes() - 1);
                    let info = at(gpa, level);
                    let small = page(3 + next(12));
                    let _ = match next(12) {
                        0 | 1 => td.mem_sept_add(info, small),
                        2 => td.mem_page_aug(at(gpa & !(REGION - 1), LARGE), large_page(next(2))),
                        3 => td.mem_page_aug(info, small),
                        4 => td.mem_range_block(info),
                        5 => td.mem_range_unblock(info),
                        6 => td.mem_page_remove(info),
                        7 => td.mem_sept_remove(info),
                        8 => td.mem_page_demote(at(gpa & !(REGION - 1), LARGE), small),
                        9 => td.mem_page_promote(at(gpa & !(REGION - 1), LARGE)),
                        10 => {
                            // Inside, as a guest is: what protects its walk is its epoch.
                            let _ = entered(&mut vcpu);
                            let accept = td.page_accept(info);
                            vcpu.exit(Exit::Other { rip: 0 });
                            match accept {
                                Accept::Answered(answer) => answer,
                                Accept::Exit(_) => td.mem_sept_rd(info),
                            }
                        }
                        _ => td.mem_track(),
                    };
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    // Control structure, root table, vCPUs.
    let mut children = 2 + THREADS;
    let mut pages = BTreeSet::new();
    rig.td.visit_entries(|entry| {
        let Some(held) = entry.page else {
            assert_ne!(entry.state, EntryState::Removed);
            return;
        };
        assert!(pages.insert(held.0), "{held} has two places");
        let (kind, size) = rig.module.page_kind(held).unwrap();
        if entry.state.is_table() {
            children += 1;
            assert_eq!((kind, size), (PageKind::Ept, PAGE), "{entry:?}");
        } else {
            children += entry.level.pages();
            assert_eq!((kind, size), (PageKind::Reg, entry.level), "{entry:?}");
        }
    });
    assert_eq!(rig.td.child_count(), children);
    // No lock was left behind: a call of each kind is refused for other reasons, or done.
    let free = [
        rig.td.mem_track(),
        rig.td.mem_range_block(at(0, PAGE)),
        rig.td.mem_page_aug(at(0, PAGE), page(40)),
    ];
    for answer in free {
        assert_ne!(answer.status, Status::OperandBusy, "{answer}");
    }
    let done: u64 = Call::ALL
        .into_iter()
        .map(|call| rig.td.call_counts().of(call).done)
        .sum();
    println!("{done} calls were done");
}
