//! Admin commands: queues, identify, features, log pages, events, aborts (Base 2.0 §5).
//!
//! Flow: a command of queue 0 → checked as strictly as the specification allows → state changed, data sent. Owner: the
//! model's thread. What a driver must not do is counted as a protocol error besides its status.

use std::collections::VecDeque;

use ringmill_core::spec::nvme::{
    IDENTIFY_BYTES, NSID_ALL, Sqe, Status, admin, cc, cns, event, feature, health, log, nvm, reg,
    status,
};
use ringmill_core::units::{index, len_u32, usize_of};
use std::sync::atomic::Ordering;

use super::counters::Count;
use super::data::{Piece, Refusal, Way};
use super::dma::Reach;
use super::faults::Aborts;
use super::held::Plan;
use super::identify;
use super::lies::Lie;
use super::link::lock;
use super::machine::{Answer, Machine};
use super::options::{ModelOptions, Vectors};
use super::queue::{Cq, Sq};
use super::shadow::Shadow;

/// Deletion of a completion queue that is in use.
const INVALID_QUEUE_DELETION: u16 = 0x10c;
/// The feature cannot be saved.
const FEATURE_NOT_SAVEABLE: u16 = 0x10d;
/// Commands in the wrong order.
const COMMAND_SEQUENCE: u16 = 0x00c;

/// Entries of the error log.
const ERRORS_KEPT: usize = 64;
const ERROR_BYTES: usize = 64;

/// What set and get features know besides those with a meaning here: a word each.
const PLAIN_FEATURES: [u32; 6] = [0x01, 0x02, 0x04, 0x05, feature::INTERRUPT_COALESCING, 0x0a];

const FEATURES: usize = 0x10;

/// An event that waits for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Event {
    kind: u8,
    info: u8,
    log: u8,
}

/// What the admin commands know.
#[derive(Debug)]
pub(super) struct Admin {
    features: [u32; FEATURES],
    /// I/O queues granted.
    granted: u16,
    /// Set features asked for them.
    pub(super) requests: VecDeque<u16>,
    events: VecDeque<Event>,
    /// Event types that wait for their log page to be read, a bit each.
    masked: u8,
    changed: Vec<u32>,
    errors: VecDeque<[u8; ERROR_BYTES]>,
    errors_count: u64,
    pub(super) health: [u8; health::BYTES],
    pub(super) shadow: Option<Shadow>,
}

impl Admin {
    pub(super) fn new(options: &ModelOptions) -> Admin {
        let mut page = [0; health::BYTES];
        page[health::TEMPERATURE..health::TEMPERATURE + 2].copy_from_slice(&310u16.to_le_bytes());
        page[health::SPARE] = 100;
        page[health::SPARE_THRESHOLD] = 10;
        page[health::POWER_CYCLES] = 1;
        let mut admin = Admin {
            features: [0; FEATURES],
            granted: 0,
            requests: VecDeque::new(),
            events: VecDeque::new(),
            masked: 0,
            changed: Vec::new(),
            errors: VecDeque::new(),
            errors_count: 0,
            health: page,
            shadow: None,
        };
        admin.reset(options);
        admin
    }

    /// As after a controller reset: logs stay.
    pub(super) fn reset(&mut self, options: &ModelOptions) {
        self.features = [0; FEATURES];
        self.features[index(feature::WRITE_CACHE)] = u32::from(options.write_cache);
        self.granted = options.io_queues_max;
        self.requests.clear();
        self.events.clear();
        self.masked = 0;
        self.changed.clear();
        self.shadow = None;
    }

    /// True when a page was there, and is not any more.
    pub(super) fn attach_shadow(&mut self, reach: &Reach) -> bool {
        self.shadow.as_mut().is_some_and(|shadow| shadow.attach(reach))
    }

    pub(super) fn write_cache_is_on(&self) -> bool {
        self.features[index(feature::WRITE_CACHE)] & 1 != 0
    }

    pub(super) fn log_error(&mut self, queue: u16, sqe: &Sqe, status: u16) {
        self.errors_count += 1;
        let mut entry = [0; ERROR_BYTES];
        entry[..8].copy_from_slice(&self.errors_count.to_le_bytes());
        entry[8..10].copy_from_slice(&queue.to_le_bytes());
        entry[10..14].copy_from_slice(&(sqe.0[0] >> 16 | u32::from(status) << 17).to_le_bytes());
        entry[16..24].copy_from_slice(&sqe.u64_at(10).to_le_bytes());
        entry[24..28].copy_from_slice(&sqe.0[1].to_le_bytes());
        self.errors.push_front(entry);
        self.errors.truncate(ERRORS_KEPT);
    }

    fn log_page(&self, id: u8) -> Option<Vec<u8>> {
        Some(match id {
            log::ERROR => {
                let mut page: Vec<u8> = self.errors.iter().flatten().copied().collect();
                page.resize(ERRORS_KEPT * ERROR_BYTES, 0);
                page
            }
            log::HEALTH => {
                let mut page = self.health.to_vec();
                let at = health::ERROR_LOG_ENTRIES;
                page[at..at + 8].copy_from_slice(&self.errors_count.to_le_bytes());
                page
            }
            log::FIRMWARE_SLOT => {
                let mut page = vec![0; 512];
                page[0] = 1;
                page
            }
            log::CHANGED_NAMESPACES => {
                let mut page: Vec<u8> =
                    self.changed.iter().flat_map(|id| id.to_le_bytes()).collect();
                page.resize(4096, 0);
                page
            }
            _ => return None,
        })
    }

    /// The type of event that reading a log page allows again.
    fn kind_of_log(id: u8) -> Option<u8> {
        match id {
            log::ERROR => Some(event::ERROR),
            log::HEALTH => Some(event::HEALTH),
            log::CHANGED_NAMESPACES => Some(event::NOTICE),
            _ => None,
        }
    }
}

impl Machine {
    /// Executes an admin command.
    pub(super) fn execute_admin(&mut self, sqe: &Sqe) -> Answer {
        let opcode = sqe.0[0].to_le_bytes()[0];
        let result = match opcode {
            admin::CREATE_CQ => self.create_cq(sqe),
            admin::CREATE_SQ => self.create_sq(sqe),
            admin::DELETE_SQ => self.delete_sq(sqe),
            admin::DELETE_CQ => self.delete_cq(sqe),
            admin::IDENTIFY => self.identify(sqe),
            admin::GET_LOG_PAGE => self.get_log_page(sqe),
            admin::SET_FEATURES => self.set_features(sqe),
            admin::GET_FEATURES => self.get_features(sqe),
            admin::ABORT => self.abort(sqe),
            admin::ASYNC_EVENT => self.async_event(sqe),
            admin::DOORBELL_BUFFER if self.options.doorbell_buffer => self.doorbell_buffer(sqe),
            _ => Err(Refusal::plain(status::INVALID_OPCODE)),
        };
        match result {
            Ok(answer) => answer,
            Err(refusal) => Answer::Now(self.refuse(0, sqe, refusal), 0),
        }
    }

    /// Sends data to the driver's memory.
    fn send(&mut self, sqe: &Sqe, data: &mut [u8]) -> Result<(), Refusal> {
        if let Some(lies) = &self.link.lies {
            lock(lies).data(data, Lie::Data);
        }
        let len_bytes = data.len() as u64;
        self.walker.walk(&mut self.reach, sqe, len_bytes, Way::ToHost, true)?;
        let mut done = 0;
        for piece in &self.walker.pieces {
            if let Piece::Memory(segment) = piece {
                segment.write_from(&data[done..]);
            }
            done += index(piece.len_bytes());
        }
        Ok(())
    }

    // Queues.

    fn queue_id(&self, sqe: &Sqe) -> Result<(u16, u32), Refusal> {
        let id = (sqe.0[10] & 0xffff) as u16;
        let size = (sqe.0[10] >> 16) + 1;
        if id == 0 || id > self.admin.granted {
            return Err(Refusal::blame(status::INVALID_QUEUE_ID, "a queue id that is not granted"));
        }
        if size < 2 || size > self.options.queue_entries_max {
            return Err(Refusal::blame(status::INVALID_QUEUE_SIZE, "a queue size beyond CAP.MQES"));
        }
        if sqe.0[11] & 1 == 0 {
            let text = "a queue that is not contiguous, with CAP.CQR";
            return Err(Refusal::blame(status::INVALID_FIELD, text));
        }
        if sqe.u64_at(6) & (self.walker.page_bytes - 1) != 0 {
            let text = "a queue that is not page aligned";
            return Err(Refusal::blame(status::INVALID_PRP_OFFSET, text));
        }
        Ok((id, size))
    }

    /// The size of entries that CC names, 2^n bytes.
    fn entry_shift(&self, shift: u32) -> u32 {
        self.link.bar.load_u32(reg::CC, Ordering::Acquire) >> shift & 15
    }

    fn create_cq(&mut self, sqe: &Sqe) -> Result<Answer, Refusal> {
        let (id, size) = self.queue_id(sqe)?;
        if self.cqs[usize::from(id)].is_some() {
            return Err(Refusal::blame(status::INVALID_QUEUE_ID, "a completion queue id in use"));
        }
        if self.entry_shift(cc::IOCQES_SHIFT) != 4 {
            return Err(Refusal::blame(status::INVALID_QUEUE_SIZE, "CC.IOCQES is not 4"));
        }
        let vector = (sqe.0[11] >> 16) as u16;
        let wants_interrupts = sqe.0[11] & 2 != 0;
        let vectors_count = match self.options.vectors {
            Vectors::MsiX(count) => count.max(1),
            _ => 1,
        };
        if vector >= vectors_count {
            return Err(Refusal::blame(
                status::INVALID_VECTOR,
                "an interrupt vector beyond the last",
            ));
        }
        let iova = sqe.u64_at(6);
        if !self.reach.covers(iova, u64::from(size) * 16) {
            return Err(Refusal::fault());
        }
        let doorbell = self.link.doorbell(id, true);
        self.link.bar.store_u32(doorbell, 0, Ordering::Release);
        let vector = wants_interrupts.then_some(vector);
        self.cqs[usize::from(id)] = Some(Cq::new(iova, size, vector, doorbell, &self.reach));
        Ok(Answer::OK)
    }

    fn create_sq(&mut self, sqe: &Sqe) -> Result<Answer, Refusal> {
        let (id, size) = self.queue_id(sqe)?;
        if self.sqs[usize::from(id)].is_some() {
            return Err(Refusal::blame(status::INVALID_QUEUE_ID, "a submission queue id in use"));
        }
        if self.entry_shift(cc::IOSQES_SHIFT) != 6 {
            return Err(Refusal::blame(status::INVALID_QUEUE_SIZE, "CC.IOSQES is not 6"));
        }
        let cq_id = (sqe.0[11] >> 16) as u16;
        let cq = self.cqs.get_mut(usize::from(cq_id)).and_then(Option::as_mut);
        let Some(cq) = cq.filter(|_| cq_id > 0) else {
            let text = "a submission queue for a completion queue that is not there";
            return Err(Refusal::blame(status::COMPLETION_QUEUE_INVALID, text));
        };
        let iova = sqe.u64_at(6);
        if !self.reach.covers(iova, u64::from(size) * 64) {
            return Err(Refusal::fault());
        }
        cq.users += 1;
        let doorbell = self.link.doorbell(id, false);
        self.link.bar.store_u32(doorbell, 0, Ordering::Release);
        self.sqs[usize::from(id)] = Some(Sq::new(iova, size, cq_id, doorbell, &self.reach));
        self.active.push(id);
        Ok(Answer::OK)
    }

    fn delete_sq(&mut self, sqe: &Sqe) -> Result<Answer, Refusal> {
        let id = (sqe.0[10] & 0xffff) as u16;
        let there = id > 0 && self.sqs.get(usize::from(id)).is_some_and(Option::is_some);
        if !there {
            let text = "deletion of a submission queue that is not there";
            return Err(Refusal::blame(status::INVALID_QUEUE_ID, text));
        }
        for command in self.held.remove_queue(id) {
            if !command.is_answered {
                self.answer(id, &command.sqe, status::ABORTED_SQ_DELETED, 0);
            }
        }
        if let Some(sq) = self.sqs[usize::from(id)].take() {
            self.link.bar.store_u32(sq.doorbell, 0, Ordering::Release);
            self.interrupt(sq.cq);
            if let Some(cq) = self.cqs[usize::from(sq.cq)].as_mut() {
                cq.users -= 1;
            }
        }
        self.active.retain(|queue| *queue != id);
        Ok(Answer::OK)
    }

    fn delete_cq(&mut self, sqe: &Sqe) -> Result<Answer, Refusal> {
        let id = (sqe.0[10] & 0xffff) as u16;
        let Some(cq) = self.cqs.get(usize::from(id)).and_then(Option::as_ref).filter(|_| id > 0)
        else {
            let text = "deletion of a completion queue that is not there";
            return Err(Refusal::blame(status::INVALID_QUEUE_ID, text));
        };
        if cq.users > 0 {
            let text = "deletion of a completion queue with submission queues";
            return Err(Refusal::blame(INVALID_QUEUE_DELETION, text));
        }
        self.link.bar.store_u32(cq.doorbell, 0, Ordering::Release);
        self.cqs[usize::from(id)] = None;
        Ok(Answer::OK)
    }

    fn doorbell_buffer(&mut self, sqe: &Sqe) -> Result<Answer, Refusal> {
        let (doorbells, events) = (sqe.u64_at(6), sqe.u64_at(8));
        let page_bytes = self.walker.page_bytes;
        if (doorbells | events) & (page_bytes - 1) != 0 {
            let text = "a shadow doorbell buffer that is not page aligned";
            return Err(Refusal::blame(status::INVALID_FIELD, text));
        }
        let shift = self.link.doorbells_shift;
        let shadow = Shadow::new(doorbells, events, usize_of(page_bytes), shift, &self.reach);
        let shadow = shadow.ok_or(Refusal::fault())?;
        // From here on a controller may read them instead of the registers, so they must not be older.
        for is_completion in [false, true] {
            let rung =
                self.link.bar.load_u32(self.link.doorbell(0, is_completion), Ordering::Acquire);
            let mirrored = shadow.load(0, is_completion);
            if mirrored != Some(rung) {
                let side = if is_completion { "completion" } else { "submission" };
                self.link.counters.protocol_error(|| {
                    format!("admin {side} doorbell {rung} is {mirrored:?} in its shadow")
                });
            }
        }
        self.admin.shadow = Some(shadow);
        Ok(Answer::OK)
    }

    // Identify.

    fn identify(&mut self, sqe: &Sqe) -> Result<Answer, Refusal> {
        let nsid = sqe.0[1];
        let of_namespace = sqe.0[10] & 0xff;
        let mut data = match of_namespace {
            cns::NAMESPACE | cns::NAMESPACE_DESCRIPTORS => {
                if nsid == 0 || nsid > self.options.namespaces_max {
                    let text = "identify of a namespace id beyond the largest";
                    return Err(Refusal::blame(status::INVALID_NAMESPACE, text));
                }
                let found =
                    self.namespaces.iter().find(|ns| ns.what.nsid == nsid && ns.is_attached);
                match found {
                    // Inactive: zeroes.
                    None if of_namespace == cns::NAMESPACE => [0; IDENTIFY_BYTES],
                    None => return Err(Refusal::plain(status::INVALID_NAMESPACE)),
                    Some(ns) if of_namespace == cns::NAMESPACE => {
                        ns.identify(self.options.write_zeroes)
                    }
                    Some(ns) => ns.descriptors(),
                }
            }
            cns::CONTROLLER => {
                identify::controller(&self.options, self.link.bar.load_u64(reg::CAP))
            }
            cns::ACTIVE_NAMESPACES => {
                if nsid >= NSID_ALL - 1 {
                    let text = "active namespaces above the largest id";
                    return Err(Refusal::blame(status::INVALID_NAMESPACE, text));
                }
                let attached = self.namespaces.iter().filter(|ns| ns.is_attached);
                identify::active(attached.map(|ns| ns.what.nsid), nsid)
            }
            cns::CONTROLLER_OF_SET if self.options.controller_of_set => match sqe.0[11] >> 24 {
                0 => identify::controller_of_nvm(&self.options),
                _ => return Err(Refusal::plain(status::INVALID_FIELD)),
            },
            _ => return Err(Refusal::plain(status::INVALID_FIELD)),
        };
        self.send(sqe, &mut data)?;
        Ok(Answer::OK)
    }

    // Features.

    fn set_features(&mut self, sqe: &Sqe) -> Result<Answer, Refusal> {
        let (id, value) = (sqe.0[10] & 0xff, sqe.0[11]);
        if sqe.0[10] >> 31 != 0 {
            return Err(Refusal::blame(FEATURE_NOT_SAVEABLE, "a feature to be saved"));
        }
        match id {
            feature::NUMBER_OF_QUEUES => return self.set_number_of_queues(value),
            feature::WRITE_CACHE => {
                if !self.options.write_cache {
                    return Err(Refusal::blame(
                        status::INVALID_FIELD,
                        "a write cache that is not there",
                    ));
                }
                let was_on = self.admin.write_cache_is_on();
                self.admin.features[index(id)] = value & 1;
                if was_on && value & 1 == 0 {
                    self.namespaces.iter().for_each(|ns| ns.what.medium.flush());
                }
            }
            feature::ASYNC_EVENTS => {
                self.admin.features[index(id)] = value;
            }
            _ if PLAIN_FEATURES.contains(&id) => self.admin.features[index(id)] = value,
            _ => return Err(Refusal::plain(status::INVALID_FIELD)),
        }
        Ok(Answer::OK)
    }

    fn set_number_of_queues(&mut self, value: u32) -> Result<Answer, Refusal> {
        let (sqs_z, cqs_z) = (value & 0xffff, value >> 16);
        if sqs_z == 0xffff || cqs_z == 0xffff {
            return Err(Refusal::blame(status::INVALID_FIELD, "65,536 queues asked for"));
        }
        if self.active.len() > 1 || self.cqs[1..].iter().any(Option::is_some) {
            let text = "the number of queues set after a queue was made";
            return Err(Refusal::blame(COMMAND_SEQUENCE, text));
        }
        // A controller may grant less than is asked for, and more.
        let max = u32::from(self.options.io_queues_max.min(self.faults.queues_max));
        let grant = |wanted_z: u32| (wanted_z + 1).min(max.max(1)) - 1;
        let (sqs_z, cqs_z) = (grant(sqs_z), grant(cqs_z));
        self.admin.granted = u16::try_from(sqs_z.max(cqs_z) + 1).unwrap_or(u16::MAX);
        let result = sqs_z | cqs_z << 16;
        self.admin.features[index(feature::NUMBER_OF_QUEUES)] = result;
        Ok(Answer::Now(0, result))
    }

    fn get_features(&mut self, sqe: &Sqe) -> Result<Answer, Refusal> {
        let id = sqe.0[10] & 0xff;
        let is_known = PLAIN_FEATURES.contains(&id)
            || matches!(id, feature::NUMBER_OF_QUEUES | feature::ASYNC_EVENTS)
            || id == feature::WRITE_CACHE && self.options.write_cache;
        if !is_known {
            return Err(Refusal::plain(status::INVALID_FIELD));
        }
        // Supported capabilities: can be changed.
        if sqe.0[10] >> 8 & 7 == 3 {
            return Ok(Answer::Now(0, 4));
        }
        Ok(Answer::Now(0, self.admin.features[index(id)]))
    }

    // Logs and events.

    fn get_log_page(&mut self, sqe: &Sqe) -> Result<Answer, Refusal> {
        let id = sqe.0[10].to_le_bytes()[0];
        let dwords_z = u64::from(sqe.0[10] >> 16) | u64::from(sqe.0[11] & 0xffff) << 16;
        let len_bytes = (dwords_z + 1) * 4;
        let offset_bytes = usize_of(sqe.u64_at(12));
        let Some(page) = self.admin.log_page(id) else {
            return Err(Refusal::plain(status::INVALID_LOG_PAGE));
        };
        if len_bytes > self.transfer_bytes_max()
            || offset_bytes > page.len()
            || offset_bytes & 3 != 0
        {
            let text = "a part of a log page that is too long, or outside of it";
            return Err(Refusal::blame(status::INVALID_FIELD, text));
        }
        let mut data: Vec<u8> = page[offset_bytes..].to_vec();
        data.resize(usize_of(len_bytes), 0);
        self.send(sqe, &mut data)?;
        let keeps_event = sqe.0[10] & 1 << 15 != 0;
        if !keeps_event {
            if id == log::CHANGED_NAMESPACES {
                self.admin.changed.clear();
            }
            if let Some(kind) = Admin::kind_of_log(id) {
                self.admin.masked &= !(1 << kind);
                self.deliver_events();
            }
        }
        Ok(Answer::OK)
    }

    fn async_event(&mut self, sqe: &Sqe) -> Result<Answer, Refusal> {
        if self.admin.requests.len() >= usize::from(self.options.events_max.max(1)) {
            return Err(Refusal::blame(
                status::EVENT_LIMIT,
                "more event requests than AERL allows",
            ));
        }
        self.admin.requests.push_back((sqe.0[0] >> 16) as u16);
        self.deliver_events();
        Ok(Answer::Later)
    }

    /// Answers event requests, as many as there are events and requests.
    fn deliver_events(&mut self) {
        let mut kept = VecDeque::new();
        while let Some(event) = self.admin.events.pop_front() {
            let is_masked = self.admin.masked & 1 << event.kind != 0;
            if is_masked || self.admin.requests.is_empty() {
                kept.push_back(event);
                continue;
            }
            self.admin.masked |= 1 << event.kind;
            if let Some(cid) = self.admin.requests.pop_front() {
                let result = u32::from_le_bytes([event.kind, event.info, event.log, 0]);
                self.answer(0, &Sqe::new(admin::ASYNC_EVENT, cid, 0), 0, result);
            }
        }
        self.admin.events = kept;
        self.interrupt(0);
    }

    /// Something happened that the driver may want to know.
    pub(super) fn tell_event(&mut self, kind: u8, info: u8, log: u8, enabled_by: u32) {
        if self.admin.features[index(feature::ASYNC_EVENTS)] & enabled_by == 0 {
            return;
        }
        let event = Event { kind, info, log };
        if !self.admin.events.contains(&event) {
            self.admin.events.push_back(event);
        }
        if self.is_running() {
            self.deliver_events();
        }
    }

    /// The list or the attributes of namespaces changed.
    pub(super) fn namespace_changed(&mut self, nsid: u32) {
        if !self.admin.changed.contains(&nsid) {
            self.admin.changed.push(nsid);
            self.admin.changed.sort_unstable();
        }
        let log = log::CHANGED_NAMESPACES;
        self.tell_event(event::NOTICE, event::NOTICE_NAMESPACE, log, event::ENABLE_NAMESPACE);
    }

    // Aborts.

    fn abort(&mut self, sqe: &Sqe) -> Result<Answer, Refusal> {
        let (queue, cid) = ((sqe.0[10] & 0xffff) as u16, sqe.0[10] >> 16);
        if self.sqs.get(usize::from(queue)).is_none_or(Option::is_none) {
            let text = "abort on a queue that is not there";
            return Err(Refusal::blame(status::INVALID_FIELD, text));
        }
        let is_abort = |sqe: &Sqe| sqe.0[0].to_le_bytes()[0] == admin::ABORT;
        let out = self.held.odd.iter().filter(|it| it.queue == 0 && is_abort(&it.sqe)).count();
        if out >= usize::from(self.options.aborts_max.max(1)) {
            return Err(Refusal::blame(status::ABORT_LIMIT, "more aborts than ACL allows"));
        }
        let not_aborted = Ok(Answer::Now(0, 1));
        match self.faults.aborts {
            Aborts::Silent => return Ok(self.hold(0, sqe, u64::MAX, Plan::Execute)),
            Aborts::Refuse => return not_aborted,
            Aborts::Lie => {
                let is_there = self.held.find(queue, cid).is_some();
                return Ok(Answer::Now(0, u32::from(!is_there)));
            }
            Aborts::AnswerAndGoOn => {
                let Some(command) = self.held.find(queue, cid) else { return not_aborted };
                command.is_answered = true;
                let aborted = command.sqe;
                self.answer(queue, &aborted, status::ABORTED, 0);
            }
            Aborts::Work => {
                let request = self.admin.requests.iter().position(|it| u32::from(*it) == cid);
                if let (0, Some(at)) = (queue, request) {
                    self.admin.requests.remove(at);
                    let request = Sqe::new(admin::ASYNC_EVENT, (cid & 0xffff) as u16, 0);
                    self.answer(0, &request, status::ABORTED, 0);
                    return Ok(Answer::OK);
                }
                let Some(command) = self.held.remove(queue, cid) else { return not_aborted };
                self.answer(queue, &command.sqe, status::ABORTED, 0);
            }
        }
        if let Some(sq) = self.sqs[usize::from(queue)].as_mut() {
            sq.held = sq.held.saturating_sub(1);
            let cq = sq.cq;
            self.interrupt(cq);
        }
        Ok(Answer::OK)
    }

    /// The largest transfer.
    pub(super) fn transfer_bytes_max(&self) -> u64 {
        match self.options.mdts {
            0 => u64::MAX,
            shift => 1 << (12 + u32::from(self.options.page_min) + u32::from(shift)).min(40),
        }
    }

    /// What a command changes in the statistics of SMART.
    pub(super) fn count_health(&mut self, opcode: u8) {
        let at = match opcode {
            nvm::READ => health::HOST_READS,
            nvm::WRITE => health::HOST_WRITES,
            _ => return,
        };
        let place = &mut self.admin.health[at..at + 8];
        if let Some(bytes) = place.first_chunk::<8>() {
            let next = u64::from_le_bytes(*bytes).wrapping_add(1);
            place.copy_from_slice(&next.to_le_bytes());
        }
    }

    /// True when this command's id is that of a command that is out.
    #[cold]
    pub(super) fn has_cid(&mut self, queue: u16, cid: u32) -> bool {
        let in_requests = queue == 0 && self.admin.requests.iter().any(|it| u32::from(*it) == cid);
        in_requests || self.held.find(queue, cid).is_some()
    }

    /// The controller's own opinion of a status, for rules that name one.
    pub(super) fn answer_status(status: Status) -> Answer {
        Answer::Now(status.0, 0)
    }

    pub(super) fn count_range(&self, ranges: usize) {
        self.link.counters.add(Count::Ranges, u64::from(len_u32(ranges)));
    }
}
