//! Test doubles: a front-end that speaks bytes, and a backend that records what it is asked.
//!
//! In: messages as tests spell them. Out: replies, and the backend's calls as lines of text, which compare and print
//! well. Owner: the test's thread; both ends of the conversation run on it.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::backend::{Backend, Progress, Refusal, StopProgress};
use super::descriptor::SharedFd;
use super::memory::{GuestAddr, RegionDesc, UserAddr};
use super::message::{HEADER_BYTES, Header, MemoryRegion, Request, VringAddr, VringFd, VringState};
use super::ring::RingStart;

/// A message before it is sent.
#[derive(Debug)]
pub(super) struct Outbound {
    pub(super) header: Header,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Outbound {
    pub(super) fn new(request: Request, payload: Vec<u8>) -> Self {
        let payload_bytes = u32::try_from(payload.len()).unwrap();
        let header = Header::request(request.number(), false, payload_bytes);
        Self { header, payload, fds: Vec::new() }
    }

    pub(super) fn u64(request: Request, value: u64) -> Self {
        Self::new(request, value.to_ne_bytes().to_vec())
    }

    pub(super) fn vring(request: Request, index: u32, value: u32) -> Self {
        Self::new(request, VringState { index, value }.encode())
    }

    pub(super) fn vring_fd(request: Request, index: u32, fd: Option<OwnedFd>) -> Self {
        let payload = VringFd { index, no_fd: fd.is_none(), reserved_set: false }.encode();
        Self::new(request, payload).with_fds(fd.into_iter().collect())
    }

    pub(super) fn vring_addr(index: u32, desc: u64, avail: u64, used: u64) -> Self {
        let addr = VringAddr {
            index,
            flags: 0,
            desc_addr: desc,
            used_addr: used,
            avail_addr: avail,
            log_addr: 0,
        };
        Self::new(Request::SetVringAddr, addr.encode())
    }

    pub(super) fn mem_table(regions: &[MemoryRegion]) -> Self {
        let fds = regions.iter().map(|_| memory_file()).collect();
        Self::new(Request::SetMemTable, MemoryRegion::encode_table(regions)).with_fds(fds)
    }

    pub(super) fn with_fds(mut self, fds: Vec<OwnedFd>) -> Self {
        self.fds = fds;
        self
    }

    pub(super) fn need_reply(mut self) -> Self {
        let Header { request, payload_bytes, .. } = self.header;
        self.header = Header::request(request, true, payload_bytes);
        self
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.header.encode_into(&mut bytes);
        bytes.extend_from_slice(&self.payload);
        bytes
    }
}

/// A region whose user addresses are its guest addresses plus `USER_OFFSET`.
pub(super) const USER_OFFSET: u64 = 0x7000_0000_0000;

pub(super) fn region(guest_addr: u64, len_bytes: u64) -> MemoryRegion {
    MemoryRegion { guest_addr, len_bytes, user_addr: guest_addr + USER_OFFSET, mmap_offset: 0 }
}

pub(super) fn memory_file() -> OwnedFd {
    memfd_create(c"guest", MemfdFlags::CLOEXEC).unwrap()
}

pub(super) fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// What distinguishes one open file from all others of this process, shared by its duplicates.
pub(super) fn identity(fd: &impl AsFd) -> String {
    identity_of(fd.as_fd().as_raw_fd()).unwrap()
}

fn identity_of(fd: i32) -> Option<String> {
    let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()?;
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
    let inode = info.lines().find(|line| line.starts_with("ino:"))?;
    let event = info.lines().find(|line| line.starts_with("eventfd-id:")).unwrap_or_default();
    Some(format!("{} {inode} {event}", link.display()))
}

/// How many descriptors of this process refer to one of these files. Counting all descriptors would also count those
/// of tests that run at the same time.
pub(super) fn open_count(identities: &[String]) -> usize {
    let mut count = 0;
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let fd = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(found) = fd.and_then(identity_of) {
            count += usize::from(identities.contains(&found));
        }
    }
    count
}

/// The other end of the socket.
pub(super) struct FrontEnd {
    pub(super) socket: UnixStream,
    received: Vec<u8>,
}

impl FrontEnd {
    /// A connected front-end and the back-end's socket.
    pub(super) fn connect() -> (Self, UnixStream) {
        let (socket, backend) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        (Self { socket, received: Vec::new() }, backend)
    }

    /// Sends some bytes and descriptors with them.
    pub(super) fn send_chunk(&self, bytes: &[u8], fds: &[OwnedFd]) {
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        let sent = sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
        assert_eq!(sent, Ok(bytes.len()));
    }

    pub(super) fn send(&self, message: &Outbound) {
        self.send_chunk(&message.bytes(), &message.fds);
    }

    /// Every whole reply that has arrived.
    pub(super) fn replies(&mut self) -> Vec<(Header, Vec<u8>)> {
        let _ = self.socket.read_to_end(&mut self.received);
        let mut replies = Vec::new();
        while let Some(header) = self.received.first_chunk::<HEADER_BYTES>().map(Header::decode) {
            let end = HEADER_BYTES + usize::try_from(header.payload_bytes).unwrap();
            if self.received.len() < end {
                break;
            }
            let mut bytes: Vec<u8> = self.received.drain(..end).collect();
            replies.push((header, bytes.split_off(HEADER_BYTES)));
        }
        replies
    }
}

/// A backend that notes its calls and does what the test has set.
pub(super) struct Mock {
    pub(super) calls: Vec<String>,
    pub(super) features: u64,
    pub(super) queues_max: u16,
    pub(super) mem_slots_max: u64,
    /// Operations that can be pending are.
    pub(super) defer: bool,
    /// The call that fails.
    pub(super) refuse: Option<&'static str>,
    /// Descriptors as a device would keep them.
    pub(super) kept: Vec<RegionDesc>,
}

impl Mock {
    pub(super) fn new() -> Self {
        Self {
            calls: Vec::new(),
            features: 1 << 32 | 1 << 29 | 1 << 28,
            queues_max: 4,
            mem_slots_max: 16,
            defer: false,
            refuse: None,
            kept: Vec::new(),
        }
    }

    /// Takes the calls noted since the last time.
    pub(super) fn take(&mut self) -> Vec<String> {
        std::mem::take(&mut self.calls)
    }

    fn note(&mut self, name: &'static str, arguments: String) -> Result<Progress, Refusal> {
        self.calls.push(format!("{name} {arguments}").trim_end().to_owned());
        if self.refuse == Some(name) {
            return Err(format!("{name} does not work today").into());
        }
        Ok(if self.defer { Progress::Pending } else { Progress::Done })
    }
}

fn kind(fd: Option<&SharedFd>) -> &'static str {
    if fd.is_some() { "fd" } else { "none" }
}

fn describe(region: &RegionDesc) -> String {
    let RegionDesc { guest_addr, len_bytes, user_addr, mmap_offset, .. } = region;
    format!("{guest_addr:x}+{len_bytes:x}@{user_addr:x}/{mmap_offset:x}")
}

impl Backend for Mock {
    fn device_features(&self) -> u64 {
        self.features
    }

    fn queues_max(&self) -> u16 {
        self.queues_max
    }

    fn mem_slots_max(&self) -> u64 {
        self.mem_slots_max
    }

    fn set_features(&mut self, acked: u64) -> Result<Progress, Refusal> {
        self.note("set_features", format!("{acked:x}"))
    }

    fn get_config(&mut self, offset: u32, out: &mut [u8]) -> Result<(), Refusal> {
        for (byte, value) in out.iter_mut().zip(offset..) {
            *byte = u8::try_from(value).unwrap();
        }
        self.note("get_config", format!("{offset}+{}", out.len())).map(drop)
    }

    fn set_config(&mut self, offset: u32, data: &[u8], migration: bool) -> Result<(), Refusal> {
        self.note("set_config", format!("{offset} {data:?} {migration}")).map(drop)
    }

    fn set_mem_table(&mut self, regions: Vec<RegionDesc>) -> Result<Progress, Refusal> {
        let text = regions.iter().map(describe).collect::<Vec<_>>().join(" ");
        let progress = self.note("set_mem_table", text)?;
        self.kept = regions;
        Ok(progress)
    }

    fn add_mem_region(&mut self, region: RegionDesc) -> Result<Progress, Refusal> {
        let progress = self.note("add_mem_region", describe(&region))?;
        self.kept.push(region);
        Ok(progress)
    }

    fn remove_mem_region(
        &mut self,
        guest_addr: GuestAddr,
        user_addr: UserAddr,
        len_bytes: u64,
    ) -> Result<Progress, Refusal> {
        let progress =
            self.note("remove_mem_region", format!("{guest_addr:x}+{len_bytes:x}@{user_addr:x}"))?;
        self.kept.retain(|region| region.guest_addr != guest_addr);
        Ok(progress)
    }

    fn start_ring(&mut self, index: u16, ring: RingStart) -> Result<(), Refusal> {
        let text = format!(
            "{index} size={} desc={:x} avail={:x} used={:x} base={} enabled={} kick={} call={} err={}",
            ring.size,
            ring.addresses.desc,
            ring.addresses.avail,
            ring.addresses.used,
            ring.base,
            ring.enabled,
            kind(ring.kick.as_ref()),
            kind(ring.call.as_ref()),
            kind(ring.err.as_ref()),
        );
        self.note("start_ring", text).map(drop)
    }

    fn set_ring_kick(&mut self, index: u16, kick: Option<SharedFd>) -> Result<(), Refusal> {
        self.note("set_ring_kick", format!("{index} {}", kind(kick.as_ref()))).map(drop)
    }

    fn set_ring_call(&mut self, index: u16, call: Option<SharedFd>) -> Result<(), Refusal> {
        self.note("set_ring_call", format!("{index} {}", kind(call.as_ref()))).map(drop)
    }

    fn set_ring_err(&mut self, index: u16, err: Option<SharedFd>) -> Result<(), Refusal> {
        self.note("set_ring_err", format!("{index} {}", kind(err.as_ref()))).map(drop)
    }

    fn enable_ring(&mut self, index: u16, enabled: bool) -> Result<Progress, Refusal> {
        self.note("enable_ring", format!("{index} {enabled}"))
    }

    fn stop_ring(&mut self, index: u16) -> Result<StopProgress, Refusal> {
        Ok(match self.note("stop_ring", index.to_string())? {
            Progress::Done => StopProgress::Done { base: 77 },
            Progress::Pending => StopProgress::Pending,
        })
    }

    fn reset_device(&mut self) -> Result<Progress, Refusal> {
        self.note("reset_device", String::new())
    }
}
