//! A mapping of memory that somebody else may write, truncate or take away.
//!
//! Flow: a file descriptor from a front-end (or nothing, for our own memory) → a range of the arena → regions and rings.
//! Owner: created and dropped on a control thread; shared by `Arc` with reactors.
//! **Invariant:** a foreign mapping is known to the SIGBUS handler for its whole life.
#![expect(unsafe_code)] // UNSAFETY: mmap of file descriptors; nothing here is ever exposed as `&[u8]`.

use std::fs::{File, Metadata};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;

use memmap2::MmapOptions;
use rustix::fs::{MemfdFlags, SealFlags};
use thiserror::Error;

use super::arena::Place;
use super::sigbus;
use crate::units::{HostAddr, bytes_u64, usize_of};

/// What an IOMMU maps at least.
const PAGE_BYTES: usize = 4096;

/// What an IOMMU, and the processor, map in one go where memory and address agree: long mappings are placed so.
const SUPERPAGE_BYTES: usize = 2 << 20;

/// Why memory could not be mapped.
#[derive(Debug, Error)]
pub enum MappingError {
    /// Zero length or an end beyond 64 bits.
    #[error(
        "memory region of {len_bytes} bytes at file offset {offset_bytes} is empty or too long"
    )]
    Length {
        /// Offset into the file.
        offset_bytes: u64,
        /// Length asked for.
        len_bytes: u64,
    },
    /// Not memory.
    #[error(
        "the file of a memory region is not shared memory; use memory-backend-memfd, or memory-backend-file on /dev/shm \
         or hugetlbfs"
    )]
    NotMemory,
    /// The file ends before the region does: touching it would be a SIGBUS.
    #[error(
        "the file behind a memory region has {file_bytes} bytes, the region needs {need_bytes}; \
         give the memory backend its full size before connecting"
    )]
    FileTooShort {
        /// Bytes in the file.
        file_bytes: u64,
        /// Bytes that the region needs.
        need_bytes: u64,
    },
    /// Too many foreign mappings at once.
    #[error("more than {0} memory regions of other processes are mapped; disconnect some guests")]
    TooMany(usize),
    /// No address space at all.
    #[error("the kernel gives no address space for memory; raise RLIMIT_AS (ulimit -v)")]
    NoArena,
    /// The address space that is set aside for mappings is used up.
    #[error(
        "no room for {len_bytes} bytes in the {arena_bytes} bytes of address space for memory; disconnect some guests, \
         or raise RLIMIT_AS (ulimit -v) if it is set"
    )]
    ArenaFull {
        /// Length asked for.
        len_bytes: u64,
        /// Length of all.
        arena_bytes: u64,
    },
    /// The kernel refused.
    #[error("cannot map {len_bytes} bytes of shared memory: {source}")]
    Mmap {
        /// Length asked for.
        len_bytes: u64,
        /// The kernel's reason.
        source: std::io::Error,
    },
}

/// A mapped range of bytes. Dropping it unmaps; see the module header for who may still use it then (nobody).
#[derive(Debug)]
pub struct Mapping {
    /// Dropped before `place`: once unmapped, the range may be somebody else's.
    guard: Option<sigbus::Guard>,
    place: Place,
    /// Bytes between the start of `place` and the first byte asked for (rounding to the file's block).
    lead_bytes: usize,
    len_bytes: usize,
    /// What is mapped, and from where on, for a device in another process.
    file: Option<(File, u64)>,
}

/// A file's block: for hugetlb files the size of their pages, which mappings consist of.
fn block_bytes(meta: &Metadata) -> u64 {
    meta.blksize().max(bytes_u64(PAGE_BYTES)).next_power_of_two()
}

/// Bytes and file offset (0 without a file) to the alignment of an address and what is to be left over: where address and
/// offset agree modulo 2 MiB, the huge pages of a file are huge pages of the mapping.
fn alignment(len_bytes: usize, offset_bytes: u64, block: u64) -> (usize, usize) {
    let long = if len_bytes >= SUPERPAGE_BYTES { SUPERPAGE_BYTES } else { PAGE_BYTES };
    let align = usize_of(block).max(long);
    (align, usize_of(offset_bytes) & (align - 1))
}

fn wrong_length(len_bytes: usize) -> MappingError {
    MappingError::Length { offset_bytes: 0, len_bytes: bytes_u64(len_bytes) }
}

impl Mapping {
    /// Maps `len_bytes` of another process's memory from `offset_bytes` of `fd`, shared and writable.
    ///
    /// Offset and length are rounded out to the file's block size, which for hugetlb files is the page size.
    ///
    /// # Errors
    /// Empty or overflowing ranges, a file that is shorter than the range, more than
    /// [`FOREIGN_MAPPINGS_MAX`](crate::limits::FOREIGN_MAPPINGS_MAX) mappings, or the kernel's refusal.
    pub fn foreign(
        fd: &OwnedFd,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<Mapping, MappingError> {
        let length_error = || MappingError::Length { offset_bytes, len_bytes };
        let end = offset_bytes
            .checked_add(len_bytes)
            .filter(|_| len_bytes > 0)
            .ok_or_else(length_error)?;
        let mmap_error = |source| MappingError::Mmap { len_bytes, source };

        let file = File::from(fd.as_fd().try_clone_to_owned().map_err(mmap_error)?);
        // Only tmpfs and hugetlbfs answer this, at once, and only their pages never wait for another process: a page of a
        // FUSE file could keep a reactor waiting for ever.
        if rustix::fs::fcntl_get_seals(&file).is_err() {
            return Err(MappingError::NotMemory);
        }
        let meta = file.metadata().map_err(mmap_error)?;
        if meta.file_type().is_file() && meta.len() < end {
            return Err(MappingError::FileTooShort { file_bytes: meta.len(), need_bytes: end });
        }
        let block = block_bytes(&meta);
        let start = offset_bytes & !(block - 1);
        let rounded_end = end.checked_add(block - 1).ok_or_else(length_error)? & !(block - 1);
        let map_len = usize_of(rounded_end - start);
        if isize::try_from(map_len).is_err() {
            return Err(length_error());
        }
        let raw =
            MmapOptions::new().offset(start).len(map_len).map_raw(&file).map_err(mmap_error)?;
        let (align, phase) = alignment(map_len, start, block);
        let place = Place::adopt(raw, map_len, align, phase)?;
        // Other people's memory: neither their secrets nor their gigabytes belong into a dump of this process.
        place.keep_out_of_dumps();
        let guard = sigbus::Guard::register(place.start().as_ptr() as usize, place.len_bytes())
            .ok_or(MappingError::TooMany(crate::limits::FOREIGN_MAPPINGS_MAX))?;
        Ok(Mapping {
            guard: Some(guard),
            place,
            lead_bytes: usize_of(offset_bytes - start),
            len_bytes: usize_of(len_bytes),
            file: Some((file, start)),
        })
    }

    /// Private zeroed memory of our own, page aligned.
    ///
    /// # Errors
    /// Zero length, or the kernel's refusal.
    pub fn anonymous(len_bytes: usize) -> Result<Mapping, MappingError> {
        if len_bytes == 0 {
            return Err(wrong_length(0));
        }
        let map_len =
            len_bytes.checked_next_multiple_of(PAGE_BYTES).ok_or(wrong_length(len_bytes))?;
        let map = MmapOptions::new()
            .len(map_len)
            .map_anon()
            .map_err(|source| MappingError::Mmap { len_bytes: bytes_u64(len_bytes), source })?;
        let (align, phase) = alignment(map_len, 0, 0);
        let place = Place::adopt(map.into(), map_len, align, phase)?;
        Ok(Mapping { guard: None, place, lead_bytes: 0, len_bytes, file: None })
    }

    /// Zeroed memory of our own that devices in other processes can be given, page aligned. Its file is sealed: whoever gets
    /// it can change its bytes, or make them zeroes, and not its length: nothing that we touch is a SIGBUS.
    ///
    /// # Errors
    /// Zero length, or the kernel's refusal.
    pub fn pool(len_bytes: usize) -> Result<Mapping, MappingError> {
        if len_bytes == 0 {
            return Err(wrong_length(0));
        }
        let mmap_error = |source: rustix::io::Errno| MappingError::Mmap {
            len_bytes: len_bytes as u64,
            source: source.into(),
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("ringmill-pool", flags).map_err(mmap_error)?;
        rustix::fs::ftruncate(&fd, len_bytes.next_multiple_of(PAGE_BYTES) as u64)
            .map_err(mmap_error)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&fd, seals).map_err(mmap_error)?;
        Mapping::own_file(&File::from(fd), len_bytes)
    }

    /// Our own memory behind a file descriptor (a memfd), which nobody else can shorten.
    ///
    /// # Errors
    /// As for [`Mapping::foreign`].
    pub fn own_file(file: &File, len_bytes: usize) -> Result<Mapping, MappingError> {
        if len_bytes == 0 {
            return Err(wrong_length(0));
        }
        let mmap_error = |source| MappingError::Mmap { len_bytes: bytes_u64(len_bytes), source };
        let file = file.try_clone().map_err(mmap_error)?;
        let block = block_bytes(&file.metadata().map_err(mmap_error)?);
        let map_len =
            len_bytes.checked_next_multiple_of(usize_of(block)).ok_or(wrong_length(len_bytes))?;
        let raw = MmapOptions::new().len(map_len).map_raw(&file).map_err(mmap_error)?;
        let (align, phase) = alignment(map_len, 0, block);
        let place = Place::adopt(raw, map_len, align, phase)?;
        Ok(Mapping { guard: None, place, lead_bytes: 0, len_bytes, file: Some((file, 0)) })
    }

    /// The whole pages that the mapping lies in: what an IOMMU can map. They belong to nobody else.
    #[must_use]
    pub fn pages(&self) -> (HostAddr, usize) {
        let base = self.base().as_ptr() as usize;
        let first = base & !(PAGE_BYTES - 1);
        (HostAddr(first), (base + self.len_bytes).next_multiple_of(PAGE_BYTES) - first)
    }

    /// The file behind it and the offset of the first of its pages; `None` for private memory.
    #[must_use]
    pub fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        let (file, start) = self.file.as_ref()?;
        let lead = (self.lead_bytes & !(PAGE_BYTES - 1)) as u64;
        Some((file.as_fd(), start + lead))
    }

    /// True when these bytes of this file are what is mapped, still there, and not lost meanwhile.
    #[must_use]
    pub fn is_of(&self, fd: &OwnedFd, offset_bytes: u64, len_bytes: u64) -> bool {
        let Some((file, start)) = &self.file else { return false };
        let (Ok(own), Ok(other)) = (rustix::fs::fstat(file), rustix::fs::fstat(fd)) else {
            return false;
        };
        let end = offset_bytes.saturating_add(len_bytes);
        (own.st_dev, own.st_ino) == (other.st_dev, other.st_ino)
            && start + bytes_u64(self.lead_bytes) == offset_bytes
            && bytes_u64(self.len_bytes) == len_bytes
            && u64::try_from(own.st_size).is_ok_and(|size| size >= end)
            && !self.failed()
    }

    /// The first byte.
    #[must_use]
    pub fn base(&self) -> NonNull<u8> {
        // SAFETY: `lead_bytes` < the mapped length (established in `foreign`).
        unsafe { self.place.start().add(self.lead_bytes) }
    }

    /// Bytes mapped.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// True once the owner of the memory took it away and the handler put zero pages in its place.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.guard.as_ref().is_some_and(sigbus::Guard::failed)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    fn memfd(len: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, len).unwrap();
        fd
    }

    #[test]
    fn refuses_ranges_outside_the_file() {
        let fd = memfd(8192);
        assert!(matches!(
            Mapping::foreign(&fd, 4096, 8192),
            Err(MappingError::FileTooShort { .. })
        ));
        assert!(matches!(Mapping::foreign(&fd, u64::MAX, 2), Err(MappingError::Length { .. })));
        assert!(matches!(Mapping::foreign(&fd, 0, 0), Err(MappingError::Length { .. })));
        assert_eq!(Mapping::foreign(&fd, 4096, 4096).unwrap().len_bytes(), 4096);
    }

    #[test]
    fn a_mapping_knows_its_file_again() {
        let fd = memfd(16384);
        let map = Mapping::foreign(&fd, 5000, 4096).unwrap();
        let again = fd.try_clone().unwrap();
        assert!(map.is_of(&again, 5000, 4096));
        assert!(!map.is_of(&again, 904, 4096) && !map.is_of(&again, 5000, 4095));
        assert!(!map.is_of(&memfd(16384), 5000, 4096));
        assert!(!Mapping::anonymous(4096).unwrap().is_of(&again, 0, 4096));
        rustix::fs::ftruncate(&fd, 9000).unwrap();
        assert!(!map.is_of(&again, 5000, 4096), "cut");
    }

    #[test]
    fn who_is_given_a_pool_can_write_it_and_not_cut_it() {
        let map = Mapping::pool(10000).unwrap();
        let (fd, start) = map.file().unwrap();
        let given = fd.try_clone_to_owned().unwrap();
        for len_bytes in [0, 4096, 1 << 20] {
            assert_eq!(rustix::fs::ftruncate(&given, len_bytes), Err(rustix::io::Errno::PERM));
        }
        let none = SealFlags::empty();
        assert_eq!(rustix::fs::fcntl_add_seals(&given, none), Err(rustix::io::Errno::PERM));
        rustix::io::pwrite(&given, &[7], start).unwrap();
        // SAFETY: inside the mapping made above, whose file has a page there.
        assert_eq!(unsafe { map.base().as_ptr().read_volatile() }, 7);
    }

    #[test]
    fn an_ordinary_file_is_not_memory() {
        let fd: OwnedFd = File::open("/proc/self/exe").unwrap().into();
        assert!(matches!(Mapping::foreign(&fd, 0, 4096), Err(MappingError::NotMemory)));
    }

    #[test]
    fn a_truncated_file_turns_into_zero_pages_and_a_flag() {
        super::super::install_sigbus_handler().unwrap();
        let fd = memfd(8192);
        let map = Mapping::foreign(&fd, 0, 8192).unwrap();
        rustix::fs::ftruncate(&fd, 0).unwrap();
        assert!(!map.failed());
        // SAFETY: inside the mapping made above; the handler answers the SIGBUS.
        let byte = unsafe { map.base().as_ptr().add(5000).read_volatile() };
        assert_eq!(byte, 0);
        assert!(map.failed());
    }
}
