//! What a user may choose about a controller.

use std::time::Duration;

use ringmill_core::limits::{CORES_MAX, NAME_BYTES_MAX, NVME_QUEUE_ENTRIES_MAX};

use super::NvmeError;

/// The shortest time-out: a disk that spins up or collects garbage is not broken yet.
const TIMEOUT_LEAST: Duration = Duration::from_millis(10);
/// The longest: a week is the same as never, and keeps sums far from overflow.
const TIMEOUT_MOST: Duration = Duration::from_secs(7 * 24 * 3600);

/// What happens to a command without an answer, after its completion queue was looked at once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ActionOnTimeout {
    /// It is counted and logged; the guest waits on.
    None,
    /// It is aborted; if that does not end it, the controller is reset.
    #[default]
    Abort,
    /// The controller is reset.
    Reset,
}

/// How to use a controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NvmeOptions {
    /// Its name; bdevs are called `<name>n<nsid>`.
    pub name: String,
    /// I/O queue pairs; 0: one per reactor. The controller may grant fewer.
    pub num_io_queues: u32,
    /// Entries of each I/O queue, 2 to 1,024; the controller may allow fewer.
    pub io_queue_size: u16,
    /// How long an I/O command may take; zero: for ever.
    pub timeout: Duration,
    /// How long an admin command may take.
    pub timeout_admin: Duration,
    /// What happens then.
    pub action_on_timeout: ActionOnTimeout,
    /// The longest that the controller may take to get ready or to stop, whatever it says itself (CAP.TO): 1 ms to 7 days.
    pub ready_timeout_max: Duration,
}

impl Default for NvmeOptions {
    fn default() -> NvmeOptions {
        NvmeOptions {
            name: "Nvme0".to_owned(),
            num_io_queues: 0,
            io_queue_size: 256,
            timeout: Duration::from_secs(30),
            timeout_admin: Duration::from_secs(10),
            action_on_timeout: ActionOnTimeout::default(),
            // What CAP.TO can say at most.
            ready_timeout_max: Duration::from_secs(128),
        }
    }
}

impl NvmeOptions {
    /// Looks whether they make sense.
    ///
    /// # Errors
    /// [`NvmeError::Option`].
    pub fn check(&self) -> Result<(), NvmeError> {
        let fail = |reason: String| Err(NvmeError::Option { name: self.name.clone(), reason });
        // Room for `n` and the number of a namespace.
        if self.name.is_empty() || self.name.len() + 11 > NAME_BYTES_MAX {
            return fail(format!("a name has 1 to {} bytes", NAME_BYTES_MAX - 11));
        }
        if !(2..=NVME_QUEUE_ENTRIES_MAX).contains(&self.io_queue_size) {
            return fail(format!(
                "io_queue_size is {}; it must be 2 to {NVME_QUEUE_ENTRIES_MAX}",
                self.io_queue_size
            ));
        }
        if usize::try_from(self.num_io_queues).is_ok_and(|n| n > CORES_MAX) {
            return fail(format!(
                "num_io_queues is {}; it must be at most {CORES_MAX}, or 0 for one per reactor",
                self.num_io_queues
            ));
        }
        let admin = self.timeout_admin;
        let io_bad =
            !self.timeout.is_zero() && !(TIMEOUT_LEAST..=TIMEOUT_MOST).contains(&self.timeout);
        if io_bad || !(TIMEOUT_LEAST..=TIMEOUT_MOST).contains(&admin) {
            return fail(
                "time-outs must be from 10 ms to 7 days; an I/O time-out of 0 means to wait for ever"
                    .to_owned(),
            );
        }
        if !(Duration::from_millis(1)..=TIMEOUT_MOST).contains(&self.ready_timeout_max) {
            return fail("ready_timeout_max must be from 1 ms to 7 days".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_out_of_range_are_refused_with_the_right_range() {
        let good = NvmeOptions::default();
        assert!(good.check().is_ok());
        assert!(NvmeOptions { timeout: Duration::ZERO, ..good.clone() }.check().is_ok());
        for (bad, word) in [
            (NvmeOptions { name: String::new(), ..good.clone() }, "name"),
            (NvmeOptions { name: "x".repeat(120), ..good.clone() }, "name"),
            (NvmeOptions { io_queue_size: 1, ..good.clone() }, "2 to 1024"),
            (NvmeOptions { io_queue_size: 1025, ..good.clone() }, "2 to 1024"),
            (NvmeOptions { num_io_queues: 1025, ..good.clone() }, "1024"),
            (NvmeOptions { timeout: Duration::from_millis(9), ..good.clone() }, "10 ms"),
            (NvmeOptions { timeout_admin: Duration::ZERO, ..good.clone() }, "10 ms"),
            (NvmeOptions { timeout_admin: Duration::MAX, ..good.clone() }, "7 days"),
            (NvmeOptions { ready_timeout_max: Duration::ZERO, ..good.clone() }, "1 ms"),
        ] {
            let words = bad.check().unwrap_err().to_string();
            assert!(words.contains(word), "{words}");
        }
    }
}
