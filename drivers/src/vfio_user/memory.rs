//! The memory that a vfio-user server was given: by descriptor, and for servers that cannot map, by message.
//!
//! Flow: [`UserDomain::map`] tells the server and keeps the mapping here → the server reaches it itself, or asks the
//! connection's thread to read or write it. Owner: control threads, and that thread. **Invariant:** a server's message
//! reaches only memory that is mapped for it at that moment.
//!
//! Spec: vfio-user 0.9, `VFIO_USER_DMA_MAP`, `_UNMAP`, `_READ`, `_WRITE`.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ringmill_core::mem::{DmaDomain, DmaError, IovaOffset, Mapping, MemTable, RegionSpec, Segment};
use ringmill_core::units::{GuestAddr, HostAddr, len_u32, usize_of};
use rustix::io::Errno;

use super::connection::{CallError, Connection};
use super::negotiation::Limits;
use super::protocol::{self, ACCESS_BYTES, Fields, command};

/// What the server reaches, by IOVA. Each piece is a table of one region, which does the checks.
#[derive(Debug, Default)]
pub(super) struct DeviceMemory {
    pieces: Mutex<BTreeMap<u64, MemTable>>,
}

impl DeviceMemory {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, MemTable>> {
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert(&self, iova: u64, mapping: &Arc<Mapping>) -> Result<(), Errno> {
        let len_bytes = mapping.len_bytes() as u64;
        let spec = RegionSpec { guest_addr: GuestAddr(iova), len_bytes, user_addr: iova };
        let mut table = MemTable::new();
        table.add(spec, Arc::clone(mapping)).map_err(|_| Errno::INVAL)?;
        self.lock().insert(iova, table);
        Ok(())
    }

    /// False when it was not there.
    fn remove(&self, iova: u64) -> bool {
        self.lock().remove(&iova).is_some()
    }

    fn count(&self) -> u64 {
        self.lock().len() as u64
    }

    /// IOVA and length of the pages of each piece, as the server was told.
    pub(super) fn ranges(&self) -> Vec<(u64, u64)> {
        let pages = |(iova, table): (&u64, &MemTable)| {
            let mapping = table.regions().first()?.mapping();
            let (host, len_bytes) = mapping.pages();
            let lead = (mapping.base().as_ptr() as usize - host.0) as u64;
            Some((iova - lead, len_bytes as u64))
        };
        self.lock().iter().filter_map(pages).collect()
    }

    /// Nothing is reachable any more.
    pub(super) fn clear(&self) {
        // Taken out under the lock, unmapped outside of it.
        let pieces = std::mem::take(&mut *self.lock());
        drop(pieces);
    }

    /// Calls `each` with the pieces of a range, in order; nothing is called unless all of it is reachable.
    fn each(
        &self,
        iova: u64,
        len_bytes: usize,
        mut each: impl FnMut(usize, Segment),
    ) -> Result<(), Errno> {
        let pieces = self.lock();
        let mut segments = Vec::new();
        let mut done = 0;
        while done < len_bytes {
            let at = iova.checked_add(done as u64).ok_or(Errno::FAULT)?;
            let (_, table) = pieces.range(..=at).next_back().ok_or(Errno::FAULT)?;
            let left = len_u32(len_bytes - done);
            let segment = table.translate(GuestAddr(at), left, &mut 0).ok_or(Errno::FAULT)?;
            segments.push((done, segment));
            done += segment.len_bytes() as usize;
        }
        for (at, segment) in segments {
            each(at, segment);
        }
        Ok(())
    }

    /// A DMA_READ: the reply's payload.
    pub(super) fn read(&self, request: Fields<'_>) -> Result<Vec<u8>, Errno> {
        let (iova, count) = access(request)?;
        let mut payload = request.rest(0).map_err(|_| Errno::INVAL)?[..ACCESS_BYTES].to_vec();
        payload.resize(ACCESS_BYTES + count, 0);
        let data = &mut payload[ACCESS_BYTES..];
        self.each(iova, count, |at, segment| {
            segment.read_into(&mut data[at..]);
        })?;
        Ok(payload)
    }

    /// A DMA_WRITE: the reply's payload.
    pub(super) fn write(&self, request: Fields<'_>) -> Result<Vec<u8>, Errno> {
        let (iova, count) = access(request)?;
        let data = request.rest(ACCESS_BYTES).map_err(|_| Errno::INVAL)?;
        if data.len() != count {
            return Err(Errno::INVAL);
        }
        self.each(iova, count, |at, segment| {
            segment.write_from(&data[at..]);
        })?;
        Ok(request.rest(0).map_err(|_| Errno::INVAL)?[..ACCESS_BYTES].to_vec())
    }
}

/// Address and count of a DMA access, within what was offered.
fn access(request: Fields<'_>) -> Result<(u64, usize), Errno> {
    let iova = request.u64(0).map_err(|_| Errno::INVAL)?;
    let count = request.u64(8).map_err(|_| Errno::INVAL)?;
    if count > Limits::OURS_TRANSFER_BYTES {
        Err(Errno::INVAL)
    } else {
        Ok((iova, usize_of(count)))
    }
}

/// The memory of a vfio-user device.
#[derive(Debug)]
pub(super) struct UserDomain {
    connection: Arc<Connection>,
    limits: Limits,
    offset: IovaOffset,
}

impl UserDomain {
    pub(super) fn new(
        connection: &Arc<Connection>,
        limits: Limits,
        offset: IovaOffset,
    ) -> UserDomain {
        UserDomain { connection: Arc::clone(connection), limits, offset }
    }

    fn device(&self) -> String {
        self.connection.name().to_owned()
    }

    /// Where the mapping's own first byte is; its pages may begin earlier.
    fn first(&self, mapping: &Mapping) -> u64 {
        self.offset.iova(HostAddr(mapping.base().as_ptr() as usize)).0
    }

    fn refused(&self, len_bytes: usize, why: String) -> DmaError {
        DmaError::Refused { device: self.device(), len_bytes, source: io::Error::other(why) }
    }
}

impl DmaDomain for UserDomain {
    fn map(&self, mapping: &Arc<Mapping>) -> Result<(), DmaError> {
        let (fd, file_offset) =
            mapping.file().ok_or_else(|| DmaError::NoFile { device: self.device() })?;
        let (host, len_bytes) = mapping.pages();
        let iova = self.offset.iova(host).0;
        let page = self.limits.page_bytes;
        if (iova | file_offset | len_bytes as u64) & (page - 1) != 0 {
            return Err(self.refused(
                len_bytes,
                format!(
                    "it maps pages of {page} bytes, and memory at {iova:#x} of {len_bytes} bytes (file offset \
                     {file_offset:#x}) are not such pages; use hugepages of that size for guests"
                ),
            ));
        }
        if self.connection.memory().count() >= self.limits.dma_maps_max {
            let max = self.limits.dma_maps_max;
            return Err(self.refused(
                len_bytes,
                format!(
                    "it has {max} places for memory (max_dma_maps) and all are in use; serve fewer guests with it"
                ),
            ));
        }
        let payload = protocol::dma_map(file_offset, iova, len_bytes as u64);
        match self.connection.call_for_memory(command::DMA_MAP, &payload, &[fd.as_fd()]) {
            Ok(_) => {}
            Err(CallError::Refused(source)) => {
                return Err(DmaError::Refused { device: self.device(), len_bytes, source });
            }
            Err(CallError::Gone | CallError::Late) => {
                return Err(DmaError::Gone { device: self.device() });
            }
        }
        // Its own messages may name it from here on. Between `end` and this, nobody reads the table any more.
        self.connection
            .memory()
            .insert(self.first(mapping), mapping)
            .map_err(|errno| self.refused(len_bytes, errno.to_string()))
    }

    fn unmap(&self, mapping: &Arc<Mapping>) {
        let (host, len_bytes) = mapping.pages();
        let iova = self.offset.iova(host).0;
        if !self.connection.is_gone() {
            let payload = protocol::dma_unmap(iova, len_bytes as u64);
            // A server that keeps memory is cut off: by its specification it then lets go of everything.
            if let Err(error @ CallError::Refused(_)) =
                self.connection.call_for_memory(command::DMA_UNMAP, &payload, &[])
            {
                self.connection.cut_off(&format!("it does not give memory back: {error}"));
            }
        }
        self.connection.memory().remove(self.first(mapping));
    }

    fn offset(&self) -> IovaOffset {
        self.offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(iova: u64, count: u64, data: &[u8]) -> Vec<u8> {
        [&iova.to_le_bytes()[..], &count.to_le_bytes()[..], data].concat()
    }

    fn read(memory: &DeviceMemory, iova: u64, count: u64) -> Result<Vec<u8>, Errno> {
        memory.read(Fields::new(command::DMA_READ, &request(iova, count, &[])))
    }

    fn write(memory: &DeviceMemory, iova: u64, count: u64, data: &[u8]) -> Result<Vec<u8>, Errno> {
        memory.write(Fields::new(command::DMA_WRITE, &request(iova, count, data)))
    }

    #[test]
    fn messages_reach_what_is_mapped_and_nothing_else() {
        let memory = DeviceMemory::default();
        let mapping = || Arc::new(Mapping::pool(8192).unwrap());
        memory.insert(0x10_0000, &mapping()).unwrap();
        memory.insert(0x10_2000, &mapping()).unwrap();
        memory.insert(u64::MAX - 8191, &mapping()).unwrap_err();
        // Across the border of two mappings that are neighbours.
        let data: Vec<u8> = (0..200u8).collect();
        let answer = write(&memory, 0x10_2000 - 100, 200, &data).unwrap();
        assert_eq!(answer, request(0x10_2000 - 100, 200, &[]));
        assert_eq!(read(&memory, 0x10_2000 - 100, 200).unwrap()[ACCESS_BYTES..], data);
        // Past the end, before the start, nowhere, wrapping: nothing is written, not even the part that is inside.
        assert_eq!(write(&memory, 0x10_4000 - 4, 8, &[7; 8]), Err(Errno::FAULT));
        assert_eq!(read(&memory, 0x10_4000 - 4, 4).unwrap()[ACCESS_BYTES..], [0; 4]);
        assert_eq!(read(&memory, 0x10_0000 - 4, 8), Err(Errno::FAULT));
        assert_eq!(read(&memory, 0, 1), Err(Errno::FAULT));
        assert_eq!(read(&memory, u64::MAX, 2), Err(Errno::FAULT));
        // Lengths that lie.
        assert_eq!(write(&memory, 0x10_0000, 8, &[7; 4]), Err(Errno::INVAL));
        assert_eq!(write(&memory, 0x10_0000, 4, &[7; 8]), Err(Errno::INVAL));
        for count in [Limits::OURS_TRANSFER_BYTES + 1, 1 << 32, u64::MAX] {
            assert_eq!(read(&memory, 0x10_0000, count), Err(Errno::INVAL));
        }
        for len in 0..ACCESS_BYTES {
            let short = &request(0x10_0000, 0, &[])[..len];
            assert_eq!(memory.read(Fields::new(11, short)), Err(Errno::INVAL));
            assert_eq!(memory.write(Fields::new(12, short)), Err(Errno::INVAL));
        }
        assert!(memory.remove(0x10_2000));
        assert_eq!(read(&memory, 0x10_2000 - 100, 200), Err(Errno::FAULT));
        memory.clear();
        assert_eq!(read(&memory, 0x10_0000, 1), Err(Errno::FAULT));
    }
}
