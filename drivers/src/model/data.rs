//! From a command's data pointer to pieces of memory: PRP entries, PRP lists, SGL segments, every rule checked.
//!
//! Flow: dwords 6 to 9 of a command and the length of its data → [`Piece`]s in order, or why not (Base 2.0 §4.1).
//! **Invariant:** pieces come from the table of what is mapped, so nothing else is ever touched; lists are read once, and
//! every loop is bounded by the length of the data or by [`SGL_DESCRIPTORS_MAX`].

use ringmill_core::mem::Segment;
use ringmill_core::spec::nvme::{PSDT_SGL, Sqe, sgl, status};
use ringmill_core::units::{len_u32, usize_of};

use super::dma::Reach;
use super::options::Sgls;

/// What one command may have; more is refused.
const SGL_DESCRIPTORS_MAX: u64 = 1 << 16;

const PRP_BYTES: u64 = 8;

/// Both bits of dword 0 that say what the data pointer is.
const PSDT_MASK: u32 = 3 << 14;

/// A piece of a command's data.
#[derive(Clone, Copy, Debug)]
pub enum Piece {
    /// In the driver's memory.
    Memory(Segment),
    /// Bytes to be left out.
    Bucket(u32),
}

impl Piece {
    #[inline]
    pub(super) fn len_bytes(&self) -> u32 {
        match self {
            Piece::Memory(segment) => segment.len_bytes(),
            Piece::Bucket(len_bytes) => *len_bytes,
        }
    }
}

/// Why a command is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: u16,
    /// The driver is to blame.
    pub(super) blame: Option<&'static str>,
    /// An access was outside of what is mapped.
    pub(super) is_fault: bool,
}

impl Refusal {
    pub(super) const fn plain(status: u16) -> Refusal {
        Refusal { status, blame: None, is_fault: false }
    }

    pub(super) const fn blame(status: u16, text: &'static str) -> Refusal {
        Refusal { status, blame: Some(text), is_fault: false }
    }

    pub(super) const fn fault() -> Refusal {
        Refusal { status: status::DATA_TRANSFER_ERROR, blame: None, is_fault: true }
    }
}

/// The way that data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Controller to driver.
    ToHost,
    /// Driver to controller.
    FromHost,
}

/// Walks data pointers.
#[derive(Debug)]
pub(super) struct Walker {
    pub(super) page_bytes: u64,
    pub(super) sgls: Sgls,
    pub(super) bit_bucket: bool,
    pub(super) pieces: Vec<Piece>,
    list: Vec<u8>,
}

impl Walker {
    pub(super) fn new(sgls: Sgls, bit_bucket: bool) -> Walker {
        Walker {
            page_bytes: 4096,
            sgls,
            bit_bucket,
            pieces: Vec::with_capacity(1024),
            list: Vec::with_capacity(4096),
        }
    }

    /// Finds all pieces of `len_bytes` of data; true in the answer: by an SGL.
    #[inline]
    pub(super) fn walk(
        &mut self,
        reach: &mut Reach,
        sqe: &Sqe,
        len_bytes: u64,
        way: Way,
        is_admin: bool,
    ) -> Result<bool, Refusal> {
        self.pieces.clear();
        match sqe.0[0] & PSDT_MASK {
            0 => self.prps(reach, sqe.u64_at(6), sqe.u64_at(8), len_bytes).map(|()| false),
            PSDT_SGL if !is_admin && self.sgls != Sgls::None => {
                self.sgl(reach, sqe, len_bytes, way).map(|()| true)
            }
            _ => Err(Refusal::blame(status::INVALID_FIELD, "PSDT that is not supported")),
        }
    }

    /// One run of the driver's memory.
    #[inline]
    fn push(
        &mut self,
        reach: &mut Reach,
        mut iova: u64,
        mut len_bytes: u64,
    ) -> Result<(), Refusal> {
        while len_bytes > 0 {
            let segment = reach.at(iova, len_u32(usize_of(len_bytes))).ok_or(Refusal::fault())?;
            self.pieces.push(Piece::Memory(segment));
            let done = u64::from(segment.len_bytes());
            len_bytes -= done;
            iova = match iova.checked_add(done) {
                Some(next) => next,
                None if len_bytes == 0 => break,
                None => return Err(Refusal::fault()),
            };
        }
        Ok(())
    }

    #[inline]
    fn prps(
        &mut self,
        reach: &mut Reach,
        first: u64,
        second: u64,
        len_bytes: u64,
    ) -> Result<(), Refusal> {
        let offset_bytes = first & (self.page_bytes - 1);
        if first & 3 != 0 {
            return Err(Refusal::blame(status::INVALID_PRP_OFFSET, "PRP1 is not dword aligned"));
        }
        let first_bytes = len_bytes.min(self.page_bytes - offset_bytes);
        self.push(reach, first, first_bytes)?;
        let rest_bytes = len_bytes - first_bytes;
        if rest_bytes == 0 {
            return Ok(());
        }
        if rest_bytes <= self.page_bytes {
            return self.prp_page(reach, second, rest_bytes);
        }
        self.prp_list(reach, second, rest_bytes)
    }

    fn prp_page(&mut self, reach: &mut Reach, entry: u64, len_bytes: u64) -> Result<(), Refusal> {
        if entry & (self.page_bytes - 1) != 0 {
            let text = "a PRP entry after the first has an offset";
            return Err(Refusal::blame(status::INVALID_PRP_OFFSET, text));
        }
        self.push(reach, entry, len_bytes)
    }

    #[inline(never)]
    fn prp_list(
        &mut self,
        reach: &mut Reach,
        mut list_iova: u64,
        mut rest_bytes: u64,
    ) -> Result<(), Refusal> {
        if list_iova & (PRP_BYTES - 1) != 0 {
            let text = "a PRP list is not qword aligned";
            return Err(Refusal::blame(status::INVALID_PRP_OFFSET, text));
        }
        while rest_bytes > 0 {
            let places = (self.page_bytes - (list_iova & (self.page_bytes - 1))) / PRP_BYTES;
            let entries = rest_bytes.div_ceil(self.page_bytes);
            // The last place of a full page points to the next page, unless it holds the last entry.
            let is_chained = entries > places;
            let count = entries.min(places);
            let mut list = std::mem::take(&mut self.list);
            list.resize(usize_of(count * PRP_BYTES), 0);
            let was_read = reach.read(list_iova, &mut list);
            let result = if was_read {
                self.prp_entries(reach, &list, is_chained, &mut rest_bytes)
            } else {
                Err(Refusal::fault())
            };
            self.list = list;
            let Some(next) = result? else { return Ok(()) };
            if next & (self.page_bytes - 1) != 0 {
                let text = "the pointer to a further PRP list has an offset";
                return Err(Refusal::blame(status::INVALID_PRP_OFFSET, text));
            }
            list_iova = next;
        }
        Ok(())
    }

    /// The data of one page of a list; answers the pointer to the next one.
    fn prp_entries(
        &mut self,
        reach: &mut Reach,
        list: &[u8],
        is_chained: bool,
        rest_bytes: &mut u64,
    ) -> Result<Option<u64>, Refusal> {
        let (entries, _) = list.as_chunks::<8>();
        let mut entries = entries.iter().map(|bytes| u64::from_le_bytes(*bytes));
        let next = if is_chained { entries.next_back() } else { None };
        for entry in entries {
            let len_bytes = self.page_bytes.min(*rest_bytes);
            self.prp_page(reach, entry, len_bytes)?;
            *rest_bytes -= len_bytes;
        }
        Ok(next)
    }

    #[inline(never)]
    fn sgl(
        &mut self,
        reach: &mut Reach,
        sqe: &Sqe,
        len_bytes: u64,
        way: Way,
    ) -> Result<(), Refusal> {
        let mut descriptor = Descriptor {
            iova: sqe.u64_at(6),
            len_bytes: sqe.0[8],
            kind: sqe.0[9].to_le_bytes()[3],
            is_reserved_clear: sqe.0[9] & 0xff_ffff == 0,
        };
        let mut left_bytes = len_bytes;
        let mut seen = 0;
        loop {
            let is_last = match descriptor.kind {
                sgl::DATA_BLOCK | sgl::BIT_BUCKET => {
                    self.sgl_data(reach, &descriptor, &mut left_bytes, way)?;
                    break;
                }
                sgl::SEGMENT => false,
                sgl::LAST_SEGMENT => true,
                _ => return Err(invalid_type()),
            };
            let next =
                self.sgl_segment(reach, &descriptor, is_last, &mut left_bytes, way, &mut seen);
            let Some(next) = next? else { break };
            descriptor = next;
        }
        if left_bytes > 0 {
            return Err(Refusal::blame(status::INVALID_SGL_LENGTH, "an SGL shorter than its data"));
        }
        Ok(())
    }

    /// One segment; answers the descriptor of the next one.
    fn sgl_segment(
        &mut self,
        reach: &mut Reach,
        segment: &Descriptor,
        is_last: bool,
        left_bytes: &mut u64,
        way: Way,
        seen: &mut u64,
    ) -> Result<Option<Descriptor>, Refusal> {
        let len_bytes = u64::from(segment.len_bytes);
        let count = len_bytes / sgl::BYTES as u64;
        if count == 0 || !len_bytes.is_multiple_of(sgl::BYTES as u64) || segment.iova & 7 != 0 {
            let text = "an SGL segment that is empty, cut off or not qword aligned";
            return Err(Refusal::blame(status::INVALID_SGL_SEGMENT, text));
        }
        *seen += count;
        if *seen > SGL_DESCRIPTORS_MAX {
            return Err(Refusal::blame(status::INVALID_SGL_COUNT, "too many SGL descriptors"));
        }
        for at in 0..count {
            let mut bytes = [0; sgl::BYTES];
            let iova = segment.iova.checked_add(at * sgl::BYTES as u64).ok_or(Refusal::fault())?;
            if !reach.read(iova, &mut bytes) {
                return Err(Refusal::fault());
            }
            let descriptor = Descriptor::parse(&bytes);
            let is_segment = matches!(descriptor.kind, sgl::SEGMENT | sgl::LAST_SEGMENT);
            if is_segment && (is_last || at + 1 != count) {
                let text = "an SGL segment descriptor where none may be";
                return Err(Refusal::blame(status::INVALID_SGL_SEGMENT, text));
            }
            if is_segment {
                return Ok(Some(descriptor));
            }
            self.sgl_data(reach, &descriptor, left_bytes, way)?;
        }
        if is_last {
            return Ok(None);
        }
        let text = "an SGL segment that is not the last has no successor";
        Err(Refusal::blame(status::INVALID_SGL_SEGMENT, text))
    }

    fn sgl_data(
        &mut self,
        reach: &mut Reach,
        descriptor: &Descriptor,
        left_bytes: &mut u64,
        way: Way,
    ) -> Result<(), Refusal> {
        let len_bytes = u64::from(descriptor.len_bytes);
        if !descriptor.is_reserved_clear {
            return Err(Refusal::blame(
                status::INVALID_FIELD,
                "reserved bytes of an SGL descriptor",
            ));
        }
        if len_bytes > *left_bytes {
            return Err(Refusal::blame(status::INVALID_SGL_LENGTH, "an SGL longer than its data"));
        }
        match descriptor.kind {
            sgl::DATA_BLOCK => {
                let mask = descriptor.iova | len_bytes;
                if self.sgls == Sgls::Dwords && mask & 3 != 0 {
                    let text = "an SGL data block that is not dword aligned";
                    return Err(Refusal::blame(status::INVALID_FIELD, text));
                }
                self.push(reach, descriptor.iova, len_bytes)?;
            }
            sgl::BIT_BUCKET if self.bit_bucket && way == Way::ToHost => {
                self.pieces.push(Piece::Bucket(descriptor.len_bytes));
            }
            _ => return Err(invalid_type()),
        }
        *left_bytes -= len_bytes;
        Ok(())
    }
}

const fn invalid_type() -> Refusal {
    Refusal::blame(status::INVALID_SGL_TYPE, "an SGL descriptor type that is not supported")
}

struct Descriptor {
    iova: u64,
    len_bytes: u32,
    kind: u8,
    is_reserved_clear: bool,
}

impl Descriptor {
    fn parse(bytes: &[u8; sgl::BYTES]) -> Descriptor {
        let (low, high) = bytes.split_at(8);
        let low = low.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let len_bytes = high.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        let is_reserved_clear = bytes[12..15].iter().all(|byte| *byte == 0);
        Descriptor { iova: low, len_bytes, kind: bytes[15], is_reserved_clear }
    }
}
