//! What the model's thread shares with its backing, its control handle and the driver: registers, calls, interrupts.
//!
//! Flow: a driver's register write → [`Link::attention`] → the thread looks; a call → runs on the thread between two
//! commands → its answer. So a call that changes what the device may do is a barrier: once it is answered, the thread
//! does no longer what was forbidden. Doorbells are plain stores, which the thread polls.

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::Thread;
use std::time::Duration;

use ringmill_core::mem::{Mapping, SharedSlice};
use ringmill_core::spec::nvme::{cc, csts, reg};
use rustix::event::{EventfdFlags, eventfd};

use super::counters::{Count, Counters};
use super::lies::Lies;
use super::machine::Machine;
use super::options::{ModelOptions, Vectors};
use crate::pci::{DeviceNews, Registers};

/// Nobody waits longer for the thread; it answers in microseconds.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);

const PAGE_BYTES: usize = 4096;

pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type Call = Box<dyn FnOnce(&mut Machine) + Send>;

#[derive(Default)]
struct Calls {
    waiting: Vec<Call>,
    ended: bool,
}

/// An interrupt vector.
#[derive(Debug, Default)]
struct Vector {
    is_bound: AtomicBool,
    eventfd: Mutex<Option<OwnedFd>>,
}

/// The shared part.
pub(super) struct Link {
    pub(super) name: String,
    pub(super) counters: Counters,
    /// BAR 0.
    pub(super) memory: Arc<Mapping>,
    pub(super) bar: SharedSlice,
    /// Nothing answers any more.
    pub(super) gone: AtomicBool,
    /// The registers that are interpreted were written to, or a call waits.
    attention: AtomicBool,
    parked: AtomicBool,
    thread: OnceLock<Thread>,
    calls: Mutex<Calls>,
    /// Writes to the controller's registers, one at a time.
    writes: Mutex<()>,
    /// Writes of CC with EN clear, so that none is missed.
    pub(super) disables: AtomicU64,
    /// INTMS/INTMC.
    pub(super) interrupt_mask: AtomicU32,
    /// INTx was raised and not handled yet.
    level_is_masked: AtomicBool,
    pub(super) doorbells_shift: u32,
    vectors: Vec<Vector>,
    pub(super) vectors_mode: Vectors,
    news: Mutex<VecDeque<DeviceNews>>,
    news_fd: OwnedFd,
    pub(super) lies: Option<Mutex<Lies>>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Link {
    pub(super) fn new(
        options: &ModelOptions,
        lies: Option<&[u8]>,
    ) -> Result<Link, Box<dyn std::error::Error>> {
        let doorbells_shift = 2 + u32::from(options.doorbell_stride);
        let doorbells_bytes = (2 * (usize::from(options.io_queues_max) + 1)) << doorbells_shift;
        let len_bytes = reg::DOORBELLS + doorbells_bytes.next_multiple_of(PAGE_BYTES);
        let memory = Arc::new(Mapping::pool(len_bytes)?);
        let bar = SharedSlice::new(&memory, 0, len_bytes, PAGE_BYTES).ok_or("no window")?;
        let vectors_count = match options.vectors {
            Vectors::None => 0,
            Vectors::Intx | Vectors::Msi => 1,
            Vectors::MsiX(count) => count,
        };
        Ok(Link {
            name: options.name.clone(),
            counters: Counters::new(),
            memory,
            bar,
            gone: AtomicBool::new(false),
            attention: AtomicBool::new(true),
            parked: AtomicBool::new(false),
            thread: OnceLock::new(),
            calls: Mutex::default(),
            writes: Mutex::new(()),
            disables: AtomicU64::new(0),
            interrupt_mask: AtomicU32::new(0),
            level_is_masked: AtomicBool::new(false),
            doorbells_shift,
            vectors: (0..vectors_count).map(|_| Vector::default()).collect(),
            vectors_mode: options.vectors,
            news: Mutex::default(),
            news_fd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            lies: lies.map(|bytes| Mutex::new(Lies::new(bytes.to_vec()))),
        })
    }

    // The thread's side.

    pub(super) fn started(&self) {
        let _ = self.thread.set(std::thread::current());
    }

    /// True once per reason.
    #[inline]
    pub(super) fn take_attention(&self) -> bool {
        self.attention.load(Ordering::Relaxed) && self.attention.swap(false, Ordering::AcqRel)
    }

    pub(super) fn run_calls(&self, machine: &mut Machine) {
        let waiting = std::mem::take(&mut lock(&self.calls).waiting);
        for call in waiting {
            call(machine);
        }
    }

    /// No call runs after this; those that wait are answered with `None`.
    pub(super) fn ended(&self) {
        self.gone.store(true, Ordering::Release);
        let mut calls = lock(&self.calls);
        calls.ended = true;
        calls.waiting.clear();
    }

    /// Sleeps until something is written to the controller's registers, somebody calls, a doorbell's writer sees the flag,
    /// or the time is over.
    #[cold]
    pub(super) fn nap(&self, most: Duration) {
        self.parked.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if !self.attention.load(Ordering::Relaxed) {
            std::thread::park_timeout(most);
        }
        self.parked.store(false, Ordering::Relaxed);
    }

    /// Raises a vector, if somebody listens.
    #[inline]
    pub(super) fn raise(&self, vector: u16) -> bool {
        let Some(vector) = self.vectors.get(usize::from(vector)) else { return false };
        vector.is_bound.load(Ordering::Acquire) && self.signal(vector)
    }

    #[cold]
    fn signal(&self, vector: &Vector) -> bool {
        let eventfd = lock(&vector.eventfd);
        let Some(fd) = &*eventfd else { return false };
        // A full counter is an interrupt that nobody has looked at yet.
        let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
        self.counters.add(Count::Interrupts, 1);
        true
    }

    /// Raises INTx, once until it is unmasked or bound again.
    pub(super) fn raise_level(&self) {
        // Masked before it is raised: whoever handles it unmasks at once.
        if !self.level_is_masked.swap(true, Ordering::AcqRel) && !self.raise(0) {
            self.level_is_masked.store(false, Ordering::Release);
        }
    }

    // Everybody's side.

    fn wake(&self) {
        self.attention.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Runs `work` on the thread, between two commands; `None` when the thread has ended.
    pub(super) fn call<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Machine) -> R + Send + 'static,
    ) -> Option<R> {
        let (send, receive) = sync_channel(1);
        {
            let mut calls = lock(&self.calls);
            if calls.ended {
                return None;
            }
            calls.waiting.push(Box::new(move |machine| {
                let _ = send.send(work(machine));
            }));
        }
        self.wake();
        receive.recv_timeout(CALL_TIMEOUT).ok()
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    pub(super) fn vectors_count(&self) -> u16 {
        u16::try_from(self.vectors.len()).unwrap_or(u16::MAX)
    }

    /// Binds; false when there is no such vector.
    pub(super) fn bind(&self, vector: u16, eventfd: Option<OwnedFd>) -> bool {
        let Some(vector) = self.vectors.get(usize::from(vector)) else { return false };
        let mut place = lock(&vector.eventfd);
        vector.is_bound.store(eventfd.is_some(), Ordering::Release);
        *place = eventfd;
        drop(place);
        if self.vectors_mode == Vectors::Intx {
            self.unmask_level();
        }
        true
    }

    /// Allows the next INTx; a level that is still there raises it at once.
    pub(super) fn unmask_level(&self) {
        self.level_is_masked.store(false, Ordering::Release);
        self.wake();
    }

    pub(super) fn unbind_all(&self) {
        for vector in 0..self.vectors_count() {
            self.bind(vector, None);
        }
    }

    pub(super) fn tell(&self, news: DeviceNews) {
        lock(&self.news).push_back(news);
        let _ = rustix::io::write(&self.news_fd, &1u64.to_ne_bytes());
    }

    pub(super) fn news_fd(&self) -> BorrowedFd<'_> {
        self.news_fd.as_fd()
    }

    pub(super) fn next_news(&self) -> Option<DeviceNews> {
        let mut queue = lock(&self.news);
        let news = queue.pop_front();
        if queue.is_empty() {
            let _ = rustix::io::read(&self.news_fd, &mut [0u8; 8]);
        }
        news
    }

    /// Where the doorbell of a queue lies.
    pub(super) fn doorbell(&self, queue: u16, is_completion: bool) -> usize {
        reg::DOORBELLS
            + ((2 * usize::from(queue) + usize::from(is_completion)) << self.doorbells_shift)
    }

    fn write_control(&self, offset_bytes: usize, value: u32) {
        let guard = lock(&self.writes);
        let enabled = self.bar.load_u32(reg::CC, Ordering::Relaxed) & cc::EN != 0;
        let is_queues = (reg::AQA..reg::ACQ + 8).contains(&offset_bytes);
        match offset_bytes {
            reg::CC => {
                let ready = self.bar.load_u32(reg::CSTS, Ordering::Relaxed) & csts::RDY != 0;
                if value & cc::EN == 0 {
                    self.disables.fetch_add(1, Ordering::AcqRel);
                } else if !enabled && ready {
                    self.counters.protocol_error(|| "CC.EN set while CSTS.RDY is set".to_owned());
                }
                self.bar.store_u32(reg::CC, value, Ordering::Release);
            }
            reg::INTMS | reg::INTMC => {
                if let Vectors::MsiX(_) = self.vectors_mode {
                    self.counters.protocol_error(|| "INTMS or INTMC written with MSI-X".to_owned());
                }
                let mask = self.interrupt_mask.load(Ordering::Relaxed);
                let mask = if offset_bytes == reg::INTMS { mask | value } else { mask & !value };
                self.interrupt_mask.store(mask, Ordering::Release);
                self.bar.store_u32(reg::INTMS, mask, Ordering::Release);
                self.bar.store_u32(reg::INTMC, mask, Ordering::Release);
            }
            _ if is_queues && enabled => {
                self.counters.protocol_error(|| "AQA, ASQ or ACQ written while enabled".to_owned());
            }
            _ if is_queues => self.bar.store_u32(offset_bytes, value, Ordering::Release),
            // Read-only, or not there.
            _ => {}
        }
        drop(guard);
        self.wake();
    }
}

/// BAR 0 as a driver sees it.
///
/// Doorbells are the memory from 0x1000 on, a plain store each; its file may be given to other processes. The registers
/// below are interpreted, so writes to them must come through [`Registers::write_u32`].
#[derive(Debug)]
pub struct ModelRegisters {
    pub(super) link: Arc<Link>,
}

impl ModelRegisters {
    /// The memory of the BAR: whole pages, a file. Only the pages from 0x1000 on may be written to by others.
    #[must_use]
    pub fn memory(&self) -> &Arc<Mapping> {
        &self.link.memory
    }
}

impl Registers for ModelRegisters {
    fn len_bytes(&self) -> usize {
        self.link.bar.len_bytes()
    }

    fn read_u32(&self, offset_bytes: usize) -> u32 {
        let inside = offset_bytes.is_multiple_of(4) && offset_bytes < self.link.bar.len_bytes();
        if !inside || self.link.is_gone() {
            return u32::MAX;
        }
        let value = self.link.bar.load_u32(offset_bytes, Ordering::Acquire);
        match &self.link.lies {
            Some(lies) => lock(lies).register(offset_bytes, value),
            None => value,
        }
    }

    #[inline]
    fn write_u32(&self, offset_bytes: usize, value: u32) {
        let link = &*self.link;
        if offset_bytes < reg::DOORBELLS {
            if offset_bytes.is_multiple_of(4) && !link.is_gone() {
                link.write_control(offset_bytes, value);
            }
            return;
        }
        if !offset_bytes.is_multiple_of(4) || offset_bytes >= link.bar.len_bytes() {
            return;
        }
        link.bar.store_u32(offset_bytes, value, Ordering::Release);
        // Not ordered: a nap that is missed here ends by itself soon.
        if link.parked.load(Ordering::Relaxed)
            && let Some(thread) = link.thread.get()
        {
            thread.unpark();
        }
    }
}
