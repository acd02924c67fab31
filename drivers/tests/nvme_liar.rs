//! The NVMe driver on devices that lie: no panic, no hang, no request lost or answered twice.
//!
//! A few seeds; `cargo xtask fuzz nvme` goes through others for as long as it is told to.

#[path = "nvme/liar.rs"]
mod liar;
mod nvme;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

const SEEDS: u64 = 16;

#[test]
fn liars_are_survived() {
    // The driver's threads' panics are failures, too.
    let panics = Arc::new(AtomicU32::new(0));
    let (seen, before) = (Arc::clone(&panics), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |info| {
        seen.fetch_add(1, Ordering::AcqRel);
        before(info);
    }));
    let (mut attached, mut good) = (0, 0);
    for seed in 0..SEEDS {
        let start = Instant::now();
        let life = liar::meet(seed);
        eprintln!("seed {seed}: {life}, {:?}", start.elapsed());
        attached += life.attached;
        good += life.good;
    }
    // Lies are meant to get past the door.
    assert!(attached * 4 >= SEEDS, "{attached} attached");
    assert!(good > 0);
    assert_eq!(panics.load(Ordering::Acquire), 0, "a thread panicked");
}
