//! What a controller is asked about: itself, its namespaces, its log pages.
//!
//! Owner: the thread that attaches, then the controller's thread. **Invariant:** every list that a device sends is walked a
//! bounded number of times, and a question that it refuses leaves the answer to an older one valid.

use std::time::Duration;

use ringmill_core::limits::NVME_NAMESPACES_MAX;
use ringmill_core::spec::nvme::{
    IDENTIFY_BYTES, NSID_ALL, Sqe, Status, admin, cns, event, feature, log, status,
};
use ringmill_core::units::len_u32;

use super::NvmeError;
use super::admin::{Event, refused_with};
use super::controller::Controller;
use super::identify::{ControllerData, NamespaceData, SetLimits, parse_health, rising_ids};
use super::quirks::Quirks;
use super::report::Health;
use crate::pci::PciBacking;

/// Bytes of a log page that is read for nothing but to clear its event.
const LOG_PEEK_BYTES: usize = 512;

/// How often a question is asked whose refusal may pass, and the pause between.
const TRIES_MAX: usize = 4;
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(20);

/// Whether a refusal means that the device does not know what it was asked, now or ever.
fn is_unknown(answer: Status) -> bool {
    answer.do_not_retry()
        || matches!(
            answer.kind(),
            status::INVALID_OPCODE | status::INVALID_FIELD | status::INVALID_NAMESPACE
        )
}

impl<B: PciBacking> Controller<B> {
    fn ask(&mut self, what: &'static str, cns: u32, nsid: u32) -> Result<Vec<u8>, NvmeError> {
        let mut entry = Sqe::new(admin::IDENTIFY, 0, nsid);
        entry.0[10] = cns;
        self.admin.read(&self.bar, entry, IDENTIFY_BYTES, what, self.timeout_admin)
    }

    /// The same, where a refusal may mean that it does not know the question. One that may pass is asked about again.
    fn ask_if_known(
        &mut self,
        what: &'static str,
        cns: u32,
        nsid: u32,
    ) -> Result<Option<Vec<u8>>, NvmeError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let error = match self.ask(what, cns, nsid) {
                Ok(page) => return Ok(Some(page)),
                Err(error) => error,
            };
            match refused_with(&error) {
                Some(status) if is_unknown(status) => return Ok(None),
                Some(_) if tries < TRIES_MAX => std::thread::sleep(TRY_AGAIN_AFTER),
                _ => return Err(error),
            }
        }
    }

    /// Who it is. After a reset it must be the same.
    pub(super) fn identify(&mut self) -> Result<(), NvmeError> {
        let page = self.ask("identify controller", cns::CONTROLLER, 0)?;
        let data = ControllerData::parse(&page, self.quirks);
        if let Some(reason) = data.refusal() {
            return Err(self.bar.refused(reason));
        }
        // CNS has 8 bits since 1.2; older controllers take other values for something else.
        let (major, minor, _) = self.version;
        let has_more = (major, minor) >= (1, 2) && !self.quirks.has(Quirks::IDENTIFY_0_AND_1);
        let page = if has_more {
            self.ask_if_known("identify command set", cns::CONTROLLER_OF_SET, 0)?
        } else {
            None
        };
        self.limits = page.map_or_else(SetLimits::default, |page| SetLimits::parse(&page, major));
        self.data = data;
        Ok(())
    }

    /// The ids of its namespaces, at most [`NVME_NAMESPACES_MAX`].
    fn namespace_ids(&mut self) -> Result<Vec<u32>, NvmeError> {
        let (major, minor, _) = self.version;
        let mut ids = Vec::new();
        if (major, minor) >= (1, 1) && !self.quirks.has(Quirks::IDENTIFY_0_AND_1) {
            let what = "identify active namespaces";
            let whole = IDENTIFY_BYTES / size_of::<u32>();
            while let Some(page) = {
                let after = ids.last().copied().unwrap_or(0);
                self.ask_if_known(what, cns::ACTIVE_NAMESPACES, after)?
            } {
                let more = rising_ids(&page, ids.last().copied().unwrap_or(0));
                let is_last = more.len() < whole;
                ids.extend(more);
                if is_last || ids.len() >= NVME_NAMESPACES_MAX {
                    return Ok(self.bounded(ids));
                }
            }
        }
        // It has no lists: every number up to the highest may be one.
        let highest = self.data.namespaces_max.min(len_u32(NVME_NAMESPACES_MAX + 1));
        Ok(self.bounded((1..=highest).collect()))
    }

    fn bounded(&self, mut ids: Vec<u32>) -> Vec<u32> {
        if ids.len() > NVME_NAMESPACES_MAX {
            let device = self.bar.device();
            tracing::warn!("{device}: only the first {NVME_NAMESPACES_MAX} namespaces are used");
            ids.truncate(NVME_NAMESPACES_MAX);
        }
        ids
    }

    /// Its active namespaces, by number.
    pub(super) fn namespaces(&mut self) -> Result<Vec<(u32, NamespaceData)>, NvmeError> {
        let mut found = Vec::new();
        for nsid in self.namespace_ids()? {
            let Some(page) = self.ask_if_known("identify namespace", cns::NAMESPACE, nsid)? else {
                continue;
            };
            // Inactive ones answer nothing but zeroes.
            if page.iter().all(|&byte| byte == 0) {
                continue;
            }
            let mut data = NamespaceData::parse(&page);
            let (major, minor, _) = self.version;
            let cannot = Quirks::has(self.quirks, Quirks::IDENTIFY_0_AND_1)
                || self.quirks.has(Quirks::NO_DESCRIPTORS);
            if (major, minor) >= (1, 3) && !cannot {
                let what = "identify namespace descriptors";
                if let Some(list) = self.ask_if_known(what, cns::NAMESPACE_DESCRIPTORS, nsid)? {
                    data.identity.read_descriptors(&list);
                    data.described = true;
                }
            }
            found.push((nsid, data));
        }
        Ok(found)
    }

    fn log_page(&mut self, page: u8, len_bytes: usize) -> Result<Vec<u8>, NvmeError> {
        let mut entry = Sqe::new(admin::GET_LOG_PAGE, 0, NSID_ALL);
        let words_z = len_u32(len_bytes / size_of::<u32>()).saturating_sub(1);
        entry.0[10] = words_z << 16 | u32::from(page);
        self.admin.read(&self.bar, entry, len_bytes, "get log page", self.timeout_admin)
    }

    /// SMART.
    pub(super) fn health(&mut self) -> Result<Health, NvmeError> {
        let page = self.log_page(log::HEALTH, ringmill_core::spec::nvme::health::BYTES)?;
        Ok(parse_health(&page))
    }

    /// Waits until it has fetched what was sent, event requests too: it has once it answers something that came after them.
    pub(super) fn settle(&mut self, within: Duration) -> Result<(), NvmeError> {
        if !self.admin.has_unfetched() || self.admin.is_broken() {
            return Ok(());
        }
        let mut entry = Sqe::new(admin::GET_FEATURES, 0, 0);
        entry.0[10] = feature::NUMBER_OF_QUEUES;
        match self.admin.command(&self.bar, entry, "get features (number of queues)", within) {
            Err(error) if refused_with(&error).is_none() => Err(error),
            _ => Ok(()),
        }
    }

    /// Asks to be told of what happens.
    pub(super) fn watch_events(&mut self) -> Result<(), NvmeError> {
        let (major, minor, _) = self.version;
        let optional = event::ENABLE_NAMESPACE & self.data.events;
        let reserved = if (major, minor) < (1, 4) { event::ENABLE_HEALTH_SINCE_1_4 } else { 0 };
        let health = event::ENABLE_HEALTH & !reserved;
        // One bit that it does not like must not cost the others.
        for wanted in [health | optional, optional, 0] {
            let mut entry = Sqe::new(admin::SET_FEATURES, 0, 0);
            entry.0[10] = feature::ASYNC_EVENTS;
            entry.0[11] = wanted;
            let what = "set features (events)";
            match self.admin.command(&self.bar, entry, what, self.timeout_admin) {
                Ok(_) => break,
                Err(error) if refused_with(&error).is_none() => return Err(error),
                Err(error) => tracing::warn!("{error}; it was asked for events {wanted:#x}"),
            }
        }
        self.admin.want_events(&self.bar, self.data.event_requests_max);
        Ok(())
    }

    /// Reads the log page of an event, without which it does not come again. A page that it does not know needs no reading.
    pub(super) fn clear_event(&mut self, event: Event) -> Result<(), NvmeError> {
        let len_bytes =
            if event.log_page == log::CHANGED_NAMESPACES { IDENTIFY_BYTES } else { LOG_PEEK_BYTES };
        match self.log_page(event.log_page, len_bytes) {
            Err(error) if refused_with(&error).is_some_and(is_unknown) => Ok(()),
            end => end.map(|_| ()),
        }
    }
}
