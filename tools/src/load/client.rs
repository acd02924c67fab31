//! One connection to a disk: rings, shared memory, submissions and completions.
//!
//! Owner: one thread, which polls. **Invariant:** a slot's memory belongs to its request from submission to completion.
#![expect(unsafe_code)] // UNSAFETY: mapping our own memfd, and raw buffers in it for the client crate.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use thiserror::Error;
use virtio_driver::{
    QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};

/// Why a client cannot go on.
#[derive(Debug, Error)]
pub enum ClientError {
    /// No connection.
    #[error("cannot connect to the disk at {path}: {source}")]
    Connect {
        /// The socket.
        path: String,
        /// Why not.
        source: std::io::Error,
    },
    /// A step of the set-up failed.
    #[error("cannot {what}: {source}")]
    Setup {
        /// Which step.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// A request failed.
    #[error("{what} at byte {offset} failed with errno {errno}")]
    Request {
        /// The operation.
        what: &'static str,
        /// Where.
        offset: u64,
        /// Why.
        errno: i32,
    },
    /// The disk returned other data than was written.
    #[error("wrong data at byte {offset}: expected {expected:#018x}, got {got:#018x}")]
    WrongData {
        /// Where.
        offset: u64,
        /// What was written.
        expected: u64,
        /// What came back.
        got: u64,
    },
    /// Nothing came back for too long.
    #[error("{inflight} requests were not answered within {seconds} s")]
    Hang {
        /// How many.
        inflight: usize,
        /// How long.
        seconds: u64,
    },
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// Disk to slot.
    Read,
    /// Slot to disk.
    Write,
}

/// A connected disk.
pub struct Client {
    queues: Vec<VirtioBlkQueue<'static, u32>>,
    notifiers: Vec<Box<dyn QueueNotifier>>,
    memory: MmapRaw,
    slot_bytes: usize,
    capacity_bytes: u64,
    block_bytes: u32,
    /// Dropped last: the rings lie in memory that it owns.
    transport: Box<VirtioBlkTransport>,
    _memory_file: File,
}

/// How to connect.
#[derive(Clone, Copy, Debug)]
pub struct ClientOptions {
    /// Queues.
    pub queues_count: usize,
    /// Entries of each, a power of two. A request takes three.
    pub queue_size: u16,
    /// Buffers, one per request in flight.
    pub slots_count: usize,
    /// Bytes of each.
    pub slot_bytes: usize,
    /// Virtio features to ask for besides the usual ones.
    pub features_more: u64,
    /// Virtio features not to ask for.
    pub features_less: u64,
}

impl Client {
    /// Connects with `queues_count` queues of `queue_size` entries and `slots_count` buffers of `slot_bytes` each.
    ///
    /// # Errors
    /// No server, or one that refuses.
    pub fn connect(
        socket: &Path,
        queues_count: usize,
        queue_size: u16,
        slots_count: usize,
        slot_bytes: usize,
    ) -> Result<Client, ClientError> {
        let (features_more, features_less) = (0, 0);
        let options = ClientOptions {
            queues_count,
            queue_size,
            slots_count,
            slot_bytes,
            features_more,
            features_less,
        };
        Client::connect_with(socket, &options)
    }

    /// Connects with other features than usual.
    ///
    /// # Errors
    /// No server, or one that refuses.
    pub fn connect_with(socket: &Path, options: &ClientOptions) -> Result<Client, ClientError> {
        let &ClientOptions { queues_count, queue_size, slots_count, slot_bytes, .. } = options;
        let path = socket.display().to_string();
        let setup = |what| move |source| ClientError::Setup { what, source };
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | (VirtioBlkFeatureFlags::MQ
                | VirtioBlkFeatureFlags::FLUSH
                | VirtioBlkFeatureFlags::BLK_SIZE
                | VirtioBlkFeatureFlags::DISCARD
                | VirtioBlkFeatureFlags::WRITE_ZEROES)
                .bits();
        let features = (features | options.features_more) & !options.features_less;
        let connected = VhostUser::new(&path, features)
            .map_err(|source| ClientError::Connect { path, source })?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(connected);
        let config = transport.get_config().map_err(setup("read the disk's configuration"))?;
        let queues = VirtioBlkQueue::setup_queues(&mut *transport, queues_count, queue_size)
            .map_err(setup("set up the queues"))?;
        let len = (slots_count * slot_bytes).max(4096).next_multiple_of(4096);
        let fd = memfd_create("client", MemfdFlags::CLOEXEC)
            .and_then(|fd| ftruncate(&fd, len as u64).map(|()| fd))
            .map_err(|e| ClientError::Setup { what: "allocate buffers", source: e.into() })?;
        let memory_file = File::from(fd);
        let memory =
            MmapOptions::new().len(len).map_raw(&memory_file).map_err(setup("map the buffers"))?;
        transport
            .map_mem_region(memory.as_mut_ptr() as usize, len, memory_file.as_raw_fd(), 0)
            .map_err(setup("share the buffers with the disk"))?;
        let mut notifiers = Vec::new();
        let mut queues = queues;
        for (index, queue) in queues.iter_mut().enumerate() {
            notifiers.push(transport.get_submission_notifier(index));
            queue.set_used_notif_enabled(false);
        }
        Ok(Client {
            queues,
            notifiers,
            memory,
            slot_bytes,
            capacity_bytes: config.capacity.to_native() * 512,
            block_bytes: config.blk_size.to_native().max(512),
            transport,
            _memory_file: memory_file,
        })
    }

    /// Bytes of the disk as its configuration says now.
    ///
    /// # Errors
    /// When the server does not answer.
    pub fn capacity_now(&self) -> Result<u64, ClientError> {
        let config = self.transport.get_config();
        let config = config.map_err(|source| ClientError::Setup {
            what: "read the disk's configuration",
            source,
        })?;
        Ok(config.capacity.to_native() * 512)
    }

    /// Bytes of the disk when it was connected.
    #[must_use]
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// Bytes of its block.
    #[must_use]
    pub fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// The virtio features that both ends agreed on.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.transport.get_features()
    }

    /// Queues.
    #[must_use]
    pub fn queues_count(&self) -> usize {
        self.queues.len()
    }

    /// Bytes of a slot.
    #[must_use]
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Fills a slot with what `word` says of each 8-byte word's index.
    pub fn fill_slot(&mut self, slot: u32, len_bytes: usize, word: impl Fn(u64) -> u64) {
        for (index, at) in (0u64..).zip((0..len_bytes.min(self.slot_bytes)).step_by(8)) {
            let bytes = word(index).to_le_bytes();
            // SAFETY: inside the slot, which no request uses now (contract of the caller, a single thread).
            unsafe {
                self.slot_ptr(slot).add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len())
            };
        }
    }

    /// The 8-byte words of a slot.
    pub fn read_slot(&self, slot: u32, len_bytes: usize) -> impl Iterator<Item = u64> {
        let base = self.slot_ptr(slot);
        (0..len_bytes.min(self.slot_bytes)).step_by(8).map(move |at| {
            let mut bytes = [0u8; 8];
            // SAFETY: inside the slot; the iterator borrows the client, so its memory is there.
            unsafe { base.add(at).copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
            u64::from_le_bytes(bytes)
        })
    }

    fn slot_ptr(&self, slot: u32) -> *mut u8 {
        let at = slot as usize * self.slot_bytes;
        assert!(at + self.slot_bytes <= self.memory.len(), "slot {slot} does not exist");
        // SAFETY: inside the mapping, asserted above.
        unsafe { self.memory.as_mut_ptr().add(at) }
    }

    /// Queues a transfer of the first `len_bytes` of a slot; call [`Client::kick`] after the last of a batch.
    ///
    /// # Errors
    /// When the ring is full.
    pub fn submit(
        &mut self,
        queue: usize,
        transfer: Transfer,
        offset: u64,
        slot: u32,
        len_bytes: usize,
    ) -> Result<(), ClientError> {
        assert!(len_bytes <= self.slot_bytes, "a request is larger than its slot");
        let buf = self.slot_ptr(slot);
        // SAFETY: the slot is inside the shared mapping and belongs to this request until it completes.
        let result = unsafe {
            match transfer {
                Transfer::Read => self.queues[queue].read_raw(offset, buf, len_bytes, slot),
                Transfer::Write => self.queues[queue].write_raw(offset, buf, len_bytes, slot),
            }
        };
        result.map_err(|source| ClientError::Setup { what: "queue a request", source })
    }

    /// Queues a flush.
    ///
    /// # Errors
    /// When the ring is full.
    pub fn submit_flush(&mut self, queue: usize, slot: u32) -> Result<(), ClientError> {
        self.queues[queue]
            .flush(slot)
            .map_err(|source| ClientError::Setup { what: "queue a flush", source })
    }

    /// Queues a discard, or (with `zero`) a write-zeroes that may unmap or not.
    ///
    /// # Errors
    /// When the ring is full.
    pub fn submit_range(
        &mut self,
        queue: usize,
        offset: u64,
        len_bytes: u64,
        zero: Option<bool>,
        slot: u32,
    ) -> Result<(), ClientError> {
        let result = match zero {
            None => self.queues[queue].discard(offset, len_bytes, slot),
            Some(unmap) => self.queues[queue].write_zeroes(offset, len_bytes, unmap, slot),
        };
        result.map_err(|source| ClientError::Setup { what: "queue a range", source })
    }

    /// Tells the disk of new requests, if it wants to be told.
    ///
    /// # Errors
    /// When the kick descriptor is broken.
    #[inline]
    pub fn kick(&mut self, queue: usize) -> Result<(), ClientError> {
        if self.queues[queue].avail_notif_needed() {
            self.notifiers[queue]
                .notify()
                .map_err(|source| ClientError::Setup { what: "kick the disk", source })?;
        }
        Ok(())
    }

    /// Appends the finished requests of a queue as (slot, result: 0 or negative errno).
    #[inline]
    pub fn completions(&mut self, queue: usize, out: &mut Vec<(u32, i32)>) {
        out.extend(self.queues[queue].completions().map(|c| (c.context, c.ret)));
    }
}
