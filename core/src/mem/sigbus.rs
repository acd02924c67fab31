//! SIGBUS safety: a front-end that truncates its memory file must not kill the daemon.
//!
//! Flow: mappings register here; the handler finds the faulting address in a fixed lock-free table, puts zero pages over
//! the whole mapping and raises its flag. Control threads register and unregister, any thread may fault.
//! **Invariant:** the handler only loads and stores atomics and calls `mmap`/`sigaction`; unknown addresses re-raise.
#![expect(unsafe_code)] // UNSAFETY: a signal handler and MAP_FIXED over ranges that this table owns.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

use crate::limits::FOREIGN_MAPPINGS_MAX;

struct Entry {
    /// Odd while the entry is free or changes. Addresses recur, so `start` alone does not tell one use from the next.
    generation: AtomicU64,
    start: AtomicUsize,
    len_bytes: AtomicUsize,
    failed: AtomicBool,
    claimed: AtomicBool,
}

impl Entry {
    /// Enters a mapping into a free entry. The caller has claimed it.
    fn publish(&self, start: usize, len_bytes: usize) {
        // What follows `retire`, or the beginning, must not be seen with the even number before it.
        fence(Ordering::Release);
        self.failed.store(false, Ordering::Relaxed);
        self.len_bytes.store(len_bytes, Ordering::Relaxed);
        self.start.store(start, Ordering::Relaxed);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Frees it.
    fn retire(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// Start and length of one mapping; `None` when the entry is free or has changed meanwhile. `between` is for tests.
    fn read(&self, between: impl FnOnce()) -> Option<(usize, usize)> {
        let before = self.generation.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        between();
        let len_bytes = self.len_bytes.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let is_one = before.is_multiple_of(2) && self.generation.load(Ordering::Relaxed) == before;
        is_one.then_some((start, len_bytes))
    }
}

static TABLE: [Entry; FOREIGN_MAPPINGS_MAX] = [const {
    Entry {
        generation: AtomicU64::new(1),
        start: AtomicUsize::new(0),
        len_bytes: AtomicUsize::new(0),
        failed: AtomicBool::new(false),
        claimed: AtomicBool::new(false),
    }
}; FOREIGN_MAPPINGS_MAX];

/// Mappings lost so far.
static LOST: AtomicU32 = AtomicU32::new(0);

/// How many mappings have lost their memory since the process began: one load tells whether to look closer.
#[inline]
#[must_use]
pub fn lost_mappings_count() -> u32 {
    LOST.load(Ordering::Acquire)
}

/// One mapping's entry in the table; dropping it frees the entry.
#[derive(Debug)]
pub(super) struct Guard {
    index: usize,
}

impl Guard {
    /// Enters a mapping, or `None` when the table is full.
    pub(super) fn register(start: usize, len_bytes: usize) -> Option<Guard> {
        for (index, entry) in TABLE.iter().enumerate() {
            if entry.claimed.load(Ordering::Relaxed) || entry.claimed.swap(true, Ordering::Acquire)
            {
                continue;
            }
            entry.publish(start, len_bytes);
            return Some(Guard { index });
        }
        None
    }

    pub(super) fn failed(&self) -> bool {
        TABLE[self.index].failed.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let entry = &TABLE[self.index];
        entry.retire();
        entry.claimed.store(false, Ordering::Release);
    }
}

extern "C" fn handler(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
    let addr = unsafe { (*info).si_addr() } as usize;
    for entry in &TABLE {
        // The mapping that faulted stays registered meanwhile, so an entry that changes is another one's.
        let Some((start, len_bytes)) = entry.read(|| {}) else { continue };
        if addr < start || addr - start >= len_bytes {
            continue;
        }
        // Raised first, so that nobody takes the zeroes that follow for the owner's.
        entry.failed.store(true, Ordering::Release);
        // SAFETY: the range is one whole mapping that its `Guard` keeps registered while it exists; replacing its pages
        // by zero pages invalidates no pointer into it.
        let got = unsafe {
            libc::mmap(
                start as *mut libc::c_void,
                len_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if got != libc::MAP_FAILED {
            LOST.fetch_add(1, Ordering::Release);
            return;
        }
    }
    // Not ours: let the default action report the real bug when the instruction runs again.
    // SAFETY: setting a default disposition is async-signal-safe.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

/// Installs the handler for the process. Called once before the first foreign mapping is made.
///
/// # Errors
/// The kernel's refusal of `sigaction`.
pub fn install_sigbus_handler() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is a valid starting point; every field used is set below.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
    // SAFETY: `action` is initialised and `handler` has the signature that SA_SIGINFO asks for.
    let rc = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_that_is_used_again_at_the_same_address_is_not_read_as_one() {
        let entry = Entry {
            generation: AtomicU64::new(1),
            start: AtomicUsize::new(0),
            len_bytes: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
            claimed: AtomicBool::new(true),
        };
        assert_eq!(entry.read(|| {}), None, "free");
        entry.publish(0x1000, 1);
        assert_eq!(entry.read(|| {}), Some((0x1000, 1)));
        let reuse = || {
            entry.retire();
            entry.publish(0x1000, 0x10_0000);
        };
        assert_eq!(entry.read(reuse), None, "the start of one, the length of the other");
        assert_eq!(entry.read(|| {}), Some((0x1000, 0x10_0000)));
        assert_eq!(entry.read(|| entry.retire()), None);
        assert_eq!(entry.read(|| {}), None);
    }
}
