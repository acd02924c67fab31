//! I/O queues on the device: how many it grants, how they are made and deleted, doorbells in memory.
//!
//! Owner: the thread that attaches, then the controller's thread. **Invariant:** a queue exists on the device only while its
//! memory is held here or by its pair, and a completion queue before and after its submission queue.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ringmill_core::limits::NVME_QUEUE_ENTRIES_MAX;
use ringmill_core::mem::{DmaDomain, DmaMap, Mapping, SharedSlice};
use ringmill_core::spec::nvme::{Sqe, admin, feature};
use ringmill_core::units::HostAddr;

use super::NvmeError;
use super::admin::refused_with;
use super::controller::Controller;
use super::parts::{PAGE_BYTES, QueueMemory, ShadowDoorbells};
use super::quirks::{QUEUES_DELAY, Quirks};
use super::registers::doorbell_offset;
use crate::pci::{PciBacking, Registers};

/// Physically contiguous, which behind an IOMMU everything is.
const CONTIGUOUS: u32 = 1;
const INTERRUPTS: u32 = 1 << 1;

/// Doorbells in memory: decided when it is attached. A pair that has rung there once needs a device that looks there, and one
/// that has not, one that does not.
#[derive(Debug)]
pub(super) enum Shadow {
    Undecided,
    /// The device was told where they are, or may have been.
    Used(ShadowPages),
    /// It did not offer or did not take them. For good.
    Never,
    /// It has lost them in a reset: registers from then on. The pages stay, as they are its pairs' until those have obeyed.
    Lost(#[expect(dead_code, reason = "held only")] ShadowPages),
}

impl Shadow {
    /// Whether the device looks at them.
    pub(super) fn is_used(&self) -> bool {
        matches!(self, Shadow::Used(_))
    }

    /// Whether pairs have to ring registers that were made to ring in memory.
    pub(super) fn is_lost(&self) -> bool {
        matches!(self, Shadow::Lost(_))
    }
}

/// The two pages of doorbells in memory.
#[derive(Debug)]
pub(super) struct ShadowPages {
    doorbells: DmaMap,
    event_indices: DmaMap,
    iovas: (u64, u64),
}

impl ShadowPages {
    fn new(domain: &Arc<dyn DmaDomain>) -> Result<ShadowPages, NvmeError> {
        let page = || -> Result<(DmaMap, u64), NvmeError> {
            let mapping = Arc::new(Mapping::pool(PAGE_BYTES)?);
            let iova = domain.offset().iova(HostAddr(mapping.base().as_ptr() as usize));
            Ok((DmaMap::new(domain, &mapping)?, iova.0))
        };
        let ((doorbells, first), (event_indices, second)) = (page()?, page()?);
        Ok(ShadowPages { doorbells, event_indices, iovas: (first, second) })
    }
}

/// A page as a window.
fn window(map: &DmaMap) -> Option<SharedSlice> {
    SharedSlice::new(map.mapping(), 0, PAGE_BYTES, PAGE_BYTES)
}

impl<B: PciBacking> Controller<B> {
    /// Asks for queue pairs; returns how many of them it gives, at most as many as have doorbells. It may grant more.
    pub(super) fn ask_for_pairs(&mut self, wanted: u16) -> Result<u16, NvmeError> {
        let stride = self.cap.doorbell_stride();
        let len_bytes = self.bar.registers().len_bytes();
        let fits = |pairs: &u16| doorbell_offset(*pairs, true, stride) + 4 <= len_bytes;
        let Some(wanted) = (1..=wanted).rev().find(fits) else {
            return Err(self.bar.refused(
                "its registers (BAR 0) have no room for the doorbells of a single I/O queue",
            ));
        };
        let count_z = u32::from(wanted - 1);
        let mut entry = Sqe::new(admin::SET_FEATURES, 0, 0);
        entry.0[10] = feature::NUMBER_OF_QUEUES;
        entry.0[11] = count_z | count_z << 16;
        let what = "set features (number of queues)";
        let [granted, _] = self.admin.command(&self.bar, entry, what, self.timeout_admin)?;
        let [s0, s1, c0, c1] = granted.to_le_bytes();
        let least_z = u16::from_le_bytes([s0, s1]).min(u16::from_le_bytes([c0, c1]));
        self.pairs_granted = least_z.saturating_add(1);
        Ok(self.pairs_granted.min(wanted))
    }

    /// Entries of each queue.
    pub(super) fn queue_entries(&self, wanted: u16) -> u16 {
        let most = u16::try_from(self.cap.queue_entries_max()).unwrap_or(u16::MAX);
        wanted.min(most).clamp(2, NVME_QUEUE_ENTRIES_MAX)
    }

    /// Offsets of both doorbells of a pair.
    pub(super) fn doorbells(&self, queue_id: u16) -> (usize, usize) {
        let stride = self.cap.doorbell_stride();
        (doorbell_offset(queue_id, false, stride), doorbell_offset(queue_id, true, stride))
    }

    /// Tells the device where doorbells in memory are, if it takes that. After every enable, before there are queues.
    pub(super) fn set_up_shadow(&mut self, pairs_max: u16) -> Result<(), NvmeError> {
        let (_, last) = self.doorbells(pairs_max);
        // One page is all that the command has.
        let is_offered =
            self.data.doorbell_buffer && last + 4 - doorbell_offset(0, false, 0) <= PAGE_BYTES;
        let was_used = self.shadow.is_used();
        let pages = match std::mem::replace(&mut self.shadow, Shadow::Never) {
            Shadow::Used(pages) if is_offered => pages,
            Shadow::Used(pages) => {
                let device = self.bar.device();
                tracing::warn!(
                    "{device}: it has no doorbells in memory after its reset; it gets registers"
                );
                self.shadow = Shadow::Lost(pages);
                return Ok(());
            }
            Shadow::Undecided if is_offered => ShadowPages::new(&self.backing.dma())?,
            Shadow::Undecided => return Ok(()),
            decided => {
                self.shadow = decided;
                return Ok(());
            }
        };
        let mut entry = Sqe::new(admin::DOORBELL_BUFFER, 0, 0);
        entry.set_prps(pages.iovas.0, pages.iovas.1);
        // The device may read the admin queue's words as soon as it has fetched this command: they follow its doorbells from
        // here on.
        if let (Some(values), Some(indices)) =
            (window(&pages.doorbells), window(&pages.event_indices))
        {
            self.admin.use_shadow(values, &indices);
        }
        let what = "doorbell buffer config";
        let end = self.admin.command(&self.bar, entry, what, self.timeout_admin);
        let refusal = end.as_ref().err().filter(|error| refused_with(error).is_some());
        let Some(refusal) = refusal else {
            // Without an answer it may look there in spite of all.
            self.shadow = Shadow::Used(pages);
            return end.map(|_| ());
        };
        tracing::warn!("{refusal}; its doorbells are registers, then");
        self.admin.forget_shadow();
        self.shadow = if was_used { Shadow::Lost(pages) } else { Shadow::Never };
        Ok(())
    }

    /// A pair's words in them, zeroed for a new pair.
    pub(super) fn shadow_of(&self, queue_id: u16) -> Option<ShadowDoorbells> {
        let Shadow::Used(pages) = &self.shadow else { return None };
        let first = doorbell_offset(0, false, 0);
        let (sq, cq) = self.doorbells(queue_id);
        let (sq_at_bytes, cq_at_bytes) = (sq - first, cq - first);
        for map in [&pages.doorbells, &pages.event_indices] {
            let page = window(map)?;
            for at in [sq_at_bytes, cq_at_bytes] {
                page.store_u32(at, 0, Ordering::Relaxed);
            }
        }
        Some(ShadowDoorbells {
            doorbells: Arc::clone(pages.doorbells.mapping()),
            event_indices: Arc::clone(pages.event_indices.mapping()),
            sq_at_bytes,
            cq_at_bytes,
        })
    }

    /// Makes both queues of a pair.
    pub(super) fn create_pair(
        &mut self,
        queue_id: u16,
        memory: &QueueMemory,
        vector: Option<u16>,
    ) -> Result<(), NvmeError> {
        let within = self.timeout_admin;
        let head = u32::from(memory.entries() - 1) << 16 | u32::from(queue_id);
        let mut entry = Sqe::new(admin::CREATE_CQ, 0, 0);
        entry.set_prps(memory.cq_iova().0, 0);
        entry.0[10] = head;
        entry.0[11] = vector.map_or(CONTIGUOUS, |v| u32::from(v) << 16 | INTERRUPTS | CONTIGUOUS);
        self.admin.command(&self.bar, entry, "create I/O completion queue", within)?;
        let mut entry = Sqe::new(admin::CREATE_SQ, 0, 0);
        entry.set_prps(memory.sq_iova().0, 0);
        entry.0[10] = head;
        entry.0[11] = u32::from(queue_id) << 16 | CONTIGUOUS;
        let made = self.admin.command(&self.bar, entry, "create I/O submission queue", within);
        if let Err(error) = made {
            // After no answer nothing can be asked; the reset that follows forgets both.
            if refused_with(&error).is_some()
                && let Err(second) =
                    self.delete(admin::DELETE_CQ, queue_id, ("delete I/O completion queue", within))
            {
                return Err(self.bar.refused(format!("{error}; then: {second}")));
            }
            return Err(error);
        }
        if self.quirks.has(Quirks::DELAY_AFTER_QUEUES) {
            self.bar.pause(QUEUES_DELAY)?;
        }
        Ok(())
    }

    fn delete(
        &mut self,
        opcode: u8,
        queue_id: u16,
        (what, within): (&'static str, Duration),
    ) -> Result<(), NvmeError> {
        let mut entry = Sqe::new(opcode, 0, 0);
        entry.0[10] = u32::from(queue_id);
        self.admin.command(&self.bar, entry, what, within.min(self.timeout_admin)).map(|_| ())
    }

    /// Deletes both. Its commands have ended then.
    pub(super) fn delete_pair(&mut self, queue_id: u16, within: Duration) -> Result<(), NvmeError> {
        self.delete(admin::DELETE_SQ, queue_id, ("delete I/O submission queue", within))?;
        self.delete(admin::DELETE_CQ, queue_id, ("delete I/O completion queue", within))
    }

    /// Asks for the end of a command; true when the device says that it ends it.
    pub(super) fn abort(
        &mut self,
        queue_id: u16,
        cid: u16,
        within: Duration,
    ) -> Result<bool, NvmeError> {
        let mut entry = Sqe::new(admin::ABORT, 0, 0);
        entry.0[10] = u32::from(cid) << 16 | u32::from(queue_id);
        let [result, _] = self.admin.command(&self.bar, entry, "abort", within)?;
        Ok(result & 1 == 0)
    }
}
