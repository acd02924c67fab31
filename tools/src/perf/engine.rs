//! HOT PATH
//! The loop of a load: polls every queue, starts a successor for each finished request, and looks at the clock.
//!
//! Owner: one thread with all its lanes (queues). **Invariant:** every wait is bounded: a lane without an answer for the
//! plan's time ends the load with an error that names it.
//!
//! loop:
//!   per lane: poll → time → status, next request (same slot) … → publish once → record latencies
//!   when it is time: ramp ends, time is up, progress, hangs

use ringmill_core::mem::Segment;
use ringmill_core::reactor::{ns_to_ticks, ticks_now};

use super::PerfError;
use super::pace::Pace;
use super::port::Port;
use super::record::Recorder;
use super::slots::Op;

/// Empty rounds after which the clock is read.
const EMPTY_ROUNDS_PER_LOOK: u64 = 512;
/// Time between two looks at progress and hangs.
const LOOK_EVERY_NS: u64 = 100_000_000;

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Io {
    pub(crate) op: Op,
    /// First byte on the disk.
    pub(crate) offset_bytes: u64,
}

/// Decides what is requested.
pub(crate) trait Workload {
    /// Whether `before` and `after` want to be called.
    const TOUCHES_DATA: bool;

    /// The next request of a lane; `None`: none now.
    fn next(&mut self, lane: usize) -> Option<Io>;

    /// True when `next` will never return a request again.
    fn is_over(&self) -> bool {
        false
    }

    /// Before a request starts: fill what is to be written.
    fn before(&mut self, _lane: usize, _io: Io, _data: Segment) {}

    /// After it has finished (`ok`) or failed: look at what was read.
    fn after(&mut self, _lane: usize, _io: Io, _data: Segment, _ok: bool) {}
}

/// How long, and how patient.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) ramp_ns: u64,
    /// 0: until the workload is over.
    pub(crate) duration_ns: u64,
    /// Requests per second over all lanes; `None`: as many as go.
    pub(crate) rate: Option<f64>,
    pub(crate) hang_ns: u64,
}

/// What the caller hears, about ten times a second.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    /// Since the start, ramp included.
    pub(crate) elapsed_ns: u64,
    /// Requests finished so far.
    pub(crate) finished_count: u64,
}

/// Hears of progress; `Ok(false)` ends the load early.
pub(crate) type Watch<'a> = dyn FnMut(Progress) -> Result<bool, PerfError> + 'a;

/// The first failed request.
#[derive(Clone, Debug)]
pub(crate) struct FirstError {
    pub(crate) place: String,
    pub(crate) io: Io,
    pub(crate) status: u8,
}

/// What a load did.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// By group of lanes.
    pub(crate) records: Vec<Recorder>,
    /// The measured time.
    pub(crate) elapsed_ns: u64,
    /// Rounds over all lanes, and those that found nothing: how idle the client was.
    pub(crate) rounds_count: u64,
    pub(crate) empty_rounds_count: u64,
    pub(crate) first_error: Option<FirstError>,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    start_ticks: u64,
    io: Io,
}

/// A queue under load.
#[derive(Debug)]
pub(crate) struct Lane<P> {
    pub(crate) port: P,
    index: usize,
    /// Whose record its latencies go to.
    group: usize,
    slots: Vec<Slot>,
    free: Vec<u16>,
    done: Vec<u16>,
    inflight: usize,
    last_answer_ticks: u64,
    /// Requests finished in the measured time.
    pub(crate) measured_count: u64,
}

impl<P: Port> Lane<P> {
    /// A lane with all slots free; `index` is its number among all lanes, `group` the record that it writes to.
    #[cold]
    pub(crate) fn new(port: P, index: usize, group: usize) -> Lane<P> {
        let depth = port.depth();
        let slot = Slot { start_ticks: 0, io: Io { op: Op::Read, offset_bytes: 0 } };
        Lane {
            port,
            index,
            group,
            slots: std::iter::repeat_n(slot, usize::from(depth)).collect(),
            free: (0..depth).rev().collect(),
            done: Vec::with_capacity(usize::from(depth)),
            inflight: 0,
            last_answer_ticks: 0,
            measured_count: 0,
        }
    }

    #[cold]
    #[inline(never)]
    fn hang(&self, silence_ns: u64) -> PerfError {
        let busy = |slot: &u16| !self.free.contains(slot) && !self.done.contains(slot);
        let slots = (0..self.port.depth()).filter(busy).map(|slot| self.slots[usize::from(slot)]);
        let oldest = slots.min_by_key(|slot| slot.start_ticks).unwrap_or(self.slots[0]);
        let (avail_index, used_index) = self.port.indices();
        PerfError::Hang {
            place: self.port.place().to_owned(),
            seconds: silence_ns / 1_000_000_000,
            inflight: self.inflight,
            avail_index,
            used_index,
            op: oldest.io.op.name(),
            offset: oldest.io.offset_bytes,
        }
    }
}

/// A load under way.
struct Engine<'a, W> {
    work: &'a mut W,
    records: Vec<Recorder>,
    measuring: bool,
    pace: Pace,
    /// Whether requests are started.
    open: bool,
    now_ticks: u64,
    inflight: usize,
    first_error: Option<FirstError>,
}

impl<W: Workload> Engine<'_, W> {
    /// Starts a request in a slot of the lane, if there is one to start; it is not published yet.
    #[inline(always)]
    fn begin<P: Port>(&mut self, lane: &mut Lane<P>, slot: u16) -> bool {
        if !self.open {
            return false;
        }
        let Some(start_ticks) = self.pace.due(self.now_ticks) else { return false };
        let Some(io) = self.work.next(lane.index) else { return false };
        self.pace.took();
        if W::TOUCHES_DATA {
            self.work.before(lane.index, io, lane.port.data(slot));
        }
        lane.slots[usize::from(slot)] = Slot { start_ticks, io };
        lane.port.push(slot, io.op, io.offset_bytes);
        true
    }

    /// One look at one lane; true when it found something to do.
    #[inline]
    fn turn<P: Port>(&mut self, lane: &mut Lane<P>) -> Result<bool, PerfError> {
        lane.done.clear();
        lane.port.poll(&mut lane.done)?;
        let found = lane.done.len();
        if found == 0 {
            return if self.open && !lane.free.is_empty() { self.refill(lane) } else { Ok(false) };
        }
        self.now_ticks = ticks_now();
        lane.last_answer_ticks = self.now_ticks;
        let mut started = 0;
        for at in 0..found {
            let slot = lane.done[at];
            let Slot { start_ticks, io } = lane.slots[usize::from(slot)];
            let status = lane.port.status(slot);
            if W::TOUCHES_DATA {
                self.work.after(lane.index, io, lane.port.data(slot), status == 0);
            }
            if status == 0 {
                self.records[lane.group].note(io.op, start_ticks);
            } else {
                self.failed(lane, io, status);
            }
            if self.begin(lane, slot) {
                started += 1;
            } else {
                lane.free.push(slot);
            }
        }
        if started > 0 {
            lane.port.publish()?;
        }
        lane.inflight = lane.inflight + started - found;
        self.inflight = self.inflight + started - found;
        if self.measuring {
            lane.measured_count += found as u64;
        }
        self.records[lane.group].flush(self.now_ticks, self.measuring);
        Ok(true)
    }

    /// Starts requests in free slots; true when any could be started.
    #[cold]
    #[inline(never)]
    fn refill<P: Port>(&mut self, lane: &mut Lane<P>) -> Result<bool, PerfError> {
        self.now_ticks = ticks_now();
        if lane.inflight == 0 {
            lane.last_answer_ticks = self.now_ticks;
        }
        let mut started = 0;
        while let Some(slot) = lane.free.pop() {
            if !self.begin(lane, slot) {
                lane.free.push(slot);
                break;
            }
            started += 1;
        }
        if started > 0 {
            lane.port.publish()?;
        }
        lane.inflight += started;
        self.inflight += started;
        Ok(started > 0)
    }

    #[cold]
    #[inline(never)]
    fn failed<P: Port>(&mut self, lane: &Lane<P>, io: Io, status: u8) {
        self.records[lane.group].ops[io.op as usize].errors_count += 1;
        self.first_error.get_or_insert_with(|| FirstError {
            place: lane.port.place().to_owned(),
            io,
            status,
        });
    }
}

/// Runs a load on all lanes until its time is up or its workload over, and waits for the last answer.
///
/// # Errors
/// A hang, a device that breaks the rules, or what `watch` says. Failed requests are no error here; they are counted.
pub(crate) fn run<P: Port, W: Workload>(
    lanes: &mut [Lane<P>],
    work: &mut W,
    plan: &Plan,
    watch: &mut Watch<'_>,
) -> Result<Outcome, PerfError> {
    let groups_count = lanes.iter().map(|lane| lane.group + 1).max().unwrap_or(1);
    let batch_max = lanes.iter().map(|lane| lane.slots.len()).max().unwrap_or(0);
    let start = ticks_now();
    let mut engine = Engine {
        work,
        records: Recorder::one_each(groups_count, batch_max),
        measuring: plan.ramp_ns == 0,
        pace: Pace::new(plan.rate, start),
        open: true,
        now_ticks: start,
        inflight: 0,
        first_error: None,
    };
    let ramp_end = start + ns_to_ticks(plan.ramp_ns);
    let end = match plan.duration_ns {
        0 => u64::MAX,
        duration_ns => ramp_end + ns_to_ticks(duration_ns),
    };
    let look_every = ns_to_ticks(LOOK_EVERY_NS);
    let hang_ticks = ns_to_ticks(plan.hang_ns);
    let mut measured_from = start;
    let mut measured_to = None;
    let mut next_look = start + look_every;
    // The next moment at which something has to be done besides requests.
    let mut next_stop = next_look.min(if plan.ramp_ns > 0 { ramp_end } else { end });
    let (mut rounds_count, mut empty_rounds_count) = (0u64, 0u64);
    for lane in lanes.iter_mut() {
        lane.last_answer_ticks = start;
    }
    loop {
        let mut found = false;
        for lane in lanes.iter_mut() {
            found |= engine.turn(lane)?;
        }
        rounds_count += 1;
        if !found {
            empty_rounds_count += 1;
            if engine.inflight == 0 && (!engine.open || engine.work.is_over()) {
                break;
            }
            if empty_rounds_count.is_multiple_of(EMPTY_ROUNDS_PER_LOOK) {
                engine.now_ticks = ticks_now();
            }
            std::hint::spin_loop();
        }
        let now = engine.now_ticks;
        if now < next_stop {
            continue;
        }
        if !engine.measuring && measured_to.is_none() && now >= ramp_end {
            engine.measuring = true;
            measured_from = now;
            (rounds_count, empty_rounds_count) = (0, 0);
        }
        if engine.open && now >= end {
            engine.open = false;
            engine.measuring = false;
            measured_to = Some(now);
        }
        if now >= next_look {
            next_look = now + look_every;
            for lane in lanes.iter() {
                if lane.inflight > 0 && now.saturating_sub(lane.last_answer_ticks) > hang_ticks {
                    let silence = now.saturating_sub(lane.last_answer_ticks);
                    return Err(lane.hang(engine.records[0].ns(silence)));
                }
            }
            let ops = engine.records.iter().flat_map(|record| &record.ops);
            let finished_count = ops.map(|op| op.finished_count).sum();
            let elapsed_ns = engine.records[0].ns(now.saturating_sub(start));
            if !watch(Progress { elapsed_ns, finished_count })? && engine.open {
                engine.open = false;
                engine.measuring = false;
                measured_to = Some(now);
            }
        }
        next_stop = next_look;
        if engine.open {
            next_stop = next_stop.min(if measured_from < ramp_end { ramp_end } else { end });
        }
    }
    let elapsed = measured_to.unwrap_or(engine.now_ticks).saturating_sub(measured_from);
    let Engine { records, first_error, .. } = engine;
    let elapsed_ns = records[0].ns(elapsed);
    Ok(Outcome { records, elapsed_ns, rounds_count, empty_rounds_count, first_error })
}
