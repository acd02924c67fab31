//! The controller's registers with names, and the one place where "all ones" means that it is gone.
//!
//! Owner: the thread that attaches, then the controller's thread. **Invariant:** every value read is checked for all ones
//! before anything is made of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ringmill_core::spec::nvme::{Status, cap, cc, csts, reg};

use crate::pci::Registers;

use super::NvmeError;

/// What CAP counts time in.
const TIME_UNIT: Duration = Duration::from_millis(500);

/// No controller has to be faster than this, whatever it says: some count from the end of their own start-up.
const READY_LEAST: Duration = Duration::from_secs(1);

/// What a controller can do, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capabilities(u64);

impl Capabilities {
    /// Entries of an I/O queue.
    pub(super) fn queue_entries_max(self) -> u32 {
        u32::from(self.low_u16()) + 1
    }

    fn low_u16(self) -> u16 {
        let [a, b, ..] = self.0.to_le_bytes();
        u16::from_le_bytes([a, b])
    }

    fn bits(self, shift: u32, mask: u8) -> u8 {
        (self.0 >> shift).to_le_bytes()[0] & mask
    }

    /// Doorbells are `4 << stride` bytes apart.
    pub(super) fn doorbell_stride(self) -> u32 {
        u32::from(self.bits(cap::DSTRD_SHIFT, 0xf))
    }

    /// The smallest page is 2^(12+n) bytes.
    pub(super) fn page_min_shift(self) -> u32 {
        u32::from(self.bits(cap::MPSMIN_SHIFT, 0xf))
    }

    /// Supported command sets: bit 0 NVM, bit 6 by CC.CSS = 6, bit 7 none.
    pub(super) fn command_sets(self) -> u8 {
        self.bits(cap::CSS_SHIFT, 0xff)
    }

    fn waits_for_media(self) -> bool {
        self.0 & cap::CRWMS != 0
    }

    fn timeout_units(self) -> u32 {
        u32::from(self.bits(cap::TO_SHIFT, 0xff))
    }
}

/// The offset of a doorbell; queue pair `qid`, its completion side or not.
pub(super) fn doorbell_offset(qid: u16, completion: bool, stride: u32) -> usize {
    let number = 2 * usize::from(qid) + usize::from(completion);
    reg::DOORBELLS + (number << (2 + stride))
}

/// Somebody waits for the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Since when that is known.
    pub(super) since: Instant,
    /// How long a command that is out is waited for from then on: after its answer there can be an orderly end.
    pub(super) for_command: Duration,
    /// How long everything else is: what is sound ends before.
    pub(super) for_others: Duration,
}

/// Asks whether somebody wants the device back, or it is to be detached.
#[derive(Clone)]
pub(super) struct WantedBack(pub(super) Arc<dyn Fn() -> Option<Wanted> + Send + Sync>);

impl std::fmt::Debug for WantedBack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WantedBack")
    }
}

/// BAR 0.
#[derive(Debug)]
pub(super) struct Bar<R> {
    registers: Arc<R>,
    device: String,
    /// Cuts waits short; not those of an end that was asked for.
    pub(super) wanted_back: Option<WantedBack>,
}

impl<R: Registers> Bar<R> {
    pub(super) fn new(registers: Arc<R>, device: &str) -> Bar<R> {
        Bar { registers, device: device.to_owned(), wanted_back: None }
    }

    pub(super) fn registers(&self) -> &Arc<R> {
        &self.registers
    }

    pub(super) fn device(&self) -> &str {
        &self.device
    }

    pub(super) fn gone(&self) -> NvmeError {
        NvmeError::Gone { device: self.device.clone() }
    }

    fn wanted(&self) -> Option<Wanted> {
        self.wanted_back.as_ref().and_then(|WantedBack(ask)| ask())
    }

    /// True once somebody waits for the end of what is under way.
    pub(super) fn is_wanted(&self) -> bool {
        self.wanted().is_some()
    }

    fn cut(&self, is_cut: impl FnOnce(Wanted) -> bool) -> Result<(), NvmeError> {
        match self.wanted() {
            Some(wanted) if is_cut(wanted) => {
                Err(NvmeError::Wanted { device: self.device.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Ends a wait for anything but a command when nobody should wait any longer.
    pub(super) fn check_wanted(&self) -> Result<(), NvmeError> {
        self.cut(|wanted| wanted.since.elapsed() >= wanted.for_others)
    }

    /// Ends a wait for a command; also where each of many is quick enough.
    pub(super) fn check_wanted_by_command(&self) -> Result<(), NvmeError> {
        self.cut(|wanted| wanted.since.elapsed() >= wanted.for_command)
    }

    /// A pause that a device needs.
    pub(super) fn pause(&self, length: Duration) -> Result<(), NvmeError> {
        let start = Instant::now();
        while let left = length.saturating_sub(start.elapsed())
            && !left.is_zero()
        {
            self.check_wanted()?;
            std::thread::sleep(left.min(Duration::from_millis(20)));
        }
        Ok(())
    }

    pub(super) fn refused(&self, reason: impl Into<String>) -> NvmeError {
        NvmeError::Refused { device: self.device.clone(), reason: reason.into() }
    }

    pub(super) fn nonsense(&self, what: impl Into<String>) -> NvmeError {
        NvmeError::Nonsense { device: self.device.clone(), what: what.into() }
    }

    pub(super) fn failed(&self, command: &'static str, status: Status) -> NvmeError {
        NvmeError::Command { device: self.device.clone(), command, status }
    }

    fn read(&self, offset_bytes: usize) -> Result<u32, NvmeError> {
        match self.registers.read_u32(offset_bytes) {
            u32::MAX => Err(self.gone()),
            value => Ok(value),
        }
    }

    pub(super) fn capabilities(&self) -> Result<Capabilities, NvmeError> {
        match self.registers.read_u64(reg::CAP) {
            u64::MAX => Err(self.gone()),
            value => Ok(Capabilities(value)),
        }
    }

    /// Major, minor, tertiary.
    pub(super) fn version(&self) -> Result<(u16, u8, u8), NvmeError> {
        let [tertiary, minor, low, high] = self.read(reg::VS)?.to_le_bytes();
        Ok((u16::from_le_bytes([low, high]), minor, tertiary))
    }

    /// CSTS.
    pub(super) fn status(&self) -> Result<u32, NvmeError> {
        self.read(reg::CSTS)
    }

    /// CSTS of a controller that is to work: no fatal status either.
    pub(super) fn healthy_status(&self) -> Result<u32, NvmeError> {
        let status = self.status()?;
        if status & csts::CFS != 0 {
            return Err(NvmeError::Fatal { device: self.device.clone() });
        }
        Ok(status)
    }

    pub(super) fn configuration(&self) -> Result<u32, NvmeError> {
        self.read(reg::CC)
    }

    pub(super) fn set_configuration(&self, value: u32) {
        self.registers.write_u32(reg::CC, value);
    }

    /// Where the admin queues are, and their sizes.
    pub(super) fn set_admin_queues(&self, sq_iova: u64, cq_iova: u64, entries: u16) {
        let entries_z = u32::from(entries - 1);
        self.registers.write_u32(reg::AQA, entries_z | entries_z << 16);
        self.registers.write_u64(reg::ASQ, sq_iova);
        self.registers.write_u64(reg::ACQ, cq_iova);
    }

    pub(super) fn ring(&self, offset_bytes: usize, value: u16) {
        self.registers.write_u32(offset_bytes, u32::from(value));
    }

    /// How long the controller may take to get ready or to stop, at most `most`.
    pub(super) fn ready_within(&self, cap: Capabilities, most: Duration) -> Duration {
        let mut units = cap.timeout_units();
        if cap.waits_for_media() {
            // A controller of version 2.0 says more here than eight bits can; zero, or all ones of one that left meanwhile,
            // change nothing that `most` would not bound.
            units = units.max(self.registers.read_u32(reg::CRTO) & 0xffff);
        }
        // One unit more: the value is rounded, and so is our clock.
        (TIME_UNIT * (units + 1)).clamp(READY_LEAST.min(most), most)
    }

    /// Waits until the bits of CSTS in `mask` are `value`; `tolerate_fatal` while it is being stopped.
    pub(super) fn wait_status(
        &self,
        mask: u32,
        value: u32,
        within: Duration,
        tolerate_fatal: bool,
        (what, advice): (&'static str, &'static str),
    ) -> Result<(), NvmeError> {
        let start = Instant::now();
        let mut pause = Duration::from_micros(20);
        loop {
            // The clock first: a thread that was off its core for long still looks once more.
            let late = start.elapsed() >= within;
            let status = if tolerate_fatal { self.status()? } else { self.healthy_status()? };
            if status & mask == value {
                return Ok(());
            }
            if late {
                return Err(NvmeError::TooSlow {
                    device: self.device.clone(),
                    what,
                    within,
                    advice,
                });
            }
            self.check_wanted()?;
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(5));
        }
    }
}

/// CC for an enabled controller: pages of 4 KiB, entries of 64 and 16 bytes.
pub(super) fn enabled_configuration(command_set: u32) -> u32 {
    const SQE_SHIFT: u32 = 6;
    const CQE_SHIFT: u32 = 4;
    cc::EN
        | command_set << cc::CSS_SHIFT
        | SQE_SHIFT << cc::IOSQES_SHIFT
        | CQE_SHIFT << cc::IOCQES_SHIFT
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Fake(Mutex<Vec<u32>>);

    impl Registers for Fake {
        fn len_bytes(&self) -> usize {
            0x2000
        }

        fn read_u32(&self, offset_bytes: usize) -> u32 {
            self.0.lock().unwrap().get(offset_bytes / 4).copied().unwrap_or(u32::MAX)
        }

        fn write_u32(&self, offset_bytes: usize, value: u32) {
            if let Some(word) = self.0.lock().unwrap().get_mut(offset_bytes / 4) {
                *word = value;
            }
        }
    }

    fn bar(words: Vec<u32>) -> Bar<Fake> {
        Bar::new(Arc::new(Fake(Mutex::new(words))), "fake")
    }

    #[test]
    fn all_ones_are_a_controller_that_is_gone_wherever_they_are_read() {
        let bar = bar(vec![u32::MAX; 16]);
        assert!(matches!(bar.capabilities(), Err(NvmeError::Gone { .. })));
        assert!(matches!(bar.version(), Err(NvmeError::Gone { .. })));
        assert!(matches!(bar.configuration(), Err(NvmeError::Gone { .. })));
        assert!(matches!(bar.status(), Err(NvmeError::Gone { .. })));
        let end = bar.wait_status(1, 1, Duration::from_secs(60), true, ("x", "y"));
        assert!(matches!(end, Err(NvmeError::Gone { .. })));
    }

    #[test]
    fn fatal_ends_a_wait_unless_it_is_being_stopped() {
        let mut words = vec![0; 16];
        words[reg::CSTS / 4] = csts::CFS | csts::RDY;
        let bar = bar(words);
        let wait = |tolerate| bar.wait_status(csts::RDY, 0, Duration::ZERO, tolerate, ("x", "y"));
        assert!(matches!(wait(false), Err(NvmeError::Fatal { .. })));
        assert!(matches!(wait(true), Err(NvmeError::TooSlow { .. })));
    }

    #[test]
    fn capabilities_are_cut_from_the_right_bits() {
        let cap = Capabilities(
            0xffff
                | cap::CQR
                | 3 << cap::TO_SHIFT
                | 2 << cap::DSTRD_SHIFT
                | 0x41 << cap::CSS_SHIFT
                | 1 << cap::MPSMIN_SHIFT
                | 4 << cap::MPSMAX_SHIFT,
        );
        assert_eq!(cap.queue_entries_max(), 65536);
        assert_eq!(cap.doorbell_stride(), 2);
        assert_eq!(cap.command_sets(), 0x41);
        assert_eq!(cap.page_min_shift(), 1);
        let bar = bar(vec![0; 32]);
        assert_eq!(bar.ready_within(cap, Duration::from_secs(9)), Duration::from_secs(2));
        assert_eq!(bar.ready_within(cap, Duration::from_millis(7)), Duration::from_millis(7));
        assert_eq!(bar.ready_within(Capabilities(0), Duration::from_secs(9)), READY_LEAST);
        assert_eq!(doorbell_offset(3, true, 2), 0x1000 + 7 * 16);
    }

    #[test]
    fn a_ready_time_beyond_eight_bits_is_believed_up_to_the_bound() {
        let mut words = vec![0; 32];
        words[reg::CRTO / 4] = 0xffff_0400;
        let (bar, cap) = (bar(words), Capabilities(cap::CRWMS | 1 << cap::TO_SHIFT));
        let within = |most| bar.ready_within(cap, Duration::from_secs(most));
        assert_eq!(within(1000), TIME_UNIT * 1025);
        assert_eq!(within(60), Duration::from_secs(60));
    }
}
