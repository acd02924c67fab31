//! Controllers in software, attached, for the tests of the NVMe driver.
#![allow(dead_code, reason = "each test program uses its part")]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ringmill_core::bdev::Bdev;
use ringmill_core::reactor::{IdlePolicy, ReactorConfig, ReactorHandle, spawn};
use ringmill_drivers::model::{Medium, ModelControl, ModelNamespace, ModelOptions, start};
use ringmill_drivers::nvme::{
    ControllerState, Counters, NvmeControl, NvmeError, NvmeEvent, NvmeEvents, NvmeOptions, attach,
};

pub(crate) const SIZE_BYTES: u64 = 16 << 20;

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
