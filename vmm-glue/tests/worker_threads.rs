//! A driver and a reactor on two threads that both sleep as often as they can: no kick and no interrupt may be lost.
//!
//! The simulator explores orders of steps on one thread; here two processors meet for real. A pass proves little where
//! the machine is busy; a failure proves a lost wake-up.

mod bench;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::thread;
use std::time::{Duration, Instant};

use bench::{BenchOf, Format, Packed, Setup, Split};
use ringmill_core::reactor::Poller;
use ringmill_core::spec::virtio_blk as spec;
use ringmill_vmm_glue::sim::{Dice, GuestRing};

const LOST_AFTER: Duration = Duration::from_secs(5);
const RUN_FOR: Duration = Duration::from_millis(700);

/// What an eventfd does between two threads. The sleeper spins: system calls would keep the two apart in time.
#[derive(Debug, Default)]
struct Doorbell(AtomicBool);

impl Doorbell {
    fn ring(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// False when nobody rang for a long time.
    fn wait(&self) -> bool {
        let mut started = None;
        for turn in 0u64.. {
            if self.0.swap(false, Ordering::Acquire) {
                return true;
            }
            std::hint::spin_loop();
            // Now and then: let the other thread run where there is one core, and look at the clock.
            if turn % 4096 == 4095 {
                thread::yield_now();
                if started.get_or_insert_with(Instant::now).elapsed() > LOST_AFTER {
                    return false;
                }
            }
        }
        false
    }
}

fn race<F: Format>(event_idx: bool) {
    let setup = Setup { size: 8, record: false, event_idx, ..Setup::default() };
    let mut bench = BenchOf::<F>::new(setup);
    let (header, status) = (bench.header(spec::T_FLUSH, 0), bench.status_byte());
    let BenchOf { mut cx, mut worker, mut ring, memory, .. } = bench;
    let (kick, call) = (Arc::new(Doorbell::default()), Arc::new(Doorbell::default()));
    let stop = Arc::new(AtomicBool::new(false));
    let reactor = {
        let (kick, call, stop) = (Arc::clone(&kick), Arc::clone(&call), Arc::clone(&stop));
        thread::spawn(move || {
            let mut sleeps_count = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let work = worker.poll(&mut cx);
                if worker.take_interrupt() {
                    call.ring();
                }
                if !work && !worker.prepare_sleep(&mut cx) {
                    sleeps_count += 1;
                    assert!(kick.wait(), "no kick for 5 s: lost, or the driver is stuck");
                }
            }
            sleeps_count
        })
    };
    let mut dice = Dice::new(1, 70);
    let started = Instant::now();
    let (mut answered, mut interrupts_count, mut kicks_count) = (0u64, 0u64, 0u64);
    while started.elapsed() < RUN_FOR {
        for _ in 0..dice.pick(&[1, 1, 1, 4]) {
            ring.add(&memory, &mut dice, &[header, status], 2, 0);
        }
        // Meets the device at every moment of its way to sleep.
        (0..dice.below(400)).for_each(|_| std::hint::spin_loop());
        fence(Ordering::SeqCst);
        ring.publish(&memory);
        // The barrier of §2.7.13.4.1, which pairs with the device's.
        fence(Ordering::SeqCst);
        if ring.wants_kick(&memory) {
            kicks_count += 1;
            kick.ring();
        }
        while ring.waiting_max() > 0 {
            let most = usize::from(ring.waiting_max());
            let after = if event_idx { u16::try_from(dice.index(most)) } else { Ok(0) };
            let after = after.expect("small");
            ring.ask_interrupt(&memory, after);
            // The barrier of §2.7.7.1.
            fence(Ordering::SeqCst);
            if ring.used_waiting(&memory) <= after {
                interrupts_count += 1;
                assert!(call.wait(), "no interrupt for 5 s after {answered} answers: it was lost");
            }
            fence(Ordering::SeqCst);
            while ring.take_used(&memory).is_some() {
                answered += 1;
            }
        }
        ring.suppress_interrupts(&memory);
    }
    stop.store(true, Ordering::Relaxed);
    kick.ring();
    let sleeps_count = reactor.join().expect("the reactor's thread");
    assert!(answered > 100 && sleeps_count > 0 && interrupts_count > 0 && kicks_count > 0);
}

#[test]
fn nobody_sleeps_through_a_kick_or_an_interrupt() {
    // One after the other: four spinning threads on a small machine would hardly ever meet.
    for event_idx in [true, false] {
        race::<Split>(event_idx);
        race::<Packed>(event_idx);
    }
}
