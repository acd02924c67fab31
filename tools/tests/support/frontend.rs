//! A vhost-user front-end written by hand: messages as bytes, guest memory in files, one split ring, and a load on it
//! that checks itself.
//!
//! Guest memory is reached by reads and writes of its memfd, so a test may truncate it without dying itself. Owner: the
//! test's thread. Spec: vhost-user protocol, "Message Specification"; virtio 1.2 §2.7, §5.2.6.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const SET_VRING_ENABLE: u32 = 18;
pub const SET_BACKEND_REQ_FD: u32 = 21;
pub const GET_CONFIG: u32 = 24;
pub const RESET_DEVICE: u32 = 34;
pub const ADD_MEM_REG: u32 = 37;
pub const REM_MEM_REG: u32 = 38;

pub const P_MQ: u64 = 1 << 0;
pub const P_REPLY_ACK: u64 = 1 << 3;
pub const P_BACKEND_REQ: u64 = 1 << 5;
pub const P_CONFIG: u64 = 1 << 9;
pub const P_RESET_DEVICE: u64 = 1 << 13;
pub const P_MEM_SLOTS: u64 = 1 << 15;

pub const F_FLUSH: u64 = 1 << 9;
pub const F_PROTOCOL: u64 = 1 << 30;
pub const F_VERSION_1: u64 = 1 << 32;

const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
const ANSWER_MAX: Duration = Duration::from_secs(20);

/// Bytes of a request's data.
pub const DATA_BYTES: u64 = 4096;
const DATA_SECTORS: u64 = DATA_BYTES / 512;

/// What a ring takes of its memory.
pub const RING_BYTES: u64 = 0x1_0000;

/// What separates a region's user addresses from its guest addresses.
const USER_OFFSET: u64 = 0x7000_0000_0000;

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn state(index: u32, value: u32) -> Vec<u8> {
    [index.to_ne_bytes(), value.to_ne_bytes()].concat()
}

/// SET_MEM_TABLE's payload and descriptors.
fn table<'a>(regions: &[&'a Memory]) -> (Vec<u8>, Vec<BorrowedFd<'a>>) {
    let mut payload = state(u32::try_from(regions.len()).unwrap(), 0);
    payload.extend(regions.iter().flat_map(|region| words(&region.region())));
    (payload, regions.iter().map(|region| region.file.as_fd()).collect())
}

/// A piece of guest memory.
pub struct Memory {
    pub file: File,
    pub guest: u64,
    pub len: u64,
}

impl Memory {
    pub fn new(guest: u64, len: u64) -> Memory {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
        ftruncate(&fd, len).expect("a memfd grows");
        Memory { file: File::from(fd), guest, len }
    }

    fn region(&self) -> [u64; 4] {
        [self.guest, self.len, self.guest + USER_OFFSET, 0]
    }

    /// Bytes from an offset; zeroes where the file has been cut.
    pub fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let _ = self.file.read_at(&mut bytes, at);
        bytes
    }

    /// All of it.
    pub fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.len).unwrap()];
        self.file.read_exact_at(&mut bytes, 0).expect("guest memory");
        bytes
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).expect("guest memory");
    }

    fn u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.read(at))
    }
}

/// The protocol's front-end.
pub struct FrontEnd {
    socket: UnixStream,
    protocol: u64,
}

impl FrontEnd {
    /// Connects and negotiates these features; whatever the back-end does not offer is a failure.
    pub fn connect(path: &Path, features: u64, protocol: u64) -> FrontEnd {
        let socket = UnixStream::connect(path).expect("the disk's socket");
        socket.set_read_timeout(Some(ANSWER_MAX)).expect("a socket");
        let mut front = FrontEnd { socket, protocol: 0 };
        let features = features | F_PROTOCOL | F_VERSION_1;
        let offered = front.ask(GET_FEATURES);
        assert_eq!(offered & features, features, "offered: {offered:#x}");
        let offered = front.ask(GET_PROTOCOL_FEATURES);
        assert_eq!(offered & protocol, protocol, "offered: {offered:#x}");
        front.send(SET_PROTOCOL_FEATURES, &words(&[protocol]), &[], false);
        front.protocol = protocol;
        front.tell(SET_OWNER, &[], &[]);
        front.tell(SET_FEATURES, &words(&[features]), &[]);
        front
    }

    fn send(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>], need_reply: bool) {
        let flags = if need_reply { VERSION | NEED_REPLY } else { VERSION };
        let len = u32::try_from(payload.len()).expect("a small message");
        let mut bytes = [request.to_ne_bytes(), flags.to_ne_bytes(), len.to_ne_bytes()].concat();
        bytes.extend(payload);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent =
            sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL);
        assert_eq!(sent, Ok(bytes.len()), "request {request}");
    }

    fn reply(&mut self, request: u32) -> Vec<u8> {
        let mut header = [0; 12];
        self.socket
            .read_exact(&mut header)
            .unwrap_or_else(|error| panic!("no answer to request {request}: {error}"));
        let [_, _, len] =
            [0, 4, 8].map(|at| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap()));
        assert_eq!(header[..4], request.to_ne_bytes(), "the answer to another request");
        assert_eq!(header[4..8], (VERSION | REPLY).to_ne_bytes(), "flags of an answer");
        let mut payload = vec![0; usize::try_from(len).unwrap()];
        self.socket.read_exact(&mut payload).expect("a whole answer");
        payload
    }

    fn u64_reply(&mut self, request: u32) -> u64 {
        let payload = self.reply(request);
        u64::from_ne_bytes(payload.try_into().unwrap_or_else(|p| panic!("{request}: {p:?}")))
    }

    /// A request whose answer is one number.
    pub fn ask(&mut self, request: u32) -> u64 {
        self.send(request, &[], &[], false);
        self.u64_reply(request)
    }

    /// A request without an answer of its own, done when this returns; the acknowledgement must be 0.
    pub fn tell(&mut self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        if self.protocol & P_REPLY_ACK != 0 {
            self.send(request, payload, fds, true);
            assert_eq!(self.u64_reply(request), 0, "request {request} was refused");
        } else {
            // Messages are handled in order: another answer says that this one is done.
            self.send(request, payload, fds, false);
            self.ask(GET_FEATURES);
        }
    }

    /// The whole table at once.
    pub fn set_memory(&mut self, regions: &[&Memory]) {
        let (payload, fds) = table(regions);
        self.tell(SET_MEM_TABLE, &payload, &fds);
    }

    /// The same, and what the back-end says to it.
    pub fn set_memory_answer(&mut self, regions: &[&Memory]) -> u64 {
        let (payload, fds) = table(regions);
        self.send(SET_MEM_TABLE, &payload, &fds, true);
        self.u64_reply(SET_MEM_TABLE)
    }

    pub fn add_memory(&mut self, region: &Memory) {
        self.send_add_memory(region);
        self.added();
    }

    /// The same, and what the back-end says to it.
    pub fn add_memory_answer(&mut self, region: &Memory) -> u64 {
        self.send_add_memory(region);
        self.u64_reply(ADD_MEM_REG)
    }

    /// Waits until the region that was sent is there.
    pub fn added(&mut self) {
        assert_eq!(self.u64_reply(ADD_MEM_REG), 0, "the region was refused");
    }

    /// The same without waiting for the answer.
    pub fn send_add_memory(&mut self, region: &Memory) {
        let payload = words(&[&[0], &region.region()[..]].concat());
        self.send(ADD_MEM_REG, &payload, &[region.file.as_fd()], true);
    }

    pub fn remove_memory(&mut self, region: &Memory) {
        self.tell(REM_MEM_REG, &words(&[&[0], &region.region()[..]].concat()), &[]);
    }

    /// The device's size as its configuration says.
    pub fn capacity_sectors(&mut self) -> u64 {
        let mut payload =
            [0_u32, 60, 0].iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
        payload.extend([0; 60]);
        self.send(GET_CONFIG, &payload, &[], false);
        let reply = self.reply(GET_CONFIG);
        assert_eq!(reply.len(), payload.len());
        u64::from_le_bytes(reply[12..20].try_into().unwrap())
    }

    /// Starts a ring at an index and waits until that is done.
    pub fn start(&mut self, ring: &Ring, base: u16) {
        self.prepare(ring, base);
        self.tell(SET_VRING_KICK, &words(&[u64::from(ring.index)]), &[ring.kick.as_fd()]);
        self.enable(ring, true);
    }

    /// Starts a ring without waiting for an answer.
    pub fn start_blindly(&mut self, ring: &Ring, base: u16) {
        self.prepare(ring, base);
        self.send(SET_VRING_KICK, &words(&[u64::from(ring.index)]), &[ring.kick.as_fd()], false);
    }

    /// The same, and enables it.
    pub fn send_start(&mut self, ring: &Ring, base: u16) {
        self.start_blindly(ring, base);
        self.send(SET_VRING_ENABLE, &state(ring.index, 1), &[], false);
    }

    fn prepare(&mut self, ring: &Ring, base: u16) {
        let index = ring.index;
        let user = ring.memory_guest + USER_OFFSET;
        self.tell(SET_VRING_NUM, &state(index, u32::from(ring.size)), &[]);
        self.tell(SET_VRING_BASE, &state(index, u32::from(base)), &[]);
        let mut payload = state(index, 0);
        payload.extend(words(&[user + ring.desc, user + ring.used, user + ring.avail, 0]));
        self.tell(SET_VRING_ADDR, &payload, &[]);
        self.tell(SET_VRING_CALL, &words(&[u64::from(index)]), &[ring.call.as_fd()]);
    }

    /// Gives a running ring other descriptors for kicks and interrupts.
    pub fn renew(&mut self, ring: &mut Ring) {
        let event =
            || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
        (ring.kick, ring.call) = (event(), event());
        let index = words(&[u64::from(ring.index)]);
        self.tell(SET_VRING_CALL, &index, &[ring.call.as_fd()]);
        self.tell(SET_VRING_KICK, &index, &[ring.kick.as_fd()]);
    }

    pub fn enable(&mut self, ring: &Ring, enabled: bool) {
        self.tell(SET_VRING_ENABLE, &state(ring.index, u32::from(enabled)), &[]);
    }

    /// Stops a ring; the next index that it would have taken.
    pub fn stop(&mut self, ring: &Ring) -> u16 {
        self.send(GET_VRING_BASE, &state(ring.index, 0), &[], false);
        let reply = self.reply(GET_VRING_BASE);
        assert_eq!(reply[..4], ring.index.to_ne_bytes());
        u16::try_from(u32::from_ne_bytes(reply[4..].try_into().unwrap())).expect("a 16-bit base")
    }

    /// Gives the back-end a way to send requests; the other end.
    pub fn backend_channel(&mut self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        ours.set_read_timeout(Some(ANSWER_MAX)).expect("a socket");
        self.tell(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
        ours
    }

    /// Whether the back-end has hung up, within a time.
    pub fn is_sent_away(&mut self, limit: Duration) -> bool {
        self.socket.set_read_timeout(Some(limit)).expect("a socket");
        let mut byte = [0; 1];
        let outcome = self.socket.read(&mut byte);
        outcome.is_ok_and(|count| count == 0) || UnixStream::peer_addr(&self.socket).is_err()
    }
}

/// A split ring of requests with one data buffer each: three descriptors per slot.
pub struct Ring {
    index: u32,
    size: u16,
    memory_guest: u64,
    desc: u64,
    avail: u64,
    used: u64,
    headers: u64,
    kick: OwnedFd,
    call: OwnedFd,
    pub avail_index: u16,
    pub used_index: u16,
}

impl Ring {
    /// In its [`RING_BYTES`] of the memory, fresh.
    pub fn new(memory: &Memory, index: u32, slots: u16) -> Ring {
        let event =
            || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
        let at = u64::from(index) * RING_BYTES;
        let ring = Ring {
            index,
            size: (slots * 3).next_power_of_two(),
            memory_guest: memory.guest,
            desc: at,
            avail: at + 0x4000,
            used: at + 0x8000,
            headers: at + 0xc000,
            kick: event(),
            call: event(),
            avail_index: 0,
            used_index: 0,
        };
        memory.write(at, &[0; 0x1_0000]);
        ring
    }

    fn descriptor(&self, memory: &Memory, index: u64, addr: u64, len: u32, flags: u16, next: u64) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(u16::try_from(next).unwrap().to_le_bytes());
        memory.write(self.desc + index * 16, &bytes);
    }

    /// Makes a request available: a read into or a write from `data` (a guest address).
    pub fn submit(&mut self, memory: &Memory, slot: u16, write: bool, sector: u64, data: u64) {
        const NEXT: u16 = 1;
        const WRITE: u16 = 2;
        let header = self.headers + u64::from(slot) * 32;
        memory.write(header, &words(&[u64::from(write), sector, 0xff]));
        let first = u64::from(slot) * 3;
        let guest = memory.guest + header;
        let for_device = if write { NEXT } else { NEXT | WRITE };
        self.descriptor(memory, first, guest, 16, NEXT, first + 1);
        self.descriptor(memory, first + 1, data, 4096, for_device, first + 2);
        self.descriptor(memory, first + 2, guest + 16, 1, WRITE, 0);
        let entry = self.avail + 4 + u64::from(self.avail_index % self.size) * 2;
        memory.write(entry, &u16::try_from(first).unwrap().to_le_bytes());
        self.avail_index = self.avail_index.wrapping_add(1);
        memory.write(self.avail + 2, &self.avail_index.to_le_bytes());
    }

    /// Kicks unless the device does not want it (virtio 1.2 §2.7.10: VIRTQ_USED_F_NO_NOTIFY).
    pub fn kick(&self, memory: &Memory) {
        if memory.u16(self.used) & 1 == 0 {
            self.kick_always();
        }
    }

    pub fn kick_always(&self) {
        let _ = rustix::io::write(&self.kick, &1_u64.to_ne_bytes());
    }

    /// Sleeps until the device interrupts; false when it has not by then.
    pub fn wait_call(&self, limit: Duration) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let limit = Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap(),
            tv_nsec: i64::from(limit.subsec_nanos()),
        };
        let ready = poll(&mut [PollFd::new(&self.call, PollFlags::IN)], Some(&limit));
        let mut count = [0; 8];
        ready.is_ok_and(|n| n > 0) && rustix::io::read(&self.call, &mut count).is_ok()
    }

    /// Fills the interrupt's descriptor to the brim: the next signal cannot end until it is read.
    pub fn block_call(&self) {
        while self.wait_call(Duration::ZERO) {}
        rustix::io::write(&self.call, &(u64::MAX - 1).to_ne_bytes()).expect("an empty counter");
    }

    /// One request while no other is out; its status. See [`Ring::submit`].
    pub fn one(&mut self, memory: &Memory, write: bool, sector: u64, data: u64) -> u8 {
        self.submit(memory, 0, write, sector, data);
        self.kick_always();
        let start = Instant::now();
        loop {
            match self.completions(memory)[..] {
                [] => assert!(start.elapsed() < ANSWER_MAX, "sector {sector}: no answer"),
                [(0, status)] => return status,
                ref others => panic!("{others:?} instead of one answer"),
            }
            std::thread::yield_now();
        }
    }

    /// What the device has used: slots and status bytes.
    pub fn completions(&mut self, memory: &Memory) -> Vec<(u16, u8)> {
        let end = memory.u16(self.used + 2);
        let mut done = Vec::new();
        while self.used_index != end {
            let at = self.used + 4 + u64::from(self.used_index % self.size) * 8;
            let head = u32::from_le_bytes(memory.read(at));
            assert_eq!(head % 3, 0, "used index {}: no head of ours", self.used_index);
            let slot = u16::try_from(head / 3).expect("a head of ours");
            let [status] = memory.read(self.headers + u64::from(slot) * 32 + 16);
            done.push((slot, status));
            self.used_index = self.used_index.wrapping_add(1);
        }
        done
    }
}

/// A front-end with a running ring, whose slots have their data in a memory of their own, which is returned, too.
pub fn running(
    socket: &Path,
    protocol: u64,
    slots: u16,
    data_guest: u64,
) -> (FrontEnd, Load, Memory) {
    let data = Memory::new(data_guest, u64::from(slots) * DATA_BYTES);
    let (front, load) = running_in(socket, protocol, slots, &data);
    (front, load, data)
}

/// The same with memory that the test has made.
pub fn running_in(socket: &Path, protocol: u64, slots: u16, data: &Memory) -> (FrontEnd, Load) {
    let mut front = FrontEnd::connect(socket, F_FLUSH, protocol);
    let rings = Memory::new(0, 4 * RING_BYTES);
    front.add_memory(&rings);
    front.add_memory(data);
    let load = Load::new(rings, 0, slots, data.guest);
    front.start(&load.ring, 0);
    (front, load)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Idle,
    Writing(u64),
    Written(u64),
    Reading(u64),
}

/// A load of which each slot writes a block and reads it back, over and over, in a place of its own.
pub struct Load {
    pub ring: Ring,
    pub memory: Memory,
    /// Where the slots' data lies; changed between steps only.
    pub data_guest: u64,
    steps: Vec<(Step, u64)>,
    number: u64,
    pub completed_count: u64,
    pub failed_count: u64,
    pub tolerates_errors: bool,
    last_answer: Instant,
}

impl Load {
    /// `slots` requests in flight; rings in `memory`, data where `data_guest` says.
    pub fn new(memory: Memory, index: u32, slots: u16, data_guest: u64) -> Load {
        Load {
            ring: Ring::new(&memory, index, slots),
            memory,
            data_guest,
            steps: vec![(Step::Idle, 0); usize::from(slots)],
            number: 0,
            completed_count: 0,
            failed_count: 0,
            tolerates_errors: false,
            last_answer: Instant::now(),
        }
    }

    fn sector(&self, slot: u16) -> u64 {
        (u64::from(self.ring.index) * 256 + u64::from(slot)) * DATA_SECTORS
    }

    pub fn inflight_count(&self) -> usize {
        let busy = |(step, _): &&(Step, u64)| matches!(step, Step::Writing(_) | Step::Reading(_));
        self.steps.iter().filter(busy).count()
    }

    /// Puts every idle slot to work with its data in `data`.
    pub fn submit(&mut self, data: &Memory) {
        for slot in 0..u16::try_from(self.steps.len()).unwrap() {
            let at = u64::from(slot) * DATA_BYTES;
            let (step, _) = self.steps[usize::from(slot)];
            let (write, next) = match step {
                Step::Idle => {
                    self.number += 1;
                    data.write(at, &words(&[self.number; 512]));
                    (true, Step::Writing(self.number))
                }
                Step::Written(number) => {
                    data.write(at, &[0xee; 4096]);
                    (false, Step::Reading(number))
                }
                _ => continue,
            };
            self.steps[usize::from(slot)] = (next, data.guest);
            let sector = self.sector(slot);
            self.ring.submit(&self.memory, slot, write, sector, data.guest + at);
        }
        self.ring.kick(&self.memory);
    }

    /// Takes completions and checks what was read; `datas` are the memories that requests in flight may use.
    pub fn poll(&mut self, datas: &[&Memory]) -> usize {
        let done = self.ring.completions(&self.memory);
        if !done.is_empty() || self.inflight_count() == 0 {
            self.last_answer = Instant::now();
        }
        assert!(self.last_answer.elapsed() < ANSWER_MAX, "no answers: {:?}", self.steps);
        for &(slot, status) in &done {
            self.completed_count += 1;
            let (step, guest) = self.steps[usize::from(slot)];
            let next = match (step, status) {
                (Step::Writing(_) | Step::Reading(_), 1..) => {
                    assert!(self.tolerates_errors, "slot {slot}: {step:?} failed with {status}");
                    self.failed_count += 1;
                    Step::Idle
                }
                (Step::Writing(number), _) => Step::Written(number),
                (Step::Reading(number), _) => {
                    let data = datas.iter().find(|data| data.guest == guest).expect("its memory");
                    let got = data.read::<4096>(u64::from(slot) * DATA_BYTES);
                    assert_eq!(got.to_vec(), words(&[number; 512]), "slot {slot}, write {number}");
                    Step::Idle
                }
                _ => panic!("slot {slot} completed, but it is {step:?}"),
            };
            self.steps[usize::from(slot)].0 = next;
        }
        if done.is_empty() {
            std::thread::yield_now();
        }
        done.len()
    }

    /// Works for a number of completions.
    pub fn run(&mut self, data: &Memory, completions: u64) {
        let end = self.completed_count + completions;
        while self.completed_count < end {
            self.submit(data);
            self.poll(&[data]);
        }
    }

    /// The same while requests in flight may still use other memories.
    pub fn run_with(&mut self, data: &Memory, datas: &[&Memory], completions: u64) {
        let end = self.completed_count + completions;
        while self.completed_count < end {
            self.submit(data);
            self.poll(datas);
        }
    }

    /// Requests in flight with data in the memory at this address.
    pub fn uses(&self, guest: u64) -> usize {
        let busy = |(step, at): &&(Step, u64)| {
            *at == guest && matches!(step, Step::Writing(_) | Step::Reading(_))
        };
        self.steps.iter().filter(busy).count()
    }

    /// Waits for what is in flight.
    pub fn drain(&mut self, datas: &[&Memory]) {
        while self.inflight_count() > 0 {
            self.poll(datas);
        }
    }
}
