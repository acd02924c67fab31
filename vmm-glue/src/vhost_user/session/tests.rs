//! The session against a recording backend: every message, every refusal, deferral, and hostile input.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::super::message::{ConfigSpace, MemoryRegion, VringAddr};
use super::super::testing::{
    FrontEnd, Mock, Outbound, USER_OFFSET, event, identity, memory_file, open_count, region,
};
use super::*;

/// Front-end, session and backend in one place.
struct Bench {
    front: FrontEnd,
    session: Session,
    mock: Mock,
}

const REPLY_ACK: u64 = protocol_feature::REPLY_ACK;
const ALL: u64 = PROTOCOL_FEATURES;
const PF: u64 = virtio_feature::PROTOCOL_FEATURES;

impl Bench {
    /// Nothing negotiated yet.
    fn new() -> Self {
        Self::with(Mock::new())
    }

    fn with(mock: Mock) -> Self {
        let (front, socket) = FrontEnd::connect();
        let session = Session::new(socket, &mock);
        Self { front, session, mock }
    }

    /// Everything negotiated and 1 MiB of guest memory at 0.
    fn negotiated() -> Self {
        let mut bench = Self::new();
        bench.tell(Outbound::u64(Request::SetProtocolFeatures, ALL));
        bench.tell(Outbound::u64(Request::SetFeatures, PF));
        bench.tell(Outbound::mem_table(&[region(0, 1 << 20)]));
        bench.mock.take();
        bench
    }

    fn turn(&mut self, message: &Outbound) -> Result<Peer, Error> {
        self.front.send(message);
        self.session.on_readable(&mut self.mock)
    }

    /// Sends a message that must be accepted without an answer.
    fn tell(&mut self, message: Outbound) {
        assert_eq!(self.turn(&message).unwrap(), Peer::Connected);
        assert_eq!(self.front.replies(), []);
    }

    /// Sends a message and returns the payload of its one reply.
    fn ask(&mut self, message: Outbound) -> Vec<u8> {
        assert_eq!(self.turn(&message).unwrap(), Peer::Connected);
        self.reply_to(&message)
    }

    fn reply_to(&mut self, message: &Outbound) -> Vec<u8> {
        let mut replies = self.front.replies();
        assert_eq!(replies.len(), 1, "{replies:?}");
        let (header, payload) = replies.remove(0);
        let payload_bytes = u32::try_from(payload.len()).unwrap();
        assert_eq!(header, Header::reply(message.header.request, payload_bytes));
        payload
    }

    fn ask_u64(&mut self, message: Outbound) -> u64 {
        decode_u64(&self.ask(message)).unwrap()
    }

    /// Sends a message that must be refused: nonzero when asked for, and the session goes on.
    fn refused(&mut self, message: Outbound) {
        assert_ne!(self.ask_u64(message.need_reply()), 0);
        self.ask(Outbound::new(Request::GetFeatures, Vec::new()));
    }

    /// Sends a message that must end the session.
    fn fatal(mut self, message: Outbound) -> Error {
        let error = self.turn(&message).unwrap_err();
        assert_eq!(self.front.replies(), []);
        error
    }

    /// Configures a ring up to, but without, its kick. Its areas lie in a page of their own.
    fn configure(&mut self, index: u32) {
        let page = USER_OFFSET + u64::from(index) * 0x4000;
        self.tell(Outbound::vring(Request::SetVringNum, index, 256));
        self.tell(Outbound::vring(Request::SetVringBase, index, 5));
        self.tell(Outbound::vring_addr(index, page, page + 0x1000, page + 0x2000));
    }

    fn kick(&mut self, index: u32) {
        self.tell(Outbound::vring_fd(Request::SetVringKick, index, Some(event())));
    }

    fn started(index: u32, enabled: bool, call: &str) -> String {
        let page = USER_OFFSET + u64::from(index) * 0x4000;
        format!(
            "start_ring {index} size=256 desc={page:x} avail={:x} used={:x} base=5 enabled={enabled} kick=fd call={call} err=none",
            page + 0x1000,
            page + 0x2000
        )
    }
}

fn get_config(offset: u32, size_bytes: u32) -> Outbound {
    let space = ConfigSpace { offset, size_bytes, flags: 0 };
    let data = vec![0; usize::try_from(size_bytes).unwrap().min(256)];
    Outbound::new(Request::GetConfig, space.encode(&data))
}

fn set_config(offset: u32, flags: u32, data: &[u8]) -> Outbound {
    let size_bytes = u32::try_from(data.len()).unwrap();
    Outbound::new(Request::SetConfig, ConfigSpace { offset, size_bytes, flags }.encode(data))
}

fn single_region(request: Request, region: MemoryRegion) -> Outbound {
    let message = Outbound::new(request, region.encode_single());
    if request == Request::AddMemReg { message.with_fds(vec![memory_file()]) } else { message }
}

// Negotiation.

#[test]
fn features_are_the_devices_and_the_protocols() {
    let mut bench = Bench::new();
    let offered = bench.ask_u64(Outbound::new(Request::GetFeatures, Vec::new()));
    assert_eq!(offered, bench.mock.features | PF);
    bench.tell(Outbound::u64(Request::SetFeatures, offered));
    bench.tell(Outbound::u64(Request::SetFeatures, PF));
    assert_eq!(bench.mock.take(), ["set_features 130000000", "set_features 0"]);
    assert_eq!(bench.session.features(), PF);
}

#[test]
fn unknown_feature_bits_are_refused() {
    let mut bench = Bench::negotiated();
    bench.refused(Outbound::u64(Request::SetFeatures, 1 << 63));
    bench.refused(Outbound::u64(Request::SetProtocolFeatures, ALL | 1 << 1));
    assert_eq!(bench.session.features(), PF);
    assert_eq!(bench.session.protocol_features(), ALL);
    let error = bench.fatal(Outbound::u64(Request::SetFeatures, 1 << 63));
    assert!(matches!(error, Error::FeaturesNotOffered { unknown, .. } if unknown == 1 << 63));
}

#[test]
fn only_logging_may_change_while_a_ring_runs() {
    let mut bench = Bench::negotiated();
    bench.mock.features |= virtio_feature::LOG_ALL;
    bench.configure(0);
    bench.kick(0);
    bench.mock.take();
    bench.tell(Outbound::u64(Request::SetFeatures, PF));
    bench.tell(Outbound::u64(Request::SetFeatures, PF | virtio_feature::LOG_ALL));
    assert_eq!(bench.mock.take(), ["set_features 0", "set_features 4000000"]);
    bench.refused(Outbound::u64(Request::SetFeatures, PF | 1 << 32));
    assert_eq!(bench.mock.take(), [""; 0]);
}

#[test]
fn protocol_features_are_offered_before_set_features_and_set_owner_may_come_late() {
    let mut bench = Bench::new();
    let offered = bench.ask_u64(Outbound::new(Request::GetProtocolFeatures, Vec::new()));
    assert_eq!(offered, 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 13 | 1 << 15);
    bench.tell(Outbound::u64(Request::SetProtocolFeatures, offered));
    assert_eq!(bench.ask_u64(Outbound::new(Request::GetQueueNum, Vec::new())), 4);
    assert_eq!(bench.ask_u64(Outbound::new(Request::GetMaxMemSlots, Vec::new())), 16);
    bench.tell(Outbound::new(Request::SetOwner, Vec::new()));
    bench.tell(Outbound::new(Request::ResetOwner, Vec::new()));
}

#[test]
fn need_reply_counts_only_once_it_is_negotiated() {
    let mut bench = Bench::new();
    bench.tell(Outbound::new(Request::SetOwner, Vec::new()).need_reply());
    // The message that negotiates it is acknowledged already.
    assert_eq!(
        bench.ask_u64(Outbound::u64(Request::SetProtocolFeatures, REPLY_ACK).need_reply()),
        0
    );
    assert_eq!(bench.ask_u64(Outbound::new(Request::SetOwner, Vec::new()).need_reply()), 0);
    bench.tell(Outbound::new(Request::SetOwner, Vec::new()));
}

#[test]
fn a_message_with_its_own_reply_gets_no_acknowledgement_as_well() {
    let mut bench = Bench::negotiated();
    bench.ask(Outbound::new(Request::GetFeatures, Vec::new()).need_reply());
    bench.ask(get_config(0, 60).need_reply());
    bench.ask(Outbound::vring(Request::GetVringBase, 0, 0).need_reply());
    let error = bench.fatal(Outbound::vring(Request::GetVringBase, 99, 0).need_reply());
    assert!(matches!(error, Error::RingIndex { index: 99, .. }));
}

#[test]
fn messages_of_features_that_were_not_negotiated_are_refused() {
    for message in [
        Outbound::new(Request::GetQueueNum, Vec::new()),
        Outbound::new(Request::GetMaxMemSlots, Vec::new()),
        Outbound::new(Request::ResetDevice, Vec::new()),
        Outbound::new(Request::SetBackendReqFd, Vec::new()),
        single_region(Request::AddMemReg, region(0, 4096)),
        single_region(Request::RemMemReg, region(0, 4096)),
        set_config(0, 0, &[1]),
    ] {
        let error = Bench::new().fatal(message);
        assert!(matches!(error, Error::NotNegotiated { .. }), "{error}");
    }
}

#[test]
fn unsupported_and_unknown_requests_are_refused_by_name() {
    for number in [6, 7, 19, 20, 22, 23, 26, 27, 28, 29, 30, 31, 32, 33, 35, 39, 40, 41, 42, 43, 44]
    {
        let request = Request::from_number(number).unwrap();
        Bench::negotiated().refused(Outbound::new(request, vec![0; 24]));
        let error = Bench::negotiated().fatal(Outbound::new(request, vec![0; 24]));
        assert_eq!(error.to_string(), format!("{request} is not supported"));
    }
    let unknown = || {
        let mut message = Outbound::new(Request::GetFeatures, Vec::new());
        message.header.request = 4711;
        message
    };
    assert!(Bench::negotiated().fatal(unknown()).to_string().contains("4711"));
    Bench::negotiated().refused(unknown());
}

#[test]
fn a_payload_of_the_wrong_size_is_refused() {
    for (request, right) in [
        (Request::SetFeatures, 8),
        (Request::SetProtocolFeatures, 8),
        (Request::SetOwner, 0),
        (Request::SetMemTable, 8),
        (Request::AddMemReg, 40),
        (Request::RemMemReg, 40),
        (Request::SetVringNum, 8),
        (Request::SetVringAddr, 40),
        (Request::SetVringBase, 8),
        (Request::SetVringKick, 8),
        (Request::SetVringCall, 8),
        (Request::SetVringErr, 8),
        (Request::SetVringEnable, 8),
        (Request::SetBackendReqFd, 0),
        (Request::ResetDevice, 0),
    ] {
        for size in [0, right - 1, right + 1, 300] {
            if size < 0 || size == right {
                continue;
            }
            let payload = vec![0; usize::try_from(size).unwrap()];
            let error = Bench::negotiated().fatal(Outbound::new(request, payload));
            assert!(matches!(error, Error::PayloadSize { .. }), "{error}");
        }
    }
    for request in [Request::GetFeatures, Request::GetProtocolFeatures, Request::GetQueueNum] {
        Bench::negotiated().fatal(Outbound::new(request, vec![0]));
    }
}

// Memory.

#[test]
fn a_memory_table_replaces_the_one_before() {
    let mut bench = Bench::negotiated();
    bench.tell(Outbound::mem_table(&[region(0, 0x1000), region(0x1000, 0x2000)]));
    bench.tell(Outbound::mem_table(&[]));
    assert_eq!(
        bench.mock.take(),
        ["set_mem_table 0+1000@700000000000/0 1000+2000@700000001000/0", "set_mem_table"]
    );
    assert_eq!(bench.session.memory().regions(), []);
    let eight: Vec<_> = (0..8).map(|slot| region(slot * 0x1000, 0x1000)).collect();
    bench.tell(Outbound::mem_table(&eight));
    assert_eq!(bench.session.memory().regions().len(), 8);
}

#[test]
fn bad_memory_tables_are_refused_and_the_old_one_stands() {
    let mut bench = Bench::negotiated();
    let nine: Vec<_> = (0..9).map(|slot| region(slot * 0x1000, 0x1000)).collect();
    let wraps = MemoryRegion { mmap_offset: u64::MAX, ..region(0, 0x1000) };
    for regions in [
        nine.as_slice(),
        &[region(0, 0)],
        &[wraps],
        &[region(u64::MAX - USER_OFFSET, 0x1000)],
        &[region(0, 0x1001), region(0x1000, 0x1000)],
    ] {
        bench.refused(Outbound::mem_table(regions));
    }
    let two = [region(0, 0x1000), region(0x1000, 0x1000)];
    for fds_count in [0, 1, 3] {
        let fds = (0..fds_count).map(|_| memory_file()).collect();
        bench.refused(Outbound::mem_table(&two).with_fds(fds));
    }
    bench.mock.refuse = Some("set_mem_table");
    bench.mock.take();
    bench.refused(Outbound::mem_table(&two));
    assert_eq!(bench.mock.take().len(), 1);
    assert_eq!(bench.session.memory().regions().len(), 1);
}

#[test]
fn regions_come_and_go_one_by_one_within_the_slots() {
    let mut bench = Bench::negotiated();
    bench.mock.mem_slots_max = 2;
    let more = region(0x10_0000, 0x1000);
    bench.tell(single_region(Request::AddMemReg, more));
    bench.refused(single_region(Request::AddMemReg, region(0x20_0000, 0x1000)));
    // A descriptor with REM_MEM_REG is closed unused.
    bench.tell(single_region(Request::RemMemReg, more).with_fds(vec![memory_file()]));
    bench.refused(single_region(Request::RemMemReg, more));
    bench.refused(single_region(Request::AddMemReg, region(0xf_ffff, 0x1000)));
    bench.refused(single_region(Request::AddMemReg, more).with_fds(vec![]));
    bench.refused(single_region(Request::AddMemReg, more).with_fds(vec![event(), event()]));
    assert_eq!(
        bench.mock.take(),
        ["add_mem_region 100000+1000@700000100000/0", "remove_mem_region 100000+1000@700000100000"]
    );
}

#[test]
fn the_memory_of_a_running_ring_cannot_be_taken_away() {
    let mut bench = Bench::negotiated();
    bench.configure(1);
    bench.tell(single_region(Request::RemMemReg, region(0, 1 << 20)));
    bench.tell(single_region(Request::AddMemReg, region(0, 1 << 20)));
    bench.kick(1);
    bench.mock.take();
    bench.refused(single_region(Request::RemMemReg, region(0, 1 << 20)));
    bench.refused(Outbound::mem_table(&[]));
    bench.refused(Outbound::mem_table(&[region(0, 0x5000)]));
    assert_eq!(bench.mock.take(), [""; 0]);
    bench.tell(Outbound::mem_table(&[region(0, 2 << 20)]));
    bench.ask(Outbound::vring(Request::GetVringBase, 1, 0));
    bench.tell(Outbound::mem_table(&[]));
}

// Rings.

#[test]
fn a_ring_starts_whatever_comes_last() {
    let pieces: [fn(&mut Bench); 4] = [
        |bench| bench.tell(Outbound::vring(Request::SetVringNum, 0, 256)),
        |bench| {
            bench.tell(Outbound::vring_addr(
                0,
                USER_OFFSET,
                USER_OFFSET + 0x1000,
                USER_OFFSET + 0x2000,
            ));
        },
        |bench| bench.kick(0),
        |bench| bench.tell(single_region(Request::AddMemReg, region(0, 1 << 20))),
    ];
    for first in 0..4 {
        let mut bench = Bench::negotiated();
        bench.tell(Outbound::mem_table(&[]));
        bench.tell(Outbound::vring(Request::SetVringBase, 0, 5));
        bench.mock.take();
        for offset in 0..3 {
            pieces[(first + offset) % 4](&mut bench);
            assert!(!bench.session.rings()[0].started);
            assert!(bench.session.ring_waits_for(0).is_some());
        }
        pieces[(first + 3) % 4](&mut bench);
        assert!(bench.session.rings()[0].started);
        assert_eq!(bench.session.ring_waits_for(0), None);
        assert_eq!(bench.mock.take().last().unwrap(), &Bench::started(0, false, "none"));
    }
}

#[test]
fn a_ring_in_memory_that_does_not_exist_waits_and_says_so() {
    let mut bench = Bench::negotiated();
    let beyond = USER_OFFSET + (1 << 20);
    bench.tell(Outbound::vring(Request::SetVringNum, 0, 256));
    bench.tell(Outbound::vring_addr(0, beyond, beyond + 0x1000, beyond + 0x2000));
    bench.kick(0);
    assert_eq!(bench.mock.take(), [""; 0]);
    assert!(bench.session.ring_waits_for(0).unwrap().contains("memory"));
    assert_eq!(bench.session.ring_waits_for(99), None);
}

#[test]
fn without_protocol_features_rings_start_enabled() {
    let mut bench = Bench::new();
    bench.tell(Outbound::new(Request::SetOwner, Vec::new()));
    bench.tell(Outbound::mem_table(&[region(0, 1 << 20)]));
    bench.configure(0);
    bench.kick(0);
    assert_eq!(bench.mock.take().last().unwrap(), &Bench::started(0, true, "none"));
}

#[test]
fn with_protocol_features_a_ring_runs_disabled_until_it_is_enabled() {
    let mut bench = Bench::negotiated();
    bench.configure(0);
    bench.kick(0);
    for enabled in [1, 1, 0, 0, 1] {
        bench.tell(Outbound::vring(Request::SetVringEnable, 0, enabled));
    }
    assert_eq!(
        bench.mock.take(),
        [
            Bench::started(0, false, "none").as_str(),
            "enable_ring 0 true",
            "enable_ring 0 false",
            "enable_ring 0 true"
        ]
    );
    // Enabled beforehand, the ring starts so.
    bench.tell(Outbound::vring(Request::SetVringEnable, 1, 1));
    bench.configure(1);
    bench.kick(1);
    assert_eq!(bench.mock.take(), [Bench::started(1, true, "none")]);
    bench.refused(Outbound::vring(Request::SetVringEnable, 0, 2));
}

#[test]
fn a_ring_without_a_kick_descriptor_is_polled() {
    let mut bench = Bench::negotiated();
    bench.configure(0);
    bench.tell(Outbound::vring_fd(Request::SetVringKick, 0, None));
    assert!(bench.mock.take()[0].contains("kick=none"));
}

#[test]
fn descriptors_set_early_come_with_the_start_and_later_ones_replace_them() {
    let mut bench = Bench::negotiated();
    bench.tell(Outbound::vring_fd(Request::SetVringCall, 2, Some(event())));
    bench.tell(Outbound::vring_fd(Request::SetVringErr, 2, Some(event())));
    bench.tell(Outbound::vring_fd(Request::SetVringErr, 2, None));
    bench.configure(2);
    bench.kick(2);
    bench.tell(Outbound::vring_fd(Request::SetVringCall, 2, None));
    bench.tell(Outbound::vring_fd(Request::SetVringCall, 2, Some(event())));
    bench.tell(Outbound::vring_fd(Request::SetVringErr, 2, Some(event())));
    bench.tell(Outbound::vring_fd(Request::SetVringKick, 2, Some(event())));
    bench.tell(Outbound::vring_fd(Request::SetVringKick, 2, None));
    assert_eq!(
        bench.mock.take(),
        [
            Bench::started(2, false, "fd").as_str(),
            "set_ring_call 2 none",
            "set_ring_call 2 fd",
            "set_ring_err 2 fd",
            "set_ring_kick 2 fd",
            "set_ring_kick 2 none"
        ]
    );
}

#[test]
fn a_stopped_ring_keeps_its_call_and_starts_again_with_a_kick_where_it_stopped() {
    let mut bench = Bench::negotiated();
    bench.tell(Outbound::vring_fd(Request::SetVringCall, 0, Some(event())));
    bench.configure(0);
    bench.kick(0);
    let reply = bench.ask(Outbound::vring(Request::GetVringBase, 0, 0));
    assert_eq!(VringStateReply::decode(&reply), (0, 77));
    // Already stopped: the same answer, and the backend is not asked again.
    let reply = bench.ask(Outbound::vring(Request::GetVringBase, 0, 0));
    assert_eq!(VringStateReply::decode(&reply), (0, 77));
    bench.kick(0);
    let calls = bench.mock.take();
    assert_eq!(calls[1], "stop_ring 0");
    assert_eq!(calls.len(), 3);
    assert_eq!(calls[2], Bench::started(0, false, "fd").replace("base=5", "base=77"));
}

/// A vring state as a pair.
struct VringStateReply;

impl VringStateReply {
    fn decode(payload: &[u8]) -> (u32, u32) {
        let state = super::super::message::VringState::decode(payload).unwrap();
        (state.index, state.value)
    }
}

#[test]
fn the_base_of_a_ring_that_never_ran_is_the_one_that_was_set() {
    let mut bench = Bench::negotiated();
    bench.tell(Outbound::vring(Request::SetVringBase, 3, 65535));
    let reply = bench.ask(Outbound::vring(Request::GetVringBase, 3, 0));
    assert_eq!(VringStateReply::decode(&reply), (3, 65535));
    assert_eq!(bench.mock.take(), [""; 0]);
}

#[test]
fn a_running_ring_does_not_change_size_base_or_addresses() {
    let mut bench = Bench::negotiated();
    bench.configure(0);
    bench.kick(0);
    bench.refused(Outbound::vring(Request::SetVringNum, 0, 128));
    bench.refused(Outbound::vring(Request::SetVringBase, 0, 0));
    let page = USER_OFFSET;
    bench.refused(Outbound::vring_addr(0, page + 0x8000, page + 0x1000, page + 0x2000));
    // QEMU repeats the same ones.
    bench.tell(Outbound::vring_addr(0, page, page + 0x1000, page + 0x2000));
    assert_eq!(bench.mock.take().len(), 1);
}

#[test]
fn bad_ring_configurations_are_refused() {
    let mut bench = Bench::negotiated();
    for size in [0, 3, 65536, u32::MAX] {
        bench.refused(Outbound::vring(Request::SetVringNum, 0, size));
    }
    bench.refused(Outbound::vring(Request::SetVringBase, 0, 65536));
    bench.refused(Outbound::vring_addr(0, 8, 0, 0));
    bench.refused(Outbound::vring_addr(0, 0, 1, 0));
    bench.refused(Outbound::vring_addr(0, 0, 0, 2));
    bench.refused(Outbound::vring_addr(0, u64::MAX - 15, 0, 0));
    for flags in [1, 2, u32::MAX] {
        let addr =
            VringAddr { index: 0, flags, desc_addr: 0, used_addr: 0, avail_addr: 0, log_addr: 0 };
        bench.refused(Outbound::new(Request::SetVringAddr, addr.encode()));
    }
    assert!(bench.session.rings()[0].size.is_none());
    assert!(bench.session.rings()[0].addresses.is_none());
}

#[test]
fn ring_indices_beyond_the_device_are_refused_in_every_message() {
    for index in [4, 255, 256, 65536, u32::MAX] {
        let mut bench = Bench::negotiated();
        bench.refused(Outbound::vring(Request::SetVringNum, index, 256));
        bench.refused(Outbound::vring(Request::SetVringBase, index, 0));
        bench.refused(Outbound::vring(Request::SetVringEnable, index, 1));
        bench.refused(Outbound::vring_addr(index, 0, 0, 0));
        bench.fatal(Outbound::vring(Request::GetVringBase, index, 0));
    }
    let mut bench = Bench::negotiated();
    for request in [Request::SetVringKick, Request::SetVringCall, Request::SetVringErr] {
        bench.refused(Outbound::vring_fd(request, 4, Some(event())));
        bench.refused(Outbound::vring_fd(request, 255, None));
        bench.refused(Outbound::u64(request, 1 << 9).with_fds(vec![event()]));
    }
}

#[test]
fn a_vring_descriptor_must_be_there_alone_and_an_eventfd() {
    let mut bench = Bench::negotiated();
    for request in [Request::SetVringKick, Request::SetVringCall, Request::SetVringErr] {
        bench.refused(Outbound::u64(request, 0));
        bench.refused(Outbound::u64(request, 0).with_fds(vec![event(), event()]));
        bench.refused(Outbound::vring_fd(request, 0, Some(memory_file())));
        // One that comes although none was announced is closed.
        let file = memory_file();
        let identities = [identity(&file)];
        bench.tell(Outbound::u64(request, 1 << 8).with_fds(vec![file]));
        assert_eq!(open_count(&identities), 0);
    }
}

#[test]
fn a_ring_that_the_backend_refuses_waits_for_a_new_kick() {
    let mut bench = Bench::negotiated();
    bench.configure(0);
    bench.mock.refuse = Some("start_ring");
    bench.refused(Outbound::vring_fd(Request::SetVringKick, 0, Some(event())));
    bench.tell(Outbound::vring(Request::SetVringNum, 0, 256));
    assert_eq!(bench.mock.take().len(), 1);
    bench.mock.refuse = None;
    bench.kick(0);
    assert_eq!(bench.mock.take().len(), 1);
}

#[test]
fn a_ring_configured_for_the_other_layout_does_not_start() {
    let mut bench = Bench::new();
    bench.mock.features |= virtio_feature::RING_PACKED;
    bench.tell(Outbound::u64(Request::SetProtocolFeatures, ALL));
    bench.tell(Outbound::u64(Request::SetFeatures, PF | virtio_feature::RING_PACKED));
    bench.tell(Outbound::mem_table(&[region(0, 1 << 20)]));
    bench.tell(Outbound::vring(Request::SetVringNum, 0, 100));
    bench.tell(Outbound::vring(Request::SetVringBase, 0, 0x8000_8000));
    bench.tell(Outbound::vring_addr(0, USER_OFFSET, USER_OFFSET + 0x1000, USER_OFFSET + 0x1004));
    bench.tell(Outbound::u64(Request::SetFeatures, PF));
    bench.refused(Outbound::vring_fd(Request::SetVringKick, 0, Some(event())));
    bench.tell(Outbound::u64(Request::SetFeatures, PF | virtio_feature::RING_PACKED));
    bench.kick(0);
    assert!(bench.mock.take().last().unwrap().contains("size=100"));
}

#[test]
fn reset_device_stops_disables_and_forgets_every_ring_but_not_memory() {
    let mut bench = Bench::negotiated();
    for index in 0..2 {
        bench.tell(Outbound::vring_fd(Request::SetVringCall, index, Some(event())));
        bench.configure(index);
        bench.kick(index);
        bench.tell(Outbound::vring(Request::SetVringEnable, index, 1));
    }
    bench.mock.take();
    bench.tell(Outbound::new(Request::ResetDevice, Vec::new()));
    bench.kick(0);
    assert_eq!(bench.mock.take(), ["reset_device"]);
    bench.configure(0);
    assert_eq!(bench.mock.take(), [Bench::started(0, false, "fd")]);
}

// The configuration space.

#[test]
fn the_configuration_is_read_where_it_was_asked_for() {
    let mut bench = Bench::negotiated();
    for (offset, size) in [(0, 60), (4, 8), (0, 256), (255, 1), (256, 0)] {
        let reply = bench.ask(get_config(offset, size));
        let (space, data) = ConfigSpace::decode(&reply).unwrap();
        assert_eq!((space.offset, space.size_bytes, space.flags), (offset, size, 0));
        let expected: Vec<_> =
            (offset..offset + size).map(|at| u8::try_from(at).unwrap()).collect();
        assert_eq!(data, expected);
    }
    // Some front-ends send no room for the answer.
    let space = ConfigSpace { offset: 0, size_bytes: 60, flags: 0 };
    assert_eq!(bench.ask(Outbound::new(Request::GetConfig, space.encode(&[]))).len(), 72);
}

#[test]
fn old_cloud_hypervisors_offset_is_taken_for_zero_and_echoed() {
    let mut bench = Bench::negotiated();
    let reply = bench.ask(get_config(0x100, 60));
    let (space, data) = ConfigSpace::decode(&reply).unwrap();
    assert_eq!((space.offset, space.size_bytes), (0x100, 60));
    assert_eq!(data[..3], [0, 1, 2]);
    bench.tell(set_config(0x120, 0, &[1]));
    assert_eq!(bench.mock.take(), ["get_config 0+60", "set_config 32 [1] false"]);
}

#[test]
fn a_configuration_that_cannot_be_read_is_an_empty_reply() {
    let mut bench = Bench::negotiated();
    for (offset, size) in
        [(0, 257), (200, 57), (0x100, 257), (0x200, 1), (u32::MAX, 2), (1, u32::MAX)]
    {
        assert_eq!(bench.ask(get_config(offset, size)), []);
    }
    assert_eq!(bench.ask(Outbound::new(Request::GetConfig, vec![0; 11])), []);
    bench.mock.refuse = Some("get_config");
    assert_eq!(bench.ask(get_config(0, 60).need_reply()), []);
    // Without CONFIG as well.
    assert_eq!(Bench::new().ask(get_config(0, 60)), []);
}

#[test]
fn the_configuration_is_written_only_as_announced() {
    let mut bench = Bench::negotiated();
    bench.tell(set_config(32, 0, &[1]));
    bench.tell(set_config(32, 1, &[0]));
    assert_eq!(bench.mock.take(), ["set_config 32 [1] false", "set_config 32 [0] true"]);
    bench.refused(set_config(32, 2, &[0]));
    bench.refused(set_config(250, 0, &[0; 7]));
    let space = ConfigSpace { offset: 0, size_bytes: 3, flags: 0 };
    bench.refused(Outbound::new(Request::SetConfig, space.encode(&[0; 2])));
    bench.refused(Outbound::new(Request::SetConfig, space.encode(&[0; 4])));
    bench.mock.refuse = Some("set_config");
    bench.refused(set_config(0, 0, &[1]));
}

#[test]
fn configuration_changes_go_out_on_the_front_ends_channel() {
    use std::io::Read;

    let mut bench = Bench::negotiated();
    assert!(!bench.session.config_changed());
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    bench.tell(Outbound::new(Request::SetBackendReqFd, Vec::new()).with_fds(vec![ours.into()]));
    assert!(bench.session.config_changed());
    assert!(bench.session.channel_to_poll().is_none());
    let mut bytes = [0; 12];
    theirs.read_exact(&mut bytes).unwrap();
    assert_eq!(Header::decode(&bytes), Header::request(2, false, 0));
    drop(theirs);
    assert!(!bench.session.config_changed());
    assert!(!bench.session.config_changed());
    bench.refused(Outbound::new(Request::SetBackendReqFd, Vec::new()));
    bench.refused(Outbound::new(Request::SetBackendReqFd, Vec::new()).with_fds(vec![event()]));
}

// Deferral.

#[test]
fn a_ring_is_answered_for_only_when_it_is_drained() {
    let mut bench = Bench::negotiated();
    bench.configure(0);
    bench.kick(0);
    bench.mock.defer = true;
    let stop = Outbound::vring(Request::GetVringBase, 0, 0);
    bench.tell(Outbound::vring(Request::GetVringBase, 0, 0));
    assert!(bench.session.is_pending());
    assert_eq!(bench.session.interest(), Interest { readable: false, writable: false });
    // What follows waits in the socket.
    bench.front.send(&Outbound::vring(Request::SetVringBase, 0, 9));
    assert_eq!(bench.session.on_readable(&mut bench.mock).unwrap(), Peer::Connected);
    assert!(bench.session.rings()[0].started);
    assert_eq!(bench.front.replies(), []);

    let done = Ok(Completion::Stopped { base: 42 });
    bench.session.complete(&mut bench.mock, done).unwrap();
    assert_eq!(VringStateReply::decode(&bench.reply_to(&stop)), (0, 42));
    assert_eq!(bench.session.interest(), Interest { readable: true, writable: false });
    assert_eq!(bench.session.rings()[0].base, Some(42));
    let _ = bench.session.on_readable(&mut bench.mock).unwrap();
    assert_eq!(bench.session.rings()[0].base, Some(9));
}

#[test]
fn every_operation_can_be_deferred_and_takes_effect_when_it_is_done() {
    let mut bench = Bench::negotiated();
    bench.configure(0);
    bench.kick(0);
    bench.configure(1);
    bench.mock.defer = true;
    for (message, call) in [
        (Outbound::u64(Request::SetFeatures, PF), "set_features 0"),
        (Outbound::vring(Request::SetVringEnable, 0, 1), "enable_ring 0 true"),
        (Outbound::mem_table(&[region(0, 2 << 20)]), "set_mem_table 0+200000@700000000000/0"),
        (
            single_region(Request::AddMemReg, region(4 << 20, 4096)),
            "add_mem_region 400000+1000@700000400000/0",
        ),
        (
            single_region(Request::RemMemReg, region(4 << 20, 4096)),
            "remove_mem_region 400000+1000@700000400000",
        ),
        (Outbound::new(Request::ResetDevice, Vec::new()), "reset_device"),
    ] {
        bench.mock.take();
        let message = message.need_reply();
        let before = (bench.session.memory().clone(), bench.session.rings()[0].enabled);
        assert_eq!(bench.turn(&message).unwrap(), Peer::Connected);
        assert_eq!(bench.front.replies(), []);
        assert_eq!(bench.mock.take(), [call]);
        assert_eq!(before, (bench.session.memory().clone(), bench.session.rings()[0].enabled));
        bench.session.complete(&mut bench.mock, Ok(Completion::Done)).unwrap();
        assert_eq!(decode_u64(&bench.reply_to(&message)), Some(0));
    }
    assert!(!bench.session.rings()[0].started);
}

#[test]
fn a_deferred_operation_that_fails_is_refused_and_leaves_no_trace() {
    let mut bench = Bench::negotiated();
    bench.mock.defer = true;
    let message = Outbound::mem_table(&[region(0, 2 << 20)]).need_reply();
    assert_eq!(bench.turn(&message).unwrap(), Peer::Connected);
    bench.session.complete(&mut bench.mock, Err("no".into())).unwrap();
    assert_ne!(decode_u64(&bench.reply_to(&message)), Some(0));
    assert_eq!(bench.session.memory().regions()[0].len_bytes, 1 << 20);

    // Without the wish for an acknowledgement there is no way to tell.
    bench.tell(Outbound::mem_table(&[region(0, 2 << 20)]));
    let error = bench.session.complete(&mut bench.mock, Err("no".into())).unwrap_err();
    assert!(matches!(error, Error::Backend { request: Request::SetMemTable, .. }));
}

#[test]
fn rings_that_wait_for_memory_start_when_it_is_completed() {
    let mut bench = Bench::negotiated();
    bench.tell(Outbound::mem_table(&[]));
    bench.configure(0);
    bench.kick(0);
    bench.mock.defer = true;
    bench.tell(Outbound::mem_table(&[region(0, 1 << 20)]));
    bench.mock.take();
    bench.session.complete(&mut bench.mock, Ok(Completion::Done)).unwrap();
    assert_eq!(bench.mock.take(), [Bench::started(0, false, "none")]);
}

#[test]
fn a_ring_that_fails_to_start_is_blamed_on_the_message_that_completed_it() {
    let mut bench = Bench::negotiated();
    bench.tell(Outbound::mem_table(&[]));
    bench.configure(0);
    bench.kick(0);
    bench.mock.refuse = Some("start_ring");
    let error = bench.fatal(single_region(Request::AddMemReg, region(0, 1 << 20)));
    assert!(matches!(error, Error::Backend { request: Request::AddMemReg, .. }));
}

#[test]
fn completions_that_nobody_waits_for_are_errors() {
    let mut bench = Bench::negotiated();
    let error = bench.session.complete(&mut bench.mock, Ok(Completion::Done)).unwrap_err();
    assert!(matches!(error, Error::NothingPending));
    bench.configure(0);
    bench.kick(0);
    bench.mock.defer = true;
    for (message, wrong) in [
        (Outbound::vring(Request::GetVringBase, 0, 0), Completion::Done),
        (Outbound::new(Request::ResetDevice, Vec::new()), Completion::Stopped { base: 0 }),
    ] {
        bench.tell(message);
        let error = bench.session.complete(&mut bench.mock, Ok(wrong)).unwrap_err();
        assert!(matches!(error, Error::WrongCompletion { .. }));
    }
}

#[test]
fn a_front_end_that_does_not_read_is_not_served_further() {
    let mut bench = Bench::new();
    let ask = Outbound::new(Request::GetFeatures, Vec::new());
    let mut asked = 0;
    while !bench.session.interest().writable {
        assert_eq!(bench.turn(&ask).unwrap(), Peer::Connected);
        asked += 1;
        assert!(asked < 1_000_000, "the socket never fills");
    }
    assert!(!bench.session.interest().readable);
    bench.front.send(&ask);
    assert_eq!(bench.session.on_readable(&mut bench.mock).unwrap(), Peer::Connected);
    assert_eq!(bench.front.replies().len(), asked - 1);
    bench.session.on_writable().unwrap();
    let _ = bench.session.on_readable(&mut bench.mock).unwrap();
    assert_eq!(bench.front.replies().len(), 2);
}

#[test]
fn one_turn_handles_a_bounded_number_of_messages() {
    let mut bench = Bench::new();
    for _ in 0..MESSAGES_PER_TURN + 1 {
        bench.front.send(&Outbound::new(Request::GetFeatures, Vec::new()));
    }
    let _ = bench.session.on_readable(&mut bench.mock).unwrap();
    assert_eq!(bench.front.replies().len(), MESSAGES_PER_TURN);
    let _ = bench.session.on_readable(&mut bench.mock).unwrap();
    assert_eq!(bench.front.replies().len(), 1);
}

#[test]
fn hanging_up_is_noticed() {
    let mut bench = Bench::negotiated();
    drop(bench.front);
    assert_eq!(bench.session.on_readable(&mut bench.mock).unwrap(), Peer::Closed);
}

#[test]
fn a_session_survives_a_hand_over_in_the_middle_of_everything() {
    let mut bench = Bench::negotiated();
    bench.configure(0);
    bench.tell(Outbound::vring_fd(Request::SetVringCall, 0, Some(event())));
    bench.session = Session::from_state(bench.session.into_state()).unwrap();
    bench.kick(0);
    assert_eq!(bench.mock.take(), [Bench::started(0, false, "fd")]);
    bench.mock.defer = true;
    let stop = Outbound::vring(Request::GetVringBase, 0, 0);
    bench.tell(Outbound::vring(Request::GetVringBase, 0, 0));
    bench.session = Session::from_state(bench.session.into_state()).unwrap();
    let done = Ok(Completion::Stopped { base: 6 });
    bench.session.complete(&mut bench.mock, done).unwrap();
    assert_eq!(VringStateReply::decode(&bench.reply_to(&stop)), (0, 6));
    assert_eq!(bench.session.memory().regions().len(), 1);

    bench.kick(0);
    bench.tell(Outbound::vring(Request::GetVringBase, 0, 0));
    let mut state = bench.session.into_state();
    state.rings.clear();
    Session::from_state(state).unwrap_err();
}

// Whole conversations.

/// What QEMU says, from connecting to disconnecting.
fn conversation() -> Vec<Outbound> {
    let channel = || -> OwnedFd { UnixStream::pair().unwrap().0.into() };
    let mut messages = vec![
        Outbound::new(Request::GetFeatures, Vec::new()),
        Outbound::new(Request::GetProtocolFeatures, Vec::new()),
        Outbound::u64(Request::SetProtocolFeatures, ALL),
        Outbound::new(Request::GetQueueNum, Vec::new()),
        Outbound::new(Request::GetMaxMemSlots, Vec::new()),
        Outbound::new(Request::SetBackendReqFd, Vec::new()).with_fds(vec![channel()]),
        Outbound::new(Request::SetOwner, Vec::new()),
        Outbound::new(Request::GetFeatures, Vec::new()),
        Outbound::vring_fd(Request::SetVringCall, 0, Some(event())),
        Outbound::vring_fd(Request::SetVringErr, 0, Some(event())),
        get_config(0, 60),
        Outbound::u64(Request::SetFeatures, PF | 1 << 32 | 1 << 29),
        Outbound::mem_table(&[region(0, 1 << 20), region(1 << 20, 1 << 20)]).need_reply(),
        single_region(Request::AddMemReg, region(4 << 20, 4096)).need_reply(),
    ];
    for index in 0..3 {
        let page = USER_OFFSET + u64::from(index) * 0x4000;
        messages.extend([
            Outbound::vring(Request::SetVringNum, index, 128),
            Outbound::vring(Request::SetVringBase, index, index),
            Outbound::vring_addr(index, page, page + 0x1000, page + 0x2000).need_reply(),
            Outbound::vring_fd(Request::SetVringKick, index, Some(event())),
            Outbound::vring_fd(Request::SetVringCall, index, Some(event())),
            Outbound::vring(Request::SetVringEnable, index, 1).need_reply(),
        ]);
    }
    messages.extend([
        set_config(32, 0, &[1]).need_reply(),
        Outbound::vring_fd(Request::SetVringCall, 1, None),
        single_region(Request::RemMemReg, region(4 << 20, 4096)).need_reply(),
        Outbound::vring(Request::SetVringNum, 9, 128).need_reply(),
        Outbound::vring(Request::SetVringEnable, 0, 0),
        Outbound::vring(Request::GetVringBase, 0, 0),
        Outbound::new(Request::ResetDevice, Vec::new()).need_reply(),
    ]);
    messages
}

/// Sends a conversation in pieces whose sizes `chunk` chooses, given how much is left, and its descriptors with any of
/// them. Returns what the backend and the front-end saw.
fn converse(
    messages: &[Outbound],
    chunk: &mut dyn FnMut(usize) -> usize,
) -> (Vec<String>, Vec<(Header, Vec<u8>)>) {
    let mut bench = Bench::new();
    let mut replies = Vec::new();
    for message in messages {
        let bytes = message.bytes();
        let mut rest = bytes.as_slice();
        let mut fds = message.fds.as_slice();
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(chunk(rest.len()).clamp(1, rest.len()));
            // Descriptors may come with any piece, and in several lots.
            let now =
                if after.is_empty() { fds.len() } else { chunk(fds.len() + 1) % (fds.len() + 1) };
            let (lot, later) = fds.split_at(now);
            bench.front.send_chunk(piece, lot);
            assert_eq!(bench.session.on_readable(&mut bench.mock).unwrap(), Peer::Connected);
            replies.extend(bench.front.replies());
            (rest, fds) = (after, later);
        }
    }
    (bench.mock.take(), replies)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn however_a_conversation_is_cut_it_says_the_same(seed: u64) {
        let messages = conversation();
        let whole = converse(&messages, &mut |len| len);
        prop_assert_eq!(whole.0.len(), 19);
        let mut random = Random(seed | 1);
        let cut = converse(&messages, &mut |len| 1 + random.below(len.max(1)));
        prop_assert_eq!(cut, whole);
    }
}

/// xorshift64*: enough to be different each time and the same for one seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap() % bound
    }
}

/// One hostile front-end. Returns duplicates of every descriptor that it sent: while they are open, no other test's
/// descriptor can have the same identity.
fn attack(random: &mut Random) -> Vec<OwnedFd> {
    let mut bench = if random.below(2) == 0 { Bench::new() } else { Bench::negotiated() };
    bench.mock.defer = random.below(4) == 0;
    let mut kept = Vec::new();
    let mut messages = conversation();
    for _ in 0..random.below(40) {
        let at = random.below(messages.len());
        let message = &mut messages[at];
        let mut bytes = message.bytes();
        let mut fds = std::mem::take(&mut message.fds);
        match random.below(8) {
            0 => {
                let at = random.below(bytes.len());
                bytes[at] ^= 1 << random.below(8);
            }
            // Extreme values in the payload, where they hurt more than in the header.
            1 if bytes.len() >= 20 => {
                let at = 12 + random.below(bytes.len() - 19);
                let values = [0, 1, u64::MAX, 1 << 63, 0xffff_ffff, 1 << 16, 4096];
                bytes[at..at + 8].copy_from_slice(&values[random.below(7)].to_ne_bytes());
            }
            2 => bytes = (0..random.below(64)).map(|_| random.next().to_le_bytes()[7]).collect(),
            3 => bytes.truncate(random.below(bytes.len())),
            4 => fds.extend((0..random.below(40)).map(|_| event())),
            5 => fds.push(memory_file()),
            _ => {}
        }
        if bytes.is_empty() {
            continue;
        }
        kept.extend(fds.iter().map(|fd| fd.try_clone().unwrap()));
        bench.front.send_chunk(&bytes, &fds);
        drop(fds);
        if bench.session.on_readable(&mut bench.mock).is_err() {
            break;
        }
        if bench.session.is_pending() && random.below(2) == 0 {
            let result = match random.below(3) {
                0 => Ok(Completion::Done),
                1 => Ok(Completion::Stopped { base: 0 }),
                _ => Err("no".into()),
            };
            if bench.session.complete(&mut bench.mock, result).is_err() {
                break;
            }
        }
        bench.front.replies();
    }
    kept
}

#[test]
fn no_input_panics_or_leaks_a_descriptor() {
    let seed = std::env::var("RINGMILL_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = seed.map_or(1..400, |seed: u64| seed..seed + 1);
    for seed in seeds {
        let kept = attack(&mut Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1));
        let identities: Vec<_> = kept.iter().map(identity).collect();
        assert_eq!(
            open_count(&identities),
            kept.len(),
            "replay: RINGMILL_SEED={seed} cargo test -p ringmill-vmm-glue no_input_panics"
        );
    }
}
