//! The files of a recording: finding them, and reading a trace line by line.
//!
//! Protocol. A trace is `NAME.trace.jsonl`, or the same compressed by zstd with `.zst` after it, and stands beside its
//! `NAME.scenario.json`. It is read as a stream; no line and no compression window may take more memory than a bound.
//! A compressed trace ends in an error if it ends early or its checksum is wrong.

use super::scenario::Scenario;
use crate::report::Error;
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

const PLAIN: &str = ".trace.jsonl";
const COMPRESSED: &str = ".trace.jsonl.zst";
const SCENARIO: &str = ".scenario.json";

/// Longest line that a trace may have.
const MAX_LINE: usize = 1 << 20;
/// Largest scenario file.
const MAX_SCENARIO: u64 = 64 << 20;
/// Folders within folders that are looked into.
const MAX_DEPTH: usize = 32;

/// The name of a trace file without what every trace's name ends in.
fn stem(path: &Path) -> Option<&str> {
    let name = path.file_name()?.to_str()?;
    name.strip_suffix(PLAIN)
        .or_else(|| name.strip_suffix(COMPRESSED))
}

/// All traces among `paths`: files as they are, folders with everything below them, sorted.
///
/// # Errors
///
/// If a path does not exist, a file is not a trace by its name, or a folder has none.
pub fn find(paths: &[PathBuf]) -> Result<Vec<PathBuf>, Error> {
    let mut traces = Vec::new();
    for path in paths {
        let kind = fs::metadata(path).map_err(|e| Error::io(path, e))?;
        let before = traces.len();
        if kind.is_dir() {
            search(path, MAX_DEPTH, &mut traces)?;
            if traces.len() == before {
                return Err(Error::run(
                    path.display().to_string(),
                    format!("no trace in this folder (NAME{PLAIN} or NAME{COMPRESSED})"),
                ));
            }
        } else if stem(path).is_some() {
            traces.push(path.clone());
        } else {
            return Err(Error::run(
                path.display().to_string(),
                format!("not a trace: its name ends neither in {PLAIN} nor in {COMPRESSED}"),
            ));
        }
    }
    Ok(traces)
}

fn search(folder: &Path, depth: usize, traces: &mut Vec<PathBuf>) -> Result<(), Error> {
    let entries = fs::read_dir(folder)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| Error::io(folder, e))?;
    let mut paths: Vec<PathBuf> = entries.iter().map(fs::DirEntry::path).collect();
    paths.sort();
    for path in paths {
        // A link is followed to a file, not to a folder: folders cannot then contain themselves.
        let is_folder = fs::symlink_metadata(&path).is_ok_and(|kind| kind.is_dir());
        if is_folder && depth > 0 {
            search(&path, depth - 1, traces)?;
        } else if !is_folder && stem(&path).is_some() {
            traces.push(path);
        }
    }
    Ok(())
}

/// Reads the scenario that belongs to the trace `path`.
///
/// # Errors
///
/// If it is not there, cannot be read or is not a scenario.
pub fn scenario(path: &Path) -> Result<Scenario, Error> {
    let Some(stem) = stem(path) else {
        return Err(Error::run(
            path.display().to_string(),
            "not a trace by its name",
        ));
    };
    let beside = path.with_file_name(format!("{stem}{SCENARIO}"));
    let mut text = String::new();
    let file = File::open(&beside).map_err(|e| Error::io(&beside, e))?;
    file.take(MAX_SCENARIO)
        .read_to_string(&mut text)
        .map_err(|e| Error::io(&beside, e))?;
    Scenario::parse(&text).map_err(|what| Error::run(beside.display().to_string(), what))
}

/// The lines of a trace.
pub struct Lines {
    reader: Box<dyn BufRead>,
    buffer: Vec<u8>,
    number: u64,
}

impl Lines {
    /// Opens the trace `path`.
    ///
    /// # Errors
    ///
    /// If it cannot be opened or is not compressed as its name says.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = BufReader::new(File::open(path).map_err(|e| Error::io(path, e))?);
        let compressed = path.to_string_lossy().ends_with(COMPRESSED);
        Ok(Self::of(file, compressed))
    }

    /// The lines of what is read from `file`, plain or compressed.
    pub fn of(file: impl BufRead + 'static, compressed: bool) -> Self {
        let reader: Box<dyn BufRead> = if compressed {
            Box::new(BufReader::with_capacity(
                1 << 16,
                Frames { file, frame: None },
            ))
        } else {
            Box::new(file)
        };
        Self {
            reader,
            buffer: Vec::new(),
            number: 0,
        }
    }

    /// Number of the line that was read last, from 1.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The next line that is not empty; `None` at the end.
    ///
    /// # Errors
    ///
    /// If reading or decompressing fails, or the line is too long or not UTF-8.
    pub fn next_line(&mut self) -> io::Result<Option<&str>> {
        loop {
            self.buffer.clear();
            self.number += 1;
            let read = (&mut self.reader)
                .take(MAX_LINE as u64 + 1)
                .read_until(b'\n', &mut self.buffer)?;
            if read == 0 {
                return Ok(None);
            }
            if self.buffer.len() > MAX_LINE {
                return Err(io::Error::new(
                    ErrorKind::InvalidData,
                    format!("line longer than {MAX_LINE} bytes"),
                ));
            }
            if !self.buffer.trim_ascii().is_empty() {
                break;
            }
        }
        let text =
            str::from_utf8(&self.buffer).map_err(|e| io::Error::new(ErrorKind::InvalidData, e))?;
        Ok(Some(text.trim_ascii()))
    }
}

/// Decompressed content of one zstd frame after the other.
struct Frames<R> {
    file: R,
    frame: Option<FrameDecoder>,
}

impl<R: BufRead> Frames<R> {
    /// Decompresses until something can be read from the frame, or it ends.
    fn advance(&mut self, frame: &mut FrameDecoder) -> io::Result<()> {
        while frame.can_collect() == 0 && !frame.is_finished() {
            frame
                .decode_blocks(&mut self.file, BlockDecodingStrategy::UptoBlocks(1))
                .map_err(broken)?;
        }
        Ok(())
    }
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut frame = match self.frame.take() {
                Some(frame) => frame,
                None if self.file.fill_buf()?.is_empty() => return Ok(0),
                None => {
                    let mut frame = FrameDecoder::new();
                    frame.init(&mut self.file).map_err(broken)?;
                    frame
                }
            };
            self.advance(&mut frame)?;
            let read = frame.read(out)?;
            if read > 0 || out.is_empty() {
                self.frame = Some(frame);
                return Ok(read);
            }
            let recorded = frame.get_checksum_from_data();
            if recorded.is_some() && recorded != frame.get_calculated_checksum() {
                return Err(broken("wrong checksum"));
            }
        }
    }
}

fn broken(what: impl fmt::Display) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("zstd: {what}"))
}
