//! A controller that lies: registers, data and completions changed by bytes from outside (a fuzzer's, or a seed's).
//!
//! Flow: what the model would truthfully show → [`Lies`] → what the driver sees. Most of it stays true, so that a driver
//! gets through bring-up often. **Invariant:** lies change words, never what memory is touched: all accesses stay inside of
//! what is mapped for the device.

use ringmill_core::reactor::Entropy;
use ringmill_core::spec::nvme::{csts, reg};

use super::machine::Machine;

/// One in so many completions is changed, with the boldest first byte.
const BOLDNESS: u64 = 64;

/// What lies are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Lie {
    /// CSTS.
    Status,
    /// Another register.
    Register,
    /// Identify data or a log page.
    Data,
    /// An admin command's completion is changed, or another one comes with it.
    AdminAnswer,
    /// The same for an I/O command.
    IoAnswer,
    /// A completion is left out.
    Dropped,
    /// A completion comes twice.
    Doubled,
    /// A completion of nothing.
    Invented,
    /// An event index of doorbells in memory.
    EventIndex,
    /// Configuration space.
    Config,
}

const KINDS: usize = Lie::Config as usize + 1;

/// Where lies come from: the bytes given, then a generator seeded by them.
#[derive(Debug)]
pub(super) struct Lies {
    bytes: Vec<u8>,
    at: usize,
    chance: Entropy,
    /// Chances in 16,384 that a register is changed: they are polled.
    registers: u64,
    /// Chances in 256 that a block of data, a completion is changed.
    data: u64,
    completions: u64,
    /// Chances in 4,096 that a completion of an admin command is.
    answers: u64,
    /// Chances in 65,536 that an idle look posts something.
    idle: u64,
    /// It lies about these, a bit each.
    kinds: u64,
    told: [u64; KINDS],
    /// It said that it had stopped, and had not.
    feigned_stop: bool,
}

impl Lies {
    pub(super) fn new(bytes: Vec<u8>) -> Lies {
        let seed = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
        });
        let mut lies = Lies {
            bytes,
            at: 0,
            chance: Entropy::seeded(seed),
            registers: 0,
            data: 0,
            completions: 0,
            answers: 0,
            idle: 0,
            kinds: u64::MAX,
            told: [0; KINDS],
            feigned_stop: false,
        };
        lies.registers = lies.below(8);
        lies.data = lies.below(4) * 8;
        lies.completions = lies.below(BOLDNESS);
        lies.answers = lies.completions;
        lies.idle = lies.below(64);
        // Some have one weakness, so that what comes of it is not hidden by others.
        if lies.below(4) == 0 {
            lies.kinds = 1 << lies.below(KINDS as u64);
            (lies.registers, lies.data, lies.idle) = (16, 64, 256);
            (lies.completions, lies.answers) = (BOLDNESS, 256);
        }
        lies
    }

    fn next(&mut self) -> u64 {
        let Some(chunk) = self.bytes.get(self.at..).and_then(<[u8]>::first_chunk::<8>) else {
            return self.chance.next_u64();
        };
        self.at += 8;
        u64::from_le_bytes(*chunk) ^ self.chance.next_u64().rotate_left(17)
    }

    /// Notes a lie that is about to be told; false: it does not lie about that.
    fn tells(&mut self, kind: Lie) -> bool {
        let does = self.kinds & 1 << kind as usize != 0;
        self.told[kind as usize] += u64::from(does);
        does
    }

    pub(super) fn told(&self, kind: Lie) -> u64 {
        self.told[kind as usize]
    }

    /// It may have made a driver believe that it had stopped, or forgotten a queue. Not an answer that did not come, nor a
    /// fatal status: after them it may still write.
    pub(super) fn excuses(&self) -> bool {
        self.feigned_stop || self.told(Lie::AdminAnswer) + self.told(Lie::Invented) > 0
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    fn word(&mut self) -> u32 {
        (self.next() >> 32) as u32
    }

    /// A word that is a little wrong, an edge, or noise.
    fn twist(&mut self, value: u32) -> u32 {
        match self.below(6) {
            0 => value ^ 1 << self.below(32),
            1 => value.wrapping_add(1),
            2 => 0,
            3 => u32::MAX,
            4 => value ^ self.word() & 0xff,
            _ => self.word(),
        }
    }

    /// What a read of a register answers.
    pub(super) fn register(&mut self, offset_bytes: usize, value: u32) -> u32 {
        // Doorbells are memory.
        if offset_bytes >= reg::DOORBELLS || self.below(16_384) >= self.registers {
            return value;
        }
        let kind = if offset_bytes == reg::CSTS { Lie::Status } else { Lie::Register };
        if !self.tells(kind) {
            return value;
        }
        let told = self.twist(value);
        self.feigned_stop |= kind == Lie::Status && value & !told & csts::RDY != 0;
        told
    }

    /// Changes some words of identify data and logs.
    pub(super) fn data(&mut self, data: &mut [u8], kind: Lie) {
        if self.below(256) >= self.data || data.is_empty() || !self.tells(kind) {
            return;
        }
        for _ in 0..=self.below(8) {
            let near_start = self.below(2) == 0;
            let len_bytes = if near_start { data.len().min(600) } else { data.len() };
            let at = usize::try_from(self.below(len_bytes as u64)).unwrap_or(0);
            let value = self.twist(u32::from(data[at]));
            for (place, byte) in data[at..].iter_mut().zip(value.to_le_bytes()) {
                *place = byte;
            }
        }
    }

    /// The completions that take the place of a true one. Of admin commands fewer are changed.
    fn completions(&mut self, cq: u16, entry: [u32; 4]) -> (usize, [u32; 4], [u32; 4]) {
        let is_true = match cq {
            0 => self.below(4096) >= self.answers,
            _ => self.below(256) >= self.completions,
        };
        if is_true {
            return (1, entry, entry);
        }
        let mut other = entry;
        let at = usize::try_from(self.below(4)).unwrap_or(0);
        other[at] = self.twist(entry[at]);
        let changed = if cq == 0 { Lie::AdminAnswer } else { Lie::IoAnswer };
        match self.below(4) {
            0 if self.tells(Lie::Dropped) => (0, entry, entry),
            1 if self.tells(changed) => (2, entry, other),
            2 if self.tells(Lie::Doubled) => (2, entry, entry),
            3 if self.tells(changed) => (1, other, other),
            _ => (1, entry, entry),
        }
    }

    /// A completion that nobody asked for, for one of the first queues.
    fn idle(&mut self) -> Option<(u16, [u32; 4])> {
        if self.below(65536) >= self.idle || !self.tells(Lie::Invented) {
            return None;
        }
        let queue = (self.below(4) & 3) as u16;
        let cid = self.word() & 0x1fff;
        Some((queue, [self.word(), self.word(), self.word(), cid | self.word() & 0xfffe_0000]))
    }

    /// An event index for one of the first queues: queue, which of its doorbells, value.
    fn event_index(&mut self) -> Option<(u16, bool, u32)> {
        // Far more of them than of completions: most change nothing.
        if self.below(4096) >= self.idle || !self.tells(Lie::EventIndex) {
            return None;
        }
        let queue = (self.below(4) & 3) as u16;
        Some((queue, self.below(2) == 0, self.twist(0)))
    }
}

impl Machine {
    /// Posts what the controller makes of a completion.
    #[cold]
    pub(super) fn lie_about(&mut self, cq: u16, entry: [u32; 4]) {
        let Some(lies) = &self.link.lies else { return };
        let (count, first, second) = super::link::lock(lies).completions(cq, entry);
        if count > 0 {
            self.post(cq, first);
        }
        if count > 1 {
            self.post(cq, second);
        }
    }

    /// Posts something out of nothing, or moves an event index, seldom.
    pub(super) fn lie_idle(&mut self) {
        let Some(lies) = &self.link.lies else { return };
        if let Some(shadow) = &self.admin.shadow
            && let Some((queue, is_completion, value)) = super::link::lock(lies).event_index()
        {
            shadow.lie(queue, is_completion, value);
        }
        let Some((queue, entry)) = super::link::lock(lies).idle() else { return };
        let cq = self.cqs.get(usize::from(queue)).and_then(Option::as_ref);
        if cq.is_some_and(|cq| cq.room() > 0) {
            self.post(queue, entry);
            self.interrupt(queue);
        }
    }
}
