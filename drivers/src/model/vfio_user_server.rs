//! A vfio-user server for tests, benchmarks and trying things by hand: the model for drivers of other processes.
//!
//! Flow: a thread accepts one client at a time → its messages become calls of the model's backing; registers are
//! trapped, doorbells are pages of a file that the client maps, its memory is mapped by descriptor. Owner: the server's
//! thread; [`VfioUserServer`] stops it. **Invariants:** whatever a client sends, the answer is an error or, where the protocol
//! is broken, the end of that client. When it goes, all its memory and eventfds go, and the device is no bus master.
//!
//! Not served: migration, memory without a descriptor, and messages of our own to the client.
//!
//! Spec: vfio-user 0.9.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ringmill_core::limits::VFIO_USER_FDS_MAX;
use ringmill_core::mem::Mapping;
use ringmill_core::units::{bytes_u64, usize_of};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::backing::ModelBacking;
use super::link::ModelRegisters;
use super::options::Vectors;
use crate::pci::{DeviceNews, PciBacking, Registers};
use crate::vfio_user::protocol::{
    ACCESS_BYTES, Fields, Header, ProtocolError, VERSION_MAJOR, VERSION_MINOR, command, device,
    flags, irq, region, words,
};
use crate::vfio_user::wire::{Message, Outbox, Reader, WireError};

/// Bytes of configuration space.
const CONFIG_BYTES: usize = 4096;

/// The command register and its bus master bit.
const COMMAND: usize = 4;
const BUS_MASTER: u8 = 1 << 2;

/// The page of registers that are trapped; behind it, BAR 0 can be mapped.
const TRAPPED_BYTES: u64 = 4096;

/// A client that takes no answer for so long is none.
const SEND_PATIENCE: Duration = Duration::from_secs(5);

/// A running server. Dropping it stops it as [`VfioUserServer::stop`] does.
#[derive(Debug)]
pub struct VfioUserServer {
    path: PathBuf,
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl VfioUserServer {
    /// Listens at `path`, which must not exist.
    ///
    /// # Errors
    /// No socket, no thread, or a device without BAR 0.
    pub fn start(path: &Path, device: ModelBacking) -> io::Result<VfioUserServer> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let registers = device.registers(0, 0).map_err(io::Error::other)?;
        let mut config = vec![0; CONFIG_BYTES];
        // What a device does not have reads as zeroes.
        let _ = device.config_read(0, &mut config[..256]);
        let stopper = stop.try_clone()?;
        let thread = std::thread::Builder::new()
            .name("vfio-user-server".to_owned())
            .spawn(move || Server { device, registers, config }.run(&listener, stopper.as_fd()))?;
        Ok(VfioUserServer { path: path.to_owned(), stop, thread: Some(thread) })
    }

    /// The socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Hangs up on the client, as if the process had ended, and waits for the thread.
    pub fn stop(&mut self) {
        // A full counter has stopped it already.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // Somebody may have removed it.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Drop for VfioUserServer {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Server {
    device: ModelBacking,
    registers: Arc<ModelRegisters>,
    config: Vec<u8>,
}

/// What belongs to one client.
#[derive(Default)]
struct Client {
    reader: Reader,
    outbox: Outbox,
    memory: BTreeMap<u64, Arc<Mapping>>,
    /// Eventfds for errors and requests.
    news: [Option<OwnedFd>; 2],
    has_version: bool,
}

/// An answer: a payload and perhaps a descriptor; or an error number.
type Answer<'a> = Result<(Vec<u8>, Option<BorrowedFd<'a>>), Errno>;

fn plain(payload: Vec<u8>) -> Answer<'static> {
    Ok((payload, None))
}

impl From<ProtocolError> for Refusal {
    fn from(_: ProtocolError) -> Refusal {
        Refusal(Errno::INVAL)
    }
}

/// An error number, from wherever.
struct Refusal(Errno);

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Refusal {
        Refusal(errno)
    }
}

impl Server {
    fn run(mut self, listener: &UnixListener, stop: BorrowedFd<'_>) {
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
                PollFd::new(listener, PollFlags::IN),
            ];
            if poll(&mut fds, None).is_err_and(|errno| errno != Errno::INTR) {
                return;
            }
            if !fds[0].revents().is_empty() {
                return;
            }
            if let Ok((stream, _)) = listener.accept() {
                let mut client = Client::default();
                let goes_on = self.serve(&stream, &mut client, stop);
                self.forget(client);
                if !goes_on {
                    return;
                }
            }
        }
    }

    /// Until the client is gone; false when the server is to stop, as when the device is gone.
    fn serve(&mut self, stream: &UnixStream, client: &mut Client, stop: BorrowedFd<'_>) -> bool {
        loop {
            match client.reader.receive(stream) {
                Ok(Some(message)) => {
                    if !self.answer(stream, client, message) {
                        return true;
                    }
                    continue;
                }
                Ok(None) => {}
                Err(WireError::Closed) => return true,
                Err(error) => {
                    tracing::info!("a vfio-user client is cut off: {error}");
                    return true;
                }
            }
            let mut fds = vec![
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
                PollFd::new(stream, PollFlags::IN),
            ];
            fds.extend(self.device.news_fd().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            if poll(&mut fds, None).is_err_and(|errno| errno != Errno::INTR) {
                return false;
            }
            if !fds[0].revents().is_empty() {
                return false;
            }
            let has_news = fds.get(2).is_some_and(|fd| !fd.revents().is_empty());
            if has_news && !self.tell_news(client) {
                return false;
            }
        }
    }

    /// Passes news on; false when the device is gone.
    fn tell_news(&self, client: &Client) -> bool {
        while let Some(news) = self.device.news() {
            let fd = match news {
                DeviceNews::Gone => return false,
                DeviceNews::Error => &client.news[0],
                DeviceNews::Requested => &client.news[1],
            };
            if let Some(fd) = fd {
                // A full counter is news that nobody has looked at.
                let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
            }
        }
        true
    }

    /// Takes everything away that a client brought.
    fn forget(&mut self, mut client: Client) {
        let backing = &self.device;
        // A device that is gone does none of it any more.
        let _ = backing.set_bus_master(false);
        self.config[COMMAND] &= !BUS_MASTER;
        for vector in 0..backing.vectors_count() {
            let _ = backing.bind_vector(vector, None);
        }
        for (iova, memory) in std::mem::take(&mut client.memory) {
            self.device.domain().unmap_at(iova, &memory);
        }
    }

    /// Answers one message; false when the client is to be cut off.
    fn answer(&mut self, stream: &UnixStream, client: &mut Client, message: Message) -> bool {
        let Message { header, payload, fds } = message;
        if header.is_reply() || client.has_version == (header.command == command::VERSION) {
            return false;
        }
        let fields = Fields::new(header.command, &payload);
        let answer = self.execute(client, header.command, fields, fds);
        if header.command == command::VERSION {
            if answer.is_err() {
                return false;
            }
            client.has_version = true;
        }
        if header.flags & flags::NO_REPLY != 0 {
            return true;
        }
        let (payload, fd, bits, errno) = match answer {
            Ok((payload, fd)) => (payload, fd, flags::REPLY, 0),
            Err(errno) => (Vec::new(), None, flags::REPLY | flags::ERROR, errno.raw_os_error()),
        };
        let errno = u32::try_from(errno).unwrap_or(0);
        let reply = Header { flags: bits, errno, payload_bytes: payload.len(), ..header };
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        let until = Instant::now() + SEND_PATIENCE;
        client.outbox.send(stream.as_fd(), &reply.message(&payload), &fds, until).is_ok()
    }

    fn execute(
        &mut self,
        client: &mut Client,
        command: u16,
        fields: Fields<'_>,
        fds: Vec<OwnedFd>,
    ) -> Answer<'_> {
        let done = match command {
            command::VERSION => version(fields),
            command::DMA_MAP => self.dma_map(client, fields, fds),
            command::DMA_UNMAP => self.dma_unmap(client, fields),
            command::DEVICE_GET_INFO => {
                let bits = device::RESET | device::PCI;
                Ok(words(&[16, bits, region::COUNT, irq::COUNT]))
            }
            command::DEVICE_GET_REGION_INFO => return self.region_info(fields),
            command::DEVICE_GET_IRQ_INFO => self.irq_info(fields),
            command::DEVICE_SET_IRQS => self.set_irqs(client, fields, fds),
            command::REGION_READ => self.region_read(fields),
            command::REGION_WRITE => self.region_write(fields),
            command::DEVICE_RESET => self.reset(),
            _ => Err(Refusal(Errno::OPNOTSUPP)),
        };
        done.map_err(|Refusal(errno)| errno).and_then(plain)
    }

    fn dma_map(
        &self,
        client: &mut Client,
        fields: Fields<'_>,
        fds: Vec<OwnedFd>,
    ) -> Result<Vec<u8>, Refusal> {
        let (offset, iova, len_bytes) = (fields.u64(8)?, fields.u64(16)?, fields.u64(24)?);
        let end = iova.checked_add(len_bytes).ok_or(Errno::INVAL)?;
        if len_bytes == 0 || (offset | iova | len_bytes) & 4095 != 0 || fields.u32(4)? & !3 != 0 {
            return Err(Refusal(Errno::INVAL));
        }
        let overlaps = |(at, memory): (&u64, &Arc<Mapping>)| {
            iova < at + bytes_u64(memory.len_bytes()) && *at < end
        };
        if client.memory.iter().any(overlaps) {
            return Err(Refusal(Errno::EXIST));
        }
        let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| Errno::INVAL)?;
        // Clients name whole pages; a file may end within its last one.
        let file_bytes =
            rustix::fs::fstat(&fd).map_or(0, |stat| stat.st_size.try_into().unwrap_or(0));
        let left = u64::saturating_sub(file_bytes, offset);
        let ends_in_page = left < len_bytes && left.next_multiple_of(4096) == len_bytes;
        let own_bytes = if ends_in_page { left } else { len_bytes };
        let memory = Mapping::foreign(&fd, offset, own_bytes).map_err(|error| {
            tracing::info!("a vfio-user client's memory is refused: {error}");
            Errno::INVAL
        })?;
        let memory = Arc::new(memory);
        self.device.domain().map_at(iova, &memory).map_err(|_| Errno::NOMEM)?;
        client.memory.insert(iova, memory);
        Ok(Vec::new())
    }

    fn dma_unmap(&self, client: &mut Client, fields: Fields<'_>) -> Result<Vec<u8>, Refusal> {
        let (iova, len_bytes) = (fields.u64(8)?, fields.u64(16)?);
        let memory = client.memory.get(&iova).ok_or(Errno::NOENT)?;
        if bytes_u64(memory.len_bytes()).next_multiple_of(4096) != len_bytes {
            return Err(Refusal(Errno::INVAL));
        }
        self.device.domain().unmap_at(iova, memory);
        client.memory.remove(&iova);
        Ok(fields.rest(0)?[..24].to_vec())
    }

    fn region_info(&self, fields: Fields<'_>) -> Answer<'_> {
        let room = fields.u32(0).map_err(|_| Errno::INVAL)?;
        let index = fields.u32(8).map_err(|_| Errno::INVAL)?;
        let readable = region::READ | region::WRITE;
        let info = |argsz, bits, caps, len_bytes: u64| {
            let mut payload = words(&[argsz, bits, index, caps]);
            payload.extend(len_bytes.to_le_bytes());
            payload.extend(0u64.to_le_bytes());
            payload
        };
        let bar_bytes = bytes_u64(self.registers.len_bytes());
        match index {
            0 => {
                let bits = readable | region::MMAP | region::CAPS;
                let mut payload = info(64, bits, 32, bar_bytes);
                if room >= 64 {
                    payload.extend(words(&[1 << 16 | u32::from(region::CAP_SPARSE_MMAP), 0, 1, 0]));
                    payload.extend(TRAPPED_BYTES.to_le_bytes());
                    payload.extend((bar_bytes - TRAPPED_BYTES).to_le_bytes());
                }
                Ok((payload, self.registers.memory().file().map(|(fd, _)| fd)))
            }
            region::CONFIG => plain(info(32, readable, 0, bytes_u64(CONFIG_BYTES))),
            1..region::COUNT => plain(info(32, 0, 0, 0)),
            _ => Err(Errno::INVAL),
        }
    }

    fn irq_info(&self, fields: Fields<'_>) -> Result<Vec<u8>, Refusal> {
        let index = fields.u32(8)?;
        if index >= irq::COUNT {
            return Err(Refusal(Errno::INVAL));
        }
        Ok(words(&[16, irq::EVENTFD, index, self.vectors_of(index)]))
    }

    /// Interrupts of a kind.
    fn vectors_of(&self, index: u32) -> u32 {
        let kind = match self.device.vectors_mode() {
            Vectors::None => return u32::from(matches!(index, irq::ERR | irq::REQ)),
            Vectors::Intx => irq::INTX,
            Vectors::Msi => irq::MSI,
            Vectors::MsiX(_) => irq::MSIX,
        };
        match index {
            irq::ERR | irq::REQ => 1,
            index if index == kind => u32::from(self.device.vectors_count()),
            _ => 0,
        }
    }

    fn set_irqs(
        &self,
        client: &mut Client,
        fields: Fields<'_>,
        fds: Vec<OwnedFd>,
    ) -> Result<Vec<u8>, Refusal> {
        let (bits, index) = (fields.u32(4)?, fields.u32(8)?);
        let (start, count) = (fields.u32(12)?, fields.u32(16)?);
        let with_fds = irq::SET_DATA_EVENTFD | irq::SET_ACTION_TRIGGER;
        let take_all_away = irq::SET_DATA_NONE | irq::SET_ACTION_TRIGGER;
        let there_are = self.vectors_of(index);
        if index == irq::INTX && bits == irq::SET_DATA_NONE | irq::SET_ACTION_UNMASK {
            self.device.unmask(0).map_err(|_| Errno::IO)?;
            return Ok(Vec::new());
        }
        let (range, mut fds) = if bits == take_all_away && start == 0 && count == 0 {
            (0..there_are, Vec::new())
        } else if bits == with_fds
            && start.checked_add(count).is_some_and(|end| end <= there_are)
            && (fds.is_empty() || fds.len() == count as usize)
        {
            (start..start + count, fds)
        } else {
            return Err(Refusal(Errno::INVAL));
        };
        fds.reverse();
        for vector in range {
            let fd = fds.pop();
            match index {
                irq::ERR => client.news[0] = fd,
                irq::REQ => client.news[1] = fd,
                _ => {
                    let vector = u16::try_from(vector).map_err(|_| Errno::INVAL)?;
                    let bound = self.device.bind_vector(vector, fd.as_ref().map(AsFd::as_fd));
                    bound.map_err(|_| Errno::IO)?;
                }
            }
        }
        Ok(Vec::new())
    }

    /// Offset and length within a region; all of it lies inside.
    fn access(&self, fields: Fields<'_>) -> Result<(u32, usize, usize), Refusal> {
        let (offset, index, count) = (fields.u64(0)?, fields.u32(8)?, fields.u32(12)?);
        let len_bytes = match index {
            0 => self.registers.len_bytes(),
            region::CONFIG => CONFIG_BYTES,
            _ => 0,
        };
        let end = offset.checked_add(count.into()).filter(|end| *end <= bytes_u64(len_bytes));
        if end.is_none() || count == 0 {
            return Err(Refusal(Errno::INVAL));
        }
        Ok((index, usize_of(offset), count as usize))
    }

    fn region_read(&self, fields: Fields<'_>) -> Result<Vec<u8>, Refusal> {
        let (index, at, count) = self.access(fields)?;
        let mut payload = fields.rest(0)?[..ACCESS_BYTES].to_vec();
        match (index, at % 4, count) {
            (region::CONFIG, ..) => payload.extend_from_slice(&self.config[at..at + count]),
            (_, 0, 4 | 8) => {
                for at in (at..at + count).step_by(4) {
                    payload.extend(self.registers.read_u32(at).to_le_bytes());
                }
            }
            _ => return Err(Refusal(Errno::INVAL)),
        }
        Ok(payload)
    }

    fn region_write(&mut self, fields: Fields<'_>) -> Result<Vec<u8>, Refusal> {
        let (index, at, count) = self.access(fields)?;
        let data = fields.rest(ACCESS_BYTES)?;
        if data.len() != count {
            return Err(Refusal(Errno::INVAL));
        }
        match (index, at % 4, count) {
            (region::CONFIG, ..) => self.config_write(at, data)?,
            (_, 0, 4 | 8) => {
                for (k, word) in data.as_chunks().0.iter().enumerate() {
                    self.registers.write_u32(at + 4 * k, u32::from_le_bytes(*word));
                }
            }
            _ => return Err(Refusal(Errno::INVAL)),
        }
        Ok(fields.rest(0)?[..ACCESS_BYTES].to_vec())
    }

    /// Only the command register's low byte can be written.
    fn config_write(&mut self, at: usize, data: &[u8]) -> Result<(), Errno> {
        if let Some(&command) = COMMAND.checked_sub(at).and_then(|k| data.get(k)) {
            self.config[COMMAND] = command;
            let is_master = command & BUS_MASTER != 0;
            self.device.set_bus_master(is_master).map_err(|_| Errno::IO)?;
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<Vec<u8>, Refusal> {
        self.device.reset().map_err(|error| {
            tracing::info!("the device's reset fails: {error}");
            Errno::IO
        })?;
        self.config[COMMAND] = 0;
        self.device.set_bus_master(false).map_err(|_| Errno::IO)?;
        Ok(Vec::new())
    }
}

fn version(fields: Fields<'_>) -> Result<Vec<u8>, Refusal> {
    let (major, minor) = (fields.u16(0)?, fields.u16(2)?);
    if major != VERSION_MAJOR {
        return Err(Refusal(Errno::INVAL));
    }
    let mut payload = major.to_le_bytes().to_vec();
    payload.extend(minor.min(VERSION_MINOR).to_le_bytes());
    let data = format!(
        r#"{{"capabilities":{{"max_msg_fds":{VFIO_USER_FDS_MAX},"max_data_xfer_size":1048576,"pgsizes":4096}}}}"#
    );
    payload.extend_from_slice(data.as_bytes());
    payload.push(0);
    Ok(payload)
}
