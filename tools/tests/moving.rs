//! Queues that move between reactors while their guest works: no request is lost, none is done twice, no data is wrong.
//!
//! On the real daemon the client is the `virtio-driver` crate; what a reactor cannot do is played in this process, on a
//! controller with a bdev of the test's own. `RINGMILL_TEST_SEED` replays a load's choices.

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/frontend.rs"]
mod frontend;
#[path = "support/host.rs"]
mod host;
#[path = "support/media.rs"]
mod media;
#[path = "support/model.rs"]
mod model;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use daemon::{Daemon, WAIT_MAX, wait_for};
use frontend::{F_FLUSH, FrontEnd, Load, Memory, P_CONFIG, P_MEM_SLOTS, P_MQ, P_REPLY_ACK};
use host::Host;
use media::{MIB, set_len, skip};
use model::{Exercise, Op, connect, seed};
use ringmill_core::bdev::{Bdev, BdevError, BdevInfo, ChannelSeed};
use ringmill_core::reactor::{self, ReactorHandle};
use ringmill_drivers::malloc::{MallocBdev, MallocOptions};
use ringmill_vmm_glue::blk::{ControllerError, ControllerState};
use serde_json::{Value, json};

const SLOT_BYTES: usize = 64 << 10;
const MOVES: u32 = 1000;

fn cores_count() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The core of each queue, as status output shows it.
fn places(daemon: &Daemon, name: &str) -> Vec<u64> {
    let shown = daemon.call("vhost_get_controllers", &json!({"name": name}));
    let queues = shown[0]["sessions"][0]["queues"].as_array().cloned().unwrap_or_default();
    queues.iter().map(|queue| queue["lcore"].as_u64().expect("a core")).collect()
}

/// The pollers of a disk, by core, as the other status methods show them.
fn pollers(daemon: &Daemon, name: &str) -> Vec<(u64, String)> {
    let prefix = format!("{name}:");
    let threads = daemon.call("thread_get_pollers", &json!({}));
    let threads = threads["threads"].as_array().expect("threads").clone();
    let mut all = Vec::new();
    for (core, thread) in (0..).zip(&threads) {
        // A queue without traffic is parked.
        let lists = ["active_pollers", "paused_pollers"];
        let names = lists.iter().flat_map(|list| thread[list].as_array().expect("pollers"));
        let names = names.map(|p| p["name"].as_str().expect("a name").to_owned());
        all.extend(names.filter(|n| n.starts_with(&prefix)).map(|n| (core, n)));
    }
    all.sort_by(|a, b| a.1.cmp(&b.1));
    all
}

/// Moves a disk of four queues between two cores, all of it or a queue at a time, while a client checks what it reads.
fn move_under_load(daemon: &Daemon, name: &str, socket: &Path, moves: u32) {
    let mut exercise = Exercise::new(connect(socket, 4, 16, SLOT_BYTES), 16, seed(0x30e5));
    let span = exercise.sectors_count();
    exercise.one(Op::WriteZeroes(false), 0, span);
    std::thread::scope(|scope| {
        let moving = scope.spawn(|| {
            let mut rpc = daemon.rpc();
            for turn in 0..moves {
                let mut params = json!({"ctrlr": name, "cpumask": format!("[{}]", turn / 2 % 2)});
                if turn % 5 == 4 {
                    params = json!({"ctrlr": name, "cpumask": format!("[{}]", turn / 5 % 2), "queue": turn % 4});
                }
                assert_eq!(rpc.call("vhost_controller_set_cpumask", &params), true);
            }
        });
        let end = Instant::now() + 4 * WAIT_MAX;
        exercise
            .random_for(4 * WAIT_MAX, span, 64, |_| moving.is_finished() || Instant::now() > end);
        moving.join().expect("every move succeeds");
    });
    exercise.drain();
    assert!(exercise.completed_count > u64::from(moves), "{exercise}");
    exercise.verify();
    for (mask, want) in [("0x1", [0, 0, 0, 0]), ("0x2", [1, 1, 1, 1])] {
        daemon.call("vhost_controller_set_cpumask", &json!({"ctrlr": name, "cpumask": mask}));
        assert_eq!(places(daemon, name), want);
        let names = (0..4).map(|queue| (want[0], format!("{name}:{queue}")));
        assert_eq!(pollers(daemon, name), names.collect::<Vec<_>>());
        let shown = daemon.call("vhost_get_controllers", &json!({"name": name}));
        assert_eq!(shown[0]["cpumask"], mask);
    }
    daemon.call("vhost_controller_set_cpumask", &json!({"ctrlr": name, "cpumask": "0x3"}));
    let spread = places(daemon, name);
    assert_eq!(spread.iter().sum::<u64>(), 2, "two queues on each core: {spread:?}");
    daemon.call(
        "vhost_controller_set_cpumask",
        &json!({"ctrlr": name, "cpumask": "0x1", "queue": spread.iter().position(|&c| c == 1)}),
    );
    assert_eq!(places(daemon, name).iter().sum::<u64>(), 1);
    exercise.random_rounds(500, span, 64);
    exercise.verify();
}

#[test]
fn disks_move_a_thousand_times_under_load() {
    if cores_count() < 2 {
        return skip("disks_move_a_thousand_times_under_load", "one core");
    }
    // Adaptive: both reactors fall asleep whenever their queues have left.
    let daemon = Daemon::with(["-m", "3"]);
    let ram = daemon.add_malloc("ram", 16 * MIB, 512);
    move_under_load(&daemon, "ram", &ram, MOVES);
    let blocks = daemon.add_malloc("blocks", 16 * MIB, 4096);
    move_under_load(&daemon, "blocks", &blocks, MOVES / 4);
    let image = daemon.dir().join("file.img");
    set_len(&image, 16 * MIB);
    let file = daemon.add_uring("file", &image, &json!({}));
    move_under_load(&daemon, "file", &file, MOVES);
    daemon.stop();
}

/// Packed rings have their position in descriptors, not in an index that everybody sees.
#[test]
fn packed_queues_move_under_a_verifying_load() {
    if cores_count() < 2 {
        return skip("packed_queues_move_under_a_verifying_load", "one core");
    }
    let daemon = Daemon::with(["-m", "3"]);
    let socket = daemon.add_malloc("ram", 64 * MIB, 512);
    let args = ["-w", "verify", "--packed", "-n", "2", "-q", "16", "-o", "64k", "-t", "2"];
    let mut perf = Command::new(env!("CARGO_BIN_EXE_ringmill-perf"))
        .args(args)
        .arg(&socket)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("ringmill-perf starts");
    let (mut rpc, mut moves) = (daemon.rpc(), 0);
    while perf.try_wait().expect("our child").is_none() {
        let params = json!({"ctrlr": "ram", "cpumask": format!("[{}]", moves % 2)});
        assert_eq!(rpc.call("vhost_controller_set_cpumask", &params), true);
        moves += 1;
    }
    let output = perf.wait_with_output().expect("our child");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && moves > 50, "{moves} moves: {said}");
    daemon.stop();
}

/// A guest that never polls: every answer must reach it by an interrupt, and its kicks must be heard, wherever its queue
/// is; meanwhile its VMM does what VMMs do to a running queue.
#[test]
fn a_sleeping_guest_hears_of_every_answer_while_its_queue_moves() {
    if cores_count() < 2 {
        return skip("a_sleeping_guest_hears_of_every_answer_while_its_queue_moves", "one core");
    }
    let daemon = Daemon::with(["-m", "3"]);
    let socket = daemon.add_malloc("ram", 8 * MIB, 512);
    let mut front =
        FrontEnd::connect(&socket, F_FLUSH, P_MQ | P_CONFIG | P_REPLY_ACK | P_MEM_SLOTS);
    let (rings, data) = (Memory::new(0, 1 << 20), Memory::new(1 << 30, 1 << 20));
    let more = Memory::new(1 << 31, 1 << 20);
    front.add_memory(&rings);
    front.add_memory(&data);
    let mut load = Load::new(rings, 0, 1, 1 << 30);
    front.start(&load.ring, 0);
    let (stop, moves_count) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let moving = scope.spawn(|| {
            let (mut rpc, mut moves) = (daemon.rpc(), 0u64);
            while !stop.load(Ordering::Relaxed) {
                let params = json!({"ctrlr": "ram", "cpumask": format!("[{}]", moves % 2)});
                rpc.call("vhost_controller_set_cpumask", &params);
                moves += 1;
                moves_count.store(moves, Ordering::Relaxed);
                // Now and then long enough for the reactors to fall asleep.
                if moves % 16 == 0 {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        });
        // As long as it takes: how many moves happen meanwhile is the scheduler's choice.
        for round in 0u32.. {
            if round >= 1500 && moves_count.load(Ordering::Relaxed) > 100 {
                break;
            }
            assert!(round < 1_000_000, "{moves_count:?} moves");
            load.submit(&data);
            while load.poll(&[&data]) == 0 {
                assert!(load.ring.wait_call(WAIT_MAX), "round {round}: no interrupt");
            }
            match round % 31 {
                3 | 17 | 23 => front.renew(&mut load.ring),
                7 => front.enable(&load.ring, false),
                8 => front.enable(&load.ring, true),
                11 => front.add_memory(&more),
                13 => front.remove_memory(&more),
                _ => {}
            }
            if round % 31 == 7 {
                front.enable(&load.ring, true);
            }
        }
        stop.store(true, Ordering::Relaxed);
        moving.join().expect("every move succeeds");
    });
    // A signal that cannot be delivered stays behind; the next one is a new one.
    for core in [1, 0, 1] {
        load.ring.block_call();
        load.run(&data, 3);
        let params = json!({"ctrlr": "ram", "cpumask": format!("[{core}]")});
        daemon.call("vhost_controller_set_cpumask", &params);
        assert!(load.ring.wait_call(WAIT_MAX), "it was full");
        for _ in 0..3 {
            load.submit(&data);
            while load.poll(&[&data]) == 0 {
                assert!(load.ring.wait_call(WAIT_MAX), "core {core}: no interrupt");
            }
        }
    }
    load.drain(&[&data]);
    // A stopped ring says where it stands, and a started one goes on there, wherever it has been.
    let base = front.stop(&load.ring);
    assert_eq!(base, load.ring.avail_index);
    front.start(&load.ring, base);
    load.run(&data, 10);
    daemon.stop();
}

#[test]
fn a_mask_without_a_guest_holds_for_the_next_one() {
    if cores_count() < 2 {
        return skip("a_mask_without_a_guest_holds_for_the_next_one", "one core");
    }
    let daemon = Daemon::with(["-m", "3"]);
    let socket = daemon.add_malloc("ram", 8 * MIB, 512);
    let place = |params: Value| daemon.call("vhost_controller_set_cpumask", &params);
    for core in [1, 0, 1] {
        assert_eq!(place(json!({"ctrlr": "ram", "cpumask": format!("[{core}]")})), true);
        let mut exercise = Exercise::new(connect(&socket, 2, 8, SLOT_BYTES), 8, 1);
        exercise.one(Op::Write, 0, 8);
        assert_eq!(places(&daemon, "ram"), [core, core]);
        drop(exercise);
        assert!(wait_for(WAIT_MAX, || places(&daemon, "ram").is_empty()));
    }
    place(json!({"ctrlr": "ram", "cpumask": "0x1", "queue": 1}));
    let exercise = Exercise::new(connect(&socket, 2, 8, SLOT_BYTES), 8, 1);
    assert_eq!(places(&daemon, "ram"), [1, 0]);
    drop(exercise);
    daemon.stop();
}

/// A RAM disk whose channels can be refused: so many more of them fail to open on their reactor.
#[derive(Debug)]
struct Moody {
    ram: MallocBdev,
    refusals: Arc<AtomicU32>,
}

impl Bdev for Moody {
    fn info(&self) -> &Arc<BdevInfo> {
        self.ram.info()
    }

    fn open_channel(&self, home: Option<&ReactorHandle>) -> Result<ChannelSeed, BdevError> {
        let (seed, refusals) = (self.ram.open_channel(home)?, Arc::clone(&self.refusals));
        Ok(Box::new(move |io| {
            let refuse = |n: u32| n.checked_sub(1);
            if refusals.fetch_update(Ordering::Relaxed, Ordering::Relaxed, refuse).is_ok() {
                let (name, reason) = ("moody".to_owned(), "not today".to_owned());
                return Err(BdevError::Refused { name, reason });
            }
            seed(io)
        }))
    }
}

type Moved = mpsc::Sender<Result<(), String>>;

/// A controller over a moody disk, of which queues are moved between two reactors.
struct Mover {
    host: Host,
    refusals: Arc<AtomicU32>,
    /// Where the queues are, by the last look.
    cores: Arc<Mutex<Vec<usize>>>,
    /// Who waits for which move.
    waiting: Arc<Mutex<Vec<(u64, Moved)>>>,
    next_ticket: AtomicU64,
}

impl Mover {
    fn start(queues_max: u16) -> Mover {
        let options = MallocOptions { blocks_count: 16384, block_bytes: 512, uuid: None };
        let ram = MallocBdev::new("moody", &options).expect("memory");
        let refusals = Arc::new(AtomicU32::new(0));
        let moody = Arc::new(Moody { ram, refusals: Arc::clone(&refusals) });
        let cores = Arc::<Mutex<Vec<usize>>>::default();
        let waiting = Arc::<Mutex<Vec<(u64, Moved)>>>::default();
        let (shown, answers) = (Arc::clone(&cores), Arc::clone(&waiting));
        let mut next_look = Instant::now();
        let host = Host::start(moody, 2, (queues_max, false), move |controller, reactors| {
            if Instant::now() >= next_look {
                next_look = Instant::now() + Duration::from_millis(100);
                controller.check_ages();
            }
            for (ticket, result) in controller.take_moved() {
                let mut answers = answers.lock().unwrap();
                let at = answers.iter().position(|(t, _)| *t == ticket).expect("asked once");
                let _ = answers.remove(at).1.send(result);
            }
            *shown.lock().unwrap() = (0..reactors.len())
                .flat_map(|at| reactors[at].pollers().iter().map(|_| at).collect::<Vec<_>>())
                .collect();
        });
        Mover { host, refusals, cores, waiting, next_ticket: AtomicU64::new(1) }
    }

    /// Begins a move; its result comes later.
    fn begin(&self, reactor: usize, queue: Option<u16>) -> mpsc::Receiver<Result<(), String>> {
        let (answer, answered) = mpsc::channel();
        let (to, waiting) = (vec![self.host.reactors[reactor].clone()], Arc::clone(&self.waiting));
        let ticket = self.next_ticket.fetch_add(1, Ordering::Relaxed);
        self.host.order(move |controller, _| match controller.place(ticket, to, queue) {
            Ok(()) => waiting.lock().unwrap().push((ticket, answer)),
            Err(error) => drop(answer.send(Err(error.to_string()))),
        });
        answered
    }

    fn place(&self, reactor: usize, queue: Option<u16>) -> Result<(), String> {
        self.begin(reactor, queue).recv_timeout(WAIT_MAX).expect("an answer")
    }

    fn cores(&self) -> Vec<usize> {
        self.cores.lock().unwrap().clone()
    }

    fn client(&self, queues: usize) -> Exercise {
        let mut exercise = Exercise::new(connect(&self.host.socket(), queues, 8, SLOT_BYTES), 8, 3);
        let sectors = exercise.sectors_count();
        exercise.one(Op::WriteZeroes(false), 0, sectors);
        exercise
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        // One that is leaving is not moved any more.
        let to = vec![self.host.reactors[0].clone()];
        self.host.order(move |controller, _| {
            controller.begin_delete();
            let refused = controller.place(0, to, None);
            let gone = controller.state() == ControllerState::Deleted;
            assert!(gone || matches!(refused, Err(ControllerError::Leaving(_))));
        });
    }
}

#[test]
fn a_reactor_that_cannot_serve_a_queue_gives_it_back() {
    let mover = Mover::start(2);
    let mut exercise = mover.client(2);
    assert_eq!(mover.cores(), [0, 0]);
    mover.refusals.store(1, Ordering::Relaxed);
    let problem = mover.place(1, None).expect_err("one queue was refused");
    assert!(problem.contains("stays on") && problem.contains("not today"), "{problem}");
    assert!(wait_for(WAIT_MAX, || mover.cores() == [0, 1]), "{:?}", mover.cores());
    exercise.random_rounds(500, 4096, 64);
    exercise.verify();
    // Asked again, it goes.
    assert_eq!(mover.place(1, None), Ok(()));
    assert!(wait_for(WAIT_MAX, || mover.cores() == [1, 1]));
    exercise.random_rounds(500, 4096, 64);
    exercise.verify();
    // Refused by both: the queue is there and says so in every answer, loudly.
    mover.refusals.store(2, Ordering::Relaxed);
    assert!(mover.place(0, Some(0)).is_err());
    assert!(wait_for(WAIT_MAX, || mover.cores() == [1, 1]));
    assert!(!exercise.succeeds(Op::Read, 0, 1), "queue 0 has no way to the disk");
    assert_eq!(mover.place(0, Some(0)), Ok(()));
    assert!(exercise.succeeds(Op::Read, 0, 1), "the next move gave it one");
    exercise.verify();
    let (code, last) = (mover.place(0, Some(2)).expect_err("no such queue"), "0 to 1");
    assert!(code.contains(last), "{code}");
}

#[test]
fn a_reactor_that_does_not_answer_loses_the_queue_again() {
    let mover = Mover::start(1);
    let mut exercise = mover.client(1);
    // Busy with something else for longer than the control thread's patience.
    let busy = |reactor: &mut reactor::Reactor| {
        let _ = reactor;
        std::thread::sleep(Duration::from_secs(5));
    };
    assert!(mover.host.reactors[1].send(Box::new(busy)).is_ok());
    let asked = Instant::now();
    let answered = mover.begin(1, None);
    // Meanwhile the guest waits, and so do the control thread's other operations: the call descriptor is replaced, say.
    let problem = answered.recv_timeout(WAIT_MAX).expect("an answer").expect_err("no answer");
    assert!(problem.contains("does not answer"), "{problem}");
    assert!(asked.elapsed() < Duration::from_millis(4500), "{:?}", asked.elapsed());
    exercise.random_rounds(500, 4096, 64);
    exercise.verify();
    assert_eq!(mover.cores(), [0]);
    // The late reactor finds nothing of it.
    assert!(wait_for(WAIT_MAX, || asked.elapsed() > Duration::from_secs(6)));
    assert_eq!(mover.cores(), [0]);
    assert!(exercise.succeeds(Op::Read, 0, 1));
    assert_eq!(mover.place(1, None), Ok(()));
    exercise.random_rounds(500, 4096, 64);
    exercise.verify();
    let longest = mover.host.longest();
    assert!(longest < Duration::from_secs(1), "the control thread was away for {longest:?}");
}

#[test]
fn moves_wait_in_line_and_end_with_their_client() {
    let mover = Mover::start(2);
    let mut exercise = mover.client(2);
    let mut answers = Vec::new();
    for turn in 0..200 {
        answers.push(mover.begin(turn % 2, None));
        if turn % 10 == 0 {
            exercise.random_rounds(16, 4096, 64);
        }
    }
    // Half of them have a client that leaves in the middle.
    drop(exercise);
    for answered in answers {
        assert_eq!(answered.recv_timeout(WAIT_MAX).expect("every move ends"), Ok(()));
    }
    let mut exercise = mover.client(2);
    assert!(wait_for(WAIT_MAX, || mover.cores() == [1, 1]), "{:?}", mover.cores());
    exercise.random_rounds(200, 4096, 64);
    exercise.verify();
}
