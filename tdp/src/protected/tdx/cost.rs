//! What a call costs, and hooks into it.
//!
//! Protocol. Time is spent in two places: the *transition* into the module and back, before the call has taken any lock,
//! and the *body*, with every lock of the call held and every check passed. Hooks run at the same two places.

use super::calls::Call;
use super::status::{Operand, Status};
use core::time::Duration;
use std::thread;
use std::time::Instant;
use tdp_rcu::sync::spin_loop;

/// How time is spent.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Wait {
    /// Busy, as the real module does: the processor is taken.
    #[default]
    Spin,
    /// Asleep, so that more calls can overlap than there are processors.
    Sleep,
}

/// What calls cost. By default nothing.
#[derive(Clone, Debug, Default)]
pub struct Costs {
    /// How time is spent.
    pub wait: Wait,
    /// Time of the way in and out of each call, with no lock held.
    pub transition: Duration,
    body: [Duration; Call::COUNT],
}

impl Costs {
    /// Each call takes `body` with its locks held.
    pub fn uniform(wait: Wait, body: Duration) -> Self {
        Self {
            wait,
            transition: Duration::ZERO,
            body: [body; Call::COUNT],
        }
    }

    /// The same, but `call` takes `body`.
    pub fn with(mut self, call: Call, body: Duration) -> Self {
        self.body[call.index()] = body;
        self
    }

    pub(crate) fn spend_transition(&self) {
        self.spend(self.transition);
    }

    pub(crate) fn spend_body(&self, call: Call) {
        self.spend(self.body[call.index()]);
    }

    fn spend(&self, time: Duration) {
        if time.is_zero() {
            return;
        }
        match self.wait {
            Wait::Sleep => thread::sleep(time),
            Wait::Spin => {
                let begin = Instant::now();
                while begin.elapsed() < time {
                    spin_loop();
                }
            }
        }
    }
}

/// Where a test or a benchmark reaches into calls. All methods do nothing unless they are written.
///
/// They run on the thread that makes the call and must not call the same TD from inside [`inside`](Hooks::inside), except
/// to see it refused. A panic in them passes through; the call releases its locks.
pub trait Hooks: Send + Sync {
    /// Before a call has taken any lock: a status to answer instead of making it. Injected answers are not audited.
    fn refuse(&self, call: Call) -> Option<(Status, Operand)> {
        let _ = call;
        None
    }

    /// With every lock of the call held and every check passed, before anything changes.
    fn inside(&self, call: Call) {
        let _ = call;
    }
}

/// No hooks.
impl Hooks for () {}
