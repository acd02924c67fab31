//! What is copied on the way between guest and controller: nothing, unless the controller cannot reach it as it is.

use std::path::Path;
use std::time::Duration;

use ringmill_drivers::model::{ModelOptions, Sgls};
use serde_json::json;

use super::daemon::Daemon;
use super::frontend::{P_CONFIG, P_MEM_SLOTS, P_MQ, P_REPLY_ACK, running};
use super::{Device, end, exercise, serving_on};

/// Pieces that went through bounce buffers since the daemon was started.
fn bounces(daemon: &Daemon) -> u64 {
    let shown = daemon.call("framework_get_reactors", &json!({}));
    let reactors = shown["reactors"].as_array().expect("reactors");
    reactors.iter().map(|reactor| reactor["bounces"].as_u64().expect("a number")).sum()
}

/// Writes from one place in guest memory and reads into another, page by page.
fn between(daemon: &Daemon, socket: &Path, places: [(u64, u64); 3], are_copied: bool) {
    const DATA_GUEST: u64 = 1 << 30;
    let all = P_MQ | P_REPLY_ACK | P_CONFIG | P_MEM_SLOTS;
    let (_front, mut load, data) = running(socket, all, 8, DATA_GUEST);
    for (round, (from, to)) in (0u64..).zip(places) {
        let mut wanted = [0; 4096];
        for (at, byte) in (round..).zip(&mut wanted) {
            *byte = at.wrapping_mul(7).to_le_bytes()[0];
        }
        data.write(0, &[0xee; 4 * 4096 + 512]);
        data.write(from, &wanted);
        let sector = round * 8 + 3;
        let before = bounces(daemon);
        assert_eq!(load.ring.one(&load.memory, true, sector, DATA_GUEST + from), 0);
        let written = bounces(daemon);
        assert_eq!(written > before, are_copied, "a write from {from}: {before} to {written}");
        data.write(0, &[0xee; 4 * 4096 + 512]);
        assert_eq!(load.ring.one(&load.memory, false, sector, DATA_GUEST + to), 0);
        let read = bounces(daemon);
        assert_eq!(read > written, are_copied, "a read into {to}: {written} to {read}");
        assert_eq!(data.read::<4096>(to), wanted, "from {from} to {to}");
        let around = [data.read::<1>(to - 1), data.read::<1>(to + 4096)];
        assert_eq!(around, [[0xee]; 2], "bytes beside a read into {to}");
    }
}

#[test]
fn only_memory_that_the_controller_cannot_reach_is_copied() {
    for sgls in [Sgls::None, Sgls::Bytes] {
        let device = Device::with(ModelOptions { sgls, ..ModelOptions::default() }, &[9]);
        let (daemon, socket) = serving_on("3", &device, &json!({}));
        let mut aligned = exercise(&socket, 2);
        let span = aligned.sectors_count();
        aligned.random_for(Duration::from_millis(600), span, 128, |_| false);
        aligned.drain();
        aligned.verify();
        assert!(aligned.completed_count > 100, "{aligned}");
        assert_eq!(bounces(&daemon), 0, "{sgls:?}: aligned data is copied");
        drop(aligned);
        // PRPs begin at multiples of four bytes (NVMe 2.0 §4.3.1).
        between(&daemon, &socket, [(4, 8196), (4092, 12_284), (508, 8704)], false);
        between(&daemon, &socket, [(1, 8195), (4095, 8193), (510, 12_289)], true);
        end(&device, daemon);
    }
}
