//! Idle pollers leave the passes and come back: at an event, at a message, and never too late.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::thread::sleep;
use std::time::{Duration, Instant};

use ringmill_core::reactor::{
    ClientId, Done, IdlePolicy, Poller, PollerId, ReactorConfig, ReactorCx, ReactorHandle, spawn,
};
use rustix::event::{EventfdFlags, eventfd};

/// Work for one poller, as a guest gives it: a counter, a wish to be notified, and a notification.
struct Bell {
    posted: AtomicU64,
    seen: AtomicU64,
    wish: AtomicBool,
    parks_count: AtomicU64,
    fd: OwnedFd,
}

impl Bell {
    fn new() -> Arc<Bell> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
        Arc::new(Bell {
            posted: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            wish: AtomicBool::new(false),
            parks_count: AtomicU64::new(0),
            fd,
        })
    }

    fn post(&self) {
        self.posted.fetch_add(1, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.wish.load(Ordering::Relaxed) {
            rustix::io::write(self.fd.as_fd(), &1u64.to_ne_bytes()).expect("room in an eventfd");
        }
    }

    fn is_served(&self) -> bool {
        self.seen.load(Ordering::Acquire) == self.posted.load(Ordering::Relaxed)
    }

    fn wait_served(&self) {
        let start = Instant::now();
        while !self.is_served() {
            assert!(start.elapsed() < Duration::from_secs(5), "work was never seen: a lost kick");
            std::hint::spin_loop();
        }
    }
}

struct Listener {
    bell: Arc<Bell>,
    client: Option<ClientId>,
    quiesced_count: u64,
}

impl Listener {
    fn new(bell: &Arc<Bell>) -> Box<Listener> {
        Box::new(Listener { bell: Arc::clone(bell), client: None, quiesced_count: 0 })
    }
}

impl Poller for Listener {
    fn poll(&mut self, cx: &mut ReactorCx) -> bool {
        if let (Some(ring), Some(client)) = (&mut cx.io.ring, self.client) {
            while ring.next_event(client).is_some() {}
        }
        let posted = self.bell.posted.load(Ordering::Acquire);
        if posted == self.bell.seen.load(Ordering::Relaxed) {
            return false;
        }
        self.bell.wish.store(false, Ordering::Relaxed);
        self.bell.seen.store(posted, Ordering::Release);
        true
    }

    fn prepare_sleep(&mut self, _cx: &mut ReactorCx) -> bool {
        self.bell.wish.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        !self.bell.is_served()
    }

    fn park(&mut self, cx: &mut ReactorCx) -> Option<ClientId> {
        if self.prepare_sleep(cx) {
            return None;
        }
        self.bell.parks_count.fetch_add(1, Ordering::Relaxed);
        self.client
    }

    fn attach(&mut self, cx: &mut ReactorCx) {
        if let Some(ring) = &mut cx.io.ring {
            let client = ring.add_client(4).expect("a place");
            assert!(ring.watch(client, 1, self.bell.fd.as_raw_fd()));
            self.client = Some(client);
        }
    }

    fn detach(&mut self, cx: &mut ReactorCx) {
        if let (Some(ring), Some(client)) = (&mut cx.io.ring, self.client.take()) {
            ring.unwatch(client, 1);
            ring.commit();
            ring.remove_client(client);
        }
    }

    fn quiesce(&mut self, _cx: &mut ReactorCx, done: Done) {
        self.quiesced_count += 1;
        done();
    }
}

/// A reactor that never sleeps: a lost wake-up is not mended by the end of a sleep.
fn reactor() -> ReactorHandle {
    let config = ReactorConfig { core: None, idle: IdlePolicy::Poll, io_wq_cpus: Vec::new() };
    spawn(&config).expect("a reactor")
}

fn parked_count(reactor: &ReactorHandle) -> usize {
    reactor.pollers().iter().filter(|p| p.counters.is_parked()).count()
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(10), "{what}");
        sleep(Duration::from_millis(1));
    }
}

#[test]
fn an_idle_poller_costs_nothing_until_its_bell_rings() {
    let reactor = reactor();
    let bells: Vec<_> = (0..40).map(|_| Bell::new()).collect();
    let ids: Vec<_> = bells.iter().map(|_| PollerId::next()).collect();
    for (bell, &id) in bells.iter().zip(&ids) {
        assert!(reactor.add_poller(id, "listener", 0, Listener::new(bell)));
    }
    wait_until("all park", || parked_count(&reactor) == 40);
    let runs = || reactor.pollers().iter().map(|p| p.counters.runs()).collect::<Vec<_>>();
    let before = runs();
    sleep(Duration::from_millis(30));
    assert_eq!(runs(), before, "a parked poller was polled");

    bells[7].post();
    bells[7].wait_served();
    for (at, (now, then)) in runs().iter().zip(&before).enumerate() {
        assert_eq!(now > then, at == 7, "poller {at}: only the one that was rung is polled");
    }
    wait_until("it parks again", || parked_count(&reactor) == 40);

    // A message comes through to a parked poller, and finds the right one.
    let asked = reactor.ask({
        let id = ids[3];
        move |r| {
            r.with_poller(id, |l: &mut Listener, cx| {
                l.quiesce(cx, Box::new(|| ()));
                l.quiesced_count
            })
        }
    });
    assert_eq!(asked.flatten(), Some(1));
    wait_until("it parks again", || parked_count(&reactor) == 40);

    // Leaving while parked; the others still hear their bells, and the place is used again.
    for &id in ids.iter().step_by(2) {
        assert!(reactor.remove_poller(id));
        assert!(!reactor.remove_poller(id));
    }
    for bell in bells.iter().step_by(2) {
        bell.wish.store(false, Ordering::Relaxed);
    }
    let (id, late) = (PollerId::next(), Bell::new());
    assert!(reactor.add_poller(id, "late", 0, Listener::new(&late)));
    wait_until("the rest parks", || parked_count(&reactor) == 21);
    for bell in bells.iter().skip(1).step_by(2).chain([&late]) {
        bell.post();
        bell.wait_served();
    }
    reactor.stop();
}

/// Posts at every distance from the moment of parking, that moment above all.
#[test]
fn no_bell_is_missed_while_its_poller_parks() {
    let reactor = reactor();
    let mut parks_count = 0;
    let start = Instant::now();
    for round in 0u64.. {
        // Patience grows with every early return: a new poller has the least.
        let (id, bell) = (PollerId::next(), Bell::new());
        assert!(reactor.add_poller(id, "listener", 0, Listener::new(&bell)));
        assert!(reactor.ask(move |r| r.with_dyn_poller(id, |_, _| ()).is_some()) == Some(true));
        let target = Duration::from_nanos(1_990_000 + (round * 7919) % 20_000);
        for _ in 0..2 {
            let wait = Instant::now();
            while wait.elapsed() < target {
                std::hint::spin_loop();
            }
            bell.post();
            bell.wait_served();
        }
        assert!(reactor.remove_poller(id));
        parks_count += bell.parks_count.load(Ordering::Relaxed);
        if start.elapsed() > Duration::from_millis(1500) {
            break;
        }
    }
    assert!(parks_count > 10, "{parks_count} parks");
    reactor.stop();
}
