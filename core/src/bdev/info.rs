//! A block device as control threads see it.
//!
//! **Invariant:** everything but the size is fixed for the life of a bdev; the size changes only through `set_blocks`,
//! and every channel bounds requests by the size it reads for that request.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use thiserror::Error;
use uuid::Uuid;

use crate::limits::{BLOCK_BYTES_MAX, SECTOR_BYTES};
use crate::mem::DmaDomain;
use crate::reactor::{IoCx, ReactorHandle, RingError};

use super::Channel;

/// Why a bdev or a channel could not be made.
#[derive(Debug, Error)]
pub enum BdevError {
    /// The reactor's ring is full or refuses.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] crate::mem::MappingError),
    /// An impossible geometry.
    #[error("{name:?}: {reason}")]
    Geometry {
        /// The bdev.
        name: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The kernel refused something.
    #[error("{name:?}: {what}: {source}")]
    Io {
        /// The bdev.
        name: String,
        /// What was tried.
        what: String,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// Anything else that a user can mend.
    #[error("{name:?}: {reason}")]
    Refused {
        /// The bdev.
        name: String,
        /// What is wrong and what to do.
        reason: String,
    },
}

/// Builds a channel on the reactor that will use it. Memory is allocated before, on the control thread.
pub type ChannelSeed = Box<dyn FnOnce(&mut IoCx) -> Result<Box<dyn Channel>, BdevError> + Send>;

/// Sizes and abilities of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Logical block, bytes: a power of two from 512 to 64 KiB.
    pub block_bytes: u32,
    /// Physical block, bytes: a multiple of the logical one.
    pub physical_block_bytes: u32,
    /// Preferred request size, bytes; 0 when the device has no opinion.
    pub optimal_io_bytes: u32,
    /// Number of logical blocks.
    pub blocks_count: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// There is a volatile cache: completed writes are lost in a power cut until a flush.
    pub write_cache: bool,
    /// Discards do something.
    pub discard: bool,
    /// Preferred alignment and granularity of discards, bytes; 0 when unknown.
    pub discard_granularity_bytes: u32,
    /// Write-zeroes is understood.
    pub write_zeroes: bool,
}

impl Geometry {
    /// Checks the numbers.
    ///
    /// # Errors
    /// The sentence that says what is wrong.
    pub fn check(&self) -> Result<(), String> {
        let block = self.block_bytes;
        if !block.is_power_of_two() || !(SECTOR_BYTES..=BLOCK_BYTES_MAX).contains(&block) {
            return Err(format!(
                "block size {block} is not a power of two from 512 to {BLOCK_BYTES_MAX}"
            ));
        }
        if self.blocks_count == 0 {
            return Err("the size is 0 blocks; give it at least one".to_owned());
        }
        match self.blocks_count.checked_mul(u64::from(block)) {
            Some(bytes) if i64::try_from(bytes).is_ok() => Ok(()),
            _ => Err(format!(
                "{} blocks of {block} bytes are more than 2^63 bytes",
                self.blocks_count
            )),
        }
    }
}

/// What every bdev knows about itself.
#[derive(Debug)]
pub struct BdevInfo {
    name: String,
    uuid: Uuid,
    product_name: &'static str,
    geometry: Geometry,
    blocks_count: AtomicU64,
    fenced: AtomicBool,
}

impl BdevInfo {
    /// Checks the geometry and names the device.
    ///
    /// # Errors
    /// [`BdevError::Geometry`].
    pub fn new(
        name: &str,
        uuid: Option<Uuid>,
        product_name: &'static str,
        geometry: Geometry,
    ) -> Result<BdevInfo, BdevError> {
        geometry.check().map_err(|reason| BdevError::Geometry { name: name.to_owned(), reason })?;
        Ok(BdevInfo {
            name: name.to_owned(),
            uuid: uuid.unwrap_or_else(Uuid::new_v4),
            product_name,
            blocks_count: AtomicU64::new(geometry.blocks_count),
            geometry,
            fenced: AtomicBool::new(false),
        })
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The identity.
    #[must_use]
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// The kind of device, for people.
    #[must_use]
    pub fn product_name(&self) -> &'static str {
        self.product_name
    }

    /// Fixed properties; `blocks_count` in it is the size at creation.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Logical blocks now.
    #[inline]
    #[must_use]
    pub fn blocks_count(&self) -> u64 {
        self.blocks_count.load(Ordering::Relaxed)
    }

    /// Bytes now.
    #[inline]
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.blocks_count() * u64::from(self.geometry.block_bytes)
    }

    /// Changes the size; not of one that is fenced.
    pub fn set_blocks(&self, blocks_count: u64) {
        self.blocks_count.store(blocks_count, Ordering::SeqCst);
        if self.fenced.load(Ordering::SeqCst) {
            self.blocks_count.store(0, Ordering::Relaxed);
        }
    }

    /// What it stood for is gone or another thing: no request may reach it any more, for good.
    pub fn fence(&self) {
        self.fenced.store(true, Ordering::SeqCst);
        self.blocks_count.store(0, Ordering::SeqCst);
    }

    /// True once it is fenced. Drivers that send requests again, or in parts, look before each of them.
    #[inline]
    #[must_use]
    pub fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::Relaxed)
    }
}

/// A block device with a name.
pub trait Bdev: Any + Send + Sync {
    /// Its properties.
    fn info(&self) -> &Arc<BdevInfo>;

    /// Prepares a channel for `home`; the seed is planted on that reactor and no other. `None` stands for a thread of tests
    /// or tools that plays reactor and never sleeps. For control threads.
    ///
    /// # Errors
    /// When memory or descriptors are short.
    fn open_channel(&self, home: Option<&ReactorHandle>) -> Result<ChannelSeed, BdevError>;

    /// The reactor that works on the device for channels of `home`: itself, where the device has a queue for each.
    fn owner(&self, home: &ReactorHandle) -> ReactorHandle {
        home.clone()
    }

    /// What the device reaches of memory, where it moves data by itself: segments of its requests must be mapped there
    /// before they come, guests' memory and the reactors' bounce buffers alike.
    fn dma(&self) -> Option<Arc<dyn DmaDomain>> {
        None
    }

    /// Looks at the backing store again and returns the new size in blocks (the caller publishes it). Devices whose
    /// size cannot change return the present one.
    ///
    /// # Errors
    /// When the backing store cannot be asked.
    fn rescan(&self) -> Result<u64, BdevError> {
        Ok(self.info().blocks_count())
    }

    /// Driver-specific facts for status output: (name, value).
    fn driver_facts(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }
}
