//! HOT PATH
//! A disk that does the least a disk can do, in a thread of this process: what client and machine can reach at most.
//!
//! It reads each request's descriptors and header, writes status and used entry, checks nothing and records nothing.
//! Owner: its thread, on a core of its own. **Invariant:** it reads and writes the same shared bytes as a real device
//! of such a ring, and publishes once per batch.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use ringmill_core::spec::virtio_blk::S_OK;
use ringmill_core::spec::virtio_ring::{
    DESC_BYTES, RING_HEADER_BYTES, USED_ELEM_BYTES, USED_F_NO_NOTIFY, desc_table_bytes,
};
use ringmill_core::units::usize_of;

use super::layout::{QueueLayout, STATUS_AT};
use super::memory::{LoadMemory, Window};

const IDX_AT: usize = 2;
/// Event suppression of a packed ring: flags, and their value for no kicks.
const EVENT_FLAGS_AT: usize = 2;
const EVENT_FLAGS_DISABLE: u16 = 1;
const SPLIT_INDIRECT: u64 = 1 << (32 + 2);
const PACKED_INDIRECT: u64 = 1 << (48 + 2);
const PACKED_AVAIL: u64 = 1 << (48 + 7);
const PACKED_USED: u64 = 1 << (48 + 15);
const PACKED_NEXT: u64 = 1 << 48;

/// The bare device of one queue.
#[derive(Debug)]
pub(crate) struct BareDevice {
    desc: Window,
    driver: Window,
    device: Window,
    lines: Window,
    lines_addr: u64,
    size: u16,
    avail_idx: u16,
    used_idx: u16,
    wrap: bool,
    packed: bool,
    sum: u64,
}

impl BareDevice {
    /// A device for the queue whose memory begins at `base`.
    #[cold]
    pub(crate) fn new(memory: &LoadMemory, layout: &QueueLayout, base: usize) -> BareDevice {
        let (driver_bytes, device_bytes) = layout.part_bytes();
        let lines_at = base + layout.lines_at;
        let device = memory.window(base + layout.device_at, device_bytes);
        if layout.form.packed {
            device.store_u16(EVENT_FLAGS_AT, EVENT_FLAGS_DISABLE, Ordering::Release);
        } else {
            device.store_u16(0, USED_F_NO_NOTIFY, Ordering::Release);
        }
        BareDevice {
            desc: memory.window(base + layout.desc_at, desc_table_bytes(layout.size)),
            driver: memory.window(base + layout.driver_at, driver_bytes),
            device,
            lines: memory.window(lines_at, usize::from(layout.depth) * layout.line_bytes()),
            lines_addr: memory.guest_addr(lines_at as u64),
            size: layout.size,
            avail_idx: 0,
            used_idx: 0,
            wrap: true,
            packed: layout.form.packed,
            sum: 0,
        }
    }

    #[inline]
    fn desc(&self, at: u16) -> [u64; 2] {
        let offset = usize::from(at) * DESC_BYTES;
        let word = |at| self.desc.load_u64(at, Ordering::Relaxed);
        [word(offset), word(offset + 8)]
    }

    /// Reads the header at this address and writes the status beside it.
    #[inline]
    fn answer(&mut self, header_addr: u64) {
        let line = usize_of(header_addr - self.lines_addr);
        self.sum = self.sum.wrapping_add(self.lines.load_u64(line, Ordering::Relaxed));
        self.sum = self.sum.wrapping_add(self.lines.load_u64(line + 8, Ordering::Relaxed));
        self.lines.store_u8(line + STATUS_AT, S_OK);
    }

    /// Reads the slot's indirect table; the header's address.
    #[inline]
    fn walk_table(&mut self, table_addr: u64) -> u64 {
        let table = usize_of(table_addr - self.lines_addr);
        let word = |at| self.lines.load_u64(table + at, Ordering::Relaxed);
        let header = word(0);
        self.sum = self.sum.wrapping_add(word(16)).wrapping_add(word(32));
        header
    }

    /// Serves what is there; the number of requests.
    #[inline]
    pub(crate) fn serve(&mut self) -> usize {
        if self.packed { self.serve_packed() } else { self.serve_split() }
    }

    fn serve_split(&mut self) -> usize {
        let idx = self.driver.load_u16(IDX_AT, Ordering::Acquire);
        let count = idx.wrapping_sub(self.avail_idx);
        for _ in 0..count {
            let ring_slot = usize::from(self.avail_idx & (self.size - 1));
            let head = self.driver.load_u16(RING_HEADER_BYTES + 2 * ring_slot, Ordering::Relaxed);
            let [mut header, rest] = self.desc(head);
            let mut next = rest;
            if rest & SPLIT_INDIRECT != 0 {
                header = self.walk_table(header);
            }
            // The data's and the status' descriptors, as every device reads them.
            while (next >> 32) & 1 != 0 {
                let [addr, rest] = self.desc(u16::try_from(next >> 48).unwrap_or(0));
                self.sum = self.sum.wrapping_add(addr);
                next = rest;
            }
            self.answer(header);
            let used = RING_HEADER_BYTES + USED_ELEM_BYTES * ring_slot;
            // Used elements lie on multiples of 4 only.
            self.device.store_u32(used, u32::from(head));
            self.device.store_u32(used + 4, 1);
            self.avail_idx = self.avail_idx.wrapping_add(1);
        }
        if count > 0 {
            self.used_idx = self.used_idx.wrapping_add(count);
            self.device.store_u16(IDX_AT, self.used_idx, Ordering::Release);
        }
        usize::from(count)
    }

    #[inline]
    fn step(&mut self) {
        self.avail_idx += 1;
        if self.avail_idx == self.size {
            self.avail_idx = 0;
            self.wrap = !self.wrap;
        }
    }

    fn serve_packed(&mut self) -> usize {
        let mut first = None;
        let mut count = 0;
        // One round of the ring at most.
        while count < usize::from(self.size) {
            let (start, wrap) = (self.avail_idx, self.wrap);
            let offset = usize::from(start) * DESC_BYTES;
            let expected = if wrap { PACKED_AVAIL } else { PACKED_USED };
            let mut rest = self.desc.load_u64(offset + 8, Ordering::Acquire);
            if rest & (PACKED_AVAIL | PACKED_USED) != expected {
                break;
            }
            let mut header = self.desc.load_u64(offset, Ordering::Relaxed);
            if rest & PACKED_INDIRECT != 0 {
                header = self.walk_table(header);
            }
            self.step();
            while rest & PACKED_NEXT != 0 {
                let [addr, next] = self.desc(self.avail_idx);
                self.sum = self.sum.wrapping_add(addr);
                rest = next;
                self.step();
            }
            self.answer(header);
            let flags = if wrap { PACKED_AVAIL | PACKED_USED } else { 0 };
            let word = (rest & 0xffff_0000_0000) | 1 | flags;
            // The first of a batch is shown last.
            match first {
                None => first = Some((offset + 8, word)),
                Some(_) => self.desc.store_u64(offset + 8, word, Ordering::Release),
            }
            count += 1;
        }
        if let Some((offset, word)) = first {
            self.desc.store_u64(offset, word, Ordering::Release);
        }
        count
    }
}

/// Bare devices in a thread; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Floor {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Floor {
    /// Serves the devices on `core` until dropped.
    #[cold]
    pub(crate) fn start(mut devices: Vec<BareDevice>, core: u32) -> std::io::Result<Floor> {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("floor".into()).spawn(move || {
            // On one core only it would run between the client's turns: slow, but right.
            let _ = super::pin_to(core);
            while !seen.load(Ordering::Relaxed) {
                for device in &mut devices {
                    device.serve();
                }
                std::hint::spin_loop();
            }
        })?;
        Ok(Floor { stop, thread: Some(thread) })
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It does nothing that could fail.
            let _ = thread.join();
        }
    }
}
