//! What tests ask the device model: how often something was seen.
//!
//! Owner: written by the model's thread alone (but where noted), read by anybody. So an increment is a load and a store.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Things that are counted besides commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Count {
    /// Doorbells found changed. Several writes between two looks are one.
    Doorbells,
    /// I/O commands with data by PRPs.
    Prp,
    /// Commands with data by SGLs.
    Sgl,
    /// Violations of the specification by the driver; [`Counters::first_protocol_error`] has the first.
    ProtocolErrors,
    /// Accesses outside of what is mapped for the device; [`Counters::first_fault`] has the first.
    DmaFaults,
    /// Memory taken away in which the device had a queue, and never said otherwise; [`Counters::first_theft`] has the first.
    Thefts,
    /// Interrupts raised: eventfds written to.
    Interrupts,
    /// Commands across a namespace's optimal I/O boundary.
    BoundaryCrossings,
    /// Garbage written on demand into memory of commands that were never answered.
    Scribbles,
    /// Writes and write zeroes with FUA.
    Fua,
    /// Write zeroes that allowed to deallocate.
    Deac,
    /// Ranges in deallocate commands.
    Ranges,
    /// Commands on which a rule of `ModelControl::rule` acted.
    Faults,
    /// Times the controller was enabled.
    Enables,
    /// Function resets.
    Resets,
    /// Completed normal shutdowns.
    Shutdowns,
    /// Commands that were out when the controller was disabled or reset.
    Dropped,
}

const COUNTS: usize = Count::Dropped as usize + 1;

/// All counters.
#[derive(Debug)]
pub struct Counters {
    counts: [AtomicU64; COUNTS],
    admin: [AtomicU64; 256],
    io: [AtomicU64; 256],
    first_protocol_error: Mutex<Option<String>>,
    first_fault: Mutex<Option<String>>,
    first_theft: Mutex<Option<String>>,
}

impl Counters {
    pub(super) fn new() -> Counters {
        Counters {
            counts: [const { AtomicU64::new(0) }; COUNTS],
            admin: [const { AtomicU64::new(0) }; 256],
            io: [const { AtomicU64::new(0) }; 256],
            first_protocol_error: Mutex::new(None),
            first_fault: Mutex::new(None),
            first_theft: Mutex::new(None),
        }
    }

    /// How often.
    #[must_use]
    pub fn get(&self, count: Count) -> u64 {
        self.counts[count as usize].load(Ordering::Acquire)
    }

    /// Admin commands fetched with that opcode.
    #[must_use]
    pub fn admin(&self, opcode: u8) -> u64 {
        self.admin[usize::from(opcode)].load(Ordering::Acquire)
    }

    /// I/O commands fetched with that opcode.
    #[must_use]
    pub fn io(&self, opcode: u8) -> u64 {
        self.io[usize::from(opcode)].load(Ordering::Acquire)
    }

    /// What the driver did wrong first.
    #[must_use]
    pub fn first_protocol_error(&self) -> Option<String> {
        self.first_protocol_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The first access outside of what was mapped.
    #[must_use]
    pub fn first_fault(&self) -> Option<String> {
        self.first_fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The first memory that was taken away while a queue of the device was in it.
    #[must_use]
    pub fn first_theft(&self) -> Option<String> {
        self.first_theft.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    #[cold]
    pub(super) fn fault(&self, text: impl FnOnce() -> String) {
        let mut first = self.first_fault.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(text);
        self.add(Count::DmaFaults, 1);
    }

    #[cold]
    pub(super) fn theft(&self, text: impl FnOnce() -> String) {
        let mut first = self.first_theft.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(text);
        self.add(Count::Thefts, 1);
    }

    #[inline]
    pub(super) fn add(&self, count: Count, more: u64) {
        bump(&self.counts[count as usize], more);
    }

    #[inline]
    pub(super) fn command(&self, is_admin: bool, opcode: u8) {
        let table = if is_admin { &self.admin } else { &self.io };
        bump(&table[usize::from(opcode)], 1);
    }

    /// May be called by any thread.
    #[cold]
    pub(super) fn protocol_error(&self, text: impl FnOnce() -> String) {
        let mut first = self.first_protocol_error.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(text);
        self.counts[Count::ProtocolErrors as usize].fetch_add(1, Ordering::AcqRel);
    }
}

#[inline]
fn bump(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(more), Ordering::Release);
}
