//! The client against servers that follow a script, most of them hostile. Each test ends in bounded time, without a panic,
//! a thread or a descriptor left over.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ringmill_core::mem::{DmaError, Mapping, MemTable, RegionSpec};
use ringmill_core::units::GuestAddr;
use rustix::event::PollFlags;
use tempfile::TempDir;

use super::protocol::{Header, command, device, flags, irq, region, words};
use super::wire::{Message, Outbox, Reader, WireError, ready};
use super::*;
use crate::pci::Registers;

mod attempts;
mod hostile;

const PATIENCE: Patience = Patience {
    answer: Duration::from_millis(1000),
    memory: Duration::from_millis(1000),
    bind: Duration::from_millis(1000),
};
/// What a machine that is busy with other things needs at most.
const SOON: Duration = Duration::from_secs(10);
const BAR_BYTES: u64 = 0x4000;

fn soon() -> Instant {
    Instant::now() + SOON
}

fn memfd(len_bytes: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("server", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, len_bytes).unwrap();
    fd
}

/// The server's end of a connection.
struct Peer {
    stream: UnixStream,
    reader: Reader,
    outbox: Outbox,
    /// BAR 0 as a file.
    bar: OwnedFd,
    config: Vec<u8>,
    /// What was asked, in order.
    seen: Vec<(u16, Vec<u8>)>,
    fds: Vec<OwnedFd>,
}

impl Peer {
    /// The next command; `None` when the client is gone.
    fn next(&mut self) -> Option<Message> {
        loop {
            match self.reader.receive(&self.stream) {
                Ok(Some(message)) => return Some(message),
                Ok(None) => {
                    assert!(ready(self.stream.as_fd(), PollFlags::IN, Some(soon())).unwrap());
                }
                Err(WireError::Closed | WireError::Truncated | WireError::Io(_)) => return None,
                Err(error) => panic!("the client sent {error}"),
            }
        }
    }

    fn send(&self, header: Header, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        // The client may be gone by now.
        let _ = self.outbox.send(self.stream.as_fd(), &header.message(payload), fds, soon());
    }

    fn reply(&self, to: &Message, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send(Header { flags: flags::REPLY, ..to.header }, payload, fds);
    }

    fn refuse(&self, to: &Message, errno: Errno) {
        let errno = u32::try_from(errno.raw_os_error()).unwrap();
        self.send(Header { flags: flags::REPLY | flags::ERROR, errno, ..to.header }, &[], &[]);
    }

    /// Asks the client, and serves what it asks meanwhile.
    fn ask(&mut self, command: u16, bits: u32, payload: &[u8]) -> Message {
        self.send(
            Header { id: 77, command, payload_bytes: 0, flags: bits, errno: 0 },
            payload,
            &[],
        );
        let answer = self.next().unwrap();
        assert!(answer.header.is_reply());
        assert_eq!((answer.header.id, answer.header.command), (77, command));
        answer
    }

    fn raw(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// What a good server answers.
    fn answer(&mut self, message: &Message) {
        let fields = Fields::new(message.header.command, &message.payload);
        match message.header.command {
            command::VERSION => {
                let mut payload = vec![0, 0, 1, 0];
                payload.extend(br#"{"capabilities":{"max_msg_fds":1,"max_dma_maps":2}}"#);
                payload.push(0);
                self.reply(message, &payload, &[]);
            }
            command::DEVICE_GET_INFO => {
                let bits = device::RESET | device::PCI;
                self.reply(message, &words(&[16, bits, region::COUNT, irq::COUNT]), &[]);
            }
            command::DEVICE_GET_REGION_INFO => self.region_info(message, fields.u32(8).unwrap()),
            command::DEVICE_GET_IRQ_INFO => {
                let index = fields.u32(8).unwrap();
                let count = if index == irq::MSIX { 4 } else { 1 };
                self.reply(message, &words(&[16, irq::EVENTFD, index, count]), &[]);
            }
            command::REGION_READ => {
                let (at, count) = (fields.u64(0).unwrap(), fields.u32(12).unwrap());
                let mut data = vec![0; count as usize];
                if fields.u32(8).unwrap() == region::CONFIG {
                    data.copy_from_slice(&self.config[usize_of(at)..][..count as usize]);
                } else {
                    File::from(self.bar.try_clone().unwrap()).read_exact_at(&mut data, at).unwrap();
                }
                self.reply(message, &[&message.payload[..16], &data].concat(), &[]);
            }
            command::REGION_WRITE => {
                let (at, data) = (fields.u64(0).unwrap(), &message.payload[16..]);
                if fields.u32(8).unwrap() == region::CONFIG {
                    self.config[usize_of(at)..][..data.len()].copy_from_slice(data);
                } else {
                    File::from(self.bar.try_clone().unwrap()).write_all_at(data, at).unwrap();
                }
                self.reply(message, &message.payload[..16], &[]);
            }
            command::DMA_UNMAP => self.reply(message, &message.payload, &[]),
            _ => self.reply(message, &[], &[]),
        }
    }

    fn region_info(&self, message: &Message, index: u32) {
        let bits = region::READ | region::WRITE;
        let info = |bits, caps: u32, len_bytes: u64| {
            let mut payload = words(&[64, bits, index, caps]);
            payload.extend(len_bytes.to_le_bytes());
            payload.extend(0u64.to_le_bytes());
            payload
        };
        if index > 0 {
            let len_bytes = if index == region::CONFIG { 4096 } else { 0 };
            return self.reply(message, &info(bits, 0, len_bytes), &[]);
        }
        let mut payload = info(bits | region::MMAP | region::CAPS, 32, BAR_BYTES);
        payload.extend(words(&[1 << 16 | 1, 0, 1, 0, 0x1000, 0, 0x1000, 0]));
        self.reply(message, &payload, &[self.bar.as_fd()]);
    }
}

/// What a script makes of a command.
enum Next {
    /// A good server's answer.
    Answer,
    /// It was answered, or will not be.
    Done,
    /// Hang up.
    Quit,
}

struct Fake {
    dir: TempDir,
    thread: JoinHandle<Peer>,
}

impl Fake {
    fn path(&self) -> PathBuf {
        self.dir.path().join("cntrl")
    }

    fn connect(&self) -> Result<VfioUserBacking, PciError> {
        self.connect_with(PATIENCE)
    }

    fn connect_with(&self, patience: Patience) -> Result<VfioUserBacking, PciError> {
        VfioUserBacking::connect_with(self.dir.path(), patience, &CancelToken::default())
    }

    fn end(self) -> Peer {
        self.thread.join().unwrap()
    }
}

fn config_space() -> Vec<u8> {
    let mut config = vec![0; 4096];
    config[6] = 0x10;
    config[9..12].copy_from_slice(&CLASS_NVME);
    config[0x34] = 0x40;
    config[0x40..0x44].copy_from_slice(&[CAP_MSI, 0x50, 0, 0]);
    config[0x50..0x54].copy_from_slice(&[CAP_MSIX, 0, 3, 0x40]);
    config
}

/// A server in a thread that asks the script about every command.
fn fake(mut script: impl FnMut(&mut Peer, &Message) -> Next + Send + 'static) -> Fake {
    let dir = TempDir::new().unwrap();
    let listener = UnixListener::bind(dir.path().join("cntrl")).unwrap();
    let thread = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut peer = Peer {
            stream,
            reader: Reader::default(),
            outbox: Outbox::default(),
            bar: memfd(BAR_BYTES),
            config: config_space(),
            seen: Vec::new(),
            fds: Vec::new(),
        };
        while let Some(mut message) = peer.next() {
            assert_eq!(message.header.flags, 0);
            peer.fds.append(&mut message.fds);
            peer.seen.push((message.header.command, message.payload.clone()));
            match script(&mut peer, &message) {
                Next::Answer => peer.answer(&message),
                Next::Done => {}
                Next::Quit => break,
            }
        }
        let _ = peer.stream.shutdown(std::net::Shutdown::Both);
        peer
    });
    Fake { dir, thread }
}

fn good() -> Fake {
    fake(|_, _| Next::Answer)
}

/// Does everything that a driver does; the errors that it met.
fn exercise(backing: &VfioUserBacking) -> Vec<String> {
    let mut errors = Vec::new();
    let mut note =
        |what: &str, error: &dyn std::fmt::Display| errors.push(format!("{what}: {error}"));
    let memory = Arc::new(Mapping::pool(8192).unwrap());
    let eventfd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let mut id = [0; 4];
    if let Err(error) = backing.config_read(0, &mut id) {
        note("config", &error);
    }
    match backing.registers(0, 0x2000) {
        Ok(registers) => {
            registers.write_u32(0x14, 1);
            if registers.read_u32(0x14) == u32::MAX {
                note("register", &"ones");
            }
            registers.write_u32(0x1000, 1);
        }
        Err(error) => note("registers", &error),
    }
    if let Err(error) = backing.set_bus_master(true) {
        note("master", &error);
    }
    match backing.dma().map(&memory) {
        Ok(()) => backing.dma().unmap(&memory),
        Err(error) => note("map", &error),
    }
    if let Err(error) = backing.bind_vector(0, Some(eventfd.as_fd())) {
        note("bind", &error);
    }
    if let Err(error) = backing.bind_vector(0, None) {
        note("unbind", &error);
    }
    if let Err(error) = backing.reset() {
        note("reset", &error);
    }
    errors
}

fn assert_gone(backing: &VfioUserBacking) {
    let is = |error: PciError| assert!(matches!(error, PciError::Gone { .. }), "{error}");
    assert!(ready(backing.news_fd().unwrap(), PollFlags::IN, Some(soon())).unwrap());
    assert_eq!(backing.news(), Some(DeviceNews::Gone));
    assert_eq!(backing.news(), None);
    is(backing.config_read(0, &mut [0; 4]).unwrap_err());
    is(backing.registers(0, 4096).unwrap_err());
    is(backing.set_bus_master(true).unwrap_err());
    is(backing.reset().unwrap_err());
    is(backing.bind_vector(0, None).unwrap_err());
    let memory = Arc::new(Mapping::pool(4096).unwrap());
    assert!(matches!(backing.dma().map(&memory), Err(DmaError::Gone { .. })));
}

#[test]
fn everything_works_with_a_good_server_by_its_socket_or_its_directory() {
    for by_socket in [true, false] {
        let fake = good();
        let path = if by_socket { fake.path() } else { fake.dir.path().to_owned() };
        let backing =
            VfioUserBacking::connect_with(&path, PATIENCE, &CancelToken::default()).unwrap();
        assert_eq!(backing.name(), path.to_str().unwrap());
        assert_eq!(backing.vectors_count(), 4);
        assert_eq!(exercise(&backing), [""; 0]);
        assert_eq!(backing.news(), None);
        backing.close();
        assert_gone(&backing);
        let peer = fake.end();
        // Written by message; the doorbell by memory.
        let mut word = [0; 4];
        let bar = File::from(peer.bar);
        bar.read_exact_at(&mut word, 0x14).unwrap();
        assert_eq!(word, [1, 0, 0, 0]);
        bar.read_exact_at(&mut word, 0x1000).unwrap();
        assert_eq!(word, [1, 0, 0, 0]);
        let doorbells = |payload: &[u8]| payload[..2] == [0, 0x10];
        assert!(
            !peer.seen.iter().any(|(c, payload)| *c == command::REGION_WRITE && doorbells(payload))
        );
        // MSI-X was enabled, not masked; and the last word was: no bus master.
        assert_eq!(peer.config[0x52..0x54], [3, 0x80]);
        assert_eq!(peer.config[4..6], [0, 0]);
    }
}

#[test]
fn closing_ends_all_access_and_gives_memory_back() {
    let fake = good();
    let backing = fake.connect().unwrap();
    backing.set_bus_master(true).unwrap();
    let memory = Arc::new(Mapping::pool(8192).unwrap());
    let domain = backing.dma();
    domain.map(&memory).unwrap();
    let registers = backing.registers(0, 0x2000).unwrap();
    drop(backing);
    assert_eq!(registers.read_u32(0x1c), u32::MAX);
    assert_eq!(registers.read_u32(0x1000), u32::MAX);
    registers.write_u32(0x1000, 5);
    // The owner of the memory does it once more, as ever.
    domain.unmap(&memory);
    assert_eq!(Arc::strong_count(&memory), 1);
    let seen = fake.end().seen;
    let last: Vec<u16> = seen.iter().rev().take(4).rev().map(|(command, _)| *command).collect();
    let end = [
        command::REGION_WRITE,
        command::DEVICE_SET_IRQS,
        command::DEVICE_RESET,
        command::DMA_UNMAP,
    ];
    assert_eq!(last, end);
    let (_, mapped) = seen.iter().find(|(c, _)| *c == command::DMA_MAP).unwrap();
    assert_eq!(mapped[16..32], seen.last().unwrap().1[8..24], "the same range");
}

#[test]
fn interrupts_and_news_arrive_by_eventfd() {
    let fake = fake(|peer, message| {
        if message.header.command != command::DEVICE_RESET {
            return Next::Answer;
        }
        // Order of arrival: REQ, ERR, vector 3.
        for fd in &peer.fds {
            rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
        }
        Next::Answer
    });
    let backing = fake.connect().unwrap();
    let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    backing.bind_vector(3, Some(eventfd.as_fd())).unwrap();
    assert!(matches!(backing.bind_vector(4, None), Err(PciError::Refused { .. })));
    assert!(!ready(backing.news_fd().unwrap(), PollFlags::IN, Some(Instant::now())).unwrap());
    backing.reset().unwrap();
    assert!(rustix::io::read(&eventfd, &mut [0; 8]).is_ok());
    assert!(ready(backing.news_fd().unwrap(), PollFlags::IN, Some(soon())).unwrap());
    assert_eq!(backing.news(), Some(DeviceNews::Error));
    assert_eq!(backing.news(), Some(DeviceNews::Requested));
    assert_eq!(backing.news(), None);
    assert!(!ready(backing.news_fd().unwrap(), PollFlags::IN, Some(Instant::now())).unwrap());
    backing.bind_vector(3, None).unwrap();
    drop(backing);
    let peer = fake.end();
    let sets: Vec<_> = peer.seen.iter().filter(|(c, _)| *c == command::DEVICE_SET_IRQS).collect();
    let set = |index, at: u32, count| {
        words(&[20, irq::SET_DATA_EVENTFD | irq::SET_ACTION_TRIGGER, index, at, count])
    };
    assert_eq!(sets[0].1, set(irq::REQ, 0, 1));
    assert_eq!(sets[1].1, set(irq::ERR, 0, 1));
    assert_eq!(sets[2].1, set(irq::MSIX, 3, 1));
    assert_eq!(sets[3].1, set(irq::MSIX, 3, 1));
    assert_eq!(peer.fds.len(), 3, "taking a vector away brings no descriptor");
}

#[test]
fn memory_without_a_file_too_much_of_it_and_refusals_are_errors_that_say_so() {
    let fake = fake(|peer, message| {
        let full = peer.seen.iter().filter(|(c, _)| *c == command::DMA_MAP).count() == 3;
        if message.header.command == command::DMA_MAP && full {
            peer.refuse(message, Errno::NOMEM);
            return Next::Done;
        }
        Next::Answer
    });
    let backing = fake.connect().unwrap();
    let domain = backing.dma();
    let private = Arc::new(Mapping::anonymous(4096).unwrap());
    assert!(matches!(domain.map(&private), Err(DmaError::NoFile { .. })));
    let pool = || Arc::new(Mapping::pool(4096).unwrap());
    let (first, second, third) = (pool(), pool(), pool());
    domain.map(&first).unwrap();
    domain.map(&second).unwrap();
    let error = domain.map(&third).unwrap_err().to_string();
    assert!(error.contains("2 places for memory (max_dma_maps)"), "{error}");
    domain.unmap(&second);
    let error = domain.map(&third).unwrap_err();
    assert!(
        matches!(&error, DmaError::Refused { source, .. } if source.raw_os_error() == Some(12)),
        "{error}"
    );
    domain.map(&third).unwrap();
}

#[test]
fn a_server_that_keeps_memory_is_cut_off() {
    let fake = fake(|peer, message| {
        if message.header.command != command::DMA_UNMAP {
            return Next::Answer;
        }
        peer.refuse(message, Errno::BUSY);
        Next::Done
    });
    let backing = fake.connect().unwrap();
    let memory = Arc::new(Mapping::pool(4096).unwrap());
    backing.dma().map(&memory).unwrap();
    backing.dma().unmap(&memory);
    assert_gone(&backing);
    assert_eq!(Arc::strong_count(&memory), 1);
}

#[test]
fn a_server_that_is_busy_with_memory_is_waited_for_by_everybody_unless_somebody_hurries() {
    let (begins, began) = mpsc::channel();
    let fake = fake(move |peer, message| {
        if message.header.command != command::DMA_MAP {
            return Next::Answer;
        }
        begins.send(()).unwrap();
        match peer.seen.iter().filter(|(c, _)| *c == command::DMA_MAP).count() {
            1 => {
                std::thread::sleep(PATIENCE.answer * 3 / 2);
                Next::Answer
            }
            // The second one never ends.
            _ => Next::Done,
        }
    });
    let patience = Patience { memory: Duration::from_secs(600), ..PATIENCE };
    let backing = fake.connect_with(patience).unwrap();
    let domain = backing.dma();
    let pool = || Arc::new(Mapping::pool(4096).unwrap());
    let (first, second) = (pool(), pool());
    let asks = || {
        let mut id = [0; 4];
        backing.config_read(0, &mut id)
    };
    std::thread::scope(|scope| {
        let maps = scope.spawn(|| domain.map(&first));
        began.recv().unwrap();
        // Behind the command that takes longer than an ordinary one may.
        asks().unwrap();
        maps.join().unwrap().unwrap();
        asks().unwrap();
        let maps = scope.spawn(|| domain.map(&second));
        began.recv().unwrap();
        backing.hurry_up();
        assert!(matches!(maps.join().unwrap(), Err(DmaError::Gone { .. })));
    });
    assert!(asks().is_err());
    domain.unmap(&first);
    drop(backing);
    fake.end();
}

#[test]
fn a_server_that_cannot_map_reads_and_writes_memory_by_message() {
    // The reset stands for a command during which the server works.
    let fake = fake(|peer, message| {
        let is_closing = peer.seen.iter().any(|(c, _)| *c == command::DMA_UNMAP);
        if message.header.command != command::DEVICE_RESET || is_closing {
            return Next::Answer;
        }
        let map = peer.seen.iter().find(|(c, _)| *c == command::DMA_MAP).unwrap().1.clone();
        let iova = Fields::new(2, &map).u64(16).unwrap();
        let access = |at: u64, count: u64, data: &[u8]| {
            [&at.to_le_bytes()[..], &count.to_le_bytes()[..], data].concat()
        };
        let written = peer.ask(command::DMA_WRITE, 0, &access(iova + 4090, 12, &[9; 12]));
        assert_eq!(
            (written.header.flags, written.payload),
            (flags::REPLY, access(iova + 4090, 12, &[]))
        );
        let read = peer.ask(command::DMA_READ, 0, &access(iova + 4088, 4, &[]));
        assert_eq!(read.payload, access(iova + 4088, 4, &[5, 5, 9, 9]));
        let refused = |answer: Message, errno: Errno| {
            assert_eq!(answer.header.flags, flags::REPLY | flags::ERROR);
            assert_eq!(answer.header.errno.cast_signed(), errno.raw_os_error());
            assert!(answer.payload.is_empty());
        };
        refused(peer.ask(command::DMA_READ, 0, &access(iova + 8190, 4, &[])), Errno::FAULT);
        refused(peer.ask(command::DMA_READ, 0, &access(iova, 1 << 32, &[])), Errno::INVAL);
        refused(peer.ask(command::DMA_WRITE, 0, &access(iova, 8, &[1])), Errno::INVAL);
        refused(peer.ask(command::DMA_READ, 0, &[1, 2, 3]), Errno::INVAL);
        refused(peer.ask(command::DMA_MAP, 0, &map), Errno::OPNOTSUPP);
        refused(peer.ask(999, 0, &[]), Errno::OPNOTSUPP);
        // Wants no answer, gets none: the next one is that of the question behind it.
        let quiet = Header {
            id: 1,
            command: command::DMA_READ,
            payload_bytes: 0,
            flags: flags::NO_REPLY,
            errno: 0,
        };
        peer.send(quiet, &access(iova, 4, &[]), &[]);
        let all = peer.ask(command::DMA_READ, 0, &access(iova, 8192, &[]));
        assert_eq!(all.payload.len(), 16 + 8192);
        Next::Answer
    });
    let backing = fake.connect().unwrap();
    let memory = Arc::new(Mapping::pool(8192).unwrap());
    let mut table = MemTable::new();
    let spec = RegionSpec { guest_addr: GuestAddr(0), len_bytes: 8192, user_addr: 0 };
    table.add(spec, Arc::clone(&memory)).unwrap();
    let all = table.translate(GuestAddr(0), 8192, &mut 0).unwrap();
    all.write_from(&[5; 8192]);
    backing.dma().map(&memory).unwrap();
    backing.reset().unwrap();
    let mut got = [0; 16];
    all.sub(4088, 16).read_into(&mut got);
    assert_eq!(got, [5, 5, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 5, 5]);
    backing.dma().unmap(&memory);
    drop(backing);
    fake.end();
}

#[test]
fn doorbells_that_cannot_be_mapped_are_refused_with_the_way_out() {
    // Not mappable at all; mappable, and no descriptor comes along; too short; a file that is not memory.
    for case in 0..4 {
        let fake = fake(move |peer, message| {
            let is_info = message.header.command == command::DEVICE_GET_REGION_INFO;
            if !is_info || message.payload[8] != 0 {
                return Next::Answer;
            }
            let bits = region::READ
                | region::WRITE
                | if case > 0 { region::MMAP | region::CAPS } else { 0 };
            let mut payload = words(&[64, bits, 0, 32]);
            payload.extend(BAR_BYTES.to_le_bytes());
            payload.extend(0u64.to_le_bytes());
            payload.extend(words(&[1 << 16 | 1, 0, 1, 0, 0x1000, 0, 0x1000, 0]));
            let exe = File::open("/proc/self/exe").unwrap();
            match case {
                0 => peer.reply(message, &payload[..32], &[]),
                1 => peer.reply(message, &payload, &[]),
                2 => peer.reply(message, &payload, &[memfd(0x1000).as_fd()]),
                _ => peer.reply(message, &payload, &[exe.as_fd()]),
            }
            Next::Done
        });
        let backing = fake.connect().unwrap();
        let error = backing.registers(0, 0x1100).unwrap_err().to_string();
        let expect = [
            "cannot be mapped",
            "cannot be mapped",
            "file has 4096 bytes",
            "a directory on a tmpfs",
        ][case];
        assert!(error.contains(expect), "{error}");
        if case < 2 {
            // The first page alone is messages, and nothing behind it exists.
            let registers = backing.registers(0, 0x1000).unwrap();
            assert_eq!(registers.len_bytes(), 0x1000);
            registers.write_u32(0x1000, 7);
            assert_eq!(registers.read_u32(0x1000), u32::MAX);
            assert_eq!(registers.read_u32(0), 0);
        }
        assert!(matches!(backing.registers(6, 1), Err(PciError::Refused { .. })));
        assert!(matches!(backing.registers(1, 1), Err(PciError::Refused { .. })));
        assert!(matches!(backing.registers(0, 0x4001), Err(PciError::Refused { .. })));
    }
}

#[test]
fn doorbells_cut_off_by_the_server_read_as_ones_and_end_nothing() {
    ringmill_core::mem::install_sigbus_handler().unwrap();
    let fake = fake(|peer, message| {
        if message.header.command == command::DEVICE_RESET {
            rustix::fs::ftruncate(&peer.bar, 0).unwrap();
        }
        Next::Answer
    });
    let backing = fake.connect().unwrap();
    let registers = backing.registers(0, 0x2000).unwrap();
    registers.write_u32(0x1004, 3);
    assert_eq!(registers.read_u32(0x1004), 3);
    backing.reset().unwrap();
    assert_eq!(registers.read_u32(0x1004), u32::MAX);
    registers.write_u32(0x1004, 4);
    assert_eq!(registers.read_u32(0x1004), u32::MAX);
}

#[test]
fn a_late_server_does_not_keep_a_reactor_from_work_and_is_asked_again_later() {
    let (releases, released) = mpsc::channel();
    let binds_count = Arc::new(AtomicUsize::new(0));
    let binds = Arc::clone(&binds_count);
    let fake = fake(move |_, message| {
        // Of the vectors, not of the news.
        let is_bind = message.header.command == command::DEVICE_SET_IRQS && message.payload[8] == 2;
        if is_bind && binds.fetch_add(1, Ordering::SeqCst) == 0 {
            released.recv().unwrap();
        }
        Next::Answer
    });
    let patience = Patience { bind: Duration::from_millis(5), answer: SOON, ..PATIENCE };
    let backing = fake.connect_with(patience).unwrap();
    let eventfd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    // These come back while the server is held.
    let error = backing.bind_vector(0, Some(eventfd.as_fd())).unwrap_err();
    assert!(
        matches!(&error, PciError::Io { source, .. } if source.kind() == io::ErrorKind::TimedOut),
        "{error}"
    );
    backing.bind_vector(0, None).unwrap();
    backing.bind_vector(0, Some(eventfd.as_fd())).unwrap_err();
    releases.send(()).unwrap();
    // An ordinary question is answered behind all that was sent.
    backing.config_read(0, &mut [0; 4]).unwrap();
    assert_eq!(binds_count.load(Ordering::SeqCst), 2, "nothing was asked while it lagged");
    // Once it has caught up, all is well: late answers were nobody's.
    let deadline = soon();
    while backing.bind_vector(0, Some(eventfd.as_fd())).is_err() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    backing.reset().unwrap();
    drop(backing);
    fake.end();
}

#[test]
fn giving_up_a_vector_waits_for_nothing_and_does_not_count_as_late() {
    let (releases, released) = mpsc::channel();
    let fake = fake(move |peer, message| {
        let sets = peer.seen.iter().filter(|(c, _)| *c == command::DEVICE_SET_IRQS).count();
        // REQ, ERR, and then the vector.
        if message.header.command == command::DEVICE_SET_IRQS && sets == 3 {
            released.recv().unwrap();
        }
        Next::Answer
    });
    let backing = fake.connect_with(Patience { bind: SOON, answer: SOON, ..PATIENCE }).unwrap();
    let eventfd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    // It comes back while the server is held.
    backing.bind_vector(0, None).unwrap();
    std::thread::scope(|scope| {
        let binds = scope.spawn(|| backing.bind_vector(0, Some(eventfd.as_fd())));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!binds.is_finished(), "it is bound when the call comes back");
        releases.send(()).unwrap();
        binds.join().unwrap().unwrap();
    });
}

#[test]
fn nobody_there_is_an_error_in_words() {
    let dir = TempDir::new().unwrap();
    let error = VfioUserBacking::connect(dir.path()).unwrap_err().to_string();
    assert!(error.contains("is one listening there?"), "{error}");
    let long = dir.path().join("x".repeat(200));
    assert!(VfioUserBacking::connect(&long).is_err());
    // A socket whose server accepts nothing: connected by the kernel, then silence.
    let path = dir.path().join("deaf");
    let _listener = UnixListener::bind(&path).unwrap();
    let start = Instant::now();
    let error = VfioUserBacking::connect_with(
        &path,
        Patience { answer: Duration::from_millis(50), ..PATIENCE },
        &CancelToken::default(),
    )
    .unwrap_err();
    assert!(matches!(error, PciError::Gone { .. }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(2));
}
