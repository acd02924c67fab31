//! Reactors as threads: what they book as busy, and what they answer.

use std::thread::sleep;
use std::time::{Duration, Instant};

use ringmill_core::reactor::{IdlePolicy, Poller, PollerId, ReactorConfig, ReactorCx, spawn};
use ringmill_core::units::CoreId;

fn config() -> ReactorConfig {
    let idle = IdlePolicy::Adaptive { spin_ns: 100_000 };
    ReactorConfig { core: None, idle, io_wq_cpus: Vec::new() }
}

#[test]
fn sleep_is_idle_time_however_it_ends() {
    let reactor = spawn(&config()).expect("a reactor");
    let before = reactor.stats();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1) {
        assert_eq!(reactor.ask(|_| 7), Some(7));
        sleep(Duration::from_millis(20));
    }
    let after = reactor.stats();
    let busy = after.busy_ticks - before.busy_ticks;
    let idle = after.idle_ticks - before.idle_ticks;
    assert!(after.sleeps_count > before.sleeps_count);
    assert!(busy < idle, "fifty messages in a second: {busy} busy, {idle} idle ticks");
    reactor.stop();
}

/// Finds work every time.
struct Restless;

impl Poller for Restless {
    fn poll(&mut self, _cx: &mut ReactorCx) -> bool {
        true
    }

    fn prepare_sleep(&mut self, _cx: &mut ReactorCx) -> bool {
        true
    }
}

#[test]
fn a_poller_with_work_is_busy_time_and_can_be_taken_off_again() {
    let reactor = spawn(&config()).expect("a reactor");
    let id = PollerId::next();
    assert!(reactor.add_poller(id, "restless", 0, Box::new(Restless)));
    assert_eq!(reactor.ask(move |r| r.with_dyn_poller(id, |_, _| ()).is_some()), Some(true));
    let before = reactor.stats();
    sleep(Duration::from_millis(200));
    let after = reactor.stats();
    assert!(after.busy_ticks - before.busy_ticks > after.idle_ticks - before.idle_ticks);
    assert_eq!(reactor.pollers().len(), 1);
    assert!(reactor.remove_poller(id));
    assert!(!reactor.remove_poller(id));
    assert!(reactor.pollers().is_empty());
    reactor.stop();
}

#[test]
fn a_core_that_does_not_exist_is_named_with_those_that_do() {
    let error = spawn(&ReactorConfig { core: Some(CoreId(1023)), ..config() });
    let error = error.expect_err("no such core").to_string();
    assert!(error.contains("1023") && error.contains("available cores"), "{error}");
}
