//! The session's messages about guest memory.
//!
//! In: SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG. Out: validated regions for the backend. Owner: the control thread.
//!
//! **Invariants:** the session's table changes only when the backend has changed its own; no message takes the memory
//! of a running ring away.
//!
//! Spec: vhost-user protocol, "VHOST_USER_SET_MEM_TABLE", "VHOST_USER_ADD_MEM_REG", "VHOST_USER_REM_MEM_REG".

use std::os::fd::OwnedFd;

use super::super::backend::Backend;
use super::super::error::Error;
use super::super::memory::{MemoryTable, Region};
use super::super::message::{MemoryRegion, Request};
use super::{Operation, Outcome, Session, one_fd, wrong_size};

impl Session {
    pub(super) fn set_mem_table(
        &mut self,
        payload: &[u8],
        fds: Vec<OwnedFd>,
        backend: &mut dyn Backend,
    ) -> Result<Outcome, Error> {
        let request = Request::SetMemTable;
        let described = MemoryRegion::decode_table(payload)
            .map_err(|regions_count| Error::TableTooLong { regions_count })?
            .ok_or_else(|| wrong_size(request, payload))?;
        if fds.len() != described.len() {
            let (expected, received) = (described.len(), fds.len());
            return Err(Error::FdCount { request, expected, received });
        }
        let regions = described.iter().map(Region::new).collect::<Result<Vec<_>, _>>()?;
        let table = MemoryTable::new(&regions)?;
        self.expect_rings_covered(request, &table)?;
        let descs = regions
            .iter()
            .zip(&described)
            .zip(fds)
            .map(|((region, described), fd)| region.describe(described.mmap_offset, fd))
            .collect();
        let progress = backend.set_mem_table(descs);
        self.advance(request, progress, Operation::Memory(table), backend)
    }

    pub(super) fn add_mem_region(
        &mut self,
        payload: &[u8],
        fds: Vec<OwnedFd>,
        backend: &mut dyn Backend,
    ) -> Result<Outcome, Error> {
        let request = Request::AddMemReg;
        self.require_mem_slots(request)?;
        let described =
            MemoryRegion::decode_single(payload).ok_or_else(|| wrong_size(request, payload))?;
        let fd = one_fd(request, fds)?;
        let region = Region::new(&described)?;
        let slots_max = backend.mem_slots_max();
        if usize::try_from(slots_max).is_ok_and(|slots| self.memory.regions().len() >= slots) {
            return Err(Error::SlotsFull { slots_max });
        }
        let table = self.memory.with(region)?;
        let progress = backend.add_mem_region(region.describe(described.mmap_offset, fd));
        self.advance(request, progress, Operation::Memory(table), backend)
    }

    pub(super) fn remove_mem_region(
        &mut self,
        payload: &[u8],
        backend: &mut dyn Backend,
    ) -> Result<Outcome, Error> {
        let request = Request::RemMemReg;
        self.require_mem_slots(request)?;
        let described =
            MemoryRegion::decode_single(payload).ok_or_else(|| wrong_size(request, payload))?;
        let region = Region::new(&described)?;
        let table = self.memory.without(region)?;
        self.expect_rings_covered(request, &table)?;
        let Region { guest_addr, len_bytes, user_addr } = region;
        let progress = backend.remove_mem_region(guest_addr, user_addr, len_bytes);
        self.advance(request, progress, Operation::Memory(table), backend)
    }

    pub(super) fn expect_rings_covered(
        &self,
        request: Request,
        memory: &MemoryTable,
    ) -> Result<(), Error> {
        let layout = self.layout();
        for index in self.running_rings() {
            if !self.rings[usize::from(index)].is_covered(layout, memory) {
                return Err(Error::RegionInUse { request, index });
            }
        }
        Ok(())
    }
}
