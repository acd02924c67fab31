//! How fast the device model is by itself: a bare loop that submits and reaps 4 KiB reads of a null medium.
//!
//! `cargo run --release -p ringmill-drivers --example model_speed -- [depth] [seconds] [own core] [model's core]`

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ringmill_core::mem::{DmaMap, Mapping, SharedSlice};
use ringmill_core::spec::nvme::{Cqe, Sqe, admin, cc, csts, nvm, reg};
use ringmill_drivers::model::{Medium, ModelNamespace, ModelOptions, ModelRegisters, start};
use ringmill_drivers::pci::{PciBacking, Registers};

const SIZE: usize = 1024;
const DATA: usize = 1 << 20;
const MEMORY: usize = DATA + SIZE * 4096;

/// A queue pair: places of its rings in the window.
struct Pair {
    number: usize,
    sq: usize,
    cq: usize,
    tail: usize,
    head: usize,
    phase: bool,
}

impl Pair {
    fn new(number: usize, sq: usize, cq: usize) -> Pair {
        Pair { number, sq, cq, tail: 0, head: 0, phase: true }
    }

    fn push(&mut self, window: &SharedSlice, sqe: &Sqe) {
        window.store_entry(self.sq + self.tail * 64, &sqe.0);
        self.tail = (self.tail + 1) % SIZE;
    }

    fn ring(&self, regs: &ModelRegisters) {
        regs.write_u32(reg::DOORBELLS + self.number * 8, u32::try_from(self.tail).unwrap_or(0));
    }

    fn reap(&mut self, window: &SharedSlice) -> Option<Cqe> {
        let at = self.cq + self.head * 16;
        let last = window.load_u32(at + 12, Ordering::Acquire);
        let cqe = Cqe([0, 0, window.load_u32(at + 8, Ordering::Relaxed), last]);
        if cqe.phase() != self.phase {
            return None;
        }
        self.head += 1;
        if self.head == SIZE {
            (self.head, self.phase) = (0, !self.phase);
        }
        Some(cqe)
    }

    fn taken(&self, regs: &ModelRegisters) {
        regs.write_u32(reg::DOORBELLS + self.number * 8 + 4, u32::try_from(self.head).unwrap_or(0));
    }
}

fn run(
    window: &SharedSlice,
    regs: &ModelRegisters,
    pair: &mut Pair,
    sqe: &Sqe,
) -> Result<(), Box<dyn Error>> {
    pair.push(window, sqe);
    pair.ring(regs);
    loop {
        if let Some(cqe) = pair.reap(window) {
            pair.taken(regs);
            let status = cqe.status();
            return if status.is_success() { Ok(()) } else { Err(format!("{status:?}").into()) };
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|it| it.parse().ok()).collect();
    let number = |at: usize, default: usize| numbers.get(at).copied().unwrap_or(default);
    let (depth, seconds) = (number(0, 128).min(SIZE - 1), number(1, 3));
    let mut set = rustix::thread::CpuSet::new();
    set.set(number(2, 0));
    rustix::thread::sched_setaffinity(None, &set)?;

    let options = ModelOptions {
        core: Some(number(3, 1)),
        spin: Duration::from_secs(1),
        ..ModelOptions::default()
    };
    let namespace = ModelNamespace::new(1, 12, 1 << 20, Medium::null());
    let (backing, control) = start(options, vec![namespace])?;
    backing.set_bus_master(true)?;
    let memory = Arc::new(Mapping::pool(MEMORY)?);
    let _map = DmaMap::new(&backing.dma(), &memory)?;
    let window = SharedSlice::new(&memory, 0, MEMORY, 4096).ok_or("no window")?;
    let base = window.iova(backing.dma().offset()).0;
    let regs = backing.registers(0, 0x1000)?;

    let mut boss = Pair::new(0, 0, 64 << 10);
    let mut pair = Pair::new(1, 128 << 10, 256 << 10);
    let at = |place: usize| base + place as u64;
    regs.write_u32(reg::AQA, 1023 | 1023 << 16);
    regs.write_u64(reg::ASQ, at(boss.sq));
    regs.write_u64(reg::ACQ, at(boss.cq));
    regs.write_u32(reg::CC, cc::EN | 6 << cc::IOSQES_SHIFT | 4 << cc::IOCQES_SHIFT);
    while regs.read_u32(reg::CSTS) & csts::RDY == 0 {}
    for (opcode, place, flags) in
        [(admin::CREATE_CQ, pair.cq, 1), (admin::CREATE_SQ, pair.sq, 1 | 1 << 16)]
    {
        let mut sqe = Sqe::new(opcode, 0, 0);
        sqe.set_prps(at(place), 0);
        sqe.0[10] = 1 | 1023 << 16;
        sqe.0[11] = flags;
        run(&window, &regs, &mut boss, &sqe)?;
    }

    let entry = |cid: u16| {
        let mut sqe = Sqe::new(nvm::READ, cid, 1);
        sqe.set_prps(at(DATA + usize::from(cid) * 4096), 0);
        sqe.0[10] = u32::from(cid);
        sqe
    };
    for cid in 0..u16::try_from(depth)? {
        pair.push(&window, &entry(cid));
    }
    pair.ring(&regs);
    let (start, mut done, mut looks) = (Instant::now(), 0u64, 0u32);
    let wanted = Duration::from_secs(seconds as u64);
    loop {
        let before = done;
        while let Some(cqe) = pair.reap(&window) {
            pair.push(&window, &entry(cqe.cid()));
            done += 1;
        }
        if done > before {
            pair.ring(&regs);
            pair.taken(&regs);
        }
        looks = looks.wrapping_add(1);
        if looks.is_multiple_of(1024) && start.elapsed() > wanted {
            break;
        }
    }
    let rate = u128::from(done) * 1000 / start.elapsed().as_millis().max(1);
    println!("depth {depth}: {rate} reads/s; complaint: {:?}", control.complaint());
    Ok(())
}
