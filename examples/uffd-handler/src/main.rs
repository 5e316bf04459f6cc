//! The command line.

use clap::{Args, Parser, Subcommand};
use std::error::Error;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use std::{fs, thread};
use uffd_handler::bench::{self, Figures, Plan};
use uffd_handler::source::{Remote, Snapshot, Source};
use uffd_handler::{Config, Engine, Report, Session, protocol};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Serves the page faults of lazily restored VMs.
#[derive(Parser)]
#[command(version, about, long_about = None)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Listens for VMMs and serves each, by Firecracker's protocol
    Serve(Serve),
    /// Compares it with one global mutex and a bitmap, and measures what the library costs
    Bench(Measure),
}

#[derive(Args, Clone)]
struct Measure {
    /// MiB of guest memory
    #[arg(long, default_value_t = 64)]
    memory: u64,
    /// Rounds of each
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Faulting threads, and as many workers
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Faulting threads, and as many workers, on a source that sleeps for each page
    #[arg(long, default_value_t = 64)]
    many: usize,
    /// Microseconds that it sleeps
    #[arg(long, default_value_t = 1000)]
    delay: u64,
    /// Write the figures here as JSON, - for the terminal
    #[arg(long)]
    json: Option<PathBuf>,
    /// Fail unless the figures are as they should be
    ///
    /// No word is wrong and no page filled twice; pages of 4 KiB are filled at 1.3 times the rate with one mutex at least; the
    /// library adds 3 % to an ioctl at most; and many threads on the slow source reach 50 times the rate of one, or nine
    /// tenths of what bare threads that sleep and answer reach on this machine. On a machine that is busy with something
    /// else it may fail for no other reason.
    #[arg(long)]
    check: bool,
}

#[derive(Args, Clone)]
struct Serve {
    /// Socket to listen on; one that is left over is replaced
    #[arg(long)]
    socket: PathBuf,
    /// Memory file of the snapshot
    #[arg(long)]
    snapshot: PathBuf,
    /// Threads that resolve faults
    #[arg(long, default_value_t = 2)]
    workers: usize,
    /// What resolves them: the library, or one mutex and a bitmap to compare it with
    #[arg(long, value_enum, default_value_t = Resolver::Tdp)]
    engine: Resolver,
    /// Fill everything that nobody asks for, beside the faults
    #[arg(long)]
    background: bool,
    /// Fill these pages first: a file that --record has written
    #[arg(long)]
    prefetch: Option<PathBuf>,
    /// Write which pages were asked for, in order, here
    #[arg(long)]
    record: Option<PathBuf>,
    /// Sleep so many microseconds for each page, as a remote store would
    #[arg(long, default_value_t = 0)]
    delay: u64,
    /// End after the first VMM
    #[arg(long)]
    once: bool,
    /// End a VMM whose faults cannot be served any more, because it would hang
    #[arg(long)]
    kill: bool,
    /// Show how far the background copy is
    #[arg(long)]
    progress: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Resolver {
    Tdp,
    Mutex,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Serve(options) => serve(&options),
        Command::Bench(options) => measure(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(options: &Measure) -> Outcome<()> {
    let figures = bench::measure(&Plan {
        memory: options.memory.max(2) << 20,
        rounds: options.rounds.max(1),
        threads: options.threads.max(1),
        many: options.many.max(1),
        delay: Duration::from_micros(options.delay),
    })?;
    let shortcomings = figures.shortcomings();
    match &options.json {
        Some(path) if path.as_os_str() == "-" => {
            println!("{}", serde_json::to_string_pretty(&figures)?);
        }
        Some(path) => {
            fs::write(path, serde_json::to_string_pretty(&figures)?)?;
            show(figures, options.rounds);
        }
        None => show(figures, options.rounds),
    }
    if options.check && !shortcomings.is_empty() {
        return Err(shortcomings.join("; ").into());
    }
    Ok(())
}

/// Shows figures to be read.
fn show(figures: Figures, rounds: usize) {
    let Figures {
        processors,
        compared,
        scaled,
        overhead,
    } = figures;
    println!("{processors} processors; pages for each second, medians of {rounds} rounds");
    for it in compared {
        println!(
            "{}, {} threads and workers: {:.0}, one mutex {:.0}: {:.2} times; {} wrong words, {} double fills",
            it.what,
            it.threads,
            it.tdp_pages_per_s,
            it.mutex_pages_per_s,
            it.ratio,
            it.wrong_words,
            it.double_fills
        );
    }
    println!(
        "{} us for each page, {} threads and workers: {:.0}, one thread {:.0}: {:.1} times (bare threads {:.1}); one mutex {:.0}; {} wrong words, {} double fills",
        scaled.delay_us,
        scaled.threads,
        scaled.many_pages_per_s,
        scaled.one_pages_per_s,
        scaled.ratio,
        scaled.bare_ratio,
        scaled.mutex_pages_per_s,
        scaled.wrong_words,
        scaled.double_fills
    );
    println!(
        "one ioctl {:.0} ns, a fault without it {:.0} ns: {:.1} %",
        overhead.ioctl_ns, overhead.library_ns, overhead.percent
    );
}

fn serve(options: &Serve) -> Outcome<()> {
    let in_file = |path: &Path| {
        let path = path.display().to_string();
        move |error: std::io::Error| format!("{path}: {error}")
    };
    let snapshot = Snapshot::open(&options.snapshot).map_err(in_file(&options.snapshot))?;
    let source: Arc<dyn Source> = match options.delay {
        0 => Arc::new(snapshot),
        delay => Arc::new(Remote::new(snapshot, Duration::from_micros(delay))),
    };
    let prefetch = match &options.prefetch {
        Some(path) => serde_json::from_slice(&fs::read(path).map_err(in_file(path))?)?,
        None => Vec::new(),
    };
    let config = Config {
        workers: options.workers,
        engine: match options.engine {
            Resolver::Tdp => Engine::Tdp,
            Resolver::Mutex => Engine::Mutex,
        },
        background: options.background,
        prefetch,
        record: options.record.is_some(),
    };
    // Left over by a handler that died. Anything else that is there is not ours to remove.
    if fs::symlink_metadata(&options.socket).is_ok_and(|it| it.file_type().is_socket()) {
        let _ = fs::remove_file(&options.socket);
    }
    let listener = UnixListener::bind(&options.socket).map_err(in_file(&options.socket))?;
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if options.once => return Err(error.into()),
            Err(error) => {
                // Too many descriptors, most likely: those VMs that are served are to be served on.
                eprintln!("error: no connection: {error}");
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let (source, config, options) = (source.clone(), config.clone(), options.clone());
        let once = options.once;
        let vm = thread::Builder::new().spawn(move || {
            let done = serve_one(&stream, source, config, &options);
            match &done {
                Ok(report) => println!("{}", serde_json::json!(report)),
                Err(error) => {
                    eprintln!("error: {error}");
                    if options.kill {
                        end_peer(&stream);
                    }
                }
            }
            done.map(drop).map_err(|error| error.to_string())
        });
        let vm = match vm {
            Ok(vm) => vm,
            Err(error) if once => return Err(error.into()),
            Err(error) => {
                eprintln!("error: no thread for a connection: {error}");
                continue;
            }
        };
        if once {
            return Ok(vm.join().map_err(|_| "a thread panicked")??);
        }
    }
}

/// Serves one VMM to its end.
fn serve_one(
    stream: &UnixStream,
    source: Arc<dyn Source>,
    config: Config,
    options: &Serve,
) -> Outcome<Report> {
    let hello = protocol::receive(stream, source.len())?;
    let session = Session::start(hello, source, config)?;
    thread::scope(|scope| {
        if options.progress {
            let shown = thread::Builder::new().spawn_scoped(scope, || show_progress(&session));
            if let Err(error) = shown {
                eprintln!("error: no thread to show how far it is: {error}");
            }
        }
        session.wait(stream);
        session.finish();
    });
    let mut report = session.stop()?;
    if let Some(path) = &options.record {
        fs::write(path, serde_json::to_vec(&report.recorded)?)?;
        report.recorded.clear();
    }
    Ok(report)
}

fn show_progress(session: &Session) {
    let (_, total) = session.progress();
    let bar = indicatif::ProgressBar::new(total * 4096);
    let template = "{wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}";
    if let Ok(style) = indicatif::ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    while !session.is_over() {
        let (filled, total) = session.progress();
        bar.set_length(total * 4096);
        bar.set_position(filled * 4096);
        thread::sleep(Duration::from_millis(100));
    }
    bar.finish();
}

/// Ends the process at the other end of a connection.
fn end_peer(stream: &UnixStream) {
    match uffd_handler::sys::end_peer(stream) {
        Ok(pid) => eprintln!("process {pid} was ended: its memory cannot be served"),
        Err(error) => eprintln!("the process at the other end could not be ended: {error}"),
    }
}
