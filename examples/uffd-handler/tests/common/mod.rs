//! What the tests share: a snapshot, a VMM, a handler, all in one process.

use std::io;
use std::sync::Arc;
use uffd_handler::memory::Kind;
use uffd_handler::source::{Snapshot, Source};
use uffd_handler::vmm::{self, Shape, Vmm};
use uffd_handler::{Config, Session, sys};

pub(crate) const MIB: u64 = 1 << 20;

/// Says so, visibly, and is `true`, where userfaultfd cannot be used.
pub(crate) fn skipped(test: &str) -> bool {
    let why = sys::unavailable();
    if let Some(why) = &why {
        eprintln!("SKIPPED {test}: {why}");
    }
    why.is_some()
}

#[allow(dead_code)]
pub(crate) fn source(len: u64) -> Arc<dyn Source> {
    Arc::new(Snapshot::of(vmm::snapshot(len).expect("a snapshot")))
}

pub(crate) fn shape(kind: Kind, len: u64, features: u64) -> Shape {
    Shape {
        features,
        ..Shape::new(kind, len)
    }
}

#[allow(dead_code)]
pub(crate) fn serve(vmm: &Vmm, source: &Arc<dyn Source>, config: Config) -> Session {
    Session::start(vmm.hello().expect("a hello"), source.clone(), config).expect("a session")
}

/// Makes sure that there are huge pages, if the machine lets us.
#[allow(dead_code)]
pub(crate) fn huge_pages(count: u64) -> io::Result<()> {
    let path = "/proc/sys/vm/nr_hugepages";
    let have: u64 = std::fs::read_to_string(path)?.trim().parse().unwrap_or(0);
    if have < count {
        std::fs::write(path, count.to_string())?;
    }
    Ok(())
}

/// Runs `check` in a child of this process and says what it found.
#[allow(dead_code, unsafe_code)]
pub(crate) fn in_a_child(check: impl FnOnce() -> bool) -> bool {
    // UNSAFETY: `fork` in a process with threads. SAFETY: the child only loads and stores memory, without allocating or
    // locking, and leaves by `_exit`.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0, "no child");
        if child == 0 {
            // Of a child that waits for ever the test is not to wait as well.
            libc::alarm(30);
            libc::_exit(i32::from(!check()));
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
    }
}
