//! The NVMe driver over vfio-user: the model behind its server passes the suite, and a server that ends is a device that is
//! gone.

mod nvme;

use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme::{Heard, Rig, namespace, patient, sleepy, until};
use ringmill_core::IoStatus;
use ringmill_core::bdev::conformance::{Suite, TestBed};
use ringmill_core::cross::CrossBdev;
use ringmill_core::io::{IoFlags, IoOp};
use ringmill_core::reactor::ReactorHandle;
use ringmill_drivers::model::{
    Action, Count, Match, ModelOptions, Sgls, Vectors, VfioUserServer, start,
};
use ringmill_drivers::nvme::{ControllerState, attach};
use ringmill_drivers::vfio_user::VfioUserBacking;
use tempfile::TempDir;

struct Shown {
    _dir: TempDir,
    server: VfioUserServer,
    rig: Rig,
}

/// A controller with two namespaces behind a server, attached through a client.
fn show(options: ModelOptions, reactors: &[ReactorHandle]) -> Shown {
    let (backing, model) = start(options, vec![namespace(1, 9), namespace(2, 12)]).unwrap();
    let dir = TempDir::new().unwrap();
    let server = VfioUserServer::start(&dir.path().join("cntrl"), backing).unwrap();
    let backing = VfioUserBacking::connect(dir.path()).unwrap();
    let heard = Heard::default();
    let control = attach(backing, patient(), reactors, heard.listener()).unwrap();
    Shown { _dir: dir, server, rig: Rig { model, control, heard } }
}

#[test]
fn it_passes_the_suite_with_prps_and_with_sgls() {
    for sgls in [Sgls::None, Sgls::Bytes] {
        let shown = show(ModelOptions { sgls, ..ModelOptions::default() }, &[]);
        for nsid in [1, 2] {
            Suite::new(shown.rig.bdev(nsid)).run();
            assert_eq!(shown.rig.model.complaint(), None, "namespace {nsid}");
        }
        assert_eq!(shown.rig.model.count(Count::Sgl) > 0, sgls == Sgls::Bytes);
        let counters = shown.rig.counters();
        assert_eq!((counters.resets, counters.timeouts, counters.stale), (0, 0, 0));
        shown.rig.finish();
    }
}

#[test]
fn it_passes_the_suite_on_reactors_that_sleep() {
    let owners = vec![sleepy(), sleepy()];
    let model = ModelOptions { vectors: Vectors::MsiX(3), ..ModelOptions::default() };
    let shown = show(model, &owners);
    for nsid in [1, 2] {
        let bdev = CrossBdev::new(shown.rig.bdev(nsid), owners.clone()).unwrap();
        Suite::new(Arc::new(bdev)).run();
    }
    assert!(owners.iter().map(|owner| owner.stats().sleeps_count).sum::<u64>() > 0);
    shown.rig.finish();
    owners.iter().for_each(ReactorHandle::stop);
}

#[test]
fn a_server_that_ends_in_mid_load_ends_each_request_once() {
    let mut shown = show(ModelOptions::default(), &[]);
    let mut bed = TestBed::new(&*shown.rig.bdev(1));
    shown.rig.model.rule(Match::any_io(), Action::Swallow);
    let start = Instant::now();
    let mut tags = Vec::new();
    while tags.len() < 16 {
        let segment = bed.segment(tags.len(), 0, 4096);
        let at = tags.len() as u64 * 4096;
        match bed.offer(IoOp::Write, IoFlags::NONE, at, 4096, &[segment]) {
            Some(tag) => tags.push((tag, None)),
            None => _ = bed.turn(|_, status| panic!("{status:?}")),
        }
        assert!(start.elapsed() < Duration::from_secs(20), "no room");
    }
    let model = shown.rig.model.clone();
    until("commands are out", || {
        bed.turn(|_, status| panic!("{status:?}"));
        model.held() == 16
    });
    let start = Instant::now();
    shown.server.stop();
    while tags.iter().any(|(_, end)| end.is_none()) {
        bed.turn(|tag, status| {
            let (_, end) = tags.iter_mut().find(|(t, _)| *t == tag).expect("a known tag");
            assert_eq!(end.replace(status), None, "ended twice");
        });
        assert!(start.elapsed() < Duration::from_secs(10), "{tags:?}");
    }
    assert!(tags.iter().all(|(_, end)| *end == Some(IoStatus::Gone)), "{tags:?}");
    until("the event", || shown.rig.heard.removed().is_some());
    assert_eq!(shown.rig.state(), ControllerState::Removed);
    bed.finish();
    shown.rig.finish();
}
