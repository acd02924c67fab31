//! The reactor's io_uring: one ring for all channels, kicks and wake-ups of a core.
//!
//! Flow: clients push entries → `commit` enters the kernel once per pass → `reap` sorts completions into the clients'
//! inboxes → clients drain them. A sleep waits on this ring alone. Owner: built by a control thread, enabled and used
//! by one reactor. **Invariant:** a client's id is not reused while the kernel owes it a completion; the ring accepts
//! only the listed operations (seccomp cannot see them).
#![expect(unsafe_code)] // UNSAFETY: pushing entries whose buffers the kernel accesses later.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use thiserror::Error;

use super::fixed::FixedBuffers;
use crate::limits::{
    CORES_MAX, RING_CLIENTS_MAX, RING_CQ_ENTRIES, RING_ENTRIES_GUARANTEED, RING_ENTRIES_RESERVED,
    RING_FILES_MAX, RING_SQ_ENTRIES,
};
use crate::mem::Pin;
use crate::units::{bytes_u64, index, len_u32};

/// Bits of `user_data` that belong to the client; the rest is its id.
const TOKEN_BITS: u32 = 48;
const TOKEN_MASK: u64 = (1 << TOKEN_BITS) - 1;

/// The operations that drivers and the reactor use; everything else is refused by the kernel.
const ALLOWED_OPS: [u8; 14] = [
    opcode::Nop::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::ReadFixed::CODE,
    opcode::WriteFixed::CODE,
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::PollRemove::CODE,
    opcode::AsyncCancel::CODE,
    opcode::Timeout::CODE,
    opcode::UringCmd16::CODE,
];
/// As above, where the kernel has them (it refuses to allow what it does not know).
const ALLOWED_NEW_OPS: [u8; 2] = [opcode::ReadvFixed::CODE, opcode::WritevFixed::CODE];
/// What a polling ring takes: transfers, and nothing that an interrupt ends.
const POLLED_OPS: [u8; 6] = [
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::ReadFixed::CODE,
    opcode::WriteFixed::CODE,
    opcode::Read::CODE,
    opcode::Write::CODE,
];
const IORING_REGISTER_FILES_UPDATE: u8 = 6;
const IORING_REGISTER_BUFFERS_UPDATE: u8 = 16;
const IORING_REGISTER_IOWQ_AFF: u8 = 17;
const IORING_REGISTER_CLONE_BUFFERS: u8 = 30;

/// Why a reactor has no ring.
#[derive(Debug, Error)]
pub enum RingError {
    /// io_uring is missing or forbidden.
    #[error(
        "io_uring is not available ({0}); ringmill needs Linux 6.1 or later with kernel.io_uring_disabled = 0 \
         and a seccomp profile that allows io_uring_setup"
    )]
    Setup(#[source] io::Error),
    /// A registration failed.
    #[error("cannot set up the io_uring ({what}): {source}")]
    Register {
        /// Which registration.
        what: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Too many clients.
    #[error(
        "one reactor serves at most {RING_CLIENTS_MAX} queues and channels; start ringmilld with more cores"
    )]
    Clients,
    /// Too many files.
    #[error(
        "one reactor serves at most {RING_FILES_MAX} open disk images; start ringmilld with more cores"
    )]
    Files,
}

/// A completion as its client gets it.
#[derive(Clone, Copy, Debug)]
pub struct RingEvent {
    /// What the client gave with the entry.
    pub token: u64,
    /// The operation's result: ≥ 0, or a negative errno.
    pub result: i32,
    /// True when the operation goes on and will complete again (multishot).
    pub more: bool,
}

/// A client's name on its ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientId(u16);

/// A registered file's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedFile(u32);

impl FixedFile {
    /// For entries built by drivers.
    #[must_use]
    pub fn as_fixed(self) -> types::Fixed {
        types::Fixed(self.0)
    }
}

#[derive(Debug, Default)]
struct Inbox {
    events: VecDeque<RingEvent>,
    /// Operations that the kernel has not ended yet.
    outstanding: u32,
    in_use: bool,
    closing: bool,
    /// Whom the next event wakes.
    wakes: Option<u32>,
}

/// The ring.
pub struct Ring {
    pub(super) uring: IoUring,
    /// Registered buffers: pinned guest memory.
    pub(super) fixed: FixedBuffers,
    inboxes: Vec<Inbox>,
    /// Keys of `wake_on_event` whose events have come.
    woken: Vec<u32>,
    /// Operations in flight over all clients.
    outstanding: u32,
    free_files: Vec<u32>,
    next_file: u32,
    enters_count: u64,
    defer_taskrun: bool,
    /// Completions come only to those who ask the device for them (IORING_SETUP_IOPOLL).
    polls_device: bool,
    last_errno: Option<i32>,
    io_wq_cpus: Vec<usize>,
    files_max: u32,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("fd", &self.uring.as_raw_fd())
            .field("outstanding", &self.outstanding)
            .finish()
    }
}

/// The set-ups to try, best first: 6.6+ has NO_SQARRAY, 6.1 has DEFER_TASKRUN.
fn build(polls_device: bool) -> io::Result<(IoUring, bool)> {
    let base = || {
        let mut builder = IoUring::builder();
        if polls_device {
            builder.setup_iopoll();
        }
        builder
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_submit_all()
            .setup_cqsize(RING_CQ_ENTRIES);
        builder
    };
    let mut newest = base();
    newest.setup_defer_taskrun().setup_taskrun_flag().setup_no_sqarray();
    let mut deferring = base();
    deferring.setup_defer_taskrun().setup_taskrun_flag();
    let mut cooperative = base();
    cooperative.setup_coop_taskrun().setup_taskrun_flag();
    let mut last = None;
    for (builder, defer) in [(newest, true), (deferring, true), (cooperative, false)] {
        match builder.build(RING_SQ_ENTRIES) {
            Ok(uring) => return Ok((uring, defer)),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(last.unwrap_or_else(|| io::Error::from_raw_os_error(libc::EINVAL)))
}

/// Restricts a disabled ring to what is used. The kernel refuses a list with an entry that it does not know, and then keeps
/// none of it: cloned buffers are of Linux 6.12, vectored ones of 6.15.
fn restrict(uring: &IoUring, ops: &[u8], vectored: bool) -> io::Result<()> {
    let new_ops: &[u8] = if vectored { &ALLOWED_NEW_OPS } else { &[] };
    let known =
        [IORING_REGISTER_FILES_UPDATE, IORING_REGISTER_BUFFERS_UPDATE, IORING_REGISTER_IOWQ_AFF];
    let flags = (squeue::Flags::FIXED_FILE | squeue::Flags::ASYNC).bits();
    let register = |registrations: &[u8]| {
        let mut allowed: Vec<Restriction> =
            ops.iter().chain(new_ops).map(|&op| Restriction::sqe_op(op)).collect();
        allowed.extend(registrations.iter().map(|&op| Restriction::register_op(op)));
        allowed.push(Restriction::sqe_flags_allowed(flags));
        uring.submitter().register_restrictions(&mut allowed)
    };
    match register(&[&known[..], &[IORING_REGISTER_CLONE_BUFFERS]].concat()) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => register(&known),
        result => result,
    }
}

impl Ring {
    /// Builds a disabled, restricted ring. `io_wq_cpus`: where kernel workers may run (off the reactor cores).
    ///
    /// # Errors
    /// When the kernel has no usable io_uring.
    pub fn new(io_wq_cpus: &[usize]) -> Result<Ring, RingError> {
        Self::build(io_wq_cpus, false)
    }

    /// A ring beside the first, for transfers of block devices that are polled: it is entered in every pass while one of
    /// its operations is in flight, since nothing else makes them complete. Kernel workers are those of the first ring.
    ///
    /// # Errors
    /// As for [`Ring::new`].
    pub fn new_polled() -> Result<Ring, RingError> {
        Self::build(&[], true)
    }

    fn build(io_wq_cpus: &[usize], polls_device: bool) -> Result<Ring, RingError> {
        let (uring, defer_taskrun) = build(polls_device).map_err(RingError::Setup)?;
        let register = |what| move |source| RingError::Register { what, source };
        let submitter = uring.submitter();
        // The kernel counts the table against the limit of open files.
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let files_max = limit
            .map_or(RING_FILES_MAX, |n| RING_FILES_MAX.min(u32::try_from(n).unwrap_or(u32::MAX)));
        submitter.register_files_sparse(files_max).map_err(register("file table"))?;
        // At most 16 kernel threads of each kind per ring: enough that FLUSH of one disk does not wait for another's
        // discard, and a thousand disks do not start a thousand threads.
        submitter.register_iowq_max_workers(&mut [16, 16]).map_err(register("worker limit"))?;
        let fixed = FixedBuffers::new(&uring)?;
        let ops: &[u8] = if polls_device { &POLLED_OPS } else { &ALLOWED_OPS };
        restrict(&uring, ops, fixed.is_vectored()).map_err(register("restrictions"))?;
        Ok(Ring {
            uring,
            fixed,
            io_wq_cpus: io_wq_cpus.to_vec(),
            files_max,
            inboxes: Vec::with_capacity(RING_CLIENTS_MAX),
            woken: Vec::with_capacity(RING_CLIENTS_MAX),
            outstanding: 0,
            free_files: Vec::with_capacity(index(RING_FILES_MAX)),
            next_file: 0,
            enters_count: 0,
            defer_taskrun,
            polls_device,
            last_errno: None,
        })
    }

    /// Enables the ring; from now on only the calling thread may use it. Kernel workers get their processors here: they
    /// belong to the thread that enters the ring, and exist only after its first entry.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn enable(&mut self) -> Result<(), RingError> {
        let failed = |what| move |source| RingError::Register { what, source };
        self.uring.submitter().register_enable_rings().map_err(failed("enable"))?;
        if self.io_wq_cpus.is_empty() {
            return Ok(());
        }
        // SAFETY: a no-operation names no memory.
        let pushed = unsafe { self.uring.submission().push(&opcode::Nop::new().build()) };
        if pushed.is_ok() {
            self.uring.submitter().submit_and_wait(1).map_err(failed("first entry"))?;
            self.uring.completion().for_each(drop);
        }
        // SAFETY: an all-zero cpu_set_t is the empty set.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        for &cpu in self.io_wq_cpus.iter().filter(|&&cpu| cpu < CORES_MAX) {
            // SAFETY: `cpu` is below the set's 1,024 bits.
            unsafe { libc::CPU_SET(cpu, &mut set) };
        }
        self.uring.submitter().register_iowq_aff(&set).map_err(failed("worker affinity"))
    }

    /// Adds a client that will have at most `events_max` single-shot operations in flight.
    ///
    /// # Errors
    /// When there are too many clients.
    pub fn add_client(&mut self, events_max: usize) -> Result<ClientId, RingError> {
        let free = self.inboxes.iter().position(|inbox| !inbox.in_use);
        let at = free.unwrap_or(self.inboxes.len());
        if at >= RING_CLIENTS_MAX {
            return Err(RingError::Clients);
        }
        if free.is_none() {
            self.inboxes.push(Inbox::default());
        }
        let inbox = &mut self.inboxes[at];
        inbox.in_use = true;
        inbox.closing = false;
        inbox.wakes = None;
        inbox.events.clear();
        inbox.events.reserve(events_max);
        u16::try_from(at).map(ClientId).map_err(|_| RingError::Clients)
    }

    /// Removes a client. Late completions of its operations are dropped; its id is free when the last one came.
    pub fn remove_client(&mut self, client: ClientId) {
        let inbox = &mut self.inboxes[usize::from(client.0)];
        inbox.closing = true;
        inbox.wakes = None;
        inbox.events = VecDeque::new();
        inbox.in_use = inbox.outstanding > 0;
    }

    /// Registers an open file; entries then name it by its place.
    ///
    /// # Errors
    /// When the table is full or the kernel refuses.
    pub fn add_file(&mut self, fd: RawFd) -> Result<FixedFile, RingError> {
        let slot = self.free_files.pop().or_else(|| {
            (self.next_file < self.files_max).then(|| {
                self.next_file += 1;
                self.next_file - 1
            })
        });
        let slot = slot.ok_or(RingError::Files)?;
        match self.uring.submitter().register_files_update(slot, &[fd]) {
            Ok(_) => Ok(FixedFile(slot)),
            Err(source) => {
                self.free_files.push(slot);
                Err(RingError::Register { what: "file", source })
            }
        }
    }

    /// Takes a file out of the table (operations in flight keep it open).
    pub fn remove_file(&mut self, file: FixedFile) {
        // The kernel cannot refuse to clear a slot that it filled; if it did, the slot would only stay unused.
        if self.uring.submitter().register_files_update(file.0, &[-1]).is_ok() {
            self.free_files.push(file.0);
        }
    }

    /// Empties a pin's slots in the kernel's table.
    #[cold]
    pub(super) fn empty_slots(&mut self, pin: &Pin) -> io::Result<()> {
        let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        for slot in pin.first_slot()..pin.first_slot() + len_u32(pin.slots_count()) {
            // SAFETY: an empty entry names no memory.
            unsafe { self.uring.submitter().register_buffers_update(slot, &[nothing], None)? };
        }
        Ok(())
    }

    /// Operations that may still be started before the completion queue could overflow.
    #[inline]
    #[must_use]
    pub fn room(&self) -> u32 {
        RING_CQ_ENTRIES - self.outstanding.min(RING_CQ_ENTRIES)
    }

    /// Operations that this client may still start: a part of the ring is kept for those who have next to none in flight.
    #[inline]
    #[must_use]
    pub fn room_for(&self, client: ClientId) -> u32 {
        let held = self.inboxes[usize::from(client.0)].outstanding;
        let guaranteed = RING_ENTRIES_GUARANTEED.saturating_sub(held);
        let room = self.room();
        room.saturating_sub(RING_ENTRIES_RESERVED).max(guaranteed.min(room))
    }

    /// Operations in flight over all clients.
    #[inline]
    #[must_use]
    pub fn outstanding(&self) -> u32 {
        self.outstanding
    }

    /// System calls made so far.
    #[must_use]
    pub fn enters_count(&self) -> u64 {
        self.enters_count
    }

    /// Queues an entry. Returns false when the submission queue stays full even after entering the kernel.
    ///
    /// # Safety
    /// Memory that the entry names must stay mapped until its completion was reaped, and nobody may rely on its
    /// contents meanwhile.
    #[inline]
    #[must_use]
    pub unsafe fn push(&mut self, client: ClientId, token: u64, entry: squeue::Entry) -> bool {
        debug_assert!(token <= TOKEN_MASK);
        let entry = entry.user_data((u64::from(client.0) << TOKEN_BITS) | (token & TOKEN_MASK));
        // SAFETY: handed on to our caller.
        let mut pushed = unsafe { self.uring.submission().push(&entry) }.is_ok();
        if !pushed {
            self.enter();
            // SAFETY: as above.
            pushed = unsafe { self.uring.submission().push(&entry) }.is_ok();
        }
        if pushed {
            self.inboxes[usize::from(client.0)].outstanding += 1;
            self.outstanding += 1;
        }
        pushed
    }

    /// Watches `fd` for input until it is cancelled; every readiness is an event with `token`.
    pub fn watch(&mut self, client: ClientId, token: u64, fd: RawFd) -> bool {
        let entry = opcode::PollAdd::new(types::Fd(fd), u32::from(libc::POLLIN.unsigned_abs()))
            .multi(true)
            .build();
        // SAFETY: a poll names no memory, and the kernel keeps the file itself.
        unsafe { self.push(client, token, entry) }
    }

    /// Ends a watch; its last event has `more == false`.
    pub fn unwatch(&mut self, client: ClientId, token: u64) -> bool {
        let target = (u64::from(client.0) << TOKEN_BITS) | (token & TOKEN_MASK);
        // SAFETY: names no memory. The answer of the removal itself carries the all-ones token, which nobody waits for.
        unsafe { self.push(client, TOKEN_MASK, opcode::PollRemove::new(target).build()) }
    }

    /// Adds one to an eventfd without ever blocking on it, whoever else holds its file description and whatever they
    /// did to its flags. The caller keeps `fd` open until the next `commit`.
    pub fn signal(&mut self, client: ClientId, token: u64, fd: RawFd) -> bool {
        static ONE: u64 = 1;
        let entry = opcode::Write::new(types::Fd(fd), (&raw const ONE).cast(), 8).build();
        // SAFETY: the entry reads a static.
        unsafe { self.push(client, token, entry) }
    }

    /// Asks the kernel to give up on the operation with `token`; it still completes, once.
    pub fn cancel(&mut self, client: ClientId, token: u64) -> bool {
        let target = (u64::from(client.0) << TOKEN_BITS) | (token & TOKEN_MASK);
        // SAFETY: names no memory; its own answer carries the token that nobody waits for.
        unsafe { self.push(client, TOKEN_MASK, opcode::AsyncCancel::new(target).build()) }
    }

    fn enter(&mut self) {
        self.enters_count += 1;
        if let Err(error) = self.uring.submitter().submit() {
            // EINTR, EAGAIN and EBUSY leave the entries queued: the next pass tries again. Others are remembered.
            let errno = error.raw_os_error().unwrap_or(0);
            if ![libc::EINTR, libc::EAGAIN, libc::EBUSY].contains(&errno) {
                self.last_errno = Some(errno);
            }
        }
    }

    /// The last unexpected error of a submission, once.
    pub fn take_error(&mut self) -> Option<io::Error> {
        self.last_errno.take().map(io::Error::from_raw_os_error)
    }

    /// Enters the kernel if there are new entries or deferred work, or a device to be asked; otherwise makes no system call.
    #[inline]
    pub fn commit(&mut self) {
        let submission = self.uring.submission();
        let needed = !submission.is_empty() || submission.taskrun() || submission.cq_overflow();
        drop(submission);
        let needed = needed || (self.polls_device && self.outstanding > 0);
        if needed {
            self.enter();
        }
    }

    /// Sorts completions into inboxes; returns how many there were.
    #[inline]
    pub fn reap(&mut self) -> usize {
        if self.outstanding == 0 {
            return 0;
        }
        let mut count = 0;
        for entry in self.uring.completion() {
            let user_data = entry.user_data();
            let client = crate::units::usize_of(user_data >> TOKEN_BITS);
            let token = user_data & TOKEN_MASK;
            let more = cqueue::more(entry.flags());
            count += 1;
            let Some(inbox) = self.inboxes.get_mut(client) else { continue };
            if !more {
                inbox.outstanding = inbox.outstanding.saturating_sub(1);
                self.outstanding = self.outstanding.saturating_sub(1);
            }
            if let Some(key) = inbox.wakes.take() {
                self.woken.push(key);
            }
            if inbox.closing {
                inbox.in_use = inbox.outstanding > 0;
            } else if token != TOKEN_MASK && (!more || inbox.events.len() < inbox.events.capacity())
            {
                // A multishot event for a full inbox adds nothing to the ones that wait there already.
                inbox.events.push_back(RingEvent { token, result: entry.result(), more });
            }
        }
        count
    }

    /// From the client's next event on (once), `key` is among those that [`Ring::next_woken`] returns.
    pub fn wake_on_event(&mut self, client: ClientId, key: u32) {
        self.inboxes[usize::from(client.0)].wakes = Some(key);
    }

    /// Takes a wish of `wake_on_event` back.
    pub fn forget_wake(&mut self, client: ClientId) {
        self.inboxes[usize::from(client.0)].wakes = None;
    }

    /// True when `next_woken` has something.
    #[inline]
    #[must_use]
    pub fn has_woken(&self) -> bool {
        !self.woken.is_empty()
    }

    /// A key whose event has come.
    #[inline]
    pub fn next_woken(&mut self) -> Option<u32> {
        self.woken.pop()
    }

    /// The client's next completion.
    #[inline]
    pub fn next_event(&mut self, client: ClientId) -> Option<RingEvent> {
        self.inboxes[usize::from(client.0)].events.pop_front()
    }

    /// True when the client has completions waiting.
    #[inline]
    #[must_use]
    pub fn has_events(&self, client: ClientId) -> bool {
        !self.inboxes[usize::from(client.0)].events.is_empty()
    }

    /// Operations that the kernel owes this client.
    #[must_use]
    pub fn client_outstanding(&self, client: ClientId) -> u32 {
        self.inboxes[usize::from(client.0)].outstanding
    }

    /// Submits and sleeps until a completion comes or `timeout` has passed.
    pub fn wait(&mut self, timeout: Duration) {
        self.enters_count += 1;
        let timespec = Timespec::new().sec(timeout.as_secs()).nsec(timeout.subsec_nanos());
        let args = SubmitArgs::new().timespec(&timespec);
        if let Err(error) = self.uring.submitter().submit_with_args(1, &args) {
            let errno = error.raw_os_error().unwrap_or(0);
            if ![libc::ETIME, libc::EINTR, libc::EAGAIN, libc::EBUSY].contains(&errno) {
                self.last_errno = Some(errno);
            }
        }
    }

    /// True when the ring runs completions only when asked (DEFER_TASKRUN).
    #[must_use]
    pub fn defers_taskrun(&self) -> bool {
        self.defer_taskrun
    }

    /// Bytes of shared ring memory, for the operator.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        let params = self.uring.params();
        bytes_u64(index(params.sq_entries()) * 64 + index(params.cq_entries()) * 16)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, AsRawFd};

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn ring() -> Ring {
        let mut ring = Ring::new(&[]).unwrap();
        ring.enable().unwrap();
        ring
    }

    #[test]
    fn a_watch_reports_every_write_and_ends_once() {
        let mut ring = ring();
        let client = ring.add_client(8).unwrap();
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        assert!(ring.watch(client, 7, fd.as_raw_fd()));
        ring.commit();
        for _ in 0..2 {
            rustix::io::write(fd.as_fd(), &1u64.to_ne_bytes()).unwrap();
            ring.wait(Duration::from_secs(5));
            ring.reap();
            let event = ring.next_event(client).unwrap();
            assert_eq!((event.token, event.more), (7, true));
        }
        assert!(ring.unwatch(client, 7));
        ring.wait(Duration::from_secs(5));
        ring.reap();
        let event = ring.next_event(client).unwrap();
        assert_eq!((event.token, event.more, event.result), (7, false, -libc::ECANCELED));
        assert_eq!(ring.outstanding(), 0);
    }

    #[test]
    fn a_removed_clients_id_waits_for_its_last_completion() {
        let mut ring = ring();
        let first = ring.add_client(1).unwrap();
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        assert!(ring.watch(first, 1, fd.as_raw_fd()));
        ring.commit();
        assert!(ring.unwatch(first, 1));
        ring.remove_client(first);
        let second = ring.add_client(1).unwrap();
        assert_ne!(first, second);
        ring.wait(Duration::from_secs(5));
        ring.reap();
        assert_eq!(ring.outstanding(), 0);
        assert!(ring.next_event(second).is_none());
        assert_eq!(ring.add_client(1).unwrap(), first);
    }

    /// Signals in the middle of a wait and of entries: nothing is lost, nothing is an error.
    #[test]
    fn interrupted_system_calls_lose_nothing() {
        use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

        static HITS: AtomicU64 = AtomicU64::new(0);
        extern "C" fn note(_: libc::c_int) {
            HITS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: an all-zero sigaction without SA_RESTART is valid; the handler only counts.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note as *const () as usize;
            assert_eq!(libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()), 0);
        }
        let mut ring = ring();
        let client = ring.add_client(8).unwrap();
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        assert!(ring.watch(client, 7, fd.as_raw_fd()));
        // SAFETY: names the calling thread, which outlives the scope below.
        let this = unsafe { libc::pthread_self() };
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // SAFETY: the thread is alive until the scope ends.
                    unsafe { libc::pthread_kill(this, libc::SIGUSR1) };
                    std::thread::sleep(Duration::from_micros(200));
                }
            });
            let mut heard = 0;
            for round in 0..200_u32 {
                // Some waits are cut short; others find what they wait for.
                ring.wait(Duration::from_millis(1));
                rustix::io::write(fd.as_fd(), &1u64.to_ne_bytes()).unwrap();
                let start = std::time::Instant::now();
                while heard <= round {
                    ring.commit();
                    ring.reap();
                    while let Some(event) = ring.next_event(client) {
                        assert!(event.more && event.result > 0, "{event:?}");
                        heard += 1;
                    }
                    assert!(start.elapsed() < Duration::from_secs(10), "an event was lost");
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(HITS.load(Ordering::Relaxed) > 20);
        assert!(ring.take_error().is_none());
    }

    #[test]
    fn a_client_with_nothing_in_flight_always_finds_room() {
        let mut ring = ring();
        let (hog, small) = (ring.add_client(1).unwrap(), ring.add_client(1).unwrap());
        // In place of thousands of operations: their count.
        ring.inboxes[usize::from(hog.0)].outstanding = RING_CQ_ENTRIES - RING_ENTRIES_RESERVED;
        ring.outstanding = RING_CQ_ENTRIES - RING_ENTRIES_RESERVED;
        assert_eq!(ring.room_for(hog), 0);
        assert_eq!(ring.room_for(small), RING_ENTRIES_GUARANTEED);
        ring.inboxes[usize::from(small.0)].outstanding = RING_ENTRIES_GUARANTEED;
        ring.outstanding += RING_ENTRIES_GUARANTEED;
        assert_eq!((ring.room_for(small), ring.room_for(hog)), (0, 0));
        ring.outstanding = RING_CQ_ENTRIES;
        ring.inboxes[usize::from(small.0)].outstanding = 0;
        assert_eq!(ring.room_for(small), 0, "what is not there cannot be given");
        ring.inboxes[usize::from(hog.0)].outstanding = 0;
        ring.outstanding = 0;
        assert_eq!(ring.room_for(hog), RING_CQ_ENTRIES - RING_ENTRIES_RESERVED);
    }

    #[test]
    fn forbidden_operations_are_refused_by_the_kernel() {
        let mut ring = ring();
        let client = ring.add_client(1).unwrap();
        let path = c"/etc/hostname";
        let entry = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr()).build();
        // SAFETY: the path is a static string.
        assert!(unsafe { ring.push(client, 1, entry) });
        ring.commit();
        ring.wait(Duration::from_secs(1));
        ring.reap();
        assert_eq!(ring.next_event(client).unwrap().result, -libc::EACCES);
    }
}
