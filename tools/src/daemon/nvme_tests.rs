//! The engine's NVMe controllers with controllers that are only said to be there: every order of events, and no time passes.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use ringmill_core::bdev::{Bdev, BdevEvent};
use ringmill_core::reactor::ReactorHandle;
use ringmill_drivers::null::{NullBdev, NullOptions};
use ringmill_drivers::nvme::{
    ControllerInfo, ControllerState, Counters, Health, Namespace, NamespaceInfo, NvmeControl,
    NvmeError, NvmeEvent, NvmeEvents,
};
use ringmill_vmm_glue::blk::event_queue;
use uuid::Uuid;

use super::engine::{DaemonEngine, SocketSettings};
use super::log::Log;
use super::nvme::Vanished;
use crate::rpc::Token;
use crate::rpc::engine::{Engine, EngineError, LogLevel, Outcome, Progress};
use crate::rpc::nvme::{NvmeDefaults, NvmeEngine, NvmeSpec, NvmeTransport};

const LATER: Duration = Duration::from_secs(60);

/// A controller without a device.
#[derive(Default)]
struct Said {
    namespaces: Mutex<Vec<Namespace>>,
    detaches: AtomicU32,
    reset_fails: AtomicBool,
}

impl std::fmt::Debug for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Said")
    }
}

fn gone() -> NvmeError {
    NvmeError::Gone { device: "said".to_owned() }
}

fn null(name: &str) -> Arc<dyn Bdev> {
    let options = NullOptions { blocks_count: 8, block_bytes: 512, uuid: None };
    Arc::new(NullBdev::new(name, &options).unwrap())
}

fn namespace(name: &str, nsid: u32, bdev: Option<Arc<dyn Bdev>>) -> Namespace {
    let refused = bdev.is_none().then(|| "it has metadata".to_owned());
    let info = NamespaceInfo {
        nsid,
        bdev_name: format!("{name}n{nsid}"),
        blocks_count: 8,
        block_bytes: 512,
        uuid: Uuid::from_u128(u128::from(nsid)),
        nguid: String::new(),
        eui64: String::new(),
        read_only: false,
        refused,
    };
    Namespace { info, bdev }
}

impl NvmeControl for Said {
    fn info(&self) -> ControllerInfo {
        ControllerInfo {
            name: "N".to_owned(),
            state: ControllerState::Enabled,
            address: "said".to_owned(),
            cntlid: 1,
            vendor: 1,
            device: 2,
            model: String::new(),
            serial: String::new(),
            firmware: String::new(),
            version: "1.4.0".to_owned(),
            queue_pairs: 1,
            queue_pairs_granted: 1,
            queue_entries: 2,
            queue_entries_max: 2,
            vectors: 0,
            transfer_bytes_max: 0,
            sgl: false,
            write_cache: false,
            shadow_doorbells: false,
            quirks: Vec::new(),
            counters: Counters::default(),
            last_error: None,
        }
    }

    fn namespaces(&self) -> Vec<Namespace> {
        self.namespaces.lock().unwrap().clone()
    }

    fn owners(&self) -> Option<Vec<ReactorHandle>> {
        None
    }

    fn reset(&self) -> Result<(), NvmeError> {
        if self.reset_fails.load(Ordering::Relaxed) { Err(gone()) } else { Ok(()) }
    }

    fn health(&self) -> Result<Health, NvmeError> {
        Err(gone())
    }

    fn detach(&self) {
        self.detaches.fetch_add(1, Ordering::Relaxed);
    }
}

/// An engine, the controller that its next attach gets, and the controller's voice.
struct Stage {
    engine: DaemonEngine,
    said: Arc<Said>,
    events: mpsc::Receiver<NvmeEvents>,
    /// An attach ends when this says how.
    go: mpsc::Sender<bool>,
    /// Attaching ends when it is cancelled, too.
    heeds: Arc<AtomicBool>,
}

impl Stage {
    fn new() -> Stage {
        let (sender, _) = event_queue().unwrap();
        let sockets = SocketSettings { dir: PathBuf::new(), mode: 0o600, group: None };
        let log = Log::start(LogLevel::Notice);
        let mut engine = DaemonEngine::new(Vec::new(), sockets, sender, log).unwrap();
        let said = Arc::new(Said::default());
        *said.namespaces.lock().unwrap() = vec![
            namespace("N", 1, Some(null("Nn1"))),
            namespace("N", 2, None),
            namespace("N", 3, Some(null("Nn3"))),
        ];
        let (events_out, events) = mpsc::channel();
        let (go, may_go) = mpsc::channel::<bool>();
        let may_go = Mutex::new(may_go);
        let given = Arc::clone(&said);
        let heeds = Arc::<AtomicBool>::default();
        let is_heeded = Arc::clone(&heeds);
        engine.nvme.opener = Arc::new(move |_, _, _, events, token| {
            events_out.send(events).unwrap();
            let may_go = may_go.lock().unwrap();
            loop {
                match may_go.recv_timeout(Duration::from_millis(2)) {
                    Ok(true) => return Ok(Arc::clone(&given) as Arc<dyn NvmeControl>),
                    Err(RecvTimeoutError::Timeout) => {}
                    _ => return Err(gone()),
                }
                if token.ended().is_some() && is_heeded.load(Ordering::Relaxed) {
                    return Err(NvmeError::Cancelled { device: "said".to_owned() });
                }
            }
        });
        Stage { engine, said, events, go, heeds }
    }

    fn spec(name: &str) -> NvmeSpec {
        NvmeSpec {
            name: name.to_owned(),
            transport: NvmeTransport::VfioUser,
            address: format!("/said/{name}"),
            queues: 0,
            action_on_timeout: None,
            timeout: None,
            timeout_admin: None,
            io_queue_size: None,
        }
    }

    /// Applies what jobs and events have brought, until `done` says so.
    fn until(&mut self, now: Instant, mut done: impl FnMut(&mut DaemonEngine) -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            while let Some(apply) = self.engine.jobs.next() {
                apply(&mut self.engine);
            }
            self.engine.settle(now);
            if done(&mut self.engine) {
                return;
            }
            assert!(Instant::now() < end, "it does not happen");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The one answer that comes next.
    fn answer(&mut self, now: Instant) -> (Token, Result<Outcome, EngineError>) {
        let mut answers = Vec::new();
        self.until(now, |engine| {
            answers.append(&mut engine.finished());
            !answers.is_empty()
        });
        assert_eq!(answers.len(), 1, "{answers:?}");
        answers.remove(0)
    }

    fn begin(&mut self) -> (Token, NvmeEvents) {
        let token = Token::fresh();
        assert_eq!(self.engine.attach_nvme(Stage::spec("N"), token), Ok(Progress::Later));
        (token, self.events.recv().unwrap())
    }

    fn attached() -> (Stage, NvmeEvents) {
        let mut stage = Stage::new();
        let (token, events) = stage.begin();
        stage.go.send(true).unwrap();
        let names = vec!["Nn1".to_owned(), "Nn3".to_owned()];
        assert_eq!(stage.answer(Instant::now()), (token, Ok(Outcome::Bdevs(names))));
        (stage, events)
    }

    fn names(&self) -> Vec<String> {
        self.engine.bdevs().into_iter().map(|bdev| bdev.name).collect()
    }

    fn states(&self) -> Vec<(String, bool)> {
        let views = self.engine.nvme_controllers().into_iter();
        views.map(|view| (view.name, view.is_detaching)).collect()
    }

    fn detaches(&self) -> u32 {
        self.said.detaches.load(Ordering::Relaxed)
    }
}

fn errno<T: std::fmt::Debug>(result: Result<T, EngineError>) -> i32 {
    match result {
        Err(EngineError::Failed { errno, .. }) => errno,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_attach_that_fails_leaves_nothing() {
    let mut stage = Stage::new();
    let (token, _events) = stage.begin();
    assert_eq!(stage.states(), [("N".to_owned(), false)]);
    assert_eq!(errno(stage.engine.attach_nvme(Stage::spec("N"), Token::fresh())), libc::EEXIST);
    let same_place = NvmeSpec { name: "M".to_owned(), ..Stage::spec("N") };
    assert_eq!(errno(stage.engine.attach_nvme(same_place, Token::fresh())), libc::EBUSY);
    for asked in [
        stage.engine.reset_nvme("N", Token::fresh()),
        stage.engine.nvme_health("N", Token::fresh()),
    ] {
        assert_eq!(errno(asked), libc::EBUSY);
    }
    assert_eq!(errno(stage.engine.set_nvme_defaults(NvmeDefaults::default())), libc::EPERM);
    stage.go.send(false).unwrap();
    let (answered, result) = stage.answer(Instant::now());
    assert_eq!((answered, errno(result)), (token, libc::ENODEV));
    assert!(stage.states().is_empty() && stage.names().is_empty());
    assert!(stage.engine.set_nvme_defaults(NvmeDefaults::default()).is_ok());
}

/// Whether the attempt ends because of it, or comes through at the last moment: the controller is not kept.
#[test]
fn detaching_a_controller_on_its_way_cancels_it() {
    for heeds in [true, false] {
        let mut stage = Stage::new();
        stage.heeds.store(heeds, Ordering::Relaxed);
        let (attaching, _events) = stage.begin();
        let detaching = [Token::fresh(), Token::fresh()];
        for token in detaching {
            assert_eq!(stage.engine.detach_nvme("N", token), Ok(Progress::Later));
        }
        assert_eq!(stage.states(), [("N".to_owned(), true)]);
        assert_eq!(errno(stage.engine.attach_nvme(Stage::spec("N"), Token::fresh())), libc::EBUSY);
        if !heeds {
            stage.go.send(true).unwrap();
        }
        let mut answers = Vec::new();
        stage.until(Instant::now(), |engine| {
            answers.append(&mut engine.finished());
            answers.len() == 3
        });
        let (first, result) = answers.remove(0);
        assert_eq!((first, errno(result)), (attaching, libc::ECANCELED));
        let done = detaching.map(|token| (token, Ok(Outcome::Done)));
        assert_eq!(answers, done, "heeds: {heeds}");
        stage.until(Instant::now(), |engine| engine.nvme_controllers().is_empty());
        assert_eq!((stage.names().len(), stage.detaches()), (0, u32::from(!heeds)));
        assert_eq!(stage.engine.take_vanished(), Vanished::default(), "it was never recorded");
        stage.begin();
    }
}

#[test]
fn a_controller_that_is_lost_before_it_is_there_is_let_go_of() {
    let mut stage = Stage::new();
    let (token, events) = stage.begin();
    events(NvmeEvent::Namespaces);
    events(NvmeEvent::Removed { reason: "pulled".to_owned() });
    stage.until(Instant::now(), |_| true);
    stage.go.send(true).unwrap();
    let (answered, result) = stage.answer(Instant::now());
    assert_eq!((answered, errno(result)), (token, libc::ENODEV));
    stage.until(Instant::now(), |engine| engine.nvme_controllers().is_empty());
    assert_eq!((stage.names().len(), stage.detaches()), (0, 1));
    assert_eq!(stage.engine.take_vanished(), Vanished::default(), "it was never recorded");
}

#[test]
fn namespaces_come_go_and_are_replaced() {
    let (mut stage, events) = Stage::attached();
    let numbers = |stage: &mut Stage| {
        events(NvmeEvent::Namespaces);
        stage.until(Instant::now(), |_| true);
        stage.names()
    };
    stage.said.namespaces.lock().unwrap().remove(2);
    assert_eq!(numbers(&mut stage), ["Nn1"]);
    assert_eq!(stage.engine.take_vanished().bdevs, ["Nn3"]);
    // Another namespace under the same number is another disk.
    let before = stage.engine.bdevs()[0].uuid;
    stage.said.namespaces.lock().unwrap()[0].bdev = Some(null("Nn1"));
    assert_eq!(numbers(&mut stage), ["Nn1"]);
    assert_ne!(stage.engine.bdevs()[0].uuid, before);
    assert_eq!(stage.engine.take_vanished().bdevs, ["Nn1"]);
    // The same one stays, and gets a size.
    let kept = stage.engine.bdevs()[0].uuid;
    stage.said.namespaces.lock().unwrap()[0].info.blocks_count = 99;
    numbers(&mut stage);
    let bdev = stage.engine.bdevs().remove(0);
    assert_eq!((bdev.uuid, bdev.blocks_count), (kept, 99));
    assert_eq!(stage.engine.take_vanished(), Vanished::default());
}

#[test]
fn a_successor_waits_for_the_name_of_a_disk_in_use() {
    let (mut stage, events) = Stage::attached();
    let registry = Arc::clone(&stage.engine.registry);
    let (told, hears) = mpsc::channel();
    let listener = Box::new(move |event: BdevEvent| told.send(event).unwrap());
    let (claim, held) = registry.claim("Nn1", "guest", listener).unwrap();
    let successor = null("Nn1");
    stage.said.namespaces.lock().unwrap()[0].bdev = Some(Arc::clone(&successor));
    events(NvmeEvent::Namespaces);
    stage.until(Instant::now(), |_| true);
    assert_eq!(hears.try_recv(), Ok(BdevEvent::Removing));
    assert_eq!(stage.names(), ["Nn3"]);
    drop(held);
    drop(registry.release(claim));
    stage.until(Instant::now(), |engine| engine.bdevs().len() == 2);
    let uuid = successor.info().uuid();
    assert!(stage.engine.bdevs().iter().any(|bdev| bdev.uuid == uuid));
}

#[test]
fn a_detach_waits_for_guests_but_not_for_ever() {
    for is_patient in [true, false] {
        let (mut stage, events) = Stage::attached();
        let registry = Arc::clone(&stage.engine.registry);
        let (claim, held) = registry.claim("Nn1", "guest", Box::new(|_| {})).unwrap();
        let tokens = [Token::fresh(), Token::fresh()];
        assert_eq!(stage.engine.detach_nvme("N", tokens[0]), Ok(Progress::Later));
        assert_eq!(stage.engine.detach_nvme("N", tokens[1]), Ok(Progress::Later));
        // Whatever it says now, it is on its way out.
        events(NvmeEvent::Namespaces);
        events(NvmeEvent::Removed { reason: "late".to_owned() });
        let now = Instant::now();
        stage.until(now, |_| true);
        assert!(stage.names().is_empty());
        assert_eq!(stage.states(), [("N".to_owned(), true)]);
        assert_eq!(stage.detaches(), 0, "a guest still has its channels");
        assert!(stage.engine.timeout(now).is_some_and(|left| left <= Duration::from_secs(5)));
        assert_eq!(errno(stage.engine.attach_nvme(Stage::spec("N"), Token::fresh())), libc::EBUSY);
        assert_eq!(errno(stage.engine.reset_nvme("N", Token::fresh())), libc::EBUSY);
        if is_patient {
            drop(held);
            drop(registry.release(claim));
            stage.until(now, |engine| engine.nvme_controllers().is_empty());
        } else {
            // The device is let go of, the name waits for the guest.
            stage.until(now + LATER, |engine| engine.nvme_names().is_empty());
            assert_eq!(stage.states(), [("N".to_owned(), true)]);
            assert_eq!(stage.engine.detach_nvme("N", Token::fresh()), Ok(Progress::Done));
            drop(held);
            drop(registry.release(claim));
            stage.until(now + LATER, |engine| engine.nvme_controllers().is_empty());
        }
        assert_eq!(stage.detaches(), 1);
        let answers = stage.engine.finished();
        assert_eq!(answers, tokens.map(|token| (token, Ok(Outcome::Done))));
        assert_eq!(stage.engine.take_vanished(), Vanished::default(), "the caller knows");
    }
}

#[test]
fn a_loss_is_told_once_and_the_name_is_free_again() {
    let (mut stage, events) = Stage::attached();
    for _ in 0..2 {
        events(NvmeEvent::Removed { reason: "pulled".to_owned() });
    }
    stage.until(Instant::now(), |engine| engine.nvme_controllers().is_empty());
    let vanished = stage.engine.take_vanished();
    let names = vec!["Nn1".to_owned(), "Nn3".to_owned()];
    assert_eq!(vanished.controllers, [("N".to_owned(), names)]);
    assert_eq!((stage.names().len(), stage.detaches()), (0, 1));
    // Voices from the past are nobody's.
    let (token, _) = stage.begin();
    events(NvmeEvent::Removed { reason: "again".to_owned() });
    *stage.said.namespaces.lock().unwrap() = vec![namespace("N", 1, Some(null("Nn1")))];
    stage.go.send(true).unwrap();
    let names = vec!["Nn1".to_owned()];
    assert_eq!(stage.answer(Instant::now()), (token, Ok(Outcome::Bdevs(names))));
}

#[test]
fn a_foreign_bdev_of_the_name_fails_the_whole_attach() {
    let mut stage = Stage::new();
    stage.engine.registry.add(null("Nn3")).unwrap();
    let (token, _events) = stage.begin();
    stage.go.send(true).unwrap();
    let (answered, result) = stage.answer(Instant::now());
    assert_eq!((answered, errno(result)), (token, libc::EEXIST));
    stage.until(Instant::now(), |engine| engine.nvme_controllers().is_empty());
    assert_eq!(stage.detaches(), 1);
    assert!(stage.engine.registry.get("Nn3").is_ok(), "somebody else's");
    assert!(stage.engine.registry.get("Nn1").is_err());
}

#[test]
fn failures_of_the_device_reach_whoever_asked() {
    let (mut stage, _events) = Stage::attached();
    let token = Token::fresh();
    stage.engine.reset_nvme("N", token).unwrap();
    assert_eq!(stage.answer(Instant::now()), (token, Ok(Outcome::Done)));
    stage.said.reset_fails.store(true, Ordering::Relaxed);
    stage.engine.reset_nvme("N", token).unwrap();
    assert_eq!(errno(stage.answer(Instant::now()).1), libc::ENODEV);
    stage.engine.nvme_health("N", token).unwrap();
    assert_eq!(errno(stage.answer(Instant::now()).1), libc::ENODEV);
    assert_eq!(errno(stage.engine.reset_nvme("M", token)), libc::ENODEV);
}

#[test]
fn the_end_of_the_daemon_lets_go_of_everything() {
    let (mut stage, _events) = Stage::attached();
    stage.engine.begin_shutdown();
    stage.until(Instant::now(), |engine| engine.nvme_names().is_empty());
    assert_eq!(stage.detaches(), 1);
    assert!(stage.names().is_empty());

    // One that is still on its way is not kept.
    let mut stage = Stage::new();
    let (token, _events) = stage.begin();
    stage.engine.begin_shutdown();
    assert_eq!(stage.engine.nvme_names(), ["N"]);
    stage.go.send(true).unwrap();
    let (answered, result) = stage.answer(Instant::now());
    assert_eq!((answered, errno(result)), (token, libc::ESHUTDOWN));
    stage.until(Instant::now(), |engine| engine.nvme_names().is_empty());
    assert_eq!(stage.detaches(), 1);
}
