//! A small QMP client: one command at a time, events skipped. Serves QEMU and qemu-storage-daemon.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

use super::LabError;
use super::lines::Lines;

/// QEMU answers at once unless it hangs.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(30);

/// A QMP connection in command mode.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    lines: Lines,
}

impl Qmp {
    /// Takes over a connected stream and negotiates.
    ///
    /// # Errors
    /// No greeting in time, or a refusal.
    pub fn new(stream: UnixStream) -> Result<Self, LabError> {
        let reading = stream.try_clone().map_err(LabError::io("duplicating the QMP socket"))?;
        let mut qmp = Self { stream, lines: Lines::read_from("QMP", reading) };
        qmp.lines
            .find("the greeting", ANSWER_WAIT_MAX, |line| line.contains("\"QMP\"").then_some(()))?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns its `return` value.
    ///
    /// # Errors
    /// The error that QEMU answered, or no answer in time.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, LabError> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.stream
            .write_all(format!("{request}\n").as_bytes())
            .map_err(LabError::io(format!("sending {command} over QMP")))?;
        let answer =
            self.lines.find(&format!("the answer to {command}"), ANSWER_WAIT_MAX, |line| {
                let value: Value = serde_json::from_str(line).ok()?;
                (value.get("return").is_some() || value.get("error").is_some()).then_some(value)
            })?;
        match answer.get("return") {
            Some(value) => Ok(value.clone()),
            None => Err(LabError::protocol("QMP", format!("{request} was answered with {answer}"))),
        }
    }
}
