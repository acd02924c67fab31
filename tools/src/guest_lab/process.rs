//! Processes and scratch space of the lab: run a program to its end, own a running one, own a directory.
//!
//! A [`Running`] process is killed by its handle when its owner goes away, and by the kernel (parent-death signal, set
//! by `setpriv`) when the owner itself is killed: a crashed test leaves no QEMU behind.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::{LabError, packages};

/// How often a bounded wait looks again.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// The end of a program's stderr that is worth showing.
const STDERR_TAIL_BYTES: usize = 2000;

/// A command for `program`, looked up like [`packages::find`] does.
pub(super) fn command(program: &str) -> Command {
    let mut command = match packages::find(program) {
        Some(path) => Command::new(path),
        None => Command::new(program),
    };
    // Messages are parsed.
    command.env("LC_ALL", "C");
    command
}

/// Runs `command` to its end and returns its stdout.
pub(super) fn run(command: &mut Command) -> Result<Vec<u8>, LabError> {
    let shown = show(command);
    let output: Output = command
        .stdin(Stdio::null())
        .output()
        .map_err(LabError::io(format!("starting `{shown}`")))?;
    if !output.status.success() {
        return Err(LabError::Command {
            command: shown,
            status: output.status.to_string(),
            stderr: tail(&output.stderr, STDERR_TAIL_BYTES),
        });
    }
    Ok(output.stdout)
}

/// Like [`run`], for programs that print text.
pub(super) fn run_text(command: &mut Command) -> Result<String, LabError> {
    Ok(String::from_utf8_lossy(&run(command)?).into_owned())
}

fn show(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    words.join(" ")
}

fn tail(bytes: &[u8], len_max: usize) -> String {
    let text = String::from_utf8_lossy(bytes);
    let skipped = text.chars().count().saturating_sub(len_max);
    text.chars().skip(skipped).collect::<String>().trim().to_owned()
}

/// A process that this lab started.
#[derive(Debug)]
pub(super) struct Running {
    name: String,
    child: Child,
    stderr: PathBuf,
}

impl Running {
    /// Starts `program` so that it dies with this thread; its stderr goes to a file in `scratch`.
    pub(super) fn start<I, S>(program: &Path, args: I, scratch: &Path) -> Result<Self, LabError>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let stderr = scratch.join(format!("{name}.stderr"));
        let log = fs::File::create(&stderr)
            .map_err(LabError::io(format!("creating {}", stderr.display())))?;
        let child = command("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(LabError::io(format!("starting {}", program.display())))?;
        Ok(Self { name, child, stderr })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// What it wrote to stderr so far.
    pub(super) fn stderr(&self) -> String {
        tail(&fs::read(&self.stderr).unwrap_or_default(), STDERR_TAIL_BYTES)
    }

    pub(super) fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits until `done` says so, the process ends, or time is up.
    pub(super) fn wait_until(
        &mut self,
        what: &str,
        limit: Duration,
        mut done: impl FnMut() -> bool,
    ) -> Result<(), LabError> {
        let end = Instant::now() + limit;
        while !done() {
            if let Some(status) = self.exited() {
                let tail = format!("{}\n{status}", self.stderr());
                return Err(LabError::Ended {
                    who: self.name.clone(),
                    what: what.to_owned(),
                    tail,
                });
            }
            if Instant::now() >= end {
                return Err(LabError::Deadline {
                    what: what.to_owned(),
                    limit,
                    tail: self.stderr(),
                });
            }
            sleep(LOOK_INTERVAL);
        }
        Ok(())
    }

    /// Waits for the end, bounded.
    pub(super) fn wait_exit(&mut self, limit: Duration) -> Result<ExitStatus, LabError> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.exited() {
                return Ok(status);
            }
            if Instant::now() >= end {
                let what = format!("the end of {}", self.name);
                return Err(LabError::Deadline { what, limit, tail: self.stderr() });
            }
            sleep(LOOK_INTERVAL);
        }
    }

    /// Asks it to end (SIGTERM).
    pub(super) fn terminate(&mut self) -> Result<(), LabError> {
        let what = || format!("sending SIGTERM to {}", self.name);
        let pid = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        let Some(pid) = pid else { return Ok(()) };
        if self.child.try_wait().map_err(LabError::io(what()))?.is_some() {
            return Ok(());
        }
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)
            .map_err(|error| LabError::io(what())(error.into()))
    }

    /// Ends it at once, as a crash would (SIGKILL), and reaps it.
    pub(super) fn kill(&mut self) -> Result<(), LabError> {
        let what = format!("killing {}", self.name);
        self.child.kill().map_err(LabError::io(what.clone()))?;
        self.child.wait().map_err(LabError::io(what))?;
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Already reaped is fine.
        let _ = self.kill();
    }
}

/// A directory for sockets and images that disappears with its owner.
#[derive(Debug)]
pub struct ScratchDir {
    path: PathBuf,
}

impl ScratchDir {
    /// Makes a new one in the system's temporary directory. Its path is short: socket paths end at 107 bytes.
    ///
    /// # Errors
    /// Where the temporary directory is not writable.
    pub fn new() -> Result<Self, LabError> {
        Self::new_in(&std::env::temp_dir())
    }

    /// Makes a new one in `parent`.
    ///
    /// # Errors
    /// Where `parent` is not writable.
    pub fn new_in(parent: &Path) -> Result<Self, LabError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        const TRIES_MAX: u32 = 1000;
        for _ in 0..TRIES_MAX {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!("ringmill-{}-{number}", std::process::id()));
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Self { path }),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    return Err(LabError::io(format!("creating {}", path.display()))(error));
                }
            }
        }
        let who = parent.display().to_string();
        Err(LabError::protocol(&who, "is full of left-over ringmill-* directories; remove them"))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        // Nobody can act on a failure here; the directory is in a temporary place.
        let _ = fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_program_is_reported_with_its_own_words() {
        let error =
            run(command("sh").args(["-c", "echo the reason >&2; exit 3"])).expect_err("exit 3");
        let text = error.to_string();
        assert!(text.contains("the reason") && text.contains('3'), "{text}");
    }

    #[test]
    fn a_scratch_directory_goes_away_with_its_owner() {
        let scratch = ScratchDir::new().expect("a temporary directory");
        let path = scratch.path().to_owned();
        fs::write(path.join("file"), "x").expect("writable");
        drop(scratch);
        assert!(!path.exists());
    }

    #[test]
    fn a_wait_ends_at_its_deadline_and_when_the_process_ends() {
        let scratch = ScratchDir::new().expect("a temporary directory");
        let shell = packages::find("sh").expect("a shell");
        let mut running =
            Running::start(&shell, ["-c", "sleep 60"], scratch.path()).expect("starts");
        let error = running
            .wait_until("nothing", Duration::from_millis(30), || false)
            .expect_err("a deadline");
        assert!(matches!(error, LabError::Deadline { .. }));
        running.kill().expect("was running");
        let error =
            running.wait_until("nothing", Duration::from_secs(60), || false).expect_err("it ended");
        assert!(matches!(error, LabError::Ended { .. }));
    }
}
