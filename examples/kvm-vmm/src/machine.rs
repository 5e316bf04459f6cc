//! What runs guests: vCPUs of KVM, or threads in their place.

use crate::guest::State;
#[cfg(target_arch = "x86_64")]
use crate::kvm;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use uffd_handler::Session;
use uffd_handler::vmm::Vmm;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// What runs guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// KVM if it is there, threads if it is not
    Auto,
    /// vCPUs of KVM
    Kvm,
    /// Threads in their place
    Threads,
}

impl Kind {
    /// Decides, and says so if there is no KVM.
    pub(crate) fn decide(self) -> io::Result<Self> {
        #[cfg(target_arch = "x86_64")]
        let why = kvm::unavailable();
        #[cfg(not(target_arch = "x86_64"))]
        let why = Some("the guest program is for x86-64".to_owned());
        match (self, why) {
            (Kind::Threads, _) => Ok(Kind::Threads),
            (Kind::Kvm, Some(why)) => Err(io::Error::other(why)),
            (Kind::Auto, Some(why)) => {
                eprintln!("{why}; threads run in place of vCPUs");
                Ok(Kind::Threads)
            }
            (_, None) => Ok(Kind::Kvm),
        }
    }

    /// A short name, for JSON.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Kind::Auto => "auto",
            Kind::Kvm => "kvm",
            Kind::Threads => "threads",
        }
    }
}

/// How long nothing may happen to a guest with so many bytes of memory before that is an error: a lost wake-up would be
/// waited out for ever. Much longer than anything takes, on a machine that does other things as well.
pub(crate) const fn patience(memory: u64) -> Duration {
    Duration::from_secs(120 + (memory >> 30) * 60)
}

/// A machine with its memory.
#[derive(Clone)]
pub(crate) struct Machine {
    #[cfg(target_arch = "x86_64")]
    kvm: Option<Arc<kvm::Machine>>,
    vmm: Arc<Vmm>,
}

impl Machine {
    /// A machine on the memory of a VMM.
    pub(crate) fn new(kind: Kind, vmm: Arc<Vmm>, log: bool) -> io::Result<Self> {
        let _ = log;
        Ok(Self {
            #[cfg(target_arch = "x86_64")]
            kvm: match kind {
                Kind::Kvm => Some(Arc::new(kvm::Machine::new(vmm.memory(), log)?)),
                _ => None,
            },
            vmm,
        })
    }

    /// Calls `see` with the offset of every page that the processor's side knows to be written since the last time. `false`
    /// if it keeps no log.
    pub(crate) fn dirty(&self, see: impl FnMut(u64)) -> io::Result<bool> {
        #[cfg(target_arch = "x86_64")]
        if let Some(kvm) = &self.kvm {
            return kvm.dirty(see).map(|()| true);
        }
        drop(see);
        Ok(false)
    }

    /// Lets guests run, one for each state.
    pub(crate) fn start(&self, states: Vec<State>) -> io::Result<Running> {
        extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(SIGRTMIN(), nothing)
            .map_err(|why| io::Error::from_raw_os_error(why.errno()))?;
        let mut running = Running {
            stop: Arc::new(AtomicBool::new(false)),
            guests: Vec::new(),
            left: Vec::new(),
            patience: patience(self.vmm.memory().len()),
        };
        for (number, mut state) in states.into_iter().enumerate() {
            let (vmm, stop) = (self.vmm.clone(), running.stop.clone());
            #[cfg(target_arch = "x86_64")]
            if let Some(kvm) = &self.kvm {
                let mut vcpu = kvm.vcpu(number as u64, &state)?;
                // The memory goes after the VM.
                let kvm = kvm.clone();
                let left = Arc::new(AtomicU64::new(0));
                running.left.push(left.clone());
                running.guests.push(thread::spawn(move || {
                    let ran = vcpu.run(&mut state, &stop, &left);
                    kvm.rest(vcpu);
                    drop((kvm, vmm));
                    ran.map(|()| state)
                }));
                continue;
            }
            let _ = number;
            running.guests.push(thread::spawn(move || {
                state.run_here(vmm.memory(), &stop);
                Ok(state)
            }));
        }
        Ok(running)
    }
}

/// Guests that run.
pub(crate) struct Running {
    stop: Arc<AtomicBool>,
    guests: Vec<JoinHandle<io::Result<State>>>,
    /// How often each vCPU has left KVM. Empty if threads run in their place.
    left: Vec<Arc<AtomicU64>>,
    patience: Duration,
}

/// Ends the process: what hangs can be waited for by nobody, and to drop what it uses would be to wait.
pub(crate) fn give_up(what: &str, after: Duration) -> ! {
    eprintln!("error: {what} for {} s", after.as_secs());
    std::process::exit(1)
}

impl Running {
    /// Whether all of them are done.
    pub(crate) fn is_done(&self) -> bool {
        self.guests.iter().all(JoinHandle::is_finished)
    }

    /// Waits until each vCPU has left KVM once, so that KVM has noted all that it did before: what a vCPU writes is not in
    /// KVM's log at once, but only when the vCPU has left the guest and its thread has got on with that.
    pub(crate) fn leave_once(&self) {
        let begun = Instant::now();
        for (guest, left) in self.guests.iter().zip(&self.left) {
            let before = left.load(Ordering::Acquire);
            while left.load(Ordering::Acquire) == before && !guest.is_finished() {
                if begun.elapsed() > self.patience {
                    give_up("a guest has not been left", self.patience);
                }
                // One that has ended meanwhile is not there to be told.
                let _ = guest.kill(SIGRTMIN());
                thread::sleep(Duration::from_micros(200));
            }
        }
    }

    /// Stops them where they stand.
    pub(crate) fn stop(self) -> io::Result<Vec<State>> {
        self.stop.store(true, Ordering::Release);
        let begun = Instant::now();
        while !self.is_done() {
            if begun.elapsed() > self.patience {
                give_up("a guest has not stopped", self.patience);
            }
            for guest in &self.guests {
                // One that has ended meanwhile is not there to be told.
                let _ = guest.kill(SIGRTMIN());
            }
            thread::sleep(Duration::from_micros(200));
        }
        self.wait()
    }

    /// Waits until they are done, or until nobody serves their faults any more, for which they would wait for ever. Ends the
    /// process if they are not done although no page has been served for long.
    pub(crate) fn watched(self, session: &Session) -> io::Result<Vec<State>> {
        let (mut served, mut since) = (session.progress(), Instant::now());
        while !self.is_done() {
            if since.elapsed() > self.patience {
                let now = session.progress();
                if now == served {
                    give_up(
                        "the guests are not done, and no page was served",
                        self.patience,
                    );
                }
                (served, since) = (now, Instant::now());
            }
            if session.is_over() {
                return Err(io::Error::other("the page-fault handler has failed"));
            }
            thread::sleep(Duration::from_micros(200));
        }
        self.wait()
    }

    fn wait(self) -> io::Result<Vec<State>> {
        let ends = self.guests.into_iter().map(|guest| {
            guest
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a guest's thread panicked")))
        });
        ends.collect()
    }
}
