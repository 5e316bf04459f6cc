//! A small VMM on `/dev/kvm`, and an example of how a real guest is restored and migrated by the page-fault handler beside it.

mod destination;
mod guest;
#[cfg(target_arch = "x86_64")]
mod kvm;
mod machine;
mod migrate;
mod restore;
mod wire;

use clap::{Args, Parser, Subcommand};
use machine::Kind;
use restore::{Outcome, Plan};
use std::path::PathBuf;
use std::process::ExitCode;

/// Restores and migrates guests that check every word that they read.
#[derive(Parser)]
#[command(version, about, long_about = None)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Restores a snapshot lazily, while all vCPUs run on it
    Restore(Options),
    /// Migrates running guests to another process
    Migrate {
        #[command(flatten)]
        options: Options,
        /// Rounds in which pages go ahead of the guests
        #[arg(long, default_value_t = 3)]
        ahead: usize,
    },
    /// The other process
    #[command(hide = true)]
    Destination {
        /// Where the source listens
        socket: PathBuf,
    },
}

#[derive(Args, Clone)]
struct Options {
    /// vCPUs
    #[arg(long, default_value_t = 2)]
    vcpus: u64,
    /// Guest memory, in MiB (256M) or GiB (1G)
    #[arg(long, default_value = "256M", value_parser = size)]
    memory: u64,
    /// Threads that resolve faults
    #[arg(long, default_value_t = 2)]
    workers: usize,
    /// What runs the guests
    #[arg(long, value_enum, default_value_t = Kind::Auto)]
    machine: Kind,
    /// Rounds of each of the two handlers that are compared
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Write the figures here as JSON, - for the terminal
    #[arg(long)]
    json: Option<PathBuf>,
}

fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.strip_suffix(['M', 'm']) {
        Some(digits) => (digits, 20),
        None => match text.strip_suffix(['G', 'g']) {
            Some(digits) => (digits, 30),
            None => return Err("a number of M or G is meant".into()),
        },
    };
    let number: u64 = digits.parse().map_err(|_| "that is no number")?;
    number
        .checked_mul(1 << shift)
        .filter(|bytes| (1 << 20..=60 << 30).contains(bytes))
        .ok_or_else(|| "1M to 60G are possible".into())
}

impl Options {
    fn plan(&self) -> Outcome<Plan> {
        if let Some(why) = uffd_handler::sys::unavailable() {
            return Err(why.into());
        }
        if !(1..=64).contains(&self.vcpus) {
            return Err("1 to 64 vCPUs are possible".into());
        }
        Ok(Plan {
            kind: self.machine.decide()?,
            vcpus: self.vcpus,
            memory: self.memory,
            workers: self.workers.max(1),
            rounds: self.rounds.max(1),
        })
    }

    fn show<T: serde::Serialize>(&self, figures: &T, text: String) -> Outcome<()> {
        match &self.json {
            Some(path) if path.as_os_str() == "-" => {
                println!("{}", serde_json::to_string_pretty(figures)?);
            }
            Some(path) => {
                std::fs::write(path, serde_json::to_string_pretty(figures)?)?;
                println!("{text}");
            }
            None => println!("{text}"),
        }
        Ok(())
    }
}

fn restore(options: &Options) -> Outcome<()> {
    let it = restore::run(&options.plan()?)?;
    let kvm = it
        .dirty
        .kvm
        .map_or("none".into(), |pages| pages.to_string());
    let text = format!(
        "{} vCPUs ({}), {} MiB, {} workers: {} pages served, {} wrong words, {} double fills\n\
         {:.0} pages/s, one mutex {:.0}: {:.2} times\n\
         dirty pages: ours {}, KVM's {kvm}; {} missed, {} different",
        it.vcpus,
        it.machine,
        it.memory_bytes >> 20,
        it.workers,
        it.pages_served,
        it.wrong_words,
        it.double_fills,
        it.pages_per_s,
        it.mutex_pages_per_s,
        it.ratio,
        it.dirty.ours,
        it.dirty.missed,
        it.dirty.different
    );
    options.show(&it, text)?;
    verdict(it.wrong_words + it.double_fills + it.dirty.missed + it.dirty.different)
}

fn migrate(options: &Options, ahead: usize) -> Outcome<()> {
    let it = migrate::run(&options.plan()?, ahead)?;
    let logs = match (it.missed, it.only_ours) {
        (Some(missed), Some(more)) => {
            format!("{missed} pages of KVM's not in ours, {more} only in ours")
        }
        _ => "only ours".into(),
    };
    let ahead = match (it.ahead_pages_per_s, it.downtime_ms) {
        (Some(rate), Some(down)) => {
            format!(
                "ahead {:?} pages, {rate:.0} pages/s; down for {down:.1} ms",
                it.ahead
            )
        }
        _ => "nothing ahead".into(),
    };
    let text = format!(
        "{} vCPUs ({}), {} MiB, {} workers, {} migrations: {} wrong words, {} double fills\n\
         {ahead}; {} absent, {} fetched\n\
         where nothing goes ahead {:.0} pages/s, one mutex {:.0}: {:.2} times\n\
         logs: {logs}",
        it.vcpus,
        it.machine,
        it.memory_bytes >> 20,
        it.workers,
        it.migrations,
        it.wrong_words,
        it.double_fills,
        it.absent,
        it.fetched,
        it.pages_per_s,
        it.mutex_pages_per_s,
        it.ratio
    );
    options.show(&it, text)?;
    let lost = it.absent.abs_diff(it.fetched) + it.missed.unwrap_or(0);
    verdict(it.wrong_words + it.double_fills + lost)
}

/// Fails if anything is wrong.
fn verdict(wrong: u64) -> Outcome<()> {
    match wrong {
        0 => Ok(()),
        _ => Err("the guests did not find what they should".into()),
    }
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Restore(options) => restore(&options),
        Command::Migrate { options, ahead } => migrate(&options, ahead),
        Command::Destination { socket } => destination::run(&socket),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
