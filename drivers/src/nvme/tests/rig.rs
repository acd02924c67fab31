//! A device that does what the specification says in the plainest way, by hand, and a reactor to go with it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ringmill_core::bdev::{BdevInfo, Channel, Geometry};
use ringmill_core::io::{Batch, Completions, IoFlags, IoOp, IoRequest, Tag};
use ringmill_core::mem::{DmaDomain, DmaError, IovaOffset, Mapping, Segment, SharedSlice};
use ringmill_core::reactor::{DeviceKey, DeviceSlot, ReactorCx};
use ringmill_core::spec::nvme::{CQE_BYTES, PSDT_SGL, SQE_BYTES, Sqe, nvm, sgl};
use ringmill_core::units::{Iova, bytes_u64, usize_of};
use rustix::event::{EventfdFlags, eventfd};

use super::super::NvmeChannel;
use super::super::parts::{
    DiscardLimits, Interrupts, NamespaceShape, QueueMemory, QueuePairParts, ShadowDoorbells,
    WriteZeroesLimits,
};
use super::super::qpair::QueuePair;
use super::super::shared::{Order, QueueShared};
use crate::pci::Registers;

pub(super) const SQ_DOORBELL: usize = 0x1008;
pub(super) const CQ_DOORBELL: usize = 0x100c;
pub(super) const QUEUE_ID: u16 = 3;
pub(super) const MEMORY_BYTES: usize = 32 << 20;
pub(super) const PAGE: u64 = 4096;

/// Doorbells, and how often they were written.
#[derive(Debug, Default)]
pub(super) struct TestRegisters {
    sq: AtomicU32,
    cq: AtomicU32,
    pub(super) writes: AtomicU64,
}

impl Registers for TestRegisters {
    fn len_bytes(&self) -> usize {
        0x2000
    }

    fn read_u32(&self, offset_bytes: usize) -> u32 {
        match offset_bytes {
            SQ_DOORBELL => self.sq.load(Ordering::Relaxed),
            CQ_DOORBELL => self.cq.load(Ordering::Relaxed),
            _ => u32::MAX,
        }
    }

    fn write_u32(&self, offset_bytes: usize, value: u32) {
        self.writes.fetch_add(1, Ordering::Relaxed);
        match offset_bytes {
            SQ_DOORBELL => self.sq.store(value, Ordering::Relaxed),
            CQ_DOORBELL => self.cq.store(value, Ordering::Relaxed),
            other => panic!("a write to {other:#x}"),
        }
    }
}

/// An IOMMU of the plainest kind.
#[derive(Debug, Default)]
pub(super) struct TestDomain {
    maps: Mutex<Vec<Arc<Mapping>>>,
}

pub(super) const OFFSET: IovaOffset = IovaOffset(0x1234_5000);

impl DmaDomain for TestDomain {
    fn map(&self, mapping: &Arc<Mapping>) -> Result<(), DmaError> {
        self.maps.lock().unwrap().push(Arc::clone(mapping));
        Ok(())
    }

    fn unmap(&self, mapping: &Arc<Mapping>) {
        self.maps.lock().unwrap().retain(|map| !Arc::ptr_eq(map, mapping));
    }

    fn offset(&self) -> IovaOffset {
        OFFSET
    }
}

impl TestDomain {
    /// What lies there, all of it inside one mapping.
    pub(super) fn segment(&self, iova: u64, len_bytes: u64) -> Segment {
        for map in self.maps.lock().unwrap().iter() {
            let window = SharedSlice::new(map, 0, map.len_bytes(), 1).unwrap();
            let start = window.iova(OFFSET).0;
            if iova >= start && iova + len_bytes <= start + bytes_u64(map.len_bytes()) {
                return window.segment(usize_of(iova - start), usize_of(len_bytes)).unwrap();
            }
        }
        panic!("an IOMMU fault at {iova:#x} of {len_bytes} bytes");
    }

    fn u64_at(&self, iova: u64) -> u64 {
        let mut bytes = [0; 8];
        assert_eq!(self.segment(iova, 8).read_into(&mut bytes), 8);
        u64::from_le_bytes(bytes)
    }

    /// The pieces of memory that a command's data pointer names, as a device walks it; panics on what one would refuse.
    pub(super) fn walk(&self, entry: &Sqe, len_bytes: u64) -> Vec<(u64, u64)> {
        let (first, second) = (entry.u64_at(6), entry.u64_at(8));
        if entry.0[0] & PSDT_SGL != 0 {
            return self.walk_sgl(first, second, len_bytes);
        }
        assert_eq!(first % 4, 0, "PRP1 {first:#x}");
        let mut pieces = vec![(first, (PAGE - first % PAGE).min(len_bytes))];
        let mut left = len_bytes - pieces[0].1;
        if left == 0 {
            return pieces;
        }
        let count = left.div_ceil(PAGE);
        let page = |number: u64| match count {
            1 => second,
            _ => self.u64_at(second + 8 * number),
        };
        if count > 1 {
            assert_eq!(second % PAGE, 0, "a list");
            assert!(count <= PAGE / 8, "{count} entries in one page");
        }
        for number in 0..count {
            let at = page(number);
            assert_eq!(at % PAGE, 0, "PRP entry {number} of {count}: {at:#x}");
            pieces.push((at, left.min(PAGE)));
            left -= left.min(PAGE);
        }
        pieces
    }

    fn walk_sgl(&self, first: u64, second: u64, len_bytes: u64) -> Vec<(u64, u64)> {
        let of = |upper: u64| (upper >> 56, upper & 0xffff_ffff);
        let (kind, bytes) = of(second);
        let mut pieces = Vec::new();
        if kind == u64::from(sgl::DATA_BLOCK) {
            pieces.push((first, bytes));
        } else {
            assert_eq!(kind, u64::from(sgl::LAST_SEGMENT));
            assert!(
                bytes.is_multiple_of(16) && (1..=PAGE).contains(&bytes) && first.is_multiple_of(16)
            );
            for at in (first..first + bytes).step_by(16) {
                let (kind, bytes) = of(self.u64_at(at + 8));
                assert_eq!(kind, u64::from(sgl::DATA_BLOCK));
                pieces.push((self.u64_at(at), bytes));
            }
        }
        assert!(pieces.iter().all(|(at, bytes)| at % 4 == 0 && bytes % 4 == 0 && *bytes > 0));
        let sum: u64 = pieces.iter().map(|(_, bytes)| bytes).sum();
        assert_eq!(sum, len_bytes, "SGL length");
        pieces
    }
}

/// The device's side of a pair.
pub(super) struct Device {
    pub(super) domain: Arc<TestDomain>,
    registers: Arc<TestRegisters>,
    sq: SharedSlice,
    cq: SharedSlice,
    entries: u16,
    pub(super) sq_head: u16,
    pub(super) cq_tail: u16,
    pub(super) phase: bool,
    /// Where doorbells in memory are.
    shadow: Option<(SharedSlice, SharedSlice)>,
    /// Fetched and not answered.
    pub(super) fetched: VecDeque<Sqe>,
    pub(super) disk: Vec<u8>,
    pub(super) block_bytes: u64,
    /// Every command that was done: opcode, first block, blocks, dword 12.
    pub(super) log: Vec<(u8, u64, u64, u32)>,
}

impl Device {
    fn tail(&self) -> u16 {
        let register = self.registers.read_u32(SQ_DOORBELL);
        let tail = match &self.shadow {
            // It looks by itself up to the index that it has set, and at a register write.
            Some((values, _)) => values.load_u32(0, Ordering::Acquire),
            None => register,
        };
        u16::try_from(tail).unwrap()
    }

    /// Fetches what the doorbell shows.
    pub(super) fn fetch(&mut self) {
        let tail = self.tail();
        assert!(tail < self.entries);
        while self.sq_head != tail {
            let words = self.sq.load_entry(usize::from(self.sq_head) * SQE_BYTES);
            self.fetched.push_back(Sqe(words));
            self.sq_head = (self.sq_head + 1) % self.entries;
        }
    }

    /// Tells the driver up to where no register writes are needed.
    pub(super) fn set_event_index(&self, value: u16) {
        let (_, indices) = self.shadow.as_ref().unwrap();
        indices.store_u32(0, u32::from(value), Ordering::Release);
    }

    /// Posts a completion, whatever it says.
    pub(super) fn post(&mut self, cid: u16, status: u16, sq_head: u16) {
        let at = usize::from(self.cq_tail) * CQE_BYTES;
        let upper = u32::from(status) << 17 | u32::from(self.phase) << 16 | u32::from(cid);
        self.cq.store_u32(
            at + 8,
            u32::from(QUEUE_ID) << 16 | u32::from(sq_head),
            Ordering::Relaxed,
        );
        self.cq.store_u32(at + 12, upper, Ordering::Release);
        self.cq_tail = (self.cq_tail + 1) % self.entries;
        self.phase ^= self.cq_tail == 0;
        let head = u16::try_from(self.registers.read_u32(CQ_DOORBELL)).unwrap();
        assert!(self.shadow.is_some() || head != self.cq_tail, "the completion queue overflows");
    }

    /// Does a command and answers.
    pub(super) fn answer(&mut self, entry: Sqe) {
        self.perform(&entry);
        self.post(cid(&entry), 0, self.sq_head);
    }

    /// Does everything that is there.
    pub(super) fn serve(&mut self) {
        self.fetch();
        while let Some(entry) = self.fetched.pop_front() {
            self.answer(entry);
        }
    }

    pub(super) fn perform(&mut self, entry: &Sqe) {
        let opcode = entry.0[0].to_le_bytes()[0];
        assert_eq!(entry.0[1], 7, "the namespace");
        assert!(entry.0[2..6].iter().chain(&entry.0[13..]).all(|&word| word == 0), "{entry:?}");
        let lba = entry.u64_at(10);
        let mut blocks = u64::from(entry.0[12] & 0xffff) + 1;
        let place = |lba: u64, blocks: u64| {
            usize_of(lba * self.block_bytes)..usize_of((lba + blocks) * self.block_bytes)
        };
        match opcode {
            nvm::READ | nvm::WRITE => {
                let range = place(lba, blocks);
                let mut at = range.start;
                for (iova, bytes) in self.domain.walk(entry, bytes_u64(range.len())) {
                    let segment = self.domain.segment(iova, bytes);
                    let data = &mut self.disk[at..at + usize_of(bytes)];
                    let moved = if opcode == nvm::READ {
                        segment.write_from(data)
                    } else {
                        segment.read_into(data)
                    };
                    at += moved;
                }
                assert_eq!(at, range.end);
            }
            nvm::WRITE_ZEROES => self.disk[place(lba, blocks)].fill(0),
            nvm::DSM => {
                assert_eq!(entry.0[11], nvm::DSM_DEALLOCATE);
                let list = entry.u64_at(6);
                for number in 0..u64::from(entry.0[10]) + 1 {
                    let head = self.domain.u64_at(list + 16 * number);
                    let lba = self.domain.u64_at(list + 16 * number + 8);
                    blocks = head >> 32;
                    assert!(head & 0xffff_ffff == 0 && blocks > 0);
                    self.disk[place(lba, blocks)].fill(0xdd);
                    self.log.push((opcode, lba, blocks, entry.0[10]));
                }
                return;
            }
            nvm::FLUSH => assert_eq!(lba, 0),
            other => panic!("opcode {other}"),
        }
        self.log.push((opcode, lba, blocks, entry.0[12]));
    }

    /// As after a reset and new queues.
    pub(super) fn reset(&mut self) {
        (self.sq_head, self.cq_tail, self.phase) = (0, 0, true);
        self.fetched.clear();
        self.registers.sq.store(0, Ordering::Relaxed);
        self.registers.cq.store(0, Ordering::Relaxed);
    }
}

pub(super) fn cid(entry: &Sqe) -> u16 {
    u16::try_from(entry.0[0] >> 16).unwrap()
}

/// What a rig is made like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Options {
    pub(super) entries: u16,
    pub(super) channels: usize,
    pub(super) block_shift: u32,
    pub(super) transfer_bytes_max: u32,
    pub(super) boundary_bytes: u32,
    pub(super) sgl: bool,
    pub(super) write_cache: bool,
    pub(super) discard: Option<DiscardLimits>,
    pub(super) write_zeroes: Option<WriteZeroesLimits>,
    pub(super) shadow: bool,
    pub(super) timeout_ns: u64,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            entries: 64,
            channels: 1,
            block_shift: 9,
            transfer_bytes_max: 128 << 10,
            boundary_bytes: 0,
            sgl: false,
            write_cache: true,
            discard: Some(DiscardLimits {
                ranges_max: 256,
                range_blocks_max: u32::MAX,
                blocks_max: u64::MAX,
            }),
            write_zeroes: Some(WriteZeroesLimits { blocks_max: 1 << 16, deallocate: true }),
            shadow: false,
            timeout_ns: 0,
        }
    }
}

/// The whole.
pub(super) struct Rig {
    pub(super) cx: ReactorCx,
    pub(super) device: Device,
    pub(super) registers: Arc<TestRegisters>,
    pub(super) shared: Arc<QueueShared>,
    pub(super) slot: DeviceSlot,
    pub(super) channels: Vec<NvmeChannel<TestRegisters>>,
    pub(super) memory: SharedSlice,
    batch: Batch,
}

pub(super) const DISK_BYTES: u64 = 8 << 20;

pub(super) fn shape(options: &Options) -> NamespaceShape {
    let block_bytes = 1 << options.block_shift;
    let geometry = Geometry {
        block_bytes,
        physical_block_bytes: block_bytes,
        optimal_io_bytes: 0,
        blocks_count: DISK_BYTES >> options.block_shift,
        read_only: false,
        write_cache: options.write_cache,
        discard: true,
        discard_granularity_bytes: block_bytes,
        write_zeroes: true,
    };
    NamespaceShape {
        info: Arc::new(BdevInfo::new("test", None, "NVMe", geometry).unwrap()),
        nsid: 7,
        block_shift: options.block_shift,
        transfer_bytes_max: options.transfer_bytes_max,
        boundary_bytes: options.boundary_bytes,
        sgl: options.sgl,
        write_cache: options.write_cache,
        discard: options.discard,
        write_zeroes: options.write_zeroes,
    }
}

impl Rig {
    pub(super) fn new(options: &Options) -> Rig {
        let domain = Arc::new(TestDomain::default());
        let as_domain: Arc<dyn DmaDomain> = Arc::<TestDomain>::clone(&domain);
        let memory = Arc::new(QueueMemory::new(&as_domain, options.entries).unwrap());
        let registers = Arc::new(TestRegisters::default());
        let nudge = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let shared = Arc::new(QueueShared::new(nudge));
        let page = || Arc::new(Mapping::pool(4096).unwrap());
        let (doorbells, event_indices) = (page(), page());
        let window = |map: &Arc<Mapping>| SharedSlice::new(map, 24, 4, 4).unwrap();
        let windows = (window(&doorbells), window(&event_indices));
        let parts = QueuePairParts {
            key: DeviceKey(1),
            queue_id: QUEUE_ID,
            memory: Arc::clone(&memory),
            registers: Arc::clone(&registers),
            sq_doorbell_bytes: SQ_DOORBELL,
            cq_doorbell_bytes: CQ_DOORBELL,
            shadow: options.shadow.then_some(ShadowDoorbells {
                doorbells,
                event_indices,
                sq_at_bytes: 24,
                cq_at_bytes: 28,
            }),
            interrupts: Interrupts::None,
            shared: Arc::clone(&shared),
            timeout_ns: options.timeout_ns,
        };
        let mut cx = ReactorCx::simulated(1).unwrap();
        let pair = QueuePair::new(parts).unwrap();
        let slot = cx.io.devices.insert(DeviceKey(1), Box::new(pair));
        let shape = shape(options);
        let channels = (0..options.channels)
            .map(|_| {
                let mut channel = NvmeChannel::new(&shape, options.entries - 1);
                channel.join(&mut cx.io, slot).unwrap();
                channel
            })
            .collect();
        let data = Arc::new(Mapping::pool(MEMORY_BYTES).unwrap());
        domain.map(&data).unwrap();
        let ring = |iova: Iova, bytes: usize| {
            let maps = domain.maps.lock().unwrap();
            let start = SharedSlice::new(&maps[0], 0, 8, 8).unwrap().iova(OFFSET).0;
            SharedSlice::new(&maps[0], usize_of(iova.0 - start), bytes, 64).unwrap()
        };
        let entries = usize::from(options.entries);
        let (sq, cq) = (
            ring(memory.sq_iova(), entries * SQE_BYTES),
            ring(memory.cq_iova(), entries * CQE_BYTES),
        );
        let device = Device {
            registers: Arc::clone(&registers),
            sq,
            cq,
            entries: options.entries,
            sq_head: 0,
            cq_tail: 0,
            phase: true,
            shadow: options.shadow.then_some(windows),
            fetched: VecDeque::new(),
            disk: (0..usize_of(DISK_BYTES)).map(|at| at.to_le_bytes()[1] ^ 0x5a).collect(),
            block_bytes: 1 << options.block_shift,
            log: Vec::new(),
            domain,
        };
        let memory = SharedSlice::new(&data, 0, MEMORY_BYTES, 4096).unwrap();
        let mut rig =
            Rig { cx, device, registers, shared, slot, channels, memory, batch: Batch::new() };
        rig.order(Order::Run);
        rig
    }

    /// Gives an order and has it obeyed.
    pub(super) fn order(&mut self, order: Order) {
        self.shared.order(order);
        self.commit();
        assert!(self.shared.is_obeyed());
    }

    pub(super) fn commit(&mut self) {
        self.cx.io.devices.commit(self.cx.io.clock.now_ns());
    }

    pub(super) fn later(&mut self, by_ns: u64) {
        self.cx.io.clock.advance_ns(by_ns);
        self.commit();
    }

    pub(super) fn pair(&mut self) -> &mut QueuePair<TestRegisters> {
        self.cx.io.devices.get_mut(self.slot).unwrap()
    }

    pub(super) fn segment(&self, at_bytes: usize, len_bytes: usize) -> Segment {
        self.memory.segment(at_bytes, len_bytes).unwrap()
    }

    /// Offers a request to a channel once.
    pub(super) fn offer(
        &mut self,
        channel: usize,
        tag: u32,
        (op, flags): (IoOp, IoFlags),
        (offset_bytes, len_bytes): (u64, u64),
        segments: &[Segment],
    ) -> bool {
        let tag = Tag(tag);
        let (segments_at, segments_count) = (0, 0);
        let request =
            IoRequest { offset_bytes, len_bytes, tag, segments_at, segments_count, op, flags };
        self.batch.single(request, segments);
        self.channels[channel].submit(&mut self.cx.io, self.batch.view()) == 1
    }

    /// A page read.
    pub(super) fn read(&mut self, channel: usize, tag: u32) -> bool {
        let page = [self.segment(0, 4096)];
        self.offer(channel, tag, (IoOp::Read, IoFlags::NONE), (4096, 4096), &page)
    }

    pub(super) fn poll(&mut self, channel: usize) -> Completions {
        let mut done = Completions::new();
        self.channels[channel].poll(&mut self.cx.io, &mut done);
        done
    }

    /// The tags that a poll hands back, all well.
    pub(super) fn tags(&mut self, channel: usize) -> Vec<u32> {
        let done = self.poll(channel);
        assert!(done.iter().all(|ended| ended.status.is_ok()), "{done:?}");
        done.iter().map(|ended| ended.tag.0).collect()
    }
}
