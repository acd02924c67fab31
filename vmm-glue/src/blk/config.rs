//! The features and the configuration space that a disk offers (virtio 1.2 §5.2.3 to §5.2.5).

use ringmill_core::io::IoOp;
use ringmill_core::limits::SECTOR_BYTES;
use ringmill_core::spec::virtio_blk::{self as spec, BlkConfig, CONFIG_BYTES};
use ringmill_core::spec::virtio_ring::{F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED, F_VERSION_1};

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
        | F_RING_PACKED
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
///
/// `writeback` is what the asking front-end's guest chose; `None`: what the disk was left with.
#[must_use]
pub fn encode_config(
    device: &BlkDevice,
    queues_count: u16,
    writeback: Option<bool>,
) -> [u8; CONFIG_BYTES] {
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
        writeback: u8::from(writeback.unwrap_or_else(|| device.config_writeback())),
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

#[cfg(test)]
mod tests {
    use std::mem::offset_of;
    use std::sync::Arc;

    use ringmill_core::bdev::{Bdev, BdevError, BdevInfo, ChannelSeed, Geometry};
    use ringmill_core::reactor::ReactorHandle;
    use virtio_bindings::virtio_blk::{self as linux, virtio_blk_config as Layout};
    use virtio_bindings::virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
    use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

    use super::*;

    struct Disk(Arc<BdevInfo>);

    impl Bdev for Disk {
        fn info(&self) -> &Arc<BdevInfo> {
            &self.0
        }

        fn open_channel(&self, _home: Option<&ReactorHandle>) -> Result<ChannelSeed, BdevError> {
            Err(BdevError::Refused { name: String::new(), reason: String::new() })
        }
    }

    fn device(discard: bool, read_only: bool) -> BlkDevice {
        let geometry = Geometry {
            block_bytes: 4096,
            physical_block_bytes: 16_384,
            optimal_io_bytes: 65_536,
            blocks_count: 1000,
            read_only: false,
            write_cache: true,
            discard,
            discard_granularity_bytes: 8192,
            write_zeroes: discard,
        };
        let info = BdevInfo::new("t", None, "test", geometry).unwrap();
        let bdev: Arc<dyn Bdev> = Arc::new(Disk(Arc::new(info)));
        BlkDevice::new(&bdev, "a serial of more than twenty bytes", read_only)
    }

    fn number(config: &[u8], at: usize, len: usize) -> u64 {
        config[at..at + len].iter().rev().fold(0, |sum, &b| (sum << 8) | u64::from(b))
    }

    #[test]
    fn fields_lie_where_linux_looks_for_them() {
        let device = device(true, false);
        let config = encode_config(&device, 5, None);
        assert_eq!(size_of::<Layout>().min(60), CONFIG_BYTES);
        let field = |at, len| number(&config, at, len);
        assert_eq!(field(offset_of!(Layout, capacity), 8), 8000);
        assert_eq!(field(offset_of!(Layout, size_max), 4), 4 << 20);
        assert_eq!(field(offset_of!(Layout, seg_max), 4), 126);
        assert_eq!(field(offset_of!(Layout, blk_size), 4), 4096);
        assert_eq!(field(offset_of!(Layout, physical_block_exp), 1), 2);
        assert_eq!(field(offset_of!(Layout, alignment_offset), 1), 0);
        assert_eq!(field(offset_of!(Layout, min_io_size), 2), 4);
        assert_eq!(field(offset_of!(Layout, opt_io_size), 4), 16);
        assert_eq!(field(offset_of!(Layout, wce), 1), 1);
        assert_eq!(field(offset_of!(Layout, num_queues), 2), 5);
        assert_eq!(field(offset_of!(Layout, max_discard_sectors), 4), 2 << 20);
        assert_eq!(field(offset_of!(Layout, max_discard_seg), 4), 1);
        assert_eq!(field(offset_of!(Layout, discard_sector_alignment), 4), 16);
        assert_eq!(field(offset_of!(Layout, max_write_zeroes_sectors), 4), 2 << 20);
        assert_eq!(field(offset_of!(Layout, max_write_zeroes_seg), 4), 1);
        assert_eq!(field(offset_of!(Layout, write_zeroes_may_unmap), 1), 1);
        device.set_config_writeback(false);
        assert_eq!(encode_config(&device, 5, None)[offset_of!(Layout, wce)], 0);
        device.info().set_blocks(2000);
        assert_eq!(number(&encode_config(&device, 5, None), 0, 8), 16_000);
    }

    #[test]
    fn feature_bits_are_those_of_linux() {
        let always = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_F_RING_PACKED,
            linux::VIRTIO_BLK_F_SIZE_MAX,
            linux::VIRTIO_BLK_F_SEG_MAX,
            linux::VIRTIO_BLK_F_BLK_SIZE,
            linux::VIRTIO_BLK_F_TOPOLOGY,
            linux::VIRTIO_BLK_F_FLUSH,
            linux::VIRTIO_BLK_F_CONFIG_WCE,
            linux::VIRTIO_BLK_F_MQ,
        ];
        let bits = |list: &[u32]| list.iter().fold(0u64, |sum, bit| sum | 1 << bit);
        let always = bits(&always);
        let ranges = bits(&[linux::VIRTIO_BLK_F_DISCARD, linux::VIRTIO_BLK_F_WRITE_ZEROES]);
        let read_only = bits(&[linux::VIRTIO_BLK_F_RO]);
        assert_eq!(device_features(&device(true, false)), always | ranges);
        assert_eq!(device_features(&device(false, false)), always);
        assert_eq!(device_features(&device(true, true)), always | read_only);
    }

    #[test]
    fn what_is_not_offered_has_no_limits() {
        let config = encode_config(&device(true, true), 1, None);
        assert!(config[36..].iter().all(|&b| b == 0));
    }

    #[test]
    fn a_serial_is_cut_at_twenty_bytes() {
        assert_eq!(device(true, false).serial(), b"a serial of more tha");
    }
}
