//! The model behind its vfio-user server, driven by the vfio-user client; and clients that die or attack.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use ringmill_core::mem::Mapping;
use ringmill_core::spec::nvme::{cns, csts, nvm, reg};
use rustix::event::{EventfdFlags, PollFlags, eventfd};
use rustix::io::Errno;
use tempfile::TempDir;

use super::super::*;
use super::rig::{Rig, io};
use crate::pci::{CancelToken, DeviceNews, PciBacking, PciError, Registers};
use crate::vfio_user::protocol::{self, Fields, Header, command, flags, irq, region, words};
use crate::vfio_user::wire::{Message, Outbox, Reader, WireError, ready};
use crate::vfio_user::{Patience, VfioUserBacking};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

struct Shown {
    dir: TempDir,
    server: VfioUserServer,
    control: ModelControl,
    medium: Arc<Medium>,
}

fn show(options: ModelOptions) -> Shown {
    let medium = Medium::ram(4 << 20).unwrap();
    let namespaces = vec![ModelNamespace::new(1, 9, 8192, Arc::clone(&medium))];
    let (backing, control) = start(options, namespaces).unwrap();
    let dir = TempDir::new().unwrap();
    let server = VfioUserServer::start(&dir.path().join("cntrl"), backing).unwrap();
    Shown { dir, server, control, medium }
}

impl Shown {
    fn rig(&self) -> Rig<VfioUserBacking> {
        // Here nobody is a reactor that must not wait.
        let patience = Patience { bind: Duration::from_secs(10), ..Patience::default() };
        let token = CancelToken::default();
        let backing = VfioUserBacking::connect_with(self.dir.path(), patience, &token).unwrap();
        Rig::over(backing, self.control.clone(), Arc::clone(&self.medium), 0)
    }

    fn client(&self) -> Client {
        let stream = UnixStream::connect(self.server.path()).unwrap();
        Client { stream, reader: Reader::default(), outbox: Outbox::default() }
    }

    /// The server has forgotten its client.
    fn is_clean(&self) {
        let deadline = soon();
        while self.control.mapped_count() > 0 {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A client that says what it likes.
struct Client {
    stream: UnixStream,
    reader: Reader,
    outbox: Outbox,
}

impl Client {
    fn send(&self, command: u16, payload: &[u8], with: &[&Mapping]) {
        let header = Header { id: 9, command, payload_bytes: 0, flags: 0, errno: 0 };
        let fds: Vec<_> = with.iter().map(|mapping| mapping.file().unwrap().0).collect();
        // The server may have hung up.
        let _ = self.outbox.send(self.stream.as_fd(), &header.message(payload), &fds, soon());
    }

    /// `None`: the server has hung up.
    fn receive(&mut self) -> Option<Message> {
        loop {
            match self.reader.receive(&self.stream) {
                Ok(Some(message)) => return Some(message),
                Ok(None) => {
                    assert!(ready(self.stream.as_fd(), PollFlags::IN, Some(soon())).unwrap());
                }
                // With unread data it is a reset.
                Err(WireError::Closed | WireError::Io(Errno::CONNRESET)) => return None,
                Err(error) => panic!("the server sent {error}"),
            }
        }
    }

    /// Asks; the payload of the answer, or its errno.
    fn ask(&mut self, command: u16, payload: &[u8], with: &[&Mapping]) -> Result<Vec<u8>, Errno> {
        self.send(command, payload, with);
        let answer = self.receive().expect("an answer");
        assert_eq!((answer.header.id, answer.header.command), (9, command));
        assert!(answer.header.is_reply());
        if answer.header.flags & flags::ERROR == 0 {
            return Ok(answer.payload);
        }
        assert!(answer.payload.is_empty());
        Err(Errno::from_raw_os_error(answer.header.errno.cast_signed()))
    }

    fn hello(&mut self) {
        let answer = self.ask(command::VERSION, b"\0\0\x01\0{}\0", &[]).unwrap();
        assert_eq!(answer[..4], [0, 0, 1, 0]);
    }
}

#[test]
fn data_is_whole_over_vfio_user() {
    let shown = show(ModelOptions::default());
    let mut rig = shown.rig();
    rig.enable();
    rig.identify(cns::CONTROLLER, 0).unwrap();
    let mut pair = rig.pair(1, 64);
    for round in 0..100u32 {
        let len_bytes = (round as usize % 9 + 1) * 512;
        let data: Vec<u8> =
            (0..len_bytes).map(|at| (at * 7 + round as usize).to_le_bytes()[0]).collect();
        rig.fill(0, &data);
        let blocks = round % 9 + 1;
        let sqe = rig.prps(io(nvm::WRITE, 1, u64::from(round * 10), blocks), 0, len_bytes);
        assert!(rig.run(&mut pair, sqe).status().is_success());
        rig.fill(0, &vec![0xee; len_bytes]);
        let sqe = rig.prps(io(nvm::READ, 1, u64::from(round * 10), blocks), 0, len_bytes);
        assert!(rig.run(&mut pair, sqe).status().is_success());
        assert_eq!(rig.bytes(0, len_bytes), data);
    }
    rig.expect_peace();
    rig.disable();
    drop(rig);
    shown.is_clean();
}

#[test]
fn vectors_signal_their_eventfds_only_while_bound() {
    for vectors in [Vectors::MsiX(3), Vectors::Msi, Vectors::None] {
        let shown = show(ModelOptions { vectors, ..ModelOptions::default() });
        let mut rig = shown.rig();
        let count = rig.backing.vectors_count();
        assert_eq!(
            count,
            [3, 1, 0][match vectors {
                Vectors::MsiX(_) => 0,
                Vectors::Msi => 1,
                _ => 2,
            }]
        );
        rig.enable();
        let mut pair = rig.pair(1, 8);
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let vector = count.min(2).saturating_sub(1);
        for bound in [true, false, true] {
            let target = bound.then_some(eventfd.as_fd());
            let done = rig.backing.bind_vector(vector, target);
            assert_eq!(done.is_ok(), count > 0);
            // Given up without an answer: what comes after it has one.
            rig.backing.config_read(0, &mut [0; 4]).unwrap();
            let sqe = rig.prps(io(nvm::READ, 1, 0, 1), 0, 512);
            assert!(rig.run(&mut pair, sqe).status().is_success());
            if bound && count > 0 {
                assert!(ready(eventfd.as_fd(), PollFlags::IN, Some(soon())).unwrap());
                rustix::io::read(&eventfd, &mut [0; 8]).unwrap();
            } else {
                let later = Instant::now() + Duration::from_millis(20);
                assert!(!ready(eventfd.as_fd(), PollFlags::IN, Some(later)).unwrap());
            }
        }
        rig.expect_peace();
    }
}

#[test]
fn a_server_that_ends_in_mid_load_is_gone_and_the_next_one_serves_again() {
    let mut shown = show(ModelOptions::default());
    let mut rig = shown.rig();
    rig.enable();
    let mut pair = rig.pair(1, 64);
    rig.control.rule(Match::io(nvm::READ), Action::Swallow);
    for cid in 0..9 {
        let mut sqe = rig.prps(io(nvm::READ, 1, 0, 1), 0, 512);
        sqe.0[0] |= cid << 16;
        rig.push(&mut pair, sqe);
    }
    rig.ring(&pair);
    rig.eventually(|rig| rig.control.held() == 9);
    shown.server.stop();
    assert!(ready(rig.backing.news_fd().unwrap(), PollFlags::IN, Some(soon())).unwrap());
    assert_eq!(rig.backing.news(), Some(DeviceNews::Gone));
    assert_eq!(rig.regs.read_u32(reg::CSTS), u32::MAX);
    rig.ring_head(&pair, 1);
    assert_eq!(
        rig.regs.read_u32(reg::DOORBELLS),
        u32::MAX,
        "the memory is still there, the device is not"
    );
    assert!(matches!(rig.backing.reset(), Err(PciError::Gone { .. })));
    drop(rig);
    assert_eq!(shown.control.mapped_count(), 0);
    let again = show(ModelOptions::default());
    again.rig().enable();
}

#[test]
fn news_of_the_device_reach_the_driver() {
    let shown = show(ModelOptions::default());
    let rig = shown.rig();
    shown.control.tell(DeviceNews::Requested);
    assert!(ready(rig.backing.news_fd().unwrap(), PollFlags::IN, Some(soon())).unwrap());
    assert_eq!(rig.backing.news(), Some(DeviceNews::Requested));
    shown.control.tell(DeviceNews::Error);
    assert!(ready(rig.backing.news_fd().unwrap(), PollFlags::IN, Some(soon())).unwrap());
    assert_eq!(rig.backing.news(), Some(DeviceNews::Error));
    shown.control.vanish(true);
    assert!(ready(rig.backing.news_fd().unwrap(), PollFlags::IN, Some(soon())).unwrap());
    assert_eq!(rig.backing.news(), Some(DeviceNews::Gone));
}

#[test]
fn a_reset_forgets_what_was_out_and_a_failing_one_says_so() {
    let shown = show(ModelOptions::default());
    let mut rig = shown.rig();
    rig.enable();
    shown.control.set_reset_fails(true);
    assert!(matches!(rig.backing.reset(), Err(PciError::Io { .. })));
    assert_eq!(rig.regs.read_u32(reg::CSTS), csts::RDY);
    shown.control.set_reset_fails(false);
    rig.backing.reset().unwrap();
    assert_eq!(rig.regs.read_u32(reg::CSTS), 0);
    assert_eq!(shown.control.count(Count::Resets), 1);
    rig.backing.set_bus_master(true).unwrap();
    rig.enable();
    rig.identify(cns::CONTROLLER, 0).unwrap();
}

#[test]
fn a_client_that_dies_leaves_nothing_behind_and_others_wait_for_it() {
    let shown = show(ModelOptions::default());
    let memory = Mapping::pool(8192).unwrap();
    let mut dying = shown.client();
    dying.hello();
    dying.ask(command::DMA_MAP, &protocol::dma_map(0, 1 << 32, 8192), &[&memory]).unwrap();
    assert_eq!(shown.control.mapped_count(), 1);
    let mut next = shown.client();
    next.send(command::VERSION, b"\0\0\x01\0", &[]);
    let later = Instant::now() + Duration::from_millis(20);
    assert!(!ready(next.stream.as_fd(), PollFlags::IN, Some(later)).unwrap());
    // Within a message.
    std::io::Write::write_all(&mut dying.stream, &[1, 2, 3]).unwrap();
    drop(dying);
    assert!(next.receive().is_some());
    assert_eq!(shown.control.mapped_count(), 0);
    drop(next);
    shown.rig().enable();
}

#[test]
fn a_hostile_client_gets_errors_and_is_cut_off_where_the_protocol_ends() {
    let shown = show(ModelOptions { vectors: Vectors::MsiX(3), ..ModelOptions::default() });
    // Anything before, and twice, the version; another major version; answers to nothing.
    let cut_off = |client: &mut Client| assert!(client.receive().is_none());
    for wrong in [command::DEVICE_GET_INFO, command::DMA_MAP, 999] {
        let mut client = shown.client();
        client.send(wrong, &[0; 64], &[]);
        cut_off(&mut client);
    }
    for payload in [&b"\x01\0\0\0"[..], b"\0\0\0"] {
        let mut client = shown.client();
        client.send(command::VERSION, payload, &[]);
        cut_off(&mut client);
    }
    let mut client = shown.client();
    client.hello();
    client.send(command::VERSION, b"\0\0\x01\0", &[]);
    cut_off(&mut client);
    let mut client = shown.client();
    client.hello();
    let memory = Mapping::pool(8192).unwrap();
    let map = |offset, iova, len| protocol::dma_map(offset, iova, len);
    let mut refused = |command, payload: &[u8], with: &[&Mapping], errno| {
        assert_eq!(client.ask(command, payload, with), Err(errno), "{command} {payload:x?}");
    };
    let invalid = Errno::INVAL;
    refused(command::DMA_MAP, &map(0, 1 << 32, 8192), &[], invalid);
    refused(command::DMA_MAP, &map(0, 1 << 32, 8192), &[&memory, &memory], invalid);
    refused(command::DMA_MAP, &map(0, 1 << 32, 16384), &[&memory], invalid);
    refused(command::DMA_MAP, &map(4096, 1 << 32, 8192), &[&memory], invalid);
    refused(command::DMA_MAP, &map(0, u64::MAX - 4095, 8192), &[&memory], invalid);
    refused(command::DMA_MAP, &map(0, 1 << 32, 0), &[&memory], invalid);
    refused(command::DMA_MAP, &map(0, 4095, 8192), &[&memory], invalid);
    refused(command::DMA_MAP, &map(u64::MAX - 4095, 4096, 8192), &[&memory], invalid);
    refused(command::DMA_MAP, &map(0, 1 << 32, 8192)[..31], &[&memory], invalid);
    refused(command::DMA_UNMAP, &protocol::dma_unmap(1 << 32, 8192), &[], Errno::NOENT);
    refused(command::DEVICE_GET_REGION_INFO, &words(&[32, 0, 9, 0, 0, 0, 0, 0]), &[], invalid);
    refused(command::DEVICE_GET_IRQ_INFO, &words(&[16, 0, 5, 0]), &[], invalid);
    let with_fd = irq::SET_DATA_EVENTFD | irq::SET_ACTION_TRIGGER;
    for (bits, index, start, count) in [
        (with_fd, irq::MSIX, 3, 1),
        (with_fd, irq::MSIX, u32::MAX, 2),
        (with_fd, irq::MSIX, 0, u32::MAX),
        (with_fd, irq::INTX, 0, 1),
        (with_fd, 77, 0, 1),
        (irq::SET_DATA_BOOL | irq::SET_ACTION_TRIGGER, irq::MSIX, 0, 1),
        (u32::MAX, irq::MSIX, 0, 1),
    ] {
        refused(
            command::DEVICE_SET_IRQS,
            &words(&[20, bits, index, start, count]),
            &[&memory],
            invalid,
        );
    }
    refused(command::DEVICE_SET_IRQS, &words(&[20, with_fd, irq::MSIX, 0, 3]), &[&memory], invalid);
    let access = protocol::region_access;
    for (region, at, count) in [
        (0, 0, 0),
        (0, 0, 3),
        (0, 2, 4),
        (0, 1 << 40, 4),
        (0, u64::MAX, 4),
        (0, 0, u32::MAX),
        (1, 0, 4),
        (99, 0, 4),
        (region::CONFIG, 4093, 4),
    ] {
        refused(command::REGION_READ, &access(region, at, count), &[], invalid);
        refused(
            command::REGION_WRITE,
            &[access(region, at, count), vec![0; 4]].concat(),
            &[],
            invalid,
        );
    }
    refused(command::REGION_WRITE, &[access(0, 0x14, 4), vec![0; 3]].concat(), &[], invalid);
    refused(command::REGION_WRITE, &access(0, 0x14, 4), &[], invalid);
    refused(command::DMA_READ, &[0; 16], &[], Errno::OPNOTSUPP);
    refused(0, &[], &[], Errno::OPNOTSUPP);
    // And it works as before.
    client.ask(command::DMA_MAP, &map(0, 1 << 32, 8192), &[&memory]).unwrap();
    assert_eq!(
        client.ask(command::DMA_MAP, &map(0, (1 << 32) + 4096, 4096), &[&memory]),
        Err(Errno::EXIST)
    );
    assert_eq!(
        client.ask(command::DMA_UNMAP, &protocol::dma_unmap(1 << 32, 4096), &[]),
        Err(invalid)
    );
    client.ask(command::DMA_UNMAP, &protocol::dma_unmap(1 << 32, 8192), &[]).unwrap();
    client.ask(command::DEVICE_RESET, &[], &[]).unwrap();
    // A client with little room is told of capabilities and not given them.
    let info = client
        .ask(command::DEVICE_GET_REGION_INFO, &words(&[32, 0, 0, 0, 0, 0, 0, 0]), &[])
        .unwrap();
    assert_eq!((info.len(), Fields::new(5, &info).u32(0)), (32, Ok(64)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is sent, the server answers or hangs up, and serves the next client.
    #[test]
    fn garbage_does_not_end_the_server(
        messages in proptest::collection::vec((0u16..18, proptest::collection::vec(
            prop_oneof![4 => Just(0u8), 1 => any::<u8>()], 0..48)), 1..20),
        raw in proptest::collection::vec(any::<u8>(), 0..40)
    ) {
        thread_local!(static SHOWN: Shown = show(ModelOptions::default()));
        SHOWN.with(|shown| {
            let mut client = shown.client();
            client.hello();
            let memory = Mapping::pool(4096).unwrap();
            for (command, payload) in &messages {
                client.send(*command, payload, &[&memory]);
                if client.receive().is_none() {
                    break;
                }
            }
            let _ = std::io::Write::write_all(&mut client.stream, &raw);
            drop(client);
            shown.client().hello();
            assert_eq!(shown.control.mapped_count(), 0);
        });
    }
}
