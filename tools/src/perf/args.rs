//! The command line of `ringmill-perf`.

use std::path::PathBuf;

use clap::{ArgGroup, Parser, ValueEnum};
use ringmill_core::limits::{CONTROLLER_QUEUES_MAX, SECTOR_BYTES};

use crate::config::size;

use super::PerfError;
use super::job::Target;
use super::layout::RingForm;

/// The largest request: what one segment of any server takes.
const IO_BYTES_MAX: u64 = 64 << 20;

/// Loads disks and measures them, over vhost-user-blk or directly on a bdev.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "ringmill-perf",
    version,
    about = "Loads disks over vhost-user-blk, as a guest would, and measures IOPS and latencies.",
    long_about = "Loads disks over vhost-user-blk, as a guest would, and measures IOPS and latencies.\n\n\
        One thread polls all queues of all disks. It works with any vhost-user-blk server. A latency is the time from the \
        moment when a request's predecessor in the same slot was found finished to the moment when the request itself \
        is; it includes the client's own work, some tens of nanoseconds per batch.",
    after_help = "Examples:\n  \
        ringmill-perf /run/ringmill/vm1                              4 KiB random reads, 32 at a time, for 5 s\n  \
        ringmill-perf --core 0 -q 1 -t 10 /run/ringmill/vm1          the latency of one request at a time\n  \
        ringmill-perf -w randrw -M 70 -o 8k -q 64 -n 4 SOCKET        70 % reads, 4 queues with 64 requests each\n  \
        ringmill-perf -w write -o 1m -q 8 --ramp 2 SOCKET            sequential writes, the first 2 s left out\n  \
        ringmill-perf -w verify --span 4g SOCKET                     write, read and check every byte of 4 GiB\n  \
        ringmill-perf --json --hlog lat.hlog SOCKET SOCKET           two disks at once, for scripts and plots\n  \
        ringmill-perf a.sock,o=1m,q=1024 b.sock,q=1                  a bulk reader beside a quiet neighbour\n  \
        ringmill-perf busy.sock idle1.sock,idle idle2.sock,idle      a busy disk among idle ones\n  \
        ringmill-perf --bdev file:/dev/nvme1n1 -q 128                the uring driver alone, without vhost\n  \
        ringmill-perf --bdev null --core 0 --owner 1 -q 32           the same over the rings to another core\n  \
        ringmill-perf --floor 1 --core 0 -q 128                      the most that this machine and client can do\n\n\
        writes and verify DESTROY what is on the disks.",
    group = ArgGroup::new("target").required(true).multiple(false).args(["sockets", "bdev", "floor"])
)]
pub struct Cli {
    /// Sockets of disks to load, all at once; SOCKET,q=1,o=8k,w=write,M=30,n=2 has these options of its own, SOCKET,idle is
    /// only connected.
    #[arg(value_name = "SOCKET[,OPTION]...", value_parser = Target::parse)]
    pub sockets: Vec<Target>,
    /// Load a bdev inside this program instead: null, malloc:SIZE, file:PATH, nvme:PCI_ADDRESS (bound to vfio-pci) or
    /// nvme:SOCKET (vfio-user); the controller's first namespace, or another one by @NSID at the end.
    #[arg(long, value_name = "BDEV", value_parser = bdev)]
    pub bdev: Option<BdevChoice>,
    /// The bdev has one device queue, which a reactor on this core owns: what it costs to cross over to it.
    #[arg(long, value_name = "CORE", requires = "bdev")]
    pub owner: Option<u32>,
    /// Load a bare loop on this core instead: no checks, no records, no medium.
    #[arg(long, value_name = "CORE")]
    pub floor: Option<u32>,
    /// Requests in flight per queue.
    #[arg(short = 'q', long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=32768))]
    pub depth: u16,
    /// Bytes of a request; k and m are powers of 1024.
    #[arg(short = 'o', long, value_name = "SIZE", default_value = "4k", value_parser = io_size)]
    pub io_size: u32,
    /// What to do.
    #[arg(short = 'w', long, value_enum, default_value_t = Work::Randread)]
    pub workload: Work,
    /// Percentage of reads of randrw and verify.
    #[arg(short = 'M', long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub read_percent: u32,
    /// Seconds that are measured; fractions are allowed.
    #[arg(short = 't', long, value_name = "S", default_value_t = 5.0, value_parser = seconds)]
    pub time: f64,
    /// Seconds of load before, not measured.
    #[arg(long, value_name = "S", default_value_t = 0.0, value_parser = seconds)]
    pub ramp: f64,
    /// Queues per disk.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(CONTROLLER_QUEUES_MAX)))]
    pub queues: u16,
    /// Use only so much of each disk, from its start. Default: all; for verify at most 1 GiB.
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub span: Option<u64>,
    /// Requests per second over all queues; a request that starts late counts from when it was due.
    #[arg(long, value_name = "IOPS", value_parser = rate)]
    pub rate: Option<f64>,
    /// Core to run on.
    #[arg(long, value_name = "CORE")]
    pub core: Option<u32>,
    /// Choice of offsets, and data of verify; the same seed repeats a load.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Use packed rings.
    #[arg(long)]
    pub packed: bool,
    /// One descriptor per request, which names a table, as Linux guests do.
    #[arg(long)]
    pub indirect: bool,
    /// Of verify only this pass: fill writes everything once, check expects that.
    #[arg(long, value_enum, default_value_t = PassChoice::All)]
    pub pass: PassChoice,
    /// Seconds without an answer after which a queue counts as hung.
    #[arg(long, value_name = "S", default_value_t = 30.0, value_parser = seconds)]
    pub timeout: f64,
    /// Print one JSON object, in the shape of fio's.
    #[arg(long)]
    pub json: bool,
    /// Write the latencies as a HdrHistogram interval log.
    #[arg(long, value_name = "FILE")]
    pub hlog: Option<PathBuf>,
}

/// A workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Work {
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Random reads.
    Randread,
    /// Random writes.
    Randwrite,
    /// Random reads and writes (-M).
    Randrw,
    /// Fill with stamped data, random reads and writes for the time (-M), then check everything.
    Verify,
}

impl Work {
    /// Its name, as on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Work::Read => "read",
            Work::Write => "write",
            Work::Randread => "randread",
            Work::Randwrite => "randwrite",
            Work::Randrw => "randrw",
            Work::Verify => "verify",
        }
    }

    /// Whether it changes the disk.
    pub(crate) fn writes(self) -> bool {
        !matches!(self, Work::Read | Work::Randread)
    }
}

/// Passes of verify.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PassChoice {
    /// Fill, mix, check.
    All,
    /// Write everything once.
    Fill,
    /// Check what an earlier fill with the same size, span and seed wrote.
    Check,
}

/// A bdev to load directly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BdevChoice {
    /// Takes everything, stores nothing.
    Null,
    /// A RAM disk of so many bytes.
    Malloc(u64),
    /// A file or block device, through io_uring.
    File(PathBuf),
    /// A namespace of an NVMe controller: a PCI address, or the path of a vfio-user socket; its number, 0: the first.
    Nvme(String, u32),
}

/// `0000:01:00.0@2`, `/run/nvme.sock`.
fn nvme(text: &str) -> Result<BdevChoice, String> {
    let (device, nsid) = match text.rsplit_once('@') {
        None => (text, 0),
        Some((device, nsid)) => match nsid.parse() {
            Ok(nsid) if nsid > 0 => (device, nsid),
            _ => return Err(format!("\"{nsid}\" is not the number of a namespace, 1 or more")),
        },
    };
    match device.is_empty() {
        true => Err("nvme: needs a PCI address or the path of a vfio-user socket".to_owned()),
        false => Ok(BdevChoice::Nvme(device.to_owned(), nsid)),
    }
}

fn bdev(text: &str) -> Result<BdevChoice, String> {
    match text.split_once(':') {
        None if text == "null" => Ok(BdevChoice::Null),
        Some(("malloc", bytes)) => size::parse(bytes).map(BdevChoice::Malloc),
        Some(("file", path)) if !path.is_empty() => Ok(BdevChoice::File(path.into())),
        Some(("nvme", device)) => nvme(device),
        _ => Err(format!("\"{text}\" is none of null, malloc:SIZE, file:PATH and nvme:DEVICE")),
    }
}

pub(crate) fn io_size(text: &str) -> Result<u32, String> {
    let bytes = size::parse(text)?;
    let whole = bytes > 0 && bytes.is_multiple_of(u64::from(SECTOR_BYTES)) && bytes <= IO_BYTES_MAX;
    u32::try_from(bytes).ok().filter(|_| whole).ok_or_else(|| {
        format!(
            "{} is not a multiple of 512 from 512 to {}",
            size::format(bytes),
            size::format(IO_BYTES_MAX)
        )
    })
}

fn seconds(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|s| (0.0..=1e6).contains(s));
    value.ok_or_else(|| format!("\"{text}\" is not a number of seconds from 0 to 1000000"))
}

fn rate(text: &str) -> Result<f64, String> {
    let value = text.replace('_', "").parse::<f64>().ok().filter(|r| (0.001..=1e9).contains(r));
    value.ok_or_else(|| {
        format!("\"{text}\" is not a rate from 0.001 to 1000000000 requests per second")
    })
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "at most 10^6 s, not negative"
)]
pub(crate) fn ns(seconds: f64) -> u64 {
    (seconds * 1e9) as u64
}

impl Cli {
    /// The form of the rings.
    pub(crate) fn form(&self) -> RingForm {
        RingForm { packed: self.packed, indirect: self.indirect }
    }

    /// What the parser cannot see.
    pub(crate) fn check(&self) -> Result<(), PerfError> {
        let wrong = |text: &str| Err(PerfError::Options(text.to_owned()));
        if self.bdev.is_some() && (self.queues > 1 || self.packed || self.indirect) {
            return wrong(
                "--bdev is driven through one channel and has no rings: leave -n, --packed and --indirect out",
            );
        }
        if self.owner.is_some() && self.bdev.is_none() {
            return wrong(
                "--owner is for --bdev: a disk behind a socket has its owners in the daemon",
            );
        }
        if self.owner.is_some() && self.owner == self.core {
            return wrong("--owner and --core name the same core: each polls on one of its own");
        }
        if self.floor.is_some() && self.workload == Work::Verify {
            return wrong("--floor stores nothing: verify needs a disk");
        }
        if self.floor.is_some() && self.floor == self.core {
            return wrong(
                "--floor and --core name the same core: the bare loop needs one of its own",
            );
        }
        if self.pass != PassChoice::All && self.workload != Work::Verify {
            return wrong("--pass is for -w verify");
        }
        if !self.sockets.is_empty() && self.sockets.iter().all(|target| target.idle) {
            return wrong("every socket is idle: there is nothing to measure");
        }
        if self.workload == Work::Verify && self.sockets.iter().any(Target::changes_blocks) {
            return wrong(
                "verify needs the same o, w and M for all sockets: give them once, before",
            );
        }
        if self.workload != Work::Verify && self.sockets.iter().any(Target::verifies) {
            return wrong("w=verify behind a socket: use -w verify, for all sockets");
        }
        if self.time <= 0.0 {
            return wrong("-t 0 measures nothing: give at least 0.001");
        }
        if self.timeout <= 0.0 {
            return wrong("--timeout 0 would call every queue hung: give at least 0.1");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &[&str]) -> Result<Cli, String> {
        let words = std::iter::once("ringmill-perf").chain(words.iter().copied());
        let cli = Cli::try_parse_from(words).map_err(|error| error.to_string())?;
        cli.check().map_err(|error| error.to_string()).map(|()| cli)
    }

    #[test]
    fn the_command_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_binary_and_bdevs_have_three_kinds() {
        let cli = parse(&["-o", "128k", "--span", "1g", "a", "b"]).unwrap();
        assert_eq!((cli.io_size, cli.span, cli.sockets.len()), (131_072, Some(1 << 30), 2));
        assert_eq!(parse(&["--bdev", "null"]).unwrap().bdev, Some(BdevChoice::Null));
        let malloc = parse(&["--bdev", "malloc:64M"]).unwrap().bdev;
        assert_eq!(malloc, Some(BdevChoice::Malloc(64 << 20)));
        let file = parse(&["--bdev", "file:/a:b"]).unwrap().bdev;
        assert_eq!(file, Some(BdevChoice::File("/a:b".into())));
    }

    #[test]
    fn mistakes_are_named() {
        for (words, want) in [
            (&[][..], "required"),
            (&["a", "--bdev", "null"], "cannot be used with"),
            (&["-o", "1000", "a"], "multiple of 512"),
            (&["-o", "0", "a"], "multiple of 512"),
            (&["-q", "0", "a"], "0 is not in"),
            (&["-t", "-1", "a"], "unexpected argument"),
            (&["-t", "0", "a"], "measures nothing"),
            (&["--bdev", "disk"], "none of null"),
            (&["--bdev", "null", "-n", "2"], "one channel"),
            (&["--owner", "1", "a"], "--bdev"),
            (&["--bdev", "null", "--owner", "1", "--core", "1"], "same core"),
            (&["--floor", "1", "-w", "verify"], "stores nothing"),
            (&["--floor", "1", "--core", "1"], "same core"),
            (&["--pass", "fill", "a"], "-w verify"),
            (&["-M", "101", "a"], "101 is not in"),
            (&["--rate", "fast", "a"], "not a rate"),
            (&["a,idle"], "nothing to measure"),
            (&["a,size=1"], "none of q=N"),
            (&["-w", "verify", "a,o=8k"], "the same o, w and M"),
            (&["a,w=verify", "b"], "-w verify"),
        ] {
            let message = parse(words).unwrap_err();
            assert!(message.contains(want), "{words:?}: {message}");
        }
    }
}
