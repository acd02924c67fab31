//! What runs beside a daemon in the guest: clients of its vhost-user sockets, whose memory its devices reach by themselves.

use std::path::Path;
use std::time::{Duration, Instant};

use ringmill_tools::load::{Client, Transfer};

/// Requests in flight.
const DEPTH: usize = 32;

/// Bytes of a buffer.
const SLOT_BYTES: usize = 64 << 10;

/// Without any answer for so long something hangs.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// How long requests of a lost device may take to end.
const LOSS_WAIT_MAX: Duration = Duration::from_secs(5);

/// A disk and what is in flight on it.
struct Port {
    client: Client,
    out: [bool; DEPTH],
    done: Vec<(u32, i32)>,
    heard: Instant,
}

impl Port {
    fn connect() -> Port {
        let socket =
            std::env::var("RINGMILL_SOCKET").expect("RINGMILL_SOCKET names a disk's socket");
        let client = Client::connect(Path::new(&socket), 1, 128, DEPTH, SLOT_BYTES)
            .unwrap_or_else(|error| panic!("{error}"));
        Port { client, out: [false; DEPTH], done: Vec::new(), heard: Instant::now() }
    }

    fn out_count(&self) -> usize {
        self.out.iter().filter(|is_out| **is_out).count()
    }

    fn submit(&mut self, slot: u32, submit: impl FnOnce(&mut Client)) {
        let is_out = &mut self.out[slot as usize];
        assert!(!*is_out, "slot {slot} is in flight");
        *is_out = true;
        submit(&mut self.client);
        self.client.kick(0).expect("a kick");
    }

    /// What ended, each exactly once.
    fn poll(&mut self) -> Vec<(u32, i32)> {
        self.client.completions(0, &mut self.done);
        for (slot, _) in &self.done {
            let is_out = &mut self.out[*slot as usize];
            assert!(*is_out, "a second end of the request in slot {slot}");
            *is_out = false;
        }
        match self.done.is_empty() {
            true => {
                assert!(self.heard.elapsed() < WAIT_MAX, "{} requests hang", self.out_count());
                // The daemon may need this CPU.
                std::thread::yield_now();
            }
            false => self.heard = Instant::now(),
        }
        std::mem::take(&mut self.done)
    }

    /// One request to its end.
    fn call(&mut self, submit: impl FnOnce(&mut Client)) -> i32 {
        self.heard = Instant::now();
        self.submit(0, submit);
        loop {
            if let Some((_, result)) = self.poll().pop() {
                return result;
            }
        }
    }

    /// Transfers of the same length, many at a time; their results in order.
    fn batch(&mut self, transfer: Transfer, offsets: &[u64], len_bytes: usize) -> Vec<i32> {
        assert!(offsets.len() <= DEPTH);
        self.heard = Instant::now();
        for (slot, offset) in (0..).zip(offsets) {
            self.submit(slot, |c| c.submit(0, transfer, *offset, slot, len_bytes).expect("room"));
        }
        let mut results = vec![0; offsets.len()];
        while self.out_count() > 0 {
            for (slot, result) in self.poll() {
                results[slot as usize] = result;
            }
        }
        results
    }
}

/// The word at this place of the disk.
fn word(offset: u64) -> u64 {
    offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Writes, flushes, discards and zeroes, and looks at the outcome.
#[test]
#[ignore = "needs RINGMILL_SOCKET; the disk's data is lost"]
fn ranges() {
    let mut port = Port::connect();
    let base: u64 = 48 << 20;
    let len = SLOT_BYTES as u64;
    let offsets: Vec<u64> = (0..8).map(|index| base + index * len).collect();
    for (slot, offset) in (0..).zip(&offsets) {
        port.client.fill_slot(slot, SLOT_BYTES, |index| word(offset + index * 8));
    }
    assert_eq!(port.batch(Transfer::Write, &offsets, SLOT_BYTES), [0; 8]);
    assert_eq!(port.call(|c| c.submit_flush(0, 0).expect("room")), 0);
    assert_eq!(port.call(|c| c.submit_range(0, base, len, None, 0).expect("room")), 0);
    for (index, unmap) in [(1, false), (2, true)] {
        let at = base + index * len;
        assert_eq!(port.call(|c| c.submit_range(0, at, len, Some(unmap), 0).expect("room")), 0);
    }
    for slot in 0..8 {
        port.client.fill_slot(slot, SLOT_BYTES, |_| 0xaaaa);
    }
    assert_eq!(port.batch(Transfer::Read, &offsets, SLOT_BYTES), [0; 8]);
    // What was discarded may be anything.
    for (slot, offset) in (0..8).zip(&offsets).skip(1) {
        let is_zero = slot < 3;
        let want = |index: u64| if is_zero { 0 } else { word(offset + index * 8) };
        let is_right = (0..)
            .zip(port.client.read_slot(slot, SLOT_BYTES))
            .all(|(index, got)| got == want(index));
        assert!(is_right, "piece {slot} is wrong");
    }
}

/// A checksum of the first `RINGMILL_SPAN` MiB.
#[test]
#[ignore = "needs RINGMILL_SOCKET"]
fn digest() {
    let span_mib: u64 =
        std::env::var("RINGMILL_SPAN").expect("a span").parse().expect("a number of MiB");
    let mut port = Port::connect();
    let mut digest = super::Digest::default();
    let step = SLOT_BYTES as u64;
    let mut at = 0;
    while at < span_mib << 20 {
        let offsets: Vec<u64> = (0..16).map(|index| at + index * step).collect();
        assert_eq!(port.batch(Transfer::Read, &offsets, SLOT_BYTES), [0; 16]);
        (0..16)
            .for_each(|slot| port.client.read_slot(slot, SLOT_BYTES).for_each(|w| digest.add(w)));
        at += 16 * step;
    }
    println!("digest {:016x}", digest.0);
}

/// The disk has one bad sector, at 1 MiB: nothing but the requests that name it fail.
#[test]
#[ignore = "needs RINGMILL_SOCKET; the disk's data is lost"]
fn bad_sector() {
    let mut port = Port::connect();
    let bad: u64 = 1 << 20;
    for transfer in [Transfer::Write, Transfer::Read, Transfer::Read] {
        let mut failed = Vec::new();
        for start in (bad - (256 << 10)..bad + (256 << 10)).step_by(DEPTH * 4096) {
            let offsets: Vec<u64> = (0..DEPTH as u64).map(|index| start + index * 4096).collect();
            let writes = transfer == Transfer::Write;
            for (slot, offset) in (0..).zip(&offsets) {
                let fill = |index| if writes { word(offset + index * 8) } else { 0 };
                port.client.fill_slot(slot, 4096, fill);
            }
            let results = port.batch(transfer, &offsets, 4096);
            for ((slot, offset), result) in (0..).zip(&offsets).zip(results) {
                if result != 0 {
                    failed.push(*offset);
                    continue;
                }
                let data: Vec<u64> = port.client.read_slot(slot, 4096).collect();
                assert!((0..).zip(data).all(|(i, got)| got == word(offset + i * 8)), "{offset:#x}");
            }
        }
        assert_eq!(failed, [bad], "{transfer:?}");
        println!("{transfer:?}: one request failed, at {bad:#x}");
    }
}

/// Reads until the device is lost.
#[test]
#[ignore = "needs RINGMILL_SOCKET, whose device is taken away"]
fn until_lost() {
    let mut port = Port::connect();
    let (mut good_count, mut bad_count, mut next) = (0_u64, 0_u64, 0_u64);
    let mut first: Option<Instant> = None;
    loop {
        for slot in 0..u32::try_from(DEPTH).expect("a few") {
            if first.is_none() && !port.out[slot as usize] {
                let offset = next % (16 << 20);
                next += 4096;
                port.submit(slot, |c| {
                    c.submit(0, Transfer::Read, offset, slot, 4096).expect("room");
                });
            }
        }
        for (_, result) in port.poll() {
            match result {
                0 => good_count += 1,
                _ => {
                    bad_count += 1;
                    first.get_or_insert_with(Instant::now);
                }
            }
        }
        if good_count >= 200 && good_count < 200 + DEPTH as u64 {
            println!("loaded");
        }
        match first {
            Some(_) if port.out_count() == 0 => break,
            Some(first) => assert!(first.elapsed() < LOSS_WAIT_MAX, "{} hang", port.out_count()),
            None => {}
        }
    }
    let took = first.expect("an error").elapsed();
    // From now on everything fails, and at once.
    let later = Instant::now();
    let results = port.batch(Transfer::Read, &[0, 4096, 8192, 12288], 4096);
    assert!(results.iter().all(|result| *result != 0), "{results:?}");
    assert!(later.elapsed() < LOSS_WAIT_MAX);
    println!("lost after {good_count} requests, {bad_count} failed within {took:?}");
}
