//! The model, driven by hand: bring-up and data here, the rest beside.

mod admin;
mod data;
mod faults;
mod interrupts;
mod lying;
mod over_vfio_user;
mod rig;

use rig::{Rig, io};
use ringmill_core::spec::nvme::{
    admin as op, cc, cns, csts, feature, id_ctrl, id_ns, nvm, reg, status,
};

use super::*;
use crate::pci::{PciBacking, Registers};

#[test]
fn it_comes_up_and_says_what_it_is() {
    let mut rig = Rig::new(ModelOptions::default());
    assert_eq!(rig.regs.read_u32(reg::VS), 0x0002_0000);
    assert_eq!(rig.regs.read_u64(reg::CAP) & 0xffff, 1023);
    assert_eq!(rig.regs.read_u32(reg::CSTS), 0);
    rig.enable();
    assert_eq!(rig.regs.read_u32(reg::CSTS), csts::RDY);
    let data = rig.identify(cns::CONTROLLER, 0).unwrap();
    assert_eq!(&data[id_ctrl::SN..id_ctrl::SN + 8], b"RM0001  ");
    let list = rig.identify(cns::ACTIVE_NAMESPACES, 0).unwrap();
    assert_eq!(list[..12], [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    let ns = rig.identify(cns::NAMESPACE, 2).unwrap();
    assert_eq!(ns[id_ns::NSZE..id_ns::NSZE + 8], 4096u64.to_le_bytes());
    let format = usize::from(ns[id_ns::FLBAS] & 15);
    assert_eq!(ns[id_ns::LBAF + 4 * format + 2], 12);
    let ids = rig.identify(cns::NAMESPACE_DESCRIPTORS, 1).unwrap();
    assert_eq!(ids[..2], [2, 16]);
    assert_eq!(ids[20..22], [3, 16]);
    rig.expect_peace();
}

#[test]
fn what_is_written_is_read_and_lies_on_the_medium() {
    let mut rig = Rig::new(ModelOptions::default());
    rig.enable();
    let mut pair = rig.pair(1, 64);
    for round in 0..200u32 {
        let blocks = round % 9 + 1;
        let len_bytes = blocks as usize * 512;
        let offset = 4 * (round as usize % 100);
        let data: Vec<u8> =
            (0..len_bytes).map(|at| (at * 7 + round as usize).to_le_bytes()[0]).collect();
        rig.fill(offset, &data);
        let sqe = rig.prps(io(nvm::WRITE, 1, u64::from(round * 10), blocks), offset, len_bytes);
        assert!(rig.run(&mut pair, sqe).status().is_success());
        rig.fill(offset, &vec![0xee; len_bytes]);
        let sqe = rig.prps(io(nvm::READ, 1, u64::from(round * 10), blocks), offset, len_bytes);
        assert!(rig.run(&mut pair, sqe).status().is_success());
        assert_eq!(rig.bytes(offset, len_bytes), data);
        let mut there = vec![0; len_bytes];
        rig.medium.peek(u64::from(round) * 5120, &mut there);
        assert_eq!(there, data);
    }
    assert_eq!(rig.control.counters().io(nvm::WRITE), 200);
    assert_eq!(rig.control.count(Count::Prp), 400);
    rig.expect_peace();
}

#[test]
fn a_disabled_controller_has_forgotten_everything_and_comes_up_again() {
    let mut rig = Rig::new(ModelOptions::default());
    rig.enable();
    let mut pair = rig.pair(1, 8);
    rig.control.rule(Match::io(nvm::READ), Action::Swallow);
    for cid in 0..3 {
        let mut sqe = rig.prps(io(nvm::READ, 1, 0, 1), 0, 512);
        sqe.0[0] |= cid << 16;
        rig.push(&mut pair, sqe);
    }
    rig.ring(&pair);
    rig.eventually(|rig| rig.control.held() == 3);
    rig.disable();
    assert_eq!(rig.regs.read_u32(reg::CSTS), 0);
    assert_eq!(rig.control.count(Count::Dropped), 3);
    rig.control.clear_rules();
    rig.enable();
    let mut pair = rig.pair(1, 8);
    let sqe = rig.prps(io(nvm::READ, 1, 0, 1), 0, 512);
    assert!(rig.run(&mut pair, sqe).status().is_success());
    rig.expect_peace();
}

#[test]
fn ready_takes_its_time_and_wrong_configurations_are_fatal() {
    let delay = std::time::Duration::from_millis(60);
    let options = ModelOptions { ready_delay: delay, page_max: 0, ..ModelOptions::default() };
    let mut rig = Rig::new(options);
    let start = std::time::Instant::now();
    rig.enable();
    assert!(start.elapsed() >= delay);
    let start = std::time::Instant::now();
    rig.disable();
    assert!(start.elapsed() >= delay);
    rig.expect_peace();
    // A page size that it does not have.
    rig.prepare_admin();
    rig.regs.write_u32(reg::CC, cc::EN | 1 << cc::MPS_SHIFT);
    rig.eventually(|rig| rig.regs.read_u32(reg::CSTS) & csts::CFS != 0);
    rig.expect_errors(1);
    rig.disable();
    rig.enable();
    // The queues' registers cannot be changed now.
    rig.regs.write_u32(reg::AQA, 0);
    rig.expect_errors(2);
    rig.identify(cns::CONTROLLER, 0).unwrap();
}

#[test]
fn a_shutdown_flushes_and_says_when_it_is_complete() {
    let mut rig = Rig::new(ModelOptions::default());
    rig.enable();
    let mut pair = rig.pair(1, 8);
    rig.fill(0, &[7; 512]);
    let sqe = rig.prps(io(nvm::WRITE, 1, 0, 1), 0, 512);
    assert!(rig.run(&mut pair, sqe).status().is_success());
    assert_eq!(rig.medium.volatile_bytes(), 512);
    let control = rig.regs.read_u32(reg::CC);
    rig.regs.write_u32(reg::CC, control | cc::SHN_NORMAL);
    rig.eventually(|rig| rig.regs.read_u32(reg::CSTS) & csts::SHST_MASK == csts::SHST_COMPLETE);
    assert_eq!(rig.medium.volatile_bytes(), 0);
    assert_eq!(rig.control.count(Count::Shutdowns), 1);
    rig.expect_peace();
    rig.run(&mut pair, io(nvm::FLUSH, 1, 0, 1));
    rig.expect_errors(1);
}

#[test]
fn a_power_cut_loses_what_was_not_flushed_and_nothing_else() {
    let mut rig = Rig::new(ModelOptions::default());
    rig.enable();
    let mut pair = rig.pair(1, 8);
    let mut write = |rig: &mut Rig, lba: u64, value: u8, flags: u32| {
        rig.fill(0, &[value; 512]);
        let mut sqe = rig.prps(io(nvm::WRITE, 1, lba, 1), 0, 512);
        sqe.0[12] |= flags;
        assert!(rig.run(&mut pair, sqe).status().is_success());
    };
    write(&mut rig, 0, 1, 0);
    write(&mut rig, 1, 1, 0);
    let mut flush = rig.pair(2, 8);
    assert!(rig.run(&mut flush, io(nvm::FLUSH, 1, 0, 1)).status().is_success());
    write(&mut rig, 0, 2, 0);
    write(&mut rig, 1, 2, 0);
    write(&mut rig, 1, 3, nvm::DW12_FUA);
    write(&mut rig, 2, 4, nvm::DW12_FUA);
    write(&mut rig, 3, 5, 0);
    rig.control.power_cut();
    assert_eq!(rig.regs.read_u32(reg::CSTS), 0);
    let mut there = [0; 2048];
    rig.medium.peek(0, &mut there);
    let blocks: Vec<u8> = there.chunks(512).map(|block| block[0]).collect();
    assert_eq!(blocks, [1, 3, 4, 0]);
    assert!(there.chunks(512).all(|block| block.iter().all(|byte| *byte == block[0])));
    assert_eq!(rig.control.count(Count::Fua), 2);
    rig.expect_peace();
}

#[test]
fn without_the_cache_every_write_is_stable() {
    let mut rig = Rig::new(ModelOptions::default());
    rig.enable();
    let mut pair = rig.pair(1, 8);
    let (_, was_on) = rig.feature(op::GET_FEATURES, feature::WRITE_CACHE, 0);
    assert_eq!(was_on, 1);
    assert_eq!(rig.feature(op::SET_FEATURES, feature::WRITE_CACHE, 0).0, 0);
    rig.fill(0, &[9; 512]);
    let sqe = rig.prps(io(nvm::WRITE, 1, 5, 1), 0, 512);
    assert!(rig.run(&mut pair, sqe).status().is_success());
    assert_eq!(rig.medium.volatile_bytes(), 0);
    rig.control.power_cut();
    let mut there = [0; 512];
    rig.medium.peek(5 * 512, &mut there);
    assert_eq!(there, [9; 512]);
    rig.expect_peace();
}

#[test]
fn nothing_happens_without_bus_mastering_and_nothing_after_close() {
    let mut rig = Rig::new(ModelOptions::default());
    rig.enable();
    let mut pair = rig.pair(1, 8);
    rig.backing.set_bus_master(false).unwrap();
    let sqe = rig.prps(io(nvm::READ, 1, 0, 1), 0, 512);
    rig.push(&mut pair, sqe);
    rig.ring(&pair);
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert_eq!(rig.control.counters().io(nvm::READ), 0);
    rig.backing.set_bus_master(true).unwrap();
    assert!(rig.wait(&mut pair).status().is_success());
    rig.backing.close();
    assert_eq!(rig.regs.read_u32(reg::CSTS), u32::MAX);
    assert!(rig.backing.set_bus_master(true).is_err() && rig.backing.reset().is_err());
    assert_eq!(rig.control.mapped_count(), 0);
    rig.expect_peace();
}

#[test]
fn unmapped_memory_is_a_fault_and_never_touched() {
    let mut rig = Rig::new(ModelOptions::default());
    rig.enable();
    let mut pair = rig.pair(1, 8);
    let mut sqe = io(nvm::READ, 1, 0, 1);
    sqe.set_prps(0x10_0000, 0);
    let status = rig.run(&mut pair, sqe).status();
    assert_eq!(status.kind(), status::DATA_TRANSFER_ERROR);
    assert_eq!(rig.control.count(Count::DmaFaults), 1);
    // A queue whose memory is taken away ends the controller, not the process.
    let dma = rig.backing.dma();
    dma.unmap(rig.map.mapping());
    rig.ring_value(&pair, 2);
    rig.eventually(|rig| rig.regs.read_u32(reg::CSTS) & csts::CFS != 0);
    assert_eq!(rig.control.count(Count::DmaFaults), 2);
    // The entry there would have been a flush.
    assert_eq!(rig.control.counters().io(nvm::FLUSH), 0);
}
