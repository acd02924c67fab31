//! A RAM disk: a memory file, mapped, lazily allocated, zero-filled at start.
//!
//! Flow: data is copied while a request is submitted; large discards and write-zeroes punch holes through the reactor's
//! ring, which gives memory back to the system. Owner of a channel: one reactor; the memory is shared by all of them.
//! **Invariant:** nobody else holds the memory file, so it cannot shrink under the mapping.

mod channel;
mod memory;

use std::sync::Arc;

use ringmill_core::bdev::{Bdev, BdevError, BdevInfo, ChannelSeed, Geometry};
use ringmill_core::io::Slots;
use ringmill_core::reactor::ReactorHandle;
use uuid::Uuid;

use crate::GateChannel;
use channel::{MallocChannel, PUNCHES_MAX};
use memory::DiskMemory;

/// What a RAM disk is made of.
#[derive(Clone, Debug)]
pub struct MallocOptions {
    /// Number of blocks.
    pub blocks_count: u64,
    /// Bytes of a block: a power of two from 512 to 64 KiB.
    pub block_bytes: u32,
    /// Identity; `None`: a random one.
    pub uuid: Option<Uuid>,
}

/// A RAM disk.
#[derive(Debug)]
pub struct MallocBdev {
    info: Arc<BdevInfo>,
    memory: Arc<DiskMemory>,
}

impl MallocBdev {
    /// Makes one full of zeroes.
    ///
    /// # Errors
    /// An impossible size, or no memory.
    pub fn new(name: &str, options: &MallocOptions) -> Result<MallocBdev, BdevError> {
        let block_bytes = options.block_bytes;
        let mut geometry = Geometry {
            block_bytes,
            physical_block_bytes: block_bytes,
            optimal_io_bytes: 0,
            blocks_count: options.blocks_count,
            read_only: false,
            write_cache: false,
            discard: true,
            discard_granularity_bytes: block_bytes,
            write_zeroes: true,
        };
        geometry.check().map_err(|reason| BdevError::Geometry { name: name.to_owned(), reason })?;
        let memory = DiskMemory::new(name, options.blocks_count * u64::from(block_bytes))?;
        geometry.discard_granularity_bytes = block_bytes.max(memory.page_bytes());
        let info = Arc::new(BdevInfo::new(name, options.uuid, "Malloc disk", geometry)?);
        Ok(MallocBdev { info, memory: Arc::new(memory) })
    }

    /// Bytes of RAM that the disk holds now.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn allocated_bytes(&self) -> Result<u64, BdevError> {
        self.memory.allocated_bytes().map_err(|source| BdevError::Io {
            name: self.info.name().to_owned(),
            what: "cannot ask for the size of the memory file".to_owned(),
            source,
        })
    }
}

impl Bdev for MallocBdev {
    fn info(&self) -> &Arc<BdevInfo> {
        &self.info
    }

    fn open_channel(&self, _home: Option<&ReactorHandle>) -> Result<ChannelSeed, BdevError> {
        let (memory, info) = (Arc::clone(&self.memory), Arc::clone(&self.info));
        let slots = Slots::new(PUNCHES_MAX);
        Ok(Box::new(move |io| {
            let channel = MallocChannel::new(memory, slots, io.ring.as_mut())?;
            Ok(Box::new(GateChannel::new(channel, info)))
        }))
    }

    fn driver_facts(&self) -> Vec<(&'static str, String)> {
        vec![
            ("page_bytes", self.memory.page_bytes().to_string()),
            (
                "allocated_bytes",
                self.allocated_bytes().map_or_else(|e| e.to_string(), |b| b.to_string()),
            ),
        ]
    }
}
