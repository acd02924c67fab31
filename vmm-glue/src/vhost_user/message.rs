//! The messages of the vhost-user protocol as inert values, and their bytes.
//!
//! In: byte slices that a peer wrote. Out: plain structs, or `None` when the size is wrong; whether the values make
//! sense is decided where they are used. Owner: any thread; there is no state.
//!
//! **Invariant:** decoding reads every byte exactly once, accepts exactly one size per fixed layout, and never panics.
//! Numbers are in the host's byte order, as the protocol demands of both ends.
//!
//! Spec: vhost-user protocol, "Message Specification", "Protocol features", "Front-end message types".

use std::fmt;

/// Bytes of a message header: request, flags, payload size.
pub const HEADER_BYTES: usize = 12;

/// The largest payload that is received. The largest one that this back-end understands is GET_CONFIG's (268 bytes);
/// the rest is room to refuse an unsupported request politely instead of dropping the connection.
pub const PAYLOAD_BYTES_MAX: usize = 4096;

/// File descriptors that one message may carry. SET_MEM_TABLE needs eight.
pub const FDS_MAX: usize = 32;

/// Regions in one SET_MEM_TABLE ("Memory region description": VHOST_MEMORY_BASELINE_NREGIONS).
pub const TABLE_REGIONS_MAX: usize = 8;

/// Bytes of the virtio configuration space that can be addressed (VHOST_USER_MAX_CONFIG_SIZE in QEMU).
pub const CONFIG_BYTES_MAX: u32 = 256;

/// Rings that the vring index of a "vring descriptor index" payload can name: it has eight bits.
pub const RINGS_MAX: u16 = 256;

/// Virtio feature bits with a meaning for the protocol itself.
pub mod virtio_feature {
    /// VHOST_F_LOG_ALL: writes to guest memory are logged for migration.
    pub const LOG_ALL: u64 = 1 << 26;
    /// VHOST_USER_F_PROTOCOL_FEATURES: the protocol features below can be negotiated.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// VIRTIO_F_RING_PACKED: packed virtqueues (virtio 1.2 §2.8).
    pub const RING_PACKED: u64 = 1 << 34;
}

/// Protocol feature bits ("Protocol features").
pub mod protocol_feature {
    /// GET_QUEUE_NUM and more rings than the device type needs.
    pub const MQ: u64 = 1 << 0;
    /// The dirty log arrives as shared memory.
    pub const LOG_SHMFD: u64 = 1 << 1;
    /// `need_reply` is honoured for messages without a reply of their own.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// SET_BACKEND_REQ_FD: the back-end may send requests.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// GET_CONFIG and SET_CONFIG.
    pub const CONFIG: u64 = 1 << 9;
    /// GET_INFLIGHT_FD and SET_INFLIGHT_FD.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// RESET_DEVICE.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// Kicks and calls as messages.
    pub const INBAND_NOTIFICATIONS: u64 = 1 << 14;
    /// GET_MAX_MEM_SLOTS, ADD_MEM_REG and REM_MEM_REG.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// SET_STATUS and GET_STATUS.
    pub const STATUS: u64 = 1 << 16;
    /// SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE.
    pub const DEVICE_STATE: u64 = 1 << 19;
}

macro_rules! requests {
    ($($variant:ident = $number:literal $name:literal),+ $(,)?) => {
        /// What a front-end can ask for ("Front-end message types"), supported or not, so that errors can name it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[expect(missing_docs, reason = "each variant is the specification's name of one message")]
        pub enum Request { $($variant = $number),+ }

        impl Request {
            /// The request with this number, if the protocol defines one.
            pub fn from_number(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)+ _ => None }
            }

            /// The request's number on the wire.
            pub fn number(self) -> u32 {
                match self { $(Self::$variant => $number),+ }
            }
        }

        impl fmt::Display for Request {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $name),+ })
            }
        }
    };
}

requests! {
    GetFeatures = 1 "GET_FEATURES",
    SetFeatures = 2 "SET_FEATURES",
    SetOwner = 3 "SET_OWNER",
    ResetOwner = 4 "RESET_OWNER",
    SetMemTable = 5 "SET_MEM_TABLE",
    SetLogBase = 6 "SET_LOG_BASE",
    SetLogFd = 7 "SET_LOG_FD",
    SetVringNum = 8 "SET_VRING_NUM",
    SetVringAddr = 9 "SET_VRING_ADDR",
    SetVringBase = 10 "SET_VRING_BASE",
    GetVringBase = 11 "GET_VRING_BASE",
    SetVringKick = 12 "SET_VRING_KICK",
    SetVringCall = 13 "SET_VRING_CALL",
    SetVringErr = 14 "SET_VRING_ERR",
    GetProtocolFeatures = 15 "GET_PROTOCOL_FEATURES",
    SetProtocolFeatures = 16 "SET_PROTOCOL_FEATURES",
    GetQueueNum = 17 "GET_QUEUE_NUM",
    SetVringEnable = 18 "SET_VRING_ENABLE",
    SendRarp = 19 "SEND_RARP",
    NetSetMtu = 20 "NET_SET_MTU",
    SetBackendReqFd = 21 "SET_BACKEND_REQ_FD",
    IotlbMsg = 22 "IOTLB_MSG",
    SetVringEndian = 23 "SET_VRING_ENDIAN",
    GetConfig = 24 "GET_CONFIG",
    SetConfig = 25 "SET_CONFIG",
    CreateCryptoSession = 26 "CREATE_CRYPTO_SESSION",
    CloseCryptoSession = 27 "CLOSE_CRYPTO_SESSION",
    PostcopyAdvise = 28 "POSTCOPY_ADVISE",
    PostcopyListen = 29 "POSTCOPY_LISTEN",
    PostcopyEnd = 30 "POSTCOPY_END",
    GetInflightFd = 31 "GET_INFLIGHT_FD",
    SetInflightFd = 32 "SET_INFLIGHT_FD",
    GpuSetSocket = 33 "GPU_SET_SOCKET",
    ResetDevice = 34 "RESET_DEVICE",
    VringKick = 35 "VRING_KICK",
    GetMaxMemSlots = 36 "GET_MAX_MEM_SLOTS",
    AddMemReg = 37 "ADD_MEM_REG",
    RemMemReg = 38 "REM_MEM_REG",
    SetStatus = 39 "SET_STATUS",
    GetStatus = 40 "GET_STATUS",
    GetSharedObject = 41 "GET_SHARED_OBJECT",
    SetDeviceStateFd = 42 "SET_DEVICE_STATE_FD",
    CheckDeviceState = 43 "CHECK_DEVICE_STATE",
    GetShmemConfig = 44 "GET_SHMEM_CONFIG",
}

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG ("Back-end message types").
pub const BACKEND_CONFIG_CHANGE: u32 = 2;

/// The first 12 bytes of every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The request's number; a reply repeats it. Unknown numbers are kept for the error message.
    pub request: u32,
    /// Protocol version (bits 0–1), reply (bit 2), need_reply (bit 3). The other bits are reserved.
    pub flags: u32,
    /// Bytes of payload that follow.
    pub payload_bytes: u32,
}

impl Header {
    const VERSION_MASK: u32 = 0x3;
    const VERSION: u32 = 0x1;
    const REPLY: u32 = 0x4;
    const NEED_REPLY: u32 = 0x8;

    /// A request with `payload_bytes` of payload.
    pub fn request(request: u32, need_reply: bool, payload_bytes: u32) -> Self {
        let flags = if need_reply { Self::VERSION | Self::NEED_REPLY } else { Self::VERSION };
        Self { request, flags, payload_bytes }
    }

    /// The reply to `request`. QEMU compares the flags for equality, so nothing but version and reply may be set.
    pub fn reply(request: u32, payload_bytes: u32) -> Self {
        Self { request, flags: Self::VERSION | Self::REPLY, payload_bytes }
    }

    /// The protocol version; only 1 exists.
    pub fn version(&self) -> u32 {
        self.flags & Self::VERSION_MASK
    }

    /// Whether the version is the one that this code speaks.
    pub fn version_is_known(&self) -> bool {
        self.version() == Self::VERSION
    }

    /// Whether this is a reply.
    pub fn is_reply(&self) -> bool {
        self.flags & Self::REPLY != 0
    }

    /// Whether the sender waits for an acknowledgement (REPLY_ACK).
    pub fn needs_reply(&self) -> bool {
        self.flags & Self::NEED_REPLY != 0
    }

    /// Decodes a whole header.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let [r0, r1, r2, r3, f0, f1, f2, f3, s0, s1, s2, s3] = *bytes;
        Self {
            request: u32::from_ne_bytes([r0, r1, r2, r3]),
            flags: u32::from_ne_bytes([f0, f1, f2, f3]),
            payload_bytes: u32::from_ne_bytes([s0, s1, s2, s3]),
        }
    }

    /// Appends the header's bytes.
    pub fn encode_into(&self, bytes: &mut Vec<u8>) {
        for field in [self.request, self.flags, self.payload_bytes] {
            bytes.extend_from_slice(&field.to_ne_bytes());
        }
    }
}

/// Reads fixed-size fields off the front of a payload.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn u32(&mut self) -> Option<u32> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_ne_bytes(*field))
    }

    fn u64(&mut self) -> Option<u64> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_ne_bytes(*field))
    }

    fn end(self) -> Option<()> {
        self.0.is_empty().then_some(())
    }

    fn rest(self) -> &'a [u8] {
        self.0
    }
}

/// Decodes a payload of one 64-bit number.
pub fn decode_u64(payload: &[u8]) -> Option<u64> {
    payload.try_into().ok().map(u64::from_ne_bytes)
}

/// "A vring state description": a ring and one number about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringState {
    /// The ring.
    pub index: u32,
    /// Its size, base or enabled flag.
    pub value: u32,
}

impl VringState {
    /// Decodes the payload; `None` when its size is wrong.
    pub fn decode(payload: &[u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        let state = Self { index: fields.u32()?, value: fields.u32()? };
        fields.end()?;
        Some(state)
    }

    /// The payload's bytes.
    pub fn encode(&self) -> Vec<u8> {
        [self.index.to_ne_bytes(), self.value.to_ne_bytes()].concat()
    }
}

/// "A vring address description". The addresses are the front-end's virtual ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringAddr {
    /// The ring.
    pub index: u32,
    /// Bit 0: log writes to the used ring at `log_addr`.
    pub flags: u32,
    /// Descriptor table, or packed descriptor ring.
    pub desc_addr: u64,
    /// Used ring, or device event suppression area.
    pub used_addr: u64,
    /// Available ring, or driver event suppression area.
    pub avail_addr: u64,
    /// Guest address that stands for the used ring in the dirty log.
    pub log_addr: u64,
}

impl VringAddr {
    /// The log flag.
    pub const FLAG_LOG: u32 = 1;

    /// Decodes the payload; `None` when its size is wrong.
    pub fn decode(payload: &[u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        let addr = Self {
            index: fields.u32()?,
            flags: fields.u32()?,
            desc_addr: fields.u64()?,
            used_addr: fields.u64()?,
            avail_addr: fields.u64()?,
            log_addr: fields.u64()?,
        };
        fields.end()?;
        Some(addr)
    }

    /// The payload's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = VringState { index: self.index, value: self.flags }.encode();
        for field in [self.desc_addr, self.used_addr, self.avail_addr, self.log_addr] {
            bytes.extend_from_slice(&field.to_ne_bytes());
        }
        bytes
    }
}

/// "A vring descriptor index": which ring a kick, call or error descriptor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringFd {
    /// The ring (bits 0–7).
    pub index: u32,
    /// Whether no descriptor comes with it (bit 8).
    pub no_fd: bool,
    /// Whether one of the bits that mean nothing is set.
    pub reserved_set: bool,
}

impl VringFd {
    const INDEX_MASK: u64 = 0xff;
    const NO_FD: u64 = 1 << 8;

    /// Decodes the payload; `None` when its size is wrong.
    pub fn decode(payload: &[u8]) -> Option<Self> {
        let value = decode_u64(payload)?;
        Some(Self {
            index: u32::try_from(value & Self::INDEX_MASK).ok()?,
            no_fd: value & Self::NO_FD != 0,
            reserved_set: value & !(Self::INDEX_MASK | Self::NO_FD) != 0,
        })
    }

    /// The payload's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let no_fd = if self.no_fd { Self::NO_FD } else { 0 };
        (u64::from(self.index) & Self::INDEX_MASK | no_fd).to_ne_bytes().to_vec()
    }
}

/// "Memory region description".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// Where the guest sees it.
    pub guest_addr: u64,
    /// Its length.
    pub len_bytes: u64,
    /// Where the front-end has mapped it.
    pub user_addr: u64,
    /// Where it starts in its file.
    pub mmap_offset: u64,
}

impl MemoryRegion {
    const BYTES: usize = 32;

    fn take(fields: &mut Fields<'_>) -> Option<Self> {
        Some(Self {
            guest_addr: fields.u64()?,
            len_bytes: fields.u64()?,
            user_addr: fields.u64()?,
            mmap_offset: fields.u64()?,
        })
    }

    fn encode_into(&self, bytes: &mut Vec<u8>) {
        for field in [self.guest_addr, self.len_bytes, self.user_addr, self.mmap_offset] {
            bytes.extend_from_slice(&field.to_ne_bytes());
        }
    }

    /// Decodes "Single memory region description"; `None` when the size is wrong.
    pub fn decode_single(payload: &[u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        fields.u64()?; // padding
        let region = Self::take(&mut fields)?;
        fields.end()?;
        Some(region)
    }

    /// The bytes of a "Single memory region description".
    pub fn encode_single(&self) -> Vec<u8> {
        let mut bytes = vec![0; 8];
        self.encode_into(&mut bytes);
        bytes
    }

    /// Decodes "Multiple memory regions description".
    ///
    /// `Err` carries the claimed number of regions when that is beyond [`TABLE_REGIONS_MAX`]; `Ok(None)` means that
    /// the payload's size does not fit its number of regions.
    pub fn decode_table(payload: &[u8]) -> Result<Option<Vec<Self>>, u32> {
        let mut fields = Fields(payload);
        let (Some(count), Some(_padding)) = (fields.u32(), fields.u32()) else { return Ok(None) };
        let regions_count = usize::try_from(count).map_err(|_| count)?;
        if regions_count > TABLE_REGIONS_MAX {
            return Err(count);
        }
        if fields.0.len() != regions_count * Self::BYTES {
            return Ok(None);
        }
        Ok((0..regions_count).map(|_| Self::take(&mut fields)).collect())
    }

    /// The bytes of a "Multiple memory regions description".
    pub fn encode_table(regions: &[Self]) -> Vec<u8> {
        let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
        let mut bytes = VringState { index: count, value: 0 }.encode();
        for region in regions {
            region.encode_into(&mut bytes);
        }
        bytes
    }
}

/// "Virtio device config space", without the bytes that follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigSpace {
    /// First byte.
    pub offset: u32,
    /// Number of bytes.
    pub size_bytes: u32,
    /// 0: the guest wrote. 1: a migration destination sets what the source had (QEMU), or the guest wrote (rust-vmm).
    pub flags: u32,
}

impl ConfigSpace {
    /// The flag of a migration.
    pub const FLAG_MIGRATION: u32 = 1;

    /// Decodes the fixed part and returns the bytes after it; `None` when even the fixed part is cut off.
    pub fn decode(payload: &[u8]) -> Option<(Self, &[u8])> {
        let mut fields = Fields(payload);
        let space = Self { offset: fields.u32()?, size_bytes: fields.u32()?, flags: fields.u32()? };
        Some((space, fields.rest()))
    }

    /// The payload's bytes.
    pub fn encode(&self, data: &[u8]) -> Vec<u8> {
        let mut bytes = VringState { index: self.offset, value: self.size_bytes }.encode();
        bytes.extend_from_slice(&self.flags.to_ne_bytes());
        bytes.extend_from_slice(data);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_numbers_round_trip_and_unknown_ones_are_unknown() {
        for number in 1..=44 {
            let request = Request::from_number(number).unwrap();
            assert_eq!(request.number(), number);
        }
        assert_eq!(Request::from_number(0), None);
        assert_eq!(Request::from_number(45), None);
        assert_eq!(Request::from_number(u32::MAX), None);
        assert_eq!(Request::GetVringBase.to_string(), "GET_VRING_BASE");
    }

    #[test]
    fn reply_flags_are_version_and_reply_only() {
        let reply = Header::reply(24, 8);
        assert_eq!(reply.flags, 0x5);
        let mut bytes = Vec::new();
        reply.encode_into(&mut bytes);
        assert_eq!(Header::decode(&bytes.try_into().unwrap()), reply);
    }

    #[test]
    fn fixed_layouts_accept_exactly_one_size() {
        let state = VringState { index: 3, value: 256 };
        let addr = VringAddr {
            index: 1,
            flags: 1,
            desc_addr: 2,
            used_addr: 3,
            avail_addr: 4,
            log_addr: 5,
        };
        let region = MemoryRegion { guest_addr: 1, len_bytes: 2, user_addr: 3, mmap_offset: 4 };
        let fd = VringFd { index: 7, no_fd: true, reserved_set: false };
        assert_eq!(VringState::decode(&state.encode()), Some(state));
        assert_eq!(VringAddr::decode(&addr.encode()), Some(addr));
        assert_eq!(MemoryRegion::decode_single(&region.encode_single()), Some(region));
        assert_eq!(VringFd::decode(&fd.encode()), Some(fd));
        for len_bytes in 0..64 {
            let payload = vec![0; len_bytes];
            assert_eq!(decode_u64(&payload).is_some(), len_bytes == 8);
            assert_eq!(VringFd::decode(&payload).is_some(), len_bytes == 8);
            assert_eq!(VringState::decode(&payload).is_some(), len_bytes == 8);
            assert_eq!(VringAddr::decode(&payload).is_some(), len_bytes == 40);
            assert_eq!(MemoryRegion::decode_single(&payload).is_some(), len_bytes == 40);
            assert_eq!(ConfigSpace::decode(&payload).is_some(), len_bytes >= 12);
        }
    }

    #[test]
    fn the_layout_of_a_vring_address_is_the_specifications() {
        let mut payload = Vec::new();
        payload.extend_from_slice(&9u32.to_ne_bytes());
        payload.extend_from_slice(&1u32.to_ne_bytes());
        for value in 10u64..14 {
            payload.extend_from_slice(&value.to_ne_bytes());
        }
        let addr = VringAddr::decode(&payload).unwrap();
        assert_eq!((addr.index, addr.flags), (9, 1));
        assert_eq!((addr.desc_addr, addr.used_addr), (10, 11));
        assert_eq!((addr.avail_addr, addr.log_addr), (12, 13));
    }

    #[test]
    fn a_memory_table_must_have_as_many_regions_as_it_says() {
        let region = MemoryRegion { guest_addr: 1, len_bytes: 2, user_addr: 3, mmap_offset: 4 };
        for count in 0..=TABLE_REGIONS_MAX {
            let regions = vec![region; count];
            let payload = MemoryRegion::encode_table(&regions);
            assert_eq!(MemoryRegion::decode_table(&payload), Ok(Some(regions)));
            assert_eq!(MemoryRegion::decode_table(&payload[..payload.len() - 1]), Ok(None));
        }
        assert_eq!(MemoryRegion::decode_table(&MemoryRegion::encode_table(&[region; 9])), Err(9));
        assert_eq!(MemoryRegion::decode_table(&[0xff; 8]), Err(u32::MAX));
    }

    #[test]
    fn reserved_bits_of_a_vring_descriptor_index_are_noticed() {
        assert!(VringFd::decode(&0x200u64.to_ne_bytes()).unwrap().reserved_set);
        assert!(VringFd::decode(&(1u64 << 63).to_ne_bytes()).unwrap().reserved_set);
        assert!(!VringFd::decode(&0x1ffu64.to_ne_bytes()).unwrap().reserved_set);
    }
}
