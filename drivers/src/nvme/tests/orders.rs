//! Hold, Disabled, Run, Fail; deadlines and their CIDs.

use std::sync::Arc;

use ringmill_core::IoStatus;
use ringmill_core::bdev::Channel as _;
use ringmill_core::io::{IoFlags, IoOp};
use ringmill_core::limits::NVME_RETRIES_MAX;
use ringmill_core::reactor::DeviceKey;
use ringmill_core::spec::nvme::status;

use super::super::shared::{FailReason, Order, Overdue};
use super::rig::{Options, Rig, cid};

const SECOND_NS: u64 = 1_000_000_000;

#[test]
fn a_held_pair_sends_nothing_and_still_listens() {
    let mut rig = Rig::new(&Options::default());
    assert!(rig.read(0, 1) && rig.read(0, 2));
    rig.commit();
    rig.device.fetch();
    assert!(rig.read(0, 3));
    // Written, and not shown before the order comes.
    rig.order(Order::Hold);
    assert!(!rig.read(0, 4));
    rig.device.serve();
    assert_eq!(rig.device.sq_head, 2);
    assert_eq!(rig.tags(0), [1, 2]);
    rig.order(Order::Run);
    rig.device.serve();
    assert_eq!(rig.tags(0), [3]);
    assert!(rig.read(0, 4));
}

#[test]
fn a_reset_does_again_what_had_no_answer() {
    let mut rig = Rig::new(&Options { entries: 16, ..Options::default() });
    for tag in 0..10 {
        assert!(rig.read(0, tag));
    }
    rig.commit();
    rig.device.fetch();
    // Three are answered and not seen yet, the others are lost.
    for _ in 0..3 {
        let entry = rig.device.fetched.pop_front().unwrap();
        rig.device.answer(entry);
    }
    rig.order(Order::Hold);
    rig.order(Order::Disabled);
    assert_eq!(rig.tags(0), [0, 1, 2], "seen in the last look");
    rig.device.reset();
    rig.commit();
    assert!(!rig.read(0, 77) && rig.tags(0).is_empty());
    rig.order(Order::Run);
    rig.device.serve();
    let mut tags = rig.tags(0);
    tags.sort_unstable();
    assert_eq!(tags, (3..10).collect::<Vec<_>>());
    assert!(rig.pair().is_idle());
    // The rings are usable from their beginning on.
    for round in 0..100 {
        assert!(rig.read(0, round));
        rig.commit();
        rig.device.serve();
        assert_eq!(rig.tags(0), [round]);
    }
    assert_eq!(rig.shared.counters().requeued, 7);
}

#[test]
fn two_resets_in_a_row_do_it_again_once() {
    let mut rig = Rig::new(&Options::default());
    assert!(rig.read(0, 1) && rig.read(0, 2));
    rig.commit();
    for _ in 0..3 {
        rig.order(Order::Disabled);
    }
    rig.device.reset();
    rig.order(Order::Run);
    rig.device.fetch();
    assert_eq!(rig.device.fetched.len(), 2);
    rig.device.serve();
    assert_eq!(rig.tags(0), [1, 2]);
    assert!(rig.pair().is_idle() && rig.shared.trouble().is_none());
}

#[test]
fn nobody_is_reset_for_ever() {
    let mut rig = Rig::new(&Options::default());
    assert!(rig.read(0, 1));
    for round in 0..=NVME_RETRIES_MAX {
        rig.commit();
        rig.device.fetch();
        assert_eq!(rig.device.fetched.len(), 1, "round {round}");
        assert!(rig.poll(0).is_empty());
        rig.order(Order::Disabled);
        rig.device.reset();
        rig.order(Order::Run);
    }
    assert_eq!(rig.poll(0)[0].status, IoStatus::Reset);
    assert!(rig.pair().is_idle());
}

#[test]
fn a_failed_pair_ends_everything_once() {
    for (reason, status) in [
        (FailReason::Gone, IoStatus::Gone),
        (FailReason::Reset, IoStatus::Reset),
        (FailReason::Timeout, IoStatus::Timeout),
    ] {
        let mut rig = Rig::new(&Options { entries: 16, ..Options::default() });
        assert!(rig.read(0, 1) && rig.read(0, 2));
        rig.commit();
        rig.device.fetch();
        // One waits for another attempt, one is out, one was never shown, one is a job.
        let entry = rig.device.fetched.pop_front().unwrap();
        rig.device.post(cid(&entry), status::INTERNAL_ERROR, rig.device.sq_head);
        assert!(rig.poll(0).is_empty());
        assert!(rig.read(0, 3));
        let long = [rig.segment(0, 4 << 20)];
        assert!(rig.offer(0, 4, (IoOp::Read, IoFlags::NONE), (0, 4 << 20), &long));
        rig.order(Order::Fail(reason));
        let mut ended: Vec<_> = (0..3).flat_map(|_| rig.poll(0)).collect();
        assert!(ended.iter().all(|end| end.status == status), "{ended:?}");
        ended.sort_unstable_by_key(|end| end.tag.0);
        assert_eq!(ended.iter().map(|end| end.tag.0).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert!(rig.pair().is_idle());
        assert!(rig.read(0, 5));
        assert_eq!(rig.poll(0)[0].status, status);
        // It may come back.
        rig.device.reset();
        rig.order(Order::Run);
        assert!(rig.read(0, 6));
        rig.commit();
        rig.device.serve();
        assert_eq!(rig.tags(0), [6]);
    }
}

#[test]
fn a_late_command_is_reported_once_until_it_is_settled() {
    let mut rig = Rig::new(&Options { timeout_ns: SECOND_NS, ..Options::default() });
    for tag in 0..3 {
        assert!(rig.read(0, tag));
    }
    rig.commit();
    rig.device.fetch();
    for _ in 0..9 {
        assert_eq!(rig.shared.overdue(), None);
        rig.later(SECOND_NS / 10);
    }
    for _ in 0..3 {
        rig.later(SECOND_NS / 10);
    }
    let first = rig.shared.overdue().expect("a report");
    assert!(!first.ended && rig.device.fetched.iter().any(|entry| cid(entry) == first.cid));
    rig.later(20 * SECOND_NS);
    assert_eq!(rig.shared.overdue(), Some(first), "one at a time");
    rig.shared.settle(first.sequence);
    for _ in 0..2 {
        rig.later(SECOND_NS);
    }
    let second = rig.shared.overdue().expect("the next");
    assert_ne!((second.cid, second.sequence), (first.cid, first.sequence));
    // All come after all.
    rig.device.serve();
    assert_eq!(rig.tags(0), [0, 1, 2]);
    assert_eq!(rig.shared.overdue(), Some(Overdue { ended: true, ..second }));
    rig.later(SECOND_NS);
    assert_eq!(rig.shared.counters().overdue, 2);
    rig.shared.settle(second.sequence);
    rig.later(SECOND_NS);
    assert!(rig.pair().is_idle() && rig.shared.overdue().is_none());
}

#[test]
fn a_reported_slot_is_not_used_again_before_it_is_settled() {
    let mut rig = Rig::new(&Options { timeout_ns: SECOND_NS, entries: 4, ..Options::default() });
    assert!(rig.read(0, 1));
    rig.commit();
    rig.later(2 * SECOND_NS);
    let report = rig.shared.overdue().expect("a report");
    rig.device.serve();
    assert_eq!(rig.tags(0), [1]);
    for round in 0..200 {
        assert!(rig.read(0, round));
        rig.commit();
        rig.device.fetch();
        assert_ne!(cid(&rig.device.fetched[0]) & 1023, report.cid & 1023);
        rig.device.serve();
        assert_eq!(rig.tags(0), [round]);
    }
    assert_eq!((0..4).filter(|tag| rig.read(0, *tag)).count(), 2, "three slots but one");
    rig.commit();
    rig.device.serve();
    assert_eq!(rig.tags(0), [0, 1]);
    rig.shared.settle(report.sequence);
    rig.later(SECOND_NS);
    assert_eq!((0..4).filter(|tag| rig.read(0, *tag)).count(), 3);
}

#[test]
fn an_aborted_command_is_sent_again_under_another_cid() {
    let mut rig = Rig::new(&Options { timeout_ns: SECOND_NS, ..Options::default() });
    assert!(rig.read(0, 1));
    rig.commit();
    rig.device.fetch();
    rig.later(2 * SECOND_NS);
    let report = rig.shared.overdue().expect("a report");
    rig.device.post(report.cid, status::ABORTED, rig.device.sq_head);
    rig.device.fetched.clear();
    assert!(rig.poll(0).is_empty());
    assert_eq!(rig.shared.overdue(), Some(Overdue { ended: true, ..report }));
    rig.shared.settle(report.sequence);
    rig.later(SECOND_NS);
    rig.device.fetch();
    assert_ne!(cid(&rig.device.fetched[0]), report.cid);
    rig.device.serve();
    assert_eq!(rig.tags(0), [1]);
    rig.later(SECOND_NS / 2);
    assert!(rig.pair().is_idle());
}

#[test]
fn a_reset_ends_a_report() {
    let mut rig = Rig::new(&Options { timeout_ns: SECOND_NS, entries: 4, ..Options::default() });
    assert!(rig.read(0, 1));
    rig.commit();
    rig.later(2 * SECOND_NS);
    let report = rig.shared.overdue().expect("a report");
    rig.order(Order::Hold);
    rig.order(Order::Disabled);
    assert_eq!(rig.shared.overdue(), Some(Overdue { ended: true, ..report }));
    rig.device.reset();
    rig.order(Order::Run);
    // Not settled, and late once more: another report.
    rig.later(SECOND_NS / 2);
    for _ in 0..9 {
        rig.later(SECOND_NS / 8);
    }
    let next = rig.shared.overdue().expect("another report");
    assert!(!next.ended && next.sequence != report.sequence);
    rig.device.serve();
    assert_eq!(rig.tags(0), [1]);
    rig.shared.settle(next.sequence);
    rig.later(SECOND_NS);
    assert!(rig.pair().is_idle());
    assert_eq!((0..4).filter(|tag| rig.read(0, *tag)).count(), 3, "no slot is lost");
}

#[test]
fn a_pair_with_a_channel_is_in_use_and_a_channel_without_its_pair_ends_what_it_has() {
    let mut rig = Rig::new(&Options { transfer_bytes_max: 4096, ..Options::default() });
    assert!(rig.pair().is_idle() && !rig.pair().is_unused());
    // A job whose parts have all ended but one that was not sent: nothing of it is in the pair.
    let pages = [rig.segment(0, 1 << 20)];
    assert!(rig.offer(0, 5, (IoOp::Read, IoFlags::NONE), (0, 1 << 20), &pages));
    rig.commit();
    rig.order(Order::Hold);
    rig.device.serve();
    assert!(rig.tags(0).is_empty() && rig.pair().is_idle() && !rig.pair().is_unused());
    assert!(rig.cx.io.devices.remove(DeviceKey(1)).is_some());
    let done = rig.poll(0);
    assert_eq!(
        done.iter().map(|end| (end.tag.0, end.status)).collect::<Vec<_>>(),
        [(5, IoStatus::Gone)]
    );
    assert_eq!(rig.channels[0].inflight(), 0);

    let mut rig = Rig::new(&Options::default());
    rig.channels[0].close(&mut rig.cx.io);
    assert!(rig.pair().is_unused());
}

#[test]
fn nothing_is_sent_to_a_namespace_that_was_fenced_meanwhile() {
    let mut rig = Rig::new(&Options { transfer_bytes_max: 4096, ..Options::default() });
    assert!(rig.read(0, 1));
    let pages = [rig.segment(0, 1 << 20)];
    assert!(rig.offer(0, 2, (IoOp::Read, IoFlags::NONE), (0, 1 << 20), &pages));
    rig.commit();
    rig.device.fetch();
    rig.order(Order::Hold);
    rig.order(Order::Disabled);
    rig.device.reset();
    let sent = rig.pair().tally.commands;
    let info = Arc::clone(&rig.channels[0].info);
    info.fence();
    info.set_blocks(7);
    assert_eq!(info.blocks_count(), 0, "for good");
    rig.order(Order::Run);
    let mut ends = Vec::new();
    for _ in 0..100 {
        rig.commit();
        ends.extend(rig.poll(0).iter().map(|end| (end.tag.0, end.status)));
    }
    assert_eq!(ends, [(1, IoStatus::Gone), (2, IoStatus::Gone)]);
    assert!(rig.read(0, 3), "taken, to be refused");
    let done = rig.poll(0);
    assert_eq!(done.iter().map(|end| end.status).collect::<Vec<_>>(), [IoStatus::Gone]);
    assert_eq!(rig.pair().tally.commands, sent, "nothing more went out");
    assert!(rig.pair().is_idle() && rig.channels[0].inflight() == 0);
}
