//! A device that takes every request and never touches data: what a guest's I/O path costs without a medium.
//!
//! Flow: a request is complete when it is submitted; reads leave memory as it was. Owner of a channel: one reactor.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ringmill_core::IoStatus;
use ringmill_core::bdev::{Bdev, BdevError, BdevInfo, ChannelSeed, Geometry, InstantChannel};
use ringmill_core::reactor::ReactorHandle;
use uuid::Uuid;

use crate::GateChannel;

/// What a null device is made of.
#[derive(Clone, Debug)]
pub struct NullOptions {
    /// Number of blocks.
    pub blocks_count: u64,
    /// Bytes of a block: a power of two from 512 to 64 KiB.
    pub block_bytes: u32,
    /// Identity; `None`: a random one.
    pub uuid: Option<Uuid>,
}

/// A null device.
#[derive(Debug)]
pub struct NullBdev {
    info: Arc<BdevInfo>,
    /// The size that the next rescan finds.
    next_blocks: AtomicU64,
}

impl NullBdev {
    /// Makes one.
    ///
    /// # Errors
    /// An impossible size.
    pub fn new(name: &str, options: &NullOptions) -> Result<NullBdev, BdevError> {
        let geometry = Geometry {
            block_bytes: options.block_bytes,
            physical_block_bytes: options.block_bytes,
            optimal_io_bytes: 0,
            blocks_count: options.blocks_count,
            read_only: false,
            write_cache: false,
            discard: true,
            discard_granularity_bytes: options.block_bytes,
            write_zeroes: true,
        };
        let info = Arc::new(BdevInfo::new(name, options.uuid, "Null disk", geometry)?);
        Ok(NullBdev { info, next_blocks: AtomicU64::new(options.blocks_count) })
    }

    /// Sets the size that [`Bdev::rescan`] reports from now on.
    ///
    /// # Errors
    /// An impossible size.
    pub fn set_size(&self, blocks_count: u64) -> Result<(), BdevError> {
        let geometry = Geometry { blocks_count, ..self.info.geometry().clone() };
        geometry
            .check()
            .map_err(|reason| BdevError::Geometry { name: self.info.name().to_owned(), reason })?;
        self.next_blocks.store(blocks_count, Ordering::Relaxed);
        Ok(())
    }
}

impl Bdev for NullBdev {
    fn info(&self) -> &Arc<BdevInfo> {
        &self.info
    }

    fn open_channel(&self, _home: Option<&ReactorHandle>) -> Result<ChannelSeed, BdevError> {
        let channel =
            Box::new(GateChannel::new(InstantChannel::new(IoStatus::Ok), Arc::clone(&self.info)));
        Ok(Box::new(move |_io| Ok(channel)))
    }

    fn rescan(&self) -> Result<u64, BdevError> {
        Ok(self.next_blocks.load(Ordering::Relaxed))
    }
}
