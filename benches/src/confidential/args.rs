//! Flags about the trusted module, the same in every scenario.

use super::backend::BackendChoice;
use super::conditions::{Wait, Weather};
use crate::time;
use serde::Serialize;
use std::time::Duration;

/// Largest share of calls that may be refused: with all of them refused nothing would ever be done.
const HIGHEST_RATE: f64 = 0.9;

/// Which module, and what its calls meet.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Trusted module")]
pub struct BackendArgs {
    /// The trusted module
    #[arg(long, value_enum, default_value_t = BackendChoice::Tdx)]
    pub backend: BackendChoice,

    /// What its calls meet
    #[command(flatten)]
    pub module: ModuleArgs,
}

/// What the module's calls meet.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Trusted module")]
pub struct ModuleArgs {
    /// What each call of the module takes: 0, or a number with ns, us or ms. A real TDX module takes 5 to 8 us
    #[arg(long, value_name = "TIME", default_value = "5us", value_parser = time::parse)]
    pub backend_cost: Duration,

    /// How the call's time is spent
    #[arg(long, value_enum, default_value_t = Wait::Spin)]
    pub backend_wait: Wait,

    /// Share of calls that are answered "busy", beside those that the module itself finds busy
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = rate)]
    pub busy_rate: f64,

    /// Share of calls that are refused for good, of those that a roll-back can undo
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = rate)]
    pub fail_rate: f64,

    /// Seed of whatever is random
    #[arg(short = 'r', long, default_value_t = 1)]
    pub seed: u64,
}

impl BackendArgs {
    /// For JSON.
    pub fn parameters(&self) -> BackendParameters {
        BackendParameters {
            backend: self.name(),
            module: self.module.parameters(),
        }
    }

    /// The module's name.
    pub const fn name(&self) -> &'static str {
        match self.backend {
            BackendChoice::Tdx => "tdx",
            BackendChoice::Null => "null",
        }
    }
}

impl ModuleArgs {
    /// What calls meet.
    pub fn weather(&self) -> Weather {
        Weather {
            wait: self.backend_wait,
            cost: self.backend_cost,
            busy_rate: self.busy_rate,
            fail_rate: self.fail_rate,
            seed: self.seed,
        }
    }

    /// The same for JSON.
    pub fn parameters(&self) -> ModuleParameters {
        ModuleParameters {
            backend_cost_ns: self.backend_cost.as_nanos() as u64,
            backend_wait: match self.backend_wait {
                Wait::Spin => "spin",
                Wait::Sleep => "sleep",
            },
            busy_rate: self.busy_rate,
            fail_rate: self.fail_rate,
            seed: self.seed,
        }
    }
}

/// [`BackendArgs`] in a report.
#[derive(Clone, Debug, Serialize)]
pub struct BackendParameters {
    backend: &'static str,
    #[serde(flatten)]
    module: ModuleParameters,
}

/// [`ModuleArgs`] in a report.
#[derive(Clone, Debug, Serialize)]
pub struct ModuleParameters {
    backend_cost_ns: u64,
    backend_wait: &'static str,
    busy_rate: f64,
    fail_rate: f64,
    seed: u64,
}

/// Parses a share from 0 to [`HIGHEST_RATE`].
fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if (0.0..=HIGHEST_RATE).contains(&rate) => Ok(rate),
        _ => Err(format!(
            "not a share: write a number from 0 to {HIGHEST_RATE}"
        )),
    }
}
