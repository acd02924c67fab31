//! The NVMe driver on controllers in software of every kind passes the suite that all drivers pass.

mod nvme;

use std::sync::Arc;

use nvme::{Rig, SIZE_BYTES, namespace, patient, sleepy};
use ringmill_core::bdev::conformance::Suite;
use ringmill_core::cross::CrossBdev;
use ringmill_core::reactor::ReactorHandle;
use ringmill_core::spec::nvme::{admin, nvm};
use ringmill_drivers::model::{Count, ModelOptions, Sgls, Vectors};
use ringmill_drivers::nvme::NvmeOptions;

/// Every namespace of such a controller passes.
fn passes(model: ModelOptions, options: NvmeOptions) -> Rig {
    let rig = Rig::with(model, vec![namespace(1, 9), namespace(2, 12)], options, &[]);
    for nsid in [1, 2] {
        let bdev = rig.bdev(nsid);
        eprintln!("{:?} {:?}", bdev.info().geometry(), bdev.driver_facts());
        assert_eq!(bdev.info().size_bytes(), SIZE_BYTES);
        Suite::new(bdev).run();
        assert_eq!(rig.model.complaint(), None, "namespace {nsid}");
    }
    let counters = rig.counters();
    assert_eq!((counters.resets, counters.timeouts, counters.stale), (0, 0, 0));
    rig
}

#[test]
fn with_prps_alone() {
    let rig = passes(ModelOptions::default(), patient());
    assert!(rig.model.count(Count::Prp) > 0 && rig.model.count(Count::Sgl) == 0);
    let counters = rig.model.counters();
    assert!(counters.io(nvm::FLUSH) > 0 && counters.io(nvm::DSM) > 0);
    assert!(counters.io(nvm::WRITE_ZEROES) > 0 && rig.model.count(Count::Fua) > 0);
    rig.finish();
}

#[test]
fn with_sgls() {
    for sgls in [Sgls::Bytes, Sgls::Dwords] {
        let rig = passes(ModelOptions { sgls, ..ModelOptions::default() }, patient());
        assert!(rig.model.count(Count::Sgl) > 0 && rig.control.info().sgl);
        rig.finish();
    }
}

#[test]
fn with_small_transfers_and_boundaries() {
    let model = ModelOptions { mdts: 1, ..ModelOptions::default() };
    let mut first = namespace(1, 9);
    first.noiob = 64;
    let rig = Rig::with(model, vec![first], patient(), &[]);
    Suite::new(rig.bdev(1)).run();
    assert_eq!(rig.model.count(Count::BoundaryCrossings), 0);
    assert_eq!(rig.control.info().transfer_bytes_max, 8192);
    rig.finish();
}

#[test]
fn with_queues_of_a_few_entries() {
    for entries in [2, 3, 8] {
        let model = ModelOptions { queue_entries_max: entries, ..ModelOptions::default() };
        let rig = Rig::new(model, patient());
        assert_eq!(u32::from(rig.control.info().queue_entries), entries);
        Suite::new(rig.bdev(1)).run();
        rig.finish();
    }
    let options = NvmeOptions { io_queue_size: 1024, ..patient() };
    let rig = passes(ModelOptions::default(), options);
    assert_eq!(rig.control.info().queue_entries, 1024);
    rig.finish();
}

#[test]
fn with_doorbells_in_memory() {
    let model = ModelOptions { doorbell_buffer: true, ..ModelOptions::default() };
    let rig = passes(model, patient());
    assert!(rig.control.info().shadow_doorbells);
    assert_eq!(rig.model.counters().admin(admin::DOORBELL_BUFFER), 1);
    rig.finish();
    let model = ModelOptions { doorbell_stride: 2, ..ModelOptions::default() };
    passes(model, patient()).finish();
}

#[test]
fn without_a_cache_ranges_and_zeroes() {
    let model = ModelOptions {
        write_cache: false,
        dsm: false,
        write_zeroes: false,
        controller_of_set: false,
        ..ModelOptions::default()
    };
    let rig = Rig::new(model, patient());
    let bdev = rig.bdev(1);
    let geometry = bdev.info().geometry();
    assert!(!geometry.write_cache && !geometry.discard && !geometry.write_zeroes);
    Suite::new(bdev).run();
    let counters = rig.model.counters();
    assert_eq!(counters.io(nvm::FLUSH) + counters.io(nvm::DSM) + counters.io(nvm::WRITE_ZEROES), 0);
    rig.finish();
}

#[test]
fn a_write_protected_namespace_refuses_changes() {
    let mut first = namespace(1, 9);
    first.read_only = true;
    let rig = Rig::with(ModelOptions::default(), vec![first], patient(), &[]);
    let bdev = rig.bdev(1);
    assert!(bdev.info().geometry().read_only);
    Suite::new(bdev).refuses_changes();
    rig.finish();
}

/// Two sleepy reactors own a queue pair each; a tester's thread reaches them through rings.
fn crosses(vectors: Vectors) {
    let owners = vec![sleepy(), sleepy()];
    let model = ModelOptions { vectors, ..ModelOptions::default() };
    let namespaces = vec![namespace(1, 9), namespace(2, 12)];
    let rig = Rig::with(model, namespaces, patient(), &owners);
    assert!(rig.control.owners().is_none(), "every reactor has a pair");
    for nsid in [1, 2] {
        let bdev = CrossBdev::new(rig.bdev(nsid), owners.clone()).unwrap();
        Suite::new(Arc::new(bdev)).run();
    }
    let slept: u64 = owners.iter().map(|owner| owner.stats().sleeps_count).sum();
    assert!(slept > 0, "the reactors never slept");
    if vectors != Vectors::None {
        assert!(rig.model.count(Count::Interrupts) > 0, "{vectors:?}");
    }
    rig.finish();
    owners.iter().for_each(ReactorHandle::stop);
}

#[test]
fn on_reactors_that_sleep_beside_a_vector_each() {
    crosses(Vectors::MsiX(3));
}

#[test]
fn on_reactors_that_sleep_beside_one_vector() {
    crosses(Vectors::Msi);
    crosses(Vectors::MsiX(2));
}

#[test]
fn on_reactors_that_sleep_beside_a_level() {
    crosses(Vectors::Intx);
}

#[test]
fn on_reactors_without_interrupts() {
    crosses(Vectors::None);
}

#[test]
fn fewer_pairs_than_reactors_have_owners() {
    let reactors = vec![sleepy(), sleepy(), sleepy()];
    let model = ModelOptions { io_queues_max: 2, ..ModelOptions::default() };
    let rig = Rig::with(model, vec![namespace(1, 9)], patient(), &reactors);
    let owners = rig.control.owners().expect("owners");
    assert_eq!(owners.len(), 2);
    assert!(owners[0].same(&reactors[0]) && owners[1].same(&reactors[1]));
    assert_eq!(rig.control.info().queue_pairs, 2);
    let inner = rig.bdev(1);
    let words = inner.open_channel(Some(&reactors[2])).err().expect("no pair there").to_string();
    assert!(words.contains("no queue pair"), "{words}");
    Suite::new(Arc::new(CrossBdev::new(inner, owners).unwrap())).run();
    rig.finish();
    reactors.iter().for_each(ReactorHandle::stop);
    let options = NvmeOptions { num_io_queues: 1, ..patient() };
    let rig = Rig::with(ModelOptions::default(), vec![namespace(1, 9)], options, &[]);
    let info = rig.control.info();
    assert_eq!((info.queue_pairs, info.queue_pairs_granted), (1, 1), "as many as it was asked for");
    rig.finish();
}
