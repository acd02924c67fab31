//! A naive driver: one command at a time, written from the specification and from nothing else.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ringmill_core::mem::{DmaMap, Mapping, SharedSlice};
use ringmill_core::spec::nvme::{Cqe, Sqe, admin, cc, csts, reg};
use ringmill_core::units::{len_u32, usize_of};

use super::super::*;
use crate::pci::{PciBacking, Registers};

const PAGE: usize = 4096;

/// Queues lie on multiples of this, as the device sees them, so that larger pages can be tried.
const PAGE_LARGE: usize = 16384;

/// Where data is, in the rig's memory; queues and lists are before.
pub(super) const DATA: usize = 1 << 20;
pub(super) const MEMORY: usize = 4 << 20;
/// Lists of PRPs and SGL segments.
pub(super) const LISTS: usize = 512 << 10;

const PATIENCE: Duration = Duration::from_secs(10);

/// A queue pair as a driver has it.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) id: u16,
    size: u32,
    sq: SharedSlice,
    cq: SharedSlice,
    pub(super) tail: u32,
    pub(super) head: u32,
    phase: bool,
}

pub(super) struct Rig<B: PciBacking = ModelBacking> {
    pub(super) backing: B,
    pub(super) control: ModelControl,
    pub(super) regs: Arc<B::Registers>,
    pub(super) medium: Arc<Medium>,
    pub(super) map: DmaMap,
    pub(super) window: SharedSlice,
    pub(super) stride: u32,
    admin: Option<Pair>,
    next_page: usize,
    next_cid: u16,
}

/// An I/O command for some blocks.
pub(super) fn io(opcode: u8, nsid: u32, lba: u64, blocks: u32) -> Sqe {
    let mut sqe = Sqe::new(opcode, 0, nsid);
    sqe.set_u64(10, lba);
    sqe.0[12] = blocks - 1;
    sqe
}

impl Rig {
    /// Namespace 1 has 512-byte blocks on RAM, 2 has 4,096-byte blocks on nothing.
    pub(super) fn new(options: ModelOptions) -> Rig {
        let medium = Medium::ram(4 << 20).unwrap();
        let namespaces = vec![
            ModelNamespace::new(1, 9, 8192, Arc::clone(&medium)),
            ModelNamespace::new(2, 12, 4096, Medium::null()),
        ];
        Rig::with(options, namespaces, medium)
    }

    pub(super) fn with(
        options: ModelOptions,
        namespaces: Vec<ModelNamespace>,
        medium: Arc<Medium>,
    ) -> Rig {
        let stride = u32::from(options.doorbell_stride);
        let (backing, control) = start(options, namespaces).unwrap();
        Rig::over(backing, control, medium, stride)
    }
}

impl<B: PciBacking> Rig<B> {
    /// Over any way to the model.
    pub(super) fn over(
        backing: B,
        control: ModelControl,
        medium: Arc<Medium>,
        stride: u32,
    ) -> Rig<B> {
        backing.set_bus_master(true).unwrap();
        let memory = Arc::new(Mapping::pool(MEMORY).unwrap());
        let map = DmaMap::new(&backing.dma(), &memory).unwrap();
        let window = SharedSlice::new(&memory, 0, MEMORY, PAGE).unwrap();
        let regs = backing.registers(0, reg::DOORBELLS + (64 << stride)).unwrap();
        Rig {
            backing,
            control,
            regs,
            medium,
            map,
            window,
            stride,
            admin: None,
            next_page: 0,
            next_cid: 100,
        }
    }

    /// Where the device finds that place.
    pub(super) fn iova(&self, offset: usize) -> u64 {
        self.window.iova(self.backing.dma().offset()).0 + offset as u64
    }

    pub(super) fn fill(&self, offset: usize, data: &[u8]) {
        self.window.segment(DATA + offset, data.len()).unwrap().write_from(data);
    }

    pub(super) fn bytes(&self, offset: usize, len_bytes: usize) -> Vec<u8> {
        let mut data = vec![0; len_bytes];
        self.window.segment(DATA + offset, len_bytes).unwrap().read_into(&mut data);
        data
    }

    /// Puts words into the lists' place.
    pub(super) fn list(&self, offset: usize, words: &[u64]) {
        for (at, word) in words.iter().enumerate() {
            self.window.store_u64(LISTS + offset + 8 * at, *word, Ordering::Relaxed);
        }
    }

    /// PRPs for data at that offset, of at most a list of one page.
    pub(super) fn prps(&self, mut sqe: Sqe, offset: usize, len_bytes: usize) -> Sqe {
        let first = self.iova(DATA + offset);
        let first_page = (DATA + offset) / PAGE * PAGE + PAGE;
        let rest = (DATA + offset + len_bytes).saturating_sub(first_page);
        let pages: Vec<u64> =
            (0..rest.div_ceil(PAGE)).map(|at| self.iova(first_page + at * PAGE)).collect();
        match pages.len() {
            0 => sqe.set_prps(first, 0),
            1 => sqe.set_prps(first, pages[0]),
            _ => {
                self.list(0, &pages);
                sqe.set_prps(first, self.iova(LISTS));
            }
        }
        sqe
    }

    /// Bytes up to the first large page of the device's addresses.
    pub(super) fn lead(&self) -> usize {
        (PAGE_LARGE - usize_of(self.iova(0) % PAGE_LARGE as u64)) % PAGE_LARGE
    }

    fn page(&mut self, len_bytes: usize) -> usize {
        let at = self.next_page;
        self.next_page += len_bytes.next_multiple_of(PAGE_LARGE);
        assert!(self.next_page <= LISTS);
        at
    }

    fn make_pair(&mut self, id: u16, size: u32) -> (Pair, u64, u64) {
        let (sq_at, cq_at) = (self.page(size as usize * 64), self.page(size as usize * 16));
        let part = |at, len| SharedSlice::new(self.map.mapping(), at, len, 64).unwrap();
        let (sq, cq) = (part(sq_at, size as usize * 64), part(cq_at, size as usize * 16));
        cq.fill_zero();
        let pair = Pair { id, size, sq, cq, tail: 0, head: 0, phase: true };
        (pair, self.iova(sq_at), self.iova(cq_at))
    }

    /// Everything but CC.EN.
    pub(super) fn prepare_admin(&mut self) {
        self.next_page = self.lead();
        let (pair, sq, cq) = self.make_pair(0, 16);
        self.regs.write_u32(reg::AQA, 15 | 15 << 16);
        self.regs.write_u64(reg::ASQ, sq);
        self.regs.write_u64(reg::ACQ, cq);
        self.admin = Some(pair);
    }

    pub(super) fn enable(&mut self) {
        self.prepare_admin();
        let sizes = 6 << cc::IOSQES_SHIFT | 4 << cc::IOCQES_SHIFT;
        self.regs.write_u32(reg::CC, cc::EN | sizes);
        self.eventually(|rig| rig.regs.read_u32(reg::CSTS) & csts::RDY != 0);
    }

    pub(super) fn disable(&mut self) {
        self.regs.write_u32(reg::CC, 0);
        self.eventually(|rig| rig.regs.read_u32(reg::CSTS) & csts::RDY == 0);
        self.eventually(|rig| rig.regs.read_u32(reg::CSTS) & csts::CFS == 0);
    }

    /// Makes an I/O queue pair, with interrupts by vector `id`.
    pub(super) fn pair(&mut self, id: u16, size: u32) -> Pair {
        let vector = if self.backing.vectors_count() > 1 { id } else { 0 };
        let (pair, sq, cq) = self.make_pair(id, size);
        let mut sqe = Sqe::new(admin::CREATE_CQ, 0, 0);
        sqe.set_prps(cq, 0);
        sqe.0[10] = u32::from(id) | (size - 1) << 16;
        sqe.0[11] = 3 | u32::from(vector) << 16;
        assert!(self.admin(sqe).status().is_success());
        let mut sqe = Sqe::new(admin::CREATE_SQ, 0, 0);
        sqe.set_prps(sq, 0);
        sqe.0[10] = u32::from(id) | (size - 1) << 16;
        sqe.0[11] = 1 | u32::from(id) << 16;
        assert!(self.admin(sqe).status().is_success());
        pair
    }

    /// Writes an entry, without a doorbell.
    pub(super) fn push(&mut self, pair: &mut Pair, sqe: Sqe) {
        pair.sq.store_entry(pair.tail as usize * 64, &sqe.0);
        pair.tail = (pair.tail + 1) % pair.size;
    }

    fn bell(&self, pair: &Pair, is_completion: bool) -> usize {
        let number = 2 * usize::from(pair.id) + usize::from(is_completion);
        reg::DOORBELLS + number * (4 << self.stride)
    }

    pub(super) fn ring(&self, pair: &Pair) {
        self.ring_value(pair, pair.tail);
    }

    pub(super) fn ring_value(&self, pair: &Pair, value: u32) {
        self.regs.write_u32(self.bell(pair, false), value);
    }

    pub(super) fn ring_head(&self, pair: &Pair, value: u32) {
        self.regs.write_u32(self.bell(pair, true), value);
    }

    /// The phase bit of that place of the completion queue.
    pub(super) fn raw_phase(&self, pair: &Pair, at: usize) -> bool {
        pair.cq.load_u32(at * 16 + 12, Ordering::Acquire) & 1 << 16 != 0
    }

    /// The next completion, if it is there; the head's doorbell is left alone.
    pub(super) fn peek(&self, pair: &mut Pair) -> Option<Cqe> {
        let at = pair.head as usize * 16;
        let high = pair.cq.load_u32(at + 12, Ordering::Acquire);
        let word = |n: usize| pair.cq.load_u32(at + 4 * n, Ordering::Relaxed);
        let cqe = Cqe([word(0), word(1), word(2), high]);
        if cqe.phase() != pair.phase {
            return None;
        }
        pair.head += 1;
        if pair.head == pair.size {
            pair.head = 0;
            pair.phase = !pair.phase;
        }
        Some(cqe)
    }

    /// The next completion.
    pub(super) fn wait(&self, pair: &mut Pair) -> Cqe {
        let start = Instant::now();
        loop {
            if let Some(cqe) = self.peek(pair) {
                self.ring_head(pair, pair.head);
                return cqe;
            }
            assert!(start.elapsed() < PATIENCE, "no completion");
            std::thread::yield_now();
        }
    }

    /// One command and its completion, which must be its own.
    pub(super) fn run(&mut self, pair: &mut Pair, mut sqe: Sqe) -> Cqe {
        self.next_cid = self.next_cid.wrapping_add(1);
        sqe.0[0] = sqe.0[0] & 0xffff | u32::from(self.next_cid) << 16;
        self.push(pair, sqe);
        self.ring(pair);
        let cqe = self.wait(pair);
        assert_eq!((cqe.cid(), cqe.sq_id()), (self.next_cid, pair.id));
        assert_eq!(u32::from(cqe.sq_head()), pair.tail);
        cqe
    }

    pub(super) fn admin(&mut self, sqe: Sqe) -> Cqe {
        let mut pair = self.admin.take().unwrap();
        let cqe = self.run(&mut pair, sqe);
        self.admin = Some(pair);
        cqe
    }

    /// Admin commands without waiting.
    pub(super) fn with_admin<R>(&mut self, work: impl FnOnce(&mut Rig<B>, &mut Pair) -> R) -> R {
        let mut pair = self.admin.take().unwrap();
        let result = work(self, &mut pair);
        self.admin = Some(pair);
        result
    }

    /// Identify data, or the kind of its status.
    pub(super) fn identify(&mut self, of: u32, nsid: u32) -> Result<Vec<u8>, u16> {
        let mut sqe = self.prps(Sqe::new(admin::IDENTIFY, 0, nsid), 0, 4096);
        sqe.0[10] = of;
        self.fill(0, &[0xaa; 4096]);
        let status = self.admin(sqe).status();
        if status.is_success() { Ok(self.bytes(0, 4096)) } else { Err(status.kind()) }
    }

    /// Kind of the status and result of a feature command.
    pub(super) fn feature(&mut self, opcode: u8, id: u32, value: u32) -> (u16, u32) {
        let mut sqe = Sqe::new(opcode, 0, 0);
        sqe.0[10] = id;
        sqe.0[11] = value;
        let cqe = self.admin(sqe);
        (cqe.status().kind(), cqe.0[0])
    }

    pub(super) fn log(&mut self, id: u8, len_bytes: usize) -> Result<Vec<u8>, u16> {
        let mut sqe = self.prps(Sqe::new(admin::GET_LOG_PAGE, 0, u32::MAX), 0, len_bytes);
        sqe.0[10] = u32::from(id) | (len_u32(len_bytes / 4 - 1)) << 16;
        let status = self.admin(sqe).status();
        if status.is_success() { Ok(self.bytes(0, len_bytes)) } else { Err(status.kind()) }
    }

    pub(super) fn eventually(&mut self, mut is_so: impl FnMut(&mut Rig<B>) -> bool) {
        let start = Instant::now();
        while !is_so(self) {
            assert!(start.elapsed() < PATIENCE, "it never came");
            std::thread::yield_now();
        }
    }

    /// This driver did nothing wrong.
    pub(super) fn expect_peace(&self) {
        assert_eq!(self.control.complaint(), None);
    }

    /// It did something wrong exactly so often.
    pub(super) fn expect_errors(&self, count: u64) {
        let first = self.control.counters().first_protocol_error();
        assert_eq!(self.control.count(Count::ProtocolErrors), count, "first: {first:?}");
    }
}
