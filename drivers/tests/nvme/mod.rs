//! Controllers in software, attached, for the tests of the NVMe driver.
#![allow(dead_code, reason = "each test program uses its part")]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ringmill_core::IoStatus;
use ringmill_core::bdev::Bdev;
use ringmill_core::bdev::conformance::TestBed;
use ringmill_core::io::{IoFlags, IoOp, Tag};
use ringmill_core::reactor::{IdlePolicy, ReactorConfig, ReactorHandle, spawn};
use ringmill_drivers::model::{Medium, ModelControl, ModelNamespace, ModelOptions, start};
use ringmill_drivers::nvme::{
    ControllerState, Counters, NvmeControl, NvmeError, NvmeEvent, NvmeEvents, NvmeOptions, attach,
};

pub(crate) const SIZE_BYTES: u64 = 16 << 20;
pub(crate) const PAGE: u64 = 4096;

/// Events in the order in which they came.
#[derive(Clone, Default)]
pub(crate) struct Heard(Arc<Mutex<Vec<NvmeEvent>>>);

impl Heard {
    pub(crate) fn listener(&self) -> NvmeEvents {
        let all = Arc::clone(&self.0);
        Arc::new(move |event| all.lock().unwrap().push(event))
    }

    pub(crate) fn all(&self) -> Vec<NvmeEvent> {
        self.0.lock().unwrap().clone()
    }

    pub(crate) fn removed(&self) -> Option<String> {
        self.all().into_iter().find_map(|event| match event {
            NvmeEvent::Removed { reason } => Some(reason),
            _ => None,
        })
    }

    pub(crate) fn namespaces(&self) -> usize {
        self.all().iter().filter(|event| **event == NvmeEvent::Namespaces).count()
    }
}

/// Waits for something that must come.
pub(crate) fn until(what: &str, mut is_there: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_there() {
        assert!(start.elapsed() < Duration::from_secs(20), "never: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Short deadlines, so that tests of them are.
pub(crate) fn options() -> NvmeOptions {
    NvmeOptions {
        timeout: Duration::from_millis(150),
        timeout_admin: Duration::from_millis(300),
        ..NvmeOptions::default()
    }
}

/// Patient ones, for tests that must not meet them on a busy machine.
pub(crate) fn patient() -> NvmeOptions {
    NvmeOptions { timeout: Duration::from_secs(60), ..NvmeOptions::default() }
}

/// A RAM medium's namespace.
pub(crate) fn namespace(nsid: u32, block_shift: u8) -> ModelNamespace {
    let medium = Medium::ram(SIZE_BYTES).expect("memory");
    ModelNamespace::new(nsid, block_shift, SIZE_BYTES >> block_shift, medium)
}

/// A modelled controller and the driver's hand on it.
pub(crate) struct Rig {
    pub(crate) model: ModelControl,
    pub(crate) control: Arc<dyn NvmeControl>,
    pub(crate) heard: Heard,
}

impl Rig {
    pub(crate) fn try_new(
        model: ModelOptions,
        namespaces: Vec<ModelNamespace>,
        options: NvmeOptions,
        reactors: &[ReactorHandle],
        before: impl FnOnce(&ModelControl),
    ) -> (Result<Arc<dyn NvmeControl>, NvmeError>, ModelControl, Heard) {
        let (backing, control) = start(model, namespaces).expect("a model");
        before(&control);
        let heard = Heard::default();
        (attach(backing, options, reactors, heard.listener()), control, heard)
    }

    pub(crate) fn new(model: ModelOptions, options: NvmeOptions) -> Rig {
        Rig::with(model, vec![namespace(1, 9)], options, &[])
    }

    pub(crate) fn with(
        model: ModelOptions,
        namespaces: Vec<ModelNamespace>,
        options: NvmeOptions,
        reactors: &[ReactorHandle],
    ) -> Rig {
        let (control, model, heard) = Rig::try_new(model, namespaces, options, reactors, |_| {});
        Rig { model, control: control.expect("an attached controller"), heard }
    }

    pub(crate) fn bdev(&self, nsid: u32) -> Arc<dyn Bdev> {
        let all = self.control.namespaces();
        let found = all.into_iter().find(|ns| ns.info.nsid == nsid).expect("the namespace");
        found.bdev.unwrap_or_else(|| panic!("refused: {:?}", found.info.refused))
    }

    pub(crate) fn counters(&self) -> Counters {
        self.control.info().counters
    }

    pub(crate) fn state(&self) -> ControllerState {
        self.control.info().state
    }

    /// Detached without a word of complaint, and nothing is left mapped.
    pub(crate) fn finish(self) {
        self.control.detach();
        assert_eq!(self.model.complaint(), None);
        assert_eq!(self.model.mapped_count(), 0);
        assert_eq!(self.state(), ControllerState::Detached);
    }
}

/// A reactor that sleeps as soon as it can.
pub(crate) fn sleepy() -> ReactorHandle {
    let idle = IdlePolicy::Adaptive { spin_ns: 20_000 };
    spawn(&ReactorConfig { core: None, idle, io_wq_cpus: Vec::new() }).expect("a reactor")
}

/// Ready times that tests can wait for.
pub(crate) fn quick() -> ModelOptions {
    ModelOptions { ready_timeout_500ms: 0, ..ModelOptions::default() }
}

pub(crate) fn hurried() -> NvmeOptions {
    NvmeOptions { ready_timeout_max: Duration::from_millis(200), ..options() }
}

pub(crate) fn fill(block: u64) -> Vec<u8> {
    let word = |at: usize| (block << 32 | at as u64).to_le_bytes();
    (0..512).flat_map(word).collect()
}

/// Writes pages, has `fault` happen while they are out, and says how each ended.
pub(crate) fn writes_during(bed: &mut TestBed, count: u64, fault: impl FnOnce()) -> Vec<IoStatus> {
    let mut ends = vec![None; usize::try_from(count).unwrap()];
    let mut tags = Vec::new();
    let mut turn = |bed: &mut TestBed, tags: &[Tag]| {
        bed.turn(|tag, status| {
            let at = tags.iter().position(|t| *t == tag).expect("a known tag");
            assert_eq!(ends[at].replace(status), None, "ended twice");
        });
    };
    let start = Instant::now();
    for block in 0..count {
        let segment = bed.segment(usize::try_from(block).unwrap(), 0, 4096);
        segment.write_from(&fill(block));
        while tags.len() <= usize::try_from(block).unwrap() {
            // A pair that was not told to run yet, or is on its way back, has no room.
            let way = (IoOp::Write, IoFlags::NONE, block * PAGE, PAGE);
            match bed.offer(way.0, way.1, way.2, way.3, &[segment]) {
                Some(tag) => tags.push(tag),
                None => turn(bed, &tags),
            }
            assert!(start.elapsed() < Duration::from_secs(30), "no room");
        }
    }
    bed.cx.turn_ring();
    fault();
    while bed.out_count() > 0 {
        turn(bed, &tags);
        assert!(start.elapsed() < Duration::from_secs(30), "{} lost", bed.out_count());
    }
    ends.into_iter().map(|end| end.expect("an end")).collect()
}

pub(crate) fn all_ok(ends: &[IoStatus]) {
    assert!(ends.iter().all(|end| end.is_ok()), "{ends:?}");
}

/// What was written is there, by a read of the driver and on the medium.
pub(crate) fn is_written(bed: &mut TestBed, count: u64) {
    for block in 0..count {
        assert!(bed.read(block * PAGE, 4096).expect("a read") == fill(block), "block {block}");
    }
}
