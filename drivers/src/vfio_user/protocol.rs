//! The vfio-user protocol as inert numbers and layouts: what client and test server have in common.
//!
//! All fields are in the host's byte order, which for ringmill's platforms is little-endian. Structures are built and read
//! field by field: what arrives has any length and any content.
//!
//! Spec: vfio-user protocol 0.9 (QEMU `docs/interop/vfio-user.rst`); numbers of regions, interrupts and flags are those of
//! Linux' `<linux/vfio.h>`.

use thiserror::Error;

/// The version that is proposed: 0.1. Servers answer with the same major and at most this minor version.
pub const VERSION_MAJOR: u16 = 0;
/// See [`VERSION_MAJOR`].
pub const VERSION_MINOR: u16 = 1;

/// Bytes of a message's header.
pub const HEADER_BYTES: usize = 16;

/// Commands.
pub mod command {
    /// Version and capabilities, the first message.
    pub const VERSION: u16 = 1;
    /// Memory becomes reachable.
    pub const DMA_MAP: u16 = 2;
    /// Memory is no longer reachable.
    pub const DMA_UNMAP: u16 = 3;
    /// What kind of device.
    pub const DEVICE_GET_INFO: u16 = 4;
    /// One region (BAR or configuration space).
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    /// One kind of interrupts.
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    /// Which eventfds are signalled.
    pub const DEVICE_SET_IRQS: u16 = 8;
    /// Reads registers.
    pub const REGION_READ: u16 = 9;
    /// Writes registers.
    pub const REGION_WRITE: u16 = 10;
    /// From server to client: reads memory that could not be mapped.
    pub const DMA_READ: u16 = 11;
    /// From server to client: writes it.
    pub const DMA_WRITE: u16 = 12;
    /// Function-level reset.
    pub const DEVICE_RESET: u16 = 13;
}

/// Bits of a header's flags.
pub mod flags {
    /// The type: 0 command, 1 reply.
    pub const TYPE_MASK: u32 = 0xf;
    /// A reply.
    pub const REPLY: u32 = 1;
    /// A command that wants no reply.
    pub const NO_REPLY: u32 = 1 << 4;
    /// A reply that says no; the header has an errno, perhaps.
    pub const ERROR: u32 = 1 << 5;
}

/// Bits of the device information's flags.
pub mod device {
    /// DEVICE_RESET is supported.
    pub const RESET: u32 = 1;
    /// A PCI device.
    pub const PCI: u32 = 2;
}

/// Regions.
pub mod region {
    /// Configuration space; BARs are 0 to 5.
    pub const CONFIG: u32 = 7;
    /// Regions that a PCI device has at least.
    pub const COUNT: u32 = 9;
    /// Flag: readable.
    pub const READ: u32 = 1;
    /// Flag: writable.
    pub const WRITE: u32 = 2;
    /// Flag: can be mapped, a descriptor comes along.
    pub const MMAP: u32 = 4;
    /// Flag: capabilities follow.
    pub const CAPS: u32 = 8;
    /// Bytes of the information without capabilities.
    pub const INFO_BYTES: usize = 32;
    /// Capability: which parts can be mapped.
    pub const CAP_SPARSE_MMAP: u16 = 1;
}

/// Kinds of interrupts.
pub mod irq {
    /// INTx.
    pub const INTX: u32 = 0;
    /// MSI.
    pub const MSI: u32 = 1;
    /// MSI-X.
    pub const MSIX: u32 = 2;
    /// Errors of the bus.
    pub const ERR: u32 = 3;
    /// Somebody wants the device back.
    pub const REQ: u32 = 4;
    /// Kinds that there are.
    pub const COUNT: u32 = 5;
    /// Information's flag: eventfds can be bound.
    pub const EVENTFD: u32 = 1;
    /// Set: no data.
    pub const SET_DATA_NONE: u32 = 1;
    /// Set: a boolean per vector.
    pub const SET_DATA_BOOL: u32 = 2;
    /// Set: a descriptor per vector; without any, the vectors are given up.
    pub const SET_DATA_EVENTFD: u32 = 4;
    /// Set: mask.
    pub const SET_ACTION_MASK: u32 = 8;
    /// Set: allow the next interrupt.
    pub const SET_ACTION_UNMASK: u32 = 1 << 4;
    /// Set: what is signalled.
    pub const SET_ACTION_TRIGGER: u32 = 1 << 5;
    /// Bytes of a SET_IRQS message without data.
    pub const SET_BYTES: usize = 20;
}

/// DMA_MAP's flags: the device may read and write.
pub const DMA_READ_WRITE: u32 = 3;
/// Bytes of a DMA_MAP message.
pub const DMA_MAP_BYTES: usize = 32;
/// Bytes of a DMA_UNMAP message.
pub const DMA_UNMAP_BYTES: usize = 24;
/// Bytes before the data of a region or DMA access.
pub const ACCESS_BYTES: usize = 16;

/// What the other side sent and may not.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ProtocolError {
    /// A message that is shorter than its header, or longer than any may be.
    #[error("a message of {len_bytes} bytes (at most {max_bytes} are possible)")]
    Length {
        /// What its header says.
        len_bytes: u32,
        /// The bound.
        max_bytes: usize,
    },
    /// Neither command nor reply.
    #[error("a message of type {kind}")]
    Type {
        /// Its type bits.
        kind: u32,
    },
    /// A message that ends before its fields do.
    #[error("a message of command {command} with {len_bytes} bytes of payload, which is too short")]
    Short {
        /// The command.
        command: u16,
        /// Its payload.
        len_bytes: usize,
    },
    /// A reply to nothing that was asked.
    #[error("a reply with id {id} to command {command}, which was not asked")]
    Unasked {
        /// The reply's id.
        id: u16,
        /// The reply's command.
        command: u16,
    },
    /// A field that makes no sense.
    #[error("an answer to command {command} whose {field} is {value}")]
    Field {
        /// The command.
        command: u16,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

/// A message's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Chosen by who asks, repeated in the reply.
    pub id: u16,
    /// What is asked.
    pub command: u16,
    /// Bytes after the header.
    pub payload_bytes: usize,
    /// See [`flags`].
    pub flags: u32,
    /// An errno, in replies with [`flags::ERROR`].
    pub errno: u32,
}

impl Header {
    /// Reads a header, whose payload may have at most `payload_bytes_max` bytes.
    ///
    /// # Errors
    /// A length or type that cannot be.
    pub fn decode(
        bytes: &[u8; HEADER_BYTES],
        payload_bytes_max: usize,
    ) -> Result<Header, ProtocolError> {
        let fields = Fields { command: 0, bytes };
        let len_bytes = fields.u32(4)?;
        let max_bytes = HEADER_BYTES + payload_bytes_max;
        let payload_bytes = usize::try_from(len_bytes)
            .ok()
            .filter(|len| *len <= max_bytes)
            .and_then(|len| len.checked_sub(HEADER_BYTES))
            .ok_or(ProtocolError::Length { len_bytes, max_bytes })?;
        let header = Header {
            id: fields.u16(0)?,
            command: fields.u16(2)?,
            payload_bytes,
            flags: fields.u32(8)?,
            errno: fields.u32(12)?,
        };
        let kind = header.flags & flags::TYPE_MASK;
        if kind > flags::REPLY { Err(ProtocolError::Type { kind }) } else { Ok(header) }
    }

    /// A whole message with this header; `payload_bytes` is taken from the payload.
    #[must_use]
    pub fn message(&self, payload: &[u8]) -> Vec<u8> {
        let len_bytes = u32::try_from(HEADER_BYTES + payload.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
        bytes.extend_from_slice(&self.id.to_le_bytes());
        bytes.extend_from_slice(&self.command.to_le_bytes());
        bytes.extend_from_slice(&len_bytes.to_le_bytes());
        bytes.extend_from_slice(&self.flags.to_le_bytes());
        bytes.extend_from_slice(&self.errno.to_le_bytes());
        bytes.extend_from_slice(payload);
        bytes
    }

    /// True for replies.
    #[must_use]
    pub fn is_reply(&self) -> bool {
        self.flags & flags::TYPE_MASK == flags::REPLY
    }
}

/// A payload, read field by field.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a> {
    command: u16,
    bytes: &'a [u8],
}

impl<'a> Fields<'a> {
    /// The payload of a message of this command.
    #[must_use]
    pub fn new(command: u16, bytes: &'a [u8]) -> Fields<'a> {
        Fields { command, bytes }
    }

    /// `N` bytes from `at` on.
    fn array<const N: usize>(&self, at: usize) -> Result<[u8; N], ProtocolError> {
        self.bytes
            .get(at..)
            .and_then(|rest| rest.first_chunk())
            .copied()
            .ok_or(ProtocolError::Short { command: self.command, len_bytes: self.bytes.len() })
    }

    /// What follows the first `at` bytes.
    ///
    /// # Errors
    /// When it is shorter.
    pub fn rest(&self, at: usize) -> Result<&'a [u8], ProtocolError> {
        self.bytes
            .get(at..)
            .ok_or(ProtocolError::Short { command: self.command, len_bytes: self.bytes.len() })
    }

    /// 16 bits at `at`.
    ///
    /// # Errors
    /// When the payload ends before.
    pub fn u16(&self, at: usize) -> Result<u16, ProtocolError> {
        self.array(at).map(u16::from_le_bytes)
    }

    /// 32 bits at `at`.
    ///
    /// # Errors
    /// When the payload ends before.
    pub fn u32(&self, at: usize) -> Result<u32, ProtocolError> {
        self.array(at).map(u32::from_le_bytes)
    }

    /// 64 bits at `at`.
    ///
    /// # Errors
    /// When the payload ends before.
    pub fn u64(&self, at: usize) -> Result<u64, ProtocolError> {
        self.array(at).map(u64::from_le_bytes)
    }
}

/// A payload of 32-bit words.
#[must_use]
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A DMA_MAP's payload.
#[must_use]
pub fn dma_map(file_offset: u64, iova: u64, len_bytes: u64) -> Vec<u8> {
    let mut payload = words(&[32, DMA_READ_WRITE]);
    for field in [file_offset, iova, len_bytes] {
        payload.extend_from_slice(&field.to_le_bytes());
    }
    payload
}

/// A DMA_UNMAP's payload.
#[must_use]
pub fn dma_unmap(iova: u64, len_bytes: u64) -> Vec<u8> {
    let mut payload = words(&[24, 0]);
    for field in [iova, len_bytes] {
        payload.extend_from_slice(&field.to_le_bytes());
    }
    payload
}

/// The start of a region access's payload.
#[must_use]
pub fn region_access(region: u32, offset_bytes: u64, count: u32) -> Vec<u8> {
    let mut payload = offset_bytes.to_le_bytes().to_vec();
    payload.extend_from_slice(&words(&[region, count]));
    payload
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The naive twin: what was put in comes out, and no other bytes are accepted.
        #[test]
        fn headers_survive_the_wire_or_are_refused(
            id in any::<u16>(), command in any::<u16>(), bits in any::<u32>(), errno in any::<u32>(),
            payload in proptest::collection::vec(any::<u8>(), 0..64), max in 0usize..64
        ) {
            let header = Header { id, command, payload_bytes: payload.len(), flags: bits, errno };
            let message = header.message(&payload);
            prop_assert_eq!(message.len(), HEADER_BYTES + payload.len());
            let got = Header::decode(message.first_chunk().unwrap(), max);
            if payload.len() > max {
                let refused = matches!(got, Err(ProtocolError::Length { .. }));
                prop_assert!(refused);
            } else if bits & 15 > 1 {
                prop_assert_eq!(got, Err(ProtocolError::Type { kind: bits & 15 }));
            } else {
                prop_assert_eq!(got, Ok(header));
            }
        }

        #[test]
        fn fields_outside_the_payload_are_refused(len in 0usize..40, at in prop_oneof![0usize..48, Just(usize::MAX)]) {
            let bytes: Vec<u8> = (0u8..).take(len).collect();
            let fields = Fields::new(7, &bytes);
            let expect = |size: usize| at.checked_add(size).is_some_and(|end| end <= len);
            prop_assert_eq!(fields.u16(at).is_ok(), expect(2));
            prop_assert_eq!(fields.u32(at).is_ok(), expect(4));
            prop_assert_eq!(fields.u64(at).is_ok(), expect(8));
            if expect(4) {
                let naive = (0..4).map(|k| u32::from(bytes[at + k]) << (8 * k)).sum::<u32>();
                prop_assert_eq!(fields.u32(at), Ok(naive));
            }
        }
    }

    #[test]
    fn a_length_below_the_header_or_of_4_gib_is_refused() {
        for len_bytes in [0u32, 1, 15, u32::MAX, (1 << 20) + 1024] {
            let mut bytes = [0; HEADER_BYTES];
            bytes[4..8].copy_from_slice(&len_bytes.to_le_bytes());
            assert!(matches!(Header::decode(&bytes, 1 << 20), Err(ProtocolError::Length { .. })));
        }
    }
}
