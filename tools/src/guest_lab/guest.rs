//! A guest: a running machine that executes scripts, can be rebooted, and can be killed like a crashing host would.
//!
//! Scripts go over the second serial port to the guest's init (see `init.sh` for the protocol); the console carries
//! the kernel's and the firmware's own words. One control thread owns a guest.

use std::io::Write;
use std::time::Duration;

use serde_json::json;

use super::LabError;
use super::lines::Lines;
use super::qemu::{Boot, MachineConfig, Qemu};
use super::qmp::Qmp;

/// A boot takes 5 to 15 s on an idle machine.
const BOOT_WAIT_MAX: Duration = Duration::from_secs(120);

/// The limit of [`Guest::sh`].
const SCRIPT_WAIT_MAX: Duration = Duration::from_secs(120);

/// QEMU ends at once unless a disk server holds it up.
const QUIT_WAIT_MAX: Duration = Duration::from_secs(20);

/// The guest's tty buffers 4 KiB and a serial line has no flow control: a longer script could lose bytes.
const SCRIPT_BYTES_MAX: usize = 3500;

/// A running guest. Dropping it kills it.
#[derive(Debug)]
pub struct Guest {
    qemu: Qemu,
    console: Lines,
    commands: Lines,
    scripts_count: u64,
}

impl Guest {
    /// Starts the machine; a Linux guest is waited for until it takes scripts.
    ///
    /// # Errors
    /// QEMU does not start (its own words are in the message), or the guest does not come up in time.
    pub fn start(config: &MachineConfig) -> Result<Self, LabError> {
        let qemu = Qemu::start(config)?;
        let duplicate = |stream: &std::os::unix::net::UnixStream| {
            stream.try_clone().map_err(LabError::io("duplicating a serial port's socket"))
        };
        let console = Lines::read_from("the guest's console", duplicate(&qemu.console)?);
        let commands = Lines::read_from("the guest's command port", duplicate(&qemu.commands)?);
        let mut guest = Self { qemu, console, commands, scripts_count: 0 };
        if matches!(config.boot, Boot::Linux(_)) {
            guest.wait_ready()?;
        }
        Ok(guest)
    }

    /// Runs a shell script (`sh -e`: its first failing command ends it) and returns what it printed.
    ///
    /// # Errors
    /// [`LabError::Script`] if it fails, with all it printed.
    pub fn sh(&mut self, script: &str) -> Result<String, LabError> {
        self.sh_within(script, SCRIPT_WAIT_MAX)
    }

    /// The same with another limit of time.
    ///
    /// # Errors
    /// As [`Guest::sh`].
    pub fn sh_within(&mut self, script: &str, limit: Duration) -> Result<String, LabError> {
        if script.len() > SCRIPT_BYTES_MAX {
            let what =
                format!("a script of {} bytes; at most {SCRIPT_BYTES_MAX}, split it", script.len());
            return Err(LabError::protocol("the guest lab", what));
        }
        self.scripts_count += 1;
        let id = self.scripts_count;
        self.send(&format!("RUN {id} {}\n{script}\n", script.split('\n').count()))?;
        let mut output = String::new();
        let exit = format!("RINGMILL exit {id} ");
        let found = self.commands.find("the end of a script", limit, |line| {
            if let Some(text) = line.strip_prefix("RINGMILL out ") {
                output.push_str(text);
                output.push('\n');
            }
            line.strip_prefix(&exit)?.trim().parse::<i32>().ok()
        });
        match found {
            Ok(0) => Ok(output),
            Ok(code) => Err(LabError::Script { code, script: script.to_owned(), output }),
            Err(error) => Err(self.with_console(error)),
        }
    }

    /// Waits for a line with `token` on the console and returns it.
    ///
    /// # Errors
    /// It does not come in time.
    pub fn wait_console(&mut self, token: &str, limit: Duration) -> Result<String, LabError> {
        let what = format!("{token:?}");
        self.console.find(&what, limit, |line| line.contains(token).then(|| line.to_owned()))
    }

    /// Reboots the guest inside the same QEMU and waits until it takes scripts again. Unmount first.
    ///
    /// # Errors
    /// It does not come up again in time.
    pub fn reboot(&mut self) -> Result<(), LabError> {
        self.send("REBOOT\n")?;
        self.wait_ready()
    }

    /// Resets the machine by its reset button (QMP `system_reset`).
    ///
    /// # Errors
    /// It does not come up again in time.
    pub fn reset(&mut self) -> Result<(), LabError> {
        self.qmp().execute("system_reset", &json!({}))?;
        self.wait_ready()
    }

    /// QEMU's control socket.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qemu.qmp
    }

    /// Ends QEMU with SIGKILL, in the middle of whatever it does.
    ///
    /// # Errors
    /// It had ended already.
    pub fn kill(mut self) -> Result<(), LabError> {
        if let Some(status) = self.qemu.process.exited() {
            let who = self.qemu.process.name().to_owned();
            let tail = format!("{}\n{status}", self.qemu.process.stderr());
            return Err(LabError::Ended { who, what: "its kill".to_owned(), tail });
        }
        self.qemu.process.kill()
    }

    /// Ends QEMU in an orderly way; the guest is not asked.
    ///
    /// # Errors
    /// It does not end in time (it is killed then), or with a failure.
    pub fn quit(mut self) -> Result<(), LabError> {
        self.qmp().execute("quit", &json!({}))?;
        let status = self.qemu.process.wait_exit(QUIT_WAIT_MAX)?;
        if !status.success() {
            let what = format!("ended with {status}: {}", self.qemu.process.stderr());
            return Err(LabError::protocol("QEMU", what));
        }
        Ok(())
    }

    fn send(&mut self, text: &str) -> Result<(), LabError> {
        self.qemu
            .commands
            .write_all(text.as_bytes())
            .map_err(LabError::io("writing to the guest's command port"))
    }

    fn wait_ready(&mut self) -> Result<(), LabError> {
        let ready = |line: &str| (line == "RINGMILL ready").then_some(());
        self.commands
            .find("the guest's boot", BOOT_WAIT_MAX, ready)
            .map_err(|error| self.with_console(error))
    }

    /// Adds what the kernel and QEMU said to an error about the command port, which by itself explains little.
    fn with_console(&mut self, error: LabError) -> LabError {
        let more = format!(
            "\n--- console\n{}\n--- QEMU\n{}",
            self.console.tail(),
            self.qemu.process.stderr()
        );
        match error {
            LabError::Deadline { what, limit, tail } => {
                LabError::Deadline { what, limit, tail: tail + &more }
            }
            LabError::Ended { who, what, tail } => {
                LabError::Ended { who, what, tail: tail + &more }
            }
            other => other,
        }
    }
}
