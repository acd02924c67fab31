//! The lying device: it lies, repeats itself for the same bytes, and never leaves its memory.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ringmill_core::mem::{DmaMap, Mapping, SharedSlice};
use ringmill_core::spec::nvme::{Sqe, admin, cc, cns, csts, reg};

use super::super::*;
use crate::pci::{PciBacking, Registers};

const MEMORY: usize = 64 << 10;

/// Brings a liar up as far as it lets us and asks it a hundred times what it is; how often that was answered, and the sum
/// of what it said.
fn interview(seed: u64) -> (u32, u64) {
    let namespaces = vec![ModelNamespace::new(1, 9, 1000, Medium::null())];
    let bytes = seed.to_le_bytes();
    let (backing, control) =
        LyingBacking::start(&bytes, ModelOptions::default(), namespaces).unwrap();
    backing.set_bus_master(true).unwrap();
    // Memory before and after what the device is given.
    let memory = Arc::new(Mapping::pool(MEMORY).unwrap());
    let _map = DmaMap::new(&backing.dma(), &memory).unwrap();
    let window = SharedSlice::new(&memory, 0, MEMORY, 4096).unwrap();
    let base = window.iova(backing.dma().offset()).0;
    let regs = backing.registers(0, 0x1000).unwrap();
    regs.write_u32(reg::AQA, 15 | 15 << 16);
    regs.write_u64(reg::ASQ, base);
    regs.write_u64(reg::ACQ, base + 4096);
    regs.write_u32(reg::CC, cc::EN | 6 << cc::IOSQES_SHIFT | 4 << cc::IOCQES_SHIFT);
    let start = Instant::now();
    while regs.read_u32(reg::CSTS) & csts::RDY == 0 && start.elapsed() < Duration::from_secs(5) {}
    let (mut tail, mut answered, mut sum) = (0, 0, 0u64);
    for round in 0..100u16 {
        let mut sqe = Sqe::new(admin::IDENTIFY, round, 0);
        sqe.set_prps(base + 8192, 0);
        sqe.0[10] = cns::CONTROLLER;
        window.store_entry(tail * 64, &sqe.0);
        tail = (tail + 1) % 16;
        window.store_u32(4096 + 12, 0, Ordering::Relaxed);
        regs.write_u32(reg::DOORBELLS, u32::try_from(tail).unwrap());
        let seen = u64::from(round) + 1;
        let start = Instant::now();
        while control.counters().admin(admin::IDENTIFY) < seen
            && start.elapsed() < Duration::from_millis(50)
        {}
        // Nobody takes completions, so only as many as the ring holds are there.
        answered += u32::from(control.counters().admin(admin::IDENTIFY) == seen);
        let mut data = [0; 4096];
        window.segment(8192, 4096).unwrap().read_into(&mut data);
        sum =
            data.iter().fold(sum, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
        if answered < u32::from(round) {
            break;
        }
    }
    assert_eq!(control.count(Count::DmaFaults), 0);
    (answered, sum)
}

#[test]
fn liars_differ_and_mostly_come_up() {
    let results: Vec<(u32, u64)> = (0..12).map(interview).collect();
    let came_up = results.iter().filter(|(answered, _)| *answered > 0).count();
    assert!(came_up >= 9, "{results:?}");
    let mut sums: Vec<u64> = results.iter().map(|(_, sum)| *sum).collect();
    sums.sort_unstable();
    sums.dedup();
    assert!(sums.len() >= 4, "{results:?}");
}
