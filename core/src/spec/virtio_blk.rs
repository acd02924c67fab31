//! virtio-blk constants and the configuration space (virtio 1.2 §5.2).

/// Maximum size of any single segment is in `size_max`.
pub const F_SIZE_MAX: u64 = 1 << 1;
/// Maximum number of segments in a request is in `seg_max`.
pub const F_SEG_MAX: u64 = 1 << 2;
/// The device is read-only.
pub const F_RO: u64 = 1 << 5;
/// The block size is in `blk_size`.
pub const F_BLK_SIZE: u64 = 1 << 6;
/// FLUSH is understood.
pub const F_FLUSH: u64 = 1 << 9;
/// The topology fields are valid.
pub const F_TOPOLOGY: u64 = 1 << 10;
/// The driver can toggle the write cache.
pub const F_CONFIG_WCE: u64 = 1 << 11;
/// Several queues.
pub const F_MQ: u64 = 1 << 12;
/// DISCARD is understood.
pub const F_DISCARD: u64 = 1 << 13;
/// WRITE_ZEROES is understood.
pub const F_WRITE_ZEROES: u64 = 1 << 14;

/// Request types (§5.2.6).
pub const T_IN: u32 = 0;
/// Write.
pub const T_OUT: u32 = 1;
/// Flush.
pub const T_FLUSH: u32 = 4;
/// The 20-byte serial.
pub const T_GET_ID: u32 = 8;
/// Discard.
pub const T_DISCARD: u32 = 11;
/// Write zeroes.
pub const T_WRITE_ZEROES: u32 = 13;

/// Success.
pub const S_OK: u8 = 0;
/// Device or driver error.
pub const S_IOERR: u8 = 1;
/// Request not supported.
pub const S_UNSUPP: u8 = 2;

/// Bytes of the request header: type, reserved, sector.
pub const HEADER_BYTES: u32 = 16;
/// Bytes of one DISCARD / WRITE_ZEROES range: sector, number of sectors, flags.
pub const RANGE_BYTES: usize = 16;
/// WRITE_ZEROES may deallocate.
pub const RANGE_F_UNMAP: u32 = 1;

/// Offset of `capacity` (sectors of 512 bytes).
pub const CONFIG_CAPACITY: usize = 0;
/// Offset of the `writeback` byte, the only one that a driver may write.
pub const CONFIG_WRITEBACK: usize = 32;
/// Bytes of the configuration space up to and including `write_zeroes_may_unmap` and its padding (§5.2.4).
pub const CONFIG_BYTES: usize = 60;

/// The configuration space as values; [`BlkConfig::encode`] lays it out little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct BlkConfig {
    /// Sectors of 512 bytes.
    pub capacity_sectors: u64,
    /// Largest segment, bytes.
    pub size_max: u32,
    /// Most data segments per request.
    pub seg_max: u32,
    /// Logical block, bytes.
    pub blk_size: u32,
    /// log2 of logical blocks per physical block.
    pub physical_block_exp: u8,
    /// Offset of the first aligned logical block.
    pub alignment_offset: u8,
    /// Suggested minimum I/O, logical blocks.
    pub min_io_size: u16,
    /// Suggested optimal I/O, logical blocks.
    pub opt_io_size: u32,
    /// 1: write back, 0: write through.
    pub writeback: u8,
    /// Queues.
    pub num_queues: u16,
    /// Largest discard, sectors.
    pub max_discard_sectors: u32,
    /// Ranges per discard.
    pub max_discard_seg: u32,
    /// Preferred discard alignment, sectors.
    pub discard_sector_alignment: u32,
    /// Largest write-zeroes, sectors.
    pub max_write_zeroes_sectors: u32,
    /// Ranges per write-zeroes.
    pub max_write_zeroes_seg: u32,
    /// 1 when write-zeroes may deallocate.
    pub write_zeroes_may_unmap: u8,
}

impl BlkConfig {
    /// The bytes of §5.2.4; geometry stays zero because `F_GEOMETRY` is not offered.
    #[must_use]
    pub fn encode(&self) -> [u8; CONFIG_BYTES] {
        let mut out = [0u8; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(CONFIG_CAPACITY, &self.capacity_sectors.to_le_bytes());
        put(8, &self.size_max.to_le_bytes());
        put(12, &self.seg_max.to_le_bytes());
        put(20, &self.blk_size.to_le_bytes());
        put(24, &[self.physical_block_exp, self.alignment_offset]);
        put(26, &self.min_io_size.to_le_bytes());
        put(28, &self.opt_io_size.to_le_bytes());
        put(CONFIG_WRITEBACK, &[self.writeback]);
        put(34, &self.num_queues.to_le_bytes());
        put(36, &self.max_discard_sectors.to_le_bytes());
        put(40, &self.max_discard_seg.to_le_bytes());
        put(44, &self.discard_sector_alignment.to_le_bytes());
        put(48, &self.max_write_zeroes_sectors.to_le_bytes());
        put(52, &self.max_write_zeroes_seg.to_le_bytes());
        put(56, &[self.write_zeroes_may_unmap]);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let config = BlkConfig {
            capacity_sectors: 0x1122_3344_5566_7788,
            blk_size: 4096,
            writeback: 1,
            num_queues: 3,
            write_zeroes_may_unmap: 1,
            ..BlkConfig::default()
        };
        let bytes = config.encode();
        assert_eq!(bytes[0], 0x88);
        assert_eq!(&bytes[20..24], &4096u32.to_le_bytes());
        assert_eq!(bytes[32], 1);
        assert_eq!(&bytes[34..36], &[3, 0]);
        assert_eq!(bytes[56], 1);
    }
}
