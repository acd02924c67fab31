//! The features and the configuration space that a disk offers (virtio 1.2 §5.2.3 to §5.2.5).

use ringmill_core::io::IoOp;
use ringmill_core::limits::SECTOR_BYTES;
use ringmill_core::spec::virtio_blk::{self as spec, BlkConfig, CONFIG_BYTES};
use ringmill_core::spec::virtio_ring::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};

use super::BlkDevice;

/// Data segments that the configuration promises; more are taken all the same. 126 and header and status fill QEMU's
/// default queue of 128.
const SEG_MAX: u32 = 126;
/// Larger than any segment that a driver builds; smaller than 2^32 with room for arithmetic.
const SIZE_MAX_BYTES: u32 = 4 << 20;

/// The virtio feature bits of this disk (without the vhost-user one, which the session adds).
#[must_use]
pub fn device_features(device: &BlkDevice) -> u64 {
    let mut bits = F_VERSION_1
        | F_INDIRECT_DESC
        | F_EVENT_IDX
        | spec::F_SIZE_MAX
        | spec::F_SEG_MAX
        | spec::F_BLK_SIZE
        | spec::F_TOPOLOGY
        | spec::F_FLUSH
        | spec::F_CONFIG_WCE
        | spec::F_MQ;
    for (on, bit) in [
        (device.read_only(), spec::F_RO),
        (device.supports(IoOp::Discard), spec::F_DISCARD),
        (device.supports(IoOp::WriteZeroes), spec::F_WRITE_ZEROES),
    ] {
        if on {
            bits |= bit;
        }
    }
    bits
}

/// The configuration space now.
#[must_use]
pub fn encode_config(device: &BlkDevice, queues_count: u16) -> [u8; CONFIG_BYTES] {
    let info = device.info();
    let geometry = info.geometry();
    let block = geometry.block_bytes;
    let physical = geometry.physical_block_bytes.max(block);
    let blocks_of = |bytes: u32| bytes / block;
    let supports = |op, value: u32| if device.supports(op) { value } else { 0 };
    let range_sectors = device.range_sectors_max();
    BlkConfig {
        capacity_sectors: info.size_bytes() / u64::from(SECTOR_BYTES),
        size_max: SIZE_MAX_BYTES,
        seg_max: SEG_MAX,
        blk_size: block,
        physical_block_exp: u8::try_from((physical / block).ilog2()).unwrap_or(0),
        alignment_offset: 0,
        min_io_size: u16::try_from(blocks_of(physical)).unwrap_or(1),
        opt_io_size: blocks_of(geometry.optimal_io_bytes),
        writeback: u8::from(device.write_back()),
        num_queues: queues_count,
        max_discard_sectors: supports(IoOp::Discard, range_sectors),
        max_discard_seg: supports(IoOp::Discard, 1),
        discard_sector_alignment: supports(
            IoOp::Discard,
            (geometry.discard_granularity_bytes.max(block)) / SECTOR_BYTES,
        ),
        max_write_zeroes_sectors: supports(IoOp::WriteZeroes, range_sectors),
        max_write_zeroes_seg: supports(IoOp::WriteZeroes, 1),
        write_zeroes_may_unmap: u8::from(device.supports(IoOp::WriteZeroes)),
    }
    .encode()
}
