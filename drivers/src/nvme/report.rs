//! What a controller tells about itself, as plain data.

use std::time::Duration;

use uuid::Uuid;

/// What a controller is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControllerState {
    /// It serves.
    Enabled,
    /// It is being reset; requests wait.
    Resetting,
    /// It was given up; requests fail.
    Failed,
    /// It went away, or was asked for by somebody else.
    Removed,
    /// It was let go.
    Detached,
}

impl ControllerState {
    /// In one word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            ControllerState::Enabled => "enabled",
            ControllerState::Resetting => "resetting",
            ControllerState::Failed => "failed",
            ControllerState::Removed => "removed",
            ControllerState::Detached => "detached",
        }
    }
}

/// Rare events since the controller was attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Commands that had no answer in time.
    pub timeouts: u64,
    /// Of them, those whose answer was there when the queue was looked at again.
    pub late_answers: u64,
    /// Aborts sent.
    pub aborts: u64,
    /// Of them, those that ended their command.
    pub aborts_done: u64,
    /// Resets, by request or for trouble.
    pub resets: u64,
    /// Of them, those that did not bring the controller back.
    pub resets_failed: u64,
    /// Completions that belonged to no command.
    pub stale: u64,
    /// Commands given to the device again.
    pub retries: u64,
    /// Asynchronous events that came.
    pub events: u64,
}

/// A controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllerInfo {
    /// Its name here.
    pub name: String,
    /// What it does.
    pub state: ControllerState,
    /// Its address as the backing names it: `0000:01:00.0`, or a socket's path.
    pub address: String,
    /// Its number in the subsystem.
    pub cntlid: u16,
    /// PCI vendor.
    pub vendor: u16,
    /// PCI device.
    pub device: u16,
    /// Model number.
    pub model: String,
    /// Serial number.
    pub serial: String,
    /// Firmware revision.
    pub firmware: String,
    /// Version of the specification: `1.4.0`.
    pub version: String,
    /// I/O queue pairs that are used.
    pub queue_pairs: u16,
    /// I/O queue pairs that the controller granted.
    pub queue_pairs_granted: u16,
    /// Entries of each.
    pub queue_entries: u16,
    /// Entries that the controller allows (CAP.MQES + 1).
    pub queue_entries_max: u32,
    /// Interrupt vectors.
    pub vectors: u16,
    /// Largest transfer, bytes; 0: no limit.
    pub transfer_bytes_max: u64,
    /// Scatter-gather lists are used where PRPs do not fit.
    pub sgl: bool,
    /// There is a volatile write cache, so flushes are sent.
    pub write_cache: bool,
    /// Doorbells are shadowed in memory.
    pub shadow_doorbells: bool,
    /// Workarounds in force, in words.
    pub quirks: Vec<&'static str>,
    /// What it has been through.
    pub counters: Counters,
    /// The last failure in words.
    pub last_error: Option<String>,
}

/// A namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceInfo {
    /// Its number.
    pub nsid: u32,
    /// The name of its bdev.
    pub bdev_name: String,
    /// Logical blocks now.
    pub blocks_count: u64,
    /// Bytes of a block.
    pub block_bytes: u32,
    /// Identity, from the namespace's descriptors or made of them.
    pub uuid: Uuid,
    /// NGUID, hexadecimal; empty where it has none.
    pub nguid: String,
    /// EUI64, hexadecimal; empty where it has none.
    pub eui64: String,
    /// Writes are refused.
    pub read_only: bool,
    /// Why it has no bdev, and what to do.
    pub refused: Option<String>,
}

/// SMART / health information.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// How old this is.
    pub age: Duration,
    /// Bits: 0 spare low, 1 temperature, 2 reliability, 3 read-only, 4 backup failed, 5 memory region.
    pub critical_warning: u8,
    /// Kelvin.
    pub temperature_kelvin: u16,
    /// Per cent.
    pub available_spare: u8,
    /// Per cent.
    pub available_spare_threshold: u8,
    /// Per cent, may exceed 100.
    pub percentage_used: u8,
    /// Units of 512,000 bytes.
    pub data_units_read: u128,
    /// Units of 512,000 bytes.
    pub data_units_written: u128,
    /// Commands.
    pub host_read_commands: u128,
    /// Commands.
    pub host_write_commands: u128,
    /// Minutes.
    pub busy_minutes: u128,
    /// Times.
    pub power_cycles: u128,
    /// Hours.
    pub power_on_hours: u128,
    /// Times.
    pub unsafe_shutdowns: u128,
    /// Errors.
    pub media_errors: u128,
    /// Entries.
    pub error_log_entries: u128,
    /// Minutes.
    pub warning_temperature_minutes: u32,
    /// Minutes.
    pub critical_temperature_minutes: u32,
}
