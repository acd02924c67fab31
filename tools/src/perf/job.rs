//! What a socket is loaded with: the options of the command line, changed by words behind its path.
//!
//! `SOCKET,o=1m,q=1024` is that socket with other options than the rest: one client, one core, two kinds of guests.
//! `SOCKET,idle` connects, starts its rings and requests nothing.

use std::path::PathBuf;

use clap::ValueEnum;
use ringmill_core::limits::CONTROLLER_QUEUES_MAX;

use super::args::{Cli, Work, io_size};

/// A socket with what the words behind it change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The disk's socket.
    pub path: PathBuf,
    depth: Option<u16>,
    io_size: Option<u32>,
    workload: Option<Work>,
    read_percent: Option<u32>,
    queues: Option<u16>,
    pub(crate) idle: bool,
}

/// What one disk is loaded with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) depth: u16,
    pub(crate) io_size: u32,
    pub(crate) workload: Work,
    pub(crate) read_percent: u32,
    pub(crate) queues: u16,
}

fn number(text: &str, low: u16, high: u16) -> Result<u16, String> {
    let value = text.parse::<u16>().ok().filter(|value| (low..=high).contains(value));
    value.ok_or_else(|| format!("\"{text}\" is not a number from {low} to {high}"))
}

impl Target {
    /// Reads `SOCKET[,q=N][,o=SIZE][,w=WORKLOAD][,M=PERCENT][,n=N][,idle]`.
    pub(crate) fn parse(text: &str) -> Result<Target, String> {
        let mut words = text.split(',');
        let path = words.next().filter(|path| !path.is_empty()).ok_or("the path is empty")?;
        let mut target = Target {
            path: path.into(),
            depth: None,
            io_size: None,
            workload: None,
            read_percent: None,
            queues: None,
            idle: false,
        };
        for word in words {
            match word.split_once('=') {
                None if word == "idle" => target.idle = true,
                Some(("q", value)) => target.depth = Some(number(value, 1, 32768)?),
                Some(("o", value)) => target.io_size = Some(io_size(value)?),
                Some(("w", value)) => target.workload = Some(Work::from_str(value, false)?),
                Some(("M", value)) => target.read_percent = Some(number(value, 0, 100)?.into()),
                Some(("n", value)) => {
                    target.queues = Some(number(value, 1, CONTROLLER_QUEUES_MAX)?);
                }
                _ => {
                    return Err(format!(
                        "\"{word}\" behind a socket is none of q=N, o=SIZE, w=WORKLOAD, M=PERCENT, n=N and idle"
                    ));
                }
            }
        }
        Ok(target)
    }

    /// True when a word changes what every disk of a verifying load must have in common.
    pub(crate) fn changes_blocks(&self) -> bool {
        self.io_size.is_some() || self.workload.is_some() || self.read_percent.is_some()
    }

    /// True when a word asks for data to be checked.
    pub(crate) fn verifies(&self) -> bool {
        self.workload == Some(Work::Verify)
    }

    /// Its load.
    pub(crate) fn job(&self, cli: &Cli) -> Job {
        let all = Job::of(cli);
        Job {
            depth: self.depth.unwrap_or(all.depth),
            io_size: self.io_size.unwrap_or(all.io_size),
            workload: self.workload.unwrap_or(all.workload),
            read_percent: self.read_percent.unwrap_or(all.read_percent),
            queues: self.queues.unwrap_or(all.queues),
        }
    }
}

impl Job {
    /// What the options say for everything.
    pub(crate) fn of(cli: &Cli) -> Job {
        Job {
            depth: cli.depth,
            io_size: cli.io_size,
            workload: cli.workload,
            read_percent: cli.read_percent,
            queues: cli.queues,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn words_behind_a_socket_change_it_alone() {
        let words = ["ringmill-perf", "-q", "8", "/a,o=1m,q=1024,w=read", "/b,M=70,n=2", "/c,idle"];
        let cli = Cli::try_parse_from(words).unwrap();
        let jobs: Vec<Job> = cli.sockets.iter().map(|target| target.job(&cli)).collect();
        let big = Job { io_size: 1 << 20, depth: 1024, workload: Work::Read, ..Job::of(&cli) };
        assert_eq!(jobs[0], big);
        assert_eq!(jobs[1], Job { read_percent: 70, queues: 2, ..Job::of(&cli) });
        assert_eq!((jobs[2], cli.sockets[2].idle), (Job::of(&cli), true));
        assert_eq!(cli.sockets[0].path, PathBuf::from("/a"));
    }

    #[test]
    fn wrong_words_are_named() {
        for (text, want) in [
            ("", "empty"),
            ("/a,q=0", "from 1 to"),
            ("/a,o=1000", "multiple of 512"),
            ("/a,w=fast", "invalid variant"),
            ("/a,M=101", "from 0 to 100"),
            ("/a,n=257", "from 1 to"),
            ("/a,depth=1", "none of q=N"),
            ("/a,", "none of q=N"),
        ] {
            let message = Target::parse(text).unwrap_err();
            assert!(message.contains(want), "{text}: {message}");
        }
    }
}
