//! The memory of a RAM disk: a memory file and its mapping, seen as a one-region table whose addresses are disk offsets.
//!
//! Flow: a range of the disk → [`Segment`]s, which are copied to and from a guest's. Owner: made on a control thread,
//! shared by the disk's channels. **Invariant:** the table covers the disk, so a range that the gate let through always
//! translates.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use ringmill_core::bdev::BdevError;
use ringmill_core::mem::{Mapping, MemTable, RegionSpec, Segment};
use ringmill_core::units::{GuestAddr, len_u32, usize_of};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// Pages of an ordinary memory file, bytes.
const PAGE_BYTES: u64 = 4096;

/// Pages of the memory file that is tried first, bytes.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

const HUGE_PAGES_PATH: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

#[derive(Debug)]
pub(super) struct DiskMemory {
    file: File,
    table: MemTable,
    page_bytes: u64,
}

/// Huge pages that nobody has or has reserved.
fn free_huge_pages() -> u64 {
    let read = |name: &str| -> Option<u64> {
        std::fs::read_to_string(format!("{HUGE_PAGES_PATH}/{name}")).ok()?.trim().parse().ok()
    };
    let free = read("free_hugepages").unwrap_or(0);
    free.saturating_sub(read("resv_hugepages").unwrap_or(0))
}

impl DiskMemory {
    /// Zeroes, allocated as they are touched.
    pub(super) fn new(name: &str, size_bytes: u64) -> Result<DiskMemory, BdevError> {
        if size_bytes.div_ceil(HUGE_PAGE_BYTES) <= free_huge_pages()
            && let Ok(memory) =
                Self::with_pages(name, size_bytes, HUGE_PAGE_BYTES, MemfdFlags::HUGETLB)
        {
            return Ok(memory);
        }
        Self::with_pages(name, size_bytes, PAGE_BYTES, MemfdFlags::empty())
    }

    fn with_pages(
        name: &str,
        size_bytes: u64,
        page_bytes: u64,
        flags: MemfdFlags,
    ) -> Result<DiskMemory, BdevError> {
        let failed = |source: io::Error| BdevError::Io {
            name: name.to_owned(),
            what: format!("no memory for a RAM disk of {size_bytes} bytes; make it smaller"),
            source,
        };
        let too_large = || failed(io::ErrorKind::OutOfMemory.into());
        let len_bytes = size_bytes.checked_next_multiple_of(page_bytes).ok_or_else(too_large)?;
        let fd = memfd_create("ringmill-disk", flags | MemfdFlags::CLOEXEC);
        let file = File::from(fd.map_err(|e| failed(e.into()))?);
        ftruncate(&file, len_bytes).map_err(|e| failed(e.into()))?;
        let mapping = Arc::new(Mapping::own_file(&file, usize_of(len_bytes))?);
        let mut table = MemTable::new();
        table
            .add(RegionSpec { guest_addr: GuestAddr(0), len_bytes, user_addr: 0 }, mapping)
            .map_err(|e| BdevError::Refused { name: name.to_owned(), reason: e.to_string() })?;
        Ok(DiskMemory { file, table, page_bytes })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn page_bytes(&self) -> u32 {
        len_u32(usize_of(self.page_bytes))
    }

    pub(super) fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    /// The disk's memory from `offset_bytes` on, at most `len_bytes` of it.
    #[inline]
    pub(super) fn at(&self, offset_bytes: u64, len_bytes: u64) -> Option<Segment> {
        self.table.translate(GuestAddr(offset_bytes), len_u32(usize_of(len_bytes)), &mut 0)
    }

    /// Fills a range with zeroes here and now.
    pub(super) fn zero(&self, mut offset_bytes: u64, mut len_bytes: u64) {
        while let Some(segment) = self.at(offset_bytes, len_bytes) {
            segment.fill_zero();
            let done = u64::from(segment.len_bytes());
            offset_bytes += done;
            len_bytes -= done;
        }
    }
}
