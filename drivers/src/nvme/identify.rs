//! What a controller says about itself and its namespaces, taken apart.
//!
//! In: pages that a device wrote. Out: plain data, in which every number can be used as it is. Owner: control threads.
//! **Invariant:** nothing here trusts a length, a count or an index; what does not make sense is left out, or refused in
//! words.

use ringmill_core::spec::nvme::{health, id_ctrl, id_ctrl_nvm, id_desc, id_ns, nvm};
use uuid::Uuid;

use super::quirks::Quirks;
use super::report::Health;
use super::{DiscardLimits, WriteZeroesLimits};

/// Bytes of the page that sizes count in: CAP.MPSMIN is 0 for everything that is attached.
const PAGE_BYTES: u64 = 4096;

/// The most that one command is made to carry: 65,536 blocks of 512 bytes; a pair cuts further by its list pages.
const TRANSFER_BYTES_MAX: u32 = 32 << 20;

/// Blocks of one command, as they are counted in 16 bits.
const BLOCKS_MAX: u32 = 1 << 16;

/// A structure that the device wrote; reads outside of it are zero.
#[derive(Clone, Copy)]
struct Page<'a>(&'a [u8]);

impl Page<'_> {
    fn bytes<const N: usize>(self, at: usize) -> [u8; N] {
        let found = at.checked_add(N).and_then(|end| self.0.get(at..end));
        found.and_then(|bytes| bytes.try_into().ok()).unwrap_or([0; N])
    }

    fn u8(self, at: usize) -> u8 {
        self.bytes::<1>(at)[0]
    }

    fn u16(self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    fn u32(self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    fn u64(self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }

    fn u128(self, at: usize) -> u128 {
        u128::from_le_bytes(self.bytes(at))
    }

    /// Text: printable ASCII, without the blanks around it.
    fn text<const N: usize>(self, at: usize) -> String {
        let bytes = self.bytes::<N>(at);
        let legible = |&b: &u8| if b.is_ascii_graphic() { char::from(b) } else { ' ' };
        let text: String = bytes.iter().map(legible).collect();
        text.trim().to_owned()
    }
}

/// 2^`shift` pages as bytes, `None` for 0 (no limit) and for what no transfer comes near.
fn pages_limit(shift: u8) -> Option<u64> {
    (1..=24).contains(&shift).then(|| PAGE_BYTES << shift)
}

/// Identify controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ControllerData {
    pub(super) vendor: u16,
    pub(super) serial: String,
    pub(super) model: String,
    pub(super) firmware: String,
    pub(super) cntlid: u16,
    /// 0 and 1: it does I/O.
    pub(super) kind: u8,
    /// Bytes of one command; `None`: no limit.
    pub(super) transfer_bytes_max: Option<u64>,
    pub(super) events: u32,
    /// Event requests at a time.
    pub(super) event_requests_max: usize,
    /// Highest namespace id.
    pub(super) namespaces_max: u32,
    pub(super) doorbell_buffer: bool,
    pub(super) discard: bool,
    pub(super) write_zeroes: bool,
    pub(super) write_cache: bool,
    pub(super) sgl: bool,
    /// Bytes, of controllers that like commands cut there.
    stripe_bytes: Option<u64>,
    entries_fit: bool,
}

impl ControllerData {
    pub(super) fn parse(page: &[u8], quirks: Quirks) -> ControllerData {
        let page = Page(page);
        let (sqes, cqes) = (page.u8(id_ctrl::SQES), page.u8(id_ctrl::CQES));
        // Required and maximal size, 2^n, in a nibble each; ours are 64 and 16 bytes.
        let fits = |sizes: u8, ours: u8| sizes & 0xf <= ours && sizes >> 4 >= ours;
        let oncs = page.u16(id_ctrl::ONCS);
        let sgl = matches!(page.u32(id_ctrl::SGLS) & 3, 1 | 2);
        let stripe = pages_limit(page.u8(id_ctrl::VS + 3));
        ControllerData {
            vendor: page.u16(id_ctrl::VID),
            serial: page.text::<20>(id_ctrl::SN),
            model: page.text::<40>(id_ctrl::MN),
            firmware: page.text::<8>(id_ctrl::FR),
            cntlid: page.u16(id_ctrl::CNTLID),
            kind: page.u8(id_ctrl::CNTRLTYPE),
            transfer_bytes_max: pages_limit(page.u8(id_ctrl::MDTS)),
            events: page.u32(id_ctrl::OAES),
            event_requests_max: usize::from(page.u8(id_ctrl::AERL_Z)) + 1,
            namespaces_max: page.u32(id_ctrl::NN),
            doorbell_buffer: page.u16(id_ctrl::OACS) & id_ctrl::OACS_DOORBELL_BUFFER != 0,
            discard: oncs & id_ctrl::ONCS_DSM != 0,
            write_zeroes: oncs & id_ctrl::ONCS_WRITE_ZEROES != 0
                && !quirks.has(Quirks::NO_WRITE_ZEROES),
            write_cache: page.u8(id_ctrl::VWC) & id_ctrl::VWC_PRESENT != 0,
            sgl: sgl && !quirks.has(Quirks::NO_SGL),
            stripe_bytes: stripe.filter(|_| quirks.has(Quirks::STRIPES)),
            entries_fit: fits(sqes, 6) && fits(cqes, 4),
        }
    }

    /// Why it cannot be used.
    pub(super) fn refusal(&self) -> Option<String> {
        if !self.entries_fit {
            return Some(
                "it does not take queue entries of 64 and 16 bytes, which every NVMe controller must"
                    .to_owned(),
            );
        }
        (!matches!(self.kind, 0 | 1)).then(|| {
            format!("it is no I/O controller (type {}); attach one that has namespaces", self.kind)
        })
    }

    /// What one command may carry.
    pub(super) fn command_bytes_max(&self) -> u32 {
        let limit = self.transfer_bytes_max.and_then(|bytes| u32::try_from(bytes).ok());
        limit.map_or(TRANSFER_BYTES_MAX, |bytes| bytes.min(TRANSFER_BYTES_MAX))
    }
}

/// Identify controller of the NVM command set; all zero where it has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SetLimits {
    /// It has the structure at all: write zeroes is not bound by MDTS then.
    known: bool,
    write_zeroes_shift: u8,
    ranges: u8,
    range_blocks: u32,
    blocks: u64,
}

impl SetLimits {
    /// The structure came with 2.0: what says success before that, and only zeroes, has none.
    pub(super) fn parse(page: &[u8], major: u16) -> SetLimits {
        let known = major >= 2 || page.iter().any(|byte| *byte != 0);
        let page = Page(page);
        SetLimits {
            known,
            write_zeroes_shift: page.u8(id_ctrl_nvm::WZSL),
            ranges: page.u8(id_ctrl_nvm::DMRL),
            range_blocks: page.u32(id_ctrl_nvm::DMRSL),
            blocks: page.u64(id_ctrl_nvm::DMSL),
        }
    }

    pub(super) fn discard(self) -> DiscardLimits {
        let whole = u16::try_from(nvm::DSM_RANGES_MAX).unwrap_or(u16::MAX);
        DiscardLimits {
            ranges_max: if self.ranges == 0 { whole } else { u16::from(self.ranges) },
            range_blocks_max: if self.range_blocks == 0 { u32::MAX } else { self.range_blocks },
            blocks_max: if self.blocks == 0 { u64::MAX } else { self.blocks },
        }
    }
}

/// What identifies a namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) uuid: Option<[u8; 16]>,
    pub(super) nguid: Option<[u8; 16]>,
    pub(super) eui64: Option<[u8; 8]>,
    /// Another command set than NVM.
    pub(super) foreign_set: Option<u8>,
}

fn some_id<const N: usize>(id: [u8; N]) -> Option<[u8; N]> {
    (id != [0; N]).then_some(id)
}

impl Identity {
    /// From the list of descriptors. A length that leads outside ends it.
    pub(super) fn read_descriptors(&mut self, list: &[u8]) {
        let mut at = 0;
        while let Some(head) = list.get(at..at + id_desc::HEAD_BYTES) {
            let (kind, len) = (head[0], usize::from(head[1]));
            let Some(id) = list.get(at + id_desc::HEAD_BYTES..).and_then(|rest| rest.get(..len))
            else {
                return;
            };
            // The list ends with zeroes; a type without a length would never end.
            if kind == 0 || len == 0 {
                return;
            }
            match kind {
                id_desc::UUID => self.uuid = id.try_into().ok().and_then(some_id::<16>),
                id_desc::NGUID => {
                    self.nguid = id.try_into().ok().and_then(some_id::<16>).or(self.nguid);
                }
                id_desc::EUI64 => {
                    self.eui64 = id.try_into().ok().and_then(some_id::<8>).or(self.eui64);
                }
                id_desc::COMMAND_SET => self.foreign_set = id.first().copied().filter(|&s| s != 0),
                _ => {}
            }
            at += id_desc::HEAD_BYTES + len;
        }
    }

    /// The same every time that this namespace is seen: its UUID, or one made of what it has.
    pub(super) fn uuid(&self, serial: &str, model: &str, nsid: u32, bogus: bool) -> Uuid {
        if !bogus {
            if let Some(uuid) = self.uuid.or(self.nguid) {
                return Uuid::from_bytes(uuid);
            }
            if let Some(eui64) = self.eui64 {
                return made_of(&[b"eui64", &eui64]);
            }
        }
        made_of(&[serial.as_bytes(), b"\0", model.as_bytes(), b"\0", &nsid.to_le_bytes()])
    }
}

/// A UUID of version 8 from bytes (FNV-1a, 128 bits): not secret, only always the same.
fn made_of(parts: &[&[u8]]) -> Uuid {
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let step = |hash: u128, byte: &u8| (hash ^ u128::from(*byte)).wrapping_mul(PRIME);
    let hash = parts.iter().flat_map(|part| part.iter()).fold(BASIS, step);
    uuid::Builder::from_custom_bytes(hash.to_be_bytes()).into_uuid()
}

/// Identify namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NamespaceData {
    pub(super) blocks_count: u64,
    pub(super) block_bytes: u32,
    metadata_bytes: u16,
    protection: u8,
    format_known: bool,
    /// Deallocated blocks read as zeroes, and write zeroes may deallocate.
    pub(super) deallocate_zeroes: bool,
    boundary_blocks: u16,
    write_granularity_blocks: Option<u32>,
    discard_granularity_blocks: Option<u32>,
    optimal_write_blocks: Option<u32>,
    pub(super) read_only: bool,
    pub(super) identity: Identity,
    /// Its list of descriptors was read, too.
    pub(super) described: bool,
}

impl NamespaceData {
    pub(super) fn parse(page: &[u8]) -> NamespaceData {
        let page = Page(page);
        let formatted = page.u8(id_ns::FLBAS);
        let formats_z = page.u8(id_ns::NLBAF_Z).saturating_add(page.u8(id_ns::NULBAF));
        // The upper bits of the number count only where there are that many (Base 2.0 §5.17.2.2).
        let upper = if formats_z >= 16 { (formatted >> 5 & 3) << 4 } else { 0 };
        let number = formatted & 0xf | upper;
        let [m0, m1, shift, _] = page.bytes::<4>(id_ns::LBAF + 4 * usize::from(number));
        let dlfeat = page.u8(id_ns::DLFEAT);
        let hints = page.u8(id_ns::NSFEAT) & 1 << 4 != 0;
        let hint = |at: usize| hints.then(|| u32::from(page.u16(at)) + 1);
        NamespaceData {
            blocks_count: page.u64(id_ns::NSZE),
            block_bytes: 1u32.checked_shl(u32::from(shift)).unwrap_or(0),
            metadata_bytes: u16::from_le_bytes([m0, m1]),
            protection: page.u8(id_ns::DPS) & 7,
            format_known: number <= formats_z && number < 64,
            deallocate_zeroes: dlfeat & 7 == 1 && dlfeat & 1 << 3 != 0,
            boundary_blocks: page.u16(id_ns::NOIOB),
            write_granularity_blocks: hint(id_ns::NPWG_Z),
            discard_granularity_blocks: hint(id_ns::NPDG_Z),
            optimal_write_blocks: hint(id_ns::NOWS_Z),
            read_only: page.u8(id_ns::NSATTR) & 1 != 0,
            identity: Identity {
                uuid: None,
                nguid: some_id(page.bytes::<16>(id_ns::NGUID)),
                eui64: some_id(page.bytes::<8>(id_ns::EUI64)),
                foreign_set: None,
            },
            described: false,
        }
    }

    /// Why it cannot be a disk, and what to do.
    pub(super) fn refusal(&self) -> Option<String> {
        let format = "format it (`nvme format --lbaf`)";
        if let Some(set) = self.identity.foreign_set {
            return Some(format!("it is of command set {set}, not NVM"));
        }
        if !self.format_known {
            return Some("it names a format that it does not have; it is broken".to_owned());
        }
        if !matches!(self.block_bytes, 512 | 4096) {
            let bytes = self.block_bytes;
            return Some(format!("its blocks have {bytes} bytes; {format} with 512 or 4096"));
        }
        if self.metadata_bytes != 0 {
            let bytes = self.metadata_bytes;
            return Some(format!("its blocks carry {bytes} bytes of metadata; {format} without"));
        }
        if self.protection != 0 {
            let kind = self.protection;
            return Some(format!("it has protection information of type {kind}; {format} without"));
        }
        if self.blocks_count == 0 {
            return Some("it has no blocks; attach or create a namespace with a size".to_owned());
        }
        let bytes = self.blocks_count.checked_mul(u64::from(self.block_bytes));
        bytes.is_none_or(|bytes| i64::try_from(bytes).is_err()).then(|| {
            format!("it claims {} blocks, more than 2^63 bytes; it is broken", self.blocks_count)
        })
    }

    /// For a namespace that was not refused: `blocks` of it as bytes that fit a geometry.
    fn bytes(&self, blocks: u32) -> u32 {
        blocks.saturating_mul(self.block_bytes)
    }

    pub(super) fn physical_block_bytes(&self) -> u32 {
        let preferred = self.write_granularity_blocks.map(|blocks| self.bytes(blocks));
        let sound = |bytes: &u32| bytes.is_power_of_two() && *bytes <= 1 << 20;
        preferred.filter(sound).unwrap_or(self.block_bytes)
    }

    /// Commands should not cross multiples of this; 0: none.
    pub(super) fn boundary_bytes(&self, controller: &ControllerData) -> u32 {
        match self.boundary_blocks {
            0 => {
                let stripe = controller.stripe_bytes.and_then(|bytes| u32::try_from(bytes).ok());
                stripe.unwrap_or(0)
            }
            blocks => self.bytes(u32::from(blocks)),
        }
    }

    pub(super) fn optimal_io_bytes(&self, controller: &ControllerData) -> u32 {
        let preferred = self.optimal_write_blocks.map(|blocks| self.bytes(blocks));
        preferred.unwrap_or_else(|| self.boundary_bytes(controller))
    }

    pub(super) fn discard_granularity_bytes(&self) -> u32 {
        self.discard_granularity_blocks.map_or(self.block_bytes, |blocks| self.bytes(blocks))
    }

    pub(super) fn write_zeroes(
        &self,
        controller: &ControllerData,
        limits: SetLimits,
    ) -> WriteZeroesLimits {
        let bytes = if limits.known {
            pages_limit(limits.write_zeroes_shift)
        } else {
            Some(u64::from(controller.command_bytes_max()))
        };
        let blocks = bytes.map(|bytes| bytes / u64::from(self.block_bytes.max(1)));
        let blocks = blocks.and_then(|blocks| u32::try_from(blocks).ok());
        WriteZeroesLimits {
            blocks_max: blocks.map_or(BLOCKS_MAX, |blocks| blocks.clamp(1, BLOCKS_MAX)),
            deallocate: self.deallocate_zeroes,
        }
    }
}

/// The ids in a list of 32-bit words, up to the first zero; those that do not rise above `after` end it, too, so that a
/// walk over all lists ends.
pub(super) fn rising_ids(list: &[u8], after: u32) -> Vec<u32> {
    let mut last = after;
    let mut ids = Vec::new();
    for word in list.as_chunks::<4>().0 {
        let id = u32::from_le_bytes(*word);
        if id <= last || id == u32::MAX {
            break;
        }
        ids.push(id);
        last = id;
    }
    ids
}

/// SMART / health information, fresh.
pub(super) fn parse_health(page: &[u8]) -> Health {
    let page = Page(page);
    Health {
        age: std::time::Duration::ZERO,
        critical_warning: page.u8(health::CRITICAL_WARNING),
        temperature_kelvin: page.u16(health::TEMPERATURE),
        available_spare: page.u8(health::SPARE),
        available_spare_threshold: page.u8(health::SPARE_THRESHOLD),
        percentage_used: page.u8(health::PERCENTAGE_USED),
        data_units_read: page.u128(health::DATA_UNITS_READ),
        data_units_written: page.u128(health::DATA_UNITS_WRITTEN),
        host_read_commands: page.u128(health::HOST_READS),
        host_write_commands: page.u128(health::HOST_WRITES),
        busy_minutes: page.u128(health::BUSY_MINUTES),
        power_cycles: page.u128(health::POWER_CYCLES),
        power_on_hours: page.u128(health::POWER_ON_HOURS),
        unsafe_shutdowns: page.u128(health::UNSAFE_SHUTDOWNS),
        media_errors: page.u128(health::MEDIA_ERRORS),
        error_log_entries: page.u128(health::ERROR_LOG_ENTRIES),
        warning_temperature_minutes: page.u32(health::WARNING_MINUTES),
        critical_temperature_minutes: page.u32(health::CRITICAL_MINUTES),
    }
}

/// What the critical warnings say.
pub(super) fn warning_words(bits: u8) -> Vec<&'static str> {
    const WORDS: [&str; 6] = [
        "spare blocks run out",
        "temperature out of range",
        "reliability degraded",
        "the medium is read-only",
        "the backup of volatile memory failed",
        "the persistent memory region is unreliable",
    ];
    (0..6).filter(|bit| bits & 1 << bit != 0).map(|bit| WORDS[bit]).collect()
}

#[cfg(test)]
#[path = "identify_tests.rs"]
mod tests;
