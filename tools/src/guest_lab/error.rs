//! What can go wrong in the guest lab, in words that say what to do.

use std::io;
use std::time::Duration;

/// The lab's error.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// Programs are missing.
    #[error("the guest lab needs Debian packages that are not installed: {list}")]
    Packages {
        /// From [`super::packages::describe`].
        list: String,
    },
    /// No kernel to boot.
    #[error("no guest kernel: {why}")]
    Kernel {
        /// What was tried.
        why: String,
    },
    /// An operating system call failed.
    #[error("{what}: {source}")]
    Io {
        /// The action.
        what: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A program that was run to its end failed.
    #[error("`{command}` failed with {status}: {stderr}")]
    Command {
        /// The command line.
        command: String,
        /// Its exit status.
        status: String,
        /// The end of what it wrote to stderr.
        stderr: String,
    },
    /// Something did not come in time.
    #[error("waited {seconds} s for {what}; the last lines were:\n{tail}", seconds = limit.as_secs())]
    Deadline {
        /// What was waited for.
        what: String,
        /// For how long.
        limit: Duration,
        /// The end of the stream on which it was awaited.
        tail: String,
    },
    /// The other side hung up.
    #[error("{who} ended while {what} was awaited; the last lines were:\n{tail}")]
    Ended {
        /// Whose stream it is.
        who: String,
        /// What was waited for.
        what: String,
        /// The end of the stream.
        tail: String,
    },
    /// A script in the guest failed.
    #[error(
        "a script in the guest ended with exit code {code}\n--- script\n{script}\n--- output\n{output}"
    )]
    Script {
        /// Its exit code.
        code: i32,
        /// The script.
        script: String,
        /// stdout and stderr together.
        output: String,
    },
    /// QEMU, the disk server or the guest said something that the lab does not understand.
    #[error("{who}: {what}")]
    Protocol {
        /// Who said it.
        who: String,
        /// What was wrong.
        what: String,
    },
}

impl LabError {
    /// For `map_err`: the action whose failure an [`io::Error`] is.
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    pub(super) fn protocol(who: &str, what: impl Into<String>) -> Self {
        Self::Protocol { who: who.to_owned(), what: what.into() }
    }

    /// True where the machine lacks something, as opposed to a test that failed.
    #[must_use]
    pub fn is_missing_prerequisite(&self) -> bool {
        matches!(self, Self::Packages { .. } | Self::Kernel { .. })
    }
}
