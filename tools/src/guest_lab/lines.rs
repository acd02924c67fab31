//! Lines from a stream, with deadlines: the guest's serial ports, QMP.
//!
//! A reader thread splits the stream and sends lines through a channel; it ends with the stream. The newest lines are
//! kept for error messages. A peer that never sends a newline is cut at [`LINE_BYTES_MAX`].

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use super::LabError;

/// Longer lines come in pieces.
const LINE_BYTES_MAX: u64 = 64 * 1024;

/// Lines that may wait to be read before the reader thread stops reading.
const LINES_QUEUED_MAX: usize = 64 * 1024;

/// Lines shown in an error message.
const TAIL_LINES: usize = 40;

/// The reading half of a stream.
#[derive(Debug)]
pub(super) struct Lines {
    who: String,
    receiver: Receiver<String>,
    tail: VecDeque<String>,
}

impl Lines {
    /// Starts reading; `who` names the peer in messages.
    pub(super) fn read_from<R: Read + Send + 'static>(who: &str, stream: R) -> Self {
        let (sender, receiver) = sync_channel(LINES_QUEUED_MAX);
        // Detached: it ends when the stream or the receiver does.
        thread::spawn(move || pump(stream, &sender));
        Self { who: who.to_owned(), receiver, tail: VecDeque::new() }
    }

    /// The next line, without its end.
    pub(super) fn next(
        &mut self,
        what: &str,
        end: Instant,
        limit: Duration,
    ) -> Result<String, LabError> {
        let left = end.saturating_duration_since(Instant::now());
        match self.receiver.recv_timeout(left) {
            Ok(line) => {
                self.remember(&line);
                Ok(line)
            }
            Err(RecvTimeoutError::Timeout) => Err(LabError::Deadline {
                what: format!("{what} from {}", self.who),
                limit,
                tail: self.tail(),
            }),
            Err(RecvTimeoutError::Disconnected) => Err(LabError::Ended {
                who: self.who.clone(),
                what: what.to_owned(),
                tail: self.tail(),
            }),
        }
    }

    /// Reads on until a line for which `wanted` gives something.
    pub(super) fn find<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut wanted: impl FnMut(&str) -> Option<T>,
    ) -> Result<T, LabError> {
        let end = Instant::now() + limit;
        loop {
            let line = self.next(what, end, limit)?;
            if let Some(found) = wanted(&line) {
                return Ok(found);
            }
        }
    }

    /// Takes what is there into the tail, for a message.
    pub(super) fn tail(&mut self) -> String {
        while let Ok(line) = self.receiver.try_recv() {
            self.remember(&line);
        }
        self.tail.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }

    fn remember(&mut self, line: &str) {
        if self.tail.len() == TAIL_LINES {
            self.tail.pop_front();
        }
        self.tail.push_back(line.to_owned());
    }
}

fn pump<R: Read>(stream: R, sender: &SyncSender<String>) {
    let mut reader = BufReader::new(stream);
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        match reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut bytes) {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                let line =
                    String::from_utf8_lossy(&bytes).trim_end_matches(['\r', '\n']).to_owned();
                if sender.send(line).is_err() {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn lines_are_found_and_the_end_is_reported_with_the_tail() {
        let mut lines = Lines::read_from("the test", &b"one\r\ntwo\nthree"[..]);
        let found =
            lines.find("two", SECOND, |line| (line == "two").then_some(2)).expect("it is there");
        assert_eq!(found, 2);
        let error = lines
            .find("four", SECOND, |line| (line == "four").then_some(()))
            .expect_err("it is not there");
        let text = error.to_string();
        assert!(matches!(error, LabError::Ended { .. }), "{text}");
        assert!(text.contains("one\ntwo\nthree"), "{text}");
    }

    #[test]
    fn silence_ends_at_the_deadline() {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
        let mut lines = Lines::read_from("the test", ours);
        let limit = Duration::from_millis(20);
        let error = lines.find("anything", limit, |_| Some(())).expect_err("nothing comes");
        assert!(matches!(error, LabError::Deadline { .. }));
    }
}
