//! Sleeping while commands are out.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ringmill_core::reactor::{DeviceQueue, Ring};
use rustix::event::{EventfdFlags, eventfd};

use super::super::parts::Interrupts;
use super::super::shared::Order;
use super::rig::{Options, Rig, cid};
use crate::pci::PciError;

/// A vector that signals whatever it is bound to.
#[derive(Default)]
struct Vector {
    bound: Mutex<Option<OwnedFd>>,
    refuses: AtomicBool,
}

impl Vector {
    fn is_bound(&self) -> bool {
        self.bound.lock().unwrap().is_some()
    }

    fn raise(&self) {
        if let Some(fd) = &*self.bound.lock().unwrap() {
            rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
        }
    }
}

fn rig_with_vector() -> (Rig, Arc<Vector>, Ring) {
    let mut rig = Rig::new(&Options { channels: 2, ..Options::default() });
    let vector = Arc::new(Vector::default());
    let to = Arc::clone(&vector);
    let bind = move |fd: Option<BorrowedFd<'_>>| {
        if to.refuses.load(Ordering::Relaxed) {
            return Err(PciError::Gone { device: "test".to_owned() });
        }
        *to.bound.lock().unwrap() = fd.map(|fd| fd.try_clone_to_owned().unwrap());
        Ok(())
    };
    let eventfd = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
    rig.pair().interrupts = Interrupts::Own { bind: Arc::new(bind), eventfd };
    let mut ring = Ring::new(&[]).unwrap();
    ring.enable().unwrap();
    (rig, vector, ring)
}

#[test]
fn an_interrupt_ends_a_sleep_and_polling_needs_none() {
    let (mut rig, vector, mut ring) = rig_with_vector();
    assert!(!rig.pair().prepare_sleep(&mut ring) && !vector.is_bound(), "nothing is out");
    rig.pair().wake(&mut ring, 1);
    for round in 0..20 {
        assert!(rig.read(0, round));
        rig.commit();
        assert!(!vector.is_bound());
        assert!(!rig.pair().prepare_sleep(&mut ring) && vector.is_bound());
        ring.commit();
        assert_eq!(ring.reap(), 0);
        rig.device.serve();
        vector.raise();
        let since = Instant::now();
        ring.wait(Duration::from_secs(10));
        assert!(since.elapsed() < Duration::from_secs(5) && ring.reap() > 0, "round {round}");
        rig.pair().wake(&mut ring, 5);
        assert!(!vector.is_bound() && rig.pair().now_ns == 5);
        assert_eq!(rig.tags(0), [round]);
    }
    rig.pair().leave(&mut ring);
    assert!(rig.pair().client.is_none());
}

#[test]
fn what_is_there_already_keeps_the_reactor_awake() {
    let (mut rig, vector, mut ring) = rig_with_vector();
    assert!(rig.read(0, 1) && rig.read(1, 2));
    rig.commit();
    rig.device.fetch();
    let entry = rig.device.fetched.pop_front().unwrap();
    rig.device.answer(entry);
    assert!(rig.pair().prepare_sleep(&mut ring), "a completion that nobody has seen");
    rig.pair().wake(&mut ring, 1);
    assert!(!vector.is_bound());
    assert!(rig.poll(1).is_empty());
    assert!(rig.pair().prepare_sleep(&mut ring), "the other channel's inbox");
    rig.pair().wake(&mut ring, 1);
    assert_eq!(rig.tags(0), [1]);
    assert!(!rig.pair().prepare_sleep(&mut ring));
    rig.pair().wake(&mut ring, 1);
    rig.shared.order(Order::Hold);
    assert!(rig.pair().prepare_sleep(&mut ring), "an order");
    rig.pair().wake(&mut ring, 1);
    rig.order(Order::Run);
    let entry = rig.device.fetched.pop_front().unwrap();
    rig.device.post(cid(&entry), 0x82, rig.device.sq_head);
    assert!(rig.poll(1).is_empty());
    assert!(rig.pair().prepare_sleep(&mut ring), "a pause between two attempts");
    rig.pair().wake(&mut ring, 1);
}

#[test]
fn who_cannot_interrupt_stays_awake() {
    let (mut rig, vector, mut ring) = rig_with_vector();
    assert!(rig.read(0, 1));
    rig.commit();
    vector.refuses.store(true, Ordering::Relaxed);
    assert!(rig.pair().prepare_sleep(&mut ring));
    rig.pair().wake(&mut ring, 1);
    rig.pair().interrupts = Interrupts::None;
    assert!(rig.pair().prepare_sleep(&mut ring));
    rig.pair().wake(&mut ring, 1);
    rig.device.serve();
    assert_eq!(rig.tags(0), [1]);
    assert!(!rig.pair().prepare_sleep(&mut ring));
}

#[test]
fn a_shared_vector_is_the_thread_s_business() {
    let (mut rig, _, mut ring) = rig_with_vector();
    rig.pair().interrupts = Interrupts::Thread;
    assert!(rig.read(0, 1));
    rig.commit();
    assert!(!rig.shared.wants_wake());
    assert!(!rig.pair().prepare_sleep(&mut ring));
    assert!(rig.shared.wants_wake());
    rig.pair().wake(&mut ring, 1);
    assert!(!rig.shared.wants_wake());
    rig.device.serve();
    assert!(rig.pair().prepare_sleep(&mut ring), "it looks again");
    rig.pair().wake(&mut ring, 1);
}

#[test]
fn completions_are_acknowledged_before_a_sleep() {
    let (mut rig, _, mut ring) = rig_with_vector();
    assert!(rig.read(0, 1) && rig.read(0, 2));
    rig.commit();
    rig.device.fetch();
    let entry = rig.device.fetched.pop_front().unwrap();
    rig.device.answer(entry);
    assert_eq!(rig.tags(0), [1]);
    let writes = rig.registers.writes.load(Ordering::Relaxed);
    rig.commit();
    assert_eq!(rig.registers.writes.load(Ordering::Relaxed), writes);
    assert!(!rig.pair().prepare_sleep(&mut ring));
    assert_eq!(rig.registers.writes.load(Ordering::Relaxed), writes + 1);
    rig.pair().wake(&mut ring, 1);
}

/// A level stays up while anything is unacknowledged, and a lazy pair acknowledges in batches.
#[test]
fn a_sleeper_beside_a_level_acknowledges_even_when_nothing_is_out() {
    for (interrupts, acknowledged) in [(Interrupts::Thread, 1), (Interrupts::None, 0)] {
        let (mut rig, _, mut ring) = rig_with_vector();
        rig.pair().interrupts = interrupts;
        assert!(rig.read(0, 1));
        rig.commit();
        rig.device.serve();
        assert_eq!(rig.tags(0), [1]);
        rig.commit();
        let writes = rig.registers.writes.load(Ordering::Relaxed);
        assert!(!rig.pair().prepare_sleep(&mut ring), "nothing is out");
        assert_eq!(rig.registers.writes.load(Ordering::Relaxed), writes + acknowledged);
    }
}
