//! What the two ends of a migration say to each other.
//!
//! Protocol. One connection for control: messages as JSON behind their length in four bytes, [`Message::Run`] followed by the
//! content of its pages. Then one connection for each thread that fetches pages after the switch: an offset, a length, and in
//! answer the bytes. What comes from the other end is checked before it is used.

use crate::guest::State;
use crate::machine::Kind;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Longest message, without pages.
const LONGEST: usize = 256 << 20;
/// Most bytes of pages behind one message.
pub(crate) const RUN: u64 = 256 << 10;

/// A message.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Message {
    /// To the destination: what is to come.
    Begin {
        memory: u64,
        kind: Kind,
        workers: usize,
        /// Whether pages are fetched under one mutex, to compare.
        mutex: bool,
    },
    /// To the destination: pages.
    Run { offset: u64, len: u64 },
    /// To the destination: the guests, stopped, and the pages that it does not have.
    Switch {
        guests: Vec<State>,
        absent: Vec<u64>,
    },
    /// To the source: the guests run again.
    Started,
    /// To the source: how it ended.
    Done(Arrived),
}

/// What the destination saw.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Arrived {
    pub(crate) wrong_words: u64,
    /// Pages that a guest waited for.
    pub(crate) fetched: u64,
    pub(crate) double_fills: u64,
    /// Nanoseconds from the start of the guests until each had read everything.
    pub(crate) nanoseconds: u64,
}

pub(crate) fn send(stream: &UnixStream, message: &Message) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let len = u32::try_from(text.len()).map_err(io::Error::other)?;
    (&mut &*stream).write_all(&len.to_le_bytes())?;
    (&mut &*stream).write_all(&text)
}

/// Has this end wait no longer than that for the other one, to send or to take anything.
pub(crate) fn limit(stream: &UnixStream, patience: Duration) -> io::Result<()> {
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))
}

/// The next message.
pub(crate) fn receive(stream: &UnixStream) -> io::Result<Message> {
    let mut len = [0; 4];
    (&mut &*stream)
        .read_exact(&mut len)
        .map_err(|error| match error.kind() {
            // What an ordinary read says of a limit that has passed.
            io::ErrorKind::WouldBlock => io::Error::new(
                io::ErrorKind::TimedOut,
                "nothing has come from the other end for too long",
            ),
            _ => error,
        })?;
    let len = u32::from_le_bytes(len) as usize;
    if len > LONGEST {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    let mut text = vec![0; len];
    (&mut &*stream).read_exact(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Whether these are pages of a guest with so much memory.
pub(crate) fn is_run(offset: u64, len: u64, memory: u64) -> bool {
    let whole = offset.is_multiple_of(4096) && len.is_multiple_of(4096);
    whole && (1..=RUN).contains(&len) && offset <= memory && len <= memory - offset
}

/// A request for a page.
pub(crate) fn ask(stream: &UnixStream, offset: u64, page: &mut [u8]) -> io::Result<()> {
    let words = [offset, page.len() as u64].map(u64::to_le_bytes);
    (&mut &*stream).write_all(words.as_flattened())?;
    (&mut &*stream).read_exact(page)
}

/// The next request, or none if the other end has gone.
pub(crate) fn asked(stream: &UnixStream) -> io::Result<Option<(u64, u64)>> {
    let mut words = [[0; 8]; 2];
    match (&mut &*stream).read_exact(words.as_flattened_mut()) {
        Ok(()) => {
            let [offset, len] = words.map(u64::from_le_bytes);
            Ok(Some((offset, len)))
        }
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_that_says_nothing_is_not_waited_for() {
        let (here, there) = UnixStream::pair().expect("a connection");
        limit(&here, Duration::from_millis(10)).expect("a limit");
        let came = receive(&here).map_err(|error| error.kind());
        assert!(matches!(came, Err(io::ErrorKind::TimedOut)), "{came:?}");
        send(&there, &Message::Started).expect("a message");
        let came = receive(&here);
        assert!(matches!(came, Ok(Message::Started)), "{came:?}");
    }
}
