//! What a modelled controller is like: everything that a real one may choose, as plain data.

use std::sync::Arc;
use std::time::Duration;

use ringmill_core::mem::IovaOffset;

use super::media::Medium;

/// How the controller interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vectors {
    /// Not at all.
    None,
    /// By a level; `unmask` allows the next one.
    Intx,
    /// One message.
    Msi,
    /// That many messages.
    MsiX(u16),
}

/// What SGLs the controller takes in I/O commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sgls {
    /// None.
    None,
    /// At any address and of any length.
    Bytes,
    /// Address and length multiples of 4.
    Dwords,
}

/// A controller.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// Like `0000:01:00.0`.
    pub name: String,
    /// At most 20 characters.
    pub serial: String,
    /// At most 40 characters.
    pub model: String,
    /// At most 8 characters.
    pub firmware: String,
    /// PCI vendor and device.
    pub pci_id: (u16, u16),
    /// Entries that a queue may have (CAP.MQES + 1), 2 to 65,536.
    pub queue_entries_max: u32,
    /// CAP.TO, in 500 ms.
    pub ready_timeout_500ms: u8,
    /// How long CSTS.RDY takes to change.
    pub ready_delay: Duration,
    /// CAP.DSTRD.
    pub doorbell_stride: u8,
    /// The smallest page, 2^(12+n) bytes.
    pub page_min: u8,
    /// The largest.
    pub page_max: u8,
    /// CAP.CSS; bit 0: NVM, bit 6: one or more sets, bit 7: admin only.
    pub command_sets: u8,
    /// I/O queues that are granted, of each kind.
    pub io_queues_max: u16,
    /// Interrupts.
    pub vectors: Vectors,
    /// Largest transfer, 2^n smallest pages; 0: no limit.
    pub mdts: u8,
    /// SGL support.
    pub sgls: Sgls,
    /// Bit bucket descriptors.
    pub bit_bucket: bool,
    /// A volatile write cache, enabled at power on.
    pub write_cache: bool,
    /// Dataset management.
    pub dsm: bool,
    /// Ranges per dataset management command that identify names; 0: no limit named.
    pub dsm_ranges_max: u8,
    /// Blocks per range that identify names; 0: no limit named.
    pub dsm_range_blocks_max: u32,
    /// Write zeroes.
    pub write_zeroes: bool,
    /// Largest write zeroes, 2^n smallest pages; 0: no limit. Named by identify with CNS 6.
    pub write_zeroes_max: u8,
    /// Identify with CNS 6 is known (NVMe 2.0); otherwise an invalid field, as for older controllers.
    pub controller_of_set: bool,
    /// Doorbell buffer config.
    pub doorbell_buffer: bool,
    /// Event requests at a time.
    pub events_max: u8,
    /// Aborts at a time that identify names.
    pub aborts_max: u8,
    /// The largest namespace id.
    pub namespaces_max: u32,
    /// What every I/O command takes at least.
    pub latency: Duration,
    /// How long the idle thread polls before it sleeps in short naps.
    pub spin: Duration,
    /// The processor for the thread.
    pub core: Option<usize>,
    /// Host address to IOVA. Not zero, so that a driver that confuses them fails.
    pub iova_offset: IovaOffset,
}

impl Default for ModelOptions {
    fn default() -> ModelOptions {
        ModelOptions {
            name: "model".to_owned(),
            serial: "RM0001".to_owned(),
            model: "ringmill model controller".to_owned(),
            firmware: "1.0".to_owned(),
            pci_id: (0xfff0, 0x0001),
            queue_entries_max: 1024,
            ready_timeout_500ms: 4,
            ready_delay: Duration::ZERO,
            doorbell_stride: 0,
            page_min: 0,
            page_max: 4,
            command_sets: 1,
            io_queues_max: 64,
            vectors: Vectors::MsiX(65),
            mdts: 7,
            sgls: Sgls::None,
            bit_bucket: false,
            write_cache: true,
            dsm: true,
            dsm_ranges_max: 0,
            dsm_range_blocks_max: 0,
            write_zeroes: true,
            write_zeroes_max: 0,
            controller_of_set: true,
            doorbell_buffer: false,
            events_max: 4,
            aborts_max: 4,
            namespaces_max: 16,
            latency: Duration::ZERO,
            spin: Duration::from_micros(20),
            core: None,
            iova_offset: IovaOffset(0x4000_0000_0000_u64.wrapping_neg()),
        }
    }
}

/// A namespace.
#[derive(Clone, Debug)]
pub struct ModelNamespace {
    /// Its id, from 1 on.
    pub nsid: u32,
    /// A block has 2^n bytes.
    pub block_shift: u8,
    /// Size in blocks.
    pub blocks_count: u64,
    /// Optimal I/O boundary in blocks; 0: none.
    pub noiob: u16,
    /// Metadata bytes per block. I/O is refused then.
    pub metadata_bytes: u16,
    /// Protection information in force (identify's DPS).
    pub protection: u8,
    /// Write protected.
    pub read_only: bool,
    /// NGUID.
    pub nguid: [u8; 16],
    /// EUI64.
    pub eui64: [u8; 8],
    /// UUID, among the descriptors.
    pub uuid: [u8; 16],
    /// Where the data is. Namespaces of several models may share one.
    pub medium: Arc<Medium>,
}

impl ModelNamespace {
    /// One with a medium and nothing special.
    #[must_use]
    pub fn new(
        nsid: u32,
        block_shift: u8,
        blocks_count: u64,
        medium: Arc<Medium>,
    ) -> ModelNamespace {
        let mut nguid = *b"ringmill-nguid..";
        nguid[12..].copy_from_slice(&nsid.to_be_bytes());
        let mut uuid = *b"ringmill-uuid\0\0\0";
        uuid[12..].copy_from_slice(&nsid.to_be_bytes());
        ModelNamespace {
            nsid,
            block_shift,
            blocks_count,
            noiob: 0,
            metadata_bytes: 0,
            protection: 0,
            read_only: false,
            nguid,
            eui64: [0; 8],
            uuid,
            medium,
        }
    }
}
