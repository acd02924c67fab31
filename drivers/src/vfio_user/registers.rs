//! HOT PATH (doorbells)
//! Registers of a vfio-user device: doorbells in memory shared with the server, the others by message.
//!
//! Flow: a doorbell is one store to a page that the server polls; any other access asks the server and waits, so it is for
//! control threads. Owner: shared. **Invariants:** an access below `trapped_bytes` may block, bounded by the connection's
//! patience; no other ever does. Once the server is gone, every read is ones.
//!
//! write_u32: mapped? fence, store — below `trapped_bytes`? message

use std::sync::Arc;

use ringmill_core::mem::DeviceWindow;

use super::connection::Connection;
use super::protocol::{ACCESS_BYTES, command, region_access};
use crate::pci::Registers;

/// A mapped part of the BAR.
#[derive(Debug)]
pub(super) struct Mapped {
    pub(super) start_bytes: usize,
    pub(super) window: DeviceWindow,
}

/// The registers of one BAR.
#[derive(Debug)]
pub struct UserRegisters {
    connection: Arc<Connection>,
    region: u32,
    len_bytes: usize,
    /// Below this, what is not mapped is reached by message; above, it does not exist.
    trapped_bytes: usize,
    mapped: Vec<Mapped>,
}

impl UserRegisters {
    #[cold]
    pub(super) fn new(
        connection: &Arc<Connection>,
        region: u32,
        len_bytes: usize,
        trapped_bytes: usize,
        mapped: Vec<Mapped>,
    ) -> UserRegisters {
        let connection = Arc::clone(connection);
        UserRegisters { connection, region, len_bytes, trapped_bytes, mapped }
    }

    /// Lets go of the server's memory. For control threads.
    #[cold]
    pub(super) fn retire(&self) {
        for part in &self.mapped {
            part.window.retire();
        }
    }

    /// The mapped part with the 32 bits at `offset_bytes`, and where in it.
    #[inline]
    fn mapped_at(&self, offset_bytes: usize) -> Option<(&DeviceWindow, usize)> {
        for part in &self.mapped {
            let at = offset_bytes.wrapping_sub(part.start_bytes);
            if at < part.window.len_bytes() {
                return Some((&part.window, at));
            }
        }
        None
    }

    #[cold]
    fn is_trapped(&self, offset_bytes: usize) -> bool {
        offset_bytes < self.trapped_bytes && offset_bytes.is_multiple_of(4)
    }

    #[cold]
    #[inline(never)]
    fn ask(&self, offset_bytes: usize) -> Option<u32> {
        if !self.is_trapped(offset_bytes) || self.connection.is_gone() {
            return None;
        }
        let question = region_access(self.region, offset_bytes as u64, 4);
        let answer = self.connection.call(command::REGION_READ, &question, &[]).ok()?;
        let data = answer.payload.get(ACCESS_BYTES..)?.first_chunk()?;
        Some(u32::from_le_bytes(*data))
    }

    /// What cannot be written is seen at the next read: the server is gone then, or the register has not changed.
    #[cold]
    #[inline(never)]
    fn tell(&self, offset_bytes: usize, value: u32) {
        if !self.is_trapped(offset_bytes) || self.connection.is_gone() {
            return;
        }
        let mut payload = region_access(self.region, offset_bytes as u64, 4);
        payload.extend_from_slice(&value.to_le_bytes());
        if let Err(error) = self.connection.call(command::REGION_WRITE, &payload, &[]) {
            self.report(offset_bytes, &error);
        }
    }

    #[cold]
    fn report(&self, offset_bytes: usize, error: &dyn std::error::Error) {
        super::report(&self.connection, &format_args!("register {offset_bytes:#x}"), error);
    }
}

impl Registers for UserRegisters {
    fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    fn read_u32(&self, offset_bytes: usize) -> u32 {
        match self.mapped_at(offset_bytes) {
            Some(_) if self.connection.is_gone() => u32::MAX,
            Some((window, at)) => window.read_u32(at),
            None => self.ask(offset_bytes).unwrap_or(u32::MAX),
        }
    }

    #[inline]
    fn write_u32(&self, offset_bytes: usize, value: u32) {
        match self.mapped_at(offset_bytes) {
            // What was put into queues is there before the server, a processor like ours, sees the doorbell.
            Some((window, at)) => window.write_u32(at, value),
            None => self.tell(offset_bytes, value),
        }
    }
}
