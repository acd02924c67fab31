//! The front-end's side of vhost-user: what a VMM says to set up a disk, and nothing more.
//!
//! Flow: connect → features → protocol features → configuration space → memory → rings. Owner: the load's thread, before
//! the load starts. Every answer is waited for at most [`ANSWER_MAX`].
//!
//! Spec: vhost-user protocol, "Communication", "Front-end message types".

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use ringmill_core::limits::SECTOR_BYTES;
use ringmill_core::spec::{virtio_blk, virtio_ring};
use ringmill_vmm_glue::vhost_user::message::{
    ConfigSpace, HEADER_BYTES, Header, MemoryRegion, PAYLOAD_BYTES_MAX, Request, VringAddr,
    VringFd, VringState, decode_u64, protocol_feature as protocol, virtio_feature,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::PerfError;
use super::layout::RingForm;

/// The longest wait for an answer. A server may have to drain another session first.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// Bytes of "Virtio device config space" before the bytes themselves.
const CONFIG_HEAD_BYTES: usize = 12;

/// What the disk says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DiskFacts {
    /// 0: the server has no configuration space to read.
    pub(crate) capacity_bytes: u64,
    pub(crate) block_bytes: u32,
    /// Queues that it offers.
    pub(crate) queues_count: u16,
    pub(crate) read_only: bool,
    pub(crate) flush: bool,
}

/// Where a ring lies, as the protocol names it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingPlace {
    pub(crate) size: u16,
    pub(crate) packed: bool,
    /// User addresses of descriptors, driver area and device area.
    pub(crate) desc: u64,
    pub(crate) driver: u64,
    pub(crate) device: u64,
}

/// A connection to one disk.
#[derive(Debug)]
pub(crate) struct Frontend {
    socket: UnixStream,
    path: String,
    protocol: u64,
    features: u64,
    facts: DiskFacts,
    started_count: u32,
}

impl Frontend {
    /// Connects and agrees on features; `form` is what the load needs.
    pub(crate) fn connect(path: &Path, form: RingForm) -> Result<Frontend, PerfError> {
        let name = path.display().to_string();
        let connect = || {
            let socket = UnixStream::connect(path)?;
            socket.set_read_timeout(Some(ANSWER_MAX))?;
            socket.set_write_timeout(Some(ANSWER_MAX))?;
            Ok(socket)
        };
        let socket =
            connect().map_err(|source| PerfError::Connect { socket: name.clone(), source })?;
        let mut frontend = Frontend {
            socket,
            path: name,
            protocol: 0,
            features: 0,
            facts: DiskFacts::default(),
            started_count: 0,
        };
        frontend.negotiate(form)?;
        Ok(frontend)
    }

    fn negotiate(&mut self, form: RingForm) -> Result<(), PerfError> {
        let offered = self.ask_u64(Request::GetFeatures)?;
        if offered & virtio_feature::PROTOCOL_FEATURES != 0 {
            let wanted = protocol::MQ
                | protocol::CONFIG
                | protocol::REPLY_ACK
                | protocol::CONFIGURE_MEM_SLOTS;
            let known = self.ask_u64(Request::GetProtocolFeatures)? & wanted;
            self.tell(Request::SetProtocolFeatures, &known.to_ne_bytes(), &[])?;
            self.protocol = known;
        }
        self.tell(Request::SetOwner, &[], &[])?;
        let mut needed = virtio_ring::F_VERSION_1;
        if form.packed {
            needed |= virtio_ring::F_RING_PACKED;
        }
        if form.indirect {
            needed |= virtio_ring::F_INDIRECT_DESC;
        }
        for (bit, what) in [
            (virtio_ring::F_VERSION_1, "virtio 1.0"),
            (virtio_ring::F_RING_PACKED, "packed rings; leave --packed out"),
            (virtio_ring::F_INDIRECT_DESC, "indirect descriptors; leave --indirect out"),
        ] {
            if needed & bit != 0 && offered & bit == 0 {
                return Err(self.refused(format!("the server does not offer {what}")));
            }
        }
        // No EVENT_IDX: with it, interrupts could not be switched off altogether.
        let wanted = virtio_feature::PROTOCOL_FEATURES
            | virtio_blk::F_MQ
            | virtio_blk::F_BLK_SIZE
            | virtio_blk::F_FLUSH
            | virtio_blk::F_RO;
        self.features = needed | (offered & wanted);
        self.tell(Request::SetFeatures, &self.features.to_ne_bytes(), &[])?;
        self.read_facts()
    }

    fn read_facts(&mut self) -> Result<(), PerfError> {
        let has = |features: u64, bit: u64| features & bit != 0;
        self.facts = DiskFacts {
            block_bytes: SECTOR_BYTES,
            queues_count: 1,
            read_only: has(self.features, virtio_blk::F_RO),
            flush: has(self.features, virtio_blk::F_FLUSH),
            ..DiskFacts::default()
        };
        if has(self.protocol, protocol::CONFIG) {
            let config = self.config()?;
            let word = |at: usize| config[at..at + 4].try_into().map_or(0, u32::from_le_bytes);
            let sectors = u64::from(word(0)) | u64::from(word(4)) << 32;
            self.facts.capacity_bytes = sectors.saturating_mul(u64::from(SECTOR_BYTES));
            if has(self.features, virtio_blk::F_BLK_SIZE) {
                self.facts.block_bytes = word(20).max(SECTOR_BYTES);
            }
            if has(self.features, virtio_blk::F_MQ) {
                self.facts.queues_count = u16::from_le_bytes([config[34], config[35]]);
            }
        }
        if has(self.protocol, protocol::MQ) {
            let rings = self.ask_u64(Request::GetQueueNum)?;
            let rings = u16::try_from(rings).unwrap_or(u16::MAX);
            self.facts.queues_count = self.facts.queues_count.min(rings);
        }
        Ok(())
    }

    fn config(&mut self) -> Result<[u8; virtio_blk::CONFIG_BYTES], PerfError> {
        let mut payload = [0u8; CONFIG_HEAD_BYTES + virtio_blk::CONFIG_BYTES];
        let size = u32::try_from(virtio_blk::CONFIG_BYTES).unwrap_or(0);
        payload[4..8].copy_from_slice(&size.to_ne_bytes());
        let answer = self.ask(Request::GetConfig, &payload)?;
        let bytes = answer.get(CONFIG_HEAD_BYTES..).and_then(|bytes| bytes.try_into().ok());
        bytes.ok_or_else(|| {
            let reason = format!("the answer to GET_CONFIG has {} bytes of payload", answer.len());
            self.refused(reason)
        })
    }

    /// What the disk says of itself.
    pub(crate) fn facts(&self) -> DiskFacts {
        self.facts
    }

    /// The socket, for messages.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    fn refused(&self, reason: String) -> PerfError {
        PerfError::Refused { socket: self.path.clone(), reason }
    }

    /// Shows a part of a memory file to the server: by SET_MEM_TABLE, which every server has, or if it refuses that by
    /// ADD_MEM_REG.
    pub(crate) fn share(
        &mut self,
        file: BorrowedFd<'_>,
        region: &MemoryRegion,
    ) -> Result<(), PerfError> {
        let table = MemoryRegion::encode_table(std::slice::from_ref(region));
        match self.tell(Request::SetMemTable, &table, &[file]) {
            Err(PerfError::Refused { .. })
                if self.protocol & protocol::CONFIGURE_MEM_SLOTS != 0 =>
            {
                self.tell(Request::AddMemReg, &region.encode_single(), &[file])
            }
            answer => answer,
        }
    }

    /// Starts the next ring, empty.
    pub(crate) fn start_ring(
        &mut self,
        place: &RingPlace,
        kick: BorrowedFd<'_>,
        call: BorrowedFd<'_>,
    ) -> Result<(), PerfError> {
        let index = self.started_count;
        let state = |value: u32| VringState { index, value }.encode();
        // A packed ring starts at place 0 in its first lap, both for available and for used entries.
        let base = if place.packed { 0x8000_8000 } else { 0 };
        self.tell(Request::SetVringNum, &state(u32::from(place.size)), &[])?;
        self.tell(Request::SetVringBase, &state(base), &[])?;
        let addr = VringAddr {
            index,
            flags: 0,
            desc_addr: place.desc,
            used_addr: place.device,
            avail_addr: place.driver,
            log_addr: 0,
        };
        self.tell(Request::SetVringAddr, &addr.encode(), &[])?;
        let with_fd = VringFd { index, no_fd: false, reserved_set: false }.encode();
        // Some servers start a ring only when both are there; nothing ever waits on the call descriptor.
        self.tell(Request::SetVringCall, &with_fd, &[call])?;
        self.tell(Request::SetVringKick, &with_fd, &[kick])?;
        if self.features & virtio_feature::PROTOCOL_FEATURES != 0 {
            self.tell(Request::SetVringEnable, &state(1), &[])?;
        }
        self.started_count += 1;
        // Without REPLY_ACK this answer is the proof that all of the above was taken.
        if self.protocol & protocol::REPLY_ACK == 0 {
            self.ask_u64(Request::GetFeatures)?;
        }
        Ok(())
    }

    /// Stops all rings; when this returns, the server has let go of them.
    pub(crate) fn stop_rings(&mut self) -> Result<(), PerfError> {
        for index in 0..std::mem::take(&mut self.started_count) {
            self.ask(Request::GetVringBase, &VringState { index, value: 0 }.encode())?;
        }
        Ok(())
    }

    /// True when the server has hung up.
    pub(crate) fn is_closed(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let gone = PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR;
        poll(&mut fds, Some(&Timespec::default())).is_ok() && fds[0].revents().intersects(gone)
    }

    fn exchange_failed(&self, request: Request, source: io::Error) -> PerfError {
        let source = match source.kind() {
            io::ErrorKind::WouldBlock => {
                io::Error::other(format!("no answer within {} s", ANSWER_MAX.as_secs()))
            }
            io::ErrorKind::UnexpectedEof => io::Error::other("the server closed the connection"),
            _ => source,
        };
        PerfError::Exchange { socket: self.path.clone(), request: request.to_string(), source }
    }

    /// A request without an answer of its own; waits for the acknowledgement where that was agreed on.
    fn tell(
        &mut self,
        request: Request,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), PerfError> {
        let acked = self.protocol & protocol::REPLY_ACK != 0;
        self.send(request, payload, fds, acked)?;
        if !acked {
            return Ok(());
        }
        match decode_u64(&self.receive(request)?) {
            Some(0) => Ok(()),
            _ => Err(self.refused(format!("the server refuses {request}"))),
        }
    }

    fn ask(&mut self, request: Request, payload: &[u8]) -> Result<Vec<u8>, PerfError> {
        self.send(request, payload, &[], false)?;
        self.receive(request)
    }

    fn ask_u64(&mut self, request: Request) -> Result<u64, PerfError> {
        let answer = self.ask(request, &[])?;
        decode_u64(&answer).ok_or_else(|| {
            self.refused(format!("the answer to {request} has {} bytes, not 8", answer.len()))
        })
    }

    fn send(
        &mut self,
        request: Request,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        need_reply: bool,
    ) -> Result<(), PerfError> {
        let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
        Header::request(request.number(), need_reply, len).encode_into(&mut bytes);
        bytes.extend_from_slice(payload);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let sent = sendmsg(
            self.socket.as_fd(),
            &[IoSlice::new(&bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        );
        match sent {
            Ok(count) if count == bytes.len() => Ok(()),
            Ok(_) => Err(self.exchange_failed(request, io::Error::other("sent in part"))),
            Err(errno) => Err(self.exchange_failed(request, errno.into())),
        }
    }

    fn receive(&mut self, request: Request) -> Result<Vec<u8>, PerfError> {
        let mut head = [0u8; HEADER_BYTES];
        self.socket.read_exact(&mut head).map_err(|e| self.exchange_failed(request, e))?;
        let header = Header::decode(&head);
        let len = usize::try_from(header.payload_bytes).unwrap_or(usize::MAX);
        if header.request != request.number() || !header.is_reply() || len > PAYLOAD_BYTES_MAX {
            let what = format!("an answer to request {} of {len} bytes came", header.request);
            return Err(self.exchange_failed(request, io::Error::other(what)));
        }
        let mut payload = vec![0; len];
        self.socket.read_exact(&mut payload).map_err(|e| self.exchange_failed(request, e))?;
        Ok(payload)
    }
}

// The head of a configuration message as the codec knows it.
const _: () = assert!(size_of::<ConfigSpace>() == CONFIG_HEAD_BYTES);
