//! Wire layouts and constants as the specifications give them: inert data, no behaviour.

pub mod nvme;
pub mod virtio_blk;
pub mod virtio_ring;
