//! The control thread: one poll loop over the RPC, the front-ends, news from reactors, jobs and signals.
//!
//! In: command line and configuration → reactors, RPC socket, disks. Out: an exit code. Owner: the process's main thread.
//! **Invariant:** nothing but an operator's signal or `spdk_kill_instance` ends the loop; start-up mistakes end the
//! process before it serves anything.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ringmill_core::limits::CORES_MAX;
use ringmill_core::mem::install_sigbus_handler;
use ringmill_core::reactor::{self, ReactorConfig, ReactorHandle};
use ringmill_core::units::CoreId;
use ringmill_vmm_glue::blk::{EventQueue, SourceToken, event_queue};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::args::{Idle, ServeArgs};
use super::engine::{DaemonEngine, SocketSettings};
use super::log::Log;
use crate::config::run::{ConfigRun, Step};
use crate::config::{self, DaemonSettings};
use crate::rpc::cpumask;
use crate::rpc::engine::LogLevel;
use crate::rpc::socket::{self, SocketAccess, group_id};
use crate::rpc::{Dispatcher, RpcServer};

/// How long an adaptive reactor polls on when nothing else is said.
pub const SPIN_US_DEFAULT: u32 = 200;
/// Time for guests to be let go at the end; the whole shut-down stays below 5 s.
const SHUTDOWN_MAX: Duration = Duration::from_millis(4500);
/// Answers that are still to be written when the loop ends get this long.
const LAST_WORDS_MAX: Duration = Duration::from_millis(200);
const AGES_EVERY: Duration = Duration::from_secs(1);

/// Exit code when a device does not give its requests back.
const EXIT_STUCK: u8 = 3;

fn settings(args: &ServeArgs, file: &DaemonSettings) -> anyhow::Result<Settings> {
    let cores = match &args.cores {
        Some(text) => cpumask::parse(text).map_err(|e| anyhow::anyhow!("--cores: {e}"))?,
        None => match &file.cores {
            Some(cores) => cores.clone(),
            None => vec![first_core()?],
        },
    };
    let default_rpc = default_rpc_socket();
    let default_dir =
        default_rpc.parent().map_or_else(|| PathBuf::from("/run/ringmill"), PathBuf::from);
    let dir = args.socket_dir.clone().or_else(|| file.socket_dir.clone()).unwrap_or(default_dir);
    let rpc_socket = args
        .rpc_socket
        .clone()
        .or_else(|| file.rpc_socket.clone())
        .unwrap_or_else(|| dir.join("rpc.sock"));
    let group = match args.socket_group.as_ref().or(file.socket_group.as_ref()) {
        Some(name) => Some(group_id(name)?),
        None => None,
    };
    let mode = args.socket_mode.or(file.socket_mode).unwrap_or(0o600);
    let spin_ns = u64::from(args.spin_us.unwrap_or(SPIN_US_DEFAULT)) * 1000;
    let idle = match args.idle {
        Some(Idle::Poll) => reactor::IdlePolicy::Poll,
        Some(Idle::Adaptive) | None => reactor::IdlePolicy::Adaptive { spin_ns },
    };
    Ok(Settings { cores, sockets: SocketSettings { dir, mode, group }, rpc_socket, idle })
}

fn default_rpc_socket() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from(socket::SYSTEM_SOCKET);
    }
    socket::user_socket().unwrap_or_else(|| PathBuf::from(socket::SYSTEM_SOCKET))
}

/// The cores that this process may use.
pub(crate) fn allowed_cores() -> anyhow::Result<Vec<u32>> {
    let set = rustix::thread::sched_getaffinity(None)
        .context("cannot ask which cores this process may use")?;
    let is_set = |core: &u32| set.is_set(*core as usize);
    Ok((0..u32::try_from(CORES_MAX)?).filter(is_set).collect())
}

fn first_core() -> anyhow::Result<u32> {
    allowed_cores()?
        .first()
        .copied()
        .context("this process may use no core at all; check its CPU affinity")
}

/// Starts one reactor per core.
fn start_reactors(cores: &[u32], idle: reactor::IdlePolicy) -> anyhow::Result<Vec<ReactorHandle>> {
    if let Some(core) = cores.iter().find(|core| **core as usize >= CORES_MAX) {
        bail!("core {core} does not exist; ringmilld knows cores 0 to {}", CORES_MAX - 1);
    }
    let others: Vec<usize> = allowed_cores()?
        .into_iter()
        .filter(|core| !cores.contains(core))
        .map(|core| core as usize)
        .collect();
    cores
        .iter()
        .map(|&core| {
            let config =
                ReactorConfig { core: Some(CoreId(core)), idle, io_wq_cpus: others.clone() };
            reactor::spawn(&config).with_context(|| format!("core {core}"))
        })
        .collect()
}

/// Thousands of disks need more descriptors than the usual soft limit.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    if let Err(error) =
        setrlimit(Resource::Nofile, Rlimit { current: now.maximum, maximum: now.maximum })
    {
        tracing::warn!("cannot raise the limit of open files from {:?}: {error}", now.current);
    }
}

/// The readable end of a pipe that gets a byte for every signal, and which signals those were.
struct Signals {
    reader: UnixStream,
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

impl Signals {
    fn register() -> anyhow::Result<Signals> {
        let (reader, writer) = UnixStream::pair()?;
        reader.set_nonblocking(true)?;
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT] {
            signal_hook::flag::register(signal, std::sync::Arc::clone(&stop))?;
            signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
        }
        // A lost terminal or a log rotation must not end the daemon; there is nothing to reload.
        signal_hook::low_level::pipe::register(SIGHUP, writer)?;
        Ok(Signals { reader, stop })
    }

    fn read(&self) {
        let mut bytes = [0u8; 64];
        while rustix::io::read(&self.reader, &mut bytes).is_ok_and(|count| count > 0) {}
    }

    fn stop_asked(&self) -> bool {
        self.stop.load(std::sync::atomic::Ordering::Relaxed)
    }
}

/// Whose descriptor became ready.
#[derive(Clone, Copy)]
enum Ready {
    Rpc(u64),
    Controller(u64, SourceToken),
    Events,
    Jobs,
    Signals,
}

/// A running daemon: the loop's state.
pub struct Daemon {
    engine: DaemonEngine,
    dispatcher: Dispatcher,
    server: RpcServer,
    events: EventQueue,
    signals: Signals,
    run: Option<ConfigRun>,
    next_ages: Instant,
    reactors: Vec<ReactorHandle>,
}

impl Daemon {
    /// Waits for something to happen and handles it.
    fn round(&mut self, timeout_max: Duration) -> anyhow::Result<()> {
        let now = Instant::now();
        let waits =
            [self.server.timeout(now), self.dispatcher.timeout(now), self.engine.timeout(now)];
        let ages = self.next_ages.saturating_duration_since(now);
        let timeout = waits.into_iter().flatten().fold(timeout_max.min(ages), Duration::min);
        for (ready, events) in self.wait(timeout)? {
            self.handle(ready, events);
        }
        let now = Instant::now();
        if now >= self.next_ages {
            self.next_ages = now + AGES_EVERY;
            self.engine.controllers_mut().iter_mut().for_each(|c| c.check_ages());
        }
        if self.run.is_none() {
            self.server.turn(now, &mut self.dispatcher.bind(&mut self.engine));
        }
        self.engine.settle(now);
        let vanished = self.engine.take_vanished();
        for name in vanished.bdevs {
            self.dispatcher.bdev_vanished(&name);
        }
        for (name, bdevs) in vanished.controllers {
            self.dispatcher.nvme_vanished(&name, bdevs);
        }
        for (token, result) in self.engine.finished() {
            let answer = self.dispatcher.finished(token, result);
            let answer = match &mut self.run {
                Some(run) => run.finished(token, answer)?,
                None => Some(answer),
            };
            if let Some(answer) = answer {
                self.server.complete(token, answer);
            }
        }
        for (token, answer) in self.dispatcher.due(&self.engine, now) {
            self.server.complete(token, answer);
        }
        Ok(())
    }

    fn wait(&mut self, timeout: Duration) -> anyhow::Result<Vec<(Ready, PollFlags)>> {
        let mut owners: Vec<Ready> = Vec::new();
        let mut fds: Vec<PollFd<'_>> = Vec::new();
        // Clients that connect early wait in the listener's queue: who gets an answer sees the whole configuration.
        for (key, fd, flags) in self.server.fds().filter(|_| self.run.is_none()) {
            owners.push(Ready::Rpc(key));
            fds.push(PollFd::from_borrowed_fd(fd, flags));
        }
        for (owner, fd) in [
            (Ready::Events, self.events.as_fd()),
            (Ready::Jobs, self.engine.jobs.as_fd()),
            (Ready::Signals, self.signals.reader.as_fd()),
        ] {
            owners.push(owner);
            fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
        }
        for controller in self.engine.serving() {
            for source in controller.sources() {
                owners.push(Ready::Controller(controller.number(), source.token));
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::IN, source.readable);
                flags.set(PollFlags::OUT, source.writable);
                fds.push(PollFd::from_borrowed_fd(source.fd, flags));
            }
        }
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
        let ready = owners.into_iter().zip(fds.iter().map(PollFd::revents));
        Ok(ready.filter(|(_, events)| !events.is_empty()).collect())
    }

    fn handle(&mut self, ready: Ready, events: PollFlags) {
        match ready {
            Ready::Rpc(key) => self.server.ready(key, events),
            Ready::Signals => self.signals.read(),
            Ready::Events => {
                while let Some(event) = self.events.next() {
                    self.engine.on_event(event);
                }
            }
            Ready::Jobs => {
                while let Some(apply) = self.engine.jobs.next() {
                    apply(&mut self.engine);
                }
            }
            Ready::Controller(number, token) => {
                let found = self.engine.controllers_mut().iter_mut().find(|c| c.number() == number);
                if let Some(controller) = found {
                    let hung_up = events.intersects(PollFlags::HUP | PollFlags::ERR);
                    let (readable, writable) =
                        (events.contains(PollFlags::IN), events.contains(PollFlags::OUT));
                    controller.on_ready(token, readable, writable, hung_up);
                }
            }
        }
    }

    /// Executes the configuration's calls before anything else is asked of the daemon.
    fn configure(&mut self, calls: Vec<config::ConfigCall>) -> anyhow::Result<()> {
        self.run = Some(ConfigRun::new(calls));
        loop {
            let Some(run) = &mut self.run else { return Ok(()) };
            if run.step(&mut self.dispatcher, &mut self.engine)? == Step::Over {
                self.run = None;
                return Ok(());
            }
            if self.signals.stop_asked() {
                self.shut_down()?;
                bail!("stopped while the configuration was being loaded");
            }
            self.round(Duration::from_secs(1))?;
        }
    }

    /// Lets every guest go; the disks whose requests did not come back in time.
    fn shut_down(&mut self) -> anyhow::Result<Vec<String>> {
        let start = Instant::now();
        self.engine.begin_shutdown();
        self.engine.settle(start);
        let is_busy = |engine: &DaemonEngine| {
            !engine.draining().is_empty() || !engine.nvme_names().is_empty()
        };
        while is_busy(&self.engine) && start.elapsed() < SHUTDOWN_MAX {
            self.round(Duration::from_millis(50))?;
            // The RPC is still answered; what it creates now goes at once.
            self.engine.begin_shutdown();
        }
        let written = Instant::now();
        while self.server.has_output() && written.elapsed() < LAST_WORDS_MAX {
            self.round(Duration::from_millis(10))?;
        }
        let attached = self.engine.nvme_names();
        if !attached.is_empty() {
            // The kernel resets the device when the process ends; nothing writes to memory that is not its own.
            tracing::warn!("not detached in time: NVMe controllers {}", attached.join(", "));
        }
        Ok(self.engine.draining())
    }
}

/// What a daemon starts with, after command line, configuration and defaults.
#[derive(Debug)]
pub struct Settings {
    /// Cores of the reactors.
    pub cores: Vec<u32>,
    /// Where the controllers' sockets go.
    pub sockets: SocketSettings,
    /// The RPC's socket.
    pub rpc_socket: PathBuf,
    /// What a reactor without work does.
    pub idle: reactor::IdlePolicy,
}

impl Daemon {
    /// Starts reactors and sockets and executes the configuration's calls. Ready to serve when this returns.
    ///
    /// # Errors
    /// Whatever is in the way, as one sentence.
    pub fn start(
        settings: Settings,
        calls: Vec<config::ConfigCall>,
        log: Log,
    ) -> anyhow::Result<Daemon> {
        let rpc_dir = settings.rpc_socket.parent().map(PathBuf::from).unwrap_or_default();
        for path in [&settings.sockets.dir, &rpc_dir] {
            if !path.as_os_str().is_empty() {
                std::fs::create_dir_all(path).with_context(|| {
                    format!(
                        "cannot create the socket directory {}; choose another with --socket-dir",
                        path.display()
                    )
                })?;
            }
        }
        raise_descriptor_limit();
        install_sigbus_handler().context("cannot install the SIGBUS handler")?;
        let signals = Signals::register().context("cannot watch for signals")?;
        let access = SocketAccess { mode: settings.sockets.mode, group: settings.sockets.group };
        let server = RpcServer::bind(&settings.rpc_socket, access)?;
        let reactors = start_reactors(&settings.cores, settings.idle)?;
        let (sender, events) = event_queue().context("cannot create an eventfd")?;
        let engine = DaemonEngine::new(reactors.clone(), settings.sockets, sender, log)?;
        let mut daemon = Daemon {
            engine,
            dispatcher: Dispatcher::new(),
            server,
            events,
            signals,
            run: None,
            next_ages: Instant::now() + AGES_EVERY,
            reactors,
        };
        daemon.configure(calls)?;
        tracing::info!(
            cores = %cpumask::format(&settings.cores), rpc = %settings.rpc_socket.display(), "ringmilld {} is ready",
            env!("CARGO_PKG_VERSION")
        );
        Ok(daemon)
    }

    /// Serves until told to stop, then lets every guest go: the names of the disks whose requests did not come back.
    ///
    /// # Errors
    /// When the kernel refuses to poll.
    pub fn serve(mut self) -> anyhow::Result<Vec<String>> {
        loop {
            self.round(Duration::from_secs(3600))?;
            if self.signals.stop_asked() || self.engine.take_stop_signal().is_some() {
                break;
            }
        }
        // Only systemd listens, and only when it asked to be told.
        let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Stopping]);
        let stuck = self.shut_down()?;
        if stuck.is_empty() {
            self.reactors.iter().for_each(ReactorHandle::stop);
        }
        Ok(stuck)
    }
}

/// Runs the daemon of a command line until it is told to stop.
///
/// # Errors
/// Whatever keeps it from starting, as one sentence.
pub fn serve(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    let level = args.log_level.as_deref().and_then(LogLevel::from_name);
    let log = Log::start(level.unwrap_or(LogLevel::Notice));
    let file = match &args.config {
        Some(path) => config::load(path)?,
        None => config::Config::default(),
    };
    // What the command line says wins; in a configuration these two are calls.
    let overruled = |call: &config::ConfigCall| match call.method.as_str() {
        "reactor_set_idle" => args.idle.is_some() || args.spin_us.is_some(),
        "log_set_level" | "log_set_print_level" => level.is_some(),
        _ => false,
    };
    let calls = file.calls.into_iter().filter(|call| !overruled(call)).collect();
    let daemon = Daemon::start(settings(args, &file.daemon)?, calls, log)?;
    // Only systemd listens, and only when it asked to be told.
    let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]);
    let stuck = daemon.serve()?;
    if stuck.is_empty() {
        tracing::info!("ringmilld has stopped");
        return Ok(ExitCode::SUCCESS);
    }
    tracing::error!(
        "requests did not come back from the devices of {}; they still run in the kernel, which holds the images",
        stuck.join(", ")
    );
    Ok(ExitCode::from(EXIT_STUCK))
}
