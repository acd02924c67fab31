//! Discards on block devices of kernels before 6.12, whose only way is an ioctl that blocks: one thread per process.
//!
//! Flow: channel → `jobs` → this thread → the channel's `Answers` → channel. Queues are lockless and bounded; a channel
//! with a job here keeps its reactor polling, so nobody needs to be woken. Owner: started by a control thread, never
//! ends. **Invariant:** a job keeps the disk (and its lock) open until it is answered.
#![expect(unsafe_code)] // UNSAFETY: the BLKDISCARD ioctl, and a ring entry that names no memory.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, OnceLock};
use std::thread::Thread;

use crossbeam_queue::ArrayQueue;
use io_uring::{IoUring, opcode, types};
use ringmill_core::io::Tag;

use super::{REQUESTS_MAX, Shared};
use crate::flight::{BLOCK_URING_CMD_DISCARD, discard_command};

/// Jobs waiting; a full queue makes channels try again.
const JOBS_MAX: usize = 1024;

/// `_IO(0x12, 119)` (`linux/fs.h`).
const BLKDISCARD: libc::Ioctl = 0x1277;

/// Results for one channel: the request and 0 or a negative errno.
pub(super) type Answers = ArrayQueue<(Tag, i32)>;

/// Room for every request that a channel can have here.
pub(super) fn answers() -> Arc<Answers> {
    Arc::new(ArrayQueue::new(REQUESTS_MAX))
}

/// One discard.
pub(super) struct Job {
    pub(super) shared: Arc<Shared>,
    pub(super) offset_bytes: u64,
    pub(super) len_bytes: u64,
    pub(super) flight: Tag,
    pub(super) answers: Arc<Answers>,
}

struct Helper {
    jobs: Arc<ArrayQueue<Job>>,
    thread: Thread,
}

static HELPER: OnceLock<Helper> = OnceLock::new();

/// Starts the thread unless it runs already.
pub(super) fn start() -> io::Result<()> {
    if HELPER.get().is_some() {
        return Ok(());
    }
    let jobs = Arc::new(ArrayQueue::new(JOBS_MAX));
    let queue = Arc::clone(&jobs);
    let builder = std::thread::Builder::new().name("ringmill-discard".to_owned());
    let handle = builder.spawn(move || serve(&queue))?;
    // Two disks opened at once may both come here; the loser's thread sleeps for ever on its empty queue.
    let _ = HELPER.set(Helper { jobs, thread: handle.thread().clone() });
    Ok(())
}

/// Hands a job over.
///
/// # Errors
/// Returns the job when the queue is full or there is no thread.
pub(super) fn send(job: Job) -> Result<(), Job> {
    match HELPER.get() {
        Some(helper) => {
            helper.jobs.push(job)?;
            helper.thread.unpark();
            Ok(())
        }
        None => Err(job),
    }
}

fn serve(jobs: &ArrayQueue<Job>) {
    loop {
        match jobs.pop() {
            Some(job) => {
                let result = discard(&job.shared.file, job.offset_bytes, job.len_bytes);
                let errno = result.err().map_or(0, |e| e.raw_os_error().unwrap_or(libc::EIO));
                // The queue has room for every request of its channel.
                let _ = job.answers.push((job.flight, -errno));
            }
            None => std::thread::park(),
        }
    }
}

fn discard(file: &File, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
    let range = [offset_bytes, len_bytes];
    // SAFETY: BLKDISCARD reads two u64 from the pointer; the descriptor is open while `file` is borrowed.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// True when the kernel knows the discard command of Linux 6.12 for this device: it then refuses an odd range as odd.
pub(super) fn ring_discards(file: &File) -> bool {
    let Ok(mut ring) = IoUring::new(2) else { return false };
    let command = opcode::UringCmd16::new(types::Fd(file.as_raw_fd()), BLOCK_URING_CMD_DISCARD);
    // SAFETY: the entry names no memory.
    if unsafe { ring.submission().push(&discard_command(command, 1, 1)) }.is_err() {
        return false;
    }
    let answered = ring.submit_and_wait(1).is_ok();
    let result = ring.completion().next().map(|entry| entry.result());
    answered && result == Some(-libc::EINVAL)
}
