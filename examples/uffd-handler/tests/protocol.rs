//! The program, started as such: what it says to VMMs that it cannot serve, and what becomes of a VM whose handler dies.

mod common;

use common::{MIB, shape, skipped};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use uffd_handler::memory::{Kind, word};
use uffd_handler::protocol::{self, Extent, Region};
use uffd_handler::sys::{Uffd, features};
use uffd_handler::vmm::{Shape, Vmm};

const LEN: u64 = 8 * MIB;

/// Held by a test that forks: all memory of this process that a handler serves is the child's as well.
static FORKING: Mutex<()> = Mutex::new(());

fn forking() -> MutexGuard<'static, ()> {
    FORKING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running handler; ended when it is dropped.
struct Handler {
    child: Child,
    socket: PathBuf,
}

impl Handler {
    fn start(name: &str, snapshot: &Path, more: &[&str]) -> Self {
        let socket = place(&format!("{name}.sock"));
        let _ = fs::remove_file(&socket);
        let child = Command::new(env!("CARGO_BIN_EXE_uffd-handler"))
            .arg("serve")
            .arg("--socket")
            .arg(&socket)
            .arg("--snapshot")
            .arg(snapshot)
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("a handler");
        Self { child, socket }
    }

    fn connect(&self) -> UnixStream {
        loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => return stream,
                Err(_) => thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Waits for its end, for as long as any end may take; what it said on each of its outputs.
    fn said(mut self) -> (bool, String, String) {
        let begun = Instant::now();
        while self.child.try_wait().expect("its state").is_none() {
            assert!(begun.elapsed() < Duration::from_secs(60), "it does not end");
            thread::sleep(Duration::from_millis(2));
        }
        let status = self.child.wait().expect("its end");
        let (mut out, mut err) = (String::new(), String::new());
        let read = |from: Option<&mut dyn Read>, to: &mut String| {
            from.map(|from| from.read_to_string(to));
        };
        read(self.child.stdout.as_mut().map(|it| it as _), &mut out);
        read(self.child.stderr.as_mut().map(|it| it as _), &mut err);
        (status.success(), out, err)
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.socket);
    }
}

fn place(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{name}", std::process::id()))
}

/// A snapshot of [`LEN`] bytes in a file.
struct SnapshotFile(PathBuf);

impl SnapshotFile {
    fn new(name: &str) -> Self {
        let path = place(&format!("{name}.mem"));
        let mut file = File::create(&path).expect("a file");
        let bytes: Vec<u8> = (0..LEN)
            .step_by(8)
            .flat_map(|at| word(at, 0).to_ne_bytes())
            .collect();
        file.write_all(&bytes).expect("a snapshot");
        Self(path)
    }
}

impl Drop for SnapshotFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn what_makes_no_sense_is_refused_with_a_reason() {
    if skipped("what_makes_no_sense_is_refused_with_a_reason") {
        return;
    }
    let snapshot = SnapshotFile::new("malformed");
    let uffd = Uffd::new(0).expect("a userfaultfd");
    let null = File::open("/dev/null").expect("a descriptor");
    let (good, bad) = (uffd.as_raw_fd(), null.as_raw_fd());
    let base = 0x7000_0000_0000;
    let json = |regions: &[Region]| serde_json::to_string(regions).expect("text");
    let region = || Region::new(base, MIB, 0);
    let removed = |start, len| Region {
        removed: vec![Extent { start, len }],
        ..region()
    };
    let one = json(&[region()]);
    let cases: Vec<(String, Vec<RawFd>, &str)> = vec![
        (one.clone(), vec![], "0 descriptors came with the message"),
        (one.clone(), vec![bad], "is no userfaultfd"),
        (
            one.clone(),
            vec![good, bad, bad],
            "3 descriptors came with the message",
        ),
        (
            "[".into(),
            vec![good, bad, bad],
            "3 descriptors came with the message",
        ),
        ("nonsense".into(), vec![good], "no list of regions"),
        (
            r#"{"regions": []}"#.into(),
            vec![good],
            "no list of regions",
        ),
        (
            r#"[{"size": 4096}]"#.into(),
            vec![good],
            "missing field `base_host_virt_addr`",
        ),
        (one[..one.len() / 2].into(), vec![good], "in the middle"),
        (
            String::from_utf8(vec![b' '; 2 << 20]).expect("text"),
            vec![good],
            "longer than",
        ),
        (json(&[]), vec![good], "the list of regions is empty"),
        (
            json(&[region().with_pages(12_288)]),
            vec![good],
            "pages of 4 KiB, 2 MiB and 1 GiB",
        ),
        (
            json(&[Region::new(base + 1, MIB, 0)]),
            vec![good],
            "multiples of the page size",
        ),
        (
            json(&[region().with_pages(2 << 20)]),
            vec![good],
            "multiples of the page size",
        ),
        (json(&[Region::new(base, 0, 0)]), vec![good], "it is empty"),
        (
            json(&[Region::new(base, 2 * LEN, 0)]),
            vec![good],
            "past the end of the snapshot",
        ),
        (
            json(&[Region::new(base, MIB, LEN)]),
            vec![good],
            "past the end of the snapshot",
        ),
        (
            json(&[Region::new(base, MIB, !0xfff)]),
            vec![good],
            "past the end of the snapshot",
        ),
        (
            json(&[Region::new(!0xfff, MIB, 0)]),
            vec![good],
            "past the addresses of a process",
        ),
        (
            json(&[Region::new(1 << 47, MIB, 0)]),
            vec![good],
            "past the addresses of a process",
        ),
        (
            json(&[region(), Region::new(base + MIB / 2, MIB, 0)]),
            vec![good],
            "overlaps the one before",
        ),
        (
            json(
                &(0..1025)
                    .map(|it| Region::new(base + it * 4096, 4096, 0))
                    .collect::<Vec<_>>(),
            ),
            vec![good],
            "1025 regions",
        ),
        (
            format!("[{}nonsense", " ".repeat(5000)),
            vec![good],
            "no list of regions",
        ),
        (json(&[removed(MIB, 4096)]), vec![good], "whole pages of it"),
        (json(&[removed(0, !0xfff)]), vec![good], "whole pages of it"),
        (json(&[removed(8, 4096)]), vec![good], "whole pages of it"),
    ];
    for (text, descriptors, reason) in cases {
        let handler = Handler::start("malformed", &snapshot.0, &["--once"]);
        let stream = handler.connect();
        // It may hang up before all of a long message is sent.
        let _ = protocol::send_bytes(&stream, text.as_bytes(), &descriptors);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let shown: String = text.chars().take(100).collect();
        let (success, _, err) = handler.said();
        assert!(!success, "{shown}: accepted");
        assert!(
            err.contains("error: ") && err.contains(reason),
            "{shown}: {err}"
        );
        assert!(!err.contains("panicked"), "{shown}: {err}");
    }
}

#[test]
fn a_vmm_of_firecrackers_kind_is_served_to_its_end() {
    if skipped("a_vmm_of_firecrackers_kind_is_served_to_its_end") {
        return;
    }
    let snapshot = SnapshotFile::new("served");
    // An older one says the page size by another name; the message comes in pieces.
    for older in [false, true] {
        let handler = Handler::start("served", &snapshot.0, &["--once", "--background"]);
        let vmm = Vmm::new(shape(Kind::Anonymous, LEN, features::REMOVE)).expect("a VMM");
        let stream = handler.connect();
        if older {
            let mut text = serde_json::json!(vmm.regions());
            for region in text.as_array_mut().expect("a list") {
                region
                    .as_object_mut()
                    .expect("a region")
                    .remove("page_size");
            }
            let text = text.to_string();
            let (first, rest) = text.as_bytes().split_at(10);
            let hello = vmm.hello().expect("a hello");
            protocol::send_bytes(&stream, first, &[hello.uffd.as_raw_fd()]).expect("the start");
            thread::sleep(Duration::from_millis(20));
            (&stream).write_all(rest).expect("the rest");
        } else {
            vmm.introduce(&stream).expect("a message");
        }
        assert_eq!(vmm.wrong_words(0, LEN), 0);
        drop(stream);
        let (success, out, err) = handler.said();
        assert!(success, "{err}");
        let report: serde_json::Value = serde_json::from_str(&out).expect("a report");
        let filled = report["served"]["filled"].as_u64().expect("a number");
        let copied = report["copied"].as_u64().expect("a number");
        assert_eq!(filled + copied, LEN / 4096, "{out}");
        assert_eq!(report["existing"], 0, "{out}");
    }
}

#[test]
fn a_vm_outlives_its_handlers() {
    if skipped("a_vm_outlives_its_handlers") {
        return;
    }
    let snapshot = SnapshotFile::new("killed");
    let mut vmm = Vmm::new(shape(Kind::Anonymous, LEN, features::REMOVE)).expect("a VMM");
    let start = |vmm: &Vmm| {
        // Slow, so that it dies with faults in hand.
        let handler = Handler::start("killed", &snapshot.0, &["--workers", "4", "--delay", "300"]);
        let stream = handler.connect();
        vmm.introduce(&stream).expect("a message");
        (handler, stream)
    };
    let pages = LEN / 4096;
    let mut given_up = vec![false; pages as usize];
    let mut restarts = 0;
    let mut first = 0;
    let mut handler = start(&vmm);
    while first < pages {
        let last = (first + pages / 8).min(pages);
        let left = AtomicU64::new(4);
        let killed = AtomicBool::new(false);
        let wrong = thread::scope(|scope| {
            let guests: Vec<_> = (0..4)
                .map(|guest| {
                    let (vmm, given_up, left) = (&vmm, &given_up, &left);
                    scope.spawn(move || {
                        let mut wrong = 0;
                        for page in (first + guest..last).step_by(4) {
                            for at in (page * 4096..(page + 1) * 4096).step_by(8) {
                                let zero = given_up[page as usize];
                                let expected = if zero { 0 } else { word(at, 0) };
                                wrong += u64::from(vmm.memory().load(at) != expected);
                            }
                        }
                        left.fetch_sub(1, Ordering::Release);
                        wrong
                    })
                })
                .collect();
            // In the middle of it.
            thread::sleep(Duration::from_millis(15));
            if left.load(Ordering::Acquire) > 0 {
                killed.store(true, Ordering::Relaxed);
                handler.0.child.kill().expect("its death");
                handler.0.child.wait().expect("its end");
                handler = start(&vmm);
                restarts += 1;
            }
            let guests = guests.into_iter();
            guests
                .map(|guest| guest.join().expect("a guest"))
                .sum::<u64>()
        });
        assert_eq!(wrong, 0, "after {restarts} restarts");
        // Pages that were read, given up before the next handler: it must not bring them back.
        vmm.give_up(first * 4096, 8 * 4096).expect("a removal");
        for page in first..first + 8 {
            given_up[page as usize] = true;
            if page % 2 == 0 {
                assert_eq!(vmm.memory().load(page * 4096), 0);
            }
        }
        first = last;
    }
    assert!(restarts > 0, "no handler died");
    for page in 0..pages {
        for at in (page * 4096..(page + 1) * 4096).step_by(8) {
            let zero = given_up[page as usize];
            let expected = if zero { 0 } else { word(at, 0) };
            assert_eq!(
                vmm.memory().load(at),
                expected,
                "page {page}, {restarts} restarts"
            );
        }
    }
}

#[test]
fn a_child_of_the_vmm_is_served_as_well() {
    if skipped("a_child_of_the_vmm_is_served_as_well") {
        return;
    }
    // The handler is another process: whoever forks holds locks of its own, the allocator's among them, until the report of
    // it has been read.
    let _alone = forking();
    let snapshot = SnapshotFile::new("forked");
    for blocking in [false, true] {
        serve_a_child(&snapshot, blocking);
    }
}

/// Serves a VMM and its child, with userfaultfds of which the second is as the first was made.
fn serve_a_child(snapshot: &SnapshotFile, blocking: bool) {
    let handler = Handler::start("forked", &snapshot.0, &["--once"]);
    let vmm = match Vmm::new(Shape {
        blocking,
        ..shape(Kind::Anonymous, LEN, features::FORK | features::REMOVE)
    }) {
        Ok(vmm) => vmm,
        Err(why) => {
            eprintln!("SKIPPED a_child_of_the_vmm_is_served_as_well: no reports of forks: {why}");
            return;
        }
    };
    let stream = handler.connect();
    vmm.introduce(&stream).expect("a message");
    assert_eq!(vmm.wrong_words(0, MIB / 2), 0);
    vmm.memory().store(0, 99);
    vmm.memory().give_up(MIB, 4096).expect("a removal");
    let seen = common::in_a_child(|| {
        let right = vmm.memory().load(0) == 99
            && vmm.memory().load(MIB) == 0
            && vmm.wrong_words(8, MIB) == 0
            && vmm.wrong_words(MIB + 4096, LEN) == 0;
        vmm.memory().store(8, 5);
        right
    });
    assert!(seen, "the child saw something else");
    // What the child wrote is its own.
    assert_eq!(vmm.wrong_words(8, MIB), 0);
    drop(stream);
    let (success, out, err) = handler.said();
    assert!(success, "{err}");
    let report: serde_json::Value = serde_json::from_str(&out).expect("a report");
    assert_eq!(report["forks"], 1, "{out}");
}

#[test]
fn a_child_may_write_to_what_is_protected_for_its_parents_log() {
    if skipped("a_child_may_write_to_what_is_protected_for_its_parents_log") {
        return;
    }
    let _alone = forking();
    let snapshot = SnapshotFile::new("protected");
    let handler = Handler::start("protected", &snapshot.0, &["--once"]);
    let vmm = match Vmm::new(Shape {
        track_writes: true,
        ..shape(Kind::Anonymous, LEN, features::FORK | features::WP)
    }) {
        Ok(vmm) => vmm,
        Err(why) => {
            eprintln!("SKIPPED a_child_may_write_to_what_is_protected: no reports of forks: {why}");
            return;
        }
    };
    let stream = handler.connect();
    vmm.introduce(&stream).expect("a message");
    assert_eq!(vmm.wrong_words(0, MIB), 0);
    let written = common::in_a_child(|| {
        vmm.memory().store(0, 99);
        vmm.memory().store(2 * MIB, 98);
        vmm.memory().load(0) == 99 && vmm.memory().load(2 * MIB) == 98
    });
    assert!(written, "the child could not write");
    vmm.memory().store(8, 97);
    assert_eq!(vmm.memory().load(0), word(0, 0));
    drop(stream);
    let (success, out, err) = handler.said();
    assert!(success, "{err}");
    assert!(out.contains("\"forks\":1"), "{out}");
}

/// The VMM of [`a_vmm_that_is_killed_is_no_failure_of_its_handler`]: introduces itself and is not heard of again.
#[test]
#[ignore = "is a part of another test, in a process of its own"]
fn a_vmm_that_waits() {
    let Some(socket) = std::env::var_os("VMM_SOCKET") else {
        return;
    };
    let vmm = Vmm::new(shape(Kind::Anonymous, LEN, 0)).expect("a VMM");
    let stream = UnixStream::connect(socket).expect("a handler");
    vmm.introduce(&stream).expect("a message");
    // It is served: the rest of its memory is on its way.
    assert_eq!(vmm.memory().load(0), word(0, 0));
    println!("introduced");
    thread::sleep(Duration::from_secs(60));
}

/// The VMM of [`a_vmm_that_cannot_be_served_is_ended`]: makes no sense, and waits for what comes of it.
#[test]
#[ignore = "is a part of another test, in a process of its own"]
fn a_vmm_that_makes_no_sense() {
    let Some(socket) = std::env::var_os("VMM_SOCKET") else {
        return;
    };
    let stream = UnixStream::connect(socket).expect("a handler");
    protocol::send_bytes(&stream, b"nonsense", &[]).expect("a message");
    thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_vmm_that_cannot_be_served_is_ended() {
    let snapshot = SnapshotFile::new("ended");
    let handler = Handler::start("ended", &snapshot.0, &["--once", "--kill"]);
    while !handler.socket.exists() {
        thread::sleep(Duration::from_millis(2));
    }
    let mut vmm = Command::new(std::env::current_exe().expect("this program"))
        .args(["--ignored", "--exact", "a_vmm_that_makes_no_sense"])
        .env("VMM_SOCKET", &handler.socket)
        .stdout(Stdio::null())
        .spawn()
        .expect("a VMM");
    let pid = vmm.id();
    let (success, _, err) = handler.said();
    assert!(!success && err.contains("no list of regions"), "{err}");
    assert!(err.contains(&format!("process {pid} was ended")), "{err}");
    let status = vmm.wait().expect("its end");
    assert_eq!(status.signal(), Some(libc::SIGKILL));
}

#[test]
fn a_vmm_that_is_killed_is_no_failure_of_its_handler() {
    if skipped("a_vmm_that_is_killed_is_no_failure_of_its_handler") {
        return;
    }
    let snapshot = SnapshotFile::new("dead");
    // In the middle of its background copy, which notices before the connection is closed.
    for _ in 0..5 {
        let options = ["--once", "--background", "--delay", "100"];
        let handler = Handler::start("dead", &snapshot.0, &options);
        // So that it listens.
        while !handler.socket.exists() {
            thread::sleep(Duration::from_millis(2));
        }
        let mut vmm = Command::new(std::env::current_exe().expect("this program"))
            .args(["--ignored", "--exact", "a_vmm_that_waits", "--nocapture"])
            .env("VMM_SOCKET", &handler.socket)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("a VMM");
        let said = vmm.stdout.take().expect("its output");
        let said = BufReader::new(said).lines().map_while(Result::ok);
        let introduced = said.into_iter().any(|line| line.contains("introduced"));
        assert!(introduced, "the VMM was not served");
        vmm.kill().expect("its death");
        vmm.wait().expect("its end");
        let (success, _, err) = handler.said();
        assert!(success, "{err}");
    }
}

#[test]
fn a_file_in_the_place_of_the_socket_is_left_alone() {
    let snapshot = SnapshotFile::new("mistaken");
    let done = Command::new(env!("CARGO_BIN_EXE_uffd-handler"))
        .args(["serve", "--once", "--socket"])
        .arg(&snapshot.0)
        .arg("--snapshot")
        .arg(&snapshot.0)
        .output()
        .expect("a handler");
    assert!(!done.status.success());
    let err = String::from_utf8_lossy(&done.stderr);
    assert!(err.contains("in use"), "{err}");
    assert_eq!(fs::metadata(&snapshot.0).expect("the file").len(), LEN);
}

#[test]
fn a_handler_without_descriptors_serves_on_who_it_serves() {
    if skipped("a_handler_without_descriptors_serves_on_who_it_serves") {
        return;
    }
    let snapshot = SnapshotFile::new("exhausted");
    let mut handler = Handler::start("exhausted", &snapshot.0, &[]);
    let vmm = Vmm::new(shape(Kind::Anonymous, LEN, 0)).expect("a VMM");
    let stream = handler.connect();
    vmm.introduce(&stream).expect("a message");
    assert_eq!(vmm.wrong_words(0, MIB), 0);
    // So many as it has now.
    let pid = handler.child.id() as libc::pid_t;
    let limit = libc::rlimit {
        rlim_cur: 4,
        rlim_max: 4,
    };
    #[allow(unsafe_code)]
    // UNSAFETY: a system call. SAFETY: the kernel reads `limit`.
    let set = unsafe {
        libc::prlimit(
            pid,
            libc::RLIMIT_NOFILE,
            &raw const limit,
            std::ptr::null_mut(),
        )
    };
    assert_eq!(set, 0, "a limit");
    let more = UnixStream::connect(&handler.socket).expect("a connection");
    thread::sleep(Duration::from_millis(150));
    let ended = handler.child.try_wait().expect("its state");
    assert_eq!(ended, None, "it gave up on all of them");
    assert_eq!(vmm.wrong_words(MIB, LEN), 0);
    drop(more);
}

#[test]
fn children_that_have_ended_cost_their_handler_nothing() {
    if skipped("children_that_have_ended_cost_their_handler_nothing") {
        return;
    }
    let _alone = forking();
    let snapshot = SnapshotFile::new("children");
    let handler = Handler::start("children", &snapshot.0, &["--once"]);
    let vmm = match Vmm::new(shape(Kind::Anonymous, LEN, features::FORK)) {
        Ok(vmm) => vmm,
        Err(why) => {
            eprintln!("SKIPPED children_that_have_ended: no reports of forks: {why}");
            return;
        }
    };
    let stream = handler.connect();
    vmm.introduce(&stream).expect("a message");
    for at in 0..80 {
        let at = at * 4096;
        assert!(common::in_a_child(|| vmm.memory().load(at) == word(at, 0)));
    }
    let threads = format!("/proc/{}/task", handler.child.id());
    let threads = fs::read_dir(threads).expect("its threads").count();
    assert!(threads < 20, "{threads} threads");
    drop(stream);
    let (success, out, err) = handler.said();
    assert!(success, "{err}");
    assert!(out.contains("\"forks\":80"), "{out}");
    assert!(out.contains("\"filled\":80"), "{out}");
}

/// Forks so many times, each time in the child of the last.
fn descend(generations: u32) -> bool {
    generations == 0 || common::in_a_child(|| descend(generations - 1))
}

#[test]
fn children_are_counted_however_they_descend_from_each_other() {
    if skipped("children_are_counted_however_they_descend_from_each_other") {
        return;
    }
    let _alone = forking();
    let snapshot = SnapshotFile::new("descent");
    for (generations, served) in [(10, true), (70, false)] {
        let handler = Handler::start("descent", &snapshot.0, &["--once"]);
        let vmm = match Vmm::new(shape(Kind::Anonymous, LEN, features::FORK)) {
            Ok(vmm) => vmm,
            Err(why) => {
                eprintln!("SKIPPED children_are_counted: no reports of forks: {why}");
                return;
            }
        };
        let stream = handler.connect();
        vmm.introduce(&stream).expect("a message");
        assert_eq!(vmm.memory().load(0), word(0, 0));
        assert!(descend(generations), "a child did not end");
        drop(stream);
        let (success, out, err) = handler.said();
        assert_eq!(success, served, "{err}");
        match served {
            true => assert!(out.contains("\"forks\":10"), "{out}"),
            false => assert!(err.contains("more than 64 children"), "{err}"),
        }
    }
}
