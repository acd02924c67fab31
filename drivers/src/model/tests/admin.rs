//! Admin commands: what is refused with which status, and what events tell.

use ringmill_core::spec::nvme::{
    NSID_ALL, Sqe, admin, cc, cns, csts, event, feature, health, id_ns, log, nvm, reg, status,
};

use super::super::*;
use super::rig::{Pair, Rig, io};
use crate::pci::Registers;

/// Create CQ (`sq` false) or SQ with these fields; the status's kind.
fn create(rig: &mut Rig, opcode: u8, prp: u64, id: u32, size: u32, dword_11: u32) -> u16 {
    let mut sqe = Sqe::new(opcode, 0, 0);
    sqe.set_prps(prp, 0);
    sqe.0[10] = id | (size - 1) << 16;
    sqe.0[11] = dword_11;
    rig.admin(sqe).status().kind()
}

fn delete(rig: &mut Rig, opcode: u8, id: u32) -> u16 {
    let mut sqe = Sqe::new(opcode, 0, 0);
    sqe.0[10] = id;
    rig.admin(sqe).status().kind()
}

#[test]
fn queues_are_checked_field_by_field() {
    let options = ModelOptions {
        queue_entries_max: 64,
        io_queues_max: 4,
        vectors: Vectors::MsiX(3),
        ..ModelOptions::default()
    };
    let mut rig = Rig::new(options);
    rig.enable();
    let at = rig.iova(super::rig::DATA);
    for (opcode, extra) in [(admin::CREATE_CQ, 0), (admin::CREATE_SQ, 1 << 16)] {
        let cases = [
            (at, 0, 8, 1, status::INVALID_QUEUE_ID),
            (at, 5, 8, 1, status::INVALID_QUEUE_ID),
            (at, 1, 1, 1, status::INVALID_QUEUE_SIZE),
            (at, 1, 65, 1, status::INVALID_QUEUE_SIZE),
            (at, 1, 8, 0, status::INVALID_FIELD),
            (at + 64, 1, 8, 1, status::INVALID_PRP_OFFSET),
        ];
        for (prp, id, size, flags, wanted) in cases {
            assert_eq!(create(&mut rig, opcode, prp, id, size, flags | extra), wanted);
        }
    }
    let vector = create(&mut rig, admin::CREATE_CQ, at, 1, 8, 3 | 3 << 16);
    assert_eq!(vector, status::INVALID_VECTOR);
    let no_cq = create(&mut rig, admin::CREATE_SQ, at, 1, 8, 1 | 2 << 16);
    assert_eq!(no_cq, status::COMPLETION_QUEUE_INVALID);
    let admin_cq = create(&mut rig, admin::CREATE_SQ, at, 1, 8, 1);
    assert_eq!(admin_cq, status::COMPLETION_QUEUE_INVALID);
    rig.expect_errors(15);
    assert_eq!(rig.control.count(Count::DmaFaults), 0);
    let unmapped = create(&mut rig, admin::CREATE_CQ, 0x1000, 1, 8, 1);
    assert_eq!(unmapped, status::DATA_TRANSFER_ERROR);
    assert_eq!(rig.control.count(Count::DmaFaults), 1);

    let _pair = rig.pair(1, 64);
    assert_eq!(create(&mut rig, admin::CREATE_CQ, at, 1, 8, 1), status::INVALID_QUEUE_ID);
    assert_eq!(create(&mut rig, admin::CREATE_SQ, at, 1, 8, 1 | 1 << 16), status::INVALID_QUEUE_ID);
    assert_eq!(delete(&mut rig, admin::DELETE_CQ, 1), 0x10c);
    assert_eq!(delete(&mut rig, admin::DELETE_SQ, 2), status::INVALID_QUEUE_ID);
    assert_eq!(delete(&mut rig, admin::DELETE_SQ, 0), status::INVALID_QUEUE_ID);
    rig.expect_errors(20);
    assert_eq!(delete(&mut rig, admin::DELETE_SQ, 1), 0);
    assert_eq!(delete(&mut rig, admin::DELETE_CQ, 1), 0);
    let mut pair = rig.pair(1, 8);
    let sqe = rig.prps(io(nvm::READ, 2, 0, 1), 0, 4096);
    assert!(rig.run(&mut pair, sqe).status().is_success());
    rig.expect_errors(20);
}

#[test]
fn entry_sizes_must_be_set_before_queues_are_made() {
    let mut rig = Rig::new(ModelOptions::default());
    rig.prepare_admin();
    rig.regs.write_u32(reg::CC, cc::EN);
    rig.eventually(|rig| rig.regs.read_u32(reg::CSTS) & csts::RDY != 0);
    let at = rig.iova(super::rig::DATA);
    let cq = create(&mut rig, admin::CREATE_CQ, at, 1, 8, 1);
    assert_eq!(cq, status::INVALID_QUEUE_SIZE);
    rig.expect_errors(1);
}

#[test]
fn queues_are_granted_up_to_a_limit_and_before_any_is_made() {
    let mut rig = Rig::new(ModelOptions { io_queues_max: 8, ..ModelOptions::default() });
    rig.enable();
    let ask =
        |rig: &mut Rig, z: u32| rig.feature(admin::SET_FEATURES, feature::NUMBER_OF_QUEUES, z);
    assert_eq!(ask(&mut rig, 3 | 3 << 16), (0, 3 | 3 << 16));
    assert_eq!(ask(&mut rig, 99 | 99 << 16), (0, 7 | 7 << 16));
    rig.control.set_queues_granted(2);
    assert_eq!(ask(&mut rig, 99 | 99 << 16), (0, 1 | 1 << 16));
    let now = rig.feature(admin::GET_FEATURES, feature::NUMBER_OF_QUEUES, 0);
    assert_eq!(now, (0, 1 | 1 << 16));
    rig.expect_peace();
    assert_eq!(ask(&mut rig, 0xffff).0, status::INVALID_FIELD);
    let at = rig.iova(super::rig::DATA);
    assert_eq!(create(&mut rig, admin::CREATE_CQ, at, 3, 8, 1), status::INVALID_QUEUE_ID);
    let _pair = rig.pair(2, 8);
    assert_eq!(ask(&mut rig, 0).0, 0x00c);
    rig.expect_errors(3);
}

#[test]
fn features_are_words_and_unknown_ones_are_refused() {
    let mut rig = Rig::new(ModelOptions { write_cache: false, ..ModelOptions::default() });
    rig.enable();
    assert_eq!(rig.feature(admin::SET_FEATURES, feature::INTERRUPT_COALESCING, 0x1234).0, 0);
    let now = rig.feature(admin::GET_FEATURES, feature::INTERRUPT_COALESCING, 0);
    assert_eq!(now, (0, 0x1234));
    let unknown = rig.feature(admin::GET_FEATURES, 0x7e, 0);
    assert_eq!(unknown.0, status::INVALID_FIELD);
    let no_cache = rig.feature(admin::GET_FEATURES, feature::WRITE_CACHE, 0);
    assert_eq!(no_cache.0, status::INVALID_FIELD);
    rig.expect_peace();
    let no_cache = rig.feature(admin::SET_FEATURES, feature::WRITE_CACHE, 1);
    assert_eq!(no_cache.0, status::INVALID_FIELD);
    let saved = rig.feature(admin::SET_FEATURES, 1 << 31 | feature::INTERRUPT_COALESCING, 1);
    assert_eq!(saved.0, 0x10d);
    rig.expect_errors(2);
}

#[test]
fn identify_knows_who_is_there() {
    let mut rig = Rig::new(ModelOptions { controller_of_set: false, ..ModelOptions::default() });
    rig.enable();
    assert_eq!(rig.identify(cns::NAMESPACE, 5).unwrap(), vec![0; 4096]);
    assert_eq!(rig.identify(cns::NAMESPACE_DESCRIPTORS, 5), Err(status::INVALID_NAMESPACE));
    assert_eq!(rig.identify(cns::ACTIVE_NAMESPACES, 1).unwrap()[..8], [2, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(rig.identify(cns::CONTROLLER_OF_SET, 0), Err(status::INVALID_FIELD));
    assert_eq!(rig.identify(0x99, 0), Err(status::INVALID_FIELD));
    rig.expect_peace();
    for (of, nsid) in
        [(cns::NAMESPACE, 0), (cns::NAMESPACE, 17), (cns::ACTIVE_NAMESPACES, NSID_ALL)]
    {
        assert_eq!(rig.identify(of, nsid), Err(status::INVALID_NAMESPACE));
    }
    rig.expect_errors(3);
    let options = ModelOptions { write_zeroes_max: 3, dsm_ranges_max: 9, ..Default::default() };
    let mut rig = Rig::new(options);
    rig.enable();
    assert_eq!(rig.identify(cns::CONTROLLER_OF_SET, 0).unwrap()[..4], [0, 3, 0, 9]);
    let unknown = rig.admin(Sqe::new(0x7d, 0, 0)).status().kind();
    assert_eq!(unknown, status::INVALID_OPCODE);
    let not_offered = rig.admin(Sqe::new(admin::DOORBELL_BUFFER, 0, 0)).status().kind();
    assert_eq!(not_offered, status::INVALID_OPCODE);
    rig.expect_peace();
}

#[test]
fn logs_have_what_happened() {
    let mut rig = Rig::new(ModelOptions::default());
    rig.enable();
    let mut pair = rig.pair(3, 8);
    let page = rig.log(log::HEALTH, health::BYTES).unwrap();
    assert_eq!(page[health::TEMPERATURE..health::TEMPERATURE + 2], 310u16.to_le_bytes());
    assert_eq!(page[health::HOST_READS..health::HOST_READS + 8], [0; 8]);
    for _ in 0..3 {
        let sqe = rig.prps(io(nvm::READ, 2, 0, 1), 0, 4096);
        assert!(rig.run(&mut pair, sqe).status().is_success());
    }
    let far = rig.run(&mut pair, io(nvm::READ, 2, 4096, 1));
    assert_eq!(far.status().kind(), status::LBA_OUT_OF_RANGE);
    assert!(far.status().do_not_retry());
    let page = rig.log(log::HEALTH, health::BYTES).unwrap();
    assert_eq!(page[health::HOST_READS], 3);
    assert_eq!(page[health::ERROR_LOG_ENTRIES], 1);
    let page = rig.log(log::ERROR, 64).unwrap();
    assert_eq!((page[0], page[8], page[24]), (1, 3, 2));
    assert_eq!(page[10..12], far.cid().to_le_bytes());
    assert_eq!(page[16..24], 4096u64.to_le_bytes());
    assert_eq!(rig.log(log::FIRMWARE_SLOT, 512).unwrap()[0], 1);
    assert_eq!(rig.log(0x77, 512), Err(status::INVALID_LOG_PAGE));
    rig.expect_peace();
}

/// Sends an event request without waiting.
fn request_event(rig: &mut Rig, admin_pair: &mut Pair, cid: u16) {
    rig.push(admin_pair, Sqe::new(admin::ASYNC_EVENT, cid, 0));
    rig.ring(admin_pair);
}

#[test]
fn namespaces_come_go_and_change_with_one_event_per_log_read() {
    let mut rig = Rig::new(ModelOptions { events_max: 2, ..ModelOptions::default() });
    rig.enable();
    let mut pair = rig.pair(1, 8);
    let on = rig.feature(admin::SET_FEATURES, feature::ASYNC_EVENTS, event::ENABLE_NAMESPACE);
    assert_eq!(on.0, 0);
    rig.with_admin(|rig, pair| {
        request_event(rig, pair, 7);
        request_event(rig, pair, 8);
        request_event(rig, pair, 9);
        let cqe = rig.wait(pair);
        assert_eq!((cqe.cid(), cqe.status().kind()), (9, status::EVENT_LIMIT));
    });
    rig.expect_errors(1);
    rig.control.resize_namespace(2, 8192);
    rig.control.detach_namespace(1);
    let notice = u32::from(event::NOTICE) | u32::from(log::CHANGED_NAMESPACES) << 16;
    rig.with_admin(|rig, pair| {
        let cqe = rig.wait(pair);
        assert_eq!((cqe.cid(), cqe.status().kind(), cqe.0[0]), (7, 0, notice));
        std::thread::sleep(std::time::Duration::from_millis(3));
        assert!(rig.peek(pair).is_none());
    });
    // The second change waits for the log to be read.
    rig.with_admin(|rig, pair| {
        let mut sqe = rig.prps(Sqe::new(admin::GET_LOG_PAGE, 55, NSID_ALL), 0, 4096);
        sqe.0[10] = u32::from(log::CHANGED_NAMESPACES) | 1023 << 16;
        rig.push(pair, sqe);
        rig.ring(pair);
        let cids = [rig.wait(pair).cid(), rig.wait(pair).cid()];
        assert!(cids == [8, 55] || cids == [55, 8], "{cids:?}");
    });
    assert_eq!(rig.bytes(0, 12), [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(rig.identify(cns::ACTIVE_NAMESPACES, 0).unwrap()[..8], [2, 0, 0, 0, 0, 0, 0, 0]);
    let data = rig.identify(cns::NAMESPACE, 2).unwrap();
    assert_eq!(data[id_ns::NSZE..id_ns::NSZE + 8], 8192u64.to_le_bytes());
    let sqe = rig.prps(io(nvm::READ, 2, 8191, 1), 0, 4096);
    assert!(rig.run(&mut pair, sqe).status().is_success());
    let sqe = rig.prps(io(nvm::READ, 1, 0, 1), 0, 512);
    assert_eq!(rig.run(&mut pair, sqe).status().kind(), status::INVALID_NAMESPACE);
    rig.control.attach_namespace(ModelNamespace::new(3, 9, 100, Medium::null()));
    rig.control.protect_namespace(3, true);
    let sqe = rig.prps(io(nvm::WRITE, 3, 0, 1), 0, 512);
    assert_eq!(rig.run(&mut pair, sqe).status().kind(), status::WRITE_PROTECTED);
    assert_eq!(rig.identify(cns::NAMESPACE, 3).unwrap()[id_ns::NSATTR], 1);
    rig.expect_errors(1);
}

#[test]
fn a_health_warning_is_an_event_where_enabled() {
    let mut rig = Rig::new(ModelOptions::default());
    rig.enable();
    rig.control.set_health(1, 300);
    rig.feature(admin::SET_FEATURES, feature::ASYNC_EVENTS, event::ENABLE_HEALTH);
    rig.with_admin(|rig, pair| {
        request_event(rig, pair, 3);
        std::thread::sleep(std::time::Duration::from_millis(3));
        assert!(rig.peek(pair).is_none());
        rig.control.set_health(3, 400);
        let cqe = rig.wait(pair);
        let wanted = u32::from(event::HEALTH) | 1 << 8 | u32::from(log::HEALTH) << 16;
        assert_eq!((cqe.cid(), cqe.0[0]), (3, wanted));
    });
    let page = rig.log(log::HEALTH, health::BYTES).unwrap();
    assert_eq!(page[health::CRITICAL_WARNING], 3);
    assert_eq!(page[health::TEMPERATURE..health::TEMPERATURE + 2], 400u16.to_le_bytes());
    rig.expect_peace();
}

#[test]
fn deleting_a_queue_ends_what_was_out_there() {
    let mut rig = Rig::new(ModelOptions::default());
    rig.enable();
    let mut pair = rig.pair(1, 8);
    rig.control.rule(Match::io(nvm::FLUSH), Action::Swallow);
    rig.push(&mut pair, Sqe::new(nvm::FLUSH, 70, 1));
    rig.push(&mut pair, Sqe::new(nvm::FLUSH, 71, 1));
    rig.ring(&pair);
    rig.eventually(|rig| rig.control.held() == 2);
    assert_eq!(delete(&mut rig, admin::DELETE_SQ, 1), 0);
    for cid in [70, 71] {
        let cqe = rig.wait(&mut pair);
        assert_eq!((cqe.cid(), cqe.status().kind()), (cid, status::ABORTED_SQ_DELETED));
    }
    assert_eq!(delete(&mut rig, admin::DELETE_CQ, 1), 0);
    rig.expect_peace();
}

#[test]
fn doorbells_of_missing_queues_and_impossible_ones_are_seen() {
    let mut rig = Rig::new(ModelOptions::default());
    rig.enable();
    rig.regs.write_u32(reg::DOORBELLS + 8 * 5, 1);
    rig.eventually(|rig| rig.control.count(Count::ProtocolErrors) == 1);
    let mut pair = rig.pair(1, 4);
    // Taken more than was posted, and a place that is not there.
    for (errors, head) in [(2, 1), (3, 4), (4, u32::MAX)] {
        rig.ring_head(&pair, head);
        rig.eventually(|rig| rig.control.count(Count::ProtocolErrors) == errors);
    }
    rig.run(&mut pair, Sqe::new(nvm::FLUSH, 1, 1));
    rig.expect_errors(4);
    rig.ring_value(&pair, 4);
    rig.eventually(|rig| rig.regs.read_u32(reg::CSTS) & csts::CFS != 0);
}

#[test]
fn shadow_doorbells_are_polled_while_busy_and_rung_when_quiet() {
    use std::sync::atomic::{Ordering, fence};
    const SHADOW: usize = super::rig::LISTS + 4096;
    const EVENTS: usize = super::rig::LISTS + 8192;
    let mut rig = Rig::new(ModelOptions { doorbell_buffer: true, ..ModelOptions::default() });
    rig.enable();
    let mut pair = rig.pair(1, 8);
    let mut sqe = Sqe::new(admin::DOORBELL_BUFFER, 0, 0);
    sqe.set_prps(rig.iova(SHADOW), rig.iova(EVENTS));
    // The admin queue's words, as its doorbells are with this command: two others were sent and answered.
    rig.window.store_u32(SHADOW, 3, Ordering::Release);
    rig.window.store_u32(SHADOW + 4, 2, Ordering::Release);
    assert!(rig.admin(sqe).status().is_success());
    assert_eq!(rig.control.complaint(), None);
    let mut rung = 0;
    for round in 0..300u16 {
        let old = pair.tail;
        let mut sqe = rig.prps(io(nvm::READ, 2, 0, 1), 0, 4096);
        sqe.0[0] |= u32::from(round) << 16;
        rig.push(&mut pair, sqe);
        rig.window.store_u32(SHADOW + 8, pair.tail, Ordering::Release);
        fence(Ordering::SeqCst);
        let event = rig.window.load_u32(EVENTS + 8, Ordering::Acquire);
        let passed = |new: u32| (new + 8 - event - 1) % 8 < (new + 8 - old) % 8;
        if passed(pair.tail) {
            rung += 1;
            rig.ring(&pair);
        }
        let start = std::time::Instant::now();
        let cqe = loop {
            if let Some(cqe) = rig.peek(&mut pair) {
                break cqe;
            }
            assert!(start.elapsed().as_secs() < 10, "round {round}, rung {rung}");
        };
        rig.window.store_u32(SHADOW + 12, pair.head, Ordering::Release);
        assert_eq!(cqe.cid(), round);
        if round % 50 == 49 {
            std::thread::sleep(std::time::Duration::from_millis(3));
            let event = rig.window.load_u32(EVENTS + 8, Ordering::Acquire);
            assert_eq!(event, pair.tail, "a quiet queue wants its doorbell");
        }
    }
    assert!(rung >= 5, "{rung}");
    rig.expect_peace();
    // Without the doorbell a quiet queue stays quiet.
    std::thread::sleep(std::time::Duration::from_millis(3));
    let sqe = rig.prps(io(nvm::READ, 2, 0, 1), 0, 4096);
    rig.push(&mut pair, sqe);
    rig.window.store_u32(SHADOW + 8, pair.tail, Ordering::Release);
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert!(rig.peek(&mut pair).is_none());
    rig.ring(&pair);
    assert!(rig.wait(&mut pair).status().is_success());
}
