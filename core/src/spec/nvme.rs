//! NVM Express: registers, queue entries, identify data (NVMe Base 2.0, NVM Command Set 1.0). All little-endian.
//!
//! Offsets are bytes into the structure named by the module; `_z` fields count from zero.

/// Controller registers, offsets into BAR 0 (Base 2.0 §3.1.3).
pub mod reg {
    /// Controller capabilities, 64 bits.
    pub const CAP: usize = 0x00;
    /// Version.
    pub const VS: usize = 0x08;
    /// Interrupt mask set (not with MSI-X).
    pub const INTMS: usize = 0x0c;
    /// Interrupt mask clear.
    pub const INTMC: usize = 0x10;
    /// Controller configuration.
    pub const CC: usize = 0x14;
    /// Controller status.
    pub const CSTS: usize = 0x1c;
    /// Subsystem reset.
    pub const NSSR: usize = 0x20;
    /// Admin queue attributes: sizes, zero-based, submission in the low and completion in the high half.
    pub const AQA: usize = 0x24;
    /// Admin submission queue, 64 bits.
    pub const ASQ: usize = 0x28;
    /// Admin completion queue, 64 bits.
    pub const ACQ: usize = 0x30;
    /// Controller memory buffer: where.
    pub const CMBLOC: usize = 0x38;
    /// Controller memory buffer: how large.
    pub const CMBSZ: usize = 0x3c;
    /// Controller ready time-outs (2.0): with media in the lower half, in 500 ms.
    pub const CRTO: usize = 0x68;
    /// The first doorbell; submission queue y's is at `(2y) << (2 + DSTRD)` from here, its completion queue's one further.
    pub const DOORBELLS: usize = 0x1000;
}

/// Fields of [`reg::CAP`].
pub mod cap {
    /// Entries per queue, zero-based: bits 15:0.
    pub const MQES_Z_MASK: u64 = 0xffff;
    /// Queues must be physically contiguous.
    pub const CQR: u64 = 1 << 16;
    /// Shift of the worst-case time for CSTS.RDY to change, in 500 ms: bits 31:24.
    pub const TO_SHIFT: u32 = 24;
    /// Shift of the doorbell stride, 2^(2+n) bytes: bits 35:32.
    pub const DSTRD_SHIFT: u32 = 32;
    /// NVM subsystem reset is supported.
    pub const NSSRS: u64 = 1 << 36;
    /// Shift of the command sets: bits 44:37; bit 0 of it: NVM.
    pub const CSS_SHIFT: u32 = 37;
    /// Shift of the smallest page, 2^(12+n): bits 51:48.
    pub const MPSMIN_SHIFT: u32 = 48;
    /// Shift of the largest page: bits 55:52.
    pub const MPSMAX_SHIFT: u32 = 52;
    /// Ready with media is supported, and CRTO valid.
    pub const CRWMS: u64 = 1 << 59;
}

/// Fields of [`reg::CC`].
pub mod cc {
    /// Enable.
    pub const EN: u32 = 1;
    /// Shift of the command set: bits 6:4; 0: NVM, 6: all that are supported.
    pub const CSS_SHIFT: u32 = 4;
    /// Shift of the page size, 2^(12+n): bits 10:7.
    pub const MPS_SHIFT: u32 = 7;
    /// Shift of the shutdown notification: bits 15:14.
    pub const SHN_SHIFT: u32 = 14;
    /// Normal shutdown.
    pub const SHN_NORMAL: u32 = 1 << SHN_SHIFT;
    /// Bits of the shutdown notification.
    pub const SHN_MASK: u32 = 3 << SHN_SHIFT;
    /// Shift of the size of submission entries, 2^n: bits 19:16.
    pub const IOSQES_SHIFT: u32 = 16;
    /// Shift of the size of completion entries, 2^n: bits 23:20.
    pub const IOCQES_SHIFT: u32 = 20;
}

/// Fields of [`reg::CSTS`].
pub mod csts {
    /// Ready.
    pub const RDY: u32 = 1;
    /// Fatal.
    pub const CFS: u32 = 1 << 1;
    /// Bits of the shutdown status: 0 normal, 1 in progress, 2 complete.
    pub const SHST_MASK: u32 = 3 << 2;
    /// Shutdown complete.
    pub const SHST_COMPLETE: u32 = 2 << 2;
    /// A subsystem reset has happened.
    pub const NSSRO: u32 = 1 << 4;
    /// Processing is paused.
    pub const PP: u32 = 1 << 5;
}

/// Admin commands (Base 2.0 §5).
pub mod admin {
    /// Delete I/O submission queue.
    pub const DELETE_SQ: u8 = 0x00;
    /// Create I/O submission queue: dword 10 size_z<<16 | id, dword 11 cqid<<16 | priority<<1 | contiguous.
    pub const CREATE_SQ: u8 = 0x01;
    /// Get log page: dword 10 (count of dwords)_z<<16 | LSP<<8 | LID, dword 11 upper half of the count.
    pub const GET_LOG_PAGE: u8 = 0x02;
    /// Delete I/O completion queue.
    pub const DELETE_CQ: u8 = 0x04;
    /// Create I/O completion queue: dword 10 size_z<<16 | id, dword 11 vector<<16 | interrupts<<1 | contiguous.
    pub const CREATE_CQ: u8 = 0x05;
    /// Identify: dword 10 CNS.
    pub const IDENTIFY: u8 = 0x06;
    /// Abort: dword 10 CID<<16 | SQID; bit 0 of the result: not aborted.
    pub const ABORT: u8 = 0x08;
    /// Set features: dword 10 FID.
    pub const SET_FEATURES: u8 = 0x09;
    /// Get features: dword 10 FID.
    pub const GET_FEATURES: u8 = 0x0a;
    /// Asynchronous event request.
    pub const ASYNC_EVENT: u8 = 0x0c;
    /// Doorbell buffer config: PRP1 shadow doorbells, PRP2 event indices.
    pub const DOORBELL_BUFFER: u8 = 0x7c;
}

/// NVM commands (NVM Command Set 1.0 §3).
pub mod nvm {
    /// Flush.
    pub const FLUSH: u8 = 0x00;
    /// Write: dwords 10 and 11 LBA, dword 12 blocks_z and flags.
    pub const WRITE: u8 = 0x01;
    /// Read.
    pub const READ: u8 = 0x02;
    /// Write zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Dataset management: dword 10 ranges_z, dword 11 attributes.
    pub const DSM: u8 = 0x09;
    /// Dword 12: force unit access.
    pub const DW12_FUA: u32 = 1 << 30;
    /// Dword 12 of write zeroes: may deallocate.
    pub const DW12_DEAC: u32 = 1 << 25;
    /// Dword 11 of dataset management: deallocate.
    pub const DSM_DEALLOCATE: u32 = 1 << 2;
    /// Ranges of one dataset management command.
    pub const DSM_RANGES_MAX: usize = 256;
    /// One range: attributes (u32), blocks (u32), first LBA (u64).
    pub const DSM_RANGE_BYTES: usize = 16;
}

/// Values of CNS of identify.
pub mod cns {
    /// A namespace.
    pub const NAMESPACE: u32 = 0;
    /// The controller.
    pub const CONTROLLER: u32 = 1;
    /// The ids of active namespaces above the one given, 1,024 words of 32 bits.
    pub const ACTIVE_NAMESPACES: u32 = 2;
    /// Descriptors of a namespace's identity (UUID, NGUID, EUI64).
    pub const NAMESPACE_DESCRIPTORS: u32 = 3;
    /// The controller's part of a command set (NVM Command Set §4.1.5.4); CSI in dword 11.
    pub const CONTROLLER_OF_SET: u32 = 6;
}

/// Feature identifiers.
pub mod feature {
    /// Volatile write cache: bit 0 enables it.
    pub const WRITE_CACHE: u32 = 0x06;
    /// Number of queues: submission_z | completion_z<<16, asked and granted.
    pub const NUMBER_OF_QUEUES: u32 = 0x07;
    /// Interrupt coalescing.
    pub const INTERRUPT_COALESCING: u32 = 0x08;
    /// Asynchronous events.
    pub const ASYNC_EVENTS: u32 = 0x0b;
}

/// Log pages.
pub mod log {
    /// Errors, 64 bytes each.
    pub const ERROR: u8 = 0x01;
    /// SMART / health, 512 bytes.
    pub const HEALTH: u8 = 0x02;
    /// Firmware slots.
    pub const FIRMWARE_SLOT: u8 = 0x03;
    /// Changed namespaces, 1,024 ids.
    pub const CHANGED_NAMESPACES: u8 = 0x04;
}

/// SMART / health information (Base 2.0 §5.16.1.3): offsets.
pub mod health {
    /// Critical warnings, a byte of bits: spare, temperature, reliability, read-only, backup, memory region.
    pub const CRITICAL_WARNING: usize = 0;
    /// Composite temperature in Kelvin, u16.
    pub const TEMPERATURE: usize = 1;
    /// Available spare, per cent.
    pub const SPARE: usize = 3;
    /// Its threshold.
    pub const SPARE_THRESHOLD: usize = 4;
    /// Percentage used.
    pub const PERCENTAGE_USED: usize = 5;
    /// Units of 1000 × 512 bytes read, u128; the counters below are u128, too.
    pub const DATA_UNITS_READ: usize = 32;
    /// Units written.
    pub const DATA_UNITS_WRITTEN: usize = 48;
    /// Read commands.
    pub const HOST_READS: usize = 64;
    /// Write commands.
    pub const HOST_WRITES: usize = 80;
    /// Busy time, minutes.
    pub const BUSY_MINUTES: usize = 96;
    /// Power cycles.
    pub const POWER_CYCLES: usize = 112;
    /// Power-on hours.
    pub const POWER_ON_HOURS: usize = 128;
    /// Unsafe shutdowns.
    pub const UNSAFE_SHUTDOWNS: usize = 144;
    /// Media errors.
    pub const MEDIA_ERRORS: usize = 160;
    /// Entries in the error log.
    pub const ERROR_LOG_ENTRIES: usize = 176;
    /// Minutes above the warning temperature, u32.
    pub const WARNING_MINUTES: usize = 192;
    /// Minutes above the critical temperature, u32.
    pub const CRITICAL_MINUTES: usize = 196;
    /// Bytes of the page.
    pub const BYTES: usize = 512;
}

/// Asynchronous events: dword 0 of the completion is type | information << 8 | log page << 16.
pub mod event {
    /// Type: error.
    pub const ERROR: u8 = 0;
    /// Type: health.
    pub const HEALTH: u8 = 1;
    /// Type: notice.
    pub const NOTICE: u8 = 2;
    /// Information of a notice: namespace attributes changed.
    pub const NOTICE_NAMESPACE: u8 = 0;
    /// Bits of the feature: health events; the upper two of the byte are reserved.
    pub const ENABLE_HEALTH: u32 = 0x3f;
    /// Those of them that were reserved before 1.4: persistent memory.
    pub const ENABLE_HEALTH_SINCE_1_4: u32 = 1 << 5;
    /// Bit of the feature (and of OAES): namespace attribute notices.
    pub const ENABLE_NAMESPACE: u32 = 1 << 8;
    /// Bit of the feature (and of OAES): firmware activation notices.
    pub const ENABLE_FIRMWARE: u32 = 1 << 9;
}

/// Identify controller: offsets (Base 2.0 §5.17.2.1).
pub mod id_ctrl {
    /// PCI vendor, u16.
    pub const VID: usize = 0;
    /// Serial number, 20 bytes of ASCII.
    pub const SN: usize = 4;
    /// Model number, 40 bytes of ASCII.
    pub const MN: usize = 24;
    /// Firmware revision, 8 bytes of ASCII.
    pub const FR: usize = 64;
    /// Largest transfer, 2^n pages of CAP.MPSMIN; 0: no limit.
    pub const MDTS: usize = 77;
    /// Controller id, u16.
    pub const CNTLID: usize = 78;
    /// Version, u32.
    pub const VER: usize = 80;
    /// What the controller is, u8: 0 not said, 1 I/O, 2 discovery, 3 administrative.
    pub const CNTRLTYPE: usize = 111;
    /// Optional asynchronous events, u32.
    pub const OAES: usize = 92;
    /// Optional admin commands, u16: bit 3 namespace management, bit 8 doorbell buffer config.
    pub const OACS: usize = 256;
    /// Aborts at a time, zero-based.
    pub const ACL_Z: usize = 258;
    /// Event requests at a time, zero-based.
    pub const AERL_Z: usize = 259;
    /// Log page attributes.
    pub const LPA: usize = 261;
    /// Entries of the error log, zero-based.
    pub const ELPE_Z: usize = 262;
    /// Warning temperature, Kelvin, u16.
    pub const WCTEMP: usize = 266;
    /// Size of submission entries: low nibble required, high nibble maximum, 2^n.
    pub const SQES: usize = 512;
    /// Size of completion entries.
    pub const CQES: usize = 513;
    /// Largest number of outstanding commands, u16.
    pub const MAXCMD: usize = 514;
    /// Number of namespaces (the largest valid id), u32.
    pub const NN: usize = 516;
    /// Optional NVM commands, u16: bit 2 dataset management, bit 3 write zeroes.
    pub const ONCS: usize = 520;
    /// Fused operations, u16.
    pub const FUSES: usize = 522;
    /// Volatile write cache: bit 0 present; bits 2:1 flush with NSID ffffffff.
    pub const VWC: usize = 525;
    /// SGL support, u32: bits 1:0: 1 byte-aligned, 2 dword-aligned; bit 16 bit bucket; bit 20 address is offset.
    pub const SGLS: usize = 536;
    /// Vendor specific, 1,024 bytes.
    pub const VS: usize = 3072;
    /// OACS: doorbell buffer config.
    pub const OACS_DOORBELL_BUFFER: u16 = 1 << 8;
    /// ONCS: dataset management.
    pub const ONCS_DSM: u16 = 1 << 2;
    /// ONCS: write zeroes.
    pub const ONCS_WRITE_ZEROES: u16 = 1 << 3;
    /// VWC: there is a volatile write cache.
    pub const VWC_PRESENT: u8 = 1;
}

/// Identify namespace: offsets (NVM Command Set 1.0 §4.1.5.1).
pub mod id_ns {
    /// Size in blocks, u64.
    pub const NSZE: usize = 0;
    /// Capacity in blocks, u64.
    pub const NCAP: usize = 8;
    /// Features: bit 0 thin, bit 2 deallocated error, bit 4 the preferred sizes below are valid.
    pub const NSFEAT: usize = 24;
    /// Number of LBA formats, zero-based.
    pub const NLBAF_Z: usize = 25;
    /// Formatted with: bits 3:0 format (and 6:5, upper bits), bit 4 metadata at the end of the data.
    pub const FLBAS: usize = 26;
    /// Data protection in force: bits 2:0.
    pub const DPS: usize = 29;
    /// Deallocation: bits 2:0 what deallocated blocks read as (1 zeroes, 2 ones), bit 3 DEAC in write zeroes.
    pub const DLFEAT: usize = 33;
    /// Preferred write granularity, blocks, zero-based, u16.
    pub const NPWG_Z: usize = 64;
    /// Preferred write alignment.
    pub const NPWA_Z: usize = 66;
    /// Preferred deallocate granularity.
    pub const NPDG_Z: usize = 68;
    /// Preferred deallocate alignment.
    pub const NPDA_Z: usize = 70;
    /// Optimal write size.
    pub const NOWS_Z: usize = 72;
    /// Optimal I/O boundary, blocks, u16; 0: none.
    pub const NOIOB: usize = 46;
    /// NGUID, 16 bytes.
    pub const NGUID: usize = 104;
    /// EUI64, 8 bytes.
    pub const EUI64: usize = 120;
    /// LBA formats, u32 each: metadata bytes (15:0), block 2^n (23:16), relative performance (25:24).
    pub const LBAF: usize = 128;
    /// NSATTR: bit 0 write protected.
    pub const NSATTR: usize = 99;
    /// LBA formats with unique attributes, behind those of NLBAF; reserved, and 0, before NVM Command Set 1.0b.
    pub const NULBAF: usize = 82;
}

/// Namespace identification descriptors (Base 2.0 §5.17.2.3): type (u8), length (u8), 2 reserved bytes, the identifier.
pub mod id_desc {
    /// Bytes before the identifier.
    pub const HEAD_BYTES: usize = 4;
    /// EUI64, 8 bytes.
    pub const EUI64: u8 = 1;
    /// NGUID, 16 bytes.
    pub const NGUID: u8 = 2;
    /// UUID, 16 bytes.
    pub const UUID: u8 = 3;
    /// Command set, 1 byte; 0: NVM.
    pub const COMMAND_SET: u8 = 4;
}

/// Identify controller of the NVM command set: offsets.
pub mod id_ctrl_nvm {
    /// Largest write zeroes, 2^n pages of CAP.MPSMIN; 0: no limit (MDTS does not count).
    pub const WZSL: usize = 1;
    /// Ranges of one dataset management command; 0: no limit.
    pub const DMRL: usize = 3;
    /// Blocks of one range, u32.
    pub const DMRSL: usize = 4;
    /// Blocks of all ranges, u64.
    pub const DMSL: usize = 8;
}

/// Bytes of identify data.
pub const IDENTIFY_BYTES: usize = 4096;

/// Bytes of a submission entry.
pub const SQE_BYTES: usize = 64;

/// Bytes of a completion entry.
pub const CQE_BYTES: usize = 16;

/// Stands for all namespaces.
pub const NSID_ALL: u32 = 0xffff_ffff;

/// A submission entry: 16 dwords. 0: opcode | fused<<8 | PSDT<<14 | CID<<16; 1: NSID; 4–5 metadata; 6–9 data pointer
/// (PRP1, PRP2, or one SGL descriptor); 10–15 by command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Sqe(pub [u32; 16]);

const _: () = assert!(size_of::<Sqe>() == SQE_BYTES);

/// Dword 0: the data pointer is an SGL (and metadata one contiguous buffer).
pub const PSDT_SGL: u32 = 1 << 14;

impl Sqe {
    /// An entry with nothing but its head.
    #[inline]
    #[must_use]
    pub const fn new(opcode: u8, cid: u16, nsid: u32) -> Sqe {
        let mut dwords = [0; 16];
        dwords[0] = opcode as u32 | (cid as u32) << 16;
        dwords[1] = nsid;
        Sqe(dwords)
    }

    /// Sets two dwords from `at` on.
    #[inline]
    pub const fn set_u64(&mut self, at: usize, value: u64) {
        let bytes = value.to_le_bytes();
        self.0[at] = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        self.0[at + 1] = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    }

    /// Two dwords from `at` on.
    #[inline]
    #[must_use]
    pub const fn u64_at(&self, at: usize) -> u64 {
        self.0[at] as u64 | (self.0[at + 1] as u64) << 32
    }

    /// Dwords 6 to 9 as PRP entries.
    #[inline]
    pub const fn set_prps(&mut self, first: u64, second: u64) {
        self.set_u64(6, first);
        self.set_u64(8, second);
    }
}

/// A completion entry: 4 dwords. 0 and 1: result; 2: SQ head | SQ id<<16; 3: CID | phase<<16 | status<<17.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct Cqe(pub [u32; 4]);

const _: () = assert!(size_of::<Cqe>() == CQE_BYTES);

impl Cqe {
    /// From its upper half, which has everything that I/O commands answer: dwords 2 and 3, read at once.
    #[inline]
    #[must_use]
    pub const fn from_upper(half: u64) -> Cqe {
        Cqe([0, 0, (half & 0xffff_ffff) as u32, (half >> 32) as u32])
    }

    /// The command.
    #[inline]
    #[must_use]
    pub const fn cid(&self) -> u16 {
        (self.0[3] & 0xffff) as u16
    }

    /// The phase.
    #[inline]
    #[must_use]
    pub const fn phase(&self) -> bool {
        self.0[3] & (1 << 16) != 0
    }

    /// How far the device has read the submission queue.
    #[inline]
    #[must_use]
    pub const fn sq_head(&self) -> u16 {
        (self.0[2] & 0xffff) as u16
    }

    /// The submission queue.
    #[inline]
    #[must_use]
    pub const fn sq_id(&self) -> u16 {
        (self.0[2] >> 16) as u16
    }

    /// The status: code type, code, flags.
    #[inline]
    #[must_use]
    pub const fn status(&self) -> Status {
        Status((self.0[3] >> 17) as u16)
    }
}

/// The status field of a completion, 15 bits: code (7:0), type (10:8), retry delay (12:11), more (13), do not retry (14).
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Status(pub u16);

impl Status {
    /// Done.
    pub const SUCCESS: Status = Status(0);
    /// The flag that a retry will fail, too.
    pub const DO_NOT_RETRY: u16 = 1 << 14;
    /// Of the code type and code; flags are left out.
    const CODE_MASK: u16 = 0x7ff;

    /// From type and code.
    #[must_use]
    pub const fn new(code_type: u8, code: u8) -> Status {
        Status((code_type as u16) << 8 | code as u16)
    }

    /// Type and code, without flags: compare with the constants of [`status`].
    #[inline]
    #[must_use]
    pub const fn kind(self) -> u16 {
        self.0 & Self::CODE_MASK
    }

    /// True when done.
    #[inline]
    #[must_use]
    pub const fn is_success(self) -> bool {
        self.kind() == 0
    }

    /// True when the device says that a retry will fail, too.
    #[inline]
    #[must_use]
    pub const fn do_not_retry(self) -> bool {
        self.0 & Self::DO_NOT_RETRY != 0
    }
}

impl std::fmt::Debug for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "type {} code {:#04x}", self.kind() >> 8, self.kind() & 0xff)?;
        if self.do_not_retry() { f.write_str(", do not retry") } else { Ok(()) }
    }
}

/// Status codes with their types (Base 2.0 §3.3.3.2): type << 8 | code.
pub mod status {
    /// Opcode not supported.
    pub const INVALID_OPCODE: u16 = 0x001;
    /// A field is not valid.
    pub const INVALID_FIELD: u16 = 0x002;
    /// The CID is in use.
    pub const CID_CONFLICT: u16 = 0x003;
    /// The data or metadata could not be moved.
    pub const DATA_TRANSFER_ERROR: u16 = 0x004;
    /// Power loss.
    pub const ABORTED_POWER_LOSS: u16 = 0x005;
    /// Internal error.
    pub const INTERNAL_ERROR: u16 = 0x006;
    /// Abort was asked for.
    pub const ABORTED: u16 = 0x007;
    /// Its submission queue was deleted.
    pub const ABORTED_SQ_DELETED: u16 = 0x008;
    /// No such namespace, or of another format.
    pub const INVALID_NAMESPACE: u16 = 0x00b;
    /// An SGL segment descriptor is not valid.
    pub const INVALID_SGL_SEGMENT: u16 = 0x00d;
    /// Too many or few SGL descriptors.
    pub const INVALID_SGL_COUNT: u16 = 0x00e;
    /// The SGL's data is too short or long.
    pub const INVALID_SGL_LENGTH: u16 = 0x00f;
    /// A descriptor type is not supported.
    pub const INVALID_SGL_TYPE: u16 = 0x011;
    /// A PRP entry has an offset that it must not have.
    pub const INVALID_PRP_OFFSET: u16 = 0x013;
    /// A sanitize operation failed; until the next one nothing is served.
    pub const SANITIZE_FAILED: u16 = 0x01c;
    /// A sanitize operation is under way.
    pub const SANITIZE_IN_PROGRESS: u16 = 0x01d;
    /// The namespace is write protected.
    pub const WRITE_PROTECTED: u16 = 0x020;
    /// The command was interrupted; it is to be sent again.
    pub const COMMAND_INTERRUPTED: u16 = 0x021;
    /// The transport failed for a moment.
    pub const TRANSIENT_TRANSPORT_ERROR: u16 = 0x022;
    /// The block range is outside the namespace.
    pub const LBA_OUT_OF_RANGE: u16 = 0x080;
    /// The namespace's capacity is exceeded.
    pub const CAPACITY_EXCEEDED: u16 = 0x081;
    /// The namespace is not ready (may be retried unless flagged).
    pub const NAMESPACE_NOT_READY: u16 = 0x082;
    /// A reservation of another host.
    pub const RESERVATION_CONFLICT: u16 = 0x083;
    /// A format is under way.
    pub const FORMAT_IN_PROGRESS: u16 = 0x084;
    /// The completion queue does not exist (create SQ).
    pub const COMPLETION_QUEUE_INVALID: u16 = 0x100;
    /// The queue id is not valid.
    pub const INVALID_QUEUE_ID: u16 = 0x101;
    /// The queue size is not valid.
    pub const INVALID_QUEUE_SIZE: u16 = 0x102;
    /// Too many aborts at a time.
    pub const ABORT_LIMIT: u16 = 0x103;
    /// Too many event requests at a time.
    pub const EVENT_LIMIT: u16 = 0x105;
    /// The interrupt vector is not valid.
    pub const INVALID_VECTOR: u16 = 0x108;
    /// The log page is not valid.
    pub const INVALID_LOG_PAGE: u16 = 0x109;
    /// The feature cannot be set.
    pub const FEATURE_NOT_CHANGEABLE: u16 = 0x10e;
    /// Attributes conflict (NVM).
    pub const CONFLICTING_ATTRIBUTES: u16 = 0x180;
    /// The range is write protected (NVM: attempted write to read-only range).
    pub const WRITE_TO_READ_ONLY: u16 = 0x182;
    /// Write fault.
    pub const WRITE_FAULT: u16 = 0x280;
    /// The medium could not be read.
    pub const UNRECOVERED_READ: u16 = 0x281;
    /// Access denied.
    pub const ACCESS_DENIED: u16 = 0x286;
    /// The block was deallocated or never written, and reads of such are errors.
    pub const DEALLOCATED: u16 = 0x287;
}

/// The code type of path errors: the namespace was not reached, whatever the code.
pub const STATUS_TYPE_PATH: u16 = 0x300;

/// SGL descriptors, 16 bytes: address (u64), length (u32), 3 reserved bytes, type<<4 | subtype (Base 2.0 §4.1.2).
pub mod sgl {
    /// Type and subtype: data block at an address.
    pub const DATA_BLOCK: u8 = 0x00;
    /// Bit bucket.
    pub const BIT_BUCKET: u8 = 0x10;
    /// A segment of further descriptors.
    pub const SEGMENT: u8 = 0x20;
    /// The last segment.
    pub const LAST_SEGMENT: u8 = 0x30;
    /// Bytes of a descriptor.
    pub const BYTES: usize = 16;
}
