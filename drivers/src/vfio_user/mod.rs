//! vfio-user: a PCI device that another process emulates, such as SPDK's NVMe target, driven over a Unix socket.
//!
//! Flow: [`VfioUserBacking::connect`] negotiates → the driver maps memory into the server (by descriptor) and registers out
//! of it (doorbells) → everything else are messages. Owner: control threads; reactors touch doorbells, and bind a vector
//! before they sleep. **Invariants:** no wait is longer than the connection's patience, on a reactor than
//! its [`Patience::bind`]. Whatever the server sends, the worst that happens is that it is cut off, and then the device is gone.
//!
//! The server maps guests' memory and could keep it: like a device without an IOMMU it has to be trusted with it. A server
//! that does not give memory back when told to is cut off, upon which it has to let go of everything.
//!
//! Spec: vfio-user 0.9; PCI 3.0 §6.1 (command register), §6.7 (capabilities), §6.8 (MSI, MSI-X).

mod areas;
mod connection;
mod memory;
mod negotiation;
pub mod protocol;
mod registers;
#[cfg(test)]
mod tests;
pub mod wire;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use ringmill_core::limits::{
    VFIO_USER_ANSWER_MS, VFIO_USER_BIND_MS, VFIO_USER_CLOSE_MS, VFIO_USER_MEMORY_MS,
};
use ringmill_core::mem::{DeviceWindow, DmaDomain, IovaOffset, arena};
use ringmill_core::units::{bytes_u64, usize_of};
use rustix::event::epoll;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use self::areas::{Region, RegionError};
use self::connection::{CallError, Connection};
use self::memory::UserDomain;
use self::negotiation::Limits;
use self::protocol::{ACCESS_BYTES, Fields, ProtocolError, command, device, irq, region};
use self::registers::Mapped;
pub use self::registers::UserRegisters;
use crate::pci::{CancelToken, DeviceNews, PciBacking, PciError, take_signal};

/// What SPDK calls the socket in the directory that it is given.
const SOCKET_NAME: &str = "cntrl";

/// NVMe's registers but doorbells lie in the first page; doorbells, which reactors write, have pages of their own.
const PAGE_BYTES: usize = 4096;

/// Class, subclass and interface of NVMe controllers.
const CLASS_NVME: [u8; 3] = [0x02, 0x08, 0x01];

/// Where the arena begins for the server: a multiple of any page size.
const IOVA_START: u64 = 4 << 30;

/// Configuration space: the command register, and its bits.
const COMMAND: u64 = 4;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// The status register's bit for capabilities, and the register that points to the first.
const STATUS_CAPABILITIES: u16 = 1 << 4;
const CAPABILITIES: u64 = 0x34;
const CLASS: u64 = 9;
const CAP_MSI: u8 = 5;
const CAP_MSIX: u8 = 0x11;
/// As many capabilities as fit into 256 bytes: no chain is longer.
const CAPABILITIES_MAX: usize = 48;

fn report(connection: &Connection, what: &dyn std::fmt::Display, error: &dyn std::error::Error) {
    tracing::warn!("{}: {what}: {error}", connection.name());
}

/// How long to wait for a server.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For an answer; then the server is cut off.
    pub answer: Duration,
    /// The same for memory that it is given, or gives back.
    pub memory: Duration,
    /// For an eventfd to be bound, on a reactor; then that is an error.
    pub bind: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            answer: Duration::from_millis(VFIO_USER_ANSWER_MS),
            memory: Duration::from_millis(VFIO_USER_MEMORY_MS),
            bind: Duration::from_millis(VFIO_USER_BIND_MS),
        }
    }
}

/// A PCI function behind a vfio-user server.
#[derive(Debug)]
pub struct VfioUserBacking {
    patience: Patience,
    connection: Arc<Connection>,
    domain: Arc<UserDomain>,
    limits: Limits,
    can_reset: bool,
    /// Kind of interrupts, and how many.
    vectors: (u32, u16),
    requested: OwnedFd,
    error: OwnedFd,
    /// Readable when any of `requested`, `error` and the connection's end is.
    news: OwnedFd,
    registers: Mutex<Vec<Weak<UserRegisters>>>,
    gone_told: AtomicBool,
    closed: AtomicBool,
}

impl VfioUserBacking {
    /// Connects to the server at `traddr`: its socket, or a directory with the socket `cntrl` in it. Blocks while the server
    /// answers some twenty questions, each within its [`Patience`].
    ///
    /// # Errors
    /// No server there, one that breaks the protocol or does not answer, or no PCI device.
    pub fn connect(traddr: &Path) -> Result<VfioUserBacking, PciError> {
        VfioUserBacking::connect_until(traddr, &CancelToken::default())
    }

    /// The same as the beginning of an attempt that may end early: from then on until it is finished, a server that keeps
    /// it going for too long is cut off.
    ///
    /// # Errors
    /// As for [`VfioUserBacking::connect`].
    pub fn connect_until(traddr: &Path, token: &CancelToken) -> Result<VfioUserBacking, PciError> {
        VfioUserBacking::connect_with(traddr, Patience::default(), token)
    }

    /// The same with another patience.
    ///
    /// # Errors
    /// As for [`VfioUserBacking::connect`].
    pub fn connect_with(
        traddr: &Path,
        patience: Patience,
        token: &CancelToken,
    ) -> Result<VfioUserBacking, PciError> {
        let name = traddr.display().to_string();
        let io_error = |what: &str, source: io::Error| PciError::Io {
            device: name.clone(),
            what: what.to_owned(),
            source,
        };
        let path: PathBuf =
            if traddr.is_dir() { traddr.join(SOCKET_NAME) } else { traddr.to_owned() };
        let socket = connect_socket(&path, Instant::now() + patience.answer).map_err(|source| {
            io_error("cannot connect to a vfio-user server; is one listening there?", source)
        })?;
        let connection = Connection::start(&name, socket, patience, token)
            .map_err(|source| io_error("cannot start a thread for the connection", source))?;
        let opened = Self::open(&connection, patience);
        if opened.is_err() {
            connection.end();
        }
        opened
    }

    fn open(connection: &Arc<Connection>, patience: Patience) -> Result<VfioUserBacking, PciError> {
        let name = connection.name();
        let proposal = negotiation::proposal();
        let answer = connection
            .call(command::VERSION, &proposal, &[])
            .map_err(|error| error.at(name, "version negotiation"))?;
        let limits =
            negotiation::answer(&answer.payload).map_err(|reason| refused(name, reason))?;
        let (can_reset, irqs_count) = device_info(connection)?;
        let vectors = find_vectors(connection, irqs_count)?;
        let io_error = |errno: Errno| PciError::Io {
            device: name.to_owned(),
            what: "cannot make descriptors for its news".to_owned(),
            source: errno.into(),
        };
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let requested = eventfd(0, flags).map_err(io_error)?;
        let error = eventfd(0, flags).map_err(io_error)?;
        let news = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io_error)?;
        for fd in [requested.as_fd(), error.as_fd(), connection.gone_fd()] {
            epoll::add(&news, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)
                .map_err(io_error)?;
        }
        // Numbers to the server; low ones, as it may know no more than 48 bits, and never our own addresses.
        let (arena_start, _) = arena().map_err(|error| refused(name, error.to_string()))?;
        let offset = IovaOffset(IOVA_START.wrapping_sub(arena_start.0 as u64));
        let domain = Arc::new(UserDomain::new(connection, limits, offset));
        let backing = VfioUserBacking {
            patience,
            connection: Arc::clone(connection),
            domain,
            limits,
            can_reset,
            vectors,
            requested,
            error,
            news,
            registers: Mutex::default(),
            gone_told: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        };
        backing.bind_news(irqs_count)?;
        Ok(backing)
    }

    /// Has the server tell when it wants the device back, or when its bus fails, if it can.
    fn bind_news(&self, irqs_count: u32) -> Result<(), PciError> {
        for (index, fd) in [(irq::REQ, &self.requested), (irq::ERR, &self.error)] {
            if index < irqs_count && irq_count(&self.connection, index)? > 0 {
                self.connection
                    .call(command::DEVICE_SET_IRQS, &set_eventfd(index, 0), &[fd.as_fd()])
                    .map_err(|error| {
                        error.at(self.name(), "cannot bind an eventfd for its news")
                    })?;
            }
        }
        Ok(())
    }

    fn region(&self, index: u32) -> Result<Region, PciError> {
        areas::ask(&self.connection, index).map_err(|error| match error {
            RegionError::Call(error) => error.at(self.name(), "GET_REGION_INFO"),
            RegionError::Protocol(error) => self.broken(error),
        })
    }

    /// A server whose answer cannot be is cut off.
    fn broken(&self, error: ProtocolError) -> PciError {
        broken(&self.connection, error)
    }

    fn config_write(&self, offset_bytes: u64, data: &[u8]) -> Result<(), CallError> {
        self.config_write_until(offset_bytes, data, None)
    }

    fn config_write_until(
        &self,
        offset_bytes: u64,
        data: &[u8],
        deadline: Option<Instant>,
    ) -> Result<(), CallError> {
        let count = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let mut payload = protocol::region_access(region::CONFIG, offset_bytes, count);
        payload.extend_from_slice(data);
        match deadline {
            None => self.connection.call(command::REGION_WRITE, &payload, &[]),
            Some(deadline) => {
                self.connection.call_until(command::REGION_WRITE, &payload, &[], deadline)
            }
        }
        .map(drop)
    }

    fn config_u16(&self, offset_bytes: u64) -> Result<u16, PciError> {
        let mut bytes = [0; 2];
        self.config_read(offset_bytes, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    fn config_u8(&self, offset_bytes: u64) -> Result<u8, PciError> {
        let mut bytes = [0];
        self.config_read(offset_bytes, &mut bytes)?;
        Ok(bytes[0])
    }

    /// Switches messages on in configuration space. A kernel's VFIO does that when an eventfd is bound; a vfio-user server may
    /// leave it to its client, as the guest's driver would do it.
    fn enable_messages(&self) -> Result<(), PciError> {
        let (id, on, off) = match self.vectors.0 {
            irq::MSIX => (CAP_MSIX, 1u16 << 15, 1u16 << 14),
            irq::MSI => (CAP_MSI, 1, 0),
            _ => return Ok(()),
        };
        if self.config_u16(COMMAND + 2)? & STATUS_CAPABILITIES == 0 {
            return Ok(());
        }
        let mut at = u64::from(self.config_u8(CAPABILITIES)? & !3);
        for _ in 0..CAPABILITIES_MAX {
            if at < 0x40 {
                break;
            }
            if self.config_u8(at)? == id {
                let control = self.config_u16(at + 2)? & !off | on;
                return self
                    .config_write(at + 2, &control.to_le_bytes())
                    .map_err(|error| error.at(self.name(), "cannot enable its interrupts"));
            }
            at = u64::from(self.config_u8(at + 1)? & !3);
        }
        Ok(())
    }

    /// Maps what can be mapped of the first `len_bytes`.
    fn map_areas(
        &self,
        bar: u8,
        region: &Region,
        len_bytes: usize,
    ) -> Result<Vec<Mapped>, PciError> {
        let Some(file) = &region.file else {
            return Ok(Vec::new());
        };
        let refuse = |why: String| {
            let reason = format!("the server's memory for BAR {bar} cannot be used: {why}");
            refused(self.name(), reason)
        };
        let file_bytes =
            rustix::fs::fstat(file).ok().and_then(|stat| u64::try_from(stat.st_size).ok());
        let mut mapped = Vec::new();
        for area in &region.areas {
            let (start, end) = (area.start, area.end.min(bytes_u64(len_bytes)));
            if start >= end {
                continue;
            }
            // Only tmpfs and hugetlbfs answer this, and only their pages never wait for a disk or another process.
            if rustix::fs::fcntl_get_seals(file).is_err() {
                return Err(refuse(
                    "it is no memory file. With SPDK it lies beside the socket: give the server a directory on a tmpfs, such \
                     as /run or /dev/shm"
                        .to_owned(),
                ));
            }
            let file_end = region.file_offset.checked_add(end);
            if file_end.zip(file_bytes).is_none_or(|(end, has)| end > has) {
                let has = file_bytes.unwrap_or(0);
                return Err(refuse(format!("its file has {has} bytes and ends before it")));
            }
            let offset = region.file_offset + start;
            let window = DeviceWindow::map(file.as_fd(), offset, usize_of(end - start))
                .map_err(|error| refuse(error.to_string()))?;
            mapped.push(Mapped { start_bytes: usize_of(start), window });
        }
        mapped.sort_by_key(|part| part.start_bytes);
        Ok(mapped)
    }

    /// Remembers registers, so that closing takes the server's memory out of them.
    fn keep(&self, registers: UserRegisters) -> Arc<UserRegisters> {
        let registers = Arc::new(registers);
        let mut kept = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|kept| kept.strong_count() > 0);
        kept.push(Arc::downgrade(&registers));
        registers
    }

    fn is_nvme(&self) -> Result<bool, PciError> {
        let mut class = [0; 3];
        self.config_read(CLASS, &mut class)?;
        Ok(class == CLASS_NVME)
    }

    /// What [`PciBacking::close`] asks of the server, as long as there is time.
    fn shut_down(&self, deadline: Instant) -> Result<(), CallError> {
        let call = |command, payload: &[u8]| {
            self.connection.call_until(command, payload, &[], deadline).map(drop)
        };
        let mut refused = Ok(());
        let mut keep = |result: Result<(), CallError>| match result {
            Err(error @ CallError::Refused(_)) => {
                refused = Err(error);
                Ok(())
            }
            other => other,
        };
        keep(self.config_write_until(COMMAND, &0u16.to_le_bytes(), Some(deadline)))?;
        if self.vectors.1 > 0 {
            let flags = irq::SET_DATA_NONE | irq::SET_ACTION_TRIGGER;
            let payload = protocol::words(&[20, flags, self.vectors.0, 0, 0]);
            keep(call(command::DEVICE_SET_IRQS, &payload))?;
        }
        if self.can_reset {
            keep(call(command::DEVICE_RESET, &[]))?;
        }
        for (iova, len_bytes) in self.connection.memory().ranges() {
            keep(call(command::DMA_UNMAP, &protocol::dma_unmap(iova, len_bytes)))?;
        }
        refused
    }
}

impl PciBacking for VfioUserBacking {
    type Registers = UserRegisters;

    fn name(&self) -> &str {
        self.connection.name()
    }

    fn dma(&self) -> Arc<dyn DmaDomain> {
        let domain: Arc<UserDomain> = Arc::clone(&self.domain);
        domain
    }

    fn registers(&self, bar: u8, len_bytes_min: usize) -> Result<Arc<UserRegisters>, PciError> {
        let refuse = |reason: String| Err(refused(self.name(), reason));
        if bar > 5 {
            return refuse(format!("there is no BAR {bar}"));
        }
        let region = self.region(bar.into())?;
        if region.len_bytes < bytes_u64(len_bytes_min) {
            let has = region.len_bytes;
            return refuse(format!("BAR {bar} has {has} bytes, {len_bytes_min} are needed"));
        }
        let whole = usize_of(region.len_bytes.min(isize::MAX.unsigned_abs() as u64));
        let len_bytes = len_bytes_min.max(1).next_multiple_of(PAGE_BYTES).min(whole);
        let mapped = self.map_areas(bar, &region, len_bytes)?;
        if !self.is_nvme()? {
            return Ok(self.keep(UserRegisters::new(
                &self.connection,
                bar.into(),
                len_bytes,
                len_bytes,
                mapped,
            )));
        }
        // Reactors write doorbells and must not wait for a message's answer.
        let mut doorbells_end = PAGE_BYTES;
        for part in &mapped {
            if part.start_bytes <= doorbells_end {
                doorbells_end = doorbells_end.max(part.start_bytes + part.window.len_bytes());
            }
        }
        if doorbells_end < len_bytes_min {
            return refuse(format!(
                "its doorbells cannot be mapped ({doorbells_end:#x} of {len_bytes_min:#x} bytes of BAR 0 can), and a message \
                 for each would stop a reactor; let the server share them (SPDK: without --disable-mappable-bar0)"
            ));
        }
        let len_bytes = len_bytes.min(doorbells_end);
        Ok(self.keep(UserRegisters::new(
            &self.connection,
            bar.into(),
            len_bytes,
            PAGE_BYTES,
            mapped,
        )))
    }

    fn config_read(&self, offset_bytes: u64, into: &mut [u8]) -> Result<(), PciError> {
        let piece_max = usize_of(self.limits.transfer_bytes_max.min(PAGE_BYTES as u64));
        let mut at = offset_bytes;
        for piece in into.chunks_mut(piece_max) {
            let count = u32::try_from(piece.len()).unwrap_or(u32::MAX);
            let question = protocol::region_access(region::CONFIG, at, count);
            let answer = self
                .connection
                .call(command::REGION_READ, &question, &[])
                .map_err(|error| error.at(self.name(), "cannot read configuration space"))?;
            let data = answer.payload.get(ACCESS_BYTES..).unwrap_or_default();
            if data.len() != piece.len() {
                let command = command::REGION_READ;
                let len_bytes = answer.payload.len();
                return Err(self.broken(ProtocolError::Short { command, len_bytes }));
            }
            piece.copy_from_slice(data);
            at = at.saturating_add(count.into());
        }
        Ok(())
    }

    fn set_bus_master(&self, on: bool) -> Result<(), PciError> {
        if on {
            self.enable_messages()?;
        }
        let bits = COMMAND_MEMORY | COMMAND_BUS_MASTER;
        let was = self.config_u16(COMMAND)?;
        let now = if on { was | bits } else { was & !COMMAND_BUS_MASTER };
        self.config_write(COMMAND, &now.to_le_bytes())
            .map_err(|error| error.at(self.name(), "cannot write its command register"))
    }

    fn reset(&self) -> Result<(), PciError> {
        if !self.can_reset {
            return Err(refused(self.name(), "its server cannot reset it".to_owned()));
        }
        self.connection
            .call(command::DEVICE_RESET, &[], &[])
            .map(drop)
            .map_err(|error| error.at(self.name(), "cannot be reset"))
    }

    fn vectors_count(&self) -> u16 {
        self.vectors.1
    }

    /// Binding waits for the server's answer, as an interrupt that it does not know of would be lost; at most
    /// [`Patience::bind`]. A server that was late once is not asked again before it has caught up.
    fn bind_vector(&self, vector: u16, eventfd: Option<BorrowedFd<'_>>) -> Result<(), PciError> {
        if vector >= self.vectors.1 {
            return Err(refused(self.name(), format!("it has no interrupt vector {vector}")));
        }
        let lags = self.connection.lags();
        let now = Instant::now();
        let deadline = if lags { now } else { now + self.patience.bind };
        let payload = set_eventfd(self.vectors.0, vector.into());
        let command = command::DEVICE_SET_IRQS;
        match eventfd {
            None => self.connection.tell(command, &payload, &[], deadline),
            Some(_) if lags => Err(CallError::Late),
            Some(fd) => self.connection.try_call(command, &payload, &[fd], deadline).map(drop),
        }
        .map_err(|error| error.at(self.name(), "cannot bind an interrupt"))
    }

    fn unmask(&self, vector: u16) -> Result<(), PciError> {
        if self.vectors.0 != irq::INTX || vector >= self.vectors.1 {
            return Ok(());
        }
        let flags = irq::SET_DATA_NONE | irq::SET_ACTION_UNMASK;
        let payload = protocol::words(&[20, flags, irq::INTX, 0, 1]);
        let deadline = Instant::now() + self.patience.bind;
        self.connection
            .tell(command::DEVICE_SET_IRQS, &payload, &[], deadline)
            .map_err(|error| error.at(self.name(), "cannot unmask its interrupt"))
    }

    fn news_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.news.as_fd())
    }

    fn news(&self) -> Option<DeviceNews> {
        if self.connection.is_gone() {
            take_signal(self.connection.gone_fd());
            let first = !self.gone_told.swap(true, Ordering::Relaxed);
            return first.then_some(DeviceNews::Gone);
        }
        if take_signal(&self.error) {
            return Some(DeviceNews::Error);
        }
        take_signal(&self.requested).then_some(DeviceNews::Requested)
    }

    fn hurry_up(&self) {
        self.connection.hurry_up();
    }

    fn close(&self) {
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let deadline = Instant::now() + Duration::from_millis(VFIO_USER_CLOSE_MS);
        if !self.connection.is_gone()
            && let Err(error) = self.shut_down(deadline)
        {
            report(&self.connection, &"closing the device", &error);
        }
        self.connection.end();
        let kept = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().filter_map(Weak::upgrade).for_each(|registers| registers.retire());
    }
}

impl Drop for VfioUserBacking {
    fn drop(&mut self) {
        self.close();
    }
}

fn refused(device: &str, reason: String) -> PciError {
    PciError::Refused { device: device.to_owned(), reason }
}

fn broken(connection: &Connection, error: ProtocolError) -> PciError {
    connection.cut_off(&format!("it sent {error}"));
    refused(connection.name(), format!("its server sent {error}"))
}

/// A SET_IRQS payload that gives one vector an eventfd, or takes it away when none comes along.
fn set_eventfd(index: u32, vector: u32) -> Vec<u8> {
    let flags = irq::SET_DATA_EVENTFD | irq::SET_ACTION_TRIGGER;
    protocol::words(&[20, flags, index, vector, 1])
}

/// Connects without blocking for longer than until `deadline`: a server with a full backlog makes us try again.
fn connect_socket(path: &Path, deadline: Instant) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match connect(&socket, &address) {
            Ok(()) => return Ok(socket),
            Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Whether it can be reset, and its kinds of interrupts.
fn device_info(connection: &Connection) -> Result<(bool, u32), PciError> {
    let command = command::DEVICE_GET_INFO;
    let answer = connection
        .call(command, &protocol::words(&[16, 0, 0, 0]), &[])
        .map_err(|error| error.at(connection.name(), "GET_INFO"))?;
    let fields = Fields::new(command, &answer.payload);
    let read = || Ok((fields.u32(4)?, fields.u32(8)?, fields.u32(12)?));
    let (flags, regions_count, irqs_count) = read().map_err(|error| broken(connection, error))?;
    if flags & device::PCI == 0 || regions_count <= region::CONFIG {
        return Err(refused(connection.name(), "its server has no PCI device".to_owned()));
    }
    Ok((flags & device::RESET != 0, irqs_count))
}

/// How many interrupts of a kind can be bound to eventfds.
fn irq_count(connection: &Connection, index: u32) -> Result<u32, PciError> {
    let command = command::DEVICE_GET_IRQ_INFO;
    let answer = match connection.call(command, &protocol::words(&[16, 0, index, 0]), &[]) {
        Ok(answer) => answer,
        // A kind that it does not have.
        Err(CallError::Refused(_)) => return Ok(0),
        Err(error) => return Err(error.at(connection.name(), "GET_IRQ_INFO")),
    };
    let fields = Fields::new(command, &answer.payload);
    let read = || Ok((fields.u32(4)?, fields.u32(8)?, fields.u32(12)?));
    let (flags, got, count) = read().map_err(|error| broken(connection, error))?;
    if got != index {
        let error = ProtocolError::Field { command, field: "index", value: got.into() };
        return Err(broken(connection, error));
    }
    Ok(if flags & irq::EVENTFD == 0 { 0 } else { count })
}

/// The best kind of interrupts and its count.
fn find_vectors(connection: &Connection, irqs_count: u32) -> Result<(u32, u16), PciError> {
    for index in [irq::MSIX, irq::MSI, irq::INTX] {
        let count = if index < irqs_count { irq_count(connection, index)? } else { 0 };
        if count > 0 {
            // The largest MSI-X table has 2,048 entries.
            let count = if index == irq::INTX { 1 } else { count.min(2048) };
            return Ok((index, u16::try_from(count).unwrap_or(1)));
        }
    }
    Ok((irq::INTX, 0))
}
