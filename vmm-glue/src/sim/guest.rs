//! A guest's block driver on one queue: builds requests of every odd shape, checks every answer, sleeps and wakes.
//!
//! Flow: dice → request → chain → kick?; used element → checks against the twin → next. Owner: the scheduler, which
//! calls `step` between the device's steps. **Invariant:** after it has fallen asleep only an interrupt moves it on.

use std::ops::Range;

use ringmill_core::limits::SERIAL_BYTES;
use ringmill_core::spec::virtio_blk as spec;
use ringmill_core::units::{bytes_u64, index, len_u32, usize_of};

use super::twin::{Claim, SECTOR, Stamp, Twin, pattern};
use super::watch::{STATUS_UNSET, Watch};
use super::{Buffer, Dice, GuestMemory, GuestRing};

/// Bytes of memory for the buffers of one request.
pub(super) const ARENA_BYTES: usize = 512 << 10;
/// Bytes of memory for its indirect table.
pub(super) const TABLE_BYTES: usize = 8 << 10;
const SECTORS_MAX: usize = 600;
const CANARY: u8 = 0xc5;
const CANARY_BYTES: u32 = 8;

/// What the queues of one guest share.
#[derive(Debug)]
pub(super) struct World {
    pub(super) memory: GuestMemory,
    pub(super) twin: Twin,
    pub(super) dice: Dice,
    pub(super) sectors_count: u64,
    pub(super) serial: [u8; SERIAL_BYTES],
    /// Counts what the guest does, to order it.
    pub(super) now: u64,
    pub(super) next_stamp: Stamp,
    /// Writes are stable when they complete.
    pub(super) write_through: bool,
    /// The disk fails now and then, or is gone.
    pub(super) errors_expected: bool,
}

/// Memory for one request.
#[derive(Debug)]
pub(super) struct Arena {
    pub(super) base: u64,
    pub(super) table: u64,
    pub(super) busy: bool,
    pub(super) usable: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    /// Must be answered with this status and change nothing.
    Bad(u8),
}

#[derive(Debug)]
struct Flight {
    job: Job,
    range: Range<u64>,
    buffers: Vec<Buffer>,
    sent: Vec<u8>,
    writable_bytes: u32,
    arena: usize,
    stamp: Stamp,
    issued_at: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Awake,
    /// Asked for an interrupt when more than this many elements are used; has not looked again yet.
    Falling(u16),
    Asleep,
}

/// A driver on one queue.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) ring: Box<dyn GuestRing>,
    pub(super) arenas: Vec<Arena>,
    /// An interrupt is pending.
    pub(super) interrupt: bool,
    /// Requests still to be issued.
    pub(super) left: usize,
    pub(super) answered_count: usize,
    pub(super) watch: Watch,
    flights: Vec<Option<Flight>>,
    inflight_count: usize,
    indirect: bool,
    event_idx: bool,
    polls: bool,
    phase: Phase,
    unpublished: bool,
    look_due: bool,
}

/// How the bytes of a request are cut into buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    Classic,
    Aligned,
    Whole,
    Few,
    Many,
}

impl Guest {
    pub(super) fn new(
        ring: Box<dyn GuestRing>,
        arenas: Vec<Arena>,
        requests_count: usize,
        (indirect, event_idx, polls): (bool, bool, bool),
    ) -> Guest {
        Guest {
            flights: (0..ring.size()).map(|_| None).collect(),
            watch: Watch::new(ring.size()),
            ring,
            arenas,
            interrupt: false,
            left: requests_count,
            answered_count: 0,
            inflight_count: 0,
            indirect,
            event_idx,
            polls,
            phase: Phase::Awake,
            unpublished: false,
            look_due: false,
        }
    }

    /// Everything was issued and answered.
    pub(super) fn is_done(&self) -> bool {
        self.left == 0 && self.inflight_count == 0
    }

    /// A step would do something.
    pub(super) fn can_run(&self) -> bool {
        match self.phase {
            Phase::Asleep => self.interrupt,
            Phase::Falling(_) => true,
            Phase::Awake => !self.is_done(),
        }
    }

    /// In words, for the report of a hang.
    pub(super) fn describe(&self, memory: &GuestMemory) -> String {
        format!(
            "{:?}, {} in flight, {} to issue, {}",
            self.phase,
            self.inflight_count,
            self.left,
            self.ring.describe(memory)
        )
    }

    /// One step of the driver; true when it kicks the device.
    pub(super) fn step(&mut self, world: &mut World) -> Result<bool, String> {
        match self.phase {
            Phase::Asleep => {
                if std::mem::take(&mut self.interrupt) {
                    self.phase = Phase::Awake;
                    self.ring.suppress_interrupts(&world.memory);
                }
                return Ok(false);
            }
            Phase::Falling(after) => {
                let awake = self.ring.used_waiting(&world.memory) > after;
                self.phase = if awake { Phase::Awake } else { Phase::Asleep };
                return Ok(false);
            }
            Phase::Awake => self.interrupt = false,
        }
        if self.unpublished && world.dice.chance(500) {
            self.publish(world);
        }
        if self.look_due && world.dice.chance(500) {
            self.look_due = false;
            return Ok(self.ring.wants_kick(&world.memory));
        }
        if self.ring.used_waiting(&world.memory) > 0 && world.dice.chance(600) {
            for _ in 0..world.dice.between(1, 8) {
                if !self.harvest(world)? {
                    break;
                }
            }
            return Ok(false);
        }
        if self.left > 0 && world.dice.chance(600) {
            for _ in 0..world.dice.between(1, 5) {
                self.issue(world);
            }
            return Ok(false);
        }
        if self.unpublished {
            self.publish(world);
        } else if !self.look_due && !self.polls && self.inflight_count > 0 && world.dice.chance(500)
        {
            let most = if self.event_idx { self.ring.waiting_max() - 1 } else { 0 };
            let far = world.dice.chance(300);
            let after = if far { world.dice.index(usize::from(most) + 1) } else { 0 };
            let after = u16::try_from(after).unwrap_or(0);
            self.ring.ask_interrupt(&world.memory, after);
            self.phase = Phase::Falling(after);
        }
        Ok(false)
    }

    fn publish(&mut self, world: &mut World) {
        self.unpublished = false;
        self.look_due |= self.ring.publish(&world.memory);
    }

    fn issue(&mut self, world: &mut World) {
        let Some(at) = self.arenas.iter().position(|a| a.usable && !a.busy) else { return };
        if self.left == 0 {
            return;
        }
        world.now += 1;
        let job = choose_job(&mut world.dice);
        let range = match job {
            Job::Read | Job::Write | Job::Discard | Job::WriteZeroes => {
                let claim = match job {
                    Job::Read => Claim::Reads,
                    Job::Write if world.dice.chance(300) => Claim::Races,
                    _ => Claim::Alone,
                };
                match choose_range(world, claim) {
                    Some(range) => range,
                    None => return,
                }
            }
            _ => 0..0,
        };
        let stamp = if job == Job::Write { world.next_stamp } else { 0 };
        let (sent, data_in) = message(world, job, &range, stamp);
        let buffers = place(world, &self.arenas[at], &sent, data_in);
        let fits = buffers.len() <= self.ring.free_count();
        let direct_count = match (fits, self.indirect) {
            (false, false) => return,
            (true, false) => buffers.len(),
            (true, true) if world.dice.chance(400) => buffers.len(),
            (_, true) if world.dice.chance(300) => world.dice.index(buffers.len()),
            (_, true) => 0,
        };
        let (memory, dice) = (&world.memory, &mut world.dice);
        let table = self.arenas[at].table + dice.below(64);
        let Some(head) = self.ring.add(memory, dice, &buffers, direct_count, table) else { return };
        match job {
            Job::Read => world.twin.begin_read(&range),
            Job::Write | Job::Discard | Job::WriteZeroes => world.twin.begin_write(&range, stamp),
            _ => {}
        }
        world.next_stamp += 1;
        let writable = buffers.iter().filter(|b| b.writable);
        let status = buffers.last().and_then(|b| memory.byte(b.addr + u64::from(b.len_bytes) - 1));
        self.watch.expect(head, status);
        self.flights[usize::from(head)] = Some(Flight {
            job,
            range,
            writable_bytes: writable.map(|b| b.len_bytes).sum(),
            sent,
            buffers,
            arena: at,
            stamp,
            issued_at: world.now,
        });
        self.arenas[at].busy = true;
        self.inflight_count += 1;
        self.left -= 1;
        self.unpublished = true;
    }

    /// Takes one answer; false when there is none.
    fn harvest(&mut self, world: &mut World) -> Result<bool, String> {
        let Some((id, len)) = self.ring.take_used(&world.memory) else { return Ok(false) };
        let flight = self.flights.get_mut(index(id)).and_then(Option::take);
        let Some(flight) = flight else {
            return Err(format!("used element for head {id}, which is not in flight"));
        };
        world.now += 1;
        self.inflight_count -= 1;
        self.answered_count += 1;
        self.arenas[flight.arena].busy = false;
        if len != flight.writable_bytes {
            return Err(format!("used length {len} instead of {}", flight.writable_bytes));
        }
        let (received, status) = collect(&world.memory, &flight)?;
        finish(world, &flight, &received, status)
            .map_err(|e| format!("{:?} of sectors {:?}: {e}", flight.job, flight.range))?;
        Ok(true)
    }
}

fn choose_job(dice: &mut Dice) -> Job {
    match dice.below(100) {
        0..36 => Job::Read,
        36..78 => Job::Write,
        78..85 => Job::Flush,
        85..88 => Job::GetId,
        88..91 => Job::Discard,
        91..96 => Job::WriteZeroes,
        96..98 => Job::Bad(spec::S_UNSUPP),
        _ => Job::Bad(spec::S_IOERR),
    }
}

/// A range that gets along with what is in flight, small and crowded more often than not.
fn choose_range(world: &mut World, claim: Claim) -> Option<Range<u64>> {
    for _ in 0..4 {
        let dice = &mut world.dice;
        let most = match dice.below(100) {
            0..60 => 8,
            60..85 => 32,
            85..96 => 128,
            _ => SECTORS_MAX,
        };
        let count = bytes_u64(dice.between(1, most)).min(world.sectors_count);
        let crowd = if dice.chance(500) { 64 } else { world.sectors_count };
        let mut first = dice.below(crowd.min(world.sectors_count - count) + 1);
        if dice.chance(300) {
            first -= first % 8;
        }
        let count = if dice.chance(300) { count.next_multiple_of(8) } else { count };
        let range = first..(first + count).min(world.sectors_count);
        if world.twin.is_free(&range, claim) {
            return Some(range);
        }
    }
    None
}

/// The bytes that the device reads, and how many it writes before the status.
fn message(world: &mut World, job: Job, range: &Range<u64>, stamp: Stamp) -> (Vec<u8>, usize) {
    let dice = &mut world.dice;
    let bytes = usize_of(range.end - range.start) * SECTOR;
    let header = |kind: u32, sector: u64, rest: &[u8]| {
        let mut out = Vec::with_capacity(16 + rest.len());
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(&[0x55; 4]);
        out.extend_from_slice(&sector.to_le_bytes());
        out.extend_from_slice(rest);
        out
    };
    let span = |sector: u64, count: u32, flags: u32| {
        let mut out = [0u8; 16];
        out[..8].copy_from_slice(&sector.to_le_bytes());
        out[8..12].copy_from_slice(&count.to_le_bytes());
        out[12..].copy_from_slice(&flags.to_le_bytes());
        out
    };
    let sectors = len_u32(usize_of(range.end - range.start));
    let junk = dice.bits();
    match job {
        Job::Read => (header(spec::T_IN, range.start, &[]), bytes),
        Job::Write => {
            let mut data = vec![0; bytes];
            for (sector, part) in range.clone().zip(data.chunks_exact_mut(SECTOR)) {
                pattern(stamp, sector, part);
            }
            // A writable byte or two before the status must not confuse anybody.
            (header(spec::T_OUT, range.start, &data), dice.pick(&[0, 0, 0, 3]))
        }
        Job::Flush => (header(spec::T_FLUSH, junk, &[]), 0),
        Job::GetId => (header(spec::T_GET_ID, 0, &[]), dice.pick(&[20, 20, 20, 1, 40])),
        Job::Discard => (header(spec::T_DISCARD, junk, &span(range.start, sectors, 0)), 0),
        Job::WriteZeroes => {
            let flags = u32::from(dice.chance(500));
            (header(spec::T_WRITE_ZEROES, junk, &span(range.start, sectors, flags)), 0)
        }
        Job::Bad(spec::S_UNSUPP) => match dice.below(3) {
            0 => (header(77, 0, &[1, 2, 3]), 5),
            1 => (header(spec::T_DISCARD, 0, &span(0, 1, 1)), 0),
            _ => (header(spec::T_WRITE_ZEROES, 0, &span(0, 1, 2)), 0),
        },
        Job::Bad(_) => match dice.below(6) {
            0 => (header(spec::T_IN, world.sectors_count, &[]), SECTOR),
            1 => (header(spec::T_IN, u64::MAX - 1, &[]), 2 * SECTOR),
            2 => (header(spec::T_OUT, 0, &[9; 700]), 0),
            3 => (header(spec::T_IN, 0, &[])[..dice.between(1, 15)].to_vec(), 1),
            4 => (header(spec::T_DISCARD, 0, &[0; 32]), 0),
            _ => (header(spec::T_WRITE_ZEROES, 0, &span(world.sectors_count - 1, 2, 0)), 0),
        },
    }
}

/// Lengths of the pieces of a stream of `front`, `data` and `tail` bytes.
fn cut(dice: &mut Dice, how: Cut, front: usize, data: usize, tail: usize) -> Vec<usize> {
    let total = front + data + tail;
    let mut cuts = Vec::new();
    match how {
        Cut::Whole => {}
        Cut::Classic | Cut::Aligned => {
            let step = if how == Cut::Aligned { 512 * dice.between(1, 16) } else { 4096 };
            cuts.push(front);
            cuts.extend((1..data.div_ceil(step)).take(150).map(|i| front + i * step));
            cuts.push(front + data);
        }
        Cut::Few => cuts.extend((0..dice.between(1, 6)).map(|_| dice.index(total))),
        Cut::Many => cuts.extend((0..dice.between(10, 120)).map(|_| dice.index(total))),
    }
    cuts.push(0);
    cuts.push(total);
    cuts.sort_unstable();
    cuts.dedup();
    cuts.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

/// Lays a request out in its arena: writes what the device reads, prepares what it writes.
fn place(world: &mut World, arena: &Arena, sent: &[u8], data_in: usize) -> Vec<Buffer> {
    let World { memory, dice, .. } = world;
    let how = dice.pick(&[Cut::Classic, Cut::Aligned, Cut::Whole, Cut::Few, Cut::Many]);
    let front = sent.len().min(16);
    let readable = cut(dice, how, front, sent.len() - front, 0);
    let writable = cut(dice, how, 0, data_in, 1);
    let pieces = readable.iter().map(|&len| (len, false));
    let pieces: Vec<(usize, bool)> =
        pieces.chain(writable.iter().map(|&len| (len, true))).collect();
    let end = arena.base + bytes_u64(ARENA_BYTES);
    let mut needed = bytes_u64(sent.len() + data_in + 1 + 48 * pieces.len());
    let mut at = arena.base + dice.below((end - arena.base - needed).min(4096));
    let mut rest = sent;
    let mut buffers = Vec::with_capacity(pieces.len());
    for &(len, writable) in &pieces {
        at += 16 + dice.below(16);
        if how == Cut::Aligned && at.next_multiple_of(4096) + needed < end {
            at = at.next_multiple_of(4096);
        }
        needed -= bytes_u64(len) + 48;
        let buffer = Buffer { addr: at, len_bytes: len_u32(len), writable };
        if writable {
            memory.fill(at - u64::from(CANARY_BYTES), CANARY_BYTES, CANARY);
            memory.fill(at, buffer.len_bytes, STATUS_UNSET);
            memory.fill(at + bytes_u64(len), CANARY_BYTES, CANARY);
        } else {
            let (now, later) = rest.split_at(len);
            memory.write(at, now);
            rest = later;
        }
        at += bytes_u64(len);
        buffers.push(buffer);
    }
    buffers
}

/// What the device wrote, without the status, and the status.
fn collect(memory: &GuestMemory, flight: &Flight) -> Result<(Vec<u8>, u8), String> {
    let mut received = vec![0; index(flight.writable_bytes)];
    let (mut at, mut sent_at) = (0, 0);
    for buffer in &flight.buffers {
        let len = index(buffer.len_bytes);
        if buffer.writable {
            let mut edges = [0; 2 * CANARY_BYTES as usize];
            let (before, after) = edges.split_at_mut(index(CANARY_BYTES));
            memory.read(buffer.addr - u64::from(CANARY_BYTES), before);
            memory.read(buffer.addr + u64::from(buffer.len_bytes), after);
            if edges.iter().any(|&b| b != CANARY) {
                return Err(format!("bytes beside {buffer:?} were overwritten"));
            }
            memory.read(buffer.addr, &mut received[at..at + len]);
            at += len;
        } else {
            let mut now = vec![0; len];
            memory.read(buffer.addr, &mut now);
            if now != flight.sent[sent_at..sent_at + len] {
                return Err(format!("the device wrote to {buffer:?}"));
            }
            sent_at += len;
        }
    }
    let status = received.pop().ok_or("no status byte")?;
    Ok((received, status))
}

fn finish(world: &mut World, flight: &Flight, received: &[u8], status: u8) -> Result<(), String> {
    let (now, range) = (world.now, &flight.range);
    let ok = status == spec::S_OK;
    let valid = !matches!(flight.job, Job::Bad(_));
    if valid && !ok && !(world.errors_expected && status == spec::S_IOERR) {
        return Err(format!("answered with status {status:#x}"));
    }
    match flight.job {
        Job::Read => world.twin.end_read(range, ok.then_some(received), now)?,
        Job::Write | Job::WriteZeroes => {
            world.twin.end_write(range, flight.stamp, ok, world.write_through, now);
        }
        Job::Discard => world.twin.end_write(range, 0, false, false, now),
        Job::Flush if ok => world.twin.flushed(flight.issued_at),
        Job::Flush => {}
        Job::GetId => {
            let count = received.len().min(SERIAL_BYTES);
            let rest_is_untouched = received[count..].iter().all(|&b| b == STATUS_UNSET);
            if received[..count] != world.serial[..count] || !rest_is_untouched {
                return Err(format!("the serial reads {received:02x?}"));
            }
        }
        Job::Bad(expected) if status == expected => {}
        Job::Bad(expected) => return Err(format!("status {status:#x}, expected {expected:#x}")),
    }
    Ok(())
}
