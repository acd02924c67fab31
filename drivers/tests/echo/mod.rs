//! An NVMe queue pair whose device answers every command at once, on the same thread, and looks at nothing.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use ringmill_core::bdev::{Bdev, BdevError, BdevInfo, ChannelSeed, Geometry};
use ringmill_core::mem::{DmaDomain, DmaError, IovaOffset, Mapping, SharedSlice};
use ringmill_core::reactor::{DeviceKey, ReactorHandle};
use ringmill_drivers::GateChannel;
use ringmill_drivers::nvme::{
    DiscardLimits, Interrupts, NamespaceShape, NvmeChannel, Order, QueueMemory, QueuePair,
    QueuePairParts, QueueShared, WriteZeroesLimits,
};
use ringmill_drivers::pci::Registers;
use rustix::event::{EventfdFlags, eventfd};

const ENTRIES: u16 = 64;

#[derive(Debug, Default)]
struct Everything(Mutex<Option<Arc<Mapping>>>);

impl DmaDomain for Everything {
    /// Keeps the first: the queues.
    fn map(&self, mapping: &Arc<Mapping>) -> Result<(), DmaError> {
        self.0.lock().unwrap().get_or_insert_with(|| Arc::clone(mapping));
        Ok(())
    }

    fn unmap(&self, _mapping: &Arc<Mapping>) {}

    fn offset(&self) -> IovaOffset {
        IovaOffset(1 << 40)
    }
}

struct Rings {
    sq: SharedSlice,
    cq: SharedSlice,
    head: u16,
    tail: u16,
    phase: bool,
    /// Every hundredth command is to be sent again.
    count: u32,
}

/// The doorbells, behind which the device is.
struct Echo(Mutex<Rings>, AtomicU32);

impl Registers for Echo {
    fn len_bytes(&self) -> usize {
        8
    }

    fn read_u32(&self, _offset_bytes: usize) -> u32 {
        self.1.load(Ordering::Relaxed)
    }

    fn write_u32(&self, offset_bytes: usize, value: u32) {
        if offset_bytes != 0 {
            return;
        }
        let mut rings = self.0.lock().unwrap();
        while u32::from(rings.head) != value {
            let command = rings.sq.load_u32(usize::from(rings.head) * 64, Ordering::Relaxed);
            rings.head = (rings.head + 1) % ENTRIES;
            rings.count += 1;
            let status: u32 = if rings.count.is_multiple_of(100) { 0x22 } else { 0 };
            let at = usize::from(rings.tail) * 16;
            let (head, phase) = (u32::from(rings.head), u32::from(rings.phase));
            rings.cq.store_u32(at + 8, 1 << 16 | head, Ordering::Relaxed);
            let word = status << 17 | phase << 16 | command >> 16;
            rings.cq.store_u32(at + 12, word, Ordering::Release);
            rings.tail = (rings.tail + 1) % ENTRIES;
            rings.phase ^= rings.tail == 0;
        }
    }
}

/// A disk on it, one channel only.
pub(crate) struct EchoBdev {
    info: Arc<BdevInfo>,
    sgl: bool,
}

impl EchoBdev {
    pub(crate) fn new(sgl: bool) -> EchoBdev {
        let geometry = Geometry {
            block_bytes: 512,
            physical_block_bytes: 512,
            optimal_io_bytes: 0,
            blocks_count: 1 << 16,
            read_only: false,
            write_cache: true,
            discard: true,
            discard_granularity_bytes: 512,
            write_zeroes: true,
        };
        EchoBdev { info: Arc::new(BdevInfo::new("echo", None, "NVMe", geometry).unwrap()), sgl }
    }
}

impl Bdev for EchoBdev {
    fn info(&self) -> &Arc<BdevInfo> {
        &self.info
    }

    fn open_channel(&self, _home: Option<&ReactorHandle>) -> Result<ChannelSeed, BdevError> {
        let everything = Arc::new(Everything::default());
        let domain: Arc<dyn DmaDomain> = Arc::<Everything>::clone(&everything);
        let memory = Arc::new(QueueMemory::new(&domain, ENTRIES).unwrap());
        let map = everything.0.lock().unwrap().clone().unwrap();
        let cq_at = usize::try_from(memory.cq_iova().0 - memory.sq_iova().0).unwrap();
        let window = |at, entry_bytes| {
            SharedSlice::new(&map, at, usize::from(ENTRIES) * entry_bytes, 64).unwrap()
        };
        let (sq, cq) = (window(0, 64), window(cq_at, 16));
        let rings = Rings { sq, cq, head: 0, tail: 0, phase: true, count: 0 };
        let nudge = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let shared = Arc::new(QueueShared::new(nudge));
        shared.order(Order::Run);
        let pair = QueuePair::new(QueuePairParts {
            key: DeviceKey(1),
            queue_id: 1,
            memory,
            registers: Arc::new(Echo(Mutex::new(rings), AtomicU32::new(0))),
            sq_doorbell_bytes: 0,
            cq_doorbell_bytes: 4,
            shadow: None,
            interrupts: Interrupts::None,
            shared,
            timeout_ns: 1_000_000_000,
        })
        .unwrap();
        let shape = NamespaceShape {
            info: Arc::clone(&self.info),
            nsid: 1,
            block_shift: 9,
            transfer_bytes_max: 8192,
            boundary_bytes: 0,
            sgl: self.sgl,
            write_cache: true,
            discard: Some(DiscardLimits {
                ranges_max: 4,
                range_blocks_max: 8,
                blocks_max: u64::MAX,
            }),
            write_zeroes: Some(WriteZeroesLimits { blocks_max: 64, deallocate: true }),
        };
        let mut channel = NvmeChannel::<Echo>::new(&shape, ENTRIES - 1);
        let (info, rules) = (Arc::clone(&self.info), shape.alignment());
        Ok(Box::new(move |io| {
            let slot = io.devices.insert(DeviceKey(1), Box::new(pair));
            channel.join(io, slot)?;
            let channel = ringmill_core::bdev::AlignChannel::new(channel, rules, None);
            Ok(Box::new(GateChannel::new(channel, info)))
        }))
    }
}
