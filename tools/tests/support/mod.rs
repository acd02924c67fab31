//! A daemon without disks: the real RPC server and dispatcher over an engine that keeps its state in memory.
//!
//! Bdevs whose name begins with `slow` and controllers of that kind take until the next round to come and go, so
//! that deferred replies are exercised.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use ringmill_drivers::nvme::{
    ControllerInfo as NvmeInfo, ControllerState, Counters, Health, NamespaceInfo,
};
use ringmill_tools::rpc::{Dispatcher, RpcServer, Token, engine::*, nvme::*, socket::SocketAccess};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;

#[derive(Default)]
pub struct FakeEngine {
    pub bdevs: Vec<BdevInfo>,
    pub controllers: Vec<ControllerInfo>,
    pub finished: Vec<(Token, Result<Outcome, EngineError>)>,
    pub nvme: Vec<(NvmeSpec, NvmeDefaults)>,
    pub nvme_defaults: NvmeDefaults,
    pub signals: Vec<i32>,
    pub with_histogram: Vec<String>,
    pub log_level: Option<LogLevel>,
    pub idle: Option<(IdlePolicy, u32)>,
    pub sockets: PathBuf,
}

impl FakeEngine {
    fn bdev(&mut self, name: &str) -> Result<&mut BdevInfo, EngineError> {
        self.bdevs
            .iter_mut()
            .find(|b| b.name == name)
            .ok_or_else(|| EngineError::NoBdev(name.to_owned()))
    }

    fn controller(&mut self, name: &str) -> Result<&mut ControllerInfo, EngineError> {
        self.controllers
            .iter_mut()
            .find(|c| c.name == name)
            .ok_or_else(|| EngineError::NoController(name.to_owned()))
    }

    fn progress(&mut self, name: &str, token: Token) -> Started {
        if name.starts_with("slow") {
            self.finished.push((token, Ok(Outcome::Done)));
            return Ok(Progress::Later);
        }
        Ok(Progress::Done)
    }
}

fn histogram() -> Histogram<u64> {
    let mut histogram = Histogram::new(3).unwrap();
    for value in [900, 1_000, 2_000, 5_000, 1_000_000] {
        histogram.record(value).unwrap();
    }
    histogram
}

/// A controller of a model that is in no shop, as attached.
pub fn nvme_info(name: &str, address: &str) -> NvmeInfo {
    NvmeInfo {
        name: name.to_owned(),
        state: ControllerState::Enabled,
        address: address.to_owned(),
        cntlid: 7,
        vendor: 0x144d,
        device: 0xa80a,
        model: "Grindstone 9000".to_owned(),
        serial: "RM0001".to_owned(),
        firmware: "1.0".to_owned(),
        version: "1.4.0".to_owned(),
        queue_pairs: 2,
        queue_pairs_granted: 8,
        queue_entries: 256,
        queue_entries_max: 1024,
        vectors: 9,
        transfer_bytes_max: 2 << 20,
        sgl: true,
        write_cache: true,
        shadow_doorbells: false,
        quirks: Vec::new(),
        counters: Counters { timeouts: 3, aborts: 2, resets: 1, ..Counters::default() },
        last_error: None,
    }
}

/// Its second namespace has metadata, so there are two and one bdev.
pub fn nvme_namespace(name: &str, nsid: u32) -> NamespaceInfo {
    NamespaceInfo {
        nsid,
        bdev_name: format!("{name}n{nsid}"),
        blocks_count: 1 << 18,
        block_bytes: 4096,
        uuid: uuid::Uuid::from_u128(0x1000 + u128::from(nsid)),
        nguid: String::new(),
        eui64: "00253851b1234567".to_owned(),
        read_only: false,
        refused: (nsid == 2).then(|| "it has metadata; format it without".to_owned()),
    }
}

impl FakeEngine {
    fn nvme_place(&self, name: &str) -> Result<usize, EngineError> {
        self.nvme.iter().position(|(spec, _)| spec.name == name).ok_or_else(|| missing(name))
    }
}

impl NvmeEngine for FakeEngine {
    fn set_nvme_defaults(&mut self, defaults: NvmeDefaults) -> Result<(), EngineError> {
        if !self.nvme.is_empty() {
            let message = "a controller is there already".to_owned();
            return Err(EngineError::Failed { errno: libc::EPERM, message });
        }
        self.nvme_defaults = defaults;
        Ok(())
    }

    fn nvme_defaults(&self) -> NvmeDefaults {
        self.nvme_defaults.clone()
    }

    fn attach_nvme(&mut self, spec: NvmeSpec, token: Token) -> Started {
        if self.nvme_place(&spec.name).is_ok() {
            let message = format!("NVMe controller {:?} exists already", spec.name);
            return Err(EngineError::Failed { errno: libc::EEXIST, message });
        }
        let namespace = nvme_namespace(&spec.name, 1);
        let names = vec![namespace.bdev_name.clone()];
        self.bdevs.push(BdevInfo {
            name: namespace.bdev_name,
            kind: BdevKind::Nvme,
            uuid: namespace.uuid,
            block_size: namespace.block_bytes,
            blocks_count: namespace.blocks_count,
            is_claimed: false,
            io_types: IoTypes { read: true, write: true, flush: true, ..IoTypes::default() },
            image: None,
            nvme: Some(NvmeBdevInfo {
                transport: spec.transport,
                address: spec.address.clone(),
                controller: nvme_info(&spec.name, &spec.address),
                nsid: 1,
            }),
            facts: Vec::new(),
        });
        self.nvme.push((spec, self.nvme_defaults.clone()));
        self.finished.push((token, Ok(Outcome::Bdevs(names))));
        Ok(Progress::Later)
    }

    fn nvme_controllers(&self) -> Vec<NvmeView> {
        let view = |(spec, _): &(NvmeSpec, NvmeDefaults)| NvmeView {
            name: spec.name.clone(),
            transport: spec.transport,
            address: spec.address.clone(),
            is_detaching: false,
            info: Some(nvme_info(&spec.name, &spec.address)),
            namespaces: vec![nvme_namespace(&spec.name, 1), nvme_namespace(&spec.name, 2)],
        };
        self.nvme.iter().map(view).collect()
    }

    fn detach_nvme(&mut self, name: &str, token: Token) -> Started {
        let at = self.nvme_place(name)?;
        self.nvme.remove(at);
        self.bdevs.retain(|bdev| bdev.name != format!("{name}n1"));
        self.finished.push((token, Ok(Outcome::Done)));
        Ok(Progress::Later)
    }

    fn reset_nvme(&mut self, name: &str, token: Token) -> Started {
        self.nvme_place(name)?;
        self.finished.push((token, Ok(Outcome::Done)));
        Ok(Progress::Later)
    }

    fn nvme_health(&mut self, name: &str, token: Token) -> Started {
        let (spec, _) = &self.nvme[self.nvme_place(name)?];
        let health = Health {
            age: Duration::from_secs(4),
            critical_warning: 0,
            temperature_kelvin: 310,
            available_spare: 99,
            available_spare_threshold: 10,
            percentage_used: 2,
            data_units_read: 1_013_408_619,
            data_units_written: u128::MAX,
            host_read_commands: 30_457_773_282,
            host_write_commands: 18_949_677_715,
            busy_minutes: 4_979,
            power_cycles: 49,
            power_on_hours: 31_118,
            unsafe_shutdowns: 18,
            media_errors: 17,
            error_log_entries: 19,
            warning_temperature_minutes: 0,
            critical_temperature_minutes: 0,
        };
        let controller = nvme_info(name, &spec.address);
        let health = NvmeHealth { address: spec.address.clone(), controller, health };
        self.finished.push((token, Ok(Outcome::Health(Box::new(health)))));
        Ok(Progress::Later)
    }
}

impl Engine for FakeEngine {
    fn tick_rate(&self) -> u64 {
        2_500_000_000
    }

    fn ticks_now(&self) -> u64 {
        12_345
    }

    fn bdevs(&self) -> Vec<BdevInfo> {
        self.bdevs.clone()
    }

    fn create_bdev(&mut self, spec: BdevSpec, token: Token) -> Started {
        if self.bdev(&spec.name).is_ok() {
            let message = format!("bdev \"{}\" exists already; choose another name", spec.name);
            return Err(EngineError::Failed { errno: libc::EEXIST, message });
        }
        let (kind, block_size, blocks_count, image) = match spec.backend {
            BackendSpec::Null { block_size, blocks_count } => {
                (BdevKind::Null, block_size, blocks_count, None)
            }
            BackendSpec::Malloc { block_size, blocks_count } => {
                (BdevKind::Malloc, block_size, blocks_count, None)
            }
            BackendSpec::Uring { path, block_size, readonly, cache, .. } => {
                let size = std::fs::metadata(&path).map_err(|error| EngineError::Failed {
                    errno: error.raw_os_error().unwrap_or(libc::EIO),
                    message: format!("cannot open {}: {error}", path.display()),
                })?;
                let block_size = block_size.unwrap_or(512);
                let image =
                    ImageInfo { path, cache, readonly, lock: "exclusive", align_bytes: 512 };
                (BdevKind::Uring, block_size, size.len() / u64::from(block_size), Some(image))
            }
        };
        let io_types = IoTypes {
            read: true,
            write: true,
            unmap: true,
            flush: true,
            write_zeroes: true,
            reset: true,
        };
        let progress = self.progress(&spec.name, token);
        self.bdevs.push(BdevInfo {
            name: spec.name,
            kind,
            uuid: spec.uuid,
            block_size,
            blocks_count,
            is_claimed: false,
            io_types,
            image,
            nvme: None,
            facts: Vec::new(),
        });
        progress
    }

    fn delete_bdev(&mut self, name: &str, token: Token) -> Started {
        if self.bdev(name)?.is_claimed {
            let message = format!("bdev \"{name}\" is in use; delete its controller first");
            return Err(EngineError::Failed { errno: libc::EBUSY, message });
        }
        self.bdevs.retain(|b| b.name != name);
        self.progress(name, token)
    }

    fn resize_bdev(&mut self, name: &str, size: Resize, token: Token) -> Started {
        let bdev = self.bdev(name)?;
        if let Resize::ToBytes(bytes) = size {
            bdev.blocks_count = bytes / u64::from(bdev.block_size);
        }
        self.progress(name, token)
    }

    fn io_stats(
        &mut self,
        names: &[String],
        per_channel: bool,
        _: ResetMode,
    ) -> Result<Vec<IoStats>, EngineError> {
        for name in names {
            self.bdev(name)?;
        }
        Ok(self
            .bdevs
            .iter()
            .filter(|b| names.is_empty() || names.contains(&b.name))
            .map(|b| IoStats {
                bdev: b.name.clone(),
                thread_id: per_channel.then_some(1),
                read: OpStats { ops_count: 3, bytes: 12_288, ..OpStats::default() },
                ..IoStats::default()
            })
            .collect())
    }

    fn enable_histogram(
        &mut self,
        name: &str,
        enable: bool,
        _: Option<&str>,
    ) -> Result<(), EngineError> {
        self.bdev(name)?;
        self.with_histogram.retain(|n| n != name);
        if enable {
            self.with_histogram.push(name.to_owned());
        }
        Ok(())
    }

    fn histogram(&mut self, name: &str) -> Result<Histogram<u64>, EngineError> {
        self.bdev(name)?;
        if !self.with_histogram.iter().any(|n| n == name) {
            let message =
                format!("bdev \"{name}\" has no histogram; call bdev_enable_histogram first");
            return Err(EngineError::Failed { errno: libc::EFAULT, message });
        }
        Ok(histogram())
    }

    fn controllers(&self) -> Vec<ControllerInfo> {
        self.controllers.clone()
    }

    fn create_controller(&mut self, spec: ControllerSpec, token: Token) -> Started {
        if self.controller(&spec.name).is_ok() {
            return Err(EngineError::Refused(format!(
                "controller \"{}\" exists already",
                spec.name
            )));
        }
        let cores = spec.cores.unwrap_or_else(|| vec![0, 1]);
        if let Some(core) = cores.iter().find(|core| **core > 1) {
            return Err(EngineError::Refused(format!(
                "core {core} is not one of the daemon's (0x3)"
            )));
        }
        let bdev = self.bdev(&spec.bdev)?;
        if bdev.is_claimed {
            return Err(EngineError::Refused(format!("bdev \"{}\" is claimed already", spec.bdev)));
        }
        bdev.is_claimed = true;
        let queue = QueueInfo {
            index: 0,
            size: 128,
            core: Some(0),
            inflight_count: 2,
            ..QueueInfo::default()
        };
        let session = SessionInfo {
            id: 1,
            is_started: true,
            queues_max: 2,
            features: vec!["VIRTIO_BLK_F_FLUSH"],
            queues: vec![queue],
        };
        self.controllers.push(ControllerInfo {
            socket: self.sockets.join(&spec.name),
            serial: spec.serial.unwrap_or_else(|| spec.bdev.clone()),
            bdev: Some(spec.bdev),
            cores,
            readonly: spec.readonly,
            state: "running",
            pin_state: "off".to_owned(),
            sessions: vec![session],
            name: spec.name.clone(),
            ..ControllerInfo::default()
        });
        self.progress(&spec.name, token)
    }

    fn delete_controller(&mut self, name: &str, token: Token) -> Started {
        let bdev = self.controller(name)?.bdev.clone();
        self.controllers.retain(|c| c.name != name);
        if let Some(bdev) = bdev {
            self.bdev(&bdev)?.is_claimed = false;
        }
        self.progress(name, token)
    }

    fn place_controller(
        &mut self,
        name: &str,
        cores: &[u32],
        queue: Option<u16>,
        token: Token,
    ) -> Started {
        if let Some(core) = cores.iter().find(|core| **core > 1) {
            return Err(EngineError::Refused(format!(
                "core {core} is not one of the daemon's (0x3)"
            )));
        }
        let controller = self.controller(name)?;
        match queue {
            None => controller.cores = cores.to_vec(),
            Some(0) => controller.sessions[0].queues[0].core = cores.first().copied(),
            Some(queue) => return Err(EngineError::Refused(format!("no queue {queue}"))),
        }
        self.progress(name, token)
    }

    fn set_coalescing(
        &mut self,
        name: &str,
        delay_base_us: u32,
        iops_threshold: u32,
    ) -> Result<(), EngineError> {
        let controller = self.controller(name)?;
        controller.delay_base_us = delay_base_us;
        controller.iops_threshold = iops_threshold;
        Ok(())
    }

    fn reactors(&self) -> Vec<ReactorInfo> {
        let pollers = vec![
            PollerInfo {
                name: "vhost_queues".to_owned(),
                id: 1,
                state: "waiting",
                ..PollerInfo::default()
            },
            PollerInfo {
                name: "timers".to_owned(),
                id: 2,
                state: "waiting",
                period_ticks: Some(250_000),
                ..PollerInfo::default()
            },
        ];
        let thread = ThreadInfo {
            name: "reactor_0".to_owned(),
            id: 1,
            cores: vec![0],
            elapsed_ticks: 400,
            pollers,
        };
        vec![ReactorInfo {
            core: 0,
            tid: 77,
            busy_ticks: 100,
            idle_ticks: 300,
            thread,
            ..ReactorInfo::default()
        }]
    }

    fn set_idle(&mut self, policy: IdlePolicy, spin_us: Option<u32>) -> Result<(), EngineError> {
        self.idle = Some((policy, spin_us.unwrap_or(self.idle().1)));
        Ok(())
    }

    fn idle(&self) -> (IdlePolicy, u32) {
        self.idle.unwrap_or((IdlePolicy::Adaptive, 50))
    }

    fn latencies(&mut self, filter: LatencyFilter<'_>) -> Result<Vec<LatencyRow>, EngineError> {
        if let Some(name) = filter.controller {
            self.controller(name)?;
        }
        if let Some(name) = filter.bdev {
            self.bdev(name)?;
        }
        let mut rows = Vec::new();
        for controller in &self.controllers {
            for stage in ["queue", "device", "complete", "total"] {
                rows.push(LatencyRow {
                    controller: controller.name.clone(),
                    bdev: controller.bdev.clone().unwrap_or_default(),
                    queue: 0,
                    op: "read",
                    stage,
                    histogram: histogram(),
                });
            }
        }
        Ok(rows)
    }

    fn set_recording(
        &mut self,
        filter: LatencyFilter<'_>,
        _enable: bool,
    ) -> Result<(), EngineError> {
        self.latencies(filter).map(|_| ())
    }

    fn reset_latencies(&mut self, filter: LatencyFilter<'_>) -> Result<(), EngineError> {
        self.latencies(filter).map(|_| ())
    }

    fn kill(&mut self, signal: i32) -> Result<(), EngineError> {
        self.signals.push(signal);
        Ok(())
    }

    fn set_log_level(&mut self, level: LogLevel) -> Result<(), EngineError> {
        self.log_level = Some(level);
        Ok(())
    }

    fn log_level(&self) -> LogLevel {
        self.log_level.unwrap_or(LogLevel::Notice)
    }
}

/// The control loop of a daemon in a thread, until dropped.
pub struct FakeDaemon {
    pub socket: PathBuf,
    dir: tempfile::TempDir,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl FakeDaemon {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("rpc.sock");
        let stop = Arc::new(AtomicBool::new(false));
        let mut server = RpcServer::bind(&socket, SocketAccess::default()).unwrap();
        let mut engine = FakeEngine { sockets: dir.path().to_owned(), ..FakeEngine::default() };
        let stopping = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut dispatcher = Dispatcher::new();
            while !stopping.load(Ordering::Relaxed) {
                round(&mut server, &mut dispatcher, &mut engine);
            }
        });
        Self { socket, dir, stop, thread: Some(thread) }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn connect(&self) -> Client {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Client { lines: BufReader::new(stream.try_clone().unwrap()), stream }
    }
}

/// One round of a control loop, as a daemon would write it.
fn round(server: &mut RpcServer, dispatcher: &mut Dispatcher, engine: &mut FakeEngine) {
    let now = Instant::now();
    let sleep = server.timeout(now).into_iter().chain(dispatcher.timeout(now)).min();
    let sleep = sleep.unwrap_or(Duration::MAX).min(Duration::from_millis(20));
    let ready: Vec<(u64, PollFlags)> = {
        let (keys, mut fds): (Vec<u64>, Vec<PollFd<'_>>) = server
            .fds()
            .map(|(key, fd, events)| (key, PollFd::from_borrowed_fd(fd, events)))
            .unzip();
        let timeout = Timespec { tv_sec: 0, tv_nsec: sleep.subsec_nanos().into() };
        poll(&mut fds, Some(&timeout)).unwrap();
        keys.into_iter().zip(fds.iter().map(PollFd::revents)).collect()
    };
    for (key, events) in ready {
        server.ready(key, events);
    }
    server.turn(Instant::now(), &mut dispatcher.bind(engine));
    for (token, result) in std::mem::take(&mut engine.finished) {
        let answer = dispatcher.finished(token, result);
        server.complete(token, answer);
    }
    for (token, answer) in dispatcher.due(engine, Instant::now()) {
        server.complete(token, answer);
    }
}

impl Drop for FakeDaemon {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the daemon's thread panicked");
        }
    }
}

/// A client that sends text as it is.
pub struct Client {
    pub stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Client {
    pub fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).unwrap();
    }

    /// The next reply; `None` when the daemon has closed the connection.
    pub fn receive(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap()),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("no reply: {error}"),
        }
    }

    pub fn ask(&mut self, text: &str) -> Value {
        self.send(text);
        self.receive().expect("the daemon closed the connection")
    }

    /// The result of a method, with parameters as JSON text.
    pub fn call(&mut self, method: &str, params: &str) -> Value {
        let reply = self
            .ask(&format!(r#"{{"jsonrpc":"2.0","method":"{method}","params":{params},"id":1}}"#));
        assert_eq!(reply.get("error"), None, "{method} {params}");
        reply["result"].clone()
    }

    /// Code and message of the error of a method.
    pub fn fail(&mut self, method: &str, params: &str) -> (i64, String) {
        let reply = self
            .ask(&format!(r#"{{"jsonrpc":"2.0","method":"{method}","params":{params},"id":1}}"#));
        assert_eq!(reply.get("result"), None, "{method} {params}");
        (
            reply["error"]["code"].as_i64().unwrap(),
            reply["error"]["message"].as_str().unwrap().to_owned(),
        )
    }
}
