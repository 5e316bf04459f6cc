//! Conditions under which a trusted module works: what its calls cost, and how often they are refused.
//!
//! Both backends ask here, the model of the TDX module from its hooks, the null backend from each of its methods. Conditions
//! are *calm* (calls are free and succeed) until they are raised, so that whatever is not measured costs nothing. Time is
//! spent where the module holds every lock of the call, and what was really spent is added up: a sleep takes longer than
//! it was asked to.

use crate::sync::{AtomicBool, AtomicU64, Ordering, Padded};
use std::cell::Cell;
use std::time::{Duration, Instant};
use tdp::protected::HandOffStep;
use tdp::protected::tdx::{Call, Hooks, Operand, Status};

/// How a call spends its time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Wait {
    /// Busy, as a real module does: the processor is taken
    #[default]
    Spin,
    /// Asleep, so that more calls overlap than there are processors
    Sleep,
}

/// What calls meet once conditions are raised.
#[derive(Clone, Copy, Debug, Default)]
pub struct Weather {
    /// How time is spent.
    pub wait: Wait,
    /// Time of each call.
    pub cost: Duration,
    /// Share of calls that are answered "busy".
    pub busy_rate: f64,
    /// Share of calls that are refused, of those that a roll-back can undo.
    pub fail_rate: f64,
    /// Seed of what is refused.
    pub seed: u64,
}

/// A refusal that is not the module's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injected {
    /// To be tried again.
    Busy,
    /// Not to be tried again.
    Failed,
}

/// See the module.
#[derive(Debug)]
pub struct Conditions {
    weather: Weather,
    /// Read by every call, written between laps.
    raised: Padded<AtomicBool>,
    spent: Padded<Spent>,
}

#[derive(Debug, Default)]
struct Spent {
    calls: AtomicU64,
    ns: AtomicU64,
    busy: AtomicU64,
    failed: AtomicU64,
}

/// What calls have met so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Met {
    /// Calls that took their time.
    pub calls: u64,
    /// Nanoseconds that they really took.
    pub ns: u64,
    /// Calls answered "busy" on purpose.
    pub injected_busy: u64,
    /// Calls refused on purpose.
    pub injected_failures: u64,
}

impl Met {
    /// Nanoseconds a call, as achieved; `None` if none took time.
    pub fn ns_per_call(&self) -> Option<f64> {
        (self.calls != 0).then(|| self.ns as f64 / self.calls as f64)
    }

    /// Adds what was met in another interval.
    pub fn add(&mut self, other: &Self) {
        self.calls += other.calls;
        self.ns += other.ns;
        self.injected_busy += other.injected_busy;
        self.injected_failures += other.injected_failures;
    }

    /// What was met since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            calls: self.calls - before.calls,
            ns: self.ns - before.ns,
            injected_busy: self.injected_busy - before.injected_busy,
            injected_failures: self.injected_failures - before.injected_failures,
        }
    }
}

thread_local! {
    /// State of this thread's generator; 0 before its first draw.
    static DRAWS: Cell<u64> = const { Cell::new(0) };
}

impl Conditions {
    /// Calm conditions that become `weather` when they are raised.
    pub fn new(weather: Weather) -> Self {
        Self {
            weather,
            raised: Padded::default(),
            spent: Padded::default(),
        }
    }

    /// From now on calls cost and are refused.
    pub fn raise(&self) {
        // Read by threads that are started afterwards, or may be late.
        self.raised.0.store(true, Ordering::Relaxed);
    }

    /// From now on calls are free and succeed.
    pub fn calm(&self) {
        self.raised.0.store(false, Ordering::Relaxed);
    }

    /// Whether calls are refused on purpose.
    pub fn injects(&self) -> bool {
        self.weather.busy_rate + self.weather.fail_rate > 0.0
    }

    /// What calls have met so far.
    pub fn met(&self) -> Met {
        let read = |word: &AtomicU64| word.load(Ordering::Relaxed);
        let spent = &self.spent.0;
        Met {
            calls: read(&spent.calls),
            ns: read(&spent.ns),
            injected_busy: read(&spent.busy),
            injected_failures: read(&spent.failed),
        }
    }

    /// Spends what a call costs.
    #[inline(always)]
    pub fn spend(&self) {
        if self.raised.0.load(Ordering::Relaxed) && !self.weather.cost.is_zero() {
            self.spend_now();
        }
    }

    #[inline(never)]
    fn spend_now(&self) {
        let begin = Instant::now();
        if self.weather.wait == Wait::Sleep {
            std::thread::sleep(self.weather.cost);
        }
        let mut spent = begin.elapsed();
        while spent < self.weather.cost {
            std::hint::spin_loop();
            spent = begin.elapsed();
        }
        let ns = u64::try_from(spent.as_nanos()).unwrap_or(u64::MAX);
        self.spent.0.calls.fetch_add(1, Ordering::Relaxed);
        self.spent.0.ns.fetch_add(ns, Ordering::Relaxed);
    }

    /// Whether a call is refused on purpose: any may be busy, and `may_fail` ones may fail.
    #[inline(always)]
    pub fn refuse(&self, may_fail: bool) -> Option<Injected> {
        let Weather {
            busy_rate,
            fail_rate,
            ..
        } = self.weather;
        if !self.raised.0.load(Ordering::Relaxed) || busy_rate + fail_rate == 0.0 {
            return None;
        }
        let drawn = self.draw();
        if drawn < busy_rate {
            self.spent.0.busy.fetch_add(1, Ordering::Relaxed);
            Some(Injected::Busy)
        } else if may_fail && drawn < busy_rate + fail_rate {
            self.spent.0.failed.fetch_add(1, Ordering::Relaxed);
            Some(Injected::Failed)
        } else {
            None
        }
    }

    /// A number from 0 to 1 of this thread's own sequence.
    fn draw(&self) -> f64 {
        DRAWS.with(|state| {
            if state.get() == 0 {
                state.set(seed_of_thread(self.weather.seed));
            }
            let (next, drawn) = splitmix(state.get());
            state.set(next);
            (drawn >> 11) as f64 / (1_u64 << 53) as f64
        })
    }
}

/// A seed that differs from thread to thread.
fn seed_of_thread(seed: u64) -> u64 {
    static THREADS: AtomicU64 = AtomicU64::new(1);
    splitmix(seed ^ THREADS.fetch_add(1, Ordering::Relaxed).rotate_left(32)).1 | 1
}

/// One step of the SplitMix64 generator: its next state, and a number.
pub fn splitmix(state: u64) -> (u64, u64) {
    let state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (state, z ^ (z >> 31))
}

/// Whether a step may fail for good: what comes after a block and its ticket may not.
pub const fn may_fail(step: HandOffStep) -> bool {
    matches!(
        step,
        HandOffStep::Link
            | HandOffStep::Install
            | HandOffStep::Block
            | HandOffStep::Flush
            | HandOffStep::Split
    )
}

/// The step that makes a call of the TDX module, if a hand-off makes it.
pub(crate) const fn step_of(call: Call) -> Option<HandOffStep> {
    STEPS[call as usize]
}

const STEPS: [Option<HandOffStep>; Call::COUNT] = {
    let mut steps = [None; Call::COUNT];
    let mut n = 0;
    while n < HandOffStep::ALL.len() {
        let step = HandOffStep::ALL[n];
        steps[Call::of_step(step) as usize] = Some(step);
        n += 1;
    }
    steps
};

/// Conditions of the model of the TDX module.
#[derive(Debug)]
pub struct TdxConditions(pub std::sync::Arc<Conditions>);

impl Hooks for TdxConditions {
    fn refuse(&self, call: Call) -> Option<(Status, Operand)> {
        let may_fail = may_fail(step_of(call)?);
        self.0.refuse(may_fail).map(|injected| match injected {
            Injected::Busy => (Status::OperandBusy, Operand::RCX),
            Injected::Failed => (Status::OperandInvalid, Operand::R8),
        })
    }

    fn inside(&self, call: Call) {
        if step_of(call).is_some() {
            self.0.spend();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weather() -> Weather {
        Weather {
            cost: Duration::from_micros(50),
            busy_rate: 0.5,
            fail_rate: 0.25,
            seed: 7,
            ..Weather::default()
        }
    }

    #[test]
    fn calm_conditions_cost_nothing_and_refuse_nothing() {
        let conditions = Conditions::new(weather());
        conditions.spend();
        assert!((0..1000).all(|_| conditions.refuse(true).is_none()));
        assert_eq!(conditions.met(), Met::default());
    }

    #[test]
    fn raised_ones_do_what_they_say() {
        let conditions = Conditions::new(weather());
        conditions.raise();
        conditions.spend();
        let met = conditions.met();
        assert_eq!(met.calls, 1);
        assert!(met.ns >= 50_000);
        for _ in 0..10_000 {
            conditions.refuse(true);
        }
        let met = conditions.met();
        assert!((4500..5500).contains(&met.injected_busy), "{met:?}");
        assert!((2000..3000).contains(&met.injected_failures), "{met:?}");
        for _ in 0..1000 {
            assert_ne!(conditions.refuse(false), Some(Injected::Failed));
        }
        conditions.calm();
        assert_eq!(conditions.refuse(true), None);
    }

    #[test]
    fn what_follows_a_ticket_never_fails() {
        for step in [HandOffStep::Remove, HandOffStep::Unlink, HandOffStep::Merge] {
            assert!(!may_fail(step), "{step:?}");
        }
        assert_eq!(step_of(Call::VpEnter), None);
        assert_eq!(step_of(Call::MemPageAug), Some(HandOffStep::Install));
    }
}
