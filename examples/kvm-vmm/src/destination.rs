//! The end of a migration to which a guest comes.
//!
//! Protocol. Pages that come ahead are written into the file of guest memory. With the switch come the guests and the list of
//! pages that are absent or out of date; the latter are given up. Then the guests run, and a page that one of them waits for
//! is fetched from the source by the page-fault handler, each once.

use crate::machine::{Machine, patience};
use crate::restore::{Outcome, Served, shape, wrong_words};
use crate::wire::{self, Arrived, Message};
use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use uffd_handler::source::Source;
use uffd_handler::vmm::Vmm;
use uffd_handler::{Config, Engine};

thread_local! {
    static PAGE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The pages of the source, each fetched over one of some connections.
struct Remote {
    len: u64,
    socket: PathBuf,
    idle: Mutex<Vec<UnixStream>>,
}

impl Remote {
    fn idle(&self) -> Option<UnixStream> {
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop()
    }
}

impl Source for Remote {
    fn len(&self) -> u64 {
        self.len
    }

    fn with(&self, offset: u64, len: u64, fill: &mut dyn FnMut(u64)) -> io::Result<()> {
        let stream = match self.idle() {
            Some(stream) => stream,
            None => UnixStream::connect(&self.socket)?,
        };
        PAGE.with_borrow_mut(|page| {
            page.resize(len as usize, 0);
            wire::ask(&stream, offset, page)?;
            fill(page.as_ptr() as u64);
            Ok::<_, io::Error>(())
        })?;
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(stream);
        Ok(())
    }
}

/// Takes a guest in and lets it go on for a while.
pub(crate) fn run(socket: &Path) -> Outcome<()> {
    let control = UnixStream::connect(socket)?;
    wire::limit(&control, patience(0))?;
    let Message::Begin {
        memory,
        kind,
        workers,
        mutex,
    } = wire::receive(&control)?
    else {
        return Err("the source does not say what is to come".into());
    };
    wire::limit(&control, patience(memory))?;
    let vmm = Arc::new(Vmm::new(shape(memory, false))?);
    let file = vmm.memory().file().ok_or("guest memory has no file")?;
    let file = File::from(file.try_clone()?);
    let mut pages = Vec::new();
    let (mut guests, absent) = loop {
        match wire::receive(&control)? {
            Message::Run { offset, len } if wire::is_run(offset, len, memory) => {
                pages.resize(len as usize, 0);
                (&mut &control).read_exact(&mut pages)?;
                file.write_all_at(&pages, offset)?;
            }
            Message::Switch { guests, absent } => break (guests, absent),
            other => return Err(format!("the source says {other:?}").into()),
        }
    };
    for &offset in &absent {
        if !wire::is_run(offset, 4096, memory) {
            return Err(format!("the source lacks a page at {offset:#x}").into());
        }
        vmm.memory().give_up(offset, 4096)?;
    }
    let source = Arc::new(Remote {
        len: memory,
        socket: socket.to_owned(),
        idle: Mutex::default(),
    });
    let config = Config {
        workers,
        engine: if mutex { Engine::Mutex } else { Engine::Tdp },
        ..Config::default()
    };
    let served = Served::of(vmm, source, config)?;
    let machine = Machine::new(kind, served.vmm.clone(), false)?;
    for guest in &mut guests {
        // To the end of the pass in which it was stopped, and once more.
        guest.passes = guest.pass + 2;
    }
    let start = Instant::now();
    let running = machine.start(guests)?;
    wire::send(&control, &Message::Started)?;
    let guests = running.watched(&served.session)?;
    let elapsed = start.elapsed();
    drop(machine);
    let report = served.session.stop()?;
    wire::send(
        &control,
        &Message::Done(Arrived {
            wrong_words: wrong_words(&guests),
            fetched: report.served.filled,
            double_fills: report.existing
                + report.served.filled.saturating_sub(absent.len() as u64),
            nanoseconds: elapsed.as_nanos() as u64,
        }),
    )?;
    Ok(())
}
