//! The model's IOMMU: what is mapped, at which addresses, and the thread's view of it.
//!
//! Flow: `map`/`unmap` change the table under a lock → the thread takes the new one over in a call, which `unmap` waits
//! for. **Invariant:** after `unmap` the thread has no segment and no window of that memory; a mapping is alive while the
//! thread could touch it, as the thread holds the table.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};

use ringmill_core::mem::{
    DmaDomain, DmaError, IovaOffset, Mapping, MemTable, RegionSpec, Segment, SharedSlice,
};
use ringmill_core::units::{GuestAddr, HostAddr, len_u32, usize_of};

use super::link::{Link, lock};

/// How mapping fails on demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapFailure {
    /// As if RLIMIT_MEMLOCK were reached.
    Memlock,
    /// As if the kernel ran out of memory.
    NoMemory,
    /// As if the IOMMU could not name the address.
    Range,
}

#[derive(Debug)]
pub(super) struct ModelDomain {
    /// The link belongs to the backing; a domain may outlive it.
    link: Weak<Link>,
    name: String,
    offset: IovaOffset,
    table: Mutex<MemTable>,
    /// Maps that still succeed, then `failure`; `u32::MAX`: all do.
    maps_left: AtomicU32,
    failure: Mutex<MapFailure>,
}

impl ModelDomain {
    pub(super) fn new(link: &Arc<Link>, offset: IovaOffset) -> ModelDomain {
        ModelDomain {
            link: Arc::downgrade(link),
            name: link.name.clone(),
            offset,
            table: Mutex::new(MemTable::new()),
            maps_left: AtomicU32::new(u32::MAX),
            failure: Mutex::new(MapFailure::Memlock),
        }
    }

    /// Lets `maps` more succeed, all further ones fail; `None`: no more failures.
    pub(super) fn fail_after(&self, failure: Option<(u32, MapFailure)>) {
        if let Some((maps, failure)) = failure {
            *lock(&self.failure) = failure;
            self.maps_left.store(maps.min(u32::MAX - 1), Ordering::Release);
        } else {
            self.maps_left.store(u32::MAX, Ordering::Release);
        }
    }

    /// Forgets everything. For closing, once the thread has ended.
    pub(super) fn clear(&self) {
        *lock(&self.table) = MemTable::new();
    }

    pub(super) fn regions_count(&self) -> usize {
        lock(&self.table).regions().len()
    }

    fn check(&self, iova: u64, len_bytes: usize) -> Result<(), DmaError> {
        let left = self.maps_left.load(Ordering::Acquire);
        if left == u32::MAX {
            return Ok(());
        }
        if left > 0 {
            self.maps_left.store(left - 1, Ordering::Release);
            return Ok(());
        }
        let device = self.name.clone();
        Err(match *lock(&self.failure) {
            MapFailure::Memlock => DmaError::Memlock {
                device,
                need_bytes: len_bytes as u64,
                limit: "as low as the test wants it".to_owned(),
            },
            MapFailure::NoMemory => DmaError::Refused {
                device,
                len_bytes,
                source: std::io::Error::from_raw_os_error(libc::ENOMEM),
            },
            MapFailure::Range => DmaError::Range { device, iova, last: iova.saturating_sub(1) },
        })
    }

    /// Hands the table to the thread and waits until it has it; false when the thread has ended.
    fn publish(&self, table: &MemTable) -> bool {
        let table = Arc::new(table.clone());
        let call = |link: Arc<Link>| link.call(move |machine| machine.set_memory(table));
        self.link.upgrade().and_then(call).is_some()
    }

    /// Maps at an address of somebody else's choice: a vfio-user client's.
    pub(super) fn map_at(&self, iova: u64, mapping: &Arc<Mapping>) -> Result<(), DmaError> {
        let len_bytes = mapping.len_bytes();
        let mut table = lock(&self.table);
        self.check(iova, len_bytes)?;
        let spec = RegionSpec {
            guest_addr: GuestAddr(iova),
            len_bytes: len_bytes as u64,
            // Windows for queues are found by this one.
            user_addr: iova,
        };
        table.add(spec, Arc::clone(mapping)).map_err(|e| DmaError::Refused {
            device: self.name.clone(),
            len_bytes,
            source: std::io::Error::other(e),
        })?;
        if self.publish(&table) {
            return Ok(());
        }
        table.remove(GuestAddr(iova), len_bytes as u64);
        Err(DmaError::Gone { device: self.name.clone() })
    }

    /// The reverse.
    pub(super) fn unmap_at(&self, iova: u64, mapping: &Mapping) {
        let mut table = lock(&self.table);
        if table.remove(GuestAddr(iova), mapping.len_bytes() as u64) {
            self.publish(&table);
        }
    }

    fn iova_of(&self, mapping: &Mapping) -> u64 {
        self.offset.iova(HostAddr(mapping.base().as_ptr() as usize)).0
    }
}

impl DmaDomain for ModelDomain {
    fn map(&self, mapping: &Arc<Mapping>) -> Result<(), DmaError> {
        self.map_at(self.iova_of(mapping), mapping)
    }

    fn unmap(&self, mapping: &Arc<Mapping>) {
        self.unmap_at(self.iova_of(mapping), mapping);
    }

    fn offset(&self) -> IovaOffset {
        self.offset
    }
}

/// The thread's view.
#[derive(Debug, Default)]
pub(super) struct Reach {
    pub(super) table: Arc<MemTable>,
    hint: usize,
}

impl Reach {
    pub(super) fn new(table: Arc<MemTable>) -> Reach {
        Reach { table, hint: 0 }
    }

    /// The memory from `iova` on, at most `len_bytes`, at least one; `None` is an IOMMU fault.
    #[inline]
    pub(super) fn at(&mut self, iova: u64, len_bytes: u32) -> Option<Segment> {
        self.table.translate(GuestAddr(iova), len_bytes, &mut self.hint)
    }

    /// A window for a queue.
    pub(super) fn window(&self, iova: u64, len_bytes: usize) -> Option<SharedSlice> {
        self.table.window_at_user_addr(iova, len_bytes, 8)
    }

    /// Reads `out.len()` bytes; false is a fault.
    pub(super) fn read(&mut self, iova: u64, out: &mut [u8]) -> bool {
        let mut done = 0;
        while done < out.len() {
            let Some(at) = iova.checked_add(done as u64) else { return false };
            let Some(segment) = self.at(at, len_u32(out.len() - done)) else { return false };
            done += segment.read_into(&mut out[done..]);
        }
        true
    }

    /// True when the whole range is mapped.
    pub(super) fn covers(&mut self, iova: u64, len_bytes: u64) -> bool {
        let mut done = 0;
        while done < len_bytes {
            let Some(at) = iova.checked_add(done) else { return false };
            let Some(segment) = self.at(at, len_u32(usize_of(len_bytes - done))) else {
                return false;
            };
            done += u64::from(segment.len_bytes());
        }
        true
    }
}
