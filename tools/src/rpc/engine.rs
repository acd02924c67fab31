//! What the RPC needs from the daemon: the seam between methods and reactors, bdevs and controllers.
//!
//! Typed calls and plain data, no JSON and no wire names. Every call returns at once. An operation that must wait
//! (open, quiesce, drain) answers [`Progress::Later`] and ends by its [`Token`]: the daemon hands the result to
//! [`Dispatcher::finished`](super::Dispatcher::finished). All calls come from the control thread.

use std::path::PathBuf;

use hdrhistogram::Histogram;
use uuid::Uuid;

use super::{
    error::RpcError,
    nvme::{NvmeBdevInfo, NvmeEngine, NvmeHealth},
    server::Token,
};

/// Why the daemon did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The request itself is wrong: a size, a mask, a name. The reason says which value and what to do.
    #[error("{0}")]
    Refused(String),
    /// There is no bdev of this name.
    #[error("no bdev \"{0}\"; bdev_get_bdevs lists those there are")]
    NoBdev(String),
    /// There is no controller of this name.
    #[error("no controller \"{0}\"; vhost_get_controllers lists those there are")]
    NoController(String),
    /// It was tried and failed; `errno` is positive.
    #[error("{message}")]
    Failed {
        /// As in `libc::ENOSPC`.
        errno: i32,
        /// What was wrong, with which value, and what to do.
        message: String,
    },
}

impl From<EngineError> for RpcError {
    fn from(error: EngineError) -> Self {
        let message = error.to_string();
        match error {
            EngineError::Refused(_) | EngineError::NoController(_) => Self::params(message),
            EngineError::NoBdev(_) => Self::errno(libc::ENODEV, message),
            EngineError::Failed { errno, .. } => Self::errno(errno, message),
        }
    }
}

/// Whether an operation is done or goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Done.
    Done,
    /// Goes on; ends with the token that was handed in.
    Later,
}

/// What an operation that went on ended with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is done; the answer is what the method promised.
    Done,
    /// It made bdevs of these names.
    Bdevs(Vec<String>),
    /// It found out a controller's health.
    Health(Box<NvmeHealth>),
}

/// An operation that may wait.
pub type Started = Result<Progress, EngineError>;

/// Block devices by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BdevKind {
    /// Reads nothing, writes nothing.
    Null,
    /// RAM disk.
    Malloc,
    /// File or block device through io_uring.
    Uring,
    /// A namespace of an NVMe controller.
    Nvme,
}

impl BdevKind {
    /// The `product_name` clients know.
    pub fn product_name(self) -> &'static str {
        match self {
            Self::Null => "Null disk",
            Self::Malloc => "Malloc disk",
            Self::Uring => "URING bdev",
            Self::Nvme => "NVMe disk",
        }
    }

    /// The method that deletes it.
    pub fn delete_method(self) -> &'static str {
        match self {
            Self::Null => "bdev_null_delete",
            Self::Malloc => "bdev_malloc_delete",
            Self::Uring => "bdev_uring_delete",
            Self::Nvme => "bdev_nvme_detach_controller",
        }
    }
}

/// How the host's page cache is used, in virtualization people's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// `O_DIRECT`.
    #[default]
    None,
    /// Page cache; stable after a flush.
    Writeback,
    /// Page cache; every write is stable when it completes.
    Writethrough,
}

impl CacheMode {
    /// All words.
    pub const NAMES: [&'static str; 3] = ["none", "writeback", "writethrough"];

    /// Parses `none`, `writeback` or `writethrough`.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "none" => Self::None,
            "writeback" => Self::Writeback,
            "writethrough" => Self::Writethrough,
            _ => return None,
        })
    }

    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Writeback => "writeback",
            Self::Writethrough => "writethrough",
        }
    }
}

/// A bdev to create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BdevSpec {
    /// Unique among bdevs; never empty.
    pub name: String,
    /// Always given: the RPC makes one up if its client did not.
    pub uuid: Uuid,
    /// What is behind it.
    pub backend: BackendSpec,
    /// Device queues, each owned by one reactor; 0: one per reactor.
    pub device_queues: u16,
}

/// What is behind a new bdev.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackendSpec {
    /// Null disk.
    Null {
        /// Bytes per block: 512 or 4096.
        block_size: u32,
        /// Size in blocks, at least 1.
        blocks_count: u64,
    },
    /// RAM disk.
    Malloc {
        /// Bytes per block: 512 or 4096.
        block_size: u32,
        /// Size in blocks, at least 1.
        blocks_count: u64,
    },
    /// File or block device.
    Uring {
        /// The image.
        path: PathBuf,
        /// Bytes per block; `None`: what the device wants.
        block_size: Option<u32>,
        /// Open read-only.
        readonly: bool,
        /// Use of the host's page cache.
        cache: CacheMode,
        /// Poll the block device instead of waiting for its interrupts.
        iopoll: bool,
        /// Never move data on the reactor's own account.
        ring_only: bool,
        /// The user said `format = "raw"`: do not refuse a file that looks like another format.
        raw_is_explicit: bool,
    },
}

/// A new size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resize {
    /// Null disk: to this many bytes.
    ToBytes(u64),
    /// Image: look at the file again.
    Rescan,
}

/// Whether guest memory of a controller is pinned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PinMode {
    /// As the backend needs.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

impl PinMode {
    /// All words.
    pub const NAMES: [&'static str; 3] = ["auto", "on", "off"];

    /// Parses `auto`, `on` or `off`.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "auto" => Self::Auto,
            "on" => Self::On,
            "off" => Self::Off,
            _ => return None,
        })
    }
}

/// A vhost-user-blk controller to create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControllerSpec {
    /// Name; also the name of its socket in the socket directory. Never empty, no `/`.
    pub name: String,
    /// The disk behind it.
    pub bdev: String,
    /// Cores that may serve it; `None`: all of the daemon's. Never empty.
    pub cores: Option<Vec<u32>>,
    /// The guest may not write.
    pub readonly: bool,
    /// What the guest sees as serial number, ≤ 20 bytes; `None`: the bdev's name.
    pub serial: Option<String>,
    /// Most queues offered to the guest; `None`: the daemon's default.
    pub queues_max: Option<u16>,
    /// Memory pinning.
    pub pin: PinMode,
}

/// What a bdev can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IoTypes {
    /// Reads.
    pub read: bool,
    /// Writes.
    pub write: bool,
    /// Discards.
    pub unmap: bool,
    /// Flushes.
    pub flush: bool,
    /// Zero-fills without data.
    pub write_zeroes: bool,
    /// Resets.
    pub reset: bool,
}

/// The image behind a uring bdev.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// As given when it was created.
    pub path: PathBuf,
    /// Use of the host's page cache.
    pub cache: CacheMode,
    /// Opened read-only.
    pub readonly: bool,
    /// The image lock's state in a word, as `exclusive` or `shared`.
    pub lock: &'static str,
    /// Required alignment of offsets and lengths, in bytes.
    pub align_bytes: u32,
}

/// A bdev as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BdevInfo {
    /// Unique name.
    pub name: String,
    /// Kind.
    pub kind: BdevKind,
    /// Unique id.
    pub uuid: Uuid,
    /// Bytes per block.
    pub block_size: u32,
    /// Size in blocks.
    pub blocks_count: u64,
    /// A controller or a layer holds it.
    pub is_claimed: bool,
    /// What it can do.
    pub io_types: IoTypes,
    /// The image, if there is one.
    pub image: Option<ImageInfo>,
    /// The controller and namespace, if it is one.
    pub nvme: Option<NvmeBdevInfo>,
    /// What else the driver says of itself: names and values.
    pub facts: Vec<(&'static str, String)>,
}

/// Counters of one operation of one bdev.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OpStats {
    /// Completed operations.
    pub ops_count: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// Sum of latencies.
    pub latency_ticks: u64,
    /// Longest.
    pub latency_max_ticks: u64,
    /// Shortest; 0 if there was none.
    pub latency_min_ticks: u64,
}

/// Counters of one bdev, of all reactors or of one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IoStats {
    /// The bdev.
    pub bdev: String,
    /// The reactor's thread id, when asked for per channel.
    pub thread_id: Option<u64>,
    /// Reads.
    pub read: OpStats,
    /// Writes.
    pub write: OpStats,
    /// Discards.
    pub unmap: OpStats,
    /// Flushes (`bytes` stays 0).
    pub flush: OpStats,
    /// Zero-fills.
    pub write_zeroes: OpStats,
}

/// What a reset of counters forgets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ResetMode {
    /// Nothing.
    #[default]
    None,
    /// Counters.
    All,
    /// Only maxima and minima.
    MaxMin,
}

/// Busy and idle time and what the operating system says about one reactor's thread.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReactorInfo {
    /// CPU.
    pub core: u32,
    /// Kernel thread id.
    pub tid: u64,
    /// Time in which work was found.
    pub busy_ticks: u64,
    /// Time in which none was.
    pub idle_ticks: u64,
    /// Asleep on its ring just now (idle policy `adaptive`).
    pub is_sleeping: bool,
    /// Bounce buffers used so far: pieces of requests that were copied on their way.
    pub bounces_count: u64,
    /// User time of the core, in clock ticks of /proc/stat.
    pub usr: u64,
    /// System time of the core.
    pub sys: u64,
    /// Interrupt time of the core.
    pub irq: u64,
    /// The logical thread on it.
    pub thread: ThreadInfo,
}

/// One logical thread (ringmill has one per reactor).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ThreadInfo {
    /// Name, as `reactor_2`.
    pub name: String,
    /// Number, stable for the life of the daemon, from 1.
    pub id: u64,
    /// Cores it may run on.
    pub cores: Vec<u32>,
    /// Ticks since it started.
    pub elapsed_ticks: u64,
    /// Its pollers.
    pub pollers: Vec<PollerInfo>,
}

/// One poller.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PollerInfo {
    /// Name.
    pub name: String,
    /// Number within its thread.
    pub id: u64,
    /// `waiting` or `running`.
    pub state: &'static str,
    /// Calls.
    pub run_count: u64,
    /// Calls that found work.
    pub busy_count: u64,
    /// `None`: runs in every pass.
    pub period_ticks: Option<u64>,
}

/// A controller as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ControllerInfo {
    /// Name.
    pub name: String,
    /// The disk behind it; `None` after hot removal.
    pub bdev: Option<String>,
    /// Cores that may serve it.
    pub cores: Vec<u32>,
    /// Where front-ends connect.
    pub socket: PathBuf,
    /// The guest may not write.
    pub readonly: bool,
    /// Serial number the guest sees.
    pub serial: String,
    /// Interrupt coalescing: base delay.
    pub delay_base_us: u32,
    /// Interrupt coalescing: from this rate on.
    pub iops_threshold: u32,
    /// `listening`, `connected`, `running`, `draining` …
    pub state: &'static str,
    /// Memory pinning: `off`, `pinning` (also while no front-end has rings), `on` or `refused: ` with the reason.
    pub pin_state: String,
    /// Connected front-ends (0 or 1).
    pub sessions: Vec<SessionInfo>,
}

/// One connected front-end.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SessionInfo {
    /// Number of the session.
    pub id: u64,
    /// Rings are running.
    pub is_started: bool,
    /// Queues the front-end may use.
    pub queues_max: u16,
    /// Negotiated features by name.
    pub features: Vec<&'static str>,
    /// Its queues.
    pub queues: Vec<QueueInfo>,
}

/// One virtqueue.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct QueueInfo {
    /// Index.
    pub index: u16,
    /// Ring size in entries.
    pub size: u16,
    /// The core that serves it; `None` when stopped.
    pub core: Option<u32>,
    /// The core that works on the device for it; another one where the bdev has fewer queues than there are reactors.
    pub device_core: Option<u32>,
    /// Driver's index as last seen.
    pub avail_index: u16,
    /// Device's index as last published.
    pub used_index: u16,
    /// Requests taken and not yet completed.
    pub inflight_count: u32,
    /// Age of the oldest of them.
    pub oldest_ns: Option<u64>,
    /// Requests beyond their deadline.
    pub stuck_count: u32,
}

/// When a reactor stops burning its core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdlePolicy {
    /// Never.
    Poll,
    /// After `spin_us` without work.
    Adaptive,
}

/// Latencies of one stage of one operation on one queue.
#[derive(Debug, Clone)]
pub struct LatencyRow {
    /// Controller.
    pub controller: String,
    /// The disk behind it.
    pub bdev: String,
    /// Queue index.
    pub queue: u16,
    /// `read`, `write`, `flush`, `discard`, `write_zeroes` …
    pub op: &'static str,
    /// `queue`, `device`, `complete` or `total`.
    pub stage: &'static str,
    /// In ns.
    pub histogram: Histogram<u64>,
}

/// Whose latencies.
#[derive(Debug, Clone, Copy, Default)]
pub struct LatencyFilter<'a> {
    /// Only this controller.
    pub controller: Option<&'a str>,
    /// Only this bdev.
    pub bdev: Option<&'a str>,
}

/// Log levels in the RPC's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// `ERROR`
    Error,
    /// `WARNING`
    Warning,
    /// `NOTICE`
    Notice,
    /// `INFO`
    Info,
    /// `DEBUG`
    Debug,
}

impl LogLevel {
    /// All words, most severe first.
    pub const NAMES: [&'static str; 5] = ["ERROR", "WARNING", "NOTICE", "INFO", "DEBUG"];

    /// Parses a word of any case.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name.to_ascii_uppercase().as_str() {
            "ERROR" => Self::Error,
            "WARNING" | "WARN" => Self::Warning,
            "NOTICE" => Self::Notice,
            "INFO" => Self::Info,
            "DEBUG" => Self::Debug,
            _ => return None,
        })
    }

    /// The word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "ERROR",
            Self::Warning => "WARNING",
            Self::Notice => "NOTICE",
            Self::Info => "INFO",
            Self::Debug => "DEBUG",
        }
    }
}

/// The daemon, as the RPC sees it.
pub trait Engine: NvmeEngine {
    /// Ticks per second of every `*_ticks` figure.
    fn tick_rate(&self) -> u64;
    /// The clock of those ticks.
    fn ticks_now(&self) -> u64;

    /// All bdevs, in the order of their creation.
    fn bdevs(&self) -> Vec<BdevInfo>;
    /// Creates a bdev. An existing name: `Failed` with `EEXIST`.
    fn create_bdev(&mut self, spec: BdevSpec, token: Token) -> Started;
    /// Deletes a bdev of any kind; drains first.
    fn delete_bdev(&mut self, name: &str, token: Token) -> Started;
    /// Changes a bdev's size, up to the guest.
    fn resize_bdev(&mut self, name: &str, size: Resize, token: Token) -> Started;

    /// Counters per bdev, or per bdev and reactor. Resets afterwards what `reset` says.
    fn io_stats(
        &mut self,
        names: &[String],
        per_channel: bool,
        reset: ResetMode,
    ) -> Result<Vec<IoStats>, EngineError>;
    /// Starts or stops the histogram of a bdev; `op` restricts it to one operation.
    fn enable_histogram(
        &mut self,
        name: &str,
        enable: bool,
        op: Option<&str>,
    ) -> Result<(), EngineError>;
    /// The histogram of a bdev, in ns. Not enabled: `Failed` with `EFAULT`, as SPDK does.
    fn histogram(&mut self, name: &str) -> Result<Histogram<u64>, EngineError>;

    /// All controllers, in the order of their creation.
    fn controllers(&self) -> Vec<ControllerInfo>;
    /// Creates a controller: opens its socket, claims the bdev.
    fn create_controller(&mut self, spec: ControllerSpec, token: Token) -> Started;
    /// Deletes a controller, also with a guest connected; quiesces first, and ends after 5 s at the latest.
    fn delete_controller(&mut self, name: &str, token: Token) -> Started;
    /// Lets these cores serve a controller, or only its queue `queue`; ends when its queues are there.
    fn place_controller(
        &mut self,
        name: &str,
        cores: &[u32],
        queue: Option<u16>,
        token: Token,
    ) -> Started;
    /// Interrupt coalescing.
    fn set_coalescing(
        &mut self,
        name: &str,
        delay_base_us: u32,
        iops_threshold: u32,
    ) -> Result<(), EngineError>;

    /// All reactors, by core.
    fn reactors(&self) -> Vec<ReactorInfo>;
    /// Idle policy of all reactors; `spin_us` `None` keeps the present one.
    fn set_idle(&mut self, policy: IdlePolicy, spin_us: Option<u32>) -> Result<(), EngineError>;
    /// The idle policy and how long a reactor spins before it sleeps.
    fn idle(&self) -> (IdlePolicy, u32);

    /// Stage latencies; rows that never counted anything may be left out.
    fn latencies(&mut self, filter: LatencyFilter<'_>) -> Result<Vec<LatencyRow>, EngineError>;
    /// Starts stage latencies afresh.
    fn reset_latencies(&mut self, filter: LatencyFilter<'_>) -> Result<(), EngineError>;
    /// Records counters and latencies of requests from now on, or no more.
    fn set_recording(&mut self, filter: LatencyFilter<'_>, enable: bool)
    -> Result<(), EngineError>;

    /// Acts as if the daemon got this signal (positive number); the reply is written first.
    fn kill(&mut self, signal: i32) -> Result<(), EngineError>;
    /// Level of the log.
    fn set_log_level(&mut self, level: LogLevel) -> Result<(), EngineError>;
    /// Level of the log.
    fn log_level(&self) -> LogLevel;
}
