//! A controller in this process over a bdev of the test's own, and a thread that plays its control thread.
//!
//! Owner: one test, which orders. **Invariant:** the thread ends with its owner: the controller is deleted, or the test
//! fails.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use std::path::PathBuf;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ringmill_core::bdev::{Bdev, Registry};
use ringmill_core::reactor::{self, IdlePolicy, ReactorConfig, ReactorHandle};
use ringmill_vmm_glue::blk::{
    Controller, ControllerSpec, ControllerState, SourceToken, event_queue,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::TempDir;

/// What the control thread is to do.
pub type Order = Box<dyn FnOnce(&mut Controller, &Registry) + Send>;

/// How long an order may take.
const ORDER_MAX: Duration = Duration::from_secs(30);

pub struct Host {
    dir: TempDir,
    /// The first one serves the queues, until they are moved.
    pub reactors: Vec<ReactorHandle>,
    orders: Option<mpsc::Sender<Order>>,
    longest: Arc<Mutex<Duration>>,
    thread: Option<JoinHandle<()>>,
}

impl Host {
    /// `look` is called in every turn of the control thread.
    pub fn start(
        bdev: Arc<dyn Bdev>,
        reactors_count: usize,
        (queues_max, pin): (u16, bool),
        mut look: impl FnMut(&mut Controller, &[ReactorHandle]) + Send + 'static,
    ) -> Host {
        let config = ReactorConfig {
            core: None,
            idle: IdlePolicy::Adaptive { spin_ns: 50_000 },
            io_wq_cpus: Vec::new(),
        };
        let reactors: Vec<ReactorHandle> =
            (0..reactors_count).map(|_| reactor::spawn(&config).expect("a reactor")).collect();
        let registry = Arc::new(Registry::new());
        let dir = TempDir::new().expect("a directory");
        let spec = ControllerSpec {
            name: "disk".to_owned(),
            bdev: bdev.info().name().to_string(),
            socket: dir.path().join("disk"),
            socket_mode: 0o600,
            socket_group: None,
            read_only: false,
            serial: None,
            queues_max,
            pin,
        };
        registry.add(bdev).expect("a free name");
        let (orders, inbox) = mpsc::channel::<Order>();
        let longest = Arc::<Mutex<Duration>>::default();
        let (slowest, served) = (Arc::clone(&longest), reactors.clone());
        let (ready, is_ready) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let (sender, events) = event_queue().expect("an eventfd");
            let first = vec![served[0].clone()];
            let mut controller =
                Controller::new(1, spec, &registry, first, &sender).expect("a controller");
            ready.send(()).expect("the test waits");
            while controller.state() != ControllerState::Deleted {
                let began = Instant::now();
                loop {
                    match inbox.try_recv() {
                        Ok(order) => order(&mut controller, &registry),
                        Err(mpsc::TryRecvError::Empty) => break,
                        Err(mpsc::TryRecvError::Disconnected) => {
                            controller.begin_delete();
                            break;
                        }
                    }
                }
                while let Some(event) = events.next() {
                    controller.on_event(event);
                }
                look(&mut controller, &served);
                let mut longest = slowest.lock().unwrap();
                *longest = longest.max(began.elapsed());
                drop(longest);
                serve(&mut controller);
            }
        });
        is_ready.recv().expect("a controller");
        Host { dir, reactors, orders: Some(orders), longest, thread: Some(thread) }
    }

    /// The guest's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    pub fn order(&self, order: impl FnOnce(&mut Controller, &Registry) + Send + 'static) {
        let sent = self.orders.as_ref().map(|orders| orders.send(Box::new(order)));
        assert!(std::thread::panicking() || matches!(sent, Some(Ok(()))), "the host has ended");
    }

    /// What the control thread finds.
    pub fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Controller) -> T + Send + 'static,
    ) -> T {
        let (answer, answered) = mpsc::channel();
        self.order(move |controller, _| drop(answer.send(question(controller))));
        answered.recv_timeout(ORDER_MAX).expect("an answer")
    }

    /// The longest time that the control thread was away.
    pub fn longest(&self) -> Duration {
        *self.longest.lock().unwrap()
    }

    /// Deletes the controller and waits until it is gone.
    pub fn end(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            self.reactors.iter().for_each(ReactorHandle::stop);
            assert!(std::thread::panicking() || ended.is_ok(), "the control thread failed");
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.end();
    }
}

/// Waits for the controller's descriptors, a moment at most, and hands on what they say.
fn serve(controller: &mut Controller) {
    let sources: Vec<_> = controller.sources().collect();
    let mut fds: Vec<PollFd<'_>> = sources
        .iter()
        .map(|source| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, source.readable);
            flags.set(PollFlags::OUT, source.writable);
            PollFd::from_borrowed_fd(source.fd, flags)
        })
        .collect();
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 1_000_000 })).expect("a poll");
    let ready: Vec<(SourceToken, PollFlags)> =
        sources.iter().zip(&fds).map(|(s, fd)| (s.token, fd.revents())).collect();
    drop(fds);
    drop(sources);
    for (token, flags) in ready.into_iter().filter(|(_, flags)| !flags.is_empty()) {
        let (readable, writable) = (flags.contains(PollFlags::IN), flags.contains(PollFlags::OUT));
        let hung_up = flags.intersects(PollFlags::HUP | PollFlags::ERR);
        controller.on_ready(token, readable, writable, hung_up);
    }
}
