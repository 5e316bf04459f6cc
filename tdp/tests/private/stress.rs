//! vCPUs fault, accept and touch private memory while others take it away, convert it and split it, on a module that is busy,
//! refuses and panics.
//!
//! A vCPU that is in the guest keeps using the translations that it has, until it is kicked and leaves. Each use of a private
//! frame is counted for as long as it lasts: when a conversion has returned, nobody may be using what it took away. That
//! fails if a page is removed before its ticket has drained.

use crate::rig::{Rig, SPACE, private, shared};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tdp::protected::tdx::{Accept, Call, Operand, PageInfo, Status};
use tdp::{ConvertError, Gfn, Level, Outcome, Visibility};
use tdp_arch::walker::GuestAccess;

/// Frames that the threads fight over: two tables.
const FRAMES: u64 = 1024;

/// Small and repeatable.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }
}

struct Scene {
    rig: Rig,
    stop: AtomicBool,
    /// Uses of each private frame under way.
    used: Vec<AtomicU32>,
    touched: AtomicU64,
    converted: AtomicU64,
    folded: AtomicU64,
    most_sent_back: AtomicU32,
}

/// Faults until the access is possible, or is the embedder's, as a vCPU loop does.
fn settle(scene: &Scene, vcpu: &mut crate::rig::Vcpu, gfn: u64, is_private: bool, level: Level) {
    let mut sent_back = 0;
    loop {
        let fault = if is_private {
            private(gfn)
        } else {
            shared(gfn)
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| vcpu.fault(fault.max_level(level))));
        match outcome {
            Ok(Ok(Outcome::Retry(_))) if is_private => {
                sent_back += 1;
                scene.most_sent_back.fetch_max(sent_back, Ordering::Relaxed);
            }
            Ok(Ok(Outcome::Retry(_))) if !scene.stop.load(Ordering::Relaxed) => {
                std::thread::yield_now();
            }
            Ok(Ok(_)) => return,
            Ok(Err(error)) => panic!("{error}"),
            // The hook's. The guest tries again.
            Err(_) => return,
        }
    }
}

fn run_vcpu(scene: &Scene, seed: u64) {
    let mut random = Random(seed);
    let mut vcpu = scene.rig.vcpu();
    let mut tlb = scene.rig.mmu.host().tlb().vcpu();
    let td = scene.rig.table().td().clone();
    while !scene.stop.load(Ordering::Relaxed) {
        let gfn = random.below(FRAMES);
        let is_private = scene.rig.mmu.visibility(Gfn(gfn)) == Some(Visibility::Private);
        let level = if random.below(64) == 0 {
            Level::L1
        } else {
            Level::L2
        };
        settle(scene, &mut vcpu, gfn, is_private, level);
        // In the guest: accept, and use what is there until kicked.
        let _ = tlb.enter();
        let mut using = Vec::new();
        for _ in 0..4 {
            let gfn = random.below(FRAMES);
            let gpa = Gfn(gfn).address();
            if let Accept::Answered(_) = td.page_accept(PageInfo::new(gpa, Level::L1)) {}
            // From the look on until it leaves, nothing may be given away that it has found.
            if td.translate(gpa, GuestAccess::Write).is_ok() {
                scene.used[gfn as usize].fetch_add(1, Ordering::SeqCst);
                using.push(gfn);
            }
        }
        for _ in 0..50 {
            if tlb.kicked() {
                break;
            }
            std::hint::spin_loop();
        }
        scene
            .touched
            .fetch_add(using.len() as u64, Ordering::Relaxed);
        for gfn in using {
            scene.used[gfn as usize].fetch_sub(1, Ordering::SeqCst);
        }
        tlb.exit();
    }
}

fn allowed(error: &ConvertError) -> bool {
    matches!(error, ConvertError::Removal(_))
}

/// Converts frames of its own half to and fro, so that it knows what they are.
fn run_converter(scene: &Scene, seed: u64, half: u64) {
    let mut random = Random(seed);
    while !scene.stop.load(Ordering::Relaxed) {
        let start = half * (FRAMES / 2) + random.below(FRAMES / 2 - 16);
        let range = Gfn(start)..Gfn(start + 1 + random.below(16));
        let (mmu, to) = (&scene.rig.mmu, Visibility::Shared);
        let done = catch_unwind(AssertUnwindSafe(|| mmu.convert(SPACE, range.clone(), to)));
        match done {
            Ok(Ok(_)) => {
                scene.converted.fetch_add(1, Ordering::Relaxed);
                // What was private is the host's: a vCPU that had found it is out, and one that looks now finds nothing.
                for gfn in range.start.0..range.end.0 {
                    let users = scene.used[gfn as usize].load(Ordering::SeqCst);
                    assert_eq!(users, 0, "frame {gfn:#x} is given away and used");
                }
            }
            Ok(Err(error)) => assert!(allowed(&error), "{error}"),
            Err(_) => {}
        }
        let back = catch_unwind(AssertUnwindSafe(|| {
            mmu.convert(SPACE, range, Visibility::Private)
        }));
        if let Ok(back) = back {
            back.unwrap();
        }
    }
}

fn run_zapper(scene: &Scene, seed: u64) {
    let mut random = Random(seed);
    while !scene.stop.load(Ordering::Relaxed) {
        let table = random.below(FRAMES / 512) * 512;
        let range = Gfn(table)..Gfn(table + 512);
        let mmu = &scene.rig.mmu;
        let done = catch_unwind(AssertUnwindSafe(|| mmu.zap_private(SPACE, range)));
        if let Ok(Err(error)) = done {
            assert!(allowed(&error), "{error}");
        }
        std::thread::sleep(Duration::from_micros(300));
    }
}

fn run_folder(scene: &Scene, seed: u64) {
    let mut random = Random(seed);
    let mut vcpu = scene.rig.vcpu();
    while !scene.stop.load(Ordering::Relaxed) {
        let table = random.below(FRAMES / 512) * 512;
        let range = Gfn(table)..Gfn(table + 512);
        let mmu = &scene.rig.mmu;
        // The guest uses and accepts every page, then may have a large leaf: what is uniform is merged.
        let td = scene.rig.table().td();
        for gfn in range.start.0..range.end.0 {
            settle(scene, &mut vcpu, gfn, true, Level::L1);
            let _ = td.page_accept(PageInfo::new(Gfn(gfn).address(), Level::L1));
        }
        mmu.allow_huge(Gfn(table));
        if let Ok(Ok(folded)) = catch_unwind(AssertUnwindSafe(|| mmu.fold_private(SPACE, range))) {
            scene.folded.fetch_add(folded.folded, Ordering::Relaxed);
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn run(seed: u64, level: Level, inject: bool) {
    let rig = Rig::running(level);
    if inject {
        let mut random = Random(seed ^ 0x5eed);
        rig.script.refuse(move |call| match random.below(1000) {
            0..50 if call.is_of_host() => Some((Status::OperandBusy, Operand::RCX)),
            50..55
                if matches!(
                    call,
                    Call::MemPageAug | Call::MemSeptAdd | Call::MemRangeBlock | Call::MemTrack
                ) =>
            {
                Some((Status::OperandInvalid, Operand::RCX))
            }
            _ => None,
        });
        let mut random = Random(seed ^ 0xbad);
        rig.script.inside(move |call| {
            if call.is_of_host() && random.below(2000) == 0 {
                std::panic::panic_any("injected");
            }
        });
    }
    let scene = Arc::new(Scene {
        rig,
        stop: AtomicBool::new(false),
        used: (0..FRAMES).map(|_| AtomicU32::new(0)).collect(),
        touched: AtomicU64::new(0),
        converted: AtomicU64::new(0),
        folded: AtomicU64::new(0),
        most_sent_back: AtomicU32::new(0),
    });
    let spawn = |body: Box<dyn FnOnce(&Scene) + Send>| {
        let scene = scene.clone();
        std::thread::spawn(move || body(&scene))
    };
    let threads = [
        spawn(Box::new(move |scene| run_vcpu(scene, seed + 1))),
        spawn(Box::new(move |scene| run_vcpu(scene, seed + 2))),
        spawn(Box::new(move |scene| run_vcpu(scene, seed + 3))),
        spawn(Box::new(move |scene| run_converter(scene, seed + 4, 0))),
        spawn(Box::new(move |scene| run_converter(scene, seed + 5, 1))),
        spawn(Box::new(move |scene| run_zapper(scene, seed + 6))),
        spawn(Box::new(move |scene| run_folder(scene, seed + 7))),
    ];
    // For a while, and where the machine is slow until it did work.
    let begun = Instant::now();
    let did_work = || {
        scene.touched.load(Ordering::Relaxed) > 100 && scene.converted.load(Ordering::Relaxed) > 10
    };
    while begun.elapsed() < Duration::from_millis(700)
        || !did_work() && begun.elapsed() < Duration::from_secs(60)
    {
        std::thread::sleep(Duration::from_millis(10));
    }
    scene.stop.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().unwrap();
    }
    scene.rig.script.clear();
    assert!(scene.touched.load(Ordering::Relaxed) > 100, "it did work");
    assert!(scene.converted.load(Ordering::Relaxed) > 10, "it did work");
    let sent_back = scene.most_sent_back.load(Ordering::Relaxed);
    assert!(sent_back <= 3, "sent back {sent_back} times in a row");
    println!("folded {}", scene.folded.load(Ordering::Relaxed));
    // A merge of pages that the guest has not accepted is refused; the library cannot know.
    let violations = scene.rig.module.take_violations();
    assert!(
        violations.iter().all(|it| it.call == Call::MemPagePromote),
        "{violations:?}"
    );
    scene.rig.check();
    // Exactly one half maps a frame.
    let mmu = &scene.rig.mmu;
    let mut privately = vec![false; FRAMES as usize];
    mmu.visit_private_leaves(SPACE, Gfn(0)..Gfn(FRAMES), |leaf| {
        for gfn in leaf.gfn.0..(leaf.gfn.0 + leaf.level.pages()).min(FRAMES) {
            privately[gfn as usize] = true;
        }
    });
    mmu.visit_leaves(SPACE, Gfn(0)..Gfn(FRAMES), |leaf| {
        for gfn in leaf.gfn.0..(leaf.gfn.0 + leaf.level.pages()).min(FRAMES) {
            assert!(
                !privately[gfn as usize],
                "frame {gfn:#x} is mapped by both halves"
            );
        }
    });
    // Everything can be taken away, and every twin comes home.
    mmu.zap_private(SPACE, Gfn(0)..Gfn(1 << 35)).unwrap();
    assert_eq!(scene.rig.table().twins_out(), 0);
    scene.rig.check();
}

#[test]
fn small_pages() {
    run(0x1001, Level::L1, false);
}

#[test]
fn large_pages() {
    run(0x2002, Level::L2, false);
}

#[test]
fn small_pages_on_a_module_that_fails() {
    run(0x3003, Level::L1, true);
}

#[test]
fn large_pages_on_a_module_that_fails() {
    run(0x4004, Level::L2, true);
}
