//! Memory that guests, the kernel or devices also reach: mappings, the guest's region table, segments, bounce buffers.
//!
//! **Invariant:** nobody outside this module turns an address into a pointer. A [`Segment`] exists only as the result
//! of a bounds-checked translation or as a piece of a pool, and the owner of the table keeps the mapping until every
//! request that carries one of its segments has been completed (`Poller::quiesce` is the barrier).

mod arena;
mod bounce;
mod dma;
mod guest;
mod mapping;
mod pin;
mod seglist;
mod segment;
mod shared;
mod sigbus;
mod table;
mod window;

pub use arena::arena;
pub use bounce::{Bounce, BouncePool};
pub use dma::{DmaDomain, DmaError, DmaMap, IovaOffset};
pub use guest::{MemTable, MemTableError, Region, RegionSpec};
pub use mapping::{Mapping, MappingError};
pub use pin::{Pin, PinError, PinState, register_pins};
pub use seglist::{ListsHeld, SegmentList, SegmentLists};
pub use segment::{RegionId, Segment, as_iovecs, pieces, total_bytes};
pub use shared::SharedSlice;
pub use sigbus::{install_sigbus_handler, lost_mappings_count};
pub use table::Table;
pub use window::DeviceWindow;
