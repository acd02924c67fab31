//! Faults on demand, each once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ringmill_core::mem::{DmaError, DmaMap, Mapping};
use ringmill_core::spec::nvme::{Sqe, Status, admin, csts, nvm, reg, status};

use super::super::*;
use super::rig::{Pair, Rig, io};
use crate::pci::{PciBacking, PciError, Registers};

fn rig() -> (Rig, Pair) {
    let mut rig = Rig::new(ModelOptions::default());
    rig.enable();
    let pair = rig.pair(1, 16);
    (rig, pair)
}

fn read(rig: &Rig, cid: u16, lba: u64) -> Sqe {
    let mut sqe = rig.prps(io(nvm::READ, 1, lba, 1), 0, 512);
    sqe.0[0] |= u32::from(cid) << 16;
    sqe
}

fn start_read(rig: &mut Rig, pair: &mut Pair, cid: u16) {
    let sqe = read(rig, cid, 0);
    rig.push(pair, sqe);
    rig.ring(pair);
    let seen = u64::from(cid);
    rig.eventually(|rig| rig.control.counters().io(nvm::READ) >= seen);
}

fn abort(rig: &mut Rig, queue: u16, cid: u16) -> u32 {
    let mut sqe = Sqe::new(admin::ABORT, 0, 0);
    sqe.0[10] = u32::from(queue) | u32::from(cid) << 16;
    let cqe = rig.admin(sqe);
    assert!(cqe.status().is_success());
    cqe.0[0]
}

#[test]
fn a_rule_is_for_some_commands_and_for_so_many() {
    let (mut rig, mut pair) = rig();
    let bad = Status::new(2, 0x81);
    rig.control.rule(Match::io(nvm::READ).on(10..12).after(1).times(2), Action::Status(bad));
    let mut kinds = Vec::new();
    for lba in [9, 10, 11, 10, 12, 10, 10] {
        let sqe = rig.prps(io(nvm::READ, 1, lba, 1), 0, 512);
        kinds.push(rig.run(&mut pair, sqe).status().kind());
    }
    let e = status::UNRECOVERED_READ;
    assert_eq!(kinds, [0, 0, e, e, 0, 0, 0]);
    assert_eq!(rig.control.count(Count::Faults), 2);
    rig.control.rule(Match::io(nvm::READ).of(2), Action::Status(bad));
    let sqe = rig.prps(io(nvm::READ, 1, 0, 1), 0, 512);
    assert!(rig.run(&mut pair, sqe).status().is_success());
    let sqe = rig.prps(io(nvm::READ, 2, 0, 1), 0, 4096);
    assert_eq!(rig.run(&mut pair, sqe).status().kind(), e);
    rig.control.clear_rules();
    rig.control.rule(Match::admin(admin::IDENTIFY).once(), Action::Status(Status::new(0, 6)));
    assert_eq!(rig.identify(1, 0), Err(status::INTERNAL_ERROR));
    assert!(rig.identify(1, 0).is_ok());
    // Executed, and called failed.
    rig.fill(0, &[5; 512]);
    rig.control.rule(Match::io(nvm::WRITE), Action::ExecuteThenStatus(bad));
    let sqe = rig.prps(io(nvm::WRITE, 1, 0, 1), 0, 512);
    assert_eq!(rig.run(&mut pair, sqe).status().kind(), e);
    let mut there = [0; 512];
    rig.medium.peek(0, &mut there);
    assert_eq!(there, [5; 512]);
    rig.expect_peace();
}

#[test]
fn a_swallowed_command_is_out_until_it_is_aborted_or_released() {
    let (mut rig, mut pair) = rig();
    rig.control.rule(Match::io(nvm::READ).times(2), Action::Swallow);
    start_read(&mut rig, &mut pair, 1);
    start_read(&mut rig, &mut pair, 2);
    // Its id is taken.
    let sqe = read(&rig, 2, 0);
    rig.push(&mut pair, sqe);
    rig.ring(&pair);
    let cqe = rig.wait(&mut pair);
    assert_eq!((cqe.cid(), cqe.status().kind()), (2, status::CID_CONFLICT));
    rig.expect_errors(1);
    assert_eq!(abort(&mut rig, 1, 1), 0);
    let cqe = rig.wait(&mut pair);
    assert_eq!((cqe.cid(), cqe.status().kind()), (1, status::ABORTED));
    assert_eq!(abort(&mut rig, 1, 1), 1);
    rig.control.release_held();
    let cqe = rig.wait(&mut pair);
    assert_eq!((cqe.cid(), cqe.status().kind()), (2, 0));
    assert_eq!(rig.control.held(), 0);
    rig.expect_errors(1);
}

#[test]
fn aborts_end_in_every_way() {
    let (mut rig, mut pair) = rig();
    let late = Duration::from_millis(200);
    rig.control.rule(Match::io(nvm::READ), Action::Delay(late));
    rig.control.set_aborts(Aborts::Refuse);
    start_read(&mut rig, &mut pair, 1);
    assert_eq!(abort(&mut rig, 1, 1), 1);
    assert_eq!(rig.wait(&mut pair).status().kind(), 0);
    rig.control.set_aborts(Aborts::Lie);
    start_read(&mut rig, &mut pair, 2);
    assert_eq!(abort(&mut rig, 1, 2), 0);
    assert_eq!(rig.wait(&mut pair).status().kind(), 0);
    rig.control.set_aborts(Aborts::AnswerAndGoOn);
    start_read(&mut rig, &mut pair, 3);
    assert_eq!(abort(&mut rig, 1, 3), 0);
    let cqes = [rig.wait(&mut pair), rig.wait(&mut pair)];
    assert_eq!(cqes.map(|cqe| (cqe.cid(), cqe.status().kind())), [(3, status::ABORTED), (3, 0)]);
    rig.control.set_aborts(Aborts::Silent);
    start_read(&mut rig, &mut pair, 4);
    rig.with_admin(|rig, pair| {
        let mut sqe = Sqe::new(admin::ABORT, 9, 0);
        sqe.0[10] = 1 | 4 << 16;
        rig.push(pair, sqe);
        rig.ring(pair);
        rig.eventually(|rig| rig.control.counters().admin(admin::ABORT) == 4);
        std::thread::sleep(Duration::from_millis(3));
        assert!(rig.peek(pair).is_none());
        for cid in 10..14 {
            let mut sqe = Sqe::new(admin::ABORT, cid, 0);
            sqe.0[10] = 1 | 4 << 16;
            rig.push(pair, sqe);
        }
        rig.ring(pair);
        let cqe = rig.wait(pair);
        assert_eq!((cqe.cid(), cqe.status().kind()), (13, status::ABORT_LIMIT));
    });
    assert_eq!(rig.wait(&mut pair).cid(), 4);
    rig.expect_errors(1);
}

#[test]
fn completions_go_wrong_on_demand() {
    let (mut rig, mut pair) = rig();
    let mut once = |rig: &mut Rig, action, count: usize| {
        rig.control.rule(Match::any_io().once(), action);
        let sqe = read(rig, 40, 0);
        rig.push(&mut pair, sqe);
        rig.ring(&pair);
        (0..count).map(|_| rig.wait(&mut pair)).collect::<Vec<_>>()
    };
    let cqes = once(&mut rig, Action::CompleteTwice, 2);
    assert_eq!([cqes[0].cid(), cqes[1].cid()], [40, 40]);
    let cqes = once(&mut rig, Action::OtherCid(1), 1);
    assert_eq!(cqes[0].cid(), 41);
    let cqes = once(&mut rig, Action::StrayCid(99), 2);
    assert_eq!([cqes[0].cid(), cqes[1].cid()], [40, 99]);
    let cqes = once(&mut rig, Action::SqHead(0x7777), 1);
    assert_eq!(cqes[0].sq_head(), 0x7777);
    let cqes = once(&mut rig, Action::SqId(9), 1);
    assert_eq!(cqes[0].sq_id(), 9);
    let cqes = once(&mut rig, Action::GarbageRing, 1);
    assert_eq!(cqes[0].cid(), 40);
    // Of 14 phase bits some are as if something were there: the next looks find noise.
    let mut noise = 0;
    while rig.peek(&mut pair).is_some() {
        noise += 1;
    }
    assert!(noise < 15, "{noise}");
    rig.expect_peace();
}

#[test]
fn garbage_in_a_ring_has_phases_of_both_kinds() {
    let (mut rig, mut pair) = rig();
    rig.control.rule(Match::any_io().once(), Action::GarbageRing);
    let sqe = read(&rig, 40, 0);
    rig.run(&mut pair, sqe);
    let phases: Vec<bool> = (1..15).map(|at| rig.raw_phase(&pair, at)).collect();
    assert!(phases.contains(&true) && phases.contains(&false), "{phases:?}");
}

#[test]
fn fatal_and_gone_end_everything_at_once() {
    let (mut rig, mut pair) = rig();
    rig.control.rule(Match::io(nvm::READ).once(), Action::Fatal);
    start_read(&mut rig, &mut pair, 1);
    rig.eventually(|rig| rig.regs.read_u32(reg::CSTS) == csts::RDY | csts::CFS);
    rig.disable();
    rig.enable();
    let mut pair = rig.pair(1, 16);
    rig.control.rule(Match::io(nvm::READ).once(), Action::Gone);
    let sqe = read(&rig, 2, 0);
    rig.push(&mut pair, sqe);
    rig.ring(&pair);
    rig.eventually(|rig| rig.regs.read_u32(reg::CSTS) == u32::MAX);
    assert_eq!(rig.regs.read_u64(reg::CAP), u64::MAX);
    assert!(matches!(rig.backing.reset(), Err(PciError::Gone { .. })));
    assert!(rig.backing.config_read(0, &mut [0; 4]).is_err());
    assert!(rig.control.is_gone());
    rig.expect_peace();
}

#[test]
fn ready_can_stick_and_a_reset_can_fail() {
    let mut rig = Rig::new(ModelOptions::default());
    rig.control.set_ready_stuck(true);
    rig.prepare_admin();
    rig.regs.write_u32(reg::CC, 1);
    std::thread::sleep(Duration::from_millis(10));
    assert_eq!(rig.regs.read_u32(reg::CSTS), 0);
    rig.control.set_ready_stuck(false);
    rig.eventually(|rig| rig.regs.read_u32(reg::CSTS) == csts::RDY);
    rig.control.set_ready_stuck(true);
    rig.regs.write_u32(reg::CC, 0);
    std::thread::sleep(Duration::from_millis(10));
    assert_eq!(rig.regs.read_u32(reg::CSTS), csts::RDY);
    rig.control.set_reset_fails(true);
    assert!(matches!(rig.backing.reset(), Err(PciError::Io { .. })));
    assert_eq!(rig.control.count(Count::Resets), 0);
    rig.control.set_reset_fails(false);
    rig.backing.reset().unwrap();
    assert_eq!((rig.regs.read_u32(reg::CSTS), rig.regs.read_u32(reg::CC)), (0, 0));
    rig.control.set_ready_stuck(false);
    rig.enable();
    rig.expect_peace();
}

#[test]
fn maps_fail_on_demand_and_leave_nothing_behind() {
    let rig = Rig::new(ModelOptions::default());
    let memory = Arc::new(Mapping::pool(4096).unwrap());
    let other = Arc::new(Mapping::pool(4096).unwrap());
    let dma = rig.backing.dma();
    rig.control.fail_dma_maps(Some((1, MapFailure::Memlock)));
    let map = DmaMap::new(&dma, &memory).unwrap();
    assert!(matches!(DmaMap::new(&dma, &other), Err(DmaError::Memlock { .. })));
    assert_eq!(rig.control.mapped_count(), 2);
    rig.control.fail_dma_maps(None);
    assert!(matches!(DmaMap::new(&dma, &memory), Err(DmaError::Refused { .. })));
    drop(map);
    assert_eq!(rig.control.mapped_count(), 1);
    rig.control.fail_dma_maps(Some((0, MapFailure::Range)));
    assert!(matches!(DmaMap::new(&dma, &other), Err(DmaError::Range { .. })));
    rig.control.fail_dma_maps(None);
    rig.backing.close();
    assert!(matches!(DmaMap::new(&dma, &other), Err(DmaError::Gone { .. })));
}

#[test]
fn late_garbage_hits_memory_unless_the_controller_was_stopped() {
    let soon = Duration::from_millis(200);
    let settle = Duration::from_millis(400);
    let (mut rig, mut pair) = rig();
    rig.control.rule(Match::io(nvm::READ), Action::ScribbleAfter(soon));
    rig.fill(0, &[1; 512]);
    start_read(&mut rig, &mut pair, 1);
    std::thread::sleep(settle);
    assert_eq!(rig.bytes(0, 512), [0xdb; 512]);
    assert_eq!(rig.control.count(Count::Scribbles), 1);
    // An abort stops it.
    rig.fill(0, &[1; 512]);
    start_read(&mut rig, &mut pair, 2);
    assert_eq!(abort(&mut rig, 1, 2), 0);
    rig.wait(&mut pair);
    // Bus mastering off and on stops it.
    start_read(&mut rig, &mut pair, 3);
    rig.backing.set_bus_master(false).unwrap();
    rig.backing.set_bus_master(true).unwrap();
    std::thread::sleep(settle);
    // A disabled controller has stopped.
    start_read(&mut rig, &mut pair, 4);
    rig.disable();
    rig.enable();
    std::thread::sleep(settle);
    assert_eq!(rig.bytes(0, 512), [1; 512]);
    assert_eq!(rig.control.count(Count::Scribbles), 1);
    rig.expect_peace();
}

#[test]
fn a_latency_is_kept_and_depth_hides_it() {
    let latency = Duration::from_millis(60);
    let mut rig = Rig::new(ModelOptions { latency, ..ModelOptions::default() });
    rig.enable();
    let mut pair = rig.pair(1, 16);
    let start = Instant::now();
    for cid in 0..8 {
        let sqe = read(&rig, cid, 0);
        rig.push(&mut pair, sqe);
    }
    rig.ring(&pair);
    for cid in 0..8 {
        assert_eq!(rig.wait(&mut pair).cid(), cid);
    }
    assert!(start.elapsed() >= latency && start.elapsed() < 8 * latency);
    rig.control.set_latency(Duration::ZERO);
    let sqe = read(&rig, 9, 0);
    let start = Instant::now();
    rig.run(&mut pair, sqe);
    assert!(start.elapsed() < latency);
    rig.expect_peace();
}

#[test]
fn a_full_completion_queue_waits_and_loses_nothing() {
    let (mut rig, _) = rig();
    let mut pair = rig.pair(2, 4);
    // Three are out at most in a queue of four; the driver takes them late.
    rig.control.rule(Match::any_io().times(3), Action::CompleteTwice);
    for cid in 0..3 {
        let mut sqe = rig.prps(io(nvm::READ, 1, 0, 1), 0, 512);
        sqe.0[0] |= cid << 16;
        rig.push(&mut pair, sqe);
    }
    rig.ring(&pair);
    std::thread::sleep(Duration::from_millis(5));
    let cids: Vec<u16> = (0..6).map(|_| rig.wait(&mut pair).cid()).collect();
    assert_eq!(cids, [0, 0, 1, 1, 2, 2]);
    rig.expect_peace();
}

#[test]
fn a_device_comes_back_with_its_medium() {
    let (mut rig, mut pair) = rig();
    rig.fill(0, &[8; 512]);
    let sqe = rig.prps(io(nvm::WRITE, 1, 3, 1), 0, 512);
    assert!(rig.run(&mut pair, sqe).status().is_success());
    let medium = Arc::clone(&rig.medium);
    rig.control.vanish(false);
    drop(rig);
    let namespaces = vec![ModelNamespace::new(1, 9, 8192, Arc::clone(&medium))];
    let mut rig = Rig::with(ModelOptions::default(), namespaces, medium);
    rig.enable();
    let mut pair = rig.pair(1, 8);
    let sqe = rig.prps(io(nvm::READ, 1, 3, 1), 0, 512);
    assert!(rig.run(&mut pair, sqe).status().is_success());
    assert_eq!(rig.bytes(0, 512), [8; 512]);
}
