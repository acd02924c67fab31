//! Rings, CIDs, doorbells.

use std::sync::atomic::Ordering;

use ringmill_core::IoStatus;
use ringmill_core::bdev::Channel;
use ringmill_core::io::{IoFlags, IoOp};
use ringmill_core::limits::NVME_RETRIES_MAX;
use ringmill_core::spec::nvme::{Status, status};

use super::super::shared::{FailReason, Order, Trouble};
use super::rig::{Options, Rig, cid};

const NONE: IoFlags = IoFlags::NONE;

#[test]
fn rings_wrap_and_phases_flip_and_nothing_is_lost_or_doubled() {
    for entries in [2, 3, 4, 7, 64] {
        let mut rig = Rig::new(&Options { entries, ..Options::default() });
        let (mut next, mut ended) = (0, 0);
        let mut chance = ringmill_core::reactor::Entropy::seeded(u64::from(entries));
        while ended < 5000 {
            while chance.below(3) > 0 && rig.read(0, next) {
                next += 1;
            }
            rig.commit();
            rig.device.fetch();
            // In any order.
            while !rig.device.fetched.is_empty() && chance.below(4) > 0 {
                let at = chance.below(rig.device.fetched.len() as u64);
                let entry = rig.device.fetched.remove(usize::try_from(at).unwrap()).unwrap();
                rig.device.answer(entry);
            }
            let mut tags = rig.tags(0);
            tags.sort_unstable();
            ended += tags.len();
            assert!(tags.windows(2).all(|pair| pair[0] < pair[1]));
            assert_eq!(rig.channels[0].inflight(), next as usize - ended);
        }
    }
}

#[test]
fn a_full_queue_takes_no_more_and_a_doorbell_is_rung_once_per_pass() {
    let mut rig = Rig::new(&Options { entries: 16, ..Options::default() });
    let writes = |rig: &Rig| rig.registers.writes.load(Ordering::Relaxed);
    assert_eq!(writes(&rig), 0);
    let taken = (0..40).filter(|tag| rig.read(0, *tag)).count();
    assert_eq!((taken, writes(&rig)), (15, 0));
    rig.commit();
    rig.commit();
    assert_eq!(writes(&rig), 1);
    rig.device.serve();
    assert_eq!(rig.tags(0), (0..15).collect::<Vec<_>>());
    rig.commit();
    assert_eq!(writes(&rig), 2, "completions are acknowledged");
    assert!(rig.read(0, 1));
    rig.commit();
    rig.device.serve();
    assert_eq!(rig.tags(0), [1]);
    rig.commit();
    assert_eq!(writes(&rig), 3, "a single completion can wait");
}

#[test]
fn the_completion_ring_never_fills_up() {
    for entries in [2, 5, 16, 64] {
        let mut rig = Rig::new(&Options { entries, ..Options::default() });
        // Some are acknowledged later; the device panics when it finds no place.
        for few in 1..entries {
            for burst in [few, entries - 1] {
                let taken = (0..burst).filter(|_| rig.read(0, 0)).count();
                assert_eq!(taken, usize::from(burst));
                rig.commit();
                rig.device.serve();
                assert_eq!(rig.poll(0).len(), taken);
            }
        }
    }
}

#[test]
fn a_cid_that_is_not_out_is_not_believed() {
    // Of one that has ended and one that is out.
    type Forge = fn(u16, u16) -> u16;
    // Double, another generation, another slot that is not out, no slot at all, one that is out by another generation.
    let forgeries: [Forge; 6] = [
        |ended, _| ended,
        |ended, _| ended ^ (1 << 10),
        |ended, _| ended ^ 1,
        |_, _| 0xffff,
        |_, _| 63,
        |_, out| out ^ (1 << 15),
    ];
    for (number, forge) in forgeries.into_iter().enumerate() {
        let mut rig = Rig::new(&Options::default());
        assert!(rig.read(0, 1) && rig.read(0, 2) && rig.read(0, 3) && rig.read(0, 4));
        rig.commit();
        rig.device.fetch();
        let first = rig.device.fetched.pop_front().unwrap();
        let second = rig.device.fetched.pop_front().unwrap();
        rig.device.answer(first);
        rig.device.answer(second);
        assert_eq!(rig.tags(0), [1, 2]);
        let forged = forge(cid(&first), cid(&rig.device.fetched[0]));
        rig.device.post(forged, 0, rig.device.sq_head);
        // Nothing that comes behind it counts, either.
        let third = rig.device.fetched.pop_front().unwrap();
        rig.device.answer(third);
        assert!(rig.tags(0).is_empty(), "forgery {number}");
        assert_eq!(rig.shared.trouble(), Some(Trouble::StrangeCid), "forgery {number}");
        assert_eq!(rig.shared.counters().strange, 1);
        assert!(!rig.read(0, 5), "a pair in trouble takes nothing");
        // The reset: what was out is done again, once.
        rig.order(Order::Hold);
        rig.order(Order::Disabled);
        assert_eq!(rig.shared.trouble(), None);
        rig.device.reset();
        rig.order(Order::Run);
        rig.device.serve();
        assert_eq!(rig.tags(0), [3, 4]);
        assert_eq!(rig.shared.counters().requeued, 2);
    }
}

#[test]
fn a_stale_cid_is_stale_for_63_generations() {
    let mut rig = Rig::new(&Options::default());
    assert!(rig.read(0, 1));
    rig.commit();
    rig.device.fetch();
    let first = rig.device.fetched.pop_front().unwrap();
    rig.device.answer(first);
    assert_eq!(rig.tags(0), [1]);
    for round in 0..63 {
        assert!(rig.read(0, round));
        rig.commit();
        rig.device.fetch();
        assert_ne!(cid(&rig.device.fetched[0]), cid(&first));
        assert_eq!(cid(&rig.device.fetched[0]) & 1023, cid(&first) & 1023, "the warm slot");
        rig.device.serve();
        assert_eq!(rig.tags(0), [round]);
    }
}

#[test]
fn a_head_that_is_no_place_of_the_ring_is_not_believed_and_one_that_lags_is() {
    for (out, head, good) in [
        (3, 3, true),
        (3, 4, true),
        (3, 63, true),
        (3, 64, false),
        (3, 0, true),
        (3, 0xffff, false),
    ] {
        let mut rig = Rig::new(&Options::default());
        for tag in 0..out {
            assert!(rig.read(0, tag));
        }
        rig.commit();
        rig.device.fetch();
        let entry = rig.device.fetched.pop_front().unwrap();
        rig.device.post(cid(&entry), 0, head);
        assert_eq!(rig.poll(0).len(), usize::from(good), "head {head}");
        assert_eq!(rig.shared.trouble().is_none(), good, "head {head}");
    }
}

#[test]
fn errors_that_pass_are_tried_again_and_others_are_not() {
    let again = Status(status::NAMESPACE_NOT_READY);
    let mut rig = Rig::new(&Options::default());
    assert!(rig.read(0, 9));
    let mut seen = Vec::new();
    for attempt in 0..=NVME_RETRIES_MAX {
        rig.commit();
        rig.device.fetch();
        let entry = rig.device.fetched.pop_front().expect("an attempt");
        assert!(!seen.contains(&cid(&entry)));
        seen.push(cid(&entry));
        rig.device.post(cid(&entry), again.0, rig.device.sq_head);
        let done = rig.poll(0);
        if attempt == NVME_RETRIES_MAX {
            assert_eq!(done[0].status, IoStatus::Medium);
            break;
        }
        assert!(done.is_empty());
        rig.commit();
        rig.device.fetch();
        assert!(rig.device.fetched.is_empty(), "not at once");
        rig.later(10_000_000 << (2 * u32::from(attempt)));
    }
    rig.later(1_000_000_000);
    let counters = rig.shared.counters();
    assert_eq!((counters.retried, counters.errors, counters.commands), (4, 5, 5));
    for kind in [status::UNRECOVERED_READ, again.0 | Status::DO_NOT_RETRY] {
        assert!(rig.read(0, 1));
        rig.commit();
        rig.device.fetch();
        let entry = rig.device.fetched.pop_front().unwrap();
        rig.device.post(cid(&entry), kind, rig.device.sq_head);
        assert_eq!(rig.poll(0)[0].status, IoStatus::Medium);
    }
    assert!(rig.pair().is_idle());
}

#[test]
fn a_retry_that_succeeds_brings_the_data() {
    let mut rig = Rig::new(&Options { transfer_bytes_max: 1 << 20, ..Options::default() });
    let list = [rig.segment(0, 64 << 10)];
    assert!(rig.offer(0, 1, (IoOp::Read, NONE), (1 << 20, 64 << 10), &list));
    rig.commit();
    rig.device.fetch();
    let entry = rig.device.fetched.pop_front().unwrap();
    rig.device.post(cid(&entry), status::INTERNAL_ERROR, rig.device.sq_head);
    assert!(rig.poll(0).is_empty());
    rig.later(20_000_000);
    rig.device.serve();
    assert_eq!(rig.tags(0), [1]);
    let mut bytes = vec![0; 64 << 10];
    list[0].read_into(&mut bytes);
    assert_eq!(bytes, rig.device.disk[1 << 20..][..64 << 10]);
}

#[test]
fn doorbells_in_memory_spare_register_writes() {
    let mut rig = Rig::new(&Options { shadow: true, entries: 8, ..Options::default() });
    let writes = |rig: &Rig| rig.registers.writes.load(Ordering::Relaxed);
    let mut tail = 0;
    for round in 0..100 {
        let before = writes(&rig);
        // Every third round the device says that it sleeps from here on.
        let sleeps = round % 3 == 0;
        rig.device.set_event_index(if sleeps { tail } else { (tail + 4) % 8 });
        assert!(rig.read(0, round) && rig.read(0, round + 1000));
        rig.commit();
        tail = (tail + 2) % 8;
        let cq = writes(&rig) - before;
        assert!(if sleeps { cq >= 1 } else { cq <= 1 }, "round {round}: {cq}");
        rig.device.serve();
        assert_eq!(rig.tags(0), [round, round + 1000]);
    }
    // Rung for the submissions of every third round, and for completions, whose index stays at 0, now and then.
    assert!(writes(&rig) < 34 + 60, "{}", writes(&rig));
}

#[test]
fn flushes_and_fua_need_a_volatile_cache() {
    for write_cache in [false, true] {
        let mut rig = Rig::new(&Options { write_cache, ..Options::default() });
        let page = [rig.segment(0, 4096)];
        assert!(rig.offer(0, 1, (IoOp::Flush, NONE), (0, 0), &[]));
        assert!(rig.offer(0, 2, (IoOp::Write, IoFlags::FUA), (0, 4096), &page));
        assert!(rig.offer(0, 3, (IoOp::Write, NONE), (0, 4096), &page));
        assert!(rig.offer(0, 4, (IoOp::Read, IoFlags::FUA), (0, 4096), &page));
        assert_eq!(rig.channels[0].must_poll(), !write_cache);
        rig.commit();
        rig.device.serve();
        let mut tags = rig.tags(0);
        tags.sort_unstable();
        assert_eq!(tags, [1, 2, 3, 4]);
        let fua = if write_cache { 1 << 30 } else { 0 };
        let mut wanted = vec![(1, 0, 8, fua | 7), (1, 0, 8, 7), (2, 0, 8, 7)];
        if write_cache {
            wanted.insert(0, (0, 0, 1, 0));
        }
        assert_eq!(rig.device.log, wanted);
    }
}

#[test]
fn zeroes_are_deallocated_only_when_both_sides_say_so() {
    for deallocate in [false, true] {
        let options = Options::default();
        let write_zeroes =
            options.write_zeroes.map(|l| super::super::WriteZeroesLimits { deallocate, ..l });
        let mut rig = Rig::new(&Options { write_zeroes, ..options });
        assert!(rig.offer(0, 1, (IoOp::WriteZeroes, NONE), (512, 1024), &[]));
        let both = IoFlags::MAY_UNMAP.with(IoFlags::FUA);
        assert!(rig.offer(0, 2, (IoOp::WriteZeroes, both), (512, 1024), &[]));
        rig.commit();
        rig.device.serve();
        assert_eq!(rig.tags(0), [1, 2]);
        let deac = if deallocate { 1 << 25 } else { 0 };
        assert_eq!(rig.device.log, [(8, 1, 2, 1), (8, 1, 2, 1 | 1 << 30 | deac)]);
    }
}

#[test]
fn what_the_device_cannot_do_says_so() {
    let mut rig = Rig::new(&Options { discard: None, write_zeroes: None, ..Options::default() });
    for (tag, op) in [(1, IoOp::Discard), (2, IoOp::WriteZeroes)] {
        assert!(rig.offer(0, tag, (op, NONE), (0, 4096), &[]));
        let done = rig.poll(0);
        assert_eq!((done[0].tag.0, done[0].status), (tag, IoStatus::Unsupported));
    }
    assert!(rig.pair().is_idle());
}

#[test]
fn without_a_pair_everything_is_gone() {
    let mut rig = Rig::new(&Options::default());
    assert!(rig.pair().is_idle());
    let key = ringmill_core::reactor::DeviceKey(1);
    drop(rig.cx.io.devices.remove(key).unwrap());
    assert!(rig.read(0, 5));
    assert_eq!(rig.poll(0)[0].status, IoStatus::Gone);
    let mut rig = Rig::new(&Options::default());
    rig.order(Order::Fail(FailReason::Gone));
    assert!(rig.read(0, 5));
    assert_eq!(rig.poll(0)[0].status, IoStatus::Gone);
}
