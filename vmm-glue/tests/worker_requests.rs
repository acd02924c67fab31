//! What a queue worker does with well-formed requests: answers, order, figures.

mod bench;

use bench::{Bench, SECTORS_COUNT, SERIAL, Setup};
use ringmill_core::io::{IoFlags, IoOp};
use ringmill_core::spec::virtio_blk as spec;
use ringmill_core::stats::Stage;
use ringmill_core::status::IoStatus;
use ringmill_vmm_glue::blk::{QueueState, WorkerControl};
use ringmill_vmm_glue::sim::GuestRing;

#[test]
fn get_id_behind_other_requests_of_a_batch_is_answered() {
    // The batch's segments were forgotten before GET_ID indexed them.
    for takes_max in [usize::MAX, 1] {
        let mut bench = Bench::new(Setup { takes_max, ..Setup::default() });
        let mut statuses = Vec::new();
        for _ in 0..3 {
            let (header, data) = (bench.header(spec::T_IN, 0), bench.buffer(4096, true));
            let status = bench.status_byte();
            bench.offer(&[header, data, status]);
            statuses.push(status);
            let (header, id) = (bench.header(spec::T_GET_ID, 0), bench.buffer(20, true));
            let status = bench.status_byte();
            bench.offer(&[header, id, status]);
            statuses.push(status);
            while bench.pass() {}
            let mut serial = [0xff; 20];
            bench.memory.read(id.addr, &mut serial);
            assert_eq!(&serial[..SERIAL.len()], SERIAL.as_bytes());
            assert!(serial[SERIAL.len()..].iter().all(|&b| b == 0));
        }
        for status in statuses {
            let mut byte = [0xff];
            bench.memory.read(status.addr, &mut byte);
            assert_eq!(byte, [spec::S_OK]);
        }
        assert_eq!(bench.ring.used_waiting(&bench.memory), 6);
    }
}

#[test]
fn a_short_id_buffer_gets_as_much_as_fits() {
    let mut bench = Bench::new(Setup::default());
    let (header, id) = (bench.header(spec::T_GET_ID, 0), bench.buffer(3, true));
    let status = bench.status_byte();
    assert_eq!(bench.ask(&[header, id, status]), Some((spec::S_OK, 4)));
    let mut serial = [0; 4];
    bench.memory.read(id.addr, &mut serial);
    assert_eq!(&serial, b"ben\0");
}

#[test]
fn the_channel_gets_offset_length_and_flags() {
    let mut bench = Bench::new(Setup::default());
    let (header, data) = (bench.header(spec::T_OUT, 16), bench.buffer(1024, false));
    let status = bench.status_byte();
    assert_eq!(bench.ask(&[header, data, status]), Some((spec::S_OK, 1)));
    bench.device.set_write_back(false);
    assert_eq!(bench.ask(&[header, data, status]), Some((spec::S_OK, 1)));
    let range = bench.range(8, 16, spec::RANGE_F_UNMAP);
    let header = bench.header(spec::T_WRITE_ZEROES, 0);
    assert_eq!(bench.ask(&[header, range, status]), Some((spec::S_OK, 1)));
    let header = bench.header(spec::T_FLUSH, 0);
    assert_eq!(bench.ask(&[header, status]), Some((spec::S_OK, 1)));
    let seen = bench.seen.lock().unwrap().clone();
    let list: Vec<_> = seen.iter().map(|r| (r.op, r.offset_bytes, r.len_bytes, r.flags)).collect();
    let both = IoFlags::FUA.with(IoFlags::MAY_UNMAP);
    assert_eq!(
        list,
        [
            (IoOp::Write, 8192, 1024, IoFlags::NONE),
            (IoOp::Write, 8192, 1024, IoFlags::FUA),
            (IoOp::WriteZeroes, 4096, 8192, both),
            (IoOp::Flush, 0, 0, IoFlags::NONE),
        ]
    );
}

#[test]
fn figures_add_up() {
    let mut bench = Bench::new(Setup { takes_max: 3, ..Setup::default() });
    for round in 0..20u64 {
        for at in 0..5 {
            let (header, data) = (bench.header(spec::T_IN, 8 * at), bench.buffer(4096, true));
            let status = bench.status_byte();
            bench.offer(&[header, data, status]);
        }
        // One beyond the end of the disk.
        let (header, data) = (bench.header(spec::T_IN, SECTORS_COUNT), bench.buffer(512, true));
        let status = bench.status_byte();
        bench.offer(&[header, data, status]);
        while bench.pass() {}
        while bench.ring.take_used(&bench.memory).is_some() {}
        let (avail, used) = bench.status.indices();
        assert_eq!((avail, used), (bench.worker.base(), bench.worker.base()));
        assert_eq!(u64::from(avail), 6 * (round + 1));
        if round % 4 == 3 {
            bench = restart_buffers(bench);
        }
    }
    let reads = bench.status.stats.op(IoOp::Read);
    assert_eq!((reads.ops_count(), reads.errors_count()), (120, 20));
    assert_eq!(reads.bytes(), 100 * 4096);
    assert_eq!(bench.status.inflight_count(), 0);
    let count = |stage| reads.stage(stage).snapshot().count();
    assert_eq!(count(Stage::Queue), 100);
    assert_eq!(count(Stage::Device), 100);
    assert_eq!(count(Stage::Complete), 100);
    assert_eq!(count(Stage::Total), 120);
}

/// The bench hands out memory without end: go on from the start.
fn restart_buffers(mut bench: Bench) -> Bench {
    bench.reuse_buffers();
    bench
}

#[test]
fn a_device_error_reaches_the_guest_as_one() {
    for (status, expected) in [
        (IoStatus::Medium, spec::S_IOERR),
        (IoStatus::Gone, spec::S_IOERR),
        (IoStatus::Unsupported, spec::S_UNSUPP),
    ] {
        let mut bench = Bench::new(Setup { status, ..Setup::default() });
        let (header, data) = (bench.header(spec::T_IN, 0), bench.buffer(512, true));
        let byte = bench.status_byte();
        assert_eq!(bench.ask(&[header, data, byte]), Some((expected, 513)));
        assert_eq!(bench.status.stats.op(IoOp::Read).errors_count(), 1);
    }
}

#[test]
fn a_quiesced_queue_takes_nothing_until_it_is_resumed() {
    use std::sync::Arc;

    use ringmill_core::reactor::Poller;

    let mut bench = Bench::new(Setup::default());
    let count = Arc::new(bench::Counter::default());
    let told = Arc::clone(&count);
    bench.worker.quiesce(&mut bench.cx, Box::new(move || told.bump()));
    assert_eq!(count.get(), 1);
    let (header, data) = (bench.header(spec::T_IN, 0), bench.buffer(512, true));
    let status = bench.status_byte();
    let head = bench.offer(&[header, data, status]);
    assert_eq!(bench.answer(head, &[header, data, status]), None);
    assert!(bench.worker.resume(&mut bench.cx, None).is_none());
    assert_eq!(bench.answer(head, &[header, data, status]), Some((spec::S_OK, 513)));
}

#[test]
fn a_queue_without_notifications_stops_instead_of_hanging_its_guest() {
    use ringmill_core::limits::RING_CLIENTS_MAX;
    use ringmill_core::reactor::{Poller, ReactorCx, Ring};

    for clients_count in [0, RING_CLIENTS_MAX] {
        let mut bench = Bench::new(Setup::default());
        let mut ring = Ring::new(&[]).expect("io_uring");
        ring.enable().expect("the ring is ours");
        for _ in 0..clients_count {
            ring.add_client(0).expect("a client");
        }
        let mut cx = ReactorCx::new(Some(ring)).expect("memory");
        bench.worker.detach(&mut bench.cx);
        bench.worker.attach(&mut cx);
        let full = clients_count == RING_CLIENTS_MAX;
        let stopped = bench.status.state() == QueueState::Broken;
        assert_eq!(stopped, full, "{clients_count} clients");
        assert!(!bench.worker.prepare_sleep(&mut cx));
        bench.worker.detach(&mut cx);
    }
}
